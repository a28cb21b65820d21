//! From events to transactions.
//!
//! While one transaction is in the kernel (some 15 ms, most of it waiting for readers to leave the old
//! rules) further changes pile up, and are the next one: bursts coalesce by themselves and a single change never
//! waits. When a transaction fails, the tables are not what we think, so all is loaded anew.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use ipnet::Ipv4Net;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::{FieldSelector, Key, Kind, Object};
use minke_client::{Change as Event, Informers, backoff, typed};
use minke_network::{ClusterId, Flow, TableWatch, apply_nft, forget_udp_flows};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::drain::{DrainRequests, Request};
use crate::frontend::{Frontends, Locality, of_pod, of_service, slice_addresses};
use crate::tables::{Change, Owner, TableConfig, Tables};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Debug, Clone)]
pub struct ProxyConfig {
    pub cluster: ClusterId,
    /// As the Node object and the EndpointSlices call this node.
    pub node_name: String,
    /// The node's `topology.kubernetes.io/zone`.
    pub zone: Option<String>,
    pub node_address: Ipv4Addr,
    /// The addresses of this node's pods.
    pub pod_cidr: Ipv4Net,
    /// The addresses of all pods.
    pub cluster_cidr: Ipv4Net,
}

/// Keeps this node's table right until `stop`, and leaves it in place then: pods go on without us.
pub async fn run(
    config: ProxyConfig,
    informers: &Informers,
    requests: DrainRequests,
    stop: CancellationToken,
) {
    let services = informers.of_type::<Service>();
    let slices = informers.of_type::<EndpointSlice>();
    let here = FieldSelector::equal("spec.nodeName", &config.node_name);
    let pods = informers.selected(Kind::of::<Pod>(), here);
    let synced = async {
        services.synced().await;
        slices.synced().await;
        pods.synced().await;
    };
    // A table from before a restart stays in force until all is known.
    tokio::select! { () = synced => {}, () = stop.cancelled() => return }
    let mut inbox = Inbox {
        services: services.subscribe(),
        slices: slices.subscribe(),
        pods: pods.subscribe(),
        requests: requests.0,
    };
    let mut watch = TableWatch::new(&config.cluster.service_table());
    if let Err(error) = &watch {
        tracing::warn!(%error, "Service rules that someone removes come back only with the next change");
    }
    let mut state = State::new(config);
    let mut kernel = Kernel::default();
    loop {
        inbox.drain_into(&mut state);
        if state.has_work() || kernel.must_load {
            kernel.bring_up_to(&mut state).await;
        }
        let retry = kernel.retry_after();
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = inbox.wait_into(&mut state) => {}
            () = removed(&mut watch) => {
                tracing::warn!("Someone has removed the Service rules; putting them back");
                kernel.must_load = true;
            }
            () = tokio::time::sleep(retry.unwrap_or(Duration::MAX)), if retry.is_some() => {}
        }
    }
}

/// Returns when the table has been removed; never if that can't be told.
async fn removed(watch: &mut io::Result<TableWatch>) {
    let Ok(working) = watch else { return std::future::pending().await };
    if let Err(error) = working.removed().await {
        tracing::warn!(%error, "Service rules that someone removes come back only with the next change");
        *watch = Err(error);
    }
}

/// Everything that may change the tables.
struct Inbox {
    services: mpsc::UnboundedReceiver<Event>,
    slices: mpsc::UnboundedReceiver<Event>,
    pods: mpsc::UnboundedReceiver<Event>,
    requests: mpsc::UnboundedReceiver<Request>,
}

impl Inbox {
    /// Takes in one event. Ends never when all senders are gone: then only `stop` is left to come.
    async fn wait_into(&mut self, state: &mut State) {
        tokio::select! {
            Some(request) = self.requests.recv() => state.request(request),
            Some(event) = self.slices.recv() => state.slice(event),
            Some(event) = self.services.recv() => state.service(event),
            Some(event) = self.pods.recv() => state.pod(event),
            else => std::future::pending().await,
        }
    }

    /// Takes in what is there already.
    fn drain_into(&mut self, state: &mut State) {
        while let Ok(request) = self.requests.try_recv() {
            state.request(request);
        }
        while let Ok(event) = self.slices.try_recv() {
            state.slice(event);
        }
        while let Ok(event) = self.services.try_recv() {
            state.service(event);
        }
        while let Ok(event) = self.pods.try_recv() {
            state.pod(event);
        }
    }
}

