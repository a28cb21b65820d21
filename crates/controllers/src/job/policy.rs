//! What Jobs say about the failures and successes of their pods, and how long they wait after failures.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{JobSpec, PodFailurePolicyOnExitCodesRequirement, SuccessPolicy};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

use super::indexes::Indexes;
use crate::context::Typed;
use crate::pods;

const BACKOFF: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(600);

/// What the failure of a pod means.
#[derive(Debug, PartialEq)]
pub(crate) enum Failure {
    /// It counts towards the limits, as it does when no rule says otherwise.
    Counts,
    Ignored,
    /// The pod's index is not tried again.
    FailsIndex,
    /// The whole Job has failed, for this reason.
    FailsJob(String),
}

/// The first rule of the Job's pod failure policy that fits decides.
pub(crate) fn judge_failure(spec: &JobSpec, pod: &Pod) -> Failure {
    let rules = spec.pod_failure_policy.iter().flat_map(|policy| &policy.rules);
    let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
    let named = format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default());
    for (at, rule) in rules.enumerate() {
        let fits = if let Some(codes) = &rule.on_exit_codes {
            failed_container(pod, codes).map(|(container, code)| {
                format!("Container {container} for pod {named} failed with exit code {code} matching {} rule at index {at}", rule.action)
            })
        } else {
            let patterns = rule.on_pod_conditions.iter().flatten();
            let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
            let mut fitting = conditions.filter(|condition| {
                let mut patterns = patterns.clone();
                patterns.any(|p| {
                    p.type_ == condition.type_ && p.status.as_deref().unwrap_or("True") == condition.status
                })
            });
            fitting.next().map(|condition| {
                format!(
                    "Pod {named} has condition {} matching {} rule at index {at}",
                    condition.type_, rule.action
                )
            })
        };
        match (fits, rule.action.as_str()) {
            (None, _) => {}
            (Some(_), "Ignore") => return Failure::Ignored,
            (Some(_), "FailIndex") => return Failure::FailsIndex,
            (Some(why), "FailJob") => return Failure::FailsJob(why),
            (Some(_), "Count") => return Failure::Counts,
            // An action of a later version.
            (Some(_), _) => {}
        }
    }
    Failure::Counts
}

/// The first container that ended with a code that is asked for; its name and the code.
fn failed_container<'p>(
    pod: &'p Pod,
    asked: &PodFailurePolicyOnExitCodesRequirement,
) -> Option<(&'p str, i32)> {
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    let mut ended = containers.filter_map(|container| {
        let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
        (code != 0).then_some((container.name.as_str(), code))
    });
    ended.find(|(name, code)| {
        let one_of_them = asked.values.contains(code);
        let fits = match asked.operator.as_str() {
            "In" => one_of_them,
            "NotIn" => !one_of_them,
            _ => false,
        };
        fits && asked.container_name.as_ref().is_none_or(|asked| asked == name)
    })
}

/// Why the indexes that succeeded are enough, if they are.
pub(crate) fn judge_success(
    policy: Option<&SuccessPolicy>,
    succeeded: &Indexes,
    completions: i32,
) -> Option<String> {
    if succeeded.is_empty() {
        return None;
    }
    let met = policy?.rules.iter().position(|rule| match &rule.succeeded_indexes {
        Some(asked) => {
            let asked = Indexes::parse(asked, completions);
            let common = asked.common(succeeded);
            !asked.is_empty()
                && (common == asked.len() || rule.succeeded_count.is_some_and(|count| common >= count))
        }
        None => rule.succeeded_count.is_some_and(|count| succeeded.len() >= count),
    });
    met.map(|at| format!("Matched rules at index {at}"))
}

/// Failures in a row, and when the last of them was.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Backoff {
    pub failures: u32,
    pub last: Option<Timestamp>,
}

impl Backoff {
    /// With what happened since: pods that ended, whatever rules say of them.
    pub fn after(&self, succeeded: &[&Typed<Pod>], failed: &[&Typed<Pod>]) -> Backoff {
        let last_success = succeeded.iter().map(|pod| end_of(pod)).max();
        let later = |at: &Timestamp| last_success.is_none_or(|success| *at > success);
        let failed: Vec<Timestamp> = failed.iter().map(|pod| end_of(pod)).filter(later).collect();
        let before = if last_success.is_some() { Backoff::default() } else { self.clone() };
        Backoff {
            failures: before.failures.saturating_add(failed.len() as u32),
            last: failed.into_iter().max().or(before.last),
        }
    }

