//! Who must go, in the order in which upstream decides it.

use std::sync::Arc;

use minke_api::{Kind, Object};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

use super::random::{node, object};
use crate::decide::{Try, World, decide};
use crate::picture::PodInfo;
use crate::preempt::{Budget, choose};
use crate::profile::Profile;

fn pod(name: &str, priority: i32, cpu: &str, started: u32) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "default", "uid": name, "labels": { "app": name } },
        "spec": { "priority": priority, "containers": [{ "name": "c", "resources": { "requests": { "cpu": cpu } } }] },
        "status": { "startTime": format!("2026-01-02T03:{started:02}:00Z") },
    })
}

/// Nodes of four cores, by what is on them.
fn world(nodes: &[(&str, &[Value])]) -> World {
    let mut world = World::default();
    for (name, pods) in nodes {
        world.picture.put_node(&node(
            &json!({ "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
            "spec": {}, "status": { "allocatable": { "cpu": "4", "memory": "8Gi", "pods": "10" } } }),
        ));
        for pod in *pods {
            world.picture.put_pod(Arc::new(PodInfo::new(&object(pod)).unwrap()), name);
        }
    }
    world
}

fn budget(app: &str, allowed: i32) -> Budget {
    let value = json!({ "metadata": { "name": app, "namespace": "default" },
        "spec": { "selector": { "matchLabels": { "app": app } } }, "status": { "disruptionsAllowed": allowed } });
    let kind = Kind::by_api_version("policy/v1", "PodDisruptionBudget").unwrap();
    Budget::of(&Object::from_value(kind, &value).unwrap()).unwrap()
}

/// The node and its victims, or what is said; the picture must not have changed.
fn outcome(world: &mut World, pod: &Value, budgets: &[(&str, i32)]) -> String {
    let profile = Profile::default();
    let info = Arc::new(PodInfo::new(&object(pod)).unwrap());
    let mut rng = SmallRng::seed_from_u64(1);
    let slots = world.picture.order().to_vec();
    let look = |world: &World| -> Vec<_> {
        let nodes = slots.iter().map(|slot| world.picture.node(*slot));
        nodes.map(|node| (node.used.clone(), node.pods.keys().cloned().collect::<Vec<_>>())).collect()
    };
    let before = look(world);
    let attempt = Try::begin(&info, &profile, world).unwrap();
    let nofit = match decide(&attempt, world, &mut 0, &mut rng) {
        Ok(slot) => return format!("fits on {}", world.picture.node(slot).name),
        Err(nofit) => nofit,
    };
    let budgets = || budgets.iter().map(|(app, allowed)| budget(app, *allowed)).collect();
    let chosen = choose(&attempt, world, &nofit, budgets, &mut rng);
    assert_eq!(look(world), before, "the picture is as it was");
    match chosen {
        Ok(candidate) => {
            let victims: Vec<&str> = candidate.victims.iter().map(|victim| victim.name()).collect();
            format!("{}: {}", world.picture.node(candidate.slot).name, victims.join(" "))
        }
        Err(refusal) => {
            let why = refusal.message.strip_prefix("no new claims to deallocate, preemption: ");
            why.expect("every refusal begins so").to_owned()
        }
    }
}

#[track_caller]
fn check(nodes: &[(&str, &[Value])], budgets: &[(&str, i32)], want: &str) {
    assert_eq!(outcome(&mut world(nodes), &pod("new", 100, "2", 0), budgets), want);
}

#[test]
fn no_more_pods_go_than_must_and_the_least_important_first() {
    let (low, mid, high) = (pod("low", 1, "2", 0), pod("mid", 5, "2", 0), pod("high", 200, "2", 0));
    check(&[("n1", &[low.clone(), mid.clone()])], &[], "n1: low");
    check(&[("n1", &[mid.clone(), high.clone()])], &[], "n1: mid");
    let small = [pod("a", 1, "1", 0), pod("b", 1, "1", 1), pod("c", 1, "1", 2), pod("d", 2, "1", 3)];
    check(&[("n1", &small)], &[], "n1: b c");
    check(
        &[("n1", &[high.clone(), pod("higher", 300, "2", 0)])],
        &[],
        "0/1 nodes are available: 1 No preemption victims found for incoming pod.",
    );
}

