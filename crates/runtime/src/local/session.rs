//! Exec and attach, and their streams as the agent holds them.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::link::Link;
use super::{LocalRuntime, no_container};
use crate::api::{AttachSpec, Error, ExecSpec, Result, Session, TerminalSize};
use crate::image::failed;
use crate::shim::proto::Op;

pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A pipe to read from, and its other end to give away.
pub fn output() -> io::Result<(Reader, OwnedFd)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Box::new(pipe::Receiver::from_owned_fd(ours)?), theirs))
}

/// A pipe to write to, and its other end to give away.
pub fn input() -> io::Result<(Writer, OwnedFd)> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Box::new(pipe::Sender::from_owned_fd(ours)?), theirs))
}

/// A pipe someone else made.
pub fn writer(fd: OwnedFd) -> io::Result<Writer> {
    Ok(Box::new(pipe::Sender::from_owned_fd(fd)?))
}

pub fn null() -> io::Result<OwnedFd> {
    Ok(std::fs::File::options().read(true).write(true).open("/dev/null")?.into())
}

/// The master side of a terminal.
#[derive(Clone)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self(Arc::new(crate::sys::async_fd(master)?)))
    }

    pub fn resize(&self, size: TerminalSize) {
        let size =
            rustix::termios::Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        let _ = rustix::termios::tcsetwinsize(self.0.get_ref(), size);
    }
}

impl AsyncRead for Terminal {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), buf.initialize_unfilled())?));
            match read {
                Ok(Ok(n)) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                // How a terminal says that nobody has it open any more.
                Ok(Err(e)) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(e)) => return Poll::Ready(Err(e)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Where sizes are sent to; they go to the terminal, or nowhere.
pub fn resizer(terminal: Option<Terminal>) -> mpsc::Sender<TerminalSize> {
    let (sender, mut receiver) = mpsc::channel(4);
    if let Some(terminal) = terminal {
        tokio::spawn(async move {
            while let Some(size) = receiver.recv().await {
                terminal.resize(size);
            }
        });
    }
    sender
}

impl LocalRuntime {
    /// Starts a process; also returns what [`Op::KillExec`] needs to name it.
    pub(super) async fn start_exec(&self, id: &str, spec: ExecSpec) -> Result<(Session, Arc<Link>, u64)> {
        if spec.argv.is_empty() {
            return Err(Error::Invalid("no command given".to_owned()));
        }
        let link = self.link_of(id)?;
        let (mut stdin, mut stdout, mut stderr) = (None, None, None);
        let mut fds = Vec::new();
        if !spec.tty {
            fds.push(match spec.stdin {
                true => {
                    let (writer, fd) = input().map_err(failed)?;
                    stdin = Some(writer);
                    fd
                }
                false => null().map_err(failed)?,
            });
            for (wanted, slot) in [(spec.stdout, &mut stdout), (spec.stderr, &mut stderr)] {
                fds.push(match wanted {
                    true => {
                        let (reader, fd) = output().map_err(failed)?;
                        *slot = Some(reader);
                        fd
                    }
                    false => null().map_err(failed)?,
                });
            }
        }
        let (want_stdin, want_stdout) = (spec.stdin, spec.stdout);
        let (number, mut fds, exit) = link.exec(Op::Exec { id: id.to_owned(), exec: spec }, fds).await?;
        let terminal = fds.pop().map(Terminal::new).transpose().map_err(failed)?;
        if let Some(terminal) = &terminal {
            stdin = want_stdin.then(|| Box::new(terminal.clone()) as Writer);
            stdout = want_stdout.then(|| Box::new(terminal.clone()) as Reader);
        }
        let session = Session { stdin, stdout, stderr, resize: resizer(terminal), exit };
        Ok((session, link, number))
    }

    pub(super) async fn start_attach(&self, id: &str, spec: AttachSpec) -> Result<Session> {
        let link = self.link_of(id)?;
        let (tty, has_stdin, ended) =
            self.container(id, |c| (c.record.spec.tty, c.record.spec.stdin, c.ended.subscribe()))?;
        let stdin = spec.stdin && has_stdin;
        let stderr = spec.stderr && !tty;
        let (mut fds, mut readers) = (Vec::new(), Vec::new());
        for wanted in [spec.stdout, stderr] {
            readers.push(match wanted {
                true => {
                    let (reader, fd) = output().map_err(failed)?;
                    fds.push(fd);
                    Some(reader)
                }
                false => None,
            });
        }
        let op = Op::Attach { id: id.to_owned(), stdin, stdout: spec.stdout, stderr };
        let (_, mut fds) = link.request(op, fds).await?;
        let fd = fds.pop();
        let (terminal, input) = match (tty, fd) {
            (true, Some(fd)) => (Some(Terminal::new(fd).map_err(failed)?), None),
            (false, Some(fd)) => (None, Some(writer(fd).map_err(failed)?)),
            (_, None) => (None, None),
        };
        let (sender, exit) = tokio::sync::oneshot::channel();
        let (runtime, id, mut ended) = (self.clone(), id.to_owned(), ended);
        tokio::spawn(async move {
            let _ = ended.wait_for(|ended| *ended).await;
            let code = runtime.container(&id, |c| c.exit.as_ref().map(|e| e.code));
            let _ = sender.send(code.and_then(|code| code.ok_or_else(|| no_container(&id))));
        });
        let stderr = readers.pop().flatten();
        Ok(Session {
            stdin: match &terminal {
                Some(terminal) if stdin => Some(Box::new(terminal.clone())),
                _ => input,
            },
            stdout: readers.pop().flatten(),
            stderr,
            resize: resizer(terminal),
            exit,
        })
    }
}
