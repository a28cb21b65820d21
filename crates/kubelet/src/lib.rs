//! The node agent: pod workers, probes, volumes, status, and the kubelet's HTTPS server.
//!
//! [`Kubelet::build`] adopts everything that runs; [`Kubelet::run`] follows the pods that are bound to this
//! node. What to do for a pod is decided in [`plan`] and what to tell of it in [`status`], both pure; a
//! worker per pod carries it out. Stopping the agent, gently or not, stops no pod.
#![forbid(unsafe_code)]

mod admission;
mod agent;
#[cfg(test)]
mod agent_tests;
mod container;
mod context;
mod env;
mod env_files;
mod etc;
mod events;
mod eviction;
#[doc(hidden)]
pub mod fuzzing;
mod handlers;
mod id_ranges;
mod image_access;
mod image_gc;
mod images;
mod jobs;
mod local_path;
mod logs;
mod machine;
mod manifests;
mod network;
mod node;
mod observed;
mod oom;
mod plan;
mod pod;
mod preemption;
mod probe_counts;
mod probes;
mod qos;
mod references;
mod resize;
mod resources;
mod rounds;
mod runtime_class;
mod server;
mod settings;
mod status;
#[cfg(test)]
mod testing;
mod told;
mod volumes;
mod worker;

pub use network::{LocalNetwork, PodNetwork};

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use minke_api::{FieldSelector, Kind};
use minke_client::{Client, Informers};
use minke_network::EndpointDrain;
use minke_runtime::{ImageService, Runtime};
use tokio_util::sync::CancellationToken;

use context::Context;

/// Everything an agent is made of.
pub struct Config {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// `v1.37.0`, the version that the node tells.
    pub version: String,
    /// More labels for the node.
    pub node_labels: BTreeMap<String, String>,
    /// Files of pods are in `pods` and `logs` below it, static pods in `manifests`, settings in `kubelet.yaml`.
    pub data_dir: PathBuf,
    pub cluster_dns: Vec<IpAddr>,
    /// `cluster.local`
    pub cluster_domain: String,
    /// The addresses of this node's pods, for the node's `spec.podCIDR`.
    pub pod_cidr: Option<String>,
    /// Pods that this node takes at most.
    pub max_pods: u32,
    /// The cluster's own cgroup, relative to the root of each hierarchy.
    pub cgroup_parent: String,
    /// Where the HTTPS server listens.
    pub listen: SocketAddr,
    pub serving_cert_pem: String,
    pub serving_key_pem: String,
    /// Who signs the certificates of callers.
    pub client_ca_pem: String,
    /// Containers that name no seccomp profile get the default one (upstream's `seccompDefault`).
    pub seccomp_default: bool,
    pub runtime: Arc<dyn Runtime>,
    pub images: Arc<dyn ImageService>,
    pub network: Arc<dyn PodNetwork>,
    pub drain: Arc<dyn EndpointDrain>,
    pub client: Arc<dyn Client>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("list what runs")]
    Runtime(#[source] minke_runtime::Error),
    #[error("{what}")]
    Io { what: String, source: std::io::Error },
    /// Something in the configuration is not what it should be.
    #[error("{0}")]
    Invalid(String),
    /// Certificate, key or CA are not what they should be.
    #[error("TLS of the kubelet's server: {0}")]
    Tls(String),
}

/// The agent, ready to run.
pub struct Kubelet {
    agent: agent::Agent,
    node: node::Node,
    server: server::Server,
    api: server::Api,
    local_path: local_path::LocalPath,
    image_gc: image_gc::ImageGc,
    stop: CancellationToken,
}

