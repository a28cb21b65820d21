//! Forwarding to resolvers of the test's own, on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use tokio::net::TcpListener;

use super::*;

/// Answers every question with `records` addresses; over UDP truncated if there are more than ten.
async fn resolver(records: u8, asked: Arc<AtomicUsize>) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let reply = move |query: &[u8], most: u8| {
        let query = Message::from_vec(query).unwrap();
        let mut reply = Message::response(query.metadata.id, OpCode::Query);
        reply.queries = query.queries.clone();
        let name = &query.queries[0].name;
        let record = |i| Record::from_rdata(name.clone(), 300, RData::A(A::new(192, 0, 2, i)));
        reply.answers.extend((0..records.min(most)).map(record));
        reply.metadata.truncation = records > most;
        reply.to_vec().unwrap()
    };
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        loop {
            let (length, client) = udp.recv_from(&mut buffer).await.unwrap();
            asked.fetch_add(1, Ordering::Relaxed);
            // A forged answer first: the wrong id, then the wrong question.
            let mut forged = reply(&buffer[..length], 10);
            forged[0] ^= 1;
            udp.send_to(&forged, client).await.unwrap();
            let mut other = reply(&buffer[..length], 10);
            other[13] ^= 1;
            udp.send_to(&other, client).await.unwrap();
            udp.send_to(&reply(&buffer[..length], 10), client).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut query).await.unwrap();
            let reply = reply(&query, 255);
            stream.write_all(&(reply.len() as u16).to_be_bytes()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    address
}

fn forwarder(resolvers: &[SocketAddr]) -> Forwarder {
    let forwarder = Forwarder::new("/nonexistent".into(), Vec::new());
    *forwarder.resolvers.lock().unwrap() = Resolvers {
        checked: Some(Instant::now() + Duration::from_secs(3600)),
        modified: None,
        addresses: resolvers.to_vec(),
    };
    forwarder
}

fn question(size_max: usize) -> Forward {
    let name = Name::from_ascii("www.example.com.").unwrap();
    let mut partial = Message::response(7, OpCode::Query);
    partial.queries.push(Query::query(name.clone(), RecordType::A));
    Forward { partial, name, record_type: RecordType::A, checking_disabled: false, dnssec: false, size_max }
}

async fn ask(forwarder: &Forwarder, size_max: usize) -> Message {
    let reply = Message::from_vec(&forwarder.complete(question(size_max)).await).unwrap();
    assert_eq!(reply.metadata.id, 7);
    reply
}

#[tokio::test]
async fn the_answer_is_passed_on_and_remembered_and_forged_ones_are_not() {
    let asked = Arc::new(AtomicUsize::new(0));
    let forwarder = forwarder(&[resolver(2, asked.clone()).await]);
    for _ in 0..3 {
        let reply = ask(&forwarder, 1232).await;
        assert_eq!((reply.metadata.response_code, reply.answers.len()), (ResponseCode::NoError, 2));
        assert!(!reply.metadata.authoritative);
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_large_answer_is_fetched_over_tcp_and_cut_to_the_client() {
    let forwarder = forwarder(&[resolver(100, Arc::default()).await]);
    let over_tcp = ask(&forwarder, 65535).await;
    assert_eq!((over_tcp.answers.len(), over_tcp.metadata.truncation), (100, false));
    let over_udp = ask(&forwarder, 512).await;
    assert!(over_udp.metadata.truncation && over_udp.answers.len() > 20);
}

#[tokio::test(start_paused = true)]
async fn a_silent_resolver_is_passed_over() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let nobody = forwarder(&[silent.local_addr().unwrap()]);
    assert_eq!(ask(&nobody, 512).await.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(ask(&forwarder(&[]), 512).await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn a_dead_resolver_costs_nothing() {
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let forwarder = forwarder(&[gone, resolver(1, Arc::default()).await]);
    let start = Instant::now();
    assert_eq!(ask(&forwarder, 512).await.answers.len(), 1);
    assert!(start.elapsed() < PATIENCE, "a silent one would take as long");
}

#[tokio::test]
async fn an_alias_of_ours_comes_before_the_answer() {
    let forwarder = forwarder(&[resolver(1, Arc::default()).await]);
    let mut question = question(512);
    let alias = Name::from_ascii("ext.default.svc.cluster.local.").unwrap();
    let target = RData::CNAME(hickory_proto::rr::rdata::CNAME(question.name.clone()));
    question.partial.answers.push(Record::from_rdata(alias, 5, target));
    let reply = Message::from_vec(&forwarder.complete(question).await).unwrap();
    let types: Vec<RecordType> = reply.answers.iter().map(Record::record_type).collect();
    assert_eq!(types, [RecordType::CNAME, RecordType::A]);
}

#[test]
fn resolv_conf_is_read_as_the_c_library_reads_it_and_never_names_us() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "# x\nsearch a b\n nameserver 192.0.2.1 # y\nnameserver\t2001:db8::1\nnameserver bad\n\
                nameserver 10.96.0.10\nnameserver 192.0.2.3\nnameserver 192.0.2.4\noptions ndots:5\n";
    std::fs::write(file.path(), text).unwrap();
    let read = read_resolvers(file.path(), &["10.96.0.10".parse().unwrap()]);
    let expected: Vec<SocketAddr> =
        ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53"].map(|address| address.parse().unwrap()).into();
    assert_eq!(read, expected);
    assert!(read_resolvers(Path::new("/nonexistent"), &[]).is_empty());
}
