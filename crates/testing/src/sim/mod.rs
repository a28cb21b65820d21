//! A cluster that exists only in memory and in virtual time: an API that keeps objects, the real controllers and
//! the real scheduler, and kubelets that only pretend to run pods.
//!
//! One thread, paused time and one seed, so that a run can be repeated. It can crash the controllers after
//! any of their writes, and show them the past: the faults that matter most to a controller.

mod api;
mod kubelet;
mod provisioner;

use api::Faults;
pub use api::{Api, Write};
pub use kubelet::Kubelet;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::Resource;
use minke_api::{ApiType, Key, Kind, Object, Status};
use minke_client::{Client, DeleteOptions, Informers, Patch, Propagation, Target};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A cluster is settled when nobody has written for this long. Kubelets' signs of life do not count.
const QUIET: Duration = Duration::from_secs(30);

/// A simulated cluster. Must be made and used within a tokio runtime of one thread with paused time.
pub struct Sim {
    pub api: Arc<Api>,
    seed: u64,
    controllers: CancellationToken,
    nodes: Vec<(String, CancellationToken)>,
    /// Crash the controllers when they have written this often; none if they are not to.
    crash_after: Option<usize>,
    crashes: usize,
    /// What is wrong with what the controllers see.
    faults: Faults,
}

/// A cluster that nobody looks at any more stops, though the runtime may go on.
impl Drop for Sim {
    fn drop(&mut self) {
        self.controllers.cancel();
        self.nodes.iter().for_each(|(_, stop)| stop.cancel());
    }
}

impl Sim {
    /// An empty cluster with its four namespaces. Controllers run from the first [`Sim::settle`] on.
    pub fn new(seed: u64) -> Sim {
        let api = Api::new(seed);
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            api.must_create(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
        }
        Sim {
            api,
            seed,
            controllers: CancellationToken::new(),
            nodes: Vec::new(),
            crash_after: None,
            crashes: 0,
            faults: Faults::default(),
        }
    }

    /// Clusters of so many nodes with each of the troubles, and with all of them at once.
    pub fn troubled(seed: u64, nodes: usize) -> [Sim; 4] {
        let (second, three) = (Duration::from_secs(1), Duration::from_secs(3));
        let sim = || Sim::new(seed).nodes(nodes);
        [
            sim().lag(three),
            sim().slow(second),
            sim().blink(Duration::from_secs(10)),
            sim().lag(three).slow(second).blink(three),
        ]
    }

    pub fn nodes(mut self, count: usize) -> Sim {
        for n in 1..=count {
            let name = format!("node{n}");
            let stop = CancellationToken::new();
            let kubelet = self.kubelet(&name);
            provisioner::start(kubelet.client.clone(), &name);
            kubelet.start(stop.clone());
            self.nodes.push((name, stop));
        }
        self
    }

    fn kubelet(&self, node: &str) -> Kubelet {
        Kubelet {
            client: self.client(node),
            clock: self.api.clock(),
            name: node.to_owned(),
            seed: self.seed,
            slowness: Duration::from_secs(3),
        }
    }

    /// Crashes the controllers after their `n`th write, once; a new generation goes on from what is stored.
    pub fn crash_after(mut self, n: usize) -> Sim {
        self.crash_after = Some(n);
        self
    }

    /// Shows controllers and scheduler what happened only up to this much later.
    pub fn lag(mut self, lag: Duration) -> Sim {
        self.faults.lag = lag;
        self
    }

    /// Makes every call of controllers and scheduler take up to twice this long, so that what they do at the same time comes
    /// in any order.
    pub fn slow(mut self, slowness: Duration) -> Sim {
        self.faults.slowness = slowness;
        self
    }

    /// Breaks the watches of controllers and scheduler now and then, for up to this long each time: what happens meanwhile is
    /// never seen happening, only what came of it.
    pub fn blink(mut self, outage: Duration) -> Sim {
        self.faults.outage = outage;
        self
    }

    pub fn crashed(&self) -> bool {
        self.crashes > 0
    }

    /// A way in for someone else, who sees everything at once.
    pub fn client(&self, who: &str) -> Arc<dyn Client> {
        Arc::new(self.api.client(who, Faults::default(), None))
    }

    /// Stops the signs of life of a node. Its pods go on.
    pub fn silence(&mut self, node: &str) {
        let (_, stop) = self.nodes.iter().find(|(name, _)| name == node).expect("there is such a node");
        stop.cancel();
    }

    /// A silent node is heard again.
    pub fn revive(&mut self, node: &str) {
        let kubelet = self.kubelet(node);
        let (_, stop) = self.nodes.iter_mut().find(|(name, _)| name == node).expect("there is such a node");
        *stop = CancellationToken::new();
        kubelet.revive(stop.clone());
    }

