//! A node made of memory: a runtime whose containers only exist on paper, a small API server, and a
//! network that writes down what it is asked. What happens, in which order, is in [`World::log`].

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use minke_api::quantity::{Format, Quantity};
use minke_api::{FieldSelector, Kind, Object, Revision, Status};
use minke_client::{
    Client, DeleteOptions, Informers, List, ListOptions, Patch, Target, WatchEvent, WatchOptions,
};
use minke_runtime::*;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::container::Paths;
use crate::context::{Context, Owners};
use crate::network::PodNetwork;

/// A directory of the test's own; the test removes it.
pub fn temp_dir(what: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("minke-kubelet-{what}-{}", crate::container::new_id(4)));
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    dir
}

/// Everything outside the agent.
pub struct World {
    pub api: Arc<FakeApi>,
    pub runtime: Arc<FakeRuntime>,
    pub dir: PathBuf,
}

type Log = Arc<Mutex<Vec<String>>>;

impl World {
    pub fn new(what: &str) -> World {
        let log = Log::default();
        let dir = temp_dir(what);
        World { api: Arc::default(), runtime: Arc::new(FakeRuntime::new(log, dir.clone())), dir }
    }

    /// What the runtime and the network were asked to do since the last time.
    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.runtime.log.lock().expect("no panic"))
    }

    /// Waits until the log looks as wanted.
    pub async fn eventually(&self, wanted: impl Fn(&[String]) -> bool) {
        let check = async {
            while !wanted(&self.runtime.log.lock().expect("no panic")) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), check).await.expect("it never happened");
    }

    /// Waits until there is an event of this reason.
    pub async fn until_told(&self, reason: &str, message: &str) {
        let mut changes = self.api.changes.subscribe();
        let told = async {
            while !self.api.told(reason).iter().any(|told| told == message) {
                let _ = changes.recv().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), told).await.expect("it is never told");
    }

    /// Runs an agent until the token is cancelled.
    pub async fn start_agent(&self) -> CancellationToken {
        let stop = CancellationToken::new();
        let client: Arc<dyn Client> = self.api.clone();
        let informers = Informers::new(client.clone(), stop.clone());
        let events = crate::events::Recorder::start(client.clone(), "n");
        let paths = Paths { data: self.dir.clone() };
        let network = Arc::new(FakeNetwork { log: self.runtime.log.clone(), taken: Mutex::default() });
        let probe_counts = Arc::<crate::probe_counts::ProbeCounts>::default();
        let prober = crate::probes::Prober::start(self.runtime.clone(), events.clone(), probe_counts.clone());
        let mut settings = crate::settings::Settings::new(&self.dir);
        settings.eviction.thresholds.clear();
        let context = Arc::new(Context {
            node_name: "n".into(),
            node_ip: "192.0.2.1".parse().expect("an address"),
            version: "v1.37.0".into(),
            ids: crate::id_ranges::IdRanges::new("minke-test"),
            cgroup_root: "minke-test".into(),
            dns: crate::etc::Dns::default(),
            runtime: self.runtime.clone(),
            images: crate::images::Images::new(
                self.runtime.clone(),
                events.clone(),
                crate::image_access::ImageAccess::open(&self.dir.join("pulled-images.json")),
                &settings,
            ),
            drain: network.clone(),
            network,
            references: crate::references::References::new(client.clone()),
            volumes: crate::volumes::Volumes {
                paths: paths.clone(),
                client: client.clone(),
                node_name: "n".to_owned(),
            },
            client,
            events,
            services: informers.of_type::<core::Service>(),
            node_memory: 1 << 30,
            allocatable: [("cpu".to_owned(), Quantity::new(4, Format::DecimalSi))].into(),
            seccomp_default: true,
            seccomp_dir: self.dir.join("seccomp"),
            paths,
            owners: Owners::default(),
            prober,
            probe_counts,
            grants: crate::resize::Grants::default(),
            classes: Default::default(),
            pressure: crate::eviction::Pressure::default(),
            endings: crate::eviction::Counts::default(),
            unused_images: tokio::sync::mpsc::channel(1).0,
            for_pods: Resources::default(),
            settings,
        });
        let pods = informers.selected(crate::worker::pods(), FieldSelector::equal("spec.nodeName", "n"));
        let nodes = informers.of_type::<core::Node>();
        let agent = Agent::adopt(context, pods, nodes).await.expect("adopted");
        tokio::spawn(agent.run(stop.clone()));
        stop
    }

    /// Waits until the pod looks as wanted; `None` is a pod that is gone.
    pub async fn until(&self, name: &str, wanted: impl Fn(Option<&Value>) -> bool) -> Option<Value> {
        let mut changes = self.api.changes.subscribe();
        let check = async {
            loop {
                let pod = self.api.read("pods", "ns", name);
                if wanted(pod.as_ref()) {
                    return pod;
                }
                let _ = changes.recv().await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(20), check).await {
            Ok(pod) => pod,
            Err(_) => {
                panic!("it never happened; {:#}", self.api.read("pods", "ns", name).unwrap_or_default())
            }
        }
    }
}

