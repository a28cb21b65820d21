//! The plugins against a slow and obvious reading of their rules: everything is counted anew for each pod, node by
//! node, from the objects themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use serde_json::{Value, json};

use super::random::{Random, node, object, workloads};
use crate::affinity::pod_selector;
use crate::decide::{Try, World, feasible, totals};
use crate::picture::PodInfo;
use crate::plugins::Curve;
use crate::profile::{Profile, SpreadArgs, Strategy};

/// A cluster as plain values: nodes, pods with the index of their node, labels of namespaces.
struct Plain {
    nodes: Vec<core::Node>,
    pods: Vec<(core::Pod, usize)>,
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
}

type Labels = BTreeMap<String, String>;

fn labels(node: &core::Node) -> &Labels {
    static NONE: Labels = Labels::new();
    node.metadata.labels.as_ref().unwrap_or(&NONE)
}

fn spec(pod: &core::Pod) -> &core::PodSpec {
    pod.spec.as_ref().unwrap()
}

fn namespace(pod: &core::Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap()
}

fn amount(
    list: Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>,
    name: &str,
) -> i64 {
    let Some(text) = list.and_then(|list| list.get(name)) else { return 0 };
    let quantity = Quantity::parse(&text.0).unwrap();
    if name == "cpu" { quantity.milli_value() } else { quantity.value() }
}

/// What a pod asks for of one resource; `scored` counts what is not asked for as upstream's defaults.
fn asks(pod: &core::Pod, name: &str, scored: bool) -> i64 {
    let of = |container: &core::Container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        if scored && requests.is_none_or(|requests| !requests.contains_key(name)) {
            return match name {
                "cpu" => 100,
                "memory" => 200 << 20,
                _ => 0,
            };
        }
        amount(requests, name)
    };
    // The random pods have sidecars and no other init containers: all run at once.
    let containers = spec(pod).containers.iter().chain(spec(pod).init_containers.iter().flatten());
    containers.map(of).sum::<i64>() + amount(spec(pod).overhead.as_ref(), name)
}

fn allocatable(node: &core::Node, name: &str) -> i64 {
    amount(node.status.as_ref().unwrap().allocatable.as_ref(), name)
}

impl Plain {
    fn on(&self, n: usize) -> impl Iterator<Item = &core::Pod> {
        self.pods.iter().filter(move |(_, at)| *at == n).map(|(pod, _)| pod)
    }

    fn tolerates(pod: &core::Pod, taint: &core::Taint) -> bool {
        spec(pod).tolerations.iter().flatten().any(|toleration| {
            let same = |field: &Option<String>, want: &str| {
                field.as_deref().is_none_or(|field| field.is_empty() || field == want)
            };
            same(&toleration.effect, &taint.effect)
                && same(&toleration.key, &taint.key)
                && (toleration.operator.as_deref() == Some("Exists")
                    || toleration.value.as_deref().unwrap_or_default()
                        == taint.value.as_deref().unwrap_or_default())
        })
    }

    fn bears(pod: &core::Pod, node: &core::Node, effects: &[&str]) -> usize {
        let taints = node.spec.as_ref().unwrap().taints.iter().flatten();
        taints
            .filter(|taint| effects.contains(&taint.effect.as_str()) && !Self::tolerates(pod, taint))
            .count()
    }

