//! The patches that change stored objects: JSON patch, JSON merge patch and strategic merge patch.
//!
//! All pure. What an apply patch does is elsewhere: it needs to know who owns which field.

pub mod json;
pub mod merge;
pub mod strategic;

use serde_json::Value;

/// Why a patch cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// It is not a patch of its sort: 400 BadRequest.
    #[error("{0}")]
    Malformed(String),
    /// It does not apply to this object: 422, with the generic words that upstream has for it.
    #[error("{0}")]
    Unprocessable(String),
    /// It has too many operations or makes the object too large: 413.
    #[error("{0}")]
    TooLarge(String),
}

/// How upstream's messages print a value: as Go prints maps, lists and scalars.
pub(crate) fn go_print(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("[{}]", list.iter().map(go_print).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let entries: Vec<String> = map.iter().map(|(k, v)| format!("{k}:{}", go_print(v))).collect();
            format!("map[{}]", entries.join(" "))
        }
        other => other.to_string(),
    }
}
