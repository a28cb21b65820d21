//! Authorization: RBAC over an index compiled from the roles and bindings, and the node authorizer.
//!
//! The index is compiled again when one of the four kinds has been written since; a request only looks
//! up its user and groups. Upstream: plugin/pkg/auth/authorizer/{rbac,node}.

mod escalation;
mod node;
pub mod rules;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

use k8s_openapi::api::rbac::v1 as rbac;
use minke_api::{Kind, Object, Revision, Status};
use minke_client::typed;

pub use escalation::check_role_write;
pub use node::name_of as node_of;
use rules::Rule;

use crate::{Attributes, Snapshots, UserInfo};

/// Members of this group may do everything, whatever the roles say: the way back in.
pub const MASTERS: &str = "system:masters";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Why it is allowed, or what was wrong with the roles that might have allowed it.
    pub reason: Arc<str>,
}

impl Decision {
    fn allow() -> Decision {
        Decision { allowed: true, reason: "".into() }
    }
}

/// Decides who may do what. Cheap to ask; shared by all requests.
pub struct Authorizer {
    snapshots: Arc<dyn Snapshots>,
    index: RwLock<Arc<Index>>,
    /// Held while the index is compiled, so that it is done once.
    compiling: Mutex<()>,
}

/// One binding of a role to the subject under which it is filed.
struct Grant {
    rules: Arc<[Rule]>,
    /// `RBAC: allowed by ClusterRoleBinding "x" of ClusterRole "y" to Group "z"`.
    reason: Arc<str>,
}

/// Grants by the name of their subject.
#[derive(Default)]
struct Grants {
    users: HashMap<String, Vec<Grant>>,
    groups: HashMap<String, Vec<Grant>>,
}

#[derive(Default)]
struct Index {
    /// Revisions of the four kinds that this was compiled from.
    compiled_from: [Revision; 4],
    everywhere: Grants,
    by_namespace: HashMap<String, Grants>,
    /// What is wrong (a binding to a missing role), by namespace; empty for cluster-wide bindings.
    problems: HashMap<String, Vec<String>>,
    node_rules: Arc<[Rule]>,
}

struct Kinds {
    roles: &'static Kind,
    cluster_roles: &'static Kind,
    bindings: &'static Kind,
    cluster_bindings: &'static Kind,
}

fn kinds() -> Kinds {
    Kinds {
        roles: Kind::of::<rbac::Role>(),
        cluster_roles: Kind::of::<rbac::ClusterRole>(),
        bindings: Kind::of::<rbac::RoleBinding>(),
        cluster_bindings: Kind::of::<rbac::ClusterRoleBinding>(),
    }
}

impl Authorizer {
    pub fn new(snapshots: Arc<dyn Snapshots>) -> Authorizer {
        Authorizer { snapshots, index: RwLock::default(), compiling: Mutex::default() }
    }