type Objects = BTreeMap<(String, String, String), Value>;

/// Objects in memory, with watches; it checks nothing.
pub struct FakeApi {
    /// The revision, and the objects by plural, namespace and name.
    objects: Mutex<(u64, Objects)>,
    pub changes: broadcast::Sender<WatchEvent>,
}

impl Default for FakeApi {
    fn default() -> FakeApi {
        FakeApi { objects: Mutex::default(), changes: broadcast::Sender::new(1024) }
    }
}

impl FakeApi {
    fn key(kind: &Kind, namespace: &str, name: &str) -> (String, String, String) {
        (kind.plural.to_owned(), namespace.to_owned(), name.to_owned())
    }

    fn object(kind: &'static Kind, value: &Value) -> Arc<Object> {
        Arc::new(Object::from_value(kind, value).expect("an object"))
    }

    pub fn read(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.objects.lock().expect("no panic").1.get(&key).cloned()
    }

    /// What the events of this reason say.
    pub fn told(&self, reason: &str) -> Vec<String> {
        let objects = self.objects.lock().expect("no panic");
        let events = objects
            .1
            .iter()
            .filter(|((plural, _, _), event)| plural == "events" && event["reason"] == reason);
        events.map(|(_, event)| event["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Stores an object, or removes it when it is `None`.
    pub fn write(
        &self,
        kind: &'static Kind,
        namespace: &str,
        name: &str,
        value: Option<Value>,
    ) -> Arc<Object> {
        let mut objects = self.objects.lock().expect("no panic");
        objects.0 += 1;
        let revision = objects.0;
        let key = FakeApi::key(kind, namespace, name);
        let old = objects.1.remove(&key);
        let (event, object) = match value {
            Some(mut value) => {
                value["metadata"]["resourceVersion"] = json!(revision.to_string());
                let object = FakeApi::object(kind, &value);
                objects.1.insert(key, value);
                (WatchEvent::Modified(object.clone()), object)
            }
            None => {
                let mut value = old.expect("it was there");
                value["metadata"]["resourceVersion"] = json!(revision.to_string());
                let object = FakeApi::object(kind, &value);
                (WatchEvent::Deleted(object.clone()), object)
            }
        };
        let _ = self.changes.send(event);
        object
    }

    pub fn put_pod(&self, name: &str, uid: &str, spec: Value) {
        let mut pod = json!({"metadata": {"name": name, "namespace": "ns", "uid": uid, "generation": 1},
            "spec": {"nodeName": "n", "restartPolicy": "Always", "containers": [{"name": "c", "image": "i:1"}]}});
        crate::pod::tests::merge(&mut pod["spec"], spec);
        self.write(crate::worker::pods(), "ns", name, Some(pod));
    }

    /// As a user's deletion.
    pub fn delete_pod(&self, name: &str, grace: i64) {
        let mut pod = self.read("pods", "ns", name).expect("the pod");
        pod["metadata"]["deletionTimestamp"] = json!("2027-01-01T00:00:00Z");
        pod["metadata"]["deletionGracePeriodSeconds"] = json!(grace);
        self.write(crate::worker::pods(), "ns", name, Some(pod));
    }
}

/// Conditions merge by their type, other lists are replaced.
fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(into), Value::Object(patch)) = (&mut *into, patch) else {
        return *into = patch.clone();
    };
    for (key, value) in patch {
        match (key.as_str(), into.get_mut(key), value) {
            (_, _, Value::Null) => drop(into.remove(key)),
            ("conditions", Some(Value::Array(known)), Value::Array(new)) => {
                known.retain(|known| !new.iter().any(|new| new["type"] == known["type"]));
                for new in new {
                    let mut condition = json!({});
                    merge(&mut condition, new);
                    known.push(condition);
                }
            }
            (_, Some(known), value) => merge(known, value),
            (_, None, value) => drop(into.insert(key.clone(), value.clone())),
        }
    }
}

#[async_trait]
impl Client for FakeApi {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        let value = self.read(target.kind.plural, target.namespace, target.name);
        let value = value.ok_or_else(|| Status::not_found(target.kind, target.name))?;
        Ok(FakeApi::object(target.kind, &value))
    }

    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status> {
        let objects = self.objects.lock().expect("no panic");
        let of_kind = objects.1.iter().filter(|((plural, _, _), _)| plural == kind.plural);
        let items = of_kind.map(|(_, value)| FakeApi::object(kind, value));
        let fits = |object: &Arc<Object>| {
            (namespace.is_empty() || object.namespace() == namespace) && options.fields.matches(object)
        };
        Ok(List { revision: Revision(objects.0), items: items.filter(fits).collect(), continue_: None })
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<minke_client::WatchStream, Status> {
        let events = self.changes.subscribe();
        // What happened between the list and this must be listed again.
        if self.objects.lock().expect("no panic").0 > options.from.0 {
            return Err(Status::expired("too old"));
        }
        let namespace = namespace.to_owned();
        let events = stream::unfold(events, |mut events| async { Some((events.recv().await.ok()?, events)) });
        let events = events.filter(move |event| {
            let (WatchEvent::Added(object) | WatchEvent::Modified(object) | WatchEvent::Deleted(object)) =
                event
            else {
                return std::future::ready(false);
            };
            let here = namespace.is_empty() || object.namespace() == namespace;
            std::future::ready(object.kind() == kind && here && options.fields.matches(object))
        });
        Ok(events.map(Ok).boxed())
    }

    async fn create(&self, target: Target<'_>, mut body: Value) -> Result<Arc<Object>, Status> {
        if body["metadata"]["uid"].is_null() {
            body["metadata"]["uid"] = json!(crate::container::new_id(8));
        }
        let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        Ok(self.write(target.kind, target.namespace, &name, Some(body)))
    }

    async fn post(&self, _: Target<'_>, _: Value) -> Result<Value, Status> {
        Ok(json!({"status": {"token": "t", "expirationTimestamp": "2099-01-01T00:00:00Z"}}))
    }

    async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        Ok(self.write(target.kind, target.namespace, target.name, Some(body)))
    }

