//! Autoscalers of v1, which know only the use of cpu: all else travels in annotations.
//!
//! The annotations hold what upstream's do: metrics in a form of their own, which was v2alpha1's, and
//! behaviour with the names of Go's fields. Upstream: pkg/apis/autoscaling/v1/conversion.go.

use serde_json::{Map, Value, json};

use crate::kinds::tree::Tree;

const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// Where a member of a metric stands in v2, and what it is called in annotations.
type Names = &'static [(&'static str, &'static str)];

/// The types of metrics: the member that each has, and names in specification and status.
#[rustfmt::skip]
const SOURCES: &[(&str, Names, Names)] = &[
    ("resource",
        &[("name", "name"), ("target/averageUtilization", "targetAverageUtilization"), ("target/averageValue", "targetAverageValue")],
        &[("name", "name"), ("current/averageUtilization", "currentAverageUtilization"), ("current/averageValue", "currentAverageValue")]),
    ("containerResource",
        &[("name", "name"), ("container", "container"), ("target/averageUtilization", "targetAverageUtilization"), ("target/averageValue", "targetAverageValue")],
        &[("name", "name"), ("container", "container"), ("current/averageUtilization", "currentAverageUtilization"), ("current/averageValue", "currentAverageValue")]),
    ("pods",
        &[("metric/name", "metricName"), ("metric/selector", "selector"), ("target/averageValue", "targetAverageValue")],
        &[("metric/name", "metricName"), ("metric/selector", "selector"), ("current/averageValue", "currentAverageValue")]),
    ("object",
        &[("describedObject", "target"), ("metric/name", "metricName"), ("metric/selector", "selector"), ("target/value", "targetValue"), ("target/averageValue", "averageValue")],
        &[("describedObject", "target"), ("metric/name", "metricName"), ("metric/selector", "selector"), ("current/value", "currentValue"), ("current/averageValue", "averageValue")]),
    ("external",
        &[("metric/name", "metricName"), ("metric/selector", "metricSelector"), ("target/value", "targetValue"), ("target/averageValue", "targetAverageValue")],
        &[("metric/name", "metricName"), ("metric/selector", "metricSelector"), ("current/value", "currentValue"), ("current/averageValue", "currentAverageValue")]),
];

/// A metric of v2 as annotations have it.
fn old_metric(metric: &Value, status: bool) -> Value {
    let mut old = json!({"type": metric.at("type")});
    for (source, spec_names, status_names) in SOURCES {
        let Some(from) = metric.get(*source).filter(|from| from.is_object()) else { continue };
        let mut to = json!({});
        for (new_name, old_name) in if status { *status_names } else { *spec_names } {
            if let Some(value) = from.pointer(&format!("/{new_name}")).filter(|value| !value.is_null()) {
                to.set(old_name, value.clone());
            }
        }
        old.set(source, to);
    }
    old
}

/// A metric of an annotation as v2 has it.
fn new_metric(metric: &Value, status: bool) -> Value {
    let mut new = json!({"type": metric.at("type")});
    for (source, spec_names, status_names) in SOURCES {
        let Some(from) = metric.get(*source).filter(|from| from.is_object()) else { continue };
        let mut to = json!({});
        for (new_name, old_name) in if status { *status_names } else { *spec_names } {
            let Some(value) = from.get(*old_name).filter(|value| !value.is_null()) else { continue };
            match new_name.split_once('/') {
                // A value that cannot be left out there is nought where the target is an average.
                Some((_, "value")) if value == "0" && from.has("averageValue") => {}
                Some((part, name)) => to.object(part).set(name, value.clone()),
                None => to.set(new_name, value.clone()),
            }
        }
        if !status && to.has("target") {
            let target = to.object("target");
            let kind = match () {
                () if target.has("averageUtilization") => "Utilization",
                () if target.has("averageValue") => "AverageValue",
                () => "Value",
            };
            target.set("type", kind);
        }
        new.set(source, to);
    }
    new
}

/// Changes the first letter of each member's name, however deep. What is null was never said.
fn renamed(value: Value, letter: fn(char) -> char) -> Value {
    match value {
        Value::Object(members) => members
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| {
                let mut letters = name.chars();
                let first: String = letters.next().map(letter).into_iter().collect();
                (first + letters.as_str(), renamed(value, letter))
            })
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(items) => items.into_iter().map(|item| renamed(item, letter)).collect(),
        other => other,
    }
}

