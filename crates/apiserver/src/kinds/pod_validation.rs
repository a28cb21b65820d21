//! Checks of pods and pod templates. Those of containers and volumes have files of their own.
//!
//! Upstream: ValidatePodSpec.

use std::collections::HashSet;

use minke_api::{FieldErrors, names};
use serde_json::Value;

use super::check::{self, at};
use super::tree::Tree;
use super::{container_validation as containers, volume_validation as volumes};
use crate::validation::{annotations, label_map, labels};

/// The largest user or group id.
const MAX_ID: i64 = i32::MAX as i64;

pub fn validate_pod(pod: &Value, errors: &mut FieldErrors) {
    validate_spec(pod.at("spec"), "spec", &[], errors);
    let metadata = pod.at("metadata").at("annotations");
    if metadata.has("kubernetes.io/config.mirror") && !pod.at("spec").has("nodeName") {
        errors.invalid(
            "metadata.annotations[kubernetes.io/config.mirror]",
            metadata.text("kubernetes.io/config.mirror"),
            "must set spec.nodeName if mirror pod annotation is set",
        );
    }
}

/// A PodTemplateSpec at `path`.
pub fn validate_template(template: &Value, path: &str, errors: &mut FieldErrors) {
    validate_template_with(template, path, &[], errors);
}

/// As [`validate_template`], for pods that will have further volumes, of the names `claims`.
pub fn validate_template_with(template: &Value, path: &str, claims: &[&str], errors: &mut FieldErrors) {
    labels(template.at("metadata"), &format!("{path}.labels"), errors);
    annotations(template.at("metadata"), &format!("{path}.annotations"), errors);
    let spec = template.at("spec");
    if spec.has("ephemeralContainers") {
        errors.forbidden(
            &format!("{path}.spec.ephemeralContainers"),
            "ephemeral containers not allowed in pod template",
        );
    }
    validate_spec(spec, &format!("{path}.spec"), claims, errors);
}

