//! Exec and attach: a process's streams to a client's, over SPDY or WebSocket, and how it ended.

use std::time::Duration;

use minke_runtime::{Session, TerminalSize};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio_util::sync::CancellationToken;

use super::spdy::session::Stream;
use super::websocket::Channels;

/// How long a client may take to open all its streams.
const OPEN_WITHIN: Duration = Duration::from_secs(30);
/// Longest message with a terminal's size.
const RESIZE_MAX: u64 = 1024;

/// Which streams a client asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// The versions of the protocol, by what differs between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    pub name: &'static str,
    /// The error stream carries a Status in JSON, as from version 4 on.
    pub json_status: bool,
    /// There is a stream for the size of the terminal, as from version 3 on.
    pub resize: bool,
}

const fn protocol(name: &'static str, json_status: bool, resize: bool) -> Protocol {
    Protocol { name, json_status, resize }
}

/// For SPDY, in the order in which the server prefers them.
pub const SPDY: &[Protocol] = &[
    protocol("v4.channel.k8s.io", true, true),
    protocol("v3.channel.k8s.io", false, true),
    protocol("v2.channel.k8s.io", false, false),
    protocol("channel.k8s.io", false, false),
];

/// For WebSocket.
pub const WEBSOCKET: &[Protocol] = &[
    protocol("v5.channel.k8s.io", true, true),
    protocol("v4.channel.k8s.io", true, true),
    protocol("v4.base64.channel.k8s.io", true, true),
    protocol("v3.channel.k8s.io", false, true),
    protocol("v2.channel.k8s.io", false, false),
    protocol("channel.k8s.io", false, false),
    protocol("base64.channel.k8s.io", false, false),
    protocol("", false, false),
];

type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A client's ends of the streams.
pub struct Client {
    pub stdin: Option<Reader>,
    pub stdout: Option<Writer>,
    pub stderr: Option<Writer>,
    pub error: Writer,
    pub resize: Option<Reader>,
    pub json_status: bool,
    /// Fires when the client is gone.
    pub closed: CancellationToken,
}

impl Client {
    /// Waits until a SPDY client has opened the streams it asked for.
    pub async fn from_spdy(
        incoming: &mut tokio::sync::mpsc::Receiver<Stream>,
        closed: CancellationToken,
        wanted: Wanted,
        protocol: Protocol,
    ) -> Option<Client> {
        let mut missing = 1 + u8::from(wanted.stdin) + u8::from(wanted.stdout) + u8::from(wanted.stderr);
        missing += u8::from(wanted.tty && protocol.resize);
        let (mut error, mut resize, mut stdin, mut stdout, mut stderr) = (None, None, None, None, None);
        let open = async {
            while missing > 0 {
                let Some(stream) = incoming.recv().await else { break };
                missing -= 1;
                let kind = stream.header("streamtype").unwrap_or_default().to_owned();
                let (reader, writer) = stream.split();
                match kind.as_str() {
                    "error" => error = Some(Box::new(writer) as Writer),
                    "stdin" => stdin = Some(Box::new(reader) as Reader),
                    "stdout" => stdout = Some(Box::new(writer) as Writer),
                    "stderr" => stderr = Some(Box::new(writer) as Writer),
                    "resize" => resize = Some(Box::new(reader) as Reader),
                    other => tracing::debug!(other, "Unexpected stream"),
                }
            }
        };
        tokio::time::timeout(OPEN_WITHIN, open).await.ok()?;
        let json_status = protocol.json_status;
        Some(Client { stdin, stdout, stderr, error: error?, resize, json_status, closed })
    }

    pub fn from_websocket(channels: &mut Channels, wanted: Wanted, protocol: Protocol) -> Client {
        let write = |channel, wanted: bool| wanted.then(|| Box::new(channels.writer(channel)) as Writer);
        let (stdout, stderr) = (write(1, wanted.stdout), write(2, wanted.stderr));
        let error = Box::new(channels.writer(3));
        let stdin = channels.reader(0).filter(|_| wanted.stdin).map(|reader| Box::new(reader) as Reader);
        let resize = channels.reader(4).filter(|_| wanted.tty).map(|reader| Box::new(reader) as Reader);
        let json_status = protocol.json_status;
        Client { stdin, stdout, stderr, error, resize, json_status, closed: channels.closed.clone() }
    }

    /// Tells how it ended and closes everything.
    async fn finish(mut self, end: End) {
        let text = end.text(self.json_status);
        let tell = async {
            if !text.is_empty() {
                self.error.write_all(text.as_bytes()).await?;
            }
            self.error.shutdown().await
        };
        if let Err(error) = tell.await {
            tracing::debug!(%error, "Client left before the end");
        }
    }

