//! Keeps the replicas of a target at what its metrics ask for.
//!
//! Reads HorizontalPodAutoscalers and Pods from the caches, the scale of the target and the metrics from the
//! API server; writes the scale and the status of the autoscaler. Each autoscaler is looked at every 15
//! seconds (unless set otherwise), and at once when its specification changes; while there is none, nothing happens at all.
//!
//! What a metric asks for is worked out in [`replicas`], how far that is followed in [`limits`].
//! Upstream: pkg/controller/podautoscaler.

mod limits;
mod metrics;
mod proposal;
mod replicas;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::autoscaling::v2::{
    HorizontalPodAutoscaler, HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerSpec,
    HorizontalPodAutoscalerStatus, MetricStatus,
};
use k8s_openapi::api::core::v1::Pod;
use minke_api::{ApiType, KINDS, Key, Kind, LabelSelector, Quantity, Status};
use minke_client::{Change, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, seconds, until};
use crate::run::Controller;
use limits::{Bounds, Condition, Memory};
use proposal::Failure;
use replicas::{Facts, Tolerances};

/// What can be set of the autoscalers. The default is upstream's.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How often each looks at its metrics.
    pub period: Duration,
    /// Change of a metric, as a part of its target, that is not acted on.
    pub tolerance: f64,
    /// How long a higher recommendation holds off scaling down.
    pub downscale_stabilization: Duration,
    /// How long after its start a pod's CPU says nothing while it is not ready.
    pub cpu_initialization: Duration,
    /// A pod that became unready later than this after its start works, but badly.
    pub initial_readiness: Duration,
}

const DEFAULT: Settings = Settings {
    period: Duration::from_secs(15),
    tolerance: 0.1,
    downscale_stabilization: Duration::from_secs(300),
    cpu_initialization: Duration::from_secs(300),
    initial_readiness: Duration::from_secs(30),
};

impl Default for Settings {
    fn default() -> Settings {
        DEFAULT
    }
}

pub(crate) struct Autoscalers {
    settings: Settings,
    known: Mutex<HashMap<Key, Known>>,
}

/// What is remembered of an autoscaler between two passes.
#[derive(Debug, Clone, Default)]
struct Known {
    memory: Memory,
    /// The specification that was last acted on, as JSON, and when the next pass is due.
    spec: String,
    due: Option<Timestamp>,
    /// Which pods it goes by.
    selector: Option<LabelSelector>,
}

/// The scale of a target.
#[derive(Debug, Clone, PartialEq)]
struct Scale {
    spec: i32,
    status: i32,
    selector: String,
    /// As it was read.
    value: Value,
}

impl Scale {
    fn new(value: Value) -> Scale {
        let number = |value: &Value| value.as_i64().and_then(|n| i32::try_from(n).ok()).unwrap_or(0);
        let selector = value["status"]["selector"].as_str().unwrap_or_default().to_owned();
        let (spec, status) = (number(&value["spec"]["replicas"]), number(&value["status"]["replicas"]));
        Scale { spec, status, selector, value }
    }
}

/// The row of a kind in any of its versions, the given one if it is there.
fn kind_of(group: &str, api_version: &str, kind: &str) -> Option<&'static Kind> {
    let exact = Kind::by_api_version(api_version, kind);
    exact.or_else(|| KINDS.iter().find(|row| row.group == group && row.kind == kind))
}

fn no_matches(group: &str, kind: &str) -> String {
    format!("no matches for kind {kind:?} in group {group:?}")
}

/// The kind of the target, if it can be scaled; the error is upstream's text.
fn target_kind(spec: &HorizontalPodAutoscalerSpec) -> Result<&'static Kind, String> {
    let target = &spec.scale_target_ref;
    let api_version = target.api_version.as_deref().unwrap_or_default();
    let group = match api_version.split('/').collect::<Vec<_>>()[..] {
        [_] => "",
        [group, _] => group,
        _ => {
            let why = format!("unexpected GroupVersion string: {api_version}");
            return Err(format!("invalid API version in scale target reference: {why}"));
        }
    };
    let kind = kind_of(group, api_version, &target.kind).ok_or_else(|| {
        let why = no_matches(group, &target.kind);
        format!("unable to determine resource for scale target reference: {why}")
    })?;
    match kind.subresource("scale") {
        Some(_) => Ok(kind),
        None => Err(Status::no_such_resource().to_string()),
    }
}

