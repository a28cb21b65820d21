//! The Service strategy. Addresses and node ports are given out in [`crate::allocate`].
//!
//! Upstream: pkg/registry/core/service and ValidateService.

use std::collections::HashSet;
use std::net::IpAddr;

use minke_api::{FieldErrors, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::tree::Tree;
use crate::strategy::Strategy;
use crate::validation::label_map;

pub static SERVICE: Strategy = Strategy {
    set_defaults,
    prepare_create: |service| service.set("status", json!({"loadBalancer": {}})),
    prepare_update,
    validate,
    validate_update,
    name: names::dns_1035_label,
    warnings,
    create_on_update: true,
    returns_deleted: true,
    ..Strategy::PLAIN
};

fn set_defaults(service: &mut Value) {
    let spec = service.object("spec");
    spec.fill("sessionAffinity", "None");
    match spec.text("sessionAffinity") {
        "None" => _ = spec.unset("sessionAffinityConfig"),
        "ClientIP" => {
            let config = spec.object("sessionAffinityConfig").object("clientIP");
            config.fill("timeoutSeconds", 10_800);
        }
        _ => {}
    }
    spec.fill("type", "ClusterIP");
    for port in spec.each("ports") {
        port.fill("protocol", "TCP");
        let unset = match port.at("targetPort") {
            Value::Null => true,
            Value::String(name) => name.is_empty(),
            number => number.as_i64() == Some(0),
        };
        if unset {
            let number = port.at("port").clone();
            port.set("targetPort", number);
        }
    }
    let kind = spec.text("type").to_owned();
    if is_external(spec) {
        spec.fill("externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "ClusterIP" | "NodePort" | "LoadBalancer") {
        spec.fill("internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        spec.fill("allocateLoadBalancerNodePorts", true);
        let ingress = service.sub("status").and_then(|status| status.sub("loadBalancer"));
        for ingress in ingress.into_iter().flat_map(|balancer| balancer.each("ingress")) {
            if ingress.has("ip") {
                ingress.fill("ipMode", "VIP");
            }
        }
    }
}

/// Whether the Service is reached from outside the cluster.
fn is_external(spec: &Value) -> bool {
    match spec.text("type") {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => spec.has("externalIPs"),
        _ => false,
    }
}

fn needs_address(spec: &Value) -> bool {
    matches!(spec.text("type"), "ClusterIP" | "NodePort" | "LoadBalancer")
}

fn needs_node_ports(spec: &Value) -> bool {
    match spec.text("type") {
        "NodePort" => true,
        "LoadBalancer" => spec.at("allocateLoadBalancerNodePorts").as_bool() != Some(false),
        _ => false,
    }
}

fn needs_health_port(spec: &Value) -> bool {
    spec.text("type") == "LoadBalancer" && spec.text("externalTrafficPolicy") == "Local"
}

/// Keeps what the server gave out and the user did not repeat; drops what goes with the old type.
fn prepare_update(new: &mut Value, old: &Value) {
    let before = old.at("spec");
    let spec = new.object("spec");
    // One of the two fields may have been changed, the other is then made to follow.
    if spec.text("clusterIP") != before.text("clusterIP")
        && spec.get("clusterIPs") == before.get("clusterIPs")
    {
        match spec.text("clusterIP") {
            "" => _ = spec.unset("clusterIPs"),
            address => {
                let address = address.to_owned();
                spec.set("clusterIPs", json!([address]));
            }
        }
    }
    if needs_address(before) && needs_address(spec) && !spec.has("clusterIP") && !spec.has("clusterIPs") {
        for field in ["clusterIP", "clusterIPs"] {
            if let Some(value) = before.get(field) {
                spec.set(field, value.clone());
            }
        }
    }
    for field in ["ipFamilies", "ipFamilyPolicy"] {
        if needs_address(before) && needs_address(spec) && !spec.has(field) && before.has(field) {
            spec.set(field, before.at(field).clone());
        }
    }
    if needs_node_ports(before) && needs_node_ports(spec) {
        let known: Vec<Value> = before.items("ports").to_vec();
        let taken: HashSet<i64> = spec.items("ports").iter().filter_map(|p| p.int("nodePort")).collect();
        for port in spec.each("ports").filter(|port| port.int("nodePort").is_none_or(|n| n == 0)) {
            let twin = known
                .iter()
                .find(|k| k.int("port") == port.int("port") && k.text("protocol") == port.text("protocol"));
            if let Some(number) = twin.and_then(|twin| twin.int("nodePort")).filter(|n| !taken.contains(n)) {
                port.set("nodePort", number);
            }
        }
    }
    if needs_health_port(before)
        && needs_health_port(spec)
        && spec.int("healthCheckNodePort").is_none_or(|n| n == 0)
    {
        spec.set("healthCheckNodePort", before.at("healthCheckNodePort").clone());
    }
    drop_what_went_with_the_type(spec, before);
}

fn drop_what_went_with_the_type(spec: &mut Value, before: &Value) {
    let unchanged = |spec: &Value, field: &str| spec.get(field) == before.get(field);
    if needs_address(before) && !needs_address(spec) {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if unchanged(spec, field) {
                spec.unset(field);
            }
        }
    }
    if needs_node_ports(before) && !needs_node_ports(spec) {
        let same = spec
            .items("ports")
            .iter()
            .zip(before.items("ports"))
            .all(|(a, b)| a.get("nodePort") == b.get("nodePort"))
            || spec.items("ports").len() != before.items("ports").len();
        if same {
            spec.each("ports").for_each(|port| _ = port.unset("nodePort"));
        }
    }
    if needs_health_port(before) && !needs_health_port(spec) && unchanged(spec, "healthCheckNodePort") {
        spec.unset("healthCheckNodePort");
    }
    if before.text("type") == "LoadBalancer" && spec.text("type") != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if unchanged(spec, field) {
                spec.unset(field);
            }
        }
    }
    if is_external(before) && !is_external(spec) && unchanged(spec, "externalTrafficPolicy") {
        spec.unset("externalTrafficPolicy");
    }
    if spec.text("type") == "ExternalName" {
        spec.unset("internalTrafficPolicy");
    }
}

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];

