//! The ConfigMaps, Secrets, claims and trust bundles that pods of this node refer to: each is watched by its name, or
//! those of a signer together, while any pod refers to it, and never longer. Nothing is polled, and nobody else's
//! objects are read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::Resource;
use k8s_openapi::api::certificates::v1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1 as core;
use minke_api::{ApiType, FieldSelector, Kind, Object, Status};
use minke_client::{Client, ListOptions, WatchEvent, WatchOptions, backoff};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::pod::Pod;

/// How long a container start waits for the API server to say whether an object exists.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reference {
    /// What was asked of signers for the pod of that name.
    CertificateRequests(String),
    Claim(String),
    ConfigMap(String),
    Secret(String),
    TrustBundle(String),
    /// All of a signer.
    TrustBundlesOf(String),
}

impl Reference {
    fn kind(&self) -> &'static Kind {
        match self {
            Reference::CertificateRequests(_) => Kind::of::<PodCertificateRequest>(),
            Reference::Claim(_) => Kind::of::<core::PersistentVolumeClaim>(),
            Reference::ConfigMap(_) => Kind::of::<core::ConfigMap>(),
            Reference::Secret(_) => Kind::of::<core::Secret>(),
            Reference::TrustBundle(_) | Reference::TrustBundlesOf(_) => Kind::of::<ClusterTrustBundle>(),
        }
    }

    /// Which objects of the kind are meant.
    fn fields(&self) -> FieldSelector {
        match self {
            Reference::Claim(name)
            | Reference::ConfigMap(name)
            | Reference::Secret(name)
            | Reference::TrustBundle(name) => FieldSelector::name(name),
            Reference::CertificateRequests(pod) => FieldSelector::equal("spec.podName", pod),
            Reference::TrustBundlesOf(signer) => FieldSelector::equal("spec.signerName", signer),
        }
    }
}

/// What a reference means, by name: one object or none, unless it is to several.
type Objects = BTreeMap<String, Arc<Object>>;

#[derive(Debug, Clone)]
enum State {
    /// The first answer is not in yet; the last failure to get it.
    Unknown(String),
    Known(Objects),
}

/// The watches of this node.
pub struct References {
    client: Arc<dyn Client>,
    watches: Mutex<HashMap<(String, Reference), Weak<Watched>>>,
}

struct Watched {
    state: watch::Receiver<State>,
    _stop: DropGuard,
}

/// One pod's share in the watches it needs; dropping it ends those that nobody else needs.
#[derive(Default)]
pub struct Held(BTreeMap<Reference, Arc<Watched>>);

impl References {
    pub fn new(client: Arc<dyn Client>) -> References {
        References { client, watches: Mutex::default() }
    }

    fn watch(&self, namespace: &str, reference: &Reference) -> Arc<Watched> {
        let mut watches = self.watches.lock().expect("starting a watch does not panic");
        let namespace = if reference.kind().namespaced { namespace } else { "" };
        let key = (namespace.to_owned(), reference.clone());
        if let Some(watched) = watches.get(&key).and_then(Weak::upgrade) {
            return watched;
        }
        watches.retain(|_, watched| watched.strong_count() > 0);
        let stop = CancellationToken::new();
        let (sender, state) = watch::channel(State::Unknown(String::new()));
        let client = self.client.clone();
        let (namespace, reference) = key.clone();
        let stopped = stop.clone();
        tokio::spawn(async move {
            let follow = follow(&*client, &namespace, &reference, sender);
            tokio::select! { () = follow => {}, () = stopped.cancelled() => {} }
        });
        let watched = Arc::new(Watched { state, _stop: stop.drop_guard() });
        watches.insert(key, Arc::downgrade(&watched));
        watched
    }

    /// Makes `held` cover exactly what `pod` refers to. `changed` is called at every later change of an
    /// object that is new in `held`, until that returns false.
    pub fn hold(&self, pod: &Pod, held: &mut Held, changed: impl Fn() -> bool + Clone + Send + 'static) {
        let wanted = of_pod(pod);
        held.0.retain(|reference, _| wanted.contains(reference));
        for reference in wanted {
            if held.0.contains_key(&reference) {
                continue;
            }
            let watched = self.watch(pod.namespace(), &reference);
            let mut state = watched.state.clone();
            let (changed, watch) = (changed.clone(), Arc::downgrade(&watched));
            tokio::spawn(async move {
                // Ends with the watch: the sender is dropped then.
                while state.changed().await.is_ok() && watch.strong_count() > 0 && changed() {}
            });
            held.0.insert(reference, watched);
        }
    }
}

