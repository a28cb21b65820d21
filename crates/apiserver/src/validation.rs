//! Rules for metadata that hold for every kind.
//!
//! Upstream: apimachinery pkg/api/validation/objectmeta.

use minke_api::{FieldErrors, names};
use serde_json::Value;

use crate::kinds::tree::Tree;

/// All annotations of an object together, keys included, in bytes.
pub const MAX_ANNOTATIONS_BYTES: usize = 256 * 1024;

/// Checks the metadata of an object that is to be created or replaced. `name` is the kind's rule.
pub fn validate_metadata(
    metadata: &Value,
    namespaced: bool,
    name: fn(&str) -> Result<(), String>,
    errors: &mut FieldErrors,
) {
    // The prefix of generated names ends in '-' as often as not; what follows it will be fine.
    let prefix = metadata.text("generateName");
    if !prefix.is_empty()
        && let Err(why) = name(&format!("{}a", prefix.strip_suffix('-').unwrap_or(prefix)))
    {
        errors.invalid("metadata.generateName", prefix, &why);
    }
    match metadata.text("name") {
        "" => errors.required("metadata.name", "name or generateName is required"),
        given => {
            if let Err(why) = name(given) {
                errors.invalid("metadata.name", given, &why);
            }
        }
    }
    match (namespaced, metadata.text("namespace")) {
        (true, "") => errors.required("metadata.namespace", ""),
        (true, namespace) => {
            if let Err(why) = names::dns_label(namespace) {
                errors.invalid("metadata.namespace", namespace, &why);
            }
        }
        (false, "") => {}
        (false, _) => errors.forbidden("metadata.namespace", "not allowed on this type"),
    }
    if let Some(generation) = metadata.int("generation").filter(|g| *g < 0) {
        errors.invalid("metadata.generation", generation, "must be greater than or equal to 0");
    }
    labels(metadata, "metadata.labels", errors);
    annotations(metadata, "metadata.annotations", errors);
    owner_references(metadata, errors);
    finalizers(metadata, errors);
}

/// Checks what metadata may not change. Name, namespace, uid and creationTimestamp are the registry's.
pub fn validate_metadata_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    if !old.text("deletionTimestamp").is_empty() {
        let had: Vec<&Value> = old.items("finalizers").iter().collect();
        let added: Vec<&str> =
            new.items("finalizers").iter().filter(|f| !had.contains(f)).filter_map(Value::as_str).collect();
        if !added.is_empty() {
            let list: Vec<String> = added.iter().map(|f| format!("{f:?}")).collect();
            let why = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                list.join(", ")
            );
            errors.forbidden("metadata.finalizers", &why);
        }
    }
}

/// Labels in the member `labels` of `holder` (metadata, or a pod template's).
pub fn labels(holder: &Value, path: &str, errors: &mut FieldErrors) {
    let field = path.rsplit('.').next().unwrap_or(path);
    label_map(holder.at(field), path, errors);
}

/// A map of labels, as selectors and node selectors are too.
pub fn label_map(map: &Value, path: &str, errors: &mut FieldErrors) {
    for (key, value) in map.as_object().into_iter().flatten() {
        if let Err(why) = names::qualified_name(key) {
            errors.invalid(path, key, &why);
        }
        let value = value.as_str().unwrap_or_default();
        if let Err(why) = names::label_value(value) {
            errors.invalid(path, value, &why);
        }
    }
}

/// Annotations in the member `annotations` of `holder`.
pub fn annotations(holder: &Value, path: &str, errors: &mut FieldErrors) {
    let mut size = 0;
    for (key, value) in holder.members("annotations") {
        // Keys of annotations may have upper case in their prefix.
        if let Err(why) = names::qualified_name(&key.to_lowercase()) {
            errors.invalid(path, key, &why);
        }
        size += key.len() + value.as_str().unwrap_or_default().len();
    }
    if size > MAX_ANNOTATIONS_BYTES {
        errors.too_long(path, MAX_ANNOTATIONS_BYTES);
    }
}

