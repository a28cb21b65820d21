//! Counts of pods by place, kept up to date change by change, so that no try has to walk all pods.
//!
//! A *topology* is a label key of nodes; its values are *domains*, numbered. A [`Tally`] counts the pods that one
//! pod asks about (a spread constraint's selector, affinity terms); a [`Carried`] counts the pods that carry
//! one and the same affinity term, for the other direction.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use minke_api::{LabelSelector, Object};

use crate::affinity::{Namespaces, Term};

/// Tallies that are kept; the one that was not asked for longest goes first.
const TALLIES_MAX: usize = 512;

/// Number of a topology key.
pub type KeyId = usize;
/// Number of a domain within its topology; 0 is no domain.
pub type Domain = u32;

/// One topology key: the domain of each node.
#[derive(Debug, Default)]
pub struct Topology {
    name: Arc<str>,
    by_value: HashMap<Arc<str>, Domain>,
    of_slot: Vec<Domain>,
    /// Nodes in each domain.
    nodes: Vec<u32>,
}

impl Topology {
    pub fn domain(&self, slot: u32) -> Domain {
        self.of_slot.get(slot as usize).copied().unwrap_or_default()
    }

    /// Nodes of each domain, by its number; the first entry is meaningless.
    pub fn nodes(&self) -> &[u32] {
        &self.nodes
    }

    pub fn nodes_with(&self) -> u32 {
        self.nodes.iter().skip(1).sum()
    }

    fn set(&mut self, slot: u32, value: Option<&str>) {
        let slot = slot as usize;
        if self.of_slot.len() <= slot {
            self.of_slot.resize(slot + 1, 0);
        }
        let old = self.of_slot[slot];
        if old != 0 {
            self.nodes[old as usize] -= 1;
        }
        let domain = match value {
            None => 0,
            Some(value) => match self.by_value.get(value) {
                Some(domain) => *domain,
                None => {
                    let domain = self.by_value.len() as Domain + 1;
                    self.by_value.insert(value.into(), domain);
                    domain
                }
            },
        };
        if self.nodes.len() <= domain as usize {
            self.nodes.resize(domain as usize + 1, 0);
        }
        if domain != 0 {
            self.nodes[domain as usize] += 1;
        }
        self.of_slot[slot] = domain;
    }
}

/// Pods by domain of one topology.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    by_domain: Vec<u32>,
    pub total: u64,
}

impl Counts {
    pub fn at(&self, domain: Domain) -> u32 {
        if domain == 0 { 0 } else { self.by_domain.get(domain as usize).copied().unwrap_or_default() }
    }

    pub fn add(&mut self, domain: Domain, count: i64) {
        if domain == 0 {
            return;
        }
        let at = domain as usize;
        if self.by_domain.len() <= at {
            self.by_domain.resize(at + 1, 0);
        }
        self.by_domain[at] = (i64::from(self.by_domain[at]) + count) as u32;
        self.total = (self.total as i64 + count) as u64;
    }
}

/// Which pods a tally counts.
#[derive(Debug)]
pub enum Asked {
    /// Pods of one namespace that are not on their way out, as spreading counts them.
    Spread { namespace: Arc<str>, selector: LabelSelector },
    /// Pods that match all of these terms, as affinity counts them.
    Terms(Vec<Arc<Term>>),
}

impl Asked {
    fn matches(&self, object: &Object, namespaces: &Namespaces) -> bool {
        match self {
            Asked::Spread { namespace, selector } => {
                object.deleted().is_none()
                    && object.namespace() == &**namespace
                    && selector.matches(object.labels())
            }
            Asked::Terms(terms) => terms.iter().all(|term| term.matches(object, namespaces)),
        }
    }

    /// The namespaces whose pods can match, if that does not depend on labels of namespaces.
    fn namespaces(&self) -> Option<Vec<Arc<str>>> {
        match self {
            Asked::Spread { namespace, .. } => Some(vec![namespace.clone()]),
            Asked::Terms(terms) => {
                let named = terms.iter().find_map(|term| term.named_namespaces())?;
                Some(named.iter().map(|name| name.as_str().into()).collect())
            }
        }
    }

    fn depends_on_namespaces(&self) -> bool {
        match self {
            Asked::Spread { .. } => false,
            Asked::Terms(terms) => terms.iter().any(|term| term.named_namespaces().is_none()),
        }
    }
}

