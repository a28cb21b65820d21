//! Strategies of the workloads that keep pods running: Deployment, ReplicaSet, StatefulSet, DaemonSet,
//! ReplicationController, ControllerRevision.
//!
//! Upstream: pkg/apis/apps and pkg/registry/apps.

use minke_api::{FieldErrors, LabelSelector, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::pod_spec::{claim_spec_defaults, template_defaults};
use super::pod_validation::{validate_template, validate_template_with};
use super::tree::Tree;
use crate::strategy::Strategy;

/// The generation of a DaemonSet's template, kept for clients of long ago.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

fn template_warnings(object: &Value) -> Vec<String> {
    super::pod_warnings::pod_warnings(object.at("spec").at("template").at("spec"), "spec.template.spec")
}

pub static DEPLOYMENT: Strategy = Strategy {
    set_defaults: |deployment| {
        let spec = deployment.object("spec");
        spec.fill("replicas", 1);
        let strategy = spec.object("strategy");
        strategy.fill("type", "RollingUpdate");
        if strategy.text("type") == "RollingUpdate" {
            let update = strategy.object("rollingUpdate");
            update.fill("maxUnavailable", "25%");
            update.fill("maxSurge", "25%");
        }
        spec.fill("revisionHistoryLimit", 10);
        spec.fill("progressDeadlineSeconds", 600);
        template_defaults(spec.object("template"));
    },
    validate: validate_deployment,
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "selector", errors)
    },
    warnings: template_warnings,
    generation: true,
    ..Strategy::PLAIN
};

pub static REPLICA_SET: Strategy = Strategy {
    set_defaults: |set| {
        let spec = set.object("spec");
        spec.fill("replicas", 1);
        template_defaults(spec.object("template"));
    },
    validate: |set, errors| {
        let spec = set.at("spec");
        check::not_negative(spec, "spec", &["replicas", "minReadySeconds"], errors);
        validate_selected_template(spec, "deployment", errors);
        always_restarting(spec.at("template").at("spec"), "ReplicaSet", errors);
    },
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "selector", errors)
    },
    warnings: template_warnings,
    generation: true,
    ..Strategy::PLAIN
};

pub static STATEFUL_SET: Strategy = Strategy {
    set_defaults: |set| {
        let spec = set.object("spec");
        spec.fill("podManagementPolicy", "OrderedReady");
        let strategy = spec.object("updateStrategy");
        if strategy.text("type").is_empty() {
            strategy.set("type", "RollingUpdate");
            strategy.object("rollingUpdate");
        }
        if let Some(update) = strategy.sub("rollingUpdate") {
            update.fill("partition", 0);
        }
        let retention = spec.object("persistentVolumeClaimRetentionPolicy");
        retention.fill("whenDeleted", "Retain");
        retention.fill("whenScaled", "Retain");
        spec.fill("replicas", 1);
        spec.fill("revisionHistoryLimit", 10);
        template_defaults(spec.object("template"));
        for claim in spec.each("volumeClaimTemplates") {
            claim.fill("apiVersion", "v1");
            claim.fill("kind", "PersistentVolumeClaim");
            claim_spec_defaults(claim.object("spec"));
            claim.object("status").fill("phase", "Pending");
        }
    },
    validate: validate_stateful_set,
    validate_update: validate_stateful_set_update,
    name: names::dns_label,
    warnings: template_warnings,
    generation: true,
    ..Strategy::PLAIN
};

