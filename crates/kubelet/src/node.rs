//! The Node object of this machine: registered at the start, kept current, and its lease renewed.
//!
//! As upstream: every 10 s the status is worked out, and written when it differs or after 5 min, if nothing else is
//! set; the lease is what says in between that the node lives.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1 as coordination;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use minke_api::{ApiType, Kind, Object, Status};
use minke_client::{Informer, Patch, Target};
use minke_runtime::ContainerState;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::machine::{self, Machine};
use crate::oom;
use crate::qos;

const LEASE_NAMESPACE: &str = "kube-node-lease";

/// Reason and message of a condition.
type Words = (&'static str, &'static str);

/// Conditions that tell what runs short; what they say when nothing does, and when it does.
const PRESSURES: [(&str, Words, Words); 3] = [
    (
        "MemoryPressure",
        ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
    ),
    (
        "DiskPressure",
        ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ("KubeletHasDiskPressure", "kubelet has disk pressure"),
    ),
    (
        "PIDPressure",
        ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
    ),
];

/// What a node says of itself besides what its machine is.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    pub labels: BTreeMap<String, String>,
    /// Addresses of pods on this node, when this agent is what gives them to the node.
    pub pod_cidr: Option<String>,
    /// The port of the HTTPS server.
    pub port: u16,
}

pub struct Node {
    context: Arc<Context>,
    machine: Machine,
    identity: Identity,
    /// This node, as the API server has it.
    nodes: Arc<Informer>,
}

impl Node {
    pub fn new(context: Arc<Context>, machine: Machine, identity: Identity, nodes: Arc<Informer>) -> Node {
        Node { context, machine, identity, nodes }
    }

