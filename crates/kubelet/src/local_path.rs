//! The provisioner of the built-in storage class, as far as this node goes: makes a directory for every claim
//! that was given to the node, and removes it when its volume is released.
//!
//! The scheduler gives a claim to a node by an annotation, the controller says that it is ours to provide, and
//! the volume that is made here makes the controller bind the claim. A directory has no size: a claim that is larger than
//! what is free on its file system is refused, but nothing keeps a pod from writing more than it asked for.
//! Upstream: external provisioners (sig-storage-lib-external-provisioner), one on each node.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use minke_api::storage::{self, LOCAL_PATH, SELECTED_NODE, SELECTED_NODE_FIELD};
use minke_api::{FieldSelector, Key, Kind, Object, Quantity, Status};
use minke_client::{
    Change, Client, Clock, DeleteOptions, EventRecorder, EventSource, Informer, Informers, Patch, Target,
    WorkQueue, reference, typed,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::volumes;

/// Keeps a volume's object until its directory is gone; the name is that of all external provisioners.
const FINALIZER: &str = "external-provisioner.volume.kubernetes.io/finalizer";
/// Claims and volumes that are worked on at once.
const WORKERS: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Item {
    Claim(Key),
    /// A claim that is gone, by its uid.
    Gone(Arc<str>),
    Volume(String),
}

/// What a claim that was given to this node needs.
#[derive(Debug, PartialEq)]
enum ClaimStep {
    Nothing,
    Make,
    /// It cannot be helped here, for this reason.
    Refuse(String),
}

fn plan_claim(claim: &PersistentVolumeClaim, node: &str) -> ClaimStep {
    let is = |annotation: &str, value: &str| storage::annotation(claim, annotation) == Some(value);
    let ours = is(storage::STORAGE_PROVISIONER, LOCAL_PATH) && is(SELECTED_NODE, node);
    let Some(spec) = claim.spec.as_ref().filter(|_| ours) else { return ClaimStep::Nothing };
    if spec.volume_name.as_ref().is_some_and(|name| !name.is_empty())
        || claim.metadata.deletion_timestamp.is_some()
    {
        return ClaimStep::Nothing;
    }
    let refuse = |why: &str| ClaimStep::Refuse(why.to_owned());
    if spec.selector.is_some() {
        refuse("claim Selector is not supported")
    } else if spec.volume_mode.as_deref() == Some("Block") {
        refuse("volumeMode Block is not supported: volumes are directories")
    } else if spec.data_source.is_some() || spec.data_source_ref.is_some() {
        refuse("a data source is not supported: volumes are new directories")
    } else {
        ClaimStep::Make
    }
}

/// What a volume of this node needs.
#[derive(Debug, PartialEq)]
enum VolumeStep {
    Nothing,
    /// Its directory and then its object.
    Remove,
    /// It is being deleted, and its directory stays.
    LetGo,
}

fn plan_volume(volume: &PersistentVolume) -> VolumeStep {
    let made_by = volume.metadata.annotations.as_ref().and_then(|all| all.get(storage::PROVISIONED_BY));
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    if made_by.map(String::as_str) != Some(LOCAL_PATH) || phase == "Bound" {
        return VolumeStep::Nothing;
    }
    let held = volume.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FINALIZER);
    let going = volume.metadata.deletion_timestamp.is_some();
    let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
    match (policy, going) {
        (Some("Delete"), true) if held => VolumeStep::Remove,
        (Some("Delete"), false) if matches!(phase, "Released" | "Failed") => VolumeStep::Remove,
        (Some("Delete"), _) => VolumeStep::Nothing,
        (_, true) if held => VolumeStep::LetGo,
        _ => VolumeStep::Nothing,
    }
}

/// The volume of a claim: a directory of this node.
fn volume_for(
    claim: &Object,
    spec: &PersistentVolumeClaim,
    class: &StorageClass,
    node: &str,
    path: &Path,
) -> Value {
    let modes = spec.spec.as_ref().and_then(|spec| spec.access_modes.clone()).unwrap_or_default();
    let here = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": [node] });
    json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {
            "name": name_of(claim.uid()),
            "annotations": { storage::PROVISIONED_BY: LOCAL_PATH, SELECTED_NODE: node },
            "finalizers": [FINALIZER],
        },
        "spec": {
            "capacity": { "storage": storage::requested(spec).to_string() },
            "accessModes": modes,
            "persistentVolumeReclaimPolicy": class.reclaim_policy.as_deref().unwrap_or("Delete"),
            "storageClassName": class.metadata.name,
            "volumeMode": "Filesystem",
            "claimRef": reference(claim),
            "local": { "path": path },
            "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": [here] }] } },
        },
    })
}

