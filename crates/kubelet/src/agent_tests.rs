//! Whole lives of pods, on a node made of memory.

use serde_json::{Value, json};

use crate::testing::World;

fn phase(pod: Option<&Value>) -> &str {
    pod.and_then(|pod| pod["status"]["phase"].as_str()).unwrap_or_default()
}

fn container(pod: Option<&Value>) -> Value {
    pod.map(|pod| pod["status"]["containerStatuses"][0].clone()).unwrap_or_default()
}

#[tokio::test]
async fn a_pod_runs_restarts_and_goes_without_a_trace() {
    let world = World::new("life");
    let stop = world.start_agent().await;
    world.api.put_pod("p", "u-1", json!({}));
    let pod = world.until("p", |pod| phase(pod) == "Running" && container(pod)["ready"] == true).await;
    assert_eq!(world.log(), ["run p", "attach 10.1.0.2", "create c 0", "start c 0"]);
    assert_eq!(pod.expect("the pod")["status"]["podIP"], "10.1.0.2");

    world.runtime.exit(&world.runtime.running()[0].id, 1);
    let pod =
        world.until("p", |pod| container(pod)["restartCount"] == 1 && container(pod)["ready"] == true).await;
    assert_eq!(container(pod.as_ref())["lastState"]["terminated"]["exitCode"], 1);
    assert_eq!(world.log(), ["create c 1", "start c 1"]);

    world.api.delete_pod("p", 30);
    world.until("p", |pod| pod.is_none()).await;
    // Out of the service tables first, then the signal; the object goes last.
    assert_eq!(world.log(), ["drain 10.1.0.2", "stop c", "stop p", "detach", "remove p"]);
    assert!(world.runtime.is_empty());
    assert!(std::fs::read_dir(world.dir.join("pods")).expect("the directory").next().is_none());
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test]
async fn another_agent_takes_over_without_touching_anything() {
    let world = World::new("adopt");
    let stop = world.start_agent().await;
    let spec = json!({"containers": [{"name": "c", "image": "i:1", "readinessProbe": {"exec": {"command": ["x"]}}}]});
    world.api.put_pod("p", "u-1", spec);
    world.until("p", |pod| container(pod)["ready"] == true).await;
    world.runtime.exit(&world.runtime.running()[0].id, 0);
    world.until("p", |pod| container(pod)["restartCount"] == 1 && container(pod)["ready"] == true).await;
    world.api.put_pod("orphan", "u-2", json!({}));
    world.until("orphan", |pod| phase(pod) == "Running").await;
    let before = world.runtime.running();
    stop.cancel();

    // Gone while nobody looks.
    world.api.write(crate::worker::pods(), "ns", "orphan", None);
    world.log();
    let revision = |pod: &Option<Value>| pod.as_ref().map(|pod| pod["metadata"]["resourceVersion"].clone());
    let known = world.api.read("pods", "ns", "p");
    let stop = world.start_agent().await;
    world.eventually(|log| log.last().is_some_and(|last| last == "detach")).await;
    assert_eq!(world.log(), ["stop c", "remove orphan", "detach"]);
    // The new agent works: it runs another pod, and not under an address that is taken.
    world.api.put_pod("q", "u-3", json!({}));
    world.until("q", |pod| phase(pod) == "Running").await;
    assert_eq!(world.log(), ["run q", "attach 10.1.0.3", "create c 0", "start c 0"]);
    let after = world.runtime.running();
    assert!(before[0].id == after[0].id && after[0].attempt == 1, "the same container, with its count");
    let now = world.api.read("pods", "ns", "p");
    assert_eq!(revision(&now), revision(&known), "nothing to tell: {now:?}");
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test]
async fn a_config_map_that_comes_later_lets_the_pod_go_on() {
    let world = World::new("later");
    let stop = world.start_agent().await;
    let from = json!([{"configMapRef": {"name": "m"}}]);
    world.api.put_pod("p", "u-1", json!({"containers": [{"name": "c", "image": "i:1", "envFrom": from}]}));
    let waits =
        |pod: Option<&Value>| container(pod)["state"]["waiting"]["reason"] == "CreateContainerConfigError";
    let pod = world.until("p", waits).await;
    assert_eq!(container(pod.as_ref())["state"]["waiting"]["message"], "configmap \"m\" not found");
    let map = json!({"metadata": {"name": "m", "namespace": "ns", "uid": "u-m"}, "data": {"A": "1"}});
    let kind = minke_api::Kind::of::<k8s_openapi::api::core::v1::ConfigMap>();
    world.api.write(kind, "ns", "m", Some(map));
    world.until("p", |pod| phase(pod) == "Running").await;
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test]
async fn a_pod_that_is_done_stays_to_be_looked_at() {
    let world = World::new("done");
    let stop = world.start_agent().await;
    world.api.put_pod("p", "u-1", json!({"restartPolicy": "Never"}));
    world.until("p", |pod| phase(pod) == "Running").await;
    world.log();
    world.runtime.exit(&world.runtime.running()[0].id, 0);
    world.until("p", |pod| phase(pod) == "Succeeded").await;
    world.eventually(|log| log.last().is_some_and(|last| last == "detach")).await;
    assert!(!world.runtime.is_empty(), "its record is kept");
    world.api.delete_pod("p", 0);
    world.until("p", |pod| pod.is_none()).await;
    assert!(world.runtime.is_empty());
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test]
async fn a_static_pod_runs_whatever_is_done_to_its_mirror() {
    let world = World::new("static");
    let file = world.dir.join("manifests/web.yaml");
    std::fs::create_dir_all(world.dir.join("manifests")).expect("a directory");
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: ns}\n\
                spec: {containers: [{name: c, image: 'i:1'}]}\n";
    std::fs::write(&file, text).expect("written");
    let stop = world.start_agent().await;
    let pod = world.until("web-n", |pod| phase(pod) == "Running" && container(pod)["ready"] == true).await;
    let uid = pod.expect("the mirror")["metadata"]["uid"].clone();
    let running = world.runtime.running();
    world.log();

    // By force or gently, deleting the mirror makes another mirror and leaves the pod alone.
    world.api.delete_pod("web-n", 30);
    let is_new = |pod: Option<&Value>| pod.is_some_and(|pod| pod["metadata"]["uid"] != uid);
    world.until("web-n", |pod| is_new(pod) && phase(pod) == "Running").await;
    world.api.write(crate::worker::pods(), "ns", "web-n", None);
    world.until("web-n", |pod| phase(pod) == "Running" && container(pod)["ready"] == true).await;
    assert_eq!(world.log(), [""; 0]);
    assert_eq!(world.runtime.running(), running);

    // Another file is another pod, which waits for the first one's end.
    std::fs::write(&file, text.replace("i:1", "i:2")).expect("written");
    world.until("web-n", |pod| container(pod)["image"].as_str().is_some_and(|i| i.contains("i:2"))).await;
    let log = world.log();
    let at = |what: &str| log.iter().position(|line| line.starts_with(what)).expect(what);
    assert!(at("remove web-n") < at("run web-n"), "{log:?}");

    std::fs::remove_file(&file).expect("removed");
    world.until("web-n", |pod| pod.is_none()).await;
    world.eventually(|log| log.iter().any(|line| line == "remove web-n")).await;
    assert!(world.runtime.is_empty());
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

