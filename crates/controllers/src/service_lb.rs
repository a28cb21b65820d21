//! Gives services of type LoadBalancer an address: those of the nodes, which is where the proxy answers.
//!
//! Upstream leaves this to cloud providers (k8s.io/cloud-provider, controllers/service), whose events these are.

use std::collections::BTreeSet;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::{Kind, Status};
use minke_client::Change;

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::run::Controller;

const EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub(crate) struct ServiceLb;

fn is_ours(service: &Service) -> bool {
    let spec = service.spec.as_ref();
    spec.is_some_and(|spec| {
        spec.type_.as_deref() == Some("LoadBalancer") && spec.load_balancer_class.is_none()
    })
}

/// Where the service can be reached: at the external addresses of the nodes, or else the internal ones. `serving`
/// are the nodes with endpoints, if only those answer.
fn ingress(
    nodes: &[Typed<Node>],
    serving: Option<&BTreeSet<String>>,
    family: &str,
) -> Vec<LoadBalancerIngress> {
    let usable = |node: &&Typed<Node>| {
        let here = serving.is_none_or(|serving| serving.contains(node.object.name()));
        here && is_ready(node) && node.object.labels().get(EXCLUDED).is_none()
    };
    let of = |type_: &str| -> Vec<LoadBalancerIngress> {
        let addresses = nodes.iter().filter(usable).flat_map(|node| {
            let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            addresses.filter(|address| address.type_ == type_).map(|address| address.address.clone())
        });
        let ips: BTreeSet<String> = addresses.filter(|ip| ip.contains(':') == (family == "IPv6")).collect();
        let ingress = |ip| LoadBalancerIngress {
            ip: Some(ip),
            ip_mode: Some("VIP".to_owned()),
            ..LoadBalancerIngress::default()
        };
        ips.into_iter().map(ingress).collect()
    };
    let external = of("ExternalIP");
    if external.is_empty() { of("InternalIP") } else { external }
}

fn is_ready(node: &Node) -> bool {
    let mut conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[async_trait]
impl Controller for ServiceLb {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Service>(), Kind::of::<Node>(), Kind::of::<EndpointSlice>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        let services = Kind::of::<Service>();
        if object.kind() == services {
            return vec![Item::of(object)];
        }
        let concerned =
            |service: &std::sync::Arc<minke_api::Object>| service.field("spec.type") == Some("LoadBalancer");
        if object.kind() == Kind::of::<EndpointSlice>() {
            let Some(name) = object.labels().get(SERVICE_NAME) else { return Vec::new() };
            let service = ctx.informers.of(services).get(object.namespace(), name).filter(concerned);
            return service.iter().map(|service| Item::of(service)).collect();
        }
        if !node_matters(change) {
            return Vec::new();
        }
        let all = ctx.informers.of(services).snapshot();
        all.values().filter(|service| concerned(service)).map(|service| Item::of(service)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(service) = ctx.get::<Service>(&item.key) else { return Ok(Requeue::Never) };
        let mut status = service.status.clone().unwrap_or_default();
        let had = status.load_balancer.clone().and_then(|balancer| balancer.ingress).unwrap_or_default();
        let ours = is_ours(&service);
        let another = service.spec.as_ref().is_some_and(|spec| spec.load_balancer_class.is_some());
        if service.object.deleted().is_some() || another {
            return Ok(Requeue::Never);
        }
        let wanted = if ours { self.wanted(ctx, &service) } else { Vec::new() };
        if wanted == had {
            return Ok(Requeue::Never);
        }
        let (before, after) = match ours {
            true => (
                ("EnsuringLoadBalancer", "Ensuring load balancer"),
                ("EnsuredLoadBalancer", "Ensured load balancer"),
            ),
            false => (
                ("DeletingLoadBalancer", "Deleting load balancer"),
                ("DeletedLoadBalancer", "Deleted load balancer"),
            ),
        };
        ctx.events.normal(&service.object, before.0, before.1);
        let ingress = (!wanted.is_empty()).then_some(wanted);
        status.load_balancer = Some(LoadBalancerStatus { ingress });
        ctx.update_status(&service.object, &status).await?;
        ctx.events.normal(&service.object, after.0, after.1);
        Ok(Requeue::Never)
    }
}

impl ServiceLb {
    fn wanted(&self, ctx: &Ctx, service: &Typed<Service>) -> Vec<LoadBalancerIngress> {
        let nodes: Vec<Typed<Node>> =
            ctx.informer::<Node>().snapshot().values().cloned().filter_map(Typed::new).collect();
        let policy = service.spec.as_ref().and_then(|spec| spec.external_traffic_policy.as_deref());
        let serving = (policy == Some("Local")).then(|| {
            let slices = ctx.controlled_by(&service.object, Kind::of::<EndpointSlice>());
            let endpoints = slices.into_iter().filter_map(Typed::<EndpointSlice>::new);
            let endpoints = endpoints.flat_map(|slice| slice.endpoints.clone().unwrap_or_default());
            let ready = endpoints
                .filter(|endpoint| endpoint.conditions.as_ref().is_none_or(|c| c.ready != Some(false)));
            ready.filter_map(|endpoint| endpoint.node_name).collect::<BTreeSet<_>>()
        });
        let families = crate::endpointslice::families(service);
        families.into_iter().flat_map(|family| ingress(&nodes, serving.as_ref(), family)).collect()
    }
}

/// Whether a change of a node changes what services are told. Heartbeats do not.
fn node_matters(change: &Change) -> bool {
    let facts = |object: &Option<std::sync::Arc<minke_api::Object>>| {
        let node = Typed::<Node>::new(object.clone()?)?;
        let addresses = node.status.as_ref().and_then(|status| status.addresses.clone());
        Some((is_ready(&node), addresses, node.object.labels().get(EXCLUDED).is_some()))
    };
    facts(&change.old) != facts(&change.new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(name: &str, ip: &str, ready: &str) -> Typed<Node> {
        let value = json!({"metadata": {"name": name}, "status": {
            "addresses": [{"type": "InternalIP", "address": ip}, {"type": "Hostname", "address": name}],
            "conditions": [{"type": "Ready", "status": ready}]}});
        Typed::new(minke_api::Object::from_value(Kind::of::<Node>(), &value).unwrap().into()).unwrap()
    }

    #[test]
    fn ready_nodes_are_where_a_service_is_reached() {
        let nodes =
            [node("a", "10.0.0.1", "True"), node("b", "10.0.0.2", "False"), node("c", "10.0.0.3", "True")];
        let ips = |serving: Option<&BTreeSet<String>>| -> Vec<String> {
            ingress(&nodes, serving, "IPv4").into_iter().filter_map(|ingress| ingress.ip).collect()
        };
        assert_eq!(ips(None), ["10.0.0.1", "10.0.0.3"]);
        assert_eq!(ips(Some(&BTreeSet::from(["c".to_owned()]))), ["10.0.0.3"]);
        assert!(ingress(&nodes, None, "IPv6").is_empty());
    }
}
