//! A kubelet that pretends: pods of its node become ready after a while, and stop when they are deleted.
//!
//! A pod whose image begins with `broken` never becomes ready; one whose image is `once` succeeds, `fails` fails.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use minke_api::{FieldSelector, Kind, Object, time};
use minke_client::{Client, Clock, DeleteOptions, Informers, Patch, Target};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const LEASES: &str = "kube-node-lease";
const LEASE_PERIOD: Duration = Duration::from_secs(10);

/// A kubelet of a node `name`, which reaches the cluster through `client`.
pub struct Kubelet {
    pub client: Arc<dyn Client>,
    pub clock: Clock,
    pub name: String,
    pub seed: u64,
    /// Longest time that a pod takes to start or to stop.
    pub slowness: Duration,
}

impl Kubelet {
    /// Registers the node and follows its pods. `silent` ends its signs of life, not its pods.
    /// Must be called within a tokio runtime.
    pub fn start(self, silent: CancellationToken) {
        let kubelet = Arc::new(self);
        tokio::spawn(async move {
            kubelet.register().await;
            tokio::spawn(kubelet.clone().renew(silent));
            kubelet.follow().await;
        });
    }

    /// A number of the node's own.
    fn number(&self) -> u64 {
        self.name.bytes().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)))
    }

    async fn register(&self) {
        let now = time::format_seconds(self.clock.now());
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": self.name, "labels": { "kubernetes.io/hostname": self.name } },
            "status": {
                "addresses": [{ "type": "InternalIP", "address": format!("10.0.0.{}", self.number() % 250 + 1) }],
                "capacity": { "cpu": "16", "memory": "64Gi", "pods": "110" },
                "allocatable": { "cpu": "16", "memory": "64Gi", "pods": "110" },
                "conditions": [{ "type": "Ready", "status": "True", "lastHeartbeatTime": now, "lastTransitionTime": now }],
            },
        });
        let created = self.client.create(Target::collection(Kind::of::<Node>(), ""), node).await;
        created.expect("a node can be registered");
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": self.name, "namespace": LEASES },
            "spec": { "holderIdentity": self.name, "renewTime": time::format_micros(self.clock.now()) },
        });
        let created = self.client.create(Target::collection(Kind::of::<Lease>(), LEASES), lease).await;
        created.expect("a lease can be made");
    }

    /// Goes on with the signs of life of a node that was silent. Must be called within a tokio runtime.
    pub(super) fn revive(self, silent: CancellationToken) {
        tokio::spawn(async move {
            let ready = json!({ "type": "Ready", "status": "True", "lastHeartbeatTime": time::format_seconds(self.clock.now()) });
            let patch = Patch::Strategic(json!({ "status": { "conditions": [ready] } }));
            let node = Target::object(Kind::of::<Node>(), "", &self.name).sub("status");
            self.client.patch(node, patch).await.expect("the node is there");
            Arc::new(self).renew(silent).await;
        });
    }

    async fn renew(self: Arc<Kubelet>, silent: CancellationToken) {
        let lease = Target::object(Kind::of::<Lease>(), LEASES, &self.name);
        loop {
            tokio::select! { () = silent.cancelled() => return, () = tokio::time::sleep(LEASE_PERIOD) => {} }
            let now = time::format_micros(self.clock.now());
            let _ = self.client.patch(lease, Patch::Merge(json!({ "spec": { "renewTime": now } }))).await;
        }
    }

    async fn follow(self: Arc<Kubelet>) {
        let mut rng = StdRng::seed_from_u64(self.seed ^ self.number());
        let fields = FieldSelector::parse(Kind::of::<Pod>(), &format!("spec.nodeName={}", self.name))
            .expect("a selector");
        let informers = Informers::new(self.client.clone(), CancellationToken::new());
        let mut changes = informers.selected(Kind::of::<Pod>(), fields).subscribe();
        let (mut started, mut stopping) = (HashSet::new(), HashSet::new());
        while let Some(change) = changes.recv().await {
            let Some(pod) = change.new else { continue };
            let uid = pod.uid().to_owned();
            let pause = self.slowness.mul_f64(rng.random_range(0.1..1.0));
            if pod.deleted().is_some() {
                if stopping.insert(uid) {
                    tokio::spawn(stop(self.client.clone(), self.clock, pod, pause));
                }
            } else if started.insert(uid) {
                let address = format!("10.244.{}.{}", self.number() % 250, started.len());
                tokio::spawn(run(self.client.clone(), self.clock, pod, address, pause));
            }
        }
    }
}

async fn stop(client: Arc<dyn Client>, clock: Clock, pod: Arc<Object>, pause: Duration) {
    tokio::time::sleep(pause).await;
    if !matches!(pod.field("status.phase"), Some("Succeeded" | "Failed")) {
        // What was stopped has not succeeded.
        let status = ended(&pod, 137, &time::format_seconds(clock.now()));
        let patch = Patch::Strategic(json!({ "metadata": { "uid": pod.uid() }, "status": status }));
        let _ = client.patch(Target::of(&pod).sub("status"), patch).await;
    }
    let options =
        DeleteOptions { grace_period: Some(0), uid: Some(pod.uid().to_owned()), ..DeleteOptions::default() };
    // What keeps the pod now is not the kubelet's business.
    let _ = client.delete(Target::of(&pod), options).await;
}

/// The status of a pod whose container has ended with `code`.
fn ended(pod: &Object, code: i32, now: &str) -> Value {
    let spec = pod.value()["spec"]["containers"][0].take();
    let state = json!({ "terminated": { "exitCode": code, "finishedAt": now } });
    let container = json!({ "name": spec["name"], "state": state, "image": spec["image"], "imageID": "", "ready": false, "restartCount": 0 });
    let ready = json!({ "type": "Ready", "status": "False", "lastTransitionTime": now });
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    json!({ "phase": phase, "conditions": [ready], "containerStatuses": [container] })
}

async fn run(client: Arc<dyn Client>, clock: Clock, pod: Arc<Object>, address: String, pause: Duration) {
    tokio::time::sleep(pause).await;
    let spec = pod.value();
    let image = spec["spec"]["containers"][0]["image"].as_str().unwrap_or_default().to_owned();
    let now = || time::format_seconds(clock.now());
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
    let code = match image.as_str() {
        "once" => Some(0),
        "fails" => Some(1),
        other => other.strip_prefix("exit-").and_then(|code| code.parse().ok()),
    };
    if let Some(code) = code {
        tokio::time::sleep(pause).await;
        let _ = write(ended(&pod, code, &now())).await;
    }
}
