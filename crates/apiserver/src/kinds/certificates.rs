//! The strategy of CertificateSigningRequests.
//!
//! Upstream: pkg/apis/certificates/validation, pkg/registry/certificates/certificates.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use minke_api::{FieldErrors, names};
use serde_json::{Value, json};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;

use super::check;
use super::tree::Tree;
use crate::strategy::Strategy;

pub const LEGACY_UNKNOWN: &str = "kubernetes.io/legacy-unknown";
/// Conditions that are given once, for good.
pub const LASTING: [&str; 3] = ["Approved", "Denied", "Failed"];
const EXPIRATION_SECONDS_MIN: i64 = 600;
const SIGNER_BYTES_MAX: usize = 253 + 1 + 253;
const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];

pub static REQUEST: Strategy = Strategy {
    prepare_create: |request| request.set("status", json!({})),
    // Nothing of a request changes but its status.
    prepare_update: |new, old| new.set("spec", old.at("spec").clone()),
    validate,
    name: names::path_segment,
    ..Strategy::PLAIN
};

/// The bytes of the request proper, as DER.
pub fn request_der(object: &Value) -> Result<Vec<u8>, String> {
    let not_a_request = || "PEM block type must be CERTIFICATE REQUEST".to_owned();
    let text = BASE64.decode(object.at("spec").text("request")).map_err(|error| error.to_string())?;
    let (_, pem) = x509_parser::pem::parse_x509_pem(&text).map_err(|_| not_a_request())?;
    if pem.label != "CERTIFICATE REQUEST" {
        return Err(not_a_request());
    }
    X509CertificationRequest::from_der(&pem.contents).map_err(|error| format!("asn1: {error}"))?;
    Ok(pem.contents)
}

fn validate(request: &Value, errors: &mut FieldErrors) {
    let spec = request.at("spec");
    if let Err(why) = request_der(request) {
        errors.invalid("spec.request", spec.text("request"), &why);
    }
    if !spec.has("usages") {
        errors.required("spec.usages", "");
    }
    let mut seen = BTreeSet::new();
    for (n, usage) in spec.items("usages").iter().enumerate() {
        let (path, usage) = (format!("spec.usages[{n}]"), usage.as_str().unwrap_or_default());
        if !USAGES.contains(&usage) {
            errors.not_supported(&path, usage, &USAGES);
        }
        if !seen.insert(usage) {
            errors.duplicate(&path, usage);
        }
    }
    signer(spec.text("signerName"), "spec.signerName", errors);
    if let Some(seconds) = spec.int("expirationSeconds").filter(|seconds| *seconds < EXPIRATION_SECONDS_MIN) {
        let why = "may not specify a duration less than 600 seconds (10 minutes)";
        errors.invalid("spec.expirationSeconds", seconds, why);
    }
    conditions(request.at("status"), errors);
    certificate(request.at("status").text("certificate"), errors);
}

/// `example.com/path`: a domain, and a name within it.
pub fn signer(name: &str, path: &str, errors: &mut FieldErrors) {
    if name.is_empty() {
        return errors.required(path, "");
    }
    let Some((domain, rest)) = name.split_once('/').filter(|(_, rest)| !rest.contains('/')) else {
        let why = "must be a fully qualified domain and path of the form 'example.com/signer-name'";
        return errors.invalid(path, name, why);
    };
    for part in [domain, rest] {
        for label in part.split('.') {
            if let Err(why) = names::dns_label(label) {
                errors.invalid(path, part, &format!("validating label {label:?}: {why}"));
            }
        }
    }
    if !domain.contains('.') {
        errors.invalid(path, domain, "should be a domain with at least two segments separated by dots");
    }
    if name.len() > SIGNER_BYTES_MAX {
        errors.too_long(path, SIGNER_BYTES_MAX);
    }
}

