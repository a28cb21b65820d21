//! Keeps the pods of a StatefulSet, each under its own name and with its own claims, in their order.
//!
//! Reads StatefulSets, Pods, PersistentVolumeClaims and ControllerRevisions from the cache; writes pods, claims,
//! revisions and the status of the set. Upstream: pkg/controller/statefulset.

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use minke_api::{Kind, LabelSelector, Object, Status, intstr::scaled};
use minke_client::{Change, DeleteOptions, Patch, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, controller_ref, nonzero};
use crate::pods;
use crate::replicaset::slow_start;
use crate::revisions::{self, History, POD_REVISION, Revision};
use crate::run::Controller;

const HASH: &str = "controller.kubernetes.io/hash";
const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// A pod of the set.
pub(crate) struct Member {
    pub pod: Typed<Pod>,
    pub ordinal: i32,
    /// Its deletion was asked for.
    pub going: bool,
}

impl Member {
    fn revision(&self) -> &str {
        self.pod.object.labels().get(POD_REVISION).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        pods::phase(&self.pod) == "Running" && pods::is_ready(&self.pod)
    }

    fn name(&self) -> &str {
        self.pod.object.name()
    }
}

/// A version of the pod template, under the name of its revision.
pub(crate) struct Version {
    pub name: String,
    pub template: PodTemplateSpec,
}

pub(crate) type Claim = Typed<PersistentVolumeClaim>;

/// What was observed.
pub(crate) struct World<'a> {
    pub set: &'a Object,
    pub spec: &'a StatefulSetSpec,
    pub status: &'a StatefulSetStatus,
    pub members: &'a [Member],
    /// The version that a rollout comes from, and the one that it goes to.
    pub current: &'a Version,
    pub update: &'a Version,
    /// Finds a claim of the set's namespace by name.
    pub claim: &'a (dyn Fn(&str) -> Option<Claim> + Sync),
    pub now: Timestamp,
}

/// A pod's name with the claims that it lacks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Missing {
    pub pod: String,
    pub claims: Vec<Value>,
}

/// A claim as it should be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Owned {
    pub name: String,
    pub body: Value,
    /// Somebody else controls it.
    pub conflict: bool,
}

/// What one pass will do, in the order in which it is done.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Names of pods that cannot be made yet, and why.
    pub refuse: Vec<(String, String)>,
    /// Claims of pods that are there already.
    pub claims: Vec<Missing>,
    /// Pods, each with the claims that must be made before it.
    pub create: Vec<(Missing, Value)>,
    /// Members that do not bear the labels of their identity, by place.
    pub label: Vec<usize>,
    /// Claims with other owners than they have.
    pub own: Vec<Owned>,
    /// Members to delete, by place.
    pub delete: Vec<usize>,
    pub status: StatefulSetStatus,
    /// When time alone will change something.
    pub due: Option<Timestamp>,
}

/// Decides.
pub(crate) fn plan(world: &World) -> Plan {
    let mut pass = Pass::new(world);
    pass.plan.status = pass.status();
    let times = world.members.iter().filter_map(|member| pass.available_at(member));
    pass.plan.due = times.filter(|at| *at > world.now).min();
    if world.set.deleted().is_none() && pass.populate() && pass.shrink() {
        pass.roll();
    }
    pass.plan
}

type Placed<'a> = (usize, &'a Member);

struct Pass<'a> {
    world: &'a World<'a>,
    /// One thing at a time, in order.
    ordered: bool,
    start: i32,
    /// The members that there should be, by ordinal from `start`, with their places.
    replicas: Vec<Option<Placed<'a>>>,
    /// The others, highest ordinal first.
    condemned: Vec<Placed<'a>>,
    plan: Plan,
}

