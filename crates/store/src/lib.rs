//! The cluster's state: every object in memory, every write durable before it is acknowledged.
//!
//! One ordered persistent map per resource, one revision that counts every write, the recent events of
//! every resource for watchers to go on from. What makes a write durable is an [`Engine`] underneath:
//! [`Embedded`] on redb, [`Memory`] for tests. Only the API server uses this crate, and only this crate
//! knows the file format (docs/storage-format.md).
#![forbid(unsafe_code)]

mod embedded;
mod engine;
mod lanes;
mod memory;
mod state;
mod watch;
mod writer;

pub use embedded::{Embedded, OpenError};
pub use engine::{Batch, Engine, EngineError, Write};
pub use memory::Memory;
pub use state::{Change, Event, Snapshot};
pub use watch::Watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use minke_api::{Draft, Key, Kind, Object, Revision};
use tokio::sync::{mpsc, oneshot};

use state::State;
use writer::{Message, Writer};

/// How many commits may wait for the writer; more wait to be queued.
const QUEUE: usize = 4096;

/// Bytes of recent events that are kept for watchers unless told otherwise.
pub const EVENT_BYTES: usize = 64 << 20;

/// What must be true of an object for an [`Op`] to be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// There is no such object.
    Absent,
    /// The object exists and was last written at this revision.
    Revision(Revision),
    /// Nothing: write, whatever is there.
    Any,
}

/// One step of a transaction.
#[derive(Debug, Clone)]
pub enum Op {
    Put {
        draft: Draft,
        expect: Expect,
    },
    /// Deleting what is not there is a conflict, except under [`Expect::Any`], where it does nothing.
    Delete {
        kind: &'static Kind,
        key: Key,
        expect: Expect,
    },
    /// Replaces an object by what is made of it as it will be by then. A conflict when that is nothing; an object
    /// that is not there is left so. It happens on the writer's thread, which others wait for: it must be quick.
    Amend {
        kind: &'static Kind,
        key: Key,
        amend: Amend,
    },
}

/// Makes an object's next state of its last, or finds that it may not be changed.
#[derive(Clone)]
pub struct Amend(Arc<AmendFn>);

type AmendFn = dyn Fn(&Object) -> Option<Draft> + Send + Sync;

impl std::fmt::Debug for Amend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Amend")
    }
}

impl Op {
    /// A change that depends on what it changes, and on nothing else, so that it need not be tried again when
    /// someone else was faster.
    pub fn amend(
        kind: &'static Kind,
        key: Key,
        amend: impl Fn(&Object) -> Option<Draft> + Send + Sync + 'static,
    ) -> Op {
        Op::Amend { kind, key, amend: Amend(Arc::new(amend)) }
    }

    pub fn create(draft: Draft) -> Op {
        Op::Put { draft, expect: Expect::Absent }
    }

    /// Replaces what was read as `old`.
    pub fn replace(draft: Draft, old: &Object) -> Op {
        Op::Put { draft, expect: Expect::Revision(old.revision()) }
    }

    /// Deletes what was read as `old`.
    pub fn delete(old: &Object) -> Op {
        Op::Delete { kind: old.kind(), key: old.key().clone(), expect: Expect::Revision(old.revision()) }
    }
}

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The expectation of the operation numbered `op` does not hold; nothing was written.
    #[error("operation {op} of the transaction found another state than it expects")]
    Conflict { op: usize, current: Option<Arc<Object>> },
    /// The events after the revision that was asked for are no longer known.
    #[error("the events before revision {oldest} are gone")]
    Compacted { oldest: Revision, current: Revision },
    /// Nothing was written, and writes work again when there is room.
    #[error("no space left on the device that holds the cluster's state")]
    Full,
    /// It is not known what is on the disk; reads go on, writes need a restart.
    #[error("the cluster's state cannot be written: {0}")]
    Broken(Arc<str>),
    #[error("the store is closed")]
    Closed,
}

/// Handle to the store; clones share it. `kind` is always a row that is its own [`Kind::storage`].
#[derive(Clone)]
pub struct Store {
    state: Arc<RwLock<State>>,
    queue: mpsc::Sender<Message>,
    broken: Arc<AtomicBool>,
}

