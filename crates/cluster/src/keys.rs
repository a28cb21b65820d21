//! The keys of a cluster: its certificate authority, the certificates of servers and clients, and the key that
//! signs service account tokens. Made at the first start, renewed when names change or the end is near.
//!
//! The files under `pki/` are named as kubeadm names them.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::data_dir::write_file;

const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const LEAF_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// A start this close to the end of a certificate renews it.
const RENEW_BEFORE: Duration = Duration::from_secs(120 * 24 * 3600);
/// Clocks of other machines may be this much behind.
const SKEW: Duration = Duration::from_secs(5 * 60);

/// A certificate and its key, in PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    pub certificate: String,
    pub key: String,
}

/// Everything a cluster of one machine signs and is signed with.
#[derive(Debug, Clone)]
pub struct Keys {
    pub ca: Pair,
    /// What the API server shows.
    pub apiserver: Pair,
    /// As whom the API server goes to kubelets.
    pub apiserver_kubelet_client: Pair,
    /// What the kubelet of this node shows.
    pub kubelet: Pair,
    /// As whom the kubelet of this node goes to the API server.
    pub kubelet_client: Pair,
    /// The user of the kubeconfig that `up` writes.
    pub admin: Pair,
    pub controller_manager: Pair,
    pub scheduler: Pair,
    pub proxy: Pair,
    /// The cluster DNS, which acts as the service account that kubeadm gives CoreDNS.
    pub dns: Pair,
    /// Signs service account tokens (ES256); PKCS #8, and the public half.
    pub service_account: String,
    pub service_account_public: String,
}

/// What the certificates are made for.
#[derive(Debug, Clone)]
pub struct Names {
    pub node_name: String,
    pub node_ip: IpAddr,
    /// The address of the `kubernetes` Service.
    pub service_ip: IpAddr,
    pub cluster_domain: String,
}

/// One certificate to be.
struct Leaf {
    file: &'static str,
    common_name: String,
    organizations: &'static [&'static str],
    names: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
}

impl Leaf {
    fn client(file: &'static str, common_name: &str, organizations: &'static [&'static str]) -> Leaf {
        Leaf {
            file,
            common_name: common_name.to_owned(),
            organizations,
            names: BTreeSet::new(),
            addresses: BTreeSet::new(),
        }
    }

    fn is_server(&self) -> bool {
        !self.addresses.is_empty()
    }
}

impl Keys {
    /// Reads the keys in `dir`, making and renewing what needs it.
    pub fn ensure(dir: &Path, wanted: &Names, now: SystemTime) -> Result<Keys> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        let (ca, ca_is_new) = Self::authority(dir, now)?;
        let issuer = Issuer::from_ca_cert_pem(&ca.certificate, KeyPair::from_pem(&ca.key)?)
            .with_context(|| format!("read {}", dir.join("ca.crt").display()))?;
        let pair = |leaf: Leaf| -> Result<Pair> {
            let present = if ca_is_new { None } else { Pair::read(dir, leaf.file)? };
            match present.filter(|pair| pair.serves(&leaf, now)) {
                Some(pair) => Ok(pair),
                None => leaf.sign(&issuer, now)?.write(dir, leaf.file),
            }
        };
        let node_user = format!("system:node:{}", wanted.node_name);
        let service_account = Self::signing_key(dir)?;
        Ok(Keys {
            apiserver: pair(wanted.apiserver())?,
            apiserver_kubelet_client: pair(Leaf::client(
                "apiserver-kubelet-client",
                "kube-apiserver-kubelet-client",
                &["system:masters"],
            ))?,
            kubelet: pair(wanted.kubelet())?,
            kubelet_client: pair(Leaf::client("kubelet-client", &node_user, &["system:nodes"]))?,
            admin: pair(Leaf::client("admin", "kubernetes-admin", &["system:masters"]))?,
            controller_manager: pair(Leaf::client(
                "controller-manager",
                "system:kube-controller-manager",
                &[],
            ))?,
            scheduler: pair(Leaf::client("scheduler", "system:kube-scheduler", &[]))?,
            proxy: pair(Leaf::client("proxy", "system:kube-proxy", &[]))?,
            dns: pair(Leaf::client("dns", "system:serviceaccount:kube-system:coredns", &[]))?,
            service_account_public: service_account.public_key_pem(),
            service_account: service_account.serialize_pem(),
            ca,
        })
    }

