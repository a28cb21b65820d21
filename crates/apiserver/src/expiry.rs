//! Events go an hour after they were last written.
//!
//! Every event lives for the same time, so the next one to go is always the one that was written first:
//! a queue, and one timer for its head. Nothing is searched. Upstream: leases of etcd, `--event-ttl`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use minke_api::{Key, Kind, Object, Revision};
use minke_client::Clock;
use minke_store::{Change, Expect, Op, Store};
use tokio_util::sync::CancellationToken;

/// How long an event is kept.
pub const TTL: Duration = Duration::from_secs(60 * 60);
/// Most events that are deleted at once.
const AT_ONCE: usize = 256;

/// An event as it was last written; a later write makes the entry void.
struct Entry {
    expires: Timestamp,
    key: Key,
    revision: Revision,
}

/// Deletes events `ttl` after they were last written, until `stop`.
pub async fn run(store: Store, clock: Clock, ttl: Duration, stop: CancellationToken) {
    let kind = Kind::of::<Event>();
    loop {
        let (snapshot, mut watch) = store.snapshot_and_watch(kind);
        let mut entries: Vec<Entry> = snapshot.objects.values().map(|object| found(object, ttl)).collect();
        entries.sort_by_key(|entry| entry.expires);
        let mut queue = VecDeque::from(entries);
        loop {
            let wait = queue.front().map(|entry| until(entry.expires, clock.now()));
            let sleep = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                events = watch.next() => match events {
                    Ok(events) => {
                        let expires = clock.now() + ttl;
                        let written = events.iter().filter(|event| event.change != Change::Deleted);
                        queue.extend(written.map(|event| Entry {
                            expires,
                            key: event.object.key().clone(),
                            revision: event.revision(),
                        }));
                    }
                    Err(minke_store::Error::Compacted { .. }) => break,
                    Err(_) => return,
                },
                () = sleep => expire(&store, kind, &mut queue, clock.now()).await,
            }
        }
    }
}

fn until(then: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(now)).unwrap_or_default()
}

/// An event that was there at the start: when it was written last is not known, only when it happened last.
fn found(object: &Arc<Object>, ttl: Duration) -> Entry {
    let value = object.value();
    let time = |path: &str| value.pointer(path)?.as_str()?.parse::<Timestamp>().ok();
    let last =
        [time("/lastTimestamp"), time("/series/lastObservedTime"), time("/eventTime"), object.created()];
    let last = last.into_iter().flatten().max().unwrap_or_default();
    Entry { expires: last + ttl, key: object.key().clone(), revision: object.revision() }
}

/// Deletes what is due at the head of the queue and was not written since.
async fn expire(store: &Store, kind: &'static Kind, queue: &mut VecDeque<Entry>, now: Timestamp) {
    let due = queue.iter().take(AT_ONCE).take_while(|entry| entry.expires <= now).count();
    let deletions = queue.drain(..due).map(|Entry { key, revision, .. }| {
        let op = Op::Delete { kind, key, expect: Expect::Revision(revision) };
        store.commit(vec![op])
    });
    for result in futures_util::future::join_all(deletions).await {
        match result {
            // Written again or deleted since: then another entry is in force.
            Ok(_) | Err(minke_store::Error::Conflict { .. }) => {}
            Err(error) => tracing::warn!(%error, "Cannot delete an expired event"),
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Draft;
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn events_go_some_time_after_they_were_last_written() {
        const TTL: Duration = Duration::from_millis(300);
        let store = Store::in_memory();
        let kind = Kind::of::<Event>();
        let put = async |name: &str, count: u32, time: Timestamp| {
            let before = Timestamp::now();
            let value = json!({"metadata": {"name": name, "namespace": "d"}, "count": count, "lastTimestamp": time.to_string()});
            let op = Op::Put { draft: Draft::new(kind, &value).unwrap(), expect: Expect::Any };
            store.commit(vec![op]).await.unwrap();
            before
        };
        put("old", 1, Timestamp::now() - TTL).await;
        let mut watch = store.watch(kind, store.revision()).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(store.clone(), Clock::System, TTL, stop.clone()));
        // Waits for as many deletions; says what went when.
        let mut deletions = async |count: usize| {
            let mut gone = Vec::new();
            while gone.len() < count {
                let events = watch.next().await.unwrap();
                let deleted = events.iter().filter(|event| event.change == Change::Deleted);
                gone.extend(deleted.map(|event| (event.object.name().to_owned(), Timestamp::now())));
            }
            gone
        };
        // What had happened long before the start goes at once.
        assert_eq!(deletions(1).await[0].0, "old");
        put("b", 1, Timestamp::now()).await;
        let a = put("a", 1, Timestamp::now()).await;
        tokio::time::sleep(TTL / 3).await;
        let b = put("b", 2, Timestamp::now()).await;
        let gone = deletions(2).await;
        assert_eq!([&*gone[0].0, &*gone[1].0], ["a", "b"], "the second write of b counts");
        assert!(gone[0].1 >= a + TTL && gone[1].1 >= b + TTL, "{gone:?}, {a}, {b}");
        stop.cancel();
        task.await.unwrap();
    }
}
