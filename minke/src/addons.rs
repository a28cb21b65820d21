//! Objects that every cluster has because of what Minke runs beside it: those of the cluster DNS, as kubeadm
//! makes them for CoreDNS, so that clients which look for them find them.

use anyhow::{Context, Result};
use ipnet::Ipv4Net;
use minke_api::{Kind, Status};
use minke_client::{Client, Target};
use serde_json::{Value, json};

use crate::node::dns_address;

/// Makes what is missing, and leaves alone what is there.
pub async fn ensure(client: &dyn Client, service_cidr: Ipv4Net) -> Result<()> {
    for object in objects(&dns_address(service_cidr).to_string()) {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (kind, name, namespace) = (text("/kind"), text("/metadata/name"), text("/metadata/namespace"));
        let kind =
            Kind::by_api_version(&text("/apiVersion"), &kind).with_context(|| format!("no kind {kind}"))?;
        match client.get(Target::object(kind, &namespace, &name)).await {
            Err(error) if error.is_not_found() => {}
            Ok(_) => continue,
            Err(error) => return Err(error).with_context(|| format!("read {} {name}", kind.plural)),
        }
        match client.create(Target::collection(kind, &namespace), object).await {
            Ok(_) => {}
            Err(error) if error.is_already_exists() => {}
            // A Service of another name took the address, as it may when nobody uses the cluster DNS.
            Err(error) if is_taken(&error) => {
                tracing::warn!(%error, "The address of the cluster DNS is taken")
            }
            Err(error) => return Err(error).with_context(|| format!("make {} {name}", kind.plural)),
        }
    }
    Ok(())
}

fn is_taken(error: &Status) -> bool {
    error.code == 422 && error.message.contains("already allocated")
}

fn objects(address: &str) -> [Value; 5] {
    let labels = json!({
        "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS",
    });
    let ports = |name: &str| -> Value {
        let port = |port: &str, protocol: &str| json!({"name": port, "port": 53, "protocol": protocol});
        match name {
            "service" => json!([
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ]),
            _ => json!([port("dns", "UDP"), port("dns-tcp", "TCP")]),
        }
    };
    let rule = |group: &str, resources: &[&str]| json!({"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]});
    [
        json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "coredns", "namespace": "kube-system"},
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "system:coredns"},
            "rules": [rule("", &["endpoints", "services", "pods", "namespaces"]), rule("discovery.k8s.io", &["endpointslices"])],
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}],
        }),
        // It has no selector: what answers is no pod, but every node's own server at this very address.
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": labels},
            "spec": {"clusterIP": address, "ports": ports("service"), "type": "ClusterIP"},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {
                "kubernetes.io/service-name": "kube-dns", "endpointslice.kubernetes.io/managed-by": "minke",
            }},
            "addressType": "IPv4", "ports": ports("slice"),
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        }),
    ]
}
