use super::plan::{holds, index_of, remembered};
use super::*;
use crate::pods::tests::{NOW, now, pod};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::JobStatus;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// A Job and its pods, and a way to let plans come true.
struct World {
    job: Typed<Job>,
    pods: Vec<Typed<Pod>>,
    now: Timestamp,
    made: usize,
    told: Vec<String>,
    backoff: Option<Backoff>,
    /// What should be counted in the end.
    succeeded: i32,
    failed: i32,
}

fn world(spec: Value) -> World {
    let mut spec = spec;
    spec["template"] = json!({ "spec": { "containers": [{ "name": "c" }], "restartPolicy": "Never" } });
    let value = json!({ "metadata": { "name": "j", "namespace": "ns", "uid": "j" }, "spec": spec });
    let object = Object::from_value(Kind::of::<Job>(), &value).unwrap();
    World {
        job: Typed::new(object.into()).unwrap(),
        pods: Vec::new(),
        now: now(),
        made: 0,
        told: Vec::new(),
        backoff: None,
        succeeded: 0,
        failed: 0,
    }
}

/// One write of a plan.
enum Write {
    Release(String),
    Delete(String),
    Create(Create),
    Status(Box<JobStatus>),
}

impl World {
    fn plan(&self) -> Plan {
        let backoff = self.backoff.clone().unwrap_or_else(|| remembered(&self.job, &self.pods));
        plan(&self.job, &self.pods, &backoff, self.now)
    }

    /// A whole pass.
    fn step(&mut self) -> Plan {
        self.step_until(usize::MAX).0
    }

    /// A pass that crashes after so many writes, if it has so many; whether it did.
    fn step_until(&mut self, writes: usize) -> (Plan, bool) {
        let plan = self.plan();
        let discards =
            plan.discard.iter().flat_map(|uid| [Write::Release(uid.clone()), Write::Delete(uid.clone())]);
        let mut todo: Vec<Write> = discards.collect();
        todo.extend(plan.stop.iter().cloned().map(Write::Delete));
        todo.extend(plan.release.iter().cloned().map(Write::Release));
        todo.extend(plan.create.iter().cloned().map(Write::Create));
        todo.push(Write::Status(Box::new(plan.status.clone())));
        let crashes = writes < todo.len();
        todo.into_iter().take(writes).for_each(|write| self.carry_out(write));
        self.backoff = (!crashes).then(|| plan.backoff.clone());
        if !crashes {
            self.told.extend(plan.tell.iter().map(|told| told.reason.clone()));
        }
        (plan, crashes)
    }

    fn carry_out(&mut self, write: Write) {
        let find = |world: &World, uid: &str| world.pods.iter().position(|pod| pod.object.uid() == uid);
        match write {
            Write::Release(uid) => {
                let at = find(self, &uid).expect("a pod that is held is there");
                self.edit(at, |p| p["metadata"]["finalizers"] = Value::Null);
            }
            Write::Delete(uid) => {
                if let Some(at) = find(self, &uid) {
                    let stamp = self.now.to_string();
                    self.edit(at, |p| p["metadata"]["deletionTimestamp"] = stamp.into());
                }
            }
            Write::Create(create) => {
                self.made += 1;
                let new = pod_of(&self.job, &create);
                let made = pod(&format!("p{}", self.made), |p| {
                    for field in ["finalizers", "annotations"] {
                        p["metadata"][field] = new["metadata"][field].clone();
                    }
                    p["metadata"]["creationTimestamp"] = self.now.to_string().into();
                    p["status"] = json!({ "phase": "Running" });
                });
                self.pods.push(made);
            }
            Write::Status(status) => {
                let mut job = (*self.job).clone();
                job.status = Some(*status);
                self.job = Typed::test(&job);
            }
        }
    }

    fn edit(&mut self, at: usize, change: impl FnOnce(&mut Value)) {
        let mut value = self.pods[at].object.value();
        change(&mut value);
        self.pods[at] = Typed::new(Object::from_value(Kind::of::<Pod>(), &value).unwrap().into()).unwrap();
    }

