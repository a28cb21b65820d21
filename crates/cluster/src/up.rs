//! `minke up` and `minke start`: start the server in the background and wait until the cluster is usable.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use crate::control::{self, Reply, Request};
use crate::data_dir::{Config, DataDir, Wishes};
use crate::io::{Followed, Io};
use crate::keys::Pair;
use crate::kubeconfig::{self, Entry};
use crate::startup::Stage;

/// The log is kept once more under another name when it is larger than this at a start.
pub const LOG_MAX: u64 = 16 << 20;
/// Bytes from the end of the log that are looked at for a failed start.
const LOG_TAIL: u64 = 4 << 10;

/// Start the cluster in the background and wait until its node is Ready.
///
/// The first start makes the cluster: its keys, its store and its kubeconfig. Running it again is harmless.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// The kubeconfig file that gets the cluster's context; the default is the file kubectl uses
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The port of the API server; the default is 6443, and a free one for a data directory other than the default
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// How many pods the node takes; the default is 110
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_pods: Option<u32>,
    /// The name of the node; the default is the host's
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// The address of the node; the default is the one of the default route
    #[arg(long, value_name = "ADDRESS")]
    node_ip: Option<Ipv4Addr>,
    #[command(flatten)]
    wait: WaitArgs,
}

/// Resume a cluster that was stopped, with its state.
#[derive(Debug, Args)]
pub struct StartArgs {
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
struct WaitArgs {
    /// How many seconds to wait for the node to become Ready
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
}

impl UpArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        require_root(data)?;
        let started = Instant::now();
        data.create()?;
        let transition = data.transition()?;
        let running = data.holder()?.is_some();
        let wishes = Wishes {
            api_port: self.port,
            max_pods: self.max_pods,
            node_name: self.node_name,
            node_ip: self.node_ip,
        };
        let mut config = if running { data.config()? } else { data.settle(&wishes)? };
        if running && self.port.is_some_and(|port| port != config.api_port) {
            bail!("the cluster is up on port {}: stop it first to move it", config.api_port);
        }
        if running && self.max_pods.is_some_and(|pods| pods != config.max_pods) {
            bail!("the cluster is up for {} pods: stop it first to change that", config.max_pods);
        }
        bring_up(data, &config, Duration::from_secs(self.wait.wait), io)?;
        let shared = share_kubeconfig(data, &mut config, self.kubeconfig)?;
        drop(transition);
        tell(data, io, if running { None } else { Some(started) }, shared.as_deref())
    }
}

impl StartArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        require_root(data)?;
        let started = Instant::now();
        let config = data.config()?;
        let _transition = data.transition()?;
        let running = data.holder()?.is_some();
        bring_up(data, &config, Duration::from_secs(self.wait.wait), io)?;
        tell(data, io, if running { None } else { Some(started) }, None)
    }
}

pub fn require_root(data: &DataDir) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("containers and networks need root: try `sudo minke{} ...`", data.option());
    }
    Ok(())
}

/// Starts the server unless it runs, and waits until it is ready.
fn bring_up(data: &DataDir, config: &Config, wait: Duration, io: &mut Io) -> Result<()> {
    let end = Instant::now() + wait;
    let (stages, child) = match running_server(data)? {
        Some(stages) => (stages, None),
        None => {
            check_ports(config, data)?;
            let mut child = spawn(data)?;
            let out = child.stdout.take().context("the server has no output")?;
            (read_stages(out), Some(child))
        }
    };
    let outcome = io.follow(&stages, end, |stage| match stage {
        Stage::Step(text) => Followed::Step(text),
        Stage::Ready => Followed::End(Ok(())),
        Stage::Failed(why) => Followed::End(Err(why)),
    });
    match outcome {
        Some(Ok(())) => Ok(()),
        Some(Err(why)) => Err(explain(data, &why)),
        None if Instant::now() >= end => {
            bail!(
                "the cluster is not ready after {} s; it goes on: `minke{} logs -f` shows how",
                wait.as_secs(),
                data.option()
            )
        }
        // The server ended without a word: only its log can tell.
        None => {
            let ended = child.map(|mut child| child.wait()).transpose()?;
            let how = ended.map_or_else(|| "it ended".to_owned(), |status| status.to_string());
            Err(explain(data, &format!("the server did not start: {how}")))
        }
    }
}

fn explain(data: &DataDir, why: &str) -> anyhow::Error {
    let tail = log_tail(&data.join("minke.log"));
    if tail.is_empty() {
        anyhow!("{why}")
    } else {
        anyhow!("{why}\n\nThe end of {}:\n{tail}", data.join("minke.log").display())
    }
}

fn check_ports(config: &Config, data: &DataDir) -> Result<()> {
    for (port, what, cure) in [
        (config.api_port, "API server", format!("`minke{} up --port PORT` takes another", data.option())),
        (
            config.kubelet_port,
            "kubelet",
            format!("change kubeletPort in {}", data.join("config.json").display()),
        ),
    ] {
        if !crate::ports::is_free(port) {
            bail!("port {port} of the {what} is in use by another program; {cure}");
        }
    }
    Ok(())
}

