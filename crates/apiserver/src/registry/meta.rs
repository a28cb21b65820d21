//! Metadata that the server decides on.
//!
//! managedFields are not kept: what clients send is dropped. They belong to server-side apply.

use jiff::Timestamp;
use minke_api::{Kind, Status, time};
use rand::Rng;
use serde_json::Value;

use super::Call;
use crate::kinds::tree::Tree;

/// No vowels and nothing that looks like something else, so that no words come out.
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const NAME_SUFFIX: usize = 5;
const NAME_MAX: usize = 63;

/// A name that begins with `base`, which is cut so that the whole is a label.
pub fn generate_name(base: &str) -> String {
    let mut cut = base.len().min(NAME_MAX - NAME_SUFFIX);
    while !base.is_char_boundary(cut) {
        cut -= 1;
    }
    let mut rng = rand::rng();
    let mut name = base[..cut].to_owned();
    name.extend((0..NAME_SUFFIX).map(|_| char::from(NAME_LETTERS[rng.random_range(0..NAME_LETTERS.len())])));
    name
}

/// Puts the object into the namespace of the URL; another namespace in the body is refused.
pub fn place(call: &Call<'_>, value: &mut Value) -> Result<(), Status> {
    let metadata = value.object("metadata");
    if !call.kind.namespaced {
        metadata.unset("namespace");
        return Ok(());
    }
    match metadata.text("namespace") {
        "" => metadata.set("namespace", call.namespace),
        same if same == call.namespace => {}
        _ => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    }
    Ok(())
}

/// What every new object gets, and what nobody can give it.
pub fn for_create(value: &mut Value, uid: String, now: Timestamp) {
    let metadata = value.object("metadata");
    for field in [
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "managedFields",
        "generation",
    ] {
        metadata.unset(field);
    }
    metadata.set("uid", uid);
    metadata.set("creationTimestamp", time::format_seconds(now));
}

/// Keeps what an update cannot change. Name and namespace are checked before.
pub fn for_update(kind: &Kind, new: &mut Value, old: &Value) -> Result<(), Status> {
    let old_metadata = old.at("metadata");
    let uid = new.at("metadata").text("uid").to_owned();
    let old_uid = old_metadata.text("uid");
    if !uid.is_empty() && uid != old_uid {
        return Err(Status::conflict(
            kind,
            old_metadata.text("name"),
            &format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {old_uid}"),
        ));
    }
    let metadata = new.object("metadata");
    for field in ["managedFields", "selfLink"] {
        metadata.unset(field);
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "generateName",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        copy(field, old_metadata, metadata);
    }
    Ok(())
}

/// Gives `to` the member that `from` has, or none if it has none.
pub fn copy(field: &str, from: &Value, to: &mut Value) {
    match from.get(field) {
        Some(value) => to.set(field, value.clone()),
        None => drop(to.unset(field)),
    }
}

/// Counts a change of what the user wants: of anything but metadata and status.
pub fn bump_generation(new: &mut Value, old: &Value) {
    let wants = |value: &Value, name: &str| value.get(name).filter(|v| !v.is_null()).cloned();
    let names: std::collections::BTreeSet<&String> =
        [&*new, old].into_iter().filter_map(Value::as_object).flat_map(|map| map.keys()).collect();
    let changed = names
        .into_iter()
        .filter(|name| !matches!(name.as_str(), "metadata" | "status" | "kind" | "apiVersion"))
        .any(|name| wants(new, name) != wants(old, name));
    if changed {
        add_generation(new);
    }
}

pub fn add_generation(value: &mut Value) {
    let metadata = value.object("metadata");
    let generation = metadata.int("generation").unwrap_or_default();
    metadata.set("generation", generation + 1);
}

/// Whether the last thing that kept a deleted object is gone with this state of it.
pub fn is_finished(kind: &Kind, value: &Value) -> bool {
    let metadata = value.at("metadata");
    metadata.has("deletionTimestamp")
        && !metadata.has("finalizers")
        && metadata.int("deletionGracePeriodSeconds").unwrap_or_default() == 0
        // Namespaces are emptied before they go.
        && (kind.kind != "Namespace" || !value.at("spec").has("finalizers"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn generated_names_are_cut_to_fit() {
        let name = generate_name("web-");
        assert_eq!(name.len(), 9);
        assert!(name.starts_with("web-"));
        assert_eq!(generate_name(&"x".repeat(100)).len(), 63);
        assert!(generate_name(&"ü".repeat(40)).len() <= 63);
        assert_ne!(generate_name("a"), generate_name("a"));
    }

    #[track_caller]
    fn check_generation(new: Value, want: i64) {
        let old = json!({"metadata": {"generation": 3, "labels": {}}, "spec": {"a": 1}, "status": {"b": 1}});
        let mut new = new;
        new["metadata"]["generation"] = 3.into();
        bump_generation(&mut new, &old);
        assert_eq!(new["metadata"]["generation"], want);
    }

    #[test]
    fn the_generation_counts_what_is_wanted() {
        check_generation(json!({"metadata": {"labels": {"x": "y"}}, "spec": {"a": 1}, "status": {}}), 3);
        check_generation(json!({"metadata": {}, "spec": {"a": 2}, "status": {"b": 1}}), 4);
        check_generation(json!({"metadata": {}, "status": {"b": 1}}), 4);
        check_generation(json!({"metadata": {}, "spec": {"a": 1}, "data": {}}), 4);
    }
}
