//! Over a real socket: TLS, both versions of HTTP, certificates, upgrades, the end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use minke_client::Target;
use minke_store::Store;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::testing::Keys;
use crate::{ApiServer, UserInfo};

struct Running {
    keys: Keys,
    address: SocketAddr,
    client: Arc<dyn minke_client::Client>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

async fn running() -> Running {
    let keys = Keys::new();
    let mut config = keys.config(Store::in_memory(), Default::default());
    config.listen = vec!["127.0.0.1:0".parse().unwrap()];
    let server = ApiServer::build(config).await.unwrap();
    let (address, stop) = (server.addresses()[0], CancellationToken::new());
    let client = server.client(UserInfo::new("admin", &["system:masters"]));
    let task = tokio::spawn(server.run(stop.clone()));
    Running { keys, address, client, stop, task }
}

fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap()
}

/// Connects with a client certificate, if there is one to show.
async fn connect(
    running: &Running,
    identity: Option<&(String, String)>,
    protocol: &str,
) -> TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(&running.keys.ca).remove(0)).unwrap();
    let builder =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                certificates(certificate),
                PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap(),
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(running.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
    stream
}

async fn send(stream: TlsStream<TcpStream>, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let io = TokioIo::new(stream);
    if io.inner().get_ref().1.alpn_protocol() == Some(b"h2") {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        return sender.send_request(request).await.unwrap();
    }
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await.unwrap()
}

async fn get(
    running: &Running,
    identity: Option<&(String, String)>,
    protocol: &str,
    path: &str,
    token: &str,
) -> (u16, Value) {
    let uri = if protocol == "h2" { format!("https://localhost{path}") } else { path.to_owned() };
    let mut request = Request::get(uri).header("host", "localhost");
    if !token.is_empty() {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let answer =
        send(connect(running, identity, protocol).await, request.body(Full::default()).unwrap()).await;
    let code = answer.status().as_u16();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or_default())
}

#[tokio::test]
async fn certificates_and_tokens_say_who_asks() {
    let running = running().await;
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let stranger = Keys::new().sign("jane", &["system:masters"], &[]);
    for protocol in ["http/1.1", "h2"] {
        let (code, list) = get(&running, Some(&admin), protocol, "/api/v1/namespaces", "").await;
        assert_eq!((code, &list["kind"]), (200, &json!("NamespaceList")));
        let (code, status) = get(&running, Some(&stranger), protocol, "/api/v1/namespaces", "").await;
        assert_eq!((code, &status["reason"]), (401, &json!("Unauthorized")), "another CA is no TLS error");
        let (code, status) = get(&running, None, protocol, "/api/v1/namespaces", "").await;
        assert_eq!((code, &status["reason"]), (403, &json!("Forbidden")));
        assert_eq!(get(&running, None, protocol, "/version", "").await.0, 200);
        assert_eq!(get(&running, None, protocol, "/version", "nonsense").await.0, 401);
    }
    let accounts = minke_api::Kind::by_plural("", "v1", "serviceaccounts").unwrap();
    let target = Target::collection(accounts, "default");
    running.client.create(target, json!({"metadata": {"name": "sa"}})).await.unwrap();
    let target = Target::object(accounts, "default", "sa").sub("token");
    let answer = running.client.post(target, json!({"spec": {}})).await.unwrap();
    let token = answer["status"]["token"].as_str().unwrap();
    let (code, status) = get(&running, None, "http/1.1", "/api/v1/nodes", token).await;
    assert_eq!(code, 403);
    assert!(status["message"].as_str().unwrap().contains("system:serviceaccount:default:sa"), "{status}");
    running.stop.cancel();
    running.task.await.unwrap();
}

