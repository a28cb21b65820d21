//! Tries plugins on a cluster in a map.

use std::sync::Arc;

use minke_api::{Kind, Status};
use serde_json::Value;

use super::{Context, Operation, Request, mutate, validate};
use crate::UserInfo;
use crate::authz::Authorizer;
use crate::snapshots::fake::Cluster;

/// A write by an administrator; the object after all plugins had their say.
pub fn write(cluster: &Arc<Cluster>, mut object: Value, old: Option<&Value>) -> Result<Value, Status> {
    let operation = if old.is_some() { Operation::Update } else { Operation::Create };
    run(cluster, operation, &mut object, old)?;
    Ok(object)
}

pub fn create(cluster: &Arc<Cluster>, object: Value) -> Result<Value, Status> {
    write(cluster, object, None)
}

pub fn delete(cluster: &Arc<Cluster>, mut object: Value) -> Result<(), Status> {
    let old = object.clone();
    run(cluster, Operation::Delete, &mut object, Some(&old))
}

/// What one validating plugin says of a user's write.
pub fn judge(
    cluster: &Arc<Cluster>,
    user: &UserInfo,
    operation: Operation,
    object: &Value,
    old: Option<&Value>,
    plugin: super::Validate,
) -> Result<(), Status> {
    let authorizer = Authorizer::new(cluster.clone());
    let context = Context { snapshots: &**cluster, authorizer: &authorizer };
    let kind = Kind::by_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap())
        .unwrap();
    let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
    let request = Request {
        operation,
        kind,
        subresource: "",
        namespace: text("namespace"),
        name: text("name"),
        user,
        old,
    };
    plugin(&context, &request, object)
}

fn run(
    cluster: &Arc<Cluster>,
    operation: Operation,
    object: &mut Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let authorizer = Authorizer::new(cluster.clone());
    let context = Context { snapshots: &**cluster, authorizer: &authorizer };
    let kind = Kind::by_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap())
        .unwrap();
    let metadata = object["metadata"].clone();
    let request = Request {
        operation,
        kind,
        subresource: "",
        namespace: metadata["namespace"].as_str().unwrap_or_default(),
        name: metadata["name"].as_str().unwrap_or_default(),
        user: &UserInfo::new("admin", &["system:masters"]),
        old,
    };
    if operation != Operation::Delete {
        mutate(&context, &request, object)?;
    }
    validate(&context, &request, object).map(|_| ())
}