fn name_of(claim_uid: &str) -> String {
    format!("pvc-{claim_uid}")
}

/// Why the work was not done.
enum Trouble {
    Api(Box<Status>),
    /// On the disk.
    Disk(String),
}

impl From<Status> for Trouble {
    fn from(status: Status) -> Trouble {
        Trouble::Api(Box::new(status))
    }
}

/// Follows the claims and volumes of one node.
pub struct LocalPath {
    client: Arc<dyn Client>,
    node: String,
    /// Holds a directory for each volume, by the volume's name.
    dir: PathBuf,
    claims: Arc<Informer>,
    volumes: Arc<Informer>,
    events: EventRecorder,
}

impl LocalPath {
    /// Must be called within a tokio runtime. `stop` ends the writing of events.
    pub fn new(context: &Context, informers: &Arc<Informers>, stop: &CancellationToken) -> LocalPath {
        let ours = || FieldSelector::equal(SELECTED_NODE_FIELD, &context.node_name);
        let component = format!("{LOCAL_PATH}_{}", context.node_name);
        let source = EventSource { component, host: String::new(), series: false };
        LocalPath {
            client: context.client.clone(),
            node: context.node_name.clone(),
            dir: context.paths.claims(),
            claims: informers.selected(Kind::of::<PersistentVolumeClaim>(), ours()),
            volumes: informers.selected(Kind::of::<PersistentVolume>(), ours()),
            events: EventRecorder::new(context.client.clone(), source, Clock::System, stop.clone()),
        }
    }

    /// Works until it is dropped.
    pub async fn run(self) {
        let queue = WorkQueue::new(Duration::from_millis(500), Duration::from_secs(120));
        let follow = |informer: &Arc<Informer>, item: fn(&Change) -> Vec<Item>| {
            let (mut changes, queue) = (informer.subscribe(), &queue);
            async move {
                while let Some(change) = changes.recv().await {
                    item(&change).into_iter().for_each(|item| queue.add(item));
                }
            }
        };
        let claims = follow(&self.claims, |change| match (&change.old, &change.new) {
            (_, Some(new)) => vec![Item::Claim(new.key().clone())],
            (Some(old), None) => vec![Item::Gone(old.uid().into())],
            (None, None) => vec![],
        });
        let volumes = follow(&self.volumes, |change| vec![Item::Volume(change.object().name().to_owned())]);
        let workers = (0..WORKERS).map(|_| self.work(&queue));
        tokio::join!(claims, volumes, futures_util::future::join_all(workers));
    }

    async fn work(&self, queue: &WorkQueue<Item>) {
        tokio::join!(self.claims.synced(), self.volumes.synced());
        loop {
            let item = queue.next().await;
            let outcome = match &item {
                Item::Claim(key) => self.claim(key).await,
                Item::Gone(uid) => self.gone(uid).await,
                Item::Volume(name) => self.volume(name).await,
            };
            match outcome {
                Ok(()) => queue.forget(&item),
                Err(trouble) => {
                    match trouble {
                        Trouble::Api(error) if error.is_conflict() || error.is_not_found() => {
                            tracing::debug!(?item, %error, "Trying again");
                        }
                        Trouble::Api(error) => tracing::warn!(?item, %error, "Work on a volume failed"),
                        Trouble::Disk(why) => tracing::warn!(?item, why, "Work on a volume failed"),
                    }
                    queue.retry(item.clone());
                }
            }
            queue.done(&item);
        }
    }

