//! The plugins: what rules a node out for a pod, and what speaks for it.
//!
//! One row each, with upstream's name, weight and words; the order is upstream's, and a node is ruled out
//! by the first plugin that objects. All are pure functions of the pod and the picture.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{TopologySpreadConstraint, WeightedPodAffinityTerm};
use minke_api::{LabelSelector, Labels};

use crate::affinity::{Term, node_is_wanted, pod_selector, term_matches, tolerated};
use crate::picture::{Node, Picture, PodInfo};

/// What may help a pod that found no node, as bits.
pub mod wake {
    pub const NODE_ADDED: u8 = 1;
    pub const NODE_ALLOCATABLE: u8 = 2;
    pub const NODE_LABELS: u8 = 4;
    pub const NODE_TAINTS: u8 = 8;
    pub const POD_GONE: u8 = 16;
    pub const POD_ADDED: u8 = 32;
}

/// Why a node was ruled out. `hopeless`: removing pods from it would not help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    pub reasons: Vec<String>,
    pub hopeless: bool,
}

impl Objection {
    fn one(reason: &str, hopeless: bool) -> Option<Objection> {
        Some(Objection { reasons: vec![reason.to_owned()], hopeless })
    }
}

/// How the raw scores of a plugin become 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    /// They are that already.
    As,
    /// The highest becomes 100.
    Up,
    /// The highest becomes 0.
    Down,
    /// The lowest becomes 0 and the highest 100.
    Range,
}

type Filter = fn(&Prepared, &Node) -> Option<Objection>;
type Score = fn(&Prepared, &Node) -> f64;

pub struct Plugin {
    pub name: &'static str,
    pub filter: Option<Filter>,
    pub score: Option<(Score, Normalize, f64)>,
    /// What may make a node acceptable that this plugin ruled out: bits of [`wake`].
    pub helped_by: u8,
}

impl Plugin {
    const PLAIN: Plugin = Plugin { name: "", filter: None, score: None, helped_by: wake::NODE_ADDED };
}

#[rustfmt::skip]
pub static PLUGINS: &[Plugin] = &[
    Plugin { name: "NodeUnschedulable", filter: Some(node_unschedulable), helped_by: wake::NODE_ADDED | wake::NODE_TAINTS, ..Plugin::PLAIN },
    Plugin { name: "NodeName", filter: Some(node_name), ..Plugin::PLAIN },
    Plugin { name: "TaintToleration", filter: Some(taints), score: Some((untolerated_preferences, Normalize::Down, 3.0)), helped_by: wake::NODE_ADDED | wake::NODE_TAINTS },
    Plugin { name: "NodeAffinity", filter: Some(node_affinity), score: Some((node_preference, Normalize::Up, 2.0)), helped_by: wake::NODE_ADDED | wake::NODE_LABELS },
    Plugin { name: "NodePorts", filter: Some(node_ports), helped_by: wake::NODE_ADDED | wake::POD_GONE, ..Plugin::PLAIN },
    Plugin { name: "NodeResourcesFit", filter: Some(fit), score: Some((least_allocated, Normalize::As, 1.0)), helped_by: wake::NODE_ADDED | wake::NODE_ALLOCATABLE | wake::POD_GONE },
    Plugin { name: "PodTopologySpread", filter: Some(spread), score: Some((crowding, Normalize::Down, 2.0)), helped_by: wake::NODE_ADDED | wake::NODE_LABELS | wake::NODE_TAINTS | wake::POD_GONE | wake::POD_ADDED },
    Plugin { name: "InterPodAffinity", filter: Some(inter_pod_affinity), score: Some((pod_preference, Normalize::Range, 2.0)), helped_by: wake::NODE_ADDED | wake::NODE_LABELS | wake::POD_GONE | wake::POD_ADDED },
    Plugin { name: "NodeResourcesBalancedAllocation", score: Some((balanced_allocation, Normalize::As, 1.0)), ..Plugin::PLAIN },
    Plugin { name: "ImageLocality", score: Some((image_locality, Normalize::As, 1.0)), ..Plugin::PLAIN },
];

