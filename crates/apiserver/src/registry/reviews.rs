//! What is posted and answered with something other than a stored object: bindings, evictions, token
//! requests, reviews.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Binding, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use minke_api::{Cause, Details, Kind, LabelSelector, Object, Status, time};
use minke_client::{DeleteOptions, typed};
use minke_store::Op;
use serde_json::{Value, json};

use super::body::{self, Body, Expected};
use super::write::{Failure, encode};
use super::{Call, Registry};
use crate::kinds::tree::Tree;
use crate::reviews;

impl Registry {
    /// Whether a POST to this resource is answered here.
    pub fn is_posted(kind: &Kind, subresource: &str) -> bool {
        match subresource {
            "" => !kind.has_verb("get") && kind.has_verb("create"),
            _ => matches!(subresource, "binding" | "eviction" | "token"),
        }
    }

    /// Answers a POST with a status code and a body.
    pub async fn post(
        &self,
        call: &Call<'_>,
        body: Body,
        warnings: &mut Vec<String>,
    ) -> Result<(u16, Value), Status> {
        let expected = match call.kind.subresource(call.subresource) {
            None => Expected::object(call.kind),
            Some(sub) => {
                let (group, version) = sub.group_version.unwrap_or((call.kind.group, call.kind.version));
                Expected { group, version, kind: sub.kind }
            }
        };
        let body = body::check(expected, body, call.validation, warnings)?;
        match expected.kind {
            "Binding" => self.bind(call, &body).await.map(|()| success()),
            "Eviction" => self.evict(call, &body).await.map(|()| success()),
            "TokenRequest" => {
                let token =
                    self.tokens.issue(&*self.snapshots, call.namespace, call.name, body, self.now())?;
                Ok((201, token))
            }
            _ => {
                let answer = reviews::review(
                    call.kind,
                    call.namespace,
                    body,
                    call.user,
                    &self.authenticator,
                    &self.authorizer,
                    self.now(),
                )?;
                Ok((201, answer))
            }
        }
    }

    /// Assigns a pod to a node.
    async fn bind(&self, call: &Call<'_>, binding: &Value) -> Result<(), Status> {
        let kind = Kind::of::<Pod>();
        let metadata = binding.at("metadata");
        let name = if call.name.is_empty() || call.kind == Kind::of::<Binding>() {
            metadata.text("name")
        } else {
            call.name
        };
        let node = binding.at("target").text("name");
        let mut errors = minke_api::FieldErrors::default();
        if !matches!(binding.at("target").text("kind"), "" | "Node") {
            errors.not_supported("target.kind", binding.at("target").text("kind"), &["Node", "<empty>"]);
        }
        if node.is_empty() {
            errors.required("target.name", "");
        }
        errors.into_result(Kind::of::<Binding>(), name)?;
        let call = Call { kind, name, subresource: "binding", ..*call };
        let refuse = |why: &str| {
            let mut status = Status::conflict(kind, name, why);
            status.message = format!("Operation cannot be fulfilled on pods/binding {name:?}: {why}");
            status
        };
        loop {
            let old = self.stored(&call)?;
            let uid = metadata.text("uid");
            if !uid.is_empty() && uid != old.uid() {
                return Err(refuse(&format!(
                    "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                    old.uid()
                )));
            }
            let revision = metadata.text("resourceVersion");
            if !revision.is_empty() && revision != old.revision().to_string() {
                return Err(Status::modified(kind, name));
            }
            let mut pod = old.value();
            if old.deleted().is_some() {
                return Err(refuse(&format!("pod {name} is being deleted, cannot be assigned to a host")));
            }
            let assigned = pod.at("spec").text("nodeName");
            if !assigned.is_empty() {
                return Err(refuse(&format!("pod {name} is already assigned to node {assigned:?}")));
            }
            if pod.at("spec").has("schedulingGates") {
                return Err(refuse(&format!("pod {name} has non-empty .spec.schedulingGates")));
            }
            pod.object("spec").set("nodeName", node);
            for map in ["annotations", "labels"] {
                if metadata.has(map) {
                    let kept = pod.object("metadata").object(map);
                    metadata.members(map).for_each(|(key, value)| kept.set(key, value.clone()));
                }
            }
            let status = pod.object("status");
            status.unset("nominatedNodeName");
            set_condition(
                status,
                json!({
                    "type": "PodScheduled",
                    "status": "True",
                    "lastProbeTime": null,
                    "lastTransitionTime": time::format_seconds(self.now()),
                }),
            );
            if self.put(&call, &old, pod).await? {
                return Ok(());
            }
        }
    }

    /// Stores a changed object; `false` when someone else was faster.
    async fn put(&self, call: &Call<'_>, old: &Arc<Object>, mut value: Value) -> Result<bool, Status> {
        let draft = encode(old.kind(), &mut value)?;
        if call.dry_run {
            return Ok(true);
        }
        match self.commit_one(old.kind(), old.name(), Op::replace(draft, old)).await {
            Ok(_) => Ok(true),
            Err(Failure::Raced) => Ok(false),
            Err(Failure::Status(status)) => Err(*status),
        }
    }

