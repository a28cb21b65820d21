//! The kinds of metrics.k8s.io, which the `k8s_openapi` crate does not have. Upstream: k8s.io/metrics.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use serde_json::{Value, json};

use crate::definitions::Collector;

const PACKAGE: &str = "io.k8s.metrics.pkg.apis.metrics.v1beta1";

pub fn collect(c: &mut Collector) {
    for name in [c.plain::<meta::ObjectMeta>(), c.plain::<meta::Time>(), c.plain::<Quantity>()] {
        assert!(name.starts_with("io.k8s.apimachinery"), "{name} is referred to by its full name");
    }
    let usage = json!({
        "description": "What is used of each resource: cpu, memory.",
        "type": "object",
        "additionalProperties": { "$ref": "#/definitions/io.k8s.apimachinery.pkg.api.resource.Quantity" },
    });
    let container = json!({
        "description": "ContainerMetrics says what a container uses.",
        "type": "object",
        "properties": {
            "name": { "type": "string", "description": "The container's name in the pod." },
            "usage": usage,
        },
        "required": ["name", "usage"],
    });
    c.definition(&format!("{PACKAGE}.ContainerMetrics"), container);
    let containers = json!({
        "description": "What each container uses, as of the same window.",
        "type": "array",
        "items": { "$ref": format!("#/definitions/{PACKAGE}.ContainerMetrics") },
    });
    let of = |what: &str, field: &str, schema: &Value| {
        json!({
            "description": what,
            "type": "object",
            "properties": {
                "apiVersion": { "type": "string", "description": "The version of the schema that this object is written in." },
                "kind": { "type": "string", "description": "The name of the type of this object." },
                "metadata": {
                    "$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
                    "description": "Standard object metadata.",
                },
                "timestamp": {
                    "$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.Time",
                    "description": "When the window ended.",
                },
                "window": { "type": "string", "description": "How long the window was, such as 15s." },
                field: schema,
            },
            "required": ["metadata", "timestamp", "window", field],
        })
    };
    let node = of("NodeMetrics says what a node uses.", "usage", &usage);
    let pod = of("PodMetrics says what the containers of a pod use.", "containers", &containers);
    for (kind, schema) in [("NodeMetrics", node), ("PodMetrics", pod)] {
        let name = format!("{PACKAGE}.{kind}");
        c.definition(&name, schema);
        c.listed("metrics.k8s.io", "v1beta1", kind, &name);
    }
}
