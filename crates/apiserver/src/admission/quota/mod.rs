//! ResourceQuota: no namespace uses more than its quotas allow.
//!
//! What a write changes in the use of its namespace is written to the quotas in the same transaction, by a step
//! that runs when its turn comes in the store. So of many who create at once none sees an old count, none has
//! to try again, and neither a crash nor a refusal can leave a count that is wrong. Counting everything is only
//! for quotas that are new or changed: [`keeper`]. Upstream: plugin/pkg/admission/resourcequota.

pub mod keeper;
mod usage;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ResourceQuota;
use minke_api::{Draft, Key, Kind, Object, Quantity, Status};
use minke_store::Op;
use serde_json::Value;
use usage::{Usage, is_about, missing, usage, user_of};

use super::{Operation, Request};
use crate::Snapshots;
use crate::kinds::resources::{Amounts, amounts};
use crate::kinds::tree::Tree;

/// What a write changes in the quotas of its namespace.
#[derive(Debug, Default)]
pub struct Charges {
    /// Whether the write changes any use at all.
    matters: bool,
    charges: Vec<Charge>,
    /// The quotas that were known, and what they counted then.
    known: BTreeMap<Key, Known>,
}

#[derive(Debug, PartialEq)]
struct Known {
    uid: String,
    counts: Vec<String>,
}

#[derive(Debug, Clone)]
struct Charge {
    key: Key,
    uid: String,
    /// By how much the use changes, of everything that any quota could count.
    delta: Amounts,
    /// Whether the quota may refuse it.
    may_refuse: bool,
}

fn quotas() -> &'static Kind {
    Kind::of::<ResourceQuota>()
}

/// Works out what the write of `new` in place of `old` changes; either may be missing. Refuses what the quotas
/// do not allow as they are now, and what does not say how much it needs.
pub fn charges(
    snapshots: &dyn Snapshots,
    request: &Request<'_>,
    old: Option<&Value>,
    new: Option<&Value>,
    now: Timestamp,
) -> Result<Charges, Status> {
    let mut charges = Charges::default();
    let Some(sort) = Usage::of(request.kind) else { return Ok(charges) };
    if old.is_some() && new.is_some() && !may_change(sort, request, old, new) {
        return Ok(charges);
    }
    charges.matters = true;
    let all = snapshots.list(quotas(), request.namespace);
    if all.is_empty() {
        return Ok(charges);
    }
    let of =
        |object: Option<&Value>| object.map(|object| usage(request.kind, object, now)).unwrap_or_default();
    let (before, after) = (of(old), of(new));
    let may_refuse = may_refuse(sort, request);
    for quota in &all {
        let value = quota.value();
        let hard = amounts(value.at("status").at("hard"));
        let counts = hard.keys().cloned().collect();
        charges.known.insert(quota.key().clone(), Known { uid: quota.uid().to_owned(), counts });
        let about = |object: Option<&Value>| {
            object.is_some_and(|object| is_about(value.at("spec"), request.kind, object))
        };
        let (was_in, is_in) = (about(old), about(new));
        if is_in && may_refuse {
            let limited: Vec<&str> =
                hard.keys().map(String::as_str).filter(|name| user_of(name) == Some(request.kind)).collect();
            let new = new.expect("what is in the quota is there");
            if sort == Usage::Pod
                && let Some(why) = missing(new, &limited)
            {
                return Err(request.forbid(format!("failed quota: {}: {why}", quota.name())));
            }
            let used = value.at("status").at("used");
            let unknown: Vec<&str> = limited.into_iter().filter(|name| used.get(*name).is_none()).collect();
            if !unknown.is_empty() {
                let resources = unknown.join(",");
                return Err(request
                    .forbid(format!("status unknown for quota: {}, resources: {resources}", quota.name())));
            }
        }
        let delta = difference(was_in.then_some(&before), is_in.then_some(&after));
        if let Some((name, _)) = delta.iter().find(|(_, change)| change.is_negative() && old.is_none()) {
            return Err(request.forbid(format!("quota usage is negative for resource(s): {name}")));
        }
        // A quota that is not counted yet only needs to know that something has happened.
        let counted = !keeper::is_stale(&value);
        if delta.is_empty() || counted && !delta.keys().any(|name| hard.contains_key(name)) {
            continue;
        }
        let (key, uid) = (quota.key().clone(), quota.uid().to_owned());
        let charge = Charge { key, uid, delta, may_refuse };
        if let Some(why) = charge.exceeds(quota.name(), &value) {
            return Err(request.forbid(why));
        }
        charges.charges.push(charge);
    }
    Ok(charges)
}

/// Whether the change of an object can change what it uses.
fn may_change(sort: Usage, request: &Request<'_>, old: Option<&Value>, new: Option<&Value>) -> bool {
    let ended = |pod: Option<&Value>| {
        pod.is_some_and(|pod| matches!(pod.at("status").text("phase"), "Failed" | "Succeeded"))
    };
    match sort {
        Usage::Count => false,
        // The most frequent write of all.
        Usage::Pod if request.subresource == "status" => ended(old) != ended(new),
        _ => true,
    }
}