impl Kubelet {
    /// Binds the port and takes over everything that runs. Changes nothing yet. Must be called within a
    /// tokio runtime.
    pub async fn build(config: Config) -> Result<Kubelet, Error> {
        let stop = CancellationToken::new();
        let (cert, key) = (&config.serving_cert_pem, &config.serving_key_pem);
        let server = server::Server::bind(config.listen, cert, key, &config.client_ca_pem).await?;
        let port = server.local_addr().map_or(config.listen.port(), |address| address.port());
        let informers = Informers::new(config.client.clone(), stop.clone());
        let events = events::Recorder::start(config.client.clone(), &config.node_name);
        let paths = container::Paths { data: config.data_dir.clone() };
        let pods_dir = paths.pods();
        volumes::make_shared(&pods_dir).map_err(|source| Error::Io {
            what: format!("share mounts below {}", pods_dir.display()),
            source,
        })?;
        let settings = settings::Settings::read(&config.data_dir).map_err(Error::Invalid)?;
        if !settings.idle.is_empty() {
            tracing::warn!(fields = ?settings.idle, "What kubelet.yaml says in these fields changes nothing here");
        }
        let machine = machine::Machine::read(&config.data_dir, config.max_pods, &settings);
        if let Some(pods) = settings.pods_max.filter(|pods| *pods > config.max_pods) {
            let most = config.max_pods;
            let why =
                format!("kubelet.yaml: maxPods is {pods}, and the node has addresses for {most} pods only");
            return Err(Error::Invalid(why));
        }
        // There it is looked for changes from now on.
        if let Err(error) = std::fs::create_dir_all(&settings.manifests) {
            tracing::warn!(dir = %settings.manifests.display(), %error, "No directory for static pods");
        }
        let probe_counts = Arc::<probe_counts::ProbeCounts>::default();
        let prober = probes::Prober::start(config.runtime.clone(), events.clone(), probe_counts.clone());
        let (unused_images, asked) = tokio::sync::mpsc::channel(1);
        let context = Arc::new(Context {
            node_ip: config.node_ip,
            version: config.version,
            ids: id_ranges::IdRanges::new(&config.cgroup_parent),
            cgroup_root: config.cgroup_parent,
            dns: etc::Dns {
                servers: settings.dns_servers.clone().unwrap_or(config.cluster_dns),
                domain: settings.dns_domain.clone().unwrap_or(config.cluster_domain),
                host: std::fs::read_to_string(&settings.resolv_conf).unwrap_or_default(),
            },
            runtime: config.runtime,
            images: images::Images::new(
                config.images,
                events.clone(),
                image_access::ImageAccess::open(&config.data_dir.join("pulled-images.json")),
                &settings,
            ),
            network: config.network,
            drain: config.drain,
            references: references::References::new(config.client.clone()),
            volumes: volumes::Volumes {
                paths: paths.clone(),
                client: config.client.clone(),
                node_name: config.node_name.clone(),
            },
            client: config.client,
            events,
            services: informers.of_type::<core::Service>(),
            node_memory: machine.memory,
            allocatable: machine.allocatable(&settings),
            for_pods: machine.of_pods(&settings),
            seccomp_default: settings.seccomp_default.unwrap_or(config.seccomp_default),
            seccomp_dir: config.data_dir.join("seccomp"),
            paths,
            owners: context::Owners::default(),
            prober,
            probe_counts,
            grants: resize::Grants::default(),
            pressure: eviction::Pressure::new(&settings.eviction),
            endings: eviction::Counts::default(),
            unused_images,
            classes: Default::default(),
            settings,
            node_name: config.node_name,
        });
        let pods =
            informers.selected(worker::pods(), FieldSelector::equal("spec.nodeName", &context.node_name));
        let nodes = informers.selected(Kind::of::<core::Node>(), FieldSelector::name(&context.node_name));
        let identity = node::Identity { labels: config.node_labels, pod_cidr: config.pod_cidr, port };
        let api = server::Api::new(context.clone(), pods.clone());
        let local_path = local_path::LocalPath::new(&context, &informers, &stop);
        let image_gc = image_gc::ImageGc::new(context.clone(), pods.clone(), asked);
        let agent =
            agent::Agent::adopt(context.clone(), pods, nodes.clone()).await.map_err(Error::Runtime)?;
        let node = node::Node::new(context, machine, identity, nodes);
        Ok(Kubelet { agent, node, server, api, local_path, image_gc, stop })
    }

    /// Runs until `shutdown`; every pod goes on without the agent.
    pub async fn run(self, shutdown: CancellationToken) {
        let stop = self.stop.clone();
        let _ended = stop.clone().drop_guard();
        let work = async {
            tokio::join!(
                self.node.run(stop.clone()),
                self.agent.run(stop.clone()),
                self.server.run(self.api, stop.clone()),
                self.local_path.run(),
                self.image_gc.run(stop.clone()),
            )
        };
        tokio::select! { _ = work => {}, () = shutdown.cancelled() => {} }
    }
}
