use std::sync::Arc;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

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
    assert_eq!(to("?q").as_deref(), Some("http://h:80/a?q"));
    assert_eq!(to("//o/x").as_deref(), Some("http://o/x"));
    assert_eq!(to("https://o/x").as_deref(), Some("https://o/x"));
    let deep: Uri = "http://h:80/a/b?c".parse().expect("a URL");
    assert_eq!(redirect(&deep, "d/e").map(|uri| uri.to_string()).as_deref(), Some("http://h:80/a/d/e"));
}

fn place<'a>(container: &'a core::Container, address: Option<IpAddr>) -> Place<'a> {
    Place { container, address, user_agent: "kube-probe/1.37" }
}

fn probe(value: serde_json::Value) -> Handler {
    let container = json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]});
    let container: core::Container = serde_json::from_value(container).expect("a container");
    let probe: core::Probe = serde_json::from_value(value).expect("a probe");
    Handler::of_probe(&probe, &place(&container, "10.1.0.9".parse().ok()))
}

#[track_caller]
fn check_url(action: serde_json::Value, want: &str) {
    match probe(json!({"httpGet": action})) {
        Handler::Http { url, .. } => assert_eq!(url, want),
        other => assert_eq!(other, Handler::Invalid(want.to_owned())),
    }
}

#[test]
fn names_and_addresses_are_found_in_the_pod() {
    check_url(json!({"port": 80}), "http://10.1.0.9:80/");
    check_url(json!({"port": "web", "path": "a?b=c", "scheme": "HTTPS"}), "https://10.1.0.9:8080/a?b=c");
    check_url(json!({"port": "81", "host": "h.example"}), "http://h.example:81/");
    check_url(json!({"port": 80, "host": "fd00::1"}), "http://[fd00::1]:80/");
    check_url(json!({"port": "nosuch"}), "couldn't find port: nosuch in container c");
    check_url(json!({"port": 0}), "invalid port number: 0");
    let tcp = |action| probe(json!({"tcpSocket": action}));
    assert_eq!(tcp(json!({"port": "web"})), Handler::Tcp("10.1.0.9:8080".into()));
    assert_eq!(tcp(json!({"port": 1, "host": "::1"})), Handler::Tcp("[::1]:1".into()));
    assert_eq!(probe(json!({})), Handler::Invalid("missing probe handler".into()));
    let Handler::Http { headers, .. } = probe(json!({"httpGet": {"port": 1, "httpHeaders": [
        {"name": "X-A", "value": "1"}, {"name": "X-A", "value": "2"}, {"name": "accept", "value": "a/b"}]}}))
    else {
        panic!("no request")
    };
    let all = |name: &str| headers.get_all(name).iter().map(|value| value.to_str().unwrap_or("")).collect();
    let (given, agent, accept): (Vec<_>, Vec<_>, Vec<_>) = (all("x-a"), all("user-agent"), all("accept"));
    assert_eq!((given, agent, accept), (vec!["1", "2"], vec!["kube-probe/1.37"], vec!["a/b"]));
}

const LONG: Duration = Duration::from_secs(10);

/// Answers one connection with `answer`, and returns what was asked.
async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, answer: String) -> String {
    let (stream, _) = listener.accept().await.expect("a connection");
    match tls {
        Some(tls) => talk(tls.accept(stream).await.expect("TLS"), &answer).await,
        None => talk(stream, &answer).await,
    }
}

async fn talk(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &str) -> String {
    let mut asked = vec![];
    while !asked.ends_with(b"\r\n\r\n") {
        let mut bytes = [0; 1024];
        let read = stream.read(&mut bytes).await.expect("read");
        asked.extend_from_slice(&bytes[..read]);
    }
    stream.write_all(answer.as_bytes()).await.expect("written");
    stream.shutdown().await.expect("closed");
    String::from_utf8(asked).expect("text")
}

/// What a probe makes of `answer`, and what it asked.
async fn ask(tls: bool, action: serde_json::Value, answer: &str) -> (Outcome, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let mut action = action;
    action["port"] = json!(listener.local_addr().expect("an address").port());
    action["host"] = json!("127.0.0.1");
    let acceptor = tls.then(acceptor);
    let handler = probe(json!({"httpGet": action}));
    let world = crate::testing::World::new("handlers");
    let served = tokio::spawn(serve(listener, acceptor, answer.to_owned()));
    let outcome = handler.run(&*world.runtime, "id", LONG).await;
    std::fs::remove_dir_all(&world.dir).expect("removed");
    (outcome, served.await.expect("served"))
}

