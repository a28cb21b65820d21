//! Gives every namespace its ServiceAccount `default`.
//!
//! Upstream: pkg/controller/serviceaccount (serviceaccounts_controller).

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use minke_api::{Key, Kind, Status};
use minke_client::Change;
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

const NAME: &str = "default";

pub(crate) struct ServiceAccounts;

#[async_trait]
impl Controller for ServiceAccounts {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Namespace>(), Kind::of::<ServiceAccount>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        namespaces_that_lack(change, Kind::of::<ServiceAccount>(), NAME)
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let namespace = &*item.key.name;
        if !is_active_namespace(ctx, namespace)
            || ctx.informer::<ServiceAccount>().get(namespace, NAME).is_some()
        {
            return Ok(Requeue::Never);
        }
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": NAME, "namespace": namespace },
        });
        unless_terminating(ctx.create(Kind::of::<ServiceAccount>(), namespace, account).await.map(drop))
    }
}

/// The namespace that was changed, or lost (or got another) object `name` of `kind`.
pub(crate) fn namespaces_that_lack(change: &Change, kind: &'static Kind, name: &str) -> Vec<Item> {
    let object = change.object();
    let namespace = match object.kind() == kind {
        true if object.name() == name => object.namespace(),
        true => return Vec::new(),
        false => object.name(),
    };
    vec![Item::new(Kind::of::<Namespace>(), "", namespace)]
}

pub(crate) fn is_active_namespace(ctx: &Ctx, name: &str) -> bool {
    let namespace = ctx.informer::<Namespace>().get_key(&Key::new("", name));
    namespace.is_some_and(|namespace| namespace.deleted().is_none())
}

/// What cannot be made because its namespace is going away, or is there already, need not be made.
pub(crate) fn unless_terminating(created: Result<(), Status>) -> Result<Requeue, Status> {
    match created {
        Err(error) if !error.has_cause("NamespaceTerminating") && !error.is_already_exists() => Err(error),
        _ => Ok(Requeue::Never),
    }
}
