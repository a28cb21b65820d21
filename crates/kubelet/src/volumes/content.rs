//! What stands in a volume made from objects of the cluster. Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;
use minke_api::{LabelSelector, pem};

use super::Known;
use super::pod_certificates::Credential;
use crate::env::{self, Facts};
use crate::pod::Pod;
use crate::references::{self, Reference, Referenced};

/// A service account token for a pod.
#[derive(Debug, Clone)]
pub struct Token {
    pub text: String,
    pub renew_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub data: Vec<u8>,
    pub mode: u32,
    /// Who owns it instead of root.
    pub user: Option<u32>,
}

/// Files by their relative path.
pub type Content = BTreeMap<String, File>;

/// The content of `volume`; `None` for volumes whose contents are not ours. The error is the reason why it
/// can't be set up.
pub fn of(
    pod: &Pod,
    volume: &core::Volume,
    referenced: &Referenced,
    known: &Known,
    facts: &Facts,
) -> Result<Option<Content>, String> {
    let mut files = Content::new();
    if let Some(from) = &volume.config_map {
        let defaults = Defaults::new(from.default_mode, from.default_user);
        config_map(&mut files, referenced, &from.name, from.optional, from.items.as_deref(), defaults)?;
    } else if let Some(from) = &volume.secret {
        let name = from.secret_name.as_deref().unwrap_or_default();
        let defaults = Defaults::new(from.default_mode, from.default_user);
        secret(&mut files, referenced, name, from.optional, from.items.as_deref(), defaults)?;
    } else if let Some(from) = &volume.downward_api {
        let defaults = Defaults::new(from.default_mode, from.default_user);
        downward(&mut files, pod, from.items.as_deref(), defaults, facts)?;
    } else if let Some(from) = &volume.projected {
        let defaults = Defaults::new(from.default_mode, from.default_user);
        let mut wrong = vec![];
        for (index, source) in from.sources.iter().flatten().enumerate() {
            let place = (volume.name.as_str(), index);
            let done = projection(&mut files, pod, place, source, defaults, referenced, known, facts);
            wrong.extend(done.err());
        }
        match wrong.len() {
            0 => {}
            1 => return Err(wrong.remove(0)),
            _ => return Err(format!("[{}]", wrong.join(", "))),
        }
    } else {
        return Ok(None);
    }
    match files.keys().find(|path| !is_safe(path)) {
        Some(path) => Err(format!("invalid path: {path}")),
        None => Ok(Some(files)),
    }
}

