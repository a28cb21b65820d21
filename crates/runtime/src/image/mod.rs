//! The images of a node: contents by digest, unpacked layers, and which reference means which image.
//!
//! ```text
//! <root>/images/index.json            references and images
//! <root>/images/blobs/sha256/<hex>    manifests, configurations, layers as transferred
//! <root>/snapshots/<24 hex>           one unpacked layer each, named by its chain of layers
//! ```
//! What is there is whole: everything is made under a temporary name, synced and renamed. Several processes
//! may use a store at once (the agent, and `minke image` on the command line).

mod archive;
mod blobs;
pub mod build;
pub mod caches;
mod headers;
pub(crate) mod hosts;
pub mod reference;
mod registry;
pub(crate) mod remote;
mod room;
mod unpack;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use async_trait::async_trait;
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::hosts::RegistryConfig;
pub use self::unpack::Limits;

use self::blobs::Blobs;
use self::reference::{Reference, parse_digest};
use crate::api::{Auth, Error, Image, ImageConfig, ImageService, Progress, ProgressEvent, Result};
use crate::files;

/// Overlayfs takes so many lower layers with names as long as ours.
const LAYERS_MAX: usize = 127;

/// Names of snapshots are this many hexadecimal digits of the chain's digest, so that 127 of them fit into
/// the page that `mount` takes. The index knows the whole digest, and a clash is an error.
const SNAPSHOT_NAME: usize = 24;

/// Layers fetched at the same time, whatever number of pulls there is.
const DOWNLOADS_MAX: usize = 8;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Index {
    /// By the digest of the configuration.
    images: BTreeMap<String, Record>,
    /// `docker.io/library/nginx:1.27` to the image's id.
    tags: BTreeMap<String, String>,
    /// `docker.io/library/nginx@sha256:...`, the digest of an index or a manifest, to the image's id.
    digests: BTreeMap<String, String>,
    /// What steps of builds came to, by the key of what they depend on.
    #[serde(default)]
    built: BTreeMap<String, build::Outcome>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    manifest: String,
    size: u64,
    layers: Vec<Layer>,
    created: Option<jiff::Timestamp>,
    config: ImageConfig,
    /// A person put it here: nobody but a person takes it away.
    #[serde(default)]
    by_hand: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Layer {
    /// Of the bytes as transferred.
    digest: String,
    size: u64,
    media_type: String,
    /// Of the plain archive.
    diff_id: String,
    /// Of this layer on those below it.
    chain_id: String,
}

impl Layer {
    fn snapshot(&self) -> String {
        snapshot_name(&self.chain_id)
    }
}

fn snapshot_name(chain_id: &str) -> String {
    let hex = parse_digest(chain_id).unwrap_or_default();
    hex[..SNAPSHOT_NAME.min(hex.len())].to_owned()
}

/// Names a layer on top of others.
fn chain_id(below: Option<&Layer>, diff_id: &str) -> String {
    match below {
        None => diff_id.to_owned(),
        Some(below) => {
            let text = format!("{} {diff_id}", below.chain_id);
            format!("sha256:{}", unpack::hex(&Sha256::digest(text)))
        }
    }
}

/// What a transfer found out about an image, to be unpacked and entered into the index.
struct Transferred {
    manifest_digest: String,
    config: Vec<u8>,
    /// `(digest, size, media type)`, bottom first.
    layers: Vec<(String, u64, String)>,
}

impl Transferred {
    fn id(&self) -> String {
        format!("sha256:{}", unpack::hex(&Sha256::digest(&self.config)))
    }

    fn configuration(&self) -> Result<ImageConfiguration> {
        configuration(&self.config)
            .map_err(|e| Error::Failed(format!("image configuration {}: {e}", self.id())))
    }

    /// The layers as the configuration names them.
    fn chain(&self) -> Result<Vec<Layer>> {
        let (id, config) = (self.id(), self.configuration()?);
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != self.layers.len() || diff_ids.len() > LAYERS_MAX {
            let (n, m) = (self.layers.len(), diff_ids.len());
            return Err(Error::Failed(format!("image {id} has {n} layers, and its configuration names {m}")));
        }
        let mut layers: Vec<Layer> = Vec::new();
        for ((digest, size, media_type), diff_id) in self.layers.iter().zip(diff_ids) {
            if parse_digest(diff_id).is_none() || parse_digest(digest).is_none() {
                return Err(Error::Failed(format!("image {id}: unsupported digest {diff_id:?}")));
            }
            let chain_id = chain_id(layers.last(), diff_id);
            let (digest, media_type) = (digest.clone(), media_type.clone());
            layers.push(Layer { digest, size: *size, media_type, diff_id: diff_id.clone(), chain_id });
        }
        Ok(layers)
    }
}

/// What a container needs of an image.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub id: String,
    pub config: ImageConfig,
    /// Topmost first, as overlayfs wants them, below `<root>/snapshots`.
    pub layers: Vec<String>,
}

