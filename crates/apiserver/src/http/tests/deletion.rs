use super::*;

#[tokio::test]
async fn what_is_deleted_is_gone() {
    let api = api().await;
    let created = api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let status = api.send(&format!("DELETE {CONFIGMAPS}/a"), &[], "").await.ok();
    assert_eq!((&status["kind"], &status["status"]), (&json!("Status"), &json!("Success")));
    assert_eq!(
        status["details"],
        json!({"name": "a", "kind": "configmaps", "uid": created["metadata"]["uid"]})
    );
    refused(
        api.send(&format!("DELETE {CONFIGMAPS}/a"), &[], "").await,
        404,
        "NotFound",
        "configmaps \"a\" not found",
    );
}

#[tokio::test]
async fn deletions_may_be_of_one_object_in_particular() {
    let api = api().await;
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let delete = |body: Value| {
        let (api, line) = (&api, format!("DELETE {CONFIGMAPS}/a"));
        async move { api.json(&line, body).await }
    };
    refused(
        delete(json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": "other"}})).await,
        409,
        "Conflict",
        "the UID in the precondition (other) does not match the UID in record (",
    );
    refused(
        delete(json!({"preconditions": {"resourceVersion": "1"}})).await,
        409,
        "Conflict",
        "the ResourceVersion in the precondition (1) does not match",
    );
    refused(
        delete(json!({"propagationPolicy": "Some"})).await,
        422,
        "Invalid",
        "propagationPolicy: Invalid value: \"Some\"",
    );
    refused(
        delete(json!({"propagationPolicy": "Background", "orphanDependents": true})).await,
        422,
        "Invalid",
        "orphanDependents and deletionPropagation cannot be both set",
    );
    delete(json!({"propagationPolicy": "Background"})).await.ok();
}

#[tokio::test]
async fn finalizers_keep_an_object_until_the_last_is_gone() {
    let api = api().await;
    let mut body = configmap("a");
    body["metadata"]["finalizers"] = json!(["a.io/b"]);
    api.json(&format!("POST {CONFIGMAPS}"), body).await.ok();
    let pending = api.send(&format!("DELETE {CONFIGMAPS}/a"), &[], "").await.ok();
    assert_eq!(
        (&pending["kind"], &pending["metadata"]["deletionGracePeriodSeconds"]),
        (&json!("ConfigMap"), &json!(0))
    );
    assert!(pending["metadata"]["deletionTimestamp"].is_string());
    refused(
        api.json(&format!("PATCH {CONFIGMAPS}/a"), json!({"metadata": {"finalizers": ["a.io/b", "a.io/c"]}}))
            .await,
        422,
        "Invalid",
        "no new finalizers can be added if the object is being deleted",
    );
    // Nothing but the finalizers keeps it; its deletion cannot be taken back.
    let patch = json!({"metadata": {"deletionTimestamp": null, "labels": {"x": "y"}}});
    let patched = api.json(&format!("PATCH {CONFIGMAPS}/a"), patch).await.ok();
    assert!(patched["metadata"]["deletionTimestamp"].is_string());
    api.json(&format!("PATCH {CONFIGMAPS}/a"), json!({"metadata": {"finalizers": null}})).await.ok();
    refused(api.get(&format!("{CONFIGMAPS}/a")).await, 404, "NotFound", "");
}

#[tokio::test]
async fn pods_go_when_their_kubelet_says_so() {
    let api = api().await;
    let mut on_node = pod("p");
    on_node["spec"]["nodeName"] = "n1".into();
    api.json(&format!("POST {PODS}"), on_node).await.ok();
    let going = api.send(&format!("DELETE {PODS}/p"), &[], "").await.ok();
    assert_eq!(
        (&going["kind"], &going["metadata"]["deletionGracePeriodSeconds"]),
        (&json!("Pod"), &json!(30))
    );
    let going = api.send(&format!("DELETE {PODS}/p?gracePeriodSeconds=5"), &[], "").await.ok();
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 5);
    let uid = &going["metadata"]["uid"];
    let last = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": uid}});
    api.json(&format!("DELETE {PODS}/p"), last).await.ok();
    refused(api.get(&format!("{PODS}/p")).await, 404, "NotFound", "pods \"p\" not found");
    // Nobody has to stop a pod that was never started.
    api.json(&format!("POST {PODS}"), pod("q")).await.ok();
    api.send(&format!("DELETE {PODS}/q"), &[], "").await.ok();
    refused(api.get(&format!("{PODS}/q")).await, 404, "NotFound", "");
}

