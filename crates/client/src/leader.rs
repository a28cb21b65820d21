//! Leader election by a Lease: of all who run the same work, one does it.
//!
//! Whoever is named by the lease and renews it leads. Others watch it, and take it when it was not renewed for as
//! long as it lasts by their own clock, since clocks differ. Who comes back under its old name goes on at once.
//! Upstream: client-go tools/leaderelection.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use minke_api::time::format_micros;
use minke_api::{FieldSelector, Kind, Object, Status};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{Change, Client, Clock, EventRecorder, EventSource, Informers, Target, typed};

/// How long a lease that is not renewed is respected.
const LASTS: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long leads no more.
const DEADLINE: Duration = Duration::from_secs(10);
/// Twice within the deadline: each renewal is a durable write.
const RENEW_EVERY: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// What is led, and who wants to.
pub struct Election {
    pub client: Arc<dyn Client>,
    pub namespace: &'static str,
    pub name: &'static str,
    /// Different for each who asks, and the same when it comes back.
    pub identity: String,
    pub clock: Clock,
}

/// Does `work` whenever we lead, until `stop`. The token that `work` gets is cancelled when it must end.
pub async fn lead<F: Future<Output = ()>>(
    election: Election,
    stop: CancellationToken,
    work: impl Fn(CancellationToken) -> F,
) {
    let source = EventSource { component: election.name.to_owned(), host: String::new(), series: false };
    // Ends when it is dropped, so that the last word of a leader is heard.
    let events =
        EventRecorder::new(election.client.clone(), source, election.clock, CancellationToken::new());
    while let Some(lease) = stop.run_until_cancelled(election.acquire(&stop)).await.flatten() {
        tracing::info!(identity = election.identity, lease = election.name, "Leading");
        events.normal(&lease, "LeaderElection", format!("{} became leader", election.identity));
        let term = stop.child_token();
        let keep = async {
            let last = election.keep(lease, &term).await;
            term.cancel();
            last
        };
        let ((), lease) = tokio::join!(work(term.clone()), keep);
        if !stop.is_cancelled() {
            tracing::error!(identity = election.identity, lease = election.name, "The lease was lost");
            events.normal(&lease, "LeaderElection", format!("{} stopped leading", election.identity));
        } else if let Err(error) = election.release(&lease).await {
            tracing::debug!(%error, "The lease was not given back");
        }
    }
}

fn spec(lease: &Object) -> LeaseSpec {
    typed::<Lease>(lease).and_then(|lease| lease.spec.clone()).unwrap_or_default()
}

/// For how long the lease is somebody else's, counted from when it was last seen to change.
fn respected(spec: &LeaseSpec, identity: &str) -> Duration {
    match spec.holder_identity.as_deref() {
        None | Some("") => Duration::ZERO,
        Some(holder) if holder == identity => Duration::ZERO,
        _ => spec.lease_duration_seconds.map_or(LASTS, |seconds| Duration::from_secs(seconds.max(0) as u64)),
    }
}

