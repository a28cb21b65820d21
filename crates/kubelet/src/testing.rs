//! What the tests of this crate share.

use std::path::PathBuf;

/// A directory of the test's own; the test removes it.
pub fn temp_dir(what: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("minke-kubelet-{what}-{}", crate::container::new_id(4)));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}
