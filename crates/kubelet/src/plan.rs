//! Decides what to do next for a pod. Pure: it sees a picture and a time, and returns actions.
//!
//! The order of things follows upstream's `computePodActions`: volumes, sandbox, init containers one by
//! one, then everything else at once; and when the pod ends: containers, then sidecars in reverse, then
//! the sandbox, the network and the volumes, and last the object.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_runtime::{ContainerState, ContainerStatus, Resources, SandboxState};

use crate::eviction::Eviction;
use crate::observed::{
    ASKED_IMAGE_ANNOTATION, Cause, Cleanup, Ending, Job, Observed, ProbeState, Waiting, backoff,
};
use crate::pod::{Class, Pod};
use crate::resources;
use crate::rounds::{self, Round};

/// What is left to a sidecar when the others have used up the grace period.
const LEAST_GRACE: SignedDuration = SignedDuration::from_secs(2);
/// No job that failed waits longer than this.
const LONGEST_RETRY: SignedDuration = SignedDuration::from_secs(122);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The pod comes to its end, or to a nearer one. Nothing else is planned along with it.
    End(Ending),
    MountVolumes,
    /// Replaces the current sandbox, if there is one.
    CreateSandbox {
        attempt: u32,
    },
    Start {
        name: String,
        attempt: u32,
        backoff: SignedDuration,
        round: u32,
    },
    Kill {
        id: String,
        name: String,
        why: Kill,
        deadline: Timestamp,
        /// It runs again afterwards, whatever it ends with.
        restart: bool,
    },
    /// Gives running containers, by id, and the pod's cgroup new limits.
    Resize {
        containers: Vec<(String, Resources)>,
        pod: Option<Resources>,
    },
    RemoveContainer(String),
    RemoveSandbox(String),
    /// Tell of a back-off: the container's name and the key under which that is remembered.
    AnnounceBackoff {
        name: String,
        key: String,
    },
    Teardown {
        remove: bool,
    },
    /// Delete the object: nothing is left of the pod here.
    Delete,
    /// Nothing is left to do for the pod, ever.
    Exit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    Ending,
    Liveness,
    Startup,
    /// The container's image is another now.
    Changed,
    /// Its new resources hold only for a new container.
    Resize,
    /// All containers of the pod start over.
    Over,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub actions: Vec<Action>,
    /// Look again then, even if nothing happens.
    pub wake: Option<Timestamp>,
}

impl Plan {
    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |now| now.min(at)));
    }

    /// Waits until `ended` may run again, and has that told of once.
    fn wait_for_restart(&mut self, o: &Observed, ended: &ContainerStatus, at: Timestamp) {
        self.wake_at(at);
        if !o.announced.contains(&ended.id) {
            let (name, key) = (ended.name.clone(), ended.id.clone());
            self.actions.push(Action::AnnounceBackoff { name, key });
        }
    }
}

pub fn plan(pod: &Pod, o: &Observed, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    if let Some(ending) = ending(pod, o, now, &mut plan) {
        plan.actions.push(Action::End(ending));
        return plan;
    }
    match &o.ending {
        None => {
            let round = Round::of(pod, o);
            if round.is_ending(o) {
                plan_start_over(o, &round, now, &mut plan);
            } else {
                plan_probes(pod, o, now, &mut plan);
                plan_changes(pod, o, now, &mut plan);
                plan_run(pod, o, &round, now, &mut plan);
            }
            plan_garbage(o, &mut plan);
        }
        Some(ending) => plan_end(pod, o, ending, now, &mut plan),
    }
    plan
}

