//! Runs scenarios, each on a fresh cluster of its own, and counts.
#![allow(clippy::disallowed_methods, reason = "what a person waits for is measured in real time")]

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use minke_scenarios::cluster::TestCluster;
use minke_scenarios::scenario::{Scenario, Step, mismatch, parse};

/// Between two tries of a command that is waited for.
const PAUSE: Duration = Duration::from_millis(200);

/// Run scenarios against real clusters.
#[derive(Parser)]
struct Args {
    /// The program to test
    #[arg(long, default_value = "target/debug/minke")]
    minke: PathBuf,
    /// The kubectls at hand, oldest first
    #[arg(long, env = "KUBECTLS", value_delimiter = ':', default_value = "kubectl")]
    kubectls: Vec<PathBuf>,
    /// Use only this kubectl, whatever the scenarios say
    #[arg(long, env = "KUBECTL")]
    kubectl: Option<PathBuf>,
    /// Where the scenarios are
    #[arg(long, default_value = "tests/scenarios")]
    dir: PathBuf,
    /// Leave the cluster of a scenario that fails as it is
    #[arg(long)]
    keep: bool,
    /// Go on with a scenario after a step that fails, to see them all
    #[arg(long)]
    go_on: bool,
    /// Only scenarios whose name contains one of these
    names: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let mut files: Vec<PathBuf> = fs::read_dir(&args.dir)
        .with_context(|| format!("read {}", args.dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "txt"))
        .collect();
    files.sort();
    let (mut passed, mut failed) = (0, 0);
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if !args.names.is_empty() && !args.names.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let text = fs::read_to_string(&file)?;
        let scenario = parse(&text).with_context(|| format!("read {}", file.display()))?;
        for kubectl in chosen(&args, &scenario.kubectls)? {
            let started = Instant::now();
            let label = format!("{name} ({})", version_of(&kubectl));
            match run(&args, &name, &scenario, &kubectl) {
                Ok(()) => {
                    passed += 1;
                    println!("ok      {label}  {:.1} s", started.elapsed().as_secs_f64());
                }
                Err(error) => {
                    failed += 1;
                    println!("FAILED  {label}\n{error:#}");
                }
            }
        }
    }
    println!("scenarios: {passed} passed, {failed} failed");
    Ok(if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(args: &Args, wanted: &[String]) -> Result<Vec<PathBuf>> {
    if let Some(kubectl) = &args.kubectl {
        return Ok(vec![kubectl.clone()]);
    }
    let newest = args.kubectls.last().context("no kubectl")?;
    let mut chosen = Vec::new();
    for word in wanted {
        match word.as_str() {
            "oldest" => chosen.push(args.kubectls[0].clone()),
            "newest" => chosen.push(newest.clone()),
            "all" => chosen.extend(args.kubectls.iter().cloned()),
            other => bail!("no kubectl is called {other}"),
        }
    }
    chosen.dedup();
    Ok(if chosen.is_empty() { vec![newest.clone()] } else { chosen })
}

/// `kubectl v1.27.16`
fn version_of(kubectl: &Path) -> String {
    let output = Command::new(kubectl).args(["version", "--client", "-o", "json"]).output();
    let version: Option<serde_json::Value> =
        output.ok().and_then(|output| serde_json::from_slice(&output.stdout).ok());
    let version = version.as_ref().and_then(|version| version["clientVersion"]["gitVersion"].as_str());
    format!("kubectl {}", version.unwrap_or("?"))
}

fn run(args: &Args, name: &str, scenario: &Scenario, kubectl: &Path) -> Result<()> {
    let dir = tempfile::Builder::new().prefix(&format!("minke-{name}-")).tempdir()?;
    // The one who runs the commands finds `minke` and the chosen kubectl on the PATH.
    let bin = dir.path().join("bin");
    let work = dir.path().join("work");
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&work)?;
    std::os::unix::fs::symlink(
        fs::canonicalize(&args.minke).context("the program to test")?,
        bin.join("minke"),
    )?;
    std::os::unix::fs::symlink(find(kubectl)?, bin.join("kubectl"))?;
    let cluster = TestCluster::new(&args.minke, &dir.path().join("data"))?;
    let mut outcome = if scenario.bare { Ok(()) } else { cluster.up() };
    if outcome.is_ok() {
        let path = std::env::var("PATH").unwrap_or_default();
        let environment = [
            ("PATH", format!("{}:{path}", bin.display())),
            ("KUBECONFIG", cluster.kubeconfig().display().to_string()),
            ("MINKE_DATA_DIR", cluster.data.path().display().to_string()),
            ("HOME", work.display().to_string()),
        ];
        let mut wrong = Vec::new();
        for step in &scenario.steps {
            if let Err(error) = run_step(step, &environment, &work) {
                wrong.push(format!("{error:#}"));
                if !args.go_on {
                    break;
                }
            }
        }
        if !wrong.is_empty() {
            outcome = Err(anyhow::anyhow!("{}", wrong.join("\n")));
        }
    }
    if outcome.is_err() && args.keep {
        let dir = dir.keep();
        return outcome.with_context(|| format!("kept in {}", dir.display()));
    }
    if outcome.is_err() {
        // What the server said is often the quickest way to the cause.
        let _ = fs::create_dir_all("target/scenarios");
        let _ = fs::copy(cluster.data.join("minke.log"), format!("target/scenarios/{name}.log"));
    }
    let left = cluster.down();
    outcome?;
    match left? {
        left if left.is_empty() => Ok(()),
        left => bail!("left behind:\n    {}", left.join("\n    ")),
    }
}

fn find(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        return Ok(fs::canonicalize(program)?);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.exists());
    let found = found.with_context(|| format!("{} is not on the PATH", program.display()))?;
    // Not followed further than needed: some kubectls look at their own name.
    Ok(fs::canonicalize(found)?)
}

fn run_step(step: &Step, environment: &[(&str, String)], work: &Path) -> Result<()> {
    let end = Instant::now() + step.time();
    loop {
        let (code, output) = execute(&step.command, environment, work, end)?;
        let wrong = match mismatch(&step.expected, &output) {
            None if code == Some(step.exit) => return Ok(()),
            None => format!("    exit code {code:?} instead of {}\n{output}", step.exit),
            Some(text) => text,
        };
        if step.within.is_none() || Instant::now() + PAUSE >= end {
            bail!("  line {}: $ {}\n{wrong}", step.line, step.command);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Runs a command in a process group of its own, which is killed at `end`. The code is `None` then.
fn execute(
    command: &str,
    environment: &[(&str, String)],
    work: &Path,
    end: Instant,
) -> Result<(Option<i32>, String)> {
    // A file, not a pipe: a program that was left in the background may keep it open.
    let path = work.join(".output");
    let output = File::create(&path)?;
    let mut child = Command::new("bash")
        .args(["-c", command])
        .envs(environment.iter().map(|(name, value)| (*name, value.as_str())))
        .current_dir(work)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()
        .context("start bash")?;
    let pid = rustix::process::Pid::from_child(&child);
    let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let left = end.saturating_duration_since(Instant::now());
    let time =
        rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    let mut watched = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
    let ended = rustix::event::poll(&mut watched, Some(&time))? > 0;
    if !ended {
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
    let status = child.wait()?;
    let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
    Ok((if ended { status.code() } else { None }, text))
}
