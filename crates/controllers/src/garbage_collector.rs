//! Deletes objects whose owners are gone, and sees a deletion through that concerns dependents.
//!
//! There is no graph of its own: who depends on whom is read from the caches of all kinds, which index
//! objects by owner. Before anything is deleted for want of an owner, that the owner is absent is asked of the
//! API server. Objects that own each other in a circle, and all wait for each other to go, do not: where upstream takes
//! the blocking mark off one of their references, the circle is looked for here. Upstream: pkg/controller/garbagecollector.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use minke_api::{KINDS, Kind, Object, OwnerReference, Status};
use minke_client::{Change, DeleteOptions, Patch, Propagation, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// Uids of absent owners that are remembered, so that a thousand orphans ask once.
const ABSENT_MAX: usize = 500;

#[derive(Default)]
pub(crate) struct GarbageCollector {
    /// With whether an object of this uid is in another namespace.
    absent: Mutex<HashMap<Box<str>, bool>>,
}

/// Every kind of which objects are kept, once. Events depend on nothing.
fn kinds() -> Vec<&'static Kind> {
    let kept = KINDS.iter().filter(|kind| kind.is_stored() && kind.stored_as.is_none());
    kept.filter(|kind| kind.kind != "Event").collect()
}

fn has_finalizer(object: &Object, name: &str) -> bool {
    object.finalizers().any(|finalizer| finalizer == name)
}

/// Whether the object waits until its dependents are gone.
fn waits_for_dependents(object: &Object) -> bool {
    object.deleted().is_some() && has_finalizer(object, FOREGROUND)
}

fn waits_for_orphans(object: &Object) -> bool {
    object.deleted().is_some() && has_finalizer(object, ORPHAN)
}

fn dependents(ctx: &Shared, uid: &str) -> Vec<Arc<Object>> {
    kinds().into_iter().flat_map(|kind| ctx.informers.of(kind).owned_by(uid)).collect()
}

/// Whether `owner` has to wait for `dependent`.
fn blocks(dependent: &Object, owner: &Object) -> bool {
    let mut owners = dependent.owners().iter();
    owners.any(|reference| *reference.uid == *owner.uid() && reference.block_owner_deletion)
}

/// The dependents that `owner` has to wait for.
fn blockers(ctx: &Shared, owner: &Object) -> Vec<Arc<Object>> {
    let mut all = dependents(ctx, owner.uid());
    all.retain(|dependent| blocks(dependent, owner));
    all
}

/// Whether something has to go before `owner` can.
fn is_blocked(owner: &Arc<Object>, blockers: impl Fn(&Object) -> Vec<Arc<Object>>) -> bool {
    let direct = blockers(owner);
    if direct.iter().any(|blocker| !waits_for_dependents(blocker)) {
        return true;
    }
    direct.into_iter().any(|blocker| !waits_for(blocker, owner, &blockers))
}

/// Whether `from` can only go after `to`, by way of objects that all wait: then they are in a circle.
fn waits_for(from: Arc<Object>, to: &Object, blockers: &impl Fn(&Object) -> Vec<Arc<Object>>) -> bool {
    let mut seen = HashSet::from([from.uid().to_owned()]);
    let mut left = vec![from];
    while let Some(one) = left.pop() {
        if one.uid() == to.uid() {
            return true;
        }
        let next = blockers(&one).into_iter().filter(|next| waits_for_dependents(next));
        left.extend(next.filter(|next| seen.insert(next.uid().to_owned())));
    }
    false
}

/// The kind and namespace in which an owner is to be looked for. `None` for kinds that are not known here, and
/// for an owner in a namespace of an object in none.
fn whereabouts<'a>(owner: &OwnerReference, of: &'a Object) -> Option<(&'static Kind, &'a str)> {
    let kind = Kind::by_api_version(&owner.api_version, &owner.kind)?.storage();
    match (kind.namespaced, of.namespace().is_empty()) {
        (true, true) => None,
        (true, false) => Some((kind, of.namespace())),
        (false, _) => Some((kind, "")),
    }
}

/// What the owners of an object are to it.
#[derive(Debug, Default, PartialEq)]
struct Owners<'a> {
    /// There, and to stay.
    solid: Vec<&'a OwnerReference>,
    /// Gone.
    dangling: Vec<&'a OwnerReference>,
    /// Waiting for this object to go.
    waiting: Vec<&'a OwnerReference>,
}

/// What to do about an object that owners may have left.
#[derive(Debug, PartialEq)]
enum Verdict {
    Leave,
    /// Someone still owns it; the references to these uids come off.
    Disown(Vec<String>),
    Delete(Propagation),
}

