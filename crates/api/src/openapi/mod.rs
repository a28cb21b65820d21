//! The OpenAPI documents of the built-in kinds, versions 2 and 3.
//!
//! The texts of the definitions are embedded compressed. A document is made from them and from the table of
//! kinds when it is asked for, and nothing of it stays in memory but the hashes that the index tells.

mod gnostic;
mod operations;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::sync::LazyLock;

use serde_json::{Value, json};
use sha2::{Digest, Sha512};

use crate::{KINDS, schema};
use operations::Form;

static DEFINITIONS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/definitions.deflate"));

/// The release that the API is of.
pub const VERSION: &str = "v1.37.0";

/// The media type of [`v2_protobuf`].
pub const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

const V3_REFERENCE: &str = "#/components/schemas/";

/// One document of version 3, as the index names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// `api/v1`, `apis/apps/v1`.
    pub path: String,
    /// Upper-case hexadecimal SHA-512 of the document; changes when the document does.
    pub hash: String,
}

/// The documents of version 3, by path. The first call makes all of them to know their hashes.
pub fn v3_entries() -> &'static [Entry] {
    static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| {
        let texts = Texts::load();
        let versions: BTreeSet<(&str, &str)> = KINDS.iter().map(|k| (k.group, k.version)).collect();
        let entry = |(group, version): (&str, &str)| Entry {
            path: path(group, version),
            hash: hash(texts.v3(group, version).as_bytes()),
        };
        versions.into_iter().map(entry).collect()
    });
    &ENTRIES
}

/// The body of `/openapi/v3` for `entries`: those of [`v3_entries`] and whatever has been added at run time.
pub fn v3_index<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Value {
    let paths: BTreeMap<&str, Value> = entries
        .into_iter()
        .map(|e| {
            (
                e.path.as_str(),
                json!({ "serverRelativeURL": format!("/openapi/v3/{}?hash={}", e.path, e.hash) }),
            )
        })
        .collect();
    json!({ "paths": paths })
}

/// The document of one group and version, such as `apis/apps/v1`, as JSON; `None` if none is built in.
pub fn v3(path: &str) -> Option<String> {
    let kind = KINDS.iter().find(|k| self::path(k.group, k.version) == path)?;
    Some(Texts::load().v3(kind.group, kind.version))
}

/// The document of version 2 as JSON.
pub fn v2() -> String {
    Texts::load().v2()
}

/// The document of version 2 as protobuf, which is the only form that older clients read.
pub fn v2_protobuf() -> Vec<u8> {
    let document: Value = serde_json::from_str(&v2()).expect("the document is JSON");
    gnostic::document(&document)
}

/// Upper-case hexadecimal SHA-512, for ETags and for the hashes of the index.
pub fn hash(document: &[u8]) -> String {
    Sha512::digest(document).iter().fold(String::with_capacity(128), |mut text, byte| {
        write!(text, "{byte:02X}").expect("a String can be written");
        text
    })
}

/// Compresses a document, to be kept or sent so.
pub fn gzip(document: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    out.write_all(document).and_then(|()| out.finish()).expect("a Vec can be written")
}

fn path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

/// The definitions, uncompressed for as long as a document is being made: name, a tab and JSON on each line.
struct Texts(String);

impl Texts {
    fn load() -> Texts {
        let mut text = String::new();
        let read = flate2::read::DeflateDecoder::new(DEFINITIONS).read_to_string(&mut text);
        read.expect("the embedded definitions are whole");
        Texts(text)
    }

    fn definitions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.lines().filter_map(|line| line.split_once('\t'))
    }

    fn v3(&self, group: &str, version: &str) -> String {
        let operations =
            operations::paths(Form::V3, |k| (k.group, k.version) == (group, version)).to_string();
        let all: BTreeMap<&str, &str> = self.definitions().collect();
        let own = schema::kinds().filter(|(g, v, ..)| (*g, *v) == (group, version)).map(|(.., ty)| ty.name());
        let mut wanted: Vec<&str> = references(&operations).chain(own).collect();
        let mut reached = BTreeMap::new();
        while let Some(name) = wanted.pop() {
            if let Some((name, text)) = all.get_key_value(name)
                && reached.insert(*name, *text).is_none()
            {
                wanted.extend(references(text));
            }
        }
        let schemas = object_text(reached.into_iter());
        let security = json!({ "BearerToken": security_scheme() });
        format!(
            r#"{{"openapi":"3.0.0","info":{},"paths":{operations},"components":{{"schemas":{schemas},"securitySchemes":{security}}}}}"#,
            info(),
        )
    }

    fn v2(&self) -> String {
        let operations = operations::paths(Form::V2, |_| true);
        let definitions = v2_text(&object_text(self.definitions()));
        let security = json!({ "BearerToken": security_scheme() });
        format!(
            r#"{{"swagger":"2.0","info":{},"paths":{operations},"definitions":{definitions},"securityDefinitions":{security},"security":[{{"BearerToken":[]}}]}}"#,
            info(),
        )
    }
}

