//! Certificates of pods' own (`podCertificate` in projected volumes): a key is made here and never leaves the node,
//! a PodCertificateRequest asks a signer for the certificate, and another one follows before it runs out.
//!
//! What was asked is not kept: a new agent asks anew. Upstream: pkg/kubelet/podcertificate.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, pem};
use minke_client::{Client, Target};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, RsaKeySize};
use serde_json::json;

use crate::pod::Pod;

/// After this long, a request that is nowhere to be seen was deleted by somebody.
const GIVEN_UP: SignedDuration = SignedDuration::from_mins(10);
/// When a certificate that is still the old one is told of.
const OVERDUE: SignedDuration = SignedDuration::from_mins(10);
/// Requests of many pods are spread over this.
const JITTER_SECONDS: i64 = 300;
const NOT_YET: &str = "credential bundle is not issued yet";

/// A key and what was issued to it, each as PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    pub key: String,
    pub chain: String,
}

/// A request that was sent.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    name: String,
    key: String,
    at: Timestamp,
}

#[derive(Debug, Clone, PartialEq)]
struct Issued {
    credential: Credential,
    refresh_at: Timestamp,
    not_after: Timestamp,
    told_overdue: bool,
    told_expired: bool,
}

/// How far one source of one volume has come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Certificate {
    asked: Option<Asked>,
    issued: Option<Issued>,
    /// For good, and why.
    refused: Option<String>,
}