    fn change(&mut self, change: impl FnOnce(&mut Value)) {
        let mut value = self.job.object.value();
        change(&mut value);
        self.job = Typed::new(Object::from_value(Kind::of::<Job>(), &value).unwrap().into()).unwrap();
    }

    /// The pod's container ends with this code.
    fn exit(&mut self, at: usize, code: i32) {
        let finished = json!({ "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": code, "finishedAt": self.now.to_string() } } });
        let phase = if code == 0 { "Succeeded" } else { "Failed" };
        self.edit(at, |p| p["status"] = json!({ "phase": phase, "containerStatuses": [finished] }));
    }

    /// Stops the pods that are to go, and removes those that nobody holds.
    fn kubelet(&mut self) {
        for at in 0..self.pods.len() {
            if self.pods[at].object.deleted().is_some() && !pods::is_finished(&self.pods[at]) {
                self.exit(at, 137);
            }
        }
        self.pods.retain(|pod| pod.object.deleted().is_none() || has_finalizer(&pod.object));
    }

    /// Steps until nothing changes.
    #[track_caller]
    fn settle(&mut self) {
        for _ in 0..20 {
            let before = (self.job.status.clone(), self.pods.len());
            let plan = self.step();
            self.kubelet();
            let idle = [&plan.stop, &plan.discard, &plan.release].iter().all(|uids| uids.is_empty());
            if idle && plan.create.is_empty() && before == (self.job.status.clone(), self.pods.len()) {
                return;
            }
        }
        panic!("does not settle");
    }

    fn status(&self) -> &JobStatus {
        self.job.status.as_ref().unwrap()
    }

    /// Where the pods are that are at work.
    fn active(&self) -> Vec<usize> {
        let unfinished = |pod: &Typed<Pod>| !pods::is_finished(pod) && pod.object.deleted().is_none();
        (0..self.pods.len()).filter(|at| unfinished(&self.pods[*at])).collect()
    }

    #[track_caller]
    fn check_condition(&self, type_: &str, reason: &str, message: &str) {
        let condition = self.status().conditions.iter().flatten().find(|c| c.type_ == type_).unwrap();
        assert_eq!(
            (condition.status.as_str(), condition.reason.as_deref(), condition.message.as_deref()),
            ("True", Some(reason), Some(message))
        );
    }

    /// Waits for whatever is due next.
    #[track_caller]
    fn wait(&mut self) {
        self.now = self.plan().due.expect("something is due");
        self.settle();
    }
}

#[test]
fn a_job_is_complete_when_enough_pods_succeeded() {
    let mut world = world(json!({"completions": 3, "parallelism": 2, "backoffLimit": 6}));
    world.settle();
    assert_eq!((world.active().len(), world.status().active), (2, Some(2)));
    for _ in 0..3 {
        let first = world.active()[0];
        world.exit(first, 0);
        world.settle();
    }
    assert_eq!((world.made, world.status().succeeded), (3, Some(3)));
    world.check_condition(
        "SuccessCriteriaMet",
        "CompletionsReached",
        "Reached expected number of succeeded pods",
    );
    world.check_condition("Complete", "CompletionsReached", "Reached expected number of succeeded pods");
    assert!(world.status().completion_time.is_some());
    assert!(world.pods.iter().all(|pod| !has_finalizer(&pod.object)), "every pod may go");
    assert_eq!(world.told, ["Completed"]);
}

#[test]
fn failed_pods_are_replaced_after_a_while_and_not_for_ever() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "backoffLimit": 2}));
    world.settle();
    world.exit(0, 1);
    world.settle();
    assert_eq!((world.made, world.status().failed), (1, Some(1)), "not yet");
    assert_eq!(world.plan().due.unwrap().as_second(), NOW + 10);
    world.wait();
    assert_eq!(world.made, 2);
    world.exit(1, 1);
    // What was remembered is lost; the pods tell it.
    world.backoff = None;
    world.settle();
    assert_eq!(world.plan().due.unwrap().as_second(), NOW + 30);
    world.wait();
    world.exit(2, 1);
    world.settle();
    world.check_condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit");
    assert_eq!((world.told.as_slice(), world.made), (["BackoffLimitExceeded".to_owned()].as_slice(), 3));
}

