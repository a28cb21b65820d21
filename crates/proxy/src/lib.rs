//! The service proxy: what Services and EndpointSlices say, as nftables on this node.
//!
//! [`frontend`] decides what a Service amounts to, [`tables`] what that is in nftables; both are pure.
//! Here is the loop around them: it gathers what has changed since the last transaction, makes one
//! transaction of it, and waits for the next change. It polls nothing and touches no table but its own.
//! Upstream: pkg/proxy/nftables. Not here: IPv6 and the health checks of `healthCheckNodePort`.
#![forbid(unsafe_code)]

mod drain;
pub mod frontend;
mod runner;
pub mod tables;

pub use drain::{Drain, DrainRequests};
pub use runner::{ProxyConfig, run};

#[cfg(test)]
mod tests;
