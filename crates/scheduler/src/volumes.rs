//! VolumeBinding, VolumeRestrictions and VolumeZone: a pod goes where its volumes are or can be made.
//!
//! Claims of classes that wait for their first consumer are bound here, once a node is chosen: to a volume that
//! is there, or by telling the provisioner the node; the pod is bound when its claims are.
//! Upstream: pkg/scheduler/framework/plugins/{volumebinding,volumerestrictions,volumezone}. Volumes of CSI
//! drivers are not counted (NodeVolumeLimits): no node of ours has a driver.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod, TopologySelectorTerm};
use k8s_openapi::api::storage::v1::StorageClass;
use minke_api::{ApiType, Key, Kind, Object, Status, placement, storage};
use minke_client::{Change, Client, Informer, Informers, Patch, Target, reference, typed};
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::picture::{Node, PodInfo};
use crate::plugins::Objection;
use crate::reserve::{PreBind, ReservePlugin};

/// How long claims may take to be bound once the pod's node is known: upstream's bindTimeoutSeconds.
const BIND_TIMEOUT: Duration = Duration::from_secs(600);

const NODE_CONFLICT: &str = "node(s) didn't match PersistentVolume's node affinity";
const BIND_CONFLICT: &str = "node(s) didn't find available persistent volumes to bind";
const VOLUME_MISSING: &str = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)";
const ONE_POD: &str =
    "node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode";
const ZONE_CONFLICT: &str = "node(s) had no available volume zone";
const TOPOLOGY: [&str; 4] = [
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

/// The three plugins, in upstream's order.
pub fn plugins(informers: &Informers) -> Vec<Box<dyn ReservePlugin>> {
    let caches = Caches {
        claims: informers.of_type::<PersistentVolumeClaim>(),
        volumes: informers.of_type::<PersistentVolume>(),
        classes: informers.of_type::<StorageClass>(),
        pods: informers.of_type::<Pod>(),
    };
    let waiters = Waiters::start(&caches.claims);
    let client = informers.client().clone();
    vec![
        Box::new(Restrictions { caches: caches.clone(), users: Vec::new(), reserved: HashMap::new() }),
        Box::new(Binding {
            caches: caches.clone(),
            client,
            waiters,
            free: Free {
                changes: caches.volumes.subscribe(),
                of_class: HashMap::new(),
                meant: HashMap::new(),
            },
            current: Claims::default(),
            given: HashMap::new(),
            taken: HashMap::new(),
            reserved: HashMap::new(),
        }),
        Box::new(Zone { caches, places: Vec::new() }),
    ]
}

#[derive(Clone)]
struct Caches {
    claims: Arc<Informer>,
    volumes: Arc<Informer>,
    classes: Arc<Informer>,
    pods: Arc<Informer>,
}

impl Caches {
    fn claim(&self, key: &Key) -> Option<Arc<PersistentVolumeClaim>> {
        let object = self.claims.get_key(key)?;
        typed(&object)
    }

    fn volume(&self, name: &str) -> Option<Arc<PersistentVolume>> {
        let object = self.volumes.get("", name)?;
        typed(&object)
    }

    fn class(&self, name: &str) -> Option<Arc<StorageClass>> {
        let object = self.classes.get("", name)?;
        typed(&object)
    }
}

/// Whether the pod has volumes that are claims.
fn has_claims(pod: &PodInfo) -> bool {
    storage::claims_of(&pod.pod).next().is_some()
}

fn key_of(pod: &PodInfo, claim: &str) -> Key {
    Key::new(pod.object.namespace(), claim)
}

fn reachable(volume: &PersistentVolume, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref()?.required.as_ref());
    affinity.is_none_or(|required| {
        required.node_selector_terms.iter().any(|term| placement::term_holds(term, node, labels))
    })
}

/// Whether a class makes volumes for a node with these labels.
fn makes_volumes_at(class: &StorageClass, labels: &BTreeMap<String, String>) -> bool {
    let holds = |term: &TopologySelectorTerm| {
        let mut expressions = term.match_label_expressions.iter().flatten();
        expressions.all(|wanted| labels.get(&wanted.key).is_some_and(|value| wanted.values.contains(value)))
    };
    let topologies = class.allowed_topologies.as_deref().unwrap_or_default();
    topologies.is_empty() || topologies.iter().any(holds)
}

