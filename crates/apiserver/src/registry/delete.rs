//! Deletion: at once, after a grace period, or when the last finalizer is gone.
//!
//! What a deletion does to an object is a pure function; carrying it out is short. Upstream: apiserver
//! pkg/registry/rest/delete.go and the Delete of the generic store.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use minke_api::{Kind, Object, Status, time};
use minke_client::{DeleteOptions, Propagation};
use minke_store::Op;
use serde_json::Value;

use super::write::{Failure, encode};
use super::{Call, ListQuery, Page, Registry, convert, meta};
use crate::admission::{self, Operation, quota};
use crate::kinds::tree::Tree;

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// How many objects of a collection are deleted at a time: they share fsyncs.
const AT_ONCE: usize = 64;

/// What a deletion did.
#[derive(Debug, Clone)]
pub struct Deleted {
    /// The object as it is now, or as it last was.
    pub object: Arc<Object>,
    /// Whether it is really gone; else something keeps it for now.
    pub gone: bool,
}

/// What a deletion does to an object.
#[derive(Debug, PartialEq)]
enum Plan {
    /// It is on its way already.
    Nothing,
    /// It stays for now, marked.
    Mark(Value),
    Remove,
}

impl Registry {
    pub async fn delete(&self, call: &Call<'_>, options: &DeleteOptions) -> Result<Deleted, Status> {
        loop {
            let old = self.stored(call)?;
            match self.try_delete(call, &old, options).await {
                Ok(deleted) => return Ok(deleted),
                // It goes whatever changed, unless it was asked to go in that very state: that is found
                // out when it is read again.
                Err(Failure::Raced) => {}
                Err(Failure::Status(status)) => return Err(*status),
            }
        }
    }

    async fn try_delete(
        &self,
        call: &Call<'_>,
        old: &Arc<Object>,
        options: &DeleteOptions,
    ) -> Result<Deleted, Failure> {
        check_preconditions(call.kind, old, options)?;
        let value = old.value();
        let request = call.admission(Operation::Delete, old.name(), Some(&value));
        admission::validate(&self.admission(), &request, &value)?;
        let kind = old.kind();
        let shown = |object: &Arc<Object>, gone| Deleted { object: convert::view(call.kind, object), gone };
        let charges = quota::charges(&*self.snapshots, &request, Some(&value), None, self.now())?;
        match plan(kind, value, options, self.now()) {
            Plan::Nothing => Ok(shown(old, false)),
            Plan::Mark(mut value) => {
                let draft = encode(kind, &mut value)?;
                if draft.same_as(old) {
                    return Ok(shown(old, false));
                }
                if call.dry_run {
                    return Ok(shown(&Arc::new(draft.seal(old.revision())), false));
                }
                let object = self.commit_one(kind, old.name(), Op::replace(draft, old)).await?;
                Ok(shown(&object, false))
            }
            Plan::Remove if call.dry_run => Ok(shown(old, true)),
            Plan::Remove => {
                let object = self.commit_charged(kind, old, Op::delete(old), &charges).await?;
                self.release(old);
                Ok(shown(&object, true))
            }
        }
    }

