//! `minke stop` and `minke down`: end what runs, and take away what it left on the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::data_dir::{AGENT_LOCK, DataDir, Holder, SERVER_LOCK};
use crate::io::Io;
use crate::{kubeconfig, pods};

/// How long the server may take to end after it was asked to.
const SERVER_GRACE: Duration = Duration::from_secs(30);

/// Stop the server and the pods, and keep the state: `minke start` resumes it.
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    grace: GraceArgs,
}

/// Stop everything and take away its links, tables, mounts and cgroups.
///
/// The objects of the cluster stay in the data directory, and `minke up` brings them back, unless --purge is given.
#[derive(Debug, Args)]
pub struct DownArgs {
    /// Remove the data directory as well: objects, images, keys
    #[arg(long)]
    purge: bool,
    #[command(flatten)]
    grace: GraceArgs,
}

#[derive(Debug, Args)]
struct GraceArgs {
    /// How many seconds a container has to end after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    grace: u64,
}

impl StopArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        crate::up::require_root(data)?;
        data.config()?;
        let _transition = data.transition()?;
        let mut failures = Failures::default();
        halt(data, Duration::from_secs(self.grace.grace), &mut failures, io)?;
        data.unregister();
        failures.result()?;
        io.say(format!("The cluster is stopped: `minke{} start` resumes it", data.option()))
    }
}

impl DownArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        crate::up::require_root(data)?;
        if !data.path().exists() {
            return io.say(format!("There is no cluster in {}", data.path().display()));
        }
        // Images may have been put there before the first `up`.
        let ours = data.exists() || data.join("images").is_dir();
        if !ours && self.purge && fs::read_dir(data.path())?.next().is_some() {
            bail!("{} is not the data directory of a cluster", data.path().display());
        }
        let transition = data.transition()?;
        let mut failures = Failures::default();
        halt(data, Duration::from_secs(self.grace.grace), &mut failures, io)?;
        if let Ok(mut config) = data.config() {
            for path in std::mem::take(&mut config.kubeconfigs) {
                failures.note(kubeconfig::remove_from(&path, &data.context_name()));
            }
            failures.note(data.save(&config));
        }
        data.unregister();
        failures.result()?;
        if self.purge {
            drop(transition);
            fs::remove_dir_all(data.path()).with_context(|| format!("remove {}", data.path().display()))?;
            return io.say(format!("The cluster is gone, and {} with it", data.path().display()));
        }
        io.say(format!(
            "The cluster is down; its objects are kept in {}: `minke{} up` brings it back, `minke{} down --purge` removes it for good",
            data.path().display(),
            data.option(),
            data.option()
        ))
    }
}

/// What went wrong in steps that don't stop the ones after them.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn note<T>(&mut self, result: Result<T>) {
        if let Err(error) = result {
            self.0.push(format!("{error:#}"));
        }
    }

    fn result(self) -> Result<()> {
        if !self.0.is_empty() {
            bail!("something is left behind; running the command again may help:\n  {}", self.0.join("\n  "));
        }
        Ok(())
    }
}

/// Ends the agent and the server, then the pods, then removes what they left on the machine.
fn halt(data: &DataDir, grace: Duration, failures: &mut Failures, io: &mut Io) -> Result<()> {
    for lock in [AGENT_LOCK, SERVER_LOCK] {
        if let Some(holder) = data.holder_of(lock)? {
            end(&holder, io)?;
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    failures.note(runtime.block_on(pods::stop_all(data, grace)));
    let network = runtime.block_on(minke_network::remove_leftovers(&data.id()));
    failures.note(network.context("take away links and tables"));
    drop(runtime);
    failures.note(unmount_all(data.path()));
    failures.note(remove_cgroups(&data.cgroup()));
    Ok(())
}

/// Asks the server to end, and insists when it does not.
fn end(holder: &Holder, io: &mut Io) -> Result<()> {
    for (signal, wait) in [(Signal::TERM, SERVER_GRACE), (Signal::KILL, Duration::from_secs(10))] {
        match pidfd_send_signal(&holder.handle, signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("stop process {}", holder.pid)),
        }
        if ended(holder, wait, io)? {
            return Ok(());
        }
    }
    bail!("process {} does not end", holder.pid)
}

fn ended(holder: &Holder, wait: Duration, io: &mut Io) -> Result<bool> {
    let end = Instant::now() + wait;
    let mut said = false;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let step = if said { left } else { left.min(Duration::from_secs(1)) };
        let time = Timespec { tv_sec: step.as_secs() as i64, tv_nsec: i64::from(step.subsec_nanos()) };
        let mut watched = [PollFd::new(&holder.handle, PollFlags::IN)];
        match poll(&mut watched, Some(&time)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) if !said => {
                io.note("Waiting for the server to end ...");
                said = true;
            }
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).context("wait for the server"),
        }
    }
}

/// Unmounts everything below `dir`, the last mounted first.
fn unmount_all(dir: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let mut failures = Failures::default();
    for point in mount_points(&table, dir).into_iter().rev() {
        let gone = rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH);
        failures.note(gone.with_context(|| format!("unmount {}", point.display())));
    }
    failures.result()
}

fn mount_points(table: &str, dir: &Path) -> Vec<PathBuf> {
    let points =
        table.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| PathBuf::from(unescape(point)));
    points.filter(|point| point.starts_with(dir) && point != dir).collect()
}

/// The kernel writes white space and backslashes in octal.
fn unescape(text: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// Removes the cgroup called `name` from the root of every hierarchy, with those in it.
fn remove_cgroups(name: &str) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read the mount table")?;
    let roots = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        kind.starts_with("cgroup").then(|| Path::new(&unescape(point)).join(name))
    });
    let mut failures = Failures::default();
    for root in roots.filter(|root| root.is_dir()) {
        failures.note(remove_tree(&root));
    }
    failures.result()
}

/// A cgroup goes when its children are gone; its files can't be removed and needn't be.
fn remove_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir).with_context(|| format!("remove cgroup {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_the_directory_are_found() {
        let table = "22 1 0:21 / /proc rw - proc proc rw\n\
            30 1 8:1 / /var/lib/minke rw - ext4 /dev/sda rw\n\
            31 1 0:50 / /var/lib/minke/pods/a\\040b/v rw shared:1 - tmpfs tmpfs rw\n\
            32 1 0:51 / /var/lib/minke2/x rw - tmpfs tmpfs rw\n";
        assert_eq!(
            mount_points(table, Path::new("/var/lib/minke")),
            [Path::new("/var/lib/minke/pods/a b/v")]
        );
    }
}
