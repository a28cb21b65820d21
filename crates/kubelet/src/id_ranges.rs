//! Which of the node's user and group ids are whose, for pods with users of their own (`hostUsers: false`).
//!
//! As with addresses, nothing is written down but what each sandbox has: after a restart those that run say which
//! range is theirs.

use std::collections::BTreeMap;
use std::sync::Mutex;

use minke_runtime::IdRange;

/// Ids of a pod, as upstream's default has it; ranges begin at its multiples.
const IDS_PER_POD: u32 = 1 << 16;
/// Ranges of one node, of which there can be more on a machine: each has a block of its own.
const RANGES: u32 = 512;
/// Blocks below 2^31, without the first: ids of the node itself, and what /etc/subuid commonly gives away, are there.
const BLOCKS: u32 = (1 << 31) / IDS_PER_POD / RANGES - 1;

/// The ranges of a node, by the sandboxes that have them.
pub struct IdRanges {
    first: u32,
    taken: Mutex<BTreeMap<u32, String>>,
}

impl IdRanges {
    /// `node` tells the nodes on a machine apart.
    pub fn new(node: &str) -> IdRanges {
        let hash = node.bytes().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let first = (1 + hash % BLOCKS) * RANGES * IDS_PER_POD;
        IdRanges { first, taken: Mutex::default() }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, String>> {
        self.taken.lock().expect("nothing panics while the map is locked")
    }

    /// The lowest range that is free.
    pub fn allocate(&self, sandbox: &str) -> Result<IdRange, String> {
        let mut taken = self.taken();
        let mut free = (0..RANGES).map(|n| self.first + n * IDS_PER_POD);
        let first = free.find(|first| !taken.contains_key(first));
        let first = first.ok_or("could not find an empty slot to allocate a user namespace")?;
        taken.insert(first, sandbox.to_owned());
        Ok(IdRange { first, count: IDS_PER_POD })
    }

    /// Marks the range of a sandbox that is there already, whoever gave it.
    pub fn reserve(&self, sandbox: &str, range: IdRange) {
        self.taken().insert(range.first, sandbox.to_owned());
    }

    /// A sandbox that has none changes nothing.
    pub fn release(&self, sandbox: &str) {
        self.taken().retain(|_, of| of != sandbox);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_sandboxes_share_ids() {
        let ranges = IdRanges::new("minke-1a2b");
        let first = ranges.allocate("a").expect("a range");
        assert!(
            first.first >= IDS_PER_POD && first.first.is_multiple_of(IDS_PER_POD) && first.count == 65536
        );
        let second = ranges.allocate("b").expect("a range");
        assert_eq!(second.first, first.first + first.count);
        ranges.release("a");
        ranges.release("a");
        assert_eq!(ranges.allocate("c"), Ok(first));
        for n in 2..RANGES {
            let range = ranges.allocate(&n.to_string()).expect("a range");
            assert!(range.first.checked_add(range.count).is_some_and(|end| end <= 1 << 31));
        }
        let full = ranges.allocate("d").unwrap_err();
        assert_eq!(full, "could not find an empty slot to allocate a user namespace");
    }

    #[test]
    fn what_runs_keeps_its_range_when_the_agent_starts_again() {
        let before = IdRanges::new("minke-1a2b");
        let (_, kept) = (before.allocate("a"), before.allocate("b").expect("a range"));
        let after = IdRanges::new("minke-1a2b");
        after.reserve("b", kept);
        let others = [after.allocate("c"), after.allocate("d")];
        assert!(others.iter().flatten().all(|range| *range != kept), "{others:?}");
        after.release("b");
        assert_eq!(after.allocate("e"), Ok(kept));
    }

    #[test]
    fn nodes_of_one_machine_have_blocks_of_their_own() {
        let mut blocks: Vec<u32> =
            (0..BLOCKS * 8).map(|n| IdRanges::new(&format!("minke-{n:x}")).first).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len() as u32, BLOCKS);
        assert!(blocks.iter().all(|first| *first >= RANGES * IDS_PER_POD));
    }
}
