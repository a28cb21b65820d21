//! The scheduler: a picture of the nodes, plugins, binding.
#![forbid(unsafe_code)]
