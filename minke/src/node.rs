//! A node: network, images, runtime, service proxy, DNS and kubelet, started in this order.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use ipnet::Ipv4Net;
use minke_client::https::{HttpsClient, Identity};
use minke_client::{Client, Informers};
use minke_cluster::data_dir::AGENT_LOCK;
use minke_cluster::keys::Pair;
use minke_cluster::{DataDir, Wishes, hello, kubeconfig};
use minke_dns::{DnsConfig, Zone};
use minke_kubelet::{Kubelet, LocalNetwork};
use minke_network::{NodeConfig, NodeNetwork};
use minke_proxy::{Drain, ProxyConfig};
use minke_runtime::{ImageStore, LocalRuntime, RegistryConfig, RuntimeConfig};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::server::{CLUSTER_DOMAIN, Setting, runtime, stop_on_signals};
use crate::{KUBERNETES, logging};

/// Seconds for which answers of the DNS may be kept.
const DNS_TTL: u32 = 30;

/// How the parts of a node reach the cluster, each as itself.
pub struct NodeClients {
    pub kubelet: Arc<dyn Client>,
    pub proxy: Arc<dyn Client>,
    pub dns: Arc<dyn Client>,
}

/// The address of the cluster DNS: the tenth of the services'.
pub fn dns_address(service_cidr: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(service_cidr.network()).saturating_add(10))
}

/// Starts the node's parts on `tasks`; they end with `stop`, and pods go on.
pub async fn start(
    data: &DataDir,
    setting: &Setting,
    clients: NodeClients,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<()> {
    let (config, id) = (&setting.config, data.id());
    let node_cidr = config.node_cidr()?;
    let dns = dns_address(config.service_cidr);
    let network = NodeNetwork::setup(NodeConfig {
        cluster: id.clone(),
        pod_cidr: node_cidr,
        cluster_cidr: config.pod_cidr,
        service_cidr: config.service_cidr,
        dns_address: Some(dns),
        mtu: setting.mtu,
    });
    let pods = async {
        let images = ImageStore::open(data.path(), RegistryConfig::in_dir(&data.join("registries")))?;
        if let Some(archive) = hello::missing(&images).await? {
            images.load(std::io::Cursor::new(archive), None, None).await?;
        }
        let config = RuntimeConfig { root: data.path().to_owned(), cgroup_root: data.cgroup() };
        anyhow::Ok((LocalRuntime::open(config, images.clone()).await?, images))
    };
    let (network, pods) = tokio::join!(network, pods);
    let network = network.context("set up the node's network")?;
    let (runtime, images) = pods.context("set up the container runtime")?;

    let (drain, requests) = Drain::new();
    let proxy = ProxyConfig {
        cluster: id,
        node_name: setting.node_name.clone(),
        zone: None,
        node_address: setting.node_ip,
        pod_cidr: node_cidr,
        cluster_cidr: config.pod_cidr,
    };
    let (informers, ending) = (Informers::new(clients.proxy, stop.clone()), stop.clone());
    tasks.spawn(async move { minke_proxy::run(proxy, &informers, requests, ending).await });

    let zone = Zone {
        domain: CLUSTER_DOMAIN.parse().expect("a domain name"),
        server: dns.into(),
        reverse: vec![config.service_cidr.into(), config.pod_cidr.into()],
        ttl: DNS_TTL,
    };
    let listen = SocketAddr::new(dns.into(), 53);
    let dns_config = DnsConfig { listen, zone, resolv_conf: "/etc/resolv.conf".into() };
    let server =
        minke_dns::Server::bind(dns_config).await.with_context(|| format!("serve DNS on {listen}"))?;
    let (informers, ending) = (Informers::new(clients.dns, stop.clone()), stop.clone());
    tasks.spawn(async move { server.run(&informers, ending).await });

    let kubelet = minke_kubelet::Config {
        node_name: setting.node_name.clone(),
        node_ip: setting.node_ip.into(),
        version: KUBERNETES.to_owned(),
        node_labels: Default::default(),
        data_dir: data.path().to_owned(),
        cluster_dns: vec![dns.into()],
        cluster_domain: CLUSTER_DOMAIN.to_owned(),
        pod_cidr: Some(node_cidr.to_string()),
        max_pods: config.max_pods,
        cgroup_parent: data.cgroup(),
        listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), config.kubelet_port),
        serving_cert_pem: setting.keys.kubelet.certificate.clone(),
        serving_key_pem: setting.keys.kubelet.key.clone(),
        client_ca_pem: setting.keys.ca.certificate.clone(),
        seccomp_default: true,
        runtime: Arc::new(runtime),
        images: Arc::new(images),
        network: Arc::new(LocalNetwork::new(network)),
        drain: Arc::new(drain),
        client: clients.kubelet,
    };
    let kubelet = Kubelet::build(kubelet).await.context("start the kubelet")?;
    tasks.spawn(kubelet.run(stop.clone()));
    Ok(())
}

/// Run this machine's node alone, in the foreground, for a server that was started with --disable-agent.
///
/// It takes the keys from the same data directory. SIGTERM ends it and leaves pods running.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// A kubeconfig file that says where the server is; the default is the server of this data directory
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
}

impl AgentArgs {
    pub fn run(self, data: &DataDir) -> Result<()> {
        logging::start(None);
        runtime()?.block_on(self.serve(data))
    }

    async fn serve(self, data: &DataDir) -> Result<()> {
        data.config()?;
        let stop = CancellationToken::new();
        stop_on_signals(&stop)?;
        let setting = Setting::prepare(data, &Wishes::default(), AGENT_LOCK).await?;
        let path = self.kubeconfig.unwrap_or_else(|| data.join("kubeconfig"));
        let server = kubeconfig::identity(&path)?;
        let client = |pair: &Pair| -> Result<Arc<dyn Client>> {
            let certificate = (pair.certificate.clone().into_bytes(), pair.key.clone().into_bytes());
            let identity = Identity { certificate: Some(certificate), token: None, ..server.clone() };
            Ok(Arc::new(HttpsClient::new(&identity)?))
        };
        let keys = &setting.keys;
        let clients = NodeClients {
            kubelet: client(&keys.kubelet_client)?,
            proxy: client(&keys.proxy)?,
            dns: client(&keys.dns)?,
        };
        let tasks = TaskTracker::new();
        start(data, &setting, clients, &tasks, &stop).await?;
        tracing::info!(node = setting.node_name, server = server.server, "The node runs");
        stop.cancelled().await;
        tracing::info!("Ending; pods stay");
        tasks.close();
        tasks.wait().await;
        Ok(())
    }
}
