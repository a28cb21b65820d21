//! Process 1 of a pod whose containers share their process namespace: holds it open and reaps orphans.

use nix::sys::signal::{SigSet, Signal};
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
    loop {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        // A child that ends between the two is not missed: its signal stays pending.
        let _ = children.wait();
    }
}
