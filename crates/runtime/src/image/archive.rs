//! Image archives: what `docker save` and OCI tools write, in and out.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::headers::Headers;
use super::reference::{Reference, parse_digest};
use super::unpack::{decompress, hex};
use super::{ImageStore, Names, Record, Transferred, failed};
use crate::api::{Error, Progress, ProgressEvent, Result};

/// Most bytes of a manifest, an index or a configuration.
pub const DOCUMENT_MAX: u64 = 4 << 20;
/// Most entries of an archive.
const ENTRIES_MAX: usize = 100_000;
/// Depth to which indexes may name indexes, and how many of them are looked into for one image.
const NESTED_MAX: usize = 4;
const LOOKED_INTO_MAX: usize = 1000;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Annotation with the whole reference, which containerd and newer docker write.
const NAME_ANNOTATION: &str = "io.containerd.image.name";
const TAG_ANNOTATION: &str = "org.opencontainers.image.ref.name";

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

impl Platform {
    /// Runs on every machine of the architecture.
    pub fn is_plain(&self) -> bool {
        matches!(self.variant.as_str(), "" | "v1") || self.architecture == "arm64" && self.variant == "v8"
    }
}

/// An index or a manifest: which one is told by what it has.
#[derive(Debug, Clone, Deserialize)]
pub struct Document {
    #[serde(default, deserialize_with = "or_null")]
    pub manifests: Vec<Descriptor>,
    pub config: Option<Descriptor>,
    #[serde(default, deserialize_with = "or_null")]
    pub layers: Vec<Descriptor>,
}

/// A list that is empty can be written as null: tools in Go do it.
fn or_null<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<Descriptor>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// `linux` and the architecture of this program, in Go's words, as images name it.
pub fn own_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// Whether an image for this platform can run here. What does not say, may.
pub fn fits(platform: Option<&Platform>) -> bool {
    platform.is_none_or(|p| {
        (p.os.is_empty() || p.os == "linux")
            && (p.architecture.is_empty() || p.architecture == own_architecture())
    })
}

/// What an archive holds, with every file in the blob store under its digest.
#[derive(Default)]
struct Contents {
    /// Path in the archive to digest and size.
    files: BTreeMap<String, (String, u64)>,
    /// Path to the path it is a link to, which older docker uses for layers that come twice.
    links: BTreeMap<String, String>,
}

impl Contents {
    fn digest(&self, path: &str) -> Option<&(String, u64)> {
        let mut path = path;
        for _ in 0..2 {
            if let Some(found) = self.files.get(path) {
                return Some(found);
            }
            path = self.links.get(path)?;
        }
        self.files.get(path)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, store: &ImageStore, path: &str) -> Result<Option<T>> {
        let Some((digest, _)) = self.digest(path) else { return Ok(None) };
        let bytes = store.inner.blobs.bytes(digest, DOCUMENT_MAX).map_err(failed)?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Some).map_err(|e| Error::Invalid(format!("{path}: {e}")))
    }
}

pub fn load(
    store: &ImageStore,
    archive: impl Read,
    name: Option<&str>,
    progress: Option<&Progress>,
) -> Result<Vec<String>> {
    let contents = read(store, archive, progress)?;
    let name = name.map(Reference::parse).transpose()?;
    let docker: Option<Vec<DockerImage>> = contents.json(store, "manifest.json")?;
    let oci: Option<Document> = match contents.digest("oci-layout") {
        Some(_) => contents.json(store, "index.json")?,
        None => None,
    };
    let mut loaded = Vec::new();
    match (oci, docker) {
        // Docker's newer archives are both; the OCI half keeps the digests of the registry.
        (Some(index), docker) => {
            let tags = docker_tags(&contents, docker.as_deref().unwrap_or_default())?;
            for entry in &index.manifests {
                load_oci(store, entry, &tags, name.as_ref(), progress, &mut loaded)?;
            }
        }
        (None, Some(images)) => {
            for image in &images {
                load_docker(store, &contents, image, name.as_ref(), progress, &mut loaded)?;
            }
        }
        (None, None) => {
            return Err(Error::Invalid(
                "unrecognized image format: neither manifest.json nor oci-layout is in the archive"
                    .to_owned(),
            ));
        }
    }
    if loaded.is_empty() {
        let arch = own_architecture();
        return Err(Error::Invalid(format!("the archive has no image for linux/{arch}")));
    }
    Ok(loaded)
}

