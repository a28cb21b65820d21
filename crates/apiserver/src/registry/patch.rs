//! Patches: applied to what is stored, tried again when someone else was faster.

use minke_api::patch::{self, PatchError};
use minke_api::{FieldErrors, Kind, Status, schema};
use serde_json::Value;

use super::body::{self, Body, Expected, Validation};
use super::scale::SCALE;
use super::write::{Failure, Part, RACES};
use super::{Call, Registry, Written, convert, meta};
use crate::kinds::tree::Tree;

/// A patch and what it is written in.
#[derive(Debug, Clone)]
pub enum Patch {
    Json(Body),
    Merge(Body),
    Strategic(Body),
}

impl Patch {
    fn body(&self) -> &Body {
        match self {
            Patch::Json(body) | Patch::Merge(body) | Patch::Strategic(body) => body,
        }
    }

    /// Applies the patch to an object of the kind.
    fn apply(&self, kind: &Kind, original: Value) -> Result<Value, Status> {
        let patched = match self {
            Patch::Json(body) => patch::json::apply(original, &body.value),
            Patch::Merge(body) => Ok(patch::merge::apply(original, &body.value)),
            Patch::Strategic(body) => {
                let ty = schema::of(kind.group, kind.version, kind.kind)
                    .ok_or_else(|| Status::internal(format!("{} has no schema", kind.kind)))?;
                patch::strategic::apply(ty, original, &body.value)
            }
        };
        patched.map_err(|error| match error {
            PatchError::Malformed(why) => Status::bad_request(why),
            PatchError::Unprocessable(why) => Status::failure(422, "Invalid", why),
            PatchError::TooLarge(why) => Status::too_large(why),
        })
    }
}

impl Registry {
    pub async fn patch(&self, call: &Call<'_>, patch: &Patch) -> Result<Written, Status> {
        for attempt in 0.. {
            let mut warnings = Vec::new();
            match self.try_patch(call, patch, &mut warnings).await {
                Ok(object) => return Ok(Written { object, created: false, warnings }),
                Err(Failure::Raced) if attempt < RACES => {}
                Err(Failure::Raced) => return Err(Status::modified(call.kind, call.name)),
                Err(Failure::Status(status)) => return Err(*status),
            }
        }
        unreachable!("the last attempt returns")
    }

    async fn try_patch(
        &self,
        call: &Call<'_>,
        patch: &Patch,
        warnings: &mut Vec<String>,
    ) -> Result<std::sync::Arc<minke_api::Object>, Failure> {
        let old = self.stored(call)?;
        let kind = if call.subresource == "scale" { &SCALE } else { call.kind };
        let base = if call.subresource == "scale" {
            super::scale::of(&old)?.value()
        } else {
            convert::view(call.kind, &old).value()
        };
        let revision = base.at("metadata").text("resourceVersion").to_owned();
        let mut patched = patch.apply(kind, base)?;
        let identity = |value: &Value| (value.text("apiVersion").to_owned(), value.text("kind").to_owned());
        if identity(&patched) != (kind.api_version(), kind.kind.to_owned()) {
            return Err(Status::bad_request(format!(
                "a patch cannot change apiVersion or kind of {} {:?}",
                kind.kind, call.name
            ))
            .into());
        }
        check_problems(call, kind, patch, &mut patched, warnings)?;
        let metadata = patched.at("metadata");
        if metadata.text("name") != call.name {
            let mut errors = FieldErrors::default();
            errors.invalid("metadata.name", metadata.text("name"), "field is immutable");
            errors.into_result(kind, call.name)?;
        }
        let given = metadata.text("resourceVersion");
        if !given.is_empty() && given != revision {
            return Err(Status::modified(call.kind, call.name).into());
        }
        if call.subresource == "scale" {
            let merged = super::scale::merge(&old, &patched)?;
            let object = self.replace(call, Part::Main, &old, merged, warnings).await?;
            return Ok(super::scale::of(&object)?);
        }
        let mut new = convert::to_storage(call.kind, patched);
        meta::place(call, &mut new)?;
        let part = super::subresource::merge(call, &old, &mut new)?;
        let object = self.replace(call, part, &old, new, warnings).await?;
        Ok(convert::view(call.kind, &object))
    }
}

/// Shapes the patched object by its type. What it has too much came from the patch.
fn check_problems(
    call: &Call<'_>,
    kind: &Kind,
    patch: &Patch,
    patched: &mut Value,
    warnings: &mut Vec<String>,
) -> Result<(), Status> {
    let problems = body::conform(Expected::object(kind), patched, &patch.body().duplicates)?;
    match call.validation {
        _ if problems.is_empty() => {}
        Validation::Ignore => {}
        Validation::Warn => warnings.extend(problems),
        Validation::Strict => {
            let mut errors = FieldErrors::default();
            let why = format!("strict decoding error: {}", problems.join(", "));
            errors.invalid("patch", &patch.body().value, &why);
            errors.into_result(kind, call.name)?;
        }
    }
    Ok(())
}
