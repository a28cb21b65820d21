//! The server's side of a SPDY/3.1 connection.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Control, HEAD, Head};
use super::headers::{Headers, Packer, Unpacker};
use crate::server::streams::{CHUNK, ChunkReader, ChunkWriter, WAITING};

/// Streams that may be open at once on one connection.
const STREAMS_MAX: usize = 4096;
/// Streams that wait to be accepted.
const BACKLOG: usize = 64;
/// Frames that wait to be written.
const OUTBOUND: usize = 64;
/// After this much was read of a stream, its sender is told that it may send as much again.
const WINDOW_STEP: u32 = 32 << 10;
/// How long a peer that was told everything may take to close.
const LINGER: Duration = Duration::from_secs(5);
const REFUSED_STREAM: u32 = 3;
const PROTOCOL_ERROR: u32 = 1;

/// A connection. Dropping it, once all its streams are dropped too, sends what is left and closes.
pub struct Session {
    pub incoming: mpsc::Receiver<Stream>,
    /// Fires when the peer is gone.
    pub closed: CancellationToken,
    /// Keeps the writer going.
    _writer: mpsc::Sender<Vec<u8>>,
}

/// A stream that the peer opened.
pub struct Stream {
    pub headers: Headers,
    pub reader: ChunkReader,
    pub writer: ChunkWriter<Vec<u8>>,
}

impl Stream {
    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn split(self) -> (ChunkReader, ChunkWriter<Vec<u8>>) {
        (self.reader, self.writer)
    }
}

/// Serves a connection on tasks of its own.
pub fn serve(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Session {
    let (read, write) = tokio::io::split(io);
    let (frames, outbound) = mpsc::channel(OUTBOUND);
    let (accept, incoming) = mpsc::channel(BACKLOG);
    let closed = CancellationToken::new();
    let written = CancellationToken::new();
    tokio::spawn(write_frames(write, outbound, written.clone()));
    let reader = Reader {
        io: BufReader::with_capacity(2 * CHUNK, read),
        frames: frames.downgrade(),
        accept,
        streams: HashMap::new(),
        unpacker: Unpacker::default(),
        packer: Packer::default(),
        read: 0,
    };
    let gone = closed.clone();
    tokio::spawn(async move {
        let _gone = gone.drop_guard();
        let mut reader = reader;
        tokio::select! {
            result = reader.run() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "SPDY connection ended");
                }
                return;
            }
            () = written.cancelled() => {}
        }
        // All is said. Closing with bytes unread would make the kernel throw away what is on its way.
        let drain = async { while matches!(reader.io.read(&mut [0; 4096]).await, Ok(n) if n > 0) {} };
        let _ = tokio::time::timeout(LINGER, drain).await;
    });
    Session { incoming, closed, _writer: frames }
}

async fn write_frames(
    mut io: impl AsyncWrite + Unpin,
    mut outbound: mpsc::Receiver<Vec<u8>>,
    written: CancellationToken,
) {
    let _written = written.drop_guard();
    while let Some(frame) = outbound.recv().await {
        if io.write_all(&frame).await.is_err() {
            return;
        }
        // Frames that wait already go out together.
        if outbound.is_empty() && io.flush().await.is_err() {
            return;
        }
    }
    let _ = io.write_all(&Control::GoAway { last: 0, status: 0 }.encode()).await;
    let _ = io.flush().await;
    let _ = io.shutdown().await;
}

struct Reader<R> {
    io: BufReader<R>,
    /// Weak, so that the writer ends when everyone who writes has gone.
    frames: mpsc::WeakSender<Vec<u8>>,
    accept: mpsc::Sender<Stream>,
    streams: HashMap<u32, Open>,
    unpacker: Unpacker,
    packer: Packer,
    /// Bytes read of the whole connection that were not acknowledged yet.
    read: u32,
}

