//! What keeps a cluster in order, through every fault: collected garbage, emptied namespaces, endpoints, silent nodes,
//! accounts and what goes with them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Namespace, Node, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::rbac::v1::ClusterRole;
use minke_api::{Key, Kind, Object};
use minke_client::{DeleteOptions, Patch, Propagation, Target};
use minke_testing::sim::{self, Api, Sim};
use serde_json::{Value, json};

mod common;
use common::through_all;

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn web(replicas: i32) -> Value {
    sim::web(replicas, json!({ "name": "c", "image": "web" }))
}

/// Makes a ConfigMap that these own, and whose end they wait for in the foreground.
fn map(sim: &Sim, name: &str, owners: &[&Object]) -> std::sync::Arc<Object> {
    let owners: Vec<Value> = owners.iter().map(|owner| reference(owner)).collect();
    let metadata = json!({ "name": name, "ownerReferences": owners });
    sim.create(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata }))
}

fn reference(owner: &Object) -> Value {
    json!({
        "apiVersion": owner.kind().api_version(), "kind": owner.kind().kind,
        "name": owner.name(), "uid": owner.uid(), "blockOwnerDeletion": true,
    })
}

fn is_there(api: &Api, name: &str) -> bool {
    api.get(Kind::of::<ConfigMap>(), &Key::new("default", name)).is_some()
}

/// Whatever is owned by something in this cluster has an owner that is there.
#[track_caller]
fn check_nothing_left_behind(sim: &Sim) {
    let all = sim.api.all();
    let uids: BTreeSet<&str> = all.iter().map(|object| object.uid()).collect();
    for object in all.iter().filter(|object| object.kind().kind != "Event") {
        for owner in object.owners() {
            assert!(
                uids.contains(&*owner.uid),
                "{} {} is owned by {} {}, which is gone",
                object.kind().plural,
                object.key(),
                owner.kind,
                owner.name
            );
        }
    }
}

async fn collect(mut sim: Sim) -> Sim {
    let [root, other, patron] = ["root", "other", "patron"].map(|name| map(&sim, name, &[]));
    let child = map(&sim, "child", &[&root]);
    map(&sim, "leaf", &[&child]);
    map(&sim, "shared", &[&root, &other]);
    map(&sim, "freed", &[&patron]);
    // One owns the other in a circle, and something hangs on it.
    let first = map(&sim, "first", &[]);
    let second = map(&sim, "second", &[&first]);
    map(&sim, "hanging", &[&second]);
    sim.patch::<ConfigMap>("first", json!({ "metadata": { "ownerReferences": [reference(&second)] } })).await;
    // The owner of this one never was here; and that of this one cannot be looked for.
    let mut never = reference(&root);
    never["uid"] = "never".into();
    never["name"] = "never".into();
    let orphan = |name: &str, owner: &Value| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "ownerReferences": [owner] } });
    sim.create(orphan("lost", &never));
    sim.create(web(2));
    sim.api.check(|api| {
        let rules = [
            ("shared", is_there(api, "shared") || !is_there(api, "other")),
            ("freed", is_there(api, "freed")),
            ("hanging", is_there(api, "second") || !is_there(api, "hanging")),
        ];
        match rules.iter().find(|(_, holds)| !holds) {
            Some((name, _)) => Err(format!("{name} went too early, or not before what owns it")),
            None => Ok(()),
        }
    });
    sim.settle(minutes(5)).await;
    assert!(!is_there(&sim.api, "lost"), "its owner was never there");
    sim.delete::<ConfigMap>("root", Propagation::Background).await.unwrap();
    sim.delete::<ConfigMap>("patron", Propagation::Orphan).await.unwrap();
    sim.delete::<ConfigMap>("first", Propagation::Foreground).await.unwrap();
    sim.delete::<Deployment>("web", Propagation::Foreground).await.unwrap();
    sim.settle(minutes(5)).await;
    let left: Vec<String> = sim.list::<ConfigMap>().into_iter().filter_map(|map| map.metadata.name).collect();
    assert_eq!(
        left.iter().filter(|name| *name != "kube-root-ca.crt").collect::<Vec<_>>(),
        ["freed", "other", "shared"]
    );
    let owners =
        |name: &str| sim.get::<ConfigMap>(name).unwrap().metadata.owner_references.unwrap_or_default();
    assert_eq!(owners("freed").len(), 0);
    assert_eq!(owners("shared").iter().map(|owner| owner.name.as_str()).collect::<Vec<_>>(), ["other"]);
    assert!(sim.list::<Pod>().is_empty());
    check_nothing_left_behind(&sim);
    sim
}

