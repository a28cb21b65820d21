//! Measures what the design sets budgets for, with medians, and prints a table for bench/README.md.
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use minke_api::{FieldSelector, Kind};
use minke_client::https::HttpsClient;
use minke_client::{Client, DeleteOptions, ListOptions, Patch, Target, WatchEvent, WatchOptions, typed};
use minke_cluster::kubeconfig;
use minke_scenarios::cluster::TestCluster;
use minke_scenarios::process::{cpu_time, find, memory_kib};
use rustix::process::Pid;
use serde_json::{Value, json};
use tokio::task::JoinSet;

const IMAGE: &str = "minke.local/hello:v1";

/// Measure the budgets on clusters made for it.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "target/release/minke")]
    minke: PathBuf,
    /// Seconds over which an idle cluster is watched
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Seconds of each load
    #[arg(long, default_value_t = 5)]
    load: u64,
    /// Only measurements whose name contains one of these
    names: Vec<String>,
}

struct Bench {
    args: Args,
    cluster: TestCluster,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    println!("| what | budget | measured |\n|---|---|---|");
    if wanted(&args, "cold up") {
        let mut times = Vec::new();
        for _ in 0..5 {
            let dir = tempfile::Builder::new().prefix("minke-bench-").tempdir()?;
            let cluster = TestCluster::new(&args.minke, &dir.path().join("data"))?;
            let started = Instant::now();
            cluster.up()?;
            times.push(started.elapsed().as_secs_f64());
            cluster.down()?;
        }
        row("cold up", "1 s", &format!("{} s", spread(&mut times, 2)));
    }
    let dir = tempfile::Builder::new().prefix("minke-bench-").tempdir()?;
    let cluster = TestCluster::new(&args.minke, &dir.path().join("data"))?;
    cluster.up()?;
    let bench = Bench { args, cluster };
    let outcome = runtime.block_on(bench.run());
    bench.cluster.down()?;
    outcome
}

fn wanted(args: &Args, name: &str) -> bool {
    args.names.is_empty() || args.names.iter().any(|wanted| name.contains(wanted.as_str()))
}

fn row(what: &str, budget: &str, measured: &str) {
    println!("| {what} | {budget} | {measured} |");
}

/// Median, with the least and the most.
fn spread(values: &mut [f64], digits: usize) -> String {
    values.sort_by(f64::total_cmp);
    let (first, last) =
        (values.first().copied().unwrap_or_default(), values.last().copied().unwrap_or_default());
    let median = values.get(values.len() / 2).copied().unwrap_or_default();
    format!("{median:.digits$} ({first:.digits$}–{last:.digits$}, n={})", values.len())
}

impl Bench {
    async fn run(&self) -> Result<()> {
        for (name, budget) in [
            ("idle memory", "64 MB RSS"),
            ("idle CPU", "0.5 % of a core"),
            ("pod start", "150 ms p50"),
            ("shim", "2 MB PSS"),
            ("100 replicas", "5 s"),
            ("GET", ""),
            ("LIST 5000 pods", ""),
            ("durable CREATE, 64 clients", ""),
            ("watch, 1000 watchers", ""),
            ("binary", "40 MB"),
        ] {
            if !wanted(&self.args, name) {
                continue;
            }
            let measured = match name {
                "idle memory" => self.idle_memory()?,
                "idle CPU" => self.idle_cpu().await?,
                "pod start" => self.pod_start().await?,
                "shim" => self.shim().await?,
                "100 replicas" => self.replicas().await?,
                "GET" => self.get().await?,
                "LIST 5000 pods" => self.list().await?,
                "durable CREATE, 64 clients" => self.create().await?,
                "watch, 1000 watchers" => self.watch().await?,
                _ => format!("{:.1} MB", std::fs::metadata(&self.args.minke)?.len() as f64 / 1e6),
            };
            row(name, budget, &measured);
        }
        Ok(())
    }

    fn client(&self) -> Result<Arc<dyn Client>> {
        Ok(Arc::new(HttpsClient::new(&kubeconfig::identity(&self.cluster.kubeconfig())?)?))
    }

    fn server(&self) -> Result<Pid> {
        self.cluster.server_pid()
    }

    fn idle_memory(&self) -> Result<String> {
        let pid = self.server()?.as_raw_nonzero().get();
        let rss = memory_kib(pid, "status", "VmRSS").context("no VmRSS")?;
        let anonymous = memory_kib(pid, "status", "RssAnon").context("no RssAnon")?;
        Ok(format!("{:.1} MB RSS, {:.1} MB of it anonymous", rss as f64 / 1024.0, anonymous as f64 / 1024.0))
    }

