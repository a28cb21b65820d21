//! The [`Client`] over HTTPS: one HTTP/2 connection that all requests and watches share, made anew when it ends.
//!
//! There are no retries here: who calls knows whether trying again makes sense.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use minke_api::{Kind, Object, Revision, Status};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;

use crate::{
    Client, DeleteOptions, List, ListOptions, Patch, Propagation, Target, WatchEvent, WatchOptions,
    WatchStream,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A connection that says nothing for this long is asked, and given up when it doesn't answer.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of an answer, or of one event of a watch.
const ANSWER_MAX: usize = 512 << 20;
const EVENT_MAX: usize = 64 << 20;

/// How to reach a cluster, and as whom. Certificates and keys are PEM.
#[derive(Clone)]
pub struct Identity {
    /// `https://192.0.2.2:6443`
    pub server: String,
    pub ca: Vec<u8>,
    /// A client certificate and its key.
    pub certificate: Option<(Vec<u8>, Vec<u8>)>,
    /// Sent as a bearer token.
    pub token: Option<String>,
}

impl std::fmt::Debug for Identity {
    /// Without the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Why there is no client for an identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{0} is not an https address")]
    Server(String),
    #[error("certificates: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    #[error("certificates: {0}")]
    Tls(#[from] rustls::Error),
}

pub struct HttpsClient {
    authority: String,
    host: ServerName<'static>,
    address: String,
    tls: TlsConnector,
    token: Option<String>,
    connection: Mutex<Option<SendRequest<Full<Bytes>>>>,
}

impl HttpsClient {
    /// Connects on first use.
    pub fn new(identity: &Identity) -> Result<HttpsClient, IdentityError> {
        let wrong = || IdentityError::Server(identity.server.clone());
        let uri: http::Uri = identity.server.parse().map_err(|_| wrong())?;
        let (Some("https"), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong());
        };
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&identity.ca) {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut config = match &identity.certificate {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key)?)?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(HttpsClient {
            address: format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(443)),
            authority: authority.to_string(),
            host: ServerName::try_from(host).map_err(|_| wrong())?,
            tls: TlsConnector::from(Arc::new(config)),
            token: identity.token.clone(),
            connection: Mutex::default(),
        })
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Status> {
        let unreachable = |error: &dyn std::fmt::Display| {
            Status::unavailable(format!("unable to connect to the server {}: {error}", self.authority))
        };
        let connect = async {
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            self.tls.connect(self.host.clone(), tcp).await
        };
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Err(_) => return Err(unreachable(&"it does not answer")),
            Ok(stream) => stream.map_err(|error| unreachable(&error))?,
        };
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_AFTER)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| unreachable(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "Connection to the API server ended");
            }
        });
        Ok(sender)
    }

    /// The shared connection; made when there is none that works.
    async fn sender(&self) -> Result<SendRequest<Full<Bytes>>, Status> {
        let mut connection = self.connection.lock().await;
        if let Some(sender) = connection.as_mut()
            && !sender.is_closed()
            && sender.ready().await.is_ok()
        {
            return Ok(sender.clone());
        }
        let sender = self.connect().await?;
        *connection = Some(sender.clone());
        Ok(sender)
    }

    /// Sends a request, and returns the body of a successful answer.
    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> Result<Incoming, Status> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.authority))
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("minke/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request =
            request.body(Full::new(bytes)).map_err(|error| Status::bad_request(error.to_string()))?;
        let exchange = async {
            let mut sender = self.sender().await?;
            sender.send_request(request).await.map_err(|error| Status::unavailable(error.to_string()))
        };
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, exchange).await;
        let answer = answer.map_err(|_| Status::timeout("the server did not answer in time", 1))??;
        if answer.status().is_success() {
            return Ok(answer.into_body());
        }
        let code = answer.status();
        let text = collect(answer.into_body()).await.unwrap_or_default();
        Err(failure(code, &text))
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Option<&Value>,
    ) -> Result<Bytes, Status> {
        let body = self.send(method, path, content_type, body).await?;
        match tokio::time::timeout(REQUEST_TIMEOUT, collect(body)).await {
            Ok(bytes) => bytes,
            Err(_) => Err(Status::timeout("the server did not finish its answer in time", 1)),
        }
    }

    async fn call_object(
        &self,
        method: Method,
        target: Target<'_>,
        content_type: &str,
        body: Option<&Value>,
    ) -> Result<Arc<Object>, Status> {
        let bytes = self.call(method, &path(&target), content_type, body).await?;
        // A subresource such as scale answers with an object of another kind.
        let kind = match target.kind.subresource(target.subresource) {
            Some(sub) if !sub.kind.is_empty() => {
                let (group, version) = sub.group_version.unwrap_or((target.kind.group, target.kind.version));
                Kind::by_kind(group, version, sub.kind).unwrap_or(target.kind)
            }
            _ => target.kind,
        };
        Object::decode(kind, &bytes).map(Arc::new).map_err(Status::internal)
    }
}

