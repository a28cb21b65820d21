//! A run is repeated by its seed: the same clusters live the same lives, write by write.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Namespace;
use minke_api::storage;
use minke_client::Propagation;
use minke_testing::sim::{self, Sim};
use serde_json::{Value, json};
use tokio::time::Instant;

mod common;

const LIMIT: Duration = Duration::from_secs(60 * 60);

fn template(app: &str, image: &str) -> Value {
    json!({
        "metadata": { "labels": { "app": app } },
        "spec": { "containers": [{ "name": "c", "image": image }] },
    })
}

/// Pods of many owners come, change and go, so that there is much to do at the same moment.
async fn live(mut sim: Sim) -> Sim {
    sim.create(sim::web(6, json!({ "name": "c", "image": "v1" })));
    for name in ["web", "db"] {
        sim.create(json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
            "spec": { "selector": { "app": name }, "ports": [{ "port": 80 }] } }));
    }
    sim.create(json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": { "name": "local" },
        "provisioner": storage::LOCAL_PATH, "volumeBindingMode": "WaitForFirstConsumer", "reclaimPolicy": "Delete",
    }));
    let claim = json!({ "metadata": { "name": "data" }, "spec": {
        "storageClassName": "local", "accessModes": ["ReadWriteOnce"],
        "resources": { "requests": { "storage": "1Mi" } },
    } });
    sim.create(json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": "db" },
        "spec": {
            "replicas": 3, "serviceName": "db", "podManagementPolicy": "Parallel", "volumeClaimTemplates": [claim],
            "selector": { "matchLabels": { "app": "db" } }, "template": template("db", "v1"),
        },
    }));
    sim.create(
        json!({ "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "log" }, "spec": {
        "selector": { "matchLabels": { "app": "log" } }, "template": template("log", "v1") } }),
    );
    let mut once = template("work", "once");
    once["spec"]["restartPolicy"] = "Never".into();
    sim.create(json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "work" }, "spec": {
        "completions": 5, "parallelism": 3, "template": once } }));
    sim.create(json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "web" }, "spec": {
        "maxUnavailable": 1, "selector": { "matchLabels": { "app": "web" } } } }));
    sim.create(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } }));
    for n in 0..5 {
        let mut pod = template("shop", "v1");
        pod["metadata"] = json!({ "name": format!("shop-{n}"), "namespace": "shop" });
        sim.create(
            json!({ "apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"], "spec": pod["spec"] }),
        );
    }
    sim.settle(LIMIT).await;
    sim.delete::<Namespace>("shop", Propagation::Background).await.expect("it is there");
    sim.patch::<Deployment>("web", json!({ "spec": { "template": template("web", "v2") } })).await;
    sim.patch::<StatefulSet>("db", json!({ "spec": { "template": template("db", "v2") } })).await;
    sim.silence("node2");
    sim.pass(Duration::from_secs(400)).await;
    sim.revive("node2");
    sim.settle(LIMIT).await;
    sim.delete::<Deployment>("web", Propagation::Foreground).await.expect("it is there");
    sim.delete::<Job>("work", Propagation::Background).await.expect("it is there");
    sim.settle(LIMIT).await;
    sim
}

/// All that is written in such a life, and after how long.
fn story(sim: impl FnOnce() -> Sim) -> Vec<String> {
    common::virtually(async {
        let start = Instant::now();
        let sim = live(sim()).await;
        let told = sim.api.last(usize::MAX).into_iter();
        told.map(|write| format!("{:?} {}: {}", write.at - start, write.who, write.what)).collect()
    })
}

#[track_caller]
fn check_repeats(sim: impl Fn() -> Sim) {
    let (first, second) = (story(&sim), story(&sim));
    assert!(first.len() > 200, "{} writes are no story", first.len());
    for (n, (first, second)) in first.iter().zip(&second).enumerate() {
        assert_eq!(first, second, "write {n}");
    }
    assert_eq!(first.len(), second.len());
}

#[test]
fn a_life_without_trouble_repeats() {
    check_repeats(|| Sim::new(1).nodes(3));
}

#[test]
fn a_life_with_every_trouble_repeats() {
    for seed in 0..8 {
        println!("seed {seed}");
        let (second, three) = (Duration::from_secs(1), Duration::from_secs(3));
        check_repeats(|| Sim::new(seed).nodes(3).lag(three).slow(second).blink(three).crash_after(40));
    }
}
