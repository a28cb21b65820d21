//! What a Kubernetes object is: kinds, schemas, codecs, selectors, patches; no I/O, no clock.
#![forbid(unsafe_code)]
