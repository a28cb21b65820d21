//! A node's part of the pod network.
//!
//! ```text
//!   pod namespace               |  node
//!   eth0 10.244.0.7/32 ------------ mk<id><hash>   route 10.244.0.7 -> this link
//!   default via 169.254.1.1     |
//!                               |  mk<id>-node ---- mk<id>-void
//!                               |  10.244.0.1: source of what the node itself sends to pods
//!                               |  10.96.0.10: where the cluster DNS listens
//!                               |  routes: all other pod and service addresses -> here, refused
//! ```
//!
//! Both ends know each other's link-layer address from the start, so no ARP is ever sent. The node
//! link is a veth pair too, because that is the one kind of link which is there wherever pods can be;
//! its other end forwards nothing. What is routed to it (a Service without endpoints, an address without a pod)
//! is refused by the node table, and even without that table it never leaves by the default route.
//! Packets between nodes will need one more route per peer, which is more specific than ours.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use netlink_packet_route::address::AddressScope;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::netlink::{End, LinkEvents, Rtnetlink, already_exists, ipv4_of, link_name};
use crate::{ClusterId, Error, TableWatch, nft, on_own_thread};

/// What every pod has as its gateway. It is no address of any link: the pod knows its
/// link-layer address beforehand.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The name of a pod's link inside the pod.
const POD_LINK: &str = "eth0";

/// The address of the node itself in its pod range: the first.
pub fn own_address(pod_cidr: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(pod_cidr.network()).saturating_add(1))
}

#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub cluster: ClusterId,
    /// The addresses of this node's pods.
    pub pod_cidr: Ipv4Net,
    /// The addresses of all pods.
    pub cluster_cidr: Ipv4Net,
    pub service_cidr: Ipv4Net,
    /// An address that this node answers itself, though it belongs to a Service: the cluster DNS.
    pub dns_address: Option<Ipv4Addr>,
    /// The MTU of pods' links, in bytes.
    pub mtu: u32,
}

/// A pod that is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    pub address: Ipv4Addr,
    /// The host's end.
    pub host_link: String,
    /// The link-layer address of `eth0` in the pod.
    pub mac: [u8; 6],
}

/// A node that is ready for pods.
#[derive(Debug)]
pub struct NodeNetwork {
    config: NodeConfig,
}

impl NodeNetwork {
    /// Makes the node ready, and leaves pods that are attached already alone. Doing it again, also with
    /// another configuration, is harmless. Forwarding of IPv4 packets stays on afterwards,
    /// since others may have come to rely on it.
    pub async fn setup(config: NodeConfig) -> Result<NodeNetwork, Error> {
        on_own_thread(move || {
            set_sysctl("net/ipv4/ip_forward", "1")?;
            set_up_node_link(&config)?;
            nft::apply(&node_table(&config))?;
            Ok(NodeNetwork { config })
        })
        .await
    }

    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// Connects the sandbox whose network namespace is at `netns` under `address`. Doing it again is
    /// harmless.
    pub async fn attach(&self, sandbox: &str, netns: &Path, address: Ipv4Addr) -> Result<Attachment, Error> {
        let host_link = self.config.cluster.pod_link(sandbox);
        let source = own_address(self.config.pod_cidr);
        let (mtu, group, netns) = (self.config.mtu, self.config.cluster.link_group(), netns.to_owned());
        on_own_thread(move || attach(&host_link, &netns, address, source, mtu, group)).await
    }

    /// Disconnects a sandbox; one that is not connected is fine. A namespace that ends takes its
    /// link with it, but the kernel gets round to that only later.
    pub async fn detach(&self, sandbox: &str) -> Result<(), Error> {
        let link = self.config.cluster.pod_link(sandbox);
        on_own_thread(move || {
            let done = Rtnetlink::open().and_then(|mut netlink| netlink.delete_link(&link));
            done.map(drop).map_err(|source| Error::Netlink { what: format!("delete link {link}"), source })
        })
        .await
    }

