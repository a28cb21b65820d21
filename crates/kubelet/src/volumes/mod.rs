//! The volumes of a pod: set up before its sandbox, kept current while it runs, gone after it.
//!
//! What is to stand in a volume is decided in [`content`], how it gets there without a reader ever seeing
//! half of it in [`atomic`]. Volumes of other kinds than those here are refused with a clear message.

mod atomic;
mod claims;
mod content;
mod host_path;
mod huge_pages;
mod mounts;
mod ownership;
mod pod_certificates;
mod subpath;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Quantity};
use minke_client::{Client, Target};
use minke_runtime::{Mount, Propagation};
use serde_json::json;

use crate::container::Paths;
use crate::env::{Facts, expand};
use crate::pod::Pod;
use crate::references::{self, Held, Referenced};
use crate::resources;

use content::{Content, Token};
use mounts::is_mounted;
pub use mounts::{check_propagation, clean_up, make_shared};
use pod_certificates::{Certificate, Note};

/// What was made for one pod alone; kept so that an update of a volume needs no new one.
#[derive(Debug, Default)]
pub struct Known {
    /// By volume and path.
    tokens: BTreeMap<(String, String), Token>,
    /// By volume and index of the source.
    certificates: BTreeMap<(String, usize), Certificate>,
    /// Warnings about the pod that are to be told: reason and message.
    pub notes: Vec<Note>,
}

/// That of a pod, for the one job that works on its volumes.
pub type Credentials = Arc<tokio::sync::Mutex<Known>>;

/// What is needed to set volumes up.
#[derive(Clone)]
pub struct Volumes {
    pub paths: Paths,
    pub client: Arc<dyn Client>,
    pub node_name: String,
}

/// Whether contents of the pod's volumes may change while it runs.
pub fn are_live(pod: &Pod) -> bool {
    pod.spec().volumes.iter().flatten().any(|v| {
        v.config_map.is_some() || v.secret.is_some() || v.projected.is_some() || v.downward_api.is_some()
    })
}

impl Volumes {
    /// Sets up all volumes of `pod`, or brings them up to date; done twice it changes nothing. Returns when
    /// a token needs renewal. The errors are the texts of `FailedMount` events, one for each volume that failed.
    pub async fn mount(
        &self,
        pod: &Pod,
        held: &Held,
        known: &mut Known,
        facts: &Facts,
    ) -> Result<Option<Timestamp>, Vec<String>> {
        let referenced = held.fetch(references::of_volumes(pod)).await;
        let mut renewal: Option<Timestamp> = None;
        let mut failures = vec![];
        for volume in pod.spec().volumes.iter().flatten() {
            match self.mount_one(pod, volume, &referenced, known, facts).await {
                Ok(at) => renewal = [renewal, at].into_iter().flatten().min(),
                Err(why) => failures.push(why),
            }
        }
        if failures.is_empty() { Ok(renewal) } else { Err(failures) }
    }

    async fn mount_one(
        &self,
        pod: &Pod,
        volume: &core::Volume,
        referenced: &Referenced,
        known: &mut Known,
        facts: &Facts,
    ) -> Result<Option<Timestamp>, String> {
        let claim = claims::resolve(&*self.client, &self.node_name, pod, volume, referenced).await;
        let claim = claim.map_err(|unfit| unfit.0)?;
        let name = claim.as_ref().map_or(&volume.name, |claim| &claim.volume).clone();
        let failed = |why: String| format!("MountVolume.SetUp failed for volume \"{name}\" : {why}");
        let renewal = match &volume.projected {
            Some(projected) => {
                let tokens = self.renew_tokens(pod, &volume.name, projected, known).await.map_err(failed)?;
                let certificates =
                    self.keep_certificates(pod, &volume.name, projected, referenced, known).await;
                [tokens, certificates.map_err(failed)?].into_iter().flatten().min()
            }
            None => None,
        };
        let content = content::of(pod, volume, referenced, known, facts).map_err(failed)?;
        let memory = facts.allocatable.get("memory").map(|quantity| quantity.value());
        let (paths, pod, volume) = (self.paths.clone(), pod.clone(), volume.clone());
        let setup =
            tokio::task::spawn_blocking(move || set_up(&paths, &pod, &volume, content, claim, memory));
        setup.await.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
        Ok(renewal)
    }

