//! HTTP to one registry: credentials, bearer tokens, and the words for what goes wrong.
//!
//! A request goes out with what is known; a 401 says how to authenticate, and it goes out once more.
//! Upstream: the OCI distribution specification, and containerd's core/remotes/docker for the words.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde::Deserialize;

use super::hosts::Endpoint;
use crate::api::{Auth, Error, Result};

/// Most bytes of an answer to a request for a token, or of an error.
const ANSWER_MAX: usize = 1 << 20;

/// How long a server of files may take to answer, and between two pieces of one.
const DOWNLOAD_CONNECT: Duration = Duration::from_secs(10);
const DOWNLOAD_READ: Duration = Duration::from_secs(60);

/// A connection to one host, for one repository.
pub struct Remote {
    client: Client,
    /// `https://host/v2`
    base: String,
    /// The registry that a mirror stands for.
    namespace: Option<String>,
    auth: Auth,
    /// `repository:name:pull`
    scope: String,
    /// What the registry took last.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Remote {
    /// `actions` is `pull` or `pull,push`.
    pub fn new(endpoint: &Endpoint, domain: &str, path: &str, actions: &str, auth: &Auth) -> Result<Remote> {
        let wrong = |e: &dyn std::error::Error| Error::Failed(format!("{}: {}", endpoint.base, chain(e)));
        let mut headers = HeaderMap::new();
        for (name, value) in &endpoint.headers {
            let name = HeaderName::try_from(name.as_str()).map_err(|e| wrong(&e))?;
            headers.append(name, HeaderValue::try_from(value.as_str()).map_err(|e| wrong(&e))?);
        }
        let mut builder = Client::builder()
            .user_agent(concat!("minke/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(endpoint.connect_timeout)
            .read_timeout(endpoint.read_timeout)
            .default_headers(headers)
            .tls_danger_accept_invalid_certs(endpoint.skip_verify);
        for pem in &endpoint.ca {
            let certificates = reqwest::Certificate::from_pem_bundle(pem).map_err(|e| wrong(&e))?;
            builder = builder.tls_certs_merge(certificates);
        }
        // Only one can be shown.
        if let Some(pem) = endpoint.client.first() {
            builder = builder.identity(reqwest::Identity::from_pem(pem).map_err(|e| wrong(&e))?);
        }
        Ok(Remote {
            client: builder.build().map_err(|e| wrong(&e))?,
            base: endpoint.base.clone(),
            namespace: endpoint.mirror.then(|| domain.to_owned()),
            // The credentials are the registry's; a mirror gets none of them.
            auth: if endpoint.mirror { Auth::Anonymous } else { auth.clone() },
            scope: format!("repository:{path}:{actions}"),
            authorization: Mutex::new(None),
        })
    }

    /// `<base>/<path>`, for a mirror with the registry it stands for.
    pub fn url(&self, path: &str) -> String {
        match &self.namespace {
            Some(namespace) => format!("{}/{path}?ns={namespace}", self.base),
            None => format!("{}/{path}", self.base),
        }
    }

    /// Sends what `build` makes of a request, again when the registry wants to know who asks.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        build: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Failure> {
        let mut again = false;
        loop {
            let mut request = build(self.client.request(method.clone(), url));
            let known = self.authorization.lock().expect("short").clone();
            // Elsewhere, where an upload may be sent to, is no place for credentials.
            if let Some(value) = known.filter(|_| same_host(url, &self.base)) {
                request = request.header(header::AUTHORIZATION, value);
            }
            let response = request.send().await.map_err(|e| Failure::network(&method, url, &e))?;
            if response.status() != StatusCode::UNAUTHORIZED || again {
                return Ok(response);
            }
            let challenge = response.headers().get_all(header::WWW_AUTHENTICATE);
            let challenges: Vec<Challenge> =
                challenge.iter().filter_map(|v| Challenge::parse(v.to_str().ok()?)).collect();
            let value = self.authorize(&challenges).await?;
            *self.authorization.lock().expect("short") = Some(value);
            again = true;
        }
    }

    async fn authorize(&self, challenges: &[Challenge]) -> Result<HeaderValue, Failure> {
        let find = |scheme: &str| challenges.iter().find(|c| c.scheme == scheme);
        let denied = |why: &str| Failure::Denied(format!("authorization failed: {why}"));
        let value = match (&self.auth, find("bearer"), find("basic")) {
            (Auth::Bearer { token }, ..) => format!("Bearer {token}"),
            (_, Some(bearer), _) => format!("Bearer {}", self.token(bearer).await?),
            (Auth::Basic { username, password }, None, Some(_)) => basic(username, password),
            (Auth::Anonymous, None, Some(_)) => return Err(denied("no basic auth credentials")),
            _ => return Err(denied("the registry names no way that is known")),
        };
        let mut value =
            HeaderValue::try_from(value).map_err(|_| denied("credentials that no header can hold"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn token(&self, challenge: &Challenge) -> Result<String, Failure> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let failed = |why: String| Failure::Other(format!("failed to authorize: {why}"));
        let kind = if self.auth == Auth::Anonymous { "anonymous" } else { "oauth" };
        let realm = challenge
            .get("realm")
            .ok_or_else(|| failed("no realm specified for token auth challenge".into()))?;
        let mut url = reqwest::Url::parse(realm)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| failed(format!("invalid token auth challenge realm {realm:?}")))?;
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = challenge.get("service") {
                query.append_pair("service", service);
            }
            let scope = challenge.get("scope").filter(|scope| !scope.is_empty()).unwrap_or(&self.scope);
            for scope in scope.split(' ') {
                query.append_pair("scope", scope);
            }
        }
        let mut request = self.client.get(url.clone());
        if let Auth::Basic { username, password } = &self.auth {
            request = request.header(header::AUTHORIZATION, basic(username, password));
        }
        let response = request.send().await.map_err(|e| Failure::network(&Method::GET, url.as_str(), &e))?;
        let status = response.status();
        if !status.is_success() {
            return Err(failed(format!(
                "failed to fetch {kind} token: unexpected status from GET request to {url}: {status}"
            )));
        }
        let bytes = bounded(response, ANSWER_MAX)
            .await
            .map_err(|e| failed(format!("failed to fetch {kind} token: {e}")))?;
        let answer: Answer = serde_json::from_slice(&bytes)
            .map_err(|e| failed(format!("unable to decode token response: {e}")))?;
        answer
            .token
            .filter(|t| !t.is_empty())
            .or(answer.access_token)
            .ok_or_else(|| failed("authorization server did not include a token in the response".into()))
    }
}

/// Why a registry did not give what was asked for.
#[derive(Debug)]
pub enum Failure {
    NotFound,
    /// Whoever asks may not, or has not said who they are.
    Denied(String),
    /// Nothing came in time, or the connection broke: another try may do better.
    Network {
        text: String,
        timeout: bool,
    },
    Other(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NotFound => f.write_str("not found"),
            Failure::Denied(text) | Failure::Network { text, .. } | Failure::Other(text) => f.write_str(text),
        }
    }
}

