//! Binds claims to volumes, asks for volumes that are to be made, and says what becomes of released ones.
//!
//! Claims of classes that wait for their first consumer are left to the scheduler until it has chosen a node.
//! Making and deleting what is behind a volume is the provisioner's work, that of the node for the built-in class.
//! Upstream: pkg/controller/volume/persistentvolume.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use minke_api::{ApiType, Key, Kind, Object, Status, storage};
use minke_client::{Change, Target, reference, typed};
use serde_json::{Map, Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds};
use crate::run::Controller;

type Claim = Typed<PersistentVolumeClaim>;
type PersistentVolumes = Vec<Typed<PersistentVolume>>;

/// What the user is told.
#[derive(Debug, PartialEq)]
struct Tale {
    warning: bool,
    reason: &'static str,
    message: String,
}

impl Tale {
    fn normal(reason: &'static str, message: impl Into<String>) -> Tale {
        Tale { warning: false, reason, message: message.into() }
    }

    fn warning(reason: &'static str, message: impl Into<String>) -> Tale {
        Tale { warning: true, reason, message: message.into() }
    }

    fn tell(self, ctx: &Ctx, object: &Object) {
        match self.warning {
            true => ctx.events.warning(object, self.reason, self.message),
            false => ctx.events.normal(object, self.reason, self.message),
        }
    }
}

/// What a claim needs next.
#[derive(Debug, PartialEq)]
enum ClaimStep {
    /// It and this volume are to name each other.
    Bind(String),
    Wait(Option<Tale>),
    Lost(Tale),
    /// A provisioner is to make a volume.
    Provision(String),
    /// The class of claims that name none.
    TakeClass(String),
    /// The node that was selected is gone: another is to be.
    ForgetNode,
}

/// What deciding about a claim takes.
#[derive(Default)]
struct Around<'a> {
    /// The volume that the claim names.
    named: Option<&'a PersistentVolume>,
    /// Volumes of its class that are free, and those that name the claim.
    candidates: Vec<&'a PersistentVolume>,
    class: Option<&'a StorageClass>,
    default_class: Option<&'a str>,
    /// Whether the node exists that was selected for the claim.
    node_exists: bool,
}

fn plan_claim(claim: &PersistentVolumeClaim, around: &Around<'_>) -> ClaimStep {
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    if storage::annotation(claim, storage::BIND_COMPLETED).is_some() {
        return keep_bound(claim, named, around);
    }
    if !named.is_empty() {
        return bind_named(claim, named, around);
    }
    let class = storage::class_of_claim(claim);
    let delayed = around.class.is_some_and(storage::waits_for_consumer)
        && storage::annotation(claim, storage::SELECTED_NODE).is_none();
    let delays = around.class.is_some_and(storage::waits_for_consumer);
    if let Some(volume) = storage::best_match(claim, around.candidates.iter().copied(), None, delays) {
        return ClaimStep::Bind(volume.metadata.name.clone().unwrap_or_default());
    }
    if claim.metadata.deletion_timestamp.is_some() {
        return ClaimStep::Wait(None);
    }
    match (class, around.default_class) {
        (None, Some(default)) => ClaimStep::TakeClass(default.to_owned()),
        _ if delayed => ClaimStep::Wait(Some(Tale::normal(
            "WaitForFirstConsumer",
            "waiting for first consumer to be created before binding",
        ))),
        (None | Some(""), _) => ClaimStep::Wait(Some(Tale::normal(
            "FailedBinding",
            "no persistent volumes available for this claim and no storage class is set",
        ))),
        (Some(class), _) => provision(claim, class, around),
    }
}

fn provision(claim: &PersistentVolumeClaim, name: &str, around: &Around<'_>) -> ClaimStep {
    let failed = |why: String| ClaimStep::Wait(Some(Tale::warning("ProvisioningFailed", why)));
    let Some(class) = around.class else {
        return failed(format!("storageclass.storage.k8s.io \"{name}\" not found"));
    };
    let provisioner = class.provisioner.as_str();
    if provisioner.starts_with("kubernetes.io/") {
        return failed(format!("no volume plugin matched name: {provisioner}"));
    }
    if provisioner == storage::LOCAL_PATH {
        if storage::annotation(claim, storage::SELECTED_NODE).is_none() {
            return failed(format!(
                "failed to provision volume with StorageClass \"{name}\": configuration error, no node was \
                 specified: the class must have volumeBindingMode WaitForFirstConsumer"
            ));
        }
        if !around.node_exists {
            return ClaimStep::ForgetNode;
        }
    }
    ClaimStep::Provision(provisioner.to_owned())
}

