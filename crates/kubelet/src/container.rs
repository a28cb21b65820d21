//! What the runtime is asked for: sandboxes and containers, from a pod's specification. Pure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::SignedDuration;
use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use minke_runtime::{Capabilities, ContainerSpec, Image, Mount, Resources, SandboxSpec, Seccomp, User};

use crate::env::expand;
use crate::observed::{
    ASKED_IMAGE_ANNOTATION, BACKOFF_ANNOTATION, IMAGE_ANNOTATION, IMAGE_ID_ANNOTATION, ROUND_ANNOTATION,
};
use crate::pod::{Class, Pod};
use crate::resources;

/// Where a node keeps the files of its pods.
#[derive(Debug, Clone)]
pub struct Paths {
    pub data: PathBuf,
}

impl Paths {
    pub fn pods(&self) -> PathBuf {
        self.data.join("pods")
    }

    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    pub fn volumes(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("volumes")
    }

    /// Directories that were made for claims; they outlive pods.
    pub fn claims(&self) -> PathBuf {
        self.data.join("volumes")
    }

    /// Bind mounts of single files and directories of volumes.
    pub fn subpaths(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("volume-subpaths")
    }

    pub fn logs(&self) -> PathBuf {
        self.data.join("logs").join("pods")
    }

    pub fn pod_logs(&self, pod: &Pod) -> PathBuf {
        self.logs().join(format!("{}_{}_{}", pod.namespace(), pod.name(), pod.uid()))
    }

    pub fn log(&self, pod: &Pod, container: &str, attempt: u32) -> PathBuf {
        self.pod_logs(pod).join(container).join(format!("{attempt}.log"))
    }

    /// The file in which a container leaves its last words.
    pub fn last_words(&self, uid: &str, container: &str, id: &str) -> PathBuf {
        self.pod(uid).join("containers").join(container).join(id.get(..8).unwrap_or(id))
    }
}

/// An id of `bytes` random bytes in hexadecimal.
pub fn new_id(bytes: usize) -> String {
    (0..bytes).map(|_| format!("{:02x}", rand::random::<u8>())).collect()
}

pub const POD_UID_LABEL: &str = "io.kubernetes.pod.uid";
pub const POD_NAME_LABEL: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";

/// A sandbox for `pod`. `pids` limits its processes, `attempt` counts sandboxes of the pod.
pub fn sandbox(
    pod: &Pod,
    paths: &Paths,
    cgroup_root: &str,
    domain: &str,
    pids: Option<i64>,
    attempt: u32,
) -> SandboxSpec {
    let spec = pod.spec();
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_ref());
    SandboxSpec {
        id: new_id(16),
        namespace: pod.namespace().to_owned(),
        name: pod.name().to_owned(),
        uid: pod.uid().to_owned(),
        attempt,
        hostname: crate::etc::hostname(pod, domain),
        host_network: pod.host_network(),
        host_pid: spec.host_pid == Some(true),
        host_ipc: spec.host_ipc == Some(true),
        share_pid: spec.share_process_namespace == Some(true),
        user_namespace: None,
        log_dir: paths.pod_logs(pod),
        cgroup_parent: resources::cgroup(cgroup_root, pod),
        resources: Resources { pids_limit: pids, ..resources::of_pod(pod) },
        sysctls: sysctls.into_iter().flatten().map(|s| (s.name.clone(), s.value.clone())).collect(),
        labels: BTreeMap::from([
            (POD_UID_LABEL.to_owned(), pod.uid().to_owned()),
            (POD_NAME_LABEL.to_owned(), pod.name().to_owned()),
            (POD_NAMESPACE_LABEL.to_owned(), pod.namespace().to_owned()),
        ]),
        annotations: BTreeMap::new(),
    }
}

/// Everything about a container that the specification alone does not say.
pub struct Inputs<'a> {
    pub attempt: u32,
    pub backoff: SignedDuration,
    pub round: u32,
    pub image: &'a Image,
    pub env: Vec<(String, String)>,
    /// Of the volumes; the files in `/etc` are added.
    pub mounts: Vec<Mount>,
    pub node_memory: u64,
    pub allocatable: &'a BTreeMap<String, Quantity>,
    pub cluster_domain: &'a str,
    /// Use the field's default seccomp profile where a pod names none.
    pub seccomp_default: bool,
    /// Directory of localhost seccomp profiles.
    pub seccomp_dir: &'a Path,
    /// Id of the container whose processes it sees.
    pub pid_target: Option<String>,
}

