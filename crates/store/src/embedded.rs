//! The default engine: one redb file.
//!
//! A batch is one redb transaction and one fsync. redb writes pages anew and then switches over to them,
//! so a crash at any moment leaves the state before or after a batch (docs/storage-format.md).
//!
//! A failed write leaves redb unusable until the file is opened again. When the device was full, the file
//! is opened again at the next write; any other failure leaves it unknown what the disk holds, and
//! the store stops writing.
//!
//! Even a deletion needs new pages. So that a full device can be emptied, a reserve lies beside the file,
//! and gives its room to writes that delete or shrink. Until it is filled again, there is no room for others.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use minke_api::{KINDS, Key, Kind, Object, Revision};
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::engine::{Batch, Engine, EngineError};

/// `group/plural NUL namespace NUL name` to the object's JSON.
const OBJECTS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("objects");
/// Name to number: `format`, `revision`.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// The version of what this file writes; another one is refused.
const FORMAT: u64 = 1;

/// redb's page cache. Small: objects are read once, at the start; the cache only serves inner pages.
const CACHE_BYTES: usize = 8 << 20;

/// A file below this size is never compacted, nor one that is at least half in use.
const COMPACT_FROM: u64 = 64 << 20;

/// Commits between two looks at whether the file should be compacted.
const TIDY_EVERY: u32 = 1024;

/// Bytes of the reserve: a few transactions' worth of pages.
const RESERVE: usize = 1 << 20;

/// Commits that must have succeeded before the reserve is filled again.
const RESERVE_EVERY: u32 = 64;

type Open = Box<dyn FnMut() -> Result<Database, redb::DatabaseError> + Send>;
type Length = Box<dyn Fn() -> Option<u64> + Send>;

/// Objects in one redb file.
pub struct Embedded {
    open: Open,
    length: Length,
    /// `None` after a failure, until it is opened again.
    database: Option<Database>,
    /// The revision of the last batch that is known to be durable.
    revision: Revision,
    since_tidy: u32,
    reserve: Option<Reserve>,
    /// Held for as long as this lives.
    _lock: Option<File>,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{} is in use by another server", .0.display())]
    InUse(PathBuf),
    #[error("cannot open {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot open {}", path.display())]
    Database { path: PathBuf, source: Box<redb::Error> },
    #[error("the state was written in format {0}, and this version knows only format {FORMAT}")]
    Format(u64),
}

impl Embedded {
    /// Opens the file, or makes it (readable by its owner only). A lock file beside it keeps out others.
    pub fn open(path: &Path) -> Result<Embedded, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        let lock = private().open(path.with_extension("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let is_new = !path.exists();
        let at = path.to_owned();
        let open = move || Ok(Disk(private().open(&at)?));
        let mut embedded = Embedded::on(open).map_err(|error| match error {
            OpenError::Database { source, .. } => OpenError::Database { path: path.to_owned(), source },
            other => other,
        })?;
        if is_new && let Some(directory) = path.parent() {
            // Else the name of the new file may not survive a power failure.
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        }
        let at = path.to_owned();
        embedded.length = Box::new(move || std::fs::metadata(&at).ok().map(|file| file.len()));
        embedded._lock = Some(lock);
        let mut reserve =
            Reserve { path: path.with_extension("reserve"), filled: false, commits: 0, freed: 0 };
        reserve.fill();
        embedded.reserve = Some(reserve);
        Ok(embedded)
    }

    /// Opens the database on other storage; `backend` is called again after a failure.
    pub fn on<B, F>(mut backend: F) -> Result<Embedded, OpenError>
    where
        B: StorageBackend,
        F: FnMut() -> io::Result<B> + Send + 'static,
    {
        let mut open: Open = Box::new(move || {
            let backend = backend().map_err(|e| redb::DatabaseError::Storage(redb::StorageError::Io(e)))?;
            Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend)
        });
        let failed =
            |error: redb::Error| OpenError::Database { path: PathBuf::new(), source: Box::new(error) };
        let database = open().map_err(|error| failed(error.into()))?;
        let (format, revision) = prepare(&database).map_err(failed)?;
        if format != FORMAT {
            return Err(OpenError::Format(format));
        }
        Ok(Embedded {
            open,
            length: Box::new(|| None),
            database: Some(database),
            revision,
            since_tidy: 0,
            reserve: None,
            _lock: None,
        })
    }

