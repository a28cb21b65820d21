//! Checks of what a pod as a whole asks for and may use.
//!
//! Upstream: validatePodResources.

use minke_api::FieldErrors;
use serde_json::Value;

use super::check::at;
use super::container_validation::validate_resources;
use super::resources::{amounts, container_limits, container_requests};
use super::tree::Tree;

pub fn validate(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let resources = spec.at("resources");
    if !resources.is_object() {
        return;
    }
    if spec.at("os").text("name") == "windows" {
        errors.forbidden(path, "may not be set for a windows pod");
        return;
    }
    for list in ["limits", "requests"] {
        for (name, _) in resources.members(list) {
            let known = matches!(name, "cpu" | "memory") || name.starts_with("hugepages-");
            // What is no resource at all is told of below.
            if !known && (name.contains('/') || matches!(name, "ephemeral-storage" | "storage")) {
                let path = format!("{path}.{list}[{name}]");
                errors.not_supported(&path, name, &["cpu", "hugepages-", "memory"]);
            }
        }
    }
    validate_resources(resources, path, errors);
    let (requests, limits) = (amounts(resources.at("requests")), amounts(resources.at("limits")));
    for (name, sum) in container_requests(spec) {
        if let Some(asked) = requests.get(&name).filter(|asked| **asked < sum) {
            let why = format!("must be greater than or equal to aggregate container requests of {sum}");
            errors.invalid(&format!("{path}.requests[{name}]"), &asked.to_string(), &why);
        }
    }
    for (name, sum) in container_limits(spec).into_iter().filter(|(name, _)| name.starts_with("hugepages-")) {
        if let Some(limit) = limits.get(&name).filter(|limit| **limit < sum) {
            let why = format!("must be greater than or equal to aggregate container limits of {sum}");
            errors.invalid(&format!("{path}.limits[{name}]"), &limit.to_string(), &why);
        }
    }
    for (n, container) in spec.items("containers").iter().enumerate() {
        for (name, limit) in amounts(container.at("resources").at("limits")) {
            if let Some(most) = limits.get(&name).filter(|most| **most < limit) {
                // Upstream names the field like that.
                let path = at(path, &format!("containers[{n}][{name}].limits"));
                let why = format!("must be less than or equal to pod limits of {most}");
                errors.invalid(&path, &limit.to_string(), &why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::super::pod::POD;
    use super::*;

    #[track_caller]
    fn check(resources: Value, container: Value, want: &str) {
        let mut pod = json!({"spec": {"resources": resources,
            "containers": [{"name": "c", "image": "nginx", "resources": container}, {"name": "d", "image": "nginx"}]}});
        (POD.set_defaults)(&mut pod);
        let mut errors = FieldErrors::default();
        (POD.validate)(&pod, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").expect("a kind");
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"web\" is invalid: ").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn what_a_pod_may_have_covers_its_containers() {
        let (small, large) = (json!({"cpu": "1", "memory": "1Gi"}), json!({"cpu": "2", "memory": "2Gi"}));
        check(json!({"requests": large, "limits": large}), json!({"requests": small, "limits": small}), "");
        check(json!({"limits": large}), json!({}), "");
        check(
            json!({"requests": {"cpu": "1"}}),
            json!({"requests": {"cpu": "1500m"}}),
            "spec.resources.requests[cpu]: Invalid value: \"1\": must be greater than or equal to aggregate container requests of 1500m",
        );
        check(
            json!({"limits": {"cpu": "1"}}),
            json!({"limits": {"cpu": "2"}, "requests": {"cpu": "1"}}),
            "spec.resources.containers[0][cpu].limits: Invalid value: \"2\": must be less than or equal to pod limits of 1",
        );
        check(
            json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
            json!({}),
            "spec.resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        );
        check(
            json!({"requests": {"ephemeral-storage": "1Gi"}}),
            json!({}),
            "spec.resources.requests[ephemeral-storage]: Unsupported value: \"ephemeral-storage\": supported values: \"cpu\", \"hugepages-\", \"memory\"",
        );
    }
}
