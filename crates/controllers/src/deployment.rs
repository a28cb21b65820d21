//! Rolls out what a Deployment describes, one ReplicaSet per version of its pod template.
//!
//! Reads Deployments, ReplicaSets and (for Recreate) pods from the cache; writes ReplicaSets, the revision
//! annotation and the status of the Deployment. What to do is decided in [`crate::rollout`].
//! A rollback is nothing special: the template of an old ReplicaSet comes back, and with it that ReplicaSet.

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use minke_api::{ApiType, Kind, LabelSelector, Object, Status};
use minke_client::{Change, DeleteOptions, Propagation, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, controller_ref};
use crate::pods;
use crate::rollout::{self, Annotations, DESIRED, HASH, MAX, REVISION, Step};
use crate::run::Controller;

pub(crate) struct Deployments;

#[async_trait]
impl Controller for Deployments {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Deployment>(), Kind::of::<ReplicaSet>(), Kind::of::<Pod>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<ReplicaSet>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<Deployment>();
        let object = change.object();
        if object.kind() == kind {
            return vec![Item::of(object)];
        }
        if object.kind() == Kind::of::<Pod>() {
            // Recreate waits for the last old pod to be gone; nobody else asks about pods.
            let sets = Kind::of::<ReplicaSet>();
            let gone = change.new.is_none().then(|| Item::controller_of(object, sets)).flatten();
            let set = gone.and_then(|item| ctx.informers.of(sets).get_key(&item.key));
            return set.and_then(|set| Item::controller_of(&set, kind)).into_iter().collect();
        }
        let states = change.old.iter().chain(&change.new);
        let mut items: Vec<Item> = states.filter_map(|set| Item::controller_of(set, kind)).collect();
        if let Some(orphan) = change.new.as_ref().filter(|set| set.controller().is_none()) {
            for deployment in ctx.informers.of(kind).in_namespace(orphan.namespace()) {
                let Some(typed) = Typed::<Deployment>::new(deployment.clone()) else { continue };
                if selector(&typed).is_some_and(|selector| selector.matches(orphan.labels())) {
                    items.push(Item::of(&deployment));
                }
            }
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(deployment) = ctx.get::<Deployment>(&item.key) else { return Ok(Requeue::Never) };
        let Some(selector) = selector(&deployment) else { return Ok(Requeue::Never) };
        let object = &deployment.object;
        if selector.is_everything() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.";
            ctx.events.warning(object, "SelectingAll", message);
            return Ok(Requeue::Never);
        }
        let sets = ctx.claim(object, &selector, Kind::of::<ReplicaSet>()).await?;
        let sets: Vec<Typed<ReplicaSet>> = sets.into_iter().filter_map(Typed::new).collect();
        let mut plan = rollout::plan(&deployment, &sets, |old| any_pod_of(ctx, old), ctx.now());
        let acted = carry_out(ctx, &deployment, &sets, &plan.steps, &mut plan.status).await;
        // The annotation lies on the object and the status on its subresource: two writes, the second of
        // which must know the revision of the first.
        let mut current = object.clone();
        if let (Some(revision), Ok(())) = (&plan.revision, &acted) {
            let mut body = object.value();
            body["metadata"]["annotations"][REVISION] = revision.clone().into();
            current = ctx.update(Target::of(object), body).await?;
        }
        if deployment.status.as_ref() != Some(&plan.status) {
            ctx.update_status(&current, &plan.status).await?;
        }
        acted?;
        Ok(plan.look_again.map_or(Requeue::Never, Requeue::After))
    }
}

fn selector(deployment: &Deployment) -> Option<LabelSelector> {
    LabelSelector::from_spec(&deployment.spec.selector).ok()
}

/// Whether any pod of these sets may still run.
fn any_pod_of(ctx: &Ctx, sets: &[&ReplicaSet]) -> bool {
    let uids = sets.iter().filter_map(|set| set.metadata.uid.as_deref());
    let pods = ctx.informer::<Pod>();
    let owned = uids.flat_map(|uid| pods.owned_by(uid));
    owned.filter_map(Typed::<Pod>::new).any(|pod| !pods::is_finished(&pod))
}

