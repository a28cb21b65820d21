//! A container as the OCI runtime specification writes it down, with the field's defaults.

use std::io;
use std::path::{Component, Path};

use serde_json::{Value, json};

use crate::api::{Capabilities, ContainerSpec, ImageAccess, Mount, Propagation, Seccomp};
use crate::shim::proto::{ContainerRecord, SandboxRecord};
use crate::users::Resolved;
use crate::{device, seccomp};

/// Volumes that an image may declare; more are not made.
const IMAGE_VOLUMES_MAX: usize = 256;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container may do unless it is told otherwise.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Every capability, by the number the kernel gives it.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Where a container is put together.
pub struct Place<'a> {
    /// The container's directory.
    pub dir: &'a Path,
    /// Where its root filesystem and the images it mounts are mounted.
    pub mounted: &'a Path,
    /// The process whose namespaces are the pod's.
    pub shim: i32,
    /// The pod's user namespace, if it has one; its namespaces, but of processes, are then those we are in.
    pub users: Option<String>,
    /// The namespace of processes that the container joins.
    pub processes: Option<String>,
}

/// `config.json` of a container.
pub fn oci_spec(
    record: &ContainerRecord,
    sandbox: &SandboxRecord,
    place: &Place<'_>,
    user: &Resolved,
) -> io::Result<Value> {
    let spec = &record.spec;
    // A capability that this process does not have cannot be given.
    let capabilities: Vec<String> = capabilities(&spec.capabilities, spec.privileged)
        .into_iter()
        .filter(|c| own_bounding_set().contains(c))
        .collect();
    let mut process = json!({
        "terminal": spec.tty,
        "user": { "uid": user.uid, "gid": user.gid, "umask": 0o022, "additionalGids": user.groups },
        "args": arguments(spec, &record.image.entrypoint, &record.image.cmd),
        "env": environment(record, sandbox, user),
        "cwd": working_dir(spec, &record.image.working_dir),
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            // Empty since CVE-2022-24769: nothing is gained by executing a file.
            "inheritable": [], "ambient": [],
        },
    });
    // libcontainer asks whether the field is there, not what it says.
    if spec.no_new_privs {
        process["noNewPrivileges"] = true.into();
    }
    let unmask = spec.privileged;
    let paths = |given: &Option<Vec<String>>, default: &[&str]| match given {
        Some(paths) => json!(paths),
        None if unmask => json!([]),
        None => json!(default),
    };
    let mut linux = json!({
        "namespaces": namespaces(sandbox, place, record.cgroup_namespace()),
        "cgroupsPath": format!("/{}", record.cgroup.trim_start_matches('/')),
        "maskedPaths": paths(&spec.masked_paths, &MASKED_PATHS),
        "readonlyPaths": paths(&spec.readonly_paths, &READONLY_PATHS),
        "devices": devices(spec)?,
    });
    // libcontainer knows propagation of the whole only: the widest; `shim::propagation` narrows it by mount.
    let receives = || spec.mounts.iter().any(|mount| mount.propagation == Propagation::HostToContainer);
    linux["rootfsPropagation"] = match () {
        () if record.shares_mounts() => "shared",
        () if receives() => "slave",
        () => "private",
    }
    .into();
    if let Some(ids) = sandbox.spec.user_namespace {
        let map = json!([{ "containerID": 0, "hostID": ids.first, "size": ids.count }]);
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
    }
    match &spec.seccomp {
        _ if spec.privileged => {}
        Seccomp::Unconfined => {}
        Seccomp::RuntimeDefault => linux["seccomp"] = seccomp::default_profile(&capabilities),
        Seccomp::Localhost(path) => {
            let text = std::fs::read(path)
                .map_err(|e| io::Error::new(e.kind(), format!("seccomp profile {}: {e}", path.display())))?;
            linux["seccomp"] = serde_json::from_slice(&text)?;
        }
    }
    Ok(json!({
        "ociVersion": "1.2.0",
        "root": { "path": place.mounted.join("rootfs"), "readonly": spec.readonly_rootfs },
        "process": process,
        "mounts": mounts(record, sandbox, place),
        "linux": linux,
    }))
}

