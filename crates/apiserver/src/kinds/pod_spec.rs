//! Defaults of pod specs, wherever one stands: in a Pod or in the template of a workload.
//!
//! Upstream: pkg/apis/core/v1/defaults.go.

use minke_api::Quantity;
use serde_json::{Value, json};

use super::tree::Tree;

/// Permission bits of files in volumes: 0644.
const FILE_MODE: i64 = 0o644;

/// Defaults of a PodTemplateSpec.
pub fn template_defaults(template: &mut Value) {
    template.object("metadata");
    pod_spec_defaults(template.object("spec"));
}

/// Defaults of a PodSpec that hold for Pods and templates alike.
pub fn pod_spec_defaults(spec: &mut Value) {
    spec.fill("dnsPolicy", "ClusterFirst");
    spec.fill("restartPolicy", "Always");
    spec.object("securityContext");
    spec.fill("terminationGracePeriodSeconds", 30);
    spec.fill("schedulerName", "default-scheduler");
    // The two names of one field; the older one is only a copy.
    let account = match spec.text("serviceAccountName") {
        "" => spec.text("serviceAccount").to_owned(),
        name => name.to_owned(),
    };
    if !account.is_empty() {
        spec.set("serviceAccountName", account.as_str());
        spec.set("serviceAccount", account);
    }
    spec.each("volumes").for_each(volume_defaults);
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        spec.each(list).for_each(container_defaults);
    }
    round_quantities(spec.sub("overhead"));
    if let Some(resources) = spec.sub("resources") {
        resource_defaults(resources);
    }
}

/// Defaults that Pods have and templates have not.
pub fn pod_only_defaults(spec: &mut Value) {
    for list in ["initContainers", "containers"] {
        for container in spec.each(list) {
            requests_from_limits(container.object("resources"));
        }
    }
    if spec.has("resources") {
        pod_level_requests(spec);
    }
    spec.fill("enableServiceLinks", true);
    if spec.flag("hostNetwork") {
        for list in ["initContainers", "containers"] {
            for port in spec.each(list).flat_map(|container| container.each("ports")) {
                if let Some(number) = port.int("containerPort") {
                    port.fill_zero("hostPort", number);
                }
            }
        }
    }
}

fn container_defaults(container: &mut Value) {
    let policy = pull_policy(container.text("image"));
    container.fill("imagePullPolicy", policy);
    container.fill("terminationMessagePath", "/dev/termination-log");
    container.fill("terminationMessagePolicy", "File");
    resource_defaults(container.object("resources"));
    for port in container.each("ports") {
        port.fill("protocol", "TCP");
    }
    for env in container.each("env") {
        let Some(source) = env.sub("valueFrom") else { continue };
        if let Some(field) = source.sub("fieldRef") {
            field.fill("apiVersion", "v1");
        }
        if let Some(resource) = source.sub("resourceFieldRef") {
            resource.fill("divisor", "0");
        }
        if let Some(file) = source.sub("fileKeyRef") {
            file.fill("optional", false);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.sub(probe) {
            probe_defaults(probe);
        }
    }
    if let Some(lifecycle) = container.sub("lifecycle") {
        for hook in ["postStart", "preStop"] {
            if let Some(http) = lifecycle.sub(hook).and_then(|hook| hook.sub("httpGet")) {
                http_get_defaults(http);
            }
        }
    }
}

/// `Always` when the tag is `latest`, given or understood; else `IfNotPresent`.
fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        // By digest: the tag, if there is one, does not count unless it says latest.
        let name = image.split('@').next().unwrap_or_default();
        return if tag_of(name) == Some("latest") { "Always" } else { "IfNotPresent" };
    }
    match tag_of(image) {
        None | Some("latest") if !image.is_empty() => "Always",
        _ => "IfNotPresent",
    }
}

/// What follows the last colon, unless that colon belongs to the registry's port.
fn tag_of(image: &str) -> Option<&str> {
    image.rsplit_once(':').map(|(_, tag)| tag).filter(|tag| !tag.contains('/'))
}

fn probe_defaults(probe: &mut Value) {
    probe.fill_zero("timeoutSeconds", 1);
    probe.fill_zero("periodSeconds", 10);
    probe.fill_zero("successThreshold", 1);
    probe.fill_zero("failureThreshold", 3);
    if let Some(http) = probe.sub("httpGet") {
        http_get_defaults(http);
    }
    // The one string that is filled with the empty string.
    if let Some(grpc) = probe.sub("grpc")
        && grpc.at("service").is_null()
    {
        grpc.set("service", "");
    }
}

fn http_get_defaults(http: &mut Value) {
    http.fill("path", "/");
    http.fill("scheme", "HTTP");
}

