use super::*;
use crate::eviction::Eviction;
use crate::observed::{ADDRESS_ANNOTATION, BACKOFF_ANNOTATION, Probes, ROUND_ANNOTATION, Retry, Waiting};
use crate::pod::tests::pod;
use minke_runtime::{SandboxSpec, SandboxStatus};
use serde_json::{Value, json};

pub fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).expect("a time")
}

pub fn container(name: &str, attempt: u32, state: ContainerState) -> ContainerStatus {
    let value = json!({"id": format!("{name}-{attempt}"), "sandbox_id": "s-0", "name": name, "attempt": attempt,
        "image": "i", "image_id": "sha256:1", "state": state, "pid": null, "created_at": at(0), "started_at": null,
        "finished_at": null, "exit_code": null, "oom_killed": false, "reason": "", "message": "",
        "log_path": "/l", "tty": false, "stdin": false, "uid": 0, "gid": 0, "supplementary_groups": [],
        "resources": {"cpu_shares": 2}, "labels": {}, "annotations": {}});
    let mut status: ContainerStatus = serde_json::from_value(value).expect("a status");
    status.started_at = (state != ContainerState::Created).then(|| at(0));
    status
}

pub fn exited(name: &str, attempt: u32, code: i32, when: i64) -> ContainerStatus {
    let mut status = container(name, attempt, ContainerState::Exited);
    status.exit_code = Some(code);
    status.finished_at = Some(at(when));
    status.reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
    status
}

pub fn sandbox(attempt: u32, state: SandboxState) -> SandboxStatus {
    let mut spec =
        SandboxSpec { id: format!("s-{attempt}"), attempt, uid: "u-1".into(), ..SandboxSpec::default() };
    spec.annotations.insert(ADDRESS_ANNOTATION.into(), "10.1.0.9".into());
    spec.resources.cpu_shares = Some(2);
    SandboxStatus { spec, state, created_at: at(0), pid: None, containers: vec![] }
}

/// A pod with its volumes and a sandbox that holds `containers`.
pub fn observed(containers: Vec<ContainerStatus>) -> Observed {
    let mut o =
        Observed { volumes: true, sandboxes: vec![sandbox(0, SandboxState::Ready)], ..Observed::default() };
    for container in containers {
        if container.state == ContainerState::Running {
            let ready = Probes::default();
            o.probes.insert(container.id.clone(), ready);
        }
        o.sandboxes[0].containers.push(container);
    }
    o
}

fn short(action: &Action) -> String {
    match action {
        Action::End(ending) => format!("end {:?} {}s", ending.cause, ending.grace),
        Action::MountVolumes => "mount".into(),
        Action::CreateSandbox { attempt } => format!("sandbox {attempt}"),
        Action::Start { name, attempt, backoff, round } => {
            let round = if *round > 0 { format!(" round {round}") } else { String::new() };
            format!("start {name} {attempt} {}s{round}", backoff.as_secs())
        }
        Action::Kill { id, why, .. } => format!("kill {id} {why:?}"),
        Action::Resize { containers, pod } => {
            let ids: Vec<&str> = containers.iter().map(|(id, _)| id.as_str()).collect();
            format!("resize {ids:?} pod={}", pod.is_some())
        }
        Action::RemoveContainer(id) => format!("remove {id}"),
        Action::RemoveSandbox(id) => format!("remove {id}"),
        Action::AnnounceBackoff { name, .. } => format!("announce {name}"),
        Action::Teardown { remove } => format!("teardown remove={remove}"),
        Action::Delete => "delete".into(),
        Action::Exit => "exit".into(),
    }
}

#[track_caller]
fn check(spec: Value, change: impl FnOnce(&mut Observed), want: &[&str]) {
    check_at(json!({"spec": spec}), change, 100, want, None);
}

#[track_caller]
fn check_at(patch: Value, change: impl FnOnce(&mut Observed), now: i64, want: &[&str], wake: Option<i64>) {
    let mut o = observed(vec![container("c", 0, ContainerState::Running)]);
    change(&mut o);
    let plan = plan(&pod(patch), &o, at(now));
    assert_eq!(plan.actions.iter().map(short).collect::<Vec<_>>(), want);
    if let Some(wake) = wake {
        assert_eq!(plan.wake, Some(at(wake)));
    }
}