    async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        let value = self.read(target.kind.plural, target.namespace, target.name);
        let mut value = value.ok_or_else(|| Status::not_found(target.kind, target.name))?;
        let (Patch::Merge(change) | Patch::Strategic(change) | Patch::Json(change)) = patch;
        merge(&mut value, &change);
        Ok(self.write(target.kind, target.namespace, target.name, Some(value)))
    }

    async fn delete(&self, target: Target<'_>, options: DeleteOptions) -> Result<(), Status> {
        let value = self.read(target.kind.plural, target.namespace, target.name);
        let value = value.ok_or_else(|| Status::not_found(target.kind, target.name))?;
        assert_eq!(options.grace_period, Some(0));
        assert_eq!(options.uid.as_deref(), value["metadata"]["uid"].as_str());
        self.write(target.kind, target.namespace, target.name, None);
        Ok(())
    }
}

/// Sandboxes and containers on paper. Images are all there.
pub struct FakeRuntime {
    log: Log,
    dir: PathBuf,
    sandboxes: Mutex<Vec<SandboxStatus>>,
    events: broadcast::Sender<Event>,
    /// What commands answer, and how many there were.
    execs: Mutex<(VecDeque<char>, usize)>,
    /// Containers that are told to end do not.
    pub stuck: AtomicBool,
}

impl FakeRuntime {
    fn new(log: Log, dir: PathBuf) -> FakeRuntime {
        let (sandboxes, events, execs) = (Mutex::default(), broadcast::Sender::new(64), Mutex::default());
        FakeRuntime { log, dir, sandboxes, events, execs, stuck: AtomicBool::new(false) }
    }

