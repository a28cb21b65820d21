//! Namespaces, events, accounts, roles, quotas, budgets and other rules.

use serde_json::Value;

use super::object::{NONE, Printed, human_duration, join, list_at, or, quantity, show, str_at};
use super::{AGE, NAME, View, boolean, cells, integer, text, wide};

const BINDING: &[super::Column] =
    &[NAME, text("Role"), AGE, wide("Users"), wide("Groups"), wide("ServiceAccounts")];

pub static VIEWS: &[View] = &[
    View {
        group: "",
        kind: "Namespace",
        columns: &[NAME, text("Status"), AGE],
        cells: |o| cells![o.name(), o.str("status.phase"), o.age()],
    },
    View { group: "", kind: "ServiceAccount", columns: &[NAME, AGE], cells: |o| cells![o.name(), o.age()] },
    View { group: "", kind: "Event", columns: EVENT, cells: event },
    View { group: "events.k8s.io", kind: "Event", columns: EVENT, cells: new_event },
    View {
        group: "",
        kind: "ComponentStatus",
        columns: &[NAME, text("Status"), text("Message"), text("Error")],
        cells: component,
    },
    View {
        group: "",
        kind: "ResourceQuota",
        columns: &[NAME, text("Request"), text("Limit"), AGE],
        cells: |o| cells![o.name(), quota(o, false), quota(o, true), o.age()],
    },
    View { group: "rbac.authorization.k8s.io", kind: "RoleBinding", columns: BINDING, cells: binding },
    View { group: "rbac.authorization.k8s.io", kind: "ClusterRoleBinding", columns: BINDING, cells: binding },
    View {
        group: "policy",
        kind: "PodDisruptionBudget",
        columns: &[NAME, text("Min Available"), text("Max Unavailable"), integer("Allowed Disruptions"), AGE],
        cells: |o| {
            let bound = |path: &str| match o.at(path) {
                Value::Null => "N/A".to_owned(),
                value => show(value),
            };
            cells![
                o.name(),
                bound("spec.minAvailable"),
                bound("spec.maxUnavailable"),
                o.int("status.disruptionsAllowed"),
                o.age(),
            ]
        },
    },
    View {
        group: "certificates.k8s.io",
        kind: "CertificateSigningRequest",
        columns: &[
            NAME,
            AGE,
            text("SignerName"),
            text("Requestor"),
            text("RequestedDuration"),
            text("Condition"),
        ],
        cells: |o| {
            let duration = match o.at("spec.expirationSeconds").as_i64() {
                Some(seconds) => human_duration(seconds),
                None => NONE.to_owned(),
            };
            cells![
                o.name(),
                o.age(),
                or(o.str("spec.signerName"), NONE),
                o.str("spec.username"),
                duration,
                certificate_condition(o),
            ]
        },
    },
    View {
        group: "certificates.k8s.io",
        kind: "ClusterTrustBundle",
        columns: &[NAME, text("SignerName")],
        cells: |o| cells![o.name(), or(o.str("spec.signerName"), NONE)],
    },
    View {
        group: "certificates.k8s.io",
        kind: "PodCertificateRequest",
        columns: &[
            NAME,
            text("PodName"),
            text("ServiceAccountName"),
            text("NodeName"),
            text("SignerName"),
            text("State"),
        ],
        cells: |o| {
            let states = o.list("status.conditions");
            let state = states.iter().map(|c| str_at(c, "type")).find(|c| !c.is_empty());
            cells![
                o.name(),
                o.str("spec.podName"),
                o.str("spec.serviceAccountName"),
                o.str("spec.nodeName"),
                o.str("spec.signerName"),
                state.unwrap_or("Pending"),
            ]
        },
    },
    View {
        group: "scheduling.k8s.io",
        kind: "PriorityClass",
        columns: &[NAME, integer("Value"), boolean("Global-Default"), AGE, text("PreemptionPolicy")],
        cells: |o| {
            let policy = or(o.str("preemptionPolicy"), "PreemptLowerPriority");
            cells![o.name(), o.int("value"), o.at("globalDefault") == true, o.age(), policy]
        },
    },
    View {
        group: "coordination.k8s.io",
        kind: "Lease",
        columns: &[NAME, text("Holder"), AGE],
        cells: |o| cells![o.name(), o.str("spec.holderIdentity"), o.age()],
    },
    View {
        group: "node.k8s.io",
        kind: "RuntimeClass",
        columns: &[NAME, text("Handler"), AGE],
        cells: |o| cells![o.name(), o.str("handler"), o.age()],
    },
];

