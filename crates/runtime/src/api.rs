//! What the node agent codes against: pod sandboxes, containers and images, in CRI's shape.
//!
//! The types mirror `runtime.v1` of the CRI where a field has the same meaning, so that another
//! implementation of [`Runtime`] can sit on containerd or CRI-O. Nothing here does I/O.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{broadcast, mpsc, oneshot};

/// Opaque strings the caller wants back after a restart of the agent.
pub type Labels = BTreeMap<String, String>;

/// Most bytes [`Runtime::exec_sync`] keeps of each of stdout and stderr (CRI's limit of 16 MiB).
pub const EXEC_SYNC_OUTPUT_MAX: usize = 16 << 20;

/// Why the runtime could not do something; a variant is something the caller does differently.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No such sandbox, container or image. The text is complete.
    #[error("{0}")]
    NotFound(String),
    /// The id or name is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request can never succeed as it stands.
    #[error("{0}")]
    Invalid(String),
    /// The reference is not one an image can have (kubelet: InvalidImageName).
    #[error("{0}")]
    InvalidImageName(String),
    /// The container's program could not be started (kubelet: StartError, exit code 128).
    #[error("{0}")]
    Start(String),
    /// It did not happen within the time allowed.
    #[error("{0}")]
    Timeout(String),
    /// Anything else: trying again may help.
    #[error("{0}")]
    Failed(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound(_))
    }
}

/// A pod sandbox to be made. `id` is the caller's: unique, `[a-z0-9-]`, at most 64 bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxSpec {
    pub id: String,
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub attempt: u32,
    /// Empty leaves the name of the node.
    pub hostname: String,
    pub host_network: bool,
    pub host_pid: bool,
    pub host_ipc: bool,
    /// All containers see one process namespace (`shareProcessNamespace`).
    pub share_pid: bool,
    /// The node's ids that are the pod's 0 and up (`hostUsers: false`); not together with the node's network,
    /// processes or IPC.
    pub user_namespace: Option<IdRange>,
    /// Directory that container logs lie under; made when missing.
    pub log_dir: PathBuf,
    /// The pod's cgroup, relative to the root of each hierarchy, without a leading slash
    /// (`minke-1a2b/kubepods/burstable/pod<uid>`). Missing levels are made; the last one is removed with the
    /// sandbox.
    pub cgroup_parent: String,
    /// Limits of the pod's cgroup.
    pub resources: Resources,
    pub sysctls: BTreeMap<String, String>,
    pub labels: Labels,
    pub annotations: Labels,
}

/// A way in which a runtime can run sandboxes, which a RuntimeClass chooses by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handler {
    /// Empty for the one that sandboxes have by default.
    pub name: String,
    pub recursive_read_only_mounts: bool,
    /// [`SandboxSpec::user_namespace`] can be asked for.
    pub user_namespaces: bool,
}

/// Ids of users and, the same numbers, of groups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    pub first: u32,
    pub count: u32,
}

/// A container to be made in a sandbox. `id` is the caller's, as in [`SandboxSpec`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerSpec {
    pub id: String,
    pub name: String,
    pub attempt: u32,
    /// A reference or an image id (`sha256:...`) that the image store holds.
    pub image: String,
    /// Instead of the image's entrypoint (and then without its cmd).
    pub command: Vec<String>,
    /// Instead of the image's cmd.
    pub args: Vec<String>,
    /// `(name, value)`, on top of the image's; a later one wins.
    pub env: Vec<(String, String)>,
    /// Empty means the image's, or `/`.
    pub cwd: String,
    pub user: User,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub resources: Resources,
    pub capabilities: Capabilities,
    pub privileged: bool,
    pub readonly_rootfs: bool,
    pub no_new_privs: bool,
    pub seccomp: Seccomp,
    /// `None` means the field's default list; an empty list unmasks (`procMount: Unmasked`).
    pub masked_paths: Option<Vec<String>>,
    pub readonly_paths: Option<Vec<String>>,
    pub tty: bool,
    /// Keep a stdin open for `attach`; without it the container reads end of file.
    pub stdin: bool,
    /// Close stdin when the first attached client goes (`stdinOnce`).
    pub stdin_once: bool,
    /// Absolute path of the log file, in the CRI format. Its directory is made when missing.
    pub log_path: PathBuf,
    /// Instead of the image's: the name or number of the signal that asks it to end.
    pub stop_signal: String,
    pub oom_score_adj: Option<i32>,
    /// Id of a container of the sandbox whose process namespace this one joins (CRI's `target_id`).
    pub pid_target: Option<String>,
    pub labels: Labels,
    pub annotations: Labels,
}

