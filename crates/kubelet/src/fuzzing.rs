//! What of this crate reads bytes of clients and containers, as `crates/fuzzing` feeds it: each panics when
//! something is wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1 as core;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

use crate::server::follow::{Filter, Options};
use crate::server::routes::Query;
use crate::server::spdy::frame::{Control, FrameError, decode_any};
use crate::server::spdy::headers::{Packer, Unpacker, parse};
use crate::server::spdy::session;
use crate::server::websocket::{Channels, Incoming, Spelling};

/// Longest that a connection which the peer has closed may go on.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

fn block_on(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let work =
        async { tokio::time::timeout(ENDS_WITHIN, work).await.expect("it ends when the peer is gone") };
    runtime.expect("a runtime can be made").block_on(work);
}

/// A SPDY frame; a header block, packed and plain.
pub fn spdy_frame(data: &[u8]) {
    if let Some(Ok(control)) = decode_any(data) {
        // What is kept of a frame is the same when it is written and read again.
        let again: Option<Result<Control, FrameError>> = decode_any(&control.encode());
        assert_eq!(format!("{again:?}"), format!("{:?}", Some(Ok::<_, FrameError>(control))));
    }
    let _ = Unpacker::default().unpack(data);
    if let Ok(headers) = parse(data) {
        let packed = Packer::default().pack(&headers);
        assert_eq!(Unpacker::default().unpack(&packed).ok(), Some(headers));
    }
}

/// All that a SPDY client sends, until it hangs up.
pub fn spdy_session(data: &[u8]) {
    block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let mut session = session::serve(ours);
        let data = data.to_vec();
        let send = async move {
            let _ = theirs.write_all(&data).await;
            let _ = theirs.shutdown().await;
            let _ = theirs.read_to_end(&mut Vec::new()).await;
        };
        let receive = async {
            while let Some(stream) = session.incoming.recv().await {
                let _ = stream.header("streamType");
                let (mut reader, _writer) = stream.split();
                tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
            }
            session.closed.cancelled().await;
            drop(session);
        };
        tokio::join!(send, receive);
    });
}

/// Messages of WebSocket channels, and all that a client sends until it hangs up.
pub fn websocket(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let spelling = Spelling { base64: kind & 1 != 0, closes: kind & 2 != 0 };
    let message = match std::str::from_utf8(data) {
        Ok(text) if kind & 4 != 0 => Message::text(text),
        _ => Message::binary(data.to_vec()),
    };
    if let Some(Incoming::Bytes(channel, bytes)) = spelling.decode(message)
        && channel < 10
    {
        let again = spelling.decode(spelling.encode(channel, &bytes));
        assert_eq!(again, Some(Incoming::Bytes(channel, bytes)));
    }
    block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let mut channels = Channels::serve(ours, spelling, 5).await;
        let data = data.to_vec();
        let send = async move {
            let _ = theirs.write_all(&data).await;
            let _ = theirs.shutdown().await;
            let _ = theirs.read_to_end(&mut Vec::new()).await;
        };
        let receive = async move {
            for mut reader in (0..5).filter_map(|n| channels.reader(n)).collect::<Vec<_>>() {
                tokio::spawn(async move { reader.read_to_end(&mut Vec::new()).await });
            }
            channels.closed.cancelled().await;
            drop(channels);
        };
        tokio::join!(send, receive);
    });
}

/// A container's log file: what a client gets of it.
pub fn log_file(data: &[u8]) {
    let Some((choice, log)) = data.split_first() else { return };
    let all = Filter::of(log, Options::default());
    assert!(all.len() <= log.len(), "more comes out than went in");
    let stamped = Filter::of(log, Options { timestamps: true, ..Options::default() });
    assert!(stamped.len() >= all.len());
    let limit = u64::from(*choice);
    let limited = Filter::of(log, Options { limit: Some(limit), ..Options::default() });
    assert!(all.starts_with(&limited) && limited.len() as u64 <= limit.max(1));
    let tail = Filter::of(log, Options { tail: Some(limit), ..Options::default() });
    assert!(all.ends_with(&tail));
    let since = "2026-01-01T00:00:00Z".parse().ok();
    assert!(all.ends_with(&Filter::of(log, Options { since, ..Options::default() })));
}

/// The query of a port-forward, and a secret with logins for registries.
pub fn pull_secret(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Query::ports(text);
    }
    for (kind, key) in
        [("kubernetes.io/dockerconfigjson", ".dockerconfigjson"), ("kubernetes.io/dockercfg", ".dockercfg")]
    {
        let secret = core::Secret {
            type_: Some(kind.to_owned()),
            data: Some(BTreeMap::from([(key.to_owned(), ByteString(data.to_vec()))])),
            ..core::Secret::default()
        };
        let ways = crate::images::credentials("registry.example:5000/a/b:1", [Arc::new(secret)].into_iter());
        assert!(!ways.is_empty(), "there is always a way to ask");
    }
}
