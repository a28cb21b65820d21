//! Links, addresses and routes of the node and its pods, and what else kubelet, proxy and the
//! command line need of the kernel's network: running an nftables script, forgetting connections.
//!
//! [`NodeNetwork`] is a node's part: a pod is a veth pair and one host route, no bridge. Everything
//! carries names made from the [`ClusterId`], so that clusters on one machine don't meet and
//! [`leftovers`] can find what a crash left behind. Nothing here knows Services or the API.

mod address;
mod cluster_id;
mod conntrack;
#[doc(hidden)]
pub mod fuzzing;
mod ipam;
mod netlink;
mod nfnetlink;
mod nft;
mod node;
mod sys;
mod table_watch;

pub use address::{NodeAddress, host_name, node_address};
pub use cluster_id::ClusterId;
pub use conntrack::{Flow, forget_udp_flows};
pub use ipam::AddressPool;
pub use nft::apply as apply_nft;
pub use node::{
    Attachment, GATEWAY, NodeConfig, NodeNetwork, leftovers, own_address, remove_leftovers, routed_ranges,
};
pub use table_watch::TableWatch;

use std::net::{IpAddr, Ipv4Addr};

use ipnet::Ipv4Net;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every address of the node's range is taken; it gets better when a pod goes.
    #[error("no IP addresses available in range {0}")]
    Exhausted(Ipv4Net),
    /// The address belongs to another pod already, or is none of this node's.
    #[error("address {0} is not available in this node's range")]
    Unavailable(Ipv4Addr),
    /// Another cluster, or another program, routes these addresses already.
    #[error("addresses {range} are in use on this machine already (route to {link})")]
    Taken { range: Ipv4Net, link: String },
    /// The sandbox's network namespace can't be entered: the sandbox is gone.
    #[error("open network namespace {path}")]
    Namespace { path: String, source: std::io::Error },
    /// A file below /proc/sys can't be written.
    #[error("set {path}")]
    Sysctl { path: String, source: std::io::Error },
    /// The kernel refused a change of links, addresses, routes or neighbours.
    #[error("{what}")]
    Netlink { what: String, source: std::io::Error },
    /// `nft` is missing; nothing about Services can work.
    #[error("run nft (the Debian package is nftables)")]
    NftMissing(#[source] std::io::Error),
    /// `nft` refused the script; nothing of it was applied.
    #[error("nft: {0}")]
    Nft(String),
    /// Several steps of a clean-up failed; the others were done.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<Error>),
}

/// Takes a pod out of the way of new connections, before it is told to stop.
///
/// The service proxy implements it; the kubelet calls it before a pod's first SIGTERM. That way no
/// client is sent to a pod that already knows that it must go, however late the pod's
/// EndpointSlices follow.
#[async_trait::async_trait]
pub trait EndpointDrain: Send + Sync {
    /// From the return of this call on, no new connection to a Service goes to `pod_ip` while the
    /// Service has another endpoint that is ready. Connections that exist go on.
    async fn drain(&self, pod_ip: IpAddr);

    /// Ends the draining of `pod_ip`, because another pod is about to get the address.
    fn forget(&self, pod_ip: IpAddr);
}

/// Runs `work` on a thread of its own. Work that enters a network namespace must not run on a thread
/// that anyone else gets to use afterwards.
pub(crate) async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("minke-network".into())
        .spawn(move || {
            // Nobody waits any more when the caller was cancelled; the work is whole all the same.
            let _ = sender.send(work());
        })
        .expect("the system can start a thread");
    receiver.await.expect("network work does not panic")
}
