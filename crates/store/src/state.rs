//! What is in memory: the objects of each kind, and the recent events of each kind.
//!
//! Events are kept per kind, so that a watcher of a quiet kind never looks at (nor is woken by) the
//! writes of a busy one, and does not lose its place because of them; one budget of bytes holds for all
//! of them together, and the oldest event of the whole cluster is the next one to go.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use imbl::OrdMap;
use minke_api::{Key, Kind, Object, Revision};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::Error;
use crate::lanes::Lanes;

/// How long events are kept, if there is room. Lists that are read in pages and clients that lost their
/// connection come back sooner.
const KEEP: Duration = Duration::from_secs(10 * 60);

/// What a write did to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Added,
    Modified,
    Deleted,
}

impl Change {
    /// As watches spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        }
    }
}

/// One write, shared by all who watch.
#[derive(Debug)]
pub struct Event {
    pub change: Change,
    /// The object as written; after a deletion its last state, at the revision of the deletion.
    pub object: Arc<Object>,
    /// The object before the write.
    pub old: Option<Arc<Object>>,
    /// JSON watch frames, one for each way in which a selection may see this event.
    frames: [OnceLock<Bytes>; 3],
    at: Instant,
}

impl Event {
    fn new(change: Change, object: Arc<Object>, old: Option<Arc<Object>>) -> Event {
        Event { change, object, old, frames: Default::default(), at: Instant::now() }
    }

    pub fn revision(&self) -> Revision {
        self.object.revision()
    }

    /// The line of a JSON watch that tells this event to someone who sees it as `seen`, which differs
    /// from what happened when the object came into a selection or left it. Made once, then shared.
    pub fn frame(&self, seen: Change) -> Bytes {
        let make = || match (seen, &self.old) {
            // What left a selection is shown as it last was in it.
            (Change::Deleted, Some(old)) if self.change == Change::Modified => {
                frame(seen, old.at_revision(self.revision()).json())
            }
            _ => frame(seen, self.object.json()),
        };
        self.frames[seen as usize].get_or_init(make).clone()
    }

    fn bytes(&self) -> usize {
        // Once for the object and once for its frame.
        2 * self.object.json().len() + 512
    }
}

/// `{"type":T,"object":O}` and a line feed.
pub(crate) fn frame(seen: Change, object: &[u8]) -> Bytes {
    let mut line = Vec::with_capacity(object.len() + 32);
    line.extend_from_slice(b"{\"type\":\"");
    line.extend_from_slice(seen.as_str().as_bytes());
    line.extend_from_slice(b"\",\"object\":");
    line.extend_from_slice(object);
    line.extend_from_slice(b"}\n");
    line.into()
}

/// All objects of one kind at one revision.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The revision of the whole store that this shows.
    pub revision: Revision,
    pub objects: OrdMap<Key, Arc<Object>>,
}

impl Snapshot {
    /// The objects of one namespace, in order of name.
    pub fn in_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Object>> {
        self.objects
            .range(Key::new(namespace, "")..)
            .take_while(move |(key, _)| &*key.namespace == namespace)
            .map(|(_, object)| object)
    }
}

/// The objects and events of one kind.
pub(crate) struct Shelf {
    objects: OrdMap<Key, Arc<Object>>,
    bytes: u64,
    revision: Revision,
    events: VecDeque<Arc<Event>>,
    /// How many events have left `events`: the number of its first one.
    first: u64,
    /// Events up to this revision may be unknown.
    forgotten: Revision,
    /// The number that the next event will have.
    next: watch::Sender<u64>,
    lanes: Lanes,
}

impl Shelf {
    fn new(forgotten: Revision) -> Shelf {
        Shelf {
            objects: OrdMap::new(),
            bytes: 0,
            revision: Revision(0),
            events: VecDeque::new(),
            first: 0,
            forgotten,
            next: watch::Sender::new(0),
            lanes: Lanes::default(),
        }
    }

    fn put(&mut self, object: Arc<Object>) {
        self.bytes += object.json().len() as u64;
        self.revision = self.revision.max(object.revision());
        if let Some(old) = self.objects.insert(object.key().clone(), object) {
            self.bytes -= old.json().len() as u64;
        }
    }

    fn end(&self) -> u64 {
        self.first + self.events.len() as u64
    }
}

/// Everything that is in memory, behind one lock that is held for pointers only.
pub(crate) struct State {
    shelves: HashMap<&'static Kind, Shelf>,
    revision: watch::Sender<Revision>,
    /// Kinds of the kept events, oldest first.
    order: VecDeque<&'static Kind>,
    event_bytes: usize,
    event_bytes_max: usize,
    /// Events up to here may be unknown of kinds that have no shelf yet.
    forgotten: Revision,
}

