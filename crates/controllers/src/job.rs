//! Runs the pods of a Job until enough of them have succeeded, or too many have failed.
//!
//! Pods carry a finalizer until they are counted, so that none is lost: first the uids of finished pods go into
//! `status.uncountedTerminatedPods` with the counts they belong to, then their finalizers come off, then the uids
//! are taken out. Upstream: pkg/controller/job. Not here: pod failure and success policies, and per-index back-off.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use minke_api::{Kind, LabelSelector, Object, Status};
use minke_client::{Change, Patch, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, nonzero, seconds, until};
use crate::pods;
use crate::replicaset::{create_pod, delete_pod};
use crate::run::Controller;

const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
const BACKOFF: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(600);
/// Pods that one pass makes at most, and that one status names at most as not yet counted.
const BURST: usize = 500;

/// What one pass will do.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Pods to make: for an indexed Job, their indexes.
    pub create: Vec<Option<i32>>,
    /// Uids of pods to delete.
    pub delete: Vec<String>,
    /// Uids of pods whose finalizer comes off, now that their count is in the status as it was read.
    pub release: Vec<String>,
    pub status: JobStatus,
    /// Events to tell: whether a warning, reason, message.
    pub tell: Vec<(bool, &'static str, String)>,
    /// When something is due that no change will tell of.
    pub due: Option<Timestamp>,
}

struct Pods<'a> {
    all: &'a [Typed<Pod>],
    counted: BTreeSet<&'a str>,
}

fn has_finalizer(pod: &Object) -> bool {
    pod.finalizers().any(|finalizer| finalizer == FINALIZER)
}

fn index_of(pod: &Pod) -> Option<i32> {
    pod.metadata.annotations.as_ref()?.get(INDEX)?.parse().ok()
}

/// A pod that will not succeed any more: failed, or going away unfinished.
fn is_failed(pod: &Typed<Pod>) -> bool {
    pods::phase(pod) == "Failed" || (pod.object.deleted().is_some() && pods::phase(pod) != "Succeeded")
}

impl Pods<'_> {
    fn uncounted(&self, test: impl Fn(&Typed<Pod>) -> bool) -> Vec<&Typed<Pod>> {
        let fresh =
            |pod: &&Typed<Pod>| has_finalizer(&pod.object) && !self.counted.contains(pod.object.uid());
        self.all.iter().filter(fresh).filter(|pod| test(pod)).collect()
    }

    fn active(&self) -> Vec<&Typed<Pod>> {
        self.all.iter().filter(|pod| !pods::is_finished(pod) && pod.object.deleted().is_none()).collect()
    }
}

fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

fn holds(status: &JobStatus, type_: &str) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    conditions.any(|condition| condition.type_ == type_ && condition.status == "True")
}

fn set_condition(
    status: &mut JobStatus,
    type_: &str,
    value: &str,
    reason: Option<&str>,
    message: Option<String>,
    now: Timestamp,
) {
    let conditions = status.conditions.get_or_insert_default();
    if conditions.iter().any(|condition| condition.type_ == type_ && condition.status == value) {
        return;
    }
    conditions.retain(|condition| condition.type_ != type_);
    conditions.push(JobCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: reason.map(str::to_owned),
        message,
        last_probe_time: Some(seconds(now)),
        last_transition_time: Some(seconds(now)),
    });
}

