//! HTTPS: connections, and the fixed order of what happens to a request.
//!
//! Panic recovery, audit id, authentication, impersonation, in-flight bounds, authorization, deadline,
//! handler. Upstream: apiserver pkg/server/config.go, DefaultBuildHandlerChain.

mod body;
mod connection;
mod discovery;
pub mod negotiate;
mod nonresource;
mod openapi;
mod respond;
pub mod rest;
mod route;
mod watch;
mod websocket;

pub use body::{Body, Payload};
pub use connection::{listen, tls_config};
pub use route::{Query, Route};

use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response};
use minke_api::Status;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::authn::impersonate;
use crate::metrics::{Labels, Metrics};
use crate::proxy::Proxy;
use crate::registry::Registry;
use crate::{Attributes, Config, UserInfo};

/// Requests that are worked on at a time, but for those that stay.
const READING_MAX: i64 = 400;
const WRITING_MAX: i64 = 200;
/// How long a request may take, but for those that stay.
const DEADLINE: Duration = Duration::from_secs(60);

const AUDIT_ID: HeaderName = HeaderName::from_static("audit-id");

/// What all connections share.
pub struct Server {
    pub registry: Arc<Registry>,
    pub config: Config,
    pub metrics: Metrics,
    pub proxy: Proxy,
    /// Ends watches and proxied streams, which else would never end.
    pub stop_watches: CancellationToken,
}

/// What a connection knows of its peer.
#[derive(Clone)]
pub struct Peer {
    /// What its certificate says, if it has shown one.
    pub identity: Option<Arc<Result<UserInfo, Status>>>,
    pub address: std::net::SocketAddr,
}

/// What a request turned out to be, for the metrics.
struct Seen {
    verb: &'static str,
    route: Option<Route>,
}

impl Server {
    /// Answers a request; whatever goes wrong is an answer, too.
    pub async fn handle(
        self: Arc<Server>,
        peer: Peer,
        request: Request<Payload>,
    ) -> Result<Response<Body>, Infallible> {
        let started = Instant::now();
        let audit_id = audit_id(&request);
        let route = Route::parse(request.uri().path());
        let query = Query::parse(request.uri().query());
        let verb = match &route {
            Some(route) => route.verb(request.method(), query.flag("watch")),
            None => method_verb(request.method()),
        };
        let seen = Seen { verb, route };
        let answered = AssertUnwindSafe(self.answer(&peer, &seen, &query, request)).catch_unwind().await;
        let mut response = match answered {
            Ok(Ok(response)) => response,
            Ok(Err(status)) => respond::status(&status),
            Err(_) => {
                self.metrics.panicked();
                tracing::error!(verb, "A request panicked");
                respond::status(&Status::failure(
                    500,
                    "InternalError",
                    "This request caused apiserver to panic. Look in the logs for details.",
                ))
            }
        };
        let headers = response.headers_mut();
        headers.insert(AUDIT_ID, audit_id);
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-cache, private"));
        let (kind, subresource) = match &seen.route {
            Some(route) => (route.kind(), route.subresource.as_str()),
            None => (None, ""),
        };
        self.metrics
            .request(Labels::new(verb, kind, subresource, response.status().as_u16()), started.elapsed());
        tracing::debug!(verb, code = response.status().as_u16(), took = ?started.elapsed(), "Answered");
        Ok(response)
    }

    async fn answer(
        self: &Arc<Server>,
        peer: &Peer,
        seen: &Seen,
        query: &Query,
        request: Request<Payload>,
    ) -> Result<Response<Body>, Status> {
        let registry = &self.registry;
        let user = registry.authenticator.authenticate(
            peer.identity.as_deref(),
            request.headers(),
            registry.clock.now(),
        )?;
        let user = impersonate(user, request.headers(), &registry.authorizer)?;
        let stays = stays(seen);
        let _in_flight =
            if stays || user.groups.iter().any(|group| group == "system:masters") {
                None
            } else {
                let writes = !matches!(seen.verb, "get" | "list" | "head");
                let max = if writes { WRITING_MAX } else { READING_MAX };
                Some(self.metrics.in_flight(writes, max).ok_or_else(|| {
                    Status::too_many_requests("Too many requests, please try again later.", 1)
                })?)
            };
        self.authorize(&user, seen, query, request.uri().path())?;
        let handled = self.dispatch(&user, peer, seen, query, request);
        if stays {
            return handled.await;
        }
        tokio::time::timeout(DEADLINE, handled).await.unwrap_or_else(|_| {
            Err(Status::timeout("request did not complete within the allotted timeout", 0))
        })
    }