/// A pod with everything worked out that is the same for all nodes.
pub struct Prepared<'a> {
    pub info: &'a PodInfo,
    nodes: f64,
    spread: Vec<Spread<'a>>,
    affinity: Vec<Affinity>,
    anti_affinity: Vec<Affinity>,
    /// Places (topology key and value) that pods already running keep this pod out of.
    kept_out: Vec<(String, String)>,
    /// Weights of places that preferred affinity, either way, speaks for or against.
    preferred: BTreeMap<(String, String), f64>,
    /// How many nodes have each of the pod's images.
    image_nodes: HashMap<String, f64>,
}

struct Spread<'a> {
    constraint: &'a TopologySpreadConstraint,
    /// Matching pods in each place that counts.
    counts: HashMap<String, i64>,
    /// The pod itself will count.
    self_match: i64,
    min: i64,
}

struct Affinity {
    topology_key: String,
    /// Values of the key where a matching pod is.
    places: Vec<String>,
    /// No pod anywhere matches, but the pod itself would: the first of a group may go anywhere.
    first_of_its_kind: bool,
}

impl<'a> Prepared<'a> {
    /// `namespaces` holds the labels of every namespace, for affinity terms that select by them.
    pub fn new(info: &'a PodInfo, picture: &Picture, namespaces: &BTreeMap<String, Labels>) -> Prepared<'a> {
        let spec = info.pod.spec.as_ref();
        let nodes: Vec<&Node> = picture.nodes().iter().filter(|node| node.exists).collect();
        let constraints =
            spec.and_then(|spec| spec.topology_spread_constraints.as_deref()).unwrap_or_default();
        let affinity = spec.and_then(|spec| spec.affinity.as_ref());
        let wants = affinity.and_then(|a| a.pod_affinity.as_ref());
        let shuns = affinity.and_then(|a| a.pod_anti_affinity.as_ref());
        let required = |terms: Option<&Vec<_>>| {
            let terms = terms.into_iter().flatten();
            terms.map(|term| Affinity::find(&Term::new(term, info, namespaces), info, &nodes)).collect()
        };
        let mut prepared = Prepared {
            info,
            nodes: nodes.len() as f64,
            spread: constraints.iter().map(|constraint| Spread::count(constraint, info, &nodes)).collect(),
            affinity: required(
                wants.and_then(|w| w.required_during_scheduling_ignored_during_execution.as_ref()),
            ),
            anti_affinity: required(
                shuns.and_then(|s| s.required_during_scheduling_ignored_during_execution.as_ref()),
            ),
            kept_out: Vec::new(),
            preferred: BTreeMap::new(),
            image_nodes: HashMap::new(),
        };
        let prefer = |terms: Option<&'a Vec<WeightedPodAffinityTerm>>, sign: f64| {
            let terms = terms.map_or(&[][..], Vec::as_slice).iter();
            terms
                .map(move |t| (Term::new(&t.pod_affinity_term, info, namespaces), sign * f64::from(t.weight)))
        };
        let preferred: Vec<(Term, f64)> =
            prefer(wants.and_then(|w| w.preferred_during_scheduling_ignored_during_execution.as_ref()), 1.0)
                .chain(prefer(
                    shuns.and_then(|s| s.preferred_during_scheduling_ignored_during_execution.as_ref()),
                    -1.0,
                ))
                .collect();
        for node in &nodes {
            for other in node.pods.values() {
                prepared.heed(other, node, namespaces);
                for (term, weight) in &preferred {
                    if let Some(value) = node.labels.get(&term.topology_key)
                        && term.matches(other)
                    {
                        let place = (term.topology_key.clone(), value.clone());
                        *prepared.preferred.entry(place).or_default() += weight;
                    }
                }
            }
            for container in spec.iter().flat_map(|spec| &spec.containers) {
                let image = normalized_image(container.image.as_deref().unwrap_or_default());
                if node.images.contains_key(&image) {
                    *prepared.image_nodes.entry(image).or_default() += 1.0;
                }
            }
        }
        prepared
    }

