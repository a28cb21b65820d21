//! Discovery: which groups, versions and resources there are, in the old form and the aggregated one.
//!
//! All of it is read from the table of kinds, and made once.

use std::collections::HashMap;
use std::sync::LazyLock;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Response, StatusCode};
use minke_api::{KINDS, Kind, Status, Subresource};
use serde_json::{Value, json};
use sha2::{Digest, Sha512};

use super::body::Body;
use super::negotiate;
use super::respond;

/// A document and its ETag.
struct Document {
    body: Bytes,
    etag: HeaderValue,
}

struct Documents {
    legacy: HashMap<String, Document>,
    /// By path, in version 2 and version 2beta1.
    aggregated: HashMap<(&'static str, &'static str), Document>,
}

static DOCUMENTS: LazyLock<Documents> = LazyLock::new(Documents::make);

/// The discovery document of `path` (without a trailing slash), if it is one.
pub fn answer(path: &str, headers: &HeaderMap) -> Option<Result<Response<Body>, Status>> {
    let documents = &*DOCUMENTS;
    let legacy = documents.legacy.get(path)?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !matches!(path, "/api" | "/apis") {
        return Some(found(legacy, "application/json", headers));
    }
    for clause in negotiate::clauses(accept) {
        let aggregated = clause.parameter("g") == Some("apidiscovery.k8s.io")
            && clause.parameter("as") == Some("APIGroupDiscoveryList");
        match (clause.media_type, clause.parameter("v"), aggregated) {
            ("application/json", Some("v2"), true) => {
                let document = &documents.aggregated[&(if path == "/api" { "/api" } else { "/apis" }, "v2")];
                let of = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
                return Some(found(document, of, headers));
            }
            ("application/json", Some("v2beta1"), true) => {
                let document =
                    &documents.aggregated[&(if path == "/api" { "/api" } else { "/apis" }, "v2beta1")];
                let of = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList";
                return Some(found(document, of, headers));
            }
            ("application/json" | "application/*" | "*/*", _, false) => break,
            _ => {}
        }
    }
    Some(found(legacy, "application/json", headers))
}

fn found(
    document: &Document,
    content_type: &'static str,
    headers: &HeaderMap,
) -> Result<Response<Body>, Status> {
    let known = headers.get(header::IF_NONE_MATCH) == Some(&document.etag);
    let body = if known { Bytes::new() } else { document.body.clone() };
    let mut response = respond::bytes(200, content_type, body);
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response.headers_mut().remove(header::CONTENT_TYPE);
    }
    let headers = response.headers_mut();
    headers.insert(header::ETAG, document.etag.clone());
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
    Ok(response)
}

impl Document {
    fn new(value: &Value) -> Document {
        let body = Bytes::from(serde_json::to_vec(value).expect("values serialise"));
        let hash: String = Sha512::digest(&body).iter().map(|byte| format!("{byte:02X}")).collect();
        let etag =
            HeaderValue::from_str(&format!("\"{hash}\"")).expect("hexadecimal digits are a header value");
        Document { body, etag }
    }
}

/// A group and its versions, in the order of the table.
struct Group {
    name: &'static str,
    versions: Vec<&'static str>,
}

fn groups() -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for kind in KINDS {
        let at = groups.iter().position(|group| group.name == kind.group).unwrap_or_else(|| {
            groups.push(Group { name: kind.group, versions: Vec::new() });
            groups.len() - 1
        });
        if !groups[at].versions.contains(&kind.version) {
            groups[at].versions.push(kind.version);
        }
    }
    groups
}

fn kinds_of(group: &'static str, version: &'static str) -> impl Iterator<Item = &'static Kind> {
    let mut kinds: Vec<&'static Kind> =
        KINDS.iter().filter(|kind| kind.group == group && kind.version == version).collect();
    kinds.sort_by_key(|kind| kind.plural);
    kinds.into_iter()
}

impl Documents {
    fn make() -> Documents {
        let groups = groups();
        let mut legacy = HashMap::new();
        let core: Vec<&str> =
            groups.iter().filter(|g| g.name.is_empty()).flat_map(|g| g.versions.clone()).collect();
        legacy.insert(
            "/api".to_owned(),
            Document::new(
                &json!({"kind": "APIVersions", "versions": core, "serverAddressByClientCIDRs": []}),
            ),
        );
        let named: Vec<Value> = groups.iter().filter(|group| !group.name.is_empty()).map(api_group).collect();
        legacy.insert(
            "/apis".to_owned(),
            Document::new(&json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": named})),
        );
        for group in &groups {
            for version in &group.versions {
                legacy.insert(path(group.name, version), Document::new(&resource_list(group.name, version)));
            }
            if !group.name.is_empty() {
                let mut document = api_group(group);
                document["kind"] = "APIGroup".into();
                document["apiVersion"] = "v1".into();
                legacy.insert(format!("/apis/{}", group.name), Document::new(&document));
            }
        }
        let mut aggregated = HashMap::new();
        for version in ["v2", "v2beta1"] {
            for at in ["/api", "/apis"] {
                let items: Vec<Value> = groups
                    .iter()
                    .filter(|g| g.name.is_empty() == (at == "/api"))
                    .map(group_discovery)
                    .collect();
                let document = json!({
                    "kind": "APIGroupDiscoveryList",
                    "apiVersion": format!("apidiscovery.k8s.io/{version}"),
                    "metadata": {},
                    "items": items,
                });
                aggregated.insert((at, version), Document::new(&document));
            }
        }
        Documents { legacy, aggregated }
    }
}

fn path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") }
}

