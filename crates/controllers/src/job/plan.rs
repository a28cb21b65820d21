//! What a Job needs next.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;
use minke_api::Object;

use super::indexes::Indexes;
use super::policy::{self, Backoff, Failure, end_of};
use crate::context::{Typed, nonzero, seconds};
use crate::pods;

/// Keeps a pod until it is counted.
pub(super) const FINALIZER: &str = "batch.kubernetes.io/job-tracking";
pub(super) const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// How often the pods of an index failed before this one, and how often more without being counted.
pub(super) const FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";
pub(super) const IGNORED_FAILURES: &str = "batch.kubernetes.io/job-index-ignored-failure-count";
/// Pods that one pass makes or takes away at most, and that one status names at most as not yet counted.
const BURST: usize = 500;

/// What one pass will do.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub create: Vec<Create>,
    /// Uids of pods to delete. Their finalizer stays: they are counted like others.
    pub stop: Vec<String>,
    /// Uids of pods to let go of and to delete, in this order: they are too many, and are not counted.
    pub discard: Vec<String>,
    /// Uids of pods whose finalizer comes off: they are counted in the status as it was read, or never will be.
    pub release: Vec<String>,
    /// As it will be when all the above is done.
    pub status: JobStatus,
    pub tell: Vec<Told>,
    /// When something is due that no change will tell of.
    pub due: Option<Timestamp>,
    /// What to remember of failures, once the status is written.
    pub backoff: Backoff,
}

/// A pod to make.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Create {
    pub index: Option<i32>,
    /// Failures of the index so far, counted and ignored ones, where they are limited by index.
    pub failures: Option<(i32, i32)>,
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Told {
    pub warning: bool,
    pub reason: String,
    pub message: String,
}

/// How the Job ends. Its interim condition is set at once, the final one when no pod is left to be counted.
#[derive(Debug, Clone, PartialEq)]
struct End {
    success: bool,
    reason: String,
    message: String,
}

impl End {
    fn new(success: bool, reason: &str, message: &str) -> End {
        End { success, reason: reason.to_owned(), message: message.to_owned() }
    }

    fn failure(reason: &str, message: &str) -> Option<End> {
        Some(End::new(false, reason, message))
    }

    /// As the status says it, of a Job that is about to end.
    fn of(status: &JobStatus) -> Option<End> {
        let read = |type_: &str, success| {
            let mut conditions = status.conditions.iter().flatten();
            let met = conditions.find(|condition| condition.type_ == type_ && condition.status == "True")?;
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            Some(End { success, reason: text(&met.reason), message: text(&met.message) })
        };
        read("SuccessCriteriaMet", true).or_else(|| read("FailureTarget", false))
    }

    fn interim(&self) -> &'static str {
        if self.success { "SuccessCriteriaMet" } else { "FailureTarget" }
    }
}

pub(super) fn has_finalizer(pod: &Object) -> bool {
    pod.finalizers().any(|finalizer| finalizer == FINALIZER)
}

fn annotation<T: std::str::FromStr>(pod: &Pod, name: &str) -> Option<T> {
    pod.metadata.annotations.as_ref()?.get(name)?.parse().ok()
}

/// The pod's completion index.
pub(super) fn index_of(pod: &Pod) -> Option<i32> {
    annotation(pod, INDEX).filter(|index| *index >= 0)
}

/// How often the pod's index failed before: failures that counted, and those that did not.
fn failures_before(pod: &Pod) -> (i32, i32) {
    let read = |name| annotation::<i32>(pod, name).filter(|count| *count >= 0).unwrap_or(0);
    (read(FAILURES), read(IGNORED_FAILURES))
}

pub(super) fn holds(status: &JobStatus, type_: &str) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    conditions.any(|condition| condition.type_ == type_ && condition.status == "True")
}

pub(crate) fn is_finished(job: &Job) -> bool {
    job.status.as_ref().is_some_and(|status| holds(status, "Complete") || holds(status, "Failed"))
}

fn uid(pod: &Typed<Pod>) -> String {
    pod.object.uid().to_owned()
}

/// The Job and its pods as they are, with what the spec says of them.
struct View<'a> {
    spec: &'a JobSpec,
    all: &'a [Typed<Pod>],
    /// Neither finished nor going, and to be counted one day.
    active: Vec<&'a Typed<Pod>>,
    terminating: Vec<&'a Typed<Pod>>,
    /// Uids that the status names as counted, though their pods may still be held.
    named: (BTreeSet<&'a str>, BTreeSet<&'a str>),
    completions: i32,
    indexed: bool,
    /// Each index may fail this often.
    limit_per_index: Option<i32>,
    /// A pod that is going is not replaced, and not a failure, before it is gone.
    only_failed: bool,
    now: Timestamp,
}

