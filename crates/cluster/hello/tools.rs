//! Everyday tools, as small as they can be and still answer what people type first.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use crate::{names, shell, sys};

pub type Tool = fn(&[String]) -> i32;

/// The names the image links to this program.
const TOOLS: &[(&str, Tool)] = &[
    ("bash", shell::main),
    ("cat", cat),
    ("curl", curl),
    ("date", date),
    ("echo", echo),
    ("env", env),
    ("false", |_| 1),
    ("head", head),
    ("hostname", |_| say(1, &format!("{}\n", hostname()))),
    ("id", id),
    ("kill", kill),
    ("ls", ls),
    ("mkdir", mkdir),
    ("nc", nc),
    ("nslookup", nslookup),
    ("ps", ps),
    ("pwd", |_| say(1, &format!("{}\n", std::env::current_dir().unwrap_or_default().display()))),
    ("rm", rm),
    ("seq", seq),
    ("sh", shell::main),
    ("sleep", sleep),
    ("tcp-echo", tcp_echo),
    ("touch", touch),
    ("true", |_| 0),
    ("wc", wc),
    ("wget", wget),
    ("whoami", |_| say(1, if sys::uid_and_gid().0 == 0 { "root\n" } else { "unknown\n" })),
];

pub fn find(name: &str) -> Option<Tool> {
    TOOLS.iter().find(|(tool, _)| *tool == name).map(|(_, tool)| *tool)
}

/// Writes to standard output (1) or standard error (2); 1 when nobody listens any more.
pub fn say(to: i32, text: &str) -> i32 {
    let done = match to {
        1 => io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()),
        _ => io::stderr().write_all(text.as_bytes()),
    };
    i32::from(done.is_err())
}

fn complain(tool: &str, what: &str, error: impl std::fmt::Display) -> i32 {
    say(2, &format!("{tool}: {what}: {error}\n"));
    1
}

pub fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// The arguments that are no options, or `default` when there are none.
fn operands(args: &[String], default: &str) -> Vec<String> {
    let found: Vec<String> = args.iter().filter(|a| !a.starts_with('-') || *a == "-").cloned().collect();
    if found.is_empty() && !default.is_empty() { vec![default.to_owned()] } else { found }
}

fn open(path: &str) -> io::Result<Box<dyn Read>> {
    Ok(if path == "-" { Box::new(io::stdin()) } else { Box::new(File::open(path)?) })
}

fn cat(args: &[String]) -> i32 {
    let mut code = 0;
    for path in operands(args, "-") {
        if let Err(error) = open(&path).and_then(|mut file| io::copy(&mut file, &mut io::stdout())) {
            code = complain("cat", &path, error);
        }
    }
    code
}

pub fn echo_text(args: &[String]) -> String {
    let (mut newline, mut escapes, mut from) = (true, false, 0);
    for arg in args {
        match arg.as_str() {
            "-n" => newline = false,
            "-e" => escapes = true,
            "-ne" | "-en" => (newline, escapes) = (false, true),
            _ => break,
        }
        from += 1;
    }
    let mut text = args[from..].join(" ");
    if escapes {
        text = text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r").replace("\\\\", "\\");
    }
    if newline {
        text.push('\n');
    }
    text
}

fn echo(args: &[String]) -> i32 {
    say(1, &echo_text(args))
}

fn env(_: &[String]) -> i32 {
    let lines: String = std::env::vars_os()
        .map(|(k, v)| format!("{}={}\n", k.to_string_lossy(), v.to_string_lossy()))
        .collect();
    say(1, &lines)
}

fn head(args: &[String]) -> i32 {
    let (mut lines, mut bytes, mut path) = (10u64, u64::MAX, "-");
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let (option, attached) = arg.split_at(arg.len().min(2));
        let number = match option {
            "-c" | "-n" if attached.is_empty() => rest.next().map_or("", String::as_str),
            "-c" | "-n" => attached,
            _ if arg.len() > 1 && arg.starts_with('-') => &arg[1..],
            _ => {
                path = arg;
                continue;
            }
        };
        match number.parse() {
            Err(_) => return complain("head", number, "invalid number"),
            Ok(number) if option == "-c" => (lines, bytes) = (u64::MAX, number),
            Ok(number) => lines = number,
        }
    }
    let mut print = |file: Box<dyn Read>| -> io::Result<()> {
        let mut file = BufReader::new(file.take(bytes));
        if lines == u64::MAX {
            return io::copy(&mut file, &mut io::stdout()).map(drop);
        }
        let mut out = io::stdout();
        while lines > 0 {
            let some = file.fill_buf()?;
            if some.is_empty() {
                break;
            }
            let end = some.iter().position(|b| *b == b'\n').map_or(some.len(), |at| at + 1);
            lines -= u64::from(some[end - 1] == b'\n');
            out.write_all(&some[..end])?;
            file.consume(end);
        }
        out.flush()
    };
    open(path).and_then(&mut print).map_or_else(|error| complain("head", path, error), |()| 0)
}

