//! NamespaceLifecycle: nothing is made in a namespace that is missing or going away, and some namespaces
//! stay.

use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Status};

use super::{Context, Operation, Request};

/// These cannot be deleted.
const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub fn lifecycle(context: &Context<'_>, request: &Request<'_>) -> Result<(), Status> {
    let namespaces = Kind::of::<core::Namespace>();
    if request.kind == namespaces {
        if request.operation == Operation::Delete && IMMORTAL.contains(&request.name) {
            return Err(request.forbid("this namespace may not be deleted"));
        }
        return Ok(());
    }
    if request.operation == Operation::Delete || request.namespace.is_empty() {
        return Ok(());
    }
    let name = request.namespace;
    let namespace =
        context.snapshots.get(namespaces, "", name).ok_or_else(|| Status::not_found(namespaces, name))?;
    if request.operation == Operation::Create && namespace.field("status.phase") == Some("Terminating") {
        let why = format!("unable to create new content in namespace {name} because it is being terminated");
        let cause = format!("namespace {name} is being terminated");
        return Err(request.forbid(why).with_cause("NamespaceTerminating", cause, "metadata.namespace"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::testing;
    use crate::snapshots::fake::Cluster;

    fn namespace(name: &str, phase: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "status": {"phase": phase}})
    }

    fn map(namespace: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": namespace}})
    }

    #[test]
    fn namespaces_must_be_there_and_stay() {
        let cluster = Cluster::with([namespace("a", "Active"), namespace("b", "Terminating")]);
        assert!(testing::create(&cluster, map("a")).is_ok());
        let status = testing::create(&cluster, map("none")).unwrap_err();
        assert_eq!((status.code, status.message.as_str()), (404, "namespaces \"none\" not found"));
        let status = testing::create(&cluster, map("b")).unwrap_err();
        assert_eq!(
            status.message,
            "configmaps \"c\" is forbidden: unable to create new content in namespace b because it is being terminated"
        );
        assert!(status.has_cause("NamespaceTerminating"));
        assert!(testing::write(&cluster, map("b"), Some(&map("b"))).is_ok());
        assert!(testing::delete(&cluster, map("b")).is_ok());
    }

    #[test]
    fn the_first_namespaces_cannot_be_deleted() {
        let cluster = Cluster::with([]);
        let status = testing::delete(&cluster, namespace("kube-system", "Active")).unwrap_err();
        assert_eq!(
            status.message,
            "namespaces \"kube-system\" is forbidden: this namespace may not be deleted"
        );
        assert!(testing::delete(&cluster, namespace("mine", "Active")).is_ok());
    }
}