fn validate_spec(spec: &Value, path: &str, claims: &[&str], errors: &mut FieldErrors) {
    let mut volume_names = volumes::validate_volumes(spec, &at(path, "volumes"), errors);
    volume_names.extend(claims);
    containers::validate_containers(spec, path, &volume_names, errors);
    check::one_of(spec, path, "restartPolicy", &["Always", "Never", "OnFailure"], errors);
    validate_dns(spec, path, errors);
    label_map(spec.at("nodeSelector"), &at(path, "nodeSelector"), errors);
    validate_security_context(spec, path, errors);
    for (n, secret) in spec.items("imagePullSecrets").iter().enumerate() {
        if secret.text("name").is_empty() {
            errors.required(&format!("{path}.imagePullSecrets[{n}].name"), "");
        }
    }
    validate_affinity(spec.at("affinity"), &at(path, "affinity"), errors);
    for (field, rule) in [
        ("serviceAccountName", names::dns_subdomain as fn(&str) -> Result<(), String>),
        ("nodeName", names::dns_subdomain),
        ("hostname", names::dns_label),
        ("subdomain", names::dns_label),
        ("priorityClassName", names::dns_subdomain),
        ("runtimeClassName", names::dns_subdomain),
        ("schedulerName", names::qualified_name),
    ] {
        if spec.has(field) {
            check::name(spec.text(field), &at(path, field), rule, errors);
        }
    }
    if let Some(seconds) = spec.int("activeDeadlineSeconds").filter(|s| !(1..=MAX_ID).contains(s)) {
        errors.invalid(
            &at(path, "activeDeadlineSeconds"),
            seconds,
            "must be between 1 and 2147483647, inclusive",
        );
    }
    validate_tolerations(spec, path, errors);
    for (n, alias) in spec.items("hostAliases").iter().enumerate() {
        let path = format!("{path}.hostAliases[{n}]");
        if alias.text("ip").parse::<std::net::IpAddr>().is_err() {
            errors.invalid(
                &at(&path, "ip"),
                alias.text("ip"),
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
        for (m, host) in alias.items("hostnames").iter().filter_map(Value::as_str).enumerate() {
            check::name(host, &format!("{path}.hostnames[{m}]"), names::dns_subdomain, errors);
        }
    }
    validate_gates(spec, path, errors);
    validate_spread(spec, path, errors);
    for (n, gate) in spec.items("readinessGates").iter().enumerate() {
        let path = format!("{path}.readinessGates[{n}].conditionType");
        check::name(gate.text("conditionType"), &path, names::qualified_name, errors);
    }
    super::pod_resources::validate(spec, &at(path, "resources"), errors);
    containers::validate_resource_list(spec.at("overhead"), &at(path, "overhead"), errors);
    if spec.has("os") {
        check::one_of(spec.at("os"), &at(path, "os"), "name", &["linux", "windows"], errors);
    }
    check::one_of_if_set(spec, path, "preemptionPolicy", &["Never", "PreemptLowerPriority"], errors);
}

fn validate_dns(spec: &Value, path: &str, errors: &mut FieldErrors) {
    const POLICIES: [&str; 4] = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    check::one_of(spec, path, "dnsPolicy", &POLICIES, errors);
    let config = spec.at("dnsConfig");
    let path = at(path, "dnsConfig");
    let servers = config.items("nameservers");
    if spec.text("dnsPolicy") == "None" && servers.is_empty() {
        errors.required(
            &if config.is_object() { at(&path, "nameservers") } else { path.clone() },
            "must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
    }
    if servers.len() > 3 {
        errors.invalid(
            &at(&path, "nameservers"),
            config.at("nameservers"),
            "must not have more than 3 nameservers",
        );
    }
    for (n, server) in servers.iter().filter_map(Value::as_str).enumerate() {
        if server.parse::<std::net::IpAddr>().is_err() {
            errors.invalid(
                &format!("{path}.nameservers[{n}]"),
                server,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            );
        }
    }
    let searches = config.items("searches");
    if searches.len() > 32 {
        errors.invalid(
            &at(&path, "searches"),
            config.at("searches"),
            "must not have more than 32 search paths",
        );
    }
    if searches.iter().filter_map(Value::as_str).map(|s| s.len() + 1).sum::<usize>() > 2049 {
        errors.invalid(
            &at(&path, "searches"),
            config.at("searches"),
            "must not have more than 2048 characters (including spaces) in the search list",
        );
    }
    for (n, option) in config.items("options").iter().enumerate() {
        if option.text("name").is_empty() {
            errors.required(&format!("{path}.options[{n}]"), "must not be empty");
        }
    }
}

/// `runAsUser` and the like: ids that fit 31 bits.
pub fn validate_ids(context: &Value, path: &str, fields: &[&str], errors: &mut FieldErrors) {
    for field in fields {
        if let Some(id) = context.int(field).filter(|id| !(0..=MAX_ID).contains(id)) {
            errors.invalid(&at(path, field), id, "must be between 0 and 2147483647, inclusive");
        }
    }
}

pub fn validate_seccomp(context: &Value, path: &str, errors: &mut FieldErrors) {
    let profile = context.at("seccompProfile");
    if !profile.is_object() {
        return;
    }
    let path = at(path, "seccompProfile");
    let local = profile.text("localhostProfile");
    match profile.text("type") {
        "Localhost" if local.is_empty() => {
            errors.required(&at(&path, "localhostProfile"), "must be set when seccomp type is Localhost");
        }
        "Localhost" => {
            if local.starts_with('/') {
                errors.invalid(&at(&path, "localhostProfile"), local, "must be a relative path");
            } else if local.split('/').any(|part| part == "..") {
                errors.invalid(&at(&path, "localhostProfile"), local, "must not contain '..'");
            }
        }
        "RuntimeDefault" | "Unconfined" => {
            if profile.get("localhostProfile").is_some() {
                errors.invalid(
                    &at(&path, "localhostProfile"),
                    local,
                    "can only be set when seccomp type is Localhost",
                );
            }
        }
        "" => errors.required(&at(&path, "type"), "type is required when seccompProfile is set"),
        other => {
            errors.not_supported(&at(&path, "type"), other, &["Localhost", "RuntimeDefault", "Unconfined"])
        }
    }
}

fn validate_security_context(spec: &Value, path: &str, errors: &mut FieldErrors) {
    if spec.flag("hostPID") && spec.flag("shareProcessNamespace") {
        errors.invalid(
            &at(path, "shareProcessNamespace"),
            true,
            "ShareProcessNamespace and HostPID cannot both be enabled",
        );
    }
    if spec.at("hostUsers").as_bool() == Some(false) {
        for field in ["hostNetwork", "hostPID", "hostIPC"] {
            if spec.flag(field) {
                errors.forbidden(&at(path, field), "when `hostUsers` is false");
            }
        }
    } else {
        for list in ["initContainers", "containers"] {
            for (n, container) in spec.items(list).iter().enumerate() {
                if container.at("securityContext").text("procMount") == "Unmasked" {
                    let path = format!("{}[{n}].securityContext.procMount", at(path, list));
                    errors.invalid(&path, "Unmasked", "`hostUsers` must be false to use `Unmasked`");
                }
            }
        }
    }
    let context = spec.at("securityContext");
    let path = at(path, "securityContext");
    validate_ids(context, &path, &["runAsUser", "runAsGroup", "fsGroup"], errors);
    for (n, group) in context.items("supplementalGroups").iter().filter_map(Value::as_i64).enumerate() {
        if !(0..=MAX_ID).contains(&group) {
            errors.invalid(
                &format!("{path}.supplementalGroups[{n}]"),
                group,
                "must be between 0 and 2147483647, inclusive",
            );
        }
    }
    check::one_of_if_set(context, &path, "fsGroupChangePolicy", &["Always", "OnRootMismatch"], errors);
    check::one_of_if_set(context, &path, "supplementalGroupsPolicy", &["Merge", "Strict"], errors);
    validate_seccomp(context, &path, errors);
    let mut seen = HashSet::new();
    for (n, sysctl) in context.items("sysctls").iter().enumerate() {
        let path = format!("{path}.sysctls[{n}].name");
        let name = sysctl.text("name");
        if name.is_empty() {
            errors.required(&path, "");
        } else if name.len() > 253 || !is_sysctl(name) {
            let why = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9][-_a-z0-9]*[a-z0-9]?$";
            errors.invalid(&path, name, why);
        } else if !seen.insert(name) {
            errors.duplicate(&path, name);
        }
    }
}

fn is_sysctl(name: &str) -> bool {
    name.split(['.', '/']).all(|part| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            && bytes.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'_'))
    })
}