/// Decides. `all` are the pods of the Job, finished ones included.
pub(crate) fn plan(job: &Typed<Job>, all: &[Typed<Pod>], now: Timestamp) -> Plan {
    let spec = job.spec.clone().unwrap_or_default();
    let mut status = job.status.clone().unwrap_or_default();
    let mut plan = Plan::default();
    let uncounted = status.uncounted_terminated_pods.clone().unwrap_or_default();
    let named = || uncounted.succeeded.iter().chain(&uncounted.failed).flatten();
    let pods = Pods { all, counted: named().map(String::as_str).collect() };

    if holds(&status, "Complete") || holds(&status, "Failed") {
        // Over: what is left of its pods is let go.
        let left = all.iter().filter(|pod| has_finalizer(&pod.object));
        plan.release = left.map(|pod| pod.object.uid().to_owned()).collect();
        plan.delete = pods.active().iter().map(|pod| pod.object.uid().to_owned()).collect();
        plan.status = status;
        return plan;
    }
    let suspended = spec.suspend.unwrap_or(false);
    if status.start_time.is_none() && !suspended {
        status.start_time = Some(seconds(now));
    }
    count(&pods, &uncounted, &spec, &mut status, &mut plan);

    let active = pods.active();
    let ready = active.iter().filter(|pod| pods::is_ready(pod)).count() as i32;
    let terminating =
        all.iter().filter(|pod| pod.object.deleted().is_some() && !pods::is_finished(pod)).count();
    let (succeeded, failed) = (status.succeeded.unwrap_or(0), status.failed.unwrap_or(0));
    let verdict = judge(&spec, &status, succeeded, failed, now);
    if let Some((type_, reason, message)) = verdict {
        let target = if type_ == "Complete" { "SuccessCriteriaMet" } else { "FailureTarget" };
        set_condition(&mut status, target, "True", Some(reason), Some(message), now);
    }
    let ending = holds(&status, "SuccessCriteriaMet") || holds(&status, "FailureTarget");
    let mut wanted_active = active.len() as i32;
    if ending || suspended {
        plan.delete = active.iter().map(|pod| pod.object.uid().to_owned()).collect();
        wanted_active = 0;
    } else {
        wanted_active = fill(&spec, &status, &pods, &active, &mut plan, now).unwrap_or(wanted_active);
    }
    note_suspension(suspended, &mut status, &mut plan, now);
    if let (Some(limit), Some(start), false) = (spec.active_deadline_seconds, &status.start_time, suspended) {
        let end = start.0.saturating_add(Duration::from_secs(limit.max(0) as u64)).unwrap_or(now);
        plan.due = Some(plan.due.map_or(end, |due| due.min(end)));
    }
    let all_counted =
        status.uncounted_terminated_pods.as_ref().is_none_or(|named| *named == Default::default());
    if ending && all_counted && active.is_empty() && terminating == 0 {
        conclude(&spec, &mut status, &mut plan, now);
    }
    status.active = nonzero(wanted_active);
    status.ready = Some(if ending || suspended { 0 } else { ready });
    status.terminating = Some(terminating as i32);
    status.uncounted_terminated_pods.get_or_insert_default();
    plan.status = status;
    plan
}

/// Moves finished pods through the counting.
fn count(
    pods: &Pods,
    uncounted: &UncountedTerminatedPods,
    spec: &JobSpec,
    status: &mut JobStatus,
    plan: &mut Plan,
) {
    let present: BTreeMap<&str, &Typed<Pod>> = pods.all.iter().map(|pod| (pod.object.uid(), pod)).collect();
    // Those that the status names are counted; as soon as their finalizer is off they are named no more.
    let still = |uids: &Option<Vec<String>>| -> Vec<String> {
        let held = |uid: &&String| present.get(uid.as_str()).is_some_and(|pod| has_finalizer(&pod.object));
        uids.iter().flatten().filter(held).cloned().collect()
    };
    let (mut succeeded, mut failed) = (still(&uncounted.succeeded), still(&uncounted.failed));
    plan.release = succeeded.iter().chain(&failed).cloned().collect();
    let done =
        if is_indexed(spec) { parse_indexes(status.completed_indexes.as_deref()) } else { BTreeSet::new() };
    let mut indexes = done;
    for pod in pods.uncounted(|pod| pods::phase(pod) == "Succeeded").into_iter().take(BURST) {
        if is_indexed(spec) {
            // Only the first success of an index counts; the others are let go all the same.
            let Some(index) = index_of(pod).filter(|index| indexes.insert(*index)) else {
                plan.release.push(pod.object.uid().to_owned());
                continue;
            };
            let _ = index;
        }
        succeeded.push(pod.object.uid().to_owned());
        status.succeeded = Some(status.succeeded.unwrap_or(0) + 1);
    }
    for pod in pods.uncounted(is_failed).into_iter().take(BURST) {
        failed.push(pod.object.uid().to_owned());
        status.failed = Some(status.failed.unwrap_or(0) + 1);
    }
    if is_indexed(spec) {
        status.completed_indexes = Some(format_indexes(&indexes)).filter(|text| !text.is_empty());
    }
    let list = |uids: Vec<String>| (!uids.is_empty()).then_some(uids);
    status.uncounted_terminated_pods =
        Some(UncountedTerminatedPods { succeeded: list(succeeded), failed: list(failed) });
}

