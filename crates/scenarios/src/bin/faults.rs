//! Churns pods while the agent, the server, shims and containers are killed, stopped and started at random, and
//! checks at the end that every pod is as specified and that the node has what is of the living pods, and
//! nothing else.
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Status};
use minke_client::https::HttpsClient;
use minke_client::{Client, DeleteOptions, ListOptions, Patch, Target};
use minke_cluster::{DataDir, Wishes, kubeconfig};
use minke_scenarios::cluster::TestCluster;
use minke_scenarios::inventory::{self, Sandbox};
use minke_scenarios::process::start_server;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

const NAMESPACE: &str = "default";
/// A pod's containers are killed at most so often, for each time makes the wait before the next start longer.
const HITS_MAX: u32 = 3;
/// How long it may take at the end until all is as it should be: the longest of those waits, and some.
const SETTLE_MAX: Duration = Duration::from_secs(90);
/// Between two faults, in milliseconds.
const BETWEEN_FAULTS: std::ops::Range<u64> = 100..3000;
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);
/// Seconds that a pod takes which ends by itself, and what it ends with.
const ONCE_SECONDS: std::ops::Range<u32> = 1..8;
const ONCE_CODE: i32 = 3;

/// Check that pods outlive whatever happens to Minke, and that nothing of them outlives them.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "target/debug/minke")]
    minke: PathBuf,
    /// How long things go wrong
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Pods there are at a time
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// Where randomness starts; what happens when is up to the machine
    #[arg(long)]
    seed: Option<u64>,
    /// Leave the cluster as it is when something is wrong
    #[arg(long)]
    keep: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| rand::rng().random());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match runtime.block_on(run(&args, seed)) {
        Ok(()) => {
            println!("faults: 1 passed, 0 failed");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            println!("FAILED  with --seed {seed}: {error:#}");
            println!("faults: 0 passed, 1 failed");
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn run(args: &Args, seed: u64) -> Result<()> {
    let dir = tempfile::Builder::new().prefix("minke-faults-").tempdir()?;
    let cluster = TestCluster::new(&args.minke, &dir.path().join("data"))?;
    let most = u32::try_from(args.pods * 2)?.max(64);
    cluster.data.config_with(&Wishes { max_pods: Some(most), ..Wishes::default() })?;
    let mut machine = Machine::start(&args.minke, &cluster.data, dir.path())?;
    let outcome = rounds(args, &mut machine, StdRng::seed_from_u64(seed)).await;
    if let Err(error) = outcome {
        let kept = Path::new("target/faults");
        let _ = fs::create_dir_all(kept);
        for file in ["server.log", "agent.log", "faults.log", "data/minke.log"] {
            let name = Path::new(file).file_name().unwrap_or_default();
            let _ = fs::copy(dir.path().join(file), kept.join(name));
        }
        if args.keep {
            return Err(error.context(format!("kept in {}", dir.keep().display())));
        }
        let _ = machine.end(&cluster);
        return Err(error.context(format!("logs are in {}", kept.display())));
    }
    let left = machine.end(&cluster)?;
    if !left.is_empty() {
        bail!("left behind after `down`:\n    {}", left.join("\n    "));
    }
    Ok(())
}

async fn rounds(args: &Args, machine: &mut Machine, mut rng: StdRng) -> Result<()> {
    let client = machine.client()?;
    prepare(&*client).await?;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let churner = Churner {
        client: client.clone(),
        ledger: ledger.clone(),
        pods: args.pods,
        // Some 40 s, or as long as lets several generations come and go.
        life_ms: (args.seconds * 1000 / 3).min(40_000),
        rng: StdRng::seed_from_u64(rng.random()),
    };
    let churn = tokio::spawn(churner.run(stopped));
    // The images are made by the agent's first start.
    let snapshots = machine.snapshots()?;
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(rng.random_range(BETWEEN_FAULTS))).await;
        if churn.is_finished() {
            break;
        }
        let fault = FAULTS[rng.random_range(0..FAULTS.len())];
        machine.note(&format!("{fault:?}"));
        let name = machine.suffer(fault, &ledger, &mut rng).await?;
        *counts.entry(name).or_default() += 1;
    }
    stop.send_replace(true);
    let churned = churn.await??;
    machine.note("no more faults");
    let shown: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    println!("{churned} changes of pods; faults: {}", shown.join(", "));

    let started = Instant::now();
    settle(|| async {
        let pods = list(&*client).await?;
        let mut wrong = lock(&ledger).differences(&pods);
        if wrong.is_empty() {
            let pods: Vec<&core::Pod> = pods.iter().map(|pod| &**pod).collect();
            wrong = inventory::differences(&machine.data, &pods, &snapshots)?;
            wrong.extend(unreachable(&pods));
            wrong.extend(of_the_same_users(machine.data.path()));
        }
        Ok(wrong)
    })
    .await?;
    let pods = list(&*client).await?;
    println!("{} pods are as specified after {:.1} s", pods.len(), started.elapsed().as_secs_f64());
    for pod in &pods {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let target = Target::object(Kind::of::<core::Pod>(), NAMESPACE, name);
        client.delete(target, DeleteOptions::default()).await?;
    }
    settle(|| async {
        let pods = list(&*client).await?;
        let left = pods.iter().filter_map(|pod| Some(format!("pod {} is left", pod.metadata.name.as_ref()?)));
        let mut wrong: Vec<String> = left.collect();
        wrong.extend(inventory::differences(&machine.data, &[], &snapshots)?);
        Ok(wrong)
    })
    .await
}

