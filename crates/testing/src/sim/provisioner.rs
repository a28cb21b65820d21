//! What nodes do for the built-in storage class, without directories: volumes for claims that were given to the node,
//! and their end when they are released. Claims of more than a terabyte are refused.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use minke_api::{Kind, Object, Quantity, storage};
use minke_client::{Change, Client, DeleteOptions, Informers, Patch, Target, reference, typed};
use serde_json::json;
use tokio_util::sync::CancellationToken;

const FINALIZER: &str = "external-provisioner.volume.kubernetes.io/finalizer";
/// How long a directory takes.
const PAUSE: Duration = Duration::from_millis(700);

/// Follows claims and volumes for one node, as long as the simulation lives. Must be called within a tokio runtime.
pub fn start(client: Arc<dyn Client>, node: &str) {
    let informers = Informers::new(client.clone(), CancellationToken::new());
    let mut claims = informers.of_type::<PersistentVolumeClaim>().subscribe();
    let mut volumes = informers.of_type::<PersistentVolume>().subscribe();
    let node = node.to_owned();
    tokio::spawn(async move {
        loop {
            let change = tokio::select! {
                biased;
                Some(change) = claims.recv() => change,
                Some(change) = volumes.recv() => change,
                else => return,
            };
            let Change { new: Some(object), .. } = change else { continue };
            if object.field(storage::SELECTED_NODE_FIELD) != Some(&node) {
                continue;
            }
            let (client, node) = (client.clone(), node.clone());
            tokio::spawn(async move {
                tokio::time::sleep(PAUSE).await;
                // Others may have been quicker, or the world another one: then a later change tells.
                let _ = match object.kind().kind {
                    "PersistentVolume" => tend(&*client, &object).await,
                    _ => provide(&*client, &object, &node).await,
                };
            });
        }
    });
}

async fn provide(client: &dyn Client, object: &Object, node: &str) -> Result<(), minke_api::Status> {
    let Some(claim) = typed::<PersistentVolumeClaim>(object) else { return Ok(()) };
    let spec = claim.spec.clone().unwrap_or_default();
    let ours = storage::annotation(&claim, storage::STORAGE_PROVISIONER) == Some(storage::LOCAL_PATH);
    if !ours || spec.volume_name.is_some() {
        return Ok(());
    }
    if storage::requested(&claim) > Quantity::bytes(1 << 40) {
        let annotations = json!({ storage::SELECTED_NODE: null });
        let revision = object.revision().to_string();
        let patch = json!({ "metadata": { "annotations": annotations, "resourceVersion": revision } });
        return client.patch(Target::of(object), Patch::Merge(patch)).await.map(drop);
    }
    let here = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [node] });
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {
            "name": format!("pvc-{}", object.uid()),
            "annotations": { storage::PROVISIONED_BY: storage::LOCAL_PATH, storage::SELECTED_NODE: node },
            "finalizers": [FINALIZER],
        },
        "spec": {
            "capacity": { "storage": storage::requested(&claim).to_string() }, "accessModes": spec.access_modes,
            "persistentVolumeReclaimPolicy": "Delete", "storageClassName": spec.storage_class_name,
            "claimRef": reference(object), "local": { "path": "/" },
            "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": [here] }] } },
        },
    });
    client.create(Target::collection(Kind::of::<PersistentVolume>(), ""), volume).await.map(drop)
}

async fn tend(client: &dyn Client, object: &Object) -> Result<(), minke_api::Status> {
    let Some(volume) = typed::<PersistentVolume>(object) else { return Ok(()) };
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    if object.deleted().is_some() && phase != Some("Bound") {
        let kept: Vec<&str> = object.finalizers().filter(|finalizer| *finalizer != FINALIZER).collect();
        let revision = object.revision().to_string();
        let patch = json!({ "metadata": { "finalizers": kept, "resourceVersion": revision } });
        return client.patch(Target::of(object), Patch::Merge(patch)).await.map(drop);
    }
    if object.deleted().is_none() && phase == Some("Released") {
        return client.delete(Target::of(object), DeleteOptions::default()).await;
    }
    Ok(())
}
