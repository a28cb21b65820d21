//! Informers: one watch per kind, shared by everyone in the process who reads that kind.
//!
//! The cache holds the same `Arc<Object>`s as the API server of this process, so it costs pointers, not
//! copies. It lists once, then follows the watch; when the watch can't go on it lists again and
//! delivers the differences. Nothing is polled.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use futures_util::StreamExt;
use minke_api::{FieldSelector, Key, Kind, Object, Revision};
use tokio::sync::{Notify, mpsc};
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
    reached: AtomicU64,
    /// Wakes those who wait for it, in the order in which they came: a simulated cluster repeats itself.
    moved: Notify,
    /// Tasks that are told of every change. Unbounded: a change is two pointers, and whoever
    /// subscribes drains it into a work queue, which de-duplicates.
    subscribers: Mutex<Vec<mpsc::UnboundedSender<Change>>>,
}

#[derive(Default)]
struct State {
    objects: imbl::OrdMap<Key, Arc<Object>>,
    /// Keys of objects by the uid of each of their owners.
    by_owner: HashMap<Arc<str>, BTreeSet<Key>>,
    /// Keys of objects that nobody controls, from when somebody first asked for them to be kept.
    orphans: Option<BTreeSet<Key>>,
    /// Keys of objects by the node that they are on, from when somebody first asked.
    by_node: Option<HashMap<Box<str>, BTreeSet<Key>>>,
}

fn node_of(object: &Object) -> Option<&str> {
    object.field("spec.nodeName").filter(|node| !node.is_empty())
}

