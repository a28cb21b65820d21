use super::*;

fn claim(change: impl FnOnce(&mut Value)) -> Claim {
    let mut value = json!({
        "metadata": {"name": "c", "namespace": "n", "uid": "u", "annotations": {}},
        "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "slow",
            "resources": {"requests": {"storage": "1Gi"}}},
        "status": {"phase": "Pending"},
    });
    change(&mut value);
    Typed::new(Arc::new(Object::from_value(Kind::of::<PersistentVolumeClaim>(), &value).unwrap())).unwrap()
}

fn volume(change: impl FnOnce(&mut Value)) -> Typed<PersistentVolume> {
    let mut value = json!({
        "metadata": {"name": "v", "annotations": {}},
        "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "slow",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": "/x"}},
        "status": {"phase": "Available"},
    });
    change(&mut value);
    Typed::new(Arc::new(Object::from_value(Kind::of::<PersistentVolume>(), &value).unwrap())).unwrap()
}

fn class(provisioner: &str, mode: &str) -> StorageClass {
    let value = json!({"metadata": {"name": "slow"}, "provisioner": provisioner, "volumeBindingMode": mode});
    serde_json::from_value(value).unwrap()
}

fn named(uid: &str) -> Value {
    json!({"kind": "PersistentVolumeClaim", "namespace": "n", "name": "c", "uid": uid})
}

/// What a claim needs, as text.
fn show(step: ClaimStep) -> String {
    let tale = |tale: Tale| format!("{}: {}", tale.reason, tale.message);
    match step {
        ClaimStep::Bind(name) => format!("bind {name}"),
        ClaimStep::Wait(None) => "wait".to_owned(),
        ClaimStep::Wait(Some(why)) => format!("wait {}", tale(why)),
        ClaimStep::Lost(why) => format!("lost {}", tale(why)),
        ClaimStep::Provision(by) => format!("provision {by}"),
        ClaimStep::TakeClass(class) => format!("class {class}"),
        ClaimStep::ForgetNode => "forget node".to_owned(),
    }
}

#[track_caller]
fn check(claim: &Claim, around: &Around<'_>, want: &str) {
    let got = show(plan_claim(claim, around));
    assert!(got.starts_with(want), "{got}");
}