fn wc(args: &[String]) -> i32 {
    let path = operands(args, "-").remove(0);
    let (mut lines, mut words, mut bytes, mut between) = (0, 0, 0, true);
    let mut count = |file: Box<dyn Read>| -> io::Result<()> {
        let mut file = BufReader::new(file);
        loop {
            let some = file.fill_buf()?;
            if some.is_empty() {
                return Ok(());
            }
            for byte in some {
                lines += u64::from(*byte == b'\n');
                words += u64::from(between && !byte.is_ascii_whitespace());
                between = byte.is_ascii_whitespace();
            }
            bytes += some.len() as u64;
            let all = some.len();
            file.consume(all);
        }
    };
    if let Err(error) = open(&path).and_then(&mut count) {
        return complain("wc", &path, error);
    }
    match args.first().map(String::as_str) {
        Some("-c") => say(1, &format!("{bytes}\n")),
        Some("-l") => say(1, &format!("{lines}\n")),
        Some("-w") => say(1, &format!("{words}\n")),
        _ => say(1, &format!("{lines} {words} {bytes}\n")),
    }
}

fn id(_: &[String]) -> i32 {
    let (uid, gid) = sys::uid_and_gid();
    say(1, &format!("uid={uid} gid={gid}\n"))
}

fn kill(args: &[String]) -> i32 {
    let signal = match args.first().and_then(|a| a.strip_prefix('-')) {
        None | Some("TERM" | "SIGTERM") => sys::SIGTERM,
        Some("KILL" | "SIGKILL") => 9,
        Some("INT" | "SIGINT") => sys::SIGINT,
        Some(number) => number.parse().unwrap_or(sys::SIGTERM),
    };
    let mut code = 0;
    for pid in args.iter().filter_map(|a| a.parse::<i32>().ok()).filter(|pid| *pid > 0) {
        if !sys::send(pid, signal) {
            code = complain("kill", &pid.to_string(), io::Error::last_os_error());
        }
    }
    code
}

fn ls(args: &[String]) -> i32 {
    let flag = |c: char| args.iter().any(|a| a.starts_with('-') && a.contains(c));
    let (long, all) = (flag('l'), flag('a') || flag('A'));
    let mut code = 0;
    for path in operands(args, ".") {
        let entries = match fs::symlink_metadata(&path) {
            Err(error) => {
                code = complain("ls", &path, error);
                continue;
            }
            Ok(meta) if !meta.is_dir() => vec![path.clone()],
            Ok(_) => match fs::read_dir(&path) {
                Err(error) => {
                    code = complain("ls", &path, error);
                    continue;
                }
                Ok(dir) => {
                    let mut names: Vec<String> =
                        dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
                    names.sort();
                    names
                }
            },
        };
        for name in entries.iter().filter(|name| all || !name.starts_with('.') || **name == path) {
            let full = if *name == path { path.clone() } else { format!("{path}/{name}") };
            say(1, &if long { long_line(&full, name) } else { format!("{name}\n") });
        }
    }
    code
}

fn long_line(path: &str, name: &str) -> String {
    let Ok(meta) = fs::symlink_metadata(path) else { return format!("? {name}\n") };
    let kind = if meta.is_dir() {
        'd'
    } else if meta.is_symlink() {
        'l'
    } else {
        '-'
    };
    let mode: String = (0..9)
        .map(
            |bit| {
                if meta.permissions().mode() & (0o400 >> bit) != 0 { ['r', 'w', 'x'][bit % 3] } else { '-' }
            },
        )
        .collect();
    let target = fs::read_link(path).map(|to| format!(" -> {}", to.display())).unwrap_or_default();
    format!(
        "{kind}{mode} {:3} {:5} {:5} {:9} {name}{target}\n",
        meta.nlink(),
        meta.uid(),
        meta.gid(),
        meta.len()
    )
}

fn mkdir(args: &[String]) -> i32 {
    let parents = args.iter().any(|a| a == "-p");
    let mut code = 0;
    for path in operands(args, "") {
        let made = if parents { fs::create_dir_all(&path) } else { fs::create_dir(&path) };
        if let Err(error) = made {
            code = complain("mkdir", &path, error);
        }
    }
    code
}

