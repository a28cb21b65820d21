//! Job and CronJob. Upstream: pkg/apis/batch and pkg/registry/batch.

use minke_api::{FieldErrors, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::pod_spec::template_defaults;
use super::pod_validation::validate_template;
use super::tree::Tree;
use crate::strategy::Strategy;

const CONTROLLER_UID: &str = "batch.kubernetes.io/controller-uid";
const JOB_NAME: &str = "batch.kubernetes.io/job-name";
/// What the two labels were called before, still set beside them.
const OLD_CONTROLLER_UID: &str = "controller-uid";
const OLD_JOB_NAME: &str = "job-name";
/// Indexed Jobs name pods by index, which takes room in the name.
const MAX_INDEXED: i64 = 100_000;

pub static JOB: Strategy = Strategy {
    set_defaults: job_defaults,
    prepare_create: generate_selector,
    validate: |job, errors| validate_job_spec(job.at("spec"), "spec", errors),
    validate_update: validate_job_update,
    name: names::dns_subdomain,
    warnings: |job| {
        super::pod_warnings::pod_warnings(job.at("spec").at("template").at("spec"), "spec.template.spec")
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static CRON_JOB: Strategy = Strategy {
    set_defaults: |cron| {
        let spec = cron.object("spec");
        spec.fill("concurrencyPolicy", "Allow");
        spec.fill("suspend", false);
        spec.fill("successfulJobsHistoryLimit", 3);
        spec.fill("failedJobsHistoryLimit", 1);
        let template = spec.object("jobTemplate");
        template.object("metadata");
        template_defaults(template.object("spec").object("template"));
    },
    validate: validate_cron_job,
    name: |name| {
        // Leaves room for the time that is added to the names of its Jobs.
        if name.len() > 52 {
            Err("must be no more than 52 characters".to_owned())
        } else {
            names::dns_subdomain(name)
        }
    },
    warnings: |cron| {
        let path = "spec.jobTemplate.spec.template.spec";
        let pod = cron.at("spec").at("jobTemplate").at("spec").at("template").at("spec");
        let mut warnings = super::pod_warnings::pod_warnings(pod, path);
        if cron.at("spec").text("schedule").contains("TZ") {
            warnings.push(format!(
                "cannot use TZ or CRON_TZ in {}, use timeZone instead, see https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/cron-job-v1 for more details",
                "spec.schedule"
            ));
        }
        warnings
    },
    generation: true,
    ..Strategy::PLAIN
};

fn job_defaults(job: &mut Value) {
    let labels = job.at("spec").at("template").at("metadata").at("labels").clone();
    let spec = job.object("spec");
    if spec.get("completions").is_none_or(Value::is_null)
        && spec.get("parallelism").is_none_or(Value::is_null)
    {
        spec.fill("completions", 1);
    }
    spec.fill("parallelism", 1);
    let limit = if spec.has("backoffLimitPerIndex") { i64::from(i32::MAX) } else { 6 };
    spec.fill("backoffLimit", limit);
    spec.fill("completionMode", "NonIndexed");
    spec.fill("suspend", false);
    spec.fill("manualSelector", false);
    let replacement = if spec.at("podFailurePolicy").is_object() { "Failed" } else { "TerminatingOrFailed" };
    spec.fill("podReplacementPolicy", replacement);
    if let Some(policy) = spec.sub("podFailurePolicy") {
        for pattern in policy.each("rules").flat_map(|rule| rule.each("onPodConditions")) {
            pattern.fill("status", "True");
        }
    }
    template_defaults(spec.object("template"));
    if !job.at("metadata").has("labels") && !labels.is_null() {
        job.object("metadata").set("labels", labels);
    }
}

/// Labels the pods of a Job with its name and uid, and selects them by it; the uid is set by then.
fn generate_selector(job: &mut Value) {
    if job.at("spec").flag("manualSelector") {
        return;
    }
    let uid = job.at("metadata").text("uid").to_owned();
    let name = job.at("metadata").text("name").to_owned();
    let spec = job.object("spec");
    let labels = spec.object("template").object("metadata").object("labels");
    for (key, value) in
        [(OLD_JOB_NAME, &name), (JOB_NAME, &name), (OLD_CONTROLLER_UID, &uid), (CONTROLLER_UID, &uid)]
    {
        labels.fill(key, value.as_str());
    }
    let selector = spec.object("selector").object("matchLabels");
    selector.fill(CONTROLLER_UID, uid);
}

fn validate_job_spec(spec: &Value, path: &str, errors: &mut FieldErrors) {
    const MODES: [&str; 2] = ["NonIndexed", "Indexed"];
    let fields = [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ];
    check::not_negative(spec, path, &fields, errors);
    if spec.at("selector").is_object() {
        let parsed = check::selector(spec.at("selector"), &at(path, "selector"), errors);
        let labels = spec.at("template").at("metadata").at("labels");
        let map = serde_json::from_value(labels.clone()).unwrap_or_default();
        if parsed.is_some_and(|selector| !selector.matches_map(Some(&map))) {
            let path = at(path, "template.metadata.labels");
            errors.invalid(&path, labels, "`selector` does not match template `labels`");
        }
    }
    let indexed = spec.text("completionMode") == "Indexed";
    check::one_of_if_set(spec, path, "completionMode", &MODES, errors);
    if indexed {
        match spec.int("completions") {
            None => errors.required(&at(path, "completions"), "when completion mode is Indexed"),
            Some(_) => {
                if let Some(parallelism) = spec.int("parallelism").filter(|p| *p > MAX_INDEXED) {
                    let why = format!(
                        "must be less than or equal to {MAX_INDEXED} when completion mode is Indexed"
                    );
                    errors.invalid(&at(path, "parallelism"), parallelism, &why);
                }
            }
        }
    } else if spec.has("backoffLimitPerIndex") {
        errors.invalid(
            &at(path, "backoffLimitPerIndex"),
            spec.at("backoffLimitPerIndex"),
            "requires indexed completion mode",
        );
    }
    check::one_of_if_set(spec, path, "podReplacementPolicy", &["Failed", "TerminatingOrFailed"], errors);
    let template = at(path, "template");
    validate_template(spec.at("template"), &template, errors);
    let policy = spec.at("template").at("spec").text("restartPolicy");
    match policy {
        "OnFailure" | "Never" => {}
        "Always" | "" => {
            errors.required(&at(&template, "spec.restartPolicy"), "valid values: \"OnFailure\", \"Never\"");
        }
        other => errors.not_supported(&at(&template, "spec.restartPolicy"), other, &["OnFailure", "Never"]),
    }
    if spec.at("podFailurePolicy").is_object() && policy != "Never" {
        errors.invalid(
            &at(&template, "spec.restartPolicy"),
            policy,
            "only \"Never\" is supported when podFailurePolicy is specified",
        );
    }
}

fn validate_job_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let (spec, before) = (new.at("spec"), old.at("spec"));
    let elastic = spec.text("completionMode") == "Indexed"
        && spec.get("completions") == spec.get("parallelism")
        && spec.int("completions").is_some();
    if !elastic {
        check::immutable(spec, before, "spec", "completions", errors);
    }
    for field in [
        "selector",
        "completionMode",
        "podFailurePolicy",
        "backoffLimitPerIndex",
        "successPolicy",
        "managedBy",
    ] {
        check::immutable(spec, before, "spec", field, errors);
    }
    // Where a suspended Job that has not begun will run may still be told to it.
    let (mut template, mut template_before) = (spec.at("template").clone(), before.at("template").clone());
    if before.flag("suspend") && !old.at("status").has("startTime") {
        for template in [&mut template, &mut template_before] {
            for field in ["annotations", "labels"] {
                template.object("metadata").unset(field);
            }
            for field in ["nodeSelector", "tolerations", "schedulingGates"] {
                template.object("spec").unset(field);
            }
            if let Some(affinity) = template.object("spec").sub("affinity") {
                affinity.unset("nodeAffinity");
            }
        }
    }
    if !super::pod::same(&template, &template_before) {
        errors.invalid("spec.template", spec.at("template"), check::IMMUTABLE);
    }
}

fn validate_cron_job(cron: &Value, errors: &mut FieldErrors) {
    let spec = cron.at("spec");
    match spec.text("schedule") {
        "" => errors.required("spec.schedule", ""),
        schedule => {
            if let Err(why) = check_schedule(schedule) {
                errors.invalid("spec.schedule", schedule, &why);
            }
        }
    }
    check::not_negative(
        spec,
        "spec",
        &["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"],
        errors,
    );
    check::one_of(spec, "spec", "concurrencyPolicy", &["Allow", "Forbid", "Replace"], errors);
    if let Some(zone) = spec.get("timeZone").and_then(Value::as_str) {
        if zone.is_empty() {
            errors.invalid("spec.timeZone", zone, "timeZone must be nil or non-empty string");
        } else if zone.eq_ignore_ascii_case("local") {
            errors.invalid(
                "spec.timeZone",
                zone,
                "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones",
            );
        }
    }
    let job = spec.at("jobTemplate").at("spec");
    if job.flag("manualSelector") {
        errors.not_supported("spec.jobTemplate.spec.manualSelector", true, &["nil", "false"]);
    }
    // What a Job gets by default is not filled in the template; the check wants it.
    let mut whole = json!({"spec": job});
    job_defaults(&mut whole);
    validate_job_spec(whole.at("spec"), "spec.jobTemplate.spec", errors);
}

/// Five fields of numbers, lists, ranges and steps, or one of the words for common schedules.
fn check_schedule(schedule: &str) -> Result<(), String> {
    const WORDS: [&str; 7] =
        ["@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"];
    const FIELDS: [(i64, i64, &[&str]); 5] = [
        (0, 59, &[]),
        (0, 23, &[]),
        (1, 31, &[]),
        (1, 12, &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]),
        (0, 6, &["sun", "mon", "tue", "wed", "thu", "fri", "sat"]),
    ];
    let schedule = match schedule.strip_prefix("TZ=").or_else(|| schedule.strip_prefix("CRON_TZ=")) {
        Some(_) => return Err("cannot use TZ or CRON_TZ in schedule, use timeZone field instead".to_owned()),
        None => schedule.trim(),
    };
    if let Some(every) = schedule.strip_prefix("@every ") {
        let good = every.ends_with(['s', 'm', 'h']) && every.starts_with(|c: char| c.is_ascii_digit());
        return if good { Ok(()) } else { Err(format!("failed to parse duration {schedule}")) };
    }
    if schedule.starts_with('@') {
        return if WORDS.contains(&schedule) {
            Ok(())
        } else {
            Err(format!("unrecognized descriptor: {schedule}"))
        };
    }
    let fields: Vec<&str> = schedule.split_whitespace().collect();
    if fields.len() != FIELDS.len() {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    for (field, (least, most, words)) in fields.iter().zip(FIELDS) {
        for part in field.split(',') {
            check_schedule_part(part, least, most, words)?;
        }
    }
    Ok(())
}

fn check_schedule_part(part: &str, least: i64, most: i64, words: &[&str]) -> Result<(), String> {
    let (range, step) = part.split_once('/').unwrap_or((part, "1"));
    let number = |text: &str| -> Result<i64, String> {
        let lower = text.to_lowercase();
        if let Some(at) = words.iter().position(|word| *word == lower) {
            return Ok(least + at as i64);
        }
        text.parse().map_err(|_| {
            format!("failed to parse int from {text}: strconv.Atoi: parsing {text:?}: invalid syntax")
        })
    };
    let step_number: i64 = number(step)?;
    if step_number <= 0 {
        return Err(format!("step of range should be a positive number: {part}"));
    }
    if range == "*" || range == "?" {
        return Ok(());
    }
    let (from, to) = range.split_once('-').unwrap_or((range, range));
    let (from, to) = (number(from)?, number(to)?);
    if from < least {
        return Err(format!("beginning of range ({from}) below minimum ({least}): {part}"));
    }
    if to > most {
        return Err(format!("end of range ({to}) above maximum ({most}): {part}"));
    }
    if from > to {
        return Err(format!("beginning of range ({from}) beyond end of range ({to}): {part}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    fn job(change: impl FnOnce(&mut Value)) -> Value {
        let mut job = json!({
            "metadata": {"name": "pi", "namespace": "default", "uid": "u1"},
            "spec": {"template": {"metadata": {"labels": {"app": "pi"}},
                "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "perl:5"}]}}},
        });
        change(&mut job["spec"]);
        job_defaults(&mut job);
        generate_selector(&mut job);
        job
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), want: &str) {
        let mut errors = FieldErrors::default();
        (JOB.validate)(&job(change), &mut errors);
        let kind = Kind::by_kind("batch", "v1", "Job").unwrap();
        let message = errors.into_result(kind, "pi").err().map(|s| s.message).unwrap_or_default();
        assert_eq!(message.strip_prefix("Job.batch \"pi\" is invalid: ").unwrap_or(&message), want);
    }

    #[test]
    fn jobs_are_checked() {
        check(|_| {}, "");
        check(
            |spec| spec["template"]["spec"]["restartPolicy"] = "Always".into(),
            "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
        );
        check(
            |spec| spec["parallelism"] = (-2).into(),
            "spec.parallelism: Invalid value: -2: must be greater than or equal to 0",
        );
        check(
            |spec| {
                spec["completionMode"] = "Indexed".into();
                spec["parallelism"] = 2.into();
            },
            "spec.completions: Required value: when completion mode is Indexed",
        );
    }

    #[test]
    fn a_job_selects_its_pods_by_its_uid() {
        let job = job(|_| {});
        assert_eq!(job["spec"]["selector"], json!({"matchLabels": {CONTROLLER_UID: "u1"}}));
        assert_eq!(
            job["spec"]["template"]["metadata"]["labels"],
            json!({"app": "pi", CONTROLLER_UID: "u1", OLD_CONTROLLER_UID: "u1", JOB_NAME: "pi", OLD_JOB_NAME: "pi"})
        );
    }

    #[test]
    fn schedules_are_parsed() {
        for good in ["* * * * *", "*/5 0-4,6 1 jan-mar MON", "@daily", "@every 1h30m", "0 0 ? * 0"] {
            assert_eq!(check_schedule(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "* * * *",
            "60 * * * *",
            "*/0 * * * *",
            "5-1 * * * *",
            "x * * * *",
            "@often",
            "TZ=UTC * * * * *",
            "* * 0 * *",
        ] {
            assert!(check_schedule(bad).is_err(), "{bad}");
        }
    }
}
