//! No event that helps a parked pod is missed: after any change, whoever is still parked fits nowhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::random::{Random, node, object, workloads};
use crate::decide::{Try, World, decide};
use crate::hints::{Event, may_help, means_the_same};
use crate::picture::PodInfo;
use crate::plugins::wake;
use crate::profile::Profile;
use crate::queue::{Queue, Why};

struct Sim {
    random: Random,
    world: World,
    queue: Queue,
    profile: Profile,
    /// Placed pods, as they were created.
    placed: BTreeMap<String, (Value, u32)>,
    /// Pods of which there are several.
    sorts: Vec<Value>,
    now: Instant,
    made: usize,
    tries: usize,
}

impl Sim {
    fn wake(&mut self, event: &Event) {
        let Sim { world, queue, profile, now, .. } = self;
        queue.wake(event.bits, *now, |info, rejecting| {
            (may_help(world, profile, info, rejecting, event), means_the_same(rejecting))
        });
    }

    /// One random change, told as the loop tells it.
    fn change(&mut self) {
        match self.random.below(10) {
            0 | 1 => {
                let name = format!("n{}", self.random.below(6));
                let value = self.random.node(&name);
                let (bits, slot) = self.world.picture.put_node(&node(&value));
                self.wake(&Event { bits, slot: Some(slot), ..Event::default() });
            }
            2 => {
                let name = format!("n{}", self.random.below(6));
                self.world.picture.remove_node(&name);
                self.wake(&Event { bits: wake::NODE_REMOVED, ..Event::default() });
            }
            3 => {
                let labels = if self.random.chance(50) {
                    [("team", "x")].into_iter().collect()
                } else {
                    Default::default()
                };
                self.world.picture.set_namespace("one", Some(labels));
                self.wake(&Event { bits: wake::NAMESPACE, ..Event::default() });
            }
            4 | 5 => self.remove_one(),
            6 => self.relabel_one(),
            _ => {
                self.made += 1;
                let name = format!("p{}", self.made);
                let mut value = self.random.pod(&name, 60);
                let sort = self.random.below(2 * self.sorts.len());
                if let Some(sort) = self.sorts.get(sort) {
                    // Alike in what concerns single nodes, and not in the rest.
                    let mut alike = sort.clone();
                    alike["metadata"] = value["metadata"].take();
                    for what in ["podAffinity", "podAntiAffinity"] {
                        alike["spec"]["affinity"][what] = value["spec"]["affinity"][what].take();
                    }
                    alike["spec"]["topologySpreadConstraints"] =
                        value["spec"]["topologySpreadConstraints"].take();
                    value = alike;
                }
                value["metadata"]["name"] = name.as_str().into();
                value["metadata"]["uid"] = name.into();
                self.queue.put(Arc::new(PodInfo::new(&object(&value)).unwrap()));
            }
        }
    }

    fn some_pod(&mut self) -> Option<String> {
        let count = self.placed.len();
        (count > 0).then(|| self.placed.keys().nth(self.random.below(count)).unwrap().clone())
    }

    fn remove_one(&mut self) {
        let Some(name) = self.some_pod() else { return };
        let (value, _) = self.placed.remove(&name).unwrap();
        let (info, slot) = self.world.picture.remove_pod(object(&value).key()).unwrap();
        self.wake(&Event { bits: wake::POD_GONE, slot: Some(slot), gone: Some(&info), ..Event::default() });
    }

