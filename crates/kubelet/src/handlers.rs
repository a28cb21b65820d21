//! What probes and lifecycle hooks do: run a command, get a page, open a connection, ask a gRPC service.
//! Results carry upstream's texts (pkg/probe), which end up in `Unhealthy` events.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use minke_runtime::{Error, Runtime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::env::go_quote;
use crate::pod::go_duration;

/// Most bytes of a page or of a command's output that are looked at.
const BODY_MAX: usize = 10 << 10;
const REDIRECTS_MAX: usize = 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// It worked, but not as meant.
    Warning(String),
    Failure(String),
    /// Nothing is known: it could not be tried.
    Error(String),
}

/// What a handler acts on.
pub struct Target<'a> {
    pub runtime: &'a dyn Runtime,
    pub container_id: &'a str,
    pub container: &'a core::Container,
    pub address: Option<IpAddr>,
    pub user_agent: String,
}

fn port(container: &core::Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            named.map(|port| port.container_port).or_else(|| name.parse().ok())
        }
    };
    let number = number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0);
    number.ok_or_else(|| format!("couldn't find port: {port:?} in container {}", container.name))
}

impl Target<'_> {
    pub async fn exec(&self, action: &core::ExecAction, timeout: Duration) -> Outcome {
        let command = action.command.clone().unwrap_or_default();
        let shown = command.join(" ");
        match self.runtime.exec_sync(self.container_id, command, timeout).await {
            Ok(output) if output.exit_code == 0 => Outcome::Success,
            Ok(output) => {
                let mut text = output.stdout;
                text.extend(output.stderr);
                text.truncate(BODY_MAX);
                Outcome::Failure(String::from_utf8_lossy(&text).into_owned())
            }
            Err(Error::Timeout(_)) => Outcome::Failure(format!(
                "command timed out: {} timed out after {}",
                go_quote(&shown),
                go_duration(timeout)
            )),
            Err(error) => Outcome::Error(error.to_string()),
        }
    }

    pub async fn http(&self, action: &core::HTTPGetAction, timeout: Duration) -> Outcome {
        let port = match port(self.container, &action.port) {
            Ok(port) => port,
            Err(text) => return Outcome::Error(text),
        };
        let host = match (action.host.as_deref().filter(|host| !host.is_empty()), self.address) {
            (Some(host), _) => host.to_owned(),
            (None, Some(IpAddr::V6(address))) => format!("[{address}]"),
            (None, Some(address)) => address.to_string(),
            (None, None) => return Outcome::Error("the pod has no address".to_owned()),
        };
        let tls = action.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
        let path = action.path.as_deref().unwrap_or("/");
        let slash = if path.starts_with('/') { "" } else { "/" };
        let url = format!("{}://{host}:{port}{slash}{path}", if tls { "https" } else { "http" });
        match tokio::time::timeout(timeout, self.get(&url, action)).await {
            Ok(outcome) => outcome,
            Err(_) => Outcome::Failure(format!(
                "Get {}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
                go_quote(&url)
            )),
        }
    }

    async fn get(&self, first: &str, action: &core::HTTPGetAction) -> Outcome {
        let mut url = first.to_owned();
        for _ in 0..REDIRECTS_MAX {
            let failed = |why: String| Outcome::Failure(format!("Get {}: {why}", go_quote(&url)));
            let Ok(uri) = url.parse::<Uri>() else { return Outcome::Error(format!("invalid URL {url}")) };
            let response = match self.get_once(&uri, action).await {
                Ok(response) => response,
                Err(why) => return failed(why),
            };
            let status = response.status();
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            if let (true, Some(location)) = (status.is_redirection(), location) {
                let next = redirect(&uri, location);
                if next.as_ref().is_none_or(|next| next.host() != uri.host()) {
                    return Outcome::Warning(format!(
                        "Probe terminated redirects, Response body: {}",
                        String::from_utf8_lossy(&read(response).await)
                    ));
                }
                url = next.expect("it has a host").to_string();
                continue;
            }
            if status.as_u16() >= 200 && status.as_u16() < 400 {
                return Outcome::Success;
            }
            return Outcome::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()));
        }
        Outcome::Failure(format!("Get {}: stopped after {REDIRECTS_MAX} redirects", go_quote(&url)))
    }

    async fn get_once(
        &self,
        uri: &Uri,
        action: &core::HTTPGetAction,
    ) -> Result<http::Response<hyper::body::Incoming>, String> {
        let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let mut request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()));
        let mut host = authority.to_owned();
        let (mut has_agent, mut has_accept) = (false, false);
        for extra in action.http_headers.iter().flatten() {
            if extra.name.eq_ignore_ascii_case("host") {
                host = extra.value.clone();
                continue;
            }
            has_agent |= extra.name.eq_ignore_ascii_case("user-agent");
            has_accept |= extra.name.eq_ignore_ascii_case("accept");
            request = request.header(&extra.name, &extra.value);
        }
        if !has_agent {
            request = request.header(header::USER_AGENT, &self.user_agent);
        }
        if !has_accept {
            request = request.header(header::ACCEPT, "*/*");
        }
        let request = request.header(header::HOST, host).header(header::CONNECTION, "close");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        let stream = connect(authority).await?;
        if uri.scheme_str() == Some("https") {
            let name = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let name = rustls::pki_types::ServerName::try_from(name).map_err(|error| error.to_string())?;
            let connector = tokio_rustls::TlsConnector::from(trusting_config());
            let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
            return send(stream, request).await;
        }
        send(stream, request).await
    }

    pub async fn tcp(&self, action: &core::TCPSocketAction, timeout: Duration) -> Outcome {
        let port = match port(self.container, &action.port) {
            Ok(port) => port,
            Err(text) => return Outcome::Error(text),
        };
        let host = action.host.clone().filter(|host| !host.is_empty());
        let Some(host) = host.or_else(|| self.address.map(|address| address.to_string())) else {
            return Outcome::Error("the pod has no address".to_owned());
        };
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        match tokio::time::timeout(timeout, connect(&address)).await {
            Ok(Ok(_)) => Outcome::Success,
            Ok(Err(why)) => Outcome::Failure(why),
            Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
        }
    }

    pub async fn grpc(&self, action: &core::GRPCAction, timeout: Duration) -> Outcome {
        let (Some(address), Ok(port)) = (self.address, u16::try_from(action.port)) else {
            return Outcome::Error("the pod has no address".to_owned());
        };
        let address = SocketAddr::new(address, port).to_string();
        let service = action.service.as_deref().unwrap_or_default();
        match tokio::time::timeout(timeout, grpc_check(&address, service, &self.user_agent)).await {
            Ok(Ok(1)) => Outcome::Success,
            Ok(Ok(status)) => {
                let names = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];
                let name = names.get(usize::from(status)).unwrap_or(&"UNKNOWN");
                Outcome::Failure(format!("service unhealthy (responded with \"{name}\")"))
            }
            Ok(Err(why)) => Outcome::Failure(why),
            Err(_) => Outcome::Failure(format!(
                "timeout: failed to connect service \"{address}\" within {}: context deadline exceeded",
                go_duration(timeout)
            )),
        }
    }
}

