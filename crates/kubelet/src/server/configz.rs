//! `/configz`: how this kubelet is set, under upstream's names (kubelet.config.k8s.io/v1beta1).
//!
//! Only what has a meaning here is told: a setting that Minke does not have is left out.

use std::collections::BTreeMap;
use std::time::Duration;

use minke_api::Quantity;
use serde_json::{Value, json};

use crate::context::Context;
use crate::pod::go_duration;

pub fn answer(context: &Context) -> Value {
    let settings = &context.settings;
    let (eviction, images) = (&settings.eviction, &settings.images);
    let addresses: Vec<String> = context.dns.servers.iter().map(ToString::to_string).collect();
    let reserved = |all: &BTreeMap<String, Quantity>| -> BTreeMap<String, String> {
        all.iter().map(|(name, amount)| (name.clone(), amount.to_string())).collect()
    };
    let enforced = if settings.hold_pods { "pods" } else { "none" };
    let longest_wait = settings.restart_wait_max.and_then(|most| Duration::try_from(most).ok());
    let longest_wait = longest_wait.unwrap_or(Duration::from_secs(300));
    let server = json!({
        "enableServer": true,
        "enableSystemLogHandler": true,
        "enableSystemLogQuery": false,
        "staticPodPath": settings.manifests,
        "fileCheckFrequency": go_duration(crate::manifests::LOOK_EVERY),
        "authentication": {
            "x509": {},
            "webhook": {"enabled": true, "cacheTTL": "2m0s"},
            "anonymous": {"enabled": false},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
    });
    let node = json!({
        "registryPullQPS": settings.pull_rate.map_or(0, |rate| rate.per_second),
        "clusterDomain": context.dns.domain,
        "clusterDNS": addresses,
        "nodeStatusUpdateFrequency": go_duration(settings.status_every),
        "nodeStatusReportFrequency": go_duration(settings.report_every),
        "nodeLeaseDurationSeconds": settings.lease_seconds,
        "imageMinimumGCAge": go_duration(images.age_min),
        "imageMaximumGCAge": go_duration(images.age_max.unwrap_or_default()),
        "imageGCHighThresholdPercent": images.high_percent,
        "imageGCLowThresholdPercent": images.low_percent,
        "cgroupRoot": context.cgroup_root,
        "cgroupsPerQOS": true,
        "cgroupDriver": "cgroupfs",
        "maxPods": context.allocatable.get("pods").map(|pods| pods.value()),
        "podsPerCore": settings.pods_per_core,
        "podPidsLimit": settings.pod_pids.unwrap_or(-1),
        "resolvConf": settings.resolv_conf,
        "nodeStatusMaxImages": settings.images_told.and_then(|n| i64::try_from(n).ok()).unwrap_or(-1),
        "serializeImagePulls": settings.pulls_max == Some(1),
    });
    let mut config = json!({
        "evictionHard": eviction.hard,
        "evictionSoft": eviction.soft,
        "evictionSoftGracePeriod": eviction.soft_grace,
        "evictionMinimumReclaim": eviction.minimum_reclaim,
        "evictionMaxPodGracePeriod": eviction.pod_grace_max,
        "evictionPressureTransitionPeriod": go_duration(eviction.transition),
        "containerLogMaxSize": Quantity::bytes(i64::try_from(settings.log_size_max).unwrap_or(i64::MAX)).to_string(),
        "containerLogMaxFiles": settings.log_files_max,
        "containerLogMonitorInterval": go_duration(settings.log_look_every),
        "kubeReserved": reserved(&settings.kube_reserved),
        "systemReserved": reserved(&settings.system_reserved),
        "enforceNodeAllocatable": [enforced],
        "allowedUnsafeSysctls": settings.unsafe_sysctls,
        "seccompDefault": context.seccomp_default,
        "registerNode": true,
        "registerWithTaints": settings.taints,
        "crashLoopBackOff": {"maxContainerRestartPeriod": go_duration(longest_wait)},
    });
    if let Some(most) = settings.pulls_max {
        config["maxParallelImagePulls"] = json!(most);
    }
    if let Some(rate) = settings.pull_rate {
        config["registryBurst"] = json!(rate.burst);
    }
    // As upstream, which leaves out what is empty.
    if let (Some(fields), Value::Object(server), Value::Object(node)) = (config.as_object_mut(), server, node)
    {
        fields.extend(server.into_iter().chain(node));
        fields.retain(|_, value| *value != json!({}) && *value != json!([]));
    }
    json!({"kubeletconfig": config})
}
