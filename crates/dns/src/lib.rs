//! The cluster DNS: Services by name, everything else from the host's resolvers.
//!
//! [`Index`] is what the zone contains, kept up to date event by event; [`answer`] makes of a query and the
//! index the bytes of the answer, and does nothing else; the server around it moves packets.
//! Implements the Kubernetes DNS schema 1.1.0 as CoreDNS does it. Not here: zone transfers, DNSSEC, DNS
//! over anything but UDP and TCP.
//!
//! **Where it listens.** Every node has the ClusterIP of the Service `kube-system/kube-dns` (10.96.0.10) as
//! an address of its own node link (`minke_network::NodeConfig::dns_address`), and this server is bound to it.
//! So a pod's query goes to its own node, passes no address translation (whose races cost lookups
//! seconds), and is answered also while the service tables are not there yet. For the objects to
//! be true, the EndpointSlice of that Service names the ClusterIP itself as the endpoint; the proxy
//! leaves such a Service alone.
#![forbid(unsafe_code)]

mod answer;
mod forward;
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod server;
mod updates;

pub use answer::answer;
pub use index::{Endpoint, Entry, Index, Port, Zone, entry_of};
pub use server::{DnsConfig, Server};
