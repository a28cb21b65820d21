//! Evictions: deleting a pod if its disruption budget allows it.
//!
//! What is taken of a budget is written into its status before the pod is deleted, so that two evictions never use the
//! same. Upstream: pkg/registry/core/pod/storage/eviction.go.

use std::sync::Arc;

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use minke_api::{Cause, Details, Kind, LabelSelector, Object, Status, time};
use minke_client::{DeleteOptions, typed};
use serde_json::{Value, json};

use super::reviews::set_condition;
use super::{Call, Registry};
use crate::kinds::tree::Tree;

/// Pods that one budget may name as evicted and not yet seen to go.
const DISRUPTED_MAX: usize = 2000;
/// How often an eviction begins anew because others were quicker.
const ATTEMPTS: usize = 1000;
/// Seconds that a client is asked to wait where it is not known what would help.
const PAUSE: u32 = 10;

/// What the budgets say of a pod that is to go.
enum Verdict {
    /// It may go.
    Free,
    /// It is not healthy, and so is not counted: it may go as it is now, but not when it has become so.
    Spared(Arc<Object>),
    /// It may go when this budget, with this new state, has been charged for it.
    Charge(Arc<Object>, Value),
}

impl Registry {
    /// Deletes a pod, if its disruption budget allows it.
    pub(super) async fn evict(&self, call: &Call<'_>, eviction: &Value) -> Result<(), Status> {
        if eviction.at("metadata").text("name") != call.name {
            return Err(Status::bad_request("name in URL does not match name in Eviction object"));
        }
        let options = super::options::delete_options(eviction.at("deleteOptions"))?;
        let dry_run = call.dry_run || eviction.at("deleteOptions").has("dryRun");
        let call = Call { subresource: "", dry_run, ..*call };
        for _ in 0..ATTEMPTS {
            let pod = self.stored(&call)?;
            let phase = pod.field("status.phase").unwrap_or_default();
            let is_over = pod.deleted().is_some() || matches!(phase, "Succeeded" | "Failed");
            if is_over {
                return self.mark_and_delete(&call, &options).await;
            }
            // What is asked to go in a certain state goes only in that; else it goes in the state that was judged.
            let as_it_is =
                DeleteOptions { revision: options.revision.or(Some(pod.revision())), ..options.clone() };
            if phase == "Pending" {
                match self.mark_and_delete(&call, &as_it_is).await {
                    Err(error) if error.is_conflict() && options.revision.is_none() => continue,
                    done => return done,
                }
            }
            match self.judge(&pod)? {
                Verdict::Free => return self.mark_and_delete(&call, &options).await,
                Verdict::Spared(budget) => {
                    return match self.mark_and_delete(&call, &as_it_is).await {
                        Err(error) if error.is_conflict() && options.revision.is_none() => {
                            Err(still_processed(budget.name()))
                        }
                        done => done,
                    };
                }
                Verdict::Charge(budget, charged) => {
                    if self.put(&call, &budget, charged).await?.is_some() {
                        return self.mark_and_delete(&call, &options).await;
                    }
                }
            }
        }
        let why = format!("couldn't update PodDisruptionBudget of {:?} due to conflicts", call.name);
        Err(Status::timeout(why, PAUSE))
    }

    /// Notes on the pod why it goes, and deletes it; both only in the state that `options` name, if they do.
    async fn mark_and_delete(&self, call: &Call<'_>, options: &DeleteOptions) -> Result<(), Status> {
        let mut options = options.clone();
        let now = time::format_seconds(self.now());
        let marked = loop {
            let pod = self.stored(call)?;
            super::delete::check_preconditions(call.kind, &pod, &options)?;
            let mut marked = pod.value();
            let status = marked.object("status");
            let conditions = status.items("conditions");
            let same = |c: &&Value| c.text("type") == "DisruptionTarget" && c.text("status") == "True";
            let since = conditions.iter().find(same).map(|c| c.text("lastTransitionTime").to_owned());
            let mark = json!({
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting",
                "lastTransitionTime": since.unwrap_or_else(|| now.clone()),
            });
            set_condition(status, mark);
            if let Some(marked) = self.put(call, &pod, marked).await? {
                break marked;
            }
        };
        options.revision = options.revision.map(|_| marked.revision());
        self.delete(call, &options).await.map(drop)
    }

