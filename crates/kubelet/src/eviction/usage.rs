//! What pods use of what can run short, who of them goes first, and the words for it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use minke_api::Quantity;
use minke_runtime::{ContainerState, DiskUse};

use super::thresholds::{Left, Resource, Threshold};
use crate::context::Context;
use crate::pod::{Class, Pod};
use crate::resources;
use crate::volumes;

/// What a pod uses, and what it asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodUse {
    pub uid: String,
    pub name: String,
    pub priority: i32,
    pub critical: bool,
    pub pids: u64,
    pub inodes: u64,
    pub containers: Vec<ContainerUse>,
    /// Bytes of the pod's volumes on the disk.
    pub volumes: u64,
    pub memory: u64,
    pub memory_request: u64,
    /// What the pod as a whole asks for, when it says so itself.
    pub own_memory_request: Option<Quantity>,
    pub disk_request: u64,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerUse {
    pub name: String,
    /// `None` is an ephemeral one, which can ask for nothing and is blamed for nothing.
    pub class: Option<Class>,
    pub memory: u64,
    pub memory_request: u64,
    /// What it has written, with its logs.
    pub disk: u64,
    pub disk_request: u64,
    pub disk_limit: Option<u64>,
}

impl PodUse {
    fn disk(&self) -> u64 {
        self.volumes + self.containers.iter().map(|c| c.disk).sum::<u64>()
    }

    /// Use and request of what runs short.
    fn of(&self, resource: Resource) -> (u64, u64) {
        match resource {
            Resource::Memory => (self.memory, self.memory_request),
            Resource::Disk => (self.disk(), self.disk_request),
            Resource::Inodes => (self.inodes, 0),
            Resource::Pids => (self.pids, 0),
        }
    }
}

/// Puts those that are to go first to the front.
pub fn rank(pods: &mut [PodUse], resource: Resource) {
    pods.sort_by_key(|pod| {
        let (used, asked) = pod.of(resource);
        let beyond = i128::from(used) - i128::from(asked);
        // Nobody asks for processes, so that having some is no fault.
        let modest = resource == Resource::Pids || used <= asked;
        (modest, pod.priority, Reverse(beyond))
    });
}

/// Why the pod was ended for what the node is short of, in the words of its status and event.
pub fn message(threshold: &Threshold, left: Left, pod: &PodUse) -> String {
    let resource = threshold.signal.resource();
    let name = resource.name();
    let (least, available) = (threshold.least(left.capacity), resource.amount(left.available));
    let mut text = format!(
        "The node was low on resource: {name}. Threshold quantity: {least}, available: {available}. "
    );
    let mut blame = |who: &str, used: u64, asked: String| {
        let used = resource.amount(used);
        text.push_str(&format!(
            "{who} was using {used}, request is {asked}, has larger consumption of {name}. "
        ));
    };
    if let (Resource::Memory, Some(asked)) = (resource, pod.own_memory_request) {
        blame(&format!("Pod {}", pod.name), pod.memory, asked.to_string());
    }
    for container in pod.containers.iter().filter(|container| container.class.is_some()) {
        let (used, asked) = match resource {
            Resource::Memory => (container.memory, container.memory_request),
            Resource::Disk => (container.disk, container.disk_request),
            Resource::Inodes | Resource::Pids => continue,
        };
        if used > asked {
            let asked = if asked == 0 { "0".to_owned() } else { resource.amount(asked).to_string() };
            blame(&format!("Container {}", container.name), used, asked);
        }
    }
    text
}

/// Which of its own limits a pod has outgrown, and why it must go, therefore; `volumes` are the bytes in each `emptyDir`.
pub fn outgrown(pod: &Pod, used: &PodUse, volumes: &BTreeMap<String, u64>) -> Option<(&'static str, String)> {
    for volume in pod.spec().volumes.iter().flatten() {
        let limit = volume.empty_dir.as_ref().and_then(|empty| empty.size_limit.as_ref());
        let Some(limit) = limit.and_then(|limit| Quantity::try_from(limit).ok()).filter(|q| !q.is_zero())
        else {
            continue;
        };
        let size = volumes.get(&volume.name).copied().unwrap_or(0);
        if i64::try_from(size).is_ok_and(|size| size > limit.value()) {
            let name = &volume.name;
            let why = format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{limit}\". ");
            return Some(("emptydirfs.limit", why));
        }
    }
    let limit = resources::pod_limit(pod, "ephemeral-storage").and_then(|limit| u64::try_from(limit).ok());
    if let Some(limit) = limit.filter(|limit| used.disk() > *limit) {
        let limit = Resource::Disk.amount(limit);
        let why =
            format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. ");
        return Some(("ephemeralpodfs.limit", why));
    }
    let mut main = used.containers.iter().filter(|container| container.class == Some(Class::Main));
    main.find_map(|container| {
        let limit = container.disk_limit.filter(|limit| container.disk > *limit)?;
        let (name, limit) = (&container.name, Resource::Disk.amount(limit));
        let why = format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\". ");
        Some(("ephemeralcontainerfs.limit", why))
    })
}