    async fn renew_tokens(
        &self,
        pod: &Pod,
        volume: &str,
        projected: &core::ProjectedVolumeSource,
        known: &mut Known,
    ) -> Result<Option<Timestamp>, String> {
        let mut renewal: Option<Timestamp> = None;
        let sources = projected.sources.iter().flatten();
        for source in sources.filter_map(|source| source.service_account_token.as_ref()) {
            let key = (volume.to_owned(), source.path.clone());
            let now = Timestamp::now();
            let at = match known.tokens.get(&key) {
                Some(token) if token.renew_at > now => token.renew_at,
                _ => {
                    let token = self.request_token(pod, source, now).await?;
                    let at = token.renew_at;
                    known.tokens.insert(key, token);
                    at
                }
            };
            renewal = Some(renewal.map_or(at, |known| known.min(at)));
        }
        Ok(renewal)
    }

    /// Returns when to look again.
    async fn keep_certificates(
        &self,
        pod: &Pod,
        volume: &str,
        projected: &core::ProjectedVolumeSource,
        referenced: &Referenced,
        known: &mut Known,
    ) -> Result<Option<Timestamp>, String> {
        let mut due: Option<Timestamp> = None;
        for (index, source) in projected.sources.iter().flatten().enumerate() {
            let Some(source) = &source.pod_certificate else { continue };
            let certificate = known.certificates.entry((volume.to_owned(), index)).or_default();
            let found = match referenced.certificate_requests.clone().unwrap_or(Ok(vec![])) {
                // It is good for a while yet, and the watch tells when there is more to know.
                Err(_) if certificate.credential().is_ok() => continue,
                found => found?,
            };
            let (client, node, notes) = (&*self.client, &self.node_name, &mut known.notes);
            let at = pod_certificates::keep(client, node, pod, source, &found, certificate, notes).await?;
            due = [due, at].into_iter().flatten().min();
        }
        Ok(due)
    }

