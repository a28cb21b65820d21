//! What can be set of a kubelet, as `kubelet.yaml` in its data directory says: upstream's
//! `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1), of which the fields here are read.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::SignedDuration;
use minke_api::Quantity;
use serde::Deserialize;
use serde_json::Value;

use crate::eviction::Threshold;

/// Most bytes of the file.
const SIZE_MAX: u64 = 1 << 20;
/// As upstream: every look lists all containers.
const LOG_LOOK_EVERY_MIN: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// When pods are ended for want of memory, disk or processes.
    pub thresholds: Vec<Threshold>,
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
    /// Longest wait before a container that ended runs again; upstream's five minutes when there is none.
    pub restart_wait_max: Option<SignedDuration>,
    /// Where static pods are described.
    pub manifests: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct CrashLoopBackOff {
    max_container_restart_period: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct File {
    crash_loop_back_off: CrashLoopBackOff,
    eviction_hard: Option<std::collections::BTreeMap<String, String>>,
    pod_pids_limit: Option<i64>,
    allowed_unsafe_sysctls: Vec<String>,
    container_log_max_size: Option<String>,
    container_log_max_files: Option<usize>,
    container_log_monitor_interval: Option<String>,
    serialize_image_pulls: Option<bool>,
    max_parallel_image_pulls: Option<usize>,
    static_pod_path: Option<PathBuf>,
}

impl Settings {
    /// The defaults, for a node with this data directory.
    pub fn new(data: &Path) -> Settings {
        Settings {
            thresholds: Threshold::defaults(),
            pod_pids: None,
            unsafe_sysctls: vec![],
            log_size_max: 10 << 20,
            log_files_max: 5,
            log_look_every: Duration::from_secs(10),
            pulls_max: None,
            restart_wait_max: None,
            manifests: data.join("manifests"),
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
        let value = minke_api::codec::yaml::decode(text).map_err(|error| error.to_string())?.value;
        let kind = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        if (kind("apiVersion"), kind("kind"))
            != ("kubelet.config.k8s.io/v1beta1".to_owned(), "KubeletConfiguration".to_owned())
        {
            return Err("it is no KubeletConfiguration of kubelet.config.k8s.io/v1beta1".to_owned());
        }
        let file: File = serde_json::from_value(value).map_err(|error| error.to_string())?;
        let mut settings = Settings::new(data);
        if let Some(thresholds) = file.eviction_hard {
            let all: Vec<String> =
                thresholds.iter().map(|(signal, value)| format!("{signal}<{value}")).collect();
            settings.thresholds = Threshold::parse(&all.join(","))?;
        }
        settings.pod_pids = file.pod_pids_limit.filter(|limit| *limit > 0);
        settings.unsafe_sysctls = file.allowed_unsafe_sysctls;
        if let Some(size) = file.container_log_max_size {
            let bytes = Quantity::parse(&size).ok().and_then(|size| u64::try_from(size.value()).ok());
            settings.log_size_max = bytes.ok_or_else(|| format!("invalid containerLogMaxSize {size:?}"))?;
        }
        if let Some(files) = file.container_log_max_files {
            if files < 2 {
                return Err("containerLogMaxFiles must be at least 2".to_owned());
            }
            settings.log_files_max = files;
        }
        if let Some(text) = file.container_log_monitor_interval {
            let every = text.parse::<SignedDuration>().ok().and_then(|every| Duration::try_from(every).ok());
            let every = every.ok_or_else(|| format!("invalid containerLogMonitorInterval {text:?}"))?;
            if every < LOG_LOOK_EVERY_MIN {
                return Err("containerLogMonitorInterval must be at least 3s".to_owned());
            }
            settings.log_look_every = every;
        }
        settings.pulls_max = match (file.serialize_image_pulls, file.max_parallel_image_pulls) {
            (_, Some(0)) => return Err("maxParallelImagePulls must be at least 1".to_owned()),
            (Some(true), Some(2..)) => {
                return Err("maxParallelImagePulls must be 1 when serializeImagePulls is true".to_owned());
            }
            (Some(true), _) => Some(1),
            (_, most) => most,
        };
        if let Some(text) = file.crash_loop_back_off.max_container_restart_period {
            let most = text.parse::<SignedDuration>().ok();
            let most = most.filter(|most| (1..=300).contains(&most.as_secs()));
            settings.restart_wait_max = Some(most.ok_or_else(|| {
                format!("crashLoopBackOff.maxContainerRestartPeriod {text:?} must be between 1s and 5m0s")
            })?);
        }
        if let Some(path) = file.static_pod_path {
            settings.manifests = data.join(path);
        }
        Ok(settings)
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
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<Settings, &str>) {
        let text = format!("apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n{text}");
        let got = Settings::parse(text.as_bytes(), Path::new("/d"));
        assert_eq!(got.as_ref().map_err(String::as_str), want.as_ref().map_err(|why| *why));
    }

    #[test]
    fn the_file_is_upstreams() {
        let new = || Settings::new(Path::new("/d"));
        check("featureGates: {}\n", Ok(new()));
        check(
            "evictionHard: {memory.available: 5%}\npodPidsLimit: 99\nallowedUnsafeSysctls: [kernel.msg*, net/a]\n\
             containerLogMaxSize: 1Mi\ncontainerLogMaxFiles: 3\nstaticPodPath: /m\n\
             containerLogMonitorInterval: 1m3s\nmaxParallelImagePulls: 2\n\
             crashLoopBackOff: {maxContainerRestartPeriod: 30s}\n",
            Ok(Settings {
                thresholds: Threshold::parse("memory.available<5%").expect("a threshold"),
                pod_pids: Some(99),
                unsafe_sysctls: vec!["kernel.msg*".into(), "net/a".into()],
                log_size_max: 1 << 20,
                log_files_max: 3,
                log_look_every: Duration::from_secs(63),
                pulls_max: Some(2),
                restart_wait_max: Some(SignedDuration::from_secs(30)),
                manifests: "/m".into(),
            }),
        );
        check("evictionHard: {x: 5%}\n", Err("unsupported eviction signal \"x\""));
        check("containerLogMaxFiles: 1\n", Err("containerLogMaxFiles must be at least 2"));
        check("containerLogMonitorInterval: 1s\n", Err("containerLogMonitorInterval must be at least 3s"));
        check(
            "crashLoopBackOff: {maxContainerRestartPeriod: 6m}\n",
            Err("crashLoopBackOff.maxContainerRestartPeriod \"6m\" must be between 1s and 5m0s"),
        );
        check("containerLogMonitorInterval: x\n", Err("invalid containerLogMonitorInterval \"x\""));
        check("serializeImagePulls: true\n", Ok(Settings { pulls_max: Some(1), ..new() }));
        check("serializeImagePulls: false\n", Ok(new()));
        check("maxParallelImagePulls: 0\n", Err("maxParallelImagePulls must be at least 1"));
        check(
            "serializeImagePulls: true\nmaxParallelImagePulls: 2\n",
            Err("maxParallelImagePulls must be 1 when serializeImagePulls is true"),
        );
        assert!(Settings::parse(b"kind: Pod\n", Path::new("/d")).is_err());
        assert_eq!(Settings::read(Path::new("/nosuch")), Ok(Settings::new(Path::new("/nosuch"))));
        let settings = Settings { unsafe_sysctls: vec!["kernel.msg*".into(), "net/a".into()], ..new() };
        let allowed = |name: &str| settings.allows_sysctl(name);
        assert!(allowed("kernel.msgmax") && allowed("net.a") && !allowed("net.ab") && !allowed("kernel.sem"));
    }
}
