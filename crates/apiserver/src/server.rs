//! The server as a whole: built from a [`Config`], then run until it is told to stop.

use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use minke_api::{Kind, Status};
use minke_client::{Client, Informers};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::quota;
use crate::allocate::Allocator;
use crate::authn::Authenticator;
use crate::authz::Authorizer;
use crate::http::{self, Server};
use crate::inprocess::InProcess;
use crate::metrics::Metrics;
use crate::registry::Registry;
use crate::tokens::Tokens;
use crate::usage::Usage;
use crate::{Config, Snapshots, UserInfo, bootstrap, expiry, proxy};

/// Why a server cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    /// A certificate or key that cannot be used.
    #[error("{what}: {why}")]
    Key { what: &'static str, why: String },
    #[error("cannot make what every cluster has: {0}")]
    Bootstrap(#[source] Box<Status>),
}

/// An API server that listens, but does not answer before it is run.
pub struct ApiServer {
    pub(crate) server: Arc<Server>,
    listeners: Vec<TcpListener>,
    tls: Arc<rustls::ServerConfig>,
}

impl ApiServer {
    /// Checks keys and certificates, binds the sockets, and makes what every cluster has.
    pub async fn build(config: Config) -> Result<ApiServer, BuildError> {
        let bad = |what: &'static str| move |why: String| BuildError::Key { what, why };
        let snapshots: Arc<dyn Snapshots> = Arc::new(config.store.clone());
        let tokens = Tokens::new(&config.service_account_key, &config.issuer, vec![config.issuer.clone()])
            .map_err(|error| bad("service account key")(error.to_string()))?;
        let tokens = Arc::new(tokens);
        let client_ca: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(config.client_ca.as_bytes())
                .collect::<Result<_, _>>()
                .map_err(|error| bad("client CA")(error.to_string()))?;
        let authenticator = Authenticator::new(&client_ca, tokens.clone(), snapshots.clone())
            .map_err(|error| bad("client CA")(error.to_string()))?;
        let tls = http::tls_config(&config.serving_cert, &config.serving_key, authenticator.tls_verifier())
            .map_err(bad("serving certificate"))?;
        let proxy = proxy::new(&config).map_err(bad("kubelet client certificate"))?;
        let usage = Some(Usage::new(proxy.clone()));
        let services: Vec<_> =
            snapshots.list(Kind::of::<Service>(), "").iter().map(|service| service.value()).collect();
        let registry = Arc::new(Registry {
            store: config.store.clone(),
            clock: config.clock,
            authorizer: Arc::new(Authorizer::new(snapshots.clone())),
            snapshots,
            authenticator: Arc::new(authenticator),
            tokens,
            ca: config.serving_ca.clone(),
            allocator: Allocator::new(config.service_cidr, config.node_ports.clone(), &services),
            usage,
        });
        let mut listeners = Vec::new();
        for address in &config.listen {
            let listener = TcpListener::bind(address).await;
            listeners.push(listener.map_err(|source| BuildError::Listen { address: *address, source })?);
        }
        let server = Arc::new(Server {
            registry,
            config,
            metrics: Metrics::default(),
            proxy,
            stop_watches: CancellationToken::new(),
        });
        let server = ApiServer { server, listeners, tls: Arc::new(tls) };
        bootstrap::ensure(&*server.own_client(), &server.server.config)
            .await
            .map_err(|status| BuildError::Bootstrap(Box::new(status)))?;
        Ok(server)
    }

    /// Where it listens, with the ports that the system chose.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }

    /// A way in for components of this process, under the identity `user`: the same registry, admission
    /// and authorization, without HTTP. Works before [`ApiServer::run`], too.
    pub fn client(&self, user: UserInfo) -> Arc<dyn Client> {
        Arc::new(InProcess::new(self.server.registry.clone(), user))
    }

    /// As [`ApiServer::client`], for those who need further identities while the server runs.
    pub fn clients(&self) -> impl Fn(UserInfo) -> Arc<dyn Client> + Send + Sync + use<> {
        let registry = self.server.registry.clone();
        move |user| Arc::new(InProcess::new(registry.clone(), user))
    }

    fn own_client(&self) -> Arc<dyn Client> {
        self.client(UserInfo::new("system:apiserver", &["system:masters"]))
    }

    /// Serves until `stop`, then ends watches, finishes requests and closes the store.
    pub async fn run(self, stop: CancellationToken) {
        let client = self.own_client();
        let ApiServer { server, listeners, tls } = self;
        let config = server.config.clone();
        let tasks = TaskTracker::new();
        let informers = Informers::new(client, stop.clone());
        tasks.spawn(bootstrap::keep(informers, config.clone(), stop.clone()));
        tasks.spawn(expiry::run(config.store.clone(), config.clock, expiry::TTL, stop.clone()));
        tasks.spawn(quota::keeper::run(config.store.clone(), config.clock, stop.clone()));
        for listener in listeners {
            tasks.spawn(http::listen(server.clone(), listener, tls.clone(), stop.clone()));
        }
        tasks.close();
        stop.cancelled().await;
        server.stop_watches.cancel();
        tasks.wait().await;
        config.store.close().await;
    }
}
