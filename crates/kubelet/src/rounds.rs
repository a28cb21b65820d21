//! Starting over: what a container ends with may ask for all containers of its pod to run anew, from the first
//! init container on.
//!
//! Every container carries the round it was made in. One that ends as such a rule says begins the next: what is
//! of a round before that is killed and, but for ephemeral containers, started again whatever became of it; so
//! an agent that starts in the midst of it sees how far it got. Upstream: `RestartAllContainers` in
//! pkg/kubelet/container/helpers.go, which removes the containers instead. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1 as core;
use minke_runtime::{ContainerState, ContainerStatus};

use crate::observed::{Observed, ROUND_ANNOTATION, backoff};
use crate::pod::{Class, Pod};

const START_OVER: &str = "RestartAllContainers";

/// What the first rule for containers that end with `code` asks for.
pub fn rule(container: &core::Container, code: i32) -> Option<&str> {
    let fits = |rule: &&core::ContainerRestartRule| {
        let Some(codes) = &rule.exit_codes else { return false };
        let listed = codes.values.iter().flatten().any(|value| *value == code);
        match codes.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        }
    };
    container.restart_policy_rules.iter().flatten().find(fits).map(|rule| rule.action.as_str())
}

/// Whether a container of the pod can ask for all to start over.
pub fn are_possible(pod: &Pod) -> bool {
    let mut rules = pod.containers().flat_map(|(_, c)| c.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == START_OVER)
}

/// The round that a container was made in.
pub fn made_in(container: &ContainerStatus) -> u32 {
    container.annotations.get(ROUND_ANNOTATION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Which round a pod is in.
#[derive(Debug, Default)]
pub struct Round<'a> {
    pub number: u32,
    /// The container whose end began the round, until the first one of it is made.
    cause: Option<&'a ContainerStatus>,
}

impl<'a> Round<'a> {
    pub fn of(pod: &Pod, o: &'a Observed) -> Round<'a> {
        let mut round = Round::default();
        if !are_possible(pod) {
            return round;
        }
        for (class, container) in pod.containers() {
            let Some(latest) = o.latest(&container.name).filter(|_| class != Class::Ephemeral) else {
                continue;
            };
            let asks = latest.state == ContainerState::Exited
                && rule(container, latest.exit_code.unwrap_or(137)) == Some(START_OVER);
            let number = made_in(latest) + u32::from(asks);
            if number > round.number {
                round = Round { number, cause: None };
            }
            // Those that are killed for it may end as the rule says, but later.
            let sooner = |cause: &ContainerStatus| latest.finished_at < cause.finished_at;
            if asks && number == round.number && round.cause.is_none_or(sooner) {
                round.cause = Some(latest);
            }
        }
        if o.all_containers().any(|c| made_in(c) == round.number) {
            round.cause = None;
        }
        round
    }

    /// Whether a container is of a round that is over.
    pub fn is_past(&self, container: &ContainerStatus) -> bool {
        made_in(container) < self.number
    }

    /// Whether something of a round that is over still runs.
    pub fn is_ending(&self, o: &Observed) -> bool {
        o.all_containers().any(|c| c.state == ContainerState::Running && self.is_past(c))
    }

    /// The container that began the round, when the first one of it may start, and how long that is put off:
    /// as long as that container alone would have to wait.
    pub fn begins(&self, o: &Observed) -> Option<(&'a ContainerStatus, Timestamp, SignedDuration)> {
        let cause = self.cause?;
        let delay = backoff(cause, o.longest_wait).0;
        Some((cause, cause.finished_at.unwrap_or(cause.created_at) + delay, delay))
    }

    /// How long a container of this round will have to wait after its end. That it was killed for a new round is not
    /// held against one.
    pub fn next_backoff(
        &self,
        container: &core::Container,
        latest: Option<&ContainerStatus>,
        o: &Observed,
    ) -> SignedDuration {
        let Some(latest) = latest else { return SignedDuration::ZERO };
        let (this, next) = backoff(latest, o.longest_wait);
        let asked = rule(container, latest.exit_code.unwrap_or(137)) == Some(START_OVER);
        if self.is_past(latest) && !asked { this } else { next }
    }
}
