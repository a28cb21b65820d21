//! The API server: HTTP, discovery, authentication, authorization, admission, the generic registry.
#![forbid(unsafe_code)]