/// Takes every file of the archive into the blob store.
fn read(store: &ImageStore, archive: impl Read, progress: Option<&Progress>) -> Result<Contents> {
    let broken = |e: io::Error| Error::Invalid(format!("read image archive: {e}"));
    let mut archive = tar::Archive::new(decompress(archive).map_err(broken)?);
    let mut contents = Contents::default();
    let limits = store.inner.limits;
    let (mut left, mut headers) = (limits.bytes, Headers::new(limits.header));
    for (count, entry) in archive.entries().map_err(broken)?.raw(true).enumerate() {
        let mut entry = match entry {
            // What is wrong with the first header would be told with all of its bytes.
            Err(e)
                if count == 0 && matches!(e.kind(), io::ErrorKind::Other | io::ErrorKind::UnexpectedEof) =>
            {
                return Err(Error::Invalid(
                    "unrecognized image format: this is not a tar archive".to_owned(),
                ));
            }
            entry => entry.map_err(broken)?,
        };
        if count > ENTRIES_MAX {
            return Err(Error::Invalid("the archive has too many entries".to_owned()));
        }
        let Some(extended) = headers.take(&mut entry).map_err(broken)? else { continue };
        let path = extended.path.unwrap_or_else(|| entry.path_bytes().into_owned());
        if path.len() >= limits.path {
            return Err(Error::Invalid("read image archive: a path is too long".to_owned()));
        }
        // Paths are only names here; nothing is made by them.
        let Some(path) = plain(Path::new(OsStr::from_bytes(&path))) else { continue };
        match entry.header().entry_type() {
            tar::EntryType::Regular => {
                let size = entry.header().entry_size().map_err(broken)?;
                if extended.size.is_some_and(|announced| announced != size) {
                    return Err(Error::Invalid(format!("{path}: two sizes are given")));
                }
                left = left
                    .checked_sub(size)
                    .ok_or_else(|| Error::Invalid("the archive is larger than the limit".to_owned()))?;
                let mut blob = store.inner.blobs.create().map_err(failed)?;
                io::copy(&mut entry, &mut blob).map_err(broken)?;
                if blob.size() != size {
                    let got = blob.size();
                    return Err(Error::Invalid(format!("{path}: {size} bytes announced, {got} there")));
                }
                if let Some(hex) = path.strip_prefix("blobs/sha256/") {
                    blob.commit_as(&format!("sha256:{hex}"))
                        .map_err(|e| Error::Invalid(format!("{path}: {e}")))?;
                    contents.files.insert(path.clone(), (format!("sha256:{hex}"), size));
                } else {
                    contents.files.insert(path, blob.commit().map_err(failed)?);
                }
                if let Some(progress) = progress {
                    progress(ProgressEvent::Transferred { bytes: size });
                }
            }
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let target = extended.link.or_else(|| entry.link_name_bytes().map(|name| name.into_owned()));
                let target = PathBuf::from(OsString::from_vec(target.unwrap_or_default()));
                let symbolic = entry.header().entry_type() == tar::EntryType::Symlink;
                let base =
                    if symbolic { Path::new(&path).parent().unwrap_or(Path::new("")) } else { Path::new("") };
                if let Some(target) = plain(&base.join(target)) {
                    contents.links.insert(path, target);
                }
            }
            _ => {}
        }
    }
    Ok(contents)
}

/// A path without `.` and `..`, as a key.
fn plain(path: &Path) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::ParentDir => drop(parts.pop()?),
            _ => {}
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// References by the digest of the configuration, from docker's half of an archive.
fn docker_tags(contents: &Contents, images: &[DockerImage]) -> Result<BTreeMap<String, Vec<String>>> {
    let mut tags = BTreeMap::new();
    for image in images {
        if let Some((digest, _)) = contents.digest(&image.config) {
            tags.insert(digest.clone(), references(image.repo_tags.as_deref())?);
        }
    }
    Ok(tags)
}

fn references(tags: Option<&[String]>) -> Result<Vec<String>> {
    tags.unwrap_or_default().iter().map(|t| Ok(Reference::parse(t)?.to_string())).collect()
}

