//! What happens to pods when what looks after them is killed, hangs, or finds the machine in disorder.
//!
//! Runs as `containers` does, and for the same reason without the usual harness.

#![allow(clippy::disallowed_methods, reason = "real processes in real time")]

#[allow(dead_code, reason = "each of the two uses its part")]
mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use minke_runtime::*;
use rustix::process::Signal;
use support::*;

/// Lists the tests, with their names.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), (|| Box::pin($name())) as TestFn)),*]
    };
}

const TESTS: &[(&str, TestFn)] = tests![
    a_hung_shim_holds_nobody_up,
    an_agent_adopts_around_a_hung_shim,
    processes_that_share_a_namespace_end_together,
    a_sandbox_whose_agent_died_early_is_cleared,
    a_stopped_pod_has_no_cgroup,
    a_reboot_leaves_only_records,
    a_cgroup_that_vanished_is_made_again,
    a_full_disk_stops_no_container,
    a_full_disk_takes_no_shim_along,
    deep_directories_are_removed,
    a_start_that_is_killed_fails,
];

fn main() {
    shim::entry();
    run_all(TESTS);
}

async fn shim_of(node: &Node, id: &str) -> i32 {
    let all = node.runtime.list().await.unwrap();
    all.iter().find(|s| s.spec.id == id).and_then(|s| s.pid).unwrap()
}

fn signal(pid: i32, signal: Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn lives(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

/// Waits until `done`, which is nearly so already.
async fn soon(what: &str, done: impl Fn() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what}"));
}

async fn a_hung_shim_holds_nobody_up() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "sleep 1000").await;
    let pid = node.runtime.container_status("c").await.unwrap().pid.unwrap();
    let shim = shim_of(&node, "pod").await;
    signal(shim, Signal::STOP);
    node.runtime.stop_container("c", Duration::from_millis(10)).await.unwrap();
    assert!(!lives(pid) && !lives(shim));
    assert_eq!(node.wait_exit("c").await.exit_code, Some(137));
    node.close().await;
}

async fn an_agent_adopts_around_a_hung_shim() {
    let node = Node::new().await;
    for pod in ["pod", "other"] {
        node.runtime.run_sandbox(node.sandbox_spec(pod)).await.unwrap();
        node.runtime.create_container(pod, node.spec(&format!("{pod}-c"), "sleep 1000")).await.unwrap();
        node.runtime.start_container(&format!("{pod}-c")).await.unwrap();
    }
    let shim = shim_of(&node, "pod").await;
    signal(shim, Signal::STOP);
    let node = node.restart().await;
    for id in ["pod-c", "other-c"] {
        assert_eq!(node.runtime.container_status(id).await.unwrap().state, ContainerState::Running, "{id}");
    }
    signal(shim, Signal::CONT);
    let echo = vec!["echo".to_owned(), "hi".to_owned()];
    assert_eq!(node.runtime.exec_sync("pod-c", echo, Duration::ZERO).await.unwrap().stdout, b"hi\n");
    node.close().await;
}

async fn processes_that_share_a_namespace_end_together() {
    let node = Node::new().await;
    let spec = SandboxSpec { share_pid: true, ..node.sandbox_spec("pod") };
    let pause_of = |node: &Node| {
        let all = node.runtime.cgroups().pids(&format!("{}/shims", node.cgroup_root));
        let pause = |pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"minke-pause"))
        };
        all.into_iter().find(pause).unwrap()
    };
    node.runtime.run_sandbox(spec.clone()).await.unwrap();
    node.start("a", "sleep 1000").await;
    // Nothing can be started any more in a namespace without its first process: the sandbox is over.
    let shim = shim_of(&node, "pod").await;
    kill(pause_of(&node));
    assert_eq!(node.wait_exit("a").await.exit_code, Some(137));
    soon("the shim lives on", || !lives(shim)).await;
    node.runtime.remove_sandbox("pod").await.unwrap();

    node.runtime.run_sandbox(spec).await.unwrap();
    node.start("b", "sleep 1000").await;
    let (pause, shim) = (pause_of(&node), shim_of(&node, "pod").await);
    kill(shim);
    soon("the pause process lives on", || !lives(pause)).await;
    assert_eq!(node.wait_exit("b").await.exit_code, Some(137));
    node.close().await;
}

async fn a_sandbox_whose_agent_died_early_is_cleared() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let shim = shim_of(&node, "pod").await;
    // The shim is up, and the agent has not come to write down which process it is.
    let file = node.root().join("shims/pod/sandbox.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    record["pid"] = 0.into();
    std::fs::write(&file, record.to_string()).unwrap();
    let node = node.restart().await;
    assert!(node.runtime.list().await.unwrap().is_empty());
    soon("the shim lives on", || !lives(shim)).await;
    assert!(!node.root().join("shims/pod").exists());
    assert!(
        node.runtime.cgroups().dirs(&format!("{}/pod", node.cgroup_root)).iter().all(|dir| !dir.exists())
    );
    node.sandbox("pod").await;
    node.close().await;
}

