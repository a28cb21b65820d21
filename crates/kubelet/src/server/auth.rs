//! Who may ask this node for what: the API server says.
//!
//! A caller is known by a client certificate of the cluster or by a token, which the API server is asked
//! about by TokenReview; whether it may do what it wants, by SubjectAccessReview. Both answers are kept for
//! a while. Upstream: pkg/kubelet/server/auth.go, with its defaults for how long.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::TokenReview;
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use minke_api::{Kind, Status};
use minke_client::{Client, Target};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::routes::{Body, Caller, text};

const TOKEN_KEPT: Duration = Duration::from_secs(2 * 60);
const ALLOWED_KEPT: Duration = Duration::from_secs(5 * 60);
const REFUSED_KEPT: Duration = Duration::from_secs(30);
/// Answers that are kept, of each kind.
const KEPT_MAX: usize = 1024;
/// Longest token that the API server is asked about.
const TOKEN_MAX: usize = 16 << 10;

/// Asks the API server, and remembers what it said.
pub struct Gate {
    client: Arc<dyn Client>,
    node: String,
    tokens: Kept<String, Option<Arc<User>>>,
    verdicts: Kept<(Arc<User>, &'static str, &'static str), bool>,
}

/// A caller as the API server knows it.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    name: String,
    uid: String,
    groups: Vec<String>,
    /// JSON of what else is known.
    extra: String,
}

/// Answers until they are too old.
struct Kept<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K: Hash + Eq, V: Clone> Kept<K, V> {
    fn new() -> Kept<K, V> {
        Kept(Mutex::new(HashMap::new()))
    }

    fn get(&self, key: &K) -> Option<V> {
        let kept = self.0.lock().expect("nothing panics while answers are looked up");
        kept.get(key).filter(|(until, _)| Instant::now() < *until).map(|(_, value)| value.clone())
    }

    fn put(&self, key: K, value: V, time: Duration) {
        let mut kept = self.0.lock().expect("nothing panics while answers are looked up");
        let now = Instant::now();
        if kept.len() >= KEPT_MAX {
            kept.retain(|_, (until, _)| now < *until);
        }
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key, (now + time, value));
    }
}

impl Gate {
    pub fn new(client: Arc<dyn Client>, node: &str) -> Gate {
        Gate { client, node: node.to_owned(), tokens: Kept::new(), verdicts: Kept::new() }
    }

    /// Lets a request pass, or says why not. `certificate` is what the caller has shown, if anything.
    pub async fn pass(
        &self,
        certificate: Option<&Caller>,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<(), http::Response<Body>> {
        // For these the API server has only one answer; asking it would be asking oneself.
        if certificate.is_some_and(Caller::may_call) {
            return Ok(());
        }
        let failed = |status: Status| {
            tracing::warn!(error = %status, "The API server does not say who may call");
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("{status}\n"))
        };
        let user = match certificate {
            Some(caller) => {
                let mut groups: Vec<String> = caller.groups.iter().cloned().collect();
                groups.sort_unstable();
                groups.push("system:authenticated".to_owned());
                Some(Arc::new(User { name: caller.user.clone(), groups, ..User::default() }))
            }
            None => self.bearer(headers).await.map_err(failed)?,
        };
        let Some(user) = user else {
            return Err(text(StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()));
        };
        let verb = verb(method);
        let subresources = subresources(path);
        for subresource in subresources {
            if self.may(&user, verb, subresource).await.map_err(failed)? {
                return Ok(());
            }
        }
        let name = &user.name;
        let why = format!(
            "Forbidden (user={name}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
            subresources.join(" ")
        );
        Err(text(StatusCode::FORBIDDEN, why))
    }

