//! The kubelet's metrics in Prometheus' text format, under upstream's names: `/metrics`,
//! `/metrics/resource`, `/metrics/cadvisor` and `/metrics/probes`.
//!
//! Everything is read when it is asked for.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use minke_runtime::{ContainerState, ContainerStatus, SandboxState, Stats};

use super::Api;
use super::stats::{boot_time, interfaces, of_pod};
use super::usage::{ContainerUse, PodUse, Use};
use crate::observed::IMAGE_ANNOTATION;
use crate::probe_counts::{BOUNDS, RESULTS};

pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Labels<'a> = &'a [(&'a str, &'a str)];

/// A document that is being written: families one after the other, each with its samples.
#[derive(Default)]
struct Text {
    out: String,
    family: &'static str,
}

impl Text {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        self.family = name;
        let _ = write!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, labels: Labels<'_>, value: f64) {
        self.write("", labels, value, None);
    }

    /// A sample of a moment that is not now.
    fn at(&mut self, labels: Labels<'_>, value: f64, at: Timestamp) {
        self.write("", labels, value, Some(at));
    }

    fn write(&mut self, suffix: &str, labels: Labels<'_>, value: f64, at: Option<Timestamp>) {
        let _ = write!(self.out, "{}{suffix}", self.family);
        for (n, (name, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"");
            let _ = write!(self.out, "{}{name}=\"{value}\"", if n == 0 { '{' } else { ',' });
        }
        if !labels.is_empty() {
            self.out.push('}');
        }
        let _ = write!(self.out, " {value}");
        if let Some(at) = at {
            let _ = write!(self.out, " {}", at.as_millisecond());
        }
        self.out.push('\n');
    }

    fn gauge(&mut self, name: &'static str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.sample(&[], value);
    }

    fn counter(&mut self, name: &'static str, help: &str, value: f64) {
        self.family(name, "counter", help);
        self.sample(&[], value);
    }

    /// The samples of one histogram; `counts` are not cumulative, the last one is of what is beyond `bounds`.
    fn histogram(&mut self, labels: Labels<'_>, bounds: &[f64], counts: &[u64], sum: f64) {
        let mut total = 0;
        let ends = bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (end, count) in ends.zip(counts) {
            total += count;
            let labels: Vec<_> = labels.iter().copied().chain([("le", end.as_str())]).collect();
            self.write("_bucket", &labels, total as f64, None);
        }
        self.write("_sum", labels, sum, None);
        self.write("_count", labels, total as f64, None);
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn since_epoch(at: Timestamp) -> f64 {
    at.as_nanosecond() as f64 / 1e9
}

/// `/metrics/resource`: CPU time and memory, and nothing else.
pub async fn resource(api: &Api) -> String {
    let reading = api.meter.read().await;
    let mut text = Text::default();
    let container = |pod: &PodUse, c: &ContainerUse| {
        [c.status.name.clone(), pod.spec.namespace.clone(), pod.spec.name.clone()]
    };
    let containers: Vec<([String; 3], &ContainerUse)> = (reading.pods.iter())
        .flat_map(|pod| pod.containers.iter().map(move |c| (container(pod, c), c)))
        .collect();
    let of_containers = |text: &mut Text, value: &dyn Fn(&Use) -> f64| {
        for ([name, namespace, pod], c) in &containers {
            let labels = [("container", name.as_str()), ("namespace", namespace), ("pod", pod)];
            text.at(&labels, value(&c.used), c.used.at);
        }
    };
    let of_pods = |text: &mut Text, value: &dyn Fn(&Use) -> f64| {
        for pod in &reading.pods {
            let labels = [("namespace", pod.spec.namespace.as_str()), ("pod", pod.spec.name.as_str())];
            text.at(&labels, value(&pod.used), pod.used.at);
        }
    };
    let cpu = |used: &Use| seconds(used.stats.cpu_ns);
    let memory = |used: &Use| used.stats.memory_working_set as f64;
    text.family(
        "container_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the container in core-seconds",
    );
    of_containers(&mut text, &cpu);
    text.family(
        "container_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the container in bytes",
    );
    of_containers(&mut text, &memory);
    text.family(
        "container_start_time_seconds",
        "gauge",
        "[STABLE] Start time of the container since unix epoch in seconds",
    );
    for ([name, namespace, pod], c) in &containers {
        let labels = [("container", name.as_str()), ("namespace", namespace), ("pod", pod)];
        text.sample(&labels, since_epoch(c.status.started_at.unwrap_or(c.status.created_at)));
    }
    text.family(
        "node_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the node in core-seconds",
    );
    text.at(&[], cpu(&reading.node), reading.node.at);
    text.family(
        "node_memory_working_set_bytes",
        "gauge",
        "[STABLE] Current working set of the node in bytes",
    );
    text.at(&[], memory(&reading.node), reading.node.at);
    text.family(
        "pod_cpu_usage_seconds_total",
        "counter",
        "[STABLE] Cumulative cpu time consumed by the pod in core-seconds",
    );
    of_pods(&mut text, &cpu);
    text.family("pod_memory_working_set_bytes", "gauge", "[STABLE] Current working set of the pod in bytes");
    of_pods(&mut text, &memory);
    text.gauge(
        "resource_scrape_error",
        "[STABLE] 1 if there was an error while getting container metrics, 0 otherwise",
        0.0,
    );
    text.out
}

/// One cgroup as cAdvisor names it.
struct Cgroup<'a> {
    labels: Vec<(&'static str, &'a str)>,
    used: &'a Use,
    started: Timestamp,
    container: Option<&'a ContainerUse>,
    pod: Option<&'a PodUse>,
}

