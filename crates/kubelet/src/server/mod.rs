//! The kubelet's HTTPS server: logs, exec, attach, port-forward, pods, stats, metrics.
//!
//! Who calls shows a client certificate of the cluster or a token, and the API server says what it may.

mod auth;
mod commands;
mod configz;
pub mod follow;
mod metrics;
mod node_logs;
mod port_forward;
mod remote;
pub mod routes;
pub mod spdy;
mod stats;
mod streams;
mod upgrade;
mod usage;
pub mod websocket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use minke_client::Informer;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::context::Context;

pub use routes::Caller;

/// Connections at once; more wait in the kernel.
const CONNECTIONS_MAX: usize = 2048;
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
const HEADERS_WITHIN: Duration = Duration::from_secs(30);

pub struct Server {
    listener: TcpListener,
    tls: TlsAcceptor,
}

/// What requests are answered from.
pub struct Api {
    pub context: Arc<Context>,
    pub pods: Arc<Informer>,
    meter: usage::Meter,
    walks: stats::Walks,
    requests: metrics::Requests,
    gate: auth::Gate,
}

impl Api {
    pub fn new(context: Arc<Context>, pods: Arc<Informer>) -> Api {
        Api {
            meter: usage::Meter::new(context.runtime.clone(), &context.cgroup_root),
            walks: stats::Walks::default(),
            requests: metrics::Requests::default(),
            gate: auth::Gate::new(context.client.clone(), &context.node_name),
            context,
            pods,
        }
    }
}

impl Server {
    /// Binds `listen`. The certificates of callers must be signed by `client_ca`.
    pub async fn bind(
        listen: SocketAddr,
        cert: &str,
        key: &str,
        client_ca: &str,
    ) -> Result<Server, crate::Error> {
        let tls = |error: &dyn std::fmt::Display| crate::Error::Tls(error.to_string());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(client_ca.as_bytes()) {
            roots.add(root.map_err(|error| tls(&error))?).map_err(|error| tls(&error))?;
        }
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                // Who shows none may have a token.
                .allow_unauthenticated()
                .build();
        let verifier = verifier.map_err(|error| tls(&error))?;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert.as_bytes()).collect();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| tls(&error))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| tls(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.map_err(|error| tls(&error))?, key)
            .map_err(|error| tls(&error))?;
        // Upgrades need HTTP/1.1, and nobody here needs more.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let listener = TcpListener::bind(listen).await;
        let listener =
            listener.map_err(|source| crate::Error::Io { what: format!("listen on {listen}"), source })?;
        Ok(Server { listener, tls: TlsAcceptor::from(Arc::new(config)) })
    }

    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`; open connections end with it.
    pub async fn run(self, api: Api, stop: CancellationToken) {
        let api = Arc::new(api);
        let permits = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
        loop {
            let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = stop.cancelled() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, say: others must end first.
                    tracing::warn!(%error, "Connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (tls, api, stop) = (self.tls.clone(), api.clone(), stop.clone());
            tokio::spawn(async move {
                let serve = serve_connection(stream, tls, api);
                tokio::select! { () = serve => {}, () = stop.cancelled() => {} }
                drop(permit);
            });
        }
    }
}

async fn serve_connection(stream: tokio::net::TcpStream, tls: TlsAcceptor, api: Arc<Api>) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return,
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let caller = Arc::new(certificate.and_then(|der| Caller::of(der)));
    let service = service_fn(move |request| {
        let (api, caller) = (api.clone(), caller.clone());
        async move {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            let began = tokio::time::Instant::now();
            api.requests.begin();
            let passed = api.gate.pass((*caller).as_ref(), &method, &path, request.headers()).await;
            let response = match passed {
                Ok(()) => routes::answer(&api, request).await,
                Err(refusal) => refusal,
            };
            api.requests.end(method.as_str(), &path, began.elapsed());
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(hyper_util::rt::TokioTimer::new()).header_read_timeout(HEADERS_WITHIN);
    let served = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
    if let Err(error) = served {
        tracing::debug!(%error, "Connection ended");
    }
}