/// The container for the runtime; the error is the message of `CreateContainerConfigError`.
pub fn container(
    pod: &Pod,
    class: Class,
    container: &core::Container,
    paths: &Paths,
    inputs: Inputs<'_>,
) -> Result<ContainerSpec, String> {
    let id = new_id(32);
    let security = container.security_context.clone().unwrap_or_default();
    let of_pod = pod.spec().security_context.clone().unwrap_or_default();
    let run_as = security.run_as_user.or(of_pod.run_as_user);
    let non_root = security.run_as_non_root.or(of_pod.run_as_non_root) == Some(true);
    check_non_root(pod, container, non_root, run_as, inputs.image)?;
    let mut groups: Vec<u32> =
        of_pod.supplemental_groups.iter().flatten().filter_map(|g| u32::try_from(*g).ok()).collect();
    groups
        .extend(of_pod.fs_group.and_then(|group| u32::try_from(group).ok()).filter(|g| !groups.contains(g)));
    let privileged = security.privileged == Some(true);
    let unmasked = privileged || security.proc_mount.as_deref() == Some("Unmasked");
    let profile = security.seccomp_profile.or(of_pod.seccomp_profile);
    let words = |list: &Option<Vec<String>>| {
        let known: BTreeMap<&str, &str> = inputs.env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let lookup = |name: &str| known.get(name).map(|value| (*value).to_owned());
        list.iter().flatten().map(|word| expand(word, lookup)).collect::<Vec<_>>()
    };
    let (command, args) = (words(&container.command), words(&container.args));
    let mut env = inputs.env;
    if !env.iter().any(|(name, _)| name == "HOSTNAME") {
        let hostname = crate::etc::hostname(pod, inputs.cluster_domain);
        env.push(("HOSTNAME".to_owned(), if hostname.is_empty() { node_hostname() } else { hostname }));
    }
    let mut mounts = inputs.mounts;
    add_own_files(pod, container, paths, &id, &mut mounts);
    let capabilities = security.capabilities.unwrap_or_default();
    let mut limits = resources::of_container(pod, container);
    if class == Class::Ephemeral {
        limits = minke_runtime::Resources::default();
    }
    resources::deny_other_pages(&mut limits, inputs.allocatable);
    Ok(ContainerSpec {
        name: container.name.clone(),
        attempt: inputs.attempt,
        image: inputs.image.id.clone(),
        command,
        args,
        env,
        cwd: container.working_dir.clone().unwrap_or_default(),
        user: User {
            user: run_as.map(|uid| uid.to_string()),
            group: security.run_as_group.or(of_pod.run_as_group).and_then(|gid| u32::try_from(gid).ok()),
            supplementary_groups: groups,
            strict_groups: of_pod.supplemental_groups_policy.as_deref() == Some("Strict"),
        },
        mounts,
        devices: vec![],
        resources: limits,
        capabilities: Capabilities {
            add: capabilities.add.unwrap_or_default(),
            drop: capabilities.drop.unwrap_or_default(),
        },
        privileged,
        readonly_rootfs: security.read_only_root_filesystem == Some(true),
        no_new_privs: security.allow_privilege_escalation == Some(false),
        seccomp: match profile.as_ref().map(|profile| profile.type_.as_str()) {
            _ if privileged => Seccomp::Unconfined,
            Some("RuntimeDefault") => Seccomp::RuntimeDefault,
            Some("Localhost") => {
                let name = profile.and_then(|profile| profile.localhost_profile).unwrap_or_default();
                Seccomp::Localhost(localhost_profile(inputs.seccomp_dir, &name)?)
            }
            Some(_) => Seccomp::Unconfined,
            None if inputs.seccomp_default => Seccomp::RuntimeDefault,
            None => Seccomp::Unconfined,
        },
        masked_paths: unmasked.then(Vec::new),
        readonly_paths: unmasked.then(Vec::new),
        tty: container.tty == Some(true),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        log_path: paths.log(pod, &container.name, inputs.attempt),
        stop_signal: container.lifecycle.as_ref().and_then(|l| l.stop_signal.clone()).unwrap_or_default(),
        oom_score_adj: Some(resources::oom_score_adj(pod, container, inputs.node_memory)),
        pid_target: inputs.pid_target,
        labels: BTreeMap::from([(POD_UID_LABEL.to_owned(), pod.uid().to_owned())]),
        annotations: BTreeMap::from([
            (BACKOFF_ANNOTATION.to_owned(), inputs.backoff.as_millis().to_string()),
            (ROUND_ANNOTATION.to_owned(), inputs.round.to_string()),
            (ASKED_IMAGE_ANNOTATION.to_owned(), container.image.clone().unwrap_or_default()),
            (IMAGE_ANNOTATION.to_owned(), shown_image(container.image.as_deref(), inputs.image)),
            (
                IMAGE_ID_ANNOTATION.to_owned(),
                inputs.image.digests.first().unwrap_or(&inputs.image.id).clone(),
            ),
        ]),
        id,
    })
}

