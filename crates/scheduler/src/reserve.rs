//! Plugins that hold something of their own besides nodes and pods (volumes), and take part once a node is
//! chosen: upstream's PreFilter, Filter, Reserve and PreBind.

use std::pin::Pin;

use minke_api::{Kind, Status};
use minke_client::{Change, Informers};

use crate::picture::{Node, PodInfo};
use crate::plugins::Objection;

/// What must happen before a pod is bound; runs beside the loop.
pub type PreBind = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// Made once and called from the scheduler's one loop: nothing but the future of [`ReservePlugin::pre_bind`]
/// may wait.
pub trait ReservePlugin: Send {
    /// Upstream's name, by which a profile switches it off.
    fn name(&self) -> &'static str;

    /// The kinds whose changes may help a pod that was ruled out; the scheduler follows them.
    fn kinds(&self) -> Vec<&'static Kind>;

    /// Whether a change of one of `kinds` may help a pod that this plugin ruled out.
    fn may_help(&mut self, pod: &PodInfo, change: &Change) -> bool;

    /// Looks at the pod before nodes are tried, and remembers what [`ReservePlugin::filter`] needs of it.
    /// `Ok(false)`: the pod is no concern of this plugin. An objection rules all nodes out at once.
    fn prepare(&mut self, pod: &PodInfo) -> Result<bool, Objection>;

    /// Why the prepared pod cannot go to the node, if so. Called once for each node that got this far.
    fn filter(&mut self, pod: &PodInfo, node: &Node) -> Option<Objection>;

    /// The pod goes to this node: takes what it needs there, so that the next pod cannot.
    /// The error is told to the user.
    fn reserve(&mut self, pod: &PodInfo, node: &Node) -> Result<(), String>;

    /// Gives back what was taken: the pod was not bound after all.
    fn unreserve(&mut self, pod: &PodInfo);

    /// What must be done before the pod is bound to the node it was reserved for, if anything.
    fn pre_bind(&mut self, pod: &PodInfo, node: &str) -> Option<PreBind>;
}

/// The names of upstream's plugins that reserve, whether they are among [`all`] or not.
pub const NAMES: &[&str] = &["VolumeRestrictions", "NodeVolumeLimits", "VolumeBinding", "VolumeZone"];

/// All of them, in the order in which they are asked; they stand between NodeResourcesFit and
/// PodTopologySpread. Informers asked for here are waited for before the first pod is tried.
pub fn all(informers: &Informers) -> Vec<Box<dyn ReservePlugin>> {
    crate::volumes::plugins(informers)
}