fn volume_defaults(volume: &mut Value) {
    let sources = volume.as_object().map_or(0, |members| {
        members.iter().filter(|(name, source)| *name != "name" && !source.is_null()).count()
    });
    if sources == 0 {
        volume.set("emptyDir", json!({}));
    }
    for source in ["secret", "configMap", "projected", "downwardAPI"] {
        if let Some(source) = volume.sub(source) {
            source.fill("defaultMode", FILE_MODE);
        }
    }
    if let Some(downward) = volume.sub("downwardAPI") {
        downward.each("items").for_each(downward_file_defaults);
    }
    for source in volume.sub("projected").into_iter().flat_map(|projected| projected.each("sources")) {
        if let Some(token) = source.sub("serviceAccountToken") {
            token.fill("expirationSeconds", 3600);
        }
        if let Some(downward) = source.sub("downwardAPI") {
            downward.each("items").for_each(downward_file_defaults);
        }
        if let Some(certificate) = source.sub("podCertificate") {
            certificate.fill("maxExpirationSeconds", 86_400);
        }
    }
    if let Some(host) = volume.sub("hostPath")
        && host.at("type").is_null()
    {
        host.set("type", "");
    }
    if let Some(image) = volume.sub("image") {
        let policy = pull_policy(image.text("reference"));
        image.fill("pullPolicy", policy);
    }
    if let Some(iscsi) = volume.sub("iscsi") {
        iscsi.fill("iscsiInterface", "default");
    }
    if let Some(rbd) = volume.sub("rbd") {
        rbd.fill("pool", "rbd");
        rbd.fill("user", "admin");
        rbd.fill("keyring", "/etc/ceph/keyring");
    }
    if let Some(disk) = volume.sub("azureDisk") {
        disk.fill("cachingMode", "ReadWrite");
        disk.fill("kind", "Shared");
        disk.fill("fsType", "ext4");
        disk.fill("readOnly", false);
    }
    if let Some(scale) = volume.sub("scaleIO") {
        scale.fill("storageMode", "ThinProvisioned");
        scale.fill("fsType", "xfs");
    }
    if let Some(template) = volume.sub("ephemeral").and_then(|e| e.sub("volumeClaimTemplate")) {
        claim_spec_defaults(template.object("spec"));
    }
}

fn downward_file_defaults(file: &mut Value) {
    if let Some(field) = file.sub("fieldRef") {
        field.fill("apiVersion", "v1");
    }
    if let Some(resource) = file.sub("resourceFieldRef") {
        resource.fill("divisor", "0");
    }
}

/// Defaults of a PersistentVolumeClaimSpec.
pub fn claim_spec_defaults(spec: &mut Value) {
    spec.fill("volumeMode", "Filesystem");
    resource_defaults(spec.object("resources"));
    // Of the two names of where the data comes from, each fills the other.
    for (from, to) in [("dataSource", "dataSourceRef"), ("dataSourceRef", "dataSource")] {
        if spec.has(from) && !spec.has(to) && !spec.at(from).has("namespace") {
            let source = spec.at(from).clone();
            spec.set(to, source);
        }
    }
}

/// Quantities are kept in whole thousandths.
fn resource_defaults(resources: &mut Value) {
    round_quantities(resources.sub("limits"));
    round_quantities(resources.sub("requests"));
}

/// Brings a map of quantities to canonical form, in whole thousandths. What is no quantity stays, for
/// validation to refuse.
pub fn round_quantities(list: Option<&mut Value>) {
    for value in list.and_then(Value::as_object_mut).into_iter().flat_map(|map| map.values_mut()) {
        let text = match &*value {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => continue,
        };
        if let Ok(quantity) = Quantity::parse(&text) {
            let milli = quantity.milli_value();
            // Beyond what thousandths can hold there is nothing to round.
            let rounded = if milli == i64::MAX || milli == i64::MIN {
                quantity
            } else {
                Quantity::from_milli(milli, quantity.format())
            };
            *value = rounded.to_string().into();
        }
    }
}

fn requests_from_limits(resources: &mut Value) {
    let limits: Vec<(String, Value)> =
        resources.members("limits").map(|(name, value)| (name.to_owned(), value.clone())).collect();
    if !limits.is_empty() {
        let requests = resources.object("requests");
        limits.into_iter().for_each(|(name, value)| requests.fill(&name, value));
    }
}

/// Requests of the pod as a whole, where its limits are given: the sum of its containers' requests, else
/// the limit.
fn pod_level_requests(spec: &mut Value) {
    let limits: Vec<(String, Value)> = spec
        .at("resources")
        .members("limits")
        .map(|(name, value)| (name.to_owned(), value.clone()))
        .collect();
    if limits.is_empty() {
        return;
    }
    let asked = super::resources::container_requests(spec);
    let requests = spec.object("resources").object("requests");
    for (name, quantity) in asked {
        if matches!(name.as_str(), "cpu" | "memory") {
            requests.fill(&name, quantity.to_string());
        }
    }
    limits.into_iter().for_each(|(name, value)| requests.fill(&name, value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_decides_when_to_pull() {
        for (image, want) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.27", "IfNotPresent"),
            ("localhost:5000/nginx", "Always"),
            ("localhost:5000/nginx:1", "IfNotPresent"),
            ("nginx@sha256:0000", "IfNotPresent"),
            ("nginx:latest@sha256:0000", "Always"),
            ("", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), want, "{image}");
        }
    }

    #[test]
    fn quantities_are_rounded_and_canonical() {
        let mut list = json!({"cpu": "0.0005", "memory": "1024Mi", "pods": 3, "bad": "x"});
        round_quantities(Some(&mut list));
        assert_eq!(list, json!({"cpu": "1m", "memory": "1Gi", "pods": "3", "bad": "x"}));
    }
}