/// A family with one sample for each cgroup: name, type, help, and its value if it has one.
type Family = (&'static str, &'static str, &'static str, fn(&Cgroup<'_>) -> Option<f64>);

fn throttling(cgroup: &Cgroup<'_>, value: fn(&Stats) -> f64) -> Option<f64> {
    (cgroup.used.stats.cpu_periods > 0).then(|| value(&cgroup.used.stats))
}

fn limit(cgroup: &Cgroup<'_>, value: fn(&minke_runtime::Resources) -> Option<f64>) -> Option<f64> {
    value(&cgroup.container?.status.resources)
}

#[rustfmt::skip]
const CGROUP_FAMILIES: &[Family] = &[
    ("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.", |c| Some(seconds(c.used.stats.cpu_ns))),
    ("container_cpu_cfs_periods_total", "counter", "Number of elapsed enforcement period intervals.", |c| throttling(c, |s| s.cpu_periods as f64)),
    ("container_cpu_cfs_throttled_periods_total", "counter", "Number of throttled period intervals.", |c| throttling(c, |s| s.cpu_throttled_periods as f64)),
    ("container_cpu_cfs_throttled_seconds_total", "counter", "Total time duration the container has been throttled.", |c| throttling(c, |s| seconds(s.cpu_throttled_ns))),
    ("container_memory_usage_bytes", "gauge", "Current memory usage in bytes, including all memory regardless of when it was accessed", |c| Some(c.used.stats.memory_usage as f64)),
    ("container_memory_working_set_bytes", "gauge", "Current working set in bytes.", |c| Some(c.used.stats.memory_working_set as f64)),
    ("container_memory_rss", "gauge", "Size of RSS in bytes.", |c| Some(c.used.stats.memory_rss as f64)),
    ("container_memory_cache", "gauge", "Number of bytes of page cache memory.", |c| Some(c.used.stats.memory_cache as f64)),
    ("container_threads", "gauge", "Number of threads running inside the container", |c| c.pod.map(|_| c.used.stats.pids as f64)),
    ("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.", |c| Some(since_epoch(c.started))),
    ("container_last_seen", "gauge", "Last time a container was seen by the exporter", |c| Some(since_epoch(c.used.at).floor())),
    ("container_spec_cpu_shares", "gauge", "CPU share of the container.", |c| limit(c, |r| r.cpu_shares.map(|v| v as f64))),
    ("container_spec_cpu_period", "gauge", "CPU period of the container.", |c| limit(c, |r| r.cpu_period_us.map(|v| v as f64))),
    ("container_spec_cpu_quota", "gauge", "CPU quota of the container.", |c| limit(c, |r| r.cpu_quota_us.filter(|v| *v > 0).map(|v| v as f64))),
    ("container_spec_memory_limit_bytes", "gauge", "Memory limit for the container.", |c| limit(c, |r| Some(r.memory_limit.unwrap_or(0).max(0) as f64))),
];

