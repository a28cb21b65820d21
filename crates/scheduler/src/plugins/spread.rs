//! PodTopologySpread: how unevenly alike pods may lie over the domains of a topology.

use std::sync::Arc;

use k8s_openapi::api::core::v1::TopologySpreadConstraint;
use minke_api::LabelSelector;

use super::{NO_SCORE, Objection, Prepared, Scoring};
use crate::affinity::{chooses_nodes, node_is_wanted, pod_selector, selector_text, tolerated};
use crate::picture::{Node, Picture, PodInfo};
use crate::profile::Profile;
use crate::tally::{Asked, Counts, KeyId};
use crate::workloads::Workloads;

const HOSTNAME: &str = "kubernetes.io/hostname";

/// A constraint of the pod, or one that the profile gives to pods without.
struct Constraint<'a> {
    of: &'a TopologySpreadConstraint,
    selector: LabelSelector,
    key: KeyId,
}

impl Constraint<'_> {
    fn honors(policy: Option<&String>, default: &str) -> bool {
        policy.map_or(default, String::as_str) == "Honor"
    }

    fn honors_affinity(&self) -> bool {
        Self::honors(self.of.node_affinity_policy.as_ref(), "Honor")
    }

    fn honors_taints(&self) -> bool {
        Self::honors(self.of.node_taints_policy.as_ref(), "Ignore")
    }

    fn counts_node(&self, info: &PodInfo, node: &Node) -> bool {
        let tolerations =
            info.pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default();
        let bears = || {
            let mut taints = node.taints.iter().filter(|taint| taint.effect != "PreferNoSchedule");
            taints.all(|taint| tolerated(tolerations, taint))
        };
        (!self.honors_affinity() || node_is_wanted(&info.pod, node)) && (!self.honors_taints() || bears())
    }

    /// The pods that match, by domain; only nodes for which `counts` holds are looked at, if there is such a
    /// condition: else the tally has the answer.
    fn counts(&self, info: &PodInfo, picture: &mut Picture, all: bool, keys: &[KeyId]) -> (usize, Places) {
        let tally = self.tally(info, picture);
        if all {
            return (tally, Places::All);
        }
        let mut own = Counts::default();
        let mut eligible = Vec::new();
        let topology = picture.tallies.topology(self.key);
        for slot in picture.known_order() {
            let has_all = keys.iter().all(|key| picture.tallies.topology(*key).domain(*slot) != 0);
            if has_all && self.counts_node(info, picture.node(*slot)) {
                let domain = topology.domain(*slot);
                own.add(domain, i64::from(picture.tallies.get(tally).at(*slot)));
                if eligible.len() <= domain as usize {
                    eligible.resize(domain as usize + 1, false);
                }
                eligible[domain as usize] = true;
            }
        }
        (tally, Places::Some { counts: own, eligible })
    }

    fn tally(&self, info: &PodInfo, picture: &mut Picture) -> usize {
        let namespace: Arc<str> = info.key().namespace.clone();
        let text = format!("s|{namespace}|{}", selector_text(&self.selector));
        let keys = [self.key];
        picture.tally(&text, &keys, || Asked::Spread { namespace, selector: self.selector.clone() })
    }
}

/// Where the counts of a constraint are.
enum Places {
    All,
    Some { counts: Counts, eligible: Vec<bool> },
}

/// The constraints of one kind that hold for the pod, and whether they are upstream's defaults.
fn constraints<'a>(
    info: &'a PodInfo,
    profile: &'a Profile,
    picture: &mut Picture,
    workloads: &Workloads,
    action: &str,
) -> Vec<Constraint<'a>> {
    let own = info.pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_deref());
    let own = own.unwrap_or_default();
    let wanted = |list: &'a [TopologySpreadConstraint]| -> Vec<&'a TopologySpreadConstraint> {
        list.iter().filter(|constraint| constraint.when_unsatisfiable == action).collect()
    };
    let mut found = Vec::new();
    if own.is_empty() {
        let defaults = wanted(&profile.args.spread.constraints);
        if defaults.is_empty() {
            return found;
        }
        let Some(selector) = workloads.selector_of(info) else { return found };
        for of in defaults {
            let key = picture.key_of(&of.topology_key);
            found.push(Constraint { of, selector: selector.clone(), key });
        }
        return found;
    }
    for of in wanted(own) {
        let mut spec = of.label_selector.clone();
        for key in of.match_label_keys.iter().flatten() {
            if let Some(value) = info.object.labels().get(key) {
                let expression = k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement {
                    key: key.clone(),
                    operator: "In".to_owned(),
                    values: Some(vec![value.to_owned()]),
                };
                spec.get_or_insert_default().match_expressions.get_or_insert_default().push(expression);
            }
        }
        let key = picture.key_of(&of.topology_key);
        found.push(Constraint { of, selector: pod_selector(spec.as_ref()), key });
    }
    found
}

/// Whether every node counts for every one of the constraints that has its key.
fn all_nodes_count(info: &PodInfo, picture: &Picture, constraints: &[Constraint]) -> bool {
    let nodes = picture.known_order().len() as u32;
    let all_have_all = constraints.len() < 2
        || constraints.iter().all(|c| picture.tallies.topology(c.key).nodes_with() == nodes);
    all_have_all
        && !constraints.iter().any(Constraint::honors_taints)
        && !(chooses_nodes(&info.pod) && constraints.iter().any(Constraint::honors_affinity))
}

/// DoNotSchedule: what rules nodes out.
#[derive(Default)]
pub struct Hard(Vec<HardConstraint>);

struct HardConstraint {
    key: KeyId,
    tally: usize,
    places: Places,
    max_skew: i64,
    min: i64,
    /// The pod itself will count.
    self_match: i64,
}

