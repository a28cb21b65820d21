//! What is accepted of a pod and yet deserves a word. Upstream: pkg/api/pod/warnings.go.

use std::collections::HashSet;

use serde_json::Value;

use super::tree::Tree;

/// Warnings about a pod spec at `path`.
pub fn pod_warnings(spec: &Value, path: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    for (label, now) in [
        ("beta.kubernetes.io/arch", "deprecated since v1.14; use \"kubernetes.io/arch\" instead"),
        ("beta.kubernetes.io/os", "deprecated since v1.14; use \"kubernetes.io/os\" instead"),
        (
            "failure-domain.beta.kubernetes.io/region",
            "deprecated since v1.17; use \"topology.kubernetes.io/region\" instead",
        ),
        (
            "failure-domain.beta.kubernetes.io/zone",
            "deprecated since v1.17; use \"topology.kubernetes.io/zone\" instead",
        ),
    ] {
        if spec.at("nodeSelector").get(label).is_some() {
            warnings.push(format!("{path}.nodeSelector[{label}]: {now}"));
        }
    }
    for (n, volume) in spec.items("volumes").iter().enumerate() {
        if volume.at("gitRepo").is_object() {
            warnings.push(format!(
                "{path}.volumes[{n}].gitRepo: deprecated in v1.11, and disabled by default in v1.33+"
            ));
        }
    }
    for list in ["initContainers", "containers"] {
        for (n, container) in spec.items(list).iter().enumerate() {
            container_warnings(container, &format!("{path}.{list}[{n}]"), &mut warnings);
        }
    }
    if spec.int("terminationGracePeriodSeconds").is_some_and(|seconds| seconds < 0) {
        warnings.push(format!("{path}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1"));
    }
    warnings
}

fn container_warnings(container: &Value, path: &str, warnings: &mut Vec<String>) {
    let mut seen = HashSet::new();
    for (n, env) in container.items("env").iter().enumerate() {
        if !seen.insert(env.text("name")) {
            warnings.push(format!(
                "{path}.env[{n}]: hides previous definition of {:?}, which may be dropped when using apply",
                env.text("name")
            ));
        }
    }
    let mut ports = HashSet::new();
    for (n, port) in container.items("ports").iter().enumerate() {
        let known =
            (port.int("containerPort"), port.text("protocol"), port.int("hostPort"), port.text("hostIP"));
        if !ports.insert(known) {
            warnings.push(format!(
                "{path}.ports[{n}]: duplicate port definition with {}",
                container
                    .items("ports")
                    .iter()
                    .position(
                        |other| other.int("containerPort") == known.0 && other.text("protocol") == known.1
                    )
                    .map(|first| format!("{path}.ports[{first}]"))
                    .unwrap_or_default()
            ));
        }
    }
    for list in ["limits", "requests"] {
        for (name, value) in container.at("resources").members(list) {
            // A fraction of a byte: somebody wrote m where M was meant.
            let text = value.as_str().unwrap_or_default();
            if matches!(name, "memory" | "ephemeral-storage") && text.ends_with('m') {
                warnings.push(format!(
                    "{path}.resources.{list}[{name}]: fractional byte value {text:?} is invalid, must be an integer"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn oddities_are_mentioned() {
        let spec = json!({
            "nodeSelector": {"beta.kubernetes.io/os": "linux"},
            "containers": [{"env": [{"name": "A"}, {"name": "A"}],
                "ports": [{"containerPort": 1}, {"containerPort": 1}],
                "resources": {"limits": {"memory": "100m"}}}],
        });
        assert_eq!(
            pod_warnings(&spec, "spec"),
            [
                "spec.nodeSelector[beta.kubernetes.io/os]: deprecated since v1.14; use \"kubernetes.io/os\" instead",
                "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply",
                "spec.containers[0].ports[1]: duplicate port definition with spec.containers[0].ports[0]",
                "spec.containers[0].resources.limits[memory]: fractional byte value \"100m\" is invalid, must be an integer",
            ]
        );
    }
}