/// Whether the pod has limits of local storage that nobody else enforces.
pub fn has_limits(pod: &Pod) -> bool {
    let sized = pod.spec().volumes.iter().flatten().any(|volume| {
        volume
            .empty_dir
            .as_ref()
            .is_some_and(|e| e.size_limit.is_some() && e.medium.as_deref().unwrap_or("").is_empty())
    });
    sized
        || pod
            .containers()
            .any(|(_, c)| resources::limit(c.resources.as_ref(), "ephemeral-storage").is_some())
}

/// What a pod uses, and each `emptyDir` of it; its files only with `disk`, for they must be walked.
pub async fn pod_use(context: &Context, pod: &Pod, disk: bool) -> (PodUse, BTreeMap<String, u64>) {
    let units = |q: Option<Quantity>| q.and_then(|q| u64::try_from(q.value()).ok());
    let asked = |name: &str| u64::try_from(resources::pod_request(pod, name)).unwrap_or(0);
    let mut used = PodUse {
        uid: pod.uid().to_owned(),
        name: pod.name().to_owned(),
        priority: pod.spec().priority.unwrap_or(0),
        critical: resources::is_critical(pod),
        memory_request: asked("memory"),
        own_memory_request: resources::request(pod.spec().resources.as_ref(), "memory"),
        disk_request: asked("ephemeral-storage"),
        ..PodUse::default()
    };
    let mut sizes = BTreeMap::new();
    let mut sandboxes = context.runtime.list().await.unwrap_or_default();
    sandboxes.retain(|sandbox| sandbox.spec.uid == pod.uid());
    for sandbox in &sandboxes {
        let stats = context.runtime.sandbox_stats(&sandbox.spec.id).await.unwrap_or_default();
        // Sandboxes of one pod share its cgroup.
        used.memory = used.memory.max(stats.memory_working_set);
        used.pids = used.pids.max(stats.pids);
    }
    for (class, container) in pod.containers() {
        let mut sum = ContainerUse {
            name: container.name.clone(),
            class: Some(class).filter(|class| *class != Class::Ephemeral),
            memory_request: units(resources::request(container.resources.as_ref(), "memory")).unwrap_or(0),
            disk_request: units(resources::request(container.resources.as_ref(), "ephemeral-storage"))
                .unwrap_or(0),
            disk_limit: units(resources::limit(container.resources.as_ref(), "ephemeral-storage")),
            ..ContainerUse::default()
        };
        let own = sandboxes.iter().flat_map(|s| &s.containers).filter(|c| c.name == container.name);
        for status in own {
            if status.state == ContainerState::Running {
                let stats = context.runtime.container_stats(&status.id).await.unwrap_or_default();
                sum.memory += stats.memory_working_set;
            }
            if disk {
                let written = context.runtime.container_disk_use(&status.id).await.unwrap_or_default();
                sum.disk += written.bytes;
                used.inodes += written.inodes;
            }
        }
        if disk {
            let logs = walk(&context.paths.pod_logs(pod).join(&container.name)).await;
            sum.disk += logs.bytes;
            used.inodes += logs.inodes;
        }
        used.containers.push(sum);
    }
    let on_disk = |v: &&core::Volume| {
        v.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or("").is_empty())
    };
    for volume in pod.spec().volumes.iter().flatten().filter(on_disk).filter(|_| disk) {
        let found = walk(&volumes::dir(&context.paths, pod, volume)).await;
        used.volumes += found.bytes;
        used.inodes += found.inodes;
        sizes.insert(volume.name.clone(), found.bytes);
    }
    (used, sizes)
}