/// Who the container runs as.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct User {
    /// A uid or a name in the image's `/etc/passwd`; `None` means the image's user.
    pub user: Option<String>,
    /// `None` means the user's primary group.
    pub group: Option<u32>,
    /// On top of the groups the image's `/etc/group` gives the user.
    pub supplementary_groups: Vec<u32>,
    /// Take no groups from the image (`supplementalGroupsPolicy: Strict`).
    pub strict_groups: bool,
}

/// A file or directory of the node inside the container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    pub host_path: PathBuf,
    /// Instead of `host_path`: an image (id or reference) that the store holds, and a path in it, which may not lead
    /// out of it.
    pub image: Option<String>,
    pub image_sub_path: String,
    pub image_access: ImageAccess,
    /// Instead of `host_path`: a new filesystem in memory, of so many bytes; 0 is no limit.
    pub tmpfs_size: Option<u64>,
    pub container_path: PathBuf,
    pub readonly: bool,
    /// Read-only for the mounts below it as well.
    pub recursive_readonly: bool,
    pub propagation: Propagation,
}

/// What may be done with the files of an image that is mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageAccess {
    /// They are data: nothing can be changed or executed, as in an image volume.
    #[default]
    Data,
    /// Programs run.
    Programs,
    /// They can be changed as well; what is changed goes with the container.
    Scratch,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    #[default]
    Private,
    HostToContainer,
    Bidirectional,
}

/// A device node of the host, made in the container and allowed in its device cgroup.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    pub host_path: PathBuf,
    pub container_path: PathBuf,
    /// Some of `rwm`.
    pub permissions: String,
}

/// cgroup limits in v1's units; `None` leaves the kernel's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    pub cpu_shares: Option<u64>,
    /// Microseconds per period; -1 is no limit.
    pub cpu_quota_us: Option<i64>,
    pub cpu_period_us: Option<u64>,
    /// Bytes; -1 is no limit.
    pub memory_limit: Option<i64>,
    /// -1 is no limit.
    pub pids_limit: Option<i64>,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    /// Bytes by page size, named as the kernel does in its files (`2MB`).
    pub hugepages: BTreeMap<String, u64>,
    /// Where the kernel can (v2): when memory runs out, all processes go together.
    pub oom_group: bool,
}

