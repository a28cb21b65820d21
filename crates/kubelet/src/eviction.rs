//! Keeps the node usable when something runs short: watches what is left, says so in the node's conditions,
//! and ends pods, those that use more than they asked for first; ends pods that outgrow their own limits of
//! local storage too. Upstream: pkg/kubelet/eviction, whose order and texts these are.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use minke_runtime::{ContainerState, DiskUse};
use tokio::time::Instant;

use crate::context::Context;
use crate::machine::meminfo;
use crate::pod::Pod;
use crate::preemption;
use crate::resources;
use crate::volumes;

/// How often it is looked; upstream's monitoring interval.
pub const EVERY: Duration = Duration::from_secs(10);
/// How long a condition stays after its reason has gone; upstream's pressure transition period.
const PRESSURE_LASTS: Duration = Duration::from_secs(300);
/// What pods get to end when the node can't wait.
const GRACE_SECONDS: i64 = 1;
/// Upstream keeps percentages of the disk free, which a workstation's disk rarely has.
const DEFAULTS: &str = "memory.available<100Mi,nodefs.available<1Gi,nodefs.inodesFree<1%,pid.available<1%";

/// What can run short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    Memory,
    Disk,
    Inodes,
    Pids,
}

impl Signal {
    /// The node's condition.
    pub fn condition(self) -> &'static str {
        match self {
            Signal::Memory => "MemoryPressure",
            Signal::Disk | Signal::Inodes => "DiskPressure",
            Signal::Pids => "PIDPressure",
        }
    }

    /// As messages name it.
    fn resource(self) -> &'static str {
        match self {
            Signal::Memory => "memory",
            Signal::Disk => "ephemeral-storage",
            Signal::Inodes => "inodes",
            Signal::Pids => "pids",
        }
    }
}

/// How little may be left, as upstream's `evictionHard` says it.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    signal: Signal,
    /// `100Mi` or `10%`
    text: String,
    least: Least,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Least {
    Units(u64),
    Percent(f64),
}

impl Threshold {
    pub fn defaults() -> Vec<Threshold> {
        Threshold::parse(DEFAULTS).expect("the defaults are well-formed")
    }

    /// `memory.available<100Mi,nodefs.available<10%`; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Vec<Threshold>, String> {
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Threshold::parse_one).collect()
    }

    fn parse_one(text: &str) -> Result<Threshold, String> {
        let (signal, value) =
            text.split_once('<').ok_or_else(|| format!("invalid eviction threshold {text:?}"))?;
        // Images and volumes lie on one file system.
        let signal = match signal {
            "memory.available" => Signal::Memory,
            "nodefs.available" | "imagefs.available" => Signal::Disk,
            "nodefs.inodesFree" | "imagefs.inodesFree" => Signal::Inodes,
            "pid.available" => Signal::Pids,
            other => return Err(format!("unsupported eviction signal {other:?}")),
        };
        let least = match value.strip_suffix('%') {
            Some(percent) => percent.parse().ok().filter(|p| (0.0..=100.0).contains(p)).map(Least::Percent),
            None => Quantity::parse(value).ok().and_then(|q| u64::try_from(q.value()).ok()).map(Least::Units),
        };
        let least = least.ok_or_else(|| format!("invalid eviction threshold value {value:?}"))?;
        Ok(Threshold { signal, text: value.to_owned(), least })
    }

    fn is_met(&self, left: Left) -> bool {
        let least = match self.least {
            Least::Units(units) => units,
            Least::Percent(percent) => (left.capacity as f64 * percent / 100.0) as u64,
        };
        left.capacity > 0 && left.available < least
    }
}

/// As `evictionHard` names them.
pub fn shown(thresholds: &[Threshold]) -> BTreeMap<&'static str, &str> {
    let name = |signal| match signal {
        Signal::Memory => "memory.available",
        Signal::Disk => "nodefs.available",
        Signal::Inodes => "nodefs.inodesFree",
        Signal::Pids => "pid.available",
    };
    thresholds.iter().map(|threshold| (name(threshold.signal), threshold.text.as_str())).collect()
}

/// What is left of something, and what there is in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    pub available: u64,
    pub capacity: u64,
}

