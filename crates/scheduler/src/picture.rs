//! The picture of the nodes: what each has, what runs on it, kept up to date change by change.
//!
//! Nodes lie in one array and keep their places in it (*slots*); filters and scores run over it. Pods that were
//! given a node but are not yet known to be bound (*assumed*) count as if they were. Pods that made room for
//! themselves by preemption are *nominated* to a node: they do not count, but hold the room against others.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::core::v1::{Node as NodeObject, Pod, Taint};
use minke_api::{Key, Object};
use minke_client::typed;

use crate::affinity::{Namespaces, PodAffinities};
use crate::plugins::wake;
use crate::resources::{Resources, pod_requests, scored_requests};
use crate::tally::{Asked, Carry, Carrying, KeyId, Tallies};

/// The label by which nodes are taken in turn from each zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What scheduling needs to know of a pod, worked out once for its specification and labels.
#[derive(Debug)]
pub struct PodInfo {
    pub object: Arc<Object>,
    /// Empty once the pod is seen on its node: what others need of it is in the other fields.
    pub pod: Arc<Pod>,
    pub requests: Resources,
    /// CPU in thousandths and memory in bytes, with scoring's defaults.
    pub scored: (i64, i64),
    pub host_ports: Vec<HostPort>,
    pub priority: i32,
    pub affinities: Option<Box<PodAffinities>>,
    /// The terms by which this pod, once placed, speaks for or against others.
    pub carries: Vec<Carry>,
    /// All that matters to plugins which look at one node only, and whose profile they are of: pods with the same
    /// text are treated alike by them.
    pub alike: Arc<str>,
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
        let affinities = PodAffinities::of(&pod, object);
        let mut carries: Vec<Carry> = Vec::new();
        if let Some(affinities) = &affinities {
            carries
                .extend(affinities.required_anti.iter().map(|term| (Carrying::RequiredAnti, term.clone())));
            carries.extend(affinities.required.iter().map(|term| (Carrying::Required, term.clone())));
            let preferred = affinities.preferred.iter();
            carries.extend(preferred.map(|(term, weight)| (Carrying::Preferred(*weight), term.clone())));
        }
        let (requests, scored) = (pod_requests(&pod), scored_requests(&pod));
        Some(PodInfo {
            alike: alike(&pod, &requests, scored).into(),
            requests,
            scored,
            host_ports: host_ports(&pod),
            priority: pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or_default(),
            object: object.clone(),
            pod,
            affinities,
            carries,
        })
    }

    pub fn key(&self) -> &Key {
        self.object.key()
    }

    pub fn node_name(&self) -> &str {
        self.object.field("spec.nodeName").unwrap_or_default()
    }

    /// Lets go of the revision that this was made from, for one that counts the same: it is many times as large as
    /// the rest of this.
    fn settle(&mut self, object: &Arc<Object>) {
        static EMPTY: LazyLock<Arc<Pod>> = LazyLock::new(Arc::default);
        self.pod = EMPTY.clone();
        self.object = object.clone();
    }

    /// Whether another revision of the pod says nothing new to the scheduler.
    pub fn says_same(&self, other: &Object) -> bool {
        self.object.generation() == other.generation() && self.counts_same(other)
    }

    /// Whether another revision, of the same specification, has or waits for other resources. Only a pod that was
    /// changed once it was made can.
    fn resizes(&self, other: &Arc<Object>) -> bool {
        other.generation() > 1 && typed::<Pod>(other).is_some_and(|pod| pod_requests(&pod) != self.requests)
    }

    /// As [`PodInfo::says_same`], when the specification is known to differ by the node at most.
    fn counts_same(&self, other: &Object) -> bool {
        let old = &self.object;
        old.uid() == other.uid() && old.labels() == other.labels() && old.deleted() == other.deleted()
    }
}