impl<'a> View<'a> {
    fn new(spec: &'a JobSpec, status: &'a JobStatus, all: &'a [Typed<Pod>], now: Timestamp) -> View<'a> {
        let (going, staying): (Vec<_>, Vec<_>) =
            all.iter().filter(|pod| !pods::is_finished(pod)).partition(|pod| pod.object.deleted().is_some());
        let names = |uids: Option<&'a Vec<String>>| uids.into_iter().flatten().map(String::as_str).collect();
        let named = status.uncounted_terminated_pods.as_ref();
        let indexed = spec.completion_mode.as_deref() == Some("Indexed");
        View {
            spec,
            all,
            active: staying.into_iter().filter(|pod| has_finalizer(&pod.object)).collect(),
            terminating: going,
            named: (
                names(named.and_then(|named| named.succeeded.as_ref())),
                names(named.and_then(|named| named.failed.as_ref())),
            ),
            completions: spec.completions.unwrap_or(0),
            indexed,
            limit_per_index: spec.backoff_limit_per_index.filter(|_| indexed),
            only_failed: spec.pod_replacement_policy.as_deref() == Some("Failed")
                || spec.pod_failure_policy.is_some(),
            now,
        }
    }

    /// Will not succeed any more.
    fn is_failed(&self, pod: &Typed<Pod>) -> bool {
        pods::phase(pod) == "Failed"
            || (!self.only_failed && pod.object.deleted().is_some() && pods::phase(pod) != "Succeeded")
    }

    /// The pod's index, if the Job has it.
    fn index(&self, pod: &Pod) -> Option<i32> {
        index_of(pod).filter(|index| *index < self.completions)
    }

    fn is_valid(&self, pod: &Pod) -> bool {
        !self.indexed || self.index(pod).is_some()
    }

    fn counts(&self, pod: &Pod) -> bool {
        policy::judge_failure(self.spec, pod) != Failure::Ignored
    }

    /// Pods that ended and that nobody has counted yet.
    fn ended(&self, named: &BTreeSet<&str>, test: impl Fn(&Typed<Pod>) -> bool) -> Vec<&'a Typed<Pod>> {
        let fresh = |pod: &&Typed<Pod>| has_finalizer(&pod.object) && !named.contains(pod.object.uid());
        self.all.iter().filter(fresh).filter(|pod| self.is_valid(pod) && test(pod)).collect()
    }

    fn indexes<'p>(&self, pods: impl IntoIterator<Item = &'p &'p Typed<Pod>>) -> Indexes {
        pods.into_iter().filter_map(|pod| self.index(pod)).collect()
    }

    /// Indexes that have failed for good: those of the status, and `more` by the pods.
    fn failed_indexes(&self, status: &JobStatus, limit: i32, more: bool) -> Indexes {
        let before = Indexes::parse(status.failed_indexes.as_deref().unwrap_or_default(), self.completions);
        let is_lost = |pod: &&Typed<Pod>| {
            more && self.is_failed(pod)
                && match policy::judge_failure(self.spec, pod) {
                    Failure::FailsIndex => true,
                    Failure::Ignored => false,
                    Failure::Counts | Failure::FailsJob(_) => failures_before(pod).0 >= limit,
                }
        };
        let held = self.all.iter().filter(|pod| has_finalizer(&pod.object));
        before.with(&held.filter(is_lost).filter_map(|pod| self.index(pod)).collect())
    }

    /// The last failed pod of each index that is still to be tried: it is held until its successor exists, which
    /// has the count of failures from it.
    fn awaiting_successors(&self, settled: &Indexes) -> BTreeMap<i32, &'a Typed<Pod>> {
        let busy = self.indexes(&self.active);
        let mut last: BTreeMap<i32, &Typed<Pod>> = BTreeMap::new();
        let age = |pod: &Typed<Pod>| {
            let (counted, ignored) = failures_before(pod);
            (counted.saturating_add(ignored), end_of(pod))
        };
        for pod in self.all.iter().filter(|pod| has_finalizer(&pod.object) && self.is_failed(pod)) {
            let Some(index) = self.index(pod).filter(|i| !settled.has(*i) && !busy.has(*i)) else { continue };
            let known = last.entry(index).or_insert(pod);
            if age(pod) >= age(known) {
                *known = pod;
            }
        }
        last
    }

    /// Active pods that are one too many: with an index that another has or that the Job has not, and then the
    /// least useful ones, until there are `least`.
    fn surplus(&self, least: usize) -> Vec<String> {
        let ranked = |pods: &[&Typed<Pod>]| {
            let mut pods: Vec<Typed<Pod>> = pods.iter().map(|pod| (*pod).clone()).collect();
            pods::sort_for_deletion(&mut pods, &HashMap::new(), self.now);
            pods
        };
        let mut surplus = Vec::new();
        let mut left = self.active.clone();
        if self.indexed {
            let mut by_index: BTreeMap<Option<i32>, Vec<&Typed<Pod>>> = BTreeMap::new();
            self.active.iter().for_each(|pod| by_index.entry(self.index(pod)).or_default().push(pod));
            for (index, pods) in by_index.iter().filter(|(index, pods)| index.is_none() || pods.len() > 1) {
                let too_many = if index.is_none() { pods.len() } else { pods.len() - 1 };
                surplus.extend(ranked(pods).iter().take(too_many).map(uid));
            }
            let known: BTreeSet<&str> = surplus.iter().map(String::as_str).collect();
            left.retain(|pod| !known.contains(pod.object.uid()));
        }
        if surplus.len() < least {
            let more = least - surplus.len();
            surplus.extend(ranked(&left).iter().take(more).map(uid));
        }
        surplus
    }
}

