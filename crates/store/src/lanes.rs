//! Lanes: of the events of a kind, those that concern one node.
//!
//! Every node watches its own pods. Were they all woken by every pod, the cost of one change would grow with the
//! number of nodes; so each has a lane, which holds the events of its pods that are in the ring as well, and
//! wakes nobody else.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::watch;

use crate::state::Event;

/// The field by which there are lanes.
pub(crate) const FIELD: &str = "spec.nodeName";

struct Lane {
    /// With their numbers in the ring, which they leave together.
    events: VecDeque<(u64, Arc<Event>)>,
    /// Events from this number on are here.
    known_from: u64,
    next: watch::Sender<u64>,
}

/// The lanes of one kind, by value of the field. There is one for every value that someone watches.
#[derive(Default)]
pub(crate) struct Lanes {
    by_value: HashMap<Box<str>, Lane>,
    /// Lanes at which those that nobody watches are looked for.
    sweep_at: usize,
}

/// The lanes that an event is in: where the object was, and where it is.
fn values(event: &Event) -> impl Iterator<Item = &str> {
    let now = event.object.field(FIELD).unwrap_or_default();
    let before = event.old.as_ref().and_then(|old| old.field(FIELD)).unwrap_or_default();
    [now, before].into_iter().take(if now == before { 1 } else { 2 })
}

impl Lanes {
    /// Opens the lane of a value to someone at place `place`; `ring` has the events from there on.
    pub(crate) fn open<'e>(
        &mut self,
        value: &str,
        place: u64,
        ring: impl Iterator<Item = &'e Arc<Event>>,
    ) -> watch::Receiver<u64> {
        if self.by_value.len() >= self.sweep_at {
            self.by_value.retain(|_, lane| lane.next.receiver_count() > 0);
            self.sweep_at = (2 * self.by_value.len()).max(64);
        }
        let lane = self.by_value.entry(value.into()).or_insert_with(|| Lane {
            events: VecDeque::new(),
            known_from: u64::MAX,
            next: watch::Sender::new(0),
        });
        if place < lane.known_from {
            let concerns = |(_, event): &(u64, &Arc<Event>)| values(event).any(|other| other == value);
            let found = ring.enumerate().map(|(n, event)| (place + n as u64, event)).filter(concerns);
            lane.events = found.map(|(number, event)| (number, event.clone())).collect();
            lane.known_from = place;
        }
        lane.next.subscribe()
    }

    /// Takes a new event, with its number; `woken` collects the lanes that it is in.
    pub(crate) fn push(&mut self, number: u64, event: &Arc<Event>, woken: &mut Vec<Box<str>>) {
        if self.by_value.is_empty() {
            return;
        }
        for value in values(event) {
            if let Some(lane) = self.by_value.get_mut(value) {
                lane.events.push_back((number, event.clone()));
                if !woken.iter().any(|other| **other == *value) {
                    woken.push(value.into());
                }
            }
        }
    }

    /// An event left the ring.
    pub(crate) fn forget(&mut self, number: u64, event: &Event) {
        if self.by_value.is_empty() {
            return;
        }
        for value in values(event) {
            let Some(lane) = self.by_value.get_mut(value) else { continue };
            if lane.events.front().is_some_and(|(first, _)| *first == number) {
                lane.events.pop_front();
                lane.known_from = number + 1;
            }
        }
    }

    pub(crate) fn wake(&self, woken: &[Box<str>], end: u64) {
        for value in woken {
            if let Some(lane) = self.by_value.get(value) {
                lane.next.send_replace(end);
            }
        }
    }

    /// Up to `max` events from place `next` on, and the place after them; `None` when some are gone.
    pub(crate) fn events_from(
        &self,
        value: &str,
        next: u64,
        max: usize,
        end: u64,
    ) -> Option<(Vec<Arc<Event>>, u64)> {
        let lane = self.by_value.get(value)?;
        if next < lane.known_from {
            return None;
        }
        let skip = lane.events.partition_point(|(number, _)| *number < next);
        let events: Vec<_> = lane.events.range(skip..).take(max).map(|(_, event)| event.clone()).collect();
        let after = match lane.events.get(skip + events.len()) {
            Some((number, _)) => *number,
            None => end,
        };
        Some((events, after))
    }

    /// Whether nothing waits in the lane for someone at place `next`.
    pub(crate) fn is_caught_up(&self, value: &str, next: u64) -> bool {
        let last = self.by_value.get(value).and_then(|lane| lane.events.back());
        last.is_none_or(|(number, _)| *number < next)
    }
}