    /// Whether there is a reserve, if one is kept; one that was given away is taken back as soon as that can be.
    fn has_reserve(&mut self) -> bool {
        let Some(reserve) = &mut self.reserve else { return true };
        if !reserve.filled {
            reserve.fill();
        }
        if !reserve.filled && reserve.freed >= RESERVE as i64 {
            reserve.freed = 0;
            // The room that deletions made is within the file.
            if self.database().is_ok() {
                self.compact();
            }
            self.reserve.iter_mut().for_each(Reserve::fill);
        }
        self.reserve.as_ref().is_none_or(|reserve| reserve.filled)
    }

    fn compact(&mut self) {
        let Some(database) = &mut self.database else { return };
        let before = (self.length)();
        match database.compact() {
            Ok(_) => tracing::info!(before, after = (self.length)(), "Compacted the store"),
            Err(error) => {
                tracing::warn!(%error, "Compacting the store failed");
                // Compaction moves whole committed states; what was there is there.
                self.database = None;
            }
        }
    }

    /// The database, opened again if the last write failed.
    fn database(&mut self) -> Result<&Database, redb::Error> {
        if self.database.is_none() {
            let database = (self.open)()?;
            let (_, revision) = prepare(&database)?;
            if revision != self.revision {
                // The switch-over of the failed batch reached the disk after all. Its writers were told
                // that it failed, so memory and disk differ, and only a restart can tell which is right.
                return Err(redb::Error::Corrupted(format!(
                    "revision {revision} was written although the device reported a failure; restart the server"
                )));
            }
            self.database = Some(database);
        }
        Ok(self.database.as_ref().expect("it was opened above"))
    }
}

/// Makes the tables if they are missing; returns format and revision.
fn prepare(database: &Database) -> Result<(u64, Revision), redb::Error> {
    let read = database.begin_read()?;
    match read.open_table(META) {
        Ok(meta) => {
            let number = |name| Ok::<_, redb::Error>(meta.get(name)?.map_or(0, |number| number.value()));
            return Ok((number("format")?, Revision(number("revision")?)));
        }
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    drop(read);
    let write = database.begin_write()?;
    write.open_table(META)?.insert("format", FORMAT)?;
    write.open_table(OBJECTS)?;
    write.commit()?;
    Ok((FORMAT, Revision(0)))
}

impl Engine for Embedded {
    fn load(&mut self, each: &mut dyn FnMut(Object)) -> Result<Revision, EngineError> {
        let kinds: HashMap<(&str, &str), &'static Kind> = KINDS
            .iter()
            .filter(|kind| kind.is_stored() && kind.stored_as.is_none())
            .map(|kind| ((kind.group, kind.plural), kind))
            .collect();
        let database = self.database().map_err(engine_error)?;
        let read = database.begin_read().map_err(|e| engine_error(e.into()))?;
        let table = read.open_table(OBJECTS).map_err(|e| engine_error(e.into()))?;
        for entry in table.iter().map_err(|e| engine_error(e.into()))? {
            let (key, json) = entry.map_err(|e| engine_error(e.into()))?;
            let Some((resource, name)) = parse_key(key.value()) else {
                return Err(EngineError::Failed("a key in the table of objects cannot be read".to_owned()));
            };
            let Some(kind) = kinds.get(&resource) else {
                // Written by a version that knows more; it stays in the file.
                tracing::warn!(group = resource.0, resource = resource.1, object = %name, "Unknown resource");
                continue;
            };
            let object = Object::decode(kind, json.value()).map_err(|error| {
                EngineError::Failed(format!("{} {name} cannot be read: {error}", kind.qualified_plural()))
            })?;
            each(object);
        }
        Ok(self.revision)
    }

    fn commit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        if !batch.makes_room() && !self.has_reserve() {
            return Err(EngineError::Full);
        }
        let mut result = self.database().and_then(|database| write(database, batch));
        if let (Err(error), Some(reserve)) = (&result, &mut self.reserve)
            && is_full(error)
            && batch.makes_room()
            && reserve.release()
        {
            self.database = None;
            result = self.database().and_then(|database| write(database, batch));
        }
        match result {
            Ok(()) => {
                self.revision = batch.revision;
                self.since_tidy += 1;
                if let Some(reserve) = &mut self.reserve {
                    reserve.freed += batch.writes.iter().map(|write| -write.growth).sum::<i64>();
                }
                Ok(())
            }
            Err(error) => {
                // redb refuses everything after a failed write; the file must be opened again.
                self.database = None;
                Err(engine_error(error))
            }
        }
    }

    fn tidy(&mut self, live_bytes: u64) {
        if let Some(reserve) = &mut self.reserve {
            reserve.refill();
        }
        if self.since_tidy < TIDY_EVERY {
            return;
        }
        self.since_tidy = 0;
        if (self.length)().is_some_and(|length| length >= COMPACT_FROM && length >= 4 * live_bytes) {
            self.compact();
        }
    }
}

