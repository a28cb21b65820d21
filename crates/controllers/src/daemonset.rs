//! Keeps one pod of a DaemonSet on every node that wants it.
//!
//! Reads DaemonSets, Nodes, Pods and ControllerRevisions from the cache; writes pods, revisions and the status of
//! the set. A pod is made for its node by node affinity; the scheduler binds it. Upstream: pkg/controller/daemon.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Toleration,
};
use minke_api::{Kind, LabelSelector, Object, Status, intstr::scaled, placement};
use minke_client::{Change, backoff};
use serde_json::Value;

use crate::context::{Ctx, Item, Requeue, Shared, Typed, nonzero};
use crate::pods;
use crate::replicaset::{create_each, delete_pod};
use crate::revisions::{self, History, POD_REVISION};
use crate::run::Controller;

/// Pods that one pass makes, and deletes, at most.
const BURST: usize = 250;
/// Delay before a failed pod is replaced, doubled each time that the next one fails too.
const FAILED_BACKOFF: Duration = Duration::from_secs(1);
const FAILED_BACKOFF_MAX: Duration = Duration::from_secs(15 * 60);

/// Annotation and label by which clients of long ago counted templates.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";
const POD_GENERATION: &str = "pod-template-generation";

/// A pod of the set. Ordered: those with a node first, then by age.
pub(crate) struct Daemon {
    pub pod: Typed<Pod>,
    /// Its deletion was asked for.
    pub going: bool,
}

impl Daemon {
    /// The node that the pod is on, or was made for.
    fn node(&self) -> Option<&str> {
        let spec = self.pod.spec.as_ref()?;
        if let Some(node) = spec.node_name.as_deref().filter(|node| !node.is_empty()) {
            return Some(node);
        }
        let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
        let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
        let fields = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten());
        let mut names = fields.filter(|field| field.key == "metadata.name" && field.operator == "In");
        Some(names.next()?.values.as_ref()?.first()?)
    }

    fn is_bound(&self) -> bool {
        self.pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
    }

    fn rank(&self) -> (bool, Option<Timestamp>, &str) {
        (!self.is_bound(), self.pod.object.created(), self.pod.object.name())
    }
}

/// What was observed.
pub(crate) struct World<'a> {
    pub set: &'a Typed<DaemonSet>,
    pub nodes: &'a [Typed<Node>],
    pub daemons: &'a [Daemon],
    /// Hash of the present template.
    pub hash: &'a str,
    /// Until when a node's failed pod is left where it is.
    pub held: &'a dyn Fn(&str) -> Option<Timestamp>,
    pub now: Timestamp,
}

/// What one pass will do.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Names of nodes to make a pod for.
    pub create: Vec<String>,
    /// Uids of pods.
    pub delete: Vec<String>,
    /// Nodes whose failed pod is deleted: the next may wait longer.
    pub failed: Vec<String>,
    /// Events: whether a warning, reason, message.
    pub tell: Vec<(bool, &'static str, String)>,
    pub status: DaemonSetStatus,
    /// When time alone will change something.
    pub due: Option<Timestamp>,
}

/// Decides.
pub(crate) fn plan(world: &World) -> Plan {
    let placement = Placement::new(world.set);
    let mut sites: BTreeMap<&str, Site> = BTreeMap::new();
    for node in world.nodes {
        let (runs, stays) = placement.of(node);
        sites.insert(node.object.name(), Site { exists: true, runs, stays, daemons: Vec::new() });
    }
    for daemon in world.daemons {
        // A pod that is both finished and deleted is only waiting to be removed.
        let over = daemon.going && pods::is_finished(&daemon.pod);
        if let Some(node) = daemon.node().filter(|_| !over) {
            sites.entry(node).or_default().daemons.push(daemon);
        }
    }
    sites.values_mut().for_each(|site| site.daemons.sort_by(|a, b| a.rank().cmp(&b.rank())));
    let mut pass = Pass { world, rolling: Rolling::of(world.set, &sites), plan: Plan::default() };
    pass.plan.status = pass.status(&sites);
    sites.iter().for_each(|(node, site)| pass.populate(node, site));
    // A rollout goes on from a world in which every node has what it should.
    if pass.plan.create.is_empty() && pass.plan.delete.is_empty() {
        match pass.rolling {
            Some(Rolling { surge: 0, unavailable }) => pass.replace(&sites, unavailable),
            Some(Rolling { surge, .. }) => pass.surge(&sites, surge),
            None => {}
        }
    }
    pass.plan.create.truncate(BURST);
    pass.plan.delete.truncate(BURST);
    pass.plan
}

