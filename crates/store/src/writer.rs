//! The one thread that writes: group commit.
//!
//! Everything that is queued becomes one batch: each transaction is checked against memory and the batch
//! so far, the batch is made durable at once, then published, then answered. What arrives meanwhile is
//! the next batch, so the cost of making things durable is shared by all who wait.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use minke_api::{Draft, Key, Kind, Object, Revision};
use tokio::sync::{mpsc, oneshot};

use crate::engine::{Batch, Engine, EngineError, Write};
use crate::state::{Change, State};
use crate::{Error, Expect, Op};

/// Bounds of a batch, so that the first of it need not wait for ever.
const BATCH_TRANSACTIONS: usize = 1024;
const BATCH_BYTES: usize = 16 << 20;

type Place = (&'static Kind, Key);
type Answer = oneshot::Sender<Result<Vec<Arc<Object>>, Error>>;

pub(crate) enum Message {
    Commit { ops: Vec<Op>, answer: Answer },
    Close { answer: oneshot::Sender<()> },
}

pub(crate) struct Writer {
    engine: Box<dyn Engine>,
    state: Arc<RwLock<State>>,
    queue: mpsc::Receiver<Message>,
    /// Why nothing can be written any more.
    broken: Option<Arc<str>>,
    /// The last batch found no room, and it was said.
    is_full: bool,
    /// Tells everyone else of `broken`.
    is_broken: Arc<AtomicBool>,
}

/// Transactions that were found good, and what they will have written.
#[derive(Default)]
struct Pending {
    revision: Revision,
    bytes: usize,
    writes: Vec<(Change, Arc<Object>, Option<Arc<Object>>)>,
    /// Objects as they are after `writes`.
    overlay: HashMap<Place, Option<Arc<Object>>>,
    answers: Vec<(Answer, Vec<Arc<Object>>)>,
}

/// What an operation comes to, once it is known what it finds.
enum Step {
    Put(Box<Draft>),
    Delete,
    Nothing,
}

impl Writer {
    pub(crate) fn new(
        engine: Box<dyn Engine>,
        state: Arc<RwLock<State>>,
        queue: mpsc::Receiver<Message>,
        is_broken: Arc<AtomicBool>,
    ) -> Writer {
        Writer { engine, state, queue, broken: None, is_full: false, is_broken }
    }

    pub(crate) fn run(mut self) {
        while let Some(message) = self.queue.blocking_recv() {
            let mut next = Some(message);
            let mut pending = Pending { revision: self.read().revision(), ..Pending::default() };
            let mut transactions = 0;
            let mut close = None;
            while let Some(message) = next {
                match message {
                    Message::Commit { ops, answer } => self.take(&mut pending, ops, answer),
                    Message::Close { answer } => {
                        close = Some(answer);
                        break;
                    }
                }
                transactions += 1;
                let full = transactions >= BATCH_TRANSACTIONS || pending.bytes >= BATCH_BYTES;
                next = if full { None } else { self.queue.try_recv().ok() };
            }
            self.write(pending);
            if let Some(answer) = close {
                // Closes the engine and refuses what is still queued, and only then says so.
                drop(self);
                let _ = answer.send(());
                return;
            }
            if self.queue.is_empty() && self.broken.is_none() {
                let live_bytes = self.read().live_bytes();
                self.engine.tidy(live_bytes);
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().expect("publishing a batch does not panic")
    }

    /// Adds a transaction to the batch, or answers at once that it cannot be.
    fn take(&self, pending: &mut Pending, ops: Vec<Op>, answer: Answer) {
        if let Some(why) = &self.broken {
            let _ = answer.send(Err(Error::Broken(why.clone())));
            return;
        }
        let start = (pending.writes.len(), pending.revision);
        let mut results = Vec::with_capacity(ops.len());
        let mut undo: Vec<(Place, Option<Option<Arc<Object>>>)> = Vec::new();
        let state = self.read();
        for (n, op) in ops.into_iter().enumerate() {
            let place = match &op {
                Op::Put { draft, .. } => (draft.kind(), draft.key().clone()),
                Op::Delete { kind, key, .. } | Op::Amend { kind, key, .. } => (*kind, key.clone()),
            };
            let kind = place.0;
            let current = match pending.overlay.get(&place) {
                Some(current) => current.clone(),
                None => state.get(kind, &place.1).cloned(),
            };
            let is_at = |revision| current.as_ref().is_some_and(|object| object.revision() == revision);
            let holds = |expect| match expect {
                Expect::Any => true,
                Expect::Absent => current.is_none(),
                Expect::Revision(revision) => is_at(revision),
            };
            let step = match op {
                Op::Put { draft, expect } => holds(expect).then(|| Step::Put(Box::new(draft))),
                Op::Delete { expect: Expect::Absent, .. } => None,
                Op::Delete { expect, .. } => holds(expect).then_some(Step::Delete),
                Op::Amend { amend, .. } => match &current {
                    Some(old) => (amend.0)(old).map(|draft| Step::Put(Box::new(draft))),
                    None => Some(Step::Nothing),
                },
            };
            let Some(step) = step else {
                for (place, before) in undo.into_iter().rev() {
                    match before {
                        Some(before) => pending.overlay.insert(place, before),
                        None => pending.overlay.remove(&place),
                    };
                }
                pending.writes.truncate(start.0);
                pending.revision = start.1;
                let _ = answer.send(Err(Error::Conflict { op: n, current }));
                return;
            };
            let revision = Revision(pending.revision.0 + 1);
            let (change, object) = match (step, &current) {
                (Step::Put(draft), None) => (Change::Added, draft.seal(revision)),
                (Step::Put(draft), Some(_)) => (Change::Modified, draft.seal(revision)),
                (Step::Delete, Some(old)) => (Change::Deleted, old.at_revision(revision)),
                (Step::Delete, None) | (Step::Nothing, _) => continue,
            };
            let object = Arc::new(object);
            pending.revision = revision;
            pending.bytes += object.json().len();
            let after = (change != Change::Deleted).then(|| object.clone());
            undo.push((place.clone(), pending.overlay.insert(place, after)));
            pending.writes.push((change, object.clone(), current));
            results.push(object);
        }
        pending.answers.push((answer, results));
    }

    /// Makes the batch durable, shows it, and answers all who are in it.
    fn write(&mut self, pending: Pending) {
        let durable = if pending.writes.is_empty() {
            Ok(())
        } else {
            let writes = pending
                .writes
                .iter()
                .map(|(change, object, old)| {
                    let deleted = *change == Change::Deleted;
                    let length = |object: &Arc<Object>| object.json().len() as i64;
                    let growth = if deleted { 0 } else { length(object) } - old.as_ref().map_or(0, length);
                    Write { object: object.clone(), deleted, growth }
                })
                .collect();
            let batch = Batch { revision: pending.revision, writes };
            let durable = self.engine.commit(&batch);
            if durable.is_ok() && !batch.makes_room() && std::mem::take(&mut self.is_full) {
                tracing::info!("There is room for the cluster's state again");
            }
            durable
        };
        let failed = match durable {
            Ok(()) => None,
            Err(EngineError::Full) => {
                // Said once: the log may well lie on the same device.
                if !std::mem::replace(&mut self.is_full, true) {
                    tracing::warn!("No space left to write the cluster's state");
                }
                Some(Error::Full)
            }
            Err(EngineError::Failed(why)) => {
                tracing::error!(
                    error = why,
                    "Writing the cluster's state failed; writes are refused from now on"
                );
                let why: Arc<str> = why.into();
                self.is_broken.store(true, Ordering::Relaxed);
                self.broken = Some(why.clone());
                Some(Error::Broken(why))
            }
        };
        match failed {
            None => {
                if !pending.writes.is_empty() {
                    let mut state = self.state.write().expect("publishing a batch does not panic");
                    state.publish(pending.writes, pending.revision);
                }
                for (answer, results) in pending.answers {
                    let _ = answer.send(Ok(results));
                }
            }
            Some(error) => {
                for (answer, _) in pending.answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }
}
