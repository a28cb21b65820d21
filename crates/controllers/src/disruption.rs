//! Keeps the status of PodDisruptionBudgets: how many of their pods may be taken away.
//!
//! Which pods a budget is for is kept up to date with every change of a pod, so that a pass looks at no others. What an
//! eviction has used up (`status.disruptedPods`) counts as gone until the pod is. Also takes back the mark of
//! pods that were to be disrupted and never were. Upstream: pkg/controller/disruption.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, ReplicationController};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{self as meta, Condition};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use minke_api::intstr::scaled;
use minke_api::{Key, Kind, LabelSelector, Object, Status, time};
use minke_client::{Change, Patch, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds};
use crate::pods;
use crate::run::Controller;

/// How long a pod counts as gone that an eviction has named, before it is seen to go.
const DELETION_MAX: Duration = Duration::from_secs(120);
/// How long a pod may be marked for disruption without going.
const MARK_MAX: Duration = Duration::from_secs(120);
const MARK: &str = "DisruptionTarget";

/// How many pods there are to be, by the controllers of those there are.
#[derive(Debug, Clone, Default, PartialEq)]
struct Expected {
    pods: i32,
    /// Whether some pods have no controller, so that nothing is known of how many they should be.
    unmanaged: bool,
}

/// What one pass will do.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    status: PodDisruptionBudgetStatus,
    /// Names of pods that were to go and did not.
    overdue: Vec<String>,
    tell: Vec<(bool, &'static str, String)>,
    /// When a pod that is counted as gone will be counted again.
    due: Option<Timestamp>,
}

/// Decides. `pods` are those that the budget selects; `expected` is asked only where the budget is a share of it.
fn plan(
    budget: &Typed<PodDisruptionBudget>,
    pods: &[Typed<Pod>],
    expected: impl FnOnce() -> Result<Expected, String>,
    now: Timestamp,
) -> Plan {
    let old = budget.status.clone().unwrap_or_default();
    let mut plan = Plan::default();
    if pods.is_empty() {
        plan.tell.push((false, "NoPods", "No matching pods found".to_owned()));
    }
    let (expected, desired) = match wanted(budget, pods, expected) {
        Ok(wanted) => wanted,
        Err(why) => {
            let message = format!("Failed to calculate the number of expected pods: {why}");
            plan.tell.push((true, "CalculateExpectedPodCountFailed", message));
            // Until it is known what may go, nothing may.
            plan.status = PodDisruptionBudgetStatus { disruptions_allowed: Some(0), ..old };
            set_condition(&mut plan.status, "SyncFailed", &why, now);
            return plan;
        }
    };
    if expected.unmanaged {
        plan.tell.push((true, "UnmanagedPods", unmanaged_text(budget)));
    }
    let mut disrupted = BTreeMap::new();
    for pod in pods.iter().filter(|pod| pod.object.deleted().is_none()) {
        let named = old.disrupted_pods.as_ref().and_then(|named| named.get(pod.object.name()));
        // Another of the same name may be there by now.
        let Some(since) = named.filter(|since| pod.object.created().is_none_or(|made| made <= since.0))
        else {
            continue;
        };
        let until = since.0.saturating_add(DELETION_MAX).unwrap_or(now);
        if until < now {
            plan.overdue.push(pod.object.name().to_owned());
        } else {
            plan.due = Some(plan.due.map_or(until, |due| due.min(until)));
            disrupted.insert(pod.object.name().to_owned(), since.clone());
        }
    }
    let stays =
        |pod: &&Typed<Pod>| pod.object.deleted().is_none() && !disrupted.contains_key(pod.object.name());
    let healthy = pods.iter().filter(stays).filter(|pod| pods::is_ready(pod)).count() as i32;
    // A budget without pods allows nothing: when its first pods appear, it may not be known yet.
    let allowed = if expected.pods > 0 { (healthy - desired).max(0) } else { 0 };
    plan.status = PodDisruptionBudgetStatus {
        conditions: old.conditions,
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        disruptions_allowed: Some(allowed),
        expected_pods: Some(expected.pods),
        observed_generation: Some(budget.object.generation()),
    };
    set_condition(&mut plan.status, if allowed > 0 { "SufficientPods" } else { "InsufficientPods" }, "", now);
    plan
}

