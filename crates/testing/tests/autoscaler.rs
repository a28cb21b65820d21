//! The autoscaler in a simulated cluster, where what pods use is an object that a test writes.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::Pod;
use minke_testing::sim::{self, Sim};
use serde_json::{Value, json};

mod common;
use common::through_all;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn web(replicas: i32) -> Value {
    sim::web(
        replicas,
        json!({ "name": "c", "image": "web", "resources": { "requests": { "memory": "1000" } } }),
    )
}

fn autoscaler(behavior: Value) -> Value {
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": { "name": "scaler" },
        "spec": {
            "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": "web" },
            "minReplicas": 2, "maxReplicas": 6, "behavior": behavior,
            "metrics": [{ "type": "Resource", "resource": {
                "name": "memory", "target": { "type": "Utilization", "averageUtilization": 50 } } }],
        },
    })
}

/// Says that every pod there is now uses this much memory.
async fn all_use(sim: &Sim, memory: &str) {
    for pod in sim.list::<Pod>() {
        let name = pod.metadata.name.expect("pods have names");
        let metrics = json!({
            "apiVersion": "metrics.k8s.io/v1beta1", "kind": "PodMetrics",
            "metadata": { "name": name, "labels": { "app": "web" } },
            "timestamp": "2023-11-14T22:13:20Z", "window": "15s",
            "containers": [{ "name": "c", "usage": { "memory": memory } }],
        });
        sim.put(metrics).await;
    }
}

fn replicas(sim: &Sim) -> i32 {
    sim.get::<Deployment>("web").and_then(|web| web.spec.replicas).expect("it is there")
}

fn condition(sim: &Sim, type_: &str) -> (String, String) {
    let hpa = sim.get::<HorizontalPodAutoscaler>("scaler").expect("it is there");
    let conditions = hpa.status.and_then(|status| status.conditions).unwrap_or_default();
    let found = conditions.into_iter().find(|c| c.type_ == type_).expect("the condition is there");
    (found.status, found.reason.unwrap_or_default())
}

async fn life(mut sim: Sim) -> Sim {
    sim.api.check(|api| {
        let pods = api.list(minke_api::Kind::of::<Pod>());
        let staying = pods.iter().filter(|pod| pod.deleted().is_none()).count();
        if staying > 4 { Err(format!("{staying} pods")) } else { Ok(()) }
    });
    sim.create(web(2));
    sim.settle(seconds(300)).await;
    sim.create(autoscaler(json!({ "scaleDown": { "stabilizationWindowSeconds": 60 } })));
    all_use(&sim, "900").await;
    sim.settle(seconds(300)).await;
    // Twice 90 % of which 50 % are wanted; the new pods, of which nothing is known yet, count as idle.
    assert_eq!(replicas(&sim), 4);
    assert_eq!(condition(&sim, "ScalingActive"), ("True".into(), "ValidMetricFound".into()));
    all_use(&sim, "100").await;
    sim.pass(seconds(30)).await;
    assert_eq!(replicas(&sim), 4, "the window holds it back");
    sim.pass(seconds(60)).await;
    sim.settle(seconds(300)).await;
    assert_eq!(replicas(&sim), 2);
    assert_eq!(condition(&sim, "AbleToScale").0, "True");
    sim
}

#[test]
fn use_takes_a_workload_up_and_back_down() {
    through_all(20, 3, life);
}

#[tokio::test(start_paused = true)]
async fn bounds_hold_without_metrics_and_what_is_wrong_is_told() {
    let mut sim = Sim::new(3).nodes(1);
    sim.create(web(1));
    sim.create(autoscaler(json!(null)));
    sim.settle(seconds(300)).await;
    assert_eq!(replicas(&sim), 2);
    assert_eq!(
        sim.events("SuccessfulRescale"),
        ["New size: 2; reason: Current number of replicas below Spec.MinReplicas"]
    );
    assert_eq!(condition(&sim, "ScalingActive"), ("False".into(), "FailedGetResourceMetric".into()));
    let why = "failed to get memory utilization: unable to get metrics for resource memory: no metrics returned from resource metrics API";
    assert_eq!(sim.events("FailedGetResourceMetric"), [why]);
    // Scaled to nothing by hand, it stays so.
    sim.patch::<Deployment>("web", json!({ "spec": { "replicas": 0 } })).await;
    sim.settle(seconds(300)).await;
    assert_eq!(replicas(&sim), 0);
    assert_eq!(condition(&sim, "ScalingActive"), ("False".into(), "ScalingDisabled".into()));
    sim.patch::<HorizontalPodAutoscaler>(
        "scaler",
        json!({ "spec": { "scaleTargetRef": { "name": "gone" } } }),
    )
    .await;
    sim.settle(seconds(300)).await;
    assert_eq!(condition(&sim, "AbleToScale"), ("False".into(), "FailedGetScale".into()));
    assert_eq!(sim.events("FailedGetScale"), ["deployments.apps \"gone\" not found"]);
}
