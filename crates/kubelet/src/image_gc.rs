//! Takes images away that no pod uses, when the disk they are on gets full.
//!
//! What a person put there, what a container or a pod's specification names, and what has just come stays. The one that was
//! used longest ago goes first. Upstream: pkg/kubelet/images/image_gc_manager.go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use minke_client::Informer;
use minke_runtime::Image;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::pod::Pod;

/// Upstream's defaults: how often is looked, from which percentage on, down to which one, and for how long what is
/// new is left alone.
const PERIOD: Duration = Duration::from_secs(5 * 60);
const HIGH_PERCENT: u64 = 85;
const LOW_PERCENT: u64 = 80;
const MIN_AGE: Duration = Duration::from_secs(2 * 60);

pub struct ImageGc {
    context: Arc<Context>,
    pods: Arc<Informer>,
    seen: BTreeMap<String, Seen>,
    /// The last pass has failed; a single time may have reasons that pass.
    failed: bool,
}

/// When an image was first, and last used, as far as this agent has seen.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    first: Instant,
    used: Option<Instant>,
}

/// A filesystem, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Disk {
    capacity: u64,
    available: u64,
}

impl Disk {
    /// What must go, when it is too full.
    fn excess(self) -> Option<u64> {
        let (capacity, available) = (u128::from(self.capacity), u128::from(self.available));
        let used_percent = 100 - (available * 100).checked_div(capacity)?.min(100);
        if used_percent < u128::from(HIGH_PERCENT) {
            return None;
        }
        let wanted = capacity * u128::from(100 - LOW_PERCENT) / 100;
        u64::try_from(wanted.saturating_sub(available)).ok()
    }

    fn is_relaxed(self) -> bool {
        u128::from(self.available) * 100 >= u128::from(self.capacity) * u128::from(100 - LOW_PERCENT)
    }
}

/// What may go, the one that was used longest ago first.
fn candidates(
    images: &[Image],
    in_use: &BTreeSet<String>,
    seen: &BTreeMap<String, Seen>,
    now: Instant,
) -> Vec<Image> {
    let mut candidates: Vec<(Seen, &Image)> = images
        .iter()
        .filter(|image| !image.pinned && !in_use.contains(&image.id))
        .filter_map(|image| Some((*seen.get(&image.id)?, image)))
        .filter(|(seen, _)| now.duration_since(seen.first) >= MIN_AGE)
        .collect();
    candidates.sort_by_key(|(seen, _)| (seen.used, seen.first));
    candidates.into_iter().map(|(_, image)| image.clone()).collect()
}