/// The images of a node. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    blobs: Blobs,
    limits: Limits,
    registries: RegistryConfig,
    /// The index as last read, with the file's identity then.
    cached: Mutex<Option<(Stamp, Arc<Index>)>>,
    /// Pulls under way, so that the same one is not made twice.
    pulls: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Layers that are being fetched, of all pulls together.
    downloads: tokio::sync::Semaphore,
    /// Images that are being built here, for containers to be made of.
    drafts: Mutex<BTreeMap<String, Prepared>>,
    /// One unpacking at a time for each snapshot.
    unpacking: Mutex<BTreeMap<String, Arc<Mutex<()>>>>,
}

type Stamp = Option<(SystemTime, u64)>;

pub(crate) fn failed(e: impl std::fmt::Display) -> Error {
    Error::Failed(e.to_string())
}

impl ImageStore {
    /// Opens the store below `root`, making it when there is none.
    pub fn open(root: &Path, registries: RegistryConfig) -> Result<Self> {
        let images = root.join("images");
        let blobs = Blobs::open(&images).map_err(failed)?;
        fs::create_dir_all(root.join("snapshots")).map_err(failed)?;
        let store = Self {
            inner: Arc::new(Inner {
                root: root.to_owned(),
                blobs,
                limits: Limits::default(),
                registries,
                cached: Mutex::new(None),
                pulls: Default::default(),
                downloads: tokio::sync::Semaphore::new(DOWNLOADS_MAX),
                drafts: Default::default(),
                unpacking: Default::default(),
            }),
        };
        store.collect_garbage();
        Ok(store)
    }

    fn images_dir(&self) -> PathBuf {
        self.inner.root.join("images")
    }

    fn snapshots_dir(&self) -> PathBuf {
        self.inner.root.join("snapshots")
    }

    /// The index as it is now; another process may have changed it.
    fn index(&self) -> Result<Arc<Index>> {
        use std::os::unix::fs::MetadataExt;
        let path = self.images_dir().join("index.json");
        let stamp: Stamp = fs::metadata(&path).ok().and_then(|m| Some((m.modified().ok()?, m.ino())));
        let mut cached = self.inner.cached.lock().expect("no panic while the index is held");
        if let Some((known, index)) = &*cached
            && *known == stamp
        {
            return Ok(index.clone());
        }
        let index: Arc<Index> = Arc::new(files::read_json(&path).map_err(failed)?.unwrap_or_default());
        *cached = Some((stamp, index.clone()));
        Ok(index)
    }

    /// Changes the index on disk, alone among all processes.
    fn change<T>(&self, change: impl FnOnce(&mut Index) -> Result<T>) -> Result<T> {
        let _lock = self.lock("index.lock", rustix::fs::FlockOperation::LockExclusive)?;
        let mut index = (*self.index()?).clone();
        let out = change(&mut index)?;
        files::write_json_synced(&self.images_dir().join("index.json"), &index).map_err(failed)?;
        *self.inner.cached.lock().expect("no panic while the index is held") = None;
        Ok(out)
    }