/// Makes an autoscaler of v1 of one of v2.
pub fn to_v1(value: &mut Value) {
    let spec = value.object("spec");
    let metrics = spec.unset("metrics");
    let behavior = spec.unset("behavior").map(|behavior| renamed(behavior, |c| c.to_ascii_uppercase()));
    let mut others = items(metrics.as_ref());
    if let Some((at, target)) = cpu(&others, "target") {
        others.remove(at);
        spec.set("targetCPUUtilizationPercentage", target);
    }
    let old = |metrics: &[Value], status| metrics.iter().map(|m| old_metric(m, status)).collect::<Value>();
    let mut notes = vec![(METRICS, Some(old(&others, false))), (BEHAVIOR, behavior)];
    if let Some(status) = value.sub("status") {
        let current = items(status.unset("currentMetrics").as_ref());
        if let Some((_, percent)) = cpu(&current, "current") {
            status.set("currentCPUUtilizationPercentage", percent);
        }
        notes
            .extend([(CURRENT_METRICS, Some(old(&current, true))), (CONDITIONS, status.unset("conditions"))]);
    }
    let empty = |v: &Value| v.is_null() || v == &json!([]) || v == &json!({});
    for (name, note) in notes {
        if let Some(note) = note.filter(|note| !empty(note)) {
            value.object("metadata").object("annotations").set(name, note.to_string());
        }
    }
}

fn items(list: Option<&Value>) -> Vec<Value> {
    list.and_then(Value::as_array).cloned().unwrap_or_default()
}

/// The first metric that is the percentage of cpu: where it is, and how much.
fn cpu(metrics: &[Value], part: &str) -> Option<(usize, i64)> {
    metrics.iter().enumerate().find_map(|(at, metric)| {
        let resource = metric.at("resource");
        let is_cpu = metric.text("type") == "Resource" && resource.text("name") == "cpu";
        let percent = resource.at(part).int("averageUtilization").filter(|_| is_cpu)?;
        Some((at, percent))
    })
}