    fn authority(dir: &Path, now: SystemTime) -> Result<(Pair, bool)> {
        if let Some(pair) = Pair::read(dir, "ca")?
            && pair.not_after().is_some_and(|end| end > now + RENEW_BEFORE)
        {
            return Ok((pair, false));
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = subject("minke-ca", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - SKEW).into();
        params.not_after = (now + CA_LIFETIME).into();
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let pair = Pair { certificate: issuer.pem(), key: issuer.key().serialize_pem() };
        Ok((pair.write(dir, "ca")?, true))
    }

    fn signing_key(dir: &Path) -> Result<KeyPair> {
        let path = dir.join("sa.key");
        if let Ok(text) = fs::read_to_string(&path) {
            return KeyPair::from_pem(&text).with_context(|| format!("read {}", path.display()));
        }
        let key = KeyPair::generate()?;
        write_file(&dir.join("sa.pub"), key.public_key_pem().as_bytes(), 0o644)?;
        write_file(&path, key.serialize_pem().as_bytes(), 0o600)?;
        Ok(key)
    }
}

impl Names {
    fn apiserver(&self) -> Leaf {
        let mut names: BTreeSet<String> =
            ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
                .map(str::to_owned)
                .into();
        names.insert(format!("kubernetes.default.svc.{}", self.cluster_domain));
        names.insert(self.node_name.clone());
        Leaf {
            names,
            addresses: [self.service_ip, self.node_ip, IpAddr::from([127, 0, 0, 1])].into(),
            ..Leaf::client("apiserver", "kube-apiserver", &[])
        }
    }

