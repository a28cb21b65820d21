//! Keeps the number of pods of a ReplicaSet, or of a ReplicationController, at `spec.replicas`.
//!
//! Reads sets and pods from the cache; writes pods and the status of the set. The two kinds differ only in
//! how they write their selector. Upstream: pkg/controller/replicaset and pkg/controller/replication.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec, ReplicationController};
use minke_api::{ApiType, Kind, LabelSelector, Object, Status};
use minke_client::{Change, DeleteOptions};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, nonzero, seconds};
use crate::pods;
use crate::run::Controller;

/// Pods that one pass makes or deletes at most.
const BURST: usize = 500;

/// A set of pods, whatever kind it is kept as.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Set {
    replicas: i32,
    min_ready_seconds: i32,
    selector: LabelSelector,
    template: PodTemplateSpec,
    status: ReplicaSetStatus,
}

/// One of the two kinds.
pub(crate) struct Flavour {
    kind: fn() -> &'static Kind,
    read: fn(&std::sync::Arc<Object>) -> Option<Set>,
    /// Whether the status counts pods that are going.
    counts_terminating: bool,
}

pub(crate) static REPLICA_SETS: Flavour =
    Flavour { kind: Kind::of::<ReplicaSet>, read: read_replica_set, counts_terminating: true };

pub(crate) static REPLICATION_CONTROLLERS: Flavour = Flavour {
    kind: Kind::of::<ReplicationController>,
    read: read_replication_controller,
    counts_terminating: false,
};

fn read_replica_set(object: &std::sync::Arc<Object>) -> Option<Set> {
    let set = Typed::<ReplicaSet>::new(object.clone())?;
    let spec = &set.spec;
    Some(Set {
        replicas: spec.replicas.unwrap_or(1),
        min_ready_seconds: spec.min_ready_seconds.unwrap_or(0),
        selector: LabelSelector::from_spec(&spec.selector).ok()?,
        template: spec.template.clone().unwrap_or_default(),
        status: set.status.clone().unwrap_or_default(),
    })
}

fn read_replication_controller(object: &std::sync::Arc<Object>) -> Option<Set> {
    let set = Typed::<ReplicationController>::new(object.clone())?;
    let spec = set.spec.as_ref()?;
    // The same fields under the same names, except that there are no terminating replicas.
    let status = set.status.as_ref().map(|status| ReplicaSetStatus::from_value(&status.to_value()));
    Some(Set {
        replicas: spec.replicas.unwrap_or(1),
        min_ready_seconds: spec.min_ready_seconds.unwrap_or(0),
        selector: LabelSelector::from_pairs(spec.selector.clone().unwrap_or_default()),
        template: spec.template.clone().unwrap_or_default(),
        status: status.and_then(Result::ok).unwrap_or_default(),
    })
}

/// What one pass will do. Default means that the number is right.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub create: usize,
    /// Uids of pods.
    pub delete: Vec<String>,
}

/// Decides. `active` are the pods of the set that neither are finished nor go; `related` finds, if it is needed,
/// all active pods with the same grandparent, of which nodes should not be crowded.
pub(crate) fn plan(
    replicas: i32,
    active: &[Typed<Pod>],
    related: impl FnOnce() -> Vec<Typed<Pod>>,
    now: Timestamp,
) -> Plan {
    let wanted = usize::try_from(replicas).unwrap_or(0);
    if active.len() < wanted {
        return Plan { create: (wanted - active.len()).min(BURST), delete: Vec::new() };
    }
    let surplus = (active.len() - wanted).min(BURST);
    if surplus == 0 {
        return Plan::default();
    }
    let mut ranked = active.to_vec();
    if surplus < active.len() {
        pods::sort_for_deletion(&mut ranked, &pods::per_node(&related()), now);
    }
    let delete = ranked[..surplus].iter().map(|pod| pod.object.uid().to_owned()).collect();
    Plan { create: 0, delete }
}

