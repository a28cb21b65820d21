//! Everything that is known of a pod on this node, as one picture that [`crate::plan`] and
//! [`crate::status`] look at. It is kept by the pod's worker and changed by nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use minke_runtime::{ContainerState, ContainerStatus, SandboxState, SandboxStatus};

/// Annotation of a container: milliseconds to wait after its exit before it is started again.
pub const BACKOFF_ANNOTATION: &str = "minke.io/restart-backoff-ms";
/// Annotation of a container: what the pod's status shows as `image` and `imageID`.
pub const IMAGE_ANNOTATION: &str = "minke.io/image";
pub const IMAGE_ID_ANNOTATION: &str = "minke.io/image-id";
/// Annotation of a container: its image as the pod named it, to see when that changes.
pub const ASKED_IMAGE_ANNOTATION: &str = "minke.io/asked-image";
/// Annotation of a container: in which round of the pod it was made, see [`crate::rounds`].
pub const ROUND_ANNOTATION: &str = "minke.io/round";
/// Annotation of a sandbox: its address, which so outlives the agent.
pub const ADDRESS_ANNOTATION: &str = "minke.io/address";

/// Work on a pod that takes a while. A job runs at most once at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Job {
    Volumes,
    Sandbox,
    /// From the image to the `postStart` hook, by container name.
    Start(String),
    /// By container id and by how many times it was asked for: a kill can be made shorter.
    Kill(String, u32),
    RemoveContainer(String),
    RemoveSandbox(String),
    Resize,
    Teardown,
    Delete,
    /// Of a static pod: bringing the API server's picture of it up to date.
    Mirror,
}

/// Why a pod is coming to its end; later ones are more final.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Nothing is left to run, or the API server shows a phase that is final.
    Finished,
    /// The agent ends it: `status.reason` and `status.message`.
    Failed { reason: String, message: String },
    /// Deletion was asked for.
    Deleted,
    /// The object is gone without us: it was deleted by force.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    pub cause: Cause,
    /// Seconds that were granted.
    pub grace: i64,
    /// When what still runs is killed.
    pub deadline: Timestamp,
}

/// How much of a pod that has ended was cleaned up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cleanup {
    #[default]
    None,
    /// Network and volumes are gone; containers and logs can still be looked at.
    Stopped,
    /// Nothing is left.
    Removed,
}

/// Why a container is not running yet, and when that is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub reason: String,
    pub message: String,
    pub since: Timestamp,
    pub retry_at: Timestamp,
    /// Reason and message to show in the second half of the wait, as a back-off.
    pub later: Option<(String, String)>,
    /// Try again as soon as an object that the pod refers to changes.
    pub on_change: bool,
}

impl Waiting {
    /// When [`Waiting::later`] takes over.
    pub fn turns_at(&self) -> Timestamp {
        let wait = self.retry_at.duration_since(self.since);
        self.since + wait / 2
    }

    /// Reason and message as of `now`.
    pub fn shown(&self, now: Timestamp) -> (&str, &str) {
        match &self.later {
            Some((reason, message)) if now >= self.turns_at() => (reason, message),
            _ => (&self.reason, &self.message),
        }
    }
}

/// Results of a running container's probes; `None` means there is no such probe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Probes {
    pub startup: Option<ProbeState>,
    pub liveness: Option<ProbeState>,
    pub readiness: Option<ProbeState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeState {
    /// Nothing is decided yet.
    Unknown,
    Success,
    Failure,
}

impl Probes {
    pub fn started(self) -> bool {
        self.startup.is_none_or(|state| state == ProbeState::Success)
    }

    pub fn ready(self) -> bool {
        self.started() && self.readiness.is_none_or(|state| state == ProbeState::Success)
    }
}

/// A pod's state on this node.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// Oldest first; the last one is the current one.
    pub sandboxes: Vec<SandboxStatus>,
    /// Volumes are mounted.
    pub volumes: bool,
    pub running_jobs: BTreeSet<Job>,
    /// Jobs that failed, and when they may be tried again.
    pub retries: BTreeMap<Job, Retry>,
    /// By container name.
    pub waiting: BTreeMap<String, Waiting>,
    /// By container id.
    pub probes: BTreeMap<String, Probes>,
    /// Deadlines of the kills under way, by container id, and how many were asked for.
    pub kills: BTreeMap<String, (Timestamp, u32)>,
    /// Containers that were killed so that they run again, by id; true when at once.
    pub restarting: BTreeMap<String, bool>,
    /// How many runs there were, as the API server shows, of containers of which nothing may be left here; by name.
    pub runs: BTreeMap<String, u32>,
    /// No container that ended waits longer than this to run again, when the node is set up so.
    pub longest_wait: Option<SignedDuration>,
    /// A resize that the node has no room for.
    pub resize_pending: Option<crate::resize::Pending>,
    /// Why the last attempt at a resize failed.
    pub resize_error: Option<String>,
    /// What containers left as their last words, by container id.
    pub messages: BTreeMap<String, String>,
    /// Back-offs that an event told of, by container id or name.
    pub announced: BTreeSet<String>,
    /// The node won't have the pod: reason and message.
    pub rejected: Option<(String, String)>,
    /// The node ends the pod to save itself, for another one, or because it has outgrown its limits.
    pub evicted: Option<crate::eviction::Eviction>,
    /// The API server has no such pod any more.
    pub gone: bool,
    pub ending: Option<Ending>,
    pub cleanup: Cleanup,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    pub at: Timestamp,
    pub failures: u32,
    pub on_change: bool,
}

