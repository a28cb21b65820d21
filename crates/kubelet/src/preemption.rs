//! Which pods make room for one that the node or the cluster cannot do without. Pure.
//!
//! Best-effort pods go before burstable ones and those before guaranteed ones; within a class as few as will do, and of
//! those that do equally well the one that asks for least. Upstream: pkg/kubelet/preemption.

use crate::pod::Pod;
use crate::resources;

/// Of the victim's status and event.
pub const REASON: &str = "Preempting";
pub const MESSAGE: &str = "Preempted in order to admit critical pod";
/// Of the victim's condition.
pub const DISRUPTION: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";

/// Something that the node has too little of, and how much is missing: thousandths of a CPU for `cpu`, else units.
#[derive(Debug, Clone, PartialEq)]
pub struct Missing {
    pub name: String,
    pub amount: i64,
}

/// What ending the pod gives back.
fn freed(pod: &Pod, name: &str) -> i64 {
    if name == "pods" { 1 } else { resources::pod_request(pod, name) }
}

fn without<'a>(missing: &[Missing], pods: impl Iterator<Item = &'a Pod> + Clone) -> Vec<Missing> {
    let rest = missing.iter().map(|missing| {
        let freed = pods.clone().fold(0i64, |sum, pod| sum.saturating_add(freed(pod, &missing.name)));
        Missing { amount: missing.amount.saturating_sub(freed), ..missing.clone() }
    });
    rest.filter(|missing| missing.amount > 0).collect()
}

/// How far from enough the pod's end is: 0 is enough, and each resource that it does nothing for counts 1.
fn distance(missing: &[Missing], pod: &Pod) -> f64 {
    let shares = missing.iter().map(|missing| {
        let rest = missing.amount.saturating_sub(freed(pod, &missing.name)).max(0);
        (rest as f64 / missing.amount as f64).powi(2)
    });
    shares.sum()
}

/// Takes pods until nothing is missing, each time the one that comes closest.
fn closest(mut pods: Vec<&Pod>, mut missing: Vec<Missing>) -> Vec<&Pod> {
    let mut taken = vec![];
    while !missing.is_empty() {
        let key = |pod: &Pod| (resources::pod_request(pod, "memory"), resources::pod_request(pod, "cpu"));
        let best = (0..pods.len()).min_by(|a, b| {
            let (one, other) = (pods[*a], pods[*b]);
            let closer = distance(&missing, one).total_cmp(&distance(&missing, other));
            // The youngest has lost least.
            closer
                .then_with(|| key(one).cmp(&key(other)))
                .then_with(|| other.object().created().cmp(&one.object().created()))
                .then_with(|| one.uid().cmp(other.uid()))
        });
        let Some(best) = best else { return taken };
        let pod = pods.swap_remove(best);
        missing = without(&missing, std::iter::once(pod));
        taken.push(pod);
    }
    taken
}

/// Whether `pod` may have the place of `other`.
fn may_replace(pod: &Pod, other: &Pod) -> bool {
    if resources::is_critical(pod) && !resources::is_critical(other) {
        return true;
    }
    matches!((pod.spec().priority, other.spec().priority), (Some(own), Some(theirs)) if own > theirs)
}

