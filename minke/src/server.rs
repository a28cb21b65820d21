//! `minke server`: the whole cluster in one process, or its control plane alone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use async_trait::async_trait;
use clap::Args;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use minke_api::{FieldSelector, Kind};
use minke_apiserver::{ApiServer, UserInfo};
use minke_client::leader::{self, Election};
use minke_client::{Client, Clock, Informers, ListOptions, typed};
use minke_cluster::control::{self, Handler, Reply, Request};
use minke_cluster::data_dir::{Lock, SERVER_LOCK, write_file};
use minke_cluster::keys::{Keys, Names};
use minke_cluster::kubeconfig::Entry;
use minke_cluster::startup::{Progress, Stage, write_stage};
use minke_cluster::{Config, DataDir, Wishes};
use minke_runtime::ClockWatch;
use minke_store::{Embedded, Store};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::controllers::ControllerArgs;
use crate::node::{self, NodeClients};
use crate::{KUBERNETES, addons, logging};

pub const CLUSTER_DOMAIN: &str = "cluster.local";
/// How long components may take to finish what they are at.
const DRAIN: Duration = Duration::from_secs(10);
/// Ports of NodePort services.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30000..=32767;

/// Run the server in the foreground: API server, controllers, scheduler and this machine's node.
///
/// SIGTERM ends it and leaves pods running; a later start takes them over.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// The address to serve the API on; every address of the machine when not given
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    listen: IpAddr,
    /// The port of the API server
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// The name of the node; the default is the host's
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// The address of the node; the default is the one of the default route
    #[arg(long, value_name = "ADDRESS")]
    node_ip: Option<Ipv4Addr>,
    /// Run no pods in this process: `minke agent` does, or another machine
    #[arg(long)]
    disable_agent: bool,
    /// A KubeSchedulerConfiguration (v1) for the scheduler: profiles, plugins and their arguments
    #[arg(long, value_name = "FILE")]
    scheduler_config: Option<PathBuf>,
    #[command(flatten)]
    controllers: ControllerArgs,
    /// Started by `up`: leave the terminal, and tell on standard output how far it is
    #[arg(long, hide = true)]
    detached: bool,
}

impl ServerArgs {
    pub fn run(self, data: &DataDir) -> Result<()> {
        if self.detached {
            // Already the leader of a session when it was started in an unusual way; that is as good.
            let _ = rustix::process::setsid();
        }
        logging::start(self.detached.then_some(data));
        let detached = self.detached;
        let outcome = runtime()?.block_on(self.serve(data));
        if let Err(error) = &outcome
            && detached
        {
            write_stage(&Stage::Failed(format!("{error:#}")));
        }
        outcome
    }

