//! The history of the pod template of a DaemonSet or StatefulSet, kept as ControllerRevisions.
//!
//! A revision holds the template as the patch that brings it back, which is what `kubectl rollout undo` sends.
//! The one with the present template has the highest number: rolling back renumbers, it copies nothing.
//! Upstream: pkg/controller/history and what the two controllers do with it.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use minke_api::{ApiType, Kind, LabelSelector, Object, Status};
use minke_client::{DeleteOptions, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Typed, controller_ref};
use crate::rollout::hash_of;

pub(crate) type Revision = Typed<ControllerRevision>;

/// Label of pods with the revision that they are of: a hash for a DaemonSet, a name for a StatefulSet.
pub(crate) const POD_REVISION: &str = "controller-revision-hash";

/// The state that a revision keeps: a patch that replaces the pod template.
pub(crate) fn patch_of(template: &PodTemplateSpec) -> Value {
    let mut template = template.to_value();
    template["$patch"] = "replace".into();
    json!({ "spec": { "template": template } })
}

/// The pod template that a revision keeps.
pub(crate) fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.0.get("spec")?.get("template")?.clone();
    template.as_object_mut()?.remove("$patch");
    PodTemplateSpec::from_value(&template).ok()
}

/// Its place in the history, from 1.
fn number(revision: &ControllerRevision) -> i64 {
    revision.revision.unwrap_or(0)
}

/// What must happen so that the newest revision keeps `patch`. Revisions are named by their place.
#[derive(Debug, PartialEq)]
pub(crate) enum Step {
    Create {
        revision: i64,
    },
    Renumber {
        at: usize,
        revision: i64,
    },
    /// All is well.
    Keep {
        at: usize,
    },
}

/// Decides.
pub(crate) fn plan(revisions: &[Revision], patch: &Value) -> Step {
    let same = |revision: &Revision| revision.data.0 == *patch;
    let newest = revisions.iter().enumerate().filter(|(_, revision)| same(revision));
    let present = newest.max_by_key(|(_, revision)| number(revision)).map(|(at, _)| at);
    let others = revisions.iter().enumerate().filter(|(at, _)| Some(*at) != present);
    let next = others.map(|(_, revision)| number(revision)).max().unwrap_or(0) + 1;
    match present {
        None => Step::Create { revision: next },
        Some(at) if number(&revisions[at]) < next => Step::Renumber { at, revision: next },
        Some(at) => Step::Keep { at },
    }
}

/// The `surplus` oldest of the revisions that nobody uses.
pub(crate) fn oldest_unused(
    revisions: &[Revision],
    in_use: impl Fn(&Revision) -> bool,
    surplus: usize,
) -> Vec<&Revision> {
    let mut unused: Vec<&Revision> = revisions.iter().filter(|revision| !in_use(revision)).collect();
    unused.sort_by_key(|revision| number(revision));
    unused.truncate(surplus);
    unused
}

/// An owner of revisions, as far as they care.
pub(crate) struct Owner<'a> {
    pub object: &'a Object,
    pub selector: &'a LabelSelector,
    pub template: &'a PodTemplateSpec,
    pub collisions: Option<i32>,
    /// Label that a revision has its hash in.
    pub hash_label: &'static str,
}

/// The revisions of an owner, the one of the present template among them.
pub(crate) struct History {
    pub revisions: Vec<Revision>,
    pub present: usize,
}

impl History {
    pub fn present(&self) -> &Revision {
        &self.revisions[self.present]
    }
}

