//! Tokens that are kept in Secrets: one that is made for an account is filled with a token that does not expire, and
//! is good as long as the Secret holds it.
//!
//! The old way, for what runs outside of the cluster. Upstream: pkg/controller/serviceaccount/tokens_controller.go
//! and pkg/serviceaccount/legacy.go.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Object};
use serde_json::{Value, json};

use crate::kinds::tree::Tree;
use crate::tokens::{TokenError, Tokens, bad};
use crate::{Snapshots, UserInfo};

pub const ISSUER: &str = "kubernetes/serviceaccount";
const TYPE: &str = "kubernetes.io/service-account-token";
const NAME: &str = "kubernetes.io/service-account.name";
const UID: &str = "kubernetes.io/service-account.uid";
const CLAIM: &str = "kubernetes.io/serviceaccount/";

/// Fills what a Secret for a token lacks, if the account that it is for is there. `ca` is the certificate of the
/// cluster, in PEM.
pub fn fill(tokens: &Tokens, snapshots: &dyn Snapshots, ca: &str, secret: &mut Value) {
    if secret.text("type") != TYPE {
        return;
    }
    let metadata = secret.at("metadata");
    let (namespace, name) = (metadata.text("namespace").to_owned(), metadata.text("name").to_owned());
    let annotations = metadata.at("annotations");
    let uid = annotations.text(UID);
    let accounts = Kind::of::<core::ServiceAccount>();
    let account = snapshots.get(accounts, &namespace, annotations.text(NAME));
    let Some(account) = account.filter(|account| uid.is_empty() || uid == account.uid()) else { return };
    secret.object("metadata").object("annotations").set(UID, account.uid());
    let data = secret.object("data");
    data.fill("ca.crt", BASE64.encode(ca));
    data.fill("namespace", BASE64.encode(&namespace));
    if !data.has("token")
        && let Ok(token) = tokens.sign(&claims(&account, &name))
    {
        data.set("token", BASE64.encode(token));
    }
}

fn claims(account: &Object, secret: &str) -> Value {
    let (namespace, name) = (account.namespace(), account.name());
    json!({
        "iss": ISSUER,
        format!("{CLAIM}namespace"): namespace,
        format!("{CLAIM}secret.name"): secret,
        format!("{CLAIM}service-account.name"): name,
        format!("{CLAIM}service-account.uid"): account.uid(),
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
    })
}

/// Whose token it is, if its Secret still holds it and its account is still there.
pub fn user_of(snapshots: &dyn Snapshots, token: &str, claims: &Value) -> Result<UserInfo, TokenError> {
    let claim = |name: &str| claims.text(&format!("{CLAIM}{name}"));
    let (namespace, name) = (claim("namespace"), claim("service-account.name"));
    let secret = snapshots.get(Kind::of::<core::Secret>(), namespace, claim("secret.name"));
    let secret = secret.filter(|secret| secret.deleted().is_none());
    let secret = secret.ok_or_else(|| bad("service account token has been invalidated"))?;
    if secret.value().at("data").text("token") != BASE64.encode(token) {
        return Err(bad("service account token does not match the one in its secret"));
    }
    let account = snapshots.get(Kind::of::<core::ServiceAccount>(), namespace, name);
    let account = account.filter(|account| account.deleted().is_none());
    match account {
        Some(account) if account.uid() == claim("service-account.uid") => {
            let mut user = UserInfo::service_account(namespace, name);
            user.uid = account.uid().to_owned();
            Ok(user)
        }
        _ => Err(bad(format!("service account {namespace}/{name} has been deleted"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::Api;

    const SECRETS: &str = "/api/v1/namespaces/default/secrets";

    fn secret(name: &str, account: &str) -> Value {
        json!({"metadata": {"name": name, "annotations": {NAME: account}}, "type": TYPE})
    }

    #[tokio::test]
    async fn a_secret_gets_a_token_that_is_good_as_long_as_it_holds_it() {
        let api = Api::new().await;
        let account = json!({"metadata": {"name": "bot"}});
        api.json("POST /api/v1/namespaces/default/serviceaccounts", account).await.ok();
        let made = api.json(&format!("POST {SECRETS}"), secret("key", "bot")).await.ok();
        let text = |field: &str| {
            let bytes = BASE64.decode(made["data"].text(field)).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        assert!(text("ca.crt").contains("BEGIN CERTIFICATE"));
        assert_eq!(text("namespace"), "default");
        assert!(!made["metadata"]["annotations"].text(UID).is_empty());
        let review = async || {
            let review = json!({"spec": {"token": text("token")}});
            let path = "POST /apis/authentication.k8s.io/v1/tokenreviews";
            api.json(path, review).await.ok()["status"].clone()
        };
        let status = review().await;
        assert_eq!(status["user"]["username"], "system:serviceaccount:default:bot", "{status}");
        let other = json!({"data": {"token": BASE64.encode("x")}});
        api.json(&format!("PATCH {SECRETS}/key"), other).await.ok();
        assert!(review().await.get("user").is_none_or(|user| user.text("username").is_empty()));
        // An emptied one is filled again.
        let empty = json!({"data": {"token": null}});
        let again = api.json(&format!("PATCH {SECRETS}/key"), empty).await.ok();
        assert!(again["data"].has("token"));
        let nobody = api.json(&format!("POST {SECRETS}"), secret("lost", "nobody")).await.ok();
        assert!(!nobody.has("data"), "{nobody}");
    }
}