    async fn claim(&self, key: &Key) -> Result<(), Trouble> {
        let Some(object) = self.claims.get_key(key) else { return Ok(()) };
        let Some(claim) = typed::<PersistentVolumeClaim>(&object) else { return Ok(()) };
        let name = storage::class_of_claim(&claim).unwrap_or_default();
        let refused = |why: String| {
            let message = format!("failed to provision volume with StorageClass \"{name}\": {why}");
            self.events.warning(&object, "ProvisioningFailed", message);
        };
        match plan_claim(&claim, &self.node) {
            ClaimStep::Nothing => return Ok(()),
            ClaimStep::Refuse(why) => {
                refused(why);
                return Ok(());
            }
            ClaimStep::Make => {}
        }
        let volume = name_of(object.uid());
        if self.volumes.get("", &volume).is_some() {
            // It is the controller's turn.
            return Ok(());
        }
        let class = self.client.get(Target::object(Kind::of::<StorageClass>(), "", name)).await?;
        let Some(class) = typed::<StorageClass>(&class) else { return Ok(()) };
        let message = format!("External provisioner is provisioning volume for claim \"{key}\"");
        self.events.normal(&object, "Provisioning", message);
        let (wanted, path) = (storage::requested(&claim), self.dir.join(&volume));
        let made = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || make(&path, wanted)).await
        };
        let made = made.map_err(|error| Trouble::Disk(error.to_string()))?;
        match made {
            Ok(()) => {}
            Err(Refusal::TooLarge { free }) => {
                // In few digits, so that telling it again is telling the same.
                let unit = if free >> 30 > 0 { 30 } else { 20 };
                let free = Quantity::bytes(i64::try_from(free >> unit << unit).unwrap_or(i64::MAX));
                let node = &self.node;
                refused(format!("not enough free space on node {node}: {wanted} requested, {free} free"));
                return self.give_back(&object).await;
            }
            Err(Refusal::Io(error)) => {
                let why = format!("{}: {error}", path.display());
                refused(why.clone());
                return Err(Trouble::Disk(why));
            }
        }
        let body = volume_for(&object, &claim, &class, &self.node, &path);
        match self.client.create(Target::collection(Kind::of::<PersistentVolume>(), ""), body).await {
            Ok(_) => {}
            // Made before, and not yet seen.
            Err(error) if error.is_already_exists() => {}
            Err(error) => return Err(error.into()),
        }
        self.events.normal(
            &object,
            "ProvisioningSucceeded",
            format!("Successfully provisioned volume {volume}"),
        );
        Ok(())
    }

    /// Tells the scheduler to look for another node.
    async fn give_back(&self, claim: &Object) -> Result<(), Trouble> {
        let patch = json!({ "metadata": {
            "resourceVersion": claim.revision().to_string(),
            "annotations": { SELECTED_NODE: null },
        } });
        self.client.patch(Target::of(claim), Patch::Merge(patch)).await?;
        Ok(())
    }

    /// A claim that went before it had a volume leaves no directory. Only an empty one is removed: whatever is in
    /// one belongs to a volume.
    async fn gone(&self, uid: &str) -> Result<(), Trouble> {
        let name = name_of(uid);
        match self.client.get(Target::object(Kind::of::<PersistentVolume>(), "", &name)).await {
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
        let path = self.dir.join(name);
        let _ = tokio::task::spawn_blocking(move || fs::remove_dir(path)).await;
        Ok(())
    }

    async fn volume(&self, name: &str) -> Result<(), Trouble> {
        let Some(object) = self.volumes.get("", name) else { return Ok(()) };
        let Some(volume) = typed::<PersistentVolume>(&object) else { return Ok(()) };
        let step = plan_volume(&volume);
        if step == VolumeStep::Nothing {
            return Ok(());
        }
        if step == VolumeStep::Remove {
            // The path in the object is not looked at: only what lies here is ours to remove.
            let path = self.dir.join(name);
            let removed = tokio::task::spawn_blocking(move || volumes::clean_up(&path)).await;
            let removed = removed.map_err(|error| error.to_string());
            if let Err(why) = removed.and_then(|removed| removed.map_err(|error| error.to_string())) {
                self.events.warning(&object, "VolumeFailedDelete", why.as_str());
                return Err(Trouble::Disk(why));
            }
        }
        if object.deleted().is_none() {
            let options = DeleteOptions { uid: Some(object.uid().to_owned()), ..DeleteOptions::default() };
            self.client.delete(Target::of(&object), options).await?;
            return Ok(());
        }
        let kept: Vec<&str> = object.finalizers().filter(|finalizer| *finalizer != FINALIZER).collect();
        let revision = object.revision().to_string();
        let patch = json!({ "metadata": { "resourceVersion": revision, "finalizers": kept } });
        self.client.patch(Target::of(&object), Patch::Merge(patch)).await?;
        Ok(())
    }
}

enum Refusal {
    /// Bytes that are free.
    TooLarge {
        free: u64,
    },
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        Refusal::Io(error)
    }
}

