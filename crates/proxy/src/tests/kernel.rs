//! A pretend kernel: sets and maps as transactions leave them, and packets sent through the chains.

use std::collections::BTreeSet;

use super::Node;
use crate::tables::{Change, Element, Elements, Endpoints, Set};

/// Holds what the transactions have put there, and refuses what the real one would refuse.
#[derive(Default)]
pub struct Kernel {
    elements: Elements,
}

impl Kernel {
    pub fn apply(&mut self, change: &Change) {
        for (element, old, _) in change.elements().filter(|(_, old, _)| old.is_some()) {
            let value = self.elements.remove(element).unwrap_or_else(|| panic!("{element:?} is not there"));
            assert_eq!(Some(value), *old, "{element:?}");
        }
        for (element, _, new) in change.elements() {
            if let Some(value) = new {
                let before = self.elements.insert(element.clone(), value.clone());
                assert_eq!(before, None, "{element:?} is there already");
            }
        }
    }

    fn value(&self, set: Set, key: &str) -> Option<&Option<String>> {
        self.elements.get(&Element { set, key: key.to_owned() })
    }
}

impl Node {
    /// The kernel has what the tables say it should.
    #[track_caller]
    pub fn check_kernel(&self) {
        assert_eq!(self.kernel.elements, self.state.tables.elements());
    }

    /// What becomes of the first packet of a connection `source > destination:port`, which may have `/udp` or
    /// `/sctp` at its end. The node's own packets do not pass prerouting.
    ///
    /// The answers: `to A B` (one of the endpoints), `masquerade to A B`, `refused`, `dropped`, `-`.
    pub fn trace(&self, packet: &str) -> String {
        let (source, rest) = packet.split_once(" > ").expect("source > destination");
        let (rest, protocol) = rest.split_once('/').unwrap_or((rest, "tcp"));
        let (destination, port) = rest.split_once(':').expect("destination:port");
        let is_node = |address: &str| matches!(address, "192.0.2.2" | "127.0.0.1" | "10.244.0.1");
        let in_cluster = source.starts_with("10.244.");
        let keys =
            [(false, format!("{destination} . {protocol} . {port}")), (true, format!("{protocol} . {port}"))];
        let keys: Vec<&(bool, String)> =
            keys.iter().filter(|(node, _)| !node || is_node(destination)).collect();

        let (restricted, address_key) = (&keys[0].1, &keys[0].1);
        if self.kernel.value(Set::Restricted, restricted).is_some() {
            let ranges = self.kernel.elements.keys().filter(|element| element.set == Set::Admitted);
            let admitted =
                ranges.filter_map(|element| element.key.strip_prefix(&format!("{address_key} . ")));
            let source: std::net::Ipv4Addr = source.parse().unwrap();
            if !admitted.into_iter().any(|range| range.parse::<ipnet::Ipv4Net>().unwrap().contains(&source)) {
                return "dropped".into();
            }
        }
        let mut lookups = Vec::new();
        if !is_node(source) && !in_cluster {
            lookups.extend(keys.iter().map(|(node, key)| (true, *node, key)));
        }
        lookups.extend(keys.iter().map(|(node, key)| (false, *node, key)));
        for (outside, node, key) in lookups {
            let Some(verdict) = self.kernel.value(Set::Dispatch { outside, node }, key) else { continue };
            let verdict = verdict.as_deref().expect("a verdict");
            let Some(chain) = verdict.strip_prefix("goto ") else {
                assert_eq!(verdict, "drop");
                return "dropped".into();
            };
            return self.through_chain(chain, outside, node, key, is_node(source), in_cluster);
        }
        let refused =
            keys.iter().any(|(node, key)| self.kernel.value(Set::Refused { node: *node }, key).is_some());
        // The node link refuses what belongs to no Service.
        if refused || destination.starts_with("10.96.") { "refused".into() } else { "-".into() }
    }

    fn through_chain(
        &self,
        chain: &str,
        outside: bool,
        node: bool,
        key: &str,
        from_node: bool,
        in_cluster: bool,
    ) -> String {
        let mut words = chain.split('-');
        assert_eq!(words.next(), Some(if node { "port" } else { "address" }));
        let count: usize = words.next().unwrap().parse().unwrap();
        let words: Vec<&str> = words.collect();
        assert_eq!(words.contains(&"local"), outside);
        let affinity = words.contains(&"sticky");
        let masquerade = (words.contains(&"outside") && !in_cluster)
            || words.contains(&"everyone")
            || (words.contains(&"node") && from_node);
        let set = Set::Endpoints(Endpoints { node, outside, count, affinity });
        let endpoints: BTreeSet<String> = (0..count)
            .map(|i| {
                let value = self.kernel.value(set, &format!("{key} . {i}"));
                let value = value.unwrap_or_else(|| panic!("no endpoint {i} of {key}")).clone().unwrap();
                if !affinity {
                    return value;
                }
                let backend = self.kernel.value(Set::Backends { node }, &format!("{key} . {value}"));
                backend.expect("a mark stands for an endpoint").clone().unwrap()
            })
            .collect();
        let endpoints: Vec<String> = endpoints.iter().map(|endpoint| endpoint.replace(" . ", ":")).collect();
        format!("{}to {}", if masquerade { "masquerade " } else { "" }, endpoints.join(" "))
    }
}
