//! An engine for tests: keeps nothing beyond the process, and fails when told to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use minke_api::{Key, Kind, Object, Revision};

use crate::{Batch, Engine, EngineError};

/// Holds what was committed in memory. Clones share it, so that a second store can be opened on what
/// the first one left.
#[derive(Clone, Default)]
pub struct Memory {
    contents: Arc<Mutex<Contents>>,
}

#[derive(Default)]
struct Contents {
    objects: BTreeMap<(&'static str, &'static str, Key), (&'static Kind, Arc<Object>)>,
    revision: Revision,
    full: bool,
}

impl Memory {
    /// From now on commits fail for want of room, or no longer do.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Contents> {
        self.contents.lock().expect("nothing panics while the memory is locked")
    }
}

impl Engine for Memory {
    fn load(&mut self, each: &mut dyn FnMut(Object)) -> Result<Revision, EngineError> {
        let contents = self.lock();
        for (kind, object) in contents.objects.values() {
            each(Object::decode(kind, object.json()).expect("what was encoded can be decoded"));
        }
        Ok(contents.revision)
    }

    fn commit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let mut contents = self.lock();
        if contents.full {
            return Err(EngineError::Full);
        }
        for write in &batch.writes {
            let kind = write.object.kind();
            let key = (kind.group, kind.plural, write.object.key().clone());
            if write.deleted {
                contents.objects.remove(&key);
            } else {
                contents.objects.insert(key, (kind, write.object.clone()));
            }
        }
        contents.revision = batch.revision;
        Ok(())
    }
}
