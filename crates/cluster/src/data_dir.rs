//! A cluster's directory: where everything of it lies, who holds it, and what was decided when it was made.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::Ipv4Net;
use minke_network::ClusterId;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::ports;

pub const DEFAULT: &str = "/var/lib/minke";
/// Held by the server, and by an agent of its own process.
pub const SERVER_LOCK: &str = "minke.lock";
pub const AGENT_LOCK: &str = "agent.lock";
/// One file per cluster of this machine that is up, so that a new one can keep out of their way.
const REGISTRY: &str = "/run/minke/clusters";

/// An absolute path; whether there is a cluster in it is another question.
#[derive(Debug, Clone, PartialEq)]
pub struct DataDir(PathBuf);

/// What stays the same over the life of a cluster: `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    pub api_port: u16,
    pub kubelet_port: u16,
    pub pod_cidr: Ipv4Net,
    pub service_cidr: Ipv4Net,
    /// Pods that the node takes at most.
    #[serde(default = "usual_pods")]
    pub max_pods: u32,
    /// The node's name and address when they were given; otherwise the machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_ip: Option<Ipv4Addr>,
    /// Files that have this cluster's context, besides the directory's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kubeconfigs: Vec<PathBuf>,
}

/// Upstream's default.
fn usual_pods() -> u32 {
    110
}

impl Config {
    /// The node's share of the pod network: at least twice as many addresses as pods, so that one that was given
    /// back is not used again at once, and never less than a /24.
    pub fn node_cidr(&self) -> Result<Ipv4Net> {
        let addresses = self.max_pods.saturating_mul(2).next_power_of_two().max(256);
        let prefix = addresses.leading_zeros() as u8 + 1;
        if prefix < self.pod_cidr.prefix_len() {
            bail!("{} has no room for the addresses of {} pods", self.pod_cidr, self.max_pods);
        }
        Ok(Ipv4Net::new(self.pod_cidr.network(), prefix)?)
    }
}

/// What the user asked for, where it is not the default.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    pub api_port: Option<u16>,
    pub max_pods: Option<u32>,
    pub node_name: Option<String>,
    pub node_ip: Option<Ipv4Addr>,
}

