//! InterPodAffinity: where a pod wants to be for the sake of other pods, and they for its.

use std::collections::BTreeMap;

use super::{Objection, Prepared, Scoring};
use crate::picture::{Node, Picture, PodInfo};
use crate::profile::Profile;
use crate::tally::{Asked, Carrying, Counts, KeyId};

/// What required terms, the pod's and those of others, say of nodes.
#[derive(Default)]
pub struct Required {
    /// The keys of the pod's required affinity and the tally of the pods that match all of its terms.
    wanted: Option<Wanted>,
    /// The keys and tallies of the pods that it must not meet.
    shunned: Vec<(KeyId, usize)>,
    /// Domains that pods already placed keep this pod out of.
    kept_out: Vec<(KeyId, Counts)>,
}

struct Wanted {
    keys: Vec<KeyId>,
    tally: usize,
    /// No pod anywhere matches, but the pod itself would: the first of a group may go anywhere.
    first_of_its_kind: bool,
}

impl Required {
    pub fn new(info: &PodInfo, picture: &mut Picture) -> Required {
        let mut required = Required::default();
        if let Some(affinities) = &info.affinities {
            if !affinities.required.is_empty() {
                let terms = &affinities.required;
                let keys: Vec<KeyId> = terms.iter().map(|term| picture.key_of(&term.topology_key)).collect();
                let texts: Vec<&str> = terms.iter().map(|term| &**term.text()).collect();
                let text = format!("a|{}", texts.join("&"));
                let tally = picture.tally(&text, &keys, || Asked::Terms(terms.clone()));
                let nobody = keys.iter().all(|key| picture.tallies.get(tally).counts(*key).total == 0);
                let first_of_its_kind =
                    nobody && terms.iter().all(|term| term.matches(&info.object, &picture.namespaces));
                required.wanted = Some(Wanted { keys, tally, first_of_its_kind });
            }
            for term in &affinities.required_anti {
                let key = picture.key_of(&term.topology_key);
                let text = format!("a|{}", term.text());
                let tally = picture.tally(&text, &[key], || Asked::Terms(vec![term.clone()]));
                required.shunned.push((key, tally));
            }
        }
        let anti = picture.tallies.carried().take_while(|carried| carried.why == Carrying::RequiredAnti);
        let matching = anti.filter(|carried| carried.term.matches(&info.object, &picture.namespaces));
        required.kept_out = matching.map(|carried| (carried.key, carried.counts.clone())).collect();
        required
    }

    pub fn is_empty(&self) -> bool {
        self.wanted.is_none() && self.shunned.is_empty() && self.kept_out.is_empty()
    }
}

pub fn filter(pod: &Prepared, picture: &Picture, node: &Node) -> Option<Objection> {
    let tallies = &picture.tallies;
    let domain = |key: KeyId| tallies.topology(key).domain(node.slot);
    if let Some(wanted) = &pod.pods.wanted {
        let tally = tallies.get(wanted.tally);
        let has_all = wanted.keys.iter().all(|key| domain(*key) != 0);
        let met = || wanted.keys.iter().all(|key| tally.counts(*key).at(domain(*key)) > 0);
        if !has_all || !(wanted.first_of_its_kind || met()) {
            return Objection::one("node(s) didn't match pod affinity rules", true);
        }
    }
    let meets = |(key, tally): &(KeyId, usize)| tallies.get(*tally).counts(*key).at(domain(*key)) > 0;
    if pod.pods.shunned.iter().any(meets) {
        return Objection::one("node(s) didn't match pod anti-affinity rules", false);
    }
    if pod.pods.kept_out.iter().any(|(key, counts)| counts.at(domain(*key)) > 0) {
        return Objection::one("node(s) didn't satisfy existing pods anti-affinity rules", false);
    }
    None
}

/// Weights of domains, by topology key and domain.
#[derive(Debug)]
pub struct Preferred(Vec<(KeyId, Vec<i64>)>);

impl Preferred {
    /// `None` when nothing speaks for or against any node.
    pub fn new(info: &PodInfo, profile: &Profile, picture: &mut Picture) -> Option<Preferred> {
        let own = info.affinities.as_ref().map(|affinities| &affinities.preferred[..]).unwrap_or_default();
        let mut weights: BTreeMap<KeyId, Vec<i64>> = BTreeMap::new();
        let mut add = |key: KeyId, counts: &Counts, weight: i64, domains: usize| {
            if weight == 0 || counts.total == 0 {
                return;
            }
            let all = weights.entry(key).or_default();
            all.resize(domains.max(all.len()), 0);
            for (domain, sum) in all.iter_mut().enumerate().skip(1) {
                *sum += weight * i64::from(counts.at(domain as u32));
            }
        };
        for (term, weight) in own {
            let key = picture.key_of(&term.topology_key);
            let tally =
                picture.tally(&format!("a|{}", term.text()), &[key], || Asked::Terms(vec![term.clone()]));
            let domains = picture.tallies.topology(key).nodes().len();
            add(key, picture.tallies.get(tally).counts(key), *weight, domains);
        }
        for carried in picture.tallies.carried() {
            let weight = match carried.why {
                Carrying::RequiredAnti => continue,
                Carrying::Required => profile.args.hard_pod_affinity_weight,
                Carrying::Preferred(_) if profile.args.ignore_preferred_of_existing && own.is_empty() => {
                    continue;
                }
                Carrying::Preferred(weight) => weight,
            };
            if carried.term.matches(&info.object, &picture.namespaces) {
                let domains = picture.tallies.topology(carried.key).nodes().len();
                add(carried.key, &carried.counts, weight, domains);
            }
        }
        if weights.is_empty() {
            return None;
        }
        Some(Preferred(weights.into_iter().collect()))
    }
}

pub fn score(_: &Prepared, scoring: &Scoring, picture: &Picture, node: &Node, _: usize) -> i64 {
    let Some(pods) = &scoring.pods else { return 0 };
    let at = |(key, weights): &(KeyId, Vec<i64>)| {
        let domain = picture.tallies.topology(*key).domain(node.slot);
        weights.get(domain as usize).copied().unwrap_or_default()
    };
    pods.0.iter().map(at).sum()
}
