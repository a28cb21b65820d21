//! Claims, volumes and the pods on them: the real controllers and the real scheduler in a simulated cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use minke_api::{Kind, storage};
use minke_client::Propagation;
use minke_testing::sim::{Api, Sim};
use serde_json::{Value, json};

mod common;
use common::through_all;

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn class(name: &str, provisioner: &str) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": { "name": name },
        "provisioner": provisioner, "volumeBindingMode": "WaitForFirstConsumer", "reclaimPolicy": "Delete",
    })
}

fn claim(name: &str, class: &str, size: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": name },
        "spec": { "accessModes": ["ReadWriteOnce"], "storageClassName": class, "resources": { "requests": { "storage": size } } },
    })
}

fn volume(name: &str, class: &str, size: &str, host: Option<&str>) -> Value {
    let mut volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": name },
        "spec": {
            "capacity": { "storage": size }, "accessModes": ["ReadWriteOnce"], "storageClassName": class,
            "persistentVolumeReclaimPolicy": "Retain", "local": { "path": "/" },
        },
    });
    if let Some(host) = host {
        let here = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [host] });
        volume["spec"]["nodeAffinity"] =
            json!({ "required": { "nodeSelectorTerms": [{ "matchExpressions": [here] }] } });
    }
    volume
}

/// Named apart from its claim: events of one instant are told apart by the names of what they are about.
fn pod(name: &str, claim: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
        "spec": {
            "containers": [{ "name": "c", "image": "i" }],
            "volumes": [{ "name": "v", "persistentVolumeClaim": { "claimName": claim } }],
        },
    })
}

/// What must hold at every moment: no volume has two claims, and none that is in use is given up.
fn never_lose_data(sim: &Sim) {
    sim.api.check(|api: &Api| {
        let mut taken: BTreeMap<String, String> = BTreeMap::new();
        let volumes: BTreeMap<String, _> = api
            .list(Kind::of::<PersistentVolume>())
            .into_iter()
            .map(|volume| (volume.name().to_owned(), volume))
            .collect();
        for object in api.list(Kind::of::<PersistentVolumeClaim>()) {
            let claim = object.view::<PersistentVolumeClaim>().map_err(|error| error.to_string())?;
            let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
            let Some(named) = named else { continue };
            if let Some(other) = taken.insert(named.clone(), object.key().to_string()) {
                return Err(format!("{named} is {other}'s and {}'s", object.key()));
            }
            if !storage::is_bound(&claim) {
                continue;
            }
            let Some(volume) = volumes.get(&named) else { return Err(format!("{named} is gone")) };
            let view = volume.view::<PersistentVolume>().map_err(|error| error.to_string())?;
            let phase = view.status.as_ref().and_then(|status| status.phase.as_deref());
            if matches!(phase, Some("Released" | "Failed")) || volume.deleted().is_some() {
                return Err(format!("{named} is given up while {} has it", object.key()));
            }
        }
        Ok(())
    });
}

