//! Events: what the agent did and what went wrong, told where `kubectl describe` looks.
//!
//! The same event again raises a count instead of making another object; many alike are told as one; and
//! one object can't fill the API server with them. Upstream: client-go's tools/record.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use minke_api::{ApiType, Kind};
use minke_client::{Client, Patch, Target};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::pod::Pod;

/// Events that wait to be written; more than these are dropped.
const QUEUE: usize = 1000;
/// Different events that are remembered for counting.
const REMEMBERED: usize = 4096;
/// How many different messages of one kind are told before they are combined, and for how long.
const SIMILAR_MAX: usize = 10;
const SIMILAR_WINDOW: Duration = Duration::from_secs(600);
/// Per object: this many at once, then one per interval.
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);

/// Where events go. Cheap to clone; never waits.
#[derive(Clone)]
pub struct Recorder {
    node: Arc<str>,
    queue: mpsc::Sender<Told>,
}

struct Told {
    about: core::ObjectReference,
    normal: bool,
    reason: Cow<'static, str>,
    message: String,
    at: Timestamp,
}

impl Recorder {
    /// Writes events with `client` until the last recorder is gone.
    pub fn start(client: Arc<dyn Client>, node: &str) -> Recorder {
        let (queue, told) = mpsc::channel(QUEUE);
        let node: Arc<str> = node.into();
        tokio::spawn(write(client, node.clone(), told));
        Recorder { node, queue }
    }

    fn tell(&self, about: core::ObjectReference, normal: bool, reason: Cow<'static, str>, message: String) {
        let told = Told { about, normal, reason, message, at: Timestamp::now() };
        if let Err(error) = self.queue.try_send(told) {
            let told = error.into_inner();
            tracing::debug!(reason = %told.reason, "Event dropped: too many wait");
        }
    }

    pub fn normal(
        &self,
        pod: &Pod,
        container: Option<&str>,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.tell(about(pod, container), true, reason.into(), message.into());
    }

    pub fn warning(
        &self,
        pod: &Pod,
        container: Option<&str>,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.tell(about(pod, container), false, reason.into(), message.into());
    }

    /// Of something that [`about`] named before.
    pub fn warning_of(
        &self,
        about: &core::ObjectReference,
        reason: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) {
        self.tell(about.clone(), false, reason.into(), message.into());
    }

    /// About the node itself. Upstream uses the name as the uid here, and kubectl looks for that.
    pub fn node(&self, normal: bool, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) {
        let about = core::ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node.to_string()),
            uid: Some(self.node.to_string()),
            ..core::ObjectReference::default()
        };
        self.tell(about, normal, reason.into(), message.into());
    }
}

/// How events name a pod, or one of its containers.
pub fn about(pod: &Pod, container: Option<&str>) -> core::ObjectReference {
    let field_path = container.map(|name| {
        let field = pod.container(name).map_or("containers", |(class, _)| class.field());
        format!("spec.{field}{{{name}}}")
    });
    core::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.namespace().to_owned()),
        name: Some(pod.name().to_owned()),
        uid: Some(pod.uid().to_owned()),
        resource_version: Some(pod.object().revision().to_string()),
        field_path,
    }
}

