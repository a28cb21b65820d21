//! What the scenario runner, the crash rounds and `bench/` share: clusters of their own, and a language for
//! scenarios.
#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

pub mod cluster;
pub mod inventory;
pub mod process;
pub mod scenario;
