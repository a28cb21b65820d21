//! Where a pod goes: filter the nodes, score what is left, take the best. Pure.

use std::collections::{BTreeMap, BTreeSet};

use minke_api::Labels;
use rand::Rng;

use crate::picture::{Node, Picture, PodInfo};
use crate::plugins::{Normalize, Objection, PLUGINS, Prepared};

/// No node will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoFit {
    /// The sentence that users see in the event and the condition.
    pub message: String,
    /// What may help: bits of [`crate::plugins::wake`].
    pub helped_by: u8,
    /// Names of the plugins that objected, for the log.
    pub plugins: BTreeSet<&'static str>,
}

/// Nodes that are looked at before scoring begins, of `all` nodes: all of them up to a hundred, then a
/// falling share, as upstream's adaptive percentageOfNodesToScore.
fn enough(all: usize) -> usize {
    if all < 100 {
        return all;
    }
    let percent = 50usize.saturating_sub(all / 125).max(5);
    (all * percent / 100).max(100)
}

/// The name of the best node for the pod. `start` is where the round over the nodes begins, so that not
/// always the same ones are looked at; `rng` decides between equals.
pub fn decide<'p>(
    info: &PodInfo,
    picture: &'p Picture,
    namespaces: &BTreeMap<String, Labels>,
    start: usize,
    rng: &mut impl Rng,
) -> Result<&'p Node, NoFit> {
    let nodes: Vec<&Node> = picture.nodes().iter().filter(|node| node.exists).collect();
    if nodes.is_empty() {
        return Err(NoFit {
            message: "no nodes available to schedule pods".to_owned(),
            helped_by: crate::plugins::wake::NODE_ADDED,
            plugins: BTreeSet::new(),
        });
    }
    let pod = Prepared::new(info, picture, namespaces);
    let wanted = enough(nodes.len());
    let mut feasible = Vec::new();
    let mut objections = Vec::new();
    let mut helped_by = 0;
    let mut plugins = BTreeSet::new();
    for n in 0..nodes.len() {
        let node = nodes[(start + n) % nodes.len()];
        let objection = PLUGINS.iter().find_map(|plugin| {
            let objection = (plugin.filter?)(&pod, node)?;
            helped_by |= plugin.helped_by;
            plugins.insert(plugin.name);
            Some(objection)
        });
        match objection {
            Some(objection) => objections.push((node, objection)),
            None => feasible.push(node),
        }
        if feasible.len() == wanted {
            break;
        }
    }
    match feasible.as_slice() {
        [] => Err(NoFit { message: explain(info, nodes.len(), &objections), helped_by, plugins }),
        [only] => Ok(*only),
        _ => Ok(best(&pod, &feasible, rng)),
    }
}

fn best<'p>(pod: &Prepared, feasible: &[&'p Node], rng: &mut impl Rng) -> &'p Node {
    let mut totals = vec![0.0; feasible.len()];
    for plugin in PLUGINS {
        let Some((score, normalize, weight)) = plugin.score else { continue };
        let raw: Vec<f64> = feasible.iter().map(|node| score(pod, node)).collect();
        let max = raw.iter().copied().fold(f64::MIN, f64::max);
        let min = raw.iter().copied().fold(f64::MAX, f64::min);
        for (total, raw) in totals.iter_mut().zip(raw) {
            let score = match normalize {
                Normalize::As => raw,
                Normalize::Up if max <= 0.0 => 0.0,
                Normalize::Up => raw * 100.0 / max,
                Normalize::Down if max <= 0.0 => 100.0,
                Normalize::Down => 100.0 * (max - raw) / max,
                Normalize::Range if max <= min => 0.0,
                Normalize::Range => 100.0 * (raw - min) / (max - min),
            };
            *total += score.floor() * weight;
        }
    }
    let top = totals.iter().copied().fold(f64::MIN, f64::max);
    let ties: Vec<usize> = (0..totals.len()).filter(|at| totals[*at] == top).collect();
    feasible[ties[rng.random_range(0..ties.len())]]
}

