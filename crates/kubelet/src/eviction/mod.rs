//! Keeps the node usable when something runs short: watches what is left, says so in the node's conditions,
//! and ends pods, those that use more than they asked for first; ends pods that outgrow their own limits of
//! local storage too. Upstream: pkg/kubelet/eviction, whose order and texts these are.

mod thresholds;
mod usage;

pub use thresholds::{Limits, Signal, Statements};

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use minke_api::placement;
use tokio::sync::oneshot;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::context::Context;
use crate::machine::{self, meminfo};
use crate::pod::Pod;
use crate::preemption;
use crate::resources;
use thresholds::{History, Left, Observed, Resource, Threshold};

/// How often it is looked; upstream's monitoring interval.
pub const EVERY: Duration = Duration::from_secs(10);
/// What pods get to end when the node can't wait.
const GRACE_SECONDS: i64 = 1;

/// What the node is short of, kept for a while. Shared by everyone who asks.
#[derive(Default)]
pub struct Pressure {
    transition: Duration,
    history: Mutex<History>,
    told: watch::Sender<Vec<&'static str>>,
}

impl Pressure {
    pub fn new(limits: &Limits) -> Pressure {
        Pressure { transition: limits.transition, ..Pressure::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().expect("nothing panics while it is locked")
    }

    pub fn has(&self, condition: &str) -> bool {
        self.lock().has(condition, self.transition, Instant::now())
    }

    /// Takes down what is left; the thresholds to act for.
    fn note(&self, limits: &Limits, observed: &Observed) -> Vec<Threshold> {
        // One that has lapsed since the last look and is back is news, too.
        let before = self.all();
        let due = self.lock().note(limits, observed, Instant::now());
        let all = self.all();
        if all != before {
            self.told.send_replace(all);
        }
        due
    }

    /// Changes as soon as a look has found other conditions than the one before.
    pub fn changes(&self) -> watch::Receiver<Vec<&'static str>> {
        self.told.subscribe()
    }

    /// The conditions there are.
    pub fn all(&self) -> Vec<&'static str> {
        ["MemoryPressure", "DiskPressure", "PIDPressure"].into_iter().filter(|c| self.has(c)).collect()
    }
}

/// Why the node takes no such pod while it is short of something.
pub fn refuses(pod: &Pod, conditions: &[&str]) -> Option<(&'static str, String)> {
    if conditions.is_empty() || resources::is_critical(pod) {
        return None;
    }
    if conditions == ["MemoryPressure"] {
        let taint = core::Taint {
            key: "node.kubernetes.io/memory-pressure".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..core::Taint::default()
        };
        let tolerates = pod.spec().tolerations.iter().flatten().any(|t| placement::tolerates(t, &taint));
        if tolerates || resources::qos_class(pod) != "BestEffort" {
            return None;
        }
    }
    Some(("Evicted", format!("The node had condition: [{}]. ", conditions.join(" "))))
}

/// Why the node ends a pod that would go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// What it is counted under: the signal of a threshold or limit, or the resource that a critical pod is short of.
    pub signal: String,
    /// Of the pod's status and event, with the message.
    pub reason: &'static str,
    pub message: String,
    /// What the condition `DisruptionTarget` says. A pod that has outgrown its own limits does not get one.
    pub disruption: Option<String>,
    /// Seconds that its containers get to end.
    pub grace: i64,
}

impl Eviction {
    /// At once, for having outgrown its limits.
    fn own_fault(signal: &str, message: String) -> Eviction {
        let signal = signal.to_owned();
        Eviction { signal, reason: "Evicted", message, disruption: None, grace: GRACE_SECONDS }
    }

    /// For what the node is short of: at once if it is too short, else with time to end.
    fn shortage(pod: &Pod, threshold: &Threshold, message: String, grace_max: i64) -> Eviction {
        let grace = match threshold.is_hard() {
            true => GRACE_SECONDS,
            false => pod.grace_seconds().min(grace_max).max(GRACE_SECONDS),
        };
        let disruption = Some(message.clone());
        Eviction { disruption, grace, ..Eviction::own_fault(threshold.signal.name(), message) }
    }

