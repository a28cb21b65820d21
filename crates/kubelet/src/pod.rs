//! A pod as the agent reads it: the typed object, its containers by class, and how messages name it.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use minke_api::{ApiType, Object};

/// Where a pod comes from, when not from the API server: `file`.
pub const SOURCE_ANNOTATION: &str = "kubernetes.io/config.source";

/// Which part a container plays in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container that restarts always: started in turn, then kept running.
    Sidecar,
    Main,
    /// Added to a running pod; never restarted.
    Ephemeral,
}

impl Class {
    /// The list of `spec` that holds containers of this class.
    pub fn field(self) -> &'static str {
        match self {
            Class::Init | Class::Sidecar => "initContainers",
            Class::Main => "containers",
            Class::Ephemeral => "ephemeralContainers",
        }
    }
}

/// One revision of a pod.
#[derive(Debug, Clone)]
pub struct Pod {
    object: Arc<Object>,
    typed: Arc<core::Pod>,
    /// Ephemeral containers, in the shape of the others.
    ephemeral: Arc<[core::Container]>,
}

impl Pod {
    /// `None` when the object does not fit its type; that is logged.
    pub fn new(object: Arc<Object>) -> Option<Pod> {
        let typed: Arc<core::Pod> = minke_client::typed(&object)?;
        typed.spec.as_ref()?;
        let ephemeral = typed.spec.as_ref().and_then(|spec| spec.ephemeral_containers.as_ref());
        let ephemeral = ephemeral.into_iter().flatten().filter_map(|container| {
            // The types have the same fields but for the target, so they agree on the wire.
            core::Container::from_value(&container.to_value()).ok()
        });
        let ephemeral = ephemeral.collect();
        Some(Pod { object, typed, ephemeral })
    }

    /// The same pod with other resources, for itself and for the containers that `of` knows by name.
    pub fn with_resources(
        &self,
        whole: Option<core::ResourceRequirements>,
        of: impl Fn(&str) -> Option<core::ResourceRequirements>,
    ) -> Pod {
        let mut typed = (*self.typed).clone();
        if let Some(spec) = &mut typed.spec {
            spec.resources = whole;
            for container in spec.containers.iter_mut().chain(spec.init_containers.iter_mut().flatten()) {
                if let Some(resources) = of(&container.name) {
                    container.resources = Some(resources);
                }
            }
        }
        Pod { typed: Arc::new(typed), ..self.clone() }
    }

    pub fn object(&self) -> &Arc<Object> {
        &self.object
    }

    pub fn typed(&self) -> &core::Pod {
        &self.typed
    }

    pub fn spec(&self) -> &core::PodSpec {
        self.typed.spec.as_ref().expect("checked when the view was made")
    }

    /// The status the API server shows.
    pub fn status(&self) -> Option<&core::PodStatus> {
        self.typed.status.as_ref()
    }

    pub fn uid(&self) -> &str {
        self.object.uid()
    }

    /// The uid under which it runs here: a mirror's is that of the pod it mirrors.
    pub fn uid_here(&self) -> &str {
        let annotations = self.typed.metadata.annotations.as_ref();
        let mirrored = annotations.and_then(|all| all.get(crate::manifests::MIRROR_ANNOTATION));
        mirrored.map_or(self.uid(), String::as_str)
    }

    pub fn name(&self) -> &str {
        self.object.name()
    }

    pub fn namespace(&self) -> &str {
        self.object.namespace()
    }

    /// Whether it comes from a file on this node and not from the API server.
    pub fn is_static(&self) -> bool {
        let source = self.typed.metadata.annotations.as_ref().and_then(|all| all.get(SOURCE_ANNOTATION));
        source.is_some_and(|source| source != "api")
    }

    pub fn is_deleted(&self) -> bool {
        self.object.deleted().is_some()
    }

    /// Seconds that containers get to end, at least 1.
    pub fn grace_seconds(&self) -> i64 {
        let asked = self.typed.metadata.deletion_grace_period_seconds;
        asked.or(self.spec().termination_grace_period_seconds).unwrap_or(30).max(1)
    }

    pub fn host_network(&self) -> bool {
        self.spec().host_network == Some(true)
    }

    pub fn restart_policy(&self) -> &str {
        self.spec().restart_policy.as_deref().unwrap_or("Always")
    }

    /// `name_namespace(uid)`, as messages name a pod.
    pub fn long_name(&self) -> String {
        format!("{}_{}({})", self.name(), self.namespace(), self.uid())
    }

    /// Whether the API server shows a phase that never changes again.
    pub fn is_terminal(&self) -> bool {
        matches!(self.phase(), "Succeeded" | "Failed")
    }

