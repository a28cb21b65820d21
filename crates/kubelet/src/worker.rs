//! The task of one pod: a mailbox, a picture, and a loop of plan, act, tell.
//!
//! Everything that takes a while is a [`Job`] of its own task, whose result comes back into the picture;
//! the loop itself never waits for anything but news. Stopping the agent drops the task and with it
//! whatever jobs run, and leaves the containers as they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_api::{Kind, Object};
use minke_client::DeleteOptions;
use minke_runtime::{ContainerState, ContainerStatus, Event, Resources, SandboxState, SandboxStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::eviction::Eviction;
use crate::jobs::{self, Done};
use crate::manifests;
use crate::observed::{ADDRESS_ANNOTATION, Cleanup, Job, Observed, ProbeState, Retry, Waiting};
use crate::plan::{Action, Kill, plan};
use crate::pod::{Class, Pod};
use crate::probes::{self, Probing};
use crate::references::Held;
use crate::resize;
use crate::status;
use crate::told::Told;
use crate::volumes::{self, Credentials};

/// News for a worker.
pub enum Message {
    Pod(Pod),
    /// The API server has no such pod any more.
    Gone,
    Runtime(Event),
    /// A job tells of a container while it goes on.
    Container(Box<ContainerStatus>),
    Probe {
        container_id: String,
        kind: probes::Kind,
        state: ProbeState,
    },
    /// What the API server shows of a static pod.
    Mirror(Option<Arc<Object>>),
    /// The pod is to go, for the node's sake or because it has outgrown its limits. The sender is dropped once nothing
    /// of it runs any more.
    Evict(Eviction, mpsc::Sender<()>),
    /// An object that the pod refers to changed.
    Changed,
    /// Events were missed: this is what the runtime has of the pod.
    Resync(Vec<SandboxStatus>),
}

pub struct Worker {
    context: Arc<Context>,
    /// With the resources that were granted.
    pod: Pod,
    /// As the API server has it.
    asked: Pod,
    /// Of a static pod: what the API server shows of it.
    mirror: Option<Arc<Object>>,
    /// A resize was granted and is not told of as done.
    resizing: bool,
    freed: watch::Receiver<()>,
    o: Observed,
    held: Held,
    credentials: Credentials,
    /// When the contents of volumes must be looked at again.
    volumes_due: Option<Timestamp>,
    image_failures: HashMap<String, u32>,
    jobs: JoinSet<Done>,
    job_ids: HashMap<tokio::task::Id, Job>,
    /// By container id; those that are dropped end.
    probing: HashMap<(String, probes::Kind), Probing>,
    /// Ends jobs that only make sense while the pod is to run.
    cancel: CancellationToken,
    /// Of those who wait for the pod's end: told when nothing of it runs any more, dropped when it has been cleared away.
    ended: Vec<mpsc::Sender<()>>,
    inbox: mpsc::UnboundedReceiver<Message>,
    me: mpsc::UnboundedSender<Message>,
    told: Told,
    wake: Option<Timestamp>,
}

impl Worker {
    /// `sandboxes` is what the runtime has of the pod already. `rejected` refuses to run it.
    pub fn new(
        context: Arc<Context>,
        pod: Pod,
        sandboxes: Vec<SandboxStatus>,
        rejected: Option<(String, String)>,
        (me, inbox): (mpsc::UnboundedSender<Message>, mpsc::UnboundedReceiver<Message>),
    ) -> Worker {
        let told = Told::new(&pod);
        let (asked, pod) = (pod.clone(), resize::resumed(pod));
        if rejected.is_none() {
            context.grants.grant(&pod);
        }
        let freed = context.grants.subscribe();
        let longest_wait = context.settings.restart_wait_max;
        let mut worker = Worker {
            context,
            pod,
            asked,
            mirror: None,
            resizing: false,
            freed,
            o: Observed { rejected, longest_wait, ..Observed::default() },
            held: Held::default(),
            credentials: Credentials::default(),
            volumes_due: None,
            image_failures: HashMap::new(),
            jobs: JoinSet::new(),
            job_ids: HashMap::new(),
            probing: HashMap::new(),
            cancel: CancellationToken::new(),
            ended: vec![],
            inbox,
            me,
            told,
            wake: None,
        };
        worker.adopt(sandboxes);
        worker
    }

    /// Takes over what runs. Containers that were ready or started are so still, as the API server
    /// shows them, until a probe says otherwise.
    fn adopt(&mut self, mut sandboxes: Vec<SandboxStatus>) {
        sandboxes.sort_by_key(|sandbox| (sandbox.spec.attempt, sandbox.created_at));
        for sandbox in &mut sandboxes {
            self.context.owners.put(&sandbox.spec.id, self.pod.uid());
            // The address of a sandbox that is down may be another's by now.
            if sandbox.state == SandboxState::NotReady {
                sandbox.spec.annotations.remove(ADDRESS_ANNOTATION);
            }
        }
        self.o.sandboxes = sandboxes;
        self.o.runs = status::runs(self.told.last());
        let containers: Vec<ContainerStatus> = self.o.all_containers().cloned().collect();
        for container in containers {
            self.observe(&container);
            let id = format!("{}{}", status::ID_PREFIX, container.id);
            let lists = [&self.told.last().container_statuses, &self.told.last().init_container_statuses];
            let known =
                lists.into_iter().flatten().flatten().find(|known| known.container_id.as_ref() == Some(&id));
            let (Some(known), Some(probes)) = (known, self.o.probes.get_mut(&container.id)) else { continue };
            if known.started == Some(true) {
                probes.startup = probes.startup.map(|_| ProbeState::Success);
            }
            if known.ready {
                probes.readiness = probes.readiness.map(|_| ProbeState::Success);
            }
        }
    }

    /// Runs until nothing of the pod is left, or until it is dropped.
    pub async fn run(mut self) {
        let (context, me) = (self.context.clone(), self.me.clone());
        self.hold(&context, &me);
        loop {
            if self.step() {
                return;
            }
            let sleep = self.sleep();
            tokio::select! {
                Some(message) = self.inbox.recv() => {
                    self.take(message);
                    self.take_waiting();
                }
                Some(done) = self.jobs.join_next_with_id() => {
                    // What a job told on its way comes before its end.
                    self.take_waiting();
                    self.take_done(done);
                }
                written = self.told.written() => {
                    if let Some(pod) = self.told.take(written, &self.pod).filter(|pod| pod.uid() == self.pod.uid()) {
                        self.take_pod(pod);
                    }
                }
                Ok(()) = self.freed.changed(), if self.o.resize_pending.is_some() => {
                    self.take_pod(self.asked.clone());
                }
                () = sleep => {}
            }
        }
    }

    fn sleep(&self) -> impl Future<Output = ()> + use<> {
        let times = [self.wake, self.volumes_due, self.told.due()];
        let wait = times.into_iter().flatten().min().map(|at| at.duration_since(Timestamp::now()));
        let wait = wait.map(|wait| Duration::try_from(wait).unwrap_or_default() + Duration::from_millis(1));
        async move {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        }
    }

    fn hold(&mut self, context: &Context, me: &mpsc::UnboundedSender<Message>) {
        let me = me.downgrade();
        let changed = move || me.upgrade().is_some_and(|me| me.send(Message::Changed).is_ok());
        context.references.hold(&self.pod, &mut self.held, changed);
    }

    fn take_waiting(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Pod(pod) => self.take_pod(pod),
            Message::Gone => self.o.gone = true,
            Message::Container(status) => self.take_container(*status),
            Message::Runtime(Event::ContainerExited { status }) => self.take_container(*status),
            Message::Runtime(Event::ContainerStarted { .. }) => {}
            Message::Runtime(Event::SandboxExited { sandbox_id }) => {
                if let Some(sandbox) = self.o.sandboxes.iter_mut().find(|s| s.spec.id == sandbox_id) {
                    sandbox.state = SandboxState::NotReady;
                }
            }
            Message::Probe { container_id, kind, state } => {
                if let Some(probes) = self.o.probes.get_mut(&container_id) {
                    match kind {
                        probes::Kind::Startup => probes.startup = Some(state),
                        probes::Kind::Liveness => probes.liveness = Some(state),
                        probes::Kind::Readiness => probes.readiness = Some(state),
                    }
                }
            }
            Message::Mirror(mirror) => self.take_mirror(mirror),
            Message::Evict(eviction, ended) => {
                if self.o.cleanup == Cleanup::None {
                    self.ended.push(ended);
                }
                if self.o.evicted.is_none() && self.o.ending.is_none() {
                    let message = eviction.message.as_str();
                    self.context.events.warning(&self.pod, None, eviction.reason, message);
                    self.o.evicted = Some(eviction);
                }
            }
            Message::Changed => self.take_change(),
            Message::Resync(sandboxes) => {
                for sandbox in sandboxes {
                    if let Some(known) = self.o.sandboxes.iter_mut().find(|s| s.spec.id == sandbox.spec.id) {
                        known.state = sandbox.state;
                    }
                    for container in sandbox.containers {
                        self.take_container(container);
                    }
                }
            }
        }
    }

    fn take_pod(&mut self, pod: Pod) {
        if pod.object().revision() < self.pod.object().revision() {
            return;
        }
        let metadata = |pod: &Pod| {
            let metadata = &pod.typed().metadata;
            (metadata.labels.clone(), metadata.annotations.clone())
        };
        self.asked = pod.clone();
        let pod = self.grant(pod);
        let relabelled = metadata(&pod) != metadata(&self.pod);
        let respecified = pod.spec() != self.pod.spec();
        self.pod = pod;
        if respecified {
            let (context, me) = (self.context.clone(), self.me.clone());
            self.hold(&context, &me);
        }
        if (relabelled || respecified) && volumes::are_live(&self.pod) {
            self.volumes_due = Some(Timestamp::now());
        }
        self.told.keep_theirs(&self.pod);
    }

    fn take_mirror(&mut self, mirror: Option<Arc<Object>>) {
        let uid = |mirror: &Option<Arc<Object>>| mirror.as_ref().map(|mirror| mirror.uid().to_owned());
        if uid(&mirror) != uid(&self.mirror) {
            self.told.start_over(mirror.as_deref());
        }
        self.mirror = mirror;
    }

    /// Of a static pod: has the API server show it, as it is in its file, whatever is done to the mirror there.
    fn keep_mirror(&mut self, now: Timestamp) {
        let waits = self.o.retries.get(&Job::Mirror).filter(|retry| retry.at > now);
        if let Some(retry) = waits {
            self.wake = Some(self.wake.map_or(retry.at, |wake| wake.min(retry.at)));
        }
        if !self.pod.is_static()
            || self.pod.is_deleted()
            || waits.is_some()
            || self.o.is_running(&Job::Mirror)
        {
            return;
        }
        match self.mirror.clone() {
            None => self.spawn(Job::Mirror, jobs::create_mirror(self.context.clone(), self.pod.clone())),
            Some(mirror) => {
                let hash = manifests::mirrored(&mirror);
                let ours = self.pod.typed().metadata.annotations.as_ref();
                let ours = ours.and_then(|all| all.get(manifests::HASH_ANNOTATION));
                if mirror.deleted().is_some() || hash.as_ref() != ours {
                    self.spawn(Job::Mirror, jobs::delete_mirror(self.context.clone(), mirror));
                }
            }
        }
    }

    /// The pod with the resources it gets: those it asks for if there is room, else those it has.
    fn grant(&mut self, pod: Pod) -> Pod {
        if resize::same(&pod, &self.pod) {
            self.context.grants.withdraw(pod.uid());
            self.o.resize_pending = None;
            return pod;
        }
        let (events, told) = (&self.context.events, resize::told(&pod));
        match self.context.grants.try_grant(&pod, &self.context.allocatable) {
            Ok(()) => {
                events.normal(&pod, None, "ResizeStarted", format!("Pod resize started: {told}"));
                self.resizing = true;
                (self.o.resize_pending, self.o.resize_error) = (None, None);
                pod
            }
            Err(pending) => {
                if self.o.resize_pending.as_ref() != Some(&pending) {
                    let (reason, word) = match pending.reason {
                        "Infeasible" => ("ResizeInfeasible", "Infeasible"),
                        _ => ("ResizeDeferred", "Deferred"),
                    };
                    let message = format!("Pod resize {word}: {told}: {}", pending.message);
                    events.warning(&pod, None, reason, message);
                }
                self.o.resize_pending = Some(pending);
                let whole = self.pod.spec().resources.clone();
                pod.with_resources(whole, |name| self.pod.container(name)?.1.resources.clone())
            }
        }
    }

    /// Tells when every container has the limits that were granted.
    fn finish_resize(&mut self) {
        if self.resizing && !status::is_resizing(&self.pod, &self.o) {
            self.resizing = false;
            let told = resize::told(&self.pod);
            self.context.events.normal(
                &self.pod,
                None,
                "ResizeCompleted",
                format!("Pod resize completed: {told}"),
            );
        }
    }

    fn take_resized(&mut self, containers: Vec<(String, Resources)>, pod: Option<Resources>) {
        self.o.resize_error = None;
        let sandboxes = &mut self.o.sandboxes;
        if let (Some(sandbox), Some(limits)) = (sandboxes.last_mut(), pod) {
            sandbox.spec.resources = limits;
        }
        for (id, limits) in containers {
            let mut all = sandboxes.iter_mut().flat_map(|sandbox| &mut sandbox.containers);
            if let Some(container) = all.find(|c| c.id == id) {
                container.resources = limits;
            }
        }
    }

    fn take_container(&mut self, status: ContainerStatus) {
        let id = status.id.clone();
        self.o.put_container(status);
        if let Some(status) = self.o.by_id(&id).cloned() {
            self.observe(&status);
        }
    }

    /// Keeps what belongs to a container in step with its state.
    fn observe(&mut self, status: &ContainerStatus) {
        let Some((_, container)) = self.pod.container(&status.name) else { return };
        match status.state {
            ContainerState::Running => {
                self.o.probes.entry(status.id.clone()).or_insert_with(|| probes::initial(container));
            }
            ContainerState::Exited => {
                self.o.probes.remove(&status.id);
                self.o.kills.remove(&status.id);
                if !self.o.messages.contains_key(&status.id) {
                    let words = jobs::last_words(&self.context.paths, &self.pod, container, status);
                    self.o.messages.insert(status.id.clone(), words);
                }
            }
            ContainerState::Created => {}
        }
    }

    fn take_change(&mut self) {
        if volumes::are_live(&self.pod) {
            self.volumes_due = Some(Timestamp::now());
        }
        self.o.retries.retain(|_, retry| !retry.on_change);
        self.o.waiting.retain(|_, waiting| !waiting.on_change);
    }

    /// Plans and starts what is planned; true when the pod is done with.
    fn step(&mut self) -> bool {
        loop {
            let now = Timestamp::now();
            let plan = plan(&self.pod, &self.o, now);
            self.wake = plan.wake;
            let mut again = false;
            let mut delete = false;
            for action in plan.actions {
                match action {
                    Action::Exit => return true,
                    Action::Delete => delete = true,
                    action => again |= self.act(action, now),
                }
            }
            if again {
                continue;
            }
            self.refresh_volumes(now);
            self.keep_probes();
            self.finish_resize();
            self.keep_mirror(now);
            let settled = self.tell(now);
            if delete && settled {
                match self.mirror.clone() {
                    Some(mirror) => {
                        self.spawn(Job::Delete, jobs::delete_mirror(self.context.clone(), mirror))
                    }
                    None => self.spawn(Job::Delete, jobs::delete(self.context.clone(), self.pod.clone())),
                }
            }
            return false;
        }
    }

    fn spawn(&mut self, job: Job, work: impl Future<Output = Done> + Send + 'static) {
        self.o.running_jobs.insert(job.clone());
        // The count of failures goes on until the job succeeds.
        if let Some(retry) = self.o.retries.get_mut(&job) {
            retry.at = Timestamp::MIN;
        }
        let id = self.jobs.spawn(work).id();
        self.job_ids.insert(id, job);
    }

    /// Starts an action; true when it changed the picture at once.
    fn act(&mut self, action: Action, now: Timestamp) -> bool {
        let (context, pod) = (self.context.clone(), self.pod.clone());
        match action {
            Action::End(ending) => {
                tracing::info!(pod = %pod.long_name(), cause = ?ending.cause, grace = ending.grace, "Ending pod");
                self.o.ending = Some(ending);
                self.cancel.cancel();
                return true;
            }
            Action::MountVolumes => {
                let facts = context.facts(self.address());
                let job = jobs::mount(
                    context,
                    pod,
                    self.held.share(),
                    self.credentials.clone(),
                    facts,
                    self.cancel.clone(),
                );
                self.spawn(Job::Volumes, job);
            }
            Action::CreateSandbox { attempt } => {
                let old = self.o.current_sandbox().map(|sandbox| sandbox.spec.clone());
                if let Some(sandbox) = self.o.sandboxes.last_mut() {
                    // The job gives the old address back.
                    sandbox.spec.annotations.remove(ADDRESS_ANNOTATION);
                }
                self.spawn(Job::Sandbox, jobs::create_sandbox(context, pod, attempt, old));
            }
            Action::Start { name, attempt, backoff, round } => {
                let Some(sandbox) = self.o.ready_sandbox() else { return false };
                let start = jobs::Start {
                    sandbox_id: sandbox.spec.id.clone(),
                    name: name.clone(),
                    attempt,
                    backoff,
                    round,
                    address: self.address(),
                    target: self.target_of(&name),
                    cancel: self.cancel.clone(),
                    worker: self.me.clone(),
                };
                let job = jobs::start(context, pod, self.held.share(), start);
                self.spawn(Job::Start(name), job);
            }
            Action::Kill { id, name, why, deadline, restart } => {
                let count = self.o.kills.get(&id).map_or(0, |(_, count)| count + 1);
                if restart {
                    let at_once = matches!(why, Kill::Changed | Kill::Resize);
                    self.o.restarting.insert(id.clone(), at_once);
                }
                self.o.kills.insert(id.clone(), (deadline, count));
                let kill = jobs::Kill {
                    id: id.clone(),
                    name,
                    why,
                    deadline,
                    first: count == 0,
                    restart,
                    address: self.address(),
                    drain: self.o.address().filter(|_| why == Kill::Ending),
                };
                self.spawn(Job::Kill(id, count), jobs::kill(context, pod, kill));
            }
            Action::Resize { containers, pod: whole } => {
                let sandbox = self.o.ready_sandbox().map(|sandbox| sandbox.spec.id.clone());
                self.spawn(Job::Resize, jobs::resize(context, sandbox, whole, containers));
            }
            Action::RemoveContainer(id) => {
                let name = self.o.by_id(&id).map(|c| c.name.clone()).unwrap_or_default();
                let job = jobs::remove_container(context, pod, name, id.clone());
                self.spawn(Job::RemoveContainer(id), job);
            }
            Action::RemoveSandbox(id) => {
                let job = jobs::remove_sandbox(context, id.clone());
                self.spawn(Job::RemoveSandbox(id), job);
            }
            Action::AnnounceBackoff { name, key } => {
                self.announce(&name);
                self.o.announced.insert(key);
                return true;
            }
            Action::Teardown { remove } => {
                let sandboxes = self.o.sandboxes.iter().map(|sandbox| sandbox.spec.clone()).collect();
                for sandbox in &mut self.o.sandboxes {
                    sandbox.spec.annotations.remove(ADDRESS_ANNOTATION);
                }
                self.held = Held::default();
                for ended in &self.ended {
                    let _ = ended.try_send(());
                }
                self.spawn(Job::Teardown, jobs::teardown(context, pod, sandboxes, remove));
            }
            Action::Delete | Action::Exit => {}
        }
        let _ = now;
        false
    }

    /// The pod's address, or the node's when it has the node's network.
    fn address(&self) -> Option<IpAddr> {
        if self.pod.host_network() { Some(self.context.node_ip) } else { self.o.address() }
    }

    /// The running container that an ephemeral one is to look at.
    fn target_of(&self, name: &str) -> Option<String> {
        let target = self.o.latest(self.pod.target_of(name)?)?;
        (target.state == ContainerState::Running).then(|| target.id.clone())
    }

    fn announce(&self, name: &str) {
        let (events, pod) = (&self.context.events, &self.pod);
        match self.o.waiting.get(name) {
            Some(Waiting { later: Some((reason, _)), .. }) => {
                let image = pod.container(name).and_then(|(_, c)| c.image.clone()).unwrap_or_default();
                events.normal(pod, Some(name), "BackOff", format!("Back-off pulling image \"{image}\""));
                events.warning(pod, Some(name), "Failed", format!("Error: {reason}"));
            }
            _ => {
                let message =
                    format!("Back-off restarting failed container {name} in pod {}", pod.long_name());
                events.warning(pod, Some(name), "BackOff", message);
            }
        }
    }

    /// Brings live volumes up to date when an object changed or a token grows old.
    fn refresh_volumes(&mut self, now: Timestamp) {
        let due = self.volumes_due.is_some_and(|due| due <= now);
        let busy = self.o.is_running(&Job::Volumes);
        if !due || busy || !self.o.volumes || self.o.ending.is_some() {
            if due && !busy {
                self.volumes_due = None;
            }
            return;
        }
        self.volumes_due = None;
        self.act(Action::MountVolumes, now);
    }

    /// Keeps the probes of each container that is up going, and no others.
    fn keep_probes(&mut self) {
        let mut wanted = vec![];
        let ending = self.o.ending.is_some();
        for container in self.o.all_containers().filter(|c| c.state == ContainerState::Running) {
            let Some((class, spec)) = self.pod.container(&container.name) else { continue };
            if matches!(class, Class::Init | Class::Ephemeral) || self.o.is_starting(&container.name) {
                continue;
            }
            let started = self.o.probes.get(&container.id).copied().unwrap_or_default().started();
            for kind in probes::Kind::ALL.into_iter().filter(|kind| kind.of(spec).is_some()) {
                let due = match kind {
                    probes::Kind::Startup => !started && !ending,
                    probes::Kind::Liveness => started && !ending,
                    probes::Kind::Readiness => started,
                };
                if due {
                    wanted.push((container.id.clone(), kind));
                }
            }
        }
        self.probing.retain(|key, _| wanted.contains(key));
        for key in wanted {
            if !self.probing.contains_key(&key)
                && let Some(probe) = self.probe(&key)
            {
                let (me, (container_id, kind)) = (self.me.clone(), key.clone());
                let probing = self.context.prober.probe(probe, move |state| {
                    let _ = me.send(Message::Probe { container_id: container_id.clone(), kind, state });
                });
                self.probing.insert(key, probing);
            }
        }
    }

    fn probe(&self, (id, kind): &(String, probes::Kind)) -> Option<probes::Probe> {
        let container = self.o.by_id(id)?;
        let started_at = container.started_at.unwrap_or_else(Timestamp::now);
        let agent = format!("kube-probe/{}", self.context.short_version());
        probes::Probe::new(*kind, &self.pod, &container.name, id, started_at, self.address(), &agent)
    }

    /// Works the status out and writes it when it differs; true when the API server has it.
    fn tell(&mut self, now: Timestamp) -> bool {
        if self.o.gone {
            return true;
        }
        let status = status::status(&self.pod, &self.o, self.context.node_ip, self.told.last(), now);
        let shown = match (&self.mirror, self.pod.is_static()) {
            (Some(mirror), true) => Some(mirror.clone()),
            // Nobody to tell, until there is a mirror.
            (None, true) => None,
            (_, false) => Some(self.pod.object().clone()),
        };
        self.told.tell(&self.context.client, shown, status, now)
    }

    fn take_done(&mut self, done: Result<(tokio::task::Id, Done), tokio::task::JoinError>) {
        let (id, done) = match done {
            Ok((id, done)) => (id, done),
            Err(error) => {
                tracing::error!(pod = %self.pod.long_name(), %error, "Work on a pod panicked");
                (error.id(), Done::Failed { why: "internal error".to_owned(), on_change: false })
            }
        };
        let Some(job) = self.job_ids.remove(&id) else { return };
        self.o.running_jobs.remove(&job);
        if let Done::Failed { why, on_change } = done {
            return self.retry_later(job, &why, on_change);
        }
        self.o.retries.remove(&job);
        match (job, done) {
            (_, Done::Mounted { renew_at }) => {
                self.o.volumes = true;
                self.volumes_due = [self.volumes_due, renew_at].into_iter().flatten().min();
            }
            (_, Done::Sandbox(sandbox)) => self.o.sandboxes.push(*sandbox),
            (Job::Start(name), Done::Started) => {
                let image = self.pod.container(&name).and_then(|(_, c)| c.image.clone()).unwrap_or_default();
                self.image_failures.remove(&image);
                self.o.waiting.remove(&name);
                self.o.announced.remove(&name);
            }
            (Job::Start(name), Done::NotStarted(failure)) => self.wait(&name, failure),
            (Job::Mirror, Done::Mirror(mirror)) => self.take_mirror(mirror),
            (_, Done::Resized { containers, pod }) => self.take_resized(containers, pod),
            (Job::RemoveContainer(id), _) => self.o.forget_container(&id),
            (Job::RemoveSandbox(id), _) => self.o.sandboxes.retain(|sandbox| sandbox.spec.id != id),
            (_, Done::TornDown { removed }) => {
                self.o.cleanup = if removed { Cleanup::Removed } else { Cleanup::Stopped };
                self.o.volumes = false;
                self.ended.clear();
                self.context.grants.release(self.pod.uid());
                for sandbox in &mut self.o.sandboxes {
                    sandbox.state = SandboxState::NotReady;
                }
            }
            // Nothing more to do for this pod but to see the watch tell that it is gone.
            (Job::Delete, _) => self.o.gone = true,
            _ => {}
        }
    }

    fn retry_later(&mut self, job: Job, why: &str, on_change: bool) {
        let failures = self.o.retries.get(&job).map_or(0, |retry| retry.failures);
        // As upstream: mounts from half a second on, the rest every ten seconds at most.
        let (first, most) = match job {
            Job::Volumes => (Duration::from_millis(500), Duration::from_secs(122)),
            _ => (Duration::from_secs(1), Duration::from_secs(10)),
        };
        let delay = minke_client::backoff(first, most, failures);
        tracing::debug!(pod = %self.pod.long_name(), ?job, why, "Trying again later");
        let at = Timestamp::now() + SignedDuration::try_from(delay).unwrap_or(SignedDuration::from_secs(10));
        if job == Job::Resize && self.o.resize_error.as_deref() != Some(why) {
            self.o.resize_error = Some(why.to_owned());
            self.context.events.warning(&self.pod, None, "ResizeError", format!("Pod resize error: {why}"));
        }
        if job == Job::Volumes && self.o.volumes {
            self.volumes_due = Some(at);
        }
        self.o.retries.insert(job, Retry { at, failures: failures + 1, on_change });
    }

    fn wait(&mut self, name: &str, failure: jobs::StartFailure) {
        let now = Timestamp::now();
        let image = self.pod.container(name).and_then(|(_, c)| c.image.clone()).unwrap_or_default();
        let mut delay = Duration::from_secs(10);
        let mut later = None;
        if failure.reason.is_empty() {
            return;
        }
        if failure.pulled {
            let failures = self.image_failures.entry(image.clone()).or_default();
            delay = minke_client::backoff(Duration::from_secs(10), Duration::from_secs(300), *failures);
            *failures += 1;
            let message =
                format!("Back-off pulling image \"{image}\": {}: {}", failure.reason, failure.message);
            later = Some(("ImagePullBackOff".to_owned(), message));
        }
        let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::from_secs(300));
        self.o.announced.remove(name);
        self.o.waiting.insert(
            name.to_owned(),
            Waiting {
                reason: failure.reason.to_owned(),
                message: failure.message,
                since: now,
                retry_at: now + delay,
                later,
                on_change: failure.on_change,
            },
        );
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.context.grants.release(self.pod.uid());
    }
}

/// Deletes the object for good. It must still be this pod.
pub fn final_delete(pod: &Pod) -> DeleteOptions {
    DeleteOptions { grace_period: Some(0), uid: Some(pod.uid().to_owned()), ..DeleteOptions::default() }
}

/// The kind that workers are for.
pub fn pods() -> &'static Kind {
    Kind::of::<core::Pod>()
}
