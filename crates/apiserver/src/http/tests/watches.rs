use super::*;

/// What a watch told: type, name and revision order; bookmarks without a name.
fn told(answer: &Answer) -> Vec<String> {
    let mut last = 0;
    answer
        .events()
        .iter()
        .map(|event| {
            let metadata = &event["object"]["metadata"];
            if event["type"] != "ERROR" {
                let revision: u64 = metadata["resourceVersion"].as_str().unwrap().parse().unwrap();
                assert!(revision >= last || event["type"] == "ADDED", "revisions grow");
                last = revision;
            }
            let name = metadata["name"].as_str().unwrap_or_default();
            let end = metadata["annotations"]["k8s.io/initial-events-end"].as_str().map_or("", |_| "end");
            format!("{} {name}{end}", event["type"].as_str().unwrap()).trim().to_owned()
        })
        .collect()
}

/// Watches for a second, while `act` is done.
async fn watch(api: &Api, query: &str, act: impl Future<Output = ()>) -> Answer {
    let path = format!("{CONFIGMAPS}?watch=true&timeoutSeconds=1&{query}");
    let (answer, ()) = tokio::join!(api.get(&path), act);
    answer
}

async fn label(api: &Api, name: &str, app: &str) {
    api.json(&format!("PATCH {CONFIGMAPS}/{name}"), json!({"metadata": {"labels": {"app": app}}})).await.ok();
}

async fn create(api: &Api, name: &str) {
    api.json(&format!("POST {CONFIGMAPS}"), configmap(name)).await.ok();
}

async fn delete(api: &Api, name: &str) {
    api.send(&format!("DELETE {CONFIGMAPS}/{name}"), &[], "").await.ok();
}

#[tokio::test]
async fn watches_tell_what_happens_after_a_revision() {
    let api = api().await;
    create(&api, "a").await;
    let from = api.store.revision();
    let changes = async {
        create(&api, "b").await;
        label(&api, "a", "x").await;
        delete(&api, "b").await;
    };
    let answer = watch(&api, &format!("resourceVersion={from}"), changes).await;
    assert_eq!((answer.code, answer.headers["content-type"].to_str().unwrap()), (200, "application/json"));
    assert_eq!(told(&answer), ["ADDED b", "MODIFIED a", "DELETED b"]);
    // The same again, all of it already history by now.
    assert_eq!(told(&watch(&api, &format!("resourceVersion={from}"), async {}).await), told(&answer));
    let deleted = &answer.events()[2]["object"]["metadata"]["resourceVersion"];
    assert_eq!(*deleted, api.store.revision().to_string(), "a deletion shows its own revision");
}

#[tokio::test]
async fn watches_without_a_revision_begin_with_the_present() {
    let api = api().await;
    create(&api, "a").await;
    assert_eq!(told(&watch(&api, "", create(&api, "b")).await), ["ADDED a", "ADDED b"]);
    assert_eq!(told(&watch(&api, "resourceVersion=0", async {}).await), ["ADDED a", "ADDED b"]);
    let streaming = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    assert_eq!(
        told(&watch(&api, streaming, create(&api, "c")).await),
        ["ADDED a", "ADDED b", "BOOKMARK end", "ADDED c", "BOOKMARK"]
    );
    let quiet = "sendInitialEvents=false&resourceVersionMatch=NotOlderThan";
    assert_eq!(told(&watch(&api, quiet, create(&api, "d")).await), ["ADDED d"]);
    for (query, why) in [
        ("sendInitialEvents=true", "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"),
        ("resourceVersionMatch=NotOlderThan", "forbidden for watch unless sendInitialEvents is provided"),
    ] {
        refused(watch(&api, query, async {}).await, 422, "Invalid", why);
    }
}

