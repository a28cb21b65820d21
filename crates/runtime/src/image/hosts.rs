//! Where registries are and how they are spoken to: containerd's `hosts.toml` layout.
//!
//! ```text
//! <dir>/docker.io/hosts.toml          for one registry; `host:port` and `host_port_` both name one with a port
//! <dir>/_default/hosts.toml           for all that have no directory of their own
//! ```
//! A directory without a `hosts.toml` may hold certificates as docker's does: `*.crt` are the registry's CAs,
//! `*.cert` with `*.key` is who we are. Files are read at every pull, so a change needs no restart.
//! Upstream: containerd docs/hosts.md.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use minke_api::time::parse_go_duration;
use toml::{Table, Value};

use crate::api::{Error, Result};

/// Largest file of these that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Where the files are, and how long is waited.
#[derive(Debug, Clone, PartialEq)]
pub struct RegistryConfig {
    /// The directory with a directory for each registry; it need not be there.
    pub dir: PathBuf,
    /// For a connection to come about, where the file says nothing else.
    pub connect_timeout: Duration,
    /// For the next byte to come.
    pub read_timeout: Duration,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self::in_dir(Path::new("/nonexistent"))
    }
}

impl RegistryConfig {
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(30),
        }
    }

    /// Places to ask for images of `domain`, in order; the registry itself is the last.
    pub fn endpoints(&self, domain: &str) -> Result<Vec<Endpoint>> {
        let Some(dir) = self.directory(domain) else { return Ok(vec![self.own(domain)]) };
        let path = dir.join("hosts.toml");
        let context = |why: String| Error::Failed(format!("{}: {why}", path.display()));
        match read(&path).map_err(|e| context(e.to_string()))? {
            Some(text) => self.parse(domain, &dir, &text).map_err(context),
            None => {
                let mut own = self.own(domain);
                docker_files(&dir, &mut own).map_err(|e| context(e.to_string()))?;
                Ok(vec![own])
            }
        }
    }

    fn directory(&self, domain: &str) -> Option<PathBuf> {
        let under = match domain.rsplit_once(':') {
            Some((host, port)) => format!("{host}_{port}_"),
            None => domain.to_owned(),
        };
        [domain, &under, "_default"].iter().map(|name| self.dir.join(name)).find(|dir| dir.is_dir())
    }

    fn endpoint(&self, base: String) -> Endpoint {
        Endpoint {
            base,
            capabilities: Capabilities::ALL,
            mirror: false,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
            connect_timeout: self.connect_timeout,
            read_timeout: self.read_timeout,
        }
    }

    /// The registry itself, as its name says.
    fn own(&self, domain: &str) -> Endpoint {
        let host = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
        let scheme = if is_loopback(domain) { "http" } else { "https" };
        self.endpoint(format!("{scheme}://{host}/v2"))
    }

    fn parse(&self, domain: &str, dir: &Path, text: &str) -> Result<Vec<Endpoint>, String> {
        let root: Table = text.parse().map_err(|e: toml::de::Error| e.message().to_owned())?;
        let mut all = Vec::new();
        if let Some(hosts) = root.get("host") {
            let hosts = hosts.as_table().ok_or("host is not a table")?;
            for (url, table) in hosts {
                let table = table.as_table().ok_or(format!("host {url:?} is not a table"))?;
                let mut host = self.endpoint(base(url, table)?);
                host.mirror = true;
                fill(&mut host, dir, table)?;
                all.push(host);
            }
        }
        let mut server = match root.get("server") {
            None => self.own(domain),
            Some(server) => self.endpoint(base(server.as_str().ok_or("server is not a text")?, &root)?),
        };
        fill(&mut server, dir, &root)?;
        all.push(server);
        Ok(all)
    }
}

/// What a host may be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    pub pull: bool,
    pub resolve: bool,
    pub push: bool,
}

impl Capabilities {
    const ALL: Self = Self { pull: true, resolve: true, push: true };
}

/// One place to ask.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// `https://host:port/v2`, or with more of a path, without a slash at its end.
    pub base: String,
    pub capabilities: Capabilities,
    /// Not the registry itself: it is told which one is meant, and gets no credentials.
    pub mirror: bool,
    /// Certificates of CAs, in PEM.
    pub ca: Vec<Vec<u8>>,
    /// Who we are: certificate and key together, in PEM.
    pub client: Vec<Vec<u8>>,
    pub skip_verify: bool,
    pub headers: Vec<(String, String)>,
    pub connect_timeout: Duration,
    pub read_timeout: Duration,
}

