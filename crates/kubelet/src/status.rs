//! The status of a pod, computed from what is observed. Pure.
//!
//! Phases, conditions, reasons and messages are upstream's (`getPhase`, `GenerateContainersReadyCondition`
//! and their relatives in pkg/kubelet), since controllers and people match on them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use minke_runtime::{ContainerState, ContainerStatus};
use serde_json::{Map, Value, json};

use crate::observed::{Cause, IMAGE_ANNOTATION, IMAGE_ID_ANNOTATION, Observed};
use crate::plan::{self, Fate};
use crate::pod::{Class, Pod, go_duration};
use crate::rounds::{self, Round};
use crate::{resize, resources, volumes};

/// Scheme of container ids.
pub const ID_PREFIX: &str = "minke://";

/// Conditions of ours that come and go.
pub const PASSING: [&str; 2] = [resize::PENDING, resize::IN_PROGRESS];

/// Reason and message of containers whose pod starts over.
const STARTING_OVER: (&str, &str) =
    ("RestartingAllContainers", "The container is removed because RestartAllContainers in place");

/// Bytes of all last words of a pod together.
const WORDS_MAX: usize = 12 << 10;

/// The keys of `status` that the agent writes; the rest is others'.
const KEYS: [&str; 14] = [
    "phase",
    "conditions",
    "message",
    "reason",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
    "allocatedResources",
    "resources",
];

/// The status that `o` amounts to. `previous` is the last one that was written or read.
pub fn status(
    pod: &Pod,
    o: &Observed,
    host_ip: IpAddr,
    previous: &core::PodStatus,
    now: Timestamp,
) -> core::PodStatus {
    let ended = o.cleanup > crate::observed::Cleanup::None;
    let statuses = |wanted: fn(Class) -> bool| -> Option<Vec<core::ContainerStatus>> {
        let all = pod.containers().filter(|(class, _)| wanted(*class));
        let list: Vec<_> =
            all.map(|(class, container)| container_status(pod, o, class, container, previous, now)).collect();
        (!list.is_empty()).then_some(list)
    };
    let mut containers = statuses(|class| class == Class::Main).unwrap_or_default();
    let mut inits = statuses(|class| matches!(class, Class::Init | Class::Sidecar)).unwrap_or_default();
    let mut reason = None;
    let mut message = None;
    let phase = match (previous.phase.as_deref(), &o.ending) {
        // Terminal stays terminal.
        (Some(phase @ ("Succeeded" | "Failed")), _) => {
            (reason, message) = (previous.reason.clone(), previous.message.clone());
            phase
        }
        (_, Some(ending)) => {
            if ended && o.rejected.is_none() {
                mark_lost(pod, &mut inits, &mut containers);
            }
            let quiet = !o.all_containers().any(|c| c.state == ContainerState::Running);
            match (phase(pod, &inits, &containers, quiet), &ending.cause) {
                // Controllers replace a failed pod: it must not be told of while it still runs.
                (phase, Cause::Failed { .. }) if !quiet => phase,
                (_, Cause::Failed { reason: r, message: m }) => {
                    (reason, message) = (Some(r.clone()), Some(m.clone()));
                    "Failed"
                }
                // Everything is over: no other phase is left.
                ("Pending" | "Running", _) if ended => "Failed",
                (phase, _) => phase,
            }
        }
        _ => phase(pod, &inits, &containers, false),
    };
    cut_words(&mut [&mut inits, &mut containers]);
    // As upstream: init containers in the order in which they run, all others by name.
    let by_name =
        |list: &mut Vec<core::ContainerStatus>| list.sort_by(|one, other| one.name.cmp(&other.name));
    by_name(&mut containers);
    let mut ephemeral = statuses(|class| class == Class::Ephemeral);
    ephemeral.as_mut().map(by_name);
    let rejected = o.rejected.is_some();
    let address = if pod.host_network() { Some(host_ip) } else { o.address() };
    let pod_ip = address.map(|ip| ip.to_string()).or_else(|| previous.pod_ip.clone());
    let pod_ip = pod_ip.filter(|_| !rejected && !pod_ip_is_stale(o));
    let conditions = conditions(pod, o, phase, &inits, &containers, previous, now);
    core::PodStatus {
        phase: Some(phase.to_owned()),
        conditions: Some(conditions),
        reason,
        message,
        host_ip: (!rejected).then(|| host_ip.to_string()),
        host_ips: (!rejected).then(|| vec![core::HostIP { ip: host_ip.to_string() }]),
        pod_ips: pod_ip.clone().map(|ip| vec![core::PodIP { ip }]),
        pod_ip,
        start_time: Some(previous.start_time.clone().unwrap_or(Time(now))),
        container_statuses: (!rejected).then_some(containers),
        init_container_statuses: (!rejected && !inits.is_empty()).then_some(inits),
        ephemeral_container_statuses: ephemeral,
        allocated_resources: pod.spec().resources.as_ref().and_then(|whole| whole.requests.clone()),
        resources: match is_resizing_whole(pod, o) {
            true => previous.resources.clone(),
            false => pod.spec().resources.clone().filter(|_| o.ready_sandbox().is_some()),
        },
        observed_generation: Some(pod.object().generation()).filter(|generation| *generation > 0),
        ..core::PodStatus::default()
    }
}

