//! The real controllers and the real scheduler in a simulated cluster.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::Kind;
use minke_client::Propagation;
use minke_testing::sim::{Api, Sim};
use serde_json::{Value, json};

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn web(image: &str, replicas: i32) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { "app": "web" } },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": "25%", "maxUnavailable": "25%" } },
            "revisionHistoryLimit": 10,
            "progressDeadlineSeconds": 600,
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": image }] },
            },
        },
    })
}

fn image(image: &str) -> Value {
    json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": image }] } } } })
}

/// The pods labelled app=web that are not on their way out, and how many of them are ready.
fn web_pods(api: &Api) -> (usize, usize) {
    let pods = api.list(Kind::of::<Pod>());
    let staying = pods.iter().filter(|pod| pod.labels().get("app") == Some("web") && pod.deleted().is_none());
    let ready = |pod: &Pod| {
        let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    staying.fold((0, 0), |(all, working), pod| {
        let view = pod.view::<Pod>().expect("a pod");
        (all + 1, working + usize::from(ready(&view)))
    })
}

fn never_more_than(sim: &Sim, max: usize) {
    sim.api.check(move |api| match web_pods(api).0 {
        pods if pods > max => Err(format!("{pods} pods, more than {max}")),
        _ => Ok(()),
    });
}

fn never_fewer_ready_than(sim: &Sim, min: usize) {
    sim.api.check(move |api| match web_pods(api).1 {
        ready if ready < min => Err(format!("{ready} ready, fewer than {min}")),
        _ => Ok(()),
    });
}

#[track_caller]
fn check_images(sim: &Sim, want: &str, count: usize) {
    let pods = sim.list::<Pod>();
    let images: Vec<String> =
        pods.iter().filter_map(|pod| pod.spec.as_ref()?.containers[0].image.clone()).collect();
    assert_eq!(images, vec![want; count]);
}

/// Rolls out v1, then v2; the limits hold at every moment.
async fn rollout(mut sim: Sim) -> Sim {
    sim.create(web("v1", 4));
    sim.settle(minutes(30)).await;
    check_images(&sim, "v1", 4);
    never_more_than(&sim, 5);
    never_fewer_ready_than(&sim, 3);
    sim.patch::<Deployment>("web", image("v2")).await;
    sim.settle(minutes(30)).await;
    check_images(&sim, "v2", 4);
    let status = sim.get::<Deployment>("web").unwrap().status.unwrap();
    assert_eq!(
        (status.replicas, status.updated_replicas, status.available_replicas),
        (Some(4), Some(4), Some(4))
    );
    assert_eq!(status.observed_generation, Some(2));
    sim
}

#[tokio::test(start_paused = true)]
async fn a_rollout_keeps_its_limits() {
    let sim = rollout(Sim::new(1).nodes(3)).await;
    assert_eq!(sim.list::<ReplicaSet>().len(), 2);
    let scaled = sim.events("ScalingReplicaSet");
    assert!(
        scaled
            .iter()
            .any(|text| text.starts_with("Scaled up replica set web-") && text.ends_with(" from 0 to 4")),
        "{scaled:?}"
    );
    assert!(sim.events("SuccessfulCreate").iter().all(|text| text.starts_with("Created pod: web-")));
    assert_eq!(sim.events("Scheduled").len(), sim.events("SuccessfulCreate").len());
    let pods = sim.list::<Pod>();
    let nodes: std::collections::BTreeSet<_> =
        pods.iter().map(|pod| pod.spec.as_ref().unwrap().node_name.clone()).collect();
    assert_eq!(nodes.len(), 3, "pods are spread over the nodes");
}

#[tokio::test(start_paused = true)]
async fn a_rollout_keeps_its_limits_when_caches_lag() {
    for seed in 0..30 {
        rollout(Sim::new(seed).nodes(2).lag(Duration::from_secs(3))).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rollout_survives_a_crash_after_any_write() {
    let mut crashes = 0;
    for n in 1.. {
        let sim = rollout(Sim::new(7).nodes(2).crash_after(n)).await;
        if !sim.crashed() {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 50, "{crashes}");
}

#[tokio::test(start_paused = true)]
async fn a_bad_version_leaves_the_good_one_serving_and_can_be_undone() {
    let mut sim = Sim::new(3).nodes(2);
    sim.create(web("v1", 4));
    sim.settle(minutes(5)).await;
    never_more_than(&sim, 5);
    never_fewer_ready_than(&sim, 3);
    sim.patch::<Deployment>("web", image("broken")).await;
    sim.pass(minutes(15)).await;
    let conditions = sim.get::<Deployment>("web").unwrap().status.unwrap().conditions.unwrap();
    let progressing = conditions.iter().find(|c| c.type_.as_deref() == Some("Progressing")).unwrap();
    assert_eq!(progressing.reason.as_deref(), Some("ProgressDeadlineExceeded"));
    sim.patch::<Deployment>("web", image("v1")).await;
    sim.settle(minutes(5)).await;
    check_images(&sim, "v1", 4);
    let sets = sim.list::<ReplicaSet>();
    assert_eq!(sets.len(), 2, "the undo went back to the first ReplicaSet");
}

#[tokio::test(start_paused = true)]
async fn deleted_pods_are_replaced_and_orphans_adopted() {
    let mut sim = Sim::new(4).nodes(1);
    let orphan = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "orphan", "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "v1"}]}});
    sim.create(orphan);
    let set = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {"name": "web"}, "spec": {"replicas": 3,
        "selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "v1"}]}}}});
    sim.create(set);
    sim.settle(minutes(5)).await;
    assert_eq!(sim.list::<Pod>().len(), 3, "the orphan is one of them");
    assert!(sim.get::<Pod>("orphan").unwrap().metadata.owner_references.is_some());
    sim.delete::<Pod>("orphan", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert_eq!(sim.list::<Pod>().len(), 3);
    let name = sim.list::<Pod>()[0].metadata.name.clone().unwrap();
    sim.patch::<Pod>(&name, json!({"metadata": {"labels": {"app": "debug"}}})).await;
    sim.settle(minutes(5)).await;
    assert_eq!(sim.list::<Pod>().len(), 4, "a pod that no longer matches is let go and replaced");
    assert!(sim.get::<Pod>(&name).unwrap().metadata.owner_references.is_none());
}

/// Deletes a Deployment in a way, and says how many ReplicaSets and pods are left.
async fn delete_deployment(propagation: Propagation) -> (usize, usize) {
    let mut sim = Sim::new(5).nodes(1);
    sim.create(web("v1", 2));
    sim.settle(minutes(5)).await;
    if propagation == Propagation::Foreground {
        sim.api.check(|api| {
            let gone = api.list(Kind::of::<Deployment>()).is_empty();
            let left = api.list(Kind::of::<ReplicaSet>()).len();
            if gone && left > 0 { Err("the owner went before its dependents".to_owned()) } else { Ok(()) }
        });
    }
    sim.delete::<Deployment>("web", propagation).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<Deployment>("web").is_none());
    (sim.list::<ReplicaSet>().len(), sim.list::<Pod>().len())
}

#[tokio::test(start_paused = true)]
async fn dependents_go_with_their_owner_or_are_left_alone() {
    assert_eq!(delete_deployment(Propagation::Background).await, (0, 0));
    assert_eq!(delete_deployment(Propagation::Foreground).await, (0, 0));
    assert_eq!(delete_deployment(Propagation::Orphan).await, (1, 2));
}

#[tokio::test(start_paused = true)]
async fn every_namespace_has_its_account_and_certificate() {
    let mut sim = Sim::new(6);
    sim.settle(minutes(5)).await;
    assert_eq!((sim.list::<ServiceAccount>().len(), sim.list::<ConfigMap>().len()), (4, 4));
    sim.delete::<ServiceAccount>("default", Propagation::Background).await.unwrap();
    sim.patch::<ConfigMap>("kube-root-ca.crt", json!({"data": {"ca.crt": "forged"}})).await;
    sim.settle(minutes(5)).await;
    assert!(sim.get::<ServiceAccount>("default").is_some());
    let data = sim.get::<ConfigMap>("kube-root-ca.crt").unwrap().data.unwrap();
    assert_eq!(data["ca.crt"], "-----BEGIN CERTIFICATE-----");
}

#[tokio::test(start_paused = true)]
async fn a_deleted_namespace_is_emptied_first() {
    let mut sim = Sim::new(7).nodes(1);
    sim.create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}));
    let mut deployment = web("v1", 3);
    deployment["metadata"]["namespace"] = "shop".into();
    sim.create(deployment);
    sim.create(json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "shop"}}));
    sim.settle(minutes(5)).await;
    assert_eq!(sim.list::<Pod>().len(), 3);
    sim.delete::<Namespace>("shop", Propagation::Background).await.unwrap();
    sim.settle(minutes(10)).await;
    assert!(sim.get::<Namespace>("shop").is_none());
    assert!(sim.list::<Pod>().is_empty() && sim.list::<Deployment>().is_empty());
    assert_eq!(sim.list::<ServiceAccount>().len(), 4, "those of the other namespaces");
}