    pub async fn fail(self, why: String) {
        self.finish(End::Error(why)).await;
    }
}

/// How a command ended.
#[derive(Debug, PartialEq)]
enum End {
    Success,
    Exit { code: i32, command: String },
    Error(String),
}

impl End {
    fn text(&self, json_status: bool) -> String {
        let message = match self {
            End::Success if json_status => return json!({"metadata": {}, "status": "Success"}).to_string(),
            End::Success => return String::new(),
            End::Exit { code, command } => {
                format!("error executing command [{command}], exit code {code}")
            }
            End::Error(why) => why.clone(),
        };
        if !json_status {
            return message;
        }
        match self {
            End::Exit { code, .. } => json!({
                "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
                "message": format!("command terminated with non-zero exit code: {message}"),
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            _ => json!({
                "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500,
                "message": format!("Internal error occurred: {message}"),
                "details": {"causes": [{"message": message}]},
            }),
        }
        .to_string()
    }
}

/// Copies until the process has ended and all its output is out, or the client is gone; then a process
/// goes on by itself, as upstream's do. `command` is empty for attach, where the exit code means nothing.
pub async fn run(mut client: Client, mut session: Session, command: String) {
    let stdin = copy_in(client.stdin.take(), session.stdin.take());
    let resize = resize(client.resize.take(), session.resize.clone());
    let stdout = copy_out(session.stdout.take(), client.stdout.take());
    let stderr = copy_out(session.stderr.take(), client.stderr.take());
    let output = async { tokio::join!(stdout, stderr) };
    let end = async {
        let (_, exit) = tokio::join!(output, &mut session.exit);
        match exit {
            Ok(Ok(0)) => End::Success,
            Ok(Ok(_)) if command.is_empty() => End::Success,
            Ok(Ok(code)) => End::Exit { code, command: command.clone() },
            Ok(Err(error)) => End::Error(error.to_string()),
            // An attachment ends with its streams.
            Err(_) if command.is_empty() => End::Success,
            Err(_) => End::Error("the container runtime lost the process".to_owned()),
        }
    };
    let input = async {
        tokio::join!(stdin, resize);
        std::future::pending::<()>().await
    };
    let closed = client.closed.clone();
    let end = tokio::select! {
        end = end => end,
        () = input => unreachable!("it waits for ever"),
        () = closed.cancelled() => return,
    };
    client.finish(end).await;
}

async fn copy_in(from: Option<Reader>, to: Option<Writer>) {
    let Some(mut to) = to else { return };
    if let Some(mut from) = from {
        // An error means that either end is gone, and the other end is told by closing it.
        let _ = tokio::io::copy(&mut from, &mut to).await;
    }
    let _ = to.shutdown().await;
}

async fn copy_out(from: Option<Reader>, to: Option<Writer>) {
    let Some(mut to) = to else { return };
    if let Some(mut from) = from {
        let _ = tokio::io::copy(&mut from, &mut to).await;
    }
    let _ = to.shutdown().await;
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Sizes come as JSON objects, one after the other, with or without newlines between them.
async fn resize(from: Option<Reader>, to: tokio::sync::mpsc::Sender<TerminalSize>) {
    use tokio::io::AsyncReadExt;
    let Some(from) = from else { return };
    let mut from = BufReader::new(from);
    let mut text = vec![];
    loop {
        text.clear();
        let read = (&mut from).take(RESIZE_MAX).read_until(b'}', &mut text).await;
        if !matches!(read, Ok(n) if n > 0) {
            return;
        }
        if let Ok(size) = serde_json::from_slice::<Size>(&text)
            && to.send(TerminalSize { width: size.width, height: size.height }).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn ends_are_told_as_each_version_wants() {
        let exit = End::Exit { code: 3, command: "sh".into() };
        let status: Value = serde_json::from_str(&exit.text(true)).expect("JSON");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
        assert_eq!(exit.text(false), "error executing command [sh], exit code 3");
        assert_eq!(End::Success.text(false), "");
        let status: Value = serde_json::from_str(&End::Success.text(true)).expect("JSON");
        assert_eq!(status["status"], "Success");
        let status: Value = serde_json::from_str(&End::Error("x".into()).text(true)).expect("JSON");
        assert_eq!(status["message"], "Internal error occurred: x");
    }

    #[tokio::test]
    async fn sizes_are_read_one_by_one() {
        let (sender, mut sizes) = tokio::sync::mpsc::channel(8);
        let text = b"{\"Width\":80,\"Height\":24}{\"Width\":1}\n{\"Width\":100,\"Height\":30}\n";
        resize(Some(Box::new(&text[..])), sender).await;
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(sizes.recv().await, Some(TerminalSize { width: 100, height: 30 }));
        assert_eq!(sizes.recv().await, None);
    }
}
