//! Whether this node can run a pod that was bound to it. Upstream: pkg/kubelet/lifecycle/predicate.go. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;

use crate::pod::Pod;
use crate::resources;

/// Reason and message of the refusal, if any. `others` are the pods the node has agreed to run.
pub fn check<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod>,
    node: Option<&core::Node>,
    allocatable: &BTreeMap<String, Quantity>,
) -> Option<(&'static str, String)> {
    let mut used: BTreeMap<&str, i64> = BTreeMap::new();
    let mut count = 0;
    for other in others {
        count += 1;
        for name in ["cpu", "memory", "ephemeral-storage"] {
            *used.entry(name).or_default() += resources::pod_request(other, name);
        }
    }
    let capacity =
        |name: &str| allocatable.get(name).map(|q| if name == "cpu" { q.milli_value() } else { q.value() });
    let short = |name: &str, requested: i64, used: i64, capacity: i64| {
        format!(
            "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    };
    if let Some(capacity) = capacity("pods")
        && count + 1 > capacity
    {
        return Some(("OutOfpods", short("pods", 1, count, capacity)));
    }
    for (name, reason) in
        [("cpu", "OutOfcpu"), ("memory", "OutOfmemory"), ("ephemeral-storage", "OutOfephemeral-storage")]
    {
        let (requested, used) = (resources::pod_request(pod, name), used.get(name).copied().unwrap_or(0));
        if let Some(capacity) = capacity(name)
            && requested > 0
            && used.saturating_add(requested) > capacity
        {
            return Some((reason, short(name, requested, used, capacity)));
        }
    }
    let node = node?;
    if !fits(pod, node) {
        let message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        return Some(("NodeAffinity", message.to_owned()));
    }
    None
}

fn fits(pod: &Pod, node: &core::Node) -> bool {
    let empty = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let selector = pod.spec().node_selector.as_ref().unwrap_or(&empty);
    if !selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = pod.spec().affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    let Some(required) = required else { return true };
    let name = node.metadata.name.as_deref();
    required.node_selector_terms.iter().any(|term| {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        let by_label = |r: &core::NodeSelectorRequirement| matches(r, labels.get(&r.key).map(String::as_str));
        let by_field =
            |r: &core::NodeSelectorRequirement| matches(r, name.filter(|_| r.key == "metadata.name"));
        // A term that asks for nothing matches nothing.
        !(expressions.is_empty() && fields.is_empty())
            && expressions.iter().all(by_label)
            && fields.iter().all(by_field)
    })
}

fn matches(requirement: &core::NodeSelectorRequirement, value: Option<&str>) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn refused(spec: Value, others: &[Pod], want: Option<&str>) {
        let node = json!({"metadata": {"name": "n", "labels": {"zone": "a", "size": "5"}}});
        let node: core::Node = serde_json::from_value(node).expect("a node");
        let quantity = |text: &str| Quantity::parse(text).expect("a quantity");
        let allocatable = BTreeMap::from([
            ("cpu".to_owned(), quantity("2")),
            ("memory".to_owned(), quantity("1Gi")),
            ("pods".to_owned(), quantity("3")),
        ]);
        let got = check(&pod(json!({"spec": spec})), others.iter(), Some(&node), &allocatable);
        assert_eq!(got.as_ref().map(|(_, message)| message.as_str()), want, "{got:?}");
    }

    fn asking(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = pod(json!({"spec": asking("1500m")}));
        refused(asking("2"), &[], None);
        refused(asking("500m"), std::slice::from_ref(&one), None);
        refused(
            asking("501m"),
            std::slice::from_ref(&one),
            Some("Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000"),
        );
        let many = vec![pod(json!({})); 3];
        refused(
            asking("0"),
            &many,
            Some("Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3"),
        );
    }

    #[test]
    fn selectors_must_match() {
        let no = Some("Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector");
        refused(json!({"nodeSelector": {"zone": "a"}}), &[], None);
        refused(json!({"nodeSelector": {"zone": "b"}}), &[], no);
        let affinity = |key: &str, operator: &str, values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]}}}})
        };
        refused(affinity("zone", "In", json!(["a", "b"])), &[], None);
        refused(affinity("zone", "NotIn", json!(["a"])), &[], no);
        refused(affinity("none", "DoesNotExist", Value::Null), &[], None);
        refused(affinity("size", "Gt", json!(["4"])), &[], None);
        refused(affinity("size", "Lt", json!(["4"])), &[], no);
    }
}
