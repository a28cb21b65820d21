//! How a component reaches the cluster.
//!
//! [`Client`] is the one way in: a call into the registry when the API server runs in this process,
//! HTTPS when it does not, under the same identity, admission and authorization either way.
//! [`Informers`] keep a shared, indexed picture of what is watched; [`WorkQueue`] hands out keys.
#![forbid(unsafe_code)]

mod clock;
mod events;
pub mod https;
mod informer;
pub mod leader;
mod queue;
pub mod trusting;

pub use clock::Clock;
pub use events::{EventRecorder, EventSource, Happening, reference};
pub use informer::{Change, Informer, Informers};
pub use queue::WorkQueue;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use k8s_openapi::Resource;
use minke_api::{ApiType, FieldSelector, Kind, LabelSelector, Object, Revision, Status};
use serde_json::Value;

/// What a list selects. The default selects everything at the newest revision.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// At most this many objects; 0 means all.
    pub limit: usize,
    /// Where the previous page ended.
    pub continue_: Option<String>,
}

/// Objects of one kind as of one revision.
#[derive(Debug, Clone, Default)]
pub struct List {
    pub revision: Revision,
    pub items: Vec<Arc<Object>>,
    pub continue_: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct WatchOptions {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    /// Events after this revision.
    pub from: Revision,
}

/// What happened to an object, as a watch tells it. Selection is applied: an object that no longer
/// matches is `Deleted`.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    Added(Arc<Object>),
    Modified(Arc<Object>),
    Deleted(Arc<Object>),
    /// Nothing before this revision is still to come.
    Bookmark(Revision),
}

/// Ends with an error when the watch can't go on; `Status::is_expired` then asks for a new list.
pub type WatchStream = BoxStream<'static, Result<WatchEvent, Status>>;

/// Where a write goes: an object of a kind, or a subresource of it.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub kind: &'static Kind,
    /// Empty for cluster-scoped objects.
    pub namespace: &'a str,
    /// Empty when creating in a collection.
    pub name: &'a str,
    /// Empty for the object itself; `status`, `scale`, `binding`, ...
    pub subresource: &'a str,
}

impl<'a> Target<'a> {
    pub fn object(kind: &'static Kind, namespace: &'a str, name: &'a str) -> Target<'a> {
        Target { kind, namespace, name, subresource: "" }
    }

    pub fn of(object: &'a Object) -> Target<'a> {
        Target::object(object.kind(), object.namespace(), object.name())
    }

    pub fn collection(kind: &'static Kind, namespace: &'a str) -> Target<'a> {
        Target::object(kind, namespace, "")
    }

    #[expect(clippy::should_implement_trait, reason = "it names a subresource; nobody subtracts targets")]
    pub fn sub(self, subresource: &'a str) -> Target<'a> {
        Target { subresource, ..self }
    }
}

/// A patch, by its media type.
#[derive(Debug, Clone)]
pub enum Patch {
    Json(Value),
    Merge(Value),
    Strategic(Value),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    Background,
    Foreground,
    Orphan,
}

#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    /// Seconds; `None` leaves it to the object.
    pub grace_period: Option<i64>,
    /// Refuse (409) unless the object still has this uid.
    pub uid: Option<String>,
    /// Refuse (409) unless the object is still at this revision.
    pub revision: Option<Revision>,
    pub propagation: Option<Propagation>,
}

/// The way into the cluster, under one identity. Errors are what the API server answers; who offers only a part of
/// this refuses the rest, as a server refuses a verb.
#[expect(unused_variables, reason = "a refusal looks at nothing")]
#[async_trait]
pub trait Client: Send + Sync + 'static {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        Err(Status::method_not_allowed())
    }

    /// An empty namespace means all of them.
    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status>;

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status>;

    /// Creates an object, and returns it as it was stored.
    async fn create(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        Err(Status::method_not_allowed())
    }

    /// Posts to a subresource that answers with something other than the object
    /// (`binding`, `eviction`, `token`), or to a review; returns the answer.
    async fn post(&self, target: Target<'_>, body: Value) -> Result<Value, Status> {
        Err(Status::method_not_allowed())
    }

    /// Replaces an object or its status; the resourceVersion in `body`, if any, must be the current one.
    async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        Err(Status::method_not_allowed())
    }

    async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        Err(Status::method_not_allowed())
    }

    async fn delete(&self, target: Target<'_>, options: DeleteOptions) -> Result<(), Status> {
        Err(Status::method_not_allowed())
    }

    /// What is at a path of a group that the table of kinds does not know (`/apis/external.metrics.k8s.io/...`),
    /// with its query. The table is all that the server of this process has.
    async fn raw(&self, path: &str) -> Result<Value, Status> {
        Err(Status::no_such_resource())
    }
}

/// The typed view of a cached object. An object that does not fit its type (a field of a future
/// version, say) is logged and treated as absent, so that one such object does not stop a controller.
pub fn typed<T: Resource + ApiType>(object: &Object) -> Option<Arc<T>> {
    match object.view::<T>() {
        Ok(view) => Some(view),
        Err(error) => {
            tracing::error!(?object, %error, "Object does not fit its type");
            None
        }
    }
}

/// Delay before the `n`th retry: `base` doubled each time, at most `max`.
pub fn backoff(base: Duration, max: Duration, n: u32) -> Duration {
    base.saturating_mul(1u32.checked_shl(n.min(31)).unwrap_or(u32::MAX)).min(max)
}
