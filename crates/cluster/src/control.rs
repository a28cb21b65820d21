//! The socket on which a running server answers the commands of its machine: `<data>/minke.sock`.
//!
//! A connection carries one request as a line of JSON, and answers as lines until [`Reply::Done`] or
//! [`Reply::Error`]. The directory is its owner's alone, so whoever can connect may.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::data_dir::DataDir;
use crate::startup::Stage;

const REQUEST_MAX: u64 = 64 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests at work at one time; more wait in the socket's queue.
const REQUESTS_MAX: usize = 32;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Answers with stages until the server is ready.
    Wait,
    Status,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    Stage(Stage),
    Done(Value),
    Error(String),
}

/// What answers requests.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Intermediate replies go to `replies`; the answer becomes [`Reply::Done`] or [`Reply::Error`].
    async fn handle(&self, request: Request, replies: mpsc::Sender<Reply>) -> Result<Value>;
}

pub fn bind(data: &DataDir) -> Result<UnixListener> {
    let path = data.join("minke.sock");
    // Left by a server that was killed; the directory's lock says that it is gone.
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))
}

/// Answers until `stop`.
pub async fn serve(listener: UnixListener, handler: Arc<dyn Handler>, stop: CancellationToken) {
    let places = Arc::new(tokio::sync::Semaphore::new(REQUESTS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let connection =
            tokio::select! { accepted = listener.accept() => accepted, () = stop.cancelled() => return };
        match connection {
            Ok((stream, _)) => {
                let handler = handler.clone();
                let stop = stop.clone();
                tokio::spawn(async move {
                    tokio::select! { () = converse(stream, handler) => {}, () = stop.cancelled() => {} }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "Control socket");
                // Out of descriptors, most likely; trying at once would only spin.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, handler: Arc<dyn Handler>) {
    let (input, mut output) = stream.into_split();
    let mut line = String::new();
    let mut input = tokio::io::BufReader::new(input.take(REQUEST_MAX));
    if !matches!(tokio::time::timeout(REQUEST_TIMEOUT, input.read_line(&mut line)).await, Ok(Ok(1..))) {
        return;
    }
    let (sender, mut replies) = mpsc::channel(16);
    let work = async {
        match serde_json::from_str(&line) {
            Ok(request) => handler.handle(request, sender).await,
            Err(error) => Err(anyhow!("not a request: {error}")),
        }
    };
    tokio::pin!(work);
    // The work goes on while its replies are sent, and ends when nobody reads them.
    let answer = loop {
        tokio::select! {
            biased;
            Some(reply) = replies.recv() => if send(&mut output, &reply).await.is_err() { return },
            answer = &mut work => break answer,
        }
    };
    while let Ok(reply) = replies.try_recv() {
        if send(&mut output, &reply).await.is_err() {
            return;
        }
    }
    let reply = match answer {
        Ok(value) => Reply::Done(value),
        Err(error) => Reply::Error(format!("{error:#}")),
    };
    // Whoever asked may have gone; then there is nobody to tell.
    let _ = send(&mut output, &reply).await;
}

async fn send(output: &mut (impl AsyncWriteExt + Unpin), reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply).expect("replies serialise");
    line.push(b'\n');
    output.write_all(&line).await
}

/// A request on its way: replies are read from it.
pub struct Call(BufReader<StdUnixStream>);

/// Sends `request` to the server of `data`; `None` when none is running.
pub fn call(data: &DataDir, request: &Request) -> Result<Option<Call>> {
    call_path(&data.join("minke.sock"), request)
}

fn call_path(path: &Path, request: &Request) -> Result<Option<Call>> {
    let mut stream = match StdUnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("connect to {}", path.display())),
    };
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(Some(Call(BufReader::new(stream))))
}

impl Call {
    /// The next reply; an error when the server went away before the last one.
    pub fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            anyhow::bail!("the server ended before it answered");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Reads to the answer, handing what comes before it to `other`.
    pub fn answer(mut self, mut other: impl FnMut(Reply)) -> Result<Value> {
        loop {
            match self.reply()? {
                Reply::Done(value) => return Ok(value),
                Reply::Error(error) => return Err(anyhow!(error)),
                reply => other(reply),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    #[async_trait]
    impl Handler for Echo {
        async fn handle(&self, request: Request, replies: mpsc::Sender<Reply>) -> Result<Value> {
            match request {
                Request::Wait => {
                    replies.send(Reply::Stage(Stage::Ready)).await?;
                    Ok(Value::from("done"))
                }
                _ => Err(anyhow!("no")),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn requests_are_answered_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(dir.path()).unwrap();
        assert!(call(&data, &Request::Wait).unwrap().is_none());
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(bind(&data).unwrap(), Arc::new(Echo), stop.clone()));
        let path = data.join("minke.sock");
        tokio::task::spawn_blocking(move || {
            let mut stages = 0;
            let call = call_path(&path, &Request::Wait).unwrap().unwrap();
            assert_eq!(call.answer(|_| stages += 1).unwrap(), "done");
            assert_eq!(stages, 1);
            let call = call_path(&path, &Request::Status).unwrap().unwrap();
            assert_eq!(call.answer(|_| {}).unwrap_err().to_string(), "no");
            let mut stream = StdUnixStream::connect(&path).unwrap();
            stream.write_all(b"{}\n").unwrap();
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer).unwrap();
            assert!(answer.contains("not a request"), "{answer}");
        })
        .await
        .unwrap();
        stop.cancel();
        server.await.unwrap();
    }
}
