//! Who asked for a certificate, who may approve and sign it, and what its status may become.
//!
//! Upstream: pkg/registry/certificates/certificates/strategy.go and plugin/pkg/admission/certificates.

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use minke_api::{FieldErrors, Kind, Object, Status, time};
use serde_json::{Value, json};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use super::{Context, Operation, Request};
use crate::Attributes;
use crate::authz::{MASTERS, node_of};
use crate::kinds::certificates::{LASTING, LEGACY_UNKNOWN, request_der};
use crate::kinds::pod_certificate;
use crate::kinds::tree::Tree;

const GROUP: &str = "certificates.k8s.io";
const KIND: &str = "CertificateSigningRequest";
const BUNDLE: &str = "ClusterTrustBundle";
const POD_REQUEST: &str = "PodCertificateRequest";
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

/// Lets only signers say what becomes of a pod's request, and nodes ask for their own pods alone.
pub fn of_pods(context: &Context<'_>, request: &Request<'_>, object: &Value) -> Result<(), Status> {
    if request.kind.group != GROUP || request.kind.kind != POD_REQUEST {
        return Ok(());
    }
    let spec = object.at("spec");
    match (request.operation, request.subresource) {
        (Operation::Update, "status") => {
            require(context, request, "sign", spec.text("signerName"))?;
            let mut errors = FieldErrors::default();
            if let Some(old) = request.old.filter(|old| old.at("status") != object.at("status")) {
                pod_certificate::validate_status(object, old.at("status"), &mut errors);
            }
            errors.into_result(request.kind, request.name)
        }
        (Operation::Create, _) => match node_of(request.user) {
            Some(node) => {
                asks_for_own(context, request.namespace, node, spec).map_err(|why| request.forbid(why))
            }
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

fn asks_for_own(context: &Context<'_>, namespace: &str, node: &str, spec: &Value) -> Result<(), String> {
    let (named, pod) = (spec.text("nodeName"), spec.text("podName"));
    if named != node {
        return Err(format!(
            "PodCertificateRequest.Spec.NodeName={named:?}, which is not the requesting node {node:?}"
        ));
    }
    let here =
        |found: &Object| found.field("spec.nodeName") == Some(node) && found.uid() == spec.text("podUID");
    let found = context.snapshots.get(Kind::of::<core::Pod>(), namespace, pod).filter(|found| here(found));
    let Some(found) = found else {
        return Err(format!("PodCertificateRequest for pod {pod:?}, which does not run on node {node:?}"));
    };
    let uid_of =
        |kind, namespace, name| context.snapshots.get(kind, namespace, name).map(|o| o.uid().to_owned());
    let account = spec.text("serviceAccountName");
    let same_account = found.value().at("spec").text("serviceAccountName") == account
        && uid_of(Kind::of::<core::ServiceAccount>(), namespace, account).as_deref()
            == Some(spec.text("serviceAccountUID"));
    let same_node = uid_of(Kind::of::<core::Node>(), "", node).as_deref() == Some(spec.text("nodeUID"));
    match same_account && same_node {
        true => Ok(()),
        false => Err(format!("PodCertificateRequest for pod {pod:?} names another service account or node")),
    }
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
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use jiff::Timestamp;
    use minke_api::time;
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

    #[tokio::test]
    async fn a_node_asks_for_its_pods_and_a_signer_answers() {
        const REQUESTS: &str = "/apis/certificates.k8s.io/v1/namespaces/default/podcertificaterequests";
        let api = Api::new().await;
        let made = async |path: &str, body: Value| {
            api.json(&format!("POST {path}"), body).await.ok()["metadata"]["uid"].as_str().map(str::to_owned)
        };
        let namespace = "/api/v1/namespaces/default";
        let node = made("/api/v1/nodes", json!({"metadata": {"name": "n1"}})).await;
        let account =
            made(&format!("{namespace}/serviceaccounts"), json!({"metadata": {"name": "bot"}})).await;
        let pod = json!({"metadata": {"name": "web"}, "spec": {"nodeName": "n1", "serviceAccountName": "bot",
            "containers": [{"name": "c", "image": "i"}]}});
        let pod = made(&format!("{namespace}/pods"), pod).await;
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let stub = params.serialize_request(&key).expect("a request");
        let request = |change: (&str, &str)| {
            let mut spec = json!({"signerName": "example.com/ca", "podName": "web", "podUID": pod,
                "serviceAccountName": "bot", "serviceAccountUID": account, "nodeName": "n1", "nodeUID": node,
                "stubPKCS10Request": BASE64.encode(stub.der())});
            if !change.0.is_empty() {
                spec[change.0] = change.1.into();
            }
            json!({"metadata": {"generateName": "req-"}, "spec": spec})
        };
        let n1 = api.as_user(UserInfo::new("system:node:n1", &["system:nodes"]));
        let n2 = api.as_user(UserInfo::new("system:node:n2", &["system:nodes"]));
        let ask = async |api: &Api, change| api.json(&format!("POST {REQUESTS}"), request(change)).await;
        let refused = ask(&n2, ("", "")).await.error();
        assert!(refused.0 == 403 && refused.2.contains("not the requesting node \"n2\""), "{refused:?}");
        for change in [("podUID", "x"), ("podName", "other"), ("serviceAccountUID", "x"), ("nodeUID", "x")] {
            assert_eq!(ask(&n1, change).await.error().0, 403, "{change:?}");
        }
        let spoiled = ask(&n1, ("stubPKCS10Request", "AAAA")).await.error();
        assert!(spoiled.0 == 422 && spoiled.2.contains("must be a valid PKCS#10 CSR"), "{spoiled:?}");
        let asked = ask(&n1, ("", "")).await.ok();
        assert_eq!(asked["spec"]["maxExpirationSeconds"], 86_400);
        let name = asked["metadata"]["name"].as_str().expect("a name");
        let found =
            n1.json(&format!("GET {REQUESTS}?fieldSelector=spec.podName=web"), Value::Null).await.ok();
        assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{found}");

        // What the signer says must fit what was asked.
        let path = format!("PATCH {REQUESTS}/{name}/status");
        let issue = async |api: &Api, chain: String, hours: i64| {
            let from = Timestamp::from_second(1_800_000_000).expect("a time");
            let at = |minutes: i64| time::format_seconds(from + jiff::SignedDuration::from_mins(minutes));
            let status = json!({"conditions": [{"type": "Issued", "status": "True", "reason": "r",
                    "message": "", "lastTransitionTime": at(0)}], "certificateChain": chain,
                "notBefore": at(0), "beginRefreshAt": at(60), "notAfter": at(hours * 60)});
            api.json(&path, json!({ "status": status })).await
        };
        let certificate = |key: &rcgen::KeyPair, hours: i64| {
            let mut params = rcgen::CertificateParams::default();
            let from = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_800_000_000);
            params.not_before = from.into();
            params.not_after = (from + std::time::Duration::from_secs(hours as u64 * 3600)).into();
            params.self_signed(key).expect("a certificate").pem()
        };
        let other = rcgen::KeyPair::generate().expect("a key");
        let told = issue(&n1, certificate(&key, 12), 12).await.error();
        assert_eq!(told.0, 403, "{told:?}");
        for (chain, hours, why) in [
            (String::new(), 12, "at least one certificate"),
            (certificate(&other, 12), 12, "not issued to the requested public key"),
            (certificate(&key, 12), 13, "same value as in the leaf"),
            (certificate(&key, 48), 48, "lifetime must be in the range [3600, 86400]"),
        ] {
            let told = issue(&api, chain, hours).await.error();
            assert!(told.0 == 422 && told.2.contains(why), "{told:?}");
        }
        issue(&api, certificate(&key, 12), 12).await.ok();
        let again = issue(&api, certificate(&key, 13), 13).await.error();
        assert!(again.2.contains("immutable after PodCertificateRequest is issued"), "{again:?}");
    }
}
