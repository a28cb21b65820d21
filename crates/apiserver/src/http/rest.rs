//! Requests for resources: from HTTP to a call of the registry, and back.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http::header::{self, HeaderMap};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use minke_api::codec::{self, Decoded, protobuf};
use minke_api::{FieldErrors, FieldSelector, Kind, LabelSelector, Revision, Status, schema};
use minke_client::DeleteOptions;
use serde_json::Value;

use super::Server;
use super::body::{Body, Payload};
use super::respond::{self, Style};
use super::route::{Query, Route};
use super::watch;
use crate::UserInfo;
use crate::kinds::tree::Tree;
use crate::registry::{self, Call, ListQuery, Match, Patch, Registry, Validation, WatchQuery, Written};

/// Longest request body, in bytes.
const BODY_MAX: usize = 3 << 20;
/// Longest time that a watch may ask for.
const WATCH_SECONDS_MAX: u64 = 24 * 60 * 60;

const PATCH_TYPES: &str =
    "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json";
const BODY_TYPES: &str = "application/json, application/yaml, application/vnd.kubernetes.protobuf";

/// A request for a resource, after authorization.
pub struct Request<'a> {
    pub server: &'a Arc<Server>,
    pub route: &'a Route,
    pub verb: &'static str,
    pub query: &'a Query,
    pub user: &'a UserInfo,
    pub headers: &'a HeaderMap,
}

