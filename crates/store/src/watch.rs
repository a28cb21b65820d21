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
}

impl Watch {
    pub(crate) fn new(
        state: Arc<RwLock<State>>,
        kind: &'static Kind,
        from: Revision,
    ) -> Result<Watch, Error> {
        let place = state.write().expect("publishing a batch does not panic").place(kind, from);
        let (next, written) = place?;
        Ok(Watch { state, kind, next, written })
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
        let events = self.read().events_from(self.kind, self.next, TAKE)?;
        self.next += events.len() as u64;
        Ok(events)
    }

    /// The revision up to which everything was handed out, if nothing waits: what a bookmark may say.
    pub fn caught_up(&self) -> Option<Revision> {
        self.read().caught_up(self.kind, self.next)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().expect("publishing a batch does not panic")
    }
}
