use super::*;
use crate::pods::tests::now;
use k8s_openapi::api::apps::v1::{ReplicaSetSpec, ReplicaSetStatus};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::json;

/// A Deployment with its ReplicaSets, and a way to let a plan come true: a model of the world in which
/// ReplicaSets and kubelets do what they should, one small step at a time.
struct World {
    deployment: Typed<Deployment>,
    sets: Vec<Typed<ReplicaSet>>,
    now: Timestamp,
    /// Images whose pods never work.
    broken: Vec<String>,
    made: i64,
    log: Vec<String>,
    /// Decides which ReplicaSet is quicker.
    rng: StdRng,
}

fn deployment(image: &str, replicas: i32, change: impl FnOnce(&mut serde_json::Value)) -> Typed<Deployment> {
    let mut value = json!({
        "metadata": { "name": "web", "namespace": "ns", "uid": "d", "generation": 1 },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": {"app": "web"} },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"} },
            "revisionHistoryLimit": 10,
            "progressDeadlineSeconds": 600,
            "template": {
                "metadata": { "labels": {"app": "web"} },
                "spec": { "containers": [{"name": "c", "image": image}] },
            },
        },
    });
    change(&mut value);
    let kind = minke_api::Kind::of::<Deployment>();
    Typed::new(minke_api::Object::from_value(kind, &value).unwrap().into()).unwrap()
}

impl World {
    fn new(deployment: Typed<Deployment>) -> World {
        World {
            deployment,
            sets: Vec::new(),
            now: now(),
            broken: Vec::new(),
            made: 0,
            log: Vec::new(),
            rng: StdRng::seed_from_u64(1),
        }
    }

    /// A user's change: a new generation.
    fn change(&mut self, change: impl FnOnce(&mut Deployment)) {
        let mut new = (*self.deployment).clone();
        new.metadata.generation = Some(new.metadata.generation.unwrap() + 1);
        change(&mut new);
        self.deployment = Typed::test(&new);
    }

