//! Watching: a place in the events of a kind.
//!
//! A watcher holds no queue. It is woken when its kind is written, and then takes what is new from the
//! ring that all share. One that is slower than the ring is long loses its place, and is told so.

use std::sync::{Arc, RwLock};

use minke_api::{Kind, Revision};
use tokio::sync::watch;

use crate::Error;
use crate::state::{Event, State};

/// Most events that are handed out at once, so that one slow reader does not hold many.
const TAKE: usize = 256;

/// The events of one kind after some revision.
pub struct Watch {
    state: Arc<RwLock<State>>,
    kind: &'static Kind,
    /// Number of the event that comes next.
    next: u64,
    written: watch::Receiver<u64>,
    /// Only the events of objects on this node, and no waking by others.
    lane: Option<Box<str>>,
}

impl Watch {
    pub(crate) fn new(
        state: Arc<RwLock<State>>,
        kind: &'static Kind,
        from: Revision,
        lane: Option<&str>,
    ) -> Result<Watch, Error> {
        let mut locked = state.write().expect("publishing a batch does not panic");
        let place = match lane {
            None => locked.place(kind, from),
            Some(value) => locked.place_in_lane(kind, from, value),
        };
        drop(locked);
        let (next, written) = place?;
        Ok(Watch { state, kind, next, written, lane: lane.map(Into::into) })
    }

    /// Waits for events, and returns those that are there, in order; never an empty list.
    /// [`Error::Compacted`] when the watcher was too slow; it then stays so.
    /// Cancel-safe.
    pub async fn next(&mut self) -> Result<Vec<Arc<Event>>, Error> {
        loop {
            let events = self.ready()?;
            if !events.is_empty() {
                return Ok(events);
            }
            let next = self.next;
            if self.written.wait_for(|end| *end > next).await.is_err() {
                return Err(Error::Closed);
            }
        }
    }

    /// The events that are there already; perhaps none.
    pub fn ready(&mut self) -> Result<Vec<Arc<Event>>, Error> {
        let Some(lane) = &self.lane else {
            let events = self.read().events_from(self.kind, self.next, TAKE)?;
            self.next += events.len() as u64;
            return Ok(events);
        };
        let (events, next) = self.read().lane_events_from(self.kind, lane, self.next, TAKE)?;
        self.next = next;
        Ok(events)
    }

    /// The revision up to which everything was handed out, if nothing waits: what a bookmark may say.
    pub fn caught_up(&self) -> Option<Revision> {
        match &self.lane {
            None => self.read().caught_up(self.kind, self.next),
            Some(lane) => self.read().lane_caught_up(self.kind, lane, self.next),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().expect("publishing a batch does not panic")
    }
}
