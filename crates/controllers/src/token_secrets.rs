//! Deletes the Secrets that hold tokens of service accounts which are gone.
//!
//! The API server fills such Secrets. Upstream: pkg/controller/serviceaccount/tokens_controller.go.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use minke_api::{Key, Kind, Object, Status};
use minke_client::{Change, DeleteOptions, Target};

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::run::Controller;

const TYPE: &str = "kubernetes.io/service-account-token";
const NAME: &str = "kubernetes.io/service-account.name";
const UID: &str = "kubernetes.io/service-account.uid";

pub(crate) struct TokenSecrets;

/// The account that a Secret holds a token of: its name, and its uid if it is known.
fn account_of(secret: &Secret) -> Option<(&str, &str)> {
    let annotation = |name: &str| secret.metadata.annotations.as_ref()?.get(name).map(String::as_str);
    let name = annotation(NAME).filter(|_| secret.type_.as_deref() == Some(TYPE))?;
    Some((name, annotation(UID).unwrap_or_default()))
}

fn is_token(secret: &Object) -> bool {
    secret.field("type") == Some(TYPE)
}

/// Whether `account` is the one that the token is of.
fn matches(account: Option<&Object>, uid: &str) -> bool {
    account.is_some_and(|account| uid.is_empty() || uid == account.uid())
}

#[async_trait]
impl Controller for TokenSecrets {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<ServiceAccount>(), Kind::of::<Secret>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<Secret>() {
            return change
                .new
                .iter()
                .filter(|secret| is_token(secret))
                .map(|secret| Item::of(secret))
                .collect();
        }
        if change.new.is_some() {
            return Vec::new();
        }
        let secrets = ctx.informers.of_type::<Secret>().in_namespace(object.namespace());
        secrets.iter().filter(|secret| is_token(secret)).map(|secret| Item::of(secret)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(secret) = ctx.get::<Secret>(&item.key) else { return Ok(Requeue::Never) };
        let Some((name, uid)) = account_of(&secret) else { return Ok(Requeue::Never) };
        if secret.object.deleted().is_some() || there(ctx, &secret, name, uid) {
            return Ok(Requeue::Never);
        }
        // The cache may not show the account yet.
        let target = Target::object(Kind::of::<ServiceAccount>(), secret.object.namespace(), name);
        match ctx.client.get(target).await {
            Ok(account) if matches(Some(&account), uid) => return Ok(Requeue::Never),
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        ctx.delete(&secret.object, DeleteOptions::default()).await?;
        Ok(Requeue::Never)
    }
}

fn there(ctx: &Ctx, secret: &Typed<Secret>, name: &str, uid: &str) -> bool {
    let key = Key::new(secret.object.namespace(), name);
    matches(ctx.informer::<ServiceAccount>().get_key(&key).as_deref(), uid)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check(kind: &str, annotations: Value, want: Option<(&str, &str)>) {
        let secret = json!({"metadata": {"annotations": annotations}, "type": kind});
        assert_eq!(account_of(&serde_json::from_value(secret).unwrap()), want);
    }

    #[test]
    fn a_secret_names_the_account_that_it_is_for() {
        check(TYPE, json!({NAME: "a", UID: "1"}), Some(("a", "1")));
        check(TYPE, json!({NAME: "a"}), Some(("a", "")));
        check(TYPE, json!({}), None);
        check("Opaque", json!({NAME: "a"}), None);
    }

    #[test]
    fn an_account_of_another_uid_is_another_account() {
        let value = json!({"metadata": {"name": "a", "namespace": "n", "uid": "1"}});
        let account = Object::from_value(Kind::of::<ServiceAccount>(), &value).unwrap();
        assert!(matches(Some(&account), "1") && matches(Some(&account), ""));
        assert!(!matches(Some(&account), "2") && !matches(None, ""));
    }
}
