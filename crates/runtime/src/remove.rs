//! Removing directories that others filled.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Directories that are open at once. What lies deeper is moved up first.
const DEPTH_MAX: usize = 32;
/// Times that a directory is looked at again because something new was in it.
const ROUNDS_MAX: usize = 16;

/// Removes a directory and everything below it; fine if there is none. Blocking.
///
/// Follows no link and enters no other mount, and takes neither more memory nor more open files for directories
/// that are nested without end: their depth is up to whoever wrote there. In `/a/b/c/d/...` what is too deep is renamed to
/// `/a/.gone-1`, and removed from there.
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(io::Error::other("not a directory that can be removed"));
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match rustix::fs::openat(CWD, parent, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        parent => parent?,
    };
    let name = CString::new(std::os::unix::ffi::OsStrExt::as_bytes(name))?;
    match unlink(parent.as_fd(), &name) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    let root = enter(parent.as_fd(), &name)?;
    let mut moved = 0;
    for _ in 0..ROUNDS_MAX {
        // What was moved up is found in the next round.
        loop {
            let before = moved;
            empty(&root, &root, 0, &mut moved)?;
            if moved == before {
                break;
            }
        }
        match rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Somebody still writes there.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::NOTEMPTY.into())
}

fn unlink(at: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
    rustix::fs::unlinkat(at, name, AtFlags::empty())
}

/// Opens a directory that is really there: no link, and no other mount.
fn enter(at: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(at, name, flags, Mode::empty(), stay)
}

/// Removes what is in `dir`, which lies `depth` below `root`.
fn empty(root: &OwnedFd, dir: &OwnedFd, depth: usize, moved: &mut u64) -> io::Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if !matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
            match unlink(dir.as_fd(), name) {
                // Gone, or another thing by now.
                Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        if depth >= DEPTH_MAX {
            *moved += 1;
            let aside = CString::new(format!(".gone-{moved}")).expect("no zero byte in digits");
            match rustix::fs::renameat_with(dir, name, root, &aside, rustix::fs::RenameFlags::NOREPLACE) {
                // A name that is taken already is tried again with another number in the next round.
                Ok(()) | Err(Errno::EXIST | Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        let below = match enter(dir.as_fd(), name) {
            Ok(below) => below,
            Err(Errno::NOENT) => continue,
            Err(Errno::NOTDIR | Errno::LOOP) => {
                unlink(dir.as_fd(), name)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        empty(root, &below, depth + 1, moved)?;
        match rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn temp_dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("minke-remove-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a directory");
        dir
    }

    #[test]
    fn everything_goes_and_links_are_not_followed() {
        let dir = temp_dir("links");
        let (victim, tree) = (dir.join("victim"), dir.join("tree"));
        fs::create_dir_all(victim.join("kept")).expect("a directory");
        fs::write(victim.join("file"), "x").expect("a file");
        fs::create_dir_all(tree.join("a/b")).expect("directories");
        fs::write(tree.join("a/f"), "x").expect("a file");
        symlink(&victim, tree.join("a/b/out")).expect("a link");
        symlink("../..", tree.join("a/up")).expect("a link");
        symlink("nowhere", tree.join("dangling")).expect("a link");
        remove_tree(&tree).expect("removed");
        assert!(!tree.exists() && victim.join("kept").is_dir() && victim.join("file").is_file());
        remove_tree(&tree).expect("nothing to do");
        // The directory itself is a link: the link goes.
        symlink(&victim, &tree).expect("a link");
        remove_tree(&tree).expect("removed");
        assert!(fs::symlink_metadata(&tree).is_err() && victim.join("file").is_file());
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn depth_is_no_defence() {
        let dir = temp_dir("deep");
        let tree = dir.join("tree");
        fs::create_dir(&tree).expect("a directory");
        fs::write(tree.join(".gone-1"), "in the way").expect("a file");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = rustix::fs::openat(CWD, &tree, flags, Mode::empty()).expect("open");
        for n in 0..5000 {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o700)).expect("made");
            if n % 7 == 0 {
                rustix::fs::mkdirat(&at, "e", Mode::from_raw_mode(0o700)).expect("made");
            }
            at = rustix::fs::openat(&at, "d", flags, Mode::empty()).expect("open");
        }
        drop(at);
        remove_tree(&tree).expect("removed");
        assert!(!tree.exists());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