fn judge(object: &Object, owners: &Owners, has_dependents: bool) -> Verdict {
    let lost = || owners.dangling.iter().chain(&owners.waiting);
    if lost().next().is_none() {
        return Verdict::Leave;
    }
    if !owners.solid.is_empty() {
        return Verdict::Disown(lost().map(|owner| owner.uid.to_string()).collect());
    }
    if !owners.waiting.is_empty() && has_dependents {
        return Verdict::Delete(Propagation::Foreground);
    }
    Verdict::Delete(match () {
        () if has_finalizer(object, ORPHAN) => Propagation::Orphan,
        () if has_finalizer(object, FOREGROUND) => Propagation::Foreground,
        () => Propagation::Background,
    })
}

#[async_trait]
impl Controller for GarbageCollector {
    fn watches(&self) -> Vec<&'static Kind> {
        kinds()
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let mut items = Vec::new();
        let (old, new) = (change.old.as_ref(), change.new.as_ref());
        let owners_of = |object: &Object| -> Vec<Item> {
            let known = object.owners().iter().filter_map(|owner| {
                let (kind, namespace) = whereabouts(owner, object)?;
                Some(Item::new(kind, namespace, &owner.name))
            });
            known.collect()
        };
        let Some(new) = new else {
            let object = change.object();
            items.extend(dependents(ctx, object.uid()).iter().map(|dependent| Item::of(dependent)));
            items.extend(owners_of(object));
            return items;
        };
        let owners_changed = old.is_none_or(|old| old.owners() != new.owners());
        if owners_changed {
            if !new.owners().is_empty() {
                items.push(Item::of(new));
            }
            // One that let go may be all that a former owner waited for.
            items.extend(old.into_iter().flat_map(|old| owners_of(old)));
        }
        let began = |waits: fn(&Object) -> bool| waits(new) && !old.is_some_and(|old| waits(old));
        if began(waits_for_orphans) || began(waits_for_dependents) {
            items.push(Item::of(new));
        }
        if began(waits_for_dependents) {
            items.extend(dependents(ctx, new.uid()).iter().map(|dependent| Item::of(dependent)));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(object) = ctx.informers.of(item.kind).get_key(&item.key) else { return Ok(Requeue::Never) };
        if waits_for_orphans(&object) {
            orphan_dependents(ctx, &object).await?;
            return remove_finalizer(ctx, &object, ORPHAN).await;
        }
        if waits_for_dependents(&object) {
            // Of ten thousand dependents the first says so.
            let holds = |dependent: &Object| blocks(dependent, &object) && !waits_for_dependents(dependent);
            if kinds().into_iter().any(|kind| ctx.informers.of(kind).any_owned_by(object.uid(), holds)) {
                return Ok(Requeue::Never);
            }
            if !is_blocked(&object, |owner| blockers(ctx, owner)) {
                return remove_finalizer(ctx, &object, FOREGROUND).await;
            }
            // Each dependent was queued when this began, and this is queued when one of them is gone or waits itself.
            return Ok(Requeue::Never);
        }
        if object.deleted().is_some() || object.owners().is_empty() {
            return Ok(Requeue::Never);
        }
        let owners = self.owners(ctx, &object).await?;
        let has_dependents = !owners.waiting.is_empty() && !dependents(ctx, object.uid()).is_empty();
        match judge(&object, &owners, has_dependents) {
            Verdict::Leave => Ok(Requeue::Never),
            Verdict::Disown(uids) => disown(ctx, &object, &uids).await,
            Verdict::Delete(propagation) => {
                tracing::info!(kind = item.kind.plural, object = %item.key, ?propagation, "Deleting for want of owners");
                let options = DeleteOptions {
                    uid: Some(object.uid().to_owned()),
                    // What changed since may have an owner again.
                    revision: Some(object.revision()),
                    propagation: Some(propagation),
                    ..DeleteOptions::default()
                };
                match ctx.client.delete(Target::of(&object), options).await {
                    Err(error) if !error.is_not_found() => Err(error),
                    _ => Ok(Requeue::Never),
                }
            }
        }
    }
}