impl Request<'_> {
    /// The row of the resource, if this request may go to it at all.
    pub fn kind(&self) -> Result<&'static Kind, Status> {
        let route = self.route;
        let kind = route.kind().ok_or_else(Status::no_such_resource)?;
        let in_namespace = !route.namespace.is_empty() && kind.kind != "Namespace";
        if in_namespace && !kind.namespaced || kind.namespaced && !in_namespace && !route.name.is_empty() {
            return Err(Status::no_such_resource());
        }
        if route.subresource.is_empty() {
            let everywhere_only_read =
                kind.namespaced && !in_namespace && !matches!(self.verb, "list" | "watch");
            let of_collection = matches!(self.verb, "create" | "list" | "deletecollection");
            let wrong_level = self.verb != "watch" && of_collection != route.name.is_empty();
            if !kind.has_verb(self.verb) || everywhere_only_read || wrong_level {
                return Err(Status::method_not_allowed());
            }
        } else {
            let sub = kind.subresource(&route.subresource).ok_or_else(Status::no_such_resource)?;
            if !route.rest.is_empty() && sub.name != "proxy" {
                return Err(Status::no_such_resource());
            }
            if !sub.verbs.contains(&self.verb) {
                return Err(Status::method_not_allowed());
            }
        }
        Ok(kind)
    }

    pub async fn answer(&self, kind: &'static Kind, body: Payload) -> Result<Response<Body>, Status> {
        let mut response = self.answer_with(kind, body).await?;
        if let Some(warning) = deprecation(kind) {
            respond::warn(&mut response, &[warning.to_owned()]);
        }
        Ok(response)
    }

    async fn answer_with(&self, kind: &'static Kind, body: Payload) -> Result<Response<Body>, Status> {
        let registry = &self.server.registry;
        let style = Style::of(self.headers, self.query, registry.clock.now())?;
        let call = Call {
            user: self.user,
            kind,
            namespace: if kind.namespaced { &self.route.namespace } else { "" },
            name: &self.route.name,
            subresource: &self.route.subresource,
            dry_run: false,
            validation: Validation::Ignore,
        };
        match self.verb {
            "get" => {
                // A get is of the newest state unless it asks for a future one.
                if let Some(revision) = revision(self.query)? {
                    registry.not_older_than(revision).await?;
                }
                respond::object(200, &registry.get(&call).await?, &style)
            }
            "list" => {
                let page = registry.list(&call, &self.list_query(kind)?).await?;
                respond::list(kind, page, &style)
            }
            "watch" => self.watch(&call, &style).await,
            "create" => {
                let call = self.writing(call, "CreateOptions")?;
                let expected = body_kind(&call);
                let body = self.decoded(&expected, body).await?;
                if Registry::is_posted(kind, call.subresource) {
                    let mut warnings = Vec::new();
                    let (code, answer) = registry.post(&call, body, &mut warnings).await?;
                    let type_kind = if answer.text("kind") == "Status" { "Status" } else { expected.kind };
                    let mut response = respond::value(code, kind, type_kind, &answer, &style)?;
                    respond::warn(&mut response, &warnings);
                    return Ok(response);
                }
                self.written(registry.create(&call, body).await?, &style)
            }
            "update" => {
                let call = self.writing(call, "UpdateOptions")?;
                let body = self.decoded(&body_kind(&call), body).await?;
                self.written(registry.update_part(&call, body).await?, &style)
            }
            "patch" => {
                let call = self.writing(call, "PatchOptions")?;
                let patch = self.patch(body).await?;
                self.written(registry.patch(&call, &patch).await?, &style)
            }
            "delete" => {
                let (options, dry_run) = self.delete_options(body).await?;
                let deleted = registry.delete(&Call { dry_run, ..call }, &options).await?;
                let shows_object = crate::strategy::strategy(kind.storage()).returns_deleted;
                if !deleted.gone || shows_object {
                    return respond::object(200, &deleted.object, &style);
                }
                let object = &deleted.object;
                Ok(respond::status(&Status::deleted(kind, object.name(), object.uid())))
            }
            "deletecollection" => {
                let (options, dry_run) = self.delete_options(body).await?;
                let call = Call { dry_run, ..call };
                let query = self.list_query(kind)?;
                respond::list(kind, registry.delete_collection(&call, &query, &options).await?, &style)
            }
            _ => Err(Status::method_not_allowed()),
        }
    }

    fn written(&self, written: Written, style: &Style) -> Result<Response<Body>, Status> {
        let mut response = respond::object(if written.created { 201 } else { 200 }, &written.object, style)?;
        respond::warn(&mut response, &written.warnings);
        Ok(response)
    }

    async fn watch(&self, call: &Call<'_>, style: &Style) -> Result<Response<Body>, Status> {
        let list = list_query(self.query, call.kind, true)?;
        let mut fields = list.fields;
        if !call.name.is_empty() {
            // The old form with the name in the path.
            fields = FieldSelector::name(call.name);
        }
        let initial = self.query.bool("sendInitialEvents");
        let bookmarks = self.query.flag("allowWatchBookmarks");
        let query = WatchQuery { labels: list.labels, fields, revision: list.revision, initial, bookmarks };
        let timeout = match self.query.get("timeoutSeconds") {
            None => None,
            Some(text) => {
                let seconds: u64 = text.parse().map_err(|_| {
                    Status::bad_request(format!("timeoutSeconds: {text:?} is not a number of seconds"))
                })?;
                // Zero is what clients send who have no wish.
                (seconds > 0).then(|| Duration::from_secs(seconds.min(WATCH_SECONDS_MAX)))
            }
        };
        let feed = self.server.registry.watch(&Call { name: "", ..*call }, &query).await;
        let options = watch::Options {
            bookmarks,
            timeout,
            stop: self.server.stop_watches.clone(),
            clock: self.server.registry.clock,
            gauge: self.server.metrics.watch(),
        };
        watch::response(call.kind, feed, style, options)
    }

    fn list_query(&self, kind: &'static Kind) -> Result<ListQuery, Status> {
        list_query(self.query, kind, false)
    }

    /// The call with the options that all writes have. `options` names their kind in messages.
    fn writing<'a>(&self, call: Call<'a>, options: &'static str) -> Result<Call<'a>, Status> {
        let mut errors = FieldErrors::default();
        let dry_run = self.dry_run(self.query.all("dryRun"), &mut errors);
        let validation = match self.query.get("fieldValidation") {
            None | Some("Warn") => Validation::Warn,
            Some("Strict") => Validation::Strict,
            Some("Ignore") => Validation::Ignore,
            Some(other) => {
                errors.not_supported("fieldValidation", other, &["Ignore", "Strict", "Warn"]);
                Validation::Warn
            }
        };
        if self.query.get("fieldManager").is_some_and(|manager| manager.len() > 128) {
            errors.too_long("fieldManager", 128);
        }
        errors.into_result(&options_kind(options), "")?;
        Ok(Call { dry_run, validation, ..call })
    }

    fn dry_run<'q>(&self, given: impl Iterator<Item = &'q str>, errors: &mut FieldErrors) -> bool {
        let mut dry_run = false;
        for value in given {
            match value {
                "All" => dry_run = true,
                "" => {}
                other => errors.not_supported("dryRun", other, &["All"]),
            }
        }
        dry_run
    }

    /// DeleteOptions from the body or, without one, from the query.
    async fn delete_options(&self, body: Payload) -> Result<(DeleteOptions, bool), Status> {
        let bytes = read(body).await?;
        let mut errors = FieldErrors::default();
        let value = if bytes.is_empty() {
            let mut value = Value::Object(serde_json::Map::new());
            if let Some(seconds) = self.query.get("gracePeriodSeconds") {
                let seconds: i64 = seconds.parse().map_err(|_| {
                    Status::bad_request(format!("gracePeriodSeconds: {seconds:?} is not a number"))
                })?;
                value.set("gracePeriodSeconds", seconds);
            }
            if let Some(orphan) = self.query.bool("orphanDependents") {
                value.set("orphanDependents", orphan);
            }
            if let Some(policy) = self.query.get("propagationPolicy") {
                value.set("propagationPolicy", policy);
            }
            value
        } else {
            let mut value = decode(self.headers, &bytes, DELETE_OPTIONS)?.value;
            if let Some(ty) = schema::of("", "v1", "DeleteOptions") {
                schema::conform(ty, &mut value)
                    .map_err(|error| DELETE_OPTIONS.refuse("DeleteOptions", error))?;
            }
            value
        };
        let in_body: Vec<&str> = value.items("dryRun").iter().filter_map(Value::as_str).collect();
        let dry_run = self.dry_run(self.query.all("dryRun").chain(in_body), &mut errors);
        errors.into_result(&options_kind("DeleteOptions"), "")?;
        Ok((registry::delete_options(&value)?, dry_run))
    }

    async fn patch(&self, body: Payload) -> Result<Patch, Status> {
        let patch: fn(registry::Body) -> Patch = match media_type(self.headers) {
            "application/json-patch+json" => Patch::Json,
            "application/merge-patch+json" => Patch::Merge,
            "application/strategic-merge-patch+json" => Patch::Strategic,
            _ => return Err(Status::unsupported_media_type(PATCH_TYPES)),
        };
        let bytes = read(body).await?;
        let Decoded { value, duplicates } =
            codec::json::decode(&bytes).map_err(|error| Status::bad_request(error.0))?;
        Ok(patch(registry::Body { value, duplicates }))
    }

    async fn decoded(
        &self,
        expected: &registry::Expected<'_>,
        body: Payload,
    ) -> Result<registry::Body, Status> {
        let bytes = read(body).await?;
        decode(self.headers, &bytes, *expected)
    }
}

