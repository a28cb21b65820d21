use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::pods::tests::{NOW, now, pod, time};
use crate::revisions::tests::template;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn set(change: impl FnOnce(&mut Value)) -> Typed<StatefulSet> {
    let mut value = json!({
        "metadata": { "name": "db", "namespace": "ns", "uid": "sts", "generation": 2 },
        "spec": {
            "replicas": 3,
            "serviceName": "peers",
            "selector": { "matchLabels": { "app": "web" } },
            "updateStrategy": { "type": "RollingUpdate", "rollingUpdate": { "partition": 0 } },
            "podManagementPolicy": "OrderedReady",
            "template": {
                "metadata": { "labels": { "app": "web" } },
                "spec": { "containers": [{ "name": "c", "image": "new" }] },
            },
        },
    });
    change(&mut value["spec"]);
    Typed::new(Object::from_value(Kind::of::<StatefulSet>(), &value).unwrap().into()).unwrap()
}

fn parallel(spec: &mut Value) {
    spec["podManagementPolicy"] = "Parallel".into();
}

/// A set whose pods have a claim of the template `data`, with this policy when deleted and when scaled.
fn with_claims(when_deleted: &str, when_scaled: &str) -> Typed<StatefulSet> {
    set(|spec| {
        parallel(spec);
        spec["volumeClaimTemplates"] = json!([{
            "metadata": { "name": "data", "labels": { "tier": "gold" } },
            "spec": { "accessModes": ["ReadWriteOnce"] },
        }]);
        spec["persistentVolumeClaimRetentionPolicy"] =
            json!({ "whenDeleted": when_deleted, "whenScaled": when_scaled });
    })
}

/// A ready pod of this version.
fn member(ordinal: i32, version: &str, change: impl FnOnce(&mut Value)) -> Member {
    let name = format!("db-{ordinal}");
    let pod = pod(&name, |value| {
        value["metadata"]["labels"] = json!({ "app": "web", POD_REVISION: version, POD_NAME: name });
        change(value);
    });
    Member { going: false, ordinal, pod }
}

fn good(ordinal: i32) -> Member {
    member(ordinal, "new", |_| {})
}

fn unready(pod: &mut Value) {
    pod["status"]["conditions"][0]["status"] = "False".into();
}

fn bad(ordinal: i32) -> Member {
    member(ordinal, "new", unready)
}

fn going(member: Member) -> Member {
    Member { going: true, ..member }
}

fn claim(name: &str, owners: Value) -> Claim {
    let value = json!({ "metadata": { "name": name, "namespace": "ns", "uid": name, "ownerReferences": owners }, "spec": {} });
    Typed::new(Object::from_value(Kind::of::<PersistentVolumeClaim>(), &value).unwrap().into()).unwrap()
}

fn decide_with(
    set: &Typed<StatefulSet>,
    members: &[Member],
    claim: &(dyn Fn(&str) -> Option<Claim> + Sync),
) -> Plan {
    let version = |name: &str| Version { name: name.to_owned(), template: template(name) };
    let status = set.status.clone().unwrap_or_default();
    plan(&World {
        set: &set.object,
        spec: &set.spec,
        status: &status,
        members,
        current: &version("old"),
        update: &version("new"),
        claim,
        now: now(),
    })
}

fn decide(set: &Typed<StatefulSet>, members: &[Member]) -> Plan {
    decide_with(set, members, &|_| None)
}

#[track_caller]
fn check(set: &Typed<StatefulSet>, members: &[Member], create: &[&str], delete: &[&str]) {
    let plan = decide(set, members);
    let made: Vec<&str> = plan.create.iter().map(|(missing, _)| missing.pod.as_str()).collect();
    let gone: Vec<&str> = plan.delete.iter().map(|at| members[*at].name()).collect();
    assert_eq!((made, gone), (create.to_vec(), delete.to_vec()));
}

