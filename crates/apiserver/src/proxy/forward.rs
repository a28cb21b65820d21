//! Passing a request on: over TLS where it must be, as a stream of bytes once it is upgraded.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, BodyStream, Empty, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use minke_api::{Kind, Status};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::http::{Body, Payload};

/// How long the other server may take to be reached and to begin an answer.
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of a kubelet's error that are passed on.
const ERROR_MAX: usize = 2048;

/// Headers that are about one connection only.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// How the other server is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    None,
    /// TLS both ways, with the kubelets' CA and our client certificate.
    Kubelet,
    /// TLS with whatever certificate: pods and services have their own.
    Unverified,
}

/// Whom to ask for what.
#[derive(Debug, Clone)]
pub struct Target {
    pub host: String,
    pub port: u16,
    /// With its query.
    pub path: String,
    pub security: Security,
}

/// Asks other servers.
#[derive(Clone)]
pub struct Proxy {
    kubelets: TlsConnector,
    unverified: TlsConnector,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Proxy {
    pub fn new(client_cert: &str, client_key: &str, ca: &str) -> Result<Proxy, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let certificates = |pem: &str| -> Result<Vec<CertificateDer<'static>>, String> {
            CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|e| text(&e))
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca)? {
            roots.add(certificate).map_err(|e| text(&e))?;
        }
        let key = PrivateKeyDer::from_pem_slice(client_key.as_bytes()).map_err(|e| text(&e))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let kubelets = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| text(&e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(certificates(client_cert)?, key)
            .map_err(|e| text(&e))?;
        Ok(Proxy {
            kubelets: TlsConnector::from(Arc::new(kubelets)),
            unverified: TlsConnector::from(minke_client::trusting::config()),
        })
    }

    async fn dial(&self, target: &Target) -> std::io::Result<Box<dyn Stream>> {
        let connected = async {
            let stream = TcpStream::connect((target.host.as_str(), target.port)).await?;
            stream.set_nodelay(true)?;
            let connector = match target.security {
                Security::None => return Ok(Box::new(stream) as Box<dyn Stream>),
                Security::Kubelet => &self.kubelets,
                Security::Unverified => &self.unverified,
            };
            let name = match target.host.parse::<IpAddr>() {
                Ok(address) => ServerName::IpAddress(address.into()),
                Err(_) => ServerName::try_from(target.host.clone()).map_err(std::io::Error::other)?,
            };
            Ok(Box::new(connector.connect(name, stream).await?) as Box<dyn Stream>)
        };
        tokio::time::timeout(CONNECT, connected)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }

    /// Asks for a page of at most `most` bytes; the error says why there is none.
    pub async fn get(&self, target: &Target, most: usize) -> Result<Bytes, String> {
        let stream = self.dial(target).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        // Ends when it is dropped: whoever has stopped waiting leaves no connection behind.
        let mut driven = tokio::task::JoinSet::new();
        driven.spawn(connection);
        let request = Request::get(&target.path)
            .header(header::HOST, format!("{}:{}", target.host, target.port))
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let code = answer.status();
        let body =
            Limited::new(answer.into_body(), most).collect().await.map_err(|error| error.to_string())?;
        if code.is_success() { Ok(body.to_bytes()) } else { Err(format!("it answers {code}")) }
    }

    /// Sends the request to `target`, and returns its answer. Once both sides have agreed to speak another
    /// protocol, everything passes both ways as it is, until one of them or `stop` ends it.
    pub async fn forward(
        &self,
        target: Target,
        mut request: Request<Payload>,
        peer: SocketAddr,
        stop: &CancellationToken,
    ) -> Result<Response<Body>, Status> {
        let upgrade = is_upgrade(request.headers());
        let unreachable = |error: &dyn std::fmt::Display| match target.security {
            Security::Kubelet if upgrade => {
                Status::failure(500, "", format!("error dialing backend: {error}"))
            }
            _ => Status::unavailable(format!("error trying to reach service: {error}")),
        };
        let stream = self.dial(&target).await.map_err(|error| {
            let address = format!("{}:{}", target.host, target.port);
            match error.kind() {
                std::io::ErrorKind::ConnectionRefused => {
                    unreachable(&format_args!("dial tcp {address}: connect: connection refused"))
                }
                std::io::ErrorKind::TimedOut => unreachable(&format_args!("dial tcp {address}: i/o timeout")),
                _ => unreachable(&format_args!("dial tcp {address}: {error}")),
            }
        })?;
        let ours = upgrade.then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let mut outgoing = Request::builder().method(parts.method).uri(
            PathAndQuery::try_from(target.path.as_str())
                .map_err(|error| Status::bad_request(format!("the path cannot be passed on: {error}")))?
                .as_str(),
        );
        if let Some(headers) = outgoing.headers_mut() {
            *headers = outgoing_headers(parts.headers, &target, peer, upgrade);
        }
        // A request to switch protocols has no body of its own: what follows belongs to the new protocol.
        let body: Payload =
            if upgrade { Empty::new().map_err(|never| match never {}).boxed_unsync() } else { body };
        let outgoing = outgoing.body(body).map_err(Status::internal)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "A proxied connection ended");
            }
        });
        let mut answer = sender.send_request(outgoing).await.map_err(|error| unreachable(&error))?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(ours) = ours else {
                return Err(Status::failure(
                    502,
                    "",
                    "the other server switched protocols without being asked",
                ));
            };
            let theirs = hyper::upgrade::on(&mut answer);
            let stop = stop.clone();
            tokio::spawn(async move {
                let (Ok(ours), Ok(theirs)) = tokio::join!(ours, theirs) else { return };
                let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
                tokio::select! {
                    passed = tokio::io::copy_bidirectional(&mut ours, &mut theirs) => {
                        tracing::debug!(?passed, "An upgraded connection ended");
                    }
                    () = stop.cancelled() => {}
                }
            });
            return Ok(answer.map(|_| Body::empty()));
        }
        for name in &HOP_BY_HOP {
            answer.headers_mut().remove(name);
        }
        Ok(answer.map(|body| until(stop, body)))
    }
}

