//! Keeps the Endpoints of services with a selector, for those who do not read EndpointSlices yet.
//!
//! Upstream: pkg/controller/endpoint.

use std::collections::BTreeMap;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Pod, Service};
use minke_api::time::format_seconds;
use minke_api::{Kind, Status};
use minke_client::{Change, DeleteOptions, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::endpointslice::{TRIGGER_TIME, families, labels, trigger_time};
use crate::pods;
use crate::run::Controller;
use crate::services::{self, SelectorIndex};

/// Addresses that an Endpoints holds at most, over all its subsets.
const CAPACITY: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: (&str, &str) = ("endpoints.kubernetes.io/managed-by", "endpoint-controller");

/// Leaves out what is more than [`CAPACITY`]: those that are not ready first, and of each subset its share, so that no
/// port is without addresses. Says whether there was too much.
fn truncate(subsets: &mut Vec<EndpointSubset>) -> bool {
    let count = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
    let ready: usize = subsets.iter().map(|subset| count(&subset.addresses)).sum();
    let unready: usize = subsets.iter().map(|subset| count(&subset.not_ready_addresses)).sum();
    if ready + unready <= CAPACITY {
        return false;
    }
    let too_many_ready = ready > CAPACITY;
    let (room, total) = if too_many_ready { (CAPACITY, ready) } else { (CAPACITY - ready, unready) };
    let mut left = room;
    for subset in subsets.iter_mut() {
        if too_many_ready {
            subset.not_ready_addresses = None;
        }
        let list = if too_many_ready { &mut subset.addresses } else { &mut subset.not_ready_addresses };
        let Some(addresses) = list else { continue };
        addresses.truncate((addresses.len() * room).div_ceil(total).min(left));
        left -= addresses.len();
        if addresses.is_empty() {
            *list = None;
        }
    }
    subsets.retain(|subset| subset.addresses.is_some() || subset.not_ready_addresses.is_some());
    true
}

/// The subsets of a service: pods with the same ports together, ready and not. True if some had to be left out.
pub(crate) fn subsets(service: &Typed<Service>, pods: &[Typed<Pod>]) -> (Vec<EndpointSubset>, bool) {
    type Ports = Vec<(String, String, i32, Option<String>)>;
    let family = families(service)[0];
    let anyway = services::publishes_unready(service);
    let declared = service.spec.as_ref().and_then(|spec| spec.ports.clone()).unwrap_or_default();
    let mut groups: BTreeMap<Ports, [Vec<EndpointAddress>; 2]> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| anyway || pod.object.deleted().is_none()) {
        let is_v4 = |address: &String| !address.contains(':');
        let Some(ip) = services::addresses(pod).into_iter().find(|ip| is_v4(ip) == (family == "IPv4")) else {
            continue;
        };
        let resolved = declared.iter().filter_map(|port| {
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            let number = services::target_port(pod, port)?;
            Some((port.name.clone().unwrap_or_default(), protocol, number, port.app_protocol.clone()))
        });
        let mut ports: Ports = resolved.collect();
        ports.sort();
        if ports.is_empty() && !declared.is_empty() {
            continue;
        }
        let address = EndpointAddress {
            ip,
            hostname: services::hostname(pod, service),
            node_name: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            target_ref: Some(services::target_ref(&pod.object)),
        };
        let unready = usize::from(!anyway && !pods::is_ready(pod));
        groups.entry(ports).or_default()[unready].push(address);
    }
    let some = |mut addresses: Vec<EndpointAddress>| {
        addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
        (!addresses.is_empty()).then_some(addresses)
    };
    let subsets = groups.into_iter().map(|(ports, [ready, unready])| {
        let ports: Vec<EndpointPort> = ports
            .into_iter()
            .map(|(name, protocol, port, app_protocol)| EndpointPort {
                name: Some(name).filter(|name| !name.is_empty()),
                protocol: Some(protocol),
                port,
                app_protocol,
            })
            .collect();
        EndpointSubset {
            addresses: some(ready),
            not_ready_addresses: some(unready),
            ports: (!ports.is_empty()).then_some(ports),
        }
    });
    let mut subsets = subsets.collect();
    let over = truncate(&mut subsets);
    (subsets, over)
}

#[derive(Default)]
pub(crate) struct EndpointsController {
    index: SelectorIndex,
}