fn validate(service: &Value, errors: &mut FieldErrors) {
    let spec = service.at("spec");
    let kind = spec.text("type");
    let headless = spec.text("clusterIP") == "None";
    if !spec.has("ports") && !headless && kind != "ExternalName" {
        errors.required("spec.ports", "");
    }
    match kind {
        "LoadBalancer" | "NodePort" if headless => {
            let why = format!("may not be set to 'None' for {kind} services");
            errors.invalid("spec.clusterIPs[0]", "None", &why);
        }
        "ExternalName" => {
            if spec.has("clusterIPs") || spec.has("clusterIP") {
                errors.forbidden("spec.clusterIPs", "may not be set for ExternalName services");
            }
            match spec.text("externalName").trim_end_matches('.') {
                "" => errors.required("spec.externalName", ""),
                name => check::name(name, "spec.externalName", names::dns_subdomain, errors),
            }
        }
        _ if !TYPES.contains(&kind) => errors.not_supported("spec.type", kind, &TYPES),
        _ => {}
    }
    if kind == "LoadBalancer" {
        for (n, port) in spec.items("ports").iter().enumerate() {
            if port.int("port") == Some(10250) {
                errors.invalid(
                    &format!("spec.ports[{n}].port"),
                    10250,
                    "may not expose port 10250 externally since it is used by kubelet",
                );
            }
        }
    }
    validate_ports(spec, errors);
    label_map(spec.at("selector"), "spec.selector", errors);
    validate_affinity(spec, errors);
    validate_addresses(spec, errors);
    validate_policies(spec, errors);
}

