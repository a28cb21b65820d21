//! How much the API server does per second of its CPU: GET, LIST, durable CREATE, watch fan-out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use minke_client::https::Identity;
use serde_json::json;
use tokio::time::Instant;

use crate::cluster::{Cluster, connect};
use crate::{Args, Table};

/// One HTTP/2 connection, over which requests go at once.
#[derive(Clone)]
pub struct Connection {
    authority: String,
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    pub async fn new(identity: &Identity) -> Result<Connection> {
        let (stream, authority) = connect(identity, b"h2").await?;
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(64 << 20)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(connection);
        Ok(Connection { authority, sender })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.authority))
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        let mut sender = self.sender.clone();
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        ensure!(answer.status().is_success(), "{path}: {}", answer.status());
        Ok(answer.into_body())
    }

    /// The whole answer to a GET.
    pub async fn text(&self, path: &str) -> Result<Bytes> {
        Ok(self.send(Method::GET, path, Bytes::new()).await?.collect().await?.to_bytes())
    }

    /// Reads the answer to its end; returns its length in bytes.
    async fn drained(&self, method: Method, path: &str, body: Bytes) -> Result<u64> {
        let mut answer = self.send(method, path, body).await?;
        let mut length = 0;
        while let Some(frame) = answer.frame().await {
            length += frame?.data_ref().map_or(0, Bytes::len) as u64;
        }
        Ok(length)
    }
}

/// What a load did to the server.
struct Rate {
    per_second: f64,
    per_cpu_second: f64,
}

impl Rate {
    fn show(&self) -> String {
        format!("{:.0}/s, {:.0} per CPU-second", self.per_second, self.per_cpu_second)
    }
}

/// Runs `clients` loops for `seconds` and counts what they did.
async fn measure<F, Fut>(cluster: &Cluster, clients: usize, seconds: u64, one: F) -> Result<Rate>
where
    F: Fn(Connection, u64) -> Fut + Send + Sync + Clone + 'static,
    Fut: Future<Output = Result<u64>> + Send,
{
    let mut connections = Vec::new();
    for _ in 0..clients.div_ceil(16) {
        connections.push(Connection::new(&cluster.identity).await?);
    }
    let numbers = Arc::new(AtomicU64::new(0));
    let (cpu, start) = (cluster.cpu_seconds()?, Instant::now());
    let end = start + Duration::from_secs(seconds);
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let connection = connections[client % connections.len()].clone();
            let (one, numbers) = (one.clone(), numbers.clone());
            tokio::spawn(async move {
                let mut done = 0;
                while Instant::now() < end {
                    done += one(connection.clone(), numbers.fetch_add(1, Ordering::Relaxed)).await?;
                }
                anyhow::Ok(done)
            })
        })
        .collect();
    let mut done = 0;
    for task in tasks {
        done += task.await??;
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), cluster.cpu_seconds()? - cpu);
    Ok(Rate { per_second: done as f64 / took, per_cpu_second: done as f64 / cpu.max(0.01) })
}

/// A ConfigMap of about a kilobyte that does not compress to nothing.
fn config_map(name: &str) -> Bytes {
    let data: String =
        (0..900u32).map(|n| char::from(b'a' + (n.wrapping_mul(2_654_435_761) >> 27) as u8 % 26)).collect();
    Bytes::from(
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": data}})
            .to_string(),
    )
}

/// A pod that no scheduler takes, with as much in it as pods usually have.
fn pod(name: &str) -> Bytes {
    let env: Vec<_> =
        (0..10).map(|n| json!({"name": format!("VARIABLE_{n}"), "value": "some value"})).collect();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "bench", "tier": "none"}},
        "spec": {"schedulerName": "nobody", "containers": [{"name": "main", "image": "example.com/app:v1", "env": env}]},
    });
    Bytes::from(pod.to_string())
}

const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";