/// What a pass decided.
#[derive(Debug, PartialEq)]
struct Decision {
    replicas: i32,
    /// Why, as the event tells; empty when nothing is to be done.
    reason: String,
    conditions: Vec<Condition>,
}

/// What the bounds alone decide; none when the metrics are to be asked.
fn by_bounds(current: i32, min: i32, max: i32) -> Option<Decision> {
    let because =
        |replicas, reason: &str| Some(Decision { replicas, reason: reason.to_owned(), conditions: vec![] });
    match () {
        () if current == 0 && min != 0 => {
            let why = "scaling is disabled since the replica count of the target is zero";
            let disabled = Condition::new(ACTIVE, false, "ScalingDisabled", why);
            Some(Decision { replicas: 0, reason: String::new(), conditions: vec![disabled] })
        }
        () if current > max => because(max, "Current number of replicas above Spec.MaxReplicas"),
        () if current < min => because(min, "Current number of replicas below Spec.MinReplicas"),
        () => None,
    }
}

/// What the metrics decide: `wanted` replicas, as the metric of that name asks.
fn by_metrics(
    (wanted, metric): (i32, &str),
    bounds: Bounds,
    spec: &HorizontalPodAutoscalerSpec,
    memory: &mut Memory,
    now: Timestamp,
) -> Decision {
    let valid = format!("the HPA was able to successfully calculate a replica count from {metric}");
    let valid = Condition::new(ACTIVE, true, "ValidMetricFound", valid);
    let wanted = wanted.max(0);
    let reason = match wanted.cmp(&bounds.current) {
        std::cmp::Ordering::Greater => format!("{metric} above target"),
        std::cmp::Ordering::Less => "All metrics below target".to_owned(),
        std::cmp::Ordering::Equal => String::new(),
    };
    let (replicas, [able, limited]) = limits::follow(wanted, bounds, spec.behavior.as_ref(), memory, now);
    Decision { replicas, reason, conditions: vec![valid, able, limited] }
}

const ABLE: &str = "AbleToScale";
const ACTIVE: &str = "ScalingActive";

fn tolerances(spec: &HorizontalPodAutoscalerSpec, usual: f64) -> Tolerances {
    let behavior = spec.behavior.as_ref();
    let of = |rules: Option<&k8s_openapi::api::autoscaling::v2::HPAScalingRules>| {
        let quantity = rules.and_then(|rules| rules.tolerance.as_ref());
        quantity.and_then(|quantity| Quantity::try_from(quantity).ok()).map_or(usual, Quantity::as_f64)
    };
    Tolerances {
        down: of(behavior.and_then(|behavior| behavior.scale_down.as_ref())),
        up: of(behavior.and_then(|behavior| behavior.scale_up.as_ref())),
    }
}

/// The conditions with `new` put in; the time is that of the last change between true and false.
fn conditions(
    old: &[HorizontalPodAutoscalerCondition],
    new: &[Condition],
    now: Timestamp,
) -> Vec<HorizontalPodAutoscalerCondition> {
    let mut all = old.to_vec();
    for condition in new {
        let at = all.iter().position(|known| known.type_ == condition.kind).unwrap_or_else(|| {
            let type_ = condition.kind.to_owned();
            all.push(HorizontalPodAutoscalerCondition { type_, ..Default::default() });
            all.len() - 1
        });
        let known = &mut all[at];
        let status = if condition.status { "True" } else { "False" };
        if known.status != status {
            known.last_transition_time = Some(seconds(now));
        }
        known.status = status.to_owned();
        known.reason = Some(condition.reason.to_owned());
        known.message = Some(condition.message.clone());
    }
    all
}