fn bound(sim: &Sim) -> BTreeMap<String, String> {
    let claims = sim.list::<PersistentVolumeClaim>();
    let phase = |claim: &PersistentVolumeClaim| claim.status.as_ref().and_then(|status| status.phase.clone());
    let bound = claims.into_iter().filter(|claim| phase(claim).as_deref() == Some("Bound"));
    bound.map(|claim| (claim.metadata.name.unwrap(), claim.spec.unwrap().volume_name.unwrap())).collect()
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Two pods with claims of the built-in class come, and go with their claims.
async fn come_and_go(mut sim: Sim) -> Sim {
    never_lose_data(&sim);
    sim.create(class("standard", storage::LOCAL_PATH));
    for n in ["a", "b"] {
        sim.create(claim(n, "standard", "1Gi"));
        sim.create(pod(&format!("on-{n}"), n));
    }
    sim.settle(minutes(30)).await;
    assert_eq!(bound(&sim).len(), 2);
    let volumes = sim.list::<PersistentVolume>();
    assert_eq!(volumes.len(), 2);
    for pod in sim.list::<Pod>() {
        let name = pod.metadata.name.as_deref().unwrap();
        let claim = sim.get::<PersistentVolumeClaim>(name.trim_start_matches("on-")).unwrap();
        assert_eq!(storage::annotation(&claim, storage::SELECTED_NODE), node_of(&pod), "where its volume is");
        assert!(node_of(&pod).is_some());
    }
    // The claims are wanted gone first, and stay until their pods have gone.
    for n in ["a", "b"] {
        sim.delete::<PersistentVolumeClaim>(n, Propagation::Background).await.unwrap();
    }
    sim.settle(minutes(30)).await;
    assert_eq!(bound(&sim).len(), 2, "pods keep their claims");
    for n in ["on-a", "on-b"] {
        sim.delete::<Pod>(n, Propagation::Background).await.unwrap();
    }
    sim.settle(minutes(30)).await;
    assert_eq!(sim.list::<PersistentVolumeClaim>().len(), 0);
    assert_eq!(sim.list::<PersistentVolume>().len(), 0, "nothing is left behind");
    sim
}

#[tokio::test(start_paused = true)]
async fn claims_of_the_built_in_class_come_and_go_with_their_pods() {
    let sim = come_and_go(Sim::new(1).nodes(2)).await;
    let told = sim.events("WaitForFirstConsumer");
    assert!(told.iter().all(|text| text == "waiting for first consumer to be created before binding"));
    assert_eq!(sim.events("ExternalProvisioning").len(), 2);
    assert!(sim.events("ClaimLost").is_empty());
}

#[test]
fn no_volume_is_lost_or_left_behind() {
    through_all(30, 10, come_and_go);
}

/// Five claims want three volumes.
async fn scramble(mut sim: Sim) -> Sim {
    never_lose_data(&sim);
    for (n, size) in [("v1", "1Gi"), ("v2", "2Gi"), ("v3", "3Gi")] {
        sim.create(volume(n, "manual", size, None));
    }
    for n in 1..=5 {
        sim.create(claim(&format!("c{n}"), "manual", "1Gi"));
    }
    sim.settle(minutes(30)).await;
    let volumes: BTreeSet<String> = bound(&sim).into_values().collect();
    assert_eq!(volumes.len(), 3, "each volume has one claim");
    assert_eq!(sim.list::<PersistentVolumeClaim>().len(), 5);
    // What comes free is not given to others: it holds somebody's data.
    let (first, _) = bound(&sim).into_iter().next().unwrap();
    sim.delete::<PersistentVolumeClaim>(&first, Propagation::Background).await.unwrap();
    sim.settle(minutes(30)).await;
    assert_eq!(bound(&sim).len(), 2);
    sim
}

#[test]
fn a_volume_has_one_claim_whoever_crashes() {
    through_all(20, 5, scramble);
}

#[tokio::test(start_paused = true)]
async fn a_pod_goes_where_its_volume_is_and_takes_the_one_that_fits() {
    let mut sim = Sim::new(4).nodes(3);
    never_lose_data(&sim);
    sim.create(class("by-hand", storage::NO_PROVISIONER));
    sim.create(volume("big", "by-hand", "9Gi", Some("node1")));
    sim.create(volume("right", "by-hand", "2Gi", Some("node2")));
    sim.create(claim("a", "by-hand", "2Gi"));
    sim.create(claim("b", "by-hand", "2Gi"));
    sim.create(claim("c", "by-hand", "2Gi"));
    for n in ["a", "b", "c"] {
        sim.create(pod(&format!("on-{n}"), n));
    }
    sim.settle(minutes(30)).await;
    let nodes: Vec<Option<String>> = ["on-a", "on-b", "on-c"]
        .iter()
        .map(|name| node_of(&sim.get::<Pod>(name).unwrap()).map(str::to_owned))
        .collect();
    let placed: BTreeSet<&str> = nodes.iter().flatten().map(String::as_str).collect();
    assert_eq!(placed, ["node1", "node2"].into(), "{nodes:?}");
    let told = sim.events("FailedScheduling");
    let why = "3 node(s) didn't find available persistent volumes to bind";
    assert!(told.iter().any(|text| text.contains(why)), "{told:?}");
    // A volume for the third one comes: it is woken by that.
    sim.create(volume("late", "by-hand", "2Gi", Some("node3")));
    sim.settle(minutes(2)).await;
    assert_eq!(bound(&sim).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_no_node_has_room_for_is_offered_again_and_again_but_ever_more_slowly() {
    let mut sim = Sim::new(6).nodes(2);
    sim.create(class("standard", storage::LOCAL_PATH));
    sim.create(claim("huge", "standard", "2Ti"));
    sim.create(pod("p", "huge"));
    sim.pass(minutes(5)).await;
    assert_eq!(node_of(&sim.get::<Pod>("p").unwrap()), None);
    let told = sim.events("FailedScheduling");
    let why =
        "running PreBind plugin \"VolumeBinding\": binding volumes: provisioning failed for PVC \"huge\"";
    assert!(told.iter().any(|text| text == why), "{told:?}");
    let log = sim.api.last(10_000);
    let offers = log.iter().filter(|write| write.who == "scheduler" && write.what.contains("claims")).count();
    assert!((5..40).contains(&offers), "{offers} in five minutes");
    sim.delete::<Pod>("p", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
}

#[tokio::test(start_paused = true)]
async fn ephemeral_volumes_have_claims_that_go_with_their_pods() {
    let mut sim = Sim::new(8).nodes(1);
    never_lose_data(&sim);
    sim.create(class("standard", storage::LOCAL_PATH));
    let mut pod = pod("p", "");
    pod["spec"]["volumes"] = json!([{ "name": "tmp", "ephemeral": { "volumeClaimTemplate": {
        "spec": claim("", "standard", "1Gi")["spec"] } } }]);
    sim.create(pod);
    sim.settle(minutes(5)).await;
    assert_eq!(bound(&sim).into_keys().collect::<Vec<_>>(), ["p-tmp"]);
    assert!(node_of(&sim.get::<Pod>("p").unwrap()).is_some());
    sim.delete::<Pod>("p", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert_eq!(sim.list::<PersistentVolumeClaim>().len() + sim.list::<PersistentVolume>().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_claim_for_one_pod_is_used_by_one_pod() {
    let mut sim = Sim::new(9).nodes(2);
    sim.create(class("standard", storage::LOCAL_PATH));
    let mut alone = claim("alone", "standard", "1Gi");
    alone["spec"]["accessModes"] = json!(["ReadWriteOncePod"]);
    sim.create(alone);
    sim.create(pod("first", "alone"));
    sim.settle(minutes(5)).await;
    sim.create(pod("second", "alone"));
    sim.settle(minutes(10)).await;
    assert_eq!(node_of(&sim.get::<Pod>("second").unwrap()), None);
    let why = "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode";
    let told = sim.events("FailedScheduling");
    assert!(told.iter().any(|text| text.contains(why)), "{told:?}");
    sim.delete::<Pod>("first", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(
        node_of(&sim.get::<Pod>("second").unwrap()).is_some(),
        "the other one's end is what it waited for"
    );
}
