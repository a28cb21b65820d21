//! The proxy against a real kernel: pods in network namespaces of the test's own, and real packets.

#[path = "../../network/tests/support/mod.rs"]
mod support;

mod cluster;

use std::collections::BTreeSet;
use std::io::ErrorKind::ConnectionRefused;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster::Cluster;
use minke_client::Informers;
use minke_network::{ClusterId, EndpointDrain, NodeConfig, NodeNetwork};
use minke_proxy::{Drain, ProxyConfig, run};
use serde_json::{Value, json};
use support::{Pod, get, in_own_namespace, serve, shell, with_outside};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A node with three pods that say who they are on port 8080.
struct Node {
    network: NodeNetwork,
    cluster: Arc<Cluster>,
    drain: Drain,
    stop: CancellationToken,
    pods: Vec<Pod>,
}

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;
const NAMES: [&str; 3] = ["a", "b", "c"];

fn pod_address(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 0, 10 + i as u8)
}

impl Node {
    async fn start(objects: impl IntoIterator<Item = Value>) -> Node {
        let cluster_id = ClusterId::of(Path::new("/test/proxy"));
        let (pod_cidr, cluster_cidr) = ("10.244.0.0/24".parse().unwrap(), "10.244.0.0/16".parse().unwrap());
        let network = NodeNetwork::setup(NodeConfig {
            cluster: cluster_id.clone(),
            pod_cidr,
            cluster_cidr,
            service_cidr: "10.96.0.0/12".parse().unwrap(),
            dns_address: None,
            mtu: 1500,
        });
        let network = network.await.unwrap();
        let mut pods = Vec::new();
        for (i, name) in NAMES.iter().enumerate() {
            let pod = Pod::new();
            network.attach(name, &pod.path, pod_address(i)).await.unwrap();
            pod.run(move || serve(pod_address(i), name));
            pods.push(pod);
        }
        let cluster = Arc::new(Cluster::default());
        objects.into_iter().for_each(|object| cluster.apply(object));
        let stop = CancellationToken::new();
        let informers = Informers::new(cluster.clone(), stop.clone());
        let (drain, requests) = Drain::new();
        let config = ProxyConfig {
            cluster: cluster_id,
            node_name: "here".into(),
            zone: None,
            node_address: NODE,
            pod_cidr,
            cluster_cidr,
        };
        let running = stop.clone();
        tokio::spawn(async move { run(config, &informers, requests, running).await });
        Node { network, cluster, drain, stop, pods }
    }

    /// The greetings that 40 connections get, without the client addresses.
    fn greetings(&self, to: SocketAddrV4) -> BTreeSet<String> {
        (0..40).map(|_| get(to).unwrap().split(' ').next().unwrap().to_owned()).collect()
    }

    async fn end(self) {
        self.stop.cancel();
        self.network.teardown().await.unwrap();
    }
}

/// Waits until `condition` holds, which some transaction in the near future should make true.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn service(more: &[(&str, Value)]) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web", "uid": "1"},
        "spec": {
            "type": "NodePort", "clusterIP": VIP, "clusterIPs": [VIP],
            "ports": [
                {"name": "http", "port": 80, "nodePort": 30080},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
            ],
        },
    });
    for (key, value) in more {
        service["spec"][key] = value.clone();
    }
    service
}