    /// Notes what a running pod's own required anti-affinity says of the new pod.
    fn heed(&mut self, other: &PodInfo, node: &Node, namespaces: &BTreeMap<String, Labels>) {
        let terms = other
            .pod
            .spec
            .as_ref()
            .and_then(|spec| spec.affinity.as_ref()?.pod_anti_affinity.as_ref())
            .and_then(|anti| anti.required_during_scheduling_ignored_during_execution.as_ref());
        for term in terms.into_iter().flatten() {
            let Some(value) = node.labels.get(&term.topology_key) else { continue };
            if Term::new(term, other, namespaces).matches(self.info) {
                self.kept_out.push((term.topology_key.clone(), value.clone()));
            }
        }
    }
}

impl Affinity {
    fn find(term: &Term, info: &PodInfo, nodes: &[&Node]) -> Affinity {
        let mut places: Vec<String> = nodes
            .iter()
            .filter(|node| node.pods.values().any(|pod| term.matches(pod)))
            .filter_map(|node| node.labels.get(&term.topology_key).cloned())
            .collect();
        places.sort_unstable();
        places.dedup();
        let first_of_its_kind = places.is_empty() && term.matches(info);
        Affinity { topology_key: term.topology_key.clone(), places, first_of_its_kind }
    }

    fn is_at(&self, node: &Node) -> bool {
        node.labels.get(&self.topology_key).is_some_and(|value| self.places.contains(value))
    }
}

impl<'a> Spread<'a> {
    fn count(constraint: &'a TopologySpreadConstraint, info: &PodInfo, nodes: &[&Node]) -> Spread<'a> {
        let mut spec = constraint.label_selector.clone();
        for key in constraint.match_label_keys.iter().flatten() {
            if let Some(value) = info.object.labels().get(key) {
                spec.get_or_insert_default()
                    .match_labels
                    .get_or_insert_default()
                    .insert(key.clone(), value.to_owned());
            }
        }
        let selector: LabelSelector = pod_selector(spec.as_ref());
        let honors = |policy: &Option<String>, default: &str| policy.as_deref().unwrap_or(default) == "Honor";
        let tolerations = info.pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
        let mut counts: HashMap<String, i64> = HashMap::new();
        for node in nodes {
            let Some(value) = node.labels.get(&constraint.topology_key) else { continue };
            let left_out = (honors(&constraint.node_affinity_policy, "Honor")
                && !node_is_wanted(&info.pod, node))
                || (honors(&constraint.node_taints_policy, "Ignore")
                    && node
                        .taints
                        .iter()
                        .any(|t| t.effect != "PreferNoSchedule" && !tolerated(tolerations, t)));
            if left_out {
                continue;
            }
            let here = node.pods.values().filter(|pod| {
                pod.object.namespace() == info.object.namespace()
                    && pod.object.deleted().is_none()
                    && selector.matches(pod.object.labels())
            });
            *counts.entry(value.clone()).or_default() += here.count() as i64;
        }
        let too_few = constraint.min_domains.is_some_and(|min| (counts.len() as i64) < i64::from(min));
        let min = if too_few { 0 } else { counts.values().copied().min().unwrap_or_default() };
        let self_match = i64::from(selector.matches(info.object.labels()));
        Spread { constraint, counts, self_match, min }
    }
}

fn node_unschedulable(pod: &Prepared, node: &Node) -> Option<Objection> {
    if !node.unschedulable {
        return None;
    }
    let taint = k8s_openapi::api::core::v1::Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Default::default()
    };
    let tolerations = pod.info.pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    if tolerated(tolerations, &taint) { None } else { Objection::one("node(s) were unschedulable", true) }
}

