//! kubeconfig files: the cluster's own, and its entries in a file that holds other clusters too.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use minke_client::https::Identity;
use serde_json::{Value, json};

use crate::data_dir::write_file;
use crate::keys::Pair;
use crate::yaml;

/// One cluster, its user and the context of both, all under one name.
pub struct Entry<'a> {
    pub name: &'a str,
    /// `https://192.0.2.2:6443`
    pub server: &'a str,
    pub ca: &'a str,
    pub user: &'a Pair,
}

const LISTS: [&str; 3] = ["clusters", "contexts", "users"];

impl Entry<'_> {
    fn items(&self) -> [Value; 3] {
        let embed = |pem: &str| BASE64_STANDARD.encode(pem);
        [
            json!({"name": self.name, "cluster": {
                "certificate-authority-data": embed(self.ca), "server": self.server,
            }}),
            json!({"name": self.name, "context": {"cluster": self.name, "user": self.name}}),
            json!({"name": self.name, "user": {
                "client-certificate-data": embed(&self.user.certificate), "client-key-data": embed(&self.user.key),
            }}),
        ]
    }

    /// A whole file with this entry and nothing else.
    pub fn to_yaml(&self) -> String {
        let mut config = empty();
        self.put(&mut config);
        yaml::print(&config)
    }

    /// Adds or replaces the entry and makes its context the current one; everything else stays.
    fn put(&self, config: &mut Value) {
        for (list, item) in LISTS.into_iter().zip(self.items()) {
            let items = list_of(config, list);
            match items.iter_mut().find(|present| present["name"] == self.name) {
                // A namespace chosen with `kubectl config set-context` is the user's.
                Some(present) if list == "contexts" && present["context"]["namespace"].is_string() => {
                    let namespace = present["context"]["namespace"].take();
                    *present = item;
                    present["context"]["namespace"] = namespace;
                }
                Some(present) => *present = item,
                None => items.push(item),
            }
        }
        config["current-context"] = self.name.into();
    }

    /// Writes the entry into `path`, which may hold others'.
    pub fn merge_into(&self, path: &Path) -> Result<()> {
        let mut config = read(path)?.unwrap_or_else(empty);
        self.put(&mut config);
        write(path, &config)
    }
}

/// Takes the entries called `name` out of `path`; whether there were any.
pub fn remove_from(path: &Path, name: &str) -> Result<bool> {
    let Some(mut config) = read(path)? else { return Ok(false) };
    let mut found = false;
    for list in LISTS {
        let items = list_of(&mut config, list);
        let before = items.len();
        items.retain(|item| item["name"] != name);
        found |= items.len() < before;
    }
    if config["current-context"] == name {
        config["current-context"] = "".into();
    }
    if found {
        write(path, &config)?;
    }
    Ok(found)
}

fn empty() -> Value {
    json!({"apiVersion": "v1", "kind": "Config", "preferences": {}, "clusters": [], "contexts": [], "users": []})
}

fn list_of<'a>(config: &'a mut Value, name: &str) -> &'a mut Vec<Value> {
    if !config[name].is_array() {
        config[name] = json!([]);
    }
    config[name].as_array_mut().expect("it was made one")
}

/// `None` when there is no file, or an empty one. A file that is no kubeconfig is an error, never overwritten.
fn read(path: &Path) -> Result<Option<Value>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    let decoded =
        minke_api::codec::yaml::decode(&text).with_context(|| format!("read {}", path.display()))?;
    if !decoded.value.is_object() || decoded.value["kind"].as_str().is_some_and(|kind| kind != "Config") {
        bail!("{} is not a kubeconfig file", path.display());
    }
    Ok(Some(decoded.value))
}

fn write(path: &Path, config: &Value) -> Result<()> {
    // A link stays a link: its target is replaced.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    let before = fs::metadata(&path).ok();
    let mode = before.as_ref().map_or(0o600, |meta| meta.permissions().mode() & 0o777);
    write_file(&path, yaml::print(config).as_bytes(), mode)?;
    // Under sudo the file must stay readable for the user in whose home directory it lies.
    let owner = before.or_else(|| fs::metadata(parent.parent()?).ok());
    if let Some(owner) = owner
        && owner.uid() != rustix::process::geteuid().as_raw()
    {
        std::os::unix::fs::chown(&path, Some(owner.uid()), Some(owner.gid()))
            .with_context(|| format!("give {} to its owner", path.display()))?;
    }
    Ok(())
}