fn validate_ports(spec: &Value, errors: &mut FieldErrors) {
    let ports = spec.items("ports");
    let (mut names_seen, mut node_ports, mut pairs) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (n, port) in ports.iter().enumerate() {
        let path = format!("spec.ports[{n}]");
        match port.text("name") {
            "" if ports.len() > 1 => errors.required(&at(&path, "name"), ""),
            "" => {}
            name => {
                check::name(name, &at(&path, "name"), names::dns_label, errors);
                if !names_seen.insert(name) {
                    errors.duplicate(&at(&path, "name"), name);
                }
            }
        }
        check::port_number(port.int("port").unwrap_or_default(), &at(&path, "port"), errors);
        check::one_of(port, &path, "protocol", &["SCTP", "TCP", "UDP"], errors);
        match port.at("targetPort") {
            Value::String(name) => check::port_name(name, &at(&path, "targetPort"), errors),
            number => {
                check::port_number(number.as_i64().unwrap_or_default(), &at(&path, "targetPort"), errors)
            }
        }
        if let Some(protocol) = port.get("appProtocol").and_then(Value::as_str) {
            check::name(protocol, &at(&path, "appProtocol"), names::qualified_name, errors);
        }
        let node_port = port.int("nodePort").unwrap_or_default();
        if node_port != 0 {
            if spec.text("type") == "ClusterIP" {
                errors.forbidden(&at(&path, "nodePort"), "may not be used when `type` is 'ClusterIP'");
            } else if spec.text("type") == "ExternalName" {
                errors.forbidden(&at(&path, "nodePort"), "may not be used when `type` is 'ExternalName'");
            }
            if !node_ports.insert((port.text("protocol"), node_port)) {
                errors.duplicate(&at(&path, "nodePort"), node_port);
            }
        }
        if !pairs.insert((port.text("protocol"), port.int("port"))) {
            // Upstream shows the internal form of the two fields that clash.
            let shown = json!({"Name": "", "Protocol": port.text("protocol"), "AppProtocol": null,
                "Port": port.int("port"), "TargetPort": 0, "NodePort": 0});
            errors.duplicate(&path, &shown);
        }
    }
}

fn validate_affinity(spec: &Value, errors: &mut FieldErrors) {
    check::one_of(spec, "spec", "sessionAffinity", &["ClientIP", "None"], errors);
    let timeout = spec.at("sessionAffinityConfig").at("clientIP").int("timeoutSeconds");
    match spec.text("sessionAffinity") {
        "ClientIP" => {
            if let Some(seconds) = timeout.filter(|s| !(1..=86_400).contains(s)) {
                errors.invalid(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    seconds,
                    "must be greater than 0 and less than or equal to 86400",
                );
            }
        }
        "None" if spec.has("sessionAffinityConfig") => {
            errors.forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None");
        }
        _ => {}
    }
}