    fn requirement(requirement: &core::NodeSelectorRequirement, labels: &Labels) -> bool {
        let have = labels.get(&requirement.key);
        let values = requirement.values.clone().unwrap_or_default();
        let numbers = || Some((have?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
        match requirement.operator.as_str() {
            "In" => have.is_some_and(|have| values.contains(have)),
            "NotIn" => have.is_none_or(|have| !values.contains(have)),
            "Exists" => have.is_some(),
            "DoesNotExist" => have.is_none(),
            "Gt" => numbers().is_some_and(|(have, want)| have > want),
            _ => numbers().is_some_and(|(have, want)| have < want),
        }
    }

    fn wants(pod: &core::Pod, node: &core::Node) -> bool {
        let selected =
            spec(pod).node_selector.iter().flatten().all(|(key, value)| labels(node).get(key) == Some(value));
        let affinity = spec(pod).affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        selected
            && required.is_none_or(|required| {
                required.node_selector_terms.iter().any(|term| {
                    term.match_expressions.iter().flatten().all(|r| Self::requirement(r, labels(node)))
                })
            })
    }

    /// Whether `other` is one that the term of `pod` is about.
    fn matches(&self, term: &core::PodAffinityTerm, pod: &core::Pod, other: &core::Pod) -> bool {
        let named = term.namespaces.clone().unwrap_or_default();
        let in_namespace = match &term.namespace_selector {
            None if named.is_empty() => namespace(other) == namespace(pod),
            None => named.iter().any(|name| name == namespace(other)),
            Some(selector) => {
                let labels = self.namespaces.get(namespace(other));
                named.iter().any(|name| name == namespace(other))
                    || pod_selector(Some(selector)).matches_map(labels)
            }
        };
        in_namespace && pod_selector(term.label_selector.as_ref()).matches_map(other.metadata.labels.as_ref())
    }

    fn terms(pod: &core::Pod, anti: bool) -> Vec<core::PodAffinityTerm> {
        let affinity = spec(pod).affinity.as_ref();
        let terms = if anti {
            affinity.and_then(|a| {
                a.pod_anti_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.clone()
            })
        } else {
            affinity.and_then(|a| {
                a.pod_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.clone()
            })
        };
        terms.unwrap_or_default()
    }

    fn weighted(pod: &core::Pod) -> Vec<(core::PodAffinityTerm, i64)> {
        let affinity = spec(pod).affinity.as_ref();
        let liked = affinity.and_then(|a| {
            a.pod_affinity.as_ref()?.preferred_during_scheduling_ignored_during_execution.clone()
        });
        let shunned = affinity.and_then(|a| {
            a.pod_anti_affinity.as_ref()?.preferred_during_scheduling_ignored_during_execution.clone()
        });
        let sign = |terms: Option<Vec<core::WeightedPodAffinityTerm>>, sign: i64| {
            terms
                .unwrap_or_default()
                .into_iter()
                .map(move |t| (t.pod_affinity_term, sign * i64::from(t.weight)))
        };
        sign(liked, 1).chain(sign(shunned, -1)).collect()
    }

    /// Whether two nodes are in the same place.
    fn together(&self, a: usize, b: usize, key: &str) -> bool {
        let at = |n: usize| labels(&self.nodes[n]).get(key);
        at(a).is_some() && at(a) == at(b)
    }

    fn constraints(
        &self,
        pod: &core::Pod,
        profile: &Profile,
        when: &str,
    ) -> Vec<(core::TopologySpreadConstraint, minke_api::LabelSelector)> {
        let own = spec(pod).topology_spread_constraints.clone().unwrap_or_default();
        if own.is_empty() {
            let mut pairs = Labels::new();
            let has = |key: &str, value: &str| {
                pod.metadata.labels.as_ref().unwrap().get(key).is_some_and(|v| v == value)
            };
            if namespace(pod) == "one" && has("tier", "front") {
                pairs.insert("tier".to_owned(), "front".to_owned());
            }
            let mut text: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}={v}")).collect();
            if pod.metadata.owner_references.is_some() {
                text.push("app in (a,b)".to_owned());
            }
            if text.is_empty() {
                return Vec::new();
            }
            let selector = minke_api::LabelSelector::parse(&text.join(",")).unwrap();
            let defaults = profile.args.spread.constraints.iter().filter(|c| c.when_unsatisfiable == when);
            return defaults.map(|c| (c.clone(), selector.clone())).collect();
        }
        own.into_iter()
            .filter(|c| c.when_unsatisfiable == when)
            .map(|c| {
                let mut selector = c.label_selector.clone().unwrap_or_default();
                for key in c.match_label_keys.iter().flatten() {
                    if let Some(value) = pod.metadata.labels.as_ref().unwrap().get(key) {
                        selector.match_labels.get_or_insert_default().insert(key.clone(), value.clone());
                    }
                }
                (c, pod_selector(Some(&selector)))
            })
            .collect()
    }

    fn counted(&self, pod: &core::Pod, selector: &minke_api::LabelSelector, n: usize) -> i64 {
        self.on(n)
            .filter(|other| {
                namespace(other) == namespace(pod) && selector.matches_map(other.metadata.labels.as_ref())
            })
            .count() as i64
    }

    fn included(&self, constraint: &core::TopologySpreadConstraint, pod: &core::Pod, n: usize) -> bool {
        let node = &self.nodes[n];
        (constraint.node_affinity_policy.as_deref() == Some("Ignore") || Self::wants(pod, node))
            && (constraint.node_taints_policy.as_deref() != Some("Honor")
                || Self::bears(pod, node, &["NoSchedule", "NoExecute"]) == 0)
    }

    fn spread_allows(&self, pod: &core::Pod, profile: &Profile, n: usize) -> bool {
        let constraints = self.constraints(pod, profile, "DoNotSchedule");
        let has_all =
            |n: usize| constraints.iter().all(|(c, _)| labels(&self.nodes[n]).contains_key(&c.topology_key));
        has_all(n)
            && constraints.iter().all(|(constraint, selector)| {
                let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
                for other in (0..self.nodes.len())
                    .filter(|other| has_all(*other) && self.included(constraint, pod, *other))
                {
                    *counts.entry(&labels(&self.nodes[other])[&constraint.topology_key]).or_default() +=
                        self.counted(pod, selector, other);
                }
                let least = if (counts.len() as i64) < i64::from(constraint.min_domains.unwrap_or(1)) {
                    0
                } else {
                    counts.values().copied().min().unwrap_or(i64::from(i32::MAX))
                };
                let here = counts
                    .get(labels(&self.nodes[n])[&constraint.topology_key].as_str())
                    .copied()
                    .unwrap_or_default();
                let own = i64::from(selector.matches_map(pod.metadata.labels.as_ref()));
                here + own - least <= i64::from(constraint.max_skew)
            })
    }

    fn affinity_allows(&self, pod: &core::Pod, n: usize) -> bool {
        let wanted = Self::terms(pod, false);
        let has_keys = wanted.iter().all(|term| labels(&self.nodes[n]).contains_key(&term.topology_key));
        let all = |other: &core::Pod| wanted.iter().all(|term| self.matches(term, pod, other));
        let met = wanted.iter().all(|term| {
            self.pods.iter().any(|(other, at)| all(other) && self.together(*at, n, &term.topology_key))
        });
        let nobody = !self.pods.iter().any(|(other, at)| {
            all(other) && wanted.iter().any(|term| labels(&self.nodes[*at]).contains_key(&term.topology_key))
        });
        let affine = wanted.is_empty() || (has_keys && (met || (nobody && all(pod))));
        let shuns = |a: &core::Pod, b: &core::Pod, at: usize| {
            Self::terms(a, true)
                .iter()
                .any(|term| self.matches(term, a, b) && self.together(at, n, &term.topology_key))
        };
        affine && !self.pods.iter().any(|(other, at)| shuns(pod, other, *at) || shuns(other, pod, *at))
    }

    fn allows(&self, pod: &core::Pod, profile: &Profile, n: usize) -> bool {
        let node = &self.nodes[n];
        let node_spec = node.spec.as_ref().unwrap();
        let cordon: core::Taint = serde_json::from_value(
            json!({ "key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule" }),
        )
        .unwrap();
        let ports = |pod: &core::Pod| -> Vec<(String, i32)> {
            let ports = spec(pod).containers.iter().flat_map(|c| c.ports.clone().unwrap_or_default());
            ports.map(|port| (port.host_ip.unwrap_or_default(), port.host_port.unwrap())).collect()
        };
        let clash = |a: &(String, i32), b: &(String, i32)| {
            a.1 == b.1 && (a.0.is_empty() || b.0.is_empty() || a.0 == b.0)
        };
        let fits = ["cpu", "memory", "ephemeral-storage", "example.com/gpu"].iter().all(|name| {
            let asked = asks(pod, name, false);
            asked == 0
                || asked + self.on(n).map(|other| asks(other, name, false)).sum::<i64>()
                    <= allocatable(node, name)
        });
        (node_spec.unschedulable != Some(true) || Self::tolerates(pod, &cordon))
            && Self::bears(pod, node, &["NoSchedule", "NoExecute"]) == 0
            && Self::wants(pod, node)
            && !self.on(n).any(|other| {
                ports(other).iter().any(|taken| ports(pod).iter().any(|port| clash(taken, port)))
            })
            && (self.on(n).count() as i64) < allocatable(node, "pods")
            && fits
            && self.spread_allows(pod, profile, n)
            && self.affinity_allows(pod, n)
    }

    fn fit_score(&self, pod: &core::Pod, profile: &Profile, n: usize) -> i64 {
        let fit = &profile.args.fit;
        let (mut sum, mut weights) = (0, 0);
        for (name, weight) in &fit.resources {
            let (has, asked) = (allocatable(&self.nodes[n], name), asks(pod, name, true));
            if has == 0 || (asked == 0 && name.contains('/')) {
                continue;
            }
            let taken = asked + self.on(n).map(|other| asks(other, name, true)).sum::<i64>();
            let score = match &fit.strategy {
                Strategy::LeastAllocated => {
                    if taken > has {
                        0
                    } else {
                        (has - taken) * 100 / has
                    }
                }
                Strategy::MostAllocated => taken.min(has) * 100 / has,
                Strategy::RequestedToCapacityRatio(curve) => {
                    curve.at(if taken > has { 100 } else { taken * 100 / has })
                }
            };
            if score > 0 || !matches!(fit.strategy, Strategy::RequestedToCapacityRatio(_)) {
                sum += score * weight;
                weights += weight;
            }
        }
        match (&fit.strategy, weights) {
            (_, 0) => 0,
            (Strategy::RequestedToCapacityRatio(_), _) => (sum as f64 / weights as f64).round() as i64,
            _ => sum / weights,
        }
    }

    fn balance_score(&self, pod: &core::Pod, n: usize) -> i64 {
        let share = |name: &str| {
            let taken =
                asks(pod, name, false) + self.on(n).map(|other| asks(other, name, false)).sum::<i64>();
            (taken as f64 / allocatable(&self.nodes[n], name) as f64).min(1.0)
        };
        if asks(pod, "cpu", false) == 0 && asks(pod, "memory", false) == 0 {
            return 0;
        }
        ((1.0 - ((share("cpu") - share("memory")) / 2.0).abs()) * 100.0) as i64
    }

    fn image_score(&self, pod: &core::Pod, n: usize) -> i64 {
        let size = |n: usize, image: &str| {
            let mut images = self.nodes[n].status.as_ref().unwrap().images.iter().flatten();
            images.find(|i| i.names.iter().flatten().any(|name| name == image)).and_then(|i| i.size_bytes)
        };
        let containers: Vec<&core::Container> =
            spec(pod).containers.iter().chain(spec(pod).init_containers.iter().flatten()).collect();
        let mut sum = 0;
        for container in &containers {
            let image = container.image.clone().unwrap();
            let image = if image.contains(':') { image } else { format!("{image}:latest") };
            let have = (0..self.nodes.len()).filter(|n| size(*n, &image).is_some()).count();
            if let Some(size) = size(n, &image) {
                sum += (size as f64 * (have as f64 / self.nodes.len() as f64)) as i64;
            }
        }
        let (min, max) = (23 << 20, (1000 << 20) * containers.len() as i64);
        100 * (sum.clamp(min, max) - min) / (max - min)
    }

    fn pod_score(&self, pod: &core::Pod, profile: &Profile, n: usize) -> i64 {
        let mut score = 0;
        for (other, at) in &self.pods {
            for (term, weight) in Self::weighted(pod) {
                score += if self.matches(&term, pod, other) && self.together(*at, n, &term.topology_key) {
                    weight
                } else {
                    0
                };
            }
            let required = Self::terms(other, false)
                .into_iter()
                .map(|term| (term, profile.args.hard_pod_affinity_weight));
            for (term, weight) in Self::weighted(other).into_iter().chain(required) {
                score += if self.matches(&term, other, pod) && self.together(*at, n, &term.topology_key) {
                    weight
                } else {
                    0
                };
            }
        }
        score
    }

    /// Crowding of each feasible node; none for nodes that are left out.
    fn crowding(&self, pod: &core::Pod, profile: &Profile, feasible: &[usize]) -> Vec<Option<i64>> {
        let constraints = self.constraints(pod, profile, "ScheduleAnyway");
        let own = spec(pod).topology_spread_constraints.as_ref().is_some_and(|own| !own.is_empty());
        let all_keys = own || !profile.args.spread.system;
        let kept = |n: usize| {
            !all_keys || constraints.iter().all(|(c, _)| labels(&self.nodes[n]).contains_key(&c.topology_key))
        };
        let mut sums = vec![0.0; feasible.len()];
        for (constraint, selector) in &constraints {
            let key = constraint.topology_key.as_str();
            let hostname = key == "kubernetes.io/hostname";
            let value = |n: usize| labels(&self.nodes[n]).get(key);
            let scored: Vec<usize> = feasible.iter().copied().filter(|n| kept(*n)).collect();
            let size = if hostname {
                scored.len()
            } else {
                scored.iter().map(|n| value(*n)).collect::<BTreeSet<_>>().len()
            };
            for (sum, n) in sums.iter_mut().zip(feasible) {
                let Some(here) = value(*n) else { continue };
                let count: i64 = if hostname {
                    self.counted(pod, selector, *n)
                } else {
                    let same = (0..self.nodes.len()).filter(|other| {
                        kept(*other) && value(*other) == Some(here) && self.included(constraint, pod, *other)
                    });
                    same.map(|other| self.counted(pod, selector, other)).sum()
                };
                *sum += count as f64 * (size as f64 + 2.0).ln() + f64::from(constraint.max_skew - 1);
            }
        }
        feasible.iter().zip(sums).map(|(n, sum)| kept(*n).then_some(sum.round() as i64)).collect()
    }

    /// The total score of each feasible node, up to what is the same for all of them.
    fn totals(&self, pod: &core::Pod, profile: &Profile, feasible: &[usize]) -> Vec<i64> {
        let weight = |name: &str| {
            let found = profile.scores.iter().find(|(row, _)| crate::plugins::PLUGINS[*row].name == name);
            found.map_or(0, |(_, weight)| *weight)
        };
        let mut totals = vec![0; feasible.len()];
        let mut add = |scores: Vec<i64>, weight: i64| {
            for (total, score) in totals.iter_mut().zip(scores) {
                *total += score * weight;
            }
        };
        let all = |score: &dyn Fn(usize) -> i64| -> Vec<i64> { feasible.iter().map(|n| score(*n)).collect() };
        let up = |scores: Vec<i64>| {
            let max = scores.iter().copied().max().unwrap();
            scores.iter().map(|s| if max == 0 { *s } else { 100 * s / max }).collect::<Vec<_>>()
        };
        let taints = all(&|n| Self::bears(pod, &self.nodes[n], &["PreferNoSchedule"]) as i64);
        add(up(taints).iter().map(|score| 100 - score).collect(), weight("TaintToleration"));
        let affinity = spec(pod).affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
        let preferred = affinity
            .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.clone())
            .unwrap_or_default();
        let liked = all(&|n| {
            let holds = |term: &&core::PreferredSchedulingTerm| {
                term.preference
                    .match_expressions
                    .iter()
                    .flatten()
                    .all(|r| Self::requirement(r, labels(&self.nodes[n])))
            };
            preferred.iter().filter(holds).map(|term| i64::from(term.weight)).sum()
        });
        add(up(liked), weight("NodeAffinity"));
        add(all(&|n| self.fit_score(pod, profile, n)), weight("NodeResourcesFit"));
        add(all(&|n| self.balance_score(pod, n)), weight("NodeResourcesBalancedAllocation"));
        add(all(&|n| self.image_score(pod, n)), weight("ImageLocality"));
        let pods = all(&|n| self.pod_score(pod, profile, n));
        let (max, min) = (*pods.iter().max().unwrap(), *pods.iter().min().unwrap());
        let range =
            |s: &i64| if max > min { (100.0 * ((s - min) as f64 / (max - min) as f64)) as i64 } else { 0 };
        add(pods.iter().map(range).collect(), weight("InterPodAffinity"));
        let crowding = self.crowding(pod, profile, feasible);
        let (max, min) = (
            crowding.iter().flatten().copied().max().unwrap_or(0),
            crowding.iter().flatten().copied().min().unwrap_or(0),
        );
        let spread =
            |s: &Option<i64>| s.map_or(0, |s| if max == 0 { 100 } else { 100 * (max + min - s) / max });
        if !self.constraints(pod, profile, "ScheduleAnyway").is_empty() {
            add(crowding.iter().map(spread).collect(), weight("PodTopologySpread"));
        }
        totals
    }
}

