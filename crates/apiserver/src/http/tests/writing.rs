use super::*;

#[tokio::test]
async fn create_fills_in_what_the_server_decides() {
    let api = api().await;
    let mut body = configmap("a");
    body["metadata"] = json!({
        "name": "a", "uid": "mine", "creationTimestamp": "2001-01-01T00:00:00Z", "generation": 7,
        "managedFields": [{"manager": "x"}], "deletionTimestamp": "2001-01-01T00:00:00Z",
    });
    let answer = api.json(&format!("POST {CONFIGMAPS}"), body).await;
    assert_eq!(answer.code, 201);
    let metadata = answer.ok()["metadata"].clone();
    assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("a"), &json!("default")));
    assert_eq!(metadata["uid"].as_str().unwrap().len(), 36);
    assert!(metadata["creationTimestamp"].as_str().unwrap() > "2026");
    for gone in ["generation", "managedFields", "deletionTimestamp"] {
        assert!(metadata.get(gone).is_none(), "{gone}");
    }
    let deployment = api
        .json("POST /apis/apps/v1/namespaces/default/deployments", {
            let mut deployment = deployment("d");
            deployment["status"] = json!({"replicas": 5});
            deployment
        })
        .await
        .ok();
    assert_eq!(
        (&deployment["metadata"]["generation"], &deployment["spec"]["replicas"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(deployment["status"], json!({}), "status is not the client's to set");
}

#[tokio::test]
async fn names_are_generated() {
    let api = api().await;
    let mut body = configmap("");
    body["metadata"] = json!({"generateName": "job-"});
    let first = api.json(&format!("POST {CONFIGMAPS}"), body.clone()).await.ok();
    let second = api.json(&format!("POST {CONFIGMAPS}"), body).await.ok();
    let name = first["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("job-") && name.len() == 9, "{name}");
    assert_ne!(first["metadata"]["name"], second["metadata"]["name"]);
}

#[tokio::test]
async fn creation_is_refused_for_upstreams_reasons() {
    let api = api().await;
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let with = |pointer: &str, value: Value| {
        let mut body = configmap("b");
        match pointer.rsplit_once('/') {
            Some((parent, name)) => body.pointer_mut(parent).unwrap()[name] = value,
            None => body[pointer] = value,
        }
        body
    };
    let line = format!("POST {CONFIGMAPS}");
    for (body, code, reason, message) in [
        (configmap("a"), 409, "AlreadyExists", "configmaps \"a\" already exists"),
        (
            with("/metadata/name", json!("B")),
            422,
            "Invalid",
            "ConfigMap \"B\" is invalid: metadata.name: Invalid value: \"B\": a lowercase RFC 1123 subdomain",
        ),
        (
            with("/metadata/name", json!("")),
            422,
            "Invalid",
            "metadata.name: Required value: name or generateName is required",
        ),
        (
            with("/metadata/namespace", json!("other")),
            400,
            "BadRequest",
            "the namespace of the provided object does not match the namespace sent on the request",
        ),
        (
            with("/metadata/resourceVersion", json!("5")),
            500,
            "",
            "resourceVersion should not be set on objects to be created",
        ),
        (
            with("kind", json!("Secret")),
            400,
            "BadRequest",
            "Secret in version \"v1\" cannot be handled as a ConfigMap",
        ),
        (
            with("apiVersion", json!("v2")),
            400,
            "BadRequest",
            "the API version in the data (v2) does not match the expected API version (v1)",
        ),
        (
            with("data", json!(["x"])),
            400,
            "BadRequest",
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: json: cannot unmarshal array into Go struct field",
        ),
        (json!([]), 400, "BadRequest", "cannot be handled as a ConfigMap"),
    ] {
        refused(api.json(&line, body).await, code, reason, message);
    }
    let send = |headers: &'static [&'static str], body: &'static str| {
        let (api, line) = (&api, &line);
        async move { api.send(line, headers, body).await }
    };
    refused(
        send(&["content-type: text/plain"], "{}").await,
        415,
        "UnsupportedMediaType",
        "application/json, application/yaml",
    );
    refused(send(&[], "{\"a\":").await, 400, "BadRequest", "must be of type ConfigMap");
    refused(send(&[], "").await, 400, "BadRequest", "<empty>");
    let huge = format!("{{\"data\":\"{}\"}}", "x".repeat(3 << 20));
    refused(api.send(&line, &[], huge).await, 413, "RequestEntityTooLarge", "limit is 3145728");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    refused(api.send(&line, &[], deep).await, 400, "BadRequest", "exceeded max depth");
    refused(
        api.json("POST /api/v1/namespaces/none/configmaps", configmap("a")).await,
        404,
        "NotFound",
        "namespaces \"none\" not found",
    );
}

#[tokio::test]
async fn bodies_may_be_yaml_or_protobuf() {
    let api = api().await;
    let line = format!("POST {CONFIGMAPS}");
    let yaml = "metadata:\n  name: yaml\ndata: {k: v}\n";
    let created = api.send(&line, &["content-type: application/yaml"], yaml).await.ok();
    assert_eq!((&created["kind"], &created["data"]["k"]), (&json!("ConfigMap"), &json!("v")));
    let ty = minke_api::schema::of("", "v1", "ConfigMap").unwrap();
    let protobuf = minke_api::codec::protobuf::encode(ty, &configmap("p"));
    let created =
        api.send(&line, &["content-type: application/vnd.kubernetes.protobuf"], protobuf).await.ok();
    assert_eq!(created["metadata"]["name"], "p");
    refused(
        api.send(&line, &["content-type: application/vnd.kubernetes.protobuf"], "nonsense").await,
        400,
        "BadRequest",
        "must be of type ConfigMap",
    );
}

#[tokio::test]
async fn unknown_fields_are_refused_warned_of_or_ignored() {
    let api = api().await;
    let body = r#"{"metadata":{"name":"a","labelz":{}},"data":{"k":"v","k":"w"}}"#;
    let send = |query: &str| {
        let (api, line) = (&api, format!("POST {CONFIGMAPS}?{query}"));
        async move { api.send(&line, &[], body).await }
    };
    refused(
        send("fieldValidation=Strict").await,
        400,
        "BadRequest",
        "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: \
         unknown field \"metadata.labelz\", duplicate field \"data.k\"",
    );
    refused(
        send("fieldValidation=Some").await,
        422,
        "Invalid",
        "fieldValidation: Unsupported value: \"Some\"",
    );
    let warned = send("dryRun=All").await;
    let warnings: Vec<&str> =
        warned.headers.get_all("warning").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(
        warnings,
        [r#"299 - "unknown field \"metadata.labelz\"""#, r#"299 - "duplicate field \"data.k\"""#]
    );
    let ignored = send("fieldValidation=Ignore").await;
    assert!(ignored.headers.get("warning").is_none());
    assert_eq!(ignored.ok()["data"]["k"], "w", "the last one counts");
    refused(
        api.json(&format!("PATCH {CONFIGMAPS}/a?fieldValidation=Strict"), json!({"spec": 1})).await,
        422,
        "Invalid",
        "ConfigMap \"a\" is invalid: patch: Invalid value: {\"spec\":1}: strict decoding error: unknown field \"spec\"",
    );
}

#[tokio::test]
async fn dry_runs_store_nothing() {
    let api = api().await;
    let path = format!("{CONFIGMAPS}/a");
    let before = api.store.revision();
    let shown = api.json(&format!("POST {CONFIGMAPS}?dryRun=All"), configmap("a")).await.ok();
    assert!(shown["metadata"]["uid"].is_string());
    assert_eq!(api.store.revision(), before);
    refused(api.get(&path).await, 404, "NotFound", "");
    refused(
        api.json(&format!("POST {CONFIGMAPS}?dryRun=Some"), configmap("a")).await,
        422,
        "Invalid",
        "dryRun: Unsupported value: \"Some\": supported values: \"All\"",
    );
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let before = api.store.revision();
    refused(
        api.json(&format!("POST {CONFIGMAPS}?dryRun=All"), configmap("a")).await,
        409,
        "AlreadyExists",
        "",
    );
    let patched = api.json(&format!("PATCH {path}?dryRun=All"), json!({"data": {"k": "w"}})).await.ok();
    assert_eq!(patched["data"]["k"], "w");
    api.send(&format!("DELETE {path}?dryRun=All"), &[], "").await.ok();
    api.json(&format!("DELETE {path}"), json!({"dryRun": ["All"]})).await.ok();
    assert_eq!(api.store.revision(), before);
}

#[tokio::test]
async fn updates_need_the_newest_revision() {
    let api = api().await;
    let path = format!("{CONFIGMAPS}/a");
    let put = |body: Value| {
        let (api, line) = (&api, format!("PUT {path}"));
        async move { api.json(&line, body).await }
    };
    refused(put(configmap("a")).await, 404, "NotFound", "configmaps \"a\" not found");
    let mut stored = api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let old = stored.clone();
    stored["data"]["k"] = "w".into();
    let updated = put(stored.clone()).await;
    assert_eq!(updated.code, 200);
    let updated = updated.ok();
    assert_ne!(updated["metadata"]["resourceVersion"], old["metadata"]["resourceVersion"]);
    refused(
        put(old.clone()).await,
        409,
        "Conflict",
        "Operation cannot be fulfilled on configmaps \"a\": the object has been modified; please apply your changes \
         to the latest version and try again",
    );
    // The same again is no write.
    let again = put(updated.clone()).await.ok();
    assert_eq!(again, updated);
    // Without a revision the last one wins.
    let forced = put(configmap("a")).await.ok();
    assert_eq!(forced["data"]["k"], "v");
    assert_eq!(forced["metadata"]["uid"], old["metadata"]["uid"]);
    assert_eq!(forced["metadata"]["creationTimestamp"], old["metadata"]["creationTimestamp"]);
    refused(
        put(configmap("b")).await,
        400,
        "BadRequest",
        "the name of the object (b) does not match the name on the URL (a)",
    );
    let mut other = configmap("a");
    other["metadata"]["uid"] = "other".into();
    refused(
        put(other).await,
        409,
        "Conflict",
        "Precondition failed: UID in precondition: other, UID in object meta: ",
    );
}

#[tokio::test]
async fn some_kinds_need_a_revision_and_some_are_created_by_put() {
    let api = api().await;
    let lease = json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "me"}});
    let path = "PUT /apis/coordination.k8s.io/v1/namespaces/default/leases/l";
    assert_eq!(api.json(path, lease.clone()).await.code, 201);
    refused(api.json(path, lease).await, 422, "Invalid", "metadata.resourceVersion: Invalid value: ");
}

