//! Names and kubeconfigs.

use std::cell::RefCell;
use std::fs;
use std::net::IpAddr;

use hickory_proto::rr::Name;
use minke_api::Key;
use minke_cluster::keys::Pair;
use minke_cluster::kubeconfig;
use minke_dns::{Endpoint, Entry, Index, Port, Zone};

fn index() -> Index {
    let address = |text: &str| -> IpAddr { text.parse().expect("an address") };
    let mut index = Index::new(Zone {
        domain: Name::from_ascii("cluster.local.").expect("a name"),
        server: address("10.96.0.10"),
        reverse: vec!["10.96.0.0/12".parse().expect("a range"), "10.244.0.0/16".parse().expect("a range")],
        ttl: 5,
    });
    let port = || Port { name: "http".to_owned(), protocol: "tcp", number: 80 };
    let cluster_ip = Entry::ClusterIp { addresses: vec![address("10.96.0.20")], ports: vec![port()] };
    // Enough endpoints that answers must be cut to fit.
    let endpoint = |n: u8| Endpoint {
        host: format!("db-{n}"),
        address: IpAddr::from([10, 244, 0, n]),
        ports: vec![port()],
    };
    let external = |target: &str| Entry::External { target: Name::from_ascii(target).expect("a name") };
    index.set_namespace("default", true);
    index.set_service(&Key::new("default", "web"), Some(cluster_ip));
    index.set_service(
        &Key::new("default", "db"),
        Some(Entry::Headless { endpoints: (1..=200).map(endpoint).collect() }),
    );
    index.set_service(&Key::new("default", "out"), Some(external("example.com.")));
    index.set_service(&Key::new("default", "loop"), Some(external("loop.default.svc.cluster.local.")));
    index.set_complete();
    index
}

/// A packet to the DNS server.
pub fn dns(data: &[u8]) {
    thread_local!(static INDEX: Index = index());
    INDEX.with(|index| minke_dns::fuzzing::packet(index, data));
}

/// A kubeconfig that others have written: ours can be put in and taken out again, and theirs stays.
pub fn kubeconfig(data: &[u8]) {
    thread_local!(static DIR: RefCell<tempfile::TempDir> =
        RefCell::new(tempfile::tempdir().expect("a directory can be made")));
    DIR.with_borrow(|dir| {
        let path = dir.path().join("config");
        fs::write(&path, data).expect("written");
        let _ = kubeconfig::identity(&path);
        let user = Pair { certificate: "CERT".to_owned(), key: "KEY".to_owned() };
        let entry =
            kubeconfig::Entry { name: "minke", server: "https://192.0.2.2:6443", ca: "CA", user: &user };
        match entry.merge_into(&path) {
            Err(_) => assert_eq!(fs::read(&path).expect("it is there"), data, "it is as it was"),
            Ok(()) => {
                let identity = kubeconfig::identity(&path).expect("ours is the current one");
                assert_eq!((identity.server.as_str(), identity.ca.as_slice()), (entry.server, &b"CA"[..]));
                assert!(kubeconfig::remove_from(&path, "minke").expect("it can be read"));
                assert!(!kubeconfig::remove_from(&path, "minke").expect("it can be read"));
            }
        }
    });
}
