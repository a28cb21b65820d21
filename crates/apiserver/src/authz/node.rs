//! What a kubelet may do: the rules of the ClusterRole `system:node`, narrowed to its own node and to what
//! the pods on it need. Upstream: plugin/pkg/auth/authorizer/node.
//!
//! Listing and watching pods and nodes is not narrowed here by field selector, as upstream did before
//! v1.32.

use k8s_openapi::api::core::v1 as core;
use minke_api::Kind;
use minke_client::typed;

use super::rules::Rule;
use crate::{Attributes, Snapshots, UserInfo};

/// The node that a user is, if it is one.
pub fn name_of(user: &UserInfo) -> Option<&str> {
    let name = user.name.strip_prefix("system:node:")?;
    (!name.is_empty() && user.groups.iter().any(|group| group == "system:nodes")).then_some(name)
}

pub fn authorize(snapshots: &dyn Snapshots, rules: &[Rule], node: &str, attributes: &Attributes<'_>) -> bool {
    let Attributes::Resource { verb, group, resource, subresource, namespace, name, .. } = *attributes else {
        return rules.iter().any(|rule| rule.allows(attributes));
    };
    let reads = matches!(verb, "get" | "list" | "watch");
    match (group, resource, subresource) {
        // A list or watch is allowed for the single object that a field selector names.
        ("", "secrets" | "configmaps" | "persistentvolumeclaims", "") => {
            reads && !name.is_empty() && needed(snapshots, node, namespace, resource, name)
        }
        // Of those that it makes and deletes, its role in RBAC and admission tell.
        ("", "persistentvolumes", "") if verb != "get" => false,
        ("", "serviceaccounts", "") => {
            verb == "get" && needed(snapshots, node, namespace, "serviceaccounts", name)
        }
        ("", "serviceaccounts", "token") => {
            verb == "create" && needed(snapshots, node, namespace, "serviceaccounts", name)
        }
        ("", "nodes", _) if !reads && verb != "create" => {
            name == node && matches!(subresource, "" | "status") && matches!(verb, "update" | "patch")
        }
        ("coordination.k8s.io", "leases", "") => {
            namespace == "kube-node-lease"
                && (verb == "create" || name == node)
                && matches!(verb, "create" | "get" | "update" | "patch" | "delete")
        }
        ("storage.k8s.io", "csinodes", "") => {
            (verb == "create" || name == node)
                && matches!(verb, "create" | "get" | "update" | "patch" | "delete")
        }
        _ => rules.iter().any(|rule| rule.allows(attributes)),
    }
}

/// Whether a pod on `node` in the namespace refers to the object.
fn needed(snapshots: &dyn Snapshots, node: &str, namespace: &str, resource: &str, name: &str) -> bool {
    !namespace.is_empty()
        && snapshots
            .list(Kind::of::<core::Pod>(), namespace)
            .iter()
            .filter(|pod| pod.field("spec.nodeName") == Some(node))
            .filter_map(|pod| typed::<core::Pod>(pod))
            .any(|pod| {
                let mut own = minke_api::storage::claims_of(&pod);
                if resource == "persistentvolumeclaims" {
                    return own.any(|(claim, _)| claim == name);
                }
                pod.spec.as_ref().is_some_and(|spec| refers(spec, resource, name))
            })
}

fn refers(spec: &core::PodSpec, resource: &str, name: &str) -> bool {
    let is = |other: &Option<String>| other.as_deref() == Some(name);
    match resource {
        "serviceaccounts" => is(&spec.service_account_name),
        "secrets" => {
            spec.image_pull_secrets.iter().flatten().any(|r| r.name == name)
                || containers(spec).any(|env| match env {
                    Env::From(from) => from.secret_ref.as_ref().is_some_and(|r| r.name == name),
                    Env::Key(key) => key.secret_key_ref.as_ref().is_some_and(|r| r.name == name),
                })
                || spec.volumes.iter().flatten().any(|volume| volume_secrets(volume).any(|s| s == name))
        }
        "configmaps" => {
            containers(spec).any(|env| match env {
                Env::From(from) => from.config_map_ref.as_ref().is_some_and(|r| r.name == name),
                Env::Key(key) => key.config_map_key_ref.as_ref().is_some_and(|r| r.name == name),
            }) || spec.volumes.iter().flatten().any(|volume| {
                volume.config_map.as_ref().is_some_and(|c| c.name == name)
                    || projections(volume).any(|p| p.config_map.as_ref().is_some_and(|c| c.name == name))
            })
        }
        _ => false,
    }
}