/// How many pods there are to be, and how many of them have to be healthy.
fn wanted(
    budget: &PodDisruptionBudget,
    pods: &[Typed<Pod>],
    expected: impl FnOnce() -> Result<Expected, String>,
) -> Result<(Expected, i32), String> {
    let spec = budget.spec.clone().unwrap_or_default();
    let share =
        |amount: &IntOrString, whole: i32| scaled(amount, whole, true).map_err(|error| error.to_string());
    match (&spec.max_unavailable, &spec.min_available) {
        (Some(amount), _) => {
            let expected = expected()?;
            let desired = (expected.pods - share(amount, expected.pods)?).max(0);
            Ok((expected, desired))
        }
        (None, Some(IntOrString::Int(amount))) => {
            Ok((Expected { pods: pods.len() as i32, unmanaged: false }, *amount))
        }
        (None, Some(amount)) => {
            let expected = expected()?;
            let desired = share(amount, expected.pods)?;
            Ok((expected, desired))
        }
        (None, None) => Ok((Expected::default(), 0)),
    }
}

fn set_condition(status: &mut PodDisruptionBudgetStatus, reason: &str, message: &str, now: Timestamp) {
    let holds = if reason == "SufficientPods" { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    let old = conditions.iter().find(|condition| condition.type_ == "DisruptionAllowed");
    let since = old.filter(|old| old.status == holds).map(|old| old.last_transition_time.clone());
    let condition = Condition {
        type_: "DisruptionAllowed".to_owned(),
        status: holds.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: status.observed_generation,
        last_transition_time: since.unwrap_or_else(|| seconds(now)),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == "DisruptionAllowed") {
        Some(old) => *old = condition,
        None => conditions.push(condition),
    }
}

/// Upstream writes the selector as Go does.
fn unmanaged_text(budget: &PodDisruptionBudget) -> String {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.clone()).unwrap_or_default();
    let labels = selector.match_labels.unwrap_or_default();
    let labels: String = labels.iter().map(|(key, value)| format!("{key}: {value},")).collect();
    let requirements: String = selector
        .match_expressions
        .iter()
        .flatten()
        .map(|one: &meta::LabelSelectorRequirement| {
            let values = one.values.clone().unwrap_or_default().join(" ");
            format!(
                "LabelSelectorRequirement{{Key:{},Operator:{},Values:[{values}],}},",
                one.key, one.operator
            )
        })
        .collect();
    format!(
        "Pods selected by this PodDisruptionBudget (selector: &LabelSelector{{MatchLabels:map[string]string{{{labels}}},MatchExpressions:[]LabelSelectorRequirement{{{requirements}}},}}) were found to be unmanaged. As a result, the status of the PDB cannot be calculated correctly, which may result in undefined behavior. To account for these pods please set \".spec.minAvailable\" field of the PDB to an integer value."
    )
}

/// Since when the pod has been marked for disruption by someone who should have deleted it by now.
fn marked_since(pod: &Typed<Pod>) -> Option<Timestamp> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let mark = conditions.find(|condition| condition.type_ == MARK && condition.status == "True")?;
    // The kubelet takes as long as it takes.
    let stale = mark.reason.as_deref() != Some("TerminationByKubelet")
        && pod.object.deleted().is_none()
        && !pods::is_finished(pod);
    stale.then(|| mark.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0))
}

/// A budget and its pods.
#[derive(Default)]
struct Budget {
    spec: Option<meta::LabelSelector>,
    selector: Option<LabelSelector>,
    pods: BTreeSet<Key>,
}

impl Budget {
    fn selects(&self, pod: &Object) -> bool {
        self.selector.as_ref().is_some_and(|selector| selector.matches(pod.labels()))
    }
}

#[derive(Default)]
pub(crate) struct Disruption {
    budgets: Mutex<BTreeMap<Key, Budget>>,
}

