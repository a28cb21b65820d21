//! Opening a data directory: adopting what runs, clearing what never came to be; and taking all of it down.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{broadcast, watch};

use super::{Container, EVENTS, Inner, LocalRuntime, RuntimeConfig, Sandbox, State, check_id, link};
use crate::api::{Error, Result, Runtime};
use crate::cgroup::Cgroups;
use crate::files::read_json;
use crate::image::{ImageStore, blocking, failed};
use crate::shim::log::now_ns;
use crate::shim::proto::{ContainerRecord, Exit, Op, SandboxRecord};

/// Exit code of a container whose end nobody saw, as upstream reports it.
const UNKNOWN_CODE: i32 = 137;
/// How long adopting waits for a shim's word. All are asked at the same time.
const HELLO_MAX: Duration = Duration::from_secs(5);

/// The end of a container whose end nobody saw. The record of it is written, so that it stays the same.
pub fn unknown_exit(dir: &Path) -> Exit {
    let exit = Exit { code: UNKNOWN_CODE, at: now_ns(), unknown: true, ..Default::default() };
    let _ = crate::files::write_json(&dir.join("exit.json"), &exit);
    exit
}

impl LocalRuntime {
    /// Opens the data directory and adopts every sandbox whose shim lives.
    pub async fn open(config: RuntimeConfig, images: ImageStore) -> Result<Self> {
        if !config.root.is_absolute() || config.cgroup_root.is_empty() || config.cgroup_root.contains('/') {
            return Err(Error::Invalid(
                "the runtime needs an absolute root and a plain cgroup name".to_owned(),
            ));
        }
        for dir in ["shims", "containers", "snapshots"] {
            fs::create_dir_all(config.root.join(dir)).map_err(failed)?;
        }
        let runtime = Self {
            inner: Arc::new(Inner {
                config,
                images,
                cgroups: Cgroups::detect().map_err(failed)?,
                state: Mutex::new(State::default()),
                events: broadcast::Sender::new(EVENTS),
            }),
        };
        runtime.adopt().await?;
        Ok(runtime)
    }

    async fn adopt(&self) -> Result<()> {
        let mut follow = Vec::new();
        for id in names(&self.inner.config.root.join("shims")) {
            let dir = self.shim_dir(&id);
            // Without a record it was never finished, and nothing else can be there.
            let Some(record) = read_json::<SandboxRecord>(&dir.join("sandbox.json")).map_err(failed)? else {
                crate::remove_tree(&dir).map_err(failed)?;
                continue;
            };
            let connected = match link::connect(&dir.join("sock")).await {
                Ok((link, connection)) => Some((Arc::new(link), connection)),
                Err(_) => None,
            };
            if record.pid == 0 {
                self.clear_unfinished(record, connected).await;
                continue;
            }
            if connected.is_none() {
                // Nobody would ever see what it runs.
                super::signal_shim(record.pid, &id);
            }
            let sandbox = Sandbox {
                record,
                link: connected.as_ref().map(|(link, _)| link.clone()),
                gone: watch::Sender::new(connected.is_none()),
            };
            self.state().sandboxes.insert(id.clone(), sandbox);
            follow.extend(connected.map(|(link, connection)| (id, link, connection)));
        }
        // Records before events, and events before asking who runs: whatever happens in between is seen.
        self.read_containers()?;
        let asked = follow.into_iter().map(async |(id, link, connection)| {
            self.follow(&id, link.clone(), connection);
            match tokio::time::timeout(HELLO_MAX, link::hello(&link)).await {
                Ok(Ok(ids)) => return ids,
                Ok(Err(e)) => tracing::warn!(sandbox = id, error = %e, "An adopted shim does not answer"),
                Err(_) => tracing::warn!(sandbox = id, "An adopted shim hangs"),
            }
            // It lives, and so does what it runs until it says otherwise.
            let state = self.state();
            let own = state.containers.iter().filter(|(_, c)| c.record.sandbox_id == id && link.is_open());
            own.map(|(id, _)| id.clone()).collect()
        });
        let running = futures_util::future::join_all(asked).await.concat();
        self.settle_the_rest(&running).await
    }

