//! What a Deployment does next: which ReplicaSet to make, resize or delete, and what to say about it.
//!
//! Pure. Upstream: pkg/controller/deployment (sync, rolling, recreate, progress) and its util.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use minke_api::intstr::scaled;

use crate::context::{Typed, nonzero, seconds, until};

pub(crate) const REVISION: &str = "deployment.kubernetes.io/revision";
const HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub(crate) const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
pub(crate) const MAX: &str = "deployment.kubernetes.io/max-replicas";
pub(crate) const HASH: &str = "pod-template-hash";
/// Longest revision history that is kept in an annotation, in bytes.
const HISTORY_MAX: usize = 2000;
/// Annotations of a Deployment that its ReplicaSets do not get.
const OWN_ANNOTATIONS: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];

pub(crate) type Annotations = BTreeMap<String, String>;

/// One write. Sets are named by their place among those that were observed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Step {
    /// Make the ReplicaSet of the present template.
    Create {
        replicas: i32,
        annotations: Annotations,
    },
    /// Bring annotations and minReadySeconds of the new ReplicaSet up to date.
    Refresh {
        set: usize,
        annotations: Annotations,
        min_ready_seconds: i32,
    },
    Resize {
        set: usize,
        from: i32,
        to: i32,
    },
    Delete {
        set: usize,
    },
}

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub steps: Vec<Step>,
    /// The Deployment's revision annotation, if it is to change.
    pub revision: Option<String>,
    pub status: DeploymentStatus,
    /// Time until the rollout counts as stuck, unless something happens before.
    pub look_again: Option<Duration>,
}

/// A ReplicaSet of the Deployment as a plan sees it, and changes it.
#[derive(Clone)]
struct Set<'a> {
    at: usize,
    set: &'a Typed<ReplicaSet>,
    replicas: i32,
}

impl Set<'_> {
    fn actual(&self) -> i32 {
        self.set.status.as_ref().map_or(0, |status| status.replicas)
    }

    /// Whether its status is about its present size.
    fn is_observed(&self) -> bool {
        let observed = self.set.status.as_ref().and_then(|status| status.observed_generation);
        self.set.object.generation() <= observed.unwrap_or(0)
    }

    fn available(&self) -> i32 {
        self.set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
    }

    fn number(&self, annotation: &str) -> Option<i32> {
        annotations(self.set)?.get(annotation)?.parse().ok()
    }

    fn revision(&self) -> i64 {
        annotations(self.set).and_then(|all| all.get(REVISION)?.parse().ok()).unwrap_or(0)
    }

    /// Oldest first.
    fn age(&self) -> (Option<Timestamp>, &str) {
        (self.set.object.created(), self.set.object.name())
    }
}

fn annotations(set: &ReplicaSet) -> Option<&Annotations> {
    set.metadata.annotations.as_ref()
}

/// Decides. `sets` are the ReplicaSets of the Deployment; `old_pods_remain` tells whether any pod of one that
/// is not the new one may still run (it is asked only of Recreate). `now` is only compared and recorded.
pub(crate) fn plan(
    deployment: &Typed<Deployment>,
    sets: &[Typed<ReplicaSet>],
    old_pods_remain: impl Fn(&[&ReplicaSet]) -> bool,
    now: Timestamp,
) -> Plan {
    let mut rollout = Rollout::new(deployment, sets, now);
    if deployment.object.deleted().is_some() {
        return rollout.finish(false);
    }
    rollout.note_pause();
    let paused = rollout.spec.paused.unwrap_or(false);
    if !rollout.refresh_new() {
        // The new ReplicaSet is about to change; the rest of the plan can wait for that.
        return rollout.finish(!paused);
    }
    if paused || rollout.was_scaled() {
        rollout.scale();
        if paused {
            rollout.clean_up();
        }
        return rollout.finish(false);
    }
    match rollout.rolling() {
        true => rollout.roll(),
        false => rollout.recreate(old_pods_remain),
    }
    rollout.finish(true)
}

