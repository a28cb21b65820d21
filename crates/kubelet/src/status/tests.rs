use super::*;
use crate::observed::{Cleanup, Ending, Job, ProbeState, Probes, Waiting};
use crate::plan::tests::{at, container, exited, observed};
use crate::pod::tests::pod;
use ContainerState::Running;

fn work_out(patch: Value, o: &Observed, now: i64) -> core::PodStatus {
    let pod = pod(patch);
    let previous = pod.status().cloned().unwrap_or_default();
    status(&pod, o, "192.0.2.1".parse().expect("an address"), &previous, at(now))
}

/// Phase, ready containers, and the reasons of what is not running.
#[track_caller]
fn check(patch: Value, o: &Observed, want_phase: &str, want: &str) {
    let status = work_out(patch, o, 100);
    let all = [&status.init_container_statuses, &status.container_statuses];
    let words = all.into_iter().flatten().flatten().map(|c| {
        let state = c.state.clone().unwrap_or_default();
        let what = match state {
            core::ContainerState { running: Some(_), .. } => "running".to_owned(),
            core::ContainerState { terminated: Some(end), .. } => format!("{}", end.exit_code),
            core::ContainerState { waiting: Some(waiting), .. } => waiting.reason.unwrap_or_default(),
            _ => "?".to_owned(),
        };
        format!("{}:{what}{}", c.name, if c.ready { "+" } else { "" })
    });
    let words = words.collect::<Vec<_>>().join(" ");
    assert_eq!((status.phase.as_deref(), words.as_str()), (Some(want_phase), want));
}

fn policy(policy: &str) -> Value {
    json!({"spec": {"restartPolicy": policy}})
}

