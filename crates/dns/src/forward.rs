//! Asking the resolvers of the host what is not in the cluster.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::answer::{Forward, encode};

/// How long one resolver has for one answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// All resolvers are asked this many times.
const ROUNDS: usize = 2;
/// More than these at a time are not asked; the client will try again.
const IN_FLIGHT_MAX: usize = 512;
/// As many resolvers as the C library heeds.
const RESOLVERS_MAX: usize = 3;
const ANSWER_MAX: usize = 4096;
/// Answers that are remembered, and for how long at most.
const CACHE_MAX: usize = 4096;
const CACHE_TTL_MAX: u32 = 30;
/// How often a changed resolv.conf is looked for, when there are questions.
const RECHECK: Duration = Duration::from_secs(5);

/// The resolvers of the host and what they said lately.
pub(crate) struct Forwarder {
    resolv_conf: PathBuf,
    /// Our own addresses, which may well be in resolv.conf.
    own: Vec<IpAddr>,
    resolvers: Mutex<Resolvers>,
    in_flight: Semaphore,
    cache: Mutex<HashMap<CacheKey, Cached>>,
}

#[derive(Default)]
struct Resolvers {
    checked: Option<Instant>,
    modified: Option<SystemTime>,
    addresses: Vec<SocketAddr>,
}

/// Signatures are there only for those who asked for them, so they have entries of their own.
type CacheKey = (Name, RecordType, bool, bool);

struct Cached {
    answer: Message,
    until: Instant,
    since: Instant,
}

impl Forwarder {
    pub fn new(resolv_conf: PathBuf, own: Vec<IpAddr>) -> Forwarder {
        Forwarder {
            resolv_conf,
            own,
            resolvers: Mutex::default(),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            cache: Mutex::default(),
        }
    }

    /// The complete answer, as bytes; SERVFAIL when no resolver gives one.
    pub async fn complete(&self, forward: Forward) -> Vec<u8> {
        let size_max = forward.size_max;
        let found = match self.remembered(&forward) {
            Some(answer) => Some(answer),
            None => self.ask(&forward).await,
        };
        let mut reply = forward.partial;
        let Some(mut answer) = found else {
            reply.metadata.response_code = ResponseCode::ServFail;
            reply.metadata.authoritative = false;
            reply.answers.clear();
            return encode(reply, size_max);
        };
        // With an alias of ours before it, this is still our answer as to the name that was asked for.
        reply.metadata.authoritative &= !reply.answers.is_empty();
        reply.metadata.response_code = answer.metadata.response_code;
        reply.metadata.authentic_data = answer.metadata.authentic_data && reply.answers.is_empty();
        reply.answers.append(&mut answer.answers);
        reply.authorities = answer.authorities;
        reply.additionals = answer.additionals;
        encode(reply, size_max)
    }