pub async fn all(args: &Args, table: &mut Table) -> Result<()> {
    let (get, list) = ("GET, one pod", "LIST 5,000 pods");
    let (create, watch) = ("durable CREATE, 64 clients", "watch fan-out, 1,000 watchers");
    if ![get, list, create, watch].iter().any(|what| table.wants(what)) {
        return Ok(());
    }
    let cluster = Cluster::up(&args.minke, &[])?;
    if table.wants(get) || table.wants(list) {
        let connection = Connection::new(&cluster.identity).await?;
        connection.drained(Method::POST, PODS, pod("one")).await?;
        if table.wants(get) {
            let one = |connection: Connection, _| async move {
                connection.drained(Method::GET, &format!("{PODS}/one"), Bytes::new()).await.map(|_| 1)
            };
            let rate = measure(&cluster, 64, args.seconds, one).await?;
            table.add(get, rate.show(), "10 x kube-apiserver's");
        }
        if table.wants(list) {
            for n in 0..4_999 {
                connection.drained(Method::POST, PODS, pod(&format!("pod-{n}"))).await?;
            }
            let bytes = connection.drained(Method::GET, PODS, Bytes::new()).await?;
            let one = |connection: Connection, _| async move {
                connection.drained(Method::GET, PODS, Bytes::new()).await.map(|_| 1)
            };
            let rate = measure(&cluster, 4, args.seconds, one).await?;
            let text = format!(
                "{:.1}/s, {:.1} per CPU-second, {:.1} MB each",
                rate.per_second,
                rate.per_cpu_second,
                bytes as f64 / 1e6
            );
            table.add(list, text, "20 x kube-apiserver's");
        }
    }
    if table.wants(create) {
        let one = |connection: Connection, n| async move {
            connection.drained(Method::POST, CONFIG_MAPS, config_map(&format!("map-{n}"))).await.map(|_| 1)
        };
        let rate = measure(&cluster, 64, args.seconds, one).await?;
        table.add(create, rate.show(), "3 x kube-apiserver with etcd");
    }
    if table.wants(watch) {
        table.add(watch, fan_out(&cluster, args.seconds).await?.show(), "10 x kube-apiserver's");
    }
    Ok(())
}

/// Events delivered when every write goes to a thousand watchers.
async fn fan_out(cluster: &Cluster, seconds: u64) -> Result<Rate> {
    const WATCHERS: usize = 1000;
    let path = "/api/v1/namespaces/kube-public/configmaps";
    let delivered = Arc::new(AtomicU64::new(0));
    let mut watchers = Vec::new();
    let mut connection = Connection::new(&cluster.identity).await?;
    for n in 0..WATCHERS {
        if n % 100 == 0 {
            connection = Connection::new(&cluster.identity).await?;
        }
        let mut events = connection.send(Method::GET, &format!("{path}?watch=true"), Bytes::new()).await?;
        let delivered = delivered.clone();
        watchers.push(tokio::spawn(async move {
            while let Some(Ok(frame)) = events.frame().await {
                let bytes = frame.into_data().unwrap_or_default();
                let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
                delivered.fetch_add(lines as u64, Ordering::Relaxed);
            }
        }));
    }
    let writer = Connection::new(&cluster.identity).await?;
    let (cpu, start, before) = (cluster.cpu_seconds()?, Instant::now(), delivered.load(Ordering::Relaxed));
    let mut written = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        let batch =
            (0..8).map(|n| writer.drained(Method::POST, path, config_map(&format!("fan-{}", written + n))));
        futures_util::future::try_join_all(batch).await?;
        written += 8;
        // What has been written must arrive before more is: a rate that watchers can't follow is no rate.
        let want = before + written * WATCHERS as u64;
        let limit = Instant::now() + Duration::from_secs(60);
        while delivered.load(Ordering::Relaxed) < want {
            ensure!(Instant::now() < limit, "events do not arrive");
            tokio::task::yield_now().await;
        }
    }
    let events = (delivered.load(Ordering::Relaxed) - before) as f64;
    let (took, cpu) = (start.elapsed().as_secs_f64(), cluster.cpu_seconds()? - cpu);
    for watcher in watchers {
        watcher.abort();
    }
    Ok(Rate { per_second: events / took, per_cpu_second: events / cpu.max(0.01) })
}