fn rm(args: &[String]) -> i32 {
    let flag = |c: char| args.iter().any(|a| a.starts_with('-') && a.contains(c));
    let mut code = 0;
    for path in operands(args, "") {
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir());
        let removed = if is_dir && flag('r') { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        if let Err(error) = removed
            && !flag('f')
        {
            code = complain("rm", &path, error);
        }
    }
    code
}

fn touch(args: &[String]) -> i32 {
    let mut code = 0;
    for path in operands(args, "") {
        if let Err(error) = File::options().create(true).append(true).open(&path) {
            code = complain("touch", &path, error);
        }
    }
    code
}

fn ps(_: &[String]) -> i32 {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .map(|dir| dir.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    pids.sort_unstable();
    say(1, "PID   COMMAND\n");
    for pid in pids {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command: Vec<u8> = command.iter().map(|b| if *b == 0 { b' ' } else { *b }).collect();
        say(1, &format!("{pid:5} {}\n", String::from_utf8_lossy(&command).trim_end()));
    }
    0
}

fn seq(args: &[String]) -> i32 {
    let numbers: Vec<i64> = args.iter().filter_map(|a| a.parse().ok()).collect();
    let (from, to) = match numbers[..] {
        [to] => (1, to),
        [from, to, ..] => (from, to),
        [] => return 1,
    };
    (from..=to).map(|n| say(1, &format!("{n}\n"))).find(|code| *code != 0).unwrap_or(0)
}

fn sleep(args: &[String]) -> i32 {
    let Some(text) = args.first() else { return complain("sleep", "missing operand", "how long?") };
    if text == "infinity" {
        loop {
            std::thread::park();
        }
    }
    let (number, unit) = match text.as_bytes().last() {
        Some(b'm') => (&text[..text.len() - 1], 60.0),
        Some(b'h') => (&text[..text.len() - 1], 3600.0),
        Some(b'd') => (&text[..text.len() - 1], 86400.0),
        Some(b's') => (&text[..text.len() - 1], 1.0),
        _ => (text.as_str(), 1.0),
    };
    match number.parse::<f64>().map(|n| Duration::try_from_secs_f64(n * unit)) {
        Ok(Ok(time)) => std::thread::sleep(time),
        _ => return complain("sleep", text, "not a time"),
    }
    0
}

/// Seconds and UTC date: `date`, `date +%s`.
fn date(args: &[String]) -> i32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs();
    if args.first().is_some_and(|a| a == "+%s") {
        return say(1, &format!("{seconds}\n"));
    }
    // Days to a date in the proleptic Gregorian calendar, with years that begin in March.
    let days = seconds as i64 / 86400 + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    say(1, &format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z\n"))
}

fn nslookup(args: &[String]) -> i32 {
    let Some(name) = args.first() else { return complain("nslookup", "missing operand", "which name?") };
    let found = names::resolve(name);
    if found.is_empty() {
        say(2, &format!("nslookup: can't resolve '{name}'\n"));
        return 1;
    }
    say(1, &format!("Name: {name}\n"));
    for address in found {
        say(1, &format!("Address: {address}\n"));
    }
    0
}

/// Sends what it reads to a port, and prints what comes back: `nc HOST PORT`.
fn nc(args: &[String]) -> i32 {
    let words = operands(args, "");
    let (Some(host), Some(Ok(port))) = (words.first(), words.get(1).map(|p| p.parse::<u16>())) else {
        return complain("nc", "usage", "nc [-z] HOST PORT");
    };
    let Some(address) = names::resolve(host).first().copied() else {
        return complain("nc", host, "unknown host");
    };
    let address = SocketAddr::new(address, port);
    let mut stream = match TcpStream::connect_timeout(&address, Duration::from_secs(10)) {
        Ok(stream) => stream,
        Err(error) => return complain("nc", &address.to_string(), error),
    };
    if args.iter().any(|a| a == "-z") {
        return 0;
    }
    let Ok(mut out) = stream.try_clone() else { return 1 };
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut out);
        let _ = out.shutdown(std::net::Shutdown::Write);
    });
    i32::from(io::copy(&mut stream, &mut io::stdout()).is_err())
}

/// Returns every byte it is sent: `tcp-echo PORT`.
fn tcp_echo(args: &[String]) -> i32 {
    let port = args.first().and_then(|p| p.parse::<u16>().ok()).unwrap_or(7);
    let listener = match TcpListener::bind(("0.0.0.0", port)) {
        Ok(listener) => listener,
        Err(error) => return complain("tcp-echo", &port.to_string(), error),
    };
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || stream.try_clone().and_then(|mut to| io::copy(&mut &stream, &mut to)));
    }
    0
}

