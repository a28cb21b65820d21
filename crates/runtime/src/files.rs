//! Small files that are whole or not there, and what directories take on a disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::DiskUse;

/// Writes beside the file, then renames over it. Survives the end of the process at any point; what must
/// survive a power cut uses [`write_json_synced`].
pub fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write(path, value, false)
}

pub fn write_json_synced(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write(path, value, true)
}

fn write(path: &Path, value: &impl Serialize, sync: bool) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if sync {
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
    }
    Ok(())
}

/// `None` when there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| io::Error::other(format!("{}: {e}", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
}

/// What a directory and everything below it takes, on its own file system only. What cannot be read, because
/// it has just gone, say, does not count. Walks every directory, so it is nothing to ask for often.
pub fn disk_use(dir: &Path) -> DiskUse {
    let mut sum = DiskUse::default();
    let Ok(top) = fs::symlink_metadata(dir) else { return sum };
    // Files of several names count once.
    let mut linked = HashSet::new();
    let mut count = |meta: &fs::Metadata| {
        if meta.is_dir() || meta.nlink() == 1 || linked.insert(meta.ino()) {
            sum.bytes += meta.blocks() * 512;
            sum.inodes += 1;
        }
    };
    count(&top);
    // Not by recursion: how deep it goes is up to whoever wrote there.
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() {
                continue;
            }
            count(&meta);
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_count_once_and_links_do_not_lead_away() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("d");
        fs::create_dir_all(dir.join("a/b")).unwrap();
        let empty = disk_use(&dir);
        assert_eq!(empty.inodes, 3);
        fs::write(dir.join("a/f"), vec![1; 100_000]).unwrap();
        fs::hard_link(dir.join("a/f"), dir.join("a/b/g")).unwrap();
        std::os::unix::fs::symlink("/usr", dir.join("s")).unwrap();
        let now = disk_use(&dir);
        assert_eq!(now.inodes, 5);
        assert!((100_000..150_000).contains(&(now.bytes - empty.bytes)), "{now:?}");
        assert_eq!(disk_use(&dir.join("gone")), DiskUse::default());
    }
}