/// The claims of a pod, by what is to be done about them.
#[derive(Debug, Default)]
struct Claims {
    bound: Vec<Arc<PersistentVolumeClaim>>,
    /// They are bound when the pod has a node; the largest first, as it has the smallest choice.
    delayed: Vec<Delayed>,
}

#[derive(Debug)]
struct Delayed {
    key: Key,
    claim: Arc<PersistentVolumeClaim>,
    /// Volumes that it may get, on whatever node they are.
    candidates: Vec<Arc<PersistentVolume>>,
}

/// Looks at the claims of a pod; the error is for the user, and no node can help.
fn claims_of(
    pod: &PodInfo,
    claim: impl Fn(&Key) -> Option<Arc<PersistentVolumeClaim>>,
    class: impl Fn(&str) -> Option<Arc<StorageClass>>,
) -> Result<Claims, String> {
    let mut claims = Claims::default();
    let mut seen = HashSet::new();
    for (name, own) in storage::claims_of(&pod.pod) {
        let key = key_of(pod, &name);
        if !seen.insert(name.clone()) {
            continue;
        }
        let Some(claim) = claim(&key) else {
            return Err(match own {
                true => format!(
                    "waiting for ephemeral volume controller to create the persistentvolumeclaim \"{name}\""
                ),
                false => format!("persistentvolumeclaim \"{name}\" not found"),
            });
        };
        let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).unwrap_or_default();
        if claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Lost") {
            return Err(format!(
                "persistentvolumeclaim \"{name}\" bound to non-existent persistentvolume \"{volume}\""
            ));
        }
        if claim.metadata.deletion_timestamp.is_some() {
            return Err(format!("persistentvolumeclaim \"{name}\" is being deleted"));
        }
        let mut owners = claim.metadata.owner_references.iter().flatten();
        if own && !owners.any(|owner| owner.controller == Some(true) && owner.uid == pod.object.uid()) {
            return Err(format!("PVC {key} was not created for pod {} (pod is not owner)", pod.object.key()));
        }
        let delays = || {
            let name = storage::class_of_claim(&claim).filter(|name| !name.is_empty())?;
            class(name).filter(|class| storage::waits_for_consumer(class))
        };
        if storage::is_bound(&claim) {
            claims.bound.push(claim);
        } else if volume.is_empty() && delays().is_some() {
            claims.delayed.push(Delayed { key, claim, candidates: Vec::new() });
        } else {
            return Err("pod has unbound immediate PersistentVolumeClaims".to_owned());
        }
    }
    claims.delayed.sort_by_key(|delayed| std::cmp::Reverse(storage::requested(&delayed.claim)));
    Ok(claims)
}

/// What is to be done for a pod at its node before it is bound.
#[derive(Debug, Default, Clone, PartialEq)]
struct Reservation {
    /// Volumes that are there, by the claims that get them.
    bind: Vec<(Key, String)>,
    /// Claims for which volumes are to be made.
    make: Vec<Key>,
}

struct Binding {
    caches: Caches,
    client: Arc<dyn Client>,
    waiters: Arc<Waiters>,
    free: Free,
    /// The claims of the pod that is being placed.
    current: Claims,
    /// Volumes that were given to claims, and the nodes that claims were given, as long as the caches may not
    /// show it.
    given: HashMap<Key, String>,
    taken: HashMap<Key, String>,
    reserved: HashMap<Key, (String, Reservation)>,
}

impl Binding {
    /// Forgets what was given to claims that the caches show as bound.
    fn settle(&mut self) {
        let Binding { caches, reserved, given, taken, .. } = self;
        reserved.retain(|_, (_, reservation)| {
            let mut keys = reservation.bind.iter().map(|(key, _)| key).chain(&reservation.make);
            !keys.all(|key| caches.claim(key).is_none_or(|claim| storage::is_bound(&claim)))
        });
        let waits: HashSet<&Key> = reserved
            .values()
            .flat_map(|(_, reservation)| reservation.bind.iter().map(|(key, _)| key).chain(&reservation.make))
            .collect();
        given.retain(|key, _| waits.contains(key));
        taken.retain(|key, _| waits.contains(key));
    }

