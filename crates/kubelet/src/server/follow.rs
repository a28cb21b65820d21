//! Reads a container's log for a client: the end of it, from some time on, and what is still to come.
//!
//! The tail is found from the end of the file, and following waits for the kernel to tell of a change:
//! nothing is read twice, and nothing is polled.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::inotify::{CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::logs::{self, Entry};

/// Bytes that are read at once.
const BLOCK: usize = 64 << 10;
/// A line that has no end within this is passed on as it is; the runtime cuts lines at 16 KiB.
const LINE_MAX: usize = 1 << 20;

#[derive(Debug, Clone, Default)]
pub struct Options {
    pub follow: bool,
    pub timestamps: bool,
    /// Lines from the end; all when `None`.
    pub tail: Option<u64>,
    pub since: Option<Timestamp>,
    /// Bytes.
    pub limit: Option<u64>,
}

/// Turns lines of the file into what the client gets.
pub(crate) struct Filter {
    options: Options,
    left: u64,
    at_line_start: bool,
    since_reached: bool,
}

impl Filter {
    fn new(options: Options) -> Filter {
        let left = options.limit.unwrap_or(u64::MAX);
        Filter { since_reached: options.since.is_none(), options, left, at_line_start: true }
    }

    /// What a client gets of a whole log; for fuzzing.
    pub(crate) fn of(log: &[u8], options: Options) -> Vec<u8> {
        let mut cursor = io::Cursor::new(log);
        let lines = options.tail;
        let start = lines.map_or(0, |lines| tail_start(&mut cursor, lines).expect("memory can be read"));
        let (mut filter, mut out) = (Filter::new(options), vec![]);
        let whole = &log[start as usize..];
        let _ = whole.split_inclusive(|byte| *byte == b'\n').all(|line| filter.take(line, &mut out));
        out
    }

    /// Appends what `line` becomes; false when the limit is reached.
    fn take(&mut self, line: &[u8], out: &mut Vec<u8>) -> bool {
        let Some(entry) = Entry::parse(line) else { return true };
        if !self.since_reached {
            // Lines are in order of time: once one is late enough, all are.
            let time: Option<Timestamp> = entry.time.parse().ok();
            self.since_reached = time.is_some_and(|time| Some(time) >= self.options.since);
            if !self.since_reached {
                return true;
            }
        }
        let begin = out.len();
        if self.options.timestamps && self.at_line_start {
            out.extend(entry.time.bytes());
            out.push(b' ');
        }
        out.extend(entry.text);
        if entry.full {
            out.push(b'\n');
        }
        self.at_line_start = entry.full;
        let allowed = usize::try_from(self.left).unwrap_or(usize::MAX);
        out.truncate(begin.saturating_add(allowed));
        self.left -= (out.len() - begin) as u64;
        self.left > 0
    }
}

/// Where the last `lines` lines begin.
fn tail_start(file: &mut (impl Read + Seek), lines: u64) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let mut block = vec![0; BLOCK];
    let (mut at, mut seen) = (end, 0);
    while at > 0 {
        let size = at.min(BLOCK as u64) as usize;
        at -= size as u64;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut block[..size])?;
        for index in (0..size).rev() {
            // The newline that ends the last line begins none.
            if block[index] == b'\n' && at + index as u64 + 1 < end {
                seen += 1;
                if seen == lines {
                    return Ok(at + index as u64 + 1);
                }
            }
        }
    }
    Ok(0)
}

struct Reading {
    path: PathBuf,
    file: std::fs::File,
    filter: Filter,
    partial: Vec<u8>,
    /// The part of the log to go on with.
    next: Option<std::fs::File>,
}

enum Step {
    Data(Bytes),
    /// There is nothing more now.
    End,
    /// There is more in another part.
    Next,
    /// The client has what it asked for.
    Limit,
}

