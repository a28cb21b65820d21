//! The pods that wait for a node: ready to be tried, backing off, or parked until something may help.
//!
//! A parked pod costs nothing: it waits for an event that concerns what ruled the nodes out, or, as upstream,
//! for five minutes.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use minke_api::{Key, Object};
use minke_client::backoff;
use tokio::time::Instant;

const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
const PARKED_MAX: Duration = Duration::from_secs(300);

/// Highest priority first, then who has waited longest.
type Order = (Reverse<i32>, u64);

#[derive(Debug, Default)]
pub struct Queue {
    waiting: HashMap<Key, Waiting>,
    ready: BTreeSet<(Order, Key)>,
    /// When pods that back off or are parked become ready by themselves.
    timers: BTreeSet<(Instant, Key)>,
    arrivals: u64,
}

#[derive(Debug)]
struct Waiting {
    object: Arc<Object>,
    order: Order,
    attempts: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Ready,
    BackingOff {
        until: Instant,
    },
    Parked {
        helped_by: u8,
        not_before: Instant,
        until: Instant,
    },
    /// Handed out by [`Queue::pop`]. `missed` collects what happened meanwhile.
    Tried {
        missed: u8,
    },
}

impl Queue {
    /// Adds a pod that has no node, or takes its new revision. A pod whose specification or labels changed
    /// (`changed`) is worth another try at once.
    pub fn put(&mut self, object: Arc<Object>, priority: i32, changed: bool) {
        let key = object.key().clone();
        match self.waiting.get_mut(&key) {
            None => {
                self.arrivals += 1;
                let order = (Reverse(priority), self.arrivals);
                self.waiting.insert(key.clone(), Waiting { object, order, attempts: 0, state: State::Ready });
                self.ready.insert((order, key));
            }
            Some(waiting) => {
                waiting.object = object;
                if changed {
                    match &mut waiting.state {
                        State::Parked { .. } => self.make_ready(&key),
                        State::Tried { missed } => *missed = u8::MAX,
                        State::Ready | State::BackingOff { .. } => {}
                    }
                }
            }
        }
    }

    /// Forgets a pod that is gone or has a node.
    pub fn remove(&mut self, key: &Key) {
        self.unlist(key);
        self.waiting.remove(key);
    }

    /// Takes a pod out of the lists of its state.
    fn unlist(&mut self, key: &Key) {
        let Some(waiting) = self.waiting.get(key) else { return };
        match waiting.state {
            State::Ready => drop(self.ready.remove(&(waiting.order, key.clone()))),
            State::BackingOff { until } | State::Parked { until, .. } => {
                self.timers.remove(&(until, key.clone()));
            }
            State::Tried { .. } => {}
        }
    }

    fn enter(&mut self, key: &Key, state: State) {
        self.unlist(key);
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        waiting.state = state;
        match state {
            State::Ready => drop(self.ready.insert((waiting.order, key.clone()))),
            State::BackingOff { until } | State::Parked { until, .. } => {
                self.timers.insert((until, key.clone()));
            }
            State::Tried { .. } => {}
        }
    }

    fn make_ready(&mut self, key: &Key) {
        self.enter(key, State::Ready);
    }

