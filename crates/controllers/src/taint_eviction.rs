//! Evicts pods from nodes with NoExecute taints, at once or when their tolerations run out.
//!
//! Upstream: pkg/controller/tainteviction.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use minke_api::{Kind, Object, Status};
use minke_client::{Change, DeleteOptions, Patch, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds};
use crate::run::Controller;

const NO_EXECUTE: &str = "NoExecute";

/// What becomes of a pod.
#[derive(Debug, PartialEq)]
enum Verdict {
    Stays,
    /// Evicted at this time (which may be past).
    Goes(Timestamp),
}

/// A pod goes at once for a taint that it does not tolerate, and else when the first of the tolerations that
/// cover a taint runs out. Time counts from when a taint was added.
fn judge(taints: &[Taint], tolerations: &[Toleration], now: Timestamp) -> Verdict {
    let mut first: Option<Timestamp> = None;
    for taint in taints.iter().filter(|taint| taint.effect == NO_EXECUTE) {
        let covering: Vec<&Toleration> =
            tolerations.iter().filter(|toleration| tolerates(toleration, taint)).collect();
        if covering.is_empty() {
            return Verdict::Goes(now);
        }
        let since = taint.time_added.as_ref().map_or(now, |added| added.0);
        let seconds = covering.iter().filter_map(|toleration| toleration.toleration_seconds).min();
        if let Some(seconds) = seconds {
            let at = since.saturating_add(Duration::from_secs(seconds.max(0) as u64)).unwrap_or(now);
            first = Some(first.map_or(at, |first| first.min(at)));
        }
    }
    first.map_or(Verdict::Stays, Verdict::Goes)
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    let covers = (effect.is_empty() || effect == taint.effect) && (key.is_empty() || key == taint.key);
    covers
        && match toleration.operator.as_deref().unwrap_or("Equal") {
            "Exists" => true,
            "Equal" | "" => toleration.value.as_deref().unwrap_or("") == taint.value.as_deref().unwrap_or(""),
            _ => false,
        }
}

/// The NoExecute taints of a node.
fn taints(node: Option<&Arc<Object>>) -> Vec<Taint> {
    let node = node.and_then(|node| Typed::<Node>::new(node.clone()));
    let taints = node.and_then(|node| node.spec.as_ref()?.taints.clone()).unwrap_or_default();
    taints.into_iter().filter(|taint| taint.effect == NO_EXECUTE).collect()
}

pub(crate) struct TaintEviction;

#[async_trait]
impl Controller for TaintEviction {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<Node>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        let nodes = Kind::of::<Node>();
        if object.kind() == nodes {
            if taints(change.old.as_ref()) == taints(change.new.as_ref()) {
                return Vec::new();
            }
            let pods = ctx.informers.of_type::<Pod>().snapshot();
            let here = pods.values().filter(|pod| pod.field("spec.nodeName") == Some(object.name()));
            return here.map(|pod| Item::of(pod)).collect();
        }
        let Some(pod) = &change.new else { return Vec::new() };
        let node = pod.field("spec.nodeName").and_then(|node| ctx.informers.of(nodes).get("", node));
        if taints(node.as_ref()).is_empty() { Vec::new() } else { vec![Item::of(pod)] }
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(pod) = ctx.get::<Pod>(&item.key) else { return Ok(Requeue::Never) };
        if ctx.is_going(&pod.object) {
            return Ok(Requeue::Never);
        }
        let node = pod.object.field("spec.nodeName").and_then(|node| ctx.informer::<Node>().get("", node));
        let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.clone()).unwrap_or_default();
        let now = ctx.now();
        match judge(&taints(node.as_ref()), &tolerations, now) {
            Verdict::Stays => Ok(Requeue::Never),
            Verdict::Goes(at) if at > now => Ok(Requeue::at(Some(at), now)),
            Verdict::Goes(_) => {
                evict(ctx, &pod.object).await?;
                Ok(Requeue::Never)
            }
        }
    }
}

async fn evict(ctx: &Ctx, pod: &Object) -> Result<(), Status> {
    ctx.events.normal(pod, "TaintManagerEviction", format!("Marking for deletion Pod {}", pod.key()));
    let status = json!({ "status": { "conditions": [{
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByTaintManager",
        "message": "Taint manager: deleting due to NoExecute taint",
        "lastTransitionTime": seconds(ctx.now()),
    }] } });
    match ctx.patch(Target::of(pod).sub("status"), Patch::Strategic(status)).await {
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
        Ok(_) => {}
    }
    ctx.delete(pod, DeleteOptions::default()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{NOW, now, time};
    use serde_json::Value;

    #[track_caller]
    fn check(taints: Value, tolerations: Value, goes_in: Option<i64>) {
        let taints: Vec<Taint> = serde_json::from_value(taints).unwrap();
        let tolerations: Vec<Toleration> = serde_json::from_value(tolerations).unwrap();
        let got = match judge(&taints, &tolerations, now()) {
            Verdict::Stays => None,
            Verdict::Goes(at) => Some(at.as_second() - NOW),
        };
        assert_eq!(got, goes_in);
    }

    #[test]
    fn pods_stay_as_long_as_they_tolerate() {
        let gone =
            json!({"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": time(100)});
        let other = json!({"key": "k", "effect": "NoExecute"});
        let soft = json!({"key": "k", "effect": "NoSchedule"});
        let bear = |key: &str, seconds: Value| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds});
        check(json!([]), json!([]), None);
        check(json!([soft]), json!([]), None);
        check(json!([gone]), json!([]), Some(0));
        check(json!([gone]), json!([bear("node.kubernetes.io/unreachable", 300.into())]), Some(200));
        check(json!([gone]), json!([bear("node.kubernetes.io/unreachable", Value::Null)]), None);
        check(json!([gone, other]), json!([bear("node.kubernetes.io/unreachable", 300.into())]), Some(0));
        check(
            json!([gone, other]),
            json!([bear("node.kubernetes.io/unreachable", 300.into()), bear("k", 10.into())]),
            Some(10),
        );
    }
}
