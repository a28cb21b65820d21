use serde_json::json;

use super::*;

fn now() -> Timestamp {
    "2026-01-02T03:00:00Z".parse().unwrap()
}

#[track_caller]
fn kind(group: &str, kind: &str) -> &'static Kind {
    crate::KINDS.iter().find(|k| k.group == group && k.kind == kind).unwrap_or_else(|| panic!("{kind}"))
}

/// Checks the cells of the columns that are not wide, joined as a table would show them.
#[track_caller]
fn check(group: &str, name: &str, object: Value, want: &str) {
    check_cells(group, name, object, want, false);
}

#[track_caller]
fn check_wide(group: &str, name: &str, object: Value, want: &str) {
    check_cells(group, name, object, want, true);
}

#[track_caller]
fn check_cells(group: &str, name: &str, mut object: Value, want: &str, all: bool) {
    object["metadata"]["name"] = "x".into();
    if object["metadata"]["creationTimestamp"].is_null() {
        object["metadata"]["creationTimestamp"] = "2026-01-02T02:55:00Z".into();
    }
    let view = view(kind(group, name));
    let row = view.row(&object, now());
    assert_eq!(row.cells.len(), view.columns.len());
    let cells = row.cells.iter().zip(view.columns).filter(|(_, c)| all || !c.wide);
    let shown: Vec<String> = cells.map(|(cell, _)| object::show(cell)).collect();
    assert_eq!(shown.join(" | "), want);
}

#[track_caller]
fn check_pod(spec: Value, status: Value, want: &str) {
    check("", "Pod", json!({ "spec": spec, "status": status }), want);
}

