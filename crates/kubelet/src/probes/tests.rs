use super::*;
use crate::pod::tests::pod;
use crate::testing::World;
use serde_json::{Value, json};

#[track_caller]
fn check(success: i32, failure: i32, results: &str, want: &str) {
    let mut verdict = Verdict::default();
    let got: String = results
        .chars()
        .map(|c| match verdict.take(c == '+', success, failure) {
            None => '.',
            Some(ProbeState::Success) => '+',
            Some(_) => '-',
        })
        .collect();
    assert_eq!(got, want, "{results}");
}

#[test]
fn thresholds_count_results_in_a_row() {
    check(1, 3, "+---+--+", "+..-+..+");
    check(2, 1, "++-+-++", ".+-.-.+");
    check(1, 1, "-+", "-+");
}

fn probe(kind: Kind, spec: Value, started_at: Timestamp) -> Probe {
    let field = format!("{}Probe", kind.word().to_lowercase());
    let pod = pod(json!({"spec": {"containers": [{"name": "c", field: spec}]}}));
    Probe::new(kind, &pod, "c", "id", started_at, None, "kube-probe/1.37").expect("a probe")
}

#[test]
fn the_first_turn_comes_after_the_delay_and_old_ones_are_spread() {
    let now = Timestamp::now();
    let spec = json!({"exec": {"command": ["x"]}, "initialDelaySeconds": 7, "periodSeconds": 20});
    let first =
        |age: i64| probe(Kind::Liveness, spec.clone(), now - SignedDuration::from_secs(age)).first(now);
    assert_eq!(first(0), Duration::from_secs(7));
    assert_eq!(first(5), Duration::from_secs(2));
    assert_eq!(first(20), Duration::ZERO);
    let spread: BTreeSet<Duration> = (0..50).map(|_| first(500)).collect();
    assert!(spread.len() > 40 && spread.iter().all(|wait| *wait < Duration::from_secs(20)), "{spread:?}");
}

/// Runs one probe against the runtime's answers, and returns what it told: seconds since the start and verdict.
async fn run(world: &World, kind: Kind, spec: Value, answers: &str, seconds: u64) -> Vec<(u64, ProbeState)> {
    let events = Recorder::start(world.api.clone(), "n");
    world.runtime.answer_execs(answers);
    let prober = Prober::start(world.runtime.clone(), events, Arc::default());
    let began = Instant::now();
    let (told, mut seen) = mpsc::unbounded_channel();
    let probing = prober.probe(probe(kind, spec, Timestamp::now()), move |state| {
        let _ = told.send((began.elapsed().as_secs(), state));
    });
    tokio::time::sleep(Duration::from_millis(seconds * 1000 + 500)).await;
    drop(probing);
    let mut all = vec![];
    while let Some(next) = seen.recv().await {
        all.push(next);
    }
    all
}

#[tokio::test(start_paused = true)]
async fn probes_have_their_turns_and_tell_what_is_new() {
    use ProbeState::{Failure, Success};
    let world = World::new("probes");
    let spec = json!({"exec": {"command": ["x"]}, "periodSeconds": 5, "failureThreshold": 2});
    let (count, none): (_, [(u64, ProbeState); 0]) = (|world: &World| world.runtime.execs(), []);
    // Success at 0, failures at 10 and 15 s, success at 20.
    let told = run(&world, Kind::Readiness, spec.clone(), "++--+", 32).await;
    assert_eq!(told, [(0, Success), (15, Failure), (20, Success)]);
    assert_eq!(count(&world), 7);
    // A startup probe ends with its verdict, a liveness probe with its failure.
    assert_eq!(run(&world, Kind::Startup, spec.clone(), "-+", 60).await, [(5, Success)]);
    assert_eq!(count(&world), 2);
    assert_eq!(run(&world, Kind::Liveness, spec.clone(), "+--", 60).await, [(0, Success), (10, Failure)]);
    assert_eq!(count(&world), 3);
    // What could not be tried says nothing, after three tries.
    assert_eq!(run(&world, Kind::Startup, spec.clone(), "????????", 8).await, none);
    assert_eq!(count(&world), 6);
    // One that hangs fails after its time, and the next turn comes when it is due.
    let told = run(&world, Kind::Readiness, spec, "hh+", 20).await;
    assert_eq!(told, [(6, Failure), (10, Success)]);
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_left_of_a_probe_that_is_dropped() {
    let world = World::new("dropped-probes");
    let events = Recorder::start(world.api.clone(), "n");
    world.runtime.answer_execs("");
    let prober = Prober::start(world.runtime.clone(), events, Arc::default());
    let spec = json!({"exec": {"command": ["x"]}, "periodSeconds": 1});
    let start = |n: usize| {
        let alive = Arc::new(n);
        let watched = Arc::downgrade(&alive);
        let probing = prober.probe(probe(Kind::Liveness, spec.clone(), Timestamp::now()), move |_| {
            let _ = &alive;
        });
        (probing, watched)
    };
    let all: Vec<_> = (0..500).map(start).collect();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(world.runtime.execs(), 1500);
    let watched: Vec<_> = all.into_iter().map(|(_, watched)| watched).collect();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(world.runtime.execs(), 0);
    assert!(watched.iter().all(|watched| watched.strong_count() == 0));
    std::fs::remove_dir_all(&world.dir).expect("removed");
}

/// What a probe costs that waits for its turn, when there are hundreds of pods.
#[test]
fn a_probe_that_waits_is_small() {
    let entry = size_of::<Entry>() + size_of::<Probe>();
    assert!(entry <= 640, "{entry} bytes");
}
