//! The generic registry: the one path by which any object of any kind is read or written.
//!
//! HTTP and the clients of this process come here with the same calls. What is special to a kind is in
//! its strategy; what the cluster as a whole has to say is admission's. Nothing here knows HTTP.
//! Upstream: apiserver pkg/registry/{generic,rest}.

mod autoscaler;
mod body;
mod convert;
mod delete;
mod eviction;
mod meta;
mod options;
mod patch;
mod read;
mod resize;
mod reviews;
mod scale;
mod subresource;
mod watch;
mod write;

pub use body::{Body, Expected, Validation};
pub use meta::generate_name;
pub use options::{ListQuery, Match, Page, Token, WatchQuery, delete_options};
pub use patch::Patch;
pub use watch::shown;
pub use watch::{Feed, Item};

use std::sync::Arc;

use minke_api::{Kind, Object, Revision, Status};
use minke_client::Clock;
use minke_store::Store;

use crate::allocate::Allocator;
use crate::authn::Authenticator;
use crate::authz::Authorizer;
use crate::tokens::Tokens;
use crate::usage::Usage;
use crate::{Snapshots, UserInfo, admission};

/// A row for what is sent or told of, but is no resource of its own: `Scale`, options.
pub const fn unlisted(group: &'static str, kind: &'static str) -> Kind {
    Kind {
        group,
        version: "v1",
        kind,
        plural: "",
        singular: "",
        short: &[],
        categories: &[],
        namespaced: true,
        verbs: &[],
        subresources: &[],
        fields: &[],
        storage_version_hash: "",
        stored_as: None,
    }
}

/// The registry and what it judges by.
pub struct Registry {
    pub store: Store,
    pub clock: Clock,
    pub snapshots: Arc<dyn Snapshots>,
    pub authorizer: Arc<Authorizer>,
    pub authenticator: Arc<Authenticator>,
    pub tokens: Arc<Tokens>,
    /// What those who come with a token verify us with, in PEM.
    pub ca: String,
    pub allocator: Arc<Allocator>,
    /// None where nothing can be asked, as in tests of the registry alone.
    pub usage: Option<Usage>,
}

/// Who wants what: the part of a request that is the same for all verbs.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    pub user: &'a UserInfo,
    /// The row of the URL; the objects are kept under `kind.storage()`.
    pub kind: &'static Kind,
    /// Empty for cluster-scoped objects and for all namespaces.
    pub namespace: &'a str,
    /// Empty for collections.
    pub name: &'a str,
    /// Empty for the object itself.
    pub subresource: &'a str,
    pub dry_run: bool,
    pub validation: Validation,
}

/// What a write left behind.
#[derive(Debug, Clone)]
pub struct Written {
    pub object: Arc<Object>,
    pub created: bool,
    pub warnings: Vec<String>,
}

impl Registry {
    fn admission(&self) -> admission::Context<'_> {
        admission::Context { snapshots: &*self.snapshots, authorizer: &self.authorizer }
    }

    fn now(&self) -> jiff::Timestamp {
        self.clock.now()
    }
}

impl Call<'_> {
    fn admission<'a>(
        &'a self,
        operation: admission::Operation,
        name: &'a str,
        old: Option<&'a serde_json::Value>,
    ) -> admission::Request<'a> {
        admission::Request {
            operation,
            kind: self.kind.storage(),
            subresource: self.subresource,
            namespace: self.namespace,
            name,
            user: self.user,
            old,
        }
    }
}

/// What a caller is told of an error of the store.
fn store_status(error: minke_store::Error, kind: &Kind, name: &str) -> Status {
    use minke_store::Error;
    match error {
        Error::Conflict { .. } => Status::modified(kind, name),
        Error::Compacted { oldest, .. } => too_old(Revision(oldest.0.saturating_sub(1)), oldest),
        Error::Full | Error::Broken(_) => Status::internal(error),
        Error::Closed => Status::unavailable("the server is shutting down").retry_after(1),
    }
}

fn too_old(asked: Revision, oldest: Revision) -> Status {
    Status::expired(format!("too old resource version: {asked} ({oldest})"))
}
