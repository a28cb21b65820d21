//! What the loop does with each change, each pod and each outcome.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node as NodeObject, Pod, PodCondition};
use minke_api::{Key, Object, Status};
use minke_client::{
    Change, Client, Clock, DeleteOptions, EventRecorder, EventSource, Happening, Informer, Informers, Patch,
    Target,
};
use minke_client::{reference, typed};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::decide::{NoFit, Reserving, Try, World, decide};
use crate::hints::{Event, Hint, may_help, means_the_same};
use crate::picture::PodInfo;
use crate::plugins::wake;
use crate::preempt::{self, Budget, Candidate};
use crate::profile::Profile;
use crate::queue::{Queue, Why};
use crate::reserve::ReservePlugin;

/// Bindings and status writes that may be under way at once.
const WRITES_MAX: usize = 256;

/// How something ended that ran beside the loop.
pub enum Outcome {
    Bound {
        object: Arc<Object>,
        node: String,
        reserving: Reserving,
        /// How often the pod was tried.
        attempts: u32,
        result: Result<(), BindError>,
    },
    /// The victims of a pod were told to go, or could not be.
    Preempted { info: Arc<PodInfo>, why: Why, result: Result<(), Box<Status>> },
}

/// Where binding a pod failed.
pub enum BindError {
    Before(String),
    Binding(Box<Status>),
}

pub struct Scheduler {
    client: Arc<dyn Client>,
    clock: Clock,
    profiles: BTreeMap<String, (Arc<Profile>, EventRecorder)>,
    budgets: Arc<Informer>,
    pub world: World,
    pub queue: Queue,
    /// Pods that were given a node and are not yet seen with it.
    assumed: HashSet<Key>,
    done: mpsc::UnboundedSender<Outcome>,
    writes: Arc<Semaphore>,
    rng: SmallRng,
    /// Where the next round over the nodes begins.
    start: usize,
}

/// Whether the pod still takes up room on its node.
fn occupies(object: &Object) -> bool {
    !matches!(object.field("status.phase"), Some("Succeeded" | "Failed"))
}

impl Scheduler {
    pub fn new(
        informers: &Informers,
        config: &Config,
        budgets: Arc<Informer>,
        reserving: Vec<Box<dyn ReservePlugin>>,
        done: mpsc::UnboundedSender<Outcome>,
        stop: &CancellationToken,
    ) -> Scheduler {
        let client = informers.client().clone();
        let profile = |profile: &Profile| {
            let source = EventSource { component: profile.name.clone(), host: String::new(), series: true };
            let events = EventRecorder::new(client.clone(), source, config.clock, stop.clone());
            (profile.name.clone(), (Arc::new(profile.clone()), events))
        };
        Scheduler {
            profiles: config.settings.profiles.iter().map(profile).collect(),
            client,
            clock: config.clock,
            budgets,
            world: World { reserving, ..World::default() },
            queue: Queue::new(config.settings.backoff_initial, config.settings.backoff_max),
            assumed: HashSet::new(),
            done,
            writes: Arc::new(Semaphore::new(WRITES_MAX)),
            rng: SmallRng::seed_from_u64(config.seed),
            start: 0,
        }
    }

    fn profile_of(&self, object: &Object) -> Option<&(Arc<Profile>, EventRecorder)> {
        self.profiles.get(object.field("spec.schedulerName").unwrap_or(crate::NAME))
    }

    pub fn namespace_changed(&mut self, change: &Change) {
        let same = |old: &Arc<Object>| change.new.as_ref().is_some_and(|new| new.labels() == old.labels());
        if change.old.as_ref().is_some_and(same) {
            return;
        }
        let labels = change.new.as_ref().map(|object| object.labels().clone());
        self.world.picture.set_namespace(change.object().name(), labels);
        self.wake(&Event { bits: wake::NAMESPACE, ..Event::default() });
    }

    pub fn node_changed(&mut self, change: &Change) {
        match &change.new {
            None => {
                self.world.picture.remove_node(change.object().name());
                self.wake(&Event { bits: wake::NODE_REMOVED, ..Event::default() });
            }
            Some(object) => {
                let Some(node) = typed::<NodeObject>(object) else { return };
                let (bits, slot) = self.world.picture.put_node(&node);
                self.wake(&Event { bits, slot: Some(slot), ..Event::default() });
            }
        }
    }

