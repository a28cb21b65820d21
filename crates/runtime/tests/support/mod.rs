//! A node of its own for each test: data directory, cgroup, an image of busybox.

use std::future::Future;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use minke_runtime::*;
use serde_json::json;
use sha2::{Digest, Sha256};

pub type TestFn = fn() -> Pin<Box<dyn Future<Output = ()>>>;

pub const IMAGE: &str = "minke.local/busybox:test";
/// The same, with SIGUSR1 as its stop signal.
pub const USR1_IMAGE: &str = "minke.local/busybox:usr1";

pub fn run_all(tests: &[(&str, TestFn)]) {
    if let Some(reason) = cannot_run() {
        println!("skipped: {reason}");
        return;
    }
    // As the usual harness is called: options are for it, the rest chooses.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let mut failed = Vec::new();
    for (name, test) in tests {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let limit = Duration::from_secs(120);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async {
                tokio::time::timeout(limit, test()).await.expect("the test takes too long")
            });
        }));
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        if result.is_err() {
            failed.push(*name);
        }
    }
    if !failed.is_empty() {
        println!("failed: {failed:?}");
        std::process::exit(101);
    }
}

fn cannot_run() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("containers need root");
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("/bin/busybox (Debian: busybox-static) is not installed");
    }
    None
}

/// A node with nothing on it but two images.
pub struct Node {
    tmp: Option<tempfile::TempDir>,
    root: PathBuf,
    pub runtime: LocalRuntime,
    pub cgroup_root: String,
}

impl Node {
    pub async fn new() -> Self {
        Self::within(&std::env::temp_dir()).await
    }

    /// A node whose files are in a directory in `parent`.
    pub async fn within(parent: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let tmp = tempfile::tempdir_in(parent).unwrap();
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let cgroup_root = format!("minke-test-{}-{n}", std::process::id());
        let images = ImageStore::open(tmp.path(), RegistryConfig::default()).unwrap();
        images.load(Cursor::new(busybox("SIGTERM", IMAGE)), None, None).await.unwrap();
        images.load(Cursor::new(busybox("SIGUSR1", USR1_IMAGE)), None, None).await.unwrap();
        let config = RuntimeConfig { root: tmp.path().to_owned(), cgroup_root: cgroup_root.clone() };
        let runtime = LocalRuntime::open(config, images).await.unwrap();
        Self { root: tmp.path().to_owned(), tmp: Some(tmp), runtime, cgroup_root }
    }

    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    /// A node that belongs to another process.
    pub async fn borrowed(root: PathBuf, cgroup_root: String) -> Self {
        let images = ImageStore::open(&root, RegistryConfig::default()).unwrap();
        let config = RuntimeConfig { root: root.clone(), cgroup_root: cgroup_root.clone() };
        let runtime = LocalRuntime::open(config, images).await.unwrap();
        Self { tmp: None, root, runtime, cgroup_root }
    }

    /// Forgets everything in memory, as a killed agent would, and opens the directory anew.
    pub async fn restart(mut self) -> Self {
        let mut again = Self::borrowed(self.root.clone(), self.cgroup_root.clone()).await;
        again.tmp = self.tmp.take();
        again
    }