/// A relative path that stays where it is and does not meet the names used for switching.
fn is_safe(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with("..")
        && std::path::Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[derive(Clone, Copy)]
struct Defaults {
    mode: u32,
    user: Option<u32>,
}

impl Defaults {
    fn new(mode: Option<i32>, user: Option<i64>) -> Defaults {
        Defaults { mode: mode_of(mode).unwrap_or(0o644), user: user_of(user) }
    }

    fn file(self, data: Vec<u8>, mode: Option<i32>, user: Option<i64>) -> File {
        File { data, mode: mode_of(mode).unwrap_or(self.mode), user: user_of(user).or(self.user) }
    }

    /// What is made for the pod alone. Upstream narrows the mode of what one user or group alone is to read.
    fn own(self, pod: &Pod, data: Vec<u8>, user: Option<i64>) -> File {
        let security = pod.spec().security_context.as_ref();
        let group = security.and_then(|context| context.fs_group);
        let alone = one_user(pod);
        let mode = (group.is_some() || alone.is_some()).then_some(0o600);
        self.file(data, mode, user.or(alone.map(i64::from).filter(|_| group.is_none())))
    }
}

fn mode_of(mode: Option<i32>) -> Option<u32> {
    mode.and_then(|mode| u32::try_from(mode).ok()).map(|mode| mode & 0o777)
}

fn user_of(user: Option<i64>) -> Option<u32> {
    user.and_then(|user| u32::try_from(user).ok())
}

#[expect(clippy::too_many_arguments, reason = "one arm of `of`, which has them all at hand")]
fn projection(
    files: &mut Content,
    pod: &Pod,
    (volume, index): (&str, usize),
    source: &core::VolumeProjection,
    defaults: Defaults,
    referenced: &Referenced,
    known: &Known,
    facts: &Facts,
) -> Result<(), String> {
    if let Some(from) = &source.config_map {
        return config_map(files, referenced, &from.name, from.optional, from.items.as_deref(), defaults);
    }
    if let Some(from) = &source.secret {
        return secret(files, referenced, &from.name, from.optional, from.items.as_deref(), defaults);
    }
    if let Some(from) = &source.downward_api {
        return downward(files, pod, from.items.as_deref(), defaults, facts);
    }
    if let Some(from) = &source.service_account_token {
        let token =
            known.tokens.get(&(volume.to_owned(), from.path.clone())).ok_or("failed to fetch token")?;
        let file = defaults.own(pod, token.text.clone().into_bytes(), from.user);
        files.insert(from.path.clone(), file);
        return Ok(());
    }
    if let Some(from) = &source.cluster_trust_bundle {
        let anchors = trust_anchors(from, referenced)?;
        files.insert(from.path.clone(), defaults.own(pod, anchors.into_bytes(), from.user));
        return Ok(());
    }
    if let Some(from) = &source.pod_certificate {
        let certificate = known.certificates.get(&(volume.to_owned(), index)).cloned().unwrap_or_default();
        let Credential { key, chain } = certificate.credential()?;
        for (path, text) in [
            (&from.credential_bundle_path, format!("{key}{chain}")),
            (&from.key_path, key.clone()),
            (&from.certificate_chain_path, chain.clone()),
        ] {
            let path = path.iter().filter(|path| !path.is_empty());
            let file =
                |path: &String| (path.clone(), defaults.own(pod, text.clone().into_bytes(), from.user));
            files.extend(path.map(file));
        }
        return Ok(());
    }
    Err("the projected source is not supported".to_owned())
}

/// The certificates of the bundles that are chosen, each once, in one order whatever the order of the bundles.
fn trust_anchors(
    from: &core::ClusterTrustBundleProjection,
    referenced: &Referenced,
) -> Result<String, String> {
    let Some(reference) = references::of_trust_bundle(from) else {
        return Err("ClusterTrustBundle projection requires either name or signerName to be set".to_owned());
    };
    let found = referenced.trust_bundles(&reference)?;
    let selector = match (&reference, &from.label_selector) {
        (Reference::TrustBundle(_), _) => LabelSelector::default(),
        (_, None) => LabelSelector::nothing(),
        (_, Some(spec)) => LabelSelector::from_spec(spec)
            .map_err(|error| format!("while parsing label selector: {error}"))?,
    };
    let mut chosen =
        found.iter().filter(|bundle| selector.matches_map(bundle.metadata.labels.as_ref())).peekable();
    if chosen.peek().is_none() && from.optional != Some(true) {
        return Err(match &reference {
            Reference::TrustBundle(name) => format!(
                "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io \"{name}\" not found"
            ),
            _ => "combination of signerName and labelSelector matched zero ClusterTrustBundles".to_owned(),
        });
    }
    let anchors: BTreeSet<Vec<u8>> =
        chosen.flat_map(|bundle| pem::blocks(&bundle.spec.trust_bundle)).map(|block| block.bytes).collect();
    Ok(anchors.iter().map(|anchor| pem::encode("CERTIFICATE", anchor)).collect())
}

/// The user that all containers of the pod run as, when the specification says so.
fn one_user(pod: &Pod) -> Option<u32> {
    let of_pod = pod.spec().security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = pod.containers().map(|(_, container)| {
        container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod)
    });
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok())?
}

fn pick(
    files: &mut Content,
    items: Option<&[core::KeyToPath]>,
    all: impl Iterator<Item = (String, Vec<u8>)>,
    get: impl Fn(&str) -> Option<Vec<u8>>,
    optional: bool,
    defaults: Defaults,
) -> Result<(), String> {
    match items.filter(|items| !items.is_empty()) {
        None => files.extend(all.map(|(key, data)| (key, defaults.file(data, None, None)))),
        Some(items) => {
            for item in items {
                match get(&item.key) {
                    Some(data) => {
                        files.insert(item.path.clone(), defaults.file(data, item.mode, item.user));
                    }
                    None if optional => {}
                    None => return Err(format!("references non-existent config key: {}", item.key)),
                }
            }
        }
    }
    Ok(())
}