fn owner_references(metadata: &Value, errors: &mut FieldErrors) {
    let mut controller: Option<String> = None;
    for (n, owner) in metadata.items("ownerReferences").iter().enumerate() {
        let path = format!("metadata.ownerReferences[{n}]");
        let api_version = owner.text("apiVersion");
        if api_version.is_empty() || api_version.matches('/').count() > 1 || api_version.ends_with('/') {
            errors.invalid(&format!("{path}.apiVersion"), api_version, "version must not be empty");
        }
        for (field, why) in
            [("kind", "must not be empty"), ("name", "must not be empty"), ("uid", "must not be empty")]
        {
            if owner.text(field).is_empty() {
                errors.invalid(&format!("{path}.{field}"), "", why);
            }
        }
        if api_version == "v1" && owner.text("kind") == "Event" {
            errors.invalid(&path, owner, "\"v1\", Kind=\"Event\" is disallowed from being an owner");
        }
        if owner.flag("controller") {
            let this = format!("{} {}", owner.text("kind"), owner.text("name"));
            match &controller {
                Some(first) => errors.invalid(
                    "metadata.ownerReferences",
                    metadata.at("ownerReferences"),
                    &format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {this}"
                    ),
                ),
                None => controller = Some(this),
            }
        }
    }
}

fn finalizers(metadata: &Value, errors: &mut FieldErrors) {
    const STANDARD: [&str; 3] = ["orphan", "foregroundDeletion", "kubernetes"];
    let list = metadata.items("finalizers");
    for (n, finalizer) in list.iter().filter_map(Value::as_str).enumerate() {
        let path = format!("metadata.finalizers[{n}]");
        if let Err(why) = names::qualified_name(finalizer) {
            errors.invalid("metadata.finalizers", finalizer, &why);
        } else if !finalizer.contains('/') && !STANDARD.contains(&finalizer) {
            errors.invalid(
                &path,
                finalizer,
                "name is neither a standard finalizer name nor is it fully qualified",
            );
        }
    }
    let has = |name: &str| list.iter().any(|f| f == name);
    if has("orphan") && has("foregroundDeletion") {
        errors.invalid(
            "metadata.finalizers",
            metadata.at("finalizers"),
            "finalizer orphan and foregroundDeletion cannot be both set",
        );
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(change: Value, want: &str) {
        let mut metadata = json!({"name": "web", "namespace": "default"});
        for (field, value) in change.as_object().unwrap() {
            metadata.set(field, value.clone());
        }
        let mut errors = FieldErrors::default();
        validate_metadata(&metadata, true, names::dns_subdomain, &mut errors);
        let kind = Kind::by_plural("", "v1", "configmaps").unwrap();
        let message = errors.into_result(kind, "web").err().map(|status| status.message).unwrap_or_default();
        let got = message.strip_prefix("ConfigMap \"web\" is invalid: ").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn metadata_is_checked() {
        check(json!({}), "");
        check(json!({"name": ""}), "metadata.name: Required value: name or generateName is required");
        check(
            json!({"name": "Web"}),
            "metadata.name: Invalid value: \"Web\": a lowercase RFC 1123 subdomain",
        );
        check(json!({"generateName": "web-"}), "");
        check(json!({"generateName": "Web-"}), "metadata.generateName: Invalid value: \"Web-\"");
        check(
            json!({"labels": {"app": "a b"}}),
            "metadata.labels: Invalid value: \"a b\": a valid label must be",
        );
        check(
            json!({"labels": {"-x": "a"}}),
            "metadata.labels: Invalid value: \"-x\": name part must consist",
        );
        check(json!({"annotations": {"Example.com/x": "any thing"}}), "");
        check(json!({"annotations": {"a b": ""}}), "metadata.annotations: Invalid value: \"a b\"");
        check(
            json!({"annotations": {"a": "x".repeat(MAX_ANNOTATIONS_BYTES)}}),
            "metadata.annotations: Too long: may not be more than 262144 bytes",
        );
        check(json!({"finalizers": ["kubernetes", "example.com/f"]}), "");
        check(
            json!({"finalizers": ["mine"]}),
            "metadata.finalizers[0]: Invalid value: \"mine\": name is neither a standard finalizer name nor is it fully qualified",
        );
        check(
            json!({"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "p"}]}),
            "metadata.ownerReferences[0].uid: Invalid value: \"\": must not be empty",
        );
        let owner = |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": "u", "controller": true});
        check(
            json!({"ownerReferences": [owner("a"), owner("b")]}),
            "metadata.ownerReferences: Invalid value",
        );
    }

    #[test]
    fn what_is_being_deleted_gets_no_new_finalizers() {
        let old = json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["a/b"]});
        let mut errors = FieldErrors::default();
        validate_metadata_update(&json!({"finalizers": []}), &old, &mut errors);
        assert!(errors.is_empty());
        validate_metadata_update(&json!({"finalizers": ["a/b", "c/d"]}), &old, &mut errors);
        assert!(!errors.is_empty());
    }
}