    fn start_controllers(&mut self) {
        let stop = CancellationToken::new();
        self.controllers = stop.clone();
        let budget = self.crash_after.take();
        let api = self.api.clone();
        let crash = self.api.arm(budget);
        let client = {
            let (api, crash, faults) = (api.clone(), crash.clone(), self.faults);
            move |name: &str| -> Arc<dyn Client> { Arc::new(api.client(name, faults, Some(crash.clone()))) }
        };
        let informers = Informers::new(client("informers"), stop.clone());
        let config = minke_controllers::Config {
            root_ca: "-----BEGIN CERTIFICATE-----".to_owned(),
            clock: api.clock(),
            ..minke_controllers::Config::default()
        };
        tokio::spawn(minke_controllers::run(config, client.clone(), informers, stop.clone()));
        let seen = Informers::new(Arc::new(api.client("scheduler", self.faults, None)), stop.clone());
        let config = minke_scheduler::Config { clock: api.clock(), seed: self.seed, ..Default::default() };
        tokio::spawn(minke_scheduler::run(seen, config, stop));
    }

    /// Lets time pass until everything is done, or at most `limit`.
    ///
    /// # Panics
    /// When something was still going on at the limit, or a check failed; with the seed.
    #[track_caller]
    pub fn settle(&mut self, limit: Duration) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let quiet = self.run_until_quiet(limit).await;
            assert!(
                quiet,
                "{caller}: not settled after {limit:?} (seed {}); last: {:#?}",
                self.seed,
                self.api.last(20)
            );
            self.check_violations(caller);
        }
    }

    /// Lets exactly this much time pass.
    #[track_caller]
    pub fn pass(&mut self, time: Duration) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            self.tend(Instant::now() + time, |_| false).await;
            self.check_violations(caller);
        }
    }

    fn check_violations(&self, caller: &std::panic::Location) {
        if let Some(violation) = self.api.violation() {
            panic!("{caller}: {violation} (seed {}); last: {:#?}", self.seed, self.api.last(20));
        }
    }

    async fn run_until_quiet(&mut self, limit: Duration) -> bool {
        let start = Instant::now();
        let quiet = |api: &Api| api.last_write().max(start).elapsed() >= QUIET;
        self.tend(start + limit, quiet).await
    }

    /// Lets time pass until `until` or the end; brings the controllers back when they have crashed.
    async fn tend(&mut self, end: Instant, until: impl Fn(&Api) -> bool) -> bool {
        if self.controllers.is_cancelled() || self.crashes == 0 && !self.api.is_armed() {
            self.start_controllers();
        }
        while Instant::now() < end {
            if self.api.has_crashed() {
                self.controllers.cancel();
                self.crashes += 1;
                self.start_controllers();
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
            if until(&self.api) {
                return true;
            }
        }
        false
    }

    /// Creates an object, as a user.
    pub fn create(&self, object: Value) -> Arc<Object> {
        self.api.must_create(object)
    }

    /// Creates an object, or puts it in the place of the one that has its name, as a user.
    pub async fn put(&self, object: Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let kind = Kind::by_api_version(&text(&object["apiVersion"]), &text(&object["kind"]));
        let (kind, name) = (kind.expect("a known kind"), text(&object["metadata"]["name"]));
        let namespace = if kind.namespaced { "default" } else { "" };
        let target = Target::object(kind, namespace, &name);
        let _ = self.user().delete(target, DeleteOptions::default()).await;
        self.create(object);
    }

    /// Merges into an object, as a user.
    pub async fn patch<T: Resource>(&self, name: &str, patch: Value) -> Arc<Object> {
        let target = Target::object(Kind::of::<T>(), self.namespace_of::<T>(), name);
        self.user().patch(target, Patch::Merge(patch)).await.expect("the object is there")
    }

    pub async fn delete<T: Resource>(&self, name: &str, propagation: Propagation) -> Result<(), Status> {
        let options = DeleteOptions { propagation: Some(propagation), ..DeleteOptions::default() };
        self.user().delete(Target::object(Kind::of::<T>(), self.namespace_of::<T>(), name), options).await
    }

    fn user(&self) -> impl Client {
        self.api.client("user", Faults::default(), None)
    }

    fn namespace_of<T: Resource>(&self) -> &'static str {
        if Kind::of::<T>().namespaced { "default" } else { "" }
    }

    /// An object of namespace `default`, or of none.
    pub fn get<T: Resource + ApiType>(&self, name: &str) -> Option<T> {
        let object = self.api.get(Kind::of::<T>(), &Key::new(self.namespace_of::<T>(), name))?;
        Some(T::from_json(object.json()).expect("it fits its type"))
    }

    /// All objects of a kind, in all namespaces.
    pub fn list<T: Resource + ApiType>(&self) -> Vec<T> {
        let objects = self.api.list(Kind::of::<T>());
        objects.iter().map(|object| T::from_json(object.json()).expect("it fits its type")).collect()
    }

    /// The messages of all events with this reason.
    pub fn events(&self, reason: &str) -> Vec<String> {
        let events = self.list::<k8s_openapi::api::core::v1::Event>();
        let told = events.into_iter().filter(|event| event.reason.as_deref() == Some(reason));
        told.filter_map(|event| event.message).collect()
    }
}

/// A Deployment named `web` whose pods have this one container.
pub fn web(replicas: i32, container: Value) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { "app": "web" } },
            "strategy": { "type": "RollingUpdate", "rollingUpdate": { "maxSurge": "25%", "maxUnavailable": "25%" } },
            "template": { "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [container] } },
        },
    })
}
