//! Strategic merge patch: a merge patch that knows which lists are keyed, and takes directives.
//!
//! Keyed lists merge item by item (`x-kubernetes-patch-merge-key`), lists of scalars may merge as sets, all
//! others are replaced. Directives: `$patch` (delete, replace), `$deleteFromPrimitiveList/FIELD`,
//! `$setElementOrder/FIELD`, `$retainKeys`. Upstream: apimachinery's strategicpatch.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{PatchError, go_print};
use crate::schema::{Field, PatchStrategy, Shape, Type, describe};

type Object = Map<String, Value>;

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const SET_ORDER: &str = "$setElementOrder/";

/// The object of type `ty` that `patch` makes of `original`.
pub fn apply(ty: &'static Type, original: Value, patch: &Value) -> Result<Value, PatchError> {
    let (Value::Object(original), Value::Object(patch)) = (original, patch) else {
        return Err(PatchError::Malformed("invalid JSON document".into()));
    };
    merge_map(Context::Type(ty), original, patch.clone()).map(Value::Object)
}

/// What is known of the object being merged.
#[derive(Clone, Copy)]
enum Context {
    Type(&'static Type),
    /// A map with free keys; what its values are.
    Map(Shape),
    /// Nothing: such objects merge as in a merge patch.
    Free,
}

impl Context {
    fn of(shape: Shape) -> Context {
        match shape {
            Shape::Object(ty) => Context::Type(ty.get()),
            Shape::Map(items) => Context::Map(items.get()),
            _ => Context::Free,
        }
    }

    fn lookup(self, key: &str) -> Result<Lookup, PatchError> {
        match self {
            Context::Type(ty) => match ty.field(key) {
                Some(field) => Ok(Lookup { shape: field.shape(), field: Some(field) }),
                None => Err(malformed(format!(
                    "unable to find api field in struct {} for the json field {key:?}",
                    ty.short_name()
                ))),
            },
            Context::Map(shape) => Ok(Lookup { shape, field: None }),
            Context::Free => Ok(Lookup { shape: Shape::Raw, field: None }),
        }
    }
}

/// What is known of one entry.
#[derive(Clone, Copy)]
struct Lookup {
    shape: Shape,
    field: Option<&'static Field>,
}

impl Lookup {
    fn strategy(self) -> PatchStrategy {
        self.field
            .map_or(PatchStrategy { merge: false, replace: false, retain_keys: false }, Field::patch_strategy)
    }

    fn merge_key(self) -> &'static str {
        self.field.map_or("", Field::merge_key)
    }

    fn items(self) -> Context {
        match self.shape {
            Shape::Array(items) => Context::of(items.get()),
            _ => Context::Free,
        }
    }
}

fn malformed(text: String) -> PatchError {
    PatchError::Malformed(text)
}

fn merge_map(context: Context, mut original: Object, mut patch: Object) -> Result<Object, PatchError> {
    match patch.remove(DIRECTIVE) {
        None => {}
        Some(Value::String(d)) if d == "replace" => {
            let mut patch = Value::Object(patch);
            strip(&mut patch);
            let Value::Object(patch) = patch else { unreachable!("stripping keeps an object one") };
            return Ok(patch);
        }
        Some(Value::String(d)) if d == "delete" => return Ok(Object::new()),
        Some(Value::String(d)) if d == "merge" => {}
        Some(other) => {
            let shown = go_print(&other);
            patch.insert(DIRECTIVE.into(), other);
            return Err(malformed(format!(
                "unknown patch type: {shown} in map: {}",
                go_print(&Value::Object(patch))
            )));
        }
    }
    retain_keys(&mut original, &mut patch)?;
    merge_ordered_lists(context, &mut original, &mut patch)?;
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_FROM) {
            delete_from_list(&mut original, field, &value)?;
            continue;
        }
        if value.is_null() {
            original.remove(&key);
            continue;
        }
        let merged = match (original.remove(&key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => {
                let lookup = context.lookup(&key)?;
                if lookup.strategy().replace {
                    Value::Object(new)
                } else {
                    Value::Object(merge_map(Context::of(lookup.shape), old, new)?)
                }
            }
            (Some(Value::Array(old)), Value::Array(new)) => {
                Value::Array(merge_field(context.lookup(&key)?, old, new)?)
            }
            (_, mut new) => {
                strip(&mut new);
                new
            }
        };
        original.insert(key, merged);
    }
    Ok(original)
}

