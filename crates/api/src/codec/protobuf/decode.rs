//! Messages to JSON.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Number, Value};

use super::wire::{Reader, Wire, error};
use super::{Envelope, MAGIC, named};
use crate::codec::{DecodeError, MAX_DEPTH, TOO_DEEP, json};
use crate::schema::{self, ProtoContent, ProtoField, Shape, Type};
use crate::time;

type Object = Map<String, Value>;
type Result<T> = std::result::Result<T, DecodeError>;

pub fn envelope(bytes: &[u8]) -> Result<Envelope<'_>> {
    let raw = bytes.strip_prefix(MAGIC).ok_or_else(|| {
        error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")
    })?;
    let mut out = Envelope { api_version: "", kind: "", raw: &[] };
    let mut reader = Reader(raw);
    while let Some(field) = reader.next()? {
        match field {
            (1, Wire::Bytes(meta)) => {
                let mut reader = Reader(meta);
                while let Some(field) = reader.next()? {
                    match field {
                        (1, Wire::Bytes(text)) => out.api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => out.kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(raw)) => out.raw = raw,
            _ => {}
        }
    }
    Ok(out)
}

fn utf8(text: &[u8]) -> Result<&str> {
    std::str::from_utf8(text).map_err(|_| error("proto: invalid UTF-8 string"))
}

/// A body inside of another is as deep as the place where it stands.
pub fn body(bytes: &[u8], assumed: Option<&'static Type>, depth: usize) -> Result<Value> {
    let envelope = envelope(bytes)?;
    let ty = match named(&envelope) {
        Some(ty) => ty,
        None if envelope.kind.is_empty() => {
            assumed.ok_or_else(|| error("Object 'Kind' is missing in the protobuf envelope"))?
        }
        None => {
            let Envelope { api_version, kind, .. } = envelope;
            return Err(DecodeError(format!(
                "no kind \"{kind}\" is registered for version \"{api_version}\""
            )));
        }
    };
    let mut map = Object::new();
    message(ty.proto(), envelope.raw, &mut map, depth + 1)?;
    for (name, text) in [("apiVersion", envelope.api_version), ("kind", envelope.kind)] {
        if !text.is_empty() && ty.field(name).is_some() {
            map.insert(name.into(), text.into());
        }
    }
    let mut value = Value::Object(map);
    schema::conform(ty, &mut value).map_err(|e| DecodeError(e.0))?;
    Ok(value)
}

fn message(fields: &[ProtoField], bytes: &[u8], map: &mut Object, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(error(TOO_DEEP));
    }
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.next()? {
        let Some(row) = fields.iter().find(|f| u64::from(f.number) == number) else { continue };
        match row.content() {
            ProtoContent::Inline(inner) => {
                let Wire::Bytes(bytes) = wire else { return Err(wrong(wire, "an embedded message")) };
                message(inner, bytes, map, depth)?;
            }
            ProtoContent::Field(field) => {
                let (name, shape) = (field.name(), field.shape());
                if !map.contains_key(name) {
                    map.insert(name.to_owned(), Value::Null);
                }
                let slot = map.get_mut(name).expect("it was put there");
                take_field(shape, field.wrapped(), wire, slot, depth, name)?;
                if slot.is_null() {
                    map.remove(name);
                }
            }
        }
    }
    Ok(())
}

fn wrong(wire: Wire<'_>, name: &str) -> DecodeError {
    let sort = match wire {
        Wire::Varint(_) => 0,
        Wire::Fixed64(_) => 1,
        Wire::Bytes(_) => 2,
        Wire::Fixed32 => 5,
    };
    DecodeError(format!("proto: wrong wireType = {sort} for field {name}"))
}

