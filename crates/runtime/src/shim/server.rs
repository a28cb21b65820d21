//! The shim's own process: start-up, the poll loop, requests and children.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::process::WaitOptions;

use super::container::Container;
use super::proto::{
    ContainerRecord, Exit, Message, Op, Reply, Report, Request, SandboxRecord, ShimError, ShimEvent,
};
use super::runner::read_json;
use super::{log, userns, wire};
use crate::api::ExecSpec;
use crate::files::write_json;
use crate::sys;

/// Unsent bytes at which a client that does not read is dropped.
const BACKLOG_MAX: usize = 8 << 20;

/// Arguments: the data directory and the sandbox's id. Says `ok` or what went wrong on stdout, once.
pub fn main(mut args: impl Iterator<Item = OsString>) -> i32 {
    let (Some(root), Some(id)) = (args.next(), args.next()) else { return 2 };
    let started = Shim::start(Path::new(&root), &id.to_string_lossy());
    let said = match &started {
        Ok(shim) => writeln!(io::stdout(), "ok {}", shim.pause.unwrap_or(0)),
        Err(e) => writeln!(io::stdout(), "error {}", e.replace('\n', " ")),
    };
    let (Ok(mut shim), Ok(())) = (started, said) else { return 1 };
    // stderr is the shim's log; the pipe to whoever started us must close.
    let _ = rustix::stdio::dup2_stdout(io::stderr());
    match shim.serve() {
        Ok(()) => 0,
        Err(e) => {
            super::log_line!("shim: {e}");
            shim.kill_all();
            1
        }
    }
}

struct Client {
    id: u64,
    stream: UnixStream,
    inbox: wire::Inbox,
    outbox: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
}

/// A helper at work: the runner for a container, or exec.
struct Job {
    socket: OwnedFd,
    helper: i32,
    client: u64,
    seq: u64,
    kind: JobKind,
}

enum JobKind {
    Start(Box<Container>),
    Exec,
}

struct ExecProcess {
    pid: i32,
    client: u64,
    seq: u64,
}

struct Shim {
    root: PathBuf,
    listener: UnixListener,
    signals: SignalFd,
    node_mounts: OwnedFd,
    /// The pod's own user namespace.
    users: Option<OwnedFd>,
    pause: Option<i32>,
    /// Held open as long as the pause process is to live.
    _pause_life: Option<ChildStdin>,
    containers: BTreeMap<String, Container>,
    clients: Vec<Client>,
    jobs: Vec<Job>,
    execs: Vec<ExecProcess>,
    next_client: u64,
    /// Who asked what runs, and waits until nothing is just being started: client and `seq`.
    greeters: Vec<(u64, u64)>,
    /// Of containers, what the disk had no room for. Who comes later is told of it.
    unwritten: Vec<ShimEvent>,
    /// Who waits for the end: client and `seq`.
    stopping: Option<(u64, u64)>,
    buffer: Vec<u8>,
}

/// What a descriptor that became ready belongs to.
#[derive(Clone, Copy)]
enum Source {
    Listener,
    Signals,
    Client(usize),
    Job(usize),
}

