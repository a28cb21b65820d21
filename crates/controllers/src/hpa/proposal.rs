//! What one metric asks for, and how it is told in the status. Pure.
//!
//! Names and texts are upstream's: pkg/controller/podautoscaler/horizontal.go, `computeReplicasForMetric`.

use k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricStatus, ExternalMetricStatus, MetricSpec, MetricStatus, MetricTarget,
    MetricValueStatus, ObjectMetricStatus, PodsMetricStatus, ResourceMetricStatus,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use minke_api::Quantity;
use minke_api::quantity::Format;

use super::metrics::{Measured, go_selector};
use super::replicas::{Facts, PodMetrics, for_average, for_utilization, for_value, for_value_each};

/// What a metric asks for.
#[derive(Debug, PartialEq)]
pub(crate) struct Proposal {
    pub replicas: i32,
    /// As events name the metric.
    pub name: String,
    pub status: MetricStatus,
}

/// Why a metric asks for nothing.
#[derive(Debug, PartialEq)]
pub(crate) struct Failure {
    /// Of the event and the condition.
    pub reason: &'static str,
    pub event: String,
    /// Of the condition.
    pub message: String,
    /// Of the event about all metrics.
    pub error: String,
}

fn milli(milli: i64) -> ApiQuantity {
    Quantity::from_milli(milli, Format::DecimalSi).into()
}

/// Thousandths that a target wants.
fn wanted(quantity: Option<&ApiQuantity>) -> Option<i64> {
    Quantity::try_from(quantity?).ok().map(Quantity::milli_value)
}

/// What `spec` asks for when `read` was measured.
pub(crate) fn of(
    facts: &Facts<'_>,
    spec: &MetricSpec,
    read: Result<Measured, String>,
) -> Result<Proposal, Failure> {
    match (spec.type_.as_str(), spec) {
        ("Resource", MetricSpec { resource: Some(source), .. }) => {
            let name = source.name.as_str();
            let fail = |why: String| {
                let error = format!("failed to get {name} resource metric value: {why}");
                failure("FailedGetResourceMetric", why, error)
            };
            let found = resource(facts, name, None, &source.target, read).map_err(fail)?;
            let status = ResourceMetricStatus { current: found.current, name: source.name.clone() };
            let status =
                MetricStatus { type_: spec.type_.clone(), resource: Some(status), ..Default::default() };
            Ok(Proposal { replicas: found.replicas, name: found.name, status })
        }
        ("ContainerResource", MetricSpec { container_resource: Some(source), .. }) => {
            let name = source.name.as_str();
            let fail = |why: String| {
                let error = format!("failed to get {name} container metric value: {why}");
                failure("FailedGetContainerResourceMetric", why, error)
            };
            let container = Some(source.container.as_str());
            let found = resource(facts, name, container, &source.target, read).map_err(fail)?;
            let status = ContainerResourceMetricStatus {
                container: source.container.clone(),
                current: found.current,
                name: source.name.clone(),
            };
            let status = MetricStatus {
                type_: spec.type_.clone(),
                container_resource: Some(status),
                ..Default::default()
            };
            Ok(Proposal { replicas: found.replicas, name: found.name, status })
        }
        ("Pods", MetricSpec { pods: Some(source), .. }) => {
            let fail = |why: String| {
                let error = format!("failed to get pods metric value: {why}");
                failure("FailedGetPodsMetric", why, error)
            };
            let target = wanted(source.target.average_value.as_ref()).unwrap_or(0);
            let metrics = read.and_then(of_pods).map_err(fail)?;
            let (replicas, usage) = for_average(facts, metrics, "", target).map_err(fail)?;
            let current = MetricValueStatus { average_value: Some(milli(usage)), ..Default::default() };
            let status = PodsMetricStatus { current, metric: source.metric.clone() };
            let status = MetricStatus { type_: spec.type_.clone(), pods: Some(status), ..Default::default() };
            Ok(Proposal { replicas, name: format!("pods metric {}", source.metric.name), status })
        }
        ("Object", MetricSpec { object: Some(source), .. }) => {
            let fail = |why: String| {
                let error = format!("failed to get object metric value: {why}");
                failure("FailedGetObjectMetric", why, error)
            };
            let neither =
                "invalid object metric source: neither a value target nor an average value target was set";
            let found = shared(facts, &source.target, read, neither).map_err(fail)?;
            let name = match found.each {
                false => format!("{} metric {}", source.described_object.kind, source.metric.name),
                // Upstream names it like this, too.
                true => {
                    format!(
                        "external metric {}({})",
                        source.metric.name,
                        go_selector(source.metric.selector.as_ref())
                    )
                }
            };
            let status = ObjectMetricStatus {
                current: found.current,
                described_object: source.described_object.clone(),
                metric: source.metric.clone(),
            };
            let status =
                MetricStatus { type_: spec.type_.clone(), object: Some(status), ..Default::default() };
            Ok(Proposal { replicas: found.replicas, name, status })
        }
        ("External", MetricSpec { external: Some(source), .. }) => {
            let name = &source.metric.name;
            let fail = |why: String| {
                let error = format!(
                    "failed to get {name} external metric value: failed to get {name} external metric: {why}"
                );
                failure("FailedGetExternalMetric", why, error)
            };
            let neither =
                "invalid external metric source: neither a value target nor an average value target was set";
            let found = shared(facts, &source.target, read, neither).map_err(fail)?;
            let name = format!("external metric {name}({})", go_selector(source.metric.selector.as_ref()));
            let status = ExternalMetricStatus { current: found.current, metric: source.metric.clone() };
            let status =
                MetricStatus { type_: spec.type_.clone(), external: Some(status), ..Default::default() };
            Ok(Proposal { replicas: found.replicas, name, status })
        }
        (other, _) => {
            let why = format!("unknown metric source type {other:?}");
            Err(failure("InvalidMetricSourceType", why.clone(), why))
        }
    }
}

