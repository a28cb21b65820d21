//! Small plugins: TaintNodesByCondition, DefaultStorageClass, DefaultIngressClass, Priority (of classes),
//! PersistentVolumeClaimResize.

use k8s_openapi::api::{networking::v1 as networking, scheduling::v1 as scheduling, storage::v1 as storage};
use minke_api::{Kind, Status};
use serde_json::{Value, json};

use super::{Context, Operation, Request};
use crate::kinds::resources::amounts;
use crate::kinds::tree::Tree;

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const DEFAULT_STORAGE_CLASS: &str = "storageclass.kubernetes.io/is-default-class";
/// What the annotation was called at first.
const OLD_DEFAULT_STORAGE_CLASS: &str = "storageclass.beta.kubernetes.io/is-default-class";
const DEFAULT_INGRESS_CLASS: &str = "ingressclass.kubernetes.io/is-default-class";
const INGRESS_CLASS: &str = "kubernetes.io/ingress.class";

/// A new node takes no pods before it is known to be ready.
pub fn taint_new_node(_: &Context<'_>, request: &Request<'_>, node: &mut Value) -> Result<(), Status> {
    if !request.creates("", "Node") {
        return Ok(());
    }
    let spec = node.object("spec");
    let known = |taint: &Value| taint.text("key") == NOT_READY && taint.text("effect") == "NoSchedule";
    if !spec.items("taints").iter().any(known) {
        let mut taints = spec.items("taints").to_vec();
        taints.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
        spec.set("taints", taints);
    }
    Ok(())
}

/// The newest object of a kind that an annotation marks as the default.
fn marked_default(context: &Context<'_>, kind: &'static Kind, annotations: &[&str]) -> Option<String> {
    context
        .snapshots
        .list(kind, "")
        .iter()
        .filter(|class| {
            let value = class.value();
            annotations.iter().any(|a| value.at("metadata").at("annotations").text(a) == "true")
        })
        .max_by(|a, b| a.created().cmp(&b.created()).then_with(|| b.name().cmp(a.name())))
        .map(|class| class.name().to_owned())
}

/// A claim that names no class gets the default one.
pub fn storage_class(context: &Context<'_>, request: &Request<'_>, claim: &mut Value) -> Result<(), Status> {
    // An empty name is an answer too: no class is wanted.
    if !request.creates("", "PersistentVolumeClaim") || claim.at("spec").get("storageClassName").is_some() {
        return Ok(());
    }
    let marks = [DEFAULT_STORAGE_CLASS, OLD_DEFAULT_STORAGE_CLASS];
    if let Some(name) = marked_default(context, Kind::of::<storage::StorageClass>(), &marks) {
        claim.object("spec").set("storageClassName", name);
    }
    Ok(())
}

/// An Ingress that names no class gets the default one.
pub fn ingress_class(
    context: &Context<'_>,
    request: &Request<'_>,
    ingress: &mut Value,
) -> Result<(), Status> {
    if !request.creates("networking.k8s.io", "Ingress")
        || ingress.at("spec").get("ingressClassName").is_some()
        || ingress.at("metadata").at("annotations").has(INGRESS_CLASS)
    {
        return Ok(());
    }
    if let Some(name) =
        marked_default(context, Kind::of::<networking::IngressClass>(), &[DEFAULT_INGRESS_CLASS])
    {
        ingress.object("spec").set("ingressClassName", name);
    }
    Ok(())
}

/// At most one priority class is the default.
pub fn one_default_priority(
    context: &Context<'_>,
    request: &Request<'_>,
    class: &Value,
) -> Result<(), Status> {
    if !request.writes("scheduling.k8s.io", "PriorityClass") || !class.flag("globalDefault") {
        return Ok(());
    }
    let all = context.snapshots.list(Kind::of::<scheduling::PriorityClass>(), "");
    match all.iter().find(|other| other.name() != request.name && other.value().flag("globalDefault")) {
        None => Ok(()),
        Some(other) => Err(request.forbid(format!(
            "PriorityClass {} is already marked as default. Only one default can exist",
            other.name()
        ))),
    }
}

/// A claim grows only where its class says that volumes can.
pub fn claim_may_grow(context: &Context<'_>, request: &Request<'_>, claim: &Value) -> Result<(), Status> {
    let Some(old) = request.old.filter(|_| request.operation == Operation::Update) else { return Ok(()) };
    if !request.is("", "PersistentVolumeClaim") {
        return Ok(());
    }
    let size =
        |claim: &Value| amounts(claim.at("spec").at("resources").at("requests")).get("storage").copied();
    if size(claim) <= size(old) {
        return Ok(());
    }
    let class = old.at("spec").text("storageClassName");
    let grows = context
        .snapshots
        .get(Kind::of::<storage::StorageClass>(), "", class)
        .is_some_and(|class| class.value().flag("allowVolumeExpansion"));
    if grows {
        return Ok(());
    }
    Err(request.forbid(
        "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::snapshots::fake::Cluster;

    fn storage_class_object(name: &str, grows: bool) -> Value {
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name,
            "annotations": {DEFAULT_STORAGE_CLASS: "true"}}, "provisioner": "p", "allowVolumeExpansion": grows})
    }

    fn claim(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": "a"}, "spec": spec})
    }

    fn cluster(more: Value) -> std::sync::Arc<Cluster> {
        Cluster::with([json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}), more])
    }

    #[test]
    fn claims_get_the_default_class() {
        let cluster = cluster(storage_class_object("fast", true));
        let class =
            |spec| testing::create(&cluster, claim(spec)).unwrap()["spec"]["storageClassName"].clone();
        assert_eq!(class(json!({})), "fast");
        assert_eq!(class(json!({"storageClassName": ""})), "");
        assert_eq!(class(json!({"storageClassName": "other"})), "other");
    }

    #[test]
    fn claims_grow_where_the_class_lets_them() {
        let sized = |size: &str| {
            claim(json!({"storageClassName": "x", "resources": {"requests": {"storage": size}}}))
        };
        for (grows, size, good) in [(true, "2Gi", true), (false, "2Gi", false), (false, "1Gi", true)] {
            let cluster = cluster(storage_class_object("x", grows));
            assert_eq!(
                testing::write(&cluster, sized(size), Some(&sized("1Gi"))).is_ok(),
                good,
                "{grows} {size}"
            );
        }
    }

    #[test]
    fn new_nodes_are_not_ready() {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}});
        let node = testing::create(&Cluster::with([]), node).unwrap();
        assert_eq!(node["spec"]["taints"], json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
        assert_eq!(testing::write(&Cluster::with([]), node.clone(), Some(&node)).unwrap(), node);
    }

    #[test]
    fn only_one_priority_is_the_default() {
        let class = |name: &str| json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "globalDefault": true});
        let cluster = Cluster::with([class("a")]);
        assert!(testing::write(&cluster, class("a"), Some(&class("a"))).is_ok());
        let status = testing::create(&cluster, class("b")).unwrap_err();
        assert!(
            status
                .message
                .ends_with("PriorityClass a is already marked as default. Only one default can exist")
        );
    }
}
