//! Admission: what the cluster as a whole has to say about a write, after defaults and before storing.
//!
//! Plugins are plain functions that read snapshots; none does I/O or leaves anything behind, so a dry run
//! needs no care. They run in upstream's order, first all that may change the object ([`mutate`]), later
//! all that only judge it ([`validate`]).

mod certificates;
mod defaults;
mod limits;
mod namespace;
mod pods;
pub mod quota;
mod service_account;
mod storage;
#[cfg(test)]
mod testing;

use minke_api::{Kind, Status};
use serde_json::Value;

use crate::authz::{self, Authorizer};
use crate::{Snapshots, UserInfo};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
}

/// A write that asks for admission. For deletions the object handed to the plugins is the one that goes.
pub struct Request<'a> {
    pub operation: Operation,
    pub kind: &'static Kind,
    /// Empty for the object itself.
    pub subresource: &'a str,
    /// Empty for cluster-scoped objects.
    pub namespace: &'a str,
    /// Empty while a name is still to be generated.
    pub name: &'a str,
    pub user: &'a UserInfo,
    /// The object as it is stored; none when creating.
    pub old: Option<&'a Value>,
}

impl Request<'_> {
    /// Whether this creates an object (not a subresource of one) of the kind.
    fn creates(&self, group: &str, kind: &str) -> bool {
        self.operation == Operation::Create && self.is(group, kind)
    }

    /// Whether this creates or replaces an object of the kind.
    fn writes(&self, group: &str, kind: &str) -> bool {
        self.operation != Operation::Delete && self.is(group, kind)
    }

    fn is(&self, group: &str, kind: &str) -> bool {
        self.kind.group == group && self.kind.kind == kind && self.subresource.is_empty()
    }

    /// The 403 of a plugin: `pods "web" is forbidden: why`.
    fn forbid(&self, why: impl AsRef<str>) -> Status {
        Status::forbidden(self.kind, self.name, why.as_ref())
    }
}

/// What plugins may look at.
pub struct Context<'a> {
    pub snapshots: &'a dyn Snapshots,
    pub authorizer: &'a Authorizer,
}

type Mutate = fn(&Context<'_>, &Request<'_>, &mut Value) -> Result<(), Status>;
type Validate = fn(&Context<'_>, &Request<'_>, &Value) -> Result<(), Status>;

/// NamespaceLifecycle, LimitRanger, ServiceAccount, TaintNodesByCondition, Priority,
/// DefaultTolerationSeconds, DefaultStorageClass, StorageObjectInUseProtection, RuntimeClass,
/// DefaultIngressClass.
const MUTATING: &[Mutate] = &[
    |context, request, _| namespace::lifecycle(context, request),
    limits::fill,
    service_account::fill,
    defaults::taint_new_node,
    pods::priority,
    pods::default_tolerations,
    defaults::storage_class,
    storage::protect_in_use,
    pods::runtime_class,
    defaults::ingress_class,
    certificates::fill,
];

/// NamespaceLifecycle (of deletions), LimitRanger, Priority (of classes), NodeRestriction (of volumes),
/// PersistentVolumeClaimResize, and that nobody hands out rights that they have not.
const VALIDATING: &[Validate] = &[
    |context, request, _| namespace::lifecycle(context, request),
    limits::check,
    defaults::one_default_priority,
    storage::node_keeps_to_its_own,
    defaults::claim_may_grow,
    roles_do_not_escalate,
    certificates::check,
    certificates::attest,
    certificates::of_pods,
];

/// Lets every plugin change the object. Returns warnings for the user.
pub fn mutate(
    context: &Context<'_>,
    request: &Request<'_>,
    object: &mut Value,
) -> Result<Vec<String>, Status> {
    MUTATING.iter().try_for_each(|plugin| plugin(context, request, object))?;
    Ok(Vec::new())
}

/// Lets every plugin refuse the object as it is about to be stored or deleted. Returns warnings for the user.
pub fn validate(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<Vec<String>, Status> {
    VALIDATING.iter().try_for_each(|plugin| plugin(context, request, object))?;
    Ok(Vec::new())
}

fn roles_do_not_escalate(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<(), Status> {
    if request.operation == Operation::Delete {
        return Ok(());
    }
    let Request { user, kind, namespace, old, .. } = *request;
    authz::check_role_write(context.authorizer, context.snapshots, user, kind, namespace, object, old)
}