/// Counts of network interfaces: name, help and value.
type Counts = (&'static str, &'static str, fn(&super::stats::Interface) -> u64);

#[rustfmt::skip]
const NETWORK_FAMILIES: &[Counts] = &[
    ("container_network_receive_bytes_total", "Cumulative count of bytes received", |i| i.rx_bytes),
    ("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", |i| i.rx_errors),
    ("container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving", |i| i.rx_dropped),
    ("container_network_receive_packets_total", "Cumulative count of packets received", |i| i.rx_packets),
    ("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", |i| i.tx_bytes),
    ("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", |i| i.tx_errors),
    ("container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting", |i| i.tx_dropped),
    ("container_network_transmit_packets_total", "Cumulative count of packets transmitted", |i| i.tx_packets),
];

/// The image as the pod names it, where that is known.
fn image(status: &ContainerStatus) -> &str {
    status.annotations.get(IMAGE_ANNOTATION).unwrap_or(&status.image)
}

/// `/metrics/cadvisor`: each cgroup in detail, under the names that dashboards know.
pub async fn cadvisor(api: &Api) -> String {
    let reading = api.meter.read().await;
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ids: Vec<(String, Vec<String>)> = reading
        .pods
        .iter()
        .map(|pod| {
            let id = format!("/{}", pod.spec.cgroup_parent);
            let containers = pod.containers.iter().map(|c| format!("{id}/{}", c.status.id)).collect();
            (id, containers)
        })
        .collect();
    let mut cgroups = vec![Cgroup {
        labels: vec![
            ("container", ""),
            ("id", "/"),
            ("image", ""),
            ("name", ""),
            ("namespace", ""),
            ("pod", ""),
        ],
        used: &reading.node,
        started: boot_time(&stat).unwrap_or_default(),
        container: None,
        pod: None,
    }];
    for (pod, (id, containers)) in reading.pods.iter().zip(&ids) {
        let labels = |container, id, image, name| {
            let (namespace, pod) = (pod.spec.namespace.as_str(), pod.spec.name.as_str());
            vec![
                ("container", container),
                ("id", id),
                ("image", image),
                ("name", name),
                ("namespace", namespace),
                ("pod", pod),
            ]
        };
        cgroups.push(Cgroup {
            labels: labels("", id, "", ""),
            used: &pod.used,
            started: pod.created_at,
            container: None,
            pod: Some(pod),
        });
        for (c, id) in pod.containers.iter().zip(containers) {
            cgroups.push(Cgroup {
                labels: labels(&c.status.name, id, image(&c.status), &c.status.id),
                used: &c.used,
                started: c.status.started_at.unwrap_or(c.status.created_at),
                container: Some(c),
                pod: Some(pod),
            });
        }
    }
    let mut text = Text::default();
    for (name, kind, help, value) in CGROUP_FAMILIES {
        text.family(name, kind, help);
        for cgroup in &cgroups {
            let Some(value) = value(cgroup) else { continue };
            let mut labels = cgroup.labels.clone();
            if *name == "container_cpu_usage_seconds_total" {
                labels.push(("cpu", "total"));
            }
            text.at(&labels, value, cgroup.used.at);
        }
    }
    text.family(
        "container_memory_failures_total",
        "counter",
        "Cumulative count of memory allocation failures.",
    );
    for cgroup in &cgroups {
        let stats = &cgroup.used.stats;
        for (kind, value) in [("pgfault", stats.page_faults), ("pgmajfault", stats.major_page_faults)] {
            let mut labels = cgroup.labels.clone();
            labels.extend([("failure_type", kind), ("scope", "hierarchy")]);
            text.at(&labels, value as f64, cgroup.used.at);
        }
    }
    text.family(
        "container_fs_usage_bytes",
        "gauge",
        "Number of bytes that are consumed by the container on this filesystem.",
    );
    for cgroup in &cgroups {
        let Some(container) = cgroup.container else { continue };
        if let Some(used) = api.walks.of_container(api, &container.status.id).await {
            text.at(&cgroup.labels, used.bytes as f64, cgroup.used.at);
        }
    }
    let host = interfaces(&std::fs::read_to_string("/proc/net/dev").unwrap_or_default());
    let networks: Vec<_> = cgroups
        .iter()
        .filter(|cgroup| cgroup.container.is_none())
        .map(|cgroup| (cgroup, cgroup.pod.map_or_else(|| host.clone(), |pod| of_pod(api, pod))))
        .collect();
    for (name, help, value) in NETWORK_FAMILIES {
        text.family(name, "counter", help);
        for (cgroup, interfaces) in &networks {
            for interface in interfaces {
                let mut labels = cgroup.labels.clone();
                labels.push(("interface", &interface.name));
                text.at(&labels, value(interface) as f64, cgroup.used.at);
            }
        }
    }
    text.gauge(
        "container_scrape_error",
        "1 if there was an error while getting container metrics, 0 otherwise",
        0.0,
    );
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    text.gauge("machine_cpu_cores", "Number of logical CPU cores.", cpus as f64);
    text.gauge(
        "machine_memory_bytes",
        "Amount of memory installed on the machine.",
        reading.memory_total as f64,
    );
    text.out
}