/// A cluster twice: as the scheduler pictures it, and plainly.
fn cluster(random: &mut Random, nodes: usize, pods: usize) -> (World, Plain) {
    let mut world = World { workloads: workloads(), ..World::default() };
    let team: Labels = [("team".to_owned(), "x".to_owned())].into();
    let namespaces: BTreeMap<String, Labels> =
        [("one".to_owned(), team), ("two".to_owned(), Labels::new())].into();
    for (name, labels) in &namespaces {
        let labels = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        world.picture.set_namespace(name, Some(labels));
    }
    let mut plain = Plain { nodes: Vec::new(), pods: Vec::new(), namespaces };
    for n in 0..nodes {
        // Described twice, so that what a change leaves behind would show.
        let name = format!("n{n}");
        world.picture.put_node(&node(&random.node(&name)));
        let value = random.node(&name);
        plain.nodes.push(node(&value));
        if random.chance(50) {
            world.picture.put_node(&node(&value));
        } else {
            plain.nodes[n] = node(&value);
        }
    }
    for n in 0..pods {
        let value = random.pod(&format!("p{n}"), 40);
        let at = random.below(nodes);
        let info = Arc::new(PodInfo::new(&object(&value)).unwrap());
        if random.chance(30) {
            world.picture.put_pod(info.clone(), &format!("n{}", random.below(nodes)));
        }
        world.picture.put_pod(info, &format!("n{at}"));
        plain.pods.push((serde_json::from_value(value).unwrap(), at));
    }
    for (n, known) in plain.nodes.iter().enumerate() {
        // Only now do the nodes look as they will: everything counted before must follow.
        let _ = n;
        world.picture.put_node(known);
    }
    (world, plain)
}