/// Whether the Job is decided: the condition it will have, and why.
fn judge(
    spec: &JobSpec,
    status: &JobStatus,
    succeeded: i32,
    failed: i32,
    now: Timestamp,
) -> Option<(&'static str, &'static str, String)> {
    if holds(status, "SuccessCriteriaMet") || holds(status, "FailureTarget") {
        return None;
    }
    let started = status.start_time.as_ref();
    let deadline = started.zip(spec.active_deadline_seconds).is_some_and(|(start, limit)| {
        until(start.0, now).is_zero() && now.as_second() - start.0.as_second() >= limit
    });
    if failed > spec.backoff_limit.unwrap_or(6) {
        let message = "Job has reached the specified backoff limit".to_owned();
        return Some(("Failed", "BackoffLimitExceeded", message));
    }
    if deadline && !spec.suspend.unwrap_or(false) {
        let message = "Job was active longer than specified deadline".to_owned();
        return Some(("Failed", "DeadlineExceeded", message));
    }
    let enough = match spec.completions {
        Some(completions) => succeeded >= completions,
        // Without a number, the first success ends it, when no other pod is at work.
        None => succeeded > 0 && status.active.unwrap_or(0) == 0,
    };
    let message = "Reached expected number of succeeded pods".to_owned();
    enough.then_some(("Complete", "CompletionsReached", message))
}

/// Pods to make or take away so that the right number is at work. Returns how many that will be.
fn fill(
    spec: &JobSpec,
    status: &JobStatus,
    pods: &Pods,
    active: &[&Typed<Pod>],
    plan: &mut Plan,
    now: Timestamp,
) -> Option<i32> {
    let parallelism = spec.parallelism.unwrap_or(1).max(0);
    let succeeded = status.succeeded.unwrap_or(0);
    let wanted = match spec.completions {
        Some(completions) => parallelism.min((completions - succeeded).max(0)),
        None if succeeded > 0 => active.len() as i32,
        None => parallelism,
    };
    let have = active.len() as i32;
    if have > wanted {
        let mut surplus: Vec<Typed<Pod>> = active.iter().map(|pod| (*pod).clone()).collect();
        pods::sort_for_deletion(&mut surplus, &pods::per_node(active.iter().copied()), now);
        plan.delete =
            surplus.iter().take((have - wanted) as usize).map(|pod| pod.object.uid().to_owned()).collect();
        return Some(wanted);
    }
    let waits_for_going = spec.pod_replacement_policy.as_deref() == Some("Failed");
    let going =
        pods.all.iter().filter(|pod| pod.object.deleted().is_some() && !pods::is_finished(pod)).count()
            as i32;
    let missing = wanted - have - if waits_for_going { going } else { 0 };
    if missing <= 0 {
        return None;
    }
    // A pod that failed is followed by the next only after a while.
    if let Some(at) = retry_at(pods, status.failed.unwrap_or(0)).filter(|at| *at > now) {
        plan.due = Some(at);
        return None;
    }
    let missing = (missing as usize).min(BURST);
    if is_indexed(spec) {
        let done = parse_indexes(status.completed_indexes.as_deref());
        let busy: BTreeSet<i32> = active.iter().filter_map(|pod| index_of(pod)).collect();
        let free =
            (0..spec.completions.unwrap_or(0)).filter(|index| !done.contains(index) && !busy.contains(index));
        plan.create = free.take(missing).map(Some).collect();
    } else {
        plan.create = vec![None; missing];
    }
    Some(have + plan.create.len() as i32)
}

/// When the last failure has been waited out: 10 s, twice as long for each failure before it.
fn retry_at(pods: &Pods, failures: i32) -> Option<Timestamp> {
    let ended = |pod: &Typed<Pod>| {
        let statuses =
            pod.status.as_ref().and_then(|status| status.container_statuses.clone()).unwrap_or_default();
        let times = statuses
            .iter()
            .filter_map(|s| s.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref().map(|t| t.0));
        times.max().or(pod.object.deleted())
    };
    let last_failure = pods.all.iter().filter(|pod| is_failed(pod)).filter_map(&ended).max()?;
    let last_success = pods.all.iter().filter(|pod| pods::phase(pod) == "Succeeded").filter_map(&ended).max();
    if last_success.is_some_and(|success| success > last_failure) {
        return None;
    }
    let pause = minke_client::backoff(BACKOFF, BACKOFF_MAX, u32::try_from(failures - 1).unwrap_or(0));
    last_failure.checked_add(pause).ok()
}

