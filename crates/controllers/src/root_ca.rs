//! Puts the cluster's certificate authority into every namespace, as ConfigMap `kube-root-ca.crt`.
//!
//! Upstream: pkg/controller/certificates/rootcacertpublisher.

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use minke_api::{Kind, Status};
use minke_client::{Change, Target};
use serde_json::json;

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::run::Controller;
use crate::serviceaccount::{is_active_namespace, namespaces_that_lack, unless_terminating};

const NAME: &str = "kube-root-ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";

pub(crate) struct RootCa {
    pub pem: String,
}

#[async_trait]
impl Controller for RootCa {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Namespace>(), Kind::of::<ConfigMap>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        namespaces_that_lack(change, Kind::of::<ConfigMap>(), NAME)
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let namespace = &*item.key.name;
        if !is_active_namespace(ctx, namespace) {
            return Ok(Requeue::Never);
        }
        let data = json!({ "ca.crt": self.pem });
        let description = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
                           endpoints such as the internal service IP or kubernetes.default.svc. No other usage is \
                           guaranteed across distributions of Kubernetes clusters.";
        let Some(present) = ctx.informer::<ConfigMap>().get(namespace, NAME) else {
            let map = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "data": data,
                "metadata": { "name": NAME, "namespace": namespace, "annotations": { DESCRIPTION: description } },
            });
            return unless_terminating(ctx.create(Kind::of::<ConfigMap>(), namespace, map).await.map(drop));
        };
        let Some(map) = Typed::<ConfigMap>::new(present.clone()) else { return Ok(Requeue::Never) };
        let described = map.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(DESCRIPTION));
        if json!(map.data) == data && map.binary_data.is_none() && described {
            return Ok(Requeue::Never);
        }
        let mut body = present.value();
        body["data"] = data;
        body["metadata"]["annotations"][DESCRIPTION] = description.into();
        body.as_object_mut().map(|body| body.remove("binaryData"));
        ctx.update(Target::of(&present), body).await?;
        Ok(Requeue::Never)
    }
}
