//! Who asked for a certificate, who may approve and sign it, and what its status may become.
//!
//! Upstream: pkg/registry/certificates/certificates/strategy.go and plugin/pkg/admission/certificates.

use jiff::Timestamp;
use minke_api::{FieldErrors, Status, time};
use serde_json::{Value, json};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use super::{Context, Operation, Request};
use crate::Attributes;
use crate::authz::MASTERS;
use crate::kinds::certificates::{LASTING, LEGACY_UNKNOWN, request_der};
use crate::kinds::tree::Tree;

const GROUP: &str = "certificates.k8s.io";
const KIND: &str = "CertificateSigningRequest";
const BUNDLE: &str = "ClusterTrustBundle";
const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";

fn is_request(request: &Request<'_>) -> bool {
    request.kind.group == GROUP && request.kind.kind == KIND && request.operation != Operation::Delete
}

/// Writes down who asks; dates conditions; keeps what a subresource may not change.
pub fn fill(_: &Context<'_>, request: &Request<'_>, object: &mut Value) -> Result<(), Status> {
    if !is_request(request) {
        return Ok(());
    }
    let Some(old) = request.old else {
        let user = request.user;
        let spec = object.object("spec");
        for field in ["username", "uid", "groups", "extra"] {
            spec.unset(field);
        }
        spec.set("username", user.name.as_str());
        spec.set("groups", user.groups.clone());
        if !user.uid.is_empty() {
            spec.set("uid", user.uid.as_str());
        }
        if !user.extra.is_empty() {
            spec.set("extra", json!(user.extra));
        }
        return Ok(());
    };
    if request.subresource.is_empty() {
        return Ok(());
    }
    let before = old.at("status").items("conditions");
    let now = time::format_seconds(Timestamp::now());
    for condition in object.object("status").each("conditions") {
        let kind = condition.text("type");
        let same = before.iter().find(|one| one.text("type") == kind);
        // Another version of what the approvers alone decide is put back as it was.
        if request.subresource == "status"
            && matches!(kind, "Approved" | "Denied")
            && let Some(same) = same
        {
            *condition = same.clone();
        }
        if !condition.has("lastUpdateTime") {
            condition.set("lastUpdateTime", now.as_str());
        }
        if !condition.has("lastTransitionTime") {
            let since = same.filter(|one| one.text("status") == condition.text("status"));
            let since = since.map(|one| one.text("lastTransitionTime")).filter(|since| !since.is_empty());
            condition.set("lastTransitionTime", since.unwrap_or(&now));
        }
    }
    Ok(())
}

