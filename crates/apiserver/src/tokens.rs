//! Service account tokens: issued on request, bound to objects, and valid only while those exist.
//!
//! JWTs signed with ES256 that carry upstream's claims. Upstream: pkg/serviceaccount and the TokenRequest
//! storage. Also the OpenID discovery documents, by which others can verify them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use k8s_openapi::api::core::v1 as core;
use minke_api::{FieldErrors, Kind, Object, Status};
use rcgen::PublicKeyData;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{Snapshots, UserInfo, token_secrets};

/// Clocks of those who check a token may be this far off, in seconds.
const LEEWAY_SECONDS: i64 = 60;
/// A pod's token asked for with this lifetime really lives a year, so that programs that never read the
/// file again go on working; `warnafter` says when they should have.
const POD_TOKEN_SECONDS: i64 = 3607;
const YEAR_SECONDS: i64 = 365 * 24 * 60 * 60;
/// Tokens whose signature was checked are remembered up to this many.
const CACHED_TOKENS: usize = 4096;
/// No token of ours is longer; what is longer is not looked at.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// Why a token is no good. The caller sees only `401 Unauthorized`; TokenReview shows the text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenError(String);

pub fn bad(why: impl Into<String>) -> TokenError {
    TokenError(why.into())
}

/// Issues and verifies tokens.
pub struct Tokens {
    issuer: String,
    /// Audiences of this API server.
    audiences: Vec<String>,
    key_id: String,
    signing: EncodingKey,
    verifying: DecodingKey,
    jwk: Value,
    /// Claims of tokens whose signature is known to be good, by hash. Their objects are checked each time.
    known: Mutex<HashMap<[u8; 32], Arc<Claims>>>,
}

/// Whose token it is, and the audiences asked for that it is good for.
#[derive(Debug)]
pub struct Verified {
    pub user: UserInfo,
    pub audiences: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    aud: Audiences,
    exp: i64,
    iat: i64,
    iss: String,
    #[serde(default)]
    jti: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Private,
    nbf: i64,
    sub: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Audiences {
    Many(Vec<String>),
    One(String),
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Private {
    namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Bound>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Bound>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<Bound>,
    serviceaccount: Bound,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    warnafter: Option<i64>,
}

#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Bound {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    uid: String,
}

impl Bound {
    fn to(object: &Object) -> Bound {
        Bound { name: object.name().to_owned(), uid: object.uid().to_owned() }
    }
}

impl Tokens {
    /// `key_pem` is a P-256 private key in PKCS#8. The first of `audiences` is what tokens get when
    /// nobody asks for another.
    pub fn new(key_pem: &str, issuer: &str, audiences: Vec<String>) -> Result<Tokens, TokenError> {
        let key = rcgen::KeyPair::from_pem(key_pem).map_err(|error| bad(format!("signing key: {error}")))?;
        let point = key.public_key_raw();
        if point.len() != 65 || point[0] != 4 {
            return Err(bad("signing key: not a P-256 key"));
        }
        let (x, y) = (URL_SAFE_NO_PAD.encode(&point[1..33]), URL_SAFE_NO_PAD.encode(&point[33..]));
        let key_id = URL_SAFE_NO_PAD.encode(Sha256::digest(key.subject_public_key_info()));
        let failed = |error| bad(format!("signing key: {error}"));
        Ok(Tokens {
            issuer: issuer.to_owned(),
            audiences,
            signing: EncodingKey::from_ec_pem(key_pem.as_bytes()).map_err(failed)?,
            verifying: DecodingKey::from_ec_components(&x, &y).map_err(failed)?,
            jwk: json!({"use": "sig", "kty": "EC", "kid": key_id, "crv": "P-256", "alg": "ES256", "x": x, "y": y}),
            key_id,
            known: Mutex::default(),
        })
    }

