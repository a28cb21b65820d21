//! How little may be left, as the kubelet's settings say it, and when it is time to act. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use minke_api::Quantity;
use minke_api::quantity::Format;
use minke_api::time::parse_go_duration;
use tokio::time::Instant;

/// What can run short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    Memory,
    /// What the pods together may still take of what is theirs.
    AllocatableMemory,
    NodeFs,
    NodeFsInodes,
    /// Images lie on the same file system as everything else.
    ImageFs,
    ImageFsInodes,
    Pids,
}

const NAMES: [(&str, Signal); 7] = [
    ("memory.available", Signal::Memory),
    ("allocatableMemory.available", Signal::AllocatableMemory),
    ("nodefs.available", Signal::NodeFs),
    ("nodefs.inodesFree", Signal::NodeFsInodes),
    ("imagefs.available", Signal::ImageFs),
    ("imagefs.inodesFree", Signal::ImageFsInodes),
    ("pid.available", Signal::Pids),
];

/// Signals that upstream knows and that say nothing of their own where images, containers and volumes lie together.
const WITHOUT_MEANING: [&str; 2] = ["containerfs.available", "containerfs.inodesFree"];

impl Signal {
    fn parse(name: &str) -> Result<Option<Signal>, String> {
        let known = NAMES.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal);
        match known {
            None if !WITHOUT_MEANING.contains(&name) => Err(format!("unsupported eviction signal {name}")),
            known => Ok(known),
        }
    }

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, signal)| *signal == self).map_or("", |(name, _)| name)
    }

    /// The node's condition.
    pub fn condition(self) -> &'static str {
        match self {
            Signal::Memory | Signal::AllocatableMemory => "MemoryPressure",
            Signal::NodeFs | Signal::NodeFsInodes | Signal::ImageFs | Signal::ImageFsInodes => "DiskPressure",
            Signal::Pids => "PIDPressure",
        }
    }

    /// What is to be won back, as messages name it.
    pub fn resource(self) -> Resource {
        match self {
            Signal::Memory | Signal::AllocatableMemory => Resource::Memory,
            Signal::NodeFs | Signal::ImageFs => Resource::Disk,
            Signal::NodeFsInodes | Signal::ImageFsInodes => Resource::Inodes,
            Signal::Pids => Resource::Pids,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Memory,
    Disk,
    Inodes,
    Pids,
}

impl Resource {
    pub fn name(self) -> &'static str {
        match self {
            Resource::Memory => "memory",
            Resource::Disk => "ephemeral-storage",
            Resource::Inodes => "inodes",
            Resource::Pids => "pids",
        }
    }

    /// So much of it, as messages write it.
    pub fn amount(self, n: u64) -> Quantity {
        let format = match self {
            Resource::Memory | Resource::Disk => Format::BinarySi,
            Resource::Inodes | Resource::Pids => Format::DecimalSi,
        };
        Quantity::new(i64::try_from(n).unwrap_or(i64::MAX), format)
    }
}

/// What is left of something, and what there is in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    pub available: u64,
    pub capacity: u64,
}

pub type Observed = BTreeMap<Signal, Left>;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Amount {
    Quantity(Quantity),
    /// A share of what there is in all: 0.1 for `10%`.
    Share(f32),
}

impl Amount {
    fn of(self, capacity: u64) -> Quantity {
        match self {
            Amount::Quantity(quantity) => quantity,
            Amount::Share(share) => Quantity::bytes((capacity as f64 * f64::from(share)) as i64),
        }
    }

    fn units(self, capacity: u64) -> u64 {
        u64::try_from(self.of(capacity).value()).unwrap_or(0)
    }
}

/// `10%` as a share; `None` when it is no percentage.
fn share(text: &str) -> Option<Result<f32, String>> {
    let number = text.strip_suffix('%')?;
    Some(number.parse::<f32>().map(|n| n / 100.0).map_err(|_| format!("invalid percentage {text:?}")))
}

fn quantity(text: &str) -> Result<Quantity, String> {
    Quantity::parse(text).map_err(|error| error.to_string())
}

/// Less than this, for at least so long, and the node helps itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Threshold {
    pub signal: Signal,
    least: Amount,
    /// Zero acts at once and ends pods at once.
    pub grace: Duration,
    /// Once it acts, so much more must be left before it is good.
    reclaim: Option<Amount>,
}

