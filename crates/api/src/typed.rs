//! The types of k8s-openapi that this program reads from JSON and prints as JSON.
//!
//! The code for it is large (a Pod takes hundreds of functions), and serde would have it made anew by each crate that
//! asks. Here it is made once, and the other crates call it.

use k8s_openapi::api::{
    apps::v1 as apps, autoscaling::v2 as autoscaling, batch::v1 as batch, certificates::v1 as certificates,
    coordination::v1 as coordination, core::v1 as core, discovery::v1 as discovery, policy::v1 as policy,
    rbac::v1 as rbac, scheduling::v1 as scheduling, storage::v1 as storage,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use serde_json::Value;

/// A type of k8s-openapi, an object or a part of one, with a row in this module's table.
pub trait ApiType: Send + Sync + Sized + 'static {
    fn from_json(json: &[u8]) -> Result<Self, serde_json::Error>;

    /// By way of text: code that reads trees would be as large again.
    fn from_value(value: &Value) -> Result<Self, serde_json::Error> {
        Self::from_json(&serde_json::to_vec(value)?)
    }

    fn to_value(&self) -> Value;
}

macro_rules! api_types {
    ($($type:ty),* $(,)?) => {$(
        impl ApiType for $type {
            fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
                serde_json::from_slice(json)
            }

            fn to_value(&self) -> Value {
                serde_json::to_value(self).expect("the types of k8s-openapi all serialise")
            }
        }
    )*};
}

api_types! {
    apps::ControllerRevision,
    apps::DaemonSet, apps::DaemonSetStatus,
    apps::Deployment, apps::DeploymentStatus,
    apps::ReplicaSet, apps::ReplicaSetStatus,
    apps::StatefulSet, apps::StatefulSetStatus,
    autoscaling::HorizontalPodAutoscaler, autoscaling::HorizontalPodAutoscalerSpec,
    autoscaling::HorizontalPodAutoscalerStatus,
    batch::CronJob, batch::CronJobStatus,
    batch::Job, batch::JobSpec, batch::JobStatus,
    certificates::CertificateSigningRequest, certificates::CertificateSigningRequestStatus,
    certificates::ClusterTrustBundle,
    certificates::PodCertificateRequest,
    coordination::Lease,
    core::ConfigMap,
    core::Container, core::EphemeralContainer,
    core::Endpoints,
    core::Event,
    core::Namespace, core::NamespaceStatus,
    core::Node, core::NodeSpec, core::NodeStatus,
    core::ObjectReference,
    core::PersistentVolume, core::PersistentVolumeStatus,
    core::PersistentVolumeClaim, core::PersistentVolumeClaimStatus,
    core::Pod, core::PodSpec, core::PodStatus, core::PodTemplateSpec,
    core::ReplicationController, core::ReplicationControllerStatus,
    core::Secret,
    core::Service, core::ServiceStatus,
    core::ServiceAccount,
    discovery::EndpointSlice, Vec<discovery::Endpoint>,
    meta::LabelSelector,
    policy::PodDisruptionBudget, policy::PodDisruptionBudgetStatus,
    rbac::ClusterRole, rbac::ClusterRoleBinding, rbac::Role, rbac::RoleBinding, Vec<rbac::PolicyRule>,
    scheduling::PriorityClass,
    storage::StorageClass,
}