/// Takes directives and nulls out of a value that is new to the object.
fn strip(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, v| {
                let directive = key == DIRECTIVE
                    || key == RETAIN_KEYS
                    || key.starts_with(DELETE_FROM)
                    || key.starts_with(SET_ORDER);
                !directive && !v.is_null()
            });
            map.values_mut().for_each(strip);
        }
        Value::Array(list) => {
            list.retain(|item| item.get(DIRECTIVE).is_none_or(|d| d != "delete"));
            list.iter_mut().for_each(strip);
        }
        _ => {}
    }
}

fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), PatchError> {
    let Some(keys) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let Value::Array(keys) = keys else { return Err(malformed("invalid patch format of retainKeys".into())) };
    let keys: HashSet<&str> = keys.iter().filter_map(Value::as_str).collect();
    let is_list_directive = |key: &str| key.starts_with(DELETE_FROM) || key.starts_with(SET_ORDER);
    if patch
        .iter()
        .any(|(key, value)| !value.is_null() && !is_list_directive(key) && !keys.contains(key.as_str()))
    {
        return Err(malformed("patch content doesn't match retainKeys list".into()));
    }
    original.retain(|key, _| keys.contains(key.as_str()));
    Ok(())
}

fn delete_from_list(original: &mut Object, field: &str, values: &Value) -> Result<(), PatchError> {
    let Value::Array(values) = values else {
        return Err(malformed("invalid patch format of primitive list".into()));
    };
    if let Some(Value::Array(list)) = original.get_mut(field) {
        list.retain(|item| !values.contains(item));
    }
    Ok(())
}

/// Merges the lists for which the patch gives an order, and puts them into it.
fn merge_ordered_lists(
    context: Context,
    original: &mut Object,
    patch: &mut Object,
) -> Result<(), PatchError> {
    let directives: Vec<String> = patch.keys().filter(|k| k.starts_with(SET_ORDER)).cloned().collect();
    for directive in directives {
        let order = patch.remove(&directive).unwrap_or_default();
        let Value::Array(order) = order else {
            return Err(malformed(format!(
                "expected a []interface {{}}, but received a {}",
                go_sort(&order)
            )));
        };
        let key = &directive[SET_ORDER.len()..];
        let lookup = context.lookup(key)?;
        let old = take_list(original, key)?;
        let new = take_list(patch, key)?;
        check_order(new.as_deref().unwrap_or_default(), &order, lookup.merge_key())?;
        let before = old.clone().unwrap_or_default();
        let merged = match (old, new) {
            (None, None) => continue,
            (Some(old), None) => old,
            (None, Some(new)) => {
                let mut new = Value::Array(new);
                strip(&mut new);
                let Value::Array(new) = new else { unreachable!("stripping keeps a list one") };
                new
            }
            (Some(old), Some(new)) => merge_field(lookup, old, new)?,
        };
        original
            .insert(key.to_owned(), Value::Array(put_in_order(merged, &order, &before, lookup.merge_key())?));
    }
    Ok(())
}

fn take_list(map: &mut Object, key: &str) -> Result<Option<Vec<Value>>, PatchError> {
    match map.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => Ok(Some(list)),
        Some(other) => {
            Err(malformed(format!("expected a []interface {{}}, but received a {}", go_sort(&other))))
        }
    }
}

fn go_sort(value: &Value) -> &'static str {
    match value {
        Value::Object(_) => "map[string]interface {}",
        Value::Array(_) => "[]interface {}",
        Value::Number(_) => "int64",
        other => describe(other),
    }
}

/// The items that the patch adds must stand in its order as they do in the list itself.
fn check_order(list: &[Value], order: &[Value], merge_key: &str) -> Result<(), PatchError> {
    let mut wanted = order.iter();
    let kept = list.iter().filter(|item| item.get(DIRECTIVE).is_none());
    for item in kept {
        let id = identity(item, merge_key)?;
        let mut found = false;
        for next in wanted.by_ref() {
            if identity(next, merge_key)? == id {
                found = true;
                break;
            }
        }
        if !found {
            let (list, order) = (go_print(&list.to_vec().into()), go_print(&order.to_vec().into()));
            return Err(malformed(format!(
                "The order in patch list:\n{list}\n doesn't match $setElementOrder list:\n{order}\n"
            )));
        }
    }
    Ok(())
}

