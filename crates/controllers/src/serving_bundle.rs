//! Shows the cluster's certificate authority as a ClusterTrustBundle of the signer `kubernetes.io/kube-apiserver-serving`,
//! which pods may mount, and takes away those of former authorities.
//!
//! Upstream: pkg/controller/certificates/clustertrustbundlepublisher.

use async_trait::async_trait;
use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::Namespace;
use minke_api::{Kind, Status, pem};
use minke_client::{Change, DeleteOptions, Target};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::context::{Ctx, Item, Requeue, Shared};
use crate::run::Controller;

const SIGNER: &str = "kubernetes.io/kube-apiserver-serving";
/// It is always there, so that there is something to begin with.
const NAMESPACE: &str = "kube-system";

pub(crate) struct ServingBundle {
    pub pem: String,
}

/// The name says which authority it is.
fn name(pem: &str) -> String {
    let hash = Sha256::digest(pem.as_bytes());
    let hash: String = hash.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    format!("{}:{hash}", SIGNER.replace('/', ":"))
}

#[async_trait]
impl Controller for ServingBundle {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<ClusterTrustBundle>(), Kind::of::<Namespace>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        let Some(object) = change.new.as_ref().or(change.old.as_ref()) else { return vec![] };
        let ours = match object.kind() == Kind::of::<Namespace>() {
            true => object.name() == NAMESPACE,
            false => object.field("spec.signerName") == Some(SIGNER),
        };
        let item = Item::new(Kind::of::<ClusterTrustBundle>(), "", &name(&self.pem));
        if ours { vec![item] } else { vec![] }
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        if pem::blocks(&self.pem).next().is_none() {
            return Ok(Requeue::Never);
        }
        let (kind, name) = (Kind::of::<ClusterTrustBundle>(), &*item.key.name);
        let bundle = json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": { "name": name },
            "spec": { "signerName": SIGNER, "trustBundle": self.pem },
        });
        match ctx.get::<ClusterTrustBundle>(&item.key) {
            None => drop(ctx.create(kind, "", bundle).await?),
            Some(present) if present.spec.trust_bundle != self.pem => {
                let mut body = present.object.value();
                body["spec"] = bundle["spec"].clone();
                ctx.update(Target::of(&present.object), body).await?;
            }
            Some(_) => {}
        }
        // Former ones go once the present one is there.
        for (_, other) in ctx.informer::<ClusterTrustBundle>().snapshot().iter() {
            let former = other.field("spec.signerName") == Some(SIGNER) && other.name() != name;
            if former && !ctx.is_going(other) {
                ctx.delete(other, DeleteOptions::default()).await?;
            }
        }
        Ok(Requeue::Never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_authority_has_a_name() {
        assert_eq!(name(""), "kubernetes.io:kube-apiserver-serving:e3b0c44298fc1c149afbf4c8");
        assert_ne!(name("a"), name("b"));
    }
}
