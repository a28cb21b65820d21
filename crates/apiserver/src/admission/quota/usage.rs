//! What one object uses of what a quota may limit, and which pods a quota with scopes is about.
//!
//! Upstream: pkg/quota/v1/evaluator/core, pkg/quota/v1/generic.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Service};
use minke_api::{KINDS, Kind, Quantity};
use serde_json::Value;

use crate::kinds::resources::{Amounts, amounts, pod_amounts, qos_class};
use crate::kinds::tree::Tree;

const COUNT: &str = "count/";
const CLASS_SUFFIX: &str = ".storageclass.storage.k8s.io/";
const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
const PER_POD: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
/// What every container must say when it is limited.
const MUST_SPECIFY: [&str; 6] =
    ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];
/// Kinds whose number is also limited under their plain name.
const PLAIN_COUNTS: [&str; 4] = ["configmaps", "secrets", "replicationcontrollers", "resourcequotas"];

const ONE: Quantity = Quantity::new(1, minke_api::quantity::Format::DecimalSi);

/// The kinds whose objects use something that depends on what is in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    Pod,
    Service,
    Claim,
    /// One each, whatever is in it.
    Count,
}

impl Usage {
    /// None for what no quota is about.
    pub fn of(kind: &'static Kind) -> Option<Usage> {
        match (kind.group, kind.kind) {
            _ if !kind.namespaced || kind.kind == "Event" => None,
            ("", "Pod") => Some(Usage::Pod),
            ("", "Service") => Some(Usage::Service),
            ("", "PersistentVolumeClaim") => Some(Usage::Claim),
            _ => Some(Usage::Count),
        }
    }
}

/// What `object` uses, by the names that quotas have for it.
pub fn usage(kind: &'static Kind, object: &Value, now: Timestamp) -> Amounts {
    let mut used = Amounts::new();
    let Some(sort) = Usage::of(kind) else { return used };
    used.insert(format!("{COUNT}{}", kind.qualified_plural()), ONE);
    match sort {
        Usage::Pod if is_charged(object, now) => pod(object.at("spec"), &mut used),
        Usage::Pod => {}
        Usage::Service => service(object.at("spec"), &mut used),
        Usage::Claim => claim(object, &mut used),
        Usage::Count if kind.group.is_empty() && PLAIN_COUNTS.contains(&kind.plural) => {
            used.insert(kind.plural.to_owned(), ONE);
        }
        Usage::Count => {}
    }
    used
}

/// Whether a pod still holds what it asked for: not once it has ended, nor when it should have been gone
/// for as long as it had to stop (its node may be lost).
fn is_charged(pod: &Value, now: Timestamp) -> bool {
    if matches!(pod.at("status").text("phase"), "Failed" | "Succeeded") {
        return false;
    }
    given_up_at(pod).is_none_or(|at| now <= at)
}

/// When a pod that is to go, and does not, stops counting.
pub fn given_up_at(pod: &Value) -> Option<Timestamp> {
    let metadata = pod.at("metadata");
    let at: Timestamp = metadata.text("deletionTimestamp").parse().ok()?;
    let grace = metadata.int("deletionGracePeriodSeconds")?;
    at.checked_add(SignedDuration::from_secs(grace)).ok()
}

fn pod(spec: &Value, used: &mut Amounts) {
    let (requests, limits) = (pod_amounts(spec, "requests"), pod_amounts(spec, "limits"));
    used.insert("pods".to_owned(), ONE);
    computed(&requests, &limits, used);
}

/// Requests and limits by the names that quotas have for them.
fn computed(requests: &Amounts, limits: &Amounts, used: &mut Amounts) {
    for (name, amount) in requests {
        if PER_POD.contains(&name.as_str()) || name.starts_with("hugepages-") {
            used.insert(name.clone(), *amount);
            used.insert(format!("requests.{name}"), *amount);
        } else if is_extended(name) {
            used.insert(format!("requests.{name}"), *amount);
        }
    }
    for (name, amount) in limits.iter().filter(|(name, _)| PER_POD.contains(&name.as_str())) {
        used.insert(format!("limits.{name}"), *amount);
    }
}

/// Whether a resource is of a domain that is not Kubernetes' own.
fn is_extended(name: &str) -> bool {
    name.split_once('/').is_some_and(|(domain, _)| {
        domain != "kubernetes.io" && !domain.ends_with(".kubernetes.io") && !domain.starts_with("requests.")
    })
}