/// What the node is short of, kept for a while. Shared by everyone who asks.
#[derive(Default)]
pub struct Pressure(Mutex<BTreeMap<&'static str, Instant>>);

impl Pressure {
    fn note(&self, condition: &'static str, now: Instant) -> bool {
        let mut known = self.0.lock().expect("nothing panics while the map is locked");
        known.insert(condition, now).is_none_or(|at| now.duration_since(at) >= PRESSURE_LASTS)
    }

    pub fn has(&self, condition: &str) -> bool {
        let known = self.0.lock().expect("nothing panics while the map is locked");
        known.get(condition).is_some_and(|at| at.elapsed() < PRESSURE_LASTS)
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
        let tolerates = pod.spec().tolerations.iter().flatten().any(|t| {
            t.key.as_deref().is_none_or(|key| key == "node.kubernetes.io/memory-pressure")
                && t.effect.as_deref().is_none_or(|effect| effect == "NoSchedule")
                && (t.operator.as_deref() == Some("Exists") || t.value.as_deref().unwrap_or("").is_empty())
        });
        if tolerates || resources::qos_class(pod) != "BestEffort" {
            return None;
        }
    }
    Some(("Evicted", format!("The node had condition: [{}]. ", conditions.join(" "))))
}

/// Why the node ends a pod that would go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
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
    fn own_fault(message: String) -> Eviction {
        Eviction { reason: "Evicted", message, disruption: None, grace: GRACE_SECONDS }
    }

    /// At once, for what the node is short of.
    fn shortage(message: String) -> Eviction {
        Eviction { disruption: Some(message.clone()), ..Eviction::own_fault(message) }
    }

    /// So that a pod can run here that is needed more.
    pub fn preemption(pod: &Pod) -> Eviction {
        Eviction {
            reason: preemption::REASON,
            message: preemption::MESSAGE.to_owned(),
            disruption: Some(preemption::DISRUPTION.to_owned()),
            grace: pod.grace_seconds(),
        }
    }

    /// How long its end may take before that is worth a word; upstream's timeout of killing a pod.
    pub fn patience(&self) -> Duration {
        let grace = u64::try_from(self.grace).unwrap_or(0);
        Duration::from_secs((grace + grace / 2).max(10))
    }
}

/// What a pod uses.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodUse {
    pub uid: String,
    pub priority: i32,
    pub critical: bool,
    pub pids: u64,
    pub inodes: u64,
    pub containers: Vec<ContainerUse>,
    /// Bytes of the pod's volumes on the disk.
    pub volumes: u64,
    pub memory: u64,
    pub memory_request: u64,
    pub disk_request: u64,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerUse {
    pub name: String,
    pub memory: u64,
    pub memory_request: u64,
    /// What it has written, with its logs.
    pub disk: u64,
    pub disk_request: u64,
    pub disk_limit: Option<u64>,
}

impl PodUse {
    fn disk(&self) -> u64 {
        self.volumes + self.containers.iter().map(|c| c.disk).sum::<u64>()
    }

    /// Use and request of what runs short.
    fn of(&self, signal: Signal) -> (u64, u64) {
        match signal {
            Signal::Memory => (self.memory, self.memory_request),
            Signal::Disk => (self.disk(), self.disk_request),
            Signal::Inodes => (self.inodes, 0),
            // Nobody asks for processes: those of a pod never exceed what it asked for.
            Signal::Pids => (self.pids, u64::MAX),
        }
    }
}

/// Puts those that are to go first to the front.
pub fn rank(pods: &mut [PodUse], signal: Signal) {
    pods.sort_by_key(|pod| {
        let (used, asked) = pod.of(signal);
        let beyond =
            if signal == Signal::Pids { i128::from(used) } else { i128::from(used) - i128::from(asked) };
        (used <= asked, pod.priority, std::cmp::Reverse(beyond))
    });
}

fn bytes(n: u64) -> Quantity {
    Quantity::bytes(i64::try_from(n).unwrap_or(i64::MAX))
}