impl<'a> Pass<'a> {
    fn new(world: &'a World<'a>) -> Pass<'a> {
        let start = world.spec.ordinals.as_ref().and_then(|ordinals| ordinals.start).unwrap_or(0);
        let mut replicas = vec![None; wanted(world.spec)];
        let mut condemned = Vec::new();
        for placed in world.members.iter().enumerate() {
            let index = placed.1.ordinal.checked_sub(start).and_then(|index| usize::try_from(index).ok());
            match index.and_then(|index| replicas.get_mut(index)) {
                Some(place) => *place = Some(placed),
                None => condemned.push(placed),
            }
        }
        condemned.sort_by_key(|(_, member)| std::cmp::Reverse(member.ordinal));
        let ordered = world.spec.pod_management_policy.as_deref() != Some("Parallel");
        Pass { world, ordered, start, replicas, condemned, plan: Plan::default() }
    }

    fn available_at(&self, member: &Member) -> Option<Timestamp> {
        pods::available_at(&member.pod, self.world.spec.min_ready_seconds.unwrap_or(0))
    }

    /// Ready for long enough, and not on its way out.
    fn serves(&self, member: &Member) -> bool {
        !member.going && self.is_available(member)
    }

    fn is_available(&self, member: &Member) -> bool {
        member.is_ready() && self.available_at(member).is_some_and(|at| at <= self.world.now)
    }

    fn partition(&self) -> Option<i32> {
        self.world.spec.update_strategy.as_ref()?.rolling_update.as_ref()?.partition
    }

    fn is_rolling(&self) -> bool {
        let strategy = self.world.spec.update_strategy.as_ref();
        strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete")
    }

    /// The version that a new pod of this ordinal is made of: below the partition, the one before.
    fn version(&self, ordinal: i32) -> &'a Version {
        let rolling = self.world.spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
        let kept = match rolling {
            Some(rolling) => rolling.partition.unwrap_or(0),
            None if self.is_rolling() => self.world.status.current_replicas.unwrap_or(0),
            None => 0,
        };
        if i64::from(ordinal) < i64::from(self.start) + i64::from(kept) {
            self.world.current
        } else {
            self.world.update
        }
    }

    /// Makes what is missing, and replaces what ended. Says whether the rest of the pass may follow.
    fn populate(&mut self) -> bool {
        for index in 0..self.replicas.len() {
            let goes_on = match self.replicas[index] {
                None => self.create(self.start.saturating_add(index as i32)),
                Some(placed) => self.keep(placed),
            };
            if !goes_on && self.ordered {
                return false;
            }
        }
        true
    }

    fn create(&mut self, ordinal: i32) -> bool {
        let name = format!("{}-{ordinal}", self.world.set.name());
        for claim in self.claims_of(ordinal) {
            let Some(found) = (self.world.claim)(&claim.name) else { continue };
            if found.metadata.owner_references.iter().flatten().any(|owner| is_pod(owner, &name)) {
                // It goes with the pod that was there before, and a new one comes after it.
                return false;
            }
            if found.object.deleted().is_some() {
                self.plan.refuse.push((name, format!("pvc {} is being deleted", claim.name)));
                return false;
            }
        }
        let claims = self.missing_claims(ordinal);
        let pod = pod_of(self.world, self.version(ordinal), ordinal);
        self.plan.create.push((Missing { pod: name, claims }, pod));
        false
    }

    fn keep(&mut self, (at, member): Placed<'a>) -> bool {
        if pods::is_finished(&member.pod) {
            if !member.going {
                self.plan.delete.push(at);
            }
            return false;
        }
        if pods::phase(&member.pod) == "Pending" {
            let claims = self.missing_claims(member.ordinal);
            if !claims.is_empty() {
                self.plan.claims.push(Missing { pod: member.name().to_owned(), claims });
            }
        }
        if self.ordered && !self.serves(member) {
            return false;
        }
        if member.pod.object.labels().get(POD_NAME) != Some(member.name()) {
            self.plan.label.push(at);
        }
        self.settle_owners(member, false);
        true
    }

    /// Deletes members that are too many, the highest ordinals first. Says whether the rest may follow.
    fn shrink(&mut self) -> bool {
        // The claims first: it is by them that the claims of a deleted pod are known to go too.
        for (_, member) in self.condemned.clone() {
            self.settle_owners(member, true);
        }
        let present = self.replicas.iter().flatten().chain(self.condemned.iter().rev());
        let first_bad = present.map(|(at, _)| *at).find(|at| !self.serves(&self.world.members[*at]));
        for (at, member) in self.condemned.clone() {
            if self.ordered && (member.going || !self.is_available(member) && Some(at) != first_bad) {
                return false;
            }
            if !member.going {
                self.plan.delete.push(at);
                if self.ordered {
                    return false;
                }
            }
        }
        true
    }

    /// Deletes members of other versions, so that they are made anew, while few enough are unavailable.
    fn roll(&mut self) {
        if !self.is_rolling() {
            return;
        }
        let outdated = |(_, member): &Placed| !member.going && member.revision() != self.world.update.name;
        let partition = usize::try_from(self.partition().unwrap_or(0)).unwrap_or(0);
        let above = self.replicas.iter().skip(partition).rev().flatten().filter(|placed| outdated(placed));
        let unavailable = self.replicas.iter().filter(|r| r.is_none_or(|(_, m)| !self.serves(m))).count();
        let mut budget = self.max_unavailable().saturating_sub(unavailable);
        let mut chosen = Vec::new();
        for (at, member) in above {
            // What does not work anyway costs nothing; in an ordered set it is waited for.
            if !self.ordered && !self.serves(member) {
                chosen.push(*at);
            } else if budget > 0 {
                budget -= 1;
                chosen.push(*at);
            }
        }
        chosen.retain(|at| !self.plan.delete.contains(at));
        self.plan.delete.extend(chosen);
    }

    fn max_unavailable(&self) -> usize {
        let rolling = self.world.spec.update_strategy.as_ref().and_then(|s| s.rolling_update.as_ref());
        let limit = rolling.and_then(|rolling| rolling.max_unavailable.as_ref());
        let limit = limit.and_then(|limit| scaled(limit, self.replicas.len() as i32, false).ok());
        usize::try_from(limit.unwrap_or(1)).unwrap_or(1).max(1)
    }

    /// What the set's templates make for one pod.
    fn claims_of(&self, ordinal: i32) -> impl Iterator<Item = ClaimOf<'a>> + use<'a> {
        let set = self.world.set.name();
        let templates = self.world.spec.volume_claim_templates.as_deref().unwrap_or_default();
        templates.iter().map(move |template| {
            let volume = template.metadata.name.as_deref().unwrap_or_default();
            ClaimOf { name: claim_name(volume, set, ordinal), template }
        })
    }

    fn missing_claims(&self, ordinal: i32) -> Vec<Value> {
        let missing = self.claims_of(ordinal).filter(|claim| (self.world.claim)(&claim.name).is_none());
        let owner = (self.when_deleted() == "Delete").then(|| controller_ref(self.world.set));
        missing.map(|claim| claim.body(self.world, owner.as_ref())).collect()
    }

    fn when_deleted(&self) -> &'a str {
        let policy = self.world.spec.persistent_volume_claim_retention_policy.as_ref();
        policy.and_then(|policy| policy.when_deleted.as_deref()).unwrap_or("Retain")
    }

    fn when_scaled(&self) -> &'a str {
        let policy = self.world.spec.persistent_volume_claim_retention_policy.as_ref();
        policy.and_then(|policy| policy.when_scaled.as_deref()).unwrap_or("Retain")
    }

    /// By the policy, a claim goes with its set, with its pod once that is `scaled_down`, or with neither.
    fn settle_owners(&mut self, member: &Member, scaled_down: bool) {
        let by_pod = self.when_scaled() == "Delete" && scaled_down;
        let by_set = self.when_deleted() == "Delete" && !by_pod;
        let retained = self.when_scaled() == "Retain" && self.when_deleted() == "Retain";
        for claim in self.claims_of(member.ordinal) {
            let Some(found) = (self.world.claim)(&claim.name) else { continue };
            let present = found.metadata.owner_references.clone().unwrap_or_default();
            let mut owners = present.clone();
            owners.retain(|owner| !is_set(owner, self.world.set.name()) && !is_pod(owner, member.name()));
            let ours = [self.world.set.uid(), member.pod.object.uid()];
            // Another controller, or an earlier set or pod of the same name.
            let foreign = |owner: &OwnerReference| {
                let same_name = is_set(owner, self.world.set.name()) || is_pod(owner, member.name());
                !ours.contains(&owner.uid.as_str()) && (same_name || owner.controller == Some(true))
            };
            let conflict = !retained && present.iter().any(foreign);
            if !conflict {
                owners.extend(by_pod.then(|| controller_ref(&member.pod.object)));
                owners.extend(by_set.then(|| controller_ref(self.world.set)));
            }
            if owners != present {
                let mut body = found.object.value();
                body["metadata"]["ownerReferences"] = json!(owners);
                self.plan.own.push(Owned { name: claim.name, body, conflict });
            }
        }
    }

    fn status(&self) -> StatefulSetStatus {
        let (current, update) = (&self.world.current.name, &self.world.update.name);
        let count =
            |test: &dyn Fn(&Member) -> bool| self.world.members.iter().filter(|m| test(m)).count() as i32;
        let of = |name: &str| count(&|member| !member.going && member.revision() == name);
        let (all, ready, updated) = (count(&|_| true), count(&Member::is_ready), of(update));
        let wanted = self.replicas.len() as i32;
        // A rollout is over when all there are, and no others, are of its version and work.
        let done = self.is_rolling() && [all, ready, updated].iter().all(|count| *count == wanted);
        StatefulSetStatus {
            available_replicas: Some(count(&|member| self.is_available(member))),
            collision_count: Some(self.world.status.collision_count.unwrap_or(0)),
            conditions: self.world.status.conditions.clone(),
            current_replicas: nonzero(if done { updated } else { of(current) }),
            current_revision: Some(if done { update } else { current }.clone()),
            observed_generation: Some(self.world.set.generation()),
            ready_replicas: nonzero(ready),
            replicas: all,
            update_revision: Some(update.clone()),
            updated_replicas: nonzero(updated),
        }
    }
}