/// The end that the pod must come to, when that is not under way already.
fn ending(pod: &Pod, o: &Observed, now: Timestamp, plan: &mut Plan) -> Option<Ending> {
    let (cause, grace) = if o.gone {
        (Cause::Gone, if pod.is_deleted() { pod.grace_seconds() } else { 1 })
    } else if pod.is_deleted() {
        (Cause::Deleted, pod.grace_seconds())
    } else if let Some((reason, message)) = &o.rejected {
        (Cause::Failed { reason: reason.clone(), message: message.clone() }, 1)
    } else if pod.is_terminal() {
        (Cause::Finished, pod.grace_seconds())
    } else if let Some(eviction) = &o.evicted {
        let (reason, message) = (eviction.reason.to_owned(), eviction.message.clone());
        (Cause::Failed { reason, message }, eviction.grace)
    } else if let Some(cause) = deadline_exceeded(pod, now, plan) {
        (cause, pod.grace_seconds())
    } else if is_finished(pod, o) {
        (Cause::Finished, pod.grace_seconds())
    } else {
        return None;
    };
    let deadline = now + SignedDuration::from_secs(grace);
    match &o.ending {
        None => Some(Ending { cause, grace, deadline }),
        Some(known) if cause > known.cause && matches!(cause, Cause::Deleted | Cause::Gone) => {
            Some(Ending { cause, grace: grace.min(known.grace), deadline: deadline.min(known.deadline) })
        }
        Some(known) if cause == known.cause && grace < known.grace => {
            Some(Ending { cause, grace, deadline: deadline.min(known.deadline) })
        }
        Some(_) => None,
    }
}

fn deadline_exceeded(pod: &Pod, now: Timestamp, plan: &mut Plan) -> Option<Cause> {
    let seconds = pod.spec().active_deadline_seconds?;
    let started = pod.status()?.start_time.as_ref()?.0;
    let deadline = started.checked_add(SignedDuration::from_secs(seconds)).ok()?;
    if now < deadline {
        plan.wake_at(deadline);
        return None;
    }
    Some(Cause::Failed {
        reason: "DeadlineExceeded".to_owned(),
        message: "Pod was active on the node longer than the specified deadline".to_owned(),
    })
}

/// What becomes of a container next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It never ran, or must run again in a new sandbox.
    Start,
    Created,
    Running,
    Done {
        ok: bool,
    },
    /// It ended and runs again: not before `at`, after waiting for `delay`.
    Restart {
        at: Timestamp,
        delay: SignedDuration,
    },
}

pub fn fate(pod: &Pod, class: Class, container: &core::Container, o: &Observed) -> Fate {
    let Some(latest) = o.latest(&container.name) else { return Fate::Start };
    match latest.state {
        ContainerState::Created => Fate::Created,
        ContainerState::Running => Fate::Running,
        ContainerState::Exited => {
            let code = latest.exit_code.unwrap_or(137);
            if class != Class::Ephemeral && Round::of(pod, o).is_past(latest) {
                return Fate::Start;
            }
            let stale = o.ready_sandbox().is_some_and(|sandbox| sandbox.spec.id != latest.sandbox_id);
            if class == Class::Init && stale && !main_has_run(pod, o) {
                return Fate::Start;
            }
            let killed_for_it = o.restarting.get(&latest.id);
            if killed_for_it.is_none() && !restarts(pod, class, container, code) {
                return Fate::Done { ok: code == 0 };
            }
            // Another image may do better, and is tried at once.
            let at_once = killed_for_it == Some(&true) || is_changed(container, latest);
            let delay = if at_once { SignedDuration::ZERO } else { backoff(latest, o.longest_wait).0 };
            Fate::Restart { at: latest.finished_at.unwrap_or(latest.created_at) + delay, delay }
        }
    }
}

/// Whether the pod names another image than the one `made` was made from.
fn is_changed(container: &core::Container, made: &ContainerStatus) -> bool {
    made.annotations.get(ASKED_IMAGE_ANNOTATION).is_some_and(|asked| Some(asked) != container.image.as_ref())
}

/// Whether a container that ended with `code` is to run again.
pub fn restarts(pod: &Pod, class: Class, container: &core::Container, code: i32) -> bool {
    if class == Class::Ephemeral {
        return false;
    }
    // Whichever container it restarts.
    if rounds::rule(container, code).is_some() {
        return true;
    }
    let policy = container.restart_policy.as_deref().unwrap_or(pod.restart_policy());
    match (policy, class) {
        ("Never", _) => false,
        // An init container that succeeded has done its work, whatever the policy.
        ("OnFailure", _) | (_, Class::Init) => code != 0,
        _ => true,
    }
}

