//! The controllers: each keeps one thing about the cluster true.
//!
//! A controller is a file that decides (a pure `plan`) and acts (a dull executor), and a row in [`CONTROLLERS`].
//! What all of them share (queue, back-off, one worker per key, waiting until the cache shows one's own
//! writes, recovery from panics, spans) is [`run()`]. Nothing here polls: an object that changes queues keys,
//! and what depends on time is queued for that time.
#![forbid(unsafe_code)]

mod certificates;
mod clusterrole_aggregation;
mod context;
mod cronjob;
mod daemonset;
mod deployment;
mod disruption;
mod endpoints;
mod endpointslice;
mod endpointslice_mirroring;
mod ephemeral_volume;
mod garbage_collector;
mod hpa;
mod job;
mod namespace;
mod node_lifecycle;
mod node_zones;
mod persistent_volume;
mod pod_certificate_requests;
mod pod_gc;
mod pods;
mod replicaset;
mod revisions;
mod rollout;
mod root_ca;
mod run;
mod service_lb;
mod serviceaccount;
mod services;
mod serving_bundle;
mod statefulset;
mod taint_eviction;
mod token_secrets;
mod ttl_after_finished;
mod volume_protection;

pub use certificates::{Authority, AuthorityError};
pub use hpa::Settings as AutoscalerSettings;
pub use run::run;

use std::sync::Arc;
use std::time::Duration;

use minke_client::Clock;
use run::Row;
use tokio::sync::watch;

/// What the controllers need to know of the cluster. The default is upstream's.
#[derive(Debug, Clone)]
pub struct Config {
    /// The certificates that pods verify the API server with, as PEM.
    pub root_ca: String,
    /// Signs what is approved of certificates.k8s.io; without it, somebody else does.
    pub authority: Option<Arc<Authority>>,
    pub clock: Clock,
    /// Changes when the machine's clock was set, or the machine slept: what waits for a time is then looked at anew.
    pub clock_set: watch::Receiver<()>,
    /// How long a node may be silent before it counts as unreachable.
    pub node_monitor_grace: Duration,
    /// How long a new node may take until its first heartbeat.
    pub node_startup_grace: Duration,
    /// Finished pods in the cluster above which the oldest are deleted; 0 keeps all.
    pub terminated_pods_max: usize,
    /// Reconciles of one controller that run at once.
    pub workers: usize,
    pub autoscalers: AutoscalerSettings,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            root_ca: String::new(),
            authority: None,
            clock: Clock::System,
            clock_set: watch::channel(()).1,
            node_monitor_grace: Duration::from_secs(50),
            node_startup_grace: Duration::from_secs(60),
            terminated_pods_max: 12_500,
            workers: 5,
            autoscalers: AutoscalerSettings::default(),
        }
    }
}

/// The service accounts of kube-system that the controllers act as.
pub fn accounts() -> impl Iterator<Item = &'static str> {
    let mut accounts: Vec<&'static str> = CONTROLLERS.iter().map(|row| row.account).collect();
    accounts.sort_unstable();
    accounts.dedup();
    accounts.into_iter()
}