fn config_map(
    files: &mut Content,
    referenced: &Referenced,
    name: &str,
    optional: Option<bool>,
    items: Option<&[core::KeyToPath]>,
    defaults: Defaults,
) -> Result<(), String> {
    let Some(map) = referenced.config_map(name, optional)? else { return Ok(()) };
    let text = map.data.iter().flatten().map(|(key, value)| (key.clone(), value.clone().into_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone()));
    let get = |key: &str| {
        let text = map.data.as_ref().and_then(|data| data.get(key)).map(|value| value.clone().into_bytes());
        text.or_else(|| Some(map.binary_data.as_ref()?.get(key)?.0.clone()))
    };
    pick(files, items, text.chain(binary), get, optional == Some(true), defaults)
}

fn secret(
    files: &mut Content,
    referenced: &Referenced,
    name: &str,
    optional: Option<bool>,
    items: Option<&[core::KeyToPath]>,
    defaults: Defaults,
) -> Result<(), String> {
    let Some(secret) = referenced.secret(name, optional)? else { return Ok(()) };
    let all = secret.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone()));
    let get = |key: &str| Some(secret.data.as_ref()?.get(key)?.0.clone());
    pick(files, items, all, get, optional == Some(true), defaults).map_err(|_| {
        let missing = items.iter().flat_map(|items| items.iter()).find(|item| get(&item.key).is_none());
        format!("references non-existent secret key: {}", missing.map_or("", |item| &item.key))
    })
}

