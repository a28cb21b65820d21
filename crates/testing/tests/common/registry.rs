//! The real controllers and the real scheduler on the real registry, each under its own identity. Only the kubelets
//! pretend. Time is real here.
#![allow(dead_code, reason = "every test that has such a cluster uses a part of this")]

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use k8s_openapi::Resource;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Event;
use minke_api::{ApiType, Kind, Object};
use minke_apiserver::{ApiServer, UserInfo, kubernetes_service_address};
use minke_client::{Client, Clock, DeleteOptions, Informers, ListOptions, Patch, Propagation, Target};
use minke_cluster::keys::{Keys, Names};
use minke_store::Store;
use minke_testing::sim::Kubelet;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Cluster {
    pub admin: Arc<dyn Client>,
    stop: CancellationToken,
    _keys: tempfile::TempDir,
}

impl Cluster {
    pub async fn start() -> Cluster {
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

    pub async fn create(&self, object: Value) -> Arc<Object> {
        let text = |name: &str| object[name].as_str().unwrap().to_owned();
        let kind = Kind::by_api_version(&text("apiVersion"), &text("kind")).unwrap();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
        let namespace = if kind.namespaced { namespace.as_str() } else { "" };
        self.admin.create(Target::collection(kind, namespace), object.clone()).await.unwrap()
    }

    pub async fn get<T: Resource + ApiType>(&self, namespace: &str, name: &str) -> Option<T> {
        let object = self.admin.get(Target::object(Kind::of::<T>(), namespace, name)).await.ok()?;
        Some(T::from_json(object.json()).unwrap())
    }

    pub async fn list<T: Resource + ApiType>(&self, namespace: &str) -> Vec<T> {
        let list = self.admin.list(Kind::of::<T>(), namespace, ListOptions::default()).await.unwrap();
        list.items.iter().map(|object| T::from_json(object.json()).unwrap()).collect()
    }

    pub async fn delete<T: Resource>(&self, namespace: &str, name: &str, propagation: Propagation) {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        self.admin.delete(Target::object(Kind::of::<T>(), namespace, name), options).await.unwrap();
    }

    pub async fn patch<T: Resource>(&self, name: &str, patch: Value) {
        let target = Target::object(Kind::of::<T>(), "default", name);
        self.admin.patch(target, Patch::Strategic(patch)).await.unwrap();
    }

    /// Waits until `holds`, looking again and again.
    #[track_caller]
    pub fn until<'a, F: Future<Output = bool> + 'a>(
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

    pub async fn rolled_out(&self, generation: i64, replicas: i32) -> bool {
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

pub fn log() -> String {
    String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned()
}

pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
