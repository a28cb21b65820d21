//! The built-in runtime: sandboxes are shims, containers are theirs.
//!
//! What is true lies on disk and in the shims; this is the picture of it, kept by the events they send, so
//! that nothing polls and `list` is a look into memory. Made anew after a restart, it adopts what runs.

mod adopt;
mod link;
mod session;
pub(crate) mod stop_signal;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::{broadcast, watch};

use self::link::Link;
use crate::api::*;
use crate::cgroup::Cgroups;
use crate::device;
use crate::files;
use crate::image::{ImageStore, blocking, failed};
use crate::shim::log::now_ns;
use crate::shim::proto::{ContainerRecord, Exit, Op, SandboxRecord, ShimEvent, Started};

/// Events a slow receiver may be behind.
const EVENTS: usize = 1024;
/// How long a shim may take to come up.
const SHIM_START_MAX: Duration = Duration::from_secs(20);
/// How long a shim may take for what it does at once, before it is taken for hung.
const SHIM_ANSWER_MAX: Duration = Duration::from_secs(10);

/// What a runtime is to work with.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// The data directory; absolute.
    pub root: PathBuf,
    /// The cgroup below which everything of this cluster lies, without slashes.
    pub cgroup_root: String,
}

/// The runtime that is built in. Cheap to clone.
#[derive(Clone)]
pub struct LocalRuntime {
    inner: Arc<Inner>,
}

struct Inner {
    config: RuntimeConfig,
    images: ImageStore,
    cgroups: Cgroups,
    state: Mutex<State>,
    events: broadcast::Sender<Event>,
}

#[derive(Default)]
struct State {
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Container>,
}

struct Sandbox {
    record: SandboxRecord,
    /// While the shim lives.
    link: Option<Arc<Link>>,
    /// Turns true when it is gone.
    gone: watch::Sender<bool>,
}

struct Container {
    record: ContainerRecord,
    started: Option<Started>,
    exit: Option<Exit>,
    /// Whether someone asked it to end already.
    asked_to_stop: bool,
    /// Turns true with `exit`.
    ended: watch::Sender<bool>,
}

impl Container {
    fn state(&self) -> ContainerState {
        match (&self.started, &self.exit) {
            (_, Some(_)) => ContainerState::Exited,
            (Some(_), None) => ContainerState::Running,
            (None, None) => ContainerState::Created,
        }
    }

    fn status(&self) -> ContainerStatus {
        let spec = &self.record.spec;
        let started = self.started.clone().unwrap_or_default();
        let reason = match &self.exit {
            None => "",
            Some(Exit { start_error: Some(_), .. }) => "StartError",
            Some(Exit { oom_killed: true, .. }) => "OOMKilled",
            Some(Exit { code: 0, .. }) => "Completed",
            Some(Exit { unknown: true, .. }) => "ContainerStatusUnknown",
            Some(_) => "Error",
        };
        ContainerStatus {
            id: spec.id.clone(),
            sandbox_id: self.record.sandbox_id.clone(),
            name: spec.name.clone(),
            attempt: spec.attempt,
            image: spec.image.clone(),
            image_id: self.record.image_id.clone(),
            state: self.state(),
            pid: self.started.as_ref().map(|s| s.pid),
            created_at: timestamp(self.record.created_at),
            started_at: self.started.as_ref().map(|s| timestamp(s.at)),
            finished_at: self.exit.as_ref().map(|e| timestamp(e.at)),
            exit_code: self.exit.as_ref().map(|e| e.code),
            oom_killed: self.exit.as_ref().is_some_and(|e| e.oom_killed),
            reason: reason.to_owned(),
            message: self.exit.as_ref().and_then(|e| e.start_error.clone()).unwrap_or_default(),
            log_path: spec.log_path.clone(),
            stop_signal: stop_signal::name(self.record.stop_signal()),
            tty: spec.tty,
            stdin: spec.stdin,
            uid: started.uid,
            gid: started.gid,
            supplementary_groups: started.groups,
            resources: spec.resources.clone(),
            labels: spec.labels.clone(),
            annotations: spec.annotations.clone(),
        }
    }
}