#[async_trait]
impl Controller for Disruption {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![
            Kind::of::<PodDisruptionBudget>(),
            Kind::of::<Pod>(),
            Kind::of::<Deployment>(),
            Kind::of::<ReplicaSet>(),
            Kind::of::<ReplicationController>(),
            Kind::of::<StatefulSet>(),
        ]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        match object.kind().kind {
            "PodDisruptionBudget" => {
                self.follow_budget(ctx, change);
                vec![Item::of(object)]
            }
            "Pod" => self.follow_pod(change),
            // As many pods as it is to have count, whether they are there or not.
            _ if change.old.as_ref().is_none_or(|old| old.generation() != object.generation()) => {
                pods_of(ctx, object).iter().flat_map(|pod| self.budgets_of(pod)).collect()
            }
            _ => Vec::new(),
        }
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        if item.kind == Kind::of::<Pod>() {
            return take_back(ctx, item).await;
        }
        let Some(budget) = ctx.get::<PodDisruptionBudget>(&item.key) else { return Ok(Requeue::Never) };
        let pods = self.pods_in(ctx, &item.key);
        let plan = plan(&budget, &pods, || expected(ctx, &pods), ctx.now());
        for (warning, reason, message) in plan.tell {
            match warning {
                true => ctx.events.warning(&budget.object, reason, message),
                false => ctx.events.normal(&budget.object, reason, message),
            }
        }
        for pod in pods.iter().filter(|pod| plan.overdue.iter().any(|name| name == pod.object.name())) {
            let message = format!("Pod was expected by PDB {} to be deleted but it wasn't", item.key);
            ctx.events.warning(&pod.object, "NotDeleted", message);
        }
        if budget.status.as_ref() != Some(&plan.status) {
            ctx.update_status(&budget.object, &plan.status).await?;
        }
        Ok(Requeue::at(plan.due, ctx.now()))
    }
}

impl Disruption {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Key, Budget>> {
        self.budgets.lock().expect("nothing panics while the budgets are locked")
    }

    fn follow_budget(&self, ctx: &Shared, change: &Change) {
        // Locked while the pods are looked through: none is missed that comes meanwhile.
        let mut budgets = self.lock();
        let key = change.object().key();
        let Some(new) = change.new.clone().and_then(Typed::<PodDisruptionBudget>::new) else {
            budgets.remove(key);
            return;
        };
        let spec = new.spec.as_ref().and_then(|spec| spec.selector.clone());
        let budget = budgets.entry(key.clone()).or_default();
        if budget.spec == spec && budget.selector.is_some() {
            return;
        }
        budget.selector = spec.as_ref().and_then(|spec| LabelSelector::from_spec(spec).ok());
        budget.spec = spec;
        let pods = ctx.informers.of(Kind::of::<Pod>()).in_namespace(&key.namespace);
        let selected = pods.iter().filter(|pod| budget.selects(pod)).map(|pod| pod.key().clone());
        budget.pods = selected.collect();
    }

    fn follow_pod(&self, change: &Change) -> Vec<Item> {
        let pod = change.object();
        let mut items = Vec::new();
        let mut budgets = self.lock();
        let from = Key::new(pod.namespace(), "");
        for (key, budget) in
            budgets.range_mut(from.clone()..).take_while(|(key, _)| key.namespace == from.namespace)
        {
            let concerned = match &change.new {
                Some(new) if budget.selects(new) => {
                    budget.pods.insert(pod.key().clone());
                    true
                }
                _ => budget.pods.remove(pod.key()),
            };
            if concerned {
                items.push(Item { kind: Kind::of::<PodDisruptionBudget>(), key: key.clone() });
            }
        }
        drop(budgets);
        let is_marked =
            |pod: &Arc<Object>| Typed::new(pod.clone()).is_some_and(|pod| marked_since(&pod).is_some());
        if change.new.as_ref().is_some_and(is_marked) {
            items.push(Item::of(pod));
        }
        items
    }

    fn budgets_of(&self, pod: &Object) -> Vec<Item> {
        let budgets = self.lock();
        let from = Key::new(pod.namespace(), "");
        let here = budgets.range(from.clone()..).take_while(|(key, _)| key.namespace == from.namespace);
        let of_pod = here.filter(|(_, budget)| budget.pods.contains(pod.key()));
        of_pod.map(|(key, _)| Item { kind: Kind::of::<PodDisruptionBudget>(), key: key.clone() }).collect()
    }

    fn pods_in(&self, ctx: &Ctx, key: &Key) -> Vec<Typed<Pod>> {
        let budgets = self.lock();
        let keys = budgets.get(key).into_iter().flat_map(|budget| &budget.pods);
        let informer = ctx.informer::<Pod>();
        keys.filter_map(|key| informer.get_key(key)).filter_map(Typed::new).collect()
    }
}

