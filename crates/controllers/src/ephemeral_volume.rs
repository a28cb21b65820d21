//! Makes the claims of pods' generic ephemeral volumes; they belong to their pods and go with them.
//!
//! Upstream: pkg/controller/volume/ephemeral.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Volume};
use minke_api::{Key, Kind, Status, storage};
use minke_client::{Change, typed};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, controller_ref};
use crate::run::Controller;
use crate::serviceaccount::unless_terminating;

/// The claim that a pod's volume is made of; none for other volumes.
fn claim(pod: &Typed<Pod>, volume: &Volume) -> Option<Value> {
    let template = volume.ephemeral.as_ref()?.volume_claim_template.as_ref()?;
    let (name, _) = storage::claim_of(pod.object.name(), volume)?;
    let mut metadata = json!({
        "name": name,
        "namespace": pod.object.namespace(),
        "ownerReferences": [controller_ref(&pod.object)],
    });
    let given = template.metadata.clone().unwrap_or_default();
    for (field, map) in [("labels", given.labels), ("annotations", given.annotations)] {
        if let Some(map) = map {
            metadata[field] = json!(map);
        }
    }
    Some(json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": template.spec,
    }))
}

fn has_any(pod: &Pod) -> bool {
    storage::claims_of(pod).any(|(_, own)| own)
}

pub(crate) struct EphemeralVolumes;

#[async_trait]
impl Controller for EphemeralVolumes {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>(), Kind::of::<PersistentVolumeClaim>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        let (object, pods) = (change.object(), Kind::of::<Pod>());
        if object.kind() == pods {
            let pod = change.new.as_ref().filter(|pod| typed::<Pod>(pod).is_some_and(|pod| has_any(&pod)));
            return pod.map(|pod| Item::of(pod)).into_iter().collect();
        }
        // A claim that is gone may be missed by its pod.
        let owner = change.old.as_ref().filter(|_| change.new.is_none());
        owner.and_then(|claim| Item::controller_of(claim, pods)).into_iter().collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(pod) = ctx.get::<Pod>(&item.key).filter(|pod| pod.object.deleted().is_none()) else {
            return Ok(Requeue::Never);
        };
        let claims = ctx.informer::<PersistentVolumeClaim>();
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            let Some(claim) = claim(&pod, volume) else { continue };
            let name = claim["metadata"]["name"].as_str().unwrap_or_default();
            let key = Key::new(&item.key.namespace, name);
            match claims.get_key(&key) {
                None => {
                    unless_terminating(ctx.create(claims.kind(), &key.namespace, claim).await.map(drop))?;
                }
                // The scheduler tells the user, and goes on doing so while that is so.
                Some(other) if other.controller().is_none_or(|owner| *owner.uid != *pod.object.uid()) => {
                    tracing::debug!(pod = %item.key, claim = %key, "The claim of an ephemeral volume is another's");
                }
                Some(_) => {}
            }
        }
        Ok(Requeue::Never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::pod;

    #[test]
    fn a_claim_is_named_after_pod_and_volume_and_belongs_to_the_pod() {
        let spec = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
        let pod = pod("db", |pod| {
            pod["spec"]["volumes"] = json!([
                {"name": "tmp", "ephemeral": {"volumeClaimTemplate": {"metadata": {"labels": {"a": "b"}}, "spec": spec}}},
                {"name": "other", "emptyDir": {}},
            ]);
        });
        let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
        let made = claim(&pod, &volumes[0]).unwrap();
        assert_eq!(made["metadata"]["name"], "db-tmp");
        assert_eq!(made["metadata"]["namespace"], "ns");
        assert_eq!(made["metadata"]["labels"], json!({"a": "b"}));
        assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], "uid-db");
        assert_eq!(made["metadata"]["ownerReferences"][0]["controller"], true);
        assert_eq!(made["spec"], spec);
        assert_eq!(claim(&pod, &volumes[1]), None);
        assert!(has_any(&pod));
    }
}
