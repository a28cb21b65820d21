//! An API as far as controllers can tell: objects with revisions, uids and generations, status apart from the rest,
//! graceful deletion, finalizers, bindings, watches. No admission, validation or authorization.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use minke_api::{Key, Kind, Object, Revision, Status, patch, schema};
use minke_client::{
    Client, Clock, DeleteOptions, List, ListOptions, Patch, Propagation, Target, WatchEvent, WatchOptions,
    WatchStream,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

/// One write, for the log and for checks.
#[derive(Debug, Clone)]
pub struct Write {
    pub at: Instant,
    pub who: String,
    pub what: String,
}

type Check = Box<dyn Fn(&Api) -> Result<(), String> + Send>;

pub struct Api {
    state: Mutex<State>,
    checks: Mutex<Vec<Check>>,
    violation: Mutex<Option<String>>,
    clock: Clock,
    crash: Mutex<Option<Arc<Crash>>>,
}

/// When the controllers crash, and that they have.
pub struct Crash {
    writes_left: AtomicUsize,
    crashed: AtomicBool,
}

/// Every change that ever was of one kind, with when it happened.
#[derive(Default)]
struct Changes {
    all: Vec<(Instant, WatchEvent)>,
    /// Wakes those who wait for the next.
    more: Arc<Notify>,
}

struct State {
    revision: u64,
    objects: HashMap<&'static Kind, BTreeMap<Key, Arc<Object>>>,
    changes: HashMap<&'static Kind, Changes>,
    log: Vec<Write>,
    last_write: Instant,
    rng: StdRng,
    made: u64,
}

impl Api {
    pub(super) fn new(seed: u64) -> Arc<Api> {
        let start = Instant::now();
        let at = Timestamp::from_second(1_700_000_000).expect("a time");
        let state = State {
            revision: 0,
            objects: HashMap::new(),
            changes: HashMap::new(),
            log: Vec::new(),
            last_write: start,
            rng: StdRng::seed_from_u64(seed),
            made: 0,
        };
        Arc::new(Api {
            state: Mutex::new(state),
            checks: Mutex::default(),
            violation: Mutex::default(),
            clock: Clock::Virtual { at, start },
            crash: Mutex::default(),
        })
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Looks at the cluster after every write from now on, but for leases and events; the first complaint fails the test.
    pub fn check(&self, check: impl Fn(&Api) -> Result<(), String> + Send + 'static) {
        self.checks.lock().expect("no panic").push(Box::new(check));
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.violation.lock().expect("no panic").clone()
    }

    pub fn last(&self, count: usize) -> Vec<Write> {
        let log = &self.lock().log;
        log[log.len().saturating_sub(count)..].to_vec()
    }

    pub(super) fn last_write(&self) -> Instant {
        self.lock().last_write
    }

    pub(super) fn arm(&self, writes: Option<usize>) -> Arc<Crash> {
        let crash = Crash {
            writes_left: AtomicUsize::new(writes.unwrap_or(usize::MAX)),
            crashed: AtomicBool::new(false),
        };
        let crash = Arc::new(crash);
        *self.crash.lock().expect("no panic") = Some(crash.clone());
        crash
    }

    pub(super) fn is_armed(&self) -> bool {
        self.crash.lock().expect("no panic").is_some()
    }

    pub(super) fn has_crashed(&self) -> bool {
        self.crash
            .lock()
            .expect("no panic")
            .as_ref()
            .is_some_and(|crash| crash.crashed.load(Ordering::Relaxed))
    }

    pub fn get(&self, kind: &'static Kind, key: &Key) -> Option<Arc<Object>> {
        self.lock().objects.get(kind.storage())?.get(key).cloned()
    }

    /// The objects of all kinds.
    pub fn all(&self) -> Vec<Arc<Object>> {
        self.lock().objects.values().flat_map(BTreeMap::values).cloned().collect()
    }

    pub fn list(&self, kind: &'static Kind) -> Vec<Arc<Object>> {
        self.lock().objects.get(kind.storage()).into_iter().flat_map(BTreeMap::values).cloned().collect()
    }

    pub(super) fn client(self: &Arc<Api>, who: &str, faults: Faults, crash: Option<Arc<Crash>>) -> SimClient {
        SimClient { api: self.clone(), who: who.to_owned(), faults, crash }
    }

    /// Creates an object as a user, in its namespace or `default`.
    pub(super) fn must_create(&self, mut object: Value) -> Arc<Object> {
        let text = |name: &str| object[name].as_str().expect("objects say their kind").to_owned();
        let kind = Kind::by_api_version(&text("apiVersion"), &text("kind")).expect("a known kind");
        if kind.namespaced && object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = "default".into();
        }
        self.create("user", kind, object).expect("users do not err")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }

    fn create(&self, who: &str, kind: &'static Kind, mut object: Value) -> Result<Arc<Object>, Status> {
        let kind = kind.storage();
        let now = minke_api::time::format_seconds(self.clock.now());
        let object = {
            let mut state = self.lock();
            state.made += 1;
            let random: u16 = state.rng.random();
            let uid = format!("{:08x}-{random:04x}", state.made);
            let metadata = &mut object["metadata"];
            if metadata["name"].as_str().unwrap_or_default().is_empty() {
                let prefix = metadata["generateName"].as_str().unwrap_or_default().to_owned();
                let letters = b"bcdfghjklmnpqrstvwxz2456789";
                let suffix: String =
                    (0..5).map(|_| char::from(letters[state.rng.random_range(0..letters.len())])).collect();
                metadata["name"] = format!("{prefix}{suffix}").into();
            }
            let name = metadata["name"].as_str().unwrap_or_default().to_owned();
            let key = Key::new(metadata["namespace"].as_str().unwrap_or_default(), &name);
            if kind.namespaced {
                let namespace = Key::new("", &key.namespace);
                let Some(namespace) = state.objects.get(namespaces()).and_then(|all| all.get(&namespace))
                else {
                    return Err(Status::not_found(namespaces(), &key.namespace));
                };
                if namespace.deleted().is_some() {
                    let why = format!(
                        "unable to create new content in namespace {} because it is being terminated",
                        key.namespace
                    );
                    return Err(Status::forbidden(kind, &name, &why).with_cause(
                        "NamespaceTerminating",
                        "",
                        "",
                    ));
                }
            }
            if state.objects.get(kind).is_some_and(|all| all.contains_key(&key)) {
                return Err(Status::already_exists(kind, &name));
            }
            metadata["uid"] = uid.into();
            metadata["creationTimestamp"] = now.into();
            metadata["generation"] = 1.into();
            if kind.subresource("status").is_some() && kind.kind != "Node" {
                object.as_object_mut().expect("objects are maps").remove("status");
            }
            match kind.kind {
                "Pod" => {
                    object["status"] = json!({ "phase": "Pending" });
                    if object["spec"]["schedulerName"].is_null() {
                        object["spec"]["schedulerName"] = "default-scheduler".into();
                    }
                }
                "Namespace" => {
                    object["spec"]["finalizers"] = json!(["kubernetes"]);
                    object["status"] = json!({ "phase": "Active" });
                }
                _ => {}
            }
            state.put(kind, object)?
        };
        self.wrote(who, "create", &object);
        Ok(object)
    }

    /// Replaces `old` by what `new` says of the part that `subresource` is about.
    fn update(&self, who: &str, target: Target<'_>, new: Value) -> Result<Arc<Object>, Status> {
        let kind = target.kind.storage();
        let key = Key::new(target.namespace, target.name);
        let old = self.get(kind, &key).ok_or_else(|| Status::not_found(kind, target.name))?;
        let given = &new["metadata"];
        let revision = given["resourceVersion"].as_str().unwrap_or_default();
        if !(revision.is_empty() || revision == old.revision().to_string()) {
            return Err(Status::modified(kind, target.name));
        }
        if given["uid"].as_str().is_some_and(|uid| uid != old.uid()) {
            return Err(Status::conflict(kind, target.name, "the UID in the precondition differs"));
        }
        let before = old.value();
        let mut after = before.clone();
        match target.subresource {
            "status" => after["status"] = new["status"].clone(),
            "finalize" => after["spec"]["finalizers"] = new["spec"]["finalizers"].clone(),
            "scale" if after["spec"]["replicas"] != new["spec"]["replicas"] => {
                after["spec"]["replicas"] = new["spec"]["replicas"].clone();
                after["metadata"]["generation"] = (old.generation() + 1).into();
            }
            "scale" => {}
            "" => {
                after = new;
                if kind.subresource("status").is_some() {
                    after["status"] = before["status"].clone();
                }
                for fixed in [
                    "uid",
                    "creationTimestamp",
                    "deletionTimestamp",
                    "deletionGracePeriodSeconds",
                    "generation",
                ] {
                    after["metadata"][fixed] = before["metadata"][fixed].clone();
                }
                if after["spec"] != before["spec"] {
                    after["metadata"]["generation"] = (old.generation() + 1).into();
                }
            }
            other => return Err(Status::bad_request(format!("no {other} here"))),
        }
        tidy(&mut after);
        let is_empty = |list: &Value| list.as_array().is_none_or(Vec::is_empty);
        let held = !is_empty(&after["metadata"]["finalizers"])
            || (kind.kind == "Namespace" && !is_empty(&after["spec"]["finalizers"]));
        let graceful =
            kind.kind == "Pod" && after["metadata"]["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) > 0;
        if old.deleted().is_some() && !held && !graceful {
            self.remove(who, &old);
            return Ok(old);
        }
        if after == before {
            return Ok(old);
        }
        let object = self.lock().put(kind, after)?;
        self.wrote(who, &format!("update {}", target.subresource), &object);
        Ok(object)
    }

    fn delete(&self, who: &str, target: Target<'_>, options: &DeleteOptions) -> Result<(), Status> {
        let kind = target.kind.storage();
        let old = self
            .get(kind, &Key::new(target.namespace, target.name))
            .ok_or_else(|| Status::not_found(kind, target.name))?;
        let other_uid = options.uid.as_ref().is_some_and(|uid| uid != old.uid());
        let other_revision = options.revision.is_some_and(|revision| revision != old.revision());
        if other_uid || other_revision {
            return Err(Status::conflict(kind, target.name, "the precondition does not hold"));
        }
        let mut after = old.value();
        let mut finalizers = after["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        match options.propagation {
            Some(Propagation::Foreground) => finalizers.push("foregroundDeletion".into()),
            Some(Propagation::Orphan) => finalizers.push("orphan".into()),
            _ => {}
        }
        finalizers.dedup();
        let phase = after["status"]["phase"].as_str().unwrap_or_default();
        let runs = kind.kind == "Pod"
            && !after["spec"]["nodeName"].is_null()
            && !matches!(phase, "Succeeded" | "Failed");
        let grace = if runs { options.grace_period.unwrap_or(30) } else { 0 };
        if finalizers.is_empty() && grace == 0 && kind.kind != "Namespace" {
            self.remove(who, &old);
            return Ok(());
        }
        after["metadata"]["finalizers"] = finalizers.into();
        if after["metadata"]["deletionTimestamp"].is_null() {
            let at = self.clock.now() + Duration::from_secs(grace.max(0) as u64);
            after["metadata"]["deletionTimestamp"] = minke_api::time::format_seconds(at).into();
        }
        after["metadata"]["deletionGracePeriodSeconds"] = grace.into();
        if kind.kind == "Namespace" {
            after["status"]["phase"] = "Terminating".into();
        }
        tidy(&mut after);
        if after != old.value() {
            let object = self.lock().put(kind, after)?;
            self.wrote(who, "delete", &object);
        }
        Ok(())
    }

    fn remove(&self, who: &str, old: &Object) {
        {
            let mut state = self.lock();
            state.revision += 1;
            let gone = Arc::new(old.at_revision(Revision(state.revision)));
            state.objects.entry(old.kind()).or_default().remove(old.key());
            state.note(old.kind(), WatchEvent::Deleted(gone));
        }
        self.wrote(who, "remove", old);
    }

    fn bind(&self, who: &str, target: Target<'_>, binding: &Value) -> Result<(), Status> {
        let key = Key::new(target.namespace, target.name);
        let old = self.get(target.kind, &key).ok_or_else(|| Status::not_found(target.kind, target.name))?;
        let mut pod = old.value();
        if !pod["spec"]["nodeName"].is_null() || old.deleted().is_some() {
            return Err(Status::conflict(target.kind, target.name, "the pod is assigned already or goes"));
        }
        pod["spec"]["nodeName"] = binding["target"]["name"].clone();
        let now = minke_api::time::format_seconds(self.clock.now());
        let scheduled = json!({ "type": "PodScheduled", "status": "True", "lastTransitionTime": now });
        let conditions = pod["status"]["conditions"].as_array_mut().map(std::mem::take).unwrap_or_default();
        let others = conditions.into_iter().filter(|condition| condition["type"] != "PodScheduled");
        pod["status"]["conditions"] = others.chain([scheduled]).collect();
        let object = self.lock().put(target.kind, pod)?;
        self.wrote(who, "bind", &object);
        Ok(())
    }

    fn wrote(&self, who: &str, verb: &str, object: &Object) {
        // Signs of life and tales of what was done are no work.
        if matches!(object.kind().kind, "Lease" | "Event") {
            return;
        }
        {
            let mut state = self.lock();
            let at = Instant::now();
            let what = format!("{verb} {} {}", object.kind().plural, object.key());
            state.last_write = at;
            state.log.push(Write { at, who: who.to_owned(), what });
        }
        for check in self.checks.lock().expect("no panic").iter() {
            if let Err(violation) = check(self) {
                self.violation.lock().expect("no panic").get_or_insert(violation);
            }
        }
    }

    /// The change of a kind after `seen` others, if there is one yet.
    fn change(&self, kind: &'static Kind, seen: usize) -> Option<(Instant, WatchEvent)> {
        self.lock().changes.get(kind)?.all.get(seen).cloned()
    }

    /// How many changes of a kind there were up to a revision, and what wakes when there are more.
    fn changes_until(&self, kind: &'static Kind, revision: Revision) -> (usize, Arc<Notify>) {
        let mut state = self.lock();
        let changes = state.changes.entry(kind).or_default();
        let before =
            |(_, event): &(Instant, WatchEvent)| object_of(event).is_some_and(|o| o.revision() <= revision);
        (changes.all.partition_point(before), changes.more.clone())
    }
}

fn object_of(event: &WatchEvent) -> Option<&Arc<Object>> {
    match event {
        WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object) => {
            Some(object)
        }
        _ => None,
    }
}

fn namespaces() -> &'static Kind {
    Kind::of::<k8s_openapi::api::core::v1::Namespace>()
}

