//! Images being built: what a builder needs of the store.
//!
//! A [`Draft`] is an image that has no name yet: a configuration and layers, which are made one by one, stored as
//! blobs and unpacked like any other. Steps whose outcome is known from an earlier build are found by a key that
//! the builder makes of all they depend on. What the steps are is the builder's business, not the store's.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::archive::{DOCUMENT_MAX, OCI_CONFIG, OCI_MANIFEST};
use super::blobs::NewBlob;
use super::unpack::hex;
use super::{ImageStore, LAYERS_MAX, Layer, Names, Prepared, Transferred, chain_id, failed, image_config};
use crate::api::{Error, Result};

const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// For how long an outcome is remembered after it was last of use, in seconds.
const REMEMBERED: i64 = 7 * 24 * 3600;
/// Outcomes remembered at most; the oldest go first.
const REMEMBERED_MAX: usize = 1000;

/// Most bytes of a file that a build fetches.
const DOWNLOAD_MAX: u64 = 8 << 30;

/// Fetches a file; returns when it was last changed, as its server says.
pub async fn download(url: &str, out: &mut impl Write) -> Result<Option<String>> {
    super::remote::download(url, out, DOWNLOAD_MAX).await
}

/// An image under way.
#[derive(Debug, Clone)]
pub struct Draft {
    /// The whole configuration, in the form of the OCI image specification, but for `rootfs`.
    pub config: Value,
    layers: Vec<Layer>,
}

/// What a step came to: a layer, or nothing new.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    layer: Option<BuiltLayer>,
    /// Unix seconds: when it was made, and when it was last of use.
    made: i64,
    used: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct BuiltLayer {
    digest: String,
    size: u64,
    diff_id: String,
    chain_id: String,
}

impl Outcome {
    /// Whether there is a layer.
    pub fn changes(&self) -> bool {
        self.layer.is_some()
    }

    /// Unix seconds.
    pub fn made(&self) -> i64 {
        self.made
    }

    /// What must not be collected while this is remembered: a blob, and a chain of layers.
    pub(super) fn needs(&self) -> Option<(&str, String)> {
        let layer = self.layer.as_ref()?;
        Some((&layer.digest, super::snapshot_name(&layer.chain_id)))
    }
}

impl Draft {
    /// `FROM scratch`
    pub fn scratch() -> Draft {
        let config = json!({
            "architecture": super::archive::own_architecture(), "os": "linux", "config": {}, "history": [],
        });
        Draft { config, layers: Vec::new() }
    }

    /// Names the layers so far; empty when there are none.
    pub fn chain(&self) -> &str {
        self.layers.last().map_or("", |layer| &layer.chain_id)
    }

    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    fn push(&mut self, layer: &BuiltLayer) -> Result<()> {
        if self.layers.len() >= LAYERS_MAX {
            return Err(Error::Failed(format!("an image cannot have more than {LAYERS_MAX} layers")));
        }
        self.layers.push(Layer {
            digest: layer.digest.clone(),
            size: layer.size,
            media_type: GZIP_LAYER.to_owned(),
            diff_id: layer.diff_id.clone(),
            chain_id: layer.chain_id.clone(),
        });
        Ok(())
    }
}

/// Owner, mode and time of an entry.
#[derive(Debug, Clone, Copy, Default)]
pub struct EntryMeta {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Unix seconds.
    pub mtime: u64,
}

impl EntryMeta {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime().max(0) as u64,
        }
    }
}

/// A layer being written. Paths are relative to its root, without `..`.
pub struct LayerWriter {
    tar: tar::Builder<Hashing<GzEncoder<NewBlob>>>,
    entries: u64,
}

/// Hashes what goes through.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl EntryMeta {
    /// The header of an entry without its name.
    pub fn header(&self, kind: tar::EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(self.mode);
        header.set_uid(self.uid.into());
        header.set_gid(self.gid.into());
        header.set_mtime(self.mtime);
        header.set_size(size);
        header
    }
}

impl LayerWriter {
    pub fn directory(&mut self, path: &Path, meta: &EntryMeta) -> io::Result<()> {
        self.entries += 1;
        self.tar.append_data(&mut meta.header(tar::EntryType::Directory, 0), path, io::empty())
    }

    /// `size` bytes of `content`; fewer are an error. `capability` is the attribute of that name.
    pub fn file(
        &mut self,
        path: &Path,
        meta: &EntryMeta,
        size: u64,
        content: impl Read,
        capability: Option<&[u8]>,
    ) -> io::Result<()> {
        self.entries += 1;
        if let Some(value) = capability {
            self.tar.append_pax_extensions([("SCHILY.xattr.security.capability", value)])?;
        }
        let mut content = Exactly { inner: content, left: size };
        self.tar.append_data(&mut meta.header(tar::EntryType::Regular, size), path, &mut content)?;
        match content.left {
            0 => Ok(()),
            left => Err(io::Error::other(format!("{}: {left} bytes fewer than before", path.display()))),
        }
    }