fn info() -> Value {
    json!({ "title": "Kubernetes", "version": VERSION })
}

fn security_scheme() -> Value {
    json!({ "description": "Bearer Token authentication", "type": "apiKey", "name": "authorization", "in": "header" })
}

fn object_text<'a>(entries: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut out = String::from("{");
    for (name, text) in entries {
        let comma = if out.len() > 1 { "," } else { "" };
        write!(out, "{comma}\"{name}\":{text}").expect("a String can be written");
    }
    out + "}"
}

/// The names of the definitions that a text refers to.
fn references(text: &str) -> impl Iterator<Item = &str> {
    text.split(V3_REFERENCE).skip(1).map(|rest| rest.split('"').next().unwrap_or_default())
}

/// Definitions in the form of version 2. No description can hold what is looked for, whose quotes are bare.
fn v2_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut parts = text.split("\"allOf\":[{\"$ref\":\"#/components/schemas/");
    out.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let (name, rest) = part.split_once("\"}]").expect("a reference is closed");
        write!(out, "\"$ref\":\"#/definitions/{name}\"{rest}").expect("a String can be written");
    }
    out.replace(V3_REFERENCE, "#/definitions/")
        .replace(r#""oneOf":[{"type":"integer"},{"type":"string"}]"#, r#""type":"string""#)
        .replace(r#""oneOf":[{"type":"string"},{"type":"number"}]"#, r#""type":"string""#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_in_a_document_is_resolved_in_it() {
        for entry in v3_entries() {
            let text = v3(&entry.path).expect("the index names documents");
            assert_eq!(hash(text.as_bytes()), entry.hash);
            let document: Value = serde_json::from_str(&text).expect("JSON");
            for name in references(&text) {
                assert!(document["components"]["schemas"][name].is_object(), "{}: {name}", entry.path);
            }
        }
        let text = v2();
        let document: Value = serde_json::from_str(&text).expect("JSON");
        assert!(!text.contains(V3_REFERENCE) && !text.contains(r#""oneOf":["#));
        for name in
            text.split("#/definitions/").skip(1).map(|rest| rest.split('"').next().unwrap_or_default())
        {
            assert!(document["definitions"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn kubectl_finds_that_the_server_validates() {
        let document: Value = serde_json::from_str(&v3("apis/apps/v1").expect("a document")).expect("JSON");
        let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(
            patch["x-kubernetes-group-version-kind"],
            json!({"group": "apps", "kind": "Deployment", "version": "v1"})
        );
        assert!(
            patch["parameters"].as_array().is_some_and(|p| p.iter().any(|p| p["name"] == "fieldValidation"))
        );
        assert_eq!(patch["operationId"], "patchAppsV1NamespacedDeployment");
        let spec =
            &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(spec["x-kubernetes-list-map-keys"], json!(["name"]));
        assert_eq!(spec["x-kubernetes-patch-merge-key"], "name");
    }

    #[test]
    fn descriptions_explain() {
        let document: Value = serde_json::from_str(&v2()).expect("JSON");
        let deployment = &document["definitions"]["io.k8s.api.apps.v1.Deployment"];
        assert!(deployment["description"].as_str().is_some_and(|d| !d.is_empty()));
        assert_eq!(
            deployment["properties"]["spec"]["$ref"],
            "#/definitions/io.k8s.api.apps.v1.DeploymentSpec"
        );
        assert_eq!(
            document["definitions"]["io.k8s.apimachinery.pkg.util.intstr.IntOrString"]["type"],
            "string"
        );
    }

    #[test]
    fn the_index_names_documents_by_hash() {
        let entry = Entry { path: "api/v1".into(), hash: "AB".into() };
        assert_eq!(
            v3_index([&entry]),
            json!({"paths": {"api/v1": {"serverRelativeURL": "/openapi/v3/api/v1?hash=AB"}}})
        );
    }
}
