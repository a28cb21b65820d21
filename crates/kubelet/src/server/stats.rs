//! `/stats/summary`: what the node, its pods and their containers use, in the shape of upstream's
//! stats/v1alpha1.
//!
//! Beside upstream's members a `cpu` has `usageWindowNanoSeconds`: the time that `usageNanoCores` is the
//! average of, without which nobody can tell how much it says.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use minke_runtime::DiskUse;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::Api;
use super::usage::{ContainerUse, PodUse, Reading, Use};
use crate::pod::Pod;

/// Walking files is slow, so what they take is kept for as long as upstream does.
const WALK_KEPT: Duration = Duration::from_secs(60);

/// What directories took when they were walked last.
#[derive(Default)]
pub struct Walks(Mutex<HashMap<PathBuf, (Instant, DiskUse)>>);

impl Walks {
    fn kept(&self, key: &Path) -> Option<DiskUse> {
        let mut walks = self.0.lock().expect("nothing panics while walks are looked up");
        walks.retain(|_, (at, _)| at.elapsed() < WALK_KEPT);
        walks.get(key).map(|(_, found)| *found)
    }

    fn keep(&self, key: PathBuf, found: DiskUse) -> DiskUse {
        let mut walks = self.0.lock().expect("nothing panics while walks are looked up");
        walks.insert(key, (Instant::now(), found));
        found
    }

    pub async fn of_container(&self, api: &Api, id: &str) -> Option<DiskUse> {
        let key = PathBuf::from(id);
        if let Some(found) = self.kept(&key) {
            return Some(found);
        }
        let found = api.context.runtime.container_disk_use(id).await.ok()?;
        Some(self.keep(key, found))
    }

    async fn of_dir(&self, dir: &Path) -> DiskUse {
        if let Some(found) = self.kept(dir) {
            return found;
        }
        let path = dir.to_owned();
        let walked = tokio::task::spawn_blocking(move || minke_runtime::disk_use(&path)).await;
        self.keep(dir.to_owned(), walked.unwrap_or_default())
    }

    async fn of_images(&self, api: &Api) -> DiskUse {
        let key = Path::new("images");
        if let Some(found) = self.kept(key) {
            return found;
        }
        let bytes = api.context.images.service.disk_usage().await.unwrap_or(0);
        self.keep(key.to_owned(), DiskUse { bytes, inodes: 0 })
    }
}

fn cpu(used: &Use) -> Value {
    let mut cpu = json!({"time": Time(used.at), "usageCoreNanoSeconds": used.stats.cpu_ns});
    if let Some(rate) = used.rate {
        cpu["usageNanoCores"] = rate.nano_cores.into();
        cpu["usageWindowNanoSeconds"] = u64::try_from(rate.window.as_nanos()).unwrap_or(u64::MAX).into();
    }
    cpu
}

fn memory(used: &Use, limit: u64) -> Value {
    let stats = &used.stats;
    let mut memory = json!({
        "time": Time(used.at), "usageBytes": stats.memory_usage, "workingSetBytes": stats.memory_working_set,
        "rssBytes": stats.memory_rss, "pageFaults": stats.page_faults, "majorPageFaults": stats.major_page_faults,
    });
    if limit > 0 {
        memory["availableBytes"] = limit.saturating_sub(stats.memory_working_set).into();
    }
    memory
}

/// The file system that `path` is on.
async fn file_system(path: &Path) -> Option<Value> {
    let path = path.to_owned();
    let stat = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&path)).await.ok()?.ok()?;
    Some(json!({
        "time": Time(Timestamp::now()),
        "availableBytes": stat.f_bavail * stat.f_frsize,
        "capacityBytes": stat.f_blocks * stat.f_frsize,
        "usedBytes": stat.f_blocks.saturating_sub(stat.f_bfree) * stat.f_frsize,
        "inodesFree": stat.f_ffree,
        "inodes": stat.f_files,
        "inodesUsed": stat.f_files.saturating_sub(stat.f_ffree),
    }))
}

/// A part of a file system, as much as `used` of it.
fn part(file_system: &Value, used: DiskUse) -> Value {
    let mut part = file_system.clone();
    part["usedBytes"] = used.bytes.into();
    match used.inodes {
        // Not counted.
        0 => drop(part.as_object_mut().and_then(|part| part.remove("inodesUsed"))),
        inodes => part["inodesUsed"] = inodes.into(),
    }
    part
}

