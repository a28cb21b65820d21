//! The picture of the nodes: what each has, what runs on it, kept up to date change by change.
//!
//! Nodes lie in one array; filters and scores run over it. Pods that were given a node but are not yet
//! known to be bound (*assumed*) count as if they were.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node as NodeObject, Pod, Taint};
use minke_api::{Key, Object};
use minke_client::typed;

use crate::resources::{Resources, pod_requests, scored_requests};

/// What scheduling needs to know of a pod, worked out once per revision.
#[derive(Debug, Clone)]
pub struct PodInfo {
    pub object: Arc<Object>,
    pub pod: Arc<Pod>,
    pub requests: Resources,
    /// CPU in thousandths and memory in bytes, with scoring's defaults.
    pub scored: (i64, i64),
    pub host_ports: Vec<HostPort>,
    pub priority: i32,
}

/// A port of the node that a pod takes. The address is empty for all addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    pub ip: String,
    pub protocol: String,
    pub port: i32,
}

impl PodInfo {
    /// `None` when the object does not fit its type; that has been logged.
    pub fn new(object: &Arc<Object>) -> Option<PodInfo> {
        let pod = typed::<Pod>(object)?;
        Some(PodInfo {
            requests: pod_requests(&pod),
            scored: scored_requests(&pod),
            host_ports: host_ports(&pod),
            priority: pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default(),
            object: object.clone(),
            pod,
        })
    }

    pub fn node_name(&self) -> &str {
        self.pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
    }

    /// Uid of the object that manages the pod, if any.
    pub fn owner(&self) -> Option<&str> {
        self.object.controller().map(|owner| &*owner.uid)
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let sidecars =
        spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(HostPort {
                ip: port.host_ip.clone().filter(|ip| ip != "0.0.0.0").unwrap_or_default(),
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port: port.host_port.filter(|port| *port > 0)?,
            })
        })
        .collect()
}

impl HostPort {
    pub fn clashes(&self, other: &HostPort) -> bool {
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip.is_empty() || other.ip.is_empty() || self.ip == other.ip)
    }
}

/// One node and what is on it.
#[derive(Debug)]
pub struct Node {
    pub name: Arc<str>,
    pub labels: BTreeMap<String, String>,
    pub taints: Vec<Taint>,
    pub unschedulable: bool,
    pub allocatable: Resources,
    pub pods_max: i64,
    pub used: Resources,
    /// As `used` for CPU and memory, with scoring's defaults.
    pub scored: (i64, i64),
    pub host_ports: Vec<HostPort>,
    /// Sizes in bytes of the images the node has, by every name it has them under.
    pub images: HashMap<String, i64>,
    pub pods: BTreeMap<Key, Arc<PodInfo>>,
    /// How many of `pods` each controlling owner has here.
    pub by_owner: HashMap<Box<str>, u32>,
    /// Whether the Node object exists; pods may be known before their node is.
    pub exists: bool,
}

impl Node {
    fn new(name: &str) -> Node {
        Node {
            name: name.into(),
            labels: BTreeMap::new(),
            taints: Vec::new(),
            unschedulable: false,
            allocatable: Resources::default(),
            pods_max: 0,
            used: Resources::default(),
            scored: (0, 0),
            host_ports: Vec::new(),
            images: HashMap::new(),
            pods: BTreeMap::new(),
            by_owner: HashMap::new(),
            exists: false,
        }
    }

