//! Starting a server, and what the kernel says of processes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use minke_cluster::startup::Stage;
use rustix::process::Pid;

/// How long a server may take to become ready.
const START_MAX: Duration = Duration::from_secs(60);

/// Starts the server without a node, and waits until it is ready. What it says goes to `logs/server.log`.
pub fn start_server(minke: &Path, data: &Path, logs: &Path) -> Result<Child> {
    let path = logs.join("server.log");
    let log = File::options().create(true).append(true).open(&path)?;
    let mut child = Command::new(minke)
        .args(["server", "--disable-agent", "--detached", "--data-dir"])
        .arg(data)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .with_context(|| format!("start {}", minke.display()))?;
    let (sender, stages) = std::sync::mpsc::channel();
    let out = child.stdout.take().context("the server has no output")?;
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            let stage: Option<Stage> = serde_json::from_str(&line).ok();
            if sender.send(stage).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + START_MAX;
    loop {
        match stages.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Some(Stage::Ready)) => return Ok(child),
            Ok(Some(Stage::Failed(why))) => bail!("the server does not start: {why}"),
            Ok(_) => {}
            Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("the server does not become ready: {}", fs::read_to_string(path)?);
            }
        }
    }
}

/// CPU time used so far, by all threads.
pub fn cpu_time(pid: Pid) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()))?;
    // The name in parentheses may hold anything; what follows it is regular.
    let (_, rest) = text.rsplit_once(')').context("no process name")?;
    let ticks: u64 =
        rest.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

/// A line of `/proc/PID/FILE` such as `VmRSS` or `Pss`, in KiB.
pub fn memory_kib(pid: i32, file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Processes whose command line, with blanks for NULs, satisfies `wanted`.
pub fn find(wanted: impl Fn(&str) -> bool) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let matching = pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        wanted(&String::from_utf8_lossy(&line).replace('\0', " "))
    });
    matching.collect()
}