    async fn request_token(
        &self,
        pod: &Pod,
        source: &core::ServiceAccountTokenProjection,
        now: Timestamp,
    ) -> Result<Token, String> {
        let account = pod.spec().service_account_name.as_deref().unwrap_or("default");
        let audiences: Vec<&str> =
            source.audience.iter().map(String::as_str).filter(|a| !a.is_empty()).collect();
        let body = json!({
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"namespace": pod.namespace(), "name": account},
            "spec": {
                "audiences": audiences,
                "expirationSeconds": source.expiration_seconds.unwrap_or(3600),
                "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": pod.name(), "uid": pod.uid()},
            },
        });
        let target =
            Target::object(Kind::of::<core::ServiceAccount>(), pod.namespace(), account).sub("token");
        let answer = self.client.post(target, body).await;
        let answer = answer.map_err(|error| format!("failed to fetch token: {error}"))?;
        let text = |path: &str| answer.pointer(path).and_then(|value| value.as_str());
        let token = text("/status/token").ok_or("failed to fetch token: the answer has none")?;
        let expires: Option<Timestamp> =
            text("/status/expirationTimestamp").and_then(|time| time.parse().ok());
        let seconds = source.expiration_seconds.unwrap_or(3600);
        let expires = expires.unwrap_or(now + SignedDuration::from_secs(seconds));
        // At 80 % of its life or after a day, and not all pods at the same moment.
        let life = expires.duration_since(now).min(SignedDuration::from_hours(30));
        let jitter = SignedDuration::from_millis(rand::random_range(0..10_000));
        let renew_at = now + life * 4 / 5 + jitter.min(life / 10);
        Ok(Token { text: token.to_owned(), renew_at: renew_at.min(now + SignedDuration::from_hours(24)) })
    }

    /// The mounts of one container. `images` are the ids of those that volumes are. The error is the message of `CreateContainerConfigError`.
    pub async fn container_mounts(
        &self,
        pod: &Pod,
        container: &core::Container,
        env: &[(String, String)],
        images: &BTreeMap<String, String>,
    ) -> Result<Vec<Mount>, String> {
        let mut mounts = vec![];
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let volume = pod.spec().volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let Some(volume) = volume else {
                return Err(format!(
                    "cannot find volume \"{}\" to mount into container \"{}\"",
                    mount.name, container.name
                ));
            };
            let mut host_path = dir(&self.paths, pod, volume);
            let sub = sub_path(mount, env)?;
            if let Some(image) = images.get(&volume.name) {
                mounts.push(Mount {
                    image: Some(image.clone()),
                    image_sub_path: sub.unwrap_or_default(),
                    container_path: absolute(&mount.mount_path),
                    readonly: true,
                    ..Mount::default()
                });
                continue;
            }
            if let Some(sub) = sub {
                let target = self
                    .paths
                    .subpaths(pod.uid())
                    .join(&volume.name)
                    .join(&container.name)
                    .join(index.to_string());
                let bind = tokio::task::spawn_blocking(move || {
                    subpath::bind(&host_path, &sub, &target).map(|()| target)
                });
                // What is wrong tells of the node's files, and goes into no message.
                host_path = bind.await.unwrap_or_else(|error| Err(error.into())).map_err(|failure| {
                    let (volume, container) = (&mount.name, &container.name);
                    format!("{failure} for volumeMount \"{volume}\" of container \"{container}\"")
                })?;
            }
            let readonly = mount.read_only == Some(true) || always_readonly(volume);
            mounts.push(Mount {
                host_path,
                container_path: absolute(&mount.mount_path),
                readonly,
                recursive_readonly: readonly && is_recursive(mount),
                propagation: match mount.mount_propagation.as_deref() {
                    Some("HostToContainer") => Propagation::HostToContainer,
                    Some("Bidirectional") => Propagation::Bidirectional,
                    _ => Propagation::Private,
                },
                ..Mount::default()
            });
        }
        Ok(mounts)
    }
}

/// The part of its volume that is mounted, if it is not all. The error is the message of `CreateContainerConfigError`.
fn sub_path(mount: &core::VolumeMount, env: &[(String, String)]) -> Result<Option<String>, String> {
    let given = mount.sub_path.clone().filter(|sub| !sub.is_empty());
    let sub = match (given, mount.sub_path_expr.as_deref().unwrap_or_default()) {
        (given, "") => given,
        (_, expression) => {
            let missing = RefCell::new(BTreeSet::new());
            let value = |name: &str| {
                let found = env.iter().find(|(known, value)| known == name && !value.is_empty());
                if found.is_none() {
                    missing.borrow_mut().insert(name.to_owned());
                }
                found.map(|(_, value)| value.clone())
            };
            let expanded = expand(expression, value);
            let missing = Vec::from_iter(missing.into_inner());
            if !missing.is_empty() {
                return Err(format!("missing value for {}", missing.join(", ")));
            }
            Some(expanded)
        }
    };
    match &sub {
        Some(sub) if sub.starts_with('/') => {
            Err(format!("error SubPath `{sub}` must not be an absolute path"))
        }
        Some(sub) if sub.split('/').any(|part| part == "..") => {
            Err(format!("unable to provision SubPath `{sub}`: must not contain '..'"))
        }
        _ => Ok(sub),
    }
}

/// Whether a mount that is read-only is so for what is mounted below it as well. It is always possible.
pub fn is_recursive(mount: &core::VolumeMount) -> bool {
    matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"))
}

fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

fn always_readonly(volume: &core::Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.projected.is_some()
        || volume.downward_api.is_some()
        || volume.persistent_volume_claim.as_ref().is_some_and(|claim| claim.read_only == Some(true))
}