    async fn idle_cpu(&self) -> Result<String> {
        let before = cpu_time(self.server()?)?;
        tokio::time::sleep(Duration::from_secs(self.args.idle)).await;
        let used = cpu_time(self.server()?)? - before;
        Ok(format!("{:.2} % over {} s", used.as_secs_f64() * 100.0 / self.args.idle as f64, self.args.idle))
    }

    /// From the request that makes a pod to the event that says it runs.
    async fn pod_start(&self) -> Result<String> {
        let client = self.client()?;
        let mut times = Vec::new();
        for n in 0..20 {
            let name = format!("start-{n}");
            let started = Instant::now();
            let created = client
                .create(Target::collection(Kind::of::<Pod>(), "default"), pod(&name, json!({})))
                .await?;
            let fields = FieldSelector::equal("metadata.name", &name);
            let options = WatchOptions { fields, from: created.revision(), ..WatchOptions::default() };
            let mut events = client.watch(Kind::of::<Pod>(), "default", options).await?;
            while let Some(event) = events.next().await {
                if let WatchEvent::Modified(object) | WatchEvent::Added(object) = event?
                    && object.field("status.phase") == Some("Running")
                {
                    times.push(started.elapsed().as_secs_f64() * 1000.0);
                    break;
                }
            }
            let now = DeleteOptions { grace_period: Some(0), ..DeleteOptions::default() };
            client.delete(Target::object(Kind::of::<Pod>(), "default", &name), now).await?;
        }
        Ok(format!("{} ms", spread(&mut times, 0)))
    }

    async fn shim(&self) -> Result<String> {
        let client = self.client()?;
        for n in 0..10 {
            client
                .create(
                    Target::collection(Kind::of::<Pod>(), "default"),
                    pod(&format!("shim-{n}"), json!({})),
                )
                .await?;
        }
        self.until_running(&*client, "shim-", 10).await?;
        let ours = format!("minke-shim {} ", self.cluster.data.path().display());
        let mut sizes: Vec<f64> = find(|line| line.starts_with(&ours))
            .into_iter()
            .filter_map(|pid| memory_kib(pid, "smaps_rollup", "Pss"))
            .map(|kib| kib as f64 / 1024.0)
            .collect();
        for n in 0..10 {
            let now = DeleteOptions { grace_period: Some(0), ..DeleteOptions::default() };
            client.delete(Target::object(Kind::of::<Pod>(), "default", &format!("shim-{n}")), now).await?;
        }
        Ok(format!("{} MB", spread(&mut sizes, 2)))
    }

    async fn until_running(&self, client: &dyn Client, prefix: &str, count: usize) -> Result<()> {
        let list = client.list(Kind::of::<Pod>(), "default", ListOptions::default()).await?;
        let is_running = |object: &minke_api::Object| {
            object.name().starts_with(prefix) && object.field("status.phase") == Some("Running")
        };
        let mut running: std::collections::BTreeSet<String> = list
            .items
            .iter()
            .filter(|object| is_running(object))
            .map(|object| object.name().to_owned())
            .collect();
        let options = WatchOptions { from: list.revision, ..WatchOptions::default() };
        let mut events = client.watch(Kind::of::<Pod>(), "default", options).await?;
        while running.len() < count {
            if let WatchEvent::Modified(object) = events.next().await.context("the watch ended")??
                && is_running(&object)
            {
                running.insert(object.name().to_owned());
            }
        }
        Ok(())
    }

