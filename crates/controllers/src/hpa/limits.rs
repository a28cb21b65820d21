//! How far and how fast the wanted number of replicas may be followed: bounds, stabilisation windows and
//! rates. Pure but for the memory that is handed in.
//!
//! Upstream: pkg/controller/podautoscaler/horizontal.go, from `normalizeDesiredReplicas` on.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior};

/// Replicas that may always be reached at once, and the factor that may always be grown by, without rules.
const UP_MINIMUM: i32 = 4;
const UP_FACTOR: i32 = 2;

/// A condition of an autoscaler, but for its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    pub kind: &'static str,
    pub status: bool,
    pub reason: &'static str,
    pub message: String,
}

impl Condition {
    pub fn new(kind: &'static str, status: bool, reason: &'static str, message: impl Into<String>) -> Self {
        Condition { kind, status, reason, message: message.into() }
    }
}

/// What an autoscaler has recommended and done lately.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Memory {
    recommendations: Vec<(Timestamp, i32)>,
    /// Replicas added and taken away, and when.
    ups: Vec<(Timestamp, i32)>,
    downs: Vec<(Timestamp, i32)>,
}

/// The state of a target and the bounds of its autoscaler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub current: i32,
    pub min: i32,
    pub max: i32,
    /// Seconds for which a higher recommendation holds off scaling down, unless the autoscaler says otherwise.
    pub down_window: i32,
}

impl Memory {
    /// What is there when an autoscaler is seen first counts as recommended.
    pub fn begin(&mut self, current: i32, now: Timestamp) {
        if self.recommendations.is_empty() {
            self.recommendations.push((now, current));
        }
    }

    /// Remembers that the target was scaled, as far as the rules will ask.
    pub fn scaled(
        &mut self,
        behavior: Option<&HorizontalPodAutoscalerBehavior>,
        from: i32,
        to: i32,
        now: Timestamp,
    ) {
        let Some(behavior) = behavior else { return };
        let rules = Rules::of(behavior, 0);
        let note = |events: &mut Vec<(Timestamp, i32)>, policies: &[HPAScalingPolicy], change: i32| {
            let longest = policies.iter().map(|policy| policy.period_seconds).max().unwrap_or(0);
            events.retain(|(at, _)| *at >= ago(now, longest));
            events.push((now, change));
        };
        if to > from {
            note(&mut self.ups, &rules.up.policies, to - from);
        } else if to < from {
            note(&mut self.downs, &rules.down.policies, from - to);
        }
    }

    fn recommend(&mut self, replicas: i32, now: Timestamp, longest_window: i32) {
        self.recommendations.retain(|(at, _)| *at >= ago(now, longest_window));
        self.recommendations.push((now, replicas));
    }

    fn since(&self, window: i32, now: Timestamp) -> impl Iterator<Item = i32> {
        let from = ago(now, window);
        self.recommendations.iter().filter(move |(at, _)| *at > from).map(|(_, replicas)| *replicas)
    }
}

