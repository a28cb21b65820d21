//! Makes and starts one container with libcontainer, then ends; the container stays as the shim's child.
//!
//! A process of its own because libcontainer changes the working directory, forks and allocates, and so that
//! its memory does not stay with the shim. Mounts are made in a private mount namespace, so that whatever
//! goes wrong leaves none behind.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;

use super::confine::ProcessRecord;
use super::exec::{adjust_oom_score, exec_error, join_cgroups, own_streams, send};
use super::proto::{ContainerRecord, Report, SandboxRecord, Started};
use super::userns::Stage;
use super::{log, propagation, wire};
use crate::api::ImageAccess;
use crate::filter::Filter;
use crate::spec::Place;
use crate::{device, spec, sys, users};

/// Arguments: the report socket's number, the data directory, the container's id, the shim's pid, and the
/// numbers of the node's mount namespace and of the pod's user namespace, if it has one.
pub fn main(mut args: impl Iterator<Item = OsString>) -> i32 {
    let mut next = || args.next().and_then(|a| a.into_string().ok());
    let (Some(socket), Some(root), Some(id), Some(shim), Some(node), Some(users)) =
        (next(), next(), next(), next(), next(), next())
    else {
        return 2;
    };
    let shim: i32 = shim.parse().unwrap_or(0);
    sys::hide_from_containers();
    // Without the shim, nobody would know of the container.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if rustix::process::getppid().is_none_or(|parent| parent.as_raw_pid() != shim) {
        return 1;
    }
    let fd = |n: String| n.parse().ok().and_then(|n| sys::inherited_fd(n).ok());
    let (Some(socket), Some(node)) = (fd(socket), fd(node)) else { return 2 };
    let run = Run { root: PathBuf::from(root), id, shim, node };
    let (report, master) = match run.start(fd(users)) {
        Ok((started, master)) => (Report::Started(started), master),
        Err(e) => (Report::Failed(e), None),
    };
    // What libcontainer keeps for its own commands, which nobody gives.
    let _ = fs::remove_dir_all(run.state_dir());
    send(&socket, &report, master)
}

struct Run {
    root: PathBuf,
    id: String,
    shim: i32,
    node: OwnedFd,
}

impl Run {
    fn state_dir(&self) -> PathBuf {
        self.root.join("containers").join(&self.id).join("state")
    }

    fn start(&self, users: Option<OwnedFd>) -> Result<(Started, Option<OwnedFd>), String> {
        sys::default_signals();
        let dir = self.root.join("containers").join(&self.id);
        let mut record: ContainerRecord = read_json(&dir.join("container.json"))?;
        let sandbox: SandboxRecord =
            read_json(&self.root.join("shims").join(&record.sandbox_id).join("sandbox.json"))?;
        adjust_oom_score(record.spec.oom_score_adj);

        let at = |what: &'static str| move |e: nix::errno::Errno| format!("{what}: {e}");
        if record.shares_mounts() {
            nix::sched::setns(&self.node, CloneFlags::CLONE_NEWNS).map_err(at("join the node's mounts"))?;
        } else {
            nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(at("unshare mounts"))?;
            let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
            mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(at("make mounts private"))?;
        }
        let owner = sandbox.spec.user_namespace.map_or(0, |ids| ids.first);
        let mut stage = users.map(|users| Stage::set_up(&self.root, users)).transpose()?;
        let mounted = stage.as_ref().map_or(&*dir, |stage| stage.path()).to_owned();
        let (layers, near) = self.layers(&dir, stage.as_mut())?;
        std::env::set_current_dir(&layers).map_err(|e| format!("{}: {e}", layers.display()))?;
        let overlays = Overlays { dir: &dir, at: &mounted, near: &near, owner };
        let made = overlays.mount_rootfs(&record).and_then(|()| overlays.mount_images(&record));
        std::env::set_current_dir("/").map_err(|e| e.to_string())?;
        made?;
        let rootfs = mounted.join("rootfs");
        record.image.volumes = make_volumes(&rootfs, spec::image_volumes(&record), owner)?;
        let user = users::resolve(&rootfs, &record.spec.user, &record.image.user)?;
        // Open until the container has joined it, which may not look for it itself.
        let processes = spec::joined_process(&record.spec, &sandbox, &dir).map_err(|e| e.to_string())?;
        let processes = processes.map(|pid| fs::File::open(format!("/proc/{pid}/ns/pid"))).transpose();
        let processes = processes.map_err(|e| format!("open the process namespace: {e}"))?;
        let place = Place {
            dir: &dir,
            mounted: &mounted,
            shim: self.shim,
            users: stage.as_ref().map(Stage::namespace),
            processes: processes.as_ref().map(|file| format!("/proc/self/fd/{}", file.as_raw_fd())),
        };
        own_streams(owner.saturating_add(user.uid));
        let mut config = spec::oci_spec(&record, &sandbox, &place, &user).map_err(|e| e.to_string())?;
        if let Some(stage) = &mut stage {
            show_mounts(stage, &mut config, &mounted)?;
        }
        let cwd = config["process"]["cwd"].as_str().unwrap_or("/");
        users::make_dir_in(&rootfs, Path::new(cwd), owner).map_err(|e| format!("mkdir {cwd}: {e}"))?;
        let text = serde_json::to_vec(&config).map_err(|e| e.to_string())?;
        fs::write(dir.join("config.json"), text).map_err(|e| format!("write config.json: {e}"))?;
        let first_id = sandbox.spec.user_namespace.map(|ids| ids.first);
        let how = ProcessRecord::take(&mut config, first_id, &dir, &self.root.join("filters"))?;
        let filter = how.filter(&dir)?;

        let (pid, master) = self.create(&dir, &record, &config, Confine { how, filter })?;
        let groups = user.groups;
        Ok((Started { pid, at: log::now_ns(), uid: user.uid, gid: user.gid, groups }, master))
    }

