use super::*;

async fn filled(count: usize) -> Api {
    let api = api().await;
    for n in 0..count {
        let mut object = configmap(&format!("c{n}"));
        object["metadata"]["labels"] = json!({"parity": if n % 2 == 0 { "even" } else { "odd" }});
        api.json(&format!("POST {CONFIGMAPS}"), object).await.ok();
    }
    api
}

#[tokio::test]
async fn lists_select() {
    let api = filled(4).await;
    let list = |query: &str| {
        let (api, path) = (&api, format!("{CONFIGMAPS}?{query}"));
        async move { api.get(&path).await }
    };
    assert_eq!(names(&list("").await.ok()), ["c0", "c1", "c2", "c3"]);
    assert_eq!(names(&list("labelSelector=parity%3Dodd").await.ok()), ["c1", "c3"]);
    assert_eq!(names(&list("labelSelector=parity+in+(odd),x").await.ok()), Vec::<&str>::new());
    assert_eq!(names(&list("fieldSelector=metadata.name=c2").await.ok()), ["c2"]);
    assert_eq!(
        names(&list("fieldSelector=metadata.name=c2&labelSelector=parity=odd").await.ok()),
        Vec::<&str>::new()
    );
    assert_eq!(names(&list("fieldSelector=metadata.name!=c2").await.ok()), ["c0", "c1", "c3"]);
    let all = api.get("/api/v1/configmaps?fieldSelector=metadata.namespace=default").await.ok();
    assert_eq!(names(&all), ["c0", "c1", "c2", "c3"]);
    let whole = list("").await.ok();
    assert_eq!((&whole["kind"], &whole["apiVersion"]), (&json!("ConfigMapList"), &json!("v1")));
    assert_eq!(whole["metadata"]["resourceVersion"], api.store.revision().to_string());
    // Items say nothing of what the list says for all of them.
    assert_eq!((whole["items"][0].get("kind"), whole["items"][0].get("apiVersion")), (None, None));
    refused(list("fieldSelector=spec.x=1").await, 400, "BadRequest", "field label not supported: spec.x");
    refused(list("labelSelector=a+b").await, 400, "BadRequest", "unable to parse requirement");
}