impl Threshold {
    /// `None` for a percentage that switches the threshold off.
    fn parse(name: &str, text: &str) -> Result<Option<Threshold>, String> {
        let signal = Signal::parse(name)?;
        let least = match share(text) {
            Some(_) if matches!(text, "0%" | "100%") => return Ok(None),
            Some(share) => match share? {
                share if share < 0.0 => {
                    return Err(format!("eviction percentage threshold {name} must be >= 0%: {text}"));
                }
                share if share > 1.0 => {
                    return Err(format!("eviction percentage threshold {name} must be <= 100%: {text}"));
                }
                share => Amount::Share(share),
            },
            None => match quantity(text)? {
                least if least.value() <= 0 => {
                    return Err(format!("eviction threshold {name} must be positive: {least}"));
                }
                least => Amount::Quantity(least),
            },
        };
        Ok(signal.map(|signal| Threshold { signal, least, grace: Duration::ZERO, reclaim: None }))
    }

    pub fn is_hard(&self) -> bool {
        self.grace.is_zero()
    }

    /// What must be left.
    pub fn least(&self, capacity: u64) -> Quantity {
        self.least.of(capacity)
    }

    /// Whether less is left; with `reclaimed`, whether less is left than must be won back.
    fn is_met(&self, observed: &Observed, reclaimed: bool) -> bool {
        let Some(left) = observed.get(&self.signal).filter(|left| left.capacity > 0) else { return false };
        let more = self.reclaim.filter(|_| reclaimed).map_or(0, |more| more.units(left.capacity));
        left.available < self.least.units(left.capacity).saturating_add(more)
    }
}

/// By signal.
pub type Statements = BTreeMap<String, String>;

/// The settings of evictions, as they are written and as they are meant.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    pub hard: Statements,
    pub soft: Statements,
    pub soft_grace: Statements,
    pub minimum_reclaim: Statements,
    /// Seconds that a pod gets at most to end when a soft threshold is what ends it.
    pub pod_grace_max: i64,
    /// How long a condition stays after its reason has gone.
    pub transition: Duration,
    pub thresholds: Vec<Threshold>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::on(u64::MAX)
    }
}

impl Limits {
    /// The defaults on a file system of `capacity` bytes: of a small one a tenth stays free, as upstream has it.
    pub fn on(capacity: u64) -> Limits {
        let mut hard: Statements =
            DEFAULT_HARD.map(|(signal, text)| (signal.to_owned(), text.to_owned())).into();
        if capacity < SMALL_DISK {
            hard.insert("nodefs.available".to_owned(), "10%".to_owned());
        }
        let none = Statements::new;
        Limits {
            thresholds: read(&hard, &none(), &none(), &none()).expect("the defaults are well-formed"),
            hard,
            soft: none(),
            soft_grace: none(),
            minimum_reclaim: none(),
            pod_grace_max: 0,
            transition: Duration::from_secs(300),
        }
    }
}

/// Upstream keeps percentages of the disk free, which a large disk of a workstation rarely has.
const DEFAULT_HARD: [(&str, &str); 4] = [
    ("memory.available", "100Mi"),
    ("nodefs.available", "1Gi"),
    ("nodefs.inodesFree", "1%"),
    ("pid.available", "1%"),
];

/// Bytes of a disk of which a tenth is less than what is kept free of larger ones.
const SMALL_DISK: u64 = 10 << 30;

impl Limits {
    /// Works the thresholds out of the statements.
    pub fn resolve(&mut self) -> Result<(), String> {
        self.thresholds = read(&self.hard, &self.soft, &self.soft_grace, &self.minimum_reclaim)?;
        Ok(())
    }

    /// What must be left of the node's own, and is therefore not for pods.
    pub fn kept(&self, signal: Signal, capacity: u64) -> u64 {
        let hard = self.thresholds.iter().filter(|t| t.is_hard() && t.signal == signal);
        hard.map(|threshold| threshold.least.units(capacity)).max().unwrap_or(0)
    }

    /// Pods together may not come closer to what is theirs than the node to its memory.
    pub fn watch_allocatable(&mut self) {
        let hard = self.thresholds.iter().filter(|t| t.is_hard() && t.signal == Signal::Memory);
        let more: Vec<Threshold> =
            hard.map(|t| Threshold { signal: Signal::AllocatableMemory, ..t.clone() }).collect();
        self.thresholds.extend(more);
    }

    /// Whether everything is good again, with what was to be won back.
    pub fn all_resolved(&self, observed: &Observed) -> bool {
        !self.thresholds.iter().any(|threshold| threshold.is_met(observed, true))
    }
}

