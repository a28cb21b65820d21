//! From the bytes of a query to the bytes of its answer. Pure, and safe for whatever anyone sends.
//!
//! Names follow the schema 1.1.0 (kubernetes/dns, specification.md) and, where that leaves room, CoreDNS.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::index::{Endpoint, Entry, Index, Port, undashed};

/// The version of the schema, which `dns-version` tells.
const SCHEMA: &str = "1.1.0";
/// Names in the cluster may point to each other; this many steps are followed.
const ALIASES_MAX: usize = 8;
/// The header, which every message has.
const HEADER: usize = 12;
/// What a client without EDNS takes over UDP.
const UDP_PLAIN: usize = 512;
/// What we send over UDP at most (DNS flag day 2020).
const UDP_MAX: u16 = 1232;
pub(crate) const TCP_MAX: usize = u16::MAX as usize;

/// What to do with a query.
#[derive(Debug)]
pub(crate) enum Outcome {
    Reply(Vec<u8>),
    /// Others know the answer, or the rest of it.
    Forward(Box<Forward>),
    /// Not even an error is due: too short, or itself an answer.
    Ignore,
}

/// A question for the resolvers of the host.
#[derive(Debug)]
pub(crate) struct Forward {
    /// The answer as far as we know it: the question, and CNAMEs that lead to `name`.
    pub partial: Message,
    pub name: Name,
    pub record_type: RecordType,
    /// The client does not want data checked, or wants signatures; for the resolvers to heed.
    pub checking_disabled: bool,
    pub dnssec: bool,
    /// How large the answer may be, in bytes.
    pub size_max: usize,
}

/// Answers a query that came over UDP as far as the index goes; what would be forwarded is answered with
/// REFUSED, and what deserves no answer with nothing.
pub fn answer(index: &Index, query: &[u8]) -> Vec<u8> {
    match resolve(index, query, false) {
        Outcome::Reply(bytes) => bytes,
        Outcome::Forward(mut forward) => {
            forward.partial.metadata.response_code = ResponseCode::Refused;
            encode(forward.partial, forward.size_max)
        }
        Outcome::Ignore => Vec::new(),
    }
}

pub(crate) fn resolve(index: &Index, bytes: &[u8], tcp: bool) -> Outcome {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Outcome::Ignore };
    // Answering answers would let two servers talk for ever.
    if header[2] & 0x80 != 0 {
        return Outcome::Ignore;
    }
    let query = match Message::from_vec(bytes) {
        Ok(query) => query,
        Err(_) => {
            let id = u16::from_be_bytes([header[0], header[1]]);
            let op_code = OpCode::from_u8((header[2] >> 3) & 0xf);
            return Outcome::Reply(encode(Message::error_msg(id, op_code, ResponseCode::FormErr), UDP_PLAIN));
        }
    };
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata.message_type = MessageType::Response;
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.checking_disabled = query.metadata.checking_disabled;
    reply.queries = query.queries.clone();
    let mut size_max = UDP_PLAIN;
    let mut dnssec = false;
    if let Some(edns) = &query.edns {
        size_max = usize::from(edns.max_payload().clamp(UDP_PLAIN as u16, UDP_MAX));
        dnssec = edns.flags().dnssec_ok;
        let mut ours = Edns::new();
        ours.set_max_payload(UDP_MAX).set_dnssec_ok(dnssec);
        reply.edns = Some(ours);
    }
    if tcp {
        size_max = TCP_MAX;
    }
    let refuse = |mut reply: Message, code: ResponseCode| {
        if let Some(edns) = &mut reply.edns {
            edns.set_rcode_high(code.high());
        }
        reply.metadata.response_code = code;
        Outcome::Reply(encode(reply, size_max))
    };
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(reply, ResponseCode::BADVERS);
    }
    if query.metadata.op_code != OpCode::Query {
        return refuse(reply, ResponseCode::NotImp);
    }
    let [question] = &query.queries[..] else { return refuse(reply, ResponseCode::FormErr) };
    if !matches!(question.query_class, DNSClass::IN | DNSClass::ANY)
        || matches!(question.query_type, RecordType::AXFR | RecordType::IXFR)
    {
        return refuse(reply, ResponseCode::Refused);
    }

    let forward = |reply: Message, name: Name| {
        Outcome::Forward(Box::new(Forward {
            partial: reply,
            name,
            record_type: question.query_type,
            checking_disabled: query.metadata.checking_disabled,
            dnssec,
            size_max,
        }))
    };
    let Some(found) = lookup(index, question) else { return forward(reply, question.name.clone()) };
    if !index.is_complete() {
        return refuse(reply, ResponseCode::ServFail);
    }
    reply.metadata.authoritative = true;
    reply.answers = found.answers;
    reply.additionals = found.additionals;
    if let Some(elsewhere) = found.elsewhere {
        return forward(reply, elsewhere);
    }
    if reply.answers.is_empty() {
        let code = if found.exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
        reply.metadata.response_code = code;
        reply.authorities.push(soa(index));
    } else {
        // Clients tend to take the first address; each gets another one.
        let shift = usize::from(reply.metadata.id) % reply.answers.len();
        if reply.answers.iter().all(|record| record.record_type() == question.query_type) {
            reply.answers.rotate_left(shift);
        }
    }
    Outcome::Reply(encode(reply, size_max))
}

