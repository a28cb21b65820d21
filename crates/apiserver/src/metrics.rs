//! Counts of what the server does, in Prometheus' text form.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use minke_api::Kind;
use minke_store::Store;

/// Upper bounds of the buckets of request durations, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// What tells requests apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels {
    pub verb: &'static str,
    /// Group, version and plural; empty for what is no resource.
    pub resource: (&'static str, &'static str, &'static str),
    pub subresource: &'static str,
    pub code: u16,
}

impl Labels {
    pub fn new(verb: &'static str, kind: Option<&'static Kind>, subresource: &str, code: u16) -> Labels {
        Labels {
            verb,
            resource: kind.map_or(("", "", ""), |kind| (kind.group, kind.version, kind.plural)),
            // Only names from the table, so that nobody can make the table of counters grow.
            subresource: kind.and_then(|kind| kind.subresource(subresource)).map_or("", |sub| sub.name),
            code,
        }
    }
}

#[derive(Default)]
struct Count {
    requests: u64,
    seconds: f64,
    buckets: [u64; BUCKETS.len()],
}

/// What is counted.
#[derive(Default)]
pub struct Metrics {
    requests: Mutex<HashMap<Labels, Count>>,
    panics: AtomicU64,
    watches: Arc<AtomicI64>,
    reading: Arc<AtomicI64>,
    writing: Arc<AtomicI64>,
}

/// One of something that goes on now; counted until it is dropped.
pub struct Gauge(Arc<AtomicI64>);

impl Gauge {
    fn new(count: &Arc<AtomicI64>) -> Gauge {
        count.fetch_add(1, Ordering::Relaxed);
        Gauge(count.clone())
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    pub fn request(&self, labels: Labels, took: Duration) {
        let mut requests = self.requests.lock().expect("counting does not panic");
        let count = requests.entry(labels).or_default();
        let seconds = took.as_secs_f64();
        count.requests += 1;
        count.seconds += seconds;
        if let Some(bucket) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            count.buckets[bucket] += 1;
        }
    }

    pub fn panicked(&self) {
        self.panics.fetch_add(1, Ordering::Relaxed);
    }

    pub fn watch(&self) -> Gauge {
        Gauge::new(&self.watches)
    }

    /// A request that is being worked on, or `None` when there are `max` of its sort already.
    pub fn in_flight(&self, writes: bool, max: i64) -> Option<Gauge> {
        let gauge = Gauge::new(if writes { &self.writing } else { &self.reading });
        (gauge.0.load(Ordering::Relaxed) <= max).then_some(gauge)
    }

    /// Everything, as text.
    pub fn render(&self, store: &Store) -> String {
        let mut out = String::new();
        self.render_requests(&mut out);
        let gauge = |out: &mut String, name: &str, help: &str, values: &[(String, i64)]| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in values {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let load = |count: &AtomicI64| count.load(Ordering::Relaxed);
        gauge(
            &mut out,
            "apiserver_current_inflight_requests",
            "Requests being worked on, by kind.",
            &[
                (r#"{request_kind="readOnly"}"#.to_owned(), load(&self.reading)),
                (r#"{request_kind="mutating"}"#.to_owned(), load(&self.writing)),
            ],
        );
        gauge(
            &mut out,
            "apiserver_longrunning_requests",
            "Watches over HTTP that go on.",
            &[(r#"{verb="WATCH"}"#.to_owned(), load(&self.watches))],
        );
        let mut sizes = store.sizes();
        sizes.sort_by_key(|(kind, ..)| (kind.group, kind.plural));
        let of = |kind: &Kind| format!(r#"{{group="{}",resource="{}"}}"#, kind.group, kind.plural);
        let counts: Vec<_> = sizes.iter().map(|(kind, count, _)| (of(kind), *count as i64)).collect();
        let bytes: Vec<_> = sizes.iter().map(|(kind, _, bytes)| (of(kind), *bytes as i64)).collect();
        gauge(&mut out, "apiserver_resource_objects", "Stored objects, by resource.", &counts);
        gauge(
            &mut out,
            "apiserver_resource_size_estimate_bytes",
            "Bytes of stored objects, by resource.",
            &bytes,
        );
        let revision = [(String::new(), store.revision().0 as i64)];
        gauge(&mut out, "apiserver_storage_revision", "Revision of the last write.", &revision);
        let _ = writeln!(
            out,
            "# HELP apiserver_request_panics_total Requests that panicked.\n# TYPE apiserver_request_panics_total counter\n\
             apiserver_request_panics_total {}",
            self.panics.load(Ordering::Relaxed)
        );
        render_process(&mut out);
        out
    }

    fn render_requests(&self, out: &mut String) {
        let requests = self.requests.lock().expect("counting does not panic");
        let mut all: Vec<(&Labels, &Count)> = requests.iter().collect();
        all.sort_by_key(|(labels, _)| **labels);
        let text = |labels: &Labels| {
            let (group, version, resource) = labels.resource;
            let scope = if resource.is_empty() { "" } else { "resource" };
            format!(
                r#"group="{group}",version="{version}",resource="{resource}",subresource="{}",scope="{scope}",verb="{}""#,
                labels.subresource,
                labels.verb.to_uppercase()
            )
        };
        let name = "apiserver_request_total";
        let _ = writeln!(
            out,
            "# HELP {name} Requests answered, by verb, resource and code.\n# TYPE {name} counter"
        );
        for (labels, count) in &all {
            let _ = writeln!(out, r#"{name}{{{},code="{}"}} {}"#, text(labels), labels.code, count.requests);
        }
        let name = "apiserver_request_duration_seconds";
        let _ = writeln!(out, "# HELP {name} Time to the answer's headers.\n# TYPE {name} histogram");
        for (labels, count) in &all {
            let labels = format!(r#"{},code="{}""#, text(labels), labels.code);
            let mut sum = 0;
            for (bound, in_bucket) in BUCKETS.iter().zip(count.buckets) {
                sum += in_bucket;
                let _ = writeln!(out, r#"{name}_bucket{{{labels},le="{bound}"}} {sum}"#);
            }
            let _ = writeln!(out, r#"{name}_bucket{{{labels},le="+Inf"}} {}"#, count.requests);
            let _ = writeln!(out, "{name}_sum{{{labels}}} {}", count.seconds);
            let _ = writeln!(out, "{name}_count{{{labels}}} {}", count.requests);
        }
    }
}

/// Memory of the process, from /proc; left out where there is none.
fn render_process(out: &mut String) {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    if let Some(kib) = field("VmRSS:") {
        let name = "process_resident_memory_bytes";
        let _ = writeln!(out, "# HELP {name} Resident memory.\n# TYPE {name} gauge\n{name} {}", kib * 1024);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_is_counted() {
        let metrics = Metrics::default();
        let kind = Kind::by_plural("apps", "v1", "deployments");
        for took in [1, 3] {
            metrics.request(Labels::new("get", kind, "nonsense", 200), Duration::from_millis(took));
        }
        let gauge = metrics.in_flight(true, 1);
        assert!(gauge.is_some() && metrics.in_flight(true, 1).is_none());
        let text = metrics.render(&Store::in_memory());
        let labels = r#"group="apps",version="v1",resource="deployments",subresource="",scope="resource",verb="GET",code="200""#;
        for line in [
            format!("apiserver_request_total{{{labels}}} 2"),
            format!(r#"apiserver_request_duration_seconds_bucket{{{labels},le="0.001"}} 1"#),
            format!(r#"apiserver_request_duration_seconds_bucket{{{labels},le="+Inf"}} 2"#),
            r#"apiserver_current_inflight_requests{request_kind="mutating"} 1"#.to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
