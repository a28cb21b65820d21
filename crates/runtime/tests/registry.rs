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

/// Of the user `me` with the password `s3cret`, as `htpasswd -B` makes it.
const HTPASSWD: &str = "me:$2b$04$.cy.jWTDPwhJi1firfx0/eHZh4WY94Xgexisd36qHdTfqjv8biXDG\n";

impl Registry {
    fn start() -> Option<Self> {
        Self::start_with("")
    }

    /// One that wants a user and a password.
    fn start_locked() -> Option<Self> {
        Self::start_with("auth: {htpasswd: {realm: minke, path: '%DIR%/htpasswd'}}\n")
    }

    fn start_tls(tls: &str) -> Option<Self> {
        // Below `http`, which is what the file ends with.
        Self::start_with(tls)
    }

    fn start_with(more: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: unpacking images needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: '127.0.0.1:{port}'\n",
            dir.path().join("data").display()
        );
        let more = more.replace("%DIR%", dir.path().to_str().unwrap());
        std::fs::write(dir.path().join("config.yml"), config + &more).unwrap();
        std::fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
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

/// A configuration with one `hosts.toml`.
fn configured(dir: &std::path::Path, registry: &str, hosts: &str) -> RegistryConfig {
    let registries = dir.join("registries");
    std::fs::create_dir_all(registries.join(registry)).unwrap();
    std::fs::write(registries.join(registry).join("hosts.toml"), hosts).unwrap();
    RegistryConfig::in_dir(&registries)
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
    // The first of them is not there, and the second is not to be asked what a tag means.
    let hosts = format!(
        "[host.\"http://127.0.0.1:1\"]\n[host.\"http://127.0.0.1:2\"]\ncapabilities = [\"pull\"]\n[host.\"http://127.0.0.1:{}\"]\n",
        registry.port
    );
    let image = store(b.path(), configured(b.path(), "docker.io", &hosts))
        .pull("busybox:1", Auth::Anonymous, None)
        .await
        .unwrap();
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
    let config = RegistryConfig { read_timeout: Duration::from_secs(1), ..Default::default() };
    let begun = Instant::now();
    let name = format!("127.0.0.1:{port}/x:1");
    let error = store(dir.path(), config).pull(&name, Auth::Anonymous, None).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(15));
    assert!(matches!(error, Error::Timeout(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("failed to resolve reference") && text.contains("failed to do request"), "{text}");
    assert!(text.ends_with("net/http: timeout awaiting response headers"), "{text}");
    leaves_nothing(dir.path());
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), RegistryConfig::default());
    let error = store.pull("127.0.0.1:1/x:1", Auth::Anonymous, None).await.unwrap_err().to_string();
    assert!(error.ends_with("dial tcp 127.0.0.1:1: connect: connection refused"), "{error}");
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
    let config = configured(dir.path(), "_default", &format!("[host.\"https://127.0.0.1:{port}\"]"));
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

fn basic(password: &str) -> Auth {
    Auth::Basic { username: "me".into(), password: password.into() }
}

#[tokio::test]
async fn a_locked_registry_wants_a_password() {
    let Some(registry) = Registry::start_locked() else { return };
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = store(a.path(), RegistryConfig::default());
    from.load(Cursor::new(busybox("SIGTERM", IMAGE)), None, None).await.unwrap();
    let name = format!("localhost:{}/team/box:v1", registry.port);
    from.tag(IMAGE, &name).await.unwrap();
    let denied = from.push(&name, Auth::Anonymous, None).await.unwrap_err().to_string();
    assert!(denied.ends_with("authorization failed: no basic auth credentials"), "{denied}");
    from.push(&name, basic("s3cret"), None).await.unwrap();

    let to = store(b.path(), RegistryConfig::default());
    let prefix = format!("failed to pull and unpack image {name:?}: failed to resolve reference {name:?}: ");
    let error = to.pull(&name, Auth::Anonymous, None).await.unwrap_err().to_string();
    let want = "pull access denied, repository does not exist or may require authorization: \
                authorization failed: no basic auth credentials";
    assert_eq!(error, format!("{prefix}{want}"));
    let error = to.pull(&name, basic("wrong"), None).await.unwrap_err().to_string();
    let url = format!("http://localhost:{}/v2/team/box/manifests/v1", registry.port);
    let want = format!("{prefix}unexpected status from HEAD request to {url}: 401 Unauthorized");
    assert!(error.starts_with(&want), "{error}");
    to.pull(&name, basic("s3cret"), None).await.unwrap();
}

/// A request as it came, with its path and headers.
struct Asked(String);

impl Asked {
    fn path(&self) -> &str {
        self.0.split(' ').nth(1).unwrap_or_default()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// What to answer: the status with any headers, and the body; a body cut short breaks the connection off.
struct Reply {
    head: String,
    body: Vec<u8>,
    announced: usize,
}

fn reply(head: &str, body: &[u8]) -> Reply {
    Reply { head: head.to_owned(), body: body.to_owned(), announced: body.len() }
}

fn web(act: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> u16 {
    server(move |mut stream| {
        let mut request = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                match stream.read(&mut chunk) {
                    Ok(n) if n > 0 => request.extend_from_slice(&chunk[..n]),
                    _ => return,
                }
            }
            let asked = Asked(String::from_utf8_lossy(&request).into_owned());
            let answer = act(&asked);
            let head = format!("HTTP/1.1 {}\r\ncontent-length: {}\r\n\r\n", answer.head, answer.announced);
            let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&answer.body));
            if sent.is_err() || answer.body.len() != answer.announced {
                return;
            }
            request.clear();
        }
    })
}

