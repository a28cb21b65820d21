//! Which mounts of a container hear of the node's, and which tell the node of theirs.
//!
//! Runs as `containers` does, and for the same reason without the usual harness.

#![allow(clippy::disallowed_methods, reason = "real processes in real time")]

#[allow(dead_code, reason = "each test program uses its part")]
mod support;

use std::ffi::CStr;
use std::path::PathBuf;
use std::time::Duration;

use minke_runtime::*;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use support::*;

const TESTS: &[(&str, TestFn)] = &[
    ("each_mount_hears_and_tells_as_it_asks", || Box::pin(each_mount_hears_and_tells_as_it_asks())),
    ("a_mount_below_another_is_its_own", || Box::pin(a_mount_below_another_is_its_own())),
];

fn main() {
    shim::entry();
    run_all(TESTS);
}

/// A directory of the test's whose mounts are shared; unmounted in the end, whatever is mounted in it by then.
struct Shared(PathBuf);

impl Shared {
    fn new(dir: PathBuf) -> Shared {
        mount_bind(&dir, &dir).unwrap();
        let shared = Shared(dir);
        mount_change(&shared.0, MountPropagationFlags::SHARED).unwrap();
        shared
    }

    /// Mounts memory with a file `here` in it, as the node.
    fn add(&self, name: &str) {
        let at = self.0.join(name);
        std::fs::create_dir_all(&at).unwrap();
        mount("tmpfs", &at, "tmpfs", MountFlags::empty(), None::<&CStr>).unwrap();
        std::fs::write(at.join("here"), "").unwrap();
    }

    /// What is mounted below it, as the node sees it.
    fn mounts(&self) -> Vec<String> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = table.lines().filter_map(mount_point);
        let below = points.filter_map(|point| Some(point.strip_prefix(&self.0).ok()?.display().to_string()));
        let mut below: Vec<String> = below.filter(|path| !path.is_empty()).collect();
        below.sort();
        below
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for below in self.mounts().iter().rev() {
            let _ = unmount(self.0.join(below), UnmountFlags::DETACH);
        }
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn at(shared: &Shared, path: &str, propagation: Propagation) -> Mount {
    Mount { host_path: shared.0.clone(), container_path: path.into(), propagation, ..Mount::default() }
}

async fn start(node: &Node, id: &str, mounts: Vec<Mount>) {
    let spec = ContainerSpec { privileged: true, mounts, ..node.spec(id, "echo up; sleep 1000") };
    let spec = ContainerSpec { seccomp: Seccomp::Unconfined, ..spec };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container(id).await.unwrap();
    node.wait_log(id, "up").await;
}

async fn run(node: &Node, id: &str, script: &str) -> String {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let done = node.runtime.exec_sync(id, argv, Duration::from_secs(30)).await.unwrap();
    String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
}

/// The directories, of those, in which a container finds the file `here` of a mount.
async fn seen(node: &Node, id: &str, name: &str, dirs: &[&str]) -> Vec<String> {
    let script = format!("for d in {}; do [ -e $d/{name}/here ] && echo $d; done; true", dirs.join(" "));
    run(node, id, &script).await.lines().map(str::to_owned).collect()
}

async fn each_mount_hears_and_tells_as_it_asks() {
    use Propagation::{Bidirectional, HostToContainer, Private};
    let node = Node::new().await;
    let shared = Shared::new(node.scratch("shared"));
    node.sandbox("pod").await;
    shared.add("before");
    start(&node, "hears", vec![at(&shared, "/none", Private), at(&shared, "/host", HostToContainer)]).await;
    let all = vec![
        at(&shared, "/none", Private),
        at(&shared, "/host", HostToContainer),
        at(&shared, "/both", Bidirectional),
    ];
    start(&node, "tells", all).await;
    shared.add("after");
    let dirs = ["/none", "/host", "/both"];
    assert_eq!(seen(&node, "hears", "before", &dirs).await, ["/none", "/host"]);
    assert_eq!(seen(&node, "hears", "after", &dirs).await, ["/host"]);
    assert_eq!(seen(&node, "tells", "before", &dirs).await, dirs);
    assert_eq!(seen(&node, "tells", "after", &dirs).await, ["/host", "/both"]);
    // What the containers mount themselves.
    let mounts = "for d in none host both; do [ -d /$d ] || continue; \
                  mkdir -p /$d/by-$d && mount -t tmpfs t /$d/by-$d && touch /$d/by-$d/here; done";
    assert_eq!(run(&node, "hears", mounts).await, "");
    assert_eq!(shared.mounts(), ["after", "before"]);
    assert_eq!(run(&node, "tells", mounts).await, "");
    assert_eq!(shared.mounts(), ["after", "before", "by-both"]);
    assert_eq!(seen(&node, "hears", "by-both", &dirs).await, ["/host"]);
    assert_eq!(seen(&node, "tells", "by-both", &dirs).await, ["/host", "/both"]);
    drop(shared);
    node.close().await;
}

async fn a_mount_below_another_is_its_own() {
    use Propagation::{Bidirectional, HostToContainer, Private};
    let node = Node::new().await;
    let (above, below) = (Shared::new(node.scratch("above")), Shared::new(node.scratch("below")));
    node.sandbox("pod").await;
    for (id, over, under) in [
        ("in", Private, HostToContainer),
        ("out", HostToContainer, Private),
        ("both", Private, Bidirectional),
    ] {
        std::fs::create_dir_all(above.0.join("in")).unwrap();
        start(&node, id, vec![at(&below, "/v/in", under), at(&above, "/v", over)]).await;
        let name = format!("for-{id}");
        above.add(&name);
        below.add(&name);
        let want: &[&str] = if over == Private { &["/v/in"] } else { &["/v"] };
        assert_eq!(seen(&node, id, &name, &["/v", "/v/in"]).await, want, "{id}");
    }
    drop((above, below));
    node.close().await;
}
