//! A cluster of thousands of nodes in this process: the real API server on a durable store, the real controllers and
//! the real scheduler; only the nodes are hollow. They register, lease, report and watch their own pods like
//! real ones, and say at once that a pod runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use futures_util::stream;
use k8s_openapi::api::core::v1::Node;
use minke_api::{FieldSelector, Kind, Object};
use minke_client::{Client, DeleteOptions, Informer, Informers, Patch, Propagation, Target};
use minke_scenarios::process::{cpu_time, memory_kib};
use minke_store::{Embedded, Store};
use minke_testing::ControlPlane;
use rustix::process::getpid;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::alone::Alone;
use crate::{Args, Table};

const LEASE_PERIOD: Duration = Duration::from_secs(10);
/// Writes of the load that are under way at once.
const WRITERS: usize = 64;
const LIMIT: Duration = Duration::from_secs(600);

fn kind(group: &str, version: &str, plural: &str) -> &'static Kind {
    Kind::by_plural(group, version, plural).expect("a built-in resource")
}

struct Scale {
    plane: ControlPlane,
    admin: Arc<dyn Client>,
    /// All nodes and pods, as the load generator sees them.
    all_nodes: Arc<Informer>,
    pods: Arc<Informer>,
    counts: Arc<Counts>,
    nodes: usize,
    _dir: tempfile::TempDir,
}

/// What became of pods, counted as it happens.
#[derive(Default)]
struct Counts {
    bound: AtomicU64,
    running: AtomicU64,
    gone: AtomicU64,
    /// Status written that the pod has no node.
    refused: AtomicU64,
}

impl Scale {
    async fn start(nodes: usize) -> Result<Scale> {
        let dir = tempfile::TempDir::with_prefix("minke-scale-")?;
        let store = Store::open(Embedded::open(&dir.path().join("store.redb"))?, minke_store::EVENT_BYTES)?;
        let plane = ControlPlane::start(store).await?;
        let (admin, stop) = (plane.admin(), plane.stop.clone());
        let counts = Arc::new(Counts::default());
        let informers = Informers::new(admin.clone(), stop.clone());
        let pods = informers.of(kind("", "v1", "pods"));
        let all_nodes = informers.of(kind("", "v1", "nodes"));
        tokio::spawn(count(pods.clone(), counts.clone()));
        let made = stream::iter(0..nodes).map(|n| {
            let client = plane.client(&format!("system:node:node-{n}"), &["system:nodes"]);
            Hollow { client, n, stop: stop.clone() }.start()
        });
        made.buffer_unordered(WRITERS).collect::<Vec<_>>().await.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Scale { plane, admin, all_nodes, pods, counts, nodes, _dir: dir })
    }

    async fn create(&self, plural: (&str, &str), object: Value) -> Result<()> {
        let kind = kind(plural.0, "v1", plural.1);
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        self.admin.create(Target::collection(kind, &namespace), object).await?;
        Ok(())
    }

    async fn create_pods(&self, namespace: &str, count: usize, pod: impl Fn(usize) -> Value) -> Result<()> {
        let kind = kind("", "v1", "pods");
        let made = stream::iter(0..count).map(|n| {
            let mut pod = pod(n);
            pod["metadata"]["namespace"] = namespace.into();
            let admin = self.admin.clone();
            let namespace = namespace.to_owned();
            async move { admin.create(Target::collection(kind, &namespace), pod).await.map(drop) }
        });
        let done: Vec<Result<(), minke_api::Status>> = made.buffer_unordered(WRITERS).collect().await;
        Ok(done.into_iter().collect::<Result<_, _>>()?)
    }

    async fn namespace(&self, name: &str) -> Result<()> {
        self.create(("", "namespaces"), json!({ "metadata": { "name": name } })).await?;
        // Pods are refused until it has its account.
        let accounts = Target::object(kind("", "v1", "serviceaccounts"), name, "default");
        wait(|| async { self.admin.get(accounts).await.is_ok() }).await
    }

    /// Pods with a node a second, while `count` of them come as fast as they can be made.
    async fn schedule(&self, name: &str, count: usize, pod: impl Fn(usize) -> Value) -> Result<String> {
        self.namespace(name).await?;
        let before = self.counts.bound.load(Ordering::Relaxed);
        let (start, cpu) = (Instant::now(), cpu_time(getpid())?);
        let all = async {
            wait(|| async { self.counts.bound.load(Ordering::Relaxed) >= before + count as u64 }).await
        };
        let (made, bound) = tokio::join!(self.create_pods(name, count, pod), all);
        made?;
        bound.with_context(|| {
            let bound = self.counts.bound.load(Ordering::Relaxed) - before;
            format!("{bound} of {count} pods have a node")
        })?;
        let (took, cpu) =
            (start.elapsed().as_secs_f64(), cpu_time(getpid())?.saturating_sub(cpu).as_secs_f64());
        let (rate, per_cpu) = (count as f64 / took, count as f64 / cpu);
        Ok(format!("{rate:.0}/s; {per_cpu:.0} per CPU-second ({count} pods)"))
    }

    /// Waits until no node is kept from getting pods, as new ones are until they have been seen to be ready.
    async fn nodes_ready(&self) -> Result<()> {
        let open = |object: &Arc<Object>| {
            let node = minke_client::typed::<Node>(object);
            node.is_some_and(|node| node.spec.as_ref().is_none_or(|spec| spec.taints.is_none()))
        };
        wait(|| async {
            let all = self.all_nodes.snapshot();
            all.len() == self.nodes && all.values().all(open)
        })
        .await
    }

    /// Nodes chosen a second by a scheduler that starts with `count` pods waiting for it.
    async fn scheduler_alone(&self, count: usize) -> Result<String> {
        const NAME: &str = "alone";
        self.namespace(NAME).await?;
        let waiting = |n| pod(format!("p-{n}"), json!({}), json!({ "schedulerName": NAME }));
        self.create_pods(NAME, count, waiting).await?;
        let client = Arc::new(Alone::new(self.plane.client("system:kube-scheduler", &[]), count));
        let stop = self.plane.stop.child_token();
        let informers = Informers::new(client.clone(), stop.clone());
        let settings = format!(
            "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\nprofiles: [{{schedulerName: {NAME}}}]\n"
        );
        let settings = minke_scheduler::Settings::parse(settings.as_bytes())?;
        let config = minke_scheduler::Config { seed: 2, settings, ..Default::default() };
        tokio::spawn(minke_scheduler::run(informers, config, stop.clone()));
        let rate = tokio::time::timeout(LIMIT, client.rate()).await.context("the scheduler alone");
        stop.cancel();
        self.drop_namespace(NAME).await?;
        Ok(format!("{:.0}/s ({count} pods)", rate?))
    }

    /// Deletes a namespace and waits until it is gone.
    async fn drop_namespace(&self, name: &str) -> Result<()> {
        let target = Target::object(kind("", "v1", "namespaces"), "", name);
        let options = DeleteOptions { propagation: Some(Propagation::Background), ..Default::default() };
        self.admin.delete(target, options).await?;
        wait(|| async { self.admin.get(target).await.is_err() }).await
    }
}