/// Counts of one network interface, in the order of `/proc/net/dev`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// The interfaces in the text of a `/proc/PID/net/dev`, without loopback.
pub fn interfaces(text: &str) -> Vec<Interface> {
    let line = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = counts.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
        let count = |at: usize| counts.get(at).copied().unwrap_or(0);
        Some(Interface {
            name: name.trim().to_owned(),
            rx_bytes: count(0),
            rx_packets: count(1),
            rx_errors: count(2),
            rx_dropped: count(3),
            tx_bytes: count(8),
            tx_packets: count(9),
            tx_errors: count(10),
            tx_dropped: count(11),
        })
    };
    text.lines().skip(2).filter_map(line).filter(|interface| interface.name != "lo").collect()
}

/// The interfaces of a pod's own network; none when it uses the node's.
pub fn of_pod(api: &Api, pod: &PodUse) -> Vec<Interface> {
    if pod.spec.host_network {
        return vec![];
    }
    let namespace = api.context.runtime.sandbox_netns(&pod.spec.id).ok();
    // Beside a process's namespaces stands what it sees in them.
    let process = namespace.as_deref().and_then(|path| path.parent()?.parent());
    let text = process.and_then(|process| std::fs::read_to_string(process.join("net/dev")).ok());
    interfaces(&text.unwrap_or_default())
}

fn network(interfaces: &[Interface], default: &str) -> Value {
    let counts = |i: &Interface| json!({"name": i.name, "rxBytes": i.rx_bytes, "rxErrors": i.rx_errors, "txBytes": i.tx_bytes, "txErrors": i.tx_errors});
    let main = interfaces.iter().find(|i| i.name == default).or(interfaces.first());
    let mut network = main.map_or(json!({"name": ""}), counts);
    network["time"] = json!(Time(Timestamp::now()));
    network["interfaces"] = interfaces.iter().map(counts).collect();
    network
}

/// The interface of the default route in the text of `/proc/net/route`.
fn default_interface(routes: &str) -> &str {
    let mut lines = routes.lines().skip(1).map(|line| line.split_whitespace());
    lines
        .find_map(|mut words| {
            let name = words.next()?;
            (words.next()? == "00000000").then_some(name)
        })
        .unwrap_or_default()
}

/// The whole summary, or that of CPU and memory alone, which costs much less.
pub async fn summary(api: &Api, only_cpu_and_memory: bool) -> Value {
    let reading = api.meter.rates().await;
    let disk = match only_cpu_and_memory {
        true => None,
        false => file_system(&api.context.paths.data).await,
    };
    let mut pods = vec![];
    for pod in &reading.pods {
        pods.push(pod_stats(api, pod, disk.as_ref()).await);
    }
    json!({"node": node_stats(api, &reading, disk).await, "pods": pods})
}

async fn node_stats(api: &Api, reading: &Reading, disk: Option<Value>) -> Value {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let node = &reading.node;
    let mut systems = vec![];
    if let Some(all) = &reading.all_pods {
        let limit = reading.memory_total;
        systems.push(json!({"name": "pods", "cpu": cpu(all), "memory": memory(all, limit)}));
    }
    let mut stats = json!({
        "nodeName": api.context.node_name,
        "systemContainers": systems,
        "startTime": boot_time(&text("/proc/stat")).map(Time),
        "cpu": cpu(node),
        "memory": memory(node, reading.memory_total),
    });
    let Some(disk) = disk else { return stats };
    let routes = text("/proc/net/route");
    let main = default_interface(&routes);
    // Those of pods, and what else is made of nothing, are left out.
    let is_real = |name: &str| name == main || Path::new("/sys/class/net").join(name).join("device").exists();
    let mut interfaces = interfaces(&text("/proc/net/dev"));
    interfaces.retain(|interface| is_real(&interface.name));
    stats["network"] = network(&interfaces, main);
    let images = part(&disk, api.walks.of_images(api).await);
    stats["runtime"] = json!({"imageFs": images, "containerFs": disk});
    stats["fs"] = disk;
    // `0.20 0.18 0.12 1/80 11206`: the fourth is running and existing threads.
    let processes = text("/proc/loadavg");
    let existing =
        processes.split_whitespace().nth(3).and_then(|both| both.split_once('/')?.1.parse::<u64>().ok());
    let most: Option<u64> = text("/proc/sys/kernel/pid_max").trim().parse().ok();
    stats["rlimit"] = json!({"time": Time(node.at), "maxpid": most, "curproc": existing});
    stats
}

/// When the machine was started.
pub fn boot_time(stat: &str) -> Option<Timestamp> {
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    Timestamp::from_second(seconds.trim().parse().ok()?).ok()
}

