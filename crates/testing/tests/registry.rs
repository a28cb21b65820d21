//! The real controllers and the real scheduler on the real registry, each under its own identity: what they
//! write must pass authorization, validation and admission. Only the kubelets pretend. Time is real here.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Pod, ReplicationController, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_client::Propagation;
use serde_json::{Value, json};

#[path = "common/registry.rs"]
mod registry;
use registry::{Cluster, Log, log};

fn web(image: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": 4,
            "selector": { "matchLabels": { "app": "web" } },
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": image }] },
            },
        },
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_controllers_write_is_accepted() {
    // Conflicts are ordinary and logged as debug; whatever a controller warns of is a mistake of ours.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(|| Log)
        .init();
    let cluster = Cluster::start().await;
    let c = &cluster;
    c.until("every namespace has its account and certificate", || async {
        c.list::<ServiceAccount>("").await.len() >= 4
            && c.list::<ConfigMap>("")
                .await
                .iter()
                .filter(|map| map.metadata.name.as_deref() == Some("kube-root-ca.crt"))
                .count()
                == 4
    })
    .await;

    c.create(web("v1")).await;
    c.create(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}}))
        .await;
    c.until("v1 is out", || c.rolled_out(1, 4)).await;
    c.patch::<Deployment>(
        "web",
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "v2"}]}}}}),
    )
    .await;
    c.until("v2 is out", || c.rolled_out(2, 4)).await;
    c.patch::<Deployment>(
        "web",
        json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "v1"}]}}}}),
    )
    .await;
    c.until("v1 is back", || c.rolled_out(3, 4)).await;
    assert_eq!(c.list::<ReplicaSet>("default").await.len(), 2);
    let deployment = c.get::<Deployment>("default", "web").await.unwrap();
    assert_eq!(deployment.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"], "3");

    c.until("the endpoints are there", || async {
        let slices = c.list::<EndpointSlice>("default").await;
        let of_web = slices
            .iter()
            .filter(|slice| slice.metadata.name.as_deref().unwrap_or_default().starts_with("web-"));
        let ready: usize = of_web.map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).sum();
        let endpoints = c
            .get::<Endpoints>("default", "web")
            .await
            .and_then(|endpoints| endpoints.subsets)
            .unwrap_or_default();
        ready == 4
            && endpoints.iter().map(|subset| subset.addresses.as_ref().map_or(0, Vec::len)).sum::<usize>()
                == 4
    })
    .await;
    c.until("the service has addresses", || async {
        let status =
            c.get::<Service>("default", "web").await.and_then(|service| service.status).unwrap_or_default();
        status.load_balancer.and_then(|balancer| balancer.ingress).unwrap_or_default().len() == 2
    })
    .await;
    let kubernetes = c.get::<Endpoints>("default", "kubernetes").await.unwrap();
    assert_eq!(kubernetes.subsets.unwrap().len(), 1, "services without a selector are left alone");

    c.create(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "work"}, "spec": {"completions": 3,
        "parallelism": 2, "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "once"}]}}}}))
        .await;
    c.create(json!({"apiVersion": "v1", "kind": "ReplicationController", "metadata": {"name": "old"}, "spec": {"replicas": 2,
        "selector": {"app": "old"}, "template": {"metadata": {"labels": {"app": "old"}},
        "spec": {"containers": [{"name": "c", "image": "v1"}]}}}}))
        .await;
    c.until("the job is complete", || async {
        let status = c.get::<Job>("default", "work").await.and_then(|job| job.status).unwrap_or_default();
        status.conditions.iter().flatten().any(|condition| condition.type_ == "Complete")
            && status.succeeded == Some(3)
    })
    .await;
    c.until("the replication controller has its pods", || async {
        let status = c.get::<ReplicationController>("default", "old").await.and_then(|set| set.status);
        status.is_some_and(|status| status.available_replicas == Some(2))
    })
    .await;

    c.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})).await;
    let mut shop = web("v1");
    shop["metadata"]["namespace"] = "shop".into();
    c.create(shop).await;
    c.until("the shop has pods", || async { c.list::<Pod>("shop").await.len() == 4 }).await;
    c.delete::<Namespace>("", "shop", Propagation::Background).await;
    c.until("the shop is gone", || async { c.get::<Namespace>("", "shop").await.is_none() }).await;
    assert!(c.list::<Pod>("shop").await.is_empty());

    c.delete::<Deployment>("default", "web", Propagation::Foreground).await;
    c.delete::<Job>("default", "work", Propagation::Background).await;
    c.delete::<ReplicationController>("default", "old", Propagation::Orphan).await;
    c.delete::<Service>("default", "web", Propagation::Background).await;
    c.until("what was deleted is gone with what it owned", || async {
        c.list::<ReplicaSet>("default").await.is_empty()
            && c.list::<Job>("default").await.is_empty()
            && c.list::<ReplicationController>("default").await.is_empty()
            && c.list::<EndpointSlice>("default").await.len() == 1
            && c.list::<Pod>("default").await.len() == 2
    })
    .await;
    let orphans = c.list::<Pod>("default").await;
    assert!(orphans.iter().all(|pod| pod.metadata.owner_references.is_none()));

    let events = c.list::<Event>("default").await;
    let reasons: std::collections::BTreeSet<String> =
        events.into_iter().filter_map(|event| event.reason).collect();
    for reason in [
        "ScalingReplicaSet",
        "SuccessfulCreate",
        "SuccessfulDelete",
        "Scheduled",
        "EnsuredLoadBalancer",
        "Completed",
    ] {
        assert!(reasons.contains(reason), "{reason} of {reasons:?}");
    }
    let log = log();
    assert_eq!(log, "", "nothing was refused");
}
