//! What claims and volumes say of each other: annotations, classes, and which volume suits a claim.
//!
//! The controller that binds and the scheduler must agree on all of this.
//! Upstream: component-helpers/storage/volume and pkg/volume/util.

use k8s_openapi::api::core::v1::{
    ObjectReference, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, Pod, Volume,
};
use k8s_openapi::api::storage::v1::StorageClass;

use crate::{LabelSelector, Labels, Quantity};

/// On a claim: its binding was completed once.
pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
/// On claims and volumes: a controller, not the user, made the binding.
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// On claims of classes that wait for their first consumer: the node that it was given. Also on volumes that
/// were made there for such claims.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
/// The field by which claims and volumes are selected by their node.
pub const SELECTED_NODE_FIELD: &str = "metadata.annotations.volume.kubernetes.io/selected-node";
/// On a claim: who is to make a volume for it.
pub const STORAGE_PROVISIONER: &str = "volume.kubernetes.io/storage-provisioner";
pub const BETA_STORAGE_PROVISIONER: &str = "volume.beta.kubernetes.io/storage-provisioner";
/// On a volume: who made it.
pub const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// The provisioner of classes whose volumes are made by hand.
pub const NO_PROVISIONER: &str = "kubernetes.io/no-provisioner";
/// The provisioner that makes directories on nodes.
pub const LOCAL_PATH: &str = "minke.io/local-path";
const BETA_CLASS: &str = "volume.beta.kubernetes.io/storage-class";
const IS_DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";
const BETA_IS_DEFAULT_CLASS: &str = "storageclass.beta.kubernetes.io/is-default-class";

/// The name of the claim that a volume of a pod is about: one that it names, or the one made for it alone.
/// The second part says which.
pub fn claim_of(pod: &str, volume: &Volume) -> Option<(String, bool)> {
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some((claim.claim_name.clone(), false));
    }
    volume.ephemeral.as_ref().map(|_| (format!("{pod}-{}", volume.name), true))
}

/// The names of all claims that a pod uses, as [`claim_of`] gives them.
pub fn claims_of(pod: &Pod) -> impl Iterator<Item = (String, bool)> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(move |volume| claim_of(name, volume))
}

/// The class that a claim asks for; none if it leaves that open.
pub fn class_of_claim(claim: &PersistentVolumeClaim) -> Option<&str> {
    let annotated = claim.metadata.annotations.as_ref().and_then(|all| all.get(BETA_CLASS));
    let class = annotated.or_else(|| claim.spec.as_ref()?.storage_class_name.as_ref());
    class.map(String::as_str)
}

/// The class of a volume, empty when it has none.
pub fn class_of_volume(volume: &PersistentVolume) -> &str {
    let annotated = volume.metadata.annotations.as_ref().and_then(|all| all.get(BETA_CLASS));
    let class = annotated.or_else(|| volume.spec.as_ref()?.storage_class_name.as_ref());
    class.map_or("", String::as_str)
}

/// Whether a class is marked as the one of claims that name none.
pub fn is_default_class(class: &StorageClass) -> bool {
    let marks = class.metadata.annotations.as_ref();
    let is = |mark: &str| marks.and_then(|marks| marks.get(mark)).is_some_and(|value| value == "true");
    is(IS_DEFAULT_CLASS) || is(BETA_IS_DEFAULT_CLASS)
}

/// Whether claims of the class are bound only once a pod that uses them has a node.
pub fn waits_for_consumer(class: &StorageClass) -> bool {
    class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer")
}

pub fn annotation<'a>(claim: &'a PersistentVolumeClaim, name: &str) -> Option<&'a str> {
    claim.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// Whether the claim is bound for good.
pub fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    !named.is_empty() && annotation(claim, BIND_COMPLETED).is_some()
}

/// Whether a volume is bound to the claim or set aside for it, by its user or by a controller.
pub fn is_meant_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    claim_ref(volume).is_some_and(|reference| {
        let (metadata, uid) = (&claim.metadata, reference.uid.as_deref().unwrap_or_default());
        reference.name == metadata.name
            && reference.namespace == metadata.namespace
            && (uid.is_empty() || metadata.uid.as_deref() == Some(uid))
    })
}

pub fn claim_ref(volume: &PersistentVolume) -> Option<&ObjectReference> {
    volume.spec.as_ref()?.claim_ref.as_ref()
}

