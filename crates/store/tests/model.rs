//! The store against a model: a BTreeMap for each revision there has been.

use std::collections::BTreeMap;
use std::sync::Arc;

use minke_api::{Draft, Key, Kind, Object, Revision};
use minke_store::{Change, EVENT_BYTES, Embedded, Error, Expect, Memory, Op, Store};
use proptest::prelude::*;
use serde_json::{Value, json};

fn kinds() -> [&'static Kind; 2] {
    ["configmaps", "secrets"].map(|plural| Kind::by_plural("", "v1", plural).unwrap())
}

type State = BTreeMap<(usize, u8), (u64, u32)>;

/// What is expected of an object, before it is known which revisions there are.
#[derive(Debug, Clone)]
enum Guess {
    Absent,
    Any,
    Right,
    Wrong,
}

#[derive(Debug, Clone)]
struct Step {
    kind: usize,
    name: u8,
    /// `None` deletes.
    value: Option<u32>,
    guess: Guess,
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let guess = prop_oneof![Just(Guess::Absent), Just(Guess::Any), Just(Guess::Right), Just(Guess::Wrong)];
    let step = (0..2usize, 0..6u8, proptest::option::weighted(0.7, any::<u32>()), guess)
        .prop_map(|(kind, name, value, guess)| Step { kind, name, value, guess });
    proptest::collection::vec(proptest::collection::vec(step, 1..4), 1..40)
}

fn draft(kind: &'static Kind, name: u8, value: u32) -> Draft {
    let value =
        json!({"metadata": {"name": format!("n{name}"), "namespace": "d"}, "data": {"v": value.to_string()}});
    Draft::new(kind, &value).unwrap()
}

fn key(name: u8) -> Key {
    Key::new("d", &format!("n{name}"))
}

fn content(object: &Object) -> (u64, u32) {
    let value: Value = object.value();
    (object.revision().0, value["data"]["v"].as_str().unwrap().parse().unwrap())
}

fn shown(store: &Store, at: Option<u64>) -> Result<State, Error> {
    let mut state = State::new();
    for (n, kind) in kinds().into_iter().enumerate() {
        let snapshot = match at {
            None => store.snapshot(kind),
            Some(revision) => store.snapshot_at(kind, Revision(revision))?,
        };
        for (key, object) in &snapshot.objects {
            state.insert((n, key.name[1..].parse().unwrap()), content(object));
        }
    }
    Ok(state)
}

/// Does the steps on the store and the model; returns the model's states by revision.
async fn run(store: &Store, transactions: &[Vec<Step>]) -> BTreeMap<u64, State> {
    let mut revision = store.revision().0;
    let mut model = shown(store, None).unwrap();
    let mut history = BTreeMap::from([(revision, model.clone())]);
    for transaction in transactions {
        let mut next = (revision, model.clone());
        let mut ops = Vec::new();
        let mut expected = Ok(Vec::new());
        for (n, step) in transaction.iter().enumerate() {
            let place = (step.kind, step.name);
            let current = next.1.get(&place).copied();
            let expect = match step.guess {
                Guess::Absent => Expect::Absent,
                Guess::Any => Expect::Any,
                Guess::Right => {
                    current.map_or(Expect::Absent, |(revision, _)| Expect::Revision(Revision(revision)))
                }
                Guess::Wrong => Expect::Revision(Revision(current.map_or(7, |(revision, _)| revision - 1))),
            };
            let holds = match expect {
                Expect::Any => true,
                Expect::Absent => current.is_none() && step.value.is_some(),
                Expect::Revision(wanted) => current.is_some_and(|(revision, _)| revision == wanted.0),
            };
            ops.push(match step.value {
                Some(value) => Op::Put { draft: draft(kinds()[step.kind], step.name, value), expect },
                None => Op::Delete { kind: kinds()[step.kind], key: key(step.name), expect },
            });
            if !holds {
                expected = expected.and(Err(n));
            }
            let Ok(results) = &mut expected else { continue };
            match step.value {
                Some(value) => {
                    next.0 += 1;
                    next.1.insert(place, (next.0, value));
                    results.push(next.0);
                }
                None if current.is_some() => {
                    next.0 += 1;
                    next.1.remove(&place);
                    results.push(next.0);
                }
                None => {}
            }
        }
        match (store.commit(ops).await, expected) {
            (Ok(written), Ok(results)) => {
                let written: Vec<u64> = written.iter().map(|object| object.revision().0).collect();
                assert_eq!(written, results);
                (revision, model) = next;
                history.insert(revision, model.clone());
            }
            (Err(Error::Conflict { op, .. }), Err(wanted)) => assert_eq!(op, wanted),
            (got, wanted) => panic!("{got:?} instead of {wanted:?}"),
        }
        assert_eq!(shown(store, None).unwrap(), model);
        assert_eq!(store.revision().0, revision);
    }
    history
}

