//! What of this crate reads the kernel's messages, as `crates/fuzzing` feeds it: it must not panic.

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;

use crate::nfnetlink::{GENERIC, Messages};
use crate::{conntrack, netlink, table_watch};

/// A datagram of rtnetlink, nftables or conntrack.
pub fn datagram(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some((message, after))) = netlink::next_message(rest) {
        assert!(after.len() < rest.len(), "every message takes some bytes");
        rest = after;
        match &message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                let _ = (netlink::link_name(link), netlink::link_mtu(link));
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(address)) => {
                let _ = netlink::ipv4_of(address);
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                let _ = netlink::Route::read(route).is_some_and(|route| route.conflicts_with(&route.to));
            }
            _ => {}
        }
    }
    let mut deleted = false;
    table_watch::read(data, "minke", &mut deleted);
    for message in Messages(data) {
        let attributes = message.body.get(GENERIC..).unwrap_or_default();
        let _ = conntrack::udp_flow(attributes);
        assert!(conntrack::identity(attributes).len() <= attributes.len() + 3);
    }
}