/// A server with a certificate that nobody vouches for.
fn acceptor() -> TlsAcceptor {
    let own = rcgen::generate_simple_self_signed(vec!["nobody.example".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("a configuration");
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn pages_are_asked_for_and_judged_by_their_status() {
    let headers = json!({"path": "/p?q", "httpHeaders": [{"name": "X-Who", "value": "me"}, {"name": "Host", "value": "h"}]});
    let (outcome, asked) = ask(false, headers, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(outcome, Outcome::Success);
    let asked = asked.to_lowercase();
    assert!(asked.starts_with("get /p?q http/1.1\r\n"), "{asked}");
    for line in ["x-who: me", "host: h", "user-agent: kube-probe/1.37", "accept: */*", "connection: close"] {
        assert!(asked.contains(&format!("\r\n{line}\r\n")), "{line} in {asked}");
    }
    let (outcome, _) = ask(true, json!({"scheme": "HTTPS"}), "HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(outcome, Outcome::Success, "whoever it is");
    let refused = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
    let (outcome, _) = ask(false, json!({}), refused).await;
    assert_eq!(outcome, Outcome::Failure("HTTP probe failed with statuscode: 503".into()));
    let away = "HTTP/1.1 302 Found\r\nlocation: http://elsewhere.example/\r\ncontent-length: 4\r\n\r\ngone";
    let (outcome, _) = ask(false, json!({}), away).await;
    assert_eq!(outcome, Outcome::Warning("Probe terminated redirects, Response body: gone".into()));
    for unmoved in ["304 Not Modified", "300 Multiple Choices\r\nlocation: /b", "302 Found"] {
        let answer = format!("HTTP/1.1 {unmoved}\r\ncontent-length: 0\r\n\r\n");
        let (outcome, _) = ask(false, json!({}), &answer).await;
        assert_eq!(
            outcome,
            Outcome::Warning("Probe terminated redirects, Response body: ".into()),
            "{unmoved}"
        );
    }
    let (outcome, _) = ask(false, json!({}), "").await;
    assert!(matches!(&outcome, Outcome::Failure(why) if why.ends_with(": EOF")), "{outcome:?}");
}

#[tokio::test]
async fn nobody_there_and_nobody_answering_are_failures() {
    let world = crate::testing::World::new("silence");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let run = async |handler: serde_json::Value| {
        let handler = probe(handler);
        match handler.run(&*world.runtime, "id", Duration::from_millis(200)).await {
            Outcome::Failure(why) => why.replace(&port.to_string(), "P"),
            other => format!("{other:?}"),
        }
    };
    let http = json!({"httpGet": {"host": "127.0.0.1", "port": port}});
    let tcp = json!({"tcpSocket": {"host": "127.0.0.1", "port": port}});
    assert_eq!(
        run(http.clone()).await,
        "Get \"http://127.0.0.1:P/\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
    );
    assert_eq!(run(tcp.clone()).await, "Success");
    drop(listener);
    let refused = "dial tcp 127.0.0.1:P: connect: connection refused";
    assert_eq!(run(http).await, format!("Get \"http://127.0.0.1:P/\": {refused}"));
    assert_eq!(run(tcp).await, refused);
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

/// A gRPC server that answers one question, with a message or with trailers alone.
async fn grpc_server(listener: TcpListener, message: Option<&'static [u8]>, code: &'static str) -> String {
    let (stream, _) = listener.accept().await.expect("a connection");
    let (sender, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let sender = sender.clone();
        async move {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.expect("a body").to_bytes();
            let _ = sender.send(format!("{path} {}", String::from_utf8_lossy(&body[5..])));
            let mut end = HeaderMap::new();
            end.insert("grpc-status", HeaderValue::from_static(code));
            end.insert("grpc-message", HeaderValue::from_static("so it is"));
            let response = http::Response::builder().header("content-type", "application/grpc");
            let body = match message {
                Some(message) => {
                    let mut frame = vec![0, 0, 0, 0, message.len() as u8];
                    frame.extend_from_slice(message);
                    Full::new(Bytes::from(frame)).with_trailers(async move { Some(Ok(end)) }).boxed()
                }
                None => {
                    let mut response = response.body(Full::new(Bytes::new()).boxed()).expect("a response");
                    response.headers_mut().extend(end);
                    return Ok::<_, std::convert::Infallible>(response);
                }
            };
            Ok(response.body(body).expect("a response"))
        }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service);
    // The client goes away when it has its answer.
    let _ = connection.await;
    asked.recv().await.unwrap_or_default()
}

#[track_caller]
fn check_grpc(outcome: &Outcome, want: &str) {
    let text = match outcome {
        Outcome::Failure(why) => why.as_str(),
        Outcome::Success => "ok",
        other => panic!("{other:?}"),
    };
    assert_eq!(text, want);
}

#[tokio::test]
async fn grpc_services_are_asked_for_their_health() {
    let world = crate::testing::World::new("grpc");
    let ask = async |message: Option<&'static [u8]>, code: &'static str| {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let served = tokio::spawn(grpc_server(listener, message, code));
        let handler =
            Handler::Grpc { address, service: "minke".into(), user_agent: "kube-probe/1.37".into() };
        let outcome = handler.run(&*world.runtime, "id", LONG).await;
        assert_eq!(served.await.expect("served"), "/grpc.health.v1.Health/Check \n\u{5}minke");
        outcome
    };
    check_grpc(&ask(Some(&[8, 1]), "0").await, "ok");
    check_grpc(&ask(Some(&[8, 2]), "0").await, "service unhealthy (responded with \"NOT_SERVING\")");
    check_grpc(&ask(Some(&[]), "0").await, "service unhealthy (responded with \"UNKNOWN\")");
    let not_there =
        "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): so it is";
    check_grpc(&ask(None, "12").await, not_there);
    let unknown = "error: health rpc probe failed: rpc error: code = NotFound desc = so it is";
    check_grpc(&ask(None, "5").await, unknown);
    std::fs::remove_dir_all(&world.dir).expect("removed");
}