/// Encodes a reply into at most `size_max` bytes. When it does not fit, as many of its answers as do
/// are kept, for clients that can't use TCP, and the reply is marked as truncated.
pub(crate) fn encode(mut reply: Message, size_max: usize) -> Vec<u8> {
    let attempt = |reply: &Message| reply.to_vec().ok().filter(|bytes| bytes.len() <= size_max);
    if let Some(bytes) = attempt(&reply) {
        return bytes;
    }
    reply.additionals.clear();
    if let Some(bytes) = attempt(&reply) {
        return bytes;
    }
    reply.metadata.truncation = true;
    reply.authorities.clear();
    let answers = std::mem::take(&mut reply.answers);
    // The size grows with the number of answers, so the largest number that fits can be halved for.
    let (mut fits, mut too_many) = (0, answers.len() + 1);
    while too_many - fits > 1 {
        let middle = usize::midpoint(fits, too_many);
        reply.answers = answers[..middle].to_vec();
        if attempt(&reply).is_some() {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    reply.answers = answers[..fits].to_vec();
    attempt(&reply)
        .or_else(|| attempt(&Message::error_msg(reply.metadata.id, OpCode::Query, ResponseCode::ServFail)))
        .unwrap_or_default()
}

/// What the zone says of a name.
#[derive(Debug, Default)]
struct Found {
    /// Even when it has nothing of the type that was asked for.
    exists: bool,
    answers: Vec<Record>,
    additionals: Vec<Record>,
    /// The name is an alias of one that is not ours.
    elsewhere: Option<Name>,
}

impl Found {
    fn nothing() -> Found {
        Found::default()
    }

    fn empty() -> Found {
        Found { exists: true, ..Found::default() }
    }

    fn answers(answers: Vec<Record>) -> Found {
        Found { exists: true, answers, ..Found::default() }
    }
}

/// `None` when the name is not ours to know.
fn lookup(index: &Index, question: &Query) -> Option<Found> {
    let zone = index.zone();
    if !zone.domain.zone_of(&question.name) {
        return reverse(index, question);
    }
    let mut name = question.name.clone();
    let mut aliases = Vec::new();
    loop {
        let mut found = forwards(index, &name, question.query_type);
        let [Record { data: RData::CNAME(CNAME(target)), .. }] = &found.answers[..] else {
            aliases.append(&mut found.answers);
            return Some(Found { answers: aliases, ..found });
        };
        let target = target.clone();
        aliases.append(&mut found.answers);
        let chased = matches!(question.query_type, RecordType::A | RecordType::AAAA);
        if !chased || aliases.len() >= ALIASES_MAX {
            return Some(Found::answers(aliases));
        }
        if !zone.domain.zone_of(&target) {
            return Some(Found { elsewhere: Some(target), ..Found::answers(aliases) });
        }
        name = target;
    }
}

/// A name below the cluster domain.
fn forwards(index: &Index, name: &Name, wanted: RecordType) -> Found {
    let zone = index.zone();
    let below = usize::from(name.num_labels()).saturating_sub(usize::from(zone.domain.num_labels()));
    let labels: Vec<String> =
        name.iter().take(below).map(|label| String::from_utf8_lossy(label).to_lowercase()).collect();
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let record = |data| Record::from_rdata(name.clone(), zone.ttl, data);
    match labels[..] {
        [] => match wanted {
            RecordType::SOA => Found::answers(vec![soa(index)]),
            RecordType::NS => {
                let server = in_zone(index, &["ns", "dns"]);
                let address = Record::from_rdata(server.clone(), zone.ttl, address_data(zone.server));
                Found { additionals: vec![address], ..Found::answers(vec![record(RData::NS(NS(server)))]) }
            }
            _ => Found::empty(),
        },
        ["dns-version"] if wanted == RecordType::TXT => {
            Found::answers(vec![record(RData::TXT(TXT::new(vec![SCHEMA.into()])))])
        }
        ["ns", "dns"] => addresses(index, name, wanted, [zone.server]),
        ["dns-version" | "dns" | "svc" | "pod"] => Found::empty(),
        [namespace, "svc" | "pod"] if index.has_namespace(namespace) => Found::empty(),
        [address, namespace, "pod"] if index.has_namespace(namespace) => match undashed(address) {
            Some(address) => addresses(index, name, wanted, [address]),
            None => Found::nothing(),
        },
        [ref within @ .., service, namespace, "svc"] => match index.service(namespace, service) {
            Some(entry) => of_service(index, name, wanted, entry, within, &[service, namespace, "svc"]),
            None => Found::nothing(),
        },
        _ => Found::nothing(),
    }
}

/// `within` are the labels before those of the Service, `path` are the Service's own.
fn of_service(
    index: &Index,
    name: &Name,
    wanted: RecordType,
    entry: &Entry,
    within: &[&str],
    path: &[&str],
) -> Found {
    let ttl = index.zone().ttl;
    match (within, entry) {
        ([], Entry::External { target }) => {
            Found::answers(vec![Record::from_rdata(name.clone(), ttl, RData::CNAME(CNAME(target.clone())))])
        }
        (_, Entry::External { .. }) => Found::nothing(),
        ([], Entry::Headless { endpoints }) if endpoints.is_empty() => Found::nothing(),
        ([], _) if wanted == RecordType::SRV => srv(index, name, entry, path, |_| true),
        ([], Entry::ClusterIp { addresses: all, .. }) => addresses(index, name, wanted, all.iter().copied()),
        ([], Entry::Headless { endpoints }) => {
            addresses(index, name, wanted, endpoints.iter().map(|endpoint| endpoint.address))
        }
        ([label], _) if label.starts_with('_') => {
            let protocol = &label[1..];
            let known = ports(entry).any(|port| !port.name.is_empty() && port.protocol == protocol);
            if known { Found::empty() } else { Found::nothing() }
        }
        ([host], Entry::Headless { endpoints }) => {
            let mut hosts = endpoints.iter().filter(|endpoint| endpoint.host == *host).peekable();
            match hosts.peek() {
                Some(_) => addresses(index, name, wanted, hosts.map(|endpoint| endpoint.address)),
                None => Found::nothing(),
            }
        }
        ([port, protocol], _) if port.starts_with('_') && protocol.starts_with('_') => {
            let matches = |candidate: &Port| {
                candidate.name == port[1..] && candidate.protocol == &protocol[1..] && port.len() > 1
            };
            match (wanted, ports(entry).any(matches)) {
                (_, false) => Found::nothing(),
                (RecordType::SRV | RecordType::ANY, true) => srv(index, name, entry, path, matches),
                (_, true) => Found::empty(),
            }
        }
        _ => Found::nothing(),
    }
}

fn ports(entry: &Entry) -> Box<dyn Iterator<Item = &Port> + '_> {
    match entry {
        Entry::ClusterIp { ports, .. } => Box::new(ports.iter()),
        Entry::Headless { endpoints } => Box::new(endpoints.iter().flat_map(|endpoint| &endpoint.ports)),
        Entry::External { .. } => Box::new(std::iter::empty()),
    }
}

/// SRV records with the addresses of their targets.
fn srv(index: &Index, name: &Name, entry: &Entry, path: &[&str], wanted: impl Fn(&Port) -> bool) -> Found {
    let ttl = index.zone().ttl;
    let mut targets: Vec<(Name, u16)> = Vec::new();
    let mut additionals: Vec<Record> = Vec::new();
    match entry {
        Entry::ClusterIp { addresses, ports } => {
            let target = in_zone(index, path);
            targets
                .extend(ports.iter().filter(|port| wanted(port)).map(|port| (target.clone(), port.number)));
            let records =
                addresses.iter().map(|one| Record::from_rdata(target.clone(), ttl, address_data(*one)));
            additionals.extend(records);
        }
        Entry::Headless { endpoints } => {
            for Endpoint { host, address, ports } in endpoints {
                let target = in_zone(index, &[&[host.as_str()], path].concat());
                let count = targets.len();
                targets.extend(
                    ports.iter().filter(|port| wanted(port)).map(|port| (target.clone(), port.number)),
                );
                if targets.len() > count {
                    additionals.push(Record::from_rdata(target, ttl, address_data(*address)));
                }
            }
            targets.dedup();
        }
        Entry::External { .. } => {}
    }
    let weight = (100 / targets.len().max(1)).max(1) as u16;
    let answers = targets.into_iter().map(|(target, port)| {
        Record::from_rdata(name.clone(), ttl, RData::SRV(SRV::new(0, weight, port, target)))
    });
    Found { additionals, ..Found::answers(answers.collect()) }
}

/// Those of `all` that are of the type that is asked for.
fn addresses(index: &Index, name: &Name, wanted: RecordType, all: impl IntoIterator<Item = IpAddr>) -> Found {
    let records = all
        .into_iter()
        .map(|address| Record::from_rdata(name.clone(), index.zone().ttl, address_data(address)));
    Found::answers(
        records.filter(|record| wanted == RecordType::ANY || record.record_type() == wanted).collect(),
    )
}

/// A name below in-addr.arpa or ip6.arpa that stands for an address in the cluster.
fn reverse(index: &Index, question: &Query) -> Option<Found> {
    let network = question.name.parse_arpa_name().ok()?;
    let zone = index.zone();
    let address = network.addr();
    let whole = network.prefix_len() == network.max_prefix_len();
    if !whole || !zone.reverse.iter().any(|range| range.contains(&address)) {
        return None;
    }
    let names = index.names_of(address).map(|(service, host)| {
        let service = [&*service.name, &*service.namespace, "svc"];
        if host.is_empty() {
            in_zone(index, &service)
        } else {
            in_zone(index, &[&[host.as_str()], &service[..]].concat())
        }
    });
    let records: Vec<Record> = names
        .map(|name| Record::from_rdata(question.name.clone(), zone.ttl, RData::PTR(PTR(name))))
        .collect();
    if records.is_empty() {
        return Some(Found::nothing());
    }
    let asked = matches!(question.query_type, RecordType::PTR | RecordType::ANY);
    Some(if asked { Found::answers(records) } else { Found::empty() })
}

/// A name in the zone. Labels come from objects' names, which are short enough; one that is not
/// makes the name end at the zone.
fn in_zone(index: &Index, labels: &[&str]) -> Name {
    let domain = &index.zone().domain;
    let name = Name::from_labels(labels.iter().map(|label| label.as_bytes()));
    name.and_then(|name| name.append_domain(domain)).unwrap_or_else(|_| domain.clone())
}

fn address_data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// How long others may remember that there is nothing: as long as they may remember what there is.
fn soa(index: &Index) -> Record {
    let zone = index.zone();
    let data = SOA::new(
        in_zone(index, &["ns", "dns"]),
        in_zone(index, &["hostmaster"]),
        1,
        7200,
        1800,
        86400,
        zone.ttl,
    );
    Record::from_rdata(zone.domain.clone(), zone.ttl, RData::SOA(data))
}