fn note_suspension(suspended: bool, status: &mut JobStatus, plan: &mut Plan, now: Timestamp) {
    let was = holds(status, "Suspended");
    if suspended && !was {
        set_condition(
            status,
            "Suspended",
            "True",
            Some("JobSuspended"),
            Some("Job suspended".to_owned()),
            now,
        );
        status.start_time = None;
        plan.tell.push((false, "Suspended", "Job suspended".to_owned()));
    } else if !suspended && was {
        set_condition(status, "Suspended", "False", Some("JobResumed"), Some("Job resumed".to_owned()), now);
        status.start_time = Some(seconds(now));
        plan.tell.push((false, "Resumed", "Job resumed".to_owned()));
    }
}

fn conclude(spec: &JobSpec, status: &mut JobStatus, plan: &mut Plan, now: Timestamp) {
    let target = |type_: &str| {
        let mut conditions = status.conditions.iter().flatten();
        let found = conditions.find(|condition| condition.type_ == type_)?;
        Some((found.reason.clone().unwrap_or_default(), found.message.clone().unwrap_or_default()))
    };
    if let Some((reason, message)) = target("FailureTarget") {
        set_condition(status, "Failed", "True", Some(&reason), Some(message.clone()), now);
        let reason = if reason == "DeadlineExceeded" { "DeadlineExceeded" } else { "BackoffLimitExceeded" };
        plan.tell.push((true, reason, message));
    } else if let Some((reason, message)) = target("SuccessCriteriaMet") {
        status.completion_time = Some(seconds(now));
        set_condition(status, "Complete", "True", Some(&reason), Some(message), now);
        plan.tell.push((false, "Completed", "Job completed".to_owned()));
        if spec.completions.is_some_and(|completions| status.succeeded.unwrap_or(0) > completions) {
            plan.tell.push((
                true,
                "TooManySucceededPods",
                "Too many succeeded pods running after completion count reached".to_owned(),
            ));
        }
    }
}

/// `1,3-5,7`.
fn parse_indexes(text: Option<&str>) -> BTreeSet<i32> {
    let ranges = text.unwrap_or_default().split(',').filter(|range| !range.is_empty());
    let bounds = ranges.filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some((first.parse::<i32>().ok()?, last.parse::<i32>().ok()?))
    });
    bounds.flat_map(|(first, last)| first..=last.min(first.saturating_add(100_000))).collect()
}

/// As [`parse_indexes`] reads: ranges of three and more are joined by a dash.
fn format_indexes(indexes: &BTreeSet<i32>) -> String {
    let mut ranges: Vec<(i32, i32)> = Vec::new();
    for index in indexes {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *index => *last = *index,
            _ => ranges.push((*index, *index)),
        }
    }
    let text = ranges.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        1 => format!("{first},{last}"),
        _ => format!("{first}-{last}"),
    });
    text.collect::<Vec<_>>().join(",")
}

pub(crate) struct Jobs;