    fn lock(&self, name: &str, how: rustix::fs::FlockOperation) -> Result<File> {
        let path = self.images_dir().join(name);
        let file = File::options().create(true).append(true).open(path).map_err(failed)?;
        rustix::fs::flock(&file, how).map_err(failed)?;
        Ok(file)
    }

    /// Keeps blobs and snapshots that no image names yet from being collected.
    pub(crate) fn transfer_lock(&self) -> Result<File> {
        self.lock("transfer.lock", rustix::fs::FlockOperation::LockShared)
    }

    /// The id a reference, an id or the beginning of one stands for.
    fn find(index: &Index, reference: &str) -> Result<Option<String>> {
        let bare = reference.strip_prefix("sha256:").unwrap_or(reference);
        let hex = bare.len() >= 6 && bare.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex {
            let prefix = format!("sha256:{bare}");
            let mut matching =
                index.images.range(prefix.clone()..).take_while(|(id, _)| id.starts_with(&prefix));
            if let Some((id, _)) = matching.next() {
                return match matching.next() {
                    Some(_) => Err(Error::Invalid(format!("image id {reference:?} is ambiguous"))),
                    None => Ok(Some(id.clone())),
                };
            }
            if bare.len() == 64 {
                return Ok(None);
            }
        }
        let parsed = Reference::parse(reference)?;
        let full = parsed.to_string();
        Ok(index.tags.get(&full).or_else(|| index.digests.get(&full)).cloned())
    }

    fn image(index: &Index, id: &str) -> Option<Image> {
        let record = index.images.get(id)?;
        let of = |map: &BTreeMap<String, String>| -> Vec<String> {
            map.iter().filter(|(_, v)| *v == id).map(|(k, _)| k.clone()).collect()
        };
        Some(Image {
            id: id.to_owned(),
            tags: of(&index.tags),
            digests: of(&index.digests),
            size: record.size,
            created: record.created,
            config: record.config.clone(),
            pinned: record.by_hand,
        })
    }

    fn lookup(&self, reference: &str) -> Result<Option<Image>> {
        let index = self.index()?;
        Ok(Self::find(&index, reference)?.and_then(|id| Self::image(&index, &id)))
    }

    /// What a container of this image needs.
    pub fn prepare(&self, reference: &str) -> Result<Prepared> {
        if let Some(draft) = self.inner.drafts.lock().expect("short").get(reference) {
            return Ok(draft.clone());
        }
        let missing = || Error::NotFound(format!("image {reference:?} not found"));
        let index = self.index()?;
        let id = Self::find(&index, reference)?.ok_or_else(missing)?;
        let record = index.images.get(&id).ok_or_else(missing)?;
        Ok(Prepared {
            config: record.config.clone(),
            layers: record.layers.iter().rev().map(Layer::snapshot).collect(),
            id,
        })
    }

    /// Loads an archive as `docker save` or OCI tools write it, plain or compressed. Returns the references
    /// (or, for an image without one, the id) of what it held. `name` tags an image that has no reference.
    pub async fn load(
        &self,
        archive: impl io::Read + Send + 'static,
        name: Option<&str>,
        progress: Option<Progress>,
    ) -> Result<Vec<String>> {
        let (store, name) = (self.clone(), name.map(str::to_owned));
        blocking(move || {
            let _lock = store.transfer_lock()?;
            archive::load(&store, archive, name.as_deref(), progress.as_ref())
        })
        .await
    }

    /// Writes images as an archive that both docker and OCI tools load.
    pub async fn save(&self, references: &[String], out: impl io::Write + Send + 'static) -> Result<()> {
        let (store, references) = (self.clone(), references.to_vec());
        blocking(move || archive::save(&store, &references, out)).await
    }

    /// Gives the image that `source` stands for another name.
    pub async fn tag(&self, source: &str, target: &str) -> Result<()> {
        let target = Reference::parse(target)?;
        if target.digest.is_some() {
            return Err(Error::Invalid("refusing to create a tag with a digest reference".to_owned()));
        }
        let (store, source) = (self.clone(), source.to_owned());
        blocking(move || {
            store.change(|index| {
                let id = Self::find(index, &source)?
                    .ok_or_else(|| Error::NotFound(format!("image {source:?} not found")))?;
                if let Some(record) = index.images.get_mut(&id) {
                    record.by_hand = true;
                }
                index.tags.insert(target.to_string(), id);
                Ok(())
            })
        })
        .await
    }

