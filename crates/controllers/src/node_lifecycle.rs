//! Notices nodes that fall silent, and taints nodes as their conditions say.
//!
//! A node is heard of by its lease and by its Ready condition. Every sign of life only moves a deadline; work is
//! done when the deadline passes. Pods are driven from one node after another, at a rate that depends on how much
//! of a zone is in trouble. Upstream: pkg/controller/nodelifecycle.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, NodeStatus, Pod, PodCondition, Taint};
use minke_api::{Kind, Object, Status};
use minke_client::{Change, Patch, Target};
use serde_json::json;
use tokio::time::Instant;

use crate::Config;
use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds};
use crate::node_zones::{Turn, Zones, zone_of};
use crate::pods;
use crate::run::Controller;

const LEASES: &str = "kube-node-lease";
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that make a node bad for new pods, when they are so.
const PRESSURES: &[(&str, &str)] = &[
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];
/// Conditions that the kubelet keeps, and that nobody knows when it is silent.
const KEPT: &[&str] = &["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];

pub(crate) struct NodeLifecycle {
    grace: Duration,
    startup_grace: Duration,
    nodes: Mutex<HashMap<String, Health>>,
    zones: Mutex<Zones>,
}

/// What we have heard of a node. Kept here and not in the node, since clocks of machines differ.
#[derive(Debug, Clone, Copy)]
struct Health {
    heard: Instant,
    /// Whether it has ever told how it is.
    started: bool,
    /// It was silent too long when last looked at.
    silent: bool,
    was_ready: bool,
}

fn condition<'n>(status: Option<&'n NodeStatus>, type_: &str) -> Option<&'n NodeCondition> {
    status?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

fn value<'n>(node: &'n Node, type_: &str) -> &'n str {
    condition(node.status.as_ref(), type_).map_or("", |condition| &condition.status)
}

/// The status of a node that nobody has heard of for too long, unless it says so already.
fn silenced(old: &NodeStatus, now: Timestamp) -> Option<NodeStatus> {
    let mut status = old.clone();
    let conditions = status.conditions.get_or_insert_default();
    for type_ in KEPT {
        let at = conditions.iter().position(|condition| condition.type_ == *type_);
        let (reason, message) = match at {
            Some(_) => ("NodeStatusUnknown", "Kubelet stopped posting node status."),
            None => ("NodeStatusNeverUpdated", "Kubelet never posted node status."),
        };
        let unknown = NodeCondition {
            type_: (*type_).to_owned(),
            status: "Unknown".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: at.and_then(|at| conditions[at].last_heartbeat_time.clone()),
            last_transition_time: Some(seconds(now)),
        };
        match at {
            Some(at) if conditions[at].status == "Unknown" => {}
            Some(at) => conditions[at] = unknown,
            None => conditions.push(unknown),
        }
    }
    (status != *old).then_some(status)
}

/// The taints of a node as its conditions want them; those that are not ours stay. `evicting` says whether
/// pods may be driven away.
fn tainted(node: &Node, evicting: bool, now: Timestamp) -> Vec<Taint> {
    let spec = node.spec.clone().unwrap_or_default();
    let old = spec.taints.unwrap_or_default();
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let away = match value(node, "Ready") {
        "False" => Some(NOT_READY),
        "Unknown" => Some(UNREACHABLE),
        _ => None,
    };
    if let Some(key) = away {
        wanted.push((key, "NoSchedule"));
        if evicting {
            wanted.push((key, "NoExecute"));
        }
    }
    wanted.extend(
        PRESSURES
            .iter()
            .filter(|(type_, _)| value(node, type_) == "True")
            .map(|(_, key)| (*key, "NoSchedule")),
    );
    if spec.unschedulable.unwrap_or(false) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let is_ours = |taint: &Taint| {
        let key = taint.key.as_str();
        let of_condition = PRESSURES.iter().any(|(_, ours)| *ours == key);
        match taint.effect.as_str() {
            "NoSchedule" => of_condition || [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&key),
            "NoExecute" => [NOT_READY, UNREACHABLE].contains(&key),
            _ => false,
        }
    };
    // A node that has not told how it is yet keeps the taint that it was made with.
    let unheard = value(node, "Ready").is_empty();
    let stays = |taint: &&Taint| {
        let wanted = wanted.iter().any(|(key, effect)| *key == taint.key && *effect == taint.effect);
        wanted || !is_ours(taint) || (unheard && taint.key == NOT_READY)
    };
    let mut taints: Vec<Taint> = old.iter().filter(stays).cloned().collect();
    for (key, effect) in wanted {
        if !taints.iter().any(|taint| taint.key == key && taint.effect == effect) {
            taints.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                value: None,
                time_added: (effect == "NoExecute").then(|| seconds(now)),
            });
        }
    }
    taints
}

