//! What the machine has and is: read from the kernel, told in the node's status.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use minke_api::Quantity;

/// Upstream's hard eviction thresholds, which are kept back from pods.
const MEMORY_KEPT: u64 = 100 << 20;
const STORAGE_KEPT_PERCENT: u64 = 10;

#[derive(Debug, Clone, Default)]
pub struct Machine {
    pub cpus: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes of the file system that holds the data directory.
    pub storage: u64,
    /// Bytes by page size in KiB.
    pub huge_pages: BTreeMap<u64, u64>,
    /// Pods that it takes at most.
    pub pods: u32,
    pub os_image: String,
    pub kernel: String,
    pub machine_id: String,
    pub boot_id: String,
    pub system_uuid: String,
}

impl Machine {
    /// Reads what this machine is. Blocking, but only briefly.
    pub fn read(data_dir: &Path, pods: u32) -> Machine {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let machine_id = text("/etc/machine-id").trim().to_owned();
        let uuid = text("/sys/class/dmi/id/product_uuid").trim().to_owned();
        let storage = rustix::fs::statvfs(data_dir).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
        let cpus = cpu_list(&text("/sys/devices/system/cpu/online"));
        let parallelism = || std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        Machine {
            cpus: cpus.unwrap_or_else(parallelism),
            memory: meminfo(&text("/proc/meminfo"), "MemTotal"),
            storage,
            huge_pages: huge_pages(),
            pods,
            os_image: os_image(&text("/etc/os-release")),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid },
            machine_id,
            boot_id: text("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        }
    }

    pub fn capacity(&self) -> BTreeMap<String, Quantity> {
        let bytes = |bytes: u64| Quantity::bytes(i64::try_from(bytes).unwrap_or(i64::MAX));
        let count = |n: u64| {
            Quantity::new(i64::try_from(n).unwrap_or(i64::MAX), minke_api::quantity::Format::DecimalSi)
        };
        let mut all = BTreeMap::from([
            ("cpu".to_owned(), count(self.cpus)),
            // Whole KiB, as upstream prints it.
            ("memory".to_owned(), bytes(self.memory / 1024 * 1024)),
            ("ephemeral-storage".to_owned(), bytes(self.storage / 1024 * 1024)),
            ("pods".to_owned(), count(self.pods.into())),
        ]);
        for (kib, total) in &self.huge_pages {
            all.insert(format!("hugepages-{}", bytes(kib * 1024)), bytes(*total));
        }
        all
    }

    /// What pods may use: the capacity without what is kept back, and without huge pages' memory.
    pub fn allocatable(&self) -> BTreeMap<String, Quantity> {
        let mut all = self.capacity();
        let huge: u64 = self.huge_pages.values().sum();
        let memory = self.memory.saturating_sub(MEMORY_KEPT).saturating_sub(huge) / 1024 * 1024;
        all.insert("memory".to_owned(), Quantity::bytes(i64::try_from(memory).unwrap_or(i64::MAX)));
        let storage = self.storage - self.storage / 100 * STORAGE_KEPT_PERCENT;
        let storage = i64::try_from(storage).unwrap_or(i64::MAX);
        all.insert(
            "ephemeral-storage".to_owned(),
            Quantity::new(storage, minke_api::quantity::Format::DecimalSi),
        );
        all
    }

    pub fn node_info(&self, version: &str, runtime: String) -> core::NodeSystemInfo {
        core::NodeSystemInfo {
            architecture: architecture().to_owned(),
            boot_id: self.boot_id.clone(),
            container_runtime_version: runtime,
            kernel_version: self.kernel.clone(),
            // Deprecated upstream, and empty there.
            kube_proxy_version: String::new(),
            kubelet_version: version.to_owned(),
            machine_id: self.machine_id.clone(),
            operating_system: "linux".to_owned(),
            os_image: self.os_image.clone(),
            system_uuid: self.system_uuid.clone(),
            ..core::NodeSystemInfo::default()
        }
    }
}

/// The architecture in Go's words.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub fn quantities(all: &BTreeMap<String, Quantity>) -> BTreeMap<String, ApiQuantity> {
    all.iter().map(|(name, quantity)| (name.clone(), (*quantity).into())).collect()
}

/// How many CPUs a list like `0-3,6` names.
fn cpu_list(text: &str) -> Option<u64> {
    let mut count = 0;
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        count += last.checked_sub(first)? + 1;
    }
    Some(count)
}

/// Bytes of a line of `/proc/meminfo`.
pub fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: u64 = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0);
    kib * 1024
}

fn os_image(release: &str) -> String {
    let line = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.unwrap_or_default().trim_matches('"').to_owned()
}

fn huge_pages() -> BTreeMap<u64, u64> {
    let mut sizes = BTreeMap::new();
    for entry in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kib =
            name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB")?.parse::<u64>().ok());
        let count = fs::read_to_string(entry.path().join("nr_hugepages")).ok();
        let count = count.and_then(|text| text.trim().parse::<u64>().ok());
        if let (Some(kib), Some(count)) = (kib, count) {
            sizes.insert(kib, kib * 1024 * count);
        }
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read() {
        assert_eq!(cpu_list("0-3,6\n"), Some(5));
        assert_eq!(cpu_list("0"), Some(1));
        assert_eq!(cpu_list("3-1"), None);
        assert_eq!(cpu_list(""), None);
        assert_eq!(meminfo("MemTotal:  100 kB\nMemFree: 5 kB\n", "MemTotal"), 102_400);
        assert_eq!(os_image("A=1\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
    }

    #[test]
    fn something_is_kept_back_from_pods() {
        let machine = Machine { cpus: 2, memory: 1 << 30, storage: 1000 << 20, ..Machine::default() };
        let text = |all: BTreeMap<String, Quantity>, name: &str| all[name].to_string();
        assert_eq!(text(machine.capacity(), "memory"), "1Gi");
        assert_eq!(text(machine.allocatable(), "memory"), "924Mi");
        assert_eq!(text(machine.allocatable(), "cpu"), "2");
        assert_eq!(text(machine.allocatable(), "ephemeral-storage"), "943718400");
    }
}