fn wanted(spec: &StatefulSetSpec) -> usize {
    usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0)
}

fn claim_name(volume: &str, set: &str, ordinal: i32) -> String {
    format!("{volume}-{set}-{ordinal}")
}

/// The ordinal of a pod of the set, by its name; `None` for a name that the set would not give.
fn ordinal_of(set: &str, pod: &str) -> Option<i32> {
    let digits = pod.strip_prefix(set)?.strip_prefix('-')?;
    let ordinal: i32 = digits.parse().ok().filter(|ordinal| *ordinal >= 0)?;
    (ordinal.to_string() == digits).then_some(ordinal)
}

fn is_set(owner: &OwnerReference, name: &str) -> bool {
    owner.kind == "StatefulSet" && owner.api_version.starts_with("apps/") && owner.name == name
}

fn is_pod(owner: &OwnerReference, name: &str) -> bool {
    owner.kind == "Pod" && owner.api_version == "v1" && owner.name == name
}

/// A claim of one pod.
struct ClaimOf<'a> {
    name: String,
    template: &'a PersistentVolumeClaim,
}

impl ClaimOf<'_> {
    fn body(&self, world: &World, owner: Option<&OwnerReference>) -> Value {
        let mut labels = self.template.metadata.labels.clone().unwrap_or_default();
        labels.extend(world.spec.selector.match_labels.clone().unwrap_or_default());
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {
                "name": self.name,
                "namespace": world.set.namespace(),
                "labels": labels,
                "annotations": self.template.metadata.annotations,
                "ownerReferences": owner.into_iter().collect::<Vec<_>>(),
            },
            "spec": self.template.spec,
        })
    }
}

