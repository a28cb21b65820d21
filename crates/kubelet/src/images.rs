//! Has the image of a container ready: pull policy, credentials, and upstream's words for what goes
//! wrong (pkg/kubelet/images/image_manager.go).

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use k8s_openapi::api::core::v1 as core;
use minke_runtime::{Auth, Error, Image, ImageService};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::events::Recorder;
use crate::image_access::ImageAccess;
use crate::pod::{Pod, go_duration};
use crate::references::{self, Held};
use crate::settings::{PullRate, Settings};

pub struct Images {
    pub service: Arc<dyn ImageService>,
    pub events: Recorder,
    pub access: ImageAccess,
    /// One for each pull that may go on at the same time.
    turns: Semaphore,
    /// Of pulls that may begin, when they are limited.
    begins: Option<Mutex<Bucket>>,
}

/// As many tokens as there were at most, or as have come back since then.
struct Bucket {
    rate: PullRate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: PullRate, now: Instant) -> Bucket {
        Bucket { rate, tokens: rate.burst.into(), at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let back = now.duration_since(self.at).as_secs_f64() * f64::from(self.rate.per_second);
        (self.tokens, self.at) = ((self.tokens + back).min(self.rate.burst.into()), now);
        let any = self.tokens >= 1.0;
        self.tokens -= f64::from(u8::from(any));
        any
    }
}

/// Why there is no image: what the container's status shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFailure {
    pub reason: &'static str,
    pub message: String,
    /// The registry was asked, so asking again must back off.
    pub pulled: bool,
}

impl Images {
    pub fn new(
        service: Arc<dyn ImageService>,
        events: Recorder,
        access: ImageAccess,
        settings: &Settings,
    ) -> Images {
        let turns = settings.pulls_max.unwrap_or(Semaphore::MAX_PERMITS).min(Semaphore::MAX_PERMITS);
        let begins = settings.pull_rate.map(|rate| Mutex::new(Bucket::new(rate, Instant::now())));
        Images { service, events, access, turns: Semaphore::new(turns), begins }
    }

    /// Whether another pull may begin.
    fn may_begin(&self) -> bool {
        let take = |bucket: &Mutex<Bucket>| {
            bucket.lock().expect("nothing panics while it is locked").take(Instant::now())
        };
        self.begins.as_ref().is_none_or(take)
    }

    pub async fn ensure(
        &self,
        pod: &Pod,
        container: &core::Container,
        held: &Held,
    ) -> Result<Image, ImageFailure> {
        let name = told_of(container);
        let reference = container.image.as_deref().unwrap_or_default();
        let failure = |reason, message: String| ImageFailure { reason, message, pulled: false };
        let present = match self.service.resolve(reference).await {
            Ok(present) => present,
            Err(Error::InvalidImageName(why)) => {
                let message = format!("Failed to apply default image tag \"{reference}\": {why}");
                self.events.warning(pod, name, "InspectFailed", &message);
                return Err(failure("InvalidImageName", message));
            }
            Err(error) => {
                let message = format!("Failed to inspect image \"{reference}\": {error}");
                self.events.warning(pod, name, "InspectFailed", &message);
                return Err(failure("ImageInspectError", message));
            }
        };
        let policy = policy(container);
        if let ("IfNotPresent" | "Never", Some(image)) = (policy, &present)
            && !self.access.is_free(image)
            && !self.access.allows(image, &self.logins(pod, reference, held).await)
        {
            // Whoever could not have pulled it shall not find it by chance.
            if policy == "IfNotPresent" {
                return self.pull(pod, container, reference, held).await;
            }
            let message = format!(
                "Container image \"{reference}\" is present with pull policy of Never but does not have the proper credentials"
            );
            self.events.warning(pod, name, "ErrImageNeverPull", &message);
            return Err(failure("ErrImageNeverPull", message));
        }
        match (policy, present) {
            ("IfNotPresent" | "Never", Some(image)) => {
                let message = format!(
                    "Container image \"{reference}\" already present on machine and can be accessed by the pod"
                );
                self.events.normal(pod, name, "Pulled", message);
                Ok(image)
            }
            ("Never", None) => {
                let message =
                    format!("Container image \"{reference}\" is not present with pull policy of Never");
                self.events.warning(pod, name, "ErrImageNeverPull", &message);
                Err(failure("ErrImageNeverPull", message))
            }
            _ => self.pull(pod, container, reference, held).await,
        }
    }

