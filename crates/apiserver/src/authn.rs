//! Authentication: who sends a request. Client certificates, service account tokens, anonymous; and
//! impersonation, by which one user may act as another.
//!
//! Upstream: apiserver pkg/authentication/request/{x509,bearertoken,union} and the impersonation filter.

use std::fmt;
use std::sync::Arc;

use http::HeaderMap;
use jiff::Timestamp;
use minke_api::Status;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::authz::Authorizer;
use crate::tokens::{TokenError, Tokens};
use crate::{Attributes, Snapshots, UserInfo};

const AUTHENTICATED: &str = "system:authenticated";
const UNAUTHENTICATED: &str = "system:unauthenticated";
/// The user's uid, when a certificate carries one.
const UID_OID: &str = "1.3.6.1.4.1.57683.2";

/// Tells who sends a request.
pub struct Authenticator {
    certificates: Arc<dyn ClientCertVerifier>,
    tokens: Arc<Tokens>,
    snapshots: Arc<dyn Snapshots>,
}

impl Authenticator {
    /// `client_ca` are the certificates that sign those of clients.
    pub fn new(
        client_ca: &[CertificateDer<'_>],
        tokens: Arc<Tokens>,
        snapshots: Arc<dyn Snapshots>,
    ) -> Result<Authenticator, rustls::Error> {
        let mut roots = RootCertStore::empty();
        for certificate in client_ca {
            roots.add(certificate.clone().into_owned())?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let certificates = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Authenticator { certificates, tokens, snapshots })
    }

    /// What the TLS listener asks of clients: a certificate if they have one, any one. Whether it is good
    /// is for [`Authenticator::identify`], so that a bad one gets `401` rather than a broken connection.
    pub fn tls_verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::new(AnyCertificate(self.certificates.clone()))
    }