    /// Deletes everything that `query` selects, and returns it as it was found.
    pub async fn delete_collection(
        &self,
        call: &Call<'_>,
        query: &ListQuery,
        options: &DeleteOptions,
    ) -> Result<Page, Status> {
        let mut page = self.list(call, query).await?;
        page.items = stream::iter(page.items)
            .map(|object| async move {
                let one = Call { namespace: object.namespace(), name: object.name(), ..*call };
                match self.delete(&one, options).await {
                    Ok(deleted) => Ok(deleted.object),
                    Err(status) if status.is_not_found() => Ok(object.clone()),
                    Err(status) => Err(status),
                }
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        page.revision = self.store.revision();
        Ok(page)
    }
}

pub(super) fn check_preconditions(kind: &Kind, old: &Object, options: &DeleteOptions) -> Result<(), Status> {
    if let Some(uid) = &options.uid
        && uid != old.uid()
    {
        let why = format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({}). The object might have been \
             deleted and then recreated",
            old.uid()
        );
        return Err(Status::conflict(kind, old.name(), &why));
    }
    if let Some(revision) = options.revision
        && revision != old.revision()
    {
        let why = format!(
            "the ResourceVersion in the precondition ({revision}) does not match the ResourceVersion in record ({}). \
             The object might have been modified",
            old.revision()
        );
        return Err(Status::conflict(kind, old.name(), &why));
    }
    Ok(())
}

fn plan(kind: &Kind, mut value: Value, options: &DeleteOptions, now: Timestamp) -> Plan {
    let finalizers = finalizers_for(kind, value.at("metadata"), options.propagation);
    let pending = !finalizers.is_empty();
    match kind.kind {
        "Namespace" if !value.at("metadata").has("deletionTimestamp") => {
            set_finalizers(&mut value, finalizers);
            value.object("metadata").set("deletionTimestamp", time::format_seconds(now));
            value.object("status").set("phase", "Terminating");
            if meta::is_finished(kind, &value) { Plan::Remove } else { Plan::Mark(value) }
        }
        "Namespace" if value.at("spec").has("finalizers") => Plan::Nothing,
        "Pod" => {
            let grace = pod_grace(&value, options);
            let metadata = value.at("metadata");
            if metadata.has("deletionTimestamp") {
                let was = metadata.int("deletionGracePeriodSeconds").unwrap_or_default();
                // What is going away can only be hurried.
                let hurried = options.grace_period.map(|_| grace).filter(|grace| *grace < was);
                let Some(grace) = hurried else {
                    return if was == 0 && !pending { Plan::Remove } else { Plan::Nothing };
                };
                let at: Option<Timestamp> = metadata.text("deletionTimestamp").parse().ok();
                let asked_at = at.unwrap_or(now) - SignedDuration::from_secs(was);
                mark(&mut value, asked_at, grace);
            } else {
                mark(&mut value, now, grace);
                meta::add_generation(&mut value);
            }
            set_finalizers(&mut value, finalizers);
            if grace == 0 && !pending { Plan::Remove } else { Plan::Mark(value) }
        }
        _ if pending => {
            if !value.at("metadata").has("deletionTimestamp") {
                mark(&mut value, now, 0);
                if value.at("metadata").int("generation").is_some_and(|generation| generation > 0) {
                    meta::add_generation(&mut value);
                }
            }
            set_finalizers(&mut value, finalizers);
            Plan::Mark(value)
        }
        _ => Plan::Remove,
    }
}

/// Says that the object goes `grace` seconds after `asked_at`.
fn mark(value: &mut Value, asked_at: Timestamp, grace: i64) {
    let metadata = value.object("metadata");
    let at = asked_at.checked_add(SignedDuration::from_secs(grace)).unwrap_or(asked_at);
    metadata.set("deletionTimestamp", time::format_seconds(at));
    metadata.set("deletionGracePeriodSeconds", grace);
}

/// Seconds that a pod gets to finish. Without a node, or finished, it needs none.
fn pod_grace(pod: &Value, options: &DeleteOptions) -> i64 {
    let (spec, status) = (pod.at("spec"), pod.at("status"));
    if !spec.has("nodeName") || matches!(status.text("phase"), "Failed" | "Succeeded") {
        return 0;
    }
    let grace =
        options.grace_period.or_else(|| spec.int("terminationGracePeriodSeconds")).unwrap_or_default();
    if grace < 0 { 1 } else { grace }
}

/// The finalizers that the object has once its deletion is asked for: those of the garbage collector
/// say what becomes of what it owns.
fn finalizers_for(kind: &Kind, metadata: &Value, propagation: Option<Propagation>) -> Vec<Value> {
    let mut finalizers: Vec<Value> = metadata.items("finalizers").to_vec();
    let has = |name: &str| metadata.items("finalizers").iter().any(|f| f == name);
    let orphans_by_default = matches!(kind.kind, "ReplicationController" | "Job");
    let added = match propagation {
        Some(Propagation::Orphan) => Some(ORPHAN),
        Some(Propagation::Foreground) => Some(FOREGROUND),
        Some(Propagation::Background) => None,
        None if has(ORPHAN) => Some(ORPHAN),
        None if has(FOREGROUND) => Some(FOREGROUND),
        None => orphans_by_default.then_some(ORPHAN),
    };
    finalizers.retain(|f| f != ORPHAN && f != FOREGROUND || Some(f.as_str().unwrap_or_default()) == added);
    if let Some(added) = added.filter(|added| !has(added)) {
        finalizers.push(added.into());
    }
    finalizers
}

fn set_finalizers(value: &mut Value, finalizers: Vec<Value>) {
    let metadata = value.object("metadata");
    if finalizers.is_empty() {
        metadata.unset("finalizers");
    } else {
        metadata.set("finalizers", finalizers);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:01:00Z".parse().unwrap()
    }

    /// `want` is `remove`, `nothing`, or the metadata (and phase) of the marked object.
    #[track_caller]
    fn check(plural: &str, object: Value, options: DeleteOptions, want: Value) {
        let kind = Kind::by_plural("", "v1", plural).unwrap();
        let got = match plan(kind, object, &options, now()) {
            Plan::Remove => "remove".into(),
            Plan::Nothing => "nothing".into(),
            Plan::Mark(value) => value["metadata"].clone(),
        };
        assert_eq!(got, want);
    }

    fn grace(seconds: i64) -> DeleteOptions {
        DeleteOptions { grace_period: Some(seconds), ..DeleteOptions::default() }
    }

    fn propagation(propagation: Propagation) -> DeleteOptions {
        DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() }
    }

