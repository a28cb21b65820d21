//! Where a pod goes: filter the nodes, score what is left, take the best. Pure but for the counts that it asks
//! the picture to keep.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;

use crate::affinity::only_nodes;
use crate::alike::{Group, Groups};
use crate::picture::{Picture, Placed, PodInfo};
use crate::plugins::{NO_SCORE, Normalize, Objection, PLUGINS, Prepared, Scoring, wake};
use crate::profile::Profile;
use crate::reserve::ReservePlugin;
use crate::workloads::Workloads;

/// What decisions are made from.
#[derive(Default)]
pub struct World {
    pub picture: Picture,
    pub workloads: Workloads,
    pub reserving: Vec<Box<dyn ReservePlugin>>,
    pub groups: Groups,
}

/// No node will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoFit {
    /// The first sentence that users see in the event and the condition; preemption may add another.
    pub message: String,
    /// Nodes that exist.
    pub nodes: usize,
    /// What each node that was looked at was ruled out for, by slot.
    pub objections: Vec<(u32, Arc<Objection>)>,
    /// Which plugins objected: bits by row, those of reserving plugins after [`PLUGINS`].
    pub rejecting: u32,
}

impl NoFit {
    /// Names of the plugins that objected, for the log.
    pub fn plugins(&self, world: &World) -> Vec<&'static str> {
        let names = PLUGINS.iter().map(|plugin| plugin.name);
        let names = names.chain(world.reserving.iter().map(|plugin| plugin.name()));
        names.enumerate().filter(|(row, _)| self.rejecting & (1 << row) != 0).map(|(_, name)| name).collect()
    }
}

/// What may help a pod that these plugins (bits by row) kept from its nodes: bits of [`wake`].
pub fn helped_by(rejecting: u32) -> u32 {
    let rows = (0..32).filter(|row| rejecting & (1 << row) != 0);
    let bits = |row: usize| match PLUGINS.get(row) {
        Some(plugin) => plugin.helped_by,
        None => {
            wake::NODE_ADDED | wake::NODE_LABELS | wake::NODE_ALLOCATABLE | wake::POD_GONE | wake::RESERVED
        }
    };
    rows.map(bits).fold(wake::NODE_ADDED, |all, bits| all | bits)
}

/// The reserving plugins that have something to say of a pod, as places in [`World::reserving`].
pub type Reserving = Vec<usize>;

/// A pod on its way through the filters.
pub struct Try<'a> {
    pub info: &'a Arc<PodInfo>,
    pub profile: &'a Profile,
    pub reserving: Reserving,
}

impl<'a> Try<'a> {
    /// Lets the reserving plugins look at the pod; one of them may rule out all nodes at once.
    pub fn begin(info: &'a Arc<PodInfo>, profile: &'a Profile, world: &mut World) -> Result<Self, NoFit> {
        world.picture.tallies.begin();
        let nodes = world.picture.order().len();
        if nodes == 0 {
            let message = "no nodes available to schedule pods".to_owned();
            return Err(NoFit { message, nodes, objections: Vec::new(), rejecting: 0 });
        }
        let mut reserving = Vec::new();
        for (at, plugin) in world.reserving.iter_mut().enumerate() {
            if profile.without.contains(plugin.name()) {
                continue;
            }
            match plugin.prepare(info) {
                Ok(true) => reserving.push(at),
                Ok(false) => {}
                Err(objection) => {
                    let reasons: Vec<&str> = objection.reasons().map(|reason| &**reason).collect();
                    let message = format!("0/{nodes} nodes are available: {}.", reasons.join(", "));
                    let rejecting = 1 << (PLUGINS.len() + at);
                    let order = world.picture.known_order();
                    let objections = if objection.hopeless {
                        Vec::new()
                    } else {
                        let objection = Arc::new(objection);
                        order.iter().map(|slot| (*slot, objection.clone())).collect()
                    };
                    return Err(NoFit { message, nodes, objections, rejecting });
                }
            }
        }
        Ok(Try { info, profile, reserving })
    }

