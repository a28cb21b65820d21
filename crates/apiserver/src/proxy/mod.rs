//! Requests that other servers answer: kubelets (logs, exec, attach, port-forward, and themselves), pods
//! and services.
//!
//! This file finds out whom to ask; `forward` does the asking. Upstream: pkg/registry/core/{pod,service,node}/rest.

mod forward;

use std::net::{IpAddr, SocketAddr};

use http::{Method, Request, Response};
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::{Key, Kind, Status};
use rand::Rng;
use serde_json::Value;

use crate::Config;
use crate::http::{Body, Payload, Query, Route, Server};
use crate::kinds::tree::Tree;

pub use forward::Proxy;
use forward::{Security, Target};

/// Where kubelets listen unless their node says otherwise.
const KUBELET_PORT: u16 = 10250;

impl Proxy {
    /// Passes a request on to whom it is for, and the answer back.
    pub async fn connect(
        &self,
        server: &Server,
        kind: &'static Kind,
        route: &Route,
        query: &Query,
        peer: SocketAddr,
        request: Request<Payload>,
    ) -> Result<Response<Body>, Status> {
        let asked = Asked { server, kind, route, query };
        let stop = &server.stop_watches;
        match (kind.kind, route.subresource.as_str()) {
            ("Pod", "log") => match asked.log()? {
                // A pod without a node has said nothing yet.
                None => Ok(crate::http::text(200, "")),
                Some(target) => {
                    let answer = self.forward(target, request, peer, stop).await?;
                    forward::log_answer(answer, kind, &route.name).await
                }
            },
            ("Pod", "exec" | "attach" | "portforward") => {
                let target =
                    if route.subresource == "portforward" { asked.port_forward()? } else { asked.exec()? };
                if !forward::is_upgrade(request.headers()) {
                    return Err(Status::bad_request("Upgrade request required"));
                }
                self.forward(target, request, peer, stop).await
            }
            (_, "proxy") => {
                // Without its slash, relative links in the answer would lead astray.
                if route.rest.is_empty()
                    && *request.method() == Method::GET
                    && !forward::is_upgrade(request.headers())
                {
                    return Ok(forward::redirect_to_slash(request.uri()));
                }
                let prefix = request.uri().path().strip_suffix(&route.rest).unwrap_or_default().to_owned();
                let target = match kind.kind {
                    "Pod" => asked.pod_target(&request)?,
                    "Service" => asked.service_target(&request)?,
                    _ => asked.node_target(&request)?,
                };
                let answer = self.forward(target, request, peer, stop).await?;
                Ok(forward::keep_below(answer, &prefix))
            }
            _ => Err(Status::no_such_resource()),
        }
    }
}

/// The kubelet of a node (the object `value`, named `node`), at `path`.
pub fn kubelet(value: &Value, node: &str, path: String) -> Result<Target, Status> {
    let status = value.at("status");
    let of_type = |ty: &str| status.items("addresses").iter().find(|a| a.text("type") == ty);
    let address = ["InternalIP", "Hostname", "InternalDNS", "ExternalIP", "ExternalDNS"]
        .into_iter()
        .find_map(of_type)
        .map(|address| address.text("address").to_owned())
        .ok_or_else(|| {
            Status::internal(format!("no preferred addresses found; known addresses: [] of node {node}"))
        })?;
    let port = status.at("daemonEndpoints").at("kubeletEndpoint").int("Port");
    let port =
        port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0).unwrap_or(KUBELET_PORT);
    Ok(Target { host: address, port, path, security: Security::Kubelet })
}

/// What is asked for.
struct Asked<'a> {
    server: &'a Server,
    kind: &'static Kind,
    route: &'a Route,
    query: &'a Query,
}