fn node_name(pod: &Prepared, node: &Node) -> Option<Objection> {
    match pod.info.node_name() {
        "" => None,
        name if name == &*node.name => None,
        _ => Objection::one("node(s) didn't match the requested node name", true),
    }
}

fn taints(pod: &Prepared, node: &Node) -> Option<Objection> {
    let tolerations = pod.info.pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    let mut binding = node.taints.iter().filter(|taint| taint.effect != "PreferNoSchedule");
    if binding.all(|taint| tolerated(tolerations, taint)) {
        return None;
    }
    Objection::one("node(s) had untolerated taint(s)", true)
}

fn untolerated_preferences(pod: &Prepared, node: &Node) -> f64 {
    let tolerations = pod.info.pod.spec.as_ref().and_then(|s| s.tolerations.as_deref()).unwrap_or_default();
    let soft = node.taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
    soft.filter(|taint| !tolerated(tolerations, taint)).count() as f64
}

fn node_affinity(pod: &Prepared, node: &Node) -> Option<Objection> {
    if node_is_wanted(&pod.info.pod, node) {
        return None;
    }
    Objection::one("node(s) didn't match Pod's node affinity/selector", true)
}

fn node_preference(pod: &Prepared, node: &Node) -> f64 {
    let terms = pod
        .info
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref())
        .and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    let holding = terms.into_iter().flatten().filter(|term| term_matches(&term.preference, node));
    holding.map(|term| f64::from(term.weight)).sum()
}

fn node_ports(pod: &Prepared, node: &Node) -> Option<Objection> {
    let clash =
        pod.info.host_ports.iter().any(|port| node.host_ports.iter().any(|taken| port.clashes(taken)));
    if clash {
        Objection::one("node(s) didn't have free ports for the requested pod ports", false)
    } else {
        None
    }
}

fn fit(pod: &Prepared, node: &Node) -> Option<Objection> {
    let mut reasons = Vec::new();
    let mut hopeless = false;
    if node.pods.len() as i64 + 1 > node.pods_max {
        reasons.push("Too many pods".to_owned());
    }
    let (asked, used, has) = (&pod.info.requests, &node.used, &node.allocatable);
    let mut check = |name: &str, asked: i64, used: i64, has: i64| {
        if asked > 0 && asked > has - used {
            reasons.push(format!("Insufficient {name}"));
            hopeless |= asked > has;
        }
    };
    check("cpu", asked.cpu_milli, used.cpu_milli, has.cpu_milli);
    check("memory", asked.memory, used.memory, has.memory);
    check("ephemeral-storage", asked.ephemeral_storage, used.ephemeral_storage, has.ephemeral_storage);
    for (name, amount) in &asked.extended {
        let of = |list: &crate::resources::Resources| list.extended.get(name).copied().unwrap_or_default();
        check(name, *amount, of(used), of(has));
    }
    if reasons.is_empty() { None } else { Some(Objection { reasons, hopeless }) }
}

/// CPU and memory that would be taken and that there is, as scoring counts them.
fn shares(pod: &Prepared, node: &Node) -> [(f64, f64); 2] {
    let cpu = (node.scored.0 + pod.info.scored.0, node.allocatable.cpu_milli);
    let memory = (node.scored.1 + pod.info.scored.1, node.allocatable.memory);
    [cpu, memory].map(|(taken, has)| (taken as f64, has as f64))
}

fn least_allocated(pod: &Prepared, node: &Node) -> f64 {
    let scores = shares(pod, node).map(|(taken, has)| {
        if has <= 0.0 || taken > has { 0.0 } else { ((has - taken) * 100.0 / has).floor() }
    });
    scores.iter().sum::<f64>() / scores.len() as f64
}

fn balanced_allocation(pod: &Prepared, node: &Node) -> f64 {
    let [cpu, memory] =
        shares(pod, node).map(|(taken, has)| if has <= 0.0 { 1.0 } else { (taken / has).min(1.0) });
    // The standard deviation of two numbers is half of their distance.
    ((1.0 - (cpu - memory).abs() / 2.0) * 100.0).floor()
}