    /// Puts the fixed rules back whenever someone else removes them, until dropped.
    pub async fn keep(&self) {
        let failed = async {
            let mut watch = TableWatch::new(&self.config.cluster.node_table())?;
            loop {
                watch.removed().await?;
                tracing::warn!("Someone has removed the node's packet rules; putting them back");
                let table = node_table(&self.config);
                if let Err(error) = on_own_thread(move || nft::apply(&table)).await {
                    tracing::error!(%error, "The node's packet rules can't be put back");
                }
            }
        };
        let failed: io::Result<()> = failed.await;
        if let Err(error) = failed {
            tracing::error!(%error, "The node's packet rules are not watched");
        }
    }

    /// Removes all links and tables of the cluster from this node.
    pub async fn teardown(&self) -> Result<(), Error> {
        remove_leftovers(&self.config.cluster).await
    }
}

/// The address ranges that this machine routes to somewhere in particular, for choosing ranges that are
/// free. Those of `cluster` itself are left out.
pub async fn routed_ranges(cluster: &ClusterId) -> Result<Vec<Ipv4Net>, Error> {
    let prefix = cluster.link_prefix();
    let routes = on_own_thread(move || {
        let mut netlink = Rtnetlink::open()?;
        let links = netlink.links()?;
        let own: Vec<u32> = links
            .iter()
            .filter(|link| link_name(link).is_some_and(|name| name.starts_with(&prefix)))
            .map(|link| link.header.index)
            .collect();
        let mut routes = netlink.routes()?;
        routes.retain(|route| !own.contains(&route.oif));
        Ok(routes.into_iter().map(|route| route.to).collect())
    });
    routes.await.map_err(|source| Error::Netlink { what: "list routes".into(), source })
}

/// What a cluster has left on this machine: its links (routes and addresses go with them) and tables.
pub async fn leftovers(cluster: &ClusterId) -> Result<Vec<String>, Error> {
    let cluster = cluster.clone();
    on_own_thread(move || {
        let mut found: Vec<String> =
            links_of(&cluster)?.into_iter().map(|link| format!("link {link}")).collect();
        found.extend(
            nft::tables(&cluster.table_prefix())?.into_iter().map(|table| format!("table ip {table}")),
        );
        Ok(found)
    })
    .await
}

/// Removes what [`leftovers`] finds; goes on past failures and returns them all.
pub async fn remove_leftovers(cluster: &ClusterId) -> Result<(), Error> {
    let cluster = cluster.clone();
    on_own_thread(move || {
        let mut failures = Vec::new();
        match nft::tables(&cluster.table_prefix()) {
            Ok(tables) => failures.extend(tables.iter().filter_map(|table| {
                // Adding it first makes deleting it succeed if it has gone in the meantime.
                nft::apply(&format!("add table ip {table}\ndelete table ip {table}\n")).err()
            })),
            // Without nft there can't be any.
            Err(Error::NftMissing(_)) => {}
            Err(error) => failures.push(error),
        }
        // All at once; one by one only those, if any, of which the group can't get rid.
        let together = Rtnetlink::open().and_then(|mut netlink| netlink.delete_group(cluster.link_group()));
        if let Err(error) = together {
            tracing::debug!(%error, "Links can't be deleted as a group");
        }
        match links_of(&cluster) {
            Ok(links) => failures.extend(links.into_iter().filter_map(|link| {
                let deleted = Rtnetlink::open().and_then(|mut netlink| netlink.delete_link(&link));
                deleted.err().map(|source| Error::Netlink { what: format!("delete link {link}"), source })
            })),
            Err(error) => failures.push(error),
        }
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0)),
            _ => Err(Error::Several(failures)),
        }
    })
    .await
}

fn links_of(cluster: &ClusterId) -> Result<Vec<String>, Error> {
    let prefix = cluster.link_prefix();
    let links = Rtnetlink::open().and_then(|mut netlink| netlink.links());
    let links = links.map_err(|source| Error::Netlink { what: "list links".into(), source })?;
    let names = links.iter().filter_map(link_name).filter(|name| name.starts_with(&prefix));
    Ok(names.map(str::to_owned).collect())
}

