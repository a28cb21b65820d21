//! The few system calls that need `unsafe`, behind safe functions.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use tokio::io::unix::AsyncFd;

/// Takes over a descriptor that the parent left open for us under a known number.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl on a number has no memory effects; it only tells whether the number is open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and each number is handed over to one place by the protocol between us
    // and the parent that started us, so nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Writes all of `data` to a descriptor known by number only; for the moment before `execve`.
pub fn write_raw(number: RawFd, data: &[u8]) {
    // SAFETY: the pointer and length are of one slice; a number that is not open gives EBADF.
    unsafe { libc::write(number, data.as_ptr().cast(), data.len()) };
}

/// Registers a descriptor with the tokio runtime we are in.
pub fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, which the `AsyncFd` does last.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Moves the machine's clock by less than a second. Fails without CAP_SYS_TIME.
#[cfg(test)]
pub fn move_clock(ns: i32) -> io::Result<()> {
    // SAFETY: a `timex` is plain numbers, for which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = if ns < 0 { -1 } else { 0 };
    change.time.tv_usec = i64::from(ns).rem_euclid(1_000_000_000);
    // SAFETY: the kernel reads and writes this one `timex`, which is ours.
    match unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &mut change) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub enum Forked {
    Parent(i32),
    Child,
}

/// Forks a process that has one thread. With `sibling`, the child is a child of our parent.
pub fn fork(sibling: bool) -> io::Result<Forked> {
    let flags = if sibling { libc::CLONE_PARENT } else { libc::SIGCHLD };
    // SAFETY: a raw clone with no new stack and no shared memory is fork. Only single-threaded processes
    // (the shim and its helpers, which never start a thread) call this, so no lock can be held by a thread
    // that is missing in the child. The last argument is the TLS/ctid the flags do not ask for.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags as libc::c_long, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Forks a process that has one thread, and has the child begin in a v2 cgroup.
pub fn fork_into(cgroup: &OwnedFd) -> io::Result<Forked> {
    /// `CLONE_INTO_CGROUP` of <linux/sched.h>, which does not fit libc's type for it.
    const INTO_CGROUP: u64 = 0x2_0000_0000;

    /// `struct clone_args`
    #[repr(C)]
    #[derive(Default)]
    struct Arguments {
        flags: u64,
        pidfd: u64,
        child_tid: u64,
        parent_tid: u64,
        exit_signal: u64,
        stack: u64,
        stack_size: u64,
        tls: u64,
        set_tid: u64,
        set_tid_size: u64,
        cgroup: u64,
    }
    let arguments = Arguments {
        flags: INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..Default::default()
    };
    // SAFETY: as in `fork`; the struct lives until the call returns, and the size is its own.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<Arguments>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Ends the process at once, without the clean-up that belongs to the parent's copy of memory.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Undoes what Rust's start-up, the shim and whoever started the agent did: a program expects no signal to be blocked or
/// ignored. `nohup` has SIGHUP ignored, and a shell can't trap what was ignored when it began.
pub fn default_signals() {
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL installs no handler, so no code of ours can run in signal context. Signals that cannot be set
        // are left as they are.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Until it executes another program, this process can't be looked into by what runs in a container it enters, which
/// would find the node's files there.
pub fn hide_from_containers() {
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
}

/// Marks every descriptor from `first` on to be closed by `execve`.
pub fn close_on_exec_from(first: u32) {
    // SAFETY: only sets a flag on descriptors of this process.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// Has a mount that is not attached yet show the ids of its files as a user namespace maps them.
pub fn map_ids_of_mount(tree: &OwnedFd, namespace: &OwnedFd) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

    /// `struct mount_attr`
    #[repr(C)]
    struct Attributes {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let attributes = Attributes {
        attr_set: MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    // SAFETY: path and struct live until the call returns, the size is the struct's; both descriptors are open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            size_of::<Attributes>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the kernel filter the calls of this thread by a classic BPF program, eight bytes an instruction.
pub fn load_filter(code: &[u8], flags: u32) -> io::Result<()> {
    let instruction = |i: &[u8]| libc::sock_filter {
        code: u16::from_ne_bytes([i[0], i[1]]),
        jt: i[2],
        jf: i[3],
        k: u32::from_ne_bytes([i[4], i[5], i[6], i[7]]),
    };
    let mut filter: Vec<libc::sock_filter> = code.chunks_exact(8).map(instruction).collect();
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions live until the call returns; the kernel copies and checks them.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Brings the loopback interface of the current network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: an all-zero ifreq is a valid value of the C struct (integers, byte arrays and a union of them).
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    // SAFETY: the kernel reads the name from, and writes the flags into, the ifreq we own.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above filled in the flags member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: the kernel only reads the ifreq.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `BPF_PROG_LOAD` of a device program and `BPF_PROG_ATTACH` to a v2 cgroup, which then holds it.
pub fn attach_device_program(cgroup: &File, code: &[u64]) -> io::Result<()> {
    const PROG_LOAD: libc::c_int = 5;
    const PROG_ATTACH: libc::c_int = 8;
    const TYPE_CGROUP_DEVICE: u32 = 15;
    const ATTACH_CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;

    /// The start of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes what is missing as zero.
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    /// The same for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
    }
    let license = c"Apache-2.0";
    let load = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the struct and what it points to live until the call returns, and the sizes are theirs. The
    // kernel verifies the program.
    let program = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &load, size_of::<Load>()) };
    if program < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above returned a new descriptor that nothing else owns.
    let program = unsafe { OwnedFd::from_raw_fd(program as RawFd) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
    };
    // SAFETY: as above; both descriptors are open.
    if unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &attach, size_of::<Attach>()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