async fn a_stopped_pod_has_no_cgroup() {
    let node = Node::new().await;
    let dirs = |node: &Node| node.runtime.cgroups().dirs(&format!("{}/pod", node.cgroup_root));
    node.sandbox("pod").await;
    node.start("c", "exit 0").await;
    node.wait_exit("c").await;
    assert!(dirs(&node).iter().all(|dir| dir.exists()));
    node.runtime.stop_sandbox("pod").await.unwrap();
    assert!(dirs(&node).iter().all(|dir| !dir.exists()));
    // Its successor has the same cgroup, and keeps it when the old one is stopped once more.
    let next =
        SandboxSpec { cgroup_parent: format!("{}/pod", node.cgroup_root), ..node.sandbox_spec("next") };
    node.runtime.run_sandbox(next).await.unwrap();
    node.runtime.stop_sandbox("pod").await.unwrap();
    assert!(dirs(&node).iter().all(|dir| dir.exists()));
    node.close().await;
}

async fn a_reboot_leaves_only_records() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "sleep 1000").await;
    node.start("done", "exit 4").await;
    node.wait_exit("done").await;
    kill(shim_of(&node, "pod").await);
    node.wait_exit("c").await;
    // As if nobody had seen that end; and the shim's number belongs to somebody else now.
    std::fs::remove_file(node.root().join("containers/c/exit.json")).unwrap();
    let file = node.root().join("shims/pod/sandbox.json");
    let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let mut stranger = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    record["pid"] = stranger.id().into();
    std::fs::write(&file, record.to_string()).unwrap();
    node.runtime.cgroups().remove(&node.cgroup_root).unwrap();

    let node = node.restart().await;
    let all = node.runtime.list().await.unwrap();
    assert_eq!(all[0].state, SandboxState::NotReady);
    let status = |id: &str| all[0].containers.iter().find(|c| c.id == id).unwrap().clone();
    assert_eq!((status("c").exit_code, status("c").reason.as_str()), (Some(137), "ContainerStatusUnknown"));
    assert_eq!((status("done").exit_code, status("done").reason.as_str()), (Some(4), "Error"));
    let next =
        SandboxSpec { cgroup_parent: format!("{}/pod", node.cgroup_root), ..node.sandbox_spec("next") };
    node.runtime.run_sandbox(next).await.unwrap();
    node.runtime.create_container("next", node.spec("again", "echo back")).await.unwrap();
    node.runtime.start_container("again").await.unwrap();
    assert_eq!(node.wait_exit("again").await.exit_code, Some(0));
    node.runtime.remove_sandbox("pod").await.unwrap();
    assert!(stranger.try_wait().unwrap().is_none(), "a process of others was ended");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    node.close().await;
}

async fn a_cgroup_that_vanished_is_made_again() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "sleep 1000").await;
    // Somebody else ends what is in it and removes it.
    node.runtime.cgroups().remove(&format!("{}/pod", node.cgroup_root)).unwrap();
    assert_eq!(node.wait_exit("c").await.exit_code, Some(137));
    assert!(node.runtime.sandbox_stats("pod").await.is_err());
    let limits = Resources { memory_limit: Some(64 << 20), ..Resources::default() };
    let spec = ContainerSpec { resources: limits, ..node.spec("again", "cat /proc/self/cgroup") };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("again").await.unwrap();
    assert_eq!(node.wait_exit("again").await.exit_code, Some(0));
    assert!(node.text("again").contains("/again"), "{}", node.text("again"));
    node.runtime.remove_container("c").await.unwrap();
    node.close().await;
}

async fn a_full_disk_stops_no_container() {
    let node = Node::new().await;
    // Before the pod, which has a mount namespace of its own.
    let disk = Disk::mount(&node.scratch("disk"), c"size=1m");
    node.sandbox("pod").await;
    let mount = Mount { host_path: disk.0.clone(), container_path: "/disk".into(), ..Mount::default() };
    let mut spec = node.spec(
        "c",
        "while ! test -e /disk/full; do sleep 0.01; done; echo lost; echo x > /disk/f || echo none >&2; \
         while test -e /disk/full; do sleep 0.01; done; echo later; exit 5",
    );
    spec.mounts.push(mount);
    spec.log_path = disk.0.join("0.log");
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    let filler = vec![0; 2 << 20];
    assert!(std::fs::write(disk.0.join("full"), filler).is_err(), "the disk is larger than that");
    soon("nothing is tried", || disk.0.join("f").exists()).await;
    std::fs::remove_file(disk.0.join("full")).unwrap();
    assert_eq!(node.wait_exit("c").await.exit_code, Some(5));
    let log = std::fs::read_to_string(disk.0.join("0.log")).unwrap();
    assert!(log.ends_with(" stdout F later\n"), "{log}");

    // What cannot be prepared for want of room leaves nothing, and can be tried again.
    let (full, record) = (node.root().join("containers"), node.spec("d", "echo room; exit 6"));
    let small = Disk::mount(&full, c"nr_inodes=3");
    let error = node.runtime.create_container("pod", record.clone()).await.unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert!(std::fs::read_dir(&full).unwrap().next().is_none());
    drop(small);
    node.runtime.create_container("pod", record).await.unwrap();
    node.runtime.start_container("d").await.unwrap();
    assert_eq!(node.wait_exit("d").await.exit_code, Some(6));
    node.runtime.remove_container("c").await.unwrap();
    drop(disk);
    node.close().await;
}

