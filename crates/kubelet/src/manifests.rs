//! Static pods: files in a directory of this node, one pod each, that run whatever the API server has. It is
//! told of them by mirror pods, which the workers keep. Upstream: pkg/kubelet/config/file.go.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Object};
use minke_runtime::DirWatch;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::pod::{Pod, SOURCE_ANNOTATION};

/// What a static pod and its mirror have in common: the hash of the file's pod.
pub const HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// Marks a mirror, with the hash of what it mirrors.
pub const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";

/// The directory is looked through this often even when nothing tells of a change; upstream's file check.
pub const LOOK_EVERY: Duration = Duration::from_secs(20);
/// Most bytes of a file, and most files.
const SIZE_MAX: u64 = 1 << 20;
const FILES_MAX: usize = 500;

/// By uid.
pub type Pods = BTreeMap<String, Pod>;

/// Whether the API server's pod is a mirror of one from a file.
pub fn is_mirror(object: &Object) -> bool {
    mirrored(object).is_some()
}

/// The hash of the pod that this one mirrors.
pub fn mirrored(object: &Object) -> Option<String> {
    let value = object.value();
    let annotations = value.get("metadata")?.get("annotations")?;
    annotations.get(MIRROR_ANNOTATION)?.as_str().map(str::to_owned)
}

/// Reads every file; what is no pod is told of in the log.
pub fn read(dir: &Path, node: &str) -> Pods {
    let mut pods = Pods::new();
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    paths.sort();
    for path in paths.into_iter().filter(|path| is_manifest(path)).take(FILES_MAX) {
        let mut text = vec![];
        let read = fs::File::open(&path).and_then(|file| file.take(SIZE_MAX).read_to_end(&mut text));
        let pod = read.map_err(|error| error.to_string()).and_then(|_| parse(&text, node));
        match pod {
            Ok(pod) => drop(pods.insert(pod.uid().to_owned(), pod)),
            Err(why) => tracing::warn!(path = %path.display(), why, "Not a static pod"),
        }
    }
    pods
}

/// Hidden files are not, which is what editors and atomic writers make.
fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.is_file()
}

fn parse(text: &[u8], node: &str) -> Result<Pod, String> {
    let mut value = minke_api::codec::yaml::decode(text).map_err(|error| error.to_string())?.value;
    if (value["apiVersion"].as_str(), value["kind"].as_str()) != (Some("v1"), Some("Pod")) {
        return Err("it is no v1 Pod".to_owned());
    }
    let metadata = value["metadata"].as_object().cloned().unwrap_or_default();
    let name = metadata.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let name = name.ok_or("it has no name")?.to_owned();
    let containers = value["spec"]["containers"].as_array().is_some_and(|list| !list.is_empty());
    if !containers {
        return Err("it has no containers".to_owned());
    }
    let digest = Sha256::digest([node.as_bytes(), b"\n", text].concat());
    let hash: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let meta = &mut value["metadata"];
    meta["name"] = json!(format!("{name}-{}", node.to_lowercase()));
    // Whatever the file says: another content is another pod, and its mirror leads back to it.
    meta["uid"] = json!(hash);
    if metadata.get("namespace").and_then(Value::as_str).is_none_or(str::is_empty) {
        meta["namespace"] = json!("default");
    }
    meta["creationTimestamp"] = json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    meta["annotations"][HASH_ANNOTATION] = json!(hash);
    meta["annotations"][SOURCE_ANNOTATION] = json!("file");
    value["spec"]["nodeName"] = json!(node);
    // Nothing that befalls the node takes such a pod off it.
    let mut tolerations = value["spec"]["tolerations"].as_array().cloned().unwrap_or_default();
    tolerations.push(json!({"operator": "Exists", "effect": "NoExecute"}));
    value["spec"]["tolerations"] = json!(tolerations);
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
    }
    let object = Object::from_value(Kind::of::<core::Pod>(), &value).map_err(|error| error.to_string())?;
    Pod::new(Arc::new(object)).ok_or_else(|| "it does not fit the type".to_owned())
}