fn redirect(from: &Uri, location: &str) -> Option<Uri> {
    let to: Uri = location.parse().ok()?;
    // Without a scheme, a bare word would be taken for a host.
    if to.scheme().is_some() {
        return Some(to);
    }
    let path = if location.starts_with('/') { location.to_owned() } else { format!("/{location}") };
    format!("{}://{}{path}", from.scheme_str()?, from.authority()?).parse().ok()
}

async fn connect(address: &str) -> Result<TcpStream, String> {
    let stream = TcpStream::connect(address).await;
    stream.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => format!("dial tcp {address}: connect: connection refused"),
        std::io::ErrorKind::HostUnreachable => format!("dial tcp {address}: connect: no route to host"),
        _ => format!("dial tcp {address}: {error}"),
    })
}

async fn send<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<http::Response<hyper::body::Incoming>, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(|error| match error.is_incomplete_message() {
        true => "EOF".to_owned(),
        false => error.to_string(),
    })
}

async fn read(response: http::Response<hyper::body::Incoming>) -> Vec<u8> {
    let mut body = http_body_util::Limited::new(response.into_body(), BODY_MAX);
    let mut text = vec![];
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data() {
            text.extend_from_slice(&data);
        }
    }
    text
}

/// The status a `grpc.health.v1.Health` service answers.
async fn grpc_check(address: &str, service: &str, user_agent: &str) -> Result<u8, String> {
    let stream = connect(address).await?;
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, user_agent)
        .body(Full::new(grpc_request(service)))
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    if response.status() != StatusCode::OK {
        return Err(format!("error: health rpc probe failed: HTTP status {}", response.status().as_u16()));
    }
    let collected = http_body_util::Limited::new(response.into_body(), BODY_MAX).collect().await;
    connection.abort();
    let collected = collected.map_err(|error| error.to_string())?;
    let code = collected.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
    match code.as_ref().map(|code| code.as_bytes()) {
        None | Some(b"0") => {
            grpc_status(collected.to_bytes()).ok_or_else(|| "error: health rpc probe failed".to_owned())
        }
        Some(b"12") => {
            Err("error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .to_owned())
        }
        Some(b"5") => Ok(3),
        Some(_) => Err("error: health rpc probe failed".to_owned()),
    }
}

