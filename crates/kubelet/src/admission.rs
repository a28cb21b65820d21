//! Whether this node can run a pod that was bound to it. Upstream: pkg/kubelet/lifecycle/predicate.go. Pure.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use minke_api::{Quantity, placement};

use crate::pod::{Class, Pod};
use crate::preemption::{self, Missing};
use crate::resources;
use crate::settings::Settings;

/// What becomes of a pod that was bound to this node.
#[derive(Debug, PartialEq)]
pub enum Decision {
    Admit,
    /// It is short of this resource, and can run once the pods of these uids have ended.
    Preempt(String, Vec<String>),
    /// Reason and message.
    Refuse(Cow<'static, str>, String),
}

impl Decision {
    fn refuse((reason, message): (&'static str, String)) -> Decision {
        Decision::Refuse(reason.into(), message)
    }
}

/// `others` are the pods that the node has agreed to run.
pub fn decide<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod>,
    node: Option<&core::Node>,
    allocatable: &BTreeMap<String, Quantity>,
    settings: &Settings,
) -> Decision {
    if let Some(refusal) =
        forbidden_sysctl(pod, settings).or_else(|| confinement(pod)).or_else(|| system(pod))
    {
        return Decision::refuse(refusal);
    }
    let others: Vec<&Pod> = others.collect();
    let short = shortages(pod, &others, allocatable);
    let misplaced = misplaced(pod, &others, node);
    // No room can be made for a pod that is wrong here; and one that needs no room must not make any.
    if resources::is_critical(pod) {
        return match misplaced {
            Some(misplaced) => Decision::refuse(misplaced),
            None if short.is_empty() => Decision::Admit,
            None => preempt(pod, &others, &short),
        };
    }
    match (short.first(), misplaced) {
        (Some(short), _) => Decision::Refuse(format!("OutOf{}", short.name).into(), short.to_string()),
        (None, Some(misplaced)) => Decision::refuse(misplaced),
        (None, None) => Decision::Admit,
    }
}

fn preempt(pod: &Pod, others: &[&Pod], short: &[Shortage]) -> Decision {
    let missing: Vec<Missing> = short.iter().map(Shortage::missing).collect();
    match preemption::victims(pod, others.iter().copied(), &missing) {
        Ok(victims) => {
            let victims = victims.iter().map(|victim| victim.uid().to_owned()).collect();
            Decision::Preempt(short.first().map_or_else(String::new, |short| short.name.clone()), victims)
        }
        Err(why) => {
            let what = "Unexpected error while attempting to recover from admission failure";
            let message = format!("{what}: preemption: error finding a set of pods to preempt: {why}");
            Decision::Refuse("UnexpectedAdmissionError".into(), message)
        }
    }
}

/// Something that the node has too little of: thousandths of a CPU for `cpu`, else units.
struct Shortage {
    name: String,
    requested: i64,
    used: i64,
    capacity: i64,
}

impl Shortage {
    fn missing(&self) -> Missing {
        Missing { name: self.name.clone(), amount: self.requested - (self.capacity - self.used) }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shortage { name, requested, used, capacity } = self;
        write!(
            f,
            "Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    }
}

/// What the node has too little of, in upstream's order.
fn shortages(pod: &Pod, others: &[&Pod], allocatable: &BTreeMap<String, Quantity>) -> Vec<Shortage> {
    let known = ["pods", "cpu", "memory", "ephemeral-storage"];
    let scalars = allocatable.keys().map(String::as_str).filter(|name| !known.contains(name));
    let mut short = vec![];
    for name in known.into_iter().chain(scalars) {
        let Some(capacity) = allocatable.get(name) else { continue };
        let capacity = if name == "cpu" { capacity.milli_value() } else { capacity.value() };
        let asked = |pod: &Pod| if name == "pods" { 1 } else { resources::pod_request(pod, name) };
        let requested = asked(pod);
        let used = others.iter().fold(0i64, |sum, other| sum.saturating_add(asked(other)));
        if requested > 0 && used.saturating_add(requested) > capacity {
            short.push(Shortage { name: name.to_owned(), requested, used, capacity });
        }
    }
    short
}

/// Why the pod has no business on this node, however much room there is.
fn misplaced(pod: &Pod, others: &[&Pod], node: Option<&core::Node>) -> Option<(&'static str, String)> {
    let failed = |name: &'static str, why: &str| Some((name, format!("Predicate {name} failed: {why}")));
    let node = node?;
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let labels = node.metadata.labels.clone().unwrap_or_default();
    if !placement::selects_node(pod.spec(), name, &labels) {
        return failed("NodeAffinity", "node(s) didn't match Pod's node affinity/selector");
    }
    if others.iter().any(|other| ports_collide(pod, other)) {
        return failed("NodePorts", "node(s) didn't have free ports for the requested pod ports");
    }
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let tolerations = pod.spec().tolerations.as_deref().unwrap_or_default();
    if !pod.is_static() && !placement::tolerates_all(tolerations, taints, &["NoExecute"]) {
        return failed("TaintToleration", "node(s) had taints that the pod didn't tolerate");
    }
    None
}

/// Ports of the node that the pod's long-running containers take.
fn host_ports(pod: &Pod) -> impl Iterator<Item = (i32, &str, &str)> {
    let running = pod.containers().filter(|(class, _)| matches!(class, Class::Main | Class::Sidecar));
    let ports = running.flat_map(|(_, container)| container.ports.iter().flatten());
    ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        let address = port.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or("0.0.0.0");
        Some((number, port.protocol.as_deref().unwrap_or("TCP"), address))
    })
}

fn ports_collide(one: &Pod, other: &Pod) -> bool {
    host_ports(one).any(|(number, protocol, address)| {
        host_ports(other).any(|(n, p, a)| {
            (n, p) == (number, protocol) && (a == address || a == "0.0.0.0" || address == "0.0.0.0")
        })
    })
}

/// A pod for another operating system.
fn system(pod: &Pod) -> Option<(&'static str, String)> {
    let label = pod.typed().metadata.labels.as_ref().and_then(|all| all.get("kubernetes.io/os"));
    if label.is_some_and(|os| os != "linux") {
        let message = "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Some(("PodOSSelectorNodeLabelDoesNotMatch", message.to_owned()));
    }
    let other = pod.spec().os.as_ref().is_some_and(|os| os.name != "linux");
    let message = "Failed to admit pod as the OS field doesn't match node OS";
    other.then(|| ("PodOSNotSupported", message.to_owned()))
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

    fn decided(pod: &Pod, others: &[Pod]) -> Decision {
        let node = json!({"metadata": {"name": "n", "labels": {"zone": "a", "size": "5"}},
            "spec": {"taints": [{"key": "flood", "value": "5", "effect": "NoExecute"},
                                {"key": "busy", "effect": "NoSchedule"}]}});
        let node: core::Node = serde_json::from_value(node).expect("a node");
        let allocatable =
            [("cpu", "2"), ("memory", "1Gi"), ("pods", "3"), ("hugepages-2Mi", "4Mi"), ("a.io/x", "1")];
        let quantity = |text: &str| Quantity::parse(text).expect("a quantity");
        let allocatable = allocatable.map(|(name, text)| (name.to_owned(), quantity(text))).into();
        decide(pod, others.iter(), Some(&node), &allocatable, &Settings::new(Path::new("/d")))
    }

    /// A pod that bears what is wrong with the node.
    fn bearing(spec: Value) -> Pod {
        let mut whole = json!({"tolerations": [{"key": "flood", "operator": "Exists"}]});
        crate::pod::tests::merge(&mut whole, spec);
        pod(json!({"spec": whole}))
    }

    #[track_caller]
    fn refused(spec: Value, others: &[Pod], want: Option<&str>) {
        let got = match decided(&bearing(spec), others) {
            Decision::Admit => None,
            Decision::Preempt(_, uids) => panic!("{uids:?}"),
            Decision::Refuse(reason, message) => Some(format!("{reason}: {message}")),
        };
        assert_eq!(got.as_deref(), want);
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
            Some(
                "OutOfcpu: Node didn't have enough resource: cpu, requested: 501, used: 1500, capacity: 2000",
            ),
        );
        let many = vec![pod(json!({})); 3];
        refused(
            asking("0"),
            &many,
            Some("OutOfpods: Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3"),
        );
        let limits =
            |name: &str, n: &str| json!({"containers": [{"name": "c", "resources": {"limits": {name: n}}}]});
        refused(limits("hugepages-2Mi", "4Mi"), &[], None);
        let pages =
            "Node didn't have enough resource: hugepages-2Mi, requested: 6291456, used: 0, capacity: 4194304";
        refused(limits("hugepages-2Mi", "6Mi"), &[], Some(&format!("OutOfhugepages-2Mi: {pages}")));
        let devices =
            "OutOfa.io/x: Node didn't have enough resource: a.io/x, requested: 2, used: 0, capacity: 1";
        refused(limits("a.io/x", "2"), &[], Some(devices));
        // What the node knows nothing of is not the node's.
        refused(limits("a.io/y", "2"), &[], None);
    }

