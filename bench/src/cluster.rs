//! Clusters to measure: started cold, watched while idle.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use minke_client::https::{HttpsClient, Identity};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::{Args, Table, median};

/// A running cluster in a directory of its own; purged when dropped.
pub struct Cluster {
    minke: PathBuf,
    dir: TempDir,
    pub identity: Identity,
    /// Process id of the server.
    pub pid: u32,
    /// How long `minke up` took.
    pub took: Duration,
}

impl Cluster {
    pub fn up(minke: &Path) -> Result<Cluster> {
        let dir = TempDir::with_prefix("minke-bench-")?;
        let kubeconfig = dir.path().join("admin.kubeconfig");
        let start = Instant::now();
        let up = Command::new(minke)
            .args(["up", "--data-dir"])
            .arg(dir.path().join("data"))
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .output()?;
        let took = start.elapsed();
        if !up.status.success() {
            bail!("minke up failed: {}{}", String::from_utf8_lossy(&up.stdout), String::from_utf8_lossy(&up.stderr));
        }
        let mut cluster = Cluster {
            minke: minke.to_owned(),
            identity: minke_cluster::kubeconfig::identity(&kubeconfig)?,
            dir,
            pid: 0,
            took,
        };
        let status = cluster.minke(&["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        cluster.pid = status["pid"].as_u64().context("status has a pid")? as u32;
        Ok(cluster)
    }

    /// Runs a command of this cluster; returns what it printed.
    pub fn minke(&self, args: &[&str]) -> Result<String> {
        let output =
            Command::new(&self.minke).args(args).arg("--data-dir").arg(self.dir.path().join("data")).output()?;
        Ok(String::from_utf8(output.stdout)?)
    }

    pub fn client(&self) -> Result<HttpsClient> {
        Ok(HttpsClient::new(&self.identity)?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.minke(&["down", "--purge"]) {
            eprintln!("minke down failed: {error}");
        }
    }
}

/// CPU time that a process has used, in seconds.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold spaces; utime and stime are fields 14 and 15 of the line.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    let (user, system) = (ticks(11).context("utime")?, ticks(12).context("stime")?);
    // USER_HZ is 100 on every Linux that Rust runs on.
    Ok((user + system) / 100.0)
}

/// A figure of /proc/PID/`file` in kB, such as VmRSS of `status` or Pss of `smaps_rollup`.
pub fn memory_kb(pid: u32, file: &str, field: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()).context("no such field")?;
    Ok(number.parse()?)
}

pub fn cold_start(args: &Args, table: &mut Table) -> Result<()> {
    let what = "cold `minke up` to node Ready";
    if table.wants(what) {
        let took: Result<Vec<f64>> =
            (0..args.rounds).map(|_| Ok(Cluster::up(&args.minke)?.took.as_secs_f64())).collect();
        table.add(what, format!("{:.2} s", median(took?)), "1 s");
    }
    Ok(())
}

pub async fn idle(args: &Args, table: &mut Table) -> Result<()> {
    let (memory, cpu) = ("idle memory, whole cluster", "idle CPU, whole cluster");
    if !table.wants(memory) && !table.wants(cpu) {
        return Ok(());
    }
    let cluster = Cluster::up(&args.minke)?;
    // What starting left to do is not idling.
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let window = Duration::from_secs(args.seconds * 3);
    let before = cpu_seconds(cluster.pid)?;
    tokio::time::sleep(window).await;
    let used = cpu_seconds(cluster.pid)? - before;
    let rss = memory_kb(cluster.pid, "status", "VmRSS")?;
    table.add(memory, format!("{:.1} MB RSS", rss / 1024.0), "64 MB RSS");
    table.add(cpu, format!("{:.2} % of a core", used * 100.0 / window.as_secs_f64()), "0.5 % of one core");
    Ok(())
}