/// A `HealthCheckRequest{service}` in its frame.
fn grpc_request(service: &str) -> Bytes {
    let mut message = vec![];
    // Names are at most 253 bytes long, so one or two bytes hold the length.
    if !service.is_empty() {
        message.put_u8(0x0a);
        let length = service.len().min(0x3fff);
        if length < 0x80 {
            message.put_u8(length as u8);
        } else {
            message.put_u8((length & 0x7f) as u8 | 0x80);
            message.put_u8((length >> 7) as u8);
        }
        message.put_slice(&service.as_bytes()[..length]);
    }
    let mut frame = vec![0];
    frame.put_u32(message.len() as u32);
    frame.extend(message);
    frame.into()
}

/// The status of a `HealthCheckResponse{status}`: field 1, a number below 128; 0 when it is left out.
fn grpc_status(mut frame: Bytes) -> Option<u8> {
    if frame.len() < 5 || frame[0] != 0 {
        return None;
    }
    frame.advance(5);
    match frame.as_ref() {
        [] => Some(0),
        [0x08, status, ..] if *status < 0x80 => Some(*status),
        _ => None,
    }
}

/// TLS that trusts everyone: a probe asks whether the server answers, not who it is, as upstream's do.
fn trusting_config() -> Arc<rustls::ClientConfig> {
    static CONFIG: std::sync::LazyLock<Arc<rustls::ClientConfig>> = std::sync::LazyLock::new(|| {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider knows the default versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Trusting))
            .with_no_client_auth();
        Arc::new(config)
    });
    CONFIG.clone()
}

#[derive(Debug)]
struct Trusting;

impl rustls::client::danger::ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_messages_are_framed() {
        assert_eq!(grpc_request("").as_ref(), [0, 0, 0, 0, 0]);
        assert_eq!(grpc_request("ab").as_ref(), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(grpc_status(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1])), Some(1));
        assert_eq!(grpc_status(Bytes::from_static(&[0, 0, 0, 0, 0])), Some(0));
        assert_eq!(grpc_status(Bytes::from_static(&[1, 0])), None);
    }

    #[test]
    fn redirects_are_followed_on_the_same_host() {
        let from: Uri = "http://h:80/a".parse().expect("a URL");
        let to = |location: &str| redirect(&from, location).map(|uri| uri.to_string());
        assert_eq!(to("/b").as_deref(), Some("http://h:80/b"));
        assert_eq!(to("b").as_deref(), Some("http://h:80/b"));
        assert_eq!(to("https://o/x").as_deref(), Some("https://o/x"));
    }
}