const JSON: &str = "application/json";

#[async_trait]
impl Client for HttpsClient {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        self.call_object(Method::GET, target, JSON, None).await
    }

    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status> {
        let mut query = Query::selecting(&options.labels, &options.fields);
        if options.limit > 0 {
            query.add("limit", &options.limit.to_string());
        }
        if let Some(from) = &options.continue_ {
            query.add("continue", from);
        }
        let path = path(&Target::collection(kind, namespace)) + &query.0;
        let bytes = self.call(Method::GET, &path, JSON, None).await?;
        let list: Value = serde_json::from_slice(&bytes).map_err(Status::internal)?;
        let items = list["items"].as_array().map_or(&[][..], Vec::as_slice);
        let items = items.iter().map(|item| Object::from_value(kind, item).map(Arc::new));
        Ok(List {
            revision: revision(&list)?,
            items: items.collect::<Result<_, _>>().map_err(Status::internal)?,
            continue_: list["metadata"]["continue"]
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned),
        })
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status> {
        let mut query = Query::selecting(&options.labels, &options.fields);
        query.add("watch", "true");
        query.add("allowWatchBookmarks", "true");
        query.add("resourceVersion", &options.from.to_string());
        let path = path(&Target::collection(kind, namespace)) + &query.0;
        let body = self.send(Method::GET, &path, JSON, None).await?;
        let events = stream::unfold(Some(Lines { body, buffer: BytesMut::new() }), move |state| async move {
            let mut lines = state?;
            match lines.next().await {
                Ok(None) => None,
                Ok(Some(line)) => match event(kind, &line) {
                    Ok(event) => Some((Ok(event), Some(lines))),
                    Err(status) => Some((Err(status), None)),
                },
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(events.boxed())
    }

    async fn raw(&self, path: &str) -> Result<Value, Status> {
        let bytes = self.call(Method::GET, path, JSON, None).await?;
        serde_json::from_slice(&bytes).map_err(Status::internal)
    }

    async fn create(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        let collection = Target { name: "", ..target };
        let target = if target.subresource.is_empty() { collection } else { target };
        self.call_object(Method::POST, target, JSON, Some(&body)).await
    }

    async fn post(&self, target: Target<'_>, body: Value) -> Result<Value, Status> {
        let bytes = self.call(Method::POST, &path(&target), JSON, Some(&body)).await?;
        serde_json::from_slice(&bytes).map_err(Status::internal)
    }

    async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        self.call_object(Method::PUT, target, JSON, Some(&body)).await
    }

    async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        let (media, body) = match patch {
            Patch::Json(body) => ("application/json-patch+json", body),
            Patch::Merge(body) => ("application/merge-patch+json", body),
            Patch::Strategic(body) => ("application/strategic-merge-patch+json", body),
        };
        self.call_object(Method::PATCH, target, media, Some(&body)).await
    }

    async fn delete(&self, target: Target<'_>, options: DeleteOptions) -> Result<(), Status> {
        let mut body = json!({"kind": "DeleteOptions", "apiVersion": "v1"});
        if let Some(seconds) = options.grace_period {
            body["gracePeriodSeconds"] = seconds.into();
        }
        if let Some(uid) = options.uid {
            body["preconditions"]["uid"] = uid.into();
        }
        if let Some(revision) = options.revision {
            body["preconditions"]["resourceVersion"] = revision.to_string().into();
        }
        if let Some(policy) = options.propagation {
            body["propagationPolicy"] = match policy {
                Propagation::Background => "Background",
                Propagation::Foreground => "Foreground",
                Propagation::Orphan => "Orphan",
            }
            .into();
        }
        self.call(Method::DELETE, &path(&target), JSON, Some(&body)).await.map(drop)
    }
}

/// `/api/v1/namespaces/NS/pods/NAME/status`
fn path(target: &Target<'_>) -> String {
    let Target { kind, namespace, name, subresource } = target;
    let root = if kind.group.is_empty() { "api".to_owned() } else { format!("apis/{}", kind.group) };
    let mut path = format!("/{root}/{}", kind.version);
    if kind.namespaced && !namespace.is_empty() {
        path.push_str(&format!("/namespaces/{}", escape(namespace)));
    }
    for part in [kind.plural, name, subresource].iter().filter(|part| !part.is_empty()) {
        path.push_str(&format!("/{}", escape(part)));
    }
    path
}

/// Percent-encodes all but unreserved characters.
fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A query string with its question mark, or nothing.
#[derive(Default)]
struct Query(String);

impl Query {
    fn selecting(labels: &minke_api::LabelSelector, fields: &minke_api::FieldSelector) -> Query {
        let mut query = Query::default();
        for (name, text) in [("labelSelector", labels.to_string()), ("fieldSelector", fields.to_string())] {
            if !text.is_empty() {
                query.add(name, &text);
            }
        }
        query
    }

