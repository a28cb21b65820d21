//! The node: many pods on it, and what a container, an exec, a log line and an image cost beside other runtimes.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt, future::try_join_all};
use minke_api::Object;
use minke_client::{Client, ListOptions, Target, WatchEvent, WatchOptions};
use minke_runtime::{
    ContainerSpec, ContainerState, ImageStore, LocalRuntime, RegistryConfig, Runtime, RuntimeConfig,
    SandboxSpec, Seccomp,
};
use minke_scenarios::process::memory_kib;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::cluster::{Cluster, connect};
use crate::load::Connection;
use crate::pods::{IMAGE, delete, kind, ready, shims, template, until};
use crate::{Args, Table, median, percentile};

/// Pods of a node that is full.
const FULL: usize = 500;
/// Bytes of the log that is written and read, in lines of a hundred: less than what makes it rotate.
const LOG: usize = 6 << 20;
/// Bytes of the image that is loaded, in files of 64 KiB.
const IMAGE_BYTES: usize = 200 << 20;

pub async fn all(args: &Args, table: &mut Table) -> Result<()> {
    let (burst, exec) = ("50 pods at once, created to Running", "exec of `true` through the API server");
    let (written, read) =
        ("log of one container, written", "log of one container, read through the API server");
    if [burst, exec, written, read].iter().any(|what| table.wants(what)) {
        let cluster = Cluster::up(&args.minke, &[])?;
        let client = cluster.client()?;
        if table.wants(burst) {
            let took = fifty_at_once(&client).await?;
            let (half, most) = (percentile(took.clone(), 50), percentile(took, 99));
            table.add(burst, format!("{half:.0} ms p50, {most:.0} ms p99"), "-");
        }
        if table.wants(exec) {
            run(&client, "exec", json!({}), "Running").await?;
            let mut took = Vec::new();
            for _ in 0..args.rounds * 4 {
                took.push(exec_true(&cluster, "exec").await?.as_secs_f64() * 1e3);
            }
            table.add(exec, format!("{:.1} ms p50", median(took)), "-");
        }
        if table.wants(written) || table.wants(read) {
            let (mut write, mut fetch) = (Vec::new(), Vec::new());
            for round in 0..args.rounds {
                let (written, read) = log_rates(&cluster, &client, &format!("log-{round}")).await?;
                write.push(written);
                fetch.push(read);
            }
            table.add(written, format!("{:.0} MB/s, lines of 100 bytes", median(write)), "-");
            table.add(read, format!("{:.0} MB/s", median(fetch)), "-");
        }
    }
    full_node(args, table).await?;
    container_starts(args, table).await?;
    image_loads(table).await
}

async fn fifty_at_once(client: &dyn Client) -> Result<Vec<f64>> {
    let pods = kind("", "pods");
    let from = client.list(pods, "default", ListOptions::default()).await?.revision;
    let options = WatchOptions { from, ..WatchOptions::default() };
    let mut events = client.watch(pods, "default", options).await?;
    let started = try_join_all((0..50).map(|n| async move {
        let mut pod = template(json!({"run": "burst"}));
        pod["metadata"]["name"] = format!("burst-{n}").into();
        let start = Instant::now();
        let created = client.create(Target::collection(pods, "default"), pod).await?;
        anyhow::Ok((created.name().to_owned(), start))
    }));
    let mut running: BTreeMap<String, Instant> = BTreeMap::new();
    let follow = async {
        while running.len() < 50 {
            if let WatchEvent::Modified(pod) = events.next().await.context("the watch ended")??
                && pod.field("status.phase") == Some("Running")
            {
                running.entry(pod.name().to_owned()).or_insert_with(Instant::now);
            }
        }
        anyhow::Ok(())
    };
    let (started, followed) = tokio::join!(started, follow);
    followed?;
    let took = started?
        .into_iter()
        .filter_map(|(name, start)| Some(running.get(&name)?.duration_since(start).as_secs_f64() * 1e3));
    let took: Vec<f64> = took.collect();
    for n in 0..50 {
        delete(client, "", "pods", &format!("burst-{n}")).await?;
    }
    Ok(took)
}