/// Where a volume lies on the node.
pub fn dir(paths: &Paths, pod: &Pod, volume: &core::Volume) -> PathBuf {
    let plugin = match volume {
        core::Volume { host_path: Some(host), .. } => return PathBuf::from(&host.path),
        core::Volume { config_map: Some(_), .. } => "kubernetes.io~configmap",
        core::Volume { secret: Some(_), .. } => "kubernetes.io~secret",
        core::Volume { projected: Some(_), .. } => "kubernetes.io~projected",
        core::Volume { downward_api: Some(_), .. } => "kubernetes.io~downward-api",
        core::Volume { persistent_volume_claim: Some(_), .. } | core::Volume { ephemeral: Some(_), .. } => {
            "kubernetes.io~local-volume"
        }
        _ => "kubernetes.io~empty-dir",
    };
    paths.volumes(pod.uid()).join(plugin).join(&volume.name)
}

/// How large a volume in memory may grow, in bytes: as it says, but not beyond what the pod may use, nor beyond what
/// the node has for pods.
fn memory_size(pod: &Pod, empty: &core::EmptyDirVolumeSource, allocatable: Option<i64>) -> Option<i64> {
    let own = empty.size_limit.as_ref().and_then(|limit| Quantity::try_from(limit).ok()).map(Quantity::value);
    let limits = [own, resources::pod_limit(pod, "memory"), allocatable];
    limits.into_iter().flatten().filter(|bytes| *bytes > 0).min()
}

