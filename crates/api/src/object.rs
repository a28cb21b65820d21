//! Objects: encoded once, when they are written, and from then on immutable.
//!
//! An [`Object`] is a header (what selectors, indexes and the garbage collector need) and its JSON bytes.
//! The store, every watcher and every in-process reader hold the same `Arc<Object>`. Nothing on a read
//! path parses or prints JSON; [`Object::view`] makes a typed view once for all readers of the current revision.
//!
//! The bytes always begin `{"kind":K,"apiVersion":V,"metadata":{"resourceVersion":"N"`, so that a commit,
//! which alone knows N, splices it into a [`Draft`] without looking at the rest.

use std::any::Any;
use std::cmp::Ordering;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::{ApiType, Kind};

/// Counts every write in the cluster; an object's resourceVersion is the count at its last write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for Revision {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Revision, Self::Err> {
        text.parse().map(Revision)
    }
}

/// Namespace and name; the namespace of cluster-scoped objects is empty. Orders as lists are ordered.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(namespace: &str, name: &str) -> Key {
        Key { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    /// `namespace/name`, or the name alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// Labels, sorted by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (&**k, &**v))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Labels {
        let mut pairs: Vec<(Box<str>, Box<str>)> =
            pairs.into_iter().map(|(k, v)| (k.into(), v.into())).collect();
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|a, b| a.0 == b.0);
        Labels(pairs.into())
    }
}

/// One entry of `metadata.ownerReferences`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerReference {
    pub api_version: Box<str>,
    pub kind: Box<str>,
    pub name: Box<str>,
    pub uid: Box<str>,
    pub controller: bool,
    pub block_owner_deletion: bool,
}

/// What an object's metadata says, without its revision.
#[derive(Debug, Clone)]
struct Header {
    kind: &'static Kind,
    key: Key,
    uid: Arc<str>,
    generation: i64,
    labels: Labels,
    fields: Box<[Option<Box<str>>]>,
    owners: Box<[OwnerReference]>,
    finalizers: Box<[Box<str>]>,
    created: Option<Timestamp>,
    deleted: Option<Timestamp>,
}

/// An object encoded but for its revision, ready for a commit.
#[derive(Debug, Clone)]
pub struct Draft {
    header: Header,
    /// Everything after the resourceVersion, which is the first member of the metadata.
    tail: Bytes,
}

/// An immutable object: header and JSON bytes.
pub struct Object {
    header: Header,
    revision: Revision,
    json: Bytes,
    /// Length of `json` up to and with the resourceVersion.
    tail_at: usize,
    view: Mutex<View>,
}

/// What is kept of the typed views that were asked for.
enum View {
    None,
    Made(Arc<dyn Any + Send + Sync>),
    /// There is a newer revision: a view that someone still wants is made for him alone.
    Superseded,
}

/// Why a value cannot be an object.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("an object is a JSON object with metadata")]
    NotAnObject,
    #[error("metadata.name is missing")]
    NoName,
    #[error("metadata.resourceVersion is not a decimal number")]
    BadRevision,
}

impl Draft {
    /// Encodes `value`. Its `kind` and `apiVersion` become those of `kind`; its resourceVersion is left out.
    pub fn new(kind: &'static Kind, value: &Value) -> Result<Draft, EncodeError> {
        let top = value.as_object().ok_or(EncodeError::NotAnObject)?;
        let metadata = top.get("metadata").and_then(Value::as_object).ok_or(EncodeError::NotAnObject)?;
        let header = Header::read(kind, value, metadata)?;
        let mut tail = Vec::with_capacity(1024);
        for (name, value) in metadata.iter().filter(|(name, _)| *name != "resourceVersion") {
            write_member(&mut tail, name, value)?;
        }
        tail.push(b'}');
        for (name, value) in
            top.iter().filter(|(name, _)| !matches!(name.as_str(), "kind" | "apiVersion" | "metadata"))
        {
            write_member(&mut tail, name, value)?;
        }
        tail.push(b'}');
        // The name is there, so something follows the first comma.
        Ok(Draft { header, tail: Bytes::from(tail).slice(1..) })
    }

