//! Collects what is wrong with an object, field by field, and reports it all at once as `422 Invalid`.

use std::fmt::Display;

use crate::{Cause, Details, Kind, Status};

/// Field errors in the order they were found. Paths are written `spec.containers[0].name`.
#[derive(Debug, Default)]
pub struct FieldErrors {
    causes: Vec<Cause>,
}

impl FieldErrors {
    pub fn is_empty(&self) -> bool {
        self.causes.is_empty()
    }

    fn push(&mut self, reason: &str, field: &str, message: String) {
        self.causes.push(Cause { reason: reason.to_owned(), message, field: field.to_owned() });
    }

    /// Something must be here. `detail` may be empty.
    pub fn required(&mut self, field: &str, detail: &str) {
        self.push("FieldValueRequired", field, with_detail("Required value", detail));
    }

    /// `value` as the user wrote it: strings are quoted, numbers and JSON are not.
    pub fn invalid(&mut self, field: &str, value: impl Shown, detail: &str) {
        self.push(
            "FieldValueInvalid",
            field,
            with_detail(&format!("Invalid value: {}", value.shown()), detail),
        );
    }

    /// As [`FieldErrors::invalid`], of something too large to be shown.
    pub fn invalid_without_value(&mut self, field: &str, detail: &str) {
        self.push("FieldValueInvalid", field, with_detail("Invalid value", detail));
    }

    pub fn not_supported(&mut self, field: &str, value: impl Shown, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let mut message = format!("Unsupported value: {}", value.shown());
        if !list.is_empty() {
            message.push_str(&format!(": supported values: {}", list.join(", ")));
        }
        self.push("FieldValueNotSupported", field, message);
    }

    pub fn duplicate(&mut self, field: &str, value: impl Shown) {
        self.push("FieldValueDuplicate", field, format!("Duplicate value: {}", value.shown()));
    }

    pub fn forbidden(&mut self, field: &str, detail: &str) {
        self.push("FieldValueForbidden", field, with_detail("Forbidden", detail));
    }

    pub fn not_found(&mut self, field: &str, value: impl Shown) {
        self.push("FieldValueNotFound", field, format!("Not found: {}", value.shown()));
    }

    pub fn too_long(&mut self, field: &str, max_bytes: usize) {
        self.push("FieldValueTooLong", field, format!("Too long: may not be more than {max_bytes} bytes"));
    }

    pub fn too_many(&mut self, field: &str, count: usize, max: usize) {
        self.push("FieldValueTooMany", field, format!("Too many: {count}: must have at most {max} items"));
    }

    /// Nothing was wrong, or all of it as one `Invalid` about the object `name`.
    pub fn into_result(self, kind: &Kind, name: &str) -> Result<(), Status> {
        if self.causes.is_empty() {
            return Ok(());
        }
        let each: Vec<String> =
            self.causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
        let errors = if each.len() == 1 { each[0].clone() } else { format!("[{}]", each.join(", ")) };
        let mut status = Status::failure(
            422,
            "Invalid",
            format!("{} \"{name}\" is invalid: {errors}", kind.qualified_kind()),
        );
        status.details = Some(Details {
            name: name.to_owned(),
            group: kind.group.to_owned(),
            kind: kind.kind.to_owned(),
            causes: self.causes,
            ..Details::default()
        });
        Err(status)
    }
}

fn with_detail(body: &str, detail: &str) -> String {
    if detail.is_empty() { body.to_owned() } else { format!("{body}: {detail}") }
}

/// How a bad value is shown in a field error.
pub trait Shown {
    fn shown(&self) -> String;
}

impl Shown for &str {
    fn shown(&self) -> String {
        format!("{self:?}")
    }
}

impl Shown for &String {
    fn shown(&self) -> String {
        format!("{self:?}")
    }
}

impl Shown for &serde_json::Value {
    fn shown(&self) -> String {
        self.to_string()
    }
}

macro_rules! shown_as_printed {
    ($($t:ty),*) => {
        $(impl Shown for $t {
            fn shown(&self) -> String {
                fn print(value: &impl Display) -> String {
                    value.to_string()
                }
                print(self)
            }
        })*
    };
}
shown_as_printed!(i32, i64, u32, u64, usize, bool);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_error_stands_alone_and_several_stand_in_brackets() {
        let kind = Kind::by_plural("apps", "v1", "deployments").unwrap();
        let mut errors = FieldErrors::default();
        errors.invalid("spec.replicas", -1, "must be greater than or equal to 0");
        let status = errors.into_result(kind, "web").unwrap_err();
        assert_eq!(
            status.message,
            "Deployment.apps \"web\" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal to 0"
        );
        let mut errors = FieldErrors::default();
        errors.required("spec.selector", "");
        errors.not_supported("spec.strategy.type", "Fast", &["Recreate", "RollingUpdate"]);
        let status = errors.into_result(kind, "web").unwrap_err();
        assert_eq!(
            status.message,
            "Deployment.apps \"web\" is invalid: [spec.selector: Required value, spec.strategy.type: \
             Unsupported value: \"Fast\": supported values: \"Recreate\", \"RollingUpdate\"]"
        );
        assert_eq!(status.details.unwrap().causes[1].reason, "FieldValueNotSupported");
    }
}