    async fn serve(self, data: &DataDir) -> Result<()> {
        let stop = CancellationToken::new();
        stop_on_signals(&stop)?;
        let progress = Progress::default();
        let settings = self.scheduler_settings()?;
        let wishes = Wishes {
            api_port: self.port,
            max_pods: None,
            node_name: self.node_name.clone(),
            node_ip: self.node_ip,
        };
        let setting = Setting::prepare(data, &wishes, SERVER_LOCK).await?;
        let tasks = TaskTracker::new();
        let control = control::bind(data)?;
        if self.detached {
            tokio::spawn(progress.clone().report());
        }

        progress.step("Starting the API server");
        let server = self.api_server(data, &setting).await?;
        let client = |name: &str, groups: &[&str]| server.client(UserInfo::new(name, groups));
        let admin = client("system:admin", &["system:masters"]);
        let handler = Local {
            progress: progress.clone(),
            client: admin.clone(),
            setting: setting.clone(),
            cgroup: data.cgroup(),
            started: Timestamp::now(),
        };
        tasks.spawn(control::serve(control, Arc::new(handler), stop.clone()));

        let manager = client("system:kube-controller-manager", &[]);
        let scheduler = client("system:kube-scheduler", &[]);
        let node_user = format!("system:node:{}", setting.node_name);
        let clients = NodeClients {
            kubelet: client(&node_user, &["system:nodes"]),
            proxy: client("system:kube-proxy", &[]),
            dns: server.client(UserInfo::service_account("kube-system", "coredns")),
        };
        let clients_of = server.clients();
        // The API server is the last to end, so that the others can finish what they are writing.
        let stop_api = CancellationToken::new();
        let api = tokio::spawn(server.run(stop_api.clone()));

        let ca = &setting.keys.ca;
        let authority = Arc::new(minke_controllers::Authority::new(&ca.certificate, &ca.key)?);
        let root_ca = ca.certificate.clone();
        let account = Arc::new(move |name: &str| clients_of(UserInfo::service_account("kube-system", name)));
        let election = Election {
            client: manager.clone(),
            namespace: "kube-system",
            name: "kube-controller-manager",
            // The same after a restart, so that nothing is waited for then.
            identity: format!("{}_{}", setting.node_name, data.id()),
            clock: Clock::System,
        };
        let (clock, clock_set) = watch::channel(());
        tasks.spawn(tell_clock(clock, stop.clone()));
        let flags = self.controllers.clone();
        tasks.spawn(leader::lead(election, stop.clone(), move |term| {
            let config = flags.config(root_ca.clone(), authority.clone(), clock_set.clone());
            let informers = Informers::new(manager.clone(), term.clone());
            let account = account.clone();
            let controllers =
                minke_controllers::run(config, move |name| account(name), informers, term.clone());
            let config = minke_scheduler::Config {
                seed: rand::random(),
                settings: settings.clone(),
                ..Default::default()
            };
            let seen = Informers::new(scheduler.clone(), term.clone());
            let scheduling = minke_scheduler::run(seen, config, term);
            async move {
                tokio::join!(controllers, scheduling);
            }
        }));
        addons::ensure(&*admin, setting.config.service_cidr).await?;

        if !self.disable_agent {
            progress.step("Starting the node");
            node::start(data, &setting, clients, &tasks, &stop).await?;
            progress.step(&format!("Waiting until node {} is Ready", setting.node_name));
        }
        let life = async {
            if !self.disable_agent {
                node_ready(&admin, &setting.node_name, &stop).await;
            }
            progress.ready();
            tracing::info!(node = setting.node_name, "Ready");
            stop.cancelled().await;
        };
        tokio::pin!(api);
        tokio::select! {
            () = stop.cancelled() => {}
            () = life => {}
            ended = &mut api => {
                stop.cancel();
                ended.context("the API server panicked")?;
                bail!("the API server ended by itself");
            }
        }
        tracing::info!("Ending; pods stay");
        tasks.close();
        if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::warn!("Some components did not end in time");
        }
        stop_api.cancel();
        api.await.context("the API server panicked")
    }

    fn scheduler_settings(&self) -> Result<minke_scheduler::Settings> {
        let Some(path) = &self.scheduler_config else { return Ok(minke_scheduler::Settings::default()) };
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        minke_scheduler::Settings::parse(&text).with_context(|| format!("{} is refused", path.display()))
    }

    async fn api_server(&self, data: &DataDir, setting: &Setting) -> Result<ApiServer> {
        let path = data.join("store.redb");
        let store = tokio::task::spawn_blocking(move || -> Result<Store> {
            Ok(Store::open(Embedded::open(&path)?, minke_store::EVENT_BYTES)?)
        });
        let store = store.await.context("opening the store")??;
        let Setting { config, keys, .. } = setting;
        let config = minke_apiserver::Config {
            store,
            clock: Clock::System,
            listen: vec![SocketAddr::new(self.listen, config.api_port)],
            advertise: SocketAddr::new(setting.node_ip.into(), config.api_port),
            service_cidr: config.service_cidr.into(),
            node_ports: NODE_PORTS,
            serving_cert: keys.apiserver.certificate.clone(),
            serving_key: keys.apiserver.key.clone(),
            serving_ca: keys.ca.certificate.clone(),
            client_ca: keys.ca.certificate.clone(),
            service_account_key: keys.service_account.clone(),
            issuer: format!("https://kubernetes.default.svc.{CLUSTER_DOMAIN}"),
            kubelet_client_cert: keys.apiserver_kubelet_client.certificate.clone(),
            kubelet_client_key: keys.apiserver_kubelet_client.key.clone(),
            kubelet_ca: keys.ca.certificate.clone(),
        };
        Ok(ApiServer::build(config).await?)
    }
}

/// What both halves of the program start from.
#[derive(Clone)]
pub struct Setting {
    pub config: Config,
    pub node_name: String,
    pub node_ip: Ipv4Addr,
    /// Bytes of the link that the node's address is on.
    pub mtu: u32,
    pub keys: Arc<Keys>,
    _lock: Arc<Lock>,
}

