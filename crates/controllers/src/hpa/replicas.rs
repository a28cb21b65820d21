//! How many replicas a metric asks for. Pure.
//!
//! Pods that are going, have failed or are not ready yet do not count as they are: they could be about to
//! use more or nothing. Each is taken for whatever makes the change smaller, and a change that this would
//! turn around is none. Upstream: pkg/controller/podautoscaler/replica_calculator.go.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use minke_api::Quantity;

use super::Settings;
use crate::context::Typed;
use crate::pods::{is_ready, phase};

/// What was measured of one pod.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PodMetric {
    /// Thousandths.
    pub value: i64,
    /// When the window ended, and how long it was.
    pub at: Timestamp,
    pub window: Duration,
}

/// By name of the pod.
pub(crate) type PodMetrics = BTreeMap<String, PodMetric>;

/// How far from its target a metric may be without being acted on, as a part of the target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Tolerances {
    pub down: f64,
    pub up: f64,
}

impl Tolerances {
    fn hold(self, ratio: f64) -> bool {
        1.0 - self.down <= ratio && ratio <= 1.0 + self.up
    }
}

/// What is the same for all metrics of a pass.
pub(crate) struct Facts<'a> {
    /// What the target's specification and its status say.
    pub spec_replicas: i32,
    pub status_replicas: i32,
    pub pods: &'a [Typed<Pod>],
    pub tolerances: Tolerances,
    pub settings: &'a Settings,
    pub now: Timestamp,
}

/// Replicas for a metric of pods against their requests.
#[derive(Debug, PartialEq)]
pub(crate) struct Utilization {
    pub replicas: i32,
    /// Percent of the requests.
    pub percent: i32,
    /// Thousandths, of one pod on average.
    pub raw: i64,
}

fn ceil(replicas: f64) -> i32 {
    replicas.ceil() as i32
}

/// Names of pods by what is known of them.
#[derive(Default)]
struct Groups<'a> {
    ready: usize,
    unready: Vec<&'a str>,
    missing: Vec<&'a str>,
    ignored: Vec<&'a str>,
}

/// Leaves the metrics of the pods that count, of which there must be some.
fn group<'a>(facts: &Facts<'a>, metrics: &mut PodMetrics, cpu: bool) -> Result<Groups<'a>, String> {
    if facts.pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".to_owned());
    }
    let mut groups = Groups::default();
    for pod in facts.pods {
        let name = pod.object.name();
        if pod.object.deleted().is_some() || phase(pod) == "Failed" {
            groups.ignored.push(name);
        } else if phase(pod) == "Pending" {
            groups.unready.push(name);
        } else if let Some(metric) = metrics.get(name) {
            match cpu && cpu_means_nothing_yet(pod, metric, facts.settings, facts.now) {
                true => groups.unready.push(name),
                false => groups.ready += 1,
            }
        } else {
            groups.missing.push(name);
        }
    }
    for name in groups.ignored.iter().chain(&groups.unready) {
        metrics.remove(*name);
    }
    if metrics.is_empty() {
        return Err("did not receive metrics for targeted pods (pods might be unready)".to_owned());
    }
    Ok(groups)
}

/// While a pod starts, it uses CPU that it will not use later.
fn cpu_means_nothing_yet(pod: &Pod, metric: &PodMetric, settings: &Settings, now: Timestamp) -> bool {
    let Some(status) = &pod.status else { return true };
    let condition = status.conditions.iter().flatten().find(|condition| condition.type_ == "Ready");
    let (Some(condition), Some(started)) = (condition, &status.start_time) else { return true };
    let changed = condition.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    let unready = condition.status == "False";
    if started.0 + settings.cpu_initialization > now {
        // Nor does what was measured before it was ready count.
        unready || metric.at < changed + metric.window
    } else {
        // A pod that became unready later is one that works, but badly.
        unready && started.0 + settings.initial_readiness > changed
    }
}

/// Replicas so that pods use `target` percent of what they request of a resource. `container` narrows it to
/// one of their containers.
pub(crate) fn for_utilization(
    facts: &Facts<'_>,
    mut metrics: PodMetrics,
    resource: &str,
    container: Option<&str>,
    target: i32,
) -> Result<Utilization, String> {
    let groups = group(facts, &mut metrics, resource == "cpu")?;
    let requests = requests(facts.pods, resource, container)?;
    let (ratio, percent, raw) = utilization(&metrics, &requests, target)?;
    let stay = Utilization { replicas: facts.spec_replicas, percent, raw };
    let up_with_unready = !groups.unready.is_empty() && ratio > 1.0;
    if !up_with_unready && groups.missing.is_empty() {
        return Ok(match facts.tolerances.hold(ratio) {
            true => stay,
            false => Utilization { replicas: ceil(ratio * groups.ready as f64), ..stay },
        });
    }
    let full = |name: &str| requests.get(name).copied().unwrap_or(0) * i64::from(target.max(100)) / 100;
    imagine(&mut metrics, &groups, ratio, facts.now, full);
    let (again, ..) = utilization(&metrics, &requests, target)?;
    Ok(Utilization { replicas: cautious(facts, ratio, again, metrics.len()), ..stay })
}