fn timestamp(ns: i64) -> Timestamp {
    Timestamp::from_nanosecond(ns.into()).unwrap_or_default()
}

fn no_sandbox(id: &str) -> Error {
    Error::NotFound(format!("sandbox {id:?} not found"))
}

fn no_container(id: &str) -> Error {
    Error::NotFound(format!("container {id:?} not found"))
}

/// Ids are names of files and cgroups.
fn check_id(id: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    match !id.is_empty() && id.len() <= 64 && id.bytes().all(plain) && !id.starts_with('-') {
        true => Ok(()),
        false => Err(Error::Invalid(format!("invalid id {id:?}"))),
    }
}

impl LocalRuntime {
    pub fn images(&self) -> &ImageStore {
        &self.inner.images
    }

    pub fn cgroups(&self) -> &Cgroups {
        &self.inner.cgroups
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().expect("no panic while the state is held")
    }

    fn shim_dir(&self, id: &str) -> PathBuf {
        self.inner.config.root.join("shims").join(id)
    }

    fn container_dir(&self, id: &str) -> PathBuf {
        self.inner.config.root.join("containers").join(id)
    }

    fn link_of_sandbox(&self, id: &str) -> Result<Arc<Link>> {
        let state = self.state();
        let sandbox = state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
        sandbox.link.clone().ok_or_else(|| Error::Failed(format!("sandbox {id:?} is not running")))
    }

    /// The link of a container that runs.
    fn link_of(&self, id: &str) -> Result<Arc<Link>> {
        let sandbox = {
            let state = self.state();
            let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
            if container.state() != ContainerState::Running {
                return Err(Error::Invalid(format!("container {id:?} is not running")));
            }
            container.record.sandbox_id.clone()
        };
        self.link_of_sandbox(&sandbox)
    }

    fn container<T>(&self, id: &str, get: impl FnOnce(&mut Container) -> T) -> Result<T> {
        self.state().containers.get_mut(id).map(get).ok_or_else(|| no_container(id))
    }

    fn send(&self, event: Event) {
        // Nobody listening is fine.
        let _ = self.inner.events.send(event);
    }

    /// What a shim said happened.
    fn happened(&self, sandbox_id: &str, event: ShimEvent) {
        match event {
            ShimEvent::Started { id, started } => {
                let pid = started.pid;
                if self.container(&id, |c| c.started = Some(started)).is_ok() {
                    self.send(Event::ContainerStarted {
                        sandbox_id: sandbox_id.to_owned(),
                        container_id: id,
                        pid,
                    });
                }
            }
            ShimEvent::Exited { id, exit } => {
                let never_ran = exit.start_error.is_some();
                let ended = self.container(&id, |c| {
                    c.exit = Some(exit);
                    (c.status(), c.record.cgroup.clone(), c.ended.clone())
                });
                let Ok((status, cgroup, ended)) = ended else { return };
                let runtime = self.clone();
                // The cgroup first: who sees the container ended may start the next under the same limits.
                tokio::task::spawn_blocking(move || {
                    if let Err(e) = runtime.inner.cgroups.remove(&cgroup) {
                        tracing::warn!(container = status.id, error = %e, "The container's cgroup could not be removed");
                    }
                    ended.send_replace(true);
                    if !never_ran {
                        runtime.send(Event::ContainerExited { status: Box::new(status) });
                    }
                });
            }
            ShimEvent::ExecExited { .. } => {}
        }
    }

