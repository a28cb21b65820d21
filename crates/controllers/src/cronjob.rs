//! Makes the Jobs of CronJobs when they are due, and deletes old ones.
//!
//! Waits for the time that the schedule says next. A Job is named by the minute that it was due, so that none is
//! made twice whatever happens between making it and noting that. Upstream: pkg/controller/cronjob.

#[cfg(test)]
mod tests;

use async_trait::async_trait;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{CronJob, CronJobSpec, CronJobStatus, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use minke_api::cron::{self, Schedule};
use minke_api::{ApiType, Kind, Object, Status};
use minke_client::{Change, DeleteOptions, Propagation, Target, reference};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, controller_ref};
use crate::run::Controller;

/// More missed times than this make a warning.
const MISSED_MAX: i64 = 100;
const SCHEDULED_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";

/// What one pass will do.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    /// Uids of Jobs to delete.
    delete: Vec<String>,
    /// A Job to make, for this time. It becomes active, and its time the last, when it is made.
    create: Option<Timestamp>,
    status: CronJobStatus,
    tell: Vec<Told>,
    /// When the next Job is due.
    due: Option<Timestamp>,
}

/// An event.
#[derive(Debug, PartialEq)]
struct Told {
    warning: bool,
    reason: &'static str,
    message: String,
}

impl Plan {
    fn note(&mut self, reason: &'static str, message: impl Into<String>) {
        self.tell.push(Told { warning: false, reason, message: message.into() });
    }

    fn warn(&mut self, reason: &'static str, message: impl Into<String>) {
        self.tell.push(Told { warning: true, reason, message: message.into() });
    }

    fn forget(&mut self, uid: &str) {
        if let Some(active) = &mut self.status.active {
            active.retain(|reference| reference.uid.as_deref() != Some(uid));
        }
        self.status.active.take_if(|active| active.is_empty());
    }

    fn add(&mut self, job: &Object, at: Timestamp) {
        self.status.active.get_or_insert_default().push(reference(job));
        self.status.last_schedule_time = Some(Time(at));
    }

    /// Whether the Job of this uid is noted as active.
    fn knows(&self, uid: &str) -> bool {
        self.status.active.iter().flatten().any(|reference| reference.uid.as_deref() == Some(uid))
    }
}

/// `Complete` or `Failed`, of a Job that is over.
fn outcome(job: &Job) -> Option<&str> {
    let mut conditions = job.status.as_ref()?.conditions.iter().flatten();
    let is_last = |type_: &str| matches!(type_, "Complete" | "Failed");
    let last = conditions.find(|condition| is_last(&condition.type_) && condition.status == "True")?;
    Some(&last.type_)
}

/// Decides. `jobs` are those that the CronJob controls.
fn plan(cron: &Typed<CronJob>, jobs: &[Typed<Job>], now: Timestamp) -> Plan {
    let spec = &cron.spec;
    let mut plan = Plan { status: cron.status.clone().unwrap_or_default(), ..Plan::default() };
    forget_old(spec, jobs, &mut plan);
    if let Some((at, next)) = due(cron, spec, jobs, now, &mut plan) {
        plan.due = next;
        start(cron, spec, jobs, at, now, &mut plan);
    }
    plan
}

/// Deletes the oldest finished Jobs beyond what the history may hold.
fn forget_old(spec: &CronJobSpec, jobs: &[Typed<Job>], plan: &mut Plan) {
    let limits =
        [("Complete", spec.successful_jobs_history_limit), ("Failed", spec.failed_jobs_history_limit)];
    for (kind, limit) in limits {
        let Some(limit) = limit.and_then(|limit| usize::try_from(limit).ok()) else { continue };
        let is_over = |job: &&Typed<Job>| outcome(job) == Some(kind) && job.object.deleted().is_none();
        let mut over: Vec<&Typed<Job>> = jobs.iter().filter(is_over).collect();
        let start = |job: &Job| job.status.as_ref().and_then(|status| Some(status.start_time.as_ref()?.0));
        over.sort_by_key(|job| (start(job).is_none(), start(job), job.object.name().to_owned()));
        let too_many = over.len().saturating_sub(limit);
        for job in &over[..too_many] {
            plan.delete.push(job.object.uid().to_owned());
            plan.forget(job.object.uid());
        }
    }
}