    /// Answers a TokenRequest for a service account: the request with its status.
    pub fn issue(
        &self,
        snapshots: &dyn Snapshots,
        namespace: &str,
        name: &str,
        mut request: Value,
        now: Timestamp,
    ) -> Result<Value, Status> {
        let account_kind = Kind::of::<core::ServiceAccount>();
        let account = snapshots
            .get(account_kind, namespace, name)
            .ok_or_else(|| Status::not_found(account_kind, name))?;
        if !request.is_object() {
            request = json!({});
        }
        let spec = request.pointer("/spec").cloned().unwrap_or_default();
        let seconds =
            spec.get("expirationSeconds").and_then(Value::as_i64).filter(|s| *s != 0).unwrap_or(3600);
        check_lifetime(seconds)?;
        let asked: Vec<String> = spec
            .get("audiences")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            .unwrap_or_default();
        let audiences = if asked.is_empty() { self.audiences.clone() } else { asked };
        let mut private = Private {
            namespace: namespace.to_owned(),
            serviceaccount: Bound::to(&account),
            ..Private::default()
        };
        if let Some(reference) = spec.get("boundObjectRef").filter(|reference| reference.is_object()) {
            bind(snapshots, namespace, name, reference, &mut private)?;
        }
        let now_seconds = now.as_second();
        let mut lifetime = seconds;
        let for_us_alone = audiences.iter().all(|audience| self.audiences.contains(audience));
        if seconds == POD_TOKEN_SECONDS && private.pod.is_some() && for_us_alone {
            lifetime = YEAR_SECONDS;
            private.warnafter = Some(now_seconds + POD_TOKEN_SECONDS);
        }
        let claims = Claims {
            aud: Audiences::Many(audiences.clone()),
            exp: now_seconds + lifetime,
            iat: now_seconds,
            iss: self.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            kubernetes: private,
            nbf: now_seconds,
            sub: format!("system:serviceaccount:{namespace}:{name}"),
        };
        let token = self.sign(&claims).map_err(Status::internal)?;
        let expires = Timestamp::from_second(now_seconds + seconds).map_err(Status::internal)?;
        request["apiVersion"] = "authentication.k8s.io/v1".into();
        request["kind"] = "TokenRequest".into();
        request["metadata"] = json!({
            "name": name, "namespace": namespace,
            "creationTimestamp": minke_api::time::format_seconds(now),
        });
        request["spec"]["audiences"] = audiences.into();
        request["spec"]["expirationSeconds"] = seconds.into();
        request["status"] =
            json!({"token": token, "expirationTimestamp": minke_api::time::format_seconds(expires)});
        Ok(request)
    }

    /// A token with these claims.
    pub fn sign(&self, claims: &impl Serialize) -> Result<String, TokenError> {
        let header =
            Header { alg: Algorithm::ES256, typ: None, kid: Some(self.key_id.clone()), ..Header::default() };
        jsonwebtoken::encode(&header, claims, &self.signing).map_err(|error| bad(error.to_string()))
    }

    /// The claims of a token of a Secret, if it is one and we signed it.
    fn claims_of_secret(&self, token: &str) -> Option<Value> {
        let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
        let unverified: Value = serde_json::from_slice(&payload).ok()?;
        if token.len() > MAX_TOKEN_BYTES || unverified["iss"] != token_secrets::ISSUER {
            return None;
        }
        let mut rules = Validation::new(Algorithm::ES256);
        rules.validate_exp = false;
        rules.validate_aud = false;
        rules.required_spec_claims.clear();
        Some(jsonwebtoken::decode::<Value>(token, &self.verifying, &rules).ok()?.claims)
    }

    /// Checks signature, time, audience and that everything the token is bound to is still there.
    /// `audiences` are those that the asker accepts; empty means this API server's.
    pub fn verify(
        &self,
        snapshots: &dyn Snapshots,
        token: &str,
        audiences: &[String],
        now: Timestamp,
    ) -> Result<Verified, TokenError> {
        let accepted = if audiences.is_empty() { &self.audiences } else { audiences };
        if let Some(claims) = self.claims_of_secret(token) {
            let user = token_secrets::user_of(snapshots, token, &claims)?;
            let shared: Vec<String> =
                self.audiences.iter().filter(|a| accepted.contains(a)).cloned().collect();
            let none = || bad(format!("token is invalid for the target audiences {accepted:?}"));
            return if shared.is_empty() { Err(none()) } else { Ok(Verified { user, audiences: shared }) };
        }
        let claims = self.claims(token)?;
        let now = now.as_second();
        if now > claims.exp + LEEWAY_SECONDS {
            return Err(bad("service account token has expired"));
        }
        if now < claims.nbf - LEEWAY_SECONDS {
            return Err(bad("service account token is not valid yet"));
        }
        let own = match &claims.aud {
            Audiences::Many(own) => own.as_slice(),
            Audiences::One(own) => std::slice::from_ref(own),
        };
        let shared: Vec<String> = own.iter().filter(|a| accepted.contains(a)).cloned().collect();
        if shared.is_empty() {
            return Err(bad(format!(
                "token audiences {own:?} is invalid for the target audiences {accepted:?}"
            )));
        }
        let user = user_of(snapshots, &claims, now)?;
        Ok(Verified { user, audiences: shared })
    }

