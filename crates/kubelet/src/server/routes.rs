//! Paths, parameters and answers of the server.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_runtime::{AttachSpec, ContainerState, ContainerStatus, Event, ExecSpec};
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::metrics::{self, CONTENT_TYPE as TEXT};
use super::remote::{self, Protocol, Wanted};
use super::upgrade::{Upgrade, handed_over};
use super::websocket::{Channels, Spelling, Tunnel};
use super::{Api, commands, configz, follow, node_logs, port_forward, spdy, stats};
use crate::pod::Pod;

pub type Body = BoxBody<Bytes, io::Error>;

/// Messages of a log that wait for a slow client.
const LOG_AHEAD: usize = 16;
/// Arguments of one command, and parameters of one request.
const PARAMETERS_MAX: usize = 4096;

/// Who calls, as the certificate says.
#[derive(Debug, Default)]
pub struct Caller {
    pub user: String,
    pub groups: HashSet<String>,
}

impl Caller {
    pub fn of(certificate: &[u8]) -> Option<Caller> {
        let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let subject = certificate.subject();
        let text =
            |part: &x509_parser::x509::AttributeTypeAndValue<'_>| part.as_str().ok().map(str::to_owned);
        Some(Caller {
            user: subject.iter_common_name().next().and_then(text).unwrap_or_default(),
            groups: subject.iter_organization().filter_map(text).collect(),
        })
    }

    /// The API server's client, and administrators: those who may do everything.
    pub fn may_call(&self) -> bool {
        self.user == "kube-apiserver-kubelet-client" || self.groups.contains("system:masters")
    }
}

pub fn empty() -> Body {
    text_body(Bytes::new())
}

fn text_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

