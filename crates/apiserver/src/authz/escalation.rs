//! Nobody hands out more than they have: who writes a role must hold its rules (or the verb `escalate`),
//! and who binds a role must hold its rules (or the verb `bind` on it).
//!
//! Upstream: pkg/registry/rbac/*/policybased.

use k8s_openapi::api::rbac::v1 as rbac;
use minke_api::{Kind, Status};
use serde_json::Value;

use super::rules::{Rule, uncovered};
use super::{Authorizer, MASTERS};
use crate::{Attributes, Snapshots, UserInfo};

const GROUP: &str = "rbac.authorization.k8s.io";

/// Checks a write of a role or binding; other kinds pass. `old` is the stored object, if there is one.
pub fn check_role_write(
    authorizer: &Authorizer,
    snapshots: &dyn Snapshots,
    user: &UserInfo,
    kind: &'static Kind,
    namespace: &str,
    new: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    if kind.group != GROUP || user.groups.iter().any(|group| group == MASTERS) {
        return Ok(());
    }
    let name = new.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let may = |verb: &str, kind: &'static Kind, name: &str| {
        authorizer.authorize(user, &Attributes::of(verb, kind, "", namespace, name)).allowed
    };
    let same = |field: &str| old.is_some_and(|old| old.get(field) == new.get(field));
    match kind.kind {
        "Role" | "ClusterRole" => {
            if same("rules") && same("aggregationRule") || may("escalate", kind, name) {
                return Ok(());
            }
            let held = authorizer.rules_of(user, namespace);
            if !same("aggregationRule") && new.get("aggregationRule").is_some_and(|rule| !rule.is_null()) {
                let everything = [
                    Rule { verbs: all(), groups: all(), resources: all(), ..Rule::default() },
                    Rule { verbs: all(), paths: all(), ..Rule::default() },
                ];
                if !uncovered(&held, &everything).is_empty() {
                    return Err(Status::forbidden(
                        kind,
                        name,
                        "must have cluster-admin privileges to use the aggregationRule",
                    ));
                }
            }
            refuse_what_is_not_held(user, kind, name, &held, &rules_in(new))
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            if same("roleRef") && same("subjects") {
                return Ok(());
            }
            let role_name = new.pointer("/roleRef/name").and_then(Value::as_str).unwrap_or_default();
            let role_kind = match new.pointer("/roleRef/kind").and_then(Value::as_str) {
                Some("ClusterRole") => Kind::of::<rbac::ClusterRole>(),
                _ => Kind::of::<rbac::Role>(),
            };
            if may("bind", role_kind, role_name) {
                return Ok(());
            }
            let home = if role_kind.namespaced { namespace } else { "" };
            let Some(role) = snapshots.get(role_kind, home, role_name) else {
                return Err(Status::not_found(role_kind, role_name));
            };
            let held = authorizer.rules_of(user, namespace);
            refuse_what_is_not_held(user, kind, name, &held, &rules_in(&role.value()))
        }
        _ => Ok(()),
    }
}

fn all() -> Vec<String> {
    vec!["*".to_owned()]
}

fn rules_in(role: &Value) -> Vec<Rule> {
    let rules: Option<Vec<rbac::PolicyRule>> =
        role.get("rules").and_then(|rules| serde_json::from_value(rules.clone()).ok());
    rules.iter().flatten().map(Rule::from).collect()
}

fn refuse_what_is_not_held(
    user: &UserInfo,
    kind: &'static Kind,
    name: &str,
    held: &[Rule],
    wanted: &[Rule],
) -> Result<(), Status> {
    let missing = uncovered(held, wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let missing: Vec<String> = missing.iter().map(Rule::to_string).collect();
    let groups: Vec<String> = user.groups.iter().map(|group| format!("{group:?}")).collect();
    let why = format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        groups.join(" "),
        missing.join("\n")
    );
    Err(Status::forbidden(kind, name, &why))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::snapshots::fake::Cluster;

    fn role(kind: &str, name: &str, verbs: &[&str], resource: &str) -> Value {
        let group = if resource == "roles" || resource == "clusterroles" { GROUP } else { "" };
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name, "namespace": if kind == "Role" { "a" } else { "" }},
            "rules": [{"apiGroups": [group], "resources": [resource], "verbs": verbs}]})
    }

    fn bind(name: &str, role: &str, user: &str) -> Value {
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": GROUP, "kind": "User", "name": user}]})
    }

    #[track_caller]
    fn check(user: &str, object: Value, want: Result<(), &str>) {
        let cluster = Cluster::with([
            role("ClusterRole", "reader", &["get", "list"], "pods"),
            role("ClusterRole", "writer", &["create"], "pods"),
            role("ClusterRole", "escalator", &["escalate", "bind"], "roles"),
            role("ClusterRole", "binder", &["bind"], "clusterroles"),
            bind("b1", "reader", "ann"),
            bind("b2", "escalator", "eve"),
            bind("b3", "binder", "bob"),
        ]);
        let authorizer = Authorizer::new(cluster.clone());
        let kind =
            Kind::by_api_version("rbac.authorization.k8s.io/v1", object["kind"].as_str().unwrap()).unwrap();
        let got =
            check_role_write(&authorizer, &*cluster, &UserInfo::new(user, &[]), kind, "a", &object, None);
        assert_eq!(got.map_err(|status| status.message), want.map_err(str::to_owned));
    }

    #[test]
    fn roles_hand_out_only_what_their_writer_has() {
        check("ann", role("Role", "r", &["get"], "pods"), Ok(()));
        check(
            "ann",
            role("Role", "r", &["get", "delete"], "pods"),
            Err(
                "roles.rbac.authorization.k8s.io \"r\" is forbidden: user \"ann\" (groups=[\"system:authenticated\"]) \
                 is attempting to grant RBAC permissions not currently held:\n\
                 {APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"delete\"]}",
            ),
        );
        check("eve", role("Role", "r", &["get", "delete"], "pods"), Ok(()));
    }

    #[test]
    fn bindings_hand_out_only_what_their_writer_has() {
        check("ann", bind("new", "reader", "joe"), Ok(()));
        check(
            "ann",
            bind("new", "writer", "joe"),
            Err("clusterrolebindings.rbac.authorization.k8s.io \"new\" is forbidden: user \"ann\" \
                 (groups=[\"system:authenticated\"]) is attempting to grant RBAC permissions not currently held:\n\
                 {APIGroups:[\"\"], Resources:[\"pods\"], Verbs:[\"create\"]}"),
        );
        check("bob", bind("new", "writer", "joe"), Ok(()));
        check(
            "ann",
            bind("new", "gone", "joe"),
            Err("clusterroles.rbac.authorization.k8s.io \"gone\" not found"),
        );
    }
}