impl GarbageCollector {
    async fn owners<'a>(&self, ctx: &Ctx, object: &'a Object) -> Result<Owners<'a>, Status> {
        let mut owners = Owners::default();
        for owner in object.owners() {
            let Some((kind, namespace)) = whereabouts(owner, object) else {
                // Nothing is deleted for an owner that cannot be looked for.
                if Kind::by_api_version(&owner.api_version, &owner.kind)
                    .is_some_and(|kind| is_anywhere(ctx, kind, owner))
                {
                    warn_of_other_namespace(ctx, owner, object);
                }
                owners.solid.push(owner);
                continue;
            };
            let cached =
                ctx.informers.of(kind).get(namespace, &owner.name).filter(|found| *found.uid() == *owner.uid);
            let found = match cached {
                Some(found) => Ok(found),
                None => self.ask(ctx, kind, namespace, owner).await?,
            };
            match found {
                Err(elsewhere) => {
                    if elsewhere {
                        warn_of_other_namespace(ctx, owner, object);
                    }
                    owners.dangling.push(owner);
                }
                Ok(found) if waits_for_dependents(&found) => owners.waiting.push(owner),
                Ok(_) => owners.solid.push(owner),
            }
        }
        Ok(owners)
    }

    /// The owner as the API server has it; if it is not there, whether it is in another namespace.
    async fn ask(
        &self,
        ctx: &Ctx,
        kind: &'static Kind,
        namespace: &str,
        owner: &OwnerReference,
    ) -> Result<Result<Arc<Object>, bool>, Status> {
        let remembered = || self.absent.lock().expect("nothing panics under the lock");
        // Uids are never used again, so what was absent once stays so. Its namespace is part of the question.
        let key = format!("{} {namespace}", owner.uid).into_boxed_str();
        if let Some(elsewhere) = remembered().get(&key) {
            return Ok(Err(*elsewhere));
        }
        match ctx.client.get(Target::object(kind, namespace, &owner.name)).await {
            Ok(found) if *found.uid() == *owner.uid => return Ok(Ok(found)),
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let elsewhere = kind.namespaced && is_anywhere(ctx, kind, owner);
        let mut absent = remembered();
        if absent.len() >= ABSENT_MAX {
            absent.clear();
        }
        absent.insert(key, elsewhere);
        Ok(Err(elsewhere))
    }
}

/// Whether there is an object of the owner's name and uid in any namespace.
fn is_anywhere(ctx: &Ctx, kind: &'static Kind, owner: &OwnerReference) -> bool {
    ctx.informers.of(kind.storage()).snapshot().values().any(|other| *other.uid() == *owner.uid)
}

fn warn_of_other_namespace(ctx: &Ctx, owner: &OwnerReference, object: &Object) {
    let message = format!(
        "ownerRef [{}/{}, namespace: {}, name: {}, uid: {}] does not exist in namespace {:?}",
        owner.api_version,
        owner.kind,
        object.namespace(),
        owner.name,
        owner.uid,
        object.namespace()
    );
    ctx.events.warning(object, "OwnerRefInvalidNamespace", message);
}

async fn orphan_dependents(ctx: &Ctx, owner: &Object) -> Result<(), Status> {
    for dependent in dependents(ctx, owner.uid()) {
        disown(ctx, &dependent, &[owner.uid().to_owned()]).await?;
    }
    Ok(())
}

async fn disown(ctx: &Ctx, object: &Object, uids: &[String]) -> Result<Requeue, Status> {
    let mut references = metadata_list(object, "ownerReferences");
    references.retain(|owner| !uids.iter().any(|uid| owner["uid"] == uid.as_str()));
    patch_metadata(ctx, object, json!({ "ownerReferences": references })).await
}

async fn remove_finalizer(ctx: &Ctx, object: &Object, name: &str) -> Result<Requeue, Status> {
    let mut finalizers = metadata_list(object, "finalizers");
    finalizers.retain(|finalizer| finalizer != name);
    patch_metadata(ctx, object, json!({ "finalizers": finalizers })).await
}

fn metadata_list(object: &Object, name: &str) -> Vec<Value> {
    object.value()["metadata"][name].as_array().cloned().unwrap_or_default()
}