    /// The identity in a client's certificates, leaf first. Once per connection.
    pub fn identify(&self, chain: &[CertificateDer<'_>]) -> Result<UserInfo, Status> {
        let refuse = |error: &dyn fmt::Display| {
            tracing::debug!(%error, "Refused a client certificate");
            Status::unauthorized()
        };
        let (leaf, intermediates) = chain.split_first().ok_or_else(Status::unauthorized)?;
        self.certificates
            .verify_client_cert(leaf, intermediates, UnixTime::now())
            .map_err(|error| refuse(&error))?;
        certificate_user(leaf).ok_or_else(|| refuse(&"no common name"))
    }

    /// Who sends a request: what the connection's certificate says, else the bearer token, else anonymous.
    /// Bad credentials are `401` even where anonymous would do.
    pub fn authenticate(
        &self,
        connection: Option<&Result<UserInfo, Status>>,
        headers: &HeaderMap,
        now: Timestamp,
    ) -> Result<UserInfo, Status> {
        if let Some(Ok(user)) = connection {
            return Ok(user.clone());
        }
        if let Some(token) = bearer_token(headers) {
            return self.verify_token(token, &[], now).map(|(user, _)| user).map_err(|error| {
                tracing::debug!(%error, "Refused a bearer token");
                Status::unauthorized()
            });
        }
        match connection {
            Some(Err(status)) => Err(status.clone()),
            _ => Ok(UserInfo::anonymous()),
        }
    }

    /// Whose token this is, and for which of `audiences` (empty: this API server's).
    pub fn verify_token(
        &self,
        token: &str,
        audiences: &[String],
        now: Timestamp,
    ) -> Result<(UserInfo, Vec<String>), TokenError> {
        let verified = self.tokens.verify(&*self.snapshots, token, audiences, now)?;
        Ok((verified.user, verified.audiences))
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?.trim();
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// The common name is the user, the organizations are the groups.
pub(crate) fn certificate_user(leaf: &CertificateDer<'_>) -> Option<UserInfo> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    if name.is_empty() {
        return None;
    }
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_owned).collect();
    groups.push(AUTHENTICATED.to_owned());
    let uid = subject
        .iter_attributes()
        .find(|attribute| attribute.attr_type().to_id_string() == UID_OID)
        .and_then(|attribute| attribute.as_str().ok())
        .unwrap_or_default()
        .to_owned();
    let hash: String = Sha256::digest(leaf).iter().map(|byte| format!("{byte:02x}")).collect();
    let credential = vec![format!("X509SHA256={hash}")];
    let extra = [("authentication.kubernetes.io/credential-id".to_owned(), credential)].into();
    Some(UserInfo { name, uid, groups, extra })
}

/// Takes any certificate whose private key the client holds.
struct AnyCertificate(Arc<dyn ClientCertVerifier>);

impl fmt::Debug for AnyCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyCertificate")
    }
}

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// The user to act as: the one that `Impersonate-*` headers name, if there are any and `user` may.
pub fn impersonate(user: UserInfo, headers: &HeaderMap, authorizer: &Authorizer) -> Result<UserInfo, Status> {
    let all = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).map(str::to_owned).collect()
    };
    let name = all("impersonate-user").into_iter().next().unwrap_or_default();
    let uid = all("impersonate-uid").into_iter().next().unwrap_or_default();
    let mut groups = all("impersonate-group");
    let mut extra: std::collections::BTreeMap<String, Vec<String>> = Default::default();
    for (header, value) in headers {
        if let (Some(key), Ok(value)) = (header.as_str().strip_prefix("impersonate-extra-"), value.to_str()) {
            extra.entry(percent_decoded(key)).or_default().push(value.to_owned());
        }
    }
    if name.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(user);
        }
        // Whom the groups would belong to is not said.
        return Err(Status::internal(format!(
            "requested {{UID:{uid:?} Groups:{groups:?}}} without impersonating a user"
        )));
    }
    let may = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| {
        let attributes = Attributes::Resource {
            verb: "impersonate",
            group,
            version: "v1",
            resource,
            subresource,
            namespace,
            name,
        };
        authorizer.require(&user, &attributes)
    };
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => {
            may("", "serviceaccounts", "", namespace, account)?;
            if groups.is_empty() {
                groups =
                    vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
            }
        }
        None => may("", "users", "", "", &name)?,
    }
    for group in all("impersonate-group") {
        may("", "groups", "", "", &group)?;
    }
    if !uid.is_empty() {
        may("authentication.k8s.io", "uids", "", "", &uid)?;
    }
    for (key, values) in &extra {
        for value in values {
            may("authentication.k8s.io", "userextras", key, "", value)?;
        }
    }
    let default = if name == "system:anonymous" { UNAUTHENTICATED } else { AUTHENTICATED };
    if !groups.iter().any(|group| group == AUTHENTICATED || group == UNAUTHENTICATED) {
        groups.push(default.to_owned());
    }
    Ok(UserInfo { name, uid, groups, extra })
}