    /// The claims of a token that we signed.
    fn claims(&self, token: &str) -> Result<Arc<Claims>, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(bad("token is too long"));
        }
        let hash: [u8; 32] = Sha256::digest(token).into();
        if let Some(claims) = self.known.lock().expect("no one panics with the lock").get(&hash) {
            return Ok(claims.clone());
        }
        let mut rules = Validation::new(Algorithm::ES256);
        // Time and audience are checked by us, against the clock and the audience we are given.
        rules.validate_exp = false;
        rules.validate_aud = false;
        rules.required_spec_claims.clear();
        rules.set_issuer(&[&self.issuer]);
        let claims = jsonwebtoken::decode::<Claims>(token, &self.verifying, &rules)
            .map_err(|error| bad(format!("invalid bearer token: {error}")))?
            .claims;
        let claims = Arc::new(claims);
        let mut known = self.known.lock().expect("no one panics with the lock");
        if known.len() >= CACHED_TOKENS {
            known.clear();
        }
        known.insert(hash, claims.clone());
        Ok(claims)
    }

    /// The document at `/.well-known/openid-configuration`. `jwks_uri` is where [`Tokens::jwks`] is served.
    pub fn openid_configuration(&self, jwks_uri: &str) -> Value {
        json!({
            "issuer": self.issuer,
            "jwks_uri": jwks_uri,
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        })
    }

    /// The public key, as a JSON Web Key Set.
    pub fn jwks(&self) -> Value {
        json!({"keys": [self.jwk]})
    }
}

fn check_lifetime(seconds: i64) -> Result<(), Status> {
    let why = match seconds {
        ..600 => "may not specify a duration less than 10 minutes",
        4_294_967_297.. => "may not specify a duration larger than 2^32 seconds",
        _ => return Ok(()),
    };
    let mut errors = FieldErrors::default();
    errors.invalid("spec.expirationSeconds", seconds, why);
    // TokenRequest is no resource of its own, so it has no row: its sibling lends its group.
    let sibling = Kind::by_kind("authentication.k8s.io", "v1", "TokenReview").expect("a built-in kind");
    errors.into_result(sibling, "").map_err(|mut status| {
        status.message = status.message.replacen(sibling.kind, "TokenRequest", 1);
        if let Some(details) = &mut status.details {
            details.kind = "TokenRequest".to_owned();
        }
        status
    })
}

/// Binds the token to the object that the request refers to.
fn bind(
    snapshots: &dyn Snapshots,
    namespace: &str,
    account: &str,
    reference: &Value,
    private: &mut Private,
) -> Result<(), Status> {
    let text = |field: &str| reference.get(field).and_then(Value::as_str).unwrap_or_default();
    let (kind, name, uid) = (text("kind"), text("name"), text("uid"));
    let find = |kind: &'static Kind, namespace: &str| {
        let object = snapshots.get(kind, namespace, name).ok_or_else(|| Status::not_found(kind, name))?;
        if !uid.is_empty() && uid != object.uid() {
            let why = format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might \
                 have been deleted and then recreated"
            );
            return Err(Status::conflict(kind, name, &why));
        }
        Ok(object)
    };
    match kind {
        "Pod" => {
            let object = find(Kind::of::<core::Pod>(), namespace)?;
            if object.field("spec.serviceAccountName").unwrap_or_default() != account {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
                )));
            }
            private.pod = Some(Bound::to(&object));
            let node = object.field("spec.nodeName").unwrap_or_default();
            if !node.is_empty() {
                // The node may not be registered (yet): then its name is all there is to say.
                private.node = Some(match snapshots.get(Kind::of::<core::Node>(), "", node) {
                    Some(node) => Bound::to(&node),
                    None => Bound { name: node.to_owned(), uid: String::new() },
                });
            }
        }
        "Secret" => private.secret = Some(Bound::to(&*find(Kind::of::<core::Secret>(), namespace)?)),
        "Node" => private.node = Some(Bound::to(&*find(Kind::of::<core::Node>(), "")?)),
        _ => {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {account:?} to object of type {kind:?}"
            )));
        }
    }
    Ok(())
}

