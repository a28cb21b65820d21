//! The server as a whole: sockets, informers, and queries over UDP and TCP.

#[path = "../../proxy/tests/cluster/mod.rs"]
mod cluster;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster::Cluster;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use minke_client::Informers;
use minke_dns::{DnsConfig, Server, Zone};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

fn service(address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web", "uid": "1"},
        "spec": {"clusterIP": address, "clusterIPs": [address], "ports": [{"name": "http", "port": 80}]},
    })
}

fn slice(addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "default", "name": "web-1", "uid": "2", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints,
    })
}

async fn start(cluster: Arc<Cluster>) -> (SocketAddr, CancellationToken) {
    let mut resolv_conf = tempfile::NamedTempFile::new().unwrap();
    writeln!(resolv_conf, "search example.com").unwrap();
    let config = DnsConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        zone: Zone {
            domain: Name::from_ascii("cluster.local.").unwrap(),
            server: "10.96.0.10".parse().unwrap(),
            reverse: vec!["10.96.0.0/12".parse().unwrap()],
            ttl: 5,
        },
        resolv_conf: resolv_conf.path().to_owned(),
    };
    let server = Server::bind(config).await.unwrap();
    let address = server.local_addr().unwrap();
    let stop = CancellationToken::new();
    let informers = Informers::new(cluster, stop.clone());
    let running = stop.clone();
    tokio::spawn(async move { server.run(&informers, running).await });
    (address, stop)
}

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::new(9, MessageType::Query, OpCode::Query);
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

async fn ask_udp(server: SocketAddr, name: &str) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(&query(name)).await.unwrap();
    let mut buffer = [0; 1500];
    let length = timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.unwrap().unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn ask_tcp(stream: &mut TcpStream, name: &str) -> Message {
    let query = query(name);
    stream.write_all(&(query.len() as u16).to_be_bytes()).await.unwrap();
    stream.write_all(&query).await.unwrap();
    let mut reply = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut reply).await.unwrap();
    Message::from_vec(&reply).unwrap()
}

/// Asks until the answer has these addresses, which an event on its way will bring about.
async fn until(server: SocketAddr, addresses: &[&str]) {
    let start = Instant::now();
    loop {
        let reply = ask_udp(server, "web.default.svc.cluster.local.").await;
        let mut shown: Vec<String> = reply.answers.iter().map(|record| record.data.to_string()).collect();
        shown.sort();
        if shown == addresses {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{shown:?} is not {addresses:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn answers_follow_the_cluster() {
    let cluster = Arc::new(Cluster::default());
    cluster
        .apply(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "uid": "0"}}));
    cluster.apply(service("10.96.0.7"));
    let (server, stop) = start(cluster.clone()).await;
    until(server, &["10.96.0.7"]).await;

    cluster.apply(service("None"));
    until(server, &[]).await;
    cluster.apply(slice(&["10.244.0.2", "10.244.0.3"]));
    until(server, &["10.244.0.2", "10.244.0.3"]).await;
    cluster.apply(slice(&["10.244.0.3"]));
    until(server, &["10.244.0.3"]).await;
    cluster.delete("endpointslices", "web-1");
    until(server, &[]).await;
    cluster.apply(service("10.96.0.8"));
    until(server, &["10.96.0.8"]).await;
    cluster.delete("services", "web");
    until(server, &[]).await;
    let gone = ask_udp(server, "web.default.svc.cluster.local.").await;
    assert_eq!(gone.metadata.response_code, ResponseCode::NXDomain);

    // Nobody is there to ask, and a client is told so at once.
    let outside = ask_udp(server, "www.example.com.").await;
    assert_eq!(outside.metadata.response_code, ResponseCode::ServFail);
    stop.cancel();
}

#[tokio::test]
async fn many_questions_on_one_connection_and_nonsense_ends_it() {
    let cluster = Arc::new(Cluster::default());
    cluster.apply(service("10.96.0.7"));
    let (server, stop) = start(cluster).await;
    until(server, &["10.96.0.7"]).await;
    let mut stream = TcpStream::connect(server).await.unwrap();
    for _ in 0..3 {
        assert_eq!(ask_tcp(&mut stream, "web.default.svc.cluster.local.").await.answers.len(), 1);
    }
    stream.write_all(&[0, 3, 1, 2, 3]).await.unwrap();
    assert!(stream.read_u8().await.is_err(), "closed");
    // Others go on.
    until(server, &["10.96.0.7"]).await;
    stop.cancel();
}

/// Not a limit: prints what a query over UDP costs on this machine (`--nocapture`).
#[tokio::test]
async fn round_trips_take_microseconds() {
    let cluster = Arc::new(Cluster::default());
    cluster.apply(service("10.96.0.7"));
    let (server, stop) = start(cluster).await;
    until(server, &["10.96.0.7"]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    let query = query("web.default.svc.cluster.local.");
    let mut times = Vec::new();
    for _ in 0..1000 {
        let start = Instant::now();
        socket.send(&query).await.unwrap();
        socket.recv(&mut [0; 1500]).await.unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    println!("round trip: median {:?}, p99 {:?}", times[500], times[990]);
    stop.cancel();
}
