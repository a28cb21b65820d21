//! Cluster IPs and node ports of Services: given out by the registry around a write, and taken back when
//! the write fails, the Service changes or goes.
//!
//! Kept in memory and read back from the stored Services at start. What is picked comes at random from
//! the upper part of a range; the lower part is left for those who ask for a number. Upstream:
//! pkg/registry/core/service/{storage,ipallocator,portallocator}.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use minke_api::{FieldErrors, Kind, Status};
use rand::Rng;
use serde_json::{Value, json};

use crate::kinds::tree::Tree;

/// Random numbers that are tried before the range is searched in order.
const RANDOM_TRIES: usize = 16;

/// Gives out cluster IPs and node ports.
pub struct Allocator {
    cidr: IpNet,
    node_ports: RangeInclusive<u16>,
    used: Mutex<Used>,
}

#[derive(Default)]
struct Used {
    addresses: HashSet<IpAddr>,
    ports: HashSet<u16>,
}

/// What a write of a Service took and will give up. Unless it is committed, everything that was taken
/// goes back when it is dropped: a failed write or a dry run keeps nothing.
#[must_use = "dropping it takes everything back"]
pub struct Allocation {
    allocator: Arc<Allocator>,
    taken: Used,
    given_up: Used,
    committed: bool,
}

impl Allocation {
    /// The write is stored: keeps what was taken, frees what the Service no longer has.
    pub fn commit(mut self) {
        self.committed = true;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let freed = if self.committed { &self.given_up } else { &self.taken };
        let mut used = self.allocator.used();
        freed.addresses.iter().for_each(|address| _ = used.addresses.remove(address));
        freed.ports.iter().for_each(|port| _ = used.ports.remove(port));
    }
}