pub fn answer_with(status: StatusCode, kind: &'static str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(text_body(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

pub fn text(status: StatusCode, text: String) -> Response<Body> {
    answer_with(status, "text/plain; charset=utf-8", text)
}

fn bad(why: impl Into<String>) -> Response<Body> {
    text(StatusCode::BAD_REQUEST, why.into())
}

fn missing(why: impl Into<String>) -> Response<Body> {
    text(StatusCode::NOT_FOUND, why.into())
}

/// The parameters of a request, in order.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(query: &str) -> Query {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).take(PARAMETERS_MAX);
        let decoded = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decode(name), percent_decode(value))
        });
        Query(decoded.collect())
    }

    /// For fuzzing.
    pub(crate) fn ports(query: &str) -> Option<Vec<u16>> {
        ports(&Query::parse(query)).ok()
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn flag(&self, names: &[&str]) -> bool {
        names.iter().any(|name| matches!(self.get(name), Some("1" | "true" | "True" | "TRUE" | "t" | "T")))
    }
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                at += 1;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

pub async fn answer(api: &Arc<Api>, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(percent_decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let streams = matches!(*request.method(), Method::GET | Method::POST);
    let (reads, posts) = (*request.method() == Method::GET, *request.method() == Method::POST);
    match parts.as_slice() {
        ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] if reads => {
            text(StatusCode::OK, "ok".to_owned())
        }
        ["pods"] if reads => pods(api),
        ["runningpods"] if reads => running_pods(api).await,
        ["metrics"] if reads => answer_with(StatusCode::OK, TEXT, metrics::kubelet(api).await),
        ["metrics", "resource"] if reads => answer_with(StatusCode::OK, TEXT, metrics::resource(api).await),
        ["metrics", "cadvisor"] if reads => answer_with(StatusCode::OK, TEXT, metrics::cadvisor(api).await),
        ["metrics", "probes"] if reads => answer_with(StatusCode::OK, TEXT, metrics::probes(api)),
        ["configz"] if reads => json(&configz::answer(&api.context)),
        // Asking by POST is as old as the page.
        ["stats", "summary"] if streams => {
            json(&stats::summary(api, query.flag(&["only_cpu_and_memory"])).await)
        }
        ["containerLogs", namespace, pod, container] if reads => {
            let found = Found::new(api, namespace, pod, None);
            match found {
                Ok(found) => logs(api, &found, container, &query).await.unwrap_or_else(|refusal| refusal),
                Err(refusal) => refusal,
            }
        }
        ["exec" | "attach", namespace, pod, rest @ ..] if streams && (1..=2).contains(&rest.len()) => {
            let uid = (rest.len() == 2).then(|| rest[0]);
            let found = Found::new(api, namespace, pod, uid);
            let (is_exec, container) = (parts[0] == "exec", rest[rest.len() - 1]);
            match found {
                Ok(found) => command(api, request, &found, container, &query, is_exec).await,
                Err(refusal) => refusal,
            }
        }
        ["portForward", namespace, pod, rest @ ..] if streams && rest.len() <= 1 => {
            match Found::new(api, namespace, pod, rest.first().copied()) {
                Ok(found) => forward(api, request, &found, &query).await.unwrap_or_else(|refusal| refusal),
                Err(refusal) => refusal,
            }
        }
        ["run", namespace, pod, rest @ ..] if posts && (1..=2).contains(&rest.len()) => {
            match Found::new(api, namespace, pod, (rest.len() == 2).then(|| rest[0])) {
                Ok(found) => commands::run(api, &found, rest[rest.len() - 1], &query).await,
                Err(refusal) => refusal,
            }
        }
        ["checkpoint", namespace, pod, container] if posts => {
            let found = Found::new(api, namespace, pod, None).ok();
            commands::checkpoint(found.as_ref(), namespace, pod, container, &query)
        }
        ["logs", path @ ..] if reads => node_logs::answer(node_logs::ROOT, path.join("/")).await,
        _ if is_known(&parts) => text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed".to_owned()),
        _ => missing("404 page not found\n"),
    }
}

/// Whether there is something at that path, for those who ask by the right method.
fn is_known(parts: &[&str]) -> bool {
    match parts {
        ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] | ["pods" | "runningpods" | "configz"] => true,
        ["metrics"] | ["metrics", "resource" | "cadvisor" | "probes"] | ["stats", "summary"] => true,
        ["logs", ..] => true,
        [what, _, _, _] => {
            matches!(*what, "containerLogs" | "exec" | "attach" | "run" | "checkpoint" | "portForward")
        }
        [what, _, _, _, _] => matches!(*what, "exec" | "attach" | "run"),
        ["portForward", _, _] => true,
        _ => false,
    }
}

fn json(value: &impl serde::Serialize) -> Response<Body> {
    let bytes = serde_json::to_vec(value).expect("values print");
    answer_with(StatusCode::OK, "application/json", bytes)
}

/// The pods of this node, as the API server shows them: its own bytes, strung together.
fn pods(api: &Api) -> Response<Body> {
    let mut out = br#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":["#.to_vec();
    for (index, pod) in api.pods.snapshot().values().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(pod.json());
    }
    out.extend(b"]}");
    answer_with(StatusCode::OK, "application/json", out)
}

async fn running_pods(api: &Api) -> Response<Body> {
    let sandboxes = api.context.runtime.list().await.unwrap_or_default();
    let running = sandboxes.iter().filter(|s| s.state == minke_runtime::SandboxState::Ready);
    let items: Vec<_> = running
        .map(|s| serde_json::json!({"metadata": {"name": s.spec.name, "namespace": s.spec.namespace, "uid": s.spec.uid},
            "spec": {"containers": s.containers.iter().filter(|c| c.state == ContainerState::Running)
                .map(|c| serde_json::json!({"name": c.name, "image": c.image})).collect::<Vec<_>>()}}))
        .collect();
    json(&serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}))
}

/// The pod that a request is about.
pub struct Found {
    pub pod: Pod,
}

