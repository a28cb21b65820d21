//! [`sim`]: a cluster in memory and virtual time, for the controllers. [`ControlPlane`]: the real one, without nodes.
#![forbid(unsafe_code)]

mod control_plane;
pub mod sim;

pub use control_plane::ControlPlane;
