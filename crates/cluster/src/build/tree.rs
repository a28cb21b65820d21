//! Files to be copied into an image: from the context of a build, or from another image.
//!
//! All of it happens below one directory, as if that were the root: a link leads wherever it would lead in there, and
//! never out. Links below what is copied are copied as they are, and not followed at all.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use minke_runtime::build::EntryMeta;
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};

use super::ignore::{Ignore, glob};

/// Directories in directories that are walked through.
const DEPTH_MAX: usize = 200;
/// Most files that a pattern may name.
const MATCHES_MAX: usize = 10_000;

/// A directory out of which nothing leads.
pub struct Tree {
    root: OwnedFd,
    ignore: Ignore,
}

/// One thing to be copied.
pub enum Item {
    Directory(EntryMeta),
    /// With its size and its attribute `security.capability`.
    File(EntryMeta, u64, File, Option<Vec<u8>>),
    Link(EntryMeta, PathBuf),
}

/// Is told each thing with its path in the image.
pub type Visit<'a> = &'a mut dyn FnMut(&Path, Item) -> Result<()>;

impl Tree {
    pub fn open(dir: &Path, ignore: Ignore) -> Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(dir, flags, Mode::empty()).with_context(|| dir.display().to_string())?;
        Ok(Tree { root, ignore })
    }

    pub fn of(root: OwnedFd) -> Tree {
        Tree { root, ignore: Ignore::default() }
    }

    fn at(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    pub fn is_dir(&self, path: &Path) -> bool {
        self.at(path, OFlags::PATH | OFlags::DIRECTORY).is_ok()
    }

    pub fn exists(&self, path: &Path) -> bool {
        self.at(path, OFlags::PATH).is_ok()
    }

    /// A small file's text; empty when there is none.
    pub fn text(&self, path: &Path) -> String {
        use std::io::Read;
        let mut bytes = Vec::new();
        if let Ok(file) = self.at(path, OFlags::RDONLY | OFlags::NONBLOCK).map(File::from)
            && file.metadata().is_ok_and(|meta| meta.is_file())
        {
            let _ = file.take(1 << 20).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A regular file, to be read.
    pub fn file(&self, path: &Path) -> Result<File> {
        let file = File::from(self.at(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        if !file.metadata()?.is_file() {
            bail!("{} is not a file", path.display());
        }
        Ok(file)
    }

    /// The path that `source` names, which is no pattern.
    pub fn one(&self, source: &str) -> Result<PathBuf> {
        let path: PathBuf = parts_of(source)?.iter().collect();
        match self.exists(&path) && (!self.ignores(&path) || self.takes_back_below(&path)) {
            true => Ok(path),
            false => bail!("{source:?}: not found"),
        }
    }

    /// The paths that `source` names, which may be a pattern; `deep` is one in which `**` stands for any number of
    /// directories. At least one, or an error.
    pub fn find(&self, source: &str, deep: bool) -> Result<Vec<PathBuf>> {
        let parts = parts_of(source)?;
        let mut found = vec![PathBuf::new()];
        for part in &parts {
            let mut next = Vec::new();
            for path in found {
                if deep && part == "**" {
                    self.directories(path, &mut next)?;
                    continue;
                }
                if !part.contains(['*', '?', '[', '\\']) {
                    next.push(path.join(part));
                    continue;
                }
                let Ok(dir) = self.at(&path, OFlags::RDONLY | OFlags::DIRECTORY) else { continue };
                let names = names(&dir)?.into_iter();
                next.extend(
                    names.filter(|n| n.to_str().is_some_and(|n| glob(part, n))).map(|n| path.join(n)),
                );
            }
            if next.len() > MATCHES_MAX {
                bail!("{source} names more than {MATCHES_MAX} files");
            }
            found = next;
        }
        found.sort();
        found.dedup();
        found.retain(|path| self.exists(path) && (!self.ignores(path) || self.takes_back_below(path)));
        if found.is_empty() {
            bail!("{source:?}: not found");
        }
        Ok(found)
    }

    /// A directory and all below it.
    fn directories(&self, path: PathBuf, found: &mut Vec<PathBuf>) -> Result<()> {
        let mut todo = vec![path];
        while let Some(path) = todo.pop() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let Ok(dir) = self.at(&path, flags) else { continue };
            todo.extend(names(&dir)?.into_iter().map(|name| path.join(name)));
            found.push(path);
            if found.len() > MATCHES_MAX || todo.len() > MATCHES_MAX * 10 {
                bail!("** names more than {MATCHES_MAX} directories");
            }
        }
        Ok(())
    }

    fn ignores(&self, path: &Path) -> bool {
        let parts: Vec<_> = path.iter().map(OsStr::to_string_lossy).collect();
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        self.ignore.ignores(&parts)
    }

    fn takes_back_below(&self, path: &Path) -> bool {
        self.ignore.takes_back() && self.is_dir(path)
    }

    /// Shows `visit` what `source` is: a file as `target`, a directory's content below it. `keep_owner` leaves
    /// owners as they are; else everything is root's.
    pub fn walk(&self, source: &Path, target: &Path, keep_owner: bool, visit: Visit<'_>) -> Result<()> {
        let shown = || source.display().to_string();
        let found = self.at(source, OFlags::PATH).with_context(shown)?;
        let stat = rustix::fs::fstat(&found)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let dir = self.at(source, OFlags::RDONLY | OFlags::DIRECTORY).with_context(shown)?;
                self.walk_dir(&dir, source, target, keep_owner, 0, visit)
            }
            FileType::RegularFile => {
                visit(target, file(self.at(source, OFlags::RDONLY | OFlags::NONBLOCK)?, keep_owner)?)
            }
            _ => bail!("{} is neither a file nor a directory", shown()),
        }
    }

    fn walk_dir(
        &self,
        dir: &OwnedFd,
        source: &Path,
        target: &Path,
        keep_owner: bool,
        depth: usize,
        visit: Visit<'_>,
    ) -> Result<()> {
        if depth > DEPTH_MAX {
            bail!("{} is too deep", source.display());
        }
        for name in names(dir)? {
            let (source, target) = (source.join(&name), target.join(&name));
            let ignored = self.ignores(&source);
            if ignored && !self.ignore.takes_back() {
                continue;
            }
            let open = |flags| {
                rustix::fs::openat(dir, &name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            };
            let found = open(OFlags::PATH)?;
            let stat = rustix::fs::fstat(&found)?;
            let meta = meta_of(&stat, keep_owner);
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    // What is taken back below one that is left out implies it.
                    if !ignored {
                        visit(&target, Item::Directory(meta))?;
                    }
                    let inner = open(OFlags::RDONLY | OFlags::DIRECTORY)?;
                    self.walk_dir(&inner, &source, &target, keep_owner, depth + 1, visit)?;
                }
                _ if ignored => {}
                FileType::RegularFile => {
                    visit(&target, file(open(OFlags::RDONLY | OFlags::NONBLOCK)?, keep_owner)?)?;
                }
                FileType::Symlink => {
                    let to = rustix::fs::readlinkat(&found, c"", Vec::new())?.into_bytes();
                    visit(&target, Item::Link(meta, PathBuf::from(OsString::from_vec(to))))?;
                }
                // Nobody can have meant it: what it is stands only for this machine.
                _ => bail!("{} is a device, a pipe or a socket", source.display()),
            }
        }
        Ok(())
    }
}