    fn set_image(&mut self, image: &str) {
        self.change(|d| d.spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned()));
    }

    fn edit(&mut self, at: usize, change: impl FnOnce(&mut ReplicaSet)) {
        let mut set = (*self.sets[at]).clone();
        change(&mut set);
        self.sets[at] = Typed::test(&set);
    }

    fn image(set: &ReplicaSet) -> &str {
        let spec = set.spec.template.as_ref().unwrap().spec.as_ref().unwrap();
        spec.containers[0].image.as_deref().unwrap()
    }

    fn plan(&self) -> Plan {
        let pods_remain =
            |old: &[&ReplicaSet]| old.iter().any(|set| set.status.as_ref().unwrap().replicas > 0);
        plan(&self.deployment, &self.sets, pods_remain, self.now)
    }

    /// Writes a plan, as the executor does. Says whether there was anything to write.
    fn write(&mut self, plan: Plan) -> bool {
        let changed = !plan.steps.is_empty()
            || plan.revision.is_some()
            || self.deployment.status.as_ref() != Some(&plan.status);
        let (desired, max) = limits(&self.deployment);
        let mut gone = Vec::new();
        for step in plan.steps {
            self.log.push(format!("{step:?}"));
            match step {
                Step::Create { replicas, annotations } => {
                    self.made += 1;
                    let spec = ReplicaSetSpec {
                        replicas: Some(replicas),
                        min_ready_seconds: self.deployment.spec.min_ready_seconds,
                        template: Some(self.deployment.spec.template.clone()),
                        ..ReplicaSetSpec::default()
                    };
                    let mut set = ReplicaSet { spec, ..ReplicaSet::default() };
                    set.status =
                        Some(ReplicaSetStatus { terminating_replicas: Some(0), ..Default::default() });
                    set.metadata.name = Some(format!("web-{}", self.made));
                    set.metadata.creation_timestamp =
                        Some(seconds(self.now + Duration::from_secs(self.made as u64)));
                    set.metadata.annotations = Some(annotations);
                    self.sets.push(Typed::test(&set));
                }
                Step::Refresh { set, annotations, min_ready_seconds } => self.edit(set, |s| {
                    s.metadata.annotations = Some(annotations);
                    s.spec.min_ready_seconds = Some(min_ready_seconds);
                }),
                Step::Resize { set, to, .. } => self.edit(set, |s| {
                    s.spec.replicas = Some(to);
                    let annotations = s.metadata.annotations.get_or_insert_default();
                    annotations.insert(DESIRED.to_owned(), desired.to_string());
                    annotations.insert(MAX.to_owned(), max.to_string());
                }),
                Step::Delete { set } => gone.push(set),
            }
        }
        let mut at = 0;
        self.sets.retain(|_| {
            at += 1;
            !gone.contains(&(at - 1))
        });
        let mut new = (*self.deployment).clone();
        if let Some(revision) = plan.revision {
            new.metadata.annotations.get_or_insert_default().insert(REVISION.to_owned(), revision);
        }
        new.status = Some(plan.status);
        self.deployment = Typed::test(&new);
        changed
    }

    /// One ReplicaSet gets one step nearer to what it should be. Says whether there was anything to do.
    fn step(&mut self) -> bool {
        // None of them can be relied on to be quicker than another.
        let mut order: Vec<usize> = (0..self.sets.len()).collect();
        order.shuffle(&mut self.rng);
        for at in order {
            let broken = self.broken.iter().any(|image| image == World::image(&self.sets[at]));
            let mut status = self.sets[at].status.clone().unwrap();
            let want = self.sets[at].spec.replicas.unwrap();
            let available = status.available_replicas.unwrap_or(0);
            if status.replicas != want {
                // Pods that do not work go first.
                let surplus_broken = status.replicas - available;
                status.replicas += if status.replicas < want { 1 } else { -1 };
                if status.replicas < available && surplus_broken == 0 {
                    status.available_replicas = Some(status.replicas);
                }
            } else if available < want && !broken {
                status.available_replicas = Some(available + 1);
            } else {
                continue;
            }
            status.ready_replicas = status.available_replicas;
            self.edit(at, |set| set.status = Some(status));
            return true;
        }
        false
    }

    fn available(&self) -> i32 {
        self.sets.iter().map(|set| set.status.as_ref().unwrap().available_replicas.unwrap_or(0)).sum()
    }

    /// Lets everything happen until nothing does, looking at `holds` after each write.
    #[track_caller]
    fn settle(&mut self, holds: impl Fn(&World)) {
        for _ in 0..10_000 {
            let plan = self.plan();
            let wrote = self.write(plan);
            holds(self);
            if !wrote && !self.step() {
                return;
            }
            holds(self);
        }
        panic!("does not settle: {:#?}", &self.log[self.log.len() - 20..]);
    }

    fn condition(&self, type_: &str) -> String {
        let conditions = self.deployment.status.as_ref().unwrap().conditions.as_ref().unwrap();
        let Some(condition) = condition(conditions, type_) else { return String::new() };
        let text = |field: &Option<String>| field.clone().unwrap();
        format!("{} {}: {}", text(&condition.status), text(&condition.reason), text(&condition.message))
    }

    /// Image and size of every ReplicaSet that has pods, by revision.
    fn sizes(&self) -> Vec<(String, String, i32)> {
        let mut sizes: Vec<_> = self
            .sets
            .iter()
            .filter(|set| set.spec.replicas != Some(0))
            .map(|set| {
                let revision = set.metadata.annotations.as_ref().unwrap()[REVISION].clone();
                (revision, World::image(set).to_owned(), set.spec.replicas.unwrap())
            })
            .collect();
        sizes.sort();
        sizes
    }
}

fn one(revision: &str, image: &str, replicas: i32) -> Vec<(String, String, i32)> {
    vec![(revision.to_owned(), image.to_owned(), replicas)]
}