/// A profile by its path below the directory of profiles, which it may not leave.
fn localhost_profile(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let inside = Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    match inside && !name.is_empty() {
        true => Ok(dir.join(name)),
        false => Err(format!("localhost seccomp profile \"{name}\" must be a path below the profile root")),
    }
}

fn node_hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The tag under which the image was asked for, in full.
fn shown_image(asked: Option<&str>, image: &Image) -> String {
    let asked = asked.unwrap_or_default();
    let name = asked.split('@').next().unwrap_or(asked);
    let tagged = |tag: &&String| tag.ends_with(name) || tag.ends_with(&format!("{name}:latest"));
    image.tags.iter().find(tagged).cloned().unwrap_or_else(|| asked.to_owned())
}

fn check_non_root(
    pod: &Pod,
    container: &core::Container,
    non_root: bool,
    run_as: Option<i64>,
    image: &Image,
) -> Result<(), String> {
    let about = format!("(pod: \"{}\", container: {})", pod.long_name(), container.name);
    match (run_as, image.config.uid()) {
        _ if !non_root => Ok(()),
        (Some(0), _) => Err(format!("container's runAsUser breaks non-root policy {about}")),
        (None, Some(0)) => Err(format!("container has runAsNonRoot and image will run as root {about}")),
        (None, None) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root {about}",
            image.config.user.split(':').next().unwrap_or_default()
        )),
        _ => Ok(()),
    }
}