fn bind_named(claim: &PersistentVolumeClaim, named: &str, around: &Around<'_>) -> ClaimStep {
    let Some(volume) = around.named else { return ClaimStep::Wait(None) };
    if storage::claim_ref(volume).is_none() {
        return match storage::objection(claim, volume) {
            None => ClaimStep::Bind(named.to_owned()),
            Some(why) => ClaimStep::Wait(Some(Tale::warning(
                "VolumeMismatch",
                format!("Cannot bind to requested volume \"{named}\": {why}"),
            ))),
        };
    }
    if storage::is_meant_for(volume, claim) {
        return ClaimStep::Bind(named.to_owned());
    }
    let why = format!("volume \"{named}\" already bound to a different claim.");
    ClaimStep::Wait(Some(Tale::warning("FailedBinding", why)))
}

fn keep_bound(claim: &PersistentVolumeClaim, named: &str, around: &Around<'_>) -> ClaimStep {
    let lost = |reason, message: &str| ClaimStep::Lost(Tale::warning(reason, message));
    if named.is_empty() {
        let message = "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!";
        return lost("ClaimLost", message);
    }
    let Some(volume) = around.named else {
        return lost("ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!");
    };
    match storage::claim_ref(volume) {
        None => ClaimStep::Bind(named.to_owned()),
        Some(reference) if reference.uid == claim.metadata.uid => ClaimStep::Bind(named.to_owned()),
        Some(_) => {
            lost("ClaimMisbound", "Two claims are bound to the same volume, this one is bound incorrectly")
        }
    }
}

/// What a volume needs next.
#[derive(Debug, PartialEq)]
enum VolumeStep {
    Nothing,
    Phase(&'static str, Option<Tale>),
    /// It is not for its claim after all.
    Unbind,
    Mismatch,
}

/// `claim` is the one that the volume names by name and uid, if it exists.
fn plan_volume(volume: &PersistentVolume, claim: Option<&PersistentVolumeClaim>) -> VolumeStep {
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    let to = |wanted| if phase == wanted { VolumeStep::Nothing } else { VolumeStep::Phase(wanted, None) };
    let Some(spec) = &volume.spec else { return VolumeStep::Nothing };
    // Set aside by the user for a claim of that name, whichever it will be: free, but not for others.
    if spec.claim_ref.as_ref().is_none_or(|reference| reference.uid.as_deref().unwrap_or_default().is_empty())
    {
        return to("Available");
    }
    let Some(claim) = claim else { return released(volume, phase) };
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    if named.is_empty() {
        // The claim was queued along with the volume, and will take it.
        return if storage::same_volume_mode(claim, spec) {
            VolumeStep::Nothing
        } else {
            VolumeStep::Mismatch
        };
    }
    if Some(named) == volume.metadata.name.as_deref() {
        return to("Bound");
    }
    // The claim has another volume. One that was made for it is of no use to anybody else.
    let deletes = spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete");
    if has(volume, storage::PROVISIONED_BY) && deletes { released(volume, phase) } else { VolumeStep::Unbind }
}

/// The claim is gone: what the reclaim policy says.
fn released(volume: &PersistentVolume, phase: &str) -> VolumeStep {
    match phase {
        "Failed" => return VolumeStep::Nothing,
        "Released" => {}
        _ => return VolumeStep::Phase("Released", None),
    }
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let failed = |reason, why: String| VolumeStep::Phase("Failed", Some(Tale::warning(reason, why)));
    let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
    match policy.unwrap_or("Retain") {
        "Retain" => VolumeStep::Nothing,
        "Recycle" => failed("VolumeFailedRecycle", "No recycler plugin found for the volume!".to_owned()),
        // Whoever made it deletes it.
        "Delete" if provisioner(volume).is_some_and(|by| !by.starts_with("kubernetes.io/")) => {
            VolumeStep::Nothing
        }
        "Delete" => {
            let why = "no deletable volume plugin matched";
            failed(
                "VolumeFailedDelete",
                format!("error getting deleter volume plugin for volume \"{name}\": {why}"),
            )
        }
        _ => failed("VolumeUnknownReclaimPolicy", "Volume has an unrecognized reclaim policy.".to_owned()),
    }
}

fn provisioner(volume: &PersistentVolume) -> Option<&str> {
    volume.metadata.annotations.as_ref()?.get(storage::PROVISIONED_BY).map(String::as_str)
}

fn has(volume: &PersistentVolume, annotation: &str) -> bool {
    volume.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(annotation))
}

