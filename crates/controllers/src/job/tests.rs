use super::*;
use crate::pods::tests::{NOW, now, pod};

/// A Job and its pods, and a way to let plans come true.
struct World {
    job: Typed<Job>,
    pods: Vec<Typed<Pod>>,
    now: Timestamp,
    made: usize,
    told: Vec<&'static str>,
}

fn world(spec: Value) -> World {
    let mut spec = spec;
    spec["template"] = json!({"spec": {"containers": [{"name": "c"}], "restartPolicy": "Never"}});
    let value = json!({"metadata": {"name": "j", "namespace": "ns", "uid": "j"}, "spec": spec});
    let object = Object::from_value(Kind::of::<Job>(), &value).unwrap();
    World { job: Typed::new(object.into()).unwrap(), pods: Vec::new(), now: now(), made: 0, told: Vec::new() }
}

impl World {
    fn step(&mut self) -> Plan {
        let plan = plan(&self.job, &self.pods, self.now);
        self.pods.retain(|pod| {
            has_finalizer(&pod.object) || !plan.delete.iter().any(|uid| uid == pod.object.uid())
        });
        for at in 0..self.pods.len() {
            let uid = self.pods[at].object.uid().to_owned();
            if plan.release.contains(&uid) {
                self.edit(at, |p| p["metadata"]["finalizers"] = Value::Null);
            } else if plan.delete.contains(&uid) {
                let stamp = self.now.to_string();
                self.edit(at, |p| p["metadata"]["deletionTimestamp"] = stamp.into());
            }
        }
        for index in &plan.create {
            self.made += 1;
            let made = pod(&format!("p{}", self.made), |p| {
                p["metadata"]["finalizers"] = json!([FINALIZER]);
                p["metadata"]["annotations"] = json!({});
                p["status"] = json!({"phase": "Pending"});
                if let Some(index) = index {
                    p["metadata"]["annotations"][INDEX] = index.to_string().into();
                }
            });
            self.pods.push(made);
        }
        let mut job = (*self.job).clone();
        job.status = Some(plan.status.clone());
        self.job = Typed::test(&job);
        self.told.extend(plan.tell.iter().map(|(_, reason, _)| *reason));
        plan
    }

    fn edit(&mut self, at: usize, change: impl FnOnce(&mut Value)) {
        let mut value = self.pods[at].object.value();
        change(&mut value);
        self.pods[at] = Typed::new(Object::from_value(Kind::of::<Pod>(), &value).unwrap().into()).unwrap();
    }

    fn end(&mut self, at: usize, phase: &str) {
        let finished = json!({"name": "c", "state": {"terminated": {"exitCode": 0, "finishedAt": self.now.to_string()}},
            "image": "", "imageID": "", "ready": false, "restartCount": 0});
        self.edit(at, |p| p["status"] = json!({"phase": phase, "containerStatuses": [finished]}));
    }

    /// Steps until nothing changes.
    #[track_caller]
    fn settle(&mut self) {
        for _ in 0..20 {
            let before = (self.job.status.clone(), self.pods.len());
            let plan = self.step();
            if plan.create.is_empty()
                && plan.delete.is_empty()
                && plan.release.is_empty()
                && before == (self.job.status.clone(), self.pods.len())
            {
                return;
            }
        }
        panic!("does not settle");
    }

    fn status(&self) -> &JobStatus {
        self.job.status.as_ref().unwrap()
    }

    fn active(&self) -> Vec<usize> {
        let unfinished = |pod: &Typed<Pod>| !pods::is_finished(pod) && pod.object.deleted().is_none();
        (0..self.pods.len()).filter(|at| unfinished(&self.pods[*at])).collect()
    }
}

#[test]
fn a_job_is_complete_when_enough_pods_succeeded() {
    let mut world = world(json!({"completions": 3, "parallelism": 2, "backoffLimit": 6}));
    world.settle();
    assert_eq!((world.active().len(), world.status().active), (2, Some(2)));
    for _ in 0..3 {
        let first = world.active()[0];
        world.end(first, "Succeeded");
        world.settle();
    }
    assert_eq!((world.made, world.status().succeeded), (3, Some(3)));
    assert!(holds(world.status(), "Complete"));
    assert!(world.status().completion_time.is_some());
    assert!(world.pods.iter().all(|pod| !has_finalizer(&pod.object)), "every pod may go");
    assert_eq!(world.told, ["Completed"]);
}