fn running_server(data: &DataDir) -> Result<Option<Receiver<Stage>>> {
    if data.holder()?.is_none() {
        return Ok(None);
    }
    let Some(mut call) = control::call(data, &Request::Wait)? else {
        bail!("another minke holds {} but does not answer on its socket", data.path().display());
    };
    let (sender, stages) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            let stage = match call.reply() {
                Ok(Reply::Stage(stage)) => stage,
                Ok(Reply::Error(why)) => Stage::Failed(why),
                Ok(Reply::Done(_)) | Err(_) => return,
            };
            if sender.send(stage).is_err() {
                return;
            }
        }
    });
    Ok(Some(stages))
}

fn spawn(data: &DataDir) -> Result<std::process::Child> {
    let path = data.join("minke.log");
    if fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_MAX) {
        fs::rename(&path, data.join("minke.log.1"))?;
    }
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let log = log.with_context(|| format!("open {}", path.display()))?;
    let program = std::env::current_exe().context("find this program's file")?;
    Command::new(program)
        .args(["server", "--detached", "--data-dir"])
        .arg(data.path())
        .env_remove("MINKE_DATA_DIR")
        // Every thread would get a heap of its own, which stays as large as it ever was.
        .env("MALLOC_ARENA_MAX", "2")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("start the server")
}

fn read_stages(out: impl Read + Send + 'static) -> Receiver<Stage> {
    let (sender, stages) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if let Ok(stage) = serde_json::from_str(&line)
                && sender.send(stage).is_err()
            {
                return;
            }
        }
    });
    stages
}

/// The last lines of the log.
fn log_tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let from = file.metadata()?.len().saturating_sub(LOG_TAIL);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].iter().map(|line| format!("  {line}\n")).collect()
}

/// Puts the cluster's context where kubectl looks for it; the file, if there is one.
///
/// The default cluster goes into the user's own file. Others leave that alone unless it is asked for.
fn share_kubeconfig(data: &DataDir, config: &mut Config, asked: Option<PathBuf>) -> Result<Option<PathBuf>> {
    let target = match asked {
        Some(path) => Some(std::path::absolute(path)?),
        None if data.is_default() => kubeconfig::usual_path(),
        None => None,
    };
    let Some(path) = target else { return Ok(None) };
    let read =
        |name: &str| fs::read_to_string(data.join("pki").join(name)).with_context(|| format!("read {name}"));
    let (ca, certificate, key) = (read("ca.crt")?, read("admin.crt")?, read("admin.key")?);
    let server = kubeconfig::identity(&data.join("kubeconfig"))?.server;
    let user = Pair { certificate, key };
    Entry { name: &data.context_name(), server: &server, ca: &ca, user: &user }.merge_into(&path)?;
    if !config.kubeconfigs.contains(&path) {
        config.kubeconfigs.push(path.clone());
        data.save(config)?;
    }
    Ok(Some(path))
}

fn tell(data: &DataDir, io: &mut Io, started: Option<Instant>, shared: Option<&Path>) -> Result<()> {
    let status = crate::status::query(data)?.context("the server ended right after it was ready")?;
    let node = status["node"]["name"].as_str().unwrap_or_default();
    let server = status["server"].as_str().unwrap_or_default();
    let version = status["kubernetesVersion"].as_str().unwrap_or_default();
    match started {
        Some(started) => io.say(format!(
            "The cluster is up after {:.1} s: node {node} is Ready, Kubernetes {version} at {server}",
            started.elapsed().as_secs_f64()
        ))?,
        None => io.say(format!(
            "The cluster is up already: node {node} is Ready, Kubernetes {version} at {server}"
        ))?,
    }
    let usual = kubeconfig::usual_path();
    let kubectl = match shared {
        Some(path) if Some(path) == usual.as_deref() => {
            io.say(format!("kubectl uses it now: context {} in {}", data.context_name(), path.display()))?;
            "kubectl".to_owned()
        }
        Some(path) => {
            io.say(format!("Its context {} is in {}", data.context_name(), path.display()))?;
            format!("kubectl --kubeconfig {}", path.display())
        }
        None if data.is_default() => "kubectl".to_owned(),
        None => format!("kubectl --kubeconfig {}", data.join("kubeconfig").display()),
    };
    io.say("\nNext:")?;
    for command in [
        format!("{kubectl} get nodes"),
        format!("{kubectl} create deployment hello --image=minke.local/hello:v1"),
        format!("{kubectl} expose deployment hello --type=NodePort --port=8080"),
        format!("curl $(minke{} service hello --url)", data.option()),
        format!("minke{} down", data.option()),
    ] {
        io.say(format!("  {command}"))?;
    }
    Ok(())
}