/// The volume, naming the claim; none if it does.
fn volume_naming(volume: &Typed<PersistentVolume>, claim: &Claim) -> Option<Value> {
    let (meant, uid) = (storage::is_meant_for(volume, claim), claim.metadata.uid.as_deref());
    let known = storage::claim_ref(volume).is_some_and(|reference| reference.uid.as_deref() == uid);
    if meant && known {
        return None;
    }
    let mut body = volume.object.value();
    body["spec"]["claimRef"] = reference(&claim.object).to_value();
    if !meant {
        body["metadata"]["annotations"][storage::BOUND_BY_CONTROLLER] = "yes".into();
    }
    Some(body)
}

/// The claim, naming the volume; none if it does.
fn claim_naming(claim: &Claim, volume: &str) -> Option<Value> {
    let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()) == Some(volume);
    if named && storage::annotation(claim, storage::BIND_COMPLETED).is_some() {
        return None;
    }
    let mut body = claim.object.value();
    if !named {
        body["spec"]["volumeName"] = volume.into();
        body["metadata"]["annotations"][storage::BOUND_BY_CONTROLLER] = "yes".into();
    }
    body["metadata"]["annotations"][storage::BIND_COMPLETED] = "yes".into();
    Some(body)
}

/// The status of a claim that is bound to the volume; none if it says so already.
fn bound_status(claim: &Claim, volume: &PersistentVolume) -> Option<Value> {
    let old = claim.status.as_ref().and_then(|status| status.to_value().as_object().cloned());
    let old = old.unwrap_or_default();
    let mut new = old.clone();
    let spec = volume.spec.as_ref()?;
    let was_bound = old.get("phase").is_some_and(|phase| phase == "Bound");
    new.insert("phase".to_owned(), "Bound".into());
    new.insert("accessModes".to_owned(), json!(spec.access_modes));
    // What a volume has that grew is told by who makes it grow.
    if !was_bound || !old.contains_key("capacity") {
        new.insert("capacity".to_owned(), json!(spec.capacity));
    }
    match &spec.volume_attributes_class_name {
        Some(class) => {
            new.insert("currentVolumeAttributesClassName".to_owned(), class.as_str().into());
        }
        None => drop(new.remove("currentVolumeAttributesClassName")),
    }
    (new != old).then_some(Value::Object(new))
}

/// Names by something that they have in common.
struct Groups<G, N>(HashMap<G, BTreeSet<N>>);

impl<G, N> Default for Groups<G, N> {
    fn default() -> Self {
        Groups(HashMap::new())
    }
}

impl<G: Hash + Eq, N: Ord + Clone> Groups<G, N> {
    fn put(&mut self, group: G, name: N) {
        self.0.entry(group).or_default().insert(name);
    }

    fn remove(&mut self, group: &G, name: &N) {
        if let Some(names) = self.0.get_mut(group) {
            names.remove(name);
            if names.is_empty() {
                self.0.remove(group);
            }
        }
    }

    fn of(&self, group: &G) -> Vec<N> {
        self.0.get(group).into_iter().flatten().cloned().collect()
    }
}

/// Who concerns whom, so that no pass looks at everything.
#[derive(Default)]
struct Index {
    /// Volumes by the claim that they name.
    volumes_for: Groups<Key, Arc<str>>,
    /// Volumes that name no claim, by class.
    free_volumes: Groups<String, Arc<str>>,
    /// Claims without a volume, by class; those that name none have the empty one.
    open_claims: Groups<String, Key>,
    /// Claims by the volume that they name.
    claims_for: Groups<String, Key>,
}

