//! Whether this node can run a pod that was bound to it. Upstream: pkg/kubelet/lifecycle/predicate.go. Pure.

use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use minke_api::{Quantity, placement};

use crate::pod::Pod;
use crate::resources;
use crate::settings::Settings;

/// Reason and message of the refusal, if any. `others` are the pods the node has agreed to run.
pub fn check<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod>,
    node: Option<&core::Node>,
    allocatable: &BTreeMap<String, Quantity>,
    settings: &Settings,
) -> Option<(&'static str, String)> {
    if let Some(refusal) = forbidden_sysctl(pod, settings).or_else(|| confinement(pod)) {
        return Some(refusal);
    }
    let mut used: BTreeMap<&str, i64> = BTreeMap::new();
    let mut count = 0;
    for other in others {
        count += 1;
        for name in ["cpu", "memory", "ephemeral-storage"] {
            *used.entry(name).or_default() += resources::pod_request(other, name);
        }
    }
    let capacity =
        |name: &str| allocatable.get(name).map(|q| if name == "cpu" { q.milli_value() } else { q.value() });
    let short = |name: &str, requested: i64, used: i64, capacity: i64| {
        format!(
            "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    };
    if let Some(capacity) = capacity("pods")
        && count + 1 > capacity
    {
        return Some(("OutOfpods", short("pods", 1, count, capacity)));
    }
    for (name, reason) in
        [("cpu", "OutOfcpu"), ("memory", "OutOfmemory"), ("ephemeral-storage", "OutOfephemeral-storage")]
    {
        let (requested, used) = (resources::pod_request(pod, name), used.get(name).copied().unwrap_or(0));
        if let Some(capacity) = capacity(name)
            && requested > 0
            && used.saturating_add(requested) > capacity
        {
            return Some((reason, short(name, requested, used, capacity)));
        }
    }
    let node = node?;
    let (name, labels) = (node.metadata.name.as_deref().unwrap_or_default(), node.metadata.labels.clone());
    if !placement::selects_node(pod.spec(), name, &labels.unwrap_or_default()) {
        let message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        return Some(("NodeAffinity", message.to_owned()));
    }
    None
}

/// Kernel parameters that each pod has its own of, and that hurt nobody else.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

fn forbidden_sysctl(pod: &Pod, settings: &Settings) -> Option<(&'static str, String)> {
    let spec = pod.spec();
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_ref());
    for sysctl in sysctls.into_iter().flatten() {
        let name = sysctl.name.replace('/', ".");
        let (space, shared) = match name.starts_with("net.") {
            true => ("net", spec.host_network == Some(true)),
            false => ("ipc", spec.host_ipc == Some(true)),
        };
        let why = if !SAFE_SYSCTLS.contains(&name.as_str()) && !settings.allows_sysctl(&name) {
            format!("\"{name}\" not allowlisted")
        } else if shared {
            format!("\"{name}\" not allowed with host {space} enabled")
        } else {
            continue;
        };
        return Some(("SysctlForbidden", format!("forbidden sysctl: {why}")));
    }
    None
}

/// Confinement that nobody would enforce is refused, instead of running the pod without it.
fn confinement(pod: &Pod) -> Option<(&'static str, String)> {
    let of_pod = pod.spec().security_context.as_ref();
    let armored = |profile: &core::AppArmorProfile| profile.type_ != "Unconfined";
    let labelled = |options: &core::SELinuxOptions| *options != core::SELinuxOptions::default();
    let of_containers = || pod.containers().filter_map(|(_, c)| c.security_context.as_ref());
    let annotated = pod.typed().metadata.annotations.iter().flatten().any(|(key, value)| {
        key.starts_with("container.apparmor.security.beta.kubernetes.io/") && value != "unconfined"
    });
    if annotated
        || of_pod.and_then(|c| c.app_armor_profile.as_ref()).is_some_and(armored)
        || of_containers().any(|c| c.app_armor_profile.as_ref().is_some_and(armored))
    {
        let why = match Path::new("/sys/module/apparmor/parameters/enabled").exists() {
            true => "AppArmor is not supported by the container runtime",
            false => "AppArmor is not enabled on the host",
        };
        return Some(("AppArmor", format!("Cannot enforce AppArmor: {why}")));
    }
    if of_pod.and_then(|c| c.se_linux_options.as_ref()).is_some_and(labelled)
        || of_containers().any(|c| c.se_linux_options.as_ref().is_some_and(labelled))
    {
        let why = match Path::new("/sys/fs/selinux/enforce").exists() {
            true => "SELinux is not supported by the container runtime",
            false => "SELinux is not enabled on the host",
        };
        return Some(("SELinux", format!("Cannot enforce SELinux: {why}")));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn refused(spec: Value, others: &[Pod], want: Option<&str>) {
        let node = json!({"metadata": {"name": "n", "labels": {"zone": "a", "size": "5"}}});
        let node: core::Node = serde_json::from_value(node).expect("a node");
        let quantity = |text: &str| Quantity::parse(text).expect("a quantity");
        let allocatable = BTreeMap::from([
            ("cpu".to_owned(), quantity("2")),
            ("memory".to_owned(), quantity("1Gi")),
            ("pods".to_owned(), quantity("3")),
        ]);
        let settings = Settings::new(Path::new("/d"));
        let got = check(&pod(json!({"spec": spec})), others.iter(), Some(&node), &allocatable, &settings);
        assert_eq!(got.as_ref().map(|(_, message)| message.as_str()), want, "{got:?}");
    }

    fn asking(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = pod(json!({"spec": asking("1500m")}));
        refused(asking("2"), &[], None);
        refused(asking("500m"), std::slice::from_ref(&one), None);
        refused(
            asking("501m"),
            std::slice::from_ref(&one),
            Some("Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000"),
        );
        let many = vec![pod(json!({})); 3];
        refused(
            asking("0"),
            &many,
            Some("Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3"),
        );
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let sysctl = |name: &str, host: bool| json!({"hostNetwork": host, "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        refused(sysctl("net.ipv4.tcp_syncookies", false), &[], None);
        refused(sysctl("net/ipv4/tcp_syncookies", false), &[], None);
        let not_here =
            Some("forbidden sysctl: \"net.ipv4.tcp_syncookies\" not allowed with host net enabled");
        refused(sysctl("net.ipv4.tcp_syncookies", true), &[], not_here);
        refused(
            sysctl("kernel.msgmax", false),
            &[],
            Some("forbidden sysctl: \"kernel.msgmax\" not allowlisted"),
        );
        refused(json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}), &[], None);
        refused(json!({"securityContext": {"seLinuxOptions": {}}}), &[], None);
        let (armored, labelled) = (
            json!({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}),
            json!({"containers": [{"name": "c", "securityContext": {"seLinuxOptions": {"level": "s0"}}}]}),
        );
        for (spec, reason) in [(armored, "AppArmor"), (labelled, "SELinux")] {
            let settings = Settings::new(Path::new("/d"));
            let got =
                check(&pod(json!({"spec": spec})), std::iter::empty(), None, &BTreeMap::new(), &settings);
            assert_eq!(got.map(|(reason, _)| reason), Some(reason));
        }
    }

    #[test]
    fn selectors_must_match() {
        let no = Some("Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector");
        refused(json!({"nodeSelector": {"zone": "a"}}), &[], None);
        refused(json!({"nodeSelector": {"zone": "b"}}), &[], no);
        let affinity = |key: &str, operator: &str, values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]}}}})
        };
        refused(affinity("zone", "In", json!(["a", "b"])), &[], None);
        refused(affinity("zone", "NotIn", json!(["a"])), &[], no);
        refused(affinity("none", "DoesNotExist", Value::Null), &[], None);
        refused(affinity("size", "Gt", json!(["4"])), &[], None);
        refused(affinity("size", "Lt", json!(["4"])), &[], no);
    }
}