impl Observed {
    pub fn current_sandbox(&self) -> Option<&SandboxStatus> {
        self.sandboxes.last()
    }

    pub fn ready_sandbox(&self) -> Option<&SandboxStatus> {
        self.current_sandbox().filter(|sandbox| sandbox.state == SandboxState::Ready)
    }

    /// The address of the current sandbox; `None` for host network.
    pub fn address(&self) -> Option<IpAddr> {
        self.current_sandbox()?.spec.annotations.get(ADDRESS_ANNOTATION)?.parse().ok()
    }

    pub fn all_containers(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.sandboxes.iter().flat_map(|sandbox| &sandbox.containers)
    }

    /// The containers of this name, newest first.
    pub fn history(&self, name: &str) -> Vec<&ContainerStatus> {
        let mut all: Vec<_> = self.all_containers().filter(|c| c.name == name).collect();
        all.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
        all
    }

    pub fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.all_containers().filter(|c| c.name == name).max_by_key(|c| (c.attempt, c.created_at))
    }

    /// Which run of a container the next one is.
    pub fn next_attempt(&self, name: &str) -> u32 {
        let known = self.runs.get(name).copied().unwrap_or(0);
        self.latest(name).map_or(0, |latest| latest.attempt + 1).max(known)
    }

    pub fn by_id(&self, id: &str) -> Option<&ContainerStatus> {
        self.all_containers().find(|c| c.id == id)
    }

    pub fn is_running(&self, job: &Job) -> bool {
        self.running_jobs.contains(job)
    }

    /// Whether a container is on its way up: one that runs already has its `postStart` hook to come.
    pub fn is_starting(&self, name: &str) -> bool {
        self.running_jobs.contains(&Job::Start(name.to_owned()))
    }

    /// Takes in what the runtime says of a container. An exit is final: news that is older than it
    /// (a start that is reported after the exit) changes nothing.
    pub fn put_container(&mut self, status: ContainerStatus) {
        let Some(sandbox) = self.sandboxes.iter_mut().find(|s| s.spec.id == status.sandbox_id) else {
            return;
        };
        match sandbox.containers.iter_mut().find(|c| c.id == status.id) {
            Some(known) if known.state == ContainerState::Exited => {}
            Some(known) => *known = status,
            None => sandbox.containers.push(status),
        }
    }

    pub fn forget_container(&mut self, id: &str) {
        for sandbox in &mut self.sandboxes {
            sandbox.containers.retain(|c| c.id != id);
        }
        self.messages.remove(id);
        self.probes.remove(id);
        self.kills.remove(id);
        self.restarting.remove(id);
        self.announced.remove(id);
    }
}

/// How long to wait after the exit of `container` before it is started again, and what its successor's
/// wait will be. 10 s doubling to 5 min, or to `longest`; a container that ran for more than 10 min starts over.
pub fn backoff(
    container: &ContainerStatus,
    longest: Option<SignedDuration>,
) -> (SignedDuration, SignedDuration) {
    const FIRST: SignedDuration = SignedDuration::from_secs(10);
    const LONGEST: SignedDuration = SignedDuration::from_secs(300);
    const FORGIVEN: SignedDuration = SignedDuration::from_secs(600);
    let longest = longest.unwrap_or(LONGEST);
    let millis = container.annotations.get(BACKOFF_ANNOTATION).and_then(|text| text.parse().ok());
    let this = SignedDuration::from_millis(millis.unwrap_or(0)).min(longest);
    let ended = container.finished_at.unwrap_or(container.created_at);
    if this.is_zero() || ended.duration_since(container.created_at) > FORGIVEN {
        return (SignedDuration::ZERO, FIRST.min(longest));
    }
    (this, (this * 2).min(longest))
}