/// Tries until nothing is wrong any more.
async fn settle<F: Future<Output = Result<Vec<String>>>>(mut look: impl FnMut() -> F) -> Result<()> {
    let end = Instant::now() + SETTLE_MAX;
    loop {
        let wrong = look().await?;
        if wrong.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("this stays wrong:\n    {}", wrong.join("\n    "));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn list(client: &dyn Client) -> Result<Vec<Arc<core::Pod>>> {
    let list = client.list(Kind::of::<core::Pod>(), NAMESPACE, ListOptions::default()).await?;
    Ok(list.items.iter().filter_map(|object| minke_client::typed(object)).collect())
}

/// Running pods that share an address, or whose server does not answer.
fn unreachable(pods: &[&core::Pod]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut owners = BTreeMap::new();
    for pod in pods {
        let (Some(name), Some(spec), Some(status)) = (&pod.metadata.name, &pod.spec, &pod.status) else {
            continue;
        };
        if spec.host_network == Some(true) || status.phase.as_deref() != Some("Running") {
            continue;
        }
        let Some(ip) = &status.pod_ip else { continue };
        if let Some(other) = owners.insert(ip, name) {
            wrong.push(format!("pods {name} and {other} both have {ip}"));
        }
        let address = format!("{ip}:8080").parse();
        let connected = address.map(|at| std::net::TcpStream::connect_timeout(&at, Duration::from_secs(2)));
        if !connected.is_ok_and(|connected| connected.is_ok()) {
            wrong.push(format!("pod {name} does not answer at {ip}"));
        }
    }
    wrong
}

/// Sandboxes that run and have users of the node in common, though each was to have its own.
fn of_the_same_users(data: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut owners = BTreeMap::new();
    for dir in fs::read_dir(data.join("shims")).into_iter().flatten().flatten() {
        let record = fs::read(dir.path().join("sandbox.json")).unwrap_or_default();
        let Ok(record) = serde_json::from_slice::<Value>(&record) else { continue };
        let id = dir.file_name().to_string_lossy().into_owned();
        let line = fs::read_to_string(format!("/proc/{}/cmdline", record["pid"])).unwrap_or_default();
        let Some(first) = record["spec"]["user_namespace"]["first"].as_u64().filter(|_| line.contains(&id))
        else {
            continue;
        };
        if let Some(other) = owners.insert(first, id.clone()) {
            wrong.push(format!("sandboxes {id} and {other} both have the users from {first}"));
        }
    }
    wrong
}

/// What the pods refer to.
async fn prepare(client: &dyn Client) -> Result<()> {
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"},
        "data": {"a": "1", "b": "2"}});
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"},
        "stringData": {"token": "t"}});
    client.create(Target::collection(Kind::of::<core::ConfigMap>(), NAMESPACE), map).await?;
    client.create(Target::collection(Kind::of::<core::Secret>(), NAMESPACE), secret).await?;
    Ok(())
}

/// The kinds of pods there are.
const KINDS: &[&str] = &["plain", "plain", "volumes", "shared", "ordered", "once", "host"];

