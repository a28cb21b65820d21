//! Reads what autoscalers go by: metrics.k8s.io, custom.metrics.k8s.io and external.metrics.k8s.io.
//!
//! Upstream: pkg/controller/podautoscaler/metrics and k8s.io/metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::autoscaling::v2::{CrossVersionObjectReference, MetricIdentifier, MetricSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector as SelectorSpec;
use minke_api::time::parse_go_duration;
use minke_api::{Kind, LabelSelector, Quantity, Status};
use minke_client::{Client, ListOptions};
use serde_json::Value;

use super::replicas::{PodMetric, PodMetrics};

/// What was read of one metric; numbers are in thousandths.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Measured {
    OfPods(PodMetrics),
    Value(i64),
}

/// Reads the metric; the error is upstream's text.
pub(crate) async fn measure(
    client: &dyn Client,
    namespace: &str,
    selector: &LabelSelector,
    spec: &MetricSpec,
) -> Result<Measured, String> {
    match (spec.type_.as_str(), spec) {
        ("Resource", MetricSpec { resource: Some(source), .. }) => {
            resource(client, namespace, selector, &source.name, None).await.map(Measured::OfPods)
        }
        ("ContainerResource", MetricSpec { container_resource: Some(source), .. }) => {
            let container = Some(source.container.as_str());
            resource(client, namespace, selector, &source.name, container).await.map(Measured::OfPods)
        }
        ("Pods", MetricSpec { pods: Some(source), .. }) => {
            let metric = &source.metric;
            let read = of_pods(client, namespace, selector, metric).await;
            read.map(Measured::OfPods).map_err(|why| format!("unable to get metric {}: {why}", metric.name))
        }
        ("Object", MetricSpec { object: Some(source), .. }) => {
            let (metric, object) = (&source.metric, &source.described_object);
            let read = of_object(client, namespace, object, metric).await;
            read.map(Measured::Value).map_err(|why| {
                let (kind, name) = (&object.kind, &object.name);
                format!("unable to get metric {}: {why} on {kind} {namespace}/{name}", metric.name)
            })
        }
        ("External", MetricSpec { external: Some(source), .. }) => {
            let metric = &source.metric;
            let read = external(client, namespace, metric).await;
            read.map(Measured::Value).map_err(|why| {
                let selector = go_selector(metric.selector.as_ref());
                format!("unable to get external metric {namespace}/{}/{selector}: {why}", metric.name)
            })
        }
        (other, _) => Err(format!("unknown metric source type {other:?}")),
    }
}

async fn resource(
    client: &dyn Client,
    namespace: &str,
    selector: &LabelSelector,
    resource: &str,
    container: Option<&str>,
) -> Result<PodMetrics, String> {
    let fail = |why: &dyn std::fmt::Display| format!("unable to get metrics for resource {resource}: {why}");
    let kind = Kind::by_kind("metrics.k8s.io", "v1beta1", "PodMetrics");
    let kind = kind.ok_or_else(|| fail(&Status::no_such_resource()))?;
    let options = ListOptions { labels: selector.clone(), ..ListOptions::default() };
    let list = client.list(kind, namespace, options).await;
    let list = list
        .map_err(|error| fail(&format_args!("unable to fetch metrics from resource metrics API: {error}")))?;
    if list.items.is_empty() {
        return Err(fail(&"no metrics returned from resource metrics API"));
    }
    let mut metrics = PodMetrics::new();
    for pod in &list.items {
        let value = pod.value();
        let used = used(&value, resource, container).map_err(|()| {
            let container = container.unwrap_or_default();
            fail(&format_args!(
                "container {container} not present in metrics for pod {namespace}/{}",
                pod.name()
            ))
        })?;
        let at = value["timestamp"].as_str().and_then(|text| text.parse().ok());
        let window = value["window"].as_str().and_then(|text| parse_go_duration(text).ok());
        if let (Some(value), Some(at)) = (used, at) {
            let metric = PodMetric { value, at, window: window.unwrap_or_default() };
            metrics.insert(pod.name().to_owned(), metric);
        }
    }
    Ok(metrics)
}

