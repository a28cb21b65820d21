//! DaemonSets, StatefulSets and their histories in a simulated cluster: crashes after any write, and caches
//! that lag.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, Pod};
use minke_api::Kind;
use minke_client::Propagation;
use minke_testing::sim::{Api, Sim};
use serde_json::{Value, json};

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn workload(kind: &str, image: &str, spec: Value) -> Value {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": "web" },
        "spec": {
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": image }] },
            },
        },
    });
    let fields = spec.as_object().expect("fields of the spec").clone();
    object["spec"].as_object_mut().expect("a spec").extend(fields);
    object
}

fn image(image: &str) -> Value {
    json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
}

fn stays(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none()
}

fn serves(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    stays(pod) && conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn pods(api: &Api) -> Vec<Arc<Pod>> {
    let pods = api.list(Kind::of::<Pod>());
    pods.iter().map(|pod| pod.view::<Pod>().expect("a pod")).collect()
}

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn image_of(pod: &Pod) -> &str {
    let spec = pod.spec.as_ref().expect("a pod has a spec");
    spec.containers[0].image.as_deref().unwrap_or_default()
}

/// At least `least` pods serve, and at most `most` are not on their way out, from now on.
fn keep_within(sim: &Sim, least: usize, most: usize) {
    sim.api.check(move |api| {
        let pods = pods(api);
        let serving = pods.iter().filter(|pod| serves(pod)).count();
        let staying = pods.iter().filter(|pod| stays(pod)).count();
        match serving >= least && staying <= most {
            true => Ok(()),
            false => Err(format!("{serving} serve of at least {least}, {staying} stay of at most {most}")),
        }
    });
}

#[track_caller]
fn check_images(sim: &Sim, want: &[(&str, &str)]) {
    let pods = sim.list::<Pod>();
    let names = |pod: &Pod| (pod.metadata.name.clone().unwrap_or_default(), image_of(pod).to_owned());
    let have: BTreeMap<String, String> = pods.iter().map(names).collect();
    let want = want.iter().map(|(name, image)| ((*name).to_owned(), (*image).to_owned())).collect();
    assert_eq!(have, want);
}

fn revisions(sim: &Sim) -> Vec<i64> {
    let mut numbers: Vec<i64> =
        sim.list::<ControllerRevision>().iter().filter_map(|revision| revision.revision).collect();
    numbers.sort_unstable();
    numbers
}

/// One pod of `want` on each of these nodes.
#[track_caller]
fn check_nodes(sim: &Sim, want: &str, nodes: &[&str]) {
    let pods = sim.list::<Pod>();
    let mut have: Vec<(&str, &str)> = pods.iter().map(|pod| (node_of(pod), image_of(pod))).collect();
    have.sort_unstable();
    assert_eq!(have, nodes.iter().map(|node| (*node, want)).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_daemon_set_follows_nodes_and_their_labels() {
    let mut sim = Sim::new(1).nodes(3);
    let mut set = workload("DaemonSet", "v1", json!({}));
    set["spec"]["template"]["spec"]["nodeSelector"] = json!({ "disk": "ssd" });
    sim.create(set);
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &[]);
    sim.patch::<Node>("node2", json!({ "metadata": { "labels": { "disk": "ssd" } } })).await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &["node2"]);
    let status = sim.get::<DaemonSet>("web").unwrap().status.unwrap();
    assert_eq!((status.desired_number_scheduled, status.number_available), (1, Some(1)));
    sim.patch::<Node>("node3", json!({ "metadata": { "labels": { "disk": "ssd" } } })).await;
    sim.patch::<Node>("node2", json!({ "metadata": { "labels": { "disk": "hdd" } } })).await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &["node3"]);
    let taint = json!([{ "key": "team", "value": "a", "effect": "NoSchedule" }]);
    sim.patch::<Node>(
        "node1",
        json!({ "metadata": { "labels": { "disk": "ssd" } }, "spec": { "taints": taint } }),
    )
    .await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &["node3"]);
    sim.patch::<Node>("node1", json!({ "spec": { "taints": [] } })).await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &["node1", "node3"]);
    sim.patch::<DaemonSet>("web", json!({ "spec": { "template": { "spec": { "nodeSelector": null } } } }))
        .await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v1", &["node1", "node2", "node3"]);
    assert_eq!(revisions(&sim), [1, 2]);
}

