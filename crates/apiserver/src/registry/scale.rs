//! The scale of a workload: one number to set, whatever the kind.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use minke_api::{Kind, LabelSelector, Object, Status};
use serde_json::{Value, json};

use super::body::{self, Body, Expected};
use super::write::{Failure, Part};
use super::{Call, Registry, Written, unlisted};
use crate::kinds::tree::Tree;

/// The row of `Scale`. It is not in the table, as it is served only under other resources.
pub static SCALE: Kind = unlisted("autoscaling", "Scale");

/// The scale of a workload, with its name and revision.
pub fn of(object: &Object) -> Result<Arc<Object>, Status> {
    let value = object.value();
    let metadata = value.at("metadata");
    let selector = value.at("spec").at("selector");
    let selector = if object.kind().kind == "ReplicationController" {
        LabelSelector::from_pairs(
            selector.as_object().into_iter().flatten().filter_map(|(k, v)| Some((k, v.as_str()?))),
        )
    } else {
        let spec: meta::LabelSelector = serde_json::from_value(selector.clone()).unwrap_or_default();
        LabelSelector::from_spec(&spec).map_err(Status::internal)?
    };
    let mut scale = json!({
        "metadata": {
            "name": object.name(),
            "namespace": object.namespace(),
            "uid": object.uid(),
            "resourceVersion": object.revision().to_string(),
            "creationTimestamp": metadata.at("creationTimestamp"),
        },
        "spec": {},
        "status": {"replicas": value.at("status").int("replicas").unwrap_or_default()},
    });
    let replicas = value.at("spec").int("replicas").unwrap_or_default();
    // Zero is left out, as in upstream's type.
    if replicas != 0 {
        scale["spec"].set("replicas", replicas);
    }
    if !selector.is_everything() {
        scale["status"].set("selector", selector.to_string());
    }
    Object::from_value(&SCALE, &scale).map(Arc::new).map_err(Status::internal)
}

/// The workload with the number of replicas that `scale` wants.
pub fn merge(object: &Object, scale: &Value) -> Result<Value, Status> {
    let replicas = scale.at("spec").int("replicas").unwrap_or_default();
    if replicas < 0 {
        let mut errors = minke_api::FieldErrors::default();
        errors.invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        errors.into_result(&SCALE, object.name())?;
    }
    let uid = scale.at("metadata").text("uid");
    let mut value = object.value();
    value.object("spec").set("replicas", replicas);
    if !uid.is_empty() {
        value.object("metadata").set("uid", uid);
    }
    Ok(value)
}

impl Registry {
    /// Replaces the scale of a workload.
    pub async fn update_scale(&self, call: &Call<'_>, body: Body) -> Result<Written, Status> {
        let mut warnings = Vec::new();
        let scale = body::check(Expected::object(&SCALE), body, call.validation, &mut warnings)?;
        let given = scale.at("metadata").text("resourceVersion").to_owned();
        loop {
            let old = self.stored(call)?;
            if !given.is_empty() && given != old.revision().to_string() {
                return Err(Status::modified(call.kind, call.name));
            }
            let new = merge(&old, &scale)?;
            match self.replace(call, Part::Main, &old, new, &mut warnings).await {
                Ok(object) => return Ok(Written { object: of(&object)?, created: false, warnings }),
                Err(Failure::Raced) if given.is_empty() => {}
                Err(Failure::Raced) => return Err(Status::modified(call.kind, call.name)),
                Err(Failure::Status(status)) => return Err(*status),
            }
        }
    }
}
