//! Network namespaces for tests: one for the test itself, and one for each of its pods. Also used by the
//! tests of crates that build on this one.
#![allow(dead_code, reason = "each test that includes this uses a part of it")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use rustix::thread::UnshareFlags;

/// Runs the test on a thread with a network namespace of its own, or says why it can't.
pub fn in_own_namespace(test: impl AsyncFnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: making a network namespace needs root");
        return;
    }
    let runner = std::thread::spawn(move || {
        unshare();
        set_lo_up();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = runner.join() {
        std::panic::resume_unwind(panic);
    }
}

fn unshare() {
    #[expect(unsafe_code, reason = "this thread shares nothing with the rest of the test but memory")]
    // SAFETY: only the network namespace changes, not the table of file descriptors.
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::NEWNET).unwrap();
    }
}

fn set_lo_up() {
    shell("ip link set lo up");
}

pub fn shell(command: &str) {
    let done = std::process::Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(done.success(), "{command}");
}

/// Gives the test's namespace a way out: it is 192.0.2.2, and what is returned is 192.0.2.1, its gateway.
pub fn with_outside() -> Pod {
    let outside = Pod::new();
    // `ip` knows a namespace by a process or thread that is in it.
    let thread = outside.path.components().nth(4).unwrap().as_os_str().to_str().unwrap().to_owned();
    shell(&format!(
        "ip link add wan type veth peer name wan1 && ip addr add 192.0.2.2/24 dev wan && ip link set wan up \
         && ip route add default via 192.0.2.1 && ip link set wan1 netns {thread}"
    ));
    outside.run(|| shell("ip addr add 192.0.2.1/24 dev wan1 && ip link set wan1 up && ip link set lo up"));
    outside
}

/// A namespace that lives as long as this: a thread sits in it, and does what it is asked to.
pub struct Pod {
    pub path: PathBuf,
    work: std::sync::mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Pod {
    pub fn new() -> Pod {
        let (work, jobs) = std::sync::mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, path) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            unshare();
            let thread = rustix::thread::gettid().as_raw_nonzero();
            ready.send(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))).unwrap();
            jobs.into_iter().for_each(|job| job());
        });
        Pod { path: path.recv().unwrap(), work }
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = std::sync::mpsc::channel();
        self.work.send(Box::new(move || sender.send(job()).unwrap())).unwrap();
        result.recv().unwrap()
    }
}

/// Answers on port 8080 with the address of the client.
pub fn serve_hello(address: Ipv4Addr) {
    serve(address, "hello");
}

/// Answers on port 8080 with a greeting and the address of the client.
pub fn serve(address: Ipv4Addr, greeting: &'static str) {
    let listener = TcpListener::bind((address, 8080)).unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let peer = connection.peer_addr().unwrap().ip();
            let _ = write!(connection, "{greeting} {peer}");
        }
    });
}

pub fn fetch(address: Ipv4Addr) -> Result<String, std::io::ErrorKind> {
    get(SocketAddrV4::new(address, 8080))
}

/// All that the server says.
pub fn get(to: SocketAddrV4) -> Result<String, std::io::ErrorKind> {
    let mut text = String::new();
    let mut connection =
        TcpStream::connect_timeout(&to.into(), Duration::from_secs(5)).map_err(|error| error.kind())?;
    connection.read_to_string(&mut text).map_err(|error| error.kind())?;
    Ok(text)
}
