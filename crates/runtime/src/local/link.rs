//! The agent's end of a shim's socket.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::api::{Error, Result};
use crate::image::failed;
use crate::shim::proto::{Message, Op, Reply, Request, ShimError, ShimEvent};
use crate::shim::wire::{self, Inbox};

/// How long a shim may take for what it does at once.
const ANSWER_MAX: Duration = Duration::from_secs(60);

type Answer = (std::result::Result<Reply, ShimError>, Vec<OwnedFd>);

/// A connection. Requests go out in order, answers come by their number.
pub struct Link {
    out: mpsc::Sender<(Vec<u8>, Vec<OwnedFd>)>,
    next: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Once closed, nobody may begin to wait.
    closed: bool,
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    exits: HashMap<u64, oneshot::Sender<Result<i32>>>,
}

/// The other half, to be run as a task: see [`Connection::run`].
pub struct Connection {
    stream: UnixStream,
    out: mpsc::Receiver<(Vec<u8>, Vec<OwnedFd>)>,
}

pub async fn connect(socket: &Path) -> std::io::Result<(Link, Connection)> {
    let (_dir, short) = wire::short_path(socket)?;
    let stream = UnixStream::connect(short).await?;
    let (sender, out) = mpsc::channel(64);
    let link = Link { out: sender, next: AtomicU64::new(1), waiting: Default::default() };
    Ok((link, Connection { stream, out }))
}

fn gone() -> Error {
    Error::Failed("the sandbox's shim is gone".to_owned())
}

impl Link {
    /// Asks, and waits for the answer.
    pub async fn request(&self, op: Op, fds: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>)> {
        let (_, answer) = self.send(op, fds, None).await?;
        answer.await
    }

    /// Sends; the future is the answer. `exit` is told the exit code of the process the request starts.
    async fn send(
        &self,
        op: Op,
        fds: Vec<OwnedFd>,
        exit: Option<oneshot::Sender<Result<i32>>>,
    ) -> Result<(u64, impl Future<Output = Result<(Reply, Vec<OwnedFd>)>>)> {
        let seq = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = wire::frame(&Request { seq, fds: fds.len(), op });
        if frame.len() > crate::shim::proto::FRAME_MAX {
            return Err(Error::Invalid("the request is too long".to_owned()));
        }
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().expect("short");
            if waiting.closed {
                return Err(gone());
            }
            waiting.answers.insert(seq, sender);
            waiting.exits.extend(exit.map(|exit| (seq, exit)));
        }
        self.out.send((frame, fds)).await.map_err(|_| gone())?;
        let answer = async move {
            let answer = tokio::time::timeout(ANSWER_MAX, receiver).await;
            let (result, fds) = answer
                .map_err(|_| Error::Timeout("the sandbox's shim does not answer".to_owned()))?
                .map_err(|_| gone())?;
            match result {
                Ok(reply) => Ok((reply, fds)),
                Err(ShimError::Start(text)) => Err(Error::Start(text)),
                Err(ShimError::NotFound(text)) => Err(Error::NotFound(text)),
                Err(ShimError::Failed(text)) => Err(Error::Failed(text)),
            }
        };
        Ok((seq, answer))
    }

    /// Starts a process; returns its number for [`Op::KillExec`], and what comes with the answer.
    pub async fn exec(
        &self,
        op: Op,
        fds: Vec<OwnedFd>,
    ) -> Result<(u64, Vec<OwnedFd>, oneshot::Receiver<Result<i32>>)> {
        let (sender, exit) = oneshot::channel();
        let (seq, answer) = self.send(op, fds, Some(sender)).await?;
        match answer.await {
            Ok((_, fds)) => Ok((seq, fds, exit)),
            Err(e) => {
                self.waiting.lock().expect("short").exits.remove(&seq);
                Err(e)
            }
        }
    }

    /// Whether the shim is there.
    pub fn is_open(&self) -> bool {
        !self.waiting.lock().expect("short").closed
    }

    fn answered(&self, seq: u64, answer: Answer) {
        if let Some(sender) = self.waiting.lock().expect("short").answers.remove(&seq) {
            let _ = sender.send(answer);
        }
    }

    fn exited(&self, seq: u64, code: i32) {
        if let Some(sender) = self.waiting.lock().expect("short").exits.remove(&seq) {
            let _ = sender.send(Ok(code));
        }
    }

    fn close(&self) {
        let mut waiting = self.waiting.lock().expect("short");
        waiting.closed = true;
        waiting.answers.clear();
        for (_, exit) in waiting.exits.drain() {
            let _ = exit.send(Err(gone()));
        }
    }
}

impl Connection {
    /// Carries messages until the shim is gone. Events are handed over in the order they came.
    pub async fn run(self, link: &Link, mut event: impl FnMut(ShimEvent)) {
        let Self { stream, mut out } = self;
        let reads = async {
            let mut inbox = Inbox::default();
            loop {
                let filled = stream.async_io(Interest::READABLE, || inbox.fill(stream.as_fd())).await;
                if !filled.is_ok_and(|more| more) {
                    return;
                }
                while let Ok(Some(frame)) = inbox.next() {
                    match serde_json::from_slice(&frame) {
                        Ok(Message::Reply { seq, fds, result }) => {
                            let fds = inbox.fds.drain(..fds.min(inbox.fds.len())).collect();
                            link.answered(seq, (result, fds));
                        }
                        Ok(Message::Event(ShimEvent::ExecExited { seq, code })) => link.exited(seq, code),
                        Ok(Message::Event(other)) => event(other),
                        Err(e) => {
                            tracing::warn!(error = %e, "A shim sent what is no message");
                            return;
                        }
                    }
                }
            }
        };
        let writes = async {
            while let Some((mut frame, fds)) = out.recv().await {
                let mut with: &[OwnedFd] = &fds;
                while !frame.is_empty() {
                    let borrowed: Vec<_> = with.iter().map(AsFd::as_fd).collect();
                    let sent =
                        stream.async_io(Interest::WRITABLE, || wire::send(stream.as_fd(), &frame, &borrowed));
                    match sent.await {
                        Ok(n) => drop(frame.drain(..n)),
                        Err(_) => return,
                    }
                    with = &[];
                }
            }
        };
        tokio::select! { () = reads => {} () = writes => {} }
        link.close();
    }
}

/// Asks a shim for what it runs.
pub async fn hello(link: &Link) -> Result<Vec<String>> {
    match link.request(Op::Hello, Vec::new()).await? {
        (Reply::Hello { running }, _) => Ok(running),
        _ => Err(failed("a shim answered something else")),
    }
}