/// A node and the set's pods on it.
#[derive(Default)]
struct Site<'a> {
    exists: bool,
    /// Whether a pod should be made here.
    runs: bool,
    /// Whether a pod that is here may stay.
    stays: bool,
    daemons: Vec<&'a Daemon>,
}

/// How many pods a rollout may have above, and below, one per node.
#[derive(Clone, Copy)]
struct Rolling {
    surge: i32,
    unavailable: i32,
}

impl Rolling {
    fn of(set: &DaemonSet, sites: &BTreeMap<&str, Site>) -> Option<Rolling> {
        let strategy = set.spec.update_strategy.as_ref();
        if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
            return None;
        }
        let wanted = sites.values().filter(|site| site.runs).count() as i32;
        let limits = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let portion = |value: Option<&_>, default| {
            value.map_or(default, |value| scaled(value, wanted, true).unwrap_or(default).max(0))
        };
        let surge = portion(limits.and_then(|limits| limits.max_surge.as_ref()), 0);
        let unavailable = portion(limits.and_then(|limits| limits.max_unavailable.as_ref()), 1);
        // Not both zero, or nothing could move.
        Some(Rolling { surge, unavailable: unavailable.max(i32::from(surge == 0)) })
    }
}

struct Pass<'a> {
    world: &'a World<'a>,
    rolling: Option<Rolling>,
    plan: Plan,
}

impl<'a> Pass<'a> {
    fn min_ready_seconds(&self) -> i32 {
        self.world.set.spec.min_ready_seconds.unwrap_or(0)
    }

    fn is_available(&self, daemon: &Daemon) -> bool {
        pods::available_at(&daemon.pod, self.min_ready_seconds()).is_some_and(|at| at <= self.world.now)
    }

    /// Whether the pod is of the present template, by its hash or by the old way of counting.
    fn is_new(&self, daemon: &Daemon) -> bool {
        let labels = daemon.pod.object.labels();
        let generation = generation(self.world.set);
        labels.get(POD_REVISION) == Some(self.world.hash)
            || generation.is_some() && labels.get(POD_GENERATION) == generation
    }

    fn delete(&mut self, daemon: &Daemon) {
        self.plan.delete.push(daemon.pod.object.uid().to_owned());
    }

    fn look_again(&mut self, at: Timestamp) {
        self.plan.due = Some(self.plan.due.map_or(at, |due| due.min(at)));
    }

    /// One pod where there should be one, none where there should not.
    fn populate(&mut self, node: &str, site: &Site<'a>) {
        if !site.exists {
            // A pod for a node that is gone before it was bound to it: nobody else will delete it.
            return site.daemons.iter().filter(|d| !d.going && !d.is_bound()).for_each(|d| self.delete(d));
        }
        if !site.stays {
            return site.daemons.iter().filter(|daemon| !daemon.going).for_each(|d| self.delete(d));
        }
        if site.daemons.is_empty() && site.runs {
            return self.plan.create.push(node.to_owned());
        }
        let mut running = Vec::new();
        for daemon in site.daemons.iter().copied().filter(|daemon| !daemon.going) {
            match pods::phase(&daemon.pod) {
                "Failed" => self.retire_failed(node, daemon),
                "Succeeded" => {
                    let message = format!(
                        "Found succeeded daemon pod {} on node {node}, will try to delete it",
                        daemon.pod.object.key()
                    );
                    self.plan.tell.push((false, "SucceededDaemonPod", message));
                    self.delete(daemon);
                }
                _ => running.push(daemon),
            }
        }
        let surging = self.rolling.is_some_and(|rolling| rolling.surge > 0);
        match running.len() {
            0 if surging && site.runs => self.plan.create.push(node.to_owned()),
            0 | 1 => {}
            _ if !surging => running[1..].iter().for_each(|daemon| self.delete(daemon)),
            _ => self.thin_out(running),
        }
    }

