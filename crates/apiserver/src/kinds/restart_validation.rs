//! Checks of how containers are stopped, restarted and resized.
//!
//! Upstream: validateStopSignal, validateContainerRestartPolicy, validateResizePolicy.

use std::collections::HashSet;

use minke_api::FieldErrors;
use serde_json::Value;

use super::check::{self, at};
use super::tree::Tree;

const RESTART_POLICIES: [&str; 3] = ["Always", "Never", "OnFailure"];
const RULES_MAX: usize = 20;
const EXIT_CODES_MAX: usize = 255;
const WINDOWS_SIGNALS: [&str; 2] = ["SIGKILL", "SIGTERM"];
/// Those of Linux, in order; the real-time ones are more.
const SIGNALS: [&str; 34] = [
    "SIGABRT",
    "SIGALRM",
    "SIGBUS",
    "SIGCHLD",
    "SIGCLD",
    "SIGCONT",
    "SIGFPE",
    "SIGHUP",
    "SIGILL",
    "SIGINT",
    "SIGIO",
    "SIGIOT",
    "SIGKILL",
    "SIGPIPE",
    "SIGPOLL",
    "SIGPROF",
    "SIGPWR",
    "SIGQUIT",
    "SIGSEGV",
    "SIGSTKFLT",
    "SIGSTOP",
    "SIGSYS",
    "SIGTERM",
    "SIGTRAP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
    "SIGXCPU",
    "SIGXFSZ",
];

/// `lifecycle.stopSignal` of a container of the pod `spec`.
pub fn stop_signal(lifecycle: &Value, spec: &Value, path: &str, errors: &mut FieldErrors) {
    let signal = lifecycle.text("stopSignal");
    if signal.is_empty() {
        return;
    }
    let path = at(path, "stopSignal");
    match spec.at("os").text("name") {
        "" => errors.forbidden(&path, "may not be set for containers with empty `spec.os.name`"),
        "windows" if !WINDOWS_SIGNALS.contains(&signal) => {
            errors.not_supported(&path, signal, &WINDOWS_SIGNALS);
        }
        "linux" => {
            let all = linux_signals();
            if !all.iter().any(|known| known == signal) {
                let all: Vec<&str> = all.iter().map(String::as_str).collect();
                errors.not_supported(&path, signal, &all);
            }
        }
        _ => {}
    }
}

fn linux_signals() -> Vec<String> {
    let from_least = (1..=15).map(|n| format!("SIGRTMIN+{n}"));
    let from_most = (1..=14).map(|n| format!("SIGRTMAX-{n}"));
    let ends = ["SIGRTMIN", "SIGRTMAX"].map(str::to_owned);
    let mut all: Vec<String> = SIGNALS.iter().map(|name| (*name).to_owned()).collect();
    all.extend(ends.into_iter().chain(from_least).chain(from_most));
    all.sort_unstable();
    all
}

/// `restartPolicy` and `restartPolicyRules` of a container.
pub fn restart_policy(container: &Value, path: &str, errors: &mut FieldErrors) {
    let rules = container.items("restartPolicyRules");
    if !container.has("restartPolicy") && !rules.is_empty() {
        errors.required(&at(path, "restartPolicy"), "must specify restartPolicy when restart rules are used");
    }
    check::one_of_if_set(container, path, "restartPolicy", &RESTART_POLICIES, errors);
    let path = at(path, "restartPolicyRules");
    if rules.len() > RULES_MAX {
        errors.too_many(&path, rules.len(), RULES_MAX);
    }
    for (n, rule) in rules.iter().enumerate() {
        let path = format!("{path}[{n}]");
        supported(rule, &path, "action", &["Restart", "RestartAllContainers"], errors);
        let codes = rule.at("exitCodes");
        let path = at(&path, "exitCodes");
        if !codes.is_object() {
            errors.required(&path, "must be specified");
            continue;
        }
        supported(codes, &path, "operator", &["In", "NotIn"], errors);
        let values = codes.items("values");
        if values.len() > EXIT_CODES_MAX {
            errors.too_many(&at(&path, "values"), values.len(), EXIT_CODES_MAX);
        }
    }
}

/// `field` is one of `allowed`; an empty one is a wrong one.
fn supported(holder: &Value, path: &str, field: &str, allowed: &[&str], errors: &mut FieldErrors) {
    let value = holder.text(field);
    if !allowed.contains(&value) {
        errors.not_supported(&at(path, field), value, allowed);
    }
}

