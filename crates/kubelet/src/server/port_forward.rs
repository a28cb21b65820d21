//! Port-forward: connections of a client to ports in a pod, over SPDY streams or WebSocket channels.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::spdy::session::{Session, Stream};
use super::websocket::Channels;

/// How long the second stream of a connection may be late.
const PAIR_WITHIN: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(30);
/// Connections that wait for their second stream, and those that are open.
const PENDING_MAX: usize = 256;
const OPEN_MAX: usize = 2048;
/// Ports of one WebSocket connection: two channels each, and their numbers are a byte.
pub const PORTS_MAX: usize = 127;

/// Where connections go: into a pod.
#[derive(Debug, Clone)]
pub struct Pod {
    pub netns: PathBuf,
    /// `name_namespace`, the uid: for messages.
    pub name: String,
    pub uid: String,
}

impl Pod {
    async fn connect(&self, port: u16) -> Result<TcpStream, String> {
        let netns = self.netns.clone();
        let (sender, connected) = tokio::sync::oneshot::channel();
        // A thread that has entered another network namespace is good for nothing else.
        let thread = std::thread::Builder::new().name("minke-forward".into());
        let spawned = thread.spawn(move || {
            let _ = sender.send(connect_in(&netns, port));
        });
        let failed = |why: String| {
            format!(
                "error forwarding port {port} to pod {}, uid {}: failed to connect to localhost:{port} \
                 inside namespace: {why}",
                self.name, self.uid
            )
        };
        spawned.map_err(|error| failed(error.to_string()))?;
        let stream = connected.await.map_err(|error| failed(error.to_string()))?.map_err(&failed)?;
        TcpStream::from_std(stream).map_err(|error| failed(error.to_string()))
    }

    /// Copies between the client's streams and the pod; an error is told on `error`.
    async fn forward<R, W, E>(&self, port: u16, reader: R, writer: W, mut error: E)
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let mut writer = writer;
        match self.connect(port).await {
            Ok(stream) => {
                let (mut from, mut to) = stream.into_split();
                let mut reader = reader;
                let there = async {
                    let _ = tokio::io::copy(&mut reader, &mut to).await;
                    let _ = to.shutdown().await;
                };
                let back = async {
                    let _ = tokio::io::copy(&mut from, &mut writer).await;
                    let _ = writer.shutdown().await;
                };
                // When the pod has closed, nothing that still comes from the client can arrive.
                tokio::pin!(there);
                tokio::select! {
                    () = back => {}
                    () = async { (&mut there).await; std::future::pending::<()>().await } => {}
                }
            }
            Err(why) => {
                let _ = error.write_all(why.as_bytes()).await;
                let _ = writer.shutdown().await;
            }
        }
        let _ = error.shutdown().await;
    }
}

/// Blocking; on a thread of its own.
fn connect_in(netns: &Path, port: u16) -> Result<std::net::TcpStream, String> {
    let namespace = std::fs::File::open(netns).map_err(|error| format!("{}: {error}", netns.display()))?;
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), kind)
        .map_err(|error| error.to_string())?;
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port));
    let connect = |address| std::net::TcpStream::connect_timeout(&address, CONNECT_WITHIN);
    let stream = connect(v4).or_else(|error| connect(v6).map_err(|_| error));
    let stream = stream.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => {
            format!("dial tcp4 127.0.0.1:{port}: connect: connection refused")
        }
        _ => format!("dial tcp4 127.0.0.1:{port}: {error}"),
    })?;
    stream.set_nonblocking(true).map_err(|error| error.to_string())?;
    Ok(stream)
}

/// Serves a SPDY connection until the client goes.
pub async fn spdy(mut session: Session, pod: Pod) {
    let mut waiting: HashMap<String, Vec<Stream>> = HashMap::new();
    let mut open: JoinSet<()> = JoinSet::new();
    let mut late: JoinSet<String> = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = session.incoming.recv() => stream,
            Some(_) = open.join_next() => continue,
            Some(id) = late.join_next() => {
                if let Ok(id) = id {
                    waiting.remove(&id);
                }
                continue;
            }
            () = session.closed.cancelled() => return,
        };
        let Some(stream) = stream else { return };
        // Old clients name no request: then the port has to do.
        let id = stream.header("requestid").or(stream.header("port")).unwrap_or_default().to_owned();
        if !waiting.contains_key(&id) {
            if waiting.len() >= PENDING_MAX || open.len() >= OPEN_MAX {
                continue;
            }
            let id = id.clone();
            late.spawn(async move {
                tokio::time::sleep(PAIR_WITHIN).await;
                id
            });
        }
        let pair = waiting.entry(id.clone()).or_default();
        pair.push(stream);
        if pair.len() < 2 {
            continue;
        }
        let pair = waiting.remove(&id).unwrap_or_default();
        let (mut data, mut error) = (None, None);
        for stream in pair {
            match stream.header("streamtype") {
                Some("error") => error = Some(stream),
                _ => data = Some(stream),
            }
        }
        let (Some(data), Some(error)) = (data, error) else { continue };
        let port = data.header("port").and_then(|port| port.parse().ok()).unwrap_or(0);
        let pod = pod.clone();
        open.spawn(async move {
            let ((reader, writer), (_, error)) = (data.split(), error.split());
            pod.forward(port, reader, writer, error).await;
        });
    }
}

/// Serves a WebSocket connection with two channels for each of `ports`: data, and error.
pub async fn websocket(mut channels: Channels, ports: &[u16], pod: Pod) {
    let mut open: JoinSet<()> = JoinSet::new();
    for (index, port) in ports.iter().copied().enumerate().take(PORTS_MAX) {
        let channel = (2 * index) as u8;
        let (mut writer, mut error) = (channels.writer(channel), channels.writer(channel + 1));
        let Some(reader) = channels.reader(channel) else { continue };
        let pod = pod.clone();
        open.spawn(async move {
            // The first message on each channel tells which port it is for.
            for channel in [&mut writer, &mut error] {
                if channel.write_all(&port.to_le_bytes()).await.is_err() {
                    return;
                }
            }
            pod.forward(port, reader, writer, error).await;
        });
    }
    let closed = channels.closed.clone();
    let all = async { while open.join_next().await.is_some() {} };
    tokio::select! { () = all => {}, () = closed.cancelled() => {} }
}
