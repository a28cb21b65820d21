//! Decoders of what clients send. Each is pure, and bounded in depth and growth on hostile input.

pub mod json;
pub mod protobuf;
mod scan;
pub mod yaml;

use serde_json::Value;

/// The deepest nesting that is read. It is what `serde_json` can read back, so that whatever is stored can
/// be read by every part of the program; upstream stops at 10,000 with the same words.
pub const MAX_DEPTH: usize = 127;

pub(crate) const TOO_DEEP: &str = "exceeded max depth";

/// A decoded body.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    pub value: Value,
    /// Paths of the keys that were given more than once, such as `spec.replicas`; the last value counts.
    pub duplicates: Vec<String>,
}

/// Why a body cannot be read, in upstream's words where it has them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(pub String);

/// How deep lists and maps are nested in a value.
pub(crate) fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}