/// Where the pod can go and what speaks for each node, from both readings: worked out anew, and shared with pods that
/// were alike before. Says where it can go.
#[track_caller]
fn check_pod(world: &mut World, plain: &Plain, profile: &Profile, value: &Value, about: &str) -> Vec<usize> {
    let info = Arc::new(PodInfo::new(&object(value)).unwrap());
    let pod: core::Pod = serde_json::from_value(value.clone()).unwrap();
    let want: BTreeSet<usize> = (0..plain.nodes.len()).filter(|n| plain.allows(&pod, profile, *n)).collect();
    let attempt = Try::begin(&info, profile, world).unwrap();
    let prepared = attempt.prepare(world);
    let number = |world: &World, slot: u32| world.picture.node(slot).name[1..].parse::<usize>().unwrap();
    for shared in [false, true] {
        let mut group = shared.then(|| world.groups.take(&prepared, &world.picture));
        let found = feasible(&attempt, world, &prepared, group.as_mut(), &mut 0).unwrap_or_default();
        let order: Vec<usize> = found.iter().map(|slot| number(world, *slot)).collect();
        let names: BTreeSet<usize> = order.iter().copied().collect();
        assert_eq!(names, want, "{about}, shared: {shared}: where {pod:?} can go");
        if !found.is_empty() {
            let scores = totals(&prepared, world, group.as_ref(), &found);
            let plainly = plain.totals(&pod, profile, &order);
            // Scores that are the same for all nodes are not worked out: what counts are the differences.
            let relative = |scores: &[i64]| scores.iter().map(|score| score - scores[0]).collect::<Vec<_>>();
            assert_eq!(
                relative(&scores),
                relative(&plainly),
                "{about}, shared: {shared}: what speaks for {order:?}, {pod:?}"
            );
        }
        if let Some(group) = group {
            world.groups.put(&info.alike, group);
        }
    }
    want.into_iter().collect()
}