/// Time that passes, and that all threads of this process spend.
struct Spent {
    start: Instant,
    cpu: Duration,
}

impl Spent {
    fn start() -> Result<Spent> {
        Ok(Spent { start: Instant::now(), cpu: cpu_time(getpid())? })
    }

    fn end(self) -> Result<String> {
        let cpu = cpu_time(getpid())?.saturating_sub(self.cpu).as_secs_f64();
        Ok(format!("{:.1} s; {cpu:.1} CPU-seconds", self.start.elapsed().as_secs_f64()))
    }
}

/// Looks again and again; what is measured lasts so long that this is fine enough.
async fn wait<F: Future<Output = bool>>(holds: impl Fn() -> F) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !holds().await {
        ensure!(Instant::now() < end, "it takes longer than {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn count(pods: Arc<Informer>, counts: Arc<Counts>) {
    let mut changes = pods.subscribe();
    while let Some(change) = changes.recv().await {
        let has_node = |object: &Arc<Object>| object.field("spec.nodeName").is_some_and(|n| !n.is_empty());
        let runs = |object: &Arc<Object>| object.field("status.phase") == Some("Running");
        let became = |holds: &dyn Fn(&Arc<Object>) -> bool| {
            change.new.as_ref().is_some_and(holds) && !change.old.as_ref().is_some_and(holds)
        };
        for (holds, counter) in
            [(&has_node as &dyn Fn(&Arc<Object>) -> bool, &counts.bound), (&runs, &counts.running)]
        {
            if became(holds) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
        match &change.new {
            None => drop(counts.gone.fetch_add(1, Ordering::Relaxed)),
            Some(new) if change.old.is_some() && !has_node(new) => {
                counts.refused.fetch_add(1, Ordering::Relaxed);
            }
            Some(_) => {}
        }
    }
}

struct Hollow {
    client: Arc<dyn Client>,
    n: usize,
    stop: CancellationToken,
}

impl Hollow {
    fn name(&self) -> String {
        format!("node-{}", self.n)
    }

    async fn start(self) -> Result<()> {
        let (name, now) = (self.name(), minke_api::time::format_seconds(jiff::Timestamp::now()));
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": name, "labels": {
                "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
                "topology.kubernetes.io/zone": format!("zone-{}", self.n % 10),
            } },
            "status": status(&now),
        });
        self.client.create(Target::collection(kind("", "v1", "nodes"), ""), node).await?;
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": { "name": name, "namespace": LEASES },
            "spec": { "holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": renewed() },
        });
        self.client.create(Target::collection(leases(), LEASES), lease).await?;
        let hollow = Arc::new(self);
        tokio::spawn(hollow.clone().renew());
        tokio::spawn(hollow.follow());
        Ok(())
    }

    /// Renews the lease as a kubelet does; the node's status is reported every five minutes.
    async fn renew(self: Arc<Hollow>) {
        let name = self.name();
        let lease = Target::object(leases(), LEASES, &name);
        // Nodes do not beat as one.
        let mut pause = LEASE_PERIOD.mul_f64((self.n % 1000) as f64 / 1000.0);
        let mut beats = 0;
        loop {
            tokio::select! { () = self.stop.cancelled() => return, () = tokio::time::sleep(pause) => {} }
            pause = LEASE_PERIOD;
            beats += 1;
            let _ =
                self.client.patch(lease, Patch::Merge(json!({ "spec": { "renewTime": renewed() } }))).await;
            if beats % 30 == 0 {
                let now = minke_api::time::format_seconds(jiff::Timestamp::now());
                let node = Target::object(kind("", "v1", "nodes"), "", &name).sub("status");
                let patch = json!({ "status": { "conditions": status(&now)["conditions"] } });
                let _ = self.client.patch(node, Patch::Strategic(patch)).await;
            }
        }
    }

    async fn follow(self: Arc<Hollow>) {
        let pods = kind("", "v1", "pods");
        let fields = FieldSelector::equal("spec.nodeName", &self.name());
        let informers = Informers::new(self.client.clone(), self.stop.clone());
        let mut changes = informers.selected(pods, fields).subscribe();
        while let Some(change) = changes.recv().await {
            let Some(pod) = change.new else { continue };
            if pod.deleted().is_some() {
                let options = DeleteOptions {
                    grace_period: Some(0),
                    uid: Some(pod.uid().to_owned()),
                    ..Default::default()
                };
                let _ = self.client.delete(Target::of(&pod), options).await;
            } else if pod.field("status.phase") == Some("Pending") {
                let now = minke_api::time::format_seconds(jiff::Timestamp::now());
                let ip = format!("10.{}.{}.2", 64 + self.n / 250, self.n % 250);
                let ready =
                    |type_: &str| json!({ "type": type_, "status": "True", "lastTransitionTime": now });
                let status = json!({ "phase": "Running", "startTime": now, "podIP": ip, "podIPs": [{ "ip": ip }],
                    "conditions": [ready("Initialized"), ready("Ready"), ready("ContainersReady")] });
                let patch = Patch::Strategic(json!({ "status": status }));
                let _ = self.client.patch(Target::of(&pod).sub("status"), patch).await;
            }
        }
    }
}