/// A pod that takes more than half of the node.
fn asking(priority: i32) -> Value {
    let resources = json!({"requests": {"cpu": "3"}});
    let containers = json!([{"name": "c", "image": "i:1", "resources": resources}]);
    json!({"priority": priority, "containers": containers, "terminationGracePeriodSeconds": 7})
}

#[tokio::test]
async fn a_critical_pod_waits_until_it_has_room() {
    let world = World::new("preempt");
    let stop = world.start_agent().await;
    world.api.put_pod("p", "u-1", asking(0));
    world.until("p", |pod| phase(pod) == "Running").await;
    world.api.put_pod("refused", "u-2", asking(1_000_000));
    let pod = world.until("refused", |pod| phase(pod) == "Failed").await.expect("the pod");
    assert_eq!(pod["status"]["reason"], "OutOfcpu");
    world.log();

    world.api.put_pod("q", "u-3", asking(2_000_000_000));
    world.until("q", |pod| phase(pod) == "Running").await;
    let victim = world.until("p", |pod| phase(pod) == "Failed").await.expect("the victim");
    assert_eq!(victim["status"]["reason"], "Preempting");
    assert_eq!(victim["status"]["message"], "Preempted in order to admit critical pod");
    let conditions = victim["status"]["conditions"].as_array().expect("conditions");
    let target = conditions.iter().find(|c| c["type"] == "DisruptionTarget").expect("the condition");
    assert_eq!(target["reason"], "TerminationByKubelet");
    assert_eq!(target["message"], "Pod was preempted by Kubelet to accommodate a critical pod.");
    world.until_told("Preempting", "Preempted in order to admit critical pod").await;
    assert_eq!(world.api.told("ExceededGracePeriod"), [""; 0]);
    let log = world.log();
    let at = |what: &str| log.iter().position(|line| line == what).expect(what);
    assert!(at("stop c") < at("run q"), "{log:?}");

    // Its own end is no reason to think that there is no room for the next one.
    world.api.delete_pod("q", 1);
    world.until("q", |pod| pod.is_none()).await;
    world.api.put_pod("r", "u-4", asking(0));
    world.until("r", |pod| phase(pod) == "Running").await;
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test(start_paused = true)]
async fn a_critical_pod_does_not_wait_for_ever() {
    let world = World::new("stuck");
    let stop = world.start_agent().await;
    world.api.put_pod("p", "u-1", asking(0));
    world.until("p", |pod| phase(pod) == "Running").await;
    world.runtime.stuck.store(true, std::sync::atomic::Ordering::Relaxed);
    let start = tokio::time::Instant::now();
    world.api.put_pod("q", "u-3", asking(2_000_000_000));
    world.until("q", |pod| phase(pod) == "Running").await;
    // Half as long again as the pod had to end, and ten seconds at least.
    assert_eq!(start.elapsed().as_secs(), 10);
    let why = "Container runtime did not kill the pod within specified grace period.";
    world.until_told("ExceededGracePeriod", why).await;
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test]
async fn a_sandbox_needs_a_handler_that_can_do_what_the_pod_wants() {
    let world = World::new("handlers");
    let stop = world.start_agent().await;
    let class = |handler: &str| json!({"metadata": {"name": handler}, "handler": handler});
    let kind = minke_api::Kind::of::<k8s_openapi::api::node::v1::RuntimeClass>();
    world.api.write(kind, "", "kata", Some(class("kata")));
    let told = async |spec: Value, why: &str| {
        world.api.put_pod("p", why, spec);
        world.until_told("FailedCreatePodSandBox", &format!("Failed to create pod sandbox: {why}")).await;
        world.api.write(crate::worker::pods(), "ns", "p", None);
    };
    told(json!({"runtimeClassName": "none"}), "runtimeclass.node.k8s.io \"none\" not found").await;
    let unknown = "failed to get sandbox runtime: no runtime for \"kata\" is configured";
    told(json!({"runtimeClassName": "kata"}), unknown).await;
    let unable = "can't set `spec.hostUsers: false`, runtime does not support user namespaces";
    told(json!({"hostUsers": false}), unable).await;
    // Nothing was made in vain.
    assert!(world.log().iter().all(|line| !line.starts_with("run ") && !line.starts_with("attach")));
    stop.cancel();
    std::fs::remove_dir_all(&world.dir).expect("removed");
}
