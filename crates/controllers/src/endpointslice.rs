//! Keeps the EndpointSlices of services with a selector: where their pods are, and in what state.
//!
//! A slice holds at most a hundred endpoints of one address family with the same ports. What is already in a
//! slice stays there, so that a change of one pod rewrites one slice.
//! Upstream: pkg/controller/endpointslice and k8s.io/endpointslice.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use minke_api::time::format_seconds;
use minke_api::{ApiType, Kind, Object, Status};
use minke_client::{Change, DeleteOptions, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, controller_ref};
use crate::pods::{self, name_prefix};
use crate::run::Controller;
use crate::services::{self, SelectorIndex};

const PER_SLICE: usize = 100;
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const ZONE: &str = "topology.kubernetes.io/zone";
pub(crate) const HEADLESS: &str = "service.kubernetes.io/headless";
pub(crate) const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// What all endpoints of a slice share: the address type and the ports, sorted.
pub(crate) type Group = (String, Vec<Port>);

/// Name, protocol, number, application protocol.
pub(crate) type Port = (String, String, Option<i32>, Option<String>);

/// What one pass will do. Slices are named by their place among those that were observed.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub create: Vec<(Group, Vec<Endpoint>)>,
    pub update: Vec<(usize, Vec<Endpoint>)>,
    pub delete: Vec<usize>,
}

/// Decides which slices change so that together they hold `desired`. A group without endpoints is there to
/// keep one empty slice. A slice takes `per_slice` endpoints.
pub(crate) fn plan(
    desired: BTreeMap<Group, Vec<Endpoint>>,
    slices: &[Typed<EndpointSlice>],
    per_slice: usize,
) -> Plan {
    let mut plan = Plan::default();
    let mut by_group: BTreeMap<Group, Vec<usize>> = BTreeMap::new();
    for (at, slice) in slices.iter().enumerate() {
        by_group.entry(group_of(slice)).or_default().push(at);
    }
    for (group, endpoints) in desired {
        let mine = by_group.remove(&group).unwrap_or_default();
        plan_group(group, endpoints, slices, mine, per_slice, &mut plan);
    }
    plan.delete.extend(by_group.into_values().flatten());
    plan
}

fn plan_group(
    group: Group,
    endpoints: Vec<Endpoint>,
    slices: &[Typed<EndpointSlice>],
    mine: Vec<usize>,
    per_slice: usize,
    plan: &mut Plan,
) {
    let keep_empty = endpoints.is_empty();
    let mut wanted: HashMap<String, Endpoint> = HashMap::new();
    let mut order: Vec<String> = Vec::new();
    for endpoint in endpoints {
        let id = identity(&endpoint);
        order.push(id.clone());
        wanted.insert(id, endpoint);
    }
    // What stays, stays where it is.
    let mut contents: Vec<(Option<usize>, Vec<Endpoint>)> = Vec::new();
    for at in mine {
        let present = slices[at].endpoints.iter().flatten();
        let kept: Vec<Endpoint> = present.filter_map(|endpoint| wanted.remove(&identity(endpoint))).collect();
        contents.push((Some(at), kept));
    }
    // What is new goes into slices that change anyway, then into those with room, then into new ones.
    let mut new: Vec<Endpoint> = order.into_iter().filter_map(|id| wanted.remove(&id)).collect();
    contents.sort_by_key(|(at, kept)| at.is_some_and(|at| slices[at].endpoints.as_ref() == Some(kept)));
    for (_, kept) in &mut contents {
        let room = per_slice.saturating_sub(kept.len()).min(new.len());
        kept.extend(new.drain(..room));
    }
    while !new.is_empty() {
        let rest = new.split_off(new.len().min(per_slice));
        contents.push((None, std::mem::replace(&mut new, rest)));
    }
    let mut empty_kept = !keep_empty;
    for (at, kept) in contents {
        match at {
            None => plan.create.push((group.clone(), kept)),
            Some(at) if kept.is_empty() && empty_kept => plan.delete.push(at),
            Some(at) => {
                empty_kept |= kept.is_empty();
                if slices[at].endpoints.clone().unwrap_or_default() != kept {
                    plan.update.push((at, kept));
                }
            }
        }
    }
    if keep_empty && !empty_kept {
        plan.create.push((group, Vec::new()));
    }
}

