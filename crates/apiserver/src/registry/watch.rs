//! Watches: the events of a kind, seen through a selection.

use std::collections::VecDeque;
use std::sync::Arc;

use minke_api::{FieldSelector, Kind, LabelSelector, Object, Revision, Status};
use minke_store::{Change, Error, Event, Watch};

use super::read::Selection;
use super::{Call, Registry, WatchQuery, convert, store_status, too_old};

/// One thing that a watcher is told.
#[derive(Debug, Clone)]
pub enum Item {
    /// What happened, and how the selection sees it. The frame of the event can be sent as it is.
    Event(Change, Arc<Event>),
    /// An object of another view than the stored one, or of the present state.
    Object(Change, Arc<Object>),
    /// Everything up to this revision was told; `initial` says that this was the present state.
    Bookmark { revision: Revision, initial: bool },
}

/// A watch that is going on.
pub struct Feed {
    kind: &'static Kind,
    namespace: String,
    labels: LabelSelector,
    fields: FieldSelector,
    /// Events up to here are of no interest.
    from: Revision,
    initial: VecDeque<Item>,
    watch: Watch,
}

impl Registry {
    /// Begins a watch. A revision that is too old is an `Expired` status.
    pub async fn watch(&self, call: &Call<'_>, query: &WatchQuery) -> Result<Feed, Status> {
        let kind = call.kind.storage();
        let asked = query.revision.unwrap_or_default();
        let with_state = match query.initial {
            Some(initial) => initial,
            None => asked.0 == 0,
        };
        if with_state {
            self.not_older_than(asked).await?;
        }
        // Every node watches its own pods: they have a way that others' pods don't come by.
        let node = query.fields.requires("spec.nodeName").filter(|_| kind.fields.contains(&"spec.nodeName"));
        let mut initial = VecDeque::new();
        let (from, watch) = if with_state {
            let (snapshot, watch) = self.store.snapshot_and_watch_node(kind, node);
            let selection = Selection { kind: call.kind, labels: &query.labels, fields: &query.fields };
            let objects = snapshot
                .objects
                .range(minke_api::Key::new(call.namespace, "")..)
                .map(|(_, object)| object)
                .take_while(|object| call.namespace.is_empty() || object.namespace() == call.namespace)
                .filter_map(|object| selection.select(object));
            initial.extend(objects.map(|object| Item::Object(Change::Added, object)));
            if query.initial == Some(true) && query.bookmarks {
                initial.push_back(Item::Bookmark { revision: snapshot.revision, initial: true });
            }
            (snapshot.revision, watch)
        } else {
            let from = if asked.0 == 0 { self.store.revision() } else { asked };
            let watch = match node {
                None => self.store.watch(kind, from),
                Some(node) => self.store.watch_node(kind, from, node),
            };
            let watch = watch.map_err(|error| match error {
                Error::Compacted { oldest, .. } => too_old(from, oldest),
                other => store_status(other, kind, ""),
            })?;
            (from, watch)
        };
        Ok(Feed {
            kind: call.kind,
            namespace: call.namespace.to_owned(),
            labels: query.labels.clone(),
            fields: query.fields.clone(),
            from,
            initial,
            watch,
        })
    }
}

impl Feed {
    /// Waits for something to tell, and returns what there is; perhaps nothing, when all of it was outside
    /// of the selection: then the second value says up to where. Cancel-safe.
    pub async fn next(&mut self) -> Result<(Vec<Item>, Revision), Status> {
        if !self.initial.is_empty() {
            return Ok((self.initial.drain(..).collect(), self.from));
        }
        let events = self.watch.next().await.map_err(|error| match error {
            Error::Compacted { oldest, .. } => too_old(self.from, oldest),
            other => store_status(other, self.kind, ""),
        })?;
        let mut items = Vec::with_capacity(events.len());
        for event in events {
            let revision = event.revision();
            if revision <= self.from {
                continue;
            }
            self.from = revision;
            items.extend(self.see(event));
        }
        Ok((items, self.from))
    }

    /// Everything up to here was told, unless something is waiting to be.
    pub fn caught_up(&self) -> Option<Revision> {
        if self.initial.is_empty() { self.watch.caught_up() } else { None }
    }

    /// How the selection sees an event.
    fn see(&self, event: Arc<Event>) -> Option<Item> {
        if !self.namespace.is_empty() && event.object.namespace() != self.namespace {
            return None;
        }
        let selection = Selection { kind: self.kind, labels: &self.labels, fields: &self.fields };
        let seen = if selection.is_everything() {
            event.change
        } else {
            let now = event.change != Change::Deleted && selection.holds(&event.object);
            let before = event.old.as_ref().is_some_and(|old| selection.holds(old));
            match (before, now) {
                (false, false) => return None,
                (false, true) => Change::Added,
                (true, true) => Change::Modified,
                (true, false) => Change::Deleted,
            }
        };
        if self.kind == event.object.kind() {
            return Some(Item::Event(seen, event));
        }
        Some(Item::Object(seen, convert::view(self.kind, &shown(seen, &event))))
    }
}

/// The object that an event shows: what left a selection is shown as it last was in it.
pub fn shown(seen: Change, event: &Event) -> Arc<Object> {
    match (seen, &event.old) {
        (Change::Deleted, Some(old)) if event.change == Change::Modified => {
            Arc::new(old.at_revision(event.revision()))
        }
        _ => event.object.clone(),
    }
}
