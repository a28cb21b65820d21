//! Gives volumes to a group, as `fsGroup` asks. Upstream: pkg/volume/volume_linux.go. Blocking.
//!
//! A volume of a claim may be in use while it is walked, by a pod that means ill: no name is ever looked up
//! twice, and no link is followed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// When a volume is walked: `fsGroupChangePolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Always,
    /// Not if its top has the group and the permissions already.
    OnRootMismatch,
}

/// Gives a whole volume to a group; what is made in it later belongs to it too.
pub fn give(path: &Path, group: u32, writable: bool, policy: Policy) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    let status = rustix::fs::fstat(&root)?;
    let is_dir = FileType::from_raw_mode(status.st_mode) == FileType::Directory;
    let wanted = wanted(is_dir, writable);
    if policy == Policy::OnRootMismatch && status.st_gid == group && status.st_mode & wanted == wanted {
        return Ok(());
    }
    if !is_dir {
        return own(&root, group, writable);
    }
    // The top comes last: a walk that was cut short is seen to be so.
    let mut dirs = vec![PathBuf::new()];
    while let Some(at) = dirs.pop() {
        let dir = match open(&root, &at, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            // Another file system, which is somebody else's.
            Err(Errno::XDEV) => continue,
            dir => dir?,
        };
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let name = std::os::unix::ffi::OsStrExt::from_bytes(entry.file_name().to_bytes());
            let below = at.join::<&std::ffi::OsStr>(name);
            let found = match open(&root, &below, OFlags::PATH | OFlags::NOFOLLOW) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => continue,
                found => found?,
            };
            own(&found, group, writable)?;
            if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) == FileType::Directory {
                dirs.push(below);
            }
        }
    }
    own(&root, group, writable)
}

/// Opens what is below `root`; a link on the way is an error, one at the end is opened itself.
fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let stay = if flags.contains(OFlags::PATH) { stay } else { stay | ResolveFlags::NO_SYMLINKS };
    rustix::fs::openat2(root, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), stay)
}

fn wanted(is_dir: bool, writable: bool) -> u32 {
    let mode = if writable { 0o660 } else { 0o440 };
    if is_dir { mode | 0o2110 } else { mode }
}

fn own(found: &OwnedFd, group: u32, writable: bool) -> io::Result<()> {
    let status = rustix::fs::fstat(found)?;
    let kind = FileType::from_raw_mode(status.st_mode);
    if status.st_gid != group {
        rustix::fs::chownat(found, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
    }
    let mode = status.st_mode & 0o7777 | wanted(kind == FileType::Directory, writable);
    if kind == FileType::Symlink || mode == status.st_mode & 0o7777 {
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    Ok(rustix::fs::chmod(path, Mode::from_raw_mode(mode))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_volume_is_given_whole_and_nothing_outside_of_it() {
        let dir = crate::testing::temp_dir("ownership");
        let (volume, outside) = (dir.join("volume"), dir.join("outside"));
        fs::create_dir_all(volume.join("a/b")).expect("directories");
        fs::write(volume.join("a/b/f"), "x").expect("a file");
        fs::set_permissions(volume.join("a/b/f"), fs::Permissions::from_mode(0o600)).expect("set");
        fs::create_dir(&outside).expect("a directory");
        symlink(&outside, volume.join("out")).expect("a link");
        let before = fs::metadata(&outside).expect("there").mode();
        give(&volume, 4321, true, Policy::Always).expect("given");
        let seen = |path: &str| {
            let found = fs::symlink_metadata(volume.join(path)).expect("there");
            (found.gid(), found.mode() & 0o7777)
        };
        assert_eq!(seen("a/b/f"), (4321, 0o660));
        assert_eq!((seen("a").0, seen("a").1 & 0o2770), (4321, 0o2770));
        assert_eq!(seen("out").0, 4321, "the link itself");
        let after = fs::metadata(&outside).expect("there");
        assert_eq!((after.gid(), after.mode()), (0, before));
        // The top is right, so that nothing below is looked at.
        fs::write(volume.join("new"), "x").expect("a file");
        fs::set_permissions(volume.join("new"), fs::Permissions::from_mode(0o600)).expect("set");
        give(&volume, 4321, true, Policy::OnRootMismatch).expect("nothing to do");
        assert_eq!(seen("new").1, 0o600);
        give(&volume, 4321, true, Policy::Always).expect("given");
        assert_eq!(seen("new").1, 0o660);
        fs::remove_dir_all(&dir).expect("removed");
    }
}
