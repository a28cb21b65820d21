//! The seam to what makes writes durable.

use std::sync::Arc;

use minke_api::{Object, Revision};

/// Makes batches durable, in order. One thread calls it; it may block.
pub trait Engine: Send + 'static {
    /// Hands back everything that was committed, each object once, in any order, and the revision of the
    /// last batch. Called once, before the first commit.
    fn load(&mut self, each: &mut dyn FnMut(Object)) -> Result<Revision, EngineError>;

    /// Makes the batch durable: all of it before this returns, or nothing of it when it fails.
    /// After [`EngineError::Full`] the engine stays usable; after any other error it is not called again.
    fn commit(&mut self, batch: &Batch) -> Result<(), EngineError>;

    /// Called when nothing waits to be written, with the bytes that the live objects take: the time to
    /// give back room.
    fn tidy(&mut self, _live_bytes: u64) {}
}

/// Writes that become durable together.
#[derive(Debug)]
pub struct Batch {
    /// The revision of the last write; kept even if the object is deleted later.
    pub revision: Revision,
    pub writes: Vec<Write>,
}

#[derive(Debug, Clone)]
pub struct Write {
    /// The object as written; for a deletion, its last state at the revision of the deletion.
    pub object: Arc<Object>,
    pub deleted: bool,
    /// Bytes by which the state grows, or shrinks when negative.
    pub growth: i64,
}

/// An update may grow by this much and still count as one that makes room: marking an object for deletion
/// comes before deleting it.
const SMALL_GROWTH: i64 = 512;

impl Batch {
    /// Whether this creates nothing and lets nothing grow by much: what must go on when there is no room,
    /// since it is how room is made.
    pub fn makes_room(&self) -> bool {
        self.writes.iter().all(|write| write.growth <= SMALL_GROWTH && !write.is_creation())
    }
}

impl Write {
    fn is_creation(&self) -> bool {
        !self.deleted && self.growth == self.object.json().len() as i64
    }
}

/// Why an engine could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("no space left on device")]
    Full,
    #[error("{0}")]
    Failed(String),
}