fn with(containers: Vec<ContainerStatus>) -> impl FnOnce(&mut Observed) {
    move |o| *o = observed(containers)
}

/// Times that were worked out before the clock was set back by an hour hold nobody up, and those before it was set
/// forward are over.
#[test]
fn a_clock_that_jumps_holds_nothing_up() {
    const HOUR: i64 = 3600;
    let backing_off = |when: i64| {
        with(vec![{
            let mut ended = exited("c", 1, 1, when);
            ended.annotations.insert(BACKOFF_ANNOTATION.into(), "20000".into());
            ended.created_at = at(when - 5);
            ended
        }])
    };
    check_at(json!({}), backing_off(95), 100, &["announce c"], Some(115));
    check_at(json!({}), backing_off(95 + HOUR), 100, &["start c 2 40s"], None);
    check_at(json!({}), backing_off(95 - HOUR), 100, &["start c 2 40s"], None);
    let waiting = |since: i64| {
        move |o: &mut Observed| {
            *o = observed(vec![]);
            let waiting = Waiting {
                reason: "ErrImagePull".into(),
                message: String::new(),
                since: at(since),
                retry_at: at(since + 10),
                later: None,
                on_change: false,
            };
            o.waiting.insert("c".into(), waiting);
        }
    };
    check_at(json!({}), waiting(95), 100, &[], Some(105));
    check_at(json!({}), waiting(95 + HOUR), 100, &["start c 0 0s"], None);
    check_at(json!({}), waiting(95 - HOUR), 100, &["start c 0 0s"], None);
    let retrying = |when: i64| {
        move |o: &mut Observed| {
            *o = Observed { volumes: true, ..Observed::default() };
            o.retries.insert(Job::Sandbox, Retry { at: at(when), failures: 5, on_change: false });
        }
    };
    check_at(json!({}), retrying(105), 100, &[], Some(105));
    check_at(json!({}), retrying(105 + HOUR), 100, &["sandbox 0"], None);
}

use ContainerState::{Created, Running};

#[test]
fn things_happen_in_order() {
    check(json!({}), |o| *o = Observed::default(), &["mount"]);
    check(json!({}), |o| *o = Observed { volumes: true, ..Observed::default() }, &["sandbox 0"]);
    check(json!({}), with(vec![]), &["start c 0 0s"]);
    check(json!({}), |_| {}, &[]);
    // Of one that ran before all that was known of it here went away, the count goes on.
    let lost = |o: &mut Observed| {
        *o = observed(vec![]);
        o.runs.insert("c".into(), 3);
    };
    check(json!({}), lost, &["start c 3 0s"]);
    let found = |o: &mut Observed| {
        lost(o);
        o.sandboxes[0].containers.push(exited("c", 5, 1, 50));
    };
    check(json!({}), found, &["start c 6 10s"]);
}

#[test]
fn a_job_that_runs_or_has_just_failed_is_not_started_again() {
    check(
        json!({}),
        |o| {
            *o = Observed::default();
            o.running_jobs.insert(Job::Volumes);
        },
        &[],
    );
    let busy = |o: &mut Observed| {
        *o = observed(vec![]);
        o.running_jobs.insert(Job::Start("c".into()));
    };
    check(json!({}), busy, &[]);
    let failed = |o: &mut Observed| {
        *o = Observed { volumes: true, ..Observed::default() };
        o.retries.insert(Job::Sandbox, Retry { at: at(105), failures: 1, on_change: false });
    };
    check_at(json!({}), failed, 100, &[], Some(105));
    check_at(json!({}), failed, 105, &["sandbox 0"], None);
}

#[test]
fn a_sandbox_that_went_is_replaced_and_what_was_in_it_runs_again() {
    let gone = |o: &mut Observed| o.sandboxes[0].state = SandboxState::NotReady;
    check(json!({}), gone, &["sandbox 1"]);
    let again = |o: &mut Observed| {
        *o = observed(vec![exited("c", 0, 137, 50)]);
        o.sandboxes[0].state = SandboxState::NotReady;
        o.sandboxes.push(sandbox(1, SandboxState::Ready));
    };
    check(json!({}), again, &["start c 1 10s"]);
    check(json!({"restartPolicy": "Never"}), again, &["end Finished 30s"]);
    let empty = |o: &mut Observed| {
        *o = observed(vec![]);
        o.sandboxes[0].state = SandboxState::NotReady;
        o.sandboxes.push(sandbox(1, SandboxState::Ready));
        o.sandboxes[1].containers.push(container("c", 1, Running));
    };
    check(json!({}), empty, &["remove s-0"]);
}