impl Found {
    fn new(api: &Api, namespace: &str, name: &str, uid: Option<&str>) -> Result<Found, Response<Body>> {
        let pod = api.pods.get(namespace, name).and_then(Pod::new);
        let pod = pod.filter(|pod| uid.is_none_or(|uid| pod.uid() == uid || pod.uid_here() == uid));
        let pod = pod.ok_or_else(|| missing(format!("pod \"{name}\" not found")))?;
        Ok(Found { pod })
    }

    /// The runtime's containers of that name, newest first.
    pub async fn containers(&self, api: &Api, name: &str) -> Vec<ContainerStatus> {
        let sandboxes = api.context.runtime.list().await.unwrap_or_default();
        let own = sandboxes.into_iter().filter(|sandbox| sandbox.spec.uid == self.pod.uid_here());
        let mut all: Vec<_> = own.flat_map(|sandbox| sandbox.containers).filter(|c| c.name == name).collect();
        all.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
        all
    }

    /// Why a container is not running yet.
    fn waits_for(&self, name: &str) -> String {
        let status = self.pod.status();
        let lists = status.map(|status| {
            [
                &status.container_statuses,
                &status.init_container_statuses,
                &status.ephemeral_container_statuses,
            ]
        });
        let found = lists.into_iter().flatten().flatten().flatten().find(|known| known.name == name);
        let waiting = found.and_then(|known: &core::ContainerStatus| known.state.as_ref()?.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref()).unwrap_or("ContainerCreating");
        match reason {
            "ErrImagePull" => "image can't be pulled".to_owned(),
            "ImagePullBackOff" => "trying and failing to pull image".to_owned(),
            reason => reason.to_owned(),
        }
    }
}

/// Choosing which container's log is meant.
fn choose(containers: &[ContainerStatus], previous: bool) -> Option<&ContainerStatus> {
    let mut ran = containers.iter().filter(|c| c.state != ContainerState::Created);
    if !previous {
        return ran.next();
    }
    let latest = ran.next()?;
    match latest.state {
        // Between two runs, the one that ended last is the previous one.
        ContainerState::Exited if ran.clone().next().is_none() => Some(latest).filter(|_| latest.attempt > 0),
        _ => ran.next(),
    }
}

async fn logs(
    api: &Arc<Api>,
    found: &Found,
    name: &str,
    query: &Query,
) -> Result<Response<Body>, Response<Body>> {
    let pod = found.pod.name();
    if found.pod.container(name).is_none() {
        return Err(missing(format!("container \"{name}\" not found in pod \"{pod}\"")));
    }
    let number = |name: &str| match query.get(name).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(value) => value.parse::<u64>().map(Some).map_err(|_| {
            let why = format!("{name}: Invalid value: \"{value}\": must be greater than or equal to 0");
            text(StatusCode::UNPROCESSABLE_ENTITY, why)
        }),
    };
    let since_seconds = number("sinceSeconds")?;
    let since = match query.get("sinceTime").filter(|text| !text.is_empty()) {
        Some(text) => Some(text.parse().map_err(|_| bad(format!("sinceTime: Invalid value: \"{text}\"")))?),
        None => since_seconds.map(|seconds| {
            Timestamp::now()
                - SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX / 4).min(315_360_000))
        }),
    };
    let options = follow::Options {
        follow: query.flag(&["follow"]),
        timestamps: query.flag(&["timestamps"]),
        tail: number("tailLines")?,
        since,
        limit: number("limitBytes")?,
    };
    // Before the state is read, so that an exit after that is heard of.
    let events = api.context.runtime.subscribe();
    let containers = found.containers(api, name).await;
    let previous = query.flag(&["previous"]);
    let Some(container) = choose(&containers, previous) else {
        return Err(bad(match previous {
            true => format!("previous terminated container \"{name}\" in pod \"{pod}\" not found"),
            false => {
                format!(
                    "container \"{name}\" in pod \"{pod}\" is waiting to start: {}",
                    found.waits_for(name)
                )
            }
        }));
    };
    let ended = CancellationToken::new();
    if container.state == ContainerState::Exited {
        ended.cancel();
    } else if options.follow {
        tokio::spawn(watch_end(api.clone(), container.id.clone(), events, ended.clone()));
    }
    let (out, chunks) = mpsc::channel(LOG_AHEAD);
    let path = container.log_path.clone();
    let stopped = ended.clone().drop_guard();
    tokio::spawn(async move {
        let result = follow::send(&path, options, ended, out.clone()).await;
        drop(stopped);
        if let Err(error) = result
            && error.kind() != io::ErrorKind::NotFound
        {
            let text = format!("failed to read log: {error}\n");
            let _ = out.send(Ok(text.into())).await;
        }
    });
    let frames = futures_util::stream::unfold(chunks, |mut chunks| async {
        let chunk: io::Result<Bytes> = chunks.recv().await?;
        Some((chunk.map(Frame::data), chunks))
    });
    let mut response =
        Response::new(BodyExt::boxed(StreamBody::new(SyncStream(std::sync::Mutex::new(Box::pin(frames))))));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// A stream behind a lock, for a body must be `Sync` though nobody ever shares it.