    /// The next commands succeed (`+`), fail (`-`), hang (`h`) or can't be run (`?`); all others succeed.
    pub fn answer_execs(&self, answers: &str) {
        *self.execs.lock().expect("no panic") = (answers.chars().collect(), 0);
    }

    /// How many commands were run since the last time.
    pub fn execs(&self) -> usize {
        std::mem::take(&mut self.execs.lock().expect("no panic").1)
    }

    fn note(&self, what: &str, name: &str) {
        self.log.lock().expect("no panic").push(format!("{what} {name}"));
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut ContainerStatus)) -> Result<ContainerStatus> {
        let mut sandboxes = self.sandboxes.lock().expect("no panic");
        let found = sandboxes.iter_mut().flat_map(|s| &mut s.containers).find(|c| c.id == id);
        let found = found.ok_or_else(|| Error::NotFound(id.to_owned()))?;
        change(found);
        Ok(found.clone())
    }

    /// A container ends by itself, or on request.
    pub fn exit(&self, id: &str, code: i32) {
        let status = self.change(id, |c| {
            (c.state, c.exit_code, c.finished_at) =
                (ContainerState::Exited, Some(code), Some(Timestamp::now()));
            c.reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
        });
        let _ = self.events.send(Event::ContainerExited { status: Box::new(status.expect("a container")) });
    }

    pub fn running(&self) -> Vec<ContainerStatus> {
        let sandboxes = self.sandboxes.lock().expect("no panic");
        let all = sandboxes.iter().flat_map(|sandbox| sandbox.containers.clone());
        all.filter(|c| c.state == ContainerState::Running).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.sandboxes.lock().expect("no panic").is_empty()
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    fn version(&self) -> String {
        "fake://1".to_owned()
    }

    async fn run_sandbox(&self, spec: SandboxSpec) -> Result<()> {
        self.note("run", &spec.name);
        let (state, created_at) = (SandboxState::Ready, Timestamp::now());
        let status = SandboxStatus { spec, state, created_at, pid: None, containers: vec![] };
        self.sandboxes.lock().expect("no panic").push(status);
        Ok(())
    }

    async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let mut sandboxes = self.sandboxes.lock().expect("no panic");
        for sandbox in sandboxes.iter_mut().filter(|s| s.spec.id == id) {
            self.note("stop", &sandbox.spec.name);
            sandbox.state = SandboxState::NotReady;
        }
        Ok(())
    }

    async fn remove_sandbox(&self, id: &str) -> Result<()> {
        let mut sandboxes = self.sandboxes.lock().expect("no panic");
        for sandbox in sandboxes.iter().filter(|s| s.spec.id == id) {
            self.note("remove", &sandbox.spec.name);
        }
        sandboxes.retain(|sandbox| sandbox.spec.id != id);
        Ok(())
    }

    fn sandbox_netns(&self, _: &str) -> Result<PathBuf> {
        Ok("/proc/self/ns/net".into())
    }

    async fn create_container(&self, sandbox_id: &str, spec: ContainerSpec) -> Result<()> {
        self.note("create", &format!("{} {}", spec.name, spec.attempt));
        let mut status = crate::plan::tests::container(&spec.name, spec.attempt, ContainerState::Created);
        (status.id, status.sandbox_id, status.created_at) =
            (spec.id, sandbox_id.to_owned(), Timestamp::now());
        (status.labels, status.annotations, status.log_path) = (spec.labels, spec.annotations, spec.log_path);
        let mut sandboxes = self.sandboxes.lock().expect("no panic");
        let sandbox = sandboxes.iter_mut().find(|s| s.spec.id == sandbox_id);
        sandbox.ok_or_else(|| Error::NotFound(sandbox_id.to_owned()))?.containers.push(status);
        Ok(())
    }

    async fn start_container(&self, id: &str) -> Result<()> {
        let status = self.change(id, |c| {
            (c.state, c.started_at) = (ContainerState::Running, Some(Timestamp::now()));
        })?;
        self.note("start", &format!("{} {}", status.name, status.attempt));
        Ok(())
    }

    async fn stop_container(&self, id: &str, _: Duration) -> Result<()> {
        let status = self.container_status(id).await?;
        self.note("stop", &status.name);
        if self.stuck.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if status.state == ContainerState::Running {
            self.exit(id, 143);
        }
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        for sandbox in self.sandboxes.lock().expect("no panic").iter_mut() {
            sandbox.containers.retain(|c| c.id != id);
        }
        Ok(())
    }

    async fn signal_container(&self, _: &str, _: i32) -> Result<()> {
        Ok(())
    }

    async fn update_sandbox(&self, id: &str, _: Resources) -> Result<()> {
        self.note("limit", id);
        Ok(())
    }

    async fn update_container(&self, _: &str, _: Resources) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<SandboxStatus>> {
        Ok(self.sandboxes.lock().expect("no panic").clone())
    }

    async fn container_status(&self, id: &str) -> Result<ContainerStatus> {
        self.change(id, |_| {})
    }

    fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    async fn exec(&self, _: &str, _: ExecSpec) -> Result<Session> {
        Err(Error::Failed("no processes here".to_owned()))
    }

    async fn attach(&self, _: &str, _: AttachSpec) -> Result<Session> {
        Err(Error::Failed("no processes here".to_owned()))
    }

    async fn reopen_log(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn container_stats(&self, _: &str) -> Result<Stats> {
        Ok(Stats::default())
    }

    async fn sandbox_stats(&self, _: &str) -> Result<Stats> {
        Ok(Stats::default())
    }

    async fn exec_sync(&self, _: &str, _: Vec<String>, timeout: Duration) -> Result<ExecOutput> {
        let answer = {
            let mut execs = self.execs.lock().expect("no panic");
            execs.1 += 1;
            execs.0.pop_front()
        };
        match answer {
            None | Some('+') => Ok(ExecOutput::default()),
            Some('h') => {
                tokio::time::sleep(timeout).await;
                Err(Error::Timeout(format!("{timeout:?}")))
            }
            Some('-') => Ok(ExecOutput { exit_code: 1, ..ExecOutput::default() }),
            Some(_) => Err(Error::Failed("no such container".to_owned())),
        }
    }
}

