//! What a container sees and can reach, from inside: beside what runc gives for the same bundle, and against
//! attempts to get out.
//!
//! Runs as `containers` does, and for the same reason without the usual harness.

#![allow(clippy::disallowed_methods, reason = "real processes in real time")]

#[allow(dead_code, reason = "each test program uses its part")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use minke_runtime::*;
use serde_json::{Value, json};
use support::*;

/// Lists the tests, with their names.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), (|| Box::pin($name())) as TestFn)),*]
    };
}

const TESTS: &[(&str, TestFn)] = tests![
    runc_makes_the_same_of_a_bundle,
    nothing_of_the_node_is_inherited,
    a_shared_process_namespace_shows_nothing_of_the_node,
    working_directories_lead_nowhere_else,
    limits_are_kept,
    an_out_of_memory_kill_is_told_whoever_it_hit,
    the_program_of_the_node_cannot_be_changed,
    a_pod_can_have_users_of_its_own,
    pods_with_users_of_their_own_are_like_others,
];

fn main() {
    shim::entry();
    run_all(TESTS);
}

/// Says what there is: a name and a value a line, where runtimes may give another order.
const PROBE: &str = r#"
while read -r _ _ _ root point options rest; do
  kind=${rest##* - }; echo "mount $point = ${kind%% *} $options"
done < /proc/self/mountinfo
for f in /dev/* /dev/pts/*; do echo "file $f = $(ls -ld $f | grep -o '^[^ ]*') $(ls -ldn $f | grep -o '[0-9]*, *[0-9]* ' )"; done
grep -E '^(Cap|NoNewPrivs|Seccomp:|Uid|Gid|Groups)' /proc/self/status | while read -r name value; do echo "status $name = $value"; done
for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq /proc/bus /proc/fs; do [ -w $f ] && [ -f $f ] && (echo x >> $f) 2>/dev/null && echo "written $f = yes"; done
for f in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts /proc/acpi /sys/firmware /sys/devices/virtual/powercap; do
  [ -d $f ] && echo "masked $f = $(ls $f | wc -l)"; [ -f $f ] || [ -c $f ] && echo "masked $f = $(head -c 20 $f 2>/dev/null | wc -c)"
done
for n in mnt pid net ipc uts cgroup user; do [ "$(readlink /proc/self/ns/$n)" = "$(cat /host-ns/$n)" ] && echo "shared $n = yes"; done
echo "cwd = $(pwd)"; echo "hostname = $(hostname)"; echo "tty = $(tty)"; set -- /proc/[0-9]*; echo "processes = $#"
echo "score = $(cat /proc/self/oom_score_adj)"; echo "user = $(id)"; ls /proc/self/fd | wc -l | (read -r n; echo "descriptors = $n")
for f in stdout stderr; do echo "stream $f = $(stat -L -c '%F %u' /dev/$f) $( (: >> /dev/$f) 2>/dev/null && echo writable)"; done
while read -r line; do echo "limits $line = -"; done < /proc/self/limits
"#;

fn parse(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(" = "));
    let pairs = pairs.filter(|(name, _)| !name.starts_with("mount /sys/fs/cgroup"));
    pairs.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect()
}

/// The names of the node's own namespaces, to be compared with from inside.
fn namespaces_of_the_node(dir: &Path) -> Mount {
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup", "user"] {
        let link = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        std::fs::write(dir.join(name), format!("{}\n", link.display())).unwrap();
    }
    Mount { host_path: dir.to_owned(), container_path: "/host-ns".into(), readonly: true, ..Mount::default() }
}

async fn runc_makes_the_same_of_a_bundle() {
    if Command::new("runc").arg("--version").output().is_err() {
        println!("    skipped: runc is not installed");
        return;
    }
    let node = Node::new().await;
    node.sandbox("pod").await;
    let spec = |id: &str| {
        let mut spec = node.spec(id, PROBE);
        spec.mounts.push(namespaces_of_the_node(&node.scratch("ns")));
        spec.log_path = node.log_path(id);
        spec
    };
    let user = |name: &str| User { user: Some(name.into()), ..User::default() };
    let few = Capabilities { add: vec!["NET_ADMIN".into()], drop: vec!["ALL".into()] };
    let cases = [
        spec("plain"),
        ContainerSpec { user: user("web"), no_new_privs: true, ..spec("user") },
        ContainerSpec { capabilities: few, readonly_rootfs: true, ..spec("few") },
        ContainerSpec { privileged: true, seccomp: Seccomp::Unconfined, ..spec("privileged") },
        ContainerSpec { masked_paths: Some(vec![]), readonly_paths: Some(vec![]), ..spec("unmasked") },
        ContainerSpec { oom_score_adj: Some(700), cwd: "/tmp".into(), ..spec("scored") },
    ];
    for case in cases {
        let (id, score) = (case.id.clone(), case.oom_score_adj);
        node.runtime.create_container("pod", case).await.unwrap();
        node.runtime.start_container(&id).await.unwrap();
        node.wait_exit(&id).await;
        let ours = parse(&node.text(&id));
        let reference = by_runc(&node, &id, score);
        assert!(ours.len() > 40, "{ours:?}");
        for (name, value) in &reference {
            assert_eq!(ours.get(name), Some(value), "{id}: {name}");
        }
        for name in ours.keys() {
            assert!(reference.contains_key(name), "{id}: only ours has {name}: {}", ours[name]);
        }
    }
    node.close().await;
}

/// Runs the bundle of a container that has ended once more, with runc.
fn by_runc(node: &Node, id: &str, score: Option<i32>) -> BTreeMap<String, String> {
    let bundle = node.scratch(&format!("bundle-{id}"));
    let dir = node.root().join("containers").join(id);
    let read = |path: &Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let (mut config, record) = (read(&dir.join("config.json")), read(&dir.join("container.json")));
    let snapshots = node.root().join("snapshots");
    let layers: Vec<String> = (record["layers"].as_array().unwrap().iter())
        .map(|layer| snapshots.join(layer.as_str().unwrap()).display().to_string())
        .collect();
    for name in ["rootfs", "upper", "work"] {
        std::fs::create_dir_all(bundle.join(name)).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        layers.join(":"),
        bundle.join("upper").display(),
        bundle.join("work").display()
    );
    let rootfs = bundle.join("rootfs");
    nix::mount::mount(
        Some("overlay"),
        &rootfs,
        Some("overlay"),
        nix::mount::MsFlags::empty(),
        Some(options.as_str()),
    )
    .unwrap();
    // Those of the container itself, which is gone; what can be done with them is tried in `containers`.
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/sys/fs/cgroup"));
    for mount in mounts.iter_mut().filter(|mount| mount["destination"] == "/dev/shm") {
        // The pod's own is in the mount namespace of its shim.
        let options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
        *mount = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": options});
    }
    config["root"]["path"] = rootfs.to_str().unwrap().into();
    config["linux"]["cgroupsPath"] = format!("/{}/runc-{id}", node.cgroup_root).into();
    // What the runtime does for its containers beside the bundle.
    if record["spec"]["privileged"] == true {
        config["linux"]["resources"] = json!({"devices": [{"allow": true, "access": "rwm"}]});
    }
    if let Some(score) = score {
        config["process"]["oomScoreAdj"] = score.into();
    }
    std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    let name = format!("{}-{id}", node.cgroup_root);
    let run = Command::new("runc")
        .arg("--root")
        .arg(node.scratch("runc"))
        .args(["run", "--bundle"])
        .arg(&bundle)
        .arg(&name)
        .output();
    nix::mount::umount2(&rootfs, nix::mount::MntFlags::MNT_DETACH).unwrap();
    let run = run.unwrap();
    assert!(run.status.success(), "{id}: runc: {}", String::from_utf8_lossy(&run.stderr));
    parse(&String::from_utf8_lossy(&run.stdout))
}

async fn run_script(node: &Node, id: &str, script: &str) -> String {
    let out = node.runtime.exec_sync(id, vec!["sh".into(), "-c".into(), script.into()], Duration::ZERO);
    let out = out.await.unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

async fn nothing_of_the_node_is_inherited() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    // The first process's own: the three streams and the directory that is being read.
    let script = "ls -l /proc/self/fd; echo; cat /proc/self/environ; echo; sleep 1000";
    node.start("c", script).await;
    node.wait_log("c", "PATH=").await;
    let check = |text: &str| {
        let links: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once(" -> ")?.1)).collect();
        let odd: Vec<&&str> = (links.iter())
            .filter(|link| {
                !(link.starts_with("pipe:") || link.starts_with("/proc/") || **link == "/dev/null")
            })
            .collect();
        assert!(odd.is_empty() && (3..=4).contains(&links.len()), "{text}");
    };
    check(&node.text("c"));
    check(&run_script(&node, "c", "ls -l /proc/self/fd").await);
    // What is executed counts where the container does, in every hierarchy.
    let cgroups = run_script(&node, "c", "cat /proc/self/cgroup; echo; cat /proc/1/cgroup").await;
    let (own, first) = cgroups.split_once("\n\n").unwrap();
    assert!(own.lines().count() > 0 && own.trim() == first.trim(), "{cgroups}");
    let (root, dir) = (node.root().display().to_string(), std::env::current_dir().unwrap());
    let seen =
        run_script(&node, "c", "cat /proc/1/environ /proc/self/environ /proc/1/cmdline; ls /proc/1/cwd/")
            .await;
    assert!(!seen.contains(&root) && !seen.contains(dir.to_str().unwrap()), "{seen}");
    node.close().await;
}

async fn a_shared_process_namespace_shows_nothing_of_the_node() {
    let node = Node::new().await;
    let spec = SandboxSpec { share_pid: true, ..node.sandbox_spec("pod") };
    node.runtime.run_sandbox(spec).await.unwrap();
    // As for debugging: whoever may trace other processes may follow their links.
    let capabilities = Capabilities { add: vec!["SYS_PTRACE".into(), "SYS_ADMIN".into()], drop: vec![] };
    let spec = ContainerSpec {
        capabilities,
        seccomp: Seccomp::Unconfined,
        ..node.spec("c", "ls -a /proc/1/root/ /proc/1/cwd/; ls -l /proc/1/fd; echo x > /proc/1/root/x; grep CapEff /proc/1/status; sleep 1000")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_log("c", "CapEff").await;
    let text = node.text("c");
    for name in ["etc", "proc", "shim.log", "bin"] {
        assert!(!text.lines().any(|line| line == name || line.contains("shim.log")), "{text}");
    }
    assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
    assert!(text.contains("can't create /proc/1/root/x"), "{text}");
    node.close().await;
}

/// A working directory is a path of the image, whatever it is called.
async fn working_directories_lead_nowhere_else() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let marker = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    for (n, cwd) in (3..14).map(|n| format!("/proc/self/fd/{n}")).chain(["/../../..".to_owned()]).enumerate()
    {
        let id = format!("c{n}");
        let script = "ls ../../../../../../bin; cat ../../../../../../etc/hostname";
        let spec = ContainerSpec { cwd, ..node.spec(&id, script) };
        node.runtime.create_container("pod", spec).await.unwrap();
        if node.runtime.start_container(&id).await.is_ok() {
            node.wait_exit(&id).await;
            let text = node.text(&id);
            assert!(!text.contains("systemctl") && !text.lines().any(|l| l == marker.trim()), "{id}: {text}");
        }
    }
    node.close().await;
}

async fn limits_are_kept() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let pids = Resources { pids_limit: Some(12), ..Resources::default() };
    let script = "i=0; while [ $i -lt 60 ]; do sleep 1000 & i=$((i+1)); done 2>&1; echo over";
    let spec = ContainerSpec { resources: pids, ..node.spec("forks", script) };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("forks").await.unwrap();
    let status = node.wait_exit("forks").await;
    let text = node.text("forks");
    // The shell gives up at the first process that it may not have.
    assert!(text.contains("can't fork") && !text.contains("over"), "{status:?}: {text}");

    let memory = Resources { memory_limit: Some(24 << 20), ..Resources::default() };
    let script = "head -c 200000000 /dev/zero > /dev/shm/file; echo wrote $?";
    let spec = ContainerSpec { resources: memory, ..node.spec("files", script) };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("files").await.unwrap();
    node.wait_exit("files").await;
    // Memory that is a file is memory: it is limited, be it by the size of /dev/shm or by the kernel.
    assert!(!node.text("files").contains("wrote 0"), "{}", node.text("files"));
    node.close().await;
}

/// The kernel may kill a child and leave the first process alone, which then ends by itself.
async fn an_out_of_memory_kill_is_told_whoever_it_hit() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let limit = |id: &str, script: &str| {
        let resources = Resources { memory_limit: Some(32 << 20), oom_group: true, ..Resources::default() };
        ContainerSpec { resources, ..node.spec(id, script) }
    };
    // Holds as much as it is to print in the end.
    let eat = "head -c 300000000 /dev/zero | /bin/busybox tail -c 200000000 | wc -c";
    for (id, script) in
        [("child", format!("({eat}) ; exit 9")), ("first", format!("exec sh -c '{eat}; exit 1'"))]
    {
        node.runtime.create_container("pod", limit(id, &script)).await.unwrap();
        node.runtime.start_container(id).await.unwrap();
        let status = node.wait_exit(id).await;
        assert!(status.oom_killed && status.reason == "OOMKilled", "{id}: {status:?}: {}", node.text(id));
    }
    // Without want of memory, the same code is an error like any other.
    node.runtime.create_container("pod", limit("fine", "exit 9")).await.unwrap();
    node.runtime.start_container("fine").await.unwrap();
    let status = node.wait_exit("fine").await;
    assert_eq!((status.exit_code, status.reason.as_str()), (Some(9), "Error"));
    node.close().await;
}

/// Containers run beside processes of this very program, and can even execute it; they cannot write to it.
async fn the_program_of_the_node_cannot_be_changed() {
    let node = Node::new().await;
    node.sandbox("pod").await;
    let before = std::fs::read("/proc/self/exe").unwrap();
    // Opens whatever program appears in its process namespace, and tries to write through that.
    let script = "while :; do for p in /proc/[0-9]*; do \
                  (exec 9< $p/exe && echo broken > /proc/self/fd/9 && echo wrote $p) 2>/dev/null; done; done";
    node.start("c", script).await;
    for _ in 0..20 {
        let argv = vec!["/proc/self/exe".to_owned(), "no-such-test".to_owned()];
        // Whatever comes of executing the helper itself.
        let _ = node.runtime.exec_sync("c", argv, Duration::from_secs(5)).await;
        run_script(&node, "c", "true").await;
    }
    assert!(std::fs::read("/proc/self/exe").unwrap() == before, "the program was changed");
    assert!(!node.text("c").lines().any(|line| line.starts_with("wrote /proc/1 ")));
    node.close().await;
}

const IDS: IdRange = IdRange { first: 7_000_000, count: 65536 };

/// The node's ids of a process: real user and group.
fn ids_of(pid: i32) -> (u32, u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let id = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    (id("Uid:"), id("Gid:"))
}

fn bind(host: &Path, inside: &str) -> Mount {
    Mount { host_path: host.to_owned(), container_path: inside.into(), ..Mount::default() }
}

/// Says of every file of the node and of the image what the pod sees of it, and tries what only root of the node may.
const OWN_USERS: &str = r#"
echo "map = $(cat /proc/self/uid_map /proc/self/gid_map | tr -s ' ' | tr '\n' ';')"
for f in / /bin/busybox /v/of-root /v/of-7 /made/here /dev/shm /declared /proc/1/root /dev/null; do echo "$f = $(stat -c %u:%g $f)"; done
echo "secret = $(cat /host/secret)"; echo "cwd = $(pwd)"; echo "hostname = $(hostname)"; echo "id = $(id -u):$(id -g)"
echo x > /v/new; echo x > /new; echo x > /dev/shm/new; chown 5:6 /new /v/new
echo "new = $(stat -c %u:%g /new) $(stat -c %u:%g /v/new)"
echo "streams = out" > /dev/stdout; echo "error stream = err" > /dev/stderr
try() { name=$1; shift; "$@" > /dev/null 2>&1 && echo "$name = yes" || echo "$name = no"; }
try mknod mknod /node c 1 3
try panic sh -c 'echo 1 > /proc/sys/kernel/panic'
try sysrq sh -c 'echo h > /proc/sysrq-trigger'
try hostname-change hostname other
try own-network sh -c 'ip link set lo down && ip link set lo up'
try mount mount -t tmpfs x /mnt
try node-files ls /proc/1/root/proc/sys/fs/binfmt_misc/..
try unmask mount -t proc proc /tmp
try remount mount -o remount,rw /host-ro
try write-ro sh -c 'echo x > /host-ro/secret'
echo "all = said"; sleep 1000
"#;

async fn a_pod_can_have_users_of_its_own() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let node = Node::new().await;
    let spec = SandboxSpec { user_namespace: Some(IDS), ..node.sandbox_spec("pod") };
    node.runtime.run_sandbox(spec).await.unwrap();
    let (volume, secret) = (node.scratch("volume"), node.scratch("secret"));
    std::fs::write(volume.join("of-root"), "x").unwrap();
    std::fs::write(volume.join("of-7"), "x").unwrap();
    std::os::unix::fs::chown(volume.join("of-7"), Some(7), Some(8)).unwrap();
    std::fs::write(secret.join("secret"), "hush").unwrap();
    std::fs::set_permissions(secret.join("secret"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut spec = ContainerSpec { cwd: "/made/here".into(), ..node.spec("c", OWN_USERS) };
    // All that a pod may ask for, and it is root of nothing but itself.
    spec.capabilities.add = vec!["ALL".into()];
    spec.seccomp = Seccomp::Unconfined;
    let read_only = Mount { readonly: true, ..bind(&secret, "/host-ro") };
    spec.mounts.extend([bind(&volume, "/v"), bind(&secret, "/host"), read_only]);
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("c").await.unwrap();
    node.wait_log("c", "all = said").await;
    let said = parse(&node.text("c"));
    let want = [
        ("map", "0 7000000 65536; 0 7000000 65536;"),
        ("/", "0:0"),
        ("/bin/busybox", "0:0"),
        ("/v/of-root", "0:0"),
        ("/v/of-7", "7:8"),
        ("/made/here", "0:0"),
        ("/dev/shm", "0:0"),
        ("/dev/null", "65534:65534"),
        ("secret", "hush"),
        ("cwd", "/made/here"),
        ("hostname", "web-0"),
        ("id", "0:0"),
        ("new", "5:6 5:6"),
        ("streams", "out"),
        ("error stream", "err"),
        ("mknod", "no"),
        ("panic", "no"),
        ("sysrq", "no"),
        ("hostname-change", "yes"),
        ("own-network", "yes"),
        ("mount", "yes"),
        ("remount", "no"),
        ("write-ro", "no"),
    ];
    for (name, value) in want {
        assert_eq!(said.get(name).map(String::as_str), Some(value), "{name}: {}", node.text("c"));
    }
    let pid = node.runtime.container_status("c").await.unwrap().pid.unwrap();
    assert_eq!(ids_of(pid), (IDS.first, IDS.first));
    // A volume is the same for other pods; a layer is the container's, and its ids are the pod's.
    let owner = |path: &Path| std::fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    assert_eq!(owner(&volume.join("new")), (5, 6));
    let upper = node.root().join("containers/c/upper");
    assert_eq!(owner(&upper.join("new")), (IDS.first + 5, IDS.first + 6));

    // What is executed is in the same place, as the same users.
    let seen =
        run_script(&node, "c", "id -u; cat /proc/self/uid_map; echo x > /dev/stdout; cat /v/of-7").await;
    let seen: Vec<&str> = seen.split_whitespace().collect();
    assert_eq!(seen, ["0", "0", "7000000", "65536", "x", "x"]);
    let argv = ["sh", "-c", "tty; stty size; sleep 1000"].map(str::to_owned).to_vec();
    let terminal = ExecSpec { argv, tty: true, stdin: true, stdout: true, stderr: false };
    let mut session = node.runtime.exec("c", terminal).await.unwrap();
    let mut out = session.stdout.take().unwrap();
    let mut first = [0; 5];
    tokio::io::AsyncReadExt::read_exact(&mut out, &mut first).await.unwrap();
    assert_eq!(&first, b"/dev/");
    node.close().await;
}

async fn pods_with_users_of_their_own_are_like_others() {
    let node = Node::new().await;
    let mut spec = SandboxSpec { user_namespace: Some(IDS), share_pid: true, ..node.sandbox_spec("pod") };
    // One goes by who owns the namespace, one by rights in it.
    for (name, value) in [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "77")] {
        spec.sysctls.insert(name.into(), value.into());
    }
    node.runtime.run_sandbox(spec).await.unwrap();
    let user = |name: &str| User { user: Some(name.into()), ..User::default() };
    // Another user of the pod, a terminal, a root that is read-only.
    let spec = ContainerSpec {
        user: user("web"),
        tty: true,
        readonly_rootfs: true,
        ..node.spec(
            "web",
            "id; tty; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; \
             echo x > /x || echo no; echo told > /dev/stderr; sleep 1000",
        )
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("web").await.unwrap();
    node.wait_log("web", "told").await;
    let text = node.text("web");
    assert!(text.contains("uid=101(web) gid=102(www)") && text.contains("/dev/pts/0"), "{text}");
    assert!(text.contains("/dev/pts/0\r\n1\r\n77\r\n") || text.contains("/dev/pts/0\n1\n77\n"), "{text}");
    assert!(text.contains("no\r") || text.contains("no\n"), "{text}");
    let pid = node.runtime.container_status("web").await.unwrap().pid.unwrap();
    assert_eq!(ids_of(pid), (IDS.first + 101, IDS.first + 102));

    // All processes of the pod, none of the node; the first one's root is empty.
    let spec = ContainerSpec {
        privileged: true,
        seccomp: Seccomp::Unconfined,
        ..node.spec("all", "ps; ls -d /dev/*; ls /proc/1/root/; echo over")
    };
    node.runtime.create_container("pod", spec).await.unwrap();
    node.runtime.start_container("all").await.unwrap();
    node.wait_exit("all").await;
    let text = node.text("all");
    assert!(text.contains("sleep 1000") && text.contains("minke-pause") && text.contains("over"), "{text}");
    assert!(!text.contains("minke-shim") && text.contains("/dev/null"), "{text}");

    // Mounts cannot get out of it.
    let out = Mount { propagation: Propagation::Bidirectional, ..bind(&node.scratch("out"), "/out") };
    let mut spec = ContainerSpec { privileged: true, ..node.spec("out", "true") };
    spec.mounts.push(out);
    let refused = node.runtime.create_container("pod", spec).await.unwrap_err();
    assert!(refused.to_string().contains("Bidirectional"), "{refused}");
    // What cannot be shown as the pod's is not shown.
    let mut spec = node.spec("sys", "true");
    spec.mounts.push(bind(Path::new("/sys"), "/host-sys"));
    node.runtime.create_container("pod", spec).await.unwrap();
    let refused = node.runtime.start_container("sys").await.unwrap_err();
    assert!(refused.to_string().contains("failed to set MOUNT_ATTR_IDMAP on /sys"), "{refused}");
    node.close().await;
}
