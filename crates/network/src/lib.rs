//! Links, addresses and routes of the node and its pods.