/// A body that ends when `stop` says so, unless it ends of itself: logs are followed for as long as one likes.
fn until(stop: &CancellationToken, body: Incoming) -> Body {
    if body.size_hint().exact().is_some() {
        return Body::Proxied(body);
    }
    let data = BodyStream::new(body).try_filter_map(async |frame| Ok(frame.into_data().ok()));
    Body::Stream(data.map_err(Into::into).take_until(stop.clone().cancelled_owned()).boxed())
}

pub fn is_upgrade(headers: &HeaderMap) -> bool {
    let asks = |value: &HeaderValue| {
        value
            .to_str()
            .is_ok_and(|text| text.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade")))
    };
    headers.contains_key(header::UPGRADE) && headers.get_all(header::CONNECTION).iter().any(asks)
}

fn outgoing_headers(mut headers: HeaderMap, target: &Target, peer: SocketAddr, upgrade: bool) -> HeaderMap {
    let protocol = headers.get(header::UPGRADE).cloned();
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    if let (true, Some(protocol)) = (upgrade, protocol) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, protocol);
        headers.remove(header::CONTENT_LENGTH);
    }
    // Credentials are for this server only.
    headers.remove(header::AUTHORIZATION);
    let host = match target.host.parse::<IpAddr>() {
        Ok(IpAddr::V6(address)) => format!("[{address}]:{}", target.port),
        _ => format!("{}:{}", target.host, target.port),
    };
    if let Ok(host) = HeaderValue::from_str(&host) {
        headers.insert(header::HOST, host);
    }
    if let Ok(address) = HeaderValue::from_str(&peer.ip().to_string()) {
        headers.append(HeaderName::from_static("x-forwarded-for"), address);
    }
    headers
}

/// `/x/proxy` becomes `/x/proxy/`.
pub fn redirect_to_slash(uri: &Uri) -> Response<Body> {
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
    if let Ok(to) = HeaderValue::from_str(&format!("{}/{query}", uri.path())) {
        response.headers_mut().insert(header::LOCATION, to);
    }
    response
}

/// Redirects of the proxied server lead to other paths of it, and so to paths below `prefix` of ours.
pub fn keep_below(mut response: Response<Body>, prefix: &str) -> Response<Body> {
    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let path = location.and_then(|location| location.starts_with('/').then(|| format!("{prefix}{location}")));
    if let Some(Ok(path)) = path.map(|path| HeaderValue::from_str(&path)) {
        response.headers_mut().insert(header::LOCATION, path);
    }
    response
}

/// A kubelet's answer to a request for logs: its errors are texts, ours are statuses.
pub async fn log_answer(response: Response<Body>, kind: &Kind, pod: &str) -> Result<Response<Body>, Status> {
    let code = response.status().as_u16();
    if response.status().is_success() {
        return Ok(response);
    }
    let body = Limited::new(response.into_body(), ERROR_MAX).collect().await;
    let text =
        body.map(|body| String::from_utf8_lossy(&body.to_bytes()).trim().to_owned()).unwrap_or_default();
    let about = format!("(get {} {pod})", kind.plural);
    let status = match code {
        400 => Status::bad_request(text),
        401 => Status::failure(
            401,
            "Unauthorized",
            format!("the server has asked for the client to provide credentials {about}"),
        ),
        403 => Status::failure(403, "Forbidden", text),
        404 => Status::failure(
            404,
            "NotFound",
            format!("the server could not find the requested resource {about}"),
        ),
        _ => Status::failure(
            code,
            "InternalError",
            format!("an error on the server ({text:?}) has prevented the request from succeeding {about}"),
        ),
    };
    Err(status.about(kind, pod))
}
