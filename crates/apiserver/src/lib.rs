//! The API server: HTTP, discovery, authentication, authorization, admission, the generic registry.
#![forbid(unsafe_code)]

mod admission;
mod allocate;
mod authn;
mod authz;
mod bootstrap;
mod config;
mod expiry;
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod inprocess;
mod kinds;
mod metrics;
mod proxy;
mod registry;
mod reviews;
mod server;
mod snapshots;
mod strategy;
#[cfg(test)]
mod testing;
mod token_secrets;
mod tokens;
mod usage;
mod user;
mod validation;
mod views;

pub use config::{Config, kubernetes_service_address};
pub use server::{ApiServer, BuildError};
pub use snapshots::Snapshots;
pub use user::{Attributes, UserInfo};