/// A pod of a kind. Those that have an address of their own answer on port 8080.
fn pod(name: &str, kind: &str, rng: &mut StdRng) -> Value {
    let image = "minke.local/hello:v1";
    let sleep = json!(["sleep", "100000"]);
    let main = json!({"name": "main", "image": image});
    let spec = match kind {
        "volumes" => json!({
            "containers": [{"name": "main", "image": image,
                "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 2},
                "resources": {"requests": {"cpu": "2m"}, "limits": {"cpu": "200m", "memory": "64Mi"}},
                "volumeMounts": [
                    {"name": "disk", "mountPath": "/disk"}, {"name": "memory", "mountPath": "/memory"},
                    {"name": "disk", "mountPath": "/part", "subPath": "a/b"},
                    {"name": "settings", "mountPath": "/settings"}, {"name": "keys", "mountPath": "/keys"},
                    {"name": "settings", "mountPath": "/one", "subPath": "a"}]}],
            "volumes": [{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory"}},
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "keys", "secret": {"secretName": "keys"}}],
        }),
        "shared" => json!({"shareProcessNamespace": true, "containers": [
            main, {"name": "other", "image": image, "command": sleep, "resources": {"requests": {"cpu": "1m"}}}]}),
        "ordered" => json!({
            "initContainers": [
                {"name": "first", "image": image, "command": ["true"]},
                {"name": "side", "image": image, "command": sleep, "restartPolicy": "Always"}],
            "containers": [main]}),
        "once" => {
            let seconds = rng.random_range(ONCE_SECONDS);
            let script = format!("sleep {seconds}; exit {ONCE_CODE}");
            json!({"restartPolicy": "Never",
                "containers": [{"name": "main", "image": image, "command": ["sh", "-c", script]}]})
        }
        "host" => json!({"hostNetwork": true,
            "containers": [{"name": "main", "image": image, "command": sleep}]}),
        _ => json!({"containers": [main]}),
    };
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"kind": kind}}, "spec": spec});
    if kind != "host" && rng.random_bool(0.3) {
        pod["spec"]["hostUsers"] = false.into();
    }
    pod["spec"]["terminationGracePeriodSeconds"] = rng.random_range(1..4).into();
    pod
}

/// What was asked for, and what was done to it.
#[derive(Default)]
struct Ledger {
    /// By name.
    pods: BTreeMap<String, Wanted>,
    /// How often containers of a pod were ended from outside, by uid.
    hits: BTreeMap<String, u32>,
}

#[derive(Clone, PartialEq)]
enum Wanted {
    Absent,
    /// By uid.
    Present(String),
    /// The server went while it was asked.
    Unknown,
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().expect("nothing panics while the ledger is locked")
}

impl Ledger {
    fn differences(&self, pods: &[Arc<core::Pod>]) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut found = BTreeMap::new();
        for pod in pods {
            let name = pod.metadata.name.clone().unwrap_or_default();
            if let Some(why) = self.wrong_with(pod) {
                wrong.push(format!("pod {name}: {why}"));
            }
            found.insert(name, pod.metadata.uid.clone().unwrap_or_default());
        }
        for (name, wanted) in &self.pods {
            match (wanted, found.get(name)) {
                (Wanted::Absent, Some(uid)) => {
                    wrong.push(format!("pod {name} ({uid}) was deleted and is there"))
                }
                (Wanted::Present(uid), found) if found != Some(uid) => {
                    wrong.push(format!("pod {name} ({uid}) was made, and there is {found:?}"));
                }
                _ => {}
            }
        }
        wrong
    }

    /// Why a pod is not as its specification says.
    fn wrong_with(&self, pod: &core::Pod) -> Option<String> {
        let labels = pod.metadata.labels.as_ref();
        let once = labels.and_then(|labels| labels.get("kind")).is_some_and(|kind| kind == "once");
        if pod.metadata.deletion_timestamp.is_some() {
            return Some("it is being deleted".to_owned());
        }
        let hits = self.hits.get(pod.metadata.uid.as_deref()?).copied().unwrap_or(0);
        let status = pod.status.as_ref()?;
        let containers: Vec<&core::ContainerStatus> = status.container_statuses.iter().flatten().collect();
        if once {
            let ended = containers.first().and_then(|c| c.state.as_ref()?.terminated.as_ref());
            let code = ended.map(|ended| ended.exit_code);
            let fits = code == Some(ONCE_CODE) || (code == Some(137) && hits > 0);
            return (!fits || status.phase.as_deref() != Some("Failed"))
                .then(|| format!("phase {:?}, exit code {code:?} after {hits} hits", status.phase));
        }
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if status.phase.as_deref() != Some("Running") || !ready {
            let states: Vec<_> = containers.iter().map(|c| c.state.clone()).collect();
            return Some(format!("phase {:?}, ready {ready}, after {hits} hits: {states:?}", status.phase));
        }
        let spec = pod.spec.as_ref()?;
        for (asked, container) in spec
            .containers
            .iter()
            .filter_map(|asked| Some((asked, containers.iter().find(|status| status.name == asked.name)?)))
        {
            if asked.image.as_ref() != Some(&container.image) {
                return Some(format!("image {} instead of {:?}", container.image, asked.image));
            }
            if container.restart_count < 0 || container.restart_count.unsigned_abs() > hits {
                return Some(format!("{} restarts after {hits} hits", container.restart_count));
            }
        }
        None
    }

    /// Takes note that containers of the pod end now, unless that was so often enough already.
    fn hit(&mut self, uid: &str) -> bool {
        let hits = self.hits.entry(uid.to_owned()).or_default();
        let may = *hits < HITS_MAX;
        *hits += u32::from(may);
        may
    }
}