#[test]
fn nothing_owned_is_left_behind_and_nothing_else_taken() {
    through_all(20, 15, collect);
}

#[tokio::test(start_paused = true)]
async fn owners_elsewhere_are_none_and_that_is_told() {
    let mut sim = Sim::new(1);
    let owner = map(&sim, "owner", &[]);
    sim.create(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "far" } }));
    let metadata = |namespace: Value| json!({ "name": "far", "namespace": namespace, "ownerReferences": [reference(&owner)] });
    sim.create(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("far".into()) }));
    // In no namespace, nobody knows where to look for its owner: it is left alone.
    sim.create(json!({ "apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata(Value::Null) }));
    // Of a kind that nobody knows.
    let mut unheard = reference(&owner);
    unheard["kind"] = "Unheard".into();
    unheard["uid"] = "u".into();
    sim.create(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "odd", "ownerReferences": [unheard] } }));
    sim.settle(minutes(5)).await;
    assert!(sim.api.get(Kind::of::<ConfigMap>(), &Key::new("far", "far")).is_none());
    assert!(is_there(&sim.api, "odd") && is_there(&sim.api, "owner"));
    let told = sim.events("OwnerRefInvalidNamespace");
    let text = |namespace: &str| {
        format!(
            "ownerRef [v1/ConfigMap, namespace: {namespace}, name: owner, uid: {}] does not exist in namespace {namespace:?}",
            owner.uid()
        )
    };
    assert_eq!(told.iter().cloned().collect::<BTreeSet<_>>(), [text("far"), text("")].into());
}

async fn close(mut sim: Sim) -> Sim {
    sim.create(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop" } }));
    let mut deployment = web(3);
    deployment["metadata"]["namespace"] = "shop".into();
    sim.create(deployment);
    let in_shop = |kind: &str, name: &str| json!({ "apiVersion": "v1", "kind": kind, "metadata": { "name": name, "namespace": "shop" } });
    sim.create(in_shop("Secret", "password"));
    let mut held = in_shop("ConfigMap", "held");
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    sim.create(held);
    sim.settle(minutes(5)).await;
    sim.api.check(|api| {
        let shop = Key::new("", "shop");
        let here = |kind| api.list(kind).iter().filter(|object| object.namespace() == "shop").count();
        let everything = api.all().iter().filter(|object| object.namespace() == "shop").count();
        let gone = api.get(Kind::of::<Namespace>(), &shop).is_none();
        match () {
            () if gone && everything > 0 => Err(format!("{everything} objects are in no namespace")),
            () if here(Kind::of::<Pod>()) > 0 && here(Kind::of::<Secret>()) == 0 => {
                Err("the secret went before the pods that may use it".to_owned())
            }
            () => Ok(()),
        }
    });
    sim.delete::<Namespace>("shop", Propagation::Background).await.unwrap();
    sim.pass(minutes(3)).await;
    let namespace = sim.get::<Namespace>("shop").expect("something holds it");
    let conditions = namespace.status.unwrap().conditions.unwrap();
    let message =
        |type_: &str| conditions.iter().find(|c| c.type_ == type_).and_then(|c| c.message.clone()).unwrap();
    assert_eq!(
        message("NamespaceContentRemaining"),
        "Some resources are remaining: configmaps. has 1 resource instances"
    );
    assert_eq!(
        message("NamespaceFinalizersRemaining"),
        "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances"
    );
    let user = sim.client("user");
    let held = Target::object(Kind::of::<ConfigMap>(), "shop", "held");
    user.patch(held, Patch::Merge(json!({ "metadata": { "finalizers": null } }))).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<Namespace>("shop").is_none());
    check_nothing_left_behind(&sim);
    sim
}

#[test]
fn a_namespace_goes_with_all_that_is_in_it_pods_first() {
    through_all(20, 10, close);
}