async fn pod_stats(api: &Api, pod: &PodUse, disk: Option<&Value>) -> Value {
    let (mut containers, mut total) = (vec![], DiskUse::default());
    for container in &pod.containers {
        let (stats, used) = container_stats(api, container, disk).await;
        total = sum(total, used);
        containers.push(stats);
    }
    let spec = &pod.spec;
    let mut stats = json!({
        "podRef": {"name": spec.name, "namespace": spec.namespace, "uid": spec.uid},
        "startTime": Time(pod.created_at),
        "containers": containers,
        "cpu": cpu(&pod.used),
        "memory": memory(&pod.used, pod.used.stats.memory_limit),
        "process_stats": {"process_count": pod.used.stats.pids},
    });
    if let Some(disk) = disk {
        let volumes = volumes(api, pod, &mut total).await;
        stats["network"] = network(&of_pod(api, pod), "eth0");
        stats["volume"] = volumes.into();
        stats["ephemeral-storage"] = part(disk, total);
    }
    stats
}

fn sum(a: DiskUse, b: DiskUse) -> DiskUse {
    DiskUse { bytes: a.bytes + b.bytes, inodes: a.inodes + b.inodes }
}

/// A container's stats, and what it takes on the node's disk.
async fn container_stats(api: &Api, container: &ContainerUse, disk: Option<&Value>) -> (Value, DiskUse) {
    let (status, used) = (&container.status, &container.used);
    let mut stats = Map::from_iter([
        ("name".to_owned(), status.name.clone().into()),
        ("startTime".to_owned(), json!(status.started_at.map(Time))),
        ("cpu".to_owned(), cpu(used)),
        ("memory".to_owned(), memory(used, used.stats.memory_limit)),
    ]);
    let mut total = DiskUse::default();
    if let Some(disk) = disk {
        let written = api.walks.of_container(api, &status.id).await.unwrap_or_default();
        // The logs of all runs lie in one directory.
        let logs = match status.log_path.parent() {
            Some(dir) => api.walks.of_dir(dir).await,
            None => DiskUse::default(),
        };
        total = sum(written, logs);
        stats.insert("rootfs".to_owned(), part(disk, written));
        stats.insert("logs".to_owned(), part(disk, logs));
    }
    (stats.into(), total)
}

/// The volumes that have a directory of the pod's. What lies on the node's disk is added to `total`.
async fn volumes(api: &Api, pod: &PodUse, total: &mut DiskUse) -> Vec<Value> {
    let names = |dir: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let known = api.pods.get(&pod.spec.namespace, &pod.spec.name).and_then(Pod::new);
    let claims: BTreeMap<&str, &str> = known
        .iter()
        .flat_map(|pod| pod.spec().volumes.iter().flatten())
        .filter_map(|v| Some((v.name.as_str(), v.persistent_volume_claim.as_ref()?.claim_name.as_str())))
        .collect();
    let mut stats = vec![];
    for dir in names(&api.context.paths.volumes(&pod.spec.uid)).iter().flat_map(|plugin| names(plugin)) {
        let Some(name) = dir.file_name().and_then(|name| name.to_str()) else { continue };
        let Some(disk) = file_system(&dir).await else { continue };
        let used = api.walks.of_dir(&dir).await;
        let mut volume = part(&disk, used);
        volume["name"] = name.into();
        match claims.get(name) {
            Some(claim) => volume["pvcRef"] = json!({"name": claim, "namespace": pod.spec.namespace}),
            None => *total = sum(*total, used),
        }
        stats.push(volume);
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_interfaces_are_read() {
        let text = "Inter-|   Receive                |  Transmit\n face |bytes    packets errs drop\n\
                    \x20   lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    \x20 eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].rx_bytes, found[0].rx_dropped), (100, 4));
        assert_eq!((found[0].tx_bytes, found[0].tx_packets, found[0].tx_errors), (500, 6, 7));
        let network = network(&found, "eth0");
        assert_eq!((&network["name"], &network["rxBytes"]), (&json!("eth0"), &json!(100)));
        assert_eq!(network["interfaces"][0]["txErrors"], 7);
    }

    #[test]
    fn the_default_route_names_the_main_interface() {
        let routes = "Iface\tDestination\tGateway\neth1\t0010A8C0\t0\neth0\t00000000\t0100000A\n";
        assert_eq!(default_interface(routes), "eth0");
        assert_eq!(default_interface("Iface\n"), "");
    }

    #[test]
    fn a_part_of_a_disk_says_what_it_takes_of_it() {
        let disk = json!({"capacityBytes": 10, "usedBytes": 5, "inodesUsed": 3});
        let of = |bytes, inodes| part(&disk, DiskUse { bytes, inodes });
        assert_eq!(of(2, 1), json!({"capacityBytes": 10, "usedBytes": 2, "inodesUsed": 1}));
        assert_eq!(of(2, 0), json!({"capacityBytes": 10, "usedBytes": 2}));
    }
}