#[async_trait]
impl Controller for Autoscalers {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<HorizontalPodAutoscaler>(), Kind::of::<Pod>()]
    }

    fn items(&self, _: &Shared, change: &Change) -> Vec<Item> {
        let object = change.object();
        if object.kind() == Kind::of::<Pod>() { vec![] } else { vec![Item::of(object)] }
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let hpa = ctx.get::<HorizontalPodAutoscaler>(&item.key).filter(|hpa| !ctx.is_going(&hpa.object));
        let Some(hpa) = hpa else {
            self.lock().remove(&item.key);
            return Ok(Requeue::Never);
        };
        let now = ctx.now();
        let text = hpa.spec.to_value().to_string();
        {
            let mut all = self.lock();
            let known = all.entry(item.key.clone()).or_default();
            // Its own status, say, changes nothing.
            if let Some(due) = known.due.filter(|due| *due > now && known.spec == text) {
                return Ok(Requeue::After(until(due, now)));
            }
            known.spec = text;
            known.due = Some(now + self.settings.period);
        }
        Pass { ctx, all: self, hpa, now }.run().await?;
        Ok(Requeue::After(self.settings.period))
    }
}

impl Autoscalers {
    pub fn new(settings: Settings) -> Autoscalers {
        Autoscalers { settings, known: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Known>> {
        self.known.lock().expect("nothing panics while autoscalers are looked up")
    }
}

struct Pass<'a> {
    ctx: &'a Ctx,
    all: &'a Autoscalers,
    hpa: Typed<HorizontalPodAutoscaler>,
    now: Timestamp,
}

impl Pass<'_> {
    async fn run(&self) -> Result<(), Status> {
        let mut status = self.hpa.status.clone().unwrap_or_default();
        let (target, scale) = match self.scale().await {
            Ok(found) => found,
            Err(why) => {
                self.warn("FailedGetScale", &why);
                let message =
                    format!("the HPA controller was unable to get the target's current scale: {why}");
                let unable = Condition::new(ABLE, false, "FailedGetScale", message);
                return self.tell(status, &[unable]).await;
            }
        };
        let able = "the HPA controller was able to get the target's current scale";
        let mut news = vec![Condition::new(ABLE, true, "SucceededGetScale", able)];
        let mut memory = self.with(|known| known.memory.clone()).unwrap_or_default();
        memory.begin(scale.spec, self.now);
        let (min, max) = (self.hpa.spec.min_replicas.unwrap_or(1), self.hpa.spec.max_replicas);
        let down_window = self.all.settings.downscale_stabilization.as_secs();
        let down_window = i32::try_from(down_window).unwrap_or(i32::MAX);
        let bounds = Bounds { current: scale.spec, min, max, down_window };
        let mut measured: Option<Vec<MetricStatus>> = None;
        let decision = match by_bounds(scale.spec, min, max) {
            Some(decision) => decision,
            None => match self.ask(&scale).await {
                Ok(Proposals { wanted, metric, statuses, partly }) => {
                    measured = Some(statuses);
                    if let Some(why) = partly {
                        tracing::debug!(object = %self.hpa.object.key(), why, "Some metrics are missing");
                    }
                    by_metrics((wanted, &metric), bounds, &self.hpa.spec, &mut memory, self.now)
                }
                Err((failed, statuses, why)) => {
                    self.with(|known| known.memory = memory);
                    self.warn("FailedComputeMetricsReplicas", &why);
                    news.push(failed);
                    status.current_replicas = Some(scale.spec);
                    status.current_metrics = Some(statuses).filter(|statuses| !statuses.is_empty());
                    return self.tell(status, &news).await;
                }
            },
        };
        news.extend(decision.conditions);
        status.current_replicas = Some(scale.spec);
        status.current_metrics = measured;
        let replicas = decision.replicas;
        if replicas != scale.spec {
            match self.rescale(target, &scale, replicas).await {
                Ok(()) => {
                    let done =
                        format!("the HPA controller was able to update the target scale to {replicas}");
                    news.push(Condition::new(ABLE, true, "SucceededRescale", done));
                    let message = format!("New size: {replicas}; reason: {}", decision.reason);
                    self.ctx.events.normal(&self.hpa.object, "SuccessfulRescale", message);
                    memory.scaled(self.hpa.spec.behavior.as_ref(), scale.spec, replicas, self.now);
                    status.last_scale_time = Some(seconds(self.now));
                }
                Err(error) => {
                    self.with(|known| known.memory = memory);
                    let message =
                        format!("New size: {replicas}; reason: {}; error: {error}", decision.reason);
                    self.warn("FailedRescale", &message);
                    let message =
                        format!("the HPA controller was unable to update the target scale: {error}");
                    news.push(Condition::new(ABLE, false, "FailedUpdateScale", message));
                    return self.tell(status, &news).await;
                }
            }
        }
        self.with(|known| known.memory = memory);
        status.desired_replicas = replicas;
        self.tell(status, &news).await
    }