/// Where nothing can be written, not even that it cannot, containers end as anywhere.
async fn a_full_disk_takes_no_shim_along() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::mount(dir.path(), c"size=32m");
    let node = Node::within(&disk.0).await;
    node.sandbox("pod").await;
    node.start("c", "trap 'exit 5' TERM; while :; do sleep 0.01; done").await;
    let shim = shim_of(&node, "pod").await;
    let mut filler = std::fs::File::create(disk.0.join("full")).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
    assert!(std::fs::write(disk.0.join("more"), "x").is_err(), "there is room left");

    node.runtime.stop_container("c", Duration::from_secs(20)).await.unwrap();
    assert_eq!(node.wait_exit("c").await.exit_code, Some(5));
    assert!(lives(shim));
    let node = node.restart().await;
    assert_eq!(node.wait_exit("c").await.exit_code, Some(5), "the shim knows what it could not write");
    drop(filler);
    std::fs::remove_file(disk.0.join("full")).unwrap();
    node.start("d", "exit 6").await;
    assert_eq!(node.wait_exit("d").await.exit_code, Some(6));
    node.close().await;
}

/// A small file system in memory, unmounted in the end.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, options: &std::ffi::CStr) -> Disk {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", at, "tmpfs", flags, options).unwrap();
        Disk(at.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Nobody can keep a container from being removed by nesting directories without end.
async fn deep_directories_are_removed() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    node.start("c", "exit 0").await;
    node.wait_exit("c").await;
    let upper = node.root().join("containers/c/upper");
    let mut at = std::fs::File::open(&upper).unwrap();
    for _ in 0..5000 {
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::from_raw_mode(0o700)).unwrap();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
        at = rustix::fs::openat(&at, "d", flags, rustix::fs::Mode::empty()).unwrap().into();
    }
    drop(at);
    node.runtime.remove_container("c").await.unwrap();
    assert!(!node.root().join("containers/c").exists());
    node.close().await;
}

/// Neither a helper that is killed nor a first process that is killed before its program runs holds anything up.
async fn a_start_that_is_killed_fails() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    // Less than it takes to get that far.
    let tiny = Resources { memory_limit: Some(256 << 10), ..Resources::default() };
    let spec = ContainerSpec { resources: tiny, ..node.spec("tiny", "true") };
    node.runtime.create_container("pod", spec).await.unwrap();
    let started = tokio::time::timeout(Duration::from_secs(30), node.runtime.start_container("tiny")).await;
    let error = started.expect("it hangs").unwrap_err();
    assert!(matches!(error, Error::Start(_)), "{error:?}");
    assert_eq!(node.wait_exit("tiny").await.exit_code, Some(128));

    for n in 0..20 {
        let id = format!("c{n}");
        node.runtime.create_container("pod", node.spec(&id, "sleep 1000")).await.unwrap();
        let killer = async {
            let helper = || {
                let all = node.runtime.cgroups().pids(&node.cgroup_root);
                let is_helper = |pid: &i32| {
                    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    line.starts_with(b"minke-run")
                };
                all.into_iter().find(is_helper)
            };
            for _ in 0..2000 {
                if let Some(pid) = helper() {
                    tokio::time::sleep(Duration::from_millis(n * 2)).await;
                    let pid = rustix::process::Pid::from_raw(pid).unwrap();
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        let (started, ()) = tokio::join!(node.runtime.start_container(&id), killer);
        // It may have been there before it was killed.
        let state = node.runtime.container_status(&id).await.unwrap().state;
        let want = if started.is_ok() { ContainerState::Running } else { ContainerState::Exited };
        assert!(state == want || state == ContainerState::Exited, "{started:?}: {state:?}");
    }
    let helpers = node.runtime.cgroups().pids(&format!("{}/shims", node.cgroup_root));
    assert_eq!(helpers.len(), 1, "only the shim is left: {helpers:?}");
    node.close().await;
}