const LEASES: &str = "kube-node-lease";

fn leases() -> &'static Kind {
    kind("coordination.k8s.io", "v1", "leases")
}

fn renewed() -> String {
    minke_api::time::format_micros(jiff::Timestamp::now())
}

fn status(now: &str) -> Value {
    let resources = json!({ "cpu": "32", "memory": "256Gi", "pods": "110" });
    let condition = |type_: &str, status: &str| json!({ "type": type_, "status": status, "lastHeartbeatTime": now, "lastTransitionTime": now, "reason": "Hollow" });
    let conditions = [
        condition("MemoryPressure", "False"),
        condition("DiskPressure", "False"),
        condition("PIDPressure", "False"),
        condition("Ready", "True"),
    ];
    json!({ "capacity": resources, "allocatable": resources, "conditions": conditions })
}

fn pod(name: String, labels: Value, spec: Value) -> Value {
    let requests = json!({ "cpu": "100m", "memory": "128Mi" });
    let mut pod = json!({
        "metadata": { "name": name, "labels": labels },
        "spec": { "containers": [{ "name": "c", "image": "registry.k8s.io/pause:3.10", "resources": { "requests": requests } }] },
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        pod["spec"][field] = value.clone();
    }
    pod
}

fn on_hostname(selector: &Value) -> Value {
    json!([{ "topologyKey": "kubernetes.io/hostname", "labelSelector": selector }])
}

/// All figures of one large cluster, smaller if the arguments say so.
pub async fn all(args: &Args, table: &mut Table) -> Result<()> {
    if !table.wants(NAME) {
        return Ok(());
    }
    let start = Instant::now();
    let scale = Scale::start(args.scale_nodes).await?;
    let nodes = scale.nodes;
    let took = start.elapsed().as_secs_f64();
    table.add("scale: hollow nodes registered", format!("{:.0}/s ({nodes} nodes)", nodes as f64 / took), "");
    let few = args.scale_pods / 10;
    scale.nodes_ready().await.context("nodes become ready")?;

    let alone = scale.scheduler_alone(few * 2).await?;
    table.add("scale: nodes chosen by the scheduler alone", alone, "10,000/s");
    let plain =
        scale.schedule("plain", args.scale_pods, |n| pod(format!("p-{n}"), json!({}), json!({}))).await?;
    table.add("scale: pods made, scheduled and running, plain", plain, "810/s (upstream's floor)");
    idle(args, table, &scale).await?;

    let zones = |labels: &Value| {
        json!({ "topologySpreadConstraints": [{ "maxSkew": 5, "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "DoNotSchedule", "labelSelector": { "matchLabels": labels } }] })
    };
    let labels = json!({ "app": "spread" });
    let rate =
        scale.schedule("spread", few, |n| pod(format!("s-{n}"), labels.clone(), zones(&labels))).await?;
    table.add("scale: pods scheduled, spread over zones", rate, "");

    let wanted = json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
        { "matchExpressions": [{ "key": "topology.kubernetes.io/zone", "operator": "In", "values": ["zone-1", "zone-2"] }] }] } } });
    let rate = scale
        .schedule("node-affinity", few, |n| pod(format!("n-{n}"), json!({}), json!({ "affinity": wanted })))
        .await?;
    table.add("scale: pods scheduled, node affinity", rate, "220/s (upstream's floor)");

    let labels = json!({ "app": "near" });
    let selector = json!({ "matchLabels": labels });
    let near = json!({ "podAffinity": { "requiredDuringSchedulingIgnoredDuringExecution":
        [{ "topologyKey": "topology.kubernetes.io/zone", "labelSelector": selector }] } });
    let rate = scale
        .schedule("near", few, |n| pod(format!("a-{n}"), labels.clone(), json!({ "affinity": near })))
        .await?;
    table.add("scale: pods scheduled, required affinity", rate, "35/s (upstream's floor)");

    let labels = json!({ "app": "apart" });
    let apart = json!({ "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution":
        on_hostname(&json!({ "matchLabels": labels })) } });
    let rate = scale
        .schedule("apart", few.min(nodes), |n| {
            pod(format!("b-{n}"), labels.clone(), json!({ "affinity": apart }))
        })
        .await?;
    table.add("scale: pods scheduled, required anti-affinity", rate, "60/s (upstream's floor)");

    // Pods that fit nowhere are parked; others must not be slowed by them.
    scale.namespace("hopeless").await?;
    let before = scale.counts.refused.load(Ordering::Relaxed);
    let start = Instant::now();
    let huge = |n| {
        let mut pod = pod(format!("h-{n}"), json!({}), json!({}));
        pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = "64".into();
        pod
    };
    scale.create_pods("hopeless", few, huge).await?;
    wait(|| async { scale.counts.refused.load(Ordering::Relaxed) >= before + few as u64 }).await?;
    let told = few as f64 / start.elapsed().as_secs_f64();
    let rate = scale.schedule("beside", few, |n| pod(format!("p-{n}"), json!({}), json!({}))).await?;
    let text = format!("{rate}; {told:.0}/s found to fit nowhere");
    table.add("scale: pods scheduled beside unschedulable ones", text, "590/s (upstream's floor)");
    scale.drop_namespace("hopeless").await?;

    preemption(table, &scale, few.min(1000)).await?;
    rollout(table, &scale, few * 2).await?;
    let start = Spent::start()?;
    scale.drop_namespace("rollout").await?;
    let text = format!("{} ({} pods)", start.end()?, few * 2);
    table.add("scale: a namespace with its pods deleted", text, "");
    let left = scale.pods.snapshot().len();
    table.add("scale: pods at the end", left.to_string(), "");
    Ok(())
}

