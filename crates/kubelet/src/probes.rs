//! Probes: one task and one timer run those of all pods, and tell whoever asked when a verdict changes.
//!
//! A probe that waits for its turn is an entry of a few hundred bytes, which keeps nothing of the pod alive;
//! only one that is under way has a task. Upstream: pkg/kubelet/prober.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::events::Recorder;
use crate::handlers::{Handler, Outcome, Place};
use crate::observed::{ProbeState, Probes};
use crate::pod::Pod;
use crate::probe_counts::{PodId, ProbeCounts};

/// A probe that could not be tried at all is tried again at once, this often.
const TRIES: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Startup, Kind::Liveness, Kind::Readiness];

    pub fn of(self, container: &core::Container) -> Option<&core::Probe> {
        match self {
            Kind::Startup => container.startup_probe.as_ref(),
            Kind::Liveness => container.liveness_probe.as_ref(),
            Kind::Readiness => container.readiness_probe.as_ref(),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        }
    }
}

/// What is known of a container's probes before the first one ran.
pub fn initial(container: &core::Container) -> Probes {
    let state = |probe: &Option<core::Probe>, state| probe.as_ref().map(|_| state);
    Probes {
        startup: state(&container.startup_probe, ProbeState::Unknown),
        liveness: state(&container.liveness_probe, ProbeState::Success),
        readiness: state(&container.readiness_probe, ProbeState::Unknown),
    }
}

/// A probe of a running container, with all that is needed for it.
pub struct Probe {
    kind: Kind,
    container_id: String,
    name: String,
    pod: PodId,
    about: core::ObjectReference,
    handler: Handler,
    started_at: Timestamp,
    delay: Duration,
    period: Duration,
    timeout: Duration,
    success: i32,
    failure: i32,
}

impl Probe {
    /// `None` when the container has no such probe.
    pub fn new(
        kind: Kind,
        pod: &Pod,
        name: &str,
        container_id: &str,
        started_at: Timestamp,
        address: Option<IpAddr>,
        user_agent: &str,
    ) -> Option<Probe> {
        let (_, container) = pod.container(name)?;
        let probe = kind.of(container)?;
        let seconds = |set: Option<i32>, default: u64, least: u64| {
            Duration::from_secs(set.map_or(default, |set| u64::try_from(set).unwrap_or(0)).max(least))
        };
        Some(Probe {
            kind,
            container_id: container_id.to_owned(),
            name: name.to_owned(),
            pod: (pod.uid().to_owned(), pod.namespace().to_owned(), pod.name().to_owned()),
            about: crate::events::about(pod, Some(name)),
            handler: Handler::of_probe(probe, &Place { container, address, user_agent }),
            started_at,
            delay: seconds(probe.initial_delay_seconds, 0, 0),
            period: seconds(probe.period_seconds, 10, 1),
            timeout: seconds(probe.timeout_seconds, 1, 1),
            success: probe.success_threshold.unwrap_or(1),
            failure: probe.failure_threshold.unwrap_or(3),
        })
    }

    /// How long until the first time. Probes of containers that have run for a while, which an agent finds when
    /// it starts, are spread over their period.
    fn first(&self, now: Timestamp) -> Duration {
        let delay = SignedDuration::try_from(self.delay).unwrap_or(SignedDuration::MAX);
        let wait = self.started_at.saturating_add(delay).unwrap_or(Timestamp::MAX).duration_since(now);
        match Duration::try_from(wait) {
            Ok(wait) => wait,
            Err(_) if wait.unsigned_abs() > self.period => self.period.mul_f64(rand::random()),
            Err(_) => Duration::ZERO,
        }
    }

    async fn once(&self, runtime: &dyn Runtime) -> Outcome {
        let mut outcome = self.handler.run(runtime, &self.container_id, self.timeout).await;
        for _ in 1..TRIES {
            if !matches!(outcome, Outcome::Error(_)) {
                break;
            }
            outcome = self.handler.run(runtime, &self.container_id, self.timeout).await;
        }
        outcome
    }
}

/// Counts results until they make a verdict.
#[derive(Debug, Default)]
struct Verdict {
    last: Option<bool>,
    run: i32,
    told: Option<ProbeState>,
}

impl Verdict {
    /// The verdict after one more result, when it is one.
    fn take(&mut self, ok: bool, success: i32, failure: i32) -> Option<ProbeState> {
        self.run = if self.last == Some(ok) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(ok);
        let (needed, state) = match ok {
            true => (success, ProbeState::Success),
            false => (failure, ProbeState::Failure),
        };
        (self.run >= needed).then_some(state)
    }
}

/// Is told of a verdict, whenever it is another one.
type Tell = Box<dyn Fn(ProbeState) + Send>;

enum Command {
    Start { id: u64, probe: Arc<Probe>, tell: Tell },
    Stop(u64),
}

/// Runs probes until the last handle is gone.
#[derive(Clone)]
pub struct Prober {
    commands: mpsc::UnboundedSender<Command>,
    next: Arc<AtomicU64>,
}

/// A probe that goes on until this is dropped, or until a liveness or startup probe has its last word.
pub struct Probing {
    id: u64,
    commands: mpsc::UnboundedSender<Command>,
}

impl Drop for Probing {
    fn drop(&mut self) {
        // Without a prober there are no probes.
        let _ = self.commands.send(Command::Stop(self.id));
    }
}

