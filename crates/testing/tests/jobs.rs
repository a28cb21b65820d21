//! Jobs, CronJobs and disruption budgets in a simulated cluster: through crashes after any write, and with caches
//! that lag.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::{CronJob, Job, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use minke_api::Kind;
use minke_client::Propagation;
use minke_testing::sim::{self, Sim};
use serde_json::{Value, json};

mod common;
use common::through_all;

fn minutes(n: u64) -> Duration {
    Duration::from_secs(60 * n)
}

fn job(image: &str, spec: Value) -> Value {
    let mut job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": "work" },
        "spec": {
            "completions": 3, "parallelism": 2, "backoffLimit": 6,
            "selector": { "matchLabels": { "job-name": "work" } },
            "template": {
                "metadata": { "labels": { "job-name": "work" } },
                "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": image }] },
            },
        },
    });
    spec.as_object().unwrap().iter().for_each(|(field, value)| job["spec"][field] = value.clone());
    job
}

fn status(sim: &Sim) -> JobStatus {
    sim.get::<Job>("work").unwrap().status.unwrap()
}

/// Why the Job ended, and that its pods are free.
#[track_caller]
fn check_ended(sim: &Sim, type_: &str, reason: &str) {
    let status = status(sim);
    let conditions = status.conditions.iter().flatten();
    let ends: Vec<_> = conditions.filter(|c| matches!(c.type_.as_str(), "Complete" | "Failed")).collect();
    assert_eq!(ends.len(), 1, "{status:?}");
    assert_eq!((ends[0].type_.as_str(), ends[0].reason.as_deref()), (type_, Some(reason)));
    assert_eq!(status.uncounted_terminated_pods, Some(Default::default()));
    assert_eq!((status.active, status.terminating), (None, Some(0)));
    assert!(sim.list::<Pod>().iter().all(|pod| pod.metadata.finalizers.is_none()));
}

/// At no time are more pods at work than may be, nor two of one index.
fn limit_pods(sim: &Sim, most: usize) {
    sim.api.check(move |api| {
        let pods = api.list(Kind::of::<Pod>());
        let is_active = |pod: &&std::sync::Arc<minke_api::Object>| {
            !matches!(pod.field("status.phase"), Some("Succeeded" | "Failed")) && pod.deleted().is_none()
        };
        let active: Vec<_> = pods.iter().filter(is_active).collect();
        if active.len() > most {
            return Err(format!("{} pods at work, more than {most}", active.len()));
        }
        let label = "batch.kubernetes.io/job-completion-index";
        let indexes: Vec<_> = active.iter().filter_map(|pod| pod.labels().get(label)).collect();
        match indexes.len() == indexes.iter().collect::<BTreeSet<_>>().len() {
            true => Ok(()),
            false => Err(format!("two pods of one index: {indexes:?}")),
        }
    });
}

async fn run_to_success(mut sim: Sim) -> Sim {
    limit_pods(&sim, 2);
    sim.create(job("once", json!({ "completions": 5 })));
    sim.settle(minutes(20)).await;
    check_ended(&sim, "Complete", "CompletionsReached");
    assert_eq!((status(&sim).succeeded, status(&sim).failed), (Some(5), None));
    assert_eq!(sim.list::<Pod>().len(), 5, "no pod too many");
    sim
}

#[test]
fn every_success_is_counted_once() {
    through_all(20, 20, run_to_success);
}

async fn run_indexed(mut sim: Sim) -> Sim {
    limit_pods(&sim, 2);
    sim.create(job(
        "fails",
        json!({ "completionMode": "Indexed", "backoffLimit": i32::MAX, "backoffLimitPerIndex": 1 }),
    ));
    sim.settle(minutes(30)).await;
    check_ended(&sim, "Failed", "FailedIndexes");
    let status = status(&sim);
    assert_eq!((status.failed, status.failed_indexes.as_deref()), (Some(6), Some("0-2")));
    assert_eq!(sim.list::<Pod>().len(), 6, "each index twice");
    sim
}

#[test]
fn every_failure_of_an_index_is_counted_once() {
    through_all(20, 20, run_indexed);
}

async fn run_with_policy(mut sim: Sim) -> Sim {
    let rule = json!({ "action": "FailJob", "onExitCodes": { "operator": "In", "values": [42] } });
    sim.create(job(
        "exit-42",
        json!({ "podReplacementPolicy": "Failed", "podFailurePolicy": { "rules": [rule] } }),
    ));
    sim.settle(minutes(20)).await;
    check_ended(&sim, "Failed", "PodFailurePolicy");
    assert_eq!(status(&sim).failed, Some(2));
    sim
}

#[test]
fn a_policy_fails_the_job_at_the_first_failure() {
    through_all(5, 10, run_with_policy);
}

