//! The pods of this node: a worker for each, found by uid. News from the API server and from the runtime
//! go to the worker they are for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1 as core;
use minke_api::Object;
use minke_client::{Change, Informer};
use minke_runtime::{Event, SandboxStatus};
use tokio::sync::{broadcast, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::admission::{self, Decision};
use crate::container::POD_UID_LABEL;
use crate::context::Context;
use crate::eviction::{self, Eviction};
use crate::jobs;
use crate::manifests;
use crate::observed::ADDRESS_ANNOTATION;
use crate::pod::Pod;
use crate::qos;
use crate::resize;
use crate::worker::{Message, Worker};

/// How long the clearing away of evicted pods may hold up the next look; upstream's.
const CLEAR_MAX: Duration = Duration::from_secs(30);

pub struct Agent {
    context: Arc<Context>,
    pods: Arc<Informer>,
    nodes: Arc<Informer>,
    events: broadcast::Receiver<Event>,
    /// What was there when the agent started, by uid, until a worker takes it over.
    found: HashMap<String, Vec<SandboxStatus>>,
    workers: HashMap<String, Handle>,
    running: JoinSet<String>,
    /// Static pods that wait until an older one of their name has ended.
    waiting: Vec<Pod>,
    /// The look at what is left on the node, while it is under way; then the end of those who must go.
    survey: JoinSet<Vec<(String, Eviction)>>,
}

struct Handle {
    inbox: mpsc::UnboundedSender<Message>,
    pod: Pod,
    admitted: bool,
    _task: AbortHandle,
}

impl Agent {
    /// Looks at everything that runs, and takes its addresses and ids before anything new can have them.
    pub async fn adopt(
        context: Arc<Context>,
        pods: Arc<Informer>,
        nodes: Arc<Informer>,
    ) -> Result<Agent, minke_runtime::Error> {
        // First the events, then the list: nothing falls between them.
        let events = context.runtime.subscribe();
        let mut found: HashMap<String, Vec<SandboxStatus>> = HashMap::new();
        for mut sandbox in context.runtime.list().await? {
            if let Some(range) = sandbox.spec.user_namespace
                && sandbox.state == minke_runtime::SandboxState::Ready
            {
                context.ids.reserve(&sandbox.spec.id, range);
            }
            let address = sandbox.spec.annotations.get(ADDRESS_ANNOTATION).and_then(|text| text.parse().ok());
            if let Some(address) = address
                && sandbox.state == minke_runtime::SandboxState::Ready
                && let Err(why) = context.network.reserve(address)
            {
                tracing::warn!(sandbox = sandbox.spec.id, %address, why, "Address of a running pod not reserved");
            }
            // Its link is its last step; without a container, whether that was taken is not known.
            if let Some(address) = address
                && sandbox.state == minke_runtime::SandboxState::Ready
                && sandbox.containers.is_empty()
                && let Err(why) = connect(&context, &sandbox.spec.id, address).await
            {
                tracing::warn!(sandbox = sandbox.spec.id, why, "An unfinished sandbox will be replaced");
                sandbox.state = minke_runtime::SandboxState::NotReady;
            }
            found.entry(sandbox.spec.uid.clone()).or_default().push(sandbox);
        }
        let agent = Agent {
            context,
            pods,
            nodes,
            events,
            found,
            workers: HashMap::new(),
            running: JoinSet::new(),
            waiting: vec![],
            survey: JoinSet::new(),
        };
        Ok(agent)
    }

    /// Runs until `stop`. Pods go on without us.
    pub async fn run(mut self, stop: CancellationToken) {
        let synced = self.pods.clone();
        tokio::select! { () = synced.synced() => {}, () = stop.cancelled() => return }
        let dir = self.context.settings.manifests.clone();
        let mut files = manifests::read(&dir, &self.context.node_name);
        let (sender, mut changed_files) = mpsc::channel(1);
        let follow = manifests::follow(dir, self.context.node_name.clone(), files.clone(), sender);
        let _following = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(follow));
        let mut present: Vec<Pod> = self.pods.snapshot().values().cloned().filter_map(Pod::new).collect();
        // Those that run already come before those that may find no room, the rest by age.
        present.sort_by_key(|pod| (!self.found.contains_key(pod.uid()), pod.object().created()));
        let mut changes = self.pods.subscribe();
        let mut nodes = self.nodes.subscribe();
        files.values().for_each(|pod| self.put(pod.clone()));
        for pod in present {
            match manifests::is_mirror(pod.object()) {
                true => self.put_mirror(pod.object(), Some(pod.object().clone())),
                false => self.put(pod),
            }
        }
        self.remove_orphans();
        let mut looks = tokio::time::interval(eviction::EVERY);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let clock = minke_runtime::ClockWatch::new();
        let clock_set = async || match &clock {
            Ok(clock) => clock.set().await,
            Err(_) => std::future::pending().await,
        };
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = clock_set() => self.take_clock(),
                event = self.events.recv() => self.take_event(event).await,
                Some(change) = changes.recv() => self.take_change(change),
                Some(ended) = self.running.join_next() => self.take_end(ended),
                Some(now) = changed_files.recv() => {
                    self.put_files(&files, &now);
                    files = now;
                }
                Some(Ok(victims)) = self.survey.join_next() => self.evict(victims),
                _ = looks.tick() => self.look(),
                Some(change) = nodes.recv() => self.take_node(&change),
            }
        }
    }

    /// Tells when the node is closed to new pods, or opened again.
    fn take_node(&self, change: &Change) {
        let is_closed = |object: &Option<Arc<Object>>| -> Option<bool> {
            let node: Arc<core::Node> = minke_client::typed(object.as_ref()?)?;
            Some(node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true)))
        };
        let (was, is) = (is_closed(&change.old), is_closed(&change.new));
        if was == is || was.is_none() {
            return;
        }
        let reason = match is {
            Some(true) => "NodeNotSchedulable",
            Some(false) => "NodeSchedulable",
            None => return,
        };
        let message = format!("Node {} status is now: {reason}", self.context.node_name);
        self.context.events.node(true, reason, message);
    }

    /// The clock was set: waits that were worked out by the old one, and tokens that it kept, are looked at anew.
    fn take_clock(&self) {
        tracing::info!("The clock was set");
        for handle in self.workers.values() {
            let _ = handle.inbox.send(Message::Changed);
        }
    }

    /// Looks whether something runs short, unless the last look is not over yet.
    fn look(&mut self) {
        if !self.survey.is_empty() {
            return;
        }
        let active =
            self.workers.values().filter(|h| h.admitted && !h.pod.is_terminal() && !h.pod.is_deleted());
        let pods: Vec<Pod> = active.map(|handle| handle.pod.clone()).collect();
        let context = self.context.clone();
        self.survey.spawn(async move {
            qos::keep(&context, &pods).await;
            eviction::survey(context, pods).await
        });
    }

    /// Ends these pods. There is no new look before they are cleared away: it may have been enough.
    fn evict(&mut self, victims: Vec<(String, Eviction)>) {
        let ends: Vec<_> =
            victims.into_iter().filter_map(|(uid, eviction)| self.end(&uid, eviction)).collect();
        if !ends.is_empty() {
            self.survey.spawn(async move {
                let cleared = join_all(ends).await.into_iter().map(async |mut cleared| cleared.recv().await);
                let _ = tokio::time::timeout(CLEAR_MAX, join_all(cleared)).await;
                vec![]
            });
        }
    }

    /// Has the pod ended. What it returns waits until nothing of it runs any more, or for as long as that may take, and
    /// gives something that ends when the pod has been cleared away.
    fn end(
        &mut self,
        uid: &str,
        eviction: Eviction,
    ) -> Option<impl Future<Output = mpsc::Receiver<()>> + use<>> {
        let handle = self.workers.get_mut(uid)?;
        tracing::warn!(pod = %handle.pod.long_name(), reason = eviction.reason, why = eviction.message, "Ending pod");
        self.context.endings.add(&eviction);
        // What it has is free for others from now on.
        handle.admitted = false;
        let (events, pod, patience) = (self.context.events.clone(), handle.pod.clone(), eviction.patience());
        let (sender, mut ended) = mpsc::channel(1);
        let _ = handle.inbox.send(Message::Evict(eviction, sender));
        Some(async move {
            if tokio::time::timeout(patience, ended.recv()).await.is_err() {
                let message = "Container runtime did not kill the pod within specified grace period.";
                events.warning(&pod, None, "ExceededGracePeriod", message);
            }
            ended
        })
    }

    fn take_change(&mut self, change: Change) {
        let any = change.new.as_ref().or(change.old.as_ref());
        if let Some(mirror) = any.filter(|object| manifests::is_mirror(object)) {
            return self.put_mirror(&mirror.clone(), change.new);
        }
        if let Some(old) = &change.old
            && change.new.as_ref().is_none_or(|new| new.uid() != old.uid())
            && let Some(handle) = self.workers.get_mut(old.uid())
        {
            // Its successor may be bound before the worker is through.
            handle.admitted = false;
            let _ = handle.inbox.send(Message::Gone);
        }
        if let Some(pod) = change.new.and_then(Pod::new) {
            self.put(pod);
        }
    }

    /// Static pods that came, and those that went.
    fn put_files(&mut self, before: &manifests::Pods, now: &manifests::Pods) {
        for (uid, old) in before.iter().filter(|(uid, _)| !now.contains_key(*uid)) {
            self.waiting.retain(|pod| pod.uid() != uid);
            if let (Some(handle), Some(removed)) = (self.workers.get_mut(uid), manifests::removed(old)) {
                handle.pod = removed.clone();
                let _ = handle.inbox.send(Message::Pod(removed));
            }
        }
        let new = now.iter().filter(|(uid, _)| !before.contains_key(*uid));
        self.waiting.extend(new.map(|(_, pod)| pod.clone()));
        self.put_waiting();
    }

    /// Starts the static pods whose predecessors have ended.
    fn put_waiting(&mut self) {
        let key = |pod: &Pod| (pod.namespace().to_owned(), pod.name().to_owned());
        let taken: HashSet<_> = self.workers.values().map(|handle| key(&handle.pod)).collect();
        let (wait, ready) = self.waiting.drain(..).partition(|pod| taken.contains(&key(pod)));
        self.waiting = wait;
        let ready: Vec<Pod> = ready;
        for pod in ready {
            let mirror = self.pods.get(pod.namespace(), pod.name());
            self.put(pod);
            if let Some(mirror) = mirror {
                self.put_mirror(&mirror.clone(), Some(mirror));
            }
        }
    }

    /// What the API server shows of a static pod, for its worker. One that mirrors nothing goes.
    fn put_mirror(&mut self, mirror: &Arc<Object>, now: Option<Arc<Object>>) {
        let same = |pod: &Pod| {
            pod.is_static() && pod.name() == mirror.name() && pod.namespace() == mirror.namespace()
        };
        if let Some(handle) = self.workers.values().find(|handle| same(&handle.pod)) {
            let _ = handle.inbox.send(Message::Mirror(now));
        } else if let Some(mirror) = now
            && !self.waiting.iter().any(same)
        {
            let context = self.context.clone();
            tokio::spawn(async move { jobs::delete_mirror(context, mirror).await });
        }
    }

    fn put(&mut self, pod: Pod) {
        let uid = pod.uid().to_owned();
        if let Some(handle) = self.workers.get_mut(&uid) {
            handle.pod = pod.clone();
            let _ = handle.inbox.send(Message::Pod(pod));
            return;
        }
        let sandboxes = self.found.remove(&uid).unwrap_or_default();
        let decision = self.decide(&pod, !sandboxes.is_empty());
        let (mut rejected, mut ends) = (None, vec![]);
        match decision {
            Decision::Admit => {}
            Decision::Preempt(resource, victims) => {
                for victim in victims {
                    if let Some(handle) = self.workers.get(&victim) {
                        let eviction = Eviction::preemption(&handle.pod, &resource);
                        ends.extend(self.end(&victim, eviction));
                    }
                }
            }
            Decision::Refuse(reason, message) => {
                self.context.events.warning(&pod, None, reason.clone(), &message);
                rejected = Some((reason.into_owned(), format!("Pod was rejected: {message}")));
            }
        }
        let mailbox = mpsc::unbounded_channel();
        let inbox = mailbox.0.clone();
        let admitted = rejected.is_none();
        let worker = Worker::new(self.context.clone(), pod.clone(), sandboxes, rejected, mailbox);
        let key = uid.clone();
        let task = self.running.spawn(async move {
            join_all(ends).await;
            worker.run().await;
            key
        });
        self.workers.insert(uid, Handle { inbox, pod, admitted, _task: task });
    }

    /// Whether the node takes the pod. One that was here before is not asked again.
    fn decide(&self, pod: &Pod, runs: bool) -> Decision {
        let started = pod.status().is_some_and(|status| status.start_time.is_some());
        if runs || started || pod.is_deleted() || pod.is_terminal() {
            return Decision::Admit;
        }
        if let Some((reason, message)) = eviction::refuses(pod, &self.context.pressure.all()) {
            return Decision::Refuse(reason.into(), message);
        }
        let others = self.workers.values().filter(|handle| handle.admitted && !handle.pod.is_terminal());
        // Of those that wait for more, what they have.
        let others: Vec<Pod> = others.map(|handle| resize::resumed(handle.pod.clone())).collect();
        let node = self.nodes.get("", &self.context.node_name);
        let node = node.and_then(|node| minke_client::typed(&node));
        admission::decide(
            pod,
            others.iter(),
            node.as_deref(),
            &self.context.allocatable,
            &self.context.settings,
        )
    }

    async fn take_event(&mut self, event: Result<Event, broadcast::error::RecvError>) {
        match event {
            Ok(event) => {
                let uid = match &event {
                    Event::ContainerExited { status } => match status.labels.get(POD_UID_LABEL) {
                        Some(uid) => Some(uid.clone()),
                        None => self.context.owners.of(&status.sandbox_id),
                    },
                    Event::SandboxExited { sandbox_id } => self.context.owners.of(sandbox_id),
                    Event::ContainerStarted { .. } => None,
                };
                if let Some(handle) = uid.and_then(|uid| self.workers.get(&uid)) {
                    let _ = handle.inbox.send(Message::Runtime(event));
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "Runtime events were missed; looking at everything");
                let Ok(sandboxes) = self.context.runtime.list().await else { return };
                let mut by_uid: HashMap<String, Vec<SandboxStatus>> = HashMap::new();
                for sandbox in sandboxes {
                    by_uid.entry(sandbox.spec.uid.clone()).or_default().push(sandbox);
                }
                for (uid, sandboxes) in by_uid {
                    if let Some(handle) = self.workers.get(&uid) {
                        let _ = handle.inbox.send(Message::Resync(sandboxes));
                    }
                }
            }
            Err(broadcast::error::RecvError::Closed) => {
                // The runtime is gone, and so is this process soon.
                std::future::pending::<()>().await;
            }
        }
    }

    fn take_end(&mut self, ended: Result<String, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                self.workers.remove(&uid);
                self.put_waiting();
            }
            Err(error) => {
                tracing::error!(%error, "The task of a pod panicked");
                self.revive();
            }
        }
    }

    /// A worker that panicked left its pod alone: another one adopts it.
    fn revive(&mut self) {
        let dead: Vec<String> = self
            .workers
            .iter()
            .filter(|(_, handle)| handle.inbox.is_closed())
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in dead {
            if let Some(handle) = self.workers.remove(&uid) {
                let (context, pod) = (self.context.clone(), handle.pod.clone());
                let mailbox = mpsc::unbounded_channel();
                let inbox = mailbox.0.clone();
                let key = uid.clone();
                let task = self.running.spawn(async move {
                    // Not at once: what made it panic may still be there.
                    tokio::time::sleep(Duration::from_secs(10)).await;
                    let all = context.runtime.list().await.unwrap_or_default();
                    let own = all.into_iter().filter(|sandbox| sandbox.spec.uid == key).collect();
                    Worker::new(context, pod, own, None, mailbox).run().await;
                    key
                });
                self.workers.insert(uid, Handle { inbox, _task: task, ..handle });
            }
        }
    }

    /// Removes what is left of pods that the API server has no more.
    fn remove_orphans(&mut self) {
        let context = self.context.clone();
        let orphans = std::mem::take(&mut self.found);
        let mut known: HashSet<String> = self.workers.keys().cloned().collect();
        known.extend(orphans.keys().cloned());
        // Looked at now, before a pod that is new can have a directory.
        let strays = strays(&context.paths, &known);
        tokio::spawn(async move {
            for (uid, sandboxes) in orphans {
                remove_orphan(&context, &uid, sandboxes).await;
            }
            let removed = tokio::task::spawn_blocking(move || {
                for stray in strays {
                    if let Err(error) = crate::volumes::clean_up(&stray) {
                        tracing::warn!(path = %stray.display(), %error, "Files of an unknown pod not removed");
                    }
                }
            });
            let _ = removed.await;
        });
    }
}