#[test]
fn of_several_nodes_the_least_harmful_is_taken() {
    let full = |name: &str, priority: i32, started: u32| pod(name, priority, "4", started);
    check(&[("n1", &[full("a", 5, 0)]), ("n2", &[full("b", 3, 0)])], &[], "n2: b");
    // The same highest priority: the smaller sum, then fewer victims.
    let two = [pod("c", 5, "2", 0), pod("d", 1, "2", 0)];
    let bound = [pod("e", 5, "3", 0), pod("f", 200, "1", 0)];
    check(&[("n1", &bound), ("n2", &two)], &[], "n2: d");
    // All alike: whose victim started last.
    check(
        &[("n1", &[full("a", 5, 10)]), ("n2", &[full("b", 5, 30)]), ("n3", &[full("c", 5, 20)])],
        &[],
        "n2: b",
    );
}

#[test]
fn broken_budgets_weigh_most() {
    let full = |name: &str, priority: i32| pod(name, priority, "4", 0);
    let nodes: [(&str, &[Value]); 2] = [("n1", &[full("guarded", 1)]), ("n2", &[full("free", 50)])];
    check(&nodes, &[("guarded", 0)], "n2: free");
    check(&nodes, &[("guarded", 1)], "n1: guarded");
    // Where there is no other way, the budget is broken.
    check(&nodes[..1], &[("guarded", 0)], "n1: guarded");
    // On one node, the pod whose going breaks a budget is spared first, however unimportant.
    check(&[("n1", &[pod("guarded", 1, "2", 0), pod("free", 50, "2", 0)])], &[("guarded", 0)], "n1: free");
}

#[test]
fn what_does_not_help_is_said_in_upstreams_words() {
    let small = pod("small", 1, "1", 0);
    let mut large = pod("large", 100, "8", 0);
    let mut world = world(&[("n1", std::slice::from_ref(&small)), ("n2", &[])]);
    assert_eq!(
        outcome(&mut world, &large, &[]),
        "0/2 nodes are available: 2 Preemption is not helpful for scheduling."
    );
    large["spec"]["preemptionPolicy"] = "Never".into();
    assert_eq!(outcome(&mut world, &large, &[]), "not eligible due to preemptionPolicy=Never.");
    // What remains after everyone of lower priority has gone.
    let high = pod("high", 200, "3", 0);
    let mut held = super::preemption::world(&[("n1", &[small, high])]);
    assert_eq!(
        outcome(&mut held, &pod("new", 100, "2", 0), &[]),
        "0/1 nodes are available: 1 Insufficient cpu."
    );
}

#[test]
fn room_that_was_made_is_kept_from_lesser_pods() {
    let mut world = world(&[("n1", &[pod("victim", 1, "3", 0)])]);
    let holder = pod("holder", 100, "3", 0);
    world.picture.nominate(Arc::new(PodInfo::new(&object(&holder)).unwrap()), "n1");
    world.picture.remove_pod(&minke_api::Key::new("default", "victim"));
    let lesser = outcome(&mut world, &pod("lesser", 50, "2", 0), &[]);
    assert_eq!(lesser, "0/1 nodes are available: 1 No preemption victims found for incoming pod.");
    assert_eq!(outcome(&mut world, &pod("small", 50, "1", 0), &[]), "fits on n1");
    assert_eq!(outcome(&mut world, &pod("greater", 150, "2", 0), &[]), "fits on n1");
    assert_eq!(outcome(&mut world, &holder, &[]), "fits on n1", "its own room is no hindrance");
}

#[test]
fn a_pod_waits_for_its_victims_before_it_takes_others() {
    let mut leaving = pod("leaving", 1, "4", 0);
    leaving["metadata"]["deletionTimestamp"] = "2026-01-02T04:00:00Z".into();
    leaving["status"]["conditions"] =
        json!([{ "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler" }]);
    let mut world = world(&[("n1", &[leaving]), ("n2", &[pod("other", 1, "4", 0)])]);
    let new = pod("new", 100, "2", 0);
    world.picture.nominate(Arc::new(PodInfo::new(&object(&new)).unwrap()), "n1");
    assert_eq!(
        outcome(&mut world, &new, &[]),
        "not eligible due to a terminating pod on the nominated node."
    );
}
