//! Job and CronJob. Upstream: pkg/apis/batch and pkg/registry/batch.

mod policies;

use minke_api::cron::{self, Schedule};
use minke_api::{FieldErrors, LabelSelector, names};
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
/// Most pods at once, failed indexes, and completions without further limits, of an indexed Job.
const INDEXED_MAX: i64 = 100_000;
/// Most pods at once and failed indexes of an indexed Job with more completions than that.
const HUGE_MAX: i64 = 10_000;
const MANAGER_MAX: usize = 63;

pub static JOB: Strategy = Strategy {
    set_defaults: job_defaults,
    prepare_create: generate_selector,
    validate: validate_job,
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

fn validate_job(job: &Value, errors: &mut FieldErrors) {
    let spec = job.at("spec");
    let name = job.at("metadata").text("name");
    let completions = spec.int("completions").filter(|_| spec.text("completionMode") == "Indexed");
    // The host names of its pods end in their index.
    if let Some(completions) = completions.filter(|n| *n > 0) {
        let longest = format!("{name}-{}", completions - 1);
        if names::dns_label(&longest).is_err() {
            let why = format!("will not able to create pod with invalid DNS label: {longest}");
            errors.invalid("metadata.name", name, &why);
        }
    }
    validate_generated_labels(job, errors);
    if !spec.at("selector").is_object() {
        errors.required("spec.selector", "");
    }
    validate_job_spec(spec, "spec", errors);
}

/// A selector that the server made selects by labels that it gave: those of the user must not differ.
fn validate_generated_labels(job: &Value, errors: &mut FieldErrors) {
    let (spec, metadata) = (job.at("spec"), job.at("metadata"));
    if spec.flag("manualSelector") || !spec.at("selector").is_object() {
        return;
    }
    let (uid, name) = (metadata.text("uid"), metadata.text("name"));
    let labels = spec.at("template").at("metadata").at("labels");
    for (label, value) in
        [(OLD_CONTROLLER_UID, uid), (OLD_JOB_NAME, name), (CONTROLLER_UID, uid), (JOB_NAME, name)]
    {
        if labels.text(label) != value {
            let path = format!("spec.template.metadata.labels[{label}]");
            errors.invalid(&path, labels, &format!("must be '{value}'"));
        }
    }
    let ours = [(OLD_CONTROLLER_UID, uid), (CONTROLLER_UID, uid), (OLD_JOB_NAME, name), (JOB_NAME, name)];
    let ours = ours.map(|(label, value)| (label.to_owned(), value.to_owned())).into();
    let selector = serde_json::from_value(spec.at("selector").clone()).unwrap_or_default();
    if LabelSelector::from_spec(&selector).is_ok_and(|selector| !selector.matches_map(Some(&ours))) {
        errors.invalid("spec.selector", spec.at("selector"), "`selector` not auto-generated");
    }
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
    if spec.has("maxFailedIndexes") && !spec.has("backoffLimitPerIndex") {
        errors.required(&at(path, "backoffLimitPerIndex"), "when maxFailedIndexes is specified");
    }
    if let Some(manager) = spec.get("managedBy").and_then(Value::as_str) {
        validate_manager(manager, &at(path, "managedBy"), errors);
    }
    check::one_of_if_set(spec, path, "completionMode", &MODES, errors);
    let indexed = spec.text("completionMode") == "Indexed";
    if indexed {
        validate_indexed(spec, path, errors);
    } else {
        for field in ["backoffLimitPerIndex", "maxFailedIndexes"] {
            if spec.has(field) {
                errors.invalid(&at(path, field), spec.at(field), "requires indexed completion mode");
            }
        }
    }
    let has_failure_policy = spec.at("podFailurePolicy").is_object();
    if has_failure_policy {
        policies::failure_policy(spec, path, errors);
    }
    match spec.at("successPolicy") {
        Value::Object(_) if indexed => policies::success_policy(spec, path, errors),
        policy @ Value::Object(_) => {
            errors.invalid(&at(path, "successPolicy"), policy, "requires indexed completion mode");
        }
        _ => {}
    }
    let replacements: &[&str] =
        if has_failure_policy { &["Failed"] } else { &["Failed", "TerminatingOrFailed"] };
    check::one_of_if_set(spec, path, "podReplacementPolicy", replacements, errors);
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
    if has_failure_policy && policy != "Never" {
        errors.invalid(
            &at(&template, "spec.restartPolicy"),
            policy,
            "only \"Never\" is supported when podFailurePolicy is specified",
        );
    }
}

/// `example.com/controller`.
fn validate_manager(manager: &str, path: &str, errors: &mut FieldErrors) {
    match manager.split_once('/') {
        None | Some(("", _) | (_, "")) => {
            errors.invalid(path, manager, "must be a domain-prefixed path (such as \"acme.io/foo\")");
        }
        Some((domain, rest)) => {
            check::name(domain, path, names::dns_subdomain, errors);
            if !rest.chars().all(|c| c.is_ascii_alphanumeric() || "/-._~%!$&'()*+,;=:".contains(c)) {
                errors.invalid(
                    path,
                    rest,
                    "Invalid path (regex used for validation is '[A-Za-z0-9/\\-._~%!$&'()*+,;=:]+')",
                );
            }
        }
    }
    if manager.len() > MANAGER_MAX {
        errors.too_long(path, MANAGER_MAX);
    }
}

fn validate_indexed(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let Some(completions) = spec.int("completions") else {
        return errors.required(&at(path, "completions"), "when completion mode is Indexed");
    };
    let (parallelism, lost) = (spec.int("parallelism"), spec.int("maxFailedIndexes"));
    let limit = |field: &str, value: Option<i64>, max: i64, suffix: &str, errors: &mut FieldErrors| {
        if let Some(value) = value.filter(|value| *value > max) {
            errors.invalid(&at(path, field), value, &format!("must be less than or equal to {max}{suffix}"));
        }
    };
    limit("parallelism", parallelism, INDEXED_MAX, " when completion mode is Indexed", errors);
    if let Some(lost) = lost.filter(|lost| *lost > completions) {
        errors.invalid(&at(path, "maxFailedIndexes"), lost, "must be less than or equal to completions");
    }
    limit("maxFailedIndexes", lost, INDEXED_MAX, "", errors);
    if completions > INDEXED_MAX && spec.has("backoffLimitPerIndex") {
        if lost.is_none() {
            let why = format!("must be specified when completions is above {INDEXED_MAX}");
            errors.required(&at(path, "maxFailedIndexes"), &why);
        }
        let suffix =
            format!(" when completions are above {INDEXED_MAX} and used with backoff limit per index");
        limit("parallelism", parallelism, HUGE_MAX, &suffix, errors);
        limit("maxFailedIndexes", lost, HUGE_MAX, &suffix, errors);
    }
}

fn validate_job_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let (spec, before) = (new.at("spec"), old.at("spec"));
    match (spec.int("completions"), before.int("completions")) {
        (now, then) if now == then => {}
        // An indexed Job grows and shrinks with its parallelism.
        (Some(now), Some(_)) if spec.text("completionMode") == "Indexed" => {
            if spec.int("parallelism") != Some(now) {
                let why = "can only be modified in tandem with spec.parallelism";
                errors.invalid("spec.completions", now, why);
            }
        }
        _ => check::immutable(spec, before, "spec", "completions", errors),
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
            if let Err(why) = Schedule::parse(schedule) {
                errors.invalid("spec.schedule", schedule, &why);
            }
            if schedule.contains("TZ") {
                let why = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
                errors.invalid("spec.schedule", schedule, why);
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
        } else if let Err(why) = cron::zone(zone) {
            errors.invalid("spec.timeZone", zone, &why);
        }
    }
    let job = spec.at("jobTemplate").at("spec");
    if job.has("selector") {
        errors.invalid(
            "spec.jobTemplate.spec.selector",
            job.at("selector"),
            "`selector` will be auto-generated",
        );
    }
    if job.flag("manualSelector") {
        errors.not_supported("spec.jobTemplate.spec.manualSelector", true, &["nil", "false"]);
    }
    // What a Job gets by default is not filled in the template; the check wants it.
    let mut whole = json!({"spec": job});
    job_defaults(&mut whole);
    validate_job_spec(whole.at("spec"), "spec.jobTemplate.spec", errors);
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

    fn indexed(change: impl FnOnce(&mut Value)) -> impl FnOnce(&mut Value) {
        |spec| {
            spec["completionMode"] = "Indexed".into();
            spec["completions"] = 5.into();
            change(spec);
        }
    }

    #[test]
    fn indexed_jobs_are_checked() {
        check(indexed(|_| {}), "");
        check(indexed(|spec| spec["backoffLimitPerIndex"] = 1.into()), "");
        check(
            |spec| spec["backoffLimitPerIndex"] = 1.into(),
            "spec.backoffLimitPerIndex: Invalid value: 1: requires indexed completion mode",
        );
        check(
            indexed(|spec| spec["maxFailedIndexes"] = 1.into()),
            "spec.backoffLimitPerIndex: Required value: when maxFailedIndexes is specified",
        );
        check(
            indexed(|spec| {
                spec["backoffLimitPerIndex"] = 1.into();
                spec["maxFailedIndexes"] = 6.into();
            }),
            "spec.maxFailedIndexes: Invalid value: 6: must be less than or equal to completions",
        );
        check(
            indexed(|spec| {
                spec["backoffLimitPerIndex"] = 1.into();
                spec["completions"] = 100_001.into();
            }),
            "spec.maxFailedIndexes: Required value: must be specified when completions is above 100000",
        );
    }

    #[test]
    fn failure_policies_are_checked() {
        let rules = |rules: Value| move |spec: &mut Value| spec["podFailurePolicy"] = json!({"rules": rules});
        let path = "spec.podFailurePolicy.rules[0]";
        let codes = |operator: &str, values: Value| json!([{"action": "Ignore", "onExitCodes": {"operator": operator, "values": values}}]);
        check(rules(codes("In", json!([1, 2]))), "");
        check(rules(json!([{"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}])), "");
        check(
            rules(json!([{"action": "FailJob"}])),
            &format!("{path}: Invalid value: specifying one of OnExitCodes and OnPodConditions is required"),
        );
        check(
            rules(codes("In", json!([0]))),
            &format!("{path}.onExitCodes.values[0]: Invalid value: 0: must not be 0 for the In operator"),
        );
        check(
            rules(codes("NotIn", json!([3, 2]))),
            &format!("{path}.onExitCodes.values: Invalid value: [3,2]: must be ordered"),
        );
        check(
            rules(json!([{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [1]}}])),
            &format!(
                "{path}.action: Invalid value: \"FailIndex\": requires the backoffLimitPerIndex to be set"
            ),
        );
        check(
            |spec| {
                rules(codes("In", json!([1])))(spec);
                spec["podReplacementPolicy"] = "TerminatingOrFailed".into();
            },
            "spec.podReplacementPolicy: Unsupported value: \"TerminatingOrFailed\": supported values: \"Failed\"",
        );
    }

    #[test]
    fn success_policies_are_checked() {
        let rule = |rule: Value| indexed(move |spec| spec["successPolicy"] = json!({"rules": [rule]}));
        let path = "spec.successPolicy.rules[0]";
        check(rule(json!({"succeededIndexes": "0,2-4", "succeededCount": 2})), "");
        check(
            rule(json!({})),
            &format!(
                "{path}: Required value: at least one of succeededCount or succeededIndexes must be specified"
            ),
        );
        let wrong = |indexes: &str, why: &str| {
            let value = format!(
                "{path}.succeededIndexes: Invalid value: {indexes:?}: error parsing succeededIndexes: {why}"
            );
            check(rule(json!({"succeededIndexes": indexes})), &value);
        };
        wrong("5", "too large index: \"5\"");
        wrong("2,1", "non-increasing order, previous: 2, current: 1");
        wrong("3-2", "non-increasing order, previous: 3, current: 2");
        wrong("a", "cannot convert string to integer for index: \"a\"");
        check(
            rule(json!({"succeededIndexes": "1", "succeededCount": 2})),
            &format!(
                "{path}.succeededCount: Invalid value: 2: must be less than or equal to 1 (the number of indexes in the specified succeededIndexes field)"
            ),
        );
    }

    #[test]
    fn managers_are_named_by_a_path() {
        check(|spec| spec["managedBy"] = "kueue.x-k8s.io/multikueue".into(), "");
        check(
            |spec| spec["managedBy"] = "me".into(),
            "spec.managedBy: Invalid value: \"me\": must be a domain-prefixed path (such as \"acme.io/foo\")",
        );
    }

    #[test]
    fn indexed_jobs_change_size_with_their_parallelism() {
        let sized = |completions: i32, parallelism: i32| {
            job(indexed(|spec| {
                spec["completions"] = completions.into();
                spec["parallelism"] = parallelism.into();
            }))
        };
        let update = |new: &Value| {
            let mut errors = FieldErrors::default();
            (JOB.validate_update)(new, &sized(3, 3), &mut errors);
            let kind = Kind::by_kind("batch", "v1", "Job").unwrap();
            errors.into_result(kind, "pi").err().map(|s| s.message).unwrap_or_default()
        };
        assert_eq!(update(&sized(5, 5)), "");
        assert_eq!(update(&sized(3, 5)), "");
        assert!(update(&sized(5, 3)).ends_with(
            "spec.completions: Invalid value: 5: can only be modified in tandem with spec.parallelism"
        ));
    }

    #[test]
    fn labels_that_the_server_gives_may_not_be_others() {
        let mut job = job(|spec| spec["template"]["metadata"]["labels"][JOB_NAME] = "other".into());
        let mut errors = FieldErrors::default();
        (JOB.validate)(&job, &mut errors);
        let kind = Kind::by_kind("batch", "v1", "Job").unwrap();
        let message = errors.into_result(kind, "pi").unwrap_err().message;
        assert!(message.ends_with(": must be 'pi'"), "{message}");
        job["spec"]["manualSelector"] = true.into();
        let mut errors = FieldErrors::default();
        (JOB.validate)(&job, &mut errors);
        assert!(errors.is_empty(), "a selector of the user's own may be anything that fits");
    }

    #[track_caller]
    fn check_cron(change: impl FnOnce(&mut Value), want: &str) {
        let mut cron = json!({"metadata": {"name": "c"}, "spec": {"schedule": "@daily",
            "jobTemplate": {"spec": {"template": job(|_| {})["spec"]["template"]}}}});
        change(&mut cron["spec"]);
        (CRON_JOB.set_defaults)(&mut cron);
        let mut errors = FieldErrors::default();
        (CRON_JOB.validate)(&cron, &mut errors);
        let kind = Kind::by_kind("batch", "v1", "CronJob").unwrap();
        let message = errors.into_result(kind, "c").err().map(|s| s.message).unwrap_or_default();
        assert_eq!(message.strip_prefix("CronJob.batch \"c\" is invalid: ").unwrap_or(&message), want);
    }

    #[test]
    fn cron_jobs_are_checked() {
        check_cron(|_| {}, "");
        check_cron(|spec| spec["timeZone"] = "Europe/Berlin".into(), "");
        check_cron(
            |spec| spec["schedule"] = "* * * *".into(),
            "spec.schedule: Invalid value: \"* * * *\": expected exactly 5 fields, found 4: [* * * *]",
        );
        check_cron(
            |spec| spec["schedule"] = "TZ=UTC * * * * *".into(),
            "spec.schedule: Invalid value: \"TZ=UTC * * * * *\": cannot use TZ or CRON_TZ in schedule, use timeZone field instead",
        );
        check_cron(
            |spec| spec["timeZone"] = "Mars/Olympus".into(),
            "spec.timeZone: Invalid value: \"Mars/Olympus\": unknown time zone Mars/Olympus",
        );
        check_cron(
            |spec| spec["concurrencyPolicy"] = "Maybe".into(),
            "spec.concurrencyPolicy: Unsupported value: \"Maybe\": supported values: \"Allow\", \"Forbid\", \"Replace\"",
        );
    }
}
