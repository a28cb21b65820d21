//! The plugins: what rules a node out for a pod, and what speaks for it.
//!
//! One row each, with upstream's name, weight and words; the order is upstream's, and a node is ruled out
//! by the first plugin that objects. All are pure functions of the pod, the profile and the picture. What is
//! the same for all nodes is worked out once for each try ([`Prepared`], [`Scoring`]), from counts that are kept
//! up to date ([`crate::tally`]).

mod nodes;
mod pods;
mod resources;
mod spread;

use std::borrow::Cow;

use crate::picture::{Node, Picture, PodInfo};
use crate::profile::Profile;
use crate::workloads::Workloads;

pub use resources::Curve;

/// What may help a pod that found no node, as bits.
pub mod wake {
    pub const NODE_ADDED: u32 = 1;
    pub const NODE_ALLOCATABLE: u32 = 2;
    pub const NODE_LABELS: u32 = 4;
    pub const NODE_TAINTS: u32 = 8;
    pub const NODE_REMOVED: u32 = 16;
    /// A placed pod went, or no longer counts.
    pub const POD_GONE: u32 = 32;
    /// A pod was placed, or began to count.
    pub const POD_ADDED: u32 = 64;
    /// Labels of a namespace.
    pub const NAMESPACE: u32 = 128;
    /// What a [`crate::reserve::ReservePlugin`] follows.
    pub const RESERVED: u32 = 256;
}

/// Why a node was ruled out. `hopeless`: removing pods from it would not help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    /// Most have one, which then costs no allocation: thousands of nodes may object to each of thousands of pods.
    reason: Cow<'static, str>,
    more: Vec<Cow<'static, str>>,
    pub hopeless: bool,
}

impl Objection {
    pub fn new(reason: impl Into<Cow<'static, str>>, hopeless: bool) -> Objection {
        Objection { reason: reason.into(), more: Vec::new(), hopeless }
    }

    /// `None` without reasons.
    pub fn of(mut reasons: Vec<Cow<'static, str>>, hopeless: bool) -> Option<Objection> {
        match reasons.len() {
            0 => None,
            1 => Some(Objection::new(reasons.pop()?, hopeless)),
            _ => {
                let more = reasons.split_off(1);
                Some(Objection { reason: reasons.pop()?, more, hopeless })
            }
        }
    }

    pub fn reasons(&self) -> impl Iterator<Item = &Cow<'static, str>> {
        std::iter::once(&self.reason).chain(&self.more)
    }

    fn one(reason: &'static str, hopeless: bool) -> Option<Objection> {
        Some(Objection::new(reason, hopeless))
    }
}

/// How the raw scores of a plugin become 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    /// They are that already.
    As,
    /// The highest becomes 100.
    Up,
    /// The highest becomes 0.
    Down,
    /// The lowest becomes 0 and the highest 100.
    Range,
    /// Fewest is best, as far as it is from the most; nodes without a score get none.
    Spread,
}

pub type Filter = fn(&Prepared, &Picture, &Node) -> Option<Objection>;
/// The last argument is the node's place among those that passed the filters.
pub type Score = fn(&Prepared, &Scoring, &Picture, &Node, usize) -> i64;

/// The score of a node that spreading leaves out.
pub const NO_SCORE: i64 = -1;

pub struct Plugin {
    pub name: &'static str,
    pub filter: Option<Filter>,
    pub score: Option<(Score, Normalize)>,
    /// The weight of its score, unless a profile says otherwise.
    pub weight: i64,
    /// Its filter and score depend on nothing but the pod, the node itself and what images nodes have.
    pub local: bool,
    /// What may make a node acceptable that this plugin ruled out: bits of [`wake`].
    pub helped_by: u32,
}

impl Plugin {
    const PLAIN: Plugin =
        Plugin { name: "", filter: None, score: None, weight: 0, local: true, helped_by: wake::NODE_ADDED };
}

/// Plugins that have neither filter nor score; what they do is part of the loop.
pub const SCHEDULING_GATES: &str = "SchedulingGates";
pub const PRIORITY_SORT: &str = "PrioritySort";
pub const DEFAULT_BINDER: &str = "DefaultBinder";
pub const DEFAULT_PREEMPTION: &str = "DefaultPreemption";

#[rustfmt::skip]
pub static PLUGINS: &[Plugin] = &[
    Plugin { name: "NodeUnschedulable", filter: Some(nodes::unschedulable), helped_by: wake::NODE_ADDED | wake::NODE_TAINTS, ..Plugin::PLAIN },
    Plugin { name: "NodeName", filter: Some(nodes::name), ..Plugin::PLAIN },
    Plugin { name: "TaintToleration", filter: Some(nodes::taints), score: Some((nodes::untolerated_preferences, Normalize::Down)), weight: 3, helped_by: wake::NODE_ADDED | wake::NODE_TAINTS, ..Plugin::PLAIN },
    Plugin { name: "NodeAffinity", filter: Some(nodes::affinity), score: Some((nodes::preference, Normalize::Up)), weight: 2, helped_by: wake::NODE_ADDED | wake::NODE_LABELS, ..Plugin::PLAIN },
    Plugin { name: "NodePorts", filter: Some(nodes::ports), helped_by: wake::NODE_ADDED | wake::POD_GONE, ..Plugin::PLAIN },
    Plugin { name: "NodeResourcesFit", filter: Some(resources::fit), score: Some((resources::fit_score, Normalize::As)), weight: 1, helped_by: wake::NODE_ADDED | wake::NODE_ALLOCATABLE | wake::POD_GONE, ..Plugin::PLAIN },
    Plugin { name: "PodTopologySpread", filter: Some(spread::filter), score: Some((spread::score, Normalize::Spread)), weight: 2, local: false, helped_by: wake::NODE_ADDED | wake::NODE_REMOVED | wake::NODE_LABELS | wake::NODE_TAINTS | wake::POD_GONE | wake::POD_ADDED },
    Plugin { name: "InterPodAffinity", filter: Some(pods::filter), score: Some((pods::score, Normalize::Range)), weight: 2, local: false, helped_by: wake::NODE_ADDED | wake::NODE_REMOVED | wake::NODE_LABELS | wake::POD_GONE | wake::POD_ADDED | wake::NAMESPACE },
    Plugin { name: "NodeResourcesBalancedAllocation", score: Some((resources::balance, Normalize::As)), weight: 1, ..Plugin::PLAIN },
    Plugin { name: "ImageLocality", score: Some((nodes::image_locality, Normalize::As)), weight: 1, ..Plugin::PLAIN },
];

