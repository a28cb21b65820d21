//! The roles and bindings that every cluster begins with, and how they are kept up with a newer version.
//!
//! The tables in `data/` are upstream's default policy (v1.36), and a role of our own for node parts that
//! upstream does otherwise. Upstream: plugin/pkg/auth/authorizer/rbac/bootstrappolicy and the RBAC
//! reconcilers, which only ever add.

use k8s_openapi::api::rbac::v1::PolicyRule;
use serde_json::{Value, json};

use crate::authz::rules::{Rule, uncovered};
use crate::kinds::tree::Tree;

const ROLES: &str = include_str!("../../data/rbac-roles.tsv");
const BINDINGS: &str = include_str!("../../data/rbac-bindings.tsv");
const GROUP: &str = "rbac.authorization.k8s.io";
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

/// All default roles and bindings, roles first.
pub fn defaults() -> Vec<Value> {
    let mut objects: Vec<Value> = Vec::new();
    for row in rows(ROLES) {
        let [kind, namespace, name, what, value, resources, names, verbs, paths] = row;
        let role = same_or_new(&mut objects, kind, namespace, name);
        let (key, text) = value.split_once('=').unwrap_or((value, ""));
        match what {
            "label" => role["metadata"]["labels"].set(key, text),
            "aggregate" => {
                let selector = json!({"matchLabels": {key: text}});
                push(role.object("aggregationRule"), "clusterRoleSelectors", selector);
            }
            _ => {
                let mut rule = json!({"verbs": list(verbs)});
                for (field, text) in [
                    ("apiGroups", value),
                    ("resources", resources),
                    ("resourceNames", names),
                    ("nonResourceURLs", paths),
                ] {
                    if !text.is_empty() {
                        rule.set(field, list(text));
                    }
                }
                push(role, "rules", rule);
            }
        }
    }
    for row in rows(BINDINGS) {
        let [kind, namespace, name, role_kind, role, subject_kind, subject_namespace, subject, _] = row;
        let binding = same_or_new(&mut objects, kind, namespace, name);
        binding.set("roleRef", json!({"apiGroup": GROUP, "kind": role_kind, "name": role}));
        let mut who = json!({"kind": subject_kind, "name": subject});
        match subject_kind {
            "ServiceAccount" => who.set("namespace", subject_namespace),
            _ => who.set("apiGroup", GROUP),
        }
        push(binding, "subjects", who);
    }
    objects
}

/// The rows of a table without its head, filled up to nine cells.
fn rows(table: &'static str) -> impl Iterator<Item = [&'static str; 9]> {
    table.lines().skip(1).filter(|line| !line.is_empty()).map(|line| {
        let mut cells = [""; 9];
        cells.iter_mut().zip(line.split('\t')).for_each(|(cell, text)| *cell = text);
        cells
    })
}

/// The items of a cell; `""` stands for the core group.
fn list(text: &str) -> Value {
    text.split(',').map(|item| if item == "\"\"" { "" } else { item }).collect()
}

fn push(holder: &mut Value, field: &str, item: Value) {
    let mut items = holder.items(field).to_vec();
    items.push(item);
    holder.set(field, items);
}

/// The object that the rows before this one began, or a new one.
fn same_or_new<'a>(objects: &'a mut Vec<Value>, kind: &str, namespace: &str, name: &str) -> &'a mut Value {
    let same = objects.iter().rposition(|object| {
        let metadata = object.at("metadata");
        object.text("kind") == kind
            && metadata.text("name") == name
            && metadata.text("namespace") == namespace
    });
    let at = same.unwrap_or_else(|| {
        let mut metadata = json!({
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {AUTOUPDATE: "true"},
        });
        if !namespace.is_empty() {
            metadata.set("namespace", namespace);
        }
        objects.push(json!({"apiVersion": format!("{GROUP}/v1"), "kind": kind, "metadata": metadata}));
        objects.len() - 1
    });
    &mut objects[at]
}

