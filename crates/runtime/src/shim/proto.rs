//! What the agent and the shim say to each other, and what lies in their directories.
//!
//! A frame is a length (u32, little endian) and that many bytes of JSON, with descriptors, if any, sent along
//! with its first byte. The agent sends [`Request`]s, the shim answers each with a [`Message::Reply`] of the
//! same `seq`, and sends every client [`Message::Event`]s in between.
//!
//! ```text
//! <root>/shims/<id>/       sandbox.json  sock  shim.log
//! <root>/containers/<id>/  container.json  config.json  upper work rootfs  started.json  exit.json
//! ```
//! `started.json` and `exit.json` are the shim's, everything else is the agent's. What one version writes the
//! next one reads: a field that is not there has its default.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::api::{ContainerSpec, ExecSpec, ImageConfig, SandboxSpec};

/// Most bytes of a frame.
pub const FRAME_MAX: usize = 4 << 20;
/// Most descriptors sent with a frame.
pub const FDS_MAX: usize = 3;

#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub seq: u64,
    /// Descriptors that come with it.
    pub fds: usize,
    pub op: Op,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Op {
    /// Names the containers that run, by id.
    Hello,
    /// Starts the container prepared in this directory.
    Start { id: String },
    /// Signals the first process, or with `all` everything in its cgroup.
    Kill { id: String, signal: i32, all: bool },
    /// Starts a process. Descriptors: stdin, stdout, stderr; none with a terminal, whose master comes back.
    Exec { id: String, exec: ExecSpec },
    /// Signals an exec'd process by the `seq` of its request.
    KillExec { exec: u64, signal: i32 },
    /// Descriptors to copy the output to: stdout then stderr, as many as are asked for. Answered with the
    /// container's stdin or terminal, if it has one that is asked for or a terminal.
    Attach { id: String, stdin: bool, stdout: bool, stderr: bool },
    /// Opens the log anew by its path.
    ReopenLog { id: String },
    /// Kills everything and ends once it is gone.
    Shutdown,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// `fds` descriptors come with it.
    Reply {
        seq: u64,
        fds: usize,
        result: Result<Reply, ShimError>,
    },
    Event(ShimEvent),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Hello { running: Vec<String> },
    Exec { pid: i32 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ShimError {
    /// The program could not be started.
    Start(String),
    NotFound(String),
    Failed(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ShimEvent {
    /// Before the reply to [`Op::Start`], and to all clients.
    Started { id: String, started: Started },
    /// Also when it could not be started.
    Exited { id: String, exit: Exit },
    /// Sent to the client that asked for it only.
    ExecExited { seq: u64, code: i32 },
}

/// `started.json`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Started {
    pub pid: i32,
    /// Nanoseconds since 1970.
    pub at: i64,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// `exit.json`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Exit {
    /// 128 + n for signal n.
    pub code: i32,
    /// Nanoseconds since 1970.
    pub at: i64,
    pub oom_killed: bool,
    /// Nobody saw how it ended; `at` is when that was found out.
    pub unknown: bool,
    /// When it never started: why.
    pub start_error: Option<String>,
}

/// `sandbox.json`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxRecord {
    pub spec: SandboxSpec,
    pub created_at: i64,
    /// cgroup of the shims of this cluster, in every hierarchy.
    pub cgroup_dirs: Vec<PathBuf>,
    /// The shim, once it is up; the pause process of a shared process namespace.
    pub pid: i32,
    pub pause_pid: Option<i32>,
    /// Stopped by request: its shim is gone for good.
    pub stopped: bool,
}

/// `container.json`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerRecord {
    pub sandbox_id: String,
    pub spec: ContainerSpec,
    pub created_at: i64,
    pub image_id: String,
    pub image: ImageConfig,
    /// Layers, topmost first, as names below `<root>/snapshots`.
    pub layers: Vec<String>,
    /// The same of the images that are mounted, in the order of such mounts.
    pub mounted: Vec<Vec<String>>,
    /// The cgroup in every hierarchy; in those libcontainer does not know; and its path in them.
    pub cgroup_dirs: Vec<PathBuf>,
    pub cgroup_dirs_beside: Vec<PathBuf>,
    pub cgroup: String,
}

impl ContainerRecord {
    /// v2 alone hides the node's cgroups from the container, as upstream does there.
    pub fn cgroup_namespace(&self) -> bool {
        self.cgroup_dirs.len() == 1 && !self.spec.privileged
    }

    /// What asks it to end, as its specification or its image names it; empty when neither does.
    pub fn stop_signal(&self) -> &str {
        if self.spec.stop_signal.is_empty() { &self.image.stop_signal } else { &self.spec.stop_signal }
    }

    /// Names, in the container's directory, at which the images it mounts lie.
    pub fn image_dirs(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.mounted.len()).flat_map(|n| [format!("image-{n}-part"), format!("image-{n}")])
    }

    /// A mount that must reach the node's mount namespace forbids giving the container's own a private copy.
    pub fn shares_mounts(&self) -> bool {
        self.spec.mounts.iter().any(|m| m.propagation == crate::api::Propagation::Bidirectional)
    }
}

/// What the runner and exec tell the shim, one packet each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// Comes with the terminal's master when there is one.
    Started(Started),
    Failed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An upgraded agent reads what the one before it wrote, which knew fewer fields.
    #[test]
    fn records_of_other_versions_are_read() {
        let record: ContainerRecord =
            serde_json::from_str(r#"{"sandbox_id": "s", "spec": {"id": "c", "later": 1}}"#).unwrap();
        assert_eq!((record.sandbox_id.as_str(), record.spec.id.as_str()), ("s", "c"));
        let record: SandboxRecord = serde_json::from_str(r#"{"spec": {"uid": "u"}, "pid": 7}"#).unwrap();
        assert_eq!((record.spec.uid.as_str(), record.pid), ("u", 7));
        assert_eq!(serde_json::from_str::<Exit>(r#"{"code": 3}"#).unwrap().code, 3);
        assert_eq!(serde_json::from_str::<Started>(r#"{"pid": 3}"#).unwrap().pid, 3);
    }
}
