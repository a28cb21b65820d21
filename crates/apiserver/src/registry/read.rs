//! Get and list.

use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use minke_api::{Key, Kind, Object, Revision, Status};
use minke_store::Snapshot;

use super::options::{Token, too_large};
use super::{Call, ListQuery, Match, Page, Registry, convert, store_status};
use crate::usage::{self, Usage};

/// How long a reader may wait for a revision of the future.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a list or watch selects.
pub struct Selection<'a> {
    pub kind: &'static Kind,
    pub labels: &'a minke_api::LabelSelector,
    pub fields: &'a minke_api::FieldSelector,
}

impl Selection<'_> {
    pub fn is_everything(&self) -> bool {
        self.labels.is_everything() && self.fields.is_everything()
    }

    /// The object as the asker sees it, if it is selected.
    pub fn select(&self, object: &Arc<Object>) -> Option<Arc<Object>> {
        if !self.labels.is_everything() && !self.labels.matches(object.labels()) {
            return None;
        }
        let view = convert::view(self.kind, object);
        (self.fields.is_everything() || self.fields.matches(&view)).then_some(view)
    }

    pub fn holds(&self, object: &Arc<Object>) -> bool {
        if self.is_everything() {
            return true;
        }
        self.select(object).is_some()
    }
}

impl Registry {
    /// The object as it is stored.
    pub(super) fn stored(&self, call: &Call<'_>) -> Result<Arc<Object>, Status> {
        let key = Key::new(call.namespace, call.name);
        self.store.get(call.kind.storage(), &key).ok_or_else(|| Status::not_found(call.kind, call.name))
    }

    pub async fn get(&self, call: &Call<'_>) -> Result<Arc<Object>, Status> {
        if call.kind.group == usage::GROUP {
            let usage = self.usage()?;
            return usage.get(&*self.snapshots, call, self.now()).await;
        }
        let object = self.stored(call)?;
        match call.subresource {
            "scale" => super::scale::of(&object),
            _ => Ok(convert::view(call.kind, &object)),
        }
    }

    /// Waits, for a while, until the store is at `revision`; zero is there at once.
    pub async fn not_older_than(&self, revision: Revision) -> Result<(), Status> {
        if revision <= self.store.revision() {
            return Ok(());
        }
        let reached = tokio::time::timeout(PATIENCE, self.store.reached(revision)).await;
        reached.map_err(|_| too_large(revision, self.store.revision()))
    }

    fn usage(&self) -> Result<&Usage, Status> {
        self.usage.as_ref().ok_or_else(|| Status::unavailable("this server asks no nodes"))
    }

    pub async fn list(&self, call: &Call<'_>, query: &ListQuery) -> Result<Page, Status> {
        if call.kind.group == usage::GROUP {
            return Ok(self.usage()?.list(&*self.snapshots, call, query, self.now()).await);
        }
        let kind = call.kind.storage();
        let (snapshot, after, issued) = match &query.continue_ {
            Some(token) => self.resume(kind, token)?,
            None => (self.snapshot_for(kind, query).await?, None, self.now().as_second()),
        };
        let selection = Selection { kind: call.kind, labels: &query.labels, fields: &query.fields };
        if let Some(name) = query.fields.requires("metadata.name")
            && (!call.namespace.is_empty() || !kind.namespaced)
        {
            let found = snapshot.objects.get(&Key::new(call.namespace, name));
            let items = found.and_then(|object| selection.select(object)).into_iter().collect();
            return Ok(Page { revision: snapshot.revision, items, continue_: None, remaining: None });
        }
        let start = match after {
            Some(key) => Bound::Excluded(key),
            None => Bound::Included(Key::new(call.namespace, "")),
        };
        let mut objects = snapshot
            .objects
            .range((start, Bound::Unbounded))
            .map(|(_, object)| object)
            .take_while(|object| call.namespace.is_empty() || object.namespace() == call.namespace);
        let limit = if query.limit == 0 { usize::MAX } else { query.limit };
        let everything = selection.is_everything() && call.kind == kind;
        let mut items = Vec::new();
        if everything && limit == usize::MAX && call.namespace.is_empty() {
            items.reserve_exact(snapshot.objects.len());
        }
        let mut more = None;
        for object in objects.by_ref() {
            let selected = if everything { Some(object.clone()) } else { selection.select(object) };
            let Some(selected) = selected else { continue };
            if items.len() == limit {
                more = Some(1);
                break;
            }
            items.push(selected);
        }
        let mut page = Page { revision: snapshot.revision, items, continue_: None, remaining: None };
        if let (Some(first), Some(last)) = (more, page.items.last()) {
            page.continue_ = Some(Token::new(Some(snapshot.revision), last.key(), issued).encode());
            page.remaining = selection.is_everything().then(|| first + objects.count());
        }
        Ok(page)
    }

    /// The state that a list without continuation shows.
    async fn snapshot_for(&self, kind: &'static Kind, query: &ListQuery) -> Result<Snapshot, Status> {
        let Some(revision) = query.revision.filter(|r| r.0 > 0) else { return Ok(self.store.snapshot(kind)) };
        self.not_older_than(revision).await?;
        // A page of a given revision was exact before there was a way to say so.
        let exact = match query.match_ {
            Some(match_) => match_ == Match::Exact,
            None => query.limit > 0,
        };
        if !exact {
            return Ok(self.store.snapshot(kind));
        }
        self.store.snapshot_at(kind, revision).map_err(|error| match error {
            minke_store::Error::Compacted { .. } => {
                Status::expired(format!("The resourceVersion for the provided list is too old: {revision}"))
            }
            other => store_status(other, kind, ""),
        })
    }

    /// The state and place at which a continued list goes on, and when the list began.
    fn resume(&self, kind: &'static Kind, token: &str) -> Result<(Snapshot, Option<Key>, i64), Status> {
        let token = Token::decode(token)?;
        let now = self.now();
        let snapshot = match token.revision() {
            None => return Ok((self.store.snapshot(kind), Some(token.last()), now.as_second())),
            Some(_) if token.is_too_old(now) => return Err(token.expired(now)),
            Some(revision) => self.store.snapshot_at(kind, revision).map_err(|_| token.expired(now))?,
        };
        Ok((snapshot, Some(token.last()), token.issued()))
    }
}