/// A path of the context without `.`; one that leads out of it is an error.
fn parts_of(source: &str) -> Result<Vec<String>> {
    let mut parts = Vec::new();
    for component in Path::new(source).components() {
        match component {
            Component::Normal(name) => parts.push(name.to_string_lossy().into_owned()),
            Component::ParentDir if parts.pop().is_none() => {
                bail!("forbidden path outside the build context: {source}")
            }
            _ => {}
        }
    }
    Ok(parts)
}

fn names(dir: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn meta_of(stat: &rustix::fs::Stat, keep_owner: bool) -> EntryMeta {
    let (uid, gid) = if keep_owner { (stat.st_uid, stat.st_gid) } else { (0, 0) };
    EntryMeta { mode: stat.st_mode & 0o7777, uid, gid, mtime: u64::try_from(stat.st_mtime).unwrap_or(0) }
}

fn file(file: OwnedFd, keep_owner: bool) -> Result<Item> {
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        bail!("a file has become something else");
    }
    let mut value = [0u8; 256];
    let capability = rustix::fs::fgetxattr(&file, c"security.capability", &mut value).ok();
    let capability = capability.map(|n| value[..n].to_vec());
    Ok(Item::File(meta_of(&stat, keep_owner), u64::try_from(stat.st_size)?, File::from(file), capability))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn seen(tree: &Tree, source: &str) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for path in tree.find(source, source.contains("**"))? {
            tree.walk(&path, Path::new("t"), false, &mut |path, item| {
                let kind = match item {
                    Item::Directory(_) => "/".to_owned(),
                    Item::File(_, size, ..) => format!(" {size}"),
                    Item::Link(_, to) => format!(" -> {}", to.display()),
                };
                all.push(format!("{}{kind}", path.display()));
                Ok(())
            })?;
        }
        Ok(all)
    }

    #[test]
    fn nothing_leads_out_of_the_context() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("secret"), "secret").unwrap();
        let context = tmp.path().join("c");
        fs::create_dir_all(context.join("d/e")).unwrap();
        fs::write(context.join("d/f"), "12").unwrap();
        fs::write(context.join("d/e/g.log"), "123").unwrap();
        symlink("../../secret", context.join("up")).unwrap();
        symlink(tmp.path().join("secret"), context.join("abs")).unwrap();
        symlink("..", context.join("d/dots")).unwrap();
        symlink("d/f", context.join("good")).unwrap();
        let tree = Tree::open(&context, Ignore::default()).unwrap();
        assert_eq!(seen(&tree, "d").unwrap(), ["t/dots -> ..", "t/e/", "t/e/g.log 3", "t/f 2"]);
        assert_eq!(seen(&tree, "d/[f]").unwrap(), ["t 2"]);
        assert_eq!(seen(&tree, "good").unwrap(), ["t 2"]);
        assert_eq!(seen(&tree, "**/*.log").unwrap(), ["t 3"]);
        assert_eq!(seen(&tree, "**/f").unwrap(), ["t 2"]);
        assert_eq!(tree.one("d/e/./g.log").unwrap(), Path::new("d/e/g.log"));
        assert_eq!(tree.one("d/*").unwrap_err().to_string(), "\"d/*\": not found");
        // As if the context were the root, where `..` is the root again.
        assert_eq!(seen(&tree, "d/dots/d/f").unwrap(), ["t 2"]);
        for outside in ["up", "abs", "d/dots/dots/secret", "nosuch", "*.x"] {
            let error = seen(&tree, outside).unwrap_err().to_string();
            assert_eq!(error, format!("{outside:?}: not found"));
        }
        let error = seen(&tree, "../secret").unwrap_err().to_string();
        assert_eq!(error, "forbidden path outside the build context: ../secret");
    }

    #[test]
    fn what_is_ignored_is_not_there() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("d")).unwrap();
        for name in ["a", "b", "d/keep", "d/drop"] {
            fs::write(tmp.path().join(name), "").unwrap();
        }
        let tree = |text: &str| Tree::open(tmp.path(), Ignore::parse(text)).unwrap();
        assert_eq!(seen(&tree("b"), ".").unwrap(), ["t/a 0", "t/d/", "t/d/drop 0", "t/d/keep 0"]);
        assert_eq!(seen(&tree("*\n!d/keep"), ".").unwrap(), ["t/d/keep 0"]);
        assert!(seen(&tree("a"), "a").is_err());
    }
}