impl DataDir {
    /// Relative paths are taken from the working directory, links are followed where they exist.
    pub fn new(path: &Path) -> Result<DataDir> {
        let absolute =
            std::path::absolute(path).with_context(|| format!("data directory {}", path.display()))?;
        // Only what exists can be resolved; the id must be the same before and after it is made.
        let mut missing = Vec::new();
        let mut at = absolute.as_path();
        loop {
            if let Ok(real) = at.canonicalize() {
                return Ok(DataDir(missing.iter().rev().fold(real, |path, name| path.join(name))));
            }
            match (at.parent(), at.file_name()) {
                (Some(parent), Some(name)) => {
                    missing.push(name.to_owned());
                    at = parent;
                }
                _ => return Ok(DataDir(absolute)),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn id(&self) -> ClusterId {
        ClusterId::of(&self.0)
    }

    pub fn is_default(&self) -> bool {
        self.0 == Path::new(DEFAULT)
    }

    /// The cgroup that all of this cluster's are in, relative to the root of each hierarchy.
    pub fn cgroup(&self) -> String {
        format!("minke-{}", self.id())
    }

    /// The name of the context in kubeconfig files that other clusters share.
    pub fn context_name(&self) -> String {
        if self.is_default() { "minke".to_owned() } else { format!("minke-{}", self.id()) }
    }

    /// The options that make `minke` mean this cluster, with a leading space; empty for the default.
    pub fn option(&self) -> String {
        if self.is_default() { String::new() } else { format!(" --data-dir {}", self.0.display()) }
    }

    /// Whether a cluster was made here.
    pub fn exists(&self) -> bool {
        self.join("config.json").exists()
    }

    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("make {}", self.0.display()))?;
        fs::set_permissions(&self.0, Permissions::from_mode(0o700))
            .with_context(|| format!("restrict {}", self.0.display()))
    }

    pub fn config(&self) -> Result<Config> {
        let path = self.join("config.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!(
                    "there is no cluster in {}: make one with `minke{} up`",
                    self.0.display(),
                    self.option()
                )
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
    }

    pub fn save(&self, config: &Config) -> Result<()> {
        write_file(&self.join("config.json"), &serde_json::to_vec_pretty(config)?, 0o600)
    }

    /// As [`Self::config_with`], and from now on other clusters keep clear of its ports and networks, also those
    /// that are made at the same moment.
    pub fn settle(&self, wishes: &Wishes) -> Result<Config> {
        fs::create_dir_all(REGISTRY).with_context(|| format!("make {REGISTRY}"))?;
        let _turn = wait_for(&Path::new(REGISTRY).with_file_name("clusters.lock"))?;
        let config = self.config_with(wishes)?;
        let path = Path::new(REGISTRY).join(self.id().as_str());
        write_file(&path, &serde_json::to_vec(&(&self.0, &config))?, 0o644)?;
        Ok(config)
    }

    /// The cluster's configuration; decided and kept if there is none. Wishes change what is there.
    pub fn config_with(&self, wishes: &Wishes) -> Result<Config> {
        self.create()?;
        let before = if self.exists() { Some(self.config()?) } else { None };
        let mut config = match &before {
            Some(config) => config.clone(),
            None => self.decide()?,
        };
        config.api_port = wishes.api_port.unwrap_or(config.api_port);
        config.max_pods = wishes.max_pods.unwrap_or(config.max_pods);
        let node_cidr = config.node_cidr()?;
        if let Some(before) = &before
            && before.node_cidr()? != node_cidr
        {
            bail!(
                "a cluster made for {} pods on a node has no addresses for {}: that is chosen when it is made",
                before.max_pods,
                config.max_pods
            );
        }
        if wishes.node_name.is_some() {
            config.node_name.clone_from(&wishes.node_name);
        }
        if wishes.node_ip.is_some() {
            config.node_ip = wishes.node_ip;
        }
        if before.as_ref() != Some(&config) {
            self.save(&config)?;
        }
        Ok(config)
    }

    /// Well-known ports and addresses for the default cluster, others' own for every other one.
    fn decide(&self) -> Result<Config> {
        let mut config = Config {
            api_port: 6443,
            kubelet_port: 10250,
            pod_cidr: "10.244.0.0/16".parse().expect("a network"),
            service_cidr: "10.96.0.0/12".parse().expect("a network"),
            max_pods: usual_pods(),
            node_name: None,
            node_ip: None,
            kubeconfigs: Vec::new(),
        };
        if self.is_default() {
            return Ok(config);
        }
        let others: Vec<Config> = self.others().into_iter().map(|(_, config)| config).collect();
        let taken: Vec<u16> = others.iter().flat_map(|other| [other.api_port, other.kubelet_port]).collect();
        config.api_port = ports::free(6444, &taken)?;
        config.kubelet_port = ports::free(10350, &taken)?;
        let mut networks: Vec<Ipv4Net> =
            others.iter().flat_map(|other| [other.pod_cidr, other.service_cidr]).collect();
        networks.extend(ports::routed_networks());
        (config.pod_cidr, config.service_cidr) = ports::free_networks(&networks)?;
        Ok(config)
    }

    /// The other clusters of this machine that are up or about to be, by data directory.
    fn others(&self) -> Vec<(PathBuf, Config)> {
        let files = fs::read_dir(REGISTRY).into_iter().flatten().flatten();
        let entries = files.filter_map(|file| fs::read(file.path()).ok());
        let entries = entries.filter_map(|text| serde_json::from_slice::<(PathBuf, Config)>(&text).ok());
        // A directory that was simply deleted is no cluster any more.
        entries.filter(|(path, _)| *path != self.0 && path.join("config.json").exists()).collect()
    }

    /// Its ports and networks are free for others.
    pub fn unregister(&self) {
        // Only a file that is there can be in the way of anything.
        let _ = fs::remove_file(Path::new(REGISTRY).join(self.id().as_str()));
    }

    /// Takes the directory for this process, for as long as the answer lives; `None` when another process has it.
    /// The server's lock is [`SERVER_LOCK`].
    pub fn lock(&self, name: &str) -> Result<Option<Lock>> {
        let mut file = self.lock_file(name)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("lock {}", self.0.display())),
        }
        file.set_len(0)?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes())?;
        Ok(Some(Lock { _file: file }))
    }

    fn lock_file(&self, name: &str) -> Result<File> {
        let path = self.join(name);
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true).mode(0o600);
        options.open(&path).with_context(|| format!("open {}", path.display()))
    }

    /// The process of the server, if any: a handle that cannot come to mean another process.
    pub fn holder(&self) -> Result<Option<Holder>> {
        self.holder_of(SERVER_LOCK)
    }

    /// The process that holds the lock `name`.
    pub fn holder_of(&self, name: &str) -> Result<Option<Holder>> {
        if !self.join(name).exists() {
            return Ok(None);
        }
        let mut file = self.lock_file(name)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(None) };
        // Whoever holds the lock wrote the number before; if it is still held now, the handle is of that process.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(_) => Ok(Some(Holder { pid, handle })),
        }
    }

    /// Keeps others from starting or stopping this cluster at the same time; waits for those who are at it.
    pub fn transition(&self) -> Result<Lock> {
        wait_for(&self.join("transition.lock"))
    }
}