    /// What the pod would need at the node, or all that stands against it.
    fn look(&self, node: &str, labels: &BTreeMap<String, String>) -> Result<Reservation, Vec<&'static str>> {
        let mut against = Vec::new();
        let mut note = |reason| {
            if !against.contains(&reason) {
                against.push(reason);
            }
        };
        for claim in &self.current.bound {
            let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
            match self.caches.volume(name) {
                None => note(VOLUME_MISSING),
                Some(volume) if !reachable(&volume, node, labels) => note(NODE_CONFLICT),
                Some(_) => {}
            }
        }
        let mut reservation = Reservation::default();
        for Delayed { key, claim, candidates } in &self.current.delayed {
            if let Some(volume) = self.given.get(key) {
                // Another pod with this claim goes there already.
                match self.caches.volume(volume) {
                    Some(volume) if reachable(&volume, node, labels) => {
                        reservation
                            .bind
                            .push((key.clone(), volume.metadata.name.clone().unwrap_or_default()));
                    }
                    _ => note(BIND_CONFLICT),
                }
                continue;
            }
            let chosen = self.taken.get(key).map(String::as_str);
            let chosen = chosen.or_else(|| storage::annotation(claim, storage::SELECTED_NODE));
            match chosen {
                Some(other) if other != node => note(BIND_CONFLICT),
                Some(_) => reservation.make.push(key.clone()),
                None => match self.find(claim, candidates, node, labels, &reservation) {
                    Some(volume) => reservation.bind.push((key.clone(), volume)),
                    None if self.can_be_made(claim, labels) => reservation.make.push(key.clone()),
                    None => note(BIND_CONFLICT),
                },
            }
        }
        if against.is_empty() { Ok(reservation) } else { Err(against) }
    }

    /// A volume for the claim that can be reached from the node.
    fn find(
        &self,
        claim: &PersistentVolumeClaim,
        candidates: &[Arc<PersistentVolume>],
        node: &str,
        labels: &BTreeMap<String, String>,
        reservation: &Reservation,
    ) -> Option<String> {
        let is_open = |volume: &PersistentVolume| {
            let name = volume.metadata.name.as_deref().unwrap_or_default();
            !self.given.values().any(|given| given == name)
                && !reservation.bind.iter().any(|(_, volume)| volume == name)
        };
        let open = candidates.iter().map(|volume| &**volume).filter(|volume| is_open(volume));
        let fits = |volume: &PersistentVolume| reachable(volume, node, labels);
        storage::best_match(claim, open, Some(&fits), true)?.metadata.name.clone()
    }

    fn can_be_made(&self, claim: &PersistentVolumeClaim, labels: &BTreeMap<String, String>) -> bool {
        let class = storage::class_of_claim(claim).and_then(|name| self.caches.class(name));
        class.is_some_and(|class| {
            !class.provisioner.is_empty()
                && class.provisioner != storage::NO_PROVISIONER
                && makes_volumes_at(&class, labels)
        })
    }
}

