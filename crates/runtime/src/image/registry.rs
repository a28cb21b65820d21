//! Pulls from and pushes to registries.
//!
//! The hosts that [`super::hosts`] names are asked in order. A layer that breaks off goes on where it stopped,
//! from whichever host; each layer is fetched by one pull at a time, whatever processes want it, and every byte
//! has a digest that it must match before anything else sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use http::{HeaderValue, StatusCode, header};
use reqwest::{Method, Response};

use super::archive::{
    DOCUMENT_MAX, Descriptor, Document, OCI_MANIFEST, Platform, digest_of, fits, own_architecture,
};
use super::blobs::NewBlob;
use super::hosts::Endpoint;
use super::reference::{Reference, parse_digest};
use super::remote::{Failure, Remote, bounded};
use super::{ImageStore, LAYERS_MAX, Layer, Names, Transferred, blocking, failed};
use crate::api::{Auth, Error, Image, Progress, ProgressEvent, Result};

const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*";
/// Layers of one image fetched or sent at the same time, as containerd does it.
const TRANSFERS: usize = 3;
/// Times that a broken layer is gone on with, when less than so many bytes have come since the last time.
const ATTEMPTS: usize = 3;
const PROGRESS_MIN: u64 = 256 << 10;
/// Indexes that may lead to indexes before one leads to a manifest.
const NESTED_MAX: usize = 4;
/// Slowest that an upload may be, in bytes per second.
const UPLOAD_SPEED_MIN: u64 = 50_000;

pub async fn pull(store: &ImageStore, name: &str, auth: Auth, progress: Option<Progress>) -> Result<Image> {
    let reference = Reference::parse(name)?;
    let full = reference.to_string();
    // One pull of the same thing at a time; who had to wait takes what came of it.
    let key = format!("{full} {auth:?}");
    let turn = {
        let mut pulls = store.inner.pulls.lock().expect("short");
        // Those that are over, or were given up.
        pulls.retain(|_, turn| Arc::strong_count(turn) > 1);
        pulls.entry(key).or_default().clone()
    };
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
    found
}

async fn fetch(
    store: &ImageStore,
    reference: &Reference,
    auth: &Auth,
    progress: Option<&Progress>,
) -> Result<Image> {
    let mut last = None;
    let by_tag = reference.digest.is_none();
    for endpoint in store.inner.registries.endpoints(&reference.domain)? {
        // Whoever may only be pulled from cannot be trusted with what a tag means.
        if !endpoint.capabilities.pull || (by_tag && !endpoint.capabilities.resolve) {
            continue;
        }
        let remote = Remote::new(&endpoint, &reference.domain, &reference.path, "pull", auth);
        let fetched = match remote {
            Ok(remote) => Fetch { store, remote, reference }.run(progress).await,
            Err(error) => Err(error),
        };
        match fetched {
            Ok(image) => return Ok(image),
            Err(error) => {
                tracing::debug!(host = %endpoint.base, %error, "Host does not have the image");
                // Of several it is the registry's own answer that counts, which comes last.
                last = Some(error);
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::Failed(format!("failed to resolve reference \"{reference}\": no host that may be pulled from"))
    }))
}

/// One image from one host.
struct Fetch<'a> {
    store: &'a ImageStore,
    remote: Remote,
    reference: &'a Reference,
}