/// All last words of a pod together are limited; each container gets its part of that.
fn cut_words(lists: &mut [&mut Vec<core::ContainerStatus>]) {
    let count: usize = lists.iter().map(|list| list.len()).sum();
    let most = WORDS_MAX / count.max(1);
    for status in lists.iter_mut().flat_map(|list| list.iter_mut()) {
        for state in [&mut status.state, &mut status.last_state].into_iter().flatten() {
            let words = state.terminated.as_mut().and_then(|terminated| terminated.message.as_mut());
            if let Some(words) = words.filter(|words| words.len() > most) {
                words.truncate(words.floor_char_boundary(most));
            }
        }
    }
}

/// An address that is known only from the API server belongs to no sandbox of ours when there is none.
fn pod_ip_is_stale(o: &Observed) -> bool {
    o.current_sandbox().is_none() && o.ending.is_none()
}

fn terminated(o: &Observed, c: &ContainerStatus) -> core::ContainerStateTerminated {
    let message = o.messages.get(&c.id).filter(|text| !text.is_empty()).unwrap_or(&c.message);
    core::ContainerStateTerminated {
        container_id: Some(format!("{ID_PREFIX}{}", c.id)),
        exit_code: c.exit_code.unwrap_or(137),
        finished_at: Some(Time(c.finished_at.unwrap_or(c.created_at))),
        message: Some(message.clone()).filter(|text| !text.is_empty()),
        reason: Some(c.reason.clone()).filter(|text| !text.is_empty()),
        signal: None,
        // Upstream's runtimes print the epoch for a container that never started.
        started_at: Some(Time(c.started_at.unwrap_or(Timestamp::UNIX_EPOCH))),
    }
}

fn waiting(reason: &str, message: &str) -> core::ContainerState {
    core::ContainerState {
        waiting: Some(core::ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: (!message.is_empty()).then(|| message.to_owned()),
        }),
        ..core::ContainerState::default()
    }
}

/// What a container waits for, when something keeps it from starting (again).
fn waits_for(
    pod: &Pod,
    o: &Observed,
    class: Class,
    container: &core::Container,
    now: Timestamp,
) -> Option<(String, String)> {
    if o.ending.is_some() {
        return None;
    }
    let name = &container.name;
    let blocked = o.waiting.get(name).map(|waiting| {
        let (reason, message) = waiting.shown(now);
        (reason.to_owned(), message.to_owned())
    });
    let crashed = |delay: SignedDuration| {
        let delay = go_duration(delay.unsigned_abs());
        let message = format!("back-off {delay} restarting failed container={name} pod={}", pod.long_name());
        Some(("CrashLoopBackOff".to_owned(), message))
    };
    let round = Round::of(pod, o);
    if class != Class::Ephemeral
        && let Some(past) = o.latest(name).filter(|c| c.state == ContainerState::Exited && round.is_past(c))
    {
        let waits = round.begins(o).filter(|(_, at, _)| *at > now);
        return match waits {
            Some((cause, _, delay)) if cause.id == past.id => crashed(delay),
            None if !round.is_ending(o) => blocked.or_else(|| Some(not_started(pod))),
            _ => Some((STARTING_OVER.0.to_owned(), STARTING_OVER.1.to_owned())),
        };
    }
    match plan::fate(pod, class, container, o) {
        Fate::Start => blocked,
        Fate::Restart { at, delay } if at > now => {
            // A start that failed is told of first, then that it is tried again more slowly.
            if let Some(blocked) = blocked
                && at.duration_since(now) > delay / 2
            {
                return Some(blocked);
            }
            crashed(delay)
        }
        // It was killed so that it runs again: that it ended is not the end of it.
        Fate::Restart { .. } if o.latest(name).is_some_and(|c| o.restarting.contains_key(&c.id)) => {
            blocked.or_else(|| Some(("ContainerCreating".to_owned(), String::new())))
        }
        Fate::Restart { .. } => blocked,
        _ => None,
    }
}

