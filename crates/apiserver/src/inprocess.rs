//! The way in for components of this process: the registry itself, without HTTP, under the component's
//! own identity and with the same authorization and admission as everyone.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use minke_api::{Kind, Object, Revision, Status};
use minke_client::{
    Client, DeleteOptions, List, ListOptions, Patch, Target, WatchEvent, WatchOptions, WatchStream,
};
use minke_store::Change;
use serde_json::Value;

use crate::registry::{self, Call, Feed, Item, ListQuery, Registry, Validation, WatchQuery, shown};
use crate::{Attributes, UserInfo};

pub struct InProcess {
    registry: Arc<Registry>,
    user: UserInfo,
}

impl InProcess {
    pub fn new(registry: Arc<Registry>, user: UserInfo) -> InProcess {
        InProcess { registry, user }
    }

    /// The call, if the user may make it.
    fn call<'a>(&'a self, verb: &str, target: Target<'a>) -> Result<Call<'a>, Status> {
        let Target { kind, namespace, name, subresource } = target;
        let attributes = Attributes::of(verb, kind, subresource, namespace, name);
        self.registry.authorizer.require(&self.user, &attributes)?;
        let read = kind.has_verb("list") && matches!(verb, "get" | "list");
        if !kind.is_stored() && !matches!(verb, "create") && !read {
            return Err(Status::method_not_allowed());
        }
        Ok(Call {
            user: &self.user,
            kind,
            namespace,
            name,
            subresource,
            dry_run: false,
            validation: Validation::Strict,
        })
    }
}

#[async_trait]
impl Client for InProcess {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        self.registry.get(&self.call("get", target)?).await
    }

    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status> {
        let name = options.fields.requires("metadata.name").unwrap_or_default().to_owned();
        let call = self.call("list", Target::object(kind, namespace, &name))?;
        let query = ListQuery {
            labels: options.labels,
            fields: options.fields,
            limit: options.limit,
            continue_: options.continue_,
            ..ListQuery::default()
        };
        let page = self.registry.list(&Call { name: "", ..call }, &query).await?;
        Ok(List { revision: page.revision, items: page.items, continue_: page.continue_ })
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status> {
        let name = options.fields.requires("metadata.name").unwrap_or_default().to_owned();
        let call = self.call("watch", Target::object(kind, namespace, &name))?;
        let query = WatchQuery {
            labels: options.labels,
            fields: options.fields,
            revision: Some(options.from),
            ..WatchQuery::default()
        };
        let feed = self.registry.watch(&Call { name: "", ..call }, &query).await?;
        Ok(events(feed).boxed())
    }

    async fn create(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        let call = self.call("create", target)?;
        if Registry::is_posted(target.kind, target.subresource) {
            return Err(Status::bad_request(format!("{} is posted, not created", target.kind.kind)));
        }
        Ok(self.registry.create(&call, body.into()).await?.object)
    }

    async fn post(&self, target: Target<'_>, body: Value) -> Result<Value, Status> {
        let call = self.call("create", target)?;
        if !Registry::is_posted(target.kind, target.subresource) {
            return Err(Status::method_not_allowed());
        }
        let (_, answer) = self.registry.post(&call, body.into(), &mut Vec::new()).await?;
        Ok(answer)
    }

    async fn update(&self, target: Target<'_>, body: Value) -> Result<Arc<Object>, Status> {
        let call = self.call("update", target)?;
        Ok(self.registry.update_part(&call, body.into()).await?.object)
    }

    async fn patch(&self, target: Target<'_>, patch: Patch) -> Result<Arc<Object>, Status> {
        let call = self.call("patch", target)?;
        let patch = match patch {
            Patch::Json(value) => registry::Patch::Json(value.into()),
            Patch::Merge(value) => registry::Patch::Merge(value.into()),
            Patch::Strategic(value) => registry::Patch::Strategic(value.into()),
        };
        Ok(self.registry.patch(&call, &patch).await?.object)
    }

    async fn delete(&self, target: Target<'_>, options: DeleteOptions) -> Result<(), Status> {
        let call = self.call("delete", target)?;
        self.registry.delete(&call, &options).await.map(drop)
    }
}

/// A feed as a stream of events, which ends with the error that ends the feed. What is outside of the
/// selection becomes a bookmark, so that whoever waits for a revision sees it pass.
fn events(feed: Feed) -> impl futures_util::Stream<Item = Result<WatchEvent, Status>> + Send + 'static {
    let rounds = stream::unfold(Some(feed), |feed| async move {
        let mut feed = feed?;
        match feed.next().await {
            Ok((items, revision)) => {
                let mut told = Revision(0);
                let mut round: Vec<_> = items
                    .into_iter()
                    .map(|item| {
                        let event = event(item);
                        if let WatchEvent::Added(object)
                        | WatchEvent::Modified(object)
                        | WatchEvent::Deleted(object) = &event
                        {
                            told = object.revision();
                        }
                        Ok(event)
                    })
                    .collect();
                if told < revision {
                    round.push(Ok(WatchEvent::Bookmark(revision)));
                }
                Some((stream::iter(round), Some(feed)))
            }
            Err(status) => Some((stream::iter(vec![Err(status)]), None)),
        }
    });
    rounds.flatten()
}

fn event(item: Item) -> WatchEvent {
    let (seen, object) = match item {
        Item::Bookmark { revision, .. } => return WatchEvent::Bookmark(revision),
        Item::Object(seen, object) => (seen, object),
        Item::Event(seen, event) => (seen, shown(seen, &event)),
    };
    match seen {
        Change::Added => WatchEvent::Added(object),
        Change::Modified => WatchEvent::Modified(object),
        Change::Deleted => WatchEvent::Deleted(object),
    }
}