/// The scale of a workload with labels to match.
fn scale(workload: &Object) -> Arc<Object> {
    let value = workload.value();
    let labels = value["spec"]["selector"]["matchLabels"].as_object().into_iter().flatten();
    let selector = labels.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
    let scale = json!({
        "metadata": value["metadata"],
        "spec": { "replicas": value["spec"]["replicas"] },
        "status": {
            "replicas": value["status"]["replicas"],
            "selector": selector.collect::<Vec<_>>().join(","),
        },
    });
    Arc::new(Object::from_value(workload.kind(), &scale).expect("it has the metadata of an object"))
}

/// Takes out nulls and empty lists of metadata, as encoding does.
fn tidy(object: &mut Value) {
    let Some(metadata) = object["metadata"].as_object_mut() else { return };
    metadata.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
    if let Some(spec) = object["spec"].as_object_mut() {
        spec.retain(|_, value| !value.is_null());
    }
    if object["status"].is_null() {
        object.as_object_mut().expect("objects are maps").remove("status");
    }
    if object["spec"].is_null() {
        object.as_object_mut().expect("objects are maps").remove("spec");
    }
}

impl State {
    fn note(&mut self, kind: &'static Kind, event: WatchEvent) {
        let changes = self.changes.entry(kind).or_default();
        changes.all.push((Instant::now(), event));
        changes.more.notify_waiters();
    }