    /// Something that reserving plugins follow changed.
    pub fn reserved_changed(&mut self, change: &Change) {
        let Scheduler { world, queue, .. } = self;
        queue.wake(wake::RESERVED, Instant::now(), |info, rejecting| {
            let rows = crate::plugins::PLUGINS.len();
            let concerned = |at: &usize| rejecting & (1 << (rows + at)) != 0;
            let helps = (0..world.reserving.len())
                .filter(concerned)
                .any(|at| world.reserving[at].may_help(info, change));
            (if helps { Hint::Helps } else { Hint::Not(0) }, false)
        });
    }

    /// Wakes the parked pods that the event may help.
    fn wake(&mut self, event: &Event) {
        if event.bits == 0 {
            return;
        }
        let Scheduler { world, queue, profiles, .. } = self;
        queue.wake(event.bits, Instant::now(), |info, rejecting| {
            let name = info.object.field("spec.schedulerName").unwrap_or(crate::NAME);
            match profiles.get(name) {
                Some((profile, _)) => {
                    (may_help(world, profile, info, rejecting, event), means_the_same(rejecting))
                }
                None => (Hint::Not(0), true),
            }
        });
    }

    pub fn pod_changed(&mut self, change: &Change) {
        let key = change.object().key();
        match change.new.as_ref().filter(|object| occupies(object)) {
            Some(object) if object.field("spec.nodeName").is_some_and(|name| !name.is_empty()) => {
                self.placed(object);
            }
            // A pod that is assumed to be on its node stays there until the binding is known to have failed.
            Some(object) if waits(object, self.profile_of(object).map(|(profile, _)| &**profile)) => {
                if !self.assumed.contains(key) {
                    self.pending(object);
                }
            }
            _ => self.gone(key),
        }
    }

    fn placed(&mut self, object: &Arc<Object>) {
        let key = object.key();
        self.queue.remove(key);
        let assumed = self.assumed.remove(key);
        let held = self.world.picture.forget_nomination(key);
        if self.world.picture.refresh(object, assumed) {
            if assumed && let Some((placed, slot)) = self.world.picture.pod(key) {
                let info = placed.info.clone();
                let bits = wake::POD_ADDED;
                self.wake(&Event { bits, slot: Some(slot), added: Some(&info), ..Event::default() });
            }
        } else if let Some(info) = PodInfo::new(object).map(Arc::new) {
            let before = self.world.picture.remove_pod(key);
            let node = info.node_name().to_owned();
            let slot = self.world.picture.put_pod(info.clone(), &node);
            if let Some((gone, slot)) = &before {
                let (bits, slot) = (wake::POD_GONE, Some(*slot));
                self.wake(&Event { bits, slot, gone: Some(gone), ..Event::default() });
            }
            let bits = wake::POD_ADDED;
            self.wake(&Event { bits, slot: Some(slot), added: Some(&info), ..Event::default() });
        }
        if held.is_some() {
            self.wake(&Event { bits: wake::POD_GONE, slot: held, ..Event::default() });
        }
    }

    fn pending(&mut self, object: &Arc<Object>) {
        let key = object.key();
        if !self.queue.refresh(object) {
            let Some(info) = PodInfo::new(object).map(Arc::new) else { return self.gone(key) };
            self.queue.put(info.clone());
            // Room that was held before a restart, or by another's word.
            if let Some(node) = object.field("status.nominatedNodeName").filter(|node| !node.is_empty()) {
                self.world.picture.nominate(info, node);
            }
        }
    }

    fn gone(&mut self, key: &Key) {
        self.queue.remove(key);
        self.assumed.remove(key);
        if let Some((info, slot)) = self.world.picture.remove_pod(key) {
            for plugin in &mut self.world.reserving {
                plugin.unreserve(&info);
            }
            let event =
                Event { bits: wake::POD_GONE, slot: Some(slot), gone: Some(&info), ..Event::default() };
            self.wake(&event);
        }
        let slot = self.world.picture.forget_nomination(key);
        if slot.is_some() {
            self.wake(&Event { bits: wake::POD_GONE, slot, ..Event::default() });
        }
    }

    /// Gives a pod a node, or says why not. `object` is its newest revision.
    pub async fn schedule(&mut self, info: &Arc<PodInfo>, object: &Arc<Object>) {
        let Some((profile, events)) = self.profile_of(object).cloned() else {
            return self.queue.remove(object.key());
        };
        // Bounds what is under way; waits only when the API server is slower than we are.
        let permit = self.writes.clone().acquire_owned().await.expect("the semaphore is never closed");
        let attempt = Try::begin(info, &profile, &mut self.world);
        let decided = attempt.and_then(|attempt| {
            let slot = decide(&attempt, &mut self.world, &mut self.start, &mut self.rng)?;
            Ok((slot, attempt.reserving))
        });
        match decided {
            Ok((slot, reserving)) => self.assume(info, object, slot, reserving, &events, permit),
            Err(nofit) => self.unschedulable(info, object, &profile, &events, nofit, permit),
        }
    }