#[test]
fn phases_follow_the_containers() {
    check(json!({}), &Observed::default(), "Pending", "c:ContainerCreating");
    check(json!({}), &observed(vec![container("c", 0, Running)]), "Running", "c:running+");
    check(policy("Always"), &observed(vec![exited("c", 0, 1, 100)]), "Running", "c:1");
    check(policy("OnFailure"), &observed(vec![exited("c", 0, 0, 50)]), "Succeeded", "c:0");
    check(policy("OnFailure"), &observed(vec![exited("c", 0, 1, 100)]), "Running", "c:1");
    check(policy("Never"), &observed(vec![exited("c", 0, 1, 50)]), "Failed", "c:1");
    let rules = json!({"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]}});
    check(rules.clone(), &observed(vec![exited("c", 0, 42, 100)]), "Running", "c:42");
    check(rules, &observed(vec![exited("c", 0, 1, 100)]), "Failed", "c:1");
    let unsorted = json!({"spec": {"containers": [{"name": "z"}, {"name": "a"}]}});
    check(unsorted, &Observed::default(), "Pending", "a:ContainerCreating z:ContainerCreating");
    let mut starting = observed(vec![container("c", 0, Running)]);
    starting.running_jobs.insert(Job::Start("c".into()));
    check(json!({}), &starting, "Pending", "c:ContainerCreating");
    let two = |policy: &str| json!({"spec": {"restartPolicy": policy, "containers": [{"name": "c"}, {"name": "d"}]}});
    let half = observed(vec![exited("c", 0, 1, 50), container("d", 0, Running)]);
    check(two("Never"), &half, "Running", "c:1 d:running+");
    check(two("Never"), &observed(vec![exited("c", 0, 0, 50), exited("d", 0, 1, 50)]), "Failed", "c:0 d:1");
    check(
        two("Never"),
        &observed(vec![container("c", 0, Running)]),
        "Pending",
        "c:running+ d:ContainerCreating",
    );
    check(
        json!({"status": {"phase": "Failed", "reason": "Evicted"}}),
        &Observed::default(),
        "Failed",
        "c:ContainerCreating",
    );
}

#[test]
fn init_containers_hold_the_pod_pending() {
    let spec = |policy: &str| json!({"spec": {"restartPolicy": policy, "initContainers": [{"name": "i"}]}});
    check(
        spec("Always"),
        &observed(vec![container("i", 0, Running)]),
        "Pending",
        "i:running c:PodInitializing",
    );
    check(spec("Always"), &observed(vec![exited("i", 0, 0, 50)]), "Pending", "i:0+ c:PodInitializing");
    check(spec("Never"), &observed(vec![exited("i", 0, 1, 50)]), "Failed", "i:1 c:PodInitializing");
    let all = observed(vec![exited("i", 0, 0, 50), container("c", 0, Running)]);
    check(spec("Always"), &all, "Running", "i:0+ c:running+");
    let sidecar = json!({"spec": {"restartPolicy": "Never", "initContainers": [{"name": "s", "restartPolicy": "Always"}]}});
    let over = observed(vec![exited("s", 0, 137, 60), exited("c", 0, 0, 50)]);
    check(sidecar, &over, "Succeeded", "s:137 c:0");
}

#[test]
fn a_crash_loop_shows_why_and_since_when() {
    let mut crashed = exited("c", 2, 7, 95);
    crashed.annotations.insert(crate::observed::BACKOFF_ANNOTATION.into(), "20000".into());
    let o = observed(vec![exited("c", 1, 6, 60), crashed]);
    check(json!({}), &o, "Running", "c:CrashLoopBackOff");
    let status = work_out(json!({}), &o, 100);
    let c = &status.container_statuses.as_ref().expect("containers")[0];
    let waiting = c.state.as_ref().and_then(|state| state.waiting.as_ref()).expect("it waits");
    assert_eq!(waiting.message.as_deref(), Some("back-off 20s restarting failed container=c pod=p_ns(u-1)"));
    let last = c.last_state.as_ref().and_then(|state| state.terminated.as_ref()).expect("it ended");
    assert_eq!((c.restart_count, last.exit_code), (2, 7));
    assert_eq!(c.container_id.as_deref(), Some("minke://c-2"));
}

#[test]
fn a_pod_that_starts_over_says_so() {
    let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    let with = |status: Value| {
        json!({"status": status, "spec": {"restartPolicy": "Never", "initContainers": [{"name": "i"}], "containers": [
            {"name": "c", "restartPolicy": "Never", "restartPolicyRules": rules}, {"name": "d"}]}})
    };
    let fresh = || with(json!({}));
    let condition = |o: &Observed, kind: &str| {
        let status =
            work_out(with(json!({"conditions": [{"type": "Initialized", "status": "True"}]})), o, 100);
        let all = status.conditions.expect("conditions");
        let found = all.into_iter().find(|c| c.type_ == kind).expect("the condition");
        (found.status, found.reason.unwrap_or_default(), found.message.unwrap_or_default())
    };
    let up = observed(vec![exited("i", 0, 0, 1), container("c", 0, Running), container("d", 0, Running)]);
    check(fresh(), &up, "Running", "i:0+ c:running+ d:running+");
    let no = |reason: &str| ("False".to_owned(), reason.to_owned(), String::new());
    assert_eq!(condition(&up, "AllContainersRestarting"), no(""));
    let mut o = observed(vec![exited("i", 0, 0, 1), exited("c", 0, 42, 99), container("d", 0, Running)]);
    let over = "RestartingAllContainers";
    check(fresh(), &o, "Running", &format!("i:{over} c:{over} d:running+"));
    let yes = ("True".to_owned(), "RestartAllContainersStarted".to_owned());
    let message = "container exited with restart policy rule".to_owned();
    assert_eq!(condition(&o, "AllContainersRestarting"), (yes.0, yes.1, message));
    // Once nothing of before runs, all wait as when the pod was new; but it has been initialised.
    o.sandboxes[0].containers[2] = exited("d", 0, 137, 100);
    check(fresh(), &o, "Running", "i:PodInitializing c:PodInitializing d:PodInitializing");
    assert_eq!(condition(&o, "AllContainersRestarting"), no(""));
    assert_eq!(condition(&o, "Initialized"), ("True".to_owned(), String::new(), String::new()));
    let status = work_out(fresh(), &o, 100);
    for c in status.init_container_statuses.iter().chain(&status.container_statuses).flatten() {
        let last = c.last_state.as_ref().and_then(|last| last.terminated.clone()).expect("it ended");
        assert_eq!((c.restart_count, last.exit_code, last.started_at), (1, 137, None), "{}", c.name);
        assert_eq!(last.reason.as_deref(), Some(over), "{}", c.name);
    }
    let mut again = container("d", 1, Running);
    again.annotations.insert(crate::observed::ROUND_ANNOTATION.into(), "1".into());
    o.sandboxes[0].containers.push(again);
    let d = work_out(fresh(), &o, 100).container_statuses.expect("containers").remove(1);
    let last = d.last_state.and_then(|last| last.terminated).expect("it ended");
    assert_eq!((d.restart_count, last.reason.as_deref()), (1, Some(over)));
    assert!(d.state.is_some_and(|state| state.running.is_some()));
    // The next time, the one that asked for it has to wait like any that crashes.
    let mut crashed = exited("c", 0, 42, 99);
    crashed.annotations.insert(crate::observed::BACKOFF_ANNOTATION.into(), "10000".into());
    let o = observed(vec![exited("i", 0, 0, 1), crashed, exited("d", 0, 137, 100)]);
    check(fresh(), &o, "Running", &format!("i:{over} c:CrashLoopBackOff d:{over}"));
    // When the pod ends there is no such thing.
    let mut ended = o.clone();
    ended.ending = Some(Ending { cause: Cause::Deleted, grace: 30, deadline: at(130) });
    check(fresh(), &ended, "Failed", "i:0+ c:42 d:137");
    assert_eq!(condition(&ended, "AllContainersRestarting"), no("PodFailed"));
    let plain = work_out(json!({}), &up, 100).conditions.expect("conditions");
    assert!(plain.iter().all(|c| c.type_ != "AllContainersRestarting"), "others have no such condition");
}

#[test]
fn a_failed_pull_turns_into_a_back_off() {
    let mut o = observed(vec![]);
    let later = Some(("ImagePullBackOff".to_owned(), "Back-off".to_owned()));
    let (reason, message) = ("ErrImagePull".to_owned(), "no".to_owned());
    let waiting = Waiting { reason, message, since: at(100), retry_at: at(110), later, on_change: false };
    o.waiting.insert("c".into(), waiting);
    check(json!({}), &o, "Pending", "c:ErrImagePull");
    let status = work_out(json!({}), &o, 106);
    let state = status.container_statuses.expect("containers")[0].state.clone().expect("a state");
    assert_eq!(state.waiting.expect("it waits").reason.as_deref(), Some("ImagePullBackOff"));
}

#[track_caller]
fn check_conditions(patch: Value, o: &Observed, want: &[(&str, &str, &str, &str)]) {
    let status = work_out(patch, o, 100);
    let conditions = status.conditions.expect("conditions");
    for (kind, value, reason, message) in want {
        let condition = conditions.iter().find(|condition| condition.type_ == *kind).expect(kind);
        assert_eq!(
            (condition.status.as_str(), condition.reason.as_deref(), condition.message.as_deref()),
            (*value, Some(*reason).filter(|r| !r.is_empty()), Some(*message).filter(|m| !m.is_empty())),
            "{kind}"
        );
        assert_eq!(condition.observed_generation, Some(1), "{kind}");
    }
}

#[test]
fn conditions_say_what_is_missing() {
    let unready = "containers with unready status: [c]";
    check_conditions(
        json!({}),
        &Observed::default(),
        &[
            ("PodReadyToStartContainers", "False", "", ""),
            ("Initialized", "True", "", ""),
            ("Ready", "False", "ContainersNotReady", unready),
            ("ContainersReady", "False", "ContainersNotReady", unready),
            ("PodScheduled", "True", "", ""),
        ],
    );
    let running = observed(vec![container("c", 0, Running)]);
    check_conditions(
        json!({}),
        &running,
        &[("PodReadyToStartContainers", "True", "", ""), ("Ready", "True", "", "")],
    );
    let gated = json!({"spec": {"readinessGates": [{"conditionType": "x/y"}]}});
    let why = "corresponding condition of pod readiness gate \"x/y\" does not exist.";
    check_conditions(
        gated,
        &running,
        &[("Ready", "False", "ReadinessGatesNotReady", why), ("ContainersReady", "True", "", "")],
    );
    check_conditions(
        json!({"spec": {"initContainers": [{"name": "i"}]}}),
        &observed(vec![container("i", 0, Running)]),
        &[("Initialized", "False", "ContainersNotInitialized", "containers with incomplete status: [i]")],
    );
    check_conditions(
        policy("Never"),
        &observed(vec![exited("c", 0, 0, 50)]),
        &[("Ready", "False", "PodCompleted", "")],
    );
    check_conditions(
        policy("Never"),
        &observed(vec![exited("c", 0, 1, 50)]),
        &[("Ready", "False", "PodFailed", "")],
    );
}

#[test]
fn a_condition_keeps_its_time_until_it_changes() {
    let known = json!({"status": {"conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": at(10)},
        {"type": "ContainersReady", "status": "False", "lastTransitionTime": at(10)}]}});
    let status = work_out(known, &observed(vec![container("c", 0, Running)]), 100);
    let since = |kind: &str| {
        let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
        condition.and_then(|condition| condition.last_transition_time.clone()).map(|time| time.0)
    };
    assert_eq!((since("Ready"), since("ContainersReady")), (Some(at(10)), Some(at(100))));
}