/// The status that the pods amount to, and when time alone will change it.
/// `failure` is what went wrong, under the reason for which it was tried.
fn status(
    set: &Set,
    generation: i64,
    active: &[Typed<Pod>],
    terminating: Option<i32>,
    failure: Option<(&str, &Status)>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Timestamp>) {
    let labels = set.template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    let template = LabelSelector::from_pairs(labels.cloned().unwrap_or_default());
    let count = |test: &dyn Fn(&Typed<Pod>) -> bool| active.iter().filter(|pod| test(pod)).count() as i32;
    let available_at = |pod: &Typed<Pod>| pods::available_at(pod, set.min_ready_seconds);
    let mut conditions = set.status.conditions.clone().unwrap_or_default();
    let old = conditions.iter().position(|condition| condition.type_.as_deref() == Some("ReplicaFailure"));
    match (old, failure) {
        (None, Some((reason, error))) => conditions.push(ReplicaSetCondition {
            type_: Some("ReplicaFailure".to_owned()),
            status: Some("True".to_owned()),
            reason: Some(reason.to_owned()),
            message: Some(error.message.clone()),
            last_transition_time: Some(seconds(now)),
        }),
        (Some(at), None) => drop(conditions.remove(at)),
        _ => {}
    }
    let status = ReplicaSetStatus {
        replicas: active.len() as i32,
        fully_labeled_replicas: nonzero(count(&|pod| template.matches(pod.object.labels()))),
        ready_replicas: nonzero(count(&|pod| pods::is_ready(pod))),
        available_replicas: nonzero(count(&|pod| available_at(pod).is_some_and(|at| at <= now))),
        terminating_replicas: terminating,
        observed_generation: Some(generation.max(set.status.observed_generation.unwrap_or(0)))
            .filter(|n| *n != 0),
        conditions: (!conditions.is_empty()).then_some(conditions),
    };
    let next = active.iter().filter_map(available_at).filter(|at| *at > now).min();
    (status, next)
}

