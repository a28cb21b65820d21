//! What lists and watches are asked, and the rules of how these options go together.
//!
//! Upstream: apimachinery pkg/apis/meta/internalversion/validation, and the API conventions' table of
//! resourceVersion and resourceVersionMatch.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use minke_api::{Cause, Details, FieldSelector, Key, LabelSelector, Object, Revision, Status};
use minke_client::{DeleteOptions, Propagation};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kinds::tree::Tree;

/// How old a continuation may be. Upstream keeps history for as long.
const CONTINUE_SECONDS: i64 = 5 * 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    Exact,
    NotOlderThan,
}

/// What a list asks for. The default is everything, now.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// Most objects in one answer; 0 means no limit.
    pub limit: usize,
    pub continue_: Option<String>,
    pub revision: Option<Revision>,
    pub match_: Option<Match>,
}

/// One answer to a list.
#[derive(Debug, Clone)]
pub struct Page {
    pub revision: Revision,
    pub items: Vec<Arc<Object>>,
    /// Where the next page begins, if there is one.
    pub continue_: Option<String>,
    /// How many objects are left, where that is known.
    pub remaining: Option<usize>,
}

/// What a watch asks for.
#[derive(Debug, Clone, Default)]
pub struct WatchQuery {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// Events after this; `None` and 0 begin with the present state.
    pub revision: Option<Revision>,
    /// Whether to begin with the present state, and to say when that is told.
    pub initial: Option<bool>,
    pub bookmarks: bool,
}

/// Where a list goes on: what is in a `continue` token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    v: String,
    /// Revision of the list; `None` goes on with the newest state, whatever was listed before.
    rv: Option<u64>,
    /// The last object of the page before.
    namespace: String,
    name: String,
    /// When the first page was listed, in Unix seconds.
    at: i64,
}

impl Token {
    pub fn new(revision: Option<Revision>, last: &Key, at: i64) -> Token {
        Token {
            v: "minke/v1".to_owned(),
            rv: revision.map(|r| r.0),
            namespace: (*last.namespace).to_owned(),
            name: (*last.name).to_owned(),
            at,
        }
    }

    pub fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).expect("a token serialises"))
    }

    pub fn decode(text: &str) -> Result<Token, Status> {
        URL_SAFE_NO_PAD
            .decode(text)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Token>(&bytes).ok())
            .filter(|token| token.v == "minke/v1")
            .ok_or_else(|| Status::bad_request("continue key is not valid"))
    }

    pub fn revision(&self) -> Option<Revision> {
        self.rv.map(Revision)
    }

    pub fn last(&self) -> Key {
        Key::new(&self.namespace, &self.name)
    }

    pub fn issued(&self) -> i64 {
        self.at
    }

    pub fn is_too_old(&self, now: Timestamp) -> bool {
        now.as_second() - self.at > CONTINUE_SECONDS
    }

    /// `410` with a token by which the list can go on at the newest state.
    pub fn expired(&self, now: Timestamp) -> Status {
        let mut status = Status::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new \
             list without the continue parameter, or use the continue token in this response to retrieve the \
             remainder of the results. Continuing with the provided token results in an inconsistent list - objects \
             that were created, modified, or deleted between the time the first chunk was returned and now may show \
             up in the list.",
        );
        status.metadata.continue_ = Some(Token { rv: None, at: now.as_second(), ..self.clone() }.encode());
        status
    }
}

/// A revision of the future was asked for.
pub fn too_large(asked: Revision, current: Revision) -> Status {
    let mut status = Status::timeout(format!("Too large resource version: {asked}, current: {current}"), 1);
    let details = status.details.get_or_insert_with(Details::default);
    details.causes.push(Cause {
        reason: "ResourceVersionTooLarge".to_owned(),
        message: "Too large resource version".to_owned(),
        field: String::new(),
    });
    status
}

/// DeleteOptions as they are sent in a body; `null` is the default.
pub fn delete_options(value: &Value) -> Result<DeleteOptions, Status> {
    let invalid = |field: &str, value: &Value, why: &str| {
        let message = format!(" \"\" is invalid: {field}: Invalid value: {value}: {why}");
        Status::failure(422, "Invalid", format!("DeleteOptions.meta.k8s.io{message}"))
    };
    let preconditions = value.at("preconditions");
    let text = |name: &str| Some(preconditions.text(name)).filter(|t| !t.is_empty()).map(str::to_owned);
    let revision = match text("resourceVersion") {
        None => None,
        Some(revision) => {
            Some(revision.parse().map_err(|_| Status::bad_request("resourceVersion must be a number"))?)
        }
    };
    let orphan = value.at("orphanDependents").as_bool();
    let propagation = match value.text("propagationPolicy") {
        "" => orphan.map(|orphan| if orphan { Propagation::Orphan } else { Propagation::Background }),
        _ if orphan.is_some() => {
            return Err(invalid(
                "propagationPolicy",
                value.at("propagationPolicy"),
                "orphanDependents and deletionPropagation cannot be both set",
            ));
        }
        "Background" => Some(Propagation::Background),
        "Foreground" => Some(Propagation::Foreground),
        "Orphan" => Some(Propagation::Orphan),
        _ => {
            return Err(invalid(
                "propagationPolicy",
                value.at("propagationPolicy"),
                "must be one of \"Background\", \"Foreground\", \"Orphan\"",
            ));
        }
    };
    Ok(DeleteOptions {
        grace_period: value.int("gracePeriodSeconds"),
        uid: text("uid"),
        revision,
        propagation,
    })
}