/// Thousandths that a pod, or one container of it, uses; none when that is not told. An error when there is
/// no such container.
fn used(pod: &Value, resource: &str, container: Option<&str>) -> Result<Option<i64>, ()> {
    let containers = pod["containers"].as_array().map_or(&[][..], Vec::as_slice);
    let of = |container: &Value| {
        Quantity::parse(container["usage"][resource].as_str()?).ok().map(Quantity::milli_value)
    };
    match container {
        None => Ok(containers.iter().map(of).sum()),
        Some(name) => containers.iter().find(|c| c["name"] == name).map(of).ok_or(()),
    }
}

const CUSTOM: &str = "custom.metrics.k8s.io";
const EXTERNAL: &str = "external.metrics.k8s.io";

/// The path that all custom metrics are below, in the version that the server would like best.
async fn custom_root(client: &dyn Client) -> Result<String, String> {
    match client.raw(&format!("/apis/{CUSTOM}")).await {
        Ok(group) => {
            let version = group["preferredVersion"]["version"].as_str().unwrap_or("v1beta1");
            Ok(format!("/apis/{CUSTOM}/{version}"))
        }
        Err(error) if error.is_not_found() => Err(format!("no custom metrics API ({CUSTOM}) registered")),
        Err(error) => Err(error.to_string()),
    }
}

fn query(pairs: &[(&str, String)]) -> String {
    let pairs: Vec<String> = pairs
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name}={}", encode(value)))
        .collect();
    if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
}

