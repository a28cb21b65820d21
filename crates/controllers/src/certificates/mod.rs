//! Approves what nodes may ask for, signs what is approved, and clears away what is done.
//!
//! All of a request's life is one plan; waiting is a deadline. Requests for signers of others are left to them.
//! Upstream: pkg/controller/certificates (approver, signer, cleaner).

mod authority;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use authority::Wanted;
pub use authority::{Authority, AuthorityError};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use minke_api::{Kind, Status};
use minke_client::{Change, DeleteOptions, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds, until};
use crate::run::Controller;

const NODE_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const NODE_SERVING: &str = "kubernetes.io/kubelet-serving";
const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const LEGACY_UNKNOWN: &str = "kubernetes.io/legacy-unknown";
const NODES: &str = "system:nodes";

/// The longest that a certificate is good for, and the shortest.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
const LIFETIME_MIN: Duration = Duration::from_secs(600);
/// How long requests are kept that are decided, and that wait.
const KEEP_DONE: Duration = Duration::from_secs(3600);
const KEEP_WAITING: Duration = Duration::from_secs(24 * 3600);

/// What is to be done with a request.
#[derive(Debug, PartialEq)]
enum Step {
    Delete,
    /// To be approved if its author may create this subresource; then the message.
    Approve(&'static [(&'static str, &'static str)]),
    Sign(Wanted, Duration),
    /// It can never be signed, and why.
    Fail(String),
    Wait(Timestamp),
}

const AS_ITSELF: (&str, &str) =
    ("selfnodeclient", "Auto approving self kubelet client certificate after SubjectAccessReview.");
const AS_ANY: (&str, &str) =
    ("nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview.");

fn has(request: &CertificateSigningRequest, kind: &str) -> bool {
    conditions(request).any(|condition| condition.type_ == kind)
}

fn conditions(
    request: &CertificateSigningRequest,
) -> impl Iterator<Item = &CertificateSigningRequestCondition> {
    request.status.iter().flat_map(|status| status.conditions.iter().flatten())
}

fn certificate(request: &CertificateSigningRequest) -> Option<&[u8]> {
    let certificate = request.status.as_ref()?.certificate.as_ref()?;
    (!certificate.0.is_empty()).then_some(&certificate.0)
}

/// Decides. `signs` says whether we have a CA.
fn plan(request: &CertificateSigningRequest, created: Timestamp, signs: bool, now: Timestamp) -> Step {
    let end = keep_until(request, created);
    if end <= now {
        return Step::Delete;
    }
    let spec = &request.spec;
    let done = has(request, "Denied") || has(request, "Failed") || certificate(request).is_some();
    let ours = [NODE_CLIENT, NODE_SERVING, API_CLIENT, LEGACY_UNKNOWN].contains(&spec.signer_name.as_str());
    if done || !ours {
        return Step::Wait(end);
    }
    let wanted = Wanted::parse(&spec.request.0);
    if !has(request, "Approved") {
        let for_node = wanted
            .as_ref()
            .is_ok_and(|wanted| check(spec.signer_name.as_str(), wanted, usages(spec)).is_ok());
        return match wanted {
            Ok(wanted) if spec.signer_name == NODE_CLIENT && for_node => {
                let itself = spec.username.as_deref() == Some(&wanted.common_name);
                Step::Approve(if itself { &[AS_ITSELF, AS_ANY] } else { &[AS_ANY] })
            }
            _ => Step::Wait(end),
        };
    }
    if !signs {
        return Step::Wait(end);
    }
    match wanted.and_then(|wanted| check(&spec.signer_name, &wanted, usages(spec)).map(|()| wanted)) {
        Ok(wanted) => {
            let asked = spec.expiration_seconds.map(|seconds| Duration::from_secs(seconds.max(0) as u64));
            Step::Sign(wanted, asked.map_or(LIFETIME, |asked| asked.clamp(LIFETIME_MIN, LIFETIME)))
        }
        Err(why) => Step::Fail(why),
    }
}

fn usages(spec: &k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec) -> &[String] {
    spec.usages.as_deref().unwrap_or_default()
}

/// Whether the signer gives such certificates; else why not.
fn check(signer: &str, wanted: &Wanted, usages: &[String]) -> Result<(), String> {
    let only = |allowed: &[&str]| usages.iter().all(|usage| allowed.contains(&usage.as_str()));
    let with = |usage: &str| usages.iter().any(|one| one == usage);
    let fail = |condition: bool, why: &str| if condition { Err(why.to_owned()) } else { Ok(()) };
    let of_node = || {
        fail(wanted.organizations != [NODES], "subject organization is not system:nodes")?;
        fail(
            !wanted.common_name.starts_with("system:node:"),
            "subject common name does not begin with system:node: ",
        )
    };
    match signer {
        NODE_CLIENT => {
            of_node()?;
            fail(!wanted.names.is_empty(), "DNS subjectAltNames are not allowed")?;
            fail(wanted.emails > 0, "Email subjectAltNames are not allowed")?;
            fail(wanted.addresses > 0, "IP subjectAltNames are not allowed")?;
            fail(wanted.uris > 0, "URI subjectAltNames are not allowed")?;
            let good = only(&["key encipherment", "digital signature", "client auth"])
                && with("client auth")
                && with("digital signature");
            fail(
                !good,
                "usages did not match [digital signature client auth] or [key encipherment digital signature client auth]",
            )
        }
        NODE_SERVING => {
            of_node()?;
            let nameless = wanted.names.is_empty() && wanted.addresses == 0;
            fail(nameless, "at least one DNS or IP subjectAltName is required")?;
            fail(wanted.emails > 0, "Email subjectAltNames are not allowed")?;
            fail(wanted.uris > 0, "URI subjectAltNames are not allowed")?;
            let good = only(&["key encipherment", "digital signature", "server auth"])
                && with("server auth")
                && with("digital signature");
            fail(
                !good,
                "usages did not match [digital signature server auth] or [key encipherment digital signature server auth]",
            )
        }
        API_CLIENT => {
            let good = only(&["digital signature", "key encipherment", "client auth"]) && with("client auth");
            fail(!good, "usages did not match [digital signature key encipherment client auth]")
        }
        _ => Ok(()),
    }
}

/// When nobody needs the request any more.
fn keep_until(request: &CertificateSigningRequest, created: Timestamp) -> Timestamp {
    let decided = conditions(request)
        .filter(|condition| ["Approved", "Denied", "Failed"].contains(&condition.type_.as_str()))
        .filter_map(|condition| condition.last_update_time.as_ref().map(|time| time.0))
        .max();
    let refused = has(request, "Denied") || has(request, "Failed");
    let end = match (decided, certificate(request)) {
        (Some(at), Some(_)) => later(at, KEEP_DONE),
        (Some(at), None) if refused => later(at, KEEP_DONE),
        (Some(at), None) => later(at, KEEP_WAITING),
        (None, _) => later(created, KEEP_WAITING),
    };
    certificate(request).and_then(expiry).map_or(end, |expiry| expiry.min(end))
}

fn later(at: Timestamp, by: Duration) -> Timestamp {
    at.saturating_add(by).unwrap_or(at)
}

fn expiry(certificate: &[u8]) -> Option<Timestamp> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate).ok()?;
    let not_after = pem.parse_x509().ok()?.validity().not_after.timestamp();
    Timestamp::from_second(not_after).ok()
}

