//! Kills the server at random moments while writers write, and checks after each restart that nothing that was
//! acknowledged is missing and that revisions never go back.
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use k8s_openapi::api::core::v1::ConfigMap;
use minke_api::{Kind, Object, Revision};
use minke_client::https::HttpsClient;
use minke_client::{Client, DeleteOptions, ListOptions, Target};
use minke_cluster::kubeconfig;
use minke_scenarios::process::start_server;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

const NAMESPACE: &str = "default";
const WRITERS: usize = 16;
const NAMES_EACH: usize = 8;
/// How long the writers write before the server is killed, in milliseconds.
const BEFORE_KILL: std::ops::Range<u64> = 5..600;

/// Check that the server loses nothing it acknowledged when it is killed.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "target/debug/minke")]
    minke: PathBuf,
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Where randomness starts; a failure prints it
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| rand::rng().random());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match runtime.block_on(run(&args, seed)) {
        Ok(()) => {
            println!("crash: {} passed, 0 failed", args.rounds);
            Ok(ExitCode::SUCCESS)
        }
        Err((round, error)) => {
            println!("FAILED  round {round} with --seed {seed}: {error:#}");
            println!("crash: {round} passed, 1 failed");
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn run(args: &Args, seed: u64) -> Result<(), (u32, anyhow::Error)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::Builder::new().prefix("minke-crash-").tempdir().map_err(|error| (0, error.into()))?;
    let mut ledger = Ledger::default();
    let mut written = 0;
    for round in 0..args.rounds {
        let outcome = one_round(&args.minke, dir.path(), &mut ledger, &mut rng).await;
        written += outcome.map_err(|error| (round, error))?;
    }
    // What the last kill left is looked at as well.
    let last = async {
        let mut server = start_server(&args.minke, &dir.path().join("data"), dir.path())?;
        let checked = ledger.check(&*client(dir.path())?).await;
        server.kill()?;
        server.wait()?;
        checked
    };
    last.await.map_err(|error| (args.rounds, error))?;
    println!("{written} acknowledged writes in {} rounds are all there", args.rounds);
    Ok(())
}

/// The number of writes that were acknowledged.
async fn one_round(minke: &Path, dir: &Path, ledger: &mut Ledger, rng: &mut StdRng) -> Result<usize> {
    let mut server = start_server(minke, &dir.join("data"), dir)?;
    let client = client(dir)?;
    ledger.check(&*client).await?;
    let shared = Arc::new(Mutex::new(std::mem::take(ledger)));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            tokio::spawn(write(client.clone(), shared.clone(), writer, StdRng::seed_from_u64(rng.random())))
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(rng.random_range(BEFORE_KILL))).await;
    server.kill()?;
    server.wait()?;
    let mut written = 0;
    for writer in writers {
        written += writer.await??;
    }
    *ledger = std::mem::take(&mut *shared.lock().expect("no writer panics"));
    Ok(written)
}

fn client(dir: &Path) -> Result<Arc<dyn Client>> {
    Ok(Arc::new(HttpsClient::new(&kubeconfig::identity(&dir.join("data/kubeconfig"))?)?))
}

/// What an object may be: its value, or absent.
type Value = Option<u64>;

/// What was acknowledged, and what was under way when the server went.
#[derive(Default)]
struct Ledger {
    objects: BTreeMap<String, Entry>,
    /// The highest revision anyone was told.
    revision: Revision,
}

#[derive(Default, Clone)]
struct Entry {
    acknowledged: Value,
    under_way: Option<Value>,
}

impl Ledger {
    async fn check(&mut self, client: &dyn Client) -> Result<()> {
        let list = client.list(Kind::of::<ConfigMap>(), NAMESPACE, ListOptions::default()).await?;
        ensure!(
            list.revision >= self.revision,
            "revision {} after {} was told",
            list.revision,
            self.revision
        );
        let mut found: BTreeMap<&str, u64> =
            list.items.iter().filter_map(|object| Some((object.name(), value_of(object)?))).collect();
        for (name, entry) in &mut self.objects {
            let now = found.remove(name.as_str());
            ensure!(
                now == entry.acknowledged || entry.under_way == Some(now),
                "{name} is {now:?}; acknowledged is {:?}, under way was {:?}",
                entry.acknowledged,
                entry.under_way
            );
            *entry = Entry { acknowledged: now, under_way: None };
        }
        ensure!(found.is_empty(), "nobody wrote {found:?}");
        self.revision = list.revision;
        Ok(())
    }
}

fn value_of(object: &Object) -> Option<u64> {
    object.value()["data"]["value"].as_str()?.parse().ok()
}

/// Writes until the server goes; the number of acknowledged writes.
async fn write(
    client: Arc<dyn Client>,
    ledger: Arc<Mutex<Ledger>>,
    writer: usize,
    mut rng: StdRng,
) -> Result<usize> {
    let kind = Kind::of::<ConfigMap>();
    let mut acknowledged = 0;
    loop {
        let name = format!("w{writer}-{}", rng.random_range(0..NAMES_EACH));
        let next = if rng.random_bool(0.2) { None } else { Some(rng.random_range(0..u64::MAX)) };
        let before = {
            let mut ledger = ledger.lock().expect("no writer panics");
            let entry = ledger.objects.entry(name.clone()).or_default();
            entry.under_way = Some(next);
            entry.acknowledged
        };
        let target = Target::object(kind, NAMESPACE, &name);
        let body = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": NAMESPACE},
            "data": {"value": next.unwrap_or_default().to_string(), "padding": "x".repeat(rng.random_range(0..4000))},
        });
        let outcome = match (before, next) {
            (None, None) => continue,
            (Some(_), None) => client.delete(target, DeleteOptions::default()).await.map(|()| None),
            (None, Some(_)) => client.create(target, body).await.map(|object| Some(object.revision())),
            (Some(_), Some(_)) => client.update(target, body).await.map(|object| Some(object.revision())),
        };
        let revision = match outcome {
            Ok(revision) => revision,
            // The connection broke: whether the write was carried out is not known.
            Err(error) if error.code == 503 || error.code == 504 => return Ok(acknowledged),
            Err(error) => bail!("{name}: {error}"),
        };
        let mut ledger = ledger.lock().expect("no writer panics");
        ledger.objects.insert(name, Entry { acknowledged: next, under_way: None });
        ledger.revision = ledger.revision.max(revision.unwrap_or_default());
        acknowledged += 1;
    }
}