/// Refuses whoever may not approve or sign, and changes of what was decided.
pub fn check(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<(), Status> {
    if !is_request(request) {
        return Ok(());
    }
    let signer = object.at("spec").text("signerName");
    let Some(old) = request.old else { return check_new(request, object, signer) };
    let (status, before) = (object.at("status"), old.at("status"));
    let mut errors = FieldErrors::default();
    let certified = status.text("certificate") != before.text("certificate");
    match request.subresource {
        "approval" => require(context, request, "approve", signer)?,
        "status" if certified || lasting(status) != lasting(before) => {
            require(context, request, "sign", signer)?;
        }
        _ => {}
    }
    if certified && before.has("certificate") {
        errors.forbidden("status.certificate", "updates may not modify existing certificate content");
    }
    for kind in LASTING {
        let has = |status: &Value| status.items("conditions").iter().any(|one| one.text("type") == kind);
        let adder = if kind == "Failed" { "status" } else { "approval" };
        if has(before) && !has(status) {
            let why = format!("updates may not remove a condition of type {kind:?}");
            errors.forbidden("status.conditions", &why);
        }
        if has(status) && !has(before) && request.subresource != adder {
            errors
                .forbidden("status.conditions", &format!("updates may not add a condition of type {kind:?}"));
        }
    }
    errors.into_result(request.kind, request.name)
}

fn lasting(status: &Value) -> Vec<&Value> {
    let all = status.items("conditions").iter();
    all.filter(|condition| LASTING.contains(&condition.text("type"))).collect()
}

fn check_new(request: &Request<'_>, object: &Value, signer: &str) -> Result<(), Status> {
    if signer == LEGACY_UNKNOWN {
        let mut errors = FieldErrors::default();
        let why = "the legacy signerName is not allowed via this API version";
        errors.invalid("spec.signerName", signer, why);
        return errors.into_result(request.kind, request.name);
    }
    let der = request_der(object).unwrap_or_default();
    let Ok((_, parsed)) = X509CertificationRequest::from_der(&der) else { return Ok(()) };
    let subject = &parsed.certification_request_info.subject;
    if signer == API_CLIENT && subject.iter_organization().any(|group| group.as_str() == Ok(MASTERS)) {
        return Err(request.forbid(format!("use of {API_CLIENT} signer with {MASTERS} group is not allowed")));
    }
    Ok(())
}

/// Refuses bundles of trust anchors of a signer that the user may not speak for.
pub fn attest(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<(), Status> {
    let signer = object.at("spec").text("signerName");
    let is_bundle = request.kind.group == GROUP && request.kind.kind == BUNDLE;
    if !is_bundle || request.operation == Operation::Delete || signer.is_empty() {
        return Ok(());
    }
    if request.old.is_some_and(|old| of_substance(object) == of_substance(old))
        || may(context, request, "attest", signer)
    {
        return Ok(());
    }
    Err(request.forbid(format!("user not permitted to attest for signerName {signer:?}")))
}

/// What is not the garbage collector's to change.
fn of_substance(object: &Value) -> Value {
    let mut object = object.clone();
    for field in ["ownerReferences", "finalizers", "managedFields", "resourceVersion"] {
        object.object("metadata").unset(field);
    }
    object
}

fn require(context: &Context<'_>, request: &Request<'_>, verb: &str, signer: &str) -> Result<(), Status> {
    match may(context, request, verb, signer) {
        true => Ok(()),
        false => {
            Err(request.forbid(format!("user not permitted to {verb} requests with signerName {signer:?}")))
        }
    }
}

/// Whether the signer itself is permitted, or all of its domain.
fn may(context: &Context<'_>, request: &Request<'_>, verb: &str, signer: &str) -> bool {
    let domain = signer.split('/').next().unwrap_or_default();
    let may = |name: &str| {
        let attributes = Attributes::Resource {
            verb,
            group: GROUP,
            version: "*",
            resource: "signers",
            subresource: "",
            namespace: "",
            name,
        };
        context.authorizer.authorize(request.user, &attributes).allowed
    };
    may(signer) || may(&format!("{domain}/*"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::UserInfo;
    use crate::kinds::certificates::tests::encoded_request;
    use crate::kinds::trust_bundle::tests::certificate;
    use crate::testing::Api;

    const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
    const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

    fn request(name: &str, groups: &[&str]) -> Value {
        json!({"metadata": {"name": name}, "spec": {
            "request": encoded_request(name, groups),
            "usages": ["client auth"],
            "signerName": "kubernetes.io/kube-apiserver-client",
            "username": "somebody else",
        }})
    }

    fn condition(kind: &str) -> Value {
        json!({"status": {"conditions": [{"type": kind, "status": "True", "reason": "r", "message": "m"}]}})
    }

    #[tokio::test]
    async fn a_request_says_who_asked_and_what_was_decided_stays() {
        let api = Api::new().await;
        let made = api.json(&format!("POST {PATH}"), request("jane", &["dev"])).await.ok();
        assert_eq!((&made["spec"]["username"], &made["status"]), (&json!("admin"), &json!({})));
        assert_eq!(made["spec"]["groups"], json!(["system:masters", "system:authenticated"]));
        let patch = async |sub: &str, body: Value| api.json(&format!("PATCH {PATH}/jane{sub}"), body).await;
        let sneaky = json!({"spec": {"usages": ["any"]}, "status": condition("Approved")["status"]});
        let changed = patch("", sneaky).await.ok();
        assert_eq!((&changed["spec"]["usages"], &changed["status"]), (&json!(["client auth"]), &json!({})));
        let forbidden = patch("/status", condition("Approved")).await.error();
        assert_eq!(forbidden.0, 422);
        assert!(
            forbidden.2.ends_with("updates may not add a condition of type \"Approved\""),
            "{}",
            forbidden.2
        );
        let approved = patch("/approval", condition("Approved")).await.ok();
        assert!(approved["status"]["conditions"][0]["lastUpdateTime"].is_string(), "{approved}");
        assert_eq!(patch("/approval", json!({"status": {"conditions": []}})).await.error().0, 422);
        let first = approved["status"]["conditions"][0].clone();
        let both = json!({"status": {"conditions": [first, {"type": "Denied", "status": "True"}]}});
        assert!(patch("/approval", both).await.error().2.contains("mutually exclusive"));
        let masters = api.json(&format!("POST {PATH}"), request("eve", &["system:masters"])).await.error();
        assert_eq!(
            masters.2,
            "certificatesigningrequests.certificates.k8s.io \"eve\" is forbidden: use of \
             kubernetes.io/kube-apiserver-client signer with system:masters group is not allowed"
        );
    }

    #[tokio::test]
    async fn approving_and_signing_are_rights_of_their_own() {
        let api = Api::new().await;
        api.json(&format!("POST {PATH}"), request("jane", &[])).await.ok();
        let all = json!({"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests", "certificatesigningrequests/approval", "certificatesigningrequests/status"], "verbs": ["*"]});
        let role = json!({"metadata": {"name": "r"}, "rules": [all]});
        api.json(&format!("POST {RBAC}/clusterroles"), role).await.ok();
        let binding = json!({"metadata": {"name": "r"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "bob"}]});
        api.json(&format!("POST {RBAC}/clusterrolebindings"), binding).await.ok();
        let bob = api.as_user(UserInfo::new("bob", &[]));
        let tries = [("approval", condition("Approved")), ("status", condition("Failed"))];
        for ((sub, body), verb) in tries.iter().zip(["approve", "sign"]) {
            let why = bob.json(&format!("PATCH {PATH}/jane/{sub}"), body.clone()).await.error();
            let want = format!(
                "user not permitted to {verb} requests with signerName \"kubernetes.io/kube-apiserver-client\""
            );
            assert!(why.0 == 403 && why.2.ends_with(&want), "{why:?}");
        }
        let signers = json!({"apiGroups": ["certificates.k8s.io"], "resources": ["signers"],
            "resourceNames": ["kubernetes.io/*"], "verbs": ["approve"]});
        api.json(&format!("PATCH {RBAC}/clusterroles/r"), json!({ "rules": [all, signers] })).await.ok();
        let mut codes = Vec::new();
        for (sub, body) in tries {
            codes.push(bob.json(&format!("PATCH {PATH}/jane/{sub}"), body).await.code);
        }
        assert_eq!(codes, [200, 403]);
    }

    #[tokio::test]
    async fn whoever_attests_speaks_for_the_signer() {
        const BUNDLES: &str = "/apis/certificates.k8s.io/v1/clustertrustbundles";
        let api = Api::new().await;
        let rule = |resource: &str, names: &[&str], verb: &str| json!({"apiGroups": ["certificates.k8s.io"], "resources": [resource], "resourceNames": names, "verbs": [verb]});
        let rules = [rule("clustertrustbundles", &[], "*"), rule("signers", &["example.com/*"], "attest")];
        let role = json!({"metadata": {"name": "r"}, "rules": rules});
        api.json(&format!("POST {RBAC}/clusterroles"), role).await.ok();
        let binding = json!({"metadata": {"name": "r"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "bob"}]});
        api.json(&format!("POST {RBAC}/clusterrolebindings"), binding).await.ok();
        let bob = api.as_user(UserInfo::new("bob", &[]));
        let bundle = |name: &str, signer: &str| json!({"metadata": {"name": name}, "spec": {"signerName": signer, "trustBundle": certificate(true)}});
        let make = async |api: &Api, name: &str, signer: &str| {
            api.json(&format!("POST {BUNDLES}"), bundle(name, signer)).await
        };
        make(&bob, "open", "").await.ok();
        make(&bob, "example.com:ca:a", "example.com/ca").await.ok();
        let refused = make(&bob, "other.io:ca:a", "other.io/ca").await.error();
        let want = "user not permitted to attest for signerName \"other.io/ca\"";
        assert!(refused.0 == 403 && refused.2.ends_with(want), "{refused:?}");
        make(&api, "other.io:ca:a", "other.io/ca").await.ok();
        // What only tells of owners and finalizers says nothing of the anchors.
        let patch = async |body: Value| bob.json(&format!("PATCH {BUNDLES}/other.io:ca:a"), body).await;
        patch(json!({"metadata": {"finalizers": ["example.com/keep"]}})).await.ok();
        assert_eq!(patch(json!({"metadata": {"labels": {"a": "b"}}})).await.error().0, 403);
        let renamed = json!({"spec": {"signerName": "example.com/cb"}});
        let fixed = api.json(&format!("PATCH {BUNDLES}/example.com:ca:a"), renamed).await.error();
        assert!(fixed.0 == 422 && fixed.2.contains("spec.signerName: Invalid value"), "{fixed:?}");
        let of = |signer: &str| format!("GET {BUNDLES}?fieldSelector=spec.signerName={signer}");
        let found = api.json(&of("example.com/ca"), Value::Null).await.ok();
        assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{found}");
    }
}