/// By what an endpoint is recognised in a slice.
fn identity(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or_default();
    format!("{uid} {}", endpoint.addresses.join(","))
}

fn group_of(slice: &EndpointSlice) -> Group {
    let mut ports: Vec<Port> = slice.ports.iter().flatten().map(port_key).collect();
    ports.sort();
    (slice.address_type.clone(), ports)
}

pub(crate) fn port_key(port: &EndpointPort) -> Port {
    let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    (port.name.clone().unwrap_or_default(), protocol, port.port, port.app_protocol.clone())
}

/// The endpoints of a service, by what they share. Each family of the service has a group at least.
fn desired(
    service: &Typed<Service>,
    pods: &[Typed<Pod>],
    zone_of: impl Fn(&str) -> Option<String>,
) -> BTreeMap<Group, Vec<Endpoint>> {
    let mut groups: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for family in families(service) {
        let mut any = false;
        for pod in pods {
            let mut addresses = services::addresses(pod);
            addresses.retain(|address| family_of(address) == Some(family));
            if addresses.is_empty() {
                continue;
            }
            any = true;
            let ports = ports(service, pod);
            let endpoint = endpoint(service, pod, addresses, &zone_of);
            groups.entry((family.to_owned(), ports)).or_default().push(endpoint);
        }
        if !any {
            groups.insert((family.to_owned(), Vec::new()), Vec::new());
        }
    }
    groups
}

pub(crate) fn family_of(address: &str) -> Option<&'static str> {
    Some(if address.parse::<IpAddr>().ok()?.is_ipv4() { "IPv4" } else { "IPv6" })
}

/// The address families of a service, in its order.
pub(crate) fn families(service: &Service) -> Vec<&'static str> {
    let spec = service.spec.as_ref();
    let named = spec.and_then(|spec| spec.ip_families.clone()).unwrap_or_default();
    let known: Vec<&'static str> =
        ["IPv4", "IPv6"].into_iter().filter(|family| named.iter().any(|name| name == family)).collect();
    if !known.is_empty() {
        return known;
    }
    let own = spec.and_then(|spec| spec.cluster_ip.as_deref()).and_then(family_of);
    vec![own.unwrap_or("IPv4")]
}

fn ports(service: &Service, pod: &Pod) -> Vec<Port> {
    let declared = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let mut ports: Vec<Port> = declared
        .filter_map(|port| {
            let number = services::target_port(pod, port)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some((port.name.clone().unwrap_or_default(), protocol, Some(number), port.app_protocol.clone()))
        })
        .collect();
    ports.sort();
    ports
}

fn endpoint(
    service: &Typed<Service>,
    pod: &Typed<Pod>,
    addresses: Vec<String>,
    zone_of: impl Fn(&str) -> Option<String>,
) -> Endpoint {
    let serving = pods::is_ready(pod);
    let terminating = pod.object.deleted().is_some();
    let ready = services::publishes_unready(service) || (serving && !terminating);
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).filter(|node| !node.is_empty());
    let zone = node.as_deref().and_then(zone_of);
    Endpoint {
        addresses,
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hints: hints(service, ready, node.as_deref(), zone.as_deref()),
        hostname: services::hostname(pod, service),
        target_ref: Some(services::target_ref(&pod.object)),
        node_name: node,
        zone,
        ..Endpoint::default()
    }
}

/// For whom this endpoint is the near one, when the service wants its traffic to stay near.
fn hints(service: &Service, ready: bool, node: Option<&str>, zone: Option<&str>) -> Option<EndpointHints> {
    let distribution = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let for_zones = zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let for_nodes = node.map(|node| vec![ForNode { name: node.to_owned() }]);
    let hints = match distribution {
        "PreferClose" | "PreferSameZone" => EndpointHints { for_zones, for_nodes: None },
        "PreferSameNode" => EndpointHints { for_zones, for_nodes },
        _ => return None,
    };
    (ready && hints != EndpointHints::default()).then_some(hints)
}

