//! The nftables table of the Services: which frontends there are, what they are as elements of
//! sets and maps, and the script that leads from one state to the next.
//!
//! The layout is flat. The number of chains depends on how many *different numbers* of
//! endpoints there are, not on how many Services; a change is a few elements more or less, so
//! its cost does not grow with the cluster. A packet to 10.96.0.7:80 with three endpoints:
//!
//! ```text
//! prerouting -> dispatch: services{10.96.0.7 . tcp . 80} = goto address-3-outside
//! address-3-outside: mark for masquerade unless the source is in the cluster, goto address-3
//! address-3: dnat to address-3{10.96.0.7 . tcp . 80 . random mod 3} = 10.244.0.9 . 8080
//! ```
//!
//! A client with affinity is remembered in `learned`, as the address of its endpoint (in the
//! connection's mark, the only register that lookups can share); `backends` tells whether that endpoint still is one. A
//! Service without endpoints has no element, so its packets go on to the node link, where
//! they are refused; what would reach the node itself or leave it is in `refused`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddrV4};

use ipnet::Ipv4Net;
use minke_api::Key;

use crate::frontend::{Backends, Frontend, Frontends, Masquerade, Protocol};

/// The bit that says "masquerade this connection" between two hooks; the one kube-proxy uses.
const MARK: &str = "0x4000";
/// Clients that are remembered at a time. With more of them the newest have no affinity.
const LEARNED_MAX: u32 = 1 << 16;

/// Who brings frontends. When several claim the same, the oldest has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    Service(Key),
    Pod(Key),
}

/// The sets and maps that hold the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Set {
    /// Frontend -> chain.
    Dispatch {
        outside: bool,
        node: bool,
    },
    Refused {
        node: bool,
    },
    /// Frontends that only some sources may use, and these sources.
    Restricted,
    Admitted,
    /// Addresses of pods here, as source and destination.
    Hairpin,
    /// Frontend and number -> endpoint, or with affinity the mark that stands for it.
    Endpoints(Endpoints),
    /// Frontend and mark -> endpoint.
    Backends {
        node: bool,
    },
}

/// Frontends with the same number of endpoints share a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Endpoints {
    pub node: bool,
    /// Only for sources outside the cluster, whose endpoints are others.
    pub outside: bool,
    pub count: usize,
    pub affinity: bool,
}

/// Frontends that share chains, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Shape {
    pub endpoints: Endpoints,
    /// Seconds; 0 without affinity.
    pub timeout: u32,
}

/// One element as nft writes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Element {
    pub set: Set,
    pub key: String,
}

pub(crate) type Elements = BTreeMap<Element, Option<String>>;

/// What is fixed about the table.
#[derive(Debug, Clone)]
pub struct TableConfig {
    pub name: String,
    /// The pods of this node.
    pub pod_cidr: Ipv4Net,
    /// The pods of all nodes.
    pub cluster_cidr: Ipv4Net,
}

/// The frontends of everyone, and with them the elements that there should be.
#[derive(Debug, Clone)]
pub struct Tables {
    config: TableConfig,
    /// Oldest claim first.
    claims: BTreeMap<Frontend, Vec<Claim>>,
    owned: HashMap<Owner, Vec<Frontend>>,
    /// Chains stay when nobody needs them any more: they are few, and mostly come back.
    shapes: BTreeSet<Shape>,
    /// How often each local address is an endpoint.
    local: BTreeMap<Ipv4Addr, usize>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Seconds since 1970.
    created: i64,
    owner: Owner,
}

#[derive(Debug, Clone)]
struct Claim {
    rank: Rank,
    backends: Backends,
}

/// The way from one state of the tables to a later one; grows by what happens in between.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Change {
    shapes: BTreeSet<Shape>,
    /// What was, and what shall be.
    elements: BTreeMap<Element, (State, State)>,
    /// UDP frontends with the endpoints that they had before the change.
    udp: BTreeMap<Frontend, BTreeSet<SocketAddrV4>>,
}

/// Absent, or present with a value if it is in a map.
type State = Option<Option<String>>;

impl Tables {
    pub fn new(config: TableConfig) -> Tables {
        Tables {
            config,
            claims: BTreeMap::new(),
            owned: HashMap::new(),
            shapes: BTreeSet::new(),
            local: BTreeMap::new(),
        }
    }

