//! The Pod and PodTemplate strategies: what a pod begins with and what may change of it.
//!
//! Upstream: pkg/registry/core/pod and ValidatePodUpdate.

use minke_api::FieldErrors;
use serde_json::{Value, json};

use super::pod_spec::{pod_only_defaults, pod_spec_defaults, template_defaults};
use super::pod_validation;
use super::resources::qos_class;
use super::tree::Tree;
use crate::strategy::Strategy;

pub static POD: Strategy = Strategy {
    set_defaults: |pod| {
        pod_spec_defaults(pod.object("spec"));
        pod_only_defaults(pod.object("spec"));
    },
    prepare_create,
    validate: pod_validation::validate_pod,
    validate_update,
    warnings: |pod| super::pod_warnings::pod_warnings(pod.at("spec"), "spec"),
    generation: true,
    returns_deleted: true,
    ..Strategy::PLAIN
};

pub static POD_TEMPLATE: Strategy = Strategy {
    set_defaults: |object| template_defaults(object.object("template")),
    validate: |object, errors| pod_validation::validate_template(object.at("template"), "template", errors),
    generation: true,
    returns_deleted: true,
    ..Strategy::PLAIN
};

fn prepare_create(pod: &mut Value) {
    let mut status = json!({"phase": "Pending", "qosClass": qos_class(pod.at("spec"))});
    if pod.at("spec").has("schedulingGates") {
        status["conditions"] = json!([{
            "type": "PodScheduled",
            "status": "False",
            "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
            "lastProbeTime": null,
            "lastTransitionTime": null,
        }]);
    }
    pod.set("status", status);
}

/// What a user may change of a pod: images, a shorter deadline, more tolerations, fewer gates.
fn validate_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let (new_spec, old_spec) = (new.at("spec"), old.at("spec"));
    for list in ["containers", "initContainers"] {
        if new_spec.items(list).len() != old_spec.items(list).len() {
            errors.forbidden(&format!("spec.{list}"), "pod updates may not add or remove containers");
            return;
        }
        for (n, container) in new_spec.items(list).iter().enumerate() {
            if container.text("image").is_empty() {
                errors.required(&format!("spec.{list}[{n}].image"), "");
            }
        }
    }
    deadline_only_shrinks(new_spec, old_spec, errors);
    tolerations_only_grow(new_spec, old_spec, errors);
    gates_only_go(new_spec, old_spec, errors);
    // All that may change is put back; then nothing may differ.
    let mut masked = new_spec.clone();
    for list in ["containers", "initContainers"] {
        for (container, before) in masked.each(list).zip(old_spec.items(list)) {
            container.set("image", before.text("image"));
        }
    }
    for field in ["activeDeadlineSeconds", "tolerations", "schedulingGates"] {
        put_back(&mut masked, old_spec, field);
    }
    if old_spec.has("schedulingGates") {
        // A gated pod may narrow where it is to go; more than that is not checked here.
        put_back(&mut masked, old_spec, "nodeSelector");
        if let (Some(affinity), Some(before)) =
            (masked.sub("affinity").map(|a| a.clone()), old_spec.get("affinity"))
            && affinity.get("podAffinity") == before.get("podAffinity")
            && affinity.get("podAntiAffinity") == before.get("podAntiAffinity")
        {
            put_back(&mut masked, old_spec, "affinity");
        }
        node_selector_only_grows(new_spec, old_spec, errors);
    }
    if old_spec.int("terminationGracePeriodSeconds").is_some_and(|s| s < 0)
        && new_spec.int("terminationGracePeriodSeconds") == Some(1)
    {
        put_back(&mut masked, old_spec, "terminationGracePeriodSeconds");
    }
    if !same(&masked, old_spec) {
        errors.forbidden(
            "spec",
            &format!(
                "pod updates may not change fields other than `spec.containers[*].image`,\
                 `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to \
                 existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was \
                 previously negative)\n{}",
                difference(&masked, old_spec, "spec")
            ),
        );
    }
}

fn put_back(spec: &mut Value, old: &Value, field: &str) {
    match old.get(field) {
        Some(value) => spec.set(field, value.clone()),
        None => _ = spec.unset(field),
    }
}

/// Equality in which absent, null and empty are the same.
pub fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a
            .keys()
            .chain(b.keys())
            .all(|key| same(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null))),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || is_empty(a) && is_empty(b),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.values().all(is_empty),
    }
}

