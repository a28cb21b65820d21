//! From one state to the next: small scripts, drains, claims, and that a change leads where it should.

use proptest::prelude::*;
use serde_json::json;
use tokio::sync::oneshot;

use super::{Node, endpoint, service, slice};
use crate::drain::Request;
use crate::tables::Tables;

#[test]
fn a_change_of_endpoints_is_a_few_elements() {
    let mut node =
        Node::with([service(json!({})), slice([endpoint(0, 2, "ready"), endpoint(1, 3, "ready")])]);
    node.tell(slice([endpoint(0, 2, "ready"), endpoint(1, 4, "ready")]));
    assert_eq!(
        node.settle(),
        "delete element ip minke-abcdef-services address-2 { 10.96.0.7 . tcp . 80 . 1 }\n\
         add element ip minke-abcdef-services address-2 { 10.96.0.7 . tcp . 80 . 1 : 10.244.1.4 . 8080 }\n"
    );
    node.check_kernel();
}

#[test]
fn what_changes_nothing_makes_no_transaction() {
    let mut node = Node::with([service(json!({})), slice([endpoint(0, 2, "ready")])]);
    node.tell(service(json!({"metadata": {"labels": {"a": "b"}}})));
    node.tell(slice([endpoint(0, 2, "ready"), endpoint(0, 3, "unready")]));
    assert_eq!(node.settle(), "");
    // There and back in between.
    node.tell(slice([]));
    node.tell(slice([endpoint(0, 2, "ready")]));
    assert_eq!(node.settle(), "");
}

#[test]
fn a_deleted_service_leaves_nothing() {
    let mut node = Node::with([service(json!({})), slice([endpoint(0, 2, "ready")])]);
    node.delete("Service", "web");
    node.settle();
    node.delete("EndpointSlice", "web-1");
    node.settle();
    assert!(node.state.tables.elements().is_empty());
    node.check_kernel();
}

#[test]
fn slices_may_come_before_their_service_and_in_parts() {
    let mut node = Node::with([slice([endpoint(0, 2, "ready")])]);
    let mut second = slice([endpoint(0, 3, "ready")]);
    second["metadata"]["name"] = json!("web-2");
    node.tell(second);
    node.tell(service(json!({})));
    node.settle();
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "to 10.244.0.2:8080 10.244.0.3:8080");
    node.delete("EndpointSlice", "web-1");
    node.settle();
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "to 10.244.0.3:8080");
}

/// The waiter is answered by the runner after the transaction.
fn drain(node: &mut Node, address: &str) {
    node.state.request(Request::Drain(address.parse().unwrap(), oneshot::channel().0));
}

#[test]
fn a_draining_pod_leaves_at_once_and_serves_only_as_the_last() {
    let mut node =
        Node::with([service(json!({})), slice([endpoint(0, 2, "ready"), endpoint(0, 3, "ready")])]);
    drain(&mut node, "10.244.0.2");
    assert_ne!(node.settle(), "");
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "to 10.244.0.3:8080");
    // The slices say so, later. Nothing is left to do.
    node.tell(slice([endpoint(0, 2, "leaving"), endpoint(0, 3, "ready")]));
    assert_eq!(node.settle(), "");
    // As upstream: nobody else is there.
    drain(&mut node, "10.244.0.3");
    node.settle();
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "to 10.244.0.2:8080 10.244.0.3:8080");
    node.tell(slice([endpoint(0, 2, "gone"), endpoint(0, 3, "gone")]));
    node.settle();
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "refused");
    // The address is another pod's now.
    node.state.request(Request::Forget("10.244.0.2".parse().unwrap()));
    node.tell(slice([endpoint(0, 2, "ready"), endpoint(0, 3, "gone")]));
    node.settle();
    assert_eq!(node.trace("10.244.0.9 > 10.96.0.7:80"), "to 10.244.0.2:8080");
    node.check_kernel();
}

#[test]
fn of_several_that_claim_a_frontend_the_oldest_has_it() {
    let named = |name: &str, time: &str, endpoint_name: &str| {
        let object = service(json!({
            "metadata": {"name": name, "creationTimestamp": time},
            "spec": {"clusterIPs": [format!("10.96.1.{}", name.len())], "externalIPs": ["203.0.113.5"]},
        }));
        let mut slice = slice([endpoint(0, name.len() as u8, "ready")]);
        slice["metadata"]["name"] = json!(endpoint_name);
        slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(name);
        [object, slice]
    };
    let young = named("aaa", "2026-02-02T00:00:00Z", "s1");
    let old = named("bbbb", "2026-01-01T00:00:00Z", "s2");
    let mut node = Node::with(young.into_iter().chain(old));
    assert_eq!(node.trace("198.51.100.1 > 203.0.113.5:80"), "masquerade to 10.244.0.4:8080");
    node.delete("Service", "bbbb");
    node.settle();
    assert_eq!(node.trace("198.51.100.1 > 203.0.113.5:80"), "masquerade to 10.244.0.3:8080");
    node.check_kernel();
}