/// Brings the status up to date, and finds for when a Job is due and when the next one will be.
fn due(
    cron: &Typed<CronJob>,
    spec: &CronJobSpec,
    jobs: &[Typed<Job>],
    now: Timestamp,
    plan: &mut Plan,
) -> Option<(Option<Timestamp>, Option<Timestamp>)> {
    let zone = spec.time_zone.as_deref().map_or(Ok(TimeZone::UTC), cron::zone);
    let schedule = Schedule::parse(&spec.schedule);
    let unmet = match (&schedule, &zone) {
        (Ok(schedule), Ok(zone)) => Some(unmet(cron, spec, schedule, zone, now)),
        _ => None,
    };
    let expected = unmet.as_ref().and_then(|unmet| Some(job_name(cron, unmet.as_ref().ok()?.last?)));
    for job in jobs {
        let (name, uid) = (job.object.name(), job.object.uid());
        match outcome(job) {
            None if plan.knows(uid) || expected.as_deref() == Some(name) => {}
            None => {
                let message = format!("Saw a job that the controller did not create or forgot: {name}");
                plan.warn("UnexpectedJob", message);
            }
            Some(outcome) => {
                if plan.knows(uid) {
                    plan.forget(uid);
                    let message = format!("Saw completed job: {name}, condition: {outcome}");
                    plan.note("SawCompletedJob", message);
                }
                let completed = job.status.as_ref().and_then(|status| status.completion_time.clone());
                if outcome == "Complete" && completed > plan.status.last_successful_time {
                    plan.status.last_successful_time = completed;
                }
            }
        }
    }
    for reference in plan.status.active.clone().into_iter().flatten() {
        let uid = reference.uid.unwrap_or_default();
        if !jobs.iter().any(|job| job.object.uid() == uid) {
            plan.forget(&uid);
            plan.note(
                "MissingJob",
                format!("Active job went missing: {}", reference.name.unwrap_or_default()),
            );
        }
    }
    if cron.object.deleted().is_some() {
        return None;
    }
    if let (Err(why), Some(name)) = (&zone, &spec.time_zone) {
        plan.warn("UnknownTimeZone", format!("invalid timeZone: {name:?}: {why}"));
        return None;
    }
    if spec.suspend.unwrap_or(false) {
        return None;
    }
    if spec.schedule.contains("TZ") {
        let message = format!(
            "CRON_TZ or TZ used in schedule {:?} is not officially supported, see https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details",
            spec.schedule
        );
        plan.warn("UnsupportedSchedule", message);
    }
    if let Err(why) = &schedule {
        plan.warn("UnparseableSchedule", format!("unparseable schedule: {:?} : {why}", spec.schedule));
        return None;
    }
    match unmet? {
        Ok(unmet) => {
            if unmet.missed > MISSED_MAX && unmet.last.is_some() {
                let message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
                plan.warn("TooManyMissedTimes", message);
            }
            Some((unmet.last, unmet.next))
        }
        Err(why) => {
            plan.warn("InvalidSchedule", format!("invalid schedule: {} : {why}", spec.schedule));
            None
        }
    }
}

/// When Jobs were due that nobody has seen to.
#[derive(Debug, PartialEq)]
struct Unmet {
    /// The last such time up to now.
    last: Option<Timestamp>,
    /// About how many there were, the last included.
    missed: i64,
    /// The first time to come.
    next: Option<Timestamp>,
}