    /// The shim has ended. What it ran cannot be known any more, and must not run on unseen.
    fn shim_gone(&self, sandbox_id: &str) {
        let (orphans, gone) = {
            let mut state = self.state();
            let Some(sandbox) = state.sandboxes.get_mut(sandbox_id) else { return };
            sandbox.link = None;
            let gone = sandbox.gone.clone();
            let running = state
                .containers
                .values()
                .filter(|c| c.record.sandbox_id == sandbox_id && c.state() == ContainerState::Running);
            (running.map(|c| c.record.clone()).collect::<Vec<_>>(), gone)
        };
        let (runtime, sandbox_id) = (self.clone(), sandbox_id.to_owned());
        tokio::task::spawn_blocking(move || {
            for record in orphans {
                // Kills what is in it, and waits for its end.
                if let Err(e) = runtime.inner.cgroups.remove(&record.cgroup) {
                    tracing::warn!(container = record.spec.id, error = %e, "What a lost shim ran cannot be ended");
                }
                // The shim may have come to write it down.
                let dir = runtime.container_dir(&record.spec.id);
                let known = files::read_json::<Exit>(&dir.join("exit.json")).ok().flatten();
                let exit = known.unwrap_or_else(|| adopt::unknown_exit(&dir));
                runtime.happened(&sandbox_id, ShimEvent::Exited { id: record.spec.id, exit });
            }
            gone.send_replace(true);
            runtime.send(Event::SandboxExited { sandbox_id });
        });
    }

    /// Follows a shim until it is gone.
    fn follow(&self, sandbox_id: &str, link: Arc<Link>, connection: link::Connection) {
        let (runtime, id) = (self.clone(), sandbox_id.to_owned());
        tokio::spawn(async move {
            connection.run(&link, |event| runtime.happened(&id, event)).await;
            runtime.shim_gone(&id);
        });
    }

    fn shims_cgroup(&self) -> String {
        format!("{}/shims", self.inner.config.cgroup_root)
    }

