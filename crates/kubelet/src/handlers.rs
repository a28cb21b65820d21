//! What probes and lifecycle hooks do: run a command, get a page, open a connection, ask a gRPC service.
//!
//! What a specification says becomes a [`Handler`] first, with names of ports and addresses resolved, so that
//! nothing has to be kept of the pod. Results carry upstream's texts (pkg/probe), which end up in `Unhealthy`
//! events.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Request, StatusCode, Uri};
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

/// What is done, with everything in it that is to be found in the pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Handler {
    Exec(Vec<String>),
    Http {
        url: String,
        headers: HeaderMap,
    },
    /// `host:port`
    Tcp(String),
    Grpc {
        address: String,
        service: String,
        user_agent: String,
    },
    Sleep(Duration),
    /// It cannot be tried, and why.
    Invalid(String),
}

/// Whom a handler is about.
pub struct Place<'a> {
    pub container: &'a core::Container,
    /// The pod's address.
    pub address: Option<IpAddr>,
    /// `kube-probe/1.37`
    pub user_agent: &'a str,
}

impl Handler {
    pub fn of_probe(probe: &core::Probe, place: &Place<'_>) -> Handler {
        match probe {
            core::Probe { exec: Some(action), .. } => Handler::exec(action),
            core::Probe { http_get: Some(action), .. } => or_invalid(http(action, place)),
            core::Probe { tcp_socket: Some(action), .. } => or_invalid(tcp(action, place)),
            core::Probe { grpc: Some(action), .. } => or_invalid(grpc(action, place)),
            _ => Handler::Invalid("missing probe handler".to_owned()),
        }
    }

    pub fn of_hook(hook: &core::LifecycleHandler, place: &Place<'_>) -> Handler {
        match hook {
            core::LifecycleHandler { exec: Some(action), .. } => Handler::exec(action),
            core::LifecycleHandler { http_get: Some(action), .. } => or_invalid(http(action, place)),
            core::LifecycleHandler { tcp_socket: Some(action), .. } => or_invalid(tcp(action, place)),
            core::LifecycleHandler { sleep: Some(action), .. } => {
                Handler::Sleep(Duration::from_secs(u64::try_from(action.seconds).unwrap_or(0)))
            }
            _ => Handler::Invalid("invalid handler".to_owned()),
        }
    }

    fn exec(action: &core::ExecAction) -> Handler {
        Handler::Exec(action.command.clone().unwrap_or_default())
    }

    /// Does it; a `timeout` of zero lets a command take as long as it will.
    pub async fn run(&self, runtime: &dyn Runtime, container_id: &str, timeout: Duration) -> Outcome {
        match self {
            Handler::Exec(command) => run_exec(runtime, container_id, command, timeout).await,
            Handler::Http { url, headers } => match tokio::time::timeout(timeout, get(url, headers)).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Failure(format!(
                    "Get {}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
                    go_quote(url)
                )),
            },
            Handler::Tcp(address) => match tokio::time::timeout(timeout, connect(address)).await {
                Ok(Ok(_)) => Outcome::Success,
                Ok(Err(why)) => Outcome::Failure(why),
                Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
            },
            Handler::Grpc { address, service, user_agent } => {
                run_grpc(address, service, user_agent, timeout).await
            }
            Handler::Sleep(long) => {
                tokio::time::sleep(*long).await;
                Outcome::Success
            }
            Handler::Invalid(why) => Outcome::Error(why.clone()),
        }
    }
}

fn or_invalid(handler: Result<Handler, String>) -> Handler {
    handler.unwrap_or_else(Handler::Invalid)
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
    number.ok_or_else(|| match port {
        IntOrString::Int(number) => format!("invalid port number: {number}"),
        IntOrString::String(name) => format!("couldn't find port: {name} in container {}", container.name),
    })
}

/// The host that is named, or the pod, as it stands in a URL.
fn host(named: Option<&String>, place: &Place<'_>) -> Result<String, String> {
    match (named.filter(|host| !host.is_empty()), place.address) {
        (Some(host), _) if host.contains(':') && !host.starts_with('[') => Ok(format!("[{host}]")),
        (Some(host), _) => Ok(host.clone()),
        (None, Some(IpAddr::V6(address))) => Ok(format!("[{address}]")),
        (None, Some(address)) => Ok(address.to_string()),
        (None, None) => Err("the pod has no address".to_owned()),
    }
}

