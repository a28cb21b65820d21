//! A node's network in a network namespace of the test's own, with real links and packets.

mod support;

use std::fs::File;
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use minke_network::{
    AddressPool, ClusterId, NodeConfig, NodeNetwork, TableWatch, apply_nft, forget_udp_flows, leftovers,
    node_address, routed_ranges,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::{Pod, fetch, in_own_namespace, serve_hello, with_outside};
use tokio::time::Instant;

fn config() -> NodeConfig {
    NodeConfig {
        cluster: ClusterId::of(Path::new("/test")),
        pod_cidr: "10.244.0.0/24".parse().unwrap(),
        cluster_cidr: "10.244.0.0/16".parse().unwrap(),
        service_cidr: "10.96.0.0/12".parse().unwrap(),
        dns_address: Some(Ipv4Addr::new(10, 96, 0, 10)),
        mtu: 1500,
    }
}

#[test]
fn pods_reach_each_other_and_the_node_and_nothing_unknown_leaves() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let mut pool = AddressPool::new(config().pod_cidr);
        let (a, b) = (Pod::new(), Pod::new());
        let (a_address, b_address) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        network.attach("a", &a.path, a_address).await.unwrap();
        let attached = network.attach("b", &b.path, b_address).await.unwrap();
        b.run(move || serve_hello(b_address));

        assert_eq!(fetch(b_address).as_deref(), Ok("hello 10.244.0.1"), "from the node");
        assert_eq!(a.run(move || fetch(b_address)), Ok(format!("hello {a_address}")), "from a pod");
        serve_hello(Ipv4Addr::UNSPECIFIED);
        let own = Ipv4Addr::new(10, 244, 0, 1);
        assert_eq!(a.run(move || fetch(own)), Ok(format!("hello {a_address}")), "a pod to the node");

        use std::io::ErrorKind::{ConnectionRefused, HostUnreachable};
        let start = Instant::now();
        for (unknown, error) in [([10, 96, 7, 7], ConnectionRefused), ([10, 244, 3, 3], HostUnreachable)] {
            assert_eq!(fetch(unknown.into()), Err(error), "from the node");
            assert_eq!(a.run(move || fetch(unknown.into())), Err(error), "from a pod");
        }
        // An address that nobody answers for takes the kernel three seconds.
        assert!(start.elapsed() < Duration::from_secs(3), "refused at once");

        // Again, as after a restart of the agent; nothing is disturbed.
        let network = NodeNetwork::setup(config()).await.unwrap();
        assert_eq!(network.attach("b", &b.path, b_address).await.unwrap(), attached);
        assert_eq!(a.run(move || fetch(b_address)), Ok(format!("hello {a_address}")));

        network.detach("b").await.unwrap();
        network.detach("b").await.unwrap();
        assert_eq!(fetch(b_address), Err(HostUnreachable));
        assert_eq!(leftovers(&config().cluster).await.unwrap().len(), 4, "a pod, two of the node, a table");
        network.teardown().await.unwrap();
        assert_eq!(leftovers(&config().cluster).await.unwrap(), Vec::<String>::new());
        network.teardown().await.unwrap();
    });
}

#[test]
fn a_pod_reaches_the_outside_under_the_nodes_address() {
    in_own_namespace(async || {
        let outside = with_outside();
        let network = NodeNetwork::setup(config()).await.unwrap();
        outside.run(|| serve_hello(Ipv4Addr::new(192, 0, 2, 1)));
        let found = node_address().await.unwrap().unwrap();
        assert_eq!((found.address, found.mtu), (Ipv4Addr::new(192, 0, 2, 2), 1500));

        let pod = Pod::new();
        network.attach("pod", &pod.path, Ipv4Addr::new(10, 244, 0, 9)).await.unwrap();
        assert_eq!(pod.run(|| fetch(Ipv4Addr::new(192, 0, 2, 1))).as_deref(), Ok("hello 192.0.2.2"));
    });
}

