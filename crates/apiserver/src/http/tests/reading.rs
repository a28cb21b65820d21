use super::*;

#[tokio::test]
async fn objects_are_shown_as_they_were_asked_for() {
    let api = api().await;
    api.json(&format!("POST {CONFIGMAPS}"), configmap("a")).await.ok();
    let path = format!("{CONFIGMAPS}/a");
    let plain = api.get(&path).await;
    assert_eq!(plain.headers["content-type"], "application/json");
    assert_eq!(plain.headers["cache-control"], "no-cache, private");
    assert_eq!(plain.headers["audit-id"].len(), 36);
    let object = plain.ok();
    assert_eq!((&object["kind"], &object["data"]["k"]), (&json!("ConfigMap"), &json!("v")));

    let ask = |accept: &'static str| {
        let (api, line) = (&api, format!("GET {path}"));
        async move { api.send(&line, &[accept], "").await }
    };
    let table = ask("accept: application/json;as=Table;v=v1;g=meta.k8s.io").await.ok();
    assert_eq!(table["rows"][0]["cells"][0], "a");
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let partial = ask("accept: application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io").await.ok();
    assert_eq!((&partial["metadata"]["name"], partial.get("data")), (&json!("a"), None));
    let protobuf = ask("accept: application/vnd.kubernetes.protobuf").await;
    assert_eq!(protobuf.headers["content-type"], "application/vnd.kubernetes.protobuf");
    assert!(protobuf.bytes.starts_with(b"k8s\0"));
    let yaml = ask("accept: application/yaml").await;
    assert_eq!(yaml.headers["content-type"], "application/yaml");
    let pretty = api.get(&format!("{path}?pretty=true")).await;
    assert!(pretty.bytes.starts_with(b"{\n  \""));
    refused(ask("accept: text/html").await, 406, "NotAcceptable", "application/json");
}

#[tokio::test]
async fn what_is_not_there_is_said_to_be_missing() {
    let api = api().await;
    refused(api.get(&format!("{CONFIGMAPS}/x")).await, 404, "NotFound", "configmaps \"x\" not found");
    let path = "/apis/apps/v1/namespaces/default/deployments/x";
    refused(api.get(path).await, 404, "NotFound", "deployments.apps \"x\" not found");
    for path in [
        "/nothing",
        "/apis/none",
        "/api/v1/nothing",
        "/api/v1/namespaces/default/nodes",
        "/api/v1/configmaps/a",
        "/api/v1/namespaces/default/pods/p/nothing",
        "/api/v1/namespaces/default/configmaps/a/status",
        "/apis/apps/v2/deployments",
    ] {
        refused(api.get(path).await, 404, "NotFound", "the server could not find the requested resource");
    }
    for line in [
        "PUT /api/v1/namespaces/default/configmaps",
        "POST /api/v1/namespaces/default/configmaps/a",
        "POST /api/v1/configmaps",
        "DELETE /api/v1/configmaps",
        "DELETE /api/v1/namespaces",
        "PATCH /api/v1/namespaces/default/pods/p/log",
        "PUT /api/v1/componentstatuses/x",
    ] {
        let why = "the server does not allow this method on the requested resource";
        refused(api.json(line, json!({})).await, 405, "MethodNotAllowed", why);
    }
}

#[tokio::test]
async fn only_who_may_is_answered() {
    let api = api().await;
    let eve = api.as_user(crate::UserInfo::new("eve", &[]));
    refused(
        eve.get(PODS).await,
        403,
        "Forbidden",
        "pods is forbidden: User \"eve\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\"",
    );
    refused(eve.get("/metrics").await, 403, "Forbidden", "User \"eve\" cannot get path \"/metrics\"");
    // Whoever may not look is not told what there is.
    refused(eve.get("/api/v1/nothing").await, 403, "Forbidden", "cannot list resource \"nothing\"");
    let anonymous = api.as_user(crate::UserInfo::anonymous());
    for path in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(anonymous.get(path).await.code, 200, "{path}");
    }
    refused(
        anonymous.get("/api").await,
        403,
        "Forbidden",
        "User \"system:anonymous\" cannot get path \"/api\"",
    );
}

