//! Room on the disk that images leave to everything else.
//!
//! An image, whatever it says of itself, must not fill the disk to the last byte: the cluster's own store is on it
//! as well.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;

/// Bytes that are left free; on a small disk a fiftieth of it.
const LEFT_FREE: u64 = 256 << 20;
/// Bytes between two looks.
const STEP: u64 = 32 << 20;

/// Watches over what is written to one filesystem.
pub struct Room {
    dir: File,
    /// Written since the last look.
    unchecked: u64,
}

impl Room {
    pub fn in_dir(dir: &Path) -> io::Result<Room> {
        Ok(Room { dir: File::open(dir)?, unchecked: 0 })
    }

    /// Notes bytes that are about to be written; an error when there is no more room.
    pub fn take(&mut self, bytes: u64) -> io::Result<()> {
        self.unchecked += bytes;
        if self.unchecked < STEP {
            return Ok(());
        }
        self.unchecked = 0;
        match self.left()? {
            0 => Err(Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }

    /// Bytes that may still be written.
    pub fn left(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.dir)?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Ok(bytes(stat.f_bavail).saturating_sub(LEFT_FREE.min(bytes(stat.f_blocks) / 50)))
    }
}