fn service(spec: &Value, used: &mut Amounts) {
    let ports = spec.items("ports");
    let node_ports = match spec.text("type") {
        "NodePort" => ports.len(),
        "LoadBalancer" if spec.at("allocateLoadBalancerNodePorts").as_bool() == Some(false) => {
            ports.iter().filter(|port| port.int("nodePort").unwrap_or_default() != 0).count()
        }
        "LoadBalancer" => ports.len(),
        _ => 0,
    };
    let balancers = i64::from(spec.text("type") == "LoadBalancer");
    let number = |count: i64| Quantity::new(count, Default::default());
    used.insert("services".to_owned(), ONE);
    used.insert("services.nodeports".to_owned(), number(node_ports as i64));
    used.insert("services.loadbalancers".to_owned(), number(balancers));
}

fn claim(claim: &Value, used: &mut Amounts) {
    let spec = claim.at("spec");
    let size = |list: &Value| amounts(list).get("storage").copied();
    let asked = size(spec.at("resources").at("requests"));
    // A claim that could not grow holds what was tried, until it is known that it does not.
    let storage = asked.max(size(claim.at("status").at("allocatedResources")).filter(|_| asked.is_some()));
    let old_class = claim.at("metadata").at("annotations").text(OLD_CLASS);
    let class = if old_class.is_empty() { spec.text("storageClassName") } else { old_class };
    let mut both = |name: &str, amount: Quantity| {
        used.insert(name.to_owned(), amount);
        if !class.is_empty() {
            used.insert(format!("{class}{CLASS_SUFFIX}{name}"), amount);
        }
    };
    both("persistentvolumeclaims", ONE);
    if let Some(storage) = storage {
        both("requests.storage", storage);
    }
}

/// The kind of the objects that use the resource `name`; none when nothing does.
pub fn user_of(name: &str) -> Option<&'static Kind> {
    if let Some(resource) = name.strip_prefix(COUNT) {
        let (plural, group) = resource.split_once('.').unwrap_or((resource, ""));
        let mut stored = KINDS.iter().filter(|kind| kind.is_stored() && kind.stored_as.is_none());
        let kind = stored.find(|kind| kind.plural == plural && kind.group == group);
        return kind.filter(|kind| Usage::of(kind).is_some());
    }
    if PLAIN_COUNTS.contains(&name) {
        return Kind::by_plural("", "v1", name);
    }
    if matches!(name, "services" | "services.nodeports" | "services.loadbalancers") {
        return Some(Kind::of::<Service>());
    }
    if matches!(name, "persistentvolumeclaims" | "requests.storage") || name.contains(CLASS_SUFFIX) {
        return Some(Kind::of::<PersistentVolumeClaim>());
    }
    let bare = name.strip_prefix("requests.").unwrap_or(name);
    let computes = PER_POD.contains(&bare)
        || name.strip_prefix("limits.").is_some_and(|bare| PER_POD.contains(&bare))
        || bare.starts_with("hugepages-")
        || bare != name && is_extended(bare);
    (name == "pods" || computes).then(Kind::of::<Pod>)
}

/// Says which containers of a new pod leave out what its quota limits: `must specify …`.
pub fn missing(pod: &Value, limited: &[&str]) -> Option<String> {
    let spec = pod.at("spec");
    let said_by = |resources: &Value| {
        let mut said = Amounts::new();
        computed(&amounts(resources.at("requests")), &amounts(resources.at("limits")), &mut said);
        said
    };
    let by_pod = said_by(spec.at("resources"));
    let mut problems = Vec::new();
    for name in limited.iter().filter(|name| MUST_SPECIFY.contains(name) && !by_pod.contains_key(**name)) {
        let all = spec.items("containers").iter().chain(spec.items("initContainers"));
        let silent = all.filter(|container| !said_by(container.at("resources")).contains_key(*name));
        let mut silent: Vec<&str> = silent.map(|container| container.text("name")).collect();
        silent.sort_unstable();
        silent.dedup();
        if !silent.is_empty() {
            problems.push(format!("{name} for: {}", silent.join(",")));
        }
    }
    problems.sort();
    (!problems.is_empty()).then(|| format!("must specify {}", problems.join("; ")))
}

