//! What is posted and answered with something other than a stored object: bindings, token requests, reviews.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Binding, Pod};
use minke_api::{Kind, Object, Status, time};
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
            if self.put(&call, &old, pod).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// Stores a changed object and returns it as it is now; `None` when someone else was faster.
    pub(super) async fn put(
        &self,
        call: &Call<'_>,
        old: &Arc<Object>,
        mut value: Value,
    ) -> Result<Option<Arc<Object>>, Status> {
        let draft = encode(old.kind(), &mut value)?;
        if call.dry_run || draft.same_as(old) {
            return Ok(Some(old.clone()));
        }
        match self.commit_one(old.kind(), old.name(), Op::replace(draft, old)).await {
            Ok(object) => Ok(Some(object)),
            Err(Failure::Raced) => Ok(None),
            Err(Failure::Status(status)) => Err(*status),
        }
    }
}

fn success() -> (u16, Value) {
    (201, serde_json::to_value(Status::success(201)).expect("a status serialises"))
}

/// Adds the condition or replaces that of its type.
pub(super) fn set_condition(status: &mut Value, condition: Value) {
    let mut conditions = status.items("conditions").to_vec();
    match conditions.iter_mut().find(|c| c.text("type") == condition.text("type")) {
        Some(same) => *same = condition,
        None => conditions.push(condition),
    }
    status.set("conditions", conditions);
}
