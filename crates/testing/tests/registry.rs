//! The real controllers and the real scheduler on the real registry, each under its own identity: what they
//! write must pass authorization, validation and admission. Only the kubelets pretend. Time is real here.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use k8s_openapi::Resource;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Pod, ReplicationController, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::{Kind, Object};
use minke_apiserver::{ApiServer, UserInfo, kubernetes_service_address};
use minke_client::{Client, Clock, DeleteOptions, Informers, ListOptions, Patch, Propagation, Target};
use minke_cluster::keys::{Keys, Names};
use minke_store::Store;
use minke_testing::sim::Kubelet;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

struct Cluster {
    admin: Arc<dyn Client>,
    stop: CancellationToken,
    _keys: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Cluster {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let service_cidr = "10.96.0.0/12".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let names = Names {
            node_name: "node1".to_owned(),
            node_ip: local,
            service_ip: kubernetes_service_address(&service_cidr),
            cluster_domain: "cluster.local".to_owned(),
        };
        let keys = Keys::ensure(dir.path(), &names, SystemTime::now()).unwrap();
        let config = minke_apiserver::Config {
            store: Store::in_memory(),
            clock: Clock::System,
            listen: vec![SocketAddr::new(local, 0)],
            advertise: SocketAddr::from(([192, 0, 2, 1], 6443)),
            service_cidr,
            node_ports: 30000..=32767,
            serving_cert: keys.apiserver.certificate.clone(),
            serving_key: keys.apiserver.key.clone(),
            serving_ca: keys.ca.certificate.clone(),
            client_ca: keys.ca.certificate.clone(),
            service_account_key: keys.service_account.clone(),
            issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
            kubelet_client_cert: keys.apiserver_kubelet_client.certificate.clone(),
            kubelet_client_key: keys.apiserver_kubelet_client.key.clone(),
            kubelet_ca: keys.ca.certificate.clone(),
        };
        let server = ApiServer::build(config).await.unwrap();
        let admin = server.client(UserInfo::new("admin", &["system:masters"]));
        let manager = server.client(UserInfo::new("system:kube-controller-manager", &[]));
        let scheduler = server.client(UserInfo::new("system:kube-scheduler", &[]));
        let clients = server.clients();
        let stop = CancellationToken::new();
        tokio::spawn(server.run(stop.clone()));
        let config = minke_controllers::Config {
            root_ca: keys.ca.certificate,
            ..minke_controllers::Config::default()
        };
        let account = move |name: &str| clients(UserInfo::service_account("kube-system", name));
        tokio::spawn(minke_controllers::run(
            config,
            account,
            Informers::new(manager, stop.clone()),
            stop.clone(),
        ));
        let config = minke_scheduler::Config { seed: 1, ..Default::default() };
        tokio::spawn(minke_scheduler::run(Informers::new(scheduler, stop.clone()), config, stop.clone()));
        for name in ["node1", "node2"] {
            let slowness = Duration::from_millis(100);
            let kubelet = Kubelet {
                client: admin.clone(),
                clock: Clock::System,
                name: name.to_owned(),
                seed: 1,
                slowness,
            };
            kubelet.start(stop.clone());
        }
        Cluster { admin, stop, _keys: dir }
    }

    async fn create(&self, object: Value) -> Arc<Object> {
        let text = |name: &str| object[name].as_str().unwrap().to_owned();
        let kind = Kind::by_api_version(&text("apiVersion"), &text("kind")).unwrap();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
        let namespace = if kind.namespaced { namespace.as_str() } else { "" };
        self.admin.create(Target::collection(kind, namespace), object.clone()).await.unwrap()
    }

    async fn get<T: Resource + DeserializeOwned>(&self, namespace: &str, name: &str) -> Option<T> {
        let object = self.admin.get(Target::object(Kind::of::<T>(), namespace, name)).await.ok()?;
        Some(serde_json::from_slice(object.json()).unwrap())
    }

    async fn list<T: Resource + DeserializeOwned>(&self, namespace: &str) -> Vec<T> {
        let list = self.admin.list(Kind::of::<T>(), namespace, ListOptions::default()).await.unwrap();
        list.items.iter().map(|object| serde_json::from_slice(object.json()).unwrap()).collect()
    }

    async fn delete<T: Resource>(&self, namespace: &str, name: &str, propagation: Propagation) {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        self.admin.delete(Target::object(Kind::of::<T>(), namespace, name), options).await.unwrap();
    }

    async fn patch<T: Resource>(&self, name: &str, patch: Value) {
        let target = Target::object(Kind::of::<T>(), "default", name);
        self.admin.patch(target, Patch::Strategic(patch)).await.unwrap();
    }

    /// Waits until `holds`, looking again and again.
    #[track_caller]
    fn until<'a, F: Future<Output = bool> + 'a>(
        &'a self,
        what: &'a str,
        holds: impl Fn() -> F + 'a,
    ) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let end = Instant::now() + PATIENCE;
            while !holds().await {
                if Instant::now() > end {
                    let events = self.list::<Event>("").await;
                    let told: Vec<_> = events
                        .into_iter()
                        .map(|e| (e.reason.unwrap_or_default(), e.message.unwrap_or_default()))
                        .collect();
                    panic!("{caller}: never: {what}; events: {told:#?}; log: {}", log());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    async fn rolled_out(&self, generation: i64, replicas: i32) -> bool {
        let Some(deployment) = self.get::<Deployment>("default", "web").await else { return false };
        let status = deployment.status.unwrap_or_default();
        let want = Some(replicas);
        status.observed_generation == Some(generation)
            && [status.replicas, status.updated_replicas, status.available_replicas] == [want, want, want]
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn log() -> String {
    String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned()
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

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
