//! Process 1 of a pod whose containers share their process namespace: holds it open and reaps orphans.

use std::io::Write;
use std::time::Duration;

use rustix::process::WaitOptions;

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
    loop {
        // Blocks while there are children. Without any, a new orphan wakes nobody, so look now and then.
        if rustix::process::wait(WaitOptions::empty()).is_err() {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}