fn validate_tolerations(spec: &Value, path: &str, errors: &mut FieldErrors) {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    for (n, toleration) in spec.items("tolerations").iter().enumerate() {
        let path = format!("{path}.tolerations[{n}]");
        let (key, operator, value) =
            (toleration.text("key"), toleration.text("operator"), toleration.text("value"));
        if !key.is_empty() {
            check::name(key, &at(&path, "key"), names::qualified_name, errors);
        } else if operator != "Exists" {
            errors.invalid(
                &at(&path, "operator"),
                operator,
                "operator must be Exists when `key` is empty, which means \"match all values and all keys\"",
            );
        }
        if toleration.has("tolerationSeconds") && toleration.text("effect") != "NoExecute" {
            errors.invalid(
                &at(&path, "effect"),
                toleration.text("effect"),
                "effect must be 'NoExecute' when `tolerationSeconds` is set",
            );
        }
        match operator {
            "" | "Equal" => check::name(value, &at(&path, "operator"), names::label_value, errors),
            "Exists" if !value.is_empty() => {
                errors.invalid(
                    &at(&path, "operator"),
                    toleration,
                    "value must be empty when `operator` is 'Exists'",
                );
            }
            "Exists" => {}
            // Lt and Gt (KEP-5471) are alpha in v1.37, which is off.
            other => errors.not_supported(&at(&path, "operator"), other, &["Equal", "Exists"]),
        }
        check::one_of_if_set(toleration, &path, "effect", &EFFECTS, errors);
    }
}

fn validate_gates(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let mut seen = HashSet::new();
    for (n, gate) in spec.items("schedulingGates").iter().enumerate() {
        let path = format!("{path}.schedulingGates[{n}]");
        let name = gate.text("name");
        check::name(name, &at(&path, "name"), names::qualified_name, errors);
        if !seen.insert(name) {
            errors.duplicate(&path, name);
        }
    }
    if spec.has("schedulingGates") && spec.has("nodeName") {
        errors.forbidden(&at(path, "nodeName"), "cannot be set until all schedulingGates have been cleared");
    }
}