impl Fetch<'_> {
    async fn run(&self, progress: Option<&Progress>) -> Result<Image> {
        let store = self.store;
        let lock = {
            let store = store.clone();
            blocking(move || store.transfer_lock()).await?
        };
        let full = self.reference.to_string();
        let (bytes, top, digest, manifest) = self.resolve().await?;
        let config =
            manifest.config.as_ref().ok_or_else(|| Error::Failed("a manifest without config".into()))?;
        if config.size > DOCUMENT_MAX {
            return Err(Error::Failed(format!("a configuration of {} bytes", config.size)));
        }
        store.inner.blobs.put(&bytes).map_err(failed)?;
        self.check_room(&manifest.layers)?;
        if let Some(progress) = progress {
            progress(ProgressEvent::Total { bytes: size_of(manifest.layers.iter().chain([config])) });
        }
        self.blob(config, progress).await?;
        let config = store.inner.blobs.bytes(&config.digest, DOCUMENT_MAX).map_err(failed)?;
        let layers =
            manifest.layers.iter().map(|l| (l.digest.clone(), l.size, l.media_type.clone())).collect();
        let found = Transferred { manifest_digest: digest, config, layers };
        self.layers(&manifest.layers, found.chain()?, progress).await?;
        let mut digests = vec![format!("{}@{top}", self.reference.repository())];
        let mut tags = Vec::new();
        match self.reference.digest {
            Some(_) => digests.push(full.clone()),
            None => tags.push(full.clone()),
        }
        let (admitting, progress) = (store.clone(), progress.cloned());
        let id = blocking(move || {
            let _lock = lock;
            admitting.admit(
                &found,
                Names { tags: &tags, digests: &digests, by_hand: false },
                progress.as_ref(),
            )
        })
        .await?;
        store.lookup(&id)?.ok_or_else(|| Error::NotFound(format!("image {full:?} not found")))
    }

    /// Nothing is fetched that could not be kept.
    fn check_room(&self, layers: &[Descriptor]) -> Result<()> {
        if layers.len() > LAYERS_MAX {
            return Err(Error::Failed(format!("an image cannot have more than {LAYERS_MAX} layers")));
        }
        let blobs = &self.store.inner.blobs;
        let needed = size_of(layers.iter().filter(|layer| !blobs.contains(&layer.digest)));
        let left = blobs.room().and_then(|room| room.left()).map_err(failed)?;
        if needed > left {
            return Err(Error::Failed(format!(
                "no space left on device: the layers have {needed} bytes, and there is room for {left}"
            )));
        }
        Ok(())
    }

    /// Fetches layers, some at a time, and unpacks each as soon as it and those below it are here.
    async fn layers(
        &self,
        layers: &[Descriptor],
        chain: Vec<Layer>,
        progress: Option<&Progress>,
    ) -> Result<()> {
        // The same layer can come twice in an image; the first of them comes first.
        let mut seen = BTreeSet::new();
        let wanted: Vec<_> = layers.iter().map(|layer| (layer.clone(), seen.insert(&layer.digest))).collect();
        let (arrived, mut ready) = tokio::sync::mpsc::unbounded_channel();
        let fetching = async move {
            let fetched = futures_util::stream::iter(wanted).map(|(layer, first)| async move {
                if first { self.blob(&layer, progress).await } else { Ok(()) }
            });
            let mut fetched = fetched.buffered(TRANSFERS);
            while let Some(()) = fetched.try_next().await? {
                // Whoever unpacks may have failed, which is what is told then.
                let _ = arrived.send(());
            }
            Ok(())
        };
        let unpacking = async {
            let chain = Arc::new(chain);
            for n in 1..=chain.len() {
                let Some(()) = ready.recv().await else { break };
                if let Some(progress) = progress {
                    progress(ProgressEvent::Unpacking { layer: n, layers: chain.len() });
                }
                let (store, chain) = (self.store.clone(), chain.clone());
                blocking(move || store.unpack_layer(&chain[..n])).await?;
            }
            Ok(())
        };
        tokio::try_join!(fetching, unpacking).map(drop)
    }

    /// The manifest for this platform: its bytes, the digest of what the reference names, its own, itself.
    async fn resolve(&self) -> Result<(Vec<u8>, String, String, Document)> {
        let (mut bytes, top) = self.manifest(self.reference.object()).await?;
        let mut digest = top.clone();
        for _ in 0..=NESTED_MAX {
            let document: Document = serde_json::from_slice(&bytes)
                .map_err(|e| Error::Failed(format!("manifest {digest}: {e}")))?;
            if document.config.is_some() {
                return Ok((bytes, top, digest, document));
            }
            let fitting =
                || document.manifests.iter().filter(|d| d.platform.is_some() && fits(d.platform.as_ref()));
            let plain = fitting().find(|d| d.platform.as_ref().is_some_and(Platform::is_plain));
            let Some(chosen) = plain.or_else(|| fitting().next()) else { break };
            digest = chosen.digest.clone();
            (bytes, _) = self.manifest(&digest).await?;
        }
        let arch = own_architecture();
        Err(Error::NotFound(format!("no match for platform in manifest: linux/{arch}: not found")))
    }

    /// A manifest or index by its tag or digest, checked against the latter.
    async fn manifest(&self, object: &str) -> Result<(Vec<u8>, String)> {
        let url = self.remote.url(&format!("{}/manifests/{object}", self.reference.path));
        // Upstream asks with HEAD first, so that is what its messages name.
        let named = Method::HEAD;
        let answer = self.remote.send(Method::GET, &url, |r| r.header(header::ACCEPT, ACCEPTED)).await;
        let response = match answer {
            Ok(response) if response.status().is_success() => response,
            Ok(response) => return Err(self.resolve_error(Failure::of(&named, &url, response).await)),
            Err(Failure::Network { text, timeout }) => {
                let text = text.replacen("request: Get", "request: Head", 1);
                return Err(self.resolve_error(Failure::Network { text, timeout }));
            }
            Err(failure) => return Err(self.resolve_error(failure)),
        };
        let bytes = bounded(response, DOCUMENT_MAX as usize).await;
        let bytes = bytes.map_err(|e| self.resolve_error(Failure::Other(e)))?;
        let got = digest_of(&bytes);
        if object.starts_with("sha256:") && object != got {
            return Err(self.resolve_error(Failure::Other(format!(
                "unexpected commit digest {got}, expected {object}"
            ))));
        }
        Ok((bytes, got))
    }

    async fn blob(&self, blob: &Descriptor, progress: Option<&Progress>) -> Result<()> {
        let arrived = |bytes: u64| {
            if let Some(progress) = progress {
                progress(ProgressEvent::Transferred { bytes });
            }
        };
        // Waits for whoever fetches the same, here or in another process.
        let (store, digest) = (self.store.clone(), blob.digest.clone());
        let begun = blocking(move || store.inner.blobs.resume(&digest).map_err(failed)).await?;
        let Some(mut file) = begun else {
            arrived(blob.size);
            let size = self.store.inner.blobs.size(&blob.digest).map_err(failed)?;
            return match size == blob.size {
                true => Ok(()),
                false => Err(Error::Failed(format!(
                    "failed to copy: {}: it has {size} bytes, not the {} announced",
                    blob.digest, blob.size
                ))),
            };
        };
        let _permit = self.store.inner.downloads.acquire().await.map_err(failed)?;
        arrived(file.size().min(blob.size));
        let mut attempt = 0;
        while file.size() < blob.size || attempt == 0 {
            let before = file.size();
            match self.blob_once(blob, &mut file, &arrived).await {
                Ok(()) => break,
                Err(Failure::Network { .. }) if file.size() >= before + PROGRESS_MIN => attempt = 1,
                Err(Failure::Network { .. }) if attempt + 1 < ATTEMPTS => attempt += 1,
                Err(failure) => {
                    let text = format!("failed to copy: {}: {failure}", blob.digest);
                    return Err(match failure {
                        Failure::Network { timeout: true, .. } => Error::Timeout(text),
                        _ => Error::Failed(text),
                    });
                }
            }
        }
        let digest = blob.digest.clone();
        let wrong = move |e| Error::Failed(format!("failed to copy: {e}"));
        blocking(move || file.commit_as(&digest).map(drop).map_err(wrong)).await
    }

    /// Adds what is missing of a blob, from where it stopped when the host can do that.
    async fn blob_once(
        &self,
        blob: &Descriptor,
        file: &mut NewBlob,
        arrived: &impl Fn(u64),
    ) -> Result<(), Failure> {
        let disk = |e: std::io::Error| Failure::Other(e.to_string());
        if file.size() > blob.size {
            file.restart().map_err(disk)?;
        }
        if file.size() == blob.size && blob.size > 0 {
            return Ok(());
        }
        let url = self.remote.url(&format!("{}/blobs/{}", self.reference.path, blob.digest));
        let have = file.size();
        let response = self
            .remote
            .send(Method::GET, &url, |request| match have {
                0 => request,
                have => request.header(header::RANGE, format!("bytes={have}-")),
            })
            .await?;
        let response = match response.status() {
            StatusCode::PARTIAL_CONTENT if begins_at(&response) == Some(have) => response,
            StatusCode::OK => {
                file.restart().map_err(disk)?;
                response
            }
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                file.restart().map_err(disk)?;
                return Err(Failure::Network { text: "the range that was asked for".into(), timeout: false });
            }
            _ => return Err(Failure::of(&Method::GET, &url, response).await),
        };
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| Failure::broken(&e))?;
            if file.size() + chunk.len() as u64 > blob.size {
                file.restart().map_err(disk)?;
                let text = format!("longer than the {} bytes announced", blob.size);
                return Err(Failure::Other(text));
            }
            file.write_all(&chunk).map_err(disk)?;
            arrived(chunk.len() as u64);
        }
        if file.size() != blob.size {
            let text = format!("unexpected EOF: {} of {} bytes", file.size(), blob.size);
            return Err(Failure::Network { text, timeout: false });
        }
        Ok(())
    }

    /// In containerd's words, which is what people search for.
    fn resolve_error(&self, failure: Failure) -> Error {
        let full = self.reference.to_string();
        let prefix = format!("failed to resolve reference {full:?}");
        match failure {
            Failure::NotFound => Error::NotFound(format!("{prefix}: {full}: not found")),
            Failure::Denied(why) => Error::Failed(format!(
                "{prefix}: pull access denied, repository does not exist or may require authorization: {why}"
            )),
            Failure::Network { text, timeout: true } => Error::Timeout(format!("{prefix}: {text}")),
            Failure::Network { text, .. } | Failure::Other(text) => {
                Error::Failed(format!("{prefix}: {text}"))
            }
        }
    }
}