const EVENT: &[super::Column] = &[
    text("Last Seen"),
    text("Type"),
    text("Reason"),
    text("Object"),
    wide("Subobject"),
    wide("Source"),
    text("Message"),
    wide("First Seen"),
    wide("Count"),
    super::Column { wide: true, ..NAME },
];

/// The names of an event's fields, which differ between the two versions of it.
struct EventFields {
    first: &'static str,
    last: &'static str,
    count: &'static str,
    object: &'static str,
    source: &'static str,
    component: &'static str,
    instance: &'static str,
    message: &'static str,
}

fn event(o: &Printed) -> Vec<Value> {
    event_with(
        o,
        &EventFields {
            first: "firstTimestamp",
            last: "lastTimestamp",
            count: "count",
            object: "involvedObject",
            source: "source",
            component: "reportingComponent",
            instance: "reportingInstance",
            message: "message",
        },
    )
}

fn new_event(o: &Printed) -> Vec<Value> {
    event_with(
        o,
        &EventFields {
            first: "deprecatedFirstTimestamp",
            last: "deprecatedLastTimestamp",
            count: "deprecatedCount",
            object: "regarding",
            source: "deprecatedSource",
            component: "reportingController",
            instance: "reportingInstance",
            message: "note",
        },
    )
}

fn event_with(o: &Printed, fields: &EventFields) -> Vec<Value> {
    let first_of = |a: &'static str, b: &'static str| if o.at(a).is_null() { o.at(b) } else { o.at(a) };
    let first = first_of(fields.first, "eventTime");
    let series = o.at("series");
    let (last, count) = match (series, o.int(fields.count)) {
        (Value::Null, 0) => (o.at(fields.last), 1),
        (Value::Null, count) => (o.at(fields.last), count),
        (series, _) => (&series["lastObservedTime"], series["count"].as_i64().unwrap_or_default()),
    };
    let last = if last.is_null() { first } else { last };
    let object = o.at(fields.object);
    let kind = str_at(object, "kind").to_lowercase();
    let target = match str_at(object, "name") {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let source = o.at(fields.source);
    let component = or(str_at(source, "component"), o.str(fields.component));
    let source = match or(str_at(source, "host"), o.str(fields.instance)) {
        "" => component.to_owned(),
        host => format!("{component}, {host}"),
    };
    cells![
        o.since(last),
        o.str("type"),
        o.str("reason"),
        target,
        str_at(object, "fieldPath"),
        source,
        o.str(fields.message).trim(),
        o.since(first),
        count,
        o.name(),
    ]
}

fn component(o: &Printed) -> Vec<Value> {
    let healthy = o.list("conditions").iter().find(|c| c["type"] == "Healthy");
    let (status, message, error) = match healthy {
        Some(c) => {
            let status = if c["status"] == "True" { "Healthy" } else { "Unhealthy" };
            (status, str_at(c, "message"), str_at(c, "error"))
        }
        None => ("Unknown", "", ""),
    };
    cells![o.name(), status, message, error]
}

/// `pods: 1/10, requests.cpu: 1/2`: either what limits bound, or the rest.
fn quota(o: &Printed, limits: bool) -> String {
    let used = o.at("status.used");
    let hard = o.at("status.hard").as_object();
    let entries = hard.into_iter().flatten().filter(|(name, _)| name.starts_with("limits.") == limits);
    let texts = entries.map(|(name, hard)| format!("{name}: {}/{}", quantity(&used[name]), quantity(hard)));
    texts.collect::<Vec<_>>().join(", ")
}

fn binding(o: &Printed) -> Vec<Value> {
    let role = o.at("roleRef");
    let of = |kind: &'static str| list_at(o.value, "subjects").iter().filter(move |s| s["kind"] == kind);
    let names = |kind| join(of(kind).map(|s| str_at(s, "name")), ", ");
    let accounts = of("ServiceAccount").map(|s| format!("{}/{}", str_at(s, "namespace"), str_at(s, "name")));
    let role = format!("{}/{}", str_at(role, "kind"), str_at(role, "name"));
    let accounts: Vec<String> = accounts.collect();
    cells![o.name(), or(&role, NONE), o.age(), names("User"), names("Group"), accounts.join(", ")]
}

/// How far a signing request has come: `Approved,Issued`.
fn certificate_condition(o: &Printed) -> String {
    let has = |kind: &str| o.list("status.conditions").iter().any(|c| str_at(c, "type") == kind);
    let mut parts = Vec::new();
    match (has("Denied"), has("Approved")) {
        (true, _) => parts.push("Denied"),
        (_, true) => parts.push("Approved"),
        _ => parts.push("Pending"),
    }
    if has("Failed") {
        parts.push("Failed");
    }
    if !o.str("status.certificate").is_empty() {
        parts.push("Issued");
    }
    parts.join(",")
}