/// Applies what a watch from `from` tells to the state there was.
fn watched(store: &Store, from: u64, mut state: State) -> State {
    for (n, kind) in kinds().into_iter().enumerate() {
        let mut watch = store.watch(kind, Revision(from)).unwrap();
        let mut last = from;
        loop {
            let events = watch.ready().unwrap();
            if events.is_empty() {
                break;
            }
            for event in events {
                assert!(event.revision().0 > last, "events come in order");
                last = event.revision().0;
                let place = (n, event.object.name()[1..].parse().unwrap());
                let old = event.old.as_deref().map(content);
                assert_eq!(state.get(&place).copied(), old);
                assert_eq!(event.change == Change::Added, old.is_none());
                match event.change {
                    Change::Deleted => state.remove(&place),
                    _ => state.insert(place, content(&event.object)),
                };
            }
        }
        assert_eq!(watch.caught_up(), Some(store.revision()));
    }
    state
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn behaves_as_a_map_with_history(first in steps(), second in steps()) {
        block_on(async {
            let memory = Memory::default();
            let store = Store::open(memory.clone(), EVENT_BYTES).unwrap();
            let history = run(&store, &first).await;
            let (last, state) = history.last_key_value().unwrap();
            for (revision, then) in &history {
                assert_eq!(&shown(&store, Some(*revision)).unwrap(), then);
                assert_eq!(&watched(&store, *revision, then.clone()), state);
            }
            store.close().await;
            assert!(matches!(store.commit(Vec::new()).await, Err(Error::Closed)));

            // Another store on what the first one left goes on where it was.
            let store = Store::open(memory, EVENT_BYTES).unwrap();
            assert_eq!(store.revision(), Revision(*last));
            assert_eq!(&shown(&store, None).unwrap(), state);
            let history = run(&store, &second).await;
            for (revision, then) in &history {
                assert_eq!(&shown(&store, Some(*revision)).unwrap(), then);
            }
            // What happened before it was opened is not known any more.
            let gone = store.watch(kinds()[0], Revision(*last - 1));
            assert!(matches!(gone.err(), Some(Error::Compacted { .. })));
        });
    }
}

#[tokio::test]
async fn the_file_holds_everything_and_only_one_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let open = || Store::open(Embedded::open(&path).unwrap(), EVENT_BYTES).unwrap();
    let store = open();
    let error = Embedded::open(&path).err().unwrap();
    assert!(error.to_string().ends_with("store.redb is in use by another server"), "{error}");
    let [kind, _] = kinds();
    store.commit(vec![Op::create(draft(kind, 1, 1)), Op::create(draft(kind, 2, 2))]).await.unwrap();
    let last = store.get(kind, &key(2)).unwrap();
    store.commit(vec![Op::delete(&last)]).await.unwrap();
    let (state, revision) = (shown(&store, None).unwrap(), store.revision());
    store.close().await;
    let store = open();
    assert_eq!(shown(&store, None).unwrap(), state);
    // The newest write was a deletion; its revision is not given out again.
    assert_eq!(store.revision(), revision);
    let written = store.commit(vec![Op::create(draft(kind, 3, 3))]).await.unwrap();
    assert_eq!(written[0].revision().0, revision.0 + 1);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_full_device_refuses_writes_and_nothing_else() {
    let memory = Memory::default();
    let store = Store::open(memory.clone(), EVENT_BYTES).unwrap();
    let [kind, _] = kinds();
    store.commit(vec![Op::create(draft(kind, 1, 1))]).await.unwrap();
    let before = store.revision();
    memory.set_full(true);
    assert!(matches!(store.commit(vec![Op::create(draft(kind, 2, 2))]).await, Err(Error::Full)));
    assert_eq!(store.revision(), before);
    assert!(store.get(kind, &key(1)).is_some() && store.get(kind, &key(2)).is_none());
    memory.set_full(false);
    store.commit(vec![Op::create(draft(kind, 2, 2))]).await.unwrap();
}