/// Bytes of blobs as they are announced, which can be any number.
fn size_of<'a>(blobs: impl Iterator<Item = &'a Descriptor>) -> u64 {
    let sizes: BTreeMap<&str, u64> = blobs.map(|blob| (blob.digest.as_str(), blob.size)).collect();
    sizes.values().fold(0, |sum, size| sum.saturating_add(*size))
}

/// Where a part begins: `bytes 5-9/10`.
fn begins_at(response: &Response) -> Option<u64> {
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

pub async fn push(store: &ImageStore, name: &str, auth: Auth, progress: Option<Progress>) -> Result<()> {
    let reference = Reference::parse(name)?;
    let index = store.index()?;
    let missing = || Error::NotFound(format!("image {name:?} not found"));
    let id = ImageStore::find(&index, name)?.ok_or_else(missing)?;
    let record = index.images.get(&id).ok_or_else(missing)?;
    let endpoints = store.inner.registries.endpoints(&reference.domain)?;
    // The registry itself is the last.
    let endpoint = endpoints.into_iter().rfind(|e| e.capabilities.push);
    let endpoint =
        endpoint.ok_or_else(|| Error::Failed(format!("{}: no host may be pushed to", reference.domain)))?;
    let answers_within = endpoint.connect_timeout + endpoint.read_timeout;
    // While an upload runs nothing is read; it has a limit of its own.
    let patient = Endpoint { read_timeout: Duration::from_secs(24 * 3600), ..endpoint };
    let remote = Remote::new(&patient, &reference.domain, &reference.path, "pull,push", &auth)?;
    let push = Push { store, remote, reference: &reference, answers_within };
    let failure = |e: Failure| match e {
        Failure::Denied(why) => Error::Failed(format!(
            "failed to push {reference}: push access denied, repository does not exist or may require authorization: {why}"
        )),
        e => Error::Failed(format!("failed to push {reference}: {e}")),
    };
    let config_size = store.inner.blobs.size(&id).map_err(failed)?;
    let mut blobs: Vec<(&str, u64)> = record.layers.iter().map(|l| (l.digest.as_str(), l.size)).collect();
    blobs.push((id.as_str(), config_size));
    let mut seen = BTreeSet::new();
    blobs.retain(|(digest, _)| seen.insert(*digest));
    if let Some(progress) = &progress {
        progress(ProgressEvent::Total { bytes: blobs.iter().map(|(_, size)| size).sum() });
    }
    let sent =
        futures_util::stream::iter(blobs).map(Ok).try_for_each_concurrent(TRANSFERS, |(digest, size)| {
            let (push, progress) = (&push, &progress);
            async move {
                push.blob(digest, size).await?;
                if let Some(progress) = progress {
                    progress(ProgressEvent::Transferred { bytes: size });
                }
                Ok(())
            }
        });
    sent.await.map_err(failure)?;
    push.manifest(&record.manifest).await.map_err(failure)
}

/// One image to one host.
struct Push<'a> {
    store: &'a ImageStore,
    remote: Remote,
    reference: &'a Reference,
    answers_within: Duration,
}