const DELETE_OPTIONS: registry::Expected<'static> =
    registry::Expected { group: "", version: "v1", kind: "DeleteOptions" };

fn revision(query: &Query) -> Result<Option<Revision>, Status> {
    let Some(text) = query.get("resourceVersion") else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        let mut status = Status::failure(
            422,
            "Invalid",
            format!(" \"\" is invalid: resourceVersion: Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"),
        );
        status = status.with_cause(
            "FieldValueInvalid",
            format!("Invalid value: {text:?}: strconv.ParseUint: parsing {text:?}: invalid syntax"),
            "resourceVersion",
        );
        status
    })
}

/// The options of a list or watch, and whether they go together.
pub fn list_query(query: &Query, kind: &'static Kind, watch: bool) -> Result<ListQuery, Status> {
    let labels = LabelSelector::parse(query.get("labelSelector").unwrap_or_default())
        .map_err(|error| Status::bad_request(error.0))?;
    let fields = FieldSelector::parse(kind, query.get("fieldSelector").unwrap_or_default())
        .map_err(|error| Status::bad_request(error.0))?;
    let limit = match query.get("limit") {
        None => 0,
        // A negative limit is none.
        Some(text) => text
            .parse::<i64>()
            .map(|limit| limit.max(0) as usize)
            .map_err(|_| Status::bad_request(format!("limit: {text:?} is not a number")))?,
    };
    let revision = revision(query)?;
    let continue_ = query.get("continue").map(str::to_owned);
    let asked = query.get("resourceVersionMatch");
    let match_ = match asked {
        Some("Exact") => Some(Match::Exact),
        Some("NotOlderThan") => Some(Match::NotOlderThan),
        _ => None,
    };
    let mut errors = FieldErrors::default();
    let initial = query.has("sendInitialEvents");
    let forbid = |errors: &mut FieldErrors, why: &str| errors.forbidden("resourceVersionMatch", why);
    if watch {
        if initial && match_ != Some(Match::NotOlderThan) {
            forbid(&mut errors, "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan");
        }
        if asked.is_some() && !initial {
            forbid(
                &mut errors,
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            );
        }
        if asked.is_some() && match_ != Some(Match::NotOlderThan) {
            errors.not_supported("resourceVersionMatch", asked.unwrap_or_default(), &["NotOlderThan"]);
        }
    } else {
        if initial {
            errors.forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list");
        }
        if asked.is_some() && revision.is_none() {
            forbid(&mut errors, "resourceVersionMatch is forbidden unless resourceVersion is provided");
        }
        if asked.is_some() && match_.is_none() {
            errors.not_supported(
                "resourceVersionMatch",
                asked.unwrap_or_default(),
                &["Exact", "NotOlderThan", ""],
            );
        }
        if match_ == Some(Match::Exact) && revision == Some(Revision(0)) {
            forbid(&mut errors, "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"");
        }
    }
    if asked.is_some() && continue_.is_some() {
        forbid(&mut errors, "resourceVersionMatch is forbidden when continue is provided");
    }
    errors.into_result(&options_kind("ListOptions"), "")?;
    if continue_.is_some() && revision.is_some_and(|revision| revision.0 > 0) {
        return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
    }
    Ok(ListQuery { labels, fields, limit, continue_, revision, match_ })
}

/// What those are told who still use a resource that has a successor.
fn deprecation(kind: &Kind) -> Option<&'static str> {
    match (kind.group, kind.kind) {
        ("", "Endpoints") => {
            Some("v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice")
        }
        ("", "ComponentStatus") => Some("v1 ComponentStatus is deprecated in v1.19+"),
        _ => None,
    }
}