impl Setting {
    /// Takes the data directory for this process, and decides and makes what the cluster needs.
    pub async fn prepare(data: &DataDir, wishes: &Wishes, lock: &str) -> Result<Setting> {
        minke_cluster::up::require_root(data)?;
        data.create()?;
        let lock = data.lock(lock)?.ok_or_else(|| anyhow!("another minke uses {}", data.path().display()))?;
        let config = data.settle(wishes)?;
        let found = minke_network::node_address().await?;
        let (node_ip, mtu) = match (config.node_ip, found) {
            (Some(address), found) => (address, found.map_or(1500, |found| found.mtu)),
            (None, Some(found)) => (found.address, found.mtu),
            (None, None) => {
                bail!("this machine has no address but loopback: choose the node's with --node-ip")
            }
        };
        let node_name =
            config.node_name.clone().unwrap_or_else(|| minke_network::host_name().to_ascii_lowercase());
        let service_ip = minke_apiserver::kubernetes_service_address(&config.service_cidr.into());
        let names = Names {
            node_name: node_name.clone(),
            node_ip: node_ip.into(),
            service_ip,
            cluster_domain: CLUSTER_DOMAIN.to_owned(),
        };
        let keys = Keys::ensure(&data.join("pki"), &names, SystemTime::now())?;
        let setting =
            Setting { config, node_name, node_ip, mtu, keys: Arc::new(keys), _lock: Arc::new(lock) };
        let server = setting.server();
        let entry = Entry {
            name: "minke",
            server: &server,
            ca: &setting.keys.ca.certificate,
            user: &setting.keys.admin,
        };
        write_file(&data.join("kubeconfig"), entry.to_yaml().as_bytes(), 0o600)?;
        Ok(setting)
    }

    /// `https://192.0.2.2:6443`
    pub fn server(&self) -> String {
        format!("https://{}:{}", self.node_ip, self.config.api_port)
    }
}

/// As many workers as cores, and few threads for what blocks: each costs memory.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder
        .enable_all()
        .max_blocking_threads(32)
        .thread_stack_size(1 << 20)
        .thread_name("minke")
        .build()?)
}

pub fn stop_on_signals(stop: &CancellationToken) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        stop.cancel();
    });
    Ok(())
}

/// Tells `told` each time when the machine's clock was set.
async fn tell_clock(told: watch::Sender<()>, stop: CancellationToken) {
    match ClockWatch::new() {
        Ok(clock) => while stop.run_until_cancelled(clock.set()).await.is_some() && told.send(()).is_ok() {},
        Err(error) => tracing::warn!(%error, "Cannot watch the machine's clock"),
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Waits until the node says of itself that it is Ready, since this start.
async fn node_ready(client: &Arc<dyn Client>, name: &str, stop: &CancellationToken) {
    let watch = stop.child_token();
    let informers = Informers::new(client.clone(), watch.clone());
    let informer = informers.selected(Kind::of::<Node>(), FieldSelector::equal("metadata.name", name));
    let mut changes = informer.subscribe();
    while let Some(change) = changes.recv().await {
        if change.new.as_deref().and_then(typed::<Node>).is_some_and(|node| is_ready(&node)) {
            break;
        }
    }
    watch.cancel();
}

/// Answers the commands of this machine.
struct Local {
    progress: Progress,
    client: Arc<dyn Client>,
    setting: Setting,
    /// Where this cluster's cgroups are, for tools that look at its processes.
    cgroup: String,
    started: Timestamp,
}

#[async_trait]
impl Handler for Local {
    async fn handle(&self, request: Request, replies: mpsc::Sender<Reply>) -> Result<Value> {
        match request {
            Request::Wait => {
                let mut stages = self.progress.subscribe();
                loop {
                    let stage = stages.borrow_and_update().clone();
                    let ready = stage == Stage::Ready;
                    replies.send(Reply::Stage(stage)).await?;
                    if ready {
                        return Ok(Value::Null);
                    }
                    stages.changed().await?;
                }
            }
            Request::Status => self.status().await,
        }
    }
}

impl Local {
    async fn status(&self) -> Result<Value> {
        let (state, step) = match self.progress.stage() {
            Stage::Ready => ("Ready", None),
            Stage::Step(step) => ("Starting", Some(step)),
            Stage::Failed(why) => ("Failed", Some(why)),
        };
        let nodes = self.client.list(Kind::of::<Node>(), "", ListOptions::default()).await?;
        let node = nodes.items.iter().find(|node| node.name() == self.setting.node_name);
        let ready = node.and_then(|node| typed::<Node>(node)).is_some_and(|node| is_ready(&node));
        let pods = self.client.list(Kind::of::<Pod>(), "", ListOptions::default()).await?.items;
        let running = pods.iter().filter(|pod| pod.field("status.phase") == Some("Running")).count();
        let mut status = json!({
            "state": if state == "Ready" && !ready { "NotReady" } else { state },
            "version": concat!("v", env!("CARGO_PKG_VERSION")),
            "kubernetesVersion": KUBERNETES,
            "server": self.setting.server(),
            "pid": std::process::id(),
            "startedAt": self.started.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            "memoryMiB": resident_mib(),
            "cgroup": self.cgroup,
            "node": {"name": self.setting.node_name, "address": self.setting.node_ip.to_string(), "ready": ready},
            "pods": {"total": pods.len(), "running": running},
        });
        if let Some(step) = step {
            status["step"] = step.into();
        }
        Ok(status)
    }
}

/// This process's memory.
fn resident_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}