    pub fn config(&self) -> &TableConfig {
        &self.config
    }

    /// What packets to `frontend` meet.
    pub fn backends(&self, frontend: &Frontend) -> Option<&Backends> {
        Some(&self.claims.get(frontend)?.first()?.backends)
    }

    /// Replaces what `owner` has brought so far, and adds to `change` what that means. `created` is in
    /// seconds since 1970.
    pub fn set(&mut self, owner: &Owner, created: i64, frontends: Frontends, change: &mut Change) {
        let before = self.owned.remove(owner).unwrap_or_default();
        let touched: BTreeSet<Frontend> = before.iter().chain(frontends.keys()).copied().collect();
        if !frontends.is_empty() {
            self.owned.insert(owner.clone(), frontends.keys().copied().collect());
        }
        let mut frontends = frontends;
        for frontend in touched {
            let mut claims = self.claims.remove(&frontend).unwrap_or_default();
            let old = claims.first().map(|claim| claim.backends.clone());
            claims.retain(|claim| claim.rank.owner != *owner);
            if let Some(backends) = frontends.remove(&frontend) {
                let claim = Claim { rank: Rank { created, owner: owner.clone() }, backends };
                let at = claims.partition_point(|other| other.rank < claim.rank);
                claims.insert(at, claim);
            }
            let new = claims.first().map(|claim| claim.backends.clone());
            if !claims.is_empty() {
                self.claims.insert(frontend, claims);
            }
            if old != new {
                self.replace(&frontend, old.as_ref(), new.as_ref(), change);
            }
        }
    }

    fn replace(
        &mut self,
        frontend: &Frontend,
        old: Option<&Backends>,
        new: Option<&Backends>,
        change: &mut Change,
    ) {
        let lowered = |backends: Option<&Backends>| {
            backends.map(|backends| lower(frontend, backends)).unwrap_or_default()
        };
        let (before, after) = (lowered(old), lowered(new));
        for (element, value) in &before {
            if after.get(element) != Some(value) {
                change.note(element.clone(), Some(value.clone()), after.get(element).cloned());
            }
        }
        for (element, value) in after {
            if !before.contains_key(&element) {
                change.note(element, None, Some(value));
            }
        }
        for shape in new.into_iter().flat_map(shapes(frontend)) {
            if self.shapes.insert(shape) {
                change.shapes.insert(shape);
            }
        }
        self.count_local(old, new, change);
        if frontend.protocol == Protocol::Udp {
            let before = old.into_iter().flat_map(Backends::all).copied().collect();
            change.udp.entry(*frontend).or_insert(before);
        }
    }

    fn count_local(&mut self, old: Option<&Backends>, new: Option<&Backends>, change: &mut Change) {
        let pods = self.config.pod_cidr;
        let local = |backends: Option<&Backends>| -> BTreeSet<Ipv4Addr> {
            let endpoints = backends.into_iter().flat_map(Backends::all);
            endpoints.map(|endpoint| *endpoint.ip()).filter(|address| pods.contains(address)).collect()
        };
        let (old, new) = (local(old), local(new));
        for address in new.difference(&old) {
            let count = self.local.entry(*address).or_default();
            *count += 1;
            if *count == 1 {
                change.note(hairpin(address), None, Some(None));
            }
        }
        for address in old.difference(&new) {
            let count = self.local.entry(*address).or_default();
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.local.remove(address);
                change.note(hairpin(address), Some(None), None);
            }
        }
    }

    /// All elements that there should be.
    pub(crate) fn elements(&self) -> Elements {
        let winners = self.claims.iter().filter_map(|(frontend, claims)| Some((frontend, claims.first()?)));
        let mut elements: Elements =
            winners.flat_map(|(frontend, claim)| lower(frontend, &claim.backends)).collect();
        elements.extend(self.local.keys().map(|address| (hairpin(address), None)));
        elements
    }

    /// A script that replaces the table, whatever is in it, in one transaction. Chains that are no
    /// longer needed end here.
    pub fn load(&mut self) -> String {
        let needed = self.claims.iter().filter_map(|(frontend, claims)| Some((frontend, claims.first()?)));
        self.shapes = needed.flat_map(|(frontend, claim)| shapes(frontend)(&claim.backends)).collect();
        let table = &self.config.name;
        let mut script = format!("add table ip {table}\ndelete table ip {table}\n");
        fixed_part(&mut script, &self.config);
        for shape in &self.shapes {
            shape_chains(&mut script, &self.config, shape);
        }
        let elements = self.elements();
        write_elements(
            &mut script,
            table,
            "add",
            elements.iter().map(|(element, value)| (element, value.as_ref())),
        );
        script
    }
}