/// `/metrics/probes`: how often probes ran and how they ended.
pub fn probes(api: &Api) -> String {
    let mut seen = Vec::new();
    api.context.probe_counts.each(
        |(uid, namespace, name)| {
            let pod = api.pods.get(namespace, name).and_then(crate::pod::Pod::new);
            pod.is_some_and(|pod| pod.uid_here() == uid)
        },
        |pod, container, kind, count| {
            seen.push((pod.clone(), container.to_owned(), kind.to_owned(), count.clone()));
        },
    );
    let mut text = Text::default();
    text.family(
        "prober_probe_duration_seconds",
        "histogram",
        "[ALPHA] Duration in seconds for a probe response.",
    );
    for ((_, namespace, pod), container, kind, count) in &seen {
        let labels =
            [("container", container.as_str()), ("namespace", namespace), ("pod", pod), ("probe_type", kind)];
        text.histogram(&labels, &BOUNDS, &count.buckets, count.seconds);
    }
    text.family(
        "prober_probe_total",
        "counter",
        "[BETA] Cumulative number of a liveness, readiness or startup probe for a container by result.",
    );
    for ((uid, namespace, pod), container, kind, count) in &seen {
        for (result, number) in RESULTS.iter().zip(count.results).filter(|(_, number)| *number > 0) {
            let labels = [
                ("container", container.as_str()),
                ("namespace", namespace),
                ("pod", pod),
                ("pod_uid", uid),
                ("probe_type", kind),
                ("result", result),
            ];
            text.sample(&labels, number as f64);
        }
    }
    text.out
}

/// Requests to this server, by what they were.
#[derive(Default)]
pub struct Requests {
    inflight: AtomicI64,
    /// By method and path.
    served: Mutex<BTreeMap<(&'static str, &'static str), Served>>,
}

#[derive(Clone, Default)]
struct Served {
    count: u64,
    buckets: [u64; BOUNDS.len() + 1],
    seconds: f64,
}