/// Whether this is a write that quotas are asked about; others are only counted.
fn may_refuse(sort: Usage, request: &Request<'_>) -> bool {
    match (request.operation, request.subresource) {
        (Operation::Create, "") => true,
        (Operation::Update, "") => matches!(sort, Usage::Service | Usage::Claim),
        (Operation::Update, "resize") => sort == Usage::Pod,
        _ => false,
    }
}

fn difference(before: Option<&Amounts>, after: Option<&Amounts>) -> Amounts {
    let mut delta = after.cloned().unwrap_or_default();
    for (name, amount) in before.into_iter().flatten() {
        *delta.entry(name.clone()).or_default() -= *amount;
    }
    delta.retain(|_, amount| !amount.is_zero());
    delta
}

impl Charge {
    /// What the quota counts of the change.
    fn requested<'a>(&'a self, hard: &'a Amounts) -> impl Iterator<Item = (&'a String, &'a Quantity)> {
        self.delta.iter().filter(|(name, _)| hard.contains_key(*name))
    }

    /// Why the quota, as it stands in `quota`, does not allow the change.
    fn exceeds(&self, name: &str, quota: &Value) -> Option<String> {
        if !self.may_refuse {
            return None;
        }
        let status = quota.at("status");
        let (hard, used) = (amounts(status.at("hard")), amounts(status.at("used")));
        let now_used = |name: &String| used.get(name).copied().unwrap_or_default();
        let too_much: Vec<(&String, &Quantity)> = self
            .requested(&hard)
            .filter(|(name, more)| !more.is_negative() && now_used(name) + **more > hard[*name])
            .collect();
        if too_much.is_empty() {
            return None;
        }
        let list = |amount: &dyn Fn(&String, &Quantity) -> Quantity| {
            let each = too_much.iter().map(|(name, more)| format!("{name}={}", amount(name, more)));
            each.collect::<Vec<_>>().join(",")
        };
        Some(format!(
            "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
            list(&|_, more| *more),
            list(&|name, _| now_used(name)),
            list(&|name, _| hard[name]),
        ))
    }

    /// The quota after the change; nothing if it does not allow it.
    fn apply(&self, quota: &Object) -> Option<Draft> {
        let mut value = quota.value();
        if quota.uid() != self.uid {
            return uncounted(value);
        }
        if self.exceeds("", &value).is_some() {
            return None;
        }
        let hard = amounts(value.at("status").at("hard"));
        let mut used = amounts(value.at("status").at("used"));
        for (name, more) in self.requested(&hard) {
            *used.entry(name.clone()).or_default() += *more;
        }
        let used = used.into_iter().map(|(name, amount)| (name, Value::from(amount.to_string())));
        let used: serde_json::Map<String, Value> = used.collect();
        if !used.is_empty() {
            value.object("status").set("used", used);
        }
        Draft::new(quotas(), &value).ok()
    }
}

/// The quota, such that the keeper counts anew; until then nobody gets anything of it.
fn uncounted(mut quota: Value) -> Option<Draft> {
    quota.object("status").unset("used");
    Draft::new(quotas(), &quota).ok()
}

impl Charges {
    /// The steps that go into the transaction of the write, after its own.
    pub fn ops(&self) -> impl Iterator<Item = Op> + '_ {
        self.charges.iter().map(|charge| {
            let charge = charge.clone();
            Op::amend(quotas(), charge.key.clone(), move |quota| charge.apply(quota))
        })
    }

    /// The refusal of the step numbered `n`, which found `quota`.
    pub fn refusal(&self, n: usize, quota: Option<&Arc<Object>>, kind: &Kind, name: &str) -> Status {
        let why = self
            .charges
            .get(n)
            .zip(quota)
            .and_then(|(charge, quota)| charge.exceeds(quota.name(), &quota.value()));
        Status::forbidden(kind, name, why.as_deref().unwrap_or("the quota could not be charged"))
    }

    /// After the write: the quotas that came or changed meanwhile and may not have counted it, to be
    /// counted anew. There are none but in a race.
    pub fn missed(&self, snapshots: &dyn Snapshots, namespace: &str) -> Vec<Op> {
        if !self.matters {
            return Vec::new();
        }
        let has_missed = |quota: &&Arc<Object>| match self.known.get(quota.key()) {
            None => true,
            Some(_) if self.charges.iter().any(|charge| charge.key == *quota.key()) => false,
            Some(known) => {
                let counts = amounts(quota.value().at("status").at("hard")).into_keys().collect();
                *known != Known { uid: quota.uid().to_owned(), counts }
            }
        };
        let all = snapshots.list(quotas(), namespace);
        let missed = all.iter().filter(has_missed);
        missed
            .map(|quota| Op::amend(quotas(), quota.key().clone(), |quota| uncounted(quota.value())))
            .collect()
    }
}

#[cfg(test)]
mod tests;
