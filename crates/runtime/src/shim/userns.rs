//! Pods with users of their own: the namespace, and how the node's files come to look as if they belonged there.
//!
//! Ids 0 and up of such a pod are a range of ids of the node that nobody else has. The namespaces of the pod belong to
//! its user namespace, so that its root may set them up; the shim itself stays a process of the node. Files keep
//! the ids they have on disk: volumes and layers are seen through idmapped mounts (`mount_setattr(2)`).

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::{CWD, FileType};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::api::IdRange;
use crate::sys;

/// Makes a user namespace and namespaces of network, IPC and names that belong to it, and joins those; the user
/// namespace itself is returned and not entered.
pub fn enter(ids: IdRange) -> Result<OwnedFd, String> {
    let at = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(at("pipe"));
    let ((outcome, report), (hold, held)) = (pipe()?, pipe()?);
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    match sys::fork(false).map_err(|e| format!("fork: {e}"))? {
        sys::Forked::Child => {
            drop(held);
            if let Err(e) = nix::sched::unshare(flags) {
                let _ = rustix::io::write(&report, e.desc().as_bytes());
                sys::exit_now(1);
            }
            drop(report);
            // They last as long as this process, until somebody else is in them.
            let _ = rustix::io::read(&hold, &mut [0; 1]);
            sys::exit_now(0)
        }
        sys::Forked::Parent(pid) => {
            drop((report, hold));
            let mut error = String::new();
            let made = match fs::File::from(outcome).read_to_string(&mut error) {
                Ok(0) => take_over(pid, ids),
                Ok(_) => Err(format!("make a user namespace: {error}")),
                Err(e) => Err(format!("make a user namespace: {e}")),
            };
            drop(held);
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            made
        }
    }
}

/// Maps the ids of the namespace that process `pid` has made, and joins the others.
fn take_over(pid: i32, ids: IdRange) -> Result<OwnedFd, String> {
    let dir = Path::new("/proc").join(pid.to_string());
    for file in ["uid_map", "gid_map"] {
        fs::write(dir.join(file), format!("0 {} {}\n", ids.first, ids.count))
            .map_err(|e| format!("write {file}: {e}"))?;
    }
    let open = |name: &str| {
        fs::File::open(dir.join("ns").join(name)).map_err(|e| format!("open the {name} namespace: {e}"))
    };
    for (name, flag) in [
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
    ] {
        nix::sched::setns(open(name)?, flag).map_err(|e| format!("join the {name} namespace: {e}"))?;
    }
    Ok(open("user")?.into())
}

/// Does something as root of a user namespace, which root of the node is not: some of what belongs to the namespace goes
/// by its owner, not by rights.
pub fn as_root(namespace: &OwnedFd, what: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let (outcome, report) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| format!("pipe: {e}"))?;
    match sys::fork(false).map_err(|e| format!("fork: {e}"))? {
        sys::Forked::Child => {
            let joined = join(namespace).map_err(|e| format!("join the user namespace: {e}"));
            let error = joined.and_then(|()| what()).err().unwrap_or_else(|| "done".to_owned());
            let _ = rustix::io::write(&report, error.as_bytes());
            sys::exit_now(0)
        }
        sys::Forked::Parent(pid) => {
            drop(report);
            let mut said = String::new();
            let read = fs::File::from(outcome).read_to_string(&mut said);
            let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            match (read, said.as_str()) {
                (Ok(_), "done") => Ok(()),
                (Ok(_), why) => Err(why.to_owned()),
                (Err(e), _) => Err(e.to_string()),
            }
        }
    }
}

/// Becomes root of a user namespace.
pub fn join(namespace: &OwnedFd) -> nix::Result<()> {
    nix::sched::setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    become_root()
}

/// After a user namespace was joined: its root instead of a user that it does not know.
pub fn become_root() -> nix::Result<()> {
    nix::unistd::setresgid(0.into(), 0.into(), 0.into())?;
    nix::unistd::setresuid(0.into(), 0.into(), 0.into())
}

/// A place in a mount namespace of our own that the pod's root can reach: the node's directories may be closed to it.
pub struct Stage {
    at: PathBuf,
    namespace: OwnedFd,
    shown: usize,
}

impl Stage {
    /// `root` is the data directory, which has to stay in sight.
    pub fn set_up(root: &Path, namespace: OwnedFd) -> Result<Self, String> {
        // Directories that are there on every node, and that nothing we do from here on needs.
        let at = ["/etc", "/usr"].into_iter().find(|dir| !root.starts_with(dir)).unwrap_or("/etc");
        let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV;
        nix::mount::mount(Some("stage"), at, Some("tmpfs"), flags, Some("mode=755,size=1m"))
            .map_err(|e| format!("mount {at}: {e}"))?;
        Ok(Self { at: PathBuf::from(at), namespace, shown: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Where to find the namespace, as long as this process or a copy of it has it open.
    pub fn namespace(&self) -> String {
        format!("/proc/self/fd/{}", self.namespace.as_raw_fd())
    }

    /// Mounts a file or directory of the node such that its ids are the pod's, with what is mounted below it as
    /// it is; returns where.
    pub fn show(&mut self, source: &Path) -> Result<PathBuf, String> {
        let target = self.at.join(self.shown.to_string());
        self.shown += 1;
        let failed = |e: io::Error| format!("mount {}: {e}", source.display());
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, source, flags).map_err(|e| failed(e.into()))?;
        sys::map_ids_of_mount(&tree, &self.namespace).map_err(|e| {
            format!(
                "failed to set MOUNT_ATTR_IDMAP on {}: {e} (maybe the filesystem used doesn't support idmap mounts on this kernel?)",
                source.display()
            )
        })?;
        let stat = rustix::fs::fstat(&tree).map_err(|e| failed(e.into()))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => fs::create_dir(&target),
            _ => fs::write(&target, ""),
        }
        .map_err(failed)?;
        rustix::mount::move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|e| failed(e.into()))?;
        Ok(target)
    }
}
