//! Byte streams over message queues: what SPDY streams and WebSocket channels look like to those who
//! copy bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

/// Most bytes of one outgoing message.
pub const CHUNK: usize = 32 << 10;
/// Incoming messages that wait for their reader. When they are this many, nothing more is read from the
/// connection; with messages of at most [`CHUNK`] that is 2 MiB for a stream.
pub const WAITING: usize = 64;

/// Bytes that arrive as messages; ends when the sender is dropped.
pub struct ChunkReader {
    queue: mpsc::Receiver<Bytes>,
    rest: Bytes,
}

impl ChunkReader {
    pub fn new(queue: mpsc::Receiver<Bytes>) -> ChunkReader {
        ChunkReader { queue, rest: Bytes::new() }
    }
}

impl AsyncRead for ChunkReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.queue.poll_recv(cx)) {
                Some(bytes) => self.rest = bytes,
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..n]);
        self.rest.advance(n);
        Poll::Ready(Ok(()))
    }
}

/// How bytes of a stream become a message.
type Wrap<T> = Box<dyn Fn(&[u8]) -> T + Send>;

/// Bytes that leave as messages. Shutting it down sends what says that there are no more.
pub struct ChunkWriter<T: Send + 'static> {
    queue: PollSender<T>,
    wrap: Wrap<T>,
    last: Option<T>,
}

impl<T: Send + Unpin + 'static> ChunkWriter<T> {
    pub fn new(queue: mpsc::Sender<T>, wrap: impl Fn(&[u8]) -> T + Send + 'static, last: Option<T>) -> Self {
        ChunkWriter { queue: PollSender::new(queue), wrap: Box::new(wrap), last }
    }
}

fn closed<E>(_: E) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl<T: Send + Unpin + 'static> AsyncWrite for ChunkWriter<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.queue.poll_reserve(cx)).map_err(closed)?;
        let n = bytes.len().min(CHUNK);
        let message = (self.wrap)(&bytes[..n]);
        self.queue.send_item(message).map_err(closed)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.last.is_some() {
            ready!(self.queue.poll_reserve(cx)).map_err(closed)?;
            if let Some(last) = self.last.take() {
                self.queue.send_item(last).map_err(closed)?;
            }
        }
        self.queue.close();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in() {
        let (sender, queue) = mpsc::channel(4);
        let mut writer = ChunkWriter::new(sender, Bytes::copy_from_slice, Some(Bytes::from_static(b"!")));
        let mut reader = ChunkReader::new(queue);
        let data = vec![7; CHUNK + 5];
        let sent = data.clone();
        tokio::spawn(async move {
            writer.write_all(&sent).await.expect("written");
            writer.shutdown().await.expect("shut down");
        });
        let mut got = vec![];
        reader.read_to_end(&mut got).await.expect("read");
        assert_eq!((got.len(), got.pop()), (CHUNK + 6, Some(b'!')));
        assert_eq!(got, data);
    }
}
