use super::*;
use crate::pods::tests::{NOW, now};

/// 2023-11-14 22:13:20; the minute before it began 20 s ago.
const MINUTE: i64 = NOW - 20;

fn time(at: i64) -> String {
    Timestamp::from_second(at).unwrap().to_string()
}

/// Every minute, made an hour ago, last seen to at `last`.
fn cron(last: Option<i64>, change: impl FnOnce(&mut Value)) -> Typed<CronJob> {
    let mut cron = json!({
        "metadata": { "name": "c", "namespace": "ns", "uid": "c", "creationTimestamp": time(NOW - 3600) },
        "spec": { "schedule": "* * * * *", "jobTemplate": { "metadata": { "labels": { "a": "b" } }, "spec": { "template": {} } } },
        "status": { "lastScheduleTime": last.map(time) },
    });
    change(&mut cron);
    Typed::new(Object::from_value(Kind::of::<CronJob>(), &cron).unwrap().into()).unwrap()
}

/// A Job that began so long ago, and how it ended.
fn job(name: &str, ago: i64, ended: &str) -> Typed<Job> {
    let conditions = json!([{ "type": ended, "status": "True" }]);
    let end = (ended == "Complete").then(|| time(NOW - ago + 5));
    let job = json!({
        "metadata": { "name": name, "namespace": "ns", "uid": format!("uid-{name}") },
        "spec": { "template": {} },
        "status": { "startTime": time(NOW - ago), "completionTime": end, "conditions": conditions },
    });
    Typed::new(Object::from_value(Kind::of::<Job>(), &job).unwrap().into()).unwrap()
}

fn active(names: &[&str]) -> Value {
    names.iter().map(|name| json!({ "name": name, "uid": format!("uid-{name}") })).collect()
}

/// The time of the Job that is made, when the next is due, and the reasons of the events.
#[track_caller]
fn check(
    cron: &Typed<CronJob>,
    jobs: &[Typed<Job>],
    create: Option<i64>,
    due: Option<i64>,
    told: &[&str],
) -> Plan {
    let plan = plan(cron, jobs, now());
    assert_eq!(plan.create.map(|at| at.as_second()), create, "{plan:?}");
    assert_eq!(plan.due.map(|at| at.as_second()), due, "{plan:?}");
    assert_eq!(plan.tell.iter().map(|told| told.reason).collect::<Vec<_>>(), told);
    plan
}

#[test]
fn jobs_are_made_when_they_are_due() {
    let next = Some(MINUTE + 60);
    check(&cron(Some(MINUTE - 60), |_| {}), &[], Some(MINUTE), next, &[]);
    check(&cron(Some(MINUTE), |_| {}), &[], None, next, &[]);
    // Just made.
    check(&cron(None, |c| c["metadata"]["creationTimestamp"] = time(NOW - 10).into()), &[], None, next, &[]);
    // Several were missed: the last of them is made up for.
    check(&cron(Some(MINUTE - 600), |_| {}), &[], Some(MINUTE), next, &[]);
    check(
        &cron(None, |c| c["spec"]["schedule"] = "@hourly".into()),
        &[],
        Some(NOW - NOW % 3600),
        Some(NOW - NOW % 3600 + 3600),
        &[],
    );
    check(&cron(Some(MINUTE - 60), |c| c["spec"]["suspend"] = true.into()), &[], None, None, &[]);
    check(
        &cron(Some(MINUTE - 60), |c| c["metadata"]["deletionTimestamp"] = time(NOW).into()),
        &[],
        None,
        None,
        &[],
    );
}

#[test]
fn very_many_missed_times_are_warned_of() {
    let next = Some(MINUTE + 60);
    check(&cron(Some(MINUTE - 99 * 60), |_| {}), &[], Some(MINUTE), next, &[]);
    check(&cron(Some(MINUTE - 101 * 60), |_| {}), &[], Some(MINUTE), next, &["TooManyMissedTimes"]);
    // Years of missed minutes are no work.
    let ages = cron(Some(NOW - 40 * 365 * 86400), |c| c["spec"]["schedule"] = "*/7 3-8 * * 1-5".into());
    let plan = plan(&ages, &[], now());
    assert_eq!(plan.create.map(|at| at.to_string()).as_deref(), Some("2023-11-14T08:56:00Z"));
    assert_eq!(plan.due.map(|at| at.to_string()).as_deref(), Some("2023-11-15T03:00:00Z"));
}

#[test]
fn what_is_too_late_is_not_started() {
    let with = |seconds: i64| {
        cron(Some(MINUTE - 3000), move |c| {
            c["spec"]["schedule"] = "0 * * * *".into();
            c["spec"]["startingDeadlineSeconds"] = seconds.into();
        })
    };
    let hour = NOW - NOW % 3600;
    check(&with(900), &[], Some(hour), Some(hour + 3600), &[]);
    check(&with(600), &[], None, Some(hour + 3600), &[]);
    // A deadline keeps the count of the missed ones low.
    let deadline = cron(Some(MINUTE - 10_000 * 60), |c| c["spec"]["startingDeadlineSeconds"] = 200.into());
    check(&deadline, &[], Some(MINUTE), Some(MINUTE + 60), &[]);
}

