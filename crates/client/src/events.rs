//! Events: what a component tells users about an object.
//!
//! [`EventRecorder::record`] only hands over; one task per recorder correlates and writes, so that nothing waits
//! for an event. A repeated event becomes a higher count of the first, many alike become one combined
//! event, and a source that floods one object is cut off, with upstream's figures
//! (client-go, tools/record/events_cache.go).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, ObjectReference};
use minke_api::time::{format_micros, format_seconds};
use minke_api::{Kind, Object, Status};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{Client, Clock, Patch, Target, backoff};

/// Events waiting to be written; more are dropped, since an event is a courtesy.
const WAITING_MAX: usize = 1000;
/// Series, groups and sources that are remembered, each.
const REMEMBERED_MAX: usize = 4096;
/// From this many events that differ only in their text within [`GROUP_SPAN`], they are combined.
const GROUP_MAX: usize = 10;
const GROUP_SPAN: Duration = Duration::from_secs(600);
/// Each source may tell this much about one object at once, and then one event per [`REFILL`].
const BURST: f64 = 25.0;
const REFILL: Duration = Duration::from_secs(300);
/// Attempts to write an event to a server that cannot be reached.
const ATTEMPTS: u32 = 12;

/// Longest message that is stored, in bytes.
const MESSAGE_MAX: usize = 1024;

/// Something that happened to an object.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Happening {
    pub about: ObjectReference,
    /// `Warning` instead of `Normal`.
    pub warning: bool,
    /// One CamelCase word, which programs match.
    pub reason: String,
    pub message: String,
    /// What was done or tried, in the events of newer components (`Binding`); else empty.
    pub action: String,
    pub related: Option<ObjectReference>,
}

/// How an event refers to `object`.
pub fn reference(object: &Object) -> ObjectReference {
    ObjectReference {
        api_version: Some(object.kind().api_version()),
        kind: Some(object.kind().kind.to_owned()),
        namespace: Some(object.namespace().to_owned()).filter(|namespace| !namespace.is_empty()),
        name: Some(object.name().to_owned()),
        uid: Some(object.uid().to_owned()),
        resource_version: Some(object.revision().to_string()),
        field_path: None,
    }
}

/// Who tells.
#[derive(Debug, Clone)]
pub struct EventSource {
    /// `deployment-controller`, `kubelet`, `default-scheduler`.
    pub component: String,
    /// Node name; empty for components of the cluster.
    pub host: String,
    /// Written as components on events.k8s.io write (eventTime, action, series), not with counts.
    pub series: bool,
}

/// Where a component records events. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    sender: mpsc::Sender<Happening>,
}

impl EventRecorder {
    /// Starts the task that writes, until `stop`. Must be called within a tokio runtime.
    pub fn new(client: Arc<dyn Client>, source: EventSource, clock: Clock, stop: CancellationToken) -> Self {
        let (sender, mut receiver) = mpsc::channel(WAITING_MAX);
        let mut writer = Writer { client, correlator: Correlator::new(source), clock };
        tokio::spawn(async move {
            loop {
                let happening = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    happening = receiver.recv() => happening,
                };
                let Some(happening) = happening else { return };
                tokio::select! { biased; () = stop.cancelled() => return, () = writer.write(happening) => {} }
            }
        });
        EventRecorder { sender }
    }

    /// Hands an event over; never waits.
    pub fn record(&self, happening: Happening) {
        if self.sender.try_send(happening).is_err() {
            tracing::debug!("Too many events are waiting; one was dropped");
        }
    }

    pub fn normal(&self, object: &Object, reason: &str, message: impl Into<String>) {
        self.about(object, false, reason, message.into());
    }

    pub fn warning(&self, object: &Object, reason: &str, message: impl Into<String>) {
        self.about(object, true, reason, message.into());
    }

    fn about(&self, object: &Object, warning: bool, reason: &str, message: String) {
        let reason = reason.to_owned();
        self.record(Happening { about: reference(object), warning, reason, message, ..Happening::default() });
    }
}