    /// The next pod to try; it stays known until it is removed, parked or retried.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<Object>> {
        while let Some((at, key)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.make_ready(&key);
        }
        let (_, key) = self.ready.first()?.clone();
        self.enter(&key, State::Tried { missed: 0 });
        let waiting = self.waiting.get_mut(&key)?;
        waiting.attempts += 1;
        Some(waiting.object.clone())
    }

    /// No node would do for the pod that was handed out: wait for one of the events in `helped_by`, and no
    /// shorter than the back-off.
    pub fn park(&mut self, key: &Key, helped_by: u8, now: Instant) {
        let Some(waiting) = self.waiting.get(key) else { return };
        let not_before = now + backoff(BACKOFF_BASE, BACKOFF_MAX, waiting.attempts.saturating_sub(1));
        let missed = match waiting.state {
            State::Tried { missed } => missed & helped_by != 0,
            _ => false,
        };
        let state = if missed {
            State::BackingOff { until: not_before }
        } else {
            State::Parked { helped_by, not_before, until: now + PARKED_MAX }
        };
        self.enter(key, state);
    }

    /// Trying failed for a reason that has nothing to do with the nodes: again after the back-off.
    pub fn retry(&mut self, key: &Key, now: Instant) {
        let Some(waiting) = self.waiting.get(key) else { return };
        let until = now + backoff(BACKOFF_BASE, BACKOFF_MAX, waiting.attempts.saturating_sub(1));
        self.enter(key, State::BackingOff { until });
    }

    /// Something happened that may help pods which wait for it.
    pub fn wake(&mut self, bits: u8, now: Instant) {
        if bits == 0 {
            return;
        }
        let mut helped = Vec::new();
        for (key, waiting) in &mut self.waiting {
            match &mut waiting.state {
                State::Tried { missed } => *missed |= bits,
                State::Parked { helped_by, not_before, .. } if *helped_by & bits != 0 => {
                    helped.push((key.clone(), *not_before));
                }
                _ => {}
            }
        }
        for (key, not_before) in helped {
            let state =
                if not_before <= now { State::Ready } else { State::BackingOff { until: not_before } };
            self.enter(&key, state);
        }
    }

    /// When [`Queue::pop`] may have something again, if it has nothing now.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::pod;
    use crate::plugins::wake;
    use serde_json::json;

    fn object(name: &str) -> Arc<Object> {
        pod(name, json!({"containers": []})).object
    }

    fn key(name: &str) -> Key {
        Key::new("default", name)
    }

    fn name(popped: Option<Arc<Object>>) -> Option<String> {
        popped.map(|object| object.name().to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn priority_goes_first_and_then_who_came_first() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (pod, priority) in [("a", 0), ("b", 0), ("c", 5)] {
            queue.put(object(pod), priority, false);
        }
        let order: Vec<_> = std::iter::from_fn(|| name(queue.pop(now))).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_parked_pod_waits_for_what_can_help_it() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(object("a"), 0, false);
        queue.pop(now);
        queue.park(&key("a"), wake::POD_GONE, now);
        queue.wake(wake::NODE_LABELS, now);
        assert_eq!(queue.pop(now + Duration::from_secs(20)).map(|_| ()), None);
        queue.wake(wake::POD_GONE, now);
        assert!(queue.pop(now).is_none(), "not before its back-off is over");
        assert_eq!(name(queue.pop(now + Duration::from_secs(1))).as_deref(), Some("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_during_a_try_is_not_missed() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(object("a"), 0, false);
        queue.pop(now);
        queue.wake(wake::POD_GONE, now);
        queue.park(&key("a"), wake::POD_GONE, now);
        assert_eq!(name(queue.pop(now + Duration::from_secs(1))).as_deref(), Some("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn back_off_doubles_and_parking_ends_after_five_minutes() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.put(object("a"), 0, false);
        for want in [1, 2, 4, 8, 10, 10] {
            queue.pop(now).unwrap();
            queue.retry(&key("a"), now);
            assert_eq!(queue.next_timer(), Some(now + Duration::from_secs(want)));
            now += Duration::from_secs(want);
        }
        queue.pop(now).unwrap();
        queue.park(&key("a"), wake::POD_GONE, now);
        assert_eq!(queue.next_timer(), Some(now + Duration::from_secs(300)));
        queue.remove(&key("a"));
        assert_eq!(queue.next_timer(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_pod_is_tried_again_at_once() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(object("a"), 0, false);
        queue.pop(now);
        queue.park(&key("a"), wake::POD_GONE, now);
        queue.put(object("a"), 0, false);
        assert!(queue.pop(now).is_none());
        queue.put(object("a"), 0, true);
        assert!(queue.pop(now).is_some());
    }
}
