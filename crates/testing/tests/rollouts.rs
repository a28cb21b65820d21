//! Deployments, ReplicaSets and ReplicationControllers in a simulated cluster that does its worst: controllers that crash after
//! any write, caches that lag, states that are passed over unseen, calls that overtake each other. What must hold, holds
//! after every write.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::Resource;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use minke_api::{ApiType, Kind, Object};
use minke_client::Propagation;
use minke_testing::sim::{Api, Sim};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn pod_template(image: &str) -> Value {
    json!({ "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [{ "name": "c", "image": image }] } })
}

fn deployment(replicas: i32, strategy: &Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": replicas, "strategy": strategy, "revisionHistoryLimit": 2, "progressDeadlineSeconds": 600,
            "selector": { "matchLabels": { "app": "web" } }, "template": pod_template("v1"),
        },
    })
}

fn rolling(surge: impl Into<Value>, unavailable: impl Into<Value>) -> Value {
    let limits = json!({ "maxSurge": surge.into(), "maxUnavailable": unavailable.into() });
    json!({ "type": "RollingUpdate", "rollingUpdate": limits })
}

fn image(image: &str) -> Value {
    json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
}

fn image_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.containers[0].image.as_deref()).unwrap_or_default()
}

fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn staying(api: &Api) -> Vec<std::sync::Arc<Object>> {
    api.list(Kind::of::<Pod>()).into_iter().filter(|pod| pod.deleted().is_none()).collect()
}

/// From now on at most `most` pods are not on their way out, and at least `least` of them serve.
fn keep_within(sim: &Sim, least: usize, most: usize) {
    sim.api.check(move |api| {
        let pods = staying(api);
        let serving = pods.iter().filter(|pod| is_ready(&pod.view::<Pod>().expect("a pod"))).count();
        match pods.len() <= most && serving >= least {
            true => Ok(()),
            false => Err(format!("{serving} of {} pods serve; at least {least}, at most {most}", pods.len())),
        }
    });
}

#[track_caller]
fn check_images(sim: &Sim, want: &str, count: usize) {
    let images: Vec<String> = sim.list::<Pod>().iter().map(|pod| image_of(pod).to_owned()).collect();
    assert_eq!(images, vec![want; count]);
}

/// Rolls four pods out, and half way to a third version.
async fn roll(mut sim: Sim, strategy: &Value, least: usize, most: usize) -> Sim {
    sim.create(deployment(4, strategy));
    sim.settle(minutes(30)).await;
    check_images(&sim, "v1", 4);
    keep_within(&sim, least, most);
    sim.patch::<Deployment>("web", image("v2")).await;
    sim.pass(Duration::from_secs(4)).await;
    sim.patch::<Deployment>("web", image("v3")).await;
    sim.settle(minutes(60)).await;
    check_images(&sim, "v3", 4);
    let status = sim.get::<Deployment>("web").unwrap().status.unwrap();
    assert_eq!(
        (status.replicas, status.updated_replicas, status.available_replicas),
        (Some(4), Some(4), Some(4))
    );
    assert_eq!((status.unavailable_replicas, status.observed_generation), (None, Some(3)));
    sim
}

