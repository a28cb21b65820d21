//! The DNS where pods find it: at the ClusterIP, which is an address of every node.

#[path = "../../proxy/tests/cluster/mod.rs"]
mod cluster;
#[path = "../../network/tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster::Cluster;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use minke_client::Informers;
use minke_dns::{DnsConfig, Server, Zone};
use minke_network::{ClusterId, NodeConfig, NodeNetwork};
use serde_json::json;
use support::{Pod, in_own_namespace};
use tokio_util::sync::CancellationToken;

const DNS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

fn query() -> Vec<u8> {
    let mut message = Message::new(9, MessageType::Query, OpCode::Query);
    message
        .queries
        .push(Query::query(Name::from_ascii("web.default.svc.cluster.local.").unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// Asks over UDP until the server knows the cluster, then over TCP; returns what each said.
fn ask() -> [Message; 2] {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    // Connected: an answer from any other address than the one asked would not arrive.
    socket.connect((DNS, 53)).unwrap();
    let mut buffer = [0; 1500];
    let udp = loop {
        socket.send(&query()).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        let reply = Message::from_vec(&buffer[..length]).unwrap();
        if reply.metadata.response_code != ResponseCode::ServFail {
            break reply;
        }
    };
    let mut stream = TcpStream::connect((DNS, 53)).unwrap();
    stream.write_all(&(query().len() as u16).to_be_bytes()).unwrap();
    stream.write_all(&query()).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut reply = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut reply).unwrap();
    [udp, Message::from_vec(&reply).unwrap()]
}

#[test]
fn pods_and_the_node_are_answered_at_the_cluster_ip() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(NodeConfig {
            cluster: ClusterId::of(Path::new("/test/dns")),
            pod_cidr: "10.244.0.0/24".parse().unwrap(),
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
            service_cidr: "10.96.0.0/12".parse().unwrap(),
            dns_address: Some(DNS),
            mtu: 1500,
        });
        let network = network.await.unwrap();
        let pod = Pod::new();
        network.attach("pod", &pod.path, Ipv4Addr::new(10, 244, 0, 2)).await.unwrap();
        let config = DnsConfig {
            listen: (DNS, 53).into(),
            zone: Zone {
                domain: Name::from_ascii("cluster.local.").unwrap(),
                server: DNS.into(),
                reverse: Vec::new(),
                ttl: 5,
            },
            resolv_conf: "/dev/null".into(),
        };
        let server = Server::bind(config).await.unwrap();
        let cluster = Arc::new(Cluster::default());
        cluster.apply(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web", "uid": "1"},
            "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]},
        }));
        let stop = CancellationToken::new();
        let informers = Informers::new(cluster, stop.clone());
        let running = stop.clone();
        tokio::spawn(async move { server.run(&informers, running).await });

        let pod = Arc::new(pod);
        let asking = pod.clone();
        let from_pod = tokio::task::spawn_blocking(move || asking.run(ask)).await.unwrap();
        let from_node = tokio::task::spawn_blocking(ask).await.unwrap();
        for reply in from_pod.into_iter().chain(from_node) {
            assert_eq!(reply.answers[0].data.to_string(), "10.96.0.7");
        }
        stop.cancel();
        network.teardown().await.unwrap();
    });
}