    fn kubelet(&self) -> Leaf {
        Leaf {
            names: [self.node_name.clone(), "localhost".to_owned()].into(),
            addresses: [self.node_ip, IpAddr::from([127, 0, 0, 1])].into(),
            ..Leaf::client("kubelet", &format!("system:node:{}", self.node_name), &["system:nodes"])
        }
    }
}

fn subject(common_name: &str, organizations: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for organization in organizations {
        name.push(DnType::OrganizationName, *organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

impl Leaf {
    fn sign(&self, issuer: &Issuer<'_, KeyPair>, now: SystemTime) -> Result<Pair> {
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(&self.common_name, self.organizations);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![if self.is_server() {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - SKEW).into();
        params.not_after = (now + LEAF_LIFETIME).into();
        for name in &self.names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        params.subject_alt_names.extend(self.addresses.iter().map(|address| SanType::IpAddress(*address)));
        let key = KeyPair::generate()?;
        Ok(Pair { certificate: params.signed_by(&key, issuer)?.pem(), key: key.serialize_pem() })
    }
}

impl Pair {
    fn files(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")))
    }

    fn read(dir: &Path, name: &str) -> Result<Option<Pair>> {
        let (certificate, key) = Self::files(dir, name);
        // A crash between the two writes leaves a key alone; then both are made again.
        if !certificate.exists() || !key.exists() {
            return Ok(None);
        }
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
        Ok(Some(Pair { certificate: read(&certificate)?, key: read(&key)? }))
    }

    fn write(self, dir: &Path, name: &str) -> Result<Pair> {
        let (certificate, key) = Self::files(dir, name);
        // Without the certificate an old pair does not count while it is being replaced.
        let _ = fs::remove_file(&certificate);
        write_file(&key, self.key.as_bytes(), 0o600)?;
        write_file(&certificate, self.certificate.as_bytes(), 0o644)?;
        Ok(self)
    }

    fn with_certificate<T>(&self, ask: impl FnOnce(&X509Certificate<'_>) -> T) -> Option<T> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(self.certificate.as_bytes()).ok()?;
        let (_, certificate) = X509Certificate::from_der(&pem.contents).ok()?;
        Some(ask(&certificate))
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> Option<SystemTime> {
        let seconds = self.with_certificate(|certificate| certificate.validity().not_after.timestamp())?;
        Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).ok()?))
    }

    /// Whether the certificate is as `leaf` would be made now, and far from its end.
    fn serves(&self, leaf: &Leaf, now: SystemTime) -> bool {
        let lasts = self.not_after().is_some_and(|end| end > now + RENEW_BEFORE);
        let fits = self.with_certificate(|certificate| {
            let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
                attribute.as_str().unwrap_or_default().to_owned()
            };
            let name = certificate.subject();
            let organizations: Vec<String> = name.iter_organization().map(text).collect();
            let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
            let alternatives = certificate.subject_alternative_name().ok().flatten();
            for other in alternatives.iter().flat_map(|extension| &extension.value.general_names) {
                match other {
                    GeneralName::DNSName(name) => drop(names.insert((*name).to_owned())),
                    GeneralName::IPAddress(bytes) => {
                        let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                        addresses.extend(v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok());
                    }
                    _ => {}
                }
            }
            name.iter_common_name().map(text).eq([leaf.common_name.clone()])
                && organizations == leaf.organizations
                && names == leaf.names
                && addresses == leaf.addresses
        });
        lasts && fits == Some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(node_ip: [u8; 4]) -> Names {
        Names {
            node_name: "vm".into(),
            node_ip: node_ip.into(),
            service_ip: [10, 96, 0, 1].into(),
            cluster_domain: "cluster.local".into(),
        }
    }

    #[test]
    fn keys_stay_until_names_change_or_the_end_is_near() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let ensure = |ip, now| Keys::ensure(dir.path(), &names(ip), now).unwrap();
        let first = ensure([192, 0, 2, 2], now);
        let again = ensure([192, 0, 2, 2], now);
        assert_eq!(first.apiserver.certificate, again.apiserver.certificate);
        assert_eq!(first.service_account, again.service_account);
        assert_eq!(first.admin.certificate, again.admin.certificate);

        let moved = ensure([192, 0, 2, 3], now);
        assert_eq!(moved.ca.certificate, first.ca.certificate);
        assert_ne!(moved.apiserver.certificate, first.apiserver.certificate);
        assert_eq!(moved.admin.certificate, first.admin.certificate);

        let later = ensure([192, 0, 2, 3], now + LEAF_LIFETIME - RENEW_BEFORE);
        assert_eq!(later.ca.certificate, first.ca.certificate);
        assert_ne!(later.admin.certificate, first.admin.certificate);

        let much_later = ensure([192, 0, 2, 3], now + CA_LIFETIME - RENEW_BEFORE);
        assert_ne!(much_later.ca.certificate, first.ca.certificate);
        assert_eq!(much_later.service_account, first.service_account);
    }

    #[test]
    fn secrets_are_for_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        Keys::ensure(dir.path(), &names([192, 0, 2, 2]), SystemTime::now()).unwrap();
        for entry in fs::read_dir(dir.path()).unwrap().flatten() {
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            let secret = entry.path().extension().is_some_and(|kind| kind == "key");
            assert_eq!(mode, if secret { 0o600 } else { 0o644 }, "{:?}", entry.path());
        }
    }

    #[test]
    fn the_server_is_known_by_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::ensure(dir.path(), &names([192, 0, 2, 2]), SystemTime::now()).unwrap();
        let leaf = names([192, 0, 2, 2]).apiserver();
        assert!(keys.apiserver.serves(&leaf, SystemTime::now()));
        for name in ["kubernetes.default.svc.cluster.local", "localhost", "vm"] {
            assert!(leaf.names.contains(name), "{name}");
        }
        assert!(!keys.admin.serves(&leaf, SystemTime::now()));
    }
}
