//! Writes `schema.rs`: the structure of every type as flat constant tables, which the library uses in place.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::definitions::Gvk;
use crate::facts::{Facts, Merge, ProtoField};

const REFERENCE: &str = "#/definitions/";

pub fn write(
    out: &Path,
    definitions: &BTreeMap<String, Value>,
    roots: &BTreeMap<Gvk, String>,
    facts: &Facts,
) {
    let objects: Vec<&str> =
        definitions.iter().filter(|(_, s)| s.get("properties").is_some()).map(|(n, _)| n.as_str()).collect();
    let mut tables = Tables {
        definitions,
        facts,
        objects: &objects,
        strings: Strings::default(),
        shapes: Vec::new(),
        proto: Vec::new(),
    };
    let (mut types, mut fields) = (String::new(), Vec::new());
    for name in &objects {
        let first = fields.len();
        let schema = &definitions[*name];
        let names: Vec<&String> =
            schema["properties"].as_object().expect("properties are an object").keys().collect();
        for field in &names {
            fields.push(tables.field(name, field, schema));
        }
        let (proto_first, proto_len) = tables.proto_rows(name, &names, first);
        let atomic = facts.merge(name, "(type)").is_some_and(|m| m.list_type == "map-type=atomic");
        let name = tables.strings.add(name);
        writeln!(types, "Type {{ name: {name}, fields: ({first}, {}), proto: ({proto_first}, {proto_len}), atomic: {atomic} }},", names.len()).expect("string");
    }
    let mut kinds = String::new();
    for ((group, version, kind), name) in roots {
        let ty = objects.binary_search(&name.as_str()).unwrap_or_else(|_| panic!("{name} has no structure"));
        let (group, version, kind) =
            (tables.strings.add(group), tables.strings.add(version), tables.strings.add(kind));
        writeln!(kinds, "Root {{ group: {group}, version: {version}, kind: {kind}, ty: {ty} }},")
            .expect("string");
    }
    let mut text = String::new();
    table(&mut text, "TYPES", "Type", objects.len(), &types);
    table(&mut text, "FIELDS", "Field", fields.len(), &fields.concat());
    table(&mut text, "SHAPES", "Shape", tables.shapes.len(), &tables.shapes.join(",\n"));
    table(&mut text, "PROTO", "ProtoField", tables.proto.len(), &tables.proto.concat());
    table(&mut text, "ROOTS", "Root", roots.len(), &kinds);
    writeln!(text, "static STRINGS: &str = {:?};", tables.strings.text).expect("string");
    std::fs::write(out.join("schema.rs"), text).expect("OUT_DIR can be written");
}

fn table(text: &mut String, name: &str, ty: &str, len: usize, rows: &str) {
    writeln!(text, "static {name}: [{ty}; {len}] = [\n{rows}\n];").expect("string");
}

/// Every distinct string once, in one text.
#[derive(Default)]
struct Strings {
    text: String,
    at: BTreeMap<String, usize>,
}

impl Strings {
    fn add(&mut self, s: &str) -> String {
        let at = *self.at.entry(s.to_owned()).or_insert_with(|| {
            self.text.push_str(s);
            self.text.len() - s.len()
        });
        format!("Str({at}, {})", s.len())
    }
}

struct Tables<'a> {
    definitions: &'a BTreeMap<String, Value>,
    facts: &'a Facts,
    objects: &'a [&'a str],
    strings: Strings,
    shapes: Vec<String>,
    proto: Vec<String>,
}

