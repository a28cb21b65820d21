//! Subresources that write a part of an object: which part, and what may change in it.

use std::sync::Arc;

use minke_api::{FieldErrors, Object, Status};
use serde_json::Value;

use super::body::{self, Body, Expected};
use super::write::{Failure, Part};
use super::{Call, Registry, Written, convert, meta};
use crate::kinds::tree::Tree;

/// Turns `new`, sent to the subresource of the call, into the whole object that it makes of `old`, and says
/// as what that is to be stored.
pub fn merge(call: &Call<'_>, old: &Object, new: &mut Value) -> Result<Part, Status> {
    let merged = match call.subresource {
        "" => return Ok(Part::Main),
        "status" => return Ok(Part::Status),
        "finalize" => {
            let mut merged = old.value();
            meta::copy("finalizers", new.at("spec"), merged.object("spec"));
            merged
        }
        "approval" => {
            let mut merged = old.value();
            meta::copy("conditions", new.at("status"), merged.object("status"));
            merged
        }
        "ephemeralcontainers" => ephemeral_containers(old, new)?,
        "resize" => super::resize::resize(old, new)?,
        other => return Err(Status::internal(format!("{other} cannot be written like an object"))),
    };
    let revision = new.at("metadata").text("resourceVersion").to_owned();
    *new = merged;
    new.object("metadata").set("resourceVersion", revision);
    Ok(Part::Merged)
}

/// Ephemeral containers may only be added.
fn ephemeral_containers(old: &Object, new: &Value) -> Result<Value, Status> {
    let mut merged = old.value();
    let (had, wanted) = (
        merged.at("spec").items("ephemeralContainers").to_vec(),
        new.at("spec").items("ephemeralContainers"),
    );
    let mut errors = FieldErrors::default();
    for container in &had {
        let name = container.text("name");
        match wanted.iter().find(|c| c.text("name") == name) {
            None => errors.forbidden(
                "spec.ephemeralContainers",
                &format!("existing ephemeral containers {name:?} may not be removed\n"),
            ),
            Some(same) if !same_but_for_defaults(container, same) => errors.forbidden(
                "spec.ephemeralContainers",
                &format!("existing ephemeral containers {name:?} may not be changed\n"),
            ),
            Some(_) => {}
        }
    }
    errors.into_result(old.kind(), old.name())?;
    // What was there keeps its defaults.
    let mut list = had.clone();
    list.extend(wanted.iter().filter(|c| !had.iter().any(|h| h.text("name") == c.text("name"))).cloned());
    if !list.is_empty() {
        merged.object("spec").set("ephemeralContainers", list);
    }
    Ok(merged)
}

/// Whether everything that `given` says stands in `stored`.
fn same_but_for_defaults(stored: &Value, given: &Value) -> bool {
    match (stored, given) {
        (Value::Object(stored), Value::Object(given)) => given
            .iter()
            .all(|(name, value)| stored.get(name).is_some_and(|s| same_but_for_defaults(s, value))),
        (Value::Array(stored), Value::Array(given)) => {
            stored.len() == given.len() && stored.iter().zip(given).all(|(s, g)| same_but_for_defaults(s, g))
        }
        _ => stored == given,
    }
}

impl Registry {
    /// PUT to a subresource that takes the object itself.
    pub async fn update_part(&self, call: &Call<'_>, body: Body) -> Result<Written, Status> {
        match call.subresource {
            "" => return self.update(call, Part::Main, body).await,
            "status" => return self.update(call, Part::Status, body).await,
            "scale" => return self.update_scale(call, body).await,
            _ => {}
        }
        let mut warnings = Vec::new();
        let body = body::check(Expected::object(call.kind), body, call.validation, &mut warnings)?;
        let body = convert::to_storage(call.kind, body);
        let given = body.at("metadata").text("resourceVersion").to_owned();
        let name = body.at("metadata").text("name");
        if !name.is_empty() && name != call.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                call.name
            )));
        }
        loop {
            let old: Arc<Object> = self.stored(call)?;
            if !given.is_empty() && given != old.revision().to_string() {
                return Err(Status::modified(call.kind, call.name));
            }
            let mut new = body.clone();
            let part = merge(call, &old, &mut new)?;
            match self.replace(call, part, &old, new, &mut warnings).await {
                Ok(object) => return Ok(Written { object, created: false, warnings }),
                Err(Failure::Raced) if given.is_empty() => {}
                Err(Failure::Raced) => return Err(Status::modified(call.kind, call.name)),
                Err(Failure::Status(status)) => return Err(*status),
            }
        }
    }
}