    pub fn prepare(&self, world: &mut World) -> Prepared<'a> {
        Prepared::new(self.info, self.profile, &mut world.picture, &world.workloads)
    }

    /// Which plugin rules the node out, and why: with the pods that hold room on it, and without.
    pub fn objection(&self, world: &mut World, prepared: &Prepared, slot: u32) -> Option<(usize, Objection)> {
        if world.picture.is_held(slot)
            && let Some(objection) = self.objection_with_nominated(world, prepared, slot)
        {
            return Some(objection);
        }
        self.plain_objection(world, prepared, slot)
    }

    fn plain_objection(
        &self,
        world: &mut World,
        prepared: &Prepared,
        slot: u32,
    ) -> Option<(usize, Objection)> {
        let picture = &world.picture;
        let node = picture.node(slot);
        if let Some(objection) = prepared.objection(&prepared.alone, picture, node) {
            return Some(objection);
        }
        for at in &self.reserving {
            if let Some(objection) = world.reserving[*at].filter(self.info, node) {
                return Some((PLUGINS.len() + at, objection));
            }
        }
        prepared.objection(&prepared.wide, picture, node)
    }

    /// Whether what is found out about nodes can be shared with pods that are alike.
    fn shares(&self) -> bool {
        // Pods that can go to a few nodes only, as those of DaemonSets, are each of another sort.
        self.reserving.is_empty() && only_nodes(&self.info.pod).is_none()
    }

    /// As [`Try::objection`], by what is known from pods that are alike.
    fn known_objection(
        &self,
        world: &mut World,
        prepared: &Prepared,
        group: &mut Group,
        slot: u32,
        last: Option<&Arc<Objection>>,
    ) -> Option<(usize, Arc<Objection>)> {
        if world.picture.is_held(slot) {
            return self
                .objection(world, prepared, slot)
                .map(|(row, objection)| (row, shared(objection, last)));
        }
        let picture = &world.picture;
        if let Some(known) = group.objection(prepared, picture, slot) {
            return Some(known.clone());
        }
        if prepared.wide.is_empty() {
            return None;
        }
        let objection = prepared.objection(&prepared.wide, picture, picture.node(slot));
        objection.map(|(row, objection)| (row, shared(objection, last)))
    }

    /// As if the pods that hold room here, and are no less important, were here already.
    fn objection_with_nominated(
        &self,
        world: &mut World,
        prepared: &Prepared,
        slot: u32,
    ) -> Option<(usize, Objection)> {
        let nominated = &world.picture.node(slot).nominated;
        let holds = |other: &&Arc<PodInfo>| {
            other.priority >= self.info.priority && other.object.uid() != self.info.object.uid()
        };
        let guests: Vec<Arc<PodInfo>> = nominated.iter().filter(holds).cloned().collect();
        if guests.is_empty() {
            return None;
        }
        // Counts matter if the pod says something of others, or one of these does.
        let counted = !prepared.wide.is_empty() || guests.iter().any(|guest| !guest.carries.is_empty());
        for guest in &guests {
            let placed = Placed { info: guest.clone(), object: guest.object.clone() };
            world.picture.suppose(placed, slot, counted);
        }
        let anew = counted.then(|| self.prepare(world));
        let objection = self.plain_objection(world, anew.as_ref().unwrap_or(prepared), slot);
        for guest in &guests {
            world.picture.suppose_without(guest.key(), slot, counted);
        }
        objection
    }
}