    /// So that a pod can run here that is needed more.
    pub fn preemption(pod: &Pod, resource: &str) -> Eviction {
        Eviction {
            signal: resource.to_owned(),
            reason: preemption::REASON,
            message: preemption::MESSAGE.to_owned(),
            disruption: Some(preemption::DISRUPTION.to_owned()),
            grace: pod.grace_seconds(),
        }
    }

    /// Whether the pod goes for what it, or somebody, has written.
    pub fn is_for_disk(&self) -> bool {
        let signals = ["nodefs.", "imagefs.", "emptydirfs.", "ephemeral"];
        signals.iter().any(|start| self.signal.starts_with(start))
    }

    /// How long its end may take before that is worth a word; upstream's timeout of killing a pod.
    pub fn patience(&self) -> Duration {
        let grace = u64::try_from(self.grace).unwrap_or(0);
        Duration::from_secs((grace + grace / 2).max(10))
    }
}

/// How many pods were ended, by reason and signal.
#[derive(Default)]
pub struct Counts(Mutex<BTreeMap<(&'static str, String), u64>>);

impl Counts {
    pub fn add(&self, eviction: &Eviction) {
        let mut counts = self.0.lock().expect("nothing panics while counting");
        *counts.entry((eviction.reason, eviction.signal.clone())).or_default() += 1;
    }

    /// By signal.
    pub fn of(&self, reason: &str) -> Vec<(String, u64)> {
        let counts = self.0.lock().expect("nothing panics while counting");
        let of = counts.iter().filter(|((counted, _), _)| *counted == reason);
        of.map(|((_, signal), count)| (signal.clone(), *count)).collect()
    }
}

/// Looks once; returns the pods to end and why.
pub async fn survey(context: Arc<Context>, pods: Vec<Pod>) -> Vec<(String, Eviction)> {
    let limits = &context.settings.eviction;
    let observed = observe(&context).await;
    let due = context.pressure.note(limits, &observed);
    let mut victims = vec![];
    for pod in pods.iter().filter(|pod| usage::has_limits(pod) && !resources::is_critical(pod)) {
        let (used, volumes) = usage::pod_use(&context, pod, true).await;
        let why = usage::outgrown(pod, &used, &volumes);
        victims.extend(why.map(|(signal, why)| (pod.uid().to_owned(), Eviction::own_fault(signal, why))));
    }
    let (Some(threshold), true) = (due.first(), victims.is_empty()) else { return victims };
    let resource = threshold.signal.resource();
    let text = format!("Attempting to reclaim {}", resource.name());
    context.events.node(false, "EvictionThresholdMet", text);
    let disk = matches!(resource, Resource::Disk | Resource::Inodes);
    if disk && win_back(&context).await {
        return vec![];
    }
    let left = observed.get(&threshold.signal).copied().unwrap_or_default();
    victim(&context, &pods, threshold, left).await.into_iter().collect()
}

/// Removes images that nobody uses; whether that was enough.
async fn win_back(context: &Context) -> bool {
    let (done, freed) = oneshot::channel();
    if context.unused_images.send(done).await.is_err() || freed.await.is_err() {
        return false;
    }
    context.settings.eviction.all_resolved(&observe(context).await)
}

/// The pod that goes. One at a time: the next look tells whether that was enough.
async fn victim(
    context: &Context,
    pods: &[Pod],
    threshold: &Threshold,
    left: Left,
) -> Option<(String, Eviction)> {
    let resource = threshold.signal.resource();
    let disk = matches!(resource, Resource::Disk | Resource::Inodes);
    let mut used = vec![];
    for pod in pods {
        used.push(usage::pod_use(context, pod, disk).await.0);
    }
    usage::rank(&mut used, resource);
    let victim = used.iter().find(|pod| !pod.critical)?;
    let pod = pods.iter().find(|pod| pod.uid() == victim.uid)?;
    let message = usage::message(threshold, left, victim);
    let grace_max = context.settings.eviction.pod_grace_max;
    Some((victim.uid.clone(), Eviction::shortage(pod, threshold, message, grace_max)))
}

/// What is left of everything.
async fn observe(context: &Context) -> Observed {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = Left { available: meminfo(&memory, "MemAvailable"), capacity: meminfo(&memory, "MemTotal") };
    let disk = rustix::fs::statvfs(&context.paths.data).ok();
    let of_disk = |pick: fn(&rustix::fs::StatVfs) -> Left| disk.as_ref().map(pick).unwrap_or_default();
    let bytes = of_disk(|d| Left { available: d.f_bavail * d.f_frsize, capacity: d.f_blocks * d.f_frsize });
    let inodes = of_disk(|d| Left { available: d.f_favail, capacity: d.f_files });
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    // `0.1 0.2 0.3 1/234 999`: of 234 tasks one runs.
    let tasks = load.split(['/', ' ']).nth(4).and_then(|tasks| tasks.parse::<u64>().ok()).unwrap_or(0);
    let most = machine::pids_max();
    let mut observed: Observed = [
        (Signal::Memory, memory),
        (Signal::NodeFs, bytes),
        (Signal::ImageFs, bytes),
        (Signal::NodeFsInodes, inodes),
        (Signal::ImageFsInodes, inodes),
        (Signal::Pids, Left { available: most.saturating_sub(tasks), capacity: most }),
    ]
    .into();
    let pods = context.runtime.cgroup_stats(&resources::pods_cgroup(&context.cgroup_root)).await;
    if let Some(pods) = pods.ok().filter(|pods| pods.memory_limit > 0) {
        let available = pods.memory_limit.saturating_sub(pods.memory_working_set);
        observed.insert(Signal::AllocatableMemory, Left { available, capacity: pods.memory_limit });
    }
    observed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::json;

    #[test]
    fn a_node_under_pressure_takes_few_pods() {
        let best_effort = pod(json!({}));
        let burstable =
            pod(json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}}));
        let text = |pod: &Pod, conditions: &[&str]| refuses(pod, conditions).map(|(_, text)| text);
        assert_eq!(text(&best_effort, &[]), None);
        let memory = Some("The node had condition: [MemoryPressure]. ".to_owned());
        assert_eq!(text(&best_effort, &["MemoryPressure"]), memory);
        assert_eq!(text(&burstable, &["MemoryPressure"]), None);
        assert!(text(&burstable, &["MemoryPressure", "DiskPressure"]).is_some());
        let tolerant = pod(json!({"spec": {"tolerations": [
            {"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}]}}));
        assert_eq!(text(&tolerant, &["MemoryPressure"]), None);
        let critical = pod(json!({"spec": {"priority": 2_000_001_000}}));
        assert_eq!(text(&critical, &["DiskPressure"]), None);
    }

    #[track_caller]
    fn ends(eviction: Eviction, grace: i64, patience: u64) {
        assert_eq!((eviction.grace, eviction.patience()), (grace, Duration::from_secs(patience)));
    }

    #[test]
    fn pods_get_time_to_end_when_the_node_has_it() {
        let pod = pod(json!({"spec": {"terminationGracePeriodSeconds": 60}}));
        let shortage = |hard: bool, grace_max| {
            let mut limits = Limits::default();
            limits.thresholds[0].grace = Duration::from_secs(u64::from(!hard));
            Eviction::shortage(&pod, &limits.thresholds[0], "m".to_owned(), grace_max)
        };
        ends(shortage(true, 90), 1, 10);
        ends(shortage(false, 90), 60, 90);
        ends(shortage(false, 30), 30, 45);
        ends(shortage(false, 0), 1, 10);
        ends(Eviction::preemption(&pod, "cpu"), 60, 90);
        let own = Eviction::own_fault("emptydirfs.limit", "m".to_owned());
        ends(own.clone(), 1, 10);
        assert_eq!((shortage(true, 0).disruption.as_deref(), own.disruption.as_deref()), (Some("m"), None));
        assert!(own.is_for_disk() && !shortage(true, 0).is_for_disk());
        let counts = Counts::default();
        [shortage(true, 0), shortage(false, 0), own, Eviction::preemption(&pod, "cpu")]
            .iter()
            .for_each(|eviction| counts.add(eviction));
        let evicted = [("emptydirfs.limit".to_owned(), 1), ("memory.available".to_owned(), 2)];
        assert_eq!(counts.of("Evicted"), evicted);
        assert_eq!(counts.of("Preempting"), [("cpu".to_owned(), 1)]);
    }
}