pub static DAEMON_SET: Strategy = Strategy {
    set_defaults: |set| {
        let spec = set.object("spec");
        let strategy = spec.object("updateStrategy");
        strategy.fill("type", "RollingUpdate");
        if strategy.text("type") == "RollingUpdate" {
            let update = strategy.object("rollingUpdate");
            update.fill("maxUnavailable", 1);
            update.fill("maxSurge", 0);
        }
        spec.fill("revisionHistoryLimit", 10);
        template_defaults(spec.object("template"));
    },
    prepare_create: |set| set.object("metadata").object("annotations").set(TEMPLATE_GENERATION, "1"),
    prepare_update: |new, old| {
        let known = old.at("metadata").at("annotations").text(TEMPLATE_GENERATION).parse().unwrap_or(1i64);
        let changed = !super::pod::same(new.at("spec").at("template"), old.at("spec").at("template"));
        let generation = known + i64::from(changed);
        new.object("metadata").object("annotations").set(TEMPLATE_GENERATION, generation.to_string());
    },
    validate: validate_daemon_set,
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "selector", errors)
    },
    warnings: template_warnings,
    generation: true,
    ..Strategy::PLAIN
};

pub static REPLICATION_CONTROLLER: Strategy = Strategy {
    set_defaults: |controller| {
        let labels = controller.at("spec").at("template").at("metadata").at("labels").clone();
        let spec = controller.object("spec");
        if !spec.has("selector") && !labels.is_null() {
            spec.set("selector", labels.clone());
        }
        spec.fill("replicas", 1);
        if spec.has("template") {
            template_defaults(spec.object("template"));
        }
        let metadata = controller.object("metadata");
        if !metadata.has("labels") && !labels.is_null() {
            metadata.set("labels", labels);
        }
    },
    validate: |controller, errors| {
        let spec = controller.at("spec");
        check::not_negative(spec, "spec", &["replicas", "minReadySeconds"], errors);
        if !spec.has("selector") {
            errors.required("spec.selector", "");
        }
        if spec.get("replicas").is_none() {
            errors.required("spec.replicas", "");
        }
        if !spec.at("template").is_object() {
            errors.required("spec.template", "");
            return;
        }
        let pairs = spec.members("selector").map(|(key, value)| (key, value.as_str().unwrap_or_default()));
        let selector = LabelSelector::from_pairs(pairs);
        selects_template(&selector, spec, errors);
        validate_template(spec.at("template"), "spec.template", errors);
        always_restarting(spec.at("template").at("spec"), "ReplicationController", errors);
    },
    warnings: template_warnings,
    generation: true,
    ..Strategy::PLAIN
};

pub static CONTROLLER_REVISION: Strategy = Strategy {
    validate: |revision, errors| {
        check::not_negative(revision, "", &["revision"], errors);
        if !revision.at("data").is_object() {
            errors.required("data", "data is mandatory");
        }
    },
    validate_update: |new, old, errors| {
        if new.get("data") != old.get("data") {
            errors.invalid("data", new.at("data"), check::IMMUTABLE);
        }
    },
    ..Strategy::PLAIN
};

/// Selector and template of `spec`, and that the one selects the other.
fn validate_selected_template(spec: &Value, what: &str, errors: &mut FieldErrors) {
    if !spec.at("selector").is_object() {
        errors.required("spec.selector", "");
    } else {
        let parsed = check::selector(spec.at("selector"), "spec.selector", errors);
        if check::is_empty_selector(spec.at("selector")) {
            let why = format!("empty selector is invalid for {what}");
            errors.invalid("spec.selector", spec.at("selector"), &why);
        } else if let Some(selector) = parsed {
            selects_template(&selector, spec, errors);
        }
    }
    // A StatefulSet's pods get a volume for each claim, of the claim's name.
    let claims: Vec<&str> =
        spec.items("volumeClaimTemplates").iter().map(|claim| claim.at("metadata").text("name")).collect();
    validate_template_with(spec.at("template"), "spec.template", &claims, errors);
}

fn selects_template(selector: &LabelSelector, spec: &Value, errors: &mut FieldErrors) {
    let labels = spec.at("template").at("metadata").at("labels");
    let map = serde_json::from_value(labels.clone()).unwrap_or_default();
    if !selector.matches_map(Some(&map)) {
        let shown = if labels.is_null() { &json!({}) } else { labels };
        errors.invalid("spec.template.metadata.labels", shown, "`selector` does not match template `labels`");
    }
}