/// One pod of each set that `object` is or controls: pods of a set are alike.
fn pods_of(ctx: &Shared, object: &Object) -> Vec<Arc<Object>> {
    let owned = |kind, owner: &Object| ctx.informers.of(kind).owned_by(owner.uid());
    let sets = match object.kind().kind {
        "Deployment" => owned(Kind::of::<ReplicaSet>(), object),
        _ => return owned(Kind::of::<Pod>(), object).into_iter().take(1).collect(),
    };
    sets.iter().flat_map(|set| owned(Kind::of::<Pod>(), set).into_iter().take(1)).collect()
}

/// Adds up how many pods the controllers of these pods want.
fn expected(ctx: &Ctx, pods: &[Typed<Pod>]) -> Result<Expected, String> {
    let mut seen = BTreeSet::new();
    let mut scales: BTreeMap<String, i32> = BTreeMap::new();
    let mut unmanaged = false;
    for pod in pods {
        let Some(controller) = pod.object.controller() else {
            unmanaged = true;
            continue;
        };
        if seen.insert(controller.uid.to_string()) {
            let scale = scale(ctx, pod.object.namespace(), controller)?;
            let (uid, replicas) =
                scale.ok_or_else(|| format!("found no controllers for pod {:?}", pod.object.name()))?;
            scales.insert(uid, replicas);
        }
    }
    Ok(Expected { pods: scales.values().sum(), unmanaged })
}

/// Who decides on how many pods there are, by uid, and how many it wants: the Deployment of a ReplicaSet, if it
/// has one, or else the controller itself.
fn scale(
    ctx: &Ctx,
    namespace: &str,
    controller: &minke_api::OwnerReference,
) -> Result<Option<(String, i32)>, String> {
    let kind = Kind::by_api_version(&controller.api_version, &controller.kind);
    let Some(kind) = kind else {
        return Err(format!(
            "no matches for kind {:?} in version {:?}",
            controller.kind, controller.api_version
        ));
    };
    if kind.subresource("scale").is_none() {
        return Err(format!("{} does not implement the scale subresource", kind.qualified_plural()));
    }
    let named = |kind: &'static Kind, owner: &minke_api::OwnerReference| {
        let found = ctx.informers.of(kind).get(namespace, &owner.name);
        found.filter(|found| *found.uid() == *owner.uid)
    };
    let Some(set) = named(kind, controller) else { return Ok(None) };
    let deployments = Kind::of::<Deployment>();
    let of_deployment = set.controller().filter(|owner| *owner.kind == *deployments.kind);
    let scaled = of_deployment.and_then(|owner| named(deployments, owner)).unwrap_or(set);
    Ok(Some((scaled.uid().to_owned(), replicas(scaled).unwrap_or(1))))
}

fn replicas(object: Arc<Object>) -> Option<i32> {
    match object.kind().kind {
        "Deployment" => Typed::<Deployment>::new(object)?.spec.replicas,
        "ReplicaSet" => Typed::<ReplicaSet>::new(object)?.spec.replicas,
        "StatefulSet" => Typed::<StatefulSet>::new(object)?.spec.replicas,
        _ => Typed::<ReplicationController>::new(object)?.spec.as_ref()?.replicas,
    }
}

/// Unmarks a pod that was to be disrupted and was not.
async fn take_back(ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
    let Some(pod) = ctx.get::<Pod>(&item.key) else { return Ok(Requeue::Never) };
    let Some(since) = marked_since(&pod) else { return Ok(Requeue::Never) };
    let now = ctx.now();
    let end = since.saturating_add(MARK_MAX).unwrap_or(now);
    if end > now {
        return Ok(Requeue::at(Some(end), now));
    }
    let unmarked = json!({
        "type": MARK, "status": "False", "reason": null, "message": null,
        "lastTransitionTime": time::format_seconds(now),
    });
    let patch = json!({ "metadata": { "uid": pod.object.uid() }, "status": { "conditions": [unmarked] } });
    ctx.patch(Target::of(&pod.object).sub("status"), Patch::Strategic(patch)).await?;
    Ok(Requeue::Never)
}
