//! The document of version 2 as the message `openapi.v2.Document` of the gnostic project, of which it holds
//! what our documents have. Extensions are kept as YAML text, which JSON is.

use serde_json::Value;

use crate::codec::protobuf::wire::{put_bytes, put_message, put_number};

type Out = Vec<u8>;

pub fn document(document: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    text(&mut out, 1, &document["swagger"]);
    put_message(&mut out, 2, |out| {
        text(out, 1, &document["info"]["title"]);
        text(out, 2, &document["info"]["version"]);
    });
    put_message(&mut out, 8, |out| named(out, 2, &document["paths"], path_item));
    put_message(&mut out, 9, |out| named(out, 1, &document["definitions"], schema));
    for requirement in items(&document["security"]) {
        put_message(&mut out, 12, |out| named(out, 1, requirement, |out, scopes| texts(out, 1, scopes)));
    }
    put_message(&mut out, 13, |out| {
        named(out, 1, &document["securityDefinitions"], |out, scheme| {
            put_message(out, 2, |out| {
                for (number, name) in [(1, "type"), (2, "name"), (3, "in"), (4, "description")] {
                    text(out, number, &scheme[name]);
                }
            });
        });
    });
    out
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(out: &mut Out, number: u16, value: &Value) {
    if let Value::String(text) = value {
        put_bytes(out, number, text.as_bytes());
    }
}

fn texts(out: &mut Out, number: u16, list: &Value) {
    items(list).for_each(|v| text(out, number, v));
}

fn flag(out: &mut Out, number: u16, value: &Value) {
    if value == &Value::Bool(true) {
        put_number(out, number, 1);
    }
}

/// A map as pairs of name (1) and value (2).
fn named(out: &mut Out, number: u16, map: &Value, value: impl Fn(&mut Out, &Value)) {
    for (name, entry) in map.as_object().into_iter().flatten() {
        put_message(out, number, |out| {
            put_bytes(out, 1, name.as_bytes());
            put_message(out, 2, |out| value(out, entry));
        });
    }
}

fn any(out: &mut Out, value: &Value) {
    put_bytes(out, 2, format!("{value}\n").as_bytes());
}

fn extensions(out: &mut Out, number: u16, object: &Value) {
    for (name, value) in object.as_object().into_iter().flatten().filter(|(name, _)| name.starts_with("x-")) {
        put_message(out, number, |out| {
            put_bytes(out, 1, name.as_bytes());
            put_message(out, 2, |out| any(out, value));
        });
    }
}

fn path_item(out: &mut Out, item: &Value) {
    for (number, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
        if item[method].is_object() {
            put_message(out, number, |out| operation(out, &item[method]));
        }
    }
    parameters(out, 9, &item["parameters"]);
}

fn operation(out: &mut Out, operation: &Value) {
    texts(out, 1, &operation["tags"]);
    text(out, 3, &operation["description"]);
    text(out, 5, &operation["operationId"]);
    texts(out, 6, &operation["produces"]);
    texts(out, 7, &operation["consumes"]);
    parameters(out, 8, &operation["parameters"]);
    put_message(out, 9, |out| {
        named(out, 1, &operation["responses"], |out, response| {
            put_message(out, 1, |out| {
                text(out, 1, &response["description"]);
                if response["schema"].is_object() {
                    put_message(out, 2, |out| put_message(out, 1, |out| schema(out, &response["schema"])));
                }
            });
        });
    });
    extensions(out, 13, operation);
}

fn parameters(out: &mut Out, number: u16, list: &Value) {
    for parameter in items(list) {
        put_message(out, number, |out| {
            put_message(out, 1, |out| match parameter["in"].as_str() {
                Some("body") => put_message(out, 1, |out| body_parameter(out, parameter)),
                Some("path") => {
                    put_message(out, 2, |out| put_message(out, 4, |out| path_parameter(out, parameter)))
                }
                _ => put_message(out, 2, |out| put_message(out, 3, |out| query_parameter(out, parameter))),
            });
        });
    }
}

fn body_parameter(out: &mut Out, parameter: &Value) {
    text(out, 2, &parameter["name"]);
    text(out, 3, &parameter["in"]);
    flag(out, 4, &parameter["required"]);
    put_message(out, 5, |out| schema(out, &parameter["schema"]));
}

fn path_parameter(out: &mut Out, parameter: &Value) {
    flag(out, 1, &parameter["required"]);
    for (number, name) in [(2, "in"), (3, "description"), (4, "name"), (5, "type")] {
        text(out, number, &parameter[name]);
    }
    flag(out, 19, &parameter["uniqueItems"]);
}

fn query_parameter(out: &mut Out, parameter: &Value) {
    flag(out, 1, &parameter["required"]);
    for (number, name) in [(2, "in"), (3, "description"), (4, "name"), (6, "type")] {
        text(out, number, &parameter[name]);
    }
    flag(out, 20, &parameter["uniqueItems"]);
}

fn schema(out: &mut Out, value: &Value) {
    text(out, 1, &value["$ref"]);
    text(out, 2, &value["format"]);
    text(out, 4, &value["description"]);
    if !value["default"].is_null() {
        put_message(out, 5, |out| any(out, &value["default"]));
    }
    texts(out, 19, &value["required"]);
    for allowed in items(&value["enum"]) {
        put_message(out, 20, |out| any(out, allowed));
    }
    if value["additionalProperties"].is_object() {
        put_message(out, 21, |out| put_message(out, 1, |out| schema(out, &value["additionalProperties"])));
    }
    if value["type"].is_string() {
        put_message(out, 22, |out| text(out, 1, &value["type"]));
    }
    if value["items"].is_object() {
        put_message(out, 23, |out| put_message(out, 1, |out| schema(out, &value["items"])));
    }
    if value["properties"].is_object() {
        put_message(out, 25, |out| named(out, 1, &value["properties"], schema));
    }
    extensions(out, 31, value);
}
