use super::*;
use crate::pods::tests::{now, pod, time};

fn spec(value: Value) -> HorizontalPodAutoscalerSpec {
    serde_json::from_value(value).expect("a specification")
}

#[track_caller]
fn check_target(api_version: &str, kind: &str, want: Result<&str, &str>) {
    let target = json!({"apiVersion": api_version, "kind": kind, "name": "web"});
    let got = target_kind(&spec(json!({"scaleTargetRef": target, "maxReplicas": 3})));
    assert_eq!(got.map(Kind::qualified_plural), want.map(str::to_owned).map_err(str::to_owned));
}

#[test]
fn targets_are_what_can_be_scaled() {
    check_target("apps/v1", "Deployment", Ok("deployments.apps"));
    check_target("v1", "ReplicationController", Ok("replicationcontrollers"));
    // Any version of the group will do.
    check_target("apps/v1beta1", "StatefulSet", Ok("statefulsets.apps"));
    check_target("apps/v1", "DaemonSet", Err("the server could not find the requested resource"));
    check_target(
        "apps/v1",
        "Nonsense",
        Err(
            "unable to determine resource for scale target reference: no matches for kind \"Nonsense\" in group \"apps\"",
        ),
    );
    check_target(
        "a/b/c",
        "Deployment",
        Err("invalid API version in scale target reference: unexpected GroupVersion string: a/b/c"),
    );
}

#[test]
fn bounds_go_before_metrics() {
    let decided = |current, min, max| by_bounds(current, min, max).map(|d| (d.replicas, d.reason));
    assert_eq!(decided(3, 2, 5), None);
    assert_eq!(decided(0, 0, 5), None);
    assert_eq!(decided(6, 2, 5), Some((5, "Current number of replicas above Spec.MaxReplicas".to_owned())));
    assert_eq!(decided(1, 2, 5), Some((2, "Current number of replicas below Spec.MinReplicas".to_owned())));
    let disabled = by_bounds(0, 2, 5).expect("decided");
    assert_eq!((disabled.replicas, disabled.conditions[0].reason), (0, "ScalingDisabled"));
}

/// What is decided when `wanted` are wanted of `current`, by an autoscaler from 2 to 10 without windows.
#[track_caller]
fn check_decision(wanted: i32, current: i32, want: (i32, &str, &str)) {
    let rules = json!({"stabilizationWindowSeconds": 0});
    let spec = spec(json!({"scaleTargetRef": {"kind": "Deployment", "name": "web"}, "maxReplicas": 10,
                           "behavior": {"scaleUp": rules, "scaleDown": rules}}));
    let bounds = Bounds { current, min: 2, max: 10, down_window: 300 };
    let decision = by_metrics((wanted, "cpu resource"), bounds, &spec, &mut Memory::default(), now());
    let reasons: Vec<&str> = decision.conditions.iter().map(|condition| condition.reason).collect();
    assert_eq!((decision.replicas, decision.reason.as_str(), reasons[2]), want);
    assert_eq!(reasons[..2], ["ValidMetricFound", "ReadyForNewScale"]);
}

#[test]
fn metrics_are_followed_within_bounds() {
    check_decision(3, 3, (3, "", "DesiredWithinRange"));
    check_decision(5, 3, (5, "cpu resource above target", "DesiredWithinRange"));
    check_decision(50, 8, (10, "cpu resource above target", "TooManyReplicas"));
    check_decision(50, 3, (7, "cpu resource above target", "ScaleUpLimit"));
    check_decision(1, 3, (2, "All metrics below target", "TooFewReplicas"));
    check_decision(0, 3, (2, "All metrics below target", "TooFewReplicas"));
}

#[test]
fn tolerances_may_be_set_for_each_direction() {
    let of = |behavior: Value| {
        let spec =
            json!({"scaleTargetRef": {"kind": "D", "name": "w"}, "maxReplicas": 1, "behavior": behavior});
        tolerances(&serde_json::from_value(spec).expect("a specification"), 0.1)
    };
    assert_eq!(of(json!({})), Tolerances { down: 0.1, up: 0.1 });
    assert_eq!(of(json!({"scaleUp": {"tolerance": "50m"}})), Tolerances { down: 0.1, up: 0.05 });
    assert_eq!(of(json!({"scaleDown": {"tolerance": "0"}})), Tolerances { down: 0.0, up: 0.1 });
}

#[test]
fn conditions_change_their_time_with_their_status() {
    let first = conditions(&[], &[Condition::new(ABLE, true, "SucceededGetScale", "fine")], now());
    assert_eq!(first[0].last_transition_time, Some(seconds(now())));
    let later = now() + Duration::from_secs(60);
    let news = [
        Condition::new(ABLE, true, "SucceededGetScale", "fine"),
        Condition::new(ABLE, true, "ReadyForNewScale", "better"),
        Condition::new(ACTIVE, false, "FailedGetResourceMetric", "bad"),
    ];
    let second = conditions(&first, &news, later);
    assert_eq!(second.len(), 2);
    assert_eq!(second[0].last_transition_time, Some(seconds(now())));
    assert_eq!(second[0].reason.as_deref(), Some("ReadyForNewScale"));
    assert_eq!(
        (second[1].status.as_str(), &second[1].last_transition_time),
        ("False", &Some(seconds(later)))
    );
}

