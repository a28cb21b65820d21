use super::*;
use crate::pods::tests::{NOW, now, pod, time};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

fn set(change: impl FnOnce(&mut Value)) -> Typed<DaemonSet> {
    let mut value = json!({
        "metadata": { "name": "agent", "namespace": "ns", "uid": "ds", "generation": 3 },
        "spec": {
            "selector": { "matchLabels": { "app": "agent" } },
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "maxUnavailable": 1, "maxSurge": 0 } },
            "template": {
                "metadata": { "labels": { "app": "agent" } },
                "spec": { "containers": [{ "name": "c", "image": "i" }] },
            },
        },
    });
    change(&mut value);
    Typed::new(Object::from_value(Kind::of::<DaemonSet>(), &value).unwrap().into()).unwrap()
}

fn node(name: &str, change: impl FnOnce(&mut Value)) -> Typed<Node> {
    let mut value = json!({ "metadata": { "name": name, "labels": { "disk": "ssd" } }, "spec": {} });
    change(&mut value);
    Typed::new(Object::from_value(Kind::of::<Node>(), &value).unwrap().into()).unwrap()
}

fn taint(effect: &str) -> Value {
    json!([{ "key": "team", "value": "a", "effect": effect }])
}

/// A ready pod of this revision on a node; its name begins with the node's.
fn daemon(name: &str, revision: &str, change: impl FnOnce(&mut Value)) -> Daemon {
    let on = name.split('-').next().unwrap().to_owned();
    let pod = pod(name, |value| {
        value["metadata"]["labels"] = json!({ "app": "agent", POD_REVISION: revision });
        value["spec"]["nodeName"] = on.into();
        change(value);
    });
    Daemon { going: pod.object.deleted().is_some(), pod }
}

fn unready(pod: &mut Value) {
    pod["status"]["conditions"][0]["status"] = "False".into();
}

fn going(mut daemon: Daemon) -> Daemon {
    daemon.going = true;
    daemon
}

fn decide(set: &Typed<DaemonSet>, nodes: &[Typed<Node>], daemons: &[Daemon]) -> Plan {
    plan(&World { set, nodes, daemons, hash: "new", held: &|_| None, now: now() })
}

#[track_caller]
fn check(
    set: &Typed<DaemonSet>,
    nodes: &[Typed<Node>],
    daemons: &[Daemon],
    create: &[&str],
    delete: &[&str],
) {
    let mut plan = decide(set, nodes, daemons);
    plan.delete.sort();
    assert_eq!(plan.create, create);
    assert_eq!(plan.delete, delete.iter().map(|name| format!("uid-{name}")).collect::<Vec<_>>());
}

fn plain(name: &str) -> Typed<Node> {
    node(name, |_| {})
}

#[test]
fn every_node_that_wants_one_gets_one() {
    let nodes = [plain("n1"), plain("n2")];
    check(&set(|_| {}), &nodes, &[], &["n1", "n2"], &[]);
    check(&set(|_| {}), &nodes, &[daemon("n1-a", "new", |_| {})], &["n2"], &[]);
    let selecting = set(|s| s["spec"]["template"]["spec"]["nodeSelector"] = json!({ "disk": "hdd" }));
    let mixed = [plain("n1"), node("n2", |n| n["metadata"]["labels"]["disk"] = "hdd".into())];
    check(&selecting, &mixed, &[], &["n2"], &[]);
    check(&selecting, &mixed, &[daemon("n1-a", "new", |_| {})], &["n2"], &["n1-a"]);
    let named = set(|s| s["spec"]["template"]["spec"]["nodeName"] = "n1".into());
    check(&named, &nodes, &[], &["n1"], &[]);
}

#[test]
fn taints_keep_pods_away_unless_they_are_borne() {
    let no_schedule = [node("n1", |n| n["spec"]["taints"] = taint("NoSchedule"))];
    check(&set(|_| {}), &no_schedule, &[], &[], &[]);
    check(&set(|_| {}), &no_schedule, &[daemon("n1-a", "new", |_| {})], &[], &[]);
    let no_execute = [node("n1", |n| n["spec"]["taints"] = taint("NoExecute"))];
    check(&set(|_| {}), &no_execute, &[daemon("n1-a", "new", |_| {})], &[], &["n1-a"]);
    let bearing = set(|s| {
        s["spec"]["template"]["spec"]["tolerations"] = json!([{ "key": "team", "operator": "Exists" }])
    });
    check(&bearing, &no_schedule, &[], &["n1"], &[]);
    let trouble = |key: &str, effect: &str| {
        let taints = json!([{ "key": format!("node.kubernetes.io/{key}"), "effect": effect }]);
        [node("n1", |n| n["spec"]["taints"] = taints)]
    };
    for (key, effect) in [
        ("not-ready", "NoExecute"),
        ("unreachable", "NoExecute"),
        ("disk-pressure", "NoSchedule"),
        ("memory-pressure", "NoSchedule"),
        ("pid-pressure", "NoSchedule"),
        ("unschedulable", "NoSchedule"),
    ] {
        check(&set(|_| {}), &trouble(key, effect), &[], &["n1"], &[]);
    }
    let network = trouble("network-unavailable", "NoSchedule");
    check(&set(|_| {}), &network, &[], &[], &[]);
    check(&set(|s| s["spec"]["template"]["spec"]["hostNetwork"] = true.into()), &network, &[], &["n1"], &[]);
}

