//! Admission: what the cluster as a whole has to say about a write, after defaults and before storing.
//!
//! Plugins are plain functions that read snapshots; none does I/O. They run in upstream's order, first
//! all that may change the object ([`mutate`]), later all that only judge it ([`validate`]).

use minke_api::{Kind, Status};
use serde_json::Value;

use crate::authz::Authorizer;
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
    pub dry_run: bool,
}

/// What plugins may look at.
pub struct Context<'a> {
    pub snapshots: &'a dyn Snapshots,
    pub authorizer: &'a Authorizer,
}

/// Lets every plugin change the object. Returns warnings for the user.
pub fn mutate(_: &Context<'_>, _: &Request<'_>, _: &mut Value) -> Result<Vec<String>, Status> {
    Ok(Vec::new())
}

/// Lets every plugin refuse the object as it is about to be stored or deleted. Returns warnings for the user.
pub fn validate(_: &Context<'_>, _: &Request<'_>, _: &Value) -> Result<Vec<String>, Status> {
    Ok(Vec::new())
}
