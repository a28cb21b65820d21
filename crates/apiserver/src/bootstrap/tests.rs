//! Bootstrap against the real registry over a store in memory.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1 as core;
use minke_client::{Clock, ListOptions, Patch, WatchEvent, WatchOptions};
use minke_store::Store;
use rcgen::{CertificateParams, IsCa, KeyPair};

use super::*;
use crate::allocate::Allocator;
use crate::authn::Authenticator;
use crate::authz::Authorizer;
use crate::inprocess::InProcess;
use crate::registry::Registry;
use crate::tokens::Tokens;
use crate::{Snapshots, UserInfo};

struct Cluster {
    store: Store,
    config: Config,
    client: Arc<dyn Client>,
    registry: Arc<Registry>,
}

fn cluster() -> Cluster {
    let store = Store::in_memory();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).unwrap();
    let service_account_key = KeyPair::generate().unwrap().serialize_pem();
    let issuer = "https://kubernetes.default.svc.cluster.local".to_owned();
    let config = Config {
        store: store.clone(),
        clock: Clock::System,
        listen: Vec::new(),
        advertise: "192.0.2.1:6443".parse().unwrap(),
        service_cidr: "10.96.0.0/12".parse().unwrap(),
        node_ports: 30000..=32767,
        serving_cert: String::new(),
        serving_key: String::new(),
        serving_ca: String::new(),
        client_ca: ca.pem(),
        service_account_key: service_account_key.clone(),
        issuer: issuer.clone(),
        kubelet_client_cert: String::new(),
        kubelet_client_key: String::new(),
        kubelet_ca: String::new(),
    };
    let snapshots: Arc<dyn Snapshots> = Arc::new(store.clone());
    let tokens = Arc::new(Tokens::new(&service_account_key, &issuer, vec![issuer.clone()]).unwrap());
    let authenticator = Authenticator::new(&[ca.der().clone()], tokens.clone(), snapshots.clone()).unwrap();
    let registry = Arc::new(Registry {
        store: store.clone(),
        clock: Clock::System,
        authorizer: Arc::new(Authorizer::new(snapshots.clone())),
        snapshots,
        authenticator: Arc::new(authenticator),
        tokens,
        ca: String::new(),
        allocator: Allocator::new(config.service_cidr, config.node_ports.clone(), []),
        usage: None,
    });
    let admin = UserInfo::new("system:apiserver", &["system:masters"]);
    let client: Arc<dyn Client> = Arc::new(InProcess::new(registry.clone(), admin));
    Cluster { store, config, client, registry }
}

#[tokio::test]
async fn a_second_start_writes_nothing() {
    let cluster = cluster();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let service =
        cluster.client.get(Target::object(Kind::of::<core::Service>(), "default", KUBERNETES)).await.unwrap();
    assert_eq!(service.field("spec.clusterIP"), Some("10.96.0.1"));
    let namespaces =
        cluster.client.list(Kind::of::<core::Namespace>(), "", ListOptions::default()).await.unwrap();
    let names: Vec<&str> = namespaces.items.iter().map(|namespace| namespace.name()).collect();
    assert_eq!(names, ["default", "kube-node-lease", "kube-public", "kube-system"]);
    let before = cluster.store.revision();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    assert_eq!(cluster.store.revision(), before);
}

#[tokio::test]
async fn a_moved_server_corrects_its_endpoints() {
    let mut cluster = cluster();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    cluster.config.advertise = "192.0.2.9:7443".parse().unwrap();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let get = |kind| cluster.client.get(Target::object(kind, "default", KUBERNETES));
    let slice = get(Kind::of::<discovery::EndpointSlice>()).await.unwrap().value();
    assert_eq!(slice["endpoints"][0]["addresses"][0], "192.0.2.9");
    assert_eq!(slice["ports"][0]["port"], 7443);
    let service = get(Kind::of::<core::Service>()).await.unwrap().value();
    assert_eq!(service["spec"]["ports"][0]["targetPort"], 7443);
}

