//! What a pod's spec says of the nodes it may be on: node selector, required node affinity, tolerations.
//!
//! Upstream: component-helpers, scheduling/corev1 and its nodeaffinity.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration};

/// Whether the node selector and the required node affinity of `pod` allow the node of this name and labels.
pub fn selects_node(pod: &PodSpec, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let selected = pod.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = pod.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected && required.is_none_or(|r| r.node_selector_terms.iter().any(|t| term_holds(t, name, labels)))
}

/// Whether all of a term holds; one that asks for nothing holds nowhere.
pub fn term_holds(term: &NodeSelectorTerm, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|r| requirement_holds(r, labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| r.key == "metadata.name" && requirement_holds(r, Some(name)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = || value.is_some_and(|value| values.iter().any(|wanted| wanted == value));
    let numbers = || Some((value?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(have, limit)| have > limit),
        "Lt" => numbers().is_some_and(|(have, limit)| have < limit),
        _ => false,
    }
}

/// Whether the toleration bears the taint.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    fn text(field: &Option<String>) -> &str {
        field.as_deref().unwrap_or_default()
    }
    let (key, effect) = (text(&toleration.key), text(&toleration.effect));
    if !(effect.is_empty() || effect == taint.effect) || !(key.is_empty() || key == taint.key) {
        return false;
    }
    match text(&toleration.operator) {
        "Exists" => true,
        "" | "Equal" => !key.is_empty() && text(&toleration.value) == text(&taint.value),
        // Gt and Lt as well, which no cluster of v1.37 lets in unless it is asked to.
        _ => false,
    }
}

/// Whether every one of `taints` that has one of these effects is borne.
pub fn tolerates_all(tolerations: &[Toleration], taints: &[Taint], effects: &[&str]) -> bool {
    let mut counted = taints.iter().filter(|taint| effects.contains(&taint.effect.as_str()));
    counted.all(|taint| tolerations.iter().any(|toleration| tolerates(toleration, taint)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[track_caller]
    fn check(spec: Value, want: bool) {
        let spec: PodSpec = serde_json::from_value(spec).expect("a spec");
        let labels = [("zone", "a"), ("size", "5")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert_eq!(selects_node(&spec, "n1", &labels), want);
    }

    fn required(terms: Value) -> Value {
        let required = json!({ "nodeSelectorTerms": terms });
        json!({ "containers": [], "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": required } } })
    }

    fn one(list: &str, key: &str, operator: &str, values: &[&str]) -> Value {
        required(json!([{ list: [{ "key": key, "operator": operator, "values": values }] }]))
    }

    #[test]
    fn nodes_are_selected_by_label_and_name() {
        check(json!({ "containers": [] }), true);
        check(json!({ "containers": [], "nodeSelector": { "zone": "a" } }), true);
        check(json!({ "containers": [], "nodeSelector": { "zone": "b" } }), false);
        check(one("matchExpressions", "zone", "In", &["b", "a"]), true);
        check(one("matchExpressions", "zone", "NotIn", &["a"]), false);
        check(one("matchExpressions", "disk", "NotIn", &["a"]), true);
        check(one("matchExpressions", "disk", "Exists", &[]), false);
        check(one("matchExpressions", "disk", "DoesNotExist", &[]), true);
        check(one("matchExpressions", "size", "Gt", &["4"]), true);
        check(one("matchExpressions", "size", "Lt", &["4"]), false);
        check(one("matchExpressions", "zone", "Gt", &["4"]), false);
        check(one("matchFields", "metadata.name", "In", &["n1"]), true);
        check(one("matchFields", "metadata.name", "In", &["n2"]), false);
        check(one("matchFields", "metadata.uid", "NotIn", &["x"]), false);
        check(required(json!([])), false);
        check(required(json!([{}])), false);
        let either = json!([{}, { "matchExpressions": [{ "key": "zone", "operator": "Exists" }] }]);
        check(required(either), true);
    }

    #[track_caller]
    fn check_toleration(toleration: Value, want: bool) {
        let toleration = serde_json::from_value(toleration).expect("a toleration");
        let taint = Taint {
            key: "level".into(),
            value: Some("5".into()),
            effect: "NoSchedule".into(),
            ..Taint::default()
        };
        assert_eq!(tolerates(&toleration, &taint), want);
        assert_eq!(tolerates_all(&[toleration], std::slice::from_ref(&taint), &["NoSchedule"]), want);
        assert!(tolerates_all(&[], &[taint], &["NoExecute"]), "other effects do not count");
    }

    #[test]
    fn tolerations_bear_taints() {
        check_toleration(json!({ "operator": "Exists" }), true);
        check_toleration(json!({ "key": "level", "operator": "Exists" }), true);
        check_toleration(json!({ "key": "other", "operator": "Exists" }), false);
        check_toleration(json!({ "key": "level", "operator": "Exists", "effect": "NoExecute" }), false);
        check_toleration(json!({ "key": "level", "value": "5" }), true);
        check_toleration(json!({ "key": "level", "operator": "Equal", "value": "6" }), false);
        check_toleration(json!({ "value": "5" }), false);
        check_toleration(json!({ "key": "level", "operator": "Gt", "value": "4" }), false);
    }
}