#[tokio::test]
async fn old_events_make_room_and_slow_watchers_are_told() {
    let store = Store::open(Memory::default(), 20_000).unwrap();
    let [busy, quiet] = kinds();
    store.commit(vec![Op::create(draft(quiet, 1, 1))]).await.unwrap();
    let (start, quiet_start) = (store.revision(), Revision(store.revision().0 - 1));
    let mut slow = store.watch(busy, start).unwrap();
    let mut idle = store.watch(quiet, store.revision()).unwrap();
    for n in 0..100 {
        store.commit(vec![Op::Put { draft: draft(busy, 1, n), expect: Expect::Any }]).await.unwrap();
    }
    assert!(matches!(slow.next().await, Err(Error::Compacted { .. })));
    assert!(matches!(store.snapshot_at(busy, start), Err(Error::Compacted { .. })));
    assert!(matches!(store.watch(quiet, quiet_start).err(), Some(Error::Compacted { .. })));
    // The writes of one kind take nothing from a watcher of another that has seen all there was.
    assert!(idle.ready().unwrap().is_empty());
    assert_eq!(idle.caught_up(), Some(store.revision()));
    store.commit(vec![Op::create(draft(quiet, 2, 2))]).await.unwrap();
    assert_eq!(idle.next().await.unwrap()[0].object.key(), &key(2));
}

#[tokio::test]
async fn a_node_is_told_of_its_own_pods_and_of_no_others() {
    let pods = Kind::by_plural("", "v1", "pods").unwrap();
    let pod = |name: &str, node: &str| {
        let value = json!({"metadata": {"name": name, "namespace": "a"}, "spec": {"nodeName": node}});
        Op::Put { draft: Draft::new(pods, &value).unwrap(), expect: Expect::Any }
    };
    let told = |events: Vec<Arc<minke_store::Event>>| -> Vec<String> {
        events.iter().map(|event| event.object.name().to_owned()).collect()
    };
    let store = Store::open(Memory::default(), 20_000).unwrap();
    let start = store.revision();
    store.commit(vec![pod("one", "n1"), pod("two", "n2"), pod("three", "")]).await.unwrap();
    let mut late = store.watch_node(pods, start, "n1").unwrap();
    assert_eq!(told(late.next().await.unwrap()), ["one"], "what is in the ring already is told as well");
    let (_, mut n1) = store.snapshot_and_watch_node(pods, Some("n1"));
    let mut n2 = store.watch_node(pods, store.revision(), "n2").unwrap();
    store.commit(vec![pod("three", "n1"), pod("two", "n1")]).await.unwrap();
    assert_eq!(told(n1.next().await.unwrap()), ["three", "two"]);
    assert_eq!(told(n2.next().await.unwrap()), ["two"], "who leaves is told of where it was");
    assert_eq!(n2.caught_up(), Some(store.revision()));
    // Others' pods come and go until the ring has forgotten everything: nobody loses a place by that.
    for _ in 0..200 {
        store.commit(vec![pod("other", "n3")]).await.unwrap();
    }
    assert!(matches!(store.watch_node(pods, start, "n1").err(), Some(Error::Compacted { .. })));
    assert!(n1.ready().unwrap().is_empty() && n2.ready().unwrap().is_empty());
    store.commit(vec![pod("four", "n2")]).await.unwrap();
    assert_eq!(told(n2.next().await.unwrap()), ["four"]);
    // But one that does not read while its own pods change does.
    for _ in 0..400 {
        store.commit(vec![pod("four", "n2")]).await.unwrap();
    }
    assert!(matches!(n2.next().await, Err(Error::Compacted { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_writers_wins_each_round() {
    let store = Store::in_memory();
    let [kind, _] = kinds();
    store.commit(vec![Op::create(draft(kind, 1, 0))]).await.unwrap();
    let writers = (0..8).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut won = 0;
            while won < 50 {
                let old = store.get(kind, &key(1)).unwrap();
                let (_, count) = content(&old);
                match store.commit(vec![Op::replace(draft(kind, 1, count + 1), &old)]).await {
                    Ok(_) => won += 1,
                    Err(Error::Conflict { current: Some(_), .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(content(&store.get(kind, &key(1)).unwrap()).1, 400);
}

#[tokio::test]
async fn frames_are_made_once_and_tell_what_left_a_selection() {
    let store = Store::in_memory();
    let [kind, _] = kinds();
    let mut watch = store.watch(kind, store.revision()).unwrap();
    store.commit(vec![Op::create(draft(kind, 1, 1))]).await.unwrap();
    store.commit(vec![Op::Put { draft: draft(kind, 1, 2), expect: Expect::Any }]).await.unwrap();
    let events: Vec<Arc<minke_store::Event>> = watch.next().await.unwrap();
    let line = |event: usize, seen| -> Value { serde_json::from_slice(&events[event].frame(seen)).unwrap() };
    assert_eq!(events[0].frame(Change::Added).as_ptr(), events[0].frame(Change::Added).as_ptr());
    assert_eq!(line(0, Change::Added)["type"], "ADDED");
    assert_eq!(line(1, Change::Modified)["object"]["data"]["v"], "2");
    let left = line(1, Change::Deleted);
    assert_eq!(left["object"]["data"]["v"], "1");
    assert_eq!(left["object"]["metadata"]["resourceVersion"], events[1].revision().to_string());
}
