//! Clears away what kubelets asked of signers for their pods: what was issued they have taken by then, and what was
//! not they ask for anew.
//!
//! Upstream: pkg/controller/certificates/cleaner (PCRCleanerController).

use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use minke_api::{Kind, Status};
use minke_client::{Change, DeleteOptions};

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

const KEEP: Duration = Duration::from_secs(15 * 60);

pub(crate) struct PodCertificateRequests;

#[async_trait]
impl Controller for PodCertificateRequests {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<PodCertificateRequest>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        change.new.iter().map(|request| Item::of(request)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(request) = ctx.get::<PodCertificateRequest>(&item.key) else { return Ok(Requeue::Never) };
        let (object, now) = (&request.object, ctx.now());
        let end = object.created().unwrap_or(now).checked_add(KEEP).unwrap_or(now);
        if end > now {
            return Ok(Requeue::at(Some(end), now));
        }
        if !ctx.is_going(object) {
            ctx.delete(object, DeleteOptions::default()).await?;
        }
        Ok(Requeue::Never)
    }
}
