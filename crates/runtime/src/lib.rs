//! The container runtime: images, snapshots, pod sandboxes, containers, the shim.

