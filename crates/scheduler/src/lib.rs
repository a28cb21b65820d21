//! The scheduler: gives every pod without a node the best one.
//!
//! One loop. It keeps a [`Picture`] of the nodes up to date from the informers, takes the
//! pod of highest priority from the [`Queue`], and [`decide`](decide::decide)s, which is pure. Binding runs beside the
//! loop; until
//! it is known to have worked the pod is *assumed* to be on its node. Preemption is not built yet.
//! Upstream: pkg/scheduler.
#![forbid(unsafe_code)]

mod affinity;
mod decide;
mod picture;
mod plugins;
mod queue;
#[expect(dead_code, reason = "the loop that calls them is being written")]
mod reserve;
mod resources;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node as NodeObject, Pod, PodCondition};
use minke_api::{Key, Labels, Object, Status};
use minke_client::{Change, Client, Clock, EventRecorder, EventSource, Happening, Informers, Patch, Target};
use minke_client::{reference, typed};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use picture::{Picture, PodInfo};
use plugins::wake;
use queue::Queue;

/// Pods whose `spec.schedulerName` is this are ours.
pub const NAME: &str = "default-scheduler";

/// Bindings and status writes that may be under way at once.
const WRITES_MAX: usize = 256;

#[derive(Debug, Clone)]
pub struct Config {
    pub clock: Clock,
    /// Seed of the choice between equally good nodes.
    pub seed: u64,
}

/// How a binding went.
struct Bound {
    object: Arc<Object>,
    node: String,
    result: Result<(), Status>,
}

struct Scheduler {
    client: Arc<dyn Client>,
    events: EventRecorder,
    clock: Clock,
    picture: Picture,
    queue: Queue,
    namespaces: BTreeMap<String, Labels>,
    /// Pods that were given a node and are not yet seen with it.
    assumed: HashSet<Key>,
    bound: mpsc::UnboundedSender<Bound>,
    writes: Arc<tokio::sync::Semaphore>,
    rng: SmallRng,
    /// Where the next round over the nodes begins.
    start: usize,
}