    fn describe(&mut self, node: &NodeObject) {
        self.exists = true;
        self.labels = node.metadata.labels.clone().unwrap_or_default();
        let spec = node.spec.as_ref();
        self.taints = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default();
        self.unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or_default();
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        self.allocatable = Resources::read(allocatable);
        let pods = allocatable.and_then(|list| list.get("pods"));
        self.pods_max =
            pods.and_then(|text| minke_api::Quantity::parse(&text.0).ok()).map_or(0, |n| n.value());
        let images = node.status.iter().flat_map(|status| status.images.iter().flatten());
        self.images = images
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or_default();
                image.names.iter().flatten().map(move |name| (name.clone(), size))
            })
            .collect();
    }

    fn add(&mut self, info: Arc<PodInfo>) {
        self.used.add(&info.requests);
        self.scored.0 += info.scored.0;
        self.scored.1 += info.scored.1;
        self.host_ports.extend(info.host_ports.iter().cloned());
        if let Some(owner) = info.owner() {
            *self.by_owner.entry(owner.into()).or_default() += 1;
        }
        self.pods.insert(info.object.key().clone(), info);
    }

    fn remove(&mut self, key: &Key) -> Option<Arc<PodInfo>> {
        let info = self.pods.remove(key)?;
        self.used.subtract(&info.requests);
        self.scored.0 -= info.scored.0;
        self.scored.1 -= info.scored.1;
        for port in &info.host_ports {
            if let Some(at) = self.host_ports.iter().position(|p| p == port) {
                self.host_ports.swap_remove(at);
            }
        }
        if let Some(owner) = info.owner()
            && let Some(count) = self.by_owner.get_mut(owner)
        {
            *count -= 1;
            if *count == 0 {
                self.by_owner.remove(owner);
            }
        }
        Some(info)
    }
}

/// What of a node's description differs between two pictures of it, as bits of [`crate::plugins::wake`].
fn difference(old: &Node, new: &Node) -> u8 {
    use crate::plugins::wake;
    let mut bits = 0;
    if !old.exists {
        return wake::NODE_ADDED;
    }
    if old.allocatable != new.allocatable || old.pods_max != new.pods_max {
        bits |= wake::NODE_ALLOCATABLE;
    }
    if old.labels != new.labels {
        bits |= wake::NODE_LABELS;
    }
    if old.taints != new.taints || old.unschedulable != new.unschedulable {
        bits |= wake::NODE_TAINTS;
    }
    bits
}

/// All nodes, and the pods that have one.
#[derive(Debug, Default)]
pub struct Picture {
    nodes: Vec<Node>,
    by_name: HashMap<Arc<str>, usize>,
    /// The node of every pod in the picture.
    placed: HashMap<Key, Arc<str>>,
}