fn digest(bytes: &[u8]) -> String {
    use sha2::Digest;
    let hex: String = sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// An image with these layers, as a registry has it: what to answer for each path below `/v2/<name>/`.
fn image_of(layers: &[Vec<u8>], salt: &str) -> std::collections::BTreeMap<String, Vec<u8>> {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let ids: Vec<String> = layers.iter().map(|l| digest(l)).collect();
    let config = serde_json::json!({
        "architecture": arch, "os": "linux", "author": salt, "config": {},
        "rootfs": { "type": "layers", "diff_ids": ids },
    })
    .to_string()
    .into_bytes();
    let describe = |bytes: &[u8]| {
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(bytes), "size": bytes.len(),
        })
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2, "config": describe(&config),
        "layers": layers.iter().map(|l| describe(l)).collect::<Vec<_>>(),
    })
    .to_string()
    .into_bytes();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
        { "mediaType": "x", "digest": digest(b"other"), "size": 5, "platform": { "os": "windows", "architecture": arch } },
        { "mediaType": "x", "digest": digest(&manifest), "size": manifest.len(),
          "platform": { "os": "linux", "architecture": arch } },
    ] })
    .to_string()
    .into_bytes();
    let mut paths = std::collections::BTreeMap::new();
    for blob in layers.iter().chain([&config]) {
        paths.insert(format!("blobs/{}", digest(blob)), blob.clone());
    }
    for document in [&manifest, &index] {
        paths.insert(format!("manifests/{}", digest(document)), document.clone());
    }
    paths.insert("manifests/1".to_owned(), index);
    paths
}

fn layer(name: &str, size: usize) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let data: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(size as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, &data[..]).unwrap();
    tar.into_inner().unwrap()
}

/// Bytes of a layer that came in vain are not asked for again: not at once, and not by the next pull.
#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let big = layer("big", 300_000);
    let size = big.len();
    let paths = image_of(std::slice::from_ref(&big), "");
    let ranges = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = ranges.clone();
    let wanted = format!("/v2/x/blobs/{}", digest(&big));
    let port = web(move |asked| {
        if asked.path() == wanted {
            let range = asked.header("range").map(str::to_owned);
            seen.lock().unwrap().push(range.clone());
            let from: usize = range.as_deref().map_or(0, |r| r[6..].trim_end_matches('-').parse().unwrap());
            // Never more than a third of it, and at the fourth try nothing at all.
            let broken = |to: usize| &big[from..to.min(big.len())];
            let head = match range {
                Some(_) => {
                    format!("206 Partial Content\r\ncontent-range: bytes {from}-{}/{}", size - 1, size)
                }
                None => "200 OK".to_owned(),
            };
            return Reply { head, body: broken(from + 110_000).to_vec(), announced: size - from };
        }
        match asked.path().strip_prefix("/v2/x/").and_then(|path| paths.get(path)) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), RegistryConfig::default());
    store.pull(&format!("127.0.0.1:{port}/x:1"), Auth::Anonymous, None).await.unwrap();
    let got = ranges.lock().unwrap().clone();
    assert_eq!((got[0].as_deref(), got[1].as_deref()), (None, Some("bytes=110000-")), "{got:?}");
    assert_eq!(got.len(), 3, "{got:?}");
}