/// Bytes that the claim asks for.
pub fn requested(claim: &PersistentVolumeClaim) -> Quantity {
    let requests = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref()?.requests.as_ref());
    requests.and_then(|all| Quantity::try_from(all.get("storage")?).ok()).unwrap_or_default()
}

/// Bytes that the volume has.
pub fn capacity(volume: &PersistentVolume) -> Quantity {
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref());
    capacity.and_then(|all| Quantity::try_from(all.get("storage")?).ok()).unwrap_or_default()
}

fn mode(mode: Option<&String>) -> &str {
    mode.map_or("Filesystem", String::as_str)
}

/// Whether both are block devices or both are file systems.
pub fn same_volume_mode(claim: &PersistentVolumeClaim, volume: &PersistentVolumeSpec) -> bool {
    let claimed = claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_ref());
    mode(claimed) == mode(volume.volume_mode.as_ref())
}

fn same_attributes(claim: &PersistentVolumeClaim, volume: &PersistentVolumeSpec) -> bool {
    let class = claim.spec.as_ref().and_then(|spec| spec.volume_attributes_class_name.as_deref());
    class.unwrap_or_default() == volume.volume_attributes_class_name.as_deref().unwrap_or_default()
}

/// Whether the volume can be accessed in every way that the claim asks for.
pub fn has_access_modes(claim: &PersistentVolumeClaim, volume: &PersistentVolumeSpec) -> bool {
    let wanted = claim.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default();
    let given = volume.access_modes.as_deref().unwrap_or_default();
    wanted.iter().all(|mode| given.contains(mode))
}

/// Why a volume that a claim names is not for it, in upstream's words.
pub fn objection(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Option<&'static str> {
    let spec = volume.spec.as_ref()?;
    if capacity(volume) < requested(claim) {
        Some("requested PV is too small")
    } else if class_of_claim(claim).unwrap_or_default() != class_of_volume(volume) {
        Some("storageClassName does not match")
    } else if !same_attributes(claim, spec) {
        Some("volumeAttributesClassName does not match")
    } else if !same_volume_mode(claim, spec) {
        Some("incompatible volumeMode")
    } else if !has_access_modes(claim, spec) {
        Some("incompatible accessMode")
    } else {
        None
    }
}