pub(crate) struct Certificates {
    pub authority: Option<Arc<Authority>>,
}

#[async_trait]
impl Controller for Certificates {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<CertificateSigningRequest>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        change.new.iter().map(|request| Item::of(request)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(request) = ctx.get::<CertificateSigningRequest>(&item.key) else {
            return Ok(Requeue::Never);
        };
        let (now, object) = (ctx.now(), &request.object);
        let created = object.created().unwrap_or(now);
        match plan(&request, created, self.authority.is_some(), now) {
            Step::Wait(at) => return Ok(Requeue::After(until(at, now))),
            Step::Delete => ctx.delete(object, DeleteOptions::default()).await?,
            Step::Approve(ways) => {
                for (subresource, message) in ways {
                    if may(ctx, &request, subresource).await? {
                        decide(ctx, &request, "approval", "Approved", "AutoApproved", message).await?;
                        return Ok(Requeue::Never);
                    }
                }
                return Ok(Requeue::After(until(keep_until(&request, created), now)));
            }
            Step::Sign(wanted, lifetime) => {
                let authority = self.authority.as_ref().expect("the plan signs only with a CA");
                match authority.sign(&wanted, usages(&request.spec), lifetime, now) {
                    Ok(pem) => {
                        let mut body = object.value();
                        body["status"]["certificate"] = BASE64.encode(pem).into();
                        ctx.update(Target::of(object).sub("status"), body).await?;
                    }
                    Err(why) => fail(ctx, &request, &why.to_string()).await?,
                }
            }
            Step::Fail(why) => fail(ctx, &request, &why).await?,
        }
        Ok(Requeue::Never)
    }
}