/// Connects a sandbox, again if need be.
async fn connect(context: &Context, sandbox: &str, address: std::net::IpAddr) -> Result<(), String> {
    let netns = context.runtime.sandbox_netns(sandbox).map_err(|error| error.to_string())?;
    context.network.attach(sandbox, &netns, address).await
}

async fn remove_orphan(context: &Context, uid: &str, sandboxes: Vec<SandboxStatus>) {
    tracing::info!(uid, sandboxes = sandboxes.len(), "Removing a pod that no longer exists");
    let mut logs = context.paths.logs().join("none");
    for sandbox in &sandboxes {
        let spec = &sandbox.spec;
        logs.clone_from(&spec.log_dir);
        for container in &sandbox.containers {
            let grace = Duration::from_secs(1);
            if container.state == minke_runtime::ContainerState::Running
                && let Err(error) = context.runtime.stop_container(&container.id, grace).await
            {
                tracing::warn!(container = container.id, %error, "Container of an orphan not stopped");
            }
        }
        if let Err(error) = context.runtime.remove_sandbox(&spec.id).await {
            tracing::warn!(sandbox = spec.id, %error, "Sandbox of an orphan not removed");
        }
        context.ids.release(&spec.id);
        if let Err(why) = context.network.detach(&spec.id).await {
            tracing::warn!(sandbox = spec.id, why, "Network of an orphan not removed");
        }
        if let Some(address) = spec.annotations.get(ADDRESS_ANNOTATION).and_then(|text| text.parse().ok())
            && sandbox.state == minke_runtime::SandboxState::Ready
        {
            context.network.release(address);
        }
    }
    let (paths, uid) = (context.paths.clone(), uid.to_owned());
    let cleaned = tokio::task::spawn_blocking(move || jobs::clean_up(&paths, &uid, Some(&logs))).await;
    if let Ok(Err(why)) = cleaned {
        tracing::warn!(why, "Files of an orphan not removed");
    }
}

/// Directories of pods that nobody knows: their volumes, and their logs.
fn strays(paths: &crate::container::Paths, known: &HashSet<String>) -> Vec<std::path::PathBuf> {
    let entries =
        [paths.pods(), paths.logs()].map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    let unknown = entries.into_iter().flatten().filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // Logs are below the pod's namespace, name and uid.
        let uid = name.rsplit('_').next().unwrap_or(&name);
        !known.contains(uid)
    });
    unknown.map(|entry| entry.path()).collect()
}
