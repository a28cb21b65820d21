//! The peer at hand: etcd under the same load of durable writes, when it is installed.
//!
//! An upstream API server does at least one etcd put per create, so its rate can't be above etcd's.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use minke_scenarios::process::cpu_time;
use rustix::process::Pid;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::{Args, Table};

struct Etcd {
    child: Child,
    address: String,
    _dir: TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A free port of the loopback address, most likely.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

async fn start() -> Result<Etcd> {
    let dir = TempDir::with_prefix("minke-bench-etcd-")?;
    let (client, peer) = (format!("127.0.0.1:{}", free_port()?), format!("127.0.0.1:{}", free_port()?));
    let url = |address: &str| format!("http://{address}");
    let child = Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.path())
        .args(["--listen-client-urls", &url(&client), "--advertise-client-urls", &url(&client)])
        .args(["--listen-peer-urls", &url(&peer), "--initial-advertise-peer-urls", &url(&peer)])
        .args(["--initial-cluster", &format!("default={}", url(&peer))])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let etcd = Etcd { child, address: client, _dir: dir };
    let limit = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(&etcd.address).await.is_err() {
        ensure!(Instant::now() < limit, "etcd does not start");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(etcd)
}

/// A `PutRequest` in a gRPC frame: key is field 1, value field 2, both bytes.
fn put_request(key: &str, value: &[u8]) -> Bytes {
    let mut message = Vec::with_capacity(value.len() + 64);
    for (field, bytes) in [(1u8, key.as_bytes()), (2, value)] {
        message.push(field << 3 | 2);
        let mut length = bytes.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(bytes);
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&(message.len() as u32).to_be_bytes());
    frame.extend_from_slice(&message);
    frame.into()
}

async fn put(sender: &SendRequest<Full<Bytes>>, address: &str, key: &str, value: &[u8]) -> Result<()> {
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{address}/etcdserverpb.KV/Put"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(put_request(key, value)))?;
    let mut sender = sender.clone();
    sender.ready().await?;
    let answer = sender.send_request(request).await?;
    let body = answer.into_body().collect().await?;
    let status =
        body.trailers().and_then(|trailers| trailers.get("grpc-status")).context("no gRPC status")?;
    ensure!(status == "0", "etcd refused a put: {status:?}");
    Ok(())
}

pub async fn all(args: &Args, table: &mut Table) -> Result<()> {
    let what = "etcd: durable put, 64 clients";
    if !table.wants(what) {
        return Ok(());
    }
    if Command::new("etcd").arg("--version").output().is_err() {
        table.add(what, "not installed".to_owned(), "-");
        return Ok(());
    }
    let etcd = start().await?;
    let mut senders = Vec::new();
    for _ in 0..4 {
        let stream = TcpStream::connect(&etcd.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        senders.push(sender);
    }
    let numbers = Arc::new(AtomicU64::new(0));
    let pid = Pid::from_child(&etcd.child);
    let (cpu, start) = (cpu_time(pid)?, Instant::now());
    let end = start + Duration::from_secs(args.seconds);
    let tasks: Vec<_> = (0..64)
        .map(|client| {
            let (sender, address) = (senders[client % senders.len()].clone(), etcd.address.clone());
            let numbers = numbers.clone();
            tokio::spawn(async move {
                let value = [b'x'; 1000];
                while Instant::now() < end {
                    let n = numbers.fetch_add(1, Ordering::Relaxed);
                    put(&sender, &address, &format!("/registry/configmaps/default/map-{n}"), &value).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let done = numbers.load(Ordering::Relaxed) as f64;
    let (took, cpu) = (start.elapsed().as_secs_f64(), (cpu_time(pid)? - cpu).as_secs_f64());
    table.add(what, format!("{:.0}/s, {:.0} per CPU-second", done / took, done / cpu.max(0.01)), "-");
    Ok(())
}
