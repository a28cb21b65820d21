//! Frames and descriptors on a socket, for both ends; and sockets whose path may be long.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;

use super::proto::{FDS_MAX, FRAME_MAX};

/// Sends one buffer, with descriptors along its first byte; returns how much went out.
pub fn send(socket: impl AsFd, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    Ok(sendmsg(socket, &[IoSlice::new(data)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Receives into `buffer`; descriptors that came along are added to `fds`. 0 is end of file.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(got.bytes)
}

/// A message as a frame.
pub fn frame(message: &impl Serialize) -> Vec<u8> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, message).expect("our messages have string keys and no failing parts");
    let length = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&length.to_le_bytes());
    out
}

/// Bytes received, until they make frames.
#[derive(Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Inbox {
    /// Receives what there is. `Ok(false)` at the end of the stream.
    pub fn fill(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let mut buffer = [0u8; 8192];
        let n = receive(socket, &mut buffer, &mut self.fds)?;
        self.bytes.extend_from_slice(&buffer[..n]);
        Ok(n > 0)
    }

    /// The next whole frame's JSON. An error when the length is beyond all bounds.
    pub fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(head) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > FRAME_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
        }
        if self.bytes.len() < 4 + length {
            return Ok(None);
        }
        let frame = self.bytes[4..4 + length].to_vec();
        self.bytes.drain(..4 + length);
        // A burst should not keep its memory for the life of a pod.
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
        Ok(Some(frame))
    }
}

/// A path to the same file that is short enough for a unix socket, through a descriptor of its directory,
/// which must be kept until the socket is bound or connected.
pub fn short_path(path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let dir = rustix::fs::open(parent, flags, rustix::fs::Mode::empty())?;
    let name = path.file_name().unwrap_or_default();
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, short))
}