#[tokio::test]
async fn what_is_deleted_comes_back() {
    let cluster = cluster();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let stop = CancellationToken::new();
    let informers = Informers::new(cluster.client.clone(), stop.clone());
    let keeper = tokio::spawn(keep(informers, cluster.config.clone(), stop.clone()));
    let client = &*cluster.client;
    for kind in
        [Kind::of::<core::Service>(), Kind::of::<core::Endpoints>(), Kind::of::<discovery::EndpointSlice>()]
    {
        let target = Target::object(kind, "default", KUBERNETES);
        let old = client.get(target).await.unwrap();
        let options = WatchOptions { from: old.revision(), ..WatchOptions::default() };
        let changes = client.watch(kind, "default", options).await.unwrap();
        client.delete(target, DeleteOptions::default()).await.unwrap();
        let comes = changes.any(async |change| {
            matches!(change, Ok(WatchEvent::Added(new)) if new.name() == KUBERNETES && new.uid() != old.uid())
        });
        let came = tokio::time::timeout(Duration::from_secs(10), comes).await;
        assert_eq!(came, Ok(true), "{kind:?}");
    }
    stop.cancel();
    keeper.await.unwrap();
}

#[tokio::test]
async fn an_administrators_changes_stay() {
    let cluster = cluster();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let target = Target::object(Kind::of::<rbac::ClusterRole>(), "", "system:basic-user");
    let rules = json!([{"apiGroups": ["x"], "resources": ["y"], "verbs": ["z"]}]);
    cluster.client.patch(target, Patch::Merge(json!({"rules": rules}))).await.unwrap();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let role = cluster.client.get(target).await.unwrap().value();
    let groups: Vec<&str> =
        role["rules"].as_array().unwrap().iter().map(|r| r["apiGroups"][0].as_str().unwrap()).collect();
    assert_eq!(groups, ["x", "authentication.k8s.io", "authorization.k8s.io", "authorization.k8s.io"]);
}

/// The whole way of a pod: defaults, admission, validation; and who may send it.
#[tokio::test]
async fn a_pod_goes_through_all_of_it() {
    let cluster = cluster();
    ensure(&*cluster.client, &cluster.config).await.unwrap();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web"},
        "spec": {"containers": [{"name": "c", "image": "nginx"}]}});
    let pods = Target::collection(Kind::of::<core::Pod>(), "default");
    let status = cluster.client.create(pods, pod.clone()).await.unwrap_err();
    assert_eq!(
        status.message,
        "pods \"web\" is forbidden: error looking up service account default/default: serviceaccount \"default\" not found"
    );
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    let accounts = Target::collection(Kind::of::<core::ServiceAccount>(), "default");
    cluster.client.create(accounts, account).await.unwrap();
    let made = cluster.client.create(pods, pod.clone()).await.unwrap().value();
    assert_eq!(made["metadata"]["generation"], 1);
    assert_eq!(made["spec"]["priority"], 0);
    assert_eq!(made["spec"]["tolerations"].as_array().unwrap().len(), 2);
    assert_eq!(made["status"]["phase"], "Pending");
    let mut same = made.clone();
    same["spec"]["containers"][0]["image"] = "nginx:2".into();
    let target = Target::object(Kind::of::<core::Pod>(), "default", "web");
    let changed = cluster.client.update(target, same).await.unwrap();
    assert_eq!(changed.generation(), 2);
    let ann = InProcess::new(cluster.registry.clone(), UserInfo::new("ann", &[]));
    let status = ann.create(pods, pod).await.unwrap_err();
    assert_eq!(
        status.message,
        "pods is forbidden: User \"ann\" cannot create resource \"pods\" in API group \"\" in the namespace \"default\""
    );
    // The node of a pod gets tokens for its account, and nobody else's.
    let binding = json!({"target": {"kind": "Node", "name": "n1"}, "metadata": {"name": "web"}, "apiVersion": "v1", "kind": "Binding"});
    cluster.client.post(target.sub("binding"), binding).await.unwrap();
    let node = InProcess::new(cluster.registry.clone(), UserInfo::new("system:node:n1", &["system:nodes"]));
    let token = Target::object(Kind::of::<core::ServiceAccount>(), "default", "default").sub("token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"audiences": [], "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web"}}});
    let answer = node.post(token, request.clone()).await.unwrap();
    assert!(answer["status"]["token"].is_string());
    let other = InProcess::new(cluster.registry.clone(), UserInfo::new("system:node:n2", &["system:nodes"]));
    assert_eq!(other.post(token, request).await.unwrap_err().code, 403);
}
