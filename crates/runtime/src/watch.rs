//! Being told of changes in a directory, by inotify.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use tokio::io::unix::AsyncFd;

/// A watch of the files right in a directory: that they were written, came or went.
pub struct DirWatch(AsyncFd<OwnedFd>);

impl DirWatch {
    /// Must be called within a tokio runtime.
    pub fn new(dir: &Path) -> io::Result<DirWatch> {
        let events = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let wanted =
            WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        add_watch(&events, dir, wanted)?;
        Ok(DirWatch(crate::sys::async_fd(events)?))
    }

    /// Returns once something has changed since the last time. What it was is not told: look.
    pub async fn changed(&self) {
        let mut buffer = [0u8; 4096];
        loop {
            let Ok(mut ready) = self.0.readable().await else { return std::future::pending().await };
            let mut some = false;
            while rustix::io::read(self.0.get_ref(), &mut buffer[..]).is_ok_and(|n| n > 0) {
                some = true;
            }
            ready.clear_ready();
            if some {
                return;
            }
        }
    }
}