/// The addresses of the slices of a service that are ready, each once.
#[track_caller]
fn ready_addresses(sim: &Sim, service: &str) -> BTreeSet<String> {
    let of_service = |slice: &EndpointSlice| {
        slice.metadata.labels.as_ref().is_some_and(|labels| {
            labels.get("kubernetes.io/service-name").is_some_and(|name| name == service)
        })
    };
    let mut addresses = BTreeSet::new();
    for slice in sim.list::<EndpointSlice>().into_iter().filter(of_service) {
        for endpoint in slice.endpoints.unwrap_or_default() {
            let ready = endpoint.conditions.unwrap_or_default().ready == Some(true);
            for address in endpoint.addresses.into_iter().filter(|_| ready) {
                assert!(addresses.insert(address.clone()), "{address} is named twice");
            }
        }
    }
    addresses
}

fn service(name: &str, selector: Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": {
        "selector": selector, "ports": [{ "port": 80 }], "clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"] } })
}

async fn serve(mut sim: Sim) -> Sim {
    sim.create(service("web", json!({ "app": "web" })));
    sim.create(service("db", Value::Null));
    sim.create(json!({ "apiVersion": "v1", "kind": "Endpoints", "metadata": { "name": "db" },
        "subsets": [{ "addresses": [{ "ip": "192.0.2.7" }, { "ip": "192.0.2.8" }], "ports": [{ "port": 5432 }] }] }));
    sim.create(web(3));
    for replicas in [3, 1, 0] {
        sim.patch::<Deployment>("web", json!({ "spec": { "replicas": replicas } })).await;
        sim.settle(minutes(5)).await;
        let pods = sim.list::<Pod>();
        let want: BTreeSet<String> =
            pods.iter().filter_map(|pod| pod.status.as_ref()?.pod_ip.clone()).collect();
        assert_eq!((want.len() as i32, ready_addresses(&sim, "web")), (replicas, want.clone()));
        let subsets = sim.get::<Endpoints>("web").unwrap().subsets.unwrap_or_default();
        let told = subsets.iter().flat_map(|subset| subset.addresses.iter().flatten());
        assert_eq!(told.map(|address| address.ip.clone()).collect::<BTreeSet<_>>(), want);
    }
    assert_eq!(ready_addresses(&sim, "db"), ["192.0.2.7", "192.0.2.8"].map(str::to_owned).into());
    let fewer = json!({ "subsets": [{ "addresses": [{ "ip": "192.0.2.8" }], "ports": [{ "port": 5432 }] }] });
    sim.patch::<Endpoints>("db", fewer).await;
    sim.settle(minutes(5)).await;
    assert_eq!(ready_addresses(&sim, "db"), ["192.0.2.8".to_owned()].into());
    sim.delete::<Service>("web", Propagation::Background).await.unwrap();
    sim.delete::<Service>("db", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<Endpoints>("web").is_none());
    assert_eq!(sim.list::<EndpointSlice>().len(), 0);
    check_nothing_left_behind(&sim);
    sim
}

#[test]
fn endpoints_are_where_pods_are() {
    through_all(20, 8, serve);
}

#[tokio::test(start_paused = true)]
async fn endpoints_tell_the_zone_of_their_node() {
    let mut sim = Sim::new(4).nodes(1);
    sim.create(service("web", json!({ "app": "web" })));
    sim.create(web(2));
    sim.settle(minutes(5)).await;
    let zones = |sim: &Sim| {
        let slices = sim.list::<EndpointSlice>();
        let endpoints = slices.into_iter().flat_map(|slice| slice.endpoints.unwrap_or_default());
        endpoints.map(|endpoint| endpoint.zone.unwrap_or_default()).collect::<Vec<_>>()
    };
    assert_eq!(zones(&sim), ["", ""]);
    for zone in ["a", "b"] {
        let labels = json!({ "metadata": { "labels": { "topology.kubernetes.io/zone": zone } } });
        sim.patch::<Node>("node1", labels).await;
        sim.settle(minutes(5)).await;
        assert_eq!(zones(&sim), [zone, zone]);
    }
}

/// How often objects of this kind were written.
fn writes(sim: &Sim, plural: &str) -> usize {
    let kind = format!(" {plural} ");
    sim.api.last(usize::MAX).iter().filter(|write| write.what.contains(&kind)).count()
}

