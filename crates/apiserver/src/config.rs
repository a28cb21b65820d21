//! What an API server is made from. Nothing below reads files, the environment or a clock of its own.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use minke_client::Clock;
use minke_store::Store;

/// Everything an [`crate::ApiServer`] needs. Keys and certificates are PEM texts.
#[derive(Clone)]
pub struct Config {
    pub store: Store,
    pub clock: Clock,
    /// Addresses to serve HTTPS on; port 0 lets the system choose.
    pub listen: Vec<SocketAddr>,
    /// Where other nodes and pods reach this server: the endpoint of the service `kubernetes`.
    pub advertise: SocketAddr,
    /// Addresses of services; the first one is that of the service `kubernetes`.
    pub service_cidr: IpNet,
    pub node_ports: RangeInclusive<u16>,
    /// The server's certificate, followed by any that lead to its CA.
    pub serving_cert: String,
    pub serving_key: String,
    /// The CA of the serving certificate, published as `kube-root-ca.crt`.
    pub serving_ca: String,
    /// Whose client certificates name users.
    pub client_ca: String,
    /// Signs service account tokens.
    pub service_account_key: String,
    /// `iss` of service account tokens, and their default audience.
    pub issuer: String,
    /// How this server shows itself to kubelets.
    pub kubelet_client_cert: String,
    pub kubelet_client_key: String,
    /// Whose serving certificates kubelets have.
    pub kubelet_ca: String,
}

/// The address of the service `kubernetes`: the first of the service range.
pub fn kubernetes_service_address(service_cidr: &IpNet) -> IpAddr {
    service_cidr.hosts().next().unwrap_or(service_cidr.network())
}
