//! What is particular to pods, services and endpoints when they are written.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::*;

// In real time: a write is made durable by a thread, for which virtual time would not wait.
#[tokio::test]
async fn a_pod_waits_for_the_account_of_its_new_namespace() {
    let api = Api::new().await;
    api.json("POST /api/v1/namespaces", json!({"metadata": {"name": "new"}})).await.ok();
    let pods = "POST /api/v1/namespaces/new/pods";
    let made = async {
        // Only when the pod waits already.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let account = json!({"metadata": {"name": "default"}});
        api.json("POST /api/v1/namespaces/new/serviceaccounts", account).await.ok();
    };
    let (pod_made, ()) = tokio::join!(api.json(pods, pod("a")), made);
    assert_eq!(pod_made.ok()["spec"]["serviceAccountName"], "default");
    let mut stranger = pod("b");
    stranger["spec"]["serviceAccountName"] = "nobody".into();
    let start = Instant::now();
    refused(api.json(pods, stranger).await, 403, "Forbidden", "serviceaccount \"nobody\" not found");
    assert!(start.elapsed() >= Duration::from_secs(1), "it waits a second");
    let start = Instant::now();
    refused(
        api.json("POST /api/v1/namespaces/none/pods", pod("c")).await,
        404,
        "NotFound",
        "\"none\" not found",
    );
    assert!(start.elapsed() < Duration::from_secs(1), "nothing is waited for without a namespace");
}

#[tokio::test]
async fn endpoints_are_deprecated_in_one_sentence() {
    let api = api().await;
    let path = "/api/v1/namespaces/default/endpoints";
    let endpoints = json!({"metadata": {"name": "e"}});
    for answer in [api.json(&format!("POST {path}"), endpoints).await, api.get(path).await] {
        let warnings: Vec<_> = answer.headers.get_all("warning").iter().collect();
        assert_eq!(
            warnings,
            ["299 - \"v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice\""]
        );
    }
}

#[tokio::test]
async fn the_status_of_a_service_has_defaults_too() {
    let api = api().await;
    let services = "/api/v1/namespaces/default/services";
    let service =
        json!({"metadata": {"name": "s"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}});
    api.json(&format!("POST {services}"), service).await.ok();
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}});
    let patched = api.json(&format!("PATCH {services}/s/status"), status).await.ok();
    assert_eq!(patched["status"]["loadBalancer"]["ingress"], json!([{"ip": "192.0.2.9", "ipMode": "VIP"}]));
}