impl Informer {
    fn new(kind: &'static Kind, fields: FieldSelector) -> Informer {
        Informer {
            kind,
            fields,
            state: RwLock::default(),
            reached: AtomicU64::new(0),
            moved: Notify::new(),
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

    /// Whether any object that names `uid` among its owners is such.
    pub fn any_owned_by(&self, uid: &str, is_such: impl Fn(&Object) -> bool) -> bool {
        let state = self.read();
        let mut keys = state.by_owner.get(uid).into_iter().flatten();
        keys.any(|key| state.objects.get(key).is_some_and(|object| is_such(object)))
    }

    /// Keeps from now on an index of the objects without a controller, for [`Informer::orphans_in`].
    pub fn index_orphans(&self) {
        let mut state = self.state.write().expect("no reader or writer of a cache panics");
        if state.orphans.is_none() {
            let orphans = state.objects.iter().filter(|(_, object)| object.controller().is_none());
            state.orphans = Some(orphans.map(|(key, _)| key.clone()).collect());
        }
    }

    /// The objects of one namespace that nobody controls, in order of name. None unless they are indexed.
    pub fn orphans_in(&self, namespace: &str) -> Vec<Arc<Object>> {
        let (state, from) = (self.read(), Key::new(namespace, ""));
        let known = state.orphans.iter().flat_map(|orphans| orphans.range(from.clone()..));
        let here = known.take_while(|key| key.namespace == from.namespace);
        here.filter_map(|key| state.objects.get(key).cloned()).collect()
    }

    /// The objects whose `spec.nodeName` is this node, in order of key. The first call makes an index of them.
    pub fn on_node(&self, node: &str) -> Vec<Arc<Object>> {
        if self.read().by_node.is_none() {
            self.state.write().expect("no reader or writer of a cache panics").index_nodes();
        }
        let state = self.read();
        let keys = state.by_node.as_ref().and_then(|nodes| nodes.get(node)).into_iter().flatten();
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
        loop {
            let moved = self.moved.notified();
            if self.revision() >= revision {
                return;
            }
            moved.await;
        }
    }

    pub fn revision(&self) -> Revision {
        Revision(self.reached.load(Ordering::Acquire))
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
        if self.reached.fetch_max(revision.0, Ordering::AcqRel) < revision.0 {
            self.moved.notify_waiters();
        }
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
            let ended = tokio::select! { biased; () = stop.cancelled() => return, ended = round => ended };
            if let Err(error) = ended
                && !error.is_expired()
            {
                tracing::debug!(kind = self.kind.plural, %error, "Watch ended; listing again");
                let pause = backoff(Duration::from_millis(50), Duration::from_secs(10), failures);
                failures += 1;
                tokio::select! { biased; () = stop.cancelled() => return, () = tokio::time::sleep(pause) => {} }
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
    fn index_nodes(&mut self) {
        let mut nodes: HashMap<Box<str>, BTreeSet<Key>> = HashMap::new();
        for (key, object) in &self.objects {
            if let Some(node) = node_of(object) {
                nodes.entry(node.into()).or_default().insert(key.clone());
            }
        }
        self.by_node = Some(nodes);
    }

    /// Most changes of an object leave it where it is.
    fn move_to(&mut self, key: &Key, from: Option<&str>, to: Option<&str>) {
        let Some(nodes) = self.by_node.as_mut().filter(|_| from != to) else { return };
        if let Some((from, keys)) = from.and_then(|from| Some((from, nodes.get_mut(from)?))) {
            keys.remove(key);
            if keys.is_empty() {
                nodes.remove(from);
            }
        }
        if let Some(to) = to {
            nodes.entry(to.into()).or_default().insert(key.clone());
        }
    }

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
        self.move_to(&key, old.as_deref().and_then(node_of), new.as_deref().and_then(node_of));
        if let Some(orphans) = &mut self.orphans {
            match &new {
                Some(object) if object.controller().is_none() => orphans.insert(key),
                _ => orphans.remove(&key),
            };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{List, WatchStream};
    use futures_util::stream;
    use minke_api::Status;
    use serde_json::json;
    use std::collections::VecDeque;

    fn pod(name: &str, uid: &str, revision: u64, owner: Option<&str>) -> Arc<Object> {
        let mut value = json!({"metadata": {
            "name": name, "namespace": "default", "uid": uid, "resourceVersion": revision.to_string()
        }});
        if let Some(owner) = owner {
            value["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "X", "name": "x", "uid": owner, "controller": true}]);
        }
        Arc::new(Object::from_value(pods(), &value).unwrap())
    }

    fn pods() -> &'static Kind {
        Kind::by_plural("", "v1", "pods").unwrap()
    }

    /// One list and the events of the watch that follows it; the watch then ends, or stays open.
    struct Round(List, Vec<Result<WatchEvent, Status>>, Then);

    #[derive(PartialEq)]
    enum Then {
        End,
        StayOpen,
    }

    /// Answers from a script, and from nothing else.
    struct Scripted(Mutex<VecDeque<Round>>);

    #[async_trait::async_trait]
    impl Client for Scripted {
        async fn list(&self, _: &'static Kind, _: &str, _: ListOptions) -> Result<List, Status> {
            let rounds = self.0.lock().unwrap();
            rounds.front().map(|round| round.0.clone()).ok_or_else(Status::unauthorized)
        }

        async fn watch(&self, _: &'static Kind, _: &str, _: WatchOptions) -> Result<WatchStream, Status> {
            let round = self.0.lock().unwrap().pop_front().ok_or_else(Status::unauthorized)?;
            let events = stream::iter(round.1);
            if round.2 == Then::StayOpen {
                return Ok(events.chain(stream::pending()).boxed());
            }
            let expired = stream::iter([Err(Status::expired("too old resource version"))]);
            Ok(events.chain(expired).boxed())
        }
    }

    fn list(revision: u64, items: &[&Arc<Object>]) -> List {
        List {
            revision: Revision(revision),
            items: items.iter().map(|o| (*o).clone()).collect(),
            continue_: None,
        }
    }

    fn informer(rounds: Vec<Round>) -> Arc<Informer> {
        let client = Arc::new(Scripted(Mutex::new(rounds.into())));
        Informers::new(client, CancellationToken::new()).of(pods())
    }

    fn names(informer: &Informer) -> Vec<String> {
        informer.snapshot().keys().map(|key| key.name.to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_cache_follows_the_watch() {
        let (a, b) = (pod("a", "1", 3, Some("rs")), pod("b", "2", 6, Some("rs")));
        let events = vec![
            Ok(WatchEvent::Added(b.clone())),
            Ok(WatchEvent::Deleted(pod("a", "1", 7, Some("rs")))),
            Ok(WatchEvent::Bookmark(Revision(9))),
        ];
        let informer = informer(vec![Round(list(5, &[&a]), events, Then::StayOpen)]);
        informer.index_orphans();
        informer.reached(Revision(9)).await;
        assert_eq!(names(&informer), ["b"]);
        assert!(Arc::ptr_eq(&informer.get("default", "b").unwrap(), &b), "the cache holds no copy");
        assert_eq!(informer.owned_by("rs").len(), 1);
        assert!(informer.any_owned_by("rs", |pod| pod.name() == "b"));
        assert!(
            !informer.any_owned_by("rs", |pod| pod.name() == "a") && !informer.any_owned_by("", |_| true)
        );
        assert_eq!(informer.in_namespace("default").len(), 1);
        assert!(informer.in_namespace("defaul").is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_list_tells_only_what_differs() {
        let (same, gone) = (pod("same", "1", 3, None), pod("gone", "2", 4, None));
        let (old, remade) = (pod("remade", "3", 5, None), pod("remade", "9", 12, None));
        let informer = informer(vec![
            Round(list(6, &[&same, &gone, &old]), vec![], Then::End),
            Round(list(20, &[&same, &remade]), vec![], Then::StayOpen),
        ]);
        let mut changes = informer.subscribe();
        informer.reached(Revision(20)).await;
        let mut told = Vec::new();
        while let Ok(change) = changes.try_recv() {
            told.push((
                change.object().name().to_owned(),
                change.old.map(|o| o.uid().to_owned()),
                change.new.map(|o| o.uid().to_owned()),
            ));
        }
        let row = |name: &str, old: Option<&str>, new: Option<&str>| {
            (name.to_owned(), old.map(str::to_owned), new.map(str::to_owned))
        };
        assert_eq!(
            told,
            [
                row("gone", None, Some("2")),
                row("remade", None, Some("3")),
                row("same", None, Some("1")),
                row("gone", Some("2"), None),
                row("remade", Some("3"), None),
                row("remade", None, Some("9")),
            ]
        );
    }

    async fn check_orphans(early: bool) {
        let (kept, lost, found) =
            (pod("a", "1", 3, None), pod("b", "2", 4, Some("rs")), pod("c", "3", 5, None));
        let events = vec![
            Ok(WatchEvent::Modified(pod("b", "2", 7, None))),
            Ok(WatchEvent::Modified(pod("c", "3", 8, Some("rs")))),
        ];
        let informer = informer(vec![Round(list(6, &[&kept, &lost, &found]), events, Then::StayOpen)]);
        let orphans = || -> Vec<String> {
            informer.orphans_in("default").iter().map(|object| object.name().to_owned()).collect()
        };
        // Asked for before there is anything, the index follows; later, it is made of what there is.
        if early {
            informer.index_orphans();
        }
        informer.reached(Revision(8)).await;
        assert_eq!(orphans().is_empty(), !early);
        informer.index_orphans();
        assert_eq!(orphans(), ["a", "b"]);
        assert!(informer.orphans_in("defaul").is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn those_without_a_controller_are_known() {
        check_orphans(true).await;
        check_orphans(false).await;
    }

    #[tokio::test(start_paused = true)]
    async fn late_subscribers_get_the_present_first() {
        let a = pod("a", "1", 3, None);
        let informer = informer(vec![Round(list(5, &[&a]), vec![], Then::StayOpen)]);
        informer.synced().await;
        let change = informer.subscribe().recv().await.unwrap();
        assert!(change.old.is_none() && Arc::ptr_eq(&change.new.unwrap(), &a));
    }

    #[tokio::test(start_paused = true)]
    async fn pods_are_found_by_their_node() {
        let on = |name: &str, revision: u64, node: Option<&str>| {
            let mut value = pod(name, name, revision, None).value();
            if let Some(node) = node {
                value["spec"]["nodeName"] = node.into();
            }
            Arc::new(Object::from_value(pods(), &value).unwrap())
        };
        let (a, b) = (on("a", 3, Some("n1")), on("b", 4, None));
        let events = vec![
            Ok(WatchEvent::Modified(on("b", 6, Some("n1")))),
            Ok(WatchEvent::Deleted(on("a", 7, Some("n1")))),
            Ok(WatchEvent::Added(on("c", 8, Some("n2")))),
        ];
        let informer = informer(vec![Round(list(5, &[&a, &b]), events, Then::StayOpen)]);
        let names =
            |node: &str| informer.on_node(node).iter().map(|o| o.name().to_owned()).collect::<Vec<_>>();
        assert!(names("n1").is_empty(), "nothing is known yet");
        informer.reached(Revision(8)).await;
        assert_eq!((names("n1"), names("n2")), (vec!["b".to_owned()], vec!["c".to_owned()]));
        // An index that is made late holds the same.
        informer.state.write().unwrap().by_node = None;
        assert_eq!((names("n1"), names("n2")), (vec!["b".to_owned()], vec!["c".to_owned()]));
    }
}