/// Whether a main container has been made in the current sandbox and round: then the pod was initialised in it.
pub fn main_has_run(pod: &Pod, o: &Observed) -> bool {
    let Some(sandbox) = o.current_sandbox() else { return false };
    let round = Round::of(pod, o);
    let mut made = sandbox.containers.iter().filter(|c| !round.is_past(c));
    made.any(|c| pod.spec().containers.iter().any(|main| main.name == c.name))
}

/// Whether nothing will ever run again: an init container failed for good, or all main ones are done.
pub fn is_finished(pod: &Pod, o: &Observed) -> bool {
    let mut mains_done = true;
    for (class, container) in pod.containers() {
        match (class, fate(pod, class, container, o)) {
            (Class::Init, Fate::Done { ok: false }) if !main_has_run(pod, o) => return true,
            (Class::Main, Fate::Done { .. }) => {}
            (Class::Main, _) => mains_done = false,
            _ => {}
        }
    }
    mains_done
}

/// Whether a wait for `at` is over, which was `longest` at most when it began. One that seems to be longer than that
/// was worked out before the clock was set back.
fn is_over(at: Timestamp, longest: SignedDuration, now: Timestamp) -> bool {
    now >= at || at.duration_since(now) > longest
}

fn can(o: &Observed, job: &Job, now: Timestamp, plan: &mut Plan) -> bool {
    if o.is_running(job) {
        return false;
    }
    match o.retries.get(job) {
        Some(retry) if !is_over(retry.at, LONGEST_RETRY, now) => {
            plan.wake_at(retry.at);
            false
        }
        _ => true,
    }
}

/// Whether a container is being killed, or will be again when the last attempt failed.
fn is_dying(o: &Observed, id: &str, now: Timestamp, plan: &mut Plan) -> bool {
    let Some((_, count)) = o.kills.get(id) else { return false };
    let job = Job::Kill(id.to_owned(), *count);
    !o.retries.contains_key(&job) || !can(o, &job, now, plan)
}

/// Kills what is of a round that is over: at once, and without its hooks.
fn plan_start_over(o: &Observed, round: &Round<'_>, now: Timestamp, plan: &mut Plan) {
    for victim in o.all_containers().filter(|c| c.state == ContainerState::Running && round.is_past(c)) {
        if !is_dying(o, &victim.id, now, plan) {
            plan.actions.push(Action::Kill {
                id: victim.id.clone(),
                name: victim.name.clone(),
                why: Kill::Over,
                deadline: now,
                restart: false,
            });
        }
    }
}

fn plan_probes(pod: &Pod, o: &Observed, now: Timestamp, plan: &mut Plan) {
    for running in o.all_containers().filter(|c| c.state == ContainerState::Running) {
        let Some((_, container)) = pod.container(&running.name) else { continue };
        let probes = o.probes.get(&running.id).copied().unwrap_or_default();
        let (why, probe) = if probes.startup == Some(ProbeState::Failure) {
            (Kill::Startup, &container.startup_probe)
        } else if probes.liveness == Some(ProbeState::Failure) {
            (Kill::Liveness, &container.liveness_probe)
        } else {
            continue;
        };
        if is_dying(o, &running.id, now, plan) {
            continue;
        }
        let grace = probe.as_ref().and_then(|probe| probe.termination_grace_period_seconds);
        let grace = grace.or(pod.spec().termination_grace_period_seconds).unwrap_or(30).max(1);
        let policy = container.restart_policy.as_deref().unwrap_or(pod.restart_policy());
        plan.actions.push(Action::Kill {
            id: running.id.clone(),
            name: running.name.clone(),
            why,
            deadline: now + SignedDuration::from_secs(grace),
            restart: policy != "Never",
        });
    }
}