/// Percent-encodes everything that may mean something in a path or query.
fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match plain(byte) {
            true => out.push(char::from(byte)),
            false => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// The selector of a metric as a query has it.
fn selector_text(selector: Option<&SelectorSpec>) -> Result<String, String> {
    let Some(spec) = selector else { return Ok(String::new()) };
    LabelSelector::from_spec(spec).map(|selector| selector.to_string()).map_err(|error| error.0)
}

async fn custom(client: &dyn Client, path: &str) -> Result<Vec<Value>, String> {
    let fail =
        |why: &dyn std::fmt::Display| format!("unable to fetch metrics from custom metrics API: {why}");
    let root = custom_root(client).await.map_err(|why| fail(&why))?;
    let list = client.raw(&format!("{root}{path}")).await.map_err(|error| fail(&error))?;
    match list["items"].as_array() {
        Some(items) if !items.is_empty() => Ok(items.clone()),
        _ => Err("no metrics returned from custom metrics API".to_owned()),
    }
}

fn milli(value: &Value) -> Option<i64> {
    Quantity::parse(value.as_str()?).ok().map(Quantity::milli_value)
}

async fn of_pods(
    client: &dyn Client,
    namespace: &str,
    selector: &LabelSelector,
    metric: &MetricIdentifier,
) -> Result<PodMetrics, String> {
    let asked = query(&[
        ("labelSelector", selector.to_string()),
        ("metricLabelSelector", selector_text(metric.selector.as_ref())?),
    ]);
    let path = format!("/namespaces/{}/pods/%2A/{}{asked}", encode(namespace), encode(&metric.name));
    let items = custom(client, &path).await?;
    let metrics = items.iter().filter_map(|item| {
        let name = item["describedObject"]["name"].as_str()?.to_owned();
        let at = item["timestamp"].as_str()?.parse().ok()?;
        // What does not say is of the last minute.
        let window = Duration::from_secs(item["windowSeconds"].as_u64().unwrap_or(60));
        Some((name, PodMetric { value: milli(&item["value"])?, at, window }))
    });
    Ok(metrics.collect())
}

async fn of_object(
    client: &dyn Client,
    namespace: &str,
    object: &CrossVersionObjectReference,
    metric: &MetricIdentifier,
) -> Result<i64, String> {
    let asked = query(&[("metricLabelSelector", selector_text(metric.selector.as_ref())?)]);
    let (name, metric) = (encode(&object.name), encode(&metric.name));
    let api_version = object.api_version.as_deref().unwrap_or_default();
    let path = if object.kind == "Namespace" && matches!(api_version, "" | "v1") {
        format!("/namespaces/{name}/metrics/{metric}{asked}")
    } else {
        let (group, _) = api_version.split_once('/').unwrap_or_default();
        let kind = super::kind_of(group, api_version, &object.kind).ok_or_else(|| {
            let api = "unable to fetch metrics from custom metrics API";
            format!("{api}: {}", super::no_matches(group, &object.kind))
        })?;
        let resource = kind.qualified_plural();
        match kind.namespaced {
            true => format!("/namespaces/{}/{resource}/{name}/{metric}{asked}", encode(namespace)),
            false => format!("/{resource}/{name}/{metric}{asked}"),
        }
    };
    let items = custom(client, &path).await?;
    milli(&items[0]["value"]).ok_or_else(|| "no metrics returned from custom metrics API".to_owned())
}

async fn external(client: &dyn Client, namespace: &str, metric: &MetricIdentifier) -> Result<i64, String> {
    let asked = query(&[("labelSelector", selector_text(metric.selector.as_ref())?)]);
    let (namespace, name) = (encode(namespace), encode(&metric.name));
    let path = format!("/apis/{EXTERNAL}/v1beta1/namespaces/{namespace}/{name}{asked}");
    let list = client.raw(&path).await.map_err(|error| {
        // Clients say what of when the server only says that it could not find it.
        let about = if error == Status::no_such_resource() {
            format!(" (get {}.{EXTERNAL})", metric.name)
        } else {
            String::new()
        };
        format!("unable to fetch metrics from external metrics API: {error}{about}")
    })?;
    let values = list["items"].as_array().map_or(&[][..], Vec::as_slice);
    if values.is_empty() {
        return Err("no metrics returned from external metrics API".to_owned());
    }
    Ok(values.iter().filter_map(|item| milli(&item["value"])).fold(0, i64::saturating_add))
}

/// A selector as Go prints it in the midst of a text.
pub(crate) fn go_selector(selector: Option<&SelectorSpec>) -> String {
    let Some(selector) = selector else { return "nil".to_owned() };
    let labels: BTreeMap<&String, &String> = selector.match_labels.iter().flatten().collect();
    let labels: String = labels.iter().map(|(key, value)| format!("{key}: {value},")).collect();
    let expressions: String = selector
        .match_expressions
        .iter()
        .flatten()
        .map(|term| {
            let values = term.values.as_deref().unwrap_or_default().join(" ");
            format!(
                "LabelSelectorRequirement{{Key:{},Operator:{},Values:[{values}],}},",
                term.key, term.operator
            )
        })
        .collect();
    format!(
        "&LabelSelector{{MatchLabels:map[string]string{{{labels}}},MatchExpressions:[]LabelSelectorRequirement{{{expressions}}},}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pods_use_what_their_containers_use() {
        let pod = json!({"containers": [
            {"name": "a", "usage": {"cpu": "250m", "memory": "1Ki"}},
            {"name": "b", "usage": {"cpu": "1500001n"}},
        ]});
        assert_eq!(used(&pod, "cpu", None), Ok(Some(252)));
        assert_eq!(used(&pod, "memory", None), Ok(None));
        assert_eq!(used(&pod, "memory", Some("a")), Ok(Some(1_024_000)));
        assert_eq!(used(&pod, "cpu", Some("c")), Err(()));
    }

    #[test]
    fn selectors_print_as_in_go() {
        let selector = |value| serde_json::from_value::<SelectorSpec>(value).expect("a selector");
        assert_eq!(go_selector(None), "nil");
        assert_eq!(
            go_selector(Some(&selector(json!({"matchLabels": {"queue": "tasks"}})))),
            "&LabelSelector{MatchLabels:map[string]string{queue: tasks,},MatchExpressions:[]LabelSelectorRequirement{},}"
        );
        let terms = json!({"matchExpressions": [{"key": "k", "operator": "In", "values": ["a", "b"]}]});
        assert_eq!(
            go_selector(Some(&selector(terms))),
            "&LabelSelector{MatchLabels:map[string]string{},MatchExpressions:[]LabelSelectorRequirement{LabelSelectorRequirement{Key:k,Operator:In,Values:[a b],},},}"
        );
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(query(&[("a", String::new())]), "");
        assert_eq!(
            query(&[("labelSelector", "a=b,c in (d)".into()), ("x", String::new())]),
            "?labelSelector=a%3Db%2Cc%20in%20%28d%29"
        );
    }
}
