//! Process 1 of a pod whose containers share their process namespace: holds it open and reaps orphans, until the
//! shim goes.
//!
//! The containers see this process: it has no rights, and its root directory is empty, so that whoever may look into
//! `/proc/1/root` finds nothing of the node there.

use std::ffi::OsString;
use std::io::Write;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use rustix::event::{PollFd, PollFlags};
use rustix::process::WaitOptions;

use crate::sys;

/// Makes the namespace, says the outer id of its first process on stdout, and stays as that process. Argument: the
/// number of the pod's user namespace, if it has one.
pub fn main(mut args: impl Iterator<Item = OsString>) -> i32 {
    sys::default_signals();
    let users = args.next().and_then(|n| sys::inherited_fd(n.to_str()?.parse().ok()?).ok());
    if let Some(users) = users
        && let Err(e) = super::userns::join(&users)
    {
        super::log_line!("pause: join the user namespace: {e}");
        return 1;
    }
    if let Err(e) = nix::sched::unshare(CloneFlags::CLONE_NEWPID) {
        super::log_line!("pause: unshare: {e}");
        return 1;
    }
    let Ok((outcome, report)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) else { return 1 };
    match sys::fork(false) {
        Ok(sys::Forked::Parent(pid)) => {
            drop(report);
            // Nobody is to meet it before it is secluded.
            let secluded = rustix::io::read(&outcome, &mut [0; 1]) == Ok(1);
            i32::from(!secluded || writeln!(std::io::stdout(), "{pid}").is_err())
        }
        Ok(sys::Forked::Child) => {
            drop(outcome);
            if let Err(e) = seclude() {
                super::log_line!("pause: {e}");
                sys::exit_now(1);
            }
            let _ = rustix::io::write(&report, b"y");
            drop(report);
            reap()
        }
        Err(e) => {
            super::log_line!("pause: fork: {e}");
            1
        }
    }
}

/// Leaves everything of the node behind: files, rights, and streams but the one that says when to go.
fn seclude() -> nix::Result<()> {
    let none = None::<&str>;
    let null = nix::fcntl::open(
        "/dev/null",
        nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // A directory that is there on every node.
    mount(Some("empty"), "/proc", Some("tmpfs"), flags, Some("size=0,mode=555"))?;
    nix::unistd::chdir("/proc")?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    mount(none, "/", none, flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
    let nobody = 65535;
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(nobody.into(), nobody.into(), nobody.into())?;
    // Takes all capabilities away, and makes the process one that only an administrator of the node may look into.
    nix::unistd::setresuid(nobody.into(), nobody.into(), nobody.into())?;
    // Last, so that what went wrong is in the shim's log.
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)
}

fn reap() -> ! {
    let _ = rustix::process::setsid();
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let _ = children.thread_block();
    let signals = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
    let Ok(signals) = signals else { sys::exit_now(1) };
    let stdin = std::io::stdin();
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let mut fds = [PollFd::new(&signals, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, None);
        // The shim holds the other end and never writes: it has gone, and so must what it would not see end.
        if !fds[1].revents().is_empty() {
            sys::exit_now(0);
        }
        while let Ok(Some(_)) = signals.read_signal() {}
    }
}