/// What becomes of the stored object so that it has all that the default has; none when it has. What
/// an administrator added stays. An object whose annotation says so is left alone.
pub fn reconciled(stored: &Value, default: &Value) -> Option<Value> {
    if stored.at("metadata").at("annotations").text(AUTOUPDATE) == "false" {
        return None;
    }
    let mut wanted = stored.clone();
    for field in ["labels", "annotations"] {
        for (key, value) in default.at("metadata").members(field) {
            wanted.object("metadata").object(field).fill(key, value.clone());
        }
    }
    if default.text("kind").ends_with("Binding") {
        for subject in default.items("subjects") {
            let known = |other: &Value| {
                ["kind", "name", "namespace"].iter().all(|field| other.text(field) == subject.text(field))
            };
            if !stored.items("subjects").iter().any(known) {
                push(&mut wanted, "subjects", subject.clone());
            }
        }
    } else if default.get("aggregationRule").is_some() {
        for selector in default.at("aggregationRule").items("clusterRoleSelectors") {
            if !stored.at("aggregationRule").items("clusterRoleSelectors").contains(selector) {
                push(wanted.object("aggregationRule"), "clusterRoleSelectors", selector.clone());
            }
        }
    } else {
        for rule in uncovered(&rules(stored), &rules(default)) {
            push(&mut wanted, "rules", rule_value(rule));
        }
    }
    (wanted != *stored).then_some(wanted)
}

/// Whether the binding is of another role than it should be, which cannot be changed in place.
pub fn is_of_another_role(stored: &Value, default: &Value) -> bool {
    default.text("kind").ends_with("Binding")
        && stored.at("metadata").at("annotations").text(AUTOUPDATE) != "false"
        && stored.at("roleRef") != default.at("roleRef")
}

fn rules(role: &Value) -> Vec<Rule> {
    let rules: Vec<PolicyRule> = serde_json::from_value(role.at("rules").clone()).unwrap_or_default();
    rules.iter().map(Rule::from).collect()
}

