//! What may help a pod that was parked: upstream's queueing hints, made exact where that is cheap.

use crate::decide::World;
use crate::picture::PodInfo;
use crate::plugins::{PLUGINS, Prepared, wake};
use crate::profile::Profile;

/// Something that happened to the picture.
#[derive(Debug, Clone, Copy, Default)]
pub struct Event<'a> {
    /// Bits of [`wake`].
    pub bits: u32,
    /// The node that it happened to.
    pub slot: Option<u32>,
    /// The pod as it counted before, and as it counts now.
    pub gone: Option<&'a PodInfo>,
    pub added: Option<&'a PodInfo>,
}

const OF_NODES: u32 =
    wake::NODE_ADDED | wake::NODE_ALLOCATABLE | wake::NODE_LABELS | wake::NODE_TAINTS | wake::NODE_REMOVED;

/// What an event means to a parked pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// It may fit now.
    Helps,
    /// It does not fit, and on the node where the event was also because of these plugins (bits by row): what
    /// helps with them may help from now on.
    Not(u32),
}

/// Whether what an event means to a pod is the same for all that are alike and were kept from their nodes by the
/// same plugins: those look at one node only, or follow something of their own.
pub fn means_the_same(rejecting: u32) -> bool {
    let mut rows = (0..PLUGINS.len()).filter(|row| rejecting & (1 << row) != 0);
    rows.all(|row| PLUGINS[row].local)
}

/// Whether a pod that the plugins in `rejecting` kept from its nodes may fit now.
pub fn may_help(world: &World, profile: &Profile, info: &PodInfo, rejecting: u32, event: &Event) -> Hint {
    // Where the event was, it helps if the node now passes everything that depends on the node alone.
    let mut still = 0;
    if let Some(slot) = event.slot
        && event.bits & (OF_NODES | wake::POD_GONE) != 0
    {
        match objection_alone(world, profile, info, slot) {
            None => return Hint::Helps,
            Some(bits) => still = bits,
        }
    }
    if rejecting == 0 && event.bits & wake::NODE_ADDED != 0 {
        return Hint::Helps;
    }
    // What looks at other nodes as well may be helped elsewhere.
    let helps = (0..32).filter(|row| rejecting & (1 << row) != 0).any(|row| match PLUGINS.get(row) {
        Some(plugin) if plugin.local || plugin.helped_by & event.bits == 0 => false,
        Some(plugin) if event.bits & (OF_NODES | wake::NAMESPACE) & plugin.helped_by != 0 => true,
        Some(plugin) if plugin.name == "PodTopologySpread" => {
            [event.gone, event.added].into_iter().flatten().any(|other| counts_for_spread(info, other))
        }
        Some(_) => {
            event.gone.is_some_and(|other| concerns(world, info, other))
                || event.added.is_some_and(|other| concerns(world, info, other))
        }
        None => event.bits & (OF_NODES | wake::POD_GONE) != 0,
    });
    if helps { Hint::Helps } else { Hint::Not(still & !rejecting) }
}

/// The plugin that rules the node out by itself, as the bit of its row; none if none does.
fn objection_alone(world: &World, profile: &Profile, info: &PodInfo, slot: u32) -> Option<u32> {
    let node = world.picture.node(slot);
    if !node.exists {
        return Some(0);
    }
    let prepared = Prepared::alone(info, profile);
    prepared.objection(&prepared.alone, &world.picture, node).map(|(row, _)| 1 << row)
}

fn counts_for_spread(info: &PodInfo, other: &PodInfo) -> bool {
    // Which of its constraints it is about is left to the next try.
    info.object.namespace() == other.object.namespace()
}

/// Whether either pod says something of the other.
fn concerns(world: &World, info: &PodInfo, other: &PodInfo) -> bool {
    let namespaces = &world.picture.namespaces;
    let speaks = |of: &PodInfo, about: &PodInfo| {
        of.affinities.as_ref().is_some_and(|affinities| {
            let mut terms = affinities.required.iter().chain(&affinities.required_anti);
            terms.any(|term| term.matches(&about.object, namespaces))
        })
    };
    speaks(info, other) || speaks(other, info)
}