/// The pod of this ordinal, with its name, its host name and its claims.
fn pod_of(world: &World, version: &Version, ordinal: i32) -> Value {
    let mut pod = pods::from_template(&version.template, world.set);
    let name = format!("{}-{ordinal}", world.set.name());
    let labels = &mut pod["metadata"]["labels"];
    labels[POD_REVISION] = version.name.clone().into();
    labels[POD_NAME] = name.clone().into();
    labels[POD_INDEX] = ordinal.to_string().into();
    pod["metadata"]["name"] = name.clone().into();
    pod["spec"]["hostname"] = name.into();
    if let Some(service) = world.spec.service_name.as_deref().filter(|service| !service.is_empty()) {
        pod["spec"]["subdomain"] = service.into();
    }
    let templates = world.spec.volume_claim_templates.as_deref().unwrap_or_default();
    let names: Vec<&str> = templates.iter().filter_map(|claim| claim.metadata.name.as_deref()).collect();
    let others = pod["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    let own = names.iter().map(|volume| {
        let claim = claim_name(volume, world.set.name(), ordinal);
        json!({ "name": volume, "persistentVolumeClaim": { "claimName": claim } })
    });
    let others = others.into_iter().filter(|other| !names.iter().any(|name| other["name"] == *name));
    let volumes: Vec<Value> = own.chain(others).collect();
    if !volumes.is_empty() {
        pod["spec"]["volumes"] = volumes.into();
    }
    pod
}