fn base(url: &str, table: &Table) -> Result<String, String> {
    let url = if url.contains("://") { url.to_owned() } else { format!("https://{url}") };
    let url = url.trim_end_matches('/');
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    if host.is_empty() || url.contains(['?', '#', '@']) {
        return Err(format!("{url:?} is not the URL of a host"));
    }
    let whole = boolean(table, "override_path")? || url.ends_with("/v2");
    Ok(if whole { url.to_owned() } else { format!("{url}/v2") })
}

fn boolean(table: &Table, name: &str) -> Result<bool, String> {
    match table.get(name) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or(format!("{name} is neither true nor false")),
    }
}

/// A text, or a list of them.
fn texts(value: &Value, name: &str) -> Result<Vec<String>, String> {
    let wrong = || format!("{name} is neither a text nor a list of texts");
    match value {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => {
            list.iter().map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        _ => Err(wrong()),
    }
}

fn fill(host: &mut Endpoint, dir: &Path, table: &Table) -> Result<(), String> {
    let file = |name: &str| -> Result<Vec<u8>, String> {
        let path = dir.join(name);
        let text = read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        text.map(String::into_bytes).ok_or_else(|| format!("{} is not there", path.display()))
    };
    if let Some(list) = table.get("capabilities") {
        let list = texts(list, "capabilities")?;
        if let Some(unknown) = list.iter().find(|c| !["pull", "resolve", "push"].contains(&c.as_str())) {
            return Err(format!("unknown capability {unknown}"));
        }
        let has = |name: &str| list.iter().any(|c| c == name);
        host.capabilities = Capabilities { pull: has("pull"), resolve: has("resolve"), push: has("push") };
    }
    if let Some(ca) = table.get("ca") {
        host.ca = texts(ca, "ca")?.iter().map(|name| file(name)).collect::<Result<_, _>>()?;
    }
    match table.get("client") {
        None => {}
        Some(Value::Array(pairs)) => {
            for pair in pairs {
                let parts =
                    texts(pair, "client")?.iter().map(|name| file(name)).collect::<Result<Vec<_>, _>>()?;
                host.client.push(parts.concat());
            }
        }
        Some(one) => {
            host.client =
                vec![texts(one, "client")?.iter().map(|n| file(n)).collect::<Result<Vec<_>, _>>()?.concat()]
        }
    }
    host.skip_verify = boolean(table, "skip_verify")?;
    if let Some(timeout) = table.get("dial_timeout") {
        let text = timeout.as_str().ok_or("dial_timeout is not a text")?;
        host.connect_timeout =
            parse_go_duration(text).map_err(|why| format!("invalid dial_timeout: {why}"))?;
    }
    if let Some(headers) = table.get("header") {
        for (name, values) in headers.as_table().ok_or("header is not a table")? {
            for value in texts(values, "header")? {
                host.headers.push((name.clone(), value));
            }
        }
    }
    Ok(())
}

/// `None` when there is no such file.
fn read(path: &Path) -> std::io::Result<Option<String>> {
    use std::io::Read;
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(Some(text))
}

fn docker_files(dir: &Path, host: &mut Endpoint) -> std::io::Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in files {
        let bytes = |path: &Path| Ok::<_, std::io::Error>(read(path)?.unwrap_or_default().into_bytes());
        match path.extension().and_then(|e| e.to_str()) {
            Some("crt") => host.ca.push(bytes(&path)?),
            Some("cert") => {
                host.client
                    .push([bytes(&path)?, b"\n".to_vec(), bytes(&path.with_extension("key"))?].concat());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Loopback registries are spoken to in plain HTTP, as docker and containerd do it.
fn is_loopback(domain: &str) -> bool {
    let host = match domain.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => domain.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A `hosts.toml` as somebody has written it; for fuzzing.
pub(crate) fn fuzz(text: &str) {
    let config = RegistryConfig::default();
    if let Ok(all) = config.parse("docker.io", Path::new("/nonexistent"), text) {
        let own = all.iter().filter(|endpoint| !endpoint.mirror).count();
        assert_eq!(own, 1, "the registry itself is always there");
        assert!(all.iter().all(|endpoint| !endpoint.base.ends_with('/')));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<&[&str], &str>) {
        let got = RegistryConfig::default().parse("docker.io", Path::new("/nonexistent"), text);
        match want {
            Ok(want) => {
                let got = got.expect("it is good");
                assert_eq!(got.iter().map(|e| e.base.as_str()).collect::<Vec<_>>(), want);
            }
            Err(want) => {
                let got = got.expect_err("it is wrong");
                assert!(got.contains(want), "{got}");
            }
        }
    }

    #[test]
    fn hosts_are_asked_in_their_order_and_then_the_server() {
        check("", Ok(&["https://registry-1.docker.io/v2"]));
        check(r#"server = "https://a""#, Ok(&["https://a/v2"]));
        check(
            "server = \"http://z:1/\"\n[host.\"https://m2\"]\n[host.\"http://m1:5000\"]\n[host.bare]\n",
            Ok(&["https://m2/v2", "http://m1:5000/v2", "https://bare/v2", "http://z:1/v2"]),
        );
        check(
            "[host.\"https://m/cache\"]\n[host.\"https://m/own/v2\"]\n[host.\"https://m/x\"]\noverride_path = true\n",
            Ok(&["https://m/cache/v2", "https://m/own/v2", "https://m/x", "https://registry-1.docker.io/v2"]),
        );
        check("server = 3", Err("server is not a text"));
        check("server = \"ftp://x\"", Err("is not the URL of a host"));
        check("[host.\"https://me:pw@x\"]", Err("is not the URL of a host"));
        check("[host.\"https://x\"]\ncapabilities = [\"fly\"]", Err("unknown capability fly"));
        check("[host.\"https://x\"]\nca = \"nosuch.pem\"", Err("nosuch.pem is not there"));
        check("[host.\"https://x\"]\nskip_verify = \"yes\"", Err("neither true nor false"));
        check("[host.\"https://x\"]\ndial_timeout = \"3 days\"", Err("invalid dial_timeout"));
        check("= = =", Err(""));
    }

    #[test]
    fn a_host_has_what_the_file_gives_it() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("reg.example_5000_");
        fs::create_dir(&dir).unwrap();
        for name in ["ca.pem", "c.pem", "k.pem"] {
            fs::write(dir.join(name), format!("{name}\n")).unwrap();
        }
        let text = "server = \"https://up\"\n[host.\"https://m\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
                    ca = [\"ca.pem\"]\nclient = [[\"c.pem\", \"k.pem\"]]\nskip_verify = true\n\
                    dial_timeout = \"1m2s\"\n[host.\"https://m\".header]\nx-a = [\"1\", \"2\"]\nx-b = \"3\"\n";
        fs::write(dir.join("hosts.toml"), text).unwrap();
        let config = RegistryConfig::in_dir(tmp.path());
        let all = config.endpoints("reg.example:5000").unwrap();
        let host = &all[0];
        assert_eq!(host.ca, [b"ca.pem\n".to_vec()]);
        assert_eq!(host.client, [b"c.pem\nk.pem\n".to_vec()]);
        assert!(host.skip_verify && host.mirror && !host.capabilities.push && host.capabilities.pull);
        assert_eq!(host.connect_timeout, Duration::from_secs(62));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(host.headers, [pair("x-a", "1"), pair("x-a", "2"), pair("x-b", "3")]);
        assert_eq!(all[1].base, "https://up/v2");
        // Others have no directory, until there is one for all.
        assert_eq!(config.endpoints("other").unwrap()[0].base, "https://other/v2");
        fs::create_dir(tmp.path().join("_default")).unwrap();
        fs::write(tmp.path().join("_default/hosts.toml"), "[host.\"https://all\"]").unwrap();
        assert_eq!(config.endpoints("other").unwrap()[0].base, "https://all/v2");
        // Docker's files.
        let docker = tmp.path().join("docker.example");
        fs::create_dir(&docker).unwrap();
        for name in ["a.crt", "b.cert", "b.key"] {
            fs::write(docker.join(name), name).unwrap();
        }
        let own = &config.endpoints("docker.example").unwrap()[0];
        assert_eq!((own.ca.len(), own.client[0].as_slice()), (1, &b"b.cert\nb.key"[..]));
    }

    #[test]
    fn loopback_is_plain() {
        let base = |domain| RegistryConfig::default().own(domain).base;
        assert_eq!(base("localhost:5000"), "http://localhost:5000/v2");
        assert_eq!(base("127.0.0.1:1"), "http://127.0.0.1:1/v2");
        assert_eq!(base("[::1]:1"), "http://[::1]:1/v2");
        assert_eq!(base("10.0.0.1:80"), "https://10.0.0.1:80/v2");
        assert_eq!(base("docker.io"), "https://registry-1.docker.io/v2");
    }
}
