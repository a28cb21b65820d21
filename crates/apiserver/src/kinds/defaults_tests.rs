//! A minimal object of each kind, and what the server makes of it: read like the output of
//! `kubectl get -o yaml`. `UPDATE_EXPECT=1` rewrites the expectation.

use minke_api::{Kind, schema};
use serde_json::{Value, json};

use super::strategy;

const EXPECTED: &str = include_str!("defaults_expected.json");

/// Decoding, defaults and encoding, as a create does it without admission.
fn created(mut object: Value) -> Value {
    let kind = kind_of(&object);
    let ty = schema::of(kind.group, kind.version, kind.kind).expect("every kind has a schema");
    schema::conform(ty, &mut object).expect("the object fits its type");
    (strategy(kind).set_defaults)(&mut object);
    (strategy(kind).prepare_create)(&mut object);
    schema::complete(ty, &mut object);
    object
}

fn kind_of(object: &Value) -> &'static Kind {
    let text = |field: &str| object[field].as_str().expect("apiVersion and kind");
    Kind::by_api_version(text("apiVersion"), text("kind")).expect("a served kind")
}

fn object(api_version: &str, kind: &str, more: Value) -> Value {
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x", "uid": "u"}});
    for (field, value) in more.as_object().expect("an object") {
        object[field] = value.clone();
    }
    object
}

