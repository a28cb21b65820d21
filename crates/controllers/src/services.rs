//! What Endpoints and EndpointSlices have in common: which services select a pod, and what a pod offers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use minke_api::{Key, Kind, LabelSelector, Object};
use minke_client::Change;

use crate::context::{Ctx, Item, Shared, Typed};
use crate::pods;

/// Which pods are of which service, kept up to date with every change, so that neither a change of a pod looks at every
/// service of its namespace nor a pass over a service at every pod.
#[derive(Default)]
pub(crate) struct SelectorIndex(Mutex<Index>);

type Pairs = BTreeMap<String, String>;

#[derive(Default)]
struct Index {
    /// Services by namespace and one pair of their selector.
    by_pair: HashMap<(String, String, String), BTreeSet<Key>>,
    services: HashMap<Key, Known>,
}

/// A service with a selector, and the pods that it selects.
struct Known {
    pairs: Pairs,
    pods: BTreeSet<Key>,
}

impl Known {
    fn selects(&self, pod: &Object) -> bool {
        self.pairs.iter().all(|(name, value)| pod.labels().get(name) == Some(value))
    }
}

fn first_pair(service: &Key, pairs: &Pairs) -> (String, String, String) {
    let (name, value) = pairs.iter().next().expect("a selector that selects something has pairs");
    (service.namespace.to_string(), name.clone(), value.clone())
}

impl Index {
    /// Services of which a pair is among the labels of the pod.
    fn candidates(&self, pod: &Object) -> Vec<Key> {
        let pairs = pod.labels().iter();
        let pairs =
            pairs.map(|(name, value)| (pod.namespace().to_owned(), name.to_owned(), value.to_owned()));
        pairs.flat_map(|pair| self.by_pair.get(&pair).into_iter().flatten().cloned()).collect()
    }

    fn forget(&mut self, service: &Key) {
        let Some(known) = self.services.remove(service) else { return };
        let pair = first_pair(service, &known.pairs);
        if let Some(keys) = self.by_pair.get_mut(&pair) {
            keys.remove(service);
            if keys.is_empty() {
                self.by_pair.remove(&pair);
            }
        }
    }
}

impl SelectorIndex {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.0.lock().expect("nothing panics under the index")
    }

    fn note_service(&self, ctx: &Shared, change: &Change) {
        let key = change.object().key();
        let new = change.new.clone().and_then(Typed::<Service>::new);
        // Locked while the pods are looked through: none is missed that comes meanwhile.
        let mut index = self.lock();
        let pairs = new.as_deref().and_then(selector_pairs);
        if index.services.get(key).map(|known| &known.pairs) == pairs {
            return;
        }
        index.forget(key);
        let Some(pairs) = pairs.cloned() else { return };
        let mut known = Known { pairs, pods: BTreeSet::new() };
        let pods = ctx.informers.of_type::<Pod>().in_namespace(&key.namespace);
        known.pods = pods.iter().filter(|pod| known.selects(pod)).map(|pod| pod.key().clone()).collect();
        index.by_pair.entry(first_pair(key, &known.pairs)).or_default().insert(key.clone());
        index.services.insert(key.clone(), known);
    }

    /// The services that a change of a service or a pod concerns.
    pub fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<Service>();
        if change.object().kind() == kind {
            self.note_service(ctx, change);
            return vec![Item::of(change.object())];
        }
        if let (Some(old), Some(new)) = (&change.old, &change.new)
            && !matters(old, new)
        {
            return Vec::new();
        }
        self.note_pod(change).into_iter().map(|key| Item { kind, key }).collect()
    }

    /// The services that select a pod, or did so before the change.
    fn note_pod(&self, change: &Change) -> BTreeSet<Key> {
        let mut index = self.lock();
        let mut candidates: BTreeSet<Key> =
            change.old.iter().chain(&change.new).flat_map(|pod| index.candidates(pod)).collect();
        candidates.retain(|service| {
            let Some(known) = index.services.get_mut(service) else { return false };
            match &change.new {
                Some(new) if known.selects(new) => {
                    known.pods.insert(new.key().clone());
                    true
                }
                _ => known.pods.remove(change.object().key()),
            }
        });
        candidates
    }

    /// The services of these pods.
    pub fn services_of(&self, pods: &[Arc<Object>]) -> BTreeSet<Key> {
        let index = self.lock();
        let of_pod = |pod: &Arc<Object>| {
            let selects =
                |key: &Key| index.services.get(key).is_some_and(|known| known.pods.contains(pod.key()));
            index.candidates(pod).into_iter().filter(selects).collect::<Vec<_>>()
        };
        pods.iter().flat_map(of_pod).collect()
    }

    /// The pods of a service, in order of name: those that have an address and are not finished.
    pub fn pods_of(&self, ctx: &Ctx, service: &Typed<Service>, selector: &LabelSelector) -> Vec<Typed<Pod>> {
        let informer = ctx.informer::<Pod>();
        let keys: Option<Vec<Key>> = {
            let index = self.lock();
            let known = index.services.get(service.object.key());
            let same = known.filter(|known| Some(&known.pairs) == selector_pairs(service));
            same.map(|known| known.pods.iter().cloned().collect())
        };
        let pods = match keys {
            Some(keys) => keys.iter().filter_map(|key| informer.get_key(key)).collect(),
            // The service was not told of yet, or not of its new selector.
            None => informer.in_namespace(service.object.namespace()),
        };
        let matching = pods.into_iter().filter(|pod| selector.matches(pod.labels())).filter_map(Typed::new);
        matching.filter(|pod: &Typed<Pod>| !pods::is_finished(pod) && !addresses(pod).is_empty()).collect()
    }
}

