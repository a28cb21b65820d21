//! Preemption: which pods of lower priority must go so that a pod fits, on which node.
//!
//! Upstream's choice (DefaultPreemption): on each node that fewer pods would help, the least important pods that
//! must go; of the nodes, the one with the fewest broken disruption budgets, then the least important victims.
//! It is found by taking pods out of the picture and putting them back, so that all filters have their say.

use std::cmp::Reverse;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use minke_api::{Key, LabelSelector, Object};
use minke_client::typed;
use rand::Rng;

use crate::affinity::pod_selector;
use crate::decide::{NoFit, Reasons, Try, World};
use crate::picture::{Node, Placed, PodInfo};
use crate::plugins::{Objection, Prepared};

/// The reason that a victim's DisruptionTarget condition has.
pub const REASON: &str = "PreemptionByScheduler";

/// A node, and who must leave it.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub slot: u32,
    /// The most important first; never empty.
    pub victims: Vec<Arc<Object>>,
    violations: usize,
    highest: i32,
    sum: i64,
    /// When the first of the most important victims started.
    started: Option<Timestamp>,
}

/// Why nobody is preempted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For the user, after why the nodes will not do.
    pub message: String,
    /// The pod holds no room any more where it did.
    pub forget_nomination: bool,
}

/// Upstream asks its DynamicResources plugin first whether devices could be taken back, and that is its answer for
/// pods without claims of devices.
const NO_DEVICES: &str = "no new claims to deallocate";

impl Refusal {
    /// A plugin keeps the pod from all nodes at once. Upstream's DynamicResources was then never shown the pod, and
    /// says so in these words; nothing else is tried.
    pub fn nowhere() -> Refusal {
        Refusal { message: "not found".to_owned(), forget_nomination: true }
    }

    /// The profile does without preemption.
    pub fn off() -> Refusal {
        Refusal { message: NO_DEVICES.to_owned(), forget_nomination: false }
    }
}

/// A disruption budget as preemption sees it.
pub struct Budget {
    namespace: Box<str>,
    selector: LabelSelector,
    allowed: i32,
    disrupted: Vec<String>,
}

impl Budget {
    pub fn of(object: &Object) -> Option<Budget> {
        let budget = typed::<PodDisruptionBudget>(object)?;
        let selector = pod_selector(budget.spec.as_ref()?.selector.as_ref());
        let status = budget.status.as_ref();
        let disrupted = status.and_then(|status| status.disrupted_pods.as_ref());
        Some(Budget {
            namespace: object.namespace().into(),
            selector,
            allowed: status.and_then(|status| status.disruptions_allowed).unwrap_or_default(),
            disrupted: disrupted.into_iter().flatten().map(|(name, _)| name.clone()).collect(),
        })
    }

    fn guards(&self, object: &Object) -> bool {
        object.namespace() == &*self.namespace
            && !self.selector.is_everything()
            && !object.labels().is_empty()
            && self.selector.matches(object.labels())
            && !self.disrupted.iter().any(|name| name == object.name())
    }
}

/// Chooses a node and victims for a pod that fits nowhere. The picture is as it was afterwards.
pub fn choose(
    attempt: &Try,
    world: &mut World,
    nofit: &NoFit,
    budgets: impl FnOnce() -> Vec<Budget>,
    rng: &mut impl Rng,
) -> Result<Candidate, Refusal> {
    let refuse = |why: &str, forget_nomination| {
        let message = format!("{NO_DEVICES}, preemption: {why}");
        Err(Refusal { message, forget_nomination })
    };
    if let Some(why) = ineligible(attempt.info, world, nofit) {
        return refuse(why, false);
    }
    let nodes: Vec<u32> =
        nofit.objections.iter().filter(|(_, why)| !why.hopeless).map(|(slot, _)| *slot).collect();
    let args = &attempt.profile.args;
    let wanted = (nodes.len() * args.candidates_percentage / 100).max(args.candidates_min).min(nodes.len());
    let budgets = if nodes.is_empty() { Vec::new() } else { budgets() };
    let prepared = attempt.prepare(world);
    let offset = if nodes.is_empty() { 0 } else { rng.random_range(0..nodes.len()) };
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut reasons = Reasons::default();
    let mut told = 0;
    for n in 0..nodes.len() {
        match victims(attempt, world, &prepared, nodes[(offset + n) % nodes.len()], &budgets) {
            Ok(candidate) => candidates.push(candidate),
            Err(why) => {
                reasons.add(&why, 1);
                told += 1;
            }
        }
        if candidates.len() >= wanted && candidates.iter().any(|candidate| candidate.violations == 0) {
            break;
        }
    }
    let best = candidates.into_iter().min_by_key(|candidate| {
        let Candidate { violations, highest, sum, ref victims, started, .. } = *candidate;
        (violations, highest, sum, victims.len(), Reverse(started))
    });
    if let Some(best) = best {
        return Ok(best);
    }
    if told < nofit.nodes {
        let rest = Objection::new("Preemption is not helpful for scheduling", true);
        reasons.add(&rest, nofit.nodes - told);
    }
    refuse(&format!("0/{} nodes are available: {reasons}.", nofit.nodes), true)
}

