//! Which addresses of the node's pod range are in use.
//!
//! Nothing is written down: after a restart the sandboxes that still run say which addresses they
//! have (`reserve`). Addresses are given out in turn, so that one just freed stays unused for as long
//! as the range allows, and a client with an old address meets nobody rather than a stranger.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::Error;

/// The addresses of one range, less the network, the node's own (its first) and the broadcast address.
#[derive(Debug, Clone)]
pub struct AddressPool {
    range: Ipv4Net,
    first: u32,
    last: u32,
    /// Where the search goes on.
    next: u32,
    used: BTreeSet<u32>,
}

impl AddressPool {
    /// A range of fewer than four addresses has none to give.
    pub fn new(range: Ipv4Net) -> AddressPool {
        let (network, broadcast) = (u32::from(range.network()), u32::from(range.broadcast()));
        let first = network.saturating_add(2);
        AddressPool { range, first, last: broadcast.saturating_sub(1), next: first, used: BTreeSet::new() }
    }

    pub fn allocate(&mut self) -> Result<Ipv4Addr, Error> {
        let free = (self.free_from(self.next, self.last))
            .or_else(|| self.free_from(self.first, self.next.saturating_sub(1)))
            .ok_or(Error::Exhausted(self.range))?;
        self.take(free);
        Ok(free.into())
    }

    /// Marks the address of a pod that is there already.
    pub fn reserve(&mut self, address: Ipv4Addr) -> Result<(), Error> {
        let number = u32::from(address);
        if number < self.first || number > self.last || self.used.contains(&number) {
            return Err(Error::Unavailable(address));
        }
        self.take(number);
        Ok(())
    }

    /// Gives an address back. One that is not taken changes nothing.
    pub fn release(&mut self, address: Ipv4Addr) {
        self.used.remove(&u32::from(address));
    }

    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    fn take(&mut self, number: u32) {
        self.used.insert(number);
        self.next = if number >= self.last { self.first } else { number + 1 };
    }

    /// The first free number in `from..=to`: the end of the run of used ones that begins at `from`.
    fn free_from(&self, from: u32, to: u32) -> Option<u32> {
        if from > to {
            return None;
        }
        let mut free = from;
        for used in self.used.range(from..=to) {
            if *used != free {
                break;
            }
            free = free.checked_add(1)?;
        }
        (free <= to).then_some(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(range: &str) -> AddressPool {
        AddressPool::new(range.parse().unwrap())
    }

    fn address(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn gives_each_address_once_and_never_the_special_ones() {
        let mut pool = pool("10.1.2.0/29");
        let given: Vec<Ipv4Addr> = std::iter::from_fn(|| pool.allocate().ok()).collect();
        assert_eq!(given, ["10.1.2.2", "10.1.2.3", "10.1.2.4", "10.1.2.5", "10.1.2.6"].map(address));
        assert_eq!(
            pool.allocate().unwrap_err().to_string(),
            "no IP addresses available in range 10.1.2.0/29"
        );
        pool.release(address("10.1.2.4"));
        assert_eq!(pool.allocate().unwrap(), address("10.1.2.4"));
    }

    #[test]
    fn a_freed_address_waits_for_its_turn() {
        let mut pool = pool("10.1.2.0/29");
        let first = pool.allocate().unwrap();
        pool.release(first);
        let later: Vec<Ipv4Addr> = (0..4).map(|_| pool.allocate().unwrap()).collect();
        assert!(!later.contains(&first));
        assert_eq!(pool.allocate().unwrap(), first);
    }

    #[test]
    fn knows_what_runs_after_a_restart() {
        let mut pool = pool("10.1.2.0/24");
        pool.reserve(address("10.1.2.9")).unwrap();
        assert!(pool.reserve(address("10.1.2.9")).is_err());
        for outside in ["10.1.2.0", "10.1.2.1", "10.1.2.255", "10.1.3.4", "10.1.1.9"] {
            assert!(pool.reserve(address(outside)).is_err(), "{outside}");
        }
        assert_eq!(pool.allocate().unwrap(), address("10.1.2.10"));
        assert_eq!(pool.in_use(), 2);
    }

    #[test]
    fn tiny_ranges_are_empty() {
        for range in ["10.1.2.0/31", "10.1.2.0/32", "0.0.0.0/32", "255.255.255.255/32"] {
            assert!(pool(range).allocate().is_err(), "{range}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_gives_a_used_address(steps in proptest::collection::vec(0u8..=20, 0..200)) {
            let mut pool = pool("10.0.0.0/28");
            let mut used = BTreeSet::new();
            for step in steps {
                match pool.allocate() {
                    Ok(given) => assert!(used.insert(given), "{given} given twice"),
                    Err(_) => assert_eq!(used.len(), 13),
                }
                if let Some(back) = used.iter().nth(usize::from(step)).copied() {
                    pool.release(back);
                    used.remove(&back);
                }
            }
        }
    }
}
