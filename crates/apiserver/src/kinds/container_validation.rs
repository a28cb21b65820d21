//! Checks of containers: names, images, ports, environment, mounts, resources, probes.
//!
//! Upstream: validateContainers and what it calls.

use std::collections::{HashMap, HashSet};

use minke_api::{FieldErrors, Quantity, names};
use serde_json::Value;

use super::check::{self, at};
use super::pod_validation::{validate_ids, validate_seccomp};
use super::resources::amounts;
use super::restart_validation as restarts;
use super::tree::Tree;
use super::volume_validation::file_path;

const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
const HANDLERS: [&str; 4] = ["exec", "grpc", "httpGet", "tcpSocket"];
const FIELD_PATHS: [&str; 9] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];
const NOT_FOR_EPHEMERAL: [&str; 9] = [
    "ports",
    "livenessProbe",
    "readinessProbe",
    "startupProbe",
    "lifecycle",
    "resources",
    "resizePolicy",
    "restartPolicy",
    "restartPolicyRules",
];
const RESOURCE_FIELDS: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];
/// Most bytes of a key in a file of variables.
const FILE_KEY_MAX: usize = 128;

/// All three lists of containers of a pod spec. `volumes` are the names of its volumes.
pub fn validate_containers(spec: &Value, path: &str, volumes: &HashSet<&str>, errors: &mut FieldErrors) {
    if spec.items("containers").is_empty() {
        errors.required(&at(path, "containers"), "");
    }
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for list in ["containers", "initContainers", "ephemeralContainers"] {
        for (n, container) in spec.items(list).iter().enumerate() {
            let path = format!("{path}.{list}[{n}]");
            let name = container.text("name");
            if seen.insert(name, list).is_some() && !name.is_empty() {
                errors.duplicate(&at(&path, "name"), name);
            }
            validate_container(container, list, spec, &path, volumes, errors);
        }
    }
    host_ports_are_unique(spec, path, errors);
}

fn validate_container(
    container: &Value,
    list: &str,
    spec: &Value,
    path: &str,
    volumes: &HashSet<&str>,
    errors: &mut FieldErrors,
) {
    match container.text("name") {
        "" => errors.required(&at(path, "name"), ""),
        name => check::name(name, &at(path, "name"), names::dns_label, errors),
    }
    match container.text("image") {
        "" => errors.required(&at(path, "image"), ""),
        image if image.trim() != image => {
            errors.invalid(&at(path, "image"), image, "must not have leading or trailing whitespace");
        }
        _ => {}
    }
    check::one_of(container, path, "imagePullPolicy", &PULL_POLICIES, errors);
    let messages = ["FallbackToLogsOnError", "File"];
    check::one_of_if_set(container, path, "terminationMessagePolicy", &messages, errors);
    validate_ports(container, spec.flag("hostNetwork"), path, errors);
    validate_env(container, spec, path, errors);
    validate_mounts(container, path, volumes, errors);
    validate_resources(container.at("resources"), &at(path, "resources"), errors);
    validate_context(container, path, errors);
    let sidecar = container.text("restartPolicy") == "Always";
    if list != "ephemeralContainers" {
        restarts::restart_policy(container, path, errors);
        restarts::resize_policy(container, spec.text("restartPolicy"), path, errors);
    }
    match list {
        "initContainers" if !sidecar => {
            for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if container.has(field) {
                    errors.forbidden(
                        &at(path, field),
                        "may not be set for init containers without restartPolicy=Always",
                    );
                }
            }
        }
        "ephemeralContainers" => {
            for field in NOT_FOR_EPHEMERAL {
                if container.has(field) {
                    errors.forbidden(&at(path, field), "cannot be set for an Ephemeral Container");
                }
            }
            for (n, mount) in container.items("volumeMounts").iter().enumerate() {
                for field in ["subPath", "subPathExpr"] {
                    if mount.has(field) {
                        let path = format!("{path}.volumeMounts[{n}].{field}");
                        errors.forbidden(&path, "cannot be set for an Ephemeral Container");
                    }
                }
            }
            let target = container.text("targetContainerName");
            let known = spec.items("containers").iter().chain(spec.items("initContainers"));
            if !target.is_empty() && !known.into_iter().any(|c| c.text("name") == target) {
                errors.not_found(&at(path, "targetContainerName"), target);
            }
        }
        _ => {
            for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
                if container.at(probe).is_object() {
                    validate_probe(container.at(probe), probe, &at(path, probe), errors);
                }
            }
            restarts::stop_signal(container.at("lifecycle"), spec, &at(path, "lifecycle"), errors);
            for hook in ["postStart", "preStop"] {
                let handler = container.at("lifecycle").at(hook);
                if handler.is_object() {
                    let path = format!("{path}.lifecycle.{hook}");
                    validate_handler(handler, &["exec", "httpGet", "sleep", "tcpSocket"], &path, errors);
                    let grace = spec.int("terminationGracePeriodSeconds").unwrap_or_default();
                    if let Some(seconds) = handler.at("sleep").int("seconds").filter(|s| *s < 0 || *s > grace)
                    {
                        let why = format!(
                            "must be greater than or equal to 0 and less than or equal to terminationGracePeriodSeconds ({grace})"
                        );
                        errors.invalid(&at(&path, "sleep"), seconds, &why);
                    }
                }
            }
        }
    }
}