/// The pods that match, by node and by the domains of some topologies.
#[derive(Debug)]
pub struct Tally {
    asked: Asked,
    namespaces: Option<Vec<Arc<str>>>,
    /// Sorted by slot; never zero.
    by_slot: Vec<(u32, u32)>,
    by_key: Vec<(KeyId, Counts)>,
    used_at: u64,
}

impl Tally {
    pub fn at(&self, slot: u32) -> u32 {
        self.by_slot.binary_search_by_key(&slot, |(slot, _)| *slot).map_or(0, |at| self.by_slot[at].1)
    }

    /// Pods by domain of a topology that was asked for with the tally.
    pub fn counts(&self, key: KeyId) -> &Counts {
        let found = self.by_key.iter().find(|(id, _)| *id == key);
        &found.expect("a tally is asked for with the keys that are read").1
    }

    fn add(&mut self, slot: u32, count: i64, topologies: &[Topology]) {
        match self.by_slot.binary_search_by_key(&slot, |(slot, _)| *slot) {
            Ok(at) => {
                self.by_slot[at].1 = (i64::from(self.by_slot[at].1) + count) as u32;
                if self.by_slot[at].1 == 0 {
                    self.by_slot.remove(at);
                }
            }
            Err(at) => self.by_slot.insert(at, (slot, count as u32)),
        }
        for (key, counts) in &mut self.by_key {
            counts.add(topologies[*key].domain(slot), count);
        }
    }
}

/// Why a pod carries a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Carrying {
    RequiredAnti,
    Required,
    /// The weight; negative when shunned.
    Preferred(i64),
}

/// The pods that carry the same term for the same reason, by domain of its topology.
#[derive(Debug)]
pub struct Carried {
    pub why: Carrying,
    pub term: Arc<Term>,
    pub key: KeyId,
    pub counts: Counts,
    pods: u64,
}

/// A term of a pod with the key of its count.
pub type Carry = (Carrying, Arc<Term>);

/// All counts.
#[derive(Debug, Default)]
pub struct Tallies {
    topologies: Vec<Topology>,
    by_text: HashMap<Box<str>, usize>,
    tallies: Vec<Option<Tally>>,
    by_namespace: HashMap<Arc<str>, Vec<usize>>,
    /// Tallies that may count pods of any namespace.
    anywhere: Vec<usize>,
    carried: BTreeMap<(Carrying, Arc<str>), Carried>,
    asked: u64,
    /// Tallies asked for since then are in use.
    asked_before: u64,
}

/// Pods by domain of a topology, from pods by node.
fn by_domain(by_slot: &[(u32, u32)], topology: &Topology) -> Counts {
    let mut counts = Counts::default();
    for (slot, count) in by_slot {
        counts.add(topology.domain(*slot), i64::from(*count));
    }
    counts
}

impl Tallies {
    /// A new try begins: nobody holds numbers of tallies any more.
    pub fn begin(&mut self) {
        self.asked_before = self.asked;
    }

    pub fn topology(&self, key: KeyId) -> &Topology {
        &self.topologies[key]
    }

    /// The number of a topology key; `labels` tells the key's value on each node that exists.
    pub fn key<'n>(
        &mut self,
        name: &str,
        nodes: impl Iterator<Item = (u32, &'n BTreeMap<String, String>)>,
    ) -> KeyId {
        if let Some(at) = self.topologies.iter().position(|topology| &*topology.name == name) {
            return at;
        }
        let mut topology = Topology { name: name.into(), ..Topology::default() };
        for (slot, labels) in nodes {
            topology.set(slot, labels.get(name).map(String::as_str));
        }
        self.topologies.push(topology);
        self.topologies.len() - 1
    }

    /// Takes a node's new labels. Its pods must not be counted meanwhile.
    pub fn set_node(&mut self, slot: u32, labels: Option<&BTreeMap<String, String>>) {
        for topology in &mut self.topologies {
            let value = labels.and_then(|labels| labels.get(&*topology.name)).map(String::as_str);
            topology.set(slot, value);
        }
    }

    /// Whether so many keys or values are remembered that most of them must be of the past.
    pub fn is_stale(&self, nodes: usize) -> bool {
        self.topologies.len() > 256
            || self.topologies.iter().any(|topology| topology.by_value.len() > 4 * nodes + 1024)
    }

    pub fn get(&self, id: usize) -> &Tally {
        self.tallies[id].as_ref().expect("tallies are dropped only when another is asked for")
    }

