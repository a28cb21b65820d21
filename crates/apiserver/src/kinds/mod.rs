//! The kinds that behave: which file holds the strategy of which kind.

mod batch;
pub mod certificates;
pub mod check;
mod container_validation;
mod core;
#[cfg(test)]
mod defaults_tests;
mod networking;
pub mod pod;
pub mod pod_certificate;
mod pod_resources;
mod pod_spec;
mod pod_validation;
mod pod_warnings;
mod policy;
mod quota;
pub mod resources;
mod restart_validation;
mod service;
mod storage;
pub mod tree;
pub mod trust_bundle;
mod volume_validation;
mod workloads;

use minke_api::Kind;

use crate::strategy::Strategy;

static PLAIN: Strategy = Strategy::PLAIN;

/// The priority classes that every cluster has, and their values.
pub const SYSTEM_PRIORITIES: [(&str, i64); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

/// The strategy of `kind`, a row under which objects are stored; those not named here are plain.
#[rustfmt::skip]
pub fn strategy(kind: &'static Kind) -> &'static Strategy {
    match (kind.group, kind.kind) {
        ("", "ConfigMap") => &core::CONFIG_MAP,
        ("", "Endpoints") => &core::ENDPOINTS,
        ("", "Event") => &core::EVENT,
        ("", "LimitRange") => &core::LIMIT_RANGE,
        ("", "Namespace") => &core::NAMESPACE,
        ("", "Node") => &core::NODE,
        ("", "PersistentVolume") => &storage::PERSISTENT_VOLUME,
        ("", "PersistentVolumeClaim") => &storage::PERSISTENT_VOLUME_CLAIM,
        ("", "Pod") => &pod::POD,
        ("", "PodTemplate") => &pod::POD_TEMPLATE,
        ("", "ReplicationController") => &workloads::REPLICATION_CONTROLLER,
        ("", "ResourceQuota") => &quota::RESOURCE_QUOTA,
        ("", "Secret") => &core::SECRET,
        ("", "Service") => &service::SERVICE,
        ("", "ServiceAccount") => &core::SERVICE_ACCOUNT,
        ("apps", "ControllerRevision") => &workloads::CONTROLLER_REVISION,
        ("apps", "DaemonSet") => &workloads::DAEMON_SET,
        ("apps", "Deployment") => &workloads::DEPLOYMENT,
        ("apps", "ReplicaSet") => &workloads::REPLICA_SET,
        ("apps", "StatefulSet") => &workloads::STATEFUL_SET,
        ("autoscaling", "HorizontalPodAutoscaler") => &policy::HORIZONTAL_POD_AUTOSCALER,
        ("batch", "CronJob") => &batch::CRON_JOB,
        ("batch", "Job") => &batch::JOB,
        ("certificates.k8s.io", "CertificateSigningRequest") => &certificates::REQUEST,
        ("certificates.k8s.io", "ClusterTrustBundle") => &trust_bundle::TRUST_BUNDLE,
        ("certificates.k8s.io", "PodCertificateRequest") => &pod_certificate::REQUEST,
        ("coordination.k8s.io", "Lease") => &policy::LEASE,
        ("discovery.k8s.io", "EndpointSlice") => &networking::ENDPOINT_SLICE,
        ("networking.k8s.io", "Ingress") => &networking::INGRESS,
        ("networking.k8s.io", "IngressClass") => &networking::INGRESS_CLASS,
        ("networking.k8s.io", "IPAddress") => &networking::IP_ADDRESS,
        ("networking.k8s.io", "NetworkPolicy") => &networking::NETWORK_POLICY,
        ("networking.k8s.io", "ServiceCIDR") => &networking::SERVICE_CIDR,
        ("node.k8s.io", "RuntimeClass") => &policy::RUNTIME_CLASS,
        ("policy", "PodDisruptionBudget") => &policy::POD_DISRUPTION_BUDGET,
        ("rbac.authorization.k8s.io", "ClusterRole") => &policy::CLUSTER_ROLE,
        ("rbac.authorization.k8s.io", "ClusterRoleBinding") => &policy::CLUSTER_ROLE_BINDING,
        ("rbac.authorization.k8s.io", "Role") => &policy::ROLE,
        ("rbac.authorization.k8s.io", "RoleBinding") => &policy::ROLE_BINDING,
        ("scheduling.k8s.io", "PriorityClass") => &policy::PRIORITY_CLASS,
        ("storage.k8s.io", "CSIDriver") => &storage::CSI_DRIVER,
        ("storage.k8s.io", "CSINode") => &storage::CSI_NODE,
        ("storage.k8s.io", "CSIStorageCapacity") => &storage::CSI_STORAGE_CAPACITY,
        ("storage.k8s.io", "StorageClass") => &storage::STORAGE_CLASS,
        ("storage.k8s.io", "VolumeAttachment") => &storage::VOLUME_ATTACHMENT,
        ("storage.k8s.io", "VolumeAttributesClass") => &storage::VOLUME_ATTRIBUTES_CLASS,
        _ => &PLAIN,
    }
}