impl State {
    pub(crate) fn new(event_bytes_max: usize) -> State {
        State {
            shelves: HashMap::new(),
            revision: watch::Sender::new(Revision(0)),
            order: VecDeque::new(),
            event_bytes: 0,
            event_bytes_max,
            forgotten: Revision(0),
        }
    }

    /// Takes an object that the engine hands back.
    pub(crate) fn load(&mut self, object: Object) {
        let shelf = self.shelves.entry(object.kind()).or_insert_with(|| Shelf::new(Revision(0)));
        shelf.put(Arc::new(object));
    }

    /// Everything is loaded; the engine's last write was at `revision`.
    pub(crate) fn loaded(&mut self, revision: Revision) {
        let newest = self.shelves.values().map(|shelf| shelf.revision).max().unwrap_or_default();
        // An empty store starts at 1: clients take 0 for "any revision".
        let revision = revision.max(newest).max(Revision(1));
        for shelf in self.shelves.values_mut() {
            shelf.forgotten = revision;
            // A deletion may have been the last write.
            shelf.revision = revision;
        }
        self.forgotten = revision;
        self.revision.send_replace(revision);
    }

    pub(crate) fn get(&self, kind: &'static Kind, key: &Key) -> Option<&Arc<Object>> {
        self.shelves.get(kind)?.objects.get(key)
    }

    pub(crate) fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    pub(crate) fn snapshot(&self, kind: &'static Kind) -> Snapshot {
        debug_assert!(kind.storage() == kind, "the store knows only rows that are stored as themselves");
        let objects = self.shelves.get(kind).map(|shelf| shelf.objects.clone()).unwrap_or_default();
        Snapshot { revision: self.revision(), objects }
    }

    pub(crate) fn snapshot_at(&self, kind: &'static Kind, revision: Revision) -> Result<Snapshot, Error> {
        let mut snapshot = self.snapshot(kind);
        if revision >= snapshot.revision {
            return Ok(snapshot);
        }
        if revision < self.forgotten_of(kind) {
            return Err(self.compacted(kind));
        }
        let events = self.shelves.get(kind).map(|shelf| &shelf.events);
        // Undo, newest first, what was written since.
        for event in events.into_iter().flatten().rev().take_while(|event| event.revision() > revision) {
            let key = event.object.key();
            match &event.old {
                Some(old) => snapshot.objects.insert(key.clone(), old.clone()),
                None => snapshot.objects.remove(key),
            };
        }
        snapshot.revision = revision;
        Ok(snapshot)
    }

    pub(crate) fn kind_revision(&self, kind: &'static Kind) -> Revision {
        self.shelves.get(kind).map_or(self.forgotten, |shelf| shelf.revision)
    }

    pub(crate) fn sizes(&self) -> Vec<(&'static Kind, usize, u64)> {
        let filled = self.shelves.iter().filter(|(_, shelf)| !shelf.objects.is_empty());
        filled.map(|(kind, shelf)| (*kind, shelf.objects.len(), shelf.bytes)).collect()
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.shelves.values().map(|shelf| shelf.bytes + 128 * shelf.objects.len() as u64).sum()
    }

    fn forgotten_of(&self, kind: &'static Kind) -> Revision {
        self.shelves.get(kind).map_or(self.forgotten, |shelf| shelf.forgotten)
    }

    fn compacted(&self, kind: &'static Kind) -> Error {
        Error::Compacted { oldest: Revision(self.forgotten_of(kind).0 + 1), current: self.revision() }
    }

    /// The place in the events of `kind` after revision `from`, and what tells of new ones.
    pub(crate) fn place(
        &mut self,
        kind: &'static Kind,
        from: Revision,
    ) -> Result<(u64, watch::Receiver<u64>), Error> {
        debug_assert!(kind.storage() == kind, "the store knows only rows that are stored as themselves");
        if from < self.forgotten_of(kind) {
            return Err(self.compacted(kind));
        }
        let forgotten = self.forgotten;
        let shelf = self.shelves.entry(kind).or_insert_with(|| Shelf::new(forgotten));
        let seen = shelf.events.partition_point(|event| event.revision() <= from);
        Ok((shelf.first + seen as u64, shelf.next.subscribe()))
    }

