//! Contents by their digest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::reference::parse_digest;
use super::room::Room;
use super::unpack::hex;

/// What a download that was broken off left, to be gone on with, begins with this.
const PARTIAL: &str = ".partial-";
/// For how long it is kept: longer than the longest back-off between two tries.
const PARTIAL_KEPT: Duration = Duration::from_secs(3600);

pub struct Blobs {
    dir: PathBuf,
}

impl Blobs {
    pub fn open(images: &Path) -> io::Result<Self> {
        let dir = images.join("blobs/sha256");
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, digest: &str) -> io::Result<PathBuf> {
        let hex = parse_digest(digest).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("unsupported digest {digest:?}"))
        })?;
        Ok(self.dir.join(hex))
    }

    /// What may still be written.
    pub fn room(&self) -> io::Result<Room> {
        Room::in_dir(&self.dir)
    }

    pub fn contains(&self, digest: &str) -> bool {
        self.path(digest).is_ok_and(|p| p.exists())
    }

    pub fn size(&self, digest: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.path(digest)?)?.len())
    }

    pub fn read(&self, digest: &str) -> io::Result<File> {
        let path = self.path(digest)?;
        File::open(path).map_err(|e| io::Error::new(e.kind(), format!("content {digest}: {e}")))
    }

    /// A small blob as a whole.
    pub fn bytes(&self, digest: &str, max: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(digest)?.take(max + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > max {
            return Err(io::Error::other(format!("content {digest} is larger than {max} bytes")));
        }
        Ok(bytes)
    }

    pub fn put(&self, bytes: &[u8]) -> io::Result<String> {
        let mut new = self.create()?;
        new.write_all(bytes)?;
        Ok(new.commit()?.0)
    }

    /// A blob whose digest is found while it is written.
    pub fn create(&self) -> io::Result<NewBlob> {
        let path = self.dir.join(format!(".tmp-{:016x}", rand::random::<u64>()));
        let file = File::create_new(&path)?;
        let (room, hash) = (self.room()?, Sha256::new());
        Ok(NewBlob { dir: self.dir.clone(), file, path, hash, size: 0, keep: false, room })
    }

    /// A blob of a known digest, with what an earlier try got of it; `None` when it is there. Waits while
    /// anyone else, in any process, is at it. Dropped, it stays to be gone on with.
    pub fn resume(&self, digest: &str) -> io::Result<Option<NewBlob>> {
        let target = self.path(digest)?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let path = self.dir.join(format!("{PARTIAL}{name}"));
        loop {
            if target.exists() {
                return Ok(None);
            }
            let mut file = File::options().create(true).read(true).append(true).open(&path)?;
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
            // Whoever had the lock may have made it the blob, or removed it.
            if !fs::metadata(&path).is_ok_and(|meta| meta.ino() == file.metadata().map_or(0, |m| m.ino())) {
                continue;
            }
            let (mut hash, mut size, mut chunk) = (Sha256::new(), 0, vec![0; 256 * 1024]);
            loop {
                let n = file.read(&mut chunk)?;
                if n == 0 {
                    break;
                }
                hash.update(&chunk[..n]);
                size += n as u64;
            }
            let room = self.room()?;
            return Ok(Some(NewBlob { dir: self.dir.clone(), file, path, hash, size, keep: true, room }));
        }
    }

    /// Removes what is not in `needed`, and what unfinished transfers left.
    pub fn retain(&self, needed: &BTreeSet<String>) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
            let resumable = name.starts_with(PARTIAL) && age().is_some_and(|age| age < PARTIAL_KEPT);
            if !resumable && !needed.contains(&format!("sha256:{name}")) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// A blob under way; dropped without [`NewBlob::commit`] it leaves nothing, unless it is to be resumed.
pub struct NewBlob {
    dir: PathBuf,
    file: File,
    path: PathBuf,
    hash: Sha256,
    size: u64,
    /// The file stays when this is dropped.
    keep: bool,
    room: Room,
}

impl NewBlob {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Forgets what is there.
    pub fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(io::SeekFrom::Start(0))?;
        (self.hash, self.size) = (Sha256::new(), 0);
        Ok(())
    }

    /// Puts it in its place; returns digest and size.
    pub fn commit(mut self) -> io::Result<(String, u64)> {
        let hash = std::mem::take(&mut self.hash);
        let digest = format!("sha256:{}", hex(&hash.finalize()));
        self.file.sync_data()?;
        fs::rename(&self.path, self.dir.join(parse_digest(&digest).unwrap_or_default()))?;
        self.keep = true;
        Ok((digest, self.size))
    }

    /// The same, if it turns out to be what was announced.
    pub fn commit_as(mut self, want: &str) -> io::Result<u64> {
        let got = format!("sha256:{}", hex(&self.hash.clone().finalize()));
        if got != want {
            // There is nothing to go on with.
            self.keep = false;
            return Err(io::Error::other(format!("unexpected commit digest {got}, expected {want}")));
        }
        self.commit().map(|(_, size)| size)
    }
}

impl Write for NewBlob {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.room.take(bytes.len() as u64)?;
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewBlob {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Bytes that a directory's files take on disk.
pub fn disk_usage(dir: &Path) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        sum += meta.blocks() * 512;
        if meta.is_dir() {
            sum += disk_usage(&entry.path());
        }
    }
    sum
}
