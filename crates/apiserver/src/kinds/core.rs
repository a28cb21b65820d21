//! Strategies of the smaller kinds of core/v1.
//!
//! Upstream: pkg/apis/core and pkg/registry/core.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use minke_api::{FieldErrors, Quantity, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::pod_spec::round_quantities;
use super::resources::amounts;
use super::tree::Tree;
use crate::strategy::Strategy;

/// Data of a Secret or ConfigMap together, in bytes.
const MAX_DATA_BYTES: usize = 1024 * 1024;
const NAMESPACE_LABEL: &str = "kubernetes.io/metadata.name";

pub static NAMESPACE: Strategy = Strategy {
    set_defaults: |namespace| {
        let name = namespace.at("metadata").text("name").to_owned();
        if !name.is_empty() {
            namespace.object("metadata").object("labels").set(NAMESPACE_LABEL, name);
        }
        namespace.object("status").fill("phase", "Active");
    },
    prepare_create: |namespace| {
        namespace.set("status", json!({"phase": "Active"}));
        let spec = namespace.object("spec");
        if !spec.items("finalizers").iter().any(|finalizer| finalizer == "kubernetes") {
            let mut finalizers = spec.items("finalizers").to_vec();
            finalizers.push("kubernetes".into());
            spec.set("finalizers", finalizers);
        }
    },
    // Finalizers of the spec go through the subresource alone.
    prepare_update: |new, old| new.set("spec", old.at("spec").clone()),
    name: names::dns_label,
    returns_deleted: true,
    ..Strategy::PLAIN
};

pub static SECRET: Strategy = Strategy {
    set_defaults: |secret| {
        let plain: Vec<(String, String)> = secret
            .members("stringData")
            .map(|(key, text)| (key.to_owned(), BASE64.encode(text.as_str().unwrap_or_default())))
            .collect();
        if !plain.is_empty() {
            let data = secret.object("data");
            plain.into_iter().for_each(|(key, encoded)| data.set(&key, encoded));
        }
        secret.unset("stringData");
        secret.fill("type", "Opaque");
    },
    validate: validate_secret,
    validate_update: |new, old, errors| {
        if new.text("type") != old.text("type") {
            errors.invalid("type", new.text("type"), check::IMMUTABLE);
        }
        immutable_data(new, old, &["data"], errors);
    },
    ..Strategy::PLAIN
};

pub static CONFIG_MAP: Strategy = Strategy {
    validate: |map, errors| {
        let mut size = 0;
        for field in ["data", "binaryData"] {
            for (key, value) in map.members(field) {
                config_key(key, field, errors);
                let text = value.as_str().unwrap_or_default();
                size += if field == "data" { text.len() } else { decoded_len(text) };
                if field == "binaryData" && map.at("data").get(key).is_some() {
                    errors.invalid(&format!("data[{key}]"), key, "duplicate of key present in binaryData");
                }
            }
        }
        if size > MAX_DATA_BYTES {
            errors.too_long("", MAX_DATA_BYTES);
        }
    },
    validate_update: |new, old, errors| immutable_data(new, old, &["data", "binaryData"], errors),
    ..Strategy::PLAIN
};

pub static SERVICE_ACCOUNT: Strategy = Strategy { returns_deleted: true, ..Strategy::PLAIN };

pub static ENDPOINTS: Strategy = Strategy {
    set_defaults: |endpoints| {
        for port in endpoints.each("subsets").flat_map(|subset| subset.each("ports")) {
            port.fill("protocol", "TCP");
        }
    },
    validate: validate_endpoints,
    create_on_update: true,
    ..Strategy::PLAIN
};

pub static EVENT: Strategy = Strategy { validate: validate_event, create_on_update: true, ..Strategy::PLAIN };

pub static NODE: Strategy = Strategy {
    set_defaults: |node| {
        let status = node.object("status");
        for list in ["capacity", "allocatable"] {
            round_quantities(status.sub(list));
        }
        if status.at("allocatable").is_null() && status.has("capacity") {
            let capacity = status.at("capacity").clone();
            status.set("allocatable", capacity);
        }
    },
    validate: |node, errors| {
        for (n, taint) in node.at("spec").items("taints").iter().enumerate() {
            let path = format!("spec.taints[{n}]");
            check::name(taint.text("key"), &at(&path, "key"), names::qualified_name, errors);
            check::name(taint.text("value"), &at(&path, "value"), names::label_value, errors);
            check::one_of(taint, &path, "effect", &["NoSchedule", "PreferNoSchedule", "NoExecute"], errors);
            let twin = |other: &Value| {
                other.text("key") == taint.text("key") && other.text("effect") == taint.text("effect")
            };
            if node.at("spec").items("taints")[..n].iter().any(twin) {
                errors.duplicate(&path, taint);
            }
        }
    },
    validate_update: |new, old, errors| {
        let (spec, before) = (new.at("spec"), old.at("spec"));
        if before.has("podCIDRs") && spec.get("podCIDRs") != before.get("podCIDRs") {
            errors
                .forbidden("spec.podCIDRs", "node updates may not change podCIDR except from \"\" to valid");
        }
        if before.has("providerID") && spec.text("providerID") != before.text("providerID") {
            errors.forbidden(
                "spec.providerID",
                "node updates may not change providerID except from \"\" to valid",
            );
        }
    },
    ..Strategy::PLAIN
};