    fn assume(
        &mut self,
        info: &Arc<PodInfo>,
        object: &Arc<Object>,
        slot: u32,
        reserving: Reserving,
        events: &EventRecorder,
        permit: OwnedSemaphorePermit,
    ) {
        let node = self.world.picture.node(slot).name.to_string();
        let World { picture, reserving: plugins, .. } = &mut self.world;
        let refused = reserving.iter().find_map(|at| plugins[*at].reserve(info, picture.node(slot)).err());
        if let Some(message) = refused {
            for at in &reserving {
                plugins[*at].unreserve(info);
            }
            self.queue.retry(object.key(), Instant::now());
            return failed_scheduling(events, object, message);
        }
        let before: Vec<_> = reserving.iter().filter_map(|at| plugins[*at].pre_bind(info, &node)).collect();
        let attempts = self.queue.take(object.key());
        self.assumed.insert(object.key().clone());
        self.world.picture.put_pod(info.clone(), &node);
        let (client, done, object) = (self.client.clone(), self.done.clone(), object.clone());
        let writes = self.writes.clone();
        tokio::spawn(async move {
            let mut permit = Some(permit);
            let result = async {
                if !before.is_empty() {
                    // It may take minutes, and must not keep others from binding.
                    permit = None;
                    for step in before {
                        step.await.map_err(|error| BindError::Before(error.message))?;
                    }
                    permit = writes.acquire_owned().await.ok();
                }
                let target = Target::of(&object).sub("binding");
                let bound = client.post(target, binding(&object, &node)).await;
                bound.map(drop).map_err(|error| BindError::Binding(Box::new(error)))
            }
            .await;
            let _ = done.send(Outcome::Bound { object, node, reserving, attempts, result });
            drop(permit);
        });
    }

    fn unschedulable(
        &mut self,
        info: &Arc<PodInfo>,
        object: &Arc<Object>,
        profile: &Arc<Profile>,
        events: &EventRecorder,
        nofit: NoFit,
        permit: OwnedSemaphorePermit,
    ) {
        let now = Instant::now();
        let key = object.key();
        tracing::debug!(pod = %key, plugins = ?nofit.plugins(&self.world), "No node will do");
        let why = Why::new(nofit.rejecting);
        let mut message = nofit.message.clone();
        // What the pod's status is to say of the node where it holds room.
        let mut nominated: Option<String> = None;
        if nofit.nodes > 0 {
            let budgets =
                || self.budgets.snapshot().values().filter_map(|object| Budget::of(object)).collect();
            // The same plugins looked at the pod a moment ago; those that are concerned remember it.
            let chosen = match Try::begin(info, profile, &mut self.world) {
                Ok(attempt) if profile.preemption => {
                    preempt::choose(&attempt, &mut self.world, &nofit, budgets, &mut self.rng)
                }
                Ok(_) => Err(preempt::Refusal::off()),
                Err(_) => Err(preempt::Refusal::nowhere()),
            };
            match chosen {
                Ok(candidate) => {
                    let node = self.world.picture.node(candidate.slot).name.to_string();
                    self.preempt(info, &candidate, &node, events, why);
                    self.say_unschedulable(object, events, message, Some(node), permit);
                    return;
                }
                Err(refusal) => {
                    message.push_str(&format!(" {}", refusal.message));
                    if refusal.forget_nomination {
                        let slot = self.world.picture.forget_nomination(key);
                        let said =
                            object.field("status.nominatedNodeName").is_some_and(|name| !name.is_empty());
                        if said {
                            nominated = Some(String::new());
                        }
                        self.queue.park(key, why, now);
                        if slot.is_some() {
                            self.wake(&Event { bits: wake::POD_GONE, slot, ..Event::default() });
                        }
                        return self.say_unschedulable(object, events, message, nominated, permit);
                    }
                }
            }
        }
        self.queue.park(key, why, now);
        self.say_unschedulable(object, events, message, nominated, permit);
    }