/// `/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname` and the file for last words, unless the container
/// mounts something of its own there.
fn add_own_files(pod: &Pod, container: &core::Container, paths: &Paths, id: &str, mounts: &mut Vec<Mount>) {
    let dir = paths.pod(pod.uid());
    let last_words = container.termination_message_path.as_deref().filter(|path| !path.is_empty());
    let mut files = vec![
        ("/etc/hosts", dir.join("etc-hosts")),
        ("/etc/resolv.conf", dir.join("resolv.conf")),
        (last_words.unwrap_or("/dev/termination-log"), paths.last_words(pod.uid(), &container.name, id)),
    ];
    if !pod.host_network() {
        files.push(("/etc/hostname", dir.join("hostname")));
    }
    for (inside, host_path) in files {
        if !mounts.iter().any(|mount| mount.container_path == Path::new(inside)) {
            mounts.push(Mount { host_path, container_path: inside.into(), ..Mount::default() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use minke_runtime::ImageConfig;
    use serde_json::{Value, json};

    fn build(spec: Value, user: &str) -> Result<ContainerSpec, String> {
        let pod = pod(json!({"spec": spec}));
        let image = Image {
            id: "sha256:1".into(),
            tags: vec!["docker.io/library/i:latest".into()],
            digests: vec!["docker.io/library/i@sha256:2".into()],
            config: ImageConfig { user: user.into(), ..ImageConfig::default() },
            ..Image::default()
        };
        let paths = Paths { data: "/data".into() };
        let inputs = Inputs {
            attempt: 2,
            backoff: SignedDuration::from_secs(20),
            round: 3,
            image: &image,
            env: vec![("A".into(), "1".into())],
            mounts: vec![],
            node_memory: 1 << 30,
            allocatable: &BTreeMap::from([("hugepages-2Mi".to_owned(), Quantity::bytes(0))]),
            cluster_domain: "cluster.local",
            seccomp_default: true,
            seccomp_dir: Path::new("/data/seccomp"),
            pid_target: None,
        };
        container(&pod, Class::Main, &pod.spec().containers[0], &paths, inputs)
    }

    #[test]
    fn a_specification_becomes_a_request() {
        let spec = build(
            json!({"securityContext": {"runAsUser": 5, "fsGroup": 7, "supplementalGroups": [8]},
                   "containers": [{"name": "c", "image": "i", "command": ["sh", "$(A)"], "args": ["$(B)"],
                     "lifecycle": {"stopSignal": "SIGUSR1"},
                     "securityContext": {"runAsUser": 6, "allowPrivilegeEscalation": false,
                                         "capabilities": {"drop": ["ALL"]}}}]}),
            "",
        )
        .expect("a container");
        assert_eq!(spec.command, ["sh", "1"]);
        assert_eq!(spec.args, ["$(B)"]);
        assert_eq!(spec.user.user.as_deref(), Some("6"));
        assert_eq!(spec.resources.hugepages["2MB"], 0);
        assert_eq!(spec.user.supplementary_groups, [8, 7]);
        assert!(spec.no_new_privs && !spec.privileged);
        assert_eq!(spec.capabilities.drop, ["ALL"]);
        assert_eq!(spec.seccomp, Seccomp::RuntimeDefault);
        assert_eq!(spec.log_path, Path::new("/data/logs/pods/ns_p_u-1/c/2.log"));
        assert_eq!(spec.annotations[BACKOFF_ANNOTATION], "20000");
        assert_eq!(
            (spec.annotations[ROUND_ANNOTATION].as_str(), spec.stop_signal.as_str()),
            ("3", "SIGUSR1")
        );
        assert_eq!(spec.annotations[IMAGE_ANNOTATION], "docker.io/library/i:latest");
        assert_eq!(spec.annotations[IMAGE_ID_ANNOTATION], "docker.io/library/i@sha256:2");
        assert!(spec.env.contains(&("HOSTNAME".into(), "p".into())));
        let inside: Vec<_> = spec.mounts.iter().map(|m| m.container_path.to_str().unwrap_or("")).collect();
        assert_eq!(inside, ["/etc/hosts", "/etc/resolv.conf", "/dev/termination-log", "/etc/hostname"]);
    }

    #[track_caller]
    fn check_non_root(security: Value, user: &str, want: Option<&str>) {
        let spec = json!({"containers": [{"name": "c", "image": "i", "securityContext": security}]});
        match (build(spec, user), want) {
            (Ok(_), None) => {}
            (Err(message), Some(want)) => assert!(message.starts_with(want), "{message}"),
            (got, want) => panic!("{:?} instead of {want:?}", got.err()),
        }
    }

    #[test]
    fn non_root_is_checked_before_the_start() {
        check_non_root(
            json!({"runAsNonRoot": true}),
            "",
            Some("container has runAsNonRoot and image will run as root"),
        );
        check_non_root(json!({"runAsNonRoot": true}), "1000:1000", None);
        check_non_root(
            json!({"runAsNonRoot": true}),
            "web",
            Some("container has runAsNonRoot and image has non-numeric"),
        );
        check_non_root(
            json!({"runAsNonRoot": true, "runAsUser": 0}),
            "5",
            Some("container's runAsUser breaks"),
        );
        check_non_root(json!({"runAsNonRoot": true, "runAsUser": 3}), "", None);
        check_non_root(json!({}), "", None);
    }

    #[test]
    fn profiles_stay_in_their_directory() {
        assert_eq!(localhost_profile(Path::new("/d"), "a/b.json"), Ok("/d/a/b.json".into()));
        for bad in ["", "../x", "/etc/passwd", "a/../../b"] {
            assert!(localhost_profile(Path::new("/d"), bad).is_err(), "{bad}");
        }
    }
}