#[test]
fn a_pod_is_counted_once_whatever_happens_in_between() {
    let mut world = world(json!({"completions": 2, "parallelism": 1}));
    world.settle();
    world.exit(0, 0);
    let first = world.plan();
    assert!(first.release.is_empty(), "its finalizer stays until the status names it");
    assert_eq!(first.status.succeeded, None);
    let named = first.status.uncounted_terminated_pods.as_ref().unwrap().succeeded.clone();
    assert_eq!(named, Some(vec!["uid-p1".to_owned()]));
    // The same again, as if the status had not been written; and then with it written.
    assert_eq!(world.plan(), first);
    world.settle();
    assert_eq!(world.status().succeeded, Some(1));
    world.pods.remove(0);
    world.settle();
    assert_eq!(world.status().succeeded, Some(1), "a counted pod may be deleted");
}

#[test]
fn an_indexed_job_runs_each_index_to_success() {
    let mut world = world(json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed"}));
    world.settle();
    let indexes: Vec<_> = world.pods.iter().map(|pod| index_of(pod).unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2]);
    world.exit(0, 0);
    world.exit(2, 0);
    world.now += Duration::from_secs(1);
    world.exit(1, 1);
    world.settle();
    assert_eq!(world.status().completed_indexes.as_deref(), Some("0,2"));
    world.wait();
    assert_eq!(index_of(world.pods.last().unwrap()), Some(1));
    world.exit(3, 0);
    world.settle();
    assert_eq!(world.status().completed_indexes.as_deref(), Some("0-2"));
    assert!(holds(world.status(), "Complete"));
}