pub static LIMIT_RANGE: Strategy = Strategy {
    set_defaults: |range| {
        for item in range.object("spec").each("limits") {
            for field in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
                round_quantities(item.sub(field));
            }
            if item.text("type") == "Container" {
                for (from, to) in
                    [("max", "default"), ("default", "defaultRequest"), ("min", "defaultRequest")]
                {
                    let known: Vec<(String, Value)> =
                        item.members(from).map(|(key, value)| (key.to_owned(), value.clone())).collect();
                    if !known.is_empty() {
                        let list = item.object(to);
                        known.into_iter().for_each(|(key, value)| list.fill(&key, value));
                    }
                }
            }
        }
    },
    validate: validate_limit_range,
    create_on_update: true,
    ..Strategy::PLAIN
};

/// A key of a ConfigMap or Secret: the name of a file.
fn config_key(key: &str, field: &str, errors: &mut FieldErrors) {
    let path = format!("{field}[{key}]");
    if key.len() > 253 {
        errors.invalid(&path, key, "must be no more than 253 bytes");
    }
    if key.is_empty() || !key.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.')) {
        errors.invalid(
            &path,
            key,
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
             'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')",
        );
    } else if key == "." || key == ".." {
        errors.invalid(&path, key, &format!("must not be '{key}'"));
    } else if key.starts_with("..") {
        errors.invalid(&path, key, "must not start with '..'");
    }
}

fn decoded_len(base64: &str) -> usize {
    base64.trim_end_matches('=').len() * 3 / 4
}

fn validate_secret(secret: &Value, errors: &mut FieldErrors) {
    let data = secret.at("data");
    let mut size = 0;
    for (key, value) in secret.members("data") {
        config_key(key, "data", errors);
        size += decoded_len(value.as_str().unwrap_or_default());
    }
    if size > MAX_DATA_BYTES {
        errors.too_long("data", MAX_DATA_BYTES);
    }
    let needs = |key: &str, errors: &mut FieldErrors| {
        if data.get(key).is_none() {
            errors.required(&format!("data[{key}]"), "");
        }
    };
    match secret.text("type") {
        "kubernetes.io/service-account-token" => {
            let account = "kubernetes.io/service-account.name";
            if secret.at("metadata").at("annotations").text(account).is_empty() {
                errors.required(&format!("metadata.annotations[{account}]"), "");
            }
        }
        "kubernetes.io/dockerconfigjson" => docker_config(data, ".dockerconfigjson", errors),
        "kubernetes.io/dockercfg" => docker_config(data, ".dockercfg", errors),
        "kubernetes.io/basic-auth" if data.get("username").is_none() && data.get("password").is_none() => {
            needs("username", errors);
            needs("password", errors);
        }
        "kubernetes.io/ssh-auth" if data.text("ssh-privatekey").is_empty() => {
            errors.required("data[ssh-privatekey]", "");
        }
        "kubernetes.io/tls" => {
            needs("tls.crt", errors);
            needs("tls.key", errors);
        }
        _ => {}
    }
}

fn docker_config(data: &Value, key: &str, errors: &mut FieldErrors) {
    let path = format!("data[{key}]");
    let Some(encoded) = data.get(key).and_then(Value::as_str) else {
        errors.required(&path, "");
        return;
    };
    let parsed = BASE64.decode(encoded).ok().map(|bytes| serde_json::from_slice::<Value>(&bytes));
    if !matches!(parsed, Some(Ok(_))) {
        // The value is secret and is not shown.
        errors.invalid(
            &path,
            "<secret contents redacted>",
            "invalid character looking for beginning of value",
        );
    }
}

fn immutable_data(new: &Value, old: &Value, fields: &[&str], errors: &mut FieldErrors) {
    if !old.flag("immutable") {
        return;
    }
    if !new.flag("immutable") {
        errors.forbidden("immutable", "field is immutable when `immutable` is set");
    }
    for field in fields {
        if !super::pod::same(new.at(field), old.at(field)) {
            errors.forbidden(field, "field is immutable when `immutable` is set");
        }
    }
}

