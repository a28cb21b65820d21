//! Power failures and full disks: a disk that keeps only what was synced, cut off at every operation.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use minke_api::{Draft, Key, Kind};
use minke_store::{EVENT_BYTES, Embedded, Error, Expect, Op, Store};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;
use serde_json::json;

/// A disk in memory. Clones are the same disk.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

#[derive(Debug, Default)]
struct Platter {
    /// What reads see.
    content: Vec<u8>,
    /// What would be there after a power failure, but for `unsynced`.
    synced: Vec<u8>,
    unsynced: Vec<Change>,
    operations: usize,
    /// From this operation on, all fail.
    cut_at: Option<usize>,
    full: bool,
}

#[derive(Debug, Clone)]
enum Change {
    Length(u64),
    Write(u64, Vec<u8>),
}

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => content.resize(*length as usize, 0),
        Change::Write(offset, data) => {
            let end = *offset as usize + data.len();
            if content.len() < end {
                content.resize(end, 0);
            }
            content[*offset as usize..end].copy_from_slice(data);
        }
    }
}

impl Disk {
    fn with<T>(&self, act: impl FnOnce(&mut Platter) -> T) -> T {
        act(&mut self.0.lock().unwrap())
    }

    /// The disk after the power came back: what was synced, and of the rest whatever happened to reach it,
    /// perhaps half of a write.
    fn after_power_failure(&self, rng: &mut StdRng) -> Disk {
        self.with(|platter| {
            let mut content = platter.synced.clone();
            for change in &platter.unsynced {
                match (rng.random_range(0..3), change) {
                    (0, _) => {}
                    (1, Change::Write(offset, data)) => {
                        let torn = rng.random_range(0..=data.len() / 512) * 512;
                        apply(&mut content, &Change::Write(*offset, data[..torn.min(data.len())].to_vec()));
                    }
                    _ => apply(&mut content, change),
                }
            }
            // A length that was not synced may be any between the two; writes have extended it already.
            Disk(Arc::new(Mutex::new(Platter { synced: content.clone(), content, ..Platter::default() })))
        })
    }

    fn copy(&self) -> Disk {
        self.with(|platter| {
            assert!(platter.unsynced.is_empty());
            let content = platter.content.clone();
            Disk(Arc::new(Mutex::new(Platter { synced: content.clone(), content, ..Platter::default() })))
        })
    }
}

impl Platter {
    fn change(&mut self, change: Change) -> io::Result<()> {
        self.operate()?;
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        apply(&mut self.content, &change);
        self.unsynced.push(change);
        Ok(())
    }

