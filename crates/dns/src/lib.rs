//! The cluster DNS, answered from the cache.
#![forbid(unsafe_code)]
