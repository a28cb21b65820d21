//! The strategy of ClusterTrustBundles.
//!
//! Upstream: pkg/apis/certificates/validation, pkg/registry/certificates/clustertrustbundle.

use std::collections::BTreeMap;

use minke_api::{FieldErrors, names, pem};
use serde_json::Value;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::certificates::signer;
use super::check;
use super::tree::Tree;
use crate::strategy::Strategy;

const BUNDLE_BYTES_MAX: usize = 1 << 20;
const HIDDEN: &str = "<value omitted>";

pub static TRUST_BUNDLE: Strategy = Strategy {
    validate,
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "signerName", errors);
    },
    // What is right depends on the signer.
    name: names::path_segment,
    unconditional_update: false,
    ..Strategy::PLAIN
};

fn validate(bundle: &Value, errors: &mut FieldErrors) {
    let spec = bundle.at("spec");
    let (own, of) = (bundle.at("metadata").text("name"), spec.text("signerName"));
    if let Err(why) = name(own, of) {
        errors.invalid("metadata.name", own, &why);
    }
    if !of.is_empty() {
        signer(of, "spec.signerName", errors);
    }
    anchors(spec.text("trustBundle"), "spec.trustBundle", errors);
}

/// Whether a bundle of a signer, if it has one, may have the name.
fn name(name: &str, signer: &str) -> Result<(), String> {
    if signer.is_empty() {
        return match name.contains(':') {
            true => Err("ClusterTrustBundle without signer name must not have \":\" in its name".to_owned()),
            false => names::dns_subdomain(name),
        };
    }
    let prefix = format!("{}:", signer.replace('/', ":"));
    match name.strip_prefix(&prefix) {
        Some(rest) => names::dns_subdomain(rest),
        None => Err(format!("ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}")),
    }
}

/// Whether any bundle could have the name: what a volume may ask for.
pub fn any_name(given: &str) -> Result<(), String> {
    let parts: Vec<&str> = given.split(':').collect();
    match parts[..] {
        [domain, path, _] => name(given, &format!("{domain}/{path}")),
        _ => name(given, ""),
    }
}

fn anchors(text: &str, path: &str, errors: &mut FieldErrors) {
    if text.len() > BUNDLE_BYTES_MAX {
        return errors.too_long(path, BUNDLE_BYTES_MAX);
    }
    let mut wrong = false;
    let mut seen: BTreeMap<Vec<u8>, Vec<String>> = BTreeMap::new();
    for (n, block) in pem::blocks(text).enumerate() {
        match anchor(&block) {
            Ok(()) => seen.entry(block.bytes).or_default().push(n.to_string()),
            Err(why) => {
                errors.invalid(path, HIDDEN, &format!("entry {n} {why}"));
                wrong = true;
            }
        }
    }
    if wrong {
        return;
    }
    if seen.is_empty() {
        errors.invalid(path, HIDDEN, "at least one trust anchor must be provided");
    }
    for places in seen.values().filter(|places| places.len() > 1) {
        errors.invalid(path, HIDDEN, &format!("duplicate trust anchor (indices [{}])", places.join(" ")));
    }
}

fn anchor(block: &pem::Block<'_>) -> Result<(), String> {
    if block.label != "CERTIFICATE" {
        return Err(format!("has bad block type: {}", block.label));
    }
    if block.has_headers {
        return Err("has PEM block headers".to_owned());
    }
    let parsed = X509Certificate::from_der(&block.bytes).ok().filter(|(rest, _)| rest.is_empty());
    let Some((_, certificate)) = parsed else { return Err("does not parse as X.509".to_owned()) };
    match certificate.is_ca() {
        true => Ok(()),
        false => Err("does not have the CA bit set".to_owned()),
    }
}

#[cfg(test)]
pub mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::*;

    /// A certificate that may sign others, or one that may not.
    pub fn certificate(ca: bool) -> String {
        let mut params = rcgen::CertificateParams::default();
        if ca {
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        }
        let key = rcgen::KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").pem()
    }

    #[track_caller]
    fn check(name: &str, spec: Value, want: &str) {
        let bundle = json!({"metadata": {"name": name}, "spec": spec});
        let mut errors = FieldErrors::default();
        (TRUST_BUNDLE.validate)(&bundle, &mut errors);
        let kind = Kind::by_kind("certificates.k8s.io", "v1", "ClusterTrustBundle").expect("a kind");
        let message = errors.into_result(kind, name).err().map(|status| status.message).unwrap_or_default();
        let start = format!("ClusterTrustBundle.certificates.k8s.io \"{name}\" is invalid: ");
        let got = message.strip_prefix(&start).unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn names_go_with_the_signer() {
        let good = certificate(true);
        let spec = |signer: &str| json!({"signerName": signer, "trustBundle": good});
        check("mine", spec(""), "");
        check(
            "a:b",
            spec(""),
            "metadata.name: Invalid value: \"a:b\": ClusterTrustBundle without signer name",
        );
        check("example.com:foo:v1", spec("example.com/foo"), "");
        check(
            "v1",
            spec("example.com/foo"),
            "metadata.name: Invalid value: \"v1\": ClusterTrustBundle for signerName example.com/foo must be named with prefix example.com:foo:",
        );
        check("example.com:foo:_", spec("example.com/foo"), "metadata.name: Invalid value");
        check("foo:x", spec("foo"), "spec.signerName: Invalid value: \"foo\": must be a fully qualified");
        assert!(any_name("mine").is_ok() && any_name("example.com:foo:v1").is_ok());
        assert!(any_name("a:b").is_err() && any_name("").is_err());
    }

    #[test]
    fn anchors_are_certificates_of_authorities_once_each() {
        let (one, two, leaf) = (certificate(true), certificate(true), certificate(false));
        let check = |text: &str, want: &str| {
            let want = match want {
                "" => String::new(),
                want => format!("spec.trustBundle: Invalid value: \"<value omitted>\": {want}"),
            };
            check("b", json!({ "trustBundle": text }), &want);
        };
        check(&format!("one\n{one}two\n{two}"), "");
        check("nothing", "at least one trust anchor must be provided");
        check(&format!("{one}{leaf}"), "entry 1 does not have the CA bit set");
        check(&format!("{one}{two}{one}"), "duplicate trust anchor (indices [0 2])");
        check(&one.replace("CERTIFICATE", "KEY"), "entry 0 has bad block type: KEY");
        check(&pem::encode("CERTIFICATE", b"x"), "entry 0 does not parse as X.509");
        let headed = one.replacen("CERTIFICATE-----\n", "CERTIFICATE-----\nA: b\n\n", 1);
        check(&headed, "entry 0 has PEM block headers");
    }
}