fn always_restarting(pod: &Value, what: &str, errors: &mut FieldErrors) {
    let policy = pod.text("restartPolicy");
    if policy != "Always" {
        errors.not_supported("spec.template.spec.restartPolicy", policy, &["Always"]);
    }
    if pod.has("activeDeadlineSeconds") {
        let why = format!("activeDeadlineSeconds in {what} is not Supported");
        errors.forbidden("spec.template.spec.activeDeadlineSeconds", &why);
    }
}

fn validate_deployment(deployment: &Value, errors: &mut FieldErrors) {
    let spec = deployment.at("spec");
    check::not_negative(spec, "spec", &["replicas"], errors);
    validate_selected_template(spec, "deployment", errors);
    always_restarting(spec.at("template").at("spec"), "ReplicaSet", errors);
    let strategy = spec.at("strategy");
    match strategy.text("type") {
        "Recreate" => {
            if strategy.at("rollingUpdate").is_object() {
                errors.forbidden(
                    "spec.strategy.rollingUpdate",
                    "may not be specified when strategy `type` is 'Recreate'",
                );
            }
        }
        "RollingUpdate" => {
            let update = strategy.at("rollingUpdate");
            validate_rolling(update, "spec.strategy.rollingUpdate", errors);
            if check::number_or_percent(update.at("maxUnavailable")) == 0
                && check::number_or_percent(update.at("maxSurge")) == 0
            {
                errors.invalid(
                    "spec.strategy.rollingUpdate.maxUnavailable",
                    update.at("maxUnavailable"),
                    "may not be 0 when `maxSurge` is 0",
                );
            }
        }
        other => errors.not_supported("spec.strategy", other, &["Recreate", "RollingUpdate"]),
    }
    check::not_negative(
        spec,
        "spec",
        &["minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"],
        errors,
    );
    if let Some(deadline) = spec.int("progressDeadlineSeconds")
        && deadline <= spec.int("minReadySeconds").unwrap_or_default()
    {
        errors.invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds");
    }
}

fn validate_rolling(update: &Value, path: &str, errors: &mut FieldErrors) {
    check::int_or_percent(update.at("maxUnavailable"), &at(path, "maxUnavailable"), errors);
    check::int_or_percent(update.at("maxSurge"), &at(path, "maxSurge"), errors);
    not_above_all(update.at("maxUnavailable"), &at(path, "maxUnavailable"), errors);
}

fn not_above_all(value: &Value, path: &str, errors: &mut FieldErrors) {
    if value.as_str().and_then(check::percent).is_some_and(|percent| percent > 100) {
        errors.invalid(path, value, "must not be greater than 100%");
    }
}