/// What a container waits for that was not started yet.
fn not_started(pod: &Pod) -> (String, String) {
    let reason = if pod.has_init() { "PodInitializing" } else { "ContainerCreating" };
    (reason.to_owned(), String::new())
}

fn container_status(
    pod: &Pod,
    o: &Observed,
    class: Class,
    container: &core::Container,
    previous: &core::PodStatus,
    now: Timestamp,
) -> core::ContainerStatus {
    let name = &container.name;
    let history = o.history(name);
    let known = known_status(previous, name);
    // Of a pod that is over, what was told stays true when nothing is left of it.
    let over = matches!(previous.phase.as_deref(), Some("Succeeded" | "Failed"));
    if let Some(known) = known.filter(|_| over && history.is_empty()) {
        return known.clone();
    }
    let round = Round::of(pod, o);
    let as_terminated = |c: &ContainerStatus| core::ContainerState {
        terminated: Some(terminated(o, c)),
        ..core::ContainerState::default()
    };
    // What is known of a run once another one follows in round `next`.
    let as_last = |c: &ContainerStatus, next: u32| match class != Class::Ephemeral
        && rounds::made_in(c) < next
    {
        true => core::ContainerState { terminated: Some(started_over()), ..core::ContainerState::default() },
        false => as_terminated(c),
    };
    // Until its `postStart` hook is through, a container is not there yet.
    let is_up = |c: &ContainerStatus| c.state == ContainerState::Running && !o.is_starting(&c.name);
    let latest = history.first();
    let starts_over = class != Class::Ephemeral
        && o.ending.is_none()
        && latest.is_some_and(|c| c.state == ContainerState::Exited && round.is_past(c));
    let mut last_state = latest.zip(history.get(1)).map(|(next, c)| as_last(c, rounds::made_in(next)));
    let blocked = waits_for(pod, o, class, container, now);
    let state = match (history.first(), &blocked) {
        (Some(latest), Some((reason, message))) if latest.state == ContainerState::Exited => {
            last_state = Some(as_last(latest, round.number));
            waiting(reason, message)
        }
        (Some(latest), _) if latest.state == ContainerState::Exited => as_terminated(latest),
        (Some(latest), _) if is_up(latest) => core::ContainerState {
            running: Some(core::ContainerStateRunning { started_at: latest.started_at.map(Time) }),
            ..core::ContainerState::default()
        },
        (_, Some((reason, message))) => waiting(reason, message),
        _ => {
            let (reason, message) = not_started(pod);
            waiting(&reason, &message)
        }
    };
    let running = state.running.is_some();
    let probes = latest.and_then(|c| o.probes.get(&c.id)).copied();
    let started = running && probes.is_some_and(|probes| probes.started());
    let ready = match class {
        Class::Init => state.terminated.as_ref().is_some_and(|t| t.exit_code == 0),
        Class::Ephemeral => false,
        _ => running && probes.is_some_and(|probes| probes.ready()),
    };
    // One that is made but was not started yet is nothing to tell of: starting it follows at once.
    let started_once = latest.filter(|c| c.state == ContainerState::Exited || is_up(c));
    let annotation = |key| started_once.and_then(|c| c.annotations.get(key)).cloned();
    let image = annotation(IMAGE_ANNOTATION).or(container.image.clone()).unwrap_or_default();
    core::ContainerStatus {
        name: name.clone(),
        image,
        image_id: annotation(IMAGE_ID_ANNOTATION).unwrap_or_default(),
        container_id: started_once.map(|c| format!("{ID_PREFIX}{}", c.id)),
        restart_count: latest
            .map_or(0, |c| {
                i32::try_from(c.attempt).unwrap_or(i32::MAX).saturating_add(i32::from(starts_over))
            })
            .max(known.map_or(0, |known| known.restart_count)),
        last_state: Some(last_state.unwrap_or_default()),
        ready,
        started: (class != Class::Ephemeral).then_some(started),
        // Its first process had one, if it came to be; that stays so when it has ended.
        user: started_once.filter(|c| c.pid.is_some()).map(|c| user(c)),
        volume_mounts: mounts(container),
        allocated_resources: container
            .resources
            .as_ref()
            .and_then(|r| r.requests.clone())
            .filter(|_| running),
        // Until new limits hold, the old ones are what there is.
        resources: match latest {
            Some(latest)
                if running
                    && !resources::same(&resources::of_container(pod, container), &latest.resources) =>
            {
                known.and_then(|known| known.resources.clone())
            }
            _ => container.resources.clone().filter(|_| running),
        },
        state: Some(state),
        stop_signal: latest.map(|c| c.stop_signal.clone()).filter(|signal| !signal.is_empty()),
        ..core::ContainerStatus::default()
    }
}