/// Whether a quota with this spec is about the object.
pub fn is_about(spec: &Value, kind: &'static Kind, object: &Value) -> bool {
    let of_selector = spec.at("scopeSelector").items("matchExpressions").iter();
    let selectors = of_selector.map(|one| (one.text("scopeName"), one.text("operator"), one.items("values")));
    let scopes = spec.items("scopes").iter().filter_map(Value::as_str);
    let mut all = scopes.map(|scope| (scope, "Exists", &[][..])).chain(selectors);
    match Usage::of(kind) {
        Some(Usage::Pod) => all.all(|(scope, operator, values)| pod_in(object, scope, operator, values)),
        Some(Usage::Claim) => all.all(|(scope, operator, values)| {
            scope == "VolumeAttributesClass"
                && attributes_classes(object).any(|class| selects(Some(class), operator, values))
        }),
        // Scopes are about pods.
        _ => all.next().is_none(),
    }
}

fn pod_in(pod: &Value, scope: &str, operator: &str, values: &[Value]) -> bool {
    let spec = pod.at("spec");
    let terminating = spec.int("activeDeadlineSeconds").is_some_and(|seconds| seconds >= 0);
    match scope {
        "Terminating" => terminating,
        "NotTerminating" => !terminating,
        "BestEffort" => qos_class(spec) == "BestEffort",
        "NotBestEffort" => qos_class(spec) != "BestEffort",
        "CrossNamespacePodAffinity" => reaches_over(spec.at("affinity")),
        "PriorityClass" => {
            let class = spec.text("priorityClassName");
            selects((!class.is_empty()).then_some(class), operator, values)
        }
        _ => false,
    }
}

fn selects(class: Option<&str>, operator: &str, values: &[Value]) -> bool {
    let listed = class.is_some_and(|class| values.iter().any(|value| value == class));
    match operator {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => class.is_some(),
        "DoesNotExist" => class.is_none(),
        _ => false,
    }
}

/// Whether a term of the affinity is about pods of other namespaces.
fn reaches_over(affinity: &Value) -> bool {
    let over =
        |term: &Value| term.has("namespaces") || term.get("namespaceSelector").is_some_and(|s| !s.is_null());
    ["podAffinity", "podAntiAffinity"].iter().any(|sort| {
        let sort = affinity.at(sort);
        sort.items("requiredDuringSchedulingIgnoredDuringExecution").iter().any(over)
            || sort
                .items("preferredDuringSchedulingIgnoredDuringExecution")
                .iter()
                .any(|weighted| over(weighted.at("podAffinityTerm")))
    })
}

