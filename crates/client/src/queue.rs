//! A queue of keys: each key at most once, one holder at a time, delays and per-key back-off.
//!
//! As upstream's client-go workqueue: a key added while it is being worked on is handed out again
//! when its holder is done, so no change is lost and no key is worked on twice at once.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::backoff;

/// Keys waiting to be worked on. Shared by reference between producers and workers.
pub struct WorkQueue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
    backoff_base: Duration,
    backoff_max: Duration,
}

struct State<K> {
    ready: VecDeque<K>,
    /// Keys in `ready`, or in work and to be handed out again.
    dirty: HashSet<K>,
    in_work: HashSet<K>,
    /// Keys that become ready later, by when. A key may wait only once, for its earliest time.
    later: BTreeSet<(Instant, u64)>,
    waiting: HashMap<K, (Instant, u64)>,
    by_ticket: HashMap<u64, K>,
    next_ticket: u64,
    failures: HashMap<K, u32>,
}

impl<K: Clone + Eq + Hash> Default for WorkQueue<K> {
    /// Upstream's controllers' back-off: 5 ms doubling to 1000 s.
    fn default() -> Self {
        WorkQueue::new(Duration::from_millis(5), Duration::from_secs(1000))
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    pub fn new(backoff_base: Duration, backoff_max: Duration) -> WorkQueue<K> {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            in_work: HashSet::new(),
            later: BTreeSet::new(),
            waiting: HashMap::new(),
            by_ticket: HashMap::new(),
            next_ticket: 0,
            failures: HashMap::new(),
        };
        WorkQueue { state: Mutex::new(state), wake: Notify::new(), backoff_base, backoff_max }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<K>> {
        self.state.lock().expect("nothing panics while the queue is locked")
    }

    /// Queues `key` unless it is queued already.
    pub fn add(&self, key: K) {
        self.lock().add(key);
        self.wake.notify_one();
    }

    /// Queues `key` after `delay`; an earlier time that is already set stays.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        self.lock().add_at(key, Instant::now() + delay);
        self.wake.notify_one();
    }

    /// Makes all keys ready that wait for their time, since the clock by which it was worked out has changed.
    pub fn hurry(&self) {
        self.lock().ripen(None);
        self.wake.notify_one();
    }

    /// Queues `key` after the delay that its failures so far have earned. One that was added before its time and fails
    /// again keeps that time, and waits no longer for it: many events in a moment are no reason to rest for minutes.
    pub fn retry(&self, key: K) {
        let mut state = self.lock();
        let failures = state.failures.get(&key).copied().unwrap_or_default();
        let at = Instant::now() + backoff(self.backoff_base, self.backoff_max, failures);
        if state.waiting.get(&key).is_none_or(|(earlier, _)| *earlier > at) {
            state.failures.insert(key.clone(), failures + 1);
            state.add_at(key, at);
            self.wake.notify_one();
        }
    }

    /// Forgets the failures of `key`.
    pub fn forget(&self, key: &K) {
        self.lock().failures.remove(key);
    }

    /// Waits for a key. The caller holds it until [`WorkQueue::done`].
    pub async fn next(&self) -> K {
        loop {
            let wake = self.wake.notified();
            let until = {
                let mut state = self.lock();
                state.ripen(Some(Instant::now()));
                if let Some(key) = state.ready.pop_front() {
                    state.dirty.remove(&key);
                    state.in_work.insert(key.clone());
                    if !state.ready.is_empty() {
                        // One wake-up may stand for several keys: pass it on to another worker.
                        self.wake.notify_one();
                    }
                    return key;
                }
                state.later.first().map(|(at, _)| *at)
            };
            match until {
                Some(at) => {
                    tokio::select! { biased; () = wake => {}, () = tokio::time::sleep_until(at) => {} }
                }
                None => wake.await,
            }
        }
    }

    /// Ends the work on `key`; if it was added meanwhile, it is queued again.
    pub fn done(&self, key: &K) {
        let mut state = self.lock();
        state.in_work.remove(key);
        if state.dirty.contains(key) {
            state.ready.push_back(key.clone());
            self.wake.notify_one();
        }
    }

    /// Keys that are ready now.
    pub fn len(&self) -> usize {
        self.lock().ready.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) {
        if self.dirty.insert(key.clone()) && !self.in_work.contains(&key) {
            self.ready.push_back(key);
        }
    }

    fn add_at(&mut self, key: K, at: Instant) {
        if let Some(earlier) = self.waiting.get(&key).copied() {
            if earlier.0 <= at {
                return;
            }
            self.later.remove(&earlier);
            self.by_ticket.remove(&earlier.1);
        }
        let entry = (at, self.next_ticket);
        self.next_ticket += 1;
        self.later.insert(entry);
        self.by_ticket.insert(entry.1, key.clone());
        self.waiting.insert(key, entry);
    }

    /// Readies the keys whose time has come by `now`, or all.
    fn ripen(&mut self, now: Option<Instant>) {
        while let Some(entry) = self.later.first().copied().filter(|(at, _)| now.is_none_or(|now| *at <= now))
        {
            self.later.remove(&entry);
            if let Some(key) = self.by_ticket.remove(&entry.1) {
                self.waiting.remove(&key);
                self.add(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_added_while_in_work_comes_again_afterwards() {
        let queue = WorkQueue::default();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        assert!(queue.is_empty(), "one holder at a time");
        queue.done(&"a");
        assert_eq!(queue.next().await, "a");
        queue.done(&"a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn delays_are_kept_and_the_earliest_wins() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add_after("slow", Duration::from_secs(60));
        queue.add_after("quick", Duration::from_secs(5));
        queue.add_after("slow", Duration::from_secs(10));
        assert_eq!(queue.next().await, "quick");
        assert_eq!(start.elapsed().as_secs(), 5);
        assert_eq!(queue.next().await, "slow");
        assert_eq!(start.elapsed().as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn failing_often_in_a_moment_is_failing_once() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        for _ in 0..20 {
            queue.add("a");
            queue.retry(queue.next().await);
            queue.done(&"a");
        }
        for delays in [5, 15, 35] {
            queue.retry(queue.next().await);
            queue.done(&"a");
            assert_eq!(start.elapsed().as_millis(), delays);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_waits_longer_when_hurried() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add_after("tomorrow", Duration::from_secs(86_400));
        queue.add_after("soon", Duration::from_secs(5));
        queue.hurry();
        assert_eq!(queue.next().await, "soon");
        assert_eq!(queue.next().await, "tomorrow");
        assert_eq!(start.elapsed(), Duration::ZERO);
        queue.done(&"tomorrow");
        queue.add_after("tomorrow", Duration::from_secs(60));
        queue.next().await;
        assert_eq!(start.elapsed().as_secs(), 60, "later waits are waits again");
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_until_forgotten() {
        let queue = WorkQueue::new(Duration::from_secs(1), Duration::from_secs(3));
        for want in [1, 2, 3, 3] {
            let start = Instant::now();
            queue.retry("a");
            assert_eq!(queue.next().await, "a");
            queue.done(&"a");
            assert_eq!(start.elapsed().as_secs(), want);
        }
        queue.forget(&"a");
        let start = Instant::now();
        queue.retry("a");
        queue.next().await;
        assert_eq!(start.elapsed().as_secs(), 1);
    }
}
