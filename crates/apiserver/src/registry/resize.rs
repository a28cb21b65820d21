//! What `pods/resize` may change: cpu and memory, of containers and of the pod as a whole.
//!
//! Upstream: ValidatePodResize.

use minke_api::{FieldErrors, Object, Status};
use serde_json::Value;

use super::meta;
use crate::kinds::pod::same;
use crate::kinds::resources::qos_class;
use crate::kinds::tree::Tree;

const LISTS: [&str; 2] = ["containers", "initContainers"];
const PARTS: [&str; 2] = ["requests", "limits"];

/// The pod `old` with the resources of `new`.
pub fn resize(old: &Object, new: &Value) -> Result<Value, Status> {
    let was = old.value();
    let mut errors = FieldErrors::default();
    check(&was, new, &mut errors);
    errors.into_result(old.kind(), old.name())?;
    let mut merged = was;
    let spec = merged.object("spec");
    for list in LISTS {
        for (container, wanted) in spec.each(list).zip(new.at("spec").items(list)) {
            meta::copy("resources", wanted, container);
        }
    }
    meta::copy("resources", new.at("spec"), spec);
    Ok(merged)
}

fn check(old: &Value, new: &Value, errors: &mut FieldErrors) {
    if old.at("metadata").at("annotations").has("kubernetes.io/config.mirror") {
        return errors.forbidden("", "static pods cannot be resized");
    }
    let (was, is) = (old.at("spec"), new.at("spec"));
    if was.at("os").text("name") == "windows" {
        return errors.forbidden("", "windows pods cannot be resized");
    }
    let class = old.at("status").text("qosClass");
    if qos_class(is) != if class.is_empty() { qos_class(was) } else { class } {
        errors.invalid("spec", class, "Pod QOS Class may not change as a result of resizing");
    }
    check_whole(was, is, errors);
    let mut fits = true;
    for list in LISTS {
        let names = |spec: &Value| -> Vec<String> {
            spec.items(list).iter().map(|c| c.text("name").to_owned()).collect()
        };
        let (before, after) = (names(was), names(is));
        if before.len() != after.len() {
            fits = false;
            errors
                .forbidden(&format!("spec.{list}"), &format!("{list} may not be added or removed on resize"));
            continue;
        }
        for n in (0..before.len()).filter(|n| before[*n] != after[*n]) {
            fits = false;
            let why = format!("{list} may not be renamed or reordered on resize");
            errors.forbidden(&format!("spec.{list}[{n}].name"), &why);
        }
    }
    if fits {
        check_containers(was, is, errors);
    }
}

fn check_containers(was: &Value, is: &Value, errors: &mut FieldErrors) {
    for list in ["initContainers", "containers"] {
        for (n, (before, after)) in was.items(list).iter().zip(is.items(list)).enumerate() {
            let path = format!("spec.{list}[{n}]");
            for part in PARTS {
                if is_removed(before.at("resources").at(part), after.at("resources").at(part)) {
                    errors.forbidden(
                        &format!("{path}.resources.{part}"),
                        &format!("resource {part} cannot be removed"),
                    );
                }
            }
            let mut rest = after.clone();
            put_back(before.at("resources"), &mut rest);
            let changed = !same(&rest, before);
            if list == "containers" {
                if changed {
                    errors.forbidden("spec", "only cpu and memory resources are mutable");
                }
                continue;
            }
            if changed {
                let why = "only cpu and memory resources for init or sidecar containers are mutable";
                errors.forbidden(&path, why);
            }
            let restarts = |policy: &Value| policy.text("restartPolicy") == "RestartContainer";
            if !same(before, after)
                && after.text("restartPolicy") != "Always"
                && after.items("resizePolicy").iter().any(restarts)
            {
                let why =
                    "non-sidecar init containers with a resize policy of RestartContainer cannot be resized";
                errors.forbidden(&path, why);
            }
        }
    }
}

/// What the pod as a whole asks for and may use.
fn check_whole(was: &Value, is: &Value, errors: &mut FieldErrors) {
    if was.has("resources") && !is.has("resources") {
        return errors.forbidden("spec.resources", "pod-level resources cannot be removed");
    }
    for part in PARTS {
        if is_removed(was.at("resources").at(part), is.at("resources").at(part)) {
            let why = format!("pod-level resource {part} cannot be removed");
            errors.forbidden(&format!("spec.resources.{part}"), &why);
        }
    }
    let mut rest = is.clone();
    put_back(was.at("resources"), &mut rest);
    if !same(rest.at("resources"), was.at("resources")) {
        errors.forbidden("spec", "only cpu and memory resources are mutable at pod-level");
    }
}