pub const NAME: &str = "scale";

async fn idle(args: &Args, table: &mut Table, scale: &Scale) -> Result<()> {
    // The nodes have said of every pod that it runs, and the events are written.
    let all = scale.counts.bound.load(Ordering::Relaxed);
    wait(|| async { scale.counts.running.load(Ordering::Relaxed) >= all }).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (start, cpu) = (Instant::now(), cpu_time(getpid())?);
    tokio::time::sleep(Duration::from_secs(args.seconds.max(10))).await;
    let used = cpu_time(getpid())?.saturating_sub(cpu).as_secs_f64() / start.elapsed().as_secs_f64();
    let memory = memory_kib(getpid().as_raw_pid(), "status", "VmRSS").unwrap_or_default() / 1024;
    let text = format!("{memory} MB RSS, {:.1} % of a core, nodes included", used * 100.0);
    table.add("scale: idle with all nodes and pods", text, "");
    Ok(())
}

/// Full nodes of their own, and pods of higher priority that want in.
async fn preemption(table: &mut Table, scale: &Scale, count: usize) -> Result<()> {
    let class = json!({ "metadata": { "name": "high" }, "value": 1000 });
    scale.create(("scheduling.k8s.io", "priorityclasses"), class).await?;
    let requests = |cpu: &str| json!({ "containers": [{ "name": "c", "image": "pause", "resources": { "requests": { "cpu": cpu } } }] });
    // A resource that some nodes have and that the low pods use up.
    let nodes = kind("", "v1", "nodes");
    let patched = stream::iter(0..count.min(scale.nodes)).map(|n| async move {
        let name = format!("node-{n}");
        let patch = json!({ "status": { "allocatable": { "example.com/slot": "1" }, "capacity": { "example.com/slot": "1" } } });
        scale.admin.patch(Target::object(nodes, "", &name).sub("status"), Patch::Strategic(patch)).await
    });
    let patched: Vec<_> = patched.buffer_unordered(WRITERS).collect().await;
    patched.into_iter().collect::<Result<Vec<_>, _>>()?;
    let count = count.min(scale.nodes);
    let slot = |mut spec: Value| {
        let resources = &mut spec["containers"][0]["resources"];
        resources["requests"]["example.com/slot"] = "1".into();
        resources["limits"] = json!({ "example.com/slot": "1" });
        spec["terminationGracePeriodSeconds"] = 1.into();
        spec
    };
    scale.schedule("low", count, |n| pod(format!("l-{n}"), json!({}), slot(requests("10m")))).await?;
    let high = |n: usize| {
        let mut spec = slot(requests("10m"));
        spec["priorityClassName"] = "high".into();
        pod(format!("x-{n}"), json!({}), spec)
    };
    let rate = scale.schedule("high", count, high).await?;
    table.add("scale: pods scheduled by preemption", rate, "");
    Ok(())
}