#[test]
fn a_new_deployment_gets_its_replica_set() {
    let mut world = World::new(deployment("v1", 3, |_| {}));
    let first = world.plan();
    let [Step::Create { replicas: 3, annotations }] = &first.steps[..] else { panic!("{first:?}") };
    assert_eq!(annotations[DESIRED], "3");
    assert_eq!(annotations[MAX], "4");
    assert_eq!(annotations[REVISION], "1");
    assert_eq!(first.revision.as_deref(), Some("1"));
    world.settle(|_| {});
    assert_eq!(world.sizes(), one("1", "v1", 3));
    assert_eq!(
        world.condition("Progressing"),
        "True NewReplicaSetAvailable: ReplicaSet \"web-1\" has successfully progressed."
    );
    assert_eq!(
        world.condition("Available"),
        "True MinimumReplicasAvailable: Deployment has minimum availability."
    );
    let status = world.deployment.status.clone().unwrap();
    assert_eq!(
        (status.replicas, status.updated_replicas, status.available_replicas),
        (Some(3), Some(3), Some(3))
    );
    assert_eq!((status.unavailable_replicas, status.observed_generation), (None, Some(1)));
}

/// Rolls from v1 to v2 and checks the limits after every single write and pod.
#[track_caller]
fn check_rollout(
    replicas: i32,
    surge: serde_json::Value,
    unavailable: serde_json::Value,
    max: i32,
    min: i32,
) {
    let strategy =
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}});
    let mut world = World::new(deployment("v1", replicas, |d| d["spec"]["strategy"] = strategy));
    world.settle(|_| {});
    world.set_image("v2");
    world.settle(|world| {
        let total: i32 = world.sets.iter().map(|set| set.spec.replicas.unwrap()).sum();
        assert!(total <= max, "{total} pods of at most {max}");
        assert!(world.available() >= min, "{} available of at least {min}", world.available());
    });
    assert_eq!(world.sizes(), if replicas > 0 { one("2", "v2", replicas) } else { Vec::new() });
}

#[test]
fn a_rollout_keeps_within_surge_and_availability() {
    check_rollout(4, json!("25%"), json!("25%"), 5, 3);
    check_rollout(3, json!("25%"), json!("25%"), 4, 3);
    check_rollout(10, json!(3), json!(2), 13, 8);
    check_rollout(1, json!(1), json!(0), 2, 1);
    check_rollout(5, json!(0), json!(1), 5, 4);
    check_rollout(2, json!(0), json!(0), 2, 1);
    check_rollout(7, json!("100%"), json!("100%"), 14, 0);
    check_rollout(0, json!("25%"), json!("25%"), 0, 0);
}

#[test]
fn any_rollout_settles_within_its_limits() {
    for replicas in 1..12 {
        for surge in 0..4 {
            for unavailable in 0..4 {
                let least = if surge + unavailable == 0 { replicas - 1 } else { replicas - unavailable };
                check_rollout(replicas, json!(surge), json!(unavailable), replicas + surge, least);
            }
        }
    }
}

#[test]
fn a_bad_version_stops_the_rollout_and_can_be_undone() {
    let mut world = World::new(deployment("v1", 4, |_| {}));
    world.settle(|_| {});
    world.broken.push("bad".to_owned());
    world.set_image("bad");
    world.settle(|world| assert!(world.available() >= 3));
    assert_eq!(world.available(), 3, "as many as may be unavailable are");
    let waiting = world.plan();
    assert_eq!(waiting.look_again, Some(Duration::from_secs(601)));
    world.now += Duration::from_secs(601);
    world.settle(|_| {});
    assert_eq!(
        world.condition("Progressing"),
        "False ProgressDeadlineExceeded: ReplicaSet \"web-2\" has timed out progressing."
    );
    world.set_image("v1");
    world.settle(|world| assert!(world.available() >= 3));
    assert_eq!(world.sizes(), one("3", "v1", 4));
    assert_eq!(world.sets.len(), 2, "the old ReplicaSet was taken up again");
    let history = world.sets[0].metadata.annotations.as_ref().unwrap()[HISTORY].clone();
    assert_eq!(history, "1");
    assert!(world.condition("Progressing").starts_with("True NewReplicaSetAvailable"));
}