/// Replicas so that pods have `target` thousandths of a metric each, on average; and what they have now.
/// `resource` is empty for metrics that are no resource.
pub(crate) fn for_average(
    facts: &Facts<'_>,
    mut metrics: PodMetrics,
    resource: &str,
    target: i64,
) -> Result<(i32, i64), String> {
    let groups = group(facts, &mut metrics, resource == "cpu")?;
    let average = |metrics: &PodMetrics| {
        let sum = metrics.values().fold(0i64, |sum, metric| sum.saturating_add(metric.value));
        sum / metrics.len() as i64
    };
    let usage = average(&metrics);
    let ratio = usage as f64 / target as f64;
    let up_with_unready = !groups.unready.is_empty() && ratio > 1.0;
    if !up_with_unready && groups.missing.is_empty() {
        return Ok(match facts.tolerances.hold(ratio) {
            true => (facts.spec_replicas, usage),
            false => (ceil(ratio * groups.ready as f64), usage),
        });
    }
    imagine(&mut metrics, &groups, ratio, facts.now, |_| target);
    let again = average(&metrics) as f64 / target as f64;
    Ok((cautious(facts, ratio, again, metrics.len()), usage))
}

/// Adds what pods may use of whom nothing is known: all they are to use when the rest says down, nothing
/// when it says up.
fn imagine(
    metrics: &mut PodMetrics,
    groups: &Groups<'_>,
    ratio: f64,
    now: Timestamp,
    full: impl Fn(&str) -> i64,
) {
    let mut add = |name: &str, value| {
        metrics.insert(name.to_owned(), PodMetric { value, at: now, window: Duration::ZERO });
    };
    for name in &groups.missing {
        if ratio < 1.0 {
            add(name, full(name));
        } else if ratio > 1.0 {
            add(name, 0);
        }
    }
    if ratio > 1.0 {
        groups.unready.iter().for_each(|name| add(name, 0));
    }
}

/// The replicas for the ratio of `count` pods some of which are imagined; no change if that turned it around.
fn cautious(facts: &Facts<'_>, ratio: f64, again: f64, count: usize) -> i32 {
    let current = facts.spec_replicas;
    let turned = (ratio < 1.0 && again > 1.0) || (ratio > 1.0 && again < 1.0);
    if facts.tolerances.hold(again) || turned {
        return current;
    }
    let replicas = ceil(again * count as f64);
    let wrong_way = (again < 1.0 && replicas > current) || (again > 1.0 && replicas < current);
    if wrong_way { current } else { replicas }
}

/// `(use by target, percent of requests, average)` of the pods whose requests are known.
fn utilization(
    metrics: &PodMetrics,
    requests: &BTreeMap<&str, i64>,
    target: i32,
) -> Result<(f64, i32, i64), String> {
    let known =
        metrics.iter().filter_map(|(name, metric)| Some((metric.value, requests.get(name.as_str())?)));
    let (mut used, mut requested, mut count) = (0i64, 0i64, 0i64);
    for (value, request) in known {
        used = used.saturating_add(value);
        requested = requested.saturating_add(*request);
        count += 1;
    }
    if requested == 0 {
        return Err("no metrics returned matched known pods".to_owned());
    }
    let percent = i32::try_from(i128::from(used) * 100 / i128::from(requested)).unwrap_or(i32::MAX);
    Ok((f64::from(percent) / f64::from(target), percent, used / count))
}

/// Thousandths that each pod requests of a resource.
fn requests<'a>(
    pods: &'a [Typed<Pod>],
    resource: &str,
    container: Option<&str>,
) -> Result<BTreeMap<&'a str, i64>, String> {
    let milli = |quantity| Quantity::try_from(quantity).map(Quantity::milli_value).unwrap_or(0);
    let mut requests = BTreeMap::new();
    for pod in pods {
        let Some(spec) = &pod.spec else { continue };
        let of_pod = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        if let (None, Some(quantity)) = (container, of_pod.and_then(|requests| requests.get(resource))) {
            requests.insert(pod.object.name(), milli(quantity));
            continue;
        }
        let sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
        let running = spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(sidecar));
        let mut sum = 0i64;
        for c in running.filter(|c| container.is_none_or(|name| c.name == name)) {
            let of_container = c.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            let Some(quantity) = of_container.and_then(|requests| requests.get(resource)) else {
                let (container, pod) = (&c.name, pod.object.name());
                return Err(format!("missing request for {resource} in container {container} of Pod {pod}"));
            };
            sum = sum.saturating_add(milli(quantity));
        }
        requests.insert(pod.object.name(), sum);
    }
    Ok(requests)
}

