//! The web server: says who it is, keeps connections alive, and on SIGTERM finishes what it has begun.
//!
//! `/` greets; `/healthz` is always fine; `/hostname`; `/echo` returns the body it is sent; `/wait?ms=N` answers
//! after N milliseconds; `/exit?code=N` ends the program.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sys;
use crate::tools::{hostname, say};

const CONNECTIONS_MAX: usize = 512;
const HEAD_MAX: u64 = 16 << 10;
const BODY_MAX: u64 = 1 << 20;
const STACK: usize = 128 << 10;
/// How long a connection may be idle, or a client take to send a request.
const IDLE: Duration = Duration::from_secs(75);
/// How long requests may take to finish once the program was asked to end.
const DRAIN: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    connections: HashMap<u64, (TcpStream, bool)>,
    draining: bool,
    requests: u64,
}

struct Server {
    greeting: String,
    hostname: String,
    state: Mutex<State>,
    changed: Condvar,
}

/// Serves until SIGTERM or SIGINT. Arguments: `--port N`, and `--version V` or the environment's HELLO_VERSION.
pub fn serve(args: &[String]) -> i32 {
    let option =
        |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1).cloned());
    // Not from a variable: a pod next to a Service called `hello` is given a HELLO_PORT that is none.
    let port = option("--port").unwrap_or_else(|| "8080".to_owned());
    let version =
        option("--version").or_else(|| std::env::var("HELLO_VERSION").ok()).unwrap_or_else(|| "1".to_owned());
    let Ok(port) = port.parse::<u16>() else {
        say(2, &format!("hello: {port} is not a port\n"));
        return 2;
    };
    let signals = [sys::SIGTERM, sys::SIGINT, sys::SIGCHLD];
    sys::block(&signals);
    let listener = match TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port))) {
        Ok(listener) => listener,
        Err(error) => {
            say(2, &format!("hello: port {port}: {error}\n"));
            return 1;
        }
    };
    let hostname = hostname();
    let server = Arc::new(Server {
        greeting: format!("Hello Minke! | Running on: {hostname} | v={version}\n"),
        hostname,
        state: Mutex::default(),
        changed: Condvar::new(),
    });
    say(1, &format!("Hello Minke started | Running on: {} | v={version} | port {port}\n", server.hostname));
    let accepting = {
        let server = server.clone();
        std::thread::Builder::new().stack_size(STACK).spawn(move || accept(&server, &listener))
    };
    loop {
        match sys::wait_for(&signals) {
            sys::SIGCHLD => sys::reap(),
            _ => break,
        }
    }
    server.lock().draining = true;
    // Wakes the accepting thread, which takes what had already connected and then stops listening.
    let _ = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)));
    if let Ok(thread) = accepting {
        let _ = thread.join();
    }
    server.drain();
    say(1, "Hello Minke ended\n");
    0
}

fn accept(server: &Arc<Server>, listener: &TcpListener) {
    let mut id = 0;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                id += 1;
                server.admit(id, stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            // The client went away again, or descriptors ran out; neither ends the server.
            Err(_) => {}
        }
        if server.lock().draining && listener.set_nonblocking(true).is_err() {
            return;
        }
    }
}

