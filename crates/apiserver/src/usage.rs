//! `metrics.k8s.io`: what nodes and pods use, from the nodes' own readings.
//!
//! Nothing is collected ahead: who asks makes this server ask the kubelets concerned, all at once, for
//! `/stats/summary`. A kubelet that does not answer is left out, as upstream's metrics-server leaves out nodes
//! that it could not scrape. An answer serves everyone for [`FRESH`].

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use minke_api::{FieldSelector, Key, Kind, LabelSelector, Object, Quantity, Revision, Status, time};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::Snapshots;
use crate::proxy::{Proxy, kubelet};
use crate::registry::{Call, ListQuery, Page};

/// How long an answer of a kubelet is as good as new.
const FRESH: Duration = Duration::from_secs(2);
/// Kubelets that are asked at the same time.
const AT_ONCE: usize = 64;
/// How long a kubelet may take; the first time it needs a second to see how fast CPU is used.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of one kubelet's answer.
const ANSWER_MAX: usize = 16 << 20;
/// The window of a kubelet that does not tell: how often upstream's looks at its cgroups.
const USUAL_WINDOW_NS: u64 = 10_000_000_000;

pub const GROUP: &str = "metrics.k8s.io";

/// Asks kubelets what is used.
pub struct Usage {
    proxy: Proxy,
    /// The last answer of each node; the lock is held while it is asked, so that it is asked once.
    answers: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Answer>>>>>,
}

#[derive(Clone)]
struct Answer {
    at: Instant,
    summary: Arc<Summary>,
}