    /// When the next pod may be made: 10 s after the last failure, twice as long for each failure before it, at
    /// most 10 minutes.
    pub fn over(&self) -> Option<Timestamp> {
        let pause = minke_client::backoff(BACKOFF, BACKOFF_MAX, self.failures.checked_sub(1)?);
        self.last?.checked_add(pause).ok()
    }
}

/// When the pod ended: its last container, or else the best guess there is.
pub(crate) fn end_of(pod: &Typed<Pod>) -> Timestamp {
    let status = pod.status.as_ref();
    let is_sidecar = |container: &&ContainerStatus| {
        let specs = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
        specs
            .filter(|spec| spec.name == container.name)
            .any(|spec| spec.restart_policy.as_deref() == Some("Always"))
    };
    let sidecars = status.iter().flat_map(|s| s.init_container_statuses.iter().flatten()).filter(is_sidecar);
    let mut containers = status.iter().flat_map(|s| s.container_statuses.iter().flatten()).chain(sidecars);
    let ended = containers.try_fold(None, |latest: Option<Timestamp>, container| {
        let end = container.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref()?.0;
        Some(latest.max(Some(end)))
    });
    let unready = || {
        let mut conditions = status?.conditions.iter().flatten();
        let ready = conditions.find(|condition| condition.type_ == "Ready" && condition.status == "False")?;
        Some(ready.last_transition_time.as_ref()?.0)
    };
    let deleted = || {
        let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
        pod.object.deleted()?.checked_sub(Duration::from_secs(u64::try_from(grace).unwrap_or(0))).ok()
    };
    let created = || pod.object.created().unwrap_or_default();
    ended.flatten().or_else(unready).or_else(deleted).unwrap_or_else(created)
}