/// Makes, changes and deletes pods until it is told to stop.
struct Churner {
    client: Arc<dyn Client>,
    ledger: Arc<Mutex<Ledger>>,
    pods: usize,
    /// Of a pod, on average.
    life_ms: u64,
    rng: StdRng,
}

impl Churner {
    async fn run(mut self, mut stopped: tokio::sync::watch::Receiver<bool>) -> Result<usize> {
        let mut changes = 0;
        // Names are used again, and the first pods come quickly.
        let pause = self.life_ms / self.pods as u64;
        while !*stopped.borrow_and_update() {
            let present = lock(&self.ledger).pods.values().filter(|w| **w != Wanted::Absent).count();
            let name = format!("p{}", self.rng.random_range(0..self.pods + self.pods / 2));
            changes += usize::from(self.change(&name, present).await?);
            let growing = present < self.pods / 2;
            let pause = if growing { pause / 4 } else { pause };
            let pause = Duration::from_millis(self.rng.random_range(0..=pause));
            tokio::select! { _ = stopped.changed() => {}, () = tokio::time::sleep(pause) => {} }
        }
        Ok(changes)
    }

    async fn change(&mut self, name: &str, present: usize) -> Result<bool> {
        let kind = Kind::of::<core::Pod>();
        let target = Target::object(kind, NAMESPACE, name);
        let known = lock(&self.ledger).pods.get(name).cloned().unwrap_or(Wanted::Absent);
        let outcome = match known {
            Wanted::Absent if present >= self.pods => return Ok(false),
            Wanted::Absent => {
                let kind_of_pod = KINDS[self.rng.random_range(0..KINDS.len())];
                let body = pod(name, kind_of_pod, &mut self.rng);
                let made = self.client.create(Target::collection(kind, NAMESPACE), body).await;
                made.map(|object| Some(Wanted::Present(object.uid().to_owned())))
            }
            Wanted::Unknown => match self.client.get(target).await {
                Ok(object) if object.deleted().is_some() => Ok(Some(Wanted::Absent)),
                Ok(object) => Ok(Some(Wanted::Present(object.uid().to_owned()))),
                Err(error) if error.is_not_found() => Ok(Some(Wanted::Absent)),
                Err(error) => Err(error),
            },
            Wanted::Present(uid) if self.rng.random_bool(0.2) => {
                let allowed = lock(&self.ledger).hit(&uid);
                if !allowed {
                    return Ok(false);
                }
                let image = format!("minke.local/hello:v{}", self.rng.random_range(1..3));
                let patch = json!({"spec": {"containers": [{"name": "main", "image": image}]}});
                self.client.patch(target, Patch::Strategic(patch)).await.map(|_| None)
            }
            Wanted::Present(uid) => {
                let grace_period = [None, None, Some(0), Some(1)][self.rng.random_range(0..4)];
                let options = DeleteOptions { grace_period, uid: Some(uid), ..DeleteOptions::default() };
                self.client.delete(target, options).await.map(|()| Some(Wanted::Absent))
            }
        };
        let wanted = match outcome {
            Ok(wanted) => wanted,
            // The old pod of that name is still there.
            Err(error) if error.code == 409 => return Ok(false),
            Err(error) if is_away(&error) => Some(Wanted::Unknown),
            Err(error) => bail!("{name}: {error}"),
        };
        if let Some(wanted) = wanted {
            lock(&self.ledger).pods.insert(name.to_owned(), wanted);
        }
        Ok(true)
    }
}

