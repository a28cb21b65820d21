//! Unpacks one layer into a directory that overlayfs takes as it is.
//!
//! The archive is hostile until shown otherwise: links on a path are followed by name, inside the layer, and
//! what comes of that is opened below the layer's directory through no link at all; sizes are bounded; the digest of the plain bytes must be the one the
//! image's configuration names. Whiteouts become overlayfs's: a 0/0 character device, an opaque attribute.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::headers::{Extended, Headers};
use super::room::Room;

/// How every path is opened: below the directory given, and through no link.
const CONFINED: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Links that one path may lead through, as in the kernel.
const LINKS_MAX: usize = 40;

/// What a layer may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the plain archive.
    pub bytes: u64,
    pub entries: u64,
    /// Bytes of an extended header (long names, attributes).
    pub header: u64,
    /// Bytes and components of a path.
    pub path: usize,
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 4_000_000, header: 1 << 20, path: 4096, depth: 256 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// By the first bytes: media types lie, and `docker save` has none.
pub fn sniff(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::Plain,
    }
}

/// A reader of the plain bytes behind `input`, whatever it is compressed with.
pub fn decompress<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut input = BufReader::with_capacity(128 * 1024, input);
    let head = io::BufRead::fill_buf(&mut input)?;
    Ok(match sniff(head) {
        Compression::Plain => Box::new(input),
        // More than one gzip member in a row is one stream.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            // 128 MiB of window: what `zstd --long` needs, and no more memory than that.
            decoder.window_log_max(27)?;
            Box::new(decoder)
        }
    })
}

/// Unpacks `input` into the empty directory `target`; returns the digest of the plain bytes.
///
/// `parents` are the layers below, topmost first: a directory that the archive only implies takes its owner
/// and mode from there.
pub fn unpack(input: impl Read, target: &Path, parents: &[PathBuf], limits: Limits) -> io::Result<String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(target, flags, Mode::empty())?;
    let parents = parents
        .iter()
        .map(|p| rustix::fs::open(p, flags, Mode::empty()).map_err(io::Error::from))
        .collect::<io::Result<Vec<_>>>()?;
    let room = Room::in_dir(target)?;
    let mut plain = Counted { inner: decompress(input)?, hash: Sha256::new(), left: limits.bytes, room };
    let mut unpacker = Unpacker {
        root,
        parents,
        limits,
        directories: Vec::new(),
        last: None,
        entries: 0,
        headers: Headers::new(limits.header),
    };
    let mut archive = tar::Archive::new(&mut plain);
    // Raw: extended headers come as entries, so that their size can be bounded before they are read.
    for entry in archive.entries()?.raw(true) {
        unpacker.entry(entry?)?;
    }
    unpacker.finish()?;
    // The digest covers what follows the end mark as well.
    io::copy(&mut plain, &mut io::sink())?;
    Ok(format!("sha256:{}", hex(&plain.hash.finalize())))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Hashes and counts what is read.