#[async_trait]
impl Controller for EndpointsController {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Service>(), Kind::of::<Pod>(), Kind::of::<Endpoints>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<Endpoints>() {
            return vec![Item { kind: Kind::of::<Service>(), key: object.key().clone() }];
        }
        self.index.items(ctx, change)
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let present = ctx.get::<Endpoints>(&item.key);
        let Some(service) = ctx.get::<Service>(&item.key) else {
            // What somebody else made is theirs.
            let ours = |endpoints: &Typed<Endpoints>| {
                endpoints.object.labels().get(MANAGED_BY.0) == Some(MANAGED_BY.1)
            };
            if let Some(left) = present.filter(ours) {
                ctx.delete(&left.object, DeleteOptions::default()).await?;
            }
            return Ok(Requeue::Never);
        };
        let Some(selector) = services::selector(&service) else { return Ok(Requeue::Never) };
        let pods = self.index.pods_of(ctx, &service, &selector);
        let (subsets, over) = subsets(&service, &pods);
        let labels = labels(&service, &[MANAGED_BY]);
        let trigger = trigger_time(&service, &pods).map(format_seconds);
        let (target, mut body) = match &present {
            Some(present) => {
                let marked = |key: &str| {
                    present.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(key))
                };
                let same = present.subsets.clone().unwrap_or_default() == subsets;
                if same && json!(present.metadata.labels) == labels && marked(OVER_CAPACITY) == over {
                    return Ok(Requeue::Never);
                }
                (Some(Target::of(&present.object)), present.object.value())
            }
            None => {
                let metadata =
                    json!({ "name": service.object.name(), "namespace": service.object.namespace() });
                (None, json!({ "apiVersion": "v1", "kind": "Endpoints", "metadata": metadata }))
            }
        };
        body["subsets"] = json!(subsets);
        body["metadata"]["labels"] = labels;
        if let Some(trigger) = trigger {
            body["metadata"]["annotations"][TRIGGER_TIME] = trigger.into();
        }
        match body["metadata"]["annotations"].as_object_mut() {
            Some(annotations) if !over => drop(annotations.remove(OVER_CAPACITY)),
            _ if over => body["metadata"]["annotations"][OVER_CAPACITY] = "truncated".into(),
            _ => {}
        }
        let written = match target {
            Some(target) => ctx.update(target, body).await,
            None => ctx.create(Kind::of::<Endpoints>(), service.object.namespace(), body).await,
        };
        match written {
            Err(error) if error.has_cause("NamespaceTerminating") => Ok(Requeue::Never),
            Err(error) => {
                let (verb, reason) = match present {
                    Some(_) => ("update endpoint", "FailedToUpdateEndpoint"),
                    None => ("create endpoint for service", "FailedToCreateEndpoint"),
                };
                let message = format!("Failed to {verb} {}: {error}", service.object.key());
                ctx.events.warning(&service.object, reason, message);
                Err(error)
            }
            Ok(_) => Ok(Requeue::Never),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::pod;
    use serde_json::Value;

    fn service(spec: Value) -> Typed<Service> {
        let service = json!({ "metadata": {"name": "web", "namespace": "ns", "uid": "svc"}, "spec": spec });
        Typed::new(minke_api::Object::from_value(Kind::of::<Service>(), &service).unwrap().into()).unwrap()
    }

    #[test]
    fn ready_and_unready_pods_stand_apart() {
        let service = service(json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}));
        let at = |name: &str, ip: &str, ready: &str| {
            pod(name, |p| {
                p["status"]["podIP"] = ip.into();
                p["status"]["conditions"][0]["status"] = ready.into();
            })
        };
        let pods = [at("a", "10.0.0.9", "True"), at("b", "10.0.0.2", "False"), at("c", "10.0.0.1", "True")];
        let (subsets, over) = subsets(&service, &pods);
        assert!(!over);
        assert_eq!(subsets.len(), 1);
        let ips = |addresses: &Option<Vec<EndpointAddress>>| -> Vec<String> {
            addresses.iter().flatten().map(|address| address.ip.clone()).collect()
        };
        assert_eq!(ips(&subsets[0].addresses), ["10.0.0.1", "10.0.0.9"]);
        assert_eq!(ips(&subsets[0].not_ready_addresses), ["10.0.0.2"]);
        assert_eq!(subsets[0].ports.as_ref().unwrap()[0].port, 80);
    }

    /// Sizes of subsets, ready and not, before and after.
    #[track_caller]
    fn check_truncated(before: &[[usize; 2]], want: &[[usize; 2]], want_over: bool) {
        let some = |size: usize| (size > 0).then(|| vec![EndpointAddress::default(); size]);
        let subset = |&[ready, unready]: &[usize; 2]| EndpointSubset {
            addresses: some(ready),
            not_ready_addresses: some(unready),
            ports: None,
        };
        let mut subsets: Vec<EndpointSubset> = before.iter().map(subset).collect();
        assert_eq!(truncate(&mut subsets), want_over);
        let size = |list: &Option<Vec<EndpointAddress>>| list.as_ref().map_or(0, Vec::len);
        let after: Vec<[usize; 2]> = subsets
            .iter()
            .map(|subset| [size(&subset.addresses), size(&subset.not_ready_addresses)])
            .collect();
        assert_eq!(after, want);
    }

    #[test]
    fn a_crowd_is_cut_at_a_thousand() {
        check_truncated(&[[600, 400]], &[[600, 400]], false);
        check_truncated(&[[1001, 0]], &[[1000, 0]], true);
        check_truncated(&[[900, 300]], &[[900, 100]], true);
        check_truncated(&[[1500, 7], [500, 0]], &[[750, 0], [250, 0]], true);
        check_truncated(&[[500, 300], [0, 900]], &[[500, 125], [0, 375]], true);
        check_truncated(&[[1000, 0], [0, 1]], &[[1000, 0]], true);
    }
}