/// What makes two events the same, without the message.
type Group = (String, String, bool, Cow<'static, str>);

struct Written {
    namespace: String,
    name: String,
    count: i32,
    seen: Instant,
}

/// Counts events and decides what is written of them.
#[derive(Default)]
struct Correlator {
    written: HashMap<(Group, String), Written>,
    similar: HashMap<Group, (Instant, BTreeSet<String>)>,
    buckets: HashMap<String, (Instant, f64)>,
}

#[derive(Debug, PartialEq)]
enum Write {
    Nothing,
    Create { message: String },
    Count { namespace: String, name: String, count: i32, message: String },
}

impl Correlator {
    fn take(&mut self, told: &Told, now: Instant) -> (Group, Write) {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let object = format!("{}/{}", text(&told.about.namespace), text(&told.about.uid));
        let group = (object.clone(), text(&told.about.field_path), told.normal, told.reason.clone());
        let bucket = self.buckets.entry(object).or_insert((now, BURST));
        let refilled = now.duration_since(bucket.0).as_secs_f64() / REFILL.as_secs_f64();
        *bucket = (now, (bucket.1 + refilled).min(BURST));
        if bucket.1 < 1.0 {
            return (group, Write::Nothing);
        }
        bucket.1 -= 1.0;
        let mut message = told.message.clone();
        let similar = self.similar.entry(group.clone()).or_insert_with(|| (now, BTreeSet::new()));
        if now.duration_since(similar.0) > SIMILAR_WINDOW {
            *similar = (now, BTreeSet::new());
        }
        similar.0 = now;
        let combined = similar.1.len() >= SIMILAR_MAX && !similar.1.contains(&message);
        if combined {
            message = format!("(combined from similar events): {message}");
        } else {
            similar.1.insert(message.clone());
        }
        let key = (group.clone(), if combined { String::new() } else { message.clone() });
        let write = match self.written.get_mut(&key) {
            Some(known) => {
                known.count += 1;
                known.seen = now;
                let (namespace, name) = (known.namespace.clone(), known.name.clone());
                Write::Count { namespace, name, count: known.count, message }
            }
            None => Write::Create { message },
        };
        self.forget_old();
        (group, write)
    }

    fn forget_old(&mut self) {
        if self.written.len() <= REMEMBERED {
            return;
        }
        let mut ages: Vec<Instant> = self.written.values().map(|written| written.seen).collect();
        ages.sort_unstable();
        let limit = ages[ages.len() / 2];
        self.written.retain(|_, written| written.seen > limit);
        self.similar.retain(|_, (seen, _)| *seen > limit);
        self.buckets.retain(|_, (seen, _)| *seen > limit);
    }
}

async fn write(client: Arc<dyn Client>, node: Arc<str>, mut queue: mpsc::Receiver<Told>) {
    let kind = Kind::of::<core::Event>();
    let mut correlator = Correlator::default();
    while let Some(told) = queue.recv().await {
        let (group, mut write) = correlator.take(&told, Instant::now());
        if let Write::Count { namespace, name, count, message } = &write {
            let change = json!({"count": count, "message": message, "lastTimestamp": Time(told.at)});
            match client.patch(Target::object(kind, namespace, name), Patch::Merge(change)).await {
                Err(error) if error.is_not_found() => write = Write::Create { message: message.clone() },
                Err(error) => tracing::debug!(%error, reason = %told.reason, "Event not counted"),
                Ok(_) => {}
            }
        }
        if let Write::Create { message } = write {
            let event = event(&told, message.clone(), &node);
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            let name = event.metadata.name.clone().unwrap_or_default();
            let body = event.to_value();
            match client.create(Target::collection(kind, &namespace), body).await {
                Ok(_) => {
                    let combined = message.starts_with("(combined from similar events)");
                    let key = (group, if combined { String::new() } else { message });
                    let written = Written { namespace, name, count: 1, seen: Instant::now() };
                    correlator.written.insert(key, written);
                }
                // The namespace may be going away, and with it everyone who could read this.
                Err(error) => tracing::debug!(%error, reason = %told.reason, "Event not written"),
            }
        }
    }
}

fn event(told: &Told, message: String, node: &str) -> core::Event {
    let namespace = told.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let name = format!(
        "{}.{:016x}",
        told.about.name.as_deref().unwrap_or_default(),
        told.at.as_nanosecond().unsigned_abs() as u64
    );
    core::Event {
        metadata: k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
            name: Some(name),
            namespace: Some(namespace),
            ..Default::default()
        },
        involved_object: told.about.clone(),
        reason: Some(told.reason.clone().into_owned()),
        message: Some(message),
        source: Some(core::EventSource {
            component: Some("kubelet".to_owned()),
            host: Some(node.to_owned()),
        }),
        first_timestamp: Some(Time(told.at)),
        last_timestamp: Some(Time(told.at)),
        count: Some(1),
        type_: Some(if told.normal { "Normal" } else { "Warning" }.to_owned()),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..core::Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(message: &str) -> Told {
        let about = core::ObjectReference { uid: Some("u".into()), ..core::ObjectReference::default() };
        Told { about, normal: true, reason: "R".into(), message: message.into(), at: Timestamp::UNIX_EPOCH }
    }

    fn write_all(correlator: &mut Correlator, messages: &[String], now: Instant) -> Vec<Write> {
        let mut writes = vec![];
        for message in messages {
            let (group, write) = correlator.take(&told(message), now);
            if let Write::Create { message } = &write {
                let combined = message.starts_with("(combined");
                let key = (group, if combined { String::new() } else { message.clone() });
                let written = Written { namespace: "n".into(), name: "e".into(), count: 1, seen: now };
                correlator.written.insert(key, written);
            }
            writes.push(write);
        }
        writes
    }

    #[test]
    fn the_same_again_is_counted() {
        let mut correlator = Correlator::default();
        let got =
            write_all(&mut correlator, &["a".into(), "a".into(), "b".into(), "a".into()], Instant::now());
        let count =
            |count| Write::Count { namespace: "n".into(), name: "e".into(), count, message: "a".into() };
        let create = |message: &str| Write::Create { message: message.into() };
        assert_eq!(got, [create("a"), count(2), create("b"), count(3)]);
    }

    #[test]
    fn many_alike_are_combined_and_a_flood_is_cut() {
        let mut correlator = Correlator::default();
        let now = Instant::now();
        let messages: Vec<String> = (0..30).map(|n| n.to_string()).collect();
        let got = write_all(&mut correlator, &messages, now);
        let created = got.iter().filter(|write| matches!(write, Write::Create { .. })).count();
        assert_eq!(created, SIMILAR_MAX + 1, "ten of their own and one for the rest");
        assert_eq!(got.iter().filter(|write| **write == Write::Nothing).count(), 5);
        let later = now + REFILL;
        let late = write_all(&mut correlator, &["0".into(), "0".into()], later);
        assert!(matches!(late[0], Write::Count { count: 2, .. }), "{late:?}");
        assert_eq!(late[1], Write::Nothing, "one in five minutes is earned back");
    }
}
