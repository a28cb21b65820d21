//! Ingress, NetworkPolicy, EndpointSlice and their kin.
//!
//! Upstream: pkg/apis/networking, pkg/apis/discovery.

use minke_api::{FieldErrors, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::core::endpoint_address;
use super::tree::Tree;
use crate::strategy::Strategy;

pub static INGRESS: Strategy = Strategy {
    prepare_create: |ingress| ingress.set("status", json!({"loadBalancer": {}})),
    validate: validate_ingress,
    warnings: |ingress| {
        match ingress.at("metadata").at("annotations").text("kubernetes.io/ingress.class") {
        "" => Vec::new(),
        _ => vec![
            "annotation \"kubernetes.io/ingress.class\" is deprecated, please use 'spec.ingressClassName' instead".to_owned(),
        ],
    }
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static INGRESS_CLASS: Strategy = Strategy {
    set_defaults: |class| {
        if let Some(parameters) = class.object("spec").sub("parameters") {
            parameters.fill("scope", "Cluster");
        }
    },
    validate: |class, errors| {
        let controller = class.at("spec").text("controller");
        if controller.is_empty() {
            errors.required("spec.controller", "");
        } else if controller.len() > 250 {
            errors.too_long("spec.controller", 250);
        } else if controller.split('/').count() < 2 {
            errors.invalid(
                "spec.controller",
                controller,
                "must be a domain-prefixed path (such as \"acme.io/foo\")",
            );
        }
    },
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "controller", errors)
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static NETWORK_POLICY: Strategy = Strategy {
    set_defaults: |policy| {
        let spec = policy.object("spec");
        spec.object("podSelector");
        for (list, _) in RULES {
            for port in spec.each(list).flat_map(|rule| rule.each("ports")) {
                port.fill("protocol", "TCP");
            }
        }
        if !spec.has("policyTypes") {
            let types = if spec.has("egress") { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
            spec.set("policyTypes", types);
        }
    },
    validate: validate_policy,
    generation: true,
    ..Strategy::PLAIN
};

/// The two lists of rules, and what their peers are called.
const RULES: [(&str, &str); 2] = [("ingress", "from"), ("egress", "to")];

pub static ENDPOINT_SLICE: Strategy = Strategy {
    set_defaults: |slice| {
        for port in slice.each("ports") {
            if port.at("name").is_null() {
                port.set("name", "");
            }
            port.fill("protocol", "TCP");
        }
    },
    validate: validate_slice,
    validate_update: |new, old, errors| {
        if new.text("addressType") != old.text("addressType") {
            errors.invalid("addressType", new.text("addressType"), check::IMMUTABLE);
        }
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static IP_ADDRESS: Strategy = Strategy {
    validate: |address, errors| {
        let parent = address.at("spec").at("parentRef");
        if !parent.is_object() {
            errors.required("spec.parentRef", "");
        } else {
            check::required(parent, "spec.parentRef", "resource", errors);
            check::required(parent, "spec.parentRef", "name", errors);
        }
    },
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "parentRef", errors)
    },
    name: |name| match name.parse::<std::net::IpAddr>() {
        Ok(address) if address.to_string() == name => Ok(()),
        Ok(_) => Err("must be in canonical form".to_owned()),
        Err(_) => Err("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()),
    },
    generation: true,
    ..Strategy::PLAIN
};

pub static SERVICE_CIDR: Strategy = Strategy {
    validate: |range, errors| {
        let cidrs = range.at("spec").items("cidrs");
        if cidrs.is_empty() {
            errors.required("spec.cidrs", "at least one CIDR required");
        }
        if cidrs.len() > 2 {
            errors.invalid("spec.cidrs", range.at("spec").at("cidrs"), "may only hold up to 2 values");
        }
        for (n, cidr) in cidrs.iter().filter_map(Value::as_str).enumerate() {
            if cidr.parse::<ipnet::IpNet>().is_err() {
                errors.invalid(
                    &format!("spec.cidrs[{n}]"),
                    cidr,
                    "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                );
            }
        }
    },
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "cidrs", errors)
    },
    unconditional_update: false,
    ..Strategy::PLAIN
};

fn validate_ingress(ingress: &Value, errors: &mut FieldErrors) {
    let spec = ingress.at("spec");
    if !spec.has("rules") && !spec.at("defaultBackend").is_object() {
        errors.invalid("spec", spec, "either `defaultBackend` or `rules` must be specified");
    }
    if spec.at("defaultBackend").is_object() {
        validate_backend(spec.at("defaultBackend"), "spec.defaultBackend", errors);
    }
    if spec.has("ingressClassName") {
        check::name(spec.text("ingressClassName"), "spec.ingressClassName", names::dns_subdomain, errors);
    }
    for (n, rule) in spec.items("rules").iter().enumerate() {
        let path = format!("spec.rules[{n}]");
        validate_host(rule.text("host"), &at(&path, "host"), errors);
        let http = rule.at("http");
        if http.is_object() && http.items("paths").is_empty() {
            errors.required(&at(&path, "http.paths"), "");
        }
        for (m, item) in http.items("paths").iter().enumerate() {
            let path = format!("{path}.http.paths[{m}]");
            validate_http_path(item, &path, errors);
        }
    }
    for (n, tls) in spec.items("tls").iter().enumerate() {
        for (m, host) in tls.items("hosts").iter().filter_map(Value::as_str).enumerate() {
            validate_host(host, &format!("spec.tls[{n}].hosts[{m}]"), errors);
        }
        if tls.has("secretName") {
            check::name(
                tls.text("secretName"),
                &format!("spec.tls[{n}].secretName"),
                names::dns_subdomain,
                errors,
            );
        }
    }
}

/// A host name, whose first label may be `*`; empty means any.
fn validate_host(host: &str, path: &str, errors: &mut FieldErrors) {
    if host.is_empty() {
        return;
    }
    if host.parse::<std::net::IpAddr>().is_ok() {
        errors.invalid(path, host, "must be a DNS name, not an IP address");
    } else if host.contains('*') {
        let rest = host.strip_prefix("*.").unwrap_or_default();
        if names::dns_subdomain(rest).is_err() {
            errors.invalid(
                path,
                host,
                "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must \
                 consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. \
                 '*.example.com', regex used for validation is \
                 '\\*\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
            );
        }
    } else {
        check::name(host, path, names::dns_subdomain, errors);
    }
}

fn validate_http_path(item: &Value, path: &str, errors: &mut FieldErrors) {
    const TYPES: [&str; 3] = ["Exact", "ImplementationSpecific", "Prefix"];
    let target = item.text("path");
    match item.text("pathType") {
        "" => errors.required(&at(path, "pathType"), "pathType must be specified"),
        kind if !TYPES.contains(&kind) => errors.not_supported(&at(path, "pathType"), kind, &TYPES),
        kind => {
            if kind != "ImplementationSpecific" || !target.is_empty() {
                if !target.starts_with('/') {
                    errors.invalid(&at(path, "path"), target, "must be an absolute path");
                }
                if kind != "ImplementationSpecific" {
                    for part in ["//", "/./", "/../", "%2f", "%2F"] {
                        if target.contains(part) {
                            errors.invalid(&at(path, "path"), target, &format!("must not contain '{part}'"));
                        }
                    }
                }
            }
        }
    }
    validate_backend(item.at("backend"), &at(path, "backend"), errors);
}

fn validate_backend(backend: &Value, path: &str, errors: &mut FieldErrors) {
    let (service, resource) = (backend.at("service"), backend.at("resource"));
    match (service.is_object(), resource.is_object()) {
        (true, true) => errors.invalid(path, "", "cannot set both resource and service backends"),
        (false, false) => errors.required(path, "must specify a resource or service backend"),
        (false, true) => {}
        (true, false) => {
            match service.text("name") {
                "" => errors.required(&at(path, "service.name"), ""),
                name => check::name(name, &at(path, "service.name"), names::dns_1035_label, errors),
            }
            let port = service.at("port");
            match (port.text("name"), port.int("number").unwrap_or_default()) {
                ("", 0) => errors.required(path, "port name or number is required"),
                ("", number) => check::port_number(number, &at(path, "service.port.number"), errors),
                (name, 0) => check::port_name(name, &at(path, "service.port.name"), errors),
                _ => errors.invalid(path, "", "cannot set both port name & port number"),
            }
        }
    }
}

fn validate_policy(policy: &Value, errors: &mut FieldErrors) {
    let spec = policy.at("spec");
    check::selector(spec.at("podSelector"), "spec.podSelector", errors);
    for (list, peers) in RULES {
        for (n, rule) in spec.items(list).iter().enumerate() {
            let path = format!("spec.{list}[{n}]");
            for (m, port) in rule.items("ports").iter().enumerate() {
                validate_policy_port(port, &format!("{path}.ports[{m}]"), errors);
            }
            for (m, peer) in rule.items(peers).iter().enumerate() {
                validate_peer(peer, &format!("{path}.{peers}[{m}]"), errors);
            }
        }
    }
    let types = spec.items("policyTypes");
    if types.len() > 2 {
        errors.invalid(
            "spec.policyTypes",
            spec.at("policyTypes"),
            "may not specify more than two policyTypes",
        );
    }
    for (n, kind) in types.iter().filter_map(Value::as_str).enumerate() {
        if !["Egress", "Ingress"].contains(&kind) {
            errors.not_supported(&format!("spec.policyTypes[{n}]"), kind, &["Egress", "Ingress"]);
        }
    }
}

fn validate_policy_port(port: &Value, path: &str, errors: &mut FieldErrors) {
    check::one_of_if_set(port, path, "protocol", &["SCTP", "TCP", "UDP"], errors);
    match port.at("port") {
        Value::Null => {
            if port.has("endPort") {
                errors.required(&at(path, "port"), "must be specified when `endPort` is specified");
            }
        }
        Value::String(name) => check::port_name(name, &at(path, "port"), errors),
        number => {
            let number = number.as_i64().unwrap_or_default();
            check::port_number(number, &at(path, "port"), errors);
            if let Some(end) = port.int("endPort").filter(|end| *end < number) {
                errors.invalid(&at(path, "endPort"), end, "must be greater than or equal to `port`");
            }
        }
    }
}

fn validate_peer(peer: &Value, path: &str, errors: &mut FieldErrors) {
    let mut kinds = 0;
    for field in ["podSelector", "namespaceSelector"] {
        if peer.at(field).is_object() {
            kinds += 1;
            check::selector(peer.at(field), &at(path, field), errors);
        }
    }
    if peer.at("ipBlock").is_object() {
        let (block, path) = (peer.at("ipBlock"), at(path, "ipBlock"));
        if kinds > 0 {
            errors.forbidden(&path, "may not specify both ipBlock and another peer");
        }
        kinds += 1;
        let range = block.text("cidr").parse::<ipnet::IpNet>();
        match (&range, block.text("cidr")) {
            (_, "") => errors.required(&at(&path, "cidr"), ""),
            (Err(_), text) => errors.invalid(
                &at(&path, "cidr"),
                text,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ),
            (Ok(_), _) => {}
        }
        for (n, except) in block.items("except").iter().filter_map(Value::as_str).enumerate() {
            let path = format!("{path}.except[{n}]");
            match (except.parse::<ipnet::IpNet>(), &range) {
                (Err(_), _) => {
                    errors.invalid(
                        &path,
                        except,
                        "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
                    );
                }
                (Ok(inner), Ok(outer)) if !outer.contains(&inner) || *outer == inner => {
                    errors.invalid(&path, except, &format!("must be a strict subset of `cidr`: {outer:?}"));
                }
                _ => {}
            }
        }
    }
    if kinds == 0 {
        errors.required(path, "must specify a peer");
    }
}

fn validate_slice(slice: &Value, errors: &mut FieldErrors) {
    const TYPES: [&str; 3] = ["IPv4", "IPv6", "FQDN"];
    const MAX_ENDPOINTS: usize = 1000;
    const MAX_PORTS: usize = 20_000;
    let kind = slice.text("addressType");
    match kind {
        "" => errors.required("addressType", ""),
        _ if !TYPES.contains(&kind) => errors.not_supported("addressType", kind, &TYPES),
        _ => {}
    }
    let endpoints = slice.items("endpoints");
    if endpoints.len() > MAX_ENDPOINTS {
        errors.too_many("endpoints", endpoints.len(), MAX_ENDPOINTS);
        return;
    }
    for (n, endpoint) in endpoints.iter().enumerate() {
        let path = format!("endpoints[{n}]");
        let addresses = endpoint.items("addresses");
        if addresses.is_empty() {
            errors.required(&at(&path, "addresses"), "must contain at least 1 address");
        } else if addresses.len() > 100 {
            errors.too_many(&at(&path, "addresses"), addresses.len(), 100);
        }
        for (m, address) in addresses.iter().filter_map(Value::as_str).enumerate() {
            let path = format!("{path}.addresses[{m}]");
            match kind {
                "IPv4" if address.parse::<std::net::Ipv4Addr>().is_err() => {
                    errors.invalid(&path, address, "must be a valid IPv4 address");
                }
                "IPv6" if address.parse::<std::net::Ipv6Addr>().is_err() => {
                    errors.invalid(&path, address, "must be a valid IPv6 address");
                }
                "IPv4" | "IPv6" => endpoint_address(address, &path, errors),
                "FQDN" => check::name(address, &path, names::dns_subdomain, errors),
                _ => {}
            }
        }
        if endpoint.has("hostname") {
            check::name(endpoint.text("hostname"), &at(&path, "hostname"), names::dns_label, errors);
        }
    }
    let ports = slice.items("ports");
    if ports.len() > MAX_PORTS {
        errors.too_many("ports", ports.len(), MAX_PORTS);
        return;
    }
    for (n, port) in ports.iter().enumerate() {
        let path = format!("ports[{n}]");
        let name = port.text("name");
        if !name.is_empty() {
            check::name(name, &at(&path, "name"), names::dns_label, errors);
        }
        if ports[..n].iter().any(|other| other.text("name") == name) {
            errors.duplicate(&at(&path, "name"), name);
        }
        check::one_of(port, &path, "protocol", &["SCTP", "TCP", "UDP"], errors);
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    #[track_caller]
    fn check(strategy: &Strategy, kind: (&str, &str), mut object: Value, want: &str) {
        (strategy.set_defaults)(&mut object);
        let mut errors = FieldErrors::default();
        (strategy.validate)(&object, &mut errors);
        let kind = Kind::by_kind(kind.0, "v1", kind.1).unwrap();
        let message = errors.into_result(kind, "x").err().map(|s| s.message).unwrap_or_default();
        let prefix = format!("{} \"x\" is invalid: ", kind.qualified_kind());
        assert_eq!(message.strip_prefix(&prefix).unwrap_or(&message), want);
    }

    #[test]
    fn ingresses_are_checked() {
        let check = |spec: Value, want| {
            check(&INGRESS, ("networking.k8s.io", "Ingress"), json!({"spec": spec}), want)
        };
        let backend = json!({"service": {"name": "web", "port": {"number": 80}}});
        check(json!({"defaultBackend": backend}), "");
        check(json!({}), "spec: Invalid value: {}: either `defaultBackend` or `rules` must be specified");
        let rule = |path: Value| json!({"rules": [{"host": "a.example.com", "http": {"paths": [path]}}]});
        check(rule(json!({"path": "/", "pathType": "Prefix", "backend": backend})), "");
        check(
            rule(json!({"path": "/", "backend": backend})),
            "spec.rules[0].http.paths[0].pathType: Required value: pathType must be specified",
        );
        check(
            rule(json!({"path": "x", "pathType": "Exact", "backend": backend})),
            "spec.rules[0].http.paths[0].path: Invalid value: \"x\": must be an absolute path",
        );
    }

    #[test]
    fn policies_say_which_way_they_hold() {
        let mut policy = json!({"spec": {"egress": [{}]}});
        (NETWORK_POLICY.set_defaults)(&mut policy);
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        check(
            &NETWORK_POLICY,
            ("networking.k8s.io", "NetworkPolicy"),
            json!({"spec": {"ingress": [{"from": [{}]}]}}),
            "spec.ingress[0].from[0]: Required value: must specify a peer",
        );
    }

    #[test]
    fn slices_are_checked() {
        let check = |slice, want| check(&ENDPOINT_SLICE, ("discovery.k8s.io", "EndpointSlice"), slice, want);
        check(
            json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}]}),
            "",
        );
        check(
            json!({"addressType": "IPv4", "endpoints": [{"addresses": ["x"]}]}),
            "endpoints[0].addresses[0]: Invalid value: \"x\": must be a valid IPv4 address",
        );
        check(json!({"endpoints": []}), "addressType: Required value");
    }
}