    /// Where the images' layers are, and the container's directory seen from there.
    fn layers(&self, dir: &Path, stage: Option<&mut Stage>) -> Result<(PathBuf, PathBuf), String> {
        let snapshots = self.root.join("snapshots");
        let Some(stage) = stage else {
            // The layers of a build are those of the node, and its containers are elsewhere.
            let near = match snapshots.is_symlink() {
                true => dir.to_owned(),
                false => Path::new("../containers").join(&self.id),
            };
            return Ok((snapshots, near));
        };
        let here = stage.path().join("container");
        let bound = fs::create_dir(stage.path().join("rootfs"))
            .and_then(|()| fs::create_dir(&here))
            .and_then(|()| Ok(rustix::mount::mount_bind(dir, &here)?));
        bound.map_err(|e| format!("mount {}: {e}", here.display()))?;
        Ok((stage.show(&snapshots)?, PathBuf::from("../container")))
    }

    fn create(
        &self,
        dir: &Path,
        record: &ContainerRecord,
        config: &serde_json::Value,
        confine: Confine,
    ) -> Result<(i32, Option<OwnedFd>), String> {
        let state = self.state_dir();
        let _ = fs::remove_dir_all(&state);
        fs::create_dir_all(&state).map_err(|e| format!("{}: {e}", state.display()))?;
        fs::write(state.join("config.json"), config.to_string())
            .map_err(|e| format!("write config.json: {e}"))?;
        let (outcome, report) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| format!("pipe: {e}"))?;
        let console =
            record.spec.tty.then(|| Console::bind(dir)).transpose().map_err(|e| format!("console: {e}"))?;
        // libcontainer knows v1's controllers or v2; the rest is ours, and inherited. Now, because moving into a
        // cgroup waits for a grace period of the kernel (10 ms or more), and what follows at once does not.
        join_cgroups(&record.cgroup_dirs_beside)?;
        let executor = Program { report: report.as_raw_fd(), confine };
        let built = ContainerBuilder::new(self.id.clone(), SyscallType::default())
            .with_executor(executor)
            .with_console_socket(console.as_ref().map(|c| c.path.clone()))
            .with_root_path(&state)
            .and_then(|builder| builder.as_init(&state).with_systemd(false).with_detach(true).build());
        let mut container = match built {
            Ok(container) => container,
            Err(e) => return Err(plain(&e)),
        };
        let pid = container.pid().map(|p| p.as_raw()).ok_or("the container has no process")?;
        propagation::narrow(pid, &record.spec.mounts)?;
        let master = console.map(|c| c.receive()).transpose().map_err(|e| format!("console: {e}"))?;
        container.start().map_err(|e| plain(&e))?;
        drop(report);
        // Closes when the program is executed, and says why if it cannot be.
        let mut error = String::new();
        fs::File::from(outcome).read_to_string(&mut error).map_err(|e| e.to_string())?;
        match error.as_str() {
            "" => Ok((pid, master)),
            error => Err(error.to_owned()),
        }
    }
}