impl ReservePlugin for Binding {
    fn name(&self) -> &'static str {
        "VolumeBinding"
    }

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PersistentVolumeClaim>(), Kind::of::<PersistentVolume>(), Kind::of::<StorageClass>()]
    }

    fn may_help(&mut self, pod: &PodInfo, change: &Change) -> bool {
        let Some(new) = &change.new else { return false };
        let mut names = storage::claims_of(&pod.pod).map(|(name, _)| name);
        if new.kind() == Kind::of::<PersistentVolumeClaim>() {
            return new.namespace() == pod.object.namespace() && names.any(|name| name == new.name());
        }
        let class =
            match typed::<PersistentVolume>(new).filter(|_| new.kind() == Kind::of::<PersistentVolume>()) {
                Some(volume) => storage::class_of_volume(&volume).to_owned(),
                None => new.name().to_owned(),
            };
        names.any(|name| {
            let claim = self.caches.claim(&key_of(pod, &name));
            claim.is_some_and(|claim| {
                let named = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
                storage::class_of_claim(&claim).unwrap_or_default() == class || named == Some(new.name())
            })
        })
    }

    fn prepare(&mut self, pod: &PodInfo) -> Result<bool, Objection> {
        self.free.catch_up();
        if !has_claims(pod) {
            return Ok(false);
        }
        self.settle();
        let (claim, class) = (|key: &Key| self.caches.claim(key), |name: &str| self.caches.class(name));
        self.current = claims_of(pod, claim, class).map_err(|why| Objection::new(why, true))?;
        for delayed in &mut self.current.delayed {
            let names = self.free.for_claim(&delayed.key, &delayed.claim);
            delayed.candidates = names.filter_map(|name| self.caches.volume(name)).collect();
        }
        Ok(true)
    }

    fn filter(&mut self, _: &PodInfo, node: &Node) -> Option<Objection> {
        let reasons = self.look(&node.name, &node.labels).err()?;
        Objection::of(reasons.into_iter().map(Into::into).collect(), true)
    }

    fn reserve(&mut self, pod: &PodInfo, node: &Node) -> Result<(), String> {
        let reservation = self.look(&node.name, &node.labels).map_err(|reasons| reasons.join(", "))?;
        if reservation == Reservation::default() {
            return Ok(());
        }
        for (claim, volume) in &reservation.bind {
            self.given.insert(claim.clone(), volume.clone());
        }
        for claim in &reservation.make {
            self.taken.insert(claim.clone(), node.name.to_string());
        }
        self.reserved.insert(pod.object.key().clone(), (pod.object.uid().to_owned(), reservation));
        Ok(())
    }

    fn unreserve(&mut self, pod: &PodInfo) {
        if self.reserved.get(pod.object.key()).is_some_and(|(uid, _)| uid == pod.object.uid()) {
            self.reserved.remove(pod.object.key());
            self.settle();
        }
    }

    fn pre_bind(&mut self, pod: &PodInfo, node: &str) -> Option<PreBind> {
        let (_, reservation) = self.reserved.get(pod.object.key())?.clone();
        let (client, caches, waiters) = (self.client.clone(), self.caches.clone(), self.waiters.clone());
        let node = node.to_owned();
        Some(Box::pin(async move {
            let bound = bind(&*client, &caches, &waiters, &reservation, &node).await;
            bound.map_err(|why| {
                let message = format!("running PreBind plugin \"VolumeBinding\": binding volumes: {why}");
                Status { message, ..Status::internal("") }
            })
        }))
    }
}

/// Gives the claims their volumes or their node, and waits until all are bound. The error is for the user.
async fn bind(
    client: &dyn Client,
    caches: &Caches,
    waiters: &Waiters,
    reservation: &Reservation,
    node: &str,
) -> Result<(), String> {
    let keys: Vec<&Key> = reservation.bind.iter().map(|(key, _)| key).chain(&reservation.make).collect();
    // Registered before anything is written, so that no answer is missed.
    let waiter = waiters.wait_for(&keys);
    for (key, volume) in &reservation.bind {
        give_volume(client, caches, key, volume).await.map_err(|error| error.message)?;
    }
    let mut asked = HashMap::new();
    for key in &reservation.make {
        let at = select_node(client, caches, key, node).await.map_err(|error| error.message)?;
        asked.insert(key, at);
    }
    let end = Instant::now() + BIND_TIMEOUT;
    loop {
        let news = waiter.news.notified();
        let mut open = false;
        for key in &keys {
            let name = &*key.name;
            let object = caches.claims.get_key(key);
            let old = asked.get(key).is_some_and(|at| object.as_ref().is_none_or(|o| o.revision() < *at));
            if old {
                // The cache has not come to what was written.
                open = true;
                continue;
            }
            let Some(claim) = object.and_then(|object| typed::<PersistentVolumeClaim>(&object)) else {
                return Err(format!("persistentvolumeclaim \"{name}\" not found"));
            };
            if storage::is_bound(&claim) {
                continue;
            }
            // Whoever fails to make a volume takes the node away, so that another one is tried.
            let made = reservation.make.contains(key);
            if made && storage::annotation(&claim, storage::SELECTED_NODE) != Some(node) {
                return Err(format!("provisioning failed for PVC \"{name}\""));
            }
            open = true;
        }
        if !open {
            return Ok(());
        }
        if tokio::time::timeout_at(end, news).await.is_err() {
            return Err("timed out waiting for the condition".to_owned());
        }
    }
}

