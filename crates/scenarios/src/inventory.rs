//! What a node has of its pods, beside what it should have: processes, cgroups, mounts, links, files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1 as core;
use minke_cluster::DataDir;
use serde_json::Value;

/// A pod that the cluster has.
struct Known<'a> {
    pod: &'a core::Pod,
    uid: &'a str,
    /// It has processes: its phase is not final.
    active: bool,
}

impl Known<'_> {
    fn spec(&self) -> Option<&core::PodSpec> {
        self.pod.spec.as_ref()
    }

    fn host_network(&self) -> bool {
        self.spec().is_some_and(|spec| spec.host_network == Some(true))
    }

    /// Ids of the containers that run, as the cluster shows them.
    fn running(&self) -> impl Iterator<Item = &str> {
        let status = self.pod.status.iter();
        let lists = status.flat_map(|s| [&s.container_statuses, &s.init_container_statuses]);
        let running =
            lists.flatten().flatten().filter(|c| c.state.as_ref().is_some_and(|s| s.running.is_some()));
        running.filter_map(|c| c.container_id.as_deref()?.strip_prefix("minke://"))
    }
}

/// A sandbox that the node has written down.
pub struct Sandbox {
    pub id: String,
    pub uid: String,
    pub pid: i32,
    pub pause_pid: Option<i32>,
}

/// The sandboxes of a data directory, living or not.
pub fn sandboxes(data: &DataDir) -> Vec<Sandbox> {
    let names = names(&data.join("shims"));
    let records = names.iter().filter_map(|id| {
        let text = fs::read(data.join("shims").join(id).join("sandbox.json")).ok()?;
        let record: Value = serde_json::from_slice(&text).ok()?;
        Some(Sandbox {
            id: id.clone(),
            uid: record["spec"]["uid"].as_str()?.to_owned(),
            pid: i32::try_from(record["pid"].as_i64()?).ok()?,
            pause_pid: record["pause_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()),
        })
    });
    records.collect()
}

/// The processes in the cluster's cgroups that still run: number, cgroup below the cluster's, command line.
pub fn processes(data: &DataDir) -> Vec<(i32, String, String)> {
    let inside = format!(":/{}/", data.cgroup());
    let dir = data.path().to_string_lossy().into_owned();
    let mut found = Vec::new();
    for name in names(Path::new("/proc")) {
        let Ok(pid) = name.parse::<i32>() else { continue };
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        // One that has ended and is not waited for has no command line, and holds nothing.
        if line.is_empty() {
            continue;
        }
        let cgroups = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let within: BTreeSet<&str> =
            cgroups.lines().filter_map(|l| l.split_once(&inside).map(|(_, path)| path)).collect();
        let all = cgroups.lines().count();
        let joined = cgroups.lines().filter(|l| l.contains(&inside)).count();
        if !within.is_empty() && joined == all && within.len() == 1 {
            found.extend(within.into_iter().map(|path| (pid, path.to_owned(), line.clone())));
        } else if !within.is_empty() || (line.starts_with("minke-") && line.contains(&dir)) {
            found.push((pid, format!("several cgroups: {}", cgroups.replace('\n', " ")), line));
        }
    }
    found
}

/// Says what is missing and what is left, for the cluster's `pods`. `snapshots` are the layers there should be.
pub fn differences(data: &DataDir, pods: &[&core::Pod], snapshots: &BTreeSet<String>) -> Result<Vec<String>> {
    let known: Vec<Known<'_>> = (pods.iter())
        .map(|pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            let active = !matches!(phase, Some("Succeeded" | "Failed"));
            Known { pod, uid: pod.metadata.uid.as_deref().unwrap_or_default(), active }
        })
        .collect();
    let sandboxes = sandboxes(data);
    let mut report = Report::default();
    let current = check_processes(data, &known, &sandboxes, &mut report);
    check_cgroups(data, &known, &mut report)?;
    check_mounts(data, &known, &mut report)?;
    check_links(data, &known, &current, &mut report);
    check_files(data, &known, &sandboxes, &mut report);
    report.same("snapshot", snapshots, &names(&data.join("snapshots")));
    Ok(report.0)
}

