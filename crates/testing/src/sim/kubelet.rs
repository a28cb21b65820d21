//! A kubelet that pretends: pods of its node become ready after a while, and stop when they are deleted.
//!
//! A pod whose image begins with `broken` never becomes ready; one whose image is `once` succeeds, `fails` fails.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use minke_api::{FieldSelector, Kind, Object, time};
use minke_client::{Client, DeleteOptions, Informers, Patch, Target};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::Api;

const LEASE_PERIOD: Duration = Duration::from_secs(10);

/// Registers the node and starts its kubelet. `silent` ends its signs of life, not its pods.
pub(super) fn start(api: &Arc<Api>, name: &str, seed: u64, silent: CancellationToken) {
    let number: u64 = name.bytes().fold(0, |sum, byte| sum * 31 + u64::from(byte));
    let now = time::format_seconds(api.clock().now());
    api.must_create(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name } },
        "status": {
            "addresses": [{ "type": "InternalIP", "address": format!("10.0.0.{}", number % 250) }],
            "allocatable": { "cpu": "16", "memory": "64Gi", "pods": "110" },
            "conditions": [{ "type": "Ready", "status": "True", "lastHeartbeatTime": now, "lastTransitionTime": now }],
        },
    }));
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": { "name": name, "namespace": "kube-node-lease" },
        "spec": { "holderIdentity": name, "renewTime": time::format_micros(api.clock().now()) },
    });
    api.must_create(lease);
    let client: Arc<dyn Client> = Arc::new(api.client(name, Duration::ZERO, None));
    tokio::spawn(renew(client.clone(), api.clone(), name.to_owned(), silent));
    tokio::spawn(follow(client, api.clone(), name.to_owned(), StdRng::seed_from_u64(seed ^ number)));
}

async fn renew(client: Arc<dyn Client>, api: Arc<Api>, name: String, silent: CancellationToken) {
    let lease = Target::object(Kind::of::<Lease>(), "kube-node-lease", &name);
    loop {
        tokio::select! { () = silent.cancelled() => return, () = tokio::time::sleep(LEASE_PERIOD) => {} }
        let now = time::format_micros(api.clock().now());
        let _ = client.patch(lease, Patch::Merge(json!({ "spec": { "renewTime": now } }))).await;
    }
}

async fn follow(client: Arc<dyn Client>, api: Arc<Api>, name: String, mut rng: StdRng) {
    let fields =
        FieldSelector::parse(Kind::of::<Pod>(), &format!("spec.nodeName={name}")).expect("a selector");
    let informers = Informers::new(client.clone(), CancellationToken::new());
    let mut changes = informers.selected(Kind::of::<Pod>(), fields).subscribe();
    let (mut started, mut stopping) = (HashSet::new(), HashSet::new());
    let mut ip = 0;
    while let Some(change) = changes.recv().await {
        let Some(pod) = change.new else { continue };
        let uid = pod.uid().to_owned();
        let pause = Duration::from_millis(rng.random_range(200..3000));
        if pod.deleted().is_some() {
            if stopping.insert(uid) {
                tokio::spawn(stop(client.clone(), pod, pause));
            }
        } else if started.insert(uid) {
            ip += 1;
            let address =
                format!("10.244.{}.{ip}", name.len() + usize::from(name.as_bytes()[name.len() - 1]));
            tokio::spawn(run(client.clone(), api.clone(), pod, address, pause));
        }
    }
}

async fn stop(client: Arc<dyn Client>, pod: Arc<Object>, pause: Duration) {
    tokio::time::sleep(pause).await;
    let options =
        DeleteOptions { grace_period: Some(0), uid: Some(pod.uid().to_owned()), ..DeleteOptions::default() };
    // What keeps the pod now is not the kubelet's business.
    let _ = client.delete(Target::of(&pod), options).await;
}

async fn run(client: Arc<dyn Client>, api: Arc<Api>, pod: Arc<Object>, address: String, pause: Duration) {
    tokio::time::sleep(pause).await;
    let spec = pod.value();
    let image = spec["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned();
    let now = || time::format_seconds(api.clock().now());
    let ready = |value: &str| json!({ "type": "Ready", "status": value, "lastTransitionTime": now() });
    let write = |status: Value| {
        let (client, pod) = (client.clone(), pod.clone());
        async move {
            client.patch(Target::of(&pod).sub("status"), Patch::Strategic(json!({ "status": status }))).await
        }
    };
    let works = !image.starts_with("broken");
    let condition = ready(if works { "True" } else { "False" });
    let _ = write(json!({ "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }], "conditions": [condition] })).await;
    if matches!(image.as_str(), "once" | "fails") {
        tokio::time::sleep(pause).await;
        let phase = if image == "once" { "Succeeded" } else { "Failed" };
        let ended = json!({ "terminated": { "exitCode": 0, "finishedAt": now() } });
        let container = json!({ "name": "c", "state": ended, "image": image, "imageID": "", "ready": false, "restartCount": 0 });
        let _ = write(
            json!({ "phase": phase, "conditions": [ready("False")], "containerStatuses": [container] }),
        )
        .await;
    }
}
