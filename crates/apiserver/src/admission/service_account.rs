//! ServiceAccount: a pod runs under an account of its namespace and finds that account's token in a volume.
//!
//! Upstream: plugin/pkg/admission/serviceaccount.

use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Status};
use serde_json::{Value, json};

use super::{Context, Request};
use crate::kinds::tree::Tree;
use crate::registry::generate_name;

const VOLUME_PREFIX: &str = "kube-api-access-";
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Lifetime that is asked for; see [`crate::tokens`] for what is given.
const TOKEN_SECONDS: i64 = 3607;

pub fn fill(context: &Context<'_>, request: &Request<'_>, pod: &mut Value) -> Result<(), Status> {
    if !request.creates("", "Pod") {
        return Ok(());
    }
    // Mirror pods show what a node runs on its own account.
    if pod.at("metadata").at("annotations").has(MIRROR) {
        if pod.at("spec").has("serviceAccountName") {
            return Err(request.forbid("a mirror pod may not reference service accounts"));
        }
        return Ok(());
    }
    let spec = pod.object("spec");
    spec.fill("serviceAccountName", "default");
    let name = spec.text("serviceAccountName").to_owned();
    spec.set("serviceAccount", name.as_str());
    let accounts = Kind::of::<core::ServiceAccount>();
    let namespace = request.namespace;
    let Some(account) = context.snapshots.get(accounts, namespace, &name) else {
        return Err(request.forbid(format!(
            "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
        )));
    };
    let account = account.value();
    if !spec.has("imagePullSecrets") && account.has("imagePullSecrets") {
        spec.set("imagePullSecrets", account.at("imagePullSecrets").clone());
    }
    let automount = spec.at("automountServiceAccountToken").as_bool();
    if automount.or(account.at("automountServiceAccountToken").as_bool()).unwrap_or(true) {
        mount_token(spec);
    }
    Ok(())
}

fn mount_token(spec: &mut Value) {
    let known = spec.items("volumes").iter().map(|volume| volume.text("name"));
    let known = known.into_iter().find(|name| name.starts_with(VOLUME_PREFIX)).map(str::to_owned);
    let volume = known.clone().unwrap_or_else(|| generate_name(VOLUME_PREFIX));
    let mut needed = false;
    for list in ["initContainers", "containers"] {
        for container in spec.each(list) {
            if container.items("volumeMounts").iter().any(|mount| mount.text("mountPath") == MOUNT_PATH) {
                continue;
            }
            needed = true;
            let mount = json!({"name": volume, "readOnly": true, "mountPath": MOUNT_PATH});
            push(container, "volumeMounts", mount);
        }
    }
    if needed && known.is_none() {
        push(
            spec,
            "volumes",
            json!({"name": volume, "projected": {"defaultMode": 0o644, "sources": [
                {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{
                    "path": "namespace",
                    "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"},
                }]}},
            ]}}),
        );
    }
}

fn push(holder: &mut Value, list: &str, item: Value) {
    let mut items = holder.items(list).to_vec();
    items.push(item);
    holder.set(list, items);
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::snapshots::fake::Cluster;

    fn pod(spec: Value) -> Value {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "a"},
            "spec": {"containers": [{"name": "c"}]}});
        for (field, value) in spec.as_object().unwrap() {
            pod["spec"].set(field, value.clone());
        }
        pod
    }

    fn admit(spec: Value) -> Result<Value, String> {
        let account = |name: &str, more: Value| {
            let mut account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "a"}});
            for (field, value) in more.as_object().unwrap() {
                account.set(field, value.clone());
            }
            account
        };
        let cluster = Cluster::with([
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}),
            account("default", json!({"imagePullSecrets": [{"name": "pull"}]})),
            account("quiet", json!({"automountServiceAccountToken": false})),
        ]);
        testing::create(&cluster, pod(spec)).map_err(|status| status.message)
    }

    #[test]
    fn a_pod_gets_the_default_account_and_its_token() {
        let pod = admit(json!({})).unwrap();
        let spec = &pod["spec"];
        assert_eq!(spec["serviceAccountName"], "default");
        assert_eq!(spec["serviceAccount"], "default");
        assert_eq!(spec["imagePullSecrets"], json!([{"name": "pull"}]));
        let volume = spec["volumes"][0]["name"].as_str().unwrap();
        assert!(volume.starts_with("kube-api-access-") && volume.len() == 21, "{volume}");
        assert_eq!(spec["containers"][0]["volumeMounts"][0]["name"], volume);
        assert_eq!(
            spec["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"],
            3607
        );
    }

    #[test]
    fn who_wants_no_token_gets_none() {
        assert!(
            admit(json!({"automountServiceAccountToken": false})).unwrap()["spec"].get("volumes").is_none()
        );
        assert!(admit(json!({"serviceAccountName": "quiet"})).unwrap()["spec"].get("volumes").is_none());
        let asked = json!({"serviceAccountName": "quiet", "automountServiceAccountToken": true});
        assert!(admit(asked).unwrap()["spec"].get("volumes").is_some());
        let own = json!({"containers": [{"name": "c", "volumeMounts": [{"name": "mine", "mountPath": MOUNT_PATH}]}]});
        assert!(admit(own).unwrap()["spec"].get("volumes").is_none());
    }

    #[test]
    fn a_missing_account_is_named() {
        assert_eq!(
            admit(json!({"serviceAccountName": "bot"})).unwrap_err(),
            "pods \"web\" is forbidden: error looking up service account a/bot: serviceaccount \"bot\" not found"
        );
    }
}
