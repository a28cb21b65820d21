//! Quotas on a whole API server.

use std::sync::Arc;
use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::*;
use crate::testing::Api;

const QUOTAS: &str = "/api/v1/namespaces/default/resourcequotas";
const PODS: &str = "/api/v1/namespaces/default/pods";

async fn api() -> (Api, tokio_util::sync::DropGuard) {
    let api = Api::new().await;
    let account = json!({"metadata": {"name": "default"}});
    api.json("POST /api/v1/namespaces/default/serviceaccounts", account).await.ok();
    let stop = tokio_util::sync::CancellationToken::new();
    let clock = minke_client::Clock::System;
    tokio::spawn(keeper::run(api.store.clone(), clock, stop.clone()));
    (api, stop.drop_guard())
}

/// Creates a quota and waits until it counts; returns what is used.
async fn quota(api: &Api, name: &str, spec: Value) -> Value {
    let path = format!("POST {QUOTAS}");
    api.json(&path, json!({"metadata": {"name": name}, "spec": spec})).await.ok();
    settled(api, name).await
}

/// What is used, once the quota counts what it is to count.
async fn settled(api: &Api, name: &str) -> Value {
    let counts = async {
        loop {
            let mut watch = api.store.watch(quotas(), api.store.revision()).unwrap();
            let quota = api.get(&format!("{QUOTAS}/{name}")).await.ok();
            if quota["status"]["hard"] == quota["spec"]["hard"] && quota["status"].get("used").is_some() {
                return quota["status"]["used"].clone();
            }
            watch.next().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), counts).await.expect("the quota is counted")
}

fn pod(name: &str, cpu: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {
        "containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}],
        "automountServiceAccountToken": false,
    }})
}

async fn create(api: &Api, path: &str, object: Value) -> Result<(), String> {
    let answer = api.json(&format!("POST {path}"), object).await;
    if answer.code == 201 { Ok(()) } else { Err(answer.error().2) }
}