/// What a body that is sent to the call holds.
fn body_kind<'a>(call: &Call<'a>) -> registry::Expected<'a> {
    let object = registry::Expected::object(call.kind);
    match call.kind.subresource(call.subresource).filter(|sub| !sub.kind.is_empty()) {
        None => object,
        Some(sub) => {
            let (group, version) = sub.group_version.unwrap_or((object.group, object.version));
            registry::Expected { group, version, kind: sub.kind }
        }
    }
}

/// Options are named in messages as if they were a resource.
const fn options_kind(kind: &'static str) -> Kind {
    registry::unlisted("meta.k8s.io", kind)
}

/// The media type of the body, without parameters.
fn media_type(headers: &HeaderMap) -> &str {
    let text = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim()
}

async fn read(body: Payload) -> Result<Bytes, Status> {
    match Limited::new(body, BODY_MAX).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Status::too_large(format!("Request entity too large: limit is {BODY_MAX}")))
        }
        Err(error) => Err(Status::bad_request(format!("the body could not be read: {error}"))),
    }
}

fn decode(
    headers: &HeaderMap,
    bytes: &[u8],
    expected: registry::Expected<'_>,
) -> Result<registry::Body, Status> {
    let unrecognized = |error: String| {
        Status::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): {error} ({})",
            expected.kind,
            summary(bytes)
        ))
    };
    let decoded = match media_type(headers) {
        "" | "application/json" => codec::json::decode(bytes)
            .map_err(|error| unrecognized(format!("couldn't get version/kind; json parse error: {error}")))?,
        "application/yaml" | "application/x-yaml" | "text/yaml" => codec::yaml::decode(bytes)
            .map_err(|error| unrecognized(format!("couldn't get version/kind; yaml parse error: {error}")))?,
        "application/vnd.kubernetes.protobuf" => {
            let ty = schema::of(expected.group, expected.version, expected.kind);
            let value = protobuf::decode(bytes, ty).map_err(|error| unrecognized(error.0))?;
            Decoded { value, duplicates: Vec::new() }
        }
        _ => return Err(Status::unsupported_media_type(BODY_TYPES)),
    };
    Ok(registry::Body { value: decoded.value, duplicates: decoded.duplicates })
}

/// The beginning of a body that could not be read: text, or hexadecimal digits.
fn summary(bytes: &[u8]) -> String {
    const SHOWN: usize = 30;
    let cut = &bytes[..bytes.len().min(SHOWN)];
    let dots = if bytes.len() > SHOWN { " ..." } else { "" };
    match bytes.first() {
        None => "<empty>".to_owned(),
        Some(b'{') => String::from_utf8_lossy(cut).into_owned() + dots,
        Some(_) => cut.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + dots,
    }
}