    /// The ways to ask the registry of an image.
    async fn logins(&self, pod: &Pod, reference: &str, held: &Held) -> Vec<Auth> {
        let secrets = held.fetch(references::of_pulls(pod)).await.secrets;
        let missing = secrets.iter().filter(|(_, secret)| !matches!(secret, Ok(Some(_))));
        let missing: Vec<&str> = missing.map(|(name, _)| name.as_str()).collect();
        if !missing.is_empty() {
            let message = format!(
                "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                missing.join(", ")
            );
            // As upstream, of the pod: they are all its containers'.
            self.events.warning(pod, None, "FailedToRetrieveImagePullSecret", message);
        }
        credentials(reference, secrets.into_values().filter_map(|secret| secret.ok().flatten()))
    }

    /// Remembers with which login an image could be had.
    async fn note(&self, image: &Image, auth: &Auth) {
        let present = match self.service.list().await {
            Ok(images) => images.into_iter().map(|image| image.id).collect(),
            Err(_) => std::collections::BTreeSet::from([image.id.clone()]),
        };
        if let Err(error) = self.access.note(image, auth, &present) {
            tracing::warn!(%error, image = image.id, "How an image was pulled could not be written down");
        }
    }

    async fn pull(
        &self,
        pod: &Pod,
        container: &core::Container,
        reference: &str,
        held: &Held,
    ) -> Result<Image, ImageFailure> {
        let name = told_of(container);
        let waited = Instant::now();
        let auths = self.logins(pod, reference, held).await;
        self.events.normal(pod, name, "Pulling", format!("Pulling image \"{reference}\""));
        let _turn = self.turns.acquire().await.expect("turns are never closed");
        let started = Instant::now();
        let mut last = None;
        if !self.may_begin() {
            let message = "pull QPS exceeded".to_owned();
            self.events.warning(
                pod,
                name,
                "Failed",
                format!("Failed to pull image \"{reference}\": {message}"),
            );
            return Err(ImageFailure { reason: "ErrImagePull", message, pulled: true });
        }
        for auth in auths {
            match self.service.pull(reference, auth.clone(), None).await {
                Ok(image) => {
                    self.note(&image, &auth).await;
                    let millis = |since: Instant| {
                        go_duration(Duration::from_millis(since.elapsed().as_millis() as u64))
                    };
                    let message = format!(
                        "Successfully pulled image \"{reference}\" in {} ({} including waiting). Image size: {} bytes.",
                        millis(started),
                        millis(waited),
                        image.size
                    );
                    self.events.normal(pod, name, "Pulled", message);
                    return Ok(image);
                }
                Err(error) => last = Some(error),
            }
        }
        let error = last.expect("there is at least one way to ask");
        self.events.warning(pod, name, "Failed", format!("Failed to pull image \"{reference}\": {error}"));
        let reason = match error {
            Error::InvalidImageName(_) => "InvalidImageName",
            _ => "ErrImagePull",
        };
        Err(ImageFailure { reason, message: error.to_string(), pulled: true })
    }
}

/// The container that events are about; of a volume's image they are about the pod.
fn told_of(container: &core::Container) -> Option<&str> {
    Some(container.name.as_str()).filter(|name| !name.is_empty())
}

fn policy(container: &core::Container) -> &str {
    if let Some(policy) = container.image_pull_policy.as_deref() {
        return policy;
    }
    // The API server fills this in; a specification that comes another way gets the same.
    let image = container.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    match last.split_once(':') {
        _ if last.contains('@') => "IfNotPresent",
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    username: String,
    password: String,
    auth: String,
    registrytoken: String,
}

impl Entry {
    fn auth(&self) -> Option<Auth> {
        if !self.registrytoken.is_empty() {
            return Some(Auth::Bearer { token: self.registrytoken.clone() });
        }
        if !self.username.is_empty() {
            return Some(Auth::Basic { username: self.username.clone(), password: self.password.clone() });
        }
        let decoded = base64::engine::general_purpose::STANDARD.decode(self.auth.trim()).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (username, password) = text.split_once(':')?;
        Some(Auth::Basic {
            username: username.to_owned(),
            password: password.trim_end_matches('\0').to_owned(),
        })
    }
}

/// The ways to ask the registry of `reference`: with each fitting login, the most specific first; without
/// one when there is none.
pub(crate) fn credentials(reference: &str, secrets: impl Iterator<Item = Arc<core::Secret>>) -> Vec<Auth> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        auths: std::collections::BTreeMap<String, Entry>,
    }
    let target = full_path(reference);
    let mut fitting: Vec<(usize, Auth)> = vec![];
    for secret in secrets {
        let data = secret.data.as_ref();
        let get = |key: &str| data.and_then(|data| data.get(key)).map(|value| value.0.as_slice());
        let auths = match secret.type_.as_deref() {
            Some("kubernetes.io/dockerconfigjson") => get(".dockerconfigjson")
                .and_then(|json| serde_json::from_slice::<Config>(json).ok())
                .map(|config| config.auths),
            Some("kubernetes.io/dockercfg") => {
                get(".dockercfg").and_then(|json| serde_json::from_slice(json).ok())
            }
            _ => None,
        };
        for (registry, entry) in auths.into_iter().flatten() {
            let registry = registry_path(&registry);
            if let Some(auth) = entry.auth()
                && covers(&registry, &target)
            {
                fitting.push((registry.len(), auth));
            }
        }
    }
    fitting.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    match fitting.is_empty() {
        true => vec![Auth::Anonymous],
        false => fitting.into_iter().map(|(_, auth)| auth).collect(),
    }
}