fn validate_addresses(spec: &Value, errors: &mut FieldErrors) {
    const NOT_AN_ADDRESS: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
    if spec.text("type") != "ExternalName" {
        let listed = spec.items("clusterIPs");
        if let Some(first) = listed.first().and_then(Value::as_str)
            && first != spec.text("clusterIP")
        {
            errors.invalid("spec.clusterIPs", spec.at("clusterIPs"), "first value must match `clusterIP`");
        }
        for (n, address) in listed.iter().filter_map(Value::as_str).enumerate() {
            if address == "None" && listed.len() > 1 {
                errors.invalid(
                    "spec.clusterIPs",
                    spec.at("clusterIPs"),
                    "'None' must be the first and only value",
                );
            } else if address != "None" && address.parse::<IpAddr>().is_err() {
                errors.invalid(&format!("spec.clusterIPs[{n}]"), address, NOT_AN_ADDRESS);
            }
        }
        if listed.len() > 2 {
            errors.invalid("spec.clusterIPs", spec.at("clusterIPs"), "may only hold up to 2 values");
        }
    }
    for (n, address) in spec.items("externalIPs").iter().filter_map(Value::as_str).enumerate() {
        let path = format!("spec.externalIPs[{n}]");
        match address.parse::<IpAddr>() {
            Err(_) => errors.invalid(&path, address, NOT_AN_ADDRESS),
            Ok(ip) if ip.is_unspecified() => {
                errors.invalid(&path, address, "may not be unspecified (0.0.0.0 or ::)")
            }
            Ok(ip) if ip.is_loopback() => {
                errors.invalid(&path, address, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
            }
            Ok(IpAddr::V4(ip)) if ip.is_link_local() => {
                errors.invalid(
                    &path,
                    address,
                    "may not be in the link-local range (169.254.0.0/16, fe80::/10)",
                );
            }
            Ok(ip) if ip.is_multicast() => {
                errors.invalid(
                    &path,
                    address,
                    "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)",
                );
            }
            Ok(_) => {}
        }
    }
    for (n, range) in spec.items("loadBalancerSourceRanges").iter().filter_map(Value::as_str).enumerate() {
        if range.trim().parse::<ipnet::IpNet>().is_err() {
            errors.invalid(
                &format!("spec.loadBalancerSourceRanges[{n}]"),
                range,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            );
        }
    }
}

fn validate_policies(spec: &Value, errors: &mut FieldErrors) {
    const POLICIES: [&str; 2] = ["Cluster", "Local"];
    let kind = spec.text("type");
    if kind != "LoadBalancer" {
        for field in ["loadBalancerSourceRanges", "loadBalancerClass", "allocateLoadBalancerNodePorts"] {
            if spec.has(field) {
                errors.forbidden(&at("spec", field), "may only be used when `type` is 'LoadBalancer'");
            }
        }
    } else if spec.get("allocateLoadBalancerNodePorts").is_none() {
        errors.required("spec.allocateLoadBalancerNodePorts", "");
    }
    match (is_external(spec), spec.text("externalTrafficPolicy")) {
        (false, "") => {}
        (false, policy) => errors.invalid(
            "spec.externalTrafficPolicy",
            policy,
            "may only be set for externally-accessible services",
        ),
        (true, "") => errors.required("spec.externalTrafficPolicy", ""),
        (true, policy) if !POLICIES.contains(&policy) => {
            errors.not_supported("spec.externalTrafficPolicy", policy, &POLICIES);
        }
        (true, _) => {}
    }
    let internal = spec.text("internalTrafficPolicy");
    if !internal.is_empty() && !POLICIES.contains(&internal) {
        errors.not_supported("spec.internalTrafficPolicy", internal, &POLICIES);
    }
    if let Some(port) = spec.int("healthCheckNodePort").filter(|p| *p != 0) {
        if !needs_health_port(spec) {
            errors.invalid(
                "spec.healthCheckNodePort",
                port,
                "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
            );
        }
        check::port_number(port, "spec.healthCheckNodePort", errors);
    }
}

fn validate_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let (spec, before) = (new.at("spec"), old.at("spec"));
    if needs_address(spec) && needs_address(before) && before.has("clusterIP") {
        if spec.text("clusterIP") != before.text("clusterIP") {
            errors.invalid("spec.clusterIPs[0]", spec.at("clusterIPs"), "may not change once set");
        }
        let (now, then) = (spec.items("ipFamilies").first(), before.items("ipFamilies").first());
        if then.is_some() && now != then {
            errors.invalid("spec.ipFamilies[0]", spec.at("ipFamilies"), "may not change once set");
        }
    }
    if spec.text("type") == "LoadBalancer"
        && before.text("type") == "LoadBalancer"
        && spec.text("loadBalancerClass") != before.text("loadBalancerClass")
    {
        errors.invalid("spec.loadBalancerClass", spec.text("loadBalancerClass"), "may not change once set");
    }
}