/// Starts a pod whose spec has `more` in it, and waits until it is in `phase`.
async fn run(client: &dyn Client, name: &str, more: Value, phase: &str) -> Result<()> {
    let pods = kind("", "pods");
    let mut pod = template(json!({"run": name}));
    pod["metadata"]["name"] = name.into();
    for (field, value) in more.as_object().into_iter().flatten() {
        pod["spec"][field] = value.clone();
    }
    let created = client.create(Target::collection(pods, "default"), pod).await?;
    let there = |pod: Option<&Object>| pod.is_some_and(|pod| pod.field("status.phase") == Some(phase));
    until(client, pods, name, created.revision(), there).await
}

/// From the first packet to the exit code of `true` in the pod, as a client of its own.
async fn exec_true(cluster: &Cluster, pod: &str) -> Result<Duration> {
    let start = Instant::now();
    let (stream, authority) = connect(&cluster.identity, b"http/1.1").await?;
    let url = format!("wss://{authority}/api/v1/namespaces/default/pods/{pod}/exec?command=true&stdout=true");
    let mut request = url.into_client_request()?;
    request.headers_mut().insert("sec-websocket-protocol", "v5.channel.k8s.io".parse()?);
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await?;
    while let Some(message) = socket.next().await {
        // Channel 3 tells how it ended.
        if let Message::Binary(bytes) = message?
            && bytes.first() == Some(&3)
        {
            let status: Value = serde_json::from_slice(&bytes[1..])?;
            ensure!(status["status"] == "Success", "exec failed: {status}");
            return Ok(start.elapsed());
        }
    }
    bail!("exec ended without a status")
}

/// MB/s of a container that writes as fast as it can, and of a client that reads it all.
async fn log_rates(cluster: &Cluster, client: &dyn Client, name: &str) -> Result<(f64, f64)> {
    let dir = TempDir::with_prefix("minke-bench-log-")?;
    let line = format!("{}\n", "x".repeat(99));
    std::fs::write(dir.path().join("lines"), line.repeat(LOG / line.len()))?;
    let container = json!([{"name": "hello", "image": IMAGE, "command": ["cat", "/data/lines"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}]}]);
    let volumes = json!([{"name": "data", "hostPath": {"path": dir.path()}}]);
    let spec = json!({"restartPolicy": "Never", "containers": container, "volumes": volumes});
    run(client, name, spec, "Succeeded").await?;
    let path = format!("/api/v1/namespaces/default/pods/{name}/log?timestamps=true");
    let connection = Connection::new(&cluster.identity).await?;
    let start = Instant::now();
    let text = connection.text(&path).await?;
    let read = text.len() as f64 / 1e6 / start.elapsed().as_secs_f64();
    // Times of a status are whole seconds, so what is written is timed by the lines' own.
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    ensure!(lines.len() == LOG / line.len(), "{} lines of the log are there", lines.len());
    let stamp = |line: Option<&&[u8]>| {
        let line = std::str::from_utf8(line.context("the log is empty")?)?;
        anyhow::Ok(line.split(' ').next().unwrap_or_default().parse::<jiff::Timestamp>()?)
    };
    let took = stamp(lines.last())?.duration_since(stamp(lines.first())?).as_secs_f64();
    Ok((LOG as f64 / 1e6 / took, read))
}

