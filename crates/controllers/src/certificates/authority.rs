//! Signs certificates with the cluster's CA.
//!
//! A certificate is put together from the request's own bytes (subject, public key, alternative names), so that
//! nothing of them is lost or reordered; what the request asks for besides is not taken over.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use rand::Rng;
use rcgen::{KeyPair, SigningKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension, X509Extension};
use x509_parser::prelude::FromDer;

/// Clocks of those who verify a certificate may be this much behind.
const BACKDATE: Duration = Duration::from_secs(5 * 60);

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BOOLEAN: u8 = 0x01;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const ALTERNATIVE_NAMES: &[u8] = &[0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const AUTHORITY_KEY: &[u8] = &[0x55, 0x1d, 0x23];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];

/// Usages by the names that requests have for them: the bit of the key usage, or the extended usage.
#[rustfmt::skip]
const USAGES: [(&str, Result<u8, &[u8]>); 23] = [
    ("signing", Ok(0)),
    ("digital signature", Ok(0)),
    ("content commitment", Ok(1)),
    ("key encipherment", Ok(2)),
    ("data encipherment", Ok(3)),
    ("key agreement", Ok(4)),
    ("cert sign", Ok(5)),
    ("crl sign", Ok(6)),
    ("encipher only", Ok(7)),
    ("decipher only", Ok(8)),
    ("any", Err(&[0x55, 0x1d, 0x25, 0])),
    ("server auth", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 1])),
    ("client auth", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 2])),
    ("code signing", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 3])),
    ("email protection", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 4])),
    ("s/mime", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 4])),
    ("ipsec end system", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 5])),
    ("ipsec tunnel", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 6])),
    ("ipsec user", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 7])),
    ("timestamping", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 8])),
    ("ocsp signing", Err(&[0x2b, 6, 1, 5, 5, 7, 3, 9])),
    ("microsoft sgc", Err(&[0x2b, 6, 1, 4, 1, 0x82, 0x37, 10, 3, 3])),
    ("netscape sgc", Err(&[0x60, 0x86, 0x48, 1, 0x86, 0xf8, 0x42, 4, 1])),
];

/// What a request says, as far as anyone decides by it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Wanted {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub names: Vec<String>,
    /// How many there are.
    pub addresses: usize,
    pub emails: usize,
    pub uris: usize,
    der: Vec<u8>,
}

impl Wanted {
    /// Reads a request in PEM.
    pub fn parse(pem: &[u8]) -> Result<Wanted, String> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem)
            .map_err(|_| "PEM block type must be CERTIFICATE REQUEST".to_owned())?;
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).map_err(|e| e.to_string())?;
        let subject = &request.certification_request_info.subject;
        let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().unwrap_or_default().to_owned()
        };
        let mut wanted = Wanted {
            common_name: subject.iter_common_name().last().map(text).unwrap_or_default(),
            organizations: subject.iter_organization().map(text).collect(),
            ..Wanted::default()
        };
        for extension in request.requested_extensions().into_iter().flatten() {
            let ParsedExtension::SubjectAlternativeName(all) = extension else { continue };
            for name in &all.general_names {
                match name {
                    GeneralName::DNSName(name) => wanted.names.push((*name).to_owned()),
                    GeneralName::IPAddress(_) => wanted.addresses += 1,
                    GeneralName::RFC822Name(_) => wanted.emails += 1,
                    GeneralName::URI(_) => wanted.uris += 1,
                    _ => {}
                }
            }
        }
        wanted.der = pem.contents;
        Ok(wanted)
    }
}