struct Writer {
    client: Arc<dyn Client>,
    correlator: Correlator,
    clock: Clock,
}

impl Writer {
    async fn write(&mut self, happening: Happening) {
        let Some(step) = self.correlator.correlate(happening, self.clock.now(), Instant::now()) else {
            return;
        };
        for attempt in 0..ATTEMPTS {
            match self.attempt(&step).await {
                Ok(()) => return,
                Err(error) if error.code >= 500 || error.code == 429 => {
                    tracing::debug!(%error, "Could not write an event; trying again");
                    let pause = backoff(Duration::from_millis(100), Duration::from_secs(10), attempt);
                    tokio::time::sleep(pause).await;
                }
                // The namespace is going away, say: nobody will read the event.
                Err(error) => return tracing::debug!(%error, name = step.name, "Event was refused"),
            }
        }
        tracing::warn!(name = step.name, "Gave up writing an event");
    }

    async fn attempt(&self, step: &Step) -> Result<(), Status> {
        let target = Target::object(Kind::of::<Event>(), &step.namespace, &step.name);
        if let Some(patch) = &step.patch {
            match self.client.patch(target, Patch::Merge(patch.clone())).await {
                // Expired or deleted meanwhile: tell it anew.
                Err(error) if error.is_not_found() => {}
                done => return done.map(drop),
            }
        }
        let collection = Target::collection(target.kind, &step.namespace);
        match self.client.create(collection, step.event.clone()).await {
            Err(error) if error.is_already_exists() => Ok(()),
            done => done.map(drop),
        }
    }
}

/// What to write for one happening: a patch of an event that should exist, else the whole event.
#[derive(Debug)]
struct Step {
    namespace: String,
    name: String,
    event: Value,
    patch: Option<Value>,
}

/// Everything of an event that repetitions share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct SeriesKey {
    group: GroupKey,
    message: String,
}

/// What is alike in events that differ only in their text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct GroupKey {
    about: [Option<String>; 6],
    warning: bool,
    reason: String,
    action: String,
}

struct Series {
    name: String,
    first: Timestamp,
    count: i32,
}

struct Group {
    messages: HashSet<String>,
    last: Instant,
}

struct Bucket {
    tokens: f64,
    filled: Instant,
}

/// A map that forgets what was first put in when it is full.
struct Recent<K, V> {
    map: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K: Clone + Eq + std::hash::Hash, V> Recent<K, V> {
    fn new() -> Self {
        Recent { map: HashMap::new(), order: VecDeque::new() }
    }

    fn entry(&mut self, key: &K, make: impl FnOnce() -> V) -> &mut V {
        if !self.map.contains_key(key) {
            if self.order.len() >= REMEMBERED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.map.remove(&oldest);
            }
            self.order.push_back(key.clone());
        }
        self.map.entry(key.clone()).or_insert_with(make)
    }
}

/// Decides what becomes of a happening. Does no I/O.
struct Correlator {
    source: EventSource,
    series: Recent<SeriesKey, Series>,
    groups: Recent<GroupKey, Group>,
    buckets: Recent<[Option<String>; 6], Bucket>,
    /// Distinguishes events of the same instant about the same object.
    last_stamp: i128,
}

impl Correlator {
    fn new(source: EventSource) -> Correlator {
        Correlator {
            source,
            series: Recent::new(),
            groups: Recent::new(),
            buckets: Recent::new(),
            last_stamp: 0,
        }
    }

