//! What pods ask for and nodes have, as plain numbers.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;
use minke_api::Quantity;

/// What a container without a request counts as when nodes are scored (upstream's DefaultMilliCPURequest
/// and DefaultMemoryRequest).
pub const DEFAULT_CPU_MILLI: i64 = 100;
pub const DEFAULT_MEMORY: i64 = 200 << 20;

/// Amounts of resources: CPU in thousandths of a core, the rest in bytes or pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    pub cpu_milli: i64,
    pub memory: i64,
    pub ephemeral_storage: i64,
    /// Extended resources and huge pages, by name. Most pods and nodes have none.
    pub extended: BTreeMap<Box<str>, i64>,
}

impl Resources {
    /// Reads a list of quantities; what is not a quantity counts as nothing (the API server refuses it).
    pub fn read(list: Option<&BTreeMap<String, Text>>) -> Resources {
        let mut resources = Resources::default();
        for (name, text) in list.into_iter().flatten() {
            let Ok(quantity) = Quantity::parse(&text.0) else { continue };
            match name.as_str() {
                "cpu" => resources.cpu_milli = quantity.milli_value(),
                "memory" => resources.memory = quantity.value(),
                "ephemeral-storage" => resources.ephemeral_storage = quantity.value(),
                "pods" => {}
                _ => {
                    resources.extended.insert(name.as_str().into(), quantity.value());
                }
            }
        }
        resources
    }

    /// The amount of one resource by its name; `cpu` in thousandths.
    pub fn get(&self, name: &str) -> i64 {
        match name {
            "cpu" => self.cpu_milli,
            "memory" => self.memory,
            "ephemeral-storage" => self.ephemeral_storage,
            _ => self.extended.get(name).copied().unwrap_or_default(),
        }
    }

    pub fn add(&mut self, other: &Resources) {
        self.cpu_milli += other.cpu_milli;
        self.memory += other.memory;
        self.ephemeral_storage += other.ephemeral_storage;
        for (name, amount) in &other.extended {
            *self.extended.entry(name.clone()).or_default() += amount;
        }
    }

    pub fn subtract(&mut self, other: &Resources) {
        self.cpu_milli -= other.cpu_milli;
        self.memory -= other.memory;
        self.ephemeral_storage -= other.ephemeral_storage;
        for (name, amount) in &other.extended {
            if let Some(have) = self.extended.get_mut(name) {
                *have -= amount;
            }
        }
    }

    fn raise_to(&mut self, other: &Resources) {
        self.cpu_milli = self.cpu_milli.max(other.cpu_milli);
        self.memory = self.memory.max(other.memory);
        self.ephemeral_storage = self.ephemeral_storage.max(other.ephemeral_storage);
        for (name, amount) in &other.extended {
            let have = self.extended.entry(name.clone()).or_default();
            *have = (*have).max(*amount);
        }
    }
}

/// What a pod needs at its most demanding moment: its containers together with its sidecars, or one of its
/// init containers with the sidecars started before it; plus overhead (KEP-753, KEP-688). Of one that runs, what it
/// has counts as long as that is more than what it asks for now (KEP-1287).
pub fn pod_requests(pod: &Pod) -> Resources {
    requests_by(pod, |container| {
        let asked = Resources::read(container.resources.as_ref().and_then(|r| r.requests.as_ref()));
        match status_of(pod, &container.name) {
            None => asked,
            Some(status) => {
                let has = status.resources.as_ref().and_then(|resources| resources.requests.as_ref());
                in_between(pod, asked, has, status.allocated_resources.as_ref())
            }
        }
    })
}

fn status_of<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let lists = [&status.container_statuses, &status.init_container_statuses];
    lists.into_iter().flatten().flatten().find(|status| status.name == name)
}

/// While a resize is under way both sides of it are needed; of one that is more than the node has, only what there is.
fn in_between(
    pod: &Pod,
    asked: Resources,
    has: Option<&BTreeMap<String, Text>>,
    granted: Option<&BTreeMap<String, Text>>,
) -> Resources {
    if has.is_none() && granted.is_none() {
        return asked;
    }
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let infeasible = conditions.any(|c| {
        c.type_ == "PodResizePending" && c.status == "True" && c.reason.as_deref() == Some("Infeasible")
    });
    let mut most = if infeasible { Resources::default() } else { asked };
    for known in [has, granted].into_iter().flatten() {
        most.raise_to(&Resources::read(Some(known)));
    }
    most
}