impl Push<'_> {
    async fn blob(&self, digest: &str, size: u64) -> Result<(), Failure> {
        let path = &self.reference.path;
        let url = self.remote.url(&format!("{path}/blobs/{digest}"));
        let answer = self.remote.send(Method::HEAD, &url, |r| r.timeout(self.answers_within)).await?;
        if answer.status().is_success() {
            return Ok(());
        }
        let url = self.remote.url(&format!("{path}/blobs/uploads/"));
        let begin =
            |r: reqwest::RequestBuilder| r.timeout(self.answers_within).header(header::CONTENT_LENGTH, "0");
        let answer = self.remote.send(Method::POST, &url, begin).await?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(Failure::of(&Method::POST, &url, answer).await);
        }
        let location = answer.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
        let location = location.and_then(|location| answer.url().join(location).ok());
        let mut location =
            location.ok_or_else(|| Failure::Other("the registry says nowhere to upload to".into()))?;
        location.query_pairs_mut().append_pair("digest", digest);
        let limit = self.answers_within + Duration::from_secs(size / UPLOAD_SPEED_MIN);
        let url = location.as_str();
        let blobs = &self.store.inner.blobs;
        let answer = self
            .remote
            .send(Method::PUT, url, |request| {
                let request = request
                    .timeout(limit)
                    .header(header::CONTENT_TYPE, "application/octet-stream")
                    .header(header::CONTENT_LENGTH, size);
                match blobs.read(digest) {
                    Ok(file) => {
                        let file = tokio::fs::File::from_std(file);
                        let stream = tokio_util::io::ReaderStream::with_capacity(file, 256 * 1024);
                        request.body(reqwest::Body::wrap_stream(stream))
                    }
                    // It was there a moment ago; the registry will say that bytes are missing.
                    Err(_) => request,
                }
            })
            .await?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(Failure::of(&Method::PUT, url, answer).await),
        }
    }

    async fn manifest(&self, digest: &str) -> Result<(), Failure> {
        let other = |e: &dyn std::fmt::Display| Failure::Other(e.to_string());
        let manifest = self.store.inner.blobs.bytes(digest, DOCUMENT_MAX).map_err(|e| other(&e))?;
        let media_type = serde_json::from_slice::<serde_json::Value>(&manifest)
            .ok()
            .and_then(|m| m["mediaType"].as_str().map(str::to_owned))
            .unwrap_or_else(|| OCI_MANIFEST.to_owned());
        let media_type = HeaderValue::from_str(&media_type).map_err(|e| other(&e))?;
        let object = self.reference.object();
        if parse_digest(object).is_some_and(|_| object != digest) {
            return Err(Failure::Other(format!("the image's manifest is {digest}, not {object}")));
        }
        let url = self.remote.url(&format!("{}/manifests/{object}", self.reference.path));
        let put = |request: reqwest::RequestBuilder| {
            let request =
                request.timeout(self.answers_within).header(header::CONTENT_TYPE, media_type.clone());
            request.body(manifest.clone())
        };
        let answer = self.remote.send(Method::PUT, &url, put).await?;
        match answer.status().is_success() {
            true => Ok(()),
            false => Err(Failure::of(&Method::PUT, &url, answer).await),
        }
    }
}