async fn give_volume(client: &dyn Client, caches: &Caches, claim: &Key, volume: &str) -> Result<(), Status> {
    let (Some(claim), Some(volume)) = (caches.claims.get_key(claim), caches.volumes.get("", volume)) else {
        return Err(Status::not_found(caches.volumes.kind(), volume));
    };
    let Some(typed_volume) = typed::<PersistentVolume>(&volume) else { return Ok(()) };
    let known = storage::claim_ref(&typed_volume);
    if known.is_some_and(|known| known.uid.as_deref() == Some(claim.uid())) {
        return Ok(());
    }
    let mut metadata = json!({ "resourceVersion": volume.revision().to_string() });
    if known.is_none() {
        metadata["annotations"] = json!({ storage::BOUND_BY_CONTROLLER: "yes" });
    }
    let patch = json!({ "metadata": metadata, "spec": { "claimRef": reference(&claim).to_value() } });
    client.patch(Target::of(&volume), Patch::Merge(patch)).await.map(drop)
}

/// Names the node in the claim; the revision from which on the claim does.
async fn select_node(
    client: &dyn Client,
    caches: &Caches,
    key: &Key,
    node: &str,
) -> Result<minke_api::Revision, Status> {
    let claim =
        caches.claims.get_key(key).ok_or_else(|| Status::not_found(caches.claims.kind(), &key.name))?;
    if claim.field(storage::SELECTED_NODE_FIELD) == Some(node) {
        return Ok(claim.revision());
    }
    let patch = json!({ "metadata": {
        "resourceVersion": claim.revision().to_string(),
        "annotations": { storage::SELECTED_NODE: node },
    } });
    client.patch(Target::of(&claim), Patch::Merge(patch)).await.map(|claim| claim.revision())
}

/// Volumes that claims may get, so that no try looks at all there are.
struct Free {
    /// What has yet to be taken in.
    changes: mpsc::UnboundedReceiver<Change>,
    /// Names of those without a claim, by class.
    of_class: HashMap<String, BTreeSet<Arc<str>>>,
    /// Names of those that were set aside for a claim.
    meant: HashMap<Key, BTreeSet<Arc<str>>>,
}

impl Free {
    fn catch_up(&mut self) {
        while let Ok(change) = self.changes.try_recv() {
            for (object, is_new) in [(&change.old, false), (&change.new, true)] {
                let Some(volume) = object.as_ref().and_then(|object| typed::<PersistentVolume>(object))
                else {
                    continue;
                };
                let name: Arc<str> = change.object().name().into();
                match storage::claim_ref(&volume) {
                    None => {
                        put(&mut self.of_class, storage::class_of_volume(&volume).to_owned(), name, is_new)
                    }
                    Some(claim) => {
                        let text = |field: &Option<String>| field.clone().unwrap_or_default();
                        let key = Key::new(&text(&claim.namespace), &text(&claim.name));
                        put(&mut self.meant, key, name, is_new);
                    }
                }
            }
        }
    }

    fn for_claim(&self, key: &Key, claim: &PersistentVolumeClaim) -> impl Iterator<Item = &str> {
        let class = storage::class_of_claim(claim).unwrap_or_default();
        let both = [self.meant.get(key), self.of_class.get(class)];
        both.into_iter().flatten().flatten().map(|name| &**name)
    }
}

fn put<G: Hash + Eq>(groups: &mut HashMap<G, BTreeSet<Arc<str>>>, group: G, name: Arc<str>, is_new: bool) {
    if is_new {
        groups.entry(group).or_default().insert(name);
    } else if let Some(names) = groups.get_mut(&group) {
        names.remove(&name);
        if names.is_empty() {
            groups.remove(&group);
        }
    }
}

