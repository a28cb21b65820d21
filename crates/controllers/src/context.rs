//! What a reconcile sees and does: typed reads from the caches, writes under the controller's identity.
//!
//! Reads never go to the API server. Writes are remembered until the caches show them: the loop waits for
//! the revisions before it hands the key out again, and an object whose deletion was asked for counts as
//! going at once. So a controller always sees its own writes, which is what upstream's expectations are for.

use std::collections::HashSet;
use std::ops::Deref;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::Resource;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use minke_api::{ApiType, Key, Kind, LabelSelector, Object, Revision, Status};
use minke_client::{
    Change, Client, Clock, DeleteOptions, EventRecorder, Informer, Informers, Patch, Target, typed,
};
use serde_json::{Value, json};

/// What is reconciled: most controllers have items of one kind only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Item {
    pub kind: &'static Kind,
    pub key: Key,
}

impl Item {
    pub fn of(object: &Object) -> Item {
        Item { kind: object.kind(), key: object.key().clone() }
    }

    pub fn new(kind: &'static Kind, namespace: &str, name: &str) -> Item {
        Item { kind, key: Key::new(namespace, name) }
    }

    /// The controller of `object`, if it is of `kind`.
    pub fn controller_of(object: &Object, kind: &'static Kind) -> Option<Item> {
        let owner = object.controller()?;
        let same = *owner.kind == *kind.kind && *owner.api_version == kind.api_version();
        same.then(|| Item::new(kind, object.namespace(), &owner.name))
    }
}

/// When to look at the item again, besides when something changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Requeue {
    Never,
    After(Duration),
}

impl Requeue {
    pub fn at(deadline: Option<Timestamp>, now: Timestamp) -> Requeue {
        match deadline {
            None => Requeue::Never,
            // Deadlines in objects have whole seconds; a moment later than too early.
            Some(at) => Requeue::After(until(at, now) + Duration::from_millis(1)),
        }
    }
}

/// Time from `now` until `at`, zero if that is past.
pub(crate) fn until(at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or_default()
}

/// An object with its typed view.
pub(crate) struct Typed<T> {
    pub object: Arc<Object>,
    view: Arc<T>,
}

impl<T> Clone for Typed<T> {
    fn clone(&self) -> Self {
        Typed { object: self.object.clone(), view: self.view.clone() }
    }
}

impl<T> Deref for Typed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.view
    }
}

impl<T: Resource + ApiType> Typed<T> {
    pub fn new(object: Arc<Object>) -> Option<Typed<T>> {
        Some(Typed { view: typed(&object)?, object })
    }

    /// A typed object of a test, through its JSON as in life.
    #[cfg(test)]
    pub fn test(object: &T) -> Typed<T> {
        let object = Object::from_value(Kind::of::<T>(), &object.to_value()).expect("a valid object");
        Typed::new(Arc::new(object)).expect("fits its type")
    }
}

/// What the workers of one controller share.
pub(crate) struct Shared {
    pub client: Arc<dyn Client>,
    pub informers: Arc<Informers>,
    pub events: EventRecorder,
    pub clock: Clock,
    watches: Vec<&'static Kind>,
    /// Uids of watched objects whose deletion was asked for, until the cache shows it.
    deleting: Mutex<HashSet<Arc<str>>>,
}

impl Shared {
    pub fn new(
        client: Arc<dyn Client>,
        informers: Arc<Informers>,
        events: EventRecorder,
        clock: Clock,
        watches: Vec<&'static Kind>,
        adopts: Vec<&'static Kind>,
    ) -> Shared {
        adopts.into_iter().for_each(|kind| informers.of(kind).index_orphans());
        Shared { client, informers, events, clock, watches, deleting: Mutex::default() }
    }