/// Adds one occurrence of a field to what earlier ones have left in `slot`.
fn take_field(
    shape: Shape,
    wrapped: bool,
    wire: Wire<'_>,
    slot: &mut Value,
    depth: usize,
    name: &str,
) -> Result<()> {
    match (shape, wire) {
        (Shape::Array(items), Wire::Bytes(bytes)) if wrapped => {
            let mut list = Vec::new();
            let mut reader = Reader(bytes);
            while let Some((number, wire)) = reader.next()? {
                if number == 1 {
                    list.push(single(items.get(), wire, depth + 2, name)?);
                }
            }
            *slot = Value::Array(list);
        }
        (Shape::Array(items), wire) => {
            if !slot.is_array() {
                *slot = Value::Array(Vec::new());
            }
            let Value::Array(list) = slot else { unreachable!("it was made a list") };
            match (items.get(), wire) {
                // Numbers may be packed into one field.
                (Shape::Int32 | Shape::Int64 | Shape::Bool, Wire::Bytes(bytes)) => {
                    let mut reader = Reader(bytes);
                    while !reader.0.is_empty() {
                        list.push(single(items.get(), Wire::Varint(reader.varint()?), depth + 2, name)?);
                    }
                }
                (items, wire) => list.push(single(items, wire, depth + 2, name)?),
            }
        }
        (Shape::Map(items), Wire::Bytes(bytes)) => {
            if !slot.is_object() {
                *slot = Value::Object(Object::new());
            }
            let Value::Object(map) = slot else { unreachable!("it was made a map") };
            let (key, value) = entry(items.get(), wrapped, bytes, depth + 2, name)?;
            map.insert(key, value);
        }
        (Shape::Object(ty), Wire::Bytes(bytes)) => {
            // A message given twice is merged.
            if !slot.is_object() {
                *slot = Value::Object(Object::new());
            }
            let Value::Object(map) = slot else { unreachable!("it was made an object") };
            message(ty.get().proto(), bytes, map, depth + 1)?;
        }
        (Shape::Map(_) | Shape::Object(_), wire) => return Err(wrong(wire, name)),
        (shape, wire) => *slot = single(shape, wire, depth + 1, name)?,
    }
    Ok(())
}

fn entry(items: Shape, wrapped: bool, bytes: &[u8], depth: usize, name: &str) -> Result<(String, Value)> {
    let (mut key, mut value) = (String::new(), Value::Null);
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        match field {
            (1, Wire::Bytes(text)) => key = String::from_utf8_lossy(text).into_owned(),
            (2, wire) => take_field(items, wrapped, wire, &mut value, depth, name)?,
            _ => {}
        }
    }
    Ok((key, value))
}

/// A value that stands in one field; `Null` where there is none in it.
fn single(shape: Shape, wire: Wire<'_>, depth: usize, name: &str) -> Result<Value> {
    Ok(match (shape, wire) {
        (Shape::String, Wire::Bytes(text)) => String::from_utf8_lossy(text).into_owned().into(),
        (Shape::Bytes, Wire::Bytes(bytes)) => STANDARD.encode(bytes).into(),
        (Shape::Bool, Wire::Varint(v)) => (v != 0).into(),
        (Shape::Int32, Wire::Varint(v)) => (v as i32).into(),
        (Shape::Int64, Wire::Varint(v)) => (v as i64).into(),
        (Shape::Float, Wire::Fixed64(v)) => {
            Number::from_f64(f64::from_bits(v)).map_or(Value::Null, Value::Number)
        }
        (Shape::Time, Wire::Bytes(bytes)) => {
            timestamp(bytes)?.map_or(Value::Null, |t| time::format_seconds(t).into())
        }
        (Shape::MicroTime, Wire::Bytes(bytes)) => {
            timestamp(bytes)?.map_or(Value::Null, |t| time::format_micros(t).into())
        }
        (Shape::Quantity, Wire::Bytes(bytes)) => text_in(bytes)?.into(),
        (Shape::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (Shape::Raw, Wire::Bytes(bytes)) => raw(bytes, depth)?,
        (Shape::SchemaOrBool | Shape::SchemaOrArray | Shape::SchemaOrStrings, Wire::Bytes(bytes)) => {
            schema_or(shape, bytes, depth)?
        }
        (Shape::Object(ty), Wire::Bytes(bytes)) => {
            let mut map = Object::new();
            message(ty.get().proto(), bytes, &mut map, depth)?;
            Value::Object(map)
        }
        (Shape::Array(_) | Shape::Map(_), wire) => {
            let mut value = Value::Null;
            take_field(shape, false, wire, &mut value, depth, name)?;
            value
        }
        (_, wire) => return Err(wrong(wire, name)),
    })
}

/// `None` for the zero time, which is an empty message.
fn timestamp(bytes: &[u8]) -> Result<Option<Timestamp>> {
    let (mut seconds, mut nanos) = (0i64, 0i32);
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        match field {
            (1, Wire::Varint(v)) => seconds = v as i64,
            (2, Wire::Varint(v)) => nanos = v as i32,
            _ => {}
        }
    }
    if bytes.is_empty() {
        return Ok(None);
    }
    let time = Timestamp::new(seconds, nanos.clamp(0, 999_999_999));
    time.map(Some).map_err(|_| error("proto: time out of range"))
}