#[tokio::test]
async fn namespaces_wait_to_be_emptied() {
    let api = api().await;
    api.json("POST /api/v1/namespaces", json!({"metadata": {"name": "x"}})).await.ok();
    let going = api.send("DELETE /api/v1/namespaces/x", &[], "").await.ok();
    assert_eq!(
        (&going["status"]["phase"], &going["spec"]["finalizers"]),
        (&json!("Terminating"), &json!(["kubernetes"]))
    );
    let create = api.json("POST /api/v1/namespaces/x/configmaps", configmap("a")).await;
    let status: minke_api::Status = serde_json::from_slice(&create.bytes).unwrap();
    assert!(status.has_cause("NamespaceTerminating"), "{status:?}");
    let mut namespace = going;
    namespace["spec"]["finalizers"] = json!([]);
    api.json("PUT /api/v1/namespaces/x/finalize", namespace).await.ok();
    refused(api.get("/api/v1/namespaces/x").await, 404, "NotFound", "namespaces \"x\" not found");
    refused(
        api.send("DELETE /api/v1/namespaces/default", &[], "").await,
        403,
        "Forbidden",
        "namespaces \"default\" is forbidden: this namespace may not be deleted",
    );
}

#[tokio::test]
async fn collections_are_deleted_by_selection() {
    let api = api().await;
    for name in ["a", "b", "c"] {
        let mut body = configmap(name);
        body["metadata"]["labels"] = json!({"keep": (name == "b").to_string()});
        api.json(&format!("POST {CONFIGMAPS}"), body).await.ok();
    }
    let deleted = api.send(&format!("DELETE {CONFIGMAPS}?labelSelector=keep=false"), &[], "").await.ok();
    assert_eq!((&deleted["kind"], names(&deleted)), (&json!("ConfigMapList"), vec!["a", "c"]));
    assert_eq!(names(&api.get(CONFIGMAPS).await.ok()), ["b"]);
}

