//! In-place resize: whether the node has room for what a running pod asks for now, and what it goes on
//! with until then. Upstream: pkg/kubelet/allocation.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use serde_json::json;
use tokio::sync::watch;

use crate::pod::{Class, Pod};
use crate::resources;

/// Conditions of a pod that only a resize gives it.
pub const PENDING: &str = "PodResizePending";
pub const IN_PROGRESS: &str = "PodResizeInProgress";

const RESOURCES: [&str; 2] = ["cpu", "memory"];

/// What the pods of this node were granted, by uid: thousandths of a CPU and bytes.
pub struct Grants {
    granted: Mutex<HashMap<String, [i64; 2]>>,
    freed: watch::Sender<()>,
}

impl Default for Grants {
    fn default() -> Grants {
        Grants { granted: Mutex::default(), freed: watch::Sender::new(()) }
    }
}

/// Why a resize cannot be done: reason and message of the condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub reason: &'static str,
    pub message: String,
}

impl Grants {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, [i64; 2]>> {
        self.granted.lock().expect("nothing panics while the map is locked")
    }

    /// Tells when room may have become free.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.freed.subscribe()
    }

    /// Grants what the pod asks for, whatever there is.
    pub fn grant(&self, pod: &Pod) {
        let old = self.lock().insert(pod.uid().to_owned(), wanted(pod));
        if old.is_some_and(|old| old != wanted(pod)) {
            self.freed.send_replace(());
        }
    }

    pub fn release(&self, uid: &str) {
        if self.lock().remove(uid).is_some() {
            self.freed.send_replace(());
        }
    }

    /// Grants what the pod asks for when there is room beside the others.
    pub fn try_grant(&self, pod: &Pod, allocatable: &BTreeMap<String, Quantity>) -> Result<(), Pending> {
        let wanted = wanted(pod);
        let mut granted = self.lock();
        let had = granted.get(pod.uid()).copied().unwrap_or_default();
        for (at, name) in RESOURCES.into_iter().enumerate() {
            let units = |q: &Quantity| if name == "cpu" { q.milli_value() } else { q.value() };
            let Some(capacity) = allocatable.get(name).map(units) else { continue };
            let used: i64 =
                granted.iter().filter(|(uid, _)| *uid != pod.uid()).map(|(_, granted)| granted[at]).sum();
            let asked = wanted[at];
            if asked > capacity {
                let message = format!(
                    "Node didn't have enough capacity: {name}, requested: {asked}, capacity: {capacity}"
                );
                return Err(Pending { reason: "Infeasible", message });
            }
            if asked > had[at] && used.saturating_add(asked) > capacity {
                let message = format!(
                    "Node didn't have enough resource: {name}, requested: {asked}, used: {used}, capacity: {capacity}"
                );
                return Err(Pending { reason: "Deferred", message });
            }
        }
        granted.insert(pod.uid().to_owned(), wanted);
        drop(granted);
        if RESOURCES.iter().enumerate().any(|(at, _)| wanted[at] < had[at]) {
            self.freed.send_replace(());
        }
        Ok(())
    }
}

fn wanted(pod: &Pod) -> [i64; 2] {
    RESOURCES.map(|name| resources::pod_request(pod, name))
}

/// Whether both ask for the same resources. Ephemeral containers have none, and come at any time.
pub fn same(one: &Pod, other: &Pod) -> bool {
    let all = |pod: &Pod| -> Vec<_> {
        let own = pod.containers().filter(|(class, _)| *class != Class::Ephemeral);
        own.map(|(_, c)| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect()
    };
    one.spec().resources == other.spec().resources && all(one) == all(other)
}

/// What the events of a resize tell: the resources by container, and the revision of the specification.
pub fn told(pod: &Pod) -> String {
    let containers: Vec<_> = pod
        .spec()
        .containers
        .iter()
        .map(|c| json!({"name": c.name, "resources": c.resources.clone().unwrap_or_default()}))
        .collect();
    json!({"containers": containers, "generation": pod.object().generation()}).to_string()
}

/// A resize that waited when the agent went away waits on: the pod goes on with what its status shows.
pub fn resumed(pod: Pod) -> Pod {
    let status = pod.status().cloned().unwrap_or_default();
    if !status.conditions.iter().flatten().any(|c| c.type_ == PENDING && c.status == "True") {
        return pod;
    }
    let lists = [&status.container_statuses, &status.init_container_statuses];
    let known: BTreeMap<String, core::ResourceRequirements> = lists
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|c| Some((c.name.clone(), c.resources.clone()?)))
        .collect();
    pod.with_resources(|name| known.get(name).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;

    fn asking(uid: &str, cpu: &str) -> Pod {
        pod(json!({"metadata": {"uid": uid},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}}))
    }

    #[test]
    fn what_fits_beside_the_others_is_granted() {
        let grants = Grants::default();
        let allocatable = [("cpu".to_owned(), Quantity::parse("2").expect("a quantity"))].into();
        let check = |uid: &str, cpu: &str, want: &str| {
            let got = grants.try_grant(&asking(uid, cpu), &allocatable);
            assert_eq!(got.map_or_else(|pending| pending.message, |()| String::new()), want, "{uid} {cpu}");
        };
        grants.grant(&asking("a", "1"));
        grants.grant(&asking("b", "500m"));
        let mut freed = grants.subscribe();
        check("b", "1", "");
        check(
            "b",
            "1100m",
            "Node didn't have enough resource: cpu, requested: 1100, used: 1000, capacity: 2000",
        );
        check("b", "3", "Node didn't have enough capacity: cpu, requested: 3000, capacity: 2000");
        assert!(!freed.has_changed().expect("it lives"));
        check("a", "900m", "");
        assert!(freed.has_changed().expect("it lives"));
        freed.mark_unchanged();
        check("b", "1100m", "");
        grants.release("a");
        assert!(freed.has_changed().expect("it lives"));
        check("b", "2", "");
    }

    #[test]
    fn a_pod_goes_on_with_what_it_has() {
        let status = json!({"conditions": [{"type": PENDING, "status": "True"}],
            "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                "resources": {"requests": {"cpu": "1"}}}]});
        let patch = json!({"status": status,
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "9"}}}]}});
        let resumed = resumed(pod(patch));
        assert_eq!(resources::pod_request(&resumed, "cpu"), 1000);
        assert!(same(&resumed, &asking("u", "1")) && !same(&resumed, &asking("u", "2")));
        let debugged = pod(json!({"spec": {
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
            "ephemeralContainers": [{"name": "d"}],
        }}));
        assert!(same(&asking("u", "1"), &debugged));
    }
}