    fn put(&mut self, kind: &'static Kind, mut value: Value) -> Result<Arc<Object>, Status> {
        tidy(&mut value);
        self.revision += 1;
        value["metadata"]["resourceVersion"] = self.revision.to_string().into();
        let object =
            Object::from_value(kind, &value).map_err(|error| Status::bad_request(error.to_string()))?;
        let object = Arc::new(object);
        let old = self.objects.entry(kind).or_default().insert(object.key().clone(), object.clone());
        let event = match old {
            Some(_) => WatchEvent::Modified(object.clone()),
            None => WatchEvent::Added(object.clone()),
        };
        self.note(kind, event);
        Ok(object)
    }
}

/// What is wrong with a client's view of the world.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Faults {
    /// Events come up to this much later.
    pub lag: Duration,
    /// Every call takes up to this long, before it is done and after it.
    pub slowness: Duration,
    /// Watches break after an event, again and again, for up to this long: the cache then lists anew, and never sees the
    /// states in between.
    pub outage: Duration,
}

/// The API under one identity, as a client that may be behind, and may crash.
pub(super) struct SimClient {
    api: Arc<Api>,
    who: String,
    faults: Faults,
    crash: Option<Arc<Crash>>,
}

impl SimClient {
    /// What has crashed never hears of the world again.
    async fn alive(&self) {
        if self.crash.as_ref().is_some_and(|crash| crash.crashed.load(Ordering::Relaxed)) {
            std::future::pending::<()>().await;
        }
        // Every call gives the others a turn, as a network would.
        tokio::task::yield_now().await;
        if !self.faults.slowness.is_zero() {
            let share = self.api.lock().rng.random_range(0.0..1.0);
            tokio::time::sleep(self.faults.slowness.mul_f64(share)).await;
        }
    }

