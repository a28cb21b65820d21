//! What controllers ask of pods: active, ready, available, and which of them to delete first.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use minke_api::{ApiType, Object};
use serde_json::{Value, json};

use crate::context::{Typed, controller_ref};

pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether all containers of the pod have stopped for good.
pub(crate) fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Since when the pod is ready, if it is.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready")?;
    let since = ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    (ready.status == "True").then_some(since)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    ready_since(pod).is_some()
}

/// When a ready pod has been (or will have been) ready for `min_ready_seconds`.
pub(crate) fn available_at(pod: &Pod, min_ready_seconds: i32) -> Option<Timestamp> {
    let since = ready_since(pod)?;
    since.checked_add(Duration::from_secs(min_ready_seconds.max(0) as u64)).ok()
}

/// A pod as `template` describes it, controlled by `owner`, with a name that the server completes.
pub(crate) fn from_template(template: &PodTemplateSpec, owner: &Object) -> Value {
    let metadata = template.metadata.as_ref();
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": name_prefix(owner.name()),
            "ownerReferences": [controller_ref(owner)],
        },
        "spec": template.spec.as_ref().map(ApiType::to_value),
    });
    if let Some(labels) = metadata.and_then(|metadata| metadata.labels.as_ref()) {
        pod["metadata"]["labels"] = json!(labels);
    }
    if let Some(annotations) = metadata.and_then(|metadata| metadata.annotations.as_ref()) {
        pod["metadata"]["annotations"] = json!(annotations);
    }
    if let Some(finalizers) = metadata.and_then(|metadata| metadata.finalizers.as_ref()) {
        pod["metadata"]["finalizers"] = json!(finalizers);
    }
    pod
}

/// The dash would make some long names of owners no prefix of a name; then it is left out.
pub(crate) fn name_prefix(owner: &str) -> String {
    let prefix = format!("{owner}-");
    let valid = minke_api::names::dns_subdomain(&format!("{prefix}x")).is_ok();
    if valid { prefix } else { owner.to_owned() }
}

/// How many of `pods` run on each node.
pub(crate) fn per_node<'a>(pods: impl IntoIterator<Item = &'a Typed<Pod>>) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for pod in pods {
        if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
            *counts.entry(node.to_owned()).or_default() += 1;
        }
    }
    counts
}

/// Sorts pods so that those that will be missed least come first: not yet on a node, not running, not ready,
/// cheap to delete, crowded on their node, ready for a short time, often restarted, young.
/// `crowd` counts related pods by node. Upstream: `ActivePodsWithRanks`.
pub(crate) fn sort_for_deletion(pods: &mut [Typed<Pod>], crowd: &HashMap<String, usize>, now: Timestamp) {
    pods.sort_by_cached_key(|pod| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        let ready = ready_since(pod);
        DeletionRank {
            assigned: !node.is_empty(),
            phase: match phase(pod) {
                "Pending" | "" => 0,
                "Unknown" => 1,
                _ => 2,
            },
            ready: ready.is_some(),
            cost: deletion_cost(pod),
            crowd: Reverse(crowd.get(node).copied().unwrap_or_default()),
            ready_for: ready.map_or(0, |since| age(since, now)),
            restarts: Reverse(restarts(pod)),
            age: pod.object.created().map_or(0, |created| age(created, now)),
            uid: pod.object.uid().to_owned(),
        }
    });
}

/// Ordered field by field.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct DeletionRank {
    assigned: bool,
    phase: u8,
    ready: bool,
    cost: i32,
    crowd: Reverse<usize>,
    ready_for: u32,
    restarts: Reverse<i32>,
    age: u32,
    /// Pods of about the same age are picked at random; uids are random.
    uid: String,
}

/// Age on a logarithmic scale, so that pods that are about as old count as equally old.
fn age(since: Timestamp, now: Timestamp) -> u32 {
    match now.as_nanosecond().cmp(&since.as_nanosecond()) {
        Ordering::Greater => (now.as_nanosecond() - since.as_nanosecond()).ilog2() + 1,
        _ => 0,
    }
}

fn deletion_cost(pod: &Pod) -> i32 {
    let annotations = pod.metadata.annotations.as_ref();
    let cost = annotations.and_then(|all| all.get("controller.kubernetes.io/pod-deletion-cost"));
    cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    statuses.into_iter().flatten().map(|status| status.restart_count).max().unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const NOW: i64 = 1_700_000_000;

    pub(crate) fn now() -> Timestamp {
        Timestamp::from_second(NOW).unwrap()
    }

    pub(crate) fn time(seconds_ago: i64) -> String {
        Timestamp::from_second(NOW - seconds_ago).unwrap().to_string()
    }

    /// A running pod on node n1, ready since an hour, created an hour ago; `change` makes it special.
    pub(crate) fn pod(name: &str, change: impl FnOnce(&mut Value)) -> Typed<Pod> {
        let mut pod = json!({
            "metadata": { "name": name, "namespace": "ns", "uid": format!("uid-{name}"), "labels": {"app": "web"},
                "creationTimestamp": time(3600),
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": true}] },
            "spec": { "nodeName": "n1", "containers": [{"name": "c", "image": "i"}] },
            "status": { "phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": time(3600)}],
                "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": true, "restartCount": 0}] },
        });
        change(&mut pod);
        let kind = minke_api::Kind::of::<Pod>();
        Typed::new(std::sync::Arc::new(Object::from_value(kind, &pod).unwrap())).unwrap()
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let mut pods = vec![
            pod("old", |_| {}),
            pod("young", |p| p["metadata"]["creationTimestamp"] = time(10).into()),
            pod("restarted", |p| p["status"]["containerStatuses"][0]["restartCount"] = 3.into()),
            pod("fresh", |p| p["status"]["conditions"][0]["lastTransitionTime"] = time(5).into()),
            pod("crowded", |p| p["spec"]["nodeName"] = "n2".into()),
            pod("cheap", |p| {
                p["metadata"]["annotations"] = json!({"controller.kubernetes.io/pod-deletion-cost": "-5"})
            }),
            pod("unready", |p| p["status"]["conditions"][0]["status"] = "False".into()),
            pod("pending", |p| p["status"] = json!({"phase": "Pending"})),
            pod("unassigned", |p| {
                p["spec"]["nodeName"] = Value::Null;
                p["status"] = json!({"phase": "Pending"});
            }),
        ];
        let crowd = HashMap::from([("n1".to_owned(), 1), ("n2".to_owned(), 4)]);
        sort_for_deletion(&mut pods, &crowd, now());
        let names: Vec<&str> = pods.iter().map(|pod| pod.object.name()).collect();
        assert_eq!(
            names,
            ["unassigned", "pending", "unready", "cheap", "crowded", "fresh", "restarted", "young", "old"]
        );
    }

    #[test]
    fn a_pod_is_available_when_it_was_ready_long_enough() {
        let ready = pod("a", |p| p["status"]["conditions"][0]["lastTransitionTime"] = time(10).into());
        assert_eq!(available_at(&ready, 0).unwrap().as_second(), NOW - 10);
        assert_eq!(available_at(&ready, 30).unwrap().as_second(), NOW + 20);
        assert_eq!(available_at(&pod("b", |p| p["status"] = Value::Null), 0), None);
    }
}
