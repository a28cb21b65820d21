//! Pulls from and pushes to registries.
//!
//! Mirrors of a registry are asked before it. Loopback registries and those configured so are spoken to in
//! plain HTTP. Everything has a time limit, and every byte a digest it must match.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference as Target, RegistryOperation};
use serde::{Deserialize, Serialize};

use super::archive::{DOCUMENT_MAX, Descriptor, Document, OCI_MANIFEST, digest_of, fits, own_architecture};
use super::reference::Reference;
use super::{ImageStore, Names, Transferred, blocking, failed};
use crate::api::{Auth, Error, Image, Progress, ProgressEvent, Result};

const ACCEPTED: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    OCI_MANIFEST,
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Layers fetched at the same time, as containerd does it.
const DOWNLOADS: usize = 3;
/// Tries of one layer when the connection breaks.
const ATTEMPTS: usize = 3;
/// Indexes that may lead to indexes before one leads to a manifest.
const NESTED_MAX: usize = 4;

/// Where registries are and how they are spoken to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct RegistryConfig {
    /// By registry (`docker.io`), or `*` for all: asked in order, before the registry itself.
    pub mirrors: BTreeMap<String, Vec<Mirror>>,
    /// Hosts (`host` or `host:port`) spoken to in plain HTTP.
    pub insecure: Vec<String>,
    /// Seconds for a connection to come about, and for the next byte to come.
    pub connect_timeout_seconds: u64,
    pub read_timeout_seconds: u64,
}

/// `http://host:port` or `https://host:port`.
pub type Mirror = String;

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            mirrors: BTreeMap::new(),
            insecure: Vec::new(),
            connect_timeout_seconds: 10,
            read_timeout_seconds: 30,
        }
    }
}

