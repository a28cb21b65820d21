//! Clusters to measure: started cold, watched while idle.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use minke_client::https::{HttpsClient, Identity};
use minke_scenarios::cluster::TestCluster;
use minke_scenarios::process::{cpu_time, memory_kib};
use rustix::process::Pid;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;

use crate::{Args, Table, median};

/// A running cluster in a directory of its own; purged when dropped.
pub struct Cluster {
    cluster: TestCluster,
    _dir: TempDir,
    pub identity: Identity,
    /// The server.
    pub pid: Pid,
    /// How long `minke up` took.
    pub took: Duration,
}

impl Cluster {
    /// `minke up`, with more options.
    pub fn up(minke: &Path, options: &[&str]) -> Result<Cluster> {
        let dir = TempDir::with_prefix("minke-bench-")?;
        let cluster = TestCluster::new(minke, &dir.path().join("data"))?;
        let start = Instant::now();
        cluster.run(&[&["up"], options].concat())?;
        let took = start.elapsed();
        let identity = minke_cluster::kubeconfig::identity(&cluster.kubeconfig())?;
        Ok(Cluster { identity, pid: cluster.server_pid()?, cluster, _dir: dir, took })
    }

    pub fn client(&self) -> Result<HttpsClient> {
        Ok(HttpsClient::new(&self.identity)?)
    }

    /// CPU time that the server has used, in seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        Ok(cpu_time(self.pid)?.as_secs_f64())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        match self.cluster.down() {
            Ok(left) if left.is_empty() => (),
            Ok(left) => eprintln!("left behind: {left:?}"),
            Err(error) => eprintln!("minke down failed: {error}"),
        }
    }
}

/// A connection to the API server that speaks `protocol`, and the server's `host:port`.
pub async fn connect(identity: &Identity, protocol: &[u8]) -> Result<(TlsStream<TcpStream>, String)> {
    let authority = identity.server.strip_prefix("https://").context("an https server")?.to_owned();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&identity.ca) {
        roots.add(certificate?)?;
    }
    let (chain, key) = identity.certificate.as_ref().context("a client certificate")?;
    let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>()?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    let host = authority.rsplit_once(':').map_or(authority.as_str(), |(host, _)| host).to_owned();
    let tcp = TcpStream::connect(&authority).await?;
    tcp.set_nodelay(true)?;
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
    Ok((tls.connect(ServerName::try_from(host)?, tcp).await?, authority))
}

pub fn cold_start(args: &Args, table: &mut Table) -> Result<()> {
    let what = "cold `minke up` to node Ready";
    if table.wants(what) {
        let took: Result<Vec<f64>> =
            (0..args.rounds).map(|_| Ok(Cluster::up(&args.minke, &[])?.took.as_secs_f64())).collect();
        table.add(what, format!("{:.2} s", median(took?)), "1 s");
    }
    Ok(())
}

pub async fn idle(args: &Args, table: &mut Table) -> Result<()> {
    let (memory, cpu) = ("idle memory, whole cluster", "idle CPU, whole cluster");
    if !table.wants(memory) && !table.wants(cpu) {
        return Ok(());
    }
    let cluster = Cluster::up(&args.minke, &[])?;
    // What starting left to do is not idling.
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let window = Duration::from_secs(args.seconds * 6);
    let before = cluster.cpu_seconds()?;
    tokio::time::sleep(window).await;
    let used = cluster.cpu_seconds()? - before;
    let figure = |name| memory_kib(cluster.pid.as_raw_pid(), "status", name).context("no such line");
    let (rss, anonymous) = (figure("VmRSS")? as f64 / 1024.0, figure("RssAnon")? as f64 / 1024.0);
    table.add(memory, format!("{rss:.1} MB RSS, {anonymous:.1} MB of it anonymous"), "64 MB RSS");
    let text = format!("{:.2} % of a core over {} s", used * 100.0 / window.as_secs_f64(), window.as_secs());
    table.add(cpu, text, "0.5 % of one core");
    Ok(())
}
