//! Logs and watches as WebSocket messages, for those who cannot read an answer while it comes: browsers.
//!
//! A watch is a message of text for each event. A log is messages of bytes, or of base64 for who asks for
//! `base64.binary.k8s.io`, after an empty one. Upstream: apiserver pkg/endpoints/handlers/watch.go,
//! apimachinery pkg/util/httpstream/wsstream.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use minke_api::Status;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use super::body::{Body, BoxError, Payload};

/// Clients have nothing to say: bytes of the largest message that is read from them.
const MESSAGE_MAX: usize = 4096;
/// How long a client that was told everything may take to close.
const LINGER: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    Events,
    Bytes,
    Base64,
}

impl Spelling {
    fn messages(self, chunk: &Bytes) -> Vec<Message> {
        match self {
            // Events come whole, each with the end of its line.
            Spelling::Events => chunk
                .split_inclusive(|byte| *byte == b'\n')
                .map(|event| Message::text(String::from_utf8_lossy(event).as_ref()))
                .collect(),
            Spelling::Bytes => vec![Message::binary(chunk.clone())],
            Spelling::Base64 => vec![Message::text(STANDARD.encode(chunk))],
        }
    }
}

/// A connection that is to become a WebSocket once there is something to answer.
pub struct Asked {
    upgrade: OnUpgrade,
    key: HeaderValue,
    protocol: Option<HeaderValue>,
    spelling: Spelling,
}

impl Asked {
    /// What `request`, for a watch or a log, asks its connection to become; nothing of that stays in it.
    pub fn of(request: &mut Request<Payload>, is_watch: bool) -> Result<Option<Asked>, Status> {
        let headers = request.headers();
        if !has_word(headers, header::CONNECTION, "upgrade")
            || !has_word(headers, header::UPGRADE, "websocket")
        {
            return Ok(None);
        }
        if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return Err(Status::bad_request("missing or bad WebSocket version"));
        }
        let key = headers.get(header::SEC_WEBSOCKET_KEY).cloned();
        let key = key.ok_or_else(|| Status::bad_request("missing Sec-WebSocket-Key"))?;
        let (protocol, spelling) = if is_watch { (None, Spelling::Events) } else { log_protocol(headers)? };
        let headers = request.headers_mut();
        for name in [header::CONNECTION, header::UPGRADE, header::SEC_WEBSOCKET_KEY] {
            headers.remove(name);
        }
        Ok(Some(Asked { upgrade: hyper::upgrade::on(request), key, protocol, spelling }))
    }

    /// The answer that switches protocols and is followed by the body of `answer`; one that is no success stays.
    pub fn answer(self, answer: Response<Body>) -> Response<Body> {
        if answer.status() != StatusCode::OK {
            return answer;
        }
        let mut switch = Response::new(Body::empty());
        *switch.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = switch.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        let accept = derive_accept_key(self.key.as_bytes());
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept.parse().expect("base64 is a header value"));
        if let Some(protocol) = self.protocol {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        let (upgrade, spelling) = (self.upgrade, self.spelling);
        tokio::spawn(async move {
            let sent = async { send(TokioIo::new(upgrade.await?), answer.into_body(), spelling).await };
            if let Err(error) = sent.await {
                tracing::debug!(error, "A WebSocket ended");
            }
        });
        switch
    }
}

fn has_word(headers: &HeaderMap, name: header::HeaderName, word: &str) -> bool {
    words(headers, name).any(|has| has.eq_ignore_ascii_case(word))
}

fn words(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|word| !word.is_empty())
}

/// The first protocol offered that is known; without an offer, bytes.
fn log_protocol(headers: &HeaderMap) -> Result<(Option<HeaderValue>, Spelling), Status> {
    const KNOWN: [(&str, Spelling); 2] =
        [("binary.k8s.io", Spelling::Bytes), ("base64.binary.k8s.io", Spelling::Base64)];
    let offered: Vec<&str> = words(headers, header::SEC_WEBSOCKET_PROTOCOL).collect();
    if offered.is_empty() {
        return Ok((None, Spelling::Bytes));
    }
    let known = offered.iter().find_map(|name| KNOWN.iter().find(|(known, _)| known == name));
    match known {
        Some((name, spelling)) => Ok((Some(HeaderValue::from_static(name)), *spelling)),
        None => Err(Status::failure(
            403,
            "Forbidden",
            format!(
                "requested protocol(s) are not supported: [{}]; supports [ {} {}]",
                offered.join(" "),
                KNOWN[0].0,
                KNOWN[1].0
            ),
        )),
    }
}

/// Sends `body` message by message, until it ends or the client goes.
async fn send<S>(io: S, mut body: Body, spelling: Spelling) -> Result<(), BoxError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config =
        WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
    let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    match spelling {
        Spelling::Events => {}
        Spelling::Bytes => socket.send(Message::binary(Bytes::new())).await?,
        Spelling::Base64 => socket.send(Message::text("")).await?,
    }
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            heard = socket.next() => match heard {
                Some(Ok(_)) => continue,
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
        };
        let Some(frame) = frame else { break };
        let Ok(chunk) = frame?.into_data() else { continue };
        for message in spelling.messages(&chunk) {
            socket.feed(message).await?;
        }
        socket.flush().await?;
    }
    // Clients take any other end for a failure.
    let good_bye = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    socket.send(Message::Close(Some(good_bye))).await?;
    let drained = async { while let Some(Ok(_)) = socket.next().await {} };
    let _ = tokio::time::timeout(LINGER, drained).await;
    Ok(socket.get_mut().shutdown().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(offered: &[&'static str], want: Result<(Option<&str>, Spelling), &str>) {
        let mut headers = HeaderMap::new();
        for value in offered {
            headers.append(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value));
        }
        let got = log_protocol(&headers);
        let got = got
            .as_ref()
            .map(|(name, spelling)| (name.as_ref().map(|name| name.to_str().unwrap()), *spelling));
        assert_eq!(got.map_err(|status| status.message.as_str()), want);
    }

    #[test]
    fn the_first_protocol_that_is_known_is_spoken() {
        check(&[], Ok((None, Spelling::Bytes)));
        check(&["binary.k8s.io"], Ok((Some("binary.k8s.io"), Spelling::Bytes)));
        check(
            &["x, base64.binary.k8s.io", "binary.k8s.io"],
            Ok((Some("base64.binary.k8s.io"), Spelling::Base64)),
        );
        check(
            &["v4.channel.k8s.io"],
            Err(
                "requested protocol(s) are not supported: [v4.channel.k8s.io]; supports [ binary.k8s.io base64.binary.k8s.io]",
            ),
        );
    }
}