#[tokio::test]
async fn budgets_limit_evictions() {
    let api = api().await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let budget = json!({"metadata": {"name": "b"}, "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "p"}}}});
    api.json(&format!("POST {budgets}"), budget).await.ok();
    let mut running = pod("p");
    running["spec"]["nodeName"] = "n1".into();
    api.json(&format!("POST {PODS}"), running).await.ok();
    let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    api.json(&format!("PATCH {PODS}/p/status"), ready).await.ok();
    let allow = |allowed: i32| {
        let (api, line) = (&api, format!("PATCH {budgets}/b/status"));
        let status = json!({"observedGeneration": 1, "disruptionsAllowed": allowed, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1});
        async move { api.json(&line, json!({"status": status})).await.ok() }
    };
    let evict = || {
        let (api, line) = (&api, format!("POST {PODS}/p/eviction"));
        async move { api.json(&line, json!({"metadata": {"name": "p"}})).await }
    };
    refused(
        evict().await,
        429,
        "TooManyRequests",
        "Cannot evict pod as it would violate the pod's disruption budget.",
    );
    allow(0).await;
    refused(evict().await, 429, "TooManyRequests", "");
    allow(1).await;
    assert_eq!(evict().await.code, 201);
    let budget = api.get(&format!("{budgets}/b")).await.ok();
    assert_eq!(budget["status"]["disruptionsAllowed"], 0);
    assert!(budget["status"]["disruptedPods"]["p"].is_string());
    let going = api.get(&format!("{PODS}/p")).await.ok();
    assert!(going["metadata"]["deletionTimestamp"].is_string());
    let conditions = going["status"]["conditions"].as_array().unwrap();
    assert!(
        conditions.iter().any(|c| c["type"] == "DisruptionTarget" && c["reason"] == "EvictionByEvictionAPI")
    );
}

/// A budget that selects app=p, with this spec, and its status.
async fn budget(api: &Api, spec: Value, status: Value) {
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    let mut budget = json!({"metadata": {"name": "b"}, "spec": spec});
    budget["spec"]["selector"] = json!({"matchLabels": {"app": "p"}});
    api.json(&format!("POST {budgets}"), budget).await.ok();
    let mut status = status;
    status["observedGeneration"] = 1.into();
    api.json(&format!("PATCH {budgets}/b/status"), json!({"status": status})).await.ok();
}

/// A pod of the budget on a node, ready or not.
async fn budgeted_pod(api: &Api, name: &str, phase: &str, ready: bool) {
    let mut running = pod(name);
    running["metadata"]["labels"] = json!({"app": "p"});
    running["spec"]["nodeName"] = "n1".into();
    running["spec"]["terminationGracePeriodSeconds"] = 0.into();
    api.json(&format!("POST {PODS}"), running).await.ok();
    let ready = if ready { "True" } else { "False" };
    let status = json!({"status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}});
    api.json(&format!("PATCH {PODS}/{name}/status"), status).await.ok();
}

#[tokio::test]
async fn only_healthy_pods_use_up_a_budget() {
    let evict = async |spec: Value, status: Value, phase: &str, ready: bool| {
        let api = api().await;
        budget(&api, spec, status).await;
        budgeted_pod(&api, "p", phase, ready).await;
        let answer = api.json(&format!("POST {PODS}/p/eviction"), json!({"metadata": {"name": "p"}})).await;
        let budget = api.get("/apis/policy/v1/namespaces/default/poddisruptionbudgets/b").await.ok();
        (answer.code, budget["status"]["disruptionsAllowed"].clone())
    };
    let exhausted =
        json!({"disruptionsAllowed": 0, "currentHealthy": 1, "desiredHealthy": 1, "expectedPods": 1});
    let short = json!({"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 1, "expectedPods": 1});
    let plenty =
        json!({"disruptionsAllowed": 2, "currentHealthy": 3, "desiredHealthy": 1, "expectedPods": 3});
    let spec = json!({"minAvailable": 1});
    let always = json!({"minAvailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow"});
    assert_eq!(evict(spec.clone(), exhausted.clone(), "Running", true).await, (429, json!(0)));
    assert_eq!(evict(spec.clone(), exhausted.clone(), "Running", false).await, (201, json!(0)));
    assert_eq!(evict(spec.clone(), short.clone(), "Running", false).await, (429, json!(0)));
    assert_eq!(evict(always, short.clone(), "Running", false).await, (201, json!(0)));
    assert_eq!(evict(spec.clone(), plenty, "Running", true).await, (201, json!(1)));
    for phase in ["Pending", "Succeeded", "Failed"] {
        assert_eq!(evict(spec.clone(), short.clone(), phase, false).await, (201, json!(0)), "{phase}");
    }
}

#[tokio::test]
async fn evictions_can_be_tried_dry_and_must_name_their_pod() {
    let api = api().await;
    budget(
        &api,
        json!({"minAvailable": 1}),
        json!({"disruptionsAllowed": 1, "currentHealthy": 2, "desiredHealthy": 1, "expectedPods": 2}),
    )
    .await;
    budgeted_pod(&api, "p", "Running", true).await;
    let evict = async |body: Value| api.json(&format!("POST {PODS}/p/eviction"), body).await;
    let dry = json!({"metadata": {"name": "p"}, "deleteOptions": {"dryRun": ["All"]}});
    assert_eq!(evict(dry).await.code, 201);
    let stays = api.get(&format!("{PODS}/p")).await.ok();
    assert!(stays["metadata"]["deletionTimestamp"].is_null() && stays["status"]["conditions"][1].is_null());
    let mismatch = "name in URL does not match name in Eviction object";
    refused(evict(json!({"metadata": {"name": "q"}})).await, 400, "BadRequest", mismatch);
    refused(evict(json!({})).await, 400, "BadRequest", mismatch);
    let other =
        json!({"metadata": {"name": "p"}, "deleteOptions": {"preconditions": {"resourceVersion": "1"}}});
    assert_eq!(evict(other).await.code, 409);
    let mut second = json!({"metadata": {"name": "c"}, "spec": {"selector": {}}});
    second["spec"]["minAvailable"] = 0.into();
    api.json("POST /apis/policy/v1/namespaces/default/poddisruptionbudgets", second).await.ok();
    let two = evict(json!({"metadata": {"name": "p"}})).await;
    assert_eq!(two.code, 500);
}

#[tokio::test]
async fn evictions_at_once_never_use_more_than_there_is() {
    let api = api().await;
    budget(
        &api,
        json!({"minAvailable": 17}),
        json!({"disruptionsAllowed": 3, "currentHealthy": 20, "desiredHealthy": 17, "expectedPods": 20}),
    )
    .await;
    for n in 0..20 {
        budgeted_pod(&api, &format!("p{n}"), "Running", true).await;
    }
    let evictions = (0..20).map(|n| {
        let (api, name) = (&api, format!("p{n}"));
        async move {
            api.json(&format!("POST {PODS}/{name}/eviction"), json!({"metadata": {"name": name}})).await.code
        }
    });
    let codes = futures_util::future::join_all(evictions).await;
    assert_eq!(codes.iter().filter(|code| **code == 201).count(), 3, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == 429).count(), 17, "{codes:?}");
    let budget = api.get("/apis/policy/v1/namespaces/default/poddisruptionbudgets/b").await.ok();
    assert_eq!(budget["status"]["disruptedPods"].as_object().unwrap().len(), 3);
    assert_eq!(budget["status"]["disruptionsAllowed"], 0);
    assert_eq!(budget["status"]["conditions"][0]["reason"], "InsufficientPods");
}