struct SyncStream<S>(std::sync::Mutex<std::pin::Pin<Box<S>>>);

impl<S: futures_util::Stream> futures_util::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        self.0.get_mut().expect("nobody locks it").as_mut().poll_next(cx)
    }
}

/// Cancels `ended` when the container ends, or when nobody wants to know any more.
async fn watch_end(
    api: Arc<Api>,
    id: String,
    mut events: broadcast::Receiver<Event>,
    ended: CancellationToken,
) {
    let _guard = ended.clone().drop_guard();
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = ended.cancelled() => return,
        };
        match event {
            Ok(Event::ContainerExited { status }) if status.id == id => return,
            Ok(_) => {}
            Err(broadcast::error::RecvError::Closed) => return,
            Err(broadcast::error::RecvError::Lagged(_)) => {
                let status = api.context.runtime.container_status(&id).await;
                if status.is_ok_and(|status| status.state == ContainerState::Exited) {
                    return;
                }
            }
        }
    }
}

/// Exec and attach.
async fn command(
    api: &Arc<Api>,
    mut request: Request<Incoming>,
    found: &Found,
    name: &str,
    query: &Query,
    is_exec: bool,
) -> Response<Body> {
    let wanted = Wanted {
        stdin: query.flag(&["input", "stdin"]),
        stdout: query.flag(&["output", "stdout"]),
        stderr: query.flag(&["error", "stderr"]),
        tty: query.flag(&["tty"]),
    };
    // With a terminal both outputs are one.
    let wanted = Wanted { stderr: wanted.stderr && !wanted.tty, ..wanted };
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return bad("you must specify at least 1 of stdin, stdout, stderr");
    }
    let argv: Vec<String> = query.all("command").map(str::to_owned).collect();
    if is_exec && argv.is_empty() {
        return bad("you must specify a command for the container");
    }
    let containers = found.containers(api, name).await;
    let Some(container) = containers.into_iter().find(|c| c.state == ContainerState::Running) else {
        return missing(format!("container not found (\"{name}\")"));
    };
    let upgrade = match Upgrade::of(request.headers()) {
        Ok(upgrade) => upgrade,
        Err(refusal) => return refusal,
    };
    let known = match &upgrade {
        Upgrade::Spdy { .. } => remote::SPDY,
        Upgrade::WebSocket { .. } => remote::WEBSOCKET,
    };
    let names = known.iter().map(|protocol| protocol.name);
    let Some(chosen) = upgrade.choose(names.clone()) else { return upgrade.refuse(names) };
    let protocol = *known.iter().find(|protocol| protocol.name == chosen).expect("it was chosen from these");
    let response = upgrade.accept(chosen);
    let switched = hyper::upgrade::on(&mut request);
    let session = Command { api: api.clone(), container, argv: is_exec.then_some(argv), wanted, protocol };
    let is_spdy = matches!(upgrade, Upgrade::Spdy { .. });
    tokio::spawn(async move {
        let Some(io) = handed_over(switched).await else { return };
        match is_spdy {
            true => session.over_spdy(spdy::session::serve(io)).await,
            false => {
                let spelling =
                    Spelling { base64: chosen.contains("base64"), closes: chosen.starts_with("v5") };
                session.over_websocket(Channels::serve(io, spelling, 5).await).await;
            }
        }
    });
    response
}