/// Makes the directory of a volume, for anybody to write to; the names above it let nobody in. Blocking.
fn make(path: &Path, wanted: Quantity) -> Result<(), Refusal> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    fs::set_permissions(parent, Permissions::from_mode(0o700))?;
    let disk = rustix::fs::statvfs(parent).map_err(io::Error::from)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if u64::try_from(wanted.value()).is_ok_and(|wanted| wanted > free) {
        return Err(Refusal::TooLarge { free });
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made?,
    }
    if !fs::symlink_metadata(path)?.is_dir() {
        return Err(io::Error::from(io::ErrorKind::NotADirectory).into());
    }
    fs::set_permissions(path, Permissions::from_mode(0o777))?;
    // The volume's object outlives a power cut, and so must its directory.
    fs::File::open(parent)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(change: impl FnOnce(&mut Value)) -> Value {
        let mut value = json!({
            "metadata": {"name": "c", "namespace": "ns", "uid": "u",
                "annotations": {SELECTED_NODE: "n1", storage::STORAGE_PROVISIONER: LOCAL_PATH}},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "standard",
                "resources": {"requests": {"storage": "1Gi"}}},
        });
        change(&mut value);
        value
    }

    #[track_caller]
    fn check_claim(change: impl FnOnce(&mut Value), want: ClaimStep) {
        let claim = serde_json::from_value(claim(change)).expect("a claim");
        assert_eq!(plan_claim(&claim, "n1"), want);
    }

    #[test]
    fn claims_that_were_given_to_the_node_get_directories() {
        use ClaimStep::{Make, Nothing};
        let refuse = |why: &str| ClaimStep::Refuse(why.to_owned());
        check_claim(|_| {}, Make);
        check_claim(|c| c["metadata"]["annotations"][SELECTED_NODE] = "n2".into(), Nothing);
        check_claim(|c| c["metadata"]["annotations"][storage::STORAGE_PROVISIONER] = "x".into(), Nothing);
        check_claim(|c| c["spec"]["volumeName"] = "v".into(), Nothing);
        check_claim(|c| c["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into(), Nothing);
        check_claim(|c| c["spec"]["selector"] = json!({}), refuse("claim Selector is not supported"));
        let block = refuse("volumeMode Block is not supported: volumes are directories");
        check_claim(|c| c["spec"]["volumeMode"] = "Block".into(), block);
        let copy = refuse("a data source is not supported: volumes are new directories");
        check_claim(
            |c| c["spec"]["dataSource"] = json!({"kind": "PersistentVolumeClaim", "name": "d"}),
            copy,
        );
    }

    #[track_caller]
    fn check_volume(policy: &str, phase: &str, going: bool, held: bool, want: VolumeStep) {
        let mut volume = json!({
            "metadata": {"name": "v", "annotations": {storage::PROVISIONED_BY: LOCAL_PATH}},
            "spec": {"persistentVolumeReclaimPolicy": policy}, "status": {"phase": phase},
        });
        if going {
            volume["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z".into();
        }
        if held {
            volume["metadata"]["finalizers"] = json!([FINALIZER]);
        }
        let mut volume: PersistentVolume = serde_json::from_value(volume).expect("a volume");
        assert_eq!(plan_volume(&volume), want);
        volume.metadata.annotations = None;
        assert_eq!(plan_volume(&volume), VolumeStep::Nothing, "somebody else's");
    }

    #[test]
    fn released_volumes_are_removed_or_kept() {
        use VolumeStep::{LetGo, Nothing, Remove};
        check_volume("Delete", "Bound", false, true, Nothing);
        check_volume("Delete", "Available", false, true, Nothing);
        check_volume("Delete", "Released", false, true, Remove);
        check_volume("Delete", "Released", true, true, Remove);
        check_volume("Delete", "Released", true, false, Nothing);
        check_volume("Delete", "Bound", true, true, Nothing);
        check_volume("Retain", "Released", false, true, Nothing);
        check_volume("Retain", "Released", true, true, LetGo);
    }

    #[test]
    fn a_volume_is_for_its_claim_and_its_node() {
        let value = claim(|_| {});
        let object = Object::from_value(Kind::of::<PersistentVolumeClaim>(), &value).expect("a claim");
        let class =
            json!({"metadata": {"name": "standard"}, "provisioner": LOCAL_PATH, "reclaimPolicy": "Retain"});
        let class = serde_json::from_value(class).expect("a class");
        let view = serde_json::from_value(value).expect("a claim");
        let made = volume_for(&object, &view, &class, "n1", Path::new("/d/pvc-u"));
        let volume: PersistentVolume = serde_json::from_value(made.clone()).expect("a volume");
        assert!(storage::is_meant_for(&volume, &view) && storage::objection(&view, &volume).is_none());
        assert_eq!(made["metadata"]["name"], "pvc-u");
        assert_eq!(made["spec"]["persistentVolumeReclaimPolicy"], "Retain");
        assert_eq!(made["spec"]["local"]["path"], "/d/pvc-u");
    }

    #[test]
    fn a_directory_is_made_once_if_there_is_room() {
        let dir = crate::testing::temp_dir("local-path");
        let path = dir.join("volumes/pvc-u");
        let size = |text: &str| Quantity::parse(text).expect("a size");
        assert!(matches!(make(&path, size("8000000Ti")), Err(Refusal::TooLarge { .. })));
        assert!(!path.exists());
        for _ in 0..2 {
            assert!(make(&path, size("1Ki")).is_ok());
        }
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o777);
        let link = dir.join("volumes/pvc-link");
        std::os::unix::fs::symlink("/etc", &link).expect("a link");
        assert!(matches!(make(&link, size("1Ki")), Err(Refusal::Io(_))));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
