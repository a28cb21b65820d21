//! The real controllers and the real scheduler on the real registry, each under its own identity. Only the kubelets
//! pretend. Time is real here.
#![allow(dead_code, reason = "every test that has such a cluster uses a part of this")]

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::Resource;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Event;
use minke_api::{ApiType, Kind, Object};
use minke_client::{Client, Clock, DeleteOptions, ListOptions, Patch, Propagation, Target};
use minke_store::Store;
use minke_testing::ControlPlane;
use minke_testing::sim::Kubelet;
use serde_json::Value;
use tokio::time::Instant;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Cluster {
    pub admin: Arc<dyn Client>,
    _plane: ControlPlane,
}

impl Cluster {
    pub async fn start() -> Cluster {
        let plane = ControlPlane::start(Store::in_memory()).await.unwrap();
        let admin = plane.admin();
        for name in ["node1", "node2"] {
            let slowness = Duration::from_millis(100);
            let kubelet = Kubelet {
                client: admin.clone(),
                clock: Clock::System,
                name: name.to_owned(),
                seed: 1,
                slowness,
            };
            kubelet.start(plane.stop.clone());
        }
        Cluster { admin, _plane: plane }
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