fn validate_stateful_set(set: &Value, errors: &mut FieldErrors) {
    const POLICIES: [&str; 2] = ["OrderedReady", "Parallel"];
    const STRATEGIES: [&str; 2] = ["RollingUpdate", "OnDelete"];
    let spec = set.at("spec");
    match spec.text("podManagementPolicy") {
        "" => errors.required("spec.podManagementPolicy", ""),
        policy if !POLICIES.contains(&policy) => {
            errors.invalid("spec.podManagementPolicy", policy, "must be 'OrderedReady' or 'Parallel'");
        }
        _ => {}
    }
    let strategy = spec.at("updateStrategy");
    match strategy.text("type") {
        "" => errors.required("spec.updateStrategy", ""),
        "OnDelete" if strategy.at("rollingUpdate").is_object() => errors.invalid(
            "spec.updateStrategy.rollingUpdate",
            strategy.at("rollingUpdate"),
            "only allowed for updateStrategy 'RollingUpdate'",
        ),
        "RollingUpdate" => {
            let path = "spec.updateStrategy.rollingUpdate";
            let update = strategy.at("rollingUpdate");
            check::not_negative(update, path, &["partition"], errors);
            check::int_or_percent(update.at("maxUnavailable"), &at(path, "maxUnavailable"), errors);
            not_above_all(update.at("maxUnavailable"), &at(path, "maxUnavailable"), errors);
        }
        other if !STRATEGIES.contains(&other) => {
            errors.invalid("spec.updateStrategy", strategy, "must be 'RollingUpdate' or 'OnDelete'");
        }
        _ => {}
    }
    let retention = spec.at("persistentVolumeClaimRetentionPolicy");
    for field in ["whenDeleted", "whenScaled"] {
        check::one_of(
            retention,
            "spec.persistentVolumeClaimRetentionPolicy",
            field,
            &["Retain", "Delete"],
            errors,
        );
    }
    check::not_negative(spec, "spec", &["replicas", "minReadySeconds", "revisionHistoryLimit"], errors);
    check::not_negative(spec.at("ordinals"), "spec.ordinals", &["start"], errors);
    if spec.has("serviceName") {
        check::name(spec.text("serviceName"), "spec.serviceName", names::dns_1035_label, errors);
    }
    validate_selected_template(spec, "statefulset", errors);
    always_restarting(spec.at("template").at("spec"), "StatefulSet", errors);
}

fn validate_stateful_set_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    const OPEN: [&str; 7] = [
        "replicas",
        "ordinals",
        "template",
        "updateStrategy",
        "revisionHistoryLimit",
        "persistentVolumeClaimRetentionPolicy",
        "minReadySeconds",
    ];
    let closed = |set: &Value| {
        let mut spec = set.at("spec").clone();
        OPEN.iter().for_each(|field| _ = spec.unset(field));
        spec.each("volumeClaimTemplates").for_each(|claim| _ = claim.unset("status"));
        spec
    };
    if !super::pod::same(&closed(new), &closed(old)) {
        errors.forbidden(
            "spec",
            "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', \
             'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden",
        );
    }
}