fn is_removed(before: &Value, after: &Value) -> bool {
    before.as_object().into_iter().flatten().any(|(name, _)| after.get(name).is_none())
}

/// Gives `holder` the cpu and memory of `before` again.
fn put_back(before: &Value, holder: &mut Value) {
    let Some(resources) = holder.sub("resources") else { return };
    for part in PARTS {
        for name in ["cpu", "memory"] {
            match before.at(part).get(name) {
                Some(value) => resources.object(part).set(name, value.clone()),
                None => {
                    if let Some(list) = resources.sub(part) {
                        list.unset(name);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::*;

    fn pod(change: impl FnOnce(&mut Value)) -> Value {
        let sized =
            |cpu: &str| json!({"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": {"memory": "2Gi"}});
        let mut pod = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "resources": {"requests": {"cpu": "4", "memory": "4Gi"}},
                "initContainers": [
                    {"name": "i", "resources": sized("1"), "resizePolicy": [{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]},
                    {"name": "s", "restartPolicy": "Always", "resources": sized("1")},
                ],
                "containers": [{"name": "c", "resources": sized("1")}, {"name": "d", "resources": sized("1")}],
            },
            "status": {"qosClass": "Burstable"},
        });
        change(&mut pod["spec"]);
        pod
    }

    #[track_caller]
    fn check_resize(change: impl FnOnce(&mut Value), want: &str) {
        let old = pod(|_| {});
        let new = pod(change);
        let mut errors = FieldErrors::default();
        check(&old, &new, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").expect("a kind");
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"web\" is invalid: ").unwrap_or(&message);
        assert_eq!(got, want);
    }

    #[test]
    fn only_cpu_and_memory_change() {
        check_resize(|_| {}, "");
        check_resize(|spec| spec["containers"][1]["resources"]["requests"]["cpu"] = json!("2"), "");
        check_resize(|spec| spec["containers"][0]["resources"]["limits"]["memory"] = json!("1Gi"), "");
        check_resize(|spec| spec["containers"][0]["resources"]["limits"]["cpu"] = json!("5"), "");
        check_resize(|spec| spec["initContainers"][1]["resources"]["requests"]["cpu"] = json!("2"), "");
        check_resize(|spec| spec["resources"]["requests"]["cpu"] = json!("5"), "");
        check_resize(
            |spec| spec["containers"][0]["resources"]["limits"] = json!({}),
            "spec.containers[0].resources.limits: Forbidden: resource limits cannot be removed",
        );
        check_resize(
            |spec| spec["containers"][0]["resources"]["requests"] = json!({"cpu": "1"}),
            "spec.containers[0].resources.requests: Forbidden: resource requests cannot be removed",
        );
        check_resize(
            |spec| spec["containers"][0]["resources"]["requests"]["ephemeral-storage"] = json!("1Gi"),
            "spec: Forbidden: only cpu and memory resources are mutable",
        );
        check_resize(
            |spec| spec["containers"][0]["image"] = json!("other"),
            "spec: Forbidden: only cpu and memory resources are mutable",
        );
        check_resize(
            |spec| spec["containers"] = json!([]),
            "spec.containers: Forbidden: containers may not be added or removed on resize",
        );
        check_resize(
            |spec| spec["containers"][1]["name"] = json!("e"),
            "spec.containers[1].name: Forbidden: containers may not be renamed or reordered on resize",
        );
        check_resize(
            |spec| spec["initContainers"][0]["resources"]["requests"]["cpu"] = json!("2"),
            "spec.initContainers[0]: Forbidden: non-sidecar init containers with a resize policy of RestartContainer cannot be resized",
        );
        check_resize(
            |spec| spec["resources"]["requests"] = json!({"cpu": "4"}),
            "spec.resources.requests: Forbidden: pod-level resource requests cannot be removed",
        );
        check_resize(
            |spec| spec["resources"]["limits"] = json!({"cpu": "4", "memory": "4Gi"}),
            "spec: Invalid value: \"Burstable\": Pod QOS Class may not change as a result of resizing",
        );
    }

    #[test]
    fn some_pods_cannot_be_resized() {
        let refused = |change: fn(&mut Value)| {
            let mut old = pod(|_| {});
            change(&mut old);
            let mut errors = FieldErrors::default();
            check(&old, &old, &mut errors);
            let kind = Kind::by_plural("", "v1", "pods").expect("a kind");
            errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default()
        };
        let mirror =
            refused(|pod| pod["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"}));
        assert!(mirror.ends_with("Forbidden: static pods cannot be resized"), "{mirror}");
        let windows = refused(|pod| pod["spec"]["os"] = json!({"name": "windows"}));
        assert!(windows.ends_with("Forbidden: windows pods cannot be resized"), "{windows}");
    }
}