/// Looks from the last time that was seen to, or from when the CronJob was made. What is too late to start is not
/// looked at.
fn unmet(
    cron: &Typed<CronJob>,
    spec: &CronJobSpec,
    schedule: &Schedule,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<Unmet, &'static str> {
    let last = cron.status.as_ref().and_then(|status| Some(status.last_schedule_time.as_ref()?.0));
    let mut since = last.or(cron.object.created()).unwrap_or(now);
    if let Some(deadline) = spec.starting_deadline_seconds {
        let earliest = now.saturating_sub(SignedDuration::from_secs(deadline)).unwrap_or(Timestamp::MIN);
        since = since.max(earliest);
    }
    let never = "time difference between two schedules is less than 1 second";
    let first = schedule.next(since, zone).ok_or(never)?;
    if first > now {
        return Ok(Unmet { last: None, missed: 0, next: Some(first) });
    }
    let Some(second) = schedule.next(first, zone).filter(|second| *second <= now) else {
        return Ok(Unmet { last: Some(first), missed: 1, next: schedule.next(now.max(first), zone) });
    };
    // There may be thousands: jump to shortly before now, as if they were evenly spread.
    let step = second.as_second() - first.as_second();
    if step < 1 {
        return Err(never);
    }
    let missed = (now.as_second() - first.as_second()) / step + 1;
    let (mut last, mut next, mut back) = (None, None, 2);
    // Where they are not evenly spread, look twice as far back until one is found; the first is there at last.
    while last.is_none() {
        let near = first.as_second() + (missed - back).max(0) * step;
        let mut at = Timestamp::from_second(near).unwrap_or(first);
        if back > missed {
            last = Some(first);
        }
        next = loop {
            match schedule.next(at, zone) {
                Some(next) if next <= now => (last, at) = (Some(next), next),
                next => break next,
            }
        };
        back = back.saturating_mul(2);
    }
    Ok(Unmet { last, missed, next })
}

/// Decides whether the Job that is due is made.
fn start(
    cron: &Typed<CronJob>,
    spec: &CronJobSpec,
    jobs: &[Typed<Job>],
    at: Option<Timestamp>,
    now: Timestamp,
    plan: &mut Plan,
) {
    let Some(at) = at else { return };
    let late = spec
        .starting_deadline_seconds
        .and_then(|deadline| at.checked_add(SignedDuration::from_secs(deadline)).ok());
    if late.is_some_and(|late| late < now) {
        let time = at.strftime("%a, %d %b %Y %H:%M:%S +0000");
        return plan.warn("MissSchedule", format!("Missed scheduled time to start a job: {time}"));
    }
    let name = job_name(cron, at);
    let is_noted = plan.status.active.iter().flatten().any(|active| active.name.as_deref() == Some(&name));
    if is_noted || plan.status.last_schedule_time.as_ref().is_some_and(|last| last.0 == at) {
        return;
    }
    // It was made, but that was not noted.
    if let Some(made) = jobs.iter().find(|job| job.object.name() == name) {
        plan.add(&made.object, at);
        return;
    }
    let active: Vec<String> =
        plan.status.active.iter().flatten().filter_map(|reference| reference.uid.clone()).collect();
    match spec.concurrency_policy.as_deref() {
        Some("Forbid") if !active.is_empty() => {
            let message =
                "Not starting job because prior execution is running and concurrency policy is Forbid";
            return plan.note("JobAlreadyActive", message);
        }
        Some("Replace") => {
            for uid in active {
                plan.forget(&uid);
                plan.delete.push(uid);
            }
        }
        _ => {}
    }
    plan.create = Some(at);
}

/// Named by the minute that it was due.
fn job_name(cron: &Typed<CronJob>, at: Timestamp) -> String {
    format!("{}-{}", cron.object.name(), at.as_second().div_euclid(60))
}