#[test]
fn probes_hold_readiness_back() {
    let mut o = observed(vec![container("c", 0, Running)]);
    o.probes.insert("c-0".into(), Probes { readiness: Some(ProbeState::Unknown), ..Probes::default() });
    check(json!({}), &o, "Running", "c:running");
    o.probes.insert("c-0".into(), Probes { readiness: Some(ProbeState::Success), ..Probes::default() });
    check(json!({}), &o, "Running", "c:running+");
    let startup = Some(ProbeState::Unknown);
    o.probes.insert("c-0".into(), Probes { startup, ..Probes::default() });
    check(json!({}), &o, "Running", "c:running");
}

#[test]
fn the_end_of_a_pod_is_final() {
    let ending = |cause| Some(Ending { cause, grace: 30, deadline: at(130) });
    let mut o = observed(vec![exited("c", 0, 143, 90)]);
    o.ending = ending(Cause::Deleted);
    check(json!({}), &o, "Failed", "c:143");
    let mut o = observed(vec![exited("c", 0, 0, 90)]);
    (o.ending, o.cleanup) = (ending(Cause::Deleted), Cleanup::Removed);
    check(json!({}), &o, "Succeeded", "c:0");
    // One that never started has failed too, and nobody knows how its containers ended.
    let mut o = observed(vec![]);
    (o.ending, o.cleanup) = (ending(Cause::Deleted), Cleanup::Removed);
    check(json!({}), &o, "Failed", "c:137");
    // Too long a life is told of only when it has ended.
    let late = || Cause::Failed { reason: "DeadlineExceeded".into(), message: "m".into() };
    let mut o = observed(vec![container("c", 0, Running)]);
    o.ending = ending(late());
    check(json!({}), &o, "Running", "c:running+");
    let mut o = observed(vec![exited("c", 0, 143, 90)]);
    o.ending = ending(late());
    check(json!({}), &o, "Failed", "c:143");
    let mut o = Observed { rejected: Some(("OutOfcpu".into(), "m".into())), ..Observed::default() };
    o.ending = ending(Cause::Failed { reason: "OutOfcpu".into(), message: "m".into() });
    let status = work_out(json!({}), &o, 100);
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("OutOfcpu")));
    assert_eq!((status.container_statuses, status.pod_ip), (None, None));
    // Nor does another agent forget it, which finds nothing left of the pod.
    let known = work_out(json!({}), &observed(vec![exited("c", 0, 143, 90)]), 100).container_statuses;
    let known = json!({"phase": "Failed", "containerStatuses": known});
    check(json!({"status": known}), &Observed::default(), "Failed", "c:143");
}