    #[test]
    fn critical_pods_find_room() {
        let of = |uid: &str, priority: i32, cpu: &str| {
            let mut spec = asking(cpu);
            crate::pod::tests::merge(
                &mut spec,
                json!({"priority": priority, "tolerations": [{"operator": "Exists"}]}),
            );
            pod(json!({"metadata": {"uid": uid}, "spec": spec}))
        };
        let critical = |cpu: &str| of("new", 2_000_000_000, cpu);
        let others = [of("a", 0, "1"), of("b", 0, "500m"), of("c", 2_000_000_000, "500m")];
        let preempted = |uids: &[&str]| {
            Decision::Preempt("pods".to_owned(), uids.iter().map(|uid| (*uid).to_owned()).collect())
        };
        assert_eq!(decided(&critical("500m"), &others[..2]), Decision::Admit);
        // One pod too many, and it must be the one that gives enough CPU as well.
        assert_eq!(decided(&critical("500m"), &others), preempted(&["b"]));
        assert_eq!(decided(&critical("1"), &others), preempted(&["a"]));
        assert_eq!(decided(&critical("1500m"), &others), preempted(&["a", "b"]));
        let Decision::Refuse(reason, message) = decided(&critical("2"), &others) else { panic!("refused") };
        assert_eq!(reason, "UnexpectedAdmissionError");
        assert_eq!(
            message,
            "Unexpected error while attempting to recover from admission failure: preemption: error finding a set \
             of pods to preempt: no set of running pods found to reclaim resources: [(res: cpu, q: 500), ]"
        );
        // Nobody goes for a pod that can't run here anyway.
        let mut spec = json!({"spec": {"priority": 2_000_000_000, "nodeSelector": {"zone": "b"}}});
        crate::pod::tests::merge(&mut spec["spec"], asking("1"));
        let got = decided(&pod(spec), &others);
        assert!(matches!(&got, Decision::Refuse(reason, _) if reason == "NodeAffinity"), "{got:?}");
        // Others do not preempt, whatever their priority.
        let got = decided(&of("new", 1_999_999_999, "1"), &others);
        assert!(matches!(&got, Decision::Refuse(reason, _) if reason == "OutOfpods"), "{got:?}");
    }