impl Change {
    fn note(&mut self, element: Element, old: State, new: State) {
        self.elements.entry(element).or_insert((old, None)).1 = new;
    }

    /// Nothing would happen.
    pub fn is_empty(&self) -> bool {
        self.shapes.is_empty() && self.differing().next().is_none()
    }

    fn differing(&self) -> impl Iterator<Item = (&Element, &State, &State)> {
        let elements = self.elements.iter().map(|(element, (old, new))| (element, old, new));
        elements.filter(|(_, old, new)| old != new)
    }

    /// The elements that go, and those that come, with their values.
    #[cfg(test)]
    pub(crate) fn elements(&self) -> impl Iterator<Item = (&Element, &State, &State)> {
        self.differing()
    }

    /// The transaction; what it adds refers to what it adds before.
    pub fn script(&self, config: &TableConfig) -> String {
        let mut script = String::new();
        for shape in &self.shapes {
            shape_chains(&mut script, config, shape);
        }
        let gone = self.differing().filter(|(_, old, _)| old.is_some()).map(|(element, ..)| (element, None));
        write_elements(&mut script, &config.name, "delete", gone);
        let come = self.differing().filter_map(|(element, _, new)| Some((element, new.as_ref()?.as_ref())));
        write_elements(&mut script, &config.name, "add", come);
        script
    }

    /// The UDP frontends that have lost endpoints, or had none before, each with those that it has lost.
    pub(crate) fn lost_udp(self, now: &Tables) -> impl Iterator<Item = (Frontend, HashSet<SocketAddrV4>)> {
        self.udp.into_iter().filter_map(|(frontend, before)| {
            let kept: HashSet<SocketAddrV4> =
                now.backends(&frontend).into_iter().flat_map(Backends::all).copied().collect();
            let had_none = before.is_empty();
            let gone: HashSet<SocketAddrV4> =
                before.into_iter().filter(|endpoint| !kept.contains(endpoint)).collect();
            (had_none || !gone.is_empty()).then_some((frontend, gone))
        })
    }
}

/// The elements that stand for one frontend.
fn lower(frontend: &Frontend, backends: &Backends) -> Elements {
    let mut elements = Elements::new();
    let node = frontend.address.is_none();
    let mut key = frontend.address.map(|address| format!("{address} . ")).unwrap_or_default();
    let _ = write!(key, "{} . {}", frontend.protocol.name(), frontend.port);
    let mut add = |set, key: String, value: Option<String>| elements.insert(Element { set, key }, value);

    let affinity = backends.affinity.is_some();
    let mut dispatch = |outside, endpoints: &[SocketAddrV4], chain: String| {
        add(Set::Dispatch { outside, node }, key.clone(), Some(chain));
        for (i, endpoint) in endpoints.iter().enumerate() {
            let set = Set::Endpoints(Endpoints { node, outside, count: endpoints.len(), affinity });
            let to = format!("{} . {}", endpoint.ip(), endpoint.port());
            let mark = format!("{:#010x}", u32::from(*endpoint.ip()));
            if affinity {
                add(Set::Backends { node }, format!("{key} . {mark}"), Some(to));
                add(set, format!("{key} . {i}"), Some(mark));
            } else {
                add(set, format!("{key} . {i}"), Some(to));
            }
        }
    };
    if !backends.endpoints.is_empty() {
        let shape = shape(frontend, backends, &backends.endpoints, false);
        dispatch(
            false,
            &backends.endpoints,
            format!("goto {}-{}", shape.chain(), suffix(backends.masquerade)),
        );
    } else if backends.elsewhere {
        dispatch(false, &[], "drop".into());
    }
    match &backends.for_outside {
        Some(local) if !local.is_empty() => {
            let shape = shape(frontend, backends, local, true);
            dispatch(true, local, format!("goto {}", shape.chain()));
        }
        Some(_) if !backends.endpoints.is_empty() => dispatch(true, &[], "drop".into()),
        _ => {}
    }
    // Of a cluster IP the node link refuses what nobody else takes, but these are others.
    if backends.endpoints.is_empty() && !backends.elsewhere && backends.masquerade != Masquerade::Outside {
        add(Set::Refused { node }, key.clone(), None);
    }
    if let (Some(admitted), false) = (&backends.admitted, node) {
        add(Set::Restricted, key.clone(), None);
        for range in admitted {
            add(Set::Admitted, format!("{key} . {range}"), None);
        }
    }
    elements
}

