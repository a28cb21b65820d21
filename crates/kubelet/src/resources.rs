//! Requests and limits: the class of service, cgroup values, the out-of-memory score. Pure.
//!
//! The arithmetic is upstream's (pkg/kubelet/cm/helpers_linux.go, pkg/kubelet/qos/policy.go), in cgroup v1's
//! units, which is what the runtime takes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use minke_runtime::Resources;

use crate::pod::{Class, Pod};

/// The period over which a CPU limit is enforced.
const QUOTA_PERIOD_US: u64 = 100_000;
const LEAST_QUOTA_US: i64 = 1_000;
const LEAST_SHARES: u64 = 2;
const MOST_SHARES: u64 = 262_144;
/// Priority from which on a pod is critical to its node.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

pub fn request(resources: Option<&core::ResourceRequirements>, name: &str) -> Option<Quantity> {
    Quantity::try_from(resources?.requests.as_ref()?.get(name)?).ok()
}

pub fn limit(resources: Option<&core::ResourceRequirements>, name: &str) -> Option<Quantity> {
    Quantity::try_from(resources?.limits.as_ref()?.get(name)?).ok()
}

/// A share of the CPU, in cgroup v1's units.
pub fn shares(milli_cpu: i64) -> u64 {
    let shares = u64::try_from(milli_cpu).unwrap_or(0).saturating_mul(1024) / 1000;
    shares.clamp(LEAST_SHARES, MOST_SHARES)
}

fn quota(milli_cpu: i64) -> i64 {
    (milli_cpu.saturating_mul(QUOTA_PERIOD_US as i64) / 1000).max(LEAST_QUOTA_US)
}

