//! What the scheduler does by itself: it sees the cluster as it is, and its writes are answered at once and go nowhere.

use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use minke_api::{Kind, Object, Status};
use minke_client::{Client, List, ListOptions, Target, WatchOptions, WatchStream};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Reads through `inner`; counts bindings.
pub struct Alone {
    inner: Arc<dyn Client>,
    wanted: usize,
    bindings: Mutex<Bindings>,
    done: Notify,
}

#[derive(Default)]
struct Bindings {
    count: usize,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Alone {
    pub fn new(inner: Arc<dyn Client>, wanted: usize) -> Alone {
        Alone { inner, wanted, bindings: Mutex::default(), done: Notify::new() }
    }

    /// Waits for the last binding; bindings a second since the first.
    pub async fn rate(&self) -> f64 {
        self.done.notified().await;
        let bindings = self.bindings.lock().expect("counting does not panic");
        let took =
            bindings.last.zip(bindings.first).map_or(0.0, |(last, first)| (last - first).as_secs_f64());
        self.wanted as f64 / took
    }
}

#[async_trait]
impl Client for Alone {
    async fn get(&self, target: Target<'_>) -> Result<Arc<Object>, Status> {
        self.inner.get(target).await
    }

    async fn list(&self, kind: &'static Kind, namespace: &str, options: ListOptions) -> Result<List, Status> {
        self.inner.list(kind, namespace, options).await
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        namespace: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status> {
        self.inner.watch(kind, namespace, options).await
    }

    async fn post(&self, target: Target<'_>, _: Value) -> Result<Value, Status> {
        if target.subresource == "binding" {
            let mut bindings = self.bindings.lock().expect("counting does not panic");
            let now = Instant::now();
            bindings.first.get_or_insert(now);
            bindings.last = Some(now);
            bindings.count += 1;
            if bindings.count == self.wanted {
                self.done.notify_one();
            }
        }
        Ok(json!({}))
    }
}