/// The given command, or the image's; the image's cmd only ever follows the image's entrypoint.
pub fn arguments(spec: &ContainerSpec, entrypoint: &[String], cmd: &[String]) -> Vec<String> {
    let (head, tail) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (entrypoint, cmd),
        (true, false) => (entrypoint, &spec.args[..]),
        (false, _) => (&spec.command[..], &spec.args[..]),
    };
    head.iter().chain(tail).cloned().collect()
}

fn working_dir<'a>(spec: &'a ContainerSpec, image: &'a str) -> &'a str {
    [spec.cwd.as_str(), image].into_iter().find(|d| !d.is_empty()).unwrap_or("/")
}

/// The image's variables with ours over them, each name once.
fn environment(record: &ContainerRecord, sandbox: &SandboxRecord, user: &Resolved) -> Vec<String> {
    let mut env: Vec<String> = vec![DEFAULT_PATH.to_owned()];
    let hostname = match sandbox.spec.hostname.as_str() {
        "" => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        name => name.to_owned(),
    };
    let mut set = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        let same = |e: &String| e.strip_prefix(&name).is_some_and(|rest| rest.starts_with('='));
        match env.iter().position(same) {
            Some(at) => env[at] = entry,
            None => env.push(entry),
        }
    };
    set(format!("HOSTNAME={hostname}"));
    if record.spec.tty {
        set("TERM=xterm".to_owned());
    }
    let image = record.image.env.iter().filter(|e| e.contains('=')).cloned();
    let given = record.spec.env.iter().map(|(name, value)| format!("{name}={value}"));
    image.chain(given).for_each(&mut set);
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    env
}

/// The default set, changed; `ALL` is applied before single names, as upstream does it.
pub fn capabilities(changes: &Capabilities, privileged: bool) -> Vec<String> {
    let name = |c: &String| match c.to_ascii_uppercase() {
        c if c == "ALL" || c.starts_with("CAP_") => c,
        c => format!("CAP_{c}"),
    };
    let (add, drop): (Vec<_>, Vec<_>) =
        (changes.add.iter().map(name).collect(), changes.drop.iter().map(name).collect());
    let all = |list: &[String]| list.iter().any(|c| c == "ALL");
    let base: &[&str] = match (privileged || all(&add), all(&drop)) {
        (true, _) => &ALL_CAPABILITIES,
        (false, true) => &[],
        (false, false) => &DEFAULT_CAPABILITIES,
    };
    let kept = |c: &str| privileged || !drop.iter().any(|d| d == c);
    let mut set: Vec<String> = base.iter().filter(|c| kept(c)).map(|c| (*c).to_owned()).collect();
    for c in add.into_iter().filter(|c| c != "ALL" && ALL_CAPABILITIES.contains(&c.as_str())) {
        if !set.contains(&c) {
            set.push(c);
        }
    }
    set
}

fn own_bounding_set() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|l| l.strip_prefix("CapBnd:"));
    let bits = bits.and_then(|b| u64::from_str_radix(b.trim(), 16).ok()).unwrap_or(u64::MAX);
    (0..).zip(ALL_CAPABILITIES).filter(|(n, _)| bits >> n & 1 == 1).map(|(_, c)| c.to_owned()).collect()
}

/// The process whose process namespace the container joins: that of the container whose processes are to be seen, or
/// the pod's.
pub fn joined_process(spec: &ContainerSpec, sandbox: &SandboxRecord, dir: &Path) -> io::Result<Option<i32>> {
    let Some(target) = &spec.pid_target else { return Ok(sandbox.pause_pid) };
    let file = dir.with_file_name(target).join("started.json");
    let started: Option<crate::shim::proto::Started> = crate::files::read_json(&file)?;
    started
        .map(|started| Some(started.pid))
        .ok_or_else(|| io::Error::other(format!("target container {target:?} is not running")))
}