impl Asked<'_> {
    fn object(&self, kind: &'static Kind, namespace: &str, name: &str) -> Result<Value, Status> {
        let object = self.server.registry.store.get(kind, &Key::new(namespace, name));
        object.map(|object| object.value()).ok_or_else(|| Status::not_found(kind, name))
    }

    fn pod(&self) -> Result<Value, Status> {
        self.object(self.kind, &self.route.namespace, &self.route.name)
    }

    fn kubelet(&self, node: &str, path: String) -> Result<Target, Status> {
        kubelet(&self.object(Kind::of::<Node>(), "", node)?, node, path)
    }

    /// The node of a pod.
    fn host<'v>(&self, pod: &'v Value) -> Result<&'v str, Status> {
        match pod.at("spec").text("nodeName") {
            "" => Err(Status::bad_request(format!("pod {} does not have a host assigned", self.route.name))),
            node => Ok(node),
        }
    }

    fn log(&self) -> Result<Option<Target>, Status> {
        check_log_options(self.query, &self.route.name)?;
        let pod = self.pod()?;
        let container = container_of(&pod, self.query.get("container"))?;
        let node = pod.at("spec").text("nodeName");
        if node.is_empty() {
            return Ok(None);
        }
        let mut parameters = Parameters::default();
        for name in ["follow", "previous", "timestamps"] {
            if self.query.flag(name) {
                parameters.add(name, "true");
            }
        }
        for name in ["sinceSeconds", "sinceTime", "tailLines", "limitBytes"] {
            if let Some(value) = self.query.get(name).filter(|value| !value.is_empty()) {
                parameters.add(name, value);
            }
        }
        let (namespace, name) = (encode(&self.route.namespace), encode(&self.route.name));
        let path = format!("/containerLogs/{namespace}/{name}/{}{}", encode(&container), parameters.0);
        self.kubelet(node, path).map(Some)
    }

    fn exec(&self) -> Result<Target, Status> {
        let pod = self.pod()?;
        let subresource = self.route.subresource.as_str();
        let phase = pod.at("status").text("phase");
        if matches!(phase, "Succeeded" | "Failed") {
            let what = if subresource == "exec" { "exec into" } else { "attach to" };
            return Err(Status::bad_request(format!(
                "cannot {what} a container in a completed pod; current phase is {phase}"
            )));
        }
        let container = container_of(&pod, self.query.get("container"))?;
        let node = self.host(&pod)?;
        let mut parameters = Parameters::default();
        for (ours, kubelets) in
            [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")]
        {
            if self.query.flag(ours) {
                parameters.add(kubelets, "1");
            }
        }
        if subresource == "exec" {
            self.query.all("command").for_each(|word| parameters.add("command", word));
        }
        let (namespace, name) = (encode(&self.route.namespace), encode(&self.route.name));
        self.kubelet(
            node,
            format!("/{subresource}/{namespace}/{name}/{}{}", encode(&container), parameters.0),
        )
    }

    fn port_forward(&self) -> Result<Target, Status> {
        let pod = self.pod()?;
        let node = self.host(&pod)?;
        let mut parameters = Parameters::default();
        self.query
            .all("ports")
            .flat_map(|ports| ports.split(','))
            .for_each(|port| parameters.add("port", port));
        let (namespace, name) = (encode(&self.route.namespace), encode(&self.route.name));
        self.kubelet(node, format!("/portForward/{namespace}/{name}{}", parameters.0))
    }

    /// `[scheme:]name[:port]`, as proxied names are written.
    fn proxied_name(&self) -> Result<ProxiedName<'_>, Status> {
        let parts: Vec<&str> = self.route.name.split(':').collect();
        let (scheme, name, port) = match parts[..] {
            [name] => ("", name, ""),
            [name, port] => ("", name, port),
            [scheme @ ("" | "http" | "https"), name, port] => (scheme, name, port),
            _ => {
                return Err(Status::bad_request(format!(
                    "invalid {} request {:?}",
                    self.kind.singular, self.route.name
                )));
            }
        };
        let security = if scheme == "https" { Security::Unverified } else { Security::None };
        Ok(ProxiedName { name, port, security })
    }

    fn pod_target<B>(&self, request: &Request<B>) -> Result<Target, Status> {
        let ProxiedName { name, port, security } = self.proxied_name()?;
        let pod = self.object(Kind::of::<Pod>(), &self.route.namespace, name)?;
        let ports = || pod.at("spec").items("containers").iter().flat_map(|c| c.items("ports"));
        let number = |port: &Value| port.int("containerPort").and_then(|port| u16::try_from(port).ok());
        let port = match port {
            "" => ports().find_map(number).unwrap_or(80),
            text => match text.parse() {
                Ok(number) => number,
                Err(_) => {
                    let named = ports().find(|port| port.text("name") == text).and_then(number);
                    named.ok_or_else(|| {
                        Status::bad_request(format!("pod {name} has no port named {text:?}"))
                    })?
                }
            },
        };
        let ip = pod.at("status").text("podIP");
        let host = proxyable(ip)?.to_owned();
        Ok(Target { host, port, path: self.path(request), security })
    }

    fn service_target<B>(&self, request: &Request<B>) -> Result<Target, Status> {
        let ProxiedName { name, port, security } = self.proxied_name()?;
        let namespace = &self.route.namespace;
        let service = self.object(Kind::of::<Service>(), namespace, name)?;
        let none = || Status::unavailable(format!("no endpoints available for service {name:?}"));
        let ports = service.at("spec").items("ports");
        let port = match port {
            "" if ports.len() == 1 => &ports[0],
            text => ports
                .iter()
                .find(|p| p.text("name") == text || p.int("port").is_some_and(|n| n.to_string() == text))
                .ok_or_else(|| {
                    Status::unavailable(format!("no service port {text:?} found for service {name:?}"))
                })?,
        };
        let slices = self.server.registry.snapshots.list(Kind::of::<EndpointSlice>(), namespace);
        let mut places: Vec<(String, u16)> = Vec::new();
        for slice in
            slices.iter().filter(|slice| slice.labels().get("kubernetes.io/service-name") == Some(name))
        {
            let slice = slice.value();
            let found = slice.items("ports").iter().find(|p| p.text("name") == port.text("name"));
            let number = found.and_then(|p| p.int("port")).and_then(|p| u16::try_from(p).ok());
            let Some(number) = number else { continue };
            let ready = slice
                .items("endpoints")
                .iter()
                .filter(|endpoint| endpoint.at("conditions").at("ready").as_bool() != Some(false));
            let addresses = ready.filter_map(|endpoint| endpoint.items("addresses").first()?.as_str());
            places.extend(addresses.map(|address| (address.to_owned(), number)));
        }
        if places.is_empty() {
            return Err(none());
        }
        let (host, port) = places.swap_remove(rand::rng().random_range(0..places.len()));
        proxyable(&host)?;
        Ok(Target { host, port, path: self.path(request), security })
    }

    fn node_target<B>(&self, request: &Request<B>) -> Result<Target, Status> {
        let ProxiedName { name, port, .. } = self.proxied_name()?;
        let mut target = self.kubelet(name, self.path(request))?;
        if !port.is_empty() && port != target.port.to_string() {
            target.port = port.parse().map_err(|_| Status::bad_request(format!("invalid port {port:?}")))?;
            target.security = Security::None;
        }
        Ok(target)
    }

    /// What follows `/proxy`, with the query, as it was sent.
    fn path<B>(&self, request: &Request<B>) -> String {
        let rest = if self.route.rest.is_empty() { "/" } else { &self.route.rest };
        match request.uri().query() {
            Some(query) => format!("{rest}?{query}"),
            None => rest.to_owned(),
        }
    }
}