fn minimal() -> Vec<Value> {
    let template = json!({"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "nginx"}]}});
    let once = json!({"metadata": {"labels": {"app": "x"}},
        "spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "nginx:1"}]}});
    let selector = json!({"matchLabels": {"app": "x"}});
    let workload = json!({"spec": {"selector": selector, "template": template}});
    let sized = json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1024Mi"}}});
    vec![
        object("v1", "Pod", json!({"spec": {"containers": [{"name": "c", "image": "nginx"}]}})),
        object(
            "v1",
            "Pod",
            json!({"spec": {
                "hostNetwork": true,
                "serviceAccount": "bot",
                "volumes": [
                    {"name": "empty"},
                    {"name": "secret", "secret": {"secretName": "s"}},
                    {"name": "host", "hostPath": {"path": "/"}},
                    {"name": "all", "projected": {"sources": [
                        {"serviceAccountToken": {"path": "token"}},
                        {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}},
                    ]}},
                ],
                "initContainers": [{"name": "i", "image": "a@sha256:00", "resources": {"limits": {"cpu": "0.5"}}}],
                "containers": [{"name": "c", "image": "nginx:1", "ports": [{"containerPort": 80}],
                    "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}],
                    "livenessProbe": {"httpGet": {"port": 80}},
                    "readinessProbe": {"grpc": {"port": 80}, "periodSeconds": 3},
                    "lifecycle": {"preStop": {"httpGet": {"port": 80}}},
                    "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}}],
            }}),
        ),
        object("v1", "PodTemplate", json!({"template": template})),
        object("v1", "ReplicationController", json!({"spec": {"template": template}})),
        object("v1", "Service", json!({"spec": {"ports": [{"port": 80}]}})),
        object(
            "v1",
            "Service",
            json!({"spec": {"type": "LoadBalancer", "sessionAffinity": "ClientIP", "ports": [{"port": 80, "targetPort": "http"}]}}),
        ),
        object("v1", "Namespace", json!({})),
        object("v1", "ConfigMap", json!({"data": {"a": "b"}})),
        object("v1", "Secret", json!({"stringData": {"a": "b"}})),
        object("v1", "ServiceAccount", json!({})),
        object(
            "v1",
            "Endpoints",
            json!({"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]}]}),
        ),
        object("v1", "Node", json!({"status": {"capacity": {"cpu": "2000m", "memory": "1048576Ki"}}})),
        object(
            "v1",
            "PersistentVolume",
            json!({"spec": {"capacity": {"storage": "1024Mi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/x"}}}),
        ),
        object("v1", "PersistentVolumeClaim", json!({"spec": sized})),
        object("v1", "LimitRange", json!({"spec": {"limits": [{"type": "Container", "max": {"cpu": "1"}}]}})),
        object("v1", "ResourceQuota", json!({"spec": {"hard": {"pods": 10, "cpu": "0.5"}}})),
        object("v1", "Event", json!({"involvedObject": {"kind": "Pod"}})),
        object("apps/v1", "Deployment", workload.clone()),
        object("apps/v1", "ReplicaSet", workload.clone()),
        object(
            "apps/v1",
            "StatefulSet",
            json!({"spec": {"selector": selector, "template": template,
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": sized}]}}),
        ),
        object("apps/v1", "DaemonSet", workload),
        object("apps/v1", "ControllerRevision", json!({"revision": 1, "data": {"a": 1}})),
        object("batch/v1", "Job", json!({"spec": {"template": once}})),
        object(
            "batch/v1",
            "CronJob",
            json!({"spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": once}}}}),
        ),
        object(
            "autoscaling/v2",
            "HorizontalPodAutoscaler",
            json!({"spec": {"maxReplicas": 3, "behavior": {},
            "scaleTargetRef": {"kind": "Deployment", "name": "x", "apiVersion": "apps/v1"}}}),
        ),
        object(
            "policy/v1",
            "PodDisruptionBudget",
            json!({"spec": {"minAvailable": 1, "selector": selector}}),
        ),
        object(
            "networking.k8s.io/v1",
            "Ingress",
            json!({"spec": {"defaultBackend": {"service": {"name": "x", "port": {"number": 80}}}}}),
        ),
        object(
            "networking.k8s.io/v1",
            "IngressClass",
            json!({"spec": {"controller": "a.b/c", "parameters": {"kind": "P", "name": "p"}}}),
        ),
        object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            json!({"spec": {"podSelector": {}, "ingress": [{"ports": [{"port": 80}]}]}}),
        ),
        object(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            json!({"addressType": "IPv4", "endpoints": [{"addresses": ["10.0.0.1"]}], "ports": [{"port": 80}]}),
        ),
        object("rbac.authorization.k8s.io/v1", "Role", json!({})),
        object(
            "rbac.authorization.k8s.io/v1",
            "RoleBinding",
            json!({"roleRef": {"kind": "Role", "name": "r"},
            "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s", "namespace": "n"}]}),
        ),
        object("scheduling.k8s.io/v1", "PriorityClass", json!({"value": 5})),
        object(
            "node.k8s.io/v1",
            "RuntimeClass",
            json!({"handler": "h", "overhead": {"podFixed": {"cpu": "0.1"}}}),
        ),
        object("coordination.k8s.io/v1", "Lease", json!({"spec": {"leaseDurationSeconds": 40}})),
        object("storage.k8s.io/v1", "StorageClass", json!({"provisioner": "p"})),
        object("storage.k8s.io/v1", "CSIDriver", json!({"spec": {}})),
        object("storage.k8s.io/v1", "CSINode", json!({"spec": {"drivers": []}})),
        object(
            "storage.k8s.io/v1",
            "VolumeAttachment",
            json!({"spec": {"attacher": "a", "nodeName": "n", "source": {"persistentVolumeName": "v"}}}),
        ),
    ]
}

#[test]
fn minimal_objects_become_whole() {
    let all: Vec<Value> = minimal().into_iter().map(created).collect();
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        let text = serde_json::to_string_pretty(&all).expect("values print") + "\n";
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/kinds/defaults_expected.json"), text)
            .expect("the source tree can be written");
        return;
    }
    let expected: Vec<Value> = serde_json::from_str(EXPECTED).expect("the expectation is JSON");
    for (got, want) in all.iter().zip(&expected) {
        assert_eq!(got, want, "{} {}", got["apiVersion"], got["kind"]);
    }
    assert_eq!(all.len(), expected.len());
}

#[test]
fn defaults_are_filled_once() {
    for object in minimal() {
        let kind = kind_of(&object);
        let once = created(object);
        let mut twice = once.clone();
        (strategy(kind).set_defaults)(&mut twice);
        assert_eq!(twice, once, "{}", kind.kind);
    }
}

/// What a create stores passes the kind's own checks, and so does an update that changes nothing.
#[test]
fn whole_objects_are_valid() {
    for object in minimal() {
        let kind = kind_of(&object);
        let mut whole = created(object);
        if kind.kind == "Service" {
            whole["spec"]["clusterIP"] = "10.96.0.7".into();
            whole["spec"]["clusterIPs"] = json!(["10.96.0.7"]);
        }
        let mut errors = minke_api::FieldErrors::default();
        (strategy(kind).validate)(&whole, &mut errors);
        let mut same = whole.clone();
        (strategy(kind).prepare_update)(&mut same, &whole);
        assert_eq!(same, whole, "{}: an update that changes nothing", kind.kind);
        (strategy(kind).validate_update)(&same, &whole, &mut errors);
        assert_eq!(errors.into_result(kind, "x").map_err(|status| status.message), Ok(()));
    }
}

/// Every way to the values inside `value`, as JSON pointers.
fn paths(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut inside = |name: &str, child: &Value| {
        let path = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        found.push(path.clone());
        paths(child, &path, found);
    };
    match value {
        Value::Object(members) => members.iter().for_each(|(name, child)| inside(name, child)),
        Value::Array(items) => items.iter().enumerate().for_each(|(n, child)| inside(&n.to_string(), child)),
        _ => {}
    }
}

/// Whatever is missing or odd anywhere, as long as it fits its type: filling twice is filling once, and no
/// check panics.
#[test]
fn damaged_objects_are_filled_once_and_checked() {
    for object in minimal() {
        let kind = kind_of(&object);
        let ty = schema::of(kind.group, kind.version, kind.kind).expect("every kind has a schema");
        let strategy = strategy(kind);
        let whole = created(object);
        let mut all = Vec::new();
        paths(&whole, "", &mut all);
        for path in all.iter().filter(|path| !matches!(path.as_str(), "/kind" | "/apiVersion" | "/metadata"))
        {
            for damage in [
                Value::Null,
                json!(""),
                json!("x"),
                json!(-1),
                json!([]),
                json!([{}]),
                json!({}),
                json!(true),
            ] {
                let mut once = whole.clone();
                *once.pointer_mut(path).expect("a path of the object") = damage;
                if schema::conform(ty, &mut once).is_err() {
                    continue;
                }
                (strategy.set_defaults)(&mut once);
                let mut twice = once.clone();
                (strategy.set_defaults)(&mut twice);
                assert_eq!(twice, once, "{} {path}", kind.kind);
                let mut errors = minke_api::FieldErrors::default();
                (strategy.validate)(&once, &mut errors);
                (strategy.validate_update)(&once, &whole, &mut errors);
                (strategy.validate_update)(&whole, &once, &mut errors);
                (strategy.prepare_update)(&mut twice, &whole);
                (strategy.prepare_create)(&mut once);
                (strategy.warnings)(&once);
            }
        }
    }
}