/// A CA: its certificate and its key.
pub struct Authority {
    key: KeyPair,
    /// The subject of its certificate, as DER.
    name: Vec<u8>,
    key_id: Option<Vec<u8>>,
    /// How its signatures are made, as DER.
    algorithm: Vec<u8>,
    not_after: Timestamp,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why a certificate cannot be signed, or a CA not be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the CA certificate cannot be read: {0}")]
    Certificate(String),
    #[error("the CA key cannot be used: {0}")]
    Key(#[from] rcgen::Error),
    #[error("unable to verify certificate request signature: {0}")]
    Request(String),
}

impl Authority {
    /// Both in PEM. The certificate is signed by the key itself.
    pub fn new(certificate: &str, key: &str) -> Result<Authority, AuthorityError> {
        let bad = |why: String| AuthorityError::Certificate(why);
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(certificate.as_bytes()).map_err(|e| bad(e.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&pem.contents).map_err(|e| bad(e.to_string()))?;
        let key_id = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
        // A certificate is a sequence of what is signed, how, and the signature.
        let algorithm = contents(&pem.contents).and_then(split).and_then(|(_, rest)| split(rest));
        let algorithm = algorithm.ok_or_else(|| bad("it is too short".to_owned()))?.0.to_vec();
        let not_after = Timestamp::from_second(parsed.validity().not_after.timestamp());
        Ok(Authority {
            name: parsed.subject().as_raw().to_vec(),
            key_id,
            algorithm,
            not_after: not_after.map_err(|error| bad(error.to_string()))?,
            key: KeyPair::from_pem(key)?,
        })
    }

    /// A certificate for what is wanted, in PEM, good for `lifetime` from `now` on and no longer than the CA.
    pub(crate) fn sign(
        &self,
        wanted: &Wanted,
        usages: &[String],
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<String, AuthorityError> {
        let bad = |error: &dyn fmt::Display| AuthorityError::Request(error.to_string());
        let (_, request) = X509CertificationRequest::from_der(&wanted.der).map_err(|error| bad(&error))?;
        request.verify_signature().map_err(|error| bad(&error))?;
        let info = &request.certification_request_info;
        let mut serial: [u8; 16] = rand::rng().random();
        // Positive, and never a zero too many.
        serial[0] = serial[0] & 0x7f | 0x40;
        let not_after = now.saturating_add(lifetime).unwrap_or(self.not_after).min(self.not_after);
        let not_before = now.checked_sub(BACKDATE).unwrap_or(now);
        let extensions = self.extensions(&request, usages);
        let signed = tlv(
            SEQUENCE,
            &[
                tlv(0xa0, &[tlv(INTEGER, &[vec![2]])]),
                tlv(INTEGER, &[serial.to_vec()]),
                self.algorithm.clone(),
                self.name.clone(),
                tlv(SEQUENCE, &[time(not_before), time(not_after)]),
                info.subject.as_raw().to_vec(),
                info.subject_pki.raw.to_vec(),
                tlv(0xa3, &[tlv(SEQUENCE, &extensions)]),
            ],
        );
        let mut signature = vec![0];
        signature.extend(self.key.sign(&signed)?);
        let certificate = tlv(SEQUENCE, &[signed, self.algorithm.clone(), tlv(BIT_STRING, &[signature])]);
        Ok(pem(&certificate))
    }

    fn extensions(&self, request: &X509CertificationRequest<'_>, usages: &[String]) -> Vec<Vec<u8>> {
        let chosen = USAGES.iter().filter(|(name, _)| usages.iter().any(|usage| usage == name));
        let (mut bits, mut extended) = (0u16, Vec::new());
        for (_, usage) in chosen {
            match usage {
                Ok(bit) => bits |= 0x8000 >> bit,
                Err(oid) if !extended.contains(oid) => extended.push(*oid),
                Err(_) => {}
            }
        }
        let mut extensions = Vec::new();
        if bits != 0 {
            let mut bytes = bits.to_be_bytes().to_vec();
            if bytes[1] == 0 {
                bytes.pop();
            }
            let unused = bytes[bytes.len() - 1].trailing_zeros() as u8;
            bytes.insert(0, unused);
            extensions.push(extension(KEY_USAGE, true, &tlv(BIT_STRING, &[bytes])));
        }
        if !extended.is_empty() {
            let oids: Vec<Vec<u8>> = extended.iter().map(|oid| tlv(OID, &[oid.to_vec()])).collect();
            extensions.push(extension(EXTENDED_KEY_USAGE, false, &tlv(SEQUENCE, &oids)));
        }
        extensions.push(extension(BASIC_CONSTRAINTS, true, &tlv(SEQUENCE, &[])));
        if let Some(id) = &self.key_id {
            extensions.push(extension(
                AUTHORITY_KEY,
                false,
                &tlv(SEQUENCE, &[tlv(0x80, std::slice::from_ref(id))]),
            ));
        }
        if let Some(names) = alternative_names(request) {
            let empty = request.certification_request_info.subject.iter().next().is_none();
            extensions.push(extension(ALTERNATIVE_NAMES, empty, names));
        }
        extensions
    }
}

/// The value of the extension as it was sent.
fn alternative_names<'a>(request: &'a X509CertificationRequest<'_>) -> Option<&'a [u8]> {
    for attribute in request.certification_request_info.iter_attributes() {
        // A set of one sequence of extensions.
        let mut rest = contents(attribute.value).and_then(contents).unwrap_or_default();
        while let Ok((after, extension)) = X509Extension::from_der(rest) {
            if extension.oid.as_bytes() == ALTERNATIVE_NAMES {
                return Some(extension.value);
            }
            rest = after;
        }
    }
    None
}

fn extension(oid: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let mut parts = vec![tlv(OID, &[oid.to_vec()])];
    if critical {
        parts.push(tlv(BOOLEAN, &[vec![0xff]]));
    }
    parts.push(tlv(OCTET_STRING, &[value.to_vec()]));
    tlv(SEQUENCE, &parts)
}

/// A time, in the form that its year wants.
fn time(at: Timestamp) -> Vec<u8> {
    let at = at.to_zoned(jiff::tz::TimeZone::UTC);
    if at.year() < 2050 {
        tlv(UTC_TIME, &[at.strftime("%y%m%d%H%M%SZ").to_string().into_bytes()])
    } else {
        tlv(GENERALIZED_TIME, &[at.strftime("%Y%m%d%H%M%SZ").to_string().into_bytes()])
    }
}

/// Tag, length, and the parts one after another.
fn tlv(tag: u8, parts: &[Vec<u8>]) -> Vec<u8> {
    let length: usize = parts.iter().map(Vec::len).sum();
    let mut out = vec![tag];
    match u8::try_from(length) {
        Ok(short) if short < 0x80 => out.push(short),
        _ => {
            let bytes = length.to_be_bytes();
            let skip = bytes.iter().take_while(|byte| **byte == 0).count();
            out.push(0x80 | (bytes.len() - skip) as u8);
            out.extend_from_slice(&bytes[skip..]);
        }
    }
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out
}

/// The first element, whole, and what follows it.
fn split(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let head = der.len() - body(der)?.1;
    der.split_at_checked(head + body(der)?.0)
}

/// What is in the first element.
fn contents(der: &[u8]) -> Option<&[u8]> {
    let (length, rest) = body(der)?;
    der.get(der.len() - rest..)?.get(..length)
}

/// The length of the first element's contents, and how many bytes follow its head.
fn body(der: &[u8]) -> Option<(usize, usize)> {
    let first = *der.get(1)?;
    if first < 0x80 {
        return Some((usize::from(first), der.len() - 2));
    }
    let count = usize::from(first & 0x7f);
    let digits = der.get(2..2 + count).filter(|_| (1..=4).contains(&count))?;
    let length = digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit));
    Some((length, der.len() - 2 - count))
}

fn pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("base64 is ASCII"));
    let mut out = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in lines {
        out.push_str(line);
        out.push('\n');
    }
    out + "-----END CERTIFICATE-----\n"
}