#[tokio::test(start_paused = true)]
async fn endpoints_follow_the_pods() {
    let mut sim = Sim::new(8).nodes(2);
    sim.create(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "labels": {"team": "a"}},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}], "type": "LoadBalancer",
        "clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"]}}));
    sim.create(web("v1", 3));
    sim.settle(minutes(5)).await;
    let addresses = |sim: &Sim| -> Vec<String> {
        let slices = sim.list::<EndpointSlice>();
        assert_eq!(slices.len(), 1);
        assert_eq!(slices[0].metadata.labels.as_ref().unwrap()["kubernetes.io/service-name"], "web");
        assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
        slices[0].endpoints.iter().flatten().flat_map(|endpoint| endpoint.addresses.clone()).collect()
    };
    assert_eq!(addresses(&sim).len(), 3);
    let subsets = sim.get::<Endpoints>("web").unwrap().subsets.unwrap();
    assert_eq!(subsets[0].addresses.as_ref().unwrap().len(), 3);
    let status = sim.get::<Service>("web").unwrap().status.unwrap();
    assert_eq!(status.load_balancer.unwrap().ingress.unwrap().len(), 2, "one address per node");
    assert_eq!(sim.events("EnsuredLoadBalancer"), ["Ensured load balancer"]);
    sim.patch::<Deployment>("web", json!({"spec": {"replicas": 0}})).await;
    sim.settle(minutes(5)).await;
    assert_eq!(addresses_len(&sim), 0);
    assert_eq!(sim.get::<Endpoints>("web").unwrap().subsets.unwrap_or_default().len(), 0);
    sim.delete::<Service>("web", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.list::<EndpointSlice>().is_empty() && sim.list::<Endpoints>().is_empty());
}

