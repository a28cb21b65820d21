//! The pods that wait for a node: ready to be tried, backing off, or parked until something may help.
//!
//! A parked pod costs nothing: it waits for an event that concerns what ruled the nodes out, or, as upstream,
//! for five minutes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use minke_api::{Key, Object};
use minke_client::backoff;
use tokio::time::Instant;

use crate::decide::helped_by;
use crate::hints::Hint;
use crate::picture::PodInfo;

const PARKED_MAX: Duration = Duration::from_secs(300);
/// Bits that a parked pod may wait for.
const BITS: usize = 9;

/// Highest priority first, then who has waited longest.
type Order = (Reverse<i32>, u64);

#[derive(Debug)]
pub struct Queue {
    waiting: HashMap<Key, Waiting>,
    ready: BTreeSet<(Order, Key)>,
    /// When pods that back off or are parked become ready by themselves.
    timers: BTreeSet<(Instant, Key)>,
    /// Parked pods, by each bit that may help them, and together with those to which an event means the same.
    parked: [BTreeMap<Alike, BTreeSet<Key>>; BITS],
    /// How many events there were, and the number of the last one with each bit.
    events: u64,
    last: [u64; BITS],
    arrivals: u64,
    backoff_base: Duration,
    backoff_max: Duration,
}

/// [`PodInfo::alike`] and the plugins that objected.
type Alike = (Arc<str>, u32);

#[derive(Debug)]
struct Waiting {
    info: Arc<PodInfo>,
    /// The newest revision; `info` is as good.
    object: Arc<Object>,
    /// The text under which it is parked.
    alike: Arc<str>,
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
        why: Why,
        not_before: Instant,
        until: Instant,
    },
    /// Handed out by [`Queue::pop`], or making room for itself, when there had been so many events; `None` when the
    /// pod itself has changed since.
    Tried {
        since: Option<u64>,
    },
}

/// Why a pod is parked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Why {
    /// What may help, as bits of [`crate::plugins::wake`].
    pub helped_by: u32,
    /// The plugins that objected, as bits of their rows.
    pub rejecting: u32,
}

impl Why {
    pub fn new(rejecting: u32) -> Why {
        Why { helped_by: helped_by(rejecting), rejecting }
    }
}

impl Default for Queue {
    fn default() -> Queue {
        Queue::new(Duration::from_secs(1), Duration::from_secs(10))
    }
}

impl Queue {
    pub fn new(backoff_base: Duration, backoff_max: Duration) -> Queue {
        Queue {
            waiting: HashMap::new(),
            ready: BTreeSet::new(),
            timers: BTreeSet::new(),
            parked: Default::default(),
            events: 0,
            last: [0; BITS],
            arrivals: 0,
            backoff_base,
            backoff_max,
        }
    }

    /// Adds a pod that has no node, or takes what it says now: then it is worth another try at once.
    pub fn put(&mut self, info: Arc<PodInfo>) {
        let key = info.key().clone();
        let object = info.object.clone();
        match self.waiting.get_mut(&key) {
            None => {
                self.arrivals += 1;
                let order = (Reverse(info.priority), self.arrivals);
                let alike = info.alike.clone();
                let waiting = Waiting { info, object, alike, order, attempts: 0, state: State::Ready };
                self.waiting.insert(key.clone(), waiting);
                self.ready.insert((order, key));
            }
            Some(waiting) => {
                // Listed as what it was, until it is entered again.
                waiting.info = info;
                waiting.object = object;
                match &mut waiting.state {
                    State::Parked { .. } => self.enter(&key, State::Ready),
                    State::Tried { since } => *since = None,
                    State::Ready | State::BackingOff { .. } => {}
                }
            }
        }
    }

    /// Takes a new revision of a waiting pod that says nothing new to the scheduler; `false` when it does, or is
    /// not waiting.
    pub fn refresh(&mut self, object: &Arc<Object>) -> bool {
        match self.waiting.get_mut(object.key()) {
            Some(waiting) if waiting.info.says_same(object) => {
                waiting.object = object.clone();
                true
            }
            _ => false,
        }
    }

    /// Forgets a pod that is gone or has a node.
    pub fn remove(&mut self, key: &Key) {
        self.unlist(key);
        self.waiting.remove(key);
    }

    /// As [`Queue::remove`], for a pod that has a node unless binding fails: how often it was tried.
    pub fn take(&mut self, key: &Key) -> u32 {
        let attempts = self.waiting.get(key).map_or(0, |waiting| waiting.attempts);
        self.remove(key);
        attempts
    }