async fn full_node(args: &Args, table: &mut Table) -> Result<()> {
    let (all, idle) = ("500 pods on this node, all Ready", "500 pods, idle afterwards");
    let (memory, probed) =
        ("500 pods, memory of one more", "500 pods, each with an httpGet probe every 10 s");
    if ![all, idle, memory, probed].iter().any(|what| table.wants(what)) {
        return Ok(());
    }
    let cluster = Cluster::up(&args.minke, &["--max-pods", "600"])?;
    let client = cluster.client()?;
    let rss = || memory_kib(cluster.pid.as_raw_pid(), "status", "VmRSS").context("no VmRSS");
    let others = shims();
    let before = rss()?;
    let took = ready(&client, "full", FULL as i64, template(json!({"app": "full"}))).await?;
    table.add(all, format!("{:.1} s", took.as_secs_f64()), "-");
    let busy = |seconds: u64| {
        let cluster = &cluster;
        async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let before = cluster.cpu_seconds()?;
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            anyhow::Ok((cluster.cpu_seconds()? - before) * 100.0 / seconds as f64)
        }
    };
    let window = args.seconds * 6;
    let share = busy(window).await?;
    let after = rss()?;
    table.add(
        idle,
        format!("{share:.2} % of a core over {window} s, {:.0} MB RSS", after as f64 / 1024.0),
        "-",
    );
    let mine: Vec<i32> = shims().into_iter().filter(|pid| !others.contains(pid)).collect();
    let pss: Vec<f64> =
        mine.iter().filter_map(|pid| memory_kib(*pid, "smaps_rollup", "Pss")).map(|kib| kib as f64).collect();
    let grown = after.saturating_sub(before) as f64 / FULL as f64;
    table.add(memory, format!("{:.0} kB PSS of its shim, {grown:.0} kB RSS of the server", median(pss)), "-");
    delete(&client, "apps", "deployments", "full").await?;
    if table.wants(probed) {
        let mut template = template(json!({"app": "probed"}));
        template["spec"]["containers"][0]["livenessProbe"] =
            json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 10});
        ready(&client, "probed", FULL as i64, template).await?;
        table.add(probed, format!("{:.2} % of a core over {window} s", busy(window).await?), "-");
        delete(&client, "apps", "deployments", "probed").await?;
    }
    Ok(())
}

/// A runtime on its own, without a cluster.
struct Node {
    runtime: LocalRuntime,
    cgroup: String,
    dir: TempDir,
}

impl Node {
    async fn new() -> Result<Node> {
        let dir = TempDir::with_prefix("minke-bench-node-")?;
        let cgroup = format!("minke-bench-{}", std::process::id());
        let images = ImageStore::open(dir.path(), RegistryConfig::default())?;
        if let Some(archive) = minke_cluster::hello::missing(&images).await? {
            images.load(Cursor::new(archive), None, None).await?;
        }
        let config = RuntimeConfig { root: dir.path().to_owned(), cgroup_root: cgroup.clone() };
        Ok(Node { runtime: LocalRuntime::open(config, images).await?, cgroup, dir })
    }

    /// A sandbox and in it `true`, from nothing to its exit.
    async fn run_true(&self, name: &str) -> Result<Duration> {
        let mut events = self.runtime.subscribe();
        let start = Instant::now();
        self.runtime
            .run_sandbox(SandboxSpec {
                id: name.into(),
                namespace: "default".into(),
                name: name.into(),
                uid: name.into(),
                hostname: name.into(),
                log_dir: self.dir.path().join("logs").join(name),
                cgroup_parent: format!("{}/{name}", self.cgroup),
                ..SandboxSpec::default()
            })
            .await?;
        let id = format!("{name}-true");
        let spec = ContainerSpec {
            id: id.clone(),
            name: id.clone(),
            image: IMAGE.into(),
            command: vec!["true".into()],
            seccomp: Seccomp::RuntimeDefault,
            log_path: self.dir.path().join("logs").join(name).join("0.log"),
            ..ContainerSpec::default()
        };
        self.runtime.create_container(name, spec).await?;
        self.runtime.start_container(&id).await?;
        while self.runtime.container_status(&id).await?.state != ContainerState::Exited {
            events.recv().await?;
        }
        Ok(start.elapsed())
    }
}

async fn container_starts(args: &Args, table: &mut Table) -> Result<()> {
    let ours = "sandbox with `true` in it, begun to ended";
    if !table.wants(ours) && !table.wants("crun run") && !table.wants("runc run") {
        return Ok(());
    }
    let node = Node::new().await?;
    let mut took = Vec::new();
    for n in 0..args.rounds * 4 {
        took.push(node.run_true(&format!("pod{n}")).await?.as_secs_f64() * 1e3);
    }
    table.add(ours, format!("{:.1} ms p50", median(took)), "-");
    for (program, what) in [("crun", "the same by `crun run`"), ("runc", "the same by `runc run`")] {
        match peer_starts(args, &node, program).await? {
            Ok(took) => table.add(what, format!("{:.1} ms p50", median(took)), "-"),
            Err(why) => table.add(what, why, "-"),
        }
    }
    node.runtime.shutdown_all().await?;
    Ok(())
}

