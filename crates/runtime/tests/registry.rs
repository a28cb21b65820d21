//! Pulls and pushes against a real registry on loopback, and against ones that misbehave.

#![allow(clippy::disallowed_methods, reason = "real servers in real time")]

#[allow(dead_code, reason = "containers.rs uses the rest")]
mod support;

use std::io::{Cursor, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use minke_runtime::*;
use support::{IMAGE, busybox};

/// Debian's `docker-registry` on a free port, with its data in a directory of its own.
struct Registry {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Registry {
    fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: unpacking images needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n",
            dir.path().join("data").display()
        );
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let started = Command::new("docker-registry")
            .args(["serve", dir.path().join("config.yml").to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = started else {
            eprintln!("skipped: docker-registry (Debian: docker-registry) is not installed");
            return None;
        };
        let registry = Self { child, port, _dir: dir };
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the registry does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(registry)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn store(dir: &std::path::Path, config: RegistryConfig) -> ImageStore {
    ImageStore::open(dir, config).unwrap()
}

#[tokio::test]
async fn what_is_pushed_can_be_pulled() {
    let Some(registry) = Registry::start() else { return };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = store(a.path(), RegistryConfig::default());
    from.load(Cursor::new(busybox("SIGTERM", IMAGE)), None, None).await.unwrap();
    let name = format!("localhost:{}/team/box:v1", registry.port);
    from.tag(IMAGE, &name).await.unwrap();
    from.push(&name, Auth::Anonymous, None).await.unwrap();

    let to = store(b.path(), RegistryConfig::default());
    let seen = Arc::new(AtomicU64::new(0));
    let counter = seen.clone();
    let progress: Progress = Arc::new(move |event| {
        if let ProgressEvent::Transferred { bytes } = event {
            counter.fetch_add(bytes, Ordering::Relaxed);
        }
    });
    // The same at the same time is one.
    let (one, two) =
        tokio::join!(to.pull(&name, Auth::Anonymous, Some(progress)), to.pull(&name, Auth::Anonymous, None));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two);
    assert_eq!(one.id, from.resolve(IMAGE).await.unwrap().unwrap().id);
    assert!(seen.load(Ordering::Relaxed) > 1 << 20);
    assert_eq!(one.tags, std::slice::from_ref(&name));
    // By digest.
    let by_digest = to.pull(&one.digests[0], Auth::Anonymous, None).await.unwrap();
    assert_eq!(by_digest.id, one.id);

    let missing = format!("localhost:{}/team/box:nope", registry.port);
    let error = to.pull(&missing, Auth::Anonymous, None).await.unwrap_err();
    let want = format!(
        "failed to pull and unpack image {missing:?}: failed to resolve reference {missing:?}: {missing}: not found"
    );
    assert!(matches!(&error, Error::NotFound(text) if *text == want), "{error:?}");
}

#[tokio::test]
async fn a_mirror_is_asked_first() {
    let Some(registry) = Registry::start() else { return };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = store(a.path(), RegistryConfig::default());
    from.load(Cursor::new(busybox("SIGTERM", IMAGE)), None, None).await.unwrap();
    let name = format!("localhost:{}/library/busybox:1", registry.port);
    from.tag(IMAGE, &name).await.unwrap();
    from.push(&name, Auth::Anonymous, None).await.unwrap();
    let mut config = RegistryConfig::default();
    // The first of the two is not there.
    let mirrors = vec!["http://127.0.0.1:1".to_owned(), format!("http://127.0.0.1:{}", registry.port)];
    config.mirrors.insert("docker.io".into(), mirrors);
    let image = store(b.path(), config).pull("busybox:1", Auth::Anonymous, None).await.unwrap();
    assert_eq!(image.tags, ["docker.io/library/busybox:1"]);
}

/// A server that does one thing with every connection.
fn server(act: impl Fn(std::net::TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let act = Arc::new(act);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let act = act.clone();
            std::thread::spawn(move || act(stream));
        }
    });
    port
}

#[track_caller]
fn leaves_nothing(root: &std::path::Path) {
    for dir in ["images/blobs/sha256", "snapshots"] {
        let left: Vec<_> = std::fs::read_dir(root.join(dir)).unwrap().flatten().map(|e| e.path()).collect();
        assert!(
            left.iter().all(|p| !p.file_name().unwrap().to_str().unwrap().starts_with(".tmp")),
            "{left:?}"
        );
    }
}

#[tokio::test]
async fn a_registry_that_hangs_is_given_up() {
    let port = server(|mut stream| {
        let _ = stream.read(&mut [0; 1024]);
        std::thread::sleep(Duration::from_secs(600));
    });
    let dir = tempfile::tempdir().unwrap();
    let config = RegistryConfig { read_timeout_seconds: 1, connect_timeout_seconds: 1, ..Default::default() };
    let begun = Instant::now();
    let name = format!("127.0.0.1:{port}/x:1");
    let error = store(dir.path(), config).pull(&name, Auth::Anonymous, None).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert!(matches!(error, Error::Timeout(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("failed to resolve reference") && text.contains("failed to do request"), "{text}");
    leaves_nothing(dir.path());
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), RegistryConfig::default());
    let error = store.pull("127.0.0.1:1/x:1", Auth::Anonymous, None).await.unwrap_err().to_string();
    assert!(error.contains("Connection refused"), "{error}");
    let error = store.pull("127.0.0.1:1/X", Auth::Anonymous, None).await.unwrap_err();
    assert!(matches!(error, Error::InvalidImageName(_)), "{error:?}");
}

#[tokio::test]
async fn a_registry_elsewhere_is_spoken_to_in_tls() {
    let (sender, mut first) = tokio::sync::mpsc::channel(8);
    let port = server(move |mut stream| {
        let mut byte = [0; 1];
        let _ = stream.read(&mut byte);
        let _ = sender.try_send(byte[0]);
    });
    let dir = tempfile::tempdir().unwrap();
    let mut config = RegistryConfig::default();
    config.mirrors.insert("*".into(), vec![format!("https://127.0.0.1:{port}")]);
    store(dir.path(), config).pull("127.0.0.1:1/x:1", Auth::Anonymous, None).await.unwrap_err();
    // A TLS record of the handshake.
    assert_eq!(first.recv().await, Some(0x16));
}

/// Answers every GET by its path.
fn answer(mut stream: std::net::TcpStream, body_of: &dyn Fn(&str) -> Option<Vec<u8>>) {
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        while !request.windows(4).any(|w| w == b"\r\n\r\n") {
            match stream.read(&mut chunk) {
                Ok(n) if n > 0 => request.extend_from_slice(&chunk[..n]),
                _ => return,
            }
        }
        let text = String::from_utf8_lossy(&request).into_owned();
        let path = text.split(' ').nth(1).unwrap_or_default();
        let (status, body) = match body_of(path) {
            Some(body) => ("200 OK", body),
            None => ("404 Not Found", Vec::new()),
        };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
        if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).is_err() {
            return;
        }
        request.clear();
    }
}

#[tokio::test]
async fn a_registry_that_lies_is_caught() {
    let digest = format!("sha256:{}", "0".repeat(64));
    let blob = format!(r#"{{"mediaType":"x","digest":"{digest}","size":4}}"#);
    let manifest = format!(r#"{{"schemaVersion":2,"config":{blob},"layers":[{blob}]}}"#);
    let port = server(move |stream| {
        answer(stream, &|path| match path {
            "/v2/" => Some(Vec::new()),
            p if p.contains("/manifests/") => Some(manifest.clone().into_bytes()),
            p if p.contains("/blobs/") => Some(b"evil".to_vec()),
            _ => None,
        });
    });
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), RegistryConfig::default());
    let error =
        store.pull(&format!("127.0.0.1:{port}/x:1"), Auth::Anonymous, None).await.unwrap_err().to_string();
    assert!(error.contains(&digest), "{error}");
    leaves_nothing(dir.path());
    assert!(store.list().await.unwrap().is_empty());
}