fn addresses_len(sim: &Sim) -> usize {
    sim.list::<EndpointSlice>().iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).sum()
}

#[tokio::test(start_paused = true)]
async fn pods_of_a_silent_node_move_after_their_tolerations_run_out() {
    let mut sim = Sim::new(9).nodes(2);
    let mut deployment = web("v1", 4);
    let bear = |key: &str| json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    deployment["spec"]["template"]["spec"]["tolerations"] =
        json!([bear("node.kubernetes.io/not-ready"), bear("node.kubernetes.io/unreachable")]);
    sim.create(deployment);
    sim.settle(minutes(5)).await;
    let on = |sim: &Sim, node: &str| {
        let pods = sim.list::<Pod>();
        let here = pods.iter().filter(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some(node));
        here.filter(|pod| pod.metadata.deletion_timestamp.is_none()).count()
    };
    assert_eq!((on(&sim, "node1"), on(&sim, "node2")), (2, 2));
    sim.silence("node2");
    sim.pass(Duration::from_secs(40)).await;
    let ready = |sim: &Sim| {
        let conditions = sim.get::<Node>("node2").unwrap().status.unwrap().conditions.unwrap();
        conditions.into_iter().find(|condition| condition.type_ == "Ready").unwrap().status
    };
    assert_eq!(ready(&sim), "True", "not yet");
    sim.pass(Duration::from_secs(30)).await;
    assert_eq!(ready(&sim), "Unknown");
    let taints = sim.get::<Node>("node2").unwrap().spec.unwrap().taints.unwrap();
    assert!(
        taints
            .iter()
            .any(|taint| taint.key == "node.kubernetes.io/unreachable" && taint.effect == "NoExecute")
    );
    assert_eq!(on(&sim, "node2"), 2, "they tolerate it for a while");
    sim.pass(minutes(6)).await;
    assert_eq!((on(&sim, "node1"), on(&sim, "node2")), (4, 0));
    assert_eq!(sim.events("TaintManagerEviction").len(), 2);
}

#[tokio::test(start_paused = true)]
async fn pods_of_a_lost_node_are_collected() {
    let mut sim = Sim::new(10).nodes(2);
    sim.create(web("v1", 4));
    sim.settle(minutes(5)).await;
    sim.silence("node2");
    sim.delete::<Node>("node2", Propagation::Background).await.unwrap();
    sim.pass(Duration::from_secs(30)).await;
    assert_eq!(sim.list::<Pod>().len(), 4, "the node may come back");
    sim.pass(minutes(1)).await;
    sim.settle(minutes(5)).await;
    let pods = sim.list::<Pod>();
    assert_eq!(pods.len(), 4);
    assert!(pods.iter().all(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some("node1")));
}

