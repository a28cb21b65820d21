//! What a pod's sandbox is run by, as its RuntimeClass says, and the users that it has there.

use k8s_openapi::api::node::v1 as node;
use minke_api::Kind;
use minke_client::Target;
use minke_runtime::{Handler, IdRange};

use crate::context::Context;
use crate::pod::Pod;

/// The handler for a pod. The error is what `FailedCreatePodSandBox` tells.
pub async fn handler(context: &Context, pod: &Pod) -> Result<Handler, String> {
    let mut wanted = String::new();
    if let Some(name) = pod.spec().runtime_class_name.as_deref().filter(|name| !name.is_empty()) {
        let class = context.client.get(Target::object(Kind::of::<node::RuntimeClass>(), "", name)).await;
        let class = class.map_err(|error| match error.is_not_found() {
            true => format!("runtimeclass.node.k8s.io \"{name}\" not found"),
            false => format!("failed to lookup RuntimeClass {name}: {error}"),
        })?;
        wanted = class.value()["handler"].as_str().unwrap_or_default().to_owned();
    }
    let mut known = context.runtime.handlers().into_iter();
    known
        .find(|handler| handler.name == wanted)
        .ok_or_else(|| format!("failed to get sandbox runtime: no runtime for \"{wanted}\" is configured"))
}

/// A range of ids for the sandbox of a pod that has users of its own. It has to be given back.
pub fn users(
    context: &Context,
    pod: &Pod,
    handler: &Handler,
    sandbox: &str,
) -> Result<Option<IdRange>, String> {
    if pod.spec().host_users != Some(false) {
        return Ok(None);
    }
    if !handler.user_namespaces {
        let which = match handler.name.as_str() {
            "" => "runtime".to_owned(),
            name => format!("RuntimeClass handler \"{name}\""),
        };
        return Err(format!("can't set `spec.hostUsers: false`, {which} does not support user namespaces"));
    }
    let range = context.ids.allocate(sandbox);
    range.map(Some).map_err(|why| format!("create user namespace: {why}"))
}
