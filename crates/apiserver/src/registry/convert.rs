//! Resources that are served in two versions and stored in one: events of both groups, autoscalers of v1.
//!
//! Upstream: pkg/apis/core/v1 and events/v1 conversion.

use std::sync::Arc;

use minke_api::{Kind, Object, schema};
use serde_json::Value;

use super::autoscaler;
use crate::kinds::tree::Tree;

/// The object as `kind`, one of the rows that show its resource. The same object, where that is the stored row.
pub fn view(kind: &'static Kind, object: &Arc<Object>) -> Arc<Object> {
    if kind == object.kind() || kind.stored_as.is_none() {
        return object.clone();
    }
    let mut value = from_storage(kind, object.value());
    if let Some(ty) = schema::of(kind.group, kind.version, kind.kind) {
        schema::complete(ty, &mut value);
    }
    Arc::new(Object::from_value(kind, &value).expect("a view of an object has its name and revision"))
}

/// Makes of a `kind` what is stored.
pub fn to_storage(kind: &Kind, value: Value) -> Value {
    convert(kind, value, true)
}

/// Makes a `kind` of what is stored.
pub fn from_storage(kind: &Kind, value: Value) -> Value {
    convert(kind, value, false)
}

fn convert(kind: &Kind, mut value: Value, to_storage: bool) -> Value {
    let Some(stored_as) = kind.stored_as else { return value };
    match (kind.kind, to_storage) {
        ("Event", _) => rename(&mut value, to_storage),
        ("HorizontalPodAutoscaler", true) => autoscaler::to_v2(&mut value),
        ("HorizontalPodAutoscaler", false) => autoscaler::to_v1(&mut value),
        _ => {}
    }
    let (group, version) = if to_storage { stored_as } else { (kind.group, kind.version) };
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    value.set("apiVersion", api_version);
    value
}

/// Names in events.k8s.io and in the core group. The rest is called the same.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
    ("reportingController", "reportingComponent"),
];

fn rename(value: &mut Value, to_storage: bool) {
    for (events, core) in EVENT_FIELDS {
        let (from, to) = if to_storage { (events, core) } else { (core, events) };
        if let Some(field) = value.unset(from) {
            value.set(to, field);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(group: &str, plural: &str, shown: Value, stored: Value) {
        let kind = Kind::by_plural(group, "v1", plural).unwrap();
        assert_eq!(to_storage(kind, shown.clone()), stored);
        assert_eq!(from_storage(kind, stored), shown);
    }

    #[test]
    fn events_are_one_resource_under_two_names() {
        check(
            "events.k8s.io",
            "events",
            json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "regarding": {"name": "p"}, "note": "hi",
                   "reason": "R", "deprecatedCount": 2, "reportingController": "c", "eventTime": null}),
            json!({"apiVersion": "v1", "kind": "Event", "involvedObject": {"name": "p"}, "message": "hi",
                   "reason": "R", "count": 2, "reportingComponent": "c", "eventTime": null}),
        );
    }
}