impl Prober {
    pub fn start(runtime: Arc<dyn Runtime>, events: Recorder, counts: Arc<ProbeCounts>) -> Prober {
        let (commands, orders) = mpsc::unbounded_channel();
        let all = All {
            runtime,
            events,
            counts,
            entries: HashMap::new(),
            due: BTreeSet::new(),
            running: JoinSet::new(),
            ids: HashMap::new(),
        };
        tokio::spawn(all.run(orders));
        Prober { commands, next: Arc::default() }
    }

    pub fn probe(&self, probe: Probe, tell: impl Fn(ProbeState) + Send + 'static) -> Probing {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        // When the prober is gone, so is the agent.
        let _ = self.commands.send(Command::Start { id, probe: Arc::new(probe), tell: Box::new(tell) });
        Probing { id, commands: self.commands.clone() }
    }
}

struct Entry {
    probe: Arc<Probe>,
    tell: Tell,
    verdict: Verdict,
    /// When it is, or was last, to run.
    turn: Instant,
    running: Option<AbortHandle>,
}

/// All probes of the node.
struct All {
    runtime: Arc<dyn Runtime>,
    events: Recorder,
    counts: Arc<ProbeCounts>,
    entries: HashMap<u64, Entry>,
    /// Those that wait, by when it is their turn.
    due: BTreeSet<(Instant, u64)>,
    running: JoinSet<(Outcome, Duration)>,
    ids: HashMap<tokio::task::Id, u64>,
}

impl All {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Command>) {
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        loop {
            let turn = self.due.first().map(|(turn, _)| *turn);
            if let Some(turn) = turn
                && timer.deadline() != turn
            {
                timer.as_mut().reset(turn);
            }
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(Command::Start { id, probe, tell }) => self.add(id, probe, tell),
                    Some(Command::Stop(id)) => self.remove(id),
                    None => return,
                },
                Some(ended) = self.running.join_next_with_id() => self.take(ended),
                () = timer.as_mut(), if turn.is_some() => self.run_due(Instant::now()),
            }
        }
    }

    fn add(&mut self, id: u64, probe: Arc<Probe>, tell: Tell) {
        let turn = Instant::now() + probe.first(Timestamp::now());
        self.entries.insert(id, Entry { probe, tell, verdict: Verdict::default(), turn, running: None });
        self.due.insert((turn, id));
    }

    fn remove(&mut self, id: u64) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.due.remove(&(entry.turn, id));
        if let Some(task) = entry.running {
            self.ids.remove(&task.id());
            task.abort();
        }
    }

    /// Starts every probe whose turn has come.
    fn run_due(&mut self, now: Instant) {
        while let Some((turn, id)) = self.due.first().copied().filter(|(turn, _)| *turn <= now) {
            self.due.remove(&(turn, id));
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let (runtime, probe) = (self.runtime.clone(), entry.probe.clone());
            let task = self.running.spawn(async move {
                let began = Instant::now();
                let outcome = probe.once(&*runtime).await;
                (outcome, began.elapsed())
            });
            self.ids.insert(task.id(), id);
            entry.running = Some(task);
        }
    }

    fn take(&mut self, ended: Result<(tokio::task::Id, (Outcome, Duration)), tokio::task::JoinError>) {
        let (task, (outcome, took)) = match ended {
            Ok(ended) => ended,
            Err(error) if error.is_cancelled() => return,
            Err(error) => {
                tracing::error!(%error, "A probe panicked");
                (error.id(), (Outcome::Error("internal error".to_owned()), Duration::ZERO))
            }
        };
        let Some(id) = self.ids.remove(&task) else { return };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.running = None;
        let ok = tell_of(&entry.probe, &outcome, &self.events);
        self.counts.note(&entry.probe.pod, &entry.probe.name, entry.probe.kind.word(), ok, took);
        let (success, failure) = (entry.probe.success, entry.probe.failure);
        let state = ok.and_then(|ok| entry.verdict.take(ok, success, failure));
        if let Some(state) = state
            && entry.verdict.told != Some(state)
        {
            entry.verdict.told = Some(state);
            (entry.tell)(state);
        }
        let over = match entry.probe.kind {
            Kind::Startup => state.is_some(),
            Kind::Liveness => state == Some(ProbeState::Failure),
            Kind::Readiness => false,
        };
        if over {
            self.entries.remove(&id);
            return;
        }
        // One that took longer than its period goes on at once.
        entry.turn = (entry.turn + entry.probe.period).max(Instant::now());
        self.due.insert((entry.turn, id));
    }
}

/// Tells of what is not as it should be; whether the probe succeeded, when that is known.
fn tell_of(probe: &Probe, outcome: &Outcome, events: &Recorder) -> Option<bool> {
    let word = probe.kind.word();
    let warn = |reason, text| events.warning_of(&probe.about, reason, text);
    match outcome {
        Outcome::Success => Some(true),
        Outcome::Warning(text) => {
            warn("ProbeWarning", format!("{word} probe warning: {text}"));
            Some(true)
        }
        Outcome::Failure(text) => {
            warn("Unhealthy", format!("{word} probe failed: {text}"));
            Some(false)
        }
        Outcome::Error(text) => {
            warn("Unhealthy", format!("{word} probe errored and resulted in unknown state: {text}"));
            None
        }
    }
}

#[cfg(test)]
mod tests;
