//! Deletes pods that nobody will ever finish: those of nodes that are gone or out of service, those that were deleted
//! before they had a node, and the oldest finished ones when there are too many.
//!
//! Upstream: pkg/controller/podgc.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use minke_api::{Key, Kind, Object, Status};
use minke_client::{Change, DeleteOptions, Patch, Target};
use serde_json::json;
use tokio::time::Instant;

use crate::Config;
use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds};
use crate::pods;
use crate::run::Controller;

/// How long a node must have been away before its pods are given up.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Put on nodes by people who know that nothing runs there any more.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// Evicted pods first, then by age.
type Rank = (bool, Option<Timestamp>, Key);

fn rank(pod: &Object) -> Rank {
    let evicted = pod.field("status.phase") == Some("Failed")
        && pod
            .view::<Pod>()
            .is_ok_and(|pod| pod.status.as_ref().is_some_and(|s| s.reason.as_deref() == Some("Evicted")));
    (!evicted, pod.created(), pod.key().clone())
}

pub(crate) struct PodGc {
    finished_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Finished pods, those that are to go first first.
    finished: BTreeSet<Rank>,
    /// When nodes that pods name were first found missing.
    missing: HashMap<String, Instant>,
}

impl PodGc {
    pub fn new(config: &Config) -> PodGc {
        PodGc { finished_max: config.terminated_pods_max, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under the lock")
    }

    fn is_surplus(&self, pod: &Object) -> bool {
        let state = self.state();
        is_finished(pod) && state.last_surplus(self.finished_max).is_some_and(|last| rank(pod) <= *last)
    }
}

impl State {
    /// The last of those that are too many.
    fn last_surplus(&self, max: usize) -> Option<&Rank> {
        let surplus = self.finished.len().checked_sub(max).filter(|_| max > 0)?;
        self.finished.iter().nth(surplus.checked_sub(1)?)
    }
}

/// Whether people have said of a node that what ran there runs no more.
fn is_out_of_service(node: &Arc<Object>) -> bool {
    let Some(node) = Typed::<Node>::new(node.clone()) else { return false };
    let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let is_ready = conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True");
    !is_ready && taints.any(|taint| taint.key == OUT_OF_SERVICE)
}

fn node_of(pod: &Object) -> Option<&str> {
    pod.field("spec.nodeName").filter(|node| !node.is_empty())
}

fn is_finished(pod: &Object) -> bool {
    matches!(pod.field("status.phase"), Some("Succeeded" | "Failed"))
}

#[async_trait]
impl Controller for PodGc {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<Node>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        let pods = Kind::of::<Pod>();
        if object.kind() != pods {
            let here = || ctx.informers.of(pods).on_node(object.name());
            let Some(node) = &change.new else {
                return here().iter().map(|pod| Item::of(pod)).collect();
            };
            self.state().missing.remove(object.name());
            if !is_out_of_service(node) || change.old.as_ref().is_some_and(is_out_of_service) {
                return Vec::new();
            }
            let pods = here();
            return pods.iter().filter(|pod| pod.deleted().is_some()).map(|pod| Item::of(pod)).collect();
        }
        let mut items = Vec::new();
        let mut state = self.state();
        if let Some(old) = change.old.as_ref().filter(|old| is_finished(old)) {
            state.finished.remove(&rank(old));
        }
        let Some(pod) = &change.new else { return items };
        if is_finished(pod) {
            // It is too many itself, or it makes another one so.
            state.finished.insert(rank(pod));
            let last = state.last_surplus(self.finished_max).map(|(_, _, key)| key.clone());
            items.extend(
                last.into_iter()
                    .flat_map(|last| [last, pod.key().clone()])
                    .map(|key| Item { kind: pods, key }),
            );
        }
        let node = node_of(pod).and_then(|node| ctx.informers.of_type::<Node>().get("", node));
        let suspicious = match (node, pod.deleted()) {
            (Some(node), Some(_)) => is_out_of_service(&node),
            (Some(_), None) => false,
            (None, deleted) => node_of(pod).is_some() || deleted.is_some(),
        };
        if suspicious {
            items.push(Item::of(pod));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(pod) = ctx.get::<Pod>(&item.key) else { return Ok(Requeue::Never) };
        let object = &pod.object;
        if self.is_surplus(object) {
            return delete_now(ctx, object).await;
        }
        let Some(node) = node_of(object) else {
            return match object.deleted() {
                Some(_) => give_up(ctx, &pod, None).await,
                None => Ok(Requeue::Never),
            };
        };
        if let Some(node) = ctx.informer::<Node>().get("", node) {
            return match object.deleted() {
                Some(_) if is_out_of_service(&node) => give_up(ctx, &pod, None).await,
                _ => Ok(Requeue::Never),
            };
        }
        let since = *self.state().missing.entry(node.to_owned()).or_insert_with(Instant::now);
        let left = QUARANTINE.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        match ctx.client.get(Target::object(Kind::of::<Node>(), "", node)).await {
            Ok(_) => Ok(Requeue::Never),
            Err(error) if error.is_not_found() => {
                give_up(ctx, &pod, Some("PodGC: node no longer exists")).await
            }
            Err(error) => Err(error),
        }
    }
}

/// Fails a pod that has not ended, so that it is counted, and deletes it. `why` becomes a condition.
async fn give_up(ctx: &Ctx, pod: &Typed<Pod>, why: Option<&str>) -> Result<Requeue, Status> {
    if !pods::is_finished(pod) {
        let mut status = json!({ "phase": "Failed" });
        if let Some(message) = why {
            status["conditions"] = json!([{
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "DeletionByPodGC",
                "message": message,
                "lastTransitionTime": seconds(ctx.now()),
            }]);
        }
        let patch = Patch::Strategic(json!({ "metadata": { "uid": pod.object.uid() }, "status": status }));
        match ctx.patch(Target::of(&pod.object).sub("status"), patch).await {
            Err(error) if error.is_not_found() => return Ok(Requeue::Never),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
    }
    delete_now(ctx, &pod.object).await
}

async fn delete_now(ctx: &Ctx, pod: &Object) -> Result<Requeue, Status> {
    let options = DeleteOptions { grace_period: Some(0), ..DeleteOptions::default() };
    ctx.delete(pod, options).await?;
    Ok(Requeue::Never)
}