/// What the pods amount to, those counted that are about to be.
struct Tally<'a> {
    succeeded: i32,
    failed: i32,
    /// Indexes that had succeeded before, and that have now.
    done_before: Indexes,
    done: Indexes,
    /// Indexes that failed for good, if there is a limit for each.
    lost: Option<Indexes>,
    /// Uids of failed pods that wait for their successors.
    held: BTreeSet<&'a str>,
}

/// Decides. `all` are the pods of the Job, finished ones included; `backoff` is what is remembered of failures.
pub(crate) fn plan(job: &Typed<Job>, all: &[Typed<Pod>], backoff: &Backoff, now: Timestamp) -> Plan {
    let (spec, before) = (job.spec.clone().unwrap_or_default(), job.status.clone().unwrap_or_default());
    let mut plan = Plan { status: before.clone(), ..Plan::default() };
    if is_finished(job) {
        // What is left of its pods need not wait any more.
        plan.release = all.iter().filter(|pod| has_finalizer(&pod.object)).map(uid).collect();
        return plan;
    }
    let view = View::new(&spec, &before, all, now);
    let suspended = spec.suspend.unwrap_or(false);
    let going = job.object.deleted().is_some();
    if before.start_time.is_none() && !suspended {
        plan.status.start_time = Some(seconds(now));
    }
    let (named_succeeded, named_failed) = &view.named;
    let done_before =
        Indexes::parse(before.completed_indexes.as_deref().unwrap_or_default(), view.completions);
    let is_news =
        |pod: &Typed<Pod>| !view.indexed || view.index(pod).is_some_and(|index| !done_before.has(index));
    let succeeded = view.ended(named_succeeded, |pod| pods::phase(pod) == "Succeeded" && is_news(pod));
    let failed = view.ended(named_failed, |pod| view.is_failed(pod));
    plan.backoff = backoff.after(&succeeded, &failed);

    let done = done_before.with(&view.indexes(&succeeded));
    let known = End::of(&before);
    // Pods that stop because the Job has failed do not fail their indexes.
    let lost = view.limit_per_index.map(|limit| view.failed_indexes(&before, limit, known.is_none()));
    let settled = lost.as_ref().map(|lost| lost.with(&done));
    let waiting = settled.map(|settled| view.awaiting_successors(&settled)).unwrap_or_default();
    let counted_failures = failed.iter().filter(|pod| view.counts(pod)).count() + named_failed.len();
    let tally = Tally {
        succeeded: match view.indexed {
            true => done.len(),
            false => before.succeeded.unwrap_or(0) + (succeeded.len() + named_succeeded.len()) as i32,
        },
        failed: before.failed.unwrap_or(0) + counted_failures as i32,
        held: waiting.values().map(|pod| pod.object.uid()).collect(),
        done_before,
        done,
        lost,
    };

    let mut end = known.clone().or_else(|| judge(&view, &tally, &mut plan));
    let mut active = view.active.len() as i32;
    // Let go of already, when something came between that and deleting them.
    let stale = all.iter().filter(|pod| {
        !going && !pods::is_finished(pod) && pod.object.deleted().is_none() && !has_finalizer(&pod.object)
    });
    let stale: Vec<String> = stale.map(uid).collect();
    if end.is_some() {
        plan.stop = view.active.iter().map(|pod| uid(pod)).collect();
        active = 0;
    } else {
        if !going {
            active = manage(&view, &tally, &waiting, &mut plan);
        }
        let complete = match spec.completions {
            Some(completions) => tally.succeeded >= completions,
            // Without a number, the first success ends it, when no other pod is at work.
            None => tally.succeeded > 0,
        };
        if complete && active == 0 {
            end = Some(End::new(true, "CompletionsReached", "Reached expected number of succeeded pods"));
        } else if !going {
            note_suspension(suspended, &mut plan, now);
        }
    }
    plan.discard.extend(stale);
    let leaving = (plan.stop.len() + plan.discard.len()) as i32;
    let terminating = view.terminating.len() as i32 + leaving;
    let doomed: BTreeSet<&str> = plan.stop.iter().chain(&plan.discard).map(String::as_str).collect();
    let ready = |pod: &&&Typed<Pod>| pods::is_ready(pod) && !doomed.contains(pod.object.uid());
    let ready = view.active.iter().filter(ready).count() as i32;
    plan.status.active = nonzero(active);
    plan.status.ready = Some(ready);
    plan.status.terminating = Some(terminating);
    let all_counted = count(&view, &tally, going, end.as_ref(), known.is_some(), &mut plan);
    if let Some(end) = end {
        let (reason, message) = (Some(end.reason.as_str()), end.message.as_str());
        set_condition(&mut plan.status, end.interim(), true, reason, message, now);
        if all_counted && active == 0 && terminating == 0 {
            conclude(&spec, &end, &mut plan, now);
        }
    }
    plan
}

