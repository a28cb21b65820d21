//! The cgroups above those of the pods. All pods together have what the node does not keep for itself; of the classes
//! of service, burstable pods share what they ask for together, and best-effort pods what the others leave. Upstream:
//! pkg/kubelet/cm/node_container_manager_linux.go and qos_container_manager_linux.go.

use std::time::Duration;

use minke_runtime::Resources;

use crate::context::Context;
use crate::pod::Pod;
use crate::resources;

/// What pods use already may be more than a new limit: until some have gone, it is tried again.
const HOLD_AGAIN: Duration = Duration::from_secs(60);

/// Holds all pods to what is theirs, and tells of it.
pub async fn hold(context: &Context) {
    let path = resources::pods_cgroup(&context.cgroup_root);
    while let Err(error) = context.runtime.set_cgroup(&path, context.for_pods.clone()).await {
        let names = [context.cgroup_root.as_str(), "kubepods"];
        let why = format!("Failed to update Node Allocatable Limits {names:?}: {error}");
        context.events.node(false, "FailedNodeAllocatableEnforcement", why);
        tokio::time::sleep(HOLD_AGAIN).await;
    }
    context.events.node(true, "NodeAllocatableEnforced", "Updated Node Allocatable limit across pods");
}

/// The class's cgroup below the cluster's own, and what it is to have.
fn classes(pods: &[Pod]) -> [(&'static str, Resources); 2] {
    let burstable = pods.iter().filter(|pod| resources::qos_class(pod) == "Burstable");
    let asked = burstable.map(|pod| resources::pod_request(pod, "cpu")).fold(0i64, i64::saturating_add);
    let shares = |milli| Resources { cpu_shares: Some(resources::shares(milli)), ..Resources::default() };
    [("besteffort", shares(0)), ("burstable", shares(asked))]
}

/// Brings the classes in line with the pods that are active. Cheap when nothing has changed.
pub async fn keep(context: &Context, pods: &[Pod]) {
    for (class, wanted) in classes(pods) {
        let path = format!("{}/{class}", resources::pods_cgroup(&context.cgroup_root));
        if context.classes.lock().await.get(class) == Some(&wanted) {
            continue;
        }
        match context.runtime.set_cgroup(&path, wanted.clone()).await {
            Ok(()) => drop(context.classes.lock().await.insert(class, wanted)),
            Err(error) => tracing::warn!(cgroup = path, %error, "Class of service not set"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn check(resources: &[Value], want: u64) {
        let with =
            |resources: &Value| pod(json!({"spec": {"containers": [{"name": "c", "resources": resources}]}}));
        let pods: Vec<Pod> = resources.iter().map(with).collect();
        let [(_, best), (_, burst)] = classes(&pods);
        assert_eq!((best.cpu_shares, burst.cpu_shares), (Some(2), Some(want)));
    }

    #[test]
    fn classes_get_what_their_pods_ask_for() {
        let sure = json!({"limits": {"cpu": "1", "memory": "1Mi"}});
        check(&[], 2);
        check(&[json!({}), sure.clone()], 2);
        check(
            &[json!({}), sure, json!({"requests": {"cpu": "500m"}}), json!({"requests": {"cpu": "250m"}})],
            768,
        );
        check(&[json!({"requests": {"memory": "1Mi"}})], 2);
    }
}