fn set_up_node_link(config: &NodeConfig) -> Result<(), Error> {
    let (name, void) = (config.cluster.node_link(), config.cluster.void_link());
    let failed = |what: &str| {
        let what = format!("{what} {name}");
        move |source| Error::Netlink { what, source }
    };
    let mut netlink = Rtnetlink::open().map_err(failed("open netlink for"))?;
    let end = |name| End { name, mac: None, namespace: None };
    match netlink.create_veth(&end(&name), &end(&void), config.mtu, config.cluster.link_group()) {
        Err(error) if already_exists(&error) => {}
        made => made.map_err(failed("make link"))?,
    }
    let index = netlink.link_index(&name).map_err(failed("look up link"))?;
    let index = index.ok_or_else(|| failed("look up link")(io::ErrorKind::NotFound.into()))?;

    let wanted = [
        Some((own_address(config.pod_cidr), AddressScope::Universe)),
        config.dns_address.map(|address| (address, AddressScope::Host)),
    ];
    let present = netlink.addresses().map_err(failed("list addresses of"))?;
    for address in present.into_iter().filter(|address| address.header.index == index) {
        let kept = wanted.iter().flatten().any(|(wanted, _)| ipv4_of(&address) == Some(*wanted));
        if !kept {
            netlink.delete_address(address).map_err(failed("remove an address from"))?;
        }
    }
    for (address, scope) in wanted.into_iter().flatten() {
        netlink.add_address(index, address, scope).map_err(failed("add an address to"))?;
    }
    let wanted_ranges = [config.cluster_cidr, config.service_cidr];
    let routes = netlink.routes().map_err(failed("list routes for"))?;
    // To share a range with another cluster would break both, and to take it over would break the other.
    for route in routes.iter().filter(|route| route.oif != index) {
        if let Some(range) = wanted_ranges.iter().find(|range| route.conflicts_with(range)) {
            let links = netlink.links().map_err(failed("list links for"))?;
            let link = links.iter().find(|link| link.header.index == route.oif).and_then(link_name);
            return Err(Error::Taken { range: *range, link: link.unwrap_or("?").to_owned() });
        }
    }
    for range in wanted_ranges {
        netlink.set_route(range, index, None, None).map_err(failed(&format!("route {range} to")))?;
    }
    set_sysctl(&format!("net/ipv4/conf/{void}/forwarding"), "0")?;
    let void = netlink.link_index(&void).map_err(failed("look up the end of"))?;
    let void = void.ok_or_else(|| failed("look up the end of")(io::ErrorKind::NotFound.into()))?;
    // Last: without it the routes above are there but dead, and a setup cut short is visible.
    netlink.set_up(void).map_err(failed("set up the end of"))
}

/// The rules that never change while the node runs.
fn node_table(config: &NodeConfig) -> String {
    let NodeConfig { cluster, pod_cidr, cluster_cidr, service_cidr, .. } = config;
    let (table, prefix) = (cluster.node_table(), cluster.link_prefix());
    let (node, void) = (cluster.node_link(), cluster.void_link());
    // The guard must come before connection tracking translates addresses (priority raw): the reply to a
    // connection from 127.0.0.1 to a node port has a loopback address only after that. In the output hook
    // `oifname` is where the packet would have gone before its address was translated; so a translated
    // one to a pod that is no more passes, and ends when nobody answers the ARP request for it.
    format!(
        r#"add table ip {table}
delete table ip {table}
table ip {table} {{
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{void}" drop
        iifname "{prefix}*" ip daddr 127.0.0.0/8 drop
        iifname "{prefix}*" ip saddr 127.0.0.0/8 drop
    }}
    chain refuse {{
        ip daddr {service_cidr} meta l4proto tcp reject with tcp reset
        ip daddr {service_cidr} reject with icmp type port-unreachable
        reject with icmp type host-unreachable
    }}
    chain refuse_forwarded {{
        type filter hook forward priority filter; policy accept;
        oifname "{node}" goto refuse
    }}
    chain refuse_local {{
        type filter hook output priority filter; policy accept;
        ct status dnat return
        oifname "{node}" goto refuse
    }}
    chain masquerade_outside {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {pod_cidr} ip daddr != {{ {cluster_cidr}, 224.0.0.0/4 }} masquerade fully-random
    }}
}}
"#
    )
}

