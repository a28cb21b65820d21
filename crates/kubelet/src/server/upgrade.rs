//! Turns a request into a stream connection: which protocol, and the answer that switches to it.

use http::{HeaderMap, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::routes::{self, Body};

const PROTOCOL_HEADER: &str = "X-Stream-Protocol-Version";

/// What a client wants the connection to become.
#[derive(Debug, PartialEq, Eq)]
pub enum Upgrade {
    Spdy { offered: Vec<String> },
    WebSocket { offered: Vec<String>, key: String },
}

/// Values of headers that may be repeated or hold lists.
fn list(headers: &HeaderMap, name: &str) -> Vec<String> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(|word| word.trim().to_owned())
        .filter(|word| !word.is_empty())
        .collect()
}

impl Upgrade {
    pub fn of(headers: &HeaderMap) -> Result<Upgrade, Response<Body>> {
        let bad = |text: &str| routes::text(StatusCode::BAD_REQUEST, text.to_owned());
        let asks = list(headers, "connection").iter().any(|word| word.eq_ignore_ascii_case("upgrade"));
        let to = list(headers, "upgrade");
        if asks && to.iter().any(|word| word.eq_ignore_ascii_case("SPDY/3.1")) {
            return Ok(Upgrade::Spdy { offered: list(headers, PROTOCOL_HEADER) });
        }
        if asks && to.iter().any(|word| word.eq_ignore_ascii_case("websocket")) {
            let version = headers.get("sec-websocket-version").and_then(|value| value.to_str().ok());
            if version != Some("13") {
                return Err(bad("unsupported WebSocket version"));
            }
            let key = headers.get("sec-websocket-key").and_then(|value| value.to_str().ok());
            let key = key.ok_or_else(|| bad("missing Sec-WebSocket-Key"))?.to_owned();
            return Ok(Upgrade::WebSocket { offered: list(headers, "sec-websocket-protocol"), key });
        }
        Err(bad("unable to upgrade: missing upgrade headers in request"))
    }

    /// Which of the protocols that the server knows, in its order of preference, is spoken. A client that
    /// names none speaks the one without a name, if the server knows that.
    pub fn choose<'a>(&self, known: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
        let (Upgrade::Spdy { offered } | Upgrade::WebSocket { offered, .. }) = self;
        let mut known = known;
        match offered.is_empty() {
            true => known.find(|name| name.is_empty()),
            false => known.find(|name| offered.iter().any(|offered| offered == name)),
        }
    }

    /// The answer that switches; `protocol` is the chosen one.
    pub fn accept(&self, protocol: &str) -> Response<Body> {
        let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
        let response = response.header(header::CONNECTION, "Upgrade");
        let response = match self {
            Upgrade::Spdy { .. } if protocol.is_empty() => response.header(header::UPGRADE, "SPDY/3.1"),
            Upgrade::Spdy { .. } => {
                response.header(header::UPGRADE, "SPDY/3.1").header(PROTOCOL_HEADER, protocol)
            }
            Upgrade::WebSocket { key, .. } => {
                let response = response.header(header::UPGRADE, "websocket");
                let response = response.header("Sec-WebSocket-Accept", derive_accept_key(key.as_bytes()));
                match protocol {
                    "" => response,
                    protocol => response.header("Sec-WebSocket-Protocol", protocol),
                }
            }
        };
        response.body(routes::empty()).expect("the headers are well formed")
    }

    /// The answer when nothing that is offered is known.
    pub fn refuse<'a>(&self, known: impl Iterator<Item = &'a str>) -> Response<Body> {
        let mut response = routes::text(
            StatusCode::FORBIDDEN,
            "unable to upgrade: unable to negotiate protocol: client and server have none in common"
                .to_owned(),
        );
        for name in known.filter(|name| !name.is_empty()) {
            if let Ok(value) = name.parse() {
                response.headers_mut().append("X-Accepted-Stream-Protocol-Versions", value);
            }
        }
        response
    }
}

/// Waits for the connection to be handed over.
pub async fn handed_over(upgrade: OnUpgrade) -> Option<hyper_util::rt::TokioIo<hyper::upgrade::Upgraded>> {
    match upgrade.await {
        Ok(io) => Some(hyper_util::rt::TokioIo::new(io)),
        Err(error) => {
            tracing::debug!(%error, "Connection was not upgraded");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, value.parse().expect("a value"));
        }
        map
    }

    #[track_caller]
    fn check(pairs: &[(&'static str, &str)], want: Option<Upgrade>, protocol: Option<&str>) {
        let got = Upgrade::of(&headers(pairs)).ok();
        assert_eq!(got, want);
        let known = ["v4.channel.k8s.io", "channel.k8s.io", ""];
        assert_eq!(got.and_then(|got| got.choose(known.into_iter())), protocol);
    }

    #[test]
    fn the_server_chooses_what_it_prefers() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        check(
            &[
                ("connection", "Upgrade"),
                ("upgrade", "SPDY/3.1"),
                ("x-stream-protocol-version", "v5.channel.k8s.io"),
                ("x-stream-protocol-version", "channel.k8s.io"),
                ("x-stream-protocol-version", "v4.channel.k8s.io"),
            ],
            Some(Upgrade::Spdy {
                offered: words(&["v5.channel.k8s.io", "channel.k8s.io", "v4.channel.k8s.io"]),
            }),
            Some("v4.channel.k8s.io"),
        );
        check(
            &[
                ("connection", "keep-alive, upgrade"),
                ("upgrade", "WebSocket"),
                ("sec-websocket-version", "13"),
                ("sec-websocket-key", "k"),
                ("sec-websocket-protocol", "channel.k8s.io, x"),
            ],
            Some(Upgrade::WebSocket { offered: words(&["channel.k8s.io", "x"]), key: "k".into() }),
            Some("channel.k8s.io"),
        );
        check(
            &[("connection", "upgrade"), ("upgrade", "SPDY/3.1"), ("x-stream-protocol-version", "v9")],
            Some(Upgrade::Spdy { offered: words(&["v9"]) }),
            None,
        );
        check(&[("connection", "upgrade"), ("upgrade", "h2c")], None, None);
        check(&[("upgrade", "SPDY/3.1")], None, None);
    }
}