    /// Starts the shim and waits until it says that it is up. Returns its pid and that of a pause process.
    async fn spawn_shim(&self, id: &str) -> Result<(i32, Option<i32>)> {
        let log = fs::File::create(self.shim_dir(id).join("shim.log")).map_err(failed)?;
        let mut command =
            crate::shim::command(crate::shim::SHIM, &[self.inner.config.root.as_os_str(), id.as_ref()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(|e| Error::Failed(format!("start the shim: {e}")))?;
        let pid = child.id().unwrap_or_default() as i32;
        let mut line = String::new();
        let said = match child.stdout.take() {
            Some(out) => {
                tokio::time::timeout(SHIM_START_MAX, BufReader::new(out).read_line(&mut line)).await.is_ok()
            }
            None => false,
        };
        if let Some(pause) = line.strip_prefix("ok ").filter(|_| said) {
            // Our child as long as we live: it must be waited for.
            tokio::spawn(async move { child.wait().await });
            return Ok((pid, pause.trim().parse().ok().filter(|pause| *pause > 0)));
        }
        let _ = child.kill().await;
        let why = line.strip_prefix("error ").map_or("it did not say why", str::trim);
        Err(Error::Failed(format!("start the shim: {why}")))
    }

    async fn make_sandbox(&self, mut record: SandboxRecord) -> Result<()> {
        let id = record.spec.id.clone();
        let dir = self.shim_dir(&id);
        let (cgroups, shims) = (self.inner.cgroups.clone(), self.shims_cgroup());
        record.cgroup_dirs = cgroups.dirs(&shims);
        let prepared = record.clone();
        let at = dir.clone();
        blocking(move || {
            // The record first: whatever comes of the rest, it is known what there may be.
            files::write_json(&at.join("sandbox.json"), &prepared).map_err(failed)?;
            cgroups.create(&shims, &Resources::default()).map_err(failed)?;
            cgroups.create(&prepared.spec.cgroup_parent, &prepared.spec.resources).map_err(failed)?;
            fs::create_dir_all(&prepared.spec.log_dir).or_else(|e| {
                match prepared.spec.log_dir.as_os_str().is_empty() {
                    true => Ok(()),
                    false => Err(failed(e)),
                }
            })
        })
        .await?;
        let (pid, pause_pid) = self.spawn_shim(&id).await?;
        record.pid = pid;
        record.pause_pid = pause_pid;
        files::write_json(&dir.join("sandbox.json"), &record).map_err(failed)?;
        let (link, connection) = link::connect(&dir.join("sock")).await.map_err(failed)?;
        let link = Arc::new(link);
        let sandbox = Sandbox { record, link: Some(link.clone()), gone: watch::Sender::new(false) };
        self.state().sandboxes.insert(id.clone(), sandbox);
        self.follow(&id, link, connection);
        Ok(())
    }

    /// Removes what a sandbox leaves: its directory and its pod's cgroup.
    async fn clear_sandbox(&self, spec: SandboxSpec) -> Result<()> {
        let (cgroups, dir) = (self.inner.cgroups.clone(), self.shim_dir(&spec.id));
        // A pod whose sandbox was replaced goes on in the same cgroup.
        let mut others = self.state().sandboxes.values().map(|s| s.record.spec.clone()).collect::<Vec<_>>();
        others.retain(|other| other.id != spec.id && other.cgroup_parent == spec.cgroup_parent);
        blocking(move || {
            let cgroup = if others.is_empty() { cgroups.remove(&spec.cgroup_parent) } else { Ok(()) };
            let removed = crate::remove_tree(&dir);
            cgroup.and(removed).map_err(failed)
        })
        .await
    }

    /// Removes the cgroup of a pod that no longer runs, and ends what may be left in it. The pod's next sandbox, which
    /// may be in the making, goes on in the same one.
    async fn clear_pod_cgroup(&self, record: &SandboxRecord) -> Result<()> {
        let cgroup = record.spec.cgroup_parent.clone();
        let goes_on = self.state().sandboxes.values().any(|other| {
            other.record.spec.id != record.spec.id
                && other.record.spec.cgroup_parent == cgroup
                && (other.link.is_some() || other.record.created_at > record.created_at)
        });
        if goes_on {
            return Ok(());
        }
        let cgroups = self.inner.cgroups.clone();
        blocking(move || cgroups.remove(&cgroup).map_err(failed)).await
    }

    /// Ends a shim that does not do what it is asked to, and with it what it runs.
    async fn kill_shim(&self, id: &str) -> Result<()> {
        let (mut gone, pid) = {
            let state = self.state();
            let sandbox = state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
            (sandbox.gone.subscribe(), sandbox.record.pid)
        };
        tracing::warn!(sandbox = id, pid, "The shim does not answer; killing it");
        signal_shim(pid, id);
        match tokio::time::timeout(SHIM_ANSWER_MAX, gone.wait_for(|gone| *gone)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Timeout(format!("the shim of sandbox {id:?} does not end after SIGKILL"))),
        }
    }

    async fn wait_ended(&self, id: &str, limit: Option<Duration>) -> Result<bool> {
        let mut ended = self.container(id, |c| c.ended.subscribe())?;
        let wait = async { ended.wait_for(|ended| *ended).await.is_ok() };
        match limit {
            Some(limit) => Ok(tokio::time::timeout(limit, wait).await.unwrap_or(false)),
            None => Ok(wait.await),
        }
    }

    async fn kill_container(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        match self.link_of(id) {
            Ok(link) => match link.request(Op::Kill { id: id.to_owned(), signal, all }, Vec::new()).await {
                // It ended in between.
                Err(Error::NotFound(_)) => Ok(()),
                done => done.map(drop),
            },
            Err(Error::Invalid(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

/// SIGKILL to the shim of a sandbox, by a handle that cannot mean another process.
fn signal_shim(pid: i32, sandbox_id: &str) {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else { return };
    let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { return };
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    if words.next() == Some(crate::shim::SHIM.as_bytes()) && words.any(|word| word == sandbox_id.as_bytes()) {
        let _ = rustix::process::pidfd_send_signal(handle, rustix::process::Signal::KILL);
    }
}

#[async_trait]
impl Runtime for LocalRuntime {
    fn version(&self) -> String {
        format!("minke://{}", env!("CARGO_PKG_VERSION"))
    }

    fn handlers(&self) -> Vec<Handler> {
        // Both are this one: a RuntimeClass has to name something.
        let named = |name: &str| Handler {
            name: name.to_owned(),
            recursive_read_only_mounts: true,
            user_namespaces: crate::users::kernel_has_user_namespaces(),
        };
        vec![named(""), named("minke")]
    }

    async fn run_sandbox(&self, mut spec: SandboxSpec) -> Result<()> {
        check_id(&spec.id)?;
        if spec.cgroup_parent.is_empty() {
            spec.cgroup_parent = format!("{}/{}", self.inner.config.cgroup_root, spec.id);
        }
        match fs::create_dir(self.shim_dir(&spec.id)) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::AlreadyExists(format!("sandbox {:?} already exists", spec.id)));
            }
            Err(e) => return Err(failed(e)),
        }
        let record = SandboxRecord { spec: spec.clone(), created_at: now_ns(), ..Default::default() };
        let made = self.make_sandbox(record).await;
        if made.is_err() {
            self.state().sandboxes.remove(&spec.id);
            let _ = self.clear_sandbox(spec).await;
        }
        made
    }

    async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let (link, mut gone, mut record) = {
            let state = self.state();
            let sandbox = state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
            (sandbox.link.clone(), sandbox.gone.subscribe(), sandbox.record.clone())
        };
        let Some(link) = link else { return self.clear_pod_cgroup(&record).await };
        record.stopped = true;
        files::write_json(&self.shim_dir(id).join("sandbox.json"), &record).map_err(failed)?;
        let end = async {
            // What it answers does not matter, only that it goes.
            let _ = link.request(Op::Shutdown, Vec::new()).await;
            let _ = gone.wait_for(|gone| *gone).await;
        };
        if tokio::time::timeout(SHIM_ANSWER_MAX, end).await.is_err() {
            self.kill_shim(id).await?;
        }
        self.clear_pod_cgroup(&record).await
    }

    async fn remove_sandbox(&self, id: &str) -> Result<()> {
        match self.stop_sandbox(id).await {
            Err(Error::NotFound(_)) => return Ok(()),
            done => done?,
        }
        let (spec, containers) = {
            let state = self.state();
            let Some(sandbox) = state.sandboxes.get(id) else { return Ok(()) };
            let own = state.containers.iter().filter(|(_, c)| c.record.sandbox_id == id);
            (sandbox.record.spec.clone(), own.map(|(id, _)| id.clone()).collect::<Vec<_>>())
        };
        for container in containers {
            self.remove_container(&container).await?;
        }
        self.clear_sandbox(spec).await?;
        self.state().sandboxes.remove(id);
        Ok(())
    }

    fn sandbox_netns(&self, id: &str) -> Result<PathBuf> {
        let state = self.state();
        let record = &state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?.record;
        Ok(match record.spec.host_network {
            true => PathBuf::from("/proc/self/ns/net"),
            false => PathBuf::from(format!("/proc/{}/ns/net", record.pid)),
        })
    }

    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<()> {
        check_id(&spec.id)?;
        let (cgroup_parent, users) = {
            let state = self.state();
            let sandbox = state.sandboxes.get(sandbox_id).ok_or_else(|| no_sandbox(sandbox_id))?;
            if sandbox.link.is_none() {
                return Err(Error::Failed(format!("sandbox {sandbox_id:?} is not running")));
            }
            (sandbox.record.spec.cgroup_parent.clone(), sandbox.record.spec.user_namespace)
        };
        let (id, sandbox_id) = (spec.id.clone(), sandbox_id.to_owned());
        let dir = self.container_dir(&id);
        let runtime = self.clone();
        let record = blocking(move || {
            // From here until the record is written, nobody may take the image's layers away.
            let _lock = runtime.inner.images.transfer_lock()?;
            let prepared = runtime.inner.images.prepare(&spec.image)?;
            if crate::spec::arguments(&spec, &prepared.config.entrypoint, &prepared.config.cmd).is_empty() {
                return Err(Error::Invalid("no command specified".to_owned()));
            }
            let images = spec.mounts.iter().filter_map(|m| m.image.as_ref());
            let mounted = images.map(|image| runtime.inner.images.prepare(image).map(|p| p.layers));
            let mounted = mounted.collect::<Result<Vec<_>>>()?;
            let cgroup = format!("{cgroup_parent}/{}", spec.id);
            let cgroups = &runtime.inner.cgroups;
            let record = ContainerRecord {
                sandbox_id,
                created_at: now_ns(),
                image_id: prepared.id,
                image: prepared.config,
                layers: prepared.layers,
                mounted,
                cgroup_dirs: cgroups.dirs(&cgroup),
                cgroup_dirs_beside: cgroups.dirs_beside_controllers(&cgroup),
                cgroup,
                spec,
            };
            if users.is_some() && record.shares_mounts() {
                let why = "mounts made in a user namespace cannot reach the node: mount propagation is Bidirectional";
                return Err(Error::Invalid(why.to_owned()));
            }
            match fs::create_dir(&dir) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(Error::AlreadyExists(format!(
                        "container {:?} already exists",
                        record.spec.id
                    )));
                }
                done => done.map_err(failed)?,
            }
            let snapshots = runtime.inner.config.root.join("snapshots");
            let made = make_container_dir(&dir, &snapshots, &record, users.map_or(0, |ids| ids.first));
            made.map(|()| record).map_err(|e| {
                let _ = crate::remove_tree(&dir);
                failed(e)
            })
        })
        .await?;
        let container = Container {
            record,
            started: None,
            exit: None,
            asked_to_stop: false,
            ended: watch::Sender::new(false),
        };
        self.state().containers.insert(id, container);
        Ok(())
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let record = self.container(id, |c| match c.state() {
            ContainerState::Created => Ok(c.record.clone()),
            other => Err(Error::Invalid(format!("container {id:?} is in state {other:?}"))),
        })??;
        let link = self.link_of_sandbox(&record.sandbox_id)?;
        let cgroups = self.inner.cgroups.clone();
        let cgroup = record.cgroup.clone();
        let undo = cgroups.clone();
        let limited = blocking(move || {
            cgroups.create(&record.cgroup, &record.spec.resources).map_err(failed)?;
            if record.spec.privileged {
                return Ok(());
            }
            let mut rules = device::default_rules();
            for wanted in &record.spec.devices {
                rules.push(device::rule_for(wanted).map_err(failed)?);
            }
            device::restrict(&cgroups, &record.cgroup, &rules).map_err(failed)
        })
        .await;
        let started = match limited {
            Ok(()) => link.request(Op::Start { id: id.to_owned() }, Vec::new()).await.map(drop),
            Err(e) => Err(e),
        };
        if started.is_err() {
            let _ = blocking(move || undo.remove(&cgroup).map_err(failed)).await;
        }
        started
    }