impl NodeLifecycle {
    pub fn new(config: &Config) -> NodeLifecycle {
        let (grace, startup_grace) = (config.node_monitor_grace, config.node_startup_grace);
        NodeLifecycle { grace, startup_grace, nodes: Mutex::default(), zones: Mutex::default() }
    }

    fn nodes(&self) -> std::sync::MutexGuard<'_, HashMap<String, Health>> {
        self.nodes.lock().expect("nothing panics under the lock")
    }

    fn zones(&self) -> std::sync::MutexGuard<'_, Zones> {
        self.zones.lock().expect("nothing panics under the lock")
    }

    /// Those that may be given up sooner or later than before, now that this node is so.
    fn note_zone(&self, name: &str, node: Option<&Typed<Node>>) -> Vec<Item> {
        let now = node.map(|node| (zone_of(&node.object), value(node, "Ready") == "True"));
        let mut zones = self.zones();
        match zones.set(name, now) {
            true => zones.troubled().map(|node| Item::new(Kind::of::<Node>(), "", node)).collect(),
            false => Vec::new(),
        }
    }

    /// Whether the pods of a node in trouble may be driven away now; else when to ask again.
    fn may_evict(&self, ctx: &Ctx, node: &Typed<Node>) -> Result<(), Option<Duration>> {
        let all = ctx.informer::<Node>().snapshot();
        let mut zones = self.zones();
        if zones.len() < all.len() {
            // Not all have been told of yet; few would look like nearly none.
            for node in all.values().cloned().filter_map(Typed::<Node>::new) {
                zones.set(node.object.name(), Some((zone_of(&node.object), value(&node, "Ready") == "True")));
            }
        }
        if zones.all_silent() {
            return Err(None);
        }
        let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let given_up = |taint: &Taint| {
            taint.effect == "NoExecute" && [NOT_READY, UNREACHABLE].contains(&taint.key.as_str())
        };
        if taints.into_iter().any(given_up) {
            return Ok(());
        }
        let now = Instant::now();
        match zones.take(node.object.name(), now) {
            Turn::Now => Ok(()),
            Turn::At(at) => Err(Some(at - now)),
            Turn::Never => Err(None),
        }
    }

    /// A sign of life. Says whether the node had been given up.
    fn hear(&self, name: &str, tells_status: bool) -> bool {
        let mut nodes = self.nodes();
        let fresh = Health { heard: Instant::now(), started: false, silent: false, was_ready: false };
        let health = nodes.entry(name.to_owned()).or_insert(fresh);
        health.heard = Instant::now();
        health.started |= tells_status;
        std::mem::take(&mut health.silent)
    }
}

