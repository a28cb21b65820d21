//! Priority, DefaultTolerationSeconds and RuntimeClass: what a pod gets from the classes it names.

use k8s_openapi::api::{node::v1 as node, scheduling::v1 as scheduling};
use minke_api::{Kind, Status};
use minke_client::typed;
use serde_json::{Value, json};

use super::{Context, Operation, Request};
use crate::kinds::pod::same;
use crate::kinds::tree::Tree;

/// How long a pod stays on a node that is not ready or out of reach.
const TOLERATION_SECONDS: i64 = 300;

/// Sets the priority that the pod's class, or the default class, has.
pub fn priority(context: &Context<'_>, request: &Request<'_>, pod: &mut Value) -> Result<(), Status> {
    if !request.writes("", "Pod") {
        return Ok(());
    }
    let spec = pod.object("spec");
    if let (Operation::Update, Some(old)) = (request.operation, request.old) {
        let before = old.at("spec");
        for field in ["priority", "preemptionPolicy"] {
            if !spec.has(field) && before.has(field) {
                spec.set(field, before.at(field).clone());
            }
        }
        return Ok(());
    }
    let classes = Kind::of::<scheduling::PriorityClass>();
    let class = match spec.text("priorityClassName") {
        "" => {
            let all = context.snapshots.list(classes, "");
            let all = all.iter().filter_map(|class| typed::<scheduling::PriorityClass>(class));
            all.filter(|class| class.global_default == Some(true)).min_by_key(|class| class.value)
        }
        name => match context.snapshots.get(classes, "", name) {
            Some(class) => typed::<scheduling::PriorityClass>(&class),
            None => return Err(request.forbid(format!("no PriorityClass with name {name} was found"))),
        },
    };
    if let Some(name) = class.as_ref().and_then(|class| class.metadata.name.as_deref()) {
        spec.set("priorityClassName", name);
    }
    let value = class.as_ref().and_then(|class| class.value).map_or(0, i64::from);
    let policy = class.as_ref().and_then(|class| class.preemption_policy.as_deref());
    let policy = policy.unwrap_or("PreemptLowerPriority");
    if let Some(given) = spec.int("priority").filter(|given| *given != value) {
        return Err(request.forbid(format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller \
             computed {value} from the given PriorityClass name"
        )));
    }
    let given = spec.text("preemptionPolicy");
    if !given.is_empty() && given != policy {
        return Err(request.forbid(format!(
            "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission \
             controller computed {policy} from the given PriorityClass name"
        )));
    }
    spec.set("priority", value);
    spec.set("preemptionPolicy", policy);
    Ok(())
}

/// Lets the pod stay a while on a node that is in trouble, unless it says something about that itself.
pub fn default_tolerations(_: &Context<'_>, request: &Request<'_>, pod: &mut Value) -> Result<(), Status> {
    if !request.writes("", "Pod") {
        return Ok(());
    }
    let spec = pod.object("spec");
    for taint in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let spoken_of = spec.items("tolerations").iter().any(|toleration| {
            matches!(toleration.text("key"), key if key == taint || key.is_empty())
                && matches!(toleration.text("effect"), "NoExecute" | "")
        });
        if !spoken_of {
            let mut tolerations = spec.items("tolerations").to_vec();
            tolerations.push(json!({
                "key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS,
            }));
            spec.set("tolerations", tolerations);
        }
    }
    Ok(())
}