    /// Takes a pod back whose binding failed, to be tried again after a back-off that counts all its attempts.
    pub fn put_back(&mut self, info: Arc<PodInfo>, attempts: u32, now: Instant) {
        let key = info.key().clone();
        self.put(info);
        if let Some(waiting) = self.waiting.get_mut(&key) {
            waiting.attempts = waiting.attempts.max(attempts);
        }
        self.retry(&key, now);
    }

    /// Takes a pod out of the lists of its state.
    fn unlist(&mut self, key: &Key) {
        let Some(waiting) = self.waiting.get(key) else { return };
        match waiting.state {
            State::Ready => drop(self.ready.remove(&(waiting.order, key.clone()))),
            State::BackingOff { until } => drop(self.timers.remove(&(until, key.clone()))),
            State::Parked { why, until, .. } => {
                self.timers.remove(&(until, key.clone()));
                let alike = (waiting.alike.clone(), why.rejecting);
                for bit in bits(why.helped_by) {
                    if let Some(keys) = self.parked[bit].get_mut(&alike) {
                        keys.remove(key);
                        if keys.is_empty() {
                            self.parked[bit].remove(&alike);
                        }
                    }
                }
            }
            State::Tried { .. } => {}
        }
    }

    fn enter(&mut self, key: &Key, state: State) {
        self.unlist(key);
        let Some(waiting) = self.waiting.get_mut(key) else { return };
        waiting.state = state;
        waiting.alike = waiting.info.alike.clone();
        match state {
            State::Ready => drop(self.ready.insert((waiting.order, key.clone()))),
            State::BackingOff { until } => drop(self.timers.insert((until, key.clone()))),
            State::Parked { why, until, .. } => {
                self.timers.insert((until, key.clone()));
                let alike = (waiting.alike.clone(), why.rejecting);
                for bit in bits(why.helped_by) {
                    self.parked[bit].entry(alike.clone()).or_default().insert(key.clone());
                }
            }
            State::Tried { .. } => {}
        }
    }

    /// The next pod to try, with its newest revision; it stays known until it is removed, parked or retried.
    pub fn pop(&mut self, now: Instant) -> Option<(Arc<PodInfo>, Arc<Object>)> {
        while let Some((at, key)) = self.timers.first().cloned() {
            if at > now {
                break;
            }
            self.enter(&key, State::Ready);
        }
        let (_, key) = self.ready.first()?.clone();
        self.enter(&key, State::Tried { since: Some(self.events) });
        // Once tried, it stands behind those of its priority that have not been.
        self.arrivals += 1;
        let waiting = self.waiting.get_mut(&key)?;
        waiting.order.1 = self.arrivals;
        waiting.attempts += 1;
        Some((waiting.info.clone(), waiting.object.clone()))
    }

    /// No node would do for the pod that was handed out: wait for an event that may help, and no shorter than
    /// the back-off.
    pub fn park(&mut self, key: &Key, why: Why, now: Instant) {
        let Some(waiting) = self.waiting.get(key) else { return };
        let not_before = now + self.pause(waiting);
        let missed = match waiting.state {
            State::Tried { since: Some(since) } => bits(why.helped_by).any(|bit| self.last[bit] > since),
            State::Tried { since: None } => true,
            _ => false,
        };
        let state = if missed {
            State::BackingOff { until: not_before }
        } else {
            State::Parked { why, not_before, until: now + PARKED_MAX }
        };
        self.enter(key, state);
    }

    /// Trying failed for a reason that has nothing to do with the nodes: again after the back-off.
    pub fn retry(&mut self, key: &Key, now: Instant) {
        let Some(waiting) = self.waiting.get(key) else { return };
        let until = now + self.pause(waiting);
        self.enter(key, State::BackingOff { until });
    }

    fn pause(&self, waiting: &Waiting) -> Duration {
        backoff(self.backoff_base, self.backoff_max, waiting.attempts.saturating_sub(1))
    }

    /// Something happened that may help pods which wait for it; `hint` says what it means to a pod, given the
    /// plugins that objected to it, and whether it means the same to all pods that are alike.
    pub fn wake(&mut self, what: u32, now: Instant, mut hint: impl FnMut(&PodInfo, u32) -> (Hint, bool)) {
        self.events += 1;
        let mut changed: Vec<(Key, State)> = Vec::new();
        let mut asked = BTreeSet::new();
        for bit in bits(what) {
            self.last[bit] = self.events;
            for (alike, keys) in &self.parked[bit] {
                let mut of_all = None;
                for key in keys {
                    let Some(waiting) = self.waiting.get(key) else { continue };
                    let State::Parked { why, not_before, until } = waiting.state else { continue };
                    // A pod may wait for several of the bits.
                    if what.count_ones() > 1 && !asked.insert(key) {
                        continue;
                    }
                    let meaning = of_all.unwrap_or_else(|| {
                        let (hint, same) = hint(&waiting.info, alike.1);
                        of_all = same.then_some(hint);
                        hint
                    });
                    let state = match meaning {
                        Hint::Helps if not_before <= now => State::Ready,
                        Hint::Helps => State::BackingOff { until: not_before },
                        Hint::Not(0) if of_all.is_some() => break,
                        Hint::Not(0) => continue,
                        Hint::Not(more) => {
                            State::Parked { why: Why::new(why.rejecting | more), not_before, until }
                        }
                    };
                    changed.push((key.clone(), state));
                }
            }
        }
        for (key, state) in changed {
            self.enter(&key, state);
        }
    }

