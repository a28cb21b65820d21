//! Volumes that are claims: which directory of the node is behind one, and how it gets into the pod.

use std::fs;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, placement, storage};
use minke_client::{Client, Target};

use super::{mounts, ownership, subpath};
use crate::pod::Pod;
use crate::references::Referenced;

/// What is behind a claim.
#[derive(Debug, Clone, PartialEq)]
pub struct Backing {
    /// The name of the PersistentVolume.
    pub volume: String,
    pub path: PathBuf,
    /// The type of a hostPath, which may say that it is to be made; none for a local volume, which must be there.
    host_type: Option<String>,
    pub readonly: bool,
}

/// Why a claim cannot be mounted, for the event.
#[derive(Debug, PartialEq)]
pub struct Unfit(pub String);

/// The claim that the volume of the pod is, if it is one.
pub async fn resolve(
    client: &dyn Client,
    node: &str,
    pod: &Pod,
    volume: &core::Volume,
    referenced: &Referenced,
) -> Result<Option<Backing>, Unfit> {
    let Some((name, own)) = storage::claim_of(pod.name(), volume) else { return Ok(None) };
    let unprocessed = |why: String| {
        Unfit(format!(
            "Unable to attach or mount volumes: unmounted volumes=[{0}], unattached volumes=[], failed to process \
             volumes=[{0}]: error processing PVC {1}/{name}: {why}",
            volume.name,
            pod.namespace()
        ))
    };
    let claim = referenced
        .claim(&name)
        .map_err(|why| unprocessed(format!("failed to fetch PVC from API server: {why}")))?;
    let named = bound_volume(pod, &claim, own).map_err(unprocessed)?;
    let fetched = client.get(Target::object(Kind::of::<core::PersistentVolume>(), "", &named)).await;
    let object = fetched.map_err(|error| {
        unprocessed(format!("failed to fetch PV {named} from API server: {}", error.message))
    })?;
    let Some(found) = minke_client::typed::<core::PersistentVolume>(&object) else {
        return Err(unprocessed(format!("PV {named} cannot be read")));
    };
    let readonly = volume.persistent_volume_claim.as_ref().and_then(|claim| claim.read_only) == Some(true);
    let backing = backing(&found, &claim, readonly).map_err(unprocessed)?;
    let affinity = found.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref()?.required.as_ref());
    if let Some(required) = affinity {
        let host = client.get(Target::object(Kind::of::<core::Node>(), "", node)).await;
        let labels =
            host.ok().and_then(|host| minke_client::typed::<core::Node>(&host)?.metadata.labels.clone());
        let labels = labels.unwrap_or_default();
        if !required.node_selector_terms.iter().any(|term| placement::term_holds(term, node, &labels)) {
            return Err(Unfit(format!(
                "MountVolume.NodeAffinity check failed for volume \"{named}\" : no matching NodeSelectorTerms"
            )));
        }
    }
    Ok(Some(backing))
}

/// The name of the volume that the claim is bound to.
fn bound_volume(pod: &Pod, claim: &core::PersistentVolumeClaim, own: bool) -> Result<String, String> {
    let metadata = &claim.metadata;
    let mut owners = metadata.owner_references.iter().flatten();
    if own && !owners.any(|owner| owner.controller == Some(true) && owner.uid == pod.uid()) {
        return Err(format!(
            "PVC {}/{} was not created for pod {}/{} (pod is not owner)",
            pod.namespace(),
            metadata.name.as_deref().unwrap_or_default(),
            pod.namespace(),
            pod.name()
        ));
    }
    // What runs already goes on, and keeps its claim for so long.
    let runs = pod.status().is_some_and(|status| status.phase.as_deref() == Some("Running"));
    if metadata.deletion_timestamp.is_some() && !runs {
        return Err("PVC is being deleted".to_owned());
    }
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
    // The status follows the binding by a moment, in which the pod may be here already.
    if named.is_empty() || (phase != Some("Bound") && !(storage::is_bound(claim) && phase == Some("Pending")))
    {
        return Err("PVC is not bound".to_owned());
    }
    Ok(named)
}

fn backing(
    volume: &core::PersistentVolume,
    claim: &core::PersistentVolumeClaim,
    readonly: bool,
) -> Result<Backing, String> {
    let name = volume.metadata.name.clone().unwrap_or_default();
    let Some(reference) = storage::claim_ref(volume) else {
        return Err(format!(
            "found PV object \"{name}\" with a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"
        ));
    };
    if reference.uid != claim.metadata.uid {
        let text = |uid: &Option<String>| uid.clone().unwrap_or_default();
        return Err(format!(
            "found PV object \"{name}\" with a pv.Spec.ClaimRef.UID \"{}\" that does not point to claim UID \"{}\"",
            text(&reference.uid),
            text(&claim.metadata.uid)
        ));
    }
    let spec = volume.spec.clone().unwrap_or_default();
    if spec.volume_mode.as_deref() == Some("Block") {
        return Err("volumes of mode Block are not supported by this node".to_owned());
    }
    let (path, host_type) = match (spec.local, spec.host_path) {
        (Some(local), _) => (local.path, None),
        (None, Some(host)) => (host.path, Some(host.type_.unwrap_or_default())),
        (None, None) => {
            return Err(format!(
                "failed to get Plugin from volumeSpec for volume \"{name}\" err=no volume plugin matched"
            ));
        }
    };
    Ok(Backing { volume: name, path: path.into(), host_type, readonly })
}