fn text_in(bytes: &[u8]) -> Result<String> {
    let mut text = String::from("0");
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        if let (1, Wire::Bytes(v)) = field {
            text = String::from_utf8_lossy(v).into_owned();
        }
    }
    Ok(text)
}

fn int_or_string(bytes: &[u8]) -> Result<Value> {
    let (mut is_text, mut number, mut text) = (false, 0i32, String::new());
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        match field {
            (1, Wire::Varint(v)) => is_text = v == 1,
            (2, Wire::Varint(v)) => number = v as i32,
            (3, Wire::Bytes(v)) => text = String::from_utf8_lossy(v).into_owned(),
            _ => {}
        }
    }
    Ok(if is_text { text.into() } else { number.into() })
}

/// JSON inside of protobuf, or a body of its own.
fn raw(bytes: &[u8], depth: usize) -> Result<Value> {
    let mut inner: &[u8] = &[];
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        if let (1, Wire::Bytes(v)) = field {
            inner = v;
        }
    }
    let value = match inner {
        [] => return Ok(Value::Null),
        inner if inner.starts_with(MAGIC) => body(inner, None, depth)?,
        inner => json::decode(inner)?.value,
    };
    if depth + crate::codec::depth(&value) > MAX_DEPTH {
        return Err(error(TOO_DEEP));
    }
    Ok(value)
}

/// The unions in the schema of a CustomResourceDefinition: a schema, or a boolean, schemas or names.
fn schema_or(shape: Shape, bytes: &[u8], depth: usize) -> Result<Value> {
    let (mut allows, mut list, mut props) = (false, Vec::new(), Value::Null);
    let props_field = if shape == Shape::SchemaOrBool { 2 } else { 1 };
    let mut reader = Reader(bytes);
    while let Some(field) = reader.next()? {
        match field {
            (1, Wire::Varint(v)) => allows = v != 0,
            (n, Wire::Bytes(v)) if n == props_field => props = json_schema(v, depth)?,
            (2, Wire::Bytes(v)) if shape == Shape::SchemaOrArray => list.push(json_schema(v, depth + 1)?),
            (2, Wire::Bytes(v)) => list.push(String::from_utf8_lossy(v).into_owned().into()),
            _ => {}
        }
    }
    Ok(match shape {
        _ if !props.is_null() => props,
        Shape::SchemaOrBool => allows.into(),
        _ => Value::Array(list),
    })
}

fn json_schema(bytes: &[u8], depth: usize) -> Result<Value> {
    let ty = schema::by_name(super::encode::JSON_SCHEMA).expect("the schema of schemas is built in");
    let mut map = Object::new();
    message(ty.proto(), bytes, &mut map, depth)?;
    Ok(Value::Object(map))
}
