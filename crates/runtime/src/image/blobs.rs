//! Contents by their digest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::reference::parse_digest;
use super::unpack::hex;

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
    pub fn create(&self) -> io::Result<NewBlob<'_>> {
        let path = self.dir.join(format!(".tmp-{:016x}", rand::random::<u64>()));
        let file = File::create_new(&path)?;
        Ok(NewBlob { blobs: self, file, path, hash: Sha256::new(), size: 0, done: false })
    }

    /// Removes what is not in `needed`, and what unfinished transfers left.
    pub fn retain(&self, needed: &BTreeSet<String>) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let needed = name.to_str().is_some_and(|n| needed.contains(&format!("sha256:{n}")));
            if !needed {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// A blob under way; dropped without [`NewBlob::commit`] it leaves nothing.
pub struct NewBlob<'a> {
    blobs: &'a Blobs,
    file: File,
    path: PathBuf,
    hash: Sha256,
    size: u64,
    done: bool,
}

impl NewBlob<'_> {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Puts it in its place; returns digest and size.
    pub fn commit(mut self) -> io::Result<(String, u64)> {
        let hash = std::mem::take(&mut self.hash);
        let digest = format!("sha256:{}", hex(&hash.finalize()));
        self.file.sync_data()?;
        fs::rename(&self.path, self.blobs.path(&digest)?)?;
        self.done = true;
        Ok((digest, self.size))
    }

    /// The same, if it turns out to be what was announced.
    pub fn commit_as(self, want: &str) -> io::Result<u64> {
        let got = format!("sha256:{}", hex(&self.hash.clone().finalize()));
        if got != want {
            return Err(io::Error::other(format!("unexpected commit digest {got}, expected {want}")));
        }
        self.commit().map(|(_, size)| size)
    }
}

impl Write for NewBlob<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewBlob<'_> {
    fn drop(&mut self) {
        if !self.done {
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
