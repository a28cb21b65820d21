//! What can be set of a kubelet, as `kubelet.yaml` in its data directory says: upstream's
//! `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1), of which the fields taken here are in force.

mod file;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use minke_api::time::parse_go_duration;
use serde::Deserialize;

use crate::eviction::{Limits, Statements};
use file::File;

/// Most bytes of the file.
const SIZE_MAX: u64 = 1 << 20;
/// As upstream: every look lists all containers.
const LOG_LOOK_EVERY_MIN: Duration = Duration::from_secs(3);
/// What can be set aside.
const RESERVABLE: [&str; 4] = ["cpu", "memory", "ephemeral-storage", "pid"];

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// When pods are ended for want of memory, disk or processes.
    pub eviction: Limits,
    /// What is not for pods, by name.
    pub kube_reserved: BTreeMap<String, Quantity>,
    pub system_reserved: BTreeMap<String, Quantity>,
    /// Whether the pods together are held to what is theirs.
    pub hold_pods: bool,
    /// Pods at most, where it is less than there are addresses for.
    pub pods_max: Option<u32>,
    pub pods_per_core: u32,
    /// Processes and threads of one pod.
    pub pod_pids: Option<i64>,
    /// Names, or beginnings of names that end in `*`.
    pub unsafe_sysctls: Vec<String>,
    /// Bytes of one file of a container's log.
    pub log_size_max: u64,
    pub log_files_max: usize,
    /// How often logs are looked at for being too long.
    pub log_look_every: Duration,
    /// Images that are pulled at the same time; without one only their layers have a limit.
    pub pulls_max: Option<usize>,
    /// How many pulls may begin; as many as are asked for without it.
    pub pull_rate: Option<PullRate>,
    /// When images go that nobody uses.
    pub images: ImageLimits,
    /// Longest wait before a container that ended runs again; upstream's five minutes when there is none.
    pub restart_wait_max: Option<SignedDuration>,
    /// Where static pods are described.
    pub manifests: PathBuf,
    /// Instead of the cluster's own, when they are set.
    pub dns_servers: Option<Vec<IpAddr>>,
    pub dns_domain: Option<String>,
    /// The node's own resolver; empty is none.
    pub resolv_conf: PathBuf,
    /// How often the node's status is worked out, and how often it is told though it is the same.
    pub status_every: Duration,
    pub report_every: Duration,
    pub lease_seconds: i32,
    /// Images that the status tells of; all of them without a number.
    pub images_told: Option<usize>,
    /// Instead of what the agent was started with.
    pub seccomp_default: Option<bool>,
    /// What the node is tainted with when it is registered.
    pub taints: Vec<core::Taint>,
    /// Fields of the file that change nothing here.
    pub idle: Vec<String>,
}

/// Tokens of a bucket: how many come back in a second, and how many there can be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PullRate {
    pub per_second: u32,
    pub burst: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ImageLimits {
    /// From so many percent of the disk on images go, down to so many.
    pub high_percent: u64,
    pub low_percent: u64,
    /// What is newer stays.
    pub age_min: Duration,
    /// What was not used for longer goes, however much room there is.
    pub age_max: Option<Duration>,
}