impl Store {
    /// Reads back everything that `engine` holds, and starts the writer.
    /// `event_bytes` bounds the memory of recent events.
    pub fn open(mut engine: impl Engine, event_bytes: usize) -> Result<Store, EngineError> {
        let mut state = State::new(event_bytes);
        let revision = engine.load(&mut |object| state.load(object))?;
        state.loaded(revision);
        let state = Arc::new(RwLock::new(state));
        let (queue, receiver) = mpsc::channel(QUEUE);
        let broken = Arc::new(AtomicBool::new(false));
        let writer = Writer::new(Box::new(engine), state.clone(), receiver, broken.clone());
        std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|error| EngineError::Failed(error.to_string()))?;
        Ok(Store { state, queue, broken })
    }

    /// An empty store that forgets everything when it is dropped, for tests.
    pub fn in_memory() -> Store {
        Store::open(Memory::default(), EVENT_BYTES).expect("an empty memory can be read")
    }

    pub fn get(&self, kind: &'static Kind, key: &Key) -> Option<Arc<Object>> {
        self.read().get(kind, key).cloned()
    }

    /// All objects of `kind` as of now. O(1): the map is shared, not copied.
    pub fn snapshot(&self, kind: &'static Kind) -> Snapshot {
        self.read().snapshot(kind)
    }

    /// All objects of `kind` as they were at `revision`, as far back as events are kept.
    /// Costs the number of writes to `kind` since then. A revision of the future is taken as now.
    pub fn snapshot_at(&self, kind: &'static Kind, revision: Revision) -> Result<Snapshot, Error> {
        self.read().snapshot_at(kind, revision)
    }

    /// The revision of the last write to `kind`: what is derived from its objects is valid while this stays.
    pub fn kind_revision(&self, kind: &'static Kind) -> Revision {
        self.read().kind_revision(kind)
    }

    /// The revision of the last write to anything.
    pub fn revision(&self) -> Revision {
        self.read().revision()
    }

    /// Number of objects of each kind that has any, and the bytes of their JSON.
    pub fn sizes(&self) -> Vec<(&'static Kind, usize, u64)> {
        self.read().sizes()
    }

    /// Carries out all of `ops` or none, and returns once that is durable: the object as it was written,
    /// or, for a deletion, its last state at the revision of the deletion. Operations that did nothing
    /// (a deletion of nothing under [`Expect::Any`], a change of what is not there) have no result.
    pub async fn commit(&self, ops: Vec<Op>) -> Result<Vec<Arc<Object>>, Error> {
        let (answer, answered) = oneshot::channel();
        self.queue.send(Message::Commit { ops, answer }).await.map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// The events of `kind` after revision `from`.
    pub fn watch(&self, kind: &'static Kind, from: Revision) -> Result<Watch, Error> {
        Watch::new(self.state.clone(), kind, from, None)
    }

    /// As [`Store::watch`], but only what happens to objects of which `spec.nodeName` is or was `node`. Costs
    /// nothing while others change.
    pub fn watch_node(&self, kind: &'static Kind, from: Revision, node: &str) -> Result<Watch, Error> {
        Watch::new(self.state.clone(), kind, from, Some(node))
    }

    /// Everything there is of `kind`, and what happens after.
    pub fn snapshot_and_watch(&self, kind: &'static Kind) -> (Snapshot, Watch) {
        self.snapshot_and_watch_node(kind, None)
    }

    /// As [`Store::snapshot_and_watch`], but of what happens only what [`Store::watch_node`] tells, if a node is
    /// given.
    pub fn snapshot_and_watch_node(&self, kind: &'static Kind, node: Option<&str>) -> (Snapshot, Watch) {
        loop {
            let snapshot = self.snapshot(kind);
            // Between the two the ring could only lose this position if it were all overwritten.
            if let Ok(watch) = Watch::new(self.state.clone(), kind, snapshot.revision, node) {
                return (snapshot, watch);
            }
        }
    }

    /// Whether writes may succeed: not once the engine has failed for good, or the store is closed.
    pub fn is_writable(&self) -> bool {
        !self.queue.is_closed() && !self.broken.load(Ordering::Relaxed)
    }

    /// Waits until the store has reached `revision`.
    pub async fn reached(&self, revision: Revision) {
        let mut reached = self.read().subscribe();
        // The sender lives in `self.state`.
        let _ = reached.wait_for(|now| *now >= revision).await;
    }

    /// Finishes what is queued, closes the engine cleanly, and refuses all later commits.
    pub async fn close(&self) {
        let (answer, answered) = oneshot::channel();
        if self.queue.send(Message::Close { answer }).await.is_ok() {
            let _ = answered.await;
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().expect("publishing a batch does not panic")
    }
}