/// Restarts of the containers of all pods that are not over.
pub(crate) fn restarts(all: &[Typed<Pod>]) -> i32 {
    let going_on = all.iter().filter(|pod| matches!(pods::phase(pod), "Running" | "Pending"));
    let containers = going_on
        .filter_map(|pod| pod.status.as_ref())
        .flat_map(|status| status.init_container_statuses.iter().chain(&status.container_statuses).flatten());
    containers.map(|container| container.restart_count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{NOW, now, pod, time};
    use serde_json::{Value, json};

    fn spec(rules: Value) -> JobSpec {
        serde_json::from_value(json!({ "podFailurePolicy": { "rules": rules }, "template": {} })).unwrap()
    }

    fn failed(code: i32, condition: &str) -> Typed<Pod> {
        pod("p", |p| {
            p["status"] = json!({ "phase": "Failed", "conditions": [{ "type": condition, "status": "True" }],
                "containerStatuses": [{ "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": { "terminated": { "exitCode": code } } }] });
        })
    }

    #[track_caller]
    fn check(rules: Value, pod: &Typed<Pod>, want: Failure) {
        assert_eq!(judge_failure(&spec(rules), pod), want);
    }

    #[test]
    fn the_first_rule_that_fits_a_failure_decides() {
        let codes = |action: &str, operator: &str, values: &[i32]| json!({ "action": action, "onExitCodes": { "operator": operator, "values": values } });
        let condition = |action: &str| json!({ "action": action, "onPodConditions": [{ "type": "DisruptionTarget", "status": "True" }] });
        check(json!([]), &failed(1, "x"), Failure::Counts);
        check(json!([codes("Ignore", "In", &[2])]), &failed(1, "x"), Failure::Counts);
        check(json!([codes("Ignore", "In", &[1, 2])]), &failed(1, "x"), Failure::Ignored);
        check(json!([codes("FailIndex", "NotIn", &[2])]), &failed(1, "x"), Failure::FailsIndex);
        check(json!([codes("Ignore", "NotIn", &[2])]), &failed(0, "x"), Failure::Counts);
        check(
            json!([condition("Ignore"), codes("FailJob", "In", &[1])]),
            &failed(1, "DisruptionTarget"),
            Failure::Ignored,
        );
        check(
            json!([codes("Count", "In", &[1]), codes("FailJob", "In", &[1])]),
            &failed(1, "x"),
            Failure::Counts,
        );
        let why = "Container c for pod ns/p failed with exit code 42 matching FailJob rule at index 1";
        check(
            json!([condition("Ignore"), codes("FailJob", "In", &[42])]),
            &failed(42, "x"),
            Failure::FailsJob(why.into()),
        );
        let why = "Pod ns/p has condition DisruptionTarget matching FailJob rule at index 0";
        check(json!([condition("FailJob")]), &failed(1, "DisruptionTarget"), Failure::FailsJob(why.into()));
        let other = json!([{ "action": "Ignore", "onExitCodes": { "containerName": "d", "operator": "In", "values": [1] } }]);
        check(other, &failed(1, "x"), Failure::Counts);
    }

    #[test]
    fn a_success_policy_says_which_indexes_are_enough() {
        let check = |rules: Value, succeeded: &str, want: Option<usize>| {
            let policy: SuccessPolicy = serde_json::from_value(json!({ "rules": rules })).unwrap();
            let met = judge_success(Some(&policy), &Indexes::parse(succeeded, 10), 10);
            assert_eq!(met, want.map(|at| format!("Matched rules at index {at}")), "{rules} {succeeded}");
        };
        check(json!([{ "succeededCount": 2 }]), "5", None);
        check(json!([{ "succeededCount": 2 }]), "5,7", Some(0));
        check(json!([{ "succeededIndexes": "0,2-3" }]), "0,2", None);
        check(json!([{ "succeededIndexes": "0,2-3" }]), "0-3", Some(0));
        check(
            json!([{ "succeededIndexes": "9" }, { "succeededIndexes": "0-3", "succeededCount": 2 }]),
            "0,3",
            Some(1),
        );
        check(json!([{ "succeededIndexes": "" }]), "0-9", None);
    }

    #[test]
    fn failures_in_a_row_make_the_waits_longer() {
        let ended = |ago: i64| {
            pod(
                "p",
                |p| p["status"] = json!({ "phase": "Failed", "conditions": [{ "type": "Ready", "status": "False", "lastTransitionTime": time(ago) }] }),
            )
        };
        let wait = |backoff: &Backoff| backoff.over().map(|at| at.as_second() - NOW);
        let none = Backoff::default();
        assert_eq!(wait(&none), None);
        let (old, new, newest) = (ended(100), ended(50), ended(10));
        assert_eq!(wait(&none.after(&[], &[&new])), Some(-40));
        assert_eq!(wait(&none.after(&[], &[&newest, &old, &new])), Some(30));
        assert_eq!(
            none.after(&[&new], &[&old, &newest]),
            Backoff { failures: 1, last: Some(end_of(&newest)) }
        );
        assert_eq!(none.after(&[], &[&old]).after(&[&new], &[]), none);
        let many = Backoff { failures: 30, last: Some(now()) };
        assert_eq!(wait(&many), Some(600));
    }

    #[test]
    fn the_end_of_a_pod_is_found_in_one_way_or_another() {
        let ago = |pod: &Typed<Pod>| NOW - end_of(pod).as_second();
        let container = |ago: i64| json!({ "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": { "terminated": { "exitCode": 1, "finishedAt": time(ago) } } });
        assert_eq!(
            ago(&pod("a", |p| p["status"]["containerStatuses"] = json!([container(20), container(30)]))),
            20
        );
        assert_eq!(ago(&pod("b", |p| p["status"]["conditions"][0]["status"] = "False".into())), 3600);
        let deleted = pod("c", |p| {
            p["metadata"]["deletionTimestamp"] = time(5).into();
            p["metadata"]["deletionGracePeriodSeconds"] = 30.into();
        });
        assert_eq!(ago(&deleted), 35);
        assert_eq!(ago(&pod("d", |p| p["metadata"]["creationTimestamp"] = time(77).into())), 77);
    }
}
