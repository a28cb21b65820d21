//! Services and what stands behind and before them.

use std::collections::BTreeSet;

use serde_json::Value;

use super::object::{NONE, Printed, UNSET, int_at, join, labels, list_at, or, selector, str_at, with_more};
use super::{AGE, NAME, View, cells, text, wide};

/// How many addresses or hosts are shown before the rest is only counted.
const SHOWN: usize = 3;

pub static VIEWS: &[View] = &[
    View {
        group: "",
        kind: "Service",
        columns: &[
            NAME,
            text("Type"),
            text("Cluster-IP"),
            text("External-IP"),
            text("Port(s)"),
            AGE,
            wide("Selector"),
        ],
        cells: |o| {
            let cluster =
                o.list("spec.clusterIPs").first().and_then(Value::as_str).unwrap_or(o.str("spec.clusterIP"));
            cells![
                o.name(),
                o.str("spec.type"),
                or(cluster, NONE),
                external_ip(o),
                ports(o),
                o.age(),
                labels(o.at("spec.selector")),
            ]
        },
    },
    View {
        group: "",
        kind: "Endpoints",
        columns: &[NAME, text("Endpoints"), AGE],
        cells: |o| cells![o.name(), endpoints(o), o.age()],
    },
    View {
        group: "discovery.k8s.io",
        kind: "EndpointSlice",
        columns: &[NAME, text("AddressType"), text("Ports"), text("Endpoints"), AGE],
        cells: |o| cells![o.name(), o.str("addressType"), slice_ports(o), slice_endpoints(o), o.age()],
    },
    View {
        group: "networking.k8s.io",
        kind: "Ingress",
        columns: &[NAME, text("Class"), text("Hosts"), text("Address"), text("Ports"), AGE],
        cells: |o| {
            let ports = if o.list("spec.tls").is_empty() { "80" } else { "80, 443" };
            let class = or(o.str("spec.ingressClassName"), NONE);
            cells![o.name(), class, hosts(o), load_balancer(o), ports, o.age()]
        },
    },
    View {
        group: "networking.k8s.io",
        kind: "IngressClass",
        columns: &[NAME, text("Controller"), text("Parameters"), AGE],
        cells: |o| cells![o.name(), o.str("spec.controller"), parameters(o), o.age()],
    },
    View {
        group: "networking.k8s.io",
        kind: "NetworkPolicy",
        columns: &[NAME, text("Pod-Selector"), AGE],
        cells: |o| cells![o.name(), selector(o.at("spec.podSelector")), o.age()],
    },
    View {
        group: "networking.k8s.io",
        kind: "ServiceCIDR",
        columns: &[NAME, text("CIDRs"), AGE],
        cells: |o| {
            cells![o.name(), join(o.list("spec.cidrs").iter().filter_map(Value::as_str), ","), o.age()]
        },
    },
    View {
        group: "networking.k8s.io",
        kind: "IPAddress",
        columns: &[NAME, text("ParentRef")],
        cells: |o| cells![o.name(), parent(o)],
    },
];

fn load_balancer(o: &Printed) -> String {
    let list = o.list("status.loadBalancer.ingress").iter();
    let set: BTreeSet<&str> = list.map(|i| or(str_at(i, "ip"), str_at(i, "hostname"))).collect();
    join(set.into_iter().filter(|name| !name.is_empty()), ",")
}

fn external_ip(o: &Printed) -> String {
    let own = join(o.list("spec.externalIPs").iter().filter_map(Value::as_str), ",");
    match o.str("spec.type") {
        "ClusterIP" | "NodePort" => or(&own, NONE).to_owned(),
        "LoadBalancer" => {
            let balancer = load_balancer(o);
            let both: Vec<&str> = [balancer.as_str(), &own].into_iter().filter(|t| !t.is_empty()).collect();
            or(&both.join(","), "<pending>").to_owned()
        }
        "ExternalName" => o.str("spec.externalName").to_owned(),
        _ => super::object::UNKNOWN.to_owned(),
    }
}

/// `80:30080/TCP`
fn ports(o: &Printed) -> String {
    let one = |port: &Value| {
        let protocol = str_at(port, "protocol");
        match (int_at(port, "port"), int_at(port, "nodePort")) {
            (number, 0) => format!("{number}/{protocol}"),
            (number, node) => format!("{number}:{node}/{protocol}"),
        }
    };
    let all: Vec<String> = o.list("spec.ports").iter().map(one).collect();
    or(&all.join(","), NONE).to_owned()
}

fn endpoints(o: &Printed) -> String {
    let (mut shown, mut count) = (Vec::new(), 0);
    let mut add = |text: String| {
        count += 1;
        if shown.len() < SHOWN {
            shown.push(text);
        }
    };
    for subset in o.list("subsets") {
        let addresses = || list_at(subset, "addresses").iter().map(|a| str_at(a, "ip"));
        let ports = list_at(subset, "ports");
        if ports.is_empty() {
            addresses().for_each(|ip| add(ip.to_owned()));
        }
        for port in ports {
            addresses().for_each(|ip| add(host_port(ip, int_at(port, "port"))));
        }
    }
    with_more(&shown, count, NONE)
}

fn host_port(ip: &str, port: i64) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

fn slice_ports(o: &Printed) -> String {
    let ports = o.list("ports");
    let one = |port: &Value| match (port["port"].as_i64(), port["name"].as_str()) {
        (Some(number), _) => number.to_string(),
        (None, Some(name)) => name.to_owned(),
        (None, None) => "*".to_owned(),
    };
    let shown: Vec<String> = ports.iter().take(SHOWN).map(one).collect();
    with_more(&shown, ports.len(), UNSET)
}

fn slice_endpoints(o: &Printed) -> String {
    let addresses =
        || o.list("endpoints").iter().flat_map(|e| list_at(e, "addresses")).filter_map(Value::as_str);
    let shown: Vec<String> = addresses().take(SHOWN).map(str::to_owned).collect();
    with_more(&shown, addresses().count(), UNSET)
}

fn hosts(o: &Printed) -> String {
    let rules = o.list("spec.rules");
    let named = || rules.iter().map(|r| str_at(r, "host")).filter(|h| !h.is_empty());
    let shown: Vec<String> = named().take(SHOWN).map(str::to_owned).collect();
    // Upstream counts the rules after the last host that it shows, whether they have one or not.
    let more = if shown.len() == SHOWN { rules.len() } else { shown.len() };
    with_more(&shown, more, "*")
}

fn parameters(o: &Printed) -> String {
    let parameters = o.at("spec.parameters");
    if parameters.is_null() {
        return NONE.into();
    }
    let group = str_at(parameters, "apiGroup");
    let dot = if group.is_empty() { "" } else { "." };
    format!("{}{dot}{group}/{}", str_at(parameters, "kind"), str_at(parameters, "name"))
}

/// `services/default/web`
fn parent(o: &Printed) -> String {
    let parent = o.at("spec.parentRef");
    if parent.is_null() {
        return NONE.into();
    }
    let resource = match (str_at(parent, "group"), str_at(parent, "resource")) {
        ("", resource) => resource.to_owned(),
        (group, resource) => format!("{resource}.{group}"),
    };
    let place = [str_at(parent, "namespace"), str_at(parent, "name")];
    let place: Vec<&str> = place.into_iter().filter(|p| !p.is_empty()).collect();
    format!("{resource}/{}", place.join("/"))
}
