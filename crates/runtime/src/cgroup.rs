//! cgroups of pods and containers on v1, hybrid and v2 hosts.
//!
//! A path is relative to the root of every hierarchy. Only what [`Cgroups::create`] made is ever changed or
//! removed; the one exception is v2's `cgroup.subtree_control` of the levels above, without which nobody can
//! have limits below them. Device rules are in the module `device`.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use crate::api::{Resources, Stats};

/// How long [`Cgroups::remove`] waits for killed processes to leave.
const REMOVE_WAIT: Duration = Duration::from_secs(5);

/// A limit of memory from here on is none.
const UNLIMITED: u64 = 1 << 62;

/// v2 controllers handed down to our cgroups.
const V2_CONTROLLERS: &[&str] = &["cpuset", "cpu", "io", "memory", "pids", "hugetlb"];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    /// v1 controllers mounted here; none for a named v1 hierarchy and for v2.
    controllers: Vec<String>,
    v2: bool,
}

/// The hierarchies of this machine.
#[derive(Debug, Clone, Default)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    /// Looks at `/proc/self/mountinfo`.
    pub fn detect() -> io::Result<Self> {
        Ok(Self::from_mountinfo(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn from_mountinfo(text: &str) -> Self {
        let mut hierarchies: Vec<Hierarchy> = Vec::new();
        for line in text.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let left: Vec<&str> = left.split(' ').collect();
            let right: Vec<&str> = right.split(' ').collect();
            let (Some(root), Some(target), Some(fstype)) = (left.get(3), left.get(4), right.first()) else {
                continue;
            };
            // A mount of a part of the tree (inside a container) is not where paths start.
            if *root != "/" || !matches!(*fstype, "cgroup" | "cgroup2") {
                continue;
            }
            let controllers: Vec<String> = match *fstype {
                "cgroup" => right
                    .get(2)
                    .map_or("", |options| options)
                    .split(',')
                    .filter(|o| !matches!(*o, "rw" | "ro" | "xattr") && !o.contains('='))
                    .map(str::to_owned)
                    .collect(),
                _ => Vec::new(),
            };
            let found = Hierarchy { root: PathBuf::from(target), controllers, v2: *fstype == "cgroup2" };
            // The same hierarchy can be mounted twice; by its last mount it would get everything twice.
            let known = |h: &Hierarchy| {
                h.v2 == found.v2
                    && (h.v2 || !found.controllers.is_empty() && h.controllers == found.controllers)
            };
            if !hierarchies.iter().any(known) {
                hierarchies.push(found);
            }
        }
        Self { hierarchies }
    }

    #[cfg(test)]
    fn fake_v2(root: &Path) -> Self {
        Self { hierarchies: vec![Hierarchy { root: root.to_owned(), controllers: vec![], v2: true }] }
    }

    /// Whether v2 carries the controllers (a hybrid host mounts v2 without any).
    pub fn is_v2(&self) -> bool {
        self.hierarchies.iter().all(|h| h.v2)
    }

    /// Makes the cgroup in every hierarchy, with the levels above it, and sets its limits.
    pub fn create(&self, path: &str, resources: &Resources) -> io::Result<()> {
        let path = checked(path)?;
        for h in &self.hierarchies {
            let mut dir = h.root.clone();
            for part in path.components() {
                if h.v2 {
                    delegate(&dir)?;
                }
                let parent = dir.clone();
                dir.push(part);
                match fs::create_dir(&dir) {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                    Err(e) => return Err(named(e, &dir)),
                }
                if h.controllers.iter().any(|c| c == "cpuset") {
                    // A v1 cpuset starts empty and takes no process until it has CPUs and memory nodes.
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        let value = fs::read_to_string(parent.join(file))?;
                        write(&dir.join(file), value.trim())?;
                    }
                }
            }
        }
        self.update(path.to_str().unwrap_or_default(), resources)
    }

    /// Sets limits; what is `None` stays as it is.
    pub fn update(&self, path: &str, resources: &Resources) -> io::Result<()> {
        let path = checked(path)?;
        for h in &self.hierarchies {
            let dir = h.root.join(path);
            let settings = match h.v2 {
                true => v2_settings(resources),
                false => v1_settings(resources, &h.controllers),
            };
            for (file, value, required) in settings {
                match write(&dir.join(&*file), &value) {
                    Ok(()) => {}
                    // On a hybrid host v2 has no controllers, and so none of these files.
                    Err(e) if !required || (e.kind() == ErrorKind::NotFound && !self.is_v2()) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(())
    }

    /// Moves a process, by its id here, into the cgroup in every hierarchy.
    pub fn join(&self, path: &str, pid: i32) -> io::Result<()> {
        let path = checked(path)?;
        self.hierarchies
            .iter()
            .try_for_each(|h| write(&h.root.join(path).join("cgroup.procs"), &pid.to_string()))
    }

    /// Directories in which `cgroup.procs` takes a process in; for handing to another process.
    pub fn dirs(&self, path: &str) -> Vec<PathBuf> {
        self.hierarchies.iter().map(|h| h.root.join(path)).collect()
    }

    /// Of [`Cgroups::dirs`], those that a runtime which knows v1's controllers or v2 does not know: named v1
    /// hierarchies, and v2 beside v1.
    pub fn dirs_beside_controllers(&self, path: &str) -> Vec<PathBuf> {
        let beside = self.hierarchies.iter().filter(|h| h.controllers.is_empty() && !self.is_v2());
        beside.map(|h| h.root.join(path)).collect()
    }

    /// v1's device controller, when there is one.
    pub(crate) fn v1_devices_dir(&self, path: &str) -> Option<PathBuf> {
        self.controller("devices").map(|h| h.root.join(path))
    }

    /// v2's directory, when it is the only version.
    pub(crate) fn v2_dir(&self, path: &str) -> Option<PathBuf> {
        self.is_v2().then(|| self.hierarchies.first().map(|h| h.root.join(path))).flatten()
    }

    fn controller(&self, name: &str) -> Option<&Hierarchy> {
        self.hierarchies.iter().find(|h| h.controllers.iter().any(|c| c == name))
    }

    /// The directory and version that account for `controller`.
    fn accounting(&self, controller: &str, path: &str) -> Option<(PathBuf, bool)> {
        let h = self.controller(controller).or_else(|| self.hierarchies.iter().find(|h| h.v2))?;
        Some((h.root.join(path), h.v2))
    }

    /// Processes in the cgroup and below it.
    pub fn pids(&self, path: &str) -> Vec<i32> {
        let Some((dir, _)) = self.accounting("pids", path) else { return Vec::new() };
        let mut pids = Vec::new();
        walk(&dir, &mut |dir| {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(procs.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|p| *p > 0));
        });
        pids
    }

    /// SIGKILL to everything in the cgroup and below it.
    pub fn kill(&self, path: &str) {
        let Ok(path) = checked(path) else { return };
        for h in self.hierarchies.iter().filter(|h| h.v2) {
            let _ = write(&h.root.join(path).join("cgroup.kill"), "1");
        }
        for pid in self.pids(path.to_str().unwrap_or_default()) {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Kills what is in the cgroup, then removes it with everything below. No error when it is not there.
    /// Blocks until the processes are gone.
    #[expect(clippy::disallowed_methods, reason = "the shim, which has no tokio, runs this too")]
    pub fn remove(&self, path: &str) -> io::Result<()> {
        let path = checked(path)?;
        let text = path.to_str().unwrap_or_default();
        let deadline = Instant::now() + REMOVE_WAIT;
        let mut pause = Duration::from_micros(200);
        loop {
            match self.hierarchies.iter().try_for_each(|h| remove_tree(&h.root.join(path))) {
                Err(e) if e.raw_os_error() == Some(16) && Instant::now() < deadline => {
                    // EBUSY: a process is dying. The kernel offers nothing to wait on that both versions have.
                    self.kill(text);
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                done => return done,
            }
        }
    }

    /// Removes the cgroup when nothing is in it; `false` when something is.
    pub fn remove_if_empty(&self, path: &str) -> bool {
        let Ok(path) = checked(path) else { return false };
        self.hierarchies.iter().all(|h| match fs::remove_dir(h.root.join(path)) {
            Ok(()) => true,
            Err(e) => e.kind() == ErrorKind::NotFound,
        })
    }

    /// Names of the cgroups right below `path`.
    pub fn children(&self, path: &str) -> Vec<String> {
        let Some((dir, _)) = self.accounting("memory", path) else { return Vec::new() };
        let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
        entries
            .flatten()
            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
            .filter_map(|e| e.file_name().into_string().ok())
            .collect()
    }

    /// Processes the kernel killed in it for want of memory.
    pub fn oom_kills(&self, path: &str) -> u64 {
        match self.accounting("memory", path) {
            Some((dir, true)) => key(&dir.join("memory.events"), "oom_kill"),
            Some((dir, false)) => key(&dir.join("memory.oom_control"), "oom_kill"),
            None => 0,
        }
    }

    pub fn stats(&self, path: &str) -> io::Result<Stats> {
        let path = checked(path)?.to_str().unwrap_or_default();
        let mut stats = Stats::default();
        if let Some((dir, v2)) = self.accounting("cpuacct", path) {
            stats.cpu_ns = match v2 {
                true => key(&dir.join("cpu.stat"), "usage_usec") * 1000,
                false => number(&dir.join("cpuacct.usage")),
            };
        }
        if let Some((dir, v2)) = self.accounting("cpu", path) {
            let stat = Keys::read(&dir.join("cpu.stat"));
            stats.cpu_periods = stat.get("nr_periods");
            stats.cpu_throttled_periods = stat.get("nr_throttled");
            stats.cpu_throttled_ns = match v2 {
                true => stat.get("throttled_usec") * 1000,
                false => stat.get("throttled_time"),
            };
        }
        if let Some((dir, v2)) = self.accounting("memory", path) {
            fs::metadata(&dir).map_err(|e| named(e, &dir))?;
            let stat = Keys::read(&dir.join("memory.stat"));
            let [usage, limit] = match v2 {
                true => ["memory.current", "memory.max"],
                false => ["memory.usage_in_bytes", "memory.limit_in_bytes"],
            };
            let [inactive, rss, cache, faults, major] = match v2 {
                true => ["inactive_file", "anon", "file", "pgfault", "pgmajfault"],
                false => {
                    ["total_inactive_file", "total_rss", "total_cache", "total_pgfault", "total_pgmajfault"]
                }
            };
            stats.memory_usage = number(&dir.join(usage));
            stats.memory_working_set = stats.memory_usage.saturating_sub(stat.get(inactive));
            stats.memory_rss = stat.get(rss);
            stats.memory_cache = stat.get(cache);
            stats.page_faults = stat.get(faults);
            stats.major_page_faults = stat.get(major);
            // v2 says `max`, and v1 as many pages as fit into a signed number.
            stats.memory_limit = Some(number(&dir.join(limit))).filter(|l| *l < UNLIMITED).unwrap_or(0);
        }
        if let Some((dir, _)) = self.accounting("pids", path) {
            stats.pids = number(&dir.join("pids.current"));
        }
        Ok(stats)
    }
}

/// `(file, value, whether failing to write it is an error)`
type Setting = (std::borrow::Cow<'static, str>, String, bool);

fn v1_settings(r: &Resources, controllers: &[String]) -> Vec<Setting> {
    let mut out: Vec<Setting> = Vec::new();
    let has = |name: &str| controllers.iter().any(|c| c == name);
    if has("cpu") {
        // The period first: a quota is checked against it.
        out.extend(r.cpu_shares.map(|v| ("cpu.shares".into(), v.max(2).to_string(), true)));
        out.extend(r.cpu_period_us.map(|v| ("cpu.cfs_period_us".into(), v.to_string(), true)));
        out.extend(r.cpu_quota_us.map(|v| ("cpu.cfs_quota_us".into(), v.to_string(), true)));
    }
    if has("memory") {
        // The sum with swap may never be below the limit itself: going up it must rise first, going down it
        // must fall last. Not there when swap accounting is off.
        let swap = r.memory_limit.map(|v| ("memory.memsw.limit_in_bytes".into(), v.to_string(), false));
        out.extend(swap.clone());
        out.extend(r.memory_limit.map(|v| ("memory.limit_in_bytes".into(), v.to_string(), true)));
        out.extend(swap);
    }
    if has("pids") {
        out.extend(r.pids_limit.map(|v| ("pids.max".into(), max_or(v), true)));
    }
    if has("cpuset") {
        out.extend(cpuset(r));
    }
    if has("hugetlb") {
        for (size, v) in &r.hugepages {
            out.push((format!("hugetlb.{size}.limit_in_bytes").into(), v.to_string(), true));
            // What is reserved is limited apart from what is used, by kernels that can.
            out.push((format!("hugetlb.{size}.rsvd.limit_in_bytes").into(), v.to_string(), false));
        }
    }
    out
}

fn v2_settings(r: &Resources) -> Vec<Setting> {
    let mut out: Vec<Setting> = Vec::new();
    // The field's mapping of shares 2..262144 to weights 1..10000.
    let weight = |shares: u64| 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142;
    out.extend(r.cpu_shares.map(|v| ("cpu.weight".into(), weight(v).to_string(), true)));
    if r.cpu_quota_us.is_some() || r.cpu_period_us.is_some() {
        let quota = max_or(r.cpu_quota_us.unwrap_or(-1));
        out.push(("cpu.max".into(), format!("{quota} {}", r.cpu_period_us.unwrap_or(100_000)), true));
    }
    if let Some(limit) = r.memory_limit {
        out.push(("memory.max".into(), max_or(limit), true));
        out.push(("memory.swap.max".into(), if limit > 0 { "0".into() } else { "max".into() }, false));
    }
    out.extend(r.pids_limit.map(|v| ("pids.max".into(), max_or(v), true)));
    for (size, v) in &r.hugepages {
        out.push((format!("hugetlb.{size}.max").into(), v.to_string(), false));
        out.push((format!("hugetlb.{size}.rsvd.max").into(), v.to_string(), false));
    }
    if r.oom_group {
        out.push(("memory.oom.group".into(), "1".into(), false));
    }
    out.extend(cpuset(r));
    out
}

fn cpuset(r: &Resources) -> Vec<Setting> {
    [("cpuset.cpus", &r.cpuset_cpus), ("cpuset.mems", &r.cpuset_mems)]
        .into_iter()
        .filter(|(_, v)| !v.is_empty())
        .map(|(file, v)| (file.into(), v.clone(), true))
        .collect()
}

fn max_or(v: i64) -> String {
    if v > 0 { v.to_string() } else { "max".to_owned() }
}

/// Lets the children of a v2 cgroup have the controllers it has itself.
fn delegate(dir: &Path) -> io::Result<()> {
    let words = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let (available, enabled) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
    let missing: Vec<String> = V2_CONTROLLERS
        .iter()
        .filter(|c| available.split_whitespace().any(|a| a == **c))
        .filter(|c| !enabled.split_whitespace().any(|e| e == **c))
        .map(|c| format!("+{c}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    write(&dir.join("cgroup.subtree_control"), &missing.join(" "))
}

/// A relative path without `..`, and not the root itself.
fn checked(path: &str) -> io::Result<&Path> {
    let path = Path::new(path.trim_start_matches('/'));
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    if !plain || path.as_os_str().is_empty() {
        return Err(io::Error::new(ErrorKind::InvalidInput, format!("invalid cgroup path {path:?}")));
    }
    Ok(path)
}

fn write(file: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    let open = fs::OpenOptions::new().write(true).open(file);
    open.and_then(|mut f| f.write_all(value.as_bytes())).map_err(|e| named(e, file))
}

fn named(e: io::Error, path: &Path) -> io::Error {
    match e.raw_os_error() {
        // Keep the number: callers look for EBUSY.
        Some(16) => e,
        _ => io::Error::new(e.kind(), format!("{}: {e}", path.display())),
    }
}

fn number(file: &Path) -> u64 {
    fs::read_to_string(file).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

/// A file of `name value` lines.
struct Keys(String);

impl Keys {
    fn read(file: &Path) -> Keys {
        Keys(fs::read_to_string(file).unwrap_or_default())
    }

    fn get(&self, name: &str) -> u64 {
        let value = self.0.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|v| v.trim().parse().ok()).unwrap_or(0)
    }
}

/// The number after `name` in a file of `name value` lines.
fn key(file: &Path, name: &str) -> u64 {
    Keys::read(file).get(name)
}

fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    visit(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    // Nearly always there is nothing below, and listing a cgroup costs more than removing it.
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(named(e, dir)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
42 31 0:32 / /mnt/again rw,relatime - cgroup cgroup rw,memory
43 31 0:32 /a/b /mnt/part rw,relatime - cgroup cgroup rw,memory";

    #[test]
    fn finds_every_hierarchy_once() {
        let found = Cgroups::from_mountinfo(HYBRID);
        let roots: Vec<_> = found.hierarchies.iter().map(|h| h.root.to_str().unwrap()).collect();
        assert_eq!(
            roots,
            [
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/systemd",
                "/sys/fs/cgroup/unified"
            ]
        );
        assert_eq!(found.hierarchies[0].controllers, ["cpu", "cpuacct"]);
        assert!(!found.is_v2());
        let v2 = Cgroups::from_mountinfo("1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw");
        assert!(v2.is_v2());
    }

    /// A directory with the files the kernel would put into a cgroup.
    fn fake(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        for file in ["cgroup.controllers", "cgroup.subtree_control", "cgroup.procs", "cpu.weight", "cpu.max"]
        {
            fs::write(dir.join(file), "").unwrap();
        }
        for file in ["memory.max", "memory.swap.max", "pids.max", "cpuset.cpus", "cgroup.kill"] {
            fs::write(dir.join(file), "").unwrap();
        }
        for file in ["memory.oom.group", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
            fs::write(dir.join(file), "").unwrap();
        }
    }

    #[test]
    fn v2_limits_are_written_and_controllers_handed_down() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, pod) = (tmp.path(), tmp.path().join("m/pod1"));
        for dir in [root, &root.join("m"), &pod] {
            fake(dir);
        }
        fs::write(root.join("cgroup.controllers"), "cpu memory pids rdma\n").unwrap();
        fs::write(root.join("m/cgroup.controllers"), "cpu memory pids\n").unwrap();
        fs::write(root.join("m/cgroup.subtree_control"), "cpu\n").unwrap();
        let cgroups = Cgroups::fake_v2(root);
        let resources = Resources {
            cpu_shares: Some(1024),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            memory_limit: Some(64 << 20),
            pids_limit: Some(-1),
            hugepages: [("2MB".to_owned(), 4 << 20)].into(),
            oom_group: true,
            cpuset_cpus: "0-1".to_owned(),
            ..Default::default()
        };
        cgroups.create("/m/pod1", &resources).unwrap();
        let read = |p: &str| fs::read_to_string(root.join(p)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+cpu +memory +pids");
        // What is there stays: the kernel adds, a plain file is overwritten from its start.
        assert!(read("m/cgroup.subtree_control").starts_with("+memory +pids"));
        assert_eq!(read("m/pod1/cpu.weight"), "39");
        assert_eq!(read("m/pod1/cpu.max"), "50000 100000");
        assert_eq!(read("m/pod1/memory.max"), "67108864");
        assert_eq!(read("m/pod1/memory.swap.max"), "0");
        assert_eq!(read("m/pod1/pids.max"), "max");
        assert_eq!(
            (read("m/pod1/hugetlb.2MB.max"), read("m/pod1/memory.oom.group")),
            ("4194304".into(), "1".into())
        );
        assert_eq!(read("m/pod1/hugetlb.2MB.rsvd.max"), "4194304");
        assert_eq!(read("m/pod1/cpuset.cpus"), "0-1");
        // Lifted: what is limited no more says so.
        let lifted = Resources {
            cpu_shares: Some(2),
            cpu_quota_us: Some(-1),
            cpu_period_us: Some(100_000),
            memory_limit: Some(-1),
            pids_limit: Some(77),
            ..Default::default()
        };
        cgroups.update("m/pod1", &lifted).unwrap();
        let first = |p: &str| read(p).split_whitespace().next().unwrap_or_default().to_owned();
        // A plain file is overwritten from its start and keeps what is beyond.
        assert!(first("m/pod1/cpu.max").starts_with("max") && read("m/pod1/cpu.weight").starts_with('1'));
        assert!(first("m/pod1/memory.max").starts_with("max") && read("m/pod1/pids.max").starts_with("77"));
        assert!(read("m/pod1/memory.swap.max").starts_with("max"));
        cgroups.join("m/pod1", 42).unwrap();
        assert_eq!(read("m/pod1/cgroup.procs"), "42");
    }

    /// Settings may have changed since the cgroup of all pods was made.
    #[test]
    fn a_cgroup_that_is_there_gets_its_new_limits() {
        let tmp = tempfile::tempdir().unwrap();
        let pods = tmp.path().join("m/kubepods");
        for dir in [tmp.path(), &tmp.path().join("m"), &pods] {
            fake(dir);
        }
        let cgroups = Cgroups::fake_v2(tmp.path());
        let set = |memory: i64, pids: i64| {
            // The kernel replaces what a plain file would keep.
            fake(&pods);
            let (memory_limit, pids_limit) = (Some(memory), Some(pids));
            let limits = Resources { cpu_shares: Some(1945), memory_limit, pids_limit, ..Default::default() };
            cgroups.create("m/kubepods", &limits).unwrap();
            ["cpu.weight", "memory.max", "memory.swap.max", "pids.max"]
                .map(|file| fs::read_to_string(pods.join(file)).unwrap())
        };
        assert_eq!(set(3 << 30, 30_000), ["75", "3221225472", "0", "30000"]);
        assert_eq!(set(2 << 30, 29_000), ["75", "2147483648", "0", "29000"]);
        assert_eq!(set(-1, -1), ["75", "max", "max", "max"]);
    }

    #[test]
    fn v2_numbers_are_read() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("c");
        fs::create_dir_all(&dir).unwrap();
        let cpu = "usage_usec 1500\nuser_usec 7\nnr_periods 9\nnr_throttled 4\nthrottled_usec 3\n";
        fs::write(dir.join("cpu.stat"), cpu).unwrap();
        fs::write(dir.join("memory.max"), "max\n").unwrap();
        fs::write(dir.join("memory.current"), "5000\n").unwrap();
        fs::write(
            dir.join("memory.stat"),
            "anon 1000\nfile 2003\ninactive_file 2000\nactive_file 3\npgfault 8\npgmajfault 1\n",
        )
        .unwrap();
        fs::write(dir.join("memory.events"), "low 0\noom 3\noom_kill 2\noom_group_kill 9\n").unwrap();
        fs::write(dir.join("pids.current"), "7\n").unwrap();
        let cgroups = Cgroups::fake_v2(tmp.path());
        let want = Stats {
            cpu_ns: 1_500_000,
            memory_usage: 5000,
            memory_working_set: 3000,
            memory_rss: 1000,
            memory_cache: 2003,
            memory_limit: 0,
            page_faults: 8,
            major_page_faults: 1,
            pids: 7,
            cpu_periods: 9,
            cpu_throttled_periods: 4,
            cpu_throttled_ns: 3000,
        };
        assert_eq!(cgroups.stats("c").unwrap(), want);
        fs::write(dir.join("memory.max"), "67108864\n").unwrap();
        assert_eq!(cgroups.stats("c").unwrap().memory_limit, 64 << 20);
        assert_eq!(cgroups.oom_kills("c"), 2);
        assert!(cgroups.stats("gone").is_err());
    }

    /// Each controller of v1 has its own hierarchy, and beside them stands a v2 without any.
    #[test]
    fn numbers_of_a_hybrid_host_are_read_from_its_controllers() {
        let tmp = tempfile::tempdir().unwrap();
        let v1 = |root: &str, controllers: &[&str]| Hierarchy {
            root: tmp.path().join(root),
            controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
            v2: false,
        };
        let unified = Hierarchy { root: tmp.path().join("unified"), controllers: vec![], v2: true };
        let hierarchies =
            vec![v1("cpu", &["cpu", "cpuacct"]), v1("memory", &["memory"]), v1("pids", &["pids"]), unified];
        let cgroups = Cgroups { hierarchies };
        for (file, text) in [
            ("cpu/c/cpuacct.usage", "1500000\n"),
            ("cpu/c/cpu.stat", "nr_periods 9\nnr_throttled 4\nthrottled_time 3000\n"),
            ("memory/c/memory.usage_in_bytes", "5000\n"),
            ("memory/c/memory.limit_in_bytes", "9223372036854771712\n"),
            (
                "memory/c/memory.stat",
                "cache 1\nrss 2\ntotal_cache 2003\ntotal_rss 1000\ntotal_inactive_file 2000\n",
            ),
            ("pids/c/pids.current", "7\n"),
            ("unified/c/cgroup.procs", ""),
        ] {
            let path = tmp.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let want = Stats {
            cpu_ns: 1_500_000,
            memory_usage: 5000,
            memory_working_set: 3000,
            memory_rss: 1000,
            memory_cache: 2003,
            pids: 7,
            cpu_periods: 9,
            cpu_throttled_periods: 4,
            cpu_throttled_ns: 3000,
            ..Stats::default()
        };
        assert_eq!(cgroups.stats("c").unwrap(), want);
    }

    #[test]
    fn paths_stay_below_the_root() {
        let tmp = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::fake_v2(tmp.path());
        for path in ["", "/", "..", "a/../..", "../x"] {
            assert!(cgroups.create(path, &Resources::default()).is_err(), "{path:?}");
            assert!(cgroups.remove(path).is_err(), "{path:?}");
        }
    }
}