#[test]
fn an_indexed_pod_knows_its_index() {
    let mut world = world(json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed"}));
    world.change(|job| {
        job["spec"]["template"]["spec"]["initContainers"] =
            json!([{ "name": "i", "env": [{ "name": "JOB_COMPLETION_INDEX", "value": "mine" }] }]);
    });
    let pod = pod_of(&world.job, &Create { index: Some(2), failures: Some((1, 4)) });
    assert_eq!(pod["metadata"]["generateName"], "j-2-");
    assert_eq!(pod["metadata"]["finalizers"], json!([FINALIZER]));
    assert_eq!(pod["metadata"]["annotations"], json!({INDEX: "2", FAILURES: "1", IGNORED_FAILURES: "4"}));
    assert_eq!(pod["metadata"]["labels"], json!({INDEX: "2"}));
    assert_eq!(pod["spec"]["hostname"], "j-2");
    let field = json!([{ "name": "JOB_COMPLETION_INDEX", "valueFrom": { "fieldRef": { "fieldPath": format!("metadata.labels['{INDEX}']") } } }]);
    assert_eq!(pod["spec"]["containers"][0]["env"], field);
    assert_eq!(pod["spec"]["initContainers"][0]["env"][0]["value"], "mine");
    let mut long = world.job.object.value();
    long["metadata"]["name"] = "n".repeat(62).into();
    let long = Typed::new(Object::from_value(Kind::of::<Job>(), &long).unwrap().into()).unwrap();
    let name =
        pod_of(&long, &Create { index: Some(123), failures: None })["metadata"]["generateName"].clone();
    assert_eq!(name, format!("{}-123-", "n".repeat(53)));
}

#[test]
fn each_index_may_fail_so_often() {
    let mut world = world(json!({"completions": 2, "parallelism": 2, "completionMode": "Indexed",
        "backoffLimit": i32::MAX, "backoffLimitPerIndex": 1}));
    world.settle();
    world.exit(0, 1);
    world.exit(1, 0);
    world.settle();
    assert_eq!(world.status().failed, None, "it waits for its successor");
    assert!(has_finalizer(&world.pods[0].object));
    assert_eq!(world.plan().due.unwrap().as_second(), NOW + 10);
    world.wait();
    assert_eq!(world.status().failed, Some(1));
    assert_eq!(world.pods[2].metadata.annotations.as_ref().unwrap()[FAILURES], "1");
    world.exit(2, 1);
    world.settle();
    assert_eq!((world.made, world.status().failed_indexes.as_deref()), (3, Some("0")));
    world.check_condition("Failed", "FailedIndexes", "Job has failed indexes");
    assert_eq!((world.status().succeeded, world.status().failed), (Some(1), Some(2)));
}

#[test]
fn too_many_failed_indexes_fail_the_job() {
    let mut world = world(json!({"completions": 5, "parallelism": 3, "completionMode": "Indexed",
        "backoffLimit": i32::MAX, "backoffLimitPerIndex": 0, "maxFailedIndexes": 1}));
    world.settle();
    world.exit(0, 1);
    world.settle();
    assert_eq!(world.active().len(), 3, "others go on");
    world.exit(1, 1);
    world.settle();
    let message = "Job has exceeded the specified maximal number of failed indexes";
    world.check_condition("Failed", "MaxFailedIndexesExceeded", message);
    assert_eq!(world.status().failed_indexes.as_deref(), Some("0,1"));
    assert_eq!(world.status().failed, Some(4), "those at work failed with the Job");
}

#[test]
fn a_failure_policy_decides_what_failures_mean() {
    let rule = |action: &str, code: i32| json!({"action": action, "onExitCodes": {"operator": "In", "values": [code]}});
    let rules = json!([rule("FailJob", 42), rule("Ignore", 7), rule("FailIndex", 9)]);
    let mut world = world(
        json!({"completions": 4, "parallelism": 4, "completionMode": "Indexed", "backoffLimit": i32::MAX,
        "backoffLimitPerIndex": 3, "podReplacementPolicy": "Failed", "podFailurePolicy": {"rules": rules}}),
    );
    world.settle();
    world.exit(0, 7);
    world.exit(1, 9);
    world.settle();
    assert_eq!(world.status().failed_indexes.as_deref(), Some("1"), "not tried again");
    assert_eq!(world.status().failed, Some(1));
    world.wait();
    let again = world.pods.last().unwrap();
    let annotations = again.metadata.annotations.as_ref().unwrap();
    assert_eq!(
        (index_of(again), annotations[FAILURES].as_str(), annotations[IGNORED_FAILURES].as_str()),
        (Some(0), "0", "1")
    );
    world.exit(2, 42);
    world.settle();
    let why = "Container c for pod ns/p3 failed with exit code 42 matching FailJob rule at index 0";
    world.check_condition("FailureTarget", "PodFailurePolicy", why);
    world.check_condition("Failed", "PodFailurePolicy", why);
    assert_eq!(world.told, ["PodFailurePolicy"]);
}

#[test]
fn a_success_policy_ends_the_job_early() {
    let mut world = world(json!({"completions": 4, "parallelism": 4, "completionMode": "Indexed",
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]}}));
    world.settle();
    world.exit(1, 0);
    world.settle();
    assert_eq!(world.active().len(), 3);
    world.exit(0, 0);
    world.settle();
    world.check_condition("Complete", "SuccessPolicy", "Matched rules at index 0");
    assert_eq!(
        (world.status().succeeded, world.status().failed),
        (Some(2), None),
        "the others are not failures"
    );
    assert!(world.active().is_empty());
}

#[test]
fn pods_that_go_are_replaced_at_once_or_when_they_are_gone() {
    for (policy, at_once) in [("TerminatingOrFailed", true), ("Failed", false)] {
        let mut world = world(json!({"completions": 1, "parallelism": 1, "podReplacementPolicy": policy}));
        world.settle();
        world.edit(0, |p| p["metadata"]["deletionTimestamp"] = now().to_string().into());
        for _ in 0..4 {
            world.step();
        }
        assert_eq!((world.status().failed, world.status().terminating), (at_once.then_some(1), Some(1)));
        world.now += Duration::from_secs(10);
        world.step();
        assert_eq!(world.made, if at_once { 2 } else { 1 });
        world.kubelet();
        world.settle();
        world.now += Duration::from_secs(10);
        world.settle();
        assert_eq!((world.made, world.status().failed), (2, Some(1)));
    }
}