pub(crate) struct StatefulSets;

#[async_trait]
impl Controller for StatefulSets {
    fn watches(&self) -> Vec<&'static Kind> {
        let (sets, pods) = (Kind::of::<StatefulSet>(), Kind::of::<Pod>());
        vec![sets, pods, Kind::of::<PersistentVolumeClaim>(), Kind::of::<ControllerRevision>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<ControllerRevision>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<StatefulSet>();
        let object = change.object();
        if object.kind() == kind {
            return vec![Item::of(object)];
        }
        let sets =
            || ctx.informers.of(kind).in_namespace(object.namespace()).into_iter().filter_map(Typed::new);
        if object.kind() == Kind::of::<PersistentVolumeClaim>() {
            // What is gone can be made again; before that nothing can be done.
            let theirs = |set: &Typed<StatefulSet>| makes_claim(set, object.name());
            let gone = change.new.is_none();
            return sets().filter(|set| gone && theirs(set)).map(|set| Item::of(&set.object)).collect();
        }
        let states = change.old.iter().chain(&change.new);
        let mut items: Vec<Item> = states.filter_map(|state| Item::controller_of(state, kind)).collect();
        if let Some(orphan) =
            change.new.as_ref().filter(|new| new.controller().is_none() && !new.labels().is_empty())
        {
            let wants = |set: &Typed<StatefulSet>| selector(set).is_some_and(|s| s.matches(orphan.labels()));
            items.extend(sets().filter(wants).map(|set| Item::of(&set.object)));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(set) = ctx.get::<StatefulSet>(&item.key) else { return Ok(Requeue::Never) };
        let Some(selector) = selector(&set) else { return Ok(Requeue::Never) };
        let spec = &set.spec;
        let (object, status) = (&set.object, set.status.clone().unwrap_or_default());
        let belongs = |pod: &Object| ordinal_of(object.name(), pod.name()).is_some();
        let pods = ctx.claim_those(object, &selector, Kind::of::<Pod>(), belongs).await?;
        let members: Vec<Member> = pods.into_iter().filter_map(|pod| member(ctx, object, pod)).collect();
        let claims = ctx.informer::<PersistentVolumeClaim>();
        let claim = |name: &str| Typed::new(claims.get(object.namespace(), name)?);
        let decide = |current: &Version, update: &Version| {
            let (status, members, claim) = (&status, &members[..], &claim);
            plan(&World { set: object, spec, status, members, current, update, claim, now: ctx.now() })
        };
        if object.deleted().is_some() {
            // Its history may be gone already; what is left to do is to count.
            let named = |name: &Option<String>| Version {
                name: name.clone().unwrap_or_default(),
                template: PodTemplateSpec::default(),
            };
            let plan = decide(&named(&status.current_revision), &named(&status.update_revision));
            return report(ctx, object, &status, &plan.status).await.map(|()| Requeue::Never);
        }
        let collisions = status.collision_count.filter(|count| *count != 0);
        let template = &spec.template;
        let owner = revisions::Owner { object, selector: &selector, template, collisions, hash_label: HASH };
        let Some(history) = revisions::keep(ctx, &owner).await? else {
            let collision_count = Some(collisions.unwrap_or(0) + 1);
            let counted = StatefulSetStatus { collision_count, ..status.clone() };
            return report(ctx, object, &status, &counted).await.map(|()| Requeue::Never);
        };
        let update = Version { name: history.present().object.name().to_owned(), template: template.clone() };
        let known =
            history.revisions.iter().find(|r| Some(r.object.name()) == status.current_revision.as_deref());
        let current = known.and_then(|known| {
            Some(Version { name: known.object.name().to_owned(), template: revisions::template_of(known)? })
        });
        let current = current.as_ref().unwrap_or(&update);
        let plan = decide(current, &update);
        let acted = carry_out(ctx, object, &plan, &members).await;
        let unused = surplus(spec, &history, &[&current.name, &update.name], &members);
        let tidied = revisions::delete(ctx, unused).await;
        // The status is written even when acting failed: it is how the user learns of it.
        report(ctx, object, &status, &plan.status).await?;
        acted.and(tidied).map(|()| Requeue::at(plan.due, ctx.now()))
    }
}

async fn report(
    ctx: &Ctx,
    set: &Object,
    old: &StatefulSetStatus,
    new: &StatefulSetStatus,
) -> Result<(), Status> {
    if new != old {
        ctx.update_status(set, new).await?;
    }
    Ok(())
}

fn selector(set: &StatefulSet) -> Option<LabelSelector> {
    LabelSelector::from_spec(&set.spec.selector).ok()
}

fn member(ctx: &Ctx, set: &Object, pod: Arc<Object>) -> Option<Member> {
    let ordinal = ordinal_of(set.name(), pod.name())?;
    Some(Member { going: ctx.is_going(&pod), ordinal, pod: Typed::new(pod)? })
}

/// Whether a claim of this name is one that the set makes.
fn makes_claim(set: &Typed<StatefulSet>, claim: &str) -> bool {
    let templates = set.spec.volume_claim_templates.as_deref().unwrap_or_default();
    templates.iter().any(|template| {
        let volume = template.metadata.name.as_deref().unwrap_or_default();
        let pod = claim.strip_prefix(volume).and_then(|rest| rest.strip_prefix('-'));
        pod.is_some_and(|pod| ordinal_of(set.object.name(), pod).is_some())
    })
}

/// Revisions that no pod is of, beyond the limit.
fn surplus<'h>(
    spec: &StatefulSetSpec,
    history: &'h History,
    names: &[&str],
    members: &[Member],
) -> Vec<&'h Revision> {
    let in_use = |revision: &Revision| {
        let name = revision.object.name();
        names.contains(&name) || members.iter().any(|member| member.revision() == name)
    };
    let limit = usize::try_from(spec.revision_history_limit.unwrap_or(10)).unwrap_or(usize::MAX);
    if history.revisions.len() <= limit {
        return Vec::new();
    }
    let unused = history.revisions.iter().filter(|revision| !in_use(revision)).count();
    revisions::oldest_unused(&history.revisions, in_use, unused.saturating_sub(limit))
}