/// The volume that suits the claim best: the one set aside for it, else the smallest of those with the fewest
/// access modes. `fits_node` says whether a volume can be reached where it is wanted; without a node, `delayed`
/// claims get only what is set aside for them.
pub fn best_match<'a>(
    claim: &PersistentVolumeClaim,
    candidates: impl Iterator<Item = &'a PersistentVolume>,
    fits_node: Option<&dyn Fn(&PersistentVolume) -> bool>,
    delayed: bool,
) -> Option<&'a PersistentVolume> {
    let selector = claim.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    let selector =
        selector.map(|spec| LabelSelector::from_spec(spec).unwrap_or_else(|_| LabelSelector::nothing()));
    let is_selected = |volume: &PersistentVolume| {
        selector.as_ref().is_none_or(|selector| {
            let labels: Labels = volume.metadata.labels.clone().unwrap_or_default().into_iter().collect();
            selector.matches(&labels)
        })
    };
    let (wanted, class) = (requested(claim), class_of_claim(claim).unwrap_or_default());
    let mut best: Option<(usize, Quantity, &str, &PersistentVolume)> = None;
    for volume in candidates {
        let Some(spec) = &volume.spec else { continue };
        let meant = is_meant_for(volume, claim);
        if (spec.claim_ref.is_some() && !meant)
            || volume.metadata.deletion_timestamp.is_some()
            || capacity(volume) < wanted
            || !same_volume_mode(claim, spec)
            || !same_attributes(claim, spec)
            || !has_access_modes(claim, spec)
        {
            continue;
        }
        let reachable = fits_node.is_none_or(|fits| fits(volume));
        if meant {
            return reachable.then_some(volume);
        }
        let available =
            volume.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Available");
        let is_free = available && !(delayed && fits_node.is_none());
        if !is_free || !reachable || class_of_volume(volume) != class || !is_selected(volume) {
            continue;
        }
        let modes = spec.access_modes.as_ref().map_or(0, Vec::len);
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        let rank = (modes, capacity(volume), name, volume);
        if best.as_ref().is_none_or(|best| (rank.0, rank.1, rank.2) < (best.0, best.1, best.2)) {
            best = Some(rank);
        }
    }
    best.map(|(_, _, _, volume)| volume)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn claim(spec: Value) -> PersistentVolumeClaim {
        let mut spec = spec;
        for (field, value) in [
            ("accessModes", json!(["ReadWriteOnce"])),
            ("resources", json!({"requests": {"storage": "2Gi"}})),
            ("storageClassName", json!("slow")),
        ] {
            if spec.get(field).is_none() {
                spec[field] = value;
            }
        }
        let value = json!({"metadata": {"name": "c", "namespace": "n", "uid": "u"}, "spec": spec});
        serde_json::from_value(value).unwrap()
    }

    fn volume(name: &str, size: &str, change: impl FnOnce(&mut Value)) -> PersistentVolume {
        let mut value = json!({
            "metadata": {"name": name, "labels": {"disk": name}},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "storageClassName": "slow"},
            "status": {"phase": "Available"},
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[track_caller]
    fn check(spec: Value, volumes: &[PersistentVolume], want: Option<&str>) {
        let found = best_match(&claim(spec), volumes.iter(), None, false);
        assert_eq!(found.and_then(|volume| volume.metadata.name.as_deref()), want);
    }

    #[test]
    fn the_smallest_volume_that_suits_is_taken() {
        let all = [
            volume("tiny", "1Gi", |_| {}),
            volume("large", "9Gi", |_| {}),
            volume("fit", "3Gi", |_| {}),
            volume("many", "2Gi", |v| v["spec"]["accessModes"] = json!(["ReadWriteOnce", "ReadWriteMany"])),
            volume("fast", "2Gi", |v| v["spec"]["storageClassName"] = "fast".into()),
            volume("block", "2Gi", |v| v["spec"]["volumeMode"] = "Block".into()),
            volume("released", "2Gi", |v| v["status"]["phase"] = "Released".into()),
            volume("going", "2Gi", |v| {
                v["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
            }),
            volume("other", "2Gi", |v| {
                v["spec"]["claimRef"] = json!({"name": "x", "namespace": "n"});
            }),
        ];
        check(json!({}), &all, Some("fit"));
        check(json!({"accessModes": ["ReadWriteMany"]}), &all, Some("many"));
        check(json!({"accessModes": ["ReadOnlyMany"]}), &all, None);
        check(json!({"storageClassName": "fast"}), &all, Some("fast"));
        check(json!({"storageClassName": ""}), &all, None);
        check(json!({"volumeMode": "Block"}), &all, Some("block"));
        check(json!({"resources": {"requests": {"storage": "4Gi"}}}), &all, Some("large"));
        check(json!({"resources": {"requests": {"storage": "10Gi"}}}), &all, None);
        check(json!({"selector": {"matchLabels": {"disk": "large"}}}), &all, Some("large"));
    }

    #[test]
    fn a_volume_set_aside_for_the_claim_goes_first() {
        let meant = |uid: &str| {
            volume("meant", "8Gi", |v| {
                v["spec"]["claimRef"] = json!({"name": "c", "namespace": "n", "uid": uid});
                v["spec"]["storageClassName"] = "odd".into();
            })
        };
        check(json!({}), &[volume("fit", "2Gi", |_| {}), meant("")], Some("meant"));
        check(json!({}), &[volume("fit", "2Gi", |_| {}), meant("u")], Some("meant"));
        check(json!({}), &[volume("fit", "2Gi", |_| {}), meant("another")], Some("fit"));
    }

    #[test]
    fn delayed_claims_wait_for_a_node() {
        let all = [volume("a", "2Gi", |_| {}), volume("b", "3Gi", |_| {})];
        let claim = claim(json!({}));
        assert!(best_match(&claim, all.iter(), None, true).is_none());
        let only_b = |volume: &PersistentVolume| volume.metadata.name.as_deref() == Some("b");
        let found = best_match(&claim, all.iter(), Some(&only_b), true);
        assert_eq!(found.unwrap().metadata.name.as_deref(), Some("b"));
    }

    #[test]
    fn a_named_volume_must_suit() {
        let check = |spec: Value, want: Option<&str>| {
            assert_eq!(objection(&claim(spec), &volume("v", "2Gi", |_| {})), want);
        };
        check(json!({}), None);
        check(json!({"resources": {"requests": {"storage": "3Gi"}}}), Some("requested PV is too small"));
        check(json!({"storageClassName": ""}), Some("storageClassName does not match"));
        check(json!({"volumeMode": "Block"}), Some("incompatible volumeMode"));
        check(json!({"accessModes": ["ReadWriteMany"]}), Some("incompatible accessMode"));
    }
}