    /// Holds room for the pod and tells the victims to go, beside the loop; the pod is tried again when they are.
    fn preempt(
        &mut self,
        info: &Arc<PodInfo>,
        candidate: &Candidate,
        node: &str,
        events: &EventRecorder,
        why: Why,
    ) {
        let picture = &mut self.world.picture;
        // Pods of lower priority that hold room there look elsewhere.
        let lesser = |other: &&Arc<PodInfo>| other.priority < info.priority;
        let displaced: Vec<Arc<PodInfo>> =
            picture.node(candidate.slot).nominated.iter().filter(lesser).cloned().collect();
        picture.nominate(info.clone(), node);
        for other in &displaced {
            picture.forget_nomination(other.key());
            self.queue.put(other.clone());
        }
        tracing::info!(pod = %info.key(), node, victims = candidate.victims.len(), "Preempting pods");
        let victims: Vec<Arc<Object>> =
            candidate.victims.iter().filter(|victim| victim.deleted().is_none()).cloned().collect();
        if victims.is_empty() {
            self.queue.park(info.key(), why, Instant::now());
            return;
        }
        let (client, events, done) = (self.client.clone(), events.clone(), self.done.clone());
        let (info, node, clock) = (info.clone(), node.to_owned(), self.clock);
        tokio::spawn(async move {
            let mut result = Ok(());
            for other in displaced {
                let patch = Patch::Merge(json!({ "status": { "nominatedNodeName": null } }));
                if let Err(error) = client.patch(Target::of(&other.object).sub("status"), patch).await {
                    tracing::debug!(pod = %other.key(), %error, "Cannot clear a nomination");
                }
            }
            for victim in victims {
                match evict(&*client, &info, &victim, clock).await {
                    Ok(true) => events.record(Happening {
                        about: reference(&victim),
                        reason: "Preempted".to_owned(),
                        message: format!("Preempted by pod {} on node {node}", info.object.uid()),
                        action: "Preempting".to_owned(),
                        related: Some(reference(&info.object)),
                        ..Happening::default()
                    }),
                    Ok(false) => {}
                    Err(error) => {
                        result = Err(Box::new(error));
                        break;
                    }
                }
            }
            let _ = done.send(Outcome::Preempted { info, why, result });
        });
    }

    pub fn ended(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Bound { object, node, reserving, attempts, result } => {
                self.binding_ended(&object, &node, &reserving, attempts, result);
            }
            Outcome::Preempted { info, why, result: Ok(()) } => {
                self.queue.park(info.key(), why, Instant::now());
            }
            Outcome::Preempted { info, result: Err(error), .. } => {
                tracing::warn!(pod = %info.key(), %error, "Preempting pods failed");
                self.queue.retry(info.key(), Instant::now());
            }
        }
    }

    fn binding_ended(
        &mut self,
        object: &Arc<Object>,
        node: &str,
        reserving: &Reserving,
        attempts: u32,
        result: Result<(), BindError>,
    ) {
        let Some((_, events)) = self.profile_of(object).cloned() else { return };
        let error = match result {
            Ok(()) => {
                return events.record(Happening {
                    about: reference(object),
                    reason: "Scheduled".to_owned(),
                    message: format!("Successfully assigned {} to {node}", object.key()),
                    action: "Binding".to_owned(),
                    ..Happening::default()
                });
            }
            Err(error) => error,
        };
        // It may have been seen with a node meanwhile, or be gone; then there is nothing to undo.
        if !self.assumed.remove(object.key()) {
            return;
        }
        let Some((info, slot)) = self.world.picture.remove_pod(object.key()) else { return };
        for at in reserving {
            self.world.reserving[*at].unreserve(&info);
        }
        let slot = Some(slot);
        self.wake(&Event { bits: wake::POD_GONE, slot, gone: Some(&info), ..Event::default() });
        match error {
            BindError::Binding(error) if error.is_not_found() => return,
            BindError::Binding(error) if error.is_conflict() => {
                tracing::debug!(pod = %object.key(), %error, "Pod changed while it was bound");
            }
            BindError::Binding(error) => {
                tracing::warn!(pod = %object.key(), node, %error, "Binding failed");
                failed_scheduling(&events, object, format!("binding rejected: {}", error.message));
            }
            BindError::Before(message) => failed_scheduling(&events, object, message),
        }
        self.queue.put_back(info, attempts, Instant::now());
    }

    /// Tells the user why the pod has no node: an event, and a condition if it says something new. `nominated`
    /// is what the status shall say of the node that room is held on, if that changes; empty for none.
    fn say_unschedulable(
        &self,
        object: &Arc<Object>,
        events: &EventRecorder,
        message: String,
        nominated: Option<String>,
        permit: OwnedSemaphorePermit,
    ) {
        failed_scheduling(events, object, message.clone());
        let pod = typed::<Pod>(object);
        let conditions = pod.as_ref().and_then(|pod| pod.status.as_ref()?.conditions.as_deref());
        let condition =
            unschedulable(conditions.unwrap_or_default(), &message, object.generation(), self.clock.now());
        let mut status = json!({});
        if let Some(condition) = condition {
            status["conditions"] = json!([condition]);
        }
        match nominated {
            Some(node) if node.is_empty() => status["nominatedNodeName"] = Value::Null,
            Some(node) if object.field("status.nominatedNodeName") != Some(&node) => {
                status["nominatedNodeName"] = node.into();
            }
            _ => {}
        }
        if status.as_object().is_some_and(serde_json::Map::is_empty) {
            return;
        }
        let (client, object) = (self.client.clone(), object.clone());
        tokio::spawn(async move {
            let patch = Patch::Strategic(json!({ "metadata": { "uid": object.uid() }, "status": status }));
            if let Err(error) = client.patch(Target::of(&object).sub("status"), patch).await
                && !error.is_not_found()
                && !error.is_conflict()
            {
                tracing::warn!(pod = %object.key(), %error, "Cannot write why a pod has no node");
            }
            drop(permit);
        });
    }
}

