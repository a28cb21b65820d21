//! What a request is about: the resource, object and verb that its path and method name.
//!
//! Upstream: apiserver pkg/endpoints/request/requestinfo.go.

use http::Method;
use minke_api::Kind;

/// A path below `/api/v1` or `/apis/GROUP/VERSION` that names a resource.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Route {
    pub group: String,
    pub version: String,
    /// Plural name, known to us or not.
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub subresource: String,
    /// What follows `/proxy`, with its slash.
    pub rest: String,
    /// Whether the path has the old `/watch/` in it.
    pub watch_path: bool,
}

impl Route {
    /// `None` for paths that name no resource: discovery, health and the like.
    pub fn parse(path: &str) -> Option<Route> {
        let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        let (group, version, mut rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let mut route = Route { group: decode(group), version: decode(version), ..Route::default() };
        if let ["watch", after @ ..] = rest {
            route.watch_path = true;
            rest = after;
        }
        if let ["namespaces", namespace, after @ ..] = rest
            && !namespace.is_empty()
        {
            route.namespace = decode(namespace);
            // A namespace's own subresources are not resources in it.
            rest = match after {
                [] | [""] | ["status" | "finalize"] => rest,
                _ => after,
            };
        }
        let (resource, after) = rest.split_first()?;
        route.resource = decode(resource);
        if route.resource.is_empty() {
            return None;
        }
        if let [name, after @ ..] = after {
            route.name = decode(name);
            if let [subresource, after @ ..] = after {
                route.subresource = decode(subresource);
                if !after.is_empty() {
                    // Kept as it was sent: it is another server's path.
                    route.rest = format!("/{}", after.join("/"));
                }
            }
        }
        if route.resource == "namespaces" && route.group.is_empty() {
            // `kubectl get ns x` is authorized in that namespace, too.
            route.namespace = route.name.clone();
        }
        Some(route)
    }

    pub fn kind(&self) -> Option<&'static Kind> {
        Kind::by_plural(&self.group, &self.version, &self.resource)
    }

    /// The verb as authorization knows it.
    pub fn verb(&self, method: &Method, wants_watch: bool) -> &'static str {
        match *method {
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if self.name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            Method::GET | Method::HEAD if self.watch_path => "watch",
            Method::GET | Method::HEAD if self.name.is_empty() && wants_watch => "watch",
            Method::GET | Method::HEAD if self.name.is_empty() => "list",
            // The single-object form of a watch.
            Method::GET | Method::HEAD if wants_watch && self.subresource.is_empty() => "watch",
            Method::GET | Method::HEAD => "get",
            _ => "",
        }
    }
}

/// Parameters of a query, decoded.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(text: Option<&str>) -> Query {
        let pairs = text.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        Query(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(&name.replace('+', " ")), decode(&value.replace('+', " ")))
                })
                .collect(),
        )
    }

    /// The first value of a parameter that is given and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str()).filter(|v| !v.is_empty())
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// `true` and `1` are true, as is a parameter without a value.
    pub fn flag(&self, name: &str) -> bool {
        self.bool(name).unwrap_or_default()
    }

    pub fn bool(&self, name: &str) -> Option<bool> {
        let (_, value) = self.0.iter().find(|(n, _)| n == name)?;
        Some(!matches!(value.to_ascii_lowercase().as_str(), "false" | "0"))
    }
}

/// Undoes percent-encoding; what is not valid is left as it is.
pub fn decode(text: &str) -> String {
    if !text.contains('%') {
        return text.to_owned();
    }
    let digit =
        |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16)).map(|digit| digit as u8);
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push(high << 4 | low);
                at += 3;
            }
            (byte, _, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `want` is `group version resource namespace name subresource rest`, `-` for empty.
    #[track_caller]
    fn check(path: &str, want: &str) {
        let got = Route::parse(path).map_or("none".to_owned(), |r| {
            let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
            let all = [&r.group, &r.version, &r.resource, &r.namespace, &r.name, &r.subresource, &r.rest];
            all.map(|text| dash(text)).join(" ") + if r.watch_path { " watch" } else { "" }
        });
        assert_eq!(got, want, "{path}");
    }

    #[test]
    fn paths_name_resources() {
        check("/api/v1/pods", "- v1 pods - - - -");
        check("/api/v1/namespaces/d/pods", "- v1 pods d - - -");
        check("/api/v1/namespaces/d/pods/p/log", "- v1 pods d p log -");
        check("/api/v1/namespaces/d/pods/p/proxy/a/b%2f/", "- v1 pods d p proxy /a/b%2f/");
        check("/api/v1/namespaces/d", "- v1 namespaces d d - -");
        check("/api/v1/namespaces", "- v1 namespaces - - - -");
        check("/api/v1/namespaces/d/status", "- v1 namespaces d d status -");
        check("/api/v1/namespaces/d/finalize", "- v1 namespaces d d finalize -");
        check("/api/v1/nodes/n%20x/status", "- v1 nodes - n x status -");
        check("/apis/apps/v1/namespaces/d/deployments/w/scale", "apps v1 deployments d w scale -");
        check("/api/v1/watch/namespaces/d/pods/p", "- v1 pods d p - - watch");
        check("/api/v1/watch/pods", "- v1 pods - - - - watch");
        check("/apis/apps/v1", "none");
        check("/apis/apps/v1/", "none");
        check("/apis", "none");
        check("/healthz", "none");
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse(Some("a=b%2Cc&watch&x=&y=1+2&t=false&a=z"));
        assert_eq!(query.get("a"), Some("b,c"));
        assert_eq!(query.all("a").collect::<Vec<_>>(), ["b,c", "z"]);
        assert!(query.flag("watch") && !query.flag("t") && !query.flag("none"));
        assert_eq!(query.get("x"), None);
        assert_eq!(query.get("y"), Some("1 2"));
        assert_eq!(decode("%zz%4"), "%zz%4");
    }
}