fn validate_event(event: &Value, errors: &mut FieldErrors) {
    const MAX_CHARACTERS: usize = 128;
    const MAX_NOTE_CHARACTERS: usize = 1024;
    let (about, home) =
        (event.at("involvedObject").text("namespace"), event.at("metadata").text("namespace"));
    let newer = event.has("eventTime");
    // Events about cluster-scoped objects live in `default`.
    let fits = match (newer, about) {
        (_, "") => matches!(home, "" | "default") || newer && home == "kube-system",
        (false, _) => about == home,
        (true, _) => true,
    };
    if !fits {
        errors.invalid("involvedObject.namespace", about, "does not match event.namespace");
    }
    if !newer {
        return;
    }
    let fields = [
        ("reportingComponent", "reportingController"),
        ("reportingInstance", "reportingInstance"),
        ("action", "action"),
        ("reason", "reason"),
    ];
    for (field, shown) in fields {
        match event.text(field) {
            "" => errors.required(shown, ""),
            text if text.len() > MAX_CHARACTERS => {
                errors.invalid(shown, "", &format!("can have at most {MAX_CHARACTERS} characters"));
            }
            _ => {}
        }
    }
    if event.text("message").len() > MAX_NOTE_CHARACTERS {
        errors.invalid("message", "", &format!("can have at most {MAX_NOTE_CHARACTERS} characters"));
    }
}

fn validate_endpoints(endpoints: &Value, errors: &mut FieldErrors) {
    for (n, subset) in endpoints.items("subsets").iter().enumerate() {
        let path = format!("subsets[{n}]");
        if !subset.has("addresses") && !subset.has("notReadyAddresses") {
            errors.required(&path, "must specify `addresses` or `notReadyAddresses`");
        }
        for list in ["addresses", "notReadyAddresses"] {
            for (m, address) in subset.items(list).iter().enumerate() {
                endpoint_address(address.text("ip"), &format!("{path}.{list}[{m}].ip"), errors);
            }
        }
        let ports = subset.items("ports");
        for (m, port) in ports.iter().enumerate() {
            let path = format!("{path}.ports[{m}]");
            match port.text("name") {
                "" if ports.len() > 1 => errors.required(&at(&path, "name"), ""),
                "" => {}
                name => check::name(name, &at(&path, "name"), names::dns_label, errors),
            }
            check::port_number(port.int("port").unwrap_or_default(), &at(&path, "port"), errors);
            check::one_of(port, &path, "protocol", &["SCTP", "TCP", "UDP"], errors);
        }
    }
}