fn attach(
    host_link: &str,
    netns: &Path,
    address: Ipv4Addr,
    source: Ipv4Addr,
    mtu: u32,
    group: u32,
) -> Result<Attachment, Error> {
    let failed = |what: &str| {
        let what = format!("{what} {host_link}");
        move |source| Error::Netlink { what, source }
    };
    let enter_failed = |source| Error::Namespace { path: netns.display().to_string(), source };
    let namespace = fs::File::open(netns).map_err(enter_failed)?;
    // Both ends' link-layer addresses follow from the pod's address, so neither has to be looked up.
    let [a, b, c, d] = address.octets();
    let (mac, host_mac) = ([0x0a, 0x58, a, b, c, d], [0x0e, 0x58, a, b, c, d]);

    let mut host = Rtnetlink::open().map_err(failed("open netlink for"))?;
    let host_end = End { name: host_link, mac: Some(host_mac), namespace: None };
    let pod_end = End { name: POD_LINK, mac: Some(mac), namespace: Some(namespace.as_raw_fd()) };
    match host.create_veth(&host_end, &pod_end, mtu, group) {
        Err(error) if already_exists(&error) => {
            // Made by an earlier, perhaps unfinished, attempt: what follows completes it. A link of a
            // sandbox that is gone would have ended with it, unless the kernel is not through yet.
            if pod_link_index(&namespace).map_err(enter_failed)?.is_none() {
                host.delete_link(host_link).map_err(failed("replace link"))?;
                host.create_veth(&host_end, &pod_end, mtu, group).map_err(failed("make link"))?;
            }
        }
        made => made.map_err(failed("make link"))?,
    }
    let index = host.link_index(host_link).map_err(failed("look up link"))?;
    let index = index.ok_or_else(|| failed("look up link")(io::ErrorKind::NotFound.into()))?;
    let conf = format!("net/ipv4/conf/{host_link}");
    // A connection from 127.0.0.1 to a node port comes back here (`guard` keeps others out), and a
    // packet whose source is not the pod's address does not come in.
    set_sysctl(&format!("{conf}/route_localnet"), "1")?;
    set_sysctl(&format!("{conf}/rp_filter"), "1")?;
    host.set_neighbour(index, address, mac).map_err(failed("add the pod's neighbour to"))?;
    host.set_route(address.into(), index, None, Some(source)).map_err(failed("route the pod to"))?;
    let events = LinkEvents::open().map_err(failed("watch"))?;

    // From here on this thread belongs to the pod's namespace. It ends with this function.
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| enter_failed(error.into()))?;
    let mut pod = Rtnetlink::open().map_err(failed("open netlink in the pod of"))?;
    let eth0 = pod.link_index(POD_LINK).map_err(failed("look up eth0 in the pod of"))?;
    let eth0 = eth0.ok_or_else(|| failed("look up eth0 in the pod of")(io::ErrorKind::NotFound.into()))?;
    // Early, because the kernel takes its time over getting the pair going (see below).
    pod.set_up(eth0).map_err(failed("set eth0 up in the pod of"))?;
    let lo = pod.link_index("lo").map_err(failed("look up lo in the pod of"))?.unwrap_or(1);
    pod.set_up(lo).map_err(failed("set lo up in the pod of"))?;
    pod.add_address(eth0, address, AddressScope::Universe).map_err(failed("add an address in the pod of"))?;
    pod.set_neighbour(eth0, GATEWAY, host_mac).map_err(failed("add the gateway in the pod of"))?;
    pod.set_route(Ipv4Net::default(), eth0, Some(GATEWAY), None)
        .map_err(failed("add a route in the pod of"))?;
    host.wait_until_running(index, events).map_err(failed("wait for"))?;
    Ok(Attachment { address, host_link: host_link.to_owned(), mac })
}

/// The index of `eth0` in a namespace, from a thread that goes there and ends.
fn pod_link_index(namespace: &fs::File) -> io::Result<Option<u32>> {
    std::thread::scope(|scope| {
        let visit = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Rtnetlink::open()?.link_index(POD_LINK)
        });
        visit.join().expect("looking up a link does not panic")
    })
}

/// Writes only what is not there yet: /proc/sys may be read-only, and set up well all the same.
fn set_sysctl(name: &str, value: &str) -> Result<(), Error> {
    let path = PathBuf::from("/proc/sys").join(name);
    if fs::read_to_string(&path).is_ok_and(|present| present.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| Error::Sysctl { path: path.display().to_string(), source })
}