/// Every controller: its name, the service account of kube-system it acts as, the component its events
/// name, and how it is made.
#[rustfmt::skip]
static CONTROLLERS: &[Row] = &[
    Row { name: "deployment", account: "deployment-controller", component: "deployment-controller", make: |_| Box::new(deployment::Deployments) },
    Row { name: "replicaset", account: "replicaset-controller", component: "replicaset-controller", make: |_| Box::new(replicaset::Sets(&replicaset::REPLICA_SETS)) },
    Row { name: "replicationcontroller", account: "replication-controller", component: "replication-controller", make: |_| Box::new(replicaset::Sets(&replicaset::REPLICATION_CONTROLLERS)) },
    Row { name: "daemonset", account: "daemon-set-controller", component: "daemonset-controller", make: |_| Box::new(daemonset::DaemonSets::default()) },
    Row { name: "statefulset", account: "statefulset-controller", component: "statefulset-controller", make: |_| Box::new(statefulset::StatefulSets) },
    Row { name: "job", account: "job-controller", component: "job-controller", make: |_| Box::<job::Jobs>::default() },
    Row { name: "cronjob", account: "cronjob-controller", component: "cronjob-controller", make: |_| Box::new(cronjob::CronJobs) },
    Row { name: "horizontal-pod-autoscaler", account: "horizontal-pod-autoscaler", component: "horizontal-pod-autoscaler", make: |config| Box::new(hpa::Autoscalers::new(config.autoscalers.clone())) },
    Row { name: "ttl-after-finished", account: "ttl-after-finished-controller", component: "ttl-after-finished-controller", make: |_| Box::new(ttl_after_finished::TtlAfterFinished) },
    Row { name: "disruption", account: "disruption-controller", component: "controllermanager", make: |_| Box::<disruption::Disruption>::default() },
    Row { name: "endpoints", account: "endpoint-controller", component: "endpoint-controller", make: |_| Box::new(endpoints::EndpointsController::default()) },
    Row { name: "endpointslice", account: "endpointslice-controller", component: "endpoint-slice-controller", make: |_| Box::new(endpointslice::EndpointSlices::default()) },
    Row { name: "endpointslice-mirroring", account: "endpointslicemirroring-controller", component: "endpoint-slice-mirroring-controller", make: |_| Box::new(endpointslice_mirroring::Mirroring) },
    Row { name: "service-lb", account: "service-controller", component: "service-controller", make: |_| Box::new(service_lb::ServiceLb) },
    Row { name: "namespace", account: "namespace-controller", component: "namespace-controller", make: |_| Box::new(namespace::Namespaces) },
    Row { name: "serviceaccount", account: "service-account-controller", component: "service-account-controller", make: |_| Box::new(serviceaccount::ServiceAccounts) },
    Row { name: "serviceaccount-token", account: "generic-garbage-collector", component: "serviceaccount-token-controller", make: |_| Box::new(token_secrets::TokenSecrets) },
    Row { name: "root-ca-certificate-publisher", account: "root-ca-cert-publisher", component: "root-ca-cert-publisher", make: |config| Box::new(root_ca::RootCa { pem: config.root_ca.clone() }) },
    Row { name: "garbage-collector", account: "generic-garbage-collector", component: "garbage-collector-controller", make: |_| Box::new(garbage_collector::GarbageCollector::default()) },
    Row { name: "node-lifecycle", account: "node-controller", component: "node-controller", make: |config| Box::new(node_lifecycle::NodeLifecycle::new(config)) },
    Row { name: "taint-eviction", account: "node-controller", component: "taint-eviction-controller", make: |_| Box::<taint_eviction::TaintEviction>::default() },
    Row { name: "pod-garbage-collector", account: "pod-garbage-collector", component: "pod-garbage-collector", make: |config| Box::new(pod_gc::PodGc::new(config)) },
    Row { name: "persistentvolume-binder", account: "persistent-volume-binder", component: "persistentvolume-controller", make: |_| Box::new(persistent_volume::Binder::default()) },
    Row { name: "persistentvolumeclaim-protection", account: "pvc-protection-controller", component: "pvc-protection-controller", make: |_| Box::new(volume_protection::ClaimProtection) },
    Row { name: "persistentvolume-protection", account: "pv-protection-controller", component: "pv-protection-controller", make: |_| Box::new(volume_protection::VolumeProtection) },
    Row { name: "ephemeral-volume", account: "ephemeral-volume-controller", component: "ephemeral_volume", make: |_| Box::new(ephemeral_volume::EphemeralVolumes) },
    Row { name: "certificatesigningrequest", account: "certificate-controller", component: "certificate-controller", make: |config| Box::new(certificates::Certificates { authority: config.authority.clone() }) },
    Row { name: "kube-apiserver-serving-clustertrustbundle-publisher", account: "kube-apiserver-serving-clustertrustbundle-publisher", component: "kube-apiserver-serving-clustertrustbundle-publisher", make: |config| Box::new(serving_bundle::ServingBundle { pem: config.root_ca.clone() }) },
    Row { name: "podcertificaterequest-cleaner", account: "podcertificaterequestcleaner", component: "podcertificaterequestcleaner", make: |_| Box::new(pod_certificate_requests::PodCertificateRequests) },
    Row { name: "clusterrole-aggregation", account: "clusterrole-aggregation-controller", component: "clusterrole-aggregation-controller", make: |_| Box::new(clusterrole_aggregation::Aggregation) },
];
