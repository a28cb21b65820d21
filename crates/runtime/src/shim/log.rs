//! Container logs in the CRI format: `<RFC 3339 time> stdout F line`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longest line in one entry; longer ones come as partial (`P`) entries, as containerd does it.
pub const LINE_MAX: usize = 16 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Appends entries to a file. Every entry goes out in one write, so a reader never sees half of one unless
/// the disk is full.
pub struct CriLog {
    path: PathBuf,
    file: Option<File>,
    out: Vec<u8>,
}

impl CriLog {
    /// An empty path is a log that keeps nothing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut log = Self { path: path.to_owned(), file: None, out: Vec::new() };
        log.reopen()?;
        Ok(log)
    }

    /// Opens the path again: after a rotation it is another file.
    pub fn reopen(&mut self) -> io::Result<()> {
        if self.path.as_os_str().is_empty() {
            return Ok(());
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&self.path)?;
        self.file = Some(file);
        Ok(())
    }

    /// Writes the whole lines of `pending` followed by `data`, and keeps the rest in `pending`.
    pub fn write(&mut self, stream: Stream, pending: &mut Vec<u8>, data: &[u8], now_ns: i64) {
        let time = rfc3339_nano(now_ns);
        self.out.clear();
        for piece in data.split_inclusive(|b| *b == b'\n') {
            let (mut line, whole) = match piece.split_last() {
                Some((b'\n', line)) => (line, true),
                _ => (piece, false),
            };
            while pending.len() + line.len() > LINE_MAX {
                let (now, later) = line.split_at(LINE_MAX - pending.len());
                entry(&mut self.out, &time, stream, b'P', pending, now);
                pending.clear();
                line = later;
            }
            match whole {
                true => {
                    entry(&mut self.out, &time, stream, b'F', pending, line);
                    pending.clear();
                }
                false => pending.extend_from_slice(line),
            }
        }
        self.flush();
    }

    /// The end of a stream: what has no newline is a partial entry.
    pub fn finish(&mut self, stream: Stream, pending: &mut Vec<u8>, now_ns: i64) {
        if !pending.is_empty() {
            self.out.clear();
            entry(&mut self.out, &rfc3339_nano(now_ns), stream, b'P', pending, b"");
            self.flush();
        }
        *pending = Vec::new();
    }

    fn flush(&mut self) {
        // A full disk costs log lines. Blocking would stop the container instead.
        if let Some(file) = &mut self.file {
            let _ = file.write_all(&self.out);
        }
        if self.out.capacity() > 4 * LINE_MAX {
            self.out = Vec::new();
        }
    }
}

fn entry(out: &mut Vec<u8>, time: &str, stream: Stream, tag: u8, head: &[u8], tail: &[u8]) {
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(if stream == Stream::Stdout { b" stdout " } else { b" stderr " });
    out.extend_from_slice(&[tag, b' ']);
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
    out.push(b'\n');
}

/// `2026-11-21T02:03:04.000000005Z`. Own code because the shim carries no date library.
pub fn rfc3339_nano(ns: i64) -> String {
    let (seconds, nanos) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since 1970 to a date, counting years from March so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{nanos:09}Z")
}

/// Nanoseconds since 1970, now.
pub fn now_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_agree_with_the_date_library() {
        for ns in [0, 5, 951_782_399_999_999_999, 1_709_164_800_000_000_001, 4_102_444_800_000_000_000, -1] {
            let want = jiff::Timestamp::from_nanosecond(ns.into()).unwrap();
            assert_eq!(rfc3339_nano(ns), format!("{want:.9}"));
        }
    }

    #[track_caller]
    fn check(writes: &[&[u8]], want: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = CriLog::open(&path).unwrap();
        let mut pending = Vec::new();
        for data in writes {
            log.write(Stream::Stdout, &mut pending, data, 0);
        }
        log.finish(Stream::Stdout, &mut pending, 0);
        let got = std::fs::read_to_string(&path).unwrap();
        assert_eq!(got.replace("1970-01-01T00:00:00.000000000Z stdout ", ""), want);
    }

    #[test]
    fn lines_become_entries() {
        check(&[b"a\nb\n"], "F a\nF b\n");
        check(&[b"a", b"b\n", b"\n"], "F ab\nF \n");
        check(&[b"no end"], "P no end\n");
        check(&[b""], "");
        let long = vec![b'x'; LINE_MAX + 3];
        let (head, tail) = (String::from_utf8(vec![b'x'; LINE_MAX]).unwrap(), "xxx");
        check(&[&long, b"\n"], &format!("P {head}\nF {tail}\n"));
        check(&[&long[..LINE_MAX], b"\n"], &format!("F {head}\n"));
        check(&[&long[..LINE_MAX], b"x", b"\n"], &format!("P {head}\nF x\n"));
    }

    #[test]
    fn a_rotated_log_is_opened_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = CriLog::open(&path).unwrap();
        log.write(Stream::Stderr, &mut Vec::new(), b"old\n", 0);
        std::fs::rename(&path, dir.path().join("1.log")).unwrap();
        log.reopen().unwrap();
        log.write(Stream::Stderr, &mut Vec::new(), b"new\n", 0);
        assert!(std::fs::read_to_string(&path).unwrap().ends_with(" stderr F new\n"));
        assert!(std::fs::read_to_string(dir.path().join("1.log")).unwrap().ends_with(" stderr F old\n"));
    }
}
