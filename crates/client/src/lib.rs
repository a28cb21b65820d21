//! How a component reaches the cluster: the Client trait, informers, the work queue.
#![forbid(unsafe_code)]