impl Failure {
    pub fn network(method: &Method, url: &str, error: &reqwest::Error) -> Failure {
        let name = method.as_str();
        let name = format!("{}{}", &name[..1], name[1..].to_ascii_lowercase());
        let text = format!("failed to do request: {name} {url:?}: {}", cause(error, url));
        Failure::Network { text, timeout: error.is_timeout() }
    }

    /// An answer that broke off in the midst of its body.
    pub fn broken(error: &reqwest::Error) -> Failure {
        let text = chain(error);
        let text = match text.contains("end of file before message length") {
            true => "unexpected EOF".to_owned(),
            false => text,
        };
        Failure::Network { text, timeout: error.is_timeout() }
    }

    /// What an answer that is no success means.
    pub async fn of(method: &Method, url: &str, response: Response) -> Failure {
        let status = response.status();
        if status == StatusCode::NOT_FOUND {
            return Failure::NotFound;
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let scope = challenges.iter().filter_map(|v| Challenge::parse(v.to_str().ok()?)).find_map(|c| {
            c.get("error").map(|error| format!("server message: {error}: authorization failed"))
        });
        if let (StatusCode::UNAUTHORIZED, Some(text)) = (status, scope) {
            return Failure::Denied(text);
        }
        let message = bounded(response, ANSWER_MAX).await.ok().and_then(|bytes| server_message(&bytes));
        let text = format!("unexpected status from {method} request to {url}: {status}");
        Failure::Other(match message {
            Some(message) => format!("{text}: {message}"),
            None => text,
        })
    }
}

/// What a registry says of an error, in the specification's form.
fn server_message(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let first = serde_json::from_slice::<Envelope>(bytes).ok()?.errors.into_iter().next()?;
    let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
    let (code, message) = (shown(&first.code.to_lowercase().replace('_', " ")), shown(&first.message));
    Some(if message.is_empty() { code } else { format!("{code}: {message}") })
}

/// Fetches one file of at most `max` bytes from anywhere; returns what its server says of when it was changed.
pub async fn download(url: &str, out: &mut impl std::io::Write, max: u64) -> Result<Option<String>> {
    let error = |failure: Failure| Error::Failed(failure.to_string());
    let client = Client::builder()
        .user_agent(concat!("minke/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(DOWNLOAD_CONNECT)
        .read_timeout(DOWNLOAD_READ);
    let client = client.build().map_err(|e| Error::Failed(chain(&e)))?;
    let response =
        client.get(url).send().await.map_err(|e| error(Failure::network(&Method::GET, url, &e)))?;
    if !response.status().is_success() {
        let status = response.status();
        return Err(Error::Failed(format!("unexpected status from GET request to {url}: {status}")));
    }
    let changed = response.headers().get(header::LAST_MODIFIED).and_then(|v| v.to_str().ok());
    let changed = changed.map(str::to_owned);
    let (mut stream, mut size) = (response.bytes_stream(), 0);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|e| error(Failure::network(&Method::GET, url, &e)))?;
        size += chunk.len() as u64;
        if size > max {
            return Err(Error::Failed(format!("{url}: more than {max} bytes")));
        }
        out.write_all(&chunk).map_err(|e| Error::Failed(e.to_string()))?;
    }
    Ok(changed)
}

/// An answer's body, of bounded size.
pub async fn bounded(response: Response, max: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|e| chain(&e))?;
        if bytes.len() + chunk.len() > max {
            return Err(format!("an answer of more than {max} bytes"));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn basic(username: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}")))
}

/// Scheme, host and port are the same.
fn same_host(a: &str, b: &str) -> bool {
    match (reqwest::Url::parse(a), reqwest::Url::parse(b)) {
        (Ok(a), Ok(b)) => a.origin() == b.origin(),
        _ => false,
    }
}

/// An error with its causes: reqwest's own text says only that something failed.
pub fn chain(error: &dyn std::error::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// Why a request failed, in the words that people search for, which are Go's.
fn cause(error: &reqwest::Error, url: &str) -> String {
    let url = reqwest::Url::parse(url).ok();
    let host = url.as_ref().and_then(|u| u.host_str()).unwrap_or_default();
    let address = match url.as_ref().and_then(|u| u.port_or_known_default()) {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    let text = chain(error);
    let has = |words: &str| text.contains(words);
    if error.is_connect() {
        if error.is_timeout() {
            return format!("dial tcp {address}: i/o timeout");
        }
        if has("Connection refused") {
            return format!("dial tcp {address}: connect: connection refused");
        }
        if has("dns error") || has("failed to lookup address") {
            return format!("dial tcp: lookup {host}: no such host");
        }
        if has("UnknownIssuer") || has("unknown issuer") {
            return "tls: failed to verify certificate: x509: certificate signed by unknown authority"
                .to_owned();
        }
        if has("NotValidForName") || has("not valid for name") {
            return format!("tls: failed to verify certificate: x509: certificate is not valid for {host}");
        }
        if has("InvalidContentType") || has("corrupt message") {
            return "http: server gave HTTP response to HTTPS client".to_owned();
        }
    }
    if error.is_timeout() {
        return "net/http: timeout awaiting response headers".to_owned();
    }
    text
}

/// One way to authenticate that a registry names: `Bearer realm="...",service="..."`.
#[derive(Debug, PartialEq)]
pub struct Challenge {
    /// In lower case.
    scheme: String,
    parameters: BTreeMap<String, String>,
}

impl Challenge {
    fn parse(text: &str) -> Option<Challenge> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.is_empty() {
            return None;
        }
        let mut parameters = BTreeMap::new();
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            let Some((name, after)) = rest.split_once('=') else { break };
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => unquote(quoted)?,
                None => {
                    let end = after.find(',').unwrap_or(after.len());
                    (after[..end].trim().to_owned(), &after[end..])
                }
            };
            parameters.insert(name.trim().to_ascii_lowercase(), value);
            rest = after;
        }
        Some(Challenge { scheme: scheme.to_ascii_lowercase(), parameters })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }
}