async fn carry_out(ctx: &Ctx, set: &Object, plan: &Plan, members: &[Member]) -> Result<(), Status> {
    for (pod, why) in &plan.refuse {
        tell(ctx, set, "create", pod, Some(why));
    }
    for missing in &plan.claims {
        create_claims(ctx, set, missing).await?;
    }
    let creations = plan.create.iter().collect();
    slow_start(creations, |(missing, pod)| create(ctx, set, missing, pod)).await?;
    for at in &plan.label {
        label(ctx, set, &members[*at]).await?;
    }
    for Owned { name, body, conflict } in &plan.own {
        if *conflict {
            let message = format!(
                "PersistentVolumeClaim {name} has a conflicting OwnerReference that acts as a managing controller, \
                 the retention policy is ignored for this claim"
            );
            ctx.events.warning(set, "ConflictingController", message);
        }
        let claim = Target::object(Kind::of::<PersistentVolumeClaim>(), set.namespace(), name);
        ctx.update(claim, body.clone()).await?;
    }
    let deletions = plan.delete.iter().map(|at| delete(ctx, set, &members[*at]));
    let done = futures_util::future::join_all(deletions).await;
    done.into_iter().find_map(Result::err).map_or(Ok(()), Err)
}

/// An event of what was done to a pod, or could not be.
fn tell(ctx: &Ctx, set: &Object, verb: &str, pod: &str, error: Option<&str>) {
    let (first, rest) = verb.split_at(1);
    let verbed = format!("{}{rest}", first.to_uppercase());
    let message = format!("{verb} Pod {pod} in StatefulSet {}", set.name());
    match error {
        None => ctx.events.normal(set, &format!("Successful{verbed}"), format!("{message} successful")),
        Some(why) => {
            ctx.events.warning(set, &format!("Failed{verbed}"), format!("{message} failed error: {why}"))
        }
    }
}

