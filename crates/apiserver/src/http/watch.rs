//! Watches over HTTP: a line of JSON for each event, until the time is up.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http::Response;
use minke_api::{Kind, Object, Revision, Status};
use minke_client::Clock;
use rand::Rng;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::body::{Body, BoxError};
use super::negotiate::View;
use super::respond::{self, Style};
use crate::metrics::Gauge;
use crate::registry::{Feed, Item, shown};
use crate::views::{self, ListMeta, Tables};

/// How often a quiet watch is told where it is.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// A watch without a time of its own ends after at least this many seconds, and at most twice as many.
const DEFAULT_SECONDS: u64 = 30 * 60;

pub struct Options {
    pub bookmarks: bool,
    pub timeout: Option<Duration>,
    /// Ends all watches.
    pub stop: CancellationToken,
    pub clock: Clock,
    pub gauge: Gauge,
}

struct Watching {
    kind: &'static Kind,
    feed: Feed,
    lines: Lines,
    bookmarks: bool,
    tick: Interval,
    end: Pin<Box<Sleep>>,
    /// Held by itself, so that a thousand watchers do not meet at one lock for each event.
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    clock: Clock,
    over: bool,
    _gauge: Gauge,
}

/// How events are written.
enum Lines {
    Objects,
    Partial(String),
    /// The columns are told with the first event only.
    Table {
        tables: Tables,
        columns: bool,
    },
}

/// The answer to a watch. A watch that could not begin because its revision is gone is told so as an
/// event, as one that has to end for that reason later.
pub fn response(
    kind: &'static Kind,
    feed: Result<Feed, Status>,
    style: &Style,
    options: Options,
) -> Result<Response<Body>, Status> {
    let mut response = respond::bytes(200, style.accepted.content_type(), Bytes::new());
    let feed = match feed {
        Ok(feed) => feed,
        Err(status) if status.is_expired() => {
            *response.body_mut() = Body::Full(error_line(&status));
            return Ok(response);
        }
        Err(status) => return Err(status),
    };
    let lines = match &style.accepted.view {
        View::Object => Lines::Objects,
        View::Partial(version) => Lines::Partial(version.clone()),
        View::Table(version) => Lines::Table { tables: style.tables(kind, version), columns: true },
    };
    let timeout = options.timeout.unwrap_or_else(|| {
        Duration::from_secs(rand::rng().random_range(DEFAULT_SECONDS..=2 * DEFAULT_SECONDS))
    });
    let mut tick = tokio::time::interval_at(Instant::now() + BOOKMARK_EVERY, BOOKMARK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let watching = Watching {
        kind,
        feed,
        lines,
        bookmarks: options.bookmarks,
        tick,
        end: Box::pin(tokio::time::sleep(timeout)),
        stop: Box::pin(options.stop.child_token().cancelled_owned()),
        clock: options.clock,
        over: false,
        _gauge: options.gauge,
    };
    let chunks = stream::unfold(watching, |mut watching| async move {
        let chunk = watching.next().await?;
        Some((Ok::<_, BoxError>(chunk), watching))
    });
    *response.body_mut() = Body::Stream(chunks.boxed());
    Ok(response)
}

impl Watching {
    /// The next bytes to send; `None` when the watch is over.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.over {
            let bookmark = tokio::select! {
                biased;
                () = &mut self.stop => { self.over = true; self.bookmarks }
                () = &mut self.end => { self.over = true; self.bookmarks }
                round = self.feed.next() => match round {
                    Ok((items, _)) if items.is_empty() => false,
                    Ok((items, _)) => return Some(self.lines(items)),
                    Err(status) => {
                        self.over = true;
                        return Some(error_line(&status));
                    }
                },
                _ = self.tick.tick() => self.bookmarks,
            };
            if bookmark && let Some(revision) = self.feed.caught_up() {
                return Some(self.bookmark(revision, false));
            }
        }
        None
    }

    fn lines(&mut self, items: Vec<Item>) -> Bytes {
        let mut lines: Vec<Bytes> = items.into_iter().map(|item| self.line(item)).collect();
        if lines.len() == 1 {
            // The usual case: the very bytes that all other watchers are sent.
            return lines.remove(0);
        }
        let mut all = BytesMut::with_capacity(lines.iter().map(Bytes::len).sum());
        lines.into_iter().for_each(|line| all.put(line));
        all.freeze()
    }

    fn line(&mut self, item: Item) -> Bytes {
        let (seen, object) = match item {
            Item::Bookmark { revision, initial } => return self.bookmark(revision, initial),
            Item::Event(seen, event) => match self.lines {
                Lines::Objects => return event.frame(seen),
                _ => (seen, shown(seen, &event)),
            },
            Item::Object(seen, object) => (seen, object),
        };
        let shown = self.shown(&object);
        line(seen.as_str(), &shown)
    }

    fn shown(&mut self, object: &Arc<Object>) -> Bytes {
        match &mut self.lines {
            Lines::Objects => object.json().clone(),
            Lines::Partial(version) => views::partial(object, version).into(),
            Lines::Table { tables, columns } => {
                let meta = ListMeta { revision: object.revision(), ..ListMeta::default() };
                let columns = std::mem::take(columns);
                let now = self.clock.now();
                tables.table(std::slice::from_ref(object), &meta, columns, now).into()
            }
        }
    }

    fn bookmark(&mut self, revision: Revision, initial: bool) -> Bytes {
        let annotations = if initial { r#","annotations":{"k8s.io/initial-events-end":"true"}"# } else { "" };
        let metadata = format!(r#"{{"resourceVersion":"{revision}","creationTimestamp":null{annotations}}}"#);
        let object = match &self.lines {
            Lines::Objects => format!(
                r#"{{"kind":"{}","apiVersion":"{}","metadata":{metadata}}}"#,
                self.kind.kind,
                self.kind.api_version()
            ),
            Lines::Partial(version) => format!(
                r#"{{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/{version}","metadata":{metadata}}}"#
            ),
            Lines::Table { tables, .. } => format!(
                r#"{{"kind":"Table","apiVersion":"meta.k8s.io/{}","metadata":{{"resourceVersion":"{revision}"}},"columnDefinitions":null,"rows":[{{"cells":[],"object":{{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/{}","metadata":{metadata}}}}}]}}"#,
                tables.version, tables.version
            ),
        };
        line("BOOKMARK", object.as_bytes())
    }
}

fn line(seen: &str, object: &[u8]) -> Bytes {
    let mut line = BytesMut::with_capacity(object.len() + 32);
    line.put_slice(b"{\"type\":\"");
    line.put_slice(seen.as_bytes());
    line.put_slice(b"\",\"object\":");
    line.put_slice(object);
    line.put_slice(b"}\n");
    line.freeze()
}

fn error_line(status: &Status) -> Bytes {
    line("ERROR", &serde_json::to_vec(status).expect("a status serialises"))
}
