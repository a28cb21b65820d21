//! JSON to messages.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::MAGIC;
use super::wire::{put_bytes, put_fixed64, put_message, put_number};
use crate::schema::{self, ProtoContent, ProtoField, Shape, Type};
use crate::time;

pub const JSON_SCHEMA: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaProps";

pub fn body(ty: &'static Type, object: &Value) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    let text = |name: &str| object[name].as_str().unwrap_or_default().as_bytes();
    put_message(&mut out, 1, |out| {
        put_bytes(out, 1, text("apiVersion"));
        put_bytes(out, 2, text("kind"));
    });
    if let Value::Object(map) = object {
        put_message(&mut out, 2, |out| message(ty.proto(), map, out));
    }
    // Readers expect both, empty as they are.
    put_bytes(&mut out, 3, b"");
    put_bytes(&mut out, 4, b"");
    out
}

pub fn watch_event(event: &str, object: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(object.len() + event.len() + 16);
    put_bytes(&mut out, 1, event.as_bytes());
    put_message(&mut out, 2, |out| put_bytes(out, 1, object));
    out
}

fn message(fields: &[ProtoField], map: &Map<String, Value>, out: &mut Vec<u8>) {
    for row in fields {
        match row.content() {
            ProtoContent::Inline(inner) => put_message(out, row.number, |out| message(inner, map, out)),
            ProtoContent::Field(field) => {
                if let Some(value) = map.get(field.name()) {
                    put_value(row.number, field.shape(), field.wrapped(), value, out);
                }
            }
        }
    }
}

fn put_value(number: u16, shape: Shape, wrapped: bool, value: &Value, out: &mut Vec<u8>) {
    match (shape, value) {
        (Shape::String, Value::String(text)) => put_bytes(out, number, text.as_bytes()),
        (Shape::Bytes, Value::String(text)) => {
            put_bytes(out, number, &STANDARD.decode(text).unwrap_or_default())
        }
        (Shape::Bool, Value::Bool(v)) => put_number(out, number, u64::from(*v)),
        (Shape::Int32 | Shape::Int64, Value::Number(n)) => {
            put_number(out, number, n.as_i64().unwrap_or_default() as u64)
        }
        (Shape::Float, Value::Number(n)) => {
            put_fixed64(out, number, n.as_f64().unwrap_or_default().to_bits())
        }
        (Shape::Time | Shape::MicroTime, Value::String(text)) => put_time(number, text, out),
        (Shape::Quantity, Value::String(text)) => {
            put_message(out, number, |out| put_bytes(out, 1, text.as_bytes()))
        }
        (Shape::IntOrString, value) => put_message(out, number, |out| int_or_string(value, out)),
        (Shape::Raw, value) => {
            put_message(out, number, |out| put_bytes(out, 1, value.to_string().as_bytes()))
        }
        (Shape::SchemaOrBool | Shape::SchemaOrArray | Shape::SchemaOrStrings, value) => {
            put_message(out, number, |out| schema_or(shape, value, out));
        }
        (Shape::Object(ty), Value::Object(map)) => {
            put_message(out, number, |out| message(ty.get().proto(), map, out))
        }
        (Shape::Array(items), Value::Array(list)) if wrapped => {
            put_message(out, number, |out| {
                list.iter().for_each(|v| put_value(1, items.get(), false, v, out))
            });
        }
        (Shape::Array(items), Value::Array(list)) => {
            list.iter().for_each(|v| put_value(number, items.get(), false, v, out));
        }
        (Shape::Map(items), Value::Object(map)) => {
            for (key, value) in map {
                put_message(out, number, |out| {
                    put_bytes(out, 1, key.as_bytes());
                    put_value(2, items.get(), wrapped, value, out);
                });
            }
        }
        _ => {}
    }
}

fn put_time(number: u16, text: &str, out: &mut Vec<u8>) {
    let Ok(time) = time::parse(text) else { return };
    // Before 1970 the parts have the same sign here, but not on the wire.
    let nanos = time.subsec_nanosecond();
    let (seconds, nanos) =
        if nanos < 0 { (time.as_second() - 1, nanos + 1_000_000_000) } else { (time.as_second(), nanos) };
    put_message(out, number, |out| {
        put_number(out, 1, seconds as u64);
        put_number(out, 2, nanos as u64);
    });
}

fn int_or_string(value: &Value, out: &mut Vec<u8>) {
    let text = value.as_str();
    put_number(out, 1, u64::from(text.is_some()));
    put_number(out, 2, value.as_i64().unwrap_or_default() as u64);
    put_bytes(out, 3, text.unwrap_or_default().as_bytes());
}

fn schema_or(shape: Shape, value: &Value, out: &mut Vec<u8>) {
    let ty = schema::by_name(JSON_SCHEMA).expect("the schema of schemas is built in");
    let props = |number: u16, value: &Value, out: &mut Vec<u8>| {
        if let Value::Object(map) = value {
            put_message(out, number, |out| message(ty.proto(), map, out));
        }
    };
    match (shape, value) {
        (Shape::SchemaOrBool, Value::Bool(allows)) => put_number(out, 1, u64::from(*allows)),
        (Shape::SchemaOrBool, value) => {
            put_number(out, 1, 1);
            props(2, value, out);
        }
        (Shape::SchemaOrArray, Value::Array(list)) => list.iter().for_each(|v| props(2, v, out)),
        (Shape::SchemaOrStrings, Value::Array(list)) => {
            list.iter().filter_map(Value::as_str).for_each(|v| put_bytes(out, 2, v.as_bytes()));
        }
        (_, value) => props(1, value, out),
    }
}