#[test]
fn the_restart_policy_decides_who_comes_back() {
    let (failed, fine) = (|| with(vec![exited("c", 0, 1, 99)]), || with(vec![exited("c", 0, 0, 99)]));
    check(json!({"restartPolicy": "Always"}), failed(), &["start c 1 10s"]);
    check(json!({"restartPolicy": "Always"}), fine(), &["start c 1 10s"]);
    check(json!({"restartPolicy": "OnFailure"}), failed(), &["start c 1 10s"]);
    check(json!({"restartPolicy": "OnFailure"}), fine(), &["end Finished 30s"]);
    check(json!({"restartPolicy": "Never"}), failed(), &["end Finished 30s"]);
    let rules = json!({"restartPolicy": "Never", "containers": [{"name": "c", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]});
    check(rules.clone(), with(vec![exited("c", 0, 42, 99)]), &["start c 1 10s"]);
    check(rules, failed(), &["end Finished 30s"]);
}

/// A pod with an init container, a sidecar and two main ones, of which `c` asks for all to start over with 42.
fn starting_over() -> Value {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    json!({
        "restartPolicy": "Never",
        "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}],
        "containers": [{"name": "c", "restartPolicy": "Never", "restartPolicyRules": rules}, {"name": "d"}],
        "ephemeralContainers": [{"name": "e"}],
    })
}

fn in_round(round: u32, mut container: ContainerStatus) -> ContainerStatus {
    container.annotations.insert(ROUND_ANNOTATION.into(), round.to_string());
    container
}

#[test]
fn one_that_ends_may_ask_for_all_to_start_over() {
    let ended = |code| exited("c", 0, code, 99);
    let others = |state: fn(&str) -> ContainerStatus| [state("s"), state("d"), state("e")];
    let running = |name: &str| container(name, 0, Running);
    let killed = |name: &str| exited(name, 0, 137, 100);
    let all = |code: i32, state: fn(&str) -> ContainerStatus| {
        with([vec![exited("i", 0, 0, 5), ended(code)], others(state).to_vec()].concat())
    };
    // Another code is nobody else's business.
    check(starting_over(), all(1, running), &[]);
    check(starting_over(), all(42, running), &["kill s-0 Over", "kill d-0 Over", "kill e-0 Over"]);
    let dying = |o: &mut Observed| {
        all(42, running)(o);
        for id in ["s-0", "d-0", "e-0"] {
            o.kills.insert(id.into(), (at(100), 0));
        }
    };
    check(starting_over(), dying, &[]);
    // Whatever became of them, all but the ephemeral one run again, from the first init container on.
    check(starting_over(), all(42, killed), &["start i 1 0s round 1"]);
    let again = |o: &mut Observed, next: Vec<ContainerStatus>| {
        all(42, killed)(o);
        for container in next {
            if container.state == Running {
                o.probes.insert(container.id.clone(), Probes::default());
            }
            o.sandboxes[0].containers.push(in_round(1, container));
        }
    };
    let (init, sidecar) = (exited("i", 1, 0, 101), container("s", 1, Running));
    check(starting_over(), |o| again(o, vec![init.clone()]), &["start s 1 0s round 1"]);
    check(
        starting_over(),
        |o| again(o, vec![init.clone(), sidecar.clone()]),
        &["start c 1 10s round 1", "start d 1 0s round 1"],
    );
    let (c, d) = (container("c", 1, Running), container("d", 1, Running));
    check(starting_over(), |o| again(o, vec![init.clone(), sidecar.clone(), c.clone(), d.clone()]), &[]);
    // An init container that fails in its new round fails the pod.
    check(starting_over(), |o| again(o, vec![exited("i", 1, 1, 101)]), &["end Finished 30s"]);
    // The next time is told apart from this one, and put off like any crash.
    let twice = |o: &mut Observed| {
        let mut ended = exited("c", 1, 42, 95);
        ended.annotations.insert(BACKOFF_ANNOTATION.into(), "10000".into());
        again(o, vec![init.clone(), sidecar.clone(), ended, exited("d", 1, 137, 96)]);
    };
    check(starting_over(), twice, &["kill s-1 Over"]);
    let down = |o: &mut Observed| {
        twice(o);
        let sidecar = o.sandboxes[0].containers.iter_mut().find(|c| c.id == "s-1").expect("a sidecar");
        (sidecar.state, sidecar.exit_code, sidecar.finished_at) =
            (ContainerState::Exited, Some(137), Some(at(96)));
    };
    check_at(json!({"spec": starting_over()}), down, 100, &["announce c"], Some(105));
    check_at(json!({"spec": starting_over()}), down, 105, &["start i 2 0s round 2"], None);
    // One that was still being started is of the old round, too.
    let late = |o: &mut Observed| again(o, vec![init.clone()]);
    let late = |o: &mut Observed| {
        late(o);
        o.sandboxes[0].containers.push(container("x", 0, Running));
    };
    check(starting_over(), late, &["kill x-0 Over"]);
}

#[test]
fn an_init_container_may_ask_for_it_before_the_others_ran() {
    let mut spec = starting_over();
    let rules = spec["containers"][0]["restartPolicyRules"].clone();
    spec["initContainers"] = json!([{"name": "s", "restartPolicy": "Always"},
        {"name": "i", "restartPolicy": "Never", "restartPolicyRules": rules}]);
    let failed = |sidecar: ContainerStatus| with(vec![sidecar, exited("i", 0, 42, 99)]);
    check(spec.clone(), failed(container("s", 0, Running)), &["kill s-0 Over"]);
    check(spec, failed(exited("s", 0, 137, 100)), &["start s 1 0s round 1"]);
}

#[test]
fn crashes_back_off_and_are_told_of_once() {
    let crashed = |backoff_s: i64, ran_s: i64| {
        move |o: &mut Observed| {
            let mut status = exited("c", 3, 1, ran_s);
            status.annotations.insert(BACKOFF_ANNOTATION.into(), (backoff_s * 1000).to_string());
            *o = observed(vec![status]);
        }
    };
    // The first exit restarts at once, then 10 s, 20 s ... 300 s, and ten good minutes forgive.
    check_at(json!({}), crashed(0, 50), 50, &["start c 4 10s"], None);
    check_at(json!({}), crashed(10, 50), 50, &["announce c"], Some(60));
    check_at(json!({}), crashed(10, 50), 60, &["start c 4 20s"], None);
    check_at(json!({}), crashed(160, 50), 210, &["start c 4 300s"], None);
    check_at(json!({}), crashed(300, 50), 350, &["start c 4 300s"], None);
    check_at(json!({}), crashed(300, 601), 601, &["start c 4 10s"], None);
    // A node may be set up to be less patient.
    let hasty = |longest: i64, backoff_s: i64| {
        move |o: &mut Observed| {
            crashed(backoff_s, 50)(o);
            o.longest_wait = Some(SignedDuration::from_secs(longest));
        }
    };
    check_at(json!({}), hasty(30, 20), 70, &["start c 4 30s"], None);
    check_at(json!({}), hasty(30, 300), 80, &["start c 4 30s"], None);
    check_at(json!({}), hasty(5, 0), 50, &["start c 4 5s"], None);
    let told = |o: &mut Observed| {
        crashed(10, 50)(o);
        o.announced.insert("c-3".into());
    };
    check_at(json!({}), told, 50, &[], Some(60));
}

#[test]
fn a_start_that_failed_is_tried_again_later() {
    let pulls = |o: &mut Observed| {
        *o = observed(vec![]);
        let later = Some(("ImagePullBackOff".into(), String::new()));
        let waiting = Waiting {
            reason: "ErrImagePull".into(),
            message: String::new(),
            since: at(100),
            retry_at: at(110),
            later,
            on_change: false,
        };
        o.waiting.insert("c".into(), waiting);
    };
    check_at(json!({}), pulls, 101, &[], Some(105));
    check_at(json!({}), pulls, 105, &["announce c"], Some(110));
    check_at(json!({}), pulls, 110, &["start c 0 0s"], None);
}

#[test]
fn init_containers_run_one_by_one_before_the_others() {
    let spec = || json!({"initContainers": [{"name": "i1"}, {"name": "i2"}]});
    check(spec(), with(vec![]), &["start i1 0 0s"]);
    check(spec(), with(vec![container("i1", 0, Running)]), &[]);
    check(spec(), with(vec![exited("i1", 0, 0, 50)]), &["start i2 0 0s"]);
    check(spec(), with(vec![exited("i1", 0, 0, 50), exited("i2", 0, 0, 60)]), &["start c 0 0s"]);
    check(spec(), with(vec![exited("i1", 0, 1, 50)]), &["start i1 1 10s"]);
    let never = json!({"restartPolicy": "Never", "initContainers": [{"name": "i1"}]});
    check(never, with(vec![exited("i1", 0, 1, 50)]), &["end Finished 30s"]);
    // Once a main container has run, the init containers are history.
    check(spec(), with(vec![container("c", 0, Running)]), &[]);
    let fresh = |o: &mut Observed| {
        *o = observed(vec![exited("i1", 0, 0, 5), exited("i2", 0, 0, 6), exited("c", 0, 137, 50)]);
        o.sandboxes[0].state = SandboxState::NotReady;
        o.sandboxes.push(sandbox(1, SandboxState::Ready));
    };
    check(spec(), fresh, &["start i1 1 10s"]);
}

#[test]
fn sidecars_start_in_turn_and_stay() {
    let spec = || {
        json!({"initContainers": [{"name": "s", "restartPolicy": "Always", "startupProbe": {}},
                                            {"name": "i"}]})
    };
    let started = |state: Option<ProbeState>| {
        move |o: &mut Observed| {
            *o = observed(vec![container("s", 0, Running)]);
            o.probes.insert("s-0".into(), Probes { startup: state, ..Probes::default() });
        }
    };
    check(spec(), with(vec![]), &["start s 0 0s"]);
    check(spec(), started(Some(ProbeState::Unknown)), &[]);
    check(spec(), started(Some(ProbeState::Success)), &["start i 0 0s"]);
    // Until its `postStart` hook is through, it has not started.
    let hooked = |o: &mut Observed| {
        started(Some(ProbeState::Success))(o);
        o.running_jobs.insert(Job::Start("s".into()));
    };
    check(spec(), hooked, &[]);
    // It comes back whatever the pod's policy, also beside main containers.
    let mut never = spec();
    never["restartPolicy"] = json!("Never");
    let both = vec![exited("s", 0, 0, 50), exited("i", 0, 0, 40), container("c", 0, Running)];
    check(never.clone(), with(both), &["start s 1 10s"]);
    // It does not keep a finished pod alive.
    let over = vec![container("s", 0, Running), exited("i", 0, 0, 40), exited("c", 0, 0, 60)];
    check(never, with(over), &["end Finished 30s"]);
}

#[test]
fn probes_that_fail_kill() {
    let spec = json!({"containers": [{"name": "c", "livenessProbe": {"terminationGracePeriodSeconds": 5}}]});
    let failing = |o: &mut Observed| {
        o.probes.insert("c-0".into(), Probes { liveness: Some(ProbeState::Failure), ..Probes::default() });
    };
    check(spec.clone(), failing, &["kill c-0 Liveness"]);
    let killing = |o: &mut Observed| {
        failing(o);
        o.kills.insert("c-0".into(), (at(105), 0));
    };
    check(spec, killing, &[]);
}

#[test]
fn a_kill_that_failed_is_tried_again() {
    let failed = |o: &mut Observed| {
        o.ending = Some(Ending { cause: Cause::Deleted, grace: 30, deadline: at(130) });
        o.kills.insert("c-0".into(), (at(130), 1));
        o.retries.insert(Job::Kill("c-0".into(), 1), Retry { at: at(105), failures: 1, on_change: false });
    };
    check_at(deleted(30), failed, 104, &[], Some(105));
    check_at(deleted(30), failed, 105, &["kill c-0 Ending"], None);
    let again = |o: &mut Observed| {
        failed(o);
        o.kills.insert("c-0".into(), (at(130), 2));
    };
    check_at(deleted(30), again, 105, &[], None);
}

#[test]
fn old_containers_are_removed_but_for_two() {
    let history = || {
        vec![exited("c", 0, 1, 10), exited("c", 1, 1, 20), exited("c", 2, 1, 30), container("c", 3, Running)]
    };
    check(json!({}), with(history()), &["remove c-1", "remove c-0"]);
    check(json!({}), with(vec![container("c", 0, Created)]), &["remove c-0"]);
}

fn deleted(grace: i64) -> Value {
    json!({"metadata": {"deletionTimestamp": "2027-01-15T08:00:00Z", "deletionGracePeriodSeconds": grace}})
}

fn ending(cause: Cause, grace: i64, deadline: i64) -> impl FnOnce(&mut Observed) {
    move |o| o.ending = Some(Ending { cause, grace, deadline: at(deadline) })
}

#[test]
fn deletion_ends_a_pod_and_can_be_hurried() {
    check_at(deleted(30), |_| {}, 100, &["end Deleted 30s"], None);
    check_at(deleted(30), ending(Cause::Deleted, 30, 130), 100, &["kill c-0 Ending"], Some(130));
    check_at(deleted(5), ending(Cause::Deleted, 30, 130), 101, &["end Deleted 5s"], None);
    let hurried = |o: &mut Observed| {
        o.ending = Some(Ending { cause: Cause::Deleted, grace: 5, deadline: at(106) });
        o.kills.insert("c-0".into(), (at(130), 0));
    };
    check_at(deleted(5), hurried, 101, &["kill c-0 Ending"], None);
    check_at(json!({}), |o| o.gone = true, 100, &["end Gone 1s"], None);
    let gone = |o: &mut Observed| {
        *o = observed(vec![exited("c", 0, 0, 50)]);
        (o.gone, o.cleanup) = (true, Cleanup::Removed);
        o.ending = Some(Ending { cause: Cause::Gone, grace: 1, deadline: at(60) });
    };
    check_at(json!({}), gone, 100, &["exit"], None);
}

#[test]
fn what_is_left_is_taken_down_before_the_object_goes() {
    let over = |cleanup: Cleanup, cause: Cause| {
        move |o: &mut Observed| {
            *o = observed(vec![exited("c", 0, 0, 50)]);
            o.cleanup = cleanup;
            o.ending = Some(Ending { cause, grace: 30, deadline: at(130) });
        }
    };
    check_at(deleted(30), over(Cleanup::None, Cause::Deleted), 100, &["teardown remove=true"], None);
    check_at(deleted(30), over(Cleanup::Removed, Cause::Deleted), 100, &["delete"], None);
    let never = json!({"spec": {"restartPolicy": "Never"}});
    check_at(never.clone(), over(Cleanup::None, Cause::Finished), 100, &["teardown remove=false"], None);
    check_at(never, over(Cleanup::Stopped, Cause::Finished), 100, &[], None);
    // What a pod has written goes with it when that is why it was ended.
    let evicted = |signal: &'static str| {
        move |o: &mut Observed| {
            over(Cleanup::None, Cause::Failed { reason: "Evicted".into(), message: "m".into() })(o);
            let (signal, message) = (signal.to_owned(), "m".to_owned());
            o.evicted = Some(Eviction { signal, reason: "Evicted", message, disruption: None, grace: 30 });
        }
    };
    check_at(json!({}), evicted("nodefs.available"), 100, &["teardown remove=true"], None);
    check_at(json!({}), evicted("memory.available"), 100, &["teardown remove=false"], None);
    // A finished pod that is deleted later still has records and logs to lose.
    check_at(deleted(30), over(Cleanup::Stopped, Cause::Finished), 100, &["end Deleted 30s"], None);
    let busy = |o: &mut Observed| {
        over(Cleanup::None, Cause::Deleted)(o);
        o.running_jobs.insert(Job::Start("c".into()));
    };
    check_at(deleted(30), busy, 100, &[], None);
}

