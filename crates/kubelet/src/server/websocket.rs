//! WebSocket connections as byte streams: numbered channels (exec, attach, old port-forward), or one
//! tunnel for SPDY.
//!
//! A message of a channel is its number and its bytes. In version 5, `[255, n]` closes channel n, which
//! is how a client ends stdin. In the `base64.` variants the number is a digit and the bytes are base64.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::CancellationToken;

use crate::server::streams::{ChunkReader, ChunkWriter, WAITING};

/// Largest message and frame that is read.
const MESSAGE_MAX: usize = 1 << 20;
const OUTBOUND: usize = 64;
/// How long a peer that was told everything may take to close.
const LINGER: Duration = Duration::from_secs(5);
/// Number of the message that closes a channel.
const CLOSE: u8 = 255;

/// How channels are spelled on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spelling {
    pub base64: bool,
    /// Channels can be closed one by one.
    pub closes: bool,
}

impl Spelling {
    pub(crate) fn encode(self, channel: u8, bytes: &[u8]) -> Message {
        if self.base64 {
            let digit = char::from(b'0' + channel % 10);
            return Message::text(format!("{digit}{}", STANDARD.encode(bytes)));
        }
        let mut data = Vec::with_capacity(bytes.len() + 1);
        data.push(channel);
        data.extend_from_slice(bytes);
        Message::binary(data)
    }

    pub(crate) fn decode(self, message: Message) -> Option<Incoming> {
        let data: Bytes = match message {
            Message::Binary(data) => data,
            Message::Text(text) => Bytes::copy_from_slice(text.as_bytes()),
            Message::Close(_) => return Some(Incoming::End),
            _ => return None,
        };
        let channel = *data.first()?;
        if self.base64 {
            let bytes = STANDARD.decode(&data[1..]).ok()?;
            return Some(Incoming::Bytes(channel.checked_sub(b'0')?, bytes.into()));
        }
        if self.closes && channel == CLOSE {
            return Some(Incoming::Closed(*data.get(1)?));
        }
        Some(Incoming::Bytes(channel, data.slice(1..)))
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    Bytes(u8, Bytes),
    Closed(u8),
    End,
}

fn accept<S: AsyncRead + AsyncWrite + Unpin>(io: S) -> impl Future<Output = WebSocketStream<S>> {
    let config =
        WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config))
}

/// Clients take any other end for a failure.
fn good_bye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// A connection of numbered channels.
pub struct Channels {
    spelling: Spelling,
    queues: Vec<Option<ChunkReader>>,
    out: mpsc::Sender<Message>,
    /// Fires when the peer is gone.
    pub closed: CancellationToken,
}

impl Channels {
    /// Serves `io` on tasks of its own. Channels below `count` can be read.
    pub async fn serve<S>(io: S, spelling: Spelling, count: u8) -> Channels
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sink, source) = accept(io).await.split();
        let (out, outbound) = mpsc::channel(OUTBOUND);
        let (mut senders, mut queues) = (vec![], vec![]);
        for _ in 0..count {
            let (sender, queue) = mpsc::channel(WAITING);
            senders.push(Some(sender));
            queues.push(Some(ChunkReader::new(queue)));
        }
        let (closed, written) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(write(sink, outbound, written.clone()));
        tokio::spawn(read(source, spelling, senders, closed.clone(), written));
        Channels { spelling, queues, out, closed }
    }

    /// What arrives on a channel; can be had once.
    pub fn reader(&mut self, channel: u8) -> Option<ChunkReader> {
        self.queues.get_mut(usize::from(channel))?.take()
    }

    pub fn writer(&self, channel: u8) -> ChunkWriter<Message> {
        let spelling = self.spelling;
        ChunkWriter::new(self.out.clone(), move |bytes| spelling.encode(channel, bytes), None)
    }
}

async fn write(
    mut sink: impl Sink<Message, Error = Error> + Unpin,
    mut outbound: mpsc::Receiver<Message>,
    written: CancellationToken,
) {
    let _written = written.drop_guard();
    while let Some(message) = outbound.recv().await {
        if sink.feed(message).await.is_err() {
            return;
        }
        if outbound.is_empty() && sink.flush().await.is_err() {
            return;
        }
    }
    let _ = sink.send(good_bye()).await;
}

