//! The shim: one small process per pod that is its sandbox.
//!
//! It is this executable started again under another `argv[0]`, so that it branches off before any runtime,
//! TLS or argument parser exists. It holds the pod's namespaces by living in them, is the parent of the pod's
//! processes, writes their logs and exit files, and serves a unix socket. The module `proto` says what is spoken there.
//!
//! Three helpers share the trick: the *runner* makes one container with libcontainer and ends, *exec* starts
//! one process in a running container and ends, *pause* is process 1 of a pod that shares its process
//! namespace. None of them starts a thread.

mod confine;
mod container;
pub(crate) mod exec;
pub(crate) mod log;
mod pause;
mod propagation;
pub(crate) mod proto;
mod runner;
mod server;
mod userns;
pub(crate) mod wire;

use std::ffi::OsStr;
use std::process::Command;

pub(crate) const SHIM: &str = "minke-shim";
pub(crate) const RUNNER: &str = "minke-run";
pub(crate) const EXEC: &str = "minke-exec";
pub(crate) const PAUSE: &str = "minke-pause";

/// Becomes the shim or one of its helpers when this process was started as one; returns otherwise.
///
/// Call it first thing in `main`: before threads, and before anything that opens files.
pub fn entry() {
    let mut args = std::env::args_os();
    let Some(name) = args.next() else { return };
    let code = match name.to_str() {
        Some(SHIM) => server::main(args),
        Some(RUNNER) => runner::main(args),
        Some(EXEC) => exec::main(args),
        Some(PAUSE) => pause::main(args),
        _ => return,
    };
    std::process::exit(code);
}

/// Writes a line to the shim's log, which may lie on a full disk: no reason to panic, as `eprintln` would.
macro_rules! log_line {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}
pub(crate) use log_line;

/// This executable, to be started as `name`. It inherits no environment and no descriptor but stdio.
pub(crate) fn command(name: &str, args: &[&OsStr]) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("/proc/self/exe");
    // Without arenas for threads it will not have, glibc keeps the heap small.
    command.arg0(name).args(args).env_clear().env("MALLOC_ARENA_MAX", "1");
    command
}