/// The same pod, to be ended.
pub fn removed(pod: &Pod) -> Option<Pod> {
    let mut value = pod.object().value();
    value["metadata"]["deletionTimestamp"] =
        json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
    value["metadata"]["deletionGracePeriodSeconds"] = json!(pod.grace_seconds());
    Pod::new(Arc::new(Object::from_value(Kind::of::<core::Pod>(), &value).ok()?))
}

/// The mirror of a static pod, to be created; `owner` is the node's uid.
pub fn mirror(pod: &Pod, node: &str, owner: Option<&str>) -> Value {
    let mut value = pod.object().value();
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
    }
    let meta = &mut value["metadata"];
    let hash = meta["annotations"][HASH_ANNOTATION].clone();
    meta["annotations"][MIRROR_ANNOTATION] = hash;
    for field in ["uid", "creationTimestamp", "resourceVersion", "generation"] {
        if let Some(meta) = meta.as_object_mut() {
            meta.remove(field);
        }
    }
    if let Some(owner) = owner {
        meta["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "Node", "name": node, "uid": owner, "controller": true}]);
    }
    value
}

/// Looks at the directory whenever something in it changes, and sends what it holds when that is new; ends when
/// nobody listens.
pub async fn follow(dir: PathBuf, node: String, mut known: Pods, changed: mpsc::Sender<Pods>) {
    let events = DirWatch::new(&dir).ok();
    loop {
        tokio::select! {
            () = told(events.as_ref()) => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = changed.closed() => return,
        }
        let (path, name) = (dir.clone(), node.clone());
        let Ok(now) = tokio::task::spawn_blocking(move || read(&path, &name)).await else { continue };
        if now.keys().ne(known.keys()) {
            known = now.clone();
            if changed.send(now).await.is_err() {
                return;
            }
        }
    }
}

/// Returns when something has changed; never without a watch.
async fn told(watch: Option<&DirWatch>) {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: i}]}\n";

    #[test]
    fn files_become_pods() {
        let dir = crate::testing::temp_dir("manifests");
        fs::write(dir.join("web.yaml"), WEB).expect("written");
        fs::write(dir.join(".hidden"), WEB.replace("web", "hidden")).expect("written");
        fs::write(dir.join("other.json"), r#"{"apiVersion": "v1", "kind": "ConfigMap"}"#).expect("written");
        fs::write(dir.join("bad.yaml"), "a: b: c").expect("written");
        let pods = read(&dir, "Node-1");
        let pod = pods.values().next().expect("a pod");
        assert_eq!((pods.len(), pod.name(), pod.namespace()), (1, "web-node-1", "default"));
        assert!(pod.is_static() && !is_mirror(pod.object()) && !pod.is_deleted());
        assert_eq!(pod.spec().node_name.as_deref(), Some("Node-1"));
        assert!(removed(pod).expect("a pod").is_deleted());
        assert_eq!(read(&dir, "Node-1").keys().next(), Some(&pod.uid().to_owned()));
        let mirror = mirror(pod, "Node-1", Some("n-1"));
        assert_eq!(mirror["metadata"]["annotations"][MIRROR_ANNOTATION], pod.uid());
        assert_eq!((&mirror["metadata"]["uid"], &mirror["status"]), (&Value::Null, &Value::Null));
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[tokio::test]
    async fn a_change_is_seen_at_once() {
        let dir = crate::testing::temp_dir("manifests-watch");
        let (sender, mut changes) = mpsc::channel(1);
        let task = tokio::spawn(follow(dir.clone(), "n".into(), Pods::new(), sender));
        // The watch begins before the first look, so a file written before it is seen by neither: try again.
        let began = tokio::time::Instant::now();
        let pods = loop {
            fs::write(dir.join("web.yaml"), WEB).expect("written");
            if let Ok(pods) = tokio::time::timeout(Duration::from_millis(200), changes.recv()).await {
                break pods.expect("the task lives");
            }
        };
        assert_eq!(pods.len(), 1);
        fs::remove_file(dir.join("web.yaml")).expect("removed");
        assert_eq!(changes.recv().await.expect("the task lives").len(), 0);
        assert!(began.elapsed() < LOOK_EVERY);
        drop(changes);
        task.await.expect("it ends with its listener");
        fs::remove_dir_all(&dir).expect("removed");
    }
}