/// The labels of what is kept for a service: the service's own and `ours`.
pub(crate) fn labels(service: &Typed<Service>, ours: &[(&str, &str)]) -> Value {
    let mut labels: BTreeMap<&str, &str> = service.object.labels().iter().collect();
    labels.remove(HEADLESS);
    labels.extend(ours.iter().copied());
    if services::is_headless(service) {
        labels.insert(HEADLESS, "");
    }
    json!(labels)
}

/// When the last thing happened that the endpoints show, as far as can be told.
pub(crate) fn trigger_time(service: &Typed<Service>, pods: &[Typed<Pod>]) -> Option<Timestamp> {
    let ready = pods.iter().filter_map(|pod| pods::ready_since(pod));
    ready.chain(service.object.created()).max()
}

#[derive(Default)]
pub(crate) struct EndpointSlices {
    index: SelectorIndex,
}

#[async_trait]
impl Controller for EndpointSlices {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Service>(), Kind::of::<Pod>(), Kind::of::<EndpointSlice>(), Kind::of::<Node>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<EndpointSlice>() {
            // Our own writes settle at once; this is for what others did to a slice.
            return Item::controller_of(object, Kind::of::<Service>()).into_iter().collect();
        }
        if object.kind() == Kind::of::<Node>() {
            let zone = |node: &std::sync::Arc<minke_api::Object>| node.labels().get(ZONE).map(str::to_owned);
            if change.old.as_ref().and_then(zone) == change.new.as_ref().and_then(zone) {
                return Vec::new();
            }
            let services = self.index.services_of(&ctx.informers.of_type::<Pod>().on_node(object.name()));
            return services.into_iter().map(|key| Item { kind: Kind::of::<Service>(), key }).collect();
        }
        self.index.items(ctx, change)
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(service) = ctx.get::<Service>(&item.key) else { return Ok(Requeue::Never) };
        let Some(selector) = services::selector(&service) else { return Ok(Requeue::Never) };
        if service.object.deleted().is_some() {
            return Ok(Requeue::Never);
        }
        let pods = self.index.pods_of(ctx, &service, &selector);
        let nodes = ctx.informer::<Node>();
        let zone_of = |node: &str| nodes.get("", node)?.labels().get(ZONE).map(str::to_owned);
        let desired = desired(&service, &pods, zone_of);
        let owned = ctx.controlled_by(&service.object, Kind::of::<EndpointSlice>());
        let ours = owned.into_iter().filter(|slice| slice.labels().get(MANAGED_BY) == Some(MANAGER));
        let going = ours.filter(|slice| !ctx.is_going(slice));
        let slices: Vec<Typed<EndpointSlice>> = going.filter_map(Typed::new).collect();
        let labels = labels(&service, &[(SERVICE_NAME, service.object.name()), (MANAGED_BY, MANAGER)]);
        let mut plan = plan(desired, &slices, PER_SLICE);
        for (at, slice) in slices.iter().enumerate() {
            let planned = plan.delete.contains(&at) || plan.update.iter().any(|(updated, _)| *updated == at);
            if !planned && json!(slice.metadata.labels) != labels {
                plan.update.push((at, slice.endpoints.clone().unwrap_or_default()));
            }
        }
        let trigger = trigger_time(&service, &pods).map(|at| (TRIGGER_TIME.to_owned(), format_seconds(at)));
        let annotations = trigger.into_iter().collect();
        match carry_out(ctx, &service.object, &slices, plan, &labels, &annotations).await {
            Err(error) if error.has_cause("NamespaceTerminating") => {}
            Err(error) => {
                let message = format!("Error updating Endpoint Slices for Service {}: {error}", item.key);
                ctx.events.warning(&service.object, "FailedToUpdateEndpointSlices", message);
                return Err(error);
            }
            Ok(()) => {}
        }
        Ok(Requeue::Never)
    }
}

