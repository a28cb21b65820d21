//! The environment of a container: service variables, `envFrom`, `env`, the downward API, and the
//! expansion of `$(NAME)`. Pure; what it refers to was fetched before.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;

use crate::env_files::EnvFiles;
use crate::pod::Pod;
use crate::references::Referenced;
use crate::resources;

/// What the downward API tells of besides the pod's own object.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub host_ip: Option<IpAddr>,
    pub pod_ip: Option<IpAddr>,
    /// What a container without a limit may use, by resource.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// Replaces `$(NAME)` by what `lookup` has; what it has not stays as it is, and `$$` is one dollar sign.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match lookup(name) {
                Some(value) => out.push_str(&value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

fn variable_name(name: &str) -> String {
    name.replace('-', "_").to_ascii_uppercase()
}

/// The variables that tell a container of a service.
fn service_variables(service: &core::Service, out: &mut BTreeMap<String, String>) {
    let Some(spec) = &service.spec else { return };
    let ip = match spec.cluster_ip.as_deref() {
        None | Some("" | "None") => return,
        Some(ip) => ip,
    };
    let prefix = variable_name(service.metadata.name.as_deref().unwrap_or_default());
    out.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    for (at, port) in spec.ports.iter().flatten().enumerate() {
        let number = port.port.to_string();
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let lower = protocol.to_ascii_lowercase();
        let url = format!("{lower}://{host}:{number}");
        if at == 0 {
            out.insert(format!("{prefix}_SERVICE_PORT"), number.clone());
            out.insert(format!("{prefix}_PORT"), url.clone());
        }
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            out.insert(format!("{prefix}_SERVICE_PORT_{}", variable_name(name)), number.clone());
        }
        let link = format!("{prefix}_PORT_{number}_{}", protocol.to_ascii_uppercase());
        out.insert(format!("{link}_PROTO"), lower);
        out.insert(format!("{link}_PORT"), number);
        out.insert(format!("{link}_ADDR"), ip.to_owned());
        out.insert(link, url);
    }
}

/// The value of a field of the pod, as `fieldRef` names it. The error is the message of the failure.
pub fn field(pod: &Pod, path: &str, facts: &Facts) -> Result<String, String> {
    let metadata = &pod.typed().metadata;
    let spec = pod.spec();
    let ip = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    let all = |map: &Option<BTreeMap<String, String>>| {
        let lines = map.iter().flatten().map(|(key, value)| format!("{key}={}", go_quote(value)));
        lines.collect::<Vec<_>>().join("\n")
    };
    let keyed = |prefix: &str| path.strip_prefix(prefix)?.strip_prefix("['")?.strip_suffix("']");
    let one = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
    };
    if let Some(key) = keyed("metadata.labels") {
        return Ok(one(&metadata.labels, key));
    }
    if let Some(key) = keyed("metadata.annotations") {
        return Ok(one(&metadata.annotations, key));
    }
    Ok(match path {
        "metadata.name" => pod.name().to_owned(),
        "metadata.namespace" => pod.namespace().to_owned(),
        "metadata.uid" => pod.uid().to_owned(),
        "metadata.labels" => all(&metadata.labels),
        "metadata.annotations" => all(&metadata.annotations),
        "spec.nodeName" => spec.node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_default(),
        "spec.restartPolicy" => pod.restart_policy().to_owned(),
        "status.hostIP" | "status.hostIPs" => ip(facts.host_ip),
        "status.podIP" | "status.podIPs" => ip(facts.pod_ip),
        _ => return Err(format!("unsupported fieldPath: {path}")),
    })
}

/// A string as Go's `%q` prints it, for the characters that labels and annotations hold.
pub fn go_quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The value of `resourceFieldRef`: in units of the divisor, rounded up.
pub fn resource(
    pod: &Pod,
    container: Option<&core::Container>,
    selector: &core::ResourceFieldSelector,
    facts: &Facts,
) -> Result<String, String> {
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => pod.container(name).map(|(_, c)| c).ok_or(format!("container {name} not found"))?,
        None => container.ok_or("no container is named")?,
    };
    let resources = container.resources.as_ref();
    let amount = match selector.resource.split_once('.') {
        Some(("limits", name)) => {
            resources::limit_of(pod, container, name).or_else(|| facts.allocatable.get(name).copied())
        }
        Some(("requests", name)) => resources::request(resources, name),
        _ => return Err(format!("unsupported container resource : {}", selector.resource)),
    };
    let Some(amount) = amount else { return Ok("0".to_owned()) };
    let divisor = selector.divisor.as_ref().and_then(|q| Quantity::try_from(q).ok());
    let divisor = divisor.filter(|q| !q.is_zero());
    let cpu = selector.resource.ends_with(".cpu");
    let units = |q: Quantity| if cpu { q.milli_value() } else { q.value() };
    let divisor = divisor.map_or(if cpu { 1000 } else { 1 }, units).max(1);
    Ok((units(amount) as u64).div_ceil(divisor as u64).to_string())
}