impl Tables<'_> {
    fn field(&mut self, definition: &str, name: &str, schema: &Value) -> String {
        let shape = self.shape(&schema["properties"][name]);
        let mut flags = Vec::new();
        if schema["required"].as_array().is_some_and(|r| r.iter().any(|n| n == name)) {
            flags.push("REQUIRED");
        }
        let go = self.facts.go(definition, name);
        if let Some(go) = go {
            flags.push("KNOWN");
            flags.extend(go.pointer.then_some("POINTER"));
            flags.extend(go.omitempty.then_some("OMITEMPTY"));
        }
        let wrapped = self
            .facts
            .proto(definition)
            .is_some_and(|m| m.iter().any(|f| f.name == name && is_list_message(&f.ty)));
        flags.extend(wrapped.then_some("WRAPPED"));
        let none = Merge::default();
        let merge = self.facts.merge(definition, name).unwrap_or(&none);
        flags.extend(merge_flags(merge));
        let flags = if flags.is_empty() { "0".to_owned() } else { flags.join(" | ") };
        let go = go.map(|g| g.ty.clone()).unwrap_or_default();
        let (name, go) = (self.strings.add(name), self.strings.add(&go));
        let (key, keys) = (self.strings.add(&merge.key), self.strings.add(&merge.list_keys));
        format!(
            "Field {{ name: {name}, go: {go}, merge_key: {key}, list_keys: {keys}, shape: {shape}, flags: {flags} }},\n"
        )
    }

    /// The index of the shape of `schema`, which is added when new.
    fn shape(&mut self, schema: &Value) -> usize {
        let text = self.shape_text(schema);
        self.shapes.iter().position(|s| *s == text).unwrap_or_else(|| {
            self.shapes.push(text);
            self.shapes.len() - 1
        })
    }

    fn shape_text(&mut self, schema: &Value) -> String {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.strip_prefix(REFERENCE).expect("references are to definitions");
            return match self.objects.binary_search(&name) {
                Ok(ty) => format!("Shape::Object(TypeId({ty}))"),
                Err(_) => self.special(name),
            };
        }
        match (schema["type"].as_str(), schema["format"].as_str()) {
            (Some("array"), _) => format!("Shape::Array(ShapeId({}))", self.shape(&schema["items"])),
            (Some("object"), _) if schema["additionalProperties"].is_object() => {
                format!("Shape::Map(ShapeId({}))", self.shape(&schema["additionalProperties"]))
            }
            (Some("string"), Some("byte")) => "Shape::Bytes".into(),
            (Some("string"), Some("date-time")) => "Shape::Time".into(),
            (Some("string"), _) => "Shape::String".into(),
            (Some("boolean"), _) => "Shape::Bool".into(),
            (Some("integer"), Some("int32")) => "Shape::Int32".into(),
            (Some("integer"), _) => "Shape::Int64".into(),
            (Some("number"), _) => "Shape::Float".into(),
            (Some("object") | None, _) => "Shape::Raw".into(),
            other => panic!("a schema of type {other:?}"),
        }
    }

    /// Types whose JSON is not the object that their name stands for.
    fn special(&mut self, definition: &str) -> String {
        match definition.rsplit('.').next().expect("a name") {
            "Quantity" => "Shape::Quantity".into(),
            "IntOrString" => "Shape::IntOrString".into(),
            "MicroTime" => "Shape::MicroTime".into(),
            "JSONSchemaPropsOrBool" => "Shape::SchemaOrBool".into(),
            "JSONSchemaPropsOrArray" => "Shape::SchemaOrArray".into(),
            "JSONSchemaPropsOrStringArray" => "Shape::SchemaOrStrings".into(),
            _ => {
                let schema = self.definitions[definition].clone();
                self.shape_text(&schema)
            }
        }
    }

    /// Adds the protobuf fields of `definition`, whose JSON fields stand in FIELDS from `first` on.
    fn proto_rows(&mut self, definition: &str, names: &[&String], first: usize) -> (usize, usize) {
        let facts = self.facts;
        match facts.proto(definition) {
            Some(message) => self.message_rows(message, names, first),
            None => (0, 0),
        }
    }

    fn message_rows(&mut self, message: &[ProtoField], names: &[&String], first: usize) -> (usize, usize) {
        let mut rows = Vec::new();
        for field in message {
            let json = json_name(&field.name, names);
            // Generated names differ in case where the Go field and its JSON name do (`uID`, `Port`).
            let (index, inline) = if let Some(i) = names.iter().position(|n| n.eq_ignore_ascii_case(&json)) {
                ((first + i).to_string(), (0, 0))
            } else if let Some(inner) =
                self.facts.proto_exact(&field.ty).filter(|_| INLINE_NAMES.contains(&field.name.as_str()))
            {
                // A struct that JSON shows as part of its parent is a message of its own here.
                ("INLINE".to_owned(), self.message_rows(inner, names, first))
            } else {
                continue;
            };
            rows.push(format!(
                "ProtoField {{ number: {}, field: {index}, inline: {inline:?} }},\n",
                field.number
            ));
        }
        self.push_proto(rows)
    }

    fn push_proto(&mut self, rows: Vec<String>) -> (usize, usize) {
        let at = self.proto.len();
        let len = rows.len();
        self.proto.extend(rows);
        (at, len)
    }
}

/// Protobuf fields that hold what JSON shows as fields of the parent.
const INLINE_NAMES: &[&str] = &[
    "deviceConfiguration",
    "ephemeralContainerCommon",
    "handler",
    "ingressRuleValue",
    "localObjectReference",
    "persistentVolumeSource",
    "rule",
    "ruleWithOperations",
    "volumeSource",
];

fn is_list_message(ty: &str) -> bool {
    ty.ends_with(".ExtraValue") || ty.ends_with(".Verbs")
}

/// The JSON name of a protobuf field, of those that differ by more than case.
fn json_name(proto: &str, names: &[&String]) -> String {
    let marked = format!("${proto}");
    if names.contains(&&marked) {
        return marked;
    }
    let Some(rest) = proto.strip_prefix("xKubernetes") else { return proto.to_owned() };
    let dashed =
        rest.chars().flat_map(|c| c.is_uppercase().then_some('-').into_iter().chain(c.to_lowercase()));
    format!("x-kubernetes{}", dashed.collect::<String>())
}

fn merge_flags(merge: &Merge) -> Vec<&'static str> {
    let mut flags = Vec::new();
    for strategy in merge.strategy.split(',').filter(|s| !s.is_empty()) {
        flags.push(match strategy {
            "merge" => "MERGE",
            "replace" => "REPLACE",
            "retainKeys" => "RETAIN_KEYS",
            other => panic!("patch strategy {other}"),
        });
    }
    flags.extend(match merge.list_type.as_str() {
        "atomic" => Some("LIST_ATOMIC"),
        "set" => Some("LIST_SET"),
        "map" => Some("LIST_MAP"),
        "map=atomic" => Some("MAP_ATOMIC"),
        "" | "map=granular" | "map-type=atomic" => None,
        other => panic!("list type {other}"),
    });
    flags
}
