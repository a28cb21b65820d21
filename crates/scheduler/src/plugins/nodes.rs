//! What is decided by the node and the pod alone: NodeUnschedulable, NodeName, TaintToleration, NodeAffinity,
//! NodePorts, ImageLocality.

use k8s_openapi::api::core::v1::{PreferredSchedulingTerm, Taint};

use super::{Objection, Prepared, Scoring};
use crate::affinity::{node_is_wanted, selector_matches, term_matches, tolerated};
use crate::picture::{Node, Picture, PodInfo};

pub fn unschedulable(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    if !node.unschedulable {
        return None;
    }
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    };
    if tolerated(pod.tolerations(), &taint) {
        return None;
    }
    Objection::one("node(s) were unschedulable", true)
}

pub fn name(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    match pod.info.node_name() {
        "" => None,
        name if name == &*node.name => None,
        _ => Objection::one("node(s) didn't match the requested node name", true),
    }
}

pub fn taints(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    let mut binding = node.taints.iter().filter(|taint| taint.effect != "PreferNoSchedule");
    if binding.all(|taint| tolerated(pod.tolerations(), taint)) {
        return None;
    }
    Objection::one("node(s) had untolerated taint(s)", true)
}

pub fn untolerated_preferences(pod: &Prepared, _: &Scoring, _: &Picture, node: &Node, _: usize) -> i64 {
    let soft = node.taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
    soft.filter(|taint| !tolerated(pod.tolerations(), taint)).count() as i64
}

pub fn affinity(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    let added = pod.profile.args.added_affinity.as_ref();
    let enforced = added.and_then(|added| added.required_during_scheduling_ignored_during_execution.as_ref());
    if enforced.is_some_and(|enforced| !selector_matches(enforced, node)) {
        return Objection::one("node(s) didn't match scheduler-enforced node affinity", true);
    }
    if node_is_wanted(&pod.info.pod, node) {
        return None;
    }
    Objection::one("node(s) didn't match Pod's node affinity/selector", true)
}

fn preferences<'p>(pod: &'p Prepared) -> impl Iterator<Item = &'p PreferredSchedulingTerm> {
    let own = pod
        .info
        .pod
        .spec
        .as_ref()
        .and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref())
        .and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    let added = pod
        .profile
        .args
        .added_affinity
        .as_ref()
        .and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    own.into_iter().chain(added).flatten()
}

pub fn has_preference(pod: &Prepared) -> bool {
    preferences(pod).next().is_some()
}

pub fn preference(pod: &Prepared, _: &Scoring, _: &Picture, node: &Node, _: usize) -> i64 {
    // A preference without requirements is one for every node.
    let holds = |term: &&PreferredSchedulingTerm| {
        let preference = &term.preference;
        let requirements = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        !(requirements(&preference.match_expressions) || requirements(&preference.match_fields))
            || term_matches(preference, node)
    };
    preferences(pod).filter(holds).map(|term| i64::from(term.weight)).sum()
}

pub fn ports(pod: &Prepared, _: &Picture, node: &Node) -> Option<Objection> {
    let clash =
        pod.info.host_ports.iter().any(|port| node.host_ports.iter().any(|taken| port.clashes(taken)));
    if clash {
        Objection::one("node(s) didn't have free ports for the requested pod ports", false)
    } else {
        None
    }
}

/// Image names on nodes carry a tag; a name without one means `latest`.
fn normalized_image(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or_default();
    if last.contains(':') { image.to_owned() } else { format!("{image}:latest") }
}

/// The share of the nodes that have each of the pod's images which any node has; and the number of containers.
pub fn images(info: &PodInfo, picture: &Picture) -> (Vec<(Box<str>, f64)>, usize) {
    let Some(spec) = &info.pod.spec else { return (Vec::new(), 0) };
    let containers = || spec.init_containers.iter().flatten().chain(&spec.containers);
    let nodes = picture.known_order().len().max(1) as f64;
    let found = containers().filter_map(|container| {
        let image = normalized_image(container.image.as_deref().unwrap_or_default());
        let count = picture.nodes_with_image(&image);
        (count > 0).then(|| (image.into_boxed_str(), f64::from(count) / nodes))
    });
    (found.collect(), containers().count())
}

pub fn image_locality(_: &Prepared, scoring: &Scoring, _: &Picture, node: &Node, _: usize) -> i64 {
    const MIB: i64 = 1024 * 1024;
    let present: i64 = scoring
        .images
        .iter()
        .filter_map(|(image, share)| Some((*node.images.get(image)? as f64 * share) as i64))
        .sum();
    let (min, max) = (23 * MIB, 1000 * MIB * scoring.containers as i64);
    100 * (present.clamp(min, max) - min) / (max - min)
}