/// Makes an autoscaler of v2 of one of v1.
pub fn to_v2(value: &mut Value) {
    let mut note = |name: &str| -> Option<Value> {
        let annotations = value.sub("metadata")?.sub("annotations")?;
        let parsed = serde_json::from_str(annotations.text(name)).ok()?;
        annotations.unset(name);
        Some(parsed)
    };
    let (metrics, current) = (items(note(METRICS).as_ref()), note(CURRENT_METRICS));
    let (conditions, behavior) = (items(note(CONDITIONS).as_ref()), note(BEHAVIOR).filter(Value::is_object));
    if let Some(metadata) = value.sub("metadata") {
        metadata.unset_empty("annotations");
    }
    let spec = value.object("spec");
    let mut metrics: Vec<Value> = metrics.iter().map(|metric| new_metric(metric, false)).collect();
    if let Some(percent) = spec.unset("targetCPUUtilizationPercentage").filter(|p| p != &json!(0)) {
        let target = json!({"type": "Utilization", "averageUtilization": percent});
        metrics.insert(0, json!({"type": "Resource", "resource": {"name": "cpu", "target": target}}));
    }
    set_unless_empty(spec, "metrics", metrics);
    if let Some(behavior) = behavior {
        spec.set("behavior", renamed(behavior, |c| c.to_ascii_lowercase()));
    }
    let mut status: Map<String, Value> = match value.unset("status") {
        Some(Value::Object(status)) => status,
        _ => Map::new(),
    };
    let percent = status.remove("currentCPUUtilizationPercentage");
    // The annotation says more, and of cpu, too.
    let current: Vec<Value> = match (current, percent) {
        (Some(current), _) => items(Some(&current)).iter().map(|metric| new_metric(metric, true)).collect(),
        (None, Some(percent)) => {
            let now = json!({"averageUtilization": percent});
            vec![json!({"type": "Resource", "resource": {"name": "cpu", "current": now}})]
        }
        (None, None) => vec![],
    };
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

    /// Shows `v2` as v1, which is `v1`, and takes it back.
    #[track_caller]
    fn check(v2: Value, v1: Value) {
        let mut value = v2.clone();
        to_v1(&mut value);
        assert_eq!(value, v1);
        to_v2(&mut value);
        assert_eq!(value, v2);
    }

    #[test]
    fn cpu_has_members_of_its_own() {
        check(
            json!({"metadata": {"name": "h"},
                   "spec": {"maxReplicas": 3, "metrics": [{"type": "Resource", "resource":
                       {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}}]},
                   "status": {"currentReplicas": 1, "currentMetrics": [{"type": "Resource", "resource":
                       {"name": "cpu", "current": {"averageUtilization": 5, "averageValue": "50m"}}}]}}),
            json!({"metadata": {"name": "h", "annotations": {CURRENT_METRICS:
                       r#"[{"resource":{"currentAverageUtilization":5,"currentAverageValue":"50m","name":"cpu"},"type":"Resource"}]"#}},
                   "spec": {"maxReplicas": 3, "targetCPUUtilizationPercentage": 80},
                   "status": {"currentReplicas": 1, "currentCPUUtilizationPercentage": 5}}),
        );
        let mut old =
            json!({"metadata": {"name": "h"}, "spec": {}, "status": {"currentCPUUtilizationPercentage": 5}});
        to_v2(&mut old);
        assert_eq!(
            old["status"]["currentMetrics"][0]["resource"]["current"],
            json!({"averageUtilization": 5})
        );
    }

    #[test]
    fn every_type_of_metric_comes_back_as_it_was() {
        let metric = json!({"name": "qps", "selector": {"matchLabels": {"a": "b"}}});
        let object = json!({"kind": "Service", "name": "web", "apiVersion": "v1"});
        let average = json!({"type": "AverageValue", "averageValue": "5"});
        let whole = json!({"type": "Value", "value": "5"});
        let sources = [
            (
                "Resource",
                "resource",
                json!({"name": "memory", "target": {"type": "Utilization", "averageUtilization": 7}}),
            ),
            ("Resource", "resource", json!({"name": "cpu", "target": average})),
            (
                "ContainerResource",
                "containerResource",
                json!({"name": "cpu", "container": "c", "target": average}),
            ),
            ("Pods", "pods", json!({"metric": metric, "target": average})),
            ("Object", "object", json!({"describedObject": object, "metric": metric, "target": whole})),
            ("Object", "object", json!({"describedObject": object, "metric": metric, "target": average})),
            ("External", "external", json!({"metric": metric, "target": whole})),
            ("External", "external", json!({"metric": metric, "target": average})),
        ];
        for (kind, member, source) in sources {
            let mut status = source.clone();
            let mut target = status.unset("target").unwrap();
            target.unset("type");
            status.set("current", target);
            let v2 = json!({"metadata": {"name": "h"},
                "spec": {"maxReplicas": 3, "metrics": [{"type": kind, member: source}]},
                "status": {"currentMetrics": [{"type": kind, member: status}]}});
            let mut value = v2.clone();
            to_v1(&mut value);
            assert!(value["spec"].get("metrics").is_none() && value["metadata"]["annotations"].has(METRICS));
            to_v2(&mut value);
            assert_eq!(value, v2);
        }
    }

    #[test]
    fn behaviour_and_conditions_are_kept() {
        check(
            json!({"metadata": {"name": "h", "annotations": {"mine": "x"}},
                   "spec": {"behavior": {"scaleUp": {"stabilizationWindowSeconds": 0, "tolerance": "50m",
                       "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}]}}},
                   "status": {"conditions": [{"type": "AbleToScale", "status": "True"}]}}),
            json!({"metadata": {"name": "h", "annotations": {"mine": "x",
                       BEHAVIOR: r#"{"ScaleUp":{"Policies":[{"PeriodSeconds":15,"Type":"Pods","Value":4}],"StabilizationWindowSeconds":0,"Tolerance":"50m"}}"#,
                       CONDITIONS: r#"[{"status":"True","type":"AbleToScale"}]"#}},
                   "spec": {}, "status": {}}),
        );
    }

    #[test]
    fn annotations_as_upstream_writes_them_are_understood() {
        let mut value = json!({"metadata": {"name": "h", "annotations": {
            METRICS: r#"[{"type":"Object","object":{"target":{"kind":"Service","name":"web"},"metricName":"qps","targetValue":"0","averageValue":"7"}}]"#,
            BEHAVIOR: r#"{"ScaleUp":{"StabilizationWindowSeconds":0,"SelectPolicy":"Max","Policies":[{"Type":"Pods","Value":4,"PeriodSeconds":15}],"Tolerance":null},"ScaleDown":null}"#,
        }}, "spec": {"maxReplicas": 3}});
        to_v2(&mut value);
        assert_eq!(
            value["spec"]["metrics"],
            json!([{"type": "Object", "object": {"describedObject": {"kind": "Service", "name": "web"},
                "metric": {"name": "qps"}, "target": {"type": "AverageValue", "averageValue": "7"}}}])
        );
        assert_eq!(
            value["spec"]["behavior"],
            json!({"scaleUp": {"stabilizationWindowSeconds": 0, "selectPolicy": "Max",
                "policies": [{"type": "Pods", "value": 4, "periodSeconds": 15}]}})
        );
    }
}