#[test]
fn a_node_keeps_its_oldest_pod_and_none_that_ended() {
    let nodes = [plain("n1")];
    let younger = daemon("n1-b", "new", |p| p["metadata"]["creationTimestamp"] = time(5).into());
    check(&set(|_| {}), &nodes, &[younger, daemon("n1-a", "new", |_| {})], &[], &["n1-b"]);
    let failed = daemon("n1-a", "new", |p| p["status"]["phase"] = "Failed".into());
    let plan = decide(&set(|_| {}), &nodes, &[failed]);
    assert_eq!((plan.delete.len(), &plan.failed[..]), (1, &["n1".to_owned()][..]));
    let told = "Found failed daemon pod ns/n1-a on node n1, will try to kill it";
    assert_eq!(plan.tell, [(true, "FailedDaemonPod", told.to_owned())]);
    let done = daemon("n1-a", "new", |p| p["status"]["phase"] = "Succeeded".into());
    let plan = decide(&set(|_| {}), &nodes, &[done]);
    let told = "Found succeeded daemon pod ns/n1-a on node n1, will try to delete it";
    assert_eq!((plan.delete.len(), plan.tell), (1, vec![(false, "SucceededDaemonPod", told.to_owned())]));
    // One that goes is waited for, unless it only waits to be removed.
    check(&set(|_| {}), &nodes, &[going(daemon("n1-a", "new", |_| {}))], &[], &[]);
    let over = going(daemon("n1-a", "new", |p| p["status"]["phase"] = "Failed".into()));
    check(&set(|_| {}), &nodes, &[over], &["n1"], &[]);
}

#[test]
fn a_failed_pod_is_left_for_a_while() {
    let until = Timestamp::from_second(NOW + 8).unwrap();
    let failed = [daemon("n1-a", "new", |p| p["status"]["phase"] = "Failed".into())];
    let (set, nodes) = (set(|_| {}), [plain("n1")]);
    let held = |_: &str| Some(until);
    let world = World { set: &set, nodes: &nodes, daemons: &failed, hash: "new", held: &held, now: now() };
    let waiting = plan(&world);
    assert_eq!((waiting.delete.len(), waiting.due), (0, Some(until)));
    assert_eq!(plan(&World { now: until, ..world }).delete, ["uid-n1-a"]);
}

#[test]
fn failures_hold_longer_each_time() {
    let controller = DaemonSets::default();
    let (set, mut at): (Arc<str>, _) = ("ds".into(), now());
    assert_eq!(controller.held(&set, "n1"), None);
    for seconds in [1, 2, 4, 8] {
        controller.note_failures(&set, vec!["n1".to_owned()], at);
        let until = controller.held(&set, "n1").unwrap();
        assert_eq!(until.as_second() - at.as_second(), seconds);
        at = until;
    }
    assert_eq!(controller.held(&set, "n2"), None);
    let later = at + Duration::from_secs(3600);
    controller.note_failures(&set, vec!["n2".to_owned()], later);
    assert_eq!(controller.held(&set, "n1"), None, "what is long ago is forgotten");
}

#[test]
fn pods_for_nodes_that_are_gone_are_not_waited_for() {
    let waiting = daemon("n9-a", "new", |p| {
        p["spec"]["nodeName"] = Value::Null;
        let term = json!({ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["n9"] }] });
        p["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
            json!({ "nodeSelectorTerms": [term] });
    });
    check(&set(|_| {}), &[plain("n1")], &[waiting, daemon("n1-a", "new", |_| {})], &[], &["n9-a"]);
    check(
        &set(|_| {}),
        &[plain("n1")],
        &[daemon("n9-a", "new", |_| {}), daemon("n1-a", "new", |_| {})],
        &[],
        &[],
    );
}

