//! What pods say of where they want to be: node selectors, tolerations, selectors of other pods.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use minke_api::LabelSelector;

use crate::picture::{Node, PodInfo};

/// Whether the node is one that the pod's nodeSelector and required node affinity allow.
pub fn node_is_wanted(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let selected =
        spec.node_selector.iter().flatten().all(|(key, value)| node.labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|required| required.node_selector_terms.iter().any(|t| term_matches(t, node)))
}

/// Whether all of a term holds; a term without requirements matches nothing.
pub fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|r| requirement_holds(r, node.labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(|r| r.key == "metadata.name" && requirement_holds(r, Some(&node.name)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let number = |text: Option<&str>| text.and_then(|text| text.parse::<i64>().ok());
    let compare =
        |holds: fn(i64, i64) -> bool| match (number(value), number(values.first().map(String::as_str))) {
            (Some(have), Some(want)) => holds(have, want),
            _ => false,
        };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|value| values.iter().any(|v| v == value)),
        "NotIn" => value.is_none_or(|value| values.iter().all(|v| v != value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(|have, want| have > want),
        "Lt" => compare(|have, want| have < want),
        _ => false,
    }
}

/// Whether one of the tolerations bears the taint.
pub fn tolerated(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let effect = text(&toleration.effect);
        if !effect.is_empty() && effect != taint.effect {
            return false;
        }
        let key = text(&toleration.key);
        if !key.is_empty() && key != taint.key {
            return false;
        }
        let (have, bound) = (text(&taint.value), text(&toleration.value));
        let numbers = || Some((have.parse::<i64>().ok()?, bound.parse::<i64>().ok()?));
        match text(&toleration.operator).as_str() {
            "Exists" => true,
            "" | "Equal" => !key.is_empty() && bound == have,
            // KEP-5471.
            "Gt" => numbers().is_some_and(|(have, bound)| have > bound),
            "Lt" => numbers().is_some_and(|(have, bound)| have < bound),
            _ => false,
        }
    })
}

/// A selector of pods that stands in a pod's specification; one that can't be read selects nothing.
pub fn pod_selector(spec: Option<&meta::LabelSelector>) -> LabelSelector {
    match spec {
        None => LabelSelector::nothing(),
        Some(spec) => LabelSelector::from_spec(spec).unwrap_or_else(|_| LabelSelector::nothing()),
    }
}

/// An affinity term, resolved for the pod that carries it.
#[derive(Debug)]
pub struct Term {
    pub topology_key: String,
    selector: LabelSelector,
    namespaces: Vec<String>,
    all_namespaces: bool,
}

impl Term {
    /// `of` is the pod that carries the term. A selector of namespaces by label is taken as all namespaces
    /// when it is empty; otherwise the labels of namespaces are looked up in `namespaces`.
    pub fn new(
        term: &PodAffinityTerm,
        of: &PodInfo,
        namespaces: &BTreeMap<String, minke_api::Labels>,
    ) -> Term {
        let mut selector = term.label_selector.clone();
        for (keys, operator) in [(&term.match_label_keys, "In"), (&term.mismatch_label_keys, "NotIn")] {
            for key in keys.iter().flatten() {
                let Some(value) = of.object.labels().get(key) else { continue };
                let requirement = meta::LabelSelectorRequirement {
                    key: key.clone(),
                    operator: operator.to_owned(),
                    values: Some(vec![value.to_owned()]),
                };
                selector.get_or_insert_default().match_expressions.get_or_insert_default().push(requirement);
            }
        }
        let mut named = term.namespaces.clone().unwrap_or_default();
        let mut all_namespaces = false;
        if let Some(wanted) = &term.namespace_selector {
            let wanted = pod_selector(Some(wanted));
            all_namespaces = wanted.is_everything();
            named.extend(
                namespaces.iter().filter(|(_, labels)| wanted.matches(labels)).map(|(n, _)| n.clone()),
            );
        } else if named.is_empty() {
            named.push(of.object.namespace().to_owned());
        }
        Term {
            topology_key: term.topology_key.clone(),
            selector: pod_selector(selector.as_ref()),
            namespaces: named,
            all_namespaces,
        }
    }

    pub fn matches(&self, pod: &PodInfo) -> bool {
        (self.all_namespaces || self.namespaces.iter().any(|n| n == pod.object.namespace()))
            && self.selector.matches(pod.object.labels())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[track_caller]
    fn check_toleration(toleration: Value, taint: Value, want: bool) {
        let toleration: Toleration = serde_json::from_value(toleration).unwrap();
        let taint: Taint = serde_json::from_value(taint).unwrap();
        assert_eq!(tolerated(&[toleration], &taint), want);
    }

    #[test]
    fn tolerations_bear_taints() {
        let taint = json!({"key": "gpu", "value": "a", "effect": "NoSchedule"});
        check_toleration(json!({"operator": "Exists"}), taint.clone(), true);
        check_toleration(json!({"key": "gpu", "operator": "Exists"}), taint.clone(), true);
        check_toleration(json!({"key": "gpu", "value": "a", "effect": "NoSchedule"}), taint.clone(), true);
        check_toleration(json!({"key": "gpu", "value": "b"}), taint.clone(), false);
        check_toleration(json!({"key": "gpu", "value": "a", "effect": "NoExecute"}), taint.clone(), false);
        check_toleration(json!({"key": "cpu", "operator": "Exists"}), taint, false);
    }

    #[track_caller]
    fn check_node(spec: Value, labels: Value, want: bool) {
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        let mut picture = crate::picture::Picture::default();
        picture.put_node(&crate::picture::tests::node("n1", json!({}), labels));
        assert_eq!(node_is_wanted(&pod, &picture.nodes()[0]), want);
    }

    fn required(terms: Value) -> Value {
        json!({"containers": [], "affinity": {"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
    }

    #[test]
    fn node_selectors_choose_nodes() {
        let ssd = json!({"disk": "ssd", "cores": "16"});
        check_node(json!({"containers": []}), ssd.clone(), true);
        check_node(json!({"containers": [], "nodeSelector": {"disk": "ssd"}}), ssd.clone(), true);
        check_node(json!({"containers": [], "nodeSelector": {"disk": "hdd"}}), ssd.clone(), false);
        let term = |key: &str, operator: &str, values: Value| {
            required(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
        };
        check_node(term("disk", "In", json!(["hdd", "ssd"])), ssd.clone(), true);
        check_node(term("disk", "NotIn", json!(["ssd"])), ssd.clone(), false);
        check_node(term("cores", "Gt", json!(["8"])), ssd.clone(), true);
        check_node(term("cores", "Lt", json!(["8"])), ssd.clone(), false);
        check_node(term("zone", "DoesNotExist", json!([])), ssd.clone(), true);
        check_node(required(json!([{}])), ssd.clone(), false);
        let by_name =
            json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]);
        check_node(required(by_name), ssd, true);
    }
}
