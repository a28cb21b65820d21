//! One container as the shim sees it: its streams, its log, who is attached, its end.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::event::{PollFd, PollFlags};
use rustix::pipe::{PipeFlags, pipe_with};

use super::log::{self, CriLog, Stream};
use super::proto::{ContainerRecord, Exit, Started};
use crate::cgroup::Cgroups;

/// How long an attached client may hold up the container's output before it is dropped.
const STALL_NS_MAX: i64 = 10_000_000_000;
/// Bytes of a stopped container's pipes that are still logged: what they can hold, and some.
const DRAIN_MAX: usize = 4 << 20;

/// One output of the container.
struct Output {
    stream: Stream,
    /// Gone once it said end of file.
    fd: Option<OwnedFd>,
    /// The line begun.
    pending: Vec<u8>,
    sinks: Vec<Sink>,
}

/// Where output is copied for an attached client.
struct Sink {
    fd: OwnedFd,
    pending: Vec<u8>,
    /// When it began not to take more.
    since: i64,
}

pub struct Container {
    pub id: String,
    pub dir: PathBuf,
    /// 0 until it is started.
    pub pid: i32,
    cgroup: String,
    log: CriLog,
    outputs: Vec<Output>,
    stdin: Option<OwnedFd>,
    stdin_once: bool,
    tty: bool,
}

impl Container {
    /// Opens the log and the streams; returns the ends that are the container's.
    pub fn prepare(id: &str, dir: PathBuf, record: &ContainerRecord) -> io::Result<(Self, [Stdio; 3])> {
        let spec = &record.spec;
        let log = CriLog::open(&spec.log_path)
            .map_err(|e| io::Error::new(e.kind(), format!("open log {}: {e}", spec.log_path.display())))?;
        let mut container = Self {
            id: id.to_owned(),
            dir,
            pid: 0,
            cgroup: record.cgroup.clone(),
            log,
            outputs: Vec::new(),
            stdin: None,
            stdin_once: spec.stdin_once,
            tty: spec.tty,
        };
        let mut stdio = [Stdio::null(), Stdio::null(), Stdio::null()];
        if !spec.tty {
            if spec.stdin {
                let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
                container.stdin = Some(ours);
                stdio[0] = theirs.into();
            }
            for (at, stream) in [(1, Stream::Stdout), (2, Stream::Stderr)] {
                let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
                container.add_output(stream, ours)?;
                stdio[at] = theirs.into();
            }
        }
        Ok((container, stdio))
    }

    fn add_output(&mut self, stream: Stream, fd: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        self.outputs.push(Output { stream, fd: Some(fd), pending: Vec::new(), sinks: Vec::new() });
        Ok(())
    }

    pub fn started(&mut self, started: &Started, terminal: Option<OwnedFd>) {
        self.pid = started.pid;
        if let Some(master) = terminal {
            let read = rustix::io::dup(&master).map_err(io::Error::from);
            let added = read.and_then(|read| self.add_output(Stream::Stdout, read));
            if let Err(e) = added {
                super::log_line!("shim: terminal of {}: {e}", self.id);
            }
            self.stdin = Some(master);
        }
    }

    /// What to wait for, and until when at most.
    pub fn interest<'a>(&'a self, fds: &mut Vec<PollFd<'a>>, deadline: &mut Option<i64>) {
        for output in &self.outputs {
            let stalled = output.sinks.iter().any(|s| !s.pending.is_empty());
            // While an attached client has not taken the last piece, the container waits, as upstream does.
            if let (Some(fd), false) = (&output.fd, stalled) {
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
            for sink in &output.sinks {
                let waiting = !sink.pending.is_empty();
                // Without a direction it still says when the client has gone.
                fds.push(PollFd::new(&sink.fd, if waiting { PollFlags::OUT } else { PollFlags::empty() }));
                if waiting {
                    let at = sink.since + STALL_NS_MAX;
                    *deadline = Some(deadline.map_or(at, |d: i64| d.min(at)));
                }
            }
        }
    }