/// Times of the program's own default bundle with the same image in it, or why there are none.
async fn peer_starts(args: &Args, node: &Node, program: &str) -> Result<Result<Vec<f64>, String>> {
    if Command::new(program).arg("--version").output().is_err() {
        return Ok(Err("not installed".to_owned()));
    }
    let bundle = TempDir::with_prefix("minke-bench-bundle-")?;
    let root = bundle.path().join("rootfs");
    let prepared = node.runtime.images().prepare(IMAGE)?;
    std::fs::create_dir(&root)?;
    for layer in prepared.layers.iter().rev() {
        let layer = node.dir.path().join("snapshots").join(layer).join(".");
        let copied = Command::new("cp").arg("-a").arg(layer).arg(&root).status()?;
        ensure!(copied.success(), "cannot copy the image");
    }
    let made = Command::new(program).arg("spec").current_dir(bundle.path()).status()?;
    ensure!(made.success(), "{program} spec failed");
    let path = bundle.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["process"]["args"] = json!(["true"]);
    config["process"]["terminal"] = false.into();
    std::fs::write(&path, config.to_string())?;
    let mut took = Vec::new();
    for n in 0..args.rounds * 4 {
        let start = Instant::now();
        let ran = Command::new(program)
            .args(["run", "--bundle"])
            .arg(bundle.path())
            .arg(format!("minke-bench-{}-{n}", std::process::id()))
            .stdin(Stdio::null())
            .output()?;
        if !ran.status.success() {
            return Ok(Err(String::from_utf8_lossy(&ran.stderr).trim().to_owned()));
        }
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Ok(took))
}

async fn image_loads(table: &mut Table) -> Result<()> {
    let (ours, podman) = ("image of 200 MB from an archive", "the same by `podman load`");
    if !table.wants(ours) && !table.wants(podman) {
        return Ok(());
    }
    let dir = TempDir::with_prefix("minke-bench-image-")?;
    let archive = big_image(dir.path())?;
    let rate = |took: Duration| format!("{:.0} MB/s", IMAGE_BYTES as f64 / 1e6 / took.as_secs_f64());
    let images = ImageStore::open(&dir.path().join("minke"), RegistryConfig::default())?;
    let start = Instant::now();
    images.load(std::fs::File::open(&archive)?, None, None).await?;
    images.prepare("minke.local/big:1")?;
    table.add(ours, rate(start.elapsed()), "-");
    let start = Instant::now();
    let loaded = Command::new("podman")
        .arg("--root")
        .arg(dir.path().join("podman"))
        .arg("--runroot")
        .arg(dir.path().join("podman-run"))
        .args(["--storage-driver", "overlay", "load", "--quiet", "--input"])
        .arg(&archive)
        .output();
    let figure = match loaded {
        Err(_) => "not installed".to_owned(),
        Ok(loaded) if loaded.status.success() => rate(start.elapsed()),
        Ok(loaded) => format!("failed: {}", String::from_utf8_lossy(&loaded.stderr).trim()),
    };
    table.add(podman, figure, "-");
    Ok(())
}

/// An archive of `docker save` with one layer of files whose content hardly compresses.
fn big_image(dir: &Path) -> Result<PathBuf> {
    const FILE: usize = 64 << 10;
    let mut state = 1u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut layer = tar::Builder::new(Vec::with_capacity(IMAGE_BYTES + (IMAGE_BYTES >> 5)));
    for n in 0..IMAGE_BYTES / FILE {
        let content: Vec<u8> = (0..FILE / 8).flat_map(|_| next()).collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(FILE as u64);
        header.set_mode(0o644);
        layer.append_data(&mut header, format!("data/{}/{n}", n % 64), &content[..])?;
    }
    let layer = layer.into_inner()?;
    let digest = format!("sha256:{:x}", <sha2::Sha256 as sha2::Digest>::digest(&layer));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/data"]},
        "rootfs": {"type": "layers", "diff_ids": [digest]}, "history": [],
    });
    let manifest =
        json!([{"Config": "config.json", "RepoTags": ["minke.local/big:1"], "Layers": ["layer.tar"]}]);
    let path = dir.join("big.tar");
    let mut archive = tar::Builder::new(std::io::BufWriter::new(std::fs::File::create(&path)?));
    for (name, content) in [
        ("config.json", config.to_string().into_bytes()),
        ("layer.tar", layer),
        ("manifest.json", manifest.to_string().into_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, &content[..])?;
    }
    archive.into_inner()?.flush()?;
    Ok(path)
}