/// The environment of a container, in no particular order but without doubles.
pub fn build(
    pod: &Pod,
    container: &core::Container,
    services: &[std::sync::Arc<core::Service>],
    referenced: &Referenced,
    files: &EnvFiles,
    facts: &Facts,
) -> Result<Vec<(String, String)>, String> {
    let mut from_services = BTreeMap::new();
    for service in services {
        service_variables(service, &mut from_services);
    }
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if let Some(from) = &source.config_map_ref
            && let Some(map) = referenced.config_map(&from.name, from.optional)?
        {
            let pairs = map.data.iter().flatten();
            env.extend(pairs.map(|(key, value)| (format!("{prefix}{key}"), value.clone())));
        }
        if let Some(from) = &source.secret_ref
            && let Some(secret) = referenced.secret(&from.name, from.optional)?
        {
            let pairs = secret.data.iter().flatten();
            env.extend(pairs.map(|(key, value)| {
                (format!("{prefix}{key}"), String::from_utf8_lossy(&value.0).into_owned())
            }));
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (Some(text), _) if !text.is_empty() => {
                Some(expand(text, |name| env.get(name).or_else(|| from_services.get(name)).cloned()))
            }
            (_, None) => Some(String::new()),
            (_, Some(from)) => from_source(pod, container, from, referenced, files, facts)?,
        };
        if let Some(value) = value {
            env.insert(variable.name.clone(), value);
        }
    }
    for (name, value) in from_services {
        env.entry(name).or_insert(value);
    }
    Ok(env.into_iter().collect())
}

