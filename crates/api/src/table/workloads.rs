//! What makes pods: deployments and sets, jobs, autoscalers and their revisions.

use serde_json::Value;

use crate::Quantity;

use super::object::{
    NONE, Printed, UNKNOWN, UNSET, at, human_duration, labels, or, quantity, selector, show, str_at,
    timestamp,
};
use super::{AGE, NAME, View, boolean, cells, integer, text, wide};

const CONTAINERS: super::Column = wide("Containers");
const IMAGES: super::Column = wide("Images");
const SELECTOR: super::Column = wide("Selector");

pub static VIEWS: &[View] = &[
    View {
        group: "apps",
        kind: "Deployment",
        columns: &[
            NAME,
            text("Ready"),
            text("Up-to-date"),
            text("Available"),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        cells: |o| {
            let (names, images) = o.containers("spec.template.spec");
            cells![
                o.name(),
                format!("{}/{}", o.int("status.readyReplicas"), o.int("spec.replicas")),
                o.int("status.updatedReplicas"),
                o.int("status.availableReplicas"),
                o.age(),
                names,
                images,
                selector(o.at("spec.selector")),
            ]
        },
    },
    View {
        group: "apps",
        kind: "ReplicaSet",
        columns: REPLICAS,
        cells: |o| replicas(o, selector(o.at("spec.selector"))),
    },
    View {
        group: "",
        kind: "ReplicationController",
        columns: REPLICAS,
        cells: |o| replicas(o, labels(o.at("spec.selector"))),
    },
    View {
        group: "apps",
        kind: "StatefulSet",
        columns: &[NAME, text("Ready"), AGE, CONTAINERS, IMAGES],
        cells: |o| {
            let (names, images) = o.containers("spec.template.spec");
            let ready = format!("{}/{}", o.int("status.readyReplicas"), o.int("spec.replicas"));
            cells![o.name(), ready, o.age(), names, images]
        },
    },
    View {
        group: "apps",
        kind: "DaemonSet",
        columns: &[
            NAME,
            integer("Desired"),
            integer("Current"),
            integer("Ready"),
            integer("Up-to-date"),
            integer("Available"),
            text("Node Selector"),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        cells: daemon_set,
    },
    View {
        group: "apps",
        kind: "ControllerRevision",
        columns: &[NAME, text("Controller"), text("Revision"), AGE],
        cells: |o| cells![o.name(), controller(o), o.int("revision"), o.age()],
    },
    View {
        group: "batch",
        kind: "Job",
        columns: &[
            NAME,
            text("Status"),
            text("Completions"),
            text("Duration"),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        cells: |o| {
            let (names, images) = o.containers("spec.template.spec");
            let selector = selector(o.at("spec.selector"));
            cells![o.name(), job_status(o), completions(o), duration(o), o.age(), names, images, selector]
        },
    },
    View {
        group: "batch",
        kind: "CronJob",
        columns: &[
            NAME,
            text("Schedule"),
            text("Timezone"),
            boolean("Suspend"),
            integer("Active"),
            text("Last Schedule"),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        cells: cron_job,
    },
    View { group: "autoscaling", kind: "HorizontalPodAutoscaler", columns: AUTOSCALER, cells: autoscaler },
    View {
        group: "metrics.k8s.io",
        kind: "PodMetrics",
        columns: USAGE,
        cells: |o| usage(o, o.list("containers").iter().map(|container| &container["usage"])),
    },
    View {
        group: "metrics.k8s.io",
        kind: "NodeMetrics",
        columns: USAGE,
        cells: |o| usage(o, std::iter::once(o.at("usage"))),
    },
];

const REPLICAS: &[super::Column] =
    &[NAME, integer("Desired"), integer("Current"), integer("Ready"), AGE, CONTAINERS, IMAGES, SELECTOR];

const AUTOSCALER: &[super::Column] =
    &[NAME, text("Reference"), text("Targets"), text("MinPods"), text("MaxPods"), text("Replicas"), AGE];

fn replicas(o: &Printed, selector: String) -> Vec<Value> {
    let (names, images) = o.containers("spec.template.spec");
    cells![
        o.name(),
        o.int("spec.replicas"),
        o.int("status.replicas"),
        o.int("status.readyReplicas"),
        o.age(),
        names,
        images,
        selector,
    ]
}

fn daemon_set(o: &Printed) -> Vec<Value> {
    let (names, images) = o.containers("spec.template.spec");
    cells![
        o.name(),
        o.int("status.desiredNumberScheduled"),
        o.int("status.currentNumberScheduled"),
        o.int("status.numberReady"),
        o.int("status.updatedNumberScheduled"),
        o.int("status.numberAvailable"),
        labels(o.at("spec.template.spec.nodeSelector")),
        o.age(),
        names,
        images,
        selector(o.at("spec.selector")),
    ]
}

/// `statefulset.apps/web`
fn controller(o: &Printed) -> String {
    let Some(owner) = o.list("metadata.ownerReferences").iter().find(|r| r["controller"] == true) else {
        return NONE.into();
    };
    let kind = str_at(owner, "kind").to_lowercase();
    match str_at(owner, "apiVersion").split_once('/') {
        Some((group, _)) => format!("{kind}.{group}/{}", str_at(owner, "name")),
        None => format!("{kind}/{}", str_at(owner, "name")),
    }
}

fn job_status(o: &Printed) -> &'static str {
    let has = |ty: &str| o.list("status.conditions").iter().any(|c| c["type"] == ty && c["status"] == "True");
    match () {
        () if has("Complete") => "Complete",
        () if has("Failed") => "Failed",
        () if o.is_deleted() => "Terminating",
        () if has("Suspended") => "Suspended",
        () if has("FailureTarget") => "FailureTarget",
        () if has("SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

fn completions(o: &Printed) -> String {
    let succeeded = o.int("status.succeeded");
    match (o.at("spec.completions").as_i64(), o.int("spec.parallelism")) {
        (Some(wanted), _) => format!("{succeeded}/{wanted}"),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        (None, _) => format!("{succeeded}/1"),
    }
}

fn duration(o: &Printed) -> String {
    let Some(start) = timestamp(o.at("status.startTime")) else { return String::new() };
    let end = timestamp(o.at("status.completionTime")).unwrap_or(o.now);
    human_duration(end.duration_since(start).as_secs())
}

fn cron_job(o: &Printed) -> Vec<Value> {
    let (names, images) = o.containers("spec.jobTemplate.spec.template.spec");
    let last = o.at("status.lastScheduleTime");
    cells![
        o.name(),
        o.str("spec.schedule"),
        or(o.str("spec.timeZone"), NONE),
        o.flag("spec.suspend"),
        o.count("status.active"),
        if last.is_null() { NONE.to_owned() } else { o.since(last) },
        o.age(),
        names,
        images,
        selector(o.at("spec.jobTemplate.spec.selector")),
    ]
}

const USAGE: &[super::Column] = &[
    NAME,
    super::Column { name: "cpu", ty: "string", format: "quantity", wide: false },
    super::Column { name: "memory", ty: "string", format: "quantity", wide: false },
    super::Column { name: "Window", ty: "string", format: "duration", wide: false },
];

/// What is used in all.
fn usage<'a>(o: &Printed, parts: impl Iterator<Item = &'a Value>) -> Vec<Value> {
    let (mut cpu, mut memory) = (Quantity::ZERO, Quantity::ZERO);
    for part in parts {
        let of = |name: &str| Quantity::parse(str_at(part, name)).unwrap_or_default();
        (cpu, memory) = (cpu + of("cpu"), memory + of("memory"));
    }
    cells![o.name(), cpu.to_string(), memory.to_string(), o.str("window")]
}

fn autoscaler(o: &Printed) -> Vec<Value> {
    let min = o.at("spec.minReplicas");
    let target = o.at("spec.scaleTargetRef");
    cells![
        o.name(),
        format!("{}/{}", str_at(target, "kind"), str_at(target, "name")),
        metrics(o),
        if min.is_null() { UNSET.to_owned() } else { min.to_string() },
        o.int("spec.maxReplicas"),
        o.int("status.currentReplicas"),
        o.age(),
    ]
}

fn metrics(o: &Printed) -> String {
    const SHOWN: usize = 2;
    let specs = o.list("spec.metrics");
    if let Some(target) = o.at("spec.targetCPUUtilizationPercentage").as_i64() {
        let current = o.at("status.currentCPUUtilizationPercentage").as_i64();
        return format!("cpu: {}/{target}%", current.map_or(UNKNOWN.into(), |c| format!("{c}%")));
    }
    let statuses = o.list("status.currentMetrics");
    let texts: Vec<String> = specs.iter().enumerate().map(|(i, s)| metric(s, statuses.get(i))).collect();
    match texts.len() {
        0 => NONE.into(),
        n if n > SHOWN => format!("{} + {} more...", texts[..SHOWN].join(", "), n - SHOWN),
        _ => texts.join(", "),
    }
}

/// What is measured of one metric, and what is wanted.
fn metric(spec: &Value, status: Option<&Value>) -> String {
    let source = match str_at(spec, "type") {
        "External" => "external",
        "Pods" => "pods",
        "Object" => "object",
        "Resource" => "resource",
        "ContainerResource" => "containerResource",
        _ => return "<unknown type>".into(),
    };
    let target = at(&spec[source], "target");
    let current = status.map_or(&Value::Null, |s| at(&s[source], "current"));
    let amount = |field: &str| match &current[field] {
        Value::Null => UNKNOWN.to_owned(),
        value => quantity(value),
    };
    let by_resource = matches!(source, "resource" | "containerResource");
    let average = !target["averageValue"].is_null();
    let text = if average {
        let note = if matches!(source, "external" | "object") { " (avg)" } else { "" };
        format!("{}/{}{note}", amount("averageValue"), quantity(&target["averageValue"]))
    } else if by_resource {
        let percent = |v: &Value, none: &str| v.as_i64().map_or(none.to_owned(), |p| format!("{p}%"));
        let wanted = percent(&target["averageUtilization"], "<auto>");
        format!("{}/{wanted}", percent(&current["averageUtilization"], UNKNOWN))
    } else {
        format!("{}/{}", amount("value"), quantity(&target["value"]))
    };
    if by_resource { format!("{}: {text}", show(&spec[source]["name"])) } else { text }
}