impl Picture {
    /// All nodes; those that do not exist (any more) but still have pods are among them.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn node_mut(&mut self, name: &str) -> &mut Node {
        let at = match self.by_name.get(name) {
            Some(at) => *at,
            None => {
                self.nodes.push(Node::new(name));
                let at = self.nodes.len() - 1;
                self.by_name.insert(self.nodes[at].name.clone(), at);
                at
            }
        };
        &mut self.nodes[at]
    }

    /// Takes a node's new description; says what that may help with.
    pub fn put_node(&mut self, object: &NodeObject) -> u8 {
        let name = object.metadata.name.clone().unwrap_or_default();
        let node = self.node_mut(&name);
        let mut new = Node::new(&name);
        new.describe(object);
        let bits = difference(node, &new);
        node.describe(object);
        bits
    }

    pub fn remove_node(&mut self, name: &str) {
        let Some(&at) = self.by_name.get(name) else { return };
        self.nodes[at].exists = false;
        self.drop_if_empty(at);
    }

    fn drop_if_empty(&mut self, at: usize) {
        if self.nodes[at].exists || !self.nodes[at].pods.is_empty() {
            return;
        }
        let gone = self.nodes.swap_remove(at);
        self.by_name.remove(&gone.name);
        if let Some(moved) = self.nodes.get(at) {
            self.by_name.insert(moved.name.clone(), at);
        }
    }

    /// Puts a pod on a node, from wherever it was.
    pub fn put_pod(&mut self, info: PodInfo, node: &str) {
        let key = info.object.key().clone();
        self.remove_pod(&key);
        let node = self.node_mut(node);
        node.add(Arc::new(info));
        let name = node.name.clone();
        self.placed.insert(key, name);
    }

    pub fn remove_pod(&mut self, key: &Key) -> Option<Arc<PodInfo>> {
        let name = self.placed.remove(key)?;
        let at = *self.by_name.get(&name)?;
        let info = self.nodes[at].remove(key);
        self.drop_if_empty(at);
        info
    }

    pub fn has_pod(&self, key: &Key) -> bool {
        self.placed.contains_key(key)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use minke_api::Kind;
    use serde_json::{Value, json};

    pub(crate) fn pod(name: &str, spec: Value) -> PodInfo {
        let kind = Kind::of::<Pod>();
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": "web"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "rs", "controller": true}]},
            "spec": spec,
        });
        PodInfo::new(&Arc::new(Object::from_value(kind, &value).unwrap())).unwrap()
    }

    pub(crate) fn node(name: &str, spec: Value, labels: Value) -> NodeObject {
        serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": spec,
            "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "10"}},
        }))
        .unwrap()
    }

    fn web(name: &str) -> PodInfo {
        pod(
            name,
            json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}],
                "resources": {"requests": {"cpu": "1", "example.com/x": "2"}}}]}),
        )
    }

    #[test]
    fn pods_come_and_go_and_leave_nothing_behind() {
        let mut picture = Picture::default();
        picture.put_node(&node("n1", json!({}), json!({})));
        picture.put_pod(web("a"), "n1");
        picture.put_pod(web("b"), "n1");
        let n1 = &picture.nodes()[0];
        assert_eq!((n1.used.cpu_milli, n1.used.extended["example.com/x"], n1.by_owner["rs"]), (2000, 4, 2));
        assert_eq!((n1.pods.len(), n1.host_ports.len()), (2, 2));
        picture.remove_pod(&Key::new("default", "a"));
        picture.remove_pod(&Key::new("default", "b"));
        let n1 = &picture.nodes()[0];
        assert_eq!((n1.used.cpu_milli, n1.scored, n1.pods.len()), (0, (0, 0), 0));
        assert!(n1.host_ports.is_empty() && n1.by_owner.is_empty());
    }

    #[test]
    fn a_pod_known_twice_is_counted_once() {
        let mut picture = Picture::default();
        picture.put_pod(web("a"), "n1");
        picture.put_pod(web("a"), "n2");
        let used: Vec<i64> = picture.nodes().iter().map(|n| n.used.cpu_milli).collect();
        assert_eq!(used, [1000], "the node that never existed is gone with its last pod");
    }

    #[test]
    fn a_node_that_goes_while_it_has_pods_stays_known_until_they_go() {
        let mut picture = Picture::default();
        picture.put_node(&node("n1", json!({}), json!({})));
        picture.put_node(&node("n2", json!({}), json!({})));
        picture.put_pod(web("a"), "n1");
        picture.remove_node("n1");
        assert_eq!(picture.nodes().iter().filter(|n| n.exists).count(), 1);
        picture.remove_pod(&Key::new("default", "a"));
        assert_eq!(picture.nodes().len(), 1);
        assert_eq!(&*picture.nodes()[0].name, "n2");
        picture.put_pod(web("b"), "n2");
        assert_eq!(picture.nodes()[0].pods.len(), 1);
    }

    #[test]
    fn a_change_of_a_node_says_what_it_may_help_with() {
        use crate::plugins::wake;
        let mut picture = Picture::default();
        assert_eq!(picture.put_node(&node("n1", json!({}), json!({}))), wake::NODE_ADDED);
        assert_eq!(picture.put_node(&node("n1", json!({}), json!({}))), 0);
        assert_eq!(
            picture.put_node(&node("n1", json!({"unschedulable": true}), json!({}))),
            wake::NODE_TAINTS
        );
        assert_eq!(
            picture.put_node(&node("n1", json!({}), json!({"a": "b"}))),
            wake::NODE_TAINTS | wake::NODE_LABELS
        );
    }
}