const NEVER: &str = "not eligible due to preemptionPolicy=Never.";

fn never(info: &PodInfo) -> bool {
    info.pod.spec.as_ref().and_then(|spec| spec.preemption_policy.as_deref()) == Some("Never")
}

/// Why the pod may not preempt now, if so.
fn ineligible(info: &PodInfo, world: &World, nofit: &NoFit) -> Option<&'static str> {
    if never(info) {
        return Some(NEVER);
    }
    let node = world.picture.nominated_node(info.key())?;
    let objection = nofit.objections.iter().find(|(slot, _)| *slot == node.slot);
    if objection.is_none_or(|(_, why)| why.hopeless) {
        return None;
    }
    let leaves = |placed: &Placed| {
        placed.info.priority < info.priority && placed.object.deleted().is_some() && is_victim(&placed.object)
    };
    node.pods.values().any(leaves).then_some("not eligible due to a terminating pod on the nominated node.")
}

fn is_victim(object: &Object) -> bool {
    let conditions = typed::<Pod>(object).and_then(|pod| pod.status.as_ref()?.conditions.clone());
    conditions.iter().flatten().any(|condition| {
        condition.type_ == "DisruptionTarget"
            && condition.status == "True"
            && condition.reason.as_deref() == Some(REASON)
    })
}

/// When the pod started, or will have: now at the latest, which is later than any that has.
fn started(object: &Object) -> Timestamp {
    let pod = typed::<Pod>(object);
    let time = pod.and_then(|pod| pod.status.as_ref()?.start_time.as_ref().map(|time| time.0));
    time.unwrap_or(Timestamp::MAX)
}

/// Priority first, then who has run longest: the greater is spared first.
fn importance(placed: &Placed) -> (i32, Reverse<Timestamp>) {
    (placed.info.priority, Reverse(started(&placed.object)))
}

/// Who must leave the node so that the pod fits. `prepared`: the pod when nobody has left.
fn victims(
    attempt: &Try,
    world: &mut World,
    prepared: &Prepared,
    slot: u32,
    budgets: &[Budget],
) -> Result<Candidate, Objection> {
    let info = attempt.info;
    let lesser = |node: &Node| {
        let pods = node.pods.values().filter(|placed| placed.info.priority < info.priority);
        pods.map(|placed| placed.info.key().clone()).collect::<Vec<_>>()
    };
    let keys = lesser(world.picture.node(slot));
    if keys.is_empty() {
        return Err(Objection::new("No preemption victims found for incoming pod", true));
    }
    // What other pods have to say changes as they leave; when none has anything to say, that stays so.
    let counted = !prepared.wide.is_empty();
    let without = |world: &mut World, key: &Key| world.picture.suppose_without(key, slot, counted);
    let mut out: Vec<Placed> = keys.iter().filter_map(|key| without(world, key)).collect();
    let check = |world: &mut World| {
        let anew = counted.then(|| attempt.prepare(world));
        let prepared = anew.as_ref().unwrap_or(prepared);
        attempt.objection(world, prepared, slot).map(|(_, objection)| objection)
    };
    if let Some(objection) = check(world) {
        for placed in out {
            world.picture.suppose(placed, slot, counted);
        }
        return Err(objection);
    }
    out.sort_by_cached_key(|placed| Reverse(importance(placed)));
    let mut left: Vec<i32> = budgets.iter().map(|budget| budget.allowed).collect();
    // Those whose going would break a budget are spared first.
    let (breaking, harmless): (Vec<Placed>, Vec<Placed>) = out.into_iter().partition(|placed| {
        let mut breaks = false;
        for (budget, left) in budgets.iter().zip(&mut left) {
            if budget.guards(&placed.object) {
                *left -= 1;
                breaks |= *left < 0;
            }
        }
        breaks
    });
    let mut gone: Vec<Placed> = Vec::new();
    let mut violations = 0;
    for (placed, breaks) in
        breaking.into_iter().map(|placed| (placed, true)).chain(harmless.into_iter().map(|p| (p, false)))
    {
        let key = placed.info.key().clone();
        world.picture.suppose(placed, slot, counted);
        if check(world).is_some() {
            gone.extend(without(world, &key));
            violations += usize::from(breaks);
        }
    }
    gone.sort_by_cached_key(|placed| Reverse(importance(placed)));
    let highest = gone.first().map_or(i32::MIN, |placed| placed.info.priority);
    let most_important = gone.iter().filter(|placed| placed.info.priority == highest);
    let candidate = Candidate {
        slot,
        violations,
        highest,
        // Made positive, so that of pods with negative priorities fewer is better as well.
        sum: gone.iter().map(|placed| i64::from(placed.info.priority) + (1 << 31)).sum(),
        started: most_important.map(|placed| started(&placed.object)).min(),
        victims: gone.iter().map(|placed| placed.object.clone()).collect(),
    };
    for placed in gone {
        world.picture.suppose(placed, slot, counted);
    }
    Ok(candidate)
}
