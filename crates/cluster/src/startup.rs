//! What a starting server tells whoever waits for it: over its standard output to the `up` that started it, over
//! the control socket to others.

use std::io::Write;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How far a server is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// What it is doing now, such as `Starting the API server`.
    Step(String),
    /// The API answers and the node is Ready.
    Ready,
    /// It gave up, and why.
    Failed(String),
}

/// The server's side: says how far it is to all who wait.
#[derive(Debug, Clone)]
pub struct Progress(watch::Sender<Stage>);

impl Default for Progress {
    fn default() -> Self {
        Progress(watch::Sender::new(Stage::Step("Starting".to_owned())))
    }
}

impl Progress {
    pub fn step(&self, text: &str) {
        tracing::info!(step = text, "Startup");
        self.0.send_replace(Stage::Step(text.to_owned()));
    }

    pub fn ready(&self) {
        self.0.send_replace(Stage::Ready);
    }

    pub fn subscribe(&self) -> watch::Receiver<Stage> {
        self.0.subscribe()
    }

    pub fn stage(&self) -> Stage {
        self.0.borrow().clone()
    }

    /// Writes every stage as a line to standard output until the server is ready; then the reader sees the end.
    pub async fn report(self) {
        let mut stages = self.subscribe();
        loop {
            let stage = stages.borrow_and_update().clone();
            write_stage(&stage);
            if stage == Stage::Ready {
                break;
            }
            if stages.changed().await.is_err() {
                return;
            }
        }
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    }
}

/// One stage as a line on standard output. That nobody listens any more is no reason to stop.
pub fn write_stage(stage: &Stage) {
    let mut line = serde_json::to_vec(stage).expect("a stage serialises");
    line.push(b'\n');
    let mut out = std::io::stdout();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}