#[test]
fn a_pod_cannot_use_anothers_address() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let (a, b) = (Pod::new(), Pod::new());
        let (a_address, b_address) = (Ipv4Addr::new(10, 244, 0, 2), Ipv4Addr::new(10, 244, 0, 3));
        network.attach("a", &a.path, a_address).await.unwrap();
        network.attach("b", &b.path, b_address).await.unwrap();
        let receiver = b.run(move || UdpSocket::bind((b_address, 9000)).unwrap());
        receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let send_as = move |source: [u8; 4]| {
            a.run(move || {
                support::shell(&format!("ip addr replace {}/32 dev eth0", Ipv4Addr::from(source)));
                UdpSocket::bind((Ipv4Addr::from(source), 0))
                    .unwrap()
                    .send_to(b"x", (b_address, 9000))
                    .unwrap();
            });
        };
        send_as(a_address.octets());
        assert_eq!(receiver.recv_from(&mut [0; 9]).unwrap().1.ip(), a_address);
        send_as([10, 244, 0, 77]);
        assert!(receiver.recv_from(&mut [0; 9]).is_err(), "a false source gets through");
        // It is the check of the source that keeps it out.
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{}/rp_filter", config().cluster.pod_link("a")), "0")
            .unwrap();
        send_as([10, 244, 0, 77]);
        assert!(receiver.recv_from(&mut [0; 9]).is_ok());
    });
}

#[test]
fn a_namespace_that_is_gone_is_an_error_and_leaves_nothing() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let error = network.attach("x", Path::new("/proc/0/ns/net"), Ipv4Addr::new(10, 244, 0, 2)).await;
        assert_eq!(error.unwrap_err().to_string(), "open network namespace /proc/0/ns/net");
        assert_eq!(leftovers(&config().cluster).await.unwrap().len(), 3);
    });
}

#[test]
fn udp_connections_are_forgotten_by_choice() {
    in_own_namespace(async || {
        apply_nft(
            "table ip t { chain c { type nat hook output priority -100; ip daddr 127.0.0.9 dnat to 127.0.0.1; }; }\n",
        )
        .unwrap();
        let server = UdpSocket::bind("127.0.0.1:9000").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"x", "127.0.0.9:9000").unwrap();
        server.recv_from(&mut [0; 9]).unwrap();
        let stale = |flow: &minke_network::Flow| {
            flow.to == "127.0.0.9:9000".parse().unwrap()
                && flow.answered_by == "127.0.0.1:9000".parse().unwrap()
        };
        assert_eq!(forget_udp_flows(move |flow| !stale(flow)).await.unwrap(), 0);
        assert_eq!(forget_udp_flows(stale).await.unwrap(), 1);
        assert_eq!(forget_udp_flows(|_| true).await.unwrap(), 0);
    });
}

/// Not a limit: prints what attaching costs on this machine (`--nocapture`).
#[test]
fn attaching_takes_milliseconds() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let mut pool = AddressPool::new(config().pod_cidr);
        let pods: Vec<Pod> = (0..30).map(|_| Pod::new()).collect();
        let (mut attach, mut detach) = (Vec::new(), Vec::new());
        for (i, pod) in pods.iter().enumerate() {
            let start = Instant::now();
            network.attach(&i.to_string(), &pod.path, pool.allocate().unwrap()).await.unwrap();
            attach.push(start.elapsed());
        }
        for i in 0..pods.len() {
            let start = Instant::now();
            network.detach(&i.to_string()).await.unwrap();
            detach.push(start.elapsed());
        }
        for (i, pod) in pods.iter().enumerate() {
            network.attach(&i.to_string(), &pod.path, pool.allocate().unwrap()).await.unwrap();
        }
        assert_eq!(leftovers(&config().cluster).await.unwrap().len(), 33);
        let start = Instant::now();
        network.teardown().await.unwrap();
        let teardown = start.elapsed();
        assert_eq!(leftovers(&config().cluster).await.unwrap().len(), 0);
        attach.sort();
        detach.sort();
        println!(
            "attach: median {:?}, max {:?}; detach: median {:?}; all 30 at once: {teardown:?}",
            attach[15], attach[29], detach[15]
        );
    });
}