#[test]
fn only_what_changed_is_sent() {
    let old = json!({"phase": "Pending", "podIP": "1.2.3.4", "podIPs": [{"ip": "1.2.3.4"}], "reason": "x",
        "conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "False", "reason": "r"}]});
    assert_eq!(patch("u", &old, &old), None);
    let new = json!({"phase": "Running", "podIP": "1.2.3.5", "podIPs": [{"ip": "1.2.3.5"}],
        "conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]});
    let want = json!({"metadata": {"uid": "u"}, "status": {"phase": "Running", "podIP": "1.2.3.5", "reason": null,
        "podIPs": [{"ip": "1.2.3.5"}, {"$patch": "replace"}],
        "conditions": [{"type": "B", "status": "True", "reason": null}]}});
    assert_eq!(patch("u", &old, &new), Some(want));
}

#[test]
fn a_container_on_its_way_back_is_not_the_end_of_its_pod() {
    let mut o = observed(vec![exited("c", 0, 0, 99)]);
    check(policy("Never"), &o, "Succeeded", "c:0");
    o.restarting.insert("c-0".into(), true);
    check(policy("Never"), &o, "Running", "c:ContainerCreating");
    let status = work_out(policy("Never"), &o, 100);
    let last = status.container_statuses.expect("statuses")[0].last_state.clone().expect("a last state");
    assert_eq!(last.terminated.expect("it ended").exit_code, 0);
}

#[test]
fn a_resize_is_told_of_until_it_is_done() {
    let kinds = |o: &Observed| -> Vec<String> {
        let spec =
            json!({"spec": {"containers": [{"name": "c", "resources": {"limits": {"memory": "9Mi"}}}]}});
        let passing = work_out(spec, o, 100).conditions.into_iter().flatten();
        let passing = passing.filter(|c| PASSING.contains(&c.type_.as_str()));
        passing.map(|c| format!("{} {}", c.type_, c.reason.unwrap_or_default())).collect()
    };
    let mut o = observed(vec![container("c", 0, Running)]);
    assert_eq!(kinds(&o), ["PodResizeInProgress "]);
    o.resize_error = Some("busy".into());
    assert_eq!(kinds(&o), ["PodResizeInProgress Error"]);
    o.resize_pending = Some(crate::resize::Pending { reason: "Deferred", message: "m".into() });
    o.sandboxes[0].containers[0].resources.memory_limit = Some(9 << 20);
    assert_eq!(
        kinds(&o),
        ["PodResizePending Deferred", "PodResizeInProgress Error"],
        "the pod's own is left"
    );
    o.sandboxes[0].spec.resources.memory_limit = Some(9 << 20);
    assert_eq!(kinds(&o), ["PodResizePending Deferred"]);
    o.resize_pending = None;
    assert_eq!(kinds(&o), [""; 0]);
    // A condition that is over is taken away.
    let before = json!({"conditions": [{"type": "PodResizePending", "status": "True"}]});
    let change = patch("u", &before, &json!({"conditions": []})).expect("a change");
    assert_eq!(change["status"]["conditions"], json!([{"type": "PodResizePending", "$patch": "delete"}]));
}

#[test]
fn runs_are_counted_from_what_was_told() {
    let status = |id: Value| {
        let c = json!({"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 2, "containerID": id});
        serde_json::from_value(json!({"containerStatuses": [c]})).expect("a status")
    };
    assert_eq!(runs(&status(json!("minke://1"))), [("c".to_owned(), 3)].into());
    assert_eq!(runs(&status(Value::Null)), [].into(), "it never ran");
}

#[test]
fn a_pod_tells_what_it_has_as_a_whole() {
    let spec = |cpu: i64| {
        json!({"spec": {"resources": {"requests": {"cpu": cpu.to_string()}}, "containers": [{"name": "c"}]},
            "status": {"resources": {"requests": {"cpu": "1"}}}})
    };
    let told = |o: &Observed, cpu: i64| {
        let status = work_out(spec(cpu), o, 100);
        let asked =
            |resources: Option<core::ResourceRequirements>| resources?.requests?.remove("cpu").map(|q| q.0);
        let mut allocated = status.allocated_resources.unwrap_or_default();
        let resizes = status.conditions.iter().flatten().any(|c| c.type_ == "PodResizeInProgress");
        (allocated.remove("cpu").map(|q| q.0), asked(status.resources), resizes)
    };
    let text = |text: &str| Some(text.to_owned());
    let mut o = observed(vec![container("c", 0, Running)]);
    o.sandboxes[0].spec.resources.cpu_shares = Some(1024);
    assert_eq!(told(&o, 1), (text("1"), text("1"), false));
    assert_eq!(
        told(&o, 2),
        (text("2"), text("1"), true),
        "until the new ones hold, the old ones are what there is"
    );
    o.sandboxes[0].spec.resources.cpu_shares = Some(2048);
    assert_eq!(told(&o, 2), (text("2"), text("2"), false));
    let plain = work_out(json!({}), &observed(vec![container("c", 0, Running)]), 100);
    assert_eq!((plain.allocated_resources, plain.resources), (None, None));
}

#[test]
fn last_words_share_their_room() {
    let mut o = observed(vec![exited("c", 0, 1, 99), exited("d", 0, 1, 99)]);
    o.messages.insert("c-0".into(), "x".repeat(4096));
    let spec = |n: usize| {
        let more = (0..n).map(|n| json!({"name": format!("x{n}")}));
        let all: Vec<Value> = [json!({"name": "c"})].into_iter().chain(more).collect();
        json!({"spec": {"restartPolicy": "Never", "containers": all}})
    };
    let length = |n| {
        let status = work_out(spec(n), &o, 100).container_statuses.expect("statuses")[0].state.clone();
        status.and_then(|state| state.terminated?.message).map_or(0, |message| message.len())
    };
    assert_eq!((length(0), length(2), length(5)), (4096, 4096, 2048));
}
