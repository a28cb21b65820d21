//! Smaller kinds about how the cluster is to behave: PodDisruptionBudget, HorizontalPodAutoscaler,
//! PriorityClass, RuntimeClass, Lease, and the RBAC kinds.

use minke_api::{FieldErrors, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::pod_spec::round_quantities;
use super::tree::Tree;
use crate::strategy::Strategy;

const RBAC: &str = "rbac.authorization.k8s.io";

pub static POD_DISRUPTION_BUDGET: Strategy = Strategy {
    validate: |budget, errors| {
        let spec = budget.at("spec");
        if spec.has("minAvailable") && spec.has("maxUnavailable") {
            errors.invalid("spec", spec, "minAvailable and maxUnavailable cannot be both set");
        }
        for field in ["minAvailable", "maxUnavailable"] {
            let path = at("spec", field);
            check::int_or_percent(spec.at(field), &path, errors);
            if spec.at(field).as_str().and_then(check::percent).is_some_and(|p| p > 100) {
                errors.invalid(&path, spec.at(field), "must not be greater than 100%");
            }
        }
        if spec.at("selector").is_object() {
            check::selector(spec.at("selector"), "spec.selector", errors);
        }
        let policies = ["AlwaysAllow", "IfHealthyBudget"];
        check::one_of_if_set(spec, "spec", "unhealthyPodEvictionPolicy", &policies, errors);
    },
    generation: true,
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static HORIZONTAL_POD_AUTOSCALER: Strategy = Strategy {
    set_defaults: |scaler| {
        let spec = scaler.object("spec");
        spec.fill("minReplicas", 1);
        if !spec.has("metrics") {
            spec.set(
                "metrics",
                json!([{"type": "Resource", "resource": {"name": "cpu",
                    "target": {"type": "Utilization", "averageUtilization": 80}}}]),
            );
        }
        if spec.at("behavior").is_object() {
            scaling_defaults(spec.object("behavior"));
        }
    },
    validate: |scaler, errors| validate_scaler(scaler.at("spec"), errors),
    ..Strategy::PLAIN
};

pub static PRIORITY_CLASS: Strategy = Strategy {
    set_defaults: |class| class.fill("preemptionPolicy", "PreemptLowerPriority"),
    validate: |class, errors| {
        const HIGHEST_OF_USERS: i64 = 1_000_000_000;
        let name = class.at("metadata").text("name");
        let value = class.int("value").unwrap_or_default();
        let system = super::SYSTEM_PRIORITIES.iter().find(|(known, _)| *known == name);
        if name.starts_with("system-") && system.is_none() {
            errors.forbidden(
                "metadata.name",
                "priority class names with 'system-' prefix are reserved for system use only",
            );
        } else if let Some((_, known)) = system
            && *known != value
        {
            errors.forbidden("metadata.name", &format!("value of {name} PriorityClass must be {known}"));
        } else if system.is_none() && value > HIGHEST_OF_USERS {
            let why = format!("maximum allowed value of a user defined priority is {HIGHEST_OF_USERS}");
            errors.forbidden("value", &why);
        }
        check::one_of_if_set(class, "spec", "preemptionPolicy", &["Never", "PreemptLowerPriority"], errors);
    },
    validate_update: |new, old, errors| {
        if new.int("value").unwrap_or_default() != old.int("value").unwrap_or_default() {
            errors.invalid("value", new.int("value").unwrap_or_default(), check::IMMUTABLE);
        }
        if new.text("preemptionPolicy") != old.text("preemptionPolicy") {
            errors.invalid("preemptionPolicy", new.text("preemptionPolicy"), check::IMMUTABLE);
        }
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static RUNTIME_CLASS: Strategy = Strategy {
    set_defaults: |class| {
        if let Some(overhead) = class.sub("overhead") {
            round_quantities(overhead.sub("podFixed"));
        }
    },
    validate: |class, errors| check::name(class.text("handler"), "handler", names::dns_label, errors),
    validate_update: |new, old, errors| {
        if new.text("handler") != old.text("handler") {
            errors.invalid("handler", new.text("handler"), check::IMMUTABLE);
        }
    },
    create_on_update: true,
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static LEASE: Strategy = Strategy {
    validate: |lease, errors| {
        let spec = lease.at("spec");
        if let Some(seconds) = spec.int("leaseDurationSeconds").filter(|s| *s <= 0) {
            errors.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0");
        }
        check::not_negative(spec, "spec", &["leaseTransitions"], errors);
    },
    create_on_update: true,
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static ROLE: Strategy = Strategy {
    validate: |role, errors| validate_rules(role, true, errors),
    name: names::path_segment,
    create_on_update: true,
    ..Strategy::PLAIN
};

pub static CLUSTER_ROLE: Strategy = Strategy {
    validate: |role, errors| {
        validate_rules(role, false, errors);
        let rule = role.at("aggregationRule");
        if rule.is_object() && !rule.has("clusterRoleSelectors") {
            errors.required(
                "aggregationRule.clusterRoleSelectors",
                "at least one clusterRoleSelector required if aggregationRule is non-nil",
            );
        }
        for (n, selector) in rule.items("clusterRoleSelectors").iter().enumerate() {
            check::selector(selector, &format!("aggregationRule.clusterRoleSelectors[{n}]"), errors);
        }
    },
    name: names::path_segment,
    create_on_update: true,
    ..Strategy::PLAIN
};

pub static ROLE_BINDING: Strategy = Strategy {
    set_defaults: binding_defaults,
    validate: |binding, errors| validate_binding(binding, &["Role", "ClusterRole"], errors),
    validate_update: role_stays,
    name: names::path_segment,
    create_on_update: true,
    ..Strategy::PLAIN
};

pub static CLUSTER_ROLE_BINDING: Strategy = Strategy {
    set_defaults: binding_defaults,
    validate: |binding, errors| validate_binding(binding, &["ClusterRole"], errors),
    validate_update: role_stays,
    name: names::path_segment,
    create_on_update: true,
    ..Strategy::PLAIN
};

fn scaling_defaults(behavior: &mut Value) {
    let policy = |kind: &str, value: i64| json!({"type": kind, "value": value, "periodSeconds": 15});
    for (way, policies) in [
        ("scaleUp", json!([policy("Pods", 4), policy("Percent", 100)])),
        ("scaleDown", json!([policy("Percent", 100)])),
    ] {
        let rules = behavior.object(way);
        if way == "scaleUp" {
            rules.fill("stabilizationWindowSeconds", 0);
        }
        rules.fill("selectPolicy", "Max");
        if !rules.has("policies") {
            rules.set("policies", policies);
        }
    }
}

fn validate_scaler(spec: &Value, errors: &mut FieldErrors) {
    let (least, most) = (spec.int("minReplicas"), spec.int("maxReplicas").unwrap_or_default());
    if let Some(least) = least.filter(|n| *n < 1) {
        errors.invalid("spec.minReplicas", least, "must be greater than or equal to 1");
    }
    if most < 1 {
        errors.invalid("spec.maxReplicas", most, "must be greater than 0");
    }
    if least.is_some_and(|least| most < least) {
        errors.invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`");
    }
    for field in ["kind", "name"] {
        match spec.at("scaleTargetRef").text(field) {
            "" => errors.required(&format!("spec.scaleTargetRef.{field}"), ""),
            value => check::name(value, &format!("spec.scaleTargetRef.{field}"), names::path_segment, errors),
        }
    }
    for (n, metric) in spec.items("metrics").iter().enumerate() {
        let path = format!("spec.metrics[{n}]");
        const TYPES: [(&str, &str); 5] = [
            ("ContainerResource", "containerResource"),
            ("External", "external"),
            ("Object", "object"),
            ("Pods", "pods"),
            ("Resource", "resource"),
        ];
        match TYPES.iter().find(|(kind, _)| *kind == metric.text("type")) {
            None if metric.text("type").is_empty() => {
                errors.required(&at(&path, "type"), "must specify a metric source type")
            }
            None => {
                errors.not_supported(&at(&path, "type"), metric.text("type"), &TYPES.map(|(kind, _)| kind))
            }
            Some((_, field)) if !metric.at(field).is_object() => {
                errors.required(&at(&path, field), "must populate information for the given metric source");
            }
            Some(_) => {}
        }
    }
}

fn validate_rules(role: &Value, namespaced: bool, errors: &mut FieldErrors) {
    for (n, rule) in role.items("rules").iter().enumerate() {
        let path = format!("rules[{n}]");
        if !rule.has("verbs") {
            errors.required(&at(&path, "verbs"), "verbs must contain at least one value");
        }
        if rule.has("nonResourceURLs") {
            let urls = at(&path, "nonResourceURLs");
            if namespaced {
                errors.invalid(
                    &urls,
                    rule.at("nonResourceURLs"),
                    "namespaced rules cannot apply to non-resource URLs",
                );
            }
            if rule.has("apiGroups") || rule.has("resources") || rule.has("resourceNames") {
                errors.invalid(
                    &urls,
                    rule.at("nonResourceURLs"),
                    "rules cannot apply to both regular resources and non-resource URLs",
                );
            }
            continue;
        }
        if !rule.has("apiGroups") {
            errors.required(&at(&path, "apiGroups"), "resource rules must supply at least one api group");
        }
        if !rule.has("resources") {
            errors.required(&at(&path, "resources"), "resource rules must supply at least one resource");
        }
    }
}

fn binding_defaults(binding: &mut Value) {
    binding.object("roleRef").fill("apiGroup", RBAC);
    for subject in binding.each("subjects") {
        if matches!(subject.text("kind"), "User" | "Group") {
            subject.fill("apiGroup", RBAC);
        }
    }
}

fn validate_binding(binding: &Value, roles: &[&str], errors: &mut FieldErrors) {
    let role = binding.at("roleRef");
    if role.text("apiGroup") != RBAC {
        errors.not_supported("roleRef.apiGroup", role.text("apiGroup"), &[RBAC]);
    }
    if !roles.contains(&role.text("kind")) {
        errors.not_supported("roleRef.kind", role.text("kind"), roles);
    }
    match role.text("name") {
        "" => errors.required("roleRef.name", ""),
        name => check::name(name, "roleRef.name", names::path_segment, errors),
    }
    for (n, subject) in binding.items("subjects").iter().enumerate() {
        let path = format!("subjects[{n}]");
        check::required(subject, &path, "name", errors);
        let group = subject.text("apiGroup");
        match subject.text("kind") {
            "ServiceAccount" => {
                if subject.has("name") {
                    check::name(subject.text("name"), &at(&path, "name"), names::dns_subdomain, errors);
                }
                if !group.is_empty() {
                    errors.not_supported(&at(&path, "apiGroup"), group, &[""]);
                }
                if subject.text("namespace").is_empty() {
                    errors.required(&at(&path, "namespace"), "");
                }
            }
            "User" | "Group" => {
                if group != RBAC {
                    errors.not_supported(&at(&path, "apiGroup"), group, &[RBAC]);
                }
            }
            other => errors.not_supported(&at(&path, "kind"), other, &["ServiceAccount", "User", "Group"]),
        }
    }
}

fn role_stays(new: &Value, old: &Value, errors: &mut FieldErrors) {
    if new.get("roleRef") != old.get("roleRef") {
        errors.invalid("roleRef", new.at("roleRef"), "cannot change roleRef");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(strategy: &Strategy, kind: &'static str, mut object: Value, want: &str) {
        (strategy.set_defaults)(&mut object);
        let mut errors = FieldErrors::default();
        (strategy.validate)(&object, &mut errors);
        let kind = minke_api::KINDS.iter().find(|k| k.kind == kind).unwrap();
        let message = errors.into_result(kind, "x").err().map(|s| s.message).unwrap_or_default();
        let prefix = format!("{} \"x\" is invalid: ", kind.qualified_kind());
        assert_eq!(message.strip_prefix(&prefix).unwrap_or(&message), want);
    }

    #[test]
    fn bindings_and_roles_are_checked() {
        let binding = |role: &str, subject: Value| json!({"roleRef": {"kind": role, "name": "r"}, "subjects": [subject]});
        check(&ROLE_BINDING, "RoleBinding", binding("Role", json!({"kind": "User", "name": "ann"})), "");
        check(
            &CLUSTER_ROLE_BINDING,
            "ClusterRoleBinding",
            binding("Role", json!({"kind": "User", "name": "ann"})),
            "roleRef.kind: Unsupported value: \"Role\": supported values: \"ClusterRole\"",
        );
        check(
            &ROLE_BINDING,
            "RoleBinding",
            binding("Role", json!({"kind": "ServiceAccount", "name": "bot"})),
            "subjects[0].namespace: Required value",
        );
        check(
            &ROLE,
            "Role",
            json!({"rules": [{"apiGroups": [""], "resources": ["pods"]}]}),
            "rules[0].verbs: Required value: verbs must contain at least one value",
        );
    }

    #[test]
    fn priorities_and_budgets_are_checked() {
        let class = |name: &str, value: i64| json!({"metadata": {"name": name}, "value": value});
        check(&PRIORITY_CLASS, "PriorityClass", class("high", 1000), "");
        check(&PRIORITY_CLASS, "PriorityClass", class("system-node-critical", 2_000_001_000), "");
        check(
            &PRIORITY_CLASS,
            "PriorityClass",
            class("high", 1_000_000_001),
            "value: Forbidden: maximum allowed value of a user defined priority is 1000000000",
        );
        check(
            &POD_DISRUPTION_BUDGET,
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": "101%"}}),
            "spec.minAvailable: Invalid value: \"101%\": must not be greater than 100%",
        );
    }

    #[test]
    fn autoscalers_are_checked() {
        let scaler = |most: i64| json!({"spec": {"maxReplicas": most, "scaleTargetRef": {"kind": "Deployment", "name": "web"}}});
        check(&HORIZONTAL_POD_AUTOSCALER, "HorizontalPodAutoscaler", scaler(3), "");
        check(
            &HORIZONTAL_POD_AUTOSCALER,
            "HorizontalPodAutoscaler",
            scaler(0),
            "[spec.maxReplicas: Invalid value: 0: must be greater than 0, spec.maxReplicas: Invalid value: 0: must be greater than or equal to `minReplicas`]",
        );
    }
}
