//! The REST rules, each tried over HTTP against a whole server.

mod deletion;
mod https;
mod lists;
mod pods;
mod reading;
mod watches;
mod writing;

use serde_json::{Value, json};

use crate::testing::{Answer, Api};

const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";
const PODS: &str = "/api/v1/namespaces/default/pods";

fn configmap(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"k": "v"}})
}

/// A pod that needs no service account to be admitted.
fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "image": "busybox"}], "automountServiceAccountToken": false},
    })
}

fn deployment(name: &str) -> Value {
    let labels = json!({"app": name});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "busybox"}]}},
        },
    })
}

/// A server with a default service account, so that pods are admitted.
async fn api() -> Api {
    let api = Api::new().await;
    for name in ["default"] {
        api.json("POST /api/v1/namespaces/default/serviceaccounts", json!({"metadata": {"name": name}}))
            .await
            .ok();
    }
    api
}

/// The wanted error: code, reason, and what the message contains.
#[track_caller]
fn refused(answer: Answer, code: u16, reason: &str, message: &str) {
    let (got_code, got_reason, got_message) = answer.error();
    assert_eq!((got_code, got_reason.as_str()), (code, reason), "{got_message}");
    assert!(got_message.contains(message), "{got_message:?} does not contain {message:?}");
}

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}