/// `resizePolicy` of a container in a pod of the given restart policy.
pub fn resize_policy(container: &Value, pod_policy: &str, path: &str, errors: &mut FieldErrors) {
    let path = at(path, "resizePolicy");
    let mut seen = HashSet::new();
    for policy in container.items("resizePolicy") {
        let (name, restart) = (policy.text("resourceName"), policy.text("restartPolicy"));
        if !name.is_empty() && !seen.insert(name) {
            errors.duplicate(&path, name);
        }
        match name {
            "cpu" | "memory" => {}
            "" => errors.required(&path, ""),
            _ => errors.not_supported(&path, name, &["cpu", "memory"]),
        }
        match restart {
            "NotRequired" | "RestartContainer" => {}
            "" => errors.required(&path, ""),
            _ => errors.not_supported(&path, restart, &["NotRequired", "RestartContainer"]),
        }
        if pod_policy == "Never" && restart != "NotRequired" {
            errors.invalid(&path, restart, "must be 'NotRequired' when `restartPolicy` is 'Never'");
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::super::pod::POD;
    use super::*;

    #[track_caller]
    fn check(list: &str, container: Value, spec: Value, want: &str) {
        let mut whole = json!({"name": "c", "image": "nginx"});
        for (field, value) in container.as_object().expect("an object") {
            whole.set(field, value.clone());
        }
        let mut pod = json!({"spec": spec});
        pod["spec"]["containers"] = json!([{"name": "main", "image": "nginx"}]);
        match list {
            "containers" => pod["spec"]["containers"] = json!([whole]),
            list => pod["spec"][list] = json!([whole]),
        }
        (POD.set_defaults)(&mut pod);
        let mut errors = FieldErrors::default();
        (POD.validate)(&pod, &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").expect("a kind");
        let message = errors.into_result(kind, "web").err().map(|s| s.message).unwrap_or_default();
        let start = format!("Pod \"web\" is invalid: spec.{list}[0].");
        let got = message.strip_prefix(&start).unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[test]
    fn stop_signals_fit_the_system() {
        let stop = |signal: &str| json!({"lifecycle": {"stopSignal": signal}});
        let on = |os: &str| json!({"os": {"name": os}});
        check("containers", stop("SIGUSR1"), on("linux"), "");
        check("containers", stop("SIGRTMIN+15"), on("linux"), "");
        check("containers", stop("SIGRTMAX-14"), on("linux"), "");
        check(
            "containers",
            stop("SIGUSR1"),
            json!({}),
            "lifecycle.stopSignal: Forbidden: may not be set for containers with empty `spec.os.name`",
        );
        check(
            "containers",
            stop("USR1"),
            on("linux"),
            "lifecycle.stopSignal: Unsupported value: \"USR1\": supported values: \"SIGABRT\", \"SIGALRM\",",
        );
        check("containers", stop("SIGTERM"), on("windows"), "");
        check(
            "containers",
            stop("SIGUSR1"),
            on("windows"),
            "lifecycle.stopSignal: Unsupported value: \"SIGUSR1\": supported values: \"SIGKILL\", \"SIGTERM\"",
        );
        let mut sidecar = stop("SIGHUP");
        check(
            "initContainers",
            sidecar.clone(),
            on("linux"),
            "lifecycle: Forbidden: may not be set for init containers without restartPolicy=Always",
        );
        sidecar["restartPolicy"] = json!("Always");
        check("initContainers", sidecar, on("linux"), "");
    }

    #[test]
    fn restart_rules_are_checked() {
        let rules = |rules: Value| json!({"restartPolicy": "Never", "restartPolicyRules": rules});
        let rule = |action: &str, operator: &str, values: Value| json!([{"action": action, "exitCodes": {"operator": operator, "values": values}}]);
        check("containers", rules(rule("Restart", "In", json!([1, 2]))), json!({}), "");
        check("containers", rules(rule("RestartAllContainers", "NotIn", json!([0]))), json!({}), "");
        check("initContainers", rules(rule("RestartAllContainers", "In", json!([3]))), json!({}), "");
        check("containers", rules(rule("Restart", "In", json!([]))), json!({}), "");
        check(
            "containers",
            json!({"restartPolicyRules": rule("Restart", "In", json!([1]))}),
            json!({}),
            "restartPolicy: Required value: must specify restartPolicy when restart rules are used",
        );
        check(
            "containers",
            rules(rule("DoNotRestart", "In", json!([1]))),
            json!({}),
            "restartPolicyRules[0].action: Unsupported value: \"DoNotRestart\": supported values: \"Restart\", \"RestartAllContainers\"",
        );
        check(
            "containers",
            rules(rule("Restart", "", json!([1]))),
            json!({}),
            "restartPolicyRules[0].exitCodes.operator: Unsupported value: \"\": supported values: \"In\", \"NotIn\"",
        );
        check(
            "containers",
            rules(json!([{"action": "Restart"}])),
            json!({}),
            "restartPolicyRules[0].exitCodes: Required value: must be specified",
        );
        let many: Vec<i64> = (0..256).collect();
        check(
            "containers",
            rules(rule("Restart", "In", json!(many))),
            json!({}),
            "restartPolicyRules[0].exitCodes.values: Too many: 256: must have at most 255 items",
        );
        let one = rule("Restart", "In", json!([1]))[0].clone();
        check(
            "containers",
            rules(json!(vec![one; 21])),
            json!({}),
            "restartPolicyRules: Too many: 21: must have at most 20 items",
        );
        check(
            "ephemeralContainers",
            json!({"restartPolicy": "Always"}),
            json!({}),
            "restartPolicy: Forbidden: cannot be set for an Ephemeral Container",
        );
        check(
            "ephemeralContainers",
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "x"}]}),
            json!({"volumes": [{"name": "v", "emptyDir": {}}]}),
            "volumeMounts[0].subPath: Forbidden: cannot be set for an Ephemeral Container",
        );
    }

    #[test]
    fn resize_policies_are_checked() {
        let policy = |name: &str, restart: &str| json!({"resizePolicy": [{"resourceName": name, "restartPolicy": restart}]});
        check("containers", policy("cpu", "RestartContainer"), json!({}), "");
        check(
            "containers",
            policy("pids", "NotRequired"),
            json!({}),
            "resizePolicy: Unsupported value: \"pids\": supported values: \"cpu\", \"memory\"",
        );
        check(
            "containers",
            policy("cpu", "Maybe"),
            json!({}),
            "resizePolicy: Unsupported value: \"Maybe\": supported values: \"NotRequired\", \"RestartContainer\"",
        );
        check(
            "containers",
            policy("memory", "RestartContainer"),
            json!({"restartPolicy": "Never"}),
            "resizePolicy: Invalid value: \"RestartContainer\": must be 'NotRequired' when `restartPolicy` is 'Never'",
        );
        check(
            "ephemeralContainers",
            policy("cpu", "NotRequired"),
            json!({}),
            "resizePolicy: Forbidden: cannot be set for an Ephemeral Container",
        );
    }
}