    pub fn phase(&self) -> &str {
        self.status().and_then(|status| status.phase.as_deref()).unwrap_or_default()
    }

    /// Every container in the order of the specification: init containers, main ones, ephemeral ones.
    pub fn containers(&self) -> impl Iterator<Item = (Class, &core::Container)> {
        let init = self.spec().init_containers.iter().flatten().map(|container| {
            let sidecar = container.restart_policy.as_deref() == Some("Always");
            (if sidecar { Class::Sidecar } else { Class::Init }, container)
        });
        let main = self.spec().containers.iter().map(|container| (Class::Main, container));
        let ephemeral = self.ephemeral.iter().map(|container| (Class::Ephemeral, container));
        init.chain(main).chain(ephemeral)
    }

    /// The container that an ephemeral one, by name, is to look at.
    pub fn target_of(&self, name: &str) -> Option<&str> {
        let mut ephemeral = self.spec().ephemeral_containers.iter().flatten();
        let found = ephemeral.find(|container| container.name == name)?;
        found.target_container_name.as_deref().filter(|target| !target.is_empty())
    }

    pub fn container(&self, name: &str) -> Option<(Class, &core::Container)> {
        self.containers().find(|(_, container)| container.name == name)
    }

    pub fn has_init(&self) -> bool {
        self.spec().init_containers.as_ref().is_some_and(|list| !list.is_empty())
    }
}

/// Prints a duration as Go does: `10s`, `1m20s`, `5m0s`, `1.5s`, `250ms`.
pub fn go_duration(duration: std::time::Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    let trim = |whole: u128, part: u128, digits: usize| {
        let part = format!("{part:0digits$}");
        match part.trim_end_matches('0') {
            "" => whole.to_string(),
            part => format!("{whole}.{part}"),
        }
    };
    match nanos {
        0..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => format!("{}µs", trim(nanos / 1_000, nanos % 1_000, 3)),
        1_000_000..1_000_000_000 => format!("{}ms", trim(nanos / 1_000_000, nanos % 1_000_000, 6)),
        _ => {
            let seconds = nanos / 1_000_000_000;
            let rest = trim(seconds % 60, nanos % 1_000_000_000, 9);
            match (seconds / 3600, seconds / 60 % 60) {
                (0, 0) => format!("{rest}s"),
                (0, minutes) => format!("{minutes}m{rest}s"),
                (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use minke_api::Kind;
    use serde_json::{Value, json};
    use std::time::Duration;

    /// A pod with one container `c`, changed by a JSON merge patch.
    pub fn pod(patch: Value) -> Pod {
        let mut value = json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u-1", "generation": 1,
                         "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": "n", "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
                     "containers": [{"name": "c", "image": "i"}]},
        });
        merge(&mut value, patch);
        let object = Object::from_value(Kind::of::<core::Pod>(), &value).expect("a pod");
        Pod::new(Arc::new(object)).expect("a typed pod")
    }

    pub fn merge(into: &mut Value, patch: Value) {
        match (into, patch) {
            (Value::Object(into), Value::Object(patch)) => {
                for (key, value) in patch {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, patch) => *into = patch,
        }
    }

    #[test]
    fn durations_print_as_in_go() {
        for (millis, want) in [
            (0, "0s"),
            (1, "1ms"),
            (250, "250ms"),
            (1_500, "1.5s"),
            (10_000, "10s"),
            (80_000, "1m20s"),
            (300_000, "5m0s"),
            (3_600_000, "1h0m0s"),
            (1_234, "1.234s"),
        ] {
            assert_eq!(go_duration(Duration::from_millis(millis)), want);
        }
        assert_eq!(go_duration(Duration::from_nanos(1_500)), "1.5µs");
    }

    #[test]
    fn a_mirror_stands_for_what_it_mirrors() {
        assert_eq!(pod(json!({})).uid_here(), "u-1");
        let annotations = json!({crate::manifests::MIRROR_ANNOTATION: "hash"});
        assert_eq!(pod(json!({"metadata": {"annotations": annotations}})).uid_here(), "hash");
    }

    #[test]
    fn containers_come_in_order_with_their_class() {
        let pod = pod(json!({"spec": {
            "initContainers": [{"name": "a"}, {"name": "b", "restartPolicy": "Always"}],
            "ephemeralContainers": [{"name": "d", "targetContainerName": "c"}],
        }}));
        let got: Vec<_> = pod.containers().map(|(class, c)| (class, c.name.as_str())).collect();
        let want = [(Class::Init, "a"), (Class::Sidecar, "b"), (Class::Main, "c"), (Class::Ephemeral, "d")];
        assert_eq!(got, want);
    }
}
