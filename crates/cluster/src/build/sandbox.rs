//! Where the `RUN` steps of a build run: a runtime of its own, on the layers of the node.
//!
//! A build has a directory, `<data>/build/<id>`, laid out as the node's own but for `snapshots`, which is a link to the
//! node's; its containers, shims and cgroups are no one else's. So it does not matter whether a cluster is up. The lock in it
//! tells a build that goes on from one that was killed, which the next build cleans up after.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use minke_runtime::build::{Draft, Outcome};
use minke_runtime::{
    ContainerSpec, Error, Event, ImageStore, LocalRuntime, Mount, Runtime, RuntimeConfig, SandboxSpec,
    Seccomp,
};
use rustix::fs::FlockOperation;
use tokio::net::unix::pipe;

use crate::data_dir::DataDir;
use crate::io::Io;

/// In memory: what must not come to a disk.
const MEMORY: &str = "/dev/shm";
/// What containers find at these paths is the machine's, and no part of the image.
const OF_THE_MACHINE: &[&str] = &["/etc/resolv.conf", "/etc/hosts"];

/// What the network of `RUN` steps is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Network {
    /// The machine's
    #[default]
    Host,
    /// None at all
    None,
}

/// The directory of one build, and what runs in it.
pub struct Sandbox {
    dir: PathBuf,
    cgroup_root: String,
    images: ImageStore,
    network: Network,
    runtime: Option<LocalRuntime>,
    /// One for each network that a step has wanted.
    started: Vec<Network>,
    containers: usize,
    secrets: usize,
    _lock: fs::File,
}

/// What a `RUN` step is to run.
pub struct Command {
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    /// Another one than the build's.
    pub network: Option<Network>,
    /// Where something is mounted and the image has nothing: what is made there is no part of it.
    pub stubs: Vec<PathBuf>,
}

impl Network {
    fn sandbox(self) -> &'static str {
        match self {
            Network::Host => "build-host",
            Network::None => "build-none",
        }
    }
}

impl Sandbox {
    pub fn new(data: &DataDir, images: &ImageStore, network: Network) -> Result<Sandbox> {
        let id = format!("{:08x}", std::process::id() ^ (jiff::Timestamp::now().as_nanosecond() as u32));
        let dir = data.join("build").join(&id);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let lock = lock(&dir)?.context("the directory of a new build is in use")?;
        std::os::unix::fs::symlink(data.join("snapshots"), dir.join("snapshots"))?;
        let cgroup_root = cgroup_root(data, &id);
        Ok(Sandbox {
            dir,
            cgroup_root,
            images: images.clone(),
            network,
            runtime: None,
            started: Vec::new(),
            containers: 0,
            secrets: 0,
            _lock: lock,
        })
    }

    /// A new directory for whatever a step needs; it goes with the build.
    pub fn scratch(&self) -> Result<PathBuf> {
        for n in 0.. {
            let dir = self.dir.join(format!("scratch-{n}"));
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => return Ok(made.map(|()| dir)?),
            }
        }
        bail!("no name is free")
    }

    pub fn network(&self) -> Network {
        self.network
    }

    /// A file that nobody else reads and that goes with the build, on no disk where the machine has memory for it.
    pub fn secret(&mut self, content: &[u8], mode: u32, uid: u32, gid: u32) -> Result<PathBuf> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
        let dir = match Path::new(MEMORY).is_dir() {
            true => Path::new(MEMORY).join(&self.cgroup_root),
            false => self.dir.join("secrets"),
        };
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists || self.secrets == 0 => {
                return Err(error).with_context(|| dir.display().to_string());
            }
            _ => {}
        }
        self.secrets += 1;
        let path = dir.join(self.secrets.to_string());
        fs::write(&path, content)?;
        chown(&path, Some(uid), Some(gid))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(path)
    }

    async fn runtime(&mut self, network: Network) -> Result<LocalRuntime> {
        let runtime = match &self.runtime {
            Some(runtime) => runtime.clone(),
            None => {
                let config = RuntimeConfig { root: self.dir.clone(), cgroup_root: self.cgroup_root.clone() };
                LocalRuntime::open(config, self.images.clone()).await?
            }
        };
        // Before the sandbox: whatever becomes of it, `close` takes it away.
        self.runtime = Some(runtime.clone());
        if !self.started.contains(&network) {
            let id = network.sandbox();
            let host = network == Network::Host;
            let spec = SandboxSpec {
                id: id.to_owned(),
                name: id.to_owned(),
                hostname: if host { String::new() } else { "build".to_owned() },
                host_network: host,
                cgroup_parent: format!("{}/{id}", self.cgroup_root),
                ..SandboxSpec::default()
            };
            runtime.run_sandbox(spec).await?;
            self.started.push(network);
        }
        Ok(runtime)
    }

    /// Runs a command on top of a draft, showing what it says, and adds what it changed as a layer.
    pub async fn run(&mut self, draft: &mut Draft, command: Command, io: &mut Io) -> Result<Outcome> {
        let network = command.network.unwrap_or(self.network);
        let runtime = self.runtime(network).await?;
        self.containers += 1;
        let id = format!("step-{}", self.containers);
        let log = self.dir.join(format!("{id}.log"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &log,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )?;
        // Open for both, so that it is there for the writer and never at an end.
        let mut output = Output::new(pipe::OpenOptions::new().read_write(true).open_receiver(&log)?);
        let machine = OF_THE_MACHINE.iter().map(Path::new).filter(|path| path.exists());
        let taken = |path: &Path| command.mounts.iter().any(|mount| mount.container_path == path);
        let machine = machine.filter(|path| !taken(path)).map(|path| Mount {
            host_path: path.to_owned(),
            container_path: path.to_owned(),
            readonly: true,
            ..Mount::default()
        });
        let mounts = machine.collect::<Vec<_>>().into_iter().chain(command.mounts.iter().cloned()).collect();
        let spec = ContainerSpec {
            id: id.clone(),
            name: id.clone(),
            image: self.images.lend(draft)?,
            command: command.argv,
            env: command.env,
            seccomp: Seccomp::RuntimeDefault,
            mounts,
            log_path: log.clone(),
            ..ContainerSpec::default()
        };
        let mut events = runtime.subscribe();
        runtime.create_container(network.sandbox(), spec).await?;
        match runtime.start_container(&id).await {
            Err(Error::Start(why)) => bail!("{why}"),
            started => started?,
        }
        let status = loop {
            tokio::select! {
                shown = output.show(io) => shown?,
                event = events.recv() => match event {
                    Ok(Event::ContainerExited { status }) if status.id == id => break *status,
                    Ok(Event::SandboxExited { .. }) => bail!("the sandbox has ended"),
                    Ok(_) => {}
                    Err(error) => bail!("what runs can no longer be followed: {error}"),
                },
            }
        };
        output.rest(io)?;
        match status.exit_code {
            Some(0) => {}
            _ if status.oom_killed => bail!("the command was killed: out of memory"),
            Some(code) => bail!("the command returned a non-zero code: {code}"),
            None => bail!("nobody saw how the command ended"),
        }
        let upper = self.dir.join("containers").join(&id).join("upper");
        for stub in &command.stubs {
            remove_stub(&upper, stub).with_context(|| stub.display().to_string())?;
        }
        let (images, mut built) = (self.images.clone(), draft.clone());
        let (outcome, built) = tokio::task::spawn_blocking(move || {
            let outcome = images.add_changes(&mut built, &upper, &is_of_the_machine);
            outcome.map(|outcome| (outcome, built))
        })
        .await??;
        *draft = built;
        runtime.remove_container(&id).await?;
        fs::remove_file(&log)?;
        Ok(outcome)
    }

    /// Ends what runs and takes everything away but what became layers.
    pub async fn close(mut self) -> Result<()> {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_all().await?;
        }
        forget_secrets(&self.cgroup_root)?;
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }
}