/// What there is to remember of failures when nothing is remembered: by the pods that are counted already.
pub(crate) fn remembered(job: &Job, all: &[Typed<Pod>]) -> Backoff {
    let named = job.status.as_ref().and_then(|status| status.uncounted_terminated_pods.as_ref());
    let names = named.into_iter().flat_map(|named| named.succeeded.iter().chain(&named.failed)).flatten();
    let named: BTreeSet<&str> = names.map(String::as_str).collect();
    let counted = all.iter().filter(|pod| !has_finalizer(&pod.object) || named.contains(pod.object.uid()));
    let of_phase = |phase| counted.clone().filter(|pod| pods::phase(pod) == phase).collect::<Vec<_>>();
    Backoff::default().after(&of_phase("Succeeded"), &of_phase("Failed"))
}

/// Whether and how the Job ends, apart from having all its completions.
fn judge(view: &View, tally: &Tally, plan: &mut Plan) -> Option<End> {
    let spec = view.spec;
    let mut failures = view.all.iter().filter(|pod| spec.pod_failure_policy.is_some() && view.is_failed(pod));
    if let Some(why) = failures.find_map(|pod| match policy::judge_failure(spec, pod) {
        Failure::FailsJob(why) => Some(why),
        _ => None,
    }) {
        return End::failure("PodFailurePolicy", &why);
    }
    let limit = spec.backoff_limit.unwrap_or(6);
    let restarts_too_often = || {
        let template = spec.template.spec.as_ref();
        let policy = template.and_then(|template| template.restart_policy.as_deref());
        policy == Some("OnFailure") && policy::restarts(view.all) >= limit.max(1)
    };
    if tally.failed > limit || restarts_too_often() {
        return End::failure("BackoffLimitExceeded", "Job has reached the specified backoff limit");
    }
    let suspended = spec.suspend.unwrap_or(false);
    if let (Some(limit), Some(start), false) =
        (spec.active_deadline_seconds, &plan.status.start_time, suspended)
    {
        let limit = Duration::from_secs(u64::try_from(limit).unwrap_or(0));
        match start.0.checked_add(limit) {
            Ok(end) if end <= view.now => {
                return End::failure("DeadlineExceeded", "Job was active longer than specified deadline");
            }
            Ok(end) => plan.due = Some(end),
            // A time after the end of all times.
            Err(_) => {}
        }
    }
    if let Some(lost) = tally.lost.as_ref().filter(|lost| !lost.is_empty()) {
        if spec.max_failed_indexes.is_some_and(|max| lost.len() > max) {
            return End::failure(
                "MaxFailedIndexesExceeded",
                "Job has exceeded the specified maximal number of failed indexes",
            );
        }
        if lost.with(&tally.done).len() >= view.completions {
            return End::failure("FailedIndexes", "Job has failed indexes");
        }
    }
    let success = spec.success_policy.as_ref().filter(|_| view.indexed);
    let met = policy::judge_success(success, &tally.done, view.completions)?;
    Some(End::new(true, "SuccessPolicy", &met))
}