fn load_oci(
    store: &ImageStore,
    entry: &Descriptor,
    tags: &BTreeMap<String, Vec<String>>,
    name: Option<&Reference>,
    progress: Option<&Progress>,
    loaded: &mut Vec<String>,
) -> Result<()> {
    let mut budget = LOOKED_INTO_MAX;
    let chosen = choose(store, entry, NESTED_MAX, &mut budget)?;
    let Some((manifest_digest, manifest)) = chosen else { return Ok(()) };
    let Some(config) = &manifest.config else { return Ok(()) };
    let bytes = store.inner.blobs.bytes(&config.digest, DOCUMENT_MAX).map_err(failed)?;
    let platform: Platform = serde_json::from_slice(&bytes).map_err(|e| Error::Invalid(e.to_string()))?;
    if !fits(Some(&platform)) {
        return Ok(());
    }
    let mut names: BTreeSet<String> =
        tags.get(&config.digest).cloned().unwrap_or_default().into_iter().collect();
    let annotated = entry.annotations.get(NAME_ANNOTATION).or_else(|| {
        // Many write only the tag here; it counts when it is a whole reference.
        entry.annotations.get(TAG_ANNOTATION).filter(|n| n.contains(['/', ':']))
    });
    if let Some(annotated) = annotated {
        names.insert(Reference::parse(annotated)?.to_string());
    }
    names.extend(name.map(ToString::to_string));
    let layers = manifest.layers.iter().map(|l| {
        // An archive may be without layers of other platforms, never of this one.
        let size = store.inner.blobs.size(&l.digest).map_err(failed)?;
        Ok((l.digest.clone(), size, l.media_type.clone()))
    });
    let layers = layers.collect::<Result<Vec<_>>>()?;
    let found = Transferred { manifest_digest, config: bytes, layers };
    admit(store, &found, names, Some(&entry.digest), progress, loaded)
}

/// The manifest for this platform that a descriptor leads to.
fn choose(
    store: &ImageStore,
    entry: &Descriptor,
    depth: usize,
    budget: &mut usize,
) -> Result<Option<(String, Document)>> {
    if depth == 0 || !fits(entry.platform.as_ref()) || !store.inner.blobs.contains(&entry.digest) {
        return Ok(None);
    }
    *budget =
        budget.checked_sub(1).ok_or_else(|| Error::Invalid(format!("{}: too many indexes", entry.digest)))?;
    let bytes = store.inner.blobs.bytes(&entry.digest, DOCUMENT_MAX).map_err(failed)?;
    let document: Document =
        serde_json::from_slice(&bytes).map_err(|e| Error::Invalid(format!("{}: {e}", entry.digest)))?;
    if document.config.is_some() {
        return Ok(Some((entry.digest.clone(), document)));
    }
    for inner in &document.manifests {
        if let Some(found) = choose(store, inner, depth - 1, budget)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn load_docker(
    store: &ImageStore,
    contents: &Contents,
    image: &DockerImage,
    name: Option<&Reference>,
    progress: Option<&Progress>,
    loaded: &mut Vec<String>,
) -> Result<()> {
    let missing = |path: &str| Error::Invalid(format!("{path} is not in the archive"));
    let (config_digest, config_size) =
        contents.digest(&image.config).ok_or_else(|| missing(&image.config))?;
    let config = store.inner.blobs.bytes(config_digest, DOCUMENT_MAX).map_err(failed)?;
    let platform: Platform = serde_json::from_slice(&config).map_err(|e| Error::Invalid(e.to_string()))?;
    if !fits(Some(&platform)) {
        return Ok(());
    }
    let mut layers = Vec::new();
    for path in image.layers.iter().flatten() {
        let (digest, size) = contents.digest(path).ok_or_else(|| missing(path))?;
        layers.push((digest.clone(), *size, layer_type(store, digest)?.to_owned()));
    }
    // Such an archive has no manifest of the registry's kind; this is the one a push would send.
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": { "mediaType": OCI_CONFIG, "digest": config_digest, "size": config_size },
        "layers": layers.iter().map(|(digest, size, media_type)| {
            json!({ "mediaType": media_type, "digest": digest, "size": size })
        }).collect::<Vec<_>>(),
    });
    let manifest_digest = store.inner.blobs.put(manifest.to_string().as_bytes()).map_err(failed)?;
    let mut names: BTreeSet<String> = references(image.repo_tags.as_deref())?.into_iter().collect();
    names.extend(name.map(ToString::to_string));
    let found = Transferred { manifest_digest, config, layers };
    admit(store, &found, names, None, progress, loaded)
}

