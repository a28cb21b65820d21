//! Ends every pod of a cluster when no server runs to do it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use minke_runtime::{
    ContainerState, ImageStore, LocalRuntime, RegistryConfig, Runtime, RuntimeConfig, SandboxStatus,
};
use tokio::task::JoinSet;

use crate::data_dir::DataDir;

/// Pods that are ended at one time.
const AT_ONCE: usize = 16;

/// Asks all containers to end, kills those that don't within `grace`, and removes the sandboxes. Goes on past failures.
pub async fn stop_all(data: &DataDir, grace: Duration) -> Result<()> {
    if !data.join("shims").exists() && !data.join("sandboxes").exists() {
        return Ok(());
    }
    let images = ImageStore::open(data.path(), RegistryConfig::default())?;
    let config = RuntimeConfig { root: data.path().to_owned(), cgroup_root: data.cgroup() };
    let runtime = LocalRuntime::open(config, images).await.context("find the pods")?;
    let mut failures = Vec::new();
    let mut work = JoinSet::new();
    for sandbox in runtime.list().await? {
        if work.len() >= AT_ONCE {
            failures.extend(work.join_next().await.and_then(outcome));
        }
        let runtime = runtime.clone();
        work.spawn(async move { stop(&runtime, &sandbox, grace).await });
    }
    while let Some(ended) = work.join_next().await {
        failures.extend(outcome(ended));
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(())
}

fn outcome(ended: Result<Result<()>, tokio::task::JoinError>) -> Option<String> {
    match ended {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(error) => Some(error.to_string()),
    }
}

async fn stop(runtime: &LocalRuntime, sandbox: &SandboxStatus, grace: Duration) -> Result<()> {
    let name = format!("pod {}/{}", sandbox.spec.namespace, sandbox.spec.name);
    let mut work = JoinSet::new();
    for container in sandbox.containers.iter().filter(|container| container.state == ContainerState::Running)
    {
        let (runtime, id) = (runtime.clone(), container.id.clone());
        // Whatever comes of it: the sandbox goes next, and its containers with it.
        work.spawn(async move { drop(runtime.stop_container(&id, grace).await) });
    }
    while work.join_next().await.is_some() {}
    runtime.stop_sandbox(&sandbox.spec.id).await.with_context(|| format!("stop {name}"))?;
    runtime.remove_sandbox(&sandbox.spec.id).await.with_context(|| format!("remove {name}"))
}