#[test]
fn schedules_may_be_in_a_time_zone() {
    let at_nine = cron(Some(NOW - 86400), |c| {
        c["spec"]["schedule"] = "0 9 * * *".into();
        c["spec"]["timeZone"] = "Asia/Kolkata".into();
    });
    let plan = plan(&at_nine, &[], now());
    let at = plan.create.unwrap();
    assert_eq!(at.to_string(), "2023-11-14T03:30:00Z");
    let made = job_of(&at_nine, at);
    assert_eq!(made["metadata"]["annotations"][SCHEDULED_AT], "2023-11-14T09:00:00+05:30");
    let unknown = cron(Some(MINUTE - 60), |c| c["spec"]["timeZone"] = "Mars/Olympus".into());
    let told = check(&unknown, &[], None, None, &["UnknownTimeZone"]).tell;
    assert_eq!(told[0].message, "invalid timeZone: \"Mars/Olympus\": unknown time zone Mars/Olympus");
    let old = cron(Some(MINUTE - 60), |c| c["spec"]["schedule"] = "TZ=Asia/Tokyo * * * * *".into());
    check(&old, &[], Some(MINUTE), Some(MINUTE + 60), &["UnsupportedSchedule"]);
}

#[test]
fn bad_schedules_are_told_and_left_alone() {
    let bad = |schedule: &str| cron(Some(MINUTE - 60), |c| c["spec"]["schedule"] = schedule.into());
    let told = check(&bad("* * *"), &[], None, None, &["UnparseableSchedule"]).tell;
    assert_eq!(
        told[0].message,
        "unparseable schedule: \"* * *\" : expected exactly 5 fields, found 3: [* * *]"
    );
    let told = check(&bad("0 0 31 2 *"), &[], None, None, &["InvalidSchedule"]).tell;
    assert_eq!(
        told[0].message,
        "invalid schedule: 0 0 31 2 * : time difference between two schedules is less than 1 second"
    );
}

#[test]
fn jobs_may_run_together_wait_or_replace_each_other() {
    let with = |policy: &str| {
        cron(Some(MINUTE - 60), |c| {
            c["spec"]["concurrencyPolicy"] = policy.into();
            c["status"]["active"] = active(&["old"]);
        })
    };
    let (next, jobs) = (Some(MINUTE + 60), [job("old", 60, "Suspended")]);
    let plan = check(&with("Allow"), &jobs, Some(MINUTE), next, &[]);
    assert!(plan.delete.is_empty() && plan.knows("uid-old"));
    check(&with("Forbid"), &jobs, None, next, &["JobAlreadyActive"]);
    let plan = check(&with("Replace"), &jobs, Some(MINUTE), next, &[]);
    assert_eq!((plan.delete, plan.status.active), (vec!["uid-old".to_owned()], None));
    // When it is over, the one that waited is made.
    check(&with("Forbid"), &[job("old", 60, "Complete")], Some(MINUTE), next, &["SawCompletedJob"]);
}

#[test]
fn a_job_that_was_made_but_not_noted_is_noted() {
    let name = format!("c-{}", MINUTE / 60);
    let plan =
        check(&cron(Some(MINUTE - 60), |_| {}), &[job(&name, 10, "Suspended")], None, Some(MINUTE + 60), &[]);
    assert_eq!(plan.status.last_schedule_time.as_ref().map(|at| at.0.as_second()), Some(MINUTE));
    assert!(plan.knows(&format!("uid-{name}")));
}

#[test]
fn the_status_follows_the_jobs() {
    let known = |names: &[&str]| cron(Some(MINUTE), |c| c["status"]["active"] = active(names));
    let next = Some(MINUTE + 60);
    let plan = check(&known(&["a"]), &[job("a", 60, "Complete")], None, next, &["SawCompletedJob"]);
    assert_eq!(plan.tell[0].message, "Saw completed job: a, condition: Complete");
    assert_eq!(plan.status.active, None);
    assert_eq!(plan.status.last_successful_time.map(|at| at.0.as_second()), Some(NOW - 55));
    let plan = check(&known(&["a"]), &[job("a", 60, "Failed")], None, next, &["SawCompletedJob"]);
    assert_eq!(plan.status.last_successful_time, None);
    let plan = check(&known(&["gone"]), &[], None, next, &["MissingJob"]);
    assert_eq!((plan.tell[0].message.as_str(), plan.status.active), ("Active job went missing: gone", None));
    let plan = check(&known(&[]), &[job("stray", 60, "Suspended")], None, next, &["UnexpectedJob"]);
    assert_eq!(plan.tell[0].message, "Saw a job that the controller did not create or forgot: stray");
}

#[test]
fn old_jobs_are_deleted() {
    let limits = cron(Some(MINUTE), |c| {
        c["spec"]["successfulJobsHistoryLimit"] = 2.into();
        c["spec"]["failedJobsHistoryLimit"] = 0.into();
    });
    let jobs = [
        job("a", 300, "Complete"),
        job("b", 500, "Complete"),
        job("c", 100, "Complete"),
        job("d", 50, "Failed"),
        job("e", 900, "Suspended"),
    ];
    let mut plan = plan(&limits, &jobs, now());
    plan.delete.sort();
    assert_eq!(plan.delete, ["uid-b", "uid-d"]);
}

#[test]
fn jobs_are_made_from_the_template() {
    let cron = cron(None, |_| {});
    let made = job_of(&cron, Timestamp::from_second(MINUTE).unwrap());
    assert_eq!(made["metadata"]["name"], format!("c-{}", MINUTE / 60));
    assert_eq!(made["metadata"]["labels"], json!({"a": "b"}));
    assert_eq!(made["metadata"]["annotations"][SCHEDULED_AT], time(MINUTE));
    assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], "c");
    assert_eq!(made["metadata"]["ownerReferences"][0]["controller"], true);
}