#[async_trait]
impl ImageService for FakeRuntime {
    async fn resolve(&self, reference: &str) -> Result<Option<Image>> {
        Ok(Some(Image { id: "sha256:1".into(), tags: vec![reference.to_owned()], ..Image::default() }))
    }

    async fn pull(&self, reference: &str, _: Auth, _: Option<Progress>) -> Result<Image> {
        Err(Error::NotFound(format!("{reference}: not found")))
    }

    async fn list(&self) -> Result<Vec<Image>> {
        Ok(vec![])
    }

    async fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn disk_usage(&self) -> Result<u64> {
        Ok(self.dir.as_os_str().len() as u64)
    }
}

struct FakeNetwork {
    log: Log,
    taken: Mutex<std::collections::BTreeSet<u8>>,
}

impl FakeNetwork {
    fn note(&self, text: String) {
        self.log.lock().expect("no panic").push(text);
    }

    fn last_byte(address: IpAddr) -> u8 {
        match address {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(_) => 0,
        }
    }
}

#[async_trait]
impl PodNetwork for FakeNetwork {
    fn allocate(&self) -> Result<IpAddr, String> {
        let mut taken = self.taken.lock().expect("no panic");
        let free = (2..255).find(|n| !taken.contains(n)).ok_or("full")?;
        taken.insert(free);
        Ok(IpAddr::from([10, 1, 0, free]))
    }

    fn reserve(&self, address: IpAddr) -> Result<(), String> {
        let new = self.taken.lock().expect("no panic").insert(FakeNetwork::last_byte(address));
        new.then_some(()).ok_or_else(|| "taken".to_owned())
    }

    fn release(&self, address: IpAddr) {
        self.taken.lock().expect("no panic").remove(&FakeNetwork::last_byte(address));
    }

    async fn attach(&self, _: &str, _: &Path, address: IpAddr) -> Result<(), String> {
        self.note(format!("attach {address}"));
        Ok(())
    }

    async fn detach(&self, _: &str) -> Result<(), String> {
        self.note("detach".to_owned());
        Ok(())
    }
}

#[async_trait]
impl minke_network::EndpointDrain for FakeNetwork {
    async fn drain(&self, address: IpAddr) {
        self.note(format!("drain {address}"));
    }

    fn forget(&self, _: IpAddr) {}
}