/// The overlays of one container. Layers are named relative to the working directory, which holds them, so that 127
/// of them fit the page that `mount` takes.
struct Overlays<'a> {
    /// The container's directory, and the same seen from the layers.
    dir: &'a Path,
    near: &'a Path,
    /// Below which they are mounted.
    at: &'a Path,
    /// The node's user that is root in the container.
    owner: u32,
}

impl Overlays<'_> {
    /// The image's layers with a writable one on top.
    fn mount_rootfs(&self, record: &ContainerRecord) -> Result<(), String> {
        let up = self.near;
        let lower = match record.layers.is_empty() {
            // An image may be without any file.
            true => up.join("empty").display().to_string(),
            false => record.layers.join(":"),
        };
        let options = format!(
            "lowerdir={lower},upperdir={},workdir={}",
            up.join("upper").display(),
            up.join("work").display(),
        );
        let rootfs = self.at.join("rootfs");
        let mounted =
            mount(Some("overlay"), &rootfs, Some("overlay"), MsFlags::empty(), Some(options.as_str()));
        mounted.map_err(|e| format!("mount overlay ({} layers): {e}", record.layers.len()))
    }

    /// Image volumes. The part of an image that is asked for is found with the image as its root, so that no link in
    /// it leads out of it.
    fn mount_images(&self, record: &ContainerRecord) -> Result<(), String> {
        let wanted = record.spec.mounts.iter().filter(|m| m.image.is_some());
        for (n, (layers, wanted)) in record.mounted.iter().zip(wanted).enumerate() {
            let failed = |e: &dyn std::fmt::Display| format!("mount image volume: {e}");
            let made = |name: &str| {
                let dir = self.dir.join(name);
                let owned = || match self.owner {
                    0 => Ok(()),
                    owner => std::os::unix::fs::chown(&dir, Some(owner), Some(owner)),
                };
                let made = fs::create_dir_all(&dir).and_then(|()| owned());
                made.map_err(|e| failed(&e)).map(|()| self.near.join(name))
            };
            let target = self.at.join(format!("image-{n}"));
            fs::create_dir_all(&target).map_err(|e| failed(&e))?;
            // An overlay that is only read needs two layers at least, and an image may have none.
            let mut lower = layers.clone();
            for name in ["empty", "empty-too"] {
                lower.push(made(name)?.display().to_string());
            }
            let mut options = format!("lowerdir={}", lower.join(":"));
            let flags = match wanted.image_access {
                ImageAccess::Data => {
                    MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV
                }
                ImageAccess::Programs => MsFlags::MS_RDONLY,
                ImageAccess::Scratch => {
                    let (upper, work) =
                        (made(&format!("image-{n}-upper"))?, made(&format!("image-{n}-work"))?);
                    options += &format!(",upperdir={},workdir={}", upper.display(), work.display());
                    MsFlags::empty()
                }
            };
            mount(Some("overlay"), &target, Some("overlay"), flags, Some(options.as_str()))
                .map_err(|e| failed(&e))?;
            if wanted.image_sub_path.is_empty() {
                continue;
            }
            let root = fs::File::open(&target).map_err(|e| failed(&e))?;
            let (mode, stay) = (rustix::fs::Mode::empty(), rustix::fs::ResolveFlags::IN_ROOT);
            let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
            let part = rustix::fs::openat2(&root, &*wanted.image_sub_path, flags, mode, stay)
                .map_err(|e| format!("image volume subpath {:?}: {e}", wanted.image_sub_path))?;
            let at = self.at.join(format!("image-{n}-part"));
            let is_dir = rustix::fs::fstat(&part).is_ok_and(|stat| {
                rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
            });
            let made = if is_dir { fs::create_dir_all(&at) } else { fs::write(&at, "") };
            made.map_err(|e| failed(&e))?;
            let source = format!("/proc/self/fd/{}", part.as_raw_fd());
            mount(Some(source.as_str()), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|e| failed(&e))?;
        }
        Ok(())
    }
}