    /// The agent went before it knew the shim, so nothing runs in that sandbox yet.
    async fn clear_unfinished(
        &self,
        record: SandboxRecord,
        shim: Option<(Arc<link::Link>, link::Connection)>,
    ) {
        if let Some((link, connection)) = shim {
            let end = async {
                tokio::join!(connection.run(&link, |_| {}), async {
                    drop(link.request(Op::Shutdown, vec![]).await)
                })
            };
            if tokio::time::timeout(HELLO_MAX, end).await.is_err() {
                tracing::warn!(sandbox = record.spec.id, "An unfinished shim does not end");
            }
        }
        if let Err(e) = self.clear_sandbox(record.spec).await {
            tracing::warn!(error = %e, "An unfinished sandbox could not be removed");
        }
    }

    fn read_containers(&self) -> Result<()> {
        for id in names(&self.inner.config.root.join("containers")) {
            let dir = self.container_dir(&id);
            let record = read_json::<ContainerRecord>(&dir.join("container.json")).map_err(failed)?;
            let known = |record: &ContainerRecord| self.state().sandboxes.contains_key(&record.sandbox_id);
            let Some(record) = record.filter(known) else {
                let _ = nix::mount::umount2(&dir.join("rootfs"), nix::mount::MntFlags::MNT_DETACH);
                crate::remove_tree(&dir).map_err(failed)?;
                continue;
            };
            let started = read_json(&dir.join("started.json")).map_err(failed)?;
            let exit: Option<Exit> = read_json(&dir.join("exit.json")).map_err(failed)?;
            let ended = watch::Sender::new(exit.is_some());
            let container = Container { record, started, exit, asked_to_stop: false, ended };
            self.state().containers.insert(id, container);
        }
        Ok(())
    }

    /// Containers that were started and of which nobody knows now; cgroups of those that ended meanwhile.
    async fn settle_the_rest(&self, running: &[String]) -> Result<()> {
        let mut over = Vec::new();
        {
            let mut state = self.state();
            for (id, container) in &mut state.containers {
                let lost = container.started.is_some() && container.exit.is_none() && !running.contains(id);
                if lost {
                    let dir = self.container_dir(id);
                    // It may have ended while we looked.
                    let seen = read_json::<Exit>(&dir.join("exit.json")).ok().flatten();
                    container.exit = Some(seen.unwrap_or_else(|| unknown_exit(&dir)));
                    container.ended.send_replace(true);
                }
                if container.exit.is_some() {
                    over.push(container.record.cgroup.clone());
                }
            }
        }
        let cgroups = self.inner.cgroups.clone();
        blocking(move || {
            for cgroup in over {
                if let Err(e) = cgroups.remove(&cgroup) {
                    tracing::warn!(cgroup, error = %e, "The cgroup of an ended container could not be removed");
                }
            }
            Ok(())
        })
        .await
    }

    /// Kills every sandbox and removes all they had: processes, mounts, cgroups, directories. Goes on past
    /// what fails and returns the first failure. Images stay.
    pub async fn shutdown_all(&self) -> Result<()> {
        let ids: Vec<String> = self.state().sandboxes.keys().cloned().collect();
        let removals = futures_util::future::join_all(ids.iter().map(|id| self.remove_sandbox(id))).await;
        let (cgroups, root) = (self.inner.cgroups.clone(), self.inner.config.cgroup_root.clone());
        let cgroup = blocking(move || cgroups.remove(&root).map_err(failed)).await;
        removals.into_iter().chain([cgroup]).collect()
    }
}

/// Directories that are named like an id of ours.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).filter(|name| check_id(name).is_ok()).collect()
}
