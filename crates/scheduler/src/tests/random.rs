//! Random clusters, small enough to meet every rule and large enough for ties.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node as NodeObject;
use k8s_openapi::api::core::v1::Pod;
use minke_api::{Kind, Object};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

pub struct Random(pub SmallRng);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(SmallRng::seed_from_u64(seed))
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    fn of<'a>(&mut self, values: &[&'a str]) -> &'a str {
        values.choose(&mut self.0).expect("there is something to choose from")
    }

    pub fn node(&mut self, name: &str) -> Value {
        let mut labels = json!({ "disk": self.of(&["ssd", "hdd"]), "cores": self.of(&["4", "16", "64"]) });
        if self.chance(90) {
            labels["kubernetes.io/hostname"] = name.into();
        }
        if self.chance(80) {
            labels["topology.kubernetes.io/zone"] = self.of(&["a", "b", "c"]).into();
        }
        let mut taints = Vec::new();
        for effect in ["NoSchedule", "PreferNoSchedule", "NoExecute"] {
            if self.chance(15) {
                taints.push(json!({ "key": self.of(&["gpu", "spot"]), "value": self.of(&["x", "y"]), "effect": effect }));
            }
        }
        let mut allocatable = json!({
            "cpu": self.of(&["2", "4", "8"]), "memory": self.of(&["4Gi", "8Gi", "16Gi"]), "pods": self.of(&["4", "8", "20"]),
            "ephemeral-storage": "10Gi",
        });
        if self.chance(30) {
            allocatable["example.com/gpu"] = self.of(&["1", "2", "4"]).into();
        }
        let mut images = Vec::new();
        for image in ["web:1", "db:latest"] {
            if self.chance(30) {
                images.push(json!({ "names": [image], "sizeBytes": self.of(&["100", "400", "900"]).parse::<i64>().unwrap() << 20 }));
            }
        }
        json!({
            "metadata": { "name": name, "labels": labels },
            "spec": { "taints": taints, "unschedulable": self.chance(8) },
            "status": { "allocatable": allocatable, "images": images },
        })
    }

    fn selector(&mut self) -> Value {
        match self.below(3) {
            0 => json!({ "matchLabels": { "app": self.of(&["a", "b"]) } }),
            1 => json!({ "matchExpressions": [{ "key": "tier", "operator": "Exists" }] }),
            _ => {
                json!({ "matchExpressions": [{ "key": "app", "operator": "NotIn", "values": [self.of(&["a", "b"])] }] })
            }
        }
    }

    fn key(&mut self) -> &'static str {
        self.of(&["kubernetes.io/hostname", "topology.kubernetes.io/zone", "disk"])
    }

    fn term(&mut self) -> Value {
        let mut term = json!({ "topologyKey": self.key(), "labelSelector": self.selector() });
        match self.below(5) {
            0 => term["namespaces"] = json!(["one", "two"]),
            1 => term["namespaceSelector"] = json!({}),
            2 => term["namespaceSelector"] = json!({ "matchLabels": { "team": "x" } }),
            _ => {}
        }
        term
    }

    fn node_requirement(&mut self) -> Value {
        match self.below(4) {
            0 => json!({ "key": "disk", "operator": "In", "values": [self.of(&["ssd", "hdd"])] }),
            1 => json!({ "key": "cores", "operator": self.of(&["Gt", "Lt"]), "values": ["8"] }),
            2 => {
                json!({ "key": "topology.kubernetes.io/zone", "operator": self.of(&["Exists", "DoesNotExist"]) })
            }
            _ => json!({ "key": "topology.kubernetes.io/zone", "operator": "NotIn", "values": ["a"] }),
        }
    }

    /// A pod with a few of everything that scheduling looks at; `rich` makes each more likely.
    pub fn pod(&mut self, name: &str, rich: u32) -> Value {
        let mut container = json!({ "name": "c", "image": self.of(&["web:1", "db", "other:2"]) });
        let mut requests = json!({});
        if self.chance(70) {
            requests["cpu"] = self.of(&["100m", "500m", "1", "3"]).into();
        }
        if self.chance(60) {
            requests["memory"] = self.of(&["128Mi", "1Gi", "3Gi"]).into();
        }
        if self.chance(rich / 4) {
            requests["example.com/gpu"] = "1".into();
        }
        container["resources"] = json!({ "requests": requests });
        if self.chance(rich / 4) {
            container["ports"] = json!([{ "containerPort": 80, "hostPort": self.of(&["80", "81"]).parse::<i32>().unwrap(),
                "hostIP": self.of(&["", "10.0.0.1", "10.0.0.2"]) }]);
        }
        let mut spec = json!({ "containers": [container], "priority": self.below(4) as i64 * 10 });
        if self.chance(rich / 3) {
            spec["initContainers"] = json!([{ "name": "s", "image": "side:1", "restartPolicy": "Always",
                "resources": { "requests": { "cpu": "200m" } } }]);
        }
        if self.chance(rich / 4) {
            spec["overhead"] = json!({ "cpu": "50m", "memory": "64Mi" });
        }
        if self.chance(rich) {
            spec["tolerations"] = match self.below(3) {
                0 => json!([{ "operator": "Exists" }]),
                1 => json!([{ "key": "gpu", "operator": "Equal", "value": "x" }]),
                _ => json!([{ "key": "spot", "operator": "Exists", "effect": "NoSchedule" }]),
            };
        }
        if self.chance(rich / 4) {
            spec["nodeSelector"] = json!({ "disk": self.of(&["ssd", "hdd"]) });
        }
        let mut affinity = json!({});
        if self.chance(rich / 3) {
            let required = json!({ "nodeSelectorTerms": [{ "matchExpressions": [self.node_requirement()] }, { "matchExpressions": [self.node_requirement(), self.node_requirement()] }] });
            affinity["nodeAffinity"] = json!({ "requiredDuringSchedulingIgnoredDuringExecution": required });
        }
        if self.chance(rich / 3) {
            affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] = json!([
                { "weight": 1 + self.below(50), "preference": { "matchExpressions": [self.node_requirement()] } },
                { "weight": 1 + self.below(50), "preference": { "matchExpressions": [self.node_requirement()] } }]);
        }
        for side in ["podAffinity", "podAntiAffinity"] {
            if self.chance(rich / 4) {
                let terms: Vec<Value> = (0..1 + self.below(2)).map(|_| self.term()).collect();
                affinity[side]["requiredDuringSchedulingIgnoredDuringExecution"] = terms.into();
            }
            if self.chance(rich / 3) {
                affinity[side]["preferredDuringSchedulingIgnoredDuringExecution"] =
                    json!([{ "weight": 1 + self.below(100), "podAffinityTerm": self.term() }]);
            }
        }
        spec["affinity"] = affinity;
        let mut constraints = Vec::new();
        for (when, key) in [
            ("DoNotSchedule", "topology.kubernetes.io/zone"),
            ("DoNotSchedule", "kubernetes.io/hostname"),
            ("ScheduleAnyway", "topology.kubernetes.io/zone"),
            ("ScheduleAnyway", "kubernetes.io/hostname"),
        ] {
            if self.chance(rich / 4) {
                let mut constraint = json!({ "maxSkew": 1 + self.below(2), "topologyKey": key, "whenUnsatisfiable": when, "labelSelector": self.selector() });
                if self.chance(20) {
                    constraint["nodeTaintsPolicy"] = "Honor".into();
                }
                if self.chance(20) {
                    constraint["nodeAffinityPolicy"] = "Ignore".into();
                }
                if when == "DoNotSchedule" && self.chance(30) {
                    constraint["minDomains"] = json!(1 + self.below(4));
                }
                if self.chance(20) {
                    constraint["matchLabelKeys"] = json!(["tier"]);
                }
                constraints.push(constraint);
            }
        }
        spec["topologySpreadConstraints"] = constraints.into();
        let mut labels = json!({ "app": self.of(&["a", "b", "c"]) });
        if self.chance(50) {
            labels["tier"] = self.of(&["front", "back"]).into();
        }
        let namespace = self.of(&["one", "two"]);
        let mut metadata =
            json!({ "name": name, "namespace": namespace, "uid": name, "labels": labels, "generation": 1 });
        if self.chance(50) {
            metadata["ownerReferences"] = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "set", "uid": "set", "controller": true }]);
        }
        json!({ "metadata": metadata, "spec": spec })
    }
}

pub fn node(value: &Value) -> NodeObject {
    serde_json::from_value(value.clone()).expect("random nodes fit their type")
}

pub fn object(value: &Value) -> Arc<Object> {
    Arc::new(Object::from_value(Kind::of::<Pod>(), value).expect("random pods are objects"))
}

/// What the two ReplicaSets and the Service of the random clusters select.
pub fn workloads() -> crate::workloads::Workloads {
    let mut workloads = crate::workloads::Workloads::default();
    let mut add = |api_version: &str, kind: &str, value: Value| {
        let kind = Kind::by_api_version(api_version, kind).expect("a known kind");
        let new = Some(Arc::new(Object::from_value(kind, &value).expect("an object")));
        workloads.changed(&minke_client::Change { old: None, new });
    };
    for namespace in ["one", "two"] {
        let set = json!({ "metadata": { "name": "set", "namespace": namespace },
            "spec": { "selector": { "matchExpressions": [{ "key": "app", "operator": "In", "values": ["a", "b"] }] } } });
        add("apps/v1", "ReplicaSet", set);
    }
    add(
        "v1",
        "Service",
        json!({ "metadata": { "name": "front", "namespace": "one" }, "spec": { "selector": { "tier": "front" } } }),
    );
    workloads
}
