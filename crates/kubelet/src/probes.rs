//! Probes: one task per probe of a running container, which tells the pod's worker when its verdict
//! changes. Upstream: pkg/kubelet/prober.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use tokio::sync::mpsc;

use crate::handlers::{Outcome, Target};
use crate::observed::{ProbeState, Probes};
use crate::pod::Pod;
use crate::worker::{Context, Message};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
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

/// Counts results until they make a verdict.
#[derive(Debug, Default)]
struct Verdict {
    last: Option<bool>,
    run: i32,
}

impl Verdict {
    /// The verdict after one more result, when it is one.
    fn take(&mut self, ok: bool, probe: &core::Probe) -> Option<ProbeState> {
        self.run = if self.last == Some(ok) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(ok);
        let (needed, state) = match ok {
            true => (probe.success_threshold.unwrap_or(1), ProbeState::Success),
            false => (probe.failure_threshold.unwrap_or(3), ProbeState::Failure),
        };
        (self.run >= needed).then_some(state)
    }
}

#[expect(clippy::too_many_arguments, reason = "a task takes along all it will ever need")]
/// Probes until the task is aborted, or until a liveness or startup probe has failed for good.
pub async fn run(
    context: Arc<Context>,
    pod: Pod,
    container_id: String,
    name: String,
    kind: Kind,
    started_at: Timestamp,
    address: Option<IpAddr>,
    worker: mpsc::UnboundedSender<Message>,
) {
    let Some((_, container)) = pod.container(&name) else { return };
    let Some(probe) = kind.of(container) else { return };
    let delay = SignedDuration::from_secs(probe.initial_delay_seconds.unwrap_or(0).max(0).into());
    let wait = (started_at + delay).duration_since(Timestamp::now());
    tokio::time::sleep(Duration::try_from(wait).unwrap_or_default()).await;
    let period = Duration::from_secs(u64::try_from(probe.period_seconds.unwrap_or(10)).unwrap_or(10).max(1));
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut verdict, mut told) = (Verdict::default(), None);
    let id = (pod.uid().to_owned(), pod.namespace().to_owned(), pod.name().to_owned());
    loop {
        ticks.tick().await;
        let began = tokio::time::Instant::now();
        let outcome = once(&context, container, &container_id, address, probe).await;
        let ok = match &outcome {
            Outcome::Success | Outcome::Warning(_) => Some(true),
            Outcome::Failure(_) => Some(false),
            Outcome::Error(_) => None,
        };
        context.probe_counts.note(&id, &name, kind.word(), ok, began.elapsed());
        let ok = match outcome {
            Outcome::Success => true,
            Outcome::Warning(text) => {
                let text = format!("{} probe warning: {text}", kind.word());
                context.events.warning(&pod, Some(&name), "ProbeWarning", text);
                true
            }
            Outcome::Failure(text) => {
                let text = format!("{} probe failed: {text}", kind.word());
                context.events.warning(&pod, Some(&name), "Unhealthy", text);
                false
            }
            Outcome::Error(text) => {
                let text = format!("{} probe errored and resulted in unknown state: {text}", kind.word());
                context.events.warning(&pod, Some(&name), "Unhealthy", text);
                continue;
            }
        };
        let Some(state) = verdict.take(ok, probe) else { continue };
        if told != Some(state) {
            told = Some(state);
            let message = Message::Probe { container_id: container_id.clone(), kind, state };
            if worker.send(message).is_err() {
                return;
            }
        }
        let over = match kind {
            Kind::Startup => true,
            Kind::Liveness => state == ProbeState::Failure,
            Kind::Readiness => false,
        };
        if over {
            return;
        }
    }
}

async fn once(
    context: &Context,
    container: &core::Container,
    container_id: &str,
    address: Option<IpAddr>,
    probe: &core::Probe,
) -> Outcome {
    let timeout = Duration::from_secs(u64::try_from(probe.timeout_seconds.unwrap_or(1)).unwrap_or(1).max(1));
    let target = Target {
        runtime: &*context.runtime,
        container_id,
        container,
        address,
        user_agent: format!("kube-probe/{}", context.short_version()),
    };
    match probe {
        core::Probe { exec: Some(action), .. } => target.exec(action, timeout).await,
        core::Probe { http_get: Some(action), .. } => target.http(action, timeout).await,
        core::Probe { tcp_socket: Some(action), .. } => target.tcp(action, timeout).await,
        core::Probe { grpc: Some(action), .. } => target.grpc(action, timeout).await,
        _ => Outcome::Error("missing probe handler".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(success: i32, failure: i32, results: &str, want: &str) {
        let probe = core::Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..core::Probe::default()
        };
        let mut verdict = Verdict::default();
        let got: String = results
            .chars()
            .map(|c| match verdict.take(c == '+', &probe) {
                None => '.',
                Some(ProbeState::Success) => '+',
                Some(_) => '-',
            })
            .collect();
        assert_eq!(got, want, "{results}");
    }

    #[test]
    fn thresholds_count_results_in_a_row() {
        check(1, 3, "+---+--+", "+..-+..+");
        check(2, 1, "++-+-++", ".+-.-.+");
        check(1, 1, "-+", "-+");
    }
}