impl Reading {
    fn open(path: &Path, options: Options) -> io::Result<Reading> {
        let mut file = match std::fs::File::open(path) {
            // Between being set aside and being begun anew, the log is its newest older part.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let newest = logs::rotated(path)?.into_iter().next();
                std::fs::File::open(newest.as_deref().unwrap_or(path))?
            }
            opened => opened?,
        };
        let from = match options.tail {
            Some(lines) => tail_start(&mut file, lines)?,
            None => 0,
        };
        file.seek(SeekFrom::Start(from))?;
        Ok(Reading { path: path.to_owned(), file, filter: Filter::new(options), partial: vec![], next: None })
    }

    fn step(&mut self) -> io::Result<Step> {
        loop {
            let mut block = vec![0; BLOCK];
            let n = self.file.read(&mut block)?;
            if n == 0 {
                return Ok(Step::End);
            }
            self.partial.extend_from_slice(&block[..n]);
            let whole = match self.partial.iter().rposition(|byte| *byte == b'\n') {
                Some(at) => at + 1,
                None if self.partial.len() > LINE_MAX => self.partial.len(),
                None => continue,
            };
            let rest = self.partial.split_off(whole);
            let lines = std::mem::replace(&mut self.partial, rest);
            let mut out = vec![];
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                if !self.filter.take(line, &mut out) {
                    self.filter.left = 0;
                    return Ok(if out.is_empty() { Step::Limit } else { Step::Data(out.into()) });
                }
            }
            if !out.is_empty() {
                return Ok(Step::Data(out.into()));
            }
        }
    }

    /// At the end of what there is: goes on with the part that follows this one, or says that there is none.
    fn next_part(&mut self) -> io::Result<bool> {
        if let Some(next) = self.next.take() {
            self.file = next;
            self.partial.clear();
            return Ok(true);
        }
        // Once another part follows, this one is written to no more; but only a look after that sees all of it.
        self.next = self.following()?;
        Ok(self.next.is_some())
    }

    fn following(&self) -> io::Result<Option<std::fs::File>> {
        let id = |data: &std::fs::Metadata| (data.dev(), data.ino());
        let own = id(&self.file.metadata()?);
        let mut found = match std::fs::File::open(&self.path) {
            Ok(newest) if id(&newest.metadata()?) == own => return Ok(None),
            Ok(newest) => Some(newest),
            // It is just being begun.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        // A slow client may be several parts behind.
        for older in logs::rotated(&self.path)? {
            match std::fs::File::open(older) {
                Ok(older) if id(&older.metadata()?) == own => break,
                Ok(older) => found = Some(older),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// Tells when something in the log's directory has changed.
struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    fn new(log: &Path) -> io::Result<Watch> {
        let inotify = rustix::fs::inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let events = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        rustix::fs::inotify::add_watch(&inotify, log.parent().unwrap_or(Path::new("/")), events)?;
        #[expect(deprecated, reason = "its successor is unsafe; an OwnedFd stays the same file, as it asks")]
        let inotify = AsyncFd::new(inotify)?;
        Ok(Watch(inotify))
    }

    async fn changed(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = rustix::fs::inotify::Reader::new(self.0.get_ref(), &mut buffer);
        // What changed does not matter; but all of it must be taken out.
        while events.next().is_ok() {}
        ready.clear_ready();
        Ok(())
    }
}

/// Sends the log to `out` until its end; with `follow`, until the container `ended` and all is sent.
pub async fn send(
    path: &Path,
    options: Options,
    ended: CancellationToken,
    out: mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let follow = options.follow;
    let (open, path_too) = (options, path.to_owned());
    // Before the file is read, so that nothing that is written after that is missed.
    let watch = if follow { Some(Watch::new(path)?) } else { None };
    let mut reading = tokio::task::spawn_blocking(move || Reading::open(&path_too, open)).await??;
    loop {
        let over = ended.is_cancelled();
        loop {
            let (step, back) = tokio::task::spawn_blocking(move || {
                let step = reading.step().and_then(|step| match step {
                    Step::End if reading.next_part()? => Ok(Step::Next),
                    step => Ok(step),
                });
                (step, reading)
            })
            .await?;
            reading = back;
            match step? {
                Step::Next => {}
                Step::Data(bytes) => {
                    if out.send(Ok(bytes)).await.is_err() || reading.filter.left == 0 {
                        return Ok(());
                    }
                }
                Step::Limit => return Ok(()),
                Step::End => break,
            }
        }
        let Some(watch) = watch.as_ref().filter(|_| !over) else { return Ok(()) };
        tokio::select! {
            changed = watch.changed() => changed?,
            () = ended.cancelled() => {}
            () = out.closed() => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor, Write};

    #[track_caller]
    fn check_tail(text: &str, lines: u64, want: &str) {
        let start = tail_start(&mut Cursor::new(text.as_bytes()), lines).expect("read");
        assert_eq!(&text[start as usize..], want, "{lines} of {text:?}");
    }

    #[test]
    fn the_tail_is_found_from_the_end() {
        check_tail("a\nb\nc\n", 0, "");
        check_tail("a\nb\nc\n", 1, "c\n");
        check_tail("a\nb\nc\n", 2, "b\nc\n");
        check_tail("a\nb\nc\n", 9, "a\nb\nc\n");
        check_tail("a\nb", 1, "b");
        check_tail("", 1, "");
        let long = format!("first\n{}\nlast\n", "x".repeat(3 * BLOCK));
        check_tail(&long, 1, "last\n");
        check_tail(&long, 3, &long);
    }

    const LOG: &str = "2026-01-01T00:00:01.000000000Z stdout F one\n\
                       2026-01-01T00:00:02.000000000Z stdout P tw\n\
                       2026-01-01T00:00:02.000000000Z stdout F o\n\
                       2026-01-01T00:00:03.000000000Z stderr F three\n";

    async fn read(options: Options) -> String {
        let dir = crate::testing::temp_dir("logs");
        let path = dir.join("0.log");
        std::fs::write(&path, LOG).expect("written");
        let (out, mut got) = mpsc::channel(100);
        send(&path, options, CancellationToken::new(), out).await.expect("sent");
        let mut text = vec![];
        while let Some(bytes) = got.recv().await {
            text.extend(bytes.expect("bytes"));
        }
        std::fs::remove_dir_all(&dir).expect("removed");
        String::from_utf8(text).expect("text")
    }

    #[tokio::test]
    async fn lines_are_chosen_and_marked() {
        assert_eq!(read(Options::default()).await, "one\ntwo\nthree\n");
        assert_eq!(read(Options { tail: Some(1), ..Options::default() }).await, "three\n");
        assert_eq!(read(Options { limit: Some(5), ..Options::default() }).await, "one\nt");
        let since = "2026-01-01T00:00:02Z".parse().ok();
        assert_eq!(read(Options { since, ..Options::default() }).await, "two\nthree\n");
        assert_eq!(
            read(Options { timestamps: true, tail: Some(3), ..Options::default() }).await,
            "2026-01-01T00:00:02.000000000Z two\n2026-01-01T00:00:03.000000000Z three\n"
        );
    }

    #[tokio::test]
    async fn following_goes_on_over_rotation_until_the_end() {
        let dir = crate::testing::temp_dir("follow");
        let path = dir.join("0.log");
        std::fs::write(&path, LOG).expect("written");
        let (out, mut got) = mpsc::channel(100);
        let ended = CancellationToken::new();
        let task = tokio::spawn({
            let (path, ended) = (path.clone(), ended.clone());
            let options = Options { follow: true, tail: Some(1), ..Options::default() };
            async move { send(&path, options, ended, out).await }
        });
        let mut next = async || {
            let bytes = got.recv().await.map(|bytes| bytes.expect("bytes"));
            bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        assert_eq!(next().await.as_deref(), Some("three\n"));
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("opened");
        writeln!(file, "2026-01-01T00:00:04Z stdout F four").expect("written");
        assert_eq!(next().await.as_deref(), Some("four\n"));
        std::fs::rename(&path, dir.join("0.log.")).expect("renamed");
        std::fs::write(&path, "2026-01-01T00:00:05Z stdout F five\n").expect("written");
        assert_eq!(next().await.as_deref(), Some("five\n"));
        // While nobody looks it is set aside more than once, with lines that came after the last look.
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("opened");
        for part in 0..3 {
            writeln!(file, "2026-01-01T00:00:06Z stdout F six {part}").expect("written");
            std::fs::rename(&path, dir.join(format!("0.log.{part}"))).expect("renamed");
            file = std::fs::File::create(&path).expect("begun");
        }
        writeln!(file, "2026-01-01T00:00:07Z stdout F seven").expect("written");
        let mut rest = String::new();
        while !rest.ends_with("seven\n") {
            rest += &next().await.expect("more");
        }
        assert_eq!(rest, "six 0\nsix 1\nsix 2\nseven\n");
        ended.cancel();
        assert_eq!(next().await, None);
        task.await.expect("no panic").expect("sent");
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
