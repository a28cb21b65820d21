//! LimitRanger: containers without requests and limits get the namespace's defaults, and nothing goes
//! below its minimum or above its maximum.
//!
//! Upstream: plugin/pkg/admission/limitranger.

use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Quantity, Status};
use serde_json::Value;

use super::{Context, Operation, Request};
use crate::kinds::resources::{Amounts, amounts, pod_amounts};
use crate::kinds::tree::Tree;

const ANNOTATION: &str = "kubernetes.io/limit-ranger";

fn ranges(context: &Context<'_>, namespace: &str) -> Vec<Value> {
    context
        .snapshots
        .list(Kind::of::<core::LimitRange>(), namespace)
        .iter()
        .map(|range| range.value())
        .collect()
}

fn items<'a>(ranges: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    ranges
        .iter()
        .flat_map(|range| range.at("spec").items("limits"))
        .filter(move |item| item.text("type") == kind)
}

/// Fills what the containers of a new pod leave open.
pub fn fill(context: &Context<'_>, request: &Request<'_>, pod: &mut Value) -> Result<(), Status> {
    if !request.creates("", "Pod") {
        return Ok(());
    }
    let ranges = ranges(context, request.namespace);
    let mut notes = Vec::new();
    for item in items(&ranges, "Container") {
        for (list, sort) in [("containers", "container"), ("initContainers", "init container")] {
            for container in pod.object("spec").each(list) {
                let name = container.text("name").to_owned();
                let resources = container.object("resources");
                let requests = fill_list(resources, "requests", item.at("defaultRequest"));
                let limits = fill_list(resources, "limits", item.at("default"));
                for (what, set) in [("request", requests), ("limit", limits)] {
                    if !set.is_empty() {
                        notes.push(format!("{} {what} for {sort} {name}", set.join(", ")));
                    }
                }
            }
        }
    }
    if !notes.is_empty() {
        let text = format!("LimitRanger plugin set: {}", notes.join("; "));
        pod.object("metadata").object("annotations").set(ANNOTATION, text);
    }
    Ok(())
}

/// Returns the resources that were set.
fn fill_list(resources: &mut Value, list: &str, defaults: &Value) -> Vec<String> {
    let mut set = Vec::new();
    for (name, value) in defaults.as_object().into_iter().flatten() {
        if resources.at(list).get(name).is_none() {
            resources.object(list).set(name, value.clone());
            set.push(name.clone());
        }
    }
    set
}