#[tokio::test]
async fn patches_change_a_part() {
    let api = api().await;
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let patch = |media_type: &str, body: Value| {
        let (api, line) = (&api, format!("PATCH {CONFIGMAPS}/a"));
        let header = format!("content-type: application/{media_type}");
        async move { api.send(&line, &[&header], body.to_string()).await }
    };
    let merged = patch("merge-patch+json", json!({"data": {"k": null, "x": "y"}})).await.ok();
    assert_eq!(merged["data"], json!({"x": "y"}));
    let add = json!([{"op": "add", "path": "/data/z", "value": "1"}]);
    assert_eq!(patch("json-patch+json", add).await.ok()["data"]["z"], "1");
    let strategic = json!({"metadata": {"finalizers": ["a.io/b"]}});
    let finalizers = json!({"metadata": {"finalizers": ["a.io/c"]}});
    patch("strategic-merge-patch+json", strategic).await.ok();
    let both = patch("strategic-merge-patch+json", finalizers).await.ok();
    let mut list: Vec<&str> =
        both["metadata"]["finalizers"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
    list.sort_unstable();
    assert_eq!(list, ["a.io/b", "a.io/c"]);
    let before = api.store.revision();
    patch("merge-patch+json", json!({})).await.ok();
    assert_eq!(api.store.revision(), before, "an empty patch writes nothing");

    for (media_type, body, code, reason, message) in [
        (
            "json-patch+json",
            json!([{"op": "test", "path": "/data/z", "value": "2"}]),
            422,
            "Invalid",
            "the server rejected our request due to an error in our request",
        ),
        ("json-patch+json", json!({}), 400, "BadRequest", ""),
        (
            "merge-patch+json",
            json!({"metadata": {"resourceVersion": "1"}}),
            409,
            "Conflict",
            "the object has been modified",
        ),
        (
            "merge-patch+json",
            json!({"kind": "Secret"}),
            400,
            "BadRequest",
            "a patch cannot change apiVersion or kind",
        ),
        (
            "merge-patch+json",
            json!({"metadata": {"name": "b"}}),
            422,
            "Invalid",
            "metadata.name: Invalid value: \"b\": field is immutable",
        ),
        (
            "apply-patch+yaml",
            json!({}),
            415,
            "UnsupportedMediaType",
            "application/json-patch+json, application/merge-patch+json",
        ),
    ] {
        refused(patch(media_type, body).await, code, reason, message);
    }
    refused(
        api.json(&format!("PATCH {CONFIGMAPS}/none"), json!({})).await,
        404,
        "NotFound",
        "configmaps \"none\" not found",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn patches_are_tried_again_when_someone_else_was_faster() {
    let api = std::sync::Arc::new(api().await);
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let patches = (0..4).map(|n| {
        let api = api.clone();
        tokio::spawn(async move {
            let key = format!("k{n}");
            api.json(&format!("PATCH {CONFIGMAPS}/a"), json!({"data": {key: "x"}})).await.ok();
        })
    });
    for patch in patches.collect::<Vec<_>>() {
        patch.await.unwrap();
    }
    let data = api.get(&format!("{CONFIGMAPS}/a")).await.ok()["data"].clone();
    assert_eq!(data.as_object().unwrap().len(), 5, "{data}");
}

#[tokio::test]
async fn the_status_is_written_by_itself() {
    let api = api().await;
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let mut object = api.json(&format!("POST {path}"), deployment("d")).await.ok();
    object["spec"]["replicas"] = 3.into();
    object["status"] = json!({"replicas": 2, "observedGeneration": 1});
    object["metadata"]["annotations"] = json!({"a": "b"});
    let status = api.json(&format!("PUT {path}/d/status"), object).await.ok();
    assert_eq!((&status["spec"]["replicas"], &status["status"]["replicas"]), (&json!(1), &json!(2)));
    assert_eq!(status["metadata"]["generation"], 1);
    let patched = api
        .json(&format!("PATCH {path}/d"), json!({"spec": {"replicas": 4}, "status": {"replicas": 9}}))
        .await;
    let patched = patched.ok();
    assert_eq!((&patched["spec"]["replicas"], &patched["status"]["replicas"]), (&json!(4), &json!(2)));
    assert_eq!(patched["metadata"]["generation"], 2);
    let merged =
        api.json(&format!("PATCH {path}/d/status"), json!({"status": {"readyReplicas": 1}})).await.ok();
    assert_eq!(merged["status"]["readyReplicas"], 1);
    assert_eq!(api.get(&format!("{path}/d/status")).await.ok()["status"]["replicas"], 2);
}

#[tokio::test]
async fn workloads_have_a_scale() {
    let api = api().await;
    let path = "/apis/apps/v1/namespaces/default/deployments/d";
    api.json("POST /apis/apps/v1/namespaces/default/deployments", deployment("d")).await.ok();
    let mut scale = api.get(&format!("{path}/scale")).await.ok();
    assert_eq!((&scale["kind"], &scale["apiVersion"]), (&json!("Scale"), &json!("autoscaling/v1")));
    assert_eq!((&scale["spec"]["replicas"], &scale["status"]["selector"]), (&json!(1), &json!("app=d")));
    scale["spec"]["replicas"] = 3.into();
    assert_eq!(api.json(&format!("PUT {path}/scale"), scale.clone()).await.ok()["spec"]["replicas"], 3);
    refused(
        api.json(&format!("PUT {path}/scale"), scale).await,
        409,
        "Conflict",
        "the object has been modified",
    );
    let patched = api.json(&format!("PATCH {path}/scale"), json!({"spec": {"replicas": 5}})).await.ok();
    assert_eq!(patched["spec"]["replicas"], 5);
    assert_eq!(api.get(path).await.ok()["spec"]["replicas"], 5);
    refused(
        api.json(&format!("PATCH {path}/scale"), json!({"spec": {"replicas": -1}})).await,
        422,
        "Invalid",
        "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
    );
}

#[tokio::test]
async fn pods_are_bound_once() {
    let api = api().await;
    api.json(&format!("POST {PODS}"), pod("p")).await.ok();
    let bind = |body: Value| {
        let (api, line) = (&api, format!("POST {PODS}/p/binding"));
        async move { api.json(&line, body).await }
    };
    let binding = json!({"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}});
    refused(
        bind(json!({"target": {"kind": "Node", "name": ""}})).await,
        422,
        "Invalid",
        "target.name: Required value",
    );
    let answer = bind(binding.clone()).await;
    assert_eq!(answer.code, 201);
    assert_eq!(answer.ok()["status"], "Success");
    let bound = api.get(&format!("{PODS}/p")).await.ok();
    assert_eq!(bound["spec"]["nodeName"], "n1");
    let conditions = bound["status"]["conditions"].as_array().unwrap();
    assert!(conditions.iter().any(|c| c["type"] == "PodScheduled" && c["status"] == "True"));
    refused(
        bind(binding).await,
        409,
        "Conflict",
        "Operation cannot be fulfilled on pods/binding \"p\": pod p is already assigned to node \"n1\"",
    );
}

#[tokio::test]
async fn ephemeral_containers_are_only_added() {
    let api = api().await;
    api.json(&format!("POST {PODS}"), pod("p")).await.ok();
    let path = format!("{PODS}/p/ephemeralcontainers");
    let patch = |body: Value| {
        let (api, line) = (&api, format!("PATCH {path}"));
        async move {
            api.send(&line, &["content-type: application/strategic-merge-patch+json"], body.to_string()).await
        }
    };
    let debug = json!({"spec": {"ephemeralContainers": [{"name": "debug", "image": "busybox"}]}});
    let patched = patch(debug.clone()).await.ok();
    assert_eq!(patched["spec"]["ephemeralContainers"][0]["terminationMessagePath"], "/dev/termination-log");
    patch(debug).await.ok();
    refused(
        patch(json!({"spec": {"ephemeralContainers": [{"name": "debug", "image": "other"}]}})).await,
        422,
        "Invalid",
        "existing ephemeral containers \"debug\" may not be changed",
    );
    refused(
        api.json(&format!("PATCH {path}"), json!({"spec": {"ephemeralContainers": []}})).await,
        422,
        "Invalid",
        "existing ephemeral containers \"debug\" may not be removed",
    );
}

#[tokio::test]
async fn services_get_addresses_and_give_them_back() {
    let api = api().await;
    let services = "/api/v1/namespaces/default/services";
    let service = |name: &str, ip: Option<&str>| {
        let mut service =
            json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], "type": "NodePort"}});
        if let Some(ip) = ip {
            service["spec"]["clusterIP"] = ip.into();
        }
        service
    };
    let made = api.json(&format!("POST {services}"), service("a", Some("10.96.0.99"))).await.ok();
    let port = made["spec"]["ports"][0]["nodePort"].clone();
    assert!(port.is_u64());
    refused(
        api.json(&format!("POST {services}"), service("b", Some("10.96.0.99"))).await,
        422,
        "Invalid",
        "provided IP is already allocated",
    );
    // A dry run takes nothing, an update keeps what there is.
    api.json(&format!("POST {services}?dryRun=All"), service("c", Some("10.96.0.98"))).await.ok();
    api.json(&format!("POST {services}"), service("c", Some("10.96.0.98"))).await.ok();
    let patched =
        api.json(&format!("PATCH {services}/a"), json!({"metadata": {"labels": {"x": "y"}}})).await.ok();
    assert_eq!(
        (&patched["spec"]["clusterIP"], &patched["spec"]["ports"][0]["nodePort"]),
        (&json!("10.96.0.99"), &port)
    );
    api.send(&format!("DELETE {services}/a"), &[], "").await.ok();
    api.json(&format!("POST {services}"), service("b", Some("10.96.0.99"))).await.ok();
}

#[tokio::test]
async fn reviews_are_answered_and_not_stored() {
    let api = api().await;
    let before = api.store.revision();
    let review = json!({"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}});
    let answer = api.json("POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review).await;
    assert_eq!(answer.code, 201);
    assert_eq!(answer.ok()["status"]["allowed"], true);
    let token = api
        .json("POST /api/v1/namespaces/default/serviceaccounts/default/token", json!({"spec": {}}))
        .await
        .ok();
    assert!(token["status"]["token"].is_string());
    assert_eq!(api.store.revision(), before);
    refused(
        api.send(
            "GET /api/v1/namespaces/default/configmaps",
            &["accept: application/json;as=Table;v=v1;g=meta.k8s.io", "impersonate-user: eve"],
            "",
        )
        .await,
        403,
        "Forbidden",
        "User \"eve\" cannot list resource \"configmaps\"",
    );
}