/// The nodes that the pod can go to: all of them, or enough. `start` is where the round over the nodes begins, and
/// then where the next one does, so that not always the same ones are looked at.
pub fn feasible(
    attempt: &Try,
    world: &mut World,
    prepared: &Prepared,
    mut group: Option<&mut Group>,
    start: &mut usize,
) -> Result<Vec<u32>, NoFit> {
    let info = attempt.info;
    let nodes = world.picture.known_order().len();
    let mut objections: Vec<(u32, Arc<Objection>)> = Vec::new();
    let mut rejecting = 0;
    let mut feasible = Vec::new();
    // A pod that made room for itself goes there if it can.
    let held = world.picture.nominated_node(info.key()).filter(|node| node.exists).map(|node| node.slot);
    if let Some(slot) = held
        && attempt.objection(world, prepared, slot).is_none()
    {
        return Ok(vec![slot]);
    }
    let only: Option<Vec<u32>> =
        only_nodes(&info.pod).filter(|_| attempt.profile.considers("NodeAffinity")).map(|names| {
            let slots = names.iter().filter_map(|name| world.picture.slot(name));
            slots.filter(|slot| world.picture.node(*slot).exists).collect()
        });
    let count = only.as_ref().map_or(nodes, Vec::len);
    let enough = attempt.profile.enough(count);
    let mut looked_at = 0;
    while looked_at < count {
        let slot = match &only {
            Some(slots) => slots[looked_at],
            None => world.picture.known_order()[(*start + looked_at) % nodes],
        };
        looked_at += 1;
        let last = objections.last().map(|(_, objection)| objection);
        let objection = match &mut group {
            Some(group) => attempt.known_objection(world, prepared, group, slot, last),
            None => attempt.objection(world, prepared, slot).map(|(row, why)| (row, shared(why, last))),
        };
        match objection {
            None => feasible.push(slot),
            Some((row, objection)) => {
                rejecting |= 1 << row;
                objections.push((slot, objection));
            }
        }
        if feasible.len() == enough {
            break;
        }
    }
    if only.is_none() {
        *start = (*start + looked_at) % nodes;
    }
    if !feasible.is_empty() {
        return Ok(feasible);
    }
    let mut reasons = Reasons::default();
    // Alike nodes share their objection, so there are few different ones.
    for alike in objections.chunk_by(|(_, one), (_, other)| Arc::ptr_eq(one, other)) {
        reasons.add(&alike[0].1, alike.len());
    }
    if count < nodes {
        rejecting |= 1 << crate::plugins::row("NodeAffinity");
        let absent = Objection::new("node(s) didn't satisfy plugin(s) [NodeAffinity]", true);
        reasons.add(&absent, nodes - count);
    }
    let message = format!("0/{nodes} nodes are available: {reasons}.");
    Err(NoFit { message, nodes, objections, rejecting })
}

/// The objection, or the last one if it is the same.
fn shared(objection: Objection, last: Option<&Arc<Objection>>) -> Arc<Objection> {
    match last {
        Some(last) if **last == objection => last.clone(),
        _ => Arc::new(objection),
    }
}

/// How often each reason was given; prints as upstream lists them.
#[derive(Default)]
pub struct Reasons(BTreeMap<Cow<'static, str>, usize>);

impl Reasons {
    pub fn add(&mut self, objection: &Objection, count: usize) {
        for reason in objection.reasons() {
            match self.0.get_mut(reason) {
                Some(sum) => *sum += count,
                None => drop(self.0.insert(reason.clone(), count)),
            }
        }
    }
}

impl std::fmt::Display for Reasons {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut texts: Vec<String> =
            self.0.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        texts.sort();
        f.write_str(&texts.join(", "))
    }
}

/// The weighted sum of the scores of each feasible node.
pub fn totals(prepared: &Prepared, world: &mut World, group: Option<&Group>, feasible: &[u32]) -> Vec<i64> {
    let mut totals = match group {
        Some(group) => group.totals(feasible),
        None => {
            let mut totals = vec![0; feasible.len()];
            let scoring = Scoring::alone(prepared, &world.picture);
            add_scores(prepared, &scoring, &world.picture, feasible, &mut totals);
            totals
        }
    };
    let scoring = Scoring::wide(prepared, &mut world.picture, &world.workloads, feasible);
    add_scores(prepared, &scoring, &world.picture, feasible, &mut totals);
    totals
}