#[test]
fn a_suspended_job_has_no_pods() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "suspend": true}));
    world.settle();
    assert_eq!((world.made, world.status().start_time.is_none()), (0, true));
    world.check_condition("Suspended", "JobSuspended", "Job suspended");
    world.change(|job| job["spec"]["suspend"] = false.into());
    world.settle();
    assert_eq!((world.made, world.status().start_time.is_some()), (1, true));
    world.change(|job| job["spec"]["suspend"] = true.into());
    world.settle();
    assert_eq!((world.pods.len(), world.status().failed, world.status().active), (0, None, None));
    assert_eq!(world.told, ["Suspended", "Resumed", "Suspended"]);
}

#[test]
fn a_job_ends_at_its_deadline() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "activeDeadlineSeconds": 60}));
    world.settle();
    assert_eq!(world.plan().due.unwrap().as_second(), NOW + 60);
    world.now += Duration::from_secs(60);
    world.step();
    world.step();
    assert!(!holds(world.status(), "Failed"), "its pod must stop first");
    assert!(world.pods[0].object.deleted().is_some());
    world.settle();
    world.check_condition("Failed", "DeadlineExceeded", "Job was active longer than specified deadline");
}

#[test]
fn parallelism_zero_takes_pods_away() {
    let mut world = world(json!({"completions": 5, "parallelism": 3}));
    world.settle();
    assert_eq!(world.active().len(), 3);
    world.change(|job| job["spec"]["parallelism"] = 0.into());
    world.settle();
    assert_eq!((world.active().len(), world.status().failed), (0, None));
}

#[test]
fn containers_that_are_restarted_too_often_fail_the_job() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "backoffLimit": 2}));
    world.change(|job| job["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure".into());
    world.settle();
    let restarted = |count: i32| json!([{ "name": "c", "image": "", "imageID": "", "ready": true, "restartCount": count }]);
    world.edit(0, |p| p["status"]["containerStatuses"] = restarted(1));
    world.settle();
    assert_eq!(world.active().len(), 1);
    world.edit(0, |p| p["status"]["containerStatuses"] = restarted(2));
    world.settle();
    world.check_condition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit");
}

#[test]
fn pods_of_a_job_that_is_deleted_are_let_go() {
    let mut world = world(json!({"completions": 3, "parallelism": 2}));
    world.settle();
    world.exit(0, 0);
    world.change(|job| job["metadata"]["deletionTimestamp"] = now().to_string().into());
    world.settle();
    assert_eq!((world.made, world.active().len(), world.status().succeeded), (2, 1, Some(1)));
    assert!(world.pods.iter().all(|pod| !has_finalizer(&pod.object)));
}

#[test]
fn thousands_of_pods_are_counted_a_few_hundred_at_a_time() {
    let mut world = world(json!({"completions": 1200, "parallelism": 1200}));
    world.settle();
    assert_eq!(world.active().len(), 1200);
    (0..1200).for_each(|at| world.exit(at, 0));
    let first = world.step();
    assert_eq!(first.status.uncounted_terminated_pods.unwrap().succeeded.unwrap().len(), 500);
    world.settle();
    assert_eq!(world.status().succeeded, Some(1200));
    assert!(holds(world.status(), "Complete"));
}