#[cfg(test)]
pub(crate) mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa};

    use super::*;

    pub(crate) fn authority() -> (Authority, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap().pem();
        (Authority::new(&certificate, &key.serialize_pem()).unwrap(), certificate)
    }

    pub(crate) fn request(name: &str, group: &str, names: &[&str]) -> String {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        if !group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    }

    fn now() -> Timestamp {
        "2026-05-01T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_certificate_holds_what_was_asked_for_and_verifies() {
        let (authority, ca) = authority();
        let wanted = Wanted::parse(request("jane", "dev", &["a.example", "10.0.0.1"]).as_bytes()).unwrap();
        assert_eq!(
            (wanted.common_name.as_str(), &wanted.organizations[..]),
            ("jane", &["dev".to_owned()][..])
        );
        assert_eq!((&wanted.names[..], wanted.addresses), (&["a.example".to_owned()][..], 1));
        let usages =
            ["client auth", "key encipherment", "digital signature", "server auth"].map(str::to_owned);
        let pem = authority.sign(&wanted, &usages, Duration::from_secs(3600), now()).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let (_, ca) = x509_parser::pem::parse_x509_pem(ca.as_bytes()).unwrap();
        let ca = ca.parse_x509().unwrap();
        certificate.verify_signature(Some(ca.public_key())).unwrap();
        assert_eq!(certificate.issuer(), ca.subject());
        assert_eq!(certificate.subject().to_string(), "CN=jane, O=dev");
        let validity = certificate.validity();
        assert_eq!(validity.not_before.timestamp(), now().as_second() - 300);
        assert_eq!(validity.not_after.timestamp(), now().as_second() + 3600);
        let usage = certificate.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
        let extended = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.client_auth && extended.server_auth && !extended.any);
        assert!(!certificate.basic_constraints().unwrap().unwrap().value.ca);
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names.len(), 2);
        assert!(names.contains(&GeneralName::DNSName("a.example")));
    }

    #[test]
    fn what_is_not_a_good_request_is_refused() {
        let (authority, _) = authority();
        assert!(Wanted::parse(b"x").is_err());
        let mut wanted = Wanted::parse(request("jane", "", &[]).as_bytes()).unwrap();
        let last = wanted.der.len() - 1;
        wanted.der[last] ^= 1;
        let error = authority.sign(&wanted, &[], Duration::from_secs(600), now()).unwrap_err();
        assert!(matches!(error, AuthorityError::Request(_)), "{error}");
    }

    #[test]
    fn no_certificate_outlives_its_authority() {
        let (mut authority, _) = authority();
        authority.not_after = now() + Duration::from_secs(1000);
        let wanted = Wanted::parse(request("jane", "", &[]).as_bytes()).unwrap();
        let pem = authority.sign(&wanted, &[], Duration::from_secs(5000), now()).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let end = pem.parse_x509().unwrap().validity().not_after.timestamp();
        assert_eq!(end, now().as_second() + 1000);
    }

    #[test]
    fn elements_are_split_by_their_lengths() {
        for size in [0, 1, 127, 128, 255, 256, 70_000] {
            let one = tlv(SEQUENCE, &[vec![7; size]]);
            let mut two = one.clone();
            two.extend([1, 2, 3]);
            assert_eq!(split(&two), Some((&one[..], &[1, 2, 3][..])), "{size}");
            assert_eq!(contents(&two), Some(&vec![7; size][..]));
        }
        for bad in [&[][..], &[0x30], &[0x30, 5], &[0x30, 0x84, 0xff], &[0x30, 0x88, 1, 1, 1, 1, 1, 1, 1, 1]]
        {
            assert_eq!(split(bad), None, "{bad:?}");
        }
    }
}