/// A warning about the pod: reason and message.
pub type Note = (&'static str, String);

impl Certificate {
    /// The error is why there is none to be mounted.
    pub fn credential(&self) -> Result<&Credential, String> {
        match (&self.refused, &self.issued) {
            (Some(why), _) => Err(why.clone()),
            (None, Some(issued)) => Ok(&issued.credential),
            (None, None) => Err(NOT_YET.to_owned()),
        }
    }

    /// Takes in what became of what was asked; true when a request is to be sent. `later` spreads the refresh.
    fn advance(
        &mut self,
        found: &[Arc<PodCertificateRequest>],
        now: Timestamp,
        later: SignedDuration,
        notes: &mut Vec<Note>,
    ) -> bool {
        if self.refused.is_some() {
            return false;
        }
        if let Some(asked) = self.asked.take() {
            let request = found.iter().find(|one| one.metadata.name.as_ref() == Some(&asked.name));
            match request {
                Some(request) if self.conclude(request, &asked, later, notes) => {}
                None if now > asked.at + GIVEN_UP => {}
                _ => self.asked = Some(asked),
            }
        }
        if self.refused.is_some() {
            return false;
        }
        let Some(issued) = &mut self.issued else { return self.asked.is_none() };
        if now > issued.refresh_at + OVERDUE && !issued.told_overdue {
            issued.told_overdue = true;
            notes.push(("CertificateOverdueForRefresh", "PodCertificate refresh overdue".to_owned()));
        }
        if now > issued.not_after && !issued.told_expired {
            issued.told_expired = true;
            notes.push(("CertificateExpired", "PodCertificate expired".to_owned()));
        }
        self.asked.is_none() && now >= issued.refresh_at
    }

    /// Whether the request has come to its end.
    fn conclude(
        &mut self,
        request: &PodCertificateRequest,
        asked: &Asked,
        later: SignedDuration,
        notes: &mut Vec<Note>,
    ) -> bool {
        let Some(status) = &request.status else { return false };
        for condition in status.conditions.iter().flatten() {
            let (reason, verb, word) = match condition.type_.as_str() {
                "Issued" => {
                    let chain = status.certificate_chain.as_deref().unwrap_or_default();
                    let (Some(refresh), Some(end)) = (&status.begin_refresh_at, &status.not_after) else {
                        continue;
                    };
                    self.issued = Some(Issued {
                        credential: Credential { key: asked.key.clone(), chain: clean(chain) },
                        refresh_at: refresh.0 + later,
                        not_after: end.0,
                        told_overdue: false,
                        told_expired: false,
                    });
                    return true;
                }
                "Denied" => ("Denied", "was denied", "denied"),
                "Failed" => ("Failed", "failed", "failed"),
                _ => continue,
            };
            let about = format!("reason={:?}", condition.reason);
            let message = &condition.message;
            let namespace = request.metadata.namespace.as_deref().unwrap_or_default();
            let name = &asked.name;
            notes.push((
                reason,
                format!("PodCertificateRequest {namespace}/{name} {verb}, {about}, message={message:?}"),
            ));
            self.refused =
                Some(format!("PodCertificateRequest was permanently {word}: {about} message={message:?}"));
            return true;
        }
        false
    }

    /// When to look again, if nothing happens to the request.
    fn due(&self) -> Option<Timestamp> {
        let issued = self.issued.as_ref().filter(|_| self.refused.is_none())?;
        let given_up = self.asked.as_ref().map(|asked| asked.at + GIVEN_UP);
        let overdue = (!issued.told_overdue).then_some(issued.refresh_at + OVERDUE);
        let expired = (!issued.told_expired).then_some(issued.not_after);
        match given_up {
            None => Some(issued.refresh_at),
            Some(_) => [given_up, overdue, expired].into_iter().flatten().min(),
        }
    }
}

/// Brings one certificate along, asking for it where that is due. Returns when to look again.
pub async fn keep(
    client: &dyn Client,
    node: &str,
    pod: &Pod,
    source: &core::PodCertificateProjection,
    found: &[Arc<PodCertificateRequest>],
    certificate: &mut Certificate,
    notes: &mut Vec<Note>,
) -> Result<Option<Timestamp>, String> {
    let now = Timestamp::now();
    let later = SignedDuration::from_secs(rand::random_range(0..JITTER_SECONDS));
    if certificate.advance(found, now, later, notes) {
        let what = if certificate.issued.is_some() { "refresh" } else { "initial" };
        match ask(client, node, pod, source, now).await {
            Ok(asked) => certificate.asked = Some(asked),
            // What there is stays good for a while, and it is asked for again.
            Err(why) if certificate.issued.is_some() => {
                tracing::warn!(pod = %pod.long_name(), why, "PodCertificateRequest not made");
                return Ok(Some(now + SignedDuration::from_mins(1)));
            }
            Err(why) => return Err(format!("while creating {what} PodCertificateRequest: {why}")),
        }
    }
    Ok(certificate.due())
}

async fn ask(
    client: &dyn Client,
    node: &str,
    pod: &Pod,
    source: &core::PodCertificateProjection,
    now: Timestamp,
) -> Result<Asked, String> {
    let account = pod.spec().service_account_name.as_deref().unwrap_or("default");
    let uid = async |kind, namespace, name| {
        let found = client.get(Target::object(kind, namespace, name)).await;
        found.map(|object| object.uid().to_owned()).map_err(|error| error.to_string())
    };
    let account_uid = uid(Kind::of::<core::ServiceAccount>(), pod.namespace(), account)
        .await
        .map_err(|why| format!("while fetching service account: {why}"))?;
    let node_uid = uid(Kind::of::<core::Node>(), "", node).await?;
    let key_type = source.key_type.clone();
    // A key of RSA takes a second or so.
    let made = tokio::task::spawn_blocking(move || make(&key_type)).await;
    let (key, request) = made.map_err(|error| error.to_string())??;
    let body = json!({
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "PodCertificateRequest",
        "metadata": {
            "generateName": "req-",
            "namespace": pod.namespace(),
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": pod.name(), "uid": pod.uid()}],
        },
        "spec": {
            "signerName": source.signer_name,
            "podName": pod.name(),
            "podUID": pod.uid(),
            "serviceAccountName": account,
            "serviceAccountUID": account_uid,
            "nodeName": node,
            "nodeUID": node_uid,
            "maxExpirationSeconds": source.max_expiration_seconds,
            "stubPKCS10Request": BASE64.encode(request),
            "unverifiedUserAnnotations": source.user_annotations,
        },
    });
    let collection = Target::collection(Kind::of::<PodCertificateRequest>(), pod.namespace());
    let sent = client.create(collection, body).await;
    let sent = sent.map_err(|error| format!("while creating on API: {error}"))?;
    Ok(Asked { name: sent.name().to_owned(), key, at: now })
}

/// A new key as PEM, and an empty request that proves that we have it as DER. Blocking.
fn make(key_type: &str) -> Result<(String, Vec<u8>), String> {
    let key = match key_type {
        "RSA3072" => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_3072),
        "RSA4096" => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_4096),
        "ECDSAP256" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256),
        "ECDSAP384" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384),
        "ECDSAP521" => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512),
        "ED25519" => KeyPair::generate_for(&rcgen::PKCS_ED25519),
        other => return Err(format!("while generating keypair: unknown key type {other:?}")),
    };
    let key = key.map_err(|error| format!("while generating keypair: {error}"))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&key).map_err(|error| error.to_string())?;
    Ok((pem::encode("PRIVATE KEY", key.serialized_der()), request.der().to_vec()))
}

