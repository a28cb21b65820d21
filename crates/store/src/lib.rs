//! Revisions, transactions, snapshots and events, and the engines that make them durable.
#![forbid(unsafe_code)]
