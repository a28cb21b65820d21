//! What a Service amounts to on one node: addresses that packets are sent to, and where these go.
//!
//! Pure functions over one Service and its EndpointSlices (or one Pod with host ports). Upstream:
//! pkg/proxy/topology.go, servicechangetracker.go; KEP-1669 (terminating endpoints), KEP-2086 (internal
//! traffic policy), KEP-3015 (topology hints).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::{Pod, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

/// Services that another proxy looks after have this label.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As the API spells it; nothing means TCP.
    fn parse(text: Option<&str>) -> Option<Protocol> {
        match text {
            None | Some("TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(_) => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

/// Where a packet may be addressed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// `None` is any address of the node: a node port or host port.
    pub address: Option<Ipv4Addr>,
    pub protocol: Protocol,
    pub port: u16,
}

/// Whose connections reach the endpoint under the node's address instead of their own, so that the
/// answers come back through the node which translated them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Masquerade {
    /// Sources that are not in the cluster.
    Outside,
    Everyone,
    /// The node itself, whose source might be 127.0.0.1.
    Node,
}

/// What becomes of packets to a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backends {
    /// One of these gets the connection; in order, without duplicates.
    pub endpoints: Vec<SocketAddrV4>,
    /// What sources outside the cluster get instead (`externalTrafficPolicy: Local`).
    pub for_outside: Option<Vec<SocketAddrV4>>,
    /// There are endpoints, only none here: packets are dropped, because another node would serve them.
    /// Without any endpoint they are refused.
    pub elsewhere: bool,
    /// Seconds for which a client keeps its endpoint.
    pub affinity: Option<u32>,
    pub masquerade: Masquerade,
    /// The only sources that are let in.
    pub admitted: Option<Vec<Ipv4Net>>,
}

impl Backends {
    /// The endpoints for everyone; one may come twice.
    pub fn all(&self) -> impl Iterator<Item = &SocketAddrV4> {
        self.endpoints.iter().chain(self.for_outside.iter().flatten())
    }
}

/// What tells nodes apart.
#[derive(Debug, Clone)]
pub struct Locality {
    pub node: String,
    pub zone: Option<String>,
}

pub type Frontends = BTreeMap<Frontend, Backends>;

/// What `service` amounts to. The addresses in `draining` belong to pods that are about to stop,
/// whatever the slices still say of them.
pub fn of_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    here: &Locality,
    draining: &HashSet<Ipv4Addr>,
) -> Frontends {
    let mut frontends = Frontends::new();
    let Some(spec) = &service.spec else { return frontends };
    let other_proxy = service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(OTHER_PROXY));
    if other_proxy || spec.type_.as_deref() == Some("ExternalName") {
        return frontends;
    }
    let cluster_ips = cluster_ips(spec);
    if cluster_ips.is_empty() {
        return frontends;
    }
    for port in spec.ports.iter().flatten() {
        let (Some(protocol), Ok(number)) =
            (Protocol::parse(port.protocol.as_deref()), u16::try_from(port.port))
        else {
            continue;
        };
        let candidates = candidates(port, slices.clone(), here, draining);
        let backends = |policy: Option<&str>, masquerade| {
            let local_only = policy == Some("Local");
            let endpoints = addresses(&candidates, false, here);
            let local = || addresses(&candidates, true, here);
            Backends { endpoints, for_outside: local_only.then(local), ..plain(masquerade, affinity(spec)) }
        };

        let mut internal = backends(spec.internal_traffic_policy.as_deref(), Masquerade::Outside);
        // Here the policy holds for everyone.
        if let Some(local) = internal.for_outside.take() {
            internal.elsewhere = local.is_empty() && !internal.endpoints.is_empty();
            internal.endpoints = local;
        }
        for address in &cluster_ips {
            insert(&mut frontends, Some(*address), protocol, number, internal.clone());
        }

        let policy = spec.external_traffic_policy.as_deref();
        let masquerade = if policy == Some("Local") { Masquerade::Node } else { Masquerade::Everyone };
        let external = backends(policy, masquerade);
        for address in parsed(spec.external_ips.iter().flatten()) {
            insert(&mut frontends, Some(address), protocol, number, external.clone());
        }
        if spec.type_.as_deref() == Some("LoadBalancer") {
            let admitted = source_ranges(spec);
            for address in load_balancer_ips(service) {
                let backends = Backends { admitted: admitted.clone(), ..external.clone() };
                insert(&mut frontends, Some(address), protocol, number, backends);
            }
        }
        if let Some(node_port) =
            port.node_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
        {
            insert(&mut frontends, None, protocol, node_port, external);
        }
    }
    frontends
}