/// See [`PodInfo::alike`].
fn alike(pod: &Pod, requests: &Resources, scored: (i64, i64)) -> String {
    let spec = pod.spec.as_ref();
    let containers =
        || spec.into_iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers));
    let images: Vec<_> = containers().map(|container| &container.image).collect();
    let ports: Vec<_> = containers()
        .filter_map(|container| Some((&container.restart_policy, container.ports.as_ref()?)))
        .filter(|(_, ports)| ports.iter().any(|port| port.host_port.is_some()))
        .collect();
    let affinity = spec.and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
    let Resources { cpu_milli, memory, ephemeral_storage, extended } = requests;
    let text = serde_json::to_string(&(
        (cpu_milli, memory, ephemeral_storage, extended, scored),
        (images, ports, affinity),
        spec.map(|spec| (&spec.scheduler_name, &spec.node_name, &spec.node_selector, &spec.tolerations)),
    ));
    text.expect("these are all texts and numbers")
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

/// A pod on a node.
#[derive(Debug)]
pub struct Placed {
    pub info: Arc<PodInfo>,
    /// The newest revision, which may say more than `info` of what does not matter to other pods.
    pub object: Arc<Object>,
}

/// One node and what is on it.
#[derive(Debug)]
pub struct Node {
    pub name: Arc<str>,
    /// The node's place in the picture, as long as it exists or has pods.
    pub slot: u32,
    /// Whether the Node object exists; pods may be known before their node is.
    pub exists: bool,
    pub unschedulable: bool,
    pub taints: Vec<Taint>,
    pub allocatable: Resources,
    pub pods_max: i64,
    pub used: Resources,
    /// As `used` for CPU and memory, with scoring's defaults.
    pub scored: (i64, i64),
    pub host_ports: Vec<HostPort>,
    pub labels: BTreeMap<String, String>,
    /// Sizes in bytes of the images the node has, by every name it has them under.
    pub images: HashMap<Box<str>, i64>,
    pub pods: BTreeMap<Key, Placed>,
    /// Pods that hold room here without being here.
    pub nominated: Vec<Arc<PodInfo>>,
}

impl Node {
    fn new(name: &str, slot: u32) -> Node {
        Node {
            name: name.into(),
            slot,
            exists: false,
            unschedulable: false,
            taints: Vec::new(),
            allocatable: Resources::default(),
            pods_max: 0,
            used: Resources::default(),
            scored: (0, 0),
            host_ports: Vec::new(),
            labels: BTreeMap::new(),
            images: HashMap::new(),
            pods: BTreeMap::new(),
            nominated: Vec::new(),
        }
    }

    /// Takes all but labels and images from a new description; says what that may help with.
    fn describe(&mut self, node: &NodeObject) -> u32 {
        let added = !self.exists;
        let mut bits = 0;
        self.exists = true;
        let spec = node.spec.as_ref();
        let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        let unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or_default();
        if self.taints != taints || self.unschedulable != unschedulable {
            bits |= wake::NODE_TAINTS;
            self.taints = taints.to_vec();
            self.unschedulable = unschedulable;
        }
        let list = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        let allocatable = Resources::read(list);
        let pods = list.and_then(|list| list.get("pods"));
        let pods_max =
            pods.and_then(|text| minke_api::Quantity::parse(&text.0).ok()).map_or(0, |n| n.value());
        if self.allocatable != allocatable || self.pods_max != pods_max {
            bits |= wake::NODE_ALLOCATABLE;
            self.allocatable = allocatable;
            self.pods_max = pods_max;
        }
        if added { wake::NODE_ADDED } else { bits }
    }

    fn add(&mut self, info: Arc<PodInfo>, object: Arc<Object>) {
        self.used.add(&info.requests);
        self.scored.0 += info.scored.0;
        self.scored.1 += info.scored.1;
        self.host_ports.extend(info.host_ports.iter().cloned());
        self.pods.insert(info.key().clone(), Placed { info, object });
    }

    fn remove(&mut self, key: &Key) -> Option<Placed> {
        let placed = self.pods.remove(key)?;
        let info = &placed.info;
        self.used.subtract(&info.requests);
        self.scored.0 -= info.scored.0;
        self.scored.1 -= info.scored.1;
        for port in &info.host_ports {
            if let Some(at) = self.host_ports.iter().position(|p| p == port) {
                self.host_ports.swap_remove(at);
            }
        }
        Some(placed)
    }
}

