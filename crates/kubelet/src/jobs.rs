//! The work that a pod's worker gives out: each job acts on the runtime, the network or the API server,
//! tells of it in events, and comes back with a [`Done`]. Nothing here decides what to do next.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Object};
use minke_client::{DeleteOptions, Target};
use minke_runtime::{
    ContainerStatus, Propagation, Resources, SandboxSpec, SandboxState, SandboxStatus, Stats,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::container::{self, Inputs, Paths};
use crate::context::Context;
use crate::env::{self, Facts};
use crate::env_files::{self, EnvFiles};
use crate::etc;
use crate::handlers::{Handler, Outcome, Place};
use crate::manifests;
use crate::observed::ADDRESS_ANNOTATION;
use crate::plan;
use crate::pod::Pod;
use crate::references::{self, Held};
use crate::runtime_class;
use crate::volumes::{self, Credentials};
use crate::worker::{Message, final_delete};

/// A container's last words: at most this many bytes, or of its log this many bytes and lines.
const WORDS_MAX: u64 = 4096;
const LOG_WORDS_MAX: u64 = 2048;
const LOG_WORDS_LINES: usize = 80;
/// What a killed container gets at least once its `preStop` hook is through.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// How a job ended.
pub enum Done {
    Mounted {
        renew_at: Option<Timestamp>,
    },
    Sandbox(Box<SandboxStatus>),
    Started,
    NotStarted(StartFailure),
    TornDown {
        removed: bool,
    },
    Resized {
        containers: Vec<(String, Resources)>,
        pod: Option<Resources>,
    },
    /// What the API server has of a static pod now.
    Mirror(Option<Arc<Object>>),
    Ok,
    /// To be tried again, later or when an object that the pod refers to changes.
    Failed {
        why: String,
        on_change: bool,
    },
}

/// Why a container did not start; an empty reason means that it was called off.
#[derive(Debug, Default)]
pub struct StartFailure {
    pub reason: &'static str,
    pub message: String,
    /// The registry was asked in vain.
    pub pulled: bool,
    pub on_change: bool,
}

pub async fn mount(
    context: Arc<Context>,
    pod: Pod,
    held: Held,
    credentials: Credentials,
    facts: Facts,
    cancel: CancellationToken,
) -> Done {
    let mut known = credentials.lock().await;
    let mounted = tokio::select! {
        mounted = context.volumes.mount(&pod, &held, &mut known, &facts) => mounted,
        () = cancel.cancelled() => return Done::Ok,
    };
    for (reason, message) in known.notes.drain(..) {
        context.events.warning(&pod, None, reason, message);
    }
    match mounted {
        Ok(renew_at) => Done::Mounted { renew_at },
        Err(failures) => {
            for why in &failures {
                context.events.warning(&pod, None, "FailedMount", why);
            }
            Done::Failed { why: failures.join("; "), on_change: true }
        }
    }
}

/// Makes the files, the sandbox and its link; on failure, nothing of it is left. `old` is replaced.
pub async fn create_sandbox(context: Arc<Context>, pod: Pod, attempt: u32, old: Option<SandboxSpec>) -> Done {
    let failed = |why: String| {
        let message = format!("Failed to create pod sandbox: {why}");
        context.events.warning(&pod, None, "FailedCreatePodSandBox", &message);
        Done::Failed { why, on_change: false }
    };
    if let Some(old) = old {
        let message = "Pod sandbox changed, it will be killed and re-created.";
        context.events.normal(&pod, None, "SandboxChanged", message);
        if let Err(why) = stop_sandbox(&context, &old).await {
            return failed(why);
        }
    }
    let handler = match runtime_class::handler(&context, &pod).await {
        Ok(handler) => handler,
        Err(why) => return failed(why),
    };
    let (domain, pids) = (&context.dns.domain, context.settings.pod_pids);
    let mut spec = container::sandbox(&pod, &context.paths, &context.cgroup_root, domain, pids, attempt);
    spec.user_namespace = match runtime_class::users(&context, &pod, &handler, &spec.id) {
        Ok(range) => range,
        Err(why) => return failed(why),
    };
    let address = if pod.host_network() { Ok(None) } else { context.network.allocate().map(Some) };
    let address = match address {
        Ok(address) => address,
        Err(why) => {
            context.ids.release(&spec.id);
            return failed(format!("failed to setup network for sandbox \"{}\": {why}", spec.id));
        }
    };
    context.owners.put(&spec.id, pod.uid());
    if let Some(address) = address {
        spec.annotations.insert(ADDRESS_ANNOTATION.to_owned(), address.to_string());
    }
    match make_sandbox(&context, &pod, &spec, address).await {
        Ok(()) => Done::Sandbox(Box::new(SandboxStatus {
            spec,
            state: SandboxState::Ready,
            created_at: Timestamp::now(),
            pid: None,
            containers: vec![],
        })),
        Err(why) => {
            if let Err(error) = context.runtime.remove_sandbox(&spec.id).await {
                tracing::warn!(sandbox = spec.id, %error, "Failed sandbox not removed");
            }
            if let Err(why) = give_back(&context, &spec).await {
                tracing::warn!(sandbox = spec.id, why, "Network of a failed sandbox not removed");
            }
            failed(why)
        }
    }
}

async fn make_sandbox(
    context: &Context,
    pod: &Pod,
    spec: &SandboxSpec,
    address: Option<IpAddr>,
) -> Result<(), String> {
    let dir = context.paths.pod(pod.uid());
    let own = address.or(Some(context.node_ip));
    let host_hosts =
        if pod.host_network() { fs::read_to_string("/etc/hosts").unwrap_or_default() } else { String::new() };
    let (resolv_conf, omitted) = etc::resolv_conf(pod, &context.dns);
    for warning in omitted {
        context.events.warning(pod, None, "DNSConfigForming", warning);
    }
    fs::create_dir_all(&dir)
        .and_then(|()| {
            fs::write(dir.join("etc-hosts"), etc::hosts(pod, own, &context.dns.domain, &host_hosts))
        })
        .and_then(|()| fs::write(dir.join("resolv.conf"), &resolv_conf))
        .and_then(|()| fs::write(dir.join("hostname"), format!("{}\n", spec.hostname)))
        .map_err(|error| format!("{}: {error}", dir.display()))?;
    context.runtime.run_sandbox(spec.clone()).await.map_err(|error| error.to_string())?;
    let Some(address) = address else { return Ok(()) };
    let netns = context.runtime.sandbox_netns(&spec.id).map_err(|error| error.to_string())?;
    context.drain.forget(address);
    let attached = context.network.attach(&spec.id, &netns, address).await;
    attached.map_err(|why| format!("failed to setup network for sandbox \"{}\": {why}", spec.id))
}

/// Takes a sandbox that has ended off the network, and gives its address and its ids back.
async fn give_back(context: &Context, spec: &SandboxSpec) -> Result<(), String> {
    context.ids.release(&spec.id);
    if spec.host_network {
        return Ok(());
    }
    context.network.detach(&spec.id).await?;
    if let Some(address) = spec.annotations.get(ADDRESS_ANNOTATION).and_then(|text| text.parse().ok()) {
        context.drain.forget(address);
        context.network.release(address);
    }
    Ok(())
}

async fn stop_sandbox(context: &Context, spec: &SandboxSpec) -> Result<(), String> {
    match context.runtime.stop_sandbox(&spec.id).await {
        Err(error) if !error.is_not_found() => return Err(error.to_string()),
        _ => {}
    }
    give_back(context, spec).await
}

/// What a start is about, besides the pod.
pub struct Start {
    pub sandbox_id: String,
    pub name: String,
    pub attempt: u32,
    pub backoff: SignedDuration,
    pub round: u32,
    pub address: Option<IpAddr>,
    /// Of an ephemeral container: the running container it looks at.
    pub target: Option<String>,
    pub cancel: CancellationToken,
    pub worker: mpsc::UnboundedSender<Message>,
}

pub async fn start(context: Arc<Context>, pod: Pod, held: Held, start: Start) -> Done {
    match try_start(&context, &pod, &held, &start).await {
        Ok(()) => Done::Started,
        Err(failure) => {
            // A failed pull has told its own story; this line tells which container it holds up.
            if !failure.reason.is_empty() && failure.reason != "PostStartHookError" {
                let short = matches!(
                    failure.reason,
                    "ErrImagePull" | "ErrImageNeverPull" | "InvalidImageName" | "ImageInspectError"
                );
                let message = if short { failure.reason } else { &failure.message };
                context.events.warning(&pod, Some(&start.name), "Failed", format!("Error: {message}"));
            }
            Done::NotStarted(failure)
        }
    }
}

async fn try_start(context: &Context, pod: &Pod, held: &Held, start: &Start) -> Result<(), StartFailure> {
    let Some((class, container)) = pod.container(&start.name) else { return Err(StartFailure::default()) };
    let image = tokio::select! {
        image = context.images.ensure(pod, container, held) => image,
        () = start.cancel.cancelled() => return Err(StartFailure::default()),
    };
    let image = image.map_err(|failure| StartFailure {
        reason: failure.reason,
        message: failure.message,
        pulled: failure.pulled,
        on_change: false,
    })?;
    let unfit = |message: String| StartFailure {
        reason: "CreateContainerConfigError",
        message,
        pulled: false,
        on_change: true,
    };
    let referenced = tokio::select! {
        referenced = held.fetch(references::of_env(container)) => referenced,
        () = start.cancel.cancelled() => return Err(StartFailure::default()),
    };
    let services = services(context, pod).await;
    let facts = context.facts(start.address);
    let files = env_files(context, pod, container).await;
    let env = env::build(pod, container, &services, &referenced, &files, &facts).map_err(unfit)?;
    let volumes = image_volumes(context, pod, container, held, start).await?;
    let mounts = context.volumes.container_mounts(pod, container, &env, &volumes).await.map_err(unfit)?;
    let passing = mounts.iter().filter(|mount| mount.propagation != Propagation::Private);
    for mount in passing {
        let both = mount.propagation == Propagation::Bidirectional;
        volumes::check_propagation(&mount.host_path, both).map_err(|why| StartFailure {
            reason: "CreateContainerError",
            message: format!("failed to generate container spec: failed to generate spec: {why}"),
            ..StartFailure::default()
        })?;
    }
    let inputs = Inputs {
        attempt: start.attempt,
        backoff: start.backoff,
        round: start.round,
        image: &image,
        env,
        mounts,
        node_memory: context.node_memory,
        allocatable: &context.allocatable,
        cluster_domain: &context.dns.domain,
        seccomp_default: context.seccomp_default,
        seccomp_dir: &context.seccomp_dir,
        pid_target: pid_target(pod, start).map_err(unfit)?,
    };
    let spec = container::container(pod, class, container, &context.paths, inputs).map_err(unfit)?;
    if start.cancel.is_cancelled() {
        return Err(StartFailure::default());
    }
    let failed = |reason, message: String| StartFailure { reason, message, ..StartFailure::default() };
    let words = context.paths.last_words(pod.uid(), &container.name, &spec.id);
    make_words_file(&words)
        .map_err(|error| failed("CreateContainerError", format!("{}: {error}", words.display())))?;
    let id = spec.id.clone();
    if let Err(error) = context.runtime.create_container(&start.sandbox_id, spec).await {
        let _ = fs::remove_file(&words);
        return Err(failed("CreateContainerError", error.to_string()));
    }
    tell_worker(context, &id, &start.worker).await;
    context.events.normal(pod, Some(&start.name), "Created", "Container created");
    let started = context.runtime.start_container(&id).await;
    tell_worker(context, &id, &start.worker).await;
    started.map_err(|error| failed("RunContainerError", error.to_string()))?;
    context.events.normal(pod, Some(&start.name), "Started", "Container started");
    post_start(context, pod, container, &id, start).await
}

async fn env_files(context: &Context, pod: &Pod, container: &core::Container) -> EnvFiles {
    if env_files::named(container).next().is_none() {
        return EnvFiles::default();
    }
    let (paths, pod, container) = (context.paths.clone(), pod.clone(), container.clone());
    let read = tokio::task::spawn_blocking(move || EnvFiles::read(&paths, &pod, &container));
    read.await.unwrap_or_default()
}

/// Has the images that the container mounts; their ids by the volumes' names.
async fn image_volumes(
    context: &Context,
    pod: &Pod,
    container: &core::Container,
    held: &Held,
    start: &Start,
) -> Result<BTreeMap<String, String>, StartFailure> {
    let mut ids = BTreeMap::new();
    let mounted =
        |volume: &&core::Volume| container.volume_mounts.iter().flatten().any(|m| m.name == volume.name);
    for volume in pod.spec().volumes.iter().flatten().filter(mounted) {
        let Some(source) = &volume.image else { continue };
        let as_container = core::Container {
            image: source.reference.clone(),
            image_pull_policy: source.pull_policy.clone(),
            ..core::Container::default()
        };
        let image = tokio::select! {
            image = context.images.ensure(pod, &as_container, held) => image,
            () = start.cancel.cancelled() => return Err(StartFailure::default()),
        };
        let image = image.map_err(|failure| StartFailure {
            reason: failure.reason,
            message: failure.message,
            pulled: failure.pulled,
            on_change: false,
        })?;
        ids.insert(volume.name.clone(), image.id);
    }
    Ok(ids)
}

/// The id of the container whose processes an ephemeral one is to see.
fn pid_target(pod: &Pod, start: &Start) -> Result<Option<String>, String> {
    match (pod.target_of(&start.name), &start.target) {
        (None, _) => Ok(None),
        (Some(_), Some(id)) => Ok(Some(id.clone())),
        (Some(name), None) => Err(format!("unable to find target container {name:?}")),
    }
}

async fn tell_worker(context: &Context, id: &str, worker: &mpsc::UnboundedSender<Message>) {
    if let Ok(status) = context.runtime.container_status(id).await {
        let _ = worker.send(Message::Container(Box::new(status)));
    }
}

/// The services that the pod's containers are told of: its namespace's, and always the API server's.
async fn services(context: &Context, pod: &Pod) -> Vec<Arc<core::Service>> {
    context.services.synced().await;
    let mut list = vec![];
    if let Some(kubernetes) = context.services.get("default", "kubernetes") {
        list.push(kubernetes);
    }
    if pod.spec().enable_service_links != Some(false) {
        list.extend(context.services.in_namespace(pod.namespace()));
    }
    list.iter().filter_map(|service| minke_client::typed(service)).collect()
}

fn make_words_file(path: &Path) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::File::create(path)?;
    // Whoever the container runs as is to write it.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

/// Runs a hook to its end; the error is why it failed.
async fn run_hook(
    context: &Context,
    pod: &Pod,
    container: &core::Container,
    id: &str,
    address: Option<IpAddr>,
    hook: &core::LifecycleHandler,
) -> Result<(), String> {
    let user_agent = format!("kube-lifecycle/{}", context.short_version());
    let handler = Handler::of_hook(hook, &Place { container, address, user_agent: &user_agent });
    let about = format!("for Container {:?} in Pod {:?} failed - error", container.name, pod.long_name());
    if let Handler::Exec(command) = &handler {
        // The grace period, or the end of the container, is what limits it.
        let done = context.runtime.exec_sync(id, command.clone(), Duration::ZERO).await;
        let (why, output) = match done {
            Ok(done) if done.exit_code == 0 => return Ok(()),
            Ok(done) => {
                let stderr = String::from_utf8_lossy(&done.stderr);
                let code = done.exit_code;
                let why = format!("command '{}' exited with {code}: {stderr}", command.join(" "));
                (why, [done.stdout, done.stderr].concat())
            }
            Err(error) => (error.to_string(), vec![]),
        };
        let output = env::go_quote(&String::from_utf8_lossy(&output));
        let command = command.join(" ");
        return Err(format!("Exec lifecycle hook ([{command}]) {about}: {why}, message: {output}"));
    }
    match handler.run(&*context.runtime, id, Duration::from_secs(24 * 3600)).await {
        Outcome::Success | Outcome::Warning(_) => Ok(()),
        Outcome::Failure(why) | Outcome::Error(why) => Err(match &hook.http_get {
            Some(get) => {
                let path = get.path.as_deref().unwrap_or_default();
                format!("HTTP lifecycle hook ({path}) {about}: {why}")
            }
            None => format!("Lifecycle hook {about}: {why}"),
        }),
    }
}

async fn post_start(
    context: &Context,
    pod: &Pod,
    container: &core::Container,
    id: &str,
    start: &Start,
) -> Result<(), StartFailure> {
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
    let Some(hook) = hook else { return Ok(()) };
    let result = tokio::select! {
        result = run_hook(context, pod, container, id, start.address, hook) => result,
        () = start.cancel.cancelled() => return Ok(()),
    };
    let Err(message) = result else { return Ok(()) };
    let name = Some(container.name.as_str());
    context.events.warning(pod, name, "FailedPostStartHook", "PostStartHook failed");
    context.events.normal(pod, name, "Killing", "FailedPostStartHook");
    let grace = Duration::from_secs(u64::try_from(pod.grace_seconds()).unwrap_or(30));
    if let Err(error) = context.runtime.stop_container(id, grace).await {
        tracing::warn!(container = id, %error, "Container with a failed hook not stopped");
    }
    Err(StartFailure { reason: "PostStartHookError", message, ..StartFailure::default() })
}

/// What a kill is about, besides the pod.
pub struct Kill {
    pub id: String,
    pub name: String,
    pub why: plan::Kill,
    pub deadline: Timestamp,
    /// The container was not asked to stop before.
    pub first: bool,
    pub restart: bool,
    pub address: Option<IpAddr>,
    /// The address that must get no new connections before anything else happens.
    pub drain: Option<IpAddr>,
}

pub async fn kill(context: Arc<Context>, pod: Pod, kill: Kill) -> Done {
    let name = Some(kill.name.as_str());
    if let Some(address) = kill.drain {
        context.drain.drain(address).await;
    }
    if kill.first {
        let message = match kill.why {
            plan::Kill::Ending => format!("Stopping container {}", kill.name),
            plan::Kill::Liveness => format!("Container {} failed liveness probe", kill.name),
            plan::Kill::Startup => format!("Container {} failed startup probe", kill.name),
            plan::Kill::Changed => format!("Container {} definition changed", kill.name),
            plan::Kill::Resize => format!("Container {} resize requires restart", kill.name),
            plan::Kill::Over => format!("Stopping container {}, all containers will be restarted", kill.name),
        };
        let told = kill.restart && kill.why != plan::Kill::Resize;
        let message = if told { format!("{message}, will be restarted") } else { message };
        context.events.normal(&pod, name, "Killing", message);
        if let Some((_, container)) = pod.container(&kill.name)
            && kill.why != plan::Kill::Over
        {
            pre_stop(&context, &pod, container, &kill).await;
        }
    }
    let left = Duration::try_from(kill.deadline.duration_since(Timestamp::now())).unwrap_or_default();
    let grace = match kill.why {
        plan::Kill::Over => Duration::ZERO,
        _ if kill.first => left.max(LEAST_GRACE.min(asked(&pod))),
        _ => left,
    };
    match context.runtime.stop_container(&kill.id, grace).await {
        Err(error) if !error.is_not_found() => {
            let message = format!(
                "error killing pod: failed to \"KillContainer\" for \"{}\" with KillContainerError: \"{error}\"",
                kill.name
            );
            context.events.warning(&pod, None, "FailedKillPod", message);
            Done::Failed { why: error.to_string(), on_change: false }
        }
        _ => Done::Ok,
    }
}

fn asked(pod: &Pod) -> Duration {
    Duration::from_secs(u64::try_from(pod.grace_seconds()).unwrap_or(1))
}

async fn pre_stop(context: &Context, pod: &Pod, container: &core::Container, kill: &Kill) {
    let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
    let Some(hook) = hook else { return };
    let left = Duration::try_from(kill.deadline.duration_since(Timestamp::now())).unwrap_or_default();
    let running = run_hook(context, pod, container, &kill.id, kill.address, hook);
    // The hook is cut off when the grace period is over; the container is then killed.
    if let Ok(Err(why)) = tokio::time::timeout(left, running).await {
        tracing::debug!(pod = %pod.long_name(), container = container.name, why, "PreStop hook failed");
        context.events.warning(pod, Some(&container.name), "FailedPreStopHook", "PreStopHook failed");
    }
}

/// Sets new limits. What a pod may have grows before its containers' share, and shrinks after it.
pub async fn resize(
    context: Arc<Context>,
    sandbox: Option<String>,
    pod: Option<Resources>,
    containers: Vec<(String, Resources)>,
) -> Done {
    let whole = sandbox.zip(pod);
    let refused = shrinks_too_far(&context, whole.as_ref(), &containers).await;
    if !refused.is_empty() {
        return Done::Failed { why: refused.join(", "), on_change: true };
    }
    let mut failure = None;
    let mut done = vec![];
    // Whether it grows is the kernel's to say: what it does not take now it takes when the parts are smaller.
    let mut settled = whole.is_none();
    if let Some((id, limits)) = &whole {
        settled = context.runtime.update_sandbox(id, limits.clone()).await.is_ok();
    }
    for (id, limits) in containers {
        match context.runtime.update_container(&id, limits.clone()).await {
            Ok(()) => done.push((id, limits)),
            Err(error) => failure = Some(error.to_string()),
        }
    }
    if let (Some((id, limits)), false) = (&whole, settled)
        && let Err(error) = context.runtime.update_sandbox(id, limits.clone()).await
    {
        failure = Some(error.to_string());
    }
    match failure {
        None => Done::Resized { containers: done, pod: whole.map(|(_, limits)| limits) },
        Some(why) => Done::Failed { why, on_change: true },
    }
}

/// Why limits of memory cannot be set that are lower than before: the kernel would kill what is over them.
async fn shrinks_too_far(
    context: &Context,
    whole: Option<&(String, Resources)>,
    containers: &[(String, Resources)],
) -> Vec<String> {
    let mut why = vec![];
    let limit = |resources: &Resources| resources.memory_limit.and_then(|bytes| u64::try_from(bytes).ok());
    let refused = |stats: Stats, wanted: u64| {
        let lower = stats.memory_limit == 0 || wanted < stats.memory_limit;
        (lower && stats.memory_working_set > wanted).then_some(stats.memory_working_set)
    };
    if let Some((id, resources)) = whole
        && let Some(wanted) = limit(resources)
        && let Ok(stats) = context.runtime.sandbox_stats(id).await
        && let Some(usage) = refused(stats, wanted)
    {
        why.push(format!("attempting to set pod memory limit ({wanted}) below current usage ({usage})"));
    }
    for (id, resources) in containers {
        if let Some(wanted) = limit(resources)
            && let Ok(stats) = context.runtime.container_stats(id).await
            && let Some(usage) = refused(stats, wanted)
        {
            let name =
                context.runtime.container_status(id).await.map(|status| status.name).unwrap_or_default();
            why.push(format!(
                "attempting to set container {name:?} memory limit ({wanted}) below current usage ({usage})"
            ));
        }
    }
    why
}

pub async fn remove_container(context: Arc<Context>, pod: Pod, name: String, id: String) -> Done {
    let log = context.runtime.container_status(&id).await.map(|status| status.log_path);
    if let Err(error) = context.runtime.remove_container(&id).await {
        return Done::Failed { why: error.to_string(), on_change: false };
    }
    let _ = fs::remove_file(context.paths.last_words(pod.uid(), &name, &id));
    if let Ok(log) = log {
        crate::logs::remove(&log);
    }
    Done::Ok
}

pub async fn remove_sandbox(context: Arc<Context>, id: String) -> Done {
    match context.runtime.remove_sandbox(&id).await {
        Ok(()) => Done::Ok,
        Err(error) => Done::Failed { why: error.to_string(), on_change: false },
    }
}

/// Takes down what a pod that is over has: processes, network, volumes; with `remove` also its records,
/// files and logs. Goes on past failures, and is done again until there are none.
pub async fn teardown(context: Arc<Context>, pod: Pod, sandboxes: Vec<SandboxSpec>, remove: bool) -> Done {
    let mut failures = vec![];
    for spec in &sandboxes {
        context.owners.forget(&spec.id);
        failures.extend(stop_sandbox(&context, spec).await.err());
        if remove && let Err(error) = context.runtime.remove_sandbox(&spec.id).await {
            failures.push(error.to_string());
        }
    }
    if failures.is_empty() {
        let (paths, uid, logs) = (context.paths.clone(), pod.uid().to_owned(), context.paths.pod_logs(&pod));
        let cleaned =
            tokio::task::spawn_blocking(move || clean_up(&paths, &uid, remove.then_some(&logs))).await;
        failures.extend(cleaned.map_err(|error| error.to_string()).and_then(|done| done).err());
    }
    if failures.is_empty() {
        return Done::TornDown { removed: remove };
    }
    let why = failures.join("; ");
    context.events.warning(&pod, None, "FailedKillPod", format!("error killing pod: {why}"));
    Done::Failed { why, on_change: false }
}

/// Removes a pod's files; without `logs` only its volumes.
pub fn clean_up(paths: &Paths, uid: &str, logs: Option<&std::path::PathBuf>) -> Result<(), String> {
    let say = |error: std::io::Error| format!("clean up pod {uid}: {error}");
    let Some(logs) = logs else {
        volumes::clean_up(&paths.subpaths(uid)).map_err(say)?;
        return volumes::clean_up(&paths.volumes(uid)).map_err(say);
    };
    volumes::clean_up(&paths.pod(uid)).map_err(say)?;
    match fs::remove_dir_all(logs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(say(error)),
        _ => Ok(()),
    }
}

pub async fn delete(context: Arc<Context>, pod: Pod) -> Done {
    match context.client.delete(Target::of(pod.object()), final_delete(&pod)).await {
        Ok(()) => Done::Ok,
        // Gone already, or another pod of that name.
        Err(error) if error.is_not_found() || error.is_conflict() => Done::Ok,
        Err(error) => {
            tracing::warn!(pod = %pod.long_name(), %error, "Pod not deleted");
            Done::Failed { why: error.to_string(), on_change: false }
        }
    }
}

/// Makes the API server's picture of a static pod.
pub async fn create_mirror(context: Arc<Context>, pod: Pod) -> Done {
    let node = Target::object(Kind::of::<core::Node>(), "", &context.node_name);
    let owner = context.client.get(node).await.ok().map(|node| node.uid().to_owned());
    let body = manifests::mirror(&pod, &context.node_name, owner.as_deref());
    let collection = Target::collection(crate::worker::pods(), pod.namespace());
    match context.client.create(collection, body).await {
        Ok(object) => Done::Mirror(Some(object)),
        Err(error) => Done::Failed { why: error.to_string(), on_change: false },
    }
}

/// Removes a mirror that is another pod's, is to be deleted, or mirrors nothing any more.
pub async fn delete_mirror(context: Arc<Context>, mirror: Arc<Object>) -> Done {
    let options = DeleteOptions {
        grace_period: Some(0),
        uid: Some(mirror.uid().to_owned()),
        ..DeleteOptions::default()
    };
    match context.client.delete(Target::of(&mirror), options).await {
        Err(error) if !error.is_not_found() && !error.is_conflict() => {
            Done::Failed { why: error.to_string(), on_change: false }
        }
        _ => Done::Mirror(None),
    }
}

/// What a container that ended leaves as its message, as its `terminationMessagePolicy` says.
pub fn last_words(paths: &Paths, pod: &Pod, container: &core::Container, status: &ContainerStatus) -> String {
    let file = paths.last_words(pod.uid(), &container.name, &status.id);
    let mut words = String::new();
    if let Ok(file) = fs::File::open(file) {
        let mut bytes = vec![];
        if file.take(WORDS_MAX).read_to_end(&mut bytes).is_ok() {
            words = String::from_utf8_lossy(&bytes).into_owned();
        }
    }
    let fall_back = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if words.is_empty() && fall_back && status.exit_code != Some(0) {
        words = log_words(&status.log_path).unwrap_or_default();
    }
    words
}

fn log_words(path: &Path) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    // Every line of the log begins with some 40 bytes of its own.
    let from = file.metadata()?.len().saturating_sub(2 * LOG_WORDS_MAX + 64 * LOG_WORDS_LINES as u64);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    let lines = bytes.split_inclusive(|byte| *byte == b'\n').skip(usize::from(from > 0));
    let texts: Vec<Vec<u8>> = lines
        .filter_map(crate::logs::Entry::parse)
        .map(|entry| {
            let mut text = entry.text.to_vec();
            text.extend(entry.full.then_some(b'\n'));
            text
        })
        .collect();
    let kept = texts.len().saturating_sub(LOG_WORDS_LINES);
    let text = texts[kept..].concat();
    let cut = text.len().saturating_sub(LOG_WORDS_MAX as usize);
    Ok(String::from_utf8_lossy(&text[cut..]).into_owned())
}