fn http(action: &core::HTTPGetAction, place: &Place<'_>) -> Result<Handler, String> {
    let port = port(place.container, &action.port)?;
    let host = host(action.host.as_ref(), place)?;
    let tls = action.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https"));
    let path = action.path.as_deref().unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    let url = format!("{}://{host}:{port}{slash}{path}", if tls { "https" } else { "http" });
    let mut headers = HeaderMap::new();
    for extra in action.http_headers.iter().flatten() {
        let name = HeaderName::try_from(extra.name.as_str()).map_err(|error| error.to_string())?;
        let value = HeaderValue::try_from(extra.value.as_str()).map_err(|error| error.to_string())?;
        headers.append(name, value);
    }
    // One that is given as empty is not sent.
    for (name, default) in [(header::USER_AGENT, place.user_agent), (header::ACCEPT, "*/*")] {
        match headers.get(&name).map(HeaderValue::is_empty) {
            None => {
                _ = headers.insert(name, HeaderValue::try_from(default).map_err(|error| error.to_string())?)
            }
            Some(true) => _ = headers.remove(&name),
            Some(false) => {}
        }
    }
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    Ok(Handler::Http { url, headers })
}

fn tcp(action: &core::TCPSocketAction, place: &Place<'_>) -> Result<Handler, String> {
    let port = port(place.container, &action.port)?;
    Ok(Handler::Tcp(format!("{}:{port}", host(action.host.as_ref(), place)?)))
}

fn grpc(action: &core::GRPCAction, place: &Place<'_>) -> Result<Handler, String> {
    let (Some(address), Ok(port)) = (place.address, u16::try_from(action.port)) else {
        return Err("the pod has no address".to_owned());
    };
    Ok(Handler::Grpc {
        address: SocketAddr::new(address, port).to_string(),
        service: action.service.clone().unwrap_or_default(),
        user_agent: place.user_agent.to_owned(),
    })
}

async fn run_exec(
    runtime: &dyn Runtime,
    container_id: &str,
    command: &[String],
    timeout: Duration,
) -> Outcome {
    match runtime.exec_sync(container_id, command.to_vec(), timeout).await {
        Ok(output) if output.exit_code == 0 => Outcome::Success,
        Ok(output) => {
            let mut text = output.stdout;
            text.extend(output.stderr);
            text.truncate(BODY_MAX);
            Outcome::Failure(String::from_utf8_lossy(&text).into_owned())
        }
        Err(Error::Timeout(_)) => Outcome::Failure(format!(
            "command timed out: {} timed out after {}",
            go_quote(&command.join(" ")),
            go_duration(timeout)
        )),
        Err(error) => Outcome::Error(error.to_string()),
    }
}

async fn get(first: &str, headers: &HeaderMap) -> Outcome {
    let mut url = first.to_owned();
    for _ in 0..REDIRECTS_MAX {
        let Ok(uri) = url.parse::<Uri>() else { return Outcome::Error(format!("invalid URL {url}")) };
        let response = match get_once(&uri, headers).await {
            Ok(response) => response,
            Err(why) => return Outcome::Failure(format!("Get {}: {why}", go_quote(&url))),
        };
        let status = response.status();
        let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let next = match (status.as_u16(), location) {
            (301 | 302 | 303 | 307 | 308, Some(location)) => redirect(&uri, location),
            _ => None,
        };
        if let Some(next) = next.filter(|next| next.host() == uri.host()) {
            url = next.to_string();
            continue;
        }
        if status.is_redirection() {
            return Outcome::Warning(format!(
                "Probe terminated redirects, Response body: {}",
                String::from_utf8_lossy(&read(response).await)
            ));
        }
        if status.is_success() {
            return Outcome::Success;
        }
        return Outcome::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()));
    }
    Outcome::Failure(format!("Get {}: stopped after {REDIRECTS_MAX} redirects", go_quote(&url)))
}

