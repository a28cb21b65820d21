//! What becomes of packets, Service by Service.

use serde_json::{Value, json};

use super::{Node, endpoint, service, slice};

const POD: &str = "10.244.0.9";
const OUTSIDE: &str = "198.51.100.1";
const NODE: &str = "192.0.2.2";

#[track_caller]
fn check(objects: impl IntoIterator<Item = Value>, outcomes: &[(&str, &str, &str)]) {
    let node = Node::with(objects);
    node.check_kernel();
    for (source, destination, outcome) in outcomes {
        assert_eq!(node.trace(&format!("{source} > {destination}")), *outcome, "{source} > {destination}");
    }
}

#[test]
fn a_cluster_ip_leads_to_the_ready_endpoints() {
    let endpoints = [endpoint(0, 2, "ready"), endpoint(1, 3, "ready"), endpoint(0, 4, "unready")];
    let to = "to 10.244.0.2:8080 10.244.1.3:8080";
    check(
        [service(json!({})), slice(endpoints)],
        &[
            (POD, "10.96.0.7:80", to),
            ("10.244.1.3", "10.96.0.7:80", to),
            (NODE, "10.96.0.7:80", &format!("masquerade {to}")),
            (OUTSIDE, "10.96.0.7:80", &format!("masquerade {to}")),
            (POD, "10.96.0.7:81", "refused"),
            (POD, "10.96.0.7:80/udp", "refused"),
            (POD, "10.96.0.8:80", "refused"),
        ],
    );
}

