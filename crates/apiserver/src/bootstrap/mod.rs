//! What every cluster has from the start: namespaces, default roles, priority classes, the default storage class, the
//! Service `kubernetes` with its endpoints, and what clients look up in kube-system.
//!
//! [`ensure`] makes what is missing and writes nothing when nothing is; [`keep`] puts back what goes missing
//! while the server runs, told by watches. Aggregated roles get their rules from a controller.

mod roles;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, TryStreamExt};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::api::rbac::v1 as rbac;
use k8s_openapi::api::scheduling::v1 as scheduling;
use k8s_openapi::api::storage::v1 as storage;
use minke_api::{FieldSelector, Kind, Object, Status};
use minke_client::{Client, DeleteOptions, Informers, Target, WorkQueue};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::kinds::SYSTEM_PRIORITIES;
use crate::kinds::tree::Tree;
use crate::{Config, kubernetes_service_address};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];
/// Name of the Service by which pods reach the API server, and of its endpoints; in `default`.
const KUBERNETES: &str = "kubernetes";
/// Writes that are under way at once: they share the store's commits.
const AT_ONCE: usize = 64;

/// Makes what every cluster has. `client` acts as the API server itself and may do everything.
pub async fn ensure(client: &dyn Client, config: &Config) -> Result<(), Status> {
    namespaces(client).await?;
    let mut objects = fixed(config);
    objects.extend(roles::defaults());
    stream::iter(objects.iter().map(Ok))
        .try_for_each_concurrent(AT_ONCE, |object| async move { default_object(client, object).await })
        .await?;
    kubernetes(client, config).await
}

/// The parts that [`keep`] watches over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Part {
    Namespaces,
    Kubernetes,
}

/// Puts back what is deleted or changed, until `stop`.
pub async fn keep(informers: Arc<Informers>, config: Config, stop: CancellationToken) {
    let queue = Arc::new(WorkQueue::new(Duration::from_millis(50), Duration::from_secs(30)));
    let by_name = || FieldSelector::name(KUBERNETES);
    let watched = [
        (informers.of_type::<core::Namespace>(), Part::Namespaces),
        (informers.selected(Kind::of::<core::Service>(), by_name()), Part::Kubernetes),
        (informers.selected(Kind::of::<core::Endpoints>(), by_name()), Part::Kubernetes),
        (informers.selected(Kind::of::<discovery::EndpointSlice>(), by_name()), Part::Kubernetes),
    ];
    for (informer, part) in watched {
        let (queue, stop) = (queue.clone(), stop.clone());
        let mut changes = informer.subscribe();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    change = changes.recv() => match change {
                        Some(change) if concerns(part, change.object()) => queue.add(part),
                        Some(_) => {}
                        None => return,
                    }
                }
            }
        });
    }
    let client = informers.client().clone();
    loop {
        let part = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            part = queue.next() => part,
        };
        let outcome = match part {
            Part::Namespaces => namespaces(&*client).await,
            Part::Kubernetes => kubernetes(&*client, &config).await,
        };
        match outcome {
            Ok(()) => queue.forget(&part),
            Err(error) => {
                tracing::warn!(?part, %error, "Cannot put back what the cluster should have");
                queue.retry(part);
            }
        }
        queue.done(&part);
    }
}

fn concerns(part: Part, object: &Object) -> bool {
    match part {
        Part::Namespaces => NAMESPACES.contains(&object.name()),
        Part::Kubernetes => object.namespace() == "default",
    }
}

async fn namespaces(client: &dyn Client) -> Result<(), Status> {
    let all =
        NAMESPACES.map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}));
    stream::iter(all.iter().map(Ok))
        .try_for_each_concurrent(AT_ONCE, |object| async move {
            create_if_missing(client, object).await.map(drop)
        })
        .await
}

fn target(object: &Value) -> Target<'_> {
    let kind = Kind::by_api_version(object.text("apiVersion"), object.text("kind"));
    let metadata = object.at("metadata");
    Target::object(
        kind.expect("what bootstrap makes is of a served kind"),
        metadata.text("namespace"),
        metadata.text("name"),
    )
}

/// The stored object, made first if need be.
async fn create_if_missing(client: &dyn Client, object: &Value) -> Result<Arc<Object>, Status> {
    let target = target(object);
    match client.get(target).await {
        Err(status) if status.is_not_found() => {}
        answer => return answer,
    }
    match client.create(Target { name: "", ..target }, object.clone()).await {
        // Someone else made it meanwhile.
        Err(status) if status.is_already_exists() => client.get(target).await,
        answer => answer,
    }
}