/// A Job of chance, to which chance things happen: pods end or are deleted, the spec changes, the controller crashes
/// between any two writes. In the end everything succeeds.
fn live(seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let (indexed, replacement) = (rng.random(), if rng.random() { "Failed" } else { "TerminatingOrFailed" });
    let completions: i32 = rng.random_range(1..7);
    let mut spec = json!({"completions": completions, "parallelism": rng.random_range(1..5),
        "backoffLimit": rng.random_range(0..9), "podReplacementPolicy": replacement});
    let ignores = rng.random_bool(0.3);
    if indexed {
        spec["completionMode"] = "Indexed".into();
        if rng.random() {
            spec["backoffLimitPerIndex"] = rng.random_range(0..3).into();
            spec["backoffLimit"] = i32::MAX.into();
        }
    }
    if ignores {
        spec["podFailurePolicy"] =
            json!({"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [7]}}]});
        spec["podReplacementPolicy"] = "Failed".into();
    }
    let only_failed = spec["podReplacementPolicy"] == "Failed";
    let mut world = world(spec);
    for round in 0..400 {
        world.now += Duration::from_secs(rng.random_range(0..40));
        let calm = round > 150;
        match rng.random_range(0..8) {
            _ if calm => world.change(|job| job["spec"]["suspend"] = false.into()),
            0 => world.change(|job| job["spec"]["suspend"] = rng.random_bool(0.3).into()),
            1 => world.change(|job| job["spec"]["parallelism"] = rng.random_range(1..5).into()),
            2 => world.kubelet(),
            _ => {}
        }
        let work: Vec<usize> =
            world.active().into_iter().filter(|at| has_finalizer(&world.pods[*at].object)).collect();
        let at = (!work.is_empty()).then(|| work[rng.random_range(0..work.len().max(1))]);
        if let Some(at) = at {
            match rng.random_range(0..6) {
                0 | 1 if !calm => {
                    let code = if rng.random() { 7 } else { 1 };
                    world.exit(at, code);
                    world.failed += i32::from(!(ignores && code == 7));
                }
                2 if !calm && !only_failed => {
                    let stamp = world.now.to_string();
                    world.edit(at, |p| p["metadata"]["deletionTimestamp"] = stamp.into());
                    world.failed += 1;
                }
                _ => {
                    world.exit(at, 0);
                    world.succeeded += 1;
                }
            }
        }
        let crash_after = if rng.random_bool(0.3) { rng.random_range(0..4) } else { usize::MAX };
        let (_, crashed) = world.step_until(crash_after);
        if !crashed {
            check_limits(&world, indexed, seed);
        }
        if calm {
            world.kubelet();
        }
        if is_finished(&world.job) {
            break;
        }
    }
    world.settle();
    let status = world.status();
    assert!(is_finished(&world.job), "seed {seed}: {status:?} {:?}", world.plan());
    assert!(world.pods.iter().all(|pod| !has_finalizer(&pod.object)), "seed {seed}: nothing is held");
    let uncounted = status.uncounted_terminated_pods.clone().unwrap();
    assert_eq!(uncounted, Default::default(), "seed {seed}");
    if holds(status, "Complete") {
        assert_eq!(status.succeeded, Some(completions), "seed {seed}");
        assert_eq!(status.succeeded, Some(world.succeeded), "seed {seed}: each success once");
        assert_eq!(status.failed.unwrap_or(0), world.failed, "seed {seed}: each failure once");
    } else {
        assert!(status.succeeded.unwrap_or(0) == world.succeeded, "seed {seed}: each success once");
        assert!(status.failed.unwrap_or(0) >= world.failed, "seed {seed}: no failure is missed");
    }
}

#[track_caller]
fn check_limits(world: &World, indexed: bool, seed: u64) {
    let spec = world.job.spec.as_ref().unwrap();
    let active = world.active();
    let most = spec.parallelism.unwrap().min(spec.completions.unwrap()) as usize;
    assert!(active.len() <= most, "seed {seed}: {} of {most} at work", active.len());
    if indexed {
        let indexes: BTreeSet<i32> = active.iter().filter_map(|at| index_of(&world.pods[*at])).collect();
        assert_eq!(indexes.len(), active.len(), "seed {seed}: one pod for an index");
    }
}

#[test]
fn whatever_happens_every_pod_is_counted_once() {
    (0..500).for_each(live);
}
