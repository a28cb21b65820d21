//! OpenAPI documents, as clients ask for them: by type, by hash, or not again.

use std::sync::LazyLock;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use minke_api::{Status, openapi};

use super::body::Body;
use super::negotiate;
use super::respond;
use super::route::Query;

/// Clients ask for `spec.v2@v1.0`, too, which is an older spelling.
const V2_PROTOBUF_OLD: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";

/// Hash of the document of version 2. The document itself is made when it is asked for: it is large, and
/// most clients never ask.
static V2_HASH: LazyLock<String> = LazyLock::new(|| openapi::hash(openapi::v2().as_bytes()));

pub fn v2(headers: &HeaderMap) -> Result<Response<Body>, Status> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("*/*");
    let protobuf = negotiate::clauses(accept).into_iter().find_map(|clause| match clause.media_type {
        V2_PROTOBUF_OLD => Some(true),
        openapi::V2_PROTOBUF => Some(true),
        "application/json" | "application/*" | "*/*" => Some(false),
        _ => None,
    });
    let Some(protobuf) = protobuf else {
        return Err(Status::not_acceptable(
            "application/json, application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
        ));
    };
    let etag = format!("\"{}{}\"", V2_HASH.as_str(), if protobuf { "P" } else { "" });
    let (content_type, make): (_, fn() -> Vec<u8>) = if protobuf {
        (openapi::V2_PROTOBUF, openapi::v2_protobuf)
    } else {
        ("application/json", || openapi::v2().into_bytes())
    };
    Ok(document(headers, &etag, content_type, make))
}

/// The index, and the documents that it names.
pub fn v3(path: &str, query: &Query, headers: &HeaderMap) -> Result<Response<Body>, Status> {
    let entries = openapi::v3_entries();
    let Some(name) = path.strip_prefix("/openapi/v3/") else {
        return Ok(respond::json(200, &openapi::v3_index(entries)));
    };
    let entry = entries.iter().find(|entry| entry.path == name).ok_or_else(Status::no_such_resource)?;
    if let Some(asked) = query.get("hash")
        && asked != entry.hash
    {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let to = format!("/openapi/v3/{}?hash={}", entry.path, entry.hash);
        response
            .headers_mut()
            .insert(header::LOCATION, HeaderValue::from_str(&to).map_err(Status::internal)?);
        return Ok(response);
    }
    let make = || openapi::v3(name).unwrap_or_default().into_bytes();
    let mut response = document(headers, &format!("\"{}\"", entry.hash), "application/json", make);
    if query.has("hash") {
        // The address changes with the document.
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
        let year = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(365 * 24);
        let expires = year.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        headers.insert(header::EXPIRES, HeaderValue::from_str(&expires).map_err(Status::internal)?);
    }
    Ok(response)
}

/// The document, compressed for those who take it; or that it has not changed.
fn document(
    headers: &HeaderMap,
    etag: &str,
    content_type: &'static str,
    make: impl FnOnce() -> Vec<u8>,
) -> Response<Body> {
    let etag = HeaderValue::from_str(etag).expect("hexadecimal digits are a header value");
    let known = headers.get(header::IF_NONE_MATCH) == Some(&etag);
    let gzip = headers
        .get(header::ACCEPT_ENCODING)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|codings| codings.split(',').any(|coding| coding.trim() == "gzip"));
    let mut response = if known {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else if gzip {
        let mut response = respond::bytes(200, content_type, Bytes::from(openapi::gzip(&make())));
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        response
    } else {
        respond::bytes(200, content_type, Bytes::from(make()))
    };
    let headers = response.headers_mut();
    headers.insert(header::ETAG, etag);
    headers.insert(header::VARY, HeaderValue::from_static("Accept, Accept-Encoding"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}