/// Brings the history up to date with the template. `None` when the new revision's name is taken by
/// another: then the owner has to count a collision, and its next name is a different one.
pub(crate) async fn keep(ctx: &Ctx, owner: &Owner<'_>) -> Result<Option<History>, Status> {
    let kind = Kind::of::<ControllerRevision>();
    let revisions = ctx.claim(owner.object, owner.selector, kind).await?;
    let mut revisions: Vec<Revision> = revisions.into_iter().filter_map(Typed::new).collect();
    let patch = patch_of(owner.template);
    let present = match plan(&revisions, &patch) {
        Step::Keep { at } => at,
        Step::Renumber { at, revision } => {
            let mut body = revisions[at].object.value();
            body["revision"] = revision.into();
            let renumbered = ctx.update(Target::of(&revisions[at].object), body).await?;
            revisions[at] = Typed::new(renumbered).ok_or_else(unreadable)?;
            at
        }
        Step::Create { revision } => {
            let Some(made) = create(ctx, owner, patch, revision).await? else { return Ok(None) };
            revisions.push(made);
            revisions.len() - 1
        }
    };
    Ok(Some(History { revisions, present }))
}

async fn create(
    ctx: &Ctx,
    owner: &Owner<'_>,
    patch: Value,
    revision: i64,
) -> Result<Option<Revision>, Status> {
    let kind = Kind::of::<ControllerRevision>();
    let body = revision_of(owner, &patch, revision);
    let error = match ctx.create(kind, owner.object.namespace(), body.clone()).await {
        Ok(made) => return Typed::new(made).map(Some).ok_or_else(unreadable),
        Err(error) if error.is_already_exists() => error,
        Err(error) => return Err(error),
    };
    let name = body["metadata"]["name"].as_str().unwrap_or_default();
    let other = ctx.client.get(Target::object(kind, owner.object.namespace(), name)).await?;
    let ours = other.controller().is_some_and(|controller| *controller.uid == *owner.object.uid());
    let same = Revision::new(other).is_some_and(|other| other.data.0 == patch);
    // Our own is one that the cache does not show yet.
    if ours && same { Err(error) } else { Ok(None) }
}

fn unreadable() -> Status {
    Status::internal("the server's own ControllerRevision cannot be read")
}

/// Longest part of the owner's name in the name of a revision, in bytes.
const PREFIX_MAX: usize = 223;

fn revision_of(owner: &Owner, patch: &Value, revision: i64) -> Value {
    let hash = hash_of(owner.template, owner.collisions);
    let labels = owner.template.metadata.as_ref().and_then(|metadata| metadata.labels.clone());
    let mut labels: BTreeMap<String, String> = labels.unwrap_or_default();
    labels.insert(owner.hash_label.to_owned(), hash.clone());
    let prefix: String = owner.object.name().chars().take(PREFIX_MAX).collect();
    json!({
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": format!("{prefix}-{hash}"),
            "namespace": owner.object.namespace(),
            "labels": labels,
            // `rollout history` shows the change-cause of each.
            "annotations": owner.object.value()["metadata"]["annotations"],
            "ownerReferences": [controller_ref(owner.object)],
        },
        "data": patch,
        "revision": revision,
    })
}