    /// Forgets what is gone. Called once for every change that the controller watches.
    pub fn note(&self, change: &Change) {
        let object = change.object();
        let gone = change.new.as_ref().is_none_or(|new| new.deleted().is_some());
        if gone {
            lock(&self.deleting).remove(object.uid());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics under the small locks of a controller")
}

/// One pass of a controller over one item.
pub(crate) struct Ctx {
    shared: Arc<Shared>,
    /// The newest revision written in this pass, by kind.
    written: Mutex<Vec<(&'static Kind, Revision)>>,
}

impl Deref for Ctx {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Ctx {
    pub fn new(shared: Arc<Shared>) -> Ctx {
        Ctx { shared, written: Mutex::default() }
    }

    /// What this pass wrote of the kinds that the controller watches.
    pub fn written(&self) -> Vec<(&'static Kind, Revision)> {
        std::mem::take(&mut lock(&self.written))
    }

    pub fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    pub fn informer<T: Resource>(&self) -> Arc<Informer> {
        self.shared.informers.of_type::<T>()
    }

    pub fn get<T: Resource + ApiType>(&self, key: &Key) -> Option<Typed<T>> {
        Typed::new(self.informer::<T>().get_key(key)?)
    }

    /// The objects that `owner` controls.
    pub fn controlled_by(&self, owner: &Object, kind: &'static Kind) -> Vec<Arc<Object>> {
        let owned = self.shared.informers.of(kind).owned_by(owner.uid());
        owned.into_iter().filter(|o| o.controller().is_some_and(|c| *c.uid == *owner.uid())).collect()
    }

    /// Whether `object` is going away, by its own word or by ours.
    pub fn is_going(&self, object: &Object) -> bool {
        object.deleted().is_some() || lock(&self.shared.deleting).contains(object.uid())
    }

    fn wrote(&self, object: Arc<Object>) -> Arc<Object> {
        if self.watches.contains(&object.kind()) {
            let mut written = lock(&self.written);
            match written.iter_mut().find(|(kind, _)| *kind == object.kind()) {
                Some((_, newest)) => *newest = object.revision().max(*newest),
                None => written.push((object.kind(), object.revision())),
            }
        }
        object
    }

    pub async fn create(
        &self,
        kind: &'static Kind,
        namespace: &str,
        body: Value,
    ) -> Result<Arc<Object>, Status> {
        Ok(self.wrote(self.client.create(Target::collection(kind, namespace), body).await?))
    }

    pub async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        Ok(self.wrote(self.client.update(target, body).await?))
    }

    pub async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        Ok(self.wrote(self.client.patch(target, patch).await?))
    }

    /// Writes the status of `object` as it was read: a conflict if it has changed since.
    pub async fn update_status(&self, object: &Object, status: &impl ApiType) -> Result<Arc<Object>, Status> {
        let mut body = object.value();
        body["status"] = status.to_value();
        self.update(Target::of(object).sub("status"), body).await
    }

    /// Deletes exactly this object (not a later one of the same name). Fine if it is gone.
    pub async fn delete(&self, object: &Object, options: DeleteOptions) -> Result<(), Status> {
        let uid: Arc<str> = object.uid().into();
        // What is not watched would never be taken out again.
        if self.watches.contains(&object.kind()) {
            lock(&self.shared.deleting).insert(uid.clone());
        }
        let options = DeleteOptions { uid: Some(object.uid().to_owned()), ..options };
        match self.client.delete(Target::of(object), options).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() || error.is_conflict() => {
                lock(&self.shared.deleting).remove(&uid);
                Ok(())
            }
            Err(error) => {
                lock(&self.shared.deleting).remove(&uid);
                Err(error)
            }
        }
    }

    /// The children of `kind` (which the controller adopts) that are the owner's: those it controls and that
    /// match its selector. One that no longer matches is released, and a matching orphan is adopted.
    pub async fn claim(
        &self,
        owner: &Object,
        selector: &LabelSelector,
        kind: &'static Kind,
    ) -> Result<Vec<Arc<Object>>, Status> {
        self.claim_those(owner, selector, kind, |_| true).await
    }

    /// As [`Ctx::claim`], of the children that also `belong`.
    pub async fn claim_those(
        &self,
        owner: &Object,
        selector: &LabelSelector,
        kind: &'static Kind,
        belongs: impl Fn(&Object) -> bool + Send + Sync,
    ) -> Result<Vec<Arc<Object>>, Status> {
        self.claim_by(owner, selector, kind, belongs, &[]).await
    }

    /// As [`Ctx::claim`]; what is adopted gets this finalizer with it.
    pub async fn claim_holding(
        &self,
        owner: &Object,
        selector: &LabelSelector,
        kind: &'static Kind,
        finalizer: &str,
    ) -> Result<Vec<Arc<Object>>, Status> {
        self.claim_by(owner, selector, kind, |_| true, &[finalizer]).await
    }

    async fn claim_by(
        &self,
        owner: &Object,
        selector: &LabelSelector,
        kind: &'static Kind,
        belongs: impl Fn(&Object) -> bool + Send + Sync,
        finalizers: &[&str],
    ) -> Result<Vec<Arc<Object>>, Status> {
        let fits = |child: &Object| selector.matches(child.labels()) && belongs(child);
        let mut mine = Vec::new();
        for child in self.controlled_by(owner, kind) {
            if fits(&child) {
                mine.push(child);
            } else if owner.deleted().is_none() {
                self.release(owner, &child).await?;
            }
        }
        if owner.deleted().is_some() || selector.is_everything() {
            return Ok(mine);
        }
        let mut may_adopt = false;
        for orphan in self.shared.informers.of(kind).orphans_in(owner.namespace()) {
            if self.is_going(&orphan) || !fits(&orphan) {
                continue;
            }
            if !may_adopt {
                // The cache may not know yet that the owner is gone, and then its pods would be lost with it.
                let live = self.client.get(Target::of(owner)).await?;
                if live.uid() != owner.uid() || live.deleted().is_some() {
                    return Ok(mine);
                }
                may_adopt = true;
            }
            let mut reference =
                json!({ "metadata": { "uid": orphan.uid(), "ownerReferences": [controller_ref(owner)] } });
            if !finalizers.is_empty() {
                reference["metadata"]["finalizers"] = json!(finalizers);
            }
            match self.patch(Target::of(&orphan), Patch::Strategic(reference)).await {
                Ok(adopted) => mine.push(adopted),
                Err(error) if error.is_not_found() || error.code == 422 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(mine)
    }

    async fn release(&self, owner: &Object, child: &Object) -> Result<(), Status> {
        let without = json!({ "metadata": {
            "uid": child.uid(),
            "ownerReferences": [{ "$patch": "delete", "uid": owner.uid() }],
        } });
        match self.patch(Target::of(child), Patch::Strategic(without)).await {
            Err(error) if !error.is_not_found() && error.code != 422 => Err(error),
            _ => Ok(()),
        }
    }
}

/// The reference by which `owner` controls an object.
pub(crate) fn controller_ref(owner: &Object) -> OwnerReference {
    OwnerReference {
        api_version: owner.kind().api_version(),
        kind: owner.kind().kind.to_owned(),
        name: owner.name().to_owned(),
        uid: owner.uid().to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// `now` as objects keep it: in whole seconds.
pub(crate) fn seconds(now: Timestamp) -> Time {
    Time(Timestamp::from_second(now.as_second()).expect("a whole second of a valid time is valid"))
}

/// Counts that are left out of an object when they are zero.
pub(crate) fn nonzero(count: i32) -> Option<i32> {
    (count != 0).then_some(count)
}
