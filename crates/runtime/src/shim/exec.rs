//! Starts one more process in a running container, under the limits the container itself is under.
//!
//! libcontainer's tenant builder leaves the seccomp filter out, so joining is ours; capabilities and the
//! filter are set by the same libcontainer code as the container's own.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{Gid, Uid};

use super::confine::ProcessRecord;
use super::proto::{ContainerRecord, Report, Started};
use super::{log, userns, wire};
use crate::api::ExecSpec;
use crate::filter::Filter;
use crate::sys;

/// Arguments: the report socket's number, the container's directory, its first process.
pub fn main(mut args: impl Iterator<Item = OsString>) -> i32 {
    let mut next = || args.next().and_then(|a| a.into_string().ok());
    let (Some(socket), Some(dir), Some(pid)) = (next(), next(), next()) else { return 2 };
    sys::hide_from_containers();
    let Some(socket) = socket.parse().ok().and_then(|n| sys::inherited_fd(n).ok()) else { return 2 };
    let (report, master) = match run(&socket, Path::new(&dir), pid.parse().unwrap_or(0)) {
        Ok((pid, master)) => {
            (Report::Started(Started { pid, at: log::now_ns(), ..Default::default() }), master)
        }
        Err(e) => (Report::Failed(e), None),
    };
    send(&socket, &report, master)
}

/// Tells the shim how it went; the exit code of the helper.
pub fn send(socket: &OwnedFd, report: &Report, fd: Option<OwnedFd>) -> i32 {
    let text = serde_json::to_vec(report).expect("reports have string keys only");
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    i32::from(wire::send(socket, &text, &fds).is_err())
}

fn run(socket: &OwnedFd, dir: &Path, init: i32) -> Result<(i32, Option<OwnedFd>), String> {
    let what = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let mut buffer = vec![0; super::proto::FRAME_MAX];
    let n = rustix::io::read(socket, &mut buffer).map_err(io::Error::from).map_err(what("read request"))?;
    let exec: ExecSpec = serde_json::from_slice(&buffer[..n]).map_err(|e| e.to_string())?;
    let record = fs::read(dir.join("container.json")).map_err(what("read container.json"))?;
    let record: ContainerRecord = serde_json::from_slice(&record).map_err(|e| e.to_string())?;
    let how: ProcessRecord = super::runner::read_json(&dir.join("process.json"))?;
    let filter = how.filter(dir)?;
    let process = &how.process;

    let pid = Pid::from_raw(init).ok_or("the container is not running")?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|_| "the container is not running".to_owned())?;
    adjust_oom_score(record.spec.oom_score_adj);
    let unified = join_v1(&record.cgroup_dirs)?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    // The node's id of the user.
    let owner = how.first_id.unwrap_or(0).saturating_add(process.user().uid());
    own_streams(owner);
    join_namespaces(&pidfd, namespaces)?;
    // Made here, in the container's own devpts; the child only opens it as its terminal.
    let pty = exec.tty.then(|| open_pty(owner)).transpose().map_err(what("open a terminal"))?;
    let (master, slave) = pty.map_or((None, None), |(m, s)| (Some(m), Some(s)));

    let (outcome, child_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(io::Error::from)
        .map_err(what("pipe"))?;
    match fork_into(unified.as_ref()).map_err(what("fork"))? {
        sys::Forked::Child => {
            let error = become_process(&pidfd, &how, filter.as_ref(), &exec, slave);
            let _ = fs::File::from(child_end).write_all(error.as_bytes());
            sys::exit_now(127);
        }
        sys::Forked::Parent(pid) => {
            // The pipe closes by itself when the program is executed.
            drop(child_end);
            let mut error = String::new();
            fs::File::from(outcome).read_to_string(&mut error).map_err(what("wait for exec"))?;
            match error.as_str() {
                "" => Ok((pid, master)),
                error => Err(error.to_owned()),
            }
        }
    }
}

fn join_namespaces(init: &OwnedFd, which: CloneFlags) -> Result<(), String> {
    nix::sched::setns(init, which).map_err(|e| format!("join the container's namespaces: {e}"))
}

/// A cgroup of v2.
struct Unified {
    dir: OwnedFd,
    procs: fs::File,
}