    #[test]
    fn most_objects_go_at_once_unless_finalizers_keep_them() {
        let none = DeleteOptions::default();
        check("configmaps", json!({"metadata": {}}), none.clone(), "remove".into());
        check(
            "configmaps",
            json!({"metadata": {"finalizers": ["a/b"]}}),
            none.clone(),
            json!({"finalizers": ["a/b"], "deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 0}),
        );
        check(
            "services",
            json!({"metadata": {"generation": 2}}),
            propagation(Propagation::Foreground),
            json!({"finalizers": ["foregroundDeletion"], "generation": 3,
                   "deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 0}),
        );
        // Changing one's mind while it is going away.
        check(
            "services",
            json!({"metadata": {"finalizers": ["foregroundDeletion"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            propagation(Propagation::Background),
            "remove".into(),
        );
        check(
            "replicationcontrollers",
            json!({"metadata": {}}),
            none,
            json!({"finalizers": ["orphan"], "deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 0}),
        );
    }

    #[test]
    fn pods_get_time_to_finish() {
        let running = |metadata: Value| json!({"metadata": metadata, "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}});
        let marked = |at: &str, seconds: i64| json!({"generation": 2, "deletionTimestamp": at, "deletionGracePeriodSeconds": seconds});
        let new = || running(json!({"generation": 1}));
        check("pods", new(), DeleteOptions::default(), marked("2026-01-01T00:01:30Z", 30));
        check("pods", new(), grace(5), marked("2026-01-01T00:01:05Z", 5));
        check("pods", new(), grace(-1), marked("2026-01-01T00:01:01Z", 1));
        check("pods", new(), grace(0), "remove".into());
        check("pods", json!({"metadata": {}, "spec": {}}), DeleteOptions::default(), "remove".into());
        check(
            "pods",
            json!({"metadata": {}, "spec": {"nodeName": "n"}, "status": {"phase": "Succeeded"}}),
            grace(30),
            "remove".into(),
        );
    }

    #[test]
    fn a_second_deletion_of_a_pod_only_hurries_it() {
        let going = || {
            json!({"metadata": {"generation": 2, "deletionTimestamp": "2026-01-01T00:01:20Z", "deletionGracePeriodSeconds": 30},
                   "spec": {"nodeName": "n", "terminationGracePeriodSeconds": 30}})
        };
        check("pods", going(), DeleteOptions::default(), "nothing".into());
        check("pods", going(), grace(40), "nothing".into());
        check(
            "pods",
            going(),
            grace(10),
            json!({"generation": 2, "deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 10}),
        );
        check("pods", going(), grace(0), "remove".into());
    }

    #[test]
    fn namespaces_are_emptied_first() {
        check(
            "namespaces",
            json!({"metadata": {}, "spec": {"finalizers": ["kubernetes"]}}),
            DeleteOptions::default(),
            json!({"deletionTimestamp": "2026-01-01T00:01:00Z"}),
        );
        let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:01:00Z"}, "spec": {"finalizers": ["kubernetes"]}});
        check("namespaces", going, DeleteOptions::default(), "nothing".into());
        let empty = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:01:00Z"}, "spec": {}});
        check("namespaces", empty, DeleteOptions::default(), "remove".into());
    }
}