/// What has been observed, and whose part of the tables is out of date because of it.
pub(crate) struct State {
    config: ProxyConfig,
    here: Locality,
    services: HashMap<Key, Arc<Object>>,
    /// By Service, then by their own key.
    slices: HashMap<Key, BTreeMap<Key, Arc<Object>>>,
    pods: HashMap<Key, Arc<Object>>,
    /// The Services with an endpoint at an address, to find what a drain concerns.
    by_address: HashMap<Ipv4Addr, HashMap<Key, usize>>,
    draining: HashSet<Ipv4Addr>,
    stale: BTreeSet<Owner>,
    waiting: Vec<oneshot::Sender<()>>,
    pub(crate) tables: Tables,
}

impl State {
    pub(crate) fn new(config: ProxyConfig) -> State {
        let table = TableConfig {
            name: config.cluster.service_table(),
            pod_cidr: config.pod_cidr,
            cluster_cidr: config.cluster_cidr,
        };
        State {
            here: Locality { node: config.node_name.clone(), zone: config.zone.clone() },
            config,
            services: HashMap::new(),
            slices: HashMap::new(),
            pods: HashMap::new(),
            by_address: HashMap::new(),
            draining: HashSet::new(),
            stale: BTreeSet::new(),
            waiting: Vec::new(),
            tables: Tables::new(table),
        }
    }

    fn has_work(&self) -> bool {
        !self.stale.is_empty() || !self.waiting.is_empty()
    }

    pub(crate) fn service(&mut self, event: Event) {
        let key = event.object().key().clone();
        put(&mut self.services, &key, event.new);
        self.stale.insert(Owner::Service(key));
    }

    pub(crate) fn pod(&mut self, event: Event) {
        let key = event.object().key().clone();
        put(&mut self.pods, &key, event.new);
        self.stale.insert(Owner::Pod(key));
    }

    pub(crate) fn slice(&mut self, event: Event) {
        if let Some((old, service)) = event.old.as_ref().and_then(|old| Some((old, service_of(old)?))) {
            let of_service = self.slices.entry(service.clone()).or_default();
            of_service.remove(old.key());
            if of_service.is_empty() {
                self.slices.remove(&service);
            }
            self.index(old, &service, false);
            self.stale.insert(Owner::Service(service));
        }
        if let Some((new, service)) = event.new.as_ref().and_then(|new| Some((new, service_of(new)?))) {
            self.slices.entry(service.clone()).or_default().insert(new.key().clone(), new.clone());
            self.index(new, &service, true);
            self.stale.insert(Owner::Service(service));
        }
    }