/// The part of upstream's stats/v1alpha1 that is needed here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Summary {
    node: NodeStats,
    pods: Vec<PodStats>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NodeStats {
    cpu: Cpu,
    memory: Memory,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodStats {
    pod_ref: PodRef,
    containers: Vec<ContainerStats>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PodRef {
    uid: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerStats {
    name: String,
    cpu: Cpu,
    memory: Memory,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Cpu {
    time: Option<Timestamp>,
    usage_nano_cores: Option<u64>,
    /// Not upstream's: see the kubelet's `stats`.
    usage_window_nano_seconds: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Memory {
    working_set_bytes: Option<u64>,
}

impl Usage {
    pub fn new(proxy: Proxy) -> Usage {
        Usage { proxy, answers: Mutex::default() }
    }

    /// The metrics of what the call names or selects.
    pub async fn list(
        &self,
        snapshots: &dyn Snapshots,
        call: &Call<'_>,
        query: &ListQuery,
        now: Timestamp,
    ) -> Page {
        let nodes = call.kind.kind == "NodeMetrics";
        let subject = subject(call.kind);
        let subjects = match call.name {
            "" => snapshots.list(subject, call.namespace),
            name => snapshots.get(subject, call.namespace, name).into_iter().collect(),
        };
        let subjects = subjects.into_iter().filter(|object| selected(object, &query.labels, &query.fields));
        let mut by_node: BTreeMap<String, Vec<Arc<Object>>> = BTreeMap::new();
        for object in subjects {
            let node = if nodes { Some(object.name()) } else { running_on(&object) };
            if let Some(node) = node.map(str::to_owned) {
                by_node.entry(node).or_default().push(object);
            }
        }
        if nodes && call.name.is_empty() && query.labels.is_everything() && query.fields.is_everything() {
            let mut answers = self.answers.lock().expect("nothing panics while answers are looked up");
            answers.retain(|node, _| by_node.contains_key(node));
        }
        let asked = stream::iter(by_node).map(|(node, objects)| async move {
            match self.summary(snapshots, &node).await {
                Ok(summary) => metrics(call.kind, &summary, &objects, now),
                Err(why) => {
                    tracing::debug!(node, why, "The kubelet does not say what is used");
                    vec![]
                }
            }
        });
        let mut items: Vec<Arc<Object>> = asked.buffer_unordered(AT_ONCE).collect::<Vec<_>>().await.concat();
        items.sort_by(|a, b| a.key().cmp(b.key()));
        Page { revision: Revision(0), items, continue_: None, remaining: None }
    }

    /// What one node or pod uses.
    pub async fn get(
        &self,
        snapshots: &dyn Snapshots,
        call: &Call<'_>,
        now: Timestamp,
    ) -> Result<Arc<Object>, Status> {
        let subject = subject(call.kind);
        if snapshots.get(subject, call.namespace, call.name).is_none() {
            return Err(Status::not_found(subject, call.name));
        }
        let page = self.list(snapshots, call, &ListQuery::default(), now).await;
        page.items.into_iter().next().ok_or_else(|| {
            // It is there, but nothing is known of it yet.
            let mut status = Status::not_found(call.kind, call.name);
            let (kind, key) = (call.kind.singular, Key::new(call.namespace, call.name));
            status.message = format!("{kind}.{GROUP} \"{key}\" not found");
            status
        })
    }

    async fn summary(&self, snapshots: &dyn Snapshots, node: &str) -> Result<Arc<Summary>, String> {
        let place = {
            let mut answers = self.answers.lock().expect("nothing panics while answers are looked up");
            answers.entry(node.to_owned()).or_default().clone()
        };
        let mut place = place.lock().await;
        if let Some(answer) = place.as_ref().filter(|answer| answer.at.elapsed() < FRESH) {
            return Ok(answer.summary.clone());
        }
        let object = snapshots.get(Kind::of::<Node>(), "", node).ok_or("there is no such node")?;
        let path = "/stats/summary?only_cpu_and_memory=true".to_owned();
        let target = kubelet(&object.value(), node, path).map_err(|status| status.message)?;
        let asked = tokio::time::timeout(PATIENCE, self.proxy.get(&target, ANSWER_MAX)).await;
        let body = asked.map_err(|_| "it does not answer".to_owned())??;
        let summary: Summary = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
        let summary = Arc::new(summary);
        *place = Some(Answer { at: Instant::now(), summary: summary.clone() });
        Ok(summary)
    }
}

/// What metrics of `kind` are about.
fn subject(kind: &Kind) -> &'static Kind {
    if kind.kind == "NodeMetrics" { Kind::of::<Node>() } else { Kind::of::<Pod>() }
}

fn selected(object: &Object, labels: &LabelSelector, fields: &FieldSelector) -> bool {
    labels.matches(object.labels()) && (fields.is_everything() || fields.matches(object))
}

/// The node of a pod that runs.
fn running_on(pod: &Object) -> Option<&str> {
    (pod.field("status.phase") == Some("Running")).then(|| pod.field("spec.nodeName")).flatten()
}

/// The metrics of those of `objects` that the node has told of.
fn metrics(
    kind: &'static Kind,
    summary: &Summary,
    objects: &[Arc<Object>],
    now: Timestamp,
) -> Vec<Arc<Object>> {
    let by_uid: HashMap<&str, &PodStats> =
        summary.pods.iter().map(|pod| (pod.pod_ref.uid.as_str(), pod)).collect();
    let metrics = objects.iter().filter_map(|object| {
        let mut value = match kind.kind {
            "NodeMetrics" => of_node(&summary.node)?,
            _ => of_pod(by_uid.get(object.uid())?)?,
        };
        let mut metadata = json!({"name": object.name(), "creationTimestamp": time::format_seconds(now)});
        if kind.namespaced {
            metadata["namespace"] = object.namespace().into();
        }
        if !object.labels().is_empty() {
            metadata["labels"] =
                object.labels().iter().map(|(k, v)| (k.to_owned(), Value::from(v))).collect();
        }
        value["metadata"] = metadata;
        Object::from_value(kind, &value).ok().map(Arc::new)
    });
    metrics.collect()
}

/// What is used of each resource, when the window ended and how long it was.
fn usage(cpu: &Cpu, memory: &Memory) -> Option<(Value, Timestamp, u64)> {
    let nano = i64::try_from(cpu.usage_nano_cores?).ok()?;
    let bytes = i64::try_from(memory.working_set_bytes?).ok()?;
    let usage =
        json!({"cpu": Quantity::from_nano(nano).to_string(), "memory": Quantity::bytes(bytes).to_string()});
    Some((usage, cpu.time?, cpu.usage_window_nano_seconds.unwrap_or(USUAL_WINDOW_NS)))
}

fn of_node(node: &NodeStats) -> Option<Value> {
    let (usage, at, window) = usage(&node.cpu, &node.memory)?;
    Some(json!({"timestamp": time::format_seconds(at), "window": go_seconds(window), "usage": usage}))
}

/// None when something is not known of one of its containers: a sum without it would say too little.
fn of_pod(pod: &PodStats) -> Option<Value> {
    let (mut containers, mut end, mut longest) = (vec![], None, 0);
    for container in &pod.containers {
        let (usage, at, window) = usage(&container.cpu, &container.memory)?;
        containers.push(json!({"name": container.name, "usage": usage}));
        (end, longest) = (end.max(Some(at)), longest.max(window));
    }
    let end = time::format_seconds(end?);
    Some(json!({"timestamp": end, "window": go_seconds(longest), "containers": containers}))
}

/// Seconds as Go prints a duration, to the millisecond: `15.123s`, `1m0s`.
fn go_seconds(ns: u64) -> String {
    let ms = ns / 1_000_000;
    let (minutes, ms) = (ms / 60_000, ms % 60_000);
    let seconds = format!("{}.{:03}", ms / 1000, ms % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.').to_owned();
    if minutes == 0 { format!("{seconds}s") } else { format!("{minutes}m{seconds}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        let cpu = |nano: u64| json!({"time": "2026-01-01T00:00:10.5Z", "usageNanoCores": nano, "usageWindowNanoSeconds": 15_123_456_789u64});
        let container = |name: &str, nano: u64| json!({"name": name, "cpu": cpu(nano), "memory": {"workingSetBytes": 3 << 20}});
        serde_json::from_value(json!({
            "node": {"nodeName": "n", "cpu": cpu(1_250_000_000), "memory": {"workingSetBytes": 1u64 << 31}},
            "pods": [
                {"podRef": {"name": "a", "namespace": "ns", "uid": "u-a"}, "containers": [container("c", 3_204), container("d", 5_000_000)]},
                {"podRef": {"name": "b", "namespace": "ns", "uid": "u-b"}, "containers": [{"name": "c", "cpu": {"time": "2026-01-01T00:00:10Z"}}]},
                {"podRef": {"name": "z", "namespace": "ns", "uid": "u-z"}},
            ],
        }))
        .expect("a summary")
    }

    fn of(kind: &str, objects: &[Value]) -> Vec<Value> {
        let row = Kind::by_kind(GROUP, "v1beta1", kind).expect("a row");
        let subject = Kind::by_kind("", "v1", kind.strip_suffix("Metrics").unwrap()).expect("a row");
        let objects: Vec<_> =
            objects.iter().map(|o| Arc::new(Object::from_value(subject, o).expect("an object"))).collect();
        let now = "2026-01-01T00:00:11Z".parse().expect("a time");
        metrics(row, &summary(), &objects, now).iter().map(|object| object.value()).collect()
    }

    #[test]
    fn pods_are_told_of_with_their_containers() {
        let pod = |name: &str, uid: &str| json!({"metadata": {"name": name, "namespace": "ns", "uid": uid, "labels": {"app": "x"}}});
        let found =
            of("PodMetrics", &[pod("a", "u-a"), pod("b", "u-b"), pod("z", "u-z"), pod("a2", "u-later")]);
        assert_eq!(
            found,
            [json!({
                "kind": "PodMetrics", "apiVersion": "metrics.k8s.io/v1beta1",
                "metadata": {"name": "a", "namespace": "ns", "labels": {"app": "x"}, "creationTimestamp": "2026-01-01T00:00:11Z"},
                "timestamp": "2026-01-01T00:00:10Z", "window": "15.123s",
                "containers": [
                    {"name": "c", "usage": {"cpu": "3204n", "memory": "3Mi"}},
                    {"name": "d", "usage": {"cpu": "5m", "memory": "3Mi"}},
                ],
            })]
        );
    }

    #[test]
    fn nodes_are_told_of() {
        let found = of("NodeMetrics", &[json!({"metadata": {"name": "n", "uid": "x"}})]);
        assert_eq!(found[0]["usage"], json!({"cpu": "1250m", "memory": "2Gi"}));
        assert_eq!(found[0]["metadata"], json!({"name": "n", "creationTimestamp": "2026-01-01T00:00:11Z"}));
    }

    #[test]
    fn windows_print_as_in_go() {
        for (ns, want) in
            [(1_000_000_000, "1s"), (1_001_500_000, "1.001s"), (60_000_000_000, "1m0s"), (0, "0s")]
        {
            assert_eq!(go_seconds(ns), want);
        }
    }
}