#[test]
fn failed_pods_are_replaced_after_a_while_and_not_for_ever() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "backoffLimit": 1}));
    world.settle();
    world.end(0, "Failed");
    world.settle();
    assert_eq!((world.made, world.status().failed), (1, Some(1)), "not yet");
    let waits = plan(&world.job, &world.pods, world.now).due.unwrap();
    assert_eq!(waits.as_second(), NOW + 10);
    world.now += Duration::from_secs(10);
    world.settle();
    assert_eq!(world.made, 2);
    world.end(1, "Failed");
    world.settle();
    assert!(holds(world.status(), "Failed"));
    let failed = world.status().conditions.iter().flatten().find(|c| c.type_ == "Failed").unwrap();
    assert_eq!(failed.reason.as_deref(), Some("BackoffLimitExceeded"));
    assert_eq!(failed.message.as_deref(), Some("Job has reached the specified backoff limit"));
    assert_eq!(world.told, ["BackoffLimitExceeded"]);
}

#[test]
fn a_pod_is_counted_once_whatever_happens_in_between() {
    let mut world = world(json!({"completions": 2, "parallelism": 1}));
    world.settle();
    world.end(0, "Succeeded");
    let first = plan(&world.job, &world.pods, world.now);
    assert!(first.release.is_empty(), "its finalizer stays until the status names it");
    assert_eq!(first.status.succeeded, Some(1));
    assert_eq!(
        first.status.uncounted_terminated_pods.as_ref().unwrap().succeeded,
        Some(vec!["uid-p1".to_owned()])
    );
    // The same again, as if the status had not been written; and then with it written.
    assert_eq!(plan(&world.job, &world.pods, world.now), first);
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
    world.end(0, "Succeeded");
    world.end(2, "Succeeded");
    world.end(1, "Failed");
    world.settle();
    assert_eq!(world.status().completed_indexes.as_deref(), Some("0,2"));
    world.now += Duration::from_secs(10);
    world.settle();
    assert_eq!(index_of(world.pods.last().unwrap()), Some(1));
    world.end(3, "Succeeded");
    world.settle();
    assert_eq!(world.status().completed_indexes.as_deref(), Some("0-2"));
    assert!(holds(world.status(), "Complete"));
}

#[test]
fn a_suspended_job_has_no_pods() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "suspend": true}));
    world.settle();
    assert_eq!((world.made, world.status().start_time.is_none()), (0, true));
    assert!(holds(world.status(), "Suspended"));
    let mut job = (*world.job).clone();
    job.spec.as_mut().unwrap().suspend = Some(false);
    world.job = Typed::test(&job);
    world.settle();
    assert_eq!(world.made, 1);
    assert_eq!(world.told, ["Suspended", "Resumed"]);
}

#[test]
fn a_job_ends_at_its_deadline() {
    let mut world = world(json!({"completions": 1, "parallelism": 1, "activeDeadlineSeconds": 60}));
    world.settle();
    assert_eq!(plan(&world.job, &world.pods, world.now).due.unwrap().as_second(), NOW + 60);
    world.now += Duration::from_secs(60);
    world.settle();
    let failed = world.status().conditions.iter().flatten().find(|c| c.type_ == "Failed");
    assert!(failed.is_none(), "its pod must stop first");
    assert!(world.pods[0].object.deleted().is_some());
    world.end(0, "Failed");
    world.pods.remove(0);
    world.settle();
    let failed = world.status().conditions.iter().flatten().find(|c| c.type_ == "Failed").unwrap();
    assert_eq!(failed.reason.as_deref(), Some("DeadlineExceeded"));
}

#[test]
fn parallelism_zero_takes_pods_away() {
    let mut world = world(json!({"completions": 5, "parallelism": 3}));
    world.settle();
    assert_eq!(world.active().len(), 3);
    let mut job = (*world.job).clone();
    job.spec.as_mut().unwrap().parallelism = Some(0);
    world.job = Typed::test(&job);
    world.step();
    assert_eq!(world.active().len(), 0);
}

#[test]
fn indexes_are_written_as_ranges() {
    for text in ["", "0", "1,2", "1-3", "0,2-4,7"] {
        assert_eq!(format_indexes(&parse_indexes(Some(text))), text);
    }
}