struct Counted<R> {
    inner: R,
    hash: Sha256,
    left: u64,
    room: Room,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(n as u64)
            .ok_or_else(|| invalid("the layer is larger than the limit".to_owned()))?;
        self.room.take(n as u64)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

pub fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

struct Unpacker {
    root: OwnedFd,
    parents: Vec<OwnedFd>,
    limits: Limits,
    /// The directory the last entry was in, by its path in the archive and its real one: most entries come
    /// right after others of the same directory.
    last: Option<(PathBuf, PathBuf)>,
    /// Times of directories, set last: making files in them changes them.
    directories: Vec<(PathBuf, Timestamps)>,
    entries: u64,
    headers: Headers,
}

impl Unpacker {
    fn entry(&mut self, mut entry: tar::Entry<'_, impl Read>) -> io::Result<()> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(invalid("the layer has too many entries".to_owned()));
        }
        let kind = entry.header().entry_type();
        let Some(extended) = self.headers.take(&mut entry)? else { return Ok(()) };
        let raw = match &extended.path {
            Some(path) => path.clone(),
            None => entry.path_bytes().into_owned(),
        };
        let path = self.checked(&raw)?;
        let header = entry.header();
        if extended.size.is_some_and(|size| header.size().is_ok_and(|h| h != size)) {
            // The raw iterator goes by the header; sizes beyond its 8 GiB come in base-256 there.
            return Err(invalid(format!("{}: two sizes are given", path.display())));
        }
        let meta = Meta {
            mode: or_blank(&header.as_old().mode, header.mode().map(u64::from))? as u32 & 0o7777,
            uid: small_id(extended.uid.map_or_else(|| or_blank(&header.as_old().uid, header.uid()), Ok)?)?,
            gid: small_id(extended.gid.map_or_else(|| or_blank(&header.as_old().gid, header.gid()), Ok)?)?,
            times: times(extended.mtime.unwrap_or((header.mtime().unwrap_or(0) as i64, 0))),
        };
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The root itself.
            if kind.is_dir() {
                return self.finish_directory(Path::new(""), &meta, &extended);
            }
            return Err(invalid("the root is not a directory".to_owned()));
        };
        let real = self.real_dir(path.parent().unwrap_or(Path::new("")))?;
        let path = real.join(&name);
        let parent = self.open_or_make(&real)?;
        if kind != tar::EntryType::Regular {
            self.last = None;
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self.whiteout(&parent, hidden);
        }
        let context = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        match kind {
            tar::EntryType::Directory => {
                self.directory(&parent, &name).map_err(context)?;
                self.finish_directory(&path, &meta, &extended).map_err(context)
            }
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                clear(&parent, &name).map_err(context)?;
                regular(&parent, &name, &mut entry, &meta, &extended).map_err(context)
            }
            tar::EntryType::Symlink | tar::EntryType::Link => {
                let target = match &extended.link {
                    Some(link) => link.clone(),
                    None => entry.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default(),
                };
                if target.is_empty() || target.len() >= self.limits.path {
                    return Err(invalid(format!("{}: invalid link", path.display())));
                }
                if kind == tar::EntryType::Symlink {
                    clear(&parent, &name).map_err(context)?;
                    // What it points to is for the container to find out, inside its root.
                    rustix::fs::symlinkat(OsStr::from_bytes(&target), &parent, &name)?;
                    return set_meta_nofollow(&parent, &name, &meta).map_err(context);
                }
                self.hard_link(&parent, &name, &target).map_err(context)
            }
            tar::EntryType::Char | tar::EntryType::Block | tar::EntryType::Fifo => {
                clear(&parent, &name).map_err(context)?;
                let (file_type, device) = match kind {
                    tar::EntryType::Fifo => (FileType::Fifo, 0),
                    _ => {
                        let (major, minor) =
                            (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
                        let char_device = kind == tar::EntryType::Char;
                        if char_device && (major, minor) == (0, 0) {
                            return Err(invalid(format!(
                                "{}: a whiteout in overlayfs's form",
                                path.display()
                            )));
                        }
                        let file_type =
                            if char_device { FileType::CharacterDevice } else { FileType::BlockDevice };
                        (file_type, rustix::fs::makedev(major, minor))
                    }
                };
                rustix::fs::mknodat(&parent, &name, file_type, Mode::from_raw_mode(0o600), device)?;
                set_meta_nofollow(&parent, &name, &meta).map_err(context)
            }
            other => Err(invalid(format!(
                "{}: unsupported entry type {:?}",
                path.display(),
                other.as_byte() as char
            ))),
        }
    }

    /// The path inside the layer. `..` anywhere is refused; a leading `/` or `./` means the layer's root.
    fn checked(&self, raw: &[u8]) -> io::Result<PathBuf> {
        let shown = String::from_utf8_lossy(&raw[..raw.len().min(200)]).into_owned();
        if raw.len() >= self.limits.path || raw.contains(&0) {
            return Err(invalid(format!("invalid path {shown:?}")));
        }
        let mut path = PathBuf::new();
        for component in Path::new(OsStr::from_bytes(raw)).components() {
            match component {
                Component::Normal(name) if name.len() <= 255 => path.push(name),
                Component::Normal(_) | Component::ParentDir => {
                    return Err(invalid(format!("path {shown:?} leads out of the layer")));
                }
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if path.components().count() > self.limits.depth {
            return Err(invalid(format!("path {shown:?} is too deep")));
        }
        Ok(path)
    }

    /// Where a directory of the archive really is: links on the way, of this layer or those below, are
    /// followed as they would be inside the container, where `..` ends at the root.
    fn real_dir(&mut self, dir: &Path) -> io::Result<PathBuf> {
        if let Some((given, real)) = &self.last
            && given == dir
        {
            return Ok(real.clone());
        }
        let (mut real, mut links) = (PathBuf::new(), 0);
        let mut todo: Vec<OsString> = dir.iter().rev().map(OsStr::to_owned).collect();
        while let Some(name) = todo.pop() {
            if name == ".." {
                real.pop();
                continue;
            }
            real.push(&name);
            let Some(target) = self.link_at(&real)? else { continue };
            links += 1;
            if links > LINKS_MAX || todo.len() > self.limits.depth {
                return Err(invalid(format!("{}: too many links", dir.display())));
            }
            real.pop();
            if target.is_absolute() {
                real = PathBuf::new();
            }
            let parts =
                target.components().rev().filter(|c| !matches!(c, Component::RootDir | Component::CurDir));
            todo.extend(parts.map(|c| c.as_os_str().to_owned()));
        }
        self.last = Some((dir.to_owned(), real.clone()));
        Ok(real)
    }

    /// What a path is a link to, in the topmost layer that has it.
    fn link_at(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for root in std::iter::once(&self.root).chain(&self.parents) {
            let file = match rustix::fs::openat2(root, path, flags, Mode::empty(), CONFINED) {
                Ok(file) => file,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(e) => return Err(e.into()),
            };
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                return Ok(None);
            }
            let target = rustix::fs::readlinkat(&file, c"", Vec::new())?;
            return Ok(Some(PathBuf::from(OsString::from_vec(target.into_bytes()))));
        }
        Ok(None)
    }

    /// A directory of the layer, made when the archive only implies it.
    fn open_or_make(&mut self, path: &Path) -> io::Result<OwnedFd> {
        match self.open_dir(path) {
            Err(e) if e.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            other => return other,
        }
        let mut so_far = PathBuf::new();
        let mut dir = self.open_dir(&so_far)?;
        for name in path.iter() {
            so_far.push(name);
            match self.open_dir(&so_far) {
                Ok(next) => dir = next,
                Err(_) => {
                    self.directory(&dir, name)?;
                    self.like_parents(&dir, name, &so_far)?;
                    dir = self.open_dir(&so_far)?;
                }
            }
        }
        Ok(dir)
    }

    /// Opens a directory of the layer, following no links at all.
    fn open_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(&self.root, path, flags, Mode::empty(), CONFINED)?)
    }

    fn like_parents(&self, dir: &OwnedFd, name: &OsStr, path: &Path) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |p| rustix::fs::openat2(p, path, flags, Mode::empty(), CONFINED).ok();
        if let Some(stat) = self.parents.iter().find_map(open).and_then(|fd| rustix::fs::fstat(fd).ok()) {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
        }
        Ok(())
    }

    /// A directory, new or already there. One that takes the place of something else hides what is below.
    fn directory(&self, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(()),
            file_type => {
                rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
                rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
                match file_type == FileType::CharacterDevice && stat.st_rdev == 0 {
                    true => opaque(&open_at(parent, name)?),
                    false => Ok(()),
                }
            }
        }
    }

    fn finish_directory(&mut self, path: &Path, meta: &Meta, extended: &Extended) -> io::Result<()> {
        let dir = self.open_dir(path)?;
        set_meta(&dir, meta, extended)?;
        self.directories.push((path.to_owned(), meta.times.clone()));
        Ok(())
    }

    fn whiteout(&self, parent: &OwnedFd, hidden: &[u8]) -> io::Result<()> {
        if hidden == b".wh..opq" {
            return opaque(parent);
        }
        // aufs's own bookkeeping means nothing to us.
        if hidden.starts_with(b".wh.") {
            return Ok(());
        }
        let name = OsString::from_vec(hidden.to_vec());
        if name.is_empty() || matches!(hidden, b"." | b"..") {
            return Err(invalid("a whiteout without a name".to_owned()));
        }
        match rustix::fs::statat(parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            // It hides what is below; what this layer itself has under the name stays.
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                opaque(&open_at(parent, &name)?)
            }
            Ok(_) => Ok(()),
            Err(Errno::NOENT) => {
                let device = rustix::fs::makedev(0, 0);
                let mode = Mode::from_raw_mode(0o000);
                Ok(rustix::fs::mknodat(parent, &name, FileType::CharacterDevice, mode, device)?)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn hard_link(&mut self, parent: &OwnedFd, name: &OsStr, target: &[u8]) -> io::Result<()> {
        let target = self.checked(target)?;
        let Some(target_name) = target.file_name() else {
            return Err(invalid("a link to the root".to_owned()));
        };
        let target_dir = self.real_dir(target.parent().unwrap_or(Path::new("")))?;
        let target_dir = self.open_dir(&target_dir)?;
        let stat = rustix::fs::statat(&target_dir, target_name, AtFlags::SYMLINK_NOFOLLOW)?;
        let (here, there) = (rustix::fs::fstat(parent)?, rustix::fs::fstat(&target_dir)?);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(invalid("a hard link to a directory".to_owned()));
        }
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) && target_name == name {
            return Ok(());
        }
        clear(parent, name)?;
        // Without AT_SYMLINK_FOLLOW a link to a symbolic link is a link to that, not to its target.
        Ok(rustix::fs::linkat(&target_dir, target_name, parent, name, AtFlags::empty())?)
    }

    fn finish(&mut self) -> io::Result<()> {
        for (path, times) in std::mem::take(&mut self.directories).into_iter().rev() {
            // It can have been replaced by a later entry.
            if let Ok(dir) = self.open_dir(&path) {
                rustix::fs::futimens(&dir, &times)?;
            }
        }
        Ok(())
    }
}

struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    times: Timestamps,
}

fn times((seconds, nanos): (i64, i64)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    Timestamps { last_access: time, last_modification: time }
}

/// A field of a header that says nothing is zero, as Go reads it, and so every other tool for images.
fn or_blank(field: &[u8], number: io::Result<u64>) -> io::Result<u64> {
    if field.iter().all(|byte| matches!(byte, 0 | b' ')) { Ok(0) } else { number }
}

fn small_id(id: u64) -> io::Result<u32> {
    u32::try_from(id).map_err(|_| invalid(format!("user or group id {id}")))
}

fn open_at(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn opaque(dir: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(dir, c"trusted.overlay.opaque", b"y", XattrFlags::empty())?)
}

/// Makes room for a file: within a layer the later entry wins. A directory goes only when it is empty.
fn clear(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?),
        Err(e) => Err(e.into()),
    }
}

fn regular(
    parent: &OwnedFd,
    name: &OsStr,
    entry: &mut tar::Entry<'_, impl Read>,
    meta: &Meta,
    extended: &Extended,
) -> io::Result<()> {
    let size = entry.header().entry_size()?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
    // Not `io::copy`: for files that would try splices that can only fail.
    let mut buffer = vec![0; (size as usize).clamp(1, 128 * 1024)];
    let mut written = 0;
    loop {
        let n = entry.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        file.write_all(&buffer[..n])?;
        written += n as u64;
    }
    if written != size {
        return Err(invalid(format!("{size} bytes announced, {written} there")));
    }
    set_meta(&file, meta, extended)?;
    Ok(rustix::fs::futimens(&file, &meta.times)?)
}

/// Owner, then mode (a change of owner takes set-id bits away), then attributes (and capabilities).
fn set_meta(file: impl AsFd, meta: &Meta, extended: &Extended) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(meta.mode))?;
    for (name, value) in &extended.xattrs {
        // The trusted ones steer overlayfs itself; others than these two mean nothing in an image.
        if !name.starts_with(b"user.") && name != b"security.capability" {
            continue;
        }
        let name =
            CString::new(name.as_slice()).map_err(|_| invalid("an attribute with a zero byte".into()))?;
        match rustix::fs::fsetxattr(&file, &name, value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn set_meta_nofollow(parent: &OwnedFd, name: &OsStr, meta: &Meta) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        // Just made by us in a directory nobody else writes to, so there is no link to follow.
        rustix::fs::chmodat(parent, name, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
    }
    Ok(rustix::fs::utimensat(parent, name, &meta.times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Everything written to the filesystem of `dir` so far is on disk when this returns.
pub fn sync_filesystem(dir: &Path) -> io::Result<()> {
    let dir = File::open(dir)?;
    nix::unistd::syncfs(&dir)?;
    Ok(())
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
pub(crate) mod tests;
