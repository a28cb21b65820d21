//! What starts, stops and looks after a cluster: the data directory, keys, kubeconfig, and the commands on them.
#![forbid(unsafe_code)]

pub mod data_dir;
pub mod keys;
pub mod kubeconfig;
mod ports;
mod yaml;
