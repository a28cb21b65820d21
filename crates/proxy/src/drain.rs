//! Asking the loop to take pods out of the tables.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use minke_network::EndpointDrain;
use tokio::sync::{mpsc, oneshot};

/// A pod must be told to stop some time even when the tables can't be changed.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) enum Request {
    Drain(Ipv4Addr, oneshot::Sender<()>),
    Forget(Ipv4Addr),
}

/// The kubelet's handle on the proxy of its node.
#[derive(Debug, Clone)]
pub struct Drain {
    requests: mpsc::UnboundedSender<Request>,
}

impl Drain {
    /// The handle, and what [`crate::run`] is given. A drain that is asked for before the proxy runs
    /// is part of its first transaction.
    pub fn new() -> (Drain, DrainRequests) {
        let (requests, receiver) = mpsc::unbounded_channel();
        (Drain { requests }, DrainRequests(receiver))
    }
}

/// The proxy's end of [`Drain`].
#[derive(Debug)]
pub struct DrainRequests(pub(crate) mpsc::UnboundedReceiver<Request>);

#[async_trait::async_trait]
impl EndpointDrain for Drain {
    /// Waits at most two seconds.
    async fn drain(&self, pod_ip: IpAddr) {
        let IpAddr::V4(address) = pod_ip else { return };
        let (done, applied) = oneshot::channel();
        if self.requests.send(Request::Drain(address, done)).is_err() {
            return; // The proxy has stopped; nothing will change any more.
        }
        if tokio::time::timeout(PATIENCE, applied).await.is_err() {
            tracing::warn!(%address, "Stopping a pod that may still get new connections");
        }
    }

    fn forget(&self, pod_ip: IpAddr) {
        if let IpAddr::V4(address) = pod_ip {
            let _ = self.requests.send(Request::Forget(address));
        }
    }
}