/// Refuses addresses by which a pod's status could lead to services of this very machine.
fn proxyable(address: &str) -> Result<&str, Status> {
    let allowed = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => {
            !(ip.is_loopback()
                || ip.is_link_local()
                || ip.is_multicast()
                || ip.is_unspecified()
                || ip.is_broadcast())
        }
        Ok(IpAddr::V6(ip)) => {
            !(ip.is_loopback() || ip.is_unicast_link_local() || ip.is_multicast() || ip.is_unspecified())
        }
        Err(_) => false,
    };
    if allowed { Ok(address) } else { Err(Status::bad_request("address not allowed")) }
}

struct ProxiedName<'a> {
    name: &'a str,
    port: &'a str,
    security: Security,
}

/// A query that is being written.
#[derive(Default)]
struct Parameters(String);

impl Parameters {
    fn add(&mut self, name: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '?' } else { '&' });
        self.0 += &format!("{name}={}", encode(value));
    }
}

/// Percent-encodes everything that may mean something in a path or query.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// The container that is meant, in upstream's words when that is not clear.
fn container_of(pod: &Value, asked: Option<&str>) -> Result<String, Status> {
    let names = |list: &str| -> Vec<String> {
        pod.at("spec").items(list).iter().map(|c| c.text("name").to_owned()).collect()
    };
    let pod_name = pod.at("metadata").text("name");
    let (main, init, ephemeral) =
        (names("containers"), names("initContainers"), names("ephemeralContainers"));
    match asked {
        Some(name) => {
            if [&main, &init, &ephemeral].into_iter().flatten().any(|known| known == name) {
                return Ok(name.to_owned());
            }
            Err(Status::bad_request(format!("container {name} is not valid for pod {pod_name}")))
        }
        None if main.len() == 1 => Ok(main[0].clone()),
        None => {
            let mut message = format!(
                "a container name must be specified for pod {pod_name}, choose one of: [{}]",
                main.join(" ")
            );
            if !init.is_empty() {
                message += &format!(" or one of the init containers: [{}]", init.join(" "));
            }
            if !ephemeral.is_empty() {
                message += &format!(" or one of the debug containers: [{}]", ephemeral.join(" "));
            }
            Err(Status::bad_request(message))
        }
    }
}

