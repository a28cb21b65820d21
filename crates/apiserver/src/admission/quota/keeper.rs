//! Counts what a namespace uses, for quotas that are new or changed, and when pods are given up.
//!
//! A count is of one moment: the quota is read first, and what was counted is written only if nobody charged
//! anything to it meanwhile. Upstream: pkg/controller/resourcequota.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use minke_api::{Draft, Key, Kind, Object};
use minke_client::Clock;
use minke_store::{Change, Error, Op, Store};
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::quotas;
use super::usage::{given_up_at, is_about, usage, user_of};
use crate::kinds::resources::{Amounts, amounts};
use crate::kinds::tree::Tree;

/// How long to wait before a count that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Keeps counts true until `stop`.
pub async fn run(store: Store, clock: Clock, stop: CancellationToken) {
    let pods = Kind::of::<Pod>();
    loop {
        let (found, mut quota_events) = store.snapshot_and_watch(quotas());
        let (all_pods, mut pod_events) = store.snapshot_and_watch(pods);
        let mut given_up = BTreeSet::new();
        all_pods.objects.values().for_each(|pod| note(pod, &mut given_up));
        // What was charged before a crash is in the counts; pods may have been given up since.
        let mut due: BTreeSet<Key> = found.objects.keys().cloned().collect();
        loop {
            let now = clock.now();
            let mut failed = BTreeSet::new();
            while let Some(key) = due.pop_first() {
                if let Err(error) = count(&store, &key, now).await {
                    tracing::warn!(quota = %key, %error, "Cannot write the count of a quota");
                    failed.insert(key);
                }
            }
            let next = given_up.first().map(|(at, _): &(Timestamp, Key)| until(*at, now));
            let next = [next, (!failed.is_empty()).then_some(RETRY)].into_iter().flatten().min();
            due = failed;
            let sleep = async {
                match next {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                events = quota_events.next() => match events {
                    Ok(events) => {
                        let stale = |event: &&std::sync::Arc<minke_store::Event>| {
                            event.change != Change::Deleted && is_stale(&event.object.value())
                        };
                        due.extend(events.iter().filter(stale).map(|event| event.object.key().clone()));
                    }
                    Err(Error::Compacted { .. }) => break,
                    Err(_) => return,
                },
                events = pod_events.next() => match events {
                    Ok(events) => {
                        let marked = events.iter().filter(|event| event.change == Change::Modified);
                        marked.for_each(|event| note(&event.object, &mut given_up));
                    }
                    Err(Error::Compacted { .. }) => break,
                    Err(_) => return,
                },
                () = sleep => {
                    let now = clock.now();
                    while let Some((at, key)) = given_up.pop_first() {
                        if at >= now {
                            given_up.insert((at, key));
                            break;
                        }
                        if store.get(pods, &key).is_none() {
                            continue;
                        }
                        let quotas = store.snapshot(quotas());
                        due.extend(quotas.in_namespace(&key.namespace).map(|quota| quota.key().clone()));
                    }
                }
            }
        }
    }
}

/// Notes when a pod that is to go will be given up, should it still be there.
fn note(pod: &Object, given_up: &mut BTreeSet<(Timestamp, Key)>) {
    if pod.deleted().is_some()
        && let Some(at) = given_up_at(&pod.value())
    {
        given_up.insert((at, pod.key().clone()));
    }
}

fn until(then: Timestamp, now: Timestamp) -> Duration {
    // A moment later than too early: the pod counts until then.
    Duration::try_from(then.duration_since(now)).unwrap_or_default() + Duration::from_millis(1)
}

/// Whether a quota does not count what it is to count.
pub fn is_stale(quota: &Value) -> bool {
    let (spec, status) = (quota.at("spec"), quota.at("status"));
    let used = status.at("used");
    let uncounted = |(name, _): (&str, &Value)| user_of(name).is_some() && used.get(name).is_none();
    amounts(spec.at("hard")) != amounts(status.at("hard")) || spec.members("hard").any(uncounted)
}

/// Counts, and writes the count if it differs.
async fn count(store: &Store, key: &Key, now: Timestamp) -> Result<(), Error> {
    while let Some(quota) = store.get(quotas(), key) {
        let mut value = quota.value();
        let status = counted(store, &key.namespace, value.at("spec"), now);
        value.set("status", status);
        let draft = Draft::new(quotas(), &value).expect("a quota stays one whatever it counts");
        if draft.same_as(&quota) {
            return Ok(());
        }
        match store.commit(vec![Op::replace(draft, &quota)]).await {
            Ok(_) => return Ok(()),
            // Someone charged it while we counted.
            Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The status of a quota: what it allows, and what is used of that.
fn counted(store: &Store, namespace: &str, spec: &Value, now: Timestamp) -> Value {
    let hard = amounts(spec.at("hard"));
    let mut used: Amounts = Amounts::new();
    let mut kinds: Vec<&'static Kind> = Vec::new();
    for name in hard.keys() {
        let Some(kind) = user_of(name) else { continue };
        used.insert(name.clone(), Default::default());
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    for kind in kinds {
        let snapshot = store.snapshot(kind);
        for object in snapshot.in_namespace(namespace) {
            let value = object.value();
            if !is_about(spec, kind, &value) {
                continue;
            }
            for (name, amount) in usage(kind, &value, now) {
                if let Some(sum) = used.get_mut(&name) {
                    *sum += amount;
                }
            }
        }
    }
    let used: Map<String, Value> =
        used.into_iter().map(|(name, amount)| (name, amount.to_string().into())).collect();
    json!({ "hard": spec.at("hard"), "used": used })
}