/// Schedules until `stop`. `informers` and the client in them act as `system:kube-scheduler`.
pub async fn run(informers: Arc<Informers>, config: Config, stop: CancellationToken) {
    let (pods, nodes) = (informers.of_type::<Pod>(), informers.of_type::<NodeObject>());
    let namespaces = informers.of_type::<Namespace>();
    tokio::select! {
        _ = async { tokio::join!(pods.synced(), nodes.synced(), namespaces.synced()) } => {}
        () = stop.cancelled() => return,
    }
    let (mut pods, mut nodes, mut namespaces) = (pods.subscribe(), nodes.subscribe(), namespaces.subscribe());
    let (bound, mut bindings) = mpsc::unbounded_channel();
    let client = informers.client().clone();
    let source = EventSource { component: NAME.to_owned(), host: String::new(), series: true };
    let mut scheduler = Scheduler {
        events: EventRecorder::new(client.clone(), source, config.clock, stop.clone()),
        client,
        clock: config.clock,
        picture: Picture::default(),
        queue: Queue::default(),
        namespaces: BTreeMap::new(),
        assumed: HashSet::new(),
        bound,
        writes: Arc::new(tokio::sync::Semaphore::new(WRITES_MAX)),
        rng: SmallRng::seed_from_u64(config.seed),
        start: 0,
    };
    loop {
        // The picture first, so that each decision is made on the newest one.
        while let Ok(change) = namespaces.try_recv() {
            scheduler.namespace_changed(&change);
        }
        while let Ok(change) = nodes.try_recv() {
            scheduler.node_changed(&change);
        }
        while let Ok(change) = pods.try_recv() {
            scheduler.pod_changed(change);
        }
        while let Ok(outcome) = bindings.try_recv() {
            scheduler.binding_ended(outcome);
        }
        if stop.is_cancelled() {
            return;
        }
        if let Some(object) = scheduler.queue.pop(Instant::now()) {
            scheduler.schedule(object).await;
            tokio::task::consume_budget().await;
            continue;
        }
        let timer = scheduler.queue.next_timer();
        let timer = async {
            match timer {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(change) = namespaces.recv() => scheduler.namespace_changed(&change),
            Some(change) = nodes.recv() => scheduler.node_changed(&change),
            Some(change) = pods.recv() => scheduler.pod_changed(change),
            Some(outcome) = bindings.recv() => scheduler.binding_ended(outcome),
            () = timer => {}
        }
    }
}

/// Whether the pod still takes up room on its node.
fn occupies(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    phase != "Succeeded" && phase != "Failed"
}

/// Whether the pod is for this scheduler to place now.
fn wants_a_node(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.node_name.as_deref().unwrap_or_default().is_empty()
        && spec.scheduler_name.as_deref().unwrap_or(NAME) == NAME
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pod.metadata.deletion_timestamp.is_none()
        && occupies(pod)
}

impl Scheduler {
    fn namespace_changed(&mut self, change: &Change) {
        let name = change.object().name().to_owned();
        match &change.new {
            Some(object) => drop(self.namespaces.insert(name, object.labels().clone())),
            None => drop(self.namespaces.remove(&name)),
        }
    }

    fn node_changed(&mut self, change: &Change) {
        match &change.new {
            None => self.picture.remove_node(change.object().name()),
            Some(object) => {
                let Some(node) = typed::<NodeObject>(object) else { return };
                let bits = self.picture.put_node(&node);
                self.queue.wake(bits, Instant::now());
            }
        }
    }

    fn pod_changed(&mut self, change: Change) {
        let key = change.object().key().clone();
        let info = change.new.as_ref().and_then(PodInfo::new).filter(|info| occupies(&info.pod));
        let mut bits = 0;
        match info {
            Some(info) if !info.node_name().is_empty() => {
                self.queue.remove(&key);
                self.assumed.remove(&key);
                if !self.picture.has_pod(&key) {
                    bits |= wake::POD_ADDED;
                } else if change.old.as_ref().is_some_and(|old| old.labels() != info.object.labels()) {
                    bits |= wake::POD_ADDED | wake::POD_GONE;
                }
                let node = info.node_name().to_owned();
                self.picture.put_pod(info, &node);
            }
            // A pod that is assumed to be on its node stays there until the binding is known to have failed.
            Some(info) if wants_a_node(&info.pod) => {
                if !self.assumed.contains(&key) {
                    let changed = change.old.as_ref().is_some_and(|old| {
                        old.generation() != info.object.generation() || old.labels() != info.object.labels()
                    });
                    self.queue.put(info.object.clone(), info.priority, changed);
                }
            }
            _ => {
                self.queue.remove(&key);
                self.assumed.remove(&key);
                if self.picture.remove_pod(&key).is_some() {
                    bits |= wake::POD_GONE;
                }
            }
        }
        self.queue.wake(bits, Instant::now());
    }

    async fn schedule(&mut self, object: Arc<Object>) {
        let key = object.key().clone();
        let Some(info) = PodInfo::new(&object) else { return self.queue.remove(&key) };
        self.start = self.start.wrapping_add(1);
        let decided = decide::decide(&info, &self.picture, &self.namespaces, self.start, &mut self.rng);
        // Bounds what is under way; waits only when the API server is slower than we are.
        let permit = self.writes.clone().acquire_owned().await.expect("the semaphore is never closed");
        match decided {
            Ok(node) => {
                let node = node.name.to_string();
                self.queue.remove(&key);
                self.assumed.insert(key);
                self.picture.put_pod(info, &node);
                let (client, bound) = (self.client.clone(), self.bound.clone());
                tokio::spawn(async move {
                    let binding = json!({
                        "apiVersion": "v1",
                        "kind": "Binding",
                        "metadata": {"name": object.name(), "namespace": object.namespace(), "uid": object.uid()},
                        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
                    });
                    let result = client.post(Target::of(&object).sub("binding"), binding).await.map(drop);
                    let _ = bound.send(Bound { object, node, result });
                    drop(permit);
                });
            }
            Err(nofit) => {
                tracing::debug!(pod = %key, plugins = ?nofit.plugins, "No node will do");
                self.queue.park(&key, nofit.helped_by, Instant::now());
                self.say_unschedulable(&object, &info.pod, nofit.message, permit);
            }
        }
    }

    fn binding_ended(&mut self, outcome: Bound) {
        let Bound { object, node, result } = outcome;
        match result {
            Ok(()) => self.events.record(Happening {
                about: reference(&object),
                reason: "Scheduled".to_owned(),
                message: format!("Successfully assigned {} to {node}", object.key()),
                action: "Binding".to_owned(),
                ..Happening::default()
            }),
            Err(error) => {
                // It may have been seen with a node meanwhile, or be gone; then there is nothing to undo.
                if !self.assumed.remove(object.key()) {
                    return;
                }
                self.picture.remove_pod(object.key());
                self.queue.wake(wake::POD_GONE, Instant::now());
                if error.is_not_found() || error.is_conflict() {
                    tracing::debug!(pod = %object.key(), %error, "Pod changed while it was bound");
                } else {
                    tracing::warn!(pod = %object.key(), node, %error, "Binding failed");
                }
                if let Some(info) = PodInfo::new(&object)
                    && !error.is_not_found()
                {
                    self.queue.put(object.clone(), info.priority, false);
                    self.queue.retry(object.key(), Instant::now());
                }
            }
        }
    }

    /// Tells the user why the pod has no node: an event, and a condition if it says something new.
    fn say_unschedulable(
        &self,
        object: &Arc<Object>,
        pod: &Pod,
        message: String,
        permit: tokio::sync::OwnedSemaphorePermit,
    ) {
        self.events.record(Happening {
            about: reference(object),
            warning: true,
            reason: "FailedScheduling".to_owned(),
            message: message.clone(),
            action: "Scheduling".to_owned(),
            ..Happening::default()
        });
        let conditions =
            pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let Some(condition) = unschedulable(conditions, &message, object.generation(), self.clock.now())
        else {
            return;
        };
        let (client, object) = (self.client.clone(), object.clone());
        tokio::spawn(async move {
            let patch = Patch::Strategic(json!({"status": {"conditions": [condition]}}));
            if let Err(error) = client.patch(Target::of(&object).sub("status"), patch).await
                && !error.is_not_found()
            {
                tracing::warn!(pod = %object.key(), %error, "Cannot write why a pod has no node");
            }
            drop(permit);
        });
    }
}

/// The condition that says the pod found no node, unless it is there already.
fn unschedulable(
    conditions: &[PodCondition],
    message: &str,
    generation: i64,
    now: jiff::Timestamp,
) -> Option<PodCondition> {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    let old = conditions.iter().find(|condition| condition.type_ == "PodScheduled");
    let new = PodCondition {
        type_: "PodScheduled".to_owned(),
        status: "False".to_owned(),
        reason: Some("Unschedulable".to_owned()),
        message: Some(message.to_owned()),
        observed_generation: Some(generation).filter(|generation| *generation > 0),
        last_transition_time: match old {
            Some(old) if old.status == "False" => old.last_transition_time.clone(),
            _ => Some(Time(jiff::Timestamp::from_second(now.as_second()).unwrap_or(now))),
        },
        ..PodCondition::default()
    };
    let same = old.is_some_and(|old| {
        (&old.status, &old.reason, &old.message) == (&new.status, &new.reason, &new.message)
    });
    if same { None } else { Some(new) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_is_written_only_when_it_says_something_new() {
        let now: jiff::Timestamp = "2026-01-02T03:04:05.5Z".parse().unwrap();
        let first = unschedulable(&[], "no", 1, now).unwrap();
        assert_eq!(first.last_transition_time.as_ref().unwrap().0.to_string(), "2026-01-02T03:04:05Z");
        assert_eq!(unschedulable(std::slice::from_ref(&first), "no", 1, now), None);
        let later = now + std::time::Duration::from_secs(60);
        let second = unschedulable(std::slice::from_ref(&first), "other", 1, later).unwrap();
        assert_eq!(second.last_transition_time, first.last_transition_time, "the status did not change");
    }

    #[track_caller]
    fn check_ours(pod: serde_json::Value, want: bool) {
        assert_eq!(wants_a_node(&serde_json::from_value(pod).unwrap()), want);
    }

    #[test]
    fn only_pods_that_wait_for_this_scheduler_are_placed() {
        check_ours(json!({"spec": {"containers": []}}), true);
        check_ours(json!({"spec": {"containers": [], "nodeName": "n"}}), false);
        check_ours(json!({"spec": {"containers": [], "schedulerName": "mine"}}), false);
        check_ours(json!({"spec": {"containers": [], "schedulingGates": [{"name": "g"}]}}), false);
        check_ours(json!({"spec": {"containers": []}, "status": {"phase": "Failed"}}), false);
        let deleted =
            json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z"}, "spec": {"containers": []}});
        check_ours(deleted, false);
    }
}