async fn rollout(table: &mut Table, scale: &Scale, count: usize) -> Result<()> {
    scale.namespace("rollout").await?;
    let labels = json!({ "app": "web" });
    let deployment = json!({
        "metadata": { "name": "web", "namespace": "rollout" },
        "spec": { "replicas": count, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": { "containers": [{ "name": "c", "image": "v1",
                "resources": { "requests": { "cpu": "10m", "memory": "8Mi" } } }] } } },
    });
    let start = Spent::start()?;
    scale.create(("apps", "deployments"), deployment).await?;
    let target = Target::object(kind("apps", "v1", "deployments"), "rollout", "web");
    let done = |generation: u64| async move {
        let Ok(deployment) = scale.admin.get(target).await else { return false };
        let status = deployment.value()["status"].take();
        let is = |field: &str| status[field] == json!(count);
        status["observedGeneration"] == json!(generation)
            && is("replicas")
            && is("updatedReplicas")
            && is("availableReplicas")
    };
    wait(|| done(1)).await.context("the first rollout")?;
    table.add("scale: a Deployment's first rollout", format!("{} ({count} pods)", start.end()?), "");
    let start = Spent::start()?;
    let patch =
        json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": "v2" }] } } } });
    scale.admin.patch(target, Patch::Strategic(patch)).await?;
    wait(|| done(2)).await.context("the update")?;
    table.add("scale: a rolling update", format!("{} ({count} pods)", start.end()?), "");
    Ok(())
}
