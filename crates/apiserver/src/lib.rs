//! The API server: HTTP, discovery, authentication, authorization, admission, the generic registry.
#![forbid(unsafe_code)]

mod kinds;
mod strategy;
mod user;

pub use user::{Attributes, UserInfo};
