//! Up, down, node, image, keys, kubeconfig: what starts, stops and grows a cluster.
#![forbid(unsafe_code)]
