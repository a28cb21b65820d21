//! The loop that all controllers share.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use minke_api::{Kind, Status};
use minke_client::{Change, Client, EventRecorder, EventSource, Informers, WorkQueue};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::{CONTROLLERS, Config};

/// How long a worker waits for the cache to show what it wrote; as upstream's expectations.
const CACHE_MAX: Duration = Duration::from_secs(300);

pub(crate) struct Row {
    pub name: &'static str,
    pub account: &'static str,
    pub component: &'static str,
    pub make: fn(&Config) -> Box<dyn Controller>,
}

/// What is particular to a controller.
#[async_trait]
pub(crate) trait Controller: Send + Sync + 'static {
    /// The kinds whose changes matter. All are in the cache before the first item is worked on.
    fn watches(&self) -> Vec<&'static Kind>;

    /// The watched kinds whose ownerless objects this controller takes over.
    fn adopts(&self) -> Vec<&'static Kind> {
        Vec::new()
    }

    /// The items that a change of a watched object may concern.
    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item>;

    /// Makes the world as it should be for `item`, from what the caches show now.
    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status>;
}

/// Runs every controller until `shutdown`, then waits for the passes that are under way.
///
/// `identity` gives the client that acts as the service account of that name in kube-system.
/// `informers` must be able to list and watch every kind.
pub async fn run(
    config: Config,
    identity: impl Fn(&str) -> Arc<dyn Client>,
    informers: Arc<Informers>,
    shutdown: CancellationToken,
) {
    let tasks = TaskTracker::new();
    for row in CONTROLLERS {
        start(row, &config, identity(row.account), &informers, &tasks, &shutdown);
    }
    shutdown.cancelled().await;
    tasks.close();
    tasks.wait().await;
}

fn start(
    row: &'static Row,
    config: &Config,
    client: Arc<dyn Client>,
    informers: &Arc<Informers>,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) {
    let source = EventSource { component: row.component.to_owned(), host: String::new(), series: false };
    let events = EventRecorder::new(client.clone(), source, config.clock, shutdown.clone());
    let controller: Arc<dyn Controller> = (row.make)(config).into();
    let (watches, adopts) = (controller.watches(), controller.adopts());
    let shared = Shared::new(client, informers.clone(), events, config.clock, watches, adopts);
    let shared = Arc::new(shared);
    let queue = Arc::new(WorkQueue::default());
    let (mut clock_set, hurried, over) = (config.clock_set.clone(), queue.clone(), shutdown.clone());
    tasks.spawn(async move {
        while let Some(Ok(())) = over.run_until_cancelled(clock_set.changed()).await {
            hurried.hurry();
        }
    });
    for kind in controller.watches() {
        let (controller, shared, queue) = (controller.clone(), shared.clone(), queue.clone());
        let mut changes = informers.of(kind).subscribe();
        let follow = async move {
            while let Some(change) = changes.recv().await {
                shared.note(&change);
                for item in controller.items(&shared, &change) {
                    queue.add(item);
                }
            }
        };
        let shutdown = shutdown.clone();
        tasks.spawn(async move { shutdown.run_until_cancelled(follow).await });
    }
    for _ in 0..config.workers {
        let worker =
            Worker { row, controller: controller.clone(), shared: shared.clone(), queue: queue.clone() };
        let shutdown = shutdown.clone();
        tasks.spawn(async move { worker.run(shutdown).await });
    }
}

struct Worker {
    row: &'static Row,
    controller: Arc<dyn Controller>,
    shared: Arc<Shared>,
    queue: Arc<WorkQueue<Item>>,
}

impl Worker {
    async fn run(&self, shutdown: CancellationToken) {
        for kind in self.controller.watches() {
            let informer = self.shared.informers.of(kind);
            tokio::select! { biased; () = shutdown.cancelled() => return, () = informer.synced() => {} }
        }
        loop {
            let item = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                item = self.queue.next() => item,
            };
            self.work(&item, &shutdown).await;
            self.queue.done(&item);
        }
    }

    async fn work(&self, item: &Item, shutdown: &CancellationToken) {
        let span = tracing::debug_span!("reconcile", controller = self.row.name, object = %item.key);
        let ctx = Ctx::new(self.shared.clone());
        let pass = AssertUnwindSafe(self.controller.reconcile(&ctx, item)).catch_unwind();
        match pass.instrument(span.clone()).await {
            Ok(Ok(requeue)) => {
                self.queue.forget(item);
                if let Requeue::After(delay) = requeue {
                    self.queue.add_after(item.clone(), delay);
                }
            }
            Ok(Err(error)) => {
                // Someone else was quicker, or the cache is behind: ordinary, and the next pass sees more.
                if error.is_conflict() || error.is_not_found() || error.is_already_exists() {
                    tracing::debug!(parent: &span, %error, "Trying again");
                } else {
                    tracing::warn!(parent: &span, %error, "Reconcile failed; trying again");
                }
                self.queue.retry(item.clone());
            }
            Err(_) => {
                tracing::error!(parent: &span, "Reconcile panicked; trying again");
                self.queue.retry(item.clone());
            }
        }
        for (kind, revision) in ctx.written() {
            let informer = self.shared.informers.of(kind);
            let shown = tokio::time::timeout(CACHE_MAX, informer.reached(revision));
            let shown = tokio::select! { biased; () = shutdown.cancelled() => return, shown = shown => shown.is_ok() };
            if !shown {
                tracing::warn!(parent: &span, kind = kind.plural, %revision, "The cache does not show a write");
            }
        }
    }
}
