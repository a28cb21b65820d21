//! Deletes pods that nobody will ever finish: those of nodes that are gone, those that were deleted before
//! they had a node, and the oldest finished ones when there are too many.
//!
//! Upstream: pkg/controller/podgc.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
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

pub(crate) struct PodGc {
    finished_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Finished pods, oldest first.
    finished: BTreeSet<(Option<Timestamp>, Key)>,
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
        let surplus = state.finished.len().saturating_sub(self.finished_max);
        self.finished_max > 0 && state.finished.iter().take(surplus).any(|(_, key)| key == pod.key())
    }
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
            if change.new.is_some() {
                self.state().missing.remove(object.name());
                return Vec::new();
            }
            let all = ctx.informers.of(pods).snapshot();
            let here = all.values().filter(|pod| node_of(pod) == Some(object.name()));
            return here.map(|pod| Item::of(pod)).collect();
        }
        let mut items = Vec::new();
        let mut state = self.state();
        if let Some(old) = &change.old {
            state.finished.remove(&(old.created(), old.key().clone()));
        }
        let Some(pod) = &change.new else { return items };
        if is_finished(pod) {
            state.finished.insert((pod.created(), pod.key().clone()));
            let surplus = state.finished.len().saturating_sub(self.finished_max);
            if self.finished_max > 0 {
                items.extend(
                    state.finished.iter().take(surplus).map(|(_, key)| Item { kind: pods, key: key.clone() }),
                );
            }
        }
        let nodes = ctx.informers.of_type::<Node>();
        let suspicious = match node_of(pod) {
            Some(node) => nodes.get("", node).is_none(),
            None => pod.deleted().is_some(),
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
                Some(_) => delete_now(ctx, object).await,
                None => Ok(Requeue::Never),
            };
        };
        if ctx.informer::<Node>().get("", node).is_some() {
            return Ok(Requeue::Never);
        }
        let since = *self.state().missing.entry(node.to_owned()).or_insert_with(Instant::now);
        let left = QUARANTINE.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        match ctx.client.get(Target::object(Kind::of::<Node>(), "", node)).await {
            Ok(_) => Ok(Requeue::Never),
            Err(error) if error.is_not_found() => {
                give_up(ctx, &pod).await?;
                delete_now(ctx, object).await
            }
            Err(error) => Err(error),
        }
    }
}

/// Says in the status of a pod why it failed, before it goes.
async fn give_up(ctx: &Ctx, pod: &Typed<Pod>) -> Result<(), Status> {
    if pods::is_finished(pod) {
        return Ok(());
    }
    let status = json!({ "status": { "phase": "Failed", "conditions": [{
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByPodGC",
        "message": "PodGC: node no longer exists",
        "lastTransitionTime": seconds(ctx.now()),
    }] } });
    match ctx.patch(Target::of(&pod.object).sub("status"), Patch::Strategic(status)).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

async fn delete_now(ctx: &Ctx, pod: &Object) -> Result<Requeue, Status> {
    let options = DeleteOptions { grace_period: Some(0), ..DeleteOptions::default() };
    ctx.delete(pod, options).await?;
    Ok(Requeue::Never)
}
