//! Empties a namespace that is to be deleted, and then lets it go.
//!
//! Its content is deleted, pods first (they may need their secrets and services until they stop); what is still
//! there is told in the conditions; when nothing is, the finalizer `kubernetes` is taken off.
//! Upstream: pkg/controller/namespace/deletion.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Namespace, NamespaceCondition, NamespaceStatus, Pod};
use minke_api::{KINDS, Kind, Object, Status};
use minke_client::{Change, DeleteOptions, ListOptions, Propagation, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, seconds};
use crate::run::Controller;

const FINALIZER: &str = "kubernetes";

/// Time to wait for content that goes away by itself, when nothing tells that it went.
const PATIENCE: Duration = Duration::from_secs(5);

pub(crate) struct Namespaces;

#[async_trait]
impl Controller for Namespaces {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Namespace>(), Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<Namespace>() {
            return object.deleted().map(|_| Item::of(object)).into_iter().collect();
        }
        // The last pod of a namespace that goes away may be what it waits for.
        let namespaces = Kind::of::<Namespace>();
        let item = Item::new(namespaces, "", object.namespace());
        let waits = |item: &Item| {
            ctx.informers
                .of(namespaces)
                .get_key(&item.key)
                .is_some_and(|namespace| namespace.deleted().is_some())
        };
        change.new.is_none().then_some(item).filter(waits).into_iter().collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(namespace) = ctx.get::<Namespace>(&item.key) else { return Ok(Requeue::Never) };
        if namespace.object.deleted().is_none() {
            return Ok(Requeue::Never);
        }
        let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
        let mut left = Left::default();
        if finalizers.iter().any(|finalizer| finalizer == FINALIZER) {
            left = empty(ctx, namespace.object.name()).await;
        }
        let old = namespace.status.clone().unwrap_or_default();
        let status = status(&old, &left, ctx.now());
        let mut current = namespace.object.clone();
        if status != old {
            current = ctx.update_status(&current, &status).await?;
        }
        if !left.is_empty() {
            return Ok(Requeue::After(left.patience()));
        }
        finalize(ctx, &current).await?;
        Ok(Requeue::Never)
    }
}

async fn finalize(ctx: &Ctx, namespace: &Object) -> Result<(), Status> {
    let mut body = namespace.value();
    let Some(finalizers) = body.pointer_mut("/spec/finalizers").and_then(|list| list.as_array_mut()) else {
        return Ok(());
    };
    let before = finalizers.len();
    finalizers.retain(|finalizer| finalizer != &json!(FINALIZER));
    if finalizers.len() == before {
        return Ok(());
    }
    match ctx.update(Target::of(namespace).sub("finalize"), body).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// What is still in a namespace, and what went wrong in emptying it.
#[derive(Debug, Default, PartialEq)]
struct Left {
    /// Objects by resource (`pods.`, `deployments.apps`).
    objects: BTreeMap<String, usize>,
    /// How many objects wait for each finalizer.
    finalizers: BTreeMap<String, usize>,
    errors: Vec<String>,
    /// Longest grace period of a pod, in seconds.
    grace: u64,
}

impl Left {
    fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.errors.is_empty()
    }

    fn add(&mut self, object: &Object) {
        let kind = object.kind();
        *self.objects.entry(format!("{}.{}", kind.plural, kind.group)).or_default() += 1;
        for finalizer in object.finalizers() {
            *self.finalizers.entry(finalizer.to_owned()).or_default() += 1;
        }
    }

    /// Upstream waits half of the longest grace period and a second; pods that go wake us earlier.
    fn patience(&self) -> Duration {
        Duration::from_secs(self.grace / 2 + 1).max(PATIENCE)
    }
}

/// The kinds that a namespace can hold, each stored kind once. Events last: emptying makes more of them.
fn contents() -> Vec<&'static Kind> {
    let stored = KINDS.iter().filter(|kind| kind.namespaced && kind.is_stored() && kind.stored_as.is_none());
    let mut kinds: Vec<&'static Kind> = stored.collect();
    let (pods, events) = (Kind::of::<Pod>(), Kind::of::<Event>());
    kinds.sort_by_key(|kind| (*kind != pods, *kind == events));
    kinds
}

/// Asks for the deletion of everything in the namespace, and says what is left after that.
async fn empty(ctx: &Ctx, namespace: &str) -> Left {
    let mut left = Left::default();
    for kind in contents() {
        if let Err(error) = empty_of(ctx, kind, namespace, &mut left).await {
            left.errors.push(error.message);
        }
        if kind == Kind::of::<Pod>() && !left.objects.is_empty() {
            // Everything else stays until the pods have stopped.
            break;
        }
    }
    left
}

async fn empty_of(ctx: &Ctx, kind: &'static Kind, namespace: &str, left: &mut Left) -> Result<(), Status> {
    let present = ctx.client.list(kind, namespace, ListOptions::default()).await?.items;
    if present.is_empty() {
        return Ok(());
    }
    let deletions = present.iter().filter(|object| object.deleted().is_none()).map(|object| {
        let options = DeleteOptions {
            uid: Some(object.uid().to_owned()),
            propagation: Some(Propagation::Background),
            ..DeleteOptions::default()
        };
        ctx.client.delete(Target::of(object), options)
    });
    for deleted in futures_util::future::join_all(deletions).await {
        match deleted {
            Err(error) if !error.is_not_found() && !error.is_conflict() => return Err(error),
            _ => {}
        }
    }
    for object in ctx.client.list(kind, namespace, ListOptions::default()).await?.items {
        left.add(&object);
        left.grace = left.grace.max(grace(&object));
    }
    Ok(())
}

