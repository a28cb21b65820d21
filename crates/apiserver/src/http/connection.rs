//! Connections: TLS, HTTP/1.1 and HTTP/2, and their end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::{Peer, Server};

/// Connections that are open at a time.
const CONNECTIONS: usize = 16 << 10;
const HANDSHAKE: Duration = Duration::from_secs(10);
const HEADERS: Duration = Duration::from_secs(30);
/// All headers of a request together.
const HEADER_BYTES: usize = 256 << 10;
const STREAMS: u32 = 1000;
/// A connection that does not answer pings for this long is gone.
const PING: Duration = Duration::from_secs(30);
/// How long requests may take to finish once the server stops.
const GRACE: Duration = Duration::from_secs(10);

/// What TLS is spoken with: our certificate, and a wish to see the client's.
pub fn tls_config(
    cert_pem: &str,
    key_pem: &str,
    verifier: Arc<dyn ClientCertVerifier>,
) -> Result<rustls::ServerConfig, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(cert_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|error| error.to_string())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Accepts connections until `stop`, then lets their requests finish.
pub async fn listen(
    server: Arc<Server>,
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(tls);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let tasks = tokio_util::task::TaskTracker::new();
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: taking no more for a moment lets some be closed.
                tracing::warn!(%error, "Cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (server, acceptor, graceful) = (server.clone(), acceptor.clone(), graceful.watcher());
        tasks.spawn(async move {
            serve(server, acceptor, stream, address, graceful).await;
            drop(permit);
        });
    }
    drop(listener);
    tasks.close();
    let finished = async { tokio::join!(graceful.shutdown(), tasks.wait()) };
    if tokio::time::timeout(GRACE, finished).await.is_err() {
        tracing::debug!("Connections were still open when the server stopped");
    }
}

async fn serve(
    server: Arc<Server>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    graceful: hyper_util::server::graceful::Watcher,
) {
    // Answers are written whole; waiting to fill packets would only delay them.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificates = stream.get_ref().1.peer_certificates().filter(|chain| !chain.is_empty());
    let identity = certificates.map(|chain| Arc::new(server.registry.authenticator.identify(chain)));
    let peer = Peer { identity, address };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADER_BYTES as u32)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING / 2);
    let service = service_fn(move |request: http::Request<Incoming>| {
        let request = request.map(BodyExt::boxed_unsync);
        server.clone().handle(peer.clone(), request)
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(error) = graceful.watch(connection).await {
        tracing::debug!(%address, error, "Connection ended");
    }
}
