//! Resources that are served in two versions and stored in one: events of both groups, autoscalers of v1.
//!
//! Upstream: pkg/apis/core/v1 and events/v1 conversion, pkg/apis/autoscaling/v1/conversion.go.

use std::sync::Arc;

use minke_api::{Kind, Object, schema};
use serde_json::{Map, Value, json};

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
        ("HorizontalPodAutoscaler", true) => to_v2(&mut value),
        ("HorizontalPodAutoscaler", false) => to_v1(&mut value),
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

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// A metric of v1 knows only the use of cpu; all else travels in annotations.
fn to_v1(value: &mut Value) {
    let spec = value.object("spec");
    let metrics = spec.unset("metrics");
    let behavior = spec.unset("behavior");
    let (cpu, others) = split_cpu(metrics, "target");
    if let Some(target) = cpu {
        spec.set("targetCPUUtilizationPercentage", target);
    }
    let mut notes = vec![(METRICS, others), (BEHAVIOR, behavior)];
    if let Some(status) = value.sub("status") {
        let (cpu, others) = split_cpu(status.unset("currentMetrics"), "current");
        if let Some(current) = cpu {
            status.set("currentCPUUtilizationPercentage", current);
        }
        notes.extend([(CURRENT_METRICS, others), (CONDITIONS, status.unset("conditions"))]);
    }
    let empty = |v: &Value| v.is_null() || v == &json!([]) || v == &json!({});
    for (name, note) in notes {
        if let Some(note) = note.filter(|note| !empty(note)) {
            value.object("metadata").object("annotations").set(name, note.to_string());
        }
    }
}

/// Takes the percentage of cpu out of a list of metrics.
fn split_cpu(metrics: Option<Value>, part: &str) -> (Option<i64>, Option<Value>) {
    let Some(Value::Array(mut list)) = metrics else { return (None, metrics) };
    let percent = |metric: &Value| {
        let resource = metric.at("resource");
        let is_cpu = metric.text("type") == "Resource" && resource.text("name") == "cpu";
        resource.at(part).int("averageUtilization").filter(|_| is_cpu)
    };
    let Some(at) = list.iter().position(|metric| percent(metric).is_some()) else {
        return (None, Some(Value::Array(list)));
    };
    let cpu = percent(&list.remove(at));
    (cpu, Some(Value::Array(list)))
}

fn to_v2(value: &mut Value) {
    let mut note = |name: &str| -> Option<Value> {
        let annotations = value.sub("metadata")?.sub("annotations")?;
        let parsed = serde_json::from_str(annotations.text(name)).ok()?;
        annotations.unset(name);
        Some(parsed)
    };
    let list = |note: Option<Value>| match note {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    };
    let (mut metrics, mut current) = (list(note(METRICS)), list(note(CURRENT_METRICS)));
    let (conditions, behavior) = (list(note(CONDITIONS)), note(BEHAVIOR).filter(Value::is_object));
    if let Some(metadata) = value.sub("metadata") {
        metadata.unset_empty("annotations");
    }
    let spec = value.object("spec");
    if let Some(percent) = spec.unset("targetCPUUtilizationPercentage").filter(|p| p != &json!(0)) {
        let target = json!({"type": "Utilization", "averageUtilization": percent});
        metrics.insert(0, json!({"type": "Resource", "resource": {"name": "cpu", "target": target}}));
    }
    set_unless_empty(spec, "metrics", metrics);
    if let Some(behavior) = behavior {
        spec.set("behavior", behavior);
    }
    let mut status: Map<String, Value> = match value.unset("status") {
        Some(Value::Object(status)) => status,
        _ => Map::new(),
    };
    if let Some(percent) = status.remove("currentCPUUtilizationPercentage") {
        let now = json!({"averageUtilization": percent});
        current.insert(0, json!({"type": "Resource", "resource": {"name": "cpu", "current": now}}));
    }
    let mut status = Value::Object(status);
    set_unless_empty(&mut status, "currentMetrics", current);
    set_unless_empty(&mut status, "conditions", conditions);
    if status != json!({}) {
        value.set("status", status);
    }
}

fn set_unless_empty(value: &mut Value, field: &str, list: Vec<Value>) {
    if !list.is_empty() {
        value.set(field, list);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn autoscalers_of_v1_keep_what_v1_does_not_know() {
        check(
            "autoscaling",
            "horizontalpodautoscalers",
            json!({"apiVersion": "autoscaling/v1", "metadata": {"name": "h"},
                   "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 80},
                   "status": {"currentReplicas": 1, "currentCPUUtilizationPercentage": 5}}),
            json!({"apiVersion": "autoscaling/v2", "metadata": {"name": "h"},
                   "spec": {"maxReplicas": 3, "metrics": [{"type": "Resource", "resource":
                       {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]},
                   "status": {"currentReplicas": 1, "currentMetrics": [{"type": "Resource", "resource":
                       {"name": "cpu", "current": {"averageUtilization": 5}}}]}}),
        );
        let memory = json!({"apiVersion": "autoscaling/v2", "metadata": {"name": "h"},
            "spec": {"behavior": {"scaleUp": {}}, "metrics": [{"type": "Resource", "resource": {"name": "memory"}}]}});
        let kind = Kind::by_plural("autoscaling", "v1", "horizontalpodautoscalers").unwrap();
        let shown = from_storage(kind, memory.clone());
        assert!(shown["metadata"]["annotations"][METRICS].as_str().unwrap().contains("memory"));
        assert_eq!(to_storage(kind, shown), memory);
    }
}
