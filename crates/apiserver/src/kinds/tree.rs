//! Small readers and writers of JSON trees, so that defaults and checks read as lists.
//!
//! A field that is `null`, or an empty string, counts as absent, as it does in upstream's typed objects.

use serde_json::{Map, Value};

static NULL: Value = Value::Null;

pub trait Tree {
    /// The value of `field`; `null` when absent.
    fn at(&self, field: &str) -> &Value;
    /// The text of `field`; empty when absent or not text.
    fn text(&self, field: &str) -> &str;
    fn int(&self, field: &str) -> Option<i64>;
    fn flag(&self, field: &str) -> bool;
    /// The items of the list `field`; empty when absent.
    fn items(&self, field: &str) -> &[Value];
    /// The members of the object `field`; empty when absent.
    fn members(&self, field: &str) -> Box<dyn Iterator<Item = (&str, &Value)> + '_>;
    /// Whether `field` holds anything: not absent, `null`, "", [] or {}.
    fn has(&self, field: &str) -> bool;

    /// Sets `field` unless it holds a value. Does nothing on what is not an object.
    fn fill(&mut self, field: &str, value: impl Into<Value>);
    /// As [`Tree::fill`], for numbers whose zero means absent.
    fn fill_zero(&mut self, field: &str, value: i64);
    /// The object `field`, made when absent.
    fn object(&mut self, field: &str) -> &mut Value;
    /// The object `field`, if there is one.
    fn sub(&mut self, field: &str) -> Option<&mut Value>;
    /// The items of the list `field`, to be changed.
    fn each(&mut self, field: &str) -> std::slice::IterMut<'_, Value>;
    fn set(&mut self, field: &str, value: impl Into<Value>);
    fn unset(&mut self, field: &str) -> Option<Value>;
    /// Removes `field` when it is an empty object or list.
    fn unset_empty(&mut self, field: &str);
}

impl Tree for Value {
    fn at(&self, field: &str) -> &Value {
        self.get(field).unwrap_or(&NULL)
    }

    fn text(&self, field: &str) -> &str {
        self.get(field).and_then(Value::as_str).unwrap_or_default()
    }

    fn int(&self, field: &str) -> Option<i64> {
        self.get(field).and_then(Value::as_i64)
    }

    fn flag(&self, field: &str) -> bool {
        self.get(field).and_then(Value::as_bool).unwrap_or_default()
    }

    fn items(&self, field: &str) -> &[Value] {
        self.get(field).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn members(&self, field: &str) -> Box<dyn Iterator<Item = (&str, &Value)> + '_> {
        let members = self.get(field).and_then(Value::as_object);
        Box::new(members.into_iter().flatten().map(|(name, value)| (name.as_str(), value)))
    }

    fn has(&self, field: &str) -> bool {
        match self.at(field) {
            Value::Null => false,
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(members) => !members.is_empty(),
            _ => true,
        }
    }

    fn fill(&mut self, field: &str, value: impl Into<Value>) {
        let Some(object) = self.as_object_mut() else { return };
        match object.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(_) => return,
        }
        object.insert(field.to_owned(), value.into());
    }

    fn fill_zero(&mut self, field: &str, value: i64) {
        if self.int(field).is_none_or(|n| n == 0) {
            self.set(field, value);
        }
    }

    fn object(&mut self, field: &str) -> &mut Value {
        if !self.is_object() {
            *self = Value::Object(Map::new());
        }
        let child = self.as_object_mut().expect("made an object above").entry(field).or_insert(Value::Null);
        if !child.is_object() {
            *child = Value::Object(Map::new());
        }
        child
    }

    fn sub(&mut self, field: &str) -> Option<&mut Value> {
        self.get_mut(field).filter(|value| value.is_object())
    }

    fn each(&mut self, field: &str) -> std::slice::IterMut<'_, Value> {
        self.get_mut(field).and_then(Value::as_array_mut).map(|items| items.iter_mut()).unwrap_or_default()
    }

    fn set(&mut self, field: &str, value: impl Into<Value>) {
        if let Some(object) = self.as_object_mut() {
            object.insert(field.to_owned(), value.into());
        }
    }

    fn unset(&mut self, field: &str) -> Option<Value> {
        self.as_object_mut()?.remove(field)
    }

    fn unset_empty(&mut self, field: &str) {
        if self.get(field).is_some() && !self.has(field) {
            self.unset(field);
        }
    }
}