async fn run_suspended(mut sim: Sim) -> Sim {
    limit_pods(&sim, 2);
    sim.create(job("runs", json!({})));
    sim.settle(minutes(5)).await;
    assert_eq!((status(&sim).active, status(&sim).ready), (Some(2), Some(2)));
    sim.patch::<Job>("work", json!({ "spec": { "suspend": true } })).await;
    sim.settle(minutes(5)).await;
    assert_eq!((sim.list::<Pod>().len(), status(&sim).active, status(&sim).failed), (0, None, None));
    sim.patch::<Job>("work", json!({ "spec": { "suspend": false } })).await;
    sim.settle(minutes(5)).await;
    assert_eq!(status(&sim).active, Some(2));
    sim
}

#[test]
fn a_suspended_job_loses_its_pods_and_counts_none() {
    through_all(10, 10, run_suspended);
}

#[tokio::test(start_paused = true)]
async fn pods_that_users_delete_are_failures() {
    for policy in ["TerminatingOrFailed", "Failed"] {
        let mut sim = Sim::new(5).nodes(1);
        limit_pods(&sim, 2);
        sim.create(job("runs", json!({ "podReplacementPolicy": policy })));
        sim.settle(minutes(5)).await;
        let name = sim.list::<Pod>()[0].metadata.name.clone().unwrap();
        sim.delete::<Pod>(&name, Propagation::Background).await.unwrap();
        sim.settle(minutes(5)).await;
        assert_eq!((status(&sim).failed, status(&sim).active), (Some(1), Some(2)), "{policy}");
        assert_eq!(sim.list::<Pod>().len(), 2, "the deleted one is gone, and another took its place");
    }
}

/// How many pods are left of a Job at work that is deleted in some way.
async fn delete_at_work(propagation: Propagation, mut sim: Sim) -> (usize, Sim) {
    sim.create(job("runs", json!({})));
    sim.settle(minutes(5)).await;
    sim.delete::<Job>("work", propagation).await.unwrap();
    sim.settle(minutes(5)).await;
    assert!(sim.get::<Job>("work").is_none());
    let pods = sim.list::<Pod>();
    assert!(
        pods.iter().all(|pod| pod.metadata.finalizers.is_none() && pod.metadata.owner_references.is_none())
    );
    (pods.len(), sim)
}

#[test]
fn a_job_at_work_can_be_deleted() {
    for (propagation, left) in
        [(Propagation::Background, 0), (Propagation::Foreground, 0), (Propagation::Orphan, 2)]
    {
        through_all(5, 5, async |sim| {
            let (pods, sim) = delete_at_work(propagation, sim).await;
            assert_eq!(pods, left, "{propagation:?}");
            sim
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_adopts_pods_that_match_and_counts_them() {
    let mut sim = Sim::new(8).nodes(1);
    sim.create(json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "orphan", "labels": {"job-name": "work"}},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "runs"}]}}));
    sim.settle(minutes(2)).await;
    sim.create(job("runs", json!({ "manualSelector": true })));
    sim.settle(minutes(5)).await;
    let orphan = sim.get::<Pod>("orphan").unwrap();
    assert_eq!(orphan.metadata.finalizers.unwrap(), ["batch.kubernetes.io/job-tracking"]);
    assert_eq!((status(&sim).active, sim.list::<Pod>().len()), (Some(2), 2));
    sim.delete::<Pod>("orphan", Propagation::Background).await.unwrap();
    sim.settle(minutes(5)).await;
    assert_eq!(status(&sim).failed, Some(1));
}

fn cron_job(image: &str, spec: Value) -> Value {
    let mut template = job(image, json!({ "completions": 1, "parallelism": 1 }));
    template["spec"]["template"]["metadata"] = json!({ "labels": { "app": "tick" } });
    template["spec"]["selector"] = json!({ "matchLabels": { "app": "tick" } });
    let mut cron = json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "tick" },
        "spec": { "schedule": "* * * * *", "concurrencyPolicy": "Allow", "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 1, "jobTemplate": { "spec": template["spec"] } },
    });
    spec.as_object().unwrap().iter().for_each(|(field, value)| cron["spec"][field] = value.clone());
    cron
}

/// Jobs that were made so far, by name. The first minute begins 40 s after the start.
fn made(sim: &Sim) -> Vec<String> {
    let all = sim.api.last(usize::MAX);
    let names =
        all.into_iter().filter_map(|write| write.what.strip_prefix("create jobs ").map(str::to_owned));
    names.collect()
}

async fn tick(mut sim: Sim) -> Sim {
    sim.create(cron_job("once", json!({ "successfulJobsHistoryLimit": 1 })));
    sim.pass(minutes(3)).await;
    let made = made(&sim);
    assert_eq!(made.len(), 3, "{made:?}");
    assert_eq!(made.iter().collect::<BTreeSet<_>>().len(), 3, "no minute twice");
    let status = sim.get::<CronJob>("tick").unwrap().status.unwrap();
    assert_eq!(status.last_schedule_time.unwrap().0.to_string(), "2023-11-14T22:16:00Z");
    assert!(status.last_successful_time.is_some());
    let jobs = sim.list::<Job>();
    assert!(jobs.len() <= 2, "old ones are deleted: {}", jobs.len());
    sim
}