fn namespaces(sandbox: &SandboxRecord, place: &Place<'_>, cgroup: bool) -> Value {
    let shim = place.shim;
    let joined = |kind: &str, file: &str| json!({ "type": kind, "path": format!("/proc/{shim}/ns/{file}") });
    let mut list = vec![json!({ "type": "mount" })];
    let spec = &sandbox.spec;
    match (spec.host_pid, &place.processes) {
        (true, _) => {}
        (false, Some(path)) => list.push(json!({ "type": "pid", "path": path })),
        (false, None) => list.push(json!({ "type": "pid" })),
    }
    if cgroup {
        list.push(json!({ "type": "cgroup" }));
    }
    if let Some(path) = &place.users {
        list.push(json!({ "type": "user", "path": path }));
        return json!(list);
    }
    if !spec.host_network {
        list.push(joined("network", "net"));
        list.push(joined("uts", "uts"));
    }
    if !spec.host_ipc {
        list.push(joined("ipc", "ipc"));
    }
    json!(list)
}

fn mounts(record: &ContainerRecord, sandbox: &SandboxRecord, place: &Place<'_>) -> Value {
    let spec = &record.spec;
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
    let kernel = if spec.privileged { "rw" } else { "ro" };
    let mut list = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", kernel]),
    ];
    list.extend(cgroup_mounts(record, kernel));
    let root = place.dir.parent().and_then(Path::parent);
    let shims = root.map(|root| root.join("shims").join(&sandbox.spec.id));
    let taken = |path: &str| spec.mounts.iter().any(|m| m.container_path == Path::new(path));
    match shims {
        _ if taken("/dev/shm") => {}
        _ if sandbox.spec.host_ipc => {
            list.push(mount("/dev/shm", "bind", "/dev/shm", &["rbind", "rw", "nosuid", "noexec", "nodev"]));
        }
        // The pod's own lies in the shim's mount namespace, out of reach from the node's.
        Some(shim) if !record.shares_mounts() => {
            let source = shim.join("shm");
            let options = ["rbind", "rw", "nosuid", "noexec", "nodev"];
            list.push(mount("/dev/shm", "bind", &source.to_string_lossy(), &options));
        }
        _ => {
            let options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
            list.push(mount("/dev/shm", "tmpfs", "shm", &options));
        }
    }
    let mut given: Vec<(&Path, Value)> = Vec::new();
    // They lie in the container's own writable layer; only a root that is read-only sets them apart.
    for path in record.image.volumes.iter().map(Path::new).filter(|_| spec.readonly_rootfs) {
        let source = place.mounted.join("rootfs").join(path.strip_prefix("/").unwrap_or(path));
        let options = ["rbind", "rprivate", "rw"];
        given.push((
            path,
            json!({ "destination": path, "type": "bind", "source": source, "options": options }),
        ));
    }
    let images: Vec<&Mount> = spec.mounts.iter().filter(|m| m.image.is_some()).collect();
    for m in &spec.mounts {
        if let Some(n) = images.iter().position(|image| std::ptr::eq(*image, m)) {
            let part = if m.image_sub_path.is_empty() { "" } else { "-part" };
            let access = match m.image_access {
                ImageAccess::Data => &["ro", "noexec", "nosuid", "nodev"][..],
                ImageAccess::Programs => &["ro"],
                ImageAccess::Scratch => &["rw"],
            };
            let options = [&["rbind", "rprivate"], access].concat();
            let source = place.mounted.join(format!("image-{n}{part}"));
            let image = json!({
                "destination": m.container_path, "type": "bind", "source": source, "options": options,
            });
            given.push((&m.container_path, image));
            continue;
        }
        if let Some(size) = m.tmpfs_size {
            let mut options = vec!["nosuid".to_owned(), "nodev".to_owned()];
            options.extend((size > 0).then(|| format!("size={size}")));
            let tmpfs = json!({
                "destination": m.container_path, "type": "tmpfs", "source": "tmpfs", "options": options,
            });
            given.push((&m.container_path, tmpfs));
            continue;
        }
        let propagation = match m.propagation {
            Propagation::Private => "rprivate",
            Propagation::HostToContainer => "rslave",
            Propagation::Bidirectional => "rshared",
        };
        let access = match (m.readonly, m.recursive_readonly) {
            (_, true) => "rro",
            (true, false) => "ro",
            (false, false) => "rw",
        };
        let bind = json!({
            "destination": m.container_path, "type": "bind", "source": m.host_path,
            "options": ["rbind", propagation, access],
        });
        given.push((&m.container_path, bind));
    }
    // A mount may lie below another: parents first.
    given.sort_by_key(|(path, _)| path.components().count());
    list.extend(given.into_iter().map(|(_, mount)| mount));
    json!(list)
}