fn attributes_classes(claim: &Value) -> impl Iterator<Item = &str> {
    let status = claim.at("status");
    let all = [
        claim.at("spec").text("volumeAttributesClassName"),
        status.text("currentVolumeAttributesClassName"),
        status.at("modifyVolumeStatus").text("targetVolumeAttributesClassName"),
    ];
    all.into_iter().filter(|class| !class.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:10:00Z".parse().unwrap()
    }

    #[track_caller]
    fn check(kind: &'static Kind, object: Value, want: &str) {
        let used = usage(kind, &object, now());
        let text: Vec<String> = used.iter().map(|(name, amount)| format!("{name}={amount}")).collect();
        assert_eq!(text.join(" "), want);
        for name in used.keys() {
            assert_eq!(user_of(name), Some(kind), "{name}");
        }
    }

    #[test]
    fn a_pod_uses_what_it_asks_for_until_it_ends() {
        let pods = Kind::of::<Pod>();
        let spec = json!({"containers": [{"resources": {
            "requests": {"cpu": "100m", "memory": "1Gi", "example.com/gpu": "2", "hugepages-2Mi": "4Mi"},
            "limits": {"cpu": "1", "example.com/gpu": "2"},
        }}]});
        let all = "count/pods=1 cpu=100m hugepages-2Mi=4Mi limits.cpu=1 memory=1Gi pods=1 requests.cpu=100m \
                   requests.example.com/gpu=2 requests.hugepages-2Mi=4Mi requests.memory=1Gi";
        let only = "count/pods=1";
        check(pods, json!({"spec": spec}), all);
        check(pods, json!({"spec": spec, "status": {"phase": "Running"}}), all);
        check(pods, json!({"spec": spec, "status": {"phase": "Failed"}}), only);
        let going = |at: &str| json!({"deletionTimestamp": at, "deletionGracePeriodSeconds": 30});
        check(pods, json!({"metadata": going("2026-01-01T00:09:40Z"), "spec": spec}), all);
        check(pods, json!({"metadata": going("2026-01-01T00:09:20Z"), "spec": spec}), only);
    }

    #[test]
    fn services_claims_and_the_rest() {
        let services = Kind::of::<Service>();
        let counted = |spec: Value, ports: u8, balancers: u8| {
            let want = format!(
                "count/services=1 services=1 services.loadbalancers={balancers} services.nodeports={ports}"
            );
            check(services, json!({"spec": spec}), &want);
        };
        let ports = json!([{"port": 1}, {"port": 2, "nodePort": 30000}]);
        counted(json!({"type": "ClusterIP", "ports": ports}), 0, 0);
        counted(json!({"type": "NodePort", "ports": ports}), 2, 0);
        counted(json!({"type": "LoadBalancer", "ports": ports}), 2, 1);
        counted(
            json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": ports}),
            1,
            1,
        );
        check(
            Kind::of::<PersistentVolumeClaim>(),
            json!({"spec": {"storageClassName": "fast", "resources": {"requests": {"storage": "3Gi"}}}}),
            "count/persistentvolumeclaims=1 fast.storageclass.storage.k8s.io/persistentvolumeclaims=1 \
             fast.storageclass.storage.k8s.io/requests.storage=3Gi persistentvolumeclaims=1 requests.storage=3Gi",
        );
        check(Kind::by_kind("", "v1", "ConfigMap").unwrap(), json!({}), "configmaps=1 count/configmaps=1");
        check(Kind::by_kind("apps", "v1", "Deployment").unwrap(), json!({}), "count/deployments.apps=1");
        assert_eq!(user_of("count/events"), None);
        assert_eq!(user_of("count/widgets.example.com"), None);
        assert_eq!(user_of("example.com/gpu"), None);
    }

    #[test]
    fn scopes_select_pods() {
        #[track_caller]
        fn check(quota: Value, pod: Value, want: bool) {
            assert_eq!(is_about(&quota, Kind::of::<Pod>(), &json!({"spec": pod})), want, "{quota} {pod}");
        }
        let plain = || json!({"containers": [{"resources": {}}]});
        let with = |field: &str, value: Value| {
            let mut pod = plain();
            pod[field] = value;
            pod
        };
        let sized = json!({"containers": [{"resources": {"requests": {"cpu": "1"}}}]});
        let deadline = with("activeDeadlineSeconds", 5.into());
        let scope = |scope: &str| json!({"scopes": [scope]});
        check(json!({}), plain(), true);
        for (yes, no, inside, outside) in [
            ("Terminating", "NotTerminating", deadline, plain()),
            ("BestEffort", "NotBestEffort", plain(), sized),
        ] {
            check(scope(yes), inside.clone(), true);
            check(scope(yes), outside.clone(), false);
            check(scope(no), inside, false);
            check(scope(no), outside, true);
        }
        let by = |operator: &str, values: Value| json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": operator, "values": values}]}});
        let high = with("priorityClassName", "high".into());
        for (quota, of_high, of_none) in [
            (by("In", json!(["high"])), true, false),
            (by("In", json!(["low"])), false, false),
            (by("NotIn", json!(["high"])), false, true),
            (by("Exists", json!([])), true, false),
            (by("DoesNotExist", json!([])), false, true),
        ] {
            check(quota.clone(), high.clone(), of_high);
            check(quota, plain(), of_none);
        }
        let near = |term: Value| {
            with(
                "affinity",
                json!({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": term}]}}),
            )
        };
        check(scope("CrossNamespacePodAffinity"), near(json!({"topologyKey": "k"})), false);
        check(
            scope("CrossNamespacePodAffinity"),
            near(json!({"topologyKey": "k", "namespaces": ["b"]})),
            true,
        );
        check(scope("CrossNamespacePodAffinity"), near(json!({"namespaceSelector": {}})), true);
        let secrets = Kind::by_kind("", "v1", "Secret").unwrap();
        assert!(!is_about(&scope("Terminating"), secrets, &json!({})), "scopes are about pods");
        assert!(is_about(&json!({}), secrets, &json!({})));
    }

    #[test]
    fn every_container_must_say_what_is_limited() {
        let pod = json!({"spec": {
            "containers": [
                {"name": "b", "resources": {"requests": {"cpu": "1"}}},
                {"name": "a", "resources": {"limits": {"memory": "1Gi"}}},
            ],
            "initContainers": [{"name": "i", "resources": {}}],
        }});
        let limited = ["limits.memory", "cpu", "pods", "requests.storage"];
        assert_eq!(missing(&pod, &limited).unwrap(), "must specify cpu for: a,i; limits.memory for: b,i");
        assert_eq!(missing(&pod, &["pods"]), None);
    }
}