/// Why the pod was ended, in the words of its status and event.
pub fn message(threshold: &Threshold, left: Left, pod: &PodUse) -> String {
    let resource = threshold.signal.resource();
    let amount = |n: u64| match threshold.signal {
        Signal::Memory | Signal::Disk => bytes(n).to_string(),
        Signal::Inodes | Signal::Pids => n.to_string(),
    };
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        threshold.text,
        amount(left.available)
    );
    for container in &pod.containers {
        let (used, asked) = match threshold.signal {
            Signal::Memory => (container.memory, container.memory_request),
            Signal::Disk => (container.disk, container.disk_request),
            Signal::Inodes | Signal::Pids => continue,
        };
        if used > asked {
            let (used, asked) = (amount(used), amount(asked));
            text.push_str(&format!(
                "Container {} was using {used}, request is {asked}, has larger consumption of {resource}. ",
                container.name
            ));
        }
    }
    text
}

/// Why a pod must go that has outgrown its own limits; `volumes` are the bytes in each `emptyDir`.
pub fn outgrown(pod: &Pod, used: &PodUse, volumes: &BTreeMap<String, u64>) -> Option<String> {
    for volume in pod.spec().volumes.iter().flatten() {
        let limit = volume.empty_dir.as_ref().and_then(|empty| empty.size_limit.as_ref());
        let Some(limit) = limit.and_then(|limit| Quantity::try_from(limit).ok()).filter(|q| !q.is_zero())
        else {
            continue;
        };
        let size = volumes.get(&volume.name).copied().unwrap_or(0);
        if i64::try_from(size).is_ok_and(|size| size > limit.value()) {
            let name = &volume.name;
            return Some(format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{limit}\". "));
        }
    }
    let limits: Vec<u64> = used.containers.iter().filter_map(|c| c.disk_limit).collect();
    let total: u64 = limits.iter().sum();
    if !limits.is_empty() && used.disk() > total {
        let total = bytes(total);
        return Some(format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {total}. "
        ));
    }
    used.containers.iter().find_map(|container| {
        let limit = container.disk_limit.filter(|limit| container.disk > *limit)?;
        let (name, limit) = (&container.name, bytes(limit));
        Some(format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\". "))
    })
}

/// Whether the pod has limits of local storage that nobody else enforces.
fn has_limits(pod: &Pod) -> bool {
    let sized = pod.spec().volumes.iter().flatten().any(|volume| {
        volume
            .empty_dir
            .as_ref()
            .is_some_and(|e| e.size_limit.is_some() && e.medium.as_deref().unwrap_or("").is_empty())
    });
    sized
        || pod
            .containers()
            .any(|(_, c)| resources::limit(c.resources.as_ref(), "ephemeral-storage").is_some())
}

/// Looks once; returns the pods to end and why.
pub async fn survey(context: Arc<Context>, pods: Vec<Pod>) -> Vec<(String, Eviction)> {
    let mut victims = vec![];
    let limited = pods.iter().filter(|pod| has_limits(pod));
    for pod in limited {
        let (used, volumes) = pod_use(&context, pod, true).await;
        victims.extend(
            outgrown(pod, &used, &volumes).map(|why| (pod.uid().to_owned(), Eviction::own_fault(why))),
        );
    }
    let left = left(&context.paths.data);
    let met =
        context.settings.thresholds.iter().filter(|threshold| threshold.is_met(left[&threshold.signal]));
    let mut met: Vec<&Threshold> = met.collect();
    // Memory first: it kills at random when it is not given back in time.
    met.sort_by_key(|threshold| threshold.signal);
    for threshold in &met {
        if context.pressure.note(threshold.signal.condition(), Instant::now()) {
            let text = format!("Attempting to reclaim {}", threshold.signal.resource());
            context.events.node(false, "EvictionThresholdMet", text);
        }
    }
    let (Some(threshold), true) = (met.first(), victims.is_empty()) else { return victims };
    let disk = matches!(threshold.signal, Signal::Disk | Signal::Inodes);
    let mut used = vec![];
    for pod in &pods {
        used.push(pod_use(&context, pod, disk).await.0);
    }
    rank(&mut used, threshold.signal);
    // One at a time: the next look tells whether that was enough.
    if let Some(victim) = used.iter().find(|pod| !pod.critical) {
        let why = message(threshold, left[&threshold.signal], victim);
        victims.push((victim.uid.clone(), Eviction::shortage(why)));
    }
    victims
}

