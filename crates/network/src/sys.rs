//! The one place of this crate where the compiler can't see that all is well.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Makes a socket something to wait for. Must be called within a tokio runtime.
pub(crate) fn wait_on(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, names the same file for as long as it lives, and is dropped only with the
    // AsyncFd, which takes it over here.
    Ok(unsafe { AsyncFd::register(socket)? })
}