/// The message of a pod that fits nowhere, in upstream's words.
fn explain(info: &PodInfo, nodes: usize, objections: &[(&Node, Objection)]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in objections.iter().flat_map(|(_, objection)| &objection.reasons) {
        *counts.entry(reason).or_default() += 1;
    }
    let list = |counts: &BTreeMap<&str, usize>| {
        let mut texts: Vec<String> =
            counts.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        texts.sort();
        texts.join(", ")
    };
    let mut message = format!("0/{nodes} nodes are available: {}.", list(&counts));
    if info.pod.spec.as_ref().and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never") {
        message.push_str(" preemption: not eligible due to preemptionPolicy=Never.");
        return message;
    }
    // Where a pod of lower priority could make room, nothing is claimed: preemption is not built yet.
    let could_preempt = objections
        .iter()
        .any(|(node, why)| !why.hopeless && node.pods.values().any(|pod| pod.priority < info.priority));
    if could_preempt {
        return message;
    }
    let hopeless = objections.iter().filter(|(_, objection)| objection.hopeless).count();
    let mut why = BTreeMap::new();
    for (reason, count) in [
        ("Preemption is not helpful for scheduling", hopeless),
        ("No preemption victims found for incoming pod", objections.len() - hopeless),
    ] {
        if count > 0 {
            why.insert(reason, count);
        }
    }
    message.push_str(&format!(" preemption: 0/{nodes} nodes are available: {}.", list(&why)));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::{node, pod};
    use rand::SeedableRng;
    use rand::rngs::SmallRng;
    use serde_json::{Value, json};

    fn picture(nodes: &[(&str, Value, Value)]) -> Picture {
        let mut picture = Picture::default();
        for (name, spec, labels) in nodes {
            picture.put_node(&node(name, spec.clone(), labels.clone()));
        }
        picture
    }

    fn place(picture: &Picture, spec: Value) -> Result<String, String> {
        let mut rng = SmallRng::seed_from_u64(1);
        decide(&pod("new", spec), picture, &BTreeMap::new(), 0, &mut rng)
            .map(|node| node.name.to_string())
            .map_err(|nofit| nofit.message)
    }

    fn asks(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[track_caller]
    fn check(picture: &Picture, spec: Value, want: Result<&str, &str>) {
        assert_eq!(place(picture, spec), want.map(str::to_owned).map_err(str::to_owned));
    }

    #[test]
    fn without_nodes_there_is_nowhere_to_go() {
        check(&Picture::default(), asks("1"), Err("no nodes available to schedule pods"));
    }

    #[test]
    fn what_does_not_fit_is_said_in_upstreams_words() {
        let one = picture(&[("n1", json!({}), json!({}))]);
        check(
            &one,
            asks("64"),
            Err("0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: \
                 1 Preemption is not helpful for scheduling."),
        );
        let mut busy = picture(&[("n1", json!({}), json!({}))]);
        busy.put_pod(pod("a", asks("3")), "n1");
        check(
            &busy,
            asks("2"),
            Err("0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: \
                 1 No preemption victims found for incoming pod."),
        );
        let mixed = picture(&[
            ("n1", json!({"unschedulable": true}), json!({})),
            ("n2", json!({"taints": [{"key": "a", "effect": "NoSchedule"}]}), json!({})),
            ("n3", json!({}), json!({})),
        ]);
        let mut spec = asks("1");
        spec["nodeSelector"] = json!({"disk": "ssd"});
        check(
            &mixed,
            spec,
            Err("0/3 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, \
                 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable. preemption: 0/3 nodes are \
                 available: 3 Preemption is not helpful for scheduling."),
        );
    }

    #[test]
    fn pods_of_one_owner_are_spread_over_nodes() {
        let mut two = picture(&[("n1", json!({}), json!({})), ("n2", json!({}), json!({}))]);
        two.put_pod(pod("a", asks("10m")), "n1");
        check(&two, asks("10m"), Ok("n2"));
    }

    #[test]
    fn host_ports_are_taken_once() {
        let spec = json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}]}]});
        let mut one = picture(&[("n1", json!({}), json!({}))]);
        check(&one, spec.clone(), Ok("n1"));
        one.put_pod(pod("a", spec.clone()), "n1");
        let message = place(&one, spec).unwrap_err();
        assert!(
            message.contains("1 node(s) didn't have free ports for the requested pod ports"),
            "{message}"
        );
    }

    #[test]
    fn anti_affinity_keeps_pods_apart_both_ways() {
        let spec = json!({"containers": [{"name": "c"}], "affinity": {"podAntiAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "web"}}}]}}});
        let mut two = picture(&[
            ("n1", json!({}), json!({"kubernetes.io/hostname": "n1"})),
            ("n2", json!({}), json!({"kubernetes.io/hostname": "n2"})),
        ]);
        two.put_pod(pod("a", spec.clone()), "n1");
        check(&two, spec.clone(), Ok("n2"));
        check(&two, asks("1"), Ok("n2"));
        two.put_pod(pod("b", asks("1")), "n2");
        let message = place(&two, spec).unwrap_err();
        assert!(message.contains("2 node(s) didn't match pod anti-affinity rules"), "{message}");
    }

    #[test]
    fn hard_spread_constraints_bound_the_skew() {
        let mut spec = asks("10m");
        spec["topologySpreadConstraints"] = json!([{"topologyKey": "zone", "maxSkew": 1,
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]);
        let mut two =
            picture(&[("n1", json!({}), json!({"zone": "a"})), ("n2", json!({}), json!({"zone": "b"}))]);
        two.put_pod(pod("a", asks("10m")), "n1");
        check(&two, spec.clone(), Ok("n2"));
        let nowhere = picture(&[("n1", json!({}), json!({}))]);
        let message = place(&nowhere, spec).unwrap_err();
        assert!(message.contains("(missing required label)"), "{message}");
    }

    #[test]
    fn large_clusters_are_sampled() {
        assert_eq!([50, 100, 1000, 5000, 10_000].map(enough), [50, 100, 420, 500, 500]);
    }
}