    /// A write was done; perhaps the last one. The answer of the last one is never heard.
    async fn wrote(&self) {
        let Some(crash) = &self.crash else { return };
        if crash.writes_left.fetch_sub(1, Ordering::Relaxed) == 1 {
            crash.crashed.store(true, Ordering::Relaxed);
        }
        self.alive().await;
    }
}

#[async_trait]
impl Client for SimClient {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        self.alive().await;
        let found = self.api.get(target.kind, &Key::new(target.namespace, target.name));
        let found = found.ok_or_else(|| Status::not_found(target.kind, target.name))?;
        if target.subresource == "scale" { Ok(scale(&found)) } else { Ok(found) }
    }

    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status> {
        self.alive().await;
        let mut items = self.api.list(kind);
        items.retain(|object| {
            (namespace.is_empty() || object.namespace() == namespace)
                && options.labels.matches(object.labels())
                && options.fields.matches(object)
        });
        Ok(List { revision: Revision(self.api.lock().revision), items, continue_: None })
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status> {
        self.alive().await;
        let (api, crash, kind, namespace) =
            (self.api.clone(), self.crash.clone(), kind.storage(), namespace.to_owned());
        let seed = api.lock().rng.random();
        let (Faults { lag, outage, .. }, rng) = (self.faults, StdRng::seed_from_u64(seed));
        let (seen, more) = api.changes_until(kind, options.from);
        let (namespace, options): (Arc<str>, Arc<WatchOptions>) = (namespace.into(), Arc::new(options));
        let events = stream::unfold((seen, rng), move |(mut seen, mut rng)| {
            let (api, crash, more) = (api.clone(), crash.clone(), more.clone());
            let (namespace, options) = (namespace.clone(), options.clone());
            async move {
                loop {
                    let another = more.notified();
                    let Some((at, event)) = api.change(kind, seen) else {
                        another.await;
                        continue;
                    };
                    seen += 1;
                    let wanted = object_of(&event).is_some_and(|object| {
                        (namespace.is_empty() || object.namespace() == &*namespace)
                            && options.fields.matches(object)
                            && options.labels.matches(object.labels())
                    });
                    if !wanted {
                        continue;
                    }
                    if !lag.is_zero() {
                        tokio::time::sleep_until(at + lag.mul_f64(rng.random_range(0.0..1.0))).await;
                    }
                    let breaks = !outage.is_zero() && rng.random_bool(0.3);
                    if breaks {
                        tokio::time::sleep(outage.mul_f64(rng.random_range(0.0..1.0))).await;
                    }
                    if crash.as_ref().is_some_and(|crash| crash.crashed.load(Ordering::Relaxed)) {
                        std::future::pending::<()>().await;
                    }
                    let event = if breaks { Err(Status::expired("the watch broke")) } else { Ok(event) };
                    return Some((event, (seen, rng)));
                }
            }
        });
        Ok(events.boxed())
    }

    async fn create(&self, target: Target<'_>, mut body: Value) -> Result<Arc<Object>, Status> {
        self.alive().await;
        if target.kind.namespaced {
            body["metadata"]["namespace"] = target.namespace.into();
        }
        let made = self.api.create(&self.who, target.kind, body);
        self.wrote().await;
        made
    }

    async fn post(&self, target: Target<'_>, body: Value) -> Result<Value, Status> {
        self.alive().await;
        if target.subresource != "binding" {
            return Err(Status::method_not_allowed());
        }
        self.api.bind(&self.who, target, &body)?;
        self.wrote().await;
        Ok(json!({}))
    }

    async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        self.alive().await;
        let written = self.api.update(&self.who, target, body);
        self.wrote().await;
        written
    }

    async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        self.alive().await;
        let kind = target.kind;
        let old = self.api.get(kind, &Key::new(target.namespace, target.name));
        let old = old.ok_or_else(|| Status::not_found(kind, target.name))?;
        let mut original = old.value();
        // A patch that names no revision applies to whatever is there.
        original["metadata"].as_object_mut().expect("objects have metadata").remove("resourceVersion");
        let patched = match &patch {
            Patch::Json(patch) => patch::json::apply(original, patch),
            Patch::Merge(patch) => Ok(patch::merge::apply(original, patch)),
            Patch::Strategic(patch) => {
                let ty =
                    schema::of(kind.group, kind.version, kind.kind).expect("built-in kinds have a schema");
                patch::strategic::apply(ty, original, patch)
            }
        };
        let patched = patched.map_err(|error| Status::bad_request(error.to_string()))?;
        let written = self.api.update(&self.who, target, patched);
        self.wrote().await;
        written
    }

    async fn delete(&self, target: Target<'_>, options: DeleteOptions) -> Result<(), Status> {
        self.alive().await;
        let done = self.api.delete(&self.who, target, &options);
        self.wrote().await;
        done
    }
}