/// The run of a container that ended for all of its pod to start over.
fn started_over() -> core::ContainerStateTerminated {
    core::ContainerStateTerminated {
        exit_code: 137,
        reason: Some(STARTING_OVER.0.to_owned()),
        message: Some(STARTING_OVER.1.to_owned()),
        ..core::ContainerStateTerminated::default()
    }
}

/// Whether the pod's own limits are others than it was granted.
fn is_resizing_whole(pod: &Pod, o: &Observed) -> bool {
    o.ready_sandbox()
        .is_some_and(|sandbox| !resources::same(&resources::of_pod(pod), &sandbox.spec.resources))
}

/// Whether the pod has other limits than it was granted, or a container that runs, or last ran and will again.
pub fn is_resizing(pod: &Pod, o: &Observed) -> bool {
    is_resizing_whole(pod, o)
        || pod.containers().filter(|(class, _)| *class != Class::Ephemeral).any(|(_, container)| {
            let latest = o.latest(&container.name);
            let latest =
                latest.filter(|c| c.state == ContainerState::Running || o.restarting.contains_key(&c.id));
            latest.is_some_and(|c| !resources::same(&resources::of_container(pod, container), &c.resources))
        })
}

/// How often containers ran, by name, as far as a status tells.
pub fn runs(status: &core::PodStatus) -> BTreeMap<String, u32> {
    let lists = [&status.container_statuses, &status.init_container_statuses];
    let ran = lists.into_iter().flatten().flatten().filter(|known| known.container_id.is_some());
    ran.map(|known| (known.name.clone(), u32::try_from(known.restart_count).unwrap_or(0).saturating_add(1)))
        .collect()
}

fn known_status<'a>(status: &'a core::PodStatus, name: &str) -> Option<&'a core::ContainerStatus> {
    let lists =
        [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    lists.into_iter().flatten().flatten().find(|known| known.name == name)
}

fn user(c: &ContainerStatus) -> core::ContainerUser {
    let groups = c.supplementary_groups.iter().copied().map(i64::from).collect();
    core::ContainerUser {
        linux: Some(core::LinuxContainerUser {
            uid: c.uid.into(),
            gid: c.gid.into(),
            supplemental_groups: Some(groups),
        }),
    }
}

fn mounts(container: &core::Container) -> Option<Vec<core::VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref()?.iter().map(|mount| core::VolumeMountStatus {
        name: mount.name.clone(),
        mount_path: mount.mount_path.clone(),
        read_only: mount.read_only.filter(|readonly| *readonly),
        recursive_read_only: mount
            .read_only
            .filter(|readonly| *readonly)
            .map(|_| if volumes::is_recursive(mount) { "Enabled" } else { "Disabled" }.to_owned()),
        ..core::VolumeMountStatus::default()
    });
    Some(mounts.collect())
}