#[async_trait]
impl Controller for Jobs {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Job>(), Kind::of::<Pod>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let kind = Kind::of::<Job>();
        if change.object().kind() == kind {
            return vec![Item::of(change.object())];
        }
        let states = change.old.iter().chain(&change.new);
        let mut items: Vec<Item> = states.filter_map(|pod| Item::controller_of(pod, kind)).collect();
        // A pod that must not vanish before it is counted, of a Job that is no more.
        if let Some(orphan) =
            change.new.as_ref().filter(|pod| pod.controller().is_none() && !pod.labels().is_empty())
        {
            for job in ctx.informers.of(kind).in_namespace(orphan.namespace()) {
                let Some(typed) = Typed::<Job>::new(job.clone()) else { continue };
                if selector(&typed).is_some_and(|selector| selector.matches(orphan.labels())) {
                    items.push(Item::of(&job));
                }
            }
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(job) = ctx.get::<Job>(&item.key) else { return self.let_go(ctx, item).await };
        let Some(selector) = selector(&job) else { return Ok(Requeue::Never) };
        if job.object.deleted().is_some() || job.spec.as_ref().is_some_and(|spec| spec.managed_by.is_some()) {
            return Ok(Requeue::Never);
        }
        let pods = ctx.claim(&job.object, &selector, Kind::of::<Pod>()).await?;
        let pods: Vec<Typed<Pod>> = pods.into_iter().filter_map(Typed::new).collect();
        let plan = plan(&job, &pods, ctx.now());
        let by_uid: BTreeMap<&str, &Typed<Pod>> = pods.iter().map(|pod| (pod.object.uid(), pod)).collect();
        let find = |uids: &[String]| -> Vec<Typed<Pod>> {
            uids.iter().filter_map(|uid| by_uid.get(uid.as_str()).map(|pod| (*pod).clone())).collect()
        };
        for pod in find(&plan.delete).iter().filter(|pod| !ctx.is_going(&pod.object)) {
            delete_pod(ctx, &job.object, &pod.object).await?;
        }
        for pod in find(&plan.release) {
            release(ctx, &pod.object).await?;
        }
        for index in &plan.create {
            create_pod(ctx, &job.object, pod_of(&job, *index)).await?;
        }
        if job.status.as_ref() != Some(&plan.status) {
            ctx.update_status(&job.object, &plan.status).await?;
        }
        for (warning, reason, message) in plan.tell {
            match warning {
                true => ctx.events.warning(&job.object, reason, message),
                false => ctx.events.normal(&job.object, reason, message),
            }
        }
        Ok(Requeue::at(plan.due, ctx.now()))
    }
}

impl Jobs {
    /// The Job is gone; its pods must not wait to be counted.
    async fn let_go(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let pods = ctx.informer::<Pod>().in_namespace(&item.key.namespace);
        let of_it = |pod: &&std::sync::Arc<Object>| {
            Item::controller_of(pod, Kind::of::<Job>()).as_ref() == Some(item)
        };
        for pod in pods.iter().filter(of_it).filter(|pod| has_finalizer(pod)) {
            release(ctx, pod).await?;
        }
        Ok(Requeue::Never)
    }
}

fn selector(job: &Job) -> Option<LabelSelector> {
    LabelSelector::from_spec(job.spec.as_ref()?.selector.as_ref()?).ok()
}

async fn release(ctx: &Ctx, pod: &Object) -> Result<(), Status> {
    if !has_finalizer(pod) {
        return Ok(());
    }
    let finalizers: Vec<&str> = pod.finalizers().filter(|finalizer| *finalizer != FINALIZER).collect();
    let metadata = json!({
        "uid": pod.uid(), "resourceVersion": pod.revision().to_string(), "finalizers": finalizers,
    });
    match ctx.patch(Target::of(pod), Patch::Merge(json!({ "metadata": metadata }))).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// A pod of the Job, for `index` if it is an indexed one.
fn pod_of(job: &Typed<Job>, index: Option<i32>) -> Value {
    let template = job.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let mut pod = pods::from_template(&template, &job.object);
    let mut finalizers = pod["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
    finalizers.push(FINALIZER.into());
    pod["metadata"]["finalizers"] = finalizers.into();
    let Some(index) = index else { return pod };
    let text = index.to_string();
    pod["metadata"]["annotations"][INDEX] = text.clone().into();
    pod["metadata"]["labels"][INDEX] = text.clone().into();
    pod["metadata"]["generateName"] = format!("{}-{text}-", job.object.name()).into();
    if pod["spec"]["hostname"].as_str().unwrap_or_default().is_empty() {
        pod["spec"]["hostname"] = format!("{}-{text}", job.object.name()).into();
    }
    let field = format!("metadata.labels['{INDEX}']");
    for list in ["containers", "initContainers"] {
        for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
            let env = &mut container["env"];
            let known = env.as_array().into_iter().flatten().any(|var| var["name"] == "JOB_COMPLETION_INDEX");
            if !known {
                let mut all = env.as_array().cloned().unwrap_or_default();
                all.push(json!({ "name": "JOB_COMPLETION_INDEX", "valueFrom": { "fieldRef": { "fieldPath": field } } }));
                *env = all.into();
            }
        }
    }
    pod
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