enum Env<'a> {
    From(&'a core::EnvFromSource),
    Key(&'a core::EnvVarSource),
}

fn containers(spec: &core::PodSpec) -> impl Iterator<Item = Env<'_>> {
    let main = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let main = main.map(|c| (c.env.as_deref(), c.env_from.as_deref()));
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    main.chain(ephemeral.map(|c| (c.env.as_deref(), c.env_from.as_deref()))).flat_map(|(env, from)| {
        let keys = env.unwrap_or_default().iter().filter_map(|e| e.value_from.as_ref()).map(Env::Key);
        keys.chain(from.unwrap_or_default().iter().map(Env::From))
    })
}

fn projections(volume: &core::Volume) -> impl Iterator<Item = &core::VolumeProjection> {
    volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten())
}

fn volume_secrets(volume: &core::Volume) -> impl Iterator<Item = &str> {
    let own = volume.secret.iter().filter_map(|s| s.secret_name.as_deref());
    let csi = volume.csi.iter().filter_map(|c| c.node_publish_secret_ref.as_ref()).map(|r| r.name.as_str());
    own.chain(csi).chain(projections(volume).filter_map(|p| p.secret.as_ref()).map(|s| s.name.as_str()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::snapshots::fake::Cluster;

    fn rules() -> Vec<Rule> {
        let all = |group: &str, resource: &str, verbs: &[&str]| Rule {
            verbs: verbs.iter().map(|v| (*v).to_owned()).collect(),
            groups: vec![group.to_owned()],
            resources: vec![resource.to_owned()],
            ..Rule::default()
        };
        vec![
            all("", "nodes", &["create", "get", "list", "watch"]),
            all("", "services", &["get", "list", "watch"]),
        ]
    }

    #[track_caller]
    fn check(verb: &str, resource: &str, namespace: &str, name: &str, want: bool) {
        let cluster = Cluster::with([json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "a"},
            "spec": {"nodeName": "n1", "serviceAccountName": "bot",
                "imagePullSecrets": [{"name": "pull"}],
                "containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "env"}}],
                    "env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "key", "key": "k"}}}]}],
                "volumes": [{"name": "v", "secret": {"secretName": "vol"}},
                    {"name": "d", "persistentVolumeClaim": {"claimName": "data"}},
                    {"name": "e", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}},
                    {"name": "p", "projected": {"sources": [{"configMap": {"name": "ca"}}]}}]}})]);
        let (group, resource) = resource.split_once(':').unwrap_or(("", resource));
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes =
            Attributes::Resource { verb, group, version: "v1", resource, subresource, namespace, name };
        assert_eq!(authorize(&*cluster, &rules(), "n1", &attributes), want, "n1");
        if want && matches!(resource, "secrets" | "configmaps" | "serviceaccounts") {
            assert!(!authorize(&*cluster, &rules(), "n2", &attributes), "another node may not");
        }
    }

    #[test]
    fn a_node_gets_what_its_pods_need() {
        for secret in ["pull", "key", "vol"] {
            check("get", "secrets", "a", secret, true);
            check("watch", "secrets", "a", secret, true);
            check("get", "secrets", "b", secret, false);
        }
        check("get", "secrets", "a", "other", false);
        check("list", "secrets", "a", "", false);
        check("delete", "secrets", "a", "vol", false);
        check("get", "configmaps", "a", "env", true);
        check("get", "configmaps", "a", "ca", true);
        check("watch", "persistentvolumeclaims", "a", "data", true);
        check("watch", "persistentvolumeclaims", "a", "web-e", true);
        check("watch", "persistentvolumeclaims", "a", "e", false);
        check("get", "serviceaccounts", "a", "bot", true);
        check("create", "serviceaccounts/token", "a", "bot", true);
        check("create", "serviceaccounts/token", "a", "default", false);
    }

    #[test]
    fn a_node_writes_only_itself() {
        check("create", "nodes", "", "", true);
        check("patch", "nodes/status", "", "n1", true);
        check("patch", "nodes/status", "", "n2", false);
        check("delete", "nodes", "", "n1", false);
        check("update", "coordination.k8s.io:leases", "kube-node-lease", "n1", true);
        check("update", "coordination.k8s.io:leases", "kube-node-lease", "n2", false);
        check("get", "coordination.k8s.io:leases", "kube-system", "n1", false);
        check("list", "services", "", "", true);
        check("delete", "services", "a", "s", false);
    }

    #[test]
    fn only_nodes_are_nodes() {
        assert_eq!(name_of(&UserInfo::new("system:node:n1", &["system:nodes"])), Some("n1"));
        assert_eq!(name_of(&UserInfo::new("system:node:n1", &[])), None);
        assert_eq!(name_of(&UserInfo::new("ann", &["system:nodes"])), None);
    }
}