impl Allocator {
    /// With what `services`, all that are stored, already have.
    pub fn new<'a>(
        cidr: IpNet,
        node_ports: RangeInclusive<u16>,
        services: impl IntoIterator<Item = &'a Value>,
    ) -> Arc<Allocator> {
        let mut used = Used::default();
        for service in services {
            used.addresses.extend(addresses_of(service));
            used.ports.extend(ports_of(service));
        }
        Arc::new(Allocator { cidr, node_ports, used: Mutex::new(used) })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().expect("no one panics with the lock")
    }

    /// Frees what a deleted Service had.
    pub fn release(&self, service: &Value) {
        let mut used = self.used();
        addresses_of(service).for_each(|address| _ = used.addresses.remove(&address));
        ports_of(service).for_each(|port| _ = used.ports.remove(&port));
    }

    /// Fills the IP families, cluster IPs and node ports that `service` needs, taking them; those it names
    /// itself are taken as they are, or refused. `old` is the stored Service, when there is one.
    pub fn allocate(
        self: &Arc<Allocator>,
        service: &mut Value,
        old: Option<&Value>,
    ) -> Result<Allocation, Status> {
        let name = service.at("metadata").text("name").to_owned();
        let mut allocation = Allocation {
            allocator: self.clone(),
            taken: Used::default(),
            given_up: Used::default(),
            committed: false,
        };
        let mut errors = FieldErrors::default();
        self.fill_families(service, &mut errors);
        errors.into_result(Kind::of::<core::Service>(), &name)?;
        self.take_address(service, old, &name, &mut allocation)?;
        self.take_ports(service, old, &name, &mut allocation)?;
        if let Some(old) = old {
            let (addresses, ports): (HashSet<_>, HashSet<_>) =
                (addresses_of(service).collect(), ports_of(service).collect());
            allocation.given_up.addresses = addresses_of(old).filter(|a| !addresses.contains(a)).collect();
            allocation.given_up.ports = ports_of(old).filter(|p| !ports.contains(p)).collect();
        }
        Ok(allocation)
    }

    fn family(&self) -> &'static str {
        if self.cidr.addr().is_ipv4() { "IPv4" } else { "IPv6" }
    }

    /// There is one service range, so one family.
    fn fill_families(&self, service: &mut Value, errors: &mut FieldErrors) {
        let spec = service.object("spec");
        if spec.text("type") == "ExternalName" {
            return;
        }
        let headless = spec.text("clusterIP") == "None";
        let (own, other) = (self.family(), if self.family() == "IPv4" { "IPv6" } else { "IPv4" });
        if headless && !spec.has("selector") {
            // Nothing is known of the endpoints that someone else will write: they may be of either family.
            spec.fill("ipFamilyPolicy", "RequireDualStack");
            if !spec.has("ipFamilies") {
                let both = if spec.text("ipFamilyPolicy") == "SingleStack" {
                    json!([own])
                } else {
                    json!([own, other])
                };
                spec.set("ipFamilies", both);
            }
            return;
        }
        if spec.text("ipFamilyPolicy") == "RequireDualStack" {
            errors.invalid(
                "spec.ipFamilyPolicy",
                "RequireDualStack",
                "this cluster is not configured for dual-stack services",
            );
        }
        for (n, family) in spec.items("ipFamilies").iter().filter_map(Value::as_str).enumerate() {
            if family != own {
                errors.invalid(&format!("spec.ipFamilies[{n}]"), family, "not configured on this cluster");
            }
        }
        spec.fill("ipFamilyPolicy", "SingleStack");
        if !spec.has("ipFamilies") {
            spec.set("ipFamilies", json!([own]));
        }
    }

    fn take_address(
        &self,
        service: &mut Value,
        old: Option<&Value>,
        name: &str,
        allocation: &mut Allocation,
    ) -> Result<(), Status> {
        let spec = service.object("spec");
        if spec.text("type") == "ExternalName" {
            return Ok(());
        }
        // Either of the two fields may be given.
        if !spec.has("clusterIP")
            && let Some(first) = spec.items("clusterIPs").first().cloned()
        {
            spec.set("clusterIP", first);
        }
        match spec.text("clusterIP") {
            "None" => spec.set("clusterIPs", json!(["None"])),
            "" => {
                let address = {
                    let mut used = self.used();
                    let picked = self.pick_address(&used);
                    picked.inspect(|address| _ = used.addresses.insert(*address))
                };
                let address = address
                    .ok_or_else(|| Status::internal("failed to allocate a serviceIP: range is full"))?;
                allocation.taken.addresses.insert(address);
                spec.set("clusterIP", address.to_string());
                spec.set("clusterIPs", json!([address.to_string()]));
            }
            given => {
                let given = given.to_owned();
                if !spec.has("clusterIPs") {
                    spec.set("clusterIPs", json!([given]));
                }
                // What is no address is refused by validation, with all else that is wrong.
                let Ok(address) = given.parse::<IpAddr>() else { return Ok(()) };
                if old.is_some_and(|old| addresses_of(old).any(|had| had == address)) {
                    return Ok(());
                }
                let refuse = |why: String| {
                    let mut errors = FieldErrors::default();
                    let shown = json!([given]);
                    errors.invalid(
                        "spec.clusterIPs",
                        &shown,
                        &format!("failed to allocate IP {address}: {why}"),
                    );
                    errors.into_result(Kind::of::<core::Service>(), name)
                };
                if !self.holds(address) {
                    refuse(format!(
                        "the provided IP ({address}) is not in the valid range. The range of valid IPs is {}",
                        self.cidr
                    ))?;
                }
                if !self.used().addresses.insert(address) {
                    refuse("provided IP is already allocated".to_owned())?;
                }
                allocation.taken.addresses.insert(address);
            }
        }
        Ok(())
    }

    /// Whether the address may be given to a Service: in the range, and neither its first nor, in IPv4,
    /// its last.
    fn holds(&self, address: IpAddr) -> bool {
        self.cidr.contains(&address)
            && address != self.cidr.network()
            && (address.is_ipv6() || address != self.cidr.broadcast())
    }

    fn pick_address(&self, used: &Used) -> Option<IpAddr> {
        let size = 1u128 << (self.cidr.max_prefix_len() - self.cidr.prefix_len()).min(64);
        // The first address is the network's own; in IPv4 the last is for broadcast.
        let last = if self.cidr.addr().is_ipv4() { size.checked_sub(2)? } else { size.checked_sub(1)? };
        let reserved = lower_band(size, 256).min(last);
        let at = |offset: u128| match self.cidr.network() {
            IpAddr::V4(base) => IpAddr::from(
                (u32::from(base) as u128 + offset)
                    .to_be_bytes()
                    .last_chunk::<4>()
                    .copied()
                    .unwrap_or_default(),
            ),
            IpAddr::V6(base) => IpAddr::from((u128::from(base) + offset).to_be_bytes()),
        };
        pick(1, reserved, last, |offset| !used.addresses.contains(&at(offset))).map(at)
    }

    fn take_ports(
        &self,
        service: &mut Value,
        old: Option<&Value>,
        name: &str,
        allocation: &mut Allocation,
    ) -> Result<(), Status> {
        let spec = service.object("spec");
        let kind = spec.text("type");
        let wanted = match kind {
            "NodePort" => true,
            "LoadBalancer" => spec.at("allocateLoadBalancerNodePorts").as_bool() != Some(false),
            _ => false,
        };
        let health = kind == "LoadBalancer" && spec.text("externalTrafficPolicy") == "Local";
        let had: HashSet<u16> = old.into_iter().flat_map(ports_of).collect();
        let mut errors = FieldErrors::default();
        let mut used = self.used();
        let mut take = |port: u16, field: &str, errors: &mut FieldErrors| {
            if had.contains(&port) || allocation.taken.ports.contains(&port) {
                // Its own already, or shared by two protocols of the same Service.
                return;
            }
            if !self.node_ports.contains(&port) {
                let why = format!(
                    "provided port is not in the valid range. The range of valid ports is {}-{}",
                    self.node_ports.start(),
                    self.node_ports.end()
                );
                errors.invalid(field, i64::from(port), &why);
            } else if !used.ports.insert(port) {
                errors.invalid(field, i64::from(port), "provided port is already allocated");
            } else {
                allocation.taken.ports.insert(port);
            }
        };
        // Those that are asked for come first, so that none of them is picked for another.
        for (n, port) in spec.items("ports").iter().enumerate() {
            if let Some(asked) = port.int("nodePort").filter(|p| *p != 0) {
                match u16::try_from(asked) {
                    Ok(asked) => take(asked, &format!("spec.ports[{n}].nodePort"), &mut errors),
                    Err(_) => continue, // validation says so
                }
            }
        }
        if let Some(asked) =
            spec.int("healthCheckNodePort").and_then(|p| u16::try_from(p).ok()).filter(|p| *p != 0)
        {
            take(asked, "spec.healthCheckNodePort", &mut errors);
        }
        errors.into_result(Kind::of::<core::Service>(), name)?;
        let mut free = || {
            let (first, last) = (u128::from(*self.node_ports.start()), u128::from(*self.node_ports.end()));
            let reserved = first + lower_band(last - first + 1, 128);
            let picked = pick(first, reserved.min(last), last, |port| !used.ports.contains(&(port as u16)))
                .map(|port| port as u16)
                .ok_or_else(|| Status::internal("failed to allocate a nodePort: range is full"))?;
            used.ports.insert(picked);
            allocation.taken.ports.insert(picked);
            Ok::<u16, Status>(picked)
        };
        if wanted {
            let ports = spec.items("ports").to_vec();
            for (n, wanting) in ports.iter().enumerate() {
                if wanting.int("nodePort").is_some_and(|p| p != 0) {
                    continue;
                }
                // TCP and UDP on one port get one node port, as DNS servers want it.
                let twin = spec.items("ports").iter().enumerate().find(|(m, other)| {
                    *m != n
                        && other.int("port") == wanting.int("port")
                        && other.text("protocol") != wanting.text("protocol")
                        && other.int("nodePort").is_some_and(|p| p != 0)
                });
                let port = match twin.and_then(|(_, other)| other.int("nodePort")) {
                    Some(port) => port,
                    None => i64::from(free()?),
                };
                if let Some(item) = spec.each("ports").nth(n) {
                    item.set("nodePort", port);
                }
            }
        }
        if health && spec.int("healthCheckNodePort").is_none_or(|p| p == 0) {
            let port = free()?;
            spec.set("healthCheckNodePort", port);
        }
        Ok(())
    }
}

