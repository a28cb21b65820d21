//! Writes `definitions.deflate`: the text of every OpenAPI definition, one a line: name, a tab, JSON.
//! The JSON is in the form of OpenAPI v3; the library derives the documents of both versions from it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use flate2::{Compression, write::DeflateEncoder};
use serde_json::{Map, Value, json};

use crate::definitions::Gvk;
use crate::facts::{Facts, Merge};

pub fn write(
    out: &Path,
    definitions: &BTreeMap<String, Value>,
    roots: &BTreeMap<Gvk, String>,
    facts: &Facts,
) {
    let file = std::fs::File::create(out.join("definitions.deflate")).expect("OUT_DIR can be written");
    let mut file = DeflateEncoder::new(file, Compression::new(7));
    for (name, schema) in definitions {
        let mut schema = convert(schema);
        annotate(name, &mut schema, facts);
        let kinds: Vec<Value> = roots
            .iter()
            .filter(|(_, definition)| *definition == name)
            .map(|((group, version, kind), _)| json!({ "group": group, "kind": kind, "version": version }))
            .collect();
        if !kinds.is_empty() {
            schema["x-kubernetes-group-version-kind"] = Value::Array(kinds);
            optional_metadata(&mut schema);
        }
        writeln!(file, "{name}\t{schema}").expect("OUT_DIR can be written");
    }
    file.finish().expect("OUT_DIR can be written");
}

/// The crate's types always have metadata, but clients need not send any.
fn optional_metadata(schema: &mut Value) {
    let Some(required) = schema.get_mut("required").and_then(Value::as_array_mut) else { return };
    required.retain(|name| name != "metadata");
    if required.is_empty() {
        schema.as_object_mut().expect("a schema is an object").remove("required");
    }
}

/// In OpenAPI v3 nothing may stand beside `$ref`, so a described reference becomes an `allOf` of one.
fn convert(schema: &Value) -> Value {
    let mut out = Map::new();
    for (key, value) in schema.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("$ref", _) => {}
            // Upstream leaves unions without a form.
            ("x-kubernetes-int-or-string" | "oneOf", _) => {}
            ("properties", Value::Object(fields)) => {
                let fields = fields.iter().map(|(name, field)| (name.clone(), convert(field))).collect();
                out.insert(key.clone(), Value::Object(fields));
            }
            ("items" | "additionalProperties", Value::Object(_)) => {
                out.insert(key.clone(), convert(value));
            }
            _ => {
                out.insert(key.clone(), value.clone());
            }
        }
    }
    if let Some(name) = schema["$ref"].as_str().and_then(|r| r.strip_prefix("#/definitions/")) {
        let reference = json!({ "$ref": format!("#/components/schemas/{name}") });
        if out.is_empty() {
            return reference;
        }
        out.insert("allOf".into(), json!([reference]));
    }
    Value::Object(out)
}

fn annotate(name: &str, schema: &mut Value, facts: &Facts) {
    match name.rsplit('.').next() {
        Some("IntOrString") => {
            schema["format"] = "int-or-string".into();
            schema["oneOf"] = json!([{ "type": "integer" }, { "type": "string" }]);
        }
        Some("Quantity") => schema["oneOf"] = json!([{ "type": "string" }, { "type": "number" }]),
        _ => {}
    }
    if facts.merge(name, "(type)").is_some_and(|m| m.list_type == "map-type=atomic") {
        schema["x-kubernetes-map-type"] = "atomic".into();
    }
    for (field, schema) in schema.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
        if let Some(merge) = facts.merge(name, field) {
            annotate_field(schema, merge);
        }
    }
}

fn annotate_field(schema: &mut Value, merge: &Merge) {
    if let Some(map) = merge.list_type.strip_prefix("map=") {
        schema["x-kubernetes-map-type"] = map.into();
    } else if !merge.list_type.is_empty() {
        schema["x-kubernetes-list-type"] = merge.list_type.as_str().into();
    }
    if !merge.list_keys.is_empty() {
        schema["x-kubernetes-list-map-keys"] = merge.list_keys.split(',').collect();
    }
    if !merge.strategy.is_empty() {
        schema["x-kubernetes-patch-strategy"] = merge.strategy.as_str().into();
    }
    if !merge.key.is_empty() {
        schema["x-kubernetes-patch-merge-key"] = merge.key.as_str().into();
    }
}