/// The proposal of one metric for two pods that each request 1 cpu and use what is given.
fn propose(metric: Value, read: Result<metrics::Measured, String>) -> Result<proposal::Proposal, Failure> {
    let ready = |name: &str| {
        pod(name, |p| {
            p["spec"]["containers"][0]["resources"] = json!({"requests": {"cpu": "1"}});
            p["status"]["startTime"] = time(3600).into();
        })
    };
    let pods = [ready("a"), ready("b")];
    let facts = Facts {
        spec_replicas: 2,
        status_replicas: 2,
        pods: &pods,
        tolerances: Tolerances { down: 0.1, up: 0.1 },
        settings: &DEFAULT,
        now: now(),
    };
    proposal::of(&facts, &serde_json::from_value(metric).expect("a metric"), read)
}

fn of_pods(value: i64) -> Result<metrics::Measured, String> {
    let metric = replicas::PodMetric { value, at: now(), window: Duration::from_secs(15) };
    Ok(metrics::Measured::OfPods([("a".to_owned(), metric), ("b".to_owned(), metric)].into()))
}

#[track_caller]
fn check_proposal(
    metric: Value,
    read: Result<metrics::Measured, String>,
    replicas: i32,
    name: &str,
    status: Value,
) {
    let found = propose(metric, read).expect("a proposal");
    assert_eq!((found.replicas, found.name.as_str()), (replicas, name));
    assert_eq!(serde_json::to_value(found.status).expect("JSON"), status);
}

#[test]
fn each_type_of_metric_has_its_words() {
    let cpu = |target: Value| json!({"type": "Resource", "resource": {"name": "cpu", "target": target}});
    check_proposal(
        cpu(json!({"type": "Utilization", "averageUtilization": 25})),
        of_pods(500),
        4,
        "cpu resource utilization (percentage of request)",
        json!({"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": 50, "averageValue": "500m"}}}),
    );
    check_proposal(
        cpu(json!({"type": "AverageValue", "averageValue": "250m"})),
        of_pods(500),
        4,
        "cpu resource",
        json!({"type": "Resource", "resource": {"name": "cpu", "current": {"averageValue": "500m"}}}),
    );
    check_proposal(
        json!({"type": "ContainerResource", "containerResource": {"name": "cpu", "container": "c",
            "target": {"type": "Utilization", "averageUtilization": 100}}}),
        of_pods(500),
        1,
        "cpu container resource utilization (percentage of request)",
        json!({"type": "ContainerResource", "containerResource": {"name": "cpu", "container": "c",
            "current": {"averageUtilization": 50, "averageValue": "500m"}}}),
    );
    let metric = json!({"name": "qps"});
    check_proposal(
        json!({"type": "Pods", "pods": {"metric": metric, "target": {"type": "AverageValue", "averageValue": "100"}}}),
        of_pods(200_000),
        4,
        "pods metric qps",
        json!({"type": "Pods", "pods": {"metric": metric, "current": {"averageValue": "200"}}}),
    );
    let object = json!({"kind": "Service", "name": "web", "apiVersion": "v1"});
    check_proposal(
        json!({"type": "Object", "object": {"describedObject": object, "metric": metric, "target": {"type": "Value", "value": "100"}}}),
        Ok(metrics::Measured::Value(300_000)),
        6,
        "Service metric qps",
        json!({"type": "Object", "object": {"describedObject": object, "metric": metric, "current": {"value": "300"}}}),
    );
    check_proposal(
        json!({"type": "External", "external": {"metric": metric, "target": {"type": "AverageValue", "averageValue": "100"}}}),
        Ok(metrics::Measured::Value(300_000)),
        3,
        "external metric qps(nil)",
        json!({"type": "External", "external": {"metric": metric, "current": {"averageValue": "150"}}}),
    );
}

#[test]
fn failures_are_told_in_upstreams_words() {
    let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}});
    let why = "unable to get metrics for resource cpu: no metrics returned from resource metrics API";
    let failure = propose(cpu.clone(), Err(why.to_owned())).expect_err("it failed");
    assert_eq!(failure.reason, "FailedGetResourceMetric");
    assert_eq!(failure.event, format!("failed to get cpu utilization: {why}"));
    assert_eq!(
        failure.message,
        format!("the HPA was unable to compute the replica count: failed to get cpu utilization: {why}")
    );
    let (condition, statuses, event) = combine(vec![Err(failure)], 2).expect_err("nothing is known");
    assert_eq!((condition.kind, condition.status, statuses.len()), (ACTIVE, false, 1));
    assert_eq!(
        event,
        format!(
            "invalid metrics (1 invalid out of 1), first error is: failed to get cpu resource metric value: failed to get cpu utilization: {why}"
        )
    );
}

#[test]
fn the_highest_proposal_wins_and_a_failure_stops_shrinking() {
    let cpu = |percent: i32| json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": percent}}});
    let good = |percent: i32| propose(cpu(percent), of_pods(500));
    let bad = || propose(cpu(50), Err("no".to_owned()));
    assert_eq!(combine(vec![good(25), good(100)], 2).expect("both are known").wanted, 4);
    let partly = combine(vec![bad(), good(25)], 2).expect("growing is safe");
    assert_eq!((partly.wanted, partly.partly.is_some()), (4, true));
    assert!(combine(vec![good(100), bad()], 2).is_err());
}