#[tokio::test]
async fn a_future_revision_is_waited_for_in_vain() {
    let api = api().await;
    tokio::time::pause();
    let (code, reason, message) = api.get(&format!("{CONFIGMAPS}?resourceVersion=99999")).await.error();
    assert_eq!((code, reason.as_str()), (504, "Timeout"));
    assert!(message.starts_with("Too large resource version: 99999, current: "), "{message}");
}

#[tokio::test]
async fn health_and_version_are_told() {
    let api = api().await;
    let text = |answer: Answer| String::from_utf8(answer.bytes.to_vec()).unwrap();
    assert_eq!(text(api.get("/readyz").await), "ok");
    assert_eq!(text(api.get("/livez/ping").await), "ok");
    let verbose = text(api.get("/livez?verbose&exclude=log&exclude=x").await);
    assert!(verbose.starts_with("[+]ping ok\n[+]log excluded: ok\n[+]etcd ok\n"), "{verbose}");
    assert!(
        verbose.contains("warn: some health checks cannot be excluded: no matches for \"x\"\n"),
        "{verbose}"
    );
    assert!(verbose.ends_with("livez check passed\n"), "{verbose}");
    api.store.close().await;
    let failed = api.get("/readyz").await;
    assert_eq!(failed.code, 500);
    assert!(text(failed).contains("[-]etcd failed: reason withheld\n"));
    assert_eq!(api.get("/version").await.ok()["minor"], "37");
}

#[tokio::test]
async fn openapi_is_cached_by_hash() {
    let api = api().await;
    let index = api.get("/openapi/v3").await.ok();
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap().to_owned();
    let document = api.get(&url).await;
    assert_eq!(document.headers["cache-control"], "public, immutable");
    let etag = document.headers["etag"].to_str().unwrap().to_owned();
    assert!(document.ok()["components"]["schemas"].get("io.k8s.api.apps.v1.Deployment").is_some());
    let again = api.send(&format!("GET {url}"), &[&format!("if-none-match: {etag}")], "").await;
    assert_eq!((again.code, again.bytes.len()), (304, 0));
    let moved = api.get("/openapi/v3/apis/apps/v1?hash=00").await;
    assert_eq!((moved.code, moved.headers["location"].to_str().unwrap()), (301, url.as_str()));
    let v2 = api
        .send("GET /openapi/v2", &["accept: application/com.github.proto-openapi.spec.v2@v1.0+protobuf"], "")
        .await;
    assert_eq!(v2.headers["content-type"], "application/com.github.proto-openapi.spec.v2.v1.0+protobuf");
    assert_eq!(api.send("GET /openapi/v2", &["accept: text/html"], "").await.code, 406);
}

#[tokio::test]
async fn two_views_of_one_resource_agree() {
    let api = api().await;
    let event = json!({
        "metadata": {"name": "e"}, "regarding": {"kind": "Pod", "name": "p", "namespace": "default"}, "note": "hi",
        "reason": "Because", "action": "Doing", "type": "Normal", "reportingController": "x.io/c",
        "reportingInstance": "c-1", "eventTime": "2026-01-01T00:00:00.000000Z",
    });
    let path = "/apis/events.k8s.io/v1/namespaces/default/events";
    api.json(&format!("POST {path}"), event).await.ok();
    let core = api.get("/api/v1/namespaces/default/events/e").await.ok();
    assert_eq!((&core["apiVersion"], &core["message"]), (&json!("v1"), &json!("hi")));
    let events = api.get(&format!("{path}?fieldSelector=regarding.name=p")).await.ok();
    assert_eq!(events["items"][0]["note"], "hi");
    assert_eq!(
        names(&api.get(&format!("{path}?fieldSelector=regarding.name=q")).await.ok()),
        Vec::<&str>::new()
    );
    let selector = "/api/v1/events?fieldSelector=involvedObject.name=p,reason=Because";
    assert_eq!(names(&api.get(selector).await.ok()), ["e"]);
}