/// Makes the slices of `owner` as planned, with these labels, and these annotations among theirs.
pub(crate) async fn carry_out(
    ctx: &Ctx,
    owner: &Object,
    slices: &[Typed<EndpointSlice>],
    plan: Plan,
    labels: &Value,
    annotations: &BTreeMap<String, String>,
) -> Result<(), Status> {
    for ((address_type, ports), endpoints) in plan.create {
        let ports: Vec<EndpointPort> = ports.into_iter().map(port).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": name_prefix(owner.name()),
                "namespace": owner.namespace(),
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [controller_ref(owner)],
            },
            "addressType": address_type,
            "endpoints": endpoints,
            "ports": ports,
        });
        ctx.create(Kind::of::<EndpointSlice>(), owner.namespace(), slice).await?;
    }
    for (at, endpoints) in plan.update {
        let mut slice = slices[at].object.value();
        slice["endpoints"] = endpoints.to_value();
        slice["metadata"]["labels"] = labels.clone();
        for (name, value) in annotations {
            slice["metadata"]["annotations"][name] = value.as_str().into();
        }
        ctx.update(Target::of(&slices[at].object), slice).await?;
    }
    for at in plan.delete {
        ctx.delete(&slices[at].object, DeleteOptions::default()).await?;
    }
    Ok(())
}