/// The number of a plugin's row.
///
/// # Panics
/// When there is no such plugin.
pub fn row(name: &str) -> usize {
    PLUGINS.iter().position(|plugin| plugin.name == name).expect("plugins stand in the table")
}

/// A pod with everything worked out that filters need and is the same for all nodes.
pub struct Prepared<'a> {
    pub info: &'a PodInfo,
    pub profile: &'a Profile,
    spread: spread::Hard,
    pods: pods::Required,
    /// The filters that have something to say of this pod and look at one node only, as numbers of rows.
    pub alone: Vec<usize>,
    /// Those that look at other nodes as well.
    pub wide: Vec<usize>,
}

impl<'a> Prepared<'a> {
    pub fn new(
        info: &'a PodInfo,
        profile: &'a Profile,
        picture: &mut Picture,
        workloads: &Workloads,
    ) -> Self {
        let spread = spread::Hard::new(info, profile, picture, workloads);
        let pods = pods::Required::new(info, picture);
        let chooses = crate::affinity::chooses_nodes(&info.pod) || profile.args.added_affinity.is_some();
        let concerns = |name: &str| match name {
            "NodeName" => !info.node_name().is_empty(),
            "NodeAffinity" => chooses,
            "NodePorts" => !info.host_ports.is_empty(),
            "PodTopologySpread" => !spread.is_empty(),
            "InterPodAffinity" => !pods.is_empty(),
            _ => true,
        };
        let rows = profile.filters.iter().copied().filter(|row| concerns(PLUGINS[*row].name));
        let (alone, wide) = rows.partition(|row| PLUGINS[*row].local);
        Prepared { info, profile, spread, pods, alone, wide }
    }

    /// With the filters that look at one node only.
    pub fn alone(info: &'a PodInfo, profile: &'a Profile) -> Self {
        let alone = profile.filters.iter().copied().filter(|row| PLUGINS[*row].local).collect();
        let (spread, pods) = (spread::Hard::default(), pods::Required::default());
        Prepared { info, profile, spread, pods, alone, wide: Vec::new() }
    }

    /// The first of the filters that rules the node out, and why.
    pub fn objection(&self, rows: &[usize], picture: &Picture, node: &Node) -> Option<(usize, Objection)> {
        rows.iter().find_map(|row| {
            let filter = PLUGINS[*row].filter?;
            Some((*row, filter(self, picture, node)?))
        })
    }

    fn tolerations(&self) -> &[k8s_openapi::api::core::v1::Toleration] {
        self.info.pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default()
    }
}

/// What scores need, worked out once for all nodes.
#[derive(Debug, Default)]
pub struct Scoring {
    spread: Option<spread::Soft>,
    pods: Option<pods::Preferred>,
    images: Vec<(Box<str>, f64)>,
    containers: usize,
    /// Requests of the resources that the strategy looks at, and that balancing does.
    fit: Vec<i64>,
    balance: Vec<i64>,
    /// The scores that can tell nodes apart for this pod: numbers of rows with their weights.
    pub scores: Vec<(usize, i64)>,
}

impl Scoring {
    /// For the plugins that look at one node only.
    pub fn alone(prepared: &Prepared, picture: &Picture) -> Self {
        let (images, containers) = nodes::images(prepared.info, picture);
        let (fit, balance) = (resources::fit_requests(prepared), resources::balance_requests(prepared));
        let prefers = nodes::has_preference(prepared);
        let concerns = |plugin: &Plugin| match plugin.name {
            "NodeAffinity" => prefers,
            // Pods that ask for nothing would all go to the same node.
            "NodeResourcesBalancedAllocation" => balance.iter().any(|amount| *amount > 0),
            "ImageLocality" => !images.is_empty(),
            _ => plugin.local,
        };
        let scores = prepared.profile.scores.iter().copied().filter(|(row, _)| concerns(&PLUGINS[*row]));
        let scores = scores.collect();
        Scoring { images, containers, fit, balance, scores, ..Scoring::default() }
    }

    /// For those that look at others as well, and for the nodes that passed the filters.
    pub fn wide(prepared: &Prepared, picture: &mut Picture, workloads: &Workloads, feasible: &[u32]) -> Self {
        let (info, profile) = (prepared.info, prepared.profile);
        let mut scoring = Scoring::default();
        for (row, weight) in &profile.scores {
            let concerns = match PLUGINS[*row].name {
                "PodTopologySpread" => {
                    scoring.spread = spread::Soft::new(info, profile, picture, workloads, feasible);
                    scoring.spread.is_some()
                }
                "InterPodAffinity" => {
                    scoring.pods = pods::Preferred::new(info, profile, picture);
                    scoring.pods.is_some()
                }
                _ => false,
            };
            if concerns {
                scoring.scores.push((*row, *weight));
            }
        }
        scoring
    }
}