    async fn replicas(&self) -> Result<String> {
        let client = self.client()?;
        let body = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "hundred", "namespace": "default"},
            "spec": {"replicas": 100, "selector": {"matchLabels": {"app": "hundred"}}, "template": {
                "metadata": {"labels": {"app": "hundred"}},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "hello", "image": IMAGE}]},
            }},
        });
        let started = Instant::now();
        let kind = Kind::of::<Deployment>();
        let created = client.create(Target::collection(kind, "default"), body).await?;
        let fields = FieldSelector::equal("metadata.name", "hundred");
        let options = WatchOptions { fields, from: created.revision(), ..WatchOptions::default() };
        let mut events = client.watch(kind, "default", options).await?;
        loop {
            if let WatchEvent::Modified(object) = events.next().await.context("the watch ended")??
                && let Some(deployment) = typed::<Deployment>(&object)
                && deployment.status.as_ref().and_then(|status| status.ready_replicas) == Some(100)
            {
                break;
            }
        }
        let took = started.elapsed();
        client.delete(Target::object(kind, "default", "hundred"), DeleteOptions::default()).await?;
        loop {
            let pods = client.list(Kind::of::<Pod>(), "default", ListOptions::default()).await?;
            if pods.items.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(format!("{:.2} s", took.as_secs_f64()))
    }

    /// Runs `work` on `clients` tasks for the time of a load; requests per second, and per second of the server's CPU.
    async fn load<F>(&self, clients: usize, work: impl Fn(Arc<dyn Client>, usize, u64) -> F) -> Result<String>
    where
        F: Future<Output = Result<()>> + Send + 'static,
        F: 'static,
    {
        let done = Arc::new(AtomicU64::new(0));
        let (before, started) = (cpu_time(self.server()?)?, Instant::now());
        let end = started + Duration::from_secs(self.args.load);
        let connections: Vec<Arc<dyn Client>> = (0..8).map(|_| self.client()).collect::<Result<_>>()?;
        let tasks = (0..clients).map(|task| {
            let (client, done, work) = (connections[task % connections.len()].clone(), done.clone(), &work);
            async move {
                let mut n = 0;
                while Instant::now() < end {
                    work(client.clone(), task, n).await?;
                    n += 1;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                anyhow::Ok(())
            }
        });
        try_join_all(tasks).await?;
        let (wall, cpu) =
            (started.elapsed().as_secs_f64(), (cpu_time(self.server()?)? - before).as_secs_f64());
        let done = done.load(Ordering::Relaxed) as f64;
        Ok(format!("{:.0}/s, {:.0} per CPU-second of the server", done / wall, done / cpu))
    }

    async fn get(&self) -> Result<String> {
        let client = self.client()?;
        client.create(Target::collection(Kind::of::<ConfigMap>(), "default"), config_map("get")).await?;
        self.load(64, |client, _, _| async move {
            client.get(Target::object(Kind::of::<ConfigMap>(), "default", "get")).await?;
            Ok(())
        })
        .await
    }

    async fn list(&self) -> Result<String> {
        let client = self.client()?;
        let mut work = JoinSet::new();
        for task in 0..50 {
            let client = client.clone();
            work.spawn(async move {
                for n in 0..100 {
                    // No scheduler has this name, so they stay as they are.
                    let body = pod(&format!("list-{task}-{n}"), json!({"schedulerName": "none"}));
                    client.create(Target::collection(Kind::of::<Pod>(), "default"), body).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = work.join_next().await {
            ended??;
        }
        self.load(2, |client, _, _| async move {
            client.list(Kind::of::<Pod>(), "default", ListOptions::default()).await?;
            Ok(())
        })
        .await
    }

    async fn create(&self) -> Result<String> {
        self.load(64, |client, task, n| async move {
            let body = config_map(&format!("create-{task}-{n}"));
            client.create(Target::collection(Kind::of::<ConfigMap>(), "default"), body).await?;
            Ok(())
        })
        .await
    }

    async fn watch(&self) -> Result<String> {
        const WATCHERS: usize = 1000;
        const EVENTS: usize = 200;
        let client = self.client()?;
        let kind = Kind::of::<ConfigMap>();
        let created = client
            .create(Target::collection(kind, "kube-public"), config_map_in("watched", "kube-public"))
            .await?;
        let connections: Vec<Arc<dyn Client>> = (0..20).map(|_| self.client()).collect::<Result<_>>()?;
        let mut work = JoinSet::new();
        let ready = Arc::new(tokio::sync::Semaphore::new(0));
        for n in 0..WATCHERS {
            let (client, ready) = (connections[n % connections.len()].clone(), ready.clone());
            let options = WatchOptions { from: created.revision(), ..WatchOptions::default() };
            work.spawn(async move {
                let mut events = client.watch(kind, "kube-public", options).await?;
                ready.add_permits(1);
                let mut seen = 0;
                while seen < EVENTS {
                    if let WatchEvent::Modified(_) = events.next().await.context("the watch ended")?? {
                        seen += 1;
                    }
                }
                anyhow::Ok(())
            });
        }
        let _all = ready.acquire_many(WATCHERS as u32).await?;
        let (before, started) = (cpu_time(self.server()?)?, Instant::now());
        for n in 0..EVENTS {
            let patch = Patch::Merge(json!({"data": {"n": n.to_string()}}));
            client.patch(Target::object(kind, "kube-public", "watched"), patch).await?;
        }
        while let Some(ended) = work.join_next().await {
            ended??;
        }
        let (wall, cpu) =
            (started.elapsed().as_secs_f64(), (cpu_time(self.server()?)? - before).as_secs_f64());
        let events = (WATCHERS * EVENTS) as f64;
        Ok(format!("{:.0} events/s, {:.0} per CPU-second of the server", events / wall, events / cpu))
    }
}

fn pod(name: &str, spec: Value) -> Value {
    let mut body = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default", "labels": {"app": "bench"}},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "hello", "image": IMAGE}]},
    });
    for (name, value) in spec.as_object().into_iter().flatten() {
        body["spec"][name] = value.clone();
    }
    body
}

fn config_map(name: &str) -> Value {
    config_map_in(name, "default")
}

/// About a kilobyte.
fn config_map_in(name: &str, namespace: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace},
        "data": {"payload": "x".repeat(800)},
    })
}
