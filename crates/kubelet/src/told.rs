//! What the API server was told of a pod's status: a write at a time, of what differs, until it has it all.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_api::{ApiType, Object, Status};
use minke_client::{Client, Patch, Target};
use serde_json::Value;
use tokio::task::{JoinError, JoinSet};

use crate::pod::Pod;
use crate::status;

pub struct Told {
    /// The last status that was worked out, with the conditions of others.
    last: core::PodStatus,
    /// What the API server has of it, as far as is known.
    written: Value,
    writing: JoinSet<Written>,
    retry: Option<(Timestamp, u32)>,
}

/// What was written, and how that went.
pub type Written = (Value, Result<Arc<Object>, Status>);

impl Told {
    pub fn new(pod: &Pod) -> Told {
        Told {
            last: pod.status().cloned().unwrap_or_default(),
            written: pod.object().value().get("status").cloned().unwrap_or_default(),
            writing: JoinSet::new(),
            retry: None,
        }
    }

    pub fn last(&self) -> &core::PodStatus {
        &self.last
    }

    /// When a write that failed is to be tried again.
    pub fn due(&self) -> Option<Timestamp> {
        self.retry.map(|(at, _)| at)
    }

    /// Readiness gates are conditions that others write.
    pub fn keep_theirs(&mut self, pod: &Pod) {
        let theirs = pod.status().and_then(|status| status.conditions.clone()).unwrap_or_default();
        add_theirs(&mut self.last, theirs);
    }

    /// Another object is to show the status, of which nothing is known but what it says.
    pub fn start_over(&mut self, shown: Option<&Object>) {
        self.written = shown.and_then(|shown| shown.value().get("status").cloned()).unwrap_or_default();
        // What was said before the agent was started goes on.
        if let Ok(known) = serde_json::from_value::<core::PodStatus>(self.written.clone()) {
            let last = &mut self.last.start_time;
            *last = known.start_time.or(last.take());
        }
    }

    /// Writes `status` to what shows the pod, if that is there; true when the API server has it.
    pub fn tell(
        &mut self,
        client: &Arc<dyn Client>,
        shown: Option<Arc<Object>>,
        status: core::PodStatus,
        now: Timestamp,
    ) -> bool {
        let wanted = status.to_value();
        let known = std::mem::replace(&mut self.last, status).conditions;
        add_theirs(&mut self.last, known.unwrap_or_default());
        if !self.writing.is_empty() {
            return false;
        }
        let Some(shown) = shown else { return true };
        let Some(patch) = status::patch(shown.uid(), &self.written, &wanted) else { return true };
        if self.retry.is_some_and(|(at, _)| at > now) {
            return false;
        }
        let client = client.clone();
        self.writing.spawn(async move {
            let target = Target::of(&shown).sub("status");
            let result = client.patch(target, Patch::Strategic(patch)).await;
            (wanted, result)
        });
        false
    }

    /// Waits until a write has ended; for ever when there is none.
    pub async fn written(&mut self) -> Result<Written, JoinError> {
        match self.writing.join_next().await {
            Some(written) => written,
            None => std::future::pending().await,
        }
    }

    /// Takes in how a write of `pod`'s status ended; returns the pod as it is now.
    pub fn take(&mut self, written: Result<Written, JoinError>, pod: &Pod) -> Option<Pod> {
        let failures = self.retry.take().map_or(0, |(_, failures)| failures);
        match written {
            Ok((wanted, Ok(object))) => {
                self.written = wanted;
                return Pod::new(object);
            }
            // The watch will tell that the pod is gone, or another by now.
            Ok((wanted, Err(error))) if error.is_not_found() || error.is_conflict() => self.written = wanted,
            Ok((_, Err(error))) => {
                tracing::warn!(pod = %pod.long_name(), %error, "Pod status not written");
                let delay =
                    minke_client::backoff(Duration::from_millis(200), Duration::from_secs(10), failures);
                let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::from_secs(10));
                self.retry = Some((Timestamp::now() + delay, failures + 1));
            }
            Err(error) => tracing::error!(%error, "Writing a pod status panicked"),
        }
        None
    }
}

/// Conditions of others stay in view, for readiness gates and transition times.
fn add_theirs(status: &mut core::PodStatus, theirs: Vec<core::PodCondition>) {
    let ours = status.conditions.get_or_insert_default();
    let is_theirs = |theirs: &core::PodCondition, ours: &[core::PodCondition]| {
        !status::PASSING.contains(&theirs.type_.as_str())
            && !ours.iter().any(|ours| ours.type_ == theirs.type_)
    };
    for condition in theirs {
        if is_theirs(&condition, ours) {
            ours.push(condition);
        }
    }
}