/// Moves this process, which is one thread, into those cgroups that are of v1, and returns the one of v2, which a child
/// can begin in. To move a process by its number instead makes the kernel wait until all processors have been seen to
/// do something else, 10 ms and more.
fn join_v1(dirs: &[PathBuf]) -> Result<Option<Unified>, String> {
    let mut unified = None;
    for dir in dirs {
        let open = |name: &str| fs::OpenOptions::new().write(true).open(dir.join(name));
        let at = |e: io::Error| format!("join {}: {e}", dir.display());
        match open("tasks") {
            Ok(mut tasks) => tasks.write_all(b"0").map_err(at)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let procs = open("cgroup.procs").map_err(at)?;
                unified = Some(Unified { dir: fs::File::open(dir).map_err(at)?.into(), procs });
            }
            Err(e) => return Err(at(e)),
        }
    }
    Ok(unified)
}

fn fork_into(unified: Option<&Unified>) -> io::Result<sys::Forked> {
    let Some(cgroup) = unified else { return sys::fork(false) };
    sys::fork_into(&cgroup.dir).or_else(|_| {
        // An older kernel, say.
        (&cgroup.procs).write_all(b"0")?;
        sys::fork(false)
    })
}

/// Ends in the program, or returns why not.
fn become_process(
    init: &OwnedFd,
    how: &ProcessRecord,
    filter: Option<&Filter>,
    exec: &ExecSpec,
    slave: Option<OwnedFd>,
) -> String {
    match enter_rest(init, how).and_then(|()| prepare(how, filter, exec, slave)) {
        Ok((program, argv, env)) => match nix::unistd::execve(&program, &argv, &env) {
            Ok(never) => match never {},
            Err(e) => exec_error(&exec.argv[0], e),
        },
        Err(e) => e,
    }
}

/// Joins what is left of the container's namespaces. Last, because from there the child could not begin in a cgroup.
fn enter_rest(init: &OwnedFd, how: &ProcessRecord) -> Result<(), String> {
    if how.first_id.is_none() {
        return join_namespaces(init, CloneFlags::CLONE_NEWCGROUP);
    }
    join_namespaces(init, CloneFlags::CLONE_NEWCGROUP | CloneFlags::CLONE_NEWUSER)?;
    userns::become_root().map_err(|e| format!("become root of the user namespace: {e}"))
}

type Program = (CString, Vec<CString>, Vec<CString>);

fn prepare(
    how: &ProcessRecord,
    filter: Option<&Filter>,
    exec: &ExecSpec,
    slave: Option<OwnedFd>,
) -> Result<Program, String> {
    let process = &how.process;
    let at = |what: &'static str| move |e: rustix::io::Errno| format!("{what}: {e}");
    rustix::process::setsid().map_err(at("setsid"))?;
    if let Some(slave) = slave {
        rustix::process::ioctl_tiocsctty(&slave).map_err(at("set the controlling terminal"))?;
        rustix::stdio::dup2_stdin(&slave).map_err(at("stdin"))?;
        rustix::stdio::dup2_stdout(&slave).map_err(at("stdout"))?;
        rustix::stdio::dup2_stderr(&slave).map_err(at("stderr"))?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let cwd = process.cwd();
    std::env::set_current_dir(cwd)
        .map_err(|e| format!("chdir to cwd ({cwd:?}) set in config.json failed: {e}"))?;

    let mut env: Vec<String> = process.env().clone().unwrap_or_default();
    if exec.tty && !env.iter().any(|e| e.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    let name = exec.argv.first().ok_or("no command given")?;

    let user = process.user();
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|g| Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups).map_err(at("setgroups"))?;
    let ask = || match &how.asking {
        Some(profile) => libcontainer::seccomp::initialize_seccomp(profile).map(drop),
        None => Ok(()),
    };
    if !how.no_new_privs() {
        ask().map_err(|e| format!("seccomp: {e}"))?;
    }
    rustix::thread::set_keep_capabilities(true).map_err(at("keep capabilities"))?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at("setgid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at("setuid"))?;
    rustix::thread::set_keep_capabilities(false).map_err(at("keep capabilities"))?;
    let syscall = libcontainer::syscall::syscall::create_syscall();
    libcontainer::capabilities::reset_effective(&*syscall).map_err(|e| format!("capabilities: {e}"))?;
    if how.no_new_privs() {
        rustix::thread::set_no_new_privs(true).map_err(at("no_new_privs"))?;
        ask().map_err(|e| format!("seccomp: {e}"))?;
    }
    sys::default_signals();
    sys::close_on_exec_from(3);
    let strings = |list: &[String]| -> Result<Vec<CString>, String> {
        let one =
            |s: &String| CString::new(s.as_bytes()).map_err(|_| "a string contains a zero byte".to_owned());
        list.iter().map(one).collect()
    };
    let (argv, env) = (strings(&exec.argv)?, strings(&env)?);
    Ok((how.enter(name, filter)?, argv, env))
}

/// The file `name` stands for, searched in `path` like a shell does; the words of a failure are runc's.
pub fn find_program(name: &str, path: &str) -> Result<CString, String> {
    let usable = |file: &Path| -> Result<(), nix::errno::Errno> {
        let meta =
            fs::metadata(file).map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(2)))?;
        if meta.is_dir() {
            return Err(nix::errno::Errno::EISDIR);
        }
        match meta.permissions().mode() & 0o111 {
            0 => Err(nix::errno::Errno::EACCES),
            _ => Ok(()),
        }
    };
    let cstring = |file: PathBuf| {
        CString::new(file.into_os_string().into_vec())
            .map_err(|_| exec_error(name, nix::errno::Errno::EINVAL))
    };
    if name.contains('/') {
        usable(Path::new(name)).map_err(|e| match e {
            nix::errno::Errno::ENOENT => format!("exec: {name:?}: stat {name}: no such file or directory"),
            e => exec_error(name, e),
        })?;
        return cstring(PathBuf::from(name));
    }
    let mut denied = false;
    for dir in path.split(':').filter(|_| !name.is_empty()) {
        let file = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match usable(&file) {
            Ok(()) => return cstring(file),
            Err(e) => denied |= e == nix::errno::Errno::EACCES,
        }
    }
    Err(match denied {
        true => exec_error(name, nix::errno::Errno::EACCES),
        false => format!("exec: {name:?}: executable file not found in $PATH"),
    })
}

