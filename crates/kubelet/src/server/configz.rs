//! `/configz`: how this kubelet is set, under upstream's names (kubelet.config.k8s.io/v1beta1).
//!
//! Only what has a meaning here is told: a setting that Minke does not have is left out.

use serde_json::{Value, json};

use crate::context::Context;

pub fn answer(context: &Context) -> Value {
    let addresses: Vec<String> = context.dns.servers.iter().map(ToString::to_string).collect();
    json!({"kubeletconfig": {
        "enableServer": true,
        "authentication": {
            "x509": {},
            "webhook": {"enabled": true, "cacheTTL": "2m0s"},
            "anonymous": {"enabled": false},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
        "clusterDomain": context.dns.domain,
        "clusterDNS": addresses,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": context.cgroup_root,
        "seccompDefault": context.seccomp_default,
        "maxPods": context.allocatable.get("pods").map(|pods| pods.value()),
        "nodeLeaseDurationSeconds": 40,
        "evictionHard": crate::eviction::shown(&context.settings.thresholds),
        "evictionPressureTransitionPeriod": "5m0s",
        "podPidsLimit": context.settings.pod_pids.unwrap_or(-1),
        "allowedUnsafeSysctls": context.settings.unsafe_sysctls,
        "containerLogMaxSize": context.settings.log_size_max.to_string(),
        "containerLogMaxFiles": context.settings.log_files_max,
        "containerLogMonitorInterval": crate::pod::go_duration(context.settings.log_look_every),
        "serializeImagePulls": context.settings.pulls_max == Some(1),
        "maxParallelImagePulls": context.settings.pulls_max,
        "crashLoopBackOff": {
            "maxContainerRestartPeriod": context
                .settings
                .restart_wait_max
                .and_then(|most| std::time::Duration::try_from(most).ok())
                .map(crate::pod::go_duration),
        },
        "staticPodPath": context.settings.manifests,
    }})
}