#[tokio::test]
async fn a_quota_refuses_what_exceeds_it() {
    let (api, _stop) = api().await;
    let hard = json!({"cpu": "1", "pods": "2", "count/deployments.apps": "0", "services.nodeports": "1"});
    assert_eq!(
        quota(&api, "q", json!({ "hard": hard })).await,
        json!({"cpu": "0", "pods": "0", "count/deployments.apps": "0", "services.nodeports": "0"})
    );
    create(&api, PODS, pod("a", "600m")).await.unwrap();
    assert_eq!(
        create(&api, PODS, pod("b", "500m")).await.unwrap_err(),
        "pods \"b\" is forbidden: exceeded quota: q, requested: cpu=500m, used: cpu=600m, limited: cpu=1"
    );
    let silent = json!({"metadata": {"name": "s"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    assert_eq!(
        create(&api, PODS, silent).await.unwrap_err(),
        "pods \"s\" is forbidden: failed quota: q: must specify cpu for: c"
    );
    create(&api, PODS, pod("b", "400m")).await.unwrap();
    assert_eq!(
        create(&api, PODS, pod("c", "1m")).await.unwrap_err(),
        "pods \"c\" is forbidden: exceeded quota: q, requested: cpu=1m,pods=1, used: cpu=1,pods=2, limited: cpu=1,pods=2"
    );
    let labels = json!({"app": "w"});
    let deployment = json!({"metadata": {"name": "w"}, "spec": {"selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
    assert_eq!(
        create(&api, "/apis/apps/v1/namespaces/default/deployments", deployment).await.unwrap_err(),
        "deployments.apps \"w\" is forbidden: exceeded quota: q, requested: count/deployments.apps=1, used: count/deployments.apps=0, limited: count/deployments.apps=0"
    );
    // A service that comes to need more is asked about, too.
    let services = "/api/v1/namespaces/default/services";
    let service = json!({"metadata": {"name": "w"}, "spec": {"ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]}});
    create(&api, services, service).await.unwrap();
    let more = json!({"spec": {"type": "NodePort"}});
    let answer = api.json(&format!("PATCH {services}/w"), more).await.error().2;
    assert!(
        answer.ends_with(
            "requested: services.nodeports=2, used: services.nodeports=0, limited: services.nodeports=1"
        ),
        "{answer}"
    );
    // What ends, and what goes, is given back at once.
    api.json(&format!("PATCH {PODS}/a/status"), json!({"status": {"phase": "Succeeded"}})).await.ok();
    assert_eq!(settled(&api, "q").await["cpu"], "400m");
    api.send(&format!("DELETE {PODS}/a"), &[], "").await.ok();
    api.send(&format!("DELETE {PODS}/b"), &[], "").await.ok();
    assert_eq!(settled(&api, "q").await["pods"], "0");
    // A dry run is judged and changes nothing.
    let dry = api.json(&format!("POST {PODS}?dryRun=All"), pod("d", "2")).await.error().2;
    assert!(dry.contains("exceeded quota: q, requested: cpu=2"), "{dry}");
    let dry = api.json(&format!("POST {PODS}?dryRun=All"), pod("d", "1")).await.ok();
    assert_eq!(dry["metadata"].get("resourceVersion"), None);
    assert_eq!(settled(&api, "q").await["cpu"], "0");
}

#[tokio::test]
async fn a_changed_quota_counts_anew() {
    let (api, _stop) = api().await;
    create(&api, PODS, pod("a", "1")).await.unwrap();
    let secret = json!({"metadata": {"name": "s"}});
    create(&api, "/api/v1/namespaces/default/secrets", secret).await.unwrap();
    assert_eq!(quota(&api, "q", json!({"hard": {"pods": 3}})).await, json!({"pods": "1"}));
    let change = json!({"spec": {"hard": {"secrets": "9", "pods": null, "fish.io/x": "1"}}});
    api.json(&format!("PATCH {QUOTAS}/q"), change).await.ok();
    assert_eq!(settled(&api, "q").await, json!({"secrets": "1"}), "nothing uses fish");
    let forged = json!({"status": {"hard": {"secrets": "1000"}}});
    api.json(&format!("PATCH {QUOTAS}/q/status"), forged).await.ok();
    settled(&api, "q").await;
}

#[tokio::test]
async fn a_write_that_a_new_quota_did_not_see_makes_it_count_anew() {
    let (api, _stop) = api().await;
    // What the write knew: no quota at all.
    let before = Charges { matters: true, ..Charges::default() };
    quota(&api, "q", json!({"hard": {"secrets": "5"}})).await;
    let missed = before.missed(&api.store, "default");
    assert_eq!(missed.len(), 1);
    let forged = json!({"status": {"used": {"secrets": "4"}}});
    api.json(&format!("PATCH {QUOTAS}/q/status"), forged).await.ok();
    api.store.commit(missed).await.unwrap();
    assert_eq!(settled(&api, "q").await["secrets"], "0");
}

#[tokio::test]
async fn writes_that_use_nothing_leave_quotas_alone() {
    let (api, _stop) = api().await;
    quota(&api, "q", json!({"hard": {"pods": "1"}})).await;
    create(&api, PODS, pod("a", "1")).await.unwrap();
    let at = api.get(&format!("{QUOTAS}/q")).await.ok();
    let maps = "/api/v1/namespaces/default/configmaps";
    create(&api, maps, json!({"metadata": {"name": "m"}})).await.unwrap();
    api.json(&format!("PATCH {maps}/m"), json!({"data": {"a": "b"}})).await.ok();
    api.send(&format!("DELETE {maps}/m"), &[], "").await.ok();
    api.json(&format!("PATCH {PODS}/a"), json!({"metadata": {"labels": {"a": "b"}}})).await.ok();
    api.json(&format!("PATCH {PODS}/a/status"), json!({"status": {"phase": "Running"}})).await.ok();
    assert_eq!(api.get(&format!("{QUOTAS}/q")).await.ok(), at);
    assert!(create(&api, PODS, pod("b", "1")).await.is_err());
}

/// 64 creators, who also delete and finish pods, in a namespace with two quotas; at no revision is more used
/// than allowed, or is the count another than that of the pods that were there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_quota_is_exceeded_by_64_creators() {
    const CREATORS: u64 = 64;
    const LIMIT: i64 = 20;
    let (api, _stop) = api().await;
    quota(&api, "pods", json!({"hard": {"pods": LIMIT}})).await;
    quota(&api, "cpu", json!({"hard": {"requests.cpu": "1"}})).await;
    let from = api.store.revision();
    let api = Arc::new(api);
    let creators = (0..CREATORS).map(|n| {
        let api = api.clone();
        tokio::spawn(async move {
            let mut rng = StdRng::seed_from_u64(n);
            let mut mine: Vec<String> = Vec::new();
            let (mut made, mut refused) = (0i64, 0i64);
            for step in 0..12 {
                match rng.random_range(0..4) {
                    0 if !mine.is_empty() => {
                        let name = mine.swap_remove(0);
                        api.send(&format!("DELETE {PODS}/{name}?gracePeriodSeconds=0"), &[], "").await.ok();
                    }
                    1 if !mine.is_empty() => {
                        let name = mine.swap_remove(0);
                        let failed = json!({"status": {"phase": "Failed"}});
                        api.json(&format!("PATCH {PODS}/{name}/status"), failed).await.ok();
                    }
                    _ => {
                        let name = format!("p{n}-{step}");
                        let cpu = ["10m", "50m", "130m"][rng.random_range(0..3)];
                        match create(&api, PODS, pod(&name, cpu)).await {
                            Ok(()) => {
                                made += 1;
                                mine.push(name);
                            }
                            Err(why) => {
                                assert!(why.contains("exceeded quota"), "{why}");
                                refused += 1;
                            }
                        }
                    }
                }
            }
            (made, refused)
        })
    });
    let mut sums = (0, 0);
    for creator in creators.collect::<Vec<_>>() {
        let (made, refused) = creator.await.unwrap();
        sums = (sums.0 + made, sums.1 + refused);
    }
    assert!(sums.0 > LIMIT && sums.1 > 0, "the quota was never reached: {sums:?}");
    let pods = Kind::by_kind("", "v1", "Pod").unwrap();
    let now = Timestamp::now();
    let until = api.store.revision();
    let mut checked: i64 = 0;
    for revision in (from.0..=until.0).map(minke_api::Revision) {
        let quota = api.store.snapshot_at(quotas(), revision).unwrap();
        let used: Vec<Amounts> =
            quota.objects.values().map(|quota| amounts(quota.value().at("status").at("used"))).collect();
        let [cpu, count] = [used[0]["requests.cpu"], used[1]["pods"]];
        assert!(
            count <= Quantity::new(LIMIT, Default::default()) && cpu <= Quantity::new(1, Default::default())
        );
        let mut real = Amounts::new();
        for pod in api.store.snapshot_at(pods, revision).unwrap().objects.values() {
            for (name, amount) in usage(pods, &pod.value(), now) {
                *real.entry(name).or_default() += amount;
            }
        }
        let real = |name: &str| real.get(name).copied().unwrap_or_default();
        assert!(real("pods") <= Quantity::new(LIMIT, Default::default()), "{revision}");
        assert!(real("requests.cpu") <= Quantity::new(1, Default::default()), "{revision}");
        // A transaction has a revision for each of its steps; after the last of them all are true.
        checked += i64::from(real("pods") == count && real("requests.cpu") == cpu);
    }
    assert!(checked >= sums.0, "{checked} states in which all was true");
    let last = api.store.snapshot(quotas());
    let used = |name: &str| {
        let quota = last.objects.get(&Key::new("default", name)).unwrap().value();
        quota.at("status").at("used").clone()
    };
    let mut real = Amounts::new();
    for pod in api.store.snapshot(pods).objects.values() {
        for (name, amount) in usage(pods, &pod.value(), now) {
            *real.entry(name).or_default() += amount;
        }
    }
    assert_eq!(used("pods")["pods"], real.get("pods").copied().unwrap_or_default().to_string());
    assert_eq!(
        used("cpu")["requests.cpu"],
        real.get("requests.cpu").copied().unwrap_or_default().to_string()
    );
}