#[test]
fn a_rollout_replaces_as_many_as_may_be_unavailable() {
    let nodes = [plain("n1"), plain("n2"), plain("n3"), plain("n4")];
    let old = |names: &[&str]| names.iter().map(|name| daemon(name, "old", |_| {})).collect::<Vec<_>>();
    let all = old(&["n1-a", "n2-a", "n3-a", "n4-a"]);
    check(&set(|_| {}), &nodes, &all, &[], &["n1-a"]);
    let half = set(|s| s["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] = "50%".into());
    check(&half, &nodes, &all, &[], &["n1-a", "n2-a"]);
    check(&set(|s| s["spec"]["updateStrategy"] = json!({ "type": "OnDelete" })), &nodes, &all, &[], &[]);
    // What does not work anyway goes at once, and counts.
    let mut one_bad = old(&["n1-a", "n2-a", "n4-a"]);
    one_bad.push(daemon("n3-a", "old", unready));
    check(&set(|_| {}), &nodes, &one_bad, &[], &["n3-a"]);
    let mut under_way = old(&["n1-a", "n2-a", "n3-a"]);
    under_way.push(going(daemon("n4-a", "old", |_| {})));
    check(&set(|_| {}), &nodes, &under_way, &[], &[]);
    under_way[3] = daemon("n4-b", "new", unready);
    check(&set(|_| {}), &nodes, &under_way, &[], &[]);
    under_way[3] = daemon("n4-b", "new", |_| {});
    check(&set(|_| {}), &nodes, &under_way, &[], &["n1-a"]);
    // The old way of telling which pods are new.
    let counting = set(|s| s["metadata"]["annotations"] = json!({ TEMPLATE_GENERATION: "2" }));
    let counted = daemon("n1-a", "x", |p| p["metadata"]["labels"][POD_GENERATION] = "2".into());
    check(&counting, &nodes[..1], &[counted], &[], &[]);
}

#[test]
fn a_surging_rollout_never_lacks_a_pod() {
    let surging =
        set(|s| s["spec"]["updateStrategy"]["rollingUpdate"] = json!({ "maxSurge": 1, "maxUnavailable": 0 }));
    let nodes = [plain("n1"), plain("n2")];
    let old = || vec![daemon("n1-a", "old", |_| {}), daemon("n2-a", "old", |_| {})];
    check(&surging, &nodes, &old(), &["n1"], &[]);
    let with = |daemon: Daemon| old().into_iter().chain([daemon]).collect::<Vec<_>>();
    check(&surging, &nodes, &with(daemon("n1-b", "new", unready)), &[], &[]);
    check(&surging, &nodes, &with(daemon("n1-b", "new", |_| {})), &[], &["n1-a"]);
    check(&surging, &nodes, &with(going(daemon("n1-b", "new", |_| {}))), &["n1"], &[]);
    // An old pod that does not work is replaced whatever the limit.
    let broken = [daemon("n1-a", "old", unready), daemon("n2-a", "old", unready)];
    check(&surging, &nodes, &broken, &["n1", "n2"], &[]);
    let doubled =
        [daemon("n1-a", "old", unready), daemon("n1-b", "new", unready), daemon("n2-a", "new", |_| {})];
    check(&surging, &nodes, &doubled, &[], &["n1-a"]);
    // A node that would get none any more keeps its pod while there are not enough others.
    let tainted = [node("n1", |n| n["spec"]["taints"] = taint("NoSchedule")), plain("n2")];
    let waiting = [daemon("n1-a", "old", |_| {}), daemon("n2-a", "new", unready)];
    check(&surging, &tainted, &waiting, &[], &[]);
    let enough = [daemon("n1-a", "old", |_| {}), daemon("n2-a", "new", |_| {})];
    check(&surging, &tainted, &enough, &[], &["n1-a"]);
}

#[test]
fn the_status_counts_nodes() {
    let nodes =
        [plain("n1"), plain("n2"), plain("n3"), node("n4", |n| n["spec"]["taints"] = taint("NoSchedule"))];
    let daemons = [
        daemon("n1-a", "new", |_| {}),
        daemon("n2-a", "old", |p| p["status"]["conditions"][0]["lastTransitionTime"] = time(5).into()),
        daemon("n4-a", "old", |_| {}),
    ];
    let plan = decide(&set(|s| s["spec"]["minReadySeconds"] = 15.into()), &nodes, &daemons);
    assert_eq!(
        serde_json::to_value(&plan.status).unwrap(),
        json!({ "desiredNumberScheduled": 3, "currentNumberScheduled": 2, "numberMisscheduled": 1, "numberReady": 2,
            "numberAvailable": 1, "numberUnavailable": 2, "updatedNumberScheduled": 1, "observedGeneration": 3 })
    );
    assert_eq!(plan.due.map(|at| at.as_second()), Some(NOW + 10));
}

#[test]
fn a_pod_is_made_for_one_node() {
    let set = set(|s| {
        s["metadata"]["annotations"] = json!({ TEMPLATE_GENERATION: "2" });
        let required = json!({ "nodeSelectorTerms": [{ "matchExpressions": [{ "key": "disk", "operator": "Exists" }] }] });
        let preferred = json!([{ "weight": 1, "preference": {} }]);
        s["spec"]["template"]["spec"]["affinity"] = json!({ "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": required,
            "preferredDuringSchedulingIgnoredDuringExecution": preferred,
        } });
    });
    let pod = pod_for(&set, "abc", "n7");
    assert_eq!(
        pod["metadata"]["labels"],
        json!({ "app": "agent", POD_REVISION: "abc", POD_GENERATION: "2" })
    );
    assert_eq!(pod["metadata"]["generateName"], "agent-");
    let affinity = &pod["spec"]["affinity"]["nodeAffinity"];
    let field = json!({ "key": "metadata.name", "operator": "In", "values": ["n7"] });
    assert_eq!(
        affinity["requiredDuringSchedulingIgnoredDuringExecution"],
        json!({ "nodeSelectorTerms": [{ "matchFields": [field] }] })
    );
    assert_eq!(affinity["preferredDuringSchedulingIgnoredDuringExecution"][0]["weight"], 1);
    assert_eq!(pod["spec"]["tolerations"].as_array().map(Vec::len), Some(6));
    let spec: PodSpec = serde_json::from_value(pod["spec"].clone()).unwrap();
    assert!(placement::selects_node(&spec, "n7", &BTreeMap::new()));
    assert!(!placement::selects_node(&spec, "n8", &BTreeMap::new()));
}

/// A few nodes whose kubelets do one thing at a time, in any order.
struct Model {
    set: Typed<DaemonSet>,
    nodes: Vec<Typed<Node>>,
    daemons: Vec<Daemon>,
    made: usize,
    rng: StdRng,
}

impl Model {
    fn pass(&mut self) -> bool {
        let plan = decide(&self.set, &self.nodes, &self.daemons);
        for uid in &plan.delete {
            let doomed = self.daemons.iter_mut().find(|daemon| daemon.pod.object.uid() == uid);
            doomed.unwrap().going = true;
        }
        for node in &plan.create {
            self.made += 1;
            let name = format!("{node}-new{}", self.made);
            self.daemons.push(daemon(&name, "new", unready));
        }
        !plan.delete.is_empty() || !plan.create.is_empty()
    }

    fn kubelet(&mut self) -> bool {
        let idle = |daemon: &Daemon| !daemon.going && pods::is_ready(&daemon.pod);
        let busy: Vec<usize> = (0..self.daemons.len()).filter(|at| !idle(&self.daemons[*at])).collect();
        if busy.is_empty() {
            return false;
        }
        let at = busy[self.rng.random_range(0..busy.len())];
        if self.daemons[at].going {
            self.daemons.remove(at);
        } else {
            let name = self.daemons[at].pod.object.name().to_owned();
            self.daemons[at] = daemon(&name, "new", |_| {});
        }
        true
    }

    fn available(&self) -> usize {
        let on = |node: &Typed<Node>| {
            let here = self.daemons.iter().filter(|daemon| daemon.node() == Some(node.object.name()));
            here.into_iter().any(|daemon| !daemon.going && pods::is_ready(&daemon.pod))
        };
        self.nodes.iter().filter(|node| on(node)).count()
    }
}

#[test]
fn any_rollout_settles_within_its_limits() {
    for seed in 0..40 {
        for (surge, unavailable) in [(0, 1), (0, 2), (0, 5), (1, 0), (3, 0)] {
            let nodes: Vec<_> = (1..=4).map(|n| plain(&format!("n{n}"))).collect();
            let daemons = (1..=4).map(|n| daemon(&format!("n{n}-old"), "old", |_| {})).collect();
            let limits = json!({ "maxSurge": surge, "maxUnavailable": unavailable });
            let set = set(|s| s["spec"]["updateStrategy"]["rollingUpdate"] = limits);
            let mut model = Model { set, nodes, daemons, made: 0, rng: StdRng::seed_from_u64(seed) };
            let mut steps = 0;
            // Whether the controller or a kubelet is quicker is left to chance.
            while model.pass() | (model.rng.random_bool(0.7) && model.kubelet()) || model.kubelet() {
                steps += 1;
                assert!(steps < 1000, "does not settle");
                assert!(
                    model.available() + unavailable >= 4,
                    "{} available, {unavailable} may be missing",
                    model.available()
                );
                let staying = model.daemons.iter().filter(|daemon| !daemon.going).count();
                assert!(staying <= 4 + surge, "{staying} pods, surge {surge}");
            }
            assert!(model.daemons.iter().all(|d| d.pod.object.labels().get(POD_REVISION) == Some("new")));
            assert_eq!(model.daemons.len(), 4);
        }
    }
}