/// Containers of a pod that is over can't be waiting or running any more; of one that was initialised,
/// nobody knows how they ended.
fn mark_lost(pod: &Pod, inits: &mut [core::ContainerStatus], containers: &mut [core::ContainerStatus]) {
    let was_initialized = !pod.has_init()
        || inits.iter().all(|c| {
            c.ready || c.started == Some(true) || c.state.as_ref().is_some_and(|s| s.terminated.is_some())
        });
    if !was_initialized {
        return;
    }
    for status in containers {
        let state = status.state.get_or_insert_default();
        if state.terminated.is_some() {
            continue;
        }
        *state = core::ContainerState {
            terminated: Some(core::ContainerStateTerminated {
                exit_code: 137,
                reason: Some("ContainerStatusUnknown".to_owned()),
                message: Some("The container could not be located when the pod was terminated".to_owned()),
                ..core::ContainerStateTerminated::default()
            }),
            ..core::ContainerState::default()
        };
        status.ready = false;
        status.started = Some(false);
    }
}

/// The phase that container states amount to. `quiet`: the pod is over and nothing will be restarted.
fn phase(
    pod: &Pod,
    inits: &[core::ContainerStatus],
    mains: &[core::ContainerStatus],
    quiet: bool,
) -> &'static str {
    let (mut pending_init, mut failed_init) = (false, false);
    let (mut running, mut waiting, mut stopped, mut succeeded) = (0, 0, 0, 0);
    let empty = core::ContainerState::default();
    let has_ended = |status: &core::ContainerStatus| {
        status.last_state.as_ref().is_some_and(|last| last.terminated.is_some())
    };
    for (status, (class, _)) in inits.iter().zip(pod.containers()) {
        let state = status.state.as_ref().unwrap_or(&empty);
        let before = || {
            let last = status.last_state.as_ref().and_then(|last| last.terminated.as_ref());
            last.filter(|last| last.reason.as_deref() != Some(STARTING_OVER.0)).map(|last| last.exit_code)
        };
        match class {
            Class::Sidecar if state.running.is_some() => {
                running += 1;
                pending_init |= status.started != Some(true);
            }
            // A sidecar that ended does not count.
            Class::Sidecar if state.terminated.is_some() || has_ended(status) => {}
            Class::Sidecar => {
                pending_init = true;
                waiting += 1;
            }
            _ => match (&state.terminated, before()) {
                (Some(end), _) => failed_init |= has_failed(pod, &status.name, end.exit_code),
                (None, Some(code)) if state.waiting.is_some() => {
                    failed_init |= has_failed(pod, &status.name, code);
                    pending_init = true;
                }
                _ => pending_init = true,
            },
        }
    }
    for status in mains {
        let state = status.state.as_ref().unwrap_or(&empty);
        match (&state.running, &state.terminated) {
            (Some(_), _) => running += 1,
            (_, Some(end)) => {
                stopped += 1;
                succeeded += i32::from(end.exit_code == 0);
            }
            _ if has_ended(status) => stopped += 1,
            _ => waiting += 1,
        }
    }
    let any_started = mains.iter().any(|status| {
        let state = status.state.as_ref().unwrap_or(&empty);
        status.started == Some(true)
            || state.running.is_some()
            || state.terminated.is_some()
            || has_ended(status)
    });
    if failed_init {
        return "Failed";
    }
    if (pending_init && !any_started) || waiting > 0 {
        return "Pending";
    }
    if running > 0 && (!quiet || stopped < mains.len()) {
        return "Running";
    }
    if stopped == 0 {
        return "Pending";
    }
    let all_ok = succeeded as usize == stopped;
    match (quiet, all_ok) {
        (true, true) => "Succeeded",
        (true, false) => "Failed",
        (false, _) if mains.iter().any(|status| !will_stay_down(pod, status)) => "Running",
        (false, true) => "Succeeded",
        (false, false) => "Failed",
    }
}

/// Whether an init container that ended with `code` has failed for good.
fn has_failed(pod: &Pod, name: &str, code: i32) -> bool {
    code != 0 && pod.container(name).is_some_and(|(class, c)| !plan::restarts(pod, class, c, code))
}

/// Whether the policy leaves a stopped main container as it is.
fn will_stay_down(pod: &Pod, status: &core::ContainerStatus) -> bool {
    // One that waits is on its way back.
    let Some(end) = status.state.as_ref().and_then(|state| state.terminated.as_ref()) else { return false };
    let container = pod.container(&status.name);
    container.is_some_and(|(class, container)| !plan::restarts(pod, class, container, end.exit_code))
}