    /// The user of a token, if there is a good one.
    async fn bearer(&self, headers: &HeaderMap) -> Result<Option<Arc<User>>, Status> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = given.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        let Some(token) = token.filter(|token| !token.is_empty() && token.len() <= TOKEN_MAX) else {
            return Ok(None);
        };
        let token = token.to_owned();
        if let Some(user) = self.tokens.get(&token) {
            return Ok(user);
        }
        let review = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token},
        });
        let answer = self.client.post(Target::collection(Kind::of::<TokenReview>(), ""), review).await?;
        let user = user(&answer["status"]).map(Arc::new);
        self.tokens.put(token, user.clone(), TOKEN_KEPT);
        Ok(user)
    }

    async fn may(
        &self,
        user: &Arc<User>,
        verb: &'static str,
        subresource: &'static str,
    ) -> Result<bool, Status> {
        let key = (user.clone(), verb, subresource);
        if let Some(verdict) = self.verdicts.get(&key) {
            return Ok(verdict);
        }
        let extra: Value = serde_json::from_str(&user.extra).unwrap_or_default();
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": user.name, "uid": user.uid, "groups": user.groups, "extra": extra,
                "resourceAttributes": {
                    "verb": verb, "group": "", "version": "v1", "resource": "nodes",
                    "subresource": subresource, "name": self.node,
                },
            },
        });
        let kind = Kind::of::<SubjectAccessReview>();
        let answer = self.client.post(Target::collection(kind, ""), review).await?;
        let allowed = answer["status"]["allowed"] == true;
        self.verdicts.put(key, allowed, if allowed { ALLOWED_KEPT } else { REFUSED_KEPT });
        Ok(allowed)
    }
}

/// Whom the status of a TokenReview names.
fn user(status: &Value) -> Option<User> {
    if status["authenticated"] != true {
        return None;
    }
    let user = &status["user"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Some(User {
        name: text(&user["username"]),
        uid: text(&user["uid"]),
        groups: user["groups"].as_array().into_iter().flatten().map(text).collect(),
        extra: if user["extra"].is_object() { user["extra"].to_string() } else { String::new() },
    })
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

/// The subresources of nodes by which a path may be allowed; one of them is enough.
fn subresources(path: &str) -> &'static [&'static str] {
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    match first {
        "stats" => &["stats"],
        "metrics" => &["metrics"],
        "logs" => &["log"],
        "checkpoint" => &["checkpoint"],
        "pods" | "runningpods" => &["pods", "proxy"],
        "healthz" => &["healthz", "proxy"],
        "configz" => &["configz", "proxy"],
        _ => &["proxy"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_allowed_by_their_subresource() {
        for (path, want) in [
            ("/stats/summary", "stats"),
            ("/metrics", "metrics"),
            ("/metrics/cadvisor", "metrics"),
            ("/metricsx", "proxy"),
            ("/pods", "pods proxy"),
            ("/runningpods/", "pods proxy"),
            ("/healthz", "healthz proxy"),
            ("/healthz/ping", "healthz proxy"),
            ("/configz", "configz proxy"),
            ("/exec/ns/p/c", "proxy"),
            ("/logs/syslog", "log"),
            ("/checkpoint/ns/p/c", "checkpoint"),
            ("//stats", "stats"),
            ("/", "proxy"),
        ] {
            assert_eq!(subresources(path).join(" "), want, "{path}");
        }
    }

    #[test]
    fn a_review_names_the_user() {
        let status = json!({"authenticated": true, "user": {
            "username": "system:serviceaccount:monitoring:prometheus", "uid": "u", "groups": ["a", "b"],
            "extra": {"k": ["v"]},
        }});
        let found = user(&status).expect("a user");
        assert_eq!(found.name, "system:serviceaccount:monitoring:prometheus");
        assert_eq!((found.groups.join(" "), found.extra), ("a b".to_owned(), r#"{"k":["v"]}"#.to_owned()));
        assert_eq!(user(&json!({"authenticated": false, "user": {"username": "x"}})), None);
        assert_eq!(user(&json!({})), None);
    }

    #[test]
    fn answers_are_kept_for_a_while_and_not_without_bound() {
        let kept = Kept::new();
        kept.put(0, "yes", ALLOWED_KEPT);
        assert_eq!(kept.get(&0), Some("yes"));
        kept.put(0, "yes", Duration::ZERO);
        assert_eq!(kept.get(&0), None);
        for n in 0..=KEPT_MAX {
            kept.put(n, "no", REFUSED_KEPT);
        }
        assert!(kept.0.lock().unwrap().len() <= KEPT_MAX);
    }
}
