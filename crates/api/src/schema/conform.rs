//! Brings decoded JSON into the form that typed decoding would give it: checks the types, drops what
//! the type does not have, and treats `null` and zero values as the reference types do.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Number, Value};

use super::{Field, Shape, Type, go_type};
use crate::quantity::Quantity;
use crate::time;

/// At most so many unknown fields are reported of one body.
pub const MAX_PROBLEMS: usize = 100;

/// A value that does not fit its field, in upstream's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TypeError(pub String);

/// Makes `value` what it would be after decoding into the type and encoding again, and returns the
/// paths of the fields that the type does not have, such as `spec.containers[0].imagee`.
///
/// Unknown fields and nulls are dropped, quantities and times take their canonical form, and zero values
/// are dropped from fields that cannot tell them from absence. What the reference encoder adds is added
/// by [`complete`], after defaulting.
pub fn conform(ty: &'static Type, value: &mut Value) -> Result<Vec<String>, TypeError> {
    let Value::Object(map) = value else {
        let text =
            format!("json: cannot unmarshal {} into Go value of type {}", describe(value), ty.go_name());
        return Err(TypeError(text));
    };
    let mut walk = Walk { owner: ty, path: String::new(), fields: String::new(), unknown: Vec::new() };
    walk.object(ty, map)?;
    Ok(walk.unknown)
}

/// Adds what the reference encoder writes even when nobody set it: empty structs (`status: {}`,
/// `resources: {}`) and zero values of fields that are never left out. Meant for just before encoding.
pub fn complete(ty: &'static Type, value: &mut Value) {
    let Value::Object(map) = value else { return };
    for field in ty.fields() {
        match map.get_mut(field.name()) {
            Some(value) => complete_shape(field.shape(), value),
            None if field.always_written() => {
                if let Some(mut zero) = written_zero(field.shape()) {
                    complete_shape(field.shape(), &mut zero);
                    map.insert(field.name().to_owned(), zero);
                }
            }
            None => {}
        }
    }
}

fn complete_shape(shape: Shape, value: &mut Value) {
    match (shape, value) {
        (Shape::Object(ty), value) => complete(ty.get(), value),
        (Shape::Array(items), Value::Array(list)) if items.get().element_type().is_some() => {
            list.iter_mut().for_each(|v| complete_shape(items.get(), v));
        }
        (Shape::Map(items), Value::Object(map)) if items.get().element_type().is_some() => {
            map.values_mut().for_each(|v| complete_shape(items.get(), v));
        }
        _ => {}
    }
}

/// What is written for a value that nobody set; `None` where that would be `null`.
fn written_zero(shape: Shape) -> Option<Value> {
    match shape {
        Shape::Array(_) | Shape::Map(_) | Shape::Time | Shape::MicroTime | Shape::Bytes | Shape::Raw => None,
        Shape::SchemaOrBool | Shape::SchemaOrArray | Shape::SchemaOrStrings => None,
        shape => Some(zero(shape)),
    }
}

/// What `null` means as an item of a list or map.
fn zero(shape: Shape) -> Value {
    match shape {
        Shape::String | Shape::Bytes => "".into(),
        Shape::Bool => false.into(),
        Shape::Int32 | Shape::Int64 | Shape::Float | Shape::IntOrString => 0.into(),
        Shape::Quantity => "0".into(),
        Shape::Object(_) => Value::Object(Map::new()),
        _ => Value::Null,
    }
}

struct Walk {
    /// The innermost struct, which messages name.
    owner: &'static Type,
    /// With list indexes and map keys.
    path: String,
    /// Field names alone.
    fields: String,
    unknown: Vec<String>,
}

/// How far inside the lists and maps of a field a value is; gives its name in messages.
#[derive(Clone, Copy)]
struct Place {
    field: &'static Field,
    depth: usize,
}

impl Place {
    fn go_type(self, shape: Shape) -> String {
        let mut name = self.field.go_type();
        for _ in 0..self.depth {
            match name.strip_prefix("[]").or_else(|| name.strip_prefix("map[string]")) {
                Some(inner) => name = inner.trim_start_matches('*').to_owned(),
                // A named list or map does not tell its elements.
                None => return go_type(shape),
            }
        }
        name
    }
}

impl Walk {
    fn object(&mut self, ty: &'static Type, map: &mut Map<String, Value>) -> Result<(), TypeError> {
        let outer = std::mem::replace(&mut self.owner, ty);
        let mut result = Ok(());
        map.retain(|key, value| {
            if result.is_err() {
                return true;
            }
            let Some(field) = ty.field(key) else {
                self.report_unknown(key);
                return false;
            };
            if value.is_null() {
                return false;
            }
            let (path, fields) = (self.path.len(), self.fields.len());
            push_name(&mut self.path, key);
            push_name(&mut self.fields, key);
            result = self.value(field.shape(), Place { field, depth: 0 }, value);
            self.path.truncate(path);
            self.fields.truncate(fields);
            !is_unset(field, value)
        });
        self.owner = outer;
        result
    }