#[derive(Default)]
struct Verdict {
    ok: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn yes(reason: &'static str) -> Verdict {
        Verdict { ok: true, reason, message: String::new() }
    }

    fn no(reason: &'static str, message: String) -> Verdict {
        Verdict { ok: false, reason, message }
    }
}

fn conditions(
    pod: &Pod,
    o: &Observed,
    phase: &str,
    inits: &[core::ContainerStatus],
    mains: &[core::ContainerStatus],
    previous: &core::PodStatus,
    now: Timestamp,
) -> Vec<core::PodCondition> {
    let rejected = o.rejected.is_some();
    let connected = o.ready_sandbox().is_some_and(|_| pod.host_network() || o.address().is_some())
        && o.cleanup == crate::observed::Cleanup::None;
    let containers = containers_ready(pod, phase, inits, mains);
    let ready = match containers.ok {
        true => gates(pod),
        false => Verdict { message: containers.message.clone(), ..containers },
    };
    let mut list = vec![];
    if rejected {
        // Upstream leaves a pod that it never ran with what the scheduler said, and the phase.
        return previous.conditions.clone().unwrap_or_default();
    }
    let scheduled = Verdict::yes("");
    let mut all = vec![
        ("PodReadyToStartContainers", Verdict { ok: connected, ..Verdict::default() }),
        ("Initialized", initialized(pod, phase, inits, mains, previous)),
        ("Ready", ready),
        ("ContainersReady", containers),
        ("PodScheduled", scheduled),
    ];
    if rounds::are_possible(pod) {
        all.push(("AllContainersRestarting", starting_over(pod, o, phase)));
    }
    if let Some(pending) = &o.resize_pending {
        let (reason, message) = (pending.reason, pending.message.clone());
        all.push((resize::PENDING, Verdict { ok: true, reason, message }));
    }
    if o.ending.is_none() && is_resizing(pod, o) {
        let reason = if o.resize_error.is_some() { "Error" } else { "" };
        let message = o.resize_error.clone().unwrap_or_default();
        all.push((resize::IN_PROGRESS, Verdict { ok: true, reason, message }));
    }
    if let Some(message) = o.evicted.as_ref().and_then(|eviction| eviction.disruption.clone()) {
        let reason = "TerminationByKubelet";
        all.push(("DisruptionTarget", Verdict { ok: true, reason, message }));
    }
    for (kind, verdict) in all {
        let status = if verdict.ok { "True" } else { "False" };
        let known = previous.conditions.iter().flatten().find(|c| c.type_ == kind);
        let since = known.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
        list.push(core::PodCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(verdict.reason.to_owned()).filter(|text| !text.is_empty()),
            message: Some(verdict.message).filter(|text| !text.is_empty()),
            last_transition_time: Some(since.unwrap_or(Time(now))),
            observed_generation: Some(pod.object().generation()).filter(|generation| *generation > 0),
            last_probe_time: None,
        });
    }
    list
}

fn starting_over(pod: &Pod, o: &Observed, phase: &str) -> Verdict {
    let round = Round::of(pod, o);
    match phase {
        "Succeeded" => Verdict::no("PodCompleted", String::new()),
        "Failed" => Verdict::no("PodFailed", String::new()),
        _ if o.ending.is_none() && round.is_ending(o) => Verdict {
            ok: true,
            reason: "RestartAllContainersStarted",
            message: "container exited with restart policy rule".to_owned(),
        },
        _ => Verdict::default(),
    }
}

fn names(list: &[&str]) -> String {
    format!("[{}]", list.join(" "))
}

fn initialized(
    pod: &Pod,
    phase: &str,
    inits: &[core::ContainerStatus],
    mains: &[core::ContainerStatus],
    previous: &core::PodStatus,
) -> Verdict {
    let mut incomplete = vec![];
    for (status, (class, _)) in inits.iter().zip(pod.containers()) {
        let done = if class == Class::Sidecar { status.started == Some(true) } else { status.ready };
        if !done {
            incomplete.push(status.name.as_str());
        }
    }
    if phase == "Succeeded" {
        return Verdict::yes("PodCompleted");
    }
    let any_started = mains.iter().any(|status| {
        let ended = status.last_state.as_ref().is_some_and(|s| s.terminated.is_some());
        ended || status.state.as_ref().is_some_and(|s| s.running.is_some() || s.terminated.is_some())
    });
    // What was initialised stays so, even when its init containers run again.
    let was = previous.conditions.iter().flatten().any(|c| c.type_ == "Initialized" && c.status == "True");
    if incomplete.is_empty() || any_started || was {
        return Verdict::yes("");
    }
    Verdict::no(
        "ContainersNotInitialized",
        format!("containers with incomplete status: {}", names(&incomplete)),
    )
}