/// What tells items of a list apart: the value of the merge key, or the scalar itself.
fn identity<'a>(item: &'a Value, merge_key: &str) -> Result<&'a Value, PatchError> {
    if merge_key.is_empty() {
        return Ok(item);
    }
    let Value::Object(map) = item else {
        return Err(malformed(format!(
            "expected a map[string]interface {{}}, but received a {}",
            go_sort(item)
        )));
    };
    map.get(merge_key).ok_or_else(|| no_merge_key(map, merge_key))
}

fn no_merge_key(map: &Object, merge_key: &str) -> PatchError {
    let map = go_print(&Value::Object(map.clone()));
    malformed(format!("map: {map} does not contain declared merge key: {merge_key}"))
}

fn merge_field(lookup: Lookup, old: Vec<Value>, new: Vec<Value>) -> Result<Vec<Value>, PatchError> {
    if !lookup.strategy().merge {
        let mut new = Value::Array(new);
        strip_nulls(&mut new);
        let Value::Array(new) = new else { unreachable!("it was a list") };
        return Ok(new);
    }
    check_items(&old, &new)?;
    let of_objects = old.iter().chain(&new).any(Value::is_object);
    let merge_key = lookup.merge_key();
    if !of_objects {
        let order = new.clone();
        let before = old.clone();
        let mut merged = Vec::with_capacity(old.len() + new.len());
        for item in old.into_iter().chain(new) {
            if !merged.contains(&item) {
                merged.push(item);
            }
        }
        return put_in_order(merged, &order, &before, "");
    }
    if merge_key.is_empty() {
        let name = lookup.field.map_or("", Field::name);
        return Err(malformed(format!("cannot merge lists without merge key for {name}")));
    }
    merge_keyed(lookup.items(), old, new, merge_key)
}

/// A list that is replaced may hold objects with nulls, which then are simply absent.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

fn check_items(old: &[Value], new: &[Value]) -> Result<(), PatchError> {
    let mut sorts = old.iter().chain(new).map(describe);
    let Some(first) = sorts.next() else { return Ok(()) };
    if first == "array" {
        return Err(malformed("lists of lists are not supported".into()));
    }
    if sorts.any(|sort| sort != first) {
        let all: Vec<Value> = old.iter().chain(new).cloned().collect();
        return Err(malformed(format!("list element types are not identical: {}", go_print(&all.into()))));
    }
    Ok(())
}

fn merge_keyed(
    items: Context,
    mut old: Vec<Value>,
    new: Vec<Value>,
    merge_key: &str,
) -> Result<Vec<Value>, PatchError> {
    let mut replace = false;
    let mut changes = Vec::with_capacity(new.len());
    for item in new {
        match item.get(DIRECTIVE) {
            None => changes.push(item),
            Some(Value::String(d)) if d == "delete" => {
                let id = identity(&item, merge_key)?;
                old.retain(|o| o.get(merge_key) != Some(id));
            }
            Some(Value::String(d)) if d == "replace" => replace = true,
            Some(Value::String(d)) if d == "merge" => {
                return Err(malformed("merging lists cannot yet be specified in the patch".into()));
            }
            Some(other) => {
                return Err(malformed(format!(
                    "unknown patch type: {} in map: {}",
                    go_print(other),
                    go_print(&item)
                )));
            }
        }
    }
    if replace {
        let mut changes = Value::Array(changes);
        strip(&mut changes);
        let Value::Array(changes) = changes else { unreachable!("stripping keeps a list one") };
        return Ok(changes);
    }
    let before = old.clone();
    let order = changes.clone();
    for mut change in changes {
        let id = identity(&change, merge_key)?;
        match old.iter().position(|o| o.get(merge_key) == Some(id)) {
            Some(at) => {
                let (Value::Object(was), Value::Object(change)) = (old[at].take(), change) else {
                    unreachable!("items of a keyed list were checked to be objects");
                };
                old[at] = Value::Object(merge_map(items, was, change)?);
            }
            None => {
                strip(&mut change);
                old.push(change);
            }
        }
    }
    put_in_order(old, &order, &before, merge_key)
}