    /// While surging there may be two: an old one that is ready and a new one that is not available yet.
    fn thin_out(&mut self, running: Vec<&Daemon>) {
        let (mut new, mut old) = (None, None);
        for daemon in running {
            let place = if self.is_new(daemon) { &mut new } else { &mut old };
            match place {
                None => *place = Some(daemon),
                Some(_) => self.delete(daemon),
            }
        }
        if let (Some(new), Some(old)) = (new, old)
            && (!pods::is_ready(&old.pod) || self.is_available(new))
        {
            self.delete(old);
        }
    }

    fn retire_failed(&mut self, node: &str, daemon: &Daemon) {
        if let Some(until) = (self.world.held)(node).filter(|until| *until > self.world.now) {
            return self.look_again(until);
        }
        let message = format!(
            "Found failed daemon pod {} on node {node}, will try to kill it",
            daemon.pod.object.key()
        );
        self.plan.tell.push((true, "FailedDaemonPod", message));
        self.plan.failed.push(node.to_owned());
        self.delete(daemon);
    }

    /// The old and the new pod of a node; `None` while it has more than one of either.
    fn pair(&self, site: &Site<'a>) -> Option<(Option<&'a Daemon>, Option<&'a Daemon>)> {
        let staying = site.daemons.iter().copied().filter(|daemon| !daemon.going);
        let (new, old): (Vec<_>, Vec<_>) = staying.partition(|daemon| self.is_new(daemon));
        (new.len() <= 1 && old.len() <= 1).then(|| (old.first().copied(), new.first().copied()))
    }

    /// Deletes old pods, those that are of no use first, while few enough are unavailable.
    fn replace(&mut self, sites: &BTreeMap<&str, Site<'a>>, max_unavailable: i32) {
        let (mut unavailable, mut useless, mut candidates) = (0, Vec::new(), Vec::new());
        for site in sites.values().filter(|site| site.runs || !site.daemons.is_empty()) {
            match self.pair(site) {
                Some((Some(old), None)) if self.is_available(old) => candidates.push(old),
                Some((Some(old), None)) => {
                    useless.push(old);
                    unavailable += 1;
                }
                Some((None, Some(new))) if self.is_available(new) => {}
                _ => unavailable += 1,
            }
        }
        let more = usize::try_from(max_unavailable - unavailable).unwrap_or(0);
        useless.into_iter().chain(candidates.into_iter().take(more)).for_each(|old| self.delete(old));
    }

    /// Makes new pods beside old ones, and deletes an old one when the new one is available.
    fn surge(&mut self, sites: &BTreeMap<&str, Site<'a>>, max_surge: i32) {
        let (mut surging, mut urgent, mut candidates) = (0, Vec::new(), Vec::new());
        let (mut wanted, mut available, mut leaving) = (0, 0, Vec::new());
        for (node, site) in sites {
            wanted += usize::from(site.runs);
            let Some((old, new)) = self.pair(site) else {
                surging += 1;
                continue;
            };
            available += usize::from(old.or(new).is_some_and(|daemon| self.is_available(daemon)));
            match (old, new) {
                (None, _) => {}
                (Some(old), None) if !site.runs && self.is_available(old) => leaving.push(old),
                (Some(old), None) if !site.runs => self.delete(old),
                (Some(old), None) if !self.is_available(old) => urgent.push(*node),
                (Some(_), None) => candidates.push(*node),
                (Some(old), Some(new)) if self.is_available(new) => self.delete(old),
                (Some(_), Some(_)) => surging += 1,
            }
        }
        // Who surges wants as many as ever: a pod that may stay though none would be made there goes when
        // there are enough without it.
        leaving.into_iter().take(available.saturating_sub(wanted)).for_each(|old| self.delete(old));
        let more = usize::try_from(max_surge - surging).unwrap_or(0);
        let chosen = urgent.into_iter().chain(candidates.into_iter().take(more));
        self.plan.create.extend(chosen.map(str::to_owned));
    }

