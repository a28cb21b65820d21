//! What pods use, as `/stats/summary` and `/metrics` tell it.

use std::fmt::Write;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use minke_runtime::{ContainerState, Stats};
use serde_json::{Value, json};

use super::Api;
use crate::machine;

fn cpu(stats: &Stats, now: Timestamp) -> Value {
    json!({"time": Time(now), "usageCoreNanoSeconds": stats.cpu_ns})
}

fn memory(stats: &Stats, now: Timestamp) -> Value {
    json!({
        "time": Time(now), "usageBytes": stats.memory_usage, "workingSetBytes": stats.memory_working_set,
        "rssBytes": stats.memory_rss,
    })
}

/// The `Summary` of kubelet's stats/v1alpha1, as far as cgroups tell it.
pub async fn summary(api: &Api) -> Value {
    let runtime = &api.context.runtime;
    let now = Timestamp::now();
    let mut pods = vec![];
    for sandbox in runtime.list().await.unwrap_or_default() {
        let Ok(stats) = runtime.sandbox_stats(&sandbox.spec.id).await else { continue };
        let mut containers = vec![];
        for container in sandbox.containers.iter().filter(|c| c.state == ContainerState::Running) {
            let Ok(stats) = runtime.container_stats(&container.id).await else { continue };
            containers.push(json!({
                "name": container.name,
                "startTime": container.started_at.map(Time),
                "cpu": cpu(&stats, now),
                "memory": memory(&stats, now),
            }));
        }
        let spec = &sandbox.spec;
        pods.push(json!({
            "podRef": {"name": spec.name, "namespace": spec.namespace, "uid": spec.uid},
            "startTime": Time(sandbox.created_at),
            "containers": containers,
            "cpu": cpu(&stats, now),
            "memory": memory(&stats, now),
            "process_stats": {"process_count": stats.pids},
        }));
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let (total, free) = (machine::meminfo(&meminfo, "MemTotal"), machine::meminfo(&meminfo, "MemAvailable"));
    json!({
        "node": {
            "nodeName": api.context.node_name,
            "memory": {"time": Time(now), "availableBytes": free, "workingSetBytes": total.saturating_sub(free)},
        },
        "pods": pods,
    })
}

/// A few of upstream's metrics, in Prometheus' text format.
pub async fn metrics(api: &Arc<Api>) -> String {
    let sandboxes = api.context.runtime.list().await.unwrap_or_default();
    let running = |state| sandboxes.iter().flat_map(|s| &s.containers).filter(|c| c.state == state).count();
    let ready = sandboxes.iter().filter(|s| s.state == minke_runtime::SandboxState::Ready).count();
    let mut out = String::new();
    let _ = write!(
        out,
        "# HELP kubelet_running_pods Number of pods that have a running pod sandbox\n\
         # TYPE kubelet_running_pods gauge\nkubelet_running_pods {ready}\n\
         # HELP kubelet_running_containers Number of containers currently running\n\
         # TYPE kubelet_running_containers gauge\n\
         kubelet_running_containers{{container_state=\"running\"}} {}\n\
         kubelet_running_containers{{container_state=\"exited\"}} {}\n",
        running(ContainerState::Running),
        running(ContainerState::Exited),
    );
    let _ = write!(
        out,
        "# HELP kubelet_node_name The node's name. The count is always 1.\n\
         # TYPE kubelet_node_name gauge\nkubelet_node_name{{node=\"{}\"}} 1\n",
        api.context.node_name
    );
    out
}