/// The server is not there or does not answer: whether it did what it was asked is not known.
fn is_away(error: &Status) -> bool {
    matches!(error.code, 429 | 500 | 503 | 504)
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    KillAgent,
    EndAgent,
    HangAgent,
    KillServer,
    HangServer,
    KillAll,
    KillShims,
    HangShim,
    KillShimAndAgent,
    KillContainer,
    KillPause,
    KillHelpers,
}

/// Each as often as it is named.
const FAULTS: &[Fault] = &[
    Fault::KillAgent,
    Fault::KillAgent,
    Fault::KillAgent,
    Fault::EndAgent,
    Fault::HangAgent,
    Fault::KillServer,
    Fault::HangServer,
    Fault::KillAll,
    Fault::KillShims,
    Fault::KillShims,
    Fault::HangShim,
    Fault::KillShimAndAgent,
    Fault::KillContainer,
    Fault::KillContainer,
    Fault::KillPause,
    Fault::KillHelpers,
];

/// The processes of the cluster.
struct Machine {
    minke: PathBuf,
    data: DataDir,
    dir: PathBuf,
    server: Child,
    agent: Child,
    log: File,
    started: Instant,
}

impl Machine {
    fn start(minke: &Path, data: &DataDir, dir: &Path) -> Result<Machine> {
        let server = start_server(minke, data.path(), dir)?;
        let agent = start_agent(minke, data, dir)?;
        let log = File::create(dir.join("faults.log"))?;
        let (minke, data, dir) = (minke.to_owned(), data.clone(), dir.to_owned());
        Ok(Machine { minke, data, dir, server, agent, log, started: Instant::now() })
    }

    fn client(&self) -> Result<Arc<dyn Client>> {
        Ok(Arc::new(HttpsClient::new(&kubeconfig::identity(&self.data.join("kubeconfig"))?)?))
    }

    fn note(&mut self, what: &str) {
        use std::io::Write;
        let now = humantime();
        let _ = writeln!(self.log, "{now} ({:.1} s) {what}", self.started.elapsed().as_secs_f64());
    }

    /// The layers that there are, once the agent has made the images.
    fn snapshots(&self) -> Result<std::collections::BTreeSet<String>> {
        let end = Instant::now() + Duration::from_secs(60);
        let tags = self.data.join("images");
        let mut last = Default::default();
        loop {
            let names = inventory::names(&self.data.join("snapshots"));
            // Its directories come after the images, when the kubelet starts.
            if self.data.join("pods").exists() && !names.is_empty() && names == last {
                return Ok(names);
            }
            if Instant::now() > end {
                bail!("the agent makes no images in {}", tags.display());
            }
            last = names;
            std::thread::sleep(PAUSE);
        }
    }