    fn status(&mut self, sites: &BTreeMap<&str, Site<'a>>) -> DaemonSetStatus {
        let old = self.world.set.status.clone().unwrap_or_default();
        let (mut desired, mut current, mut astray, mut ready, mut updated, mut available) =
            (0, 0, 0, 0, 0, 0);
        for site in sites.values().filter(|site| site.exists) {
            let first = site.daemons.first().copied();
            desired += i32::from(site.runs);
            let Some(daemon) = first else { continue };
            if !site.runs {
                astray += 1;
                continue;
            }
            current += 1;
            ready += i32::from(pods::is_ready(&daemon.pod));
            updated += i32::from(self.is_new(daemon));
            available += i32::from(self.is_available(daemon));
        }
        // Any pod that will be available by waiting, the surging ones too.
        let daemons = sites.values().flat_map(|site| &site.daemons);
        let times = daemons.filter_map(|daemon| pods::available_at(&daemon.pod, self.min_ready_seconds()));
        if let Some(next) = times.filter(|at| *at > self.world.now).min() {
            self.look_again(next);
        }
        DaemonSetStatus {
            collision_count: old.collision_count,
            conditions: old.conditions,
            desired_number_scheduled: desired,
            current_number_scheduled: current,
            number_misscheduled: astray,
            number_ready: ready,
            number_available: nonzero(available),
            number_unavailable: nonzero(desired - available),
            updated_number_scheduled: nonzero(updated),
            observed_generation: Some(self.world.set.object.generation())
                .filter(|generation| *generation != 0),
        }
    }
}

fn generation(set: &DaemonSet) -> Option<&str> {
    set.metadata.annotations.as_ref()?.get(TEMPLATE_GENERATION).map(String::as_str)
}

/// What the set's pods ask of a node, worked out once.
struct Placement {
    spec: PodSpec,
}

impl Placement {
    fn new(set: &DaemonSet) -> Placement {
        let mut spec = set.spec.template.spec.clone().unwrap_or_default();
        add_tolerations(&mut spec);
        Placement { spec }
    }

    /// Whether a pod should be made on the node, and whether one that is there may stay.
    fn of(&self, node: &Typed<Node>) -> (bool, bool) {
        let name = node.object.name();
        let other = self.spec.node_name.as_deref().is_some_and(|wanted| !wanted.is_empty() && wanted != name);
        let none = BTreeMap::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&none);
        if other || !placement::selects_node(&self.spec, name, labels) {
            return (false, false);
        }
        let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        let borne = |effects: &[&str]| {
            let tolerations = self.spec.tolerations.as_deref().unwrap_or_default();
            placement::tolerates_all(tolerations, taints, effects)
        };
        (borne(&["NoExecute", "NoSchedule"]), borne(&["NoExecute"]))
    }
}

/// Daemons run on nodes in trouble too: they may be what helps.
fn add_tolerations(spec: &mut PodSpec) {
    const ALWAYS: [(&str, &str); 6] = [
        ("not-ready", "NoExecute"),
        ("unreachable", "NoExecute"),
        ("disk-pressure", "NoSchedule"),
        ("memory-pressure", "NoSchedule"),
        ("pid-pressure", "NoSchedule"),
        ("unschedulable", "NoSchedule"),
    ];
    let host = spec.host_network.unwrap_or(false).then_some(("network-unavailable", "NoSchedule"));
    let tolerations = spec.tolerations.get_or_insert_default();
    for (key, effect) in ALWAYS.into_iter().chain(host) {
        let toleration = Toleration {
            key: Some(format!("node.kubernetes.io/{key}")),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
}

/// The pod of the set for one node.
fn pod_for(set: &Typed<DaemonSet>, hash: &str, node: &str) -> Value {
    let mut template = set.spec.template.clone();
    let spec = template.spec.get_or_insert_default();
    add_tolerations(spec);
    // Required terms of the template have had their say in the choice of the node.
    let field = NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_fields: Some(vec![field]), match_expressions: None };
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    affinity.required_during_scheduling_ignored_during_execution =
        Some(NodeSelector { node_selector_terms: vec![term] });
    let mut pod = pods::from_template(&template, &set.object);
    pod["metadata"]["labels"][POD_REVISION] = hash.into();
    if let Some(generation) = generation(set) {
        pod["metadata"]["labels"][POD_GENERATION] = generation.into();
    }
    pod
}

/// The controller. It remembers only how often pods failed lately, and on which node.
#[derive(Default)]
pub(crate) struct DaemonSets {
    failures: Mutex<HashMap<(Arc<str>, String), Failures>>,
}

/// Failures of one set's pods on one node.
#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    last: Timestamp,
}

