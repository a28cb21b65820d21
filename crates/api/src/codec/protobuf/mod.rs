//! Protobuf bodies: the envelope, and messages to and from the JSON form by the field numbers of the schema.
//!
//! Decoding gives the JSON that the reference client would have sent: its generated code writes zero values of
//! plain fields and leaves nil pointers out, so an explicit zero counts only where the type has a pointer,
//! which is what [`crate::schema::conform`] goes by.

mod decode;
mod encode;
pub(crate) mod wire;

use serde_json::Value;

use super::DecodeError;
use crate::schema::{self, Type};

/// What every body starts with.
pub const MAGIC: &[u8; 4] = b"k8s\0";

/// A body whose content is not decoded yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
    pub raw: &'a [u8],
}

/// Decodes a body of any built-in kind; one that does not say its kind is taken to be of type `assumed`.
pub fn decode(bytes: &[u8], assumed: Option<&'static Type>) -> Result<Value, DecodeError> {
    decode::body(bytes, assumed, 0)
}

/// Reads the envelope alone.
pub fn envelope(bytes: &[u8]) -> Result<Envelope<'_>, DecodeError> {
    decode::envelope(bytes)
}

/// Encodes an object of type `ty`; `apiVersion` and `kind` are its own. Values that do not fit the schema
/// are left out: what is stored has been conformed to it.
pub fn encode(ty: &'static Type, object: &Value) -> Vec<u8> {
    encode::body(ty, object)
}

/// An event of a watch, as a frame without its length: `object` is an encoded body.
pub fn encode_watch_event(event: &str, object: &[u8]) -> Vec<u8> {
    encode::watch_event(event, object)
}

/// The schema that an envelope names.
fn named(envelope: &Envelope<'_>) -> Option<&'static Type> {
    schema::of_api_version(envelope.api_version, envelope.kind)
}

#[cfg(test)]
mod tests;
