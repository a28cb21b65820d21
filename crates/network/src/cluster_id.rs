//! The short name of a cluster on this machine, and the names made from it.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sha2::{Digest, Sha256};

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const LENGTH: usize = 6;

/// Tells the clusters of one machine apart: six letters and digits, the same for every run with the
/// same data directory. Short, because a link's name has room for 15 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterId(String);

impl ClusterId {
    /// The id of the cluster that lives in `data_dir`, which should be an absolute path.
    pub fn of(data_dir: &Path) -> ClusterId {
        ClusterId(letters(data_dir.as_os_str().as_bytes(), LENGTH))
    }

    /// An id as [`ClusterId::of`] makes them; `None` for anything else.
    pub fn parse(text: &str) -> Option<ClusterId> {
        let fits = text.len() == LENGTH && text.bytes().all(|byte| ALPHABET.contains(&byte));
        fits.then(|| ClusterId(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the names of all links of this cluster begin with.
    pub fn link_prefix(&self) -> String {
        format!("mk{}", self.0)
    }

    /// The group that all links of this cluster are in, so that they can be deleted together. Never 0,
    /// where links are that are in no group.
    pub(crate) fn link_group(&self) -> u32 {
        let hash = Sha256::digest(self.0.as_bytes());
        u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]).max(1)
    }

    /// The node's own link, which holds its addresses in the pod and service networks.
    pub fn node_link(&self) -> String {
        format!("mk{}-node", self.0)
    }

    /// The other end of [`ClusterId::node_link`].
    pub(crate) fn void_link(&self) -> String {
        format!("mk{}-void", self.0)
    }

    /// The host's end of a pod's veth pair.
    pub fn pod_link(&self, sandbox: &str) -> String {
        format!("mk{}{}", self.0, letters(sandbox.as_bytes(), 7))
    }

    /// What the names of all nftables tables of this cluster begin with.
    pub fn table_prefix(&self) -> String {
        format!("minke-{}-", self.0)
    }

    /// The table of what is fixed: masquerade, guards, refusal of unknown addresses.
    pub(crate) fn node_table(&self) -> String {
        format!("minke-{}-node", self.0)
    }

    /// The table of the Services.
    pub fn service_table(&self) -> String {
        format!("minke-{}-services", self.0)
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `count` letters that stand for `bytes`, five bits each.
fn letters(bytes: &[u8], count: usize) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().take(count).map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_a_link_name_and_tell_clusters_and_pods_apart() {
        let (a, b) = (ClusterId::of(Path::new("/var/lib/minke")), ClusterId::of(Path::new("/tmp/other")));
        assert_ne!(a, b);
        assert_eq!(ClusterId::parse(a.as_str()), Some(a.clone()));
        let names = [a.node_link(), a.void_link(), a.pod_link("x"), a.pod_link("y"), b.pod_link("x")];
        for (i, name) in names.iter().enumerate() {
            assert!(name.len() <= 15, "{name}");
            assert!(!names[..i].contains(name), "{name} twice");
        }
        assert_eq!(a.pod_link("x"), ClusterId::of(Path::new("/var/lib/minke")).pod_link("x"));
    }

    #[test]
    fn only_ids_of_the_right_shape_parse() {
        for text in ["", "abc", "abcdefg", "ABCDEF", "abc/ef", "abcd1f"] {
            assert_eq!(ClusterId::parse(text), None, "{text}");
        }
    }
}