/// Whether a pod without a node is to be given one now. `profile` is that of its scheduler's name, if it is ours.
fn waits(object: &Object, profile: Option<&Profile>) -> bool {
    object.deleted().is_none() && profile.is_some_and(|profile| !profile.gates || !is_gated(object))
}

fn is_gated(object: &Object) -> bool {
    typed::<Pod>(object).is_some_and(|pod| {
        let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
        gates.is_some_and(|gates| !gates.is_empty())
    })
}

fn binding(object: &Object, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": object.name(), "namespace": object.namespace(), "uid": object.uid()},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    })
}

fn failed_scheduling(events: &EventRecorder, object: &Object, message: String) {
    events.record(Happening {
        about: reference(object),
        warning: true,
        reason: "FailedScheduling".to_owned(),
        message,
        action: "Scheduling".to_owned(),
        ..Happening::default()
    });
}

/// Marks a victim and deletes it; `false` when it was gone already.
async fn evict(client: &dyn Client, by: &PodInfo, victim: &Object, clock: Clock) -> Result<bool, Status> {
    let scheduler = by.object.field("spec.schedulerName").unwrap_or(crate::NAME);
    let condition = json!({
        "type": "DisruptionTarget",
        "status": "True",
        "reason": preempt::REASON,
        "message": format!("{scheduler}: preempting to accommodate a higher priority pod"),
        "lastTransitionTime": minke_api::time::format_seconds(clock.now()),
        "observedGeneration": victim.generation(),
    });
    let patch = json!({ "metadata": { "uid": victim.uid() }, "status": { "conditions": [condition] } });
    let marked = client.patch(Target::of(victim).sub("status"), Patch::Strategic(patch)).await;
    let options = DeleteOptions { uid: Some(victim.uid().to_owned()), ..DeleteOptions::default() };
    let deleted = match marked {
        Ok(_) => client.delete(Target::of(victim), options).await,
        Err(error) => Err(error),
    };
    match deleted {
        Ok(()) => Ok(true),
        // Another pod may have its name by now.
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(false),
        Err(error) => Err(error),
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
    fn check_waits(mut pod: Value, want: bool) {
        pod["metadata"]["name"] = "a".into();
        pod["spec"]["containers"] = json!([]);
        let object = Object::from_value(minke_api::Kind::of::<Pod>(), &pod).unwrap();
        let profile = Profile::default();
        let name = object.field("spec.schedulerName").unwrap_or(crate::NAME);
        assert_eq!(waits(&object, Some(&profile).filter(|profile| profile.name == name)), want);
    }

    #[test]
    fn only_pods_that_wait_for_this_scheduler_are_placed() {
        check_waits(json!({}), true);
        check_waits(json!({"spec": {"schedulerName": "mine"}}), false);
        check_waits(json!({"spec": {"schedulingGates": [{"name": "g"}]}}), false);
        check_waits(json!({"spec": {"schedulingGates": []}}), true);
        check_waits(json!({"metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z"}}), false);
    }
}
