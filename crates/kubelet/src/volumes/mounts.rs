//! Mounting memory, and unmounting everything a pod has. Blocking.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

/// Whether something is mounted on `dir`.
pub fn is_mounted(dir: &Path) -> io::Result<bool> {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(true);
    }
    // A bind mount of the same file system shows only in the table.
    Ok(below(dir, &fs::read_to_string("/proc/self/mountinfo")?).iter().any(|path| path == dir))
}

/// Mounts memory on `dir`, once; `bytes` limits it.
pub fn tmpfs(dir: &Path, bytes: Option<i64>) -> io::Result<()> {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    // Memory is always a file system of its own.
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(());
    }
    let options = bytes.map(|bytes| CString::new(format!("size={bytes}")).expect("digits hold no zero byte"));
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount("tmpfs", dir, "tmpfs", flags, options.as_deref())?;
    Ok(())
}

/// Makes what is mounted below `dir` from now on show in pods that run already: parts of volumes are
/// mounted when a container starts, and the pod's processes have a mount namespace of their own by then.
pub fn make_shared(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    if is_shared(dir, &table) {
        return Ok(());
    }
    // A mount over what is mounted below would hide it for good.
    if below(dir, &table).is_empty() {
        rustix::mount::mount_bind(dir, dir)?;
        rustix::mount::mount_change(dir, MountPropagationFlags::SHARED)?;
    }
    Ok(())
}

/// Whether `dir` itself is a mount point that passes mounts on.
fn is_shared(dir: &Path, mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| {
        let mut words = line.split(' ');
        let here = words.nth(4).is_some_and(|point| Path::new(&unescape(point)) == dir);
        here && words.skip(1).take_while(|word| *word != "-").any(|word| word.starts_with("shared:"))
    })
}

/// The mount points at or below `dir`, in the order in which they were mounted.
fn below(dir: &Path, mountinfo: &str) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(|point| PathBuf::from(unescape(point))).filter(|point| point.starts_with(dir)).collect()
}

/// The kernel prints space, tab, newline and backslash as `\ooo`.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Unmounts everything below `dir` and removes it. It is removed only when nothing is mounted there any
/// more, for what is mounted may be the user's.
pub fn clean_up(dir: &Path) -> io::Result<()> {
    let mounted =
        || -> io::Result<Vec<PathBuf>> { Ok(below(dir, &fs::read_to_string("/proc/self/mountinfo")?)) };
    for point in mounted()?.iter().rev() {
        rustix::mount::unmount(point, UnmountFlags::DETACH)?;
    }
    if let Some(point) = mounted()?.first() {
        return Err(io::Error::other(format!("{} is still mounted", point.display())));
    }
    minke_runtime::remove_tree(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_a_directory_are_found() {
        let table = "22 1 0:1 / / rw - ext4 a rw\n\
                     23 22 0:2 / /data/pods/u/v\\0401 rw - tmpfs t rw\n\
                     24 22 0:3 / /data/pods/u2 rw - tmpfs t rw\n\
                     25 23 0:4 / /data/pods/u rw - tmpfs t rw\n";
        let got = below(Path::new("/data/pods/u"), table);
        assert_eq!(got, [PathBuf::from("/data/pods/u/v 1"), PathBuf::from("/data/pods/u")]);
        let shared =
            "23 22 0:2 / /data/pods rw shared:7 master:1 - ext4 a rw\n24 22 0:2 / /b rw - ext4 shared:1 rw\n";
        assert!(is_shared(Path::new("/data/pods"), shared));
        assert!(!is_shared(Path::new("/b"), shared) && !is_shared(Path::new("/data"), shared));
    }
}