async fn read(
    mut source: impl Stream<Item = Result<Message, Error>> + Unpin,
    spelling: Spelling,
    mut queues: Vec<Option<mpsc::Sender<Bytes>>>,
    closed: CancellationToken,
    written: CancellationToken,
) {
    let _closed = closed.drop_guard();
    loop {
        let message = tokio::select! {
            message = source.next() => message,
            () = written.cancelled() => {
                let drain = async { while let Some(Ok(_)) = source.next().await {} };
                let _ = tokio::time::timeout(LINGER, drain).await;
                return;
            }
        };
        let Some(Ok(message)) = message else { return };
        match spelling.decode(message) {
            Some(Incoming::Bytes(channel, bytes)) => {
                let queue = queues.get(usize::from(channel)).cloned().flatten();
                if let Some(queue) = queue
                    && !bytes.is_empty()
                {
                    let _ = queue.send(bytes).await;
                }
            }
            Some(Incoming::Closed(channel)) => {
                if let Some(queue) = queues.get_mut(usize::from(channel)) {
                    *queue = None;
                }
            }
            Some(Incoming::End) => return,
            None => {}
        }
    }
}

/// One stream of bytes in binary messages, whose borders mean nothing.
pub struct Tunnel<S> {
    socket: WebSocketStream<S>,
    rest: Bytes,
    said_good_bye: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Tunnel<S> {
    pub async fn new(io: S) -> Tunnel<S> {
        Tunnel { socket: accept(io).await, rest: Bytes::new(), said_good_bye: false }
    }
}

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(Message::Binary(data))) => self.rest = data,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(cx)).map_err(broken)?;
        self.socket.start_send_unpin(Message::binary(bytes.to_vec())).map_err(broken)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(cx).map_err(broken)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.said_good_bye {
            ready!(self.socket.poll_ready_unpin(cx)).map_err(broken)?;
            self.said_good_bye = true;
            self.socket.start_send_unpin(good_bye()).map_err(broken)?;
        }
        self.socket.poll_flush_unpin(cx).map_err(broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const V5: Spelling = Spelling { base64: false, closes: true };
    const V4: Spelling = Spelling { base64: false, closes: false };
    const B64: Spelling = Spelling { base64: true, closes: false };

    #[track_caller]
    fn check(spelling: Spelling, message: Message, want: Option<Incoming>) {
        assert_eq!(spelling.decode(message), want);
    }

    #[test]
    fn messages_name_their_channel() {
        let bytes = |channel, text: &'static str| Some(Incoming::Bytes(channel, text.into()));
        check(V4, Message::binary(vec![0, b'a']), bytes(0, "a"));
        check(V4, Message::binary(vec![4]), bytes(4, ""));
        check(V4, Message::binary(vec![]), None);
        check(V4, Message::binary(vec![255, 0]), Some(Incoming::Bytes(255, Bytes::from_static(&[0]))));
        check(V5, Message::binary(vec![255, 0]), Some(Incoming::Closed(0)));
        check(V5, Message::binary(vec![255]), None);
        check(B64, Message::text("0aGk="), bytes(0, "hi"));
        check(B64, Message::text("0!"), None);
        check(B64, Message::text("#aGk="), None);
        assert_eq!(B64.encode(1, b"hi"), Message::text("1aGk="));
        assert_eq!(V5.encode(2, b"x"), Message::binary(vec![2, b'x']));
    }

    #[tokio::test]
    async fn a_closed_channel_ends_its_stream() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
        let mut channels = Channels::serve(ours, V5, 5).await;
        client.send(Message::binary(b"\0input".to_vec())).await.expect("sent");
        client.send(Message::binary(vec![255, 0])).await.expect("sent");
        let mut text = String::new();
        channels.reader(0).expect("stdin").read_to_string(&mut text).await.expect("read");
        assert_eq!(text, "input");
        channels.writer(1).write_all(b"out").await.expect("written");
        let got = client.next().await.expect("a message").expect("a good one");
        assert_eq!(got, Message::binary(b"\x01out".to_vec()));
        drop(channels);
        assert_eq!(client.next().await.expect("a message").expect("a good one"), good_bye());
    }
}