async fn follow(client: &dyn Client, namespace: &str, reference: &Reference, state: watch::Sender<State>) {
    let fields = reference.fields();
    let mut failures = 0;
    loop {
        let Err(error) = follow_once(client, namespace, reference, &fields, &state, &mut failures).await;
        if error.is_expired() {
            continue;
        }
        state.send_if_modified(|state| match state {
            State::Unknown(text) => {
                *text = error.to_string();
                true
            }
            _ => false,
        });
        tokio::time::sleep(backoff(Duration::from_millis(100), Duration::from_secs(10), failures)).await;
        failures += 1;
    }
}

async fn follow_once(
    client: &dyn Client,
    namespace: &str,
    reference: &Reference,
    fields: &FieldSelector,
    state: &watch::Sender<State>,
    failures: &mut u32,
) -> Result<std::convert::Infallible, Status> {
    let kind = reference.kind();
    let options = ListOptions { fields: fields.clone(), ..ListOptions::default() };
    let list = client.list(kind, namespace, options).await?;
    put(state, |known| {
        *known = list.items.iter().map(|item| (item.name().to_owned(), item.clone())).collect()
    });
    let mut from = list.revision;
    loop {
        let options = WatchOptions { fields: fields.clone(), from, ..WatchOptions::default() };
        let mut events = client.watch(kind, namespace, options).await?;
        while let Some(event) = events.next().await {
            *failures = 0;
            match event? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    from = object.revision();
                    put(state, |known| drop(known.insert(object.name().to_owned(), object)));
                }
                WatchEvent::Deleted(object) => {
                    from = object.revision();
                    put(state, |known| drop(known.remove(object.name())));
                }
                WatchEvent::Bookmark(revision) => from = revision,
            }
        }
    }
}

/// Changes what is known, and tells of it if it is another thing now.
fn put(state: &watch::Sender<State>, change: impl FnOnce(&mut Objects)) {
    state.send_if_modified(|state| {
        let mut now = match state {
            State::Known(objects) => objects.clone(),
            State::Unknown(_) => Objects::new(),
        };
        change(&mut now);
        let revisions = |objects: &Objects| -> Vec<_> {
            objects.iter().map(|(name, object)| (name.clone(), object.revision())).collect()
        };
        let same = matches!(&*state, State::Known(before) if revisions(before) == revisions(&now));
        if !same {
            *state = State::Known(now);
        }
        !same
    });
}

/// Objects that were looked up, by name: present, absent, or an error to tell.
#[derive(Debug, Default)]
pub struct Referenced {
    pub claims: BTreeMap<String, Result<Option<Arc<core::PersistentVolumeClaim>>, String>>,
    pub config_maps: BTreeMap<String, Result<Option<Arc<core::ConfigMap>>, String>>,
    pub secrets: BTreeMap<String, Result<Option<Arc<core::Secret>>, String>>,
    pub trust_bundles: BTreeMap<Reference, Result<Vec<Arc<ClusterTrustBundle>>, String>>,
    pub certificate_requests: Option<Result<Vec<Arc<PodCertificateRequest>>, String>>,
}

impl Referenced {
    /// `None` when it is absent and may be; an error, which is the message to show, when it may not.
    pub fn config_map(
        &self,
        name: &str,
        optional: Option<bool>,
    ) -> Result<Option<Arc<core::ConfigMap>>, String> {
        found(self.config_maps.get(name), "configmap", name, optional)
    }

    pub fn claim(&self, name: &str) -> Result<Arc<core::PersistentVolumeClaim>, String> {
        match self.claims.get(name) {
            Some(Err(message)) => Err(message.clone()),
            Some(Ok(Some(claim))) => Ok(claim.clone()),
            _ => Err(format!("persistentvolumeclaims \"{name}\" not found")),
        }
    }

    /// Those that a reference to trust bundles means, in the order of their names.
    pub fn trust_bundles(&self, reference: &Reference) -> Result<&[Arc<ClusterTrustBundle>], String> {
        match self.trust_bundles.get(reference) {
            Some(Err(message)) => Err(message.clone()),
            Some(Ok(found)) => Ok(found),
            None => Ok(&[]),
        }
    }

    pub fn secret(&self, name: &str, optional: Option<bool>) -> Result<Option<Arc<core::Secret>>, String> {
        found(self.secrets.get(name), "secret", name, optional)
    }
}

