//! Runs a story of a simulated cluster through every fault.
#![allow(dead_code, reason = "a test uses a part of this")]

use std::time::Duration;

use minke_testing::sim::Sim;

/// Runs in virtual time, and ends everything that was started: otherwise the clusters of a test would all live on.
pub fn virtually<T>(run: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(run)
}

/// Runs the same on two nodes, again and again: with a crash of the controllers after each of their writes in turn, until
/// there are no more (at least `least`), and `times` each with caches that lag, with watches that break so that states
/// are passed over unseen, and with all of these at once.
pub fn through_all(least: usize, times: u64, mut run: impl AsyncFnMut(Sim) -> Sim) {
    let (lag, outage) = (Duration::from_secs(4), Duration::from_secs(6));
    let mut crashes = 0;
    for n in 1.. {
        println!("a crash after write {n}");
        let crashed = virtually(async { run(Sim::new(n as u64).nodes(2).crash_after(n)).await.crashed() });
        if !crashed {
            break;
        }
        crashes += 1;
    }
    assert!(crashes >= least, "{crashes} crashes");
    for seed in 0..times {
        println!("faults of seed {seed}");
        let sim = || Sim::new(seed).nodes(2);
        virtually(async { drop(run(sim().lag(lag)).await) });
        virtually(async { drop(run(sim().blink(outage)).await) });
        let crash = crashes * (seed as usize + 1) / (times as usize + 1);
        virtually(async { drop(run(sim().lag(lag).blink(outage).crash_after(crash.max(1))).await) });
    }
}
