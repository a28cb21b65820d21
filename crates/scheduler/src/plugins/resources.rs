//! NodeResourcesFit with its three strategies, and NodeResourcesBalancedAllocation.

use super::{Objection, Prepared, Scoring};
use crate::picture::{Node, Picture};
use crate::profile::Strategy;

/// A line through points of utilization (0 to 100) and score (0 to 100), level before the first and after the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Curve(pub Vec<(i64, i64)>);

impl Curve {
    pub fn at(&self, utilization: i64) -> i64 {
        let Some(next) = self.0.iter().position(|(x, _)| utilization <= *x) else {
            return self.0.last().map_or(0, |(_, score)| *score);
        };
        let (x, score) = self.0[next];
        match next.checked_sub(1).map(|before| self.0[before]) {
            None => score,
            Some((x0, score0)) => score0 + (score - score0) * (utilization - x0) / (x - x0),
        }
    }
}

pub fn fit(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    let mut reasons = Vec::new();
    let mut hopeless = false;
    if node.pods.len() as i64 + 1 > node.pods_max {
        reasons.push("Too many pods".into());
    }
    let (asked, used, has) = (&pod.info.requests, &node.used, &node.allocatable);
    let plain = [
        ("Insufficient cpu", asked.cpu_milli, used.cpu_milli, has.cpu_milli),
        ("Insufficient memory", asked.memory, used.memory, has.memory),
        (
            "Insufficient ephemeral-storage",
            asked.ephemeral_storage,
            used.ephemeral_storage,
            has.ephemeral_storage,
        ),
    ];
    for (reason, asked, used, has) in plain {
        if asked > 0 && asked > has - used {
            reasons.push(reason.into());
            hopeless |= asked > has;
        }
    }
    for (name, asked) in &asked.extended {
        let (used, has) = (used.get(name), has.get(name));
        if *asked > 0 && *asked > has - used && !pod.profile.args.fit.ignores(name) {
            reasons.push(format!("Insufficient {name}").into());
            hopeless |= *asked > has;
        }
    }
    Objection::of(reasons, hopeless)
}

/// Resources that pods and nodes have only if they name them.
fn is_extended(name: &str) -> bool {
    !matches!(name, "cpu" | "memory" | "ephemeral-storage")
}

/// What the pod adds to each resource of the strategy, as scoring counts it.
pub fn fit_requests(pod: &Prepared) -> Vec<i64> {
    let amount = |name: &str| match name {
        "cpu" => pod.info.scored.0,
        "memory" => pod.info.scored.1,
        _ => pod.info.requests.get(name),
    };
    pod.profile.args.fit.resources.iter().map(|(name, _)| amount(name)).collect()
}

pub fn balance_requests(pod: &Prepared) -> Vec<i64> {
    pod.profile.args.balanced.iter().map(|name| pod.info.requests.get(name)).collect()
}

pub fn fit_score(pod: &Prepared, scoring: &Scoring, _: &Picture, node: &Node, _: usize) -> i64 {
    let fit = &pod.profile.args.fit;
    let (mut sum, mut weights) = (0, 0);
    for ((name, weight), asked) in fit.resources.iter().zip(&scoring.fit) {
        let has = node.allocatable.get(name);
        if has == 0 || (*asked == 0 && is_extended(name)) {
            continue;
        }
        let taken = asked
            + match name.as_str() {
                "cpu" => node.scored.0,
                "memory" => node.scored.1,
                _ => node.used.get(name),
            };
        let score = match &fit.strategy {
            Strategy::LeastAllocated if taken > has => 0,
            Strategy::LeastAllocated => (has - taken) * 100 / has,
            Strategy::MostAllocated => taken.min(has) * 100 / has,
            Strategy::RequestedToCapacityRatio(curve) if taken > has => curve.at(100),
            Strategy::RequestedToCapacityRatio(curve) => curve.at(taken * 100 / has),
        };
        // A ratio of which the score is nothing has no say.
        if score > 0 || !matches!(fit.strategy, Strategy::RequestedToCapacityRatio(_)) {
            sum += score * weight;
            weights += weight;
        }
    }
    match (&fit.strategy, weights) {
        (_, 0) => 0,
        (Strategy::RequestedToCapacityRatio(_), _) => (sum as f64 / weights as f64).round() as i64,
        _ => sum / weights,
    }
}

/// How alike the shares of the resources are that would be taken: 100 less their standard deviation.
pub fn balance(pod: &Prepared, scoring: &Scoring, _: &Picture, node: &Node, _: usize) -> i64 {
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    let mut shares = [0.0; 2];
    for (name, asked) in pod.profile.args.balanced.iter().zip(&scoring.balance) {
        let has = node.allocatable.get(name);
        if has == 0 || (*asked == 0 && is_extended(name)) {
            continue;
        }
        let share = ((node.used.get(name) + asked) as f64 / has as f64).min(1.0);
        if count < 2.0 {
            shares[count as usize] = share;
        }
        count += 1.0;
        sum += share;
        squares += share * share;
    }
    let deviation = match count as usize {
        0 | 1 => 0.0,
        2 => ((shares[0] - shares[1]) / 2.0).abs(),
        _ => (squares / count - (sum / count).powi(2)).max(0.0).sqrt(),
    };
    ((1.0 - deviation) * 100.0) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_curve(points: &[(i64, i64)], want: &[(i64, i64)]) {
        let curve = Curve(points.to_vec());
        for (utilization, score) in want {
            assert_eq!(curve.at(*utilization), *score, "at {utilization}");
        }
    }

    #[test]
    fn a_curve_is_level_outside_of_its_points() {
        check_curve(&[(0, 0), (100, 100)], &[(0, 0), (37, 37), (100, 100)]);
        check_curve(&[(20, 100), (60, 0)], &[(0, 100), (20, 100), (30, 75), (60, 0), (99, 0)]);
        check_curve(&[(50, 70)], &[(0, 70), (50, 70), (100, 70)]);
    }
}