/// A command to be run, or an attachment when there is none.
struct Command {
    api: Arc<Api>,
    container: ContainerStatus,
    argv: Option<Vec<String>>,
    wanted: Wanted,
    protocol: Protocol,
}

impl Command {
    async fn over_spdy(self, mut connection: spdy::session::Session) {
        let closed = connection.closed.clone();
        let client =
            remote::Client::from_spdy(&mut connection.incoming, closed, self.wanted, self.protocol).await;
        if let Some(client) = client {
            self.run(client).await;
        }
        // What was written last must still get out: dropping the connection sends it.
        drop(connection);
    }

    async fn over_websocket(self, mut channels: Channels) {
        let client = remote::Client::from_websocket(&mut channels, self.wanted, self.protocol);
        drop(channels);
        self.run(client).await;
    }

    async fn run(self, client: remote::Client) {
        let runtime = &self.api.context.runtime;
        let wanted = self.wanted;
        let (session, shown) = match self.argv {
            Some(argv) => {
                let shown = argv.join(" ");
                let (stdin, stdout, stderr) = (wanted.stdin, wanted.stdout, wanted.stderr);
                let spec = ExecSpec { argv, tty: wanted.tty, stdin, stdout, stderr };
                (runtime.exec(&self.container.id, spec).await, shown)
            }
            None => {
                let spec = AttachSpec { stdin: wanted.stdin, stdout: wanted.stdout, stderr: wanted.stderr };
                (runtime.attach(&self.container.id, spec).await, String::new())
            }
        };
        match session {
            Ok(session) => remote::run(client, session, shown).await,
            Err(error) => client.fail(error.to_string()).await,
        }
    }
}

const FORWARD: &str = "portforward.k8s.io";
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
const FORWARD_CHANNELS: &[&str] = &[TUNNEL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""];

async fn forward(
    api: &Arc<Api>,
    mut request: Request<Incoming>,
    found: &Found,
    query: &Query,
) -> Result<Response<Body>, Response<Body>> {
    let sandboxes = api.context.runtime.list().await.unwrap_or_default();
    let own = sandboxes.into_iter().filter(|sandbox| sandbox.spec.uid == found.pod.uid_here());
    let ready = own.filter(|s| s.state == minke_runtime::SandboxState::Ready).max_by_key(|s| s.spec.attempt);
    let Some(sandbox) = ready else {
        return Err(missing(format!("pod not found (\"{}_{}\")", found.pod.name(), found.pod.namespace())));
    };
    let netns = api.context.runtime.sandbox_netns(&sandbox.spec.id);
    let netns = netns.map_err(|error| text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let name = format!("{}_{}", found.pod.name(), found.pod.namespace());
    let pod = port_forward::Pod { netns, name, uid: found.pod.uid().to_owned() };
    let upgrade = Upgrade::of(request.headers())?;
    let is_spdy = matches!(upgrade, Upgrade::Spdy { .. });
    let known: &[&str] = if is_spdy { &[FORWARD] } else { FORWARD_CHANNELS };
    let Some(chosen) = upgrade.choose(known.iter().copied()) else {
        return Err(upgrade.refuse(known.iter().copied()));
    };
    let ports = if is_spdy || chosen == TUNNEL { vec![] } else { ports(query)? };
    let response = upgrade.accept(chosen);
    let switched = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Some(io) = handed_over(switched).await else { return };
        if is_spdy {
            port_forward::spdy(spdy::session::serve(io), pod).await;
        } else if chosen == TUNNEL {
            let tunnel = Tunnel::new(io).await;
            port_forward::spdy(spdy::session::serve(tunnel), pod).await;
        } else {
            let spelling = Spelling { base64: chosen.contains("base64"), closes: false };
            let channels = Channels::serve(io, spelling, (2 * ports.len()) as u8).await;
            port_forward::websocket(channels, &ports, pod).await;
        }
    });
    Ok(response)
}

