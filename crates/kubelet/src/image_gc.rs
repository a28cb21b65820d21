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
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::pod::Pod;
use crate::settings::ImageLimits;

/// How often it is looked; upstream's period.
const PERIOD: Duration = Duration::from_secs(5 * 60);

pub struct ImageGc {
    context: Arc<Context>,
    pods: Arc<Informer>,
    /// Somebody needs the room at once.
    asked: mpsc::Receiver<oneshot::Sender<()>>,
    began: Instant,
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
    fn excess(self, limits: &ImageLimits) -> Option<u64> {
        let (capacity, available) = (u128::from(self.capacity), u128::from(self.available));
        let used_percent = 100 - (available * 100).checked_div(capacity)?.min(100);
        // At 100 percent there is nothing that could be too full.
        if used_percent < u128::from(limits.high_percent) || limits.high_percent == 100 {
            return None;
        }
        let wanted = capacity * u128::from(100 - limits.low_percent) / 100;
        u64::try_from(wanted.saturating_sub(available)).ok()
    }

    fn is_relaxed(self, limits: &ImageLimits) -> bool {
        u128::from(self.available) * 100 >= u128::from(self.capacity) * u128::from(100 - limits.low_percent)
    }
}

/// What may go, the one that was used longest ago first.
fn candidates(
    images: &[Image],
    in_use: &BTreeSet<String>,
    seen: &BTreeMap<String, Seen>,
    age_min: Duration,
    now: Instant,
) -> Vec<Image> {
    let mut candidates: Vec<(Seen, &Image)> = images
        .iter()
        .filter(|image| !image.pinned && !in_use.contains(&image.id))
        .filter_map(|image| Some((*seen.get(&image.id)?, image)))
        .filter(|(seen, _)| now.duration_since(seen.first) >= age_min)
        .collect();
    candidates.sort_by_key(|(seen, _)| (seen.used, seen.first));
    candidates.into_iter().map(|(_, image)| image.clone()).collect()
}

/// Which of `images` were not used for longer than `age_max`, once it has been watched for so long.
fn outlived(
    images: Vec<Image>,
    seen: &BTreeMap<String, Seen>,
    age_max: Option<Duration>,
    began: Instant,
    now: Instant,
) -> Vec<Image> {
    let Some(most) = age_max.filter(|most| now.duration_since(began) > *most) else { return vec![] };
    let unused = |image: &Image| {
        let last = seen.get(&image.id).map(|seen| seen.used.unwrap_or(seen.first));
        last.is_some_and(|last| now.duration_since(last) > most)
    };
    images.into_iter().filter(unused).collect()
}

impl ImageGc {
    pub fn new(
        context: Arc<Context>,
        pods: Arc<Informer>,
        asked: mpsc::Receiver<oneshot::Sender<()>>,
    ) -> ImageGc {
        ImageGc { context, pods, asked, began: Instant::now(), seen: BTreeMap::new(), failed: false }
    }

    fn limits(&self) -> ImageLimits {
        self.context.settings.images
    }

    pub async fn run(mut self, stop: CancellationToken) {
        // Before the pods are known, nothing is known to be in use.
        let pods = self.pods.clone();
        tokio::select! { () = pods.synced() => {}, () = stop.cancelled() => return }
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Some(_done) = self.asked.recv() => {
                    if let Err(why) = self.remove_unused().await {
                        tracing::warn!(error = why, "Unused images not removed");
                    }
                    continue;
                }
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
        self.remove_outlived(&images.0, &images.1).await;
        let excess = disk.excess(&self.limits());
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

    async fn remove(&mut self, image: &Image) -> Result<(), String> {
        self.context.images.service.remove(&image.id).await.map_err(|error| error.to_string())?;
        tracing::info!(image = image.id, tags = ?image.tags, bytes = image.size, "Removed an unused image");
        self.seen.remove(&image.id);
        Ok(())
    }

    /// Everything that may go, however much room there is.
    async fn remove_unused(&mut self) -> Result<(), String> {
        let (images, in_use) = self.look().await.map_err(|error| error.to_string())?;
        self.context.images.service.clean_up(true).await.map_err(|error| error.to_string())?;
        for image in candidates(&images, &in_use, &self.seen, self.limits().age_min, Instant::now()) {
            if let Err(why) = self.remove(&image).await {
                tracing::warn!(image = image.id, error = why, "Unused image not removed");
            }
        }
        Ok(())
    }

    /// What was not used for too long.
    async fn remove_outlived(&mut self, images: &[Image], in_use: &BTreeSet<String>) {
        let (limits, now) = (self.limits(), Instant::now());
        let unused = candidates(images, in_use, &self.seen, limits.age_min, now);
        for image in outlived(unused, &self.seen, limits.age_max, self.began, now) {
            if let Err(why) = self.remove(&image).await {
                tracing::warn!(image = image.id, error = why, "Old image not removed");
            }
        }
    }

    async fn free(&mut self, excess: u64, images: &[Image], in_use: &BTreeSet<String>) -> Result<(), String> {
        tracing::info!(bytes = excess, "The disk of the images is too full");
        let (mut freed, mut failures) = (0, Vec::new());
        let limits = self.limits();
        for image in candidates(images, in_use, &self.seen, limits.age_min, Instant::now()) {
            if freed >= excess || self.disk().is_ok_and(|disk| disk.is_relaxed(&limits)) {
                return Ok(());
            }
            match self.remove(&image).await {
                Ok(()) => freed += image.size,
                Err(why) => failures.push(why),
            }
        }
        if freed >= excess || self.disk().is_ok_and(|disk| disk.is_relaxed(&limits)) {
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
        assert_eq!(Disk { capacity, available }.excess(&ImageLimits::default()), want);
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
        let limits =
            |high_percent, low_percent| ImageLimits { high_percent, low_percent, ..ImageLimits::default() };
        let disk = Disk { capacity: 1000, available: 0 };
        assert_eq!((disk.excess(&limits(100, 80)), disk.excess(&limits(99, 50))), (None, Some(500)));
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
        let in_use = BTreeSet::from(["in-use".to_owned()]);
        let ids = |images: &[Image]| images.iter().map(|image| image.id.clone()).collect::<Vec<_>>();
        let found = candidates(&images, &in_use, &all, Duration::from_secs(120), at(1000));
        assert_eq!(ids(&found), ["never-used", "used-early", "used-late"]);
        let old = |most: u64, began: u64| {
            ids(&outlived(found.clone(), &all, Some(Duration::from_secs(most)), at(began), at(1000)))
        };
        assert_eq!(old(899, 0), ["never-used", "used-early"]);
        assert_eq!(old(900, 0), ["never-used"]);
        // Nobody has watched for so long.
        assert_eq!(old(600, 500), [""; 0]);
        assert_eq!(ids(&outlived(found.clone(), &all, None, at(0), at(1000))), [""; 0]);
    }
}