    pub fn symlink(&mut self, path: &Path, meta: &EntryMeta, target: &Path) -> io::Result<()> {
        self.entries += 1;
        self.tar.append_link(&mut meta.header(tar::EntryType::Symlink, 0), path, target)
    }

    fn hard_link(&mut self, path: &Path, meta: &EntryMeta, target: &Path) -> io::Result<()> {
        self.entries += 1;
        self.tar.append_link(&mut meta.header(tar::EntryType::Link, 0), path, target)
    }

    fn special(
        &mut self,
        path: &Path,
        meta: &EntryMeta,
        kind: tar::EntryType,
        device: u64,
    ) -> io::Result<()> {
        self.entries += 1;
        let mut header = meta.header(kind, 0);
        if kind != tar::EntryType::Fifo {
            header.set_device_major(rustix::fs::major(device))?;
            header.set_device_minor(rustix::fs::minor(device))?;
        }
        self.tar.append_data(&mut header, path, io::empty())
    }

    fn marker(&mut self, path: &Path) -> io::Result<()> {
        self.entries += 1;
        self.tar.append_data(&mut EntryMeta::default().header(tar::EntryType::Regular, 0), path, io::empty())
    }

    /// All that a container changed in its upper directory, but for `except`.
    fn changes(&mut self, upper: &Path, except: &dyn Fn(&Path) -> bool) -> io::Result<()> {
        let mut links = BTreeMap::new();
        self.changes_below(upper, Path::new(""), except, &mut links)
    }

    fn changes_below(
        &mut self,
        upper: &Path,
        below: &Path,
        except: &dyn Fn(&Path) -> bool,
        links: &mut BTreeMap<u64, PathBuf>,
    ) -> io::Result<()> {
        let mut names: Vec<_> =
            fs::read_dir(upper.join(below))?.map(|e| e.map(|e| e.file_name())).collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let (path, at) = (below.join(&name), upper.join(below).join(&name));
            if except(&path) {
                continue;
            }
            let (data, kind) = fs::symlink_metadata(&at).map(|data| (data.clone(), data.file_type()))?;
            let meta = EntryMeta::of(&data);
            if kind.is_char_device() && data.rdev() == 0 {
                let mut hidden = std::ffi::OsString::from(".wh.");
                hidden.push(&name);
                self.marker(&below.join(hidden))?;
            } else if kind.is_dir() {
                if xattr(&at, c"trusted.overlay.redirect")?.is_some() {
                    return Err(io::Error::other(format!(
                        "{}: a directory renamed in place",
                        path.display()
                    )));
                }
                self.directory(&path, &meta)?;
                if xattr(&at, c"trusted.overlay.opaque")?.is_some_and(|value| value == b"y") {
                    self.marker(&path.join(".wh..wh..opq"))?;
                }
                self.changes_below(upper, &path, except, links)?;
            } else if kind.is_symlink() {
                self.symlink(&path, &meta, &fs::read_link(&at)?)?;
            } else if let Some(first) = links.get(&data.ino()) {
                let first = first.clone();
                self.hard_link(&path, &meta, &first)?;
            } else {
                if data.nlink() > 1 {
                    links.insert(data.ino(), path.clone());
                }
                let device = data.rdev();
                if kind.is_file() {
                    if xattr(&at, c"trusted.overlay.metacopy")?.is_some() {
                        return Err(io::Error::other(format!(
                            "{}: a file without its content",
                            path.display()
                        )));
                    }
                    let capability = xattr(&at, c"security.capability")?;
                    self.file(&path, &meta, data.len(), File::open(&at)?, capability.as_deref())?;
                } else if kind.is_fifo() {
                    self.special(&path, &meta, tar::EntryType::Fifo, 0)?;
                } else if kind.is_char_device() {
                    self.special(&path, &meta, tar::EntryType::Char, device)?;
                } else if kind.is_block_device() {
                    self.special(&path, &meta, tar::EntryType::Block, device)?;
                }
                // A socket means nothing without who listens on it.
            }
        }
        Ok(())
    }
}

/// Reads no more than it should, however much there is by now.
struct Exactly<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.inner.read(&mut buffer[..max])?;
        self.left -= n as u64;
        Ok(n)
    }
}