    async fn stop_container(&self, id: &str, grace: Duration) -> Result<()> {
        let (state, first, signal) = self.container(id, |c| {
            let first = !std::mem::replace(&mut c.asked_to_stop, true);
            (c.state(), first, stop_signal::number(c.record.stop_signal()))
        })?;
        if state != ContainerState::Running {
            return Ok(());
        }
        if !grace.is_zero() {
            let asking = async {
                if first && let Err(e) = self.kill_container(id, signal, false).await {
                    tracing::warn!(container = id, error = %e, "The container was not asked to end");
                }
            };
            // A shim that hangs uses up the grace period, and no more than that.
            let asking = tokio::time::timeout(grace, asking);
            let (_, ended) = tokio::join!(asking, self.wait_ended(id, Some(grace)));
            if ended? {
                return Ok(());
            }
        }
        let killed = tokio::time::timeout(SHIM_ANSWER_MAX, self.kill_container(id, libc_sigkill(), true));
        match killed.await {
            Ok(done) => done?,
            Err(_) => {
                let sandbox = self.container(id, |c| c.record.sandbox_id.clone())?;
                self.kill_shim(&sandbox).await?;
            }
        }
        match self.wait_ended(id, Some(Duration::from_secs(30))).await? {
            true => Ok(()),
            false => Err(Error::Timeout(format!("container {id:?} does not end after SIGKILL"))),
        }
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        match self.stop_container(id, Duration::ZERO).await {
            Err(Error::NotFound(_)) => return Ok(()),
            done => done?,
        }
        let Ok(record) = self.container(id, |c| c.record.clone()) else { return Ok(()) };
        let (dir, cgroups) = (self.container_dir(id), self.inner.cgroups.clone());
        blocking(move || {
            if record.shares_mounts() {
                for name in ["rootfs".to_owned()].into_iter().chain(record.image_dirs()) {
                    let _ = nix::mount::umount2(&dir.join(name), nix::mount::MntFlags::MNT_DETACH);
                }
            }
            let cgroup = cgroups.remove(&record.cgroup);
            cgroup.and(crate::remove_tree(&dir)).map_err(failed)
        })
        .await?;
        self.state().containers.remove(id);
        Ok(())
    }

