//! Answers: the headers and bodies that go with objects, lists and errors.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use jiff::Timestamp;
use minke_api::codec::protobuf;
use minke_api::{Kind, Object, Status, schema};
use serde::Serialize;
use serde_json::Value;

use super::body::{Body, List};
use super::negotiate::{Accepted, Encoding, View};
use super::route::Query;
use crate::registry::Page;
use crate::views::{self, Include, ListMeta, Tables};

/// Bodies from this size on are compressed for those who take it.
const GZIP_FROM: u64 = 128 << 10;
/// All warnings of an answer together, in bytes.
const WARNINGS_MAX: usize = 4096;

const WARNING: HeaderName = header::WARNING;

/// How the answers to a request are to look.
#[derive(Debug, Clone)]
pub struct Style {
    pub accepted: Accepted,
    pub pretty: bool,
    pub include: Include,
    pub gzip: bool,
    pub now: Timestamp,
}

impl Style {
    pub fn of(headers: &HeaderMap, query: &Query, now: Timestamp) -> Result<Style, Status> {
        let text = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let accepted = super::negotiate::negotiate(text(header::ACCEPT)).ok_or_else(not_acceptable)?;
        let for_eyes =
            || ["curl", "Wget", "Mozilla"].iter().any(|agent| text(header::USER_AGENT).starts_with(agent));
        let pretty = query.bool("pretty").unwrap_or_else(for_eyes);
        let include = match query.get("includeObject") {
            None | Some("Metadata") => Include::Metadata,
            Some("None") => Include::None,
            Some("Object") => Include::Object,
            Some(other) => {
                return Err(Status::bad_request(format!(
                    "unrecognized includeObject value: {other:?}, must be one of None, Metadata, Object"
                )));
            }
        };
        let gzip = text(header::ACCEPT_ENCODING).split(',').any(|coding| {
            let mut parts = coding.split(';').map(str::trim);
            parts.next() == Some("gzip") && !parts.any(|p| matches!(p, "q=0" | "q=0.0"))
        });
        Ok(Style { accepted, pretty, include, gzip, now })
    }

    pub fn tables(&self, kind: &'static Kind, version: &str) -> Tables {
        Tables { kind, version: version.to_owned(), include: self.include }
    }
}

pub fn not_acceptable() -> Status {
    Status::not_acceptable("application/json, application/yaml, application/vnd.kubernetes.protobuf")
}

/// An answer with a body that is there already.
pub fn bytes(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Full(body.into()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub fn json(code: u16, value: &impl Serialize) -> Response<Body> {
    bytes(code, "application/json", serde_json::to_vec(value).expect("answers serialise"))
}

/// A `Status`, under the code that it says.
pub fn status(status: &Status) -> Response<Body> {
    let mut response = json(if status.code == 0 { 200 } else { status.code }, status);
    let retry = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    if retry > 0 {
        response.headers_mut().insert(header::RETRY_AFTER, retry.into());
    }
    response
}

/// An object in the form that was asked for.
pub fn object(code: u16, object: &Arc<Object>, style: &Style) -> Result<Response<Body>, Status> {
    let one = std::slice::from_ref(object);
    let meta = ListMeta { revision: object.revision(), ..ListMeta::default() };
    let body: Bytes = match &style.accepted.view {
        View::Object if style.accepted.encoding == Encoding::Protobuf => {
            return protobuf_of(code, object.kind(), object.kind().kind, &object.value());
        }
        View::Object => object.json().clone(),
        View::Table(version) => {
            style.tables(object.kind(), version).table(one, &meta, true, style.now).into()
        }
        View::Partial(version) => views::partial(object, version).into(),
    };
    Ok(finish(code, body, style))
}

/// A value that is no object of the store, in the form that was asked for.
pub fn value(
    code: u16,
    kind: &Kind,
    type_name: &str,
    value: &Value,
    style: &Style,
) -> Result<Response<Body>, Status> {
    match (&style.accepted.view, style.accepted.encoding) {
        (View::Object, Encoding::Protobuf) => protobuf_of(code, kind, type_name, value),
        (View::Object, _) => {
            Ok(finish(code, serde_json::to_vec(value).expect("values serialise").into(), style))
        }
        _ => Err(not_acceptable()),
    }
}

/// A list in the form that was asked for.
pub fn list(kind: &'static Kind, page: Page, style: &Style) -> Result<Response<Body>, Status> {
    let meta = ListMeta { revision: page.revision, continue_: page.continue_, remaining: page.remaining };
    let body: Bytes = match &style.accepted.view {
        View::Object => {
            let head = views::list_head(kind, &meta);
            let list = Body::List(List::new(head.into(), page.items, views::type_prefix(kind)));
            if !style.pretty && style.accepted.encoding != Encoding::Protobuf {
                let mut response = bytes(200, style.accepted.content_type(), Bytes::new());
                *response.body_mut() = list;
                return Ok(compressed(response, style));
            }
            let body = list.whole();
            if style.accepted.encoding == Encoding::Protobuf {
                let value: Value = serde_json::from_slice(&body).map_err(Status::internal)?;
                return protobuf_of(200, kind, &format!("{}List", kind.kind), &value);
            }
            body
        }
        View::Table(version) => style.tables(kind, version).table(&page.items, &meta, true, style.now).into(),
        View::Partial(version) => views::partial_list(&page.items, version, &meta).into(),
    };
    Ok(finish(200, body, style))
}

/// Sends bytes of JSON, indented for those who read it with their eyes.
fn finish(code: u16, body: Bytes, style: &Style) -> Response<Body> {
    let body = if style.pretty { indented(&body) } else { body };
    compressed(bytes(code, style.accepted.content_type(), body), style)
}

fn indented(json: &[u8]) -> Bytes {
    let value: Value = serde_json::from_slice(json).expect("answers are JSON");
    let mut out = serde_json::to_vec_pretty(&value).expect("values serialise");
    out.push(b'\n');
    out.into()
}

fn compressed(mut response: Response<Body>, style: &Style) -> Response<Body> {
    if !style.gzip || response.body().len().is_none_or(|len| len < GZIP_FROM) {
        return response;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    headers.append(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    response.map(Body::gzip)
}

fn protobuf_of(code: u16, kind: &Kind, type_name: &str, value: &Value) -> Result<Response<Body>, Status> {
    let ty = schema::of(kind.group, kind.version, type_name).filter(|ty| !ty.proto().is_empty());
    let ty = ty.ok_or_else(not_acceptable)?;
    Ok(bytes(code, "application/vnd.kubernetes.protobuf", protobuf::encode(ty, value)))
}

/// Adds one header for each warning, each of them once.
pub fn warn(response: &mut Response<Body>, warnings: &[String]) {
    let mut room = WARNINGS_MAX;
    let mut seen: Vec<&str> = Vec::new();
    for warning in warnings {
        if seen.contains(&warning.as_str()) {
            continue;
        }
        seen.push(warning);
        let text: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = format!("299 - \"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let Some(left) = room.checked_sub(quoted.len()) else { return };
        room = left;
        if let Ok(value) = HeaderValue::from_bytes(quoted.as_bytes()) {
            response.headers_mut().append(WARNING, value);
        }
    }
}