/// Makes a default object, or brings a stored role or binding up to date.
async fn default_object(client: &dyn Client, object: &Value) -> Result<(), Status> {
    let stored = create_if_missing(client, object).await?;
    if stored.kind().group != Kind::of::<rbac::Role>().group {
        return Ok(());
    }
    let mut value = stored.value();
    // The encoder writes empty lists that the table leaves out.
    value.unset_empty("rules");
    let target = Target::of(&stored);
    if roles::is_of_another_role(&value, object) {
        client.delete(target, DeleteOptions::default()).await?;
        return client.create(Target { name: "", ..target }, object.clone()).await.map(drop);
    }
    match roles::reconciled(&value, object) {
        Some(wanted) => client.update(target, wanted).await.map(drop),
        None => Ok(()),
    }
}

/// Objects that are made once and then belong to the administrator.
fn fixed(config: &Config) -> Vec<Value> {
    let descriptions = [
        "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        "Used for system critical pods that must not be moved from their current node.",
    ];
    let priority = Kind::of::<scheduling::PriorityClass>().api_version();
    let mut objects: Vec<Value> = SYSTEM_PRIORITIES
        .iter()
        .zip(descriptions)
        .map(|((name, value), description)| {
            json!({"apiVersion": priority, "kind": "PriorityClass", "metadata": {"name": name},
                "value": value, "description": description})
        })
        .collect();
    let map = |name: &str, key: &str, value: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "kube-system"},
            "data": {key: value}})
    };
    objects.push(map("extension-apiserver-authentication", "client-ca-file", &config.client_ca));
    let today = minke_api::time::format_seconds(config.clock.now());
    let today = today.split('T').next().unwrap_or_default();
    objects.push(map("kube-apiserver-legacy-service-account-token-tracking", "since", today));
    objects.push(json!({
        "apiVersion": Kind::of::<storage::StorageClass>().api_version(), "kind": "StorageClass",
        "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": minke_api::storage::LOCAL_PATH, "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Delete", "allowVolumeExpansion": false,
    }));
    objects.push(json!({
        "apiVersion": Kind::of::<networking::ServiceCIDR>().api_version(), "kind": "ServiceCIDR",
        "metadata": {"name": KUBERNETES}, "spec": {"cidrs": [config.service_cidr.to_string()]},
    }));
    objects
}

/// The Service `kubernetes`, its Endpoints and EndpointSlice, as they should be.
fn kubernetes_objects(config: &Config) -> [Value; 3] {
    let service_ip = kubernetes_service_address(&config.service_cidr);
    let (address, port) = (config.advertise.ip(), config.advertise.port());
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let metadata = |labels: Value| json!({"name": KUBERNETES, "namespace": "default", "labels": labels});
    let port = json!({"name": "https", "port": port, "protocol": "TCP"});
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": metadata(json!({"component": "apiserver", "provider": "kubernetes"})),
            "spec": {
                "type": "ClusterIP", "clusterIP": service_ip.to_string(), "sessionAffinity": "None",
                "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": config.advertise.port()}],
            },
        }),
        json!({
            "apiVersion": "v1", "kind": "Endpoints",
            "metadata": metadata(json!({"endpointslice.kubernetes.io/skip-mirror": "true"})),
            "subsets": [{"addresses": [{"ip": address.to_string()}], "ports": [port]}],
        }),
        json!({
            "apiVersion": Kind::of::<discovery::EndpointSlice>().api_version(), "kind": "EndpointSlice",
            "metadata": metadata(json!({"kubernetes.io/service-name": KUBERNETES})),
            "addressType": family,
            "endpoints": [{"addresses": [address.to_string()], "conditions": {"ready": true}}],
            "ports": [port],
        }),
    ]
}

/// Keeps the Service `kubernetes` and its endpoints as they should be.
async fn kubernetes(client: &dyn Client, config: &Config) -> Result<(), Status> {
    for wanted in kubernetes_objects(config) {
        let stored = create_if_missing(client, &wanted).await?;
        if let Some(value) = corrected(&stored.value(), &wanted) {
            client.update(Target::of(&stored), value).await?;
        }
    }
    Ok(())
}

/// The stored object with what differs put right; none when nothing does. The address of the Service
/// cannot be changed and is left.
fn corrected(stored: &Value, wanted: &Value) -> Option<Value> {
    let mut value = stored.clone();
    for (key, label) in wanted.at("metadata").members("labels") {
        value.object("metadata").object("labels").set(key, label.clone());
    }
    for field in ["subsets", "endpoints", "ports"] {
        if let Some(list) = wanted.get(field) {
            value.set(field, list.clone());
        }
    }
    for field in ["type", "sessionAffinity", "ports"] {
        if let Some(part) = wanted.at("spec").get(field) {
            value.object("spec").set(field, part.clone());
        }
    }
    (value != *stored).then_some(value)
}