async fn carry_out(
    ctx: &Ctx,
    deployment: &Typed<Deployment>,
    sets: &[Typed<ReplicaSet>],
    steps: &[Step],
    status: &mut DeploymentStatus,
) -> Result<(), Status> {
    for step in steps {
        match step {
            Step::Create { replicas, annotations } => {
                create(ctx, deployment, *replicas, annotations, status).await?;
            }
            Step::Refresh { set, annotations, min_ready_seconds } => {
                let mut body = sets[*set].object.value();
                body["metadata"]["annotations"] = json!(annotations);
                body["spec"]["minReadySeconds"] = (*min_ready_seconds).into();
                ctx.update(Target::of(&sets[*set].object), body).await?;
            }
            Step::Resize { set, from, to } => resize(ctx, deployment, &sets[*set].object, *from, *to).await?,
            Step::Delete { set } => {
                let options =
                    DeleteOptions { propagation: Some(Propagation::Background), ..DeleteOptions::default() };
                ctx.delete(&sets[*set].object, options).await?;
            }
        }
    }
    Ok(())
}

async fn resize(
    ctx: &Ctx,
    deployment: &Typed<Deployment>,
    set: &Object,
    from: i32,
    to: i32,
) -> Result<(), Status> {
    let (desired, max) = rollout::limits(deployment);
    let mut body = set.value();
    body["spec"]["replicas"] = to.into();
    body["metadata"]["annotations"][DESIRED] = desired.to_string().into();
    body["metadata"]["annotations"][MAX] = max.to_string().into();
    ctx.update(Target::of(set), body).await?;
    if from != to {
        announce(ctx, deployment, set.name(), from, to);
    }
    Ok(())
}

fn announce(ctx: &Ctx, deployment: &Typed<Deployment>, set: &str, from: i32, to: i32) {
    let direction = if to > from { "up" } else { "down" };
    let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
    ctx.events.normal(&deployment.object, "ScalingReplicaSet", message);
}

/// Creates the ReplicaSet of the present template. When something else has its name, that is counted in the
/// status, and the next pass has another name.
async fn create(
    ctx: &Ctx,
    deployment: &Typed<Deployment>,
    replicas: i32,
    annotations: &Annotations,
    status: &mut DeploymentStatus,
) -> Result<(), Status> {
    let object = &deployment.object;
    let name = rollout::set_name(deployment);
    let body = replica_set(deployment, &name, replicas, annotations);
    let error = match ctx.create(Kind::of::<ReplicaSet>(), object.namespace(), body).await {
        Ok(_) => {
            if replicas > 0 {
                announce(ctx, deployment, &name, 0, replicas);
            }
            return Ok(());
        }
        Err(error) => error,
    };
    if error.has_cause("NamespaceTerminating") {
        return Ok(());
    }
    if error.is_already_exists() {
        let target = Target::object(Kind::of::<ReplicaSet>(), object.namespace(), &name);
        let other = Typed::<ReplicaSet>::new(ctx.client.get(target).await?);
        let template = &deployment.spec.template;
        let ours = other.is_some_and(|other| {
            let controlled = other.object.controller().is_some_and(|owner| *owner.uid == *object.uid());
            controlled && rollout::is_of_template(&other, template)
        });
        if !ours {
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
        }
        return Err(error);
    }
    let message = format!("Failed to create new replica set {name:?}: {error}");
    if rollout::condition(status.conditions.as_deref().unwrap_or_default(), "Progressing").is_some() {
        let conditions = status.conditions.get_or_insert_default();
        rollout::set_condition(
            conditions,
            "Progressing",
            "False",
            "ReplicaSetCreateError",
            message.clone(),
            ctx.now(),
        );
    }
    ctx.events.warning(object, "ReplicaSetCreateError", message);
    Err(error)
}

fn replica_set(
    deployment: &Typed<Deployment>,
    name: &str,
    replicas: i32,
    annotations: &Annotations,
) -> Value {
    let spec = &deployment.spec;
    let hash = rollout::template_hash(deployment);
    let mut template = spec.template.to_value();
    template["metadata"]["labels"][HASH] = hash.clone().into();
    let mut selector = spec.selector.to_value();
    selector["matchLabels"][HASH] = hash.into();
    let mut set = json!({
        "apiVersion": "apps/v1",
        "kind": "ReplicaSet",
        "metadata": {
            "name": name,
            "namespace": deployment.object.namespace(),
            "labels": template["metadata"]["labels"],
            "annotations": annotations,
            "ownerReferences": [controller_ref(&deployment.object)],
        },
        "spec": { "replicas": replicas, "selector": selector, "template": template },
    });
    if let Some(seconds) = spec.min_ready_seconds.filter(|seconds| *seconds != 0) {
        set["spec"]["minReadySeconds"] = seconds.into();
    }
    set
}