/// The host ports of a pod on this node.
pub fn of_pod(pod: &Pod) -> Frontends {
    let mut frontends = Frontends::new();
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return frontends };
    let over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let address = status.pod_ip.as_deref().and_then(|address| address.parse::<Ipv4Addr>().ok());
    let (false, false, Some(address)) = (over, spec.host_network == Some(true), address) else {
        return frontends;
    };
    // Of init containers only the restartable ones run beside the others.
    let init = spec.init_containers.iter().flatten();
    let sidecars = init.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.iter().chain(sidecars);
    for port in containers.flat_map(|container| container.ports.iter().flatten()) {
        let (Some(protocol), Ok(to)) =
            (Protocol::parse(port.protocol.as_deref()), u16::try_from(port.container_port))
        else {
            continue;
        };
        let Some(from) = port.host_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
        else {
            continue;
        };
        let host = match port.host_ip.as_deref() {
            None | Some("" | "0.0.0.0") => None,
            Some(text) => match text.parse() {
                Ok(address) => Some(address),
                Err(_) => continue,
            },
        };
        let endpoints = vec![SocketAddrV4::new(address, to)];
        insert(&mut frontends, host, protocol, from, Backends { endpoints, ..plain(Masquerade::Node, None) });
    }
    frontends
}

/// All addresses among the endpoints of a slice, whatever their state.
pub fn slice_addresses(slice: &EndpointSlice) -> impl Iterator<Item = Ipv4Addr> {
    let endpoints = slice.endpoints.iter().flatten();
    endpoints.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok())
}

fn plain(masquerade: Masquerade, affinity: Option<u32>) -> Backends {
    Backends {
        endpoints: Vec::new(),
        for_outside: None,
        elsewhere: false,
        affinity,
        masquerade,
        admitted: None,
    }
}

fn insert(
    frontends: &mut Frontends,
    address: Option<Ipv4Addr>,
    protocol: Protocol,
    port: u16,
    backends: Backends,
) {
    // A Service whose endpoint is its own address (the cluster DNS, which every node answers at that
    // address itself) needs no translation.
    if let Some(address) = address
        && backends.endpoints == [SocketAddrV4::new(address, port)]
    {
        return;
    }
    frontends.entry(Frontend { address, protocol, port }).or_insert(backends);
}

/// An endpoint of one Service port that packets might go to.
struct Candidate<'a> {
    address: SocketAddrV4,
    endpoint: &'a Endpoint,
    ready: bool,
    /// Terminating, but it still takes connections: better than nothing.
    last_resort: bool,
    /// No hint says that it is for clients elsewhere.
    near: bool,
}

impl Candidate<'_> {
    fn is_here(&self, here: &Locality) -> bool {
        self.endpoint.node_name.as_deref() == Some(&here.node)
    }
}

fn candidates<'a>(
    port: &ServicePort,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    here: &Locality,
    draining: &HashSet<Ipv4Addr>,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices.filter(|slice| slice.address_type == "IPv4") {
        let wanted = |candidate: &&k8s_openapi::api::discovery::v1::EndpointPort| {
            candidate.name.as_deref().unwrap_or("") == port.name.as_deref().unwrap_or("")
                && Protocol::parse(candidate.protocol.as_deref()) == Protocol::parse(port.protocol.as_deref())
        };
        let number = slice.ports.iter().flatten().find(wanted).and_then(|port| port.port);
        let Some(number) = number.and_then(|number| u16::try_from(number).ok()) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            // The addresses of one endpoint are the same pod; upstream too uses the first.
            let Some(address) = endpoint.addresses.first().and_then(|text| text.parse::<Ipv4Addr>().ok())
            else {
                continue;
            };
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let draining = draining.contains(&address);
            let ready = conditions.ready.unwrap_or(true);
            let terminating = conditions.terminating.unwrap_or(false) || draining;
            let serving = conditions.serving.unwrap_or(ready);
            candidates.push(Candidate {
                address: SocketAddrV4::new(address, number),
                endpoint,
                ready: ready && !draining,
                last_resort: serving && terminating,
                near: true,
            });
        }
    }
    follow_hints(&mut candidates, here);
    candidates
}

