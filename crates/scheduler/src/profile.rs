//! Profiles: which plugins decide for the pods of one `schedulerName`, with what weights and arguments.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{NodeAffinity, TopologySpreadConstraint};

use crate::plugins::{Curve, PLUGINS};

/// The profile of pods that name no scheduler.
pub const DEFAULT_NAME: &str = "default-scheduler";

#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Pods whose `spec.schedulerName` is this are its.
    pub name: String,
    /// Share of the nodes that is looked at once it suffices; `None`: adapted to their number.
    pub percentage: Option<u32>,
    /// Rows of [`PLUGINS`] whose filters are on, in order.
    pub filters: Vec<usize>,
    /// Rows whose scores are on, with their weights.
    pub scores: Vec<(usize, i64)>,
    /// Names of [`crate::reserve::ReservePlugin`]s that are off.
    pub without: BTreeSet<String>,
    pub preemption: bool,
    pub gates: bool,
    pub args: Args,
}

/// What plugins can be told.
#[derive(Debug, Clone, PartialEq)]
pub struct Args {
    pub fit: FitArgs,
    /// Resources that NodeResourcesBalancedAllocation compares.
    pub balanced: Vec<String>,
    pub spread: SpreadArgs,
    pub hard_pod_affinity_weight: i64,
    pub ignore_preferred_of_existing: bool,
    /// Node affinity that every pod of the profile has besides its own.
    pub added_affinity: Option<NodeAffinity>,
    pub candidates_percentage: usize,
    pub candidates_min: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct FitArgs {
    pub strategy: Strategy,
    pub resources: Vec<(String, i64)>,
    pub ignored: BTreeSet<String>,
    /// Prefixes before the slash.
    pub ignored_groups: BTreeSet<String>,
}

impl FitArgs {
    pub fn ignores(&self, resource: &str) -> bool {
        self.ignored.contains(resource)
            || resource.split_once('/').is_some_and(|(group, _)| self.ignored_groups.contains(group))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Strategy {
    LeastAllocated,
    MostAllocated,
    RequestedToCapacityRatio(Curve),
}

/// The constraints of pods that have none of their own.
#[derive(Debug, Clone, PartialEq)]
pub struct SpreadArgs {
    pub constraints: Vec<TopologySpreadConstraint>,
    /// They are upstream's own, which do not ask nodes for all labels.
    pub system: bool,
}

impl SpreadArgs {
    pub fn system() -> SpreadArgs {
        let constraint = |key: &str, max_skew| TopologySpreadConstraint {
            max_skew,
            topology_key: key.to_owned(),
            when_unsatisfiable: "ScheduleAnyway".to_owned(),
            ..TopologySpreadConstraint::default()
        };
        let constraints =
            vec![constraint("kubernetes.io/hostname", 3), constraint("topology.kubernetes.io/zone", 5)];
        SpreadArgs { constraints, system: true }
    }
}

impl Default for Args {
    fn default() -> Args {
        let both = ["cpu", "memory"];
        Args {
            fit: FitArgs {
                strategy: Strategy::LeastAllocated,
                resources: both.map(|name| (name.to_owned(), 1)).to_vec(),
                ignored: BTreeSet::new(),
                ignored_groups: BTreeSet::new(),
            },
            balanced: both.map(str::to_owned).to_vec(),
            spread: SpreadArgs::system(),
            hard_pod_affinity_weight: 1,
            ignore_preferred_of_existing: false,
            added_affinity: None,
            candidates_percentage: 10,
            candidates_min: 100,
        }
    }
}

impl Default for Profile {
    fn default() -> Profile {
        let filters = (0..PLUGINS.len()).filter(|n| PLUGINS[*n].filter.is_some()).collect();
        let scores = (0..PLUGINS.len()).filter(|n| PLUGINS[*n].score.is_some());
        Profile {
            name: DEFAULT_NAME.to_owned(),
            percentage: None,
            filters,
            scores: scores.map(|n| (n, PLUGINS[n].weight)).collect(),
            without: BTreeSet::new(),
            preemption: true,
            gates: true,
            args: Args::default(),
        }
    }
}

impl Profile {
    /// Whether the plugin may rule nodes out.
    pub fn considers(&self, plugin: &str) -> bool {
        self.filters.iter().any(|row| PLUGINS[*row].name == plugin)
    }

    /// Nodes that must be found before scoring begins, of `all` nodes: all of them up to a hundred, then a
    /// falling share, as upstream's adaptive percentageOfNodesToScore.
    pub fn enough(&self, all: usize) -> usize {
        if all < 100 {
            return all;
        }
        let percent = match self.percentage {
            Some(percent) if percent >= 100 => return all,
            Some(percent) if percent > 0 => percent as usize,
            _ => 50usize.saturating_sub(all / 125).max(5),
        };
        (all * percent / 100).max(100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_nodes_are_all_looked_at_and_of_many_a_share() {
        let mut profile = Profile::default();
        let enough = |profile: &Profile| [50, 100, 1000, 5000, 20000].map(|all| profile.enough(all));
        assert_eq!(enough(&profile), [50, 100, 420, 500, 1000]);
        profile.percentage = Some(20);
        assert_eq!(enough(&profile), [50, 100, 200, 1000, 4000]);
        profile.percentage = Some(100);
        assert_eq!(enough(&profile), [50, 100, 1000, 5000, 20000]);
    }

    #[test]
    fn the_default_profile_has_upstreams_weights() {
        let profile = Profile::default();
        let scores: Vec<(&str, i64)> =
            profile.scores.iter().map(|(n, weight)| (PLUGINS[*n].name, *weight)).collect();
        assert_eq!(
            scores,
            [
                ("TaintToleration", 3),
                ("NodeAffinity", 2),
                ("NodeResourcesFit", 1),
                ("PodTopologySpread", 2),
                ("InterPodAffinity", 2),
                ("NodeResourcesBalancedAllocation", 1),
                ("ImageLocality", 1)
            ]
        );
    }
}
