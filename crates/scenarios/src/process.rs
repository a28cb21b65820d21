//! What the kernel says of processes.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;

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
