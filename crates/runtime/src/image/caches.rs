//! Directories that steps of builds share with later builds: `RUN --mount=type=cache`.
//!
//! ```text
//! <root>/images/caches/<24 hex>        the files of one
//! <root>/images/caches/<24 hex>.lock   held while a step uses it; when it was used last is the time of this file
//! ```
//! They are nobody's in particular: what is not in use can go at any time.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::build::{EntryMeta, hex_digest};
use super::{ImageStore, failed};
use crate::api::Result;

/// For how long one is kept that nothing uses.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Builds that can have a private one of the same name at the same time.
const PRIVATE_MAX: usize = 64;
/// Digits of a name.
const NAME: usize = 24;

/// Who may use a directory at the same time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Everyone.
    #[default]
    Shared,
    /// One after the other.
    Locked,
    /// Each has one to itself.
    Private,
}

/// A directory in use; dropped, it may be taken away.
#[derive(Debug)]
pub struct Cache {
    pub path: PathBuf,
    _lock: File,
}

impl ImageStore {
    /// The directory named `id`, made when there is none. `None` while others must not be joined.
    pub fn cache(&self, id: &str, sharing: Sharing, new: EntryMeta) -> Result<Option<Cache>> {
        let dir = self.images_dir().join("caches");
        fs::create_dir_all(&dir).map_err(failed)?;
        let how = match sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockShared,
            Sharing::Locked | Sharing::Private => FlockOperation::NonBlockingLockExclusive,
        };
        let names = if sharing == Sharing::Private { PRIVATE_MAX } else { 1 };
        for n in 0..names {
            let name = &hex_digest(&[id.as_bytes(), n.to_string().as_bytes()])[..NAME];
            if let Some(lock) = take(&dir, name, how).map_err(failed)? {
                let path = dir.join(name);
                make(&path, new).map_err(failed)?;
                return Ok(Some(Cache { path, _lock: lock }));
            }
        }
        Ok(None)
    }

    /// Removes those that nothing has used for long, and then, the one used longest ago first, until no more than
    /// `bytes` are left. Returns what came free.
    pub fn prune_caches(&self, bytes: u64) -> Result<u64> {
        let dir = self.images_dir().join("caches");
        let mut known: Vec<(SystemTime, String, u64)> = Vec::new();
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(name) = name.strip_suffix(".lock") else { continue };
            let used = entry.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            known.push((used, name.to_owned(), crate::disk_use(&dir.join(name)).bytes));
        }
        known.sort();
        let mut left: u64 = known.iter().map(|(.., size)| size).sum();
        let mut freed = 0;
        for (used, name, size) in known {
            let old = used.elapsed().is_ok_and(|age| age > KEPT);
            if !old && (left <= bytes && bytes > 0) {
                continue;
            }
            let Some(_lock) = take(&dir, &name, FlockOperation::NonBlockingLockExclusive).map_err(failed)?
            else {
                continue;
            };
            crate::remove_tree(&dir.join(&name)).map_err(failed)?;
            fs::remove_file(dir.join(format!("{name}.lock"))).map_err(failed)?;
            left -= size;
            freed += size;
        }
        Ok(freed)
    }
}

/// The lock of a directory, which is now used; `None` when somebody has it.
fn take(dir: &Path, name: &str, how: FlockOperation) -> io::Result<Option<File>> {
    let path = dir.join(format!("{name}.lock"));
    loop {
        let file = File::options().create(true).append(true).open(&path)?;
        match rustix::fs::flock(&file, how) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Whoever had it may have removed it.
        if fs::metadata(&path).is_ok_and(|meta| file.metadata().is_ok_and(|own| own.ino() == meta.ino())) {
            file.set_modified(SystemTime::now())?;
            return Ok(Some(file));
        }
    }
}

fn make(path: &Path, new: EntryMeta) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    // It appears when it is as it should be.
    let begun = path.with_extension(format!("new-{:016x}", rand::random::<u64>()));
    fs::create_dir(&begun)?;
    std::os::unix::fs::chown(&begun, Some(new.uid), Some(new.gid))?;
    fs::set_permissions(&begun, fs::Permissions::from_mode(new.mode))?;
    match fs::rename(&begun, path) {
        // Another build was quicker.
        Err(_) if path.exists() => fs::remove_dir(&begun),
        renamed => renamed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::RegistryConfig;

    #[test]
    fn caches_are_kept_while_they_are_of_use() {
        let tmp = tempfile::tempdir().unwrap();
        let store = ImageStore::open(tmp.path(), RegistryConfig::default()).unwrap();
        let meta = EntryMeta { mode: 0o750, ..EntryMeta::default() };
        let take = |id: &str, sharing| store.cache(id, sharing, meta).unwrap();
        let one = take("a", Sharing::Shared).unwrap();
        assert_eq!(fs::metadata(&one.path).unwrap().mode() & 0o777, 0o750);
        assert_eq!(take("a", Sharing::Shared).unwrap().path, one.path);
        assert!(take("a", Sharing::Locked).is_none(), "it is in use");
        let private = take("a", Sharing::Private).unwrap();
        assert_ne!(private.path, one.path);
        fs::write(one.path.join("f"), vec![1; 8192]).unwrap();
        assert_eq!(store.prune_caches(0).unwrap(), 0, "all are in use");
        drop((one, private));
        assert_eq!(take("a", Sharing::Locked).unwrap().path.join("f").metadata().unwrap().len(), 8192);

        // The oldest goes, and no more than must.
        let later = take("b", Sharing::Shared).unwrap();
        fs::write(later.path.join("f"), vec![1; 8192]).unwrap();
        let (newer, name) = (later.path.clone(), later.path.file_name().unwrap().to_owned());
        drop(later);
        let lock = newer.with_file_name(format!("{}.lock", name.to_string_lossy()));
        let file = File::options().append(true).open(lock).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
        assert!(store.prune_caches(16_000).unwrap() >= 8192);
        assert!(newer.join("f").exists());
        file.set_modified(SystemTime::now() - KEPT * 2).unwrap();
        store.prune_caches(1 << 30).unwrap();
        assert_eq!(fs::read_dir(tmp.path().join("images/caches")).unwrap().count(), 0);
    }
}
