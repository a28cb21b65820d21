//! Sockets: packets in, answers out.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use minke_client::Informers;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Outcome, resolve};
use crate::forward::Forwarder;
use crate::index::{Index, Zone};
use crate::updates;

/// A query is one question and perhaps EDNS; larger ones are cut, and answered as malformed.
const QUERY_MAX: usize = 4096;
const CONNECTIONS_MAX: usize = 128;
/// How long a connection may be idle, or take to send one query.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct DnsConfig {
    pub listen: SocketAddr,
    pub zone: Zone,
    /// The host's, usually /etc/resolv.conf.
    pub resolv_conf: PathBuf,
}

/// A server whose sockets are open.
pub struct Server {
    state: Arc<State>,
    udp: Arc<UdpSocket>,
    tcp: TcpListener,
}

struct State {
    index: Arc<RwLock<Index>>,
    forwarder: Forwarder,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Opens the sockets. Queries wait in them until [`Server::run`].
    ///
    /// # Errors
    /// When another program has the address and port, or this machine does not have the address.
    pub async fn bind(config: DnsConfig) -> io::Result<Server> {
        let tcp = TcpListener::bind(config.listen).await?;
        // With port 0 both get the same.
        let udp = UdpSocket::bind(tcp.local_addr()?).await?;
        let own = vec![config.listen.ip(), config.zone.server];
        let state = State {
            index: Arc::new(RwLock::new(Index::new(config.zone))),
            forwarder: Forwarder::new(config.resolv_conf, own),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        };
        Ok(Server { state: Arc::new(state), udp: Arc::new(udp), tcp })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Serves until `stop`. Names of the cluster are answered with SERVFAIL until all are known.
    pub async fn run(self, informers: &Informers, stop: CancellationToken) {
        let tasks = TaskTracker::new();
        let updates = updates::follow(self.state.index.clone(), informers, stop.clone());
        let udp = serve_udp(self.state.clone(), self.udp, tasks.clone());
        let tcp = serve_tcp(self.state, self.tcp, tasks);
        tokio::select! {
            () = stop.cancelled() => {}
            _ = async { tokio::join!(updates, udp, tcp) } => {}
        }
    }
}

impl State {
    /// The outcome for the bytes of a query; the lock is held for microseconds.
    fn resolve(&self, query: &[u8], tcp: bool) -> Outcome {
        resolve(&self.index.read().expect("changing the index does not panic"), query, tcp)
    }
}

async fn serve_udp(state: Arc<State>, socket: Arc<UdpSocket>, tasks: TaskTracker) {
    let mut buffer = [0; QUERY_MAX];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // An ICMP error of an earlier answer, mostly: that client is gone, the others are not.
                tracing::debug!(%error, "Receiving a query failed");
                tokio::task::yield_now().await;
                continue;
            }
        };
        match state.resolve(&buffer[..length], false) {
            Outcome::Ignore => {}
            Outcome::Reply(bytes) => send(&socket, &bytes, client).await,
            Outcome::Forward(forward) => {
                let (state, socket) = (state.clone(), socket.clone());
                tasks.spawn(async move {
                    let bytes = state.forwarder.complete(*forward).await;
                    send(&socket, &bytes, client).await;
                });
            }
        }
    }
}

async fn send(socket: &UdpSocket, bytes: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(bytes, client).await {
        tracing::debug!(%client, %error, "Sending an answer failed");
    }
}

async fn serve_tcp(state: Arc<State>, listener: TcpListener, tasks: TaskTracker) {
    loop {
        let permit = state.connections.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "Accepting a DNS connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let state = state.clone();
        tasks.spawn(async move {
            // An error is the client's: it has gone, is too slow, or sends nonsense.
            if let Err(error) = serve_connection(&state, stream).await {
                tracing::debug!(%error, "DNS connection ended");
            }
            drop(permit);
        });
    }
}

async fn serve_connection(state: &State, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let mut query = Vec::new();
        let read = async {
            let length = stream.read_u16().await?;
            query.resize(usize::from(length), 0);
            stream.read_exact(&mut query).await
        };
        timeout(IDLE, read).await.map_err(|_| io::ErrorKind::TimedOut)??;
        let bytes = match state.resolve(&query, true) {
            Outcome::Ignore => return Ok(()),
            Outcome::Reply(bytes) => bytes,
            Outcome::Forward(forward) => state.forwarder.complete(*forward).await,
        };
        let mut framed = (bytes.len() as u16).to_be_bytes().to_vec();
        framed.extend(bytes);
        timeout(IDLE, stream.write_all(&framed)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    }
}