fn validate_ports(container: &Value, host_network: bool, path: &str, errors: &mut FieldErrors) {
    let mut seen = HashSet::new();
    for (n, port) in container.items("ports").iter().enumerate() {
        let path = format!("{path}.ports[{n}]");
        let name = port.text("name");
        if !name.is_empty() {
            check::port_name(name, &at(&path, "name"), errors);
            if !seen.insert(name) {
                errors.duplicate(&at(&path, "name"), name);
            }
        }
        match port.int("containerPort").unwrap_or_default() {
            0 => errors.required(&at(&path, "containerPort"), ""),
            number => check::port_number(number, &at(&path, "containerPort"), errors),
        }
        let host = port.int("hostPort").unwrap_or_default();
        if host != 0 {
            check::port_number(host, &at(&path, "hostPort"), errors);
            if host_network && port.int("containerPort") != Some(host) {
                errors.invalid(
                    &at(&path, "containerPort"),
                    port.int("containerPort").unwrap_or_default(),
                    "must match `hostPort` when `hostNetwork` is true",
                );
            }
        }
        check::one_of(port, &path, "protocol", &["SCTP", "TCP", "UDP"], errors);
    }
}

fn host_ports_are_unique(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let mut seen = HashSet::new();
    for (n, container) in spec.items("containers").iter().enumerate() {
        for (m, port) in container.items("ports").iter().enumerate() {
            let host = port.int("hostPort").unwrap_or_default();
            let taken = format!("{}/{}/{host}", port.text("protocol"), port.text("hostIP"));
            if host != 0 && !seen.insert(taken.clone()) {
                errors.duplicate(&format!("{path}.containers[{n}].ports[{m}].hostPort"), taken.as_str());
            }
        }
    }
}

/// Any printable ASCII but `=` may stand in the name of a variable.
fn env_name(name: &str, path: &str, errors: &mut FieldErrors) {
    if name.is_empty() || !name.bytes().all(|c| (b' '..=b'~').contains(&c) && c != b'=') {
        errors.invalid(
            path,
            name,
            "a valid environment variable name must consist only of printable ASCII characters other than '='",
        );
    }
}

fn validate_env(container: &Value, spec: &Value, path: &str, errors: &mut FieldErrors) {
    for (n, env) in container.items("env").iter().enumerate() {
        let path = format!("{path}.env[{n}]");
        match env.text("name") {
            "" => errors.required(&at(&path, "name"), ""),
            name => env_name(name, &at(&path, "name"), errors),
        }
        if env.at("valueFrom").is_object() {
            validate_env_source(env, spec, &at(&path, "valueFrom"), errors);
        }
    }
    for (n, from) in container.items("envFrom").iter().enumerate() {
        let path = format!("{path}.envFrom[{n}]");
        if from.has("prefix") {
            env_name(from.text("prefix"), &at(&path, "prefix"), errors);
        }
        let sources = ["configMapRef", "secretRef"];
        let given: Vec<&str> = sources.into_iter().filter(|source| from.at(source).is_object()).collect();
        match given[..] {
            [] => errors.invalid(&path, "", "must specify one of: `configMapRef` or `secretRef`"),
            [source] => {
                if from.at(source).text("name").is_empty() {
                    errors.required(&format!("{path}.{source}.name"), "");
                }
            }
            _ => errors.invalid(&path, "", "may not have more than one field specified at a time"),
        }
    }
}

