//! Files of variables in `emptyDir` volumes, which a container's environment may name (`fileKeyRef`).
//!
//! Their format is that part of a POSIX shell's in which every value stands in single quotes: whoever sources the
//! file sees the same variables. Upstream: pkg/kubelet/util/env, KEP-3721.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1 as core;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::container::Paths;
use crate::pod::Pod;
use crate::volumes;

/// Most bytes of a file, and of one line of it; the latter is upstream's.
const FILE_MAX: u64 = 1 << 20;
const LINE_MAX: usize = 64 << 10;

/// What a file says, `None` when it is not there; the error is for the log.
type Text = Result<Option<String>, String>;

/// The files that a container names, as they were when it was about to start.
#[derive(Debug, Default)]
pub struct EnvFiles(BTreeMap<(String, String), (PathBuf, Text)>);

impl EnvFiles {
    /// Reads what `container` names. Blocking.
    pub fn read(paths: &Paths, pod: &Pod, container: &core::Container) -> EnvFiles {
        let mut files = EnvFiles::default();
        for from in named(container) {
            let mut volumes = pod.spec().volumes.iter().flatten();
            let volume = volumes.find(|volume| volume.name == from.volume_name && volume.empty_dir.is_some());
            let Some(volume) = volume else { continue };
            let dir = volumes::dir(paths, pod, volume);
            let text = read(&dir, &from.path).map_err(|error| error.to_string());
            files.0.insert((from.volume_name.clone(), from.path.clone()), (dir.join(&from.path), text));
        }
        files
    }

    /// The value of a key; `None` when it may be absent and is. The error is the message of the failure.
    pub fn value(&self, from: &core::FileKeySelector) -> Result<Option<String>, String> {
        let Some((path, text)) = self.0.get(&(from.volume_name.clone(), from.path.clone())) else {
            return Err(format!("cannot find the volume \"{}\" referenced by FileKeyRef", from.volume_name));
        };
        let optional = from.optional == Some(true);
        let found = match text {
            Ok(None) if optional => return Ok(None),
            Ok(None) => Err("no such file".to_owned()),
            Ok(Some(text)) => find(text, &from.key),
            Err(why) => Err(why.clone()),
        };
        let found = found.map_err(|why| {
            // What stands in the file may be secret, and goes into no event.
            tracing::warn!(file = %path.display(), why, "Failed to parse env file");
            "couldn't parse env file".to_owned()
        })?;
        match found.filter(|value| !value.is_empty()) {
            None if !optional => {
                let (key, path) = (&from.key, path.display());
                Err(format!("environment variable key \"{key}\" not found in file \"{path}\""))
            }
            found => Ok(found),
        }
    }
}

/// What the environment of `container` takes from files.
pub fn named(container: &core::Container) -> impl Iterator<Item = &core::FileKeySelector> {
    let sources = container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref());
    sources.filter_map(|source| source.file_key_ref.as_ref())
}