/// Who waits for which claims.
#[derive(Default)]
struct Waiters(Mutex<HashMap<Key, Vec<Arc<Notify>>>>);

struct Waiter<'a> {
    waiters: &'a Waiters,
    keys: Vec<Key>,
    news: Arc<Notify>,
}

impl Waiters {
    /// Follows the claims for all who wait, as long as the informer lives.
    fn start(claims: &Informer) -> Arc<Waiters> {
        let waiters = Arc::new(Waiters::default());
        let (mut changes, told) = (claims.subscribe(), Arc::downgrade(&waiters));
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                let Some(waiters) = told.upgrade() else { return };
                for news in waiters.lock().get(change.object().key()).into_iter().flatten() {
                    news.notify_one();
                }
            }
        });
        waiters
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Vec<Arc<Notify>>>> {
        self.0.lock().expect("nothing panics under the lock")
    }

    fn wait_for(&self, keys: &[&Key]) -> Waiter<'_> {
        let (news, keys) =
            (Arc::new(Notify::new()), keys.iter().map(|key| (*key).clone()).collect::<Vec<_>>());
        for key in &keys {
            self.lock().entry(key.clone()).or_default().push(news.clone());
        }
        Waiter { waiters: self, keys, news }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut all = self.waiters.lock();
        for key in &self.keys {
            if let Some(list) = all.get_mut(key) {
                list.retain(|news| !Arc::ptr_eq(news, &self.news));
                if list.is_empty() {
                    all.remove(key);
                }
            }
        }
    }
}

/// A claim that only one pod may use is used by one pod.
struct Restrictions {
    caches: Caches,
    /// Nodes of the pods that use such a claim of the pod that is being placed.
    users: Vec<(Key, String)>,
    /// Pods on their way to a node, with their claims of this sort.
    reserved: HashMap<Key, (String, Vec<Key>)>,
}

impl Restrictions {
    fn exclusive(&self, pod: &PodInfo) -> Vec<Key> {
        let keys = storage::claims_of(&pod.pod).map(|(name, _)| key_of(pod, &name));
        keys.filter(|key| {
            let claim = self.caches.claim(key);
            let modes = claim.as_ref().and_then(|claim| claim.spec.as_ref()?.access_modes.as_deref());
            modes.unwrap_or_default().iter().any(|mode| mode == "ReadWriteOncePod")
        })
        .collect()
    }
}

fn runs_with(object: &Object, claims: &[Key]) -> Option<String> {
    let node = object.field("spec.nodeName").filter(|node| !node.is_empty())?;
    let over = matches!(object.field("status.phase"), Some("Succeeded" | "Failed"));
    let pod = typed::<Pod>(object).filter(|_| !over)?;
    let used = storage::claims_of(&pod).any(|(name, _)| claims.iter().any(|key| *key.name == *name));
    used.then(|| node.to_owned())
}

