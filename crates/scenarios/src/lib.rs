//! What the scenario runner, the crash rounds and the benchmarks share: clusters of their own, and a language for
//! scenarios.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod process;
pub mod scenario;
