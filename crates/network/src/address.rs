//! What this machine is called and how it is reached.

use std::net::Ipv4Addr;

use netlink_packet_route::address::AddressScope;
use netlink_packet_route::route::{RouteAddress, RouteAttribute};

use crate::netlink::{Rtnetlink, ipv4_of, link_mtu, link_name};
use crate::{Error, on_own_thread};

/// Any address outside will do: it is looked up in the routing table, and nothing is sent.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);
/// What a link has unless it says otherwise.
const MTU: u32 = 1500;

/// How the node is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeAddress {
    pub address: Ipv4Addr,
    /// The MTU of the link with that address, in bytes.
    pub mtu: u32,
}

/// The node's primary address: the source of the default route, else a global address of any link,
/// else nothing. Nothing is made up here: a machine without a network uses [`crate::own_address`],
/// which is on the node's own link. Links of Minke don't count.
pub async fn node_address() -> Result<Option<NodeAddress>, Error> {
    let found = on_own_thread(|| {
        let mut netlink = Rtnetlink::open()?;
        let links = netlink.links()?;
        let link = |index: u32| links.iter().find(|link| link.header.index == index);
        let ours = |index| link(index).and_then(link_name).is_some_and(|name| name.starts_with("mk"));
        let mtu = |index| link(index).and_then(link_mtu).unwrap_or(MTU);

        if let Some(route) = netlink.route_to(ELSEWHERE)? {
            let mut source = None;
            let mut index = 0;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(*address),
                    RouteAttribute::Oif(oif) => index = *oif,
                    _ => {}
                }
            }
            if let Some(address) = source.filter(|address| !address.is_loopback()) {
                return Ok(Some(NodeAddress { address, mtu: mtu(index) }));
            }
        }
        let addresses = netlink.addresses()?;
        let global = addresses
            .iter()
            .find(|address| address.header.scope == AddressScope::Universe && !ours(address.header.index));
        Ok(global.and_then(|message| {
            Some(NodeAddress { address: ipv4_of(message)?, mtu: mtu(message.header.index) })
        }))
    })
    .await;
    found.map_err(|source| Error::Netlink { what: "look for the node's address".into(), source })
}

/// The host's name as a node is named: in lower case.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase()
}