/// Makes the number of active pods right; returns what it will be.
fn manage(view: &View, tally: &Tally, waiting: &BTreeMap<i32, &Typed<Pod>>, plan: &mut Plan) -> i32 {
    let spec = view.spec;
    let active = view.active.len() as i32;
    if spec.suspend.unwrap_or(false) {
        plan.discard = view.surplus(view.active.len());
        return 0;
    }
    let parallelism = spec.parallelism.unwrap_or(1).max(0);
    let wanted = match spec.completions {
        Some(completions) => parallelism.min((completions - tally.succeeded).max(0)),
        None if tally.succeeded > 0 => active,
        None => parallelism,
    };
    plan.discard = view.surplus(usize::try_from(active - wanted).unwrap_or(0));
    plan.discard.truncate(BURST);
    if !plan.discard.is_empty() {
        return active - plan.discard.len() as i32;
    }
    let terminating = if view.only_failed { view.terminating.len() as i32 } else { 0 };
    let Ok(missing) = usize::try_from(wanted - active - terminating) else { return active };
    if missing == 0 {
        return active;
    }
    // A pod that failed is followed by the next only after a while.
    if let Some(at) = plan.backoff.over().filter(|at| view.limit_per_index.is_none() && *at > view.now) {
        plan.wait_until(at);
        return active;
    }
    if !view.indexed {
        plan.create = vec![Create::default(); missing.min(BURST)];
        return active + plan.create.len() as i32;
    }
    let mut taken = tally.done.with(&view.indexes(&view.active));
    if view.only_failed {
        taken = taken.with(&view.indexes(&view.terminating));
    }
    if let Some(lost) = &tally.lost {
        taken = taken.with(lost);
    }
    for index in taken.missing(view.completions).take(missing.min(BURST)) {
        let predecessor = waiting.get(&index);
        let failures = predecessor.map_or((0, 0), |pod| match failures_before(pod) {
            (counted, ignored) if view.counts(pod) => (counted.saturating_add(1), ignored),
            (counted, ignored) => (counted, ignored.saturating_add(1)),
        });
        let in_a_row = u32::try_from(failures.0.saturating_add(failures.1)).unwrap_or(0);
        let backoff = Backoff { failures: in_a_row, last: predecessor.map(|pod| end_of(pod)) };
        match backoff.over().filter(|at| *at > view.now) {
            Some(at) => plan.wait_until(at),
            None => {
                let failures = view.limit_per_index.map(|_| failures);
                plan.create.push(Create { index: Some(index), failures });
            }
        }
    }
    active + plan.create.len() as i32
}

