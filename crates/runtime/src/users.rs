//! Who a container runs as, by the passwd and group files of its own root filesystem.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};

use crate::api::User;

/// Most bytes of a passwd or group file that are looked at.
const FILE_MAX: u64 = 4 << 20;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    pub uid: u32,
    pub gid: u32,
    /// The primary group first, then what the image and the caller add.
    pub groups: Vec<u32>,
    pub home: String,
}

/// Resolves against the files in `rootfs`, which are the image's: nothing outside of it is ever opened.
pub fn resolve(rootfs: &Path, wanted: &User, image_user: &str) -> Result<Resolved, String> {
    let passwd = read_in(rootfs, Path::new("etc/passwd"));
    let group = read_in(rootfs, Path::new("etc/group"));
    resolve_with(&passwd, &group, wanted, image_user)
}

pub(crate) fn resolve_with(
    passwd: &str,
    group: &str,
    wanted: &User,
    image_user: &str,
) -> Result<Resolved, String> {
    let (image_name, image_group) = image_user.split_once(':').unwrap_or((image_user, ""));
    let name = wanted.user.as_deref().unwrap_or(image_name);
    let name = if name.is_empty() { "0" } else { name };
    // name:password:uid:gid:comment:home:shell
    let entries = passwd.lines().filter_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        Some((
            *f.first()?,
            f.get(2)?.parse::<u32>().ok()?,
            f.get(3)?.parse::<u32>().ok()?,
            f.get(5).copied()?,
        ))
    });
    let number = name.parse::<u32>().ok();
    let mut matching = entries.filter(|(n, uid, ..)| Some(*uid) == number || *n == name);
    let entry = matching.next();
    let uid = match (entry, number) {
        (_, Some(number)) => number,
        (Some((_, uid, ..)), None) => uid,
        (None, None) => {
            return Err(format!("unable to find user {name}: no matching entries in passwd file"));
        }
    };

    // name:password:gid:members
    let groups: Vec<(&str, u32, Vec<&str>)> = group
        .lines()
        .filter_map(|line| {
            let f: Vec<&str> = line.split(':').collect();
            let members =
                f.get(3).map(|m| m.split(',').filter(|m| !m.is_empty()).collect()).unwrap_or_default();
            Some((*f.first()?, f.get(2)?.parse().ok()?, members))
        })
        .collect();
    let gid = match wanted.group {
        Some(gid) => gid,
        None if wanted.user.is_none() && !image_group.is_empty() => match image_group.parse() {
            Ok(gid) => gid,
            Err(_) => groups
                .iter()
                .find(|(n, ..)| *n == image_group)
                .map(|(_, gid, _)| *gid)
                .ok_or_else(|| format!("no matching entries in group file for {image_group}"))?,
        },
        None => entry.map_or(0, |(_, _, gid, _)| gid),
    };
    let mut all = vec![gid];
    if let (Some((user, ..)), false) = (entry, wanted.strict_groups) {
        all.extend(groups.iter().filter(|(_, _, members)| members.contains(&user)).map(|(_, gid, _)| *gid));
    }
    all.extend(&wanted.supplementary_groups);
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|g| seen.insert(*g));
    let home = entry.map(|(.., home)| home).filter(|h| !h.is_empty()).unwrap_or("/");
    Ok(Resolved { uid, gid, groups: all, home: home.to_owned() })
}

/// A file's text, empty when there is none; symbolic links lead no further than the root filesystem.
fn read_in(rootfs: &Path, path: &Path) -> String {
    let open = || -> io::Result<String> {
        let dir =
            rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat2(dir, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let file = File::from(file);
        if !file.metadata()?.is_file() {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    open().unwrap_or_default()
}

/// Makes a directory, and those above it, inside a root filesystem that may hold hostile links. What is new is
/// `owner`'s, user and group.
pub fn make_dir_in(rootfs: &Path, path: &Path, owner: u32) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags, Mode::empty())?;
    let mut so_far = std::path::PathBuf::new();
    for part in path.components().filter(|c| matches!(c, Component::Normal(_))) {
        let parent = match so_far.as_os_str().is_empty() {
            true => Path::new("."),
            false => so_far.as_path(),
        };
        let dir = rustix::fs::openat2(&root, parent, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        match rustix::fs::mkdirat(&dir, part.as_os_str(), Mode::from_raw_mode(0o755)) {
            Ok(()) if owner == 0 => {}
            Ok(()) => {
                let (uid, gid) = (Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)));
                rustix::fs::chownat(&dir, part.as_os_str(), uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        so_far.push(part);
    }
    Ok(())
}

/// Whether pods may have users of their own: such namespaces may be made, and all file systems that pods are made of
/// can be mapped into them (tmpfs the last, in Linux 6.3).
pub fn kernel_has_user_namespaces() -> bool {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default();
    let name = rustix::system::uname();
    limit.trim().parse::<u64>().is_ok_and(|n| n > 0) && is_since(&name.release().to_string_lossy(), (6, 3))
}

/// Whether a release of Linux is at least this version.
fn is_since(release: &str, version: (u32, u32)) -> bool {
    let mut parts = release.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= version
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:Web:/srv:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:102:\nlogs:x:300:web,other\nmail:x:8:other\n";

    #[track_caller]
    fn check(
        user: Option<&str>,
        group: Option<u32>,
        image: &str,
        want: Result<(u32, u32, &[u32], &str), &str>,
    ) {
        let wanted = User { user: user.map(str::to_owned), group, ..Default::default() };
        let got = resolve_with(PASSWD, GROUP, &wanted, image);
        let want = want.map(|(uid, gid, groups, home)| Resolved {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        });
        assert_eq!(got.map_err(|e| e.to_string()), want.map_err(str::to_owned));
    }

    #[test]
    fn users_resolve_as_the_field_does() {
        check(None, None, "", Ok((0, 0, &[0], "/root")));
        check(None, None, "web", Ok((101, 102, &[102, 300], "/srv")));
        check(None, None, "101", Ok((101, 102, &[102, 300], "/srv")));
        check(None, None, "web:mail", Ok((101, 8, &[8, 300], "/srv")));
        check(None, None, "5000:6000", Ok((5000, 6000, &[6000], "/")));
        check(Some("1000"), None, "web:mail", Ok((1000, 0, &[0], "/")));
        check(Some("1000"), Some(7), "web", Ok((1000, 7, &[7], "/")));
        check(None, None, "ghost", Err("unable to find user ghost: no matching entries in passwd file"));
        check(None, None, "web:ghost", Err("no matching entries in group file for ghost"));
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert!(is_since("6.18.44-fc", (6, 3)) && is_since("6.3", (6, 3)) && is_since("7.0-rc1", (6, 3)));
        assert!(!is_since("6.1.0-18-amd64", (6, 3)) && !is_since("5.15.0+", (6, 3)) && !is_since("", (6, 3)));
    }

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, outside) = (tmp.path().join("root"), tmp.path().join("outside"));
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("passwd"), "evil").unwrap();
        std::os::unix::fs::symlink(outside.join("passwd"), root.join("etc/passwd")).unwrap();
        assert_eq!(read_in(&root, Path::new("etc/passwd")), "");
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        assert!(make_dir_in(&root, Path::new("/link/made"), 0).is_err() || !outside.join("made").exists());
        assert!(!outside.join("made").exists());
        make_dir_in(&root, Path::new("/a/b/c"), 0).unwrap();
        assert!(root.join("a/b/c").is_dir());
    }
}