    async fn ask(&self, forward: &Forward) -> Option<Message> {
        let Ok(_permit) = self.in_flight.try_acquire() else { return None };
        let resolvers = self.resolvers();
        for resolver in std::iter::repeat_n(&resolvers, ROUNDS).flatten() {
            match timeout(PATIENCE, ask_one(*resolver, forward)).await {
                Ok(Ok(answer)) if answer.metadata.response_code != ResponseCode::ServFail => {
                    self.remember(forward, &answer);
                    return Some(answer);
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(%resolver, %error, "Resolver gives no answer"),
                Err(_) => tracing::debug!(%resolver, "Resolver is silent"),
            }
        }
        None
    }

    /// The resolvers as the host has them now; its network may change while we run.
    fn resolvers(&self) -> Vec<SocketAddr> {
        let mut resolvers = self.resolvers.lock().expect("reading resolv.conf does not panic");
        if resolvers.checked.is_some_and(|checked| checked.elapsed() < RECHECK) {
            return resolvers.addresses.clone();
        }
        resolvers.checked = Some(Instant::now());
        let modified = std::fs::metadata(&self.resolv_conf).and_then(|file| file.modified()).ok();
        if modified != resolvers.modified || modified.is_none() {
            resolvers.modified = modified;
            resolvers.addresses = read_resolvers(&self.resolv_conf, &self.own);
        }
        resolvers.addresses.clone()
    }

    fn remembered(&self, forward: &Forward) -> Option<Message> {
        let cache = self.cache.lock().expect("nothing that has the cache panics");
        let cached = cache.get(&cache_key(forward))?;
        let now = Instant::now();
        if now >= cached.until {
            return None;
        }
        let age = u32::try_from(now.duration_since(cached.since).as_secs()).unwrap_or(u32::MAX);
        let mut answer = cached.answer.clone();
        for record in answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals)
        {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(answer)
    }

    /// Keeps what is there; that something is not there may change sooner than its zone says.
    fn remember(&self, forward: &Forward, answer: &Message) {
        let ttl = answer.answers.iter().map(|record| record.ttl).min().unwrap_or(0).min(CACHE_TTL_MAX);
        if ttl == 0 || answer.metadata.response_code != ResponseCode::NoError {
            return;
        }
        let now = Instant::now();
        let mut cache = self.cache.lock().expect("nothing that has the cache panics");
        if cache.len() >= CACHE_MAX {
            cache.retain(|_, cached| now < cached.until);
        }
        if cache.len() >= CACHE_MAX {
            // All are still good: start over rather than keep an order of use for this rare case.
            cache.clear();
        }
        let until = now + Duration::from_secs(ttl.into());
        cache.insert(cache_key(forward), Cached { answer: answer.clone(), until, since: now });
    }
}

fn cache_key(forward: &Forward) -> CacheKey {
    (forward.name.to_lowercase(), forward.record_type, forward.dnssec, forward.checking_disabled)
}

/// Asks over UDP, and over TCP if the answer does not fit.
async fn ask_one(resolver: SocketAddr, forward: &Forward) -> io::Result<Message> {
    let mut query = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.metadata.checking_disabled = forward.checking_disabled;
    query.queries.push(Query::query(forward.name.clone(), forward.record_type));
    let mut edns = Edns::new();
    edns.set_max_payload(1232).set_dnssec_ok(forward.dnssec);
    query.edns = Some(edns);
    let bytes = query.to_vec().map_err(io::Error::other)?;

    // A port and an id of its own for every question: forged answers have to guess both.
    let any: IpAddr = if resolver.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(&bytes).await?;
    let mut buffer = [0; ANSWER_MAX];
    let answer = loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = matching(&query, &buffer[..length]) {
            break answer;
        }
    };
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    let mut stream = TcpStream::connect(resolver).await?;
    let mut framed = (bytes.len() as u16).to_be_bytes().to_vec();
    framed.extend(&bytes);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut whole = vec![0; usize::from(length)];
    stream.read_exact(&mut whole).await?;
    matching(&query, &whole)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "answer to another question"))
}

/// The answer, if it is one to this question.
fn matching(query: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let same = answer.metadata.message_type == MessageType::Response
        && answer.metadata.id == query.metadata.id
        && answer.queries == query.queries;
    same.then_some(answer)
}

/// The name servers of a resolv.conf, less ourselves. systemd-resolved's stub knows only what it is
/// told on 127.0.0.53; the file beside it has the servers behind it, as the kubelet uses them too.
fn read_resolvers(path: &Path, own: &[IpAddr]) -> Vec<SocketAddr> {
    const STUB: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53));
    const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";
    let read = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        let addresses = servers.filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok());
        addresses.filter(|address| !own.contains(address)).take(RESOLVERS_MAX).collect::<Vec<IpAddr>>()
    };
    let mut addresses = read(path);
    if addresses == [STUB] {
        let behind = read(Path::new(BEHIND_STUB));
        if !behind.is_empty() {
            addresses = behind;
        }
    }
    addresses.into_iter().map(|address| SocketAddr::new(address, 53)).collect()
}

#[cfg(test)]
mod tests;
