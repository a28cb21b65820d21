//! Pods and what runs them: templates, nodes.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::object::{
    NONE, Printed, UNKNOWN, at, human_duration, int_at, join, labels, or, str_at, timestamp,
};
use super::{AGE, NAME, View, cells, text, wide};

pub static VIEWS: &[View] = &[
    View {
        group: "",
        kind: "Pod",
        columns: &[
            NAME,
            text("Ready"),
            text("Status"),
            text("Restarts"),
            AGE,
            wide("IP"),
            wide("Node"),
            wide("Nominated Node"),
            wide("Readiness Gates"),
        ],
        cells: pod,
    },
    View {
        group: "",
        kind: "PodTemplate",
        columns: &[NAME, text("Containers"), text("Images"), text("Pod Labels")],
        cells: |o| {
            let (names, images) = o.containers("template.spec");
            cells![o.name(), names, images, labels(o.at("template.metadata.labels"))]
        },
    },
    View {
        group: "",
        kind: "Node",
        columns: &[
            NAME,
            text("Status"),
            text("Roles"),
            AGE,
            text("Version"),
            wide("Internal-IP"),
            wide("External-IP"),
            wide("OS-Image"),
            wide("Kernel-Version"),
            wide("Container-Runtime"),
        ],
        cells: node,
    },
];

/// Tells that a pod's work is over, and how it ended.
pub fn conditions(pod: &Printed) -> Vec<Value> {
    let (reason, message) = match pod.str("status.phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return Vec::new(),
    };
    vec![json!({ "type": "Completed", "status": "True", "reason": reason, "message": message })]
}

fn pod(o: &Printed) -> Vec<Value> {
    let summary = summarize(o);
    let restarts = match summary.restarted.last {
        Some(last) if summary.restarted.count > 0 => {
            format!(
                "{} ({} ago)",
                summary.restarted.count,
                human_duration(o.now.duration_since(last).as_secs())
            )
        }
        _ => summary.restarted.count.to_string(),
    };
    let address = o.list("status.podIPs").first().map_or(o.str("status.podIP"), |ip| str_at(ip, "ip"));
    cells![
        o.name(),
        format!("{}/{}", summary.ready, summary.containers),
        summary.status,
        restarts,
        o.age(),
        or(address, NONE),
        or(o.str("spec.nodeName"), NONE),
        or(o.str("status.nominatedNodeName"), NONE),
        readiness_gates(o),
    ]
}

struct Summary {
    ready: usize,
    containers: usize,
    status: String,
    restarted: Restarts,
}

/// How often containers were restarted, and when the last of them was.
#[derive(Clone, Copy, Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, container: &Value) {
        self.count += int_at(container, "restartCount");
        self.last = self.last.max(timestamp(at(container, "lastState.terminated.finishedAt")));
    }
}

fn summarize(o: &Printed) -> Summary {
    let sidecars: BTreeSet<&str> = o
        .list("spec.initContainers")
        .iter()
        .filter(|c| c["restartPolicy"] == "Always")
        .map(|c| str_at(c, "name"))
        .collect();
    let mut summary = Summary {
        ready: 0,
        containers: o.list("spec.containers").len() + sidecars.len(),
        status: or(o.str("status.reason"), o.str("status.phase")).to_owned(),
        restarted: Restarts::default(),
    };
    let conditions = o.list("status.conditions");
    if conditions.iter().any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated") {
        summary.status = "SchedulingGated".into();
    }
    let initializing = summarize_init(o, &sidecars, &mut summary);
    let initialized = conditions.iter().any(|c| c["type"] == "Initialized" && c["status"] == "True");
    if !initializing || initialized {
        summarize_main(o, &sidecars, &mut summary);
    }
    let phase = o.str("status.phase");
    if o.is_deleted() && o.str("status.reason") == "NodeLost" {
        summary.status = "Unknown".into();
    } else if o.is_deleted() && phase != "Succeeded" && phase != "Failed" {
        summary.status = "Terminating".into();
    }
    summary
}

