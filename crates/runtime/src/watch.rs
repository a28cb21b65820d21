//! Being told of changes in a directory, by inotify, and of the clock, by a timer that the kernel cancels.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
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

/// A watch of the machine's clock: that it was set, by a person, by NTP, or because the machine slept.
pub struct ClockWatch(AsyncFd<OwnedFd>);

impl ClockWatch {
    /// Must be called within a tokio runtime.
    pub fn new() -> io::Result<ClockWatch> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let watch = ClockWatch(crate::sys::async_fd(timer)?);
        watch.arm()?;
        Ok(watch)
    }

    fn arm(&self) -> rustix::io::Result<()> {
        // For a time that never comes: only its cancellation matters.
        let never = Timespec { tv_sec: 1 << 40, tv_nsec: 0 };
        let timer = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(self.0.get_ref(), flags, &timer).map(drop)
    }

    /// Returns once the clock was set since the last time.
    pub async fn set(&self) {
        let mut buffer = [0u8; 8];
        loop {
            let Ok(mut ready) = self.0.readable().await else { return std::future::pending().await };
            let read = rustix::io::read(self.0.get_ref(), &mut buffer[..]);
            ready.clear_ready();
            if read == Err(Errno::CANCELED) && self.arm().is_ok() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_clock_says_when_it_is_set_and_nothing_else() {
        let watch = ClockWatch::new().expect("a timer");
        assert!(tokio::time::timeout(Duration::from_millis(50), watch.set()).await.is_err());
        for by in [1, -1] {
            match crate::sys::move_clock(by) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    return eprintln!("Not tried: this takes CAP_SYS_TIME");
                }
                result => result.expect("the clock can be set"),
            }
            tokio::time::timeout(Duration::from_secs(10), watch.set()).await.expect("told");
        }
    }
}
