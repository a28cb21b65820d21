//! Informers: one watch per kind, shared by everyone in the process who reads that kind.
//!
//! The cache holds the same `Arc<Object>`s as the API server of this process, so it costs pointers, not
//! copies. It lists once, then follows the watch; when the watch can't go on it lists again and
//! delivers the differences. Nothing is polled.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use futures_util::StreamExt;
use minke_api::{FieldSelector, Key, Kind, Object, Revision};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{Client, ListOptions, WatchEvent, WatchOptions, backoff};

/// What changed in a cache: neither, one or both of the states may be known.
#[derive(Debug, Clone)]
pub struct Change {
    pub old: Option<Arc<Object>>,
    pub new: Option<Arc<Object>>,
}

impl Change {
    /// The newest known state of the object.
    pub fn object(&self) -> &Arc<Object> {
        self.new.as_ref().or(self.old.as_ref()).expect("a change has an object")
    }
}

/// The shared cache of one kind, or of the part of it that a field selector names.
pub struct Informer {
    kind: &'static Kind,
    fields: FieldSelector,
    state: RwLock<State>,
    /// The revision that the cache has reached; 0 until the first list is in.
    reached: watch::Sender<Revision>,
    /// Tasks that are told of every change. Unbounded: a change is two pointers, and whoever
    /// subscribes drains it into a work queue, which de-duplicates.
    subscribers: Mutex<Vec<mpsc::UnboundedSender<Change>>>,
}

#[derive(Default)]
struct State {
    objects: imbl::OrdMap<Key, Arc<Object>>,
    /// Keys of objects by the uid of each of their owners.
    by_owner: HashMap<Arc<str>, BTreeSet<Key>>,
}

impl Informer {
    fn new(kind: &'static Kind, fields: FieldSelector) -> Informer {
        Informer {
            kind,
            fields,
            state: RwLock::default(),
            reached: watch::Sender::new(Revision(0)),
            subscribers: Mutex::default(),
        }
    }

    pub fn kind(&self) -> &'static Kind {
        self.kind
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.get_key(&Key::new(namespace, name))
    }

    pub fn get_key(&self, key: &Key) -> Option<Arc<Object>> {
        self.read().objects.get(key).cloned()
    }

    /// Everything in the cache, as one consistent picture; the copy is O(1).
    pub fn snapshot(&self) -> imbl::OrdMap<Key, Arc<Object>> {
        self.read().objects.clone()
    }

    /// The objects of one namespace, in order of name.
    pub fn in_namespace(&self, namespace: &str) -> Vec<Arc<Object>> {
        let from = Key::new(namespace, "");
        self.read()
            .objects
            .range(from..)
            .take_while(|(key, _)| &*key.namespace == namespace)
            .map(|(_, object)| object.clone())
            .collect()
    }

    /// The objects that name `uid` among their owners, in order of key.
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<Object>> {
        let state = self.read();
        let keys = state.by_owner.get(uid).into_iter().flatten();
        keys.filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    /// Tells of every change from now on; the present state comes first, as additions.
    pub fn subscribe(&self) -> mpsc::UnboundedReceiver<Change> {
        let (sender, receiver) = mpsc::unbounded_channel();
        // The lock of the state is held over both, so that nothing is missed and nothing comes twice.
        let state = self.read();
        for object in state.objects.values() {
            let _ = sender.send(Change { old: None, new: Some(object.clone()) });
        }
        self.subscribers.lock().expect("no subscriber panics while adding itself").push(sender);
        receiver
    }

    /// Waits until the first list is in the cache.
    pub async fn synced(&self) {
        self.reached(Revision(1)).await;
    }

    /// Waits until the cache shows everything up to `revision`, such as a write of one's own.
    /// The revision of a filtered or quiet kind moves with bookmarks.
    pub async fn reached(&self, revision: Revision) {
        let mut reached = self.reached.subscribe();
        // The sender lives as long as `self`.
        let _ = reached.wait_for(|now| *now >= revision).await;
    }

    pub fn revision(&self) -> Revision {
        *self.reached.borrow()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().expect("no reader or writer of a cache panics")
    }

    fn apply(&self, changes: Vec<(Key, Option<Arc<Object>>)>, revision: Revision) {
        let mut state = self.state.write().expect("no reader or writer of a cache panics");
        let mut subscribers = self.subscribers.lock().expect("no subscriber panics while adding itself");
        for (key, new) in changes {
            let old = state.put(key, new.clone());
            if old.is_none() && new.is_none() {
                continue;
            }
            let change = Change { old, new };
            subscribers.retain(|subscriber| subscriber.send(change.clone()).is_ok());
        }
        drop((state, subscribers));
        self.reached.send_if_modified(|now| {
            let later = revision > *now;
            *now = revision.max(*now);
            later
        });
    }

    /// Makes the cache equal to a new list.
    fn replace(&self, items: Vec<Arc<Object>>, revision: Revision) {
        let mut new: BTreeMap<Key, Option<Arc<Object>>> =
            items.into_iter().map(|object| (object.key().clone(), Some(object))).collect();
        let mut changes = Vec::new();
        for (key, old) in &self.snapshot() {
            match new.get(key) {
                None => changes.push((key.clone(), None)),
                Some(Some(object)) if object.revision() == old.revision() && object.uid() == old.uid() => {
                    new.remove(key);
                }
                // Deleted and made again while nobody watched: both must be told.
                Some(Some(object)) if object.uid() != old.uid() => changes.push((key.clone(), None)),
                Some(_) => {}
            }
        }
        changes.extend(new);
        self.apply(changes, Revision(revision.0.max(1)));
    }

    /// Lists and watches until `stop`; never gives up.
    async fn run(self: Arc<Informer>, client: Arc<dyn Client>, stop: CancellationToken) {
        let mut failures = 0;
        while !stop.is_cancelled() {
            let round = self.follow(&*client, &mut failures);
            let ended = tokio::select! { ended = round => ended, () = stop.cancelled() => return };
            if let Err(error) = ended
                && !error.is_expired()
            {
                tracing::debug!(kind = self.kind.plural, %error, "Watch ended; listing again");
                let pause = backoff(Duration::from_millis(50), Duration::from_secs(10), failures);
                failures += 1;
                tokio::select! { () = tokio::time::sleep(pause) => {}, () = stop.cancelled() => return }
            }
        }
    }

    async fn follow(&self, client: &dyn Client, failures: &mut u32) -> Result<(), minke_api::Status> {
        let options = ListOptions { fields: self.fields.clone(), ..ListOptions::default() };
        let list = client.list(self.kind, "", options).await?;
        let mut from = list.revision;
        self.replace(list.items, list.revision);
        loop {
            let options = WatchOptions { fields: self.fields.clone(), from, ..WatchOptions::default() };
            let mut events = client.watch(self.kind, "", options).await?;
            while let Some(event) = events.next().await {
                *failures = 0;
                match event? {
                    WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                        from = object.revision();
                        self.apply(vec![(object.key().clone(), Some(object))], from);
                    }
                    WatchEvent::Deleted(object) => {
                        from = object.revision();
                        self.apply(vec![(object.key().clone(), None)], from);
                    }
                    WatchEvent::Bookmark(revision) => {
                        from = revision;
                        self.apply(Vec::new(), revision);
                    }
                }
            }
        }
    }
}