    fn correlate(&mut self, mut happening: Happening, now: Timestamp, at: Instant) -> Option<Step> {
        shorten(&mut happening.message);
        let about = identity(&happening.about);
        let mut group = GroupKey {
            about: about.clone(),
            warning: happening.warning,
            reason: happening.reason.clone(),
            action: happening.action.clone(),
        };
        // A recorded revision would make every state of the object a subject of its own.
        group.about[5] = happening.about.field_path.clone();
        let combined = self.is_one_of_many(&group, &happening.message, at);
        let key =
            SeriesKey { group, message: if combined { String::new() } else { happening.message.clone() } };
        if !self.may_tell(&about, at) {
            return None;
        }
        if combined {
            happening.message = format!("(combined from similar events): {}", happening.message);
            shorten(&mut happening.message);
        }
        let name = self.fresh_name(&happening.about, now);
        let series = self.series.entry(&key, || Series { name, first: now, count: 0 });
        series.count += 1;
        let event = event(&self.source, &happening, series, now);
        let patch = (series.count > 1).then(|| match self.source.series {
            true => json!({ "series": event["series"] }),
            false => json!({ "count": series.count, "lastTimestamp": event["lastTimestamp"], "message": happening.message }),
        });
        let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        Some(Step { namespace, name: series.name.clone(), event, patch })
    }

    fn is_one_of_many(&mut self, key: &GroupKey, message: &str, at: Instant) -> bool {
        let group = self.groups.entry(key, || Group { messages: HashSet::new(), last: at });
        if at.duration_since(group.last) > GROUP_SPAN {
            group.messages.clear();
        }
        group.last = at;
        if group.messages.len() < GROUP_MAX {
            group.messages.insert(message.to_owned());
        }
        group.messages.len() >= GROUP_MAX
    }

    fn may_tell(&mut self, about: &[Option<String>; 6], at: Instant) -> bool {
        let bucket = self.buckets.entry(about, || Bucket { tokens: BURST, filled: at });
        let refill = at.duration_since(bucket.filled).as_secs_f64() / REFILL.as_secs_f64();
        bucket.tokens = (bucket.tokens + refill).min(BURST);
        bucket.filled = at;
        let may = bucket.tokens >= 1.0;
        if may {
            bucket.tokens -= 1.0;
        }
        may
    }

    /// `<object>.<hexadecimal nanoseconds>`, as upstream names events.
    fn fresh_name(&mut self, about: &ObjectReference, now: Timestamp) -> String {
        self.last_stamp = now.as_nanosecond().max(self.last_stamp + 1);
        format!("{}.{:x}", about.name.as_deref().unwrap_or_default(), self.last_stamp)
    }
}

fn identity(about: &ObjectReference) -> [Option<String>; 6] {
    let about = about.clone();
    [about.api_version, about.kind, about.namespace, about.name, about.uid, None]
}

fn shorten(message: &mut String) {
    if message.len() > MESSAGE_MAX {
        let end = (0..=MESSAGE_MAX - 3).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        message.push_str("...");
    }
}

