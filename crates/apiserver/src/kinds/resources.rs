//! What the containers of a pod ask for together, and the quality of service that follows from it.
//!
//! Upstream: component-helpers/resource and pkg/apis/core/v1/helper/qos.

use std::collections::BTreeMap;

use minke_api::Quantity;
use serde_json::Value;

use super::tree::Tree;

/// Amounts by name of the resource.
pub type Amounts = BTreeMap<String, Quantity>;

/// The quantities of a map such as `limits`; what does not parse is left out (validation refuses it).
pub fn amounts(list: &Value) -> Amounts {
    let quantity = |value: &Value| match value {
        Value::String(text) => Quantity::parse(text).ok(),
        Value::Number(number) => Quantity::parse(&number.to_string()).ok(),
        _ => None,
    };
    list.as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| Some((name.clone(), quantity(value)?)))
        .collect()
}

fn add(sum: &mut Amounts, more: &Amounts) {
    for (name, quantity) in more {
        *sum.entry(name.clone()).or_default() += *quantity;
    }
}

fn raise(most: &mut Amounts, to: &Amounts) {
    for (name, quantity) in to {
        let known = most.entry(name.clone()).or_insert(*quantity);
        if *quantity > *known {
            *known = *quantity;
        }
    }
}

/// Sums `field` (`requests` or `limits`) over the containers as they run: all main containers and sidecars
/// at once, init containers one after another beside the sidecars started before them.
fn over_containers(spec: &Value, field: &str) -> Amounts {
    let of = |container: &Value| amounts(container.at("resources").at(field));
    let mut sum = Amounts::new();
    for container in spec.items("containers") {
        add(&mut sum, &of(container));
    }
    let (mut sidecars, mut init_peak) = (Amounts::new(), Amounts::new());
    for container in spec.items("initContainers") {
        let mut now = of(container);
        if container.text("restartPolicy") == "Always" {
            add(&mut sum, &now);
            add(&mut sidecars, &now);
            now = sidecars.clone();
        } else {
            add(&mut now, &sidecars);
        }
        raise(&mut init_peak, &now);
    }
    raise(&mut sum, &init_peak);
    sum
}

/// What the containers request together.
pub fn container_requests(spec: &Value) -> Amounts {
    over_containers(spec, "requests")
}

/// What the containers are limited to together, as far as they are.
pub fn container_limits(spec: &Value) -> Amounts {
    over_containers(spec, "limits")
}

/// What the pod as a whole requests or is limited to, pod-level values and overhead included.
pub fn pod_amounts(spec: &Value, field: &str) -> Amounts {
    let mut sum = over_containers(spec, field);
    for (name, quantity) in amounts(spec.at("resources").at(field)) {
        sum.insert(name, quantity);
    }
    let overhead = amounts(spec.at("overhead"));
    for (name, quantity) in overhead {
        // Overhead is added to limits only where there are some.
        if field == "requests" || sum.contains_key(&name) {
            *sum.entry(name).or_default() += quantity;
        }
    }
    sum
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub fn qos_class(spec: &Value) -> &'static str {
    let computes = |amounts: Amounts| -> Amounts {
        amounts
            .into_iter()
            .filter(|(name, q)| matches!(name.as_str(), "cpu" | "memory") && *q > Quantity::ZERO)
            .collect()
    };
    let level = |resources: &Value| {
        (computes(amounts(resources.at("requests"))), computes(amounts(resources.at("limits"))))
    };
    let whole = spec.at("resources");
    let each: Vec<(Amounts, Amounts)> = if whole.has("requests") || whole.has("limits") {
        vec![level(whole)]
    } else {
        let all = spec.items("containers").iter().chain(spec.items("initContainers"));
        all.map(|container| level(container.at("resources"))).collect()
    };
    if each.iter().all(|(requests, limits)| requests.is_empty() && limits.is_empty()) {
        return "BestEffort";
    }
    let guaranteed = each.iter().all(|(requests, limits)| {
        limits.len() == 2 && limits.iter().all(|(name, limit)| requests.get(name).is_none_or(|r| r == limit))
    });
    if guaranteed { "Guaranteed" } else { "Burstable" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container(requests: Value, limits: Value) -> Value {
        json!({"resources": {"requests": requests, "limits": limits}})
    }

    #[test]
    fn quality_of_service_follows_requests_and_limits() {
        let none = json!({});
        let full = json!({"cpu": "1", "memory": "1Gi"});
        for (containers, want) in [
            (json!([container(none.clone(), none.clone())]), "BestEffort"),
            (json!([container(full.clone(), full.clone())]), "Guaranteed"),
            (json!([container(json!({"cpu": "1000m", "memory": "1Gi"}), full.clone())]), "Guaranteed"),
            (json!([container(json!({"cpu": "500m", "memory": "1Gi"}), full.clone())]), "Burstable"),
            (
                json!([container(full.clone(), full.clone()), container(none.clone(), none.clone())]),
                "Burstable",
            ),
            (json!([container(json!({"cpu": "1"}), none.clone())]), "Burstable"),
            (json!([container(json!({"cpu": "0"}), none.clone())]), "BestEffort"),
            (json!([container(json!({"example.com/gpu": "1"}), none)]), "BestEffort"),
        ] {
            assert_eq!(qos_class(&json!({"containers": containers})), want, "{containers}");
        }
    }

    #[test]
    fn init_containers_count_for_their_peak_and_sidecars_stay() {
        let cpu = |n: &str| json!({"resources": {"requests": {"cpu": n}}});
        let mut sidecar = cpu("200m");
        sidecar["restartPolicy"] = "Always".into();
        let spec = json!({
            "containers": [cpu("100m"), cpu("100m")],
            "initContainers": [cpu("300m"), sidecar, cpu("500m")],
            "overhead": {"cpu": "50m"},
        });
        // 500m beside the sidecar's 200m is the peak; then overhead.
        assert_eq!(pod_amounts(&spec, "requests")["cpu"].to_string(), "750m");
    }
}
