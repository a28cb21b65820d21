//! The part of the network that pods need: an address each, and a link to it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use minke_network::{AddressPool, NodeNetwork};

/// Connects sandboxes. Errors are texts for events.
#[async_trait]
pub trait PodNetwork: Send + Sync {
    fn allocate(&self) -> Result<IpAddr, String>;
    /// Takes the address of a pod that runs already.
    fn reserve(&self, address: IpAddr) -> Result<(), String>;
    fn release(&self, address: IpAddr);
    async fn attach(&self, sandbox: &str, netns: &Path, address: IpAddr) -> Result<(), String>;
    /// Idempotent.
    async fn detach(&self, sandbox: &str) -> Result<(), String>;
}

/// Links and addresses of this node.
pub struct LocalNetwork {
    node: NodeNetwork,
    pool: Mutex<AddressPool>,
}

impl LocalNetwork {
    pub fn new(node: NodeNetwork) -> LocalNetwork {
        let pool = Mutex::new(AddressPool::new(node.config().pod_cidr));
        LocalNetwork { node, pool }
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, AddressPool> {
        self.pool.lock().expect("taking an address does not panic")
    }
}

fn v4(address: IpAddr) -> Result<Ipv4Addr, String> {
    match address {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => Err(format!("address {address} is not of this node's range")),
    }
}

#[async_trait]
impl PodNetwork for LocalNetwork {
    fn allocate(&self) -> Result<IpAddr, String> {
        self.pool().allocate().map(IpAddr::V4).map_err(|error| error.to_string())
    }

    fn reserve(&self, address: IpAddr) -> Result<(), String> {
        self.pool().reserve(v4(address)?).map_err(|error| error.to_string())
    }

    fn release(&self, address: IpAddr) {
        if let IpAddr::V4(address) = address {
            self.pool().release(address);
        }
    }

    async fn attach(&self, sandbox: &str, netns: &Path, address: IpAddr) -> Result<(), String> {
        let attached = self.node.attach(sandbox, netns, v4(address)?).await;
        attached.map(drop).map_err(|error| chain(&error))
    }

    async fn detach(&self, sandbox: &str) -> Result<(), String> {
        self.node.detach(sandbox).await.map_err(|error| chain(&error))
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