fn failure(reason: &'static str, why: String, error: String) -> Failure {
    let message = format!("the HPA was unable to compute the replica count: {why}");
    Failure { reason, event: why, message, error }
}

fn of_pods(measured: Measured) -> Result<PodMetrics, String> {
    match measured {
        Measured::OfPods(metrics) => Ok(metrics),
        Measured::Value(_) => Err("the metric is not one of pods".to_owned()),
    }
}

struct Found {
    replicas: i32,
    name: String,
    current: MetricValueStatus,
    /// The target is one of each replica.
    each: bool,
}

fn resource(
    facts: &Facts<'_>,
    resource: &str,
    container: Option<&str>,
    target: &MetricTarget,
    read: Result<Measured, String>,
) -> Result<Found, String> {
    if let Some(target) = wanted(target.average_value.as_ref()) {
        let fail = |why: String| format!("failed to get {resource} usage: {why}");
        let metrics = read.and_then(of_pods).map_err(fail)?;
        let (replicas, usage) = for_average(facts, metrics, resource, target).map_err(fail)?;
        let current = MetricValueStatus { average_value: Some(milli(usage)), ..Default::default() };
        return Ok(Found { replicas, name: format!("{resource} resource"), current, each: true });
    }
    let Some(target) = target.average_utilization else {
        let neither = "neither an average utilization target nor an average value (usage) target was set";
        return Err(format!("invalid resource metric source: {neither}"));
    };
    let fail = |why: String| format!("failed to get {resource} utilization: {why}");
    let metrics = read.and_then(of_pods).map_err(fail)?;
    let found = for_utilization(facts, metrics, resource, container, target).map_err(fail)?;
    let kind = if container.is_some() { "container resource" } else { "resource" };
    let current = MetricValueStatus {
        average_utilization: Some(found.percent),
        average_value: Some(milli(found.raw)),
        ..Default::default()
    };
    let name = format!("{resource} {kind} utilization (percentage of request)");
    Ok(Found { replicas: found.replicas, name, current, each: true })
}

/// A metric that is one value for all replicas.
fn shared(
    facts: &Facts<'_>,
    target: &MetricTarget,
    read: Result<Measured, String>,
    neither: &str,
) -> Result<Found, String> {
    let usage = |read: Result<Measured, String>| match read? {
        Measured::Value(value) => Ok(value),
        Measured::OfPods(_) => Err("the metric is one of pods".to_owned()),
    };
    let name = String::new();
    if let Some(target) = wanted(target.average_value.as_ref()) {
        let (replicas, each) = for_value_each(facts, usage(read)?, target);
        let current = MetricValueStatus { average_value: Some(milli(each)), ..Default::default() };
        return Ok(Found { replicas, name, current, each: true });
    }
    let Some(target) = wanted(target.value.as_ref()) else { return Err(neither.to_owned()) };
    let usage = usage(read)?;
    let replicas = for_value(facts, usage, target)?;
    let current = MetricValueStatus { value: Some(milli(usage)), ..Default::default() };
    Ok(Found { replicas, name, current, each: false })
}