fn validate_spread(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let constraints = spec.items("topologySpreadConstraints");
    for (n, constraint) in constraints.iter().enumerate() {
        let path = format!("{path}.topologySpreadConstraints[{n}]");
        let skew = constraint.int("maxSkew").unwrap_or_default();
        if skew <= 0 {
            errors.invalid(&at(&path, "maxSkew"), skew, "must be greater than zero");
        }
        if constraint.text("topologyKey").is_empty() {
            errors.required(&at(&path, "topologyKey"), "can not be empty");
        } else {
            check::name(
                constraint.text("topologyKey"),
                &at(&path, "topologyKey"),
                names::qualified_name,
                errors,
            );
        }
        let allowed = ["DoNotSchedule", "ScheduleAnyway"];
        let when = constraint.text("whenUnsatisfiable");
        if !allowed.contains(&when) {
            errors.not_supported(&at(&path, "whenUnsatisfiable"), when, &allowed);
        }
        let twin = |other: &Value| {
            ["topologyKey", "whenUnsatisfiable"]
                .iter()
                .all(|field| other.text(field) == constraint.text(field))
        };
        if constraints[..n].iter().any(twin) {
            let shown = format!("{{{}, {when}}}", constraint.text("topologyKey"));
            errors.duplicate(&at(&path, "{topologyKey, whenUnsatisfiable}"), shown.as_str());
        }
        if let Some(domains) = constraint.int("minDomains") {
            if domains <= 0 {
                errors.invalid(&at(&path, "minDomains"), domains, "must be greater than zero");
            }
            if when != "DoNotSchedule" {
                let why = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {when}");
                errors.invalid(&at(&path, "minDomains"), domains, &why);
            }
        }
        for field in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            check::one_of_if_set(constraint, &path, field, &["Honor", "Ignore"], errors);
        }
        if constraint.at("labelSelector").is_object() {
            check::selector(constraint.at("labelSelector"), &at(&path, "labelSelector"), errors);
        }
    }
}

fn validate_affinity(affinity: &Value, path: &str, errors: &mut FieldErrors) {
    const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
    const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";
    let node = affinity.at("nodeAffinity");
    let node_path = at(path, "nodeAffinity");
    if node.at(REQUIRED).is_object() {
        validate_node_selector(node.at(REQUIRED), &at(&node_path, REQUIRED), errors);
    }
    let weight = |term: &Value, path: &str, errors: &mut FieldErrors| {
        let weight = term.int("weight").unwrap_or_default();
        if !(1..=100).contains(&weight) {
            errors.invalid(&at(path, "weight"), weight, "must be in the range 1-100");
        }
    };
    for (n, term) in node.items(PREFERRED).iter().enumerate() {
        let path = format!("{node_path}.{PREFERRED}[{n}]");
        weight(term, &path, errors);
        validate_node_selector_term(term.at("preference"), &at(&path, "preference"), errors);
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        let pods = affinity.at(kind);
        let path = at(path, kind);
        for (n, term) in pods.items(REQUIRED).iter().enumerate() {
            validate_pod_term(term, &format!("{path}.{REQUIRED}[{n}]"), errors);
        }
        for (n, term) in pods.items(PREFERRED).iter().enumerate() {
            let path = format!("{path}.{PREFERRED}[{n}]");
            weight(term, &path, errors);
            validate_pod_term(term.at("podAffinityTerm"), &at(&path, "podAffinityTerm"), errors);
        }
    }
}

/// A NodeSelector: at least one term.
pub fn validate_node_selector(selector: &Value, path: &str, errors: &mut FieldErrors) {
    let terms = selector.items("nodeSelectorTerms");
    if terms.is_empty() {
        errors.required(&at(path, "nodeSelectorTerms"), "must have at least one node selector term");
    }
    for (n, term) in terms.iter().enumerate() {
        validate_node_selector_term(term, &format!("{path}.nodeSelectorTerms[{n}]"), errors);
    }
}