/// Refuses a pod or claim that is outside the bounds.
pub fn check(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<(), Status> {
    let mut problems = Vec::new();
    // What is going away is nobody's concern any more.
    if object.at("metadata").has("deletionTimestamp") {
        return Ok(());
    }
    let resizes = request.operation == Operation::Update && request.subresource == "resize";
    if request.creates("", "Pod") || resizes && request.kind == Kind::of::<core::Pod>() {
        let ranges = ranges(context, request.namespace);
        let spec = object.at("spec");
        for item in items(&ranges, "Container") {
            for container in spec.items("containers").iter().chain(spec.items("initContainers")) {
                let resources = container.at("resources");
                bounds(
                    item,
                    &amounts(resources.at("requests")),
                    &amounts(resources.at("limits")),
                    &mut problems,
                );
            }
        }
        for item in items(&ranges, "Pod") {
            bounds(item, &pod_amounts(spec, "requests"), &pod_amounts(spec, "limits"), &mut problems);
        }
    } else if request.writes("", "PersistentVolumeClaim") {
        let ranges = ranges(context, request.namespace);
        let requests = amounts(object.at("spec").at("resources").at("requests"));
        for item in items(&ranges, "PersistentVolumeClaim") {
            claim_bounds(item, &requests, &mut problems);
        }
    }
    let mut told = std::collections::BTreeSet::new();
    problems.retain(|problem| told.insert(problem.clone()));
    match problems.len() {
        0 => Ok(()),
        1 => Err(request.forbid(&problems[0])),
        _ => Err(request.forbid(format!("[{}]", problems.join(", ")))),
    }
}

fn bounds(item: &Value, requests: &Amounts, limits: &Amounts, problems: &mut Vec<String>) {
    let kind = item.text("type");
    for (name, least) in amounts(item.at("min")) {
        let start = format!("minimum {name} usage per {kind} is {least}");
        match (requests.get(&name), limits.get(&name)) {
            (None, _) => problems.push(format!("{start}.  No request is specified")),
            (Some(request), _) if *request < least => {
                problems.push(format!("{start}, but request is {request}"))
            }
            (_, Some(limit)) if *limit < least => problems.push(format!("{start}, but limit is {limit}")),
            _ => {}
        }
    }
    for (name, most) in amounts(item.at("max")) {
        let start = format!("maximum {name} usage per {kind} is {most}");
        match (requests.get(&name), limits.get(&name)) {
            (_, None) => problems.push(format!("{start}.  No limit is specified")),
            (_, Some(limit)) if *limit > most => problems.push(format!("{start}, but limit is {limit}")),
            (Some(request), _) if *request > most => {
                problems.push(format!("{start}, but request is {request}"))
            }
            _ => {}
        }
    }
    for (name, ratio) in amounts(item.at("maxLimitRequestRatio")) {
        let start = format!("{name} max limit to request ratio per {kind} is {ratio}");
        let given = |list: &Amounts| list.get(&name).copied().filter(|quantity| *quantity > Quantity::ZERO);
        match (given(requests), given(limits)) {
            (None, _) => problems.push(format!("{start}, but no request is specified or request is 0")),
            (_, None) => problems.push(format!("{start}, but no limit is specified or limit is 0")),
            (Some(request), Some(limit)) => {
                let real = limit.as_f64() / request.as_f64();
                if real > ratio.as_f64() {
                    problems.push(format!("{start}, but provided ratio is {real:.6}"));
                }
            }
        }
    }
}

fn claim_bounds(item: &Value, requests: &Amounts, problems: &mut Vec<String>) {
    let kind = item.text("type");
    for (name, least) in amounts(item.at("min")) {
        let start = format!("minimum {name} usage per {kind} is {least}");
        match requests.get(&name) {
            None => problems.push(format!("{start}.  No request is specified")),
            Some(request) if *request < least => problems.push(format!("{start}, but request is {request}")),
            Some(_) => {}
        }
    }
    for (name, most) in amounts(item.at("max")) {
        let start = format!("maximum {name} usage per {kind} is {most}");
        match requests.get(&name) {
            None => problems.push(format!("{start}.  No request is specified")),
            Some(request) if *request > most => problems.push(format!("{start}, but request is {request}")),
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing;
    use super::*;
    use crate::snapshots::fake::Cluster;

    fn admit(item: Value, resources: Value) -> Result<Value, String> {
        let cluster = Cluster::with([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "a"}}),
            json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "l", "namespace": "a"}, "spec": {"limits": [item]}}),
        ]);
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "a"},
            "spec": {"containers": [{"name": "c", "resources": resources}]}});
        testing::create(&cluster, pod).map_err(|status| status.message)
    }

    #[test]
    fn containers_get_defaults() {
        let item = json!({"type": "Container", "default": {"cpu": "1"}, "defaultRequest": {"cpu": "100m", "memory": "1Mi"}});
        let pod = admit(item, json!({"requests": {"memory": "2Mi"}})).unwrap();
        assert_eq!(
            pod["spec"]["containers"][0]["resources"],
            json!({"requests": {"memory": "2Mi", "cpu": "100m"}, "limits": {"cpu": "1"}})
        );
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu request for container c; cpu limit for container c"
        );
    }

    #[test]
    fn bounds_hold() {
        let most = json!({"type": "Container", "max": {"memory": "1Gi"}});
        assert!(admit(most.clone(), json!({"limits": {"memory": "1Gi"}})).is_ok());
        assert_eq!(
            admit(most.clone(), json!({"limits": {"memory": "2Gi"}})).unwrap_err(),
            "pods \"web\" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi"
        );
        assert_eq!(
            admit(most, json!({})).unwrap_err(),
            "pods \"web\" is forbidden: maximum memory usage per Container is 1Gi.  No limit is specified"
        );
        let pod = json!({"type": "Pod", "min": {"cpu": "1"}, "maxLimitRequestRatio": {"cpu": "2"}});
        assert_eq!(
            admit(pod, json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "2"}})).unwrap_err(),
            "pods \"web\" is forbidden: [minimum cpu usage per Pod is 1, but request is 500m, cpu max limit to request ratio per Pod is 2, but provided ratio is 4.000000]"
        );
    }

    #[test]
    fn claims_and_resized_pods_are_held_to_bounds_too() {
        let cluster = Cluster::with([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}),
            json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "l", "namespace": "a"}, "spec": {"limits": [
                {"type": "PersistentVolumeClaim", "min": {"storage": "1Gi"}, "max": {"storage": "2Gi"}}]}}),
        ]);
        let claim = |requests: Value| {
            let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": "a"},
                "spec": {"resources": {"requests": requests}}});
            testing::create(&cluster, claim).map_err(|status| status.message)
        };
        assert!(claim(json!({"storage": "2Gi"})).is_ok());
        let start = "persistentvolumeclaims \"c\" is forbidden: ";
        assert_eq!(
            claim(json!({"storage": "3Gi"})).unwrap_err(),
            format!("{start}maximum storage usage per PersistentVolumeClaim is 2Gi, but request is 3Gi")
        );
        assert_eq!(
            claim(json!({"storage": "1Mi"})).unwrap_err(),
            format!("{start}minimum storage usage per PersistentVolumeClaim is 1Gi, but request is 1Mi")
        );
        let twice = json!({"type": "Container", "max": {"cpu": "1"}});
        let cluster = Cluster::with([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "a"}}),
            json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "l", "namespace": "a"}, "spec": {"limits": [twice]}}),
        ]);
        let container = |name: &str| json!({"name": name, "resources": {}});
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "a"},
            "spec": {"containers": [container("a"), container("b")]}});
        assert_eq!(
            testing::create(&cluster, pod).unwrap_err().message,
            "pods \"p\" is forbidden: maximum cpu usage per Container is 1.  No limit is specified",
            "the same is said once"
        );
    }
}