impl ImageGc {
    pub fn new(context: Arc<Context>, pods: Arc<Informer>) -> ImageGc {
        ImageGc { context, pods, seen: BTreeMap::new(), failed: false }
    }

    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            let failure = self.pass().await.err();
            if let Some(why) = &failure {
                tracing::warn!(error = why, "Image garbage collection failed");
                if self.failed {
                    self.context.events.node(false, "ImageGCFailed", why.clone());
                }
            }
            self.failed = failure.is_some();
        }
    }

    async fn pass(&mut self) -> Result<(), String> {
        let images = self.look().await.map_err(|e| e.to_string())?;
        let disk = self.disk().map_err(|e| format!("failed to get image stats: {e}"))?;
        if disk.capacity == 0 {
            let why = "invalid capacity 0 on image filesystem".to_owned();
            self.context.events.node(false, "InvalidDiskCapacity", why.clone());
            return Err(why);
        }
        let excess = disk.excess();
        // What pulls that were given up have left, and under pressure what builds have.
        let service = &self.context.images.service;
        service.clean_up(excess.is_some()).await.map_err(|e| e.to_string())?;
        match excess {
            Some(excess) => self.free(excess, &images.0, &images.1).await,
            None => Ok(()),
        }
    }

    fn disk(&self) -> io::Result<Disk> {
        let stat = rustix::fs::statvfs(&self.context.paths.data)?;
        Ok(Disk {
            capacity: stat.f_blocks.saturating_mul(stat.f_frsize),
            available: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }

    /// The images there are and the ids of those in use, both noted.
    async fn look(&mut self) -> minke_runtime::Result<(Vec<Image>, BTreeSet<String>)> {
        let service = &self.context.images.service;
        let mut in_use: BTreeSet<String> = BTreeSet::new();
        for sandbox in self.context.runtime.list().await? {
            in_use.extend(sandbox.containers.into_iter().map(|container| container.image_id));
        }
        // Pods as well: between the pull and the container there is only the pod.
        let pods = self.pods.snapshot();
        let pods =
            pods.values().filter_map(|object| Pod::new(object.clone())).filter(|pod| !pod.is_terminal());
        let mut names: BTreeSet<String> = BTreeSet::new();
        for pod in pods {
            names.extend(pod.containers().filter_map(|(_, container)| container.image.clone()));
            let volumes = pod.spec().volumes.iter().flatten();
            names.extend(volumes.filter_map(|volume| volume.image.as_ref()?.reference.clone()));
        }
        for name in names {
            if let Ok(Some(image)) = service.resolve(&name).await {
                in_use.insert(image.id);
            }
        }
        let images = service.list().await?;
        let now = Instant::now();
        self.seen.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in &images {
            let seen = self.seen.entry(image.id.clone()).or_insert(Seen { first: now, used: None });
            if in_use.contains(&image.id) {
                seen.used = Some(now);
            }
        }
        Ok((images, in_use))
    }

    async fn free(&mut self, excess: u64, images: &[Image], in_use: &BTreeSet<String>) -> Result<(), String> {
        tracing::info!(bytes = excess, "The disk of the images is too full");
        let (mut freed, mut failures) = (0, Vec::new());
        for image in candidates(images, in_use, &self.seen, Instant::now()) {
            if freed >= excess || self.disk().is_ok_and(|disk| disk.is_relaxed()) {
                return Ok(());
            }
            match self.context.images.service.remove(&image.id).await {
                Ok(()) => {
                    tracing::info!(image = image.id, tags = ?image.tags, bytes = image.size, "Removed an unused image");
                    self.seen.remove(&image.id);
                    freed += image.size;
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
        if freed >= excess || self.disk().is_ok_and(|disk| disk.is_relaxed()) {
            return Ok(());
        }
        let why = format!(
            "Failed to garbage collect required amount of images. Attempted to free {excess} bytes, but only found \
             {freed} bytes eligible to free."
        );
        self.context.events.node(false, "FreeDiskSpaceFailed", why.clone());
        failures.insert(0, why);
        Err(failures.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_excess(capacity: u64, available: u64, want: Option<u64>) {
        assert_eq!(Disk { capacity, available }.excess(), want);
    }

    #[test]
    fn a_disk_is_emptied_from_85_to_80_percent() {
        check_excess(1000, 200, None);
        check_excess(1000, 151, Some(49));
        check_excess(1000, 160, None);
        check_excess(1000, 150, Some(50));
        check_excess(1000, 0, Some(200));
        check_excess(0, 0, None);
        check_excess(u64::MAX, u64::MAX / 10, Some(u64::MAX / 5 - u64::MAX / 10));
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let image = |id: &str| Image { id: id.to_owned(), size: 1, ..Image::default() };
        let images = [
            image("used-late"),
            image("never-used"),
            image("used-early"),
            image("in-use"),
            image("new"),
            Image { pinned: true, ..image("by-hand") },
        ];
        let seen = |first: u64, used: Option<u64>| Seen { first: at(first), used: used.map(at) };
        let all: BTreeMap<String, Seen> = [
            ("used-late", seen(0, Some(500))),
            ("never-used", seen(10, None)),
            ("used-early", seen(0, Some(100))),
            ("in-use", seen(0, Some(1000))),
            ("new", seen(950, None)),
            ("by-hand", seen(0, None)),
        ]
        .map(|(id, seen)| (id.to_owned(), seen))
        .into();
        let found = candidates(&images, &BTreeSet::from(["in-use".to_owned()]), &all, at(1000));
        let ids: Vec<&str> = found.iter().map(|image| image.id.as_str()).collect();
        assert_eq!(ids, ["never-used", "used-early", "used-late"]);
    }
}
