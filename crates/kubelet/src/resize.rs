//! In-place resize: whether the node has room for what a running pod asks for now, and what it goes on
//! with until then. Upstream: pkg/kubelet/allocation.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use serde_json::json;
use tokio::sync::watch;

use crate::pod::{Class, Pod};
use crate::resources;

/// Conditions of a pod that only a resize gives it.
pub const PENDING: &str = "PodResizePending";
pub const IN_PROGRESS: &str = "PodResizeInProgress";

const RESOURCES: [&str; 2] = ["cpu", "memory"];

/// Thousandths of a CPU, and bytes.
type Amounts = [i64; 2];

/// What the pods of this node were granted, and which of them wait for more.
pub struct Grants {
    room: Mutex<Room>,
    freed: watch::Sender<()>,
}

#[derive(Default)]
struct Room {
    /// By uid.
    granted: HashMap<String, Amounts>,
    /// Those for whom there is no room now.
    waiting: Vec<Waiter>,
    /// How many have ever waited.
    count: u64,
}

struct Waiter {
    uid: String,
    rank: Rank,
    wanted: Amounts,
}

/// Who gets room first: by priority, by class, and who has waited longer.
type Rank = (Reverse<i32>, u8, u64);

impl Default for Grants {
    fn default() -> Grants {
        Grants { room: Mutex::default(), freed: watch::Sender::new(()) }
    }
}

/// Why a resize cannot be done: reason and message of the condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    pub reason: &'static str,
    pub message: String,
}

impl Room {
    /// What others have, of whom those that wait in front of `rank` have got what fits by then.
    fn used(&self, uid: &str, rank: Rank, capacity: [Option<i64>; 2]) -> Amounts {
        let mut granted = self.granted.clone();
        granted.remove(uid);
        let mut ahead: Vec<&Waiter> = self.waiting.iter().filter(|w| w.uid != uid && w.rank < rank).collect();
        ahead.sort_by_key(|waiter| waiter.rank);
        let own = self.granted.get(uid).copied().unwrap_or_default();
        let sum = |granted: &HashMap<String, Amounts>| {
            granted.values().fold([0, 0], |sum: Amounts, one| [sum[0] + one[0], sum[1] + one[1]])
        };
        for waiter in ahead {
            let had = granted.remove(&waiter.uid).unwrap_or_default();
            let beside = sum(&granted);
            let fits = (0..2).all(|at| {
                let used = beside[at] + own[at];
                waiter.wanted[at] <= had[at]
                    || capacity[at].is_none_or(|most| used + waiter.wanted[at] <= most)
            });
            granted.insert(waiter.uid.clone(), if fits { waiter.wanted } else { had });
        }
        sum(&granted)
    }
}

impl Grants {
    fn lock(&self) -> std::sync::MutexGuard<'_, Room> {
        self.room.lock().expect("nothing panics while the map is locked")
    }

    /// Tells when room may have become free.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.freed.subscribe()
    }

    /// Grants what the pod asks for, whatever there is.
    pub fn grant(&self, pod: &Pod) {
        let old = self.lock().granted.insert(pod.uid().to_owned(), wanted(pod));
        if old.is_some_and(|old| old != wanted(pod)) {
            self.freed.send_replace(());
        }
    }

    pub fn release(&self, uid: &str) {
        let mut room = self.lock();
        room.waiting.retain(|waiter| waiter.uid != uid);
        let had = room.granted.remove(uid);
        drop(room);
        if had.is_some() {
            self.freed.send_replace(());
        }
    }

    /// The pod wants no more than it has.
    pub fn withdraw(&self, uid: &str) {
        let mut room = self.lock();
        let count = room.waiting.len();
        room.waiting.retain(|waiter| waiter.uid != uid);
        let withdrew = room.waiting.len() < count;
        drop(room);
        if withdrew {
            self.freed.send_replace(());
        }
    }

    /// Grants what the pod asks for when there is room beside the others; else it waits, behind those that come first.
    pub fn try_grant(&self, pod: &Pod, allocatable: &BTreeMap<String, Quantity>) -> Result<(), Pending> {
        let (wanted, uid) = (wanted(pod), pod.uid());
        let capacity = RESOURCES.map(|name| {
            allocatable.get(name).map(|q| if name == "cpu" { q.milli_value() } else { q.value() })
        });
        let mut room = self.lock();
        let since =
            room.waiting.iter().position(|waiter| waiter.uid == uid).map(|at| room.waiting.remove(at).rank.2);
        let since = since.unwrap_or_else(|| {
            room.count += 1;
            room.count
        });
        let class = match resources::qos_class(pod) {
            "Guaranteed" => 0,
            "Burstable" => 1,
            _ => 2,
        };
        let rank = (Reverse(pod.spec().priority.unwrap_or(0)), class, since);
        let had = room.granted.get(uid).copied().unwrap_or_default();
        let used = room.used(uid, rank, capacity);
        for (at, name) in RESOURCES.into_iter().enumerate() {
            let (Some(capacity), asked, used) = (capacity[at], wanted[at], used[at]) else { continue };
            if asked > capacity {
                let message = format!(
                    "Node didn't have enough capacity: {name}, requested: {asked}, capacity: {capacity}"
                );
                return Err(Pending { reason: "Infeasible", message });
            }
            if asked > had[at] && used.saturating_add(asked) > capacity {
                let message = format!(
                    "Node didn't have enough resource: {name}, requested: {asked}, used: {used}, capacity: {capacity}"
                );
                room.waiting.push(Waiter { uid: uid.to_owned(), rank, wanted });
                return Err(Pending { reason: "Deferred", message });
            }
        }
        room.granted.insert(uid.to_owned(), wanted);
        drop(room);
        if (0..2).any(|at| wanted[at] < had[at]) {
            self.freed.send_replace(());
        }
        Ok(())
    }
}