impl Failures {
    fn held_until(self) -> Timestamp {
        let delay = backoff(FAILED_BACKOFF, FAILED_BACKOFF_MAX, self.count - 1);
        self.last.saturating_add(delay).unwrap_or(self.last)
    }

    /// Whether it has been quiet for so long that the count begins anew.
    fn is_over(self, now: Timestamp) -> bool {
        self.last.saturating_add(FAILED_BACKOFF_MAX * 2).is_ok_and(|end| end <= now)
    }
}

impl DaemonSets {
    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<(Arc<str>, String), Failures>> {
        self.failures.lock().expect("nothing panics while failures are counted")
    }

    fn held(&self, set: &Arc<str>, node: &str) -> Option<Timestamp> {
        self.failures().get(&(set.clone(), node.to_owned())).map(|failures| failures.held_until())
    }

    fn note_failures(&self, set: &Arc<str>, nodes: Vec<String>, now: Timestamp) {
        if nodes.is_empty() {
            return;
        }
        let mut failures = self.failures();
        failures.retain(|_, failures| !failures.is_over(now));
        for node in nodes {
            let entry = failures.entry((set.clone(), node)).or_insert(Failures { count: 0, last: now });
            *entry = Failures { count: entry.count.saturating_add(1), last: now };
        }
    }
}

#[async_trait]
impl Controller for DaemonSets {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<DaemonSet>(), Kind::of::<Pod>(), Kind::of::<Node>(), Kind::of::<ControllerRevision>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<ControllerRevision>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<DaemonSet>();
        let object = change.object();
        if object.kind() == kind {
            return vec![Item::of(object)];
        }
        if object.kind() == Kind::of::<Node>() {
            return sets_that_care(ctx, change);
        }
        let states = change.old.iter().chain(&change.new);
        let mut items: Vec<Item> = states.filter_map(|state| Item::controller_of(state, kind)).collect();
        if let Some(orphan) =
            change.new.as_ref().filter(|new| new.controller().is_none() && !new.labels().is_empty())
        {
            let sets = ctx.informers.of(kind).in_namespace(orphan.namespace());
            let wants = |set: &Typed<DaemonSet>| selector(set).is_some_and(|s| s.matches(orphan.labels()));
            let sets = sets.into_iter().filter_map(Typed::new).filter(wants);
            items.extend(sets.map(|set| Item::of(&set.object)));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(set) = ctx.get::<DaemonSet>(&item.key) else { return Ok(Requeue::Never) };
        let Some(selector) = selector(&set) else { return Ok(Requeue::Never) };
        let object = &set.object;
        if selector.is_everything() {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.";
            ctx.events.warning(object, "SelectingAll", message);
            return Ok(Requeue::Never);
        }
        // While it goes, its history and pods may go or be orphaned in any order: there is nothing to say of it.
        if object.deleted().is_some() {
            return Ok(Requeue::Never);
        }
        let collisions = set.status.as_ref().and_then(|status| status.collision_count);
        let owner = revisions::Owner {
            object,
            selector: &selector,
            template: &set.spec.template,
            collisions,
            hash_label: POD_REVISION,
        };
        let Some(history) = revisions::keep(ctx, &owner).await? else {
            let mut status = set.status.clone().unwrap_or_default();
            status.collision_count = Some(collisions.unwrap_or(0) + 1);
            ctx.update_status(object, &status).await?;
            return Ok(Requeue::Never);
        };
        let hash = history.present().object.labels().get(POD_REVISION).unwrap_or_default().to_owned();
        let pods = ctx.claim(object, &selector, Kind::of::<Pod>()).await?;
        let pods = pods.into_iter().filter_map(Typed::<Pod>::new);
        let daemons: Vec<Daemon> = pods.map(|pod| Daemon { going: ctx.is_going(&pod.object), pod }).collect();
        let nodes = ctx.informer::<Node>().snapshot();
        let nodes: Vec<Typed<Node>> = nodes.values().cloned().filter_map(Typed::new).collect();
        let uid: Arc<str> = object.uid().into();
        let now = ctx.now();
        let held = |node: &str| self.held(&uid, node);
        let mut plan =
            plan(&World { set: &set, nodes: &nodes, daemons: &daemons, hash: &hash, held: &held, now });
        let failed = std::mem::take(&mut plan.failed);
        self.note_failures(&uid, failed, now);
        let acted = carry_out(ctx, &set, &hash, &plan, &daemons).await;
        let tidied = revisions::delete(ctx, surplus(&set, &history, &daemons)).await;
        // The status is written even when acting failed: it is how the user learns of it.
        if set.status.as_ref() != Some(&plan.status) {
            ctx.update_status(object, &plan.status).await?;
        }
        acted.and(tidied).map(|()| Requeue::at(plan.due, now))
    }
}