/// An address that traffic may be sent to.
pub fn endpoint_address(text: &str, path: &str, errors: &mut FieldErrors) {
    match text.parse::<std::net::IpAddr>() {
        Err(_) => errors.invalid(path, text, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
        Ok(ip) if ip.is_unspecified() => errors.invalid(path, text, "may not be unspecified (0.0.0.0 or ::)"),
        Ok(ip) if ip.is_loopback() => {
            errors.invalid(path, text, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
        }
        Ok(std::net::IpAddr::V4(ip)) if ip.is_link_local() => {
            errors.invalid(path, text, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
        }
        Ok(_) => {}
    }
}

fn validate_limit_range(range: &Value, errors: &mut FieldErrors) {
    for (n, item) in range.at("spec").items("limits").iter().enumerate() {
        let path = format!("spec.limits[{n}]");
        check::required(item, &path, "type", errors);
        for field in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
            for (name, value) in item.members(field) {
                check::quantity(value, &format!("{path}.{field}[{name}]"), errors);
            }
        }
        if item.text("type") == "Pod" {
            for field in ["default", "defaultRequest"] {
                if item.has(field) {
                    errors.forbidden(&at(&path, field), "may not be specified when `type` is 'Pod'");
                }
            }
        }
        let list = |field: &str| amounts(item.at(field));
        let (least, most) = (list("min"), list("max"));
        let mut ordered = |low: &str, low_name: &str, high_name: &str, high: &str| {
            for (name, value) in list(low) {
                if let Some(limit) = list(high).get(&name).filter(|limit| value > **limit) {
                    let path = format!("{path}.{low}[{name}]");
                    let why = format!("{low_name} value {value} is greater than {high_name} value {limit}");
                    errors.invalid(&path, &value.to_string(), &why);
                }
            }
        };
        ordered("min", "min", "max", "max");
        ordered("defaultRequest", "default request", "max", "max");
        ordered("default", "default", "max", "max");
        ordered("min", "min", "default request", "defaultRequest");
        ordered("defaultRequest", "default request", "default limit", "default");
        for (name, ratio) in list("maxLimitRequestRatio") {
            let path = format!("{path}.maxLimitRequestRatio[{name}]");
            if ratio < Quantity::new(1, Default::default()) {
                errors.invalid(&path, &ratio.to_string(), &format!("ratio {ratio} is less than 1"));
            }
            if let (Some(low), Some(high)) = (least.get(&name), most.get(&name))
                && ratio.as_f64() > high.as_f64() / low.as_f64()
            {
                let why =
                    format!("ratio {ratio} is greater than max/min = {:.6}", high.as_f64() / low.as_f64());
                errors.invalid(&path, &ratio.to_string(), &why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;

    use super::*;

    #[track_caller]
    fn check(strategy: &Strategy, plural: &str, mut object: Value, want: &str) {
        (strategy.set_defaults)(&mut object);
        let mut errors = FieldErrors::default();
        (strategy.validate)(&object, &mut errors);
        let kind = Kind::by_plural("", "v1", plural).unwrap();
        let message = errors.into_result(kind, "x").err().map(|s| s.message).unwrap_or_default();
        let prefix = format!("{} \"x\" is invalid: ", kind.kind);
        let got = message.strip_prefix(&prefix).unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn secrets_are_checked() {
        let check = |object, want| check(&SECRET, "secrets", object, want);
        check(json!({"stringData": {"a": "b"}}), "");
        check(
            json!({"data": {"a b": ""}}),
            "data[a b]: Invalid value: \"a b\": a valid config key must consist",
        );
        check(
            json!({"data": {"a": "A".repeat(1_400_000)}}),
            "data: Too long: may not be more than 1048576 bytes",
        );
        check(json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}}), "data[tls.key]: Required value");
        check(
            json!({"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "eA=="}}),
            "data[.dockerconfigjson]: Invalid value: \"<secret contents redacted>\"",
        );
    }

    #[test]
    fn string_data_becomes_data() {
        let mut secret = json!({"data": {"a": "eA=="}, "stringData": {"a": "y", "b": "z"}});
        (SECRET.set_defaults)(&mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "eQ==", "b": "eg=="}}));
    }

    #[test]
    fn what_is_immutable_stays() {
        let old = json!({"immutable": true, "data": {"a": "x"}});
        for (new, good) in [
            (json!({"immutable": true, "data": {"a": "x"}}), true),
            (json!({"immutable": true, "data": {"a": "y"}}), false),
            (json!({"data": {"a": "x"}}), false),
        ] {
            let mut errors = FieldErrors::default();
            (CONFIG_MAP.validate_update)(&new, &old, &mut errors);
            assert_eq!(errors.is_empty(), good, "{new}");
        }
    }

    #[test]
    fn config_maps_and_limit_ranges_are_checked() {
        check(&CONFIG_MAP, "configmaps", json!({"data": {"a.b": "x"}}), "");
        check(
            &CONFIG_MAP,
            "configmaps",
            json!({"data": {"..a": "x"}}),
            "data[..a]: Invalid value: \"..a\": must not start with '..'",
        );
        let range = |item| json!({"spec": {"limits": [item]}});
        check(
            &LIMIT_RANGE,
            "limitranges",
            range(json!({"type": "Container", "max": {"cpu": "1"}, "min": {"cpu": "100m"}})),
            "",
        );
        check(
            &LIMIT_RANGE,
            "limitranges",
            range(json!({"type": "Pod", "max": {"cpu": "1"}, "min": {"cpu": "2"}})),
            "spec.limits[0].min[cpu]: Invalid value: \"2\": min value 2 is greater than max value 1",
        );
    }

    #[test]
    fn events_are_checked() {
        let event = |about: &str, more: Value| {
            let mut event = json!({"metadata": {"namespace": "a"}, "involvedObject": {"namespace": about}});
            more.as_object().unwrap().iter().for_each(|(field, value)| event.set(field, value.clone()));
            event
        };
        check(&EVENT, "events", event("a", json!({})), "");
        let stranger = "involvedObject.namespace: Invalid value: \"b\": does not match event.namespace";
        check(&EVENT, "events", event("b", json!({})), stranger);
        let newer = json!({"eventTime": "2026-01-01T00:00:00.000000Z", "reportingComponent": "c",
            "reportingInstance": "i", "reason": "r"});
        check(&EVENT, "events", event("a", newer), "action: Required value");
    }

    #[test]
    fn container_limits_have_defaults_of_their_own() {
        let mut range = json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "1"}, "min": {"memory": "1Mi"}}]}});
        (LIMIT_RANGE.set_defaults)(&mut range);
        let item = &range["spec"]["limits"][0];
        assert_eq!(item["default"], json!({"cpu": "1"}));
        assert_eq!(item["defaultRequest"], json!({"cpu": "1", "memory": "1Mi"}));
    }
}