fn slice(ready: &[usize]) -> Value {
    let endpoint = |i: &usize| json!({"addresses": [pod_address(*i)], "nodeName": "here"});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "web-1", "uid": "2", "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [
            {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 9053, "protocol": "UDP"},
        ],
        "endpoints": ready.iter().map(endpoint).collect::<Vec<Value>>(),
    })
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address, port)
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn services_are_reached_from_everywhere() {
    in_own_namespace(async || {
        let outside = with_outside();
        let node = Node::start([service(&[]), slice(&[0, 1])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;

        let both = set(&["a", "b"]);
        assert_eq!(node.greetings(at(VIP, 80)), both, "cluster IP from the node");
        for (address, from) in
            [(NODE, "the node"), (LOOPBACK, "127.0.0.1"), (Ipv4Addr::new(10, 244, 0, 1), "own")]
        {
            assert_eq!(node.greetings(at(address, 30080)), both, "node port from {from}");
        }
        assert_eq!(node.pods[2].run(|| get(at(VIP, 80))).unwrap()[1..], *" 10.244.0.12", "from a pod");
        assert!(node.pods[2].run(|| get(at(NODE, 30080))).is_ok(), "node port from a pod");
        assert!(node.pods[2].run(|| get(at(LOOPBACK, 30080))).is_err(), "a pod's loopback is its own");
        // The answer must come back through the node, so the client is masqueraded.
        let hello = outside.run(|| get(at(NODE, 30080))).unwrap();
        assert!(
            hello.starts_with(['a', 'b']) && !hello.ends_with(" 192.0.2.1"),
            "node port from outside: {hello}"
        );

        // A pod that is its own endpoint: some of the connections are hairpins.
        let greetings: BTreeSet<String> =
            (0..40).map(|_| node.pods[0].run(|| get(at(VIP, 80))).unwrap()[..1].to_owned()).collect();
        assert_eq!(greetings, both, "from an endpoint");

        assert_eq!(get(at(VIP, 81)), Err(ConnectionRefused), "another port");
        node.end().await;
    });
}

#[test]
fn without_endpoints_connections_are_refused_at_once() {
    in_own_namespace(async || {
        let outside = with_outside();
        let node = Node::start([service(&[]), slice(&[0])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        // A program of the host that has the node's port by chance must not answer for the Service.
        let _other = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 30080)).unwrap();
        node.cluster.apply(slice(&[]));
        eventually("refused", || get(at(VIP, 80)) == Err(ConnectionRefused)).await;
        let start = Instant::now();
        for (address, port) in [(VIP, 80), (NODE, 30080), (LOOPBACK, 30080)] {
            assert_eq!(get(at(address, port)), Err(ConnectionRefused), "{address}:{port} from the node");
            let from_pod = node.pods[2].run(move || get(at(address, port)));
            assert_eq!(
                from_pod,
                Err(if address == LOOPBACK { from_pod.clone().unwrap_err() } else { ConnectionRefused })
            );
        }
        assert_eq!(outside.run(|| get(at(NODE, 30080))), Err(ConnectionRefused), "from outside");
        // On the node itself sending fails with EPERM; a pod gets an ICMP message.
        let refused = node.pods[2].run(|| {
            let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
            udp.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            udp.connect(at(VIP, 53)).unwrap();
            udp.send(b"x").unwrap();
            udp.recv(&mut [0; 9]).unwrap_err().kind()
        });
        assert_eq!(refused, ConnectionRefused, "UDP");
        assert!(start.elapsed() < Duration::from_secs(2), "at once");

        node.cluster.delete("services", "web");
        eventually("the node port is free again", || TcpStream::connect(at(LOOPBACK, 30080)).is_ok()).await;
        assert_eq!(get(at(VIP, 80)), Err(ConnectionRefused), "an unknown cluster IP");
        node.end().await;
    });
}

#[test]
fn the_policy_local_shows_the_client() {
    in_own_namespace(async || {
        let outside = with_outside();
        let local = service(&[("externalTrafficPolicy", json!("Local"))]);
        let node = Node::start([local, slice(&[1])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        assert_eq!(outside.run(|| get(at(NODE, 30080))).as_deref(), Ok("b 192.0.2.1"));
        assert!(get(at(LOOPBACK, 30080)).unwrap().starts_with("b "));
        node.end().await;
    });
}

#[test]
fn a_client_keeps_its_endpoint_while_it_is_there() {
    in_own_namespace(async || {
        let _outside = with_outside();
        let node = Node::start([service(&[("sessionAffinity", json!("ClientIP"))]), slice(&[0, 1, 2])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        for to in [at(VIP, 80), at(NODE, 30080)] {
            let first = node.greetings(to);
            assert_eq!(first.len(), 1, "{to}: {first:?}");
            let kept = NAMES.iter().position(|name| first.contains(*name)).unwrap();
            let others: Vec<usize> = (0..3).filter(|i| *i != kept).collect();
            node.cluster.apply(slice(&others));
            eventually("another endpoint", || !first.contains(&get(to).unwrap()[..1])).await;
            let second = node.greetings(to);
            assert_eq!(second.len(), 1, "{to}: {second:?}");
            node.cluster.apply(slice(&[0, 1, 2]));
            node.drain.drain(Ipv4Addr::new(10, 244, 0, 99).into()).await;
            assert_eq!(node.greetings(to), second, "{to}: more endpoints change nothing");
        }
        node.end().await;
    });
}

#[test]
fn a_drained_pod_gets_no_new_connection_and_keeps_the_old() {
    in_own_namespace(async || {
        let node = Node::start([service(&[]), slice(&[0, 1])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        let chatty = node.pods[0].run(|| TcpListener::bind((pod_address(0), 9090)).unwrap());
        let mut client = TcpStream::connect((pod_address(0), 9090)).unwrap();
        let (mut server, _) = chatty.accept().unwrap();

        let mut times = Vec::new();
        for round in 0..10 {
            let start = Instant::now();
            node.drain.drain(pod_address(0).into()).await;
            times.push(start.elapsed());
            assert_eq!(node.greetings(at(VIP, 80)), set(&["b"]), "round {round}: at the return of the call");
            assert_eq!(node.greetings(at(LOOPBACK, 30080)), set(&["b"]), "round {round}");
            node.drain.forget(pod_address(0).into());
            eventually("the pod is back", || node.greetings(at(VIP, 80)).len() == 2).await;
        }
        times.sort();
        println!("drain: median {:?}, max {:?}", times[5], times[9]);
        client.write_all(b"x").unwrap();
        std::io::Read::read_exact(&mut server, &mut [0]).unwrap();
        node.end().await;
    });
}

#[test]
fn a_udp_client_moves_on_when_its_endpoint_goes() {
    in_own_namespace(async || {
        let _outside = with_outside();
        let node = Node::start([service(&[]), slice(&[0])]).await;
        let servers: Vec<UdpSocket> = (0..2)
            .map(|i| node.pods[i].run(move || UdpSocket::bind((pod_address(i), 9053)).unwrap()))
            .collect();
        servers.iter().for_each(|server| server.set_nonblocking(true).unwrap());
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        // One socket each, so that the kernel has one connection each, which every packet keeps alive.
        for to in [at(VIP, 53), at(LOOPBACK, 30053)] {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            // What has come before does not count.
            let empty = || servers.iter().for_each(|server| while server.recv_from(&mut [0; 9]).is_ok() {});
            let reaches = |server: &UdpSocket| {
                empty();
                client.send_to(b"x", to).unwrap();
                server.recv_from(&mut [0; 9]).is_ok()
            };
            eventually("the first endpoint", || reaches(&servers[0])).await;
            node.cluster.apply(slice(&[1]));
            eventually("the second endpoint", || reaches(&servers[1])).await;
            assert!(!reaches(&servers[0]), "the first is out");
            node.cluster.apply(slice(&[0]));
            eventually("the first again", || reaches(&servers[0])).await;
        }
        node.end().await;
    });
}

#[test]
fn the_table_comes_back_when_a_firewall_flushes_it() {
    in_own_namespace(async || {
        let node = Node::start([service(&[]), slice(&[0])]).await;
        eventually("the first transaction", || get(at(VIP, 80)).is_ok()).await;
        shell("nft flush ruleset");
        eventually("the table is back", || shell_says("nft list tables", "-services")).await;
        assert!(get(at(VIP, 80)).unwrap().starts_with("a "));
        // Both at once.
        shell("nft flush ruleset");
        node.cluster.apply(slice(&[1]));
        eventually("the table is back", || shell_says("nft list ruleset", "10.244.0.11")).await;
        assert!(get(at(VIP, 80)).unwrap().starts_with("b "));
        node.end().await;
    });
}

/// Not a limit: prints what changes cost on this machine (`--nocapture`).
#[test]
fn many_services_cost_little() {
    in_own_namespace(async || {
        let count: usize =
            std::env::var("SERVICES").ok().and_then(|count| count.parse().ok()).unwrap_or(1000);
        let address = |i: usize| Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 1, 0)) + i as u32);
        let objects = (0..count).flat_map(|i| {
            let mut service = service(&[("clusterIPs", json!([address(i)])), ("type", json!("ClusterIP"))]);
            service["metadata"]["name"] = json!(format!("s{i}"));
            service["spec"]["ports"] = json!([{"name": "http", "port": 80}]);
            let mut slice = slice(&[0, 1, 2]);
            slice["metadata"]["name"] = json!(format!("e{i}"));
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(format!("s{i}"));
            [service, slice]
        });
        // One more, alone with its endpoints.
        let mut alone = slice(&[]);
        alone["endpoints"] = json!([{"addresses": ["10.244.0.100"]}, {"addresses": ["10.244.0.101"]}]);
        let objects: Vec<Value> = objects.chain([service(&[]), alone]).collect();
        let start = Instant::now();
        let node = Node::start(objects).await;
        eventually("the first transaction", || get(at(address(0), 80)).is_ok()).await;
        println!("{count} Services with 3 endpoints each loaded in {:?}", start.elapsed());
        let mut times = Vec::new();
        let changing = Ipv4Addr::new(10, 244, 0, 100).into();
        for _ in 0..20 {
            let start = Instant::now();
            node.drain.drain(changing).await;
            times.push(start.elapsed());
            node.drain.forget(changing);
            // The next drain waits for that, too.
            node.drain.drain(Ipv4Addr::new(10, 244, 0, 200).into()).await;
        }
        times.sort();
        println!("one change: median {:?}", times[10]);
        node.end().await;
    });
}

fn shell_says(command: &str, what: &str) -> bool {
    let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains(what)
}
