//! What pods and the node use, read when somebody asks, and how fast they use CPU.
//!
//! A cgroup counts the CPU time ever used; a rate is the difference of two readings. Nothing samples while
//! nobody asks: each asking is a reading, and the one before it is where the window begins, as long as that
//! is not too long ago. Who asks for the first time in a while waits for a second reading, for
//! [`SHORTEST`]. So a window is the time between two askings, at least [`SHORTEST`] and at most [`LONGEST`];
//! askings that crowd share windows of [`STEP`] and more.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use minke_runtime::{ContainerState, ContainerStatus, Runtime, SandboxSpec, SandboxState, Stats};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::machine;

/// The window of somebody who asks for the first time, and the age up to which a reading is as good as new.
const SHORTEST: Duration = Duration::from_secs(1);
/// Readings are kept this far apart, however often somebody asks.
const STEP: Duration = Duration::from_secs(5);
/// What was read longer ago says nothing about now.
const LONGEST: Duration = Duration::from_secs(60);

/// CPU over a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Billionths of a core.
    pub nano_cores: u64,
    pub window: Duration,
}

/// What something used at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    pub at: Timestamp,
    pub stats: Stats,
    /// None when nothing was read early enough before.
    pub rate: Option<Rate>,
    read: Instant,
}

#[derive(Debug, Clone)]
pub struct ContainerUse {
    pub status: ContainerStatus,
    pub used: Use,
}

#[derive(Debug, Clone)]
pub struct PodUse {
    pub spec: SandboxSpec,
    pub created_at: Timestamp,
    pub used: Use,
    /// Those that run.
    pub containers: Vec<ContainerUse>,
}

/// One reading of everything on the node.
#[derive(Debug, Clone)]
pub struct Reading {
    pub node: Use,
    /// Of `node`: memory that is there at all, in bytes.
    pub memory_total: u64,
    /// All pods together; none while there never was one.
    pub all_pods: Option<Use>,
    pub pods: Vec<PodUse>,
}

impl Reading {
    fn every(&mut self) -> impl Iterator<Item = (&str, &mut Use)> {
        let pods = self.pods.iter_mut().flat_map(|pod| {
            let own = (pod.spec.id.as_str(), &mut pod.used);
            let containers = pod.containers.iter_mut().map(|c| (c.status.id.as_str(), &mut c.used));
            std::iter::once(own).chain(containers)
        });
        let all = self.all_pods.iter_mut().map(|used| ("kubepods", used));
        std::iter::once(("", &mut self.node)).chain(all).chain(pods)
    }
}

/// A count of CPU time at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Point {
    at: Instant,
    cpu_ns: u64,
}

/// The readings of one cgroup that windows begin at: at most two, the older first.
#[derive(Debug, Default)]
struct Track {
    older: Option<Point>,
    newer: Option<Point>,
}

impl Track {
    /// Takes a reading; tells the rate since an earlier one.
    fn take(&mut self, now: Point) -> Option<Rate> {
        let age = |point: &Point| now.at.duration_since(point.at);
        for kept in [&mut self.older, &mut self.newer] {
            // A count that went down is that of another cgroup of the same name.
            *kept = kept.filter(|point| age(point) <= LONGEST && point.cpu_ns <= now.cpu_ns);
        }
        let since = |least: Duration| move |point: &Point| now.at.duration_since(point.at) >= least;
        let base = self.newer.filter(since(STEP)).or(self.older).or(self.newer).filter(since(SHORTEST));
        if self.newer.is_none_or(|newer| age(&newer) >= STEP) {
            self.older = self.newer.replace(now);
        }
        let base = base?;
        let window = age(&base);
        let nano_cores = u128::from(now.cpu_ns - base.cpu_ns) * 1_000_000_000 / window.as_nanos().max(1);
        Some(Rate { nano_cores: u64::try_from(nano_cores).unwrap_or(u64::MAX), window })
    }
}

/// Reads cgroups for those who ask. Who asks while somebody else's reading goes on waits for it and shares it.
pub struct Meter {
    runtime: Arc<dyn Runtime>,
    /// The cgroup of all pods.
    pods_cgroup: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tracks: HashMap<String, Track>,
    last: Option<(Instant, Arc<Reading>)>,
}

impl Meter {
    pub fn new(runtime: Arc<dyn Runtime>, cgroup_root: &str) -> Meter {
        Meter { runtime, pods_cgroup: crate::resources::pods_cgroup(cgroup_root), state: Mutex::default() }
    }

    /// What everything has used up to now; rates may be missing.
    pub async fn read(&self) -> Arc<Reading> {
        self.state.lock().await.read(self).await
    }

    /// As [`Meter::read`], with rates; takes [`SHORTEST`] when nobody has asked for a while.
    pub async fn rates(&self) -> Arc<Reading> {
        let mut state = self.state.lock().await;
        let mut reading = state.read(self).await;
        let mut known = (*reading).clone();
        if known.every().any(|(_, used)| used.rate.is_none()) {
            tokio::time::sleep(SHORTEST).await;
            reading = state.read(self).await;
        }
        reading
    }