impl RegistryConfig {
    /// Reads a JSON file; without one, the defaults.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(crate::files::read_json(path).map_err(failed)?.unwrap_or_default())
    }

    /// Places to ask, in order.
    fn endpoints(&self, domain: &str) -> Vec<Endpoint> {
        let mirrors = [domain, "*"].into_iter().filter_map(|key| self.mirrors.get(key)).flatten();
        let mut all: Vec<Endpoint> = mirrors.map(|m| Endpoint::mirror(m)).collect();
        let plain = is_loopback(domain) || self.insecure.iter().any(|host| host == domain);
        all.push(Endpoint { host: domain.to_owned(), plain, mirror: false });
        all
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Endpoint {
    host: String,
    plain: bool,
    mirror: bool,
}

impl Endpoint {
    fn mirror(url: &str) -> Self {
        let plain = url.starts_with("http://");
        let host = url.trim_start_matches("http://").trim_start_matches("https://").trim_end_matches('/');
        Self { host: host.to_owned(), plain, mirror: true }
    }

    fn target(&self, reference: &Reference, digest: Option<&str>) -> Target {
        let (domain, path) = (reference.domain.clone(), reference.path.clone());
        let mut target = match digest {
            Some(digest) => Target::with_digest(domain, path, digest.to_owned()),
            None => Target::with_tag(domain, path, reference.tag.clone().unwrap_or_default()),
        };
        if self.mirror {
            target.set_mirror_registry(self.host.clone());
        }
        target
    }

    fn url(&self, reference: &Reference) -> String {
        let scheme = if self.plain { "http" } else { "https" };
        let host = if self.host == "docker.io" { "registry-1.docker.io" } else { &self.host };
        format!("{scheme}://{host}/v2/{}/manifests/{}", reference.path, reference.object())
    }

    fn client(&self, config: &RegistryConfig) -> Client {
        Client::new(ClientConfig {
            protocol: if self.plain { ClientProtocol::Http } else { ClientProtocol::Https },
            use_monolithic_push: true,
            platform_resolver: None,
            connect_timeout: Some(Duration::from_secs(config.connect_timeout_seconds)),
            read_timeout: Some(Duration::from_secs(config.read_timeout_seconds)),
            user_agent: concat!("minke/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
    }
}

fn is_loopback(domain: &str) -> bool {
    let host = match domain.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => domain.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn credentials(auth: &Auth) -> RegistryAuth {
    match auth {
        Auth::Anonymous => RegistryAuth::Anonymous,
        Auth::Basic { username, password } => RegistryAuth::Basic(username.clone(), password.clone()),
        Auth::Bearer { token } => RegistryAuth::Bearer(token.clone()),
    }
}

pub async fn pull(store: &ImageStore, name: &str, auth: Auth, progress: Option<Progress>) -> Result<Image> {
    let reference = Reference::parse(name)?;
    let full = reference.to_string();
    // One pull of the same thing at a time; who had to wait takes what came of it.
    let key = format!("{full} {auth:?}");
    let turn = store.inner.pulls.lock().await.entry(key.clone()).or_default().clone();
    let (turn, waited) = match turn.clone().try_lock_owned() {
        Ok(guard) => (guard, false),
        Err(_) => (turn.lock_owned().await, true),
    };
    let found = match waited.then(|| store.lookup(&full)) {
        Some(Ok(Some(image))) => Ok(image),
        _ => fetch(store, &reference, &auth, progress.as_ref()).await.map_err(|e| {
            let text = format!("failed to pull and unpack image {full:?}: {e}");
            match e {
                Error::NotFound(_) => Error::NotFound(text),
                Error::Timeout(_) => Error::Timeout(text),
                _ => Error::Failed(text),
            }
        }),
    };
    drop(turn);
    let mut pulls = store.inner.pulls.lock().await;
    if pulls.get(&key).is_some_and(|turn| Arc::strong_count(turn) == 1) {
        pulls.remove(&key);
    }
    found
}

async fn fetch(
    store: &ImageStore,
    reference: &Reference,
    auth: &Auth,
    progress: Option<&Progress>,
) -> Result<Image> {
    let config = &store.inner.registries;
    let mut last = None;
    for endpoint in config.endpoints(&reference.domain) {
        let client = endpoint.client(config);
        // The credentials are the registry's; a mirror gets none of them.
        let auth = if endpoint.mirror { RegistryAuth::Anonymous } else { credentials(auth) };
        client.store_auth_if_needed(endpoint.target(reference, None).resolve_registry(), &auth).await;
        let remote = Remote { store, client, endpoint, reference, auth };
        match remote.fetch(progress).await {
            Ok(image) => return Ok(image),
            Err(e) if remote.endpoint.mirror => {
                tracing::debug!(mirror = %remote.endpoint.host, error = %e, "mirror failed")
            }
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| Error::Failed("no registry to ask".to_owned())))
}

/// One place to fetch one image from.
struct Remote<'a> {
    store: &'a ImageStore,
    client: Client,
    endpoint: Endpoint,
    reference: &'a Reference,
    auth: RegistryAuth,
}

impl Remote<'_> {
    async fn fetch(&self, progress: Option<&Progress>) -> Result<Image> {
        let store = self.store;
        let lock = {
            let store = store.clone();
            blocking(move || store.transfer_lock()).await?
        };
        let full = self.reference.to_string();
        let resolve = self.manifest(self.reference.digest.as_deref());
        let (mut bytes, top) = resolve.await.map_err(|e| self.resolve_error(&e))?;
        let mut digest = top.clone();
        let mut nested = 0;
        let manifest = loop {
            let document: Document = serde_json::from_slice(&bytes)
                .map_err(|e| Error::Failed(format!("manifest {digest}: {e}")))?;
            if document.config.is_some() {
                break document;
            }
            nested += 1;
            let mut entries = document.manifests.iter();
            let chosen = entries.find(|d| d.platform.is_some() && fits(d.platform.as_ref()));
            let chosen = match (chosen, nested > NESTED_MAX) {
                (Some(chosen), false) => chosen,
                _ => {
                    let arch = own_architecture();
                    return Err(Error::NotFound(format!(
                        "no match for platform in manifest: linux/{arch}: not found"
                    )));
                }
            };
            (bytes, digest) =
                self.manifest(Some(&chosen.digest)).await.map_err(|e| self.resolve_error(&e))?;
        };
        let config =
            manifest.config.as_ref().ok_or_else(|| Error::Failed("a manifest without config".into()))?;
        if config.size > DOCUMENT_MAX {
            return Err(Error::Failed(format!("a configuration of {} bytes", config.size)));
        }
        store.inner.blobs.put(&bytes).map_err(failed)?;
        if let Some(progress) = progress {
            progress(ProgressEvent::Total { bytes: manifest.layers.iter().map(|l| l.size).sum() });
        }
        let mut wanted: Vec<Descriptor> = std::iter::once(config).chain(&manifest.layers).cloned().collect();
        // The same layer can come twice in an image.
        let mut seen = std::collections::BTreeSet::new();
        wanted.retain(|blob| seen.insert(blob.digest.clone()));
        futures_util::stream::iter(wanted)
            .map(|blob| async move { self.blob(&blob, progress).await })
            .buffer_unordered(DOWNLOADS)
            .try_collect::<Vec<()>>()
            .await?;
        let config = store.inner.blobs.bytes(&config.digest, DOCUMENT_MAX).map_err(failed)?;
        let layers =
            manifest.layers.iter().map(|l| (l.digest.clone(), l.size, l.media_type.clone())).collect();
        let found = Transferred { manifest_digest: digest.clone(), config, layers };
        let repository = self.reference.repository();
        let mut digests = vec![format!("{repository}@{top}")];
        if self.reference.digest.is_some() {
            digests.push(full.clone());
        }
        let tags: Vec<String> = if self.reference.digest.is_none() { vec![full.clone()] } else { Vec::new() };
        let (admitting, progress) = (store.clone(), progress.cloned());
        let id = blocking(move || {
            let _lock = lock;
            admitting.admit(&found, Names { tags: &tags, digests: &digests }, progress.as_ref())
        })
        .await?;
        store.lookup(&id)?.ok_or_else(|| Error::NotFound(format!("image {full:?} not found")))
    }

    /// A manifest or index, checked against its digest.
    async fn manifest(&self, digest: Option<&str>) -> Result<(Vec<u8>, String), OciDistributionError> {
        let target = self.endpoint.target(self.reference, digest);
        let (bytes, _) = self.client.pull_manifest_raw(&target, &self.auth, ACCEPTED).await?;
        let got = digest_of(&bytes);
        if digest.is_some_and(|want| want != got) || bytes.len() as u64 > DOCUMENT_MAX {
            let text = format!("content of {digest:?} has digest {got} and {} bytes", bytes.len());
            return Err(OciDistributionError::GenericError(Some(text)));
        }
        Ok((bytes.to_vec(), got))
    }

    async fn blob(&self, blob: &Descriptor, progress: Option<&Progress>) -> Result<()> {
        if self.store.inner.blobs.contains(&blob.digest) {
            if let Some(progress) = progress {
                progress(ProgressEvent::Transferred { bytes: blob.size });
            }
            return Ok(());
        }
        let mut attempt = 1;
        loop {
            match self.blob_once(blob, progress).await {
                Err(e) if attempt < ATTEMPTS && matches!(e, Error::Timeout(_)) => attempt += 1,
                done => return done,
            }
        }
    }

    /// Network trouble is [`Error::Timeout`]: worth another try.
    async fn blob_once(&self, blob: &Descriptor, progress: Option<&Progress>) -> Result<()> {
        let digest = &blob.digest;
        let network = |e: String| Error::Timeout(format!("failed to copy: {digest}: {e}"));
        let target = self.endpoint.target(self.reference, Some(digest));
        let mut stream =
            self.client.pull_blob_stream(&target, digest.as_str()).await.map_err(|e| match e {
                OciDistributionError::RequestError(e) => network(chain(&e)),
                e => Error::Failed(format!("failed to copy: {digest}: {e}")),
            })?;
        let mut file = self.store.inner.blobs.create().map_err(failed)?;
        while let Some(chunk) = stream.stream.next().await {
            let chunk = chunk.map_err(|e| network(chain(&e)))?;
            file.write_all(&chunk).map_err(failed)?;
            if file.size() > blob.size {
                return Err(Error::Failed(format!(
                    "{digest} is longer than the {} bytes announced",
                    blob.size
                )));
            }
            if let Some(progress) = progress {
                progress(ProgressEvent::Transferred { bytes: chunk.len() as u64 });
            }
        }
        let size = file.size();
        if size != blob.size {
            return Err(network(format!("unexpected EOF: {size} of {} bytes", blob.size)));
        }
        file.commit_as(digest).map(drop).map_err(failed)
    }

    /// In containerd's words, which is what people search for.
    fn resolve_error(&self, error: &OciDistributionError) -> Error {
        let full = self.reference.to_string();
        let prefix = format!("failed to resolve reference {full:?}");
        let url = self.endpoint.url(self.reference);
        let not_found = || Error::NotFound(format!("{prefix}: {full}: not found"));
        let denied = || {
            Error::Failed(format!(
                "{prefix}: pull access denied, repository does not exist or may require authorization: \
                 authorization failed: no basic auth credentials"
            ))
        };
        match error {
            OciDistributionError::ImageManifestNotFoundError(_) => not_found(),
            OciDistributionError::RegistryError { envelope, .. } => {
                let text = envelope.to_string();
                let code = |wanted: &[&str]| {
                    envelope.errors.iter().any(|e| {
                        let code = serde_json::to_value(&e.code).unwrap_or_default();
                        wanted.iter().any(|w| code == *w)
                    })
                };
                if code(&["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND"]) {
                    not_found()
                } else if code(&["UNAUTHORIZED", "DENIED"]) {
                    denied()
                } else {
                    Error::Failed(format!("{prefix}: {text}"))
                }
            }
            OciDistributionError::ServerError { code: 404, .. } => not_found(),
            OciDistributionError::ServerError { code: 401 | 403, .. }
            | OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => denied(),
            OciDistributionError::ServerError { code, .. } => {
                Error::Failed(format!("{prefix}: unexpected status from HEAD request to {url}: {code}"))
            }
            OciDistributionError::RequestError(e) => {
                let text = format!("{prefix}: failed to do request: Head {url:?}: {}", chain(e));
                if e.is_timeout() { Error::Timeout(text) } else { Error::Failed(text) }
            }
            e => Error::Failed(format!("{prefix}: {e}")),
        }
    }
}

/// An error with its causes: reqwest's own text says only that something failed.
fn chain(error: &dyn std::error::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

pub async fn push(store: &ImageStore, name: &str, auth: Auth, progress: Option<Progress>) -> Result<()> {
    let reference = Reference::parse(name)?;
    let index = store.index()?;
    let missing = || Error::NotFound(format!("image {name:?} not found"));
    let id = ImageStore::find(&index, name)?.ok_or_else(missing)?;
    let record = index.images.get(&id).ok_or_else(missing)?;
    let endpoints = store.inner.registries.endpoints(&reference.domain);
    // A mirror is for reading.
    let endpoint = endpoints.last().ok_or_else(|| Error::Failed("no registry to ask".to_owned()))?;
    let client = endpoint.client(&store.inner.registries);
    let target = endpoint.target(&reference, None);
    let failure =
        |e: OciDistributionError| Error::Failed(format!("failed to push {reference}: {}", chain(&e)));
    client.auth(&target, &credentials(&auth), RegistryOperation::Push).await.map_err(failure)?;

    let config_size = store.inner.blobs.size(&id).map_err(failed)?;
    let blobs =
        (record.layers.iter().map(|l| (l.digest.as_str(), l.size))).chain([(id.as_str(), config_size)]);
    if let Some(progress) = &progress {
        progress(ProgressEvent::Total { bytes: record.size });
    }
    for (digest, size) in blobs {
        let by_digest = endpoint.target(&reference, Some(digest));
        if !client.blob_exists(&by_digest, digest).await.map_err(failure)? {
            let file = tokio::fs::File::from_std(store.inner.blobs.read(digest).map_err(failed)?);
            let stream = tokio_util::io::ReaderStream::with_capacity(file, 256 * 1024)
                .map_err(OciDistributionError::IoError);
            client.push_blob_stream(&target, stream, digest, Some(size)).await.map_err(failure)?;
        }
        if let Some(progress) = &progress {
            progress(ProgressEvent::Transferred { bytes: size });
        }
    }
    let manifest = store.inner.blobs.bytes(&record.manifest, DOCUMENT_MAX).map_err(failed)?;
    let media_type = serde_json::from_slice::<serde_json::Value>(&manifest)
        .ok()
        .and_then(|m| m["mediaType"].as_str().map(str::to_owned))
        .unwrap_or_else(|| OCI_MANIFEST.to_owned());
    let media_type = http::HeaderValue::from_str(&media_type).map_err(failed)?;
    client.push_manifest_raw(&target, manifest, media_type).await.map_err(failure)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_first_and_loopback_is_plain() {
        let mut config = RegistryConfig::default();
        config.mirrors.insert("docker.io".into(), vec!["http://mirror:5000/".into()]);
        config.mirrors.insert("*".into(), vec!["https://all".into()]);
        config.insecure.push("old:80".into());
        let hosts = |domain| {
            let all = config.endpoints(domain).into_iter();
            all.map(|e| format!("{}{}", if e.plain { "http " } else { "" }, e.host)).collect::<Vec<_>>()
        };
        assert_eq!(hosts("docker.io"), ["http mirror:5000", "all", "docker.io"]);
        assert_eq!(hosts("localhost:5000"), ["all", "http localhost:5000"]);
        assert_eq!(hosts("127.0.0.1:1"), ["all", "http 127.0.0.1:1"]);
        assert_eq!(hosts("[::1]:1"), ["all", "http [::1]:1"]);
        assert_eq!(hosts("old:80"), ["all", "http old:80"]);
        assert_eq!(hosts("10.0.0.1:80"), ["all", "10.0.0.1:80"]);
    }
}