/// Puts the items named by `order` into that order, and fits the others in between as they stood `before`.
fn put_in_order(
    merged: Vec<Value>,
    order: &[Value],
    before: &[Value],
    merge_key: &str,
) -> Result<Vec<Value>, PatchError> {
    let place = |list: &[Value], item: &Value| -> Result<Option<usize>, PatchError> {
        let id = identity(item, merge_key)?;
        Ok(list
            .iter()
            .position(|o| if merge_key.is_empty() { o == id } else { o.get(merge_key) == Some(id) }))
    };
    let (mut named, mut others) = (Vec::new(), Vec::new());
    for item in merged {
        let stood = place(before, &item)?;
        match place(order, &item)? {
            Some(at) => named.push((at, stood, item)),
            None => others.push((stood, item)),
        }
    }
    named.sort_by_key(|(at, ..)| *at);
    others.sort_by_key(|(stood, _)| stood.unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(named.len() + others.len());
    let mut others = others.into_iter().peekable();
    for (_, stood, item) in named {
        // One that was there goes before a named one only if it did so before.
        while let (Some((Some(other), _)), Some(stood)) = (others.peek(), stood)
            && *other < stood
        {
            out.extend(others.next().map(|(_, item)| item));
        }
        out.push(item);
    }
    out.extend(others.map(|(_, item)| item));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::schema;

    fn ty(group: &str, kind: &str) -> &'static Type {
        schema::of(group, "v1", kind).expect("a schema")
    }

    #[track_caller]
    fn check(kind: &str, original: Value, patch: Value, want: Value) {
        let group = if kind == "Deployment" { "apps" } else { "" };
        assert_eq!(apply(ty(group, kind), original, &patch), Ok(want));
    }

    #[track_caller]
    fn check_pod(original: Value, patch: Value, want: Value) {
        check("Pod", json!({ "spec": original }), json!({ "spec": patch }), json!({ "spec": want }));
    }

    #[track_caller]
    fn check_error(patch: Value, want: &str) {
        let original = json!({"spec": {"containers": [{"name": "a"}], "strategy": {"type": "x"}}});
        assert_eq!(apply(ty("", "Pod"), original, &patch), Err(PatchError::Malformed(want.to_owned())));
    }

    #[test]
    fn keyed_lists_merge_by_key() {
        check_pod(
            json!({"containers": [{"name": "a", "image": "x", "env": [{"name": "E", "value": "1"}]}, {"name": "b", "image": "y"}]}),
            json!({"containers": [{"name": "b", "image": "z"}, {"name": "a", "env": [{"name": "F", "value": "2"}]}]}),
            json!({"containers": [{"name": "b", "image": "z"}, {"name": "a", "image": "x", "env": [{"name": "F", "value": "2"}, {"name": "E", "value": "1"}]}]}),
        );
    }

    #[test]
    fn other_lists_are_replaced() {
        check_pod(
            json!({"containers": [{"name": "a", "args": ["x"]}], "tolerations": [{"key": "k"}]}),
            json!({"containers": [{"name": "a", "args": ["y", "z"]}], "tolerations": [{"key": "l", "value": null}]}),
            json!({"containers": [{"name": "a", "args": ["y", "z"]}], "tolerations": [{"key": "l"}]}),
        );
    }

    #[test]
    fn nulls_delete() {
        check(
            "Pod",
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"nodeName": "n"}}),
            json!({"metadata": {"labels": {"a": null, "c": "3", "d": null}}, "spec": null}),
            json!({"metadata": {"labels": {"b": "2", "c": "3"}}}),
        );
    }

    #[test]
    fn directives_delete_and_replace() {
        check_pod(
            json!({"containers": [{"name": "a"}, {"name": "b"}], "securityContext": {"runAsUser": 1}}),
            json!({"containers": [{"name": "a", "$patch": "delete"}], "securityContext": {"$patch": "replace", "runAsGroup": 2}}),
            json!({"containers": [{"name": "b"}], "securityContext": {"runAsGroup": 2}}),
        );
        check_pod(
            json!({"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "y"}}),
            json!({"containers": [{"$patch": "replace"}, {"name": "c"}], "nodeSelector": {"$patch": "delete"}}),
            json!({"containers": [{"name": "c"}], "nodeSelector": {}}),
        );
    }

    #[test]
    fn scalar_lists_merge_as_sets_and_lose_what_is_named() {
        check(
            "Pod",
            json!({"metadata": {"finalizers": ["a", "b", "c"]}}),
            json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["b"], "finalizers": ["d"], "$setElementOrder/finalizers": ["c", "d", "a"]}}),
            json!({"metadata": {"finalizers": ["c", "d", "a"]}}),
        );
    }

    #[test]
    fn order_is_set_where_asked_and_kept_elsewhere() {
        check_pod(
            json!({"containers": [{"name": "server"}, {"name": "b"}, {"name": "a"}]}),
            json!({"$setElementOrder/containers": [{"name": "a"}, {"name": "b"}], "containers": [{"name": "b", "image": "x"}]}),
            json!({"containers": [{"name": "server"}, {"name": "a"}, {"name": "b", "image": "x"}]}),
        );
        check_pod(
            json!({"containers": [{"name": "a"}, {"name": "b"}]}),
            json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "c"}, {"name": "a"}], "containers": [{"name": "c"}]}),
            json!({"containers": [{"name": "b"}, {"name": "c"}, {"name": "a"}]}),
        );
    }

    #[test]
    fn retained_keys_drop_the_others() {
        check(
            "Deployment",
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            json!({"spec": {"strategy": {"type": "Recreate"}}}),
        );
        check_pod(
            json!({"volumes": [{"name": "v", "emptyDir": {}}]}),
            json!({"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/"}}]}),
            json!({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
        );
    }

    #[test]
    fn new_values_lose_their_directives_and_nulls() {
        check_pod(
            json!({}),
            json!({"containers": [{"name": "a", "image": null, "$retainKeys": ["name"]}, {"name": "b", "$patch": "delete"}]}),
            json!({"containers": [{"name": "a"}]}),
        );
    }

    #[test]
    fn mistakes_are_told_in_upstreams_words() {
        check_error(
            json!({"spec": {"containers": [{"image": "x"}]}}),
            "map: map[image:x] does not contain declared merge key: name",
        );
        check_error(json!({"spec": {"$patch": "spin"}}), "unknown patch type: spin in map: map[$patch:spin]");
        check_error(
            json!({"spec": {"containers": [{"$patch": "merge", "name": "a"}]}}),
            "merging lists cannot yet be specified in the patch",
        );
        check_error(
            json!({"spec": {"$retainKeys": ["a"], "b": 1}}),
            "patch content doesn't match retainKeys list",
        );
        check_error(
            json!({"spec": {"containers": ["a"]}}),
            "list element types are not identical: [map[name:a] a]",
        );
        check_error(
            json!({"spec": {"strategy": {"a": 1}}}),
            "unable to find api field in struct PodSpec for the json field \"strategy\"",
        );
        check_error(
            json!({"spec": {"$setElementOrder/containers": [{"name": "a"}], "containers": [{"name": "b"}]}}),
            "The order in patch list:\n[map[name:b]]\n doesn't match $setElementOrder list:\n[map[name:a]]\n",
        );
    }

    fn spec() -> impl Strategy<Value = Value> {
        let container =
            ("[a-e]", prop::option::of("[x-z]"), prop::collection::btree_map("[A-D]", "[0-9]", 0..3));
        prop::collection::vec(container, 0..5).prop_map(|list| {
            let mut seen = HashSet::new();
            let containers: Vec<Value> = list
                .into_iter()
                .filter(|(name, ..)| seen.insert(name.clone()))
                .map(|(name, image, env)| {
                    let env: Vec<Value> =
                        env.into_iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
                    let mut c = json!({ "name": name, "env": env });
                    if let Some(image) = image {
                        c["image"] = image.into();
                    }
                    c
                })
                .collect();
            json!({ "spec": { "containers": containers } })
        })
    }

    proptest! {
        #[test]
        fn applying_twice_is_applying_once(a in spec(), b in spec()) {
            let once = apply(ty("", "Pod"), a, &b).unwrap();
            let twice = apply(ty("", "Pod"), once.clone(), &b).unwrap();
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn an_object_patched_with_itself_stays(a in spec()) {
            prop_assert_eq!(apply(ty("", "Pod"), a.clone(), &a).unwrap(), a);
        }

        #[test]
        fn everything_in_the_patch_is_in_the_result(a in spec(), b in spec()) {
            let got = apply(ty("", "Pod"), a, &b).unwrap();
            let list = got["spec"]["containers"].as_array().unwrap().clone();
            for wanted in b["spec"]["containers"].as_array().unwrap() {
                let found = list.iter().find(|c| c["name"] == wanted["name"]).unwrap();
                prop_assert!(wanted.get("image").is_none_or(|i| *i == found["image"]));
            }
        }
    }
}