#[test]
fn recreate_waits_until_all_old_pods_are_gone() {
    let mut world = World::new(deployment("v1", 3, |d| d["spec"]["strategy"] = json!({"type": "Recreate"})));
    world.settle(|_| {});
    world.set_image("v2");
    world.settle(|world| {
        let running = world.sets.iter().filter(|set| set.status.as_ref().unwrap().replicas > 0).count();
        assert!(running <= 1, "two versions at once");
    });
    assert_eq!(world.sizes(), one("2", "v2", 3));
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let mut world = World::new(deployment("v1", 4, |_| {}));
    world.settle(|_| {});
    world.change(|d| d.spec.paused = Some(true));
    world.set_image("v2");
    world.settle(|_| {});
    assert_eq!(world.condition("Progressing"), "Unknown DeploymentPaused: Deployment is paused");
    world.change(|d| d.spec.replicas = Some(6));
    world.settle(|_| {});
    assert_eq!(world.sizes(), one("1", "v1", 6));
    world.change(|d| d.spec.paused = Some(false));
    world.settle(|_| {});
    assert_eq!(world.sizes(), one("2", "v2", 6));
}

#[test]
fn a_deployment_scaled_in_mid_rollout_grows_in_proportion() {
    let mut world = World::new(deployment("v1", 10, |d| {
        d["spec"]["strategy"]["rollingUpdate"] = json!({"maxSurge": 3, "maxUnavailable": 2})
    }));
    world.settle(|_| {});
    world.broken.push("bad".to_owned());
    world.set_image("bad");
    world.settle(|_| {});
    assert_eq!(world.sizes(), [("1".to_owned(), "v1".to_owned(), 8), ("2".to_owned(), "bad".to_owned(), 5)]);
    world.change(|d| d.spec.replicas = Some(15));
    let plan = world.plan();
    let resized: Vec<_> = plan.steps.iter().map(|step| format!("{step:?}")).collect();
    assert_eq!(
        resized,
        ["Resize { set: 0, from: 8, to: 11 }", "Resize { set: 1, from: 5, to: 7 }"],
        "18 pods in all, as 15 and 3 surge allow"
    );
    world.settle(|_| {});
    world.change(|d| d.spec.replicas = Some(0));
    world.settle(|_| {});
    assert_eq!(world.sizes(), []);
}

/// Scales in the middle of a rollout. `sizes` are those of the ReplicaSets, the oldest first and the new one last; each was sized
/// for `from` replicas and `surge`.
#[track_caller]
fn check_scale(from: i32, to: i32, surge: i32, sizes: &[i32], want: &[i32]) {
    let mut world = World::new(deployment("v0", to, |d| {
        d["spec"]["strategy"]["rollingUpdate"] = json!({"maxSurge": surge, "maxUnavailable": 0})
    }));
    for (version, size) in sizes.iter().enumerate() {
        world.set_image(&format!("v{version}"));
        let Step::Create { mut annotations, .. } =
            World::new(world.deployment.clone()).plan().steps.remove(0)
        else {
            panic!("the first step makes the ReplicaSet")
        };
        annotations.insert(REVISION.to_owned(), (version + 1).to_string());
        annotations.insert(DESIRED.to_owned(), from.to_string());
        annotations.insert(MAX.to_owned(), (from + surge).to_string());
        let mut plan = Plan { steps: vec![Step::Create { replicas: *size, annotations }], ..Plan::default() };
        plan.status.replicas = Some(from);
        world.write(plan);
    }
    let plan = world.plan();
    world.write(plan);
    let have: Vec<i32> = world.sets.iter().map(|set| set.spec.replicas.unwrap()).collect();
    assert_eq!(have, want, "{from} to {to}, surge {surge}, {sizes:?}");
    assert_eq!(limits(&world.deployment), (to, to + surge));
}