    fn report_unknown(&mut self, key: &str) {
        if self.unknown.len() < MAX_PROBLEMS {
            let mut path = self.path.clone();
            push_name(&mut path, key);
            self.unknown.push(path);
        }
    }

    fn value(&mut self, shape: Shape, place: Place, value: &mut Value) -> Result<(), TypeError> {
        match (shape, &mut *value) {
            (Shape::String, Value::String(_))
            | (Shape::Bool, Value::Bool(_))
            | (Shape::Float, Value::Number(_)) => Ok(()),
            (Shape::Int32, Value::Number(n)) if n.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => {
                Ok(())
            }
            (Shape::Int64, Value::Number(n)) if n.is_i64() => Ok(()),
            (Shape::Bytes, Value::String(text)) => check_base64(text),
            (Shape::Time, value) => canonical_time(value, time::canonical_seconds),
            (Shape::MicroTime, value) => canonical_time(value, time::canonical_micros),
            (Shape::IntOrString, value) => check_int_or_string(value),
            (Shape::Quantity, value) => canonical_quantity(value),
            (Shape::Raw | Shape::SchemaOrBool | Shape::SchemaOrArray | Shape::SchemaOrStrings, _) => Ok(()),
            (Shape::Object(ty), Value::Object(map)) => self.object(ty.get(), map),
            (Shape::Array(items), Value::Array(list)) => self.list(items.get(), place, list),
            (Shape::Map(items), Value::Object(map)) => self.map(items.get(), place, map),
            _ => Err(self.wrong_type(shape, place, value)),
        }
    }

    fn list(&mut self, items: Shape, place: Place, list: &mut [Value]) -> Result<(), TypeError> {
        let place = Place { depth: place.depth + 1, ..place };
        let length = self.path.len();
        for (i, value) in list.iter_mut().enumerate() {
            if value.is_null() {
                *value = zero(items);
            }
            // Only what may hold an unknown field needs its path.
            if items.element_type().is_some() {
                self.path.push('[');
                self.path.push_str(itoa::Buffer::new().format(i));
                self.path.push(']');
            }
            self.value(items, place, value)?;
            self.path.truncate(length);
        }
        Ok(())
    }

    fn map(&mut self, items: Shape, place: Place, map: &mut Map<String, Value>) -> Result<(), TypeError> {
        let place = Place { depth: place.depth + 1, ..place };
        let length = self.path.len();
        for (key, value) in map.iter_mut() {
            if value.is_null() {
                *value = zero(items);
            }
            if items.element_type().is_some() {
                push_name(&mut self.path, key);
            }
            self.value(items, place, value)?;
            self.path.truncate(length);
        }
        Ok(())
    }

    fn wrong_type(&self, shape: Shape, place: Place, value: &Value) -> TypeError {
        let numeric = matches!(shape, Shape::Int32 | Shape::Int64);
        let got = match value {
            Value::Number(n) if numeric => format!("number {n}"),
            other => describe(other).to_owned(),
        };
        let (owner, fields) = (self.owner.short_name(), &self.fields);
        let wanted = place.go_type(shape);
        TypeError(format!(
            "json: cannot unmarshal {got} into Go struct field {owner}.{fields} of type {wanted}"
        ))
    }
}

fn push_name(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}

/// How messages name the sort of a JSON value.
pub(crate) fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_unset(field: &Field, value: &Value) -> bool {
    match (field.shape(), value) {
        (_, Value::String(s)) => s.is_empty() && !field.keeps_zero(),
        (_, Value::Bool(b)) => !b && !field.keeps_zero(),
        (Shape::Int32 | Shape::Int64 | Shape::Float, Value::Number(n)) => is_zero(n) && !field.keeps_zero(),
        (Shape::Array(_), Value::Array(list)) => list.is_empty() && !field.keeps_empty(),
        (Shape::Map(_), Value::Object(map)) => map.is_empty() && !field.keeps_empty(),
        _ => false,
    }
}

fn is_zero(n: &Number) -> bool {
    n.as_i64() == Some(0) || n.as_f64() == Some(0.0)
}

fn check_base64(text: &str) -> Result<(), TypeError> {
    let at = match STANDARD.decode(text) {
        Ok(_) => return Ok(()),
        Err(base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _)) => at,
        Err(_) => text.len(),
    };
    // The reference decoder passes over line ends.
    if text.contains(['\r', '\n']) && STANDARD.decode(text.replace(['\r', '\n'], "")).is_ok() {
        return Ok(());
    }
    Err(TypeError(format!("illegal base64 data at input byte {at}")))
}

fn canonical_time(
    value: &mut Value,
    canonical: fn(&str) -> Result<Option<String>, String>,
) -> Result<(), TypeError> {
    let Value::String(text) = value else {
        return Err(TypeError(format!(
            "json: cannot unmarshal {} into Go value of type string",
            describe(value)
        )));
    };
    if let Some(changed) = canonical(text).map_err(TypeError)? {
        *text = changed;
    }
    Ok(())
}

