use super::*;
use crate::picture::tests::pod;
use serde_json::Value;

fn claim(change: impl FnOnce(&mut Value)) -> Arc<PersistentVolumeClaim> {
    let mut value = json!({
        "metadata": {"name": "c", "namespace": "default", "uid": "u", "annotations": {}},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "slow", "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": "Pending"},
    });
    change(&mut value);
    Arc::new(serde_json::from_value(value).unwrap())
}

fn class(mode: &str) -> StorageClass {
    serde_json::from_value(
        json!({"metadata": {"name": "slow"}, "provisioner": "p", "volumeBindingMode": mode}),
    )
    .unwrap()
}

/// How many claims are bound and how many wait for a node, or why the pod cannot be placed.
fn sort(
    volume: Value,
    claim: Option<Arc<PersistentVolumeClaim>>,
    class: StorageClass,
) -> Result<(usize, usize), String> {
    let mut volume = volume;
    volume["name"] = "v".into();
    let pod = pod("p", json!({"containers": [], "volumes": [volume]}));
    let class = Arc::new(class);
    let claims = claims_of(&pod, |_| claim.clone(), |_| Some(class.clone()))?;
    Ok((claims.bound.len(), claims.delayed.len()))
}

#[track_caller]
fn check(claim: Option<Arc<PersistentVolumeClaim>>, mode: &str, want: Result<(usize, usize), &str>) {
    let got = sort(json!({"persistentVolumeClaim": {"claimName": "c"}}), claim, class(mode));
    assert_eq!(got, want.map_err(str::to_owned));
}

#[test]
fn a_pod_waits_for_its_claims_in_upstreams_words() {
    let delayed = "WaitForFirstConsumer";
    check(None, delayed, Err("persistentvolumeclaim \"c\" not found"));
    check(Some(claim(|_| {})), "Immediate", Err("pod has unbound immediate PersistentVolumeClaims"));
    check(Some(claim(|_| {})), delayed, Ok((0, 1)));
    let bound = |phase: &'static str| {
        claim(move |c| {
            c["spec"]["volumeName"] = "v".into();
            c["metadata"]["annotations"][storage::BIND_COMPLETED] = "yes".into();
            c["status"]["phase"] = phase.into();
        })
    };
    check(Some(bound("Bound")), delayed, Ok((1, 0)));
    let lost = "persistentvolumeclaim \"c\" bound to non-existent persistentvolume \"v\"";
    check(Some(bound("Lost")), delayed, Err(lost));
    let named = claim(|c| c["spec"]["volumeName"] = "v".into());
    check(Some(named), delayed, Err("pod has unbound immediate PersistentVolumeClaims"));
    let going = claim(|c| c["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into());
    check(Some(going), delayed, Err("persistentvolumeclaim \"c\" is being deleted"));
    let classless = claim(|c| c["spec"]["storageClassName"] = "".into());
    check(Some(classless), delayed, Err("pod has unbound immediate PersistentVolumeClaims"));
}

#[test]
fn an_ephemeral_volume_has_a_claim_of_its_own() {
    let volume = json!({"ephemeral": {"volumeClaimTemplate": {"spec": {}}}});
    let delayed = || class("WaitForFirstConsumer");
    let waits = "waiting for ephemeral volume controller to create the persistentvolumeclaim \"p-v\"";
    assert_eq!(sort(volume.clone(), None, delayed()), Err(waits.to_owned()));
    let foreign = "PVC default/p-v was not created for pod default/p (pod is not owner)";
    assert_eq!(sort(volume.clone(), Some(claim(|_| {})), delayed()), Err(foreign.to_owned()));
    let own = claim(|c| {
        c["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "p", "controller": true}]);
    });
    assert_eq!(sort(volume, Some(own), delayed()), Ok((0, 1)));
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn volumes_are_reached_from_their_nodes() {
    let volume = |affinity: Value| -> PersistentVolume {
        serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": {"nodeAffinity": affinity}}))
            .unwrap()
    };
    let on = |host: &str| {
        json!({"required": {"nodeSelectorTerms": [{"matchExpressions":
            [{"key": "kubernetes.io/hostname", "operator": "In", "values": [host]}]}]}})
    };
    let node = labels(&[("kubernetes.io/hostname", "n1")]);
    assert!(reachable(&volume(Value::Null), "n1", &node));
    assert!(reachable(&volume(on("n1")), "n1", &node));
    assert!(!reachable(&volume(on("n2")), "n1", &node));
}

#[test]
fn a_class_makes_volumes_in_its_topologies() {
    let mut class = class("WaitForFirstConsumer");
    assert!(makes_volumes_at(&class, &labels(&[])));
    let topologies = json!([{"matchLabelExpressions": [{"key": "zone", "values": ["a", "b"]}]}]);
    class.allowed_topologies = serde_json::from_value(topologies).unwrap();
    assert!(makes_volumes_at(&class, &labels(&[("zone", "b")])));
    assert!(!makes_volumes_at(&class, &labels(&[("zone", "c")])));
    assert!(!makes_volumes_at(&class, &labels(&[])));
}

#[test]
fn a_volume_of_a_zone_stays_there() {
    let zone = |value: &str| vec![("topology.kubernetes.io/zone".to_owned(), value.to_owned())];
    assert!(allows(&zone("a"), &labels(&[("x", "y")])), "the cluster has no zones");
    assert!(allows(&zone("a"), &labels(&[("topology.kubernetes.io/zone", "a")])));
    assert!(allows(&zone("a__b"), &labels(&[("failure-domain.beta.kubernetes.io/zone", "b")])));
    assert!(!allows(&zone("a"), &labels(&[("topology.kubernetes.io/zone", "b")])));
    assert!(!allows(&zone("a"), &labels(&[("topology.kubernetes.io/region", "a")])));
}

#[tokio::test]
async fn who_waits_hears_of_its_own_claims_only() {
    let waiters = Waiters::default();
    let (a, b) = (Key::new("n", "a"), Key::new("n", "b"));
    let waiter = waiters.wait_for(&[&a]);
    assert_eq!(waiters.lock().len(), 1);
    assert!(waiters.lock().get(&b).is_none());
    waiters.lock()[&a][0].notify_one();
    waiter.news.notified().await;
    drop(waiter);
    assert!(waiters.lock().is_empty(), "nothing is left behind");
}