    /// When [`Queue::pop`] may have something again, if it has nothing now.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Pods that wait for something to happen.
    #[cfg(test)]
    pub fn parked(&self) -> impl Iterator<Item = &Arc<PodInfo>> {
        let parked = |waiting: &&Waiting| matches!(waiting.state, State::Parked { .. });
        self.waiting.values().filter(parked).map(|waiting| &waiting.info)
    }
}

fn bits(of: u32) -> impl Iterator<Item = usize> {
    (0..BITS).filter(move |bit| of & (1 << bit) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::pod;
    use crate::plugins::wake;
    use serde_json::json;

    fn info(name: &str, priority: i32) -> Arc<PodInfo> {
        Arc::new(pod(name, json!({"containers": [], "priority": priority})))
    }

    /// Helped by pods that go, and not by labels.
    fn why() -> Why {
        Why::new(1 << crate::plugins::row("NodePorts"))
    }

    fn key(name: &str) -> Key {
        Key::new("default", name)
    }

    fn name(popped: Option<(Arc<PodInfo>, Arc<Object>)>) -> Option<String> {
        popped.map(|(_, object)| object.name().to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn priority_goes_first_and_then_who_came_first() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (pod, priority) in [("a", 0), ("b", 0), ("c", 5)] {
            queue.put(info(pod, priority));
        }
        let order: Vec<_> = std::iter::from_fn(|| name(queue.pop(now))).collect();
        assert_eq!(order, ["c", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_could_not_be_bound_waits_longer_each_time() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.put(info("a", 0));
        for want in [1, 2, 4, 8, 10] {
            queue.pop(now).unwrap();
            let attempts = queue.take(&key("a"));
            assert_eq!(queue.next_timer(), None);
            queue.put_back(info("a", 0), attempts, now);
            assert_eq!(queue.next_timer(), Some(now + Duration::from_secs(want)));
            now += Duration::from_secs(want);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_parked_pod_waits_for_what_can_help_it() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(info("a", 0));
        queue.pop(now);
        queue.park(&key("a"), why(), now);
        queue.wake(wake::NODE_LABELS, now, |_, _| (Hint::Helps, true));
        assert_eq!(queue.pop(now + Duration::from_secs(20)).map(|_| ()), None);
        queue.wake(wake::POD_GONE, now, |_, _| (Hint::Helps, true));
        assert!(queue.pop(now).is_none(), "not before its back-off is over");
        assert_eq!(name(queue.pop(now + Duration::from_secs(1))).as_deref(), Some("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_happens_during_a_try_is_not_missed() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(info("a", 0));
        queue.pop(now);
        queue.wake(wake::POD_GONE, now, |_, _| (Hint::Helps, true));
        queue.park(&key("a"), why(), now);
        assert_eq!(name(queue.pop(now + Duration::from_secs(1))).as_deref(), Some("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn back_off_doubles_and_parking_ends_after_five_minutes() {
        let (mut queue, mut now) = (Queue::default(), Instant::now());
        queue.put(info("a", 0));
        for want in [1, 2, 4, 8, 10, 10] {
            queue.pop(now).unwrap();
            queue.retry(&key("a"), now);
            assert_eq!(queue.next_timer(), Some(now + Duration::from_secs(want)));
            now += Duration::from_secs(want);
        }
        queue.pop(now).unwrap();
        queue.park(&key("a"), why(), now);
        assert_eq!(queue.next_timer(), Some(now + Duration::from_secs(300)));
        queue.remove(&key("a"));
        assert_eq!(queue.next_timer(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_pod_is_tried_again_at_once() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(info("a", 0));
        queue.pop(now);
        queue.park(&key("a"), why(), now);
        assert!(queue.refresh(&info("a", 0).object), "it says nothing new");
        assert!(queue.pop(now).is_none());
        queue.put(info("a", 0));
        assert!(queue.pop(now).is_some());
    }
}