/// Binds what is behind a claim to `target`, once. `group` is the pod's `fsGroup`. Blocking.
pub fn set_up(
    backing: &Backing,
    target: &Path,
    group: Option<u32>,
    policy: ownership::Policy,
) -> Result<(), String> {
    let path = &backing.path;
    let say = |error: std::io::Error| format!("{}: {error}", path.display());
    match &backing.host_type {
        Some(kind) => super::host_path::check(path, kind)?,
        None => match fs::metadata(path) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(format!("path \"{}\" is not a directory", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(format!("path \"{}\" does not exist", path.display()));
            }
            Err(error) => return Err(say(error)),
        },
    }
    if fs::symlink_metadata(target).is_ok() && mounts::is_mounted(target).map_err(say)? {
        return Ok(());
    }
    // As upstream, not of paths of the host: those are not the pod's.
    if let (Some(group), None) = (group, &backing.host_type) {
        ownership::give(path, group, !backing.readonly, policy).map_err(say)?;
    }
    subpath::bind(path, "", target).map_err(|failure| format!("mount {}: {}", path.display(), failure.cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    fn claim(change: impl FnOnce(&mut Value)) -> core::PersistentVolumeClaim {
        let mut value = json!({
            "metadata": {"name": "c", "uid": "u"},
            "spec": {"volumeName": "v"}, "status": {"phase": "Bound"},
        });
        change(&mut value);
        serde_json::from_value(value).expect("a claim")
    }

    #[track_caller]
    fn check_claim(change: impl FnOnce(&mut Value), want: Result<&str, &str>) {
        let got = bound_volume(&pod(json!({})), &claim(change), false);
        assert_eq!(got.as_deref().map_err(String::as_str), want);
    }

    #[test]
    fn a_claim_must_be_bound_and_stay() {
        check_claim(|_| {}, Ok("v"));
        check_claim(|c| c["status"]["phase"] = "Pending".into(), Err("PVC is not bound"));
        check_claim(|c| c["spec"]["volumeName"] = Value::Null, Err("PVC is not bound"));
        let going = |c: &mut Value| c["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
        check_claim(going, Err("PVC is being deleted"));
        let running = pod(json!({"status": {"phase": "Running"}}));
        assert_eq!(bound_volume(&running, &claim(going), false), Ok("v".to_owned()));
        let foreign = bound_volume(&pod(json!({})), &claim(|_| {}), true);
        assert!(foreign.is_err_and(|why| why.ends_with("(pod is not owner)")));
    }

    #[track_caller]
    fn check_volume(spec: Value, want: Result<&str, &str>) {
        let mut spec = spec;
        if spec.get("claimRef").is_none() {
            spec["claimRef"] = json!({"uid": "u"});
        }
        let volume: core::PersistentVolume =
            serde_json::from_value(json!({"metadata": {"name": "v"}, "spec": spec})).expect("a volume");
        let got = backing(&volume, &claim(|_| {}), false).map(|backing| backing.path.display().to_string());
        match want {
            Ok(path) => assert_eq!(got.as_deref(), Ok(path)),
            Err(why) => assert!(got.as_ref().is_err_and(|got| got.contains(why)), "{got:?}"),
        }
    }

    #[test]
    fn directories_of_the_node_are_behind_volumes() {
        check_volume(json!({"local": {"path": "/a"}}), Ok("/a"));
        check_volume(json!({"hostPath": {"path": "/b"}}), Ok("/b"));
        check_volume(json!({"nfs": {"path": "/c", "server": "s"}}), Err("no volume plugin matched"));
        check_volume(
            json!({"local": {"path": "/a"}, "claimRef": {"uid": "x"}}),
            Err("does not point to claim"),
        );
        check_volume(json!({"local": {"path": "/a"}, "volumeMode": "Block"}), Err("mode Block"));
    }

    #[test]
    fn a_local_volume_must_be_there() {
        let dir = crate::testing::temp_dir("claims");
        let at = |path: PathBuf| Backing { volume: "v".into(), path, host_type: None, readonly: false };
        let try_at = |path| set_up(&at(path), &dir.join("target"), None, ownership::Policy::Always);
        let missing = dir.join("missing");
        let why = format!("path \"{}\" does not exist", missing.display());
        assert_eq!(try_at(missing), Err(why));
        fs::write(dir.join("file"), "x").expect("a file");
        assert!(try_at(dir.join("file")).is_err_and(|why| why.ends_with("is not a directory")));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