/// The ports that WebSocket clients without a tunnel name in advance.
fn ports(query: &Query) -> Result<Vec<u16>, Response<Body>> {
    let words = query.all("ports").chain(query.all("port")).flat_map(|list| list.split(','));
    let ports: Result<Vec<u16>, _> = words.map(|word| word.trim().parse::<u16>()).collect();
    match ports {
        Ok(ports) if ports.is_empty() => Err(bad("query parameter \"port\" is required")),
        Ok(ports) if ports.len() > port_forward::PORTS_MAX || ports.contains(&0) => Err(bad("invalid ports")),
        Ok(ports) => Ok(ports),
        Err(error) => Err(bad(format!("unable to parse port: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read() {
        let query = Query::parse("command=sh&command=-c&command=echo+a%20%26b&input=1&tty=false&x");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["sh", "-c", "echo a &b"]);
        assert!(query.flag(&["stdin", "input"]) && !query.flag(&["tty"]) && !query.flag(&["x"]));
        assert_eq!(percent_decode("%zz%4"), "%zz%4");
    }

    #[track_caller]
    fn check_ports(query: &str, want: Option<&[u16]>) {
        assert_eq!(ports(&Query::parse(query)).ok().as_deref(), want, "{query}");
    }

    #[test]
    fn ports_are_read() {
        check_ports("ports=80,443", Some(&[80, 443]));
        check_ports("port=80&port=81", Some(&[80, 81]));
        check_ports("", None);
        check_ports("ports=0", None);
        check_ports("ports=70000", None);
    }

    fn container(attempt: u32, state: ContainerState) -> ContainerStatus {
        let value = serde_json::json!({"id": attempt.to_string(), "sandbox_id": "s", "name": "c", "attempt": attempt,
            "image": "", "image_id": "", "state": state, "pid": null, "created_at": "2026-01-01T00:00:00Z",
            "started_at": null, "finished_at": null, "exit_code": null, "oom_killed": false, "reason": "",
            "message": "", "log_path": "/l", "tty": false, "stdin": false, "uid": 0, "gid": 0,
            "supplementary_groups": [], "resources": {}, "labels": {}, "annotations": {}});
        serde_json::from_value(value).expect("a status")
    }

    #[test]
    fn the_right_run_is_chosen() {
        use ContainerState::{Created, Exited, Running};
        let check = |states: &[(u32, ContainerState)], previous, want: Option<&str>| {
            let all: Vec<_> = states.iter().map(|(attempt, state)| container(*attempt, *state)).collect();
            assert_eq!(choose(&all, previous).map(|c| c.id.as_str()), want, "{states:?} {previous}");
        };
        check(&[], false, None);
        check(&[(0, Created)], false, None);
        check(&[(0, Running)], false, Some("0"));
        check(&[(0, Running)], true, None);
        check(&[(1, Running), (0, Exited)], true, Some("0"));
        check(&[(1, Exited), (0, Exited)], false, Some("1"));
        check(&[(1, Exited), (0, Exited)], true, Some("0"));
        check(&[(0, Exited)], true, None);
    }

    #[test]
    fn only_the_api_server_and_administrators_may_call() {
        let caller =
            |user: &str, group: &str| Caller { user: user.into(), groups: [group.to_owned()].into() };
        assert!(caller("kube-apiserver-kubelet-client", "").may_call());
        assert!(caller("admin", "system:masters").may_call());
        assert!(!caller("system:node:n", "system:nodes").may_call());
        assert!(!Caller::default().may_call());
    }
}