fn spread(pod: &Prepared, node: &Node) -> Option<Objection> {
    for spread in pod.spread.iter().filter(|s| s.constraint.when_unsatisfiable == "DoNotSchedule") {
        let Some(value) = node.labels.get(&spread.constraint.topology_key) else {
            return Objection::one(
                "node(s) didn't match pod topology spread constraints (missing required label)",
                true,
            );
        };
        let here = spread.counts.get(value).copied().unwrap_or_default();
        if here + spread.self_match - spread.min > i64::from(spread.constraint.max_skew) {
            return Objection::one("node(s) didn't match pod topology spread constraints", false);
        }
    }
    None
}

/// How many alike pods there are where the node is; without constraints of its own, a pod is spread over
/// nodes by its owner, as upstream's default constraint on kubernetes.io/hostname does.
fn crowding(pod: &Prepared, node: &Node) -> f64 {
    let weight = |places: usize| (places as f64 + 2.0).ln();
    if pod.info.pod.spec.as_ref().is_none_or(|spec| spec.topology_spread_constraints.is_none()) {
        let alike = pod.info.owner().and_then(|owner| node.by_owner.get(owner)).copied().unwrap_or_default();
        return f64::from(alike) * (pod.nodes + 2.0).ln();
    }
    let soft = pod.spread.iter().filter(|s| s.constraint.when_unsatisfiable == "ScheduleAnyway");
    soft.map(|spread| {
        let value = node.labels.get(&spread.constraint.topology_key);
        let here = value.and_then(|value| spread.counts.get(value)).copied().unwrap_or_default();
        here as f64 * weight(spread.counts.len()) + f64::from(spread.constraint.max_skew - 1)
    })
    .sum::<f64>()
    .round()
}

fn inter_pod_affinity(pod: &Prepared, node: &Node) -> Option<Objection> {
    let wanted = pod.affinity.iter().all(|affinity| {
        node.labels.contains_key(&affinity.topology_key)
            && (affinity.is_at(node) || affinity.first_of_its_kind)
    });
    if !wanted {
        return Objection::one("node(s) didn't match pod affinity rules", true);
    }
    if pod.anti_affinity.iter().any(|affinity| affinity.is_at(node)) {
        return Objection::one("node(s) didn't match pod anti-affinity rules", false);
    }
    if pod.kept_out.iter().any(|(key, value)| node.labels.get(key) == Some(value)) {
        return Objection::one("node(s) didn't satisfy existing pods anti-affinity rules", false);
    }
    None
}

fn pod_preference(pod: &Prepared, node: &Node) -> f64 {
    let here = pod.preferred.iter().filter(|((key, value), _)| node.labels.get(key) == Some(value));
    here.map(|(_, weight)| weight).sum()
}

/// Image names on nodes carry a tag; a name without one means `latest`.
fn normalized_image(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or_default();
    if last.contains(':') || image.contains('@') { image.to_owned() } else { format!("{image}:latest") }
}

fn image_locality(pod: &Prepared, node: &Node) -> f64 {
    const MIN: f64 = 23.0 * 1024.0 * 1024.0;
    const MAX_PER_CONTAINER: f64 = 1000.0 * 1024.0 * 1024.0;
    let containers = pod.info.pod.spec.as_ref().map_or(&[][..], |spec| &spec.containers);
    let present: f64 = containers
        .iter()
        .filter_map(|container| {
            let image = normalized_image(container.image.as_deref().unwrap_or_default());
            let size = *node.images.get(&image)? as f64;
            Some(
                (size * pod.image_nodes.get(&image).copied().unwrap_or_default() / pod.nodes.max(1.0))
                    .floor(),
            )
        })
        .sum();
    let max = MAX_PER_CONTAINER * containers.len() as f64;
    ((present.clamp(MIN, max.max(MIN)) - MIN) * 100.0 / (max - MIN).max(1.0)).floor()
}
