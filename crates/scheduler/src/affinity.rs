//! What pods say of where they want to be: node selectors, tolerations, selectors of other pods.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint, Toleration,
    WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use minke_api::{LabelSelector, Labels, Object};

use crate::picture::Node;

/// The pod's required node affinity.
pub fn required_node_affinity(pod: &Pod) -> Option<&NodeSelector> {
    pod.spec
        .as_ref()?
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?
        .required_during_scheduling_ignored_during_execution
        .as_ref()
}

/// Whether the pod may go to some nodes only, by what it says itself.
pub fn chooses_nodes(pod: &Pod) -> bool {
    let selector = pod.spec.as_ref().and_then(|spec| spec.node_selector.as_ref());
    selector.is_some_and(|selector| !selector.is_empty()) || required_node_affinity(pod).is_some()
}

/// Whether the node is one that the pod's nodeSelector and required node affinity allow.
pub fn node_is_wanted(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let selected =
        spec.node_selector.iter().flatten().all(|(key, value)| node.labels.get(key) == Some(value));
    selected && required_node_affinity(pod).is_none_or(|required| selector_matches(required, node))
}

/// Whether one of the terms holds.
pub fn selector_matches(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| term_matches(term, node))
}

/// The names of the only nodes that the pod's required node affinity allows, if every one of its terms names them,
/// as those of DaemonSets do: then no other node need be looked at.
pub fn only_nodes(pod: &Pod) -> Option<Vec<&str>> {
    let terms = &required_node_affinity(pod)?.node_selector_terms;
    let mut names = Vec::new();
    for term in terms {
        let mut named: Option<Vec<&str>> = None;
        for field in term.match_fields.iter().flatten() {
            if field.key == "metadata.name" && field.operator == "In" {
                let values: Vec<&str> = field.values.iter().flatten().map(String::as_str).collect();
                named = Some(match named {
                    None => values,
                    Some(before) => before.into_iter().filter(|name| values.contains(name)).collect(),
                });
            }
        }
        names.extend(named?);
    }
    if terms.is_empty() {
        return None;
    }
    names.sort_unstable();
    names.dedup();
    Some(names)
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
    tolerations.iter().any(|toleration| minke_api::placement::tolerates(toleration, taint))
}

/// A selector of pods that stands in a pod's specification; one that can't be read selects nothing.
pub fn pod_selector(spec: Option<&meta::LabelSelector>) -> LabelSelector {
    match spec {
        None => LabelSelector::nothing(),
        Some(spec) => LabelSelector::from_spec(spec).unwrap_or_else(|_| LabelSelector::nothing()),
    }
}

/// Labels of every namespace, for terms that select namespaces by them.
pub type Namespaces = BTreeMap<String, Labels>;

/// An affinity term of one pod.
#[derive(Debug)]
pub struct Term {
    pub topology_key: String,
    selector: LabelSelector,
    namespaces: Vec<String>,
    /// Namespaces by label, besides those that are named.
    namespace_selector: Option<LabelSelector>,
    /// All of the above as text: terms with the same text match the same pods.
    text: Arc<str>,
}