    pub fn find(&mut self, text: &str, keys: &[KeyId]) -> Option<usize> {
        let id = *self.by_text.get(text)?;
        let tally = self.tallies[id].as_mut()?;
        for key in keys {
            if !tally.by_key.iter().any(|(id, _)| id == key) {
                tally.by_key.push((*key, by_domain(&tally.by_slot, &self.topologies[*key])));
            }
        }
        self.asked += 1;
        tally.used_at = self.asked;
        Some(id)
    }

    /// Starts a tally, with the pods that are there already. `text` tells it apart from others.
    pub fn start<'p>(
        &mut self,
        text: &str,
        asked: Asked,
        keys: &[KeyId],
        pods: impl Iterator<Item = (u32, &'p Object)>,
        namespaces: &Namespaces,
    ) -> usize {
        if self.by_text.len() >= TALLIES_MAX {
            let used = |(id, tally): (usize, &Option<Tally>)| Some((tally.as_ref()?.used_at, id));
            if let Some((used_at, oldest)) = self.tallies.iter().enumerate().filter_map(used).min()
                && used_at <= self.asked_before
            {
                self.forget(oldest);
            }
        }
        self.asked += 1;
        let mut by_slot: BTreeMap<u32, u32> = BTreeMap::new();
        for (slot, object) in pods {
            if asked.matches(object, namespaces) {
                *by_slot.entry(slot).or_default() += 1;
            }
        }
        let by_slot: Vec<(u32, u32)> = by_slot.into_iter().collect();
        let by_key = keys.iter().map(|key| (*key, by_domain(&by_slot, &self.topologies[*key]))).collect();
        let tally = Tally { namespaces: asked.namespaces(), asked, by_slot, by_key, used_at: self.asked };
        let id = self.tallies.iter().position(Option::is_none).unwrap_or(self.tallies.len());
        match &tally.namespaces {
            None => self.anywhere.push(id),
            Some(names) => {
                for name in names {
                    self.by_namespace.entry(name.clone()).or_default().push(id);
                }
            }
        }
        if id == self.tallies.len() {
            self.tallies.push(None);
        }
        self.tallies[id] = Some(tally);
        self.by_text.insert(text.into(), id);
        id
    }

    fn forget(&mut self, id: usize) {
        self.by_text.retain(|_, at| *at != id);
        self.anywhere.retain(|at| *at != id);
        let Some(tally) = self.tallies[id].take() else { return };
        for name in tally.namespaces.iter().flatten() {
            if let Some(ids) = self.by_namespace.get_mut(name) {
                ids.retain(|at| *at != id);
                if ids.is_empty() {
                    self.by_namespace.remove(name);
                }
            }
        }
    }

    /// Labels of a namespace changed: what depended on them is counted anew when it is asked for again.
    pub fn namespaces_changed(&mut self) {
        let depending: Vec<usize> = (0..self.tallies.len())
            .filter(|id| self.tallies[*id].as_ref().is_some_and(|t| t.asked.depends_on_namespaces()))
            .collect();
        for id in depending {
            self.forget(id);
        }
    }

    /// Counts a pod in (`count` 1) or out (-1). The topologies of what it carries must be known.
    pub fn count(
        &mut self,
        slot: u32,
        object: &Object,
        carries: &[Carry],
        count: i64,
        namespaces: &Namespaces,
    ) {
        if !self.by_text.is_empty() {
            let here = self.by_namespace.get(object.namespace()).map_or(&[][..], Vec::as_slice);
            for id in here.iter().chain(&self.anywhere) {
                if let Some(tally) = &mut self.tallies[*id]
                    && tally.asked.matches(object, namespaces)
                {
                    tally.add(slot, count, &self.topologies);
                }
            }
        }
        for (why, term) in carries {
            let name = (*why, term.text().clone());
            if !self.carried.contains_key(&name) {
                let known = |topology: &Topology| *topology.name == *term.topology_key;
                let key = self.topologies.iter().position(known).expect("topologies are made known first");
                let (why, term) = (*why, term.clone());
                let carried = Carried { why, term, key, counts: Counts::default(), pods: 0 };
                self.carried.insert(name.clone(), carried);
            }
            let carried = self.carried.get_mut(&name).expect("it was just put in");
            carried.counts.add(self.topologies[carried.key].domain(slot), count);
            carried.pods = (carried.pods as i64 + count) as u64;
            if carried.pods == 0 {
                self.carried.remove(&name);
            }
        }
    }

    /// The terms that pods carry, required anti-affinity first.
    pub fn carried(&self) -> impl Iterator<Item = &Carried> {
        self.carried.values()
    }
}