/// Changes to the field's default set of 14. Names with or without `CAP_`; `ALL` is every one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    pub add: Vec<String>,
    pub drop: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    /// The field's default allow list.
    RuntimeDefault,
    #[default]
    Unconfined,
    /// A profile in the OCI JSON format on the node.
    Localhost(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SandboxState {
    Ready,
    NotReady,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    #[default]
    Created,
    Running,
    Exited,
}

/// A sandbox as it is, with every container in it that was not removed, oldest first.
#[derive(Debug, Clone)]
pub struct SandboxStatus {
    pub spec: SandboxSpec,
    pub state: SandboxState,
    pub created_at: Timestamp,
    /// The shim's process.
    pub pid: Option<i32>,
    pub containers: Vec<ContainerStatus>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub id: String,
    pub sandbox_id: String,
    pub name: String,
    pub attempt: u32,
    /// As asked for.
    pub image: String,
    /// The image's id, `sha256:` and the digest of its configuration.
    pub image_id: String,
    pub state: ContainerState,
    /// The first process, in the node's process namespace; kept after it ended.
    pub pid: Option<i32>,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// 128 + n when signal n ended it.
    pub exit_code: Option<i32>,
    pub oom_killed: bool,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`, or empty while it runs.
    pub reason: String,
    pub message: String,
    pub log_path: PathBuf,
    /// The name of the signal that asks it to end.
    #[serde(default)]
    pub stop_signal: String,
    pub tty: bool,
    pub stdin: bool,
    /// As resolved, what `status.containerStatuses[].user` shows.
    pub uid: u32,
    pub gid: u32,
    pub supplementary_groups: Vec<u32>,
    pub resources: Resources,
    pub labels: Labels,
    pub annotations: Labels,
}

/// Something that happened by itself or by request. Events of one container come in order.
#[derive(Debug, Clone)]
pub enum Event {
    ContainerStarted {
        sandbox_id: String,
        container_id: String,
        pid: i32,
    },
    /// Carries the final status: code, OOM flag, reason, times.
    ContainerExited {
        status: Box<ContainerStatus>,
    },
    /// The sandbox's shim ended, by request or not; its containers ended with it.
    SandboxExited {
        sandbox_id: String,
    },
}

/// Resource use of a container or a pod, from its cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Nanoseconds of CPU used since the cgroup was made.
    pub cpu_ns: u64,
    /// Bytes in use.
    pub memory_usage: u64,
    /// Bytes in use without the inactive file cache, which is what eviction and `top` look at.
    pub memory_working_set: u64,
    /// Bytes of anonymous memory.
    pub memory_rss: u64,
    /// Bytes of file cache.
    pub memory_cache: u64,
    /// Most bytes it may use; 0 is no limit of its own.
    pub memory_limit: u64,
    /// Page faults since the cgroup was made, and those of them that had to read.
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Periods in which it ran under a CPU limit, those in which it was held back, and for how long.
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_ns: u64,
}

/// What files take on a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUse {
    pub bytes: u64,
    pub inodes: u64,
}

/// A process to be run in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecSpec {
    pub argv: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    /// Not together with `tty`, where both outputs come as one.
    pub stderr: bool,
}

/// What to attach to; a stream the container does not have is `None` in the [`Session`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttachSpec {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// An exec'd process or an attachment, with its streams.
///
/// Dropping `stdin` closes it for the process (with a terminal: sends end-of-transmission is up to the client).
/// Dropping the session detaches; an exec'd process then goes on by itself, like upstream's.
pub struct Session {
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Send a size to resize the terminal; without a terminal it has no effect.
    pub resize: mpsc::Sender<TerminalSize>,
    /// The exit code, once the process ended (128 + n for signal n). For an attachment: the container's.
    pub exit: oneshot::Receiver<Result<i32>>,
}

/// What [`Runtime::exec_sync`] collected.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

/// Sandboxes and containers of a node.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// Name and version, as in the node's `containerRuntimeVersion` (`minke://0.1.0`).
    fn version(&self) -> String;

    /// What can run sandboxes, the default first.
    fn handlers(&self) -> Vec<Handler> {
        vec![Handler::default()]
    }

    /// Makes the namespaces, the cgroup and the shim. The network is the caller's to set up, in
    /// [`Runtime::sandbox_netns`], before the first container.
    async fn run_sandbox(&self, spec: SandboxSpec) -> Result<()>;

    /// Kills what still runs in it and ends the shim. Idempotent; the record stays until `remove_sandbox`.
    async fn stop_sandbox(&self, id: &str) -> Result<()>;

    /// Stops it when needed and removes every trace but the logs. Unknown ids are fine.
    async fn remove_sandbox(&self, id: &str) -> Result<()>;

    /// Where the sandbox's network namespace can be opened, as long as its shim lives; the caller's own for host
    /// network. A descriptor of it stays good after the shim.
    fn sandbox_netns(&self, id: &str) -> Result<PathBuf>;

    /// Prepares a container: resolves the image, the user and the arguments, mounts the root filesystem.
    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<()>;

    /// Starts the program. [`Error::Start`] when it cannot be: the container is then Exited with code 128 and
    /// reason `StartError`, and no event is sent.
    async fn start_container(&self, id: &str) -> Result<()>;

    /// Sends the container's or its image's stop signal, then SIGKILL once `grace` is over; returns when it has ended.
    /// A second call with a shorter grace shortens it.
    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()>;

    /// Kills it when needed and removes its mounts, cgroup and directories. Unknown ids are fine.
    async fn remove_container(&self, id: &str) -> Result<()>;

    /// Sends a signal to the container's first process.
    async fn signal_container(&self, id: &str, signal: i32) -> Result<()>;

    /// Sets new limits on a sandbox's own cgroup; what is `None` stays as it is.
    async fn update_sandbox(&self, id: &str, resources: Resources) -> Result<()>;

    /// Sets new limits on a running container.
    async fn update_container(&self, id: &str, resources: Resources) -> Result<()>;

    /// Everything there is, from memory: cheap. After a restart of the agent: what was adopted.
    async fn list(&self) -> Result<Vec<SandboxStatus>>;

    async fn container_status(&self, id: &str) -> Result<ContainerStatus>;

    /// Events from now on. A receiver that lags by more than 1024 events gets `Lagged` and should `list`.
    fn subscribe(&self) -> broadcast::Receiver<Event>;

    async fn exec(&self, container_id: &str, spec: ExecSpec) -> Result<Session>;

    async fn attach(&self, container_id: &str, spec: AttachSpec) -> Result<Session>;

    /// Makes the container's log file anew at its path after the caller renamed the old one.
    async fn reopen_log(&self, container_id: &str) -> Result<()>;

    async fn container_stats(&self, id: &str) -> Result<Stats>;

    async fn sandbox_stats(&self, id: &str) -> Result<Stats>;

    /// Use of a cgroup above the sandboxes', relative to the root of each hierarchy. Not every runtime knows.
    async fn cgroup_stats(&self, path: &str) -> Result<Stats> {
        Err(Error::NotFound(format!("cgroup {path:?} not found")))
    }

    /// Makes a cgroup above the sandboxes', when it is missing, and sets its limits. Not every runtime can.
    async fn set_cgroup(&self, _path: &str, _resources: Resources) -> Result<()> {
        Ok(())
    }

    /// What the container has written to its root filesystem; walks it. Not every runtime knows.
    async fn container_disk_use(&self, id: &str) -> Result<DiskUse> {
        Err(Error::NotFound(format!("the files of container {id:?} are not known")))
    }

    /// Runs a command to its end. [`Error::Timeout`] after `timeout` (zero: none), and the process is killed.
    async fn exec_sync(&self, container_id: &str, argv: Vec<String>, timeout: Duration)
    -> Result<ExecOutput>;
}

/// Credentials for a registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Auth {
    #[default]
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
    Bearer {
        token: String,
    },
}

