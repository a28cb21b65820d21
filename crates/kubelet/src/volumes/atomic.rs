//! Replaces the contents of a volume in one step.
//!
//! ```text
//! volume/..2026_11_21_02_03_04.1a2b3c4d/ca.crt   the files
//! volume/..data  ->  ..2026_11_21_02_03_04.1a2b3c4d
//! volume/ca.crt  ->  ..data/ca.crt               what the container reads
//! ```
//! A change makes a new directory and then renames a new link over `..data`: a reader sees all of the
//! old or all of the new. Upstream: pkg/volume/util/atomic_writer.go. Blocking.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use super::Content;

const LINK: &str = "..data";
const NEW_LINK: &str = "..data_tmp";

/// Makes `dir` hold exactly `content`. `group` is the pod's `fsGroup`.
pub fn write(dir: &Path, content: &Content, group: Option<u32>) -> io::Result<()> {
    let old = fs::read_link(dir.join(LINK)).ok();
    let same = old.as_ref().is_some_and(|old| holds(&dir.join(old), content, group));
    if !same {
        let now = jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S").to_string();
        let name = format!("..{now}.{}", crate::container::new_id(4));
        write_files(&dir.join(&name), content, group)?;
        let _ = fs::remove_file(dir.join(NEW_LINK));
        symlink(&name, dir.join(NEW_LINK))?;
        fs::rename(dir.join(NEW_LINK), dir.join(LINK))?;
    }
    chown(dir, None, group)?;
    fs::set_permissions(dir, Permissions::from_mode(if group.is_some() { 0o2775 } else { 0o777 | 0o1000 }))?;
    link_names(dir, content)?;
    match old {
        Some(old) if !same => fs::remove_dir_all(dir.join(old)),
        _ => Ok(()),
    }
}

fn holds(dir: &Path, content: &Content, group: Option<u32>) -> bool {
    let mut found = 0;
    let same = content.iter().all(|(path, file)| {
        let path = dir.join(path);
        let mode = fs::metadata(&path).map(|data| data.permissions().mode() & 0o777);
        found += 1;
        mode.is_ok_and(|mode| mode == final_mode(file.mode, group))
            && fs::read(&path).is_ok_and(|data| data == file.data)
    });
    same && count_files(dir) == found
}

fn count_files(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count_files(&entry.path()) } else { 1 }).sum()
}

/// A group that is to read the volume may.
fn final_mode(mode: u32, group: Option<u32>) -> u32 {
    if group.is_some() { mode | 0o440 } else { mode }
}

fn write_files(dir: &Path, content: &Content, group: Option<u32>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    chown(dir, None, group)?;
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    for (path, file) in content {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &file.data)?;
        chown(&path, file.user, group)?;
        fs::set_permissions(&path, Permissions::from_mode(final_mode(file.mode, group)))?;
    }
    Ok(())
}

fn link_names(dir: &Path, content: &Content) -> io::Result<()> {
    let first = |path: &str| path.split('/').next().unwrap_or(path).to_owned();
    let wanted: BTreeSet<String> = content.keys().map(|path| first(path)).collect();
    for name in &wanted {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(LINK).join(name), link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !wanted.contains(&*name) {
            fs::remove_file(dir.join(&*name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::content::File;

    fn content(files: &[(&str, &str)]) -> Content {
        let file = |text: &str| File { data: text.as_bytes().to_vec(), mode: 0o644, user: None };
        files.iter().map(|(path, text)| ((*path).to_owned(), file(text))).collect()
    }

    fn visible(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.starts_with(".."));
        names.sort();
        names
    }

    #[test]
    fn contents_are_replaced_whole() {
        let dir = crate::testing::temp_dir("atomic");
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        write(&dir, &content(&[("a", "1"), ("d/b", "2")]), None).expect("written");
        assert_eq!(
            (read("a"), read("d/b"), visible(&dir)),
            ("1".into(), "2".into(), vec!["a".into(), "d".into()])
        );
        let first = fs::read_link(dir.join(LINK)).expect("a link");
        write(&dir, &content(&[("a", "1"), ("d/b", "2")]), None).expect("written");
        assert_eq!(fs::read_link(dir.join(LINK)).expect("a link"), first, "nothing changed");
        write(&dir, &content(&[("a", "3"), ("c", "4")]), None).expect("written");
        assert_eq!(
            (read("a"), read("c"), visible(&dir)),
            ("3".into(), "4".into(), vec!["a".into(), "c".into()])
        );
        assert!(!dir.join(first).exists());
        write(&dir, &content(&[]), None).expect("written");
        assert_eq!(visible(&dir), Vec::<String>::new());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