    fn authorize(&self, user: &UserInfo, seen: &Seen, query: &Query, path: &str) -> Result<(), Status> {
        let Some(route) = &seen.route else {
            return self.registry.authorizer.require(user, &Attributes::Path { verb: seen.verb, path });
        };
        let mut name = route.name.as_str();
        if name.is_empty() && matches!(seen.verb, "list" | "watch" | "deletecollection") {
            name = query.get("fieldSelector").and_then(selected_name).unwrap_or_default();
        }
        let mut attributes = Attributes::Resource {
            verb: seen.verb,
            group: &route.group,
            version: &route.version,
            resource: &route.resource,
            subresource: &route.subresource,
            namespace: &route.namespace,
            name,
        };
        self.registry.authorizer.require(user, &attributes)?;
        // Asking for a stream by GET, as WebSockets do, changes as much as asking by POST.
        if seen.verb == "get"
            && route.resource == "pods"
            && matches!(route.subresource.as_str(), "exec" | "attach" | "portforward")
        {
            if let Attributes::Resource { verb, .. } = &mut attributes {
                *verb = "create";
            }
            self.registry.authorizer.require(user, &attributes)?;
        }
        Ok(())
    }

    async fn dispatch(
        self: &Arc<Server>,
        user: &UserInfo,
        peer: &Peer,
        seen: &Seen,
        query: &Query,
        mut request: Request<Payload>,
    ) -> Result<Response<Body>, Status> {
        let Some(route) = &seen.route else {
            return nonresource::answer(self, &request, query);
        };
        if (seen.verb == "watch" || route.subresource == "log")
            && let Some(asked) = websocket::Asked::of(&mut request, seen.verb == "watch")?
        {
            let answer = Box::pin(self.dispatch(user, peer, seen, query, request)).await?;
            return Ok(asked.answer(answer));
        }
        let (parts, body) = request.into_parts();
        let rest =
            rest::Request { server: self, route, verb: seen.verb, query, user, headers: &parts.headers };
        let kind = rest.kind()?;
        if matches!(route.subresource.as_str(), "log" | "exec" | "attach" | "portforward" | "proxy") {
            let request = Request::from_parts(parts, body);
            return self.proxy.connect(self, kind, route, query, peer.address, request).await;
        }
        rest.answer(kind, body).await
    }
}

/// A short text as an answer.
pub fn text(code: u16, text: &'static str) -> Response<Body> {
    respond::bytes(code, "text/plain; charset=utf-8", text)
}

/// Whether the request may go on for as long as it likes.
fn stays(seen: &Seen) -> bool {
    let subresource = seen.route.as_ref().map_or("", |route| route.subresource.as_str());
    seen.verb == "watch" || matches!(subresource, "log" | "exec" | "attach" | "portforward" | "proxy")
}

/// The name that a field selector asks for: authorization may be for that one only.
fn selected_name(selector: &str) -> Option<&str> {
    selector.split(',').find_map(|term| {
        let name = term.strip_prefix("metadata.name=")?;
        Some(name.strip_prefix('=').unwrap_or(name))
    })
}

fn method_verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "",
    }
}

/// The client's audit id, or a new one.
fn audit_id(request: &Request<Payload>) -> HeaderValue {
    let given = request.headers().get(&AUDIT_ID).filter(|id| !id.is_empty() && id.len() <= 64);
    given.cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().to_string()).expect("a uuid is a header value")
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_field_selector_may_name_one_object() {
        assert_eq!(selected_name("metadata.name=a"), Some("a"));
        assert_eq!(selected_name("x=y,metadata.name==a"), Some("a"));
        assert_eq!(selected_name("metadata.namespace=a"), None);
    }
}
