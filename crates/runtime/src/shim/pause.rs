//! Process 1 of a pod whose containers share their process namespace: holds it open and reaps orphans, until the
//! shim goes.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::process::WaitOptions;
use std::io::Write;

use crate::sys;

/// Makes the namespace, says the outer id of its first process on stdout, and stays as that process.
pub fn main() -> i32 {
    sys::default_signals();
    if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID) {
        eprintln!("pause: unshare: {e}");
        return 1;
    }
    match sys::fork(false) {
        Ok(sys::Forked::Parent(pid)) => {
            let said = writeln!(std::io::stdout(), "{pid}");
            i32::from(said.is_err())
        }
        Ok(sys::Forked::Child) => reap(),
        Err(e) => {
            eprintln!("pause: fork: {e}");
            1
        }
    }
}

fn reap() -> ! {
    let _ = rustix::process::setsid();
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    if let Ok(null) = null {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
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