async fn fail(ctx: &Ctx, request: &Typed<CertificateSigningRequest>, why: &str) -> Result<(), Status> {
    decide(ctx, request, "status", "Failed", "SignerValidationFailure", why).await
}

async fn decide(
    ctx: &Ctx,
    request: &Typed<CertificateSigningRequest>,
    subresource: &str,
    kind: &str,
    reason: &str,
    message: &str,
) -> Result<(), Status> {
    let mut body = request.object.value();
    let mut all: Vec<_> = conditions(request).map(|condition| json!(condition)).collect();
    let now = seconds(ctx.now());
    all.push(json!({
        "type": kind, "status": "True", "reason": reason, "message": message,
        "lastUpdateTime": now, "lastTransitionTime": now,
    }));
    body["status"]["conditions"] = json!(all);
    ctx.update(Target::of(&request.object).sub(subresource), body).await.map(drop)
}

/// Whether the author of the request may create this subresource of requests.
async fn may(
    ctx: &Ctx,
    request: &Typed<CertificateSigningRequest>,
    subresource: &str,
) -> Result<bool, Status> {
    let spec = &request.spec;
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": spec.username, "uid": spec.uid, "groups": spec.groups, "extra": spec.extra,
            "resourceAttributes": {
                "group": "certificates.k8s.io", "resource": "certificatesigningrequests",
                "subresource": subresource, "verb": "create", "version": "*",
            },
        },
    });
    let target = Target::collection(Kind::of::<SubjectAccessReview>(), "");
    let answer = ctx.client.post(target, review).await?;
    Ok(answer["status"]["allowed"] == true)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::authority::tests::request as pem;
    use super::*;
    use crate::pods::tests::{NOW, now, time};

    fn request(
        signer: &str,
        pem: &str,
        usages: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> CertificateSigningRequest {
        let mut value = json!({
            "metadata": { "name": "x" },
            "spec": { "signerName": signer, "request": BASE64.encode(pem), "usages": usages, "username": "system:node:n1" },
            "status": {},
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn text(step: Step) -> String {
        match step {
            Step::Delete => "delete".to_owned(),
            Step::Approve(ways) => {
                let ways: Vec<_> = ways.iter().map(|(way, _)| *way).collect();
                format!("approve {}", ways.join(" "))
            }
            Step::Sign(wanted, lifetime) => format!("sign {} {}", wanted.common_name, lifetime.as_secs()),
            Step::Fail(why) => format!("fail {why}"),
            Step::Wait(at) => format!("wait {}", at.as_second() - NOW),
        }
    }

    #[track_caller]
    fn check(request: &CertificateSigningRequest, want: &str) {
        assert_eq!(text(plan(request, now(), true, now())), want);
    }

    fn decided(kind: &str, ago: i64) -> Value {
        json!({"type": kind, "status": "True", "lastUpdateTime": time(ago)})
    }

    const CLIENT: [&str; 2] = ["digital signature", "client auth"];
    const SERVER: [&str; 2] = ["digital signature", "server auth"];

    #[test]
    fn nodes_get_their_client_certificates_without_asking_anyone() {
        let node = pem("system:node:n1", NODES, &[]);
        check(&request(NODE_CLIENT, &node, &CLIENT, |_| {}), "approve selfnodeclient nodeclient");
        let other = |r: &mut Value| r["spec"]["username"] = "system:bootstrap:x".into();
        check(&request(NODE_CLIENT, &node, &CLIENT, other), "approve nodeclient");
        check(&request(NODE_CLIENT, &node, &["any"], |_| {}), "wait 86400");
        let named = pem("system:node:n1", NODES, &["a.example"]);
        check(&request(NODE_CLIENT, &named, &CLIENT, |_| {}), "wait 86400");
        check(&request(NODE_SERVING, &named, &SERVER, |_| {}), "wait 86400");
        check(&request(API_CLIENT, &pem("jane", "", &[]), &CLIENT, |_| {}), "wait 86400");
    }

    #[test]
    fn what_is_approved_is_signed_if_the_signer_gives_such_certificates() {
        let approved = |r: &mut Value| r["status"] = json!({"conditions": [decided("Approved", 1)]});
        let jane = pem("jane", "dev", &[]);
        check(&request(API_CLIENT, &jane, &CLIENT, approved), "sign jane 31536000");
        check(
            &request(API_CLIENT, &jane, &SERVER, approved),
            "fail usages did not match [digital signature key encipherment client auth]",
        );
        for (seconds, want) in [(600, 600), (7200, 7200), (99_999_999, 31_536_000)] {
            let asked = |r: &mut Value| {
                approved(r);
                r["spec"]["expirationSeconds"] = seconds.into();
            };
            check(&request(API_CLIENT, &jane, &CLIENT, asked), &format!("sign jane {want}"));
        }
        let node = pem("system:node:n1", NODES, &["a.example"]);
        check(&request(NODE_SERVING, &node, &SERVER, approved), "sign system:node:n1 31536000");
        let nameless = pem("system:node:n1", NODES, &[]);
        check(
            &request(NODE_SERVING, &nameless, &SERVER, approved),
            "fail at least one DNS or IP subjectAltName is required",
        );
        check(
            &request(NODE_SERVING, &jane, &SERVER, approved),
            "fail subject organization is not system:nodes",
        );
        check(&request("example.com/own", &jane, &CLIENT, approved), "wait 86399");
        assert_eq!(
            text(plan(&request(API_CLIENT, &jane, &CLIENT, approved), now(), false, now())),
            "wait 86399",
            "without a CA somebody else signs"
        );
    }

    #[test]
    fn what_is_done_goes_after_a_while() {
        let jane = pem("jane", "", &[]);
        let at = |kind: &'static str, ago: i64, certificate: Value| {
            request("example.com/own", &jane, &CLIENT, move |r| {
                r["status"] = json!({"conditions": [decided(kind, ago)], "certificate": certificate});
            })
        };
        check(&at("Denied", 3599, Value::Null), "wait 1");
        check(&at("Denied", 3600, Value::Null), "delete");
        check(&at("Failed", 3600, Value::Null), "delete");
        check(&at("Approved", 3600, Value::Null), "wait 82800");
        check(&at("Approved", 86_400, Value::Null), "delete");
        check(&at("Approved", 3600, "eA==".into()), "delete");
        let pending = request(API_CLIENT, &jane, &CLIENT, |_| {});
        let old = Timestamp::from_second(NOW - 86_400).unwrap();
        assert_eq!(plan(&pending, old, true, now()), Step::Delete);
    }
}
