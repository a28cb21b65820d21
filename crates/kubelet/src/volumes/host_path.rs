//! Paths of the node as volumes: whether there is what the pod expects, made where it asks for that.
//! Upstream: pkg/volume/hostpath. Blocking.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// `kind` is the `type` of the volume; the error is why it can't be set up.
pub fn check(path: &Path, kind: &str) -> Result<(), String> {
    let shown = path.display();
    let found = match fs::metadata(path) {
        Ok(found) => Some(found.file_type()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => None,
        Err(error) => return Err(format!("{shown}: {error}")),
    };
    let (expected, described) = match (kind, found) {
        // As upstream's runtimes make it.
        ("" | "DirectoryOrCreate", None) => {
            return make_dir(path).map_err(|error| format!("{shown}: {error}"));
        }
        ("FileOrCreate", None) => return make_file(path).map_err(|error| format!("{shown}: {error}")),
        ("", Some(_)) => return Ok(()),
        ("Directory" | "DirectoryOrCreate", _) => ("Directory", "directory"),
        ("File" | "FileOrCreate", _) => ("File", "file"),
        ("Socket", _) => ("Socket", "socket file"),
        ("CharDevice", _) => ("CharDevice", "character device"),
        ("BlockDevice", _) => ("BlockDevice", "block device"),
        (other, _) => return Err(format!("{other} is an invalid volume type")),
    };
    match found.map(name) {
        None => Err(format!("hostPath {shown} doesn't exist")),
        Some(Some(name)) if name == expected => Ok(()),
        Some(Some(name)) => {
            Err(format!("hostPath type check failed: {shown} is not a {described}, it's a {name}"))
        }
        Some(None) => Err(format!(
            "hostPath type check failed, {shown} is not a {described}, unable to determine its type: only recognise \
             file, directory, socket, block device and character device"
        )),
    }
}

/// What it is, as types of volumes are called.
fn name(found: fs::FileType) -> Option<&'static str> {
    let names = [
        (found.is_dir(), "Directory"),
        (found.is_file(), "File"),
        (found.is_socket(), "Socket"),
        (found.is_char_device(), "CharDevice"),
        (found.is_block_device(), "BlockDevice"),
    ];
    names.into_iter().find(|(is, _)| *is).map(|(_, name)| name)
}

fn make_dir(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn make_file(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

    #[test]
    fn paths_are_what_their_type_says() {
        let dir = crate::testing::temp_dir("host-path");
        let node = |name: &str, kind: FileType, device: u64| {
            mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o600), device)
        };
        fs::create_dir(dir.join("directory")).expect("a directory");
        fs::write(dir.join("file"), "").expect("a file");
        let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).expect("a socket");
        std::os::unix::fs::symlink(dir.join("file"), dir.join("link")).expect("a link");
        node("pipe", FileType::Fifo, 0).expect("a pipe");
        // Nodes of devices that need not be there: nothing opens them.
        let devices = node("character", FileType::CharacterDevice, makedev(1, 3))
            .and_then(|()| node("block", FileType::BlockDevice, makedev(7, 250)));
        if let Err(why) = &devices {
            println!("    without devices: mknod: {why}");
        }
        let things = [
            ("directory", "Directory", "directory"),
            ("file", "File", "file"),
            ("link", "File", "file"),
            ("socket", "Socket", "socket file"),
            ("character", "CharDevice", "character device"),
            ("block", "BlockDevice", "block device"),
        ];
        let made = &things[..if devices.is_ok() { 6 } else { 4 }];
        for (name, is, _) in made {
            let path = dir.join(name);
            assert_eq!(check(&path, ""), Ok(()), "{name}");
            for (_, kind, described) in things {
                let want = match kind == *is {
                    true => Ok(()),
                    false => Err(format!(
                        "hostPath type check failed: {} is not a {described}, it's a {is}",
                        path.display()
                    )),
                };
                assert_eq!(check(&path, kind), want, "{name} as {kind}");
                if matches!(kind, "Directory" | "File") {
                    assert_eq!(check(&path, &format!("{kind}OrCreate")), want, "{name} as {kind}OrCreate");
                }
            }
        }
        let pipe = check(&dir.join("pipe"), "File").expect_err("no file");
        assert!(pipe.contains("is not a file, unable to determine its type: only recognise"), "{pipe}");
        for kind in ["Directory", "File", "Socket", "CharDevice", "BlockDevice"] {
            let missing = format!("hostPath {} doesn't exist", dir.join("none").display());
            assert_eq!(check(&dir.join("none"), kind), Err(missing));
        }
        assert_eq!(check(&dir.join("file"), "Thing"), Err("Thing is an invalid volume type".to_owned()));
        fs::remove_dir_all(&dir).expect("removed");
    }

    #[test]
    fn what_is_missing_is_made_on_request() {
        let dir = crate::testing::temp_dir("host-path-made");
        let mode = |name: &str| fs::metadata(dir.join(name)).map(|found| found.permissions().mode() & 0o7777);
        for (name, kind) in [("a/b", "DirectoryOrCreate"), ("c", ""), ("d", "FileOrCreate")] {
            assert_eq!(check(&dir.join(name), kind), Ok(()), "{name}");
            assert_eq!(check(&dir.join(name), kind), Ok(()), "{name} again");
        }
        let modes = ["a/b", "c", "d"].map(|name| mode(name).expect("made"));
        assert_eq!(modes, [0o755, 0o755, 0o644]);
        // Neither makes the other, and a file makes no directories.
        assert!(check(&dir.join("none/d"), "FileOrCreate").is_err_and(|why| why.contains("No such file")));
        assert!(check(&dir.join("d/e"), "DirectoryOrCreate").is_err());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
