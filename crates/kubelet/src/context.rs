//! What the workers of a node share: where things are, and everything they act upon.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use minke_api::Quantity;
use minke_client::{Client, Informer};
use minke_network::EndpointDrain;
use minke_runtime::{Resources, Runtime};
use tokio::sync::{mpsc, oneshot};

use crate::container::Paths;
use crate::env::Facts;
use crate::etc::Dns;
use crate::events::Recorder;
use crate::eviction;
use crate::id_ranges::IdRanges;
use crate::images::Images;
use crate::network::PodNetwork;
use crate::probe_counts::ProbeCounts;
use crate::probes::Prober;
use crate::references::References;
use crate::resize;
use crate::settings::Settings;
use crate::volumes::Volumes;

/// What all workers of a node share.
pub struct Context {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// `v1.37.0`
    pub version: String,
    pub paths: Paths,
    pub cgroup_root: String,
    pub dns: Dns,
    pub runtime: Arc<dyn Runtime>,
    pub images: Images,
    pub network: Arc<dyn PodNetwork>,
    pub ids: IdRanges,
    pub drain: Arc<dyn EndpointDrain>,
    pub client: Arc<dyn Client>,
    pub references: References,
    pub volumes: Volumes,
    pub events: Recorder,
    pub services: Arc<Informer>,
    /// Bytes.
    pub node_memory: u64,
    pub allocatable: BTreeMap<String, Quantity>,
    /// What all pods together are held to.
    pub for_pods: Resources,
    pub seccomp_default: bool,
    pub seccomp_dir: PathBuf,
    pub owners: Owners,
    pub probe_counts: Arc<ProbeCounts>,
    pub prober: Prober,
    pub grants: resize::Grants,
    pub pressure: eviction::Pressure,
    /// Pods that the node has ended for its own sake, or another pod's.
    pub endings: eviction::Counts,
    /// Asks for all images to be removed that nobody uses; the sender is dropped when that is done.
    pub unused_images: mpsc::Sender<oneshot::Sender<()>>,
    /// What the cgroups of the classes of service have, by class.
    pub classes: tokio::sync::Mutex<BTreeMap<&'static str, Resources>>,
    pub settings: Settings,
}

/// Which pod a sandbox is of, for events of the runtime that name only the sandbox.
#[derive(Default)]
pub struct Owners(Mutex<HashMap<String, String>>);

impl Owners {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().expect("nothing panics while the map is locked")
    }

    pub fn put(&self, sandbox: &str, uid: &str) {
        self.lock().insert(sandbox.to_owned(), uid.to_owned());
    }

    pub fn forget(&self, sandbox: &str) {
        self.lock().remove(sandbox);
    }

    pub fn of(&self, sandbox: &str) -> Option<String> {
        self.lock().get(sandbox).cloned()
    }
}

impl Context {
    pub fn facts(&self, pod_ip: Option<IpAddr>) -> Facts {
        Facts { host_ip: Some(self.node_ip), pod_ip, allocatable: self.allocatable.clone() }
    }

    /// `1.37`
    pub fn short_version(&self) -> String {
        let mut parts = self.version.trim_start_matches('v').split('.');
        format!("{}.{}", parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    }
}
