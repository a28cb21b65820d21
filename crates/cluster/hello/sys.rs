//! The few calls the standard library does not offer. All `unsafe` of this program is here.

use std::ffi::c_int;

pub const SIGINT: c_int = 2;
pub const SIGTERM: c_int = 15;
pub const SIGCHLD: c_int = 17;
const SIG_BLOCK: c_int = 0;
const WNOHANG: c_int = 1;

/// The C library's `sigset_t`: 1024 bits.
#[repr(C)]
struct SigSet([u64; 16]);

impl SigSet {
    fn of(signals: &[c_int]) -> SigSet {
        let mut set = SigSet([0; 16]);
        for signal in signals {
            set.0[0] |= 1 << (signal - 1);
        }
        set
    }
}

unsafe extern "C" {
    fn pthread_sigmask(how: c_int, set: *const SigSet, old: *mut SigSet) -> c_int;
    fn sigwait(set: *const SigSet, signal: *mut c_int) -> c_int;
    fn signal(signal: c_int, handler: extern "C" fn(c_int)) -> usize;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn getuid() -> u32;
    fn getgid() -> u32;
}

extern "C" fn ignore(_: c_int) {}

/// Blocks `signals` for this thread and those it starts, for [`wait_for`].
pub fn block(signals: &[c_int]) {
    // SAFETY: the set outlives the call, and a null pointer for the old mask is allowed.
    unsafe { pthread_sigmask(SIG_BLOCK, &SigSet::of(signals), std::ptr::null_mut()) };
}

/// Waits for one of the blocked `signals`.
pub fn wait_for(signals: &[c_int]) -> c_int {
    let mut which = 0;
    // SAFETY: both pointers are to live locals of the types the call expects.
    unsafe { sigwait(&SigSet::of(signals), &mut which) };
    which
}

/// Takes the interrupt of the terminal's Ctrl-C without dying of it. Unlike an ignored signal, a handled one is
/// back to its default in the programs this one starts.
pub fn outlive_interrupts() {
    // SAFETY: the handler does nothing, so it may run at any point.
    unsafe { signal(SIGINT, ignore) };
}

/// Collects every child that has ended: a container's first process inherits orphans.
pub fn reap() {
    let mut status = 0;
    // SAFETY: `status` is a live local; with WNOHANG the call never blocks.
    while unsafe { waitpid(-1, &mut status, WNOHANG) } > 0 {}
}

/// Whether the signal was sent.
pub fn send(pid: i32, number: c_int) -> bool {
    // SAFETY: the call takes two integers and touches no memory of ours.
    unsafe { kill(pid, number) == 0 }
}

pub fn uid_and_gid() -> (u32, u32) {
    // SAFETY: neither call takes arguments or can fail.
    unsafe { (getuid(), getgid()) }
}