/// Whether a change of a pod can change what it offers. Most updates of a starting pod do not.
fn matters(old: &Arc<Object>, new: &Arc<Object>) -> bool {
    let (Some(before), Some(after)) = (Typed::<Pod>::new(old.clone()), Typed::<Pod>::new(new.clone())) else {
        return true;
    };
    let offer = |pod: &Typed<Pod>| {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        (addresses(pod), node, pods::is_ready(pod), pods::is_finished(pod), pod.object.deleted().is_some())
    };
    old.labels() != new.labels() || offer(&before) != offer(&after)
}

fn selector_pairs(service: &Service) -> Option<&BTreeMap<String, String>> {
    service.spec.as_ref()?.selector.as_ref().filter(|pairs| !pairs.is_empty())
}

/// The selector of a service whose endpoints are found for it.
pub(crate) fn selector(service: &Service) -> Option<LabelSelector> {
    let external = service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("ExternalName");
    let pairs = selector_pairs(service).filter(|_| !external)?;
    Some(LabelSelector::from_pairs(pairs.clone()))
}

/// The addresses of a pod, one per family at most.
pub(crate) fn addresses(pod: &Pod) -> Vec<String> {
    let Some(status) = &pod.status else { return Vec::new() };
    let all: Vec<String> = status.pod_ips.iter().flatten().map(|ip| ip.ip.clone()).collect();
    if all.is_empty() { status.pod_ip.clone().into_iter().filter(|ip| !ip.is_empty()).collect() } else { all }
}

/// The number of the port that `port` of a service means on `pod`.
pub(crate) fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(0)) => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
    };
    let spec = pod.spec.as_ref()?;
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    // Sidecars are containers that happen to be started first.
    let sidecars =
        spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let mut named = ports
        .filter(|p| p.name.as_deref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol);
    named.next().map(|port| port.container_port)
}

pub(crate) fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
}

pub(crate) fn publishes_unready(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false)
}

/// The host name under which the pod can be found in the service's domain.
pub(crate) fn hostname(pod: &Pod, service: &Typed<Service>) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let here = spec.subdomain.as_deref() == Some(service.object.name());
    spec.hostname.clone().filter(|hostname| here && !hostname.is_empty())
}

pub(crate) fn target_ref(pod: &Object) -> ObjectReference {
    ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.namespace().to_owned()),
        name: Some(pod.name().to_owned()),
        uid: Some(pod.uid().to_owned()),
        ..ObjectReference::default()
    }
}
