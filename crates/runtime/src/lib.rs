//! The container runtime: images, snapshots, pod sandboxes, containers, the shim.
//!
//! The agent talks to [`Runtime`] and [`ImageService`]; [`LocalRuntime`] and [`ImageStore`] are the built-in
//! ones. Containers are children of one small shim process per pod, which is this same executable started
//! again: a binary that uses this crate calls [`shim::entry`] first thing in `main`.

// Standard error may be a file on a full disk, of which the macros for it panic: see `shim::log_line`.
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod api;
pub mod cgroup;
mod device;
mod files;
mod filter;
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod kernel_log;
mod local;
mod mountinfo;
mod remove;
mod seccomp;
pub mod shim;
mod spec;
mod sys;
mod users;
mod watch;

pub use api::*;
pub use files::disk_use;
pub use image::build;
pub use image::caches;
pub use image::reference::Reference;
pub use image::{ImageStore, Limits, Prepared, RegistryConfig, unpack_layer};
pub use kernel_log::KernelLog;
pub use local::{LocalRuntime, RuntimeConfig};
pub use mountinfo::mount_point;
pub use remove::remove_tree;
pub use watch::{ClockWatch, DirWatch};