fn selector(set: &DaemonSet) -> Option<LabelSelector> {
    LabelSelector::from_spec(&set.spec.selector).ok()
}

/// The sets to which a change of a node makes a difference. Nodes change all the time; what matters are
/// their labels and taints.
fn sets_that_care(ctx: &Shared, change: &Change) -> Vec<Item> {
    let read = |node: &Option<Arc<Object>>| node.clone().and_then(Typed::<Node>::new);
    let (old, new) = (read(&change.old), read(&change.new));
    let asked = |node: &Typed<Node>| {
        let spec = node.spec.as_ref();
        (node.metadata.labels.clone(), spec.and_then(|spec| spec.taints.clone()))
    };
    if old.is_some() && old.as_ref().map(asked) == new.as_ref().map(asked) {
        return Vec::new();
    }
    let sets = ctx.informers.of_type::<DaemonSet>().snapshot();
    let cares = |set: &Typed<DaemonSet>| {
        let placement = Placement::new(set);
        let verdict = |node: &Option<Typed<Node>>| node.as_ref().map(|node| placement.of(node));
        verdict(&old) != verdict(&new)
    };
    sets.values().cloned().filter_map(Typed::new).filter(cares).map(|set| Item::of(&set.object)).collect()
}

/// Revisions beyond the limit. Those in use count too, but stay.
fn surplus<'h>(set: &DaemonSet, history: &'h History, daemons: &[Daemon]) -> Vec<&'h revisions::Revision> {
    let limit = set.spec.revision_history_limit.unwrap_or(10);
    let surplus = (history.revisions.len() - 1).saturating_sub(usize::try_from(limit).unwrap_or(0));
    let present = history.present().object.uid();
    let in_use = |revision: &revisions::Revision| {
        let hash = revision.object.labels().get(POD_REVISION);
        let runs = |daemon: &Daemon| daemon.pod.object.labels().get(POD_REVISION) == hash;
        revision.object.uid() == present || hash.is_some() && daemons.iter().any(runs)
    };
    match surplus {
        0 => Vec::new(),
        surplus => revisions::oldest_unused(&history.revisions, in_use, surplus),
    }
}

async fn carry_out(
    ctx: &Ctx,
    set: &Typed<DaemonSet>,
    hash: &str,
    plan: &Plan,
    daemons: &[Daemon],
) -> Result<(), Status> {
    for (warning, reason, message) in &plan.tell {
        match warning {
            true => ctx.events.warning(&set.object, reason, message.clone()),
            false => ctx.events.normal(&set.object, reason, message.clone()),
        }
    }
    let bodies = plan.create.iter().map(|node| pod_for(set, hash, node)).collect();
    let created = create_each(ctx, &set.object, bodies).await;
    let doomed: HashSet<&str> = plan.delete.iter().map(String::as_str).collect();
    let doomed = daemons.iter().filter(|daemon| doomed.contains(daemon.pod.object.uid()));
    let deletions = doomed.map(|daemon| delete_pod(ctx, &set.object, &daemon.pod.object));
    let deleted = futures_util::future::join_all(deletions).await;
    created?;
    deleted.into_iter().find_map(Result::err).map_or(Ok(()), Err)
}

#[cfg(test)]
#[path = "daemonset_tests.rs"]
mod tests;