impl Shim {
    fn start(root: &Path, id: &str) -> Result<Self, String> {
        let io_at = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
        let at = |what: &'static str| move |e: nix::errno::Errno| format!("{what}: {e}");
        let dir = root.join("shims").join(id);
        let record: SandboxRecord = read_json(&dir.join("sandbox.json"))?;
        let spec = &record.spec;

        let _ = rustix::process::setsid();
        let _ = rustix::thread::set_name(c"minke-shim");
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|e| format!("become a subreaper: {e}"))?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.add(Signal::SIGTERM);
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).map_err(at("sigprocmask"))?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(at("signalfd"))?;

        super::exec::join_cgroups(&record.cgroup_dirs)?;
        let node_mounts: OwnedFd =
            fs::File::open("/proc/self/ns/mnt").map_err(io_at("open mount namespace"))?.into();
        let users = spec.user_namespace.map(userns::enter).transpose()?;
        let own = users.is_none();
        let mut flags = CloneFlags::CLONE_NEWNS;
        flags.set(CloneFlags::CLONE_NEWNET, own && !spec.host_network);
        flags.set(CloneFlags::CLONE_NEWIPC, own && !spec.host_ipc);
        // With the node's network a pod has the node's name, as upstream does it.
        flags.set(CloneFlags::CLONE_NEWUTS, own && !spec.host_network);
        nix::sched::unshare(flags).map_err(at("unshare"))?;
        let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).map_err(at("make mounts private"))?;
        if !spec.host_ipc {
            // The pod's /dev/shm. In our own mount namespace: it goes when the last of the pod goes.
            let shm = dir.join("shm");
            fs::create_dir_all(&shm).map_err(io_at("make shm"))?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("shm"), &shm, Some("tmpfs"), flags, Some("mode=1777,size=65536k"))
                .map_err(at("mount shm"))?;
        }
        if !spec.host_network {
            if !spec.hostname.is_empty() {
                nix::unistd::sethostname(&spec.hostname).map_err(at("sethostname"))?;
            }
            sys::loopback_up().map_err(io_at("bring up lo"))?;
        }
        match &users {
            Some(users) if !spec.sysctls.is_empty() => {
                userns::as_root(users, || set_sysctls(&spec.sysctls))?;
            }
            _ => set_sysctls(&spec.sysctls)?,
        }
        let (pause, _pause_life) = match spec.share_pid {
            true => start_pause(users.as_ref()).map(|(pid, life)| (Some(pid), life))?,
            false => (None, None),
        };
        std::env::set_current_dir("/").map_err(io_at("chdir"))?;

        let path = dir.join("sock");
        let _ = fs::remove_file(&path);
        let (_dir, short) = wire::short_path(&path).map_err(io_at("open sandbox directory"))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        let listener = UnixListener::bind(short).map_err(io_at("bind socket"))?;
        listener.set_nonblocking(true).map_err(io_at("socket"))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        Ok(Self {
            root: root.to_owned(),
            listener,
            signals,
            node_mounts,
            users,
            pause,
            _pause_life,
            containers: BTreeMap::new(),
            clients: Vec::new(),
            jobs: Vec::new(),
            execs: Vec::new(),
            next_client: 1,
            greeters: Vec::new(),
            unwritten: Vec::new(),
            stopping: None,
            buffer: vec![0; 16 * 1024],
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let (ready, containers) = self.wait()?;
            // Output before anything else: what a program wrote before it ended belongs into its log first.
            for id in containers {
                if let Some(container) = self.containers.get_mut(&id) {
                    container.pump(&mut self.buffer);
                }
            }
            let mut signalled = false;
            // Jobs and clients go from the back, so that removing one does not move those still to come.
            for source in ready.into_iter().rev() {
                match source {
                    Source::Listener => self.accept(),
                    Source::Signals => signalled = true,
                    Source::Client(at) => self.client_ready(at),
                    Source::Job(at) => self.job_ready(at),
                }
            }
            if signalled {
                self.signals_ready()?;
            }
            if let Some((client, seq)) = self.stopping
                && self.containers.is_empty()
                && self.jobs.is_empty()
            {
                self.reply(client, seq, Ok(Reply::Done), None);
                self.flush_all();
                return Ok(());
            }
        }
    }

    /// Sleeps until something is to be done.
    fn wait(&mut self) -> io::Result<(Vec<Source>, Vec<String>)> {
        let mut sources = vec![Source::Listener, Source::Signals];
        let mut fds =
            vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        for (at, job) in self.jobs.iter().enumerate() {
            sources.push(Source::Job(at));
            fds.push(PollFd::new(&job.socket, PollFlags::IN));
        }
        for (at, client) in self.clients.iter().enumerate() {
            let mut interest = PollFlags::IN;
            interest.set(PollFlags::OUT, !client.outbox.is_empty());
            sources.push(Source::Client(at));
            fds.push(PollFd::new(&client.stream, interest));
        }
        let mut owners: Vec<&str> = Vec::new();
        let mut deadline = None;
        for (id, container) in &self.containers {
            let before = fds.len();
            container.interest(&mut fds, &mut deadline);
            owners.extend(std::iter::repeat_n(id.as_str(), fds.len() - before));
        }
        let timeout = deadline.map(|at: i64| {
            let left = (at - log::now_ns()).max(0);
            rustix::time::Timespec { tv_sec: left / 1_000_000_000, tv_nsec: left % 1_000_000_000 }
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let timed_out = fds.iter().all(|fd| fd.revents().is_empty());
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut containers: Vec<String> = Vec::new();
        for (at, owner) in owners.iter().enumerate() {
            // After a time-out everyone looks at its own deadlines.
            if (ready[sources.len() + at] || timed_out) && containers.last().is_none_or(|c| c != owner) {
                containers.push((*owner).to_owned());
            }
        }
        let sources = sources.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|(s, _)| s).collect();
        Ok((sources, containers))
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                let id = self.next_client;
                self.next_client += 1;
                self.clients.push(Client { id, stream, inbox: Default::default(), outbox: VecDeque::new() });
            }
        }
    }

    fn client_ready(&mut self, at: usize) {
        let client = &mut self.clients[at];
        let id = client.id;
        let alive = match client.inbox.fill(&client.stream) {
            Ok(more) => more,
            Err(e) => e.kind() == io::ErrorKind::WouldBlock,
        };
        let mut requests = Vec::new();
        let valid = loop {
            match client.inbox.next() {
                Ok(Some(frame)) => match serde_json::from_slice::<Request>(&frame) {
                    Ok(request) if request.fds <= client.inbox.fds.len() => {
                        let fds = client.inbox.fds.drain(..request.fds).collect();
                        requests.push((request, fds));
                    }
                    _ => break false,
                },
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        for (request, fds) in requests {
            self.handle(id, request, fds);
        }
        if !alive || !valid {
            self.clients.retain(|c| c.id != id);
        } else {
            self.flush(id);
        }
    }

    fn handle(&mut self, client: u64, request: Request, fds: Vec<OwnedFd>) {
        let seq = request.seq;
        let result = match request.op {
            Op::Hello => {
                self.greeters.push((client, seq));
                return self.greet();
            }
            Op::Start { id } => match self.start_container(&id) {
                Ok((socket, helper, container)) => {
                    self.jobs.push(Job {
                        socket,
                        helper,
                        client,
                        seq,
                        kind: JobKind::Start(Box::new(container)),
                    });
                    return;
                }
                Err(e) => Err(ShimError::Failed(e)),
            },
            Op::Exec { id, exec } => match self.start_exec(&id, &exec, fds) {
                Ok((socket, helper)) => {
                    self.jobs.push(Job { socket, helper, client, seq, kind: JobKind::Exec });
                    return;
                }
                Err(e) => Err(e),
            },
            Op::Kill { id, signal, all } => self.container(&id).map(|c| {
                if all {
                    c.kill_all();
                } else {
                    kill(c.pid, signal);
                }
                Reply::Done
            }),
            Op::KillExec { exec, signal } => {
                if let Some(found) = self.execs.iter().find(|e| e.client == client && e.seq == exec) {
                    kill(found.pid, signal);
                }
                Ok(Reply::Done)
            }
            Op::Attach { id, stdin, stdout, stderr } => {
                let attached = self.container(&id).and_then(|c| {
                    c.attach(stdin, stdout, stderr, fds).map_err(|e| ShimError::Failed(e.to_string()))
                });
                match attached {
                    Ok(fd) => return self.reply(client, seq, Ok(Reply::Done), fd),
                    Err(e) => Err(e),
                }
            }
            Op::ReopenLog { id } => self.container(&id).and_then(|c| {
                c.reopen_log().map(|()| Reply::Done).map_err(|e| ShimError::Failed(e.to_string()))
            }),
            Op::Shutdown => {
                self.stopping = Some((client, seq));
                self.kill_all();
                return;
            }
        };
        self.reply(client, seq, result, None);
    }

    fn greet(&mut self) {
        if self.jobs.iter().any(|job| matches!(job.kind, JobKind::Start(_))) {
            return;
        }
        self.write_down();
        for (client, seq) in std::mem::take(&mut self.greeters) {
            for event in self.unwritten.clone() {
                self.event(Some(client), event);
            }
            let running = self.containers.keys().cloned().collect();
            self.reply(client, seq, Ok(Reply::Hello { running }), None);
        }
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, ShimError> {
        let missing = || ShimError::NotFound(format!("container {id:?} is not running"));
        self.containers.get_mut(id).ok_or_else(missing)
    }

    fn start_container(&self, id: &str) -> Result<(OwnedFd, i32, Container), String> {
        if self.stopping.is_some() || self.containers.contains_key(id) {
            return Err(format!("container {id:?} is running or its sandbox is stopping"));
        }
        let dir = self.root.join("containers").join(id);
        let record: ContainerRecord = read_json(&dir.join("container.json"))?;
        let (container, stdio) = Container::prepare(id, dir, &record).map_err(|e| e.to_string())?;
        let pid = std::process::id().to_string();
        let node = inherit(&self.node_mounts).map_err(|e| e.to_string())?;
        let users = self.users.as_ref().map(inherit).transpose().map_err(|e| e.to_string())?;
        let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
        let numbers = (number(&node), users.as_ref().map(number).unwrap_or_default());
        let args: [&OsStr; 5] =
            [self.root.as_os_str(), id.as_ref(), pid.as_ref(), numbers.0.as_ref(), numbers.1.as_ref()];
        let (socket, helper) =
            spawn(super::RUNNER, &args, stdio).map_err(|e| format!("start the runner: {e}"))?;
        Ok((socket, helper, container))
    }

    fn start_exec(
        &mut self,
        id: &str,
        exec: &ExecSpec,
        fds: Vec<OwnedFd>,
    ) -> Result<(OwnedFd, i32), ShimError> {
        let failed = |e: io::Error| ShimError::Failed(format!("start exec: {e}"));
        let container = self.container(id)?;
        let mut fds = fds.into_iter();
        let mut stdio = || match fds.next() {
            Some(fd) => Stdio::from(fd),
            None => Stdio::null(),
        };
        let stdio = [stdio(), stdio(), stdio()];
        let pid = container.pid.to_string();
        let args: [&OsStr; 2] = [container.dir.as_os_str(), pid.as_ref()];
        let (socket, helper) = spawn(super::EXEC, &args, stdio).map_err(failed)?;
        let text = serde_json::to_vec(exec).expect("a spec has string keys only");
        rustix::io::write(&socket, &text).map_err(|e| failed(e.into()))?;
        Ok((socket, helper))
    }

    /// A helper has said how it went, or ended without a word.
    fn job_ready(&mut self, at: usize) {
        let job = self.jobs.remove(at);
        let (mut fds, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        let report = match wire::receive(&job.socket, &mut buffer, &mut fds) {
            Ok(n) if n > 0 => serde_json::from_slice(&buffer[..n])
                .unwrap_or_else(|e| Report::Failed(format!("helper: {e}"))),
            _ => Report::Failed(format!("helper {} ended without a report", job.helper)),
        };
        self.finish_job(job, report, fds.pop());
    }

    /// The helper is no more. What it has begun may wait for it for ever, and hold the other end of its socket.
    fn helper_ended(&mut self, at: usize) {
        if readable(&self.jobs[at].socket) {
            return self.job_ready(at);
        }
        let job = self.jobs.remove(at);
        if let JobKind::Start(container) = &job.kind {
            container.kill_all();
        }
        let report = Report::Failed(format!("helper {} was killed", job.helper));
        self.finish_job(job, report, None);
    }

    fn finish_job(&mut self, job: Job, report: Report, fd: Option<OwnedFd>) {
        match (job.kind, report) {
            (JobKind::Exec, Report::Started(started)) => {
                self.execs.push(ExecProcess { pid: started.pid, client: job.client, seq: job.seq });
                self.reply(job.client, job.seq, Ok(Reply::Exec { pid: started.pid }), fd);
            }
            (JobKind::Exec, Report::Failed(e)) => {
                let text = format!("exec failed: unable to start container process: {e}");
                self.reply(job.client, job.seq, Err(ShimError::Start(text)), None);
            }
            (JobKind::Start(mut container), Report::Started(started)) => {
                container.started(&started, fd);
                let id = container.id.clone();
                self.containers.insert(id.clone(), *container);
                self.happened(ShimEvent::Started { id, started });
                self.reply(job.client, job.seq, Ok(Reply::Done), None);
                if self.stopping.is_some() {
                    self.kill_all();
                }
            }
            (JobKind::Start(container), Report::Failed(e)) => {
                let text = format!("failed to create task: unable to start container process: {e}");
                // That is how it ended.
                let exit = Exit {
                    code: 128,
                    at: log::now_ns(),
                    start_error: Some(text.clone()),
                    ..Default::default()
                };
                self.happened(ShimEvent::Exited { id: container.id.clone(), exit });
                self.reply(job.client, job.seq, Err(ShimError::Start(text)), None);
            }
        }
        self.greet();
    }

    fn signals_ready(&mut self) -> io::Result<()> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if info.ssi_signo == Signal::SIGTERM as u32 {
                self.stopping.get_or_insert((0, 0));
                self.kill_all();
            }
        }
        // A report was sent before its process could be ours to reap, so take reports first.
        for at in (0..self.jobs.len()).rev() {
            if readable(&self.jobs[at].socket) {
                self.job_ready(at);
            }
        }
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code,
                (None, Some(signal)) => 128 + signal,
                (None, None) => continue,
            };
            self.reaped(pid.as_raw_nonzero().get(), code);
        }
        Ok(())
    }

    fn reaped(&mut self, pid: i32, code: i32) {
        if self.pause == Some(pid) {
            // The namespace ended with it, and nothing can be started there any more.
            self.pause = None;
            self.stopping.get_or_insert((0, 0));
            self.kill_all();
        }
        if let Some(at) = self.jobs.iter().position(|job| job.helper == pid) {
            return self.helper_ended(at);
        }
        if let Some(at) = self.execs.iter().position(|e| e.pid == pid) {
            let exec = self.execs.swap_remove(at);
            self.event(Some(exec.client), ShimEvent::ExecExited { seq: exec.seq, code });
        }
        let Some(id) = self.containers.iter().find(|(_, c)| c.pid == pid).map(|(id, _)| id.clone()) else {
            return;
        };
        if let Some(container) = self.containers.remove(&id) {
            let exit = container.ended(code, &mut self.buffer);
            self.happened(ShimEvent::Exited { id, exit });
        }
    }

    fn kill_all(&mut self) {
        for container in self.containers.values() {
            container.kill_all();
        }
        // What is just being started may never come to its end when something it needs is gone.
        for job in &self.jobs {
            kill(job.helper, Signal::SIGKILL as i32);
        }
        if let Some(pause) = self.pause {
            kill(pause, Signal::SIGKILL as i32);
        }
    }

    fn reply(&mut self, client: u64, seq: u64, result: Result<Reply, ShimError>, fd: Option<OwnedFd>) {
        let frame = wire::frame(&Message::Reply { seq, fds: fd.iter().len(), result });
        if let Some(client) = self.clients.iter_mut().find(|c| c.id == client) {
            client.outbox.push_back((frame, fd));
        }
        self.flush(client);
    }

    /// Writes down how it is with a container, and tells everyone.
    fn happened(&mut self, event: ShimEvent) {
        self.unwritten.push(event.clone());
        self.write_down();
        self.event(None, event);
    }

    fn write_down(&mut self) {
        let containers = self.root.join("containers");
        self.unwritten.retain(|event| {
            let written = match event {
                ShimEvent::Started { id, started } => {
                    write_json(&containers.join(id).join("started.json"), started)
                }
                ShimEvent::Exited { id, exit } => write_json(&containers.join(id).join("exit.json"), exit),
                ShimEvent::ExecExited { .. } => Ok(()),
            };
            match written {
                Ok(()) => false,
                // The container has been removed meanwhile.
                Err(e) if e.kind() == io::ErrorKind::NotFound => false,
                Err(e) => {
                    super::log_line!("shim: write down how a container is: {e}");
                    true
                }
            }
        });
    }

    fn event(&mut self, to: Option<u64>, event: ShimEvent) {
        let frame = wire::frame(&Message::Event(event));
        for client in self.clients.iter_mut().filter(|c| to.is_none_or(|id| c.id == id)) {
            client.outbox.push_back((frame.clone(), None));
        }
        self.flush_all();
    }

    fn flush_all(&mut self) {
        let ids: Vec<u64> = self.clients.iter().map(|c| c.id).collect();
        ids.into_iter().for_each(|id| self.flush(id));
    }

    fn flush(&mut self, id: u64) {
        let Some(client) = self.clients.iter_mut().find(|c| c.id == id) else { return };
        let mut broken = client.outbox.iter().map(|(frame, _)| frame.len()).sum::<usize>() > BACKLOG_MAX;
        while let Some((frame, fd)) = client.outbox.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = fd.iter().map(|fd| fd.as_fd()).collect();
            match wire::send(&client.stream, frame, &fds) {
                Ok(n) if n == frame.len() => drop(client.outbox.pop_front()),
                Ok(n) => {
                    frame.drain(..n);
                    *fd = None;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        if broken {
            self.clients.retain(|c| c.id != id);
        }
    }
}

/// Those of the namespaces that we are in.
fn set_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in sysctls {
        if name.contains('/') {
            return Err(format!("sysctl {name:?} is not allowed"));
        }
        let file = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&file, value).map_err(|e| format!("set sysctl {name}={value}: {e}"))?;
    }
    Ok(())
}