fn check_int_or_string(value: &Value) -> Result<(), TypeError> {
    match value {
        Value::String(_) => Ok(()),
        Value::Number(n) if n.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => Ok(()),
        Value::Number(n) => {
            Err(TypeError(format!("json: cannot unmarshal number {n} into Go value of type int32")))
        }
        other => {
            Err(TypeError(format!("json: cannot unmarshal {} into Go value of type int32", describe(other))))
        }
    }
}

fn canonical_quantity(value: &mut Value) -> Result<(), TypeError> {
    let quantity = match &*value {
        Value::String(text) => Quantity::parse(text),
        Value::Number(n) => Quantity::parse(&n.to_string()),
        // Upstream parses the text of the value, which cannot be a quantity.
        _ => Quantity::parse("{"),
    };
    let text = quantity.map_err(|e| TypeError(e.to_string()))?.to_string();
    if value.as_str() != Some(&text) {
        *value = text.into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema;

    fn deployment() -> &'static Type {
        schema::of("apps", "v1", "Deployment").expect("a schema")
    }

    fn pod() -> &'static Type {
        schema::of("", "v1", "Pod").expect("a schema")
    }

    #[track_caller]
    fn check_error(ty: &'static Type, mut value: Value, want: &str) {
        assert_eq!(conform(ty, &mut value), Err(TypeError(want.to_owned())));
    }

    #[track_caller]
    fn check(ty: &'static Type, mut value: Value, want: Value, unknown: &[&str]) {
        assert_eq!(conform(ty, &mut value).expect("it conforms"), unknown);
        assert_eq!(value, want);
    }

    #[test]
    fn unknown_fields_are_dropped_and_named() {
        check(
            deployment(),
            json!({"spec": {"template": {"spec": {"containers": [{"name": "a", "imagee": "b"}]}}, "x": {"y": 1}}, "z": 1}),
            json!({"spec": {"template": {"spec": {"containers": [{"name": "a"}]}}}}),
            &["spec.template.spec.containers[0].imagee", "spec.x", "z"],
        );
    }

    #[test]
    fn nulls_and_zeros_are_what_typed_decoding_makes_of_them() {
        check(
            deployment(),
            json!({"metadata": {"labels": {"a": null}, "annotations": {}}, "spec": {"replicas": 0, "minReadySeconds": 0, "paused": null}}),
            json!({"metadata": {"labels": {"a": ""}}, "spec": {"replicas": 0}}),
            &[],
        );
        check(
            pod(),
            json!({"spec": {"containers": [null], "hostNetwork": false, "automountServiceAccountToken": false}}),
            json!({"spec": {"containers": [{}], "automountServiceAccountToken": false}}),
            &[],
        );
    }

    #[test]
    fn quantities_and_times_take_their_canonical_form() {
        check(
            pod(),
            json!({"metadata": {"creationTimestamp": "2026-01-02T03:04:05.6+01:00"},
                   "spec": {"containers": [{"resources": {"limits": {"cpu": 0.5, "memory": "1024Mi"}}}]}}),
            json!({"metadata": {"creationTimestamp": "2026-01-02T02:04:05Z"},
                   "spec": {"containers": [{"resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}}]}}),
            &[],
        );
    }

    #[test]
    fn wrong_types_are_told_in_upstreams_words() {
        check_error(
            deployment(),
            json!({"spec": {"replicas": "3"}}),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
        );
        check_error(
            deployment(),
            json!({"spec": {"replicas": 99999999999i64}}),
            "json: cannot unmarshal number 99999999999 into Go struct field DeploymentSpec.spec.replicas of type int32",
        );
        check_error(
            deployment(),
            json!({"metadata": {"labels": {"a": 1}}}),
            "json: cannot unmarshal number into Go struct field ObjectMeta.metadata.labels of type string",
        );
        check_error(
            pod(),
            json!({"spec": {"containers": {"name": "a"}}}),
            "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
        );
        check_error(
            pod(),
            json!({"spec": {"containers": [{"env": [{"name": "a", "value": true}]}]}}),
            "json: cannot unmarshal bool into Go struct field EnvVar.spec.containers.env.value of type string",
        );
        check_error(pod(), json!([]), "json: cannot unmarshal array into Go value of type v1.Pod");
        check_error(
            pod(),
            json!({"spec": {"containers": [{"resources": {"limits": {"cpu": "one"}}}]}}),
            "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
        );
        check_error(
            schema::of("", "v1", "Secret").expect("a schema"),
            json!({"data": {"a": "%%%"}}),
            "illegal base64 data at input byte 0",
        );
    }

    #[test]
    fn completing_adds_what_the_reference_encoder_writes() {
        let mut value = json!({"spec": {"template": {"spec": {"containers": [{"name": "a"}]}}}});
        complete(deployment(), &mut value);
        assert_eq!(
            value,
            json!({"metadata": {}, "status": {}, "spec": {"strategy": {}, "template": {"metadata": {}, "spec": {
                "containers": [{"name": "a", "resources": {}}]}}}})
        );
    }
}