/// Deletes revisions, all that can be.
pub(crate) async fn delete(ctx: &Ctx, revisions: Vec<&Revision>) -> Result<(), Status> {
    let deletions =
        revisions.into_iter().map(|revision| ctx.delete(&revision.object, DeleteOptions::default()));
    let done = futures_util::future::join_all(deletions).await;
    done.into_iter().find_map(Result::err).map_or(Ok(()), Err)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn template(image: &str) -> PodTemplateSpec {
        let template = json!({
            "metadata": { "labels": { "app": "web" } },
            "spec": { "containers": [{ "name": "c", "image": image }] },
        });
        serde_json::from_value(template).expect("a template")
    }

    pub(crate) fn revision(name: &str, image: &str, number: i64) -> Revision {
        let object = json!({
            "metadata": { "name": name, "namespace": "ns", "uid": name, "labels": { POD_REVISION: name } },
            "data": patch_of(&template(image)),
            "revision": number,
        });
        let object = Object::from_value(Kind::of::<ControllerRevision>(), &object).expect("an object");
        Typed::new(object.into()).expect("a revision")
    }

    #[track_caller]
    fn check(revisions: &[(&str, i64)], want: Step) {
        let revisions: Vec<Revision> =
            revisions.iter().map(|(image, number)| revision(image, image, *number)).collect();
        assert_eq!(plan(&revisions, &patch_of(&template("v1"))), want);
    }

    #[test]
    fn the_present_template_has_the_highest_revision() {
        check(&[], Step::Create { revision: 1 });
        check(&[("v1", 1)], Step::Keep { at: 0 });
        check(&[("v2", 1)], Step::Create { revision: 2 });
        check(&[("v2", 4), ("v3", 2)], Step::Create { revision: 5 });
        check(&[("v1", 1), ("v2", 2)], Step::Renumber { at: 0, revision: 3 });
        check(&[("v2", 2), ("v1", 3)], Step::Keep { at: 1 });
        check(&[("v1", 1), ("v1", 2)], Step::Keep { at: 1 });
    }

    #[test]
    fn a_plan_settles_after_one_step() {
        for numbers in [[1, 2, 3], [3, 2, 1], [1, 1, 1], [5, 9, 7]] {
            for present in ["v1", "v2", "v9"] {
                let images = ["v1", "v2", "v3"];
                let mut all: Vec<Revision> =
                    images.iter().zip(numbers).map(|(image, n)| revision(image, image, n)).collect();
                let patch = patch_of(&template(present));
                match plan(&all, &patch) {
                    Step::Keep { .. } => {}
                    Step::Create { revision: n } => all.push(revision("new", present, n)),
                    Step::Renumber { at, revision: n } => all[at] = revision("again", present, n),
                }
                let Step::Keep { at } = plan(&all, &patch) else { panic!("{numbers:?} {present}") };
                assert!(all.iter().all(|revision| number(revision) <= number(&all[at])));
            }
        }
    }

    #[test]
    fn a_revision_gives_its_template_back() {
        assert_eq!(template_of(&revision("a", "v7", 1)), Some(template("v7")));
    }

    #[test]
    fn the_oldest_that_nobody_uses_go() {
        let all = [revision("c", "v3", 3), revision("a", "v1", 1), revision("b", "v2", 2)];
        let names = |surplus| -> Vec<&str> {
            let unused = oldest_unused(&all, |revision| revision.object.name() == "b", surplus);
            unused.into_iter().map(|revision| revision.object.name()).collect()
        };
        assert_eq!((names(0), names(1), names(5)), (vec![], vec!["a"], vec!["a", "c"]));
    }

    #[test]
    fn a_revision_is_named_by_its_hash() {
        let (kind, template) = (Kind::of::<k8s_openapi::api::apps::v1::DaemonSet>(), template("v1"));
        let selector = LabelSelector::nothing();
        let object = json!({ "metadata": {
            "name": "web", "namespace": "ns", "uid": "u", "annotations": { "kubernetes.io/change-cause": "why" },
        } });
        let object = Object::from_value(kind, &object).expect("an object");
        let owner = |collisions| Owner {
            object: &object,
            selector: &selector,
            template: &template,
            collisions,
            hash_label: "hash",
        };
        let first = revision_of(&owner(None), &patch_of(&template), 7);
        let hash = first["metadata"]["labels"]["hash"].as_str().expect("a hash");
        assert_eq!(first["metadata"]["name"], format!("web-{hash}"));
        assert_eq!(first["metadata"]["labels"]["app"], "web");
        assert_eq!(first["metadata"]["annotations"]["kubernetes.io/change-cause"], "why");
        assert_eq!(
            (&first["revision"], &first["metadata"]["ownerReferences"][0]["uid"]),
            (&7.into(), &"u".into())
        );
        let second = revision_of(&owner(Some(1)), &patch_of(&template), 7);
        assert_ne!(first["metadata"]["name"], second["metadata"]["name"]);
    }
}
