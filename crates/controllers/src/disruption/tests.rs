use super::*;
use crate::pods::tests::{NOW, now, pod, time as ago};
use serde_json::Value;

fn budget(spec: Value, status: Value) -> Typed<PodDisruptionBudget> {
    let budget = json!({
        "metadata": { "name": "b", "namespace": "ns", "uid": "b", "generation": 2 }, "spec": spec, "status": status,
    });
    Typed::new(Object::from_value(Kind::of::<PodDisruptionBudget>(), &budget).unwrap().into()).unwrap()
}

fn ready(count: usize) -> Vec<Typed<Pod>> {
    (0..count).map(|n| pod(&format!("p{n}"), |_| {})).collect()
}

/// Currently healthy, desired, expected, allowed.
#[track_caller]
fn check(spec: Value, pods: &[Typed<Pod>], expected: i32, want: [i32; 4]) {
    let budget = budget(spec, Value::Null);
    let plan = plan(&budget, pods, || Ok(Expected { pods: expected, unmanaged: false }), now());
    let status = &plan.status;
    let counts =
        [status.current_healthy, status.desired_healthy, status.expected_pods, status.disruptions_allowed];
    assert_eq!(counts.map(Option::unwrap), want);
    let condition = &status.conditions.as_ref().unwrap()[0];
    let (holds, reason) =
        if want[3] > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    assert_eq!((condition.status.as_str(), condition.reason.as_str()), (holds, reason));
    assert_eq!((status.observed_generation, condition.observed_generation), (Some(2), Some(2)));
}

#[test]
fn budgets_say_how_many_pods_may_go() {
    check(json!({"minAvailable": 2}), &ready(3), 0, [3, 2, 3, 1]);
    check(json!({"minAvailable": 4}), &ready(3), 0, [3, 4, 3, 0]);
    check(json!({"minAvailable": 0}), &[], 0, [0, 0, 0, 0]);
    check(json!({"minAvailable": "50%"}), &ready(3), 5, [3, 3, 5, 0]);
    check(json!({"minAvailable": "50%"}), &ready(4), 4, [4, 2, 4, 2]);
    check(json!({"maxUnavailable": 1}), &ready(3), 3, [3, 2, 3, 1]);
    check(json!({"maxUnavailable": 1}), &ready(3), 5, [3, 4, 5, 0]);
    check(json!({"maxUnavailable": "30%"}), &ready(10), 10, [10, 7, 10, 3]);
    check(json!({"maxUnavailable": "100%"}), &ready(2), 2, [2, 0, 2, 2]);
    check(json!({"maxUnavailable": 9}), &ready(2), 2, [2, 0, 2, 2]);
    let mut pods = ready(3);
    pods.push(pod("unready", |p| p["status"]["conditions"][0]["status"] = "False".into()));
    pods.push(pod("going", |p| p["metadata"]["deletionTimestamp"] = ago(5).into()));
    check(json!({"minAvailable": 2}), &pods, 0, [3, 2, 5, 1]);
    check(json!({}), &ready(2), 2, [2, 0, 0, 0]);
}

#[test]
fn evicted_pods_count_as_gone_until_they_are() {
    let named = json!({"p0": ago(10), "p1": ago(200), "p9": ago(10), "p2": ago(10)});
    let budget = budget(json!({"minAvailable": 1}), json!({"disruptedPods": named, "disruptionsAllowed": 0}));
    let mut pods = ready(4);
    pods[2] = pod("p2", |p| p["metadata"]["creationTimestamp"] = ago(5).into());
    let plan = plan(&budget, &pods, || unreachable!("it does not depend on it"), now());
    assert_eq!(plan.overdue, ["p1"]);
    let left: Vec<String> = plan.status.disrupted_pods.unwrap().into_keys().collect();
    assert_eq!(left, ["p0"], "p9 is gone, and p2 is another by now");
    assert_eq!((plan.status.current_healthy, plan.status.disruptions_allowed), (Some(3), Some(2)));
    assert_eq!(plan.due.map(|at| at.as_second()), Some(NOW + 110));
}

#[test]
fn nothing_may_go_while_it_is_not_known_what_may() {
    let old = json!({"currentHealthy": 3, "desiredHealthy": 2, "expectedPods": 3, "disruptionsAllowed": 1, "observedGeneration": 1});
    let budget = budget(json!({"maxUnavailable": 1}), old);
    let plan = plan(
        &budget,
        &ready(3),
        || Err("jobs.batch does not implement the scale subresource".to_owned()),
        now(),
    );
    assert_eq!((plan.status.disruptions_allowed, plan.status.current_healthy), (Some(0), Some(3)));
    let condition = &plan.status.conditions.as_ref().unwrap()[0];
    assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("False", "SyncFailed"));
    assert_eq!(condition.message, "jobs.batch does not implement the scale subresource");
    assert_eq!(plan.tell[0].1, "CalculateExpectedPodCountFailed");
}

#[test]
fn what_is_odd_is_told() {
    let budget =
        budget(json!({"maxUnavailable": 1, "selector": {"matchLabels": {"app": "web"}}}), Value::Null);
    let odd = || Ok(Expected { pods: 0, unmanaged: true });
    let told = plan(&budget, &ready(1), odd, now()).tell;
    assert!(told[0].2.starts_with("Pods selected by this PodDisruptionBudget (selector: &LabelSelector{MatchLabels:map[string]string{app: web,},MatchExpressions:[]LabelSelectorRequirement{},}) were found to be unmanaged."));
    let told = plan(&budget, &[], || Ok(Expected::default()), now()).tell;
    assert_eq!(told, [(false, "NoPods", "No matching pods found".to_owned())]);
}

#[test]
fn a_condition_keeps_its_time_until_it_turns() {
    let pods = ready(3);
    let first =
        plan(&budget(json!({"minAvailable": 2}), Value::Null), &pods, || unreachable!(), now()).status;
    let known = budget(json!({"minAvailable": 2}), serde_json::to_value(&first).unwrap());
    let later = now() + Duration::from_secs(60);
    assert_eq!(plan(&known, &pods, || unreachable!(), later).status, first, "nothing has changed");
    let turned = plan(&known, &pods[..2], || unreachable!(), later).status;
    let condition = &turned.conditions.as_ref().unwrap()[0];
    assert_eq!(
        (condition.status.as_str(), condition.last_transition_time.0.as_second()),
        ("False", NOW + 60)
    );
}

#[test]
fn pods_are_unmarked_that_were_not_disrupted() {
    let marked = |reason: &str, change: fn(&mut Value)| {
        pod("p", |p| {
            p["status"]["conditions"] =
                json!([{ "type": MARK, "status": "True", "reason": reason, "lastTransitionTime": ago(30) }]);
            change(p);
        })
    };
    let since = |pod: &Typed<Pod>| marked_since(pod).map(|at| at.as_second() - NOW);
    assert_eq!(since(&marked("EvictionByEvictionAPI", |_| {})), Some(-30));
    assert_eq!(since(&marked("TerminationByKubelet", |_| {})), None);
    assert_eq!(since(&marked("x", |p| p["status"]["phase"] = "Failed".into())), None);
    assert_eq!(since(&marked("x", |p| p["metadata"]["deletionTimestamp"] = ago(5).into())), None);
    assert_eq!(since(&marked("x", |p| p["status"]["conditions"][0]["status"] = "False".into())), None);
}