    fn index(&mut self, slice: &Object, service: &Key, added: bool) {
        let Some(slice) = typed::<EndpointSlice>(slice) else { return };
        for address in slice_addresses(&slice) {
            let services = self.by_address.entry(address).or_default();
            let count = services.entry(service.clone()).or_default();
            *count = if added { *count + 1 } else { count.saturating_sub(1) };
            if *count == 0 {
                services.remove(service);
            }
            if services.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    pub(crate) fn request(&mut self, request: Request) {
        let (address, changed) = match request {
            Request::Drain(address, done) => {
                self.waiting.push(done);
                (address, self.draining.insert(address))
            }
            Request::Forget(address) => (address, self.draining.remove(&address)),
        };
        if changed {
            let services = self.by_address.get(&address).into_iter().flat_map(HashMap::keys);
            self.stale.extend(services.cloned().map(Owner::Service));
        }
    }

    #[cfg(test)]
    pub(crate) fn is_draining(&self, address: Ipv4Addr) -> bool {
        self.draining.contains(&address)
    }

    /// Brings the tables up to date with what has been observed.
    pub(crate) fn settle(&mut self, change: &mut Change) {
        for owner in std::mem::take(&mut self.stale) {
            let (created, frontends) = match &owner {
                Owner::Service(key) => self.frontends_of_service(key),
                Owner::Pod(key) => self.frontends_of_pod(key),
            };
            self.tables.set(&owner, created, frontends, change);
        }
    }

    fn frontends_of_service(&self, key: &Key) -> (i64, Frontends) {
        let Some(object) = self.services.get(key) else { return (0, Frontends::new()) };
        let Some(service) = typed::<Service>(object) else { return (0, Frontends::new()) };
        let slices: Vec<Arc<EndpointSlice>> = self
            .slices
            .get(key)
            .into_iter()
            .flat_map(BTreeMap::values)
            .filter_map(|slice| typed(slice))
            .collect();
        let slices = slices.iter().map(|slice| &**slice);
        (created(object), of_service(&service, slices, &self.here, &self.draining))
    }

    fn frontends_of_pod(&self, key: &Key) -> (i64, Frontends) {
        let pod = self.pods.get(key).and_then(|object| Some((created(object), typed::<Pod>(object)?)));
        pod.map(|(created, pod)| (created, of_pod(&pod))).unwrap_or_default()
    }
}

/// What is in the kernel, as far as we know.
struct Kernel {
    /// The table is not ours, or not what we think: nothing but a full load helps.
    must_load: bool,
    failures: u32,
    /// What the kernel does not have yet.
    missing: Change,
}

impl Default for Kernel {
    fn default() -> Kernel {
        Kernel { must_load: true, failures: 0, missing: Change::default() }
    }
}

impl Kernel {
    /// One transaction. On a failure all who wait for it go on waiting, until it is repeated.
    async fn bring_up_to(&mut self, state: &mut State) {
        state.settle(&mut self.missing);
        let script =
            if self.must_load { state.tables.load() } else { self.missing.script(state.tables.config()) };
        if !script.is_empty() {
            let applied = tokio::task::spawn_blocking(move || apply_nft(&script)).await;
            if let Err(error) = applied.expect("running nft does not panic") {
                // The first failure may well be that someone has removed the table.
                if self.failures == 1 {
                    tracing::error!(%error, "Service rules can't be changed; trying again");
                }
                self.failures = self.failures.saturating_add(1);
                self.must_load = true;
                return;
            }
            if self.failures > 1 {
                tracing::info!("Service rules are up to date again");
            }
            (self.must_load, self.failures) = (false, 0);
        }
        for done in state.waiting.drain(..) {
            let _ = done.send(());
        }
        forget_lost(state, std::mem::take(&mut self.missing)).await;
    }

    fn retry_after(&self) -> Option<Duration> {
        match self.failures {
            0 => None,
            1 => Some(Duration::ZERO),
            n => Some(backoff(Duration::from_millis(100), Duration::from_secs(30), n - 2)),
        }
    }
}

/// UDP clients go on to endpoints that they no longer have unless the kernel is told.
async fn forget_lost(state: &State, change: Change) {
    type Lost = (Option<Ipv4Addr>, HashSet<SocketAddrV4>);
    let mut by_port: HashMap<u16, Vec<Lost>> = HashMap::new();
    for (frontend, gone) in change.lost_udp(&state.tables) {
        by_port.entry(frontend.port).or_default().push((frontend.address, gone));
    }
    if by_port.is_empty() {
        return;
    }
    let node = state.config.node_address;
    let stale = move |flow: &Flow| {
        by_port.get(&flow.to.port()).into_iter().flatten().any(|(address, gone)| {
            let to = *flow.to.ip();
            let ours = address.map_or(to == node || to.is_loopback(), |address| to == address);
            // A flow that is not translated was there before the Service had endpoints.
            gone.contains(&flow.answered_by) || ours && flow.answered_by == flow.to
        })
    };
    if let Err(error) = forget_udp_flows(stale).await {
        tracing::warn!(%error, "UDP clients may keep an endpoint that has gone");
    }
}

fn put(objects: &mut HashMap<Key, Arc<Object>>, key: &Key, new: Option<Arc<Object>>) {
    match new {
        Some(object) => drop(objects.insert(key.clone(), object)),
        None => drop(objects.remove(key)),
    }
}

fn service_of(slice: &Object) -> Option<Key> {
    Some(Key::new(slice.namespace(), slice.labels().get(SERVICE_NAME)?))
}

/// Seconds since 1970.
fn created(object: &Object) -> i64 {
    object.created().map_or(0, |time| time.as_second())
}
