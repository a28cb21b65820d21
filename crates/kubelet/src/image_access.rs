//! Who may use an image that is here already: whoever could have pulled it.
//!
//! An image that was pulled with credentials is for pods that have those, or others with which it can be pulled; one
//! that was pulled without any, or was put here by a person, is for everyone. Upstream: KubeletEnsureSecretPulledImages
//! with its policy NeverVerifyPreloadedImages (KEP-2535).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use minke_runtime::{Auth, Image};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Credentials remembered for one image; with more, the surplus is asked of the registry again.
const CREDENTIALS_MAX: usize = 100;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Known {
    salt: String,
    /// By the image's id.
    images: BTreeMap<String, Pulled>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Pulled {
    by_anyone: bool,
    /// Hashes of the credentials that were good.
    with: BTreeSet<String>,
}

/// What was pulled how; kept in a file, so that a new agent knows as well.
pub struct ImageAccess {
    path: PathBuf,
    known: Mutex<Known>,
}

impl ImageAccess {
    pub fn open(path: &Path) -> ImageAccess {
        let mut known: Known =
            fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        if known.salt.is_empty() {
            known.salt = format!("{:032x}", rand::random::<u128>());
        }
        ImageAccess { path: path.to_owned(), known: Mutex::new(known) }
    }

    /// Whether nobody needs to show credentials for this image.
    pub fn is_free(&self, image: &Image) -> bool {
        let known = self.known.lock().expect("nothing panics with it");
        image.pinned || known.images.get(&image.id).is_none_or(|pulled| pulled.by_anyone)
    }

    /// Whether the image was pulled with one of these before.
    pub fn allows(&self, image: &Image, auths: &[Auth]) -> bool {
        let known = self.known.lock().expect("nothing panics with it");
        let Some(pulled) = known.images.get(&image.id) else { return true };
        auths.iter().any(|auth| pulled.with.contains(&hash(&known.salt, auth)))
    }

    /// Remembers a pull. Images that are gone are forgotten: `present` are those that are not.
    pub fn note(&self, image: &Image, auth: &Auth, present: &BTreeSet<String>) -> io::Result<()> {
        let text = {
            let mut known = self.known.lock().expect("nothing panics with it");
            let hash = hash(&known.salt, auth);
            let before = known.images.get(&image.id).cloned();
            known.images.retain(|id, _| present.contains(id));
            let pulled = known.images.entry(image.id.clone()).or_default();
            match auth {
                Auth::Anonymous => pulled.by_anyone = true,
                _ if pulled.with.len() < CREDENTIALS_MAX => drop(pulled.with.insert(hash)),
                _ => {}
            }
            if before.as_ref() == Some(pulled) {
                return Ok(());
            }
            serde_json::to_vec(&*known)?
        };
        let temporary = self.path.with_extension("tmp");
        let mut options = fs::File::options();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(&text)?;
        fs::rename(&temporary, &self.path)
    }
}

fn hash(salt: &str, auth: &Auth) -> String {
    let text = match auth {
        Auth::Anonymous => String::new(),
        Auth::Basic { username, password } => format!("basic\0{username}\0{password}"),
        Auth::Bearer { token } => format!("bearer\0{token}"),
    };
    Sha256::digest(format!("{salt}\0{text}")).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_could_pull_it_may_use_it() {
        let dir = crate::testing::temp_dir("access");
        let path = dir.join("pulled-images.json");
        let image = |id: &str| Image { id: id.to_owned(), ..Image::default() };
        let basic = |name: &str| Auth::Basic { username: name.into(), password: "p".into() };
        let present = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let access = ImageAccess::open(&path);
        assert!(access.is_free(&image("a")), "it was here before");
        access.note(&image("a"), &basic("me"), &present).expect("noted");
        access.note(&image("b"), &basic("me"), &present).expect("noted");
        access.note(&image("b"), &Auth::Anonymous, &present).expect("noted");
        // A new agent knows the same.
        let access = ImageAccess::open(&path);
        assert!(!access.is_free(&image("a")) && access.is_free(&image("b")));
        assert!(access.is_free(&Image { pinned: true, ..image("a") }));
        assert!(access.allows(&image("a"), &[basic("you"), basic("me")]));
        assert!(!access.allows(&image("a"), &[basic("you"), Auth::Anonymous]));
        let text = fs::read_to_string(&path).expect("a file");
        assert!(!text.contains("me") || !text.contains("\"p\""), "{text}");
        // Gone, and forgotten.
        access.note(&image("b"), &basic("x"), &BTreeSet::from(["b".to_owned()])).expect("noted");
        assert!(access.is_free(&image("a")));
        fs::remove_dir_all(&dir).expect("removed");
    }
}