/// The certificates, without what stands between them.
fn clean(chain: &str) -> String {
    pem::blocks(chain).map(|block| pem::encode(block.label, &block.bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes)
    }

    fn request(name: &str, status: Value) -> Vec<Arc<PodCertificateRequest>> {
        let value = json!({"metadata": {"name": name, "namespace": "ns"}, "status": status});
        vec![Arc::new(serde_json::from_value(value).expect("a request"))]
    }

    fn ended(kind: &str) -> Value {
        json!({"conditions": [{"type": kind, "status": "True", "reason": "R", "message": "m",
                               "lastTransitionTime": "1970-01-01T00:00:00Z"}]})
    }

    fn issued(chain: &str, refresh: i64, end: i64) -> Value {
        let mut status = ended("Issued");
        status["certificateChain"] = format!("junk\n{}", pem::encode("CERTIFICATE", chain.as_bytes())).into();
        (status["beginRefreshAt"], status["notAfter"]) =
            (json!(at(refresh).to_string()), json!(at(end).to_string()));
        status
    }

    fn asked(name: &str, minutes: i64) -> Option<Asked> {
        Some(Asked { name: name.to_owned(), key: format!("key of {name}"), at: at(minutes) })
    }

    #[test]
    fn a_certificate_is_asked_for_waited_for_and_renewed_in_time() {
        let mut one = Certificate::default();
        let mut notes = vec![];
        let step = |one: &mut Certificate, found: &[_], now: i64, notes: &mut Vec<Note>| {
            one.advance(found, at(now), SignedDuration::from_mins(2), notes)
        };
        assert!(step(&mut one, &[], 0, &mut notes), "nothing was asked");
        one.asked = asked("a", 0);
        assert!(
            !step(&mut one, &[], 5, &mut notes) && !step(&mut one, &request("a", json!({})), 60, &mut notes)
        );
        assert_eq!(one.credential(), Err(NOT_YET.to_owned()));
        assert!(step(&mut one, &[], 11, &mut notes), "somebody deleted the request");
        one.asked = asked("b", 11);
        let first = request("b", issued("first", 100, 200));
        assert!(!step(&mut one, &first, 12, &mut notes));
        let credential = |key: &str, chain: &str| Credential {
            key: key.to_owned(),
            chain: pem::encode("CERTIFICATE", chain.as_bytes()),
        };
        assert_eq!(one.credential(), Ok(&credential("key of b", "first")));
        assert_eq!((one.due(), step(&mut one, &first, 101, &mut notes)), (Some(at(102)), false));
        assert!(step(&mut one, &first, 102, &mut notes));
        one.asked = asked("c", 102);
        assert_eq!((one.due(), step(&mut one, &first, 104, &mut notes)), (Some(at(112)), false));
        assert_eq!(notes, []);
        let pending = request("c", json!({}));
        assert!(!step(&mut one, &pending, 113, &mut notes) && !step(&mut one, &pending, 201, &mut notes));
        assert!(!step(&mut one, &pending, 202, &mut notes));
        let told: Vec<_> = notes.drain(..).map(|(reason, _)| reason).collect();
        assert_eq!(told, ["CertificateOverdueForRefresh", "CertificateExpired"]);
        assert_eq!(one.credential(), Ok(&credential("key of b", "first")), "it is all there is");
        assert!(!step(&mut one, &request("c", issued("second", 300, 400)), 203, &mut notes));
        assert_eq!((one.credential(), notes), (Ok(&credential("key of c", "second")), vec![]));
        assert_eq!(one.due(), Some(at(302)));
    }

    #[test]
    fn a_refusal_is_for_good() {
        for (kind, word, verb) in [("Denied", "denied", "was denied"), ("Failed", "failed", "failed")] {
            let mut one = Certificate { asked: asked("a", 0), ..Certificate::default() };
            let mut notes = vec![];
            for now in [1, 1000] {
                assert!(!one.advance(&request("a", ended(kind)), at(now), SignedDuration::ZERO, &mut notes));
            }
            let why = format!("PodCertificateRequest was permanently {word}: reason=\"R\" message=\"m\"");
            assert_eq!((one.credential(), one.due()), (Err(why), None));
            let told = format!("PodCertificateRequest ns/a {verb}, reason=\"R\", message=\"m\"");
            assert_eq!(notes, [(kind, told)]);
        }
    }

    #[test]
    fn keys_of_every_type_are_made() {
        for key_type in ["ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519", "RSA3072"] {
            let (key, request) = make(key_type).expect("a key");
            assert!(key.starts_with("-----BEGIN PRIVATE KEY-----") && !request.is_empty(), "{key_type}");
        }
        assert!(make("DSA").is_err_and(|why| why.ends_with("unknown key type \"DSA\"")));
    }
}