#[derive(Default)]
struct Report(Vec<String>);

impl Report {
    fn same(&mut self, what: &str, wanted: &BTreeSet<String>, found: &BTreeSet<String>) {
        self.0.extend(wanted.difference(found).map(|name| format!("{what} {name} is missing")));
        self.0.extend(found.difference(wanted).map(|name| format!("{what} {name} is left")));
    }

    /// As [`Report::same`], but what is wanted need not be there.
    fn within(&mut self, what: &str, allowed: &BTreeSet<String>, found: &BTreeSet<String>) {
        self.0.extend(found.difference(allowed).map(|name| format!("{what} {name} is left")));
    }
}

/// The names in a directory.
pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Returns the sandboxes that live, by pod.
fn check_processes<'a>(
    data: &DataDir,
    known: &[Known<'a>],
    sandboxes: &[Sandbox],
    report: &mut Report,
) -> BTreeMap<&'a str, String> {
    let (mut shims, mut pauses, mut in_containers) = (BTreeSet::new(), 0, BTreeSet::new());
    for (pid, cgroup, line) in processes(data) {
        let mut words = line.split(' ');
        match (cgroup.as_str(), words.next()) {
            ("shims", Some("minke-shim")) => drop(shims.insert(words.nth(1).unwrap_or_default().to_owned())),
            ("shims", Some("minke-pause")) => pauses += 1,
            (pod, _) if pod.contains("/pod") => {
                in_containers.insert(pod.rsplit('/').next().unwrap_or_default().to_owned());
            }
            _ => report.0.push(format!("process {pid} in {cgroup} is left: {line}")),
        }
    }
    let mut current = BTreeMap::new();
    let mut wanted_pauses = 0;
    for pod in known.iter().filter(|pod| pod.active) {
        let own: Vec<&Sandbox> =
            sandboxes.iter().filter(|s| s.uid == pod.uid && shims.contains(&s.id)).collect();
        if let [only] = own[..] {
            current.insert(pod.uid, only.id.clone());
        } else {
            let name = pod.pod.metadata.name.as_deref().unwrap_or_default();
            report.0.push(format!("pod {name} ({}) has {} shims", pod.uid, own.len()));
        }
        wanted_pauses +=
            usize::from(pod.spec().is_some_and(|spec| spec.share_process_namespace == Some(true)));
    }
    report.within("shim", &current.values().cloned().collect(), &shims);
    if pauses != wanted_pauses {
        report.0.push(format!("{pauses} pause processes instead of {wanted_pauses}"));
    }
    let running = known.iter().filter(|pod| pod.active).flat_map(|pod| pod.running()).map(str::to_owned);
    report.same("processes of container", &running.collect(), &in_containers);
    current
}

fn check_cgroups(data: &DataDir, known: &[Known<'_>], report: &mut Report) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let mut wanted = BTreeSet::new();
    for pod in known.iter().filter(|pod| pod.active) {
        wanted.insert(format!("pod{}", pod.uid));
        wanted.extend(pod.running().map(|id| format!("pod{}/{id}", pod.uid)));
    }
    for line in mounts.lines().filter(|line| line.contains(" - cgroup")) {
        let root = Path::new(line.split(' ').nth(4).unwrap_or_default());
        let own = root.join(data.cgroup());
        let mut found = BTreeSet::new();
        below(&own, &mut |dir| {
            let path =
                dir.strip_prefix(&own).map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
            // Whatever class of pods it is in.
            match path.find("/pod").filter(|_| path.starts_with("kubepods/")) {
                Some(at) => drop(found.insert(path[at + 1..].to_owned())),
                None if ["", "shims", "kubepods", "kubepods/burstable", "kubepods/besteffort"]
                    .contains(&path.as_str()) => {}
                None => drop(found.insert(path)),
            }
        });
        report.same(&format!("cgroup in {}:", root.display()), &wanted, &found);
    }
    Ok(())
}

fn below(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    visit(dir);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), visit);
        }
    }
}