impl ReservePlugin for Restrictions {
    fn name(&self) -> &'static str {
        "VolumeRestrictions"
    }

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PersistentVolumeClaim>()]
    }

    fn may_help(&mut self, pod: &PodInfo, change: &Change) -> bool {
        let claim = change.new.as_ref().filter(|claim| claim.namespace() == pod.object.namespace());
        claim.is_some_and(|claim| storage::claims_of(&pod.pod).any(|(name, _)| name == claim.name()))
    }

    fn prepare(&mut self, pod: &PodInfo) -> Result<bool, Objection> {
        self.users.clear();
        if !has_claims(pod) {
            return Ok(false);
        }
        let claims = self.exclusive(pod);
        if claims.is_empty() {
            return Ok(false);
        }
        let own = pod.object.key();
        // Few claims are of this sort, and no list of the users of every claim is kept for them.
        let others = self.caches.pods.in_namespace(pod.object.namespace());
        let others = others.iter().filter(|other| other.key() != own);
        self.users =
            others.filter_map(|other| Some((other.key().clone(), runs_with(other, &claims)?))).collect();
        let gone = |key: &Key| self.caches.pods.get_key(key).is_none();
        self.reserved.retain(|key, _| !gone(key));
        for (key, (node, held)) in &self.reserved {
            let known = self.users.iter().any(|(user, _)| user == key);
            if key != own && !known && held.iter().any(|claim| claims.contains(claim)) {
                self.users.push((key.clone(), node.clone()));
            }
        }
        Ok(!self.users.is_empty() || !claims.is_empty())
    }

    fn filter(&mut self, _: &PodInfo, node: &Node) -> Option<Objection> {
        // A pod of this node that is no longer in the picture is one that would be preempted.
        let in_use = self.users.iter().any(|(pod, at)| *at != *node.name || node.pods.contains_key(pod));
        in_use.then(|| Objection::new(ONE_POD, false))
    }

    fn reserve(&mut self, pod: &PodInfo, node: &Node) -> Result<(), String> {
        let claims = self.exclusive(pod);
        if !claims.is_empty() {
            self.reserved.insert(pod.object.key().clone(), (node.name.to_string(), claims));
        }
        Ok(())
    }

    fn unreserve(&mut self, pod: &PodInfo) {
        self.reserved.remove(pod.object.key());
    }

    fn pre_bind(&mut self, _: &PodInfo, _: &str) -> Option<PreBind> {
        None
    }
}

/// A volume that says in which zone or region it is, by its labels, is used there.
struct Zone {
    caches: Caches,
    /// Keys and values of the volumes of the pod that is being placed; several values stand for any of them.
    places: Vec<(String, String)>,
}

fn allows(places: &[(String, String)], labels: &BTreeMap<String, String>) -> bool {
    // A node without any such label is in a cluster without zones.
    if !TOPOLOGY.iter().any(|key| labels.contains_key(*key)) {
        return true;
    }
    // The old names and the new ones mean the same.
    let value = |key: &str| {
        let other = match key {
            "failure-domain.beta.kubernetes.io/zone" => "topology.kubernetes.io/zone",
            "failure-domain.beta.kubernetes.io/region" => "topology.kubernetes.io/region",
            "topology.kubernetes.io/zone" => "failure-domain.beta.kubernetes.io/zone",
            _ => "failure-domain.beta.kubernetes.io/region",
        };
        labels.get(key).or_else(|| labels.get(other))
    };
    places.iter().all(|(key, wanted)| value(key).is_some_and(|have| wanted.split("__").any(|w| w == have)))
}

impl ReservePlugin for Zone {
    fn name(&self) -> &'static str {
        "VolumeZone"
    }

    fn kinds(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PersistentVolumeClaim>(), Kind::of::<PersistentVolume>()]
    }

    fn may_help(&mut self, pod: &PodInfo, change: &Change) -> bool {
        change.new.is_some() && has_claims(pod)
    }

    fn prepare(&mut self, pod: &PodInfo) -> Result<bool, Objection> {
        self.places.clear();
        for (name, _) in storage::claims_of(&pod.pod) {
            let claim = self.caches.claim(&key_of(pod, &name));
            let named = claim.as_ref().and_then(|claim| claim.spec.as_ref()?.volume_name.as_deref());
            let volume = named.and_then(|name| self.caches.volume(name));
            let labels = volume.as_ref().and_then(|volume| volume.metadata.labels.as_ref());
            for (key, value) in
                labels.into_iter().flatten().filter(|(key, _)| TOPOLOGY.contains(&key.as_str()))
            {
                self.places.push((key.clone(), value.clone()));
            }
        }
        Ok(!self.places.is_empty())
    }

    fn filter(&mut self, _: &PodInfo, node: &Node) -> Option<Objection> {
        (!allows(&self.places, &node.labels)).then(|| Objection::new(ZONE_CONFLICT, true))
    }

    fn reserve(&mut self, _: &PodInfo, _: &Node) -> Result<(), String> {
        Ok(())
    }

    fn unreserve(&mut self, _: &PodInfo) {}

    fn pre_bind(&mut self, _: &PodInfo, _: &str) -> Option<PreBind> {
        None
    }
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