    fn operate(&mut self) -> io::Result<()> {
        self.operations += 1;
        match self.cut_at {
            Some(cut_at) if self.operations > cut_at => Err(io::Error::other("power failure")),
            _ => Ok(()),
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.with(|platter| Ok(platter.content.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|platter| {
            let from = offset as usize;
            let data = platter.content.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(data);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|platter| platter.change(Change::Length(len)))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|platter| {
            platter.operate()?;
            platter.synced = platter.content.clone();
            platter.unsynced.clear();
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|platter| platter.change(Change::Write(offset, data.to_vec())))
    }
}

fn open(disk: &Disk) -> Store {
    let disk = disk.clone();
    Store::open(Embedded::on(move || Ok(disk.clone())).unwrap(), EVENT_BYTES).unwrap()
}

fn secrets() -> &'static Kind {
    Kind::by_plural("", "v1", "secrets").unwrap()
}

/// Objects by name: the number in them.
type State = BTreeMap<String, u64>;

fn state(store: &Store) -> State {
    let objects = store.snapshot(secrets()).objects;
    objects.values().map(|o| (o.name().to_owned(), o.value()["data"]["n"].as_u64().unwrap())).collect()
}

/// The transaction numbered `n`: some objects written, now and then one deleted.
fn transaction(n: u64, state: &mut State) -> Vec<Op> {
    let mut ops = Vec::new();
    for m in 0..1 + n % 3 {
        let name = format!("s{}", (n * 7 + m) % 11);
        let value = json!({"metadata": {"name": name, "namespace": "d"}, "data": {"n": n, "filler": "x".repeat(700)}});
        ops.push(Op::Put { draft: Draft::new(secrets(), &value).unwrap(), expect: Expect::Any });
        state.insert(name, n);
    }
    if n % 4 == 3 {
        let name = format!("s{}", n % 11);
        ops.push(Op::Delete { kind: secrets(), key: Key::new("d", &name), expect: Expect::Any });
        state.remove(&name);
    }
    ops
}

const TRANSACTIONS: u64 = 12;

#[tokio::test]
async fn a_power_failure_loses_nothing_that_was_acknowledged() {
    let new = Disk::default();
    open(&new).close().await;
    let mut rng = StdRng::seed_from_u64(1);
    for cut_at in 0.. {
        let disk = new.copy();
        let store = open(&disk);
        let opened = disk.with(|platter| platter.operations);
        disk.with(|platter| platter.cut_at = Some(opened + cut_at));
        // What was acknowledged, and what was under way when the power failed.
        let (mut acknowledged, mut revision) = (state(&store), store.revision());
        let mut under_way = None;
        for n in 0..TRANSACTIONS {
            let mut next = acknowledged.clone();
            let ops = transaction(n, &mut next);
            if store.commit(ops).await.is_err() {
                under_way = Some(next);
                break;
            }
            (acknowledged, revision) = (next, store.revision());
        }
        let finished = under_way.is_none();
        assert_eq!(state(&store), acknowledged, "memory shows what was acknowledged, cut at {cut_at}");
        for _ in 0..3 {
            let later = open(&disk.after_power_failure(&mut rng));
            let found = state(&later);
            assert!(
                found == acknowledged || Some(&found) == under_way.as_ref(),
                "cut at {cut_at}: found {found:?}, acknowledged {acknowledged:?}, under way {under_way:?}"
            );
            assert!(later.revision() >= revision, "revisions never go back");
            // And it can be written.
            later.commit(transaction(99, &mut State::new())).await.unwrap();
        }
        if finished {
            assert!(cut_at > 20, "the disk was written");
            break;
        }
    }
}

#[tokio::test]
async fn a_full_disk_is_survived_without_a_restart() {
    let disk = Disk::default();
    let store = open(&disk);
    let mut expected = State::new();
    store.commit(transaction(1, &mut expected)).await.unwrap();
    for round in 2..6 {
        let revision = store.revision();
        disk.with(|platter| platter.full = true);
        for _ in 0..2 {
            let error = store.commit(transaction(round, &mut State::new())).await.unwrap_err();
            assert!(matches!(error, Error::Full), "{error}");
        }
        assert_eq!((state(&store), store.revision()), (expected.clone(), revision));
        disk.with(|platter| platter.full = false);
        store.commit(transaction(round, &mut expected)).await.unwrap();
        assert_eq!(state(&store), expected);
    }
    store.close().await;
    assert_eq!(state(&open(&disk)), expected);
}

#[tokio::test]
async fn a_failing_disk_stops_writes_and_not_reads() {
    let disk = Disk::default();
    let store = open(&disk);
    let mut expected = State::new();
    store.commit(transaction(1, &mut expected)).await.unwrap();
    assert!(store.is_writable());
    disk.with(|platter| platter.cut_at = Some(platter.operations));
    for n in 2..4 {
        let error = store.commit(transaction(n, &mut State::new())).await.unwrap_err();
        assert!(matches!(error, Error::Broken(_)), "{error}");
    }
    assert!(!store.is_writable());
    assert_eq!(state(&store), expected);
}

/// A small device of its own, unmounted in the end.
struct SmallDevice(tempfile::TempDir);

impl SmallDevice {
    fn mount() -> Option<SmallDevice> {
        let directory = tempfile::tempdir().unwrap();
        let mount = |device: &SmallDevice| {
            let mut command = std::process::Command::new("mount");
            command.args(["-t", "tmpfs", "-o", "size=6m,mode=700", "minke-store-test"]).arg(device.0.path());
            command.stderr(std::process::Stdio::null()).status().is_ok_and(|status| status.success())
        };
        let device = SmallDevice(directory);
        mount(&device).then_some(device)
    }
}

impl Drop for SmallDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg(self.0.path())
            .stderr(std::process::Stdio::null())
            .status();
    }
}

#[tokio::test]
async fn a_full_device_can_be_emptied() {
    let Some(device) = SmallDevice::mount() else {
        println!("skipped: mounting a tmpfs needs root");
        return;
    };
    let path = device.0.path().join("store.redb");
    let open = || Store::open(Embedded::open(&path).unwrap(), EVENT_BYTES).unwrap();
    let store = open();
    let put = |n: u32| {
        let filler = "x".repeat(100_000);
        let value = json!({"metadata": {"name": format!("s{n:03}"), "namespace": "d"}, "data": {"n": n, "filler": filler}});
        store.commit(vec![Op::create(Draft::new(secrets(), &value).unwrap())])
    };
    let mut made = 0;
    while put(made).await.is_ok() {
        made += 1;
    }
    assert!((5..60).contains(&made), "{made} objects fill the device");
    assert!(matches!(put(made).await, Err(Error::Full)));
    // What is given for deleting is not there for creating, however often both are tried.
    for _ in 0..3 {
        let oldest = store.snapshot(secrets()).objects.values().next().cloned().unwrap();
        store.commit(vec![Op::delete(&oldest)]).await.unwrap();
        while put(made).await.is_ok() {
            made += 1;
        }
        assert!(made < 70, "{made} objects fit where fewer did");
    }
    let objects: Vec<_> = store.snapshot(secrets()).objects.values().cloned().collect();
    for object in &objects {
        // Marked, then deleted, as what has finalizers is.
        let mut value = object.value();
        value["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        let marked =
            store.commit(vec![Op::replace(Draft::new(secrets(), &value).unwrap(), object)]).await.unwrap();
        store.commit(vec![Op::delete(&marked[0])]).await.unwrap();
    }
    put(made).await.expect("there is room again");
    store.close().await;
    assert_eq!(state(&open()).into_keys().collect::<Vec<_>>(), [format!("s{made:03}")]);
}
