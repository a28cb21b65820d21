//! Mirrors the Endpoints that people write for services without a selector into EndpointSlices, which is what
//! proxies read.
//!
//! Upstream: pkg/controller/endpointslicemirroring.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use minke_api::{Kind, Object, Status};
use minke_client::{Change, DeleteOptions};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::endpointslice::{
    Group, MANAGED_BY, SERVICE_NAME, TRIGGER_TIME, carry_out, family_of, plan, port_key,
};
use crate::run::Controller;

/// Addresses of a subset that are mirrored, and all that a slice takes.
const PER_SUBSET: usize = 1000;
const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The endpoints of the subsets, by what they share; and how many addresses were left out.
fn desired(subsets: &[EndpointSubset]) -> (BTreeMap<Group, Vec<Endpoint>>, usize) {
    let mut groups: BTreeMap<Group, BTreeMap<String, Endpoint>> = BTreeMap::new();
    let mut left_out = 0;
    for subset in subsets {
        let mut ports: Vec<_> = subset.ports.iter().flatten().map(port).map(|port| port_key(&port)).collect();
        ports.sort();
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        let all = subset.addresses.iter().flatten().map(|address| (address, true)).chain(unready);
        for (n, (address, ready)) in all.enumerate() {
            let Some(family) = family_of(&address.ip).filter(|_| n < PER_SUBSET) else {
                left_out += 1;
                continue;
            };
            let group = groups.entry((family.to_owned(), ports.clone())).or_default();
            // Ready wins, should an address be named as both.
            group.entry(address.ip.clone()).or_insert_with(|| endpoint(address, ready));
        }
    }
    let groups = groups.into_iter().map(|(group, endpoints)| (group, endpoints.into_values().collect()));
    (groups.collect(), left_out)
}