/// Locks the file, which need not be there, when whoever has it lets go.
fn wait_for(path: &Path) -> Result<Lock> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("lock {}", path.display()))?;
    Ok(Lock { _file: file })
}

/// Ends with the value; the kernel also ends it with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The process of a running server.
pub struct Holder {
    pub pid: Pid,
    pub handle: std::os::fd::OwnedFd,
}

/// Replaces a file at once: a reader sees the old or the new one, also after a crash.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&temporary)?;
        // The mode above is cut by the umask, and does not change a file that was there.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_cluster_keeps_what_was_decided() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(&dir.path().join("a/b")).unwrap();
        assert!(!data.exists());
        let wishes = Wishes { api_port: Some(7001), ..Wishes::default() };
        let first = data.config_with(&wishes).unwrap();
        assert_eq!(first.api_port, 7001);
        assert_ne!(first.kubelet_port, 10250);
        assert_eq!(data.config_with(&Wishes::default()).unwrap(), first);
        assert_eq!(DataDir::new(&dir.path().join("a/b")).unwrap().id(), data.id());
        assert_eq!(fs::metadata(data.join("config.json")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_node_has_twice_as_many_addresses_as_pods() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(&dir.path().join("c")).unwrap();
        let of = |pods| data.config_with(&Wishes { max_pods: Some(pods), ..Wishes::default() });
        let check = |config: Result<Config>, prefix: u8| {
            assert_eq!(config.unwrap().node_cidr().unwrap().prefix_len(), prefix);
        };
        check(of(110), 24);
        check(of(1), 24);
        check(of(128), 24);
        // The addresses of a cluster that exists stay what they are.
        assert!(of(500).unwrap_err().to_string().contains("chosen when it is made"));
        assert_eq!(data.config().unwrap().max_pods, 128);
        fs::remove_file(data.join("config.json")).unwrap();
        check(of(500), 22);
        fs::remove_file(data.join("config.json")).unwrap();
        assert!(of(100_000).unwrap_err().to_string().contains("no room"));
    }

    #[test]
    fn one_process_at_a_time_holds_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(dir.path()).unwrap();
        assert!(data.holder().unwrap().is_none());
        let lock = data.lock(SERVER_LOCK).unwrap().expect("nobody has it");
        assert!(data.lock(SERVER_LOCK).unwrap().is_none());
        let holder = data.holder().unwrap().expect("we hold it");
        assert_eq!(holder.pid, rustix::process::getpid());
        drop(lock);
        assert!(data.holder().unwrap().is_none());
    }
}
