//! The strategy of PodCertificateRequests: what a kubelet asks of a signer for a pod, and what it gets.
//!
//! Upstream: pkg/apis/certificates/validation, pkg/registry/certificates/podcertificaterequest.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use minke_api::{FieldErrors, names, pem, time};
use serde_json::{Value, json};
use x509_parser::certificate::X509Certificate;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::certificates::signer;
use super::check;
use super::tree::Tree;
use crate::strategy::Strategy;

/// Conditions of which a request gets one, for good.
const ENDS: [&str; 3] = ["Denied", "Failed", "Issued"];
/// Keys that kubelets make.
pub const KEY_TYPES: [&str; 6] = ["ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519", "RSA3072", "RSA4096"];
const SECONDS_MIN: i64 = 3600;
const SECONDS_MAX: i64 = 91 * 86_400;
/// Of signers of Kubernetes itself.
const OWN_SECONDS_MAX: i64 = 86_400;
const UID_BYTES_MAX: usize = 128;
const REQUEST_BYTES_MAX: usize = 10 << 10;
const CHAIN_BYTES_MAX: usize = 100 << 10;
const CHAIN_FIELDS: [&str; 4] = ["certificateChain", "notBefore", "beginRefreshAt", "notAfter"];

pub static REQUEST: Strategy = Strategy {
    set_defaults: |request| request.object("spec").fill("maxExpirationSeconds", OWN_SECONDS_MAX),
    prepare_create: |request| request.set("status", json!({})),
    validate: |request, errors| spec(request.at("spec"), errors),
    validate_update: |new, old, errors| {
        if new.at("spec") != old.at("spec") {
            errors.invalid("spec", new.at("spec"), "field is immutable");
        }
    },
    ..Strategy::PLAIN
};

/// Seconds that a certificate of the signer may be good for, at most.
pub fn lifetime(seconds: i64, signer: &str, path: &str, errors: &mut FieldErrors) {
    let max = if signer.starts_with("kubernetes.io/") { OWN_SECONDS_MAX } else { SECONDS_MAX };
    if !(SECONDS_MIN..=max).contains(&seconds) {
        errors.invalid(path, seconds, &format!("must be in the range [{SECONDS_MIN}, {max}]"));
    }
}

fn spec(spec: &Value, errors: &mut FieldErrors) {
    signer(spec.text("signerName"), "spec.signerName", errors);
    for field in ["podName", "serviceAccountName", "nodeName"] {
        check::name(spec.text(field), &check::at("spec", field), names::dns_subdomain, errors);
    }
    for field in ["podUID", "serviceAccountUID", "nodeUID"] {
        let path = check::at("spec", field);
        match spec.text(field) {
            "" => errors.invalid(&path, "", "must not be empty"),
            uid if uid.len() > UID_BYTES_MAX => errors.too_long(&path, UID_BYTES_MAX),
            _ => {}
        }
    }
    let seconds = spec.int("maxExpirationSeconds").unwrap_or_default();
    lifetime(seconds, spec.text("signerName"), "spec.maxExpirationSeconds", errors);
    if let Err(why) = request(spec.text("stubPKCS10Request")) {
        errors.invalid("spec.stubPKCS10Request", "<value omitted>", &why);
    }
}

/// Whether a request proves that who sends it has the key, and the key is of a type that is known.
fn request(encoded: &str) -> Result<(), String> {
    let der = BASE64.decode(encoded).unwrap_or_default();
    if der.is_empty() || der.len() > REQUEST_BYTES_MAX {
        return Err(format!("must not be empty, nor more than {REQUEST_BYTES_MAX} bytes"));
    }
    let parsed = X509CertificationRequest::from_der(&der).ok().filter(|(rest, _)| rest.is_empty());
    let Some((_, parsed)) = parsed else { return Err("must be a valid PKCS#10 CSR".to_owned()) };
    parsed.verify_signature().map_err(|_| "signature does not validate".to_owned())?;
    key(&parsed.certification_request_info.subject_pki)
}

fn key(info: &SubjectPublicKeyInfo<'_>) -> Result<(), String> {
    const ED25519: &str = "1.3.101.112";
    let known = match info.parsed() {
        Ok(PublicKey::RSA(key)) => [3072, 4096].contains(&key.key_size()),
        Ok(PublicKey::EC(key)) => [256, 384, 521, 528].contains(&key.key_size()),
        _ => info.algorithm.algorithm.to_id_string() == ED25519,
    };
    match known {
        true => Ok(()),
        false => Err(format!("unsupported key type; it must be one of {}", KEY_TYPES.join(", "))),
    }
}