/// `nginx` is `docker.io/library/nginx`.
fn full_path(reference: &str) -> String {
    let path = reference.split('@').next().unwrap_or(reference);
    match path.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => path.to_owned(),
        Some(_) => format!("docker.io/{path}"),
        None => format!("docker.io/library/{path}"),
    }
}

/// A registry as logins name it: `https://index.docker.io/v1/` is `docker.io`.
fn registry_path(name: &str) -> String {
    let name = name.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let name = name.trim_end_matches("/v1").trim_end_matches("/v2");
    match name.strip_prefix("index.docker.io") {
        Some(rest) => format!("docker.io{rest}"),
        None => name.to_owned(),
    }
}

/// Whether a login for `registry`, which may be a path or hold `*` for a part of a host name, is for `target`.
fn covers(registry: &str, target: &str) -> bool {
    let (host, path) = registry.split_once('/').unwrap_or((registry, ""));
    let (target_host, target_path) = target.split_once('/').unwrap_or((target, ""));
    let mut parts = host.split('.');
    let mut target_parts = target_host.split('.');
    let hosts_fit = loop {
        match (parts.next(), target_parts.next()) {
            (None, None) => break true,
            (Some("*"), Some(_)) => {}
            (Some(part), Some(target)) if part == target => {}
            _ => break false,
        }
    };
    hosts_fit && target_path.starts_with(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn basic(user: &str) -> Auth {
        Auth::Basic { username: user.into(), password: "p".into() }
    }

    #[track_caller]
    fn check(reference: &str, registry: &str, fits: bool) {
        let config = json!({"auths": {registry: {"auth": "dTpw"}}}).to_string();
        let config = base64::engine::general_purpose::STANDARD.encode(config);
        let secret = json!({"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": config}});
        let secret: core::Secret = serde_json::from_value(secret).expect("a secret");
        let want = if fits { basic("u") } else { Auth::Anonymous };
        assert_eq!(credentials(reference, [Arc::new(secret)].into_iter()), [want], "{reference} {registry}");
    }

    #[test]
    fn pulls_begin_as_often_as_they_may() {
        let start = Instant::now();
        let mut bucket = Bucket::new(PullRate { per_second: 2, burst: 3 }, start);
        let mut begin = |millis: u64| bucket.take(start + Duration::from_millis(millis));
        assert_eq!([begin(0), begin(0), begin(0), begin(0)], [true, true, true, false]);
        assert_eq!([begin(400), begin(500), begin(900), begin(1000)], [false, true, false, true]);
        // Those that were not used do not pile up.
        assert_eq!([begin(60_000), begin(60_000), begin(60_000), begin(60_000)], [true, true, true, false]);
    }

    #[test]
    fn logins_are_for_their_registry() {
        check("nginx", "https://index.docker.io/v1/", true);
        check("docker.io/library/nginx:1", "docker.io", true);
        check("example.com/a/b:1", "example.com", true);
        check("example.com/a/b:1", "example.com/a", true);
        check("example.com/a/b:1", "example.com/c", false);
        check("example.com:5000/a", "example.com:5000", true);
        check("example.com:5000/a", "example.com", false);
        check("x.example.com/a", "*.example.com", true);
        check("x.y.example.com/a", "*.example.com", false);
        check("localhost/a", "docker.io", false);
    }

    #[test]
    fn policies_have_their_default() {
        let policy_of = |image: &str, policy: Option<&str>| {
            let container = core::Container {
                image: Some(image.into()),
                image_pull_policy: policy.map(Into::into),
                ..core::Container::default()
            };
            super::policy(&container).to_owned()
        };
        assert_eq!(policy_of("a", None), "Always");
        assert_eq!(policy_of("h:5000/a", None), "Always");
        assert_eq!(policy_of("a:latest", None), "Always");
        assert_eq!(policy_of("a:1", None), "IfNotPresent");
        assert_eq!(policy_of("a@sha256:0", None), "IfNotPresent");
        assert_eq!(policy_of("a", Some("Never")), "Never");
    }
}