#[test]
fn without_endpoints_everything_is_refused() {
    let object = service(json!({"spec": {
        "type": "LoadBalancer", "externalIPs": ["203.0.113.5"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    }, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.2"}]}}}));
    check(
        [object, slice([endpoint(0, 2, "unready"), endpoint(0, 3, "gone")])],
        &[
            (POD, "10.96.0.7:80", "refused"),
            (POD, "203.0.113.5:80", "refused"),
            (OUTSIDE, "203.0.113.5:80", "refused"),
            (OUTSIDE, "192.0.2.2:80", "refused"),
            (OUTSIDE, "192.0.2.2:30080", "refused"),
            (NODE, "127.0.0.1:30080", "refused"),
            (OUTSIDE, "192.0.2.2:30081", "-"),
            (POD, "203.0.113.5:81", "-"),
        ],
    );
}

#[test]
fn terminating_endpoints_serve_when_nobody_else_does() {
    let leaving = [endpoint(0, 2, "leaving"), endpoint(0, 3, "gone")];
    check([service(json!({})), slice(leaving.clone())], &[(POD, "10.96.0.7:80", "to 10.244.0.2:8080")]);
    let with_ready = leaving.into_iter().chain([endpoint(0, 4, "ready")]);
    check([service(json!({})), slice(with_ready)], &[(POD, "10.96.0.7:80", "to 10.244.0.4:8080")]);
}

#[test]
fn conditions_that_are_not_given_mean_ready() {
    let bare = json!({"addresses": ["10.244.0.2"]});
    check([service(json!({})), slice([bare])], &[(POD, "10.96.0.7:80", "to 10.244.0.2:8080")]);
}

#[test]
fn ports_are_matched_by_name_and_protocol() {
    let object = service(json!({"spec": {"ports": [
        {"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "other", "port": 90},
    ]}}));
    let mut slice = slice([endpoint(0, 2, "ready")]);
    slice["ports"] = json!([
        {"name": "dns", "port": 5353, "protocol": "UDP"}, {"name": "http", "port": 8080, "protocol": "TCP"},
        {"name": "other", "port": 9090, "protocol": "UDP"},
    ]);
    check(
        [object, slice],
        &[
            (POD, "10.96.0.7:80", "to 10.244.0.2:8080"),
            (POD, "10.96.0.7:53/udp", "to 10.244.0.2:5353"),
            (POD, "10.96.0.7:53", "refused"),
            (POD, "10.96.0.7:90", "refused"),
        ],
    );
}

#[test]
fn node_ports_work_on_all_addresses_of_the_node() {
    let object = service(
        json!({"spec": {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}}),
    );
    let to = "masquerade to 10.244.0.2:8080";
    check(
        [object, slice([endpoint(0, 2, "ready")])],
        &[
            (OUTSIDE, "192.0.2.2:30080", to),
            (NODE, "192.0.2.2:30080", to),
            ("127.0.0.1", "127.0.0.1:30080", to),
            (POD, "192.0.2.2:30080", to),
            (POD, "10.244.0.1:30080", to),
            (POD, "10.96.0.7:30080", "refused"),
            (OUTSIDE, "203.0.113.5:30080", "-"),
        ],
    );
}

#[test]
fn the_external_policy_local_keeps_the_clients_address() {
    let object = |external: &str| {
        service(json!({"spec": {
            "type": "NodePort", "externalTrafficPolicy": external,
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        }}))
    };
    let both = [endpoint(0, 2, "ready"), endpoint(1, 3, "ready")];
    let all = "to 10.244.0.2:8080 10.244.1.3:8080";
    check(
        [object("Local"), slice(both.clone())],
        &[
            (OUTSIDE, "192.0.2.2:30080", "to 10.244.0.2:8080"),
            (POD, "192.0.2.2:30080", all),
            (NODE, "192.0.2.2:30080", &format!("masquerade {all}")),
            ("127.0.0.1", "127.0.0.1:30080", &format!("masquerade {all}")),
            (OUTSIDE, "10.96.0.7:80", &format!("masquerade {all}")),
        ],
    );
    check(
        [object("Local"), slice([endpoint(1, 3, "ready")])],
        &[(OUTSIDE, "192.0.2.2:30080", "dropped"), (POD, "192.0.2.2:30080", "to 10.244.1.3:8080")],
    );
    check([object("Local"), slice([])], &[(OUTSIDE, "192.0.2.2:30080", "refused")]);
    check(
        [object("Local"), slice([endpoint(0, 2, "leaving"), endpoint(1, 3, "ready")])],
        &[(OUTSIDE, "192.0.2.2:30080", "to 10.244.0.2:8080"), (POD, "192.0.2.2:30080", "to 10.244.1.3:8080")],
    );
    check([object("Cluster"), slice(both)], &[(OUTSIDE, "192.0.2.2:30080", &format!("masquerade {all}"))]);
}

#[test]
fn the_internal_policy_local_holds_for_everyone() {
    let object = service(json!({"spec": {"internalTrafficPolicy": "Local"}}));
    let both = [endpoint(0, 2, "ready"), endpoint(1, 3, "ready")];
    check([object.clone(), slice(both)], &[(POD, "10.96.0.7:80", "to 10.244.0.2:8080")]);
    check([object.clone(), slice([endpoint(1, 3, "ready")])], &[(POD, "10.96.0.7:80", "dropped")]);
    check([object, slice([])], &[(POD, "10.96.0.7:80", "refused")]);
}

#[test]
fn load_balancers_and_external_addresses() {
    let object = |mode: &str| {
        service(json!({
            "spec": {"type": "LoadBalancer", "externalIPs": ["203.0.113.5", "2001:db8::1"]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.2", "ipMode": mode}, {"hostname": "x.test"}]}},
        }))
    };
    let to = "masquerade to 10.244.0.2:8080";
    let endpoints = || slice([endpoint(0, 2, "ready")]);
    check(
        [object("VIP"), endpoints()],
        &[(OUTSIDE, "192.0.2.2:80", to), (POD, "192.0.2.2:80", to), (OUTSIDE, "203.0.113.5:80", to)],
    );
    check([object("Proxy"), endpoints()], &[(OUTSIDE, "192.0.2.2:80", "-")]);
}

#[test]
fn source_ranges_keep_others_out() {
    let object = service(json!({
        "spec": {
            "type": "LoadBalancer", "loadBalancerSourceRanges": ["198.51.100.0/25", "198.51.100.0/24", "203.0.113.9/32"],
            "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.2"}]}},
    }));
    let to = "masquerade to 10.244.0.2:8080";
    check(
        [object, slice([endpoint(0, 2, "ready")])],
        &[
            ("198.51.100.200", "192.0.2.2:80", to),
            ("203.0.113.9", "192.0.2.2:80", to),
            ("203.0.113.8", "192.0.2.2:80", "dropped"),
            ("203.0.113.8", "192.0.2.2:30080", to),
            (POD, "10.96.0.7:80", "to 10.244.0.2:8080"),
        ],
    );
}

#[test]
fn affinity_leads_to_the_same_endpoints() {
    let object = service(json!({"spec": {
        "type": "NodePort", "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
    }}));
    let to = "to 10.244.0.2:8080 10.244.1.3:8080";
    check(
        [object, slice([endpoint(0, 2, "ready"), endpoint(1, 3, "ready")])],
        &[(POD, "10.96.0.7:80", to), (OUTSIDE, "192.0.2.2:30080", &format!("masquerade {to}"))],
    );
}

#[test]
fn hints_choose_the_near_endpoints_when_all_have_them() {
    let hinted = |number: u8, zone: &str, node: &str| {
        let mut endpoint = endpoint(1, number, "ready");
        if !zone.is_empty() {
            endpoint["hints"]["forZones"] = json!([{"name": zone}]);
        }
        if !node.is_empty() {
            endpoint["hints"]["forNodes"] = json!([{"name": node}]);
        }
        endpoint
    };
    let check = |endpoints: Vec<Value>, outcome: &str| {
        check([service(json!({})), slice(endpoints)], &[(POD, "10.96.0.7:80", outcome)]);
    };
    let all = "to 10.244.1.2:8080 10.244.1.3:8080";
    check(vec![hinted(2, "a", ""), hinted(3, "b", "")], "to 10.244.1.2:8080");
    check(vec![hinted(2, "c", ""), hinted(3, "b", "")], all);
    check(vec![hinted(2, "a", ""), hinted(3, "", "")], all);
    check(vec![hinted(2, "a", "there"), hinted(3, "b", "here")], "to 10.244.1.3:8080");
    check(vec![hinted(2, "a", "there"), hinted(3, "b", "there")], "to 10.244.1.2:8080");
}

#[test]
fn some_services_are_none_of_ours() {
    let endpoints = || slice([endpoint(0, 2, "ready")]);
    let headless = service(json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}));
    let external = service(json!({"spec": {"type": "ExternalName", "externalName": "x.test"}}));
    let labelled =
        service(json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}}));
    for object in [headless, external, labelled] {
        check([object, endpoints()], &[(POD, "10.96.0.7:80", "refused")]);
    }
    let mut ipv6 = endpoints();
    ipv6["addressType"] = json!("IPv6");
    check([service(json!({})), ipv6], &[(POD, "10.96.0.7:80", "refused")]);
}