/// The file kubectl reads when it is told nothing: the first of KUBECONFIG, or ~/.kube/config.
pub fn usual_path() -> Option<PathBuf> {
    let listed = std::env::var_os("KUBECONFIG").filter(|paths| !paths.is_empty());
    match listed {
        Some(paths) => std::env::split_paths(&paths).find(|path| !path.as_os_str().is_empty()),
        None => Some(Path::new(&std::env::var_os("HOME")?).join(".kube/config")),
    }
}

/// How the current context of `path` reaches its cluster, and as whom.
pub fn identity(path: &Path) -> Result<Identity> {
    let config = read(path)?.with_context(|| format!("there is nothing in {}", path.display()))?;
    let base = path.parent().unwrap_or(Path::new("."));
    let named = |list: &str, name: &Value, what: &str| -> Result<Value> {
        let items = config[list].as_array().map_or(&[][..], Vec::as_slice);
        let found = items.iter().find(|item| item["name"] == *name);
        found.map(|item| item[what].clone()).with_context(|| format!("{}: no {what} {name}", path.display()))
    };
    let context = named("contexts", &config["current-context"], "context")?;
    let cluster = named("clusters", &context["cluster"], "cluster")?;
    let user = named("users", &context["user"], "user")?;
    let pem = |from: &Value, field: &str| -> Result<Option<Vec<u8>>> {
        if let Some(data) = from[format!("{field}-data")].as_str() {
            return Ok(Some(BASE64_STANDARD.decode(data).with_context(|| format!("{field}-data"))?));
        }
        let Some(file) = from[field].as_str() else { return Ok(None) };
        let file = base.join(file);
        Ok(Some(fs::read(&file).with_context(|| format!("read {}", file.display()))?))
    };
    let certificate = pem(&user, "client-certificate")?.zip(pem(&user, "client-key")?);
    let token_file =
        user["tokenFile"].as_str().map(|file| fs::read_to_string(base.join(file))).transpose()?;
    Ok(Identity {
        server: cluster["server"].as_str().context("the cluster has no server")?.to_owned(),
        ca: pem(&cluster, "certificate-authority")?.context("the cluster has no certificate-authority")?,
        certificate,
        token: user["token"].as_str().map(str::to_owned).or(token_file.map(|token| token.trim().to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Pair {
        Pair { certificate: "CERT".into(), key: "KEY".into() }
    }

    fn entry<'a>(name: &'a str, user: &'a Pair) -> Entry<'a> {
        Entry { name, server: "https://192.0.2.2:6443", ca: "CA", user }
    }

    #[test]
    fn what_others_keep_in_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/config");
        let user = user();
        entry("minke", &user).merge_into(&path).unwrap();
        let mut config = read(&path).unwrap().unwrap();
        list_of(&mut config, "clusters").push(json!({"name": "work", "cluster": {"server": "https://a"}}));
        config["contexts"][0]["context"]["namespace"] = "shop".into();
        config["current-context"] = "work".into();
        write(&path, &config).unwrap();

        entry("minke", &user).merge_into(&path).unwrap();
        let merged = read(&path).unwrap().unwrap();
        assert_eq!(merged["clusters"].as_array().unwrap().len(), 2);
        assert_eq!(merged["contexts"][0]["context"]["namespace"], "shop");
        assert_eq!(merged["current-context"], "minke");

        assert!(remove_from(&path, "minke").unwrap());
        assert!(!remove_from(&path, "minke").unwrap());
        let left = read(&path).unwrap().unwrap();
        assert_eq!(left["clusters"], json!([{"name": "work", "cluster": {"server": "https://a"}}]));
        assert_eq!(left["current-context"], "");
    }

    #[test]
    fn a_file_of_another_kind_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        for text in ["just words", "kind: Pod\n", "- a\n"] {
            fs::write(&path, text).unwrap();
            assert!(entry("minke", &user()).merge_into(&path).is_err(), "{text}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn an_identity_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        fs::write(&path, entry("minke", &user()).to_yaml()).unwrap();
        let identity = identity(&path).unwrap();
        assert_eq!(identity.server, "https://192.0.2.2:6443");
        assert_eq!(identity.ca, b"CA");
        assert_eq!(identity.certificate, Some((b"CERT".to_vec(), b"KEY".to_vec())));
    }
}