fn add_scores(
    prepared: &Prepared,
    scoring: &Scoring,
    picture: &Picture,
    feasible: &[u32],
    totals: &mut [i64],
) {
    let mut scores = Vec::with_capacity(feasible.len());
    for (row, weight) in &scoring.scores {
        let Some((score, normalize)) = PLUGINS[*row].score else { continue };
        scores.clear();
        let nodes = feasible.iter().enumerate();
        scores.extend(nodes.map(|(at, slot)| score(prepared, scoring, picture, picture.node(*slot), at)));
        normalize_scores(&mut scores, normalize);
        for (total, score) in totals.iter_mut().zip(&scores) {
            *total += score * weight;
        }
    }
}

/// Whole numbers as upstream computes them, which decides between nodes that are nearly alike.
pub fn normalize_scores(scores: &mut [i64], how: Normalize) {
    let left_out = |score: i64| how == Normalize::Spread && score == NO_SCORE;
    let known = || scores.iter().copied().filter(|score| !left_out(*score));
    let (max, min) = (known().max().unwrap_or_default(), known().min().unwrap_or_default());
    for score in scores.iter_mut() {
        *score = match how {
            Normalize::As => *score,
            Normalize::Up if max == 0 => *score,
            Normalize::Up => 100 * *score / max,
            Normalize::Down if max == 0 => 100,
            Normalize::Down => 100 - 100 * *score / max,
            Normalize::Range if max <= min => 0,
            Normalize::Range => (100.0 * ((*score - min) as f64 / (max - min) as f64)) as i64,
            Normalize::Spread if *score == NO_SCORE => 0,
            Normalize::Spread if max == 0 => 100,
            Normalize::Spread => 100 * (max + min - *score) / max,
        };
    }
}

/// The slot of the best node for the pod. `rng` decides between equals.
pub fn decide(attempt: &Try, world: &mut World, start: &mut usize, rng: &mut impl Rng) -> Result<u32, NoFit> {
    let prepared = attempt.prepare(world);
    let mut group = attempt.shares().then(|| world.groups.take(&prepared, &world.picture));
    let best = best(attempt, world, &prepared, group.as_mut(), start, rng);
    if let Some(group) = group {
        world.groups.put(&attempt.info.alike, group);
    }
    best
}