#[tokio::test(start_paused = true)]
async fn pods_wait_for_a_node_that_has_room() {
    let mut sim = Sim::new(11);
    sim.create(web("v1", 1));
    sim.pass(minutes(1)).await;
    assert!(sim.events("FailedScheduling").contains(&"no nodes available to schedule pods".to_owned()));
    let pod = sim.list::<Pod>().remove(0);
    let condition = pod.status.unwrap().conditions.unwrap().remove(0);
    assert_eq!(
        (condition.type_.as_str(), condition.reason.as_deref()),
        ("PodScheduled", Some("Unschedulable"))
    );
    let mut sim = sim.nodes(1);
    sim.settle(minutes(5)).await;
    assert_eq!(sim.get::<Deployment>("web").unwrap().status.unwrap().available_replicas, Some(1));
}

fn job(image: &str, completions: i32, backoff_limit: i32) -> Value {
    json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "work" },
        "spec": {
            "completions": completions, "parallelism": 2, "backoffLimit": backoff_limit,
            "selector": { "matchLabels": { "job-name": "work" } },
            "template": {
                "metadata": { "labels": { "job-name": "work" } },
                "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": image }] },
            },
        },
    })
}

#[tokio::test(start_paused = true)]
async fn jobs_complete_and_count_every_pod_once() {
    let mut crashes = 0;
    for n in 1.. {
        let mut sim = Sim::new(12).nodes(1).crash_after(n);
        sim.create(job("once", 3, 6));
        sim.settle(minutes(10)).await;
        let status = sim.get::<Job>("work").unwrap().status.unwrap();
        assert_eq!(status.succeeded, Some(3), "crash after write {n}");
        let conditions = status.conditions.unwrap();
        assert!(
            conditions.iter().any(|condition| condition.type_ == "Complete" && condition.status == "True")
        );
        assert!(sim.list::<Pod>().iter().all(|pod| pod.metadata.finalizers.is_none()));
        if !sim.crashed() {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 10, "{crashes}");
}

#[tokio::test(start_paused = true)]
async fn jobs_give_up_after_their_limit() {
    let mut sim = Sim::new(13).nodes(1);
    sim.create(job("fails", 1, 1));
    sim.settle(minutes(10)).await;
    let conditions = sim.get::<Job>("work").unwrap().status.unwrap().conditions.unwrap();
    let failed = conditions.iter().find(|condition| condition.type_ == "Failed").unwrap();
    assert_eq!(failed.reason.as_deref(), Some("BackoffLimitExceeded"));
    sim.patch::<Job>("work", json!({"spec": {"ttlSecondsAfterFinished": 60}})).await;
    sim.pass(minutes(2)).await;
    assert!(sim.get::<Job>("work").is_none() && sim.list::<Pod>().is_empty());
}

#[tokio::test(start_paused = true)]
async fn requests_for_certificates_of_pods_are_cleared_away() {
    /// An empty request for a certificate, signed with a key that nobody has any more.
    const REQUEST: &str = "MIG6MGICAQAwADBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABPHJn/K28z0mwRbFLzCcb8N5dLdzu85ms52MFNVPkE8V3B48VxvH5BZeErBtshhOK4iXNAiEs5e/u9j/zUP2E3ygADAKBggqhkjOPQQDAgNIADBFAiEA66C3zu+SGPhjJdUk0hG9YUTAT5tZVo9BKhGHF9di5LoCIE2abWWm0BTBcqbnPpZbUp70MSCLO5VVHTD1prXetzjp";
    let mut sim = Sim::new(14).nodes(1);
    sim.create(json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "PodCertificateRequest", "metadata": { "name": "r" },
        "spec": {
            "signerName": "example.com/ca", "podName": "p", "podUID": "u", "nodeName": "n", "nodeUID": "u",
            "serviceAccountName": "default", "serviceAccountUID": "u", "stubPKCS10Request": REQUEST,
        },
    }));
    sim.pass(minutes(14)).await;
    assert!(sim.get::<PodCertificateRequest>("r").is_some());
    sim.pass(minutes(2)).await;
    assert!(sim.get::<PodCertificateRequest>("r").is_none());
}