fn write(database: &Database, batch: &Batch) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut objects = transaction.open_table(OBJECTS)?;
        for write in &batch.writes {
            let key = key_bytes(write.object.kind(), write.object.key());
            if write.deleted {
                objects.remove(&key[..])?;
            } else {
                objects.insert(&key[..], &write.object.json()[..])?;
            }
        }
        transaction.open_table(META)?.insert("revision", batch.revision.0)?;
    }
    transaction.commit()?;
    Ok(())
}

fn key_bytes(kind: &Kind, key: &Key) -> Vec<u8> {
    [kind.group, "/", kind.plural, "\0", &key.namespace, "\0", &key.name].concat().into_bytes()
}

/// Group and plural, and `namespace/name` for messages.
fn parse_key(key: &[u8]) -> Option<((&str, &str), String)> {
    let mut parts = std::str::from_utf8(key).ok()?.splitn(3, '\0');
    let resource = parts.next()?.split_once('/')?;
    let key = Key::new(parts.next()?, parts.next()?);
    Some((resource, key.to_string()))
}

fn engine_error(error: redb::Error) -> EngineError {
    if is_full(&error) { EngineError::Full } else { EngineError::Failed(error.to_string()) }
}

fn is_full(error: &redb::Error) -> bool {
    let redb::Error::Io(error) = error else { return false };
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Room that is kept for making room.
struct Reserve {
    path: PathBuf,
    filled: bool,
    /// Commits since it was released, or since it could not be filled.
    commits: u32,
    /// Since then, or since the file was last compacted for its sake: bytes by which objects have become fewer.
    freed: i64,
}

impl Reserve {
    fn fill(&mut self) {
        self.commits = 0;
        let written = private().open(&self.path).and_then(|mut file| {
            file.write_all(&vec![0; RESERVE])?;
            file.sync_all()
        });
        self.filled = written.is_ok();
        if written.is_err() {
            // A part of it would only take room from others.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Gives the room back to the device; `false` when there is none to give.
    fn release(&mut self) -> bool {
        (self.commits, self.freed) = (0, 0);
        std::mem::take(&mut self.filled) && std::fs::remove_file(&self.path).is_ok()
    }

    /// Called after successful commits.
    fn refill(&mut self) {
        self.commits += 1;
        if !self.filled && self.commits >= RESERVE_EVERY {
            self.fill();
        }
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

/// A file, read and written at offsets. The lock is not on it but beside it, as it is opened again and
/// again while the server runs.
#[derive(Debug)]
struct Disk(File);

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}