    /// Deletes a pod, if its disruption budget allows it.
    async fn evict(&self, call: &Call<'_>, eviction: &Value) -> Result<(), Status> {
        let given = eviction.at("metadata").text("name");
        if !given.is_empty() && given != call.name {
            return Err(Status::bad_request("name in URL does not match name in Eviction object"));
        }
        let mut options = super::options::delete_options(eviction.at("deleteOptions"))?;
        if eviction.at("deleteOptions").has("dryRun") && !call.dry_run {
            return Err(Status::bad_request("Non-dry-run requests cannot have dryRun in deleteOptions"));
        }
        let call = Call { subresource: "", ..*call };
        loop {
            let pod = self.stored(&call)?;
            let value = pod.value();
            let needs_no_budget = pod.deleted().is_some()
                || matches!(value.at("status").text("phase"), "Succeeded" | "Failed" | "Pending");
            if !needs_no_budget && !self.take_disruption(&call, &pod, &value).await? {
                continue;
            }
            if pod.deleted().is_none() && !call.dry_run {
                let mut marked = value;
                set_condition(
                    marked.object("status"),
                    json!({
                        "type": "DisruptionTarget",
                        "status": "True",
                        "reason": "EvictionByEvictionAPI",
                        "message": "Eviction API: evicting",
                        "lastTransitionTime": time::format_seconds(self.now()),
                    }),
                );
                // Losing this race only means that the reason is not shown.
                self.put(&call, &pod, marked).await?;
            }
            options.uid.get_or_insert_with(|| pod.uid().to_owned());
            self.delete(&call, &DeleteOptions { revision: None, ..options }).await?;
            return Ok(());
        }
    }

    /// Uses up one of the disruptions that the pod's budget allows; `false` when it was changed meanwhile.
    async fn take_disruption(&self, call: &Call<'_>, pod: &Object, value: &Value) -> Result<bool, Status> {
        let budgets: Vec<(Arc<Object>, Arc<PodDisruptionBudget>)> = self
            .snapshots
            .list(Kind::of::<PodDisruptionBudget>(), pod.namespace())
            .into_iter()
            .filter_map(|object| {
                let budget = typed::<PodDisruptionBudget>(&object)?;
                let selector = budget.spec.as_ref()?.selector.as_ref()?;
                LabelSelector::from_spec(selector).ok()?.matches(pod.labels()).then_some((object, budget))
            })
            .collect();
        let (object, budget) = match &budgets[..] {
            [] => return Ok(true),
            [one] => one,
            _ => {
                return Err(Status::failure(
                    500,
                    "",
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
        };
        let Some(status) = &budget.status else { return Err(still_processed(object.name())) };
        if status.observed_generation.unwrap_or_default() < object.generation() {
            return Err(still_processed(object.name()));
        }
        let healthy = status.current_healthy.unwrap_or_default();
        let desired = status.desired_healthy.unwrap_or_default();
        let allowed = status.disruptions_allowed.unwrap_or_default();
        let ready = value
            .at("status")
            .items("conditions")
            .iter()
            .any(|c| c.text("type") == "Ready" && c.text("status") == "True");
        let policy = budget.spec.as_ref().and_then(|spec| spec.unhealthy_pod_eviction_policy.as_deref());
        // A pod that is not ready is not counted; it may go when enough others are healthy.
        let spared = !ready && (policy == Some("AlwaysAllow") || healthy >= desired && desired > 0);
        if spared {
            return Ok(true);
        }
        if allowed <= 0 {
            let message = format!(
                "The disruption budget {} needs {desired} healthy pods and has {healthy} currently",
                object.name(),
            );
            return Err(refuse_eviction(message, 0));
        }
        if call.dry_run {
            return Ok(true);
        }
        let mut new = object.value();
        let new_status = new.object("status");
        new_status.set("disruptionsAllowed", allowed - 1);
        new_status.object("disruptedPods").set(pod.name(), time::format_seconds(self.now()));
        self.put(call, object, new).await
    }
}

fn success() -> (u16, Value) {
    (201, serde_json::to_value(Status::success(201)).expect("a status serialises"))
}

fn still_processed(budget: &str) -> Status {
    refuse_eviction(format!("The disruption budget {budget} is still being processed by the server."), 10)
}

fn refuse_eviction(why: String, retry_after_seconds: u32) -> Status {
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

/// Adds the condition or replaces that of its type.
fn set_condition(status: &mut Value, condition: Value) {
    let mut conditions = status.items("conditions").to_vec();
    match conditions.iter_mut().find(|c| c.text("type") == condition.text("type")) {
        Some(same) => *same = condition,
        None => conditions.push(condition),
    }
    status.set("conditions", conditions);
}
