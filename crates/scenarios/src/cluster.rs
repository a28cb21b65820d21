//! A cluster for one test, in a directory of its own, and proof that nothing of it is left afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use minke_cluster::DataDir;
use minke_cluster::keys::Pair;

/// A cluster that was brought up; take it down with [`TestCluster::down`].
pub struct TestCluster {
    program: PathBuf,
    pub data: DataDir,
}

impl TestCluster {
    /// Not up yet.
    pub fn new(program: &Path, dir: &Path) -> Result<TestCluster> {
        Ok(TestCluster { program: program.to_owned(), data: DataDir::new(dir)? })
    }

    /// `minke ARGS`, for this cluster.
    pub fn minke(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.args(args).env("MINKE_DATA_DIR", self.data.path());
        command.output().with_context(|| format!("start {}", self.program.display()))
    }

    /// As [`TestCluster::minke`], with a failure as an error that carries the output.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.minke(args)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("minke {}: {}\n{text}", args.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn up(&self) -> Result<()> {
        self.run(&["up"]).map(drop)
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.data.join("kubeconfig")
    }

    pub fn admin(&self) -> Result<Pair> {
        let read = |name: &str| fs::read_to_string(self.data.join("pki").join(name));
        Ok(Pair { certificate: read("admin.crt")?, key: read("admin.key")? })
    }

    /// The process of the server.
    pub fn server_pid(&self) -> Result<rustix::process::Pid> {
        Ok(self.data.holder()?.context("no server is running")?.pid)
    }

    /// Takes the cluster down and says what is left of it, which should be nothing.
    pub fn down(&self) -> Result<Vec<String>> {
        self.run(&["down", "--purge", "--grace", "2"])?;
        self.leftovers()
    }

    /// Processes, links, tables, mounts, cgroups and files of this cluster.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let dir = self.data.path().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for process in fs::read_dir("/proc")?.flatten() {
            let Ok(command) = fs::read(process.path().join("cmdline")) else { continue };
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let is_minke = command.starts_with("minke-") || command.contains("/minke ");
            if is_minke && command.contains(&dir) && process.file_name() != *std::process::id().to_string() {
                found.push(format!("process {}: {command}", process.file_name().display()));
            }
        }
        let prefix = self.data.id().link_prefix();
        for link in fs::read_dir("/sys/class/net")?.flatten() {
            let name = link.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                found.push(format!("link {name}"));
            }
        }
        let tables = Command::new("nft").args(["list", "tables"]).output().context("run nft")?;
        let tables = String::from_utf8_lossy(&tables.stdout).into_owned();
        found.extend(
            tables.lines().filter(|line| line.contains(&self.data.id().table_prefix())).map(str::to_owned),
        );
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        found.extend(mounts.lines().filter(|line| line.contains(&dir)).map(|line| format!("mount {line}")));
        let cgroup = self.data.cgroup();
        for mount in mounts.lines().filter(|line| line.contains(" - cgroup")) {
            let point = mount.split(' ').nth(4).unwrap_or_default();
            let path = Path::new(point).join(&cgroup);
            if path.exists() {
                found.push(format!("cgroup {}", path.display()));
            }
        }
        if self.data.path().exists() {
            found.push(format!("directory {dir}"));
        }
        Ok(found)
    }
}