impl Election {
    fn target(&self) -> Target<'_> {
        Target::object(Kind::of::<Lease>(), self.namespace, self.name)
    }

    /// The lease, once it is ours; none at the end.
    async fn acquire(&self, stop: &CancellationToken) -> Option<Arc<Object>> {
        let mut changes: Option<mpsc::UnboundedReceiver<Change>> = None;
        let mut seen: Option<(Value, Instant)> = None;
        loop {
            let lease = match self.client.get(self.target()).await {
                Ok(lease) => Some(lease),
                Err(error) if error.is_not_found() => None,
                Err(error) => {
                    self.pause(&error).await;
                    continue;
                }
            };
            let old = lease.as_deref().map(spec).unwrap_or_default();
            let (record, now) = (json!(old), Instant::now());
            if seen.as_ref().is_none_or(|(known, _)| *known != record) {
                seen = Some((record, now));
            }
            let since = seen.as_ref().map_or(now, |(_, since)| *since);
            let free_at = since + respected(&old, &self.identity);
            if free_at > now {
                let changes = changes.get_or_insert_with(|| {
                    let fields = FieldSelector::equal("metadata.name", self.name);
                    let leases = Informers::new(self.client.clone(), stop.clone());
                    leases.selected(Kind::of::<Lease>(), fields).subscribe()
                });
                // Whatever wakes us, the lease is read again.
                let _ = tokio::time::timeout_at(free_at, changes.recv()).await;
                continue;
            }
            match self.take(lease.as_deref(), &old).await {
                Ok(lease) => return Some(lease),
                Err(error) if error.is_conflict() || error.is_already_exists() => {}
                Err(error) => self.pause(&error).await,
            }
        }
    }

    async fn pause(&self, error: &Status) {
        tracing::warn!(%error, lease = self.name, "The lease cannot be had; trying again");
        tokio::time::sleep(RETRY_AFTER).await;
    }

    async fn take(&self, lease: Option<&Object>, old: &LeaseSpec) -> Result<Arc<Object>, Status> {
        let now = format_micros(self.clock.now());
        let stays = old.holder_identity.as_deref() == Some(&self.identity);
        let transitions = old.lease_transitions.unwrap_or_default() + i32::from(lease.is_some() && !stays);
        let acquired = old.acquire_time.as_ref().filter(|_| stays).map(|at| json!(at));
        let spec = json!({
            "holderIdentity": self.identity,
            "leaseDurationSeconds": LASTS.as_secs(),
            "acquireTime": acquired.unwrap_or_else(|| now.clone().into()),
            "renewTime": now,
            "leaseTransitions": transitions,
        });
        match lease {
            Some(lease) => self.put(lease, spec).await,
            None => {
                let metadata = json!({ "name": self.name, "namespace": self.namespace });
                let lease = json!({
                    "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec,
                });
                let place = Target::collection(Kind::of::<Lease>(), self.namespace);
                self.client.create(place, lease).await
            }
        }
    }

    /// Writes the lease as it was read.
    async fn put(&self, lease: &Object, spec: Value) -> Result<Arc<Object>, Status> {
        let mut body = lease.value();
        body["spec"] = spec;
        self.client.update(Target::of(lease), body).await
    }

    /// Renews until the end of the term, or until somebody else leads. Returns the lease as last known.
    async fn keep(&self, mut lease: Arc<Object>, term: &CancellationToken) -> Arc<Object> {
        let mut renewed = Instant::now();
        let mut wait = RENEW_EVERY;
        while renewed.elapsed() < DEADLINE {
            tokio::select! {
                biased;
                () = term.cancelled() => return lease,
                () = tokio::time::sleep(wait) => {}
            }
            match self.take(Some(&lease), &spec(&lease)).await {
                Ok(new) => {
                    (lease, renewed, wait) = (new, Instant::now(), RENEW_EVERY);
                    continue;
                }
                Err(error) => tracing::warn!(%error, lease = self.name, "The lease was not renewed"),
            }
            wait = RETRY_AFTER;
            // Someone may have changed something else about it. And a store that takes no writes from us
            // takes none from others: as long as it names us, we lead.
            match self.client.get(self.target()).await {
                Ok(now) if spec(&now).holder_identity.as_deref() == Some(&self.identity) => {
                    (lease, renewed) = (now, Instant::now());
                }
                Ok(other) => return other,
                Err(error) if error.is_not_found() => return lease,
                Err(_) => {}
            }
        }
        lease
    }

    /// Lets others take the lease at once.
    async fn release(&self, lease: &Object) -> Result<(), Status> {
        let mut free = spec(lease);
        free.holder_identity = Some(String::new());
        free.lease_duration_seconds = Some(1);
        let renewed = free.renew_time.is_some().then(|| format_micros(self.clock.now()));
        let mut free = json!(free);
        free["renewTime"] = json!(renewed);
        self.put(lease, free).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(spec: Value, want: u64) {
        let spec: LeaseSpec = serde_json::from_value(spec).unwrap();
        assert_eq!(respected(&spec, "me"), Duration::from_secs(want));
    }

    #[test]
    fn only_the_lease_of_another_is_respected() {
        check(json!({}), 0);
        check(json!({"holderIdentity": "", "leaseDurationSeconds": 1}), 0);
        check(json!({"holderIdentity": "me", "leaseDurationSeconds": 15}), 0);
        check(json!({"holderIdentity": "you", "leaseDurationSeconds": 20}), 20);
        check(json!({"holderIdentity": "you"}), 15);
    }
}