    async fn signal_container(&self, id: &str, signal: i32) -> Result<()> {
        let link = self.link_of(id)?;
        link.request(Op::Kill { id: id.to_owned(), signal, all: false }, Vec::new()).await.map(drop)
    }

    async fn update_sandbox(&self, id: &str, resources: Resources) -> Result<()> {
        let mut record = {
            let state = self.state();
            state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?.record.clone()
        };
        let (cgroups, cgroup) = (self.inner.cgroups.clone(), record.spec.cgroup_parent.clone());
        record.spec.resources = resources.clone();
        blocking(move || cgroups.update(&cgroup, &resources).map_err(failed)).await?;
        files::write_json(&self.shim_dir(id).join("sandbox.json"), &record).map_err(failed)?;
        if let Some(sandbox) = self.state().sandboxes.get_mut(id) {
            sandbox.record.spec.resources = record.spec.resources;
        }
        Ok(())
    }

    async fn update_container(&self, id: &str, resources: Resources) -> Result<()> {
        let (cgroup, state) = self.container(id, |c| (c.record.cgroup.clone(), c.state()))?;
        let cgroups = self.inner.cgroups.clone();
        let wanted = resources.clone();
        if state == ContainerState::Running {
            blocking(move || cgroups.update(&cgroup, &wanted).map_err(failed)).await?;
        }
        let record = self.container(id, |c| {
            c.record.spec.resources = resources;
            c.record.clone()
        })?;
        files::write_json(&self.container_dir(id).join("container.json"), &record).map_err(failed)
    }