fn warnings(service: &Value) -> Vec<String> {
    let spec = service.at("spec");
    let (kind, headless) = (spec.text("type"), spec.text("clusterIP") == "None");
    let external = kind == "ExternalName";
    let oddities = [
        (headless && spec.has("loadBalancerIP"), "spec.loadBalancerIP is ignored for headless services"),
        (headless && spec.has("externalIPs"), "spec.externalIPs is ignored for headless services"),
        (
            headless && spec.text("sessionAffinity") == "ClientIP",
            "spec.SessionAffinity is ignored for headless services",
        ),
        (
            !headless && !external && spec.has("externalIPs"),
            "spec.externalIPs is deprecated and may no longer be implemented in some clusters",
        ),
        (
            external && spec.has("externalIPs"),
            "spec.externalIPs is ignored when spec.type is \"ExternalName\"",
        ),
        (
            !external && spec.has("externalName"),
            "spec.externalName is ignored when spec.type is not \"ExternalName\"",
        ),
        (
            spec.text("trafficDistribution") == "PreferClose",
            "spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"",
        ),
    ];
    oddities.iter().filter(|(applies, _)| *applies).map(|(_, text)| (*text).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    fn defaulted(spec: Value) -> Value {
        let mut service = json!({"metadata": {"name": "web"}, "spec": spec});
        set_defaults(&mut service);
        service
    }

    #[track_caller]
    fn check(spec: Value, want: &str) {
        let mut errors = FieldErrors::default();
        validate(&defaulted(spec), &mut errors);
        compare(errors, want);
    }

    #[track_caller]
    fn compare(errors: FieldErrors, want: &str) {
        let kind = Kind::by_plural("", "v1", "services").unwrap();
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        assert_eq!(message.strip_prefix("Service \"web\" is invalid: ").unwrap_or(&message), want);
    }

    #[test]
    fn services_are_checked() {
        check(json!({"ports": [{"port": 80}]}), "");
        check(json!({}), "spec.ports: Required value");
        check(json!({"clusterIP": "None"}), "");
        check(
            json!({"ports": [{"port": 0}]}),
            "[spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive, spec.ports[0].targetPort: Invalid value: 0: must be between 1 and 65535, inclusive]",
        );
        check(
            json!({"ports": [{"port": 80}, {"port": 81, "name": "b"}]}),
            "spec.ports[0].name: Required value",
        );
        check(
            json!({"ports": [{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]}),
            "spec.ports[1].name: Duplicate value: \"a\"",
        );
        check(
            json!({"ports": [{"port": 80, "nodePort": 30000}]}),
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
        );
        check(
            json!({"type": "Nodeport", "ports": [{"port": 80}]}),
            "spec.type: Unsupported value: \"Nodeport\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
        );
        check(json!({"type": "ExternalName"}), "spec.externalName: Required value");
        check(json!({"type": "ExternalName", "externalName": "example.com."}), "");
        check(
            json!({"ports": [{"port": 80}], "externalTrafficPolicy": "Local"}),
            "spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services",
        );
        check(
            json!({"ports": [{"port": 80}], "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 90000}}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 90000: must be greater than 0 and less than or equal to 86400",
        );
    }

    fn stored(spec: Value) -> Value {
        let mut service = defaulted(spec);
        service["spec"].set("clusterIP", "10.96.0.5");
        service["spec"].set("clusterIPs", json!(["10.96.0.5"]));
        service
    }

    #[test]
    fn an_update_keeps_what_was_given_out() {
        let old = stored(json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30001}]}));
        let mut new = defaulted(json!({"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}));
        prepare_update(&mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], "10.96.0.5");
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30001);
        assert!(new["spec"]["ports"][1].get("nodePort").is_none());
    }

    #[test]
    fn a_change_of_type_drops_what_went_with_it() {
        let old = stored(json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30001}]}));
        let mut new = old.clone();
        new["spec"]["type"] = "ClusterIP".into();
        prepare_update(&mut new, &old);
        assert!(new["spec"]["ports"][0].get("nodePort").is_none());
        assert!(new["spec"].get("externalTrafficPolicy").is_none());
        let mut errors = FieldErrors::default();
        validate(&new, &mut errors);
        compare(errors, "");
        new["spec"]["type"] = "ExternalName".into();
        prepare_update(&mut new, &old);
        assert!(new["spec"].get("clusterIP").is_none());
    }

    #[test]
    fn the_cluster_ip_stays() {
        let old = stored(json!({"ports": [{"port": 80}]}));
        let mut new = old.clone();
        new["spec"]["clusterIP"] = "10.96.0.6".into();
        prepare_update(&mut new, &old);
        let mut errors = FieldErrors::default();
        validate_update(&new, &old, &mut errors);
        compare(errors, "spec.clusterIPs[0]: Invalid value: [\"10.96.0.6\"]: may not change once set");
    }
}
