//! What admission has to say of claims and volumes: StorageObjectInUseProtection, and of NodeRestriction what
//! concerns the directories that nodes make for claims.

use k8s_openapi::api::core::v1 as core;
use minke_api::storage::{LOCAL_PATH, PROVISIONED_BY, SELECTED_NODE};
use minke_api::{Kind, Status};
use serde_json::{Value, json};

use super::{Context, Operation, Request};
use crate::authz::node_of;
use crate::kinds::pod::same;
use crate::kinds::tree::Tree;

/// What is made is protected from the start; a controller takes the finalizer away when nobody uses it.
pub fn protect_in_use(_: &Context<'_>, request: &Request<'_>, object: &mut Value) -> Result<(), Status> {
    let finalizer = match request.kind.kind {
        "PersistentVolumeClaim" if request.creates("", "PersistentVolumeClaim") => {
            "kubernetes.io/pvc-protection"
        }
        "PersistentVolume" if request.creates("", "PersistentVolume") => "kubernetes.io/pv-protection",
        _ => return Ok(()),
    };
    let metadata = object.object("metadata");
    let mut all = metadata.items("finalizers").to_vec();
    if !all.iter().any(|known| known == finalizer) {
        all.push(finalizer.into());
        metadata.set("finalizers", all);
    }
    Ok(())
}

/// A node makes volumes only of itself, for claims that were given to it, and deletes only those; of a claim it
/// can only say that it will not serve it.
pub fn node_keeps_to_its_own(
    context: &Context<'_>,
    request: &Request<'_>,
    object: &Value,
) -> Result<(), Status> {
    if !(request.is("", "PersistentVolume") || request.is("", "PersistentVolumeClaim")) {
        return Ok(());
    }
    let Some(node) = node_of(request.user) else { return Ok(()) };
    let good = match (request.kind.kind, request.operation, request.old) {
        ("PersistentVolume", Operation::Create, _) => is_made_for_its_claim(context, node, object),
        ("PersistentVolume", Operation::Update, Some(old)) => {
            is_of(old, node) && is_of(object, node) && same(old.at("spec"), object.at("spec"))
        }
        ("PersistentVolume", Operation::Delete, _) => is_of(object, node),
        (_, Operation::Update, Some(old)) => is_given_back(old, object, node),
        _ => false,
    };
    if good {
        return Ok(());
    }
    Err(request.forbid(format!("node \"{node}\" may only make and delete volumes of its own")))
}

fn annotation<'a>(object: &'a Value, name: &str) -> &'a str {
    object.at("metadata").at("annotations").text(name)
}

/// Whether a volume is a directory of the node.
fn is_of(volume: &Value, node: &str) -> bool {
    annotation(volume, PROVISIONED_BY) == LOCAL_PATH && annotation(volume, SELECTED_NODE) == node
}

fn is_made_for_its_claim(context: &Context<'_>, node: &str, volume: &Value) -> bool {
    let spec = volume.at("spec");
    let wanted = spec.at("claimRef");
    let claims = Kind::of::<core::PersistentVolumeClaim>();
    let claim = context.snapshots.get(claims, wanted.text("namespace"), wanted.text("name"));
    let is_given = claim.is_some_and(|claim| {
        claim.uid() == wanted.text("uid") && annotation(&claim.value(), SELECTED_NODE) == node
    });
    // Anywhere else its path would be somebody else's.
    let host = context.snapshots.get(Kind::of::<core::Node>(), "", node);
    let host = host.and_then(|node| node.labels().get("kubernetes.io/hostname").map(str::to_owned));
    let stays = host.is_some_and(|host| *spec.at("nodeAffinity") == only_on(&host));
    is_of(volume, node) && is_given && stays && spec.at("local").is_object()
}

/// The affinity of a volume that is a directory of the node with this host name.
fn only_on(host: &str) -> Value {
    let here = json!({"key": "kubernetes.io/hostname", "operator": "In", "values": [host]});
    json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}})
}

