//! Ports and networks that nobody on this machine uses.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result};
use ipnet::Ipv4Net;

/// The first free port from `from` on that is not among `taken`.
pub fn free(from: u16, taken: &[u16]) -> Result<u16> {
    (from..from.saturating_add(500))
        .find(|port| !taken.contains(port) && is_free(*port))
        .with_context(|| format!("no free port in the 500 from {from} on"))
}

pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
}

/// A network for pods and one for services that overlap none of `taken`.
pub fn free_networks(taken: &[Ipv4Net]) -> Result<(Ipv4Net, Ipv4Net)> {
    let network = |second: u8| Ipv4Net::new_assert(Ipv4Addr::new(10, second, 0, 0), 16);
    let apart = |net: &Ipv4Net| taken.iter().all(|other| !other.contains(net) && !net.contains(other));
    let pairs = (0..64u8).map(|i| (network(112 + i), network(176 + i)));
    let mut free = pairs.filter(|(pods, services)| apart(pods) && apart(services));
    free.next().context("no free pair of networks among 10.112.0.0/16 to 10.239.0.0/16")
}

/// The networks this machine has routes to, the default route aside.
pub fn routed_networks() -> Vec<Ipv4Net> {
    parse_routes(&std::fs::read_to_string("/proc/net/route").unwrap_or_default())
}

fn parse_routes(table: &str) -> Vec<Ipv4Net> {
    let address = |hex: &str| u32::from_str_radix(hex, 16).ok().map(|n| Ipv4Addr::from(n.swap_bytes()));
    let routes = table.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        Ipv4Net::with_netmask(address(columns.get(1)?)?, address(columns.get(7)?)?).ok()
    });
    routes.filter(|net| net.prefix_len() > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_read_in_host_order() {
        let table = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
            eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\n\
            eth0 000200C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n";
        assert_eq!(parse_routes(table), ["192.0.2.0/24".parse().unwrap()]);
    }

    #[test]
    fn networks_keep_clear_of_those_in_use() {
        let taken = ["10.112.5.0/24", "10.177.0.0/16", "192.0.2.0/24"].map(|net| net.parse().unwrap());
        let (pods, services) = free_networks(&taken).unwrap();
        assert_eq!(
            (pods.to_string(), services.to_string()),
            ("10.114.0.0/16".into(), "10.178.0.0/16".into())
        );
        assert!(free_networks(&["10.0.0.0/8".parse().unwrap()]).is_err());
    }

    #[test]
    fn a_port_in_use_is_passed_over() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!is_free(port));
        assert_ne!(free(port, &[]).unwrap(), port);
    }
}