pub(crate) struct Sets(pub &'static Flavour);

#[async_trait]
impl Controller for Sets {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![(self.0.kind)(), Kind::of::<Pod>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = (self.0.kind)();
        if change.object().kind() == kind {
            return vec![Item::of(change.object())];
        }
        let states = change.old.iter().chain(&change.new);
        let mut items: Vec<Item> = states.filter_map(|pod| Item::controller_of(pod, kind)).collect();
        if let Some(orphan) =
            change.new.as_ref().filter(|pod| pod.controller().is_none() && !pod.labels().is_empty())
        {
            let sets = ctx.informers.of(kind).in_namespace(orphan.namespace());
            let wants = |set: &std::sync::Arc<Object>| {
                (self.0.read)(set).is_some_and(|set| set.selector.matches(orphan.labels()))
            };
            items.extend(sets.iter().filter(|set| wants(set)).map(|set| Item::of(set)));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(object) = ctx.informers.of(item.kind).get_key(&item.key) else { return Ok(Requeue::Never) };
        let Some(set) = (self.0.read)(&object) else { return Ok(Requeue::Never) };
        let mine = ctx.claim(&object, &set.selector, Kind::of::<Pod>()).await?;
        let mine: Vec<Typed<Pod>> = mine.into_iter().filter_map(Typed::new).collect();
        let (going, active): (Vec<_>, Vec<_>) =
            mine.into_iter().filter(|pod| !pods::is_finished(pod)).partition(|pod| ctx.is_going(&pod.object));
        let mut failure = None;
        if object.deleted().is_none() {
            let plan = plan(set.replicas, &active, || related(ctx, &object, &active), ctx.now());
            let reason = if plan.create > 0 { "FailedCreate" } else { "FailedDelete" };
            failure = carry_out(ctx, &object, &set, plan, &active).await.err().map(|error| (reason, error));
        }
        // The status is written even when acting failed: it is how the user learns why.
        let terminating = self.0.counts_terminating.then_some(going.len() as i32);
        let cause = failure.as_ref().map(|(reason, error)| (*reason, error));
        let (status, next) = status(&set, object.generation(), &active, terminating, cause, ctx.now());
        if status != set.status {
            ctx.update_status(&object, &status).await?;
        }
        match failure {
            Some((_, error)) => Err(error),
            None => Ok(Requeue::at(next, ctx.now())),
        }
    }
}

/// Active pods of all sets with the same controller as this one: on which nodes are they crowded?
fn related(ctx: &Ctx, object: &Object, active: &[Typed<Pod>]) -> Vec<Typed<Pod>> {
    let Some(parent) = object.controller() else { return active.to_vec() };
    let siblings = ctx.informers.of(object.kind()).owned_by(&parent.uid);
    let pods = siblings.iter().flat_map(|sibling| ctx.controlled_by(sibling, Kind::of::<Pod>()));
    let active = pods.filter(|pod| !ctx.is_going(pod)).filter_map(Typed::new);
    active.filter(|pod: &Typed<Pod>| !pods::is_finished(pod)).collect()
}

async fn carry_out(
    ctx: &Ctx,
    object: &Object,
    set: &Set,
    plan: Plan,
    active: &[Typed<Pod>],
) -> Result<(), Status> {
    if plan.create > 0 {
        let pod = pods::from_template(&set.template, object);
        return create_each(ctx, object, vec![pod; plan.create]).await;
    }
    let by_uid: BTreeMap<&str, &Typed<Pod>> = active.iter().map(|pod| (pod.object.uid(), pod)).collect();
    let doomed = plan.delete.iter().filter_map(|uid| by_uid.get(uid.as_str()));
    let deletions = doomed.map(|pod| delete_pod(ctx, object, &pod.object));
    let done = futures_util::future::join_all(deletions).await;
    done.into_iter().find_map(Result::err).map_or(Ok(()), Err)
}

/// Does something for each item, for one at first and then for twice as many each time that all went well: when
/// something is wrong (a quota, say), it does not go wrong hundreds of times.
pub(crate) async fn slow_start<T, F>(items: Vec<T>, act: impl Fn(T) -> F) -> Result<(), Status>
where
    F: Future<Output = Result<(), Status>>,
{
    let (mut items, mut batch) = (items.into_iter(), 1);
    while items.len() > 0 {
        let done = futures_util::future::join_all(items.by_ref().take(batch).map(&act)).await;
        for result in done {
            match result {
                Ok(()) => {}
                // Nothing can be made here any more; not a failure of the owner.
                Err(error) if error.has_cause("NamespaceTerminating") => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        batch *= 2;
    }
    Ok(())
}

/// Creates these pods, by [`slow_start`].
pub(crate) async fn create_each(
    ctx: &Ctx,
    owner: &Object,
    pods: Vec<serde_json::Value>,
) -> Result<(), Status> {
    slow_start(pods, |pod| create_pod(ctx, owner, pod)).await
}

pub(crate) async fn create_pod(ctx: &Ctx, owner: &Object, pod: serde_json::Value) -> Result<(), Status> {
    match ctx.create(Kind::of::<Pod>(), owner.namespace(), pod).await {
        Ok(pod) => {
            ctx.events.normal(owner, "SuccessfulCreate", format!("Created pod: {}", pod.name()));
            Ok(())
        }
        Err(error) => {
            if !error.has_cause("NamespaceTerminating") {
                ctx.events.warning(owner, "FailedCreate", format!("Error creating: {error}"));
            }
            Err(error)
        }
    }
}

pub(crate) async fn delete_pod(ctx: &Ctx, owner: &Object, pod: &Object) -> Result<(), Status> {
    match ctx.delete(pod, DeleteOptions::default()).await {
        Ok(()) => {
            ctx.events.normal(owner, "SuccessfulDelete", format!("Deleted pod: {}", pod.name()));
            Ok(())
        }
        Err(error) => {
            ctx.events.warning(owner, "FailedDelete", format!("Error deleting: {error}"));
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{NOW, now, pod, time};
    use serde_json::{Value, json};

    #[track_caller]
    fn check_plan(replicas: i32, pods: &[Typed<Pod>], create: usize, delete: &[&str]) {
        let plan = plan(replicas, pods, || pods.to_vec(), now());
        assert_eq!(plan.create, create);
        assert_eq!(plan.delete, delete.iter().map(|name| format!("uid-{name}")).collect::<Vec<_>>());
    }

    #[test]
    fn a_plan_makes_what_is_missing_and_deletes_what_is_too_much() {
        let unready = || pod("unready", |p| p["status"]["conditions"][0]["status"] = "False".into());
        check_plan(0, &[], 0, &[]);
        check_plan(3, &[], 3, &[]);
        check_plan(600, &[], 500, &[]);
        check_plan(2, &[pod("a", |_| {}), pod("b", |_| {})], 0, &[]);
        check_plan(2, &[pod("a", |_| {})], 1, &[]);
        check_plan(1, &[pod("a", |_| {}), unready()], 0, &["unready"]);
        check_plan(0, &[pod("a", |_| {}), unready()], 0, &["a", "unready"]);
        check_plan(-1, &[pod("a", |_| {})], 0, &["a"]);
    }

    #[test]
    fn every_plan_settles() {
        for replicas in 0..8 {
            for present in 0..8 {
                let mut world: Vec<Typed<Pod>> =
                    (0..present).map(|n| pod(&format!("p{n}"), |_| {})).collect();
                let first = plan(replicas, &world, || world.clone(), now());
                world.retain(|pod| !first.delete.iter().any(|uid| uid == pod.object.uid()));
                world.extend((0..first.create).map(|n| pod(&format!("new{n}"), |_| {})));
                assert_eq!(plan(replicas, &world, || world.clone(), now()), Plan::default());
            }
        }
    }

    fn set(change: impl FnOnce(&mut Set)) -> Set {
        let template = json!({"metadata": {"labels": {"app": "web"}}});
        let mut set =
            Set { replicas: 2, template: serde_json::from_value(template).unwrap(), ..Set::default() };
        change(&mut set);
        set
    }

    #[test]
    fn the_status_counts_pods() {
        let pods = [
            pod("a", |_| {}),
            pod("b", |p| p["status"]["conditions"][0]["lastTransitionTime"] = time(5).into()),
            pod("c", |p| p["metadata"]["labels"] = json!({"app": "other"})),
            pod("d", |p| p["status"] = Value::Null),
        ];
        let (status, next) = status(&set(|s| s.min_ready_seconds = 15), 4, &pods, Some(1), None, now());
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            json!({"replicas": 4, "fullyLabeledReplicas": 3, "readyReplicas": 3, "availableReplicas": 2,
                   "terminatingReplicas": 1, "observedGeneration": 4})
        );
        assert_eq!(next.map(|at| at.as_second()), Some(NOW + 10));
    }

    #[test]
    fn a_failure_stands_in_the_status_until_it_is_over() {
        let quota = Status::failure(403, "Forbidden", "exceeded quota");
        let (failed, _) = status(&set(|_| {}), 1, &[], None, Some(("FailedCreate", &quota)), now());
        let condition = &failed.conditions.as_ref().unwrap()[0];
        assert_eq!(condition.type_.as_deref(), Some("ReplicaFailure"));
        assert_eq!(condition.reason.as_deref(), Some("FailedCreate"));
        assert_eq!(condition.message.as_deref(), Some("exceeded quota"));
        let later = now() + std::time::Duration::from_secs(60);
        let again =
            status(&set(|s| s.status = failed.clone()), 1, &[], None, Some(("FailedCreate", &quota)), later);
        assert_eq!(again.0, failed, "the same failure changes nothing");
        let (well, _) = status(&set(|s| s.status = failed.clone()), 1, &[], None, None, now());
        assert_eq!(well.conditions, None);
    }
}
