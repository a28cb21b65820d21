//! The node agent: pod workers, probes, volumes, status, and the kubelet's HTTPS server.
#![forbid(unsafe_code)]