/// Rolls a DaemonSet out, and back, on three nodes; the limits hold at every moment.
async fn roll_daemons(mut sim: Sim, limits: Value, least: usize, most: usize) -> Sim {
    let strategy = json!({ "type": "RollingUpdate", "rollingUpdate": limits });
    sim.create(workload(
        "DaemonSet",
        "v1",
        json!({ "updateStrategy": strategy, "revisionHistoryLimit": 10 }),
    ));
    sim.settle(minutes(30)).await;
    check_nodes(&sim, "v1", &["node1", "node2", "node3"]);
    keep_within(&sim, least, most);
    sim.patch::<DaemonSet>("web", image("v2")).await;
    sim.settle(minutes(30)).await;
    check_nodes(&sim, "v2", &["node1", "node2", "node3"]);
    assert_eq!(revisions(&sim), [1, 2]);
    sim.patch::<DaemonSet>("web", image("v1")).await;
    sim.settle(minutes(30)).await;
    check_nodes(&sim, "v1", &["node1", "node2", "node3"]);
    assert_eq!(revisions(&sim), [2, 3], "going back takes the old revision up again");
    let status = sim.get::<DaemonSet>("web").unwrap().status.unwrap();
    assert_eq!((status.updated_number_scheduled, status.number_available), (Some(3), Some(3)));
    assert_eq!((status.observed_generation, status.number_unavailable), (Some(3), None));
    sim
}

