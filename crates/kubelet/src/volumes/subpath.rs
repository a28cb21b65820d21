//! Mounts a part of a volume (`subPath`) without being led out of it by links.
//!
//! The path is resolved by the kernel with the volume as its root, and what was found is bound through
//! its file descriptor: a container that swaps a directory for a link meanwhile gains nothing. Blocking.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Why a part could not be mounted. It prints as upstream tells it, which is not the cause.
#[derive(Debug, thiserror::Error)]
#[error("failed to {} subPath{}", if *.making { "create" } else { "prepare" }, if *.making { " directory" } else { "" })]
pub struct Failure {
    /// A directory that was missing could not be made.
    making: bool,
    #[source]
    pub cause: io::Error,
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(cause: E) -> Failure {
        Failure { making: false, cause: cause.into() }
    }
}

/// Binds `sub` of the volume at `volume` to `target`; missing directories are made.
pub fn bind(volume: &Path, sub: &str, target: &Path) -> Result<(), Failure> {
    let part = open(volume, sub)?;
    if fs::symlink_metadata(target).is_ok() && super::is_mounted(target)? {
        rustix::mount::unmount(target, rustix::mount::UnmountFlags::DETACH)?;
    }
    let is_dir = FileType::from_raw_mode(rustix::fs::fstat(&part)?.st_mode) == FileType::Directory;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() == is_dir => {}
        Ok(found) if found.is_dir() => fs::remove_dir(target)?,
        Ok(_) => fs::remove_file(target)?,
        Err(_) => {}
    }
    if is_dir {
        fs::create_dir_all(target)?;
    } else {
        fs::OpenOptions::new().create(true).append(true).open(target)?;
    }
    rustix::mount::mount_bind_recursive(format!("/proc/self/fd/{}", part.as_raw_fd()), target)?;
    Ok(())
}

fn open(volume: &Path, sub: &str) -> Result<OwnedFd, Failure> {
    let mut at = rustix::fs::openat(CWD, volume, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let root = at.try_clone()?;
    let mut so_far = std::path::PathBuf::new();
    for part in Path::new(sub).components() {
        let Component::Normal(name) = part else {
            return Err(io::Error::other("subPath must stay in its volume").into());
        };
        so_far.push(name);
        at = match resolve(&root, &so_far) {
            Err(Errno::NOENT) => {
                match rustix::fs::mkdirat(at.as_fd(), name, Mode::from_raw_mode(0o750)) {
                    // It is a link, and to nothing in here.
                    Err(Errno::EXIST) => return Err(Errno::NOENT.into()),
                    made => made.map_err(|cause| Failure { making: true, cause: cause.into() })?,
                }
                // With the group's bit: what is made in there is of the volume's group too.
                let mode = rustix::fs::fstat(&root)?.st_mode & 0o2777;
                let made = resolve(&root, &so_far)?;
                fs::set_permissions(
                    format!("/proc/self/fd/{}", made.as_raw_fd()),
                    std::os::unix::fs::PermissionsExt::from_mode(mode),
                )?;
                made
            }
            found => found?,
        };
    }
    Ok(at)
}

fn resolve(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let stay = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, flags, Mode::empty(), stay)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_volume_is_found_and_links_stay_inside() {
        let dir = crate::testing::temp_dir("subpath");
        fs::create_dir_all(dir.join("a/b")).expect("directories");
        fs::write(dir.join("a/f"), "x").expect("a file");
        std::os::unix::fs::symlink("/etc", dir.join("out")).expect("a link");
        std::os::unix::fs::symlink("a/f", dir.join("in")).expect("a link");
        let path = |sub: &str| {
            let fd = open(&dir, sub).map_err(|error| error.to_string())?;
            let path =
                fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|e| e.to_string())?;
            Ok::<_, String>(path.strip_prefix(&dir).map_err(|_| "outside")?.to_string_lossy().into_owned())
        };
        assert_eq!(path("a/b"), Ok("a/b".into()));
        assert_eq!(path("in"), Ok("a/f".into()));
        assert_eq!(path("new/deep"), Ok("new/deep".into()));
        assert!(path("../x").is_err() && path("/etc").is_err());
        // In the volume there is no /etc, and none is made through the link.
        let prepare = Err("failed to prepare subPath".to_owned());
        assert_eq!((path("out/passwd"), path("a/f/x")), (prepare.clone(), prepare));
        let made = open(Path::new("/proc"), "nosuch").map(drop).map_err(|failure| failure.to_string());
        assert_eq!(made, Err("failed to create subPath directory".to_owned()));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