#[tokio::test]
async fn the_next_pull_goes_on_too() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let big = layer("big", 300_000);
    let paths = image_of(std::slice::from_ref(&big), "");
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let (is_broken, asked_for) = (broken.clone(), Arc::new(std::sync::Mutex::new(Vec::new())));
    let (seen, wanted) = (asked_for.clone(), format!("/v2/x/blobs/{}", digest(&big)));
    let port = web(move |asked| {
        if asked.path() == wanted {
            let range = asked.header("range").map(str::to_owned);
            seen.lock().unwrap().push(range.clone());
            return match (is_broken.load(Ordering::Relaxed), range) {
                (true, None) => {
                    Reply { head: "200 OK".into(), body: big[..1000].to_vec(), announced: big.len() }
                }
                (true, Some(_)) => reply("503 Service Unavailable", b""),
                (false, Some(range)) => {
                    let from: usize = range[6..].trim_end_matches('-').parse().unwrap();
                    let head = format!("206 Partial Content\r\ncontent-range: bytes {from}-1/2");
                    reply(&head, &big[from..])
                }
                (false, None) => reply("200 OK", &big),
            };
        }
        match asked.path().strip_prefix("/v2/x/").and_then(|path| paths.get(path)) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let name = format!("127.0.0.1:{port}/x:1");
    let error =
        store(dir.path(), RegistryConfig::default()).pull(&name, Auth::Anonymous, None).await.unwrap_err();
    assert!(error.to_string().contains("503 Service Unavailable"), "{error}");
    broken.store(false, Ordering::Relaxed);
    // Another process, as it were: opening collects garbage, and leaves what is worth keeping.
    store(dir.path(), RegistryConfig::default()).pull(&name, Auth::Anonymous, None).await.unwrap();
    let got = asked_for.lock().unwrap().clone();
    assert_eq!(got.last().unwrap().as_deref(), Some("bytes=1000-"), "{got:?}");
}

/// Two images with a layer in common, pulled by two stores at once.
#[tokio::test]
async fn a_shared_layer_is_fetched_once() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let shared = layer("shared", 200_000);
    let one = image_of(&[shared.clone(), layer("one", 10)], "1");
    let two = image_of(&[shared.clone(), layer("two", 10)], "2");
    let fetched = Arc::new(AtomicU64::new(0));
    let (count, wanted) = (fetched.clone(), digest(&shared));
    let port = web(move |asked| {
        if asked.path().ends_with(&wanted) {
            count.fetch_add(1, Ordering::Relaxed);
            // Long enough for the other to ask as well, if it would.
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut parts = asked.path().trim_start_matches("/v2/").splitn(2, '/');
        let paths = if parts.next() == Some("one") { &one } else { &two };
        match parts.next().and_then(|path| paths.get(path)) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (store(dir.path(), RegistryConfig::default()), store(dir.path(), RegistryConfig::default()));
    let (names, auth) = (["one", "two"].map(|n| format!("127.0.0.1:{port}/{n}:1")), Auth::Anonymous);
    let (x, y) = tokio::join!(a.pull(&names[0], auth.clone(), None), b.pull(&names[1], auth, None));
    assert_ne!(x.unwrap().id, y.unwrap().id);
    assert_eq!(fetched.load(Ordering::Relaxed), 1);
}

/// Tokens as the large registries give them: by user and scope, to be shown with each request.
#[tokio::test]
async fn tokens_are_fetched_with_the_credentials() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let paths = image_of(&[layer("a", 10)], "");
    let port = web(move |asked| {
        let host = asked.header("host").unwrap_or_default();
        if let Some(query) = asked.path().strip_prefix("/token?") {
            // "me:s3cret"
            let known = asked.header("authorization") == Some("Basic bWU6czNjcmV0");
            let right = query.contains("service=reg") && query.contains("scope=repository%3Ax%3Apull");
            return match (known, right) {
                (true, true) => reply("200 OK", br#"{"token":"good","expires_in":300}"#),
                (true, false) => reply("400 Bad Request", b""),
                (false, _) if asked.header("authorization").is_none() => {
                    reply("200 OK", br#"{"access_token":"weak"}"#)
                }
                (false, _) => reply("401 Unauthorized", b""),
            };
        }
        let challenge = format!(
            "www-authenticate: Bearer realm=\"http://{host}/token\",service=\"reg\",scope=\"repository:x:pull\""
        );
        match asked.header("authorization") {
            Some("Bearer good") => {}
            Some("Bearer weak") => {
                return reply(&format!("401 Unauthorized\r\n{challenge},error=\"insufficient_scope\""), b"");
            }
            _ => return reply(&format!("401 Unauthorized\r\n{challenge}"), b""),
        }
        match asked.path().strip_prefix("/v2/x/").and_then(|path| paths.get(path)) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), RegistryConfig::default());
    let name = format!("127.0.0.1:{port}/x:1");
    let error = store.pull(&name, Auth::Anonymous, None).await.unwrap_err().to_string();
    let want = "pull access denied, repository does not exist or may require authorization: \
                server message: insufficient_scope: authorization failed";
    assert!(error.ends_with(want), "{error}");
    let error = store.pull(&name, basic("wrong"), None).await.unwrap_err().to_string();
    let want = "failed to authorize: failed to fetch oauth token: unexpected status from GET request to";
    assert!(error.contains(want) && error.ends_with("401 Unauthorized"), "{error}");
    store.pull(&name, basic("s3cret"), None).await.unwrap();
    let other = format!(
        "127.0.0.1:{port}/x@{}",
        store.resolve(&name).await.unwrap().unwrap().digests[0].split('@').nth(1).unwrap()
    );
    store.pull(&other, Auth::Bearer { token: "good".into() }, None).await.unwrap();
}

/// A registry of one image `x:1` with this manifest, and of one layer that is good; counts the layers it is asked for.
fn with_manifest(layers: serde_json::Value) -> (u16, Arc<AtomicU64>) {
    let good = layer("a", 10);
    let mut paths = image_of(std::slice::from_ref(&good), "");
    let config = paths.values().find(|bytes| bytes.starts_with(b"{\"architecture")).unwrap().clone();
    let text = serde_json::json!({
        "schemaVersion": 2, "layers": layers,
        "config": { "mediaType": "c", "digest": digest(&config), "size": config.len() },
    });
    paths.insert("manifests/1".to_owned(), text.to_string().into_bytes());
    let asked_for = Arc::new(AtomicU64::new(0));
    let counter = asked_for.clone();
    let own = format!("/v2/x/blobs/{}", digest(&config));
    let port = web(move |asked| {
        if asked.path().contains("/blobs/") && asked.path() != own {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        match paths.get(asked.path().trim_start_matches("/v2/x/")) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    (port, asked_for)
}

/// What a manifest says of sizes and numbers is not believed; nothing is fetched that could not be kept.
#[tokio::test]
async fn manifests_that_ask_for_too_much_are_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let good = layer("a", 10);
    let one =
        |digest: &str, size: u64| serde_json::json!({ "mediaType": "l", "digest": digest, "size": size });
    let other = |n: usize| digest(format!("{n}").as_bytes());
    let many: Vec<_> = (0..200).map(|n| one(&other(n), 1)).collect();
    for (layers, want) in [
        (serde_json::json!(many), "an image cannot have more than 127 layers"),
        (
            serde_json::json!([one(&other(1), u64::MAX), one(&other(2), u64::MAX)]),
            "no space left on device: the layers have 18446744073709551615 bytes",
        ),
        (serde_json::json!([one(&digest(&good), 10)]), "longer than the 10 bytes announced"),
        (serde_json::json!([one(&digest(&good), 1 << 20)]), "unexpected EOF"),
        (serde_json::json!([one("sha256:../../etc", 1)]), "unsupported digest"),
        (
            serde_json::json!([one(&digest(&good), good.len() as u64), one(&other(1), 1)]),
            "has 2 layers, and its configuration names 1",
        ),
    ] {
        let (port, asked_for) = with_manifest(layers);
        let dir = tempfile::tempdir().unwrap();
        let to = store(dir.path(), RegistryConfig::default());
        let name = format!("127.0.0.1:{port}/x:1");
        let error = to.pull(&name, Auth::Anonymous, None).await.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        let asked = asked_for.load(Ordering::Relaxed);
        assert!(
            asked == 0 || want.starts_with("longer") || want.starts_with("unexpected"),
            "{want}: {asked}"
        );
        to.clean_up(true).await.unwrap();
    }
    // One that is here already has the size that it has.
    let (port, _) = with_manifest(serde_json::json!([one(&digest(&good), good.len() as u64)]));
    let dir = tempfile::tempdir().unwrap();
    let to = store(dir.path(), RegistryConfig::default());
    to.pull(&format!("127.0.0.1:{port}/x:1"), Auth::Anonymous, None).await.unwrap();
    let (port, _) = with_manifest(serde_json::json!([one(&digest(&good), u64::MAX)]));
    let error = to.pull(&format!("127.0.0.1:{port}/x:1"), Auth::Anonymous, None).await.unwrap_err();
    assert!(error.to_string().contains("not the 18446744073709551615 announced"), "{error}");
}

/// What a `hosts.toml` says of a mirror: its path, the headers it gets, what it may be asked, and that nobody's password goes
/// there.
#[tokio::test]
async fn a_mirror_is_asked_as_its_file_says() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let paths = image_of(&[layer("a", 10)], "");
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (note, all) = (seen.clone(), paths.clone());
    let mirror = web(move |asked| {
        let header = asked.header("x-team").unwrap_or_default().to_owned();
        note.lock().unwrap().push(format!("{} {header} {:?}", asked.path(), asked.header("authorization")));
        let path = asked.path().split('?').next().unwrap_or_default();
        match path.strip_prefix("/cache/deep/a/b/").and_then(|path| all.get(path)) {
            Some(bytes) => reply("200 OK", bytes),
            None => reply("404 Not Found", b""),
        }
    });
    let hosts = |more: &str| {
        format!(
            "server = \"http://127.0.0.1:1\"\n[host.\"http://127.0.0.1:{mirror}/cache/deep\"]\noverride_path = true\n{more}\
             [host.\"http://127.0.0.1:{mirror}/cache/deep\".header]\nx-team = \"blue\"\n"
        )
    };
    let dir = tempfile::tempdir().unwrap();
    let to = store(dir.path(), configured(dir.path(), "reg.example", &hosts("")));
    let auth = Auth::Basic { username: "me".into(), password: "s3cret".into() };
    to.pull("reg.example/a/b:1", auth.clone(), None).await.unwrap();
    let asked = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(asked[0], "/cache/deep/a/b/manifests/1?ns=reg.example blue None");
    assert!(asked.iter().all(|line| line.ends_with(" blue None")), "{asked:?}");
    // One that may not be asked what a tag means is only asked by digest.
    let text = hosts("capabilities = [\"pull\"]\n");
    let dir = tempfile::tempdir().unwrap();
    let to = store(dir.path(), configured(dir.path(), "reg.example", &text));
    let error = to.pull("reg.example/a/b:1", auth.clone(), None).await.unwrap_err().to_string();
    assert!(error.ends_with("dial tcp 127.0.0.1:1: connect: connection refused"), "{error}");
    assert!(seen.lock().unwrap().is_empty());
    let index = digest(&paths["manifests/1"]);
    to.pull(&format!("reg.example/a/b@{index}"), auth, None).await.unwrap();
}

/// Of several images for this architecture the one that runs on every machine of it.
#[tokio::test]
async fn the_plain_variant_of_a_platform_is_taken() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut paths = image_of(&[layer("a", 10)], "");
    let mut index: serde_json::Value = serde_json::from_slice(&paths["manifests/1"]).unwrap();
    let mut newer = index["manifests"][1].clone();
    newer["platform"]["variant"] = "v9".into();
    newer["digest"] = digest(b"nowhere").into();
    index["manifests"].as_array_mut().unwrap().insert(0, newer);
    paths.insert("manifests/1".to_owned(), index.to_string().into_bytes());
    let port = web(move |asked| match paths.get(asked.path().trim_start_matches("/v2/x/")) {
        Some(bytes) => reply("200 OK", bytes),
        None => reply("404 Not Found", b""),
    });
    let dir = tempfile::tempdir().unwrap();
    let to = store(dir.path(), RegistryConfig::default());
    to.pull(&format!("127.0.0.1:{port}/x:1"), Auth::Anonymous, None).await.unwrap();
}

/// A CA of the test's own, the registry's certificate, and ours.
struct Pki {
    ca: String,
    server: (String, String),
    client: (String, String),
}

fn pki() -> Pki {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(params, key);
    let signed = |purpose| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
    };
    let server = signed(ExtendedKeyUsagePurpose::ServerAuth);
    Pki { ca, server, client: signed(ExtendedKeyUsagePurpose::ClientAuth) }
}

#[tokio::test]
async fn a_registry_with_its_own_ca_is_trusted_when_told_so() {
    let pki = pki();
    let tmp = tempfile::tempdir().unwrap();
    let files = [
        ("ca.pem", &pki.ca),
        ("server.pem", &pki.server.0),
        ("server.key", &pki.server.1),
        ("client.pem", &pki.client.0),
        ("client.key", &pki.client.1),
    ];
    let at = |name: &str| tmp.path().join(name).display().to_string();
    for (name, text) in files {
        std::fs::write(at(name), text).unwrap();
    }
    let tls = format!(
        "  tls: {{certificate: {}, key: {}, clientcas: [{}]}}\n",
        at("server.pem"),
        at("server.key"),
        at("ca.pem")
    );
    let Some(registry) = Registry::start_tls(&tls) else { return };
    let name = format!("localhost:{}/team/box:v1", registry.port);
    let host = format!("localhost:{}", registry.port);
    let server = format!("server = \"https://{host}\"\n");
    let client = format!("client = [[{:?}, {:?}]]\n", at("client.pem"), at("client.key"));
    let with = |more: &str| {
        let dir = tempfile::tempdir().unwrap();
        let config = configured(dir.path(), &host, &format!("{server}{more}"));
        (store(dir.path(), config), dir)
    };
    let (from, _dir) = with(&format!("ca = {:?}\n{client}", at("ca.pem")));
    from.load(Cursor::new(busybox("SIGTERM", IMAGE)), None, None).await.unwrap();
    from.tag(IMAGE, &name).await.unwrap();
    from.push(&name, Auth::Anonymous, None).await.unwrap();
    let (to, _dir) = with(&format!("skip_verify = true\n{client}"));
    to.pull(&name, Auth::Anonymous, None).await.unwrap();
    let (to, _dir) = with(&client);
    let error = to.pull(&name, Auth::Anonymous, None).await.unwrap_err().to_string();
    let want = "tls: failed to verify certificate: x509: certificate signed by unknown authority";
    assert!(error.ends_with(want), "{error}");
    // Without our own certificate the registry does not talk to us.
    let (to, _dir) = with(&format!("ca = {:?}\n", at("ca.pem")));
    to.pull(&name, Auth::Anonymous, None).await.unwrap_err();
    // And plain HTTP is not what we are told to speak.
    let plain = Registry::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text = format!("server = \"https://localhost:{}\"\n", plain.port);
    let config = configured(dir.path(), "p.example", &text);
    let error =
        store(dir.path(), config).pull("p.example/x:1", Auth::Anonymous, None).await.unwrap_err().to_string();
    assert!(error.ends_with("http: server gave HTTP response to HTTPS client"), "{error}");
}
