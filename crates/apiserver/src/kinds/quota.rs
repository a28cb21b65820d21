//! The strategy of ResourceQuotas: which resources and scopes can be named, and which go together.
//!
//! Upstream: pkg/apis/core/validation (ValidateResourceQuota), pkg/apis/core/helper.

use minke_api::{FieldErrors, names};
use serde_json::Value;

use super::check::{self, at};
use super::pod_spec::round_quantities;
use super::tree::Tree;
use crate::strategy::Strategy;

const SCOPES: [&str; 7] = [
    "BestEffort",
    "CrossNamespacePodAffinity",
    "NotBestEffort",
    "NotTerminating",
    "PriorityClass",
    "Terminating",
    "VolumeAttributesClass",
];
/// Scopes that have no values to choose from.
const PLAIN_SCOPES: [&str; 5] =
    ["BestEffort", "NotBestEffort", "Terminating", "NotTerminating", "CrossNamespacePodAffinity"];
/// Names without a domain that mean something to a quota.
const STANDARD: [&str; 19] = [
    "configmaps",
    "cpu",
    "ephemeral-storage",
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "memory",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
    "requests.storage",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
];
/// Of these, those that count objects.
const COUNTS: [&str; 9] = [
    "configmaps",
    "persistentvolumeclaims",
    "pods",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "services",
    "services.loadbalancers",
    "services.nodeports",
];

pub static RESOURCE_QUOTA: Strategy = Strategy {
    set_defaults: |quota| {
        round_quantities(quota.object("spec").sub("hard"));
        if let Some(status) = quota.sub("status") {
            round_quantities(status.sub("hard"));
            round_quantities(status.sub("used"));
        }
    },
    validate,
    validate_update: |new, old, errors| {
        let listed = |quota: &Value| {
            let mut scopes: Vec<String> =
                quota.at("spec").items("scopes").iter().map(Value::to_string).collect();
            scopes.sort();
            scopes
        };
        if listed(new) != listed(old) {
            errors.invalid("spec.scopes", new.at("spec").at("scopes"), check::IMMUTABLE);
        }
        check::immutable(new.at("spec"), old.at("spec"), "spec", "scopeSelector", errors);
    },
    returns_deleted: true,
    ..Strategy::PLAIN
};

fn validate(quota: &Value, errors: &mut FieldErrors) {
    let spec = quota.at("spec");
    amounts(spec.at("hard"), "spec.hard", errors);
    let status = quota.at("status");
    for list in ["hard", "used"] {
        amounts(status.at(list), &format!("status.{list}"), errors);
    }
    scopes(spec, errors);
    scope_selector(spec, errors);
}

fn amounts(list: &Value, path: &str, errors: &mut FieldErrors) {
    for (name, value) in list.as_object().into_iter().flatten() {
        let path = format!("{path}[{name}]");
        check::name(name, &path, names::qualified_name, errors);
        if !name.contains('/') && !is_standard(name) {
            errors.invalid(&path, name, "must be a standard resource for quotas");
        }
        let Some(amount) = check::quantity(value, &path, errors) else { continue };
        let whole = COUNTS.contains(&name.as_str()) || name.starts_with("count/");
        if whole && amount.milli_value() % 1000 != 0 {
            errors.invalid(&path, &amount.to_string(), "must be an integer");
        }
    }
}

fn is_standard(name: &str) -> bool {
    let bare = name.strip_prefix("requests.").unwrap_or(name);
    STANDARD.contains(&name) || bare.starts_with("hugepages-")
}

fn scopes(spec: &Value, errors: &mut FieldErrors) {
    let given: Vec<&str> = spec.items("scopes").iter().filter_map(Value::as_str).collect();
    for scope in &given {
        if !SCOPES.contains(scope) {
            errors.invalid("spec.scopes", spec.at("scopes"), "unsupported scope");
        }
        for (name, _) in spec.members("hard").filter(|(name, _)| !applies(scope, name)) {
            let why = format!("unsupported scope applied to resource {name:?}");
            errors.invalid("spec.scopes", spec.at("scopes"), &why);
        }
    }
    for (one, other) in [("BestEffort", "NotBestEffort"), ("Terminating", "NotTerminating")] {
        if given.contains(&one) && given.contains(&other) {
            errors.invalid("spec.scopes", spec.at("scopes"), "conflicting scopes");
        }
    }
}