fn grace(object: &Arc<Object>) -> u64 {
    let Ok(pod) = object.view::<Pod>() else { return 0 };
    let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    if object.kind() == Kind::of::<Pod>() { u64::try_from(seconds).unwrap_or(0) } else { 0 }
}

/// The status of a namespace that goes away: the phase, and a condition for each way it can be held up.
fn status(old: &NamespaceStatus, left: &Left, now: Timestamp) -> NamespaceStatus {
    let mut status = NamespaceStatus { phase: Some("Terminating".to_owned()), ..old.clone() };
    let conditions = status.conditions.get_or_insert_default();
    let list = |counts: &BTreeMap<String, usize>, text: &dyn Fn(&str, usize) -> String| {
        counts.iter().map(|(name, count)| text(name, *count)).collect::<Vec<_>>().join(", ")
    };
    let errors: BTreeSet<&str> = left.errors.iter().map(String::as_str).collect();
    let errors = errors.into_iter().collect::<Vec<_>>().join(", ");
    let remaining = list(&left.objects, &|name, count| format!("{name} has {count} resource instances"));
    let finalizing = list(&left.finalizers, &|name, count| format!("{name} in {count} resource instances"));
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            false,
            "",
            String::new(),
            "ResourcesDiscovered",
            "All resources successfully discovered",
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            false,
            "",
            String::new(),
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed",
        ),
        (
            "NamespaceDeletionContentFailure",
            !errors.is_empty(),
            "ContentDeletionFailed",
            format!("Failed to delete all resource types, {} remaining: {errors}", left.errors.len()),
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization",
        ),
        (
            "NamespaceContentRemaining",
            !remaining.is_empty(),
            "SomeResourcesRemain",
            format!("Some resources are remaining: {remaining}"),
            "ContentRemoved",
            "All content successfully removed",
        ),
        (
            "NamespaceFinalizersRemaining",
            !finalizing.is_empty(),
            "SomeFinalizersRemain",
            format!("Some content in the namespace has finalizers remaining: {finalizing}"),
            "ContentHasNoFinalizers",
            "All content-preserving finalizers finished",
        ),
    ];
    for (type_, bad, bad_reason, bad_message, good_reason, good_message) in rows {
        let (value, reason, message) = match bad {
            true => ("True", bad_reason, bad_message),
            false => ("False", good_reason, good_message.to_owned()),
        };
        set(conditions, type_, value, reason, message, now);
    }
    status
}

fn set(
    conditions: &mut Vec<NamespaceCondition>,
    type_: &str,
    value: &str,
    reason: &str,
    message: String,
    now: Timestamp,
) {
    let at = conditions.iter().position(|condition| condition.type_ == type_);
    let same_value = at.is_some_and(|at| conditions[at].status == value);
    let since = if same_value { at.and_then(|at| conditions[at].last_transition_time.clone()) } else { None };
    let condition = NamespaceCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: since.or_else(|| Some(seconds(now))),
    };
    match at {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::now;

    #[test]
    fn pods_go_first_and_events_last() {
        let kinds = contents();
        assert_eq!(kinds[0].plural, "pods");
        assert_eq!(kinds.last().unwrap().plural, "events");
        assert!(kinds.iter().all(|kind| kind.namespaced), "what is not in a namespace stays");
        assert_eq!(kinds.iter().filter(|kind| kind.kind == "Event").count(), 1, "each is stored once");
        assert!(!kinds.iter().any(|kind| kind.kind == "LocalSubjectAccessReview"));
    }

    #[test]
    fn conditions_tell_what_holds_a_namespace_up() {
        let mut left = Left::default();
        left.objects.insert("pods.".to_owned(), 2);
        left.finalizers.insert("example.com/f".to_owned(), 1);
        let held = status(&NamespaceStatus::default(), &left, now());
        let text = |status: &NamespaceStatus, type_: &str| {
            let found =
                status.conditions.iter().flatten().find(|condition| condition.type_ == type_).unwrap();
            format!(
                "{} {} {}",
                found.status,
                found.reason.as_deref().unwrap(),
                found.message.as_deref().unwrap()
            )
        };
        assert_eq!(held.phase.as_deref(), Some("Terminating"));
        assert_eq!(
            text(&held, "NamespaceContentRemaining"),
            "True SomeResourcesRemain Some resources are remaining: pods. has 2 resource instances"
        );
        assert_eq!(
            text(&held, "NamespaceFinalizersRemaining"),
            "True SomeFinalizersRemain Some content in the namespace has finalizers remaining: example.com/f in 1 resource instances"
        );
        let later = now() + Duration::from_secs(9);
        assert_eq!(status(&held, &left, later), held, "nothing new is nothing to write");
        let free = status(&held, &Left::default(), later);
        assert_eq!(
            text(&free, "NamespaceContentRemaining"),
            "False ContentRemoved All content successfully removed"
        );
    }
}