/// Replicas for one value that all replicas share, at the moment `usage` of `target` thousandths.
pub(crate) fn for_value(facts: &Facts<'_>, usage: i64, target: i64) -> Result<i32, String> {
    let ratio = usage as f64 / target as f64;
    if facts.spec_replicas == 0 {
        return Ok(ceil(ratio));
    }
    if facts.tolerances.hold(ratio) {
        return Ok(facts.spec_replicas);
    }
    if facts.pods.is_empty() {
        return Err(
            "unable to calculate ready pods: no pods returned by selector while calculating replica count"
                .to_owned(),
        );
    }
    let ready = facts.pods.iter().filter(|pod| phase(pod) == "Running" && is_ready(pod)).count();
    Ok(ceil(ratio * ready as f64))
}

/// Replicas for a value of which each replica is to have `target` thousandths; and what each has.
pub(crate) fn for_value_each(facts: &Facts<'_>, usage: i64, target: i64) -> (i32, i64) {
    let current = facts.status_replicas;
    let ratio = usage as f64 / (target as f64 * f64::from(current));
    let replicas = if facts.tolerances.hold(ratio) { current } else { ceil(usage as f64 / target as f64) };
    (replicas, (usage as f64 / f64::from(current)).ceil() as i64)
}

#[cfg(test)]
mod tests {
    use super::super::DEFAULT;
    use super::*;
    use crate::pods::tests::{now, pod, time};
    use serde_json::{Value, json};

    /// Pods by name, with what they use in thousandths, or without a metric; each requests 1000m of cpu.
    /// Letters before the name: `u` not ready, `p` pending, `f` failed, `d` going.
    fn world(pods: &[(&str, Option<i64>)]) -> (Vec<Typed<Pod>>, PodMetrics) {
        let typed = pods.iter().map(|(name, _)| {
            pod(name, |p| {
                p["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "1", "memory": "1Ki"}});
                p["status"]["startTime"] = time(60).into();
                p["status"]["conditions"][0]["lastTransitionTime"] = time(50).into();
                match name.chars().next() {
                    Some('u') => p["status"]["conditions"][0]["status"] = "False".into(),
                    Some('p') => p["status"]["phase"] = "Pending".into(),
                    Some('f') => p["status"]["phase"] = "Failed".into(),
                    Some('d') => p["metadata"]["deletionTimestamp"] = time(1).into(),
                    _ => {}
                }
            })
        });
        let metric = |value| PodMetric { value, at: now(), window: Duration::from_secs(15) };
        let metrics = pods.iter().filter_map(|(name, value)| Some(((*name).to_owned(), metric((*value)?))));
        (typed.collect(), metrics.collect())
    }

    fn facts(pods: &[Typed<Pod>], replicas: i32) -> Facts<'_> {
        let tolerances = Tolerances { down: 0.1, up: 0.1 };
        let settings = &DEFAULT;
        Facts { spec_replicas: replicas, status_replicas: replicas, pods, tolerances, settings, now: now() }
    }

    #[track_caller]
    fn check(pods: &[(&str, Option<i64>)], replicas: i32, target: i32, want: Result<(i32, i32), &str>) {
        let (pods, metrics) = world(pods);
        let got = for_utilization(&facts(&pods, replicas), metrics, "cpu", None, target);
        assert_eq!(got.map(|u| (u.replicas, u.percent)), want.map_err(str::to_owned));
    }

    #[test]
    fn pods_are_to_use_their_share_of_what_they_request() {
        let all = |value: i64| [("a", Some(value)), ("b", Some(value)), ("c", Some(value))];
        check(&all(300), 3, 30, Ok((3, 30)));
        check(&all(500), 3, 30, Ok((5, 50)));
        check(&all(100), 3, 30, Ok((1, 10)));
        // Within a tenth of the target nothing changes.
        check(&all(330), 3, 30, Ok((3, 33)));
        check(&all(270), 3, 30, Ok((3, 27)));
        check(&all(340), 3, 30, Ok((4, 34)));
        check(&all(0), 3, 30, Ok((0, 0)));
        check(&[], 3, 30, Err("no pods returned by selector while calculating replica count"));
        check(
            &[("a", None)],
            1,
            30,
            Err("did not receive metrics for targeted pods (pods might be unready)"),
        );
    }