    pub fn kind(&self) -> &'static Kind {
        self.header.kind
    }

    pub fn key(&self) -> &Key {
        &self.header.key
    }

    /// Bytes of the encoded object, but for the few digits of its revision.
    pub fn size(&self) -> usize {
        self.tail.len() + prefix(self.header.kind).len()
    }

    /// Whether `object` holds exactly this, revision aside: writing the draft would change nothing.
    pub fn same_as(&self, object: &Object) -> bool {
        self.header.kind == object.header.kind && self.tail == object.json[object.tail_at..]
    }

    /// The object this becomes when it is written at `revision`.
    pub fn seal(self, revision: Revision) -> Object {
        Object::assemble(self.header, &self.tail, revision)
    }
}

fn write_member(out: &mut Vec<u8>, name: &str, value: &Value) -> Result<(), serde_json::Error> {
    out.push(b',');
    serde_json::to_writer(&mut *out, name)?;
    out.push(b':');
    serde_json::to_writer(out, value)
}

fn prefix(kind: &Kind) -> String {
    format!(r#"{{"kind":"{}","apiVersion":"{}","metadata":{{"#, kind.kind, kind.api_version())
}

impl Header {
    fn read(
        kind: &'static Kind,
        value: &Value,
        metadata: &Map<String, Value>,
    ) -> Result<Header, EncodeError> {
        let text = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default();
        let time = |name: &str| metadata.get(name).and_then(Value::as_str).and_then(|t| t.parse().ok());
        let list = |name: &str| metadata.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        if text("name").is_empty() {
            return Err(EncodeError::NoName);
        }
        Ok(Header {
            kind,
            key: Key::new(text("namespace"), text("name")),
            uid: text("uid").into(),
            generation: metadata.get("generation").and_then(Value::as_i64).unwrap_or_default(),
            labels: match metadata.get("labels").and_then(Value::as_object) {
                Some(labels) => {
                    labels.iter().map(|(k, v)| (k.as_str(), v.as_str().unwrap_or_default())).collect()
                }
                None => Labels::default(),
            },
            fields: kind.fields.iter().map(|path| field_text(kind, value, path)).collect(),
            owners: list("ownerReferences").iter().map(OwnerReference::read).collect(),
            finalizers: list("finalizers").iter().filter_map(Value::as_str).map(Into::into).collect(),
            created: time("creationTimestamp"),
            deleted: time("deletionTimestamp"),
        })
    }
}

impl OwnerReference {
    fn read(value: &Value) -> OwnerReference {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().into();
        let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or_default();
        OwnerReference {
            api_version: text("apiVersion"),
            kind: text("kind"),
            name: text("name"),
            uid: text("uid"),
            controller: flag("controller"),
            block_owner_deletion: flag("blockOwnerDeletion"),
        }
    }
}

/// A selectable field as field selectors compare it: text, with numbers and booleans printed, and what is
/// absent as its zero value prints in upstream's typed objects.
fn field_text(kind: &Kind, value: &Value, path: &str) -> Option<Box<str>> {
    // The core Event selects on `source`, which is source.component, or the newer reportingComponent.
    if kind.kind == "Event" && path == "source" {
        let component = value.pointer("/source/component").and_then(Value::as_str).filter(|s| !s.is_empty());
        let reporting = value.get("reportingComponent").and_then(Value::as_str);
        return component.or(reporting).map(Into::into);
    }
    if path == "status.podIPs" {
        let ips = value.pointer("/status/podIPs").and_then(Value::as_array)?;
        let ips: Vec<&str> = ips.iter().filter_map(|ip| ip.get("ip")?.as_str()).collect();
        return Some(ips.join(",").into());
    }
    if let Some(name) = path.strip_prefix("metadata.annotations.") {
        return value.get("metadata")?.get("annotations")?.get(name)?.as_str().map(Into::into);
    }
    let found = path.split('.').try_fold(value, |at, name| at.get(name));
    match found {
        Some(Value::String(text)) => Some(text.as_str().into()),
        Some(Value::Bool(flag)) => Some(if *flag { "true" } else { "false" }.into()),
        Some(Value::Number(number)) => Some(number.to_string().into()),
        _ => match path {
            "spec.unschedulable" | "spec.hostNetwork" => Some("false".into()),
            "status.replicas" | "status.successful" => Some("0".into()),
            _ => None,
        },
    }
}

impl Object {
    fn assemble(header: Header, tail: &[u8], revision: Revision) -> Object {
        let mut json = prefix(header.kind).into_bytes();
        json.reserve_exact(tail.len() + 42);
        // What was never stored has no revision.
        if revision != Revision(0) {
            json.extend_from_slice(br#""resourceVersion":""#);
            json.extend_from_slice(itoa::Buffer::new().format(revision.0).as_bytes());
            json.extend_from_slice(br#"","#);
        }
        let tail_at = json.len();
        json.extend_from_slice(tail);
        Object { header, revision, json: json.into(), tail_at, view: Mutex::new(View::None) }
    }

    /// Reads an object that was encoded by anyone: our own store, or another API server.
    pub fn decode(kind: &'static Kind, json: &[u8]) -> Result<Object, EncodeError> {
        Object::from_value(kind, &serde_json::from_slice(json)?)
    }

    /// As [`Object::decode`], from a parsed value.
    pub fn from_value(kind: &'static Kind, value: &Value) -> Result<Object, EncodeError> {
        let revision = match value.pointer("/metadata/resourceVersion").and_then(Value::as_str) {
            None | Some("") => Revision(0),
            Some(text) => text.parse().map_err(|_| EncodeError::BadRevision)?,
        };
        Ok(Draft::new(kind, value)?.seal(revision))
    }

    /// The same object as of another revision, as a deletion event shows it.
    pub fn at_revision(&self, revision: Revision) -> Object {
        Object::assemble(self.header.clone(), &self.json[self.tail_at..], revision)
    }

    pub fn kind(&self) -> &'static Kind {
        self.header.kind
    }

    pub fn key(&self) -> &Key {
        &self.header.key
    }

    pub fn namespace(&self) -> &str {
        &self.header.key.namespace
    }

    pub fn name(&self) -> &str {
        &self.header.key.name
    }

    pub fn uid(&self) -> &str {
        &self.header.uid
    }

    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn generation(&self) -> i64 {
        self.header.generation
    }

    pub fn labels(&self) -> &Labels {
        &self.header.labels
    }

    /// A selectable field by its path; `None` when the object has no value there or the kind no such field.
    pub fn field(&self, path: &str) -> Option<&str> {
        match path {
            "metadata.name" => Some(self.name()),
            "metadata.namespace" => Some(self.namespace()),
            _ => {
                let at = self.header.kind.fields.iter().position(|field| *field == path)?;
                self.header.fields[at].as_deref()
            }
        }
    }

    pub fn owners(&self) -> &[OwnerReference] {
        &self.header.owners
    }

    /// The owner that manages this object, if any.
    pub fn controller(&self) -> Option<&OwnerReference> {
        self.header.owners.iter().find(|owner| owner.controller)
    }

    pub fn finalizers(&self) -> impl Iterator<Item = &str> {
        self.header.finalizers.iter().map(|f| &**f)
    }

    pub fn created(&self) -> Option<Timestamp> {
        self.header.created
    }

    /// When the object was asked to go away; it stays until its finalizers and grace period are done.
    pub fn deleted(&self) -> Option<Timestamp> {
        self.header.deleted
    }

    /// The object's JSON, as it goes on the wire.
    pub fn json(&self) -> &Bytes {
        &self.json
    }

    /// The object parsed into a tree, for those who change it. Parses each time.
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.json).expect("an object's bytes were encoded by us")
    }

    /// The typed view, parsed on first use and then shared by all who ask for the same type, until there is a
    /// newer revision.
    pub fn view<T: ApiType>(&self) -> Result<Arc<T>, serde_json::Error> {
        // The lock is held while the first one parses, so that the others wait instead of parsing as well.
        let mut kept = self.kept_view();
        if let View::Made(view) = &*kept
            && let Ok(view) = view.clone().downcast::<T>()
        {
            return Ok(view);
        }
        let view: Arc<T> = Arc::new(T::from_json(&self.json)?);
        // Someone may have been first with another type; then this one is just not kept.
        if matches!(*kept, View::None) {
            *kept = View::Made(view.clone());
        }
        Ok(view)
    }

    /// Says that there is a newer revision: the typed view is given up by all who do not hold it. What is kept of
    /// the past, for watches that resume, is bytes.
    pub fn supersede(&self) {
        *self.kept_view() = View::Superseded;
    }

    fn kept_view(&self) -> std::sync::MutexGuard<'_, View> {
        // Parsing may panic in a type's own code; what is kept is whole nevertheless.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} @{}", self.header.kind.qualified_plural(), self.header.key, self.revision)
    }
}