#[test]
fn the_ruleset_reads_as_reviewed() {
    let object = service(json!({"spec": {
        "type": "NodePort", "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    }}));
    let mut node = Node::with([object, slice([endpoint(0, 2, "ready"), endpoint(1, 3, "ready")])]);
    let ruleset = node.state.tables.load();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tests/ruleset.nft");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        std::fs::write(path, &ruleset).unwrap();
    }
    assert_eq!(ruleset, std::fs::read_to_string(path).unwrap(), "UPDATE_EXPECT=1 accepts the change");
}

/// One step in the life of a few Services that get into each other's way.
#[derive(Debug, Clone)]
enum Step {
    Service { name: usize, kind: usize, local: bool, sticky: bool, created: u8 },
    Slice { name: usize, endpoints: Vec<(u8, u8, usize)> },
    Delete(usize),
    Drain(u8, u8),
    Forget(u8, u8),
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let endpoints = prop::collection::vec((0u8..2, 2u8..5, 0usize..4), 0..5);
    let step = prop_oneof![
        3 => (0..3usize, 0..4usize, any::<bool>(), any::<bool>(), 0u8..9)
            .prop_map(|(name, kind, local, sticky, created)| Step::Service { name, kind, local, sticky, created }),
        3 => (0..3usize, endpoints).prop_map(|(name, endpoints)| Step::Slice { name, endpoints }),
        1 => (0..6usize).prop_map(Step::Delete),
        1 => (0u8..2, 2u8..5).prop_map(|(node, number)| Step::Drain(node, number)),
        1 => (0u8..2, 2u8..5).prop_map(|(node, number)| Step::Forget(node, number)),
        2 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 1..40)
}

fn take(node: &mut Node, step: Step) {
    const STATES: [&str; 4] = ["ready", "unready", "leaving", "gone"];
    match step {
        Step::Service { name, kind, local, sticky, created } => node.tell(service(json!({
            "metadata": {"name": format!("s{name}"), "creationTimestamp": format!("2026-01-0{}T00:00:00Z", created + 1)},
            "spec": {
                "type": (["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"][kind]),
                "clusterIPs": [format!("10.96.1.{name}")],
                "externalIPs": ["203.0.113.5"],
                "externalTrafficPolicy": if local { "Local" } else { "Cluster" },
                "internalTrafficPolicy": if local && sticky { "Local" } else { "Cluster" },
                "sessionAffinity": if sticky { "ClientIP" } else { "None" },
                "ports": [
                    {"name": "http", "port": 80, "nodePort": if kind > 0 { 30080 } else { 0 }},
                    {"name": "http", "port": 53, "protocol": "UDP"},
                ],
            },
        }))),
        Step::Slice { name, endpoints } => {
            let endpoints = endpoints.into_iter().map(|(node, number, state)| endpoint(node, number, STATES[state]));
            let mut slice = slice(endpoints);
            slice["metadata"]["name"] = json!(format!("e{name}"));
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(format!("s{name}"));
            node.tell(slice);
        }
        Step::Delete(i) => {
            let (kind, name) = if i < 3 { ("Service", format!("s{i}")) } else { ("EndpointSlice", format!("e{}", i - 3)) };
            if node.objects.contains_key(&(kind.to_owned(), name.clone())) {
                node.delete(kind, &name);
            }
        }
        Step::Drain(pods, number) => drain(node, &format!("10.244.{pods}.{number}")),
        Step::Forget(pods, number) => {
            node.state.request(Request::Forget(format!("10.244.{pods}.{number}").parse().unwrap()));
        }
        Step::Settle => drop(node.settle()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Transactions one after the other lead to what a fresh start with the same objects leads to.
    #[test]
    fn transactions_lead_to_the_desired_state(steps in steps()) {
        let mut node = Node::new();
        for step in steps {
            take(&mut node, step);
        }
        node.settle();
        node.check_kernel();

        let objects: Vec<_> = node.objects.values().map(|object| object.value()).collect();
        let mut fresh = Node::new();
        for address in (0..2).flat_map(|pods| (2..5).map(move |number| format!("10.244.{pods}.{number}"))) {
            if node.state.is_draining(address.parse().unwrap()) {
                drain(&mut fresh, &address);
            }
        }
        objects.into_iter().for_each(|object| fresh.tell(object));
        fresh.settle();
        prop_assert_eq!(node.state.tables.elements(), fresh.state.tables.elements());
    }
}

#[test]
fn tables_without_services_are_valid_and_empty() {
    let node = Node::new();
    let mut tables = Tables::new(node.state.tables.config().clone());
    assert!(!tables.load().contains("add element"));
}
