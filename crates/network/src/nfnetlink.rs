//! The framing of netfilter's netlink messages, for the few that no crate knows.
//!
//! A message is a netlink header, four bytes with the address family, and attributes. Attributes
//! are `length, type, value`, padded to four bytes; lengths are in the machine's order, values in the network's.

/// The netlink header, in bytes.
pub(crate) const HEADER: usize = 16;
/// nfgenmsg: family, version, resource id.
pub(crate) const GENERIC: usize = 4;

/// A message without its header.
pub(crate) struct Message<'a> {
    pub kind: u16,
    pub body: &'a [u8],
}

/// The netlink messages of a datagram; ends at the first that is malformed.
pub(crate) struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*self.0.get(4..)?.first_chunk()?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    }
}

pub(crate) struct Attribute<'a> {
    pub kind: u16,
    pub value: &'a [u8],
    /// With its header.
    pub whole: &'a [u8],
}

/// The attributes in a value; ends at the first that is malformed.
pub(crate) struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        // The two high bits say "nested" and "network order".
        let kind = u16::from_ne_bytes(*self.0.get(2..)?.first_chunk()?) & 0x3fff;
        let (whole, value) = (self.0.get(..length)?, self.0.get(4..length)?);
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, value, whole })
    }
}