/// The identity in the claims, if all that they are bound to is alive.
fn user_of(snapshots: &dyn Snapshots, claims: &Claims, now: i64) -> Result<UserInfo, TokenError> {
    let private = &claims.kubernetes;
    let (namespace, name) = (&private.namespace, &private.serviceaccount.name);
    if claims.sub != format!("system:serviceaccount:{namespace}:{name}") {
        return Err(bad("token subject and service account differ"));
    }
    // What is being deleted counts as there for as long as clocks may be off.
    let alive = |kind: &'static Kind, namespace: &str, bound: &Bound| {
        snapshots
            .get(kind, namespace, &bound.name)
            .filter(|object| object.uid() == bound.uid)
            .filter(|object| object.deleted().is_none_or(|at| now <= at.as_second() + LEEWAY_SECONDS))
    };
    if alive(Kind::of::<core::ServiceAccount>(), namespace, &private.serviceaccount).is_none() {
        return Err(bad(format!("service account {namespace}/{name} has been deleted")));
    }
    let mut user = UserInfo::service_account(namespace, name);
    user.uid = private.serviceaccount.uid.clone();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut note = |what: &str, value: &str| {
        if !value.is_empty() {
            extra.insert(format!("authentication.kubernetes.io/{what}"), vec![value.to_owned()]);
        }
    };
    if !claims.jti.is_empty() {
        note("credential-id", &format!("JTI={}", claims.jti));
    }
    if let Some(secret) = &private.secret
        && alive(Kind::of::<core::Secret>(), namespace, secret).is_none()
    {
        return Err(bad("service account token has been invalidated"));
    }
    if let Some(pod) = &private.pod {
        if alive(Kind::of::<core::Pod>(), namespace, pod).is_none() {
            return Err(bad("service account token has been invalidated"));
        }
        note("pod-name", &pod.name);
        note("pod-uid", &pod.uid);
    }
    if let Some(node) = &private.node {
        // A token of a pod merely mentions the node; one of a node stands and falls with it.
        if private.pod.is_none() && alive(Kind::of::<core::Node>(), "", node).is_none() {
            return Err(bad("service account token has been invalidated"));
        }
        note("node-name", &node.name);
        note("node-uid", &node.uid);
    }
    user.extra = extra;
    Ok(user)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::snapshots::fake::Cluster;

    const AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";

    pub fn tokens() -> Tokens {
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        Tokens::new(&key, AUDIENCE, vec![AUDIENCE.to_owned()]).unwrap()
    }

    pub fn cluster() -> Arc<Cluster> {
        Cluster::with([
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "bot", "namespace": "a", "uid": "sa1"}}),
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "uid": "node1"}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "a", "uid": "pod1"},
                "spec": {"serviceAccountName": "bot", "nodeName": "n1"}}),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other", "namespace": "a", "uid": "pod2"},
                "spec": {"serviceAccountName": "default"}}),
        ])
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn token_of(answer: &Value) -> &str {
        answer["status"]["token"].as_str().unwrap()
    }

    #[test]
    fn a_token_names_its_account() {
        let (tokens, cluster) = (tokens(), cluster());
        let answer = tokens.issue(&*cluster, "a", "bot", json!({}), at(0)).unwrap();
        assert_eq!(answer["spec"]["expirationSeconds"], 3600);
        assert_eq!(answer["status"]["expirationTimestamp"], "2027-01-15T09:00:00Z");
        let verified = tokens.verify(&*cluster, token_of(&answer), &[], at(3600)).unwrap();
        assert_eq!(verified.user.name, "system:serviceaccount:a:bot");
        assert_eq!(verified.user.uid, "sa1");
        assert!(verified.user.groups.contains(&"system:serviceaccounts:a".to_owned()));
        assert_eq!(verified.audiences, [AUDIENCE]);
    }

    #[test]
    fn a_pods_token_lives_a_year_but_not_longer_than_the_pod() {
        let (tokens, cluster) = (tokens(), cluster());
        let request = json!({"spec": {"expirationSeconds": 3607,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "pod1"}}});
        let answer = tokens.issue(&*cluster, "a", "bot", request, at(0)).unwrap();
        let user = tokens.verify(&*cluster, token_of(&answer), &[], at(300 * 24 * 3600)).unwrap().user;
        assert_eq!(user.extra["authentication.kubernetes.io/pod-name"], ["web"]);
        assert_eq!(user.extra["authentication.kubernetes.io/node-uid"], ["node1"]);
        cluster.remove(Kind::of::<core::Pod>(), "a", "web");
        assert!(tokens.verify(&*cluster, token_of(&answer), &[], at(1)).is_err());
    }

    #[track_caller]
    fn check_refused(token: &str, tokens: &Tokens, second: i64, audiences: &[&str], want: &str) {
        let audiences: Vec<String> = audiences.iter().map(|a| (*a).to_owned()).collect();
        let error = tokens.verify(&*cluster(), token, &audiences, at(second)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }

    #[test]
    fn bad_tokens_are_refused() {
        let ours = tokens();
        let answer = ours.issue(&*cluster(), "a", "bot", json!({}), at(0)).unwrap();
        let token = token_of(&answer);
        check_refused(token, &ours, 3661, &[], "expired");
        check_refused(token, &ours, -61, &[], "not valid yet");
        check_refused(token, &ours, 0, &["vault"], "audiences");
        check_refused(token, &tokens(), 0, &[], "InvalidSignature");
        check_refused(&token[..token.len() - 4], &ours, 0, &[], "invalid bearer token");
        check_refused("x", &ours, 0, &[], "invalid bearer token");
        let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", token.split('.').nth(1).unwrap());
        check_refused(&unsigned, &ours, 0, &[], "invalid bearer token");
        let recreated = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "bot", "namespace": "a", "uid": "sa2"}});
        let later = cluster();
        later.put(recreated);
        assert!(ours.verify(&*later, token, &[], at(0)).is_err());
    }

    #[track_caller]
    fn check_request(name: &str, spec: Value, code: u16, want: &str) {
        let status = tokens().issue(&*cluster(), "a", name, json!({"spec": spec}), at(0)).unwrap_err();
        assert_eq!((status.code, status.message.as_str()), (code, want));
    }

    #[test]
    fn bad_requests_are_refused() {
        check_request("none", json!({}), 404, "serviceaccounts \"none\" not found");
        check_request(
            "bot",
            json!({"expirationSeconds": 60}),
            422,
            "TokenRequest.authentication.k8s.io \"\" is invalid: spec.expirationSeconds: Invalid value: 60: may not specify a duration less than 10 minutes",
        );
        check_request(
            "bot",
            json!({"boundObjectRef": {"kind": "Pod", "name": "other"}}),
            400,
            "cannot bind token for serviceaccount \"bot\" to pod running with different serviceaccount name.",
        );
        check_request(
            "bot",
            json!({"boundObjectRef": {"kind": "Pod", "name": "gone"}}),
            404,
            "pods \"gone\" not found",
        );
        let status = tokens()
            .issue(
                &*cluster(),
                "a",
                "bot",
                json!({"spec": {"boundObjectRef": {"kind": "Pod", "name": "web", "uid": "x"}}}),
                at(0),
            )
            .unwrap_err();
        assert_eq!(status.code, 409);
    }

    #[test]
    fn discovery_tells_the_key() {
        let tokens = tokens();
        assert_eq!(tokens.jwks()["keys"][0]["kid"], tokens.key_id.as_str());
        assert_eq!(tokens.openid_configuration("https://x/openid/v1/jwks")["issuer"], AUDIENCE);
    }
}