#[tokio::test(start_paused = true)]
async fn rollouts_keep_their_limits_in_any_trouble() {
    for seed in 0..4 {
        for (strategy, least, most) in [
            (rolling("25%", "25%"), 3, 5),
            (rolling(0, 1), 3, 4),
            (rolling(1, 0), 4, 5),
            (rolling("50%", "50%"), 2, 6),
        ] {
            for sim in Sim::troubled(seed, 2) {
                roll(sim, &strategy, least, most).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn rollouts_without_surge_survive_a_crash_after_any_write() {
    let mut crashes = 0;
    for n in 1.. {
        let sim = roll(Sim::new(3).nodes(2).crash_after(n), &rolling(0, 1), 3, 4).await;
        if !sim.crashed() {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 40, "{crashes}");
}

#[tokio::test(start_paused = true)]
async fn two_versions_never_run_at_once_when_pods_are_recreated() {
    let only_one_version = |sim: &Sim| {
        sim.api.check(|api| {
            let pods = api.list(Kind::of::<Pod>());
            let running =
                pods.iter().filter(|pod| !matches!(pod.field("status.phase"), Some("Succeeded" | "Failed")));
            let views = running.map(|pod| pod.view::<Pod>().expect("a pod"));
            let images: BTreeSet<String> = views.map(|pod| image_of(&pod).to_owned()).collect();
            if images.len() > 1 { Err(format!("{images:?} at once")) } else { Ok(()) }
        });
    };
    let strategy = json!({ "type": "Recreate" });
    for seed in 0..3 {
        for sim in Sim::troubled(seed, 2) {
            only_one_version(&sim);
            roll(sim, &strategy, 0, 4).await;
        }
    }
    for n in 1.. {
        let sim = Sim::new(4).nodes(2).crash_after(n);
        only_one_version(&sim);
        if !roll(sim, &strategy, 0, 4).await.crashed() {
            break;
        }
    }
}

/// Somebody who changes his mind every few seconds: image, size, pause, and now and then a pod that is deleted.
async fn fickle(mut sim: Sim, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    sim.create(deployment(4, &rolling(1, 1)));
    // Six at most are ever asked for, and one more may surge.
    keep_within(&sim, 0, 7);
    let mut wanted = ("v1".to_owned(), 4);
    for _ in 0..12 {
        sim.pass(Duration::from_millis(rng.random_range(100..9000))).await;
        match rng.random_range(0..6) {
            0 | 1 => {
                wanted.0 = ["v1", "v2", "v3", "broken"][rng.random_range(0..4)].to_owned();
                sim.patch::<Deployment>("web", image(&wanted.0)).await;
            }
            2 => {
                wanted.1 = rng.random_range(1..=6);
                sim.patch::<Deployment>("web", json!({ "spec": { "replicas": wanted.1 } })).await;
            }
            3 => drop(
                sim.patch::<Deployment>("web", json!({ "spec": { "paused": rng.random::<bool>() } })).await,
            ),
            _ => {
                if let Some(pod) = sim.list::<Pod>().first() {
                    let name = pod.metadata.name.as_deref().expect("a name");
                    // It may be gone already.
                    let _ = sim.delete::<Pod>(name, Propagation::Background).await;
                }
            }
        }
    }
    sim.patch::<Deployment>("web", json!({ "spec": { "paused": false } })).await;
    if wanted.0 == "broken" {
        sim.patch::<Deployment>("web", image("v1")).await;
        wanted.0 = "v1".to_owned();
    }
    sim.settle(minutes(60)).await;
    check_images(&sim, &wanted.0, wanted.1);
    assert!(sim.list::<ReplicaSet>().len() <= 3, "two old ones are kept");
}

#[tokio::test(start_paused = true)]
async fn a_deployment_follows_somebody_who_cannot_decide() {
    for seed in 0..10 {
        for sim in Sim::troubled(seed, 2) {
            fickle(sim, seed).await;
        }
    }
}

fn replica_set(replicas: i32) -> Value {
    json!({ "apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": { "name": "web" }, "spec": {
        "replicas": replicas, "selector": { "matchLabels": { "app": "web" } }, "template": pod_template("v1") } })
}

fn replication_controller(replicas: i32) -> Value {
    json!({ "apiVersion": "v1", "kind": "ReplicationController", "metadata": { "name": "web" }, "spec": {
        "replicas": replicas, "selector": { "app": "web" }, "template": pod_template("v1") } })
}

/// Grows and shrinks a set of either kind, takes one pod over and lets one go; it never has a pod more than it should.
async fn live<T: Resource + ApiType>(mut sim: Sim, set: Value) -> Sim {
    sim.create(json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "early", "labels": { "app": "web" } },
        "spec": { "containers": [{ "name": "c", "image": "v0" }] } }));
    sim.create(set);
    sim.api.check(|api| {
        let owned = staying(api).iter().filter(|pod| pod.controller().is_some()).count();
        if owned > 5 { Err(format!("{owned} pods of 5")) } else { Ok(()) }
    });
    sim.settle(minutes(30)).await;
    assert_eq!(sim.list::<Pod>().len(), 5);
    assert!(sim.get::<Pod>("early").unwrap().metadata.owner_references.is_some(), "it was taken over");
    sim.patch::<Pod>("early", json!({ "metadata": { "labels": { "app": "other" } } })).await;
    sim.settle(minutes(30)).await;
    sim.patch::<T>("web", json!({ "spec": { "replicas": 2 } })).await;
    sim.settle(minutes(30)).await;
    assert_eq!(sim.list::<Pod>().len(), 3, "two, and the one that was let go");
    assert!(sim.get::<Pod>("early").unwrap().metadata.owner_references.is_none());
    sim.patch::<T>("web", json!({ "spec": { "replicas": 4 } })).await;
    sim.settle(minutes(30)).await;
    assert_eq!(sim.list::<Pod>().len(), 5);
    let status = sim.get::<T>("web").unwrap().to_value()["status"].take();
    assert_eq!((&status["replicas"], &status["availableReplicas"]), (&json!(4), &json!(4)));
    sim.delete::<T>("web", Propagation::Background).await.unwrap();
    sim.settle(minutes(30)).await;
    let left: Vec<_> = sim.list::<Pod>().into_iter().filter_map(|pod| pod.metadata.name).collect();
    assert_eq!(left, ["early"], "the one that went outlives the set");
    sim
}

#[tokio::test(start_paused = true)]
async fn sets_have_never_a_pod_too_many_in_any_trouble() {
    for seed in 0..3 {
        for sim in Sim::troubled(seed, 2) {
            live::<ReplicaSet>(sim, replica_set(5)).await;
        }
        for sim in Sim::troubled(seed, 2) {
            live::<ReplicationController>(sim, replication_controller(5)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn sets_survive_a_crash_after_any_write() {
    let mut crashes = 0;
    for n in 1.. {
        let sets = live::<ReplicaSet>(Sim::new(5).nodes(1).crash_after(n), replica_set(5)).await;
        let old = Sim::new(5).nodes(1).crash_after(n);
        let old = live::<ReplicationController>(old, replication_controller(5)).await;
        if !sets.crashed() && !old.crashed() {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 20, "{crashes}");
}