/// The text up to the closing quote, and what follows it.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &quoted[at + 1..])),
            '\\' => out.push(chars.next()?.1),
            c => out.push(c),
        }
    }
    None
}

/// A header with a challenge, and the error of an answer; for fuzzing.
pub(crate) fn fuzz(text: &str) {
    let _ = (Challenge::parse(text), server_message(text.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Option<(&str, &[(&str, &str)])>) {
        let want = want.map(|(scheme, parameters)| Challenge {
            scheme: scheme.to_owned(),
            parameters: parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        });
        assert_eq!(Challenge::parse(text), want, "{text}");
    }

    #[test]
    fn challenges_are_read() {
        check("Basic realm=\"x y\"", Some(("basic", &[("realm", "x y")])));
        check(
            "Bearer realm=\"https://a/token\",service=\"r\", scope=\"repository:a/b:pull,push\"",
            Some((
                "bearer",
                &[("realm", "https://a/token"), ("service", "r"), ("scope", "repository:a/b:pull,push")],
            )),
        );
        check(
            "Bearer realm=a,error=insufficient_scope",
            Some(("bearer", &[("realm", "a"), ("error", "insufficient_scope")])),
        );
        check(r#"Basic realm="a\"b""#, Some(("basic", &[("realm", "a\"b")])));
        check("Negotiate", Some(("negotiate", &[])));
        check("Basic realm=\"never closed", None);
        check("", None);
    }

    #[test]
    fn a_registry_can_say_what_is_wrong() {
        let text = br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#;
        assert_eq!(server_message(text).as_deref(), Some("toomanyrequests: slow down"));
        assert_eq!(server_message(b"<html>"), None);
        assert!(
            !same_host("https://a/v2", "https://a:444/v2") && same_host("https://a/v2/x", "https://a:443/v2")
        );
    }
}