    #[test]
    fn what_is_not_known_makes_changes_smaller() {
        // A pod without a metric counts as idle on the way up, as busy on the way down.
        check(&[("a", Some(600)), ("b", Some(600)), ("m", None)], 3, 30, Ok((4, 60)));
        check(&[("a", Some(100)), ("b", Some(100)), ("m", None)], 3, 30, Ok((3, 10)));
        check(
            &[("a", Some(100)), ("b", Some(100)), ("c", Some(100)), ("d", None), ("m", None)],
            5,
            60,
            Ok((3, 10)),
        );
        // One that is not ready is idle on the way up and of no matter on the way down.
        check(&[("a", Some(900)), ("ua", Some(900))], 2, 30, Ok((3, 90)));
        check(&[("a", Some(900)), ("pa", None)], 2, 30, Ok((3, 90)));
        check(&[("a", Some(100)), ("ua", Some(900))], 2, 30, Ok((1, 10)));
        // What would turn the direction around is no change.
        check(&[("a", Some(400)), ("pa", None), ("pb", None)], 3, 30, Ok((3, 40)));
        // The failed and the going are as if they were not there.
        check(&[("a", Some(600)), ("fa", Some(1)), ("da", Some(1))], 1, 30, Ok((2, 60)));
        check(
            &[("ua", Some(1))],
            1,
            30,
            Err("did not receive metrics for targeted pods (pods might be unready)"),
        );
    }

    #[test]
    fn cpu_of_a_start_does_not_count() {
        #[track_caller]
        fn check(status: Value, window: u64, want: bool) {
            let pod = pod("a", |p| p["status"] = status);
            let metric = PodMetric { value: 1, at: now(), window: Duration::from_secs(window) };
            assert_eq!(cpu_means_nothing_yet(&pod, &metric, &DEFAULT, now()), want);
        }
        let status = |started: i64, ready: &str, since: i64| {
            json!({"phase": "Running", "startTime": time(started),
                   "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": time(since)}]})
        };
        check(status(60, "True", 50), 15, false);
        check(status(60, "True", 10), 15, true);
        check(status(60, "False", 60), 15, true);
        check(status(400, "True", 10), 15, false);
        check(status(400, "False", 10), 15, false);
        check(status(400, "False", 399), 15, true);
        check(json!({"phase": "Running"}), 15, true);
    }

    #[test]
    fn every_container_must_say_what_it_requests() {
        let (pods, metrics) = world(&[("a", Some(500))]);
        let got = for_utilization(&facts(&pods, 1), metrics.clone(), "gpu", None, 30);
        assert_eq!(got.unwrap_err(), "missing request for gpu in container c of Pod a");
        // Of one container alone.
        let got = for_utilization(&facts(&pods, 1), metrics.clone(), "cpu", Some("c"), 25);
        assert_eq!(got, Ok(Utilization { replicas: 2, percent: 50, raw: 500 }));
        let got = for_utilization(&facts(&pods, 1), metrics, "cpu", Some("other"), 25);
        assert_eq!(got.unwrap_err(), "no metrics returned matched known pods");
    }

    #[track_caller]
    fn check_average(pods: &[(&str, Option<i64>)], replicas: i32, target: i64, want: (i32, i64)) {
        let (pods, metrics) = world(pods);
        assert_eq!(for_average(&facts(&pods, replicas), metrics, "", target), Ok(want));
    }

    #[test]
    fn pods_are_to_have_their_part_of_a_metric() {
        check_average(&[("a", Some(20_000)), ("b", Some(10_000))], 2, 15_000, (2, 15_000));
        check_average(&[("a", Some(20_000)), ("b", Some(10_000))], 2, 10_000, (3, 15_000));
        check_average(&[("a", Some(10)), ("b", Some(10))], 2, 40, (1, 10));
        check_average(&[("a", Some(10)), ("m", None)], 2, 40, (2, 10));
        check_average(&[("a", Some(80)), ("m", None)], 2, 40, (2, 80));
        check_average(&[("a", Some(120)), ("pa", None)], 2, 40, (3, 120));
        // Readiness matters for CPU alone.
        check_average(&[("a", Some(80)), ("ua", Some(80))], 2, 40, (4, 80));
    }

    #[test]
    fn a_shared_value_is_divided() {
        let (pods, _) = world(&[("a", None), ("b", None), ("ua", None)]);
        assert_eq!(for_value(&facts(&pods, 3), 20_000, 10_000), Ok(4));
        assert_eq!(for_value(&facts(&pods, 3), 10_500, 10_000), Ok(3));
        assert_eq!(for_value(&facts(&[], 0), 25_000, 10_000), Ok(3));
        assert!(
            for_value(&facts(&[], 1), 25_000, 10_000)
                .unwrap_err()
                .starts_with("unable to calculate ready pods")
        );
        assert_eq!(for_value_each(&facts(&pods, 3), 50_000, 10_000), (5, 16_667));
        assert_eq!(for_value_each(&facts(&pods, 3), 31_000, 10_000), (3, 10_334));
    }
}