fn validate_env_source(env: &Value, spec: &Value, path: &str, errors: &mut FieldErrors) {
    const SOURCES: [&str; 5] =
        ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"];
    let source = env.at("valueFrom");
    let given: Vec<&str> = SOURCES.into_iter().filter(|name| source.at(name).is_object()).collect();
    if given.is_empty() {
        errors.invalid(
            path,
            "",
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`",
        );
    }
    if env.has("value") {
        if !given.is_empty() {
            errors.invalid(path, "", "may not be specified when `value` is not empty");
        }
    } else if given.len() > 1 {
        errors.invalid(path, "", "may not have more than one field specified at a time");
    }
    for name in given {
        let (reference, path) = (source.at(name), at(path, name));
        match name {
            "fieldRef" => field_ref(reference, &FIELD_PATHS, &path, errors),
            "resourceFieldRef" => resource_field_ref(reference, false, &path, errors),
            "fileKeyRef" => file_key_ref(reference, spec, &path, errors),
            _ => {
                for field in ["name", "key"] {
                    check::required(reference, &path, field, errors);
                }
            }
        }
    }
}

/// A variable in a file in one of the pod's `emptyDir` volumes.
fn file_key_ref(reference: &Value, spec: &Value, path: &str, errors: &mut FieldErrors) {
    for field in ["volumeName", "path", "key"] {
        check::required(reference, path, field, errors);
    }
    let (volume, key) = (reference.text("volumeName"), reference.text("key"));
    if !volume.is_empty() {
        let path = at(path, "volumeName");
        check::name(volume, &path, names::dns_label, errors);
        match spec.items("volumes").iter().find(|known| known.text("name") == volume) {
            None => errors.not_found(&path, volume),
            Some(known) if !known.at("emptyDir").is_object() => {
                errors.invalid(&path, volume, "referenced volume must be of type emptyDir");
            }
            Some(_) => {}
        }
    }
    file_path(reference.text("path"), &at(path, "path"), errors);
    if !key.is_empty() {
        env_name(key, &at(path, "key"), errors);
        if key.len() > FILE_KEY_MAX {
            errors.too_long(&at(path, "key"), FILE_KEY_MAX);
        }
    }
}

/// A field of the pod. Single labels and annotations may always be named.
pub fn field_ref(reference: &Value, allowed: &[&str], path: &str, errors: &mut FieldErrors) {
    check::required(reference, path, "apiVersion", errors);
    let field = reference.text("fieldPath");
    let path = at(path, "fieldPath");
    if field.is_empty() {
        errors.required(&path, "");
    } else if let Some((of, key)) = field.split_once("['") {
        let key = key.strip_suffix("']").unwrap_or_default();
        if !matches!(of, "metadata.labels" | "metadata.annotations") || key.is_empty() {
            errors.invalid(
                &path,
                field,
                "error converting fieldPath: field label does not support subscript",
            );
        } else {
            check::name(&key.to_lowercase(), &path, names::qualified_name, errors);
        }
    } else if !allowed.contains(&field) {
        let known =
            matches!(field, "metadata.labels" | "metadata.annotations") || FIELD_PATHS.contains(&field);
        if known {
            errors.not_supported(&path, field, allowed);
        } else {
            let why = format!("error converting fieldPath: field label not supported: {field}");
            errors.invalid(&path, field, &why);
        }
    }
}

/// A request or limit of a container.
pub fn resource_field_ref(reference: &Value, in_volume: bool, path: &str, errors: &mut FieldErrors) {
    if in_volume && reference.text("containerName").is_empty() {
        errors.required(&at(path, "containerName"), "");
    }
    match reference.text("resource") {
        "" => errors.required(&at(path, "resource"), ""),
        resource => {
            let huge =
                resource.starts_with("limits.hugepages-") || resource.starts_with("requests.hugepages-");
            if !huge && !RESOURCE_FIELDS.contains(&resource) {
                errors.not_supported(&at(path, "resource"), resource, &RESOURCE_FIELDS);
            }
        }
    }
}

fn recursive_read_only(mount: &Value, path: &str, errors: &mut FieldErrors) {
    let path = at(path, "recursiveReadOnly");
    match mount.text("recursiveReadOnly") {
        "" | "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if !mount.flag("readOnly") {
                errors.forbidden(&path, "may only be specified when readOnly is true");
            }
            if !matches!(mount.text("mountPropagation"), "" | "None") {
                let why = "may only be specified when mountPropagation is None or not specified";
                errors.forbidden(&path, why);
            }
        }
        other => errors.not_supported(&path, other, &["Disabled", "Enabled", "IfPossible"]),
    }
}

fn validate_mounts(container: &Value, path: &str, volumes: &HashSet<&str>, errors: &mut FieldErrors) {
    let mut seen = HashSet::new();
    for (n, mount) in container.items("volumeMounts").iter().enumerate() {
        let path = format!("{path}.volumeMounts[{n}]");
        match mount.text("name") {
            "" => errors.required(&at(&path, "name"), ""),
            name if !volumes.contains(name) => errors.not_found(&at(&path, "name"), name),
            _ => {}
        }
        match mount.text("mountPath") {
            "" => errors.required(&at(&path, "mountPath"), ""),
            target if !seen.insert(target) => {
                errors.invalid(&at(&path, "mountPath"), target, "must be unique")
            }
            _ => {}
        }
        for field in ["subPath", "subPathExpr"] {
            if mount.has(field) {
                relative_path(mount.text(field), &at(&path, field), errors);
            }
        }
        if mount.has("subPath") && mount.has("subPathExpr") {
            errors.invalid(
                &at(&path, "subPathExpr"),
                mount.text("subPathExpr"),
                "subPathExpr and subPath are mutually exclusive",
            );
        }
        let propagation = ["Bidirectional", "HostToContainer", "None"];
        check::one_of_if_set(mount, &path, "mountPropagation", &propagation, errors);
        if mount.text("mountPropagation") == "Bidirectional"
            && !container.at("securityContext").flag("privileged")
        {
            errors.forbidden(
                &at(&path, "mountPropagation"),
                "Bidirectional mount propagation is available only to privileged containers",
            );
        }
        recursive_read_only(mount, &path, errors);
    }
    for (n, device) in container.items("volumeDevices").iter().enumerate() {
        let path = format!("{path}.volumeDevices[{n}]");
        match device.text("name") {
            "" => errors.required(&at(&path, "name"), ""),
            name if !volumes.contains(name) => {
                errors.not_found(&at(&path, "name"), name);
            }
            _ => {}
        }
        match device.text("devicePath") {
            "" => errors.required(&at(&path, "devicePath"), ""),
            target if !seen.insert(target) => {
                errors.invalid(&at(&path, "devicePath"), target, "must be unique")
            }
            _ => {}
        }
    }
}

/// A path that stays below where it starts.
pub fn relative_path(text: &str, path: &str, errors: &mut FieldErrors) {
    if text.starts_with('/') {
        errors.invalid(path, text, "must be a relative path");
    }
    if text.split('/').any(|part| part == "..") {
        errors.invalid(path, text, "must not contain '..'");
    }
}

fn resource_name(name: &str, path: &str, errors: &mut FieldErrors) {
    check::name(name, path, names::qualified_name, errors);
    if name.contains('/') {
        return;
    }
    let standard = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
    if !standard {
        errors.invalid(path, name, "must be a standard resource type or fully qualified");
        errors.invalid(path, name, "must be a standard resource for containers");
    }
}

/// A map of quantities by resource.
pub fn validate_resource_list(list: &Value, path: &str, errors: &mut FieldErrors) {
    for (name, value) in list.as_object().into_iter().flatten() {
        let path = format!("{path}[{name}]");
        resource_name(name, &path, errors);
        if let Some(quantity) = check::quantity(value, &path, errors)
            && name.contains('/')
            && quantity.milli_value() % 1000 != 0
        {
            errors.invalid(&path, &quantity.to_string(), "must be an integer");
        }
    }
}

/// Huge pages come by the page, and beside another resource.
fn huge_pages(limits: &Value, requests: &Value, path: &str, errors: &mut FieldErrors) {
    let (mut huge, mut other) = (false, false);
    for (list, field) in [(limits, "limits"), (requests, "requests")] {
        for (name, amount) in amounts(list) {
            other |= matches!(&*name, "cpu" | "memory");
            let Some(size) = name.strip_prefix("hugepages-") else { continue };
            huge = true;
            let size = Quantity::parse(size).map(Quantity::value).ok().filter(|size| *size > 0);
            if size.is_none_or(|size| amount.value() % size != 0) {
                let why = format!("{amount} is not positive integer multiple of {name}");
                errors.invalid(&at(path, field), &amount.to_string(), &why);
            }
        }
    }
    if huge && !other {
        errors.forbidden(path, "HugePages require cpu or memory");
    }
}

pub fn validate_resources(resources: &Value, path: &str, errors: &mut FieldErrors) {
    validate_resource_list(resources.at("limits"), &at(path, "limits"), errors);
    validate_resource_list(resources.at("requests"), &at(path, "requests"), errors);
    huge_pages(resources.at("limits"), resources.at("requests"), path, errors);
    let limits = amounts(resources.at("limits"));
    for (name, request) in amounts(resources.at("requests")) {
        let whole = name.contains('/') || name.starts_with("hugepages-");
        match limits.get(&name) {
            Some(limit) if whole && request != *limit => {
                let why = format!("must be equal to {name} limit of {limit}");
                errors.invalid(&at(path, "requests"), &request.to_string(), &why);
            }
            Some(limit) if request > *limit => {
                let why = format!("must be less than or equal to {name} limit of {limit}");
                errors.invalid(&at(path, "requests"), &request.to_string(), &why);
            }
            None if whole => {
                errors.required(&at(path, "limits"), "Limit must be set for non overcommitable resources")
            }
            _ => {}
        }
    }
}

fn validate_context(container: &Value, path: &str, errors: &mut FieldErrors) {
    let context = container.at("securityContext");
    let path = at(path, "securityContext");
    validate_ids(context, &path, &["runAsUser", "runAsGroup"], errors);
    validate_seccomp(context, &path, errors);
    check::one_of_if_set(context, &path, "procMount", &["Default", "Unmasked"], errors);
    if context.at("allowPrivilegeEscalation").as_bool() == Some(false) {
        if context.flag("privileged") {
            errors.invalid(
                &path,
                context,
                "cannot set `allowPrivilegeEscalation` to false and `privileged` to true",
            );
        }
        let added = context.at("capabilities").items("add");
        if added.iter().any(|capability| capability == "CAP_SYS_ADMIN") {
            errors.invalid(
                &path,
                context,
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN",
            );
        }
    }
}

fn validate_probe(probe: &Value, kind: &str, path: &str, errors: &mut FieldErrors) {
    validate_handler(probe, &HANDLERS, path, errors);
    let fields =
        ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"];
    check::not_negative(probe, path, &fields, errors);
    if kind != "readinessProbe" && probe.int("successThreshold") != Some(1) {
        errors.invalid(
            &at(path, "successThreshold"),
            probe.int("successThreshold").unwrap_or_default(),
            "must be 1",
        );
    }
    if let Some(seconds) = probe.int("terminationGracePeriodSeconds") {
        let path = at(path, "terminationGracePeriodSeconds");
        if kind == "readinessProbe" {
            errors.invalid(&path, seconds, "must not be set for readinessProbes");
        } else if seconds <= 0 {
            errors.invalid(&path, seconds, "must be greater than 0");
        }
    }
}

fn validate_handler(handler: &Value, kinds: &[&str], path: &str, errors: &mut FieldErrors) {
    let mut given = kinds.iter().filter(|kind| handler.at(kind).is_object());
    let Some(kind) = given.next() else {
        errors.required(path, "must specify a handler type");
        return;
    };
    for extra in given {
        errors.forbidden(&at(path, extra), "may not specify more than 1 handler type");
    }
    let (action, path) = (handler.at(kind), at(path, kind));
    let port = |errors: &mut FieldErrors| match action.at("port") {
        Value::String(name) => check::port_name(name, &at(&path, "port"), errors),
        number => check::port_number(number.as_i64().unwrap_or_default(), &at(&path, "port"), errors),
    };
    match *kind {
        "exec" => check::required(action, &path, "command", errors),
        "httpGet" => {
            check::required(action, &path, "path", errors);
            port(errors);
            check::one_of(action, &path, "scheme", &["HTTP", "HTTPS"], errors);
            for (n, header) in action.items("httpHeaders").iter().enumerate() {
                let name = header.text("name");
                let token = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'_';
                if name.is_empty() || !name.bytes().all(token) {
                    errors.invalid(
                        &format!("{path}.httpHeaders[{n}].name"),
                        name,
                        "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex \
                         used for validation is '[-A-Za-z0-9]+')",
                    );
                }
            }
        }
        "tcpSocket" | "grpc" => port(errors),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::super::pod::POD;
    use super::*;

    #[track_caller]
    fn check(container: Value, want: &str) {
        let mut whole = json!({"name": "c", "image": "nginx"});
        for (field, value) in container.as_object().unwrap() {
            whole.set(field, value.clone());
        }
        let mut pod = json!({"spec": {"containers": [whole], "volumes": [{"name": "v"}, {"name": "c", "configMap": {"name": "c"}}]}});
        (POD.set_defaults)(&mut pod);
        let mut errors = FieldErrors::default();
        (POD.validate)(&pod, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").unwrap();
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"web\" is invalid: spec.containers[0].").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn names_and_images_are_checked() {
        check(json!({}), "");
        check(json!({"name": "My"}), "name: Invalid value: \"My\": a lowercase RFC 1123 label must consist");
        check(json!({"image": ""}), "image: Required value");
        check(
            json!({"image": " nginx"}),
            "image: Invalid value: \" nginx\": must not have leading or trailing whitespace",
        );
        check(
            json!({"imagePullPolicy": "Maybe"}),
            "imagePullPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
        );
    }

    #[test]
    fn ports_and_environment_are_checked() {
        check(json!({"ports": [{"containerPort": 80, "name": "http"}]}), "");
        check(json!({"ports": [{"name": "http"}]}), "ports[0].containerPort: Required value");
        check(
            json!({"ports": [{"containerPort": 70000}]}),
            "ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535, inclusive",
        );
        check(
            json!({"ports": [{"containerPort": 1, "hostPort": 9}, {"containerPort": 2, "hostPort": 9}]}),
            "ports[1].hostPort: Duplicate value: \"TCP//9\"",
        );
        check(json!({"env": [{"name": "A.b-c", "value": "x"}]}), "");
        check(json!({"env": [{"value": "x"}]}), "env[0].name: Required value");
        check(
            json!({"env": [{"name": "a=b"}]}),
            "env[0].name: Invalid value: \"a=b\": a valid environment variable name",
        );
        check(
            json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]}),
            "env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"spec.x\": error converting fieldPath: field label not supported: spec.x",
        );
        check(
            json!({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a/b']"}}}]}),
            "",
        );
        check(
            json!({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}),
            "env[0].valueFrom.secretKeyRef.key: Required value",
        );
    }

    #[track_caller]
    fn check_file_key(change: (&str, &str), want: &str) {
        let mut from = json!({"volumeName": "v", "path": "d/f", "key": "A"});
        from.set(change.0, change.1);
        let want =
            if want.is_empty() { String::new() } else { format!("env[0].valueFrom.fileKeyRef.{want}") };
        check(json!({"env": [{"name": "A", "valueFrom": {"fileKeyRef": from}}]}), &want);
    }

    #[test]
    fn files_of_variables_are_checked() {
        check_file_key(("key", "a.b"), "");
        check_file_key(("key", ""), "key: Required value");
        check_file_key(
            ("key", "a=b"),
            "key: Invalid value: \"a=b\": a valid environment variable name must consist",
        );
        check_file_key(("key", &"k".repeat(129)), "key: Too long: may not be more than 128 bytes");
        check_file_key(("path", "/f"), "path: Invalid value: \"/f\": must be a relative path");
        check_file_key(("path", "a/../f"), "path: Invalid value: \"a/../f\": must not contain '..'");
        check_file_key(("path", "..f"), "path: Invalid value: \"..f\": must not start with '..'");
        check_file_key(("volumeName", "w"), "volumeName: Not found: \"w\"");
        check_file_key(
            ("volumeName", "c"),
            "volumeName: Invalid value: \"c\": referenced volume must be of type emptyDir",
        );
    }

    #[track_caller]
    fn check_mount(more: Value, want: &str) {
        let mut mount = json!({"name": "v", "mountPath": "/v"});
        for (field, value) in more.as_object().unwrap() {
            mount.set(field, value.clone());
        }
        let want = if want.is_empty() { String::new() } else { format!("volumeMounts[0].{want}") };
        check(json!({ "volumeMounts": [mount] }), &want);
    }

    #[test]
    fn mounts_are_read_only_all_through_if_at_all() {
        check_mount(json!({"readOnly": true, "recursiveReadOnly": "Enabled"}), "");
        check_mount(json!({"recursiveReadOnly": "Disabled"}), "");
        let readonly = "recursiveReadOnly: Forbidden: may only be specified when readOnly is true";
        check_mount(json!({"recursiveReadOnly": "IfPossible"}), readonly);
        check_mount(
            json!({"readOnly": true, "recursiveReadOnly": "Enabled", "mountPropagation": "HostToContainer"}),
            "recursiveReadOnly: Forbidden: may only be specified when mountPropagation is None or not specified",
        );
        check_mount(
            json!({"readOnly": true, "recursiveReadOnly": "Yes"}),
            "recursiveReadOnly: Unsupported value: \"Yes\": supported values: \"Disabled\", \"Enabled\", \"IfPossible\"",
        );
        check_mount(
            json!({"mountPropagation": "Bidirectional"}),
            "mountPropagation: Forbidden: Bidirectional mount propagation is available only to privileged",
        );
    }

    #[test]
    fn mounts_and_resources_are_checked() {
        check(json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}), "");
        check(
            json!({"volumeMounts": [{"name": "w", "mountPath": "/v"}]}),
            "volumeMounts[0].name: Not found: \"w\"",
        );
        check(
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/v"}]}),
            "volumeMounts[1].mountPath: Invalid value: \"/v\": must be unique",
        );
        check(
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "../x"}]}),
            "volumeMounts[0].subPath: Invalid value: \"../x\": must not contain '..'",
        );
        check(
            json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}}),
            "resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        );
        check(
            json!({"resources": {"requests": {"memory": "-1"}}}),
            "resources.requests[memory]: Invalid value: \"-1\": must be greater than or equal to 0",
        );
        let pages = |amount: &str| json!({"memory": "1Mi", "hugepages-2Mi": amount});
        check(json!({"resources": {"limits": pages("4Mi")}}), "");
        check(
            json!({"resources": {"limits": pages("3Mi")}}),
            "Pod \"web\" is invalid: [spec.containers[0].resources.limits: Invalid value: \"3Mi\": 3Mi is not positive integer multiple of hugepages-2Mi",
        );
        check(
            json!({"resources": {"limits": {"hugepages-2Mi": "2Mi"}}}),
            "resources: Forbidden: HugePages require cpu or memory",
        );
        check(
            json!({"resources": {"requests": {"gpu": "1"}}}),
            "Pod \"web\" is invalid: [spec.containers[0].resources.requests[gpu]: Invalid value: \"gpu\": must be a standard resource type or fully qualified",
        );
    }

    #[test]
    fn probes_are_checked() {
        check(json!({"readinessProbe": {"httpGet": {"port": 80}}}), "");
        check(json!({"livenessProbe": {}}), "livenessProbe: Required value: must specify a handler type");
        check(
            json!({"livenessProbe": {"exec": {"command": ["a"]}, "httpGet": {"port": 80}}}),
            "livenessProbe.httpGet: Forbidden: may not specify more than 1 handler type",
        );
        check(
            json!({"livenessProbe": {"exec": {"command": ["a"]}, "successThreshold": 2}}),
            "livenessProbe.successThreshold: Invalid value: 2: must be 1",
        );
        check(
            json!({"startupProbe": {"tcpSocket": {"port": "-"}, "periodSeconds": -1}}),
            "Pod \"web\" is invalid: [spec.containers[0].startupProbe.tcpSocket.port: Invalid value: \"-\"",
        );
    }
}
