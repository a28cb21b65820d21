//! The server as a whole: built from a [`Config`], then run until it is told to stop.

use std::net::SocketAddr;
use std::sync::Arc;

use minke_client::Client;
use tokio_util::sync::CancellationToken;

use crate::{Config, UserInfo};

/// Why a server cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    /// A certificate or key that cannot be used.
    #[error("{what}: {why}")]
    Key { what: &'static str, why: String },
}

/// An API server that listens, but does not answer before it is run.
pub struct ApiServer {
    config: Config,
}

impl ApiServer {
    /// Checks keys and certificates, and binds the sockets.
    pub async fn build(config: Config) -> Result<ApiServer, BuildError> {
        Ok(ApiServer { config })
    }

    /// Where it listens, with the ports that the system chose.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.config.listen.clone()
    }

    /// A way in for components of this process, under the identity `user`: the same registry, admission
    /// and authorization, without HTTP. Works before and after [`ApiServer::run`], too.
    pub fn client(&self, _user: UserInfo) -> Arc<dyn Client> {
        unreachable!("the registry is not wired yet")
    }

    /// Serves until `stop`, then ends watches, finishes requests and closes the store.
    pub async fn run(self, stop: CancellationToken) {
        stop.cancelled().await;
    }
}