/// Undoes `%xx`; what is no such escape stays.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped = (byte == b'%' && tail.len() >= 2)
            .then(|| std::str::from_utf8(&tail[..2]).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .flatten();
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair};
    use serde_json::json;

    use super::*;
    use crate::snapshots::fake::Cluster;

    struct Ca {
        der: CertificateDer<'static>,
        issuer: Issuer<'static, KeyPair>,
    }

    fn ca() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "ca");
        let der = params.self_signed(&key).unwrap().der().clone();
        Ca { der, issuer: Issuer::new(params, key) }
    }

    fn certificate(ca: &Ca, name: &str, group: &str) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, group);
        if !name.is_empty() {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        params.signed_by(&key, &ca.issuer).unwrap().der().clone()
    }

    fn authenticator(ca: &Ca) -> Authenticator {
        let (tokens, cluster) = (crate::tokens::tests::tokens(), crate::tokens::tests::cluster());
        Authenticator::new(std::slice::from_ref(&ca.der), Arc::new(tokens), cluster).unwrap()
    }

    fn header(name: &'static str, value: &str) -> HeaderMap {
        [(http::HeaderName::from_static(name), value.parse().unwrap())].into_iter().collect()
    }

    #[test]
    fn certificates_name_their_user() {
        let ours = ca();
        let authenticator = authenticator(&ours);
        let user = authenticator.identify(&[certificate(&ours, "ann", "devs")]).unwrap();
        assert_eq!(user.name, "ann");
        assert_eq!(user.groups, ["devs", AUTHENTICATED]);
        assert_eq!(authenticator.identify(&[certificate(&ca(), "ann", "devs")]).unwrap_err().code, 401);
        assert_eq!(authenticator.identify(&[certificate(&ours, "", "devs")]).unwrap_err().code, 401);
        assert_eq!(authenticator.identify(&[CertificateDer::from(vec![1, 2, 3])]).unwrap_err().code, 401);
    }

    #[test]
    fn bad_credentials_are_not_anonymous() {
        let ours = ca();
        let authenticator = authenticator(&ours);
        let now = Timestamp::now();
        let bad = Err(Status::unauthorized());
        let none = HeaderMap::new();
        let code = |connection, headers: &HeaderMap| {
            authenticator.authenticate(connection, headers, now).map(|user| user.name).map_err(|s| s.code)
        };
        assert_eq!(code(None, &none), Ok("system:anonymous".to_owned()));
        assert_eq!(code(Some(&bad), &none), Err(401));
        assert_eq!(code(None, &header("authorization", "Bearer nonsense")), Err(401));
        let request = json!({"spec": {}});
        let token = authenticator.tokens.issue(&*authenticator.snapshots, "a", "bot", request, now).unwrap();
        let bearer = format!("Bearer {}", token["status"]["token"].as_str().unwrap());
        assert_eq!(
            code(Some(&bad), &header("authorization", &bearer)),
            Ok("system:serviceaccount:a:bot".to_owned())
        );
    }

    #[track_caller]
    fn check_impersonation(headers: &[(&'static str, &str)], want: Result<UserInfo, u16>) {
        let rbac = "rbac.authorization.k8s.io";
        let cluster = Cluster::with([
            json!({"apiVersion": format!("{rbac}/v1"), "kind": "ClusterRole", "metadata": {"name": "r"},
                "rules": [{"apiGroups": [""], "resources": ["users", "serviceaccounts"], "verbs": ["impersonate"]},
                    {"apiGroups": [""], "resources": ["groups"], "resourceNames": ["devs"], "verbs": ["impersonate"]},
                    {"apiGroups": ["authentication.k8s.io"], "resources": ["userextras/scopes"], "verbs": ["impersonate"]}]}),
            json!({"apiVersion": format!("{rbac}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": "r"},
                "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "r"},
                "subjects": [{"kind": "User", "name": "root"}]}),
        ]);
        let headers = headers
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect();
        let got = impersonate(UserInfo::new("root", &[]), &headers, &Authorizer::new(cluster));
        assert_eq!(got.map_err(|status| status.code), want);
    }

    #[test]
    fn one_may_act_as_another_when_allowed() {
        check_impersonation(&[], Ok(UserInfo::new("root", &[])));
        check_impersonation(&[("impersonate-user", "ann")], Ok(UserInfo::new("ann", &[])));
        check_impersonation(
            &[("impersonate-user", "ann"), ("impersonate-group", "devs")],
            Ok(UserInfo::new("ann", &["devs"])),
        );
        check_impersonation(
            &[("impersonate-user", "ann"), ("impersonate-group", "system:masters")],
            Err(403),
        );
        check_impersonation(&[("impersonate-group", "devs")], Err(500));
        check_impersonation(
            &[("impersonate-user", "system:serviceaccount:a:bot")],
            Ok(UserInfo::service_account("a", "bot")),
        );
        let mut scoped = UserInfo::new("ann", &[]);
        scoped.extra.insert("scopes".to_owned(), vec!["view".to_owned()]);
        check_impersonation(&[("impersonate-user", "ann"), ("impersonate-extra-scopes", "view")], Ok(scoped));
        check_impersonation(&[("impersonate-user", "ann"), ("impersonate-extra-other", "x")], Err(403));
        check_impersonation(&[("impersonate-user", "ann"), ("impersonate-uid", "7")], Err(403));
    }
}