/// What of the specification changed since the containers were started: an image means another container,
/// resources mean other limits, of the container that runs or of another one, as its `resizePolicy` says.
fn plan_changes(pod: &Pod, o: &Observed, now: Timestamp, plan: &mut Plan) {
    let grace = SignedDuration::from_secs(pod.spec().termination_grace_period_seconds.unwrap_or(30).max(1));
    let mut resized = vec![];
    for running in o.all_containers().filter(|c| c.state == ContainerState::Running) {
        let Some((class, container)) = pod.container(&running.name) else { continue };
        if class == Class::Ephemeral || is_dying(o, &running.id, now, plan) {
            continue;
        }
        let wanted = resources::of_container(pod, container);
        let why = if class != Class::Init && is_changed(container, running) {
            Kill::Changed
        } else if resources::same(&wanted, &running.resources) {
            continue;
        } else if resources::resize_restarts(container, &wanted, &running.resources) {
            Kill::Resize
        } else {
            resized.push((running.id.clone(), resources::explicit(wanted)));
            continue;
        };
        plan.actions.push(Action::Kill {
            id: running.id.clone(),
            name: running.name.clone(),
            why,
            deadline: now + grace,
            restart: true,
        });
    }
    let wanted = resources::of_pod(pod);
    let known = o.ready_sandbox().map(|sandbox| &sandbox.spec.resources);
    let whole = known.is_some_and(|known| !resources::same(&wanted, known));
    if (whole || !resized.is_empty()) && can(o, &Job::Resize, now, plan) {
        let pod = whole.then(|| resources::explicit(wanted));
        plan.actions.push(Action::Resize { containers: resized, pod });
    }
}

fn plan_run(pod: &Pod, o: &Observed, round: &Round<'_>, now: Timestamp, plan: &mut Plan) {
    if !o.volumes {
        if can(o, &Job::Volumes, now, plan) {
            plan.actions.push(Action::MountVolumes);
        }
        return;
    }
    if o.ready_sandbox().is_none() {
        if can(o, &Job::Sandbox, now, plan) {
            let attempt = o.current_sandbox().map_or(0, |sandbox| sandbox.spec.attempt + 1);
            plan.actions.push(Action::CreateSandbox { attempt });
        }
        return;
    }
    if let Some((cause, at, _)) = round.begins(o).filter(|(_, at, delay)| !is_over(*at, *delay, now)) {
        plan.wait_for_restart(o, cause, at);
        return;
    }
    let initialized = main_has_run(pod, o);
    for (class, container) in pod.containers() {
        let fate = fate(pod, class, container, o);
        if class != Class::Init || !initialized {
            plan_container(o, container, fate, round, now, plan);
        }
        let passed = match (class, fate) {
            (Class::Init, Fate::Done { ok: true }) | (Class::Main | Class::Ephemeral, _) => true,
            (Class::Sidecar, Fate::Running) if !o.is_starting(&container.name) => {
                let id = o.latest(&container.name).map(|c| c.id.as_str());
                id.and_then(|id| o.probes.get(id)).is_some_and(|probes| probes.started())
            }
            _ => false,
        };
        if !passed && !initialized {
            return;
        }
    }
}

fn plan_container(
    o: &Observed,
    container: &core::Container,
    fate: Fate,
    round: &Round<'_>,
    now: Timestamp,
    plan: &mut Plan,
) {
    let name = &container.name;
    if o.is_running(&Job::Start(name.clone())) {
        return;
    }
    let latest = o.latest(name);
    match fate {
        Fate::Running | Fate::Done { .. } => return,
        // Made, but never started: the agent went away in between.
        Fate::Created => {
            let id = latest.expect("it was created").id.clone();
            if !o.is_running(&Job::RemoveContainer(id.clone())) {
                plan.actions.push(Action::RemoveContainer(id));
            }
            return;
        }
        Fate::Restart { at, delay } if !is_over(at, delay, now) => {
            plan.wait_for_restart(o, latest.expect("it ran"), at);
            return;
        }
        Fate::Restart { .. } | Fate::Start => {}
    }
    let waits =
        |waiting: &&Waiting| !is_over(waiting.retry_at, waiting.retry_at.duration_since(waiting.since), now);
    if let Some(waiting) = o.waiting.get(name).filter(waits) {
        if waiting.later.is_some() && !o.announced.contains(name) {
            if now >= waiting.turns_at() {
                plan.actions.push(Action::AnnounceBackoff { name: name.clone(), key: name.clone() });
            } else {
                plan.wake_at(waiting.turns_at());
            }
        }
        plan.wake_at(waiting.retry_at);
        return;
    }
    let attempt = o.next_attempt(name);
    let backoff = round.next_backoff(container, latest, o);
    plan.actions.push(Action::Start { name: name.clone(), attempt, backoff, round: round.number });
}