#[async_trait]
impl Controller for NodeLifecycle {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Node>(), Kind::of::<Lease>(), Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        let nodes = Kind::of::<Node>();
        if object.kind() == Kind::of::<Pod>() {
            return Vec::new();
        }
        if object.kind() == Kind::of::<Lease>() {
            let renewed = object.namespace() == LEASES && change.new.is_some();
            let back = renewed && self.hear(object.name(), false);
            return back.then(|| Item::new(nodes, "", object.name())).into_iter().collect();
        }
        let Some(new) = &change.new else {
            self.nodes().remove(object.name());
            let message = format!("Node {0} event: Removing Node {0} from Controller", object.name());
            ctx.events.normal(object, "RemovingNode", message);
            return self.note_zone(object.name(), None);
        };
        let view = |object: &std::sync::Arc<Object>| Typed::<Node>::new(object.clone());
        let (Some(node), old) = (view(new), change.old.as_ref().and_then(view)) else { return Vec::new() };
        let beat = |node: &Typed<Node>| {
            let ready = condition(node.status.as_ref(), "Ready")?;
            Some((ready.last_heartbeat_time.clone(), ready.status != "Unknown"))
        };
        let now = beat(&node);
        if old.is_none()
            || (now.as_ref().is_some_and(|(_, told)| *told) && old.as_ref().map(beat) != Some(now.clone()))
        {
            self.hear(new.name(), now.is_some_and(|(_, told)| told));
        }
        if old.is_none() {
            let message = format!("Node {0} event: Registered Node {0} in Controller", new.name());
            ctx.events.normal(new, "RegisteredNode", message);
        }
        let facts = |node: &Typed<Node>| -> (Vec<String>, Option<Vec<Taint>>, Option<bool>) {
            let types = KEPT.iter().chain(PRESSURES.iter().map(|(type_, _)| type_));
            let spec = node.spec.clone().unwrap_or_default();
            (types.map(|type_| value(node, type_).to_owned()).collect(), spec.taints, spec.unschedulable)
        };
        let mut items = self.note_zone(new.name(), Some(&node));
        if old.is_none_or(|old| facts(&old) != facts(&node)) && !items.contains(&Item::of(new)) {
            items.push(Item::of(new));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(node) = ctx.get::<Node>(&item.key) else { return Ok(Requeue::Never) };
        let name = node.object.name().to_owned();
        self.nodes().entry(name.clone()).or_insert_with(|| Health {
            heard: Instant::now(),
            started: false,
            silent: false,
            was_ready: false,
        });
        let health = self.nodes()[&name];
        let grace = if health.started { self.grace } else { self.startup_grace.max(self.grace) };
        let left = grace.saturating_sub(health.heard.elapsed());
        let mut node = node;
        if left.is_zero() {
            let status = node.status.clone().unwrap_or_default();
            if let Some(silent) = silenced(&status, ctx.now()) {
                tracing::info!(node = name, "Node has fallen silent");
                let object = ctx.update_status(&node.object, &silent).await?;
                let Some(new) = Typed::new(object) else { return Ok(Requeue::Never) };
                node = new;
            }
        }
        let ready = value(&node, "Ready") == "True";
        let was_ready = {
            let mut nodes = self.nodes();
            let Some(health) = nodes.get_mut(&name) else { return Ok(Requeue::Never) };
            // A sign of life may have come while we wrote.
            health.silent = left.is_zero() && health.heard.elapsed() >= grace;
            std::mem::replace(&mut health.was_ready, ready)
        };
        if was_ready && !ready {
            let message = format!("Node {name} status is now: NodeNotReady");
            ctx.events.normal(&node.object, "NodeNotReady", message);
            if let Err(error) = self.mark_pods(ctx, &name).await {
                if let Some(health) = self.nodes().get_mut(&name) {
                    health.was_ready = true;
                }
                return Err(error);
            }
        }
        let evicting = match value(&node, "Ready") {
            "False" | "Unknown" => self.may_evict(ctx, &node),
            _ => Err(None),
        };
        let taints = tainted(&node, evicting.is_ok(), ctx.now());
        if taints != node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default() {
            let taints = if taints.is_empty() { serde_json::Value::Null } else { json!(taints) };
            let revision = node.object.revision().to_string();
            let patch = json!({ "metadata": { "resourceVersion": revision }, "spec": { "taints": taints } });
            ctx.patch(Target::of(&node.object), Patch::Merge(patch)).await?;
        }
        // While it is silent, the next sign of life queues it.
        let next = [(!left.is_zero()).then_some(left), evicting.err().flatten()].into_iter().flatten().min();
        Ok(next.map_or(Requeue::Never, Requeue::After))
    }
}

