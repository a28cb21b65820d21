//! Forgetting UDP connections whose endpoint has gone.
//!
//! The kernel remembers where a UDP client's packets went and sends later ones there too, whatever the
//! rules say by then. TCP needs no such help: its connections end with the endpoint.
//! Messages: linux/netfilter/nfnetlink_conntrack.h.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use rustix::net::netlink;

use crate::netlink::Socket;
use crate::nfnetlink::{Attributes, GENERIC, HEADER, Messages};
use crate::{Error, on_own_thread};

const NLM_REQUEST: u16 = 1;
const NLM_ACK: u16 = 4;
const NLM_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SUBSYSTEM: u16 = 1 << 8;
const CT_NEW: u16 = SUBSYSTEM;
const CT_GET: u16 = SUBSYSTEM | 1;
const CT_DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const CT_ZONE: u16 = 18;
const AF_INET: u8 = 2;
const UDP: u8 = 17;

/// A tracked UDP connection over IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Where the client sends to: the Service.
    pub to: SocketAddrV4,
    /// Who answers: the endpoint. The same as `to` when nothing was translated.
    pub answered_by: SocketAddrV4,
}

/// Makes the kernel forget the UDP connections for which `stale` holds; returns how many.
pub async fn forget_udp_flows(stale: impl Fn(&Flow) -> bool + Send + 'static) -> Result<usize, Error> {
    let forgotten = on_own_thread(move || forget(&stale)).await;
    forgotten.map_err(|source| Error::Netlink { what: "forget UDP connections".into(), source })
}

fn forget(stale: &dyn Fn(&Flow) -> bool) -> io::Result<usize> {
    let mut socket = Socket::open(Some(netlink::NETFILTER))?;
    let mut doomed: Vec<Vec<u8>> = Vec::new();
    let sequence = socket.next_sequence();
    socket.send(&request(CT_GET, NLM_DUMP, sequence, &[]))?;
    'dump: loop {
        for message in Messages(socket.receive()?) {
            match message.kind {
                NLMSG_DONE => break 'dump,
                NLMSG_ERROR => result_of(message.body)?,
                CT_NEW => {
                    let attributes = message.body.get(GENERIC..).unwrap_or_default();
                    if let Some(flow) = udp_flow(attributes)
                        && stale(&flow)
                    {
                        doomed.push(identity(attributes));
                    }
                }
                _ => {}
            }
        }
    }
    let mut forgotten = 0;
    for identity in doomed {
        let sequence = socket.next_sequence();
        socket.send(&request(CT_DELETE, NLM_ACK, sequence, &identity))?;
        let acknowledged = Messages(socket.receive()?).find(|message| message.kind == NLMSG_ERROR);
        match acknowledged.map(|message| result_of(message.body)) {
            // It has ended by itself in the meantime.
            Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Some(Err(error)) => return Err(error),
            _ => forgotten += 1,
        }
    }
    Ok(forgotten)
}

fn request(kind: u16, flags: u16, sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + GENERIC + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend([AF_INET, 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// The error of an NLMSG_ERROR, which also carries success.
fn result_of(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code.wrapping_neg())) }
}

/// The attributes that name a connection to the kernel: its original tuple and its zone.
pub(crate) fn identity(attributes: &[u8]) -> Vec<u8> {
    let mut identity = Vec::new();
    for attribute in Attributes(attributes) {
        if matches!(attribute.kind, TUPLE_ORIGINAL | CT_ZONE) {
            identity.extend(attribute.whole);
            identity.resize(identity.len().next_multiple_of(4), 0);
        }
    }
    identity
}

pub(crate) fn udp_flow(attributes: &[u8]) -> Option<Flow> {
    let tuple = |kind| Attributes(attributes).find(|attribute| attribute.kind == kind);
    let (_, to) = endpoints(tuple(TUPLE_ORIGINAL)?.value)?;
    let (answered_by, _) = endpoints(tuple(TUPLE_REPLY)?.value)?;
    Some(Flow { to, answered_by })
}

/// Source and destination of a UDP tuple.
fn endpoints(tuple: &[u8]) -> Option<(SocketAddrV4, SocketAddrV4)> {
    let find = |attributes, kind| {
        Attributes(attributes).find(|attribute| attribute.kind == kind).map(|attribute| attribute.value)
    };
    let address = |value: &[u8]| value.first_chunk().map(|octets: &[u8; 4]| Ipv4Addr::from(*octets));
    let port = |value: &[u8]| value.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
    // CTA_TUPLE_IP { SRC 1, DST 2 }, CTA_TUPLE_PROTO { NUM 1, SRC_PORT 2, DST_PORT 3 }
    let (ip, proto) = (find(tuple, 1)?, find(tuple, 2)?);
    if find(proto, 1)?.first() != Some(&UDP) {
        return None;
    }
    Some((
        SocketAddrV4::new(address(find(ip, 1)?)?, port(find(proto, 2)?)?),
        SocketAddrV4::new(address(find(ip, 2)?)?, port(find(proto, 3)?)?),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple(kind: u16, from: ([u8; 4], u16), to: ([u8; 4], u16), proto: u8) -> Vec<u8> {
        let ip = [attribute(1, &from.0), attribute(2, &to.0)].concat();
        let ports =
            [attribute(1, &[proto]), attribute(2, &from.1.to_be_bytes()), attribute(3, &to.1.to_be_bytes())];
        attribute(kind | 0x8000, &[attribute(0x8001, &ip), attribute(0x8002, &ports.concat())].concat())
    }

    fn connection(proto: u8) -> Vec<u8> {
        let (client, service, pod) = (([10, 0, 0, 9], 4000), ([10, 96, 0, 3], 53), ([10, 244, 0, 7], 5353));
        [tuple(TUPLE_ORIGINAL, client, service, proto), tuple(TUPLE_REPLY, pod, client, proto)].concat()
    }

    #[test]
    fn reads_the_two_directions_of_a_udp_connection() {
        let flow = udp_flow(&connection(UDP)).unwrap();
        assert_eq!(flow.to, "10.96.0.3:53".parse().unwrap());
        assert_eq!(flow.answered_by, "10.244.0.7:5353".parse().unwrap());
        assert_eq!(udp_flow(&connection(6)), None);
    }

    #[test]
    fn names_a_connection_by_its_original_tuple() {
        let mut attributes = connection(UDP);
        attributes.extend(attribute(CT_ZONE, &[0, 7]));
        let identity = identity(&attributes);
        let kinds: Vec<u16> = Attributes(&identity).map(|attribute| attribute.kind).collect();
        assert_eq!(kinds, [TUPLE_ORIGINAL, CT_ZONE]);
    }

    #[test]
    fn survives_any_cut_and_any_wrong_byte() {
        let whole = connection(UDP);
        for cut in 0..whole.len() {
            udp_flow(&whole[..cut]);
            for byte in [0, 1, 0x7f, 0xff] {
                let mut wrong = whole.clone();
                wrong[cut] = byte;
                udp_flow(&wrong);
                identity(&wrong);
                assert!(Messages(&wrong).count() <= wrong.len());
            }
        }
    }
}