struct Rollout<'a> {
    deployment: &'a Typed<Deployment>,
    spec: &'a k8s_openapi::api::apps::v1::DeploymentSpec,
    replicas: i32,
    surge: i32,
    unavailable: i32,
    new: Option<Set<'a>>,
    old: Vec<Set<'a>>,
    now: Timestamp,
    conditions: Vec<DeploymentCondition>,
    plan: Plan,
}

impl<'a> Rollout<'a> {
    fn new(deployment: &'a Typed<Deployment>, sets: &'a [Typed<ReplicaSet>], now: Timestamp) -> Rollout<'a> {
        let spec = &deployment.spec;
        let replicas = spec.replicas.unwrap_or(1);
        let (surge, unavailable) = fenceposts(spec, replicas);
        let mut all: Vec<Set> = sets
            .iter()
            .enumerate()
            .map(|(at, set)| {
                let replicas = set.spec.replicas.unwrap_or(1);
                Set { at, set, replicas }
            })
            .collect();
        all.sort_by(|a, b| a.age().cmp(&b.age()));
        let new = all.iter().position(|set| is_of_template(set.set, &spec.template)).map(|at| all.remove(at));
        let conditions = deployment.status.as_ref().and_then(|status| status.conditions.clone());
        Rollout {
            deployment,
            spec,
            replicas,
            surge,
            unavailable,
            new,
            old: all,
            now,
            conditions: conditions.unwrap_or_default(),
            plan: Plan::default(),
        }
    }

    fn rolling(&self) -> bool {
        is_rolling(self.spec)
    }

    fn has_deadline(&self) -> bool {
        // kubectl and old clients write the largest number for "no deadline".
        self.spec.progress_deadline_seconds.is_some_and(|seconds| seconds != i32::MAX)
    }

    fn all(&self) -> impl Iterator<Item = &Set<'a>> {
        self.old.iter().chain(&self.new)
    }

    fn total(&self) -> i32 {
        self.all().map(|set| set.replicas).sum()
    }

    /// The most pods that there may be while it is scaled in mid-rollout.
    fn allowed(&self) -> i32 {
        if self.replicas > 0 { self.replicas + self.surge } else { 0 }
    }

    /// The pods that there are or may soon be, if that is known: a ReplicaSet that was just made smaller may not have come to
    /// it, or not even have heard of it. (Upstream goes by what it has told them, and so can have more pods for a
    /// moment than surge allows.)
    fn there(&self) -> Option<i32> {
        self.all().map(|set| set.is_observed().then(|| set.replicas.max(set.actual()))).sum()
    }

    fn condition(&self, type_: &str) -> Option<&DeploymentCondition> {
        condition(&self.conditions, type_)
    }

    fn set_condition(&mut self, type_: &str, status: &str, reason: &str, message: String) {
        set_condition(&mut self.conditions, type_, status, reason, message, self.now);
    }

    /// A pause stops the clock of the deadline, and so must be told.
    fn note_pause(&mut self) {
        let reason = self.condition("Progressing").and_then(|condition| condition.reason.as_deref());
        if !self.has_deadline() || reason == Some("ProgressDeadlineExceeded") {
            return;
        }
        match (self.spec.paused.unwrap_or(false), reason == Some("DeploymentPaused")) {
            (true, false) => {
                let message = "Deployment is paused".to_owned();
                self.set_condition("Progressing", "Unknown", "DeploymentPaused", message);
            }
            (false, true) => {
                let message = "Deployment is resumed".to_owned();
                self.set_condition("Progressing", "Unknown", "DeploymentResumed", message);
            }
            _ => {}
        }
    }

    /// Revision, annotations and minReadySeconds of the new ReplicaSet. Says whether they were as they should be.
    fn refresh_new(&mut self) -> bool {
        let Some(new) = &self.new else { return true };
        let revision = self.old.iter().map(Set::revision).max().unwrap_or(0) + 1;
        let wanted = new_annotations(self.deployment, annotations(new.set), revision);
        let min_ready_seconds = self.spec.min_ready_seconds.unwrap_or(0);
        let has_min_ready = new.set.spec.min_ready_seconds.unwrap_or(0);
        let name = new.set.object.name().to_owned();
        let shown = wanted.get(REVISION).cloned();
        let fresh = Some(&wanted) == annotations(new.set) && min_ready_seconds == has_min_ready;
        if !fresh {
            self.plan.steps.push(Step::Refresh { set: new.at, annotations: wanted, min_ready_seconds });
        }
        self.show_revision(shown);
        if self.has_deadline() && self.condition("Progressing").is_none() {
            let message = format!("Found new replica set {name:?}");
            self.set_condition("Progressing", "True", "FoundNewReplicaSet", message);
        }
        fresh
    }

    fn show_revision(&mut self, revision: Option<String>) {
        let shown = self.deployment.metadata.annotations.as_ref().and_then(|all| all.get(REVISION));
        if shown != revision.as_ref() {
            self.plan.revision = revision;
        }
    }

    /// Whether the Deployment was resized since its ReplicaSets were last.
    fn was_scaled(&self) -> bool {
        let active = self.all().filter(|set| set.replicas > 0);
        active.filter_map(|set| set.number(DESIRED)).any(|desired| desired != self.replicas)
    }

    fn resize(&mut self, at: usize, to: i32) {
        let set = self.old.iter_mut().chain(&mut self.new).find(|set| set.at == at);
        let set = set.expect("resized sets are among those of the rollout");
        let from = std::mem::replace(&mut set.replicas, to);
        let stale =
            set.number(DESIRED) != Some(self.replicas) || set.number(MAX) != Some(self.replicas + self.surge);
        if from != to || stale {
            self.plan.steps.push(Step::Resize { set: at, from, to });
        }
    }

    /// Brings the ReplicaSets to the Deployment's size without getting on with the rollout.
    fn scale(&mut self) {
        let active: Vec<Set> = self.all().filter(|set| set.replicas > 0).cloned().collect();
        if self.total() < self.allowed() && self.there() != Some(self.total()) {
            // What grows would meet pods that are still to go.
            return;
        }
        let only = match active.len() {
            0 => self.new.clone().or_else(|| self.old.last().cloned()),
            1 => Some(active[0].clone()),
            _ => None,
        };
        if let Some(only) = only {
            if only.replicas != self.replicas || was_sized_otherwise(&only, self.replicas) {
                self.resize(only.at, self.replicas);
            }
            return;
        }
        if active.is_empty() {
            return;
        }
        let saturated = self.new.as_ref().is_some_and(|new| {
            new.replicas == self.replicas
                && new.number(DESIRED) == Some(self.replicas)
                && new.available() == self.replicas
        });
        if saturated {
            let olds: Vec<usize> = self.old.iter().filter(|set| set.replicas > 0).map(|set| set.at).collect();
            return olds.into_iter().for_each(|at| self.resize(at, 0));
        }
        if self.rolling() {
            return self.scale_proportionally(active);
        }
        // Recreate goes by its own order; all there is to do is to record the size that is wanted.
        active.iter().for_each(|set| self.resize(set.at, set.replicas));
    }

    /// Spreads growth and shrinkage over the ReplicaSets in proportion to their sizes, so that a scaling in
    /// the middle of a rollout does not hasten it. What rounding leaves goes to the largest.
    fn scale_proportionally(&mut self, mut active: Vec<Set<'a>>) {
        let to_add = self.allowed() - active.iter().map(|set| set.replicas).sum::<i32>();
        // Of sets that are equally large, the newer grow and the older shrink first.
        active.sort_by(|a, b| {
            let newer = b.age().cmp(&a.age());
            b.replicas.cmp(&a.replicas).then(if to_add > 0 { newer } else { newer.reverse() })
        });
        let mut added = 0;
        let mut sizes: Vec<i32> = Vec::new();
        for set in &active {
            let share = self.share(set, to_add, added);
            added += share;
            sizes.push(set.replicas + share);
        }
        sizes[0] = (sizes[0] + to_add - added).max(0);
        for (set, size) in active.iter().zip(sizes) {
            self.resize(set.at, size);
        }
    }

    fn share(&self, set: &Set, to_add: i32, added: i32) -> i32 {
        let left = to_add - added;
        if set.replicas == 0 || to_add == 0 || left == 0 {
            return 0;
        }
        let fraction = if self.replicas == 0 {
            -set.replicas
        } else {
            let before = set
                .number(MAX)
                .filter(|max| *max != 0)
                .unwrap_or_else(|| self.old_status().replicas.unwrap_or(0));
            let now = f64::from(self.replicas + self.surge);
            // A set with pods was sized under some maximum; without a record its size is left alone.
            let ratio = if before == 0 { 1.0 } else { now / f64::from(before) };
            (f64::from(set.replicas) * ratio).round() as i32 - set.replicas
        };
        if to_add > 0 { fraction.min(left) } else { fraction.max(left) }
    }

    fn old_status(&self) -> DeploymentStatus {
        self.deployment.status.clone().unwrap_or_default()
    }

    /// Replicas that the new ReplicaSet may have now.
    fn new_size(&self) -> i32 {
        let present = self.new.as_ref().map_or(0, |new| new.replicas);
        if !self.rolling() {
            return self.replicas;
        }
        let Some(there) = self.there() else { return present };
        let room = self.replicas + self.surge - there;
        if room <= 0 { present } else { present + room.min(self.replicas - present) }
    }

    fn create(&mut self) {
        let revision = self.old.iter().map(Set::revision).max().unwrap_or(0) + 1;
        let mut annotations = new_annotations(self.deployment, None, revision);
        annotations.insert(DESIRED.to_owned(), self.replicas.to_string());
        annotations.insert(MAX.to_owned(), (self.replicas + self.surge).to_string());
        self.show_revision(annotations.get(REVISION).cloned());
        if self.has_deadline() {
            let name = set_name(self.deployment);
            let message = format!("Created new replica set {name:?}");
            self.set_condition("Progressing", "True", "NewReplicaSetCreated", message);
        }
        self.plan.steps.push(Step::Create { replicas: self.new_size(), annotations });
    }

    fn roll(&mut self) {
        let Some(new) = self.new.clone() else { return self.create() };
        let size = if new.replicas > self.replicas { self.replicas } else { self.new_size() };
        if new.replicas != size {
            self.resize(new.at, size);
            return;
        }
        if self.shrink_old(&new) == 0 && self.is_complete(&self.old_status()) {
            self.clean_up();
        }
    }

    /// Takes pods from the old ReplicaSets, first those that do not work anyway, as far as availability
    /// allows. Worked example: 10 replicas, at most 2 unavailable, surge 3, old 8 (all available), new 5 of
    /// which none works: 13 - (10 - 2) - 5 = 0, so nothing is taken and the rollout waits; after an undo,
    /// the roles change and 13 - 8 - 0 = 5 broken pods may go at once.
    fn shrink_old(&mut self, new: &Set) -> i32 {
        // A ReplicaSet that was just made smaller may still count pods that are about to go: they are spoken
        // for. (Upstream counts them, and can so take one pod too many.)
        let lasting = |set: &Set| set.available().min(set.replicas);
        let least = self.replicas - self.unavailable;
        let broken_new = new.replicas - lasting(new);
        let may_go = self.total() - least - broken_new;
        if may_go <= 0 {
            return 0;
        }
        let mut gone = 0;
        let mut sizes: Vec<(usize, i32)> = Vec::new();
        for set in self.old.iter().filter(|set| set.replicas > lasting(set)) {
            let go = (may_go - gone).min(set.replicas - lasting(set));
            if go > 0 {
                sizes.push((set.at, set.replicas - go));
                gone += go;
            }
        }
        let mut spare = self.all().map(lasting).sum::<i32>() - least;
        for set in &self.old {
            let size = sizes.iter().find(|(at, _)| *at == set.at).map_or(set.replicas, |(_, size)| *size);
            let go = spare.min(size);
            if go > 0 {
                sizes.retain(|(at, _)| *at != set.at);
                sizes.push((set.at, size - go));
                spare -= go;
                gone += go;
            }
        }
        sizes.into_iter().for_each(|(at, size)| self.resize(at, size));
        gone
    }

    fn recreate(&mut self, old_pods_remain: impl Fn(&[&ReplicaSet]) -> bool) {
        let shrink: Vec<usize> = self.old.iter().filter(|set| set.replicas > 0).map(|set| set.at).collect();
        if !shrink.is_empty() {
            return shrink.into_iter().for_each(|at| self.resize(at, 0));
        }
        let old: Vec<&ReplicaSet> = self.old.iter().map(|set| &**set.set).collect();
        if self.old.iter().any(|set| set.actual() > 0) || old_pods_remain(&old) {
            return;
        }
        let Some(new) = self.new.clone() else { return self.create() };
        if new.replicas != self.replicas {
            self.resize(new.at, self.replicas);
        }
        if self.is_complete(&self.old_status()) {
            self.clean_up();
        }
    }

    /// Deletes empty old ReplicaSets beyond the revision history, the oldest revisions first.
    fn clean_up(&mut self) {
        let Some(limit) = self.spec.revision_history_limit else { return };
        let mut old: Vec<&Set> = self.old.iter().filter(|set| set.set.object.deleted().is_none()).collect();
        let surplus = old.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        old.sort_by_key(|set| (set.revision(), set.age()));
        for set in old.into_iter().take(surplus) {
            if set.replicas == 0 && set.actual() == 0 && set.is_observed() {
                self.plan.steps.push(Step::Delete { set: set.at });
            }
        }
    }

    fn is_complete(&self, status: &DeploymentStatus) -> bool {
        status.updated_replicas.unwrap_or(0) == self.replicas
            && status.replicas.unwrap_or(0) == self.replicas
            && status.available_replicas.unwrap_or(0) == self.replicas
            && status.observed_generation.unwrap_or(0) >= self.deployment.object.generation()
    }

    /// The status, with the estimate of progress if `rolling_out`.
    fn finish(mut self, rolling_out: bool) -> Plan {
        let available: i32 = self.all().map(Set::available).sum();
        let sum = |count: &dyn Fn(&Set) -> i32| self.all().map(count).sum::<i32>();
        let terminating: Option<i32> = self
            .all()
            .map(|set| set.set.status.as_ref().and_then(|status| status.terminating_replicas))
            .sum();
        let ready = sum(&|set| set.set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0));
        let mut status = DeploymentStatus {
            observed_generation: Some(self.deployment.object.generation())
                .filter(|generation| *generation != 0),
            replicas: nonzero(sum(&|set| set.actual())),
            updated_replicas: nonzero(self.new.as_ref().map_or(0, Set::actual)),
            ready_replicas: nonzero(ready),
            available_replicas: nonzero(available),
            unavailable_replicas: nonzero((self.total() - available).max(0)),
            terminating_replicas: terminating,
            collision_count: self.old_status().collision_count,
            conditions: None,
        };
        if available >= self.replicas - self.unavailable {
            let message = "Deployment has minimum availability.".to_owned();
            self.set_condition("Available", "True", "MinimumReplicasAvailable", message);
        } else {
            let message = "Deployment does not have minimum availability.".to_owned();
            self.set_condition("Available", "False", "MinimumReplicasUnavailable", message);
        }
        if rolling_out {
            self.estimate_progress(&status);
            self.report_failures();
        }
        status.conditions = Some(self.conditions);
        self.plan.status = status;
        self.plan
    }

    fn estimate_progress(&mut self, status: &DeploymentStatus) {
        if !self.has_deadline() {
            return self.conditions.retain(|condition| condition.type_.as_deref() != Some("Progressing"));
        }
        let current = self.condition("Progressing").cloned();
        let reason = current.as_ref().and_then(|condition| condition.reason.as_deref()).unwrap_or_default();
        if status.replicas == status.updated_replicas && reason == "NewReplicaSetAvailable" {
            // No rollout is under way, whatever becomes of the pods.
            return;
        }
        let name = match &self.new {
            Some(new) => format!("ReplicaSet {:?}", new.set.object.name()),
            None => format!("Deployment {:?}", self.deployment.object.name()),
        };
        let updated = current.as_ref().and_then(|condition| condition.last_update_time.as_ref());
        let deadline = Duration::from_secs(self.spec.progress_deadline_seconds.unwrap_or(0).max(0) as u64);
        let until_stuck = updated.map(|updated| until(updated.0 + deadline, self.now));
        if self.is_complete(status) {
            let message = format!("{name} has successfully progressed.");
            self.set_condition("Progressing", "True", "NewReplicaSetAvailable", message);
        } else if is_progress(&self.old_status(), status) {
            let message = format!("{name} is progressing.");
            let since =
                current.filter(|c| c.status.as_deref() == Some("True")).and_then(|c| c.last_transition_time);
            // The time must move even when nothing else does: it is what the deadline counts from.
            self.conditions.retain(|condition| condition.type_.as_deref() != Some("Progressing"));
            self.set_condition("Progressing", "True", "ReplicaSetUpdated", message);
            if let (Some(last), Some(since)) = (self.conditions.last_mut(), since) {
                last.last_transition_time = Some(since);
            }
            self.plan.look_again = Some(deadline + Duration::from_secs(1));
        } else if reason == "ProgressDeadlineExceeded" {
        } else if until_stuck.is_some_and(|left| left.is_zero()) {
            let message = format!("{name} has timed out progressing.");
            self.set_condition("Progressing", "False", "ProgressDeadlineExceeded", message);
        } else {
            // A second more: the recorded time is cut to whole seconds.
            self.plan.look_again = until_stuck.map(|left| left + Duration::from_secs(1));
        }
    }

    /// Shows one failure of a ReplicaSet, preferably the new one's.
    fn report_failures(&mut self) {
        let failure = self.new.iter().chain(&self.old).find_map(|set| {
            let conditions = set.set.status.as_ref()?.conditions.as_ref()?;
            conditions.iter().find(|condition| condition.type_.as_deref() == Some("ReplicaFailure")).cloned()
        });
        let shown = self.condition("ReplicaFailure");
        match failure {
            None => self.conditions.retain(|condition| condition.type_.as_deref() != Some("ReplicaFailure")),
            Some(failure) if shown.is_some_and(|shown| shown.reason == failure.reason) => {}
            Some(failure) => {
                self.conditions.retain(|condition| condition.type_.as_deref() != Some("ReplicaFailure"));
                self.conditions.push(DeploymentCondition {
                    type_: Some("ReplicaFailure".to_owned()),
                    status: failure.status,
                    reason: failure.reason,
                    message: failure.message,
                    last_update_time: failure.last_transition_time.clone(),
                    last_transition_time: failure.last_transition_time,
                });
            }
        }
    }
}