fn conditions(status: &Value, errors: &mut FieldErrors) {
    let mut seen = BTreeSet::new();
    for (n, condition) in status.items("conditions").iter().enumerate() {
        let path = format!("status.conditions[{n}]");
        let kind = condition.text("type");
        check::required(condition, &path, "type", errors);
        match condition.text("status") {
            "" => errors.required(&check::at(&path, "status"), ""),
            "True" => {}
            value if LASTING.contains(&kind) => {
                errors.not_supported(&check::at(&path, "status"), value, &["True"]);
            }
            "False" | "Unknown" => {}
            value => {
                errors.not_supported(&check::at(&path, "status"), value, &["True", "False", "Unknown"]);
            }
        }
        let other = match kind {
            "Approved" => "Denied",
            "Denied" => "Approved",
            _ => "",
        };
        if seen.contains(other) {
            let why = "Approved and Denied conditions are mutually exclusive";
            errors.invalid(&check::at(&path, "type"), kind, why);
        }
        if !seen.insert(kind) {
            errors.duplicate(&check::at(&path, "type"), kind);
        }
    }
}

fn certificate(encoded: &str, errors: &mut FieldErrors) {
    if encoded.is_empty() {
        return;
    }
    let text = BASE64.decode(encoded).unwrap_or_default();
    let mut blocks = Pem::iter_from_buffer(&text).peekable();
    let found = blocks.peek().is_some();
    let all_good =
        blocks.all(|block| block.is_ok_and(|pem| pem.label == "CERTIFICATE" && pem.parse_x509().is_ok()));
    if !found || !all_good {
        let why = "must contain one or more PEM blocks of type \"CERTIFICATE\"";
        errors.invalid("status.certificate", "<certificate data>", why);
    }
}

#[cfg(test)]
pub mod tests {
    use minke_api::Kind;

    use super::*;

    /// A request for `name` as a member of `groups`, in base64 of PEM as objects hold it.
    pub fn encoded_request(name: &str, groups: &[&str]) -> String {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(rcgen::DnType::OrganizationName, *group);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        BASE64.encode(params.serialize_request(&key).unwrap().pem().unwrap())
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), want: &str) {
        let mut request = json!({"spec": {
            "request": encoded_request("jane", &[]),
            "usages": ["client auth"],
            "signerName": "kubernetes.io/kube-apiserver-client",
        }});
        change(&mut request);
        let mut errors = FieldErrors::default();
        (REQUEST.validate)(&request, &mut errors);
        let kind = Kind::by_kind("certificates.k8s.io", "v1", "CertificateSigningRequest").unwrap();
        let message = errors.into_result(kind, "x").err().map(|status| status.message).unwrap_or_default();
        let start = "CertificateSigningRequest.certificates.k8s.io \"x\" is invalid: ";
        let got = message.strip_prefix(start).unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn requests_are_checked() {
        check(|_| {}, "");
        let no_pem = "spec.request: Invalid value: \"eA==\": PEM block type must be";
        check(|r| r["spec"]["request"] = "eA==".into(), no_pem);
        check(|r| r["spec"]["usages"] = json!([]), "spec.usages: Required value");
        let unknown = "spec.usages[0]: Unsupported value: \"x\": supported values: \"any\"";
        check(|r| r["spec"]["usages"] = json!(["x"]), unknown);
        let twice = "spec.usages[1]: Duplicate value: \"any\"";
        check(|r| r["spec"]["usages"] = json!(["any", "any"]), twice);
        let signer = |name: &'static str| move |r: &mut Value| r["spec"]["signerName"] = name.into();
        check(signer(""), "spec.signerName: Required value");
        check(signer("me"), "spec.signerName: Invalid value: \"me\": must be a fully");
        check(signer("me/x"), "spec.signerName: Invalid value: \"me\": should be a domain");
        let short = "spec.expirationSeconds: Invalid value: 599: may not specify";
        check(|r| r["spec"]["expirationSeconds"] = 599.into(), short);
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status});
        check(
            |r| r["status"] = json!({"conditions": [condition("Approved", "False")]}),
            "status.conditions[0].status: Unsupported value: \"False\": supported values: \"True\"",
        );
        check(
            |r| {
                r["status"]["conditions"] =
                    json!([condition("Approved", "True"), condition("Denied", "True")])
            },
            "status.conditions[1].type: Invalid value: \"Denied\": Approved and Denied conditions are mutually exclusive",
        );
        check(|r| r["status"] = json!({"certificate": "eA=="}), "status.certificate: Invalid value");
    }
}
