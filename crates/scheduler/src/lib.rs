//! The scheduler: gives each pod a node.
//!
//! One loop. It keeps a `Picture` of the nodes up to date from the informers, takes the
//! pod of highest priority from the `Queue`, and `decide`s. Binding runs beside the loop; until
//! it is known to have worked the pod is *assumed* to be on its node. A pod that fits nowhere may
//! `preempt` others, or waits for an event that can help it (`hints`). Upstream: pkg/scheduler.
#![forbid(unsafe_code)]

mod affinity;
mod alike;
mod config;
mod cycle;
mod decide;
mod hints;
mod picture;
mod plugins;
mod preempt;
mod profile;
mod queue;
mod reserve;
mod resources;
mod tally;
mod volumes;
mod workloads;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node as NodeObject, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use minke_client::{Change, Clock, Informers};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use config::{ConfigError, Settings};

use cycle::Scheduler;
use workloads::Workloads;

/// Pods whose `spec.schedulerName` is this are ours, unless the settings say otherwise.
pub const NAME: &str = profile::DEFAULT_NAME;

#[derive(Debug, Clone, Default)]
pub struct Config {
    pub clock: Clock,
    /// Seed of the choice between equally good nodes.
    pub seed: u64,
    pub settings: Settings,
}

/// Schedules until `stop`. `informers` and the client in them act as `system:kube-scheduler`.
pub async fn run(informers: Arc<Informers>, config: Config, stop: CancellationToken) {
    let (pods, nodes) = (informers.of_type::<Pod>(), informers.of_type::<NodeObject>());
    let namespaces = informers.of_type::<Namespace>();
    let budgets = informers.of_type::<PodDisruptionBudget>();
    let reserving = reserve::all(&informers);
    let followed: Vec<_> = Workloads::kinds().into_iter().map(|kind| informers.of(kind)).collect();
    let mut reserved: Vec<_> = reserving.iter().flat_map(|plugin| plugin.kinds()).collect();
    reserved.sort_by_key(|kind| (kind.group, kind.plural));
    reserved.dedup();
    let reserved: Vec<_> = reserved.into_iter().map(|kind| informers.of(kind)).collect();
    let synced = async {
        for informer in [&pods, &nodes, &namespaces, &budgets].into_iter().chain(&followed).chain(&reserved) {
            informer.synced().await;
        }
    };
    tokio::select! { biased; () = stop.cancelled() => return, () = synced => {} }
    let (mut pods, mut nodes, mut namespaces) = (pods.subscribe(), nodes.subscribe(), namespaces.subscribe());
    let mut followed = merged(&followed);
    let mut reserved = merged(&reserved);
    let (done, mut outcomes) = mpsc::unbounded_channel();
    let mut scheduler = Scheduler::new(&informers, &config, budgets, reserving, done, &stop);
    loop {
        // The picture first, so that each decision is made on the newest one.
        while let Ok(change) = namespaces.try_recv() {
            scheduler.namespace_changed(&change);
        }
        while let Ok(change) = nodes.try_recv() {
            scheduler.node_changed(&change);
        }
        while let Ok(change) = followed.try_recv() {
            scheduler.world.workloads.changed(&change);
        }
        while let Ok(change) = pods.try_recv() {
            scheduler.pod_changed(&change);
        }
        while let Ok(change) = reserved.try_recv() {
            scheduler.reserved_changed(&change);
        }
        while let Ok(outcome) = outcomes.try_recv() {
            scheduler.ended(outcome);
        }
        if stop.is_cancelled() {
            return;
        }
        if let Some((info, object)) = scheduler.queue.pop(Instant::now()) {
            scheduler.schedule(&info, &object).await;
            tokio::task::consume_budget().await;
            continue;
        }
        let timer = scheduler.queue.next_timer();
        let timer = async {
            match timer {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(change) = namespaces.recv() => scheduler.namespace_changed(&change),
            Some(change) = nodes.recv() => scheduler.node_changed(&change),
            Some(change) = followed.recv() => scheduler.world.workloads.changed(&change),
            Some(change) = pods.recv() => scheduler.pod_changed(&change),
            Some(change) = reserved.recv() => scheduler.reserved_changed(&change),
            Some(outcome) = outcomes.recv() => scheduler.ended(outcome),
            () = timer => {}
        }
    }
}

/// The changes of several informers as one stream.
fn merged(informers: &[Arc<minke_client::Informer>]) -> mpsc::UnboundedReceiver<Change> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for informer in informers {
        let mut changes = informer.subscribe();
        let sender = sender.clone();
        // What is there already is handed over at once, so that nothing is decided without it.
        while let Ok(change) = changes.try_recv() {
            let _ = sender.send(change);
        }
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                if sender.send(change).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}