struct Open {
    /// `None` once the peer has closed its half.
    queue: Option<mpsc::Sender<Bytes>>,
    read: u32,
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(&mut self) -> io::Result<()> {
        loop {
            let mut head = [0; HEAD];
            match self.io.read_exact(&mut head).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            };
            match Head::decode(head).map_err(invalid)? {
                Head::Data { stream, fin, length } => self.data(stream, fin, length).await?,
                Head::Control { kind, flags, length } => {
                    let mut body = vec![0; length];
                    self.io.read_exact(&mut body).await?;
                    let control = Control::decode(kind, flags, &body).map_err(invalid)?;
                    self.control(control).await?;
                }
            }
        }
    }

    /// A frame may be large: it is passed on in pieces, and never held whole.
    async fn data(&mut self, id: u32, fin: bool, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            let mut piece = BytesMut::zeroed(left.min(CHUNK));
            self.io.read_exact(&mut piece).await?;
            left -= piece.len();
            let size = piece.len() as u32;
            if let Some(queue) = self.streams.get(&id).and_then(|open| open.queue.clone()) {
                // Whoever no longer reads does not stop the others.
                let _ = queue.send(piece.freeze()).await;
            }
            self.acknowledge(id, size).await;
        }
        if fin && let Some(open) = self.streams.get_mut(&id) {
            open.queue = None;
        }
        self.forget_dropped();
        Ok(())
    }

    async fn acknowledge(&mut self, id: u32, size: u32) {
        self.read += size;
        let mut updates = vec![];
        if self.read >= WINDOW_STEP {
            updates.push(Control::WindowUpdate { stream: 0, delta: std::mem::take(&mut self.read) });
        }
        if let Some(open) = self.streams.get_mut(&id) {
            open.read += size;
            if open.read >= WINDOW_STEP {
                updates.push(Control::WindowUpdate { stream: id, delta: std::mem::take(&mut open.read) });
            }
        }
        for update in updates {
            self.send(update).await;
        }
    }

    async fn send(&mut self, control: Control) {
        if let Some(frames) = self.frames.upgrade() {
            let _ = frames.send(control.encode()).await;
        }
    }

    fn forget_dropped(&mut self) {
        if self.streams.len() > STREAMS_MAX / 2 {
            // Nothing can arrive any more for those that are closed or that nobody reads.
            self.streams.retain(|_, open| open.queue.as_ref().is_some_and(|queue| !queue.is_closed()));
        }
    }

    async fn control(&mut self, control: Control) -> io::Result<()> {
        match control {
            Control::SynStream { stream, fin, block } => {
                let headers = self.unpacker.unpack(&block).map_err(invalid)?;
                self.open(stream, fin, headers).await;
            }
            // Blocks share one zlib stream, so each must be unpacked, also of frames that mean nothing here.
            Control::SynReply { block, .. } => drop(self.unpacker.unpack(&block).map_err(invalid)?),
            Control::Headers { stream, fin, block } => {
                self.unpacker.unpack(&block).map_err(invalid)?;
                if fin && let Some(open) = self.streams.get_mut(&stream) {
                    open.queue = None;
                }
            }
            Control::RstStream { stream, .. } => drop(self.streams.remove(&stream)),
            // Ours would be even; those of the peer are odd and come back as they are.
            Control::Ping(id) if id % 2 == 1 => self.send(Control::Ping(id)).await,
            Control::GoAway { .. }
            | Control::Ping(_)
            | Control::Settings(_)
            | Control::WindowUpdate { .. }
            | Control::Unknown(_) => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) {
        if self.streams.contains_key(&id) || id == 0 {
            return self.send(Control::RstStream { stream: id, status: PROTOCOL_ERROR }).await;
        }
        self.forget_dropped();
        let Some(frames) = self.frames.upgrade().filter(|_| self.streams.len() < STREAMS_MAX) else {
            return self.send(Control::RstStream { stream: id, status: REFUSED_STREAM }).await;
        };
        let (queue, chunks) = mpsc::channel(WAITING);
        let stream = Stream {
            headers,
            reader: ChunkReader::new(chunks),
            writer: ChunkWriter::new(
                frames,
                move |bytes| frame::data(id, false, bytes),
                Some(frame::data(id, true, &[])),
            ),
        };
        let block = self.packer.pack(&vec![]);
        self.send(Control::SynReply { stream: id, fin: false, block }).await;
        self.streams.insert(id, Open { queue: (!fin).then_some(queue), read: 0 });
        // Nobody accepts any more: the session is on its way out.
        let _ = self.accept.send(stream).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client's side, made of the same codec.
    struct Peer<S> {
        io: S,
        packer: Packer,
        unpacker: Unpacker,
    }

    impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
        async fn open(&mut self, stream: u32, name: &str) {
            let block = self.packer.pack(&vec![("streamtype".into(), name.into())]);
            self.send(&Control::SynStream { stream, fin: false, block }.encode()).await;
        }

        async fn send(&mut self, frame: &[u8]) {
            self.io.write_all(frame).await.expect("sent");
        }

        async fn next(&mut self) -> (Head, Vec<u8>) {
            let mut head = [0; HEAD];
            self.io.read_exact(&mut head).await.expect("a head");
            let head = Head::decode(head).expect("a good head");
            let (Head::Control { length, .. } | Head::Data { length, .. }) = head;
            let mut body = vec![0; length];
            self.io.read_exact(&mut body).await.expect("a body");
            (head, body)
        }

        async fn next_control(&mut self) -> Control {
            let (head, body) = self.next().await;
            let Head::Control { kind, flags, .. } = head else { panic!("{head:?}") };
            let control = Control::decode(kind, flags, &body).expect("a control frame");
            if let Control::SynReply { block, .. } = &control {
                self.unpacker.unpack(block).expect("a block");
            }
            control
        }
    }

    fn pair() -> (Session, Peer<tokio::io::DuplexStream>) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        (serve(ours), Peer { io: theirs, packer: Packer::default(), unpacker: Unpacker::default() })
    }

    #[tokio::test]
    async fn streams_carry_bytes_both_ways_and_half_close() {
        let (mut session, mut peer) = pair();
        peer.open(1, "stdin").await;
        assert!(matches!(peer.next_control().await, Control::SynReply { stream: 1, fin: false, .. }));
        peer.send(&frame::data(1, false, b"hello")).await;
        peer.send(&frame::data(1, true, b" you")).await;
        let stream = session.incoming.recv().await.expect("a stream");
        assert_eq!(stream.header("streamType"), Some("stdin"));
        let (mut reader, mut writer) = stream.split();
        let mut text = String::new();
        reader.read_to_string(&mut text).await.expect("read to its end");
        assert_eq!(text, "hello you");
        writer.write_all(b"back").await.expect("written");
        writer.shutdown().await.expect("closed");
        assert_eq!(peer.next().await, (Head::Data { stream: 1, fin: false, length: 4 }, b"back".to_vec()));
        assert_eq!(peer.next().await.0, Head::Data { stream: 1, fin: true, length: 0 });
        drop((session, writer));
        assert_eq!(peer.next_control().await, Control::GoAway { last: 0, status: 0 });
    }

    #[tokio::test]
    async fn pings_come_back_and_reading_is_acknowledged() {
        let (mut session, mut peer) = pair();
        peer.send(&Control::Ping(7).encode()).await;
        assert_eq!(peer.next_control().await, Control::Ping(7));
        peer.open(1, "stdin").await;
        peer.next_control().await;
        let _stream = session.incoming.recv().await.expect("a stream");
        peer.send(&frame::data(1, false, &vec![1; CHUNK])).await;
        let delta = WINDOW_STEP;
        assert_eq!(peer.next_control().await, Control::WindowUpdate { stream: 0, delta });
        assert_eq!(peer.next_control().await, Control::WindowUpdate { stream: 1, delta });
    }

    #[tokio::test]
    async fn nonsense_ends_the_connection() {
        let (session, mut peer) = pair();
        peer.send(b"GET / HTTP/1.1\r\n\r\n").await;
        peer.io.shutdown().await.expect("closed");
        session.closed.cancelled().await;
    }

    #[tokio::test]
    async fn a_stream_id_is_used_once() {
        let (_session, mut peer) = pair();
        peer.open(1, "a").await;
        peer.next_control().await;
        peer.open(1, "b").await;
        assert_eq!(peer.next_control().await, Control::RstStream { stream: 1, status: PROTOCOL_ERROR });
    }
}