fn best(
    attempt: &Try,
    world: &mut World,
    prepared: &Prepared,
    mut group: Option<&mut Group>,
    start: &mut usize,
    rng: &mut impl Rng,
) -> Result<u32, NoFit> {
    let feasible = feasible(attempt, world, prepared, group.as_deref_mut(), start)?;
    if let [only] = feasible.as_slice() {
        return Ok(*only);
    }
    let totals = totals(prepared, world, group.as_deref(), &feasible);
    let top = totals.iter().copied().max().unwrap_or_default();
    let ties: Vec<usize> = (0..totals.len()).filter(|at| totals[*at] == top).collect();
    Ok(feasible[ties[rng.random_range(0..ties.len())]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::{node, pod};
    use rand::SeedableRng;
    use rand::rngs::SmallRng;
    use serde_json::{Value, json};

    fn world(nodes: &[(&str, Value, Value)]) -> World {
        let mut world = World::default();
        for (name, spec, labels) in nodes {
            world.picture.put_node(&node(name, spec.clone(), labels.clone()));
        }
        world
    }

    /// Where the pod goes, or the message of the pod that can't go anywhere, with what preemption has to say.
    fn place(world: &mut World, spec: Value) -> Result<String, String> {
        let mut rng = SmallRng::seed_from_u64(1);
        let (info, profile) = (Arc::new(pod("new", spec)), Profile::default());
        let attempt = Try::begin(&info, &profile, world).map_err(|nofit| nofit.message)?;
        decide(&attempt, world, &mut 0, &mut rng)
            .map(|slot| world.picture.node(slot).name.to_string())
            .map_err(|nofit| match crate::preempt::choose(&attempt, world, &nofit, Vec::new, &mut rng) {
                Ok(_) => nofit.message,
                Err(refusal) => format!("{} {}", nofit.message, refusal.message),
            })
    }

    fn new(name: &str, spec: Value) -> Arc<PodInfo> {
        Arc::new(pod(name, spec))
    }

    fn asks(cpu: &str) -> Value {
        json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]})
    }

    #[track_caller]
    fn check(world: &mut World, spec: Value, want: Result<&str, &str>) {
        assert_eq!(place(world, spec), want.map(str::to_owned).map_err(str::to_owned));
    }

    #[test]
    fn without_nodes_there_is_nowhere_to_go() {
        check(&mut World::default(), asks("1"), Err("no nodes available to schedule pods"));
    }

    #[test]
    fn what_does_not_fit_is_said_in_upstreams_words() {
        let mut one = world(&[("n1", json!({}), json!({}))]);
        check(
            &mut one,
            asks("64"),
            Err(
                "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: \
                 1 Preemption is not helpful for scheduling.",
            ),
        );
        let mut busy = world(&[("n1", json!({}), json!({}))]);
        busy.picture.put_pod(new("a", asks("3")), "n1");
        check(
            &mut busy,
            asks("2"),
            Err(
                "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: \
                 1 No preemption victims found for incoming pod.",
            ),
        );
        let mut mixed = world(&[
            ("n1", json!({"unschedulable": true}), json!({})),
            ("n2", json!({"taints": [{"key": "a", "effect": "NoSchedule"}]}), json!({})),
            ("n3", json!({}), json!({})),
        ]);
        let mut spec = asks("1");
        spec["nodeSelector"] = json!({"disk": "ssd"});
        check(
            &mut mixed,
            spec,
            Err("0/3 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, \
                 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable. no new claims to deallocate, preemption: 0/3 nodes are \
                 available: 3 Preemption is not helpful for scheduling."),
        );
    }

    #[test]
    fn pods_of_one_owner_are_spread_over_nodes() {
        let name = |name: &str| json!({"kubernetes.io/hostname": name});
        let mut two = world(&[("n1", json!({}), name("n1")), ("n2", json!({}), name("n2"))]);
        let set = json!({"metadata": {"name": "rs", "namespace": "default", "generation": 1},
            "spec": {"selector": {"matchLabels": {"app": "web"}}}});
        let kind = minke_api::Kind::by_api_version("apps/v1", "ReplicaSet").unwrap();
        let set = Arc::new(minke_api::Object::from_value(kind, &set).unwrap());
        two.workloads.changed(&minke_client::Change { old: None, new: Some(set) });
        two.picture.put_pod(new("a", asks("10m")), "n1");
        check(&mut two, asks("10m"), Ok("n2"));
    }

    #[test]
    fn host_ports_are_taken_once() {
        let spec = json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}]}]});
        let mut one = world(&[("n1", json!({}), json!({}))]);
        check(&mut one, spec.clone(), Ok("n1"));
        one.picture.put_pod(new("a", spec.clone()), "n1");
        let message = place(&mut one, spec).unwrap_err();
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
        let mut two = world(&[
            ("n1", json!({}), json!({"kubernetes.io/hostname": "n1"})),
            ("n2", json!({}), json!({"kubernetes.io/hostname": "n2"})),
        ]);
        two.picture.put_pod(new("a", spec.clone()), "n1");
        check(&mut two, spec.clone(), Ok("n2"));
        check(&mut two, asks("1"), Ok("n2"));
        two.picture.put_pod(new("b", asks("1")), "n2");
        let message = place(&mut two, spec).unwrap_err();
        assert!(message.contains("2 node(s) didn't match pod anti-affinity rules"), "{message}");
    }

    #[test]
    fn hard_spread_constraints_bound_the_skew() {
        let mut spec = asks("10m");
        spec["topologySpreadConstraints"] = json!([{"topologyKey": "zone", "maxSkew": 1,
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]);
        let mut two =
            world(&[("n1", json!({}), json!({"zone": "a"})), ("n2", json!({}), json!({"zone": "b"}))]);
        two.picture.put_pod(new("a", asks("10m")), "n1");
        check(&mut two, spec.clone(), Ok("n2"));
        let mut nowhere = world(&[("n1", json!({}), json!({}))]);
        let message = place(&mut nowhere, spec).unwrap_err();
        assert!(message.contains("(missing required label)"), "{message}");
    }
}