fn wanted(pod: &Pod) -> Amounts {
    RESOURCES.map(|name| resources::pod_request(pod, name))
}

/// Whether both ask for the same resources. Ephemeral containers have none, and come at any time.
pub fn same(one: &Pod, other: &Pod) -> bool {
    let all = |pod: &Pod| -> Vec<_> {
        let own = pod.containers().filter(|(class, _)| *class != Class::Ephemeral);
        own.map(|(_, c)| (c.name.clone(), c.resources.clone().unwrap_or_default())).collect()
    };
    one.spec().resources == other.spec().resources && all(one) == all(other)
}

/// What the events of a resize tell: the resources by container, and the revision of the specification.
pub fn told(pod: &Pod) -> String {
    let containers: Vec<_> = pod
        .spec()
        .containers
        .iter()
        .map(|c| json!({"name": c.name, "resources": c.resources.clone().unwrap_or_default()}))
        .collect();
    json!({"containers": containers, "generation": pod.object().generation()}).to_string()
}

/// A resize that waited when the agent went away waits on: the pod goes on with what its status shows.
pub fn resumed(pod: Pod) -> Pod {
    let status = pod.status().cloned().unwrap_or_default();
    if !status.conditions.iter().flatten().any(|c| c.type_ == PENDING && c.status == "True") {
        return pod;
    }
    let lists = [&status.container_statuses, &status.init_container_statuses];
    let known: BTreeMap<String, core::ResourceRequirements> = lists
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|c| Some((c.name.clone(), c.resources.clone()?)))
        .collect();
    let whole = pod.spec().resources.as_ref().map(|asked| status.resources.clone().unwrap_or(asked.clone()));
    pod.with_resources(whole, |name| known.get(name).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;

    fn asking(uid: &str, cpu: &str) -> Pod {
        pod(json!({"metadata": {"uid": uid},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}}))
    }

    #[test]
    fn what_fits_beside_the_others_is_granted() {
        let grants = Grants::default();
        let allocatable = [("cpu".to_owned(), Quantity::parse("2").expect("a quantity"))].into();
        let check = |uid: &str, cpu: &str, want: &str| {
            let got = grants.try_grant(&asking(uid, cpu), &allocatable);
            assert_eq!(got.map_or_else(|pending| pending.message, |()| String::new()), want, "{uid} {cpu}");
        };
        grants.grant(&asking("a", "1"));
        grants.grant(&asking("b", "500m"));
        let mut freed = grants.subscribe();
        check("b", "1", "");
        check(
            "b",
            "1100m",
            "Node didn't have enough resource: cpu, requested: 1100, used: 1000, capacity: 2000",
        );
        check("b", "3", "Node didn't have enough capacity: cpu, requested: 3000, capacity: 2000");
        assert!(!freed.has_changed().expect("it lives"));
        check("a", "900m", "");
        assert!(freed.has_changed().expect("it lives"));
        freed.mark_unchanged();
        check("b", "1100m", "");
        grants.release("a");
        assert!(freed.has_changed().expect("it lives"));
        check("b", "2", "");
    }

    #[test]
    fn room_goes_to_those_that_come_first() {
        let grants = Grants::default();
        let allocatable = [("cpu".to_owned(), Quantity::parse("10").expect("a quantity"))].into();
        let pod = |uid: &str, cpu: i64, priority: i64| {
            pod(json!({"metadata": {"uid": uid}, "spec": {"priority": priority,
                "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}}))
        };
        let used = |uid: &str, cpu, priority| match grants.try_grant(&pod(uid, cpu, priority), &allocatable) {
            Ok(()) => 0,
            Err(pending) => {
                let used = pending.message.split("used: ").nth(1).and_then(|text| text.split(',').next());
                used.and_then(|text| text.parse().ok()).expect("a number")
            }
        };
        for (uid, cpu) in [("full", 6), ("low", 1), ("high", 1), ("late", 1)] {
            grants.grant(&pod(uid, cpu, 0));
        }
        assert_eq!(used("low", 3, 0), 8000);
        assert_eq!(used("late", 4, 0), 8000);
        assert_eq!(used("high", 4, 5), 8000);
        // One unit is free, and one more: not enough for the first, and so the others may have it.
        grants.grant(&pod("full", 5, 0));
        assert_eq!(used("late", 4, 0), 9000, "who waits longer gets it first");
        assert_eq!(used("low", 3, 0), 0);
        assert_eq!(used("low", 1, 0), 0, "what is given back is free again");
        // Now it is enough for the first, who need not be the first to ask.
        grants.grant(&pod("full", 4, 0));
        assert_eq!(used("low", 3, 0), 9000);
        assert_eq!(used("late", 4, 0), 9000);
        grants.withdraw("high");
        assert_eq!(used("low", 3, 0), 9000, "now the one who has waited longer is first");
        assert_eq!(used("late", 4, 0), 0);
    }

    #[test]
    fn a_pod_goes_on_with_what_it_has() {
        let status = json!({"conditions": [{"type": PENDING, "status": "True"}],
            "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                "resources": {"requests": {"cpu": "1"}}}]});
        let patch = json!({"status": status,
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "9"}}}]}});
        let resumed = resumed(pod(patch));
        assert_eq!(resources::pod_request(&resumed, "cpu"), 1000);
        assert!(same(&resumed, &asking("u", "1")) && !same(&resumed, &asking("u", "2")));
        let debugged = pod(json!({"spec": {
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
            "ephemeralContainers": [{"name": "d"}],
        }}));
        assert!(same(&asking("u", "1"), &debugged));
    }
}
