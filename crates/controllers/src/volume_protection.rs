//! Keeps claims while pods use them, and volumes while claims are bound to them.
//!
//! Both get a finalizer, which is taken away from what is being deleted once nobody needs it any more.
//! Upstream: pkg/controller/volume/pvcprotection and pvprotection.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use minke_api::{Kind, Object, Status, storage};
use minke_client::{Change, ListOptions, Target, typed};
use serde_json::Value;

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

const CLAIM: &str = "kubernetes.io/pvc-protection";
const VOLUME: &str = "kubernetes.io/pv-protection";

/// Whether the pod stands in the way of deleting the claim `name`. One without a node does not: no kubelet
/// starts a pod whose claim is being deleted.
fn uses(pod: &Pod, name: &str) -> bool {
    let has_node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()).is_some_and(|n| !n.is_empty());
    // The kubelet is through with it, and its own claims go with it.
    let is_over =
        pod.metadata.deletion_timestamp.is_some() && pod.metadata.deletion_grace_period_seconds == Some(0);
    has_node && storage::claims_of(pod).any(|(claim, own)| claim == name && !(own && is_over))
}

/// What is to happen to the finalizer of an object.
#[derive(Debug, PartialEq)]
enum Step {
    Add,
    /// It may go if nobody uses the object.
    Ask,
    Nothing,
}

fn plan(object: &Object, finalizer: &str) -> Step {
    let has = object.finalizers().any(|known| known == finalizer);
    match (object.deleted().is_some(), has) {
        (false, false) => Step::Add,
        (true, true) => Step::Ask,
        _ => Step::Nothing,
    }
}

async fn add(ctx: &Ctx, object: &Object, finalizer: &str) -> Result<(), Status> {
    let mut body = object.value();
    match body["metadata"]["finalizers"].as_array_mut() {
        Some(all) => all.push(finalizer.into()),
        None => body["metadata"]["finalizers"] = Value::Array(vec![finalizer.into()]),
    }
    ctx.update(Target::of(object), body).await.map(drop)
}

async fn take_away(ctx: &Ctx, object: &Object, finalizer: &str) -> Result<(), Status> {
    let mut body = object.value();
    if let Some(all) = body["metadata"]["finalizers"].as_array_mut() {
        all.retain(|known| known != finalizer);
    }
    ctx.update(Target::of(object), body).await.map(drop)
}

pub(crate) struct ClaimProtection;

#[async_trait]
impl Controller for ClaimProtection {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PersistentVolumeClaim>(), Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let claims = Kind::of::<PersistentVolumeClaim>();
        let object = change.object();
        if object.kind() == claims {
            return change.new.iter().map(|claim| Item::of(claim)).collect();
        }
        // Only a pod that ends, or goes, can set a claim free.
        let ends = change.new.as_ref().is_none_or(|pod| {
            pod.deleted().is_some() || matches!(pod.field("status.phase"), Some("Succeeded" | "Failed"))
        });
        let Some(pod) = typed::<Pod>(object).filter(|_| ends) else { return Vec::new() };
        let cache = ctx.informers.of(claims);
        let names = storage::claims_of(&pod).map(|(name, _)| Item::new(claims, object.namespace(), &name));
        names.filter(|item| cache.get_key(&item.key).is_some_and(|claim| claim.deleted().is_some())).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(claim) = ctx.informer::<PersistentVolumeClaim>().get_key(&item.key) else {
            return Ok(Requeue::Never);
        };
        match plan(&claim, CLAIM) {
            Step::Nothing => {}
            Step::Add => add(ctx, &claim, CLAIM).await?,
            Step::Ask => {
                // A pod that the cache does not show yet may use it: this is asked of the API server.
                let pods =
                    ctx.client.list(Kind::of::<Pod>(), claim.namespace(), ListOptions::default()).await?;
                let mut pods = pods.items.iter().filter_map(|pod| typed::<Pod>(pod));
                if !pods.any(|pod| uses(&pod, claim.name())) {
                    take_away(ctx, &claim, CLAIM).await?;
                }
            }
        }
        Ok(Requeue::Never)
    }
}

pub(crate) struct VolumeProtection;

#[async_trait]
impl Controller for VolumeProtection {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PersistentVolume>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        change.new.iter().map(|volume| Item::of(volume)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(volume) = ctx.get::<PersistentVolume>(&item.key) else { return Ok(Requeue::Never) };
        let is_bound = volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
        match plan(&volume.object, VOLUME) {
            Step::Add => add(ctx, &volume.object, VOLUME).await?,
            Step::Ask if !is_bound => take_away(ctx, &volume.object, VOLUME).await?,
            Step::Ask | Step::Nothing => {}
        }
        Ok(Requeue::Never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), want: bool) {
        let mut pod = json!({
            "metadata": {"name": "db", "namespace": "ns"},
            "spec": {"nodeName": "n1", "containers": [], "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "named"}},
                {"name": "tmp", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}},
            ]},
            "status": {"phase": "Running"},
        });
        change(&mut pod);
        let pod: Pod = serde_json::from_value(pod).unwrap();
        assert_eq!((uses(&pod, "named"), uses(&pod, "db-tmp")), (want, want));
        assert!(!uses(&pod, "other"));
    }

    #[test]
    fn a_pod_with_a_node_keeps_its_claims() {
        check(|_| {}, true);
        check(|pod| pod["spec"]["nodeName"] = "".into(), false);
        // As upstream: it is there until it is deleted.
        check(|pod| pod["status"]["phase"] = "Succeeded".into(), true);
    }

    #[test]
    fn a_finalizer_comes_with_the_object_and_goes_when_it_is_asked_for() {
        let object = |deleted: bool, finalizers: &[&str]| {
            let mut value = json!({"metadata": {"name": "c", "namespace": "n", "finalizers": finalizers}});
            if deleted {
                value["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
            }
            Object::from_value(Kind::of::<PersistentVolumeClaim>(), &value).unwrap()
        };
        assert_eq!(plan(&object(false, &["x"]), CLAIM), Step::Add);
        assert_eq!(plan(&object(false, &[CLAIM]), CLAIM), Step::Nothing);
        assert_eq!(plan(&object(true, &[CLAIM]), CLAIM), Step::Ask);
        assert_eq!(plan(&object(true, &["x"]), CLAIM), Step::Nothing);
    }
}