/// `None` when the source is optional and absent.
fn from_source(
    pod: &Pod,
    container: &core::Container,
    from: &core::EnvVarSource,
    referenced: &Referenced,
    files: &EnvFiles,
    facts: &Facts,
) -> Result<Option<String>, String> {
    let namespace = pod.namespace();
    if let Some(selector) = &from.field_ref {
        return field(pod, &selector.field_path, facts).map(Some);
    }
    if let Some(selector) = &from.resource_field_ref {
        return resource(pod, Some(container), selector, facts).map(Some);
    }
    if let Some(selector) = &from.config_map_key_ref {
        let Some(map) = referenced.config_map(&selector.name, selector.optional)? else { return Ok(None) };
        return match map.data.as_ref().and_then(|data| data.get(&selector.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if selector.optional == Some(true) => Ok(None),
            None => {
                Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", selector.key, selector.name))
            }
        };
    }
    if let Some(selector) = &from.secret_key_ref {
        let Some(secret) = referenced.secret(&selector.name, selector.optional)? else { return Ok(None) };
        return match secret.data.as_ref().and_then(|data| data.get(&selector.key)) {
            Some(value) => Ok(Some(String::from_utf8_lossy(&value.0).into_owned())),
            None if selector.optional == Some(true) => Ok(None),
            None => {
                Err(format!("couldn't find key {} in Secret {namespace}/{}", selector.key, selector.name))
            }
        };
    }
    match &from.file_key_ref {
        Some(selector) => files.value(selector),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};
    use std::sync::Arc;

    #[test]
    fn references_expand_once_and_dollars_escape() {
        let lookup = |name: &str| (name == "A").then(|| "x$(A)".to_owned());
        for (text, want) in [
            ("$(A)", "x$(A)"),
            ("a$(A)b", "ax$(A)b"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("$$$(A)", "$x$(A)"),
            ("", ""),
        ] {
            assert_eq!(expand(text, lookup), want, "{text}");
        }
    }

    #[track_caller]
    fn check(container: Value, want: &[(&str, &str)]) {
        let pod = pod(json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}}));
        let service = json!({"metadata": {"name": "my-svc"}, "spec": {"clusterIP": "10.0.0.1",
            "ports": [{"port": 80, "name": "http"}, {"port": 53, "protocol": "UDP", "name": "dns-udp"}]}});
        let services = [Arc::new(serde_json::from_value(service).expect("a service"))];
        let mut referenced = Referenced::default();
        let map = json!({"metadata": {"name": "m"}, "data": {"k": "v", "l": "w"}});
        referenced
            .config_maps
            .insert("m".into(), Ok(Some(Arc::new(serde_json::from_value(map).expect("a map")))));
        let secret = json!({"metadata": {"name": "s"}, "data": {"p": "aHVzaA=="}});
        referenced
            .secrets
            .insert("s".into(), Ok(Some(Arc::new(serde_json::from_value(secret).expect("a secret")))));
        referenced.config_maps.insert("gone".into(), Ok(None));
        let facts = Facts {
            host_ip: "192.0.2.1".parse().ok(),
            pod_ip: "10.1.0.9".parse().ok(),
            allocatable: [("cpu".to_owned(), Quantity::parse("4").expect("a quantity"))].into(),
        };
        let got =
            build(&pod, &pod.spec().containers[0], &services, &referenced, &EnvFiles::default(), &facts);
        let got: BTreeMap<String, String> = match got {
            Ok(env) => env.into_iter().collect(),
            Err(message) => [("error".to_owned(), message)].into(),
        };
        for (name, value) in want {
            assert_eq!(got.get(*name).map(String::as_str), (*value != "-").then_some(*value), "{name}");
        }
    }

    #[test]
    fn services_are_told_of() {
        check(
            json!({"name": "c"}),
            &[
                ("MY_SVC_SERVICE_HOST", "10.0.0.1"),
                ("MY_SVC_SERVICE_PORT", "80"),
                ("MY_SVC_SERVICE_PORT_HTTP", "80"),
                ("MY_SVC_SERVICE_PORT_DNS_UDP", "53"),
                ("MY_SVC_PORT", "tcp://10.0.0.1:80"),
                ("MY_SVC_PORT_80_TCP", "tcp://10.0.0.1:80"),
                ("MY_SVC_PORT_80_TCP_PROTO", "tcp"),
                ("MY_SVC_PORT_53_UDP_PORT", "53"),
                ("MY_SVC_PORT_53_UDP_ADDR", "10.0.0.1"),
            ],
        );
    }

    #[test]
    fn later_sources_win_and_earlier_names_expand() {
        check(
            json!({"name": "c",
                "envFrom": [{"configMapRef": {"name": "m"}}, {"prefix": "S_", "secretRef": {"name": "s"}}],
                "env": [{"name": "k", "value": "own"}, {"name": "E", "value": "$(k)-$(l)-$(MY_SVC_PORT)-$(F)"},
                        {"name": "F", "value": "f"}, {"name": "MY_SVC_PORT", "value": "mine"}]}),
            &[
                ("k", "own"),
                ("l", "w"),
                ("S_p", "hush"),
                ("MY_SVC_PORT", "mine"),
                ("E", "own-w-tcp://10.0.0.1:80-$(F)"),
            ],
        );
    }

    #[test]
    fn the_pod_tells_about_itself() {
        let field =
            |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let amount = |name: &str, what: &str, divisor: &str| json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": what, "divisor": divisor}}});
        check(
            json!({"name": "c", "resources": {"requests": {"cpu": "250m", "memory": "100Mi"}}, "env": [
                field("NAME", "metadata.name"), field("APP", "metadata.labels['app']"),
                field("IP", "status.podIP"), field("HOST", "status.hostIP"), field("NODE", "spec.nodeName"),
                amount("CPU", "requests.cpu", "0"), amount("MILLI", "requests.cpu", "1m"),
                amount("MEM", "requests.memory", "1Mi"), amount("LIMIT", "limits.cpu", "1"),
            ]}),
            &[
                ("NAME", "p"),
                ("APP", "web"),
                ("IP", "10.1.0.9"),
                ("HOST", "192.0.2.1"),
                ("NODE", "n"),
                ("CPU", "1"),
                ("MILLI", "250"),
                ("MEM", "100"),
                ("LIMIT", "4"),
            ],
        );
    }

    #[test]
    fn what_is_missing_is_an_error_unless_optional() {
        let key = |name: &str, key: &str, optional: bool| {
            json!({"name": "c", "env": [{"name": "X", "valueFrom":
                {"configMapKeyRef": {"name": name, "key": key, "optional": optional}}}]})
        };
        check(key("m", "k", false), &[("X", "v")]);
        check(key("m", "none", false), &[("error", "couldn't find key none in ConfigMap ns/m")]);
        check(key("m", "none", true), &[("X", "-"), ("error", "-")]);
        check(key("gone", "k", false), &[("error", "configmap \"gone\" not found")]);
        check(key("gone", "k", true), &[("X", "-"), ("error", "-")]);
    }
}