fn hairpin(address: &Ipv4Addr) -> Element {
    Element { set: Set::Hairpin, key: format!("{address} . {address}") }
}

fn shape(frontend: &Frontend, backends: &Backends, endpoints: &[SocketAddrV4], outside: bool) -> Shape {
    let timeout = backends.affinity.unwrap_or(0);
    let node = frontend.address.is_none();
    Shape { endpoints: Endpoints { node, outside, count: endpoints.len(), affinity: timeout > 0 }, timeout }
}

fn shapes(frontend: &Frontend) -> impl Fn(&Backends) -> Vec<Shape> {
    move |backends| {
        let lists = std::iter::once((&backends.endpoints, false))
            .chain(backends.for_outside.iter().map(|list| (list, true)));
        let needed = lists.filter(|(list, _)| !list.is_empty());
        needed.map(|(list, outside)| shape(frontend, backends, list, outside)).collect()
    }
}

fn suffix(masquerade: Masquerade) -> &'static str {
    match masquerade {
        Masquerade::Outside => "outside",
        Masquerade::Everyone => "everyone",
        Masquerade::Node => "node",
    }
}

impl Endpoints {
    fn name(self) -> String {
        let kind = if self.node { "port" } else { "address" };
        let (local, sticky) =
            (if self.outside { "-local" } else { "" }, if self.affinity { "-sticky" } else { "" });
        format!("{kind}-{}{local}{sticky}", self.count)
    }
}

impl Shape {
    fn chain(self) -> String {
        let name = self.endpoints.name();
        if self.timeout > 0 { format!("{name}-{}", self.timeout) } else { name }
    }
}

impl Set {
    fn name(self) -> String {
        match self {
            Set::Dispatch { outside: false, node: false } => "services".into(),
            Set::Dispatch { outside: false, node: true } => "ports".into(),
            Set::Dispatch { outside: true, node: false } => "services-outside".into(),
            Set::Dispatch { outside: true, node: true } => "ports-outside".into(),
            Set::Refused { node: false } => "refused".into(),
            Set::Refused { node: true } => "refused-ports".into(),
            Set::Restricted => "restricted".into(),
            Set::Admitted => "admitted".into(),
            Set::Hairpin => "hairpin".into(),
            Set::Endpoints(endpoints) => endpoints.name(),
            Set::Backends { node: false } => "backends".into(),
            Set::Backends { node: true } => "port-backends".into(),
        }
    }
}

/// One statement per set, as nft wants it.
fn write_elements<'a>(
    script: &mut String,
    table: &str,
    verb: &str,
    elements: impl Iterator<Item = (&'a Element, Option<&'a String>)>,
) {
    let mut current = None;
    for (element, value) in elements {
        if current == Some(element.set) {
            script.push_str(", ");
        } else {
            if current.is_some() {
                script.push_str(" }\n");
            }
            let _ = write!(script, "{verb} element ip {table} {} {{ ", element.set.name());
            current = Some(element.set);
        }
        script.push_str(&element.key);
        if let Some(value) = value {
            let _ = write!(script, " : {value}");
        }
    }
    if current.is_some() {
        script.push_str(" }\n");
    }
}

const FRONTEND: &str = "ip daddr . meta l4proto . th dport";
const PORT: &str = "meta l4proto . th dport";

