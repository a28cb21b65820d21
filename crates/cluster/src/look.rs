//! The small commands that say where things are: `ip`, `kubeconfig`, `service`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::core::v1::{Node, Service};
use minke_api::Kind;
use minke_client::https::HttpsClient;
use minke_client::{Client, ListOptions, Target, typed};

use crate::data_dir::DataDir;
use crate::io::Io;
use crate::kubeconfig;

/// The address of the node, where NodePort services can be reached.
#[derive(Debug, Args)]
pub struct IpArgs {}

/// Print the cluster's kubeconfig, or where it is.
#[derive(Debug, Args)]
pub struct KubeconfigArgs {
    /// Print the file's path
    #[arg(long)]
    path: bool,
}

/// Where a service can be reached from this machine and its network.
#[derive(Debug, Args)]
pub struct ServiceArgs {
    /// The service
    name: String,
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// Print URLs only, one a line
    #[arg(long)]
    url: bool,
}

impl KubeconfigArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        let path = path(data)?;
        if self.path {
            return io.say(path.display().to_string());
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        io.say(text.trim_end())
    }
}

fn path(data: &DataDir) -> Result<PathBuf> {
    data.config()?;
    Ok(data.join("kubeconfig"))
}

/// Runs `work` with a client of the cluster in `data`, on a small runtime of its own.
fn with_client<T>(data: &DataDir, work: impl AsyncFnOnce(Arc<dyn Client>) -> Result<T>) -> Result<T> {
    let identity = kubeconfig::identity(&path(data)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { work(Arc::new(HttpsClient::new(&identity)?)).await })
}

async fn node_address(client: &dyn Client) -> Result<String> {
    let nodes = client.list(Kind::of::<Node>(), "", ListOptions::default()).await?;
    let addresses = nodes.items.iter().filter_map(|node| typed::<Node>(node)).filter_map(|node| {
        let addresses = node.status.as_ref()?.addresses.clone()?;
        addresses.into_iter().find(|address| address.type_ == "InternalIP")
    });
    addresses.map(|address| address.address).next().context("no node has an address yet")
}

impl IpArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        let address = with_client(data, async |client| node_address(&*client).await)?;
        io.say(address)
    }
}

impl ServiceArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        let (service, node) = with_client(data, async |client| {
            let object =
                client.get(Target::object(Kind::of::<Service>(), &self.namespace, &self.name)).await?;
            let service = typed::<Service>(&object).context("the service cannot be read")?;
            Ok((service, node_address(&*client).await?))
        })?;
        let spec = service.spec.clone().unwrap_or_default();
        let mut found = 0;
        for port in spec.ports.unwrap_or_default() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let scheme =
                if port.port == 443 || port.name.as_deref() == Some("https") { "https" } else { "http" };
            let name = port.name.clone().unwrap_or_else(|| port.port.to_string());
            let Some(node_port) = port.node_port.filter(|port| *port != 0) else { continue };
            found += 1;
            match (self.url, protocol) {
                (true, "TCP") => io.say(format!("{scheme}://{node}:{node_port}"))?,
                (true, _) => {}
                (false, _) => io.say(format!("{name}/{protocol}  {node}:{node_port}"))?,
            }
        }
        if found == 0 {
            let address = spec.cluster_ip.unwrap_or_default();
            bail!(
                "service {} has no node port (it is {}): `kubectl port-forward service/{}` reaches it, and so does {address} on this machine",
                self.name,
                spec.type_.as_deref().unwrap_or("ClusterIP"),
                self.name
            );
        }
        Ok(())
    }
}
