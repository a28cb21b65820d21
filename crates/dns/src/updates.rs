//! Keeps the index in step with the cluster.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, RwLock};

use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::{Key, Object};
use minke_client::{Change, Informers, typed};
use tokio_util::sync::CancellationToken;

use crate::index::{Index, entry_of};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Applies events to the index until `stop`.
pub(crate) async fn follow(index: Arc<RwLock<Index>>, informers: &Informers, stop: CancellationToken) {
    let namespaces = informers.of_type::<Namespace>();
    let services = informers.of_type::<Service>();
    let slices = informers.of_type::<EndpointSlice>();
    let synced = async {
        namespaces.synced().await;
        services.synced().await;
        slices.synced().await;
    };
    tokio::select! { () = synced => {}, () = stop.cancelled() => return }
    let mut known = Known::default();
    let (mut namespaces, mut services, mut slices) =
        (namespaces.subscribe(), services.subscribe(), slices.subscribe());
    loop {
        {
            // What is there already is applied at once: one lock for a burst, and at the start all of it.
            let mut index = index.write().expect("looking up a name does not panic");
            while let Ok(change) = namespaces.try_recv() {
                index.set_namespace(change.object().name(), change.new.is_some());
            }
            while let Ok(change) = services.try_recv() {
                known.service(&mut index, change);
            }
            while let Ok(change) = slices.try_recv() {
                known.slice(&mut index, change);
            }
            index.set_complete();
        }
        let one = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(change) = services.recv() => One::Service(change),
            Some(change) = slices.recv() => One::Slice(change),
            Some(change) = namespaces.recv() => One::Namespace(change),
            else => return,
        };
        let mut index = index.write().expect("looking up a name does not panic");
        match one {
            One::Service(change) => known.service(&mut index, change),
            One::Slice(change) => known.slice(&mut index, change),
            One::Namespace(change) => index.set_namespace(change.object().name(), change.new.is_some()),
        }
    }
}

enum One {
    Namespace(Change),
    Service(Change),
    Slice(Change),
}

/// The objects behind the index, to make an entry anew when one of them changes.
#[derive(Default)]
struct Known {
    services: HashMap<Key, Arc<Object>>,
    /// By Service, then by their own key.
    slices: HashMap<Key, BTreeMap<Key, Arc<Object>>>,
}

impl Known {
    fn service(&mut self, index: &mut Index, change: Change) {
        let key = change.object().key().clone();
        match change.new {
            Some(object) => drop(self.services.insert(key.clone(), object)),
            None => drop(self.services.remove(&key)),
        }
        self.update(index, &key);
    }

    fn slice(&mut self, index: &mut Index, change: Change) {
        let service =
            |slice: &Arc<Object>| Some(Key::new(slice.namespace(), slice.labels().get(SERVICE_NAME)?));
        let old = change.old.as_ref().and_then(service);
        let new = change.new.as_ref().and_then(service);
        if let (Some(slice), Some(of)) = (&change.old, &old)
            && let Some(slices) = self.slices.get_mut(of)
        {
            slices.remove(slice.key());
            if slices.is_empty() {
                self.slices.remove(of);
            }
        }
        if let (Some(slice), Some(of)) = (&change.new, &new) {
            self.slices.entry(of.clone()).or_default().insert(slice.key().clone(), slice.clone());
        }
        for key in old.iter().filter(|old| Some(*old) != new.as_ref()).chain(&new) {
            self.update(index, key);
        }
    }

    fn update(&self, index: &mut Index, key: &Key) {
        let service = self.services.get(key).and_then(|object| typed::<Service>(object));
        let entry = service.and_then(|service| {
            let slices: Vec<Arc<EndpointSlice>> =
                match service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) {
                    // Only a headless Service shows its endpoints.
                    Some("None") => self
                        .slices
                        .get(key)
                        .into_iter()
                        .flat_map(BTreeMap::values)
                        .filter_map(|slice| typed(slice))
                        .collect(),
                    _ => Vec::new(),
                };
            entry_of(&service, slices.iter().map(|slice| &**slice))
        });
        index.set_service(key, entry);
    }
}