fn check_mounts(data: &DataDir, known: &[Known<'_>], report: &mut Report) -> Result<()> {
    let pods = data.join("pods");
    let mut wanted = BTreeSet::from([pods.display().to_string()]);
    for pod in known.iter().filter(|pod| pod.active) {
        let Some(spec) = pod.spec() else { continue };
        let own = pods.join(pod.uid);
        let volumes = own.join("volumes");
        let mut add = |path: PathBuf| wanted.insert(path.display().to_string());
        for volume in spec.volumes.iter().flatten() {
            let in_memory = match volume {
                core::Volume { secret: Some(_), .. } => "kubernetes.io~secret",
                core::Volume { projected: Some(_), .. } => "kubernetes.io~projected",
                core::Volume { downward_api: Some(_), .. } => "kubernetes.io~downward-api",
                core::Volume { empty_dir: Some(empty), .. } if empty.medium.as_deref() == Some("Memory") => {
                    "kubernetes.io~empty-dir"
                }
                _ => continue,
            };
            add(volumes.join(in_memory).join(&volume.name));
        }
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
                if mount.sub_path.as_deref().is_some_and(|sub| !sub.is_empty()) {
                    let volume = own.join("volume-subpaths").join(&mount.name);
                    add(volume.join(&container.name).join(index.to_string()));
                }
            }
        }
    }
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let mut found = BTreeSet::new();
    for point in table.lines().filter_map(|line| line.split(' ').nth(4)) {
        if Path::new(point).starts_with(data.path()) && !found.insert(point.to_owned()) {
            report.0.push(format!("mount {point} is there twice"));
        }
    }
    report.same("mount", &wanted, &found);
    Ok(())
}

fn check_links(data: &DataDir, known: &[Known<'_>], current: &BTreeMap<&str, String>, report: &mut Report) {
    let id = data.id();
    let mut wanted = BTreeSet::from([id.node_link(), format!("{}-void", id.link_prefix())]);
    let networked = known.iter().filter(|pod| pod.active && !pod.host_network());
    wanted.extend(networked.filter_map(|pod| Some(id.pod_link(current.get(pod.uid)?))));
    let mut found = names(Path::new("/sys/class/net"));
    found.retain(|name| name.starts_with(&id.link_prefix()));
    report.same("link", &wanted, &found);
}

fn check_files(data: &DataDir, known: &[Known<'_>], sandboxes: &[Sandbox], report: &mut Report) {
    let uids: BTreeSet<String> = known.iter().map(|pod| pod.uid.to_owned()).collect();
    report.within("directory of pod", &uids, &names(&data.join("pods")));
    let written: BTreeSet<String> = sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
    report.same("record of sandbox", &written, &names(&data.join("shims")));
    let of_pods = sandboxes.iter().map(|sandbox| sandbox.uid.clone()).collect();
    report.within("sandbox of pod", &uids, &of_pods);
    let mut generations: BTreeMap<(String, String), usize> = BTreeMap::new();
    for id in names(&data.join("containers")) {
        let text = fs::read(data.join("containers").join(&id).join("container.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&text).unwrap_or_default();
        let sandbox = record["sandbox_id"].as_str().unwrap_or_default();
        match sandboxes.iter().find(|known| known.id == sandbox) {
            None => report.0.push(format!("files of container {id} (sandbox {sandbox:?}) are left")),
            Some(sandbox) => {
                let name = record["spec"]["name"].as_str().unwrap_or_default().to_owned();
                *generations.entry((sandbox.uid.clone(), name)).or_default() += 1;
            }
        }
    }
    let many = generations.into_iter().filter(|(_, count)| *count > 2);
    report.0.extend(many.map(|((uid, name), count)| format!("pod {uid} keeps {count} containers {name}")));
    let logs = known.iter().map(|pod| {
        let metadata = &pod.pod.metadata;
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{}_{}_{}", part(&metadata.namespace), part(&metadata.name), pod.uid)
    });
    report.within("logs", &logs.collect(), &names(&data.join("logs").join("pods")));
}