#[track_caller]
fn check(seed: u64, profile: &Profile) {
    let mut random = Random::new(seed);
    let nodes = 3 + random.below(8);
    let pods = random.below(4 * nodes);
    let (mut world, mut plain) = cluster(&mut random, nodes, pods);
    let sorts: Vec<Value> = (0..4).map(|n| random.pod(&format!("sort{n}"), 60)).collect();
    for n in 0..12 {
        let mut value = sorts[random.below(sorts.len())].clone();
        let name = format!("new{n}");
        value["metadata"]["name"] = name.as_str().into();
        value["metadata"]["uid"] = name.as_str().into();
        let about = format!("seed {seed}, pod {n}");
        let found = check_pod(&mut world, &plain, profile, &value, &about);
        // What was found out must not outlive a change: of the pods of a node, or of the node.
        if let Some(at) = found.first() {
            let info = Arc::new(PodInfo::new(&object(&value)).unwrap());
            world.picture.put_pod(info, &format!("n{at}"));
            plain.pods.push((serde_json::from_value(value).unwrap(), *at));
        }
        if random.chance(30) {
            let at = random.below(nodes);
            plain.nodes[at] = node(&random.node(&format!("n{at}")));
            world.picture.put_node(&plain.nodes[at]);
        }
        if random.chance(30) && !plain.pods.is_empty() {
            let (pod, _) = plain.pods.swap_remove(random.below(plain.pods.len()));
            world
                .picture
                .remove_pod(&minke_api::Key::new(namespace(&pod), pod.metadata.name.as_deref().unwrap()));
        }
    }
}

#[test]
fn filters_and_scores_agree_with_a_plain_reading_of_their_rules() {
    for seed in 0..300 {
        check(seed, &Profile::default());
    }
}

#[test]
fn so_they_do_with_other_arguments() {
    let mut profile = Profile::default();
    profile.args.hard_pod_affinity_weight = 40;
    profile.args.fit.resources =
        vec![("cpu".to_owned(), 2), ("memory".to_owned(), 1), ("example.com/gpu".to_owned(), 5)];
    profile.args.fit.strategy = Strategy::MostAllocated;
    let mut spread = SpreadArgs::system();
    spread.system = false;
    spread.constraints[1].when_unsatisfiable = "DoNotSchedule".to_owned();
    profile.args.spread = spread;
    for seed in 300..400 {
        check(seed, &profile);
    }
    profile.args.fit.strategy = Strategy::RequestedToCapacityRatio(Curve(vec![(0, 0), (40, 90), (100, 20)]));
    for seed in 400..500 {
        check(seed, &profile);
    }
}