/// `Guaranteed`, `Burstable` or `BestEffort`: what the API server says, or what it would say.
pub fn qos_class(pod: &Pod) -> &'static str {
    match pod.status().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => return "Guaranteed",
        Some("Burstable") => return "Burstable",
        Some("BestEffort") => return "BestEffort",
        _ => {}
    }
    let (mut any, mut guaranteed) = (false, true);
    for (class, container) in pod.containers() {
        if class == Class::Ephemeral {
            continue;
        }
        for name in ["cpu", "memory"] {
            let limit = limit(container.resources.as_ref(), name).filter(|q| !q.is_zero());
            let request = request(container.resources.as_ref(), name).filter(|q| !q.is_zero()).or(limit);
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// The cgroup of all pods below the cluster's own, relative to the root of each hierarchy.
pub fn pods_cgroup(root: &str) -> String {
    format!("{root}/kubepods")
}

/// The pod's own.
pub fn cgroup(root: &str, pod: &Pod) -> String {
    let (pods, uid) = (pods_cgroup(root), pod.uid());
    match qos_class(pod) {
        "Guaranteed" => format!("{pods}/pod{uid}"),
        class => format!("{pods}/{}/pod{uid}", class.to_ascii_lowercase()),
    }
}

/// What limits a container: its own limit, or what the pod may have as a whole.
pub fn limit_of(pod: &Pod, container: &core::Container, name: &str) -> Option<Quantity> {
    let both = [container.resources.as_ref(), pod.spec().resources.as_ref()];
    both.into_iter().find_map(|resources| limit(resources, name).filter(|limit| !limit.is_zero()))
}

pub fn of_container(pod: &Pod, container: &core::Container) -> Resources {
    let resources = container.resources.as_ref();
    let cpu_limit = limit_of(pod, container, "cpu").map(Quantity::milli_value).filter(|milli| *milli > 0);
    let cpu = request(resources, "cpu").map(Quantity::milli_value).or(cpu_limit).unwrap_or(0);
    Resources {
        cpu_shares: Some(shares(cpu)),
        cpu_quota_us: cpu_limit.map(quota),
        cpu_period_us: cpu_limit.map(|_| QUOTA_PERIOD_US),
        memory_limit: limit_of(pod, container, "memory").map(Quantity::value).filter(|bytes| *bytes > 0),
        hugepages: hugepages(resources),
        oom_group: true,
        ..Resources::default()
    }
}

/// Limits in bytes by page size, as the kernel names it: `hugepages-2Mi` is `2MB`.
fn hugepages(resources: Option<&core::ResourceRequirements>) -> BTreeMap<String, u64> {
    let limits = resources.and_then(|resources| resources.limits.as_ref()).into_iter().flatten();
    let pages = limits.filter_map(|(name, limit)| {
        Some((page_size(name)?, u64::try_from(Quantity::try_from(limit).ok()?.value()).ok()?))
    });
    pages.collect()
}

/// The kernel's name of the page size of a resource.
fn page_size(resource: &str) -> Option<String> {
    let size = Quantity::parse(resource.strip_prefix("hugepages-")?).ok()?.value();
    Some(match size {
        size if size >= 1 << 30 => format!("{}GB", size >> 30),
        size if size >= 1 << 20 => format!("{}MB", size >> 20),
        size => format!("{}KB", size >> 10),
    })
}

/// Denies the node's huge pages of the sizes that are not limited: who asks for none gets none.
pub fn deny_other_pages(limits: &mut Resources, allocatable: &BTreeMap<String, Quantity>) {
    for size in allocatable.keys().filter_map(|name| page_size(name)) {
        limits.hugepages.entry(size).or_insert(0);
    }
}

/// Whether two sets of values limit cpu and memory alike; -1 and nothing are the same.
pub fn same(one: &Resources, other: &Resources) -> bool {
    let values = |r: &Resources| {
        let limited = |value: Option<i64>| value.filter(|value| *value > 0);
        (r.cpu_shares, limited(r.cpu_quota_us), limited(r.memory_limit))
    };
    values(one) == values(other)
}

/// The same values with what is not limited said, so that they lift older limits.
pub fn explicit(mut resources: Resources) -> Resources {
    resources.cpu_period_us.get_or_insert(QUOTA_PERIOD_US);
    resources.cpu_quota_us.get_or_insert(-1);
    resources.memory_limit.get_or_insert(-1);
    resources
}

/// Whether what changed from `old` to `new` holds only for a new container, as `resizePolicy` has it.
pub fn resize_restarts(container: &core::Container, new: &Resources, old: &Resources) -> bool {
    let restarts = |name: &str| {
        let policies = container.resize_policy.iter().flatten();
        policies.filter(|p| p.resource_name == name).any(|p| p.restart_policy == "RestartContainer")
    };
    let memory = Resources { memory_limit: old.memory_limit, ..new.clone() };
    let (memory_changed, cpu_changed) = (!same(&memory, new), !same(&memory, old));
    (memory_changed && restarts("memory")) || (cpu_changed && restarts("cpu"))
}

/// What containers need together: those that run side by side summed up, or one init container with the
/// sidecars before it, whichever is more. `None` when `each` is for any of them and `all` asks for all.
fn total(pod: &Pod, all: bool, each: impl Fn(&core::Container) -> Option<i64>) -> Option<i64> {
    let (mut together, mut sidecars, mut most) = (0i64, 0i64, 0i64);
    for (class, container) in pod.containers() {
        let one = match each(container) {
            Some(one) => one,
            None if all && class != Class::Ephemeral => return None,
            None => 0,
        };
        match class {
            Class::Init => most = most.max(sidecars.saturating_add(one)),
            Class::Sidecar => {
                sidecars = sidecars.saturating_add(one);
                most = most.max(sidecars);
            }
            Class::Main => together = together.saturating_add(one),
            Class::Ephemeral => {}
        }
    }
    Some(most.max(together.saturating_add(sidecars)))
}

/// What a pod asks for, as the scheduler counts it: thousandths of a CPU for `cpu`, else units.
pub fn pod_request(pod: &Pod, name: &str) -> i64 {
    let units = |quantity: Quantity| if name == "cpu" { quantity.milli_value() } else { quantity.value() };
    let pod_level = request(pod.spec().resources.as_ref(), name).map(units);
    let sum = pod_level.or_else(|| {
        total(pod, false, |c| {
            let resources = c.resources.as_ref();
            request(resources, name).or_else(|| limit(resources, name)).map(units)
        })
    });
    sum.unwrap_or(0).saturating_add(overhead(pod, name).map_or(0, units))
}

/// What the pod takes beside its containers, as its RuntimeClass has it.
fn overhead(pod: &Pod, name: &str) -> Option<Quantity> {
    Quantity::try_from(pod.spec().overhead.as_ref()?.get(name)?).ok()
}

/// What a pod's containers may use together, as far as they are limited; `None` when none is.
pub fn pod_limit(pod: &Pod, name: &str) -> Option<i64> {
    let pod_level = limit(pod.spec().resources.as_ref(), name).map(Quantity::value);
    let sum = || total(pod, false, |c| limit(c.resources.as_ref(), name).map(Quantity::value));
    pod_level.or_else(sum).filter(|sum| *sum > 0)
}

/// Limits of the pod's own cgroup: only what all its containers are limited in.
pub fn of_pod(pod: &Pod) -> Resources {
    let limits = |name: &'static str, units: fn(Quantity) -> i64| {
        let pod_level = limit(pod.spec().resources.as_ref(), name).map(units);
        let sum =
            || total(pod, true, |c| limit(c.resources.as_ref(), name).map(units).filter(|value| *value > 0));
        let beside = overhead(pod, name).map_or(0, units);
        pod_level.or_else(sum).map(|limit| limit.saturating_add(beside))
    };
    let cpu_limit = limits("cpu", Quantity::milli_value);
    Resources {
        cpu_shares: Some(shares(pod_request(pod, "cpu"))),
        cpu_quota_us: cpu_limit.map(quota),
        cpu_period_us: cpu_limit.map(|_| QUOTA_PERIOD_US),
        memory_limit: limits("memory", Quantity::value),
        ..Resources::default()
    }
}

/// Whether the node or the cluster cannot do without the pod.
pub fn is_critical(pod: &Pod) -> bool {
    pod.is_static() || pod.spec().priority.is_some_and(|priority| priority >= SYSTEM_CRITICAL)
}

/// Who goes first when memory runs out: the more a container may use beyond its request, the sooner.
pub fn oom_score_adj(pod: &Pod, container: &core::Container, node_memory: u64) -> i32 {
    // Of the critical ones, those that only the cluster needs can start again somewhere else.
    if is_critical(pod) && pod.spec().priority_class_name.as_deref() == Some("system-node-critical") {
        return -997;
    }
    match qos_class(pod) {
        "Guaranteed" => return -997,
        "BestEffort" => return 1000,
        _ => {}
    }
    let memory =
        |c: &core::Container| request(c.resources.as_ref(), "memory").map_or(0, Quantity::value).max(0);
    let long_lived = || pod.containers().filter(|(class, _)| matches!(class, Class::Main | Class::Sidecar));
    let mut asked = memory(container);
    // A sidecar does not go before those that it serves.
    if long_lived().any(|(class, c)| class == Class::Sidecar && c.name == container.name) {
        asked = pod.spec().containers.iter().map(memory).min().unwrap_or(0).max(asked);
    }
    // What the pod asks for beyond its containers' requests is everybody's.
    if let Some(whole) = request(pod.spec().resources.as_ref(), "memory").map(Quantity::value) {
        let sum = total(pod, false, |c| Some(memory(c))).unwrap_or(0);
        let count = i64::try_from(long_lived().count()).unwrap_or(1).max(1);
        asked = asked.saturating_add(whole.saturating_sub(sum).max(0) / count);
    }
    let share = 1000 * i128::from(asked) / i128::from(node_memory.max(1));
    let score = i32::try_from(1000 - share).unwrap_or(0);
    // Below 3 would be the Guaranteed ones'; 1000 is BestEffort's.
    score.clamp(3, 999)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    fn with(resources: Value) -> Pod {
        pod(json!({"spec": {"containers": [{"name": "c", "resources": resources}]}}))
    }

    #[track_caller]
    fn check(resources: Value, class: &str, want: Resources) {
        let pod = with(resources);
        assert_eq!(qos_class(&pod), class);
        assert_eq!(of_container(&pod, &pod.spec().containers[0]), want);
    }

    #[test]
    fn limits_become_cgroup_values() {
        let shares = |n| Resources { cpu_shares: Some(n), oom_group: true, ..Resources::default() };
        check(
            json!({"limits": {"hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi"}}),
            "BestEffort",
            Resources {
                hugepages: [("2MB".to_owned(), 4 << 20), ("1GB".to_owned(), 1 << 30)].into(),
                ..shares(2)
            },
        );
        check(json!({}), "BestEffort", shares(2));
        check(json!({"requests": {"cpu": "500m"}}), "Burstable", shares(512));
        check(
            json!({"limits": {"cpu": "500m", "memory": "64Mi"}}),
            "Guaranteed",
            Resources {
                cpu_quota_us: Some(50_000),
                cpu_period_us: Some(100_000),
                memory_limit: Some(64 << 20),
                ..shares(512)
            },
        );
        check(
            json!({"limits": {"cpu": "1m"}}),
            "Burstable",
            Resources { cpu_quota_us: Some(1_000), cpu_period_us: Some(100_000), ..shares(2) },
        );
    }

    #[test]
    fn a_pod_is_limited_only_when_all_its_containers_are() {
        let both = pod(json!({"spec": {"containers": [
            {"name": "a", "resources": {"limits": {"memory": "1Mi"}}},
            {"name": "b", "resources": {"limits": {"memory": "2Mi", "cpu": "1"}}},
        ]}}));
        let limits = of_pod(&both);
        assert_eq!((limits.memory_limit, limits.cpu_quota_us), (Some(3 << 20), None));
        assert_eq!(cgroup("minke-x", &both), "minke-x/kubepods/burstable/podu-1");
        // What the pod takes itself comes on top of what its containers may, where that is limited.
        let beside = pod(json!({"spec": {
            "overhead": {"cpu": "100m", "memory": "1Mi"},
            "containers": [{"name": "a", "resources": {"limits": {"memory": "1Mi"}}}],
        }}));
        let limits = of_pod(&beside);
        assert_eq!((limits.memory_limit, limits.cpu_quota_us), (Some(2 << 20), None));
        assert_eq!(cgroup("m", &with(json!({"limits": {"cpu": 1, "memory": "1Mi"}}))), "m/kubepods/podu-1");
    }

    #[test]
    fn init_containers_count_when_they_need_more_than_the_rest() {
        let cpu = |n: &str| json!({"requests": {"cpu": n}});
        let pod = pod(json!({"spec": {
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "resources": cpu("1")},
                {"name": "i", "resources": cpu("3")},
            ],
            "containers": [{"name": "c", "resources": cpu("2")}],
            "overhead": {"cpu": "100m"},
        }}));
        assert_eq!(pod_request(&pod, "cpu"), 4_100);
    }

    #[test]
    fn what_a_pod_may_have_limits_its_containers() {
        let pod =
            pod(json!({"spec": {"resources": {"limits": {"cpu": "1", "memory": "8Mi"}}, "containers": [
            {"name": "a"}, {"name": "b", "resources": {"limits": {"memory": "2Mi"}}}]}}));
        let limits = |n: usize| {
            let limits = of_container(&pod, &pod.spec().containers[n]);
            (limits.memory_limit, limits.cpu_quota_us, limits.cpu_shares)
        };
        assert_eq!(limits(0), (Some(8 << 20), Some(100_000), Some(1024)));
        assert_eq!(limits(1), (Some(2 << 20), Some(100_000), Some(1024)));
    }

    #[test]
    fn sidecars_and_what_the_pod_asks_for_count_when_memory_runs_out() {
        let asking = |memory: &str| json!({"requests": {"memory": memory}});
        let scores = |whole: Value| {
            let pod = pod(json!({"spec": {"resources": whole,
                "initContainers": [{"name": "s", "restartPolicy": "Always", "resources": asking("128Mi")}],
                "containers": [{"name": "a", "resources": asking("256Mi")}, {"name": "b", "resources": asking("512Mi")}]}}));
            let score = |name: &str| {
                let (_, container) = pod.container(name).expect("a container");
                oom_score_adj(&pod, container, 1 << 30)
            };
            [score("a"), score("b"), score("s")]
        };
        assert_eq!(scores(json!({})), [750, 500, 750]);
        // 896 MiB is what they ask for together; 96 more are 32 for each.
        assert_eq!(scores(asking("992Mi")), [719, 469, 719]);
    }

    #[test]
    fn out_of_memory_scores_follow_the_class() {
        let score = |resources| {
            let pod = with(resources);
            oom_score_adj(&pod, &pod.spec().containers[0], 1 << 30)
        };
        assert_eq!(score(json!({})), 1000);
        assert_eq!(score(json!({"limits": {"cpu": 1, "memory": "1Mi"}})), -997);
        assert_eq!(score(json!({"requests": {"memory": "512Mi"}})), 500);
        assert_eq!(score(json!({"requests": {"memory": "10Gi"}})), 3);
        assert_eq!(score(json!({"requests": {"cpu": "1"}})), 999);
        for (class, want) in [("system-node-critical", -997), ("system-cluster-critical", 1000)] {
            let pod = pod(json!({"spec": {"priority": 2_000_000_000, "priorityClassName": class}}));
            assert_eq!(oom_score_adj(&pod, &pod.spec().containers[0], 1 << 30), want, "{class}");
        }
    }
}