    async fn take(&self) -> Reading {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (node, memory_total) = node(&text("/proc/stat"), &text("/proc/meminfo"));
        let mut pods = Vec::new();
        for sandbox in self.runtime.list().await.unwrap_or_default() {
            if sandbox.state != SandboxState::Ready {
                continue;
            }
            // What is gone by the time it is looked at is left out.
            let Ok(stats) = self.runtime.sandbox_stats(&sandbox.spec.id).await else { continue };
            let used = Use::now(stats);
            let mut containers = Vec::new();
            for status in sandbox.containers.into_iter().filter(|c| c.state == ContainerState::Running) {
                if let Ok(stats) = self.runtime.container_stats(&status.id).await {
                    containers.push(ContainerUse { status, used: Use::now(stats) });
                }
            }
            pods.push(PodUse { spec: sandbox.spec, created_at: sandbox.created_at, used, containers });
        }
        let all_pods = self.runtime.cgroup_stats(&self.pods_cgroup).await.ok().map(Use::now);
        Reading { node: Use::now(node), memory_total, all_pods, pods }
    }
}

impl State {
    async fn read(&mut self, meter: &Meter) -> Arc<Reading> {
        if let Some((at, reading)) = &self.last
            && at.elapsed() < SHORTEST
        {
            return reading.clone();
        }
        let mut reading = meter.take().await;
        let mut seen = HashSet::new();
        for (id, used) in reading.every() {
            seen.insert(id.to_owned());
            let point = Point { at: used.read, cpu_ns: used.stats.cpu_ns };
            let rate = match self.tracks.get_mut(id) {
                Some(track) => track.take(point),
                None => self.tracks.entry(id.to_owned()).or_default().take(point),
            };
            used.rate = rate;
        }
        self.tracks.retain(|id, _| seen.contains(id));
        let reading = Arc::new(reading);
        self.last = Some((Instant::now(), reading.clone()));
        reading
    }
}

impl Use {
    fn now(stats: Stats) -> Use {
        Use { at: Timestamp::now(), stats, rate: None, read: Instant::now() }
    }
}

/// The whole machine, as `/proc/stat` and `/proc/meminfo` tell it on every layout of cgroups, and its memory.
fn node(stat: &str, meminfo: &str) -> (Stats, u64) {
    /// The kernel tells all programs times in hundredths of a second, whatever it counts in itself.
    const TICK_NS: u64 = 10_000_000;
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cpu "))
        .map(|rest| rest.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect())
        .unwrap_or_default();
    // user nice system idle iowait irq softirq steal; guests' time is in user's.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|at| fields.get(*at)).sum();
    let of = |name: &str| machine::meminfo(meminfo, name);
    let total = of("MemTotal");
    let usage = total.saturating_sub(of("MemFree"));
    let stats = Stats {
        cpu_ns: busy.saturating_mul(TICK_NS),
        memory_usage: usage,
        memory_working_set: usage.saturating_sub(of("Inactive(file)")),
        memory_rss: of("AnonPages"),
        memory_cache: of("Cached"),
        ..Stats::default()
    };
    (stats, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Askings at these milliseconds of something that uses half a core, and the windows told, in
    /// milliseconds; 0 for none.
    #[track_caller]
    fn check(askings: &[u64], windows: &[u128]) {
        let start = Instant::now();
        let mut track = Track::default();
        let got: Vec<u128> = askings
            .iter()
            .map(|ms| {
                let at = start + Duration::from_millis(*ms);
                let rate = track.take(Point { at, cpu_ns: ms * 1_000_000 / 2 });
                assert!(rate.is_none_or(|rate| rate.nano_cores == 500_000_000), "{rate:?}");
                rate.map_or(0, |rate| rate.window.as_millis())
            })
            .collect();
        assert_eq!(got, windows);
    }

    #[tokio::test]
    async fn a_window_begins_at_the_asking_before() {
        check(&[0], &[0]);
        check(&[0, 1_000], &[0, 1_000]);
        check(&[0, 15_000, 30_000], &[0, 15_000, 15_000]);
        // Too close together, and too far apart.
        check(&[0, 500], &[0, 0]);
        check(&[0, 60_000, 120_001], &[0, 60_000, 0]);
        check(&[0, 120_000, 121_000], &[0, 0, 1_000]);
    }

    #[tokio::test]
    async fn askings_that_crowd_share_windows() {
        check(
            &[0, 1_000, 4_000, 5_000, 6_000, 9_000, 10_000, 11_000],
            &[0, 1_000, 4_000, 5_000, 6_000, 9_000, 5_000, 6_000],
        );
    }

    #[tokio::test]
    async fn another_cgroup_of_the_same_name_begins_anew() {
        let start = Instant::now();
        let mut track = Track::default();
        track.take(Point { at: start, cpu_ns: 1_000 });
        assert_eq!(track.take(Point { at: start + STEP, cpu_ns: 10 }), None);
        let rate = track.take(Point { at: start + 2 * STEP, cpu_ns: 10 + 5_000_000_000 });
        assert_eq!(rate, Some(Rate { nano_cores: 1_000_000_000, window: STEP }));
    }

    #[test]
    fn the_node_is_read_from_proc() {
        let meminfo =
            "MemTotal: 1000 kB\nMemFree: 300 kB\nCached: 200 kB\nInactive(file): 150 kB\nAnonPages: 50 kB\n";
        let (stats, total) = node("cpu  10 2 3 1000 50 1 1 9 0 0\ncpu0 1 1 1\n", meminfo);
        assert_eq!(stats.cpu_ns, 170_000_000);
        assert_eq!(total, 1_024_000);
        assert_eq!(stats.memory_working_set, 550 * 1024);
        assert_eq!((stats.memory_rss, stats.memory_cache), (50 * 1024, 200 * 1024));
    }
}