fn event(source: &EventSource, happening: &Happening, series: &Series, now: Timestamp) -> Value {
    let about = &happening.about;
    let namespace = about.namespace.as_deref().unwrap_or("default");
    let mut event = json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": { "name": series.name, "namespace": namespace },
        "involvedObject": about,
        "reason": happening.reason,
        "message": happening.message,
        "type": if happening.warning { "Warning" } else { "Normal" },
        "reportingComponent": source.component,
        "reportingInstance": source.host,
    });
    if let Some(related) = &happening.related {
        event["related"] = json!(related);
    }
    if !happening.action.is_empty() {
        event["action"] = happening.action.clone().into();
    }
    if source.series {
        event["source"] = json!({});
        event["firstTimestamp"] = Value::Null;
        event["lastTimestamp"] = Value::Null;
        event["eventTime"] = format_micros(series.first).into();
        if source.host.is_empty() {
            event["reportingInstance"] = source.component.clone().into();
        }
        if series.count > 1 {
            event["series"] = json!({ "count": series.count, "lastObservedTime": format_micros(now) });
        }
    } else {
        event["source"] = match source.host.as_str() {
            "" => json!({ "component": source.component }),
            host => json!({ "component": source.component, "host": host }),
        };
        event["count"] = series.count.into();
        event["firstTimestamp"] = format_seconds(series.first).into();
        event["lastTimestamp"] = format_seconds(now).into();
        event["eventTime"] = Value::Null;
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    fn correlator(series: bool) -> Correlator {
        let host = if series { "" } else { "n1" };
        Correlator::new(EventSource { component: "test".to_owned(), host: host.to_owned(), series })
    }

    fn happening(reason: &str, message: &str) -> Happening {
        let about = ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: Some("ns".to_owned()),
            name: Some("web".to_owned()),
            ..ObjectReference::default()
        };
        Happening { about, reason: reason.to_owned(), message: message.to_owned(), ..Happening::default() }
    }

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    #[test]
    fn a_repeated_event_counts_up() {
        let mut correlator = correlator(false);
        let at = Instant::now();
        let first = correlator.correlate(happening("A", "x"), time(0), at).unwrap();
        assert!(first.patch.is_none());
        assert_eq!(first.namespace, "ns");
        assert_eq!(first.event["count"], 1);
        assert_eq!(first.event["source"], json!({"component": "test", "host": "n1"}));
        assert_eq!(first.event["firstTimestamp"], "2023-11-14T22:13:20Z");
        let second = correlator.correlate(happening("A", "x"), time(5), at).unwrap();
        assert_eq!(second.name, first.name);
        assert_eq!(
            second.patch,
            Some(json!({"count": 2, "lastTimestamp": "2023-11-14T22:13:25Z", "message": "x"}))
        );
        let other = correlator.correlate(happening("B", "x"), time(5), at).unwrap();
        assert!(other.patch.is_none());
        assert_ne!(other.name, first.name);
    }

    #[test]
    fn newer_components_write_series() {
        let mut correlator = correlator(true);
        let at = Instant::now();
        let first = correlator.correlate(happening("A", "x"), time(0), at).unwrap();
        assert_eq!(first.event["eventTime"], "2023-11-14T22:13:20.000000Z");
        assert_eq!(first.event["reportingInstance"], "test");
        assert_eq!(first.event.get("series"), None);
        let second = correlator.correlate(happening("A", "x"), time(1), at).unwrap();
        assert_eq!(
            second.patch,
            Some(json!({"series": {"count": 2, "lastObservedTime": "2023-11-14T22:13:21.000000Z"}}))
        );
    }

    #[test]
    fn many_alike_are_combined() {
        let mut correlator = correlator(false);
        let at = Instant::now();
        for n in 0..9 {
            let step = correlator.correlate(happening("A", &n.to_string()), time(n), at).unwrap();
            assert!(step.patch.is_none(), "{n}");
        }
        let tenth = correlator.correlate(happening("A", "ten"), time(10), at).unwrap();
        assert_eq!(tenth.event["message"], "(combined from similar events): ten");
        let next = correlator.correlate(happening("A", "eleven"), time(11), at).unwrap();
        assert_eq!(next.name, tenth.name);
        assert_eq!(next.patch.unwrap()["message"], "(combined from similar events): eleven");
        let later = at + GROUP_SPAN + Duration::from_secs(1);
        let later = correlator.correlate(happening("A", "twelve"), time(700), later).unwrap();
        assert_eq!(later.event["message"], "twelve");
    }

    #[test]
    fn a_flood_about_one_object_is_cut_off() {
        let mut correlator = correlator(false);
        let at = Instant::now();
        let told =
            (0..100).filter(|_| correlator.correlate(happening("A", "x"), time(0), at).is_some()).count();
        assert_eq!(told, 25);
        let mut other = happening("A", "x");
        other.about.name = Some("api".to_owned());
        assert!(correlator.correlate(other, time(0), at).is_some());
        assert!(
            correlator.correlate(happening("A", "x"), time(301), at + Duration::from_secs(301)).is_some()
        );
        assert!(
            correlator.correlate(happening("A", "x"), time(302), at + Duration::from_secs(302)).is_none()
        );
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let mut message = "é".repeat(600);
        shorten(&mut message);
        assert!(message.len() <= MESSAGE_MAX && message.ends_with("é..."));
    }
}