/// Checks what a signer has to say, which is said once. `old` is the status before.
pub fn validate_status(object: &Value, old: &Value, errors: &mut FieldErrors) {
    let status = object.at("status");
    let ended =
        |status: &Value| status.items("conditions").iter().any(|one| ENDS.contains(&one.text("type")));
    if ended(old) {
        errors.invalid(
            "status",
            status,
            "immutable after PodCertificateRequest is issued, denied, or failed",
        );
        return;
    }
    for (n, condition) in status.items("conditions").iter().enumerate() {
        let path = format!("status.conditions[{n}]");
        check::one_of(condition, &path, "type", &ENDS, errors);
        check::one_of(condition, &path, "status", &["True"], errors);
    }
    if status.items("conditions").len() > 1 {
        let why = "at most one condition of Issued, Denied and Failed may be set";
        errors.invalid("status.conditions", status.at("conditions"), why);
    }
    if status.items("conditions").iter().any(|one| one.text("type") == "Issued") {
        if let Err((field, why)) = chain(object.at("spec"), status) {
            errors.invalid(&check::at("status", field), "<value omitted>", &why);
        }
        return;
    }
    for field in CHAIN_FIELDS.into_iter().filter(|field| status.has(field)) {
        errors.invalid(
            &check::at("status", field),
            "<value omitted>",
            "must be empty for non-issued PodCertificateRequests",
        );
    }
}

/// What is wrong with an issued certificate, and in which field.
fn chain(spec: &Value, status: &Value) -> Result<(), (&'static str, String)> {
    const CHAIN: &str = "certificateChain";
    let text = status.text(CHAIN);
    if text.len() > CHAIN_BYTES_MAX {
        return Err((CHAIN, format!("may not be more than {CHAIN_BYTES_MAX} bytes")));
    }
    let blocks: Vec<pem::Block<'_>> = pem::blocks(text).collect();
    let mut certificates = vec![];
    for (n, block) in blocks.iter().enumerate() {
        let parsed = X509Certificate::from_der(&block.bytes).ok().filter(|_| block.label == "CERTIFICATE");
        let Some((_, certificate)) = parsed else {
            return Err((CHAIN, format!("entry {n} is not a PEM-encoded X.509 certificate")));
        };
        certificates.push(certificate);
    }
    let Some(leaf) = certificates.first() else {
        return Err((CHAIN, "must contain at least one certificate".to_owned()));
    };
    let der = BASE64.decode(spec.text("stubPKCS10Request")).unwrap_or_default();
    let asked = X509CertificationRequest::from_der(&der).ok();
    if asked
        .is_none_or(|(_, asked)| asked.certification_request_info.subject_pki.raw != leaf.public_key().raw)
    {
        return Err((CHAIN, "leaf certificate was not issued to the requested public key".to_owned()));
    }
    let at = |field: &'static str| {
        let parsed = time::parse(status.text(field)).map(|time| time.as_second());
        parsed.map_err(|_| (field, "must be present and consistent with the issued certificate".to_owned()))
    };
    let (from, refresh, to) = (at("notBefore")?, at("beginRefreshAt")?, at("notAfter")?);
    let validity = leaf.validity();
    for (field, said, is) in [("notBefore", from, validity.not_before), ("notAfter", to, validity.not_after)]
    {
        if said != is.timestamp() {
            return Err((field, "must be set to the same value as in the leaf certificate".to_owned()));
        }
    }
    let most = spec.int("maxExpirationSeconds").unwrap_or(SECONDS_MAX);
    if !(SECONDS_MIN..=most).contains(&(to - from)) {
        return Err((
            CHAIN,
            format!("leaf certificate lifetime must be in the range [{SECONDS_MIN}, {most}] seconds"),
        ));
    }
    // Ten minutes on either side are for clocks and for the way.
    if !(from + 600..=to - 600).contains(&refresh) {
        return Err((
            "beginRefreshAt",
            "must be at least 10 minutes after notBefore and before notAfter".to_owned(),
        ));
    }
    Ok(())
}
