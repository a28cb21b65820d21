//! Service tables and their packets: Services and EndpointSlices to nftables.
#![forbid(unsafe_code)]
