//! What authentication, authorization and admission read of the cluster: the newest committed state,
//! from memory, without I/O.

use std::sync::Arc;

use minke_api::{Key, Kind, Object, Revision};
use minke_store::Store;

/// Reads of the newest committed state. The store implements it; tests use a map.
pub trait Snapshots: Send + Sync + 'static {
    /// `namespace` is empty for cluster-scoped kinds.
    fn get(&self, kind: &'static Kind, namespace: &str, name: &str) -> Option<Arc<Object>>;

    /// In order of namespace and name. An empty namespace means all of them.
    fn list(&self, kind: &'static Kind, namespace: &str) -> Vec<Arc<Object>>;

    /// Differs whenever an object of the kind was written or deleted in between.
    fn kind_revision(&self, kind: &'static Kind) -> Revision;
}

impl Snapshots for Store {
    fn get(&self, kind: &'static Kind, namespace: &str, name: &str) -> Option<Arc<Object>> {
        Store::get(self, kind.storage(), &Key::new(namespace, name))
    }

    fn list(&self, kind: &'static Kind, namespace: &str) -> Vec<Arc<Object>> {
        let snapshot = self.snapshot(kind.storage());
        match namespace {
            "" => snapshot.objects.values().cloned().collect(),
            _ => snapshot.in_namespace(namespace).cloned().collect(),
        }
    }

    fn kind_revision(&self, kind: &'static Kind) -> Revision {
        Store::kind_revision(self, kind.storage())
    }
}

#[cfg(test)]
pub mod fake {
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    use minke_api::{Key, Kind, Object, Revision};
    use serde_json::Value;

    use super::Snapshots;

    /// A cluster in a map.
    #[derive(Default)]
    pub struct Cluster {
        objects: Mutex<BTreeMap<(&'static str, Key), Arc<Object>>>,
        revision: Mutex<u64>,
    }

    impl Cluster {
        pub fn with(objects: impl IntoIterator<Item = Value>) -> Arc<Cluster> {
            let cluster = Cluster::default();
            objects.into_iter().for_each(|object| cluster.put(object));
            Arc::new(cluster)
        }

        pub fn put(&self, mut value: Value) {
            let kind = Kind::by_api_version(
                value["apiVersion"].as_str().expect("apiVersion"),
                value["kind"].as_str().expect("kind"),
            )
            .expect("a served kind");
            let mut revision = self.revision.lock().unwrap();
            *revision += 1;
            value["metadata"]["resourceVersion"] = revision.to_string().into();
            let object = Arc::new(Object::from_value(kind, &value).expect("an object"));
            self.objects.lock().unwrap().insert((kind.plural, object.key().clone()), object);
        }

        pub fn remove(&self, kind: &'static Kind, namespace: &str, name: &str) {
            *self.revision.lock().unwrap() += 1;
            self.objects.lock().unwrap().remove(&(kind.plural, Key::new(namespace, name)));
        }
    }

    impl Snapshots for Cluster {
        fn get(&self, kind: &'static Kind, namespace: &str, name: &str) -> Option<Arc<Object>> {
            self.objects.lock().unwrap().get(&(kind.plural, Key::new(namespace, name))).cloned()
        }

        fn list(&self, kind: &'static Kind, namespace: &str) -> Vec<Arc<Object>> {
            let objects = self.objects.lock().unwrap();
            let of_kind = objects.iter().filter(|((plural, _), _)| *plural == kind.plural);
            of_kind
                .filter(|((_, key), _)| namespace.is_empty() || &*key.namespace == namespace)
                .map(|(_, object)| object.clone())
                .collect()
        }

        fn kind_revision(&self, _: &'static Kind) -> Revision {
            Revision(*self.revision.lock().unwrap())
        }
    }
}