/// The pods that have to go so that `missing` is there; the error says what even their end would not give.
pub fn victims<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod>,
    missing: &[Missing],
) -> Result<Vec<&'a Pod>, String> {
    let all: Vec<&Pod> = others.filter(|other| may_replace(pod, other)).collect();
    let of = |class: &str| -> Vec<&Pod> {
        all.iter().copied().filter(|pod| resources::qos_class(pod) == class).collect()
    };
    let short = without(missing, all.iter().copied());
    if !short.is_empty() {
        let list: String = short.iter().map(|m| format!("(res: {}, q: {}), ", m.name, m.amount)).collect();
        return Err(format!("no set of running pods found to reclaim resources: [{list}]"));
    }
    let (best_effort, burstable) = (of("BestEffort"), of("Burstable"));
    let lesser = best_effort.iter().chain(&burstable).copied();
    let guaranteed = closest(of("Guaranteed"), without(missing, lesser));
    let known = best_effort.iter().chain(&guaranteed).copied();
    let burstable = closest(burstable, without(missing, known));
    let known = burstable.iter().chain(&guaranteed).copied();
    let best_effort = closest(best_effort, without(missing, known));
    Ok([best_effort, burstable, guaranteed].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    fn named(name: &str, priority: i32, resources: Value) -> Pod {
        let containers = json!([{"name": "c", "resources": resources}]);
        pod(json!({"metadata": {"name": name, "uid": name},
                   "spec": {"priority": priority, "containers": containers}}))
    }

    fn asking(cpu: &str, memory: &str) -> Value {
        json!({"requests": {"cpu": cpu, "memory": memory}})
    }

    fn limited(cpu: &str, memory: &str) -> Value {
        json!({"limits": {"cpu": cpu, "memory": memory}})
    }

    /// The pods of a node, some of each class.
    fn others() -> Vec<Pod> {
        vec![
            named("effort", 0, json!({})),
            named("burst", 0, asking("100m", "100Mi")),
            named("big-burst", 0, asking("300m", "300Mi")),
            named("sure", 0, limited("100m", "100Mi")),
            named("big-sure", 0, limited("300m", "300Mi")),
            named("critical", 2_000_000_000, limited("400m", "400Mi")),
        ]
    }

    #[track_caller]
    fn check(priority: i32, missing: &[(&str, i64)], want: Result<&[&str], &str>) {
        let missing: Vec<Missing> =
            missing.iter().map(|(name, amount)| Missing { name: (*name).into(), amount: *amount }).collect();
        let others = others();
        let got = victims(&named("new", priority, json!({})), others.iter(), &missing);
        let got = got.map(|pods| pods.iter().map(|pod| pod.name()).collect::<Vec<_>>());
        assert_eq!(got, want.map(<[&str]>::to_vec).map_err(str::to_owned));
    }

    const CRITICAL: i32 = 2_000_001_000;
    const MI: i64 = 1 << 20;

    #[test]
    fn as_few_as_will_do_and_the_least_of_them_go() {
        check(CRITICAL, &[], Ok(&[]));
        check(CRITICAL, &[("pods", 1)], Ok(&["effort"]));
        check(CRITICAL, &[("memory", 1)], Ok(&["burst"]));
        check(CRITICAL, &[("memory", 100 * MI)], Ok(&["burst"]));
        check(CRITICAL, &[("memory", 100 * MI + 1)], Ok(&["big-burst"]));
        check(CRITICAL, &[("memory", 301 * MI)], Ok(&["big-burst", "burst"]));
        // Guaranteed pods only for what all the others do not give, and the one that gives just that.
        check(CRITICAL, &[("memory", 450 * MI)], Ok(&["big-burst", "burst", "sure"]));
        check(CRITICAL, &[("memory", 600 * MI)], Ok(&["big-burst", "big-sure"]));
        check(CRITICAL, &[("pods", 1), ("cpu", 100)], Ok(&["burst"]));
        check(CRITICAL, &[("pods", 3), ("cpu", 300)], Ok(&["effort", "big-burst", "burst"]));
    }

    #[test]
    fn only_those_of_less_priority_go() {
        let all = "no set of running pods found to reclaim resources: [(res: memory, q: 1), ]";
        check(CRITICAL, &[("memory", 1200 * MI + 1)], Err(all));
        check(
            CRITICAL,
            &[("memory", 1200 * MI)],
            Ok(&["big-burst", "burst", "critical", "big-sure", "sure"]),
        );
        // Of the same priority: the critical one stays.
        let rest = "no set of running pods found to reclaim resources: [(res: cpu, q: 1), ]";
        check(2_000_000_000, &[("cpu", 801)], Err(rest));
    }

    #[test]
    fn a_static_pod_needs_no_priority() {
        let pods = others();
        let source = json!({crate::pod::SOURCE_ANNOTATION: "file"});
        let fixed = pod(json!({"metadata": {"annotations": source}}));
        let missing = [Missing { name: "pods".into(), amount: 1 }];
        let got = victims(&fixed, pods.iter(), &missing).expect("somebody");
        assert_eq!(got[0].name(), "effort");
        let all = Missing { name: "pods".into(), amount: 6 };
        assert!(victims(&fixed, pods.iter(), &[all]).is_err(), "critical pods make no room for it");
    }
}