fn left(data: &Path) -> BTreeMap<Signal, Left> {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let disk = rustix::fs::statvfs(data).ok();
    let number = |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
    let most: u64 = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(0);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    // `0.1 0.2 0.3 1/234 999`: of 234 tasks one runs.
    let tasks = load.split(['/', ' ']).nth(4).and_then(|tasks| tasks.parse::<u64>().ok()).unwrap_or(0);
    let of_disk = |pick: fn(&rustix::fs::StatVfs) -> Left| disk.as_ref().map(pick).unwrap_or_default();
    BTreeMap::from([
        (
            Signal::Memory,
            Left { available: meminfo(&memory, "MemAvailable"), capacity: meminfo(&memory, "MemTotal") },
        ),
        (
            Signal::Disk,
            of_disk(|d| Left { available: d.f_bavail * d.f_frsize, capacity: d.f_blocks * d.f_frsize }),
        ),
        (Signal::Inodes, of_disk(|d| Left { available: d.f_favail, capacity: d.f_files })),
        (Signal::Pids, Left { available: most.saturating_sub(tasks), capacity: most }),
    ])
}

/// What a pod uses, and each `emptyDir` of it; its files only with `disk`, for they must be walked.
async fn pod_use(context: &Context, pod: &Pod, disk: bool) -> (PodUse, BTreeMap<String, u64>) {
    let units = |q: Option<Quantity>| q.and_then(|q| u64::try_from(q.value()).ok());
    let asked = |name: &str| u64::try_from(resources::pod_request(pod, name)).unwrap_or(0);
    let mut used = PodUse {
        uid: pod.uid().to_owned(),
        priority: pod.spec().priority.unwrap_or(0),
        critical: resources::is_critical(pod),
        memory_request: asked("memory"),
        disk_request: asked("ephemeral-storage"),
        ..PodUse::default()
    };
    let mut sizes = BTreeMap::new();
    let mut sandboxes = context.runtime.list().await.unwrap_or_default();
    sandboxes.retain(|sandbox| sandbox.spec.uid == pod.uid());
    for sandbox in &sandboxes {
        let stats = context.runtime.sandbox_stats(&sandbox.spec.id).await.unwrap_or_default();
        // Sandboxes of one pod share its cgroup.
        used.memory = used.memory.max(stats.memory_working_set);
        used.pids = used.pids.max(stats.pids);
    }
    for (_, container) in pod.containers() {
        let mut sum = ContainerUse {
            name: container.name.clone(),
            memory_request: units(resources::request(container.resources.as_ref(), "memory")).unwrap_or(0),
            disk_request: units(resources::request(container.resources.as_ref(), "ephemeral-storage"))
                .unwrap_or(0),
            disk_limit: units(resources::limit(container.resources.as_ref(), "ephemeral-storage")),
            ..ContainerUse::default()
        };
        let own = sandboxes.iter().flat_map(|s| &s.containers).filter(|c| c.name == container.name);
        for status in own {
            if status.state == ContainerState::Running {
                let stats = context.runtime.container_stats(&status.id).await.unwrap_or_default();
                sum.memory += stats.memory_working_set;
            }
            if disk {
                let written = context.runtime.container_disk_use(&status.id).await.unwrap_or_default();
                sum.disk += written.bytes;
                used.inodes += written.inodes;
            }
        }
        if disk {
            let logs = walk(&context.paths.pod_logs(pod).join(&container.name)).await;
            sum.disk += logs.bytes;
            used.inodes += logs.inodes;
        }
        used.containers.push(sum);
    }
    let on_disk = |v: &&core::Volume| {
        v.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or("").is_empty())
    };
    for volume in pod.spec().volumes.iter().flatten().filter(on_disk).filter(|_| disk) {
        let found = walk(&volumes::dir(&context.paths, pod, volume)).await;
        used.volumes += found.bytes;
        used.inodes += found.inodes;
        sizes.insert(volume.name.clone(), found.bytes);
    }
    (used, sizes)
}