/// How much of the bottom of a range is left for those who ask for a number.
fn lower_band(size: u128, max: u128) -> u128 {
    if size < 32 { 0 } else { (size / 32).max(16).min(max).min(size) }
}

/// A free number of `first..=last`: at random above `reserved`, else the first that is free at all.
fn pick(first: u128, reserved: u128, last: u128, is_free: impl Fn(u128) -> bool) -> Option<u128> {
    if first > last {
        return None;
    }
    let upper = reserved.max(first);
    let mut random = rand::rng();
    let tried = (0..RANDOM_TRIES).map(|_| random.random_range(upper..=last)).find(|n| is_free(*n));
    tried.or_else(|| (upper..=last).chain(first..upper).find(|n| is_free(*n)))
}

fn addresses_of(service: &Value) -> impl Iterator<Item = IpAddr> + '_ {
    let spec = service.at("spec");
    // A Service that became an ExternalName keeps none.
    let held = spec.text("type") != "ExternalName";
    let listed = spec.items("clusterIPs").iter().filter_map(Value::as_str);
    listed
        .chain(std::iter::once(spec.text("clusterIP")))
        .filter(move |_| held)
        .filter_map(|text| text.parse().ok())
}

fn ports_of(service: &Value) -> impl Iterator<Item = u16> + '_ {
    let spec = service.at("spec");
    let ports = spec.items("ports").iter().filter_map(|port| port.int("nodePort"));
    ports
        .chain(spec.int("healthCheckNodePort"))
        .filter_map(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> Arc<Allocator> {
        Allocator::new("10.96.0.0/24".parse().unwrap(), 30000..=30063, [])
    }

    fn service(spec: Value) -> Value {
        json!({"metadata": {"name": "web"}, "spec": spec})
    }

    #[track_caller]
    fn create(allocator: &Arc<Allocator>, spec: Value) -> Value {
        let mut service = service(spec);
        allocator.allocate(&mut service, None).unwrap().commit();
        service
    }

    #[track_caller]
    fn refused(allocator: &Arc<Allocator>, spec: Value, want: &str) {
        let status = allocator.allocate(&mut service(spec), None).err().expect("an error");
        assert_eq!(status.message, format!("Service \"web\" is invalid: {want}"));
    }

    #[test]
    fn a_service_gets_an_address_from_the_upper_band() {
        let allocator = allocator();
        let made = create(&allocator, json!({"type": "ClusterIP"}));
        let address: IpAddr = made["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
        assert!(address >= "10.96.0.16".parse::<IpAddr>().unwrap());
        assert_eq!(made["spec"]["clusterIPs"], json!([address.to_string()]));
        assert_eq!(made["spec"]["ipFamilies"], json!(["IPv4"]));
        assert_eq!(made["spec"]["ipFamilyPolicy"], "SingleStack");
    }

    #[test]
    fn asked_addresses_are_given_once() {
        let allocator = allocator();
        let made = create(&allocator, json!({"type": "ClusterIP", "clusterIP": "10.96.0.10"}));
        refused(
            &allocator,
            json!({"type": "ClusterIP", "clusterIP": "10.96.0.10"}),
            "spec.clusterIPs: Invalid value: [\"10.96.0.10\"]: failed to allocate IP 10.96.0.10: provided IP is already allocated",
        );
        refused(
            &allocator,
            json!({"type": "ClusterIP", "clusterIP": "10.97.0.1"}),
            "spec.clusterIPs: Invalid value: [\"10.97.0.1\"]: failed to allocate IP 10.97.0.1: the provided IP (10.97.0.1) is not in the valid range. The range of valid IPs is 10.96.0.0/24",
        );
        allocator.release(&made);
        create(&allocator, json!({"type": "ClusterIP", "clusterIP": "10.96.0.10"}));
    }

    #[test]
    fn some_services_have_no_address() {
        let allocator = allocator();
        let headless =
            create(&allocator, json!({"type": "ClusterIP", "clusterIP": "None", "selector": {"a": "b"}}));
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
        assert_eq!(headless["spec"]["ipFamilies"], json!(["IPv4"]));
        let bare = create(&allocator, json!({"type": "ClusterIP", "clusterIP": "None"}));
        assert_eq!(bare["spec"]["ipFamilyPolicy"], "RequireDualStack");
        let external = create(&allocator, json!({"type": "ExternalName", "externalName": "example.com"}));
        assert!(external["spec"].get("clusterIP").is_none());
        assert!(allocator.used().addresses.is_empty());
    }

    #[test]
    fn what_is_not_committed_goes_back() {
        let allocator = allocator();
        let spec = json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}]});
        let mut dry = service(spec.clone());
        drop(allocator.allocate(&mut dry, None).unwrap());
        assert!(dry["spec"]["ports"][0]["nodePort"].is_u64() || dry["spec"]["ports"][0]["nodePort"].is_i64());
        assert!(allocator.used().addresses.is_empty() && allocator.used().ports.is_empty());
        create(&allocator, json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30001}]}));
        let failing =
            json!({"type": "NodePort", "clusterIP": "10.96.0.3", "ports": [{"port": 80, "nodePort": 30001}]});
        refused(
            &allocator,
            failing,
            "spec.ports[0].nodePort: Invalid value: 30001: provided port is already allocated",
        );
        create(&allocator, json!({"type": "ClusterIP", "clusterIP": "10.96.0.3"}));
    }

    #[test]
    fn node_ports_are_checked_and_shared_between_protocols() {
        let allocator = allocator();
        refused(
            &allocator,
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 80}]}),
            "spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. The range of valid ports is 30000-30063",
        );
        let ports = json!([{"port": 53, "protocol": "TCP", "name": "t"}, {"port": 53, "protocol": "UDP", "name": "u"}]);
        let made = create(&allocator, json!({"type": "NodePort", "ports": ports}));
        assert_eq!(made["spec"]["ports"][0]["nodePort"], made["spec"]["ports"][1]["nodePort"]);
        let local =
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]});
        assert!(create(&allocator, local)["spec"]["healthCheckNodePort"].is_number());
    }

    #[test]
    fn an_update_frees_what_it_drops() {
        let allocator = allocator();
        let old = create(&allocator, json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30005}]}));
        let mut new = old.clone();
        new["spec"]["type"] = "ExternalName".into();
        new["spec"]["ports"][0].unset("nodePort");
        new["spec"].unset("clusterIP");
        new["spec"].unset("clusterIPs");
        allocator.allocate(&mut new, Some(&old)).unwrap().commit();
        assert!(allocator.used().addresses.is_empty() && allocator.used().ports.is_empty());
    }

    #[test]
    fn a_full_range_says_so_and_a_restart_forgets_nothing() {
        let services: Vec<Value> = (30000..=30063)
            .map(|port| service(json!({"clusterIPs": [format!("10.96.0.{}", port - 29999)], "ports": [{"nodePort": port}]})))
            .collect();
        let allocator = Allocator::new("10.96.0.0/26".parse().unwrap(), 30000..=30063, &services);
        let mut one_more = service(json!({"type": "ClusterIP"}));
        let status = allocator.allocate(&mut one_more, None).err().expect("an error");
        assert_eq!(status.message, "Internal error occurred: failed to allocate a serviceIP: range is full");
        let mut headless = service(json!({"type": "NodePort", "clusterIP": "None", "ports": [{"port": 1}]}));
        let status = allocator.allocate(&mut headless, None).err().expect("an error");
        assert_eq!(status.message, "Internal error occurred: failed to allocate a nodePort: range is full");
    }
}