/// What `curl` and `wget` have in common.
struct Fetch {
    url: String,
    timeout: Duration,
    output: Option<String>,
    fail: bool,
}

fn curl(args: &[String]) -> i32 {
    let mut fetch = Fetch { url: String::new(), timeout: Duration::from_secs(60), output: None, fail: false };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-m" | "--max-time" | "--connect-timeout" => {
                let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(60.0);
                fetch.timeout = Duration::try_from_secs_f64(seconds).unwrap_or(fetch.timeout);
            }
            "-o" | "--output" => fetch.output = args.next().cloned(),
            "-f" | "--fail" => fetch.fail = true,
            flags if flags.starts_with('-') => fetch.fail |= !flags.starts_with("--") && flags.contains('f'),
            url => fetch.url = url.to_owned(),
        }
    }
    match fetch.run() {
        Ok(()) => 0,
        Err((code, text)) => {
            say(2, &format!("curl: ({code}) {text}\n"));
            code
        }
    }
}

fn wget(args: &[String]) -> i32 {
    let mut fetch = Fetch { url: String::new(), timeout: Duration::from_secs(60), output: None, fail: true };
    let mut to_file = true;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-T" => {
                let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(60.0);
                fetch.timeout = Duration::try_from_secs_f64(seconds).unwrap_or(fetch.timeout);
            }
            "-O" | "-qO" => {
                fetch.output = args.next().filter(|path| *path != "-").cloned();
                to_file = false;
            }
            "-O-" | "-qO-" => to_file = false,
            timeout if timeout.starts_with("--timeout=") => {
                let seconds = timeout["--timeout=".len()..].parse().unwrap_or(60);
                fetch.timeout = Duration::from_secs(seconds);
            }
            flags if flags.starts_with('-') => {}
            url => fetch.url = url.to_owned(),
        }
    }
    if to_file {
        let name = fetch
            .url
            .rsplit('/')
            .next()
            .filter(|name| !name.is_empty() && fetch.url.matches('/').count() > 2);
        fetch.output = Some(name.unwrap_or("index.html").to_owned());
    }
    match fetch.run() {
        Ok(()) => 0,
        Err((_, text)) => {
            say(2, &format!("wget: {text}\n"));
            1
        }
    }
}

impl Fetch {
    /// Errors carry curl's exit code.
    fn run(&self) -> Result<(), (i32, String)> {
        let rest = self.url.strip_prefix("http://").unwrap_or(&self.url);
        if rest.starts_with("https://") {
            return Err((1, "only http is spoken here".to_owned()));
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| (3, "bad port".to_owned()))?)
            }
            _ => (authority, 80u16),
        };
        let end = Instant::now() + self.timeout;
        let left = || end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let addresses = names::resolve(host);
        if addresses.is_empty() {
            return Err((6, format!("could not resolve host: {host}")));
        }
        let mut connected = Err((7, String::new()));
        for address in addresses {
            connected =
                TcpStream::connect_timeout(&SocketAddr::new(address, port), left()).map_err(|error| {
                    match error.kind() {
                        io::ErrorKind::TimedOut => (28, format!("{host} port {port}: connection timed out")),
                        _ => (7, format!("{host} port {port}: {error}")),
                    }
                });
            if connected.is_ok() {
                break;
            }
        }
        let mut stream = connected?;
        let path = if path.is_empty() { "/" } else { path };
        let request =
            format!("GET {path} HTTP/1.0\r\nHost: {authority}\r\nUser-Agent: hello\r\nAccept: */*\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(|error| (55, error.to_string()))?;
        let mut answer = Vec::new();
        let mut chunk = [0; 8192];
        loop {
            let _ = stream.set_read_timeout(Some(left()));
            match stream.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) => answer.extend_from_slice(&chunk[..n]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err((28, "operation timed out".to_owned()));
                }
                Err(error) => return Err((56, error.to_string())),
            }
        }
        let Some(at) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
            return Err((52, "empty reply from server".to_owned()));
        };
        let status = String::from_utf8_lossy(&answer[..at]).lines().next().unwrap_or_default().to_owned();
        let code: u16 = status.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        if self.fail && code >= 400 {
            return Err((22, format!("server returned error: {status}")));
        }
        let written = match &self.output {
            Some(path) => fs::write(path, &answer[at + 4..]),
            None => io::stdout().write_all(&answer[at + 4..]),
        };
        written.map_err(|error| (23, error.to_string()))
    }
}