#[test]
fn an_ordered_set_grows_one_by_one() {
    let set = set(|_| {});
    check(&set, &[], &["db-0"], &[]);
    check(&set, &[bad(0)], &[], &[]);
    check(&set, &[good(0)], &["db-1"], &[]);
    check(&set, &[good(0), going(good(1))], &[], &[]);
    check(&set, &[good(0), good(2)], &["db-1"], &[]);
    check(&set, &[good(0), good(1), good(2)], &[], &[]);
    let ended = member(1, "new", |p| p["status"]["phase"] = "Failed".into());
    check(&set, &[good(0), ended, good(2)], &[], &["db-1"]);
    let ended = member(1, "new", |p| p["status"]["phase"] = "Succeeded".into());
    check(&set, &[good(0), going(ended)], &[], &[]);
}

#[test]
fn an_ordered_set_shrinks_from_the_end() {
    let one = set(|spec| spec["replicas"] = 1.into());
    check(&one, &[good(0), good(1), good(2)], &[], &["db-2"]);
    check(&one, &[good(0), good(1), going(good(2))], &[], &[]);
    check(&one, &[good(0), bad(1), good(2)], &[], &["db-2"]);
    // The one that is in the way goes, the others wait for it.
    check(&one, &[good(0), good(1), bad(2)], &[], &["db-2"]);
    check(&one, &[good(0), bad(1), bad(2)], &[], &[]);
    check(&one, &[bad(0), good(1)], &[], &[]);
    check(&set(|spec| spec["replicas"] = 0.into()), &[good(0)], &[], &["db-0"]);
}

#[test]
fn a_parallel_set_does_all_at_once() {
    check(&set(parallel), &[], &["db-0", "db-1", "db-2"], &[]);
    check(&set(parallel), &[bad(1)], &["db-0", "db-2"], &[]);
    let one = set(|spec| {
        parallel(spec);
        spec["replicas"] = 1.into();
    });
    check(&one, &[bad(0), bad(1), good(2), going(good(3))], &[], &["db-2", "db-1"]);
}

#[test]
fn ordinals_may_start_anywhere() {
    let from_five = |spec: &mut Value| spec["ordinals"] = json!({ "start": 5 });
    check(&set(from_five), &[], &["db-5"], &[]);
    check(&set(from_five), &[good(5), good(6), good(7)], &[], &[]);
    check(&set(from_five), &[good(5), good(6), good(7), good(0)], &[], &["db-0"]);
    let kept = set(|spec| {
        from_five(spec);
        parallel(spec);
        spec["updateStrategy"]["rollingUpdate"]["partition"] = 1.into();
    });
    let plan = decide(&kept, &[]);
    let images: Vec<_> =
        plan.create.iter().map(|(_, pod)| pod["spec"]["containers"][0]["image"].clone()).collect();
    assert_eq!(images, ["old", "new", "new"]);
}

#[test]
fn a_rollout_goes_down_the_ordinals() {
    let old = |ordinal| member(ordinal, "old", |_| {});
    check(&set(|_| {}), &[old(0), old(1), old(2)], &[], &["db-2"]);
    check(&set(|_| {}), &[old(0), old(1), going(old(2))], &[], &[]);
    check(&set(|_| {}), &[old(0), old(1), bad(2)], &[], &[]);
    check(&set(|_| {}), &[old(0), old(1), good(2)], &[], &["db-1"]);
    check(
        &set(|spec| spec["updateStrategy"] = json!({ "type": "OnDelete" })),
        &[old(0), old(1), old(2)],
        &[],
        &[],
    );
    let from_two = set(|spec| spec["updateStrategy"]["rollingUpdate"]["partition"] = 2.into());
    check(&from_two, &[old(0), old(1), old(2)], &[], &["db-2"]);
    check(&from_two, &[old(0), old(1), good(2)], &[], &[]);
    let two_at_once =
        |spec: &mut Value| spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"] = "70%".into();
    check(&set(two_at_once), &[old(0), old(1), old(2)], &[], &["db-2", "db-1"]);
    let ready_for = set(|spec| spec["minReadySeconds"] = 60.into());
    let fresh = member(2, "new", |p| p["status"]["conditions"][0]["lastTransitionTime"] = time(50).into());
    let waiting = decide(&ready_for, &[old(0), old(1), fresh]);
    assert_eq!((waiting.delete.len(), waiting.due.map(|at| at.as_second())), (0, Some(NOW + 10)));
}