fn is_given_back(old: &Value, new: &Value, node: &str) -> bool {
    let rest = |claim: &Value| {
        let mut rest = claim.clone();
        let metadata = rest.object("metadata");
        metadata.unset("managedFields");
        metadata.unset("resourceVersion");
        metadata.object("annotations").unset(SELECTED_NODE);
        rest
    };
    annotation(old, SELECTED_NODE) == node
        && annotation(new, SELECTED_NODE).is_empty()
        && same(&rest(old), &rest(new))
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::UserInfo;
    use crate::snapshots::fake::Cluster;

    fn claim(node: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": {},
            "metadata": {"name": "c", "namespace": "a", "uid": "u", "annotations": {SELECTED_NODE: node}}})
    }

    fn volume(node: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "PersistentVolume",
            "metadata": {"name": "v", "annotations": {SELECTED_NODE: node, PROVISIONED_BY: LOCAL_PATH}},
            "spec": {"local": {"path": "/x"}, "nodeAffinity": only_on(node),
                "claimRef": {"namespace": "a", "name": "c", "uid": "u"}}})
    }

    fn cluster() -> std::sync::Arc<Cluster> {
        let node = |name: &str| {
            json!({"apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}})
        };
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}});
        Cluster::with([namespace, claim("n1"), node("n1"), node("n2")])
    }

    #[test]
    fn new_claims_and_volumes_are_protected() {
        let finalizers =
            |object| testing::create(&cluster(), object).unwrap()["metadata"]["finalizers"].clone();
        assert_eq!(finalizers(claim("")), json!(["kubernetes.io/pvc-protection"]));
        let mut kept = volume("n1");
        kept["metadata"]["finalizers"] = json!(["x"]);
        assert_eq!(finalizers(kept), json!(["x", "kubernetes.io/pv-protection"]));
        let again = testing::write(&cluster(), claim(""), Some(&claim(""))).unwrap();
        assert_eq!(again["metadata"].get("finalizers"), None);
    }

    #[track_caller]
    fn check(node: &str, operation: Operation, object: &Value, old: Option<&Value>, want: bool) {
        let user = UserInfo::new(&format!("system:node:{node}"), &["system:nodes"]);
        let got = testing::judge(&cluster(), &user, operation, object, old, node_keeps_to_its_own);
        assert_eq!(got.is_ok(), want, "{got:?}");
    }

    #[test]
    fn a_node_makes_and_deletes_only_its_own_volumes() {
        use Operation::{Create, Delete, Update};
        check("n1", Create, &volume("n1"), None, true);
        check("n2", Create, &volume("n1"), None, false);
        check("n2", Create, &volume("n2"), None, false);
        let mut away = volume("n1");
        away["spec"]["nodeAffinity"] = only_on("n2");
        check("n1", Create, &away, None, false);
        check("n1", Delete, &volume("n1"), Some(&volume("n1")), true);
        check("n2", Delete, &volume("n1"), Some(&volume("n1")), false);
        let mut kept = volume("n1");
        kept["metadata"]["finalizers"] = json!(["x"]);
        check("n1", Update, &volume("n1"), Some(&kept), true);
        let mut moved = volume("n1");
        moved["spec"]["local"]["path"] = "/etc".into();
        check("n1", Update, &moved, Some(&volume("n1")), false);
    }

    #[test]
    fn a_node_can_give_a_claim_back_and_no_more() {
        use Operation::{Delete, Update};
        let mut free = claim("n1");
        free["metadata"]["annotations"] = json!({});
        check("n1", Update, &free, Some(&claim("n1")), true);
        check("n2", Update, &free, Some(&claim("n1")), false);
        check("n1", Update, &claim("n2"), Some(&claim("n1")), false);
        let mut changed = free.clone();
        changed["spec"]["volumeName"] = "v".into();
        check("n1", Update, &changed, Some(&claim("n1")), false);
        check("n1", Delete, &claim("n1"), Some(&claim("n1")), false);
    }
}