/// How far a pull, load or push is. Called often: must be quick.
pub type Progress = std::sync::Arc<dyn Fn(ProgressEvent) + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgressEvent {
    /// The sum of all layers' compressed bytes became known.
    Total { bytes: u64 },
    /// More bytes arrived (a difference, not a sum).
    Transferred { bytes: u64 },
    /// A layer is being unpacked.
    Unpacking { layer: usize, layers: usize },
}

/// An image the store holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// `sha256:` and the digest of the configuration: the image's identity.
    pub id: String,
    /// `docker.io/library/nginx:1.27` ...
    pub tags: Vec<String>,
    /// `docker.io/library/nginx@sha256:...`, by the digest of the manifest.
    pub digests: Vec<String>,
    /// Bytes of the layers as transferred, with configuration.
    pub size: u64,
    /// When the image was built, as its configuration says.
    pub created: Option<Timestamp>,
    pub config: ImageConfig,
    /// Not to be collected: a person put it here.
    pub pinned: bool,
}

/// The part of an OCI image configuration that a container takes its defaults from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`
    pub env: Vec<String>,
    pub working_dir: String,
    /// `user`, `uid`, `user:group`, `uid:gid`, or empty for root.
    pub user: String,
    /// `SIGQUIT`, `3`, or empty for SIGTERM.
    pub stop_signal: String,
    pub volumes: Vec<String>,
    pub labels: Labels,
    pub os: String,
    pub architecture: String,
}

impl ImageConfig {
    /// The uid when the image names its user by number; what `runAsNonRoot` can be checked against.
    pub fn uid(&self) -> Option<u32> {
        match self.user.split(':').next() {
            None | Some("") => Some(0),
            Some(user) => user.parse().ok(),
        }
    }
}

/// The images of a node, as the agent needs them.
#[async_trait]
pub trait ImageService: Send + Sync {
    /// The image a reference or an id stands for, when the node has it.
    async fn resolve(&self, reference: &str) -> Result<Option<Image>>;

    /// Fetches and unpacks an image. Pulls of the same reference at the same time are one.
    async fn pull(&self, reference: &str, auth: Auth, progress: Option<Progress>) -> Result<Image>;

    async fn list(&self) -> Result<Vec<Image>>;

    /// Removes a tag, or by id the image with all its tags; layers no image needs any more go with it.
    async fn remove(&self, reference: &str) -> Result<()>;

    /// Bytes the store takes on disk: contents and snapshots.
    async fn disk_usage(&self) -> Result<u64>;

    /// Removes what no image needs: the rest of pulls that were given up; with `all`, also what is kept only to be
    /// quicker the next time.
    async fn clean_up(&self, _all: bool) -> Result<()> {
        Ok(())
    }
}

/// Reads a stream to its end, keeping at most `max` bytes.
pub(crate) async fn drain(stream: Option<Box<dyn AsyncRead + Send + Unpin>>, max: usize) -> Vec<u8> {
    let (mut kept, mut chunk) = (Vec::new(), [0u8; 8192]);
    let Some(mut stream) = stream else { return kept };
    while let Ok(n) = stream.read(&mut chunk).await {
        if n == 0 {
            break;
        }
        kept.extend_from_slice(&chunk[..n.min(max - kept.len())]);
    }
    kept
}