#[tokio::test(start_paused = true)]
async fn a_crowd_is_in_slices_of_a_hundred_of_which_one_changes() {
    const PODS: usize = 1050;
    let mut sim = Sim::new(3);
    let user = sim.client("user");
    let pods = Kind::of::<Pod>();
    let state = |n: usize, ready: &str| {
        let ip = format!("10.1.{}.{}", n / 250, n % 250);
        let status = json!({ "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": ready, "lastTransitionTime": "2023-11-14T22:13:20Z" }] });
        Patch::Merge(json!({ "status": status }))
    };
    for n in 0..PODS {
        let name = format!("web-{n}");
        sim.create(json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": "web" } },
            "spec": { "schedulerName": "nobody", "containers": [{ "name": "c", "image": "web" }] } }));
        user.patch(Target::object(pods, "default", &name).sub("status"), state(n, "True")).await.unwrap();
    }
    sim.create(service("web", json!({ "app": "web" })));
    sim.settle(minutes(2)).await;
    let sizes = |sim: &Sim| {
        let slices = sim.list::<EndpointSlice>();
        slices.iter().map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len)).collect::<Vec<_>>()
    };
    assert!(sizes(&sim).len() >= 11 && sizes(&sim).iter().all(|size| *size <= 100), "{:?}", sizes(&sim));
    assert_eq!(ready_addresses(&sim, "web").len(), PODS);
    let endpoints = sim.get::<Endpoints>("web").unwrap();
    let annotations = endpoints.metadata.annotations.unwrap_or_default();
    assert_eq!(
        annotations.get("endpoints.kubernetes.io/over-capacity").map(String::as_str),
        Some("truncated")
    );
    assert_eq!(endpoints.subsets.unwrap()[0].addresses.as_ref().unwrap().len(), 1000);

    let before = writes(&sim, "endpointslices");
    user.patch(Target::object(pods, "default", "web-5").sub("status"), state(5, "False")).await.unwrap();
    sim.settle(minutes(2)).await;
    assert_eq!((ready_addresses(&sim, "web").len(), writes(&sim, "endpointslices") - before), (PODS - 1, 1));

    // What goes leaves room that is not moved together: one write for each slice, at most.
    let before = writes(&sim, "endpointslices");
    for n in 900..PODS {
        let name = format!("web-{n}");
        user.delete(Target::object(pods, "default", &name), DeleteOptions::default()).await.unwrap();
    }
    sim.settle(minutes(2)).await;
    assert_eq!(ready_addresses(&sim, "web").len(), 899);
    let annotations = sim.get::<Endpoints>("web").unwrap().metadata.annotations.unwrap_or_default();
    assert!(!annotations.contains_key("endpoints.kubernetes.io/over-capacity"), "all fit again");
    println!(
        "{} writes of slices for {} pods that went",
        writes(&sim, "endpointslices") - before,
        PODS - 900
    );
}