#[test]
fn an_open_claim_gets_a_volume_or_says_why_not() {
    let (free, plain) = (volume(|_| {}), claim(|_| {}));
    let with = |class| Around { class, ..Around::default() };
    let fits = Around { candidates: vec![&free], ..Around::default() };
    check(&plain, &fits, "bind v");
    check(
        &plain,
        &Around::default(),
        "wait ProvisioningFailed: storageclass.storage.k8s.io \"slow\" not found",
    );
    let none = claim(|c| c["spec"]["storageClassName"] = "".into());
    let no_class =
        "wait FailedBinding: no persistent volumes available for this claim and no storage class is set";
    check(&none, &Around::default(), no_class);
    let open = claim(|c| c["spec"]["storageClassName"] = Value::Null);
    check(&open, &Around::default(), no_class);
    check(&open, &Around { default_class: Some("best"), ..Around::default() }, "class best");
    let remote = class("example.com/disk", "Immediate");
    check(&plain, &with(Some(&remote)), "provision example.com/disk");
    let manual = class(storage::NO_PROVISIONER, "Immediate");
    check(
        &plain,
        &with(Some(&manual)),
        "wait ProvisioningFailed: no volume plugin matched name: kubernetes.io/no-provisioner",
    );
    let going = claim(|c| c["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into());
    check(&going, &with(Some(&remote)), "wait");
}

#[test]
fn a_delayed_claim_waits_until_a_node_is_selected() {
    let (free, delayed) = (volume(|_| {}), class(storage::LOCAL_PATH, "WaitForFirstConsumer"));
    let around = |node_exists| Around {
        candidates: vec![&free],
        class: Some(&delayed),
        node_exists,
        ..Around::default()
    };
    let waits = "wait WaitForFirstConsumer: waiting for first consumer to be created before binding";
    check(&claim(|_| {}), &around(false), waits);
    let selected = claim(|c| c["metadata"]["annotations"][storage::SELECTED_NODE] = "n1".into());
    check(&selected, &around(true), "provision minke.io/local-path");
    check(&selected, &around(false), "forget node");
    let meant = volume(|v| v["spec"]["claimRef"] = named("u"));
    let prepared = Around { candidates: vec![&meant], class: Some(&delayed), ..Around::default() };
    check(&claim(|_| {}), &prepared, "bind v");
    let hasty = class(storage::LOCAL_PATH, "Immediate");
    let around = Around { class: Some(&hasty), ..Around::default() };
    check(
        &claim(|_| {}),
        &around,
        "wait ProvisioningFailed: failed to provision volume with StorageClass \"slow\": ",
    );
}

#[test]
fn a_claim_that_names_a_volume_gets_that_one_or_none() {
    let asks = claim(|c| c["spec"]["volumeName"] = "v".into());
    let with = |volume: &Typed<PersistentVolume>| {
        show(plan_claim(&asks, &Around { named: Some(volume), ..Around::default() }))
    };
    check(&asks, &Around::default(), "wait");
    assert_eq!(with(&volume(|_| {})), "bind v");
    assert_eq!(with(&volume(|v| v["spec"]["claimRef"] = named(""))), "bind v");
    assert_eq!(
        with(&volume(|v| v["spec"]["claimRef"] = named("x"))),
        "wait FailedBinding: volume \"v\" already bound to a different claim."
    );
    assert_eq!(
        with(&volume(|v| v["spec"]["capacity"]["storage"] = "1Mi".into())),
        "wait VolumeMismatch: Cannot bind to requested volume \"v\": requested PV is too small"
    );
}

#[test]
fn a_bound_claim_keeps_its_volume_or_is_lost() {
    let bound = |name: &str| {
        claim(|c| {
            c["spec"]["volumeName"] = name.into();
            c["metadata"]["annotations"][storage::BIND_COMPLETED] = "yes".into();
        })
    };
    check(
        &bound(""),
        &Around::default(),
        "lost ClaimLost: Bound claim has lost reference to PersistentVolume.",
    );
    check(&bound("v"), &Around::default(), "lost ClaimLost: Bound claim has lost its PersistentVolume.");
    let with = |volume: &Typed<PersistentVolume>| {
        show(plan_claim(&bound("v"), &Around { named: Some(volume), ..Around::default() }))
    };
    assert_eq!(with(&volume(|_| {})), "bind v");
    assert_eq!(with(&volume(|v| v["spec"]["claimRef"] = named("u"))), "bind v");
    assert!(
        with(&volume(|v| v["spec"]["claimRef"] = named("x"))).starts_with("lost ClaimMisbound: Two claims")
    );
}

#[track_caller]
fn check_volume(change: impl FnOnce(&mut Value), claim: Option<&Claim>, want: VolumeStep) {
    assert_eq!(plan_volume(&volume(change), claim.map(|claim| &**claim)), want);
}

#[test]
fn a_volume_says_whose_it_is() {
    use VolumeStep::{Mismatch, Nothing, Phase, Unbind};
    let (open, here) = (claim(|_| {}), claim(|c| c["spec"]["volumeName"] = "v".into()));
    let elsewhere = claim(|c| c["spec"]["volumeName"] = "w".into());
    check_volume(|v| v["status"]["phase"] = "Pending".into(), None, Phase("Available", None));
    check_volume(|_| {}, None, Nothing);
    check_volume(|v| v["spec"]["claimRef"] = named(""), Some(&open), Nothing);
    check_volume(|v| v["spec"]["claimRef"] = named("u"), Some(&open), Nothing);
    check_volume(|v| v["spec"]["claimRef"] = named("u"), Some(&here), Phase("Bound", None));
    check_volume(|v| v["spec"]["claimRef"] = named("u"), Some(&elsewhere), Unbind);
    let block = |v: &mut Value| {
        v["spec"]["claimRef"] = named("u");
        v["spec"]["volumeMode"] = "Block".into();
    };
    check_volume(block, Some(&open), Mismatch);
    let made = |v: &mut Value| {
        v["spec"]["claimRef"] = named("u");
        v["spec"]["persistentVolumeReclaimPolicy"] = "Delete".into();
        v["metadata"]["annotations"][storage::PROVISIONED_BY] = "x".into();
    };
    check_volume(made, Some(&elsewhere), Phase("Released", None));
}

#[test]
fn a_released_volume_is_kept_or_left_to_its_maker() {
    use VolumeStep::{Nothing, Phase};
    let released = |policy: &str| {
        let policy = policy.to_owned();
        move |v: &mut Value| {
            v["spec"]["claimRef"] = named("u");
            v["spec"]["persistentVolumeReclaimPolicy"] = policy.into();
            v["status"]["phase"] = "Released".into();
        }
    };
    let failed = |reason, message: &str| Phase("Failed", Some(Tale::warning(reason, message)));
    check_volume(|v| v["spec"]["claimRef"] = named("u"), None, Phase("Released", None));
    check_volume(released("Retain"), None, Nothing);
    let why = "error getting deleter volume plugin for volume \"v\": no deletable volume plugin matched";
    check_volume(released("Delete"), None, failed("VolumeFailedDelete", why));
    check_volume(
        released("Recycle"),
        None,
        failed("VolumeFailedRecycle", "No recycler plugin found for the volume!"),
    );
    let made = |v: &mut Value| {
        released("Delete")(v);
        v["metadata"]["annotations"][storage::PROVISIONED_BY] = storage::LOCAL_PATH.into();
    };
    check_volume(made, None, Nothing);
}

/// A plan settles: what binding writes is what the next pass finds done.
#[test]
fn binding_twice_changes_nothing() {
    let (volume, claim) = (volume(|_| {}), claim(|_| {}));
    let body = volume_naming(&volume, &claim).unwrap();
    assert_eq!(body["metadata"]["annotations"][storage::BOUND_BY_CONTROLLER], "yes");
    assert_eq!(body["spec"]["claimRef"]["uid"], "u");
    let volume: Typed<PersistentVolume> =
        Typed::new(Arc::new(Object::from_value(volume.object.kind(), &body).unwrap())).unwrap();
    assert_eq!(volume_naming(&volume, &claim), None);
    let mut body = claim_naming(&claim, "v").unwrap();
    body["status"] = bound_status(&claim, &volume).unwrap();
    assert_eq!(body["status"]["capacity"], json!({"storage": "1Gi"}));
    let claim: Claim = Typed::new(Arc::new(Object::from_value(claim.object.kind(), &body).unwrap())).unwrap();
    assert_eq!((claim_naming(&claim, "v"), bound_status(&claim, &volume)), (None, None));
    assert_eq!(storage::annotation(&claim, storage::BOUND_BY_CONTROLLER), Some("yes"));
}

#[test]
fn a_volume_set_aside_by_the_user_is_not_marked_as_the_controllers_work() {
    let volume = volume(|v| v["spec"]["claimRef"] = named(""));
    let body = volume_naming(&volume, &claim(|_| {})).unwrap();
    assert_eq!(body["metadata"]["annotations"], json!({}));
    let asks = claim(|c| c["spec"]["volumeName"] = "v".into());
    let body = claim_naming(&asks, "v").unwrap();
    assert_eq!(body["metadata"]["annotations"], json!({storage::BIND_COMPLETED: "yes"}));
}