    fn add(&mut self, name: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '?' } else { '&' });
        self.0.push_str(&format!("{name}={}", escape(value)));
    }
}

fn revision(value: &Value) -> Result<Revision, Status> {
    let text = value["metadata"]["resourceVersion"].as_str().unwrap_or_default();
    text.parse().map_err(|_| Status::internal("the server sent no resourceVersion"))
}

fn event(kind: &'static Kind, line: &[u8]) -> Result<WatchEvent, Status> {
    let mut event: Value = serde_json::from_slice(line).map_err(Status::internal)?;
    let object = event["object"].take();
    let decode = || Object::from_value(kind, &object).map(Arc::new).map_err(Status::internal);
    match event["type"].as_str() {
        Some("ADDED") => Ok(WatchEvent::Added(decode()?)),
        Some("MODIFIED") => Ok(WatchEvent::Modified(decode()?)),
        Some("DELETED") => Ok(WatchEvent::Deleted(decode()?)),
        Some("BOOKMARK") => Ok(WatchEvent::Bookmark(revision(&object)?)),
        Some("ERROR") => Err(serde_json::from_value(object).unwrap_or_else(Status::internal)),
        _ => Err(Status::internal("the server sent an event of an unknown type")),
    }
}

fn failure(code: StatusCode, text: &[u8]) -> Status {
    match serde_json::from_slice::<Status>(text) {
        Ok(status) if status.status == "Failure" => status,
        _ => {
            let text = String::from_utf8_lossy(&text[..text.len().min(1024)]).trim().to_owned();
            let reason = code.canonical_reason().unwrap_or("Unknown").replace(' ', "");
            Status::failure(code.as_u16(), &reason, if text.is_empty() { code.to_string() } else { text })
        }
    }
}

async fn collect(body: Incoming) -> Result<Bytes, Status> {
    let collected = http_body_util::Limited::new(body, ANSWER_MAX).collect().await;
    collected.map(|collected| collected.to_bytes()).map_err(|error| Status::unavailable(error.to_string()))
}

/// The lines of a body.
struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<BytesMut>, Status> {
        let mut seen = 0;
        loop {
            if let Some(at) = self.buffer[seen..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(seen + at + 1);
                if line.len() > 1 {
                    return Ok(Some(line));
                }
                seen = 0;
                continue;
            }
            seen = self.buffer.len();
            if seen > EVENT_MAX {
                return Err(Status::internal("the server sent an event that is too large"));
            }
            match self.body.frame().await {
                // A cut-off last line is no event; the watch is simply at its end.
                None => return Ok(None),
                Some(Ok(frame)) => {
                    self.buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data))
                }
                Some(Err(error)) => return Err(Status::unavailable(error.to_string())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_the_ones_of_the_api() {
        let kind = |group, plural| Kind::by_plural(group, "v1", plural).unwrap();
        let pods = Target::object(kind("", "pods"), "default", "web");
        assert_eq!(path(&pods), "/api/v1/namespaces/default/pods/web");
        assert_eq!(path(&pods.sub("binding")), "/api/v1/namespaces/default/pods/web/binding");
        assert_eq!(path(&Target::collection(kind("apps", "deployments"), "")), "/apis/apps/v1/deployments");
        assert_eq!(path(&Target::object(kind("", "nodes"), "", "a/b")), "/api/v1/nodes/a%2Fb");
    }

    #[test]
    fn a_query_is_escaped() {
        let mut query = Query::default();
        query.add("labelSelector", "a in (b,c),d=e");
        query.add("limit", "5");
        assert_eq!(query.0, "?labelSelector=a%20in%20%28b%2Cc%29%2Cd%3De&limit=5");
    }

    #[test]
    fn events_become_what_they_say() {
        let kind = Kind::by_plural("", "v1", "pods").unwrap();
        let line = br#"{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"7"}}}"#;
        assert!(
            matches!(event(kind, line), Ok(WatchEvent::Added(object)) if object.revision() == Revision(7))
        );
        let line = br#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}"#;
        assert!(matches!(event(kind, line), Ok(WatchEvent::Bookmark(Revision(9)))));
        let line = br#"{"type":"ERROR","object":{"kind":"Status","status":"Failure","reason":"Expired","code":410}}"#;
        assert!(event(kind, line).unwrap_err().is_expired());
        assert!(event(kind, b"{}").is_err());
    }

    #[test]
    fn an_answer_that_is_no_status_still_says_what_happened() {
        let status = failure(StatusCode::BAD_GATEWAY, b"no upstream\n");
        assert_eq!((status.code, status.message.as_str()), (502, "no upstream"));
        let status =
            failure(StatusCode::NOT_FOUND, br#"{"status":"Failure","reason":"NotFound","code":404}"#);
        assert!(status.is_not_found());
    }
}