/// Whether an init container is still to finish; then it says the status.
fn summarize_init(o: &Printed, sidecars: &BTreeSet<&str>, summary: &mut Summary) -> bool {
    for (i, container) in o.list("status.initContainerStatuses").iter().enumerate() {
        summary.restarted.add(container);
        let terminated = at(container, "state.terminated");
        let waiting = str_at(container, "state.waiting.reason");
        if !terminated.is_null() && int_at(terminated, "exitCode") == 0 {
            continue;
        }
        if sidecars.contains(str_at(container, "name")) && container["started"] == true {
            summary.ready += usize::from(container["ready"] == true);
            continue;
        }
        summary.status = if !terminated.is_null() {
            format!("Init:{}", ended(terminated))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{i}/{}", o.list("spec.initContainers").len())
        };
        return true;
    }
    false
}

fn summarize_main(o: &Printed, sidecars: &BTreeSet<&str>, summary: &mut Summary) {
    // Init containers no longer count, but for those that go on running.
    summary.restarted = Restarts::default();
    for container in o.list("status.initContainerStatuses") {
        if sidecars.contains(str_at(container, "name")) {
            summary.restarted.add(container);
        }
    }
    let mut running = false;
    for container in o.list("status.containerStatuses").iter().rev() {
        summary.restarted.add(container);
        let waiting = str_at(container, "state.waiting.reason");
        let terminated = at(container, "state.terminated");
        if !waiting.is_empty() {
            summary.status = waiting.to_owned();
        } else if !terminated.is_null() {
            summary.status = ended(terminated);
        } else if container["ready"] == true && !at(container, "state.running").is_null() {
            running = true;
            summary.ready += 1;
        }
    }
    // One container has ended, and others go on.
    if summary.status == "Completed" && running {
        let ready = o.list("status.conditions").iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
        summary.status = if ready { "Running" } else { "NotReady" }.into();
    }
}

fn ended(terminated: &Value) -> String {
    match (str_at(terminated, "reason"), int_at(terminated, "signal")) {
        ("", 0) => format!("ExitCode:{}", int_at(terminated, "exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn readiness_gates(o: &Printed) -> String {
    let gates = o.list("spec.readinessGates");
    if gates.is_empty() {
        return NONE.into();
    }
    let conditions = o.list("status.conditions");
    let open = |gate: &&Value| {
        conditions.iter().any(|c| c["type"] == gate["conditionType"] && c["status"] == "True")
    };
    format!("{}/{}", gates.iter().filter(open).count(), gates.len())
}

fn node(o: &Printed) -> Vec<Value> {
    let address = |ty: &str| {
        let found = o.list("status.addresses").iter().find(|a| a["type"] == ty);
        found.map_or(NONE, |a| str_at(a, "address")).to_owned()
    };
    let info = o.at("status.nodeInfo");
    let kernel = match (str_at(info, "kernelVersion"), str_at(info, "architecture")) {
        ("", _) => UNKNOWN.to_owned(),
        (kernel, "") => kernel.to_owned(),
        (kernel, architecture) => format!("{kernel} ({architecture})"),
    };
    cells![
        o.name(),
        node_status(o),
        node_roles(o),
        o.age(),
        str_at(info, "kubeletVersion"),
        address("InternalIP"),
        address("ExternalIP"),
        or(str_at(info, "osImage"), UNKNOWN),
        kernel,
        or(str_at(info, "containerRuntimeVersion"), UNKNOWN),
    ]
}

fn node_status(o: &Printed) -> String {
    let ready = o.list("status.conditions").iter().find(|c| c["type"] == "Ready");
    let status = match ready {
        Some(condition) if condition["status"] == "True" => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    };
    let cordoned = o.at("spec.unschedulable") == true;
    format!("{status}{}", if cordoned { ",SchedulingDisabled" } else { "" })
}

fn node_roles(o: &Printed) -> String {
    let labels = o.at("metadata.labels").as_object();
    let roles: BTreeSet<&str> = labels
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    or(&join(roles.into_iter(), ","), NONE).to_owned()
}
