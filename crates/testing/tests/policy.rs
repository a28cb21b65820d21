//! Leader election, large outages and mirrored endpoints, in the simulated cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Endpoints, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_client::Propagation;
use minke_client::leader::{Election, lead};
use minke_testing::sim::Sim;
use serde_json::json;
use tokio_util::sync::CancellationToken;

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Someone who wants to lead; counts how many lead at once.
fn candidate(sim: &Sim, identity: &str, leading: &Arc<AtomicUsize>) -> CancellationToken {
    let election = Election {
        client: sim.client(identity),
        namespace: "kube-system",
        name: "kube-controller-manager",
        identity: identity.to_owned(),
        clock: sim.api.clock(),
    };
    let (stop, leading) = (CancellationToken::new(), leading.clone());
    let work = move |term: CancellationToken| {
        let leading = leading.clone();
        async move {
            assert_eq!(leading.fetch_add(1, Ordering::SeqCst), 0, "one leads at a time");
            term.cancelled().await;
            leading.fetch_sub(1, Ordering::SeqCst);
        }
    };
    tokio::spawn(lead(election, stop.clone(), work));
    stop
}

fn holder(sim: &Sim) -> (String, i32) {
    let lease: Lease = sim
        .list::<Lease>()
        .into_iter()
        .find(|lease| lease.metadata.name.as_deref() == Some("kube-controller-manager"))
        .expect("there is a lease");
    let spec = lease.spec.unwrap();
    (spec.holder_identity.unwrap_or_default(), spec.lease_transitions.unwrap_or_default())
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_another_follows_when_it_goes() {
    let mut sim = Sim::new(21);
    let leading = Arc::new(AtomicUsize::new(0));
    let a = candidate(&sim, "a", &leading);
    sim.pass(Duration::from_millis(100)).await;
    assert_eq!(holder(&sim), ("a".to_owned(), 0), "nobody has to be waited for");
    let b = candidate(&sim, "b", &leading);
    sim.pass(seconds(60)).await;
    assert_eq!(holder(&sim).0, "a");
    // Who ends gives the lease back, and the next need not wait until it runs out.
    a.cancel();
    sim.pass(seconds(2)).await;
    assert_eq!(holder(&sim), ("b".to_owned(), 1));
    assert_eq!(leading.load(Ordering::SeqCst), 1);
    assert_eq!(sim.events("LeaderElection").len(), 2);
    b.cancel();
    sim.pass(seconds(2)).await;
    assert_eq!((holder(&sim).0.as_str(), leading.load(Ordering::SeqCst)), ("", 0));
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_one_that_vanished_runs_out() {
    let mut sim = Sim::new(22);
    let leading = Arc::new(AtomicUsize::new(0));
    let lease = |identity: &str| {
        json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": "kube-controller-manager", "namespace": "kube-system"},
            "spec": {"holderIdentity": identity, "leaseDurationSeconds": 15, "leaseTransitions": 4}})
    };
    sim.create(lease("gone"));
    let _a = candidate(&sim, "a", &leading);
    sim.pass(seconds(14)).await;
    assert_eq!(holder(&sim).0, "gone");
    sim.pass(seconds(2)).await;
    assert_eq!(holder(&sim), ("a".to_owned(), 5));
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_under_its_name_goes_on_at_once() {
    let mut sim = Sim::new(23);
    let leading = Arc::new(AtomicUsize::new(0));
    sim.create(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "kube-controller-manager", "namespace": "kube-system"},
        "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15, "leaseTransitions": 4}}));
    let _a = candidate(&sim, "a", &leading);
    sim.pass(Duration::from_millis(100)).await;
    assert_eq!((holder(&sim), leading.load(Ordering::SeqCst)), (("a".to_owned(), 4), 1));
}

/// When nodes were given up.
fn given_up(sim: &Sim) -> Vec<i64> {
    let nodes = sim.list::<Node>();
    let taints = nodes.iter().flat_map(|node| node.spec.iter().flat_map(|spec| spec.taints.iter().flatten()));
    let ours =
        taints.filter(|taint| taint.key == "node.kubernetes.io/unreachable" && taint.effect == "NoExecute");
    let mut times: Vec<i64> = ours.map(|taint| taint.time_added.as_ref().unwrap().0.as_second()).collect();
    times.sort_unstable();
    times
}

#[tokio::test(start_paused = true)]
async fn silent_nodes_are_given_up_one_after_another_and_never_all() {
    let mut sim = Sim::new(24).nodes(5);
    sim.settle(seconds(120)).await;
    sim.silence("node1");
    sim.silence("node2");
    sim.pass(seconds(90)).await;
    let times = given_up(&sim);
    assert!(times.len() == 2 && (10..=12).contains(&(times[1] - times[0])), "{times:?}");
    // Three of five: too much to believe, and what is given up stays so.
    sim.silence("node3");
    sim.pass(seconds(120)).await;
    assert_eq!(given_up(&sim), times);
    // Nobody is heard at all: it is more likely our fault, and all is forgiven.
    sim.silence("node4");
    sim.silence("node5");
    sim.pass(seconds(120)).await;
    assert_eq!(given_up(&sim), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_people_write_become_slices() {
    let mut sim = Sim::new(25);
    let meta = json!({"name": "db", "namespace": "default"});
    sim.create(
        json!({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 5432}]}}),
    );
    sim.create(json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": meta,
        "subsets": [{"addresses": [{"ip": "192.0.2.7"}], "ports": [{"port": 5432}]}]}));
    sim.settle(seconds(60)).await;
    let slices = sim.list::<EndpointSlice>();
    assert_eq!(slices.len(), 1);
    let labels = slices[0].metadata.labels.clone().unwrap();
    assert_eq!(labels["kubernetes.io/service-name"], "db");
    assert_eq!(labels["endpointslice.kubernetes.io/managed-by"], "endpointslicemirroring-controller.k8s.io");
    assert_eq!(slices[0].endpoints.as_ref().unwrap()[0].addresses, ["192.0.2.7"]);
    sim.delete::<Endpoints>("db", Propagation::Background).await.unwrap();
    sim.settle(seconds(60)).await;
    assert!(sim.list::<EndpointSlice>().is_empty(), "they go with the Endpoints");
    sim.delete::<Service>("db", Propagation::Background).await.unwrap();
}