/// The directories that the image declares as volumes and nothing is mounted at: they are made, and can be written
/// to whatever the root is. What is not a plain path to a directory of the image's own is left out.
pub fn image_volumes(record: &ContainerRecord) -> Vec<String> {
    let plain = |path: &Path| {
        let mut parts = path.components();
        parts.next() == Some(Component::RootDir)
            && matches!(parts.next(), Some(Component::Normal(first)) if !["proc", "sys", "dev"].iter().any(|kernel| first == *kernel))
            && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    let mounted = |path: &Path| record.spec.mounts.iter().any(|m| m.container_path == path);
    let all = record.image.volumes.iter().filter(|path| plain(Path::new(path)) && !mounted(Path::new(path)));
    all.take(IMAGE_VOLUMES_MAX).cloned().collect()
}

/// The container's own cgroup in every hierarchy. `access` is `ro` unless it is privileged: on v1 root in the
/// container could else raise its own limits (libcontainer's own `cgroup` mount is writable there).
fn cgroup_mounts(record: &ContainerRecord, access: &str) -> Vec<Value> {
    const OPTIONS: [&str; 4] = ["nosuid", "noexec", "nodev", "relatime"];
    let mount = |target: &Path, kind: &str, source: &Path, more: &[&str]| {
        let options = [&OPTIONS[..], more].concat();
        json!({ "destination": target, "type": kind, "source": source, "options": options })
    };
    let base = Path::new("/sys/fs/cgroup");
    if let [_] = &record.cgroup_dirs[..] {
        return vec![mount(base, "cgroup", Path::new("cgroup"), &[access])];
    }
    let mut list = vec![mount(base, "tmpfs", Path::new("tmpfs"), &["mode=755", "size=64k"])];
    let levels = Path::new(record.cgroup.trim_start_matches('/')).components().count();
    for dir in &record.cgroup_dirs {
        let root = dir.ancestors().nth(levels).and_then(Path::file_name);
        let Some(name) = root.and_then(|name| name.to_str()) else { continue };
        // Controllers that are mounted together are found under each one's name as well.
        let single = name.split(',').filter(|single| *single != name);
        for name in std::iter::once(name).chain(single) {
            list.push(mount(&base.join(name), "bind", dir, &["bind", access]));
        }
    }
    list
}

/// The devices asked for; for a privileged container those of the node.
fn devices(spec: &ContainerSpec) -> io::Result<Value> {
    let mut list = Vec::new();
    for wanted in &spec.devices {
        list.push(device_node(&wanted.host_path, &wanted.container_path)?);
    }
    if spec.privileged {
        let mut found = Vec::new();
        device::host_nodes(Path::new("/dev"), &mut found);
        list.extend(found.iter().filter_map(|path| device_node(path, path).ok()));
    }
    Ok(json!(list))
}

fn device_node(host: &Path, container: &Path) -> io::Result<Value> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let meta = std::fs::metadata(host)?;
    let rule = device::rule_for(&crate::api::Device {
        host_path: host.to_owned(),
        container_path: container.to_owned(),
        permissions: String::new(),
    })?;
    Ok(json!({
        "path": container, "type": rule.kind.to_string(), "major": rule.major, "minor": rule.minor,
        "fileMode": meta.permissions().mode() & 0o777, "uid": meta.uid(), "gid": meta.gid(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[track_caller]
    fn check_args(command: &[&str], args: &[&str], want: &[&str]) {
        let spec = ContainerSpec { command: strings(command), args: strings(args), ..Default::default() };
        assert_eq!(arguments(&spec, &strings(&["entry"]), &strings(&["cmd"])), strings(want));
    }

    #[test]
    fn command_and_args_replace_the_images() {
        check_args(&[], &[], &["entry", "cmd"]);
        check_args(&[], &["a"], &["entry", "a"]);
        check_args(&["c"], &[], &["c"]);
        check_args(&["c"], &["a"], &["c", "a"]);
    }

    #[track_caller]
    fn check_caps(add: &[&str], drop: &[&str], privileged: bool, count: usize, has: &str, want: bool) {
        let got = capabilities(&Capabilities { add: strings(add), drop: strings(drop) }, privileged);
        assert_eq!((got.len(), got.iter().any(|c| c == has)), (count, want), "{got:?}");
    }

    #[test]
    fn capabilities_change_the_default_set() {
        check_caps(&[], &[], false, 14, "CAP_CHOWN", true);
        check_caps(&["NET_ADMIN"], &[], false, 15, "CAP_NET_ADMIN", true);
        check_caps(&["cap_net_admin", "KILL"], &["CHOWN"], false, 14, "CAP_CHOWN", false);
        check_caps(&["NET_BIND_SERVICE"], &["ALL"], false, 1, "CAP_NET_BIND_SERVICE", true);
        check_caps(&["ALL"], &["SYS_ADMIN"], false, 40, "CAP_SYS_ADMIN", false);
        check_caps(&["NONSENSE"], &[], false, 14, "CAP_NONSENSE", false);
        check_caps(&[], &[], true, 41, "CAP_SYS_ADMIN", true);
    }

    #[test]
    fn volumes_of_an_image_are_its_own_directories() {
        let mut record = ContainerRecord::default();
        record.image.volumes = strings(&["/data", "/a/b/", "rel", "/a/../etc", "/", "/proc/x", "/mine"]);
        record.spec.mounts = vec![Mount { container_path: "/mine".into(), ..Default::default() }];
        assert_eq!(image_volumes(&record), strings(&["/data", "/a/b/"]));
        record.image.volumes = image_volumes(&record);
        let targets = |record: &ContainerRecord| -> Vec<String> {
            let dir = Path::new("/run/c");
            let place = Place { dir, mounted: dir, shim: 1, users: None, processes: None };
            let all = mounts(record, &SandboxRecord::default(), &place);
            let given = all.as_array().into_iter().flatten().filter(|m| m["options"][2] == "rw");
            given.map(|m| format!("{} at {}", m["source"], m["destination"])).collect()
        };
        assert_eq!(targets(&record), [r#""" at "/mine""#]);
        record.spec.readonly_rootfs = true;
        let own =
            [r#""/run/c/rootfs/data" at "/data""#, r#""" at "/mine""#, r#""/run/c/rootfs/a/b" at "/a/b/""#];
        assert_eq!(targets(&record), own);
    }

    #[test]
    fn later_variables_win_and_names_come_once() {
        let mut record = ContainerRecord::default();
        record.image.env = strings(&["PATH=/image", "A=1", "broken"]);
        record.spec.env = vec![("A".into(), "2".into()), ("AA".into(), "3".into())];
        let mut sandbox = SandboxRecord::default();
        sandbox.spec.hostname = "web-0".into();
        let user = Resolved { home: "/srv".into(), ..Default::default() };
        let env = environment(&record, &sandbox, &user);
        assert_eq!(env, strings(&["PATH=/image", "HOSTNAME=web-0", "A=2", "AA=3", "HOME=/srv"]));
    }
}