    /// Takes everything down and looks whether something is left.
    pub async fn close(mut self) {
        let pids = self.runtime.cgroups().pids(&self.cgroup_root);
        self.runtime.shutdown_all().await.unwrap();
        let root = self.root();
        for dir in ["shims", "containers"] {
            let left: Vec<_> =
                std::fs::read_dir(root.join(dir)).unwrap().flatten().map(|e| e.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        for dir in self.runtime.cgroups().dirs(&self.cgroup_root) {
            assert!(!dir.exists(), "{} is left", dir.display());
        }
        for pid in pids {
            assert!(!Path::new(&format!("/proc/{pid}/exe")).exists(), "process {pid} is left");
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<_> = mounts.lines().filter(|l| l.contains(root.to_str().unwrap())).collect();
        assert!(left.is_empty(), "{left:?}");
        self.tmp.take().unwrap().close().unwrap();
    }

    pub fn scratch(&self, name: &str) -> PathBuf {
        let dir = self.root().join("scratch").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        if name == "wait" && !dir.join("fifo").exists() {
            nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        dir
    }

    pub fn sandbox_spec(&self, id: &str) -> SandboxSpec {
        SandboxSpec {
            id: id.into(),
            namespace: "default".into(),
            name: id.into(),
            uid: format!("uid-{id}"),
            hostname: "web-0".into(),
            log_dir: self.root().join("logs").join(id),
            cgroup_parent: format!("{}/{id}", self.cgroup_root),
            ..Default::default()
        }
    }

    pub async fn sandbox(&self, id: &str) {
        self.runtime.run_sandbox(self.sandbox_spec(id)).await.unwrap();
    }

    pub fn log_path(&self, id: &str) -> PathBuf {
        self.root().join("logs").join(id).join("0.log")
    }

    pub fn spec(&self, id: &str, script: &str) -> ContainerSpec {
        let wait =
            Mount { host_path: self.scratch("wait"), container_path: "/wait".into(), ..Default::default() };
        ContainerSpec {
            id: id.into(),
            name: id.into(),
            image: IMAGE.into(),
            command: vec!["sh".into(), "-c".into(), script.into()],
            seccomp: Seccomp::RuntimeDefault,
            mounts: vec![wait],
            log_path: self.log_path(id),
            ..Default::default()
        }
    }

    pub async fn start(&self, id: &str, script: &str) {
        self.runtime.create_container("pod", self.spec(id, script)).await.unwrap();
        self.runtime.start_container(id).await.unwrap();
    }

    pub async fn wait_exit(&self, id: &str) -> ContainerStatus {
        let mut events = self.runtime.subscribe();
        loop {
            let status = self.runtime.container_status(id).await.unwrap();
            if status.state == ContainerState::Exited {
                return status;
            }
            let _ = tokio::time::timeout(Duration::from_secs(60), events.recv())
                .await
                .expect("the container ends");
        }
    }

    pub fn log(&self, id: &str) -> String {
        std::fs::read_to_string(self.log_path(id)).unwrap_or_default()
    }

    /// What the container wrote, both streams.
    pub fn text(&self, id: &str) -> String {
        let mut out = String::new();
        for line in self.log(id).lines() {
            let mut parts = line.splitn(4, ' ');
            let (tag, text) = (parts.nth(2).unwrap(), parts.next().unwrap());
            out += text;
            out += if tag == "F" { "\n" } else { "" };
        }
        out
    }

    pub async fn wait_log(&self, id: &str, text: &str) {
        let found = async {
            while !self.log(id).contains(text) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), found)
            .await
            .unwrap_or_else(|_| panic!("{text:?} never came: {:?}", self.log(id)));
    }
}

impl Drop for Node {
    /// After a failed test: nothing of it may stay on the machine.
    fn drop(&mut self) {
        if self.tmp.is_none() {
            return;
        }
        let cgroups = self.runtime.cgroups();
        cgroups.kill(&self.cgroup_root);
        let _ = cgroups.remove(&self.cgroup_root);
    }
}

pub fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// A `docker save` archive of an image with the node's busybox in it.
pub fn busybox(stop_signal: &str, tag: &str) -> Vec<u8> {
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, data: &[u8], link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        match link {
            "" => layer.append_data(&mut header, path, data).unwrap(),
            link => layer.append_link(&mut header, path, link).unwrap(),
        }
    };
    use tar::EntryType::{Directory, Regular, Symlink};
    for dir in ["bin/", "etc/", "tmp/", "proc/", "sys/", "dev/", "mnt/"] {
        add(dir, Directory, 0o755, b"", "");
    }
    add("bin/busybox", Regular, 0o755, &busybox, "");
    add("bin/garbage", Regular, 0o755, b"\x7fnot a program", "");
    add("etc/passwd", Regular, 0o644, b"root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:Web:/srv:/bin/sh\n", "");
    add("etc/group", Regular, 0o644, b"root:x:0:\nwww:x:102:\nlogs:x:300:web\n", "");
    for name in
        "sh cat echo sleep true id ls hostname readlink ip grep wc head mknod mount unshare ps stty tty pidof seq kill printf test pwd stat chown tr"
            .split(' ')
    {
        add(&format!("bin/{name}"), Symlink, 0o777, b"", "/bin/busybox");
    }
    let layer = layer.into_inner().unwrap();
    let diff_id =
        format!("sha256:{}", Sha256::digest(&layer).iter().map(|b| format!("{b:02x}")).collect::<String>());
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "os": "linux", "architecture": arch,
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"], "StopSignal": stop_signal },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"] }]);
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("config.json", config.to_string().into_bytes()),
        ("manifest.json", manifest.to_string().into_bytes()),
        ("layer.tar", layer),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    archive.into_inner().unwrap()
}