fn forget_secrets(cgroup_root: &str) -> Result<()> {
    let dir = Path::new(MEMORY).join(cgroup_root);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes what was made for something to be mounted on, unless the step has put something there. What is on the way there
/// is the step's, so no link of its is followed.
fn remove_stub(upper: &Path, stub: &Path) -> Result<()> {
    use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
    let (Some(parent), Some(name)) = (stub.parent(), stub.file_name()) else { return Ok(()) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let upper = rustix::fs::open(upper, flags, Mode::empty())?;
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let confined = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let Ok(parent) = rustix::fs::openat2(&upper, parent, flags, Mode::empty(), confined) else {
        return Ok(());
    };
    let Ok(stat) = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(()) };
    match FileType::from_raw_mode(stat.st_mode) {
        // One that is not empty stays.
        FileType::Directory => drop(rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)),
        FileType::RegularFile if stat.st_size == 0 => rustix::fs::unlinkat(&parent, name, AtFlags::empty())?,
        _ => {}
    }
    Ok(())
}

fn cgroup_root(data: &DataDir, id: &str) -> String {
    format!("{}-build-{id}", data.cgroup())
}

/// What a container leaves where something of the machine was mounted.
fn is_of_the_machine(path: &Path) -> bool {
    let mounted = OF_THE_MACHINE.iter().any(|known| known.strip_prefix('/') == path.to_str());
    mounted || matches!(path.to_str(), Some("proc" | "sys" | "dev"))
}

/// The build that owns a directory, or `None` while it goes on.
fn lock(dir: &Path) -> Result<Option<fs::File>> {
    let file = fs::File::options().create(true).append(true).open(dir.join("lock"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Clears what builds that were killed have left.
pub async fn clear_leftovers(data: &DataDir, images: &ImageStore) -> Result<()> {
    for entry in fs::read_dir(data.join("build")).into_iter().flatten().flatten() {
        let dir = entry.path();
        let Some(_lock) = lock(&dir)? else { continue };
        let id = entry.file_name().to_string_lossy().into_owned();
        if dir.join("shims").exists() {
            let config = RuntimeConfig { root: dir.clone(), cgroup_root: cgroup_root(data, &id) };
            LocalRuntime::open(config, images.clone()).await?.shutdown_all().await?;
        }
        forget_secrets(&cgroup_root(data, &id))?;
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    Ok(())
}

/// What a command says, as it says it.
struct Output {
    pipe: pipe::Receiver,
    pending: Vec<u8>,
}

impl Output {
    fn new(pipe: pipe::Receiver) -> Output {
        Output { pipe, pending: Vec::new() }
    }

    /// Waits for more of it, and shows that.
    async fn show(&mut self, io: &mut Io) -> Result<()> {
        self.pipe.readable().await?;
        self.rest(io)
    }

    /// Shows what there is.
    fn rest(&mut self, io: &mut Io) -> Result<()> {
        let mut chunk = [0; 16 << 10];
        loop {
            match self.pipe.try_read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => self.pending.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        let whole = self.pending.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        for line in self.pending.drain(..whole).collect::<Vec<u8>>().split_inclusive(|b| *b == b'\n') {
            // `TIME STREAM TAG text`; a partial line has no end of its own.
            let mut parts = line.splitn(4, |b| *b == b' ');
            let (tag, text) = (parts.nth(2).unwrap_or_default(), parts.next().unwrap_or_default());
            let text = if tag == b"P" { text.strip_suffix(b"\n").unwrap_or(text) } else { text };
            io.err.write_all(text)?;
        }
        io.err.flush()?;
        Ok(())
    }
}