    /// As [`State::place`], for the events of one lane.
    pub(crate) fn place_in_lane(
        &mut self,
        kind: &'static Kind,
        from: Revision,
        value: &str,
    ) -> Result<(u64, watch::Receiver<u64>), Error> {
        let (place, _) = self.place(kind, from)?;
        let Some(shelf) = self.shelves.get_mut(kind) else { return Err(self.compacted(kind)) };
        let ring = shelf.events.range((place - shelf.first) as usize..);
        Ok((place, shelf.lanes.open(value, place, ring)))
    }

    /// As [`State::events_from`], in one lane; with the place after them.
    pub(crate) fn lane_events_from(
        &self,
        kind: &'static Kind,
        value: &str,
        next: u64,
        max: usize,
    ) -> Result<(Vec<Arc<Event>>, u64), Error> {
        let Some(shelf) = self.shelves.get(kind) else { return Ok((Vec::new(), next)) };
        shelf.lanes.events_from(value, next, max, shelf.end()).ok_or_else(|| self.compacted(kind))
    }

    /// As [`State::caught_up`], in one lane.
    pub(crate) fn lane_caught_up(&self, kind: &'static Kind, value: &str, next: u64) -> Option<Revision> {
        let shelf = self.shelves.get(kind)?;
        shelf.lanes.is_caught_up(value, next).then(|| self.revision())
    }

    /// Up to `max` events of `kind` from place `next` on, or `Compacted` when they are gone.
    pub(crate) fn events_from(
        &self,
        kind: &'static Kind,
        next: u64,
        max: usize,
    ) -> Result<Vec<Arc<Event>>, Error> {
        let Some(shelf) = self.shelves.get(kind) else { return Ok(Vec::new()) };
        let Some(skip) = next.checked_sub(shelf.first) else { return Err(self.compacted(kind)) };
        let skip = (skip as usize).min(shelf.events.len());
        Ok(shelf.events.range(skip..).take(max).cloned().collect())
    }

    /// The revision up to which someone at place `next` has seen everything, if nothing waits there.
    pub(crate) fn caught_up(&self, kind: &'static Kind, next: u64) -> Option<Revision> {
        let end = self.shelves.get(kind).map_or(0, Shelf::end);
        (next >= end).then(|| self.revision())
    }

    /// Makes a durable batch visible: maps, events and revision at once.
    pub(crate) fn publish(
        &mut self,
        writes: Vec<(Change, Arc<Object>, Option<Arc<Object>>)>,
        revision: Revision,
    ) {
        let mut touched: Vec<&'static Kind> = Vec::new();
        let mut woken: Vec<Box<str>> = Vec::new();
        for (change, object, old) in writes {
            let kind = object.kind();
            let forgotten = self.forgotten;
            let shelf = self.shelves.entry(kind).or_insert_with(|| Shelf::new(forgotten));
            if change == Change::Deleted {
                shelf.revision = object.revision();
                object.supersede();
                if let Some(old) = shelf.objects.remove(object.key()) {
                    shelf.bytes -= old.json().len() as u64;
                }
            } else {
                shelf.put(object.clone());
            }
            if let Some(old) = &old {
                old.supersede();
            }
            let event = Arc::new(Event::new(change, object, old));
            self.event_bytes += event.bytes();
            let number = shelf.end();
            shelf.lanes.push(number, &event, &mut woken);
            shelf.events.push_back(event);
            self.order.push_back(kind);
            if !touched.contains(&kind) {
                touched.push(kind);
            }
        }
        self.forget();
        for kind in touched {
            if let Some(shelf) = self.shelves.get(kind) {
                shelf.next.send_replace(shelf.end());
                shelf.lanes.wake(&woken, shelf.end());
            }
        }
        self.revision.send_replace(revision);
    }

    /// Drops the oldest events: those beyond the budget, and those that nobody comes back for. Who has seen
    /// the last event of a kind can go on from there however long ago it was.
    fn forget(&mut self) {
        // The last one stays, or a single large event would never be told.
        while self.order.len() > 1 {
            let kind = self.order[0];
            let oldest = self.shelves.get(kind).and_then(|shelf| shelf.events.front());
            let is_old = oldest.is_some_and(|event| event.at.elapsed() > KEEP);
            if !is_old && self.event_bytes <= self.event_bytes_max {
                return;
            }
            let oldest = self.order.pop_front().and_then(|kind| self.shelves.get_mut(kind));
            let Some(shelf) = oldest else { return };
            let Some(event) = shelf.events.pop_front() else { return };
            shelf.lanes.forget(shelf.first, &event);
            shelf.first += 1;
            shelf.forgotten = event.revision();
            self.event_bytes -= event.bytes();
        }
    }
}