fn ago(now: Timestamp, seconds: i32) -> Timestamp {
    now - Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// Rules with upstream's defaults for what is not said.
struct Rules {
    up: Direction,
    down: Direction,
}

struct Direction {
    window: i32,
    policies: Vec<HPAScalingPolicy>,
    /// `Max`, `Min` or `Disabled`.
    select: String,
}

impl Rules {
    fn of(behavior: &HorizontalPodAutoscalerBehavior, down_window: i32) -> Rules {
        let policy =
            |kind: &str, value| HPAScalingPolicy { type_: kind.to_owned(), value, period_seconds: 15 };
        let direction =
            |rules: Option<&HPAScalingRules>, window: i32, policies: Vec<HPAScalingPolicy>| Direction {
                window: rules.and_then(|rules| rules.stabilization_window_seconds).unwrap_or(window),
                policies: rules
                    .and_then(|rules| rules.policies.clone())
                    .filter(|p| !p.is_empty())
                    .unwrap_or(policies),
                select: rules
                    .and_then(|rules| rules.select_policy.clone())
                    .unwrap_or_else(|| "Max".to_owned()),
            };
        Rules {
            up: direction(behavior.scale_up.as_ref(), 0, vec![policy("Pods", 4), policy("Percent", 100)]),
            down: direction(behavior.scale_down.as_ref(), down_window, vec![policy("Percent", 100)]),
        }
    }
}

const ABLE: &str = "AbleToScale";
const LIMITED: &str = "ScalingLimited";

/// The replicas to have now when `wanted` are wanted, and the conditions that say why.
pub(crate) fn follow(
    wanted: i32,
    bounds: Bounds,
    behavior: Option<&HorizontalPodAutoscalerBehavior>,
    memory: &mut Memory,
    now: Timestamp,
) -> (i32, [Condition; 2]) {
    let ((stable, stabilized), (allowed, reason, message)) = match behavior {
        None => {
            let stable = memory.since(bounds.down_window, now).chain([wanted]).max().unwrap_or(wanted);
            memory.recommend(wanted, now, bounds.down_window);
            ((stable, DOWN_STABILIZED), within_bounds(stable, bounds))
        }
        Some(behavior) => {
            let rules = Rules::of(behavior, bounds.down_window);
            let stabilized = if wanted >= bounds.current { UP_STABILIZED } else { DOWN_STABILIZED };
            let stable = stabilize(wanted, bounds.current, &rules, memory, now);
            ((stable, stabilized), within_rates(stable, bounds, &rules, memory, now))
        }
    };
    let able = match stable == wanted {
        true => Condition::new(ABLE, true, "ReadyForNewScale", "recommended size matches current size"),
        false => Condition::new(ABLE, true, stabilized.0, stabilized.1),
    };
    (allowed, [able, Condition::new(LIMITED, allowed != stable, reason, message)])
}

const UP_STABILIZED: (&str, &str) = (
    "ScaleUpStabilized",
    "recent recommendations were lower than current one, applying the lowest recent recommendation",
);
const DOWN_STABILIZED: (&str, &str) = (
    "ScaleDownStabilized",
    "recent recommendations were higher than current one, applying the highest recent recommendation",
);

/// Moves no further than every recommendation of the window agrees with.
fn stabilize(wanted: i32, current: i32, rules: &Rules, memory: &mut Memory, now: Timestamp) -> i32 {
    let up = memory.since(rules.up.window, now).chain([wanted]).min().unwrap_or(wanted);
    let down = memory.since(rules.down.window, now).chain([wanted]).max().unwrap_or(wanted);
    memory.recommend(wanted, now, rules.up.window.max(rules.down.window));
    current.max(up).min(down)
}

type Verdict = (i32, &'static str, &'static str);

const FREE: (&str, &str) = ("DesiredWithinRange", "the desired count is within the acceptable range");
const TOO_FEW: (&str, &str) =
    ("TooFewReplicas", "the desired replica count is less than the minimum replica count");
const TOO_MANY: (&str, &str) =
    ("TooManyReplicas", "the desired replica count is more than the maximum replica count");
const UP_LIMIT: (&str, &str) =
    ("ScaleUpLimit", "the desired replica count is increasing faster than the maximum scale rate");
const DOWN_LIMIT: (&str, &str) =
    ("ScaleDownLimit", "the desired replica count is decreasing faster than the maximum scale rate");

fn verdict(replicas: i32, why: (&'static str, &'static str)) -> Verdict {
    (replicas, why.0, why.1)
}

fn within_bounds(wanted: i32, bounds: Bounds) -> Verdict {
    let fast = bounds.current.saturating_mul(UP_FACTOR).max(UP_MINIMUM);
    let (most, why) = if bounds.max > fast { (fast, UP_LIMIT) } else { (bounds.max, TOO_MANY) };
    match () {
        () if wanted < bounds.min => verdict(bounds.min, TOO_FEW),
        () if wanted > most => verdict(most, why),
        () => verdict(wanted, FREE),
    }
}

fn within_rates(wanted: i32, bounds: Bounds, rules: &Rules, memory: &Memory, now: Timestamp) -> Verdict {
    let current = bounds.current;
    if wanted > current {
        let fast = rate_limit(&rules.up, true, current, memory, now).max(current);
        let (most, why) = if bounds.max > fast { (fast, UP_LIMIT) } else { (bounds.max, TOO_MANY) };
        if wanted > most {
            return verdict(most, why);
        }
    } else if wanted < current {
        let fast = rate_limit(&rules.down, false, current, memory, now).min(current);
        let (least, why) = if bounds.min < fast { (fast, DOWN_LIMIT) } else { (bounds.min, TOO_FEW) };
        if wanted < least {
            return verdict(least, why);
        }
    }
    verdict(wanted, FREE)
}

/// As far as the policies of a direction let go, from what there was at the beginning of their periods.
fn rate_limit(rules: &Direction, up: bool, current: i32, memory: &Memory, now: Timestamp) -> i32 {
    if rules.select == "Disabled" {
        return current;
    }
    let changed = |events: &[(Timestamp, i32)], period: i32| -> i32 {
        events.iter().filter(|(at, _)| *at > ago(now, period)).map(|(_, change)| *change).sum()
    };
    let limits = rules.policies.iter().map(|policy| {
        let period = policy.period_seconds;
        let start = current - changed(&memory.ups, period) + changed(&memory.downs, period);
        let part = f64::from(policy.value) / 100.0;
        match (policy.type_ == "Pods", up) {
            (true, true) => start.saturating_add(policy.value),
            (true, false) => start.saturating_sub(policy.value),
            (false, true) => (f64::from(start) * (1.0 + part)).ceil() as i32,
            (false, false) => (f64::from(start) * (1.0 - part)) as i32,
        }
    });
    // The policy that changes most is the highest limit on the way up, the lowest on the way down.
    let highest = (rules.select == "Min") != up;
    let limit = if highest { limits.max() } else { limits.min() };
    limit.unwrap_or(current)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::now;
    use serde_json::{Value, json};

    fn behavior(value: Value) -> HorizontalPodAutoscalerBehavior {
        serde_json::from_value(value).expect("a behavior")
    }

    fn at(seconds_ago: i32) -> Timestamp {
        ago(now(), seconds_ago)
    }

    /// `want` is the replicas, the reason of AbleToScale, and that of ScalingLimited with `!` if it is true.
    #[track_caller]
    fn check(
        (wanted, current): (i32, i32),
        rules: Option<Value>,
        mut memory: Memory,
        want: (i32, &str, &str),
    ) {
        let bounds = Bounds { current, min: 2, max: 20, down_window: 300 };
        let rules = rules.map(behavior);
        let (replicas, [able, limited]) = follow(wanted, bounds, rules.as_ref(), &mut memory, now());
        let why = format!("{}{}", if limited.status { "!" } else { "" }, limited.reason);
        assert_eq!((replicas, able.reason, why.as_str()), want);
        assert_eq!(memory.recommendations.last(), Some(&(now(), wanted)), "it is remembered");
    }

    fn recommended(recommendations: &[(i32, i32)]) -> Memory {
        let recommendations = recommendations.iter().map(|(ago, replicas)| (at(*ago), *replicas)).collect();
        Memory { recommendations, ..Memory::default() }
    }

    #[test]
    fn without_rules_growth_is_doubling_and_shrinking_waits() {
        let fresh = Memory::default;
        check((4, 4), None, fresh(), (4, "ReadyForNewScale", "DesiredWithinRange"));
        check((7, 4), None, fresh(), (7, "ReadyForNewScale", "DesiredWithinRange"));
        check((9, 4), None, fresh(), (8, "ReadyForNewScale", "!ScaleUpLimit"));
        check((9, 1), None, fresh(), (4, "ReadyForNewScale", "!ScaleUpLimit"));
        check((30, 12), None, fresh(), (20, "ReadyForNewScale", "!TooManyReplicas"));
        check((1, 4), None, fresh(), (2, "ReadyForNewScale", "!TooFewReplicas"));
        check((3, 8), None, recommended(&[(299, 6)]), (6, "ScaleDownStabilized", "DesiredWithinRange"));
        check((3, 8), None, recommended(&[(301, 6)]), (3, "ReadyForNewScale", "DesiredWithinRange"));
        check((9, 8), None, recommended(&[(10, 3)]), (9, "ReadyForNewScale", "DesiredWithinRange"));
    }

    #[test]
    fn windows_hold_back_what_was_not_wanted_throughout() {
        let rules = |up: i32, down: i32| {
            Some(
                json!({"scaleUp": {"stabilizationWindowSeconds": up}, "scaleDown": {"stabilizationWindowSeconds": down}}),
            )
        };
        check((3, 8), rules(0, 0), recommended(&[(10, 6)]), (3, "ReadyForNewScale", "DesiredWithinRange"));
        check(
            (3, 8),
            rules(0, 60),
            recommended(&[(10, 6)]),
            (6, "ScaleDownStabilized", "DesiredWithinRange"),
        );
        check(
            (3, 8),
            rules(0, 60),
            recommended(&[(10, 12)]),
            (8, "ScaleDownStabilized", "DesiredWithinRange"),
        );
        check((12, 8), rules(60, 0), recommended(&[(10, 9)]), (9, "ScaleUpStabilized", "DesiredWithinRange"));
        check((12, 8), rules(60, 0), recommended(&[(10, 5)]), (8, "ScaleUpStabilized", "DesiredWithinRange"));
        check((12, 8), rules(60, 0), recommended(&[(61, 5)]), (12, "ReadyForNewScale", "DesiredWithinRange"));
        // Down waits for five minutes where nothing is said.
        check(
            (3, 8),
            Some(json!({"scaleUp": {}})),
            recommended(&[(200, 8)]),
            (8, "ScaleDownStabilized", "DesiredWithinRange"),
        );
    }

    #[test]
    fn policies_bound_the_change_in_their_period() {
        let policies = |direction: &str, select: &str, policies: &[(&str, i32, i32)]| {
            let policies: Vec<Value> = policies
                .iter()
                .map(|(kind, value, period)| json!({"type": kind, "value": value, "periodSeconds": period}))
                .collect();
            Some(
                json!({direction: {"selectPolicy": select, "stabilizationWindowSeconds": 0, "policies": policies}}),
            )
        };
        let fresh = Memory::default;
        let both = [("Pods", 1, 60), ("Percent", 50, 60)];
        check((20, 4), policies("scaleUp", "Max", &both), fresh(), (6, "ReadyForNewScale", "!ScaleUpLimit"));
        check((20, 4), policies("scaleUp", "Min", &both), fresh(), (5, "ReadyForNewScale", "!ScaleUpLimit"));
        check(
            (20, 4),
            policies("scaleUp", "Disabled", &both),
            fresh(),
            (4, "ReadyForNewScale", "!ScaleUpLimit"),
        );
        check(
            (2, 10),
            policies("scaleDown", "Max", &both),
            fresh(),
            (5, "ReadyForNewScale", "!ScaleDownLimit"),
        );
        check(
            (2, 10),
            policies("scaleDown", "Min", &both),
            fresh(),
            (9, "ReadyForNewScale", "!ScaleDownLimit"),
        );
        check(
            (2, 10),
            policies("scaleDown", "Disabled", &both),
            fresh(),
            (10, "ReadyForNewScale", "!ScaleDownLimit"),
        );
        // What was done in the period counts, whichever way it went.
        let one = [("Pods", 4, 60)];
        let grown = || Memory { ups: vec![(at(30), 3)], ..Memory::default() };
        check((20, 8), policies("scaleUp", "Max", &one), grown(), (9, "ReadyForNewScale", "!ScaleUpLimit"));
        let long_ago = || Memory { ups: vec![(at(61), 3)], ..Memory::default() };
        check(
            (20, 8),
            policies("scaleUp", "Max", &one),
            long_ago(),
            (12, "ReadyForNewScale", "!ScaleUpLimit"),
        );
        let shrunk = || Memory { downs: vec![(at(30), 4)], ..Memory::default() };
        check(
            (2, 8),
            policies("scaleDown", "Max", &one),
            shrunk(),
            (8, "ReadyForNewScale", "!ScaleDownLimit"),
        );
        // The usual rules: the greater of four pods and doubling.
        check((20, 3), Some(json!({})), fresh(), (7, "ReadyForNewScale", "!ScaleUpLimit"));
        check((20, 6), Some(json!({})), fresh(), (12, "ReadyForNewScale", "!ScaleUpLimit"));
        check((1, 6), Some(json!({})), fresh(), (2, "ReadyForNewScale", "!TooFewReplicas"));
    }

    #[test]
    fn only_what_rules_ask_for_is_remembered() {
        let mut memory = Memory::default();
        memory.scaled(None, 1, 5, now());
        assert_eq!(memory, Memory::default());
        let rules = behavior(json!({}));
        memory.ups = vec![(at(16), 9), (at(15), 8)];
        memory.scaled(Some(&rules), 1, 5, now());
        assert_eq!(memory.ups, [(at(15), 8), (now(), 4)]);
        memory.scaled(Some(&rules), 5, 2, now());
        assert_eq!(memory.downs, [(now(), 3)]);
    }
}