    fn target(&self) -> Target<'_> {
        Target::object(Kind::of::<core::Node>(), "", &self.context.node_name)
    }

    /// Registers the node and keeps it current until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let events = self.context.events.clone();
        events.node(true, "Starting", "Starting kubelet.");
        let work = async {
            let node = self.register().await;
            tokio::join!(
                self.keep_status(node.clone()),
                self.keep_lease(node),
                self.keep_logs(),
                oom::follow(&self.context.events),
                qos::hold(&self.context),
            );
        };
        tokio::select! { () = work => {}, () = stop.cancelled() => {} }
    }

    /// Creates the node, or makes the one there is ours; goes on until it has worked.
    async fn register(&self) -> Arc<Object> {
        for failures in 0.. {
            match self.try_register().await {
                Ok(node) => return node,
                Err(error) => {
                    tracing::warn!(node = self.context.node_name, %error, "Node not registered yet")
                }
            }
            let pause = minke_client::backoff(Duration::from_millis(50), Duration::from_secs(7), failures);
            tokio::time::sleep(pause).await;
        }
        unreachable!("the loop has no end")
    }

    async fn try_register(&self) -> Result<Arc<Object>, Status> {
        let client = &self.context.client;
        let wanted = self.object(Timestamp::now()).await;
        let known = match client.get(self.target()).await {
            Ok(known) => known,
            Err(error) if error.is_not_found() => {
                let collection = Target::collection(Kind::of::<core::Node>(), "");
                let node = client.create(collection, wanted.to_value()).await?;
                self.tell_conditions();
                tracing::info!(node = self.context.node_name, "Registered node");
                return Ok(node);
            }
            Err(error) => return Err(error),
        };
        let mut change = json!({"metadata": {"labels": wanted.metadata.labels, "annotations": wanted.metadata.annotations}});
        let typed: Option<Arc<core::Node>> = minke_client::typed(&known);
        let spec = typed.as_ref().and_then(|node| node.spec.as_ref());
        if self.identity.pod_cidr.is_some() && spec.is_none_or(|spec| spec.pod_cidr.is_none()) {
            let spec = wanted.spec.as_ref();
            // Taints are only for a node that is new.
            change["spec"] = json!({"podCIDR": spec.and_then(|spec| spec.pod_cidr.as_ref()),
                "podCIDRs": spec.and_then(|spec| spec.pod_cidrs.as_ref())});
        }
        let node = client.patch(self.target(), Patch::Merge(change)).await?;
        let info = typed.as_ref().and_then(|node| node.status.as_ref()?.node_info.as_ref());
        if let Some(info) = info
            && info.boot_id != self.machine.boot_id
        {
            let message = format!(
                "Node {} has been rebooted, boot id: {}",
                self.context.node_name, self.machine.boot_id
            );
            self.context.events.node(false, "Rebooted", message);
        }
        Ok(node)
    }

    fn tell_conditions(&self) {
        let name = &self.context.node_name;
        for reason in ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"] {
            self.context.events.node(true, reason, format!("Node {name} status is now: {reason}"));
        }
        self.context.events.node(true, "NodeReady", format!("Node {name} status is now: NodeReady"));
    }

    async fn object(&self, now: Timestamp) -> core::Node {
        let name = &self.context.node_name;
        let arch = machine::architecture();
        let mut labels = BTreeMap::from(
            [
                ("kubernetes.io/hostname", name.as_str()),
                ("kubernetes.io/os", "linux"),
                ("kubernetes.io/arch", arch),
                ("beta.kubernetes.io/os", "linux"),
                ("beta.kubernetes.io/arch", arch),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        labels.extend(self.identity.labels.clone());
        let attach = "volumes.kubernetes.io/controller-managed-attach-detach".to_owned();
        core::Node {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(labels),
                annotations: Some(BTreeMap::from([(attach, "true".to_owned())])),
                ..ObjectMeta::default()
            },
            spec: Some(core::NodeSpec {
                pod_cidr: self.identity.pod_cidr.clone(),
                pod_cidrs: self.identity.pod_cidr.clone().map(|cidr| vec![cidr]),
                taints: Some(self.context.settings.taints.clone()).filter(|taints| !taints.is_empty()),
                ..core::NodeSpec::default()
            }),
            status: Some(self.status(&[], now).await),
        }
    }

    /// The status as of `now`; `known` are the conditions so far, for the times of their changes.
    async fn status(&self, known: &[core::NodeCondition], now: Timestamp) -> core::NodeStatus {
        let condition = |type_: &str, status: &str, reason: &str, message: &str| {
            let before = known.iter().find(|known| known.type_ == type_ && known.status == status);
            core::NodeCondition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
                last_heartbeat_time: Some(Time(now)),
                last_transition_time: Some(
                    before.and_then(|c| c.last_transition_time.clone()).unwrap_or(Time(now)),
                ),
            }
        };
        let pressure = |at: usize| {
            let (type_, well, short) = PRESSURES[at];
            match self.context.pressure.has(type_) {
                true => condition(type_, "True", short.0, short.1),
                false => condition(type_, "False", well.0, well.1),
            }
        };
        let address = |type_: &str, address: String| core::NodeAddress { type_: type_.to_owned(), address };
        core::NodeStatus {
            addresses: Some(vec![
                address("InternalIP", self.context.node_ip.to_string()),
                address("Hostname", self.context.node_name.clone()),
            ]),
            capacity: Some(machine::quantities(&self.machine.capacity())),
            allocatable: Some(machine::quantities(&self.context.allocatable)),
            conditions: Some(vec![
                pressure(0),
                pressure(1),
                pressure(2),
                condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
            ]),
            daemon_endpoints: Some(core::NodeDaemonEndpoints {
                kubelet_endpoint: Some(core::DaemonEndpoint { port: self.identity.port.into() }),
            }),
            images: Some(self.images().await),
            node_info: Some(self.machine.node_info(&self.context.version, self.context.runtime.version())),
            runtime_handlers: Some(self.runtime_handlers()),
            features: Some(core::NodeFeatures { supplemental_groups_policy: Some(true) }),
            ..core::NodeStatus::default()
        }
    }

    fn runtime_handlers(&self) -> Vec<core::NodeRuntimeHandler> {
        let shown = |handler: minke_runtime::Handler| core::NodeRuntimeHandler {
            name: Some(handler.name),
            features: Some(core::NodeRuntimeHandlerFeatures {
                recursive_read_only_mounts: Some(handler.recursive_read_only_mounts),
                user_namespaces: Some(handler.user_namespaces),
            }),
        };
        self.context.runtime.handlers().into_iter().map(shown).collect()
    }

    async fn images(&self) -> Vec<core::ContainerImage> {
        let mut images = match self.context.images.service.list().await {
            Ok(images) => images,
            Err(error) => {
                tracing::warn!(%error, "Images not listed");
                vec![]
            }
        };
        images.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
        let most = self.context.settings.images_told.unwrap_or(usize::MAX);
        let shown = images.into_iter().take(most).map(|image| core::ContainerImage {
            // At most five names of one image, as upstream.
            names: Some(image.digests.into_iter().chain(image.tags).take(5).collect()),
            size_bytes: i64::try_from(image.size).ok(),
        });
        shown.collect()
    }

    async fn keep_status(&self, node: Arc<Object>) {
        let mut node = node;
        let mut reported: Option<Timestamp> = None;
        let report_every = SignedDuration::try_from(self.context.settings.report_every);
        let report_every = report_every.unwrap_or(SignedDuration::MAX);
        let mut schedulable = true;
        let mut ticks = tokio::time::interval(self.context.settings.status_every);
        let mut pressure = self.context.pressure.changes();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                // At once, so that no more pods are sent here.
                Ok(()) = pressure.changed() => {}
            }
            let now = Timestamp::now();
            self.tell_schedulable(&mut schedulable);
            let typed: Option<Arc<core::Node>> = minke_client::typed(&node);
            let known = typed.as_ref().and_then(|node| node.status.clone()).unwrap_or_default();
            let conditions = known.conditions.clone().unwrap_or_default();
            let status = self.status(&conditions, now).await;
            let due = reported.is_none_or(|at| now.duration_since(at) >= report_every);
            if !due && without_heartbeats(&status) == without_heartbeats(&known) {
                continue;
            }
            for (type_, (well, _), (short, _)) in PRESSURES {
                let was = conditions.iter().any(|c| c.type_ == type_ && c.status == "True");
                let is = self.context.pressure.has(type_);
                if was != is {
                    let reason = if is { short } else { well }.replace("Kubelet", "Node");
                    let message = format!("Node {} status is now: {reason}", self.context.node_name);
                    self.context.events.node(true, reason, message);
                }
            }
            let was_ready = conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
            match self.write_status(&status, &known).await {
                Ok(object) => {
                    node = object;
                    reported = Some(now);
                    if !was_ready {
                        let message = format!("Node {} status is now: NodeReady", self.context.node_name);
                        self.context.events.node(true, "NodeReady", message);
                    }
                }
                Err(error) if error.is_not_found() => node = self.register().await,
                Err(error) => tracing::warn!(%error, "Node status not written"),
            }
        }
    }

    /// Tells when somebody has cordoned the node, and when it is open for pods again.
    fn tell_schedulable(&self, was: &mut bool) {
        let name = &self.context.node_name;
        let node: Option<Arc<core::Node>> =
            self.nodes.get("", name).and_then(|node| minke_client::typed(&node));
        let Some(node) = node else { return };
        let is = node.spec.as_ref().is_none_or(|spec| spec.unschedulable != Some(true));
        if std::mem::replace(was, is) != is {
            let reason = if is { "NodeSchedulable" } else { "NodeNotSchedulable" };
            self.context.events.node(true, reason, format!("Node {name} status is now: {reason}"));
        }
    }

    async fn write_status(
        &self,
        status: &core::NodeStatus,
        known: &core::NodeStatus,
    ) -> Result<Arc<Object>, Status> {
        let mut body = status.to_value();
        // Addresses merge by their type, which is no real key: they are replaced when they change.
        if known.addresses.is_some()
            && known.addresses != status.addresses
            && let Some(list) = body["addresses"].as_array_mut()
        {
            list.push(json!({"$patch": "replace"}));
        }
        self.context
            .client
            .patch(self.target().sub("status"), Patch::Strategic(json!({"status": body})))
            .await
    }

    async fn keep_logs(&self) {
        let mut ticks = tokio::time::interval(self.context.settings.log_look_every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.rotate_logs().await;
        }
    }

    async fn rotate_logs(&self) {
        let Ok(sandboxes) = self.context.runtime.list().await else { return };
        let containers = sandboxes.iter().flat_map(|sandbox| &sandbox.containers);
        for container in containers.filter(|container| container.state == ContainerState::Running) {
            let rotated = crate::logs::rotate(
                &*self.context.runtime,
                &self.context.settings,
                &container.id,
                &container.log_path,
            )
            .await;
            if let Err(error) = rotated {
                tracing::warn!(container = container.id, %error, "Log not rotated");
            }
        }
    }

    async fn keep_lease(&self, node: Arc<Object>) {
        // As upstream: four times as often as it takes for the lease to run out.
        let seconds = f64::from(self.context.settings.lease_seconds);
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(seconds / 4.0));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.renew_lease(&node).await {
                tracing::warn!(%error, "Node lease not renewed");
            }
        }
    }

    async fn renew_lease(&self, node: &Object) -> Result<(), Status> {
        let kind = Kind::of::<coordination::Lease>();
        let name = &self.context.node_name;
        let now = MicroTime(Timestamp::now());
        let target = Target::object(kind, LEASE_NAMESPACE, name);
        let change = json!({"spec": {
            "holderIdentity": name, "leaseDurationSeconds": self.context.settings.lease_seconds, "renewTime": now,
        }});
        match self.context.client.patch(target, Patch::Merge(change)).await {
            Err(error) if error.is_not_found() => {}
            result => return result.map(drop),
        }
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.clone(),
            uid: node.uid().to_owned(),
            ..OwnerReference::default()
        };
        let lease = coordination::Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some(LEASE_NAMESPACE.to_owned()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            spec: Some(coordination::LeaseSpec {
                holder_identity: Some(name.clone()),
                lease_duration_seconds: Some(self.context.settings.lease_seconds),
                renew_time: Some(now),
                ..coordination::LeaseSpec::default()
            }),
        };
        let collection = Target::collection(kind, LEASE_NAMESPACE);
        self.context.client.create(collection, lease.to_value()).await.map(drop)
    }
}

/// What of a status is compared: all but when it was looked at, and what others put into it.
fn without_heartbeats(status: &core::NodeStatus) -> Value {
    let mut ours = core::NodeStatus {
        volumes_attached: None,
        volumes_in_use: None,
        phase: None,
        config: None,
        ..status.clone()
    };
    for condition in ours.conditions.iter_mut().flatten() {
        condition.last_heartbeat_time = None;
    }
    ours.to_value()
}