fn rule_value(rule: Rule) -> Value {
    let mut value = json!({"verbs": rule.verbs});
    for (field, items) in [
        ("apiGroups", rule.groups),
        ("resources", rule.resources),
        ("resourceNames", rule.names),
        ("nonResourceURLs", rule.paths),
    ] {
        if !items.is_empty() {
            value.set(field, items);
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use minke_api::{FieldErrors, Kind};

    use super::*;
    use crate::authz::Authorizer;
    use crate::snapshots::fake::Cluster;
    use crate::strategy::strategy;
    use crate::{Attributes, UserInfo};

    /// A cluster with the default roles, the aggregated ones filled.
    fn cluster() -> std::sync::Arc<Cluster> {
        let mut objects = defaults();
        // `admin` takes from `edit`, which takes from `view`.
        for _ in 0..3 {
            for n in 0..objects.len() {
                let selectors = objects[n].at("aggregationRule").items("clusterRoleSelectors");
                let Some(labels) = selectors.first().map(|selector| selector.at("matchLabels").clone())
                else {
                    continue;
                };
                let labels = labels.as_object().unwrap();
                let taken: Vec<Value> = objects
                    .iter()
                    .filter(|other| {
                        labels.iter().all(|(k, v)| other.at("metadata").at("labels").get(k) == Some(v))
                    })
                    .flat_map(|other| other.items("rules").to_vec())
                    .collect();
                objects[n].set("rules", taken);
            }
        }
        Cluster::with(objects)
    }

    #[test]
    fn the_tables_hold_valid_objects() {
        let objects = defaults();
        assert!(objects.len() > 120, "{}", objects.len());
        for object in &objects {
            let kind = Kind::by_kind(GROUP, "v1", object.text("kind")).unwrap();
            let mut errors = FieldErrors::default();
            (strategy(kind).validate)(object, &mut errors);
            let name = object["metadata"]["name"].as_str().unwrap();
            assert_eq!(errors.into_result(kind, name).map_err(|status| status.message), Ok(()));
            let mut same = object.clone();
            (strategy(kind).set_defaults)(&mut same);
            assert_eq!(&same, object, "defaults change nothing");
        }
    }

    fn may(user: &UserInfo, verb: &str, group: &str, resource: &str) -> bool {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let attributes = Attributes::Resource {
            verb,
            group,
            version: "v1",
            resource,
            subresource,
            namespace: "a",
            name: "x",
        };
        Authorizer::new(cluster()).authorize(user, &attributes).allowed
    }

    #[test]
    fn everyone_may_do_their_part() {
        let manager = UserInfo::new("system:kube-controller-manager", &[]);
        assert!(may(&manager, "watch", "apps", "deployments"));
        let scheduler = UserInfo::new("system:kube-scheduler", &[]);
        assert!(may(&scheduler, "create", "", "pods/binding"));
        assert!(!may(&scheduler, "get", "", "secrets"));
        let deployments = UserInfo::service_account("kube-system", "deployment-controller");
        assert!(may(&deployments, "create", "apps", "replicasets"));
        assert!(!may(&deployments, "create", "", "pods"));
        let proxy = UserInfo::new("system:kube-proxy", &[]);
        assert!(may(&proxy, "watch", "discovery.k8s.io", "endpointslices"));
        let anyone = UserInfo::new("ann", &[]);
        assert!(may(&anyone, "create", "authorization.k8s.io", "selfsubjectaccessreviews"));
        assert!(!may(&anyone, "list", "", "pods"));
        let path = |user: &UserInfo, path: &str| {
            Authorizer::new(cluster()).authorize(user, &Attributes::Path { verb: "get", path }).allowed
        };
        for open in ["/healthz", "/livez", "/readyz", "/version"] {
            assert!(path(&UserInfo::anonymous(), open), "{open}");
        }
        assert!(!path(&UserInfo::anonymous(), "/api"));
        assert!(path(&anyone, "/apis/apps/v1"));
    }

    #[test]
    fn the_roles_for_users_differ_in_what_matters() {
        let cluster = cluster();
        for role in ["view", "edit", "admin"] {
            cluster.put(json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
                "metadata": {"name": role, "namespace": "a"},
                "roleRef": {"apiGroup": GROUP, "kind": "ClusterRole", "name": role},
                "subjects": [{"kind": "User", "name": role}]}));
        }
        let authorizer = Authorizer::new(cluster);
        let check = |user: &str, verb: &str, group: &str, resource: &str, want: bool| {
            let attributes = Attributes::Resource {
                verb,
                group,
                version: "v1",
                resource,
                subresource: "",
                namespace: "a",
                name: "x",
            };
            let decision = authorizer.authorize(&UserInfo::new(user, &[]), &attributes);
            assert_eq!(decision.allowed, want, "{user} {verb} {resource}");
        };
        check("view", "get", "", "pods", true);
        check("view", "get", "", "secrets", false);
        check("view", "create", "", "pods", false);
        check("edit", "get", "", "secrets", true);
        check("edit", "delete", "apps", "deployments", true);
        check("edit", "create", GROUP, "rolebindings", false);
        check("admin", "create", GROUP, "rolebindings", true);
        check("admin", "get", "", "nodes", false);
    }

    #[test]
    fn reconciling_adds_and_never_takes() {
        let default =
            defaults().into_iter().find(|object| object["metadata"]["name"] == "system:basic-user").unwrap();
        assert_eq!(reconciled(&default, &default), None);
        let mut stored = default.clone();
        stored["rules"] = json!([{"apiGroups": ["x"], "resources": ["y"], "verbs": ["z"]}]);
        let wanted = reconciled(&stored, &default).unwrap();
        assert_eq!(wanted["rules"][0], stored["rules"][0]);
        assert!(uncovered(&rules(&wanted), &rules(&default)).is_empty());
        stored["metadata"]["annotations"][AUTOUPDATE] = "false".into();
        assert_eq!(reconciled(&stored, &default), None);
    }
}
