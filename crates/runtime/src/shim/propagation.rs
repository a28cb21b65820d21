//! Which mounts of a container hear of the node's later mounts, and which tell the node of theirs.
//!
//! libcontainer gives all mounts the propagation of the root filesystem, which is the widest that one of them asks
//! for. Before the program starts each gets its own: what is less is taken away, so that nothing is ever gained.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};

use crate::api::{Mount, Propagation};
use crate::mountinfo::mount_point;

/// Narrows the mounts of the container whose first process is `pid`, and which runs nothing yet.
pub fn narrow(pid: i32, mounts: &[Mount]) -> Result<(), String> {
    if mounts.iter().all(|mount| mount.propagation == Propagation::Private) {
        return Ok(());
    }
    let open = |path: &str| File::open(path).map_err(|e| format!("{path}: {e}"));
    let (ours, theirs) = (open("/proc/self/ns/mnt")?, open(&format!("/proc/{pid}/ns/mnt"))?);
    let table = format!("/proc/{pid}/mountinfo");
    let table = fs::read_to_string(&table).map_err(|e| format!("{table}: {e}"))?;
    let join =
        |it: &File| setns(it.as_fd(), CloneFlags::CLONE_NEWNS).map_err(|e| format!("join mounts: {e}"));
    join(&theirs)?;
    let done = set_all(mounts, &table);
    join(&ours)?;
    done
}

/// With the container's root as ours.
fn set_all(mounts: &[Mount], table: &str) -> Result<(), String> {
    let place = |mount: &Mount| Some((fs::canonicalize(&mount.container_path).ok()?, mount.propagation));
    let places: Vec<_> = mounts.iter().filter_map(place).collect();
    for point in table.lines().filter_map(mount_point) {
        let kind = match wanted(&places, &point) {
            Some(Propagation::Private) => MsFlags::MS_PRIVATE,
            Some(Propagation::HostToContainer) => MsFlags::MS_SLAVE,
            Some(Propagation::Bidirectional) | None => continue,
        };
        mount(None::<&str>, &point, None::<&str>, kind, None::<&str>)
            .map_err(|e| format!("set propagation of {}: {e}", point.display()))?;
    }
    Ok(())
}

/// What holds for the mount at `point`: it came with that one of `places` which is the nearest above it.
fn wanted(places: &[(PathBuf, Propagation)], point: &Path) -> Option<Propagation> {
    let above = places.iter().filter(|(place, _)| point.starts_with(place));
    above.max_by_key(|(place, _)| place.components().count()).map(|(_, propagation)| *propagation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_below_is_as_the_nearest_mount_above() {
        use Propagation::{Bidirectional, HostToContainer, Private};
        let places = [("/v", Private), ("/v/in", Bidirectional), ("/w", HostToContainer)];
        let places = places.map(|(path, propagation)| (PathBuf::from(path), propagation));
        let check = |point: &str, want| assert_eq!(wanted(&places, Path::new(point)), want, "{point}");
        check("/v", Some(Private));
        check("/v/other", Some(Private));
        check("/v/in", Some(Bidirectional));
        check("/v/in/deep", Some(Bidirectional));
        check("/w/x", Some(HostToContainer));
        check("/vv", None);
        check("/", None);
    }
}
