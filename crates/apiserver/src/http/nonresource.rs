//! Paths that are no resources: discovery, version, health, metrics, OpenAPI, OpenID.

use std::sync::Arc;

use http::header::{self, HeaderValue};
use http::{Method, Request, Response};
use minke_api::{KINDS, Status};
use serde_json::{Value, json};

use super::body::Body;
use super::route::Query;
use super::{Server, discovery, openapi, respond};

/// The version that this server answers as.
const MAJOR: &str = "1";
const MINOR: &str = "37";
const GIT_VERSION: &str = "v1.37.0+minke";

/// Checks that `/healthz`, `/livez` and `/readyz` consist of.
const CHECKS: &[Check] = &[
    Check { name: "ping", ready_only: false },
    Check { name: "log", ready_only: false },
    Check { name: "etcd", ready_only: false },
    Check { name: "etcd-readiness", ready_only: true },
    Check { name: "shutdown", ready_only: true },
];

struct Check {
    name: &'static str,
    ready_only: bool,
}

pub fn answer<B>(
    server: &Arc<Server>,
    request: &Request<B>,
    query: &Query,
) -> Result<Response<Body>, Status> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Status::no_such_resource());
    }
    let path = match request.uri().path().trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    if let Some(answer) = discovery::answer(path, request.headers()) {
        return answer;
    }
    match path {
        "/" => Ok(respond::json(200, &json!({"paths": root_paths()}))),
        "/version" => Ok(respond::json(200, &version())),
        "/metrics" => Ok(respond::bytes(
            200,
            "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
            server.metrics.render(&server.registry.store),
        )),
        "/.well-known/openid-configuration" => {
            let document = server.registry.tokens.openid_configuration(&server.jwks_uri());
            let mut response = respond::json(200, &document);
            response
                .headers_mut()
                .insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
            Ok(response)
        }
        "/openid/v1/jwks" => {
            let keys = serde_json::to_vec(&server.registry.tokens.jwks()).expect("keys serialise");
            let mut response = respond::bytes(200, "application/jwk-set+json", keys);
            response
                .headers_mut()
                .insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
            Ok(response)
        }
        "/openapi/v2" => openapi::v2(request.headers()),
        _ if path == "/openapi/v3" || path.starts_with("/openapi/v3/") => {
            openapi::v3(path, query, request.headers())
        }
        _ => match health(server, path, query) {
            Some(response) => Ok(response),
            None => Err(Status::no_such_resource()),
        },
    }
}

impl Server {
    fn jwks_uri(&self) -> String {
        format!("https://{}/openid/v1/jwks", self.config.advertise)
    }

    /// Whether a check passes.
    fn passes(&self, check: &str) -> bool {
        match check {
            "shutdown" => !self.stop_watches.is_cancelled(),
            "etcd" | "etcd-readiness" => self.registry.store.is_writable(),
            _ => true,
        }
    }
}

fn version() -> Value {
    json!({
        "major": MAJOR,
        "minor": MINOR,
        "emulationMajor": MAJOR,
        "emulationMinor": MINOR,
        "minCompatibilityMajor": MAJOR,
        "minCompatibilityMinor": "36",
        "gitVersion": GIT_VERSION,
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        // Clients expect the fields; there is no Go in here.
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("linux/{}", match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", arch => arch }),
    })
}

fn root_paths() -> Vec<String> {
    let mut paths: Vec<String> = ["/.well-known/openid-configuration", "/api", "/api/v1", "/apis", "/apis/"]
        .into_iter()
        .chain([
            "/healthz",
            "/livez",
            "/metrics",
            "/openapi/v2",
            "/openapi/v3",
            "/openid/v1/jwks",
            "/readyz",
            "/version",
        ])
        .map(str::to_owned)
        .collect();
    for kind in KINDS.iter().filter(|kind| !kind.group.is_empty()) {
        paths.push(format!("/apis/{}", kind.group));
        paths.push(format!("/apis/{}/{}", kind.group, kind.version));
    }
    for endpoint in ["healthz", "livez", "readyz"] {
        let checks = CHECKS.iter().filter(|check| endpoint == "readyz" || !check.ready_only);
        paths.extend(checks.map(|check| format!("/{endpoint}/{}", check.name)));
    }
    paths.sort();
    paths.dedup();
    paths
}

/// The answer of `/healthz`, `/livez`, `/readyz` and the checks below them.
fn health(server: &Server, path: &str, query: &Query) -> Option<Response<Body>> {
    let mut parts = path.strip_prefix('/')?.splitn(2, '/');
    let endpoint = parts.next().filter(|e| matches!(*e, "healthz" | "livez" | "readyz"))?;
    let mut checks = CHECKS.iter().filter(|check| endpoint == "readyz" || !check.ready_only);
    let text = |code, body: String| {
        let mut response = respond::bytes(code, "text/plain; charset=utf-8", body);
        response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    };
    if let Some(name) = parts.next() {
        let check = checks.find(|check| check.name == name)?;
        return Some(if server.passes(check.name) {
            text(200, "ok".to_owned())
        } else {
            text(500, format!("internal server error: {name} failed: reason withheld\n"))
        });
    }
    let mut excluded: Vec<&str> = query.all("exclude").filter(|name| !name.is_empty()).collect();
    let mut lines = String::new();
    let mut failed = false;
    for check in checks {
        if let Some(at) = excluded.iter().position(|name| *name == check.name) {
            excluded.remove(at);
            lines += &format!("[+]{} excluded: ok\n", check.name);
        } else if server.passes(check.name) {
            lines += &format!("[+]{} ok\n", check.name);
        } else {
            failed = true;
            lines += &format!("[-]{} failed: reason withheld\n", check.name);
        }
    }
    if !excluded.is_empty() {
        let names: Vec<String> = excluded.iter().map(|name| format!("{name:?}")).collect();
        lines +=
            &format!("warn: some health checks cannot be excluded: no matches for {}\n", names.join(","));
    }
    Some(match (failed, query.has("verbose")) {
        (true, _) => text(500, lines + &format!("{endpoint} check failed\n")),
        (false, true) => text(200, lines + &format!("{endpoint} check passed\n")),
        (false, false) => text(200, "ok".to_owned()),
    })
}