async fn walk(dir: &Path) -> DiskUse {
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || minke_runtime::disk_use(&dir)).await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn met(threshold: &str, available: u64, capacity: u64, want: bool) {
        let parsed = Threshold::parse(threshold).expect("a threshold");
        assert_eq!(parsed[0].is_met(Left { available, capacity }), want, "{threshold}");
    }

    #[test]
    fn thresholds_are_read() {
        met("memory.available<1Ki", 1023, 4096, true);
        met("memory.available<1Ki", 1024, 4096, false);
        met("nodefs.available<10%", 99, 1000, true);
        met("nodefs.available<10%", 100, 1000, false);
        met("pid.available<10%", 0, 0, false);
        for bad in ["memory.available", "x.available<1", "memory.available<x", "memory.available<101%"] {
            assert!(Threshold::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Threshold::defaults().len(), 4);
    }

    fn using(uid: &str, priority: i32, memory: u64, memory_request: u64) -> PodUse {
        PodUse { uid: uid.into(), priority, memory, memory_request, pids: memory, ..PodUse::default() }
    }

    #[track_caller]
    fn ranked(signal: Signal, want: &[&str]) {
        let mut pods = vec![
            using("modest", 0, 50, 100),
            using("greedy", 0, 300, 100),
            using("important", 9, 900, 100),
            using("bigger", 0, 400, 300),
        ];
        rank(&mut pods, signal);
        assert_eq!(pods.iter().map(|pod| pod.uid.as_str()).collect::<Vec<_>>(), want);
    }

    #[test]
    fn who_uses_more_than_asked_goes_first() {
        ranked(Signal::Memory, &["greedy", "bigger", "important", "modest"]);
        ranked(Signal::Pids, &["bigger", "greedy", "modest", "important"]);
    }

    #[test]
    fn the_message_says_what_was_short_and_who_took_it() {
        let threshold = &Threshold::parse("memory.available<100Mi").expect("a threshold")[0];
        let container = |name: &str, memory| ContainerUse { name: name.into(), memory, ..Default::default() };
        let pod = PodUse { containers: vec![container("a", 2048), container("b", 0)], ..PodUse::default() };
        assert_eq!(
            message(threshold, Left { available: 52 << 20, capacity: 1 << 30 }, &pod),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi. \
             Container a was using 2Ki, request is 0, has larger consumption of memory. "
        );
    }

    #[track_caller]
    fn check_outgrown(spec: Value, disk: u64, volume: u64, want: Option<&str>) {
        let pod = pod(json!({"spec": spec}));
        let limit = |c: &core::Container| resources::limit(c.resources.as_ref(), "ephemeral-storage");
        let containers = pod.spec().containers.iter().map(|c| ContainerUse {
            name: c.name.clone(),
            disk,
            disk_limit: limit(c).and_then(|q| u64::try_from(q.value()).ok()),
            ..ContainerUse::default()
        });
        let used = PodUse { containers: containers.collect(), volumes: volume, ..PodUse::default() };
        let volumes = BTreeMap::from([("v".to_owned(), volume)]);
        assert_eq!(outgrown(&pod, &used, &volumes).as_deref(), want);
    }

    #[test]
    fn limits_of_local_storage_are_kept() {
        let sized = json!({"volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Ki"}}]});
        check_outgrown(sized.clone(), 0, 1024, None);
        check_outgrown(sized, 0, 1025, Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Ki\". "));
        let limited = |n: usize| {
            let one =
                |n| json!({"name": format!("c{n}"), "resources": {"limits": {"ephemeral-storage": "2Ki"}}});
            json!({"containers": (0..n).map(one).collect::<Vec<_>>()})
        };
        check_outgrown(limited(2), 2048, 0, None);
        check_outgrown(
            limited(2),
            2048,
            1,
            Some("Pod ephemeral local storage usage exceeds the total limit of containers 4Ki. "),
        );
        let mut mixed = limited(1);
        mixed["containers"][0]["resources"]["limits"]["ephemeral-storage"] = json!("1Ki");
        check_outgrown(json!({}), 1 << 40, 1 << 40, None);
        check_outgrown(
            mixed,
            1025,
            0,
            Some("Pod ephemeral local storage usage exceeds the total limit of containers 1Ki. "),
        );
    }

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
}