fn validate_daemon_set(set: &Value, errors: &mut FieldErrors) {
    let spec = set.at("spec");
    validate_selected_template(spec, "daemonset", errors);
    always_restarting(spec.at("template").at("spec"), "DaemonSet", errors);
    check::not_negative(spec, "spec", &["minReadySeconds", "revisionHistoryLimit"], errors);
    let strategy = spec.at("updateStrategy");
    match strategy.text("type") {
        "OnDelete" => {}
        "RollingUpdate" => {
            let path = "spec.updateStrategy.rollingUpdate";
            let update = strategy.at("rollingUpdate");
            validate_rolling(update, path, errors);
            not_above_all(update.at("maxSurge"), &at(path, "maxSurge"), errors);
            let unavailable = check::number_or_percent(update.at("maxUnavailable"));
            let surge = check::number_or_percent(update.at("maxSurge"));
            if unavailable == 0 && surge == 0 {
                errors.required(&at(path, "maxUnavailable"), "cannot be 0 when maxSurge is 0");
            } else if unavailable != 0 && surge != 0 {
                errors.invalid(
                    &at(path, "maxSurge"),
                    update.at("maxSurge"),
                    "may not be set when maxUnavailable is non-zero",
                );
            }
        }
        other => errors.not_supported("spec.updateStrategy.type", other, &["RollingUpdate", "OnDelete"]),
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    fn workload(change: impl FnOnce(&mut Value), strategy: &Strategy) -> Value {
        let mut object = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "selector": {"matchLabels": {"app": "web"}},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "nginx"}]}},
            },
        });
        change(&mut object["spec"]);
        (strategy.set_defaults)(&mut object);
        object
    }

    #[track_caller]
    fn check(strategy: &Strategy, kind: &str, change: impl FnOnce(&mut Value), want: &str) {
        let mut errors = FieldErrors::default();
        (strategy.validate)(&workload(change, strategy), &mut errors);
        let kind = Kind::by_kind("apps", "v1", kind).unwrap();
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let prefix = format!("{}.apps \"web\" is invalid: ", kind.kind);
        assert_eq!(message.strip_prefix(&prefix).unwrap_or(&message), want);
    }

    #[test]
    fn deployments_are_checked() {
        let check = |change: fn(&mut Value), want| check(&DEPLOYMENT, "Deployment", change, want);
        check(|_| {}, "");
        check(
            |spec| spec["replicas"] = (-1).into(),
            "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
        );
        check(|spec| _ = spec.unset("selector"), "spec.selector: Required value");
        check(
            |spec| spec["selector"] = json!({}),
            "spec.selector: Invalid value: {}: empty selector is invalid for deployment",
        );
        check(
            |spec| spec["selector"]["matchLabels"]["app"] = "api".into(),
            "spec.template.metadata.labels: Invalid value: {\"app\":\"web\"}: `selector` does not match template `labels`",
        );
        check(
            |spec| spec["template"]["spec"]["restartPolicy"] = "Never".into(),
            "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
        );
        check(
            |spec| spec["strategy"] = json!({"type": "Recreate", "rollingUpdate": {}}),
            "spec.strategy.rollingUpdate: Forbidden: may not be specified when strategy `type` is 'Recreate'",
        );
        check(
            |spec| spec["strategy"] = json!({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}),
            "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
        );
        check(
            |spec| spec["template"]["spec"]["containers"] = json!([]),
            "spec.template.spec.containers: Required value",
        );
    }

    #[test]
    fn other_workloads_are_checked() {
        check(&REPLICA_SET, "ReplicaSet", |_| {}, "");
        check(&STATEFUL_SET, "StatefulSet", |_| {}, "");
        check(&DAEMON_SET, "DaemonSet", |_| {}, "");
        check(
            &STATEFUL_SET,
            "StatefulSet",
            |spec| {
                spec["volumeClaimTemplates"] = json!([{"metadata": {"name": "data"}}]);
                spec["template"]["spec"]["containers"][0]["volumeMounts"] =
                    json!([{"name": "data", "mountPath": "/data"}]);
            },
            "",
        );
        check(
            &STATEFUL_SET,
            "StatefulSet",
            |spec| spec["podManagementPolicy"] = "Any".into(),
            "spec.podManagementPolicy: Invalid value: \"Any\": must be 'OrderedReady' or 'Parallel'",
        );
        check(
            &DAEMON_SET,
            "DaemonSet",
            |spec| spec["updateStrategy"] = json!({"rollingUpdate": {"maxUnavailable": 0}}),
            "spec.updateStrategy.rollingUpdate.maxUnavailable: Required value: cannot be 0 when maxSurge is 0",
        );
    }

    #[test]
    fn selectors_stay() {
        let old = workload(|_| {}, &DEPLOYMENT);
        let mut new = old.clone();
        new["spec"]["selector"]["matchLabels"]["app"] = "api".into();
        let mut errors = FieldErrors::default();
        (DEPLOYMENT.validate_update)(&new, &old, &mut errors);
        let status =
            errors.into_result(Kind::by_kind("apps", "v1", "Deployment").unwrap(), "web").unwrap_err();
        assert_eq!(
            status.message,
            "Deployment.apps \"web\" is invalid: spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"api\"}}: field is immutable"
        );
    }

    #[test]
    fn a_daemon_sets_template_is_counted() {
        let mut old = workload(|_| {}, &DAEMON_SET);
        (DAEMON_SET.prepare_create)(&mut old);
        let mut new = old.clone();
        new["spec"]["template"]["spec"]["containers"][0]["image"] = "nginx:2".into();
        (DAEMON_SET.prepare_update)(&mut new, &old);
        assert_eq!(new["metadata"]["annotations"][TEMPLATE_GENERATION], "2");
    }
}