#[test]
fn scaling_keeps_the_proportions_of_a_rollout() {
    check_scale(10, 12, 0, &[10], &[12]);
    check_scale(10, 5, 0, &[10], &[5]);
    check_scale(5, 10, 0, &[3, 2], &[6, 4]);
    check_scale(5, 3, 0, &[3, 2], &[2, 1]);
    check_scale(9, 4, 0, &[1, 8], &[0, 4]);
    check_scale(7, 10, 0, &[2, 3, 2], &[3, 4, 3]);
    check_scale(13, 8, 0, &[3, 8, 2], &[2, 5, 1]);
    // What rounding leaves goes to the largest; of those that are equal, to the newest in growing, from the oldest in shrinking.
    check_scale(3, 4, 0, &[1, 1, 1], &[1, 1, 2]);
    check_scale(3, 2, 0, &[1, 1, 1], &[0, 1, 1]);
    check_scale(4, 8, 0, &[2, 0, 2], &[4, 0, 4]);
    // Surge has its share.
    check_scale(10, 20, 2, &[6, 6], &[11, 11]);
    check_scale(10, 15, 3, &[8, 5], &[11, 7]);
    check_scale(10, 0, 3, &[8, 5], &[0, 0]);
    check_scale(10, 1, 3, &[8, 5], &[2, 2]);
}

#[test]
fn old_revisions_beyond_the_limit_are_deleted() {
    let mut world = World::new(deployment("v0", 1, |d| d["spec"]["revisionHistoryLimit"] = 2.into()));
    for version in 1..6 {
        world.settle(|_| {});
        world.set_image(&format!("v{version}"));
    }
    world.settle(|_| {});
    let mut images: Vec<&str> = world.sets.iter().map(|set| World::image(set)).collect();
    images.sort_unstable();
    assert_eq!(images, ["v3", "v4", "v5"]);
}

#[test]
fn failures_of_replica_sets_are_shown() {
    let mut world = World::new(deployment("v1", 1, |_| {}));
    world.settle(|_| {});
    let failure =
        json!([{"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "quota"}]);
    let failure = serde_json::from_value(failure).unwrap();
    world.edit(0, |set| set.status.as_mut().unwrap().conditions = Some(failure));
    world.settle(|_| {});
    assert_eq!(world.condition("ReplicaFailure"), "True FailedCreate: quota");
    world.edit(0, |set| set.status.as_mut().unwrap().conditions = None);
    world.settle(|_| {});
    assert_eq!(world.condition("ReplicaFailure"), "");
}

#[test]
fn without_a_deadline_no_progress_is_told() {
    let mut world =
        World::new(deployment("v1", 1, |d| d["spec"]["progressDeadlineSeconds"] = i32::MAX.into()));
    world.settle(|_| {});
    assert_eq!(world.condition("Progressing"), "");
}

#[test]
fn the_hash_depends_on_the_template_and_on_collisions() {
    let first = template_hash(&deployment("v1", 1, |_| {}));
    assert_eq!(first, template_hash(&deployment("v1", 5, |d| d["metadata"]["labels"] = json!({"a": "b"}))));
    assert_ne!(first, template_hash(&deployment("v2", 1, |_| {})));
    assert_ne!(first, template_hash(&deployment("v1", 1, |d| d["status"] = json!({"collisionCount": 1}))));
    assert!(
        first.len() <= 10 && first.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b)),
        "{first}"
    );
    assert_eq!(fnv1a(b"hello"), 0x4f9f2cab);
    assert_eq!(safe_encode(1234567890), "56789bcdf4");
}
