//! What the machine has and is: read from the kernel, told in the node's status.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use minke_api::Quantity;
use minke_api::quantity::Format;
use minke_runtime::Resources;

use crate::eviction::Signal;
use crate::resources;
use crate::settings::Settings;

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
    /// Processes and threads that there can be.
    pub pids: u64,
    pub os_image: String,
    pub kernel: String,
    pub machine_id: String,
    pub boot_id: String,
    pub system_uuid: String,
}

impl Machine {
    /// Reads what this machine is. Blocking, but only briefly.
    pub fn read(data_dir: &Path, pods: u32, settings: &Settings) -> Machine {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let machine_id = text("/etc/machine-id").trim().to_owned();
        let uuid = text("/sys/class/dmi/id/product_uuid").trim().to_owned();
        let storage = rustix::fs::statvfs(data_dir).map_or(0, |stat| stat.f_blocks * stat.f_frsize);
        let cpus = cpu_list(&text("/sys/devices/system/cpu/online"));
        let parallelism = || std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let cpus = cpus.unwrap_or_else(parallelism);
        let by_cpus = match settings.pods_per_core {
            0 => u32::MAX,
            each => each.saturating_mul(u32::try_from(cpus).unwrap_or(u32::MAX)),
        };
        Machine {
            cpus,
            memory: meminfo(&text("/proc/meminfo"), "MemTotal"),
            storage,
            huge_pages: huge_pages(),
            pods: pods.min(settings.pods_max.unwrap_or(u32::MAX)).min(by_cpus),
            pids: pids_max(),
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

    /// What pods may use: the capacity without what is set aside, what must be left before pods are ended, and huge
    /// pages' memory.
    pub fn allocatable(&self, settings: &Settings) -> BTreeMap<String, Quantity> {
        let mut all = self.capacity();
        let less = |total: u64, name: &str, kept: u64| {
            let reserved = u64::try_from(settings.reserved(name)).unwrap_or(0);
            i64::try_from(total.saturating_sub(reserved).saturating_sub(kept)).unwrap_or(i64::MAX)
        };
        let kept = |signal, total| settings.eviction.kept(signal, total);
        let cpu = less(self.cpus.saturating_mul(1000), "cpu", 0);
        all.insert("cpu".to_owned(), Quantity::from_milli(cpu, Format::DecimalSi));
        let huge: u64 = self.huge_pages.values().sum();
        let memory = less(self.memory, "memory", kept(Signal::Memory, self.memory).saturating_add(huge));
        all.insert("memory".to_owned(), Quantity::bytes(memory / 1024 * 1024));
        let storage = less(self.storage, "ephemeral-storage", kept(Signal::NodeFs, self.storage));
        all.insert("ephemeral-storage".to_owned(), Quantity::new(storage, Format::DecimalSi));
        all
    }

    /// What all pods together are held to: the capacity without what is set aside. Nothing, when they are not held to
    /// anything. In what can be lifted, nothing is said as such, so that it lifts an older limit.
    pub fn of_pods(&self, settings: &Settings) -> Resources {
        let share = |total: u64, name: &str| {
            let total = i64::try_from(total).unwrap_or(i64::MAX);
            total.saturating_sub(settings.reserved(name)).max(1)
        };
        let cpu = share(self.cpus.saturating_mul(1000), "cpu");
        let cpu_shares = Some(resources::shares(cpu));
        if !settings.hold_pods {
            return Resources {
                cpu_shares,
                memory_limit: Some(-1),
                pids_limit: Some(-1),
                ..Resources::default()
            };
        }
        Resources {
            cpu_shares,
            memory_limit: Some(share(self.memory / 1024 * 1024, "memory")),
            pids_limit: Some(share(self.pids, "pid")),
            ..Resources::default()
        }
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

/// Processes and threads that the kernel has room for.
pub fn pids_max() -> u64 {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
    let all = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")];
    all.into_iter().flatten().min().unwrap_or(0)
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

    const MACHINE: Machine = Machine {
        cpus: 2,
        memory: 4 << 30,
        storage: 1000 << 30,
        huge_pages: BTreeMap::new(),
        pods: 110,
        pids: 1000,
        os_image: String::new(),
        kernel: String::new(),
        machine_id: String::new(),
        boot_id: String::new(),
        system_uuid: String::new(),
    };

    #[track_caller]
    fn check(settings: &Settings, cpu: &str, memory: &str, storage: u64, held: (Option<u64>, i64, i64)) {
        let allocatable = MACHINE.allocatable(settings);
        let text = |name: &str| allocatable[name].to_string();
        assert_eq!((text("cpu").as_str(), text("memory").as_str()), (cpu, memory));
        assert_eq!(text("ephemeral-storage"), storage.to_string());
        let limits = MACHINE.of_pods(settings);
        let got = (limits.cpu_shares, limits.memory_limit.unwrap_or(0), limits.pids_limit.unwrap_or(0));
        assert_eq!(got, held);
    }

    #[test]
    fn something_is_kept_back_from_pods() {
        assert_eq!(MACHINE.capacity()["memory"].to_string(), "4Gi");
        let mut settings = Settings::new(Path::new("/d"));
        let left = (1000 << 30) - (1 << 30);
        check(&settings, "2", "3996Mi", left, (Some(2048), 4 << 30, 1000));
        let quantity = |text: &str| Quantity::parse(text).expect("a quantity");
        settings.kube_reserved =
            [("cpu".to_owned(), quantity("500m")), ("memory".to_owned(), quantity("1Gi"))].into();
        settings.system_reserved = [("memory", "1Gi"), ("pid", "100"), ("ephemeral-storage", "9Gi")]
            .map(|(name, text)| (name.to_owned(), quantity(text)))
            .into();
        check(&settings, "1500m", "1948Mi", left - (9 << 30), (Some(1536), 2 << 30, 900));
        settings.hold_pods = false;
        check(&settings, "1500m", "1948Mi", left - (9 << 30), (Some(1536), -1, -1));
        settings.system_reserved.insert("memory".to_owned(), quantity("1Ti"));
        assert_eq!(MACHINE.allocatable(&settings)["memory"].to_string(), "0", "never less than nothing");
    }
}
