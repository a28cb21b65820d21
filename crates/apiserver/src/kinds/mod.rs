//! The kinds that behave: which file holds the strategy of which kind.

pub mod check;
mod batch;
mod container_validation;
mod core;
mod networking;
pub mod pod;
mod pod_spec;
mod pod_validation;
mod pod_warnings;
mod policy;
pub mod resources;
mod service;
mod storage;
pub mod tree;
mod volume_validation;
mod workloads;

use minke_api::Kind;

use crate::strategy::Strategy;

static PLAIN: Strategy = Strategy::PLAIN;

/// The priority classes that every cluster has, and their values.
pub const SYSTEM_PRIORITIES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

/// The strategy of `kind`; those not named here are plain.
#[rustfmt::skip]
pub fn strategy(kind: &'static Kind) -> &'static Strategy {
    match (kind.group, kind.version, kind.kind) {
        ("", _, "ConfigMap") => &core::CONFIG_MAP,
        ("", _, "Endpoints") => &core::ENDPOINTS,
        ("", _, "Event") => &core::EVENT,
        ("", _, "LimitRange") => &core::LIMIT_RANGE,
        ("", _, "Namespace") => &core::NAMESPACE,
        ("", _, "Node") => &core::NODE,
        ("", _, "PersistentVolume") => &storage::PERSISTENT_VOLUME,
        ("", _, "PersistentVolumeClaim") => &storage::PERSISTENT_VOLUME_CLAIM,
        ("", _, "Pod") => &pod::POD,
        ("", _, "PodTemplate") => &pod::POD_TEMPLATE,
        ("", _, "ReplicationController") => &workloads::REPLICATION_CONTROLLER,
        ("", _, "ResourceQuota") => &core::RESOURCE_QUOTA,
        ("", _, "Secret") => &core::SECRET,
        ("", _, "Service") => &service::SERVICE,
        ("", _, "ServiceAccount") => &core::SERVICE_ACCOUNT,
        ("apps", _, "ControllerRevision") => &workloads::CONTROLLER_REVISION,
        ("apps", _, "DaemonSet") => &workloads::DAEMON_SET,
        ("apps", _, "Deployment") => &workloads::DEPLOYMENT,
        ("apps", _, "ReplicaSet") => &workloads::REPLICA_SET,
        ("apps", _, "StatefulSet") => &workloads::STATEFUL_SET,
        ("autoscaling", "v1", "HorizontalPodAutoscaler") => &policy::OLD_HORIZONTAL_POD_AUTOSCALER,
        ("autoscaling", _, "HorizontalPodAutoscaler") => &policy::HORIZONTAL_POD_AUTOSCALER,
        ("batch", _, "CronJob") => &batch::CRON_JOB,
        ("batch", _, "Job") => &batch::JOB,
        ("coordination.k8s.io", _, "Lease") => &policy::LEASE,
        ("discovery.k8s.io", _, "EndpointSlice") => &networking::ENDPOINT_SLICE,
        ("events.k8s.io", _, "Event") => &core::NEW_EVENT,
        ("networking.k8s.io", _, "Ingress") => &networking::INGRESS,
        ("networking.k8s.io", _, "IngressClass") => &networking::INGRESS_CLASS,
        ("networking.k8s.io", _, "IPAddress") => &networking::IP_ADDRESS,
        ("networking.k8s.io", _, "NetworkPolicy") => &networking::NETWORK_POLICY,
        ("networking.k8s.io", _, "ServiceCIDR") => &networking::SERVICE_CIDR,
        ("node.k8s.io", _, "RuntimeClass") => &policy::RUNTIME_CLASS,
        ("policy", _, "PodDisruptionBudget") => &policy::POD_DISRUPTION_BUDGET,
        ("rbac.authorization.k8s.io", _, "ClusterRole") => &policy::CLUSTER_ROLE,
        ("rbac.authorization.k8s.io", _, "ClusterRoleBinding") => &policy::CLUSTER_ROLE_BINDING,
        ("rbac.authorization.k8s.io", _, "Role") => &policy::ROLE,
        ("rbac.authorization.k8s.io", _, "RoleBinding") => &policy::ROLE_BINDING,
        ("scheduling.k8s.io", _, "PriorityClass") => &policy::PRIORITY_CLASS,
        ("storage.k8s.io", _, "CSIDriver") => &storage::CSI_DRIVER,
        ("storage.k8s.io", _, "CSINode") => &storage::CSI_NODE,
        ("storage.k8s.io", _, "CSIStorageCapacity") => &storage::CSI_STORAGE_CAPACITY,
        ("storage.k8s.io", _, "StorageClass") => &storage::STORAGE_CLASS,
        ("storage.k8s.io", _, "VolumeAttachment") => &storage::VOLUME_ATTACHMENT,
        ("storage.k8s.io", _, "VolumeAttributesClass") => &storage::VOLUME_ATTRIBUTES_CLASS,
        _ => &PLAIN,
    }
}
