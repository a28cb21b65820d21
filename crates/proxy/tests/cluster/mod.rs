//! A pretend API server for the tests of what only reads. Also used by other crates' tests.
#![allow(dead_code, reason = "each test that includes this uses a part of it")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt;
use minke_api::{Kind, Object, Revision, Status};
use minke_client::{Client, List, ListOptions, WatchEvent, WatchOptions, WatchStream};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// An API server with lists and watches and nothing else.
#[derive(Default)]
pub struct Cluster(Mutex<Contents>);

#[derive(Default)]
struct Contents {
    revision: u64,
    objects: BTreeMap<(&'static str, String), Arc<Object>>,
    watchers: Vec<(&'static str, mpsc::UnboundedSender<WatchEvent>)>,
}

impl Cluster {
    pub fn apply(&self, mut object: Value) {
        let mut contents = self.0.lock().unwrap();
        contents.revision += 1;
        object["metadata"]["resourceVersion"] = json!(contents.revision.to_string());
        let kind =
            Kind::by_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let object = Arc::new(Object::from_value(kind.unwrap(), &object).unwrap());
        let kind = object.kind().plural;
        let before = contents.objects.insert((kind, object.name().to_owned()), object.clone());
        let event = if before.is_some() { WatchEvent::Modified(object) } else { WatchEvent::Added(object) };
        contents.watchers.retain(|(of, watcher)| *of != kind || watcher.send(event.clone()).is_ok());
    }

    pub fn delete(&self, kind: &'static str, name: &str) {
        let mut contents = self.0.lock().unwrap();
        contents.revision += 1;
        let object = contents.objects.remove(&(kind, name.to_owned())).unwrap();
        let event = WatchEvent::Deleted(Arc::new(object.at_revision(Revision(contents.revision))));
        contents.watchers.retain(|(of, watcher)| *of != kind || watcher.send(event.clone()).is_ok());
    }
}

#[async_trait::async_trait]
impl Client for Cluster {
    async fn list(&self, kind: &'static Kind, _: &str, _: ListOptions) -> Result<List, Status> {
        let contents = self.0.lock().unwrap();
        let items = contents.objects.iter().filter(|((of, _), _)| *of == kind.plural);
        let items = items.map(|(_, object)| object.clone()).collect();
        Ok(List { revision: Revision(contents.revision), items, continue_: None })
    }

    async fn watch(
        &self,
        kind: &'static Kind,
        _: &str,
        options: WatchOptions,
    ) -> Result<WatchStream, Status> {
        let mut contents = self.0.lock().unwrap();
        assert_eq!(
            options.from.0, contents.revision,
            "nothing happens between list and watch in these tests"
        );
        let (sender, receiver) = mpsc::unbounded_channel();
        contents.watchers.push((kind.plural, sender));
        let events =
            futures_util::stream::unfold(receiver, async |mut events| Some((events.recv().await?, events)));
        Ok(events.map(Ok).boxed())
    }
}