fn layer_type(store: &ImageStore, digest: &str) -> Result<&'static str> {
    let mut head = Vec::new();
    store.inner.blobs.read(digest).map_err(failed)?.take(4).read_to_end(&mut head).map_err(failed)?;
    Ok(match super::unpack::sniff(&head) {
        super::unpack::Compression::Plain => OCI_LAYER,
        super::unpack::Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        super::unpack::Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
    })
}

fn admit(
    store: &ImageStore,
    found: &Transferred,
    names: BTreeSet<String>,
    top: Option<&str>,
    progress: Option<&Progress>,
    loaded: &mut Vec<String>,
) -> Result<()> {
    let tags: Vec<String> = names.into_iter().filter(|n| !n.contains('@')).collect();
    let top = top.unwrap_or(&found.manifest_digest);
    let by_digest = |t: &String| Some(format!("{}@{top}", Reference::parse(t).ok()?.repository()));
    let digests: Vec<String> = tags.iter().filter_map(by_digest).collect();
    let id = store.admit(found, Names { tags: &tags, digests: &digests, by_hand: true }, progress)?;
    match tags.is_empty() {
        true => loaded.push(id),
        false => loaded.extend(tags),
    }
    Ok(())
}

/// One archive that is docker's and OCI's at once.
pub fn save(store: &ImageStore, names: &[String], out: impl Write) -> Result<()> {
    let index = store.index()?;
    let mut images: BTreeMap<String, (&Record, Vec<String>)> = BTreeMap::new();
    for name in names {
        let id = ImageStore::find(&index, name)?
            .ok_or_else(|| Error::NotFound(format!("image {name:?} not found")))?;
        let record =
            index.images.get(&id).ok_or_else(|| Error::NotFound(format!("image {name:?} not found")))?;
        let tag = Reference::parse(name).ok().filter(|_| !id.contains(name)).map(|r| r.to_string());
        images.entry(id).or_insert((record, Vec::new())).1.extend(tag);
    }
    let mut tar = tar::Builder::new(out);
    let mut written = BTreeSet::new();
    let (mut manifests, mut docker): (Vec<Value>, Vec<Value>) = Default::default();
    document(&mut tar, "oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
    for (id, (record, tags)) in &images {
        let layers = record.layers.iter().map(|l| l.digest.as_str());
        for digest in layers.chain([id.as_str(), record.manifest.as_str()]) {
            if written.insert(digest.to_owned()) {
                let mut header = header(store.inner.blobs.size(digest).map_err(failed)?);
                let file = store.inner.blobs.read(digest).map_err(failed)?;
                tar.append_data(&mut header, blob_path(digest), file).map_err(failed)?;
            }
        }
        let size = store.inner.blobs.size(&record.manifest).map_err(failed)?;
        let mut entry = json!({ "mediaType": OCI_MANIFEST, "digest": record.manifest, "size": size });
        if tags.is_empty() {
            manifests.push(entry.clone());
        }
        for tag in tags {
            let short = Reference::parse(tag)?.tag.unwrap_or_default();
            entry["annotations"] = json!({ NAME_ANNOTATION: tag, TAG_ANNOTATION: short });
            manifests.push(entry.clone());
        }
        let layers: Vec<String> = record.layers.iter().map(|l| blob_path(&l.digest)).collect();
        docker.push(json!({ "Config": blob_path(id), "RepoTags": tags, "Layers": layers }));
    }
    document(
        &mut tar,
        "index.json",
        &json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests }),
    )?;
    document(&mut tar, "manifest.json", &json!(docker))?;
    tar.into_inner().and_then(|mut out| out.flush()).map_err(failed)
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{}", parse_digest(digest).unwrap_or_default())
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    header
}

fn document(tar: &mut tar::Builder<impl Write>, name: &str, value: &Value) -> Result<()> {
    let text = value.to_string();
    tar.append_data(&mut header(text.len() as u64), name, text.as_bytes()).map_err(failed)
}

/// The digest of some bytes, as descriptors write it.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}