/// Paths that requests are counted under, by their first word; any other is counted under the empty one.
const PATHS: &[&str] = &[
    "attach",
    "configz",
    "containerLogs",
    "exec",
    "healthz",
    "metrics",
    "pods",
    "portForward",
    "runningpods",
    "stats",
];
const METHODS: &[&str] = &["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE"];

impl Requests {
    pub fn begin(&self) {
        self.inflight.fetch_add(1, Ordering::Relaxed);
    }

    pub fn end(&self, method: &str, path: &str, took: Duration) {
        self.inflight.fetch_sub(1, Ordering::Relaxed);
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let known = |words: &'static [&'static str], word| words.iter().find(|w| **w == word).copied();
        let key = (known(METHODS, method).unwrap_or("other"), known(PATHS, first).unwrap_or_default());
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        let mut served = self.served.lock().expect("nothing panics while counting");
        let served = served.entry(key).or_default();
        served.count += 1;
        served.buckets[bucket] += 1;
        served.seconds += seconds;
    }

    fn write(&self, text: &mut Text) {
        let served = self.served.lock().expect("nothing panics while counting").clone();
        let labels = |method, path| {
            let long = if matches!(path, "attach" | "exec" | "portForward") { "true" } else { "false" };
            [("long_running", long), ("method", method), ("path", path), ("server_type", "readwrite")]
        };
        text.family(
            "kubelet_http_inflight_requests",
            "gauge",
            "[ALPHA] Number of the inflight http requests",
        );
        text.sample(&[("server_type", "readwrite")], self.inflight.load(Ordering::Relaxed) as f64);
        text.family(
            "kubelet_http_requests_duration_seconds",
            "histogram",
            "[ALPHA] Duration in seconds to serve http requests",
        );
        for ((method, path), served) in &served {
            text.histogram(&labels(*method, *path), &BOUNDS, &served.buckets, served.seconds);
        }
        text.family(
            "kubelet_http_requests_total",
            "counter",
            "[ALPHA] Number of the http requests received since the server started",
        );
        for ((method, path), served) in &served {
            text.sample(&labels(*method, *path), served.count as f64);
        }
    }
}

/// `/metrics`: the kubelet itself.
pub async fn kubelet(api: &Api) -> String {
    let sandboxes = api.context.runtime.list().await.unwrap_or_default();
    let containers =
        |state| sandboxes.iter().flat_map(|s| &s.containers).filter(|c| c.state == state).count();
    let ready = sandboxes.iter().filter(|s| s.state == SandboxState::Ready).count();
    let bound = api.pods.snapshot();
    let finished = |phase: Option<&str>| matches!(phase, Some("Succeeded" | "Failed"));
    let active = bound.values().filter(|pod| !finished(pod.field("status.phase"))).count();
    let mut text = Text::default();
    text.family("kubelet_active_pods", "gauge", "[ALPHA] The number of pods the kubelet considers active and which are being considered when admitting new pods.");
    text.sample(&[("static", "")], active as f64);
    text.family(
        "kubelet_desired_pods",
        "gauge",
        "[ALPHA] The number of pods the kubelet is being instructed to run.",
    );
    text.sample(&[("static", "")], bound.len() as f64);
    for (name, reason, label, help) in [
        (
            "kubelet_evictions",
            "Evicted",
            "eviction_signal",
            "[ALPHA] Cumulative number of pod evictions by eviction signal",
        ),
        (
            "kubelet_preemptions",
            "Preempting",
            "preemption_signal",
            "[ALPHA] Cumulative number of pod preemptions by preemption resource",
        ),
    ] {
        text.family(name, "counter", help);
        for (signal, count) in api.context.endings.of(reason) {
            text.sample(&[(label, signal.as_str())], count as f64);
        }
    }
    text.family("kubelet_node_name", "gauge", "[ALPHA] The node's name. The count is always 1.");
    text.sample(&[("node", &api.context.node_name)], 1.0);
    text.family("kubelet_running_containers", "gauge", "[ALPHA] Number of containers currently running");
    for (state, word) in [
        (ContainerState::Created, "created"),
        (ContainerState::Exited, "exited"),
        (ContainerState::Running, "running"),
    ] {
        text.sample(&[("container_state", word)], containers(state) as f64);
    }
    text.gauge(
        "kubelet_running_pods",
        "[ALPHA] Number of pods that have a running pod sandbox",
        ready as f64,
    );
    api.requests.write(&mut text);
    text.family(
        "kubernetes_build_info",
        "gauge",
        "[ALPHA] The version that this was built as; the value is always 1.",
    );
    text.sample(&[("git_version", &api.context.version), ("platform", &platform())], 1.0);
    process(&mut text);
    text.out
}