#[test]
fn sidecars_go_last_and_in_reverse() {
    let spec = || {
        let mut pod = deleted(30);
        pod["spec"] = json!({"initContainers": [{"name": "s1", "restartPolicy": "Always"},
                                                {"name": "s2", "restartPolicy": "Always"}]});
        pod
    };
    let running = |names: &[&str]| {
        let list: Vec<_> = names.iter().map(|name| container(name, 0, Running)).collect();
        move |o: &mut Observed| {
            *o = observed(list);
            o.ending = Some(Ending { cause: Cause::Deleted, grace: 30, deadline: at(130) });
        }
    };
    check_at(spec(), running(&["s1", "s2", "c"]), 100, &["kill c-0 Ending"], Some(130));
    check_at(spec(), running(&["s1", "s2"]), 100, &["kill s2-0 Ending"], Some(130));
    check_at(spec(), running(&["s1"]), 100, &["kill s1-0 Ending"], Some(130));
    check_at(spec(), running(&["s1", "s2"]), 131, &["kill s1-0 Ending", "kill s2-0 Ending"], None);
}

#[test]
fn changes_of_the_specification_reach_what_runs() {
    let made_from = |image: &'static str| {
        move |o: &mut Observed| {
            let c = &mut o.sandboxes[0].containers[0];
            c.annotations.insert(ASKED_IMAGE_ANNOTATION.into(), image.into());
        }
    };
    check(json!({}), made_from("i"), &[]);
    check(json!({}), made_from("j"), &["kill c-0 Changed"]);
    // One that was killed for it runs again whatever the policy, and at once.
    let killed = |o: &mut Observed| {
        *o = observed(vec![exited("c", 0, 143, 100)]);
        o.restarting.insert("c-0".into(), true);
    };
    check(json!({"restartPolicy": "Never"}), killed, &["start c 1 10s"]);
    // One that crashed has got another chance with another image.
    let crashed = |o: &mut Observed| {
        *o = observed(vec![exited("c", 3, 1, 99)]);
        made_from("broken")(o);
        o.sandboxes[0].containers[0].annotations.insert(BACKOFF_ANNOTATION.into(), "80000".into());
    };
    check(json!({}), crashed, &["start c 4 160s"]);
    let sized = |resources: Value, policy: Value| json!({"containers": [{"name": "c", "image": "i", "resources": resources, "resizePolicy": policy}]});
    let more = json!({"requests": {"cpu": "1"}, "limits": {"memory": "9Mi"}});
    check(sized(more.clone(), json!([])), |_| {}, &["resize [\"c-0\"] pod=true"]);
    let memory = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"}]);
    check(sized(more, memory.clone()), |_| {}, &["kill c-0 Resize", "resize [] pod=true"]);
    check(sized(json!({"requests": {"cpu": "1"}}), memory), |_| {}, &["resize [\"c-0\"] pod=true"]);
    // What the pod may have limits those that have no limit of their own.
    let whole = json!({"resources": {"limits": {"memory": "9Mi"}}});
    check(whole, |_| {}, &["resize [\"c-0\"] pod=true"]);
    let asked = json!({"resources": {"requests": {"cpu": "1"}}});
    check(asked, |_| {}, &["resize [] pod=true"]);
    let init = json!({"initContainers": [{"name": "i", "resources": {"requests": {"cpu": "1"}}}]});
    check(init, with(vec![container("i", 0, Running)]), &["resize [\"i-0\"] pod=true"]);
}