/// Blocking. `content` is what the volume is to hold, for those whose contents are ours; `memory` is the node's.
fn set_up(
    paths: &Paths,
    pod: &Pod,
    volume: &core::Volume,
    content: Option<Content>,
    claim: Option<claims::Backing>,
    memory: Option<i64>,
) -> Result<(), String> {
    let dir = dir(paths, pod, volume);
    if let Some(host) = &volume.host_path {
        return host_path::check(Path::new(&host.path), host.type_.as_deref().unwrap_or_default());
    }
    if volume.image.is_some() {
        // The runtime mounts it where the container wants it.
        return Ok(());
    }
    let group = pod.spec().security_context.as_ref().and_then(|context| context.fs_group);
    let group = group.and_then(|group| u32::try_from(group).ok());
    if let Some(claim) = claim {
        let security = pod.spec().security_context.as_ref();
        let policy = security.and_then(|context| context.fs_group_change_policy.as_deref());
        let policy = match policy {
            Some("OnRootMismatch") => ownership::Policy::OnRootMismatch,
            _ => ownership::Policy::Always,
        };
        return claims::set_up(&claim, &dir, group, policy);
    }
    let say = |error: std::io::Error| format!("{}: {error}", dir.display());
    if let Some(empty) = &volume.empty_dir {
        let fresh = !dir.exists();
        fs::create_dir_all(&dir).map_err(say)?;
        match empty.medium.as_deref().unwrap_or_default() {
            "" => {}
            "Memory" => {
                mounts::tmpfs(&dir, memory_size(pod, empty, memory)).map_err(say)?;
            }
            medium if huge_pages::is_medium(medium) => {
                let bytes = huge_pages::page_size(medium, pod)?;
                mounts::hugetlbfs(&dir, bytes).map_err(say)?;
            }
            other => return Err(format!("unknown storage medium \"{other}\"")),
        }
        if fresh {
            let mode = empty.mode.and_then(|mode| u32::try_from(mode).ok()).unwrap_or(0o777);
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).map_err(say)?;
            if let Some(group) = group {
                ownership::give(&dir, group, true, ownership::Policy::Always).map_err(say)?;
            }
        }
        return Ok(());
    }
    let Some(content) = content else { return Err("no volume plugin matched".to_owned()) };
    fs::create_dir_all(&dir).map_err(say)?;
    // What may be secret is never on a disk.
    if volume.config_map.is_none() {
        mounts::tmpfs(&dir, None).map_err(say)?;
    }
    atomic::write(&dir, &content, group).map_err(say)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::Value;

    /// `limits` are those of two containers, in MiB; sizes are as well.
    #[track_caller]
    fn check_size(limits: [Option<i64>; 2], own: Option<i64>, allocatable: i64, want: i64) {
        let container = |(n, limit): (usize, &Option<i64>)| -> Value {
            let limits = limit.map(|limit| json!({"memory": format!("{limit}Mi")}));
            json!({"name": format!("c{n}"), "resources": {"limits": limits.unwrap_or(json!({}))}})
        };
        let containers: Vec<Value> = limits.iter().enumerate().map(container).collect();
        let pod = pod(json!({"spec": {"containers": containers}}));
        let empty = core::EmptyDirVolumeSource {
            size_limit: own.map(|own| Quantity::bytes(own << 20).into()),
            ..Default::default()
        };
        assert_eq!(memory_size(&pod, &empty, Some(allocatable << 20)), Some(want << 20));
    }

    #[test]
    fn volumes_in_memory_have_a_size() {
        check_size([None, None], None, 900, 900);
        check_size([Some(100), Some(50)], None, 900, 150);
        // As upstream: a container without a limit does not lift that of the others.
        check_size([Some(100), None], None, 900, 100);
        check_size([Some(100), Some(50)], Some(10), 900, 10);
        check_size([Some(100), Some(50)], Some(200), 900, 150);
        check_size([None, None], Some(0), 900, 900);
        check_size([Some(4000), None], None, 900, 900);
    }

    #[track_caller]
    fn check_sub_path(mount: Value, want: Result<Option<&str>, &str>) {
        let mut mount = mount;
        (mount["name"], mount["mountPath"]) = (json!("v"), json!("/v"));
        let mount: core::VolumeMount = serde_json::from_value(mount).expect("a mount");
        let env = [("POD", "web-0"), ("EMPTY", ""), ("UP", ".."), ("ROOT", "/x")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let got = sub_path(&mount, &env);
        assert_eq!(got.as_ref().map(Option::as_deref).map_err(String::as_str), want);
    }

    #[test]
    fn parts_of_volumes_are_named_by_variables() {
        check_sub_path(json!({}), Ok(None));
        check_sub_path(json!({"subPath": "a/$(POD)"}), Ok(Some("a/$(POD)")));
        let expression = |text: &str, want| check_sub_path(json!({ "subPathExpr": text }), want);
        expression("a/$(POD)/b", Ok(Some("a/web-0/b")));
        expression("$$(POD)-$(POD)$", Ok(Some("$(POD)-web-0$")));
        expression("$(NONE)/$(EMPTY)/$(ALL)", Err("missing value for ALL, EMPTY, NONE"));
        expression("$(ROOT)", Err("error SubPath `/x` must not be an absolute path"));
        expression("a/$(UP)", Err("unable to provision SubPath `a/..`: must not contain '..'"));
        expression("a..b", Ok(Some("a..b")));
    }

    #[tokio::test]
    async fn a_token_is_kept_until_it_grows_old() {
        let world = crate::testing::World::new("tokens");
        let (paths, client) = (Paths { data: world.dir.clone() }, world.api.clone());
        let volumes = Volumes { paths, client, node_name: "n".to_owned() };
        let source = json!({"sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 600}}]});
        let source: core::ProjectedVolumeSource = serde_json::from_value(source).expect("a volume");
        let (pod, mut known, began) = (pod(json!({})), Known::default(), Timestamp::now());
        let renewal = volumes.renew_tokens(&pod, "v", &source, &mut known).await.expect("a token");
        // The server said that it is good for years: it is replaced after a day all the same.
        let wait = renewal.expect("a time").duration_since(began);
        let day = SignedDuration::from_hours(24);
        assert!(wait <= day + SignedDuration::from_secs(60) && wait >= day - SignedDuration::from_secs(1));
        let key = ("v".to_owned(), "t".to_owned());
        known.tokens.get_mut(&key).expect("a token").text = "the first".to_owned();
        let again = volumes.renew_tokens(&pod, "v", &source, &mut known).await.expect("a token");
        assert_eq!((again, known.tokens[&key].text.as_str()), (renewal, "the first"));
        known.tokens.get_mut(&key).expect("a token").renew_at = began;
        let later = volumes.renew_tokens(&pod, "v", &source, &mut known).await.expect("a token");
        assert!(later >= renewal && known.tokens[&key].text == "t", "another one");
        std::fs::remove_dir_all(&world.dir).expect("removed");
    }
}