/// An extended attribute of small size.
fn xattr(path: &Path, name: &std::ffi::CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = [0u8; 1024];
    match rustix::fs::lgetxattr(path, name, &mut value) {
        Ok(n) => Ok(Some(value[..n].to_vec())),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

impl ImageStore {
    /// The image that `reference` stands for, to be built upon.
    pub fn draft_of(&self, reference: &str) -> Result<Draft> {
        let missing = || Error::NotFound(format!("image {reference:?} not found"));
        let index = self.index()?;
        let id = Self::find(&index, reference)?.ok_or_else(missing)?;
        let record = index.images.get(&id).ok_or_else(missing)?;
        let bytes = self.inner.blobs.bytes(&id, DOCUMENT_MAX).map_err(failed)?;
        let config: Value = serde_json::from_slice(&bytes).map_err(failed)?;
        Ok(Draft { config, layers: record.layers.clone() })
    }

    /// Keeps what no image names yet from being collected, in any process, until it is dropped.
    pub fn hold(&self) -> Result<File> {
        self.transfer_lock()
    }

    /// Lets containers of this store be made of a draft, under the name that is returned.
    pub fn lend(&self, draft: &Draft) -> Result<String> {
        let text = draft.config.to_string();
        let id = format!("sha256:{}", hex(&Sha256::digest(format!("{}\n{text}", draft.chain()))));
        let mut config = draft.config.clone();
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids(draft) });
        let config: oci_spec::image::ImageConfiguration = serde_json::from_value(config).map_err(failed)?;
        let prepared = Prepared {
            id: id.clone(),
            config: image_config(&config),
            layers: draft.layers.iter().rev().map(Layer::snapshot).collect(),
        };
        self.inner.drafts.lock().expect("short").insert(id.clone(), prepared);
        Ok(id)
    }

    /// Adds the layer that `write` writes to the draft, unless that is nothing. Blocks.
    pub fn add_layer(
        &self,
        draft: &mut Draft,
        write: impl FnOnce(&mut LayerWriter) -> io::Result<()>,
    ) -> Result<Outcome> {
        let blob = self.inner.blobs.create().map_err(failed)?;
        let gzip = GzEncoder::new(blob, flate2::Compression::new(4));
        let tar = tar::Builder::new(Hashing { inner: gzip, hash: Sha256::new() });
        let mut writer = LayerWriter { tar, entries: 0 };
        write(&mut writer).map_err(failed)?;
        let now = jiff::Timestamp::now().as_second();
        if writer.entries == 0 {
            return Ok(Outcome { layer: None, made: now, used: now });
        }
        let hashing = writer.tar.into_inner().map_err(failed)?;
        let diff_id = format!("sha256:{}", hex(&hashing.hash.finalize()));
        let (digest, size) = hashing.inner.finish().and_then(NewBlob::commit).map_err(failed)?;
        let chain_id = chain_id(draft.layers.last(), &diff_id);
        let layer = BuiltLayer { digest, size, diff_id, chain_id };
        draft.push(&layer)?;
        self.unpack_layer(&draft.layers)?;
        Ok(Outcome { layer: Some(layer), made: now, used: now })
    }

    /// Adds what a container has changed below its `upper` directory, but for `except`. Blocks.
    pub fn add_changes(
        &self,
        draft: &mut Draft,
        upper: &Path,
        except: &dyn Fn(&Path) -> bool,
    ) -> Result<Outcome> {
        self.add_layer(draft, |writer| writer.changes(upper, except))
    }

    /// Takes the outcome of an earlier build of the same step, if it is remembered.
    pub fn recall(&self, draft: &mut Draft, key: &str) -> Result<Option<Outcome>> {
        let Some(outcome) = self.index()?.built.get(key).cloned() else { return Ok(None) };
        if let Some(layer) = &outcome.layer {
            if !self.inner.blobs.contains(&layer.digest)
                || layer.chain_id != chain_id(draft.layers.last(), &layer.diff_id)
            {
                return Ok(None);
            }
            draft.push(layer)?;
            self.unpack_layer(&draft.layers)?;
        }
        Ok(Some(outcome))
    }

    /// Remembers what steps came to, and forgets what has not been of use for long.
    pub fn remember(&self, outcomes: Vec<(String, Outcome)>) -> Result<()> {
        let now = jiff::Timestamp::now().as_second();
        self.change(|index| {
            for (key, outcome) in outcomes {
                index.built.insert(key, Outcome { used: now, ..outcome });
            }
            index.built.retain(|_, outcome| now - outcome.used < REMEMBERED);
            while index.built.len() > REMEMBERED_MAX {
                let oldest = index.built.iter().min_by_key(|(_, o)| o.used).map(|(key, _)| key.clone());
                oldest.and_then(|key| index.built.remove(&key));
            }
            Ok(())
        })
    }

    /// Makes the draft an image, with these names; returns its id. Blocks.
    pub fn finish(&self, draft: &Draft, tags: &[String]) -> Result<String> {
        let mut config = draft.config.clone();
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids(draft) });
        let config = config.to_string().into_bytes();
        let config_digest = self.inner.blobs.put(&config).map_err(failed)?;
        let layer = |l: &Layer| json!({ "mediaType": l.media_type, "digest": l.digest, "size": l.size });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": config_digest, "size": config.len() },
            "layers": draft.layers.iter().map(layer).collect::<Vec<_>>(),
        });
        let manifest_digest = self.inner.blobs.put(manifest.to_string().as_bytes()).map_err(failed)?;
        let layers = draft.layers.iter().map(|l| (l.digest.clone(), l.size, l.media_type.clone())).collect();
        let found = Transferred { manifest_digest, config, layers };
        self.admit(&found, Names { tags, digests: &[], by_hand: true }, None)
    }

    /// The files of a draft as a container would see them, read-only: a directory that is mounted nowhere, and gone
    /// when it is closed. `scratch` is an empty directory, on which it is mounted in passing. Blocks.
    pub fn view(&self, draft: &Draft, scratch: &Path) -> Result<OwnedFd> {
        let target = scratch.join("view");
        // An overlay that is only read needs two layers at least, and a draft may have none.
        let nothing = ["nothing", "nothing-else"].map(|name| scratch.join(name));
        for dir in nothing.iter().chain([&target]) {
            fs::create_dir_all(dir).map_err(failed)?;
        }
        let mut lower: Vec<String> = draft.layers.iter().rev().map(Layer::snapshot).collect();
        lower.extend(nothing.iter().map(|dir| dir.display().to_string()));
        let (snapshots, options) = (self.snapshots_dir(), format!("lowerdir={}", lower.join(":")));
        let opened = std::thread::spawn(move || -> io::Result<OwnedFd> {
            // A mount namespace for this thread alone: whatever happens, no mount is left behind.
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)?;
            // Names of layers are short because they are relative to their directory.
            std::env::set_current_dir(&snapshots)?;
            mount(Some("overlay"), &target, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str()))?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok(rustix::fs::open(&target, flags, Mode::empty())?)
        });
        opened.join().map_err(|_| failed("the thread that mounts has panicked"))?.map_err(failed)
    }
}