    #[test]
    fn a_pod_must_bear_the_taints_that_end_pods() {
        let bears = |tolerations: Value| decided(&pod(json!({"spec": {"tolerations": tolerations}})), &[]);
        let no = "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
        let no = || Decision::Refuse("TaintToleration".into(), no.to_owned());
        assert_eq!(bears(json!([])), no());
        assert_eq!(bears(json!([{"key": "flood", "operator": "Equal", "value": "4"}])), no());
        assert_eq!(bears(json!([{"key": "flood", "operator": "Exists", "effect": "NoSchedule"}])), no());
        assert_eq!(bears(json!([{"key": "flood", "operator": "Equal", "value": "5"}])), Decision::Admit);
        let source = json!({crate::pod::SOURCE_ANNOTATION: "file"});
        assert_eq!(decided(&pod(json!({"metadata": {"annotations": source}})), &[]), Decision::Admit);
    }

    #[test]
    fn ports_of_the_node_are_taken_once() {
        let with = |ip: &str, protocol: &str| {
            let port = json!({"containerPort": 80, "hostPort": 80, "hostIP": ip, "protocol": protocol});
            json!({"containers": [{"name": "c", "ports": [port]}]})
        };
        let other = [bearing(with("10.0.0.1", "TCP"))];
        let taken = "NodePorts: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        refused(with("10.0.0.1", "TCP"), &other, Some(taken));
        refused(with("", "TCP"), &other, Some(taken));
        refused(with("10.0.0.2", "TCP"), &other, None);
        refused(with("", "UDP"), &other, None);
        refused(json!({"containers": [{"name": "c", "ports": [{"containerPort": 80}]}]}), &other, None);
    }

    #[test]
    fn pods_of_other_systems_are_refused() {
        let other = "PodOSNotSupported: Failed to admit pod as the OS field doesn't match node OS";
        refused(json!({"os": {"name": "windows"}}), &[], Some(other));
        refused(json!({"os": {"name": "linux"}}), &[], None);
        let labelled = pod(json!({"metadata": {"labels": {"kubernetes.io/os": "windows"}}}));
        let got = decided(&labelled, &[]);
        assert!(
            matches!(&got, Decision::Refuse(reason, _) if reason == "PodOSSelectorNodeLabelDoesNotMatch")
        );
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let sysctl = |name: &str, host: bool| json!({"hostNetwork": host, "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
        refused(sysctl("net.ipv4.tcp_syncookies", false), &[], None);
        refused(sysctl("net/ipv4/tcp_syncookies", false), &[], None);
        let not_here = Some(
            "SysctlForbidden: forbidden sysctl: \"net.ipv4.tcp_syncookies\" not allowed with host net enabled",
        );
        refused(sysctl("net.ipv4.tcp_syncookies", true), &[], not_here);
        refused(
            sysctl("kernel.msgmax", false),
            &[],
            Some("SysctlForbidden: forbidden sysctl: \"kernel.msgmax\" not allowlisted"),
        );
        refused(json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}), &[], None);
        refused(json!({"securityContext": {"seLinuxOptions": {}}}), &[], None);
        let (armored, labelled) = (
            json!({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}),
            json!({"containers": [{"name": "c", "securityContext": {"seLinuxOptions": {"level": "s0"}}}]}),
        );
        for (spec, reason) in [(armored, "AppArmor"), (labelled, "SELinux")] {
            let got = decided(&bearing(spec), &[]);
            assert!(matches!(&got, Decision::Refuse(found, _) if found == reason), "{got:?}");
        }
    }

    #[test]
    fn selectors_must_match() {
        let no = Some(
            "NodeAffinity: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
        );
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