/// Patches metadata of exactly this revision; the list in it was made from that.
async fn patch_metadata(ctx: &Ctx, object: &Object, mut metadata: Value) -> Result<Requeue, Status> {
    metadata["uid"] = object.uid().into();
    metadata["resourceVersion"] = object.revision().to_string().into();
    match ctx.patch(Target::of(object), Patch::Merge(json!({ "metadata": metadata }))).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(Requeue::Never),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn object(namespace: &str, kind: &str, finalizers: &[&str]) -> Object {
        let owner = |n: &str| json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": n, "uid": n});
        let value = json!({"metadata": {"name": "o", "namespace": namespace, "uid": "o", "finalizers": finalizers,
            "ownerReferences": [owner("a"), owner("b")]}});
        Object::from_value(Kind::by_kind("", "v1", kind).unwrap(), &value).unwrap()
    }

    #[track_caller]
    fn check(
        finalizers: &[&str],
        [solid, dangling, waiting]: [bool; 3],
        has_dependents: bool,
        want: Verdict,
    ) {
        let object = object("ns", "Pod", finalizers);
        let pick = |flag: bool, at: usize| object.owners().iter().skip(at).take(usize::from(flag)).collect();
        let owners = Owners { solid: pick(solid, 0), dangling: pick(dangling, 1), waiting: pick(waiting, 1) };
        assert_eq!(judge(&object, &owners, has_dependents), want);
    }

    #[test]
    fn an_object_goes_when_nobody_owns_it() {
        use Propagation::{Background, Foreground, Orphan};
        check(&[], [true, false, false], false, Verdict::Leave);
        check(&[], [true, true, false], false, Verdict::Disown(vec!["b".to_owned()]));
        check(&[], [true, false, true], true, Verdict::Disown(vec!["b".to_owned()]));
        check(&[], [false, true, false], false, Verdict::Delete(Background));
        check(&[], [false, false, true], false, Verdict::Delete(Background));
        check(&[], [false, false, true], true, Verdict::Delete(Foreground));
        check(&[ORPHAN], [false, true, false], false, Verdict::Delete(Orphan));
        check(&[FOREGROUND], [false, true, false], false, Verdict::Delete(Foreground));
    }

    /// Objects by name, each with the objects that own it and whether it waits.
    fn world(objects: &[(&str, &[&str], bool)]) -> Vec<Arc<Object>> {
        let object = |(name, owners, waits): &(&str, &[&str], bool)| {
            let owner = |n: &&str| json!({"apiVersion": "v1", "kind": "Pod", "name": n, "uid": n, "blockOwnerDeletion": true});
            let mut value = json!({"metadata": {"name": name, "namespace": "ns", "uid": name,
                "ownerReferences": owners.iter().map(owner).collect::<Vec<_>>()}});
            if *waits {
                value["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
                value["metadata"]["finalizers"] = json!([FOREGROUND]);
            }
            Arc::new(Object::from_value(Kind::by_kind("", "v1", "Pod").unwrap(), &value).unwrap())
        };
        objects.iter().map(object).collect()
    }

    #[track_caller]
    fn check_blocked(objects: &[(&str, &[&str], bool)], want: bool) {
        let all = world(objects);
        let blockers = |owner: &Object| {
            let owned =
                |one: &&Arc<Object>| one.owners().iter().any(|reference| *reference.uid == *owner.uid());
            all.iter().filter(owned).cloned().collect::<Vec<_>>()
        };
        assert_eq!(is_blocked(&all[0], blockers), want);
    }

    #[test]
    fn what_waits_for_itself_in_a_circle_goes() {
        check_blocked(&[("a", &[], true)], false);
        check_blocked(&[("a", &[], true), ("b", &["a"], false)], true);
        check_blocked(&[("a", &[], true), ("b", &["a"], true)], true);
        check_blocked(&[("a", &["a"], true)], false);
        check_blocked(&[("a", &["b"], true), ("b", &["a"], true)], false);
        check_blocked(&[("a", &["b"], true), ("b", &["c"], true), ("c", &["a"], true)], false);
        check_blocked(&[("a", &["b"], true), ("b", &["c"], false), ("c", &["a"], true)], true);
        // One that hangs on the circle has to go first.
        check_blocked(&[("a", &["b"], true), ("b", &["a"], true), ("c", &["a"], true)], true);
        check_blocked(&[("a", &["b"], true), ("b", &["a"], true), ("c", &["b"], false)], false);
    }

    #[test]
    fn owners_are_looked_for_where_they_can_be() {
        let pod = object("ns", "Pod", &[]);
        let node = object("", "Node", &[]);
        let owner = |kind: &str, version: &str| OwnerReference {
            api_version: version.into(),
            kind: kind.into(),
            name: "x".into(),
            uid: "x".into(),
            controller: false,
            block_owner_deletion: false,
        };
        assert_eq!(whereabouts(&owner("ReplicaSet", "apps/v1"), &pod).unwrap().1, "ns");
        assert_eq!(whereabouts(&owner("Node", "v1"), &pod).unwrap().1, "");
        assert!(whereabouts(&owner("ReplicaSet", "apps/v1"), &node).is_none(), "in which namespace?");
        assert!(whereabouts(&owner("Unheard", "example.com/v1"), &pod).is_none());
        assert_eq!(
            whereabouts(&owner("HorizontalPodAutoscaler", "autoscaling/v1"), &pod).unwrap().0.version,
            "v2",
            "an owner is kept under one version"
        );
    }

    #[test]
    fn every_kind_is_watched_once() {
        let kinds = kinds();
        let names: BTreeSet<_> = kinds.iter().map(|kind| kind.qualified_plural()).collect();
        assert_eq!(names.len(), kinds.len());
        assert!(!names.contains("events") && names.contains("secrets"));
    }
}