    /// Marks an image as put here by a person, which is what keeps it from being collected.
    pub async fn keep(&self, reference: &str) -> Result<()> {
        let (store, reference) = (self.clone(), reference.to_owned());
        blocking(move || {
            store.change(|index| {
                let id = Self::find(index, &reference)?
                    .ok_or_else(|| Error::NotFound(format!("image {reference:?} not found")))?;
                index.images.entry(id).and_modify(|record| record.by_hand = true);
                Ok(())
            })
        })
        .await
    }

    /// Sends an image to the registry its name says.
    pub async fn push(&self, reference: &str, auth: Auth, progress: Option<Progress>) -> Result<()> {
        registry::push(self, reference, auth, progress).await
    }

    /// Unpacks what a transfer brought and enters it into the index, under `names`.
    fn admit(&self, found: &Transferred, names: Names<'_>, progress: Option<&Progress>) -> Result<String> {
        let (id, config, layers) = (found.id(), found.configuration()?, found.chain()?);
        for at in 0..layers.len() {
            if let Some(progress) = progress {
                progress(ProgressEvent::Unpacking { layer: at + 1, layers: layers.len() });
            }
            self.unpack_layer(&layers[..=at])?;
        }
        self.inner.blobs.put(&found.config).map_err(failed)?;
        let record = Record {
            manifest: found.manifest_digest.clone(),
            size: layers.iter().map(|l| l.size).sum::<u64>() + found.config.len() as u64,
            layers,
            created: config.created().as_deref().and_then(|t| t.parse().ok()),
            config: image_config(&config),
            by_hand: names.by_hand,
        };
        self.change(|index| {
            check_clashes(index, &record)?;
            let by_hand = index.images.get(&id).is_some_and(|known| known.by_hand);
            let record = Record { by_hand: record.by_hand || by_hand, ..record };
            index.images.insert(id.clone(), record);
            for tag in names.tags {
                index.tags.insert(tag.clone(), id.clone());
            }
            for digest in names.digests {
                index.digests.insert(digest.clone(), id.clone());
            }
            Ok(())
        })?;
        Ok(id)
    }

    /// Unpacks the last of `chain` unless it is there.
    fn unpack_layer(&self, chain: &[Layer]) -> Result<()> {
        let Some((layer, below)) = chain.split_last() else { return Ok(()) };
        let (name, dir) = (layer.snapshot(), self.snapshots_dir());
        let target = dir.join(&name);
        let turn = {
            let mut unpacking = self.inner.unpacking.lock().expect("short");
            unpacking.retain(|_, turn| Arc::strong_count(turn) > 1);
            unpacking.entry(name.clone()).or_default().clone()
        };
        let _turn = turn.lock().expect("no panic while unpacking is counted on");
        if target.exists() {
            return Ok(());
        }
        let parents: Vec<PathBuf> = below.iter().rev().map(|l| dir.join(l.snapshot())).collect();
        let temporary = tempdir(&dir).map_err(failed)?;
        let done = (|| -> io::Result<()> {
            let blob = self.inner.blobs.read(&layer.digest)?;
            let diff_id = unpack::unpack(blob, &temporary, &parents, self.inner.limits)?;
            if diff_id != layer.diff_id {
                return Err(io::Error::other(format!("wrong diff id {diff_id}, expected {}", layer.diff_id)));
            }
            unpack::sync_filesystem(&temporary)?;
            match fs::rename(&temporary, &target) {
                // Another process was quicker.
                Err(_) if target.exists() => fs::remove_dir_all(&temporary),
                renamed => renamed,
            }
        })();
        done.map_err(|e| {
            let _ = fs::remove_dir_all(&temporary);
            Error::Failed(format!("failed to extract layer {}: {e}", layer.diff_id))
        })
    }