/// Everything but shapes and elements.
fn fixed_part(script: &mut String, config: &TableConfig) {
    let TableConfig { name, cluster_cidr, .. } = config;
    // Source ranges are checked just before addresses are translated, refusals just after.
    let _ = write!(
        script,
        r#"table ip {name} {{
    map services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map ports {{ type inet_proto . inet_service : verdict; }}
    map services-outside {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    map ports-outside {{ type inet_proto . inet_service : verdict; }}
    map backends {{ type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service; }}
    map port-backends {{ type inet_proto . inet_service . mark : ipv4_addr . inet_service; }}
    map learned {{
        type ipv4_addr . ipv4_addr . inet_proto . inet_service : mark
        flags dynamic,timeout; size {LEARNED_MAX}
    }}
    set refused {{ type ipv4_addr . inet_proto . inet_service; }}
    set refused-ports {{ type inet_proto . inet_service; }}
    set restricted {{ type ipv4_addr . inet_proto . inet_service; }}
    set admitted {{ type ipv4_addr . inet_proto . inet_service . ipv4_addr; flags interval; }}
    set hairpin {{ type ipv4_addr . ipv4_addr; }}

    chain dispatch {{
        {FRONTEND} vmap @services
        fib daddr type local {PORT} vmap @ports
    }}
    chain dispatch-outside {{
        {FRONTEND} vmap @services-outside
        fib daddr type local {PORT} vmap @ports-outside
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        ip saddr != {cluster_cidr} jump dispatch-outside
        jump dispatch
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        jump dispatch
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ct status dnat ip saddr . ip daddr @hairpin masquerade fully-random
        meta mark & {MARK} == 0 return
        meta mark set meta mark ^ {MARK}
        masquerade fully-random
    }}

    chain admit {{
        ct state new {FRONTEND} @restricted {FRONTEND} . ip saddr != @admitted drop
    }}
    chain admit-prerouting {{
        type filter hook prerouting priority dstnat - 10; policy accept;
        jump admit
    }}
    chain admit-output {{
        type filter hook output priority -110; policy accept;
        jump admit
    }}
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmp type port-unreachable
    }}
    chain check {{
        {FRONTEND} @refused goto refuse
        fib daddr type local {PORT} @refused-ports goto refuse
    }}
    chain check-input {{
        type filter hook input priority filter; policy accept;
        ct state new jump check
    }}
    chain check-forward {{
        type filter hook forward priority filter; policy accept;
        ct state new jump check
    }}
    chain check-output {{
        type filter hook output priority filter; policy accept;
        ct state new jump check
    }}
}}
"#
    );
}

/// The map and the chains of one shape.
fn shape_chains(script: &mut String, config: &TableConfig, shape: &Shape) {
    let TableConfig { name: table, cluster_cidr, .. } = config;
    let Shape { endpoints, timeout } = *shape;
    let (map, chain, count) = (endpoints.name(), shape.chain(), endpoints.count);
    let (key, backends) = if endpoints.node { (PORT, "port-backends") } else { (FRONTEND, "backends") };
    let value = if endpoints.affinity { "ct mark" } else { "ip daddr . th dport" };
    let pick = format!("{key} . numgen random mod {count}");
    let choose = if endpoints.affinity {
        let client = format!("ip saddr . {FRONTEND}");
        // A remembered endpoint that is one no longer is forgotten, and another chosen.
        format!(
            "ct mark set {client} map @learned update @learned {{ {client} timeout {timeout}s : ct mark }}
        dnat ip to {key} . ct mark map @{backends}
        delete @learned {{ {client} : ct mark }}
        ct mark set {pick} map @{map}
        update @learned {{ {client} timeout {timeout}s : ct mark }}
        dnat ip to {key} . ct mark map @{backends}"
        )
    } else {
        format!("dnat ip to {pick} map @{map}")
    };
    let _ = write!(
        script,
        "table ip {table} {{
    map {map} {{ typeof {pick} : {value}; }}
    chain {chain} {{
        {choose}
    }}
"
    );
    // Sources outside the cluster that get endpoints of their own do so to keep their address.
    let variants = [
        ("outside", format!("ip saddr != {cluster_cidr} ")),
        ("everyone", String::new()),
        ("node", "fib saddr type local ".into()),
    ];
    for (suffix, condition) in variants.into_iter().filter(|_| !endpoints.outside) {
        let _ = write!(
            script,
            "    chain {chain}-{suffix} {{
        {condition}meta mark set meta mark | {MARK}
        goto {chain}
    }}
"
        );
    }
    script.push_str("}\n");
}