    /// Has the fault happen and undoes what does not undo itself; returns its name.
    async fn suffer(
        &mut self,
        fault: Fault,
        ledger: &Mutex<Ledger>,
        rng: &mut StdRng,
    ) -> Result<&'static str> {
        let moment = Duration::from_millis(rng.random_range(0..3000));
        match fault {
            Fault::KillAgent => {
                self.agent.kill()?;
                self.agent_again(moment).await?;
                Ok("agents killed")
            }
            Fault::EndAgent => {
                send(pid_of(&self.agent), Signal::TERM);
                self.agent_again(moment).await?;
                Ok("agents ended")
            }
            Fault::HangAgent | Fault::HangServer => {
                let (child, name) = match fault {
                    Fault::HangAgent => (&self.agent, "agents hung"),
                    _ => (&self.server, "servers hung"),
                };
                let pid = pid_of(child);
                send(pid, Signal::STOP);
                tokio::time::sleep(moment * 2).await;
                send(pid, Signal::CONT);
                Ok(name)
            }
            Fault::KillServer => {
                self.server.kill()?;
                self.server.wait()?;
                tokio::time::sleep(moment).await;
                self.server = start_server(&self.minke, self.data.path(), &self.dir)?;
                Ok("servers killed")
            }
            Fault::KillAll => {
                self.server.kill()?;
                self.agent.kill()?;
                self.server.wait()?;
                self.server = start_server(&self.minke, self.data.path(), &self.dir)?;
                self.agent_again(moment).await?;
                Ok("servers and agents killed")
            }
            Fault::KillShims => {
                for _ in 0..rng.random_range(1..4) {
                    self.kill_shim(ledger, rng);
                }
                Ok("times shims killed")
            }
            Fault::KillShimAndAgent => {
                self.agent.kill()?;
                self.kill_shim(ledger, rng);
                self.agent_again(moment).await?;
                Ok("agents and shims killed")
            }
            Fault::HangShim => {
                if let Some(shim) = self.pick(rng) {
                    self.note(&format!("shim {} of {}", shim.id, shim.uid));
                    send(shim.pid, Signal::STOP);
                    tokio::time::sleep(moment).await;
                    send(shim.pid, Signal::CONT);
                }
                Ok("shims hung")
            }
            Fault::KillContainer | Fault::KillPause | Fault::KillHelpers => {
                let name = match fault {
                    Fault::KillContainer => "containers killed",
                    Fault::KillPause => "pause processes killed",
                    _ => "times helpers killed",
                };
                self.kill_process(fault, ledger, rng);
                Ok(name)
            }
        }
    }

    async fn agent_again(&mut self, after: Duration) -> Result<()> {
        self.agent.wait()?;
        tokio::time::sleep(after).await;
        self.agent = start_agent(&self.minke, &self.data, &self.dir)?;
        Ok(())
    }

    /// A sandbox that runs.
    fn pick(&self, rng: &mut StdRng) -> Option<Sandbox> {
        let mut all = inventory::sandboxes(&self.data);
        all.retain(|sandbox| command_line(sandbox.pid).contains(&sandbox.id));
        (!all.is_empty()).then(|| all.swap_remove(rng.random_range(0..all.len())))
    }

    fn kill_shim(&mut self, ledger: &Mutex<Ledger>, rng: &mut StdRng) {
        if let Some(shim) = self.pick(rng)
            && lock(ledger).hit(&shim.uid)
        {
            self.note(&format!("shim {} of {}", shim.id, shim.uid));
            send(shim.pid, Signal::KILL);
        }
    }

    fn kill_process(&mut self, fault: Fault, ledger: &Mutex<Ledger>, rng: &mut StdRng) {
        let mut all = inventory::processes(&self.data);
        all.retain(|(_, cgroup, line)| match fault {
            Fault::KillContainer => cgroup.contains("/pod"),
            Fault::KillPause => line.starts_with("minke-pause"),
            _ => line.starts_with("minke-run"),
        });
        if all.is_empty() {
            return;
        }
        let (pid, cgroup, line) = all.swap_remove(rng.random_range(0..all.len()));
        let uid = match fault {
            Fault::KillContainer => {
                cgroup.split('/').find_map(|part| part.strip_prefix("pod")).map(str::to_owned)
            }
            Fault::KillPause => {
                let all = inventory::sandboxes(&self.data);
                all.into_iter().find(|sandbox| sandbox.pause_pid == Some(pid)).map(|sandbox| sandbox.uid)
            }
            _ => {
                let id = line.split(' ').nth(3).unwrap_or_default();
                let path = self.data.join("containers").join(id).join("container.json");
                let record: Option<Value> =
                    fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok());
                let sandbox = record.and_then(|record| Some(record["sandbox_id"].as_str()?.to_owned()));
                let all = inventory::sandboxes(&self.data);
                all.into_iter().find(|known| Some(&known.id) == sandbox.as_ref()).map(|sandbox| sandbox.uid)
            }
        };
        if let Some(uid) = uid
            && lock(ledger).hit(&uid)
        {
            self.note(&format!("process {pid} of {uid}: {line}"));
            send(pid, Signal::KILL);
        }
    }

    /// Takes the cluster down and says what is left of it.
    fn end(mut self, cluster: &TestCluster) -> Result<Vec<String>> {
        send(pid_of(&self.agent), Signal::CONT);
        send(pid_of(&self.server), Signal::CONT);
        let left = cluster.down();
        self.agent.wait()?;
        self.server.wait()?;
        left
    }
}

fn humantime() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let day = since.as_secs() % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", day / 3600, day / 60 % 60, day % 60, since.subsec_millis())
}

fn start_agent(minke: &Path, data: &DataDir, dir: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("agent.log"))?;
    let mut command = Command::new(minke);
    command.args(["agent", "--data-dir"]).arg(data.path()).process_group(0);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().with_context(|| format!("start {}", minke.display()))
}

fn pid_of(child: &Child) -> i32 {
    Pid::from_child(child).as_raw_pid()
}

fn command_line(pid: i32) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).into_owned()
}

/// One that has ended meanwhile is fine.
fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid)
        && let Ok(handle) = pidfd_open(pid, PidfdFlags::empty())
    {
        let _ = pidfd_send_signal(handle, signal);
    }
}