    /// Other labels, or on its way out.
    fn relabel_one(&mut self) {
        let Some(name) = self.some_pod() else { return };
        let (mut value, slot) = self.placed[&name].clone();
        if self.random.chance(50) {
            value["metadata"]["labels"] = self.random.pod("x", 0)["metadata"]["labels"].clone();
        } else {
            value["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
        }
        let info = Arc::new(PodInfo::new(&object(&value)).unwrap());
        let node = self.world.picture.node(slot).name.to_string();
        let (gone, _) = self.world.picture.remove_pod(info.key()).unwrap();
        let at = self.world.picture.put_pod(info.clone(), &node);
        self.placed.insert(name, (value, at));
        self.wake(&Event { bits: wake::POD_GONE, slot: Some(at), gone: Some(&gone), ..Event::default() });
        self.wake(&Event { bits: wake::POD_ADDED, slot: Some(at), added: Some(&info), ..Event::default() });
    }

    fn attempt(&mut self, info: &Arc<PodInfo>) -> Result<u32, Why> {
        let why = |nofit: crate::decide::NoFit| Why::new(nofit.rejecting);
        let attempt = Try::begin(info, &self.profile, &mut self.world).map_err(why)?;
        decide(&attempt, &mut self.world, &mut 0, &mut self.random.0).map_err(why)
    }

    /// Tries whoever is ready until nobody is.
    fn settle(&mut self) {
        self.now += Duration::from_secs(11);
        while let Some((info, object)) = self.queue.pop(self.now) {
            self.tries += 1;
            match self.attempt(&info) {
                Ok(slot) => {
                    self.queue.remove(object.key());
                    let node = self.world.picture.node(slot).name.to_string();
                    self.world.picture.put_pod(info.clone(), &node);
                    let value = object.value();
                    self.placed.insert(object.name().to_owned(), (value, slot));
                    self.wake(&Event {
                        bits: wake::POD_ADDED,
                        slot: Some(slot),
                        added: Some(&info),
                        ..Event::default()
                    });
                }
                Err(why) => self.queue.park(object.key(), why, self.now),
            }
            self.now += Duration::from_secs(11);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_is_parked_fits_nowhere() {
    let mut parked = 0;
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut sim = Sim {
            sorts: (0..3).map(|_| random.pod("sort", 60)).collect(),
            random,
            world: World { workloads: workloads(), ..World::default() },
            queue: Queue::default(),
            profile: Profile::default(),
            placed: BTreeMap::new(),
            now: Instant::now(),
            made: 0,
            tries: 0,
        };
        for step in 0..80 {
            sim.change();
            sim.settle();
            // Nobody may be parked only because five minutes have not passed.
            let waiting: Vec<Arc<PodInfo>> = sim.queue.parked().cloned().collect();
            parked += waiting.len();
            for info in waiting {
                let fits = sim.attempt(&info);
                assert!(fits.is_err(), "seed {seed}, step {step}: {} fits but nobody woke it", info.key());
            }
        }
    }
    assert!(parked > 1000, "{parked}: the clusters are full enough to mean something");
}

/// Of two pods that are alike for each node by itself, the event helps the second only.
#[tokio::test(start_paused = true)]
async fn pods_that_are_alike_may_wait_for_different_pods() {
    let pod = |name: &str, app: &str, shuns: &str| {
        let value = json!({
            "metadata": { "name": name, "namespace": "one", "uid": name, "labels": { "app": app } },
            "spec": { "containers": [{ "name": "c" }], "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution":
                [{ "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": shuns } } }] } } },
        });
        Arc::new(PodInfo::new(&object(&value)).unwrap())
    };
    let (mut world, mut queue, profile) = (World::default(), Queue::default(), Profile::default());
    world.picture.put_node(&node(
        &json!({ "metadata": { "name": "n1", "labels": { "kubernetes.io/hostname": "n1" } },
        "spec": {}, "status": { "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "10" } } }),
    ));
    for (name, app) in [("p1", "a"), ("p2", "b")] {
        world.picture.put_pod(pod(name, app, "nobody"), "n1");
    }
    let now = Instant::now();
    let waiting = [pod("w1", "w", "a"), pod("w2", "w", "b")];
    assert_eq!(waiting[0].alike, waiting[1].alike);
    for info in &waiting {
        queue.put(info.clone());
        queue.pop(now);
        queue.park(info.key(), Why::new(1 << crate::plugins::row("InterPodAffinity")), now);
    }
    let (gone, _) = world.picture.remove_pod(&minke_api::Key::new("one", "p2")).unwrap();
    // Nothing is said of the node, which would help both.
    let event = Event { bits: wake::POD_GONE, gone: Some(&gone), ..Event::default() };
    queue.wake(event.bits, now, |info, rejecting| {
        (may_help(&world, &profile, info, rejecting, &event), means_the_same(rejecting))
    });
    let parked: Vec<&str> = queue.parked().map(|info| info.object.name()).collect();
    assert_eq!(parked, ["w1"]);
}