    /// The containers that there are.
    fn containers(&self) -> io::Result<Vec<crate::shim::proto::ContainerRecord>> {
        let dirs = fs::read_dir(self.inner.root.join("containers")).into_iter().flatten().flatten();
        let records = dirs.map(|dir| files::read_json(&dir.path().join("container.json")));
        records.filter_map(io::Result::transpose).collect()
    }

    /// Removes images that no container uses: those without a name, or with `all` every one; and what is kept for
    /// later builds. Returns the ids of the images.
    pub async fn prune(&self, all: bool) -> Result<Vec<String>> {
        let store = self.clone();
        let removed = blocking(move || {
            let used: BTreeSet<String> =
                store.containers().map_err(failed)?.into_iter().map(|record| record.image_id).collect();
            store.change(|index| {
                let named = |id: &String| index.tags.values().chain(index.digests.values()).any(|v| v == id);
                let goes = |id: &&String| !used.contains(*id) && (all || !named(id));
                let removed: Vec<String> = index.images.keys().filter(goes).cloned().collect();
                for id in &removed {
                    index.images.remove(id);
                }
                let gone = |id: &String| removed.contains(id);
                index.tags.retain(|_, id| !gone(id));
                index.digests.retain(|_, id| !gone(id));
                Ok(removed)
            })
        });
        let removed = removed.await?;
        self.clean_up(true).await?;
        Ok(removed)
    }

    /// Removes blobs, snapshots and temporary files that nothing needs: no image, and no container.
    fn collect_garbage(&self) {
        // While a transfer is under way it keeps what it made so far; the next collection comes.
        let alone = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        let (Ok(_lock), Ok(index)) = (self.lock("transfer.lock", alone), self.index()) else { return };
        let mut snapshots: BTreeSet<String> = BTreeSet::new();
        let mut blobs: BTreeSet<String> = BTreeSet::new();
        for (id, record) in &index.images {
            blobs.extend([id.clone(), record.manifest.clone()]);
            for layer in &record.layers {
                snapshots.insert(layer.snapshot());
                blobs.insert(layer.digest.clone());
            }
        }
        for (blob, snapshot) in index.built.values().filter_map(build::Outcome::needs) {
            snapshots.insert(snapshot);
            blobs.insert(blob.to_owned());
        }
        // What cannot be read may need anything.
        let Ok(containers) = self.containers() else { return };
        for record in containers {
            snapshots.extend(record.layers.into_iter().chain(record.mounted.into_iter().flatten()));
        }
        self.inner.blobs.retain(&blobs);
        for entry in fs::read_dir(self.snapshots_dir()).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|name| !snapshots.contains(name)) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// An index as another process may have left it: whatever is in it, looking into it is safe.
pub(crate) fn fuzz_index(data: &[u8]) {
    let Ok(index) = serde_json::from_slice::<Index>(data) else { return };
    for (id, record) in &index.images {
        let _ = (ImageStore::image(&index, id), record.layers.iter().map(Layer::snapshot).count());
    }
    for name in index.tags.keys().chain(index.digests.keys()) {
        let _ = ImageStore::find(&index, name);
    }
}

/// Unpacks one layer, plain or compressed, into the empty directory `target`, with the layers below it topmost
/// first; returns its diff id. For tools and fuzzing: the store does this by itself.
pub fn unpack_layer(
    input: impl io::Read,
    target: &Path,
    parents: &[PathBuf],
    limits: Limits,
) -> io::Result<String> {
    unpack::unpack(input, target, parents, limits)
}

/// What an image is to be called.
#[derive(Clone, Copy)]
struct Names<'a> {
    tags: &'a [String],
    digests: &'a [String],
    by_hand: bool,
}

#[async_trait]
impl ImageService for ImageStore {
    async fn resolve(&self, reference: &str) -> Result<Option<Image>> {
        self.lookup(reference)
    }

    async fn pull(&self, reference: &str, auth: Auth, progress: Option<Progress>) -> Result<Image> {
        registry::pull(self, reference, auth, progress).await
    }