fn read(
    hard: &Statements,
    soft: &Statements,
    grace: &Statements,
    reclaim: &Statements,
) -> Result<Vec<Threshold>, String> {
    let each = |statements: &Statements| -> Result<Vec<Threshold>, String> {
        let parsed: Result<Vec<_>, String> =
            statements.iter().map(|(signal, text)| Threshold::parse(signal, text)).collect();
        Ok(parsed?.into_iter().flatten().collect())
    };
    let mut all = each(hard)?;
    let graces = signals(grace, parse_go_duration)?;
    for mut threshold in each(soft)? {
        let name = threshold.signal.name();
        let grace = graces.get(&threshold.signal);
        threshold.grace = *grace.ok_or_else(|| {
            format!("grace period must be specified for the soft eviction threshold {name}")
        })?;
        all.push(threshold);
    }
    let reclaims = signals(reclaim, |text| match share(text) {
        Some(share) => match share? {
            share if share <= 0.0 => {
                Err(format!("eviction percentage minimum reclaim must be positive: {text}"))
            }
            share => Ok(Amount::Share(share)),
        },
        None => match quantity(text)? {
            more if more.value() < 0 => Err(format!("negative eviction minimum reclaim specified: {text}")),
            more => Ok(Amount::Quantity(more)),
        },
    })?;
    for threshold in &mut all {
        threshold.reclaim = reclaims.get(&threshold.signal).copied();
    }
    // Memory first: it kills at random when it is not given back in time.
    all.sort_by_key(|threshold| threshold.signal);
    Ok(all)
}