async fn walk(dir: &Path) -> DiskUse {
    let dir = dir.to_owned();
    tokio::task::spawn_blocking(move || minke_runtime::disk_use(&dir)).await.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::thresholds::Limits;
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    fn using(uid: &str, priority: i32, used: u64, asked: u64) -> PodUse {
        PodUse {
            uid: uid.into(),
            priority,
            memory: used,
            memory_request: asked,
            volumes: used,
            disk_request: asked,
            inodes: used,
            pids: used,
            ..PodUse::default()
        }
    }

    #[track_caller]
    fn ranked(resource: Resource, want: &[&str]) {
        let mut pods = vec![
            using("modest", 0, 50, 100),
            using("greedy", 0, 300, 100),
            using("important", 9, 900, 100),
            using("bigger", 0, 400, 300),
        ];
        rank(&mut pods, resource);
        assert_eq!(pods.iter().map(|pod| pod.uid.as_str()).collect::<Vec<_>>(), want);
    }

    #[test]
    fn who_uses_more_than_asked_goes_first() {
        ranked(Resource::Memory, &["greedy", "bigger", "important", "modest"]);
        ranked(Resource::Disk, &["greedy", "bigger", "important", "modest"]);
        // Nobody can ask for these.
        ranked(Resource::Inodes, &["bigger", "greedy", "modest", "important"]);
        ranked(Resource::Pids, &["bigger", "greedy", "modest", "important"]);
    }

    #[track_caller]
    fn says(threshold: &str, left: (u64, u64), pod: &PodUse, want: &str) {
        let (signal, least) = threshold.split_once('<').expect("a threshold");
        let hard = [(signal.to_owned(), least.to_owned())].into();
        let mut limits = Limits { hard, ..Limits::default() };
        limits.resolve().expect("a threshold");
        let (available, capacity) = left;
        assert_eq!(message(&limits.thresholds[0], Left { available, capacity }, pod), want);
    }

    #[test]
    fn the_message_says_what_was_short_and_who_took_it() {
        let container = |name: &str, used: u64, asked: u64| ContainerUse {
            name: name.into(),
            class: Some(Class::Main),
            memory: used,
            memory_request: asked,
            disk: used,
            ..ContainerUse::default()
        };
        let debugging = ContainerUse { class: None, ..container("e", 9000, 0) };
        let init = ContainerUse { class: Some(Class::Init), ..container("i", 4096, 0) };
        let containers = vec![init, container("a", 2048, 1024), container("b", 1024, 1024), debugging];
        let pod = PodUse { name: "p".into(), containers, memory: 8 << 20, ..PodUse::default() };
        says(
            "memory.available<100Mi",
            (52 << 20, 1 << 30),
            &pod,
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi. \
             Container i was using 4Ki, request is 0, has larger consumption of memory. \
             Container a was using 2Ki, request is 1Ki, has larger consumption of memory. ",
        );
        let whole = PodUse { own_memory_request: Some(Quantity::bytes(4 << 20)), ..pod.clone() };
        says(
            "allocatableMemory.available<10%",
            (52 << 20, 1 << 30),
            &PodUse { containers: vec![], ..whole },
            "The node was low on resource: memory. Threshold quantity: 107374184, available: 52Mi. \
             Pod p was using 8Mi, request is 4Mi, has larger consumption of memory. ",
        );
        says(
            "nodefs.available<1Gi",
            (1000, 1 << 40),
            &PodUse { containers: vec![container("a", 2048, 0)], ..PodUse::default() },
            "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 1k. \
             Container a was using 2Ki, request is 0, has larger consumption of ephemeral-storage. ",
        );
        let short = "The node was low on resource: inodes. Threshold quantity: 50, available: 5k. ";
        says("imagefs.inodesFree<5%", (5000, 1000), &pod, short);
        let short = "The node was low on resource: pids. Threshold quantity: 1k, available: 12. ";
        says("pid.available<1000", (12, 9999), &pod, short);
    }

    #[track_caller]
    fn check_outgrown(spec: Value, disk: u64, volume: u64, want: Option<&str>) {
        let pod = pod(json!({"spec": spec}));
        let limit = |c: &core::Container| resources::limit(c.resources.as_ref(), "ephemeral-storage");
        let containers = pod.containers().map(|(class, c)| ContainerUse {
            name: c.name.clone(),
            class: Some(class),
            disk,
            disk_limit: limit(c).and_then(|q| u64::try_from(q.value()).ok()),
            ..ContainerUse::default()
        });
        let used = PodUse { containers: containers.collect(), volumes: volume, ..PodUse::default() };
        let volumes = BTreeMap::from([("v".to_owned(), volume)]);
        assert_eq!(outgrown(&pod, &used, &volumes).map(|(_, why)| why).as_deref(), want);
    }

    #[test]
    fn limits_of_local_storage_are_kept() {
        let sized = json!({"volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Ki"}}]});
        check_outgrown(sized.clone(), 0, 1024, None);
        check_outgrown(sized, 0, 1025, Some("Usage of EmptyDir volume \"v\" exceeds the limit \"1Ki\". "));
        let limited = |limits: &[&str]| {
            let one = |(n, limit): (usize, &&str)| json!({"name": format!("c{n}"), "resources": {"limits": {"ephemeral-storage": limit}}});
            json!({"containers": limits.iter().enumerate().map(one).collect::<Vec<_>>()})
        };
        check_outgrown(limited(&["2Ki", "2Ki"]), 2048, 0, None);
        let total = "Pod ephemeral local storage usage exceeds the total limit of containers";
        check_outgrown(limited(&["2Ki", "2Ki"]), 2048, 1, Some(&format!("{total} 4Ki. ")));
        check_outgrown(json!({}), 1 << 40, 1 << 40, None);
        check_outgrown(limited(&["1Ki"]), 1025, 0, Some(&format!("{total} 1Ki. ")));
        let one = "Container c0 exceeded its local ephemeral storage limit \"1Ki\". ";
        check_outgrown(limited(&["1Ki", "4Ki"]), 2048, 0, Some(one));
        // Init containers are done when the others run: the largest one counts, and none of them alone.
        let mut with_init = limited(&["4Ki"]);
        with_init["initContainers"] = limited(&["1Ki"])["containers"].clone();
        check_outgrown(with_init, 2048, 0, None);
    }
}