impl Index {
    fn note(&mut self, change: &Change) {
        let sides = [(&change.old, false), (&change.new, true)];
        for (object, is_new) in sides.into_iter().filter_map(|(object, new)| Some((object.as_ref()?, new))) {
            if let Some(volume) = of_kind::<PersistentVolume>(object) {
                let name: Arc<str> = object.name().into();
                match storage::claim_ref(&volume).map(claim_key) {
                    Some(claim) => edit(&mut self.volumes_for, claim, name, is_new),
                    None => edit(
                        &mut self.free_volumes,
                        storage::class_of_volume(&volume).to_owned(),
                        name,
                        is_new,
                    ),
                }
            } else if let Some(claim) = of_kind::<PersistentVolumeClaim>(object) {
                let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
                let key = object.key().clone();
                if named.is_empty() {
                    let class = storage::class_of_claim(&claim).unwrap_or_default().to_owned();
                    edit(&mut self.open_claims, class, key, is_new);
                } else {
                    edit(&mut self.claims_for, named, key, is_new);
                }
            }
        }
    }
}

fn edit<G: Hash + Eq, N: Ord + Clone>(groups: &mut Groups<G, N>, group: G, name: N, put: bool) {
    if put { groups.put(group, name) } else { groups.remove(&group, &name) }
}

fn of_kind<T: k8s_openapi::Resource + ApiType>(object: &Object) -> Option<Arc<T>> {
    (object.kind() == Kind::of::<T>()).then(|| typed::<T>(object)).flatten()
}

fn claim_key(reference: &k8s_openapi::api::core::v1::ObjectReference) -> Key {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    Key::new(&text(&reference.namespace), &text(&reference.name))
}

/// The newest of the classes that are marked as the default, as admission takes it.
pub(crate) fn default_class(classes: impl Iterator<Item = Arc<Object>>) -> Option<String> {
    let marked =
        classes.filter(|class| typed::<StorageClass>(class).is_some_and(|c| storage::is_default_class(&c)));
    let newest = marked.max_by(|a, b| a.created().cmp(&b.created()).then_with(|| b.name().cmp(a.name())));
    newest.map(|class| class.name().to_owned())
}

#[derive(Default)]
pub(crate) struct Binder {
    index: Mutex<Index>,
}

#[async_trait]
impl Controller for Binder {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![
            Kind::of::<PersistentVolumeClaim>(),
            Kind::of::<PersistentVolume>(),
            Kind::of::<StorageClass>(),
            Kind::of::<Node>(),
        ]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        let claims = Kind::of::<PersistentVolumeClaim>();
        let claim_items = |keys: Vec<Key>| keys.into_iter().map(|key| Item { kind: claims, key });
        let mut index = self.index();
        index.note(change);
        if object.kind() == Kind::of::<Node>() {
            if change.new.is_some() {
                return Vec::new();
            }
            let open = index.open_claims.0.values().flatten().cloned().collect();
            return claim_items(open)
                .filter(|item| {
                    let claim = ctx.informers.of(claims).get_key(&item.key);
                    claim
                        .is_some_and(|claim| claim.field(storage::SELECTED_NODE_FIELD) == Some(object.name()))
                })
                .collect();
        }
        let mut items = vec![Item::of(object)];
        if object.kind() == Kind::of::<StorageClass>() {
            items = claim_items(index.open_claims.of(&object.name().to_owned())).collect();
            items.extend(claim_items(index.open_claims.of(&String::new())));
        } else if object.kind() == claims {
            let volumes = Kind::of::<PersistentVolume>();
            let named = [&change.old, &change.new].into_iter().flatten().filter_map(|claim| {
                typed::<PersistentVolumeClaim>(claim)?.spec.as_ref()?.volume_name.as_deref().map(Arc::from)
            });
            let both = index.volumes_for.of(object.key()).into_iter().chain(named.collect::<Vec<Arc<str>>>());
            items.extend(both.map(|name| Item::new(volumes, "", &name)));
        } else {
            items.extend(claim_items(index.claims_for.of(&object.name().to_owned())));
            let volume = change.new.as_ref().and_then(|volume| typed::<PersistentVolume>(volume));
            match volume.as_ref().map(|volume| (volume, storage::claim_ref(volume))) {
                Some((_, Some(reference))) => {
                    items.push(Item { kind: claims, key: claim_key(reference) });
                }
                Some((volume, None)) => {
                    let class = storage::class_of_volume(volume).to_owned();
                    items.extend(claim_items(index.open_claims.of(&class)));
                }
                None => {}
            }
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        if item.kind == Kind::of::<PersistentVolume>() {
            self.volume(ctx, &item.key).await?;
        } else {
            self.claim(ctx, &item.key).await?;
        }
        Ok(Requeue::Never)
    }
}