async fn get_once(uri: &Uri, headers: &HeaderMap) -> Result<http::Response<hyper::body::Incoming>, String> {
    let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let mut request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(header::HOST) {
        let host = HeaderValue::try_from(authority).map_err(|error| error.to_string())?;
        request.headers_mut().insert(header::HOST, host);
    }
    let stream = connect(authority).await?;
    if uri.scheme_str() == Some("https") {
        let name = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = rustls::pki_types::ServerName::try_from(name).map_err(|error| error.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(minke_client::trusting::config());
        let stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
        return send(stream, request).await;
    }
    send(stream, request).await
}

/// What a `Location` means that the answer of `from` has (RFC 3986, 5.2).
fn redirect(from: &Uri, location: &str) -> Option<Uri> {
    let scheme = from.scheme_str()?;
    if let Some(rest) = location.strip_prefix("//") {
        return format!("{scheme}://{rest}").parse().ok();
    }
    // A bare word would be taken for a host.
    if let Ok(to) = location.parse::<Uri>()
        && to.scheme().is_some()
    {
        return Some(to);
    }
    let path = match (location, from.path().rfind('/')) {
        (absolute, _) if absolute.starts_with('/') => absolute.to_owned(),
        (query, _) if query.starts_with('?') => format!("{}{query}", from.path()),
        (beside, Some(end)) => format!("{}{beside}", &from.path()[..=end]),
        (beside, None) => format!("/{beside}"),
    };
    format!("{scheme}://{}{path}", from.authority()?).parse().ok()
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
    // It ends with the response, which is dropped before long.
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

async fn run_grpc(address: &str, service: &str, user_agent: &str, timeout: Duration) -> Outcome {
    let began = tokio::time::Instant::now();
    let stream = match tokio::time::timeout(timeout, connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(why)) => {
            return Outcome::Failure(format!(
                "error: failed to connect service at {}: {why}",
                go_quote(address)
            ));
        }
        Err(_) => {
            return Outcome::Failure(format!(
                "timeout: failed to connect service {} within {}: context deadline exceeded",
                go_quote(address),
                go_duration(timeout)
            ));
        }
    };
    match tokio::time::timeout_at(began + timeout, grpc_check(stream, address, service, user_agent)).await {
        Ok(Ok(1)) => Outcome::Success,
        Ok(Ok(status)) => {
            let names = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];
            let name = names.get(usize::from(status)).unwrap_or(&"UNKNOWN");
            Outcome::Failure(format!("service unhealthy (responded with \"{name}\")"))
        }
        Ok(Err(why)) => Outcome::Failure(why),
        Err(_) => {
            Outcome::Failure(format!("timeout: health rpc did not complete within {}", go_duration(timeout)))
        }
    }
}

/// The status a `grpc.health.v1.Health` service answers; the error is the text of the failure.
async fn grpc_check(stream: TcpStream, address: &str, service: &str, user_agent: &str) -> Result<u8, String> {
    let failed = |why: String| format!("error: health rpc probe failed: {why}");
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| failed(error.to_string()))?;
    // Whatever way this ends, the connection ends with it.
    let _connection = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, user_agent)
        .body(Full::new(grpc_request(service)))
        .map_err(|error| failed(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
    if response.status() != StatusCode::OK {
        return Err(failed(format!(
            "unexpected HTTP status code received from server: {}",
            response.status()
        )));
    }
    // An answer without a message has its status in the headers.
    let headers = response.headers().clone();
    let body = http_body_util::Limited::new(response.into_body(), BODY_MAX).collect().await;
    let body = body.map_err(|error| failed(error.to_string()))?;
    let end = body.trailers().filter(|end| end.contains_key("grpc-status")).unwrap_or(&headers);
    let text = |name: &str| end.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    match text("grpc-status").as_deref() {
        None | Some("0") => grpc_status(body.to_bytes())
            .ok_or_else(|| failed("the answer is no HealthCheckResponse".to_owned())),
        Some("12") => Err(format!(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
            text("grpc-message").unwrap_or_default()
        )),
        Some(code) => {
            let name = code.parse().ok().and_then(|code: usize| GRPC_CODES.get(code)).unwrap_or(&"Unknown");
            let message = text("grpc-message").unwrap_or_default();
            Err(failed(format!("rpc error: code = {name} desc = {message}")))
        }
    }
}

/// The names of gRPC's status codes, as Go prints them.
const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

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

#[cfg(test)]
mod tests;