pub fn exec_error(name: &str, e: nix::errno::Errno) -> String {
    let text = e.desc();
    let mut lower: String = text.chars().take(1).flat_map(char::to_lowercase).collect();
    lower.extend(text.chars().skip(1));
    format!("exec: {name:?}: {lower}")
}

/// Moves this process, which is one thread, into these cgroups.
pub fn join_cgroups(dirs: &[PathBuf]) -> Result<(), String> {
    match join_v1(dirs)? {
        Some(mut unified) => unified.procs.write_all(b"0").map_err(|e| format!("join a cgroup: {e}")),
        None => Ok(()),
    }
}

/// Gives the pipes that are a program's streams to its user, who may open them anew as /dev/stdout and the like.
/// `uid` is the node's.
pub fn own_streams(uid: u32) {
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let is_pipe = rustix::fs::fstat(stream).is_ok_and(|stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo
        });
        if is_pipe {
            let _ = rustix::fs::fchown(stream, Some(rustix::fs::Uid::from_raw(uid)), None);
        }
    }
}

/// Lowering it needs CAP_SYS_RESOURCE; without, the node's own value has to do.
pub fn adjust_oom_score(score: Option<i32>) {
    if let Some(score) = score {
        let _ = fs::write("/proc/self/oom_score_adj", score.to_string());
    }
}

/// A terminal of the mount namespace we are in, owned by a user.
fn open_pty(owner: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::OpenptFlags;
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    let _ = rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None);
    Ok((master, slave))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, want: Result<&str, &str>) {
        let got = find_program(name, "/nowhere:/usr/bin:/bin");
        let got = got.as_ref().map(|p| p.to_str().unwrap()).map_err(String::as_str);
        assert_eq!(got, want);
    }

    #[test]
    fn programs_are_found_and_missed_in_runcs_words() {
        check("env", Ok("/usr/bin/env"));
        check("/bin/sh", Ok("/bin/sh"));
        check("nope", Err("exec: \"nope\": executable file not found in $PATH"));
        check("", Err("exec: \"\": executable file not found in $PATH"));
        check("/nope", Err("exec: \"/nope\": stat /nope: no such file or directory"));
        check("/etc", Err("exec: \"/etc\": is a directory"));
        check("/etc/passwd", Err("exec: \"/etc/passwd\": permission denied"));
    }
}
