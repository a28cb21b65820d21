//! Deletes finished Jobs when their `ttlSecondsAfterFinished` has run out.
//!
//! Upstream: pkg/controller/ttlafterfinished.

use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use minke_api::{Kind, Status};
use minke_client::{Change, DeleteOptions, Propagation};

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

/// When the Job is to be deleted, if it has finished and has a TTL.
fn expires(job: &Job) -> Option<Timestamp> {
    let ttl = job.spec.as_ref()?.ttl_seconds_after_finished?;
    let mut conditions = job.status.as_ref()?.conditions.iter().flatten();
    let finished = |type_: &str| matches!(type_, "Complete" | "Failed");
    let end = conditions.find(|condition| finished(&condition.type_) && condition.status == "True")?;
    let end = end.last_transition_time.as_ref()?.0;
    end.checked_add(Duration::from_secs(u64::try_from(ttl).unwrap_or(0))).ok()
}

pub(crate) struct TtlAfterFinished;

#[async_trait]
impl Controller for TtlAfterFinished {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Job>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        change.new.iter().map(|job| Item::of(job)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(job) = ctx.get::<Job>(&item.key) else { return Ok(Requeue::Never) };
        let now = ctx.now();
        match expires(&job).filter(|_| !ctx.is_going(&job.object)) {
            None => Ok(Requeue::Never),
            Some(at) if at > now => Ok(Requeue::at(Some(at), now)),
            Some(_) => {
                // Its pods go first, so that nothing of it is left once it is gone.
                let propagation = Some(Propagation::Foreground);
                ctx.delete(&job.object, DeleteOptions { propagation, ..DeleteOptions::default() }).await?;
                Ok(Requeue::Never)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::tests::{NOW, time};
    use serde_json::{Value, json};

    #[track_caller]
    fn check(ttl: Value, conditions: Value, want: Option<i64>) {
        let job = json!({
            "spec": { "ttlSecondsAfterFinished": ttl, "template": {} }, "status": { "conditions": conditions },
        });
        let job: Job = serde_json::from_value(job).unwrap();
        assert_eq!(expires(&job).map(|at| at.as_second() - NOW), want);
    }

    #[test]
    fn a_finished_job_expires_after_its_ttl() {
        let condition =
            |type_: &str| json!([{ "type": type_, "status": "True", "lastTransitionTime": time(10) }]);
        check(60.into(), condition("Complete"), Some(50));
        check(0.into(), condition("Failed"), Some(-10));
        check(60.into(), condition("Suspended"), None);
        check(Value::Null, condition("Complete"), None);
    }
}