#[test]
fn a_service_that_is_its_own_endpoint_is_left_alone() {
    let mut itself = slice([json!({"addresses": ["10.96.0.7"]})]);
    itself["ports"][0]["port"] = json!(80);
    let node = Node::with([service(json!({})), itself]);
    assert!(node.state.tables.elements().is_empty());
}

#[test]
fn host_ports_lead_to_their_pod() {
    let pod = |more: Value| {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "default", "name": "p", "uid": "3"},
            "spec": {"nodeName": "here", "containers": [{"name": "c", "ports": [
                {"containerPort": 8080, "hostPort": 8000},
                {"containerPort": 5353, "hostPort": 5300, "protocol": "UDP", "hostIP": "127.0.0.1"},
                {"containerPort": 9090},
            ]}]},
            "status": {"phase": "Running", "podIP": "10.244.0.5"},
        });
        super::merge(&mut pod, more);
        pod
    };
    check(
        [pod(json!({}))],
        &[
            (OUTSIDE, "192.0.2.2:8000", "to 10.244.0.5:8080"),
            ("127.0.0.1", "127.0.0.1:8000", "masquerade to 10.244.0.5:8080"),
            ("127.0.0.1", "127.0.0.1:5300/udp", "masquerade to 10.244.0.5:5353"),
            (OUTSIDE, "192.0.2.2:5300/udp", "-"),
            (OUTSIDE, "192.0.2.2:9090", "-"),
        ],
    );
    for off in [
        json!({"status": {"phase": "Succeeded"}}),
        json!({"spec": {"hostNetwork": true}}),
        json!({"status": {"podIP": null}}),
    ] {
        check([pod(off)], &[(OUTSIDE, "192.0.2.2:8000", "-")]);
    }
}

#[test]
fn nonsense_is_skipped() {
    let mut bad =
        slice([json!({"addresses": []}), json!({"addresses": ["not an address"]}), endpoint(0, 2, "ready")]);
    check([service(json!({})), bad.clone()], &[(POD, "10.96.0.7:80", "to 10.244.0.2:8080")]);
    bad["ports"][0]["port"] = json!(70000);
    check([service(json!({})), bad], &[(POD, "10.96.0.7:80", "refused")]);
    let object = service(json!({"spec": {"ports": [
        {"name": "http", "port": -1}, {"name": "http", "port": 80, "protocol": "ICMP"}, {"name": "http", "port": 90},
    ]}}));
    check(
        [object, slice([endpoint(0, 2, "ready")])],
        &[(POD, "10.96.0.7:80", "refused"), (POD, "10.96.0.7:90", "to 10.244.0.2:8080")],
    );
}