/// Passes `result` on when it was told of, if there was anything to tell.
fn told(ctx: &Ctx, set: &Object, verb: &str, pod: &str, result: Result<(), Status>) -> Result<(), Status> {
    match &result {
        Ok(()) => tell(ctx, set, verb, pod, None),
        Err(error) if error.is_already_exists() || error.has_cause("NamespaceTerminating") => {}
        Err(error) => tell(ctx, set, verb, pod, Some(&error.message)),
    }
    result
}

async fn create(ctx: &Ctx, set: &Object, missing: &Missing, pod: &Value) -> Result<(), Status> {
    let made = match create_claims(ctx, set, missing).await {
        Ok(()) => ctx.create(Kind::of::<Pod>(), set.namespace(), pod.clone()).await.map(drop),
        Err(error) => Err(error),
    };
    told(ctx, set, "create", &missing.pod, made)
}

async fn create_claims(ctx: &Ctx, set: &Object, missing: &Missing) -> Result<(), Status> {
    for claim in &missing.claims {
        let name = claim["metadata"]["name"].as_str().unwrap_or_default();
        let what = |end: &str| {
            format!("create Claim {name} Pod {} in StatefulSet {} {end}", missing.pod, set.name())
        };
        match ctx.create(Kind::of::<PersistentVolumeClaim>(), set.namespace(), claim.clone()).await {
            Ok(_) => ctx.events.normal(set, "SuccessfulCreate", what("success")),
            Err(error) => {
                if !error.is_already_exists() {
                    let message = what("failed error: ").replacen(" Pod ", " for Pod ", 1);
                    ctx.events.warning(set, "FailedCreate", format!("{message}{}", error.message));
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

async fn label(ctx: &Ctx, set: &Object, member: &Member) -> Result<(), Status> {
    let labels = json!({ POD_NAME: member.name(), POD_INDEX: member.ordinal.to_string() });
    let patch = Patch::Merge(json!({ "metadata": { "uid": member.pod.object.uid(), "labels": labels } }));
    let labelled = ctx.patch(Target::of(&member.pod.object), patch).await.map(drop);
    told(ctx, set, "update", member.name(), labelled)
}

async fn delete(ctx: &Ctx, set: &Object, member: &Member) -> Result<(), Status> {
    let deleted = ctx.delete(&member.pod.object, DeleteOptions::default()).await;
    told(ctx, set, "delete", member.name(), deleted)
}

#[cfg(test)]
#[path = "statefulset_tests.rs"]
mod tests;