/// The fields that differ, each with what it would become and what it is.
fn difference(new: &Value, old: &Value, path: &str) -> String {
    let mut lines = Vec::new();
    collect_differences(new, old, path, &mut lines);
    lines.join("\n")
}

/// Enough differences to see what is wrong.
const MAX_DIFFERENCES: usize = 20;

fn collect_differences(new: &Value, old: &Value, path: &str, lines: &mut Vec<String>) {
    if same(new, old) || lines.len() >= MAX_DIFFERENCES {
        return;
    }
    match (new, old) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> =
                a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))).collect();
            keys.sort();
            for key in keys {
                collect_differences(new.at(key), old.at(key), &format!("{path}.{key}"), lines);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                collect_differences(a, b, &format!("{path}[{n}]"), lines);
            }
        }
        _ => lines.push(format!("-{path}: {old}\n+{path}: {new}")),
    }
}

fn deadline_only_shrinks(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let field = "spec.activeDeadlineSeconds";
    match (new.int("activeDeadlineSeconds"), old.int("activeDeadlineSeconds")) {
        (Some(new), _) if !(0..=i64::from(i32::MAX)).contains(&new) => {
            errors.invalid(field, new, "must be between 0 and 2147483647, inclusive");
        }
        (Some(new), Some(old)) if new > old => {
            errors.invalid(field, new, "must be less than or equal to previous value");
        }
        (None, Some(_)) => {
            errors.invalid(field, &Value::Null, "must not update from a positive integer to nil value");
        }
        _ => {}
    }
}

fn tolerations_only_grow(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let identity = |t: &Value| ["key", "operator", "value", "effect"].map(|field| t.text(field).to_owned());
    let lost = old
        .items("tolerations")
        .iter()
        .any(|before| !new.items("tolerations").iter().any(|now| identity(now) == identity(before)));
    if lost {
        errors.forbidden(
            "spec.tolerations",
            "existing toleration can not be modified except its tolerationSeconds",
        );
    }
}

fn gates_only_go(new: &Value, old: &Value, errors: &mut FieldErrors) {
    for (n, gate) in new.items("schedulingGates").iter().enumerate() {
        if !old.items("schedulingGates").iter().any(|before| before.text("name") == gate.text("name")) {
            errors.forbidden(
                &format!("spec.schedulingGates[{n}].name"),
                &format!("only deletion is allowed, but found new scheduling gate '{}'", gate.text("name")),
            );
        }
    }
}

fn node_selector_only_grows(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let kept = old.members("nodeSelector").all(|(key, value)| new.at("nodeSelector").get(key) == Some(value));
    if !kept {
        errors.invalid(
            "spec.nodeSelector",
            new.at("nodeSelector"),
            "only additions are allowed (no mutations or deletions)",
        );
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    fn pod() -> Value {
        let mut pod = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"containers": [{"name": "c", "image": "nginx:1"}],
                "tolerations": [{"key": "a", "operator": "Exists"}]},
        });
        (POD.set_defaults)(&mut pod);
        pod
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), want: &str) {
        let old = pod();
        let mut new = old.clone();
        change(&mut new["spec"]);
        let mut errors = FieldErrors::default();
        validate_update(&new, &old, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").unwrap();
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"web\" is invalid: ").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn little_of_a_pod_may_change() {
        check(|_| {}, "");
        check(|spec| spec["containers"][0]["image"] = "nginx:2".into(), "");
        check(|spec| spec["activeDeadlineSeconds"] = 5.into(), "");
        check(|spec| spec["tolerations"].as_array_mut().unwrap().push(json!({"key": "b"})), "");
        check(
            |spec| spec["tolerations"] = json!([]),
            "spec.tolerations: Forbidden: existing toleration can not be modified",
        );
        check(
            |spec| spec["nodeName"] = "n2".into(),
            "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`",
        );
        check(
            |spec| spec["containers"][0]["command"] = json!(["x"]),
            "spec: Forbidden: pod updates may not change",
        );
        check(
            |spec| spec["containers"] = json!([]),
            "spec.containers: Forbidden: pod updates may not add or remove containers",
        );
        check(|spec| spec["hostNetwork"] = false.into(), "");
    }
}