fn signals<T>(
    statements: &Statements,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<BTreeMap<Signal, T>, String> {
    let mut all = BTreeMap::new();
    for (name, text) in statements {
        let signal = Signal::parse(name)?;
        let value = parse(text).map_err(|why| format!("{name}: {why}"))?;
        all.extend(signal.map(|signal| (signal, value)));
    }
    Ok(all)
}

/// What is remembered from one look to the next.
#[derive(Debug, Default)]
pub struct History {
    /// By their places among the thresholds: since when they are met.
    since: BTreeMap<usize, Instant>,
    /// Those that acted and are not good again.
    unresolved: BTreeSet<usize>,
    /// When each condition had a reason for the last time.
    conditions: BTreeMap<&'static str, Instant>,
}

impl History {
    /// Notes what is left; the thresholds that it is time to act for, the most urgent first.
    pub fn note(&mut self, limits: &Limits, observed: &Observed, now: Instant) -> Vec<Threshold> {
        let all = &limits.thresholds;
        let met: BTreeSet<usize> =
            (0..all.len()).filter(|n| all[*n].is_met(observed, self.unresolved.contains(n))).collect();
        self.since.retain(|n, _| met.contains(n));
        for n in &met {
            self.since.entry(*n).or_insert(now);
            self.conditions.insert(all[*n].signal.condition(), now);
        }
        let due = self.since.iter().filter(|(n, since)| now.duration_since(**since) >= all[**n].grace);
        self.unresolved = due.map(|(n, _)| *n).collect();
        self.unresolved.iter().map(|n| all[*n].clone()).collect()
    }

    pub fn has(&self, condition: &str, transition: Duration, now: Instant) -> bool {
        self.conditions.get(condition).is_some_and(|at| now.duration_since(*at) < transition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statements(text: &str) -> Statements {
        let pairs = text.split_whitespace().map(|pair| pair.split_once('<').expect("a pair"));
        pairs.map(|(signal, value)| (signal.to_owned(), value.to_owned())).collect()
    }

    fn limits(hard: &str, soft: &str, grace: &str, reclaim: &str) -> Result<Limits, String> {
        let [hard, soft, soft_grace, minimum_reclaim] = [hard, soft, grace, reclaim].map(statements);
        let mut limits = Limits { hard, soft, soft_grace, minimum_reclaim, ..Limits::default() };
        limits.resolve()?;
        Ok(limits)
    }

    #[track_caller]
    fn met(threshold: &str, available: u64, capacity: u64, want: bool) {
        let limits = limits(threshold, "", "", "").expect("thresholds");
        let observed = NAMES.map(|(_, signal)| (signal, Left { available, capacity })).into();
        assert_eq!(limits.thresholds[0].is_met(&observed, false), want, "{threshold}");
    }

    #[test]
    fn thresholds_are_amounts_and_shares() {
        met("memory.available<1Ki", 1023, 4096, true);
        met("memory.available<1Ki", 1024, 4096, false);
        met("nodefs.available<10%", 99, 1000, true);
        met("nodefs.available<10%", 100, 1000, false);
        met("nodefs.inodesFree<2.5%", 24, 1000, true);
        met("pid.available<10%", 0, 0, false);
        let none = limits("memory.available<0% nodefs.available<100% containerfs.available<5%", "", "", "");
        assert_eq!(none.expect("thresholds").thresholds, []);
        assert_eq!(Limits::default().thresholds.len(), 4);
        let default = Limits::default();
        assert_eq!(default.kept(Signal::Memory, 1 << 40), 100 << 20);
        // A share is worked out as upstream does it, in single precision and cut off.
        assert_eq!(default.kept(Signal::NodeFsInodes, 1000), 9);
        assert_eq!(default.kept(Signal::ImageFs, 1000), 0);
        let kept = |capacity| Limits::on(capacity).kept(Signal::NodeFs, capacity);
        assert_eq!([400 << 20, 10 << 30, 1 << 40].map(kept), [40 << 20, 1 << 30, 1 << 30]);
    }

    #[track_caller]
    fn refused(hard: &str, soft: &str, grace: &str, reclaim: &str, want: &str) {
        assert_eq!(limits(hard, soft, grace, reclaim).map(|_| ()), Err(want.to_owned()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        refused("x.available<1", "", "", "", "unsupported eviction signal x.available");
        refused(
            "memory.available<-1",
            "",
            "",
            "",
            "eviction threshold memory.available must be positive: -1",
        );
        refused(
            "memory.available<101%",
            "",
            "",
            "",
            "eviction percentage threshold memory.available must be <= 100%: 101%",
        );
        refused("memory.available<x%", "", "", "", "invalid percentage \"x%\"");
        refused("memory.available<1Kk", "", "", "", "unable to parse quantity's suffix");
        refused(
            "",
            "nodefs.available<1Gi",
            "",
            "",
            "grace period must be specified for the soft eviction threshold nodefs.available",
        );
        refused("", "", "memory.available<1", "", "memory.available: missing unit in duration \"1\"");
        refused(
            "",
            "",
            "",
            "pid.available<0%",
            "pid.available: eviction percentage minimum reclaim must be positive: 0%",
        );
        refused("", "", "", "y<5%", "unsupported eviction signal y");
    }

    /// Seconds, what is left of 1000 bytes of memory, whether it is time to act, and whether there is pressure.
    type Step = (u64, u64, bool, bool);

    #[track_caller]
    fn watched(limits: &Limits, steps: &[Step]) {
        let (mut history, start) = (History::default(), Instant::now());
        for &(at, available, acts, pressed) in steps {
            let now = start + Duration::from_secs(at);
            let observed = [(Signal::Memory, Left { available, capacity: 1000 })].into();
            let due = history.note(limits, &observed, now);
            assert_eq!(!due.is_empty(), acts, "acts at {at}");
            assert_eq!(history.has("MemoryPressure", limits.transition, now), pressed, "pressure at {at}");
        }
    }

    #[test]
    fn a_hard_threshold_acts_at_once_and_leaves_the_condition_for_a_while() {
        let limits = limits("memory.available<100", "", "", "").expect("thresholds");
        watched(
            &limits,
            &[(0, 100, false, false), (10, 99, true, true), (20, 100, false, true), (309, 100, false, true)],
        );
        watched(&limits, &[(0, 99, true, true), (300, 100, false, false)]);
    }

    #[test]
    fn a_soft_threshold_has_patience() {
        let soft = limits("", "memory.available<100", "memory.available<30s", "").expect("thresholds");
        watched(&soft, &[(0, 50, false, true), (20, 50, false, true), (30, 50, true, true)]);
        // Good in between: it begins anew.
        watched(&soft, &[(0, 50, false, true), (20, 100, false, true), (30, 50, false, true)]);
    }

    #[test]
    fn more_must_be_won_back_than_was_missing() {
        let limits = limits("memory.available<100", "", "", "memory.available<5%").expect("thresholds");
        watched(
            &limits,
            &[(0, 149, false, false), (10, 99, true, true), (20, 149, true, true), (30, 150, false, true)],
        );
    }

    #[test]
    fn memory_comes_first_and_pods_are_watched_like_the_node() {
        let mut limits =
            limits("pid.available<1 imagefs.available<1 memory.available<7", "", "", "").expect("thresholds");
        limits.watch_allocatable();
        let observed = NAMES.map(|(_, signal)| (signal, Left { available: 0, capacity: 9 })).into();
        let due = History::default().note(&limits, &observed, Instant::now());
        let signals: Vec<Signal> = due.iter().map(|threshold| threshold.signal).collect();
        assert_eq!(signals[0], Signal::Memory);
        assert!(signals.contains(&Signal::AllocatableMemory) && signals.len() == 4, "{signals:?}");
        assert!(!limits.all_resolved(&observed));
        assert!(limits.all_resolved(&Observed::new()), "what nobody knows is not short");
    }
}