fn containers_ready(
    pod: &Pod,
    phase: &str,
    inits: &[core::ContainerStatus],
    mains: &[core::ContainerStatus],
) -> Verdict {
    match phase {
        "Succeeded" => return Verdict::no("PodCompleted", String::new()),
        "Failed" => return Verdict::no("PodFailed", String::new()),
        _ => {}
    }
    let sidecars = inits.iter().zip(pod.containers()).filter(|(_, (class, _))| *class == Class::Sidecar);
    let all = sidecars.map(|(status, _)| status).chain(mains);
    let unready: Vec<&str> = all.filter(|status| !status.ready).map(|status| status.name.as_str()).collect();
    if unready.is_empty() {
        return Verdict::yes("");
    }
    Verdict::no("ContainersNotReady", format!("containers with unready status: {}", names(&unready)))
}

fn gates(pod: &Pod) -> Verdict {
    let conditions = || pod.status().into_iter().flat_map(|status| status.conditions.iter().flatten());
    let mut messages = vec![];
    for gate in pod.spec().readiness_gates.iter().flatten() {
        let kind = &gate.condition_type;
        match conditions().find(|condition| condition.type_ == *kind) {
            None => messages
                .push(format!("corresponding condition of pod readiness gate \"{kind}\" does not exist.")),
            Some(condition) if condition.status != "True" => messages.push(format!(
                "the status of pod readiness gate \"{kind}\" is not \"True\", but {}",
                condition.status
            )),
            Some(_) => {}
        }
    }
    match messages.is_empty() {
        true => Verdict::yes(""),
        false => Verdict::no("ReadinessGatesNotReady", messages.join(", ")),
    }
}

/// The strategic merge patch that turns `old` into `new`, as far as it is ours; `None` when they agree.
pub fn patch(uid: &str, old: &Value, new: &Value) -> Option<Value> {
    let mut changes = Map::new();
    for key in KEYS.iter().chain(&["observedGeneration"]) {
        let (before, after) = (old.get(*key), new.get(*key));
        if before == after || (before.is_none_or(Value::is_null) && after.is_none()) {
            continue;
        }
        let value = match (*key, after) {
            // These merge by key; an address that was replaced must not stay beside the new one.
            ("podIPs" | "hostIPs", Some(Value::Array(items))) if before.is_some() => {
                let mut items = items.clone();
                items.push(json!({"$patch": "replace"}));
                Value::Array(items)
            }
            ("conditions", Some(after)) => changed_conditions(before, after)?,
            (_, Some(after)) => after.clone(),
            (_, None) => Value::Null,
        };
        if value.as_array().is_some_and(|list| *key == "conditions" && list.is_empty()) {
            continue;
        }
        changes.insert((*key).to_owned(), value);
    }
    (!changes.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": changes}))
}

/// Conditions merge by type; those that did not change need not be sent. A field that is gone is null.
fn changed_conditions(before: Option<&Value>, after: &Value) -> Option<Value> {
    let before = before.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut changed = vec![];
    for condition in after.as_array()? {
        let known = before.iter().find(|known| known["type"] == condition["type"]);
        if known == Some(condition) {
            continue;
        }
        let mut condition = condition.clone();
        for key in ["reason", "message"] {
            if known.is_some_and(|known| known.get(key).is_some()) && condition.get(key).is_none() {
                condition[key] = Value::Null;
            }
        }
        changed.push(condition);
    }
    let is_gone = |kind: &str| {
        let has = |list: &[Value]| list.iter().any(|condition| condition["type"] == kind);
        has(before) && !has(after.as_array().map_or(&[][..], Vec::as_slice))
    };
    let gone = PASSING.into_iter().filter(|kind| is_gone(kind));
    changed.extend(gone.map(|kind| json!({"type": kind, "$patch": "delete"})));
    Some(Value::Array(changed))
}

#[cfg(test)]
mod tests;