#[tokio::test(start_paused = true)]
async fn daemons_roll_within_their_limits_in_any_trouble() {
    for seed in 0..4 {
        for (limits, least, most) in [
            (json!({ "maxUnavailable": 1, "maxSurge": 0 }), 2, 3),
            (json!({ "maxUnavailable": "67%", "maxSurge": 0 }), 0, 3),
            (json!({ "maxUnavailable": 0, "maxSurge": 1 }), 3, 4),
        ] {
            for sim in Sim::troubled(seed, 3) {
                roll_daemons(sim, limits.clone(), least, most).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn daemons_that_are_replaced_by_hand_stay_until_then() {
    for seed in 0..3 {
        for mut sim in Sim::troubled(seed, 3) {
            sim.create(workload("DaemonSet", "v1", json!({ "updateStrategy": { "type": "OnDelete" } })));
            sim.settle(minutes(30)).await;
            // Nobody but the user takes a pod away.
            keep_within(&sim, 2, 3);
            sim.patch::<DaemonSet>("web", image("v2")).await;
            sim.settle(minutes(30)).await;
            check_nodes(&sim, "v1", &["node1", "node2", "node3"]);
            let status = sim.get::<DaemonSet>("web").unwrap().status.unwrap();
            assert_eq!((status.updated_number_scheduled, status.number_available), (None, Some(3)));
            for node in ["node1", "node2", "node3"] {
                let name =
                    sim.list::<Pod>().iter().find(|pod| node_of(pod) == node).unwrap().metadata.name.clone();
                sim.delete::<Pod>(&name.unwrap(), Propagation::Background).await.unwrap();
                sim.settle(minutes(30)).await;
            }
            check_nodes(&sim, "v2", &["node1", "node2", "node3"]);
            assert_eq!(revisions(&sim), [1, 2]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn daemons_survive_a_crash_after_any_write() {
    for (limits, least, most) in [
        (json!({ "maxUnavailable": 1, "maxSurge": 0 }), 2, 3),
        (json!({ "maxUnavailable": 0, "maxSurge": 1 }), 3, 4),
    ] {
        let mut crashes = 0;
        for n in 1.. {
            let sim = roll_daemons(Sim::new(7).nodes(3).crash_after(n), limits.clone(), least, most).await;
            if !sim.crashed() {
                break;
            }
            crashes += 1;
        }
        assert!(crashes > 30, "{crashes}");
    }
}

#[tokio::test(start_paused = true)]
async fn orphaned_daemons_are_adopted_with_their_history() {
    let mut sim = Sim::new(2).nodes(2);
    let set = workload("DaemonSet", "v1", json!({}));
    sim.create(set.clone());
    sim.settle(minutes(5)).await;
    let uids = |sim: &Sim| -> BTreeSet<Option<String>> {
        sim.list::<Pod>().into_iter().map(|pod| pod.metadata.uid).collect()
    };
    let before = uids(&sim);
    sim.delete::<DaemonSet>("web", Propagation::Orphan).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<DaemonSet>("web").is_none());
    assert_eq!(uids(&sim), before);
    sim.create(set);
    sim.settle(minutes(5)).await;
    assert_eq!(uids(&sim), before, "the same pods have a new owner");
    assert!(sim.list::<Pod>().iter().all(|pod| pod.metadata.owner_references.is_some()));
    assert_eq!(revisions(&sim), [1]);
    sim.patch::<DaemonSet>("web", image("v2")).await;
    sim.settle(minutes(5)).await;
    check_nodes(&sim, "v2", &["node1", "node2"]);
}

#[tokio::test(start_paused = true)]
async fn failed_daemons_are_replaced_ever_more_slowly() {
    let mut sim = Sim::new(3).nodes(1);
    sim.create(workload("DaemonSet", "fails", json!({})));
    sim.pass(minutes(2)).await;
    let soon = sim.events("SuccessfulCreate").len();
    assert!((3..=10).contains(&soon), "{soon}");
    sim.pass(minutes(8)).await;
    let later = sim.events("SuccessfulCreate").len();
    assert!(later > soon && later <= soon + 4, "{soon}, then {later}");
    let told = sim.events("FailedDaemonPod");
    assert!(told[0].starts_with("Found failed daemon pod default/web-"), "{told:?}");
}

fn ordered(spec: Value) -> Value {
    let mut all = json!({ "replicas": 3, "serviceName": "web", "podManagementPolicy": "OrderedReady", "revisionHistoryLimit": 10,
        "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "partition": 0 } } });
    all.as_object_mut().expect("a spec").extend(spec.as_object().expect("fields").clone());
    workload("StatefulSet", "v1", all)
}

/// No pod is made before those of lower ordinals serve; only while nothing is rolled out.
fn grows_in_order(sim: &Sim) {
    sim.api.check(|api| {
        let pods = pods(api);
        let of = |n: usize| pods.iter().find(|pod| pod.metadata.name.as_deref() == Some(&format!("web-{n}")));
        let started = (0..8).rev().find(|n| of(*n).is_some()).unwrap_or(0);
        match (0..started).find(|n| !of(*n).is_some_and(|pod| serves(pod))) {
            Some(behind) => Err(format!("web-{started} is there and web-{behind} does not serve")),
            None => Ok(()),
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_stateful_set_grows_and_shrinks_in_order_in_any_trouble() {
    for seed in 0..4 {
        for mut sim in Sim::troubled(seed, 2) {
            grows_in_order(&sim);
            sim.create(ordered(json!({})));
            sim.settle(minutes(10)).await;
            sim.patch::<StatefulSet>("web", json!({ "spec": { "replicas": 5 } })).await;
            sim.settle(minutes(10)).await;
            check_images(
                &sim,
                &[("web-0", "v1"), ("web-1", "v1"), ("web-2", "v1"), ("web-3", "v1"), ("web-4", "v1")],
            );
            sim.patch::<StatefulSet>("web", json!({ "spec": { "replicas": 1 } })).await;
            sim.settle(minutes(10)).await;
            check_images(&sim, &[("web-0", "v1")]);
        }
    }
}

/// Rolls a StatefulSet of three out, the last first, then the rest, then back.
async fn roll_stateful(mut sim: Sim, spec: Value, least: usize) -> Sim {
    sim.create(ordered(spec));
    sim.settle(minutes(30)).await;
    check_images(&sim, &[("web-0", "v1"), ("web-1", "v1"), ("web-2", "v1")]);
    keep_within(&sim, least, 3);
    let partition = |n: i32| json!({ "spec": { "updateStrategy": { "rollingUpdate": { "partition": n } } } });
    sim.patch::<StatefulSet>("web", partition(2)).await;
    sim.patch::<StatefulSet>("web", image("v2")).await;
    sim.settle(minutes(30)).await;
    check_images(&sim, &[("web-0", "v1"), ("web-1", "v1"), ("web-2", "v2")]);
    let status = sim.get::<StatefulSet>("web").unwrap().status.unwrap();
    assert_ne!(status.current_revision, status.update_revision);
    assert_eq!((status.current_replicas, status.updated_replicas), (Some(2), Some(1)));
    sim.patch::<StatefulSet>("web", partition(0)).await;
    sim.settle(minutes(30)).await;
    check_images(&sim, &[("web-0", "v2"), ("web-1", "v2"), ("web-2", "v2")]);
    sim.patch::<StatefulSet>("web", image("v1")).await;
    sim.settle(minutes(30)).await;
    check_images(&sim, &[("web-0", "v1"), ("web-1", "v1"), ("web-2", "v1")]);
    assert_eq!(revisions(&sim), [2, 3]);
    let status = sim.get::<StatefulSet>("web").unwrap().status.unwrap();
    assert_eq!(status.current_revision, status.update_revision);
    assert_eq!((status.available_replicas, status.updated_replicas), (Some(3), Some(3)));
    sim
}

#[tokio::test(start_paused = true)]
async fn stateful_sets_roll_within_their_limits_in_any_trouble() {
    let two = json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 0, "maxUnavailable": 2 } });
    for seed in 0..3 {
        for (spec, least) in [
            (json!({}), 2),
            (json!({ "updateStrategy": two }), 1),
            (json!({ "podManagementPolicy": "Parallel" }), 2),
            (json!({ "podManagementPolicy": "Parallel", "updateStrategy": two }), 1),
        ] {
            for sim in Sim::troubled(seed, 2) {
                roll_stateful(sim, spec.clone(), least).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn stateful_sets_survive_a_crash_after_any_write() {
    for policy in ["OrderedReady", "Parallel"] {
        let mut crashes = 0;
        for n in 1.. {
            let sim = Sim::new(7).nodes(2).crash_after(n);
            let sim = roll_stateful(sim, json!({ "podManagementPolicy": policy }), 2).await;
            if !sim.crashed() {
                break;
            }
            crashes += 1;
        }
        assert!(crashes > 40, "{crashes}");
    }
}

fn claims(sim: &Sim) -> Vec<String> {
    let claims = sim.list::<PersistentVolumeClaim>();
    claims.into_iter().filter_map(|claim| claim.metadata.name).collect()
}

/// Scales a set with claims from three to one and back, then deletes it; says which claims there were then.
async fn claims_of(sim: &mut Sim, deleted: &str, scaled: &str) -> (Vec<String>, Vec<String>) {
    // The pods need not run for their claims to be there.
    let set = ordered(json!({
        "podManagementPolicy": "Parallel",
        "volumeClaimTemplates": [{ "metadata": { "name": "data" }, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } },
        } }],
        "persistentVolumeClaimRetentionPolicy": { "whenDeleted": deleted, "whenScaled": scaled },
    }));
    sim.create(set);
    sim.settle(minutes(10)).await;
    let all = ["data-web-0", "data-web-1", "data-web-2"];
    assert_eq!(claims(sim), all);
    sim.patch::<StatefulSet>("web", json!({ "spec": { "replicas": 1 } })).await;
    sim.settle(minutes(10)).await;
    let after_scaling = claims(sim);
    sim.patch::<StatefulSet>("web", json!({ "spec": { "replicas": 3 } })).await;
    sim.settle(minutes(10)).await;
    assert_eq!((claims(sim), sim.list::<Pod>().len()), (all.map(str::to_owned).to_vec(), 3));
    sim.delete::<StatefulSet>("web", Propagation::Background).await.unwrap();
    sim.settle(minutes(10)).await;
    assert!(sim.list::<Pod>().is_empty() && sim.list::<ControllerRevision>().is_empty());
    (after_scaling, claims(sim))
}

#[tokio::test(start_paused = true)]
async fn claims_are_kept_or_go_as_the_policy_says() {
    let all = || ["data-web-0", "data-web-1", "data-web-2"].map(str::to_owned).to_vec();
    let first = || vec!["data-web-0".to_owned()];
    for (deleted, scaled, want) in [
        ("Retain", "Retain", (all(), all())),
        ("Delete", "Retain", (all(), Vec::new())),
        ("Retain", "Delete", (first(), all())),
        ("Delete", "Delete", (first(), Vec::new())),
    ] {
        assert_eq!(claims_of(&mut Sim::new(5).nodes(1), deleted, scaled).await, want, "{deleted}, {scaled}");
        for mut sim in Sim::troubled(5, 1) {
            assert_eq!(claims_of(&mut sim, deleted, scaled).await, want, "{deleted}, {scaled}, in trouble");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn claims_are_neither_lost_nor_left_by_a_crash() {
    for n in 1.. {
        let mut sim = Sim::new(6).nodes(1).crash_after(n);
        let first = vec!["data-web-0".to_owned()];
        assert_eq!(
            claims_of(&mut sim, "Delete", "Delete").await,
            (first, Vec::new()),
            "crash after write {n}"
        );
        if !sim.crashed() {
            break;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_taken_is_counted_and_another_found() {
    let mut sim = Sim::new(8).nodes(1);
    let kinds = ["DaemonSet", "StatefulSet", "Deployment"];
    for kind in kinds {
        sim.create(workload(kind, "v1", json!({ "replicas": 1 })));
        sim.settle(minutes(5)).await;
        let (revision, set) = (sim.list::<ControllerRevision>().pop(), sim.list::<ReplicaSet>().pop());
        let name = revision.map(|r| r.metadata.name).or(set.map(|s| s.metadata.name)).flatten().unwrap();
        match kind {
            "DaemonSet" => sim.delete::<DaemonSet>("web", Propagation::Background).await.unwrap(),
            "StatefulSet" => sim.delete::<StatefulSet>("web", Propagation::Background).await.unwrap(),
            _ => sim.delete::<Deployment>("web", Propagation::Background).await.unwrap(),
        }
        sim.settle(minutes(5)).await;
        // Somebody else's, with the name that would be given.
        let mut other = workload("ReplicaSet", "other", json!({ "replicas": 0 }));
        other["spec"]["selector"] = json!({ "matchLabels": { "app": "other" } });
        if kind != "Deployment" {
            other = json!({ "apiVersion": "apps/v1", "kind": "ControllerRevision", "data": {}, "revision": 9, "metadata": {} });
        }
        other["metadata"]["name"] = name.clone().into();
        sim.create(other);
        sim.create(workload(kind, "v1", json!({ "replicas": 1 })));
        sim.settle(minutes(5)).await;
        let collisions = match kind {
            "DaemonSet" => sim.get::<DaemonSet>("web").unwrap().status.unwrap().collision_count,
            "StatefulSet" => sim.get::<StatefulSet>("web").unwrap().status.unwrap().collision_count,
            _ => sim.get::<Deployment>("web").unwrap().status.unwrap().collision_count,
        };
        assert_eq!((collisions, sim.list::<Pod>().len()), (Some(1), 1), "{kind}");
        match kind {
            "DaemonSet" => sim.delete::<DaemonSet>("web", Propagation::Background).await.unwrap(),
            "StatefulSet" => sim.delete::<StatefulSet>("web", Propagation::Background).await.unwrap(),
            _ => sim.delete::<Deployment>("web", Propagation::Background).await.unwrap(),
        }
        match kind {
            "Deployment" => sim.delete::<ReplicaSet>(&name, Propagation::Background).await.unwrap(),
            _ => sim.delete::<ControllerRevision>(&name, Propagation::Background).await.unwrap(),
        }
        sim.settle(minutes(5)).await;
    }
}