impl Binder {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("nothing panics under the lock")
    }

    async fn claim(&self, ctx: &Ctx, key: &Key) -> Result<(), Status> {
        let Some(claim) = ctx.get::<PersistentVolumeClaim>(key) else { return Ok(()) };
        let volume = |name: &str| ctx.get::<PersistentVolume>(&Key::new("", name));
        let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        let class = storage::class_of_claim(&claim);
        let candidates: PersistentVolumes = if named.is_empty() {
            let index = self.index();
            let mut names = index.volumes_for.of(key);
            names.extend(index.free_volumes.of(&class.unwrap_or_default().to_owned()));
            names.iter().filter_map(|name| volume(name)).collect()
        } else {
            PersistentVolumes::new()
        };
        let named = volume(named);
        let classes = ctx.informer::<StorageClass>();
        let found = class
            .filter(|name| !name.is_empty())
            .and_then(|name| ctx.get::<StorageClass>(&Key::new("", name)));
        let default = match class {
            None => default_class(classes.snapshot().values().cloned()),
            Some(_) => None,
        };
        let node = storage::annotation(&claim, storage::SELECTED_NODE);
        let around = Around {
            named: named.as_deref(),
            candidates: candidates.iter().map(|volume| &**volume).collect(),
            class: found.as_deref(),
            default_class: default.as_deref(),
            node_exists: node.is_some_and(|node| ctx.informer::<Node>().get("", node).is_some()),
        };
        let step = plan_claim(&claim, &around);
        let object = claim.object.clone();
        match step {
            ClaimStep::Bind(name) => {
                let chosen = named.iter().chain(&candidates).find(|volume| volume.object.name() == name);
                match chosen {
                    Some(volume) => bind(ctx, volume, &claim).await,
                    None => Ok(()),
                }
            }
            ClaimStep::Wait(tale) => {
                if let Some(tale) = tale {
                    tale.tell(ctx, &object);
                }
                pending(ctx, &claim).await.map(drop)
            }
            ClaimStep::Lost(tale) => {
                let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
                if phase == Some("Lost") {
                    return Ok(());
                }
                let mut value = object.value();
                value["status"] = json!({ "phase": "Lost" });
                ctx.update(Target::of(&object).sub("status"), value).await?;
                tale.tell(ctx, &object);
                Ok(())
            }
            ClaimStep::Provision(provisioner) => {
                let object = pending(ctx, &claim).await?;
                if storage::annotation(&claim, storage::STORAGE_PROVISIONER) == Some(&provisioner) {
                    return Ok(());
                }
                let mut value = object.value();
                let annotations = &mut value["metadata"]["annotations"];
                for name in [storage::BETA_STORAGE_PROVISIONER, storage::STORAGE_PROVISIONER] {
                    annotations[name] = provisioner.as_str().into();
                }
                ctx.update(Target::of(&object), value).await?;
                let message = format!(
                    "Waiting for a volume to be created either by the external provisioner '{provisioner}' or \
                     manually by the system administrator. If volume creation is delayed, please verify that the \
                     provisioner is running and correctly registered."
                );
                ctx.events.normal(&object, "ExternalProvisioning", message);
                Ok(())
            }
            ClaimStep::TakeClass(class) => {
                let mut value = object.value();
                value["spec"]["storageClassName"] = class.into();
                ctx.update(Target::of(&object), value).await.map(drop)
            }
            ClaimStep::ForgetNode => {
                let mut value = object.value();
                let annotations = value["metadata"]["annotations"].as_object_mut();
                annotations.and_then(|all| all.remove(storage::SELECTED_NODE));
                ctx.update(Target::of(&object), value).await.map(drop)
            }
        }
    }

    async fn volume(&self, ctx: &Ctx, key: &Key) -> Result<(), Status> {
        let Some(volume) = ctx.get::<PersistentVolume>(key) else { return Ok(()) };
        let claim = match storage::claim_ref(&volume) {
            Some(reference) => claim_of(ctx, &volume, reference).await?,
            None => None,
        };
        match plan_volume(&volume, claim.as_deref()) {
            VolumeStep::Nothing => Ok(()),
            VolumeStep::Phase(phase, tale) => {
                let message = tale.as_ref().map(|tale| tale.message.clone()).unwrap_or_default();
                set_phase(ctx, &volume.object, phase, &message).await?;
                if let Some(tale) = tale {
                    tale.tell(ctx, &volume.object);
                }
                Ok(())
            }
            VolumeStep::Unbind => {
                let mut body = volume.object.value();
                if has(&volume, storage::BOUND_BY_CONTROLLER) {
                    body["spec"].as_object_mut().map(|spec| spec.remove("claimRef"));
                    let annotations = body["metadata"]["annotations"].as_object_mut();
                    annotations.and_then(|all| all.remove(storage::BOUND_BY_CONTROLLER));
                } else {
                    body["spec"]["claimRef"].as_object_mut().map(|reference| reference.remove("uid"));
                }
                let object = ctx.update(Target::of(&volume.object), body).await?;
                set_phase(ctx, &object, "Available", "").await.map(drop)
            }
            VolumeStep::Mismatch => {
                let claim = claim.map(|claim| claim.object.name().to_owned()).unwrap_or_default();
                let message = format!(
                    "Cannot bind PersistentVolume to requested PersistentVolumeClaim \"{claim}\" due to incompatible volumeMode."
                );
                ctx.events.warning(&volume.object, "VolumeMismatch", message);
                Ok(())
            }
        }
    }
}