    /// Copies what there is to log and clients, a buffer full of each stream.
    pub fn pump(&mut self, buffer: &mut [u8]) {
        let now = log::now_ns();
        for output in &mut self.outputs {
            for sink in &mut output.sinks {
                sink.flush();
            }
            output.sinks.retain(|s| s.alive(now));
            if output.sinks.iter().all(|s| s.pending.is_empty()) {
                output.read(&mut self.log, buffer, now);
            }
        }
    }

    /// Adds a client's pipes; returns where its input goes.
    pub fn attach(
        &mut self,
        stdin: bool,
        stdout: bool,
        stderr: bool,
        fds: Vec<OwnedFd>,
    ) -> io::Result<Option<OwnedFd>> {
        let mut fds = fds.into_iter();
        for (wanted, stream) in [(stdout, Stream::Stdout), (stderr, Stream::Stderr)] {
            let Some(fd) = wanted.then(|| fds.next()).flatten() else { continue };
            rustix::io::ioctl_fionbio(&fd, true)?;
            if let Some(output) = self.outputs.iter_mut().find(|o| o.stream == stream) {
                output.sinks.push(Sink { fd, pending: Vec::new(), since: 0 });
            }
        }
        // With stdinOnce the client gets our only copy: when it closes, the program reads end of file.
        if stdin && self.stdin_once && !self.tty {
            return Ok(self.stdin.take());
        }
        match &self.stdin {
            Some(fd) if stdin || self.tty => Ok(Some(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)),
            _ => Ok(None),
        }
    }

    pub fn reopen_log(&mut self) -> io::Result<()> {
        self.log.reopen()
    }

    /// SIGKILL to the first process, which in a namespace of its own takes all others with it, and to
    /// whatever else is in the cgroup.
    pub fn kill_all(&self) {
        super::server::kill(self.pid, nix::sys::signal::Signal::SIGKILL as i32);
        if let Ok(cgroups) = Cgroups::detect() {
            cgroups.kill(&self.cgroup);
        }
    }

    /// Its first process ended: takes the rest of its output.
    pub fn ended(mut self, code: i32, buffer: &mut [u8]) -> Exit {
        let mut oom_killed = false;
        if let Ok(cgroups) = Cgroups::detect() {
            oom_killed = code != 0 && cgroups.oom_kills(&self.cgroup) > 0;
            // With a shared process namespace others may live on.
            cgroups.kill(&self.cgroup);
        }
        let now = log::now_ns();
        for output in &mut self.outputs {
            let mut left = DRAIN_MAX;
            while left > 0 {
                match output.read(&mut self.log, buffer, now) {
                    0 => break,
                    n => left = left.saturating_sub(n),
                }
            }
            self.log.finish(output.stream, &mut output.pending, now);
            for sink in &mut output.sinks {
                sink.flush();
            }
        }
        Exit { code, at: now, oom_killed, ..Default::default() }
    }
}

impl Output {
    /// One read; returns how much came.
    fn read(&mut self, log: &mut CriLog, buffer: &mut [u8], now: i64) -> usize {
        let Some(fd) = &self.fd else { return 0 };
        let n = match rustix::io::read(fd, &mut *buffer) {
            Ok(n) if n > 0 => n,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return 0,
            // End of file; a terminal says EIO instead.
            _ => {
                self.fd = None;
                log.finish(self.stream, &mut self.pending, now);
                return 0;
            }
        };
        log.write(self.stream, &mut self.pending, &buffer[..n], now);
        for sink in &mut self.sinks {
            sink.since = now;
            sink.pending.extend_from_slice(&buffer[..n]);
            sink.flush();
        }
        n
    }
}

impl Sink {
    fn flush(&mut self) {
        while !self.pending.is_empty() {
            match rustix::io::write(&self.fd, &self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(_) => return,
            }
        }
        self.pending = Vec::new();
    }

    /// Whether someone still reads it, and has taken something lately.
    fn alive(&self, now: i64) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut fds, Some(&zero));
        let gone = fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP);
        !gone && (self.pending.is_empty() || now - self.since < STALL_NS_MAX)
    }
}