    async fn list(&self) -> Result<Vec<SandboxStatus>> {
        let state = self.state();
        let mut all: Vec<SandboxStatus> = (state.sandboxes.values())
            .map(|sandbox| SandboxStatus {
                spec: sandbox.record.spec.clone(),
                state: if sandbox.link.is_some() { SandboxState::Ready } else { SandboxState::NotReady },
                created_at: timestamp(sandbox.record.created_at),
                pid: sandbox.link.is_some().then_some(sandbox.record.pid),
                containers: Vec::new(),
            })
            .collect();
        for container in state.containers.values() {
            // Both maps are in the order of their keys.
            let at = all.binary_search_by(|s| s.spec.id.cmp(&container.record.sandbox_id));
            if let Ok(at) = at {
                all[at].containers.push(container.status());
            }
        }
        for sandbox in &mut all {
            sandbox.containers.sort_by_key(|c| c.created_at);
        }
        Ok(all)
    }

    async fn container_status(&self, id: &str) -> Result<ContainerStatus> {
        self.container(id, |c| c.status())
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    async fn exec(&self, id: &str, spec: ExecSpec) -> Result<Session> {
        self.start_exec(id, spec).await.map(|(session, ..)| session)
    }

    async fn attach(&self, id: &str, spec: AttachSpec) -> Result<Session> {
        self.start_attach(id, spec).await
    }

    async fn reopen_log(&self, id: &str) -> Result<()> {
        let link = self.link_of(id)?;
        link.request(Op::ReopenLog { id: id.to_owned() }, Vec::new()).await.map(drop)
    }

    async fn container_stats(&self, id: &str) -> Result<Stats> {
        let cgroup = self.container(id, |c| c.record.cgroup.clone())?;
        self.cgroup_stats(&cgroup).await
    }

    async fn sandbox_stats(&self, id: &str) -> Result<Stats> {
        let cgroup = {
            let state = self.state();
            let sandbox = state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
            sandbox.record.spec.cgroup_parent.clone()
        };
        self.cgroup_stats(&cgroup).await
    }

    async fn cgroup_stats(&self, path: &str) -> Result<Stats> {
        let (cgroups, path) = (self.inner.cgroups.clone(), path.to_owned());
        blocking(move || cgroups.stats(&path).map_err(failed)).await
    }

    async fn set_cgroup(&self, path: &str, resources: Resources) -> Result<()> {
        let (cgroups, path) = (self.inner.cgroups.clone(), path.to_owned());
        blocking(move || cgroups.create(&path, &resources).map_err(failed)).await
    }

    async fn container_disk_use(&self, id: &str) -> Result<DiskUse> {
        self.container(id, |_| ())?;
        let upper = self.container_dir(id).join("upper");
        blocking(move || Ok(files::disk_use(&upper))).await
    }

    async fn exec_sync(&self, id: &str, argv: Vec<String>, timeout: Duration) -> Result<ExecOutput> {
        let spec = ExecSpec { argv, stdout: true, stderr: true, ..Default::default() };
        let (session, link, exec) = self.start_exec(id, spec).await?;
        let Session { stdout, stderr, exit, .. } = session;
        let all = async {
            let max = EXEC_SYNC_OUTPUT_MAX;
            let (code, stdout, stderr) = tokio::join!(exit, drain(stdout, max), drain(stderr, max));
            let exit_code = code.map_err(|_| failed("the process was lost"))??;
            Ok(ExecOutput { stdout, stderr, exit_code })
        };
        if timeout.is_zero() {
            return all.await;
        }
        match tokio::time::timeout(timeout, all).await {
            Ok(done) => done,
            Err(_) => {
                link.request(Op::KillExec { exec, signal: libc_sigkill() }, Vec::new()).await?;
                let seconds = timeout.as_secs_f64();
                Err(Error::Timeout(format!("command timed out after {seconds}s")))
            }
        }
    }
}

fn libc_sigkill() -> i32 {
    rustix::process::Signal::KILL.as_raw()
}

/// The directories of a container's root filesystem, and its record last: without it there is no container.
/// `root` is the node's user that is root in it.
fn make_container_dir(dir: &Path, snapshots: &Path, record: &ContainerRecord, root: u32) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    for name in ["upper", "work", "rootfs"] {
        fs::create_dir(dir.join(name))?;
    }
    // The root directory is the topmost layer's, and so ours must look like the image's.
    if record.layers.is_empty() {
        fs::create_dir(dir.join("empty"))?;
    }
    if let Some(top) = record.layers.first() {
        let meta = fs::metadata(snapshots.join(top))?;
        fs::set_permissions(dir.join("upper"), fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        let (uid, gid) = (root.saturating_add(meta.uid()), root.saturating_add(meta.gid()));
        std::os::unix::fs::chown(dir.join("upper"), Some(uid), Some(gid))?;
    }
    if let Some(parent) = record.spec.log_path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    files::write_json(&dir.join("container.json"), record)
}
