//! How fast nodes that are in trouble may be given up, by zone: the more of a zone is silent at once, the likelier it
//! is that the fault is not the nodes'.
//!
//! Upstream: pkg/controller/nodelifecycle (ComputeZoneState, handleDisruption) and its default rates.

use std::collections::BTreeMap;
use std::time::Duration;

use minke_api::Object;
use tokio::time::Instant;

const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
/// Time between two nodes of a zone that are given up: usually, and while much of a large zone is silent.
const USUALLY: Duration = Duration::from_secs(10);
const CAREFULLY: Duration = Duration::from_secs(100);
/// A zone with more nodes is large.
const LARGE: usize = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Normal,
    Partial,
    Full,
}

fn state(ready: usize, troubled: usize) -> State {
    if ready == 0 && troubled > 0 {
        State::Full
    } else if troubled > 2 && troubled * 100 >= 55 * (ready + troubled) {
        State::Partial
    } else {
        State::Normal
    }
}

/// Time between two nodes that are given up; none when none may be.
fn interval(state: State, size: usize) -> Option<Duration> {
    match state {
        State::Normal | State::Full => Some(USUALLY),
        State::Partial if size > LARGE => Some(CAREFULLY),
        State::Partial => None,
    }
}

#[derive(Debug, Default)]
struct Zone {
    ready: usize,
    troubled: usize,
    /// When the next node may be given up.
    next: Option<Instant>,
}

impl Zone {
    fn state(&self) -> State {
        state(self.ready, self.troubled)
    }

    fn interval(&self) -> Option<Duration> {
        interval(self.state(), self.ready + self.troubled)
    }
}

/// Whether a node may be given up.
#[derive(Debug, PartialEq)]
pub(crate) enum Turn {
    Now,
    At(Instant),
    /// Not before more nodes are well.
    Never,
}

/// Which nodes are well, by zone.
#[derive(Debug, Default)]
pub(crate) struct Zones {
    nodes: BTreeMap<String, (String, bool)>,
    zones: BTreeMap<String, Zone>,
}

/// The zone of a node; nodes that say nothing are in one together.
pub(crate) fn zone_of(node: &Object) -> String {
    let label = |name: &str| node.labels().get(name).unwrap_or_default().to_owned();
    format!("{}/{}", label(REGION), label(ZONE))
}

impl Zones {
    /// Notes where a node is and whether it is ready, or that it is gone. Says whether that changes anything for
    /// other nodes.
    pub fn set(&mut self, node: &str, now: Option<(String, bool)>) -> bool {
        let zones: Vec<String> = [self.nodes.get(node), now.as_ref()]
            .into_iter()
            .flatten()
            .map(|(zone, _)| zone.clone())
            .collect();
        let rates = |all: &Zones| {
            let of = zones.iter().map(|zone| all.zones.get(zone).map(Zone::interval)).collect::<Vec<_>>();
            (all.all_silent(), of)
        };
        let before = rates(self);
        if let Some((zone, ready)) = self.nodes.remove(node) {
            *self.count(&zone, ready) -= 1;
            if self.zones.get(&zone).is_some_and(|zone| zone.ready + zone.troubled == 0) {
                self.zones.remove(&zone);
            }
        }
        if let Some((zone, ready)) = now {
            *self.count(&zone, ready) += 1;
            self.nodes.insert(node.to_owned(), (zone, ready));
        }
        before != rates(self)
    }

    fn count(&mut self, zone: &str, ready: bool) -> &mut usize {
        let zone = self.zones.entry(zone.to_owned()).or_default();
        if ready { &mut zone.ready } else { &mut zone.troubled }
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The nodes that are not ready.
    pub fn troubled(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|(_, (_, ready))| !ready).map(|(node, _)| node.as_str())
    }

    /// Nobody is heard: it is more likely us who cannot hear.
    pub fn all_silent(&self) -> bool {
        !self.zones.is_empty() && self.zones.values().all(|zone| zone.state() == State::Full)
    }

    /// Asks for the turn of a node to be given up; [`Turn::Now`] uses it.
    pub fn take(&mut self, node: &str, now: Instant) -> Turn {
        if self.all_silent() {
            return Turn::Never;
        }
        let zone = self.nodes.get(node).and_then(|(zone, _)| self.zones.get_mut(zone));
        let Some(zone) = zone else { return Turn::Never };
        let Some(interval) = zone.interval() else { return Turn::Never };
        match zone.next {
            Some(next) if next > now => Turn::At(next),
            _ => {
                zone.next = Some(now + interval);
                Turn::Now
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_is_silent_the_slower() {
        for (ready, troubled, want) in [
            (1, 0, Some(10)),
            (0, 1, Some(10)),
            (1, 1, Some(10)),
            (1, 2, Some(10)),
            (2, 3, None),
            (3, 3, Some(10)),
            (40, 60, Some(100)),
            (22, 28, None),
            (46, 54, Some(10)),
        ] {
            let got = interval(state(ready, troubled), ready + troubled);
            assert_eq!(got, want.map(Duration::from_secs), "{ready} ready, {troubled} not");
        }
        assert_eq!([state(0, 0), state(0, 2), state(2, 3)], [State::Normal, State::Full, State::Partial]);
    }

    #[tokio::test(start_paused = true)]
    async fn zones_have_turns_of_their_own() {
        let mut zones = Zones::default();
        let at = |zone: &str, ready: bool| Some((zone.to_owned(), ready));
        for node in ["a1", "a2", "a3", "a4"] {
            zones.set(node, at("a", true));
        }
        zones.set("b1", at("b", true));
        let now = Instant::now();
        assert!(!zones.set("a1", at("a", false)) && !zones.set("a2", at("a", false)), "the rate stays");
        assert_eq!(zones.take("a1", now), Turn::Now);
        assert_eq!(zones.take("a2", now), Turn::At(now + USUALLY));
        assert!(!zones.set("b1", at("b", false)), "a whole zone has the usual rate");
        assert_eq!(zones.take("b1", now), Turn::Now);
        assert_eq!(zones.take("a2", now + USUALLY), Turn::Now);
        assert!(zones.set("a3", at("a", false)), "three of four: too many");
        assert_eq!(zones.take("a3", now + 9 * USUALLY), Turn::Never);
        let mut troubled: Vec<&str> = zones.troubled().collect();
        troubled.sort_unstable();
        assert_eq!(troubled, ["a1", "a2", "a3", "b1"]);
        assert!(zones.set("a4", at("a", false)) && zones.all_silent());
        assert_eq!(zones.take("a3", now + 9 * USUALLY), Turn::Never);
        assert!(zones.set("b1", at("b", true)) && !zones.all_silent());
        assert_eq!(zones.take("a3", now + 9 * USUALLY), Turn::Now);
        for node in ["a1", "a2", "a3", "a4", "b1"] {
            zones.set(node, None);
        }
        assert_eq!((zones.len(), zones.all_silent()), (0, false));
    }
}