    /// Does something with what is remembered of this autoscaler, unless it has gone in between.
    fn with<T>(&self, what: impl FnOnce(&mut Known) -> T) -> Option<T> {
        self.all.lock().get_mut(self.hpa.object.key()).map(what)
    }

    fn warn(&self, reason: &str, message: &str) {
        self.ctx.events.warning(&self.hpa.object, reason, message);
    }

    async fn scale(&self) -> Result<(&'static Kind, Scale), String> {
        let kind = target_kind(&self.hpa.spec)?;
        let name = &self.hpa.spec.scale_target_ref.name;
        let target = Target::object(kind, self.namespace(), name).sub("scale");
        let scale = self.ctx.client.get(target).await.map_err(|error| error.to_string())?;
        Ok((kind, Scale::new(scale.value())))
    }

    fn namespace(&self) -> &str {
        self.hpa.object.namespace()
    }

    async fn rescale(&self, kind: &'static Kind, scale: &Scale, replicas: i32) -> Result<(), Status> {
        let target = Target::object(kind, self.namespace(), &self.hpa.spec.scale_target_ref.name);
        let mut body = scale.value.clone();
        body["apiVersion"] = "autoscaling/v1".into();
        body["kind"] = "Scale".into();
        body["spec"] = json!({"replicas": replicas});
        // With the revision that was read: who scales by hand in between is not overruled.
        self.ctx.client.update(target.sub("scale"), body).await.map(drop)
    }