#[test]
fn a_cron_job_makes_a_job_each_minute_and_no_other() {
    through_all(20, 10, tick);
}

#[tokio::test(start_paused = true)]
async fn jobs_of_a_cron_job_wait_for_each_other_or_take_turns() {
    let mut sim = Sim::new(1).nodes(1);
    sim.create(cron_job("runs", json!({ "concurrencyPolicy": "Forbid" })));
    sim.pass(minutes(5)).await;
    assert_eq!(sim.list::<Job>().len(), 1);
    assert!(
        sim.events("JobAlreadyActive")[0].starts_with("Not starting job because prior execution is running")
    );
    assert_eq!(sim.get::<CronJob>("tick").unwrap().status.unwrap().active.unwrap().len(), 1);

    let mut sim = Sim::new(1).nodes(1);
    sim.create(cron_job("runs", json!({ "concurrencyPolicy": "Replace" })));
    sim.pass(minutes(5)).await;
    assert_eq!((made(&sim).len(), sim.list::<Job>().len(), sim.list::<Pod>().len()), (5, 1, 1));
    sim.patch::<CronJob>("tick", json!({ "spec": { "suspend": true } })).await;
    sim.settle(minutes(5)).await;
    assert_eq!((made(&sim).len(), sim.list::<Job>().len()), (5, 1), "what runs goes on");
}

fn web(replicas: i32) -> Value {
    sim::web(replicas, json!({ "name": "c", "image": "v1" }))
}

fn budget(spec: Value) -> Value {
    let mut budget = json!({ "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "web" }, "spec": spec });
    budget["spec"]["selector"] = json!({ "matchLabels": { "app": "web" } });
    budget
}

/// Currently healthy, desired, expected, allowed.
#[track_caller]
fn check_budget(sim: &Sim, want: [i32; 4]) {
    let status = sim.get::<PodDisruptionBudget>("web").unwrap().status.unwrap();
    let counts =
        [status.current_healthy, status.desired_healthy, status.expected_pods, status.disruptions_allowed];
    assert_eq!(counts.map(Option::unwrap), want, "{status:?}");
}

async fn guard(mut sim: Sim) -> Sim {
    sim.create(budget(json!({ "maxUnavailable": "30%" })));
    sim.create(web(4));
    sim.settle(minutes(10)).await;
    check_budget(&sim, [4, 2, 4, 2]);
    sim.patch::<Deployment>("web", json!({ "spec": { "replicas": 2 } })).await;
    sim.settle(minutes(10)).await;
    check_budget(&sim, [2, 1, 2, 1]);
    let bad =
        json!({ "spec": { "template": { "spec": { "containers": [{ "name": "c", "image": "broken" }] } } } });
    sim.patch::<Deployment>("web", bad).await;
    sim.pass(minutes(2)).await;
    check_budget(&sim, [2, 1, 2, 1]);
    sim.patch::<PodDisruptionBudget>(
        "web",
        json!({ "metadata": { "generation": 2 }, "spec": { "maxUnavailable": null, "minAvailable": 2 } }),
    )
    .await;
    sim.pass(minutes(1)).await;
    check_budget(&sim, [2, 2, 3, 0]);
    let status = sim.get::<PodDisruptionBudget>("web").unwrap().status.unwrap();
    assert_eq!(
        (status.observed_generation, status.conditions.unwrap()[0].reason.as_str()),
        (Some(2), "InsufficientPods")
    );
    sim
}

#[test]
fn a_budget_knows_how_its_pods_are() {
    through_all(20, 10, guard);
}

#[tokio::test(start_paused = true)]
async fn a_budget_for_pods_that_nobody_sizes_allows_nothing() {
    let mut sim = Sim::new(2).nodes(1);
    sim.create(budget(json!({ "maxUnavailable": 1 })));
    let pod = |name: &str, owner: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}, "ownerReferences": owner},
        "spec": {"containers": [{"name": "c", "image": "runs"}]}})
    };
    sim.create(pod("alone", Value::Null));
    sim.settle(minutes(5)).await;
    check_budget(&sim, [1, 0, 0, 0]);
    assert!(sim.events("UnmanagedPods")[0].starts_with("Pods selected by this PodDisruptionBudget (selector: &LabelSelector{MatchLabels:map[string]string{app: web,},"));
    let mut daemons = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "web"}, "spec": {"selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "runs"}]}}}});
    daemons["spec"]["updateStrategy"] = json!({"type": "OnDelete"});
    sim.create(daemons);
    sim.settle(minutes(5)).await;
    let status = sim.get::<PodDisruptionBudget>("web").unwrap().status.unwrap();
    let condition = &status.conditions.unwrap()[0];
    assert_eq!((status.disruptions_allowed, condition.reason.as_str()), (Some(0), "SyncFailed"));
    assert_eq!(condition.message, "daemonsets.apps does not implement the scale subresource");
}
