//! Reading what cells need from the JSON of an object, and the ways in which values are shown.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use crate::Quantity;

pub const NONE: &str = "<none>";
pub const UNSET: &str = "<unset>";
pub const UNKNOWN: &str = "<unknown>";

/// An object and the time at which it is shown.
pub struct Printed<'a> {
    pub value: &'a Value,
    pub now: Timestamp,
}

/// The value at a path of field names; `Null` where there is none.
pub fn at<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, name| &value[name])
}

pub fn str_at<'a>(value: &'a Value, path: &str) -> &'a str {
    at(value, path).as_str().unwrap_or_default()
}

pub fn int_at(value: &Value, path: &str) -> i64 {
    at(value, path).as_i64().unwrap_or_default()
}

pub fn list_at<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    at(value, path).as_array().map(Vec::as_slice).unwrap_or_default()
}

pub fn or<'a>(text: &'a str, instead: &'a str) -> &'a str {
    if text.is_empty() { instead } else { text }
}

/// A number or text as it is, for fields that take either.
pub fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

impl<'a> Printed<'a> {
    pub fn at(&self, path: &str) -> &'a Value {
        at(self.value, path)
    }

    pub fn str(&self, path: &str) -> &'a str {
        str_at(self.value, path)
    }

    pub fn int(&self, path: &str) -> i64 {
        int_at(self.value, path)
    }

    pub fn list(&self, path: &str) -> &'a [Value] {
        list_at(self.value, path)
    }

    /// How many entries a list or map has.
    pub fn count(&self, path: &str) -> usize {
        match self.at(path) {
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        }
    }

    pub fn name(&self) -> Value {
        self.str("metadata.name").into()
    }

    pub fn age(&self) -> String {
        self.since(self.at("metadata.creationTimestamp"))
    }

    /// How long ago a time was.
    pub fn since(&self, time: &Value) -> String {
        match timestamp(time) {
            Some(time) => human_duration(self.now.duration_since(time).as_secs()),
            None => UNKNOWN.into(),
        }
    }

    pub fn is_deleted(&self) -> bool {
        !self.at("metadata.deletionTimestamp").is_null()
    }

    /// `True`, `False` or `<unset>`.
    pub fn flag(&self, path: &str) -> &'static str {
        match self.at(path).as_bool() {
            Some(true) => "True",
            Some(false) => "False",
            None => UNSET,
        }
    }

    /// Names and images of the containers in the pod spec at `path`.
    pub fn containers(&self, path: &str) -> (String, String) {
        let list = list_at(self.at(path), "containers");
        let all = |field: &str| join(list.iter().map(|c| str_at(c, field)), ",");
        (all("name"), all("image"))
    }
}

pub fn timestamp(time: &Value) -> Option<Timestamp> {
    time.as_str().and_then(|text| text.parse().ok())
}

pub fn join<'a>(items: impl Iterator<Item = &'a str>, separator: &str) -> String {
    items.collect::<Vec<_>>().join(separator)
}

/// What is behind the first few that are shown.
pub fn with_more(shown: &[String], count: usize, empty: &str) -> String {
    match shown {
        [] => empty.into(),
        shown if count > shown.len() => format!("{} + {} more...", shown.join(","), count - shown.len()),
        shown => shown.join(","),
    }
}

/// `a=b,c=d`
pub fn labels(map: &Value) -> String {
    let pairs = map.as_object().into_iter().flatten();
    let text = pairs.map(|(k, v)| format!("{k}={}", show(v))).collect::<Vec<_>>().join(",");
    or(&text, NONE).to_owned()
}

/// A label selector in the form of a query.
pub fn selector(selector: &Value) -> String {
    let mut terms: Vec<(&str, String)> = Vec::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        terms.push((key, format!("{key}={}", show(value))));
    }
    for expression in list_at(selector, "matchExpressions") {
        let key = str_at(expression, "key");
        let values: BTreeSet<&str> = list_at(expression, "values").iter().filter_map(Value::as_str).collect();
        let values = join(values.into_iter(), ",");
        terms.push((
            key,
            match str_at(expression, "operator") {
                "In" => format!("{key} in ({values})"),
                "NotIn" => format!("{key} notin ({values})"),
                "Exists" => key.to_owned(),
                "DoesNotExist" => format!("!{key}"),
                _ => return "<error>".into(),
            },
        ));
    }
    terms.sort_by(|a, b| a.0.cmp(b.0));
    or(&terms.into_iter().map(|(_, term)| term).collect::<Vec<_>>().join(","), NONE).to_owned()
}

/// A quantity in its canonical form.
pub fn quantity(value: &Value) -> String {
    value.as_str().and_then(|q| Quantity::parse(q).ok()).unwrap_or_default().to_string()
}

/// A duration as people read it: coarser the longer it is. Clocks may differ by a second.
pub fn human_duration(seconds: i64) -> String {
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let two = |large: i64, unit: char, small: i64, small_unit: char| match small {
        0 => format!("{large}{unit}"),
        small => format!("{large}{unit}{small}{small_unit}"),
    };
    match () {
        () if seconds < -1 => "<invalid>".into(),
        () if seconds < 0 => "0s".into(),
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, 'm', seconds % 60, 's'),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, 'h', minutes % 60, 'm'),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 24 * 8 => two(hours / 24, 'd', hours % 24, 'h'),
        () if hours < 24 * 365 * 2 => format!("{}d", hours / 24),
        () if hours < 24 * 365 * 8 => two(hours / 24 / 365, 'y', hours / 24 % 365, 'd'),
        () => format!("{}y", hours / 24 / 365),
    }
}
