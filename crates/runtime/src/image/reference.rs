//! Image references, normalised as docker and containerd do: `nginx` is `docker.io/library/nginx:latest`.

use std::fmt;

use crate::api::Error;

/// A reference in its full form.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// `docker.io`, `localhost:5000`
    pub domain: String,
    /// `library/nginx`
    pub path: String,
    /// `latest` when neither a tag nor a digest is given; absent with a digest and no tag.
    pub tag: Option<String>,
    /// `sha256:...`; wins over the tag.
    pub digest: Option<String>,
}

impl Reference {
    pub fn parse(text: &str) -> Result<Self, Error> {
        let invalid =
            |why: &str| Error::InvalidImageName(format!("couldn't parse image name {text:?}: {why}"));
        let format = || invalid("invalid reference format");
        if text.is_empty() || text.len() > 4096 {
            return Err(format());
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if digest.is_some_and(|d| parse_digest(d).is_none()) {
            return Err(format());
        }
        // A colon after the last slash begins a tag; one before it belongs to a port.
        let name_start = rest.rfind('/').map_or(0, |at| at + 1);
        let (name, tag) = match rest[name_start..].find(':') {
            Some(at) => (&rest[..name_start + at], Some(&rest[name_start + at + 1..])),
            None => (rest, None),
        };
        if tag.is_some_and(|t| !is_tag(t)) {
            return Err(format());
        }
        if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()) {
            return Err(invalid("cannot specify 64-byte hexadecimal strings"));
        }
        let (domain, path) = match name.split_once('/') {
            Some((first, path)) if is_domain(first) => (first, path.to_owned()),
            _ => ("docker.io", name.to_owned()),
        };
        let domain = if domain == "index.docker.io" { "docker.io" } else { domain };
        let path = match domain == "docker.io" && !path.contains('/') {
            true => format!("library/{path}"),
            false => path,
        };
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(invalid(&format!(
                "invalid reference format: repository name ({path}) must be lowercase"
            )));
        }
        if !path.split('/').all(is_path_component) || !is_host(domain) || domain.len() + path.len() > 254 {
            return Err(format());
        }
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Self { domain: domain.to_owned(), path, tag, digest: digest.map(str::to_owned) })
    }

    /// `docker.io/library/nginx`
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// What to ask the registry for: the digest, or else the tag.
    pub fn object(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        // With both, the digest says it all.
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

/// The hexadecimal part of a digest we can check, which is SHA-256 only.
pub fn parse_digest(text: &str) -> Option<&str> {
    let hex = text.strip_prefix("sha256:")?;
    let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    valid.then_some(hex)
}

/// The first part of a name is a host when it could not be anything else.
fn is_domain(part: &str) -> bool {
    part.contains(['.', ':']) || part == "localhost" || part.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, rest)) if v6.parse::<std::net::Ipv6Addr>().is_ok() => ("v6", rest.strip_prefix(':')),
        Some(_) => return false,
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    host.split('.').all(label)
        && port.is_none_or(|p| !p.is_empty() && p.len() <= 5 && p.bytes().all(|b| b.is_ascii_digit()))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&tag.len())
        && word(tag.as_bytes()[0])
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

/// `[a-z0-9]+` joined by one of `.`, `_`, `__` or any number of `-`.
fn is_path_component(part: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let ends = bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric);
    let mut separators = bytes.split(alphanumeric).filter(|s| !s.is_empty());
    ends && separators.all(|s| matches!(s, b"." | b"_" | b"__") || s.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &str, want: Result<&str, &str>) {
        let got = Reference::parse(given).map(|r| r.to_string()).map_err(|e| e.to_string());
        match want {
            Ok(want) => assert_eq!(got.as_deref(), Ok(want)),
            Err(want) => assert!(got.as_ref().is_err_and(|e| e.ends_with(want)), "{got:?}"),
        }
    }

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn references_are_normalised() {
        check("nginx", Ok("docker.io/library/nginx:latest"));
        check("nginx:1.27", Ok("docker.io/library/nginx:1.27"));
        check("bitnami/redis", Ok("docker.io/bitnami/redis:latest"));
        check("index.docker.io/nginx", Ok("docker.io/library/nginx:latest"));
        check("docker.io/nginx", Ok("docker.io/library/nginx:latest"));
        check("localhost/x", Ok("localhost/x:latest"));
        check("localhost:5000/a/b:v1", Ok("localhost:5000/a/b:v1"));
        check("[::1]:5000/x", Ok("[::1]:5000/x:latest"));
        check(
            "registry.k8s.io/e2e-test-images/agnhost:2.40",
            Ok("registry.k8s.io/e2e-test-images/agnhost:2.40"),
        );
        check("minke.local/hello:v1", Ok("minke.local/hello:v1"));
        check(&format!("nginx@sha256:{HEX}"), Ok(&format!("docker.io/library/nginx@sha256:{HEX}")));
        check(&format!("nginx:1@sha256:{HEX}"), Ok(&format!("docker.io/library/nginx@sha256:{HEX}")));
        check("a__b--c.d_e", Ok("docker.io/library/a__b--c.d_e:latest"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        const FORMAT: &str = "invalid reference format";
        check("", Err(FORMAT));
        check("Nginx", Err("repository name (library/Nginx) must be lowercase"));
        check("a/Nginx", Err("repository name (a/Nginx) must be lowercase"));
        check("nginx:", Err(FORMAT));
        check("nginx:-x", Err(FORMAT));
        check("nginx latest", Err(FORMAT));
        check("a//b", Err(FORMAT));
        check("../etc", Err(FORMAT));
        check("x/../y", Err(FORMAT));
        check("a___b", Err(FORMAT));
        check("-a", Err(FORMAT));
        check("nginx@sha256:123", Err(FORMAT));
        check("http://x/y", Err(FORMAT));
        check(HEX, Err("cannot specify 64-byte hexadecimal strings"));
        check(&"a".repeat(300), Err(FORMAT));
    }
}