/// What cannot be read is a bad request, what cannot be meant is invalid, as upstream divides them.
fn check_log_options(query: &Query, pod: &str) -> Result<(), Status> {
    let given = |name: &str| query.get(name).filter(|text| !text.is_empty());
    let mut errors = minke_api::FieldErrors::default();
    let least = [
        ("tailLines", 0, "must be greater than or equal to 0"),
        ("limitBytes", 1, "must be greater than 0"),
        ("sinceSeconds", 1, "must be greater than 0"),
    ];
    for (name, least, why) in least {
        let Some(text) = given(name) else { continue };
        let number: i64 = text.parse().map_err(|error: std::num::ParseIntError| {
            let why = match error.kind() {
                std::num::IntErrorKind::PosOverflow | std::num::IntErrorKind::NegOverflow => {
                    "value out of range"
                }
                _ => "invalid syntax",
            };
            Status::bad_request(format!("strconv.ParseInt: parsing {text:?}: {why}"))
        })?;
        if number < least {
            errors.invalid(name, number, why);
        }
    }
    if let Some(text) = given("sinceTime") {
        let time: Result<jiff::Timestamp, _> = text.parse();
        time.map_err(|_| {
            Status::bad_request(format!(
                "parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse"
            ))
        })?;
        if given("sinceSeconds").is_some() {
            let why = "at most one of `sinceTime` or `sinceSeconds` may be specified";
            errors.forbidden("sinceSeconds", why);
        }
    }
    errors.into_result(&crate::registry::unlisted("", "PodLogOptions"), pod)
}

/// What this server shows to kubelets, and by what it knows them.
pub fn new(config: &Config) -> Result<Proxy, String> {
    Proxy::new(&config.kubelet_client_cert, &config.kubelet_client_key, &config.kubelet_ca)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(containers: &[&str], init: &[&str], asked: Option<&str>, want: Result<&str, &str>) {
        let list = |names: &[&str]| names.iter().map(|n| json!({"name": n})).collect::<Vec<_>>();
        let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": list(containers), "initContainers": list(init)}});
        let got = container_of(&pod, asked).map_err(|status| status.message);
        assert_eq!(got, want.map(str::to_owned).map_err(str::to_owned));
    }

    #[test]
    fn the_container_must_be_clear() {
        check(&["a"], &[], None, Ok("a"));
        check(&["a"], &["i"], Some("i"), Ok("i"));
        check(&["a"], &["i"], None, Ok("a"));
        check(&["a"], &[], Some("x"), Err("container x is not valid for pod p"));
        check(
            &["a", "b"],
            &["i"],
            None,
            Err(
                "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]",
            ),
        );
    }

    #[track_caller]
    fn check_options(query: &str, want: Result<(), (u16, &str)>) {
        let got = check_log_options(&Query::parse(Some(query)), "p");
        let got = got.map_err(|status| (status.code, status.message));
        assert_eq!(got, want.map_err(|(code, text)| (code, text.to_owned())), "{query}");
    }

    #[test]
    fn options_of_logs_are_checked() {
        check_options("tailLines=0&limitBytes=1&sinceTime=2026-01-01T00:00:00Z&follow=x", Ok(()));
        check_options("tailLines=", Ok(()));
        check_options("tailLines=x", Err((400, "strconv.ParseInt: parsing \"x\": invalid syntax")));
        check_options(
            "sinceTime=x",
            Err((400, "parsing time \"x\" as \"2006-01-02T15:04:05Z07:00\": cannot parse")),
        );
        let invalid = |why: &'static str| Err((422, why));
        check_options(
            "limitBytes=0",
            invalid("PodLogOptions \"p\" is invalid: limitBytes: Invalid value: 0: must be greater than 0"),
        );
        check_options(
            "sinceSeconds=5&sinceTime=2026-01-01T00:00:00Z",
            invalid(
                "PodLogOptions \"p\" is invalid: sinceSeconds: Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified",
            ),
        );
    }

    #[test]
    fn the_way_back_into_this_machine_is_closed() {
        for address in ["10.244.0.7", "192.0.2.1", "2001:db8::1"] {
            assert_eq!(proxyable(address), Ok(address));
        }
        for address in
            ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "", "localhost"]
        {
            assert_eq!(proxyable(address).unwrap_err().message, "address not allowed");
        }
    }

    #[test]
    fn parameters_are_encoded() {
        let mut parameters = Parameters::default();
        parameters.add("command", "echo a&b");
        parameters.add("input", "1");
        assert_eq!(parameters.0, "?command=echo%20a%26b&input=1");
    }
}