    async fn tell(
        &self,
        mut status: HorizontalPodAutoscalerStatus,
        news: &[Condition],
    ) -> Result<(), Status> {
        let old = self.hpa.status.clone().unwrap_or_default();
        status.conditions = Some(conditions(old.conditions.as_deref().unwrap_or_default(), news, self.now));
        if self.hpa.status.as_ref() == Some(&status) {
            return Ok(());
        }
        match self.ctx.update_status(&self.hpa.object, &status).await {
            // The next pass says it, and sees what somebody else has changed.
            Err(error) if error.is_conflict() || error.is_not_found() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Asks all metrics. The error is a condition, the statuses so far, and the text of the event.
    async fn ask(&self, scale: &Scale) -> Result<Proposals, (Condition, Vec<MetricStatus>, String)> {
        let (selector, pods) = self.pods(scale).map_err(|(reason, why)| {
            let message = match reason {
                "SelectorRequired" => "the HPA target's scale is missing a selector",
                _ => &why,
            };
            self.warn(reason, &why);
            let reason = if reason == "SelectorRequired" { "InvalidSelector" } else { reason };
            (Condition::new(ACTIVE, false, reason, message), vec![], why.clone())
        })?;
        let facts = Facts {
            spec_replicas: scale.spec,
            status_replicas: scale.status,
            pods: &pods,
            tolerances: tolerances(&self.hpa.spec, self.all.settings.tolerance),
            settings: &self.all.settings,
            now: self.now,
        };
        let specs = self.hpa.spec.metrics.as_deref().unwrap_or_default();
        let measuring =
            specs.iter().map(|spec| metrics::measure(&*self.ctx.client, self.namespace(), &selector, spec));
        let measured = futures_util::future::join_all(measuring).await;
        let proposals: Vec<_> =
            specs.iter().zip(measured).map(|(spec, read)| proposal::of(&facts, spec, read)).collect();
        for failure in proposals.iter().filter_map(|proposal| proposal.as_ref().err()) {
            self.warn(failure.reason, &failure.event);
        }
        combine(proposals, scale.spec)
    }

    /// The selector of the target, and the pods that it selects.
    fn pods(&self, scale: &Scale) -> Result<(LabelSelector, Vec<Typed<Pod>>), NotSelected> {
        if scale.selector.is_empty() {
            return Err(("SelectorRequired", "selector is required".to_owned()));
        }
        let selector = LabelSelector::parse(&scale.selector).map_err(|error| {
            let why = "couldn't convert selector into a corresponding internal selector object";
            ("InvalidSelector", format!("{why}: {}", error.0))
        })?;
        let pods = self.ctx.informer::<Pod>().in_namespace(self.namespace());
        let selected = pods.into_iter().filter(|pod| selector.matches(pod.labels()));
        let pods: Vec<Typed<Pod>> = selected.filter_map(Typed::new).collect();
        self.with(|known| known.selector = Some(selector.clone()));
        let own = self.hpa.object.key();
        let mut rivals: Vec<String> = {
            let all = self.all.lock();
            let here = all.iter().filter(|(key, _)| key.namespace == own.namespace);
            let also = here.filter(|(key, known)| {
                let selects = |s: &LabelSelector| pods.iter().any(|pod| s.matches(pod.object.labels()));
                *key == own || known.selector.as_ref().is_some_and(selects)
            });
            also.map(|(key, _)| key.to_string()).collect()
        };
        if rivals.len() > 1 && !pods.is_empty() {
            rivals.sort_unstable();
            let rivals = rivals.join(" ");
            let why = format!("pods by selector {selector} are controlled by multiple HPAs: [{rivals}]");
            return Err(("AmbiguousSelector", why));
        }
        Ok((selector, pods))
    }
}

/// Why the pods of a target cannot be told: a reason and a text.
type NotSelected = (&'static str, String);

/// What all metrics ask for together.
#[derive(Debug, PartialEq)]
struct Proposals {
    wanted: i32,
    metric: String,
    statuses: Vec<MetricStatus>,
    /// What is wrong with some of them.
    partly: Option<String>,
}

/// The most that any metric asks for. Metrics that fail stop a target from shrinking, not from growing.
fn combine(
    proposals: Vec<Result<proposal::Proposal, Failure>>,
    current: i32,
) -> Result<Proposals, (Condition, Vec<MetricStatus>, String)> {
    let count = proposals.len();
    let (mut wanted, mut metric, mut statuses) = (0, String::new(), vec![]);
    let (mut failed, mut first) = (0, None);
    for proposal in proposals {
        match proposal {
            Ok(proposal) => {
                if wanted == 0 || proposal.replicas > wanted {
                    (wanted, metric) = (proposal.replicas, proposal.name);
                }
                statuses.push(proposal.status);
            }
            Err(failure) => {
                failed += 1;
                first.get_or_insert(failure);
                statuses.push(MetricStatus::default());
            }
        }
    }
    let Some(first) = first else { return Ok(Proposals { wanted, metric, statuses, partly: None }) };
    let why = format!("invalid metrics ({failed} invalid out of {count}), first error is: {}", first.error);
    if failed == count || wanted < current {
        return Err((Condition::new(ACTIVE, false, first.reason, first.message), statuses, why));
    }
    Ok(Proposals { wanted, metric, statuses, partly: Some(why) })
}

#[cfg(test)]
mod tests;
