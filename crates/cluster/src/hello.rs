//! The two images that ship inside Minke, `minke.local/hello:v1` and `:v2`, made in memory as an OCI archive.
//!
//! The bytes depend on nothing but the program in them, so an image has the same id on every machine.

use std::io::Write;

use minke_runtime::ImageService;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// What is in both images: compiled by the build script.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hello"));
const VERSIONS: [&str; 2] = ["1", "2"];
/// The names the program answers to, all in /bin.
const TOOLS: &[&str] = &[
    "bash", "cat", "curl", "date", "echo", "env", "false", "head", "hostname", "id", "kill", "ls", "mkdir",
    "nc", "nslookup", "ps", "pwd", "rm", "seq", "sh", "sleep", "tcp-echo", "touch", "true", "wc", "wget",
    "whoami",
];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnobody:x:65534:\n";

/// `minke.local/hello:v1`
pub fn reference(version: &str) -> String {
    format!("minke.local/hello:v{version}")
}

/// The archive to load, or `None` when `images` has both images as they would be made now.
pub async fn missing(images: &dyn ImageService) -> minke_runtime::Result<Option<Vec<u8>>> {
    let archive = Archive::new();
    for (version, id) in VERSIONS.iter().zip(&archive.ids) {
        if images.resolve(&reference(version)).await?.is_none_or(|image| image.id != *id) {
            return Ok(Some(archive.bytes));
        }
    }
    Ok(None)
}

struct Archive {
    /// The images' ids, in the order of [`VERSIONS`].
    ids: Vec<String>,
    bytes: Vec<u8>,
}

impl Archive {
    fn new() -> Archive {
        let layer = layer();
        let diff_id = digest(&layer);
        let mut archive = Archive { ids: Vec::new(), bytes: Vec::new() };
        let mut tar = Builder::new(&mut archive.bytes);
        let mut blob = |bytes: &[u8], media_type: &str| -> Value {
            let digest = digest(bytes);
            append(
                &mut tar,
                &digest.replace("sha256:", "blobs/sha256/"),
                EntryType::Regular,
                0o644,
                bytes,
                "",
            );
            json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
        };
        let layer = blob(&layer, "application/vnd.oci.image.layer.v1.tar");
        let mut manifests = Vec::new();
        for version in VERSIONS {
            let config = json!({
                "architecture": architecture(), "os": "linux", "created": "1970-01-01T00:00:00Z",
                "config": {
                    "Entrypoint": ["/bin/hello"], "ExposedPorts": {"8080/tcp": {}},
                    "Env": ["PATH=/bin", format!("HELLO_VERSION={version}")],
                },
                "rootfs": {"type": "layers", "diff_ids": [diff_id]},
                "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "minke"}],
            });
            let config = blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
            archive.ids.extend(config["digest"].as_str().map(str::to_owned));
            let media_type = "application/vnd.oci.image.manifest.v1+json";
            let manifest =
                json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
            let mut manifest = blob(manifest.to_string().as_bytes(), media_type);
            manifest["annotations"] = json!({
                "io.containerd.image.name": reference(version), "org.opencontainers.image.ref.name": format!("v{version}"),
            });
            manifests.push(manifest);
        }
        let index = json!({"schemaVersion": 2, "manifests": manifests}).to_string();
        append(&mut tar, "index.json", EntryType::Regular, 0o644, index.as_bytes(), "");
        append(&mut tar, "oci-layout", EntryType::Regular, 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#, "");
        tar.finish().expect(IN_MEMORY);
        drop(tar);
        archive
    }
}

const IN_MEMORY: &str = "writing to memory does not fail";

fn layer() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut tar = Builder::new(&mut bytes);
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("sys", 0o555),
        ("tmp", 0o1777),
    ] {
        append(&mut tar, &format!("{dir}/"), EntryType::Directory, mode, &[], "");
    }
    append(&mut tar, "bin/hello", EntryType::Regular, 0o755, PROGRAM, "");
    for tool in TOOLS {
        append(&mut tar, &format!("bin/{tool}"), EntryType::Symlink, 0o777, &[], "hello");
    }
    append(&mut tar, "etc/passwd", EntryType::Regular, 0o644, PASSWD.as_bytes(), "");
    append(&mut tar, "etc/group", EntryType::Regular, 0o644, GROUP.as_bytes(), "");
    tar.finish().expect(IN_MEMORY);
    drop(tar);
    bytes
}

fn append(tar: &mut Builder<impl Write>, path: &str, kind: EntryType, mode: u32, bytes: &[u8], link: &str) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    let appended = if link.is_empty() {
        tar.append_data(&mut header, path, bytes)
    } else {
        tar.append_link(&mut header, path, link)
    };
    appended.expect(IN_MEMORY);
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// As OCI names what this program was built for.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_the_same_every_time_and_every_tool_exists() {
        let (first, second) = (Archive::new(), Archive::new());
        assert_eq!(digest(&first.bytes), digest(&second.bytes));
        assert_ne!(first.ids[0], first.ids[1]);
        let source = include_str!("../hello/tools.rs");
        let listed: Vec<&str> = source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("(\"")?.split_once('"'))
            .map(|(name, _)| name)
            .collect();
        assert_eq!(listed, TOOLS);
    }

    #[test]
    fn the_shell_in_the_images_runs_what_people_type() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("hello");
        std::fs::write(&program, PROGRAM).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        for tool in TOOLS {
            std::os::unix::fs::symlink("hello", dir.path().join(tool)).unwrap();
        }
        #[track_caller]
        fn check(dir: &std::path::Path, text: &str, want: &str, code: i32) {
            let mut command = std::process::Command::new(dir.join("sh"));
            let output =
                command.args(["-c", text, "sh", "one", "two"]).env_clear().env("PATH", dir).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), want, "{text}");
            assert_eq!(output.status.code(), Some(code), "{text}");
        }
        let check = |text, want, code| check(dir.path(), text, want, code);
        check("echo a; echo b", "a\nb\n", 0);
        check("for i in 1 2 3; do echo n$i; done; exit 5", "n1\nn2\nn3\n", 5);
        check(
            "i=0; while [ $i -lt 4 ]; do i=$((i+1)); [ $i = 2 ] && continue; echo $i; done",
            "1\n3\n4\n",
            0,
        );
        check("false || echo or; true && echo and", "or\nand\n", 0);
        check("x='a  b'; echo $x \"$x\" ${y:-none} $# $2", "a b a  b none 2 two\n", 0);
        check("echo a b c | cat | wc; echo a b | wc -w", "1 3 6\n2\n", 0);
        check("head -c 100000 /dev/zero | wc -c; seq 9 | head -n2; seq 9 | head -1", "100000\n1\n2\n1\n", 0);
        check("echo short | head -c 3; seq 3 | head -n 99; head -n x", "sho1\n2\n3\n", 1);
        check("if test -d /proc; then echo yes; else echo no; fi", "yes\n", 0);
        check("echo $(echo in) `echo back`; { echo 1; echo 2; } | wc -l", "in back\n2\n", 0);
        check("(exit 3); echo $?; ! true; echo $?; nosuch 2>/dev/null; echo $?", "3\n1\n127\n", 0);
        check("set -e; false; echo never", "", 1);
        check("set -e; false || true; if false; then :; fi; echo on", "on\n", 0);
        check("sleep 0.01 & wait; seq 2; env | head -n 1 | wc -l", "1\n2\n1\n", 0);
        check("exec echo replaced; echo never", "replaced\n", 0);
        check("echo 'unfinished", "", 2);
        check("curl -s http://127.0.0.1:1/ 2>/dev/null; echo $?", "7\n", 0);
    }
}
