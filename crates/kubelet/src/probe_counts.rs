//! How often probes ran, how they ended and how long they took, for `/metrics/probes`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

/// Pods whose probes are counted; those that have been silent for longest are forgotten beyond this.
const PODS_MAX: usize = 1024;

/// Upper bounds of the buckets of durations, in seconds: the field's defaults.
pub const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

pub const RESULTS: [&str; 3] = ["successful", "failed", "unknown"];

/// A pod's uid, namespace and name.
pub type PodId = (String, String, String);

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Count {
    /// In the order of [`RESULTS`].
    pub results: [u64; 3],
    /// Not cumulative; the last one is of those beyond all bounds.
    pub buckets: [u64; BOUNDS.len() + 1],
    pub seconds: f64,
}

#[derive(Debug, Default)]
pub struct ProbeCounts(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    pods: BTreeMap<PodId, OfPod>,
    probes: u64,
}

#[derive(Debug, Default)]
struct OfPod {
    /// When it was last probed, as a count of all probes.
    last: u64,
    /// By container and type of probe.
    counts: BTreeMap<(String, &'static str), Count>,
}

impl ProbeCounts {
    /// `ok` is none when the probe itself did not work.
    pub fn note(&self, pod: &PodId, container: &str, kind: &'static str, ok: Option<bool>, took: Duration) {
        let mut counts = self.0.lock().expect("nothing panics while counting");
        counts.probes += 1;
        let turn = counts.probes;
        if !counts.pods.contains_key(pod) {
            if counts.pods.len() >= PODS_MAX {
                let oldest =
                    counts.pods.iter().min_by_key(|(_, of_pod)| of_pod.last).map(|(pod, _)| pod.clone());
                oldest.map(|pod| counts.pods.remove(&pod));
            }
            counts.pods.insert(pod.clone(), Default::default());
        }
        let Some(of_pod) = counts.pods.get_mut(pod) else { return };
        of_pod.last = turn;
        let count = of_pod.counts.entry((container.to_owned(), kind)).or_default();
        let result = match ok {
            Some(true) => 0,
            Some(false) => 1,
            None => 2,
        };
        count.results[result] += 1;
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        count.buckets[bucket] += 1;
        count.seconds += seconds;
    }

    /// Calls `each` with pod, container and type of probe, of the pods that `is_here`; forgets the others.
    pub fn each(&self, is_here: impl Fn(&PodId) -> bool, mut each: impl FnMut(&PodId, &str, &str, &Count)) {
        let mut counts = self.0.lock().expect("nothing panics while counting");
        counts.pods.retain(|pod, _| is_here(pod));
        for (pod, of_pod) in &counts.pods {
            for ((container, kind), count) in &of_pod.counts {
                each(pod, container, kind, count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(n: usize) -> PodId {
        (format!("uid-{n}"), "ns".to_owned(), format!("p{n}"))
    }

    #[test]
    fn probes_are_counted_by_result_and_time() {
        let counts = ProbeCounts::default();
        counts.note(&pod(1), "c", "Liveness", Some(true), Duration::from_millis(5));
        counts.note(&pod(1), "c", "Liveness", Some(false), Duration::from_secs(60));
        counts.note(&pod(2), "c", "Readiness", None, Duration::from_millis(20));
        let mut seen = vec![];
        counts.each(
            |pod| pod.0 == "uid-1",
            |pod, _, kind, count| seen.push((pod.2.clone(), kind.to_owned(), count.clone())),
        );
        assert_eq!(seen.len(), 1);
        let (_, _, count) = &seen[0];
        assert_eq!((count.results, count.buckets[0], count.buckets[11]), ([1, 1, 0], 1, 1));
        counts.each(|_| true, |pod, _, _, _| assert_eq!(pod.0, "uid-1", "the other one was forgotten"));
    }

    #[test]
    fn pods_that_are_no_longer_probed_are_forgotten() {
        let counts = ProbeCounts::default();
        for n in 0..=PODS_MAX {
            counts.note(&pod(n), "c", "Liveness", Some(true), Duration::ZERO);
        }
        let mut pods = 0;
        counts.each(
            |_| true,
            |pod, _, _, _| {
                pods += 1;
                assert_ne!(pod.0, "uid-0");
            },
        );
        assert_eq!(pods, PODS_MAX);
    }
}