fn was_sized_otherwise(set: &Set, replicas: i32) -> bool {
    set.number(DESIRED).is_some_and(|desired| desired != replicas)
}

fn is_rolling(spec: &k8s_openapi::api::apps::v1::DeploymentSpec) -> bool {
    let strategy = spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
    strategy != Some("Recreate")
}

/// New pods came, old pods went, or more are available.
fn is_progress(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let count = |n: Option<i32>| n.unwrap_or(0);
    let outdated = |status: &DeploymentStatus| count(status.replicas) - count(status.updated_replicas);
    count(new.updated_replicas) > count(old.updated_replicas)
        || outdated(new) < outdated(old)
        || count(new.ready_replicas) > count(old.ready_replicas)
        || count(new.available_replicas) > count(old.available_replicas)
}

/// How many pods above and below `replicas` a rollout may go. Not both zero, or it could not move.
fn fenceposts(spec: &k8s_openapi::api::apps::v1::DeploymentSpec, replicas: i32) -> (i32, i32) {
    if !is_rolling(spec) {
        return (0, 0);
    }
    let rolling = spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
    let surge = portion(rolling.and_then(|rolling| rolling.max_surge.as_ref()), replicas, true);
    let unavailable = portion(rolling.and_then(|rolling| rolling.max_unavailable.as_ref()), replicas, false);
    match (surge, unavailable.min(replicas)) {
        (0, 0) if replicas > 0 => (0, 1),
        limits => limits,
    }
}