/// As [`pod_requests`], with the defaults that scoring assumes for containers that ask for nothing:
/// CPU in thousandths and memory in bytes.
pub fn scored_requests(pod: &Pod) -> (i64, i64) {
    let resources = requests_by(pod, |container| {
        let requests = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
        let has = |name: &str| requests.is_some_and(|requests| requests.contains_key(name));
        let mut resources = Resources::read(requests);
        if !has("cpu") {
            resources.cpu_milli = DEFAULT_CPU_MILLI;
        }
        if !has("memory") {
            resources.memory = DEFAULT_MEMORY;
        }
        resources
    });
    (resources.cpu_milli, resources.memory)
}

fn requests_by(pod: &Pod, of: impl Fn(&Container) -> Resources) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::default() };
    let (mut sidecars, mut peak) = (Resources::default(), Resources::default());
    for container in spec.init_containers.iter().flatten() {
        let mut at_once = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&at_once);
            peak.raise_to(&sidecars);
        } else {
            at_once.add(&sidecars);
            peak.raise_to(&at_once);
        }
    }
    let mut total = sidecars;
    for container in &spec.containers {
        total.add(&of(container));
    }
    total.raise_to(&peak);
    // Requests of the pod as a whole take the place of the sum (KEP-2837).
    if let Some(whole) = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()) {
        let status = pod.status.as_ref();
        let has = status.and_then(|status| status.resources.as_ref()?.requests.as_ref());
        let granted = status.and_then(|status| status.allocated_resources.as_ref());
        let given = in_between(pod, Resources::read(Some(whole)), has, granted);
        if whole.contains_key("cpu") {
            total.cpu_milli = given.cpu_milli;
        }
        if whole.contains_key("memory") {
            total.memory = given.memory;
        }
    }
    total.add(&Resources::read(spec.overhead.as_ref()));
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[track_caller]
    fn check(spec: Value, cpu_milli: i64) {
        let pod: Pod = serde_json::from_value(json!({"spec": spec})).unwrap();
        assert_eq!(pod_requests(&pod).cpu_milli, cpu_milli);
    }

    fn container(cpu: &str) -> Value {
        json!({"name": "c", "resources": {"requests": {"cpu": cpu}}})
    }

    fn sidecar(cpu: &str) -> Value {
        json!({"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": cpu}}})
    }

    #[test]
    fn a_pod_needs_what_it_needs_at_its_peak() {
        check(json!({"containers": [container("1"), container("500m")]}), 1500);
        check(json!({"containers": [container("1")], "initContainers": [container("2")]}), 2000);
        check(
            json!({"containers": [container("1")], "initContainers": [sidecar("1"), container("2")]}),
            3000,
        );
        check(
            json!({"containers": [container("3")], "initContainers": [container("2"), sidecar("1")]}),
            4000,
        );
        check(json!({"containers": [container("1")], "overhead": {"cpu": "250m"}}), 1250);
        check(json!({"containers": [container("1")], "resources": {"requests": {"cpu": "5"}}}), 5000);
        check(json!({"containers": [{"name": "c"}]}), 0);
    }

    #[test]
    fn a_resize_counts_with_both_its_sides() {
        let check = |asked: &str, has: Option<&str>, reason: &str, want: i64| {
            let resources = has.map(|cpu| json!({"requests": {"cpu": cpu}}));
            let status = json!({"conditions": [{"type": "PodResizePending", "status": "True", "reason": reason}],
                "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                    "resources": resources, "allocatedResources": has.map(|cpu| json!({"cpu": cpu}))}]});
            let pod: Pod =
                serde_json::from_value(json!({"spec": {"containers": [container(asked)]}, "status": status}))
                    .unwrap();
            assert_eq!(pod_requests(&pod).cpu_milli, want, "{asked} {has:?} {reason}");
        };
        check("2", None, "", 2000);
        check("2", Some("1"), "Deferred", 2000);
        check("1", Some("2"), "", 2000);
        check("1000", Some("1"), "Infeasible", 1000);
    }

    #[test]
    fn scoring_assumes_something_for_containers_that_ask_for_nothing() {
        let pod: Pod =
            serde_json::from_value(json!({"spec": {"containers": [{"name": "a"}, container("1")]}})).unwrap();
        assert_eq!(scored_requests(&pod), (1100, 2 * DEFAULT_MEMORY));
    }
}
