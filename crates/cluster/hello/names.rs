//! Host names to IPv4 addresses: /etc/hosts, then the name servers of /etc/resolv.conf with its search list.
//!
//! The C library's resolver loads shared objects at run time, which a static program has none of.

use std::fs::read_to_string;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

const TRIES: usize = 2;
const TIMEOUT: Duration = Duration::from_secs(2);

/// Every address of `host`; empty when it has none.
pub fn resolve(host: &str) -> Vec<IpAddr> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return vec![address];
    }
    let hosts = read_to_string("/etc/hosts").unwrap_or_default();
    for line in hosts.lines().map(|line| line.split('#').next().unwrap_or_default()) {
        let mut words = line.split_whitespace();
        if let Some(Ok(address)) = words.next().map(str::parse)
            && words.any(|name| name == host)
        {
            return vec![address];
        }
    }
    let config = Config::read();
    config
        .candidates(host)
        .iter()
        .map(|name| config.ask(name))
        .find(|found| !found.is_empty())
        .unwrap_or_default()
}

struct Config {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    ndots: usize,
}

impl Config {
    fn read() -> Config {
        let mut config = Config { servers: Vec::new(), search: Vec::new(), ndots: 1 };
        for line in read_to_string("/etc/resolv.conf").unwrap_or_default().lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    config.servers.extend(words.next().and_then(|w| w.parse::<IpAddr>().ok()))
                }
                Some("search") => config.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    for dots in words.filter_map(|w| w.strip_prefix("ndots:")?.parse().ok()) {
                        config.ndots = dots;
                    }
                }
                _ => {}
            }
        }
        config
    }

    fn candidates(&self, host: &str) -> Vec<String> {
        if let Some(absolute) = host.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let mut names: Vec<String> = self.search.iter().map(|domain| format!("{host}.{domain}")).collect();
        let at = if host.matches('.').count() >= self.ndots { 0 } else { names.len() };
        names.insert(at, host.to_owned());
        names
    }

    fn ask(&self, name: &str) -> Vec<IpAddr> {
        let Some(query) = query(name) else { return Vec::new() };
        for server in self.servers.iter().cycle().take(self.servers.len() * TRIES) {
            if let Some(answer) = exchange(*server, &query) {
                return addresses(&answer);
            }
        }
        Vec::new()
    }
}

fn exchange(server: IpAddr, query: &[u8]) -> Option<Vec<u8>> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.set_read_timeout(Some(TIMEOUT)).ok()?;
    socket.connect(SocketAddr::new(server, 53)).ok()?;
    socket.send(query).ok()?;
    let mut answer = vec![0; 4096];
    loop {
        let n = socket.recv(&mut answer).ok()?;
        if n >= 12 && answer[..2] == query[..2] {
            answer.truncate(n);
            return Some(answer);
        }
    }
}

/// A question for the A records of `name`, with recursion desired.
fn query(name: &str) -> Option<Vec<u8>> {
    let id = (std::process::id() as u16).to_be_bytes();
    let mut message = vec![id[0], id[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    Some(message)
}

fn addresses(answer: &[u8]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    let _ = collect(answer, &mut found);
    found
}

fn collect(answer: &[u8], found: &mut Vec<IpAddr>) -> Option<()> {
    let number = |at: usize| Some(u16::from_be_bytes([*answer.get(at)?, *answer.get(at + 1)?]) as usize);
    let mut at = 12;
    for _ in 0..number(4)? {
        at = skip_name(answer, at)? + 4;
    }
    for _ in 0..number(6)? {
        at = skip_name(answer, at)?;
        let (kind, length) = (number(at)?, number(at + 8)?);
        if kind == 1 && length == 4 {
            let a = answer.get(at + 10..at + 14)?;
            found.push(Ipv4Addr::new(a[0], a[1], a[2], a[3]).into());
        }
        at += 10 + length;
    }
    Some(())
}

fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer >= 0xc0 => return Some(at + 2),
            length => at += 1 + length as usize,
        }
    }
}