fn readable(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&zero)).is_ok_and(|n| n > 0)
}

/// Numbers that mean more than one process are no process of ours.
pub fn kill(pid: i32, signal: i32) {
    if pid > 0
        && let Ok(signal) = Signal::try_from(signal)
    {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
    }
}

/// A copy of a descriptor that a child started now will inherit.
fn inherit(fd: &OwnedFd) -> io::Result<OwnedFd> {
    let copy = rustix::io::dup(fd)?;
    rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty())?;
    Ok(copy)
}

/// Starts a helper with one end of a packet socket, whose number is its first argument.
fn spawn(name: &str, args: &[&OsStr], stdio: [Stdio; 3]) -> io::Result<(OwnedFd, i32)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let theirs = inherit(&theirs)?;
    let number = theirs.as_raw_fd().to_string();
    let mut all: Vec<&OsStr> = vec![number.as_ref()];
    all.extend(args);
    let [stdin, stdout, stderr] = stdio;
    let child = super::command(name, &all).stdin(stdin).stdout(stdout).stderr(stderr).spawn()?;
    Ok((ours, child.id() as i32))
}

/// Starts the process that holds the pod's process namespace; it ends when its input is closed.
fn start_pause(users: Option<&OwnedFd>) -> Result<(i32, Option<ChildStdin>), String> {
    let users = users.map(inherit).transpose().map_err(|e| e.to_string())?;
    let number = users.as_ref().map(|fd| fd.as_raw_fd().to_string());
    let args: Vec<&OsStr> = number.iter().map(AsRef::as_ref).collect();
    let child = super::command(super::PAUSE, &args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.map_err(|e| format!("start pause: {e}"))?;
    let mut text = String::new();
    // Ends with the helper; the process itself closes its copy first thing.
    if let Some(mut out) = child.stdout.take() {
        let mut byte = [0u8; 32];
        while !text.ends_with('\n') {
            match out.read(&mut byte) {
                Ok(n) if n > 0 => text.push_str(&String::from_utf8_lossy(&byte[..n])),
                _ => break,
            }
        }
    }
    // Not closed by waiting for the helper, as it would be if the child still had it.
    let life = child.stdin.take();
    let _ = child.wait();
    let pid = text.trim().parse().map_err(|_| "the pause process did not start".to_owned())?;
    Ok((pid, life))
}
