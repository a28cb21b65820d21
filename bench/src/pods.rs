//! How fast pods come, and what one more costs.

use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt;
use minke_api::{FieldSelector, Kind, Object, Revision};
use minke_client::{Client, DeleteOptions, Propagation, Target, WatchEvent, WatchOptions};
use minke_scenarios::process::{find, memory_kib};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::{Args, Table, median};

pub const IMAGE: &str = "minke.local/hello:v1";
/// Nothing that is measured here takes longer, unless it is broken.
const LIMIT: Duration = Duration::from_secs(120);

pub fn kind(group: &str, plural: &str) -> &'static Kind {
    Kind::by_plural(group, "v1", plural).expect("a built-in resource")
}

/// Waits until the named object is as `done` wants it.
pub async fn until(
    client: &dyn Client,
    kind: &'static Kind,
    name: &str,
    from: Revision,
    done: impl Fn(Option<&Object>) -> bool,
) -> Result<()> {
    let options = WatchOptions { fields: FieldSelector::name(name), from, ..WatchOptions::default() };
    let follow = async {
        let mut events = client.watch(kind, "default", options).await?;
        while let Some(event) = events.next().await {
            let ended = match event? {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => done(Some(&object)),
                WatchEvent::Deleted(_) => done(None),
                WatchEvent::Bookmark(_) => false,
            };
            if ended {
                return Ok(());
            }
        }
        anyhow::bail!("the watch ended")
    };
    tokio::time::timeout(LIMIT, follow)
        .await
        .with_context(|| format!("{} {name} took too long", kind.kind))?
}

pub fn template(labels: Value) -> Value {
    json!({
        "metadata": {"labels": labels},
        "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "hello", "image": IMAGE}]},
    })
}

async fn run_pod(client: &dyn Client, name: &str) -> Result<Duration> {
    let pods = kind("", "pods");
    let mut pod = template(json!({"run": name}));
    pod["metadata"]["name"] = name.into();
    let start = Instant::now();
    let created = client.create(Target::collection(pods, "default"), pod).await?;
    let running = |pod: Option<&Object>| pod.is_some_and(|pod| pod.field("status.phase") == Some("Running"));
    until(client, pods, name, created.revision(), running).await?;
    Ok(start.elapsed())
}

/// Makes a Deployment of `count` such pods; the time until all are Ready.
pub async fn ready(client: &dyn Client, name: &str, count: i64, template: Value) -> Result<Duration> {
    let deployments = kind("apps", "deployments");
    let labels = template["metadata"]["labels"].clone();
    let deployment = json!({
        "metadata": {"name": name},
        "spec": {"replicas": count, "selector": {"matchLabels": labels}, "template": template},
    });
    let start = Instant::now();
    let created = client.create(Target::collection(deployments, "default"), deployment).await?;
    let all_ready = |deployment: Option<&Object>| {
        deployment.is_some_and(|d| d.value().pointer("/status/readyReplicas") == Some(&json!(count)))
    };
    until(client, deployments, name, created.revision(), all_ready).await?;
    Ok(start.elapsed())
}

/// Deletes an object and what it owns, and waits until it is gone.
pub async fn delete(client: &dyn Client, group: &str, plural: &str, name: &str) -> Result<()> {
    let kind = kind(group, plural);
    let target = Target::object(kind, "default", name);
    let from = client.get(target).await?.revision();
    let options = DeleteOptions { propagation: Some(Propagation::Foreground), ..DeleteOptions::default() };
    client.delete(target, options).await?;
    until(client, kind, name, from, |object| object.is_none()).await
}

/// Process ids of the shims of pods, by the name they are started under.
pub fn shims() -> Vec<i32> {
    find(|line| line.starts_with("minke-shim "))
}

pub async fn all(args: &Args, table: &mut Table) -> Result<()> {
    let (run, pss) = ("pod created to Running, image present", "one more pod: its shim's memory");
    let hundred = "100 replicas Ready";
    if ![run, pss, hundred].iter().any(|what| table.wants(what)) {
        return Ok(());
    }
    let cluster = Cluster::up(&args.minke, &[])?;
    let client = cluster.client()?;
    if table.wants(run) || table.wants(pss) {
        let before = shims();
        let mut took = Vec::new();
        for n in 0..args.rounds * 4 {
            took.push(run_pod(&client, &format!("run-{n}")).await?.as_secs_f64() * 1e3);
        }
        table.add(run, format!("{:.0} ms p50", median(took)), "150 ms p50");
        let ours = shims().into_iter().filter(|pid| !before.contains(pid));
        let sizes: Vec<f64> =
            ours.filter_map(|pid| memory_kib(pid, "smaps_rollup", "Pss")).map(|kib| kib as f64).collect();
        table.add(
            pss,
            format!("{:.2} MB PSS (of {} shims)", median(sizes.clone()) / 1024.0, sizes.len()),
            "2 MB PSS",
        );
        for n in 0..args.rounds * 4 {
            delete(&client, "", "pods", &format!("run-{n}")).await?;
        }
    }
    if table.wants(hundred) {
        let mut took = Vec::new();
        for round in 0..args.rounds.min(3) {
            let name = format!("hundred-{round}");
            took.push(ready(&client, &name, 100, template(json!({"app": name}))).await?.as_secs_f64());
            delete(&client, "apps", "deployments", &name).await?;
        }
        table.add(hundred, format!("{:.2} s", median(took)), "5 s");
    }
    Ok(())
}