/// Sets overhead and scheduling constraints of the runtime class that the pod names.
pub fn runtime_class(context: &Context<'_>, request: &Request<'_>, pod: &mut Value) -> Result<(), Status> {
    if !request.creates("", "Pod") {
        return Ok(());
    }
    let spec = pod.object("spec");
    let name = spec.text("runtimeClassName");
    if name.is_empty() {
        if spec.has("overhead") {
            return Err(request.forbid(
                "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead",
            ));
        }
        return Ok(());
    }
    let Some(class) = context.snapshots.get(Kind::of::<node::RuntimeClass>(), "", name) else {
        return Err(request.forbid(format!("pod rejected: RuntimeClass {name:?} not found")));
    };
    let class = class.value();
    let overhead = class.at("overhead").at("podFixed");
    if spec.has("overhead") && !same(spec.at("overhead"), overhead) {
        return Err(
            request.forbid("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead")
        );
    }
    if overhead.is_object() {
        spec.set("overhead", overhead.clone());
    }
    let scheduling = class.at("scheduling");
    for (key, value) in scheduling.members("nodeSelector") {
        let value = value.as_str().unwrap_or_default();
        let selector = spec.object("nodeSelector");
        let given = selector.text(key);
        if selector.get(key).is_some() && given != value {
            return Err(request.forbid(format!(
                "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {value}; pod.spec.nodeSelector[{key}] = {given}"
            )));
        }
        selector.set(key, value);
    }
    if scheduling.has("tolerations") {
        let mut tolerations = spec.items("tolerations").to_vec();
        let new: Vec<Value> =
            scheduling.items("tolerations").iter().filter(|t| !tolerations.contains(t)).cloned().collect();
        tolerations.extend(new);
        spec.set("tolerations", tolerations);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use crate::kinds::tree::Tree;
    use crate::snapshots::fake::Cluster;
    use serde_json::{Value, json};

    fn class(name: &str, value: i64, default: bool) -> Value {
        json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "globalDefault": default, "preemptionPolicy": "Never"})
    }

    fn admit(more: Vec<Value>, spec: Value) -> Result<Value, String> {
        let mut objects = vec![
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "a"}}),
        ];
        objects.extend(more);
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "a"}, "spec": spec});
        pod["spec"].fill("automountServiceAccountToken", false);
        let cluster = Cluster::with(objects);
        testing::create(&cluster, pod).map(|mut pod| pod["spec"].take()).map_err(|status| status.message)
    }

    #[test]
    fn priority_comes_from_the_class() {
        let spec = admit(vec![], json!({})).unwrap();
        assert_eq!(
            (spec["priority"].clone(), spec["preemptionPolicy"].clone()),
            (json!(0), json!("PreemptLowerPriority"))
        );
        let spec = admit(vec![class("low", 5, true), class("high", 9, false)], json!({})).unwrap();
        assert_eq!((spec["priority"].clone(), spec["priorityClassName"].clone()), (json!(5), json!("low")));
        let spec = admit(vec![class("high", 9, false)], json!({"priorityClassName": "high"})).unwrap();
        assert_eq!((spec["priority"].clone(), spec["preemptionPolicy"].clone()), (json!(9), json!("Never")));
        assert_eq!(
            admit(vec![], json!({"priorityClassName": "none"})).unwrap_err(),
            "pods \"web\" is forbidden: no PriorityClass with name none was found"
        );
        assert!(
            admit(vec![], json!({"priority": 7})).unwrap_err().contains("the integer value of priority (7)")
        );
    }

    #[test]
    fn troubled_nodes_are_tolerated_for_a_while() {
        let spec = admit(vec![], json!({})).unwrap();
        assert_eq!(
            spec["tolerations"],
            json!([
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
            ])
        );
        let all = json!([{"operator": "Exists"}]);
        assert_eq!(admit(vec![], json!({"tolerations": all})).unwrap()["tolerations"], all);
    }

    #[test]
    fn runtime_classes_add_their_overhead() {
        let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "vm"},
            "handler": "vm", "overhead": {"podFixed": {"cpu": "10m"}},
            "scheduling": {"nodeSelector": {"vm": "yes"}}});
        let spec = admit(vec![class.clone()], json!({"runtimeClassName": "vm"})).unwrap();
        assert_eq!(
            (spec["overhead"].clone(), spec["nodeSelector"].clone()),
            (json!({"cpu": "10m"}), json!({"vm": "yes"}))
        );
        assert_eq!(
            admit(vec![class], json!({"runtimeClassName": "x"})).unwrap_err(),
            "pods \"web\" is forbidden: pod rejected: RuntimeClass \"x\" not found"
        );
    }
}