/// Has what the container mounts of the node look as if it were the pod's, in a place that the pod's root can reach.
fn show_mounts(stage: &mut Stage, config: &mut serde_json::Value, mounted: &Path) -> Result<(), String> {
    let mounts = config["mounts"].as_array_mut().into_iter().flatten();
    for mount in mounts.filter(|mount| mount["type"] == "bind") {
        let source = Path::new(mount["source"].as_str().unwrap_or_default());
        let target = mount["destination"].as_str().unwrap_or_default();
        // Cgroups stay the node's, and what we have mounted is the pod's already.
        if !source.starts_with(mounted) && !target.starts_with("/sys/fs/cgroup") {
            mount["source"] = stage.show(source)?.to_string_lossy().into();
        }
    }
    Ok(())
}

/// Makes the directories in a root filesystem; returns those that no link is on the way to, which are safe to mount.
fn make_volumes(rootfs: &Path, mut volumes: Vec<String>, owner: u32) -> Result<Vec<String>, String> {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    for path in &volumes {
        users::make_dir_in(rootfs, Path::new(path), owner)
            .map_err(|e| format!("make image volume {path}: {e}"))?;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags, Mode::empty()).map_err(|e| e.to_string())?;
    let plain = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    volumes.retain(|path| rustix::fs::openat2(&root, path.as_str(), flags, Mode::empty(), plain).is_ok());
    Ok(volumes)
}

/// What went wrong, without the layers it came through: the innermost cause is what a user can act on.
fn plain(error: &dyn std::error::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    format!("error during container init: {text}")
}

/// What libcontainer leaves to us.
#[derive(Clone)]
struct Confine {
    how: ProcessRecord,
    filter: Option<Filter>,
}

/// Runs the program in place of libcontainer's own executor: takes capabilities and calls away, finds the program as
/// runc does (which takes any execute bit), and reports when `execve` itself fails.
#[derive(Clone)]
struct Program {
    report: RawFd,
    confine: Confine,
}

impl Program {
    fn prepare(&self) -> Result<(CString, Vec<CString>), String> {
        let Confine { how, filter } = &self.confine;
        let args = how.process.args().as_deref().unwrap_or_default();
        let name = args.first().ok_or("no command specified")?;
        if how.process.terminal() == Some(true) {
            // It came from root of the container.
            let user = Some(rustix::fs::Uid::from_raw(how.process.user().uid()));
            let _ = rustix::fs::fchown(rustix::stdio::stdin(), user, None);
        }
        let argv = args.iter().filter_map(|a| CString::new(a.as_bytes()).ok()).collect();
        Ok((how.enter(name, filter.as_ref())?, argv))
    }
}

impl Executor for Program {
    /// Known once it is tried.
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let devices = spec.linux().iter().filter_map(|linux| linux.devices().as_ref()).flatten();
        device::close_dirs(devices.map(|device| device.path().as_path()));
        let failed = |error: String| {
            sys::write_raw(self.report, error.as_bytes());
            ExecutorError::Other(error)
        };
        let (program, argv) = self.prepare().map_err(failed)?;
        match nix::unistd::execv(&program, &argv) {
            Ok(never) => match never {},
            Err(e) => Err(failed(exec_error(&argv[0].to_string_lossy(), e))),
        }
    }
}

/// The socket over which libcontainer hands out the terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn bind(dir: &Path) -> io::Result<Self> {
        let path = dir.join("console.sock");
        let _ = fs::remove_file(&path);
        let (_dir, short) = wire::short_path(&path)?;
        Ok(Self { listener: UnixListener::bind(short)?, path })
    }

    fn receive(self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept()?;
        let (mut fds, mut name) = (Vec::new(), [0u8; 256]);
        wire::receive(&stream, &mut name, &mut fds)?;
        let _ = fs::remove_file(&self.path);
        fds.pop().ok_or_else(|| io::Error::other("no terminal came"))
    }
}

pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, String> {
    let text = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", path.display()))
}