fn downward(
    files: &mut Content,
    pod: &Pod,
    items: Option<&[core::DownwardAPIVolumeFile]>,
    defaults: Defaults,
    facts: &Facts,
) -> Result<(), String> {
    for item in items.into_iter().flatten() {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(selector), _) => env::field(pod, &selector.field_path, facts)?,
            (None, Some(selector)) => env::resource(pod, None, selector, facts)?,
            (None, None) => continue,
        };
        files.insert(item.path.clone(), defaults.file(text.into_bytes(), item.mode, item.user));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};
    use std::sync::Arc;

    #[track_caller]
    fn check(volume: Value, want: Result<&[(&str, &str, u32)], &str>) {
        let mut volume = volume;
        volume["name"] = json!("v");
        let pod =
            pod(json!({"metadata": {"labels": {"a": "1", "b": "x\"y"}}, "spec": {"volumes": [volume]}}));
        let mut referenced = Referenced::default();
        let map = json!({"data": {"k": "v", "l": "w"}, "binaryData": {"b": "AAE="}});
        referenced
            .config_maps
            .insert("m".into(), Ok(Some(Arc::new(serde_json::from_value(map).expect("a map")))));
        let secret = json!({"data": {"p": "aHVzaA=="}});
        referenced
            .secrets
            .insert("s".into(), Ok(Some(Arc::new(serde_json::from_value(secret).expect("a secret")))));
        let bundle = |name: &str, labels: Value, anchors: &[&str]| {
            let text: String =
                anchors.iter().map(|text| pem::encode("CERTIFICATE", text.as_bytes())).collect();
            let value = json!({"metadata": {"name": name, "labels": labels}, "spec": {"trustBundle": text}});
            Arc::new(serde_json::from_value(value).expect("a bundle"))
        };
        let of_signer = vec![
            bundle("example.com:ca:a", json!({"a": "1"}), &["second", "first"]),
            bundle("example.com:ca:b", json!({"a": "2"}), &["third", "first"]),
        ];
        referenced.trust_bundles = BTreeMap::from([
            (Reference::TrustBundle("one".into()), Ok(vec![bundle("one", json!({}), &["b", "a", "b"])])),
            (Reference::TrustBundlesOf("example.com/ca".into()), Ok(of_signer)),
        ]);
        let token = Token { text: "t".into(), renew_at: Timestamp::MAX };
        let mut known = Known::default();
        known.tokens.insert(("v".into(), "token".into()), token);
        let volume = &pod.spec().volumes.as_ref().expect("volumes")[0];
        let got = of(&pod, volume, &referenced, &known, &Facts::default());
        let got = got.map(|content| content.expect("ours"));
        let want = want.map_err(str::to_owned).map(|files| {
            let files = files.iter().map(|(path, text, mode)| {
                ((*path).to_owned(), File { data: text.as_bytes().to_vec(), mode: *mode, user: None })
            });
            files.collect::<Content>()
        });
        assert_eq!(got, want);
    }

    #[test]
    fn config_maps_become_files() {
        let all = [("k", "v", 0o644), ("l", "w", 0o644), ("b", "\0\u{1}", 0o644)];
        check(json!({"configMap": {"name": "m"}}), Ok(&all));
        check(
            json!({"configMap": {"name": "m", "defaultMode": 256, "items": [
                {"key": "k", "path": "d/k"}, {"key": "l", "path": "l", "mode": 511}]}}),
            Ok(&[("d/k", "v", 0o400), ("l", "w", 0o777)]),
        );
        check(json!({"configMap": {"name": "none"}}), Err("configmap \"none\" not found"));
        check(json!({"configMap": {"name": "none", "optional": true}}), Ok(&[]));
        let missing = json!([{"key": "x", "path": "x"}]);
        check(
            json!({"configMap": {"name": "m", "items": missing}}),
            Err("references non-existent config key: x"),
        );
        check(json!({"configMap": {"name": "m", "items": missing, "optional": true}}), Ok(&[]));
        let evil = json!([{"key": "k", "path": "../k"}]);
        check(json!({"configMap": {"name": "m", "items": evil}}), Err("invalid path: ../k"));
    }

    #[test]
    fn secrets_and_projections_become_files() {
        check(json!({"secret": {"secretName": "s", "defaultMode": 256}}), Ok(&[("p", "hush", 0o400)]));
        check(
            json!({"secret": {"secretName": "s", "items": [{"key": "x", "path": "x"}]}}),
            Err("references non-existent secret key: x"),
        );
        check(
            json!({"projected": {"sources": [
                {"serviceAccountToken": {"path": "token"}},
                {"configMap": {"name": "m", "items": [{"key": "k", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
            ]}}),
            Ok(&[("token", "t", 0o644), ("ca.crt", "v", 0o644), ("namespace", "ns", 0o644)]),
        );
    }

    #[test]
    fn trust_anchors_are_put_together() {
        let check = |from: Value, want: Result<&[&str], &str>| {
            let text = want.map(|anchors| {
                anchors.iter().map(|text| pem::encode("CERTIFICATE", text.as_bytes())).collect::<String>()
            });
            let want = text.as_deref().map(|text| [("ca", text, 0o644)]);
            let volume = json!({"projected": {"sources": [{"clusterTrustBundle": from}]}});
            check(volume, want.as_ref().map(|files| &files[..]).map_err(|why| **why));
        };
        check(json!({"name": "one", "path": "ca"}), Ok(&["a", "b"]));
        let signer = |selector: Value| json!({"signerName": "example.com/ca", "labelSelector": selector, "path": "ca"});
        check(signer(json!({})), Ok(&["first", "second", "third"]));
        check(signer(json!({"matchLabels": {"a": "2"}})), Ok(&["first", "third"]));
        let zero = Err("combination of signerName and labelSelector matched zero ClusterTrustBundles");
        check(signer(json!({"matchLabels": {"a": "3"}})), zero);
        check(signer(Value::Null), zero);
        check(json!({"signerName": "example.com/other", "labelSelector": {}, "path": "ca"}), zero);
        let none =
            "while getting ClusterTrustBundle: clustertrustbundle.certificates.k8s.io \"none\" not found";
        check(json!({"name": "none", "path": "ca"}), Err(none));
        check(json!({"name": "none", "path": "ca", "optional": true}), Ok(&[]));
    }

    #[test]
    fn all_that_is_wrong_is_told() {
        let sources =
            json!([{"configMap": {"name": "none"}}, {"secret": {"name": "s"}}, {"secret": {"name": "none"}}]);
        check(
            json!({"projected": {"sources": sources}}),
            Err("[configmap \"none\" not found, secret \"none\" not found]"),
        );
    }

    #[test]
    fn labels_are_told_as_lines() {
        check(
            json!({"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}),
            Ok(&[("labels", "a=\"1\"\nb=\"x\\\"y\"", 0o644)]),
        );
    }
}
