//! What Endpoints and EndpointSlices have in common: which services select a pod, and what a pod offers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use minke_api::{Key, Kind, LabelSelector, Object};
use minke_client::Change;

use crate::context::{Ctx, Item, Typed};
use crate::pods;

/// Services by one pair of their selector, so that a pod finds those that may select it without looking at
/// every service of its namespace.
#[derive(Default)]
pub(crate) struct SelectorIndex(Mutex<Index>);

#[derive(Default)]
struct Index {
    by_pair: HashMap<(String, String, String), HashSet<Key>>,
    pairs: HashMap<Key, (String, String, String)>,
}

impl SelectorIndex {
    pub fn note_service(&self, change: &Change) {
        let key = change.object().key();
        let new = change.new.clone().and_then(Typed::<Service>::new);
        let pair = new.as_deref().and_then(selector_pairs).and_then(|pairs| {
            let (name, value) = pairs.iter().next()?;
            Some((key.namespace.to_string(), name.clone(), value.clone()))
        });
        let mut index = self.0.lock().expect("nothing panics under the index");
        if let Some(old) = index.pairs.remove(key)
            && let Some(keys) = index.by_pair.get_mut(&old)
        {
            keys.remove(key);
            if keys.is_empty() {
                index.by_pair.remove(&old);
            }
        }
        if let Some(pair) = pair {
            index.by_pair.entry(pair.clone()).or_default().insert(key.clone());
            index.pairs.insert(key.clone(), pair);
        }
    }

    /// Services whose selector may match the labels that `pod` has (or had).
    pub fn candidates(&self, pod: &Object, found: &mut HashSet<Key>) {
        let index = self.0.lock().expect("nothing panics under the index");
        for (name, value) in pod.labels().iter() {
            let pair = (pod.namespace().to_owned(), name.to_owned(), value.to_owned());
            found.extend(index.by_pair.get(&pair).into_iter().flatten().cloned());
        }
    }

    /// The services that a change of a service or a pod concerns.
    pub fn items(&self, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<Service>();
        if change.object().kind() == kind {
            self.note_service(change);
            return vec![Item::of(change.object())];
        }
        if let (Some(old), Some(new)) = (&change.old, &change.new)
            && !matters(old, new)
        {
            return Vec::new();
        }
        let mut keys = HashSet::new();
        for pod in change.old.iter().chain(&change.new) {
            self.candidates(pod, &mut keys);
        }
        keys.into_iter().map(|key| Item { kind, key }).collect()
    }
}

/// Whether a change of a pod can change what it offers. Most updates of a starting pod do not.
fn matters(old: &std::sync::Arc<Object>, new: &std::sync::Arc<Object>) -> bool {
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

/// The pods of a service, in order of name: those that have an address and are not finished.
pub(crate) fn pods_of(ctx: &Ctx, service: &Typed<Service>, selector: &LabelSelector) -> Vec<Typed<Pod>> {
    let pods = ctx.informer::<Pod>().in_namespace(service.object.namespace());
    let matching = pods.into_iter().filter(|pod| selector.matches(pod.labels())).filter_map(Typed::new);
    matching.filter(|pod: &Typed<Pod>| !pods::is_finished(pod) && !addresses(pod).is_empty()).collect()
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