    async fn list(&self) -> Result<Vec<Image>> {
        let index = self.index()?;
        Ok(index.images.keys().filter_map(|id| Self::image(&index, id)).collect())
    }

    async fn remove(&self, reference: &str) -> Result<()> {
        let (store, reference) = (self.clone(), reference.to_owned());
        blocking(move || {
            store.change(|index| {
                let missing = || Error::NotFound(format!("image {reference:?} not found"));
                let id = Self::find(index, &reference)?.ok_or_else(missing)?;
                match Reference::parse(&reference).map(|r| r.to_string()) {
                    Ok(name) if index.tags.contains_key(&name) => drop(index.tags.remove(&name)),
                    Ok(name) if index.digests.contains_key(&name) => drop(index.digests.remove(&name)),
                    // By id: with all its names.
                    _ => {
                        index.tags.retain(|_, v| *v != id);
                        index.digests.retain(|_, v| *v != id);
                    }
                }
                // Digests alone do not keep an image that a user took every tag of; they came with the tags.
                if !index.tags.values().any(|v| *v == id) {
                    index.digests.retain(|_, v| *v != id);
                    index.images.remove(&id);
                }
                Ok(())
            })?;
            store.collect_garbage();
            Ok(())
        })
        .await
    }

    async fn clean_up(&self, all: bool) -> Result<()> {
        let store = self.clone();
        blocking(move || {
            if all && !store.index()?.built.is_empty() {
                store.change(|index| {
                    index.built.clear();
                    Ok(())
                })?;
            }
            if all {
                store.prune_caches(0)?;
            }
            store.collect_garbage();
            Ok(())
        })
        .await
    }

    async fn disk_usage(&self) -> Result<u64> {
        let dirs = [self.images_dir(), self.snapshots_dir()];
        blocking(move || Ok(dirs.iter().map(|d| blobs::disk_usage(d)).sum())).await
    }
}

/// Two chains whose snapshots would have the same name: nobody gets the other's files.
fn check_clashes(index: &Index, record: &Record) -> Result<()> {
    let known: BTreeMap<String, &str> = (index.images.values().flat_map(|r| &r.layers))
        .map(|l| (l.snapshot(), l.chain_id.as_str()))
        .collect();
    let clash = record.layers.iter().find(|l| known.get(&l.snapshot()).is_some_and(|c| *c != l.chain_id));
    match clash {
        Some(layer) => Err(Error::Failed(format!("layer {} clashes with another", layer.chain_id))),
        None => Ok(()),
    }
}

fn configuration(bytes: &[u8]) -> serde_json::Result<ImageConfiguration> {
    let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
    // An image without layers, as tools in Go write it.
    if let Some(diff_ids) = value.pointer_mut("/rootfs/diff_ids").filter(|ids| ids.is_null()) {
        *diff_ids = serde_json::json!([]);
    }
    serde_json::from_value(value)
}

fn image_config(image: &ImageConfiguration) -> ImageConfig {
    let base = ImageConfig {
        os: image.os().to_string(),
        architecture: image.architecture().to_string(),
        ..Default::default()
    };
    let Some(c) = image.config() else { return base };
    ImageConfig {
        entrypoint: c.entrypoint().clone().unwrap_or_default(),
        cmd: c.cmd().clone().unwrap_or_default(),
        env: c.env().clone().unwrap_or_default(),
        working_dir: c.working_dir().clone().unwrap_or_default(),
        user: c.user().clone().unwrap_or_default(),
        stop_signal: c.stop_signal().clone().unwrap_or_default(),
        volumes: c.volumes().clone().unwrap_or_default(),
        labels: c.labels().clone().unwrap_or_default().into_iter().collect(),
        ..base
    }
}

/// A new directory under a name that no layer has.
fn tempdir(parent: &Path) -> io::Result<PathBuf> {
    let path = parent.join(format!(".tmp-{:016x}", rand::random::<u64>()));
    fs::create_dir(&path)?;
    Ok(path)
}

/// Runs file work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