/// A number, or a percentage of `whole`; the default, 25%, if it is absent or neither.
fn portion(value: Option<&IntOrString>, whole: i32, round_up: bool) -> i32 {
    let default = IntOrString::String("25%".to_owned());
    let portion = scaled(value.unwrap_or(&default), whole, round_up);
    portion.or_else(|_| scaled(&default, whole, round_up)).unwrap_or(0).max(0)
}

pub(crate) fn condition<'c>(
    conditions: &'c [DeploymentCondition],
    type_: &str,
) -> Option<&'c DeploymentCondition> {
    conditions.iter().find(|condition| condition.type_.as_deref() == Some(type_))
}

/// Sets a condition, unless one with this status and reason is there already.
pub(crate) fn set_condition(
    conditions: &mut Vec<DeploymentCondition>,
    type_: &str,
    status: &str,
    reason: &str,
    message: String,
    now: Timestamp,
) {
    let mut since = Some(seconds(now));
    if let Some(current) = condition(conditions, type_).filter(|c| c.status.as_deref() == Some(status)) {
        if current.reason.as_deref() == Some(reason) {
            return;
        }
        since = current.last_transition_time.clone();
    }
    conditions.retain(|condition| condition.type_.as_deref() != Some(type_));
    conditions.push(DeploymentCondition {
        type_: Some(type_.to_owned()),
        status: Some(status.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(seconds(now)),
        last_transition_time: since,
    });
}

/// The annotations of the new ReplicaSet: the Deployment's, its revision (never a lower one than it has), and
/// the revisions under which it was rolled back to.
fn new_annotations(deployment: &Deployment, present: Option<&Annotations>, revision: i64) -> Annotations {
    let mut annotations = present.cloned().unwrap_or_default();
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !OWN_ANNOTATIONS.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    let before = annotations.get(REVISION).cloned();
    if before.as_deref().and_then(|text| text.parse().ok()).unwrap_or(0) < revision {
        annotations.insert(REVISION.to_owned(), revision.to_string());
        if let Some(before) = before {
            let mut history = match annotations.get(HISTORY).filter(|history| !history.is_empty()) {
                Some(history) => format!("{history},{before}"),
                None => before,
            };
            while history.len() > HISTORY_MAX {
                history = history.split_once(',').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            }
            annotations.insert(HISTORY.to_owned(), history);
        }
    }
    annotations
}

/// Whether the pods of `set` are as `template` wants them, the label of the hash aside.
pub(crate) fn is_of_template(set: &ReplicaSet, template: &PodTemplateSpec) -> bool {
    let Some(own) = set.spec.template.as_ref() else { return false };
    if own.spec != template.spec {
        return false;
    }
    let strip = |template: &PodTemplateSpec| {
        let mut metadata = template.metadata.clone().unwrap_or_default();
        let labels = metadata.labels.get_or_insert_default();
        labels.remove(HASH);
        metadata.annotations.get_or_insert_default();
        metadata.creation_timestamp = None;
        metadata
    };
    strip(own) == strip(template)
}

/// The sizes that a resized ReplicaSet is annotated with: the Deployment's, and with surge.
pub(crate) fn limits(deployment: &Deployment) -> (i32, i32) {
    let spec = &deployment.spec;
    let replicas = spec.replicas.unwrap_or(1);
    (replicas, replicas + fenceposts(spec, replicas).0)
}

pub(crate) fn set_name(deployment: &Typed<Deployment>) -> String {
    format!("{}-{}", deployment.object.name(), template_hash(deployment))
}

/// The hash of the Deployment's template that names and labels its ReplicaSet and pods.
pub(crate) fn template_hash(deployment: &Deployment) -> String {
    let collisions = deployment.status.as_ref().and_then(|status| status.collision_count);
    hash_of(&deployment.spec.template, collisions)
}

/// A template's hash, which differs after a collision was counted. Only its looks are upstream's: its value
/// depends on how a template is encoded.
pub(crate) fn hash_of(template: &PodTemplateSpec, collisions: Option<i32>) -> String {
    let mut bytes = serde_json::to_vec(template).expect("typed objects serialise");
    if let Some(collisions) = collisions {
        bytes.extend(collisions.to_le_bytes());
    }
    safe_encode(fnv1a(&bytes))
}

/// FNV-1a, 32 bits.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Writes a number with letters and digits that make no words, and no names that could be misread.
fn safe_encode(number: u32) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    number.to_string().bytes().map(|digit| char::from(LETTERS[usize::from(digit) % LETTERS.len()])).collect()
}

#[cfg(test)]
#[path = "rollout_tests.rs"]
mod tests;
