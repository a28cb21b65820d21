//! What selects a pod from outside: Services, and the ReplicaSet, ReplicationController or StatefulSet that
//! owns it. Pods without spread constraints are spread among those that the same selectors select.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::apps::v1::{ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{ReplicationController, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use minke_api::{Key, Kind, LabelSelector};
use minke_client::{Change, typed};

use crate::affinity::pod_selector;
use crate::picture::PodInfo;

type Pairs = BTreeMap<String, String>;

#[derive(Debug, Default)]
pub struct Workloads {
    owners: HashMap<(&'static str, Key), meta::LabelSelector>,
    services: BTreeMap<Key, Pairs>,
}

impl Workloads {
    /// The kinds that must be followed.
    pub fn kinds() -> [&'static Kind; 4] {
        [
            Kind::of::<Service>(),
            Kind::of::<ReplicaSet>(),
            Kind::of::<StatefulSet>(),
            Kind::of::<ReplicationController>(),
        ]
    }

    pub fn changed(&mut self, change: &Change) {
        let object = change.object();
        let kind = object.kind().kind;
        let same_spec = change.old.as_ref().zip(change.new.as_ref()).is_some_and(|(old, new)| {
            old.uid() == new.uid() && old.generation() == new.generation() && new.generation() > 0
        });
        if same_spec {
            return;
        }
        if kind == "Service" {
            let service = change.new.as_deref().and_then(typed::<Service>);
            let selector = service.and_then(|service| service.spec.as_ref()?.selector.clone());
            match selector.filter(|selector| !selector.is_empty()) {
                Some(selector) => drop(self.services.insert(object.key().clone(), selector)),
                None => drop(self.services.remove(object.key())),
            }
            return;
        }
        let selector = change.new.as_deref().and_then(|object| match kind {
            "ReplicaSet" => Some(typed::<ReplicaSet>(object)?.spec.selector.clone()),
            "StatefulSet" => Some(typed::<StatefulSet>(object)?.spec.selector.clone()),
            _ => {
                let pairs = typed::<ReplicationController>(object)?.spec.as_ref()?.selector.clone();
                Some(meta::LabelSelector { match_labels: pairs, match_expressions: None })
            }
        });
        let name = (kind, object.key().clone());
        match selector {
            Some(selector) => drop(self.owners.insert(name, selector)),
            None => drop(self.owners.remove(&name)),
        }
    }

    /// The pods that belong with this one, if anything says so.
    pub fn selector_of(&self, info: &PodInfo) -> Option<LabelSelector> {
        let mut selector = meta::LabelSelector::default();
        let key = info.key();
        let from = Key { namespace: key.namespace.clone(), name: "".into() };
        for (_, pairs) in
            self.services.range(from..).take_while(|(service, _)| service.namespace == key.namespace)
        {
            if pairs.iter().all(|(name, value)| info.object.labels().get(name) == Some(value)) {
                selector.match_labels.get_or_insert_default().extend(pairs.clone());
            }
        }
        if let Some(owner) = info.object.controller() {
            let kind = match (&*owner.api_version, &*owner.kind) {
                ("apps/v1", "ReplicaSet") => "ReplicaSet",
                ("apps/v1", "StatefulSet") => "StatefulSet",
                ("v1", "ReplicationController") => "ReplicationController",
                _ => "",
            };
            let name = Key { namespace: key.namespace.clone(), name: owner.name.as_ref().into() };
            if let Some(owner) = self.owners.get(&(kind, name)) {
                let pairs = owner.match_labels.clone().unwrap_or_default();
                selector.match_labels.get_or_insert_default().extend(pairs);
                let expressions = owner.match_expressions.clone().unwrap_or_default();
                selector.match_expressions.get_or_insert_default().extend(expressions);
            }
        }
        let selector = pod_selector(Some(&selector));
        if selector.is_everything() { None } else { Some(selector) }
    }
}