impl State {
    fn put(&mut self, key: Key, new: Option<Arc<Object>>) -> Option<Arc<Object>> {
        let old = match &new {
            Some(object) => self.objects.insert(key.clone(), object.clone()),
            None => self.objects.remove(&key),
        };
        for owner in old.iter().flat_map(|object| object.owners()) {
            if let Some(keys) = self.by_owner.get_mut(&*owner.uid) {
                keys.remove(&key);
                if keys.is_empty() {
                    self.by_owner.remove(&*owner.uid);
                }
            }
        }
        for owner in new.iter().flat_map(|object| object.owners()) {
            self.by_owner.entry((*owner.uid).into()).or_default().insert(key.clone());
        }
        old
    }
}

/// The informers of one identity; each kind (and field selector) is watched once.
pub struct Informers {
    client: Arc<dyn Client>,
    stop: CancellationToken,
    running: Mutex<HashMap<(&'static Kind, String), Arc<Informer>>>,
}

impl Informers {
    /// Watches end when `stop` is cancelled.
    pub fn new(client: Arc<dyn Client>, stop: CancellationToken) -> Arc<Informers> {
        Arc::new(Informers { client, stop, running: Mutex::default() })
    }

    pub fn client(&self) -> &Arc<dyn Client> {
        &self.client
    }

    /// The informer of `kind`, started if it is the first time. Must be called within a tokio runtime.
    pub fn of(&self, kind: &'static Kind) -> Arc<Informer> {
        self.selected(kind, FieldSelector::default())
    }

    /// The informer of a typed kind.
    pub fn of_type<T: k8s_openapi::Resource>(&self) -> Arc<Informer> {
        self.of(Kind::of::<T>())
    }

    /// The informer of the objects of `kind` that `fields` selects, such as the pods of one node.
    pub fn selected(&self, kind: &'static Kind, fields: FieldSelector) -> Arc<Informer> {
        let mut running = self.running.lock().expect("starting an informer does not panic");
        let informer = running.entry((kind, fields.to_string())).or_insert_with(|| {
            let informer = Arc::new(Informer::new(kind, fields));
            tokio::spawn(informer.clone().run(self.client.clone(), self.stop.clone()));
            informer
        });
        informer.clone()
    }
}