impl PartialEq for Object {
    fn eq(&self, other: &Object) -> bool {
        self.header.kind == other.header.kind && self.json == other.json
    }
}

impl PartialOrd for Object {
    fn partial_cmp(&self, other: &Object) -> Option<Ordering> {
        Some(self.key().cmp(other.key()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": "web", "namespace": "default", "uid": "u1", "resourceVersion": "7",
                "labels": {"resourceVersion": "9", "app": "web"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "u0", "controller": true}],
                "creationTimestamp": "2026-01-02T03:04:05Z",
            },
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"podIPs": [{"ip": "10.0.0.1"}]},
        })
    }

    fn kind() -> &'static Kind {
        Kind::by_plural("", "v1", "pods").unwrap()
    }

    #[test]
    fn sealing_splices_the_revision_and_changes_nothing_else() {
        let object = Draft::new(kind(), &pod()).unwrap().seal(Revision(1234));
        let mut want = pod();
        want["metadata"]["resourceVersion"] = "1234".into();
        assert_eq!(object.value(), want);
        assert!(object.json().starts_with(
            br#"{"kind":"Pod","apiVersion":"v1","metadata":{"resourceVersion":"1234","creationTimestamp":"#
        ));
        assert_eq!(object.at_revision(Revision(5)).value()["metadata"]["resourceVersion"], "5");
    }

    #[test]
    fn a_draft_knows_when_it_would_change_nothing() {
        let object = Object::from_value(kind(), &pod()).unwrap();
        assert_eq!(object.revision(), Revision(7));
        assert!(Draft::new(kind(), &object.value()).unwrap().same_as(&object));
        let mut other = pod();
        other["metadata"]["labels"]["app"] = "api".into();
        assert!(!Draft::new(kind(), &other).unwrap().same_as(&object));
    }

    #[test]
    fn the_header_answers_what_selectors_ask() {
        let object = Object::from_value(kind(), &pod()).unwrap();
        assert_eq!(object.labels().get("app"), Some("web"));
        assert_eq!(object.labels().get("none"), None);
        assert_eq!(object.field("spec.nodeName"), Some("n1"));
        assert_eq!(object.field("spec.hostNetwork"), Some("false"));
        assert_eq!(object.field("status.podIPs"), Some("10.0.0.1"));
        assert_eq!(object.field("metadata.name"), Some("web"));
        assert_eq!(object.controller().map(|owner| &*owner.uid), Some("u0"));
        assert_eq!(object.key().to_string(), "default/web");
    }

    #[test]
    fn a_typed_view_is_made_once() {
        let object = Object::from_value(kind(), &pod()).unwrap();
        let first = object.view::<k8s_openapi::api::core::v1::Pod>().unwrap();
        let second = object.view::<k8s_openapi::api::core::v1::Pod>().unwrap();
        assert!(Arc::ptr_eq(&first, &second));
    }

    #[test]
    fn views_of_the_past_are_not_kept() {
        let object = Object::from_value(kind(), &pod()).unwrap();
        let first = object.view::<k8s_openapi::api::core::v1::Pod>().unwrap();
        object.supersede();
        assert_eq!(Arc::strong_count(&first), 1);
        let second = object.view::<k8s_openapi::api::core::v1::Pod>().unwrap();
        assert_eq!((&first, Arc::strong_count(&second)), (&second, 1));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            json!([]),
            json!({}),
            json!({"metadata": {}}),
            json!({"metadata": {"name": "a", "resourceVersion": "x"}}),
        ] {
            assert!(Object::from_value(kind(), &bad).is_err(), "{bad}");
        }
    }
}