    fn judge(&self, pod: &Object) -> Result<Verdict, Status> {
        let all = self.snapshots.list(Kind::of::<PodDisruptionBudget>(), pod.namespace());
        let mut budgets = all.into_iter().filter_map(|object| {
            let budget = typed::<PodDisruptionBudget>(&object)?;
            let selector = budget.spec.as_ref()?.selector.as_ref()?;
            LabelSelector::from_spec(selector).ok()?.matches(pod.labels()).then_some((object, budget))
        });
        let Some((object, budget)) = budgets.next() else { return Ok(Verdict::Free) };
        if budgets.next().is_some() {
            let why = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
            return Err(Status::failure(500, "", why));
        }
        let status = budget.status.clone().unwrap_or_default();
        let (healthy, desired) =
            (status.current_healthy.unwrap_or_default(), status.desired_healthy.unwrap_or_default());
        let policy = budget.spec.as_ref().and_then(|spec| spec.unhealthy_pod_eviction_policy.as_deref());
        let enough = healthy >= desired && desired > 0;
        if !is_ready(&pod.value()) && (policy == Some("AlwaysAllow") || enough) {
            return Ok(Verdict::Spared(object));
        }
        check_budget(&object, &status)?;
        let mut charged = object.value();
        let allowed = status.disruptions_allowed.unwrap_or_default() - 1;
        let now = time::format_seconds(self.now());
        let new = charged.object("status");
        new.set("disruptionsAllowed", allowed);
        if allowed == 0 {
            let exhausted = json!({
                "type": "DisruptionAllowed", "status": "False", "reason": "InsufficientPods", "message": "",
                "observedGeneration": status.observed_generation, "lastTransitionTime": now,
            });
            set_condition(new, exhausted);
        }
        new.object("disruptedPods").set(pod.name(), now);
        Ok(Verdict::Charge(object, charged))
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.at("status").items("conditions");
    conditions.iter().any(|condition| condition.text("type") == "Ready" && condition.text("status") == "True")
}

/// Whether there is something left of the budget.
fn check_budget(budget: &Object, status: &PodDisruptionBudgetStatus) -> Result<(), Status> {
    let name = budget.name();
    let forbidden = |why: &str| {
        let mut status = Status::forbidden(budget.kind(), name, why);
        status.message = format!("poddisruptionbudget.policy {name:?} is forbidden: {why}");
        Err(status)
    };
    if status.observed_generation.unwrap_or_default() < budget.generation() {
        return Err(still_processed(name));
    }
    let allowed = status.disruptions_allowed.unwrap_or_default();
    if allowed < 0 {
        return forbidden("pdb disruptions allowed is negative");
    }
    if status.disrupted_pods.as_ref().is_some_and(|named| named.len() > DISRUPTED_MAX) {
        return forbidden("DisruptedPods map too big - too many evictions not confirmed by PDB controller");
    }
    if allowed == 0 {
        let desired = status.desired_healthy.unwrap_or_default();
        let healthy = status.current_healthy.unwrap_or_default();
        let why =
            format!("The disruption budget {name} needs {desired} healthy pods and has {healthy} currently");
        return Err(refused(why, 0));
    }
    Ok(())
}

fn still_processed(budget: &str) -> Status {
    refused(format!("The disruption budget {budget} is still being processed by the server."), PAUSE)
}

fn refused(why: String, retry_after_seconds: u32) -> Status {
    let mut status = Status::failure(
        429,
        "TooManyRequests",
        "Cannot evict pod as it would violate the pod's disruption budget.",
    );
    status.details = Some(Details {
        causes: vec![Cause { reason: "DisruptionBudget".to_owned(), message: why, field: String::new() }],
        retry_after_seconds,
        ..Details::default()
    });
    status
}