#[test]
fn pods() {
    let one = || json!({"containers": [{"name": "c"}]});
    let state = |state: Value| json!({"phase": "Running", "containerStatuses": [{"name": "c", "state": state, "ready": true, "restartCount": 0}]});
    check_pod(one(), json!({"phase": "Pending"}), "x | 0/1 | Pending | 0 | 5m");
    check_pod(one(), state(json!({"running": {}})), "x | 1/1 | Running | 0 | 5m");
    check_pod(
        one(),
        state(json!({"waiting": {"reason": "CrashLoopBackOff"}})),
        "x | 0/1 | CrashLoopBackOff | 0 | 5m",
    );
    check_pod(
        one(),
        state(json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}})),
        "x | 0/1 | OOMKilled | 0 | 5m",
    );
    check_pod(one(), state(json!({"terminated": {"exitCode": 3}})), "x | 0/1 | ExitCode:3 | 0 | 5m");
    check_pod(
        one(),
        state(json!({"terminated": {"signal": 9, "exitCode": 137}})),
        "x | 0/1 | Signal:9 | 0 | 5m",
    );
    check_pod(one(), json!({"phase": "Failed", "reason": "Evicted"}), "x | 0/1 | Evicted | 0 | 5m");
    check_pod(
        one(),
        json!({"phase": "Running", "containerStatuses": [{"state": {"running": {}}, "ready": true, "restartCount": 3,
            "lastState": {"terminated": {"finishedAt": "2026-01-02T02:54:00Z"}}}]}),
        "x | 1/1 | Running | 3 (6m ago) | 5m",
    );
    check_pod(
        one(),
        json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}),
        "x | 0/1 | SchedulingGated | 0 | 5m",
    );
    let two = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let mixed = |ready: &str| {
        json!({"phase": "Running", "conditions": [{"type": "Ready", "status": ready}], "containerStatuses": [
            {"name": "a", "state": {"terminated": {"reason": "Completed", "exitCode": 0}}, "restartCount": 0},
            {"name": "b", "state": {"running": {}}, "ready": true, "restartCount": 0}]})
    };
    check_pod(two.clone(), mixed("True"), "x | 1/2 | Running | 0 | 5m");
    check_pod(two, mixed("False"), "x | 1/2 | NotReady | 0 | 5m");
    check(
        "",
        "Pod",
        json!({"metadata": {"deletionTimestamp": "2026-01-02T02:59:00Z"}, "spec": one(), "status": {"phase": "Running"}}),
        "x | 0/1 | Terminating | 0 | 5m",
    );
    check_wide(
        "",
        "Pod",
        json!({"spec": {"nodeName": "n", "containers": [], "readinessGates": [{"conditionType": "g"}, {"conditionType": "h"}]},
               "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "g", "status": "True"}]}}),
        "x | 0/0 | Running | 0 | 5m | 10.0.0.1 | n | <none> | 1/2",
    );
}

#[test]
fn pods_with_init_containers() {
    let spec = || json!({"initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "c"}]});
    let init = |list: Value| json!({"phase": "Pending", "initContainerStatuses": list});
    check_pod(
        spec(),
        init(json!([{"name": "i", "state": {"running": {}}, "restartCount": 0}])),
        "x | 0/2 | Init:0/2 | 0 | 5m",
    );
    check_pod(
        spec(),
        init(json!([{"name": "i", "state": {"waiting": {"reason": "ImagePullBackOff"}}, "restartCount": 0}])),
        "x | 0/2 | Init:ImagePullBackOff | 0 | 5m",
    );
    check_pod(
        spec(),
        init(
            json!([{"name": "i", "state": {"terminated": {"exitCode": 2, "reason": "Error"}}, "restartCount": 2}]),
        ),
        "x | 0/2 | Init:Error | 2 | 5m",
    );
    check_pod(
        spec(),
        json!({"phase": "Running", "initContainerStatuses": [
                {"name": "i", "state": {"terminated": {"exitCode": 0}}, "restartCount": 5},
                {"name": "s", "state": {"running": {}}, "started": true, "ready": true, "restartCount": 1}],
               "containerStatuses": [{"name": "c", "state": {"running": {}}, "ready": true, "restartCount": 2}]}),
        "x | 2/2 | Running | 3 | 5m",
    );
}

#[test]
fn pods_whose_work_is_over_say_so() {
    let row = view(kind("", "Pod")).row(&json!({"status": {"phase": "Succeeded"}}), now());
    assert_eq!(row.conditions[0]["reason"], "Succeeded");
    assert!(view(kind("", "Pod")).row(&json!({"status": {"phase": "Running"}}), now()).conditions.is_empty());
}

#[test]
fn workloads() {
    let template =
        json!({"spec": {"containers": [{"name": "a", "image": "i:1"}, {"name": "b", "image": "j:2"}]}});
    let selector = json!({"matchLabels": {"app": "x"}, "matchExpressions": [{"key": "a", "operator": "In", "values": ["z", "y"]}, {"key": "b", "operator": "DoesNotExist"}]});
    check_wide(
        "apps",
        "Deployment",
        json!({"spec": {"replicas": 3, "template": template, "selector": selector}, "status": {"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 2}}),
        "x | 2/3 | 3 | 2 | 5m | a,b | i:1,j:2 | a in (y,z),app=x,!b",
    );
    check(
        "apps",
        "ReplicaSet",
        json!({"spec": {"replicas": 3}, "status": {"replicas": 2}}),
        "x | 3 | 2 | 0 | 5m",
    );
    check(
        "apps",
        "StatefulSet",
        json!({"spec": {"replicas": 3}, "status": {"readyReplicas": 1}}),
        "x | 1/3 | 5m",
    );
    check(
        "apps",
        "DaemonSet",
        json!({"spec": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}, "status": {"desiredNumberScheduled": 2, "numberReady": 1}}),
        "x | 2 | 0 | 1 | 0 | 0 | a=b | 5m",
    );
    check(
        "apps",
        "ControllerRevision",
        json!({"revision": 4, "metadata": {"ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "controller": true}]}}),
        "x | statefulset.apps/web | 4 | 5m",
    );
    check(
        "batch",
        "Job",
        json!({"spec": {"completions": 1}, "status": {"succeeded": 1, "startTime": "2026-01-02T02:55:00Z", "completionTime": "2026-01-02T02:55:07Z",
            "conditions": [{"type": "Complete", "status": "True"}]}}),
        "x | Complete | 1/1 | 7s | 5m",
    );
    check("batch", "Job", json!({"spec": {"parallelism": 3}}), "x | Running | 0/1 of 3 |  | 5m");
    check(
        "batch",
        "CronJob",
        json!({"spec": {"schedule": "* * * * *", "suspend": false}, "status": {"active": [{}]}}),
        "x | * * * * * | <none> | False | 1 | <none> | 5m",
    );
    check(
        "autoscaling",
        "HorizontalPodAutoscaler",
        json!({"spec": {"scaleTargetRef": {"kind": "Deployment", "name": "d"}, "maxReplicas": 5, "metrics": [
                {"type": "Resource", "resource": {"name": "cpu", "target": {"averageUtilization": 50}}},
                {"type": "Pods", "pods": {"target": {"averageValue": "10"}}}, {"type": "Object", "object": {"target": {"value": "1k"}}}]},
               "status": {"currentReplicas": 2, "currentMetrics": [{"resource": {"current": {"averageUtilization": 5}}}]}}),
        "x | Deployment/d | cpu: 5%/50%, <unknown>/10 + 1 more... | <unset> | 5 | 2 | 5m",
    );
}

#[test]
fn services_and_endpoints() {
    check_wide(
        "",
        "Service",
        json!({"spec": {"type": "NodePort", "clusterIPs": ["10.96.0.5"], "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}], "selector": {"a": "b"}}}),
        "x | NodePort | 10.96.0.5 | <none> | 80:30080/TCP,53/UDP | 5m | a=b",
    );
    check(
        "",
        "Service",
        json!({"spec": {"type": "LoadBalancer", "clusterIPs": ["None"]}}),
        "x | LoadBalancer | None | <pending> | <none> | 5m",
    );
    check(
        "",
        "Service",
        json!({"spec": {"type": "LoadBalancer", "externalIPs": ["9.9.9.9"]}, "status": {"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}, {"hostname": "h"}]}}}),
        "x | LoadBalancer | <none> | 2.2.2.2,h,9.9.9.9 | <none> | 5m",
    );
    check(
        "",
        "Service",
        json!({"spec": {"type": "ExternalName", "externalName": "e.x"}}),
        "x | ExternalName | <none> | e.x | <none> | 5m",
    );
    let subset =
        json!({"addresses": [{"ip": "1.1.1.1"}, {"ip": "fd00::1"}], "ports": [{"port": 1}, {"port": 2}]});
    check(
        "",
        "Endpoints",
        json!({ "subsets": [subset] }),
        "x | 1.1.1.1:1,[fd00::1]:1,1.1.1.1:2 + 1 more... | 5m",
    );
    check("", "Endpoints", json!({}), "x | <none> | 5m");
    check(
        "discovery.k8s.io",
        "EndpointSlice",
        json!({"addressType": "IPv4", "ports": [{"port": 80}, {}], "endpoints": [{"addresses": ["1.1.1.1"]}, {"addresses": ["2.2.2.2"]}]}),
        "x | IPv4 | 80,* | 1.1.1.1,2.2.2.2 | 5m",
    );
    check(
        "discovery.k8s.io",
        "EndpointSlice",
        json!({"addressType": "IPv4"}),
        "x | IPv4 | <unset> | <unset> | 5m",
    );
    check(
        "networking.k8s.io",
        "Ingress",
        json!({"spec": {"ingressClassName": "n", "tls": [{}], "rules": [{"host": "a"}, {"host": "b"}, {"host": "c"}, {"host": "d"}]}}),
        "x | n | a,b,c + 1 more... |  | 80, 443 | 5m",
    );
    check("networking.k8s.io", "NetworkPolicy", json!({"spec": {"podSelector": {}}}), "x | <none> | 5m");
}

#[test]
fn nodes_and_namespaces() {
    check_wide(
        "",
        "Node",
        json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": "", "kubernetes.io/role": "a"}}, "spec": {"unschedulable": true},
               "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
                "nodeInfo": {"kubeletVersion": "v1", "osImage": "o", "kernelVersion": "k", "architecture": "amd64", "containerRuntimeVersion": "r"}}}),
        "x | Ready,SchedulingDisabled | a,control-plane | 5m | v1 | 10.0.0.1 | <none> | o | k (amd64) | r",
    );
    check(
        "",
        "Node",
        json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}),
        "x | NotReady | <none> | 5m | ",
    );
    check("", "Node", json!({}), "x | Unknown | <none> | 5m | ");
    check("", "Namespace", json!({"status": {"phase": "Active"}}), "x | Active | 5m");
}

#[test]
fn events() {
    let event = json!({"type": "Normal", "reason": "Pulled", "message": " m \n", "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{c}"},
        "firstTimestamp": "2026-01-02T02:50:00Z", "lastTimestamp": "2026-01-02T02:59:50Z", "count": 4, "source": {"component": "kubelet", "host": "n"}});
    check_wide(
        "",
        "Event",
        event,
        "10s | Normal | Pulled | pod/p | spec.containers{c} | kubelet, n | m | 10m | 4 | x",
    );
    let single = json!({"type": "Warning", "reason": "R", "note": "m", "regarding": {"kind": "Node", "name": "n"},
        "eventTime": "2026-01-02T02:59:00.000000Z", "reportingController": "c"});
    check_wide("events.k8s.io", "Event", single, "60s | Warning | R | node/n |  | c | m | 60s | 1 | x");
}

#[test]
fn storage() {
    check("", "ConfigMap", json!({"data": {"a": "b"}, "binaryData": {"c": "d"}}), "x | 2 | 5m");
    check("", "Secret", json!({"type": "Opaque", "data": {"a": "b"}}), "x | Opaque | 1 | 5m");
    check(
        "",
        "PersistentVolumeClaim",
        json!({"spec": {"volumeName": "v", "storageClassName": "s"}, "status": {"phase": "Bound", "capacity": {"storage": "1024Mi"}, "accessModes": ["ReadWriteMany", "ReadWriteOnce"]}}),
        "x | Bound | v | 1Gi | RWO,RWX | s | <unset> | 5m",
    );
    check(
        "",
        "PersistentVolumeClaim",
        json!({"status": {"phase": "Pending"}}),
        "x | Pending |  |  |  |  | <unset> | 5m",
    );
    check(
        "",
        "PersistentVolume",
        json!({"spec": {"capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": "n", "name": "c"}}, "status": {"phase": "Bound"}}),
        "x | 1Gi |  | Retain | Bound | n/c |  | <unset> |  | 5m",
    );
    check(
        "storage.k8s.io",
        "StorageClass",
        json!({"metadata": {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}, "provisioner": "p"}),
        "x (default) | p | Delete | Immediate | false | 5m",
    );
}

#[test]
fn rules() {
    check_wide(
        "rbac.authorization.k8s.io",
        "RoleBinding",
        json!({"roleRef": {"kind": "ClusterRole", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "namespace": "n", "name": "s"}]}),
        "x | ClusterRole/r | 5m | u |  | n/s",
    );
    check(
        "policy",
        "PodDisruptionBudget",
        json!({"spec": {"minAvailable": "50%"}}),
        "x | 50% | N/A | 0 | 5m",
    );
    check(
        "",
        "ResourceQuota",
        json!({"status": {"hard": {"pods": "10", "limits.cpu": "2"}, "used": {"pods": "1"}}}),
        "x | pods: 1/10 | limits.cpu: 0/2 | 5m",
    );
    let request = |status: Value| json!({"spec": {"signerName": "a.io/b", "username": "me", "expirationSeconds": 3600}, "status": status});
    check(
        "certificates.k8s.io",
        "CertificateSigningRequest",
        request(json!({})),
        "x | 5m | a.io/b | me | 60m | Pending",
    );
    check(
        "certificates.k8s.io",
        "CertificateSigningRequest",
        request(json!({"conditions": [{"type": "Approved"}], "certificate": "eA=="})),
        "x | 5m | a.io/b | me | 60m | Approved,Issued",
    );
    check("rbac.authorization.k8s.io", "Role", json!({}), "x | 2026-01-02T02:55:00Z");
    check("", "LimitRange", json!({}), "x | 2026-01-02T02:55:00Z");
}

#[test]
fn ages_get_coarser() {
    let cases = [
        (-2, "<invalid>"),
        (-1, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (599, "9m59s"),
        (600, "10m"),
        (10799, "179m"),
        (10800, "3h"),
        (10860, "3h1m"),
        (8 * 3600, "8h"),
        (48 * 3600 - 1, "47h"),
        (48 * 3600, "2d"),
        (49 * 3600, "2d1h"),
        (8 * 86400, "8d"),
        (729 * 86400, "729d"),
        (730 * 86400, "2y"),
        (731 * 86400, "2y1d"),
        (2920 * 86400, "8y"),
    ];
    for (seconds, want) in cases {
        assert_eq!(human_duration(seconds), want, "{seconds}");
    }
}

#[test]
fn every_kind_has_as_many_cells_as_columns() {
    for kind in crate::KINDS {
        let view = view(kind);
        assert_eq!(view.row(&json!({}), now()).cells.len(), view.columns.len(), "{}", kind.kind);
        assert_eq!(view.definitions().as_array().map(Vec::len), Some(view.columns.len()));
    }
}