fn found<T>(
    entry: Option<&Result<Option<Arc<T>>, String>>,
    kind: &str,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<Arc<T>>, String> {
    match entry {
        Some(Err(message)) => Err(message.clone()),
        Some(Ok(Some(object))) => Ok(Some(object.clone())),
        _ if optional == Some(true) => Ok(None),
        _ => Err(format!("{kind} \"{name}\" not found")),
    }
}

impl Held {
    /// Waits until every object of `wanted` is known to be there or not.
    pub async fn fetch(&self, wanted: BTreeSet<Reference>) -> Referenced {
        let mut referenced = Referenced::default();
        for reference in wanted {
            let state = match self.0.get(&reference) {
                Some(watched) => known(watched.state.clone(), &reference).await,
                None => Ok(Objects::new()),
            };
            match &reference {
                Reference::Claim(name) => {
                    referenced.claims.insert(name.clone(), state.map(one));
                }
                Reference::ConfigMap(name) => {
                    referenced.config_maps.insert(name.clone(), state.map(one));
                }
                Reference::Secret(name) => {
                    referenced.secrets.insert(name.clone(), state.map(one));
                }
                Reference::TrustBundle(_) | Reference::TrustBundlesOf(_) => {
                    referenced.trust_bundles.insert(reference, state.map(all));
                }
                Reference::CertificateRequests(_) => referenced.certificate_requests = Some(state.map(all)),
            }
        }
        referenced
    }

    /// A copy for a job, which keeps the watches alive while it runs.
    pub fn share(&self) -> Held {
        Held(self.0.clone())
    }
}

/// The one object that a name means.
fn one<T: Resource + ApiType>(objects: Objects) -> Option<Arc<T>> {
    objects.values().next().and_then(|object| minke_client::typed(object))
}

fn all<T: Resource + ApiType>(objects: Objects) -> Vec<Arc<T>> {
    objects.values().filter_map(|object| minke_client::typed(object)).collect()
}

async fn known(mut state: watch::Receiver<State>, reference: &Reference) -> Result<Objects, String> {
    let decided = state.wait_for(|state| !matches!(state, State::Unknown(_)));
    // Decided, ended or timed out: what there is now is the answer.
    drop(tokio::time::timeout(PATIENCE, decided).await);
    match &*state.borrow() {
        State::Known(objects) => return Ok(objects.clone()),
        State::Unknown(error) if !error.is_empty() => return Err(error.clone()),
        State::Unknown(_) => {}
    }
    Err(format!("failed to sync {} cache: timed out waiting for the condition", reference.kind().singular))
}

/// Everything a pod refers to: in environments, volumes and for pulling images.
pub fn of_pod(pod: &Pod) -> BTreeSet<Reference> {
    let mut wanted = of_volumes(pod);
    for (_, container) in pod.containers() {
        wanted.extend(of_env(container));
    }
    wanted.extend(of_pulls(pod));
    wanted
}

pub fn of_pulls(pod: &Pod) -> BTreeSet<Reference> {
    let secrets = pod.spec().image_pull_secrets.iter().flatten();
    secrets.map(|secret| Reference::Secret(secret.name.clone())).collect()
}

pub fn of_env(container: &core::Container) -> BTreeSet<Reference> {
    let mut wanted = BTreeSet::new();
    for source in container.env_from.iter().flatten() {
        wanted.extend(source.config_map_ref.iter().map(|from| Reference::ConfigMap(from.name.clone())));
        wanted.extend(source.secret_ref.iter().map(|from| Reference::Secret(from.name.clone())));
    }
    for from in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
        wanted.extend(from.config_map_key_ref.iter().map(|from| Reference::ConfigMap(from.name.clone())));
        wanted.extend(from.secret_key_ref.iter().map(|from| Reference::Secret(from.name.clone())));
    }
    wanted
}

pub fn of_volumes(pod: &Pod) -> BTreeSet<Reference> {
    let mut wanted = BTreeSet::new();
    for volume in pod.spec().volumes.iter().flatten() {
        let claim = minke_api::storage::claim_of(pod.name(), volume);
        wanted.extend(claim.map(|(name, _)| Reference::Claim(name)));
        wanted.extend(volume.config_map.iter().map(|from| Reference::ConfigMap(from.name.clone())));
        wanted
            .extend(volume.secret.iter().filter_map(|from| from.secret_name.clone()).map(Reference::Secret));
        let projected = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        for source in projected {
            wanted.extend(source.config_map.iter().map(|from| Reference::ConfigMap(from.name.clone())));
            wanted.extend(source.secret.iter().map(|from| Reference::Secret(from.name.clone())));
            wanted.extend(source.cluster_trust_bundle.iter().filter_map(of_trust_bundle));
            let certificate = source.pod_certificate.iter();
            wanted.extend(certificate.map(|_| Reference::CertificateRequests(pod.name().to_owned())));
        }
    }
    wanted
}

/// The bundles that a projection chooses from; by a signer, their labels choose as well.
pub fn of_trust_bundle(from: &core::ClusterTrustBundleProjection) -> Option<Reference> {
    let name = from.name.clone().map(Reference::TrustBundle);
    name.or_else(|| from.signer_name.clone().map(Reference::TrustBundlesOf))
}