/// Whether pods of the scope can use the resource.
fn applies(scope: &str, resource: &str) -> bool {
    let computes = |name: &str| {
        let bare = name.strip_prefix("requests.").or(name.strip_prefix("limits.")).unwrap_or(name);
        matches!(bare, "cpu" | "memory" | "ephemeral-storage" | "pods") || bare.starts_with("hugepages-")
    };
    match scope {
        "BestEffort" => matches!(resource, "pods" | "count/pods"),
        "VolumeAttributesClass" => true,
        _ => computes(resource) || resource == "count/pods" || resource.starts_with("requests."),
    }
}

fn scope_selector(spec: &Value, errors: &mut FieldErrors) {
    for (n, one) in spec.at("scopeSelector").items("matchExpressions").iter().enumerate() {
        let path = format!("spec.scopeSelector.matchExpressions[{n}]");
        let (scope, operator, values) = (one.text("scopeName"), one.text("operator"), one.items("values"));
        if scope.is_empty() {
            errors.required(&at(&path, "scopeName"), "");
        } else if !SCOPES.contains(&scope) {
            errors.invalid(&at(&path, "scopeName"), scope, "unsupported scope");
        }
        if PLAIN_SCOPES.contains(&scope) && operator != "Exists" {
            errors.invalid(
                &at(&path, "operator"),
                operator,
                "must be 'Exist' only operator when scope is any of ResourceQuotaScopeTerminating, \
                 ResourceQuotaScopeNotTerminating, ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or \
                 ResourceQuotaScopeCrossNamespacePodAffinity",
            );
        }
        match operator {
            "In" | "NotIn" if values.is_empty() => errors.required(
                &at(&path, "values"),
                "must be atleast one value when `operator` is 'In' or 'NotIn' for scope selector",
            ),
            "Exists" | "DoesNotExist" if !values.is_empty() => errors.invalid(
                &at(&path, "values"),
                one.at("values"),
                "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector",
            ),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => errors.invalid(&at(&path, "operator"), operator, "not a valid selector operator"),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ResourceQuota;
    use minke_api::Kind;
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(spec: Value, want: &str) {
        let mut errors = FieldErrors::default();
        (RESOURCE_QUOTA.validate)(&json!({ "spec": spec }), &mut errors);
        let kind = Kind::of::<ResourceQuota>();
        let got = errors.into_result(kind, "q").err().map(|status| status.message).unwrap_or_default();
        let got = got.strip_prefix("ResourceQuota \"q\" is invalid: ").unwrap_or(&got);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn quotas_are_checked() {
        check(json!({"hard": {"pods": "1", "count/deployments.apps": 2, "requests.example.com/gpu": 1}}), "");
        check(
            json!({"hard": {"fish": "1"}}),
            "spec.hard[fish]: Invalid value: \"fish\": must be a standard resource for quotas",
        );
        check(
            json!({"hard": {"pods": "1500m"}}),
            "spec.hard[pods]: Invalid value: \"1500m\": must be an integer",
        );
        check(json!({"scopes": ["Odd"]}), "spec.scopes: Invalid value: [\"Odd\"]: unsupported scope");
        check(
            json!({"scopes": ["Terminating", "NotTerminating"]}),
            "spec.scopes: Invalid value: [\"Terminating\",\"NotTerminating\"]: conflicting scopes",
        );
        check(
            json!({"scopes": ["BestEffort"], "hard": {"cpu": "1"}}),
            "spec.scopes: Invalid value: [\"BestEffort\"]: unsupported scope applied to resource \"cpu\"",
        );
        let selector = |operator: &str, values: Value| json!({"scopeSelector": {"matchExpressions": [{"scopeName": "PriorityClass", "operator": operator, "values": values}]}});
        check(selector("In", json!(["high"])), "");
        check(selector("In", json!([])), "spec.scopeSelector.matchExpressions[0].values: Required value");
        check(
            selector("Near", json!([])),
            "spec.scopeSelector.matchExpressions[0].operator: Invalid value: \"Near\": not a valid selector operator",
        );
    }
}
