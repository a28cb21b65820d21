//! [`sim`]: a cluster in memory and virtual time, for the controllers.
#![forbid(unsafe_code)]

pub mod sim;