fn platform() -> String {
    format!("linux/{}", crate::machine::architecture())
}

/// What every program with metrics tells of its process.
fn process(text: &mut Text) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let stat = read("/proc/self/stat");
    // The name before may have spaces; from the state on, fields are plain numbers.
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0);
    let ticks = |ticks: u64| ticks as f64 / 100.0;
    text.counter(
        "process_cpu_seconds_total",
        "Total user and system CPU time spent in seconds.",
        ticks(field(14) + field(15)),
    );
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    text.gauge("process_open_fds", "Number of open file descriptors.", open as f64);
    let limits = read("/proc/self/limits");
    let most = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let most = most.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    text.gauge("process_max_fds", "Maximum number of open file descriptors.", most.unwrap_or(f64::INFINITY));
    let resident = field(24) * rustix::param::page_size() as u64;
    text.gauge("process_resident_memory_bytes", "Resident memory size in bytes.", resident as f64);
    text.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", field(23) as f64);
    let boot = boot_time(&read("/proc/stat")).map_or(0.0, since_epoch);
    text.gauge(
        "process_start_time_seconds",
        "Start time of the process since unix epoch in seconds.",
        boot + ticks(field(22)),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_labels_and_times() {
        let mut text = Text::default();
        text.family("m", "gauge", "Some help.");
        text.sample(&[], 1.5);
        text.at(&[("a", "x\"\\\n"), ("b", "")], 3.0, Timestamp::from_millisecond(1234).unwrap());
        assert_eq!(
            text.out,
            "# HELP m Some help.\n# TYPE m gauge\nm 1.5\nm{a=\"x\\\"\\\\\\n\",b=\"\"} 3 1234\n"
        );
    }

    #[test]
    fn buckets_of_histograms_add_up() {
        let mut text = Text::default();
        text.family("h", "histogram", "H.");
        text.histogram(&[("a", "b")], &[0.5, 1.0], &[1, 2, 3], 9.5);
        assert_eq!(
            text.out.lines().skip(2).collect::<Vec<_>>(),
            [
                r#"h_bucket{a="b",le="0.5"} 1"#,
                r#"h_bucket{a="b",le="1"} 3"#,
                r#"h_bucket{a="b",le="+Inf"} 6"#,
                r#"h_sum{a="b"} 9.5"#,
                r#"h_count{a="b"} 6"#,
            ]
        );
    }

    #[test]
    fn requests_are_counted_under_few_names() {
        let requests = Requests::default();
        for path in ["/pods", "/metrics/cadvisor", "/whatever/a", "/whatever/b"] {
            requests.begin();
            requests.end("GET", path, Duration::from_millis(1));
        }
        requests.begin();
        let mut text = Text::default();
        requests.write(&mut text);
        assert!(text.out.contains("kubelet_http_inflight_requests{server_type=\"readwrite\"} 1\n"));
        let of = |path| {
            format!(
                "kubelet_http_requests_total{{long_running=\"false\",method=\"GET\",path=\"{path}\",server_type=\"readwrite\"}}"
            )
        };
        for (path, count) in [("pods", 1), ("metrics", 1), ("", 2)] {
            assert!(text.out.contains(&format!("{} {count}\n", of(path))), "{}", text.out);
        }
    }
}