#[test]
fn the_thread_that_attaches_is_not_the_callers() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let before = File::open("/proc/thread-self/ns/net").unwrap();
        let pod = Pod::new();
        network.attach("x", &pod.path, Ipv4Addr::new(10, 244, 0, 2)).await.unwrap();
        let same =
            |a: &File, b: &File| rustix::fs::fstat(a).unwrap().st_ino == rustix::fs::fstat(b).unwrap().st_ino;
        assert!(same(&before, &File::open("/proc/thread-self/ns/net").unwrap()));
        assert!(!same(&before, &File::open(&pod.path).unwrap()));
        move_into_link_name_space(before.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    });
}

#[test]
fn two_clusters_never_share_addresses() {
    in_own_namespace(async || {
        let first = NodeNetwork::setup(config()).await.unwrap();
        let other = |pods: &str, services: &str| NodeConfig {
            cluster: ClusterId::of(Path::new("/other")),
            pod_cidr: pods.parse().unwrap(),
            cluster_cidr: pods.parse().unwrap(),
            service_cidr: services.parse().unwrap(),
            ..config()
        };
        let link = config().cluster.node_link();
        for (pods, services, taken) in [
            ("10.244.0.0/16", "10.112.0.0/16", "10.244.0.0/16"),
            ("10.245.0.0/16", "10.96.0.0/16", "10.96.0.0/16"),
            ("10.245.0.0/16", "10.0.0.0/8", "10.0.0.0/8"),
        ] {
            let error = NodeNetwork::setup(other(pods, services)).await.unwrap_err();
            let text = format!("addresses {taken} are in use on this machine already (route to {link})");
            assert_eq!(error.to_string(), text);
        }
        let ranges = routed_ranges(&ClusterId::of(Path::new("/other"))).await.unwrap();
        assert_eq!(ranges.len(), 2, "{ranges:?}");
        let second = NodeNetwork::setup(other("10.245.0.0/16", "10.112.0.0/16")).await.unwrap();
        second.teardown().await.unwrap();
        assert_eq!(leftovers(&config().cluster).await.unwrap().len(), 3, "the first is whole");
        first.teardown().await.unwrap();
    });
}

#[test]
fn the_nodes_rules_come_back_when_a_firewall_flushes_them() {
    in_own_namespace(async || {
        let network = std::sync::Arc::new(NodeNetwork::setup(config()).await.unwrap());
        let keeper = network.clone();
        let keeper = tokio::spawn(async move { keeper.keep().await });
        tokio::task::yield_now().await;
        let start = Instant::now();
        for _ in 0..3 {
            support::shell("nft flush ruleset");
            while leftovers(&config().cluster).await.unwrap().len() < 3 {
                assert!(start.elapsed() < Duration::from_secs(10), "the table is not back");
            }
        }
        // Replacing it ourselves is no removal.
        let mut watch =
            TableWatch::new(&leftovers(&config().cluster).await.unwrap()[2]["table ip ".len()..]).unwrap();
        let again = NodeNetwork::setup(config()).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(100), watch.removed()).await.is_err());
        keeper.abort();
        again.teardown().await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), watch.removed()).await.unwrap().unwrap();
    });
}

#[test]
fn a_pod_cannot_reach_the_nodes_loopback() {
    in_own_namespace(async || {
        let network = NodeNetwork::setup(config()).await.unwrap();
        let pod = Pod::new();
        network.attach("x", &pod.path, Ipv4Addr::new(10, 244, 0, 2)).await.unwrap();
        serve_hello(Ipv4Addr::LOCALHOST);
        // What a pod with every right in its namespace can do.
        pod.run(|| {
            support::shell(
                "ip addr flush dev lo && echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet && \
                 ip route add 127.0.0.1 via 169.254.1.1 dev eth0 onlink",
            );
        });
        let reach = || {
            pod.run(|| {
                TcpStream::connect_timeout(&"127.0.0.1:8080".parse().unwrap(), Duration::from_millis(300))
                    .is_ok()
            })
        };
        assert!(!reach());
        // It is the guard that keeps it out, and the test knows how to get in.
        let table = leftovers(&config().cluster).await.unwrap().pop().unwrap();
        apply_nft(&format!("flush chain {} guard\n", table.strip_prefix("table ").unwrap())).unwrap();
        assert!(reach());
    });
}