#[tokio::test]
async fn pages_show_one_revision_whatever_is_written() {
    let api = filled(5).await;
    let first = api.get(&format!("{CONFIGMAPS}?limit=2")).await.ok();
    assert_eq!(names(&first), ["c0", "c1"]);
    assert_eq!(first["metadata"]["remainingItemCount"], 3);
    api.send(&format!("DELETE {CONFIGMAPS}/c3"), &[], "").await.ok();
    api.json(&format!("POST {CONFIGMAPS}"), configmap("c2b")).await.ok();
    let token = first["metadata"]["continue"].as_str().unwrap();
    let second = api.get(&format!("{CONFIGMAPS}?limit=2&continue={token}")).await.ok();
    assert_eq!(names(&second), ["c2", "c3"]);
    assert_eq!(second["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    let token = second["metadata"]["continue"].as_str().unwrap();
    let third = api.get(&format!("{CONFIGMAPS}?limit=2&continue={token}")).await.ok();
    assert_eq!((names(&third), third["metadata"].get("continue")), (vec!["c4"], None));
    assert_eq!(names(&api.get(CONFIGMAPS).await.ok()), ["c0", "c1", "c2", "c2b", "c4"]);
    // A selection may leave out any number, so what remains is not counted.
    let selected = api.get(&format!("{CONFIGMAPS}?limit=1&labelSelector=parity=even")).await.ok();
    assert!(selected["metadata"].get("continue").is_some());
    assert!(selected["metadata"].get("remainingItemCount").is_none());
}

#[tokio::test]
async fn old_continuations_can_go_on_inconsistently() {
    let at = "2026-01-01T00:00:00Z".parse().unwrap();
    let api = Api::at(minke_client::Clock::Virtual { at, start: tokio::time::Instant::now() }).await;
    for name in ["a", "b", "c"] {
        api.json(&format!("POST {CONFIGMAPS}"), configmap(name)).await.ok();
    }
    let first = api.get(&format!("{CONFIGMAPS}?limit=1")).await.ok();
    let token = first["metadata"]["continue"].as_str().unwrap();
    tokio::time::pause();
    tokio::time::advance(std::time::Duration::from_secs(301)).await;
    tokio::time::resume();
    let gone = api.get(&format!("{CONFIGMAPS}?limit=1&continue={token}")).await;
    let status = gone.json();
    refused(gone, 410, "Expired", "The provided continue parameter is too old");
    api.json(&format!("POST {CONFIGMAPS}"), configmap("ab")).await.ok();
    let token = status["metadata"]["continue"].as_str().unwrap();
    let rest = api.get(&format!("{CONFIGMAPS}?limit=2&continue={token}")).await.ok();
    assert_eq!(names(&rest), ["ab", "b"]);
    let token = rest["metadata"]["continue"].as_str().unwrap();
    assert_eq!(names(&api.get(&format!("{CONFIGMAPS}?continue={token}")).await.ok()), ["c"]);
}

#[tokio::test]
async fn lists_can_be_of_a_given_revision() {
    let api = filled(2).await;
    let then = api.store.revision();
    api.send(&format!("DELETE {CONFIGMAPS}/c0"), &[], "").await.ok();
    let at = |query: String| {
        let (api, path) = (&api, format!("{CONFIGMAPS}?{query}"));
        async move { api.get(&path).await }
    };
    let exact = at(format!("resourceVersion={then}&resourceVersionMatch=Exact")).await.ok();
    assert_eq!(
        (names(&exact), &exact["metadata"]["resourceVersion"]),
        (vec!["c0", "c1"], &json!(then.to_string()))
    );
    let newer = at(format!("resourceVersion={then}&resourceVersionMatch=NotOlderThan")).await.ok();
    assert_eq!(names(&newer), ["c1"]);
    assert_eq!(names(&at("resourceVersion=0".to_owned()).await.ok()), ["c1"]);
    let first = at("resourceVersion=1&resourceVersionMatch=Exact".to_owned()).await.ok();
    assert_eq!(names(&first), Vec::<&str>::new());

    for (query, why) in [
        (
            "resourceVersionMatch=Exact",
            "resourceVersionMatch is forbidden unless resourceVersion is provided",
        ),
        ("resourceVersion=0&resourceVersionMatch=Exact", "is forbidden for resourceVersion \"0\""),
        ("resourceVersion=1&resourceVersionMatch=Some", "Unsupported value: \"Some\""),
        ("sendInitialEvents=true", "sendInitialEvents is forbidden for list"),
        ("resourceVersion=x", "resourceVersion: Invalid value: \"x\""),
    ] {
        refused(at(query.to_owned()).await, 422, "Invalid", why);
    }
    refused(at("continue=nonsense".to_owned()).await, 400, "BadRequest", "continue key is not valid");
    let page = at("limit=1&resourceVersion=0".to_owned()).await.ok();
    assert!(page["metadata"].get("continue").is_none());
}

#[tokio::test]
async fn large_lists_are_compressed_for_those_who_take_it() {
    let api = api().await;
    let mut object = configmap("big");
    object["data"]["k"] = "x".repeat(200_000).into();
    api.json(&format!("POST {CONFIGMAPS}"), object).await.ok();
    let packed = api.send(&format!("GET {CONFIGMAPS}"), &["accept-encoding: gzip"], "").await;
    assert_eq!(packed.headers["content-encoding"], "gzip");
    assert!(packed.bytes.len() < 10_000);
    let plain = api.get(CONFIGMAPS).await;
    assert!(plain.headers.get("content-encoding").is_none() && plain.bytes.len() > 200_000);
    let small = api.send("GET /api/v1/namespaces", &["accept-encoding: gzip"], "").await;
    assert!(small.headers.get("content-encoding").is_none());
}

#[tokio::test]
async fn tables_and_partial_lists_are_views_of_lists() {
    let api = filled(2).await;
    let line = format!("GET {CONFIGMAPS}?limit=1");
    let table = api.send(&line, &["accept: application/json;as=Table;v=v1;g=meta.k8s.io"], "").await.ok();
    assert_eq!((&table["kind"], &table["metadata"]["remainingItemCount"]), (&json!("Table"), &json!(1)));
    assert_eq!(table["columnDefinitions"][0]["name"], "Name");
    let bare = api
        .send(
            &format!("{line}&includeObject=None"),
            &["accept: application/json;as=Table;v=v1;g=meta.k8s.io"],
            "",
        )
        .await
        .ok();
    assert_eq!(bare["rows"][0]["object"], Value::Null);
    let partial = api
        .send(&line, &["accept: application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"], "")
        .await
        .ok();
    assert_eq!(partial["kind"], "PartialObjectMetadataList");
    assert_eq!(partial["items"][0]["kind"], "PartialObjectMetadata");
}