/// Topology hints count only if every ready endpoint has one and one of them is for here.
fn follow_hints(candidates: &mut [Candidate<'_>], here: &Locality) {
    let for_node = |candidate: &Candidate<'_>| {
        let hints = candidate.endpoint.hints.as_ref()?.for_nodes.as_ref()?;
        (!hints.is_empty()).then(|| hints.iter().any(|hint| hint.name == here.node))
    };
    let for_zone = |candidate: &Candidate<'_>| {
        let hints = candidate.endpoint.hints.as_ref()?.for_zones.as_ref()?;
        (!hints.is_empty()).then(|| hints.iter().any(|hint| Some(&hint.name) == here.zone.as_ref()))
    };
    for hint in [&for_node as &dyn Fn(&Candidate<'_>) -> Option<bool>, &for_zone] {
        let mut ready = candidates.iter().filter(|candidate| candidate.ready);
        if ready.clone().all(|candidate| hint(candidate).is_some())
            && ready.any(|one| hint(one) == Some(true))
        {
            candidates.iter_mut().for_each(|candidate| candidate.near = hint(candidate) == Some(true));
            return;
        }
    }
}

/// The ready ones, or else those of last resort. Hints don't concern the policy Local.
fn addresses(candidates: &[Candidate<'_>], local: bool, here: &Locality) -> Vec<SocketAddrV4> {
    let eligible = || candidates.iter().filter(|candidate| !local || candidate.is_here(here));
    let mut addresses: BTreeSet<SocketAddrV4> =
        eligible().filter(|one| one.ready && (local || one.near)).map(|one| one.address).collect();
    if addresses.is_empty() {
        addresses = eligible().filter(|one| one.last_resort).map(|one| one.address).collect();
    }
    addresses.into_iter().collect()
}

fn cluster_ips(spec: &ServiceSpec) -> Vec<Ipv4Addr> {
    match spec.cluster_ips.as_deref() {
        Some(addresses) if !addresses.is_empty() => parsed(addresses.iter()).collect(),
        _ => parsed(spec.cluster_ip.iter()).collect(),
    }
}

fn load_balancer_ips(service: &Service) -> impl Iterator<Item = Ipv4Addr> {
    let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = balancer.into_iter().flat_map(|balancer| balancer.ingress.iter().flatten());
    // With the mode Proxy packets arrive under the node's address, not this one.
    parsed(
        ingress
            .filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"))
            .filter_map(|ingress| ingress.ip.as_ref()),
    )
}

/// Skips "None", IPv6 and what is no address.
fn parsed<'a>(texts: impl Iterator<Item = &'a String>) -> impl Iterator<Item = Ipv4Addr> {
    texts.filter_map(|text| text.parse().ok())
}

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
        let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
        let seconds =
            config.and_then(|config| config.timeout_seconds).and_then(|seconds| u32::try_from(seconds).ok());
        seconds.filter(|seconds| *seconds > 0).unwrap_or(DEFAULT_AFFINITY_SECONDS)
    })
}

/// Without overlaps, which the kernel would not take; `None` lets everyone in.
fn source_ranges(spec: &ServiceSpec) -> Option<Vec<Ipv4Net>> {
    let texts = spec.load_balancer_source_ranges.as_ref().filter(|ranges| !ranges.is_empty())?;
    let ranges: Vec<Ipv4Net> = texts.iter().filter_map(|text| text.trim().parse().ok()).collect();
    let ranges = Ipv4Net::aggregate(&ranges);
    (!ranges.contains(&Ipv4Net::default())).then_some(ranges)
}
