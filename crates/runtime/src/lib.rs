//! The container runtime: images, snapshots, pod sandboxes, containers, the shim.
//!
//! The agent talks to [`Runtime`] and [`ImageService`]; [`LocalRuntime`] and [`ImageStore`] are the built-in
//! ones. Containers are children of one small shim process per pod, which is this same executable started
//! again: a binary that uses this crate calls [`shim::entry`] first thing in `main`.

mod api;

pub use api::*;
