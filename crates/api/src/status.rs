//! `Status`: the one error that leaves the API server, and what a client in this process gets too.
//!
//! The constructors hold upstream's wording, since kubectl prints `message` and programs match `reason`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Kind;

/// A `Status` of `v1`, as an error or as the answer to a deletion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    #[serde(default = "kind_status")]
    pub kind: String,
    #[serde(default = "version_v1")]
    pub api_version: String,
    #[serde(default)]
    pub metadata: ListMeta,
    /// `Success` or `Failure`.
    #[serde(default)]
    pub status: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
    /// HTTP status code.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub code: u16,
}

/// The metadata of a Status: a continuation may come with `410 Expired`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ListMeta {
    #[serde(default, rename = "continue", skip_serializing_if = "Option::is_none")]
    pub continue_: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// Plural name of the resource; the kind itself for `Invalid`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    #[serde(default, skip_serializing_if = "is_zero32")]
    pub retry_after_seconds: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
}

fn kind_status() -> String {
    "Status".to_owned()
}

fn version_v1() -> String {
    "v1".to_owned()
}

fn is_zero(code: &u16) -> bool {
    *code == 0
}

fn is_zero32(seconds: &u32) -> bool {
    *seconds == 0
}

impl Status {
    /// A failure with any code and reason; prefer a constructor that names the case.
    pub fn failure(code: u16, reason: &str, message: impl Into<String>) -> Status {
        Status {
            kind: kind_status(),
            api_version: version_v1(),
            metadata: ListMeta::default(),
            status: "Failure".to_owned(),
            message: message.into(),
            reason: reason.to_owned(),
            details: None,
            code,
        }
    }

    /// The answer to a deletion that is complete.
    pub fn deleted(kind: &Kind, name: &str, uid: &str) -> Status {
        let mut status = Status::failure(200, "", "").about(kind, name);
        status.status = "Success".to_owned();
        status.code = 0;
        if let Some(details) = &mut status.details {
            details.uid = uid.to_owned();
        }
        status
    }

    /// `Success` with nothing to say, as bindings and evictions answer.
    pub fn success(code: u16) -> Status {
        let mut status = Status::failure(code, "", "");
        status.status = "Success".to_owned();
        status
    }

    /// Says which object this is about: name, group and plural.
    pub fn about(mut self, kind: &Kind, name: &str) -> Status {
        let details = self.details.get_or_insert_default();
        details.name = name.to_owned();
        details.group = kind.group.to_owned();
        details.kind = kind.plural.to_owned();
        self
    }

    pub fn with_cause(mut self, reason: &str, message: impl Into<String>, field: &str) -> Status {
        let cause = Cause { reason: reason.to_owned(), message: message.into(), field: field.to_owned() };
        self.details.get_or_insert_default().causes.push(cause);
        self
    }

    pub fn retry_after(mut self, seconds: u32) -> Status {
        self.details.get_or_insert_default().retry_after_seconds = seconds;
        self
    }

    pub fn not_found(kind: &Kind, name: &str) -> Status {
        Status::failure(404, "NotFound", format!("{} \"{name}\" not found", kind.qualified_plural()))
            .about(kind, name)
    }

    /// No such path: what clients get for an unknown group, version or resource.
    pub fn no_such_resource() -> Status {
        let mut status = Status::failure(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(Details::default());
        status
    }

    pub fn already_exists(kind: &Kind, name: &str) -> Status {
        Status::failure(
            409,
            "AlreadyExists",
            format!("{} \"{name}\" already exists", kind.qualified_plural()),
        )
        .about(kind, name)
    }

    /// `why` completes the sentence "Operation cannot be fulfilled on X: ...".
    pub fn conflict(kind: &Kind, name: &str, why: &str) -> Status {
        Status::failure(
            409,
            "Conflict",
            format!("Operation cannot be fulfilled on {} \"{name}\": {why}", kind.qualified_plural()),
        )
        .about(kind, name)
    }

    /// Someone else wrote first.
    pub fn modified(kind: &Kind, name: &str) -> Status {
        Status::conflict(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// `why` completes the sentence "X is forbidden: ...". An empty name means the collection.
    pub fn forbidden(kind: &Kind, name: &str, why: &str) -> Status {
        let what = kind.qualified_plural();
        let message = match name {
            "" => format!("{what} is forbidden: {why}"),
            _ => format!("{what} \"{name}\" is forbidden: {why}"),
        };
        Status::failure(403, "Forbidden", message).about(kind, name)
    }

    pub fn unauthorized() -> Status {
        Status::failure(401, "Unauthorized", "Unauthorized")
    }

    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::failure(400, "BadRequest", message)
    }

    /// A watch or continuation asks for history that is gone.
    pub fn expired(message: impl Into<String>) -> Status {
        Status::failure(410, "Expired", message)
    }

    pub fn too_large(message: impl Into<String>) -> Status {
        Status::failure(413, "RequestEntityTooLarge", message)
    }

    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Status {
        Status::failure(429, "TooManyRequests", message).retry_after(retry_after_seconds)
    }

    pub fn method_not_allowed() -> Status {
        let mut status = Status::failure(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        );
        status.details = Some(Details::default());
        status
    }

    pub fn not_acceptable(accepted: &str) -> Status {
        Status::failure(
            406,
            "NotAcceptable",
            format!("only the following media types are accepted: {accepted}"),
        )
    }

    pub fn unsupported_media_type(accepted: &str) -> Status {
        Status::failure(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: {accepted}"
            ),
        )
    }

    pub fn internal(error: impl fmt::Display) -> Status {
        let text = error.to_string();
        let mut status = Status::failure(500, "InternalError", format!("Internal error occurred: {text}"));
        status.details =
            Some(Details { causes: vec![Cause { message: text, ..Cause::default() }], ..Details::default() });
        status
    }

    pub fn unavailable(message: impl Into<String>) -> Status {
        Status::failure(503, "ServiceUnavailable", message)
    }

    pub fn timeout(message: impl Into<String>, retry_after_seconds: u32) -> Status {
        Status::failure(504, "Timeout", message).retry_after(retry_after_seconds)
    }

    pub fn is_not_found(&self) -> bool {
        self.reason == "NotFound"
    }

    pub fn is_conflict(&self) -> bool {
        self.reason == "Conflict"
    }

    pub fn is_already_exists(&self) -> bool {
        self.reason == "AlreadyExists"
    }

    pub fn is_expired(&self) -> bool {
        self.reason == "Expired" || self.reason == "Gone"
    }

    /// Whether the cause `reason` is among the details, e.g. `NamespaceTerminating`.
    pub fn has_cause(&self, reason: &str) -> bool {
        self.details.iter().flat_map(|d| &d.causes).any(|cause| cause.reason == reason)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}
