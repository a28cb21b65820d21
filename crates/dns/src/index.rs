//! What the cluster's zone contains: the names of Services, prepared for looking up.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::rr::Name;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::Key;

/// What is fixed about the zone.
#[derive(Debug, Clone)]
pub struct Zone {
    /// The cluster domain, `cluster.local`.
    pub domain: Name,
    /// Where this server is reached; the address of `ns.dns.<domain>`.
    pub server: IpAddr,
    /// Addresses whose reverse names nobody else knows: those of Services and pods.
    pub reverse: Vec<IpNet>,
    /// Seconds for which answers may be kept. Short, because endpoints come and go.
    pub ttl: u32,
}

/// A port of a Service, as SRV records tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Empty when it has none.
    pub name: String,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: &'static str,
    pub number: u16,
}

/// A ready endpoint of a headless Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its name within the Service.
    pub host: String,
    pub address: IpAddr,
    pub ports: Vec<Port>,
}

/// What a Service is to the DNS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    ClusterIp {
        addresses: Vec<IpAddr>,
        ports: Vec<Port>,
    },
    /// In order of host and address.
    Headless {
        endpoints: Vec<Endpoint>,
    },
    External {
        target: Name,
    },
}

/// The zone's contents. Names are in lower case, as objects' names always are.
#[derive(Debug)]
pub struct Index {
    zone: Zone,
    namespaces: HashSet<String>,
    services: HashMap<String, HashMap<String, Entry>>,
    /// By address, the names that it has: the Service, and the host in it unless it is the cluster IP.
    reverse: HashMap<IpAddr, BTreeSet<(Key, String)>>,
    complete: bool,
}

impl Index {
    pub fn new(zone: Zone) -> Index {
        Index {
            zone: Zone { domain: zone.domain.to_lowercase(), ..zone },
            namespaces: HashSet::new(),
            services: HashMap::new(),
            reverse: HashMap::new(),
            complete: false,
        }
    }

    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Until this is called a name that is not found may still come, so clients are asked to try again.
    pub fn set_complete(&mut self) {
        self.complete = true;
    }

    pub fn is_complete(&self) -> bool {
        self.complete
    }

    pub fn set_namespace(&mut self, name: &str, exists: bool) {
        if exists {
            self.namespaces.insert(name.to_owned());
        } else {
            self.namespaces.remove(name);
        }
    }

    /// Replaces what is known of one Service.
    pub fn set_service(&mut self, key: &Key, entry: Option<Entry>) {
        if let Some(old) =
            self.services.get_mut(&*key.namespace).and_then(|services| services.remove(&*key.name))
        {
            for (address, host) in reverse_names(&old) {
                if let Some(names) = self.reverse.get_mut(&address) {
                    names.remove(&(key.clone(), host));
                    if names.is_empty() {
                        self.reverse.remove(&address);
                    }
                }
            }
        }
        if let Some(new) = entry {
            for (address, host) in reverse_names(&new) {
                self.reverse.entry(address).or_default().insert((key.clone(), host));
            }
            self.services.entry(key.namespace.to_string()).or_default().insert(key.name.to_string(), new);
        } else if self.services.get(&*key.namespace).is_some_and(HashMap::is_empty) {
            self.services.remove(&*key.namespace);
        }
    }

    pub(crate) fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains(name)
    }

    pub(crate) fn service(&self, namespace: &str, name: &str) -> Option<&Entry> {
        self.services.get(namespace)?.get(name)
    }

    /// The Services that have `address`, each with the name of the host in it, which may be empty.
    pub(crate) fn names_of(&self, address: IpAddr) -> impl Iterator<Item = &(Key, String)> {
        self.reverse.get(&address).into_iter().flatten()
    }
}

fn reverse_names(entry: &Entry) -> Vec<(IpAddr, String)> {
    match entry {
        Entry::ClusterIp { addresses, .. } => {
            addresses.iter().map(|address| (*address, String::new())).collect()
        }
        Entry::Headless { endpoints } => {
            endpoints.iter().map(|endpoint| (endpoint.address, endpoint.host.clone())).collect()
        }
        Entry::External { .. } => Vec::new(),
    }
}

/// What `service` with its `slices` is to the DNS; `None` when it has no name there.
pub fn entry_of<'a>(service: &Service, slices: impl Iterator<Item = &'a EndpointSlice>) -> Option<Entry> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        let mut target = Name::from_ascii(spec.external_name.as_deref()?).ok()?;
        target.set_fqdn(true);
        return Some(Entry::External { target });
    }
    let stated = spec.cluster_ips.as_deref().filter(|addresses| !addresses.is_empty());
    let stated = stated.unwrap_or(spec.cluster_ip.as_slice());
    if stated.iter().any(|address| address == "None") {
        return Some(Entry::Headless {
            endpoints: endpoints(spec.publish_not_ready_addresses == Some(true), slices),
        });
    }
    let addresses: Vec<IpAddr> = stated.iter().filter_map(|address| address.parse().ok()).collect();
    let ports = spec.ports.iter().flatten();
    let ports =
        ports.filter_map(|port| self::port(port.name.as_deref(), port.protocol.as_deref(), Some(port.port)));
    (!addresses.is_empty()).then(|| Entry::ClusterIp { addresses, ports: ports.collect() })
}

fn endpoints<'a>(unready_too: bool, slices: impl Iterator<Item = &'a EndpointSlice>) -> Vec<Endpoint> {
    let mut endpoints = Vec::new();
    for slice in slices.filter(|slice| slice.address_type != "FQDN") {
        let ports = slice.ports.iter().flatten();
        let ports: Vec<Port> = ports
            .filter_map(|port| self::port(port.name.as_deref(), port.protocol.as_deref(), port.port))
            .collect();
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            if !unready_too && conditions.ready == Some(false) {
                continue;
            }
            for address in endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()) {
                let host = endpoint.hostname.clone().filter(|host| !host.is_empty());
                let host = host.map_or_else(|| dashed(address), |host| host.to_lowercase());
                endpoints.push(Endpoint { host, address, ports: ports.clone() });
            }
        }
    }
    // An endpoint may be in two slices for a moment, while it moves from one to the other.
    endpoints.sort_by(|a, b| (&a.host, a.address).cmp(&(&b.host, b.address)));
    endpoints.dedup_by(|a, b| (&a.host, a.address) == (&b.host, b.address));
    endpoints
}

fn port(name: Option<&str>, protocol: Option<&str>, number: Option<i32>) -> Option<Port> {
    let protocol = match protocol {
        None | Some("TCP") => "tcp",
        Some("UDP") => "udp",
        Some("SCTP") => "sctp",
        Some(_) => return None,
    };
    let number = u16::try_from(number?).ok()?;
    Some(Port { name: name.unwrap_or_default().to_lowercase(), protocol, number })
}

/// An address as a label: 10-244-0-7.
fn dashed(address: IpAddr) -> String {
    address.to_string().replace(['.', ':'], "-")
}

/// The address that such a label stands for.
pub(crate) fn undashed(label: &str) -> Option<IpAddr> {
    if let Ok(address) = label.replace('-', ".").parse::<Ipv4Addr>() {
        return Some(address.into());
    }
    label.replace('-', ":").parse().ok()
}