fn validate_node_selector_term(term: &Value, path: &str, errors: &mut FieldErrors) {
    for list in ["matchExpressions", "matchFields"] {
        for (n, requirement) in term.items(list).iter().enumerate() {
            let path = format!("{path}.{list}[{n}]");
            let values = requirement.items("values");
            match requirement.text("operator") {
                "In" | "NotIn" if values.is_empty() => {
                    errors.required(
                        &at(&path, "values"),
                        "must be specified when `operator` is 'In' or 'NotIn'",
                    );
                }
                "Exists" | "DoesNotExist" if !values.is_empty() => errors.forbidden(
                    &at(&path, "values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                ),
                "Gt" | "Lt" if values.len() != 1 => errors.required(
                    &at(&path, "values"),
                    "must be specified single value when `operator` is 'Lt' or 'Gt'",
                ),
                "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
                other => errors.invalid(&at(&path, "operator"), other, "not a valid selector operator"),
            }
            if list == "matchFields" && requirement.text("key") != "metadata.name" {
                errors.invalid(&at(&path, "key"), requirement.text("key"), "not a valid field selector key");
            } else if list == "matchExpressions" {
                check::name(requirement.text("key"), &at(&path, "key"), names::qualified_name, errors);
            }
        }
    }
}

fn validate_pod_term(term: &Value, path: &str, errors: &mut FieldErrors) {
    for field in ["labelSelector", "namespaceSelector"] {
        if term.at(field).is_object() {
            check::selector(term.at(field), &at(path, field), errors);
        }
    }
    for (n, namespace) in term.items("namespaces").iter().filter_map(Value::as_str).enumerate() {
        check::name(namespace, &format!("{path}.namespaces[{n}]"), names::dns_label, errors);
    }
    if term.text("topologyKey").is_empty() {
        errors.required(&at(path, "topologyKey"), "can not be empty");
    } else {
        check::name(term.text("topologyKey"), &at(path, "topologyKey"), names::qualified_name, errors);
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::super::pod::POD;
    use super::*;

    #[track_caller]
    fn check(change: impl FnOnce(&mut Value), want: &str) {
        let mut pod = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"containers": [{"name": "c", "image": "nginx"}]},
        });
        change(&mut pod["spec"]);
        (POD.set_defaults)(&mut pod);
        let mut errors = FieldErrors::default();
        validate_pod(&pod, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").unwrap();
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"web\" is invalid: ").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn pods_are_checked() {
        check(|_| {}, "");
        check(|s| s["containers"] = json!([]), "spec.containers: Required value");
        check(
            |s| s["restartPolicy"] = "Sometimes".into(),
            "spec.restartPolicy: Unsupported value: \"Sometimes\": supported values: \"Always\", \"Never\", \"OnFailure\"",
        );
        check(
            |s| s["dnsPolicy"] = "None".into(),
            "spec.dnsConfig: Required value: must provide at least one DNS nameserver when `dnsPolicy` is None",
        );
        check(
            |s| s["activeDeadlineSeconds"] = 0.into(),
            "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
        );
        check(
            |s| s["containers"][0]["securityContext"] = json!({"procMount": "Unmasked"}),
            "spec.containers[0].securityContext.procMount: Invalid value: \"Unmasked\": `hostUsers` must be false to use `Unmasked`",
        );
        check(
            |s| s["tolerations"] = json!([{"key": "a", "operator": "Gt", "value": "4"}]),
            "spec.tolerations[0].operator: Unsupported value: \"Gt\": supported values: \"Equal\", \"Exists\"",
        );
        check(
            |s| s["tolerations"] = json!([{"operator": "Equal"}]),
            "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty",
        );
        check(
            |s| s["affinity"] = json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}),
            "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms: Required value: must have at least one node selector term",
        );
        check(
            |s| {
                s["topologySpreadConstraints"] =
                    json!([{"maxSkew": 0, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}])
            },
            "spec.topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero",
        );
        check(
            |s| s["securityContext"] = json!({"runAsUser": -1}),
            "spec.securityContext.runAsUser: Invalid value: -1: must be between 0 and 2147483647, inclusive",
        );
        check(
            |s| s["nodeSelector"] = json!({"a": "b c"}),
            "spec.nodeSelector: Invalid value: \"b c\": a valid label must be",
        );
        check(
            |s| s["hostname"] = "A".into(),
            "spec.hostname: Invalid value: \"A\": a lowercase RFC 1123 label",
        );
    }
}
