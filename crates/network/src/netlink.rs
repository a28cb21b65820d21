//! Asking the kernel over a blocking netlink socket.
//!
//! The kernel answers a netlink request before `send` returns, so there is nothing to wait for and an
//! asynchronous socket with its task would only add hops: attaching a pod is some ten requests. A
//! socket belongs to the network namespace in which it was opened, whoever uses it later.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use ipnet::Ipv4Net;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{self, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The `proto` of our routes, as `ip route` shows it; a number nobody else has claimed.
const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(77);
/// No single answer is larger: the kernel fills at most 32 KiB per datagram of a dump.
const ANSWER_BYTES: usize = 64 << 10;
/// The kernel answers at once; this only turns a wait that should not be into an error.
const PATIENCE: Duration = Duration::from_secs(10);

/// A socket of one netlink family in the network namespace of the thread that opened it.
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub fn open(family: Option<net::Protocol>) -> io::Result<Socket> {
        Socket::listen(family, 0)
    }

    /// A socket that is also told what happens, by multicast groups.
    fn listen(family: Option<net::Protocol>, groups: u32) -> io::Result<Socket> {
        let fd =
            net::socket_with(net::AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, family)?;
        net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        net::sockopt::set_socket_timeout(&fd, net::sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Socket { fd, sequence: 0, buffer: vec![0; ANSWER_BYTES] })
    }

    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    pub fn send(&mut self, request: &[u8]) -> io::Result<()> {
        net::sendto(&self.fd, request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    /// One datagram, which holds whole messages.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        let (length, actual) = loop {
            match net::recv(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC) {
                Err(Errno::INTR) => {}
                received => break received?,
            }
        };
        if actual > length {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "netlink answer too large"));
        }
        Ok(&self.buffer[..length])
    }
}

/// Links, addresses, routes and neighbours of one network namespace.
pub(crate) struct Rtnetlink(Socket);

impl Rtnetlink {
    pub fn open() -> io::Result<Rtnetlink> {
        // NETLINK_ROUTE is 0, which is what no protocol at all stands for.
        Socket::open(None).map(Rtnetlink)
    }

