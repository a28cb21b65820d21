//! The kernel's log, record by record, as the kernel writes it.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, SeekFrom, open, seek};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// More than a record can have.
const RECORD_MAX: usize = 16 << 10;

/// What the kernel tells from now on.
pub struct KernelLog(AsyncFd<OwnedFd>);

impl KernelLog {
    /// Opens `/dev/kmsg`, which not everybody may. Must be called within a tokio runtime.
    pub fn open() -> io::Result<KernelLog> {
        let log = open("/dev/kmsg", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        seek(&log, SeekFrom::End(0))?;
        Ok(KernelLog(crate::sys::async_fd(log)?))
    }

    /// The next record's text. What processes wrote into the log is left out, and so is what was overwritten before
    /// anybody read it.
    pub async fn next(&self) -> io::Result<String> {
        let mut buffer = vec![0u8; RECORD_MAX];
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut buffer[..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    if let Some(text) = text(&String::from_utf8_lossy(&buffer[..n])) {
                        return Ok(text.to_owned());
                    }
                }
                // Records were overwritten: the next read goes on after them.
                Err(Errno::PIPE | Errno::INTR) => {}
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Of `priority,sequence,microseconds,flags;text`, and lines of `KEY=value` below: the text, when the kernel itself
/// speaks.
fn text(record: &str) -> Option<&str> {
    let (prefix, rest) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    // Above the three bits of the level is who speaks; 0 is the kernel, and nobody else may be that.
    (priority >> 3 == 0).then(|| rest.lines().next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[tokio::test]
    async fn the_kernel_s_own_records_are_told_one_by_one() {
        // A socket of packets gives a record with each read, as the device does.
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (log, kernel) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        let log = KernelLog(crate::sys::async_fd(log).expect("within a runtime"));
        for record in
            ["12,5,9,-;by a process", "6,6,10,-;one\n SUBSYSTEM=x\n", "nonsense", "3,7,11,-,caller=T1;two\n"]
        {
            rustix::io::write(&kernel, record.as_bytes()).expect("written");
        }
        assert_eq!(log.next().await.expect("a record"), "one");
        assert_eq!(log.next().await.expect("a record"), "two");
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(20), log.next()).await;
        assert!(waiting.is_err(), "nothing more");
        rustix::io::write(&kernel, b"0,8,12,-;three").expect("written");
        assert_eq!(log.next().await.expect("a record"), "three");
        drop(kernel);
        assert!(log.next().await.is_err());
    }
}