/// Reads a file below `dir`, which containers write to: no link leads out of it, and nothing is waited for.
fn read(dir: &Path, path: &str) -> io::Result<Option<String>> {
    let root = rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let stay = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(&root, path, flags, Mode::empty(), stay) {
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        file => fs::File::from(file?),
    };
    let about = file.metadata()?;
    if !about.is_file() || about.len() > FILE_MAX {
        return Err(io::Error::other(format!("not a file of {FILE_MAX} bytes at most")));
    }
    let mut bytes = vec![];
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    if bytes.contains(&0) {
        return Err(io::Error::other("it holds a zero byte"));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The value that `text` gives to `key`; what follows it is not looked at. The error says what is wrong in which line.
pub fn find(text: &str, key: &str) -> Result<Option<String>, String> {
    let mut lines = (1..).zip(text.lines());
    while let Some((number, line)) = lines.next() {
        let wrong = |what: &str| Err(format!("invalid environment variable format at line {number}: {what}"));
        let blank = |c: char| c == ' ' || c == '\t';
        let line = line.trim_start_matches(blank);
        if line.len() >= LINE_MAX {
            return wrong("too long");
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else { return wrong("missing '='") };
        if name.is_empty() {
            return wrong("empty variable name");
        }
        if name.ends_with(blank) {
            return wrong("whitespace before '=' is not allowed");
        }
        // A shell takes this for an empty value and a command.
        if value.starts_with(blank) {
            match name == key {
                true => return Ok(Some(String::new())),
                false => continue,
            }
        }
        let Some(mut rest) = value.strip_prefix('\'') else {
            return wrong("value must be enclosed in single quotes");
        };
        let mut value = String::new();
        let after = loop {
            if let Some((end, after)) = rest.split_once('\'') {
                value.push_str(end);
                break after;
            }
            value.push_str(rest);
            value.push('\n');
            match lines.next() {
                Some((_, next)) if next.len() < LINE_MAX => rest = next,
                Some(_) => return wrong("too long"),
                None => return wrong("unclosed single quote"),
            }
        };
        let after = after.trim_start_matches(blank);
        if !after.is_empty() && !after.starts_with('#') {
            return wrong("unexpected content after closing quote");
        }
        if name == key {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::json;

    #[track_caller]
    fn check(text: &str, want: Result<Option<&str>, &str>) {
        let got = find(text, "K");
        let got = got
            .as_ref()
            .map(Option::as_deref)
            .map_err(|why| why.strip_prefix("invalid environment variable format at line ").unwrap_or(why));
        assert_eq!(got, want, "{text:?}");
    }

    #[test]
    fn values_stand_in_single_quotes() {
        check("K='v'", Ok(Some("v")));
        check("\n \t\n# K='no'\n  A='1'\n\tK='a \"b\" $c \\n'  # why\n", Ok(Some("a \"b\" $c \\n")));
        check("K='one\n two # not one\n\n'\nA=''", Ok(Some("one\n two # not one\n\n")));
        check("K='first'\nK='second'", Ok(Some("first")));
        check("K=''", Ok(Some("")));
        check("K= 'v'", Ok(Some("")));
        check("A= 'v'\nK='='", Ok(Some("=")));
        check("KK='v'\nk='v'", Ok(None));
        check("", Ok(None));
        check("K='v'\r\n", Ok(Some("v")));
    }

    #[test]
    fn anything_else_is_refused_with_its_line() {
        check("A='1'\nK", Err("2: missing '='"));
        check("='v'", Err("1: empty variable name"));
        check("K ='v'", Err("1: whitespace before '=' is not allowed"));
        check("A=1\nK='v'", Err("1: value must be enclosed in single quotes"));
        check("K=\"v\"", Err("1: value must be enclosed in single quotes"));
        check("K=", Err("1: value must be enclosed in single quotes"));
        check("\nA='1\n2", Err("2: unclosed single quote"));
        check("K='a''b'", Err("1: unexpected content after closing quote"));
        check(&format!("A='{}'", "x".repeat(LINE_MAX)), Err("1: too long"));
        // What comes after the key is nobody's.
        check("K='v'\nA=1", Ok(Some("v")));
    }

    #[test]
    fn files_are_read_from_their_volume_and_no_further() {
        let data = crate::testing::temp_dir("env-files");
        let paths = Paths { data: data.clone() };
        let key = |volume: &str, path: &str, key: &str, optional: bool| core::FileKeySelector {
            volume_name: volume.into(),
            path: path.into(),
            key: key.into(),
            optional: Some(optional),
        };
        let names = ["f", "none", "d", "out", "inside", "bad", "pipe"].map(|path| ("v", path));
        let env = names.iter().chain(&[("secret", "f")]).map(|(volume, path)| {
            json!({"name": "X", "valueFrom": {"fileKeyRef": {"volumeName": volume, "path": path, "key": "K"}}})
        });
        let env: Vec<_> = env.collect();
        let pod = pod(json!({"spec": {
            "containers": [{"name": "c", "env": env}],
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "secret", "secret": {"secretName": "s"}}],
        }}));
        let dir = volumes::dir(&paths, &pod, &pod.spec().volumes.as_ref().expect("volumes")[0]);
        fs::create_dir_all(dir.join("d")).expect("directories");
        fs::write(dir.join("f"), "K='v'\nE=''").expect("a file");
        fs::write(dir.join("bad"), "K=v").expect("a file");
        fs::write(data.join("secret"), "K='hush'").expect("a file");
        std::os::unix::fs::symlink(data.join("secret"), dir.join("out")).expect("a link");
        std::os::unix::fs::symlink("/f", dir.join("inside")).expect("a link");
        rustix::fs::mknodat(CWD, dir.join("pipe"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .expect("a pipe");
        let files = EnvFiles::read(&paths, &pod, &pod.spec().containers[0]);
        let value = |volume: &str, path: &str, name: &str| files.value(&key(volume, path, name, false));
        let unparsed = Err("couldn't parse env file".to_owned());
        assert_eq!(value("v", "f", "K"), Ok(Some("v".to_owned())));
        assert_eq!(value("v", "inside", "K"), Ok(Some("v".to_owned())));
        for path in ["none", "d", "out", "bad", "pipe"] {
            assert_eq!(value("v", path, "K"), unparsed, "{path}");
        }
        let missing = |key: &str| {
            Err(format!(
                "environment variable key \"{key}\" not found in file \"{}\"",
                dir.join("f").display()
            ))
        };
        assert_eq!(value("v", "f", "L"), missing("L"));
        // As upstream: what is empty is not there.
        assert_eq!(value("v", "f", "E"), missing("E"));
        let no_volume = "cannot find the volume \"secret\" referenced by FileKeyRef";
        assert_eq!(value("secret", "f", "K"), Err(no_volume.to_owned()));
        let may_miss = |path: &str, name: &str| files.value(&key("v", path, name, true));
        assert_eq!((may_miss("f", "L"), may_miss("none", "K")), (Ok(None), Ok(None)));
        assert_eq!(may_miss("bad", "K"), unparsed);
        fs::remove_dir_all(&data).expect("removed");
    }
}