impl Hard {
    pub fn new(info: &PodInfo, profile: &Profile, picture: &mut Picture, workloads: &Workloads) -> Hard {
        let constraints = constraints(info, profile, picture, workloads, "DoNotSchedule");
        if constraints.is_empty() {
            return Hard(Vec::new());
        }
        let all = all_nodes_count(info, picture, &constraints);
        let keys: Vec<KeyId> = constraints.iter().map(|constraint| constraint.key).collect();
        let hard = constraints.iter().map(|constraint| {
            let (tally, places) = constraint.counts(info, picture, all, &keys);
            let topology = picture.tallies.topology(constraint.key);
            let counts = match &places {
                Places::All => picture.tallies.get(tally).counts(constraint.key),
                Places::Some { counts, .. } => counts,
            };
            let (mut domains, mut min) = (0, i64::from(i32::MAX));
            for (domain, nodes) in topology.nodes().iter().enumerate().skip(1) {
                let counted = match &places {
                    Places::All => *nodes > 0,
                    Places::Some { eligible, .. } => eligible.get(domain).copied().unwrap_or_default(),
                };
                if counted {
                    domains += 1;
                    min = min.min(i64::from(counts.at(domain as u32)));
                }
            }
            if domains < constraint.of.min_domains.unwrap_or(1) {
                min = 0;
            }
            let self_match = i64::from(constraint.selector.matches(info.object.labels()));
            let max_skew = i64::from(constraint.of.max_skew);
            HardConstraint { key: constraint.key, tally, places, max_skew, min, self_match }
        });
        Hard(hard.collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub fn filter(pod: &Prepared, picture: &Picture, node: &Node) -> Option<Objection> {
    for constraint in &pod.spread.0 {
        let domain = picture.tallies.topology(constraint.key).domain(node.slot);
        if domain == 0 {
            return Objection::one(
                "node(s) didn't match pod topology spread constraints (missing required label)",
                true,
            );
        }
        let here = match &constraint.places {
            Places::All => picture.tallies.get(constraint.tally).counts(constraint.key).at(domain),
            Places::Some { counts, .. } => counts.at(domain),
        };
        if i64::from(here) + constraint.self_match - constraint.min > constraint.max_skew {
            return Objection::one("node(s) didn't match pod topology spread constraints", false);
        }
    }
    None
}

/// ScheduleAnyway: how much each node is crowded, worked out for the nodes that passed the filters.
#[derive(Debug)]
pub struct Soft {
    /// In the order of the feasible nodes.
    crowding: Vec<i64>,
}

impl Soft {
    pub fn new(
        info: &PodInfo,
        profile: &Profile,
        picture: &mut Picture,
        workloads: &Workloads,
        feasible: &[u32],
    ) -> Option<Soft> {
        let constraints = constraints(info, profile, picture, workloads, "ScheduleAnyway");
        if constraints.is_empty() {
            return None;
        }
        let own = info.pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_ref());
        // With upstream's defaults, a node without a zone is still one to spread over.
        let all_keys = own.is_some_and(|own| !own.is_empty()) || !profile.args.spread.system;
        let keys: Vec<KeyId> =
            if all_keys { constraints.iter().map(|constraint| constraint.key).collect() } else { Vec::new() };
        let all = !chooses_nodes(&info.pod)
            && !constraints.iter().any(Constraint::honors_taints)
            && (!all_keys || all_nodes_count(info, picture, &constraints));
        let counted: Vec<(usize, Places)> = constraints
            .iter()
            .map(|constraint| {
                // On single nodes pods are counted whatever the policies say.
                let all = all || constraint.of.topology_key == HOSTNAME;
                constraint.counts(info, picture, all, &keys)
            })
            .collect();
        let ignored = |picture: &Picture, slot: u32| {
            keys.iter().any(|key| picture.tallies.topology(*key).domain(slot) == 0)
        };
        let scored = feasible.iter().filter(|slot| !ignored(picture, **slot)).count();
        let weights: Vec<f64> = constraints
            .iter()
            .map(|constraint| {
                let size = if constraint.of.topology_key == HOSTNAME {
                    scored
                } else {
                    let mut domains: Vec<u32> = feasible
                        .iter()
                        .filter(|slot| !ignored(picture, **slot))
                        .map(|slot| picture.tallies.topology(constraint.key).domain(*slot))
                        .collect();
                    domains.sort_unstable();
                    domains.dedup();
                    domains.len()
                };
                (size as f64 + 2.0).ln()
            })
            .collect();
        let mut crowding = Vec::with_capacity(feasible.len());
        for slot in feasible {
            if ignored(picture, *slot) {
                crowding.push(NO_SCORE);
                continue;
            }
            let mut sum = 0.0;
            for ((constraint, (tally, places)), weight) in constraints.iter().zip(&counted).zip(&weights) {
                let domain = picture.tallies.topology(constraint.key).domain(*slot);
                if domain == 0 {
                    continue;
                }
                let tally = picture.tallies.get(*tally);
                let here = match places {
                    _ if constraint.of.topology_key == HOSTNAME => tally.at(*slot),
                    Places::All => tally.counts(constraint.key).at(domain),
                    Places::Some { counts, .. } => counts.at(domain),
                };
                sum += f64::from(here) * weight + f64::from(constraint.of.max_skew - 1);
            }
            crowding.push(sum.round() as i64);
        }
        Some(Soft { crowding })
    }
}

pub fn score(_: &Prepared, scoring: &Scoring, _: &Picture, _: &Node, at: usize) -> i64 {
    scoring.spread.as_ref().and_then(|spread| spread.crowding.get(at)).copied().unwrap_or(NO_SCORE)
}
