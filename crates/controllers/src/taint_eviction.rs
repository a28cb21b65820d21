//! Evicts pods from nodes with NoExecute taints, at once or when their tolerations run out.
//!
//! Taints that people add do not say when: their time counts from when they were first seen.
//! Upstream: pkg/controller/tainteviction.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
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
/// cover a taint runs out. Time counts from when a taint was added, or the pod came (`since`) if that was later.
fn judge(taints: &[Taint], tolerations: &[Toleration], since: Option<Timestamp>, now: Timestamp) -> Verdict {
    let mut first: Option<Timestamp> = None;
    for taint in taints {
        let covering: Vec<&Toleration> =
            tolerations.iter().filter(|toleration| tolerates(toleration, taint)).collect();
        if covering.is_empty() {
            return Verdict::Goes(now);
        }
        let added = taint.time_added.as_ref().map_or(now, |added| added.0);
        let since = since.map_or(added, |since| since.max(added));
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

/// When the pod was given to its node.
fn scheduled(pod: &Pod) -> Option<Timestamp> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let condition = conditions.find(|condition| condition.type_ == "PodScheduled")?;
    condition.last_transition_time.as_ref().map(|time| time.0)
}

#[derive(Default)]
pub(crate) struct TaintEviction {
    /// The taints of nodes that have any, with the time since when they are known.
    known: Mutex<HashMap<String, Vec<Taint>>>,
    /// Uids of pods whose time runs.
    doomed: Mutex<HashSet<Box<str>>>,
}

impl TaintEviction {
    fn known(&self) -> MutexGuard<'_, HashMap<String, Vec<Taint>>> {
        self.known.lock().expect("nothing panics under the lock")
    }

    fn doomed(&self) -> MutexGuard<'_, HashSet<Box<str>>> {
        self.doomed.lock().expect("nothing panics under the lock")
    }

    /// Notes the taints of a node, and since when they are there.
    fn note(&self, node: &str, mut taints: Vec<Taint>, now: Timestamp) {
        let mut known = self.known();
        let before = known.remove(node).unwrap_or_default();
        for taint in taints.iter_mut().filter(|taint| taint.time_added.is_none()) {
            let same = |old: &&Taint| old.key == taint.key && old.value == taint.value;
            let since = before.iter().find(same).and_then(|old| old.time_added.clone());
            taint.time_added = since.or_else(|| Some(seconds(now)));
        }
        if !taints.is_empty() {
            known.insert(node.to_owned(), taints);
        }
    }
}

#[async_trait]
impl Controller for TaintEviction {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<Node>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<Node>() {
            let now = taints(change.new.as_ref());
            if taints(change.old.as_ref()) == now {
                return Vec::new();
            }
            self.note(object.name(), now, ctx.clock.now());
            let here = ctx.informers.of_type::<Pod>().on_node(object.name());
            return here.iter().map(|pod| Item::of(pod)).collect();
        }
        let Some(pod) = &change.new else {
            self.doomed().remove(object.uid());
            return Vec::new();
        };
        let tainted = pod.field("spec.nodeName").is_some_and(|node| self.known().contains_key(node));
        if tainted { vec![Item::of(pod)] } else { Vec::new() }
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(pod) = ctx.get::<Pod>(&item.key) else { return Ok(Requeue::Never) };
        if ctx.is_going(&pod.object) {
            return Ok(Requeue::Never);
        }
        let node = pod.object.field("spec.nodeName");
        let taints = node.and_then(|node| self.known().get(node).cloned()).unwrap_or_default();
        let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
        let now = ctx.now();
        match judge(&taints, tolerations, scheduled(&pod), now) {
            Verdict::Stays => {
                if self.doomed().remove(pod.object.uid()) {
                    let message = format!("Cancelling deletion of Pod {}", item.key);
                    ctx.events.normal(&pod.object, "TaintManagerEviction", message);
                }
                Ok(Requeue::Never)
            }
            Verdict::Goes(at) if at > now => {
                self.doomed().insert(pod.object.uid().into());
                Ok(Requeue::at(Some(at), now))
            }
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
        check_since(None, taints, tolerations, goes_in);
    }

    #[track_caller]
    fn check_since(ago: Option<i64>, taints: Value, tolerations: Value, goes_in: Option<i64>) {
        let taints: Vec<Taint> = serde_json::from_value(taints).unwrap();
        let tolerations: Vec<Toleration> = serde_json::from_value(tolerations).unwrap();
        let since = ago.map(|ago| Timestamp::from_second(NOW - ago).unwrap());
        let got = match judge(&taints, &tolerations, since, now()) {
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
        let bear = |key: &str, seconds: Value| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds});
        check(json!([]), json!([]), None);
        check(json!([gone]), json!([]), Some(0));
        check(json!([gone]), json!([bear("node.kubernetes.io/unreachable", 300.into())]), Some(200));
        check(json!([gone]), json!([bear("node.kubernetes.io/unreachable", Value::Null)]), None);
        check(json!([gone, other]), json!([bear("node.kubernetes.io/unreachable", 300.into())]), Some(0));
        check(
            json!([gone, other]),
            json!([bear("node.kubernetes.io/unreachable", 300.into()), bear("k", 10.into())]),
            Some(10),
        );
        let patient = json!([bear("node.kubernetes.io/unreachable", 300.into())]);
        check_since(Some(1000), json!([gone]), patient.clone(), Some(200));
        check_since(Some(7), json!([gone]), patient, Some(293));
    }

    #[test]
    fn time_counts_from_when_a_taint_was_first_seen() {
        let controller = TaintEviction::default();
        let taint = |value: &str| Taint {
            key: "k".into(),
            value: Some(value.into()),
            effect: NO_EXECUTE.into(),
            time_added: None,
        };
        let since =
            || controller.known().get("n").map(|all| all[0].time_added.as_ref().unwrap().0.as_second() - NOW);
        controller.note("n", vec![taint("a")], now());
        let later = now() + Duration::from_secs(9);
        controller.note("n", vec![taint("a"), taint("b")], later);
        assert_eq!(since(), Some(0));
        controller.note("n", vec![taint("b")], later);
        assert_eq!(since(), Some(9));
        controller.note("n", vec![], later);
        assert_eq!(since(), None);
    }
}