impl NodeLifecycle {
    /// Takes the pods of a node that cannot be trusted out of their services.
    async fn mark_pods(&self, ctx: &Ctx, node: &str) -> Result<(), Status> {
        let here = ctx.informer::<Pod>().on_node(node);
        for pod in here.into_iter().filter_map(Typed::<Pod>::new).filter(|pod| pods::is_ready(pod)) {
            let condition = PodCondition {
                type_: "Ready".to_owned(),
                status: "False".to_owned(),
                last_transition_time: Some(seconds(ctx.now())),
                ..PodCondition::default()
            };
            let patch = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
            match ctx.patch(Target::of(&pod.object).sub("status"), patch).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => ctx.events.warning(&pod.object, "NodeNotReady", "Node is not ready"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::now;
    use serde_json::Value;

    fn node(ready: &str, change: impl FnOnce(&mut Value)) -> Node {
        let conditions =
            json!([{"type": "Ready", "status": ready, "lastHeartbeatTime": "2023-01-01T00:00:00Z"}]);
        let mut value = json!({ "spec": {}, "status": { "conditions": conditions } });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[track_caller]
    fn check(node: &Node, evicting: bool, want: &[&str]) {
        let taints = tainted(node, evicting, now());
        let text: Vec<String> =
            taints.iter().map(|taint| format!("{}:{}", taint.key, taint.effect)).collect();
        assert_eq!(text, want);
        let mut again = node.clone();
        again.spec.get_or_insert_default().taints = Some(taints.clone());
        assert_eq!(tainted(&again, evicting, now() + Duration::from_secs(60)), taints, "taints settle");
    }

    #[test]
    fn conditions_become_taints() {
        let old = |taints: Value| move |n: &mut Value| n["spec"]["taints"] = taints;
        check(&node("True", |_| {}), true, &[]);
        check(
            &node("False", |_| {}),
            true,
            &["node.kubernetes.io/not-ready:NoSchedule", "node.kubernetes.io/not-ready:NoExecute"],
        );
        check(
            &node(
                "Unknown",
                old(
                    json!([{"key": NOT_READY, "effect": "NoExecute"}, {"key": "mine", "effect": "NoSchedule"}]),
                ),
            ),
            true,
            &[
                "mine:NoSchedule",
                "node.kubernetes.io/unreachable:NoSchedule",
                "node.kubernetes.io/unreachable:NoExecute",
            ],
        );
        check(&node("Unknown", |_| {}), false, &["node.kubernetes.io/unreachable:NoSchedule"]);
        check(
            &node("True", |n| n["spec"]["unschedulable"] = true.into()),
            true,
            &["node.kubernetes.io/unschedulable:NoSchedule"],
        );
        check(&node("True", old(json!([{"key": NOT_READY, "effect": "NoSchedule"}]))), true, &[]);
        let new = json!({"spec": {"taints": [{"key": NOT_READY, "effect": "NoSchedule"}]}});
        check(&serde_json::from_value(new).unwrap(), true, &["node.kubernetes.io/not-ready:NoSchedule"]);
        check(
            &node("True", |n| {
                n["status"]["conditions"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"type": "DiskPressure", "status": "True"}));
            }),
            true,
            &["node.kubernetes.io/disk-pressure:NoSchedule"],
        );
    }

    #[test]
    fn a_silent_node_is_unknown() {
        let old = node("True", |_| {}).status.unwrap();
        let status = silenced(&old, now()).unwrap();
        let ready = condition(Some(&status), "Ready").unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("Unknown", Some("NodeStatusUnknown")));
        assert_eq!(ready.message.as_deref(), Some("Kubelet stopped posting node status."));
        assert!(ready.last_heartbeat_time.is_some(), "the last sign of life stays on record");
        let disk = condition(Some(&status), "DiskPressure").unwrap();
        assert_eq!(disk.reason.as_deref(), Some("NodeStatusNeverUpdated"));
        assert_eq!(silenced(&status, now()), None);
    }
}
