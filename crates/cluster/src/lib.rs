//! What starts, stops and looks after a cluster: the data directory, keys, kubeconfig, and the commands on them.
//!
//! A command is its arguments (`UpArgs`, ...) with a `run` that writes to an [`Io`]. The server itself is wired
//! together in the binary; here is what it tells others ([`startup`], [`control`]) and what it starts from.
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

pub mod build;
pub mod control;
pub mod data_dir;
pub mod hello;
pub mod image;
mod io;
pub mod keys;
pub mod kubeconfig;
pub mod logs;
pub mod look;
mod pods;
mod ports;
pub mod startup;
pub mod status;
pub mod stop;
pub mod up;
mod yaml;

pub use data_dir::{Config, DataDir, Wishes};
pub use io::Io;