    /// Makes a veth pair. The peer is still down: the kernel does not set it up before it has the link.
    pub fn create_veth(&mut self, link: &End<'_>, peer: &End<'_>, mtu: u32, group: u32) -> io::Result<()> {
        let mut message = link.message(mtu);
        message.attributes.push(LinkAttribute::Group(group));
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer.message(mtu)))),
        ]));
        self.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Waits until packets pass a link. The kernel gets it going some time after both of its ends are up, and
    /// drops packets until then: a first SYN, say, which is repeated only after a second. `told` must
    /// have been there before the second end was set up.
    pub fn wait_until_running(&mut self, index: u32, mut told: LinkEvents) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        let answer = self.ask(RouteNetlinkMessage::GetLink(request), 0)?;
        if answer.iter().any(|message| is_running(message, index)) {
            return Ok(());
        }
        loop {
            let mut rest = told.0.receive()?;
            while let Some((message, after)) = next_message(rest)? {
                rest = after;
                if matches!(message.payload, NetlinkPayload::InnerMessage(event) if is_running(&event, index))
                {
                    return Ok(());
                }
            }
        }
    }

    /// Deletes a link by name; `false` when there is none.
    pub fn delete_link(&mut self, name: &str) -> io::Result<bool> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        absent_is_false(self.change(RouteNetlinkMessage::DelLink(message), 0))
    }

    /// Deletes all links of a group at once: the kernel's long wait for readers comes once, not for each.
    pub fn delete_group(&mut self, group: u32) -> io::Result<bool> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        absent_is_false(self.change(RouteNetlinkMessage::DelLink(message), 0))
    }

    /// The index of the link called `name`.
    pub fn link_index(&mut self, name: &str) -> io::Result<Option<u32>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.ask(RouteNetlinkMessage::GetLink(message), 0) {
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
            Ok(answer) => Ok(answer.iter().find_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
                _ => None,
            })),
        }
    }

    pub fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let answer = self.ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let links = answer.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// The IPv4 addresses of all links, in the order of the links.
    pub fn addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let answer = self.ask(RouteNetlinkMessage::GetAddress(message), NLM_F_DUMP)?;
        let addresses = answer.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// Gives a link a /32 address. With [`AddressScope::Host`] it is local, and no connection to
    /// anywhere else ever gets it as its source.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr, scope: AddressScope) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.scope = scope;
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address.into()));
        message.attributes.push(AddressAttribute::Address(address.into()));
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub fn delete_address(&mut self, address: AddressMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::DelAddress(address), 0)
    }

    /// Says at which link-layer address `address` is, for good: nobody needs to ask by ARP.
    pub fn set_neighbour(&mut self, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        self.change(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Sends `to` out of a link; `via` is taken to be on it.
    pub fn set_route(
        &mut self,
        to: Ipv4Net,
        index: u32,
        via: Option<Ipv4Addr>,
        source: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        let mut message = route_to(to);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = ROUTE_PROTOCOL;
        message.header.scope = if via.is_some() { RouteScope::Universe } else { RouteScope::Link };
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(index));
        if let Some(via) = via {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(via)));
        }
        if let Some(source) = source {
            message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
        }
        self.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// The IPv4 routes of the main table, less the default ones.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let answer = self.ask(RouteNetlinkMessage::GetRoute(route_to(Ipv4Net::default())), NLM_F_DUMP)?;
        let routes = answer.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) if route.header.table == RouteHeader::RT_TABLE_MAIN => {
                Route::read(&route)
            }
            _ => None,
        });
        Ok(routes.collect())
    }

    /// How a packet to `to` would leave this machine; `None` when it would not.
    pub fn route_to(&mut self, to: Ipv4Addr) -> io::Result<Option<RouteMessage>> {
        match self.ask(RouteNetlinkMessage::GetRoute(route_to(to.into())), 0) {
            Err(error) if is_unreachable(&error) => Ok(None),
            Err(error) => Err(error),
            Ok(answer) => Ok(answer.into_iter().find_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route) => Some(route),
                _ => None,
            })),
        }
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.ask(message, flags | NLM_F_ACK).map(drop)
    }

    /// Sends one request and returns all that the kernel answers to it.
    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.0.next_sequence();
        let sequence = header.sequence_number;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes)?;

        let mut answer = Vec::new();
        loop {
            let mut rest = self.0.receive()?;
            while let Some((message, after)) = next_message(rest)? {
                rest = after;
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answer),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(_) => return Ok(answer),
                    NetlinkPayload::InnerMessage(inner) => {
                        answer.push(inner);
                        if flags & (NLM_F_ACK | NLM_F_DUMP) == 0 {
                            return Ok(answer);
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

/// What happens to links from now on.
pub(crate) struct LinkEvents(Socket);

impl LinkEvents {
    pub fn open() -> io::Result<LinkEvents> {
        const RTMGRP_LINK: u32 = 1;
        Socket::listen(None, RTMGRP_LINK).map(LinkEvents)
    }
}

fn is_running(message: &RouteNetlinkMessage, index: u32) -> bool {
    let RouteNetlinkMessage::NewLink(link) = message else { return false };
    link.header.index == index && link.attributes.contains(&LinkAttribute::OperState(State::Up))
}

/// The first of the messages in a datagram, and the rest of them.
pub(crate) fn next_message(bytes: &[u8]) -> io::Result<Option<(NetlinkMessage<RouteNetlinkMessage>, &[u8])>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    // Messages are padded to four bytes, the last one perhaps not; a header has sixteen.
    let length = (message.header.length as usize).next_multiple_of(4).max(16);
    Ok(Some((message, bytes.get(length..).unwrap_or_default())))
}

/// A route to somewhere in particular.
pub(crate) struct Route {
    pub to: Ipv4Net,
    /// 0 when it leads to no link.
    pub oif: u32,
    ours: bool,
}

impl Route {
    pub(crate) fn read(message: &RouteMessage) -> Option<Route> {
        let (mut to, mut oif) = (None, 0);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(*address),
                RouteAttribute::Oif(index) => oif = *index,
                _ => {}
            }
        }
        let to = Ipv4Net::new(to?, message.header.destination_prefix_length).ok()?;
        Some(Route { to, oif, ours: message.header.protocol == ROUTE_PROTOCOL })
    }

    /// The same range is routed already, or another cluster has one that overlaps. What others route within a
    /// range is more specific, and stays as it is; so does the route of a pod.
    pub fn conflicts_with(&self, range: &Ipv4Net) -> bool {
        let overlaps = self.to.contains(range) || range.contains(&self.to);
        self.to == *range || (self.ours && self.to.prefix_len() < 32 && overlaps)
    }
}

/// One end of a veth pair.
pub(crate) struct End<'a> {
    pub name: &'a str,
    pub mac: Option<[u8; 6]>,
    /// Where it is made; `None` is the namespace of the socket.
    pub namespace: Option<std::os::fd::RawFd>,
}

impl End<'_> {
    fn message(&self, mtu: u32) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName(self.name.to_owned()), LinkAttribute::Mtu(mtu)];
        message.attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        message.attributes.extend(self.namespace.map(LinkAttribute::NetNsFd));
        message
    }
}

pub(crate) fn link_name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

pub(crate) fn link_mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

pub(crate) fn ipv4_of(address: &AddressMessage) -> Option<Ipv4Addr> {
    // On a point-to-point link `Address` is the other side; `Local` is always ours.
    address.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(std::net::IpAddr::V4(address)) => Some(*address),
        _ => None,
    })
}

fn route_to(to: Ipv4Net) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = to.prefix_len();
    if to.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to.network())));
    }
    message
}

fn absent_is_false(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_absent(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::NODEV)
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS))
}

pub(crate) fn already_exists(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::EXIST)
}