#[tokio::test]
async fn a_selection_turns_changes_into_coming_and_going() {
    let api = api().await;
    create(&api, "a").await;
    let from = api.store.revision();
    let changes = async {
        label(&api, "a", "x").await;
        label(&api, "a", "y").await;
        label(&api, "a", "x").await;
        create(&api, "b").await;
        delete(&api, "a").await;
    };
    let answer = watch(&api, &format!("resourceVersion={from}&labelSelector=app=x"), changes).await;
    assert_eq!(told(&answer), ["ADDED a", "DELETED a", "ADDED a", "DELETED a"]);
    // What left is shown as it last was selected, at the revision at which it left.
    let left = &answer.events()[1]["object"]["metadata"];
    assert_eq!(left["labels"]["app"], "x");
    let query = format!("resourceVersion={from}&fieldSelector=metadata.name=b");
    assert_eq!(told(&watch(&api, &query, async {}).await), ["ADDED b"]);
}

#[tokio::test]
async fn the_old_paths_watch_too() {
    let api = api().await;
    create(&api, "a").await;
    create(&api, "b").await;
    for path in [
        "/api/v1/watch/namespaces/default/configmaps/a?timeoutSeconds=1",
        "/api/v1/namespaces/default/configmaps/a?watch=true&timeoutSeconds=1",
    ] {
        assert_eq!(told(&api.get(path).await), ["ADDED a"], "{path}");
    }
    let all = told(&api.get("/api/v1/watch/namespaces/default/configmaps?timeoutSeconds=1").await);
    assert_eq!(all, ["ADDED a", "ADDED b"]);
}

#[tokio::test]
async fn a_revision_that_is_too_old_is_an_event() {
    let store = minke_store::Store::open(minke_store::Memory::default(), 5_000).unwrap();
    let small =
        crate::ApiServer::build(crate::testing::Keys::new().config(store, Default::default())).await.unwrap();
    let peer = crate::http::Peer {
        identity: Some(std::sync::Arc::new(Ok(crate::UserInfo::new("admin", &["system:masters"])))),
        address: ([192, 0, 2, 7], 1).into(),
    };
    let request = http::Request::get("/api/v1/namespaces?watch=true&resourceVersion=2")
        .body(http_body_util::BodyExt::boxed_unsync(http_body_util::BodyExt::map_err(
            http_body_util::Empty::new(),
            |never| match never {},
        )))
        .unwrap();
    let answer = small.server.clone().handle(peer, request).await.unwrap();
    assert_eq!(answer.status(), 200);
    let bytes = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
    let event: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!((&event["type"], &event["object"]["code"]), (&json!("ERROR"), &json!(410)));
    assert_eq!(event["object"]["reason"], "Expired");
    assert!(event["object"]["message"].as_str().unwrap().starts_with("too old resource version: 2 ("));
}

#[tokio::test]
async fn quiet_watches_are_told_where_they_are() {
    let api = api().await;
    tokio::time::pause();
    let line = format!(
        "{CONFIGMAPS}?watch=true&timeoutSeconds=130&allowWatchBookmarks=true&resourceVersion={}",
        api.store.revision()
    );
    let answer = api.get(&line).await;
    assert_eq!(told(&answer), ["BOOKMARK", "BOOKMARK", "BOOKMARK"]);
    let revision = &answer.events()[0]["object"]["metadata"]["resourceVersion"];
    assert_eq!(*revision, api.store.revision().to_string());
    assert_eq!(answer.events()[0]["object"]["kind"], "ConfigMap");
}

#[tokio::test]
async fn views_can_be_watched() {
    let api = api().await;
    create(&api, "a").await;
    create(&api, "b").await;
    let line = format!("GET {CONFIGMAPS}?watch=true&timeoutSeconds=1");
    let tables =
        api.send(&line, &["accept: application/json;as=Table;v=v1;g=meta.k8s.io"], "").await.events();
    assert_eq!(tables[0]["object"]["columnDefinitions"][0]["name"], "Name");
    assert_eq!(tables[1]["object"]["columnDefinitions"], Value::Null);
    assert_eq!(tables[1]["object"]["rows"][0]["cells"][0], "b");
    let partial = api
        .send(&line, &["accept: application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"], "")
        .await
        .events();
    assert_eq!(partial[0]["object"]["kind"], "PartialObjectMetadata");
    assert!(partial[0]["object"].get("data").is_none());
}
