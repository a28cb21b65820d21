//! Mounting memory, and unmounting everything a pod has. Blocking.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use minke_runtime::mount_point;
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
    let options = bytes.map(|bytes| format!("size={bytes}"));
    own_file_system("tmpfs", dir, MountFlags::NODEV | MountFlags::NOSUID, options)
}

/// Mounts huge pages on `dir`, once; `bytes` are those of one page.
pub fn hugetlbfs(dir: &Path, bytes: i64) -> io::Result<()> {
    own_file_system("hugetlbfs", dir, MountFlags::NODEV, Some(format!("pagesize={bytes}")))
}

fn own_file_system(kind: &str, dir: &Path, flags: MountFlags, options: Option<String>) -> io::Result<()> {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(());
    }
    let options = options.map(|options| CString::new(options).expect("options hold no zero byte"));
    rustix::mount::mount(kind, dir, kind, flags, options.as_deref())?;
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
    let mut lines = mountinfo.lines();
    lines.any(|line| mount_point(line).is_some_and(|point| point == dir) && is_tagged(line, "shared:"))
}

/// Whether the line is of a mount with this tag: `shared:` or `master:`.
fn is_tagged(line: &str, tag: &str) -> bool {
    line.split(' ').skip(6).take_while(|word| *word != "-").any(|word| word.starts_with(tag))
}

/// Why mounts can't pass between the node and a container that is to have `dir`; in the words of the field's
/// runtimes. `both` asks for both ways.
pub fn check_propagation(dir: &Path, both: bool) -> Result<(), String> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let dir = fs::canonicalize(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    propagates(&dir, &table, both)
}

fn propagates(dir: &Path, mountinfo: &str, both: bool) -> Result<(), String> {
    let here = mountinfo.lines().filter_map(|line| mount_point(line).map(|point| (point, line)));
    // The innermost mount, and of several at one point the last.
    let here = here.filter(|(point, _)| dir.starts_with(point));
    let here = here.max_by_key(|(point, _)| point.components().count());
    let Some((point, line)) = here else { return Ok(()) };
    if is_tagged(line, "shared:") || (!both && is_tagged(line, "master:")) {
        return Ok(());
    }
    let wanted = if both { "shared" } else { "shared or slave" };
    Err(format!(
        "path \"{}\" is mounted on \"{}\" but it is not a {wanted} mount",
        dir.display(),
        point.display()
    ))
}

/// The mount points at or below `dir`, in the order in which they were mounted.
fn below(dir: &Path, mountinfo: &str) -> Vec<PathBuf> {
    mountinfo.lines().filter_map(mount_point).filter(|point| point.starts_with(dir)).collect()
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
    fn memory_and_huge_pages_are_mounted_once_and_cleaned_up() {
        let dir = crate::testing::temp_dir("own-file-systems");
        let (memory, pages) = (dir.join("memory"), dir.join("pages"));
        for at in [&memory, &pages] {
            fs::create_dir_all(at).expect("a directory");
        }
        if let Err(why) = tmpfs(&memory, Some(1 << 20)) {
            println!("    skipped: mount: {why}");
            return fs::remove_dir_all(&dir).expect("removed");
        }
        fs::write(memory.join("f"), "x").expect("a file");
        tmpfs(&memory, Some(1 << 20)).expect("mounted already");
        assert!(memory.join("f").exists());
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("hugetlbfs");
        if known && Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            hugetlbfs(&pages, 2 << 20).expect("mounted");
            hugetlbfs(&pages, 2 << 20).expect("mounted already");
            let table = fs::read_to_string("/proc/self/mountinfo").expect("a table");
            let own: Vec<&str> =
                table.lines().filter(|line| mount_point(line).is_some_and(|at| at == pages)).collect();
            assert!(
                own.len() == 1 && own[0].contains("hugetlbfs") && own[0].ends_with("pagesize=2M"),
                "{own:?}"
            );
            assert!(hugetlbfs(&dir, 3 << 20).is_err(), "there are no such pages");
        }
        clean_up(&dir).expect("cleaned up");
        assert!(!dir.exists());
    }

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
        let passes = |dir: &str, both: bool| propagates(Path::new(dir), shared, both);
        assert_eq!((passes("/data/pods/u", true), passes("/elsewhere", true)), (Ok(()), Ok(())));
        let why = "path \"/b/c\" is mounted on \"/b\" but it is not a shared mount";
        assert_eq!(passes("/b/c", true), Err(why.to_owned()));
        assert!(passes("/b/c", false).is_err_and(|why| why.ends_with("shared or slave mount")));
        assert_eq!(propagates(Path::new("/x/y"), "1 1 0:1 / /x rw master:3 - ext4 a rw", false), Ok(()));
    }
}