impl Plan {
    fn wait_until(&mut self, at: Timestamp) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

/// Moves pods that ended through the counting: the status names them, then their finalizer comes off, then they
/// move from the names to the numbers. Of an indexed Job, successes are counted by their index instead. Returns
/// whether nothing is left to be counted. `known` is whether the end is in the status as it was read.
fn count(view: &View, tally: &Tally, going: bool, end: Option<&End>, known: bool, plan: &mut Plan) -> bool {
    let (named_succeeded, named_failed) = &view.named;
    let held: BTreeSet<&str> =
        view.all.iter().filter(|pod| has_finalizer(&pod.object)).map(|pod| pod.object.uid()).collect();
    let status = &mut plan.status;
    let split = |named: &BTreeSet<&str>| -> (Vec<String>, i32) {
        let (still, free): (Vec<&str>, Vec<&str>) = named.iter().partition(|uid| held.contains(*uid));
        (still.into_iter().map(str::to_owned).collect(), free.len() as i32)
    };
    let ((mut succeeded, more_succeeded), (mut failed, more_failed)) =
        (split(named_succeeded), split(named_failed));
    status.succeeded = nonzero(status.succeeded.unwrap_or(0) + more_succeeded);
    status.failed = nonzero(status.failed.unwrap_or(0) + more_failed);

    let discarded: BTreeSet<&str> = plan.discard.iter().map(String::as_str).collect();
    let (job_succeeded, job_failed) =
        (end.is_some_and(|end| end.success), end.is_some_and(|end| !end.success));
    let mut new_done = BTreeSet::new();
    let mut pods: Vec<&Typed<Pod>> = view.all.iter().filter(|pod| held.contains(pod.object.uid())).collect();
    if view.indexed {
        pods.sort_by_cached_key(|pod| index_of(pod));
    }
    for pod in pods.into_iter().filter(|pod| !discarded.contains(pod.object.uid())) {
        let (id, phase) = (pod.object.uid(), pods::phase(pod));
        let has_room = succeeded.len() + failed.len() + new_done.len() < BURST;
        let is_counted = if named_succeeded.contains(id) || named_failed.contains(id) {
            true
        } else if phase == "Succeeded" {
            match view.index(pod).filter(|index| !tally.done_before.has(*index)) {
                _ if !view.indexed => {
                    succeeded.extend(has_room.then(|| uid(pod)));
                    false
                }
                Some(index) => {
                    new_done.extend(has_room.then_some(index));
                    false
                }
                None => true,
            }
        } else if job_succeeded && (known || !view.is_failed(pod)) {
            // Not needed any more, and stopped for that, which is no failure.
            known
        } else if view.is_failed(pod) || job_failed {
            if end.is_none() && !going && tally.held.contains(id) {
                continue;
            }
            // When the Job has failed, so have the pods that it had.
            let is_none = !view.is_valid(pod) || !view.counts(pod);
            failed.extend((!is_none && has_room).then(|| uid(pod)));
            is_none
        } else {
            going
        };
        if is_counted {
            plan.release.push(uid(pod));
        }
    }
    let all_counted = held.is_empty() && succeeded.is_empty() && failed.is_empty();
    let list = |uids: Vec<String>| (!uids.is_empty()).then_some(uids);
    status.uncounted_terminated_pods =
        Some(UncountedTerminatedPods { succeeded: list(succeeded), failed: list(failed) });
    if view.indexed {
        let done = tally.done_before.with(&new_done.into_iter().collect());
        status.succeeded = nonzero(done.len());
        status.completed_indexes = Some(done.to_string()).filter(|text| !text.is_empty());
        status.failed_indexes = tally.lost.as_ref().map(Indexes::to_string);
    }
    all_counted
}

fn note_suspension(suspended: bool, plan: &mut Plan, now: Timestamp) {
    let was = holds(&plan.status, "Suspended");
    if suspended && !was {
        set_condition(&mut plan.status, "Suspended", true, Some("JobSuspended"), "Job suspended", now);
        plan.status.start_time = None;
        plan.tell(false, "Suspended", "Job suspended");
    } else if !suspended && was {
        set_condition(&mut plan.status, "Suspended", false, Some("JobResumed"), "Job resumed", now);
        // The deadline counts from when it goes on.
        plan.status.start_time = Some(seconds(now));
        plan.tell(false, "Resumed", "Job resumed");
    }
}

impl Plan {
    fn tell(&mut self, warning: bool, reason: &str, message: &str) {
        self.tell.push(Told { warning, reason: reason.to_owned(), message: message.to_owned() });
    }
}

fn conclude(spec: &JobSpec, end: &End, plan: &mut Plan, now: Timestamp) {
    let reason = Some(end.reason.as_str());
    plan.due = None;
    if !end.success {
        set_condition(&mut plan.status, "Failed", true, reason, &end.message, now);
        return plan.tell(true, &end.reason, &end.message);
    }
    plan.status.completion_time = Some(seconds(now));
    set_condition(&mut plan.status, "Complete", true, reason, &end.message, now);
    if spec.completions.is_some_and(|completions| plan.status.succeeded.unwrap_or(0) > completions) {
        let message = "Too many succeeded pods running after completion count reached";
        plan.tell(true, "TooManySucceededPods", message);
    }
    plan.tell(false, "Completed", "Job completed");
}

fn set_condition(
    status: &mut JobStatus,
    type_: &str,
    holds: bool,
    reason: Option<&str>,
    message: &str,
    now: Timestamp,
) {
    let value = if holds { "True" } else { "False" };
    let conditions = status.conditions.get_or_insert_default();
    if conditions.iter().any(|condition| condition.type_ == type_ && condition.status == value) {
        return;
    }
    conditions.retain(|condition| condition.type_ != type_);
    conditions.push(JobCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: reason.map(str::to_owned),
        message: Some(message.to_owned()),
        last_probe_time: Some(seconds(now)),
        last_transition_time: Some(seconds(now)),
    });
}