impl Server {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with the state locked")
    }

    fn admit(self: &Arc<Server>, id: u64, stream: TcpStream) {
        let Ok(handle) = stream.try_clone() else { return };
        {
            let mut state = self.lock();
            if state.connections.len() >= CONNECTIONS_MAX {
                return;
            }
            // A new connection counts as busy: its first request may be on its way.
            state.connections.insert(id, (handle, true));
        }
        let server = self.clone();
        let run = move || {
            server.converse(id, stream);
            server.lock().connections.remove(&id);
            server.changed.notify_all();
        };
        if std::thread::Builder::new().stack_size(STACK).spawn(run).is_err() {
            self.lock().connections.remove(&id);
        }
    }

    /// Waits for requests in progress; connections between requests are closed.
    fn drain(&self) {
        let end = Instant::now() + DRAIN;
        let mut state = self.lock();
        for (stream, busy) in state.connections.values() {
            let _ = if *busy {
                stream.set_read_timeout(Some(Duration::from_secs(1)))
            } else {
                stream.shutdown(Shutdown::Both)
            };
        }
        while !state.connections.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).expect("no thread panics with the state locked").0;
        }
    }

    /// Notes that a connection waits for a request or works on one; false when it should close instead.
    fn mark(&self, id: u64, busy: bool) -> bool {
        let mut state = self.lock();
        let draining = state.draining;
        if let Some(connection) = state.connections.get_mut(&id) {
            connection.1 = busy;
        }
        busy || !draining
    }

    fn converse(&self, id: u64, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(IDLE));
        let _ = stream.set_write_timeout(Some(IDLE));
        let Ok(mut out) = stream.try_clone() else { return };
        let mut input = BufReader::with_capacity(4096, stream);
        loop {
            match input.fill_buf() {
                Ok(bytes) if !bytes.is_empty() => {}
                _ => return,
            }
            self.mark(id, true);
            let keep = match read_request(&mut input) {
                Ok(request) => self.answer(&request, &mut out),
                Err(code) => {
                    let _ = respond(&mut out, code, "", false, true);
                    false
                }
            };
            if !keep || !self.mark(id, false) {
                return;
            }
        }
    }

    /// Whether the connection goes on.
    fn answer(&self, request: &Request, out: &mut TcpStream) -> bool {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let number = |name: &str| {
            let value =
                query.split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name));
            value.and_then(|(_, value)| value.parse::<u64>().ok()).unwrap_or(0)
        };
        let (code, body) = match path {
            "/healthz" => (200, "ok\n".to_owned()),
            "/hostname" => (200, format!("{}\n", self.hostname)),
            "/echo" => (200, String::from_utf8_lossy(&request.body).into_owned()),
            "/wait" => {
                std::thread::sleep(Duration::from_millis(number("ms").min(600_000)));
                (200, self.greeting.clone())
            }
            "/" | "/exit" => (200, self.greeting.clone()),
            _ => (404, "not found\n".to_owned()),
        };
        let (count, draining) = {
            let mut state = self.lock();
            state.requests += 1;
            (state.requests, state.draining)
        };
        let keep = request.keep && !draining;
        let sent = respond(out, code, &body, keep, request.method != "HEAD").is_ok();
        say(1, &format!("{} {} {code} | Total requests: {count}\n", request.method, request.target));
        if path == "/exit" {
            std::process::exit(number("code") as u8 as i32);
        }
        keep && sent
    }
}

struct Request {
    method: String,
    target: String,
    keep: bool,
    body: Vec<u8>,
}

/// The next request, or the status to refuse it with.
fn read_request(input: &mut BufReader<TcpStream>) -> Result<Request, u16> {
    let mut left = HEAD_MAX;
    let mut line = || -> Result<String, u16> {
        let mut text = String::new();
        let n = input.by_ref().take(left).read_line(&mut text).map_err(|_| 400u16)? as u64;
        left -= n;
        if !text.ends_with('\n') {
            Err(if left == 0 { 431 } else { 400 })
        } else {
            Ok(text.trim_end().to_owned())
        }
    };
    let first = line()?;
    let mut words = first.split(' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(400);
    };
    let (mut keep, mut length, mut expects) = (version == "HTTP/1.1", 0u64, false);
    loop {
        let header = line()?;
        if header.is_empty() {
            break;
        }
        let Some((name, value)) = header.split_once(':') else { return Err(400) };
        let value = value.trim().to_ascii_lowercase();
        match name.to_ascii_lowercase().as_str() {
            "connection" if value.contains("close") => keep = false,
            "connection" if value.contains("keep-alive") => keep = true,
            "content-length" => length = value.parse().map_err(|_| 400u16)?,
            "transfer-encoding" => return Err(411),
            "expect" => expects = true,
            _ => {}
        }
    }
    if length > BODY_MAX {
        return Err(413);
    }
    if expects {
        let _ = input.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n");
    }
    let mut body = vec![0; length as usize];
    input.read_exact(&mut body).map_err(|_| 400u16)?;
    Ok(Request { method: method.to_owned(), target: target.to_owned(), keep, body })
}

fn respond(out: &mut TcpStream, code: u16, body: &str, keep: bool, with_body: bool) -> std::io::Result<()> {
    let reason = match code {
        200 => "OK",
        404 => "Not Found",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Bad Request",
    };
    let connection = if keep { "keep-alive" } else { "close" };
    let mut answer = format!(
        "HTTP/1.1 {code} {reason}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
        body.len()
    );
    if with_body {
        answer.push_str(body);
    }
    out.write_all(answer.as_bytes())
}