#[test]
fn the_node_may_refuse_and_time_may_run_out() {
    let refused = |o: &mut Observed| {
        *o = Observed { rejected: Some(("OutOfcpu".into(), "m".into())), ..Observed::default() };
    };
    check(json!({}), refused, &["end Failed { reason: \"OutOfcpu\", message: \"m\" } 1s"]);
    let evicted = |grace| {
        move |o: &mut Observed| {
            let (message, disruption) = ("m".to_owned(), None);
            o.evicted =
                Some(Eviction { signal: String::new(), reason: "Evicted", message, disruption, grace });
        }
    };
    check(json!({}), evicted(1), &["end Failed { reason: \"Evicted\", message: \"m\" } 1s"]);
    check(json!({}), evicted(60), &["end Failed { reason: \"Evicted\", message: \"m\" } 60s"]);
    let limited = json!({"spec": {"activeDeadlineSeconds": 50}, "status": {"startTime": at(0)}});
    check_at(limited.clone(), |_| {}, 49, &[], Some(50));
    let o = observed(vec![container("c", 0, Running)]);
    let plan = plan(&pod(limited), &o, at(50));
    assert!(matches!(&plan.actions[..], [Action::End(Ending { cause: Cause::Failed { reason, .. }, .. })]
        if reason == "DeadlineExceeded"));
    check_at(json!({"status": {"phase": "Succeeded"}}), |_| {}, 100, &["end Finished 30s"], None);
}