fn port((name, protocol, port, app_protocol): Port) -> EndpointPort {
    EndpointPort { name: Some(name), protocol: Some(protocol), port, app_protocol }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{pod, time};

    fn service(spec: Value) -> Typed<Service> {
        let service = json!({ "metadata": {"name": "web", "namespace": "ns", "uid": "svc"}, "spec": spec });
        let object = minke_api::Object::from_value(Kind::of::<Service>(), &service).unwrap();
        Typed::new(object.into()).unwrap()
    }

    fn web() -> Typed<Service> {
        service(
            json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}], "ipFamilies": ["IPv4"]}),
        )
    }

    fn at(name: &str, ip: &str, change: impl FnOnce(&mut Value)) -> Typed<Pod> {
        pod(name, |p| {
            p["status"]["podIP"] = ip.into();
            p["status"]["podIPs"] = json!([{"ip": ip}]);
            change(p);
        })
    }

    fn slices_of(plan: &Plan, before: &[Typed<EndpointSlice>]) -> Vec<Typed<EndpointSlice>> {
        let slice = |name: String, (address_type, ports): &Group, endpoints: &[Endpoint]| {
            let mut slice = EndpointSlice {
                address_type: address_type.clone(),
                endpoints: Some(endpoints.to_vec()),
                ports: Some(ports.iter().cloned().map(port).collect()),
                ..EndpointSlice::default()
            };
            slice.metadata.name = Some(name);
            Typed::test(&slice)
        };
        let mut after = Vec::new();
        for (at, old) in before.iter().enumerate().filter(|(at, _)| !plan.delete.contains(at)) {
            match plan.update.iter().find(|(updated, _)| *updated == at) {
                Some((_, endpoints)) => {
                    after.push(slice(old.object.name().to_owned(), &group_of(old), endpoints))
                }
                None => after.push(old.clone()),
            }
        }
        let new = plan.create.iter().enumerate();
        after.extend(
            new.map(|(n, (group, endpoints))| slice(format!("s{}-{n}", before.len()), group, endpoints)),
        );
        after
    }

    #[track_caller]
    fn settle(
        desired: impl Fn() -> BTreeMap<Group, Vec<Endpoint>>,
        before: &[Typed<EndpointSlice>],
    ) -> Vec<Typed<EndpointSlice>> {
        let after = slices_of(&plan(desired(), before, PER_SLICE), before);
        assert_eq!(plan(desired(), &after, PER_SLICE), Plan::default(), "a plan settles");
        assert!(after.iter().all(|slice| slice.endpoints.as_ref().is_none_or(|all| all.len() <= PER_SLICE)));
        after
    }

    fn many(from: usize, to: usize) -> BTreeMap<Group, Vec<Endpoint>> {
        let pods: Vec<_> = (from..to)
            .map(|n| at(&format!("p{n:03}"), &format!("10.0.{}.{}", n / 250, n % 250), |_| {}))
            .collect();
        desired(&web(), &pods, |_| None)
    }

    #[test]
    fn an_endpoint_tells_the_state_of_its_pod() {
        let check = |pod: Typed<Pod>, want: [bool; 3]| {
            let groups = desired(&web(), &[pod], |node| Some(format!("zone-of-{node}")));
            let ((family, ports), endpoints) = groups.into_iter().next().unwrap();
            assert_eq!(family, "IPv4");
            assert_eq!(ports, [(String::new(), "TCP".to_owned(), Some(8080), None)]);
            assert_eq!(endpoints[0].zone.as_deref(), Some("zone-of-n1"));
            let conditions = endpoints[0].conditions.clone().unwrap();
            assert_eq!(
                [conditions.ready, conditions.serving, conditions.terminating].map(Option::unwrap),
                want
            );
        };
        check(at("a", "10.0.0.1", |_| {}), [true, true, false]);
        check(at("a", "10.0.0.1", |p| p["status"]["conditions"] = json!([])), [false, false, false]);
        check(
            at("a", "10.0.0.1", |p| p["metadata"]["deletionTimestamp"] = time(1).into()),
            [false, true, true],
        );
    }

    #[test]
    fn unready_pods_are_published_when_asked() {
        let service = service(
            json!({"clusterIP": "None", "publishNotReadyAddresses": true, "selector": {"app": "web"}}),
        );
        let pod = at("a", "10.0.0.1", |p| {
            p["status"]["conditions"] = json!([]);
            p["spec"]["hostname"] = "h".into();
            p["spec"]["subdomain"] = "web".into();
        });
        let groups = desired(&service, &[pod], |_| None);
        let endpoint = &groups[&("IPv4".to_owned(), Vec::new())][0];
        assert_eq!(endpoint.conditions.as_ref().unwrap().ready, Some(true));
        assert_eq!(endpoint.hostname.as_deref(), Some("h"));
        assert_eq!(labels(&service, &[])[HEADLESS], "");
    }

    #[test]
    fn named_ports_are_looked_up_in_each_pod() {
        let service = service(
            json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "web"}]}),
        );
        let with = |name: &str, ip: &str, number: i32| {
            at(name, ip, |p| {
                p["spec"]["containers"][0]["ports"] = json!([{"name": "web", "containerPort": number}])
            })
        };
        let pods = [with("a", "10.0.0.1", 8080), with("b", "10.0.0.2", 9090), with("c", "10.0.0.3", 8080)];
        let groups = desired(&service, &pods, |_| None);
        let sizes: Vec<_> =
            groups.iter().map(|((_, ports), endpoints)| (ports[0].2, endpoints.len())).collect();
        assert_eq!(sizes, [(Some(8080), 2), (Some(9090), 1)]);
    }

    #[test]
    fn slices_are_filled_and_change_little() {
        let none = settle(|| many(0, 0), &[]);
        assert_eq!(none.len(), 1, "a service without pods has an empty slice");
        let full = settle(|| many(0, 250), &none);
        assert_eq!(full.iter().map(|slice| slice.endpoints.as_ref().unwrap().len()).sum::<usize>(), 250);
        assert_eq!(full.len(), 3);
        let change = plan(many(1, 251), &full, PER_SLICE);
        assert_eq!((change.create.len(), change.update.len(), change.delete.len()), (0, 1, 0));
        let fewer = settle(|| many(0, 50), &full);
        assert_eq!(fewer.len(), 1);
        assert_eq!(settle(|| many(0, 0), &fewer).len(), 1);
    }
}