fn is_ready(node: &Node) -> bool {
    let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn given_up(node: &Node) -> Option<i64> {
    let mut taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let taint =
        taints.find(|taint| taint.key == "node.kubernetes.io/unreachable" && taint.effect == "NoExecute")?;
    taint.time_added.as_ref().map(|time| time.0.as_second())
}

async fn lose_a_node(mut sim: Sim) -> Sim {
    const PATIENCE: i64 = 60;
    let mut deployment = web(4);
    let bear = |key: &str| json!({ "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": PATIENCE });
    deployment["spec"]["template"]["spec"]["tolerations"] =
        json!([bear("node.kubernetes.io/not-ready"), bear("node.kubernetes.io/unreachable")]);
    sim.create(deployment);
    sim.settle(minutes(5)).await;
    sim.api.check(|api| {
        let node = api.get(Kind::of::<Node>(), &Key::new("", "node2"));
        let since = node.and_then(|node| given_up(&*node.view::<Node>().ok()?));
        for pod in api.list(Kind::of::<Pod>()) {
            let on_it = pod.field("spec.nodeName") == Some("node2");
            let Some(grace_ends) = pod.deleted().filter(|_| on_it) else { continue };
            let asked = grace_ends.as_second() - 30;
            if since.is_none_or(|since| asked < since + PATIENCE) {
                return Err(format!("{} was evicted at {asked}, its node given up at {since:?}", pod.name()));
            }
        }
        Ok(())
    });
    sim.silence("node2");
    sim.pass(minutes(5)).await;
    assert!(!is_ready(&sim.get::<Node>("node2").unwrap()));
    let on = |sim: &Sim, node: &str| {
        let pods = sim.list::<Pod>();
        pods.iter().filter(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some(node)).count()
    };
    assert_eq!((on(&sim, "node1"), on(&sim, "node2")), (4, 0));
    sim.revive("node2");
    sim.settle(minutes(5)).await;
    let node = sim.get::<Node>("node2").unwrap();
    assert!(is_ready(&node) && node.spec.unwrap().taints.is_none());
    // Now it is lost for good.
    sim.patch::<Deployment>("web", json!({ "spec": { "replicas": 8 } })).await;
    sim.settle(minutes(5)).await;
    assert!(on(&sim, "node2") > 0);
    sim
}

#[test]
fn a_silent_node_is_given_up_in_time_and_taken_back() {
    through_all(20, 5, lose_a_node);
}

async fn keep_accounts(mut sim: Sim) -> Sim {
    let role = |name: &str, verb: &str| {
        json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": { "name": name, "labels": { "into": "all" } },
        "rules": [{ "apiGroups": [""], "resources": ["pods"], "verbs": [verb] }] })
    };
    sim.create(role("get", "get"));
    sim.create(json!({ "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": { "name": "all" },
        "aggregationRule": { "clusterRoleSelectors": [{ "matchLabels": { "into": "all" } }] }, "rules": [] }));
    sim.create(json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": "bot" } }));
    sim.create(json!({ "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
        "metadata": { "name": "key", "annotations": { "kubernetes.io/service-account.name": "bot" } } }));
    sim.create(json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "new" } }));
    sim.settle(minutes(5)).await;
    assert_eq!((sim.list::<ServiceAccount>().len(), sim.list::<ConfigMap>().len()), (6, 5));
    assert!(sim.get::<Secret>("key").is_some());
    sim.create(role("list", "list"));
    sim.delete::<ServiceAccount>("default", Propagation::Background).await.unwrap();
    sim.patch::<ConfigMap>("kube-root-ca.crt", json!({ "data": { "ca.crt": "forged" } })).await;
    sim.delete::<ServiceAccount>("bot", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<ServiceAccount>("default").is_some());
    assert_eq!(
        sim.get::<ConfigMap>("kube-root-ca.crt").unwrap().data.unwrap()["ca.crt"],
        "-----BEGIN CERTIFICATE-----"
    );
    assert!(sim.get::<Secret>("key").is_none(), "its account is gone");
    let rules = sim.get::<ClusterRole>("all").unwrap().rules.unwrap();
    assert_eq!(rules.into_iter().flat_map(|rule| rule.verbs).collect::<Vec<_>>(), ["get", "list"]);
    sim
}

#[test]
fn accounts_certificates_tokens_and_roles_are_kept() {
    through_all(10, 10, keep_accounts);
}

async fn forget_jobs(mut sim: Sim) -> Sim {
    let job = |name: &str, image: &str, ttl: Value| {
        json!({
            "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": name },
            "spec": {
                "completions": 1, "parallelism": 1, "backoffLimit": 0, "ttlSecondsAfterFinished": ttl,
                "selector": { "matchLabels": { "job-name": name } },
                "template": {
                    "metadata": { "labels": { "job-name": name } },
                    "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": image }] },
                },
            },
        })
    };
    sim.create(job("good", "once", 100.into()));
    sim.create(job("bad", "fails", 200.into()));
    sim.create(job("kept", "once", Value::Null));
    sim.pass(Duration::from_secs(90)).await;
    assert_eq!(sim.list::<Job>().len(), 3);
    sim.pass(Duration::from_secs(90)).await;
    assert_eq!(sim.list::<Job>().len(), 2);
    sim.pass(Duration::from_secs(120)).await;
    sim.settle(minutes(5)).await;
    let left: BTreeMap<_, _> = sim
        .list::<Pod>()
        .into_iter()
        .map(|pod| (pod.metadata.labels.unwrap()["job-name"].clone(), ()))
        .collect();
    assert_eq!((sim.list::<Job>().len(), left.into_keys().collect::<Vec<_>>()), (1, vec!["kept".to_owned()]));
    check_nothing_left_behind(&sim);
    sim
}

#[test]
fn finished_jobs_go_in_their_time() {
    through_all(10, 10, forget_jobs);
}