/// All nodes, and the pods that have one.
#[derive(Debug, Default)]
pub struct Picture {
    nodes: Vec<Node>,
    free: Vec<u32>,
    by_name: HashMap<Arc<str>, u32>,
    /// The nodes that exist, in the order in which they are tried: one of each zone in turn.
    order: Vec<u32>,
    order_is_old: bool,
    /// The node of every pod in the picture.
    placed: BTreeMap<Key, u32>,
    /// The node that each nominated pod holds room on.
    nominated: HashMap<Key, u32>,
    /// How many nodes have each image.
    images: HashMap<Box<str>, u32>,
    /// Counts all changes of nodes and their pods.
    changes: u64,
    /// By slot: the count at the node's last change.
    changed: Vec<u64>,
    /// The count at the last change of images or of the number of nodes.
    images_changed: u64,
    pub tallies: Tallies,
    pub namespaces: Namespaces,
}

impl Picture {
    pub fn node(&self, slot: u32) -> &Node {
        &self.nodes[slot as usize]
    }

    pub fn slot(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// The nodes that exist, in the order in which they are tried.
    pub fn order(&mut self) -> &[u32] {
        if self.order_is_old {
            self.order_is_old = false;
            let mut zones: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
            for node in self.nodes.iter().filter(|node| node.exists) {
                zones.entry(node.labels.get(ZONE).map_or("", String::as_str)).or_default().push(node.slot);
            }
            let longest = zones.values().map(Vec::len).max().unwrap_or_default();
            self.order = (0..longest)
                .flat_map(|n| zones.values().filter_map(move |zone| zone.get(n).copied()))
                .collect();
        }
        &self.order
    }

    /// As [`Picture::order`], when nothing changed since that was asked for.
    pub fn known_order(&self) -> &[u32] {
        debug_assert!(!self.order_is_old, "the order is asked for before it is used");
        &self.order
    }

    fn slot_or_new(&mut self, name: &str) -> u32 {
        if let Some(slot) = self.by_name.get(name) {
            return *slot;
        }
        let slot = self.free.pop().unwrap_or(self.nodes.len() as u32);
        let node = Node::new(name, slot);
        self.by_name.insert(node.name.clone(), slot);
        if slot as usize == self.nodes.len() {
            self.nodes.push(node);
            self.changed.push(0);
        } else {
            self.nodes[slot as usize] = node;
        }
        self.touch(slot);
        slot
    }

    /// Takes note that something about the node is not as it was.
    fn touch(&mut self, slot: u32) {
        self.changes += 1;
        self.changed[slot as usize] = self.changes;
    }

    /// How many places there are for nodes: slots are less.
    pub fn slots(&self) -> usize {
        self.nodes.len()
    }

    /// A number that the node has had since its last change, and never had before.
    pub fn changed(&self, slot: u32) -> u64 {
        self.changed[slot as usize]
    }

    /// A number that stays the same as long as no node comes, goes or has other images.
    pub fn images_changed(&self) -> u64 {
        self.images_changed
    }

    /// Whether pods hold room on the node without being there.
    pub fn is_held(&self, slot: u32) -> bool {
        !self.nominated.is_empty() && !self.nodes[slot as usize].nominated.is_empty()
    }

    /// Takes a node's new description; says what that may help with, and where the node is.
    pub fn put_node(&mut self, object: &NodeObject) -> (u32, u32) {
        let slot = self.slot_or_new(object.metadata.name.as_deref().unwrap_or_default());
        let new_labels = object.metadata.labels.clone().unwrap_or_default();
        let existed = self.nodes[slot as usize].exists;
        let mut bits = self.nodes[slot as usize].describe(object);
        if !existed || self.nodes[slot as usize].labels != new_labels {
            if existed {
                bits |= wake::NODE_LABELS;
            }
            self.relabel(slot, Some(new_labels));
        }
        let images = self.put_images(slot, object);
        if bits != 0 || images {
            self.touch(slot);
        }
        if !existed || images {
            self.images_changed = self.changes;
        }
        (bits, slot)
    }

    /// Labels decide what is counted where, so the node's pods are counted out and in again.
    fn relabel(&mut self, slot: u32, labels: Option<BTreeMap<String, String>>) {
        self.order_is_old = true;
        let infos: Vec<Arc<PodInfo>> =
            self.nodes[slot as usize].pods.values().map(|placed| placed.info.clone()).collect();
        for info in &infos {
            self.count(slot, info, -1);
        }
        self.tallies.set_node(slot, labels.as_ref());
        self.nodes[slot as usize].labels = labels.unwrap_or_default();
        for info in &infos {
            self.count(slot, info, 1);
        }
        if self.tallies.is_stale(self.nodes.len()) {
            self.tally_anew();
        }
    }

    fn tally_anew(&mut self) {
        self.tallies = Tallies::default();
        let all: Vec<(u32, Arc<PodInfo>)> = self
            .nodes
            .iter()
            .flat_map(|node| node.pods.values().map(|placed| (node.slot, placed.info.clone())))
            .collect();
        for (slot, info) in all {
            self.count(slot, &info, 1);
        }
    }

    /// Says whether they are others than before.
    fn put_images(&mut self, slot: u32, object: &NodeObject) -> bool {
        let images = object.status.iter().flat_map(|status| status.images.iter().flatten());
        let images: HashMap<Box<str>, i64> = images
            .flat_map(|image| {
                let size = image.size_bytes.unwrap_or_default();
                image.names.iter().flatten().map(move |name| (name.as_str().into(), size))
            })
            .collect();
        if self.nodes[slot as usize].images == images {
            return false;
        }
        self.forget_images(slot);
        for name in images.keys() {
            *self.images.entry(name.clone()).or_default() += 1;
        }
        self.nodes[slot as usize].images = images;
        true
    }

    fn forget_images(&mut self, slot: u32) {
        for name in std::mem::take(&mut self.nodes[slot as usize].images).into_keys() {
            if let Some(count) = self.images.get_mut(&name) {
                *count -= 1;
                if *count == 0 {
                    self.images.remove(&name);
                }
            }
        }
    }

    /// How many nodes have the image.
    pub fn nodes_with_image(&self, name: &str) -> u32 {
        self.images.get(name).copied().unwrap_or_default()
    }

    pub fn remove_node(&mut self, name: &str) {
        let Some(slot) = self.slot(name) else { return };
        let node = &mut self.nodes[slot as usize];
        node.exists = false;
        node.allocatable = Resources::default();
        node.pods_max = 0;
        node.taints.clear();
        node.unschedulable = false;
        self.forget_images(slot);
        self.relabel(slot, None);
        self.touch(slot);
        self.images_changed = self.changes;
        self.drop_if_empty(slot);
    }

    fn drop_if_empty(&mut self, slot: u32) {
        let node = &self.nodes[slot as usize];
        if node.exists || !node.pods.is_empty() || !node.nominated.is_empty() {
            return;
        }
        if self.by_name.remove(&node.name).is_some() {
            self.free.push(slot);
        }
    }

    /// Counts a pod in or out of the tallies.
    fn count(&mut self, slot: u32, info: &PodInfo, count: i64) {
        for (_, term) in &info.carries {
            self.key_of(&term.topology_key);
        }
        self.tallies.count(slot, &info.object, &info.carries, count, &self.namespaces);
    }

    /// The number of a topology key.
    pub fn key_of(&mut self, name: &str) -> KeyId {
        let nodes = self.nodes.iter().filter(|node| node.exists).map(|node| (node.slot, &node.labels));
        self.tallies.key(name, nodes)
    }

    /// The tally of the pods that `asked` describes, which `text` tells apart from others.
    pub fn tally(&mut self, text: &str, keys: &[KeyId], asked: impl FnOnce() -> Asked) -> usize {
        if let Some(id) = self.tallies.find(text, keys) {
            return id;
        }
        let nodes = &self.nodes;
        let object = |(key, slot): (&Key, &u32)| {
            let placed = nodes[*slot as usize].pods.get(key)?;
            Some((*slot, &*placed.info.object))
        };
        let pods = self.placed.iter().filter_map(object);
        self.tallies.start(text, asked(), keys, pods, &self.namespaces)
    }

    /// Puts a pod on a node, from wherever it was.
    pub fn put_pod(&mut self, info: Arc<PodInfo>, node: &str) -> u32 {
        self.remove_pod(&info.object.key().clone());
        let slot = self.slot_or_new(node);
        self.place(info, slot);
        slot
    }

    fn place(&mut self, info: Arc<PodInfo>, slot: u32) {
        self.count(slot, &info, 1);
        self.placed.insert(info.key().clone(), slot);
        let object = info.object.clone();
        self.nodes[slot as usize].add(info, object);
        self.touch(slot);
    }

    /// Supposes that a pod were not on the node. Before anything else is done the pod is put back by
    /// [`Picture::suppose`]. `counted`: counts must follow, because a filter reads them.
    pub fn suppose_without(&mut self, key: &Key, slot: u32, counted: bool) -> Option<Placed> {
        let placed = self.nodes[slot as usize].remove(key)?;
        if counted {
            self.count(slot, &placed.info, -1);
        }
        Some(placed)
    }

    /// Supposes that a pod were on the node; see [`Picture::suppose_without`].
    pub fn suppose(&mut self, placed: Placed, slot: u32, counted: bool) {
        if counted {
            self.count(slot, &placed.info, 1);
        }
        self.nodes[slot as usize].add(placed.info, placed.object);
    }

    /// The pod that was removed, and where it was.
    pub fn remove_pod(&mut self, key: &Key) -> Option<(Arc<PodInfo>, u32)> {
        let slot = self.placed.remove(key)?;
        let placed = self.nodes[slot as usize].remove(key)?;
        self.count(slot, &placed.info, -1);
        self.touch(slot);
        self.drop_if_empty(slot);
        Some((placed.info, slot))
    }

    pub fn pod(&self, key: &Key) -> Option<(&Placed, u32)> {
        let slot = *self.placed.get(key)?;
        Some((self.nodes[slot as usize].pods.get(key)?, slot))
    }

    /// Takes note of a new revision of a pod that is in the picture, if that changes nothing in it. `assumed`:
    /// it is the first one with the node that the pod was put on.
    pub fn refresh(&mut self, object: &Arc<Object>, assumed: bool) -> bool {
        let Some(slot) = self.placed.get(object.key()).copied() else { return false };
        let node = &mut self.nodes[slot as usize];
        let Some(placed) = node.pods.get_mut(object.key()) else { return false };
        let here = object.field("spec.nodeName") == Some(&*node.name);
        let same_spec = assumed || placed.object.generation() == object.generation();
        if !here || !same_spec || !placed.info.counts_same(object) || placed.info.resizes(object) {
            return false;
        }
        placed.object = object.clone();
        if let Some(info) = Arc::get_mut(&mut placed.info) {
            info.settle(object);
        }
        true
    }

    /// Lets a pod hold room on a node, in place of where it did before.
    pub fn nominate(&mut self, info: Arc<PodInfo>, node: &str) {
        self.forget_nomination(info.key());
        let slot = self.slot_or_new(node);
        self.nominated.insert(info.key().clone(), slot);
        self.nodes[slot as usize].nominated.push(info);
    }

    /// The pod no longer holds room; says where it did.
    pub fn forget_nomination(&mut self, key: &Key) -> Option<u32> {
        let slot = self.nominated.remove(key)?;
        self.nodes[slot as usize].nominated.retain(|info| info.key() != key);
        self.drop_if_empty(slot);
        Some(slot)
    }

    pub fn nominated_node(&self, key: &Key) -> Option<&Node> {
        self.nominated.get(key).map(|slot| self.node(*slot))
    }

    pub fn set_namespace(&mut self, name: &str, labels: Option<minke_api::Labels>) {
        match labels {
            Some(labels) => drop(self.namespaces.insert(name.to_owned(), labels)),
            None => drop(self.namespaces.remove(name)),
        }
        self.tallies.namespaces_changed();
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

    fn place(name: &str) -> Arc<PodInfo> {
        Arc::new(web(name))
    }

    /// The nodes that exist or have pods.
    fn known(picture: &Picture) -> Vec<&Node> {
        picture.nodes.iter().filter(|node| node.exists || !node.pods.is_empty()).collect()
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
        picture.put_pod(place("a"), "n1");
        picture.put_pod(place("b"), "n1");
        let n1 = picture.node(0);
        assert_eq!((n1.used.cpu_milli, n1.used.extended["example.com/x"]), (2000, 4));
        assert_eq!((n1.pods.len(), n1.host_ports.len()), (2, 2));
        picture.remove_pod(&Key::new("default", "a"));
        picture.remove_pod(&Key::new("default", "b"));
        let n1 = picture.node(0);
        assert_eq!((n1.used.cpu_milli, n1.scored, n1.pods.len()), (0, (0, 0), 0));
        assert!(n1.host_ports.is_empty());
    }

    #[test]
    fn a_pod_known_twice_is_counted_once() {
        let mut picture = Picture::default();
        picture.put_pod(place("a"), "n1");
        picture.put_pod(place("a"), "n2");
        let used: Vec<i64> = known(&picture).iter().map(|n| n.used.cpu_milli).collect();
        assert_eq!(used, [1000], "the node that never existed is gone with its last pod");
    }

    #[test]
    fn a_pod_that_is_seen_on_its_node_is_held_once() {
        let mut picture = Picture::default();
        picture.put_pod(place("a"), "n1");
        let mut spec = json!({"containers": [{"name": "c"}]});
        spec["nodeName"] = "n1".into();
        let bound = pod("a", spec).object;
        assert!(picture.refresh(&bound, true));
        let (placed, _) = picture.pod(&Key::new("default", "a")).unwrap();
        assert!(Arc::ptr_eq(&placed.info.object, &bound) && placed.info.pod.spec.is_none());
        assert_eq!(picture.node(0).used.cpu_milli, 1000, "what it takes is not forgotten");
        picture.remove_pod(bound.key());
        assert!(known(&picture).is_empty());
    }

    #[test]
    fn a_resize_frees_room_when_it_is_through() {
        let mut picture = Picture::default();
        let revision = |has: &str| {
            let requests = |cpu: &str| json!({"requests": {"cpu": cpu}});
            let value = json!({
                "metadata": {"name": "a", "namespace": "default", "uid": "u", "generation": 2},
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "resources": requests("1")}]},
                "status": {"containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": true,
                    "restartCount": 0, "resources": requests(has)}]},
            });
            Arc::new(Object::from_value(Kind::of::<Pod>(), &value).unwrap())
        };
        let put = |picture: &mut Picture, object: &Arc<Object>| {
            picture.put_pod(Arc::new(PodInfo::new(object).unwrap()), "n1");
            picture.node(0).used.cpu_milli
        };
        let (before, after) = (revision("3"), revision("1"));
        assert_eq!(put(&mut picture, &before), 3000);
        assert!(picture.refresh(&before, false));
        assert!(!picture.refresh(&after, false), "it says something new");
        assert_eq!(put(&mut picture, &after), 1000);
    }

    #[test]
    fn a_node_that_goes_while_it_has_pods_stays_known_until_they_go() {
        let mut picture = Picture::default();
        picture.put_node(&node("n1", json!({}), json!({})));
        picture.put_node(&node("n2", json!({}), json!({})));
        picture.put_pod(place("a"), "n1");
        picture.remove_node("n1");
        assert_eq!(picture.order().len(), 1);
        picture.remove_pod(&Key::new("default", "a"));
        assert_eq!(known(&picture).len(), 1);
        assert_eq!(&*known(&picture)[0].name, "n2");
        picture.put_pod(place("b"), "n2");
        assert_eq!(known(&picture)[0].pods.len(), 1);
    }

    #[test]
    fn a_change_of_a_node_says_what_it_may_help_with() {
        let mut picture = Picture::default();
        assert_eq!(picture.put_node(&node("n1", json!({}), json!({}))).0, wake::NODE_ADDED);
        assert_eq!(picture.put_node(&node("n1", json!({}), json!({}))).0, 0);
        assert_eq!(
            picture.put_node(&node("n1", json!({"unschedulable": true}), json!({}))).0,
            wake::NODE_TAINTS
        );
        assert_eq!(
            picture.put_node(&node("n1", json!({}), json!({"a": "b"}))).0,
            wake::NODE_TAINTS | wake::NODE_LABELS
        );
    }
}