fn diff_ids(draft: &Draft) -> Vec<&str> {
    draft.layers.iter().map(|l| l.diff_id.as_str()).collect()
}

/// Unpacks an archive of files, as `ADD` takes it, into the empty directory `target`. Blocks.
pub fn unpack_files(archive: impl Read, target: &Path) -> io::Result<()> {
    super::unpack::unpack(archive, target, &[], super::Limits::default()).map(drop)
}

/// Whether this is how an archive begins that [`unpack_files`] reads; an error for those that it does not.
pub fn is_archive(head: &[u8]) -> Result<bool, String> {
    use super::unpack::{Compression, decompress, sniff};
    match head {
        [b'B', b'Z', b'h', ..] => return Err("bzip2".to_owned()),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Err("xz".to_owned()),
        _ => {}
    }
    let plain = match sniff(head) {
        Compression::Plain => head.to_vec(),
        _ => {
            let mut plain = Vec::new();
            // The head may end in the midst of it.
            let _ = decompress(head).and_then(|r| r.take(512).read_to_end(&mut plain));
            plain
        }
    };
    Ok(plain.get(257..262) == Some(b"ustar"))
}

/// A uid and gid as `--chown` names them, by the image's passwd and group files.
pub fn owner_of(owner: &str, passwd: &str, group: &str) -> Result<(u32, u32), String> {
    let (user, wanted_group) = owner.split_once(':').map_or((owner, None), |(u, g)| (u, Some(g)));
    let resolved = crate::users::resolve_with(passwd, group, &Default::default(), owner);
    if let (Ok(uid), None) = (user.parse::<u32>(), wanted_group) {
        // A number alone is both.
        return Ok((uid, uid));
    }
    resolved.map(|r| (r.uid, r.gid))
}

/// Whether a signal is called that, by its name or number.
pub fn is_signal(name: &str) -> bool {
    crate::local::stop_signal::parse(name).is_some()
}

/// The digest of some bytes, in hexadecimal digits.
pub fn hex_digest(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        // With its length, so that no two lists of parts look the same.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// The digest of a file's bytes, in hexadecimal digits.
pub fn hex_digest_of(mut file: impl Read) -> io::Result<String> {
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; 64 * 1024]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&chunk[..n]),
        }
    }
}
