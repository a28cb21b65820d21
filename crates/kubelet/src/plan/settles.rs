//! The plan as a property: whatever a pod looks like and whatever befalls it, nothing that must not happen is
//! planned, and after a while nothing is left to be done.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::tests::{at, container, sandbox};
use super::*;
use crate::observed::{BACKOFF_ANNOTATION, Probes, ROUND_ANNOTATION, Retry};
use crate::pod::tests::{merge, pod};

/// A pod, what the node has of it, and how its containers behave.
struct World {
    rng: StdRng,
    patch: Value,
    o: Observed,
    now: Timestamp,
    /// Jobs under way, and what will come of them.
    jobs: Vec<(Job, Action)>,
    /// Only then do containers end by themselves, jobs fail and agents die.
    trouble: bool,
    trail: Vec<String>,
    /// Names of init containers that have succeeded in the current sandbox and round.
    passed: Vec<String>,
    round: u32,
}

fn shape(rng: &mut StdRng) -> Value {
    let init = |rng: &mut StdRng, n: usize| {
        let mut one = json!({"name": format!("i{n}"), "image": "i"});
        if rng.random_bool(0.4) {
            one["restartPolicy"] = json!("Always");
            if rng.random_bool(0.5) {
                one["startupProbe"] = json!({"exec": {}});
            }
        }
        one
    };
    let main = |rng: &mut StdRng, n: usize| {
        let mut one = json!({"name": format!("c{n}"), "image": "i"});
        if rng.random_bool(0.3) {
            one["livenessProbe"] = json!({"terminationGracePeriodSeconds": 3});
        }
        if rng.random_bool(0.2) {
            one["restartPolicy"] = json!(["Always", "OnFailure", "Never"][rng.random_range(0..3)]);
            let action = ["Restart", "RestartAllContainers"][rng.random_range(0..2)];
            one["restartPolicyRules"] =
                json!([{"action": action, "exitCodes": {"operator": "In", "values": [42]}}]);
        }
        one
    };
    let inits: Vec<Value> = (0..rng.random_range(0..4)).map(|n| init(rng, n)).collect();
    let mains: Vec<Value> = (0..rng.random_range(1..4)).map(|n| main(rng, n)).collect();
    let policy = ["Always", "OnFailure", "Never"][rng.random_range(0..3)];
    json!({"spec": {"restartPolicy": policy, "initContainers": inits, "containers": mains}})
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let patch = shape(&mut rng);
        World {
            rng,
            patch,
            o: Observed::default(),
            now: at(0),
            jobs: vec![],
            trouble: true,
            trail: vec![],
            passed: vec![],
            round: 0,
        }
    }

    fn pod(&self) -> Pod {
        pod(self.patch.clone())
    }

    fn begin(&mut self, job: Job, action: Action) {
        assert!(self.o.running_jobs.insert(job.clone()), "{job:?} runs twice");
        self.jobs.push((job, action));
    }

    /// What must hold for every action, whatever came before.
    fn check(&self, pod: &Pod, action: &Action) {
        let is_running = |name: &str| {
            self.o.all_containers().any(|c| c.name == name && c.state == ContainerState::Running)
        };
        match action {
            Action::Start { name, attempt, round, .. } => {
                let behind = self.o.all_containers().filter(|c| rounds::made_in(c) < *round);
                for old in behind {
                    assert_ne!(old.state, ContainerState::Running, "{name} is started beside {}", old.id);
                }
                assert!(self.o.ending.is_none(), "{name} is started in a pod that ends");
                assert!(!is_running(name), "{name} is started though it runs");
                let ready = self.o.ready_sandbox().expect("a container needs a sandbox");
                assert!(self.o.volumes, "a container needs its volumes");
                let before = self.o.latest(name).map(|c| c.attempt);
                assert!(before.is_none_or(|before| *attempt == before + 1), "{name} skips a count");
                let (class, _) = pod.container(name).expect("it is there");
                if class == Class::Main && !main_has_run(pod, &self.o) {
                    for (class, init) in pod.containers() {
                        let latest = ready.containers.iter().filter(|c| c.name == init.name);
                        let latest = latest.max_by_key(|c| c.attempt);
                        let state = latest.map(|c| (c.state, c.exit_code));
                        match class {
                            Class::Init => assert!(
                                self.passed.contains(&init.name),
                                "{name} is started before {} has succeeded: {state:?}",
                                init.name
                            ),
                            Class::Sidecar => {
                                assert!(is_running(&init.name), "{name} is started without {}", init.name);
                            }
                            _ => {}
                        }
                    }
                }
            }
            Action::Kill { id, .. } => {
                let victim = self.o.by_id(id).expect("it is there");
                assert_eq!(victim.state, ContainerState::Running, "{id} does not run");
            }
            Action::CreateSandbox { .. } => {
                assert!(self.o.ready_sandbox().is_none() && self.o.ending.is_none());
            }
            Action::RemoveContainer(id) => {
                let removed = self.o.by_id(id).expect("it is there");
                assert_ne!(removed.state, ContainerState::Running, "{id} is removed while it runs");
            }
            Action::Teardown { .. } | Action::Delete | Action::Exit => {
                assert!(self.o.all_containers().all(|c| c.state != ContainerState::Running));
            }
            _ => {}
        }
    }

    fn act(&mut self, pod: &Pod, action: Action) {
        self.check(pod, &action);
        self.trail.push(format!("{:?} {action:?}", self.now));
        let job = match &action {
            Action::End(ending) => {
                self.o.ending = Some(ending.clone());
                return;
            }
            Action::AnnounceBackoff { key, .. } => {
                self.o.announced.insert(key.clone());
                return;
            }
            Action::Exit => return,
            Action::MountVolumes => Job::Volumes,
            Action::CreateSandbox { .. } => Job::Sandbox,
            Action::Start { name, .. } => Job::Start(name.clone()),
            Action::Kill { id, deadline, restart, .. } => {
                let count = self.o.kills.get(id).map_or(0, |(_, count)| count + 1);
                self.o.kills.insert(id.clone(), (*deadline, count));
                if *restart {
                    self.o.restarting.insert(id.clone(), false);
                }
                Job::Kill(id.clone(), count)
            }
            Action::Resize { .. } => Job::Resize,
            Action::RemoveContainer(id) => Job::RemoveContainer(id.clone()),
            Action::RemoveSandbox(id) => Job::RemoveSandbox(id.clone()),
            Action::Teardown { .. } => Job::Teardown,
            Action::Delete => Job::Delete,
        };
        self.begin(job, action);
    }

    fn exit(&mut self, id: &str, code: i32) {
        self.trail.push(format!("{:?} {id} ends with {code}", self.now));
        let now = self.now;
        let mut all = self.o.sandboxes.iter_mut().flat_map(|s| &mut s.containers);
        let Some(c) = all.find(|c| c.id == id && c.state == ContainerState::Running) else { return };
        (c.state, c.exit_code, c.finished_at) = (ContainerState::Exited, Some(code), Some(now));
        let (name, made_in) = (c.name.clone(), rounds::made_in(c));
        if code == 0 && made_in == self.round {
            self.passed.push(name);
        }
        self.o.probes.remove(id);
        self.o.kills.remove(id);
        let round = Round::of(&self.pod(), &self.o).number;
        if round > self.round {
            self.round = round;
            self.passed.clear();
        }
    }

    /// One job ends.
    fn finish(&mut self, at: usize) {
        let (job, action) = self.jobs.remove(at);
        self.o.running_jobs.remove(&job);
        if self.trouble && self.rng.random_bool(0.15) {
            self.trail.push(format!("{:?} {job:?} fails", self.now));
            let retry = Retry { at: self.now + SignedDuration::from_secs(1), failures: 1, on_change: false };
            self.o.retries.insert(job, retry);
            return;
        }
        self.o.retries.remove(&job);
        match action {
            Action::MountVolumes => self.o.volumes = true,
            Action::CreateSandbox { attempt } => {
                let mut made = sandbox(attempt, SandboxState::Ready);
                made.spec.id = format!("s-{attempt}-{}", self.o.sandboxes.len());
                made.created_at = self.now;
                self.o.sandboxes.push(made);
                self.passed.clear();
            }
            Action::Start { name, attempt, backoff, round } => self.started(&name, attempt, backoff, round),
            Action::Kill { id, .. } => {
                let code = if self.rng.random_bool(0.5) { 0 } else { 143 };
                self.exit(&id, code);
            }
            Action::Resize { containers, pod } => {
                for (id, limits) in containers {
                    let mut all = self.o.sandboxes.iter_mut().flat_map(|s| &mut s.containers);
                    if let Some(c) = all.find(|c| c.id == id) {
                        c.resources = limits;
                    }
                }
                if let (Some(limits), Some(sandbox)) = (pod, self.o.sandboxes.last_mut()) {
                    sandbox.spec.resources = limits;
                }
            }
            Action::RemoveContainer(id) => self.o.forget_container(&id),
            Action::RemoveSandbox(id) => self.o.sandboxes.retain(|sandbox| sandbox.spec.id != id),
            Action::Teardown { remove } => {
                self.o.cleanup = if remove { Cleanup::Removed } else { Cleanup::Stopped };
                self.o.volumes = false;
                for sandbox in &mut self.o.sandboxes {
                    sandbox.state = SandboxState::NotReady;
                }
            }
            Action::Delete => self.o.gone = true,
            Action::End(_) | Action::AnnounceBackoff { .. } | Action::Exit => {
                unreachable!("these are no jobs")
            }
        }
    }

    fn started(&mut self, name: &str, attempt: u32, backoff: SignedDuration, round: u32) {
        let pod = self.pod();
        let (class, wanted) = pod.container(name).expect("only what is there is started");
        let mut status = container(name, attempt, ContainerState::Running);
        (status.created_at, status.started_at) = (self.now, Some(self.now));
        status.annotations.insert(BACKOFF_ANNOTATION.into(), backoff.as_millis().to_string());
        status.annotations.insert(ROUND_ANNOTATION.into(), round.to_string());
        status.annotations.insert(ASKED_IMAGE_ANNOTATION.into(), wanted.image.clone().unwrap_or_default());
        status.resources = resources::of_container(&pod, wanted);
        // A sandbox that went meanwhile takes it along.
        let Some(sandbox) = self.o.sandboxes.last_mut() else { return };
        status.sandbox_id.clone_from(&sandbox.spec.id);
        let id = status.id.clone();
        let lost = sandbox.state != SandboxState::Ready;
        sandbox.containers.push(status);
        self.o.waiting.remove(name);
        let startup = wanted.startup_probe.is_some().then_some(ProbeState::Success);
        self.o.probes.insert(id.clone(), Probes { startup, ..Probes::default() });
        if lost {
            self.exit(&id, 137);
        } else if class == Class::Init {
            // Its work is done at once, most times well.
            let code = i32::from(self.trouble && self.rng.random_bool(0.2));
            self.exit(&id, code);
        }
    }

    /// Something happens that nobody planned.
    fn disturb(&mut self) {
        let running: Vec<String> = self
            .o
            .all_containers()
            .filter(|c| c.state == ContainerState::Running)
            .map(|c| c.id.clone())
            .collect();
        let one = match running.is_empty() {
            true => None,
            false => Some(running[self.rng.random_range(0..running.len())].clone()),
        };
        match (self.rng.random_range(0..60), one) {
            (0..=11, Some(id)) => {
                let code = [0, 1, 42, 137][self.rng.random_range(0..4)];
                self.exit(&id, code);
            }
            (12..=15, Some(id)) => {
                self.trail.push(format!("{:?} {id} is not alive", self.now));
                if let Some(probes) = self.o.probes.get_mut(&id) {
                    probes.liveness = Some(ProbeState::Failure);
                }
            }
            (16..=19, _) => {
                self.trail.push(format!("{:?} the sandbox is gone", self.now));
                if let Some(sandbox) = self.o.sandboxes.last_mut() {
                    sandbox.state = SandboxState::NotReady;
                }
                for id in running {
                    self.exit(&id, 137);
                }
            }
            (20..=23, _) => self.another_agent(),
            (24..=27, _) => {
                let image = ["i", "j"][self.rng.random_range(0..2)];
                self.patch["spec"]["containers"][0]["image"] = json!(image);
            }
            (28..=31, _) => {
                let memory = ["9Mi", "10Mi"][self.rng.random_range(0..2)];
                self.patch["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": memory}});
            }
            (32, _) => self.delete(),
            (33, _) => self.o.gone = true,
            (34, _) => {
                self.trail.push(format!("{:?} evicted", self.now));
                self.o.evicted = Some(crate::eviction::Eviction::preemption(&self.pod(), "cpu"));
            }
            _ => {}
        }
    }

    fn delete(&mut self) {
        self.trail.push(format!("{:?} deleted", self.now));
        let deleted = json!({"deletionTimestamp": "2027-01-15T08:00:00Z", "deletionGracePeriodSeconds": 5});
        merge(&mut self.patch, json!({"metadata": deleted}));
    }

    /// The agent dies, and what it knew by itself with it; another one looks at what runs.
    fn another_agent(&mut self) {
        self.trail.push(format!("{:?} another agent", self.now));
        self.jobs.clear();
        let old = std::mem::take(&mut self.o);
        self.o.gone = old.gone;
        self.o.sandboxes = old.sandboxes;
        let pod = self.pod();
        let running = self.o.all_containers().filter(|c| c.state == ContainerState::Running);
        for c in running.cloned().collect::<Vec<_>>() {
            let startup = pod.container(&c.name).is_some_and(|(_, c)| c.startup_probe.is_some());
            let startup = startup.then_some(ProbeState::Success);
            self.o.probes.insert(c.id.clone(), Probes { startup, ..Probes::default() });
        }
    }

    /// Plans, acts and lets jobs end until nothing happens any more; true when the pod is done with.
    fn settle(&mut self, steps: usize) -> bool {
        for _ in 0..steps {
            if self.trouble && self.rng.random_bool(0.2) {
                self.disturb();
            }
            let pod = self.pod();
            let plan = plan(&pod, &self.o, self.now);
            let is_idle = plan.actions.is_empty();
            for action in plan.actions {
                let is_end = action == Action::Exit;
                self.act(&pod, action);
                if is_end {
                    return true;
                }
            }
            if !self.jobs.is_empty() && (is_idle || self.rng.random_bool(0.7)) {
                let one = self.rng.random_range(0..self.jobs.len());
                self.finish(one);
            } else if is_idle && self.jobs.is_empty() {
                match plan.wake {
                    Some(wake) => {
                        assert!(wake > self.now, "it wakes to do nothing");
                        self.now = wake;
                    }
                    None if !self.trouble => return false,
                    None => {}
                }
            }
            self.now += SignedDuration::from_millis(self.rng.random_range(0..800));
        }
        assert!(self.trouble, "it does not come to rest");
        false
    }

    /// What a pod that nobody disturbs must look like.
    fn check_rest(&self) {
        let pod = self.pod();
        if self.o.ending.is_some() {
            assert!(self.o.all_containers().all(|c| c.state != ContainerState::Running), "it has ended");
            assert!(self.o.cleanup >= Cleanup::Stopped);
            return;
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for c in self.o.all_containers() {
            *counts.entry(&c.name).or_default() += 1;
        }
        assert!(counts.values().all(|count| *count <= 2), "old containers are removed: {counts:?}");
        for (class, spec) in pod.containers().filter(|(class, _)| *class != Class::Init) {
            let latest = self.o.latest(&spec.name).expect("everything was started");
            let runs = latest.state == ContainerState::Running;
            let stays_down = class == Class::Main
                && latest.exit_code.is_some_and(|code| !restarts(&pod, class, spec, code));
            assert!(runs || stays_down, "{} neither runs nor has ended for good", spec.name);
            if runs {
                assert_eq!(latest.annotations.get(ASKED_IMAGE_ANNOTATION), spec.image.as_ref());
                assert!(resources::same(&resources::of_container(&pod, spec), &latest.resources));
            }
        }
    }
}

/// Trouble for a while, then rest, then deletion, if that did not come before: nothing is left.
fn live(seed: u64) {
    let mut world = World::new(seed);
    let steps = world.rng.random_range(0..60);
    let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut is_gone = world.settle(steps);
        world.trouble = false;
        is_gone = is_gone || world.settle(2000);
        if !is_gone {
            world.check_rest();
            world.delete();
            world.trouble = true;
            is_gone = world.settle(10);
            world.trouble = false;
            assert!(is_gone || world.settle(2000), "it is gone in the end");
        }
        assert_eq!(world.o.cleanup, Cleanup::Removed);
    }));
    if let Err(panic) = lived {
        let trail = world.trail.iter().rev().take(60).rev().cloned().collect::<Vec<_>>().join("\n");
        eprintln!("seed {seed}\n{}\n{trail}", world.patch);
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn every_plan_comes_to_rest_whatever_befalls_the_pod() {
    for seed in 0..150 {
        live(seed);
    }
}