#[test]
fn a_parallel_rollout_gets_past_pods_that_do_not_work() {
    let old = |ordinal| member(ordinal, "old", |_| {});
    let broken = |ordinal| member(ordinal, "old", unready);
    check(&set(parallel), &[old(0), old(1), old(2)], &[], &["db-2"]);
    check(&set(parallel), &[broken(0), old(1), broken(2)], &[], &["db-2", "db-0"]);
    check(&set(parallel), &[old(0), old(1), bad(2)], &[], &[]);
    // An ordered set waits for the pod, as it would in growing.
    check(&set(|_| {}), &[broken(0), old(1), old(2)], &[], &[]);
}

#[test]
fn a_pod_has_its_identity() {
    let set = set(|spec| {
        spec["volumeClaimTemplates"] = json!([{ "metadata": { "name": "data" }, "spec": {} }]);
        spec["template"]["spec"]["volumes"] =
            json!([{ "name": "tmp", "emptyDir": {} }, { "name": "data", "emptyDir": {} }]);
    });
    let version = Version { name: "db-abc".to_owned(), template: set.spec.template.clone() };
    let status = StatefulSetStatus::default();
    let (spec, claim) = (&set.spec, |_: &str| None);
    let world = World {
        set: &set.object,
        spec,
        status: &status,
        members: &[],
        current: &version,
        update: &version,
        claim: &claim,
        now: now(),
    };
    let pod = pod_of(&world, &version, 1);
    assert_eq!(pod["metadata"]["name"], "db-1");
    assert_eq!(pod["metadata"]["generateName"], "db-");
    assert_eq!(
        pod["metadata"]["labels"],
        json!({ "app": "web", POD_REVISION: "db-abc", POD_NAME: "db-1", POD_INDEX: "1" })
    );
    assert_eq!((&pod["spec"]["hostname"], &pod["spec"]["subdomain"]), (&"db-1".into(), &"peers".into()));
    assert_eq!(
        pod["spec"]["volumes"],
        json!([{ "name": "data", "persistentVolumeClaim": { "claimName": "data-db-1" } }, { "name": "tmp", "emptyDir": {} }])
    );
    let anonymous =
        member(0, "new", |p| _ = p["metadata"]["labels"].as_object_mut().unwrap().remove(POD_NAME));
    assert_eq!(decide(&set, &[anonymous]).label, [0]);
}

#[test]
fn names_tell_ordinals() {
    let ordinal = |pod: &str| ordinal_of("db", pod);
    assert_eq!((ordinal("db-0"), ordinal("db-12")), (Some(0), Some(12)));
    for other in ["db", "db-", "db-x", "db-01", "db--1", "dbx-1", "db-1-2", "db-99999999999"] {
        assert_eq!(ordinal(other), None, "{other}");
    }
    let set = with_claims("Retain", "Retain");
    assert!(makes_claim(&set, "data-db-0"));
    assert!(!makes_claim(&set, "data-db") && !makes_claim(&set, "other-db-0"));
}

#[test]
fn claims_come_before_their_pod_and_stay() {
    let set = with_claims("Retain", "Retain");
    let first = decide(&set, &[]).create.remove(0).0;
    let metadata = &first.claims[0]["metadata"];
    assert_eq!((first.claims.len(), &metadata["name"]), (1, &"data-db-0".into()));
    assert_eq!(metadata["labels"], json!({ "app": "web", "tier": "gold" }));
    assert_eq!(first.claims[0]["spec"]["accessModes"][0], "ReadWriteOnce");
    assert_eq!(metadata["ownerReferences"], json!([]));
    let there = decide_with(&set, &[], &|name| Some(claim(name, json!([]))));
    assert!(there.create.iter().all(|(missing, _)| missing.claims.is_empty()));
    // A pod that waits for a claim that somebody deleted.
    let pending = member(0, "new", |p| p["status"] = json!({ "phase": "Pending" }));
    assert_eq!(decide(&set, &[pending]).claims[0].claims[0]["metadata"]["name"], "data-db-0");
    let leaving = |name: &str| {
        let mut value = claim(name, json!([])).object.value();
        value["metadata"]["deletionTimestamp"] = time(0).into();
        value["metadata"]["finalizers"] = json!(["kubernetes.io/pvc-protection"]);
        Typed::new(Object::from_value(Kind::of::<PersistentVolumeClaim>(), &value).unwrap().into())
    };
    let refused = decide_with(&set, &[good(1), good(2)], &leaving);
    let why = "pvc data-db-0 is being deleted".to_owned();
    assert_eq!((refused.create.len(), &refused.refuse[..]), (0, &[("db-0".to_owned(), why)][..]));
    let old_pod =
        json!([{ "apiVersion": "v1", "kind": "Pod", "name": "db-0", "uid": "earlier", "controller": true }]);
    let stale = decide_with(&set, &[good(1), good(2)], &|name| Some(claim(name, old_pod.clone())));
    assert_eq!((stale.create.len(), stale.refuse.len()), (0, 0), "the claim of the pod before goes first");
}