fn api_group(group: &Group) -> Value {
    let version =
        |version: &&str| json!({"groupVersion": format!("{}/{version}", group.name), "version": version});
    json!({
        "name": group.name,
        "versions": group.versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": version(&group.versions[0]),
    })
}

fn resource_list(group: &'static str, version: &'static str) -> Value {
    let mut resources = Vec::new();
    for kind in kinds_of(group, version) {
        let mut entry = json!({
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": kind.verbs,
        });
        add_names(&mut entry, kind);
        if !kind.storage_version_hash.is_empty() {
            entry["storageVersionHash"] = kind.storage_version_hash.into();
        }
        resources.push(entry);
        for sub in kind.subresources {
            let mut entry = json!({
                "name": format!("{}/{}", kind.plural, sub.name),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": sub_kind(kind, sub),
                "verbs": sub.verbs,
            });
            if let Some((group, version)) = sub.group_version {
                entry["group"] = group.into();
                entry["version"] = version.into();
            }
            resources.push(entry);
        }
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let mut list = json!({"kind": "APIResourceList", "groupVersion": group_version, "resources": resources});
    if !group.is_empty() {
        list["apiVersion"] = "v1".into();
    }
    list
}

fn add_names(entry: &mut Value, kind: &Kind) {
    if !kind.short.is_empty() {
        entry["shortNames"] = kind.short.into();
    }
    if !kind.categories.is_empty() {
        entry["categories"] = kind.categories.into();
    }
}

fn sub_kind(kind: &Kind, sub: &Subresource) -> &'static str {
    if sub.kind.is_empty() { kind.kind } else { sub.kind }
}

fn group_discovery(group: &Group) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|version| {
            let resources: Vec<Value> = kinds_of(group.name, version).map(resource_discovery).collect();
            json!({"version": version, "freshness": "Current", "resources": resources})
        })
        .collect();
    let mut metadata = json!({"creationTimestamp": null});
    if !group.name.is_empty() {
        metadata["name"] = group.name.into();
    }
    json!({"metadata": metadata, "versions": versions})
}

fn resource_discovery(kind: &'static Kind) -> Value {
    let response =
        |group: &str, version: &str, name: &str| json!({"group": group, "version": version, "kind": name});
    let mut entry = json!({
        "resource": kind.plural,
        "responseKind": response(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    add_names(&mut entry, kind);
    let subresources: Vec<Value> = kind
        .subresources
        .iter()
        .map(|sub| {
            let (group, version) = sub.group_version.unwrap_or((kind.group, kind.version));
            json!({
                "subresource": sub.name,
                "responseKind": response(group, version, sub_kind(kind, sub)),
                "verbs": sub.verbs,
            })
        })
        .collect();
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str, accept: &'static str, etag: Option<HeaderValue>) -> (u16, HeaderMap, Value) {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        if let Some(etag) = etag {
            headers.insert(header::IF_NONE_MATCH, etag);
        }
        let response = answer(path, &headers).unwrap().unwrap();
        let (parts, body) = response.into_parts();
        (parts.status.as_u16(), parts.headers, serde_json::from_slice(&body.whole()).unwrap_or_default())
    }

    #[test]
    fn the_old_form_lists_versions_groups_and_resources() {
        let json = "application/json";
        assert_eq!(get("/api", json, None).2["versions"], json!(["v1"]));
        let groups = get("/apis", json, None).2;
        assert_eq!(groups["groups"][0]["name"], "apps");
        let autoscaling = get("/apis/autoscaling", json, None).2;
        assert_eq!(autoscaling["preferredVersion"]["version"], "v2");
        assert_eq!(autoscaling["versions"][1]["groupVersion"], "autoscaling/v1");
        let apps = get("/apis/apps/v1", json, None).2;
        let scale =
            apps["resources"].as_array().unwrap().iter().find(|r| r["name"] == "deployments/scale").unwrap();
        assert_eq!((&scale["kind"], &scale["group"]), (&json!("Scale"), &json!("autoscaling")));
        assert!(answer("/apis/none", &HeaderMap::new()).is_none());
    }

    #[test]
    fn the_aggregated_form_is_served_to_those_who_ask() {
        const V2: &str =
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        let (code, headers, body) = get("/api", V2, None);
        assert_eq!((code, &body["apiVersion"]), (200, &json!("apidiscovery.k8s.io/v2")));
        assert_eq!(
            headers[header::CONTENT_TYPE],
            "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
        );
        let pods = body["items"][0]["versions"][0]["resources"].as_array().unwrap();
        assert!(pods.iter().any(|r| r["resource"] == "pods" && r["scope"] == "Namespaced"));
        let (code, _, _) = get("/api", V2, Some(headers[header::ETAG].clone()));
        assert_eq!(code, 304);
        let (_, headers, body) = get(
            "/apis",
            "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json",
            None,
        );
        assert_eq!(body["apiVersion"], "apidiscovery.k8s.io/v2beta1");
        assert_ne!(headers[header::ETAG], get("/apis", "application/json", None).1[header::ETAG]);
    }
}
