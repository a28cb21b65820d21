//! Disruption budgets under many who evict at once, on the real registry.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use minke_api::{FieldSelector, Kind, LabelSelector, Object};
use minke_client::{ListOptions, Target, WatchEvent, WatchOptions};
use serde_json::json;
use tokio_util::sync::CancellationToken;

#[path = "common/registry.rs"]
mod registry;
use registry::Cluster;

const EVICTORS: usize = 16;
const EVICTIONS: usize = 24;
const REPLICAS: usize = 6;
const AVAILABLE: usize = 4;

fn serves(pod: &Object) -> bool {
    let Ok(view) = pod.view::<Pod>() else { return false };
    let mut conditions = view.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.deleted().is_none()
        && conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Evicts any of the pods, again and again, until told to stop; whatever is refused must be so for the budget.
async fn evict_often(c: Arc<Cluster>, n: usize, stop: CancellationToken) {
    let mut round = n;
    while !stop.is_cancelled() {
        let pods = c.list::<Pod>("default").await;
        let name = pods[round % pods.len()].metadata.name.clone().unwrap();
        round += 1;
        let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}});
        let pod = Target::object(Kind::of::<Pod>(), "default", &name);
        match c.admin.post(pod.sub("eviction"), eviction).await {
            Err(error) if !error.is_not_found() => assert_eq!(error.code, 429, "{error}"),
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_budget_is_overdrawn_by_many_evictors() {
    let c = Arc::new(Cluster::start().await);
    c.create(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": REPLICAS,
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "terminationGracePeriodSeconds": 1, "containers": [{ "name": "c", "image": "web" }] },
            },
        },
    }))
    .await;
    c.create(
        json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "web" },
        "spec": { "minAvailable": AVAILABLE, "selector": { "matchLabels": { "app": "web" } } } }),
    )
    .await;
    c.until("the budget knows its pods", || async {
        let budget = c.get::<PodDisruptionBudget>("default", "web").await.and_then(|budget| budget.status);
        budget.is_some_and(|status| status.disruptions_allowed == Some((REPLICAS - AVAILABLE) as i32))
    })
    .await;

    let pods = Kind::of::<Pod>();
    let labels = LabelSelector::from_pairs(BTreeMap::from([("app".to_owned(), "web".to_owned())]));
    let options = ListOptions { labels: labels.clone(), ..ListOptions::default() };
    let list = c.admin.list(pods, "default", options).await.unwrap();
    let options = WatchOptions { from: list.revision, labels, fields: FieldSelector::default() };
    let mut changes = c.admin.watch(pods, "default", options).await.unwrap();
    let stop = CancellationToken::new();
    let evictors: Vec<_> =
        (0..EVICTORS).map(|n| tokio::spawn(evict_often(c.clone(), n, stop.clone()))).collect();

    // At no revision do fewer serve than must.
    let mut serving: BTreeMap<String, bool> =
        list.items.iter().map(|pod| (pod.uid().to_owned(), serves(pod))).collect();
    let mut gone = 0;
    while gone < EVICTIONS {
        let change = tokio::time::timeout(Duration::from_secs(60), changes.next()).await;
        match change.expect("evictions go on").expect("the watch goes on").unwrap() {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                serving.insert(pod.uid().to_owned(), serves(&pod));
            }
            WatchEvent::Deleted(pod) => {
                serving.remove(pod.uid());
                gone += 1;
            }
            WatchEvent::Bookmark(_) => {}
        }
        let now = serving.values().filter(|serves| **serves).count();
        assert!(now >= AVAILABLE, "{now} serve after {gone} are gone");
    }
    stop.cancel();
    for evictor in evictors {
        evictor.await.unwrap();
    }
}