/// The kinds of the owners that each claim gets, of a set of one replica with pods 0 and 1.
#[track_caller]
fn check_owners(when_deleted: &str, when_scaled: &str, present: Value, want: [Option<&[&str]>; 2]) {
    let mut value = with_claims(when_deleted, when_scaled).object.value();
    value["spec"]["replicas"] = 1.into();
    let set = Typed::new(Object::from_value(Kind::of::<StatefulSet>(), &value).unwrap().into()).unwrap();
    let plan = decide_with(&set, &[good(0), good(1)], &|name| Some(claim(name, present.clone())));
    assert_eq!(plan.delete, [1], "claims are settled before their pod is deleted");
    for (name, want) in ["data-db-0", "data-db-1"].iter().zip(want) {
        let owned = plan.own.iter().find(|owned| owned.name == *name);
        let kinds = owned.map(|owned| {
            let owners = owned.body["metadata"]["ownerReferences"].as_array().unwrap();
            owners.iter().map(|owner| owner["kind"].as_str().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(kinds.as_deref(), want, "{name}");
    }
}

#[test]
fn claims_are_owned_by_the_policy() {
    let nobody = || json!([]);
    let by_set = || json!([{ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "sts", "controller": true, "blockOwnerDeletion": true }]);
    check_owners("Retain", "Retain", nobody(), [None, None]);
    check_owners("Delete", "Retain", nobody(), [Some(&["StatefulSet"]), Some(&["StatefulSet"])]);
    check_owners("Retain", "Delete", nobody(), [None, Some(&["Pod"])]);
    check_owners("Delete", "Delete", nobody(), [Some(&["StatefulSet"]), Some(&["Pod"])]);
    check_owners("Delete", "Delete", by_set(), [None, Some(&["Pod"])]);
    check_owners("Retain", "Retain", by_set(), [Some(&[]), Some(&[])]);
    // Another controller's claim is left to it, and somebody's who is none is shared.
    let other = |controller: bool| json!([{ "apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "x", "controller": controller }]);
    check_owners("Delete", "Delete", other(true), [None, None]);
    check_owners(
        "Delete",
        "Retain",
        other(false),
        [Some(&["ConfigMap", "StatefulSet"]), Some(&["ConfigMap", "StatefulSet"])],
    );
    let earlier = json!([{ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "earlier", "controller": true }]);
    check_owners("Delete", "Retain", earlier, [Some(&[]), Some(&[])]);
}

#[test]
fn the_status_counts_versions() {
    let ready_for = set(|spec| spec["minReadySeconds"] = 60.into());
    let fresh = |pod: &mut Value| pod["status"]["conditions"][0]["lastTransitionTime"] = time(50).into();
    let members = [member(0, "old", |_| {}), going(member(1, "old", |_| {})), member(2, "new", fresh)];
    assert_eq!(
        serde_json::to_value(decide(&ready_for, &members).status).unwrap(),
        json!({ "observedGeneration": 2, "replicas": 3, "readyReplicas": 3, "availableReplicas": 2, "currentReplicas": 1,
            "updatedReplicas": 1, "currentRevision": "old", "updateRevision": "new", "collisionCount": 0 })
    );
    let done = decide(&set(|_| {}), &[good(0), good(1), good(2)]).status;
    assert_eq!((done.current_revision.as_deref(), done.current_replicas), (Some("new"), Some(3)));
    let partial = decide(&set(|_| {}), &[good(0), good(1)]).status;
    assert_eq!((partial.current_revision.as_deref(), partial.current_replicas), (Some("old"), None));
}

/// A set whose kubelets do one thing at a time, in any order.
struct Model {
    set: Typed<StatefulSet>,
    members: Vec<Member>,
    claims: BTreeSet<String>,
    rng: StdRng,
}

impl Model {
    fn pass(&mut self) -> bool {
        let claims = self.claims.clone();
        let plan = decide_with(&self.set, &self.members, &|name| Some(claim(claims.get(name)?, json!([]))));
        for (missing, pod) in &plan.create {
            let names =
                missing.claims.iter().map(|claim| claim["metadata"]["name"].as_str().unwrap().to_owned());
            self.claims.extend(names);
            let ordinal = ordinal_of("db", &missing.pod).unwrap();
            assert!(self.members.iter().all(|member| member.ordinal != ordinal), "two pods of one ordinal");
            let version = pod["metadata"]["labels"][POD_REVISION].as_str().unwrap().to_owned();
            self.members.push(member(ordinal, &version, unready));
        }
        plan.delete.iter().for_each(|at| self.members[*at].going = true);
        !plan.create.is_empty() || !plan.delete.is_empty()
    }

    fn kubelet(&mut self) -> bool {
        let busy: Vec<usize> = (0..self.members.len())
            .filter(|at| self.members[*at].going || !self.members[*at].is_ready())
            .collect();
        if busy.is_empty() {
            return false;
        }
        let at = busy[self.rng.random_range(0..busy.len())];
        if self.members[at].going {
            self.members.remove(at);
        } else {
            let version = self.members[at].revision().to_owned();
            self.members[at] = member(self.members[at].ordinal, &version, |_| {});
        }
        true
    }

    fn serving(&self) -> usize {
        self.members.iter().filter(|member| !member.going && member.is_ready()).count()
    }

    /// Lets everything happen until nothing does, looking at `holds` after each step.
    fn settle(&mut self, holds: impl Fn(&Model)) {
        for _ in 0..1000 {
            let acted = self.pass();
            holds(self);
            let moved = (!acted || self.rng.random_bool(0.7)) && self.kubelet();
            holds(self);
            if !acted && !moved {
                return;
            }
        }
        panic!("does not settle");
    }
}

#[test]
fn any_set_settles_within_its_limits() {
    for seed in 0..30 {
        for (policy, unavailable, partition) in
            [("OrderedReady", 1, 0), ("OrderedReady", 2, 1), ("Parallel", 1, 0), ("Parallel", 3, 2)]
        {
            let change = |replicas: usize| {
                let mut value = with_claims("Retain", "Retain").object.value();
                value["spec"]["podManagementPolicy"] = policy.into();
                value["spec"]["replicas"] = replicas.into();
                value["spec"]["updateStrategy"]["rollingUpdate"] =
                    json!({ "partition": partition, "maxUnavailable": unavailable });
                Typed::new(Object::from_value(Kind::of::<StatefulSet>(), &value).unwrap().into()).unwrap()
            };
            let members = (0..5).map(|ordinal| member(ordinal, "old", |_| {})).collect();
            let rng = StdRng::seed_from_u64(seed);
            let mut model = Model { set: change(5), members, claims: BTreeSet::new(), rng };
            model.settle(|model| {
                assert!(
                    model.serving() + unavailable >= 5,
                    "{} of 5 serve, {unavailable} need not",
                    model.serving()
                );
            });
            let versions: BTreeMap<i32, &str> =
                model.members.iter().map(|m| (m.ordinal, m.revision())).collect();
            assert!(
                versions.iter().all(|(n, version)| (*version == "new") == (*n >= partition)),
                "{versions:?}"
            );
            // Ordered sets have one in the making at a time, and one on its way out.
            model.set = change(8);
            model.settle(|model| assert!(policy == "Parallel" || model.members.len() - model.serving() <= 1));
            model.set = change(2);
            model.settle(|model| assert!(policy == "Parallel" || model.members.len() - model.serving() <= 1));
            assert_eq!(model.members.iter().map(|m| m.ordinal).collect::<BTreeSet<_>>(), [0, 1].into());
            assert!((5..8).all(|n| model.claims.contains(&format!("data-db-{n}"))), "claims stay");
        }
    }
}