impl Term {
    /// `object` is the pod that carries the term.
    pub fn new(term: &PodAffinityTerm, object: &Object) -> Term {
        let mut selector = term.label_selector.clone();
        for (keys, operator) in [(&term.match_label_keys, "In"), (&term.mismatch_label_keys, "NotIn")] {
            for key in keys.iter().flatten() {
                let Some(value) = object.labels().get(key) else { continue };
                let requirement = meta::LabelSelectorRequirement {
                    key: key.clone(),
                    operator: operator.to_owned(),
                    values: Some(vec![value.to_owned()]),
                };
                selector.get_or_insert_default().match_expressions.get_or_insert_default().push(requirement);
            }
        }
        let mut namespaces = term.namespaces.clone().unwrap_or_default();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.push(object.namespace().to_owned());
        }
        namespaces.sort_unstable();
        let selector = pod_selector(selector.as_ref());
        let namespace_selector = term.namespace_selector.as_ref().map(|wanted| pod_selector(Some(wanted)));
        let text = format!(
            "{}|{}|{}|{}",
            term.topology_key,
            selector_text(&selector),
            namespaces.join(","),
            namespace_selector.as_ref().map_or("-".to_owned(), selector_text),
        );
        let topology_key = term.topology_key.clone();
        Term { topology_key, selector, namespaces, namespace_selector, text: text.into() }
    }

    pub fn matches(&self, object: &Object, namespaces: &Namespaces) -> bool {
        self.selects_namespace(object.namespace(), namespaces) && self.selector.matches(object.labels())
    }

    fn selects_namespace(&self, name: &str, namespaces: &Namespaces) -> bool {
        self.namespaces.iter().any(|namespace| namespace == name)
            || self.namespace_selector.as_ref().is_some_and(|selector| match namespaces.get(name) {
                Some(labels) => selector.matches(labels),
                None => selector.is_everything(),
            })
    }

    pub fn text(&self) -> &Arc<str> {
        &self.text
    }

    /// The only namespaces that the term can match, if they can be told without looking at labels.
    pub fn named_namespaces(&self) -> Option<&[String]> {
        self.namespace_selector.is_none().then_some(&self.namespaces)
    }
}

/// The text of a selector, which for one that selects nothing differs from one that selects all.
pub fn selector_text(selector: &LabelSelector) -> String {
    if *selector == LabelSelector::nothing() { "!".to_owned() } else { selector.to_string() }
}

/// What a pod says of other pods.
#[derive(Debug, Default)]
pub struct PodAffinities {
    pub required: Vec<Arc<Term>>,
    pub required_anti: Vec<Arc<Term>>,
    /// With their weights, which are negative for what is shunned.
    pub preferred: Vec<(Arc<Term>, i64)>,
}

impl PodAffinities {
    /// `None` for a pod that says nothing of others, as most do.
    pub fn of(pod: &Pod, object: &Object) -> Option<Box<PodAffinities>> {
        let affinity = pod.spec.as_ref()?.affinity.as_ref()?;
        let (wants, shuns) = (affinity.pod_affinity.as_ref(), affinity.pod_anti_affinity.as_ref());
        let required =
            wants.and_then(|wants| wants.required_during_scheduling_ignored_during_execution.as_deref());
        let required_anti =
            shuns.and_then(|shuns| shuns.required_during_scheduling_ignored_during_execution.as_deref());
        let terms = |terms: Option<&[PodAffinityTerm]>| -> Vec<Arc<Term>> {
            terms.unwrap_or_default().iter().map(|term| Arc::new(Term::new(term, object))).collect()
        };
        let liked =
            wants.and_then(|wants| wants.preferred_during_scheduling_ignored_during_execution.as_deref());
        let shunned =
            shuns.and_then(|shuns| shuns.preferred_during_scheduling_ignored_during_execution.as_deref());
        let weighted = |terms: Option<&[WeightedPodAffinityTerm]>, sign: i64| -> Vec<(Arc<Term>, i64)> {
            let terms = terms.unwrap_or_default().iter();
            let term = |t: &WeightedPodAffinityTerm| Arc::new(Term::new(&t.pod_affinity_term, object));
            terms.map(|t| (term(t), sign * i64::from(t.weight))).collect()
        };
        let mut preferred = weighted(liked, 1);
        preferred.extend(weighted(shunned, -1));
        let found =
            PodAffinities { required: terms(required), required_anti: terms(required_anti), preferred };
        let empty = found.required.is_empty() && found.required_anti.is_empty() && found.preferred.is_empty();
        if empty { None } else { Some(Box::new(found)) }
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
        assert_eq!(node_is_wanted(&pod, picture.node(0)), want);
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