fn port(port: &k8s_openapi::api::core::v1::EndpointPort) -> EndpointPort {
    EndpointPort {
        name: port.name.clone(),
        protocol: port.protocol.clone(),
        port: Some(port.port),
        app_protocol: port.app_protocol.clone(),
    }
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|hostname| !hostname.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn has_selector(service: &Arc<Object>) -> bool {
    let service = Typed::<Service>::new(service.clone());
    service.is_some_and(|service| {
        service
            .spec
            .as_ref()
            .is_some_and(|spec| spec.selector.as_ref().is_some_and(|pairs| !pairs.is_empty()))
    })
}

/// Whether these Endpoints are somebody's word on where a service is.
fn is_mirrored(endpoints: &Endpoints) -> bool {
    let labels = endpoints.metadata.labels.iter().flatten();
    let annotations = endpoints.metadata.annotations.iter().flatten();
    !labels.into_iter().any(|(name, value)| name == SKIP && value == "true")
        && !annotations.into_iter().any(|(name, _)| name == LEADER)
}

pub(crate) struct Mirroring;

#[async_trait]
impl Controller for Mirroring {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Endpoints>(), Kind::of::<Service>(), Kind::of::<EndpointSlice>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let (object, kind) = (change.object(), Kind::of::<Endpoints>());
        if object.kind() == Kind::of::<EndpointSlice>() {
            let ours = object.labels().get(MANAGED_BY) == Some(MANAGER);
            return Item::controller_of(object, kind).filter(|_| ours).into_iter().collect();
        }
        let concerned = match object.kind() == kind {
            // Most Endpoints are of services with a selector: those have slices of their own.
            true => {
                ctx.informers.of_type::<Service>().get_key(object.key()).is_none_or(|s| !has_selector(&s))
            }
            false => change.old.iter().chain(&change.new).any(|service| !has_selector(service)),
        };
        concerned.then(|| Item { kind, key: object.key().clone() }).into_iter().collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        // Slices of Endpoints that are gone go with them.
        let Some(endpoints) = ctx.get::<Endpoints>(&item.key) else { return Ok(Requeue::Never) };
        let object = &endpoints.object;
        let service = ctx.informer::<Service>().get_key(&item.key);
        let mirrored = object.deleted().is_none()
            && is_mirrored(&endpoints)
            && service.is_some_and(|service| !has_selector(&service));
        let owned = ctx.controlled_by(object, Kind::of::<EndpointSlice>());
        let ours = owned.into_iter().filter(|slice| slice.labels().get(MANAGED_BY) == Some(MANAGER));
        let slices: Vec<Typed<EndpointSlice>> =
            ours.filter(|slice| !ctx.is_going(slice)).filter_map(Typed::new).collect();
        if !mirrored {
            for slice in slices {
                ctx.delete(&slice.object, DeleteOptions::default()).await?;
            }
            return Ok(Requeue::Never);
        }
        let (desired, left_out) = desired(endpoints.subsets.as_deref().unwrap_or_default());
        let mut labels: BTreeMap<&str, &str> = object.labels().iter().collect();
        labels.extend([(SERVICE_NAME, object.name()), (MANAGED_BY, MANAGER)]);
        let labels = json!(labels);
        let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
        annotations.remove(LAST_APPLIED);
        annotations.remove(TRIGGER_TIME);
        let mut plan = plan(desired, &slices, PER_SUBSET);
        for (at, slice) in slices.iter().enumerate() {
            let planned = plan.delete.contains(&at) || plan.update.iter().any(|(updated, _)| *updated == at);
            let kept = slice.metadata.annotations.clone().unwrap_or_default();
            let lacks = annotations.iter().any(|(name, value)| kept.get(name) != Some(value));
            if !planned && (lacks || json!(slice.metadata.labels) != labels) {
                plan.update.push((at, slice.endpoints.clone().unwrap_or_default()));
            }
        }
        match carry_out(ctx, object, &slices, plan, &labels, &annotations).await {
            Err(error) if error.has_cause("NamespaceTerminating") => return Ok(Requeue::Never),
            Err(error) => {
                let message = format!("Error updating EndpointSlices for Endpoints {}: {error}", item.key);
                ctx.events.warning(object, "FailedToUpdateEndpointSlices", message);
                return Err(error);
            }
            Ok(()) => {}
        }
        if left_out > 0 {
            let message = format!(
                "A max of {PER_SUBSET} addresses can be mirrored to EndpointSlices per Endpoints subset. {left_out} addresses were skipped"
            );
            ctx.events.warning(object, "TooManyAddressesToMirror", message);
        }
        Ok(Requeue::Never)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[track_caller]
    fn check(subsets: Value, want: &[&str], want_left_out: usize) {
        let subsets: Vec<EndpointSubset> = serde_json::from_value(subsets).unwrap();
        let (groups, left_out) = desired(&subsets);
        let text: Vec<String> = groups
            .iter()
            .map(|((family, ports), endpoints)| {
                let ports: Vec<_> =
                    ports.iter().map(|port| format!("{}:{}", port.0, port.2.unwrap())).collect();
                let endpoints: Vec<_> = endpoints
                    .iter()
                    .map(|e| format!("{}={}", e.addresses[0], e.conditions.as_ref().unwrap().ready.unwrap()))
                    .collect();
                format!("{family} {} {}", ports.join(","), endpoints.join(" "))
            })
            .collect();
        assert_eq!(text, want);
        assert_eq!(left_out, want_left_out);
    }

    #[test]
    fn subsets_become_groups_by_family_and_ports() {
        let ports = json!([{"name": "b", "port": 2}, {"name": "a", "port": 1}]);
        check(json!([]), &[], 0);
        check(
            json!([
                {"addresses": [{"ip": "10.0.0.2"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "10.0.0.1"}], "ports": ports},
                {"addresses": [{"ip": "10.0.0.3"}], "ports": ports},
                {"addresses": [{"ip": "10.0.0.2"}, {"ip": "no address"}], "ports": [{"port": 9}]},
            ]),
            &[
                "IPv4 :9 10.0.0.2=true",
                "IPv4 a:1,b:2 10.0.0.1=false 10.0.0.2=true 10.0.0.3=true",
                "IPv6 a:1,b:2 fd00::1=true",
            ],
            1,
        );
        let many: Vec<Value> =
            (0..1003).map(|n| json!({"ip": format!("10.0.{}.{}", n / 250, n % 250)})).collect();
        let (groups, left_out) =
            desired(&serde_json::from_value::<Vec<_>>(json!([{"addresses": many}])).unwrap());
        assert_eq!((groups.into_values().next().unwrap().len(), left_out), (1000, 3));
    }

    #[test]
    fn only_what_people_wrote_is_mirrored() {
        let endpoints = |metadata: Value| serde_json::from_value(json!({ "metadata": metadata })).unwrap();
        assert!(is_mirrored(&endpoints(json!({"labels": {"a": "b"}}))));
        assert!(!is_mirrored(&endpoints(json!({"labels": {SKIP: "true"}}))));
        assert!(!is_mirrored(&endpoints(json!({"annotations": {LEADER: "{}"}}))));
    }
}