fn job_of(cron: &Typed<CronJob>, at: Timestamp) -> Value {
    let spec = cron.spec.clone();
    let zone = spec.time_zone.as_deref().and_then(|name| cron::zone(name).ok());
    let scheduled = match zone.filter(|zone| *zone != TimeZone::UTC) {
        Some(zone) => at.to_zoned(zone).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
        None => minke_api::time::format_seconds(at),
    };
    let template = spec.job_template;
    let metadata = template.metadata.unwrap_or_default();
    let mut annotations = metadata.annotations.unwrap_or_default();
    annotations.insert(SCHEDULED_AT.to_owned(), scheduled);
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(cron, at),
            "labels": metadata.labels.unwrap_or_default(),
            "annotations": annotations,
            "ownerReferences": [controller_ref(&cron.object)],
        },
        "spec": template.spec.unwrap_or_default().to_value(),
    })
}

pub(crate) struct CronJobs;

#[async_trait]
impl Controller for CronJobs {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<CronJob>(), Kind::of::<Job>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        if change.object().kind() == Kind::of::<CronJob>() {
            return vec![Item::of(change.object())];
        }
        let states = change.old.iter().chain(&change.new);
        states.filter_map(|job| Item::controller_of(job, Kind::of::<CronJob>())).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(cron) = ctx.get::<CronJob>(&item.key) else { return Ok(Requeue::Never) };
        let jobs = ctx.controlled_by(&cron.object, Kind::of::<Job>());
        let jobs: Vec<Typed<Job>> = jobs.into_iter().filter_map(Typed::new).collect();
        let mut plan = plan(&cron, &jobs, ctx.now());
        let failed = carry_out(ctx, &cron, &jobs, &mut plan).await.err();
        for told in &plan.tell {
            match told.warning {
                true => ctx.events.warning(&cron.object, told.reason, told.message.as_str()),
                false => ctx.events.normal(&cron.object, told.reason, told.message.as_str()),
            }
        }
        if cron.status.clone().unwrap_or_default() != plan.status {
            ctx.update_status(&cron.object, &plan.status).await?;
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(Requeue::at(plan.due, ctx.now())),
        }
    }
}

async fn carry_out(
    ctx: &Ctx,
    cron: &Typed<CronJob>,
    jobs: &[Typed<Job>],
    plan: &mut Plan,
) -> Result<(), Status> {
    for uid in std::mem::take(&mut plan.delete) {
        let found = jobs.iter().find(|job| job.object.uid() == uid);
        let Some(job) = found.filter(|job| !ctx.is_going(&job.object)) else { continue };
        // Its pods go with it.
        let options =
            DeleteOptions { propagation: Some(Propagation::Background), ..DeleteOptions::default() };
        if let Err(error) = ctx.delete(&job.object, options).await {
            plan.warn("FailedDelete", format!("Deleted job: {error}"));
            return Err(error);
        }
        plan.note("SuccessfulDelete", format!("Deleted job {}", job.object.name()));
    }
    let Some(at) = plan.create.take() else { return Ok(()) };
    let (kind, namespace) = (Kind::of::<Job>(), cron.object.namespace());
    match ctx.create(kind, namespace, job_of(cron, at)).await {
        Ok(job) => {
            plan.note("SuccessfulCreate", format!("Created job {}", job.name()));
            plan.add(&job, at);
            Ok(())
        }
        // Ours is not in the cache yet. Of somebody else's, it is not ours to say anything.
        Err(error) if error.is_already_exists() => {
            let name = job_name(cron, at);
            let there = ctx.client.get(Target::object(kind, namespace, &name)).await?;
            if there.controller().is_some_and(|owner| *owner.uid == *cron.object.uid())
                && !plan.knows(there.uid())
            {
                plan.add(&there, at);
            }
            Ok(())
        }
        Err(error) => {
            if !error.has_cause("NamespaceTerminating") {
                plan.warn("FailedCreate", format!("Error creating job: {error}"));
            }
            Err(error)
        }
    }
}