/// Of each container the newest and the one before it are kept, for `lastState` and `logs --previous`.
fn plan_garbage(o: &Observed, plan: &mut Plan) {
    let mut names: Vec<&str> = o.all_containers().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        for old in o.history(name).into_iter().skip(2) {
            let removing = o.is_running(&Job::RemoveContainer(old.id.clone()));
            if old.state == ContainerState::Exited && !removing {
                plan.actions.push(Action::RemoveContainer(old.id.clone()));
            }
        }
    }
    let Some((_, old)) = o.sandboxes.split_last() else { return };
    for sandbox in old {
        let removing = o.is_running(&Job::RemoveSandbox(sandbox.spec.id.clone()));
        if sandbox.state == SandboxState::NotReady && sandbox.containers.is_empty() && !removing {
            plan.actions.push(Action::RemoveSandbox(sandbox.spec.id.clone()));
        }
    }
}

fn plan_end(pod: &Pod, o: &Observed, ending: &Ending, now: Timestamp, plan: &mut Plan) {
    let running: Vec<&ContainerStatus> =
        o.all_containers().filter(|c| c.state == ContainerState::Running).collect();
    let is_sidecar =
        |c: &ContainerStatus| pod.container(&c.name).is_some_and(|(class, _)| class == Class::Sidecar);
    let (sidecars, others): (Vec<_>, Vec<_>) = running.iter().copied().partition(|c| is_sidecar(c));
    let overdue = now >= ending.deadline;
    // Further away than was granted it can only be because the clock was set back.
    let mut deadline = ending.deadline.min(now + SignedDuration::from_secs(ending.grace));
    let victims = if !others.is_empty() && !overdue {
        others
    } else if overdue {
        deadline = now + LEAST_GRACE;
        running.clone()
    } else {
        // The last in the specification goes first.
        let names: Vec<&str> = pod.containers().map(|(_, c)| c.name.as_str()).collect();
        let last = sidecars.iter().copied().max_by_key(|c| names.iter().position(|name| *name == c.name));
        deadline = deadline.max(now + LEAST_GRACE);
        last.into_iter().collect()
    };
    for victim in victims {
        let sooner = o.kills.get(&victim.id).is_none_or(|(known, _)| ending.deadline < *known && !overdue);
        if sooner || !is_dying(o, &victim.id, now, plan) {
            plan.actions.push(Action::Kill {
                id: victim.id.clone(),
                name: victim.name.clone(),
                why: Kill::Ending,
                deadline,
                restart: false,
            });
        }
    }
    if !running.is_empty() {
        if !overdue {
            plan.wake_at(ending.deadline);
        }
        return;
    }
    if !o.running_jobs.is_empty() {
        return;
    }
    // What it has written is why it went, so that must go as well.
    let in_the_way = o.evicted.as_ref().is_some_and(Eviction::is_for_disk);
    let leaves = in_the_way || matches!(ending.cause, Cause::Deleted | Cause::Gone);
    let wanted = if leaves { Cleanup::Removed } else { Cleanup::Stopped };
    if o.cleanup < wanted {
        if can(o, &Job::Teardown, now, plan) {
            plan.actions.push(Action::Teardown { remove: leaves });
        }
        return;
    }
    match ending.cause {
        Cause::Gone => plan.actions.push(Action::Exit),
        Cause::Deleted if can(o, &Job::Delete, now, plan) => plan.actions.push(Action::Delete),
        _ => {}
    }
}

#[cfg(test)]
mod settles;
#[cfg(test)]
pub mod tests;