/// The claim that a volume names, by name and uid. That it is gone is believed only of the API server: what is on
/// the volume may be deleted then, and the cache of claims may be behind that of volumes.
async fn claim_of(
    ctx: &Ctx,
    volume: &PersistentVolume,
    reference: &k8s_openapi::api::core::v1::ObjectReference,
) -> Result<Option<Claim>, Status> {
    let (key, uid) = (claim_key(reference), reference.uid.as_deref().unwrap_or_default());
    let cached = ctx.get::<PersistentVolumeClaim>(&key);
    if uid.is_empty() || cached.as_ref().is_some_and(|claim| claim.object.uid() == uid) {
        return Ok(cached);
    }
    let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Released" | "Failed")) && cached.is_none() {
        return Ok(None);
    }
    let target = Target::object(Kind::of::<PersistentVolumeClaim>(), &key.namespace, &key.name);
    match ctx.client.get(target).await {
        Ok(claim) => Ok(Typed::new(claim).filter(|claim| claim.object.uid() == uid)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes volume and claim name each other, the volume first: whoever comes next sees that it is taken. Every step may be
/// the last one before a crash, and is found done by the next pass.
async fn bind(ctx: &Ctx, volume: &Typed<PersistentVolume>, claim: &Claim) -> Result<(), Status> {
    let mut object = volume.object.clone();
    if let Some(body) = volume_naming(volume, claim) {
        object = ctx.update(Target::of(&object), body).await?;
    }
    let object = set_phase(ctx, &object, "Bound", "").await?;
    let mut bound = claim.object.clone();
    if let Some(body) = claim_naming(claim, object.name()) {
        bound = ctx.update(Target::of(&bound), body).await?;
    }
    let (Some(bound), Some(volume)) = (Claim::new(bound), Typed::<PersistentVolume>::new(object)) else {
        return Ok(());
    };
    if let Some(status) = bound_status(&bound, &volume) {
        let mut body = bound.object.value();
        body["status"] = status;
        ctx.update(Target::of(&bound.object).sub("status"), body).await?;
    }
    Ok(())
}

/// The claim, saying that it waits.
async fn pending(ctx: &Ctx, claim: &Claim) -> Result<Arc<Object>, Status> {
    if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending") {
        return Ok(claim.object.clone());
    }
    let mut body = claim.object.value();
    body["status"] = json!({ "phase": "Pending" });
    ctx.update(Target::of(&claim.object).sub("status"), body).await
}

async fn set_phase(
    ctx: &Ctx,
    volume: &Arc<Object>,
    phase: &str,
    message: &str,
) -> Result<Arc<Object>, Status> {
    let mut body = volume.value();
    if body["status"]["phase"] == phase {
        return Ok(volume.clone());
    }
    let mut status = Map::new();
    status.insert("phase".to_owned(), phase.into());
    status.insert("lastPhaseTransitionTime".to_owned(), json!(seconds(ctx.now())));
    if !message.is_empty() {
        status.insert("message".to_owned(), message.into());
    }
    body["status"] = status.into();
    ctx.update(Target::of(volume).sub("status"), body).await
}

#[cfg(test)]
#[path = "persistent_volume_tests.rs"]
mod tests;
