//! Tests of the pure part: Services and slices in, outcomes of packets out.

mod frontends;
mod kernel;
mod transactions;

use minke_api::{Kind, Object};
use minke_client::Change as Event;
use minke_network::ClusterId;
use serde_json::{Value, json};
use std::sync::Arc;

use crate::runner::{ProxyConfig, State};
use crate::tables::Change;
use kernel::Kernel;

/// A node and its kernel, to which events are told.
struct Node {
    state: State,
    kernel: Kernel,
    objects: std::collections::BTreeMap<(String, String), Arc<Object>>,
}

impl Node {
    fn new() -> Node {
        let config = ProxyConfig {
            cluster: ClusterId::parse("abcdef").unwrap(),
            node_name: "here".into(),
            zone: Some("a".into()),
            node_address: "192.0.2.2".parse().unwrap(),
            pod_cidr: "10.244.0.0/24".parse().unwrap(),
            cluster_cidr: "10.244.0.0/16".parse().unwrap(),
        };
        Node { state: State::new(config), kernel: Kernel::default(), objects: Default::default() }
    }

    fn with(objects: impl IntoIterator<Item = Value>) -> Node {
        let mut node = Node::new();
        objects.into_iter().for_each(|object| node.tell(object));
        node.settle();
        node
    }

    /// The object is so now.
    fn tell(&mut self, object: Value) {
        let kind = object["kind"].as_str().unwrap().to_owned();
        let row = match &*kind {
            "Service" => Kind::by_api_version("v1", "Service"),
            "Pod" => Kind::by_api_version("v1", "Pod"),
            _ => Kind::by_api_version("discovery.k8s.io/v1", "EndpointSlice"),
        };
        let object = Arc::new(Object::from_value(row.unwrap(), &object).unwrap());
        let old = self.objects.insert((kind.clone(), object.name().to_owned()), object.clone());
        self.event(&kind, Event { old, new: Some(object) });
    }

    fn delete(&mut self, kind: &str, name: &str) {
        let old = self.objects.remove(&(kind.to_owned(), name.to_owned()));
        assert!(old.is_some(), "there is no {kind} {name}");
        self.event(kind, Event { old, new: None });
    }

    fn event(&mut self, kind: &str, event: Event) {
        match kind {
            "Service" => self.state.service(event),
            "Pod" => self.state.pod(event),
            _ => self.state.slice(event),
        }
    }

    /// One transaction; returns its script.
    fn settle(&mut self) -> String {
        let mut change = Change::default();
        self.state.settle(&mut change);
        self.kernel.apply(&change);
        change.script(self.state.tables.config())
    }
}

/// A Service called `web` with the ports 80 -> http, and what `more` says.
fn service(more: Value) -> Value {
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": "web", "uid": "1", "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
        },
    });
    merge(&mut service, more);
    service
}

/// A slice of `web` with endpoints as `endpoint` makes them.
fn slice(endpoints: impl IntoIterator<Item = Value>) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": "web-1", "uid": "2",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.into_iter().collect::<Vec<Value>>(),
    })
}

/// 10.244.NODE.NUMBER; node 0 is here. `state` is one of ready, unready, leaving, gone.
fn endpoint(node: u8, number: u8, state: &str) -> Value {
    let (ready, serving, terminating) = match state {
        "ready" => (true, true, false),
        "unready" => (false, false, false),
        "leaving" => (false, true, true),
        "gone" => (false, false, true),
        _ => panic!("what is {state}?"),
    };
    json!({
        "addresses": [format!("10.244.{node}.{number}")],
        "nodeName": if node == 0 { "here" } else { "there" },
        "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
    })
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}