#[tokio::test]
async fn watches_end_cleanly_when_the_server_does() {
    let running = running().await;
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    for protocol in ["http/1.1", "h2"] {
        let uri = "https://localhost/api/v1/namespaces?watch=true&allowWatchBookmarks=true";
        let request = Request::get(uri).header("host", "localhost").body(Full::default()).unwrap();
        let answer = send(connect(&running, Some(&admin), protocol).await, request).await;
        assert_eq!(answer.status(), 200);
        if protocol == "http/1.1" {
            // Left open until the end.
            tokio::spawn(answer.into_body().collect());
            continue;
        }
        running.stop.cancel();
        let body = tokio::time::timeout(Duration::from_secs(5), answer.into_body().collect()).await.unwrap();
        let text = String::from_utf8(body.expect("no broken stream").to_bytes().to_vec()).unwrap();
        assert_eq!(text.lines().filter(|line| line.starts_with(r#"{"type":"ADDED""#)).count(), 4);
        assert!(text.lines().last().unwrap().starts_with(r#"{"type":"BOOKMARK""#), "{text}");
    }
    tokio::time::timeout(Duration::from_secs(5), running.task).await.unwrap().unwrap();
}

/// A kubelet that answers one request on each connection: with the head of the request after 101 for upgrades
/// (then everything comes back as it is sent), with a text else.
async fn kubelet(keys: &Keys, answer: &'static str) -> SocketAddr {
    let (certificate, key) = keys.sign("system:node:n1", &["system:nodes"], &["127.0.0.1"]);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificates(&keys.ca).remove(0)).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(certificates(&certificate), PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
        .unwrap();
    let (acceptor, listener) =
        (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await.expect("our client certificate is good");
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                if !head.to_lowercase().contains("upgrade: spdy/3.1") {
                    let line = head.lines().next().unwrap();
                    let body = if answer.is_empty() { line } else { answer };
                    let code = if answer.is_empty() { "200 OK" } else { "400 Bad Request" };
                    let text = format!("HTTP/1.1 {code}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(text.as_bytes()).await.unwrap();
                    let _ = stream.shutdown().await;
                    return;
                }
                let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\
                              x-stream-protocol-version: v4.channel.k8s.io\r\n\r\n";
                stream.write_all(switch.as_bytes()).await.unwrap();
                stream.write_all(head.as_bytes()).await.unwrap();
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

/// A pod on a node whose kubelet is at `kubelet`.
async fn pod_on_node(running: &Running, kubelet: SocketAddr) {
    let kind = |plural| minke_api::Kind::by_plural("", "v1", plural).unwrap();
    let client = &running.client;
    let node = json!({"metadata": {"name": "n1"}, "status": {
        "addresses": [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet.port()}},
    }});
    client.create(Target::collection(kind("nodes"), ""), node).await.unwrap();
    let account = json!({"metadata": {"name": "default"}});
    client.create(Target::collection(kind("serviceaccounts"), "default"), account).await.unwrap();
    let mut pod = pod("p");
    pod["spec"]["nodeName"] = "n1".into();
    client.create(Target::collection(kind("pods"), "default"), pod).await.unwrap();
}

#[tokio::test]
async fn exec_passes_through_to_the_kubelet_byte_for_byte() {
    let running = running().await;
    pod_on_node(&running, kubelet(&running.keys, "").await).await;
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let request = Request::post(
        "/api/v1/namespaces/default/pods/p/exec?command=echo&command=a%20b&stdin=true&stdout=true&tty=false",
    )
    .header("host", "localhost")
    .header("connection", "Upgrade")
    .header("upgrade", "SPDY/3.1")
    .header("x-stream-protocol-version", "v5.channel.k8s.io")
    .header("x-stream-protocol-version", "v4.channel.k8s.io")
    .header("authorization", "Bearer not-for-kubelets")
    .body(Full::default())
    .unwrap();
    let answer = send(connect(&running, Some(&admin), "http/1.1").await, request).await;
    assert_eq!(answer.status(), 101);
    let headers: &HeaderMap = answer.headers();
    assert_eq!(
        (&headers["upgrade"], &headers["x-stream-protocol-version"]),
        (&"SPDY/3.1".parse().unwrap(), &"v4.channel.k8s.io".parse().unwrap())
    );
    let mut stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    assert!(
        head.starts_with("POST /exec/default/p/c?input=1&output=1&command=echo&command=a%20b HTTP/1.1\r\n"),
        "{head}"
    );
    assert_eq!(head.matches("x-stream-protocol-version: ").count(), 2);
    assert!(!head.contains("authorization"), "{head}");
    let sent: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    let mut back = vec![0; sent.len()];
    let (mut read, mut write) = tokio::io::split(stream);
    let (written, read) = tokio::join!(write.write_all(&sent), read.read_exact(&mut back));
    written.unwrap();
    read.unwrap();
    assert_eq!(back, sent);
    running.stop.cancel();
    running.task.await.unwrap();
}

#[tokio::test]
async fn logs_come_from_the_kubelet_and_its_errors_are_statuses() {
    let running = running().await;
    pod_on_node(&running, kubelet(&running.keys, "").await).await;
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let path = "/api/v1/namespaces/default/pods/p/log?container=c&tailLines=5&follow=true";
    let request = Request::get(path).header("host", "localhost").body(Full::default()).unwrap();
    let answer = send(connect(&running, Some(&admin), "http/1.1").await, request).await;
    let text = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, "GET /containerLogs/default/p/c?follow=true&tailLines=5 HTTP/1.1");
    let check = async |path: &str, code: u16, message: &str| {
        let (got, status) = get(&running, Some(&admin), "h2", path, "").await;
        assert_eq!((got, status["message"].as_str().unwrap()), (code, message));
    };
    let log = "/api/v1/namespaces/default/pods/p/log";
    check(&format!("{log}?container=x"), 400, "container x is not valid for pod p").await;
    check("/api/v1/namespaces/default/pods/q/log", 404, "pods \"q\" not found").await;
    check(
        &format!("{log}?tailLines=-1"),
        422,
        "PodLogOptions \"p\" is invalid: tailLines: Invalid value: -1: must be greater than or equal to 0",
    )
    .await;
    // The kubelet moves; what it refuses now is told in its words.
    let moved =
        kubelet(&running.keys, "container \"c\" in pod \"p\" is waiting to start: ContainerCreating").await;
    let nodes = minke_api::Kind::by_plural("", "v1", "nodes").unwrap();
    let status = json!({"status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": moved.port()}}}});
    let target = Target::object(nodes, "", "n1").sub("status");
    running.client.patch(target, minke_client::Patch::Merge(status)).await.unwrap();
    check(log, 400, "container \"c\" in pod \"p\" is waiting to start: ContainerCreating").await;
    running.stop.cancel();
    running.task.await.unwrap();
}

/// A plain server that says what it was asked for; below `/redirect` it redirects.
async fn plain_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let forwarded = parts.headers["x-forwarded-for"].to_str().unwrap_or_default();
                let text =
                    format!("{} {} {} {forwarded}", parts.method, parts.uri, String::from_utf8_lossy(&body));
                let mut answer = Response::new(Full::<Bytes>::from(text));
                if parts.uri.path() == "/redirect" {
                    *answer.status_mut() = http::StatusCode::FOUND;
                    answer.headers_mut().insert("location", "/there".parse().unwrap());
                }
                Ok::<_, hyper::Error>(answer)
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    address
}

#[tokio::test]
async fn other_servers_are_reached_through_the_proxy() {
    let running = running().await;
    let plain = plain_server().await;
    pod_on_node(&running, kubelet(&running.keys, "").await).await;
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let ask = async |line: &str, body: &'static str| {
        let (method, path) = line.split_once(' ').unwrap();
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let answer =
            send(connect(&running, Some(&admin), "http/1.1").await, request.body(body.into()).unwrap()).await;
        let location = answer.headers().get("location").map(|to| to.to_str().unwrap().to_owned());
        let code = answer.status().as_u16();
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        (code, location.unwrap_or_default(), String::from_utf8(text.to_vec()).unwrap())
    };
    let base = format!("/api/v1/nodes/n1:{}/proxy", plain.port());
    let (code, _, text) = ask(&format!("POST {base}/a%2Fb/c?x=1&y"), "hello").await;
    assert_eq!((code, text.as_str()), (200, "POST /a%2Fb/c?x=1&y hello 127.0.0.1"));
    let (code, location, _) = ask(&format!("GET {base}?x=1"), "").await;
    assert_eq!((code, location), (301, format!("{base}/?x=1")));
    let (code, location, _) = ask(&format!("GET {base}/redirect"), "").await;
    assert_eq!((code, location), (302, format!("{base}/there")));
    // Without a port it is the kubelet itself.
    let (code, _, text) = ask("GET /api/v1/nodes/n1/proxy/healthz", "").await;
    assert_eq!((code, text.as_str()), (200, "GET /healthz HTTP/1.1"));
    let (code, _, text) = ask("GET /api/v1/nodes/n1:1/proxy/", "").await;
    assert_eq!(code, 503);
    assert!(text.contains("error trying to reach service: dial tcp 127.0.0.1:1: "), "{text}");
    let (code, _, text) = ask("GET /api/v1/namespaces/default/services/kubernetes:nope/proxy/", "").await;
    assert_eq!(code, 503);
    assert!(text.contains("no service port"), "{text}");
    running.stop.cancel();
    running.task.await.unwrap();
}

/// All messages until the server closes.
async fn messages(running: &Running, path: &str, protocol: &str) -> Vec<Message> {
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let stream = connect(running, Some(&admin), "http/1.1").await;
    let mut request = format!("wss://localhost{path}").into_client_request().unwrap();
    if !protocol.is_empty() {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    let (mut socket, answer) = tokio_tungstenite::client_async(request, stream).await.unwrap();
    let spoken = answer.headers().get("sec-websocket-protocol").map_or("", |name| name.to_str().unwrap());
    assert_eq!(spoken, protocol);
    let mut all = Vec::new();
    while let Some(message) = socket.next().await {
        all.push(message.unwrap());
    }
    all
}

#[tokio::test]
async fn logs_and_watches_come_over_websockets_too() {
    let running = running().await;
    pod_on_node(&running, kubelet(&running.keys, "").await).await;
    let closed = Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }));
    let log = "/api/v1/namespaces/default/pods/p/log?container=c";
    let text = "GET /containerLogs/default/p/c HTTP/1.1";
    for protocol in ["", "binary.k8s.io"] {
        let want = [Message::binary(""), Message::binary(text), closed.clone()];
        assert_eq!(messages(&running, log, protocol).await, want);
    }
    let want =
        [Message::text(""), Message::text("R0VUIC9jb250YWluZXJMb2dzL2RlZmF1bHQvcC9jIEhUVFAvMS4x"), closed];
    assert_eq!(messages(&running, log, "base64.binary.k8s.io").await, want);

    let watch = "/api/v1/namespaces/default/pods?watch=true&timeoutSeconds=1";
    let events = messages(&running, watch, "").await;
    let event: Value = serde_json::from_str(events[0].to_text().unwrap()).unwrap();
    assert_eq!((&event["type"], &event["object"]["metadata"]["name"]), (&json!("ADDED"), &json!("p")));
    assert!(matches!(events[..], [_, Message::Close(_)]), "{events:?}");

    // What cannot be is refused before anything is switched.
    let admin = running.keys.sign("jane", &["system:masters"], &[]);
    let stream = connect(&running, Some(&admin), "http/1.1").await;
    let request = "wss://localhost/api/v1/namespaces/default/pods/none/log".into_client_request().unwrap();
    match tokio_tungstenite::client_async(request, stream).await.unwrap_err() {
        tokio_tungstenite::tungstenite::Error::Http(answer) => assert_eq!(answer.status(), 404),
        other => panic!("{other}"),
    }
    running.stop.cancel();
    running.task.await.unwrap();
}