    /// Whether the user may do it, by RBAC or as the node it is.
    pub fn authorize(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Decision {
        if user.groups.iter().any(|group| group == MASTERS) {
            return Decision::allow();
        }
        let index = self.index();
        if let Some(node) = node::name_of(user)
            && node::authorize(&*self.snapshots, &index.node_rules, node, attributes)
        {
            return Decision::allow();
        }
        let namespace = match attributes {
            Attributes::Resource { namespace, .. } => *namespace,
            Attributes::Path { .. } => "",
        };
        for grant in index.grants(user, namespace) {
            if grant.rules.iter().any(|rule| rule.allows(attributes)) {
                return Decision { allowed: true, reason: grant.reason.clone() };
            }
        }
        let problems: Vec<&str> = ["", namespace]
            .iter()
            .take(if namespace.is_empty() { 1 } else { 2 })
            .filter_map(|at| index.problems.get(*at))
            .flatten()
            .map(String::as_str)
            .collect();
        let reason = match problems.len() {
            0 => String::new(),
            1 => format!("RBAC: {}", problems[0]),
            _ => format!("RBAC: [{}]", problems.join(", ")),
        };
        Decision { allowed: false, reason: reason.into() }
    }

    /// As [`Authorizer::authorize`], with upstream's 403 for an answer.
    pub fn require(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Result<(), Status> {
        let decision = self.authorize(user, attributes);
        if decision.allowed { Ok(()) } else { Err(forbidden(user, attributes, &decision.reason)) }
    }

    /// All rules that RBAC gives the user in a namespace (empty: cluster-wide ones only).
    pub fn rules_of(&self, user: &UserInfo, namespace: &str) -> Vec<Rule> {
        let index = self.index();
        index.grants(user, namespace).flat_map(|grant| grant.rules.iter().cloned()).collect()
    }

    fn index(&self) -> Arc<Index> {
        let current = || self.index.read().expect("nothing panics while it writes the index").clone();
        let k = kinds();
        let revisions = || {
            [k.roles, k.cluster_roles, k.bindings, k.cluster_bindings]
                .map(|kind| self.snapshots.kind_revision(kind))
        };
        let index = current();
        if index.compiled_from == revisions() {
            return index;
        }
        let _one_at_a_time = self.compiling.lock().expect("compiling does not panic");
        let index = current();
        // Read before the objects: what is written meanwhile makes the index look old, never new.
        let from = revisions();
        if index.compiled_from == from {
            return index;
        }
        let index = Arc::new(Index::compile(&*self.snapshots, from));
        *self.index.write().expect("nothing panics while it writes the index") = index.clone();
        index
    }
}

impl Index {
    fn grants<'a>(&'a self, user: &'a UserInfo, namespace: &str) -> impl Iterator<Item = &'a Grant> {
        let places = [Some(&self.everywhere), self.by_namespace.get(namespace)];
        places.into_iter().flatten().flat_map(|grants| {
            let own = grants.users.get(&user.name);
            own.into_iter().chain(user.groups.iter().filter_map(|group| grants.groups.get(group))).flatten()
        })
    }

    fn compile(snapshots: &dyn Snapshots, compiled_from: [Revision; 4]) -> Index {
        let k = kinds();
        let mut index = Index { compiled_from, ..Index::default() };
        let cluster_roles: HashMap<String, Arc<[Rule]>> = snapshots
            .list(k.cluster_roles, "")
            .iter()
            .filter_map(|object| Some((object.name().to_owned(), cluster_role_rules(object)?)))
            .collect();
        let roles: HashMap<(String, String), Arc<[Rule]>> = snapshots
            .list(k.roles, "")
            .iter()
            .filter_map(|object| {
                let role = typed::<rbac::Role>(object)?;
                let rules = role.rules.iter().flatten().map(Rule::from).collect();
                Some(((object.namespace().to_owned(), object.name().to_owned()), rules))
            })
            .collect();
        index.node_rules = cluster_roles.get("system:node").cloned().unwrap_or_default();
        for object in snapshots.list(k.cluster_bindings, "") {
            let Some(binding) = typed::<rbac::ClusterRoleBinding>(&object) else { continue };
            let rules = cluster_roles.get(&binding.role_ref.name).cloned();
            index.bind(&object, &binding.role_ref, binding.subjects.as_deref(), rules);
        }
        for object in snapshots.list(k.bindings, "") {
            let Some(binding) = typed::<rbac::RoleBinding>(&object) else { continue };
            let rules = match binding.role_ref.kind.as_str() {
                "ClusterRole" => cluster_roles.get(&binding.role_ref.name).cloned(),
                _ => roles.get(&(object.namespace().to_owned(), binding.role_ref.name.clone())).cloned(),
            };
            index.bind(&object, &binding.role_ref, binding.subjects.as_deref(), rules);
        }
        index
    }

    fn bind(
        &mut self,
        binding: &Object,
        role: &rbac::RoleRef,
        subjects: Option<&[rbac::Subject]>,
        rules: Option<Arc<[Rule]>>,
    ) {
        let namespace = binding.namespace();
        let Some(rules) = rules else {
            let problem =
                format!("{}.rbac.authorization.k8s.io {:?} not found", role.kind.to_lowercase(), role.name);
            let problems = self.problems.entry(namespace.to_owned()).or_default();
            if !problems.contains(&problem) {
                problems.push(problem);
            }
            return;
        };
        let grants = match namespace {
            "" => &mut self.everywhere,
            _ => self.by_namespace.entry(namespace.to_owned()).or_default(),
        };
        let what = match namespace {
            "" => format!("{:?}", binding.name()),
            _ => format!("\"{}/{}\"", binding.name(), namespace),
        };
        for subject in subjects.unwrap_or_default() {
            let (subjects, name, who) = match subject.kind.as_str() {
                "User" => (&mut grants.users, subject.name.clone(), format!("{:?}", subject.name)),
                "Group" => (&mut grants.groups, subject.name.clone(), format!("{:?}", subject.name)),
                "ServiceAccount" => {
                    let home = subject.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(namespace);
                    let user = format!("system:serviceaccount:{home}:{}", subject.name);
                    (&mut grants.users, user, format!("\"{}/{home}\"", subject.name))
                }
                _ => continue,
            };
            let reason = format!(
                "RBAC: allowed by {} {what} of {} {:?} to {} {who}",
                binding.kind().kind,
                role.kind,
                role.name,
                subject.kind
            );
            subjects.entry(name).or_default().push(Grant { rules: rules.clone(), reason: reason.into() });
        }
    }
}

fn cluster_role_rules(object: &Object) -> Option<Arc<[Rule]>> {
    let role = typed::<rbac::ClusterRole>(object)?;
    Some(role.rules.iter().flatten().map(Rule::from).collect())
}

/// Upstream's 403: who cannot do what, where.
pub fn forbidden(user: &UserInfo, attributes: &Attributes<'_>, reason: &str) -> Status {
    let user = &user.name;
    let tail = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    match *attributes {
        Attributes::Path { verb, path } => {
            let text = format!("forbidden: User {user:?} cannot {verb} path {path:?}{tail}");
            let mut status = Status::failure(403, "Forbidden", text);
            status.details = Some(minke_api::Details::default());
            status
        }
        Attributes::Resource { verb, group, resource, subresource, namespace, name, .. } => {
            let of = if subresource.is_empty() {
                resource.to_owned()
            } else {
                format!("{resource}/{subresource}")
            };
            let place = match namespace {
                "" => " at the cluster scope".to_owned(),
                _ => format!(" in the namespace {namespace:?}"),
            };
            let qualified =
                if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
            let about = if name.is_empty() { qualified } else { format!("{qualified} {name:?}") };
            let text = format!(
                "{about} is forbidden: User {user:?} cannot {verb} resource {of:?} in API group {group:?}{place}{tail}"
            );
            let mut status = Status::failure(403, "Forbidden", text);
            status.details = Some(minke_api::Details {
                name: name.to_owned(),
                group: group.to_owned(),
                kind: resource.to_owned(),
                ..minke_api::Details::default()
            });
            status
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::snapshots::fake::Cluster;

    fn role(kind: &str, namespace: &str, name: &str, rules: Value) -> Value {
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
            "metadata": {"name": name, "namespace": namespace}, "rules": rules})
    }

    fn binding(namespace: &str, name: &str, role: (&str, &str), subject: Value) -> Value {
        let kind = if namespace.is_empty() { "ClusterRoleBinding" } else { "RoleBinding" };
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
            "metadata": {"name": name, "namespace": namespace},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role.0, "name": role.1},
            "subjects": [subject]})
    }

    fn get<'a>(resource: &'a str, namespace: &'a str, name: &'a str) -> Attributes<'a> {
        Attributes::Resource {
            verb: "get",
            group: "",
            version: "v1",
            resource,
            subresource: "",
            namespace,
            name,
        }
    }

    fn cluster() -> Arc<Cluster> {
        let pods = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]);
        Cluster::with([
            role("ClusterRole", "", "pod-reader", pods.clone()),
            role("Role", "a", "local-reader", pods),
            binding("", "all", ("ClusterRole", "pod-reader"), json!({"kind": "Group", "name": "readers"})),
            binding("a", "ann", ("Role", "local-reader"), json!({"kind": "User", "name": "ann"})),
            binding(
                "b",
                "sa",
                ("ClusterRole", "pod-reader"),
                json!({"kind": "ServiceAccount", "name": "bot"}),
            ),
            binding("c", "lost", ("Role", "gone"), json!({"kind": "User", "name": "ann"})),
        ])
    }

    #[track_caller]
    fn check(user: &UserInfo, attributes: &Attributes<'_>, want: Result<(), &str>) {
        let got = Authorizer::new(cluster()).require(user, attributes).map_err(|status| status.message);
        assert_eq!(got, want.map_err(str::to_owned));
    }

    #[test]
    fn bindings_hold_where_they_stand() {
        let ann = UserInfo::new("ann", &[]);
        let reader = UserInfo::new("bob", &["readers"]);
        let bot = UserInfo::service_account("b", "bot");
        check(&reader, &get("pods", "anywhere", "p"), Ok(()));
        check(&reader, &get("pods", "", ""), Ok(()));
        check(&ann, &get("pods", "a", "p"), Ok(()));
        check(
            &ann,
            &get("pods", "b", "p"),
            Err(
                "pods \"p\" is forbidden: User \"ann\" cannot get resource \"pods\" in API group \"\" in the namespace \"b\"",
            ),
        );
        check(&bot, &get("pods", "b", "p"), Ok(()));
        check(
            &bot,
            &get("pods", "", ""),
            Err(
                "pods is forbidden: User \"system:serviceaccount:b:bot\" cannot get resource \"pods\" in API group \"\" at the cluster scope",
            ),
        );
        check(
            &ann,
            &get("pods", "c", ""),
            Err(
                "pods is forbidden: User \"ann\" cannot get resource \"pods\" in API group \"\" in the namespace \"c\": RBAC: role.rbac.authorization.k8s.io \"gone\" not found",
            ),
        );
        check(
            &UserInfo::anonymous(),
            &Attributes::Path { verb: "get", path: "/" },
            Err("forbidden: User \"system:anonymous\" cannot get path \"/\""),
        );
        check(&UserInfo::new("root", &[MASTERS]), &get("secrets", "a", "s"), Ok(()));
    }

    #[test]
    fn a_new_binding_counts_at_once() {
        let cluster = cluster();
        let authorizer = Authorizer::new(cluster.clone());
        let eve = UserInfo::new("eve", &[]);
        assert!(!authorizer.authorize(&eve, &get("pods", "a", "p")).allowed);
        cluster.put(binding("a", "eve", ("Role", "local-reader"), json!({"kind": "User", "name": "eve"})));
        let decision = authorizer.authorize(&eve, &get("pods", "a", "p"));
        assert_eq!(
            &*decision.reason,
            "RBAC: allowed by RoleBinding \"eve/a\" of Role \"local-reader\" to User \"eve\""
        );
        cluster.remove(kinds().bindings, "a", "eve");
        assert!(!authorizer.authorize(&eve, &get("pods", "a", "p")).allowed);
    }
}