impl Default for ImageLimits {
    fn default() -> ImageLimits {
        let age_min = Duration::from_secs(120);
        ImageLimits { high_percent: 85, low_percent: 80, age_min, age_max: None }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
struct CrashLoopBackOff {
    max_container_restart_period: Option<String>,
}

impl Settings {
    /// The defaults, for a node with this data directory.
    pub fn new(data: &Path) -> Settings {
        let disk = rustix::fs::statvfs(data).map_or(u64::MAX, |stat| stat.f_blocks * stat.f_frsize);
        let mut eviction = Limits::on(disk);
        eviction.watch_allocatable();
        Settings {
            eviction,
            kube_reserved: BTreeMap::new(),
            system_reserved: BTreeMap::new(),
            hold_pods: true,
            pods_max: None,
            pods_per_core: 0,
            pod_pids: None,
            unsafe_sysctls: vec![],
            log_size_max: 10 << 20,
            log_files_max: 5,
            log_look_every: Duration::from_secs(10),
            pulls_max: None,
            pull_rate: None,
            images: ImageLimits::default(),
            restart_wait_max: None,
            manifests: data.join("manifests"),
            dns_servers: None,
            dns_domain: None,
            resolv_conf: "/etc/resolv.conf".into(),
            status_every: Duration::from_secs(10),
            report_every: Duration::from_secs(300),
            lease_seconds: 40,
            images_told: Some(50),
            seccomp_default: None,
            taints: vec![],
            idle: vec![],
        }
    }

    /// Reads `kubelet.yaml`; without one, the defaults. The error names the file and what is wrong with it.
    pub fn read(data: &Path) -> Result<Settings, String> {
        let path = data.join("kubelet.yaml");
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Settings::new(data)),
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        let mut text = vec![];
        let read = file.take(SIZE_MAX).read_to_end(&mut text).map_err(|error| error.to_string());
        let parsed = read.and_then(|_| Settings::parse(&text, data));
        parsed.map_err(|why| format!("{}: {why}", path.display()))
    }

    fn parse(text: &[u8], data: &Path) -> Result<Settings, String> {
        let mut file = File::parse(text)?;
        let mut settings = Settings::new(data);
        settings.take_reserves(&mut file);
        settings.take_eviction(&mut file);
        settings.take_pods(&mut file);
        settings.take_images(&mut file);
        settings.take_logs(&mut file);
        settings.take_node(&mut file);
        if let Some(path) = file.take::<PathBuf>("staticPodPath").filter(|path| !path.as_os_str().is_empty())
        {
            settings.manifests = data.join(path);
        }
        settings.idle = file.finish()?;
        Ok(settings)
    }

    fn take_reserves(&mut self, file: &mut File) {
        for (field, reserved) in
            [("kubeReserved", &mut self.kube_reserved), ("systemReserved", &mut self.system_reserved)]
        {
            for (name, text) in file.take::<Statements>(field).unwrap_or_default() {
                if !RESERVABLE.contains(&name.as_str()) {
                    file.refuse(format!("{field}: cannot reserve {name:?} resource"));
                    continue;
                }
                match Quantity::parse(&text) {
                    Ok(amount) if amount.value() < 0 => {
                        file.refuse(format!(
                            "{field}: resource quantity for {name:?} cannot be negative: {text}"
                        ));
                    }
                    Ok(amount) => drop(reserved.insert(name, amount)),
                    Err(error) => {
                        file.refuse(format!(
                            "{field}: failed to parse quantity {text:?} for {name:?} resource: {error}"
                        ));
                    }
                }
            }
        }
        let Some(enforced) = file.take::<Vec<String>>("enforceNodeAllocatable") else { return };
        for (n, what) in enforced.iter().enumerate() {
            let field = "enforceNodeAllocatable (--enforce-node-allocatable)";
            match what.as_str() {
                _ if enforced[..n].contains(what) => {
                    file.check(false, || format!("duplicated enforcements {what:?} in {field}"));
                }
                "pods" | "" => {}
                "none" => file.check(enforced.len() == 1, || {
                    format!("{field} may not contain additional enforcements when {what:?} is specified")
                }),
                // There is no cgroup for these: Minke leaves those that it did not make alone.
                _ => file.check(false, || {
                    format!(
                        "option {what:?} specified for {field}. Valid options here are \"pods\" and \"none\""
                    )
                }),
            }
        }
        self.hold_pods = enforced.iter().any(|what| what == "pods");
    }

    fn take_eviction(&mut self, file: &mut File) {
        let mut limits = self.eviction.clone();
        let merged = file.take("mergeDefaultEvictionSettings").unwrap_or(false);
        if let Some(mut hard) = file.take::<Statements>("evictionHard") {
            for (signal, text) in limits.hard.into_iter().filter(|_| merged) {
                hard.entry(signal).or_insert(text);
            }
            limits.hard = hard;
        }
        limits.soft = file.take("evictionSoft").unwrap_or_default();
        limits.soft_grace = file.take("evictionSoftGracePeriod").unwrap_or_default();
        limits.minimum_reclaim = file.take("evictionMinimumReclaim").unwrap_or_default();
        if let Some(seconds) = file.number("evictionMaxPodGracePeriod", 0, i32::MAX.into()) {
            limits.pod_grace_max = seconds;
        }
        if let Some(period) = file.duration("evictionPressureTransitionPeriod") {
            limits.transition = period;
        }
        if let Err(why) = limits.resolve() {
            file.refuse(why);
        }
        if self.hold_pods {
            limits.watch_allocatable();
        }
        self.eviction = limits;
    }

    fn take_pods(&mut self, file: &mut File) {
        let most = i64::from(i32::MAX);
        let count = |n: i64| u32::try_from(n).ok().filter(|n| *n > 0);
        self.pods_max = file.number("maxPods", 0, most).and_then(count);
        self.pods_per_core = file.number("podsPerCore", 0, most).and_then(count).unwrap_or(0);
        self.pod_pids = file.take("podPidsLimit").filter(|limit| *limit > 0);
        self.unsafe_sysctls = file.take("allowedUnsafeSysctls").unwrap_or_default();
        for pattern in &self.unsafe_sysctls {
            let name = pattern.strip_suffix('*').unwrap_or(pattern);
            file.check(!name.is_empty() && !name.contains('*'), || {
                format!(
                    "allowedUnsafeSysctls: sysctl {pattern:?} is no name, nor the beginning of one and a *"
                )
            });
        }
        self.seccomp_default = file.take("seccompDefault");
        self.dns_domain = file.take("clusterDomain").filter(|domain: &String| !domain.is_empty());
        self.dns_servers = file.take("clusterDNS").filter(|servers: &Vec<IpAddr>| !servers.is_empty());
        if let Some(path) = file.take("resolvConf") {
            self.resolv_conf = path;
        }
        let backoff: CrashLoopBackOff = file.take("crashLoopBackOff").unwrap_or_default();
        if let Some(text) = backoff.max_container_restart_period {
            let most = parse_go_duration(&text).ok().and_then(|most| SignedDuration::try_from(most).ok());
            self.restart_wait_max = most.filter(|most| (1..=300).contains(&most.as_secs()));
            let fits = self.restart_wait_max.is_some();
            file.check(fits, || {
                format!(
                    "CrashLoopBackOff.MaxContainerRestartPeriod (got: {text}) must be set between 1s and 300s"
                )
            });
        }
    }

    fn take_images(&mut self, file: &mut File) {
        let percent = |file: &mut File, field| file.number(field, 0, 100).and_then(|n| u64::try_from(n).ok());
        let images = &mut self.images;
        images.high_percent = percent(file, "imageGCHighThresholdPercent").unwrap_or(images.high_percent);
        images.low_percent = percent(file, "imageGCLowThresholdPercent").unwrap_or(images.low_percent);
        let ImageLimits { high_percent: high, low_percent: low, .. } = *images;
        file.check(low < high, || {
            format!(
                "imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than \
                 imageGCHighThresholdPercent (--image-gc-high-threshold) {high}"
            )
        });
        images.age_min = file.duration("imageMinimumGCAge").unwrap_or(images.age_min);
        images.age_max = file.duration("imageMaximumGCAge");
        let (least, most) = (images.age_min, images.age_max);
        file.check(most.is_none_or(|most| most > least), || {
            let shown = |age| crate::pod::go_duration(age);
            let (most, least) = (shown(most.unwrap_or_default()), shown(least));
            format!("imageMaximumGCAge {{{most}}} must be greater than imageMinimumGCAge {{{least}}}")
        });
        let one_by_one: Option<bool> = file.take("serializeImagePulls");
        self.pulls_max = match (one_by_one, file.take("maxParallelImagePulls")) {
            (_, Some(0)) => {
                file.check(false, || "maxParallelImagePulls 0 must be a positive number".to_owned());
                None
            }
            (Some(true), Some(2..)) => {
                file.check(false, || {
                    "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls \
                     (--serialize-image-pulls) is set to false"
                        .to_owned()
                });
                None
            }
            (Some(true), _) => Some(1),
            (_, most) => most,
        };
        let most = i64::from(i32::MAX);
        let rate = file.number("registryPullQPS", 0, most).and_then(|n| u32::try_from(n).ok());
        let burst = file.number("registryBurst", 0, most).and_then(|n| u32::try_from(n).ok());
        // Upstream's number when only the other one is set; no pulls a second are no limit.
        let rate = rate.or(burst.map(|_| 5)).filter(|rate| *rate > 0);
        let burst = burst.filter(|burst| *burst > 0).unwrap_or(10);
        self.pull_rate = rate.map(|per_second| PullRate { per_second, burst });
    }

    fn take_logs(&mut self, file: &mut File) {
        if let Some(size) = file.take::<String>("containerLogMaxSize").filter(|size| !size.is_empty()) {
            let bytes = Quantity::parse(&size).ok().and_then(|size| u64::try_from(size.value()).ok());
            file.check(bytes.is_some(), || format!("containerLogMaxSize {size:?} is no size"));
            self.log_size_max = bytes.unwrap_or(self.log_size_max);
        }
        if let Some(files) = file.take("containerLogMaxFiles") {
            file.check(files > 1, || "containerLogMaxFiles must be greater than 1".to_owned());
            self.log_files_max = files;
        }
        if let Some(every) = file.duration("containerLogMonitorInterval") {
            file.check(every >= LOG_LOOK_EVERY_MIN, || {
                "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s"
                    .to_owned()
            });
            self.log_look_every = every;
        }
    }

    fn take_node(&mut self, file: &mut File) {
        if let Some(every) = file.duration("nodeStatusUpdateFrequency") {
            // As upstream: who says how often it is looked, wants it told as often.
            (self.status_every, self.report_every) = (every, every);
        }
        self.report_every = file.duration("nodeStatusReportFrequency").unwrap_or(self.report_every);
        if let Some(seconds) = file.take::<i32>("nodeLeaseDurationSeconds").filter(|seconds| *seconds != 0) {
            file.check(seconds > 0, || "nodeLeaseDurationSeconds must be greater than 0".to_owned());
            self.lease_seconds = seconds.max(1);
        }
        if let Some(most) = file.take::<i64>("nodeStatusMaxImages") {
            file.check(most >= -1, || {
                format!("nodeStatusMaxImages (--node-status-max-images) {most} must be -1 or greater")
            });
            self.images_told = usize::try_from(most).ok();
        }
        self.taints = file.take("registerWithTaints").unwrap_or_default();
        for taint in &self.taints {
            let known = ["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&taint.effect.as_str());
            let right = known && !taint.key.is_empty() && taint.time_added.is_none();
            file.check(right, || format!("invalid taint: {}:{}", taint.key, taint.effect));
        }
    }

    /// What is set aside of the node: thousandths of a CPU for `cpu`, else units.
    pub fn reserved(&self, name: &str) -> i64 {
        let units = |q: &Quantity| if name == "cpu" { q.milli_value() } else { q.value() };
        let all = [&self.kube_reserved, &self.system_reserved];
        all.into_iter().filter_map(|reserved| reserved.get(name)).map(units).fold(0, i64::saturating_add)
    }

    /// Whether pods may set this kernel parameter though it is not known to be safe.
    pub fn allows_sysctl(&self, name: &str) -> bool {
        self.unsafe_sysctls.iter().any(|allowed| match allowed.replace('/', ".").strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => allowed.replace('/', ".") == name,
        })
    }
}

#[cfg(test)]
mod tests;
