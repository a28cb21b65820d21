//! `COPY` and `ADD`: files of the context, of other stages and images, of the Dockerfile itself, and from elsewhere.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use minke_runtime::build::{EntryMeta, LayerWriter, Outcome, hex_digest, is_archive, owner_of, unpack_files};

use super::chmod::Chmod;
use super::dockerfile::{Arguments, Instruction};
use super::ignore::Ignore;
use super::stage::{Stage, digest, now, relative};
use super::tree::{Item, Tree};
use super::words;
use super::{Files, Place};

/// Bytes of a file that tell what it is.
const HEAD: u64 = 16 << 10;

/// Something to be copied.
struct Copy {
    /// Where from, when it is neither the context nor the image that the step names.
    tree: Option<Tree>,
    source: PathBuf,
    target: PathBuf,
    whole_dir: bool,
}

/// Something that the sources name.
struct Source {
    path: PathBuf,
    /// What of its path it keeps: with `--parents`, all from a `./` on.
    kept: Option<PathBuf>,
}

/// A file from elsewhere, in a directory of its own.
struct Fetched {
    dir: PathBuf,
    name: String,
    digest: String,
}

impl std::fmt::Debug for Fetched {
    /// What it is, not where it lies.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.digest)
    }
}

impl Stage {
    pub(super) async fn copy(&mut self, at: &mut Place<'_, '_>, step: &Instruction) -> Result<Outcome> {
        let (escape, variables) = (at.build.file.escape, self.variables());
        let expand = |text: &str| words::words(text, escape, &variables).map_err(anyhow::Error::msg);
        let all = match &step.arguments {
            Arguments::Text(text) => expand(text)?,
            Arguments::List(list) => {
                let expanded = list.iter().map(|word| words::expand_all(word, escape, &variables));
                expanded.collect::<Result<_, _>>().map_err(anyhow::Error::msg)?
            }
        };
        let Some((target, sources)) = all.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            bail!("{} requires at least two arguments, but only one was provided", step.name);
        };
        if target.starts_with("<<") && !step.heredocs.is_empty() {
            bail!("{} cannot accept a heredoc as a destination", step.name);
        }
        let is_add = step.name == "ADD";
        if let Some(url) = sources.iter().find(|source| is_add && is_repository(source)) {
            bail!("{url}: git repositories cannot be added, as there is no git here; clone it in a RUN step");
        }
        let flag =
            |name: &str| step.flag(name).map(|text| expand(text).map(|words| words.concat())).transpose();
        let chmod = flag("chmod")?.map(|text| Chmod::parse(&text)).transpose().map_err(anyhow::Error::msg)?;
        let owner = flag("chown")?;
        let (parents, unpack) = (step.has("parents"), step.flag("unpack"));
        let excludes = step.flags("exclude").map(expand).collect::<Result<Vec<_>>>()?.concat();
        let excludes = Ignore::parse(&excludes.join("\n"));
        let excluded = |path: &Path| {
            let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
            excludes.ignores(&parts.iter().map(AsRef::as_ref).collect::<Vec<_>>())
        };

        // From where: another stage, another image, or the context.
        let mut from_key = None;
        let other = match flag("from")? {
            None => None,
            Some(name) => match at.files_of(&name).await? {
                Files::Dir(tree) => Some(tree),
                Files::Draft(draft, key) => {
                    from_key = Some(key);
                    let (images, scratch) = (at.build.images.clone(), at.build.sandbox.scratch()?);
                    let view = tokio::task::spawn_blocking(move || images.view(&draft, &scratch)).await??;
                    Some(Tree::of(view))
                }
            },
        };
        let (mut found, mut written) = (Vec::new(), step.heredocs.iter());
        let (mut documents, mut fetched) = (Vec::new(), Vec::new());
        let checksum = flag("checksum")?;
        for source in sources {
            if is_add && (source.starts_with("http://") || source.starts_with("https://")) {
                fetched.push(fetch(source, target, checksum.as_deref(), at.build.sandbox.scratch()?).await?);
                continue;
            }
            match written.as_slice().first().filter(|_| source.starts_with("<<")) {
                Some(heredoc) => {
                    let content = heredoc.content(escape, &variables).map_err(anyhow::Error::msg)?;
                    documents.push((&heredoc.name, content));
                    written.next();
                }
                None => {
                    found.extend(sources_of(other.as_ref().unwrap_or(&at.build.context), source, parents)?)
                }
            }
        }
        let paths: Vec<PathBuf> = found.iter().map(|source| source.path.clone()).collect();
        let content = match from_key {
            // What the other image is made of is known.
            Some(key) => key,
            None => digest(other.as_ref().unwrap_or(&at.build.context), &paths, &excluded)?,
        };
        if checksum.is_some() && fetched.is_empty() {
            bail!("checksum can't be specified for local files");
        }
        let content = match documents.is_empty() && fetched.is_empty() {
            true => content,
            false => hex_digest(&[content.as_bytes(), format!("{documents:?} {fetched:?}").as_bytes()]),
        };
        let how = format!("{all:?} {chmod:?} {owner:?} {parents} {unpack:?} {excludes:?}");
        let dir = self.text("WorkingDir");
        let parts = [&self.key, &step.name, &how, &content, &dir];
        let key = hex_digest(&parts.map(String::as_bytes));
        if let Some(outcome) = self.recall(at.build, &key)? {
            at.say(step, true);
            return Ok(self.done(at.build, key, outcome));
        }
        at.say(step, false);
        let tree = other.as_ref().unwrap_or(&at.build.context);
        let view = self.view(at.build).await?;
        let owner = match owner {
            None => (0, 0),
            Some(owner) => {
                let (passwd, group) = (view.text(Path::new("etc/passwd")), view.text(Path::new("etc/group")));
                owner_of(&owner, &passwd, &group).map_err(anyhow::Error::msg)?
            }
        };
        let path = relative(&self.absolute(target));
        let into_dir =
            parents || target.ends_with('/') || target == "." || target.ends_with("/.") || view.is_dir(&path);
        if found.len() + documents.len() + fetched.len() > 1 && !into_dir {
            bail!(
                "When using {} with more than one source file, the destination must be a directory and end with a /",
                step.name
            );
        }
        // Archives are unpacked first, so that they are copied like anything else.
        let mut copies = Vec::new();
        for (name, content) in &documents {
            let scratch = at.build.sandbox.scratch()?;
            std::fs::write(scratch.join(name), content)?;
            std::fs::set_permissions(scratch.join(name), std::fs::Permissions::from_mode(0o644))?;
            let tree = Some(Tree::open(&scratch, Ignore::default())?);
            let target = if into_dir { path.join(name) } else { path.clone() };
            copies.push(Copy { tree, source: PathBuf::from(name), target, whole_dir: false });
        }
        for file in &fetched {
            let from = Tree::open(&file.dir, Ignore::default())?;
            let source = PathBuf::from(&file.name);
            if unpack == Some("true") && holds_archive(&from, &source)? {
                copies.push(unpacked(at, &from, &source, &path).await?);
                continue;
            }
            let target = if into_dir { path.join(&file.name) } else { path.clone() };
            copies.push(Copy { tree: Some(from), source, target, whole_dir: false });
        }
        for Source { path: source, kept } in found {
            if tree.is_dir(&source) {
                let target = kept.map_or(path.clone(), |kept| path.join(kept));
                copies.push(Copy { tree: None, source, target, whole_dir: true });
                continue;
            }
            if is_add && unpack != Some("false") && holds_archive(tree, &source)? {
                copies.push(unpacked(at, tree, &source, &path).await?);
                continue;
            }
            let kept = kept.or_else(|| source.file_name().map(PathBuf::from)).unwrap_or_default();
            let target = if into_dir { path.join(kept) } else { path.clone() };
            copies.push(Copy { tree: None, source, target, whole_dir: false });
        }
        let meta_of = move |meta: EntryMeta, keeps: bool, is_dir: bool| EntryMeta {
            mode: chmod.as_ref().map_or(meta.mode, |chmod| chmod.apply(meta.mode, is_dir)),
            uid: if keeps { meta.uid } else { owner.0 },
            gid: if keeps { meta.gid } else { owner.1 },
            ..meta
        };
        let (images, mut draft) = (at.build.images.clone(), self.draft.clone());
        let write = |writer: &mut LayerWriter| -> Result<()> {
            let mut made = std::collections::BTreeSet::new();
            for copy in &copies {
                // A directory that is copied has to be there, whatever it holds.
                let dir = copy.whole_dir.then_some(&copy.target);
                if let Some(dir) = dir.filter(|dir| !dir.as_os_str().is_empty() && !view.is_dir(dir))
                    && made.insert(dir)
                {
                    writer.directory(dir, &meta_of(EntryMeta { mode: 0o755, ..now() }, false, true))?;
                }
                // An archive says whose its files are.
                let keeps = copy.tree.is_some() && copy.whole_dir;
                let from = copy.tree.as_ref().unwrap_or(tree);
                from.walk(&copy.source, &copy.target, keeps, &mut |path, item| {
                    let below = path.strip_prefix(&copy.target).unwrap_or(path);
                    let name = if below.as_os_str().is_empty() { copy.source.file_name() } else { None };
                    if excluded(name.map_or(below, Path::new)) || excluded(&copy.source.join(below)) {
                        return Ok(());
                    }
                    match item {
                        Item::Directory(meta) => writer.directory(path, &meta_of(meta, keeps, true))?,
                        Item::Link(meta, to) => writer.symlink(path, &meta_of(meta, keeps, false), &to)?,
                        Item::File(meta, size, file, capability) => {
                            let meta = meta_of(meta, keeps, false);
                            writer.file(path, &meta, size, file, capability.as_deref())?;
                        }
                    }
                    Ok(())
                })?;
            }
            Ok(())
        };
        // Files of the context are read here: nothing else waits for this thread in the meantime.
        let outcome = images.add_layer(&mut draft, |writer| {
            write(writer).map_err(|e| std::io::Error::other(format!("{e:#}")))
        })?;
        self.draft = draft;
        Ok(self.done(at.build, key, outcome))
    }
}

/// What a source names, and with `--parents` what of its path it keeps.
fn sources_of(tree: &Tree, source: &str, parents: bool) -> Result<Vec<Source>> {
    let found = tree.find(source, parents)?;
    if !parents {
        return Ok(found.into_iter().map(|path| Source { path, kept: None }).collect());
    }
    // What stands before a `./` in the midst of it is left out.
    let left_out = source.trim_start_matches('/').trim_start_matches("./").split_once("/./");
    let left_out = left_out.map_or(0, |(before, _)| Path::new(before).components().count());
    let kept = |path: &Path| path.components().skip(left_out).collect();
    Ok(found.into_iter().map(|path| Source { kept: Some(kept(&path)), path }).collect())
}

/// Whether git would be needed for it.
fn is_repository(source: &str) -> bool {
    let url = source.split(['#', '?']).next().unwrap_or(source);
    let remote =
        ["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) && url.ends_with(".git");
    remote || ["git@", "git://", "ssh://"].iter().any(|scheme| source.starts_with(scheme))
}

/// Whether ADD unpacks it.
fn holds_archive(tree: &Tree, source: &Path) -> Result<bool> {
    let mut head = Vec::new();
    tree.file(source)?.take(HEAD).read_to_end(&mut head)?;
    is_archive(&head).map_err(|kind| {
        anyhow!("{}: archives in {kind} are not unpacked; gzip, zstd and plain ones are", source.display())
    })
}

async fn unpacked(at: &Place<'_, '_>, tree: &Tree, source: &Path, target: &Path) -> Result<Copy> {
    let (file, scratch) = (tree.file(source)?, at.build.sandbox.scratch()?);
    let to = scratch.clone();
    let unpacked = tokio::task::spawn_blocking(move || unpack_files(file, &to)).await?;
    unpacked.with_context(|| format!("unpack {}", source.display()))?;
    let tree = Some(Tree::open(&scratch, Ignore::default())?);
    Ok(Copy { tree, source: PathBuf::new(), target: target.to_owned(), whole_dir: true })
}

async fn fetch(url: &str, target: &str, checksum: Option<&str>, dir: PathBuf) -> Result<Fetched> {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let host_end = path.find("://").map_or(0, |at| at + 3);
    let name =
        path[host_end..].split_once('/').and_then(|(_, path)| path.rsplit('/').next()).unwrap_or_default();
    let name = match name {
        "" | "." | ".." if target.ends_with('/') => bail!("cannot determine filename for url: {url}"),
        "" | "." | ".." => "file",
        name => name,
    };
    let file = dir.join(name);
    let mut out = std::fs::File::create(&file)?;
    let changed = minke_runtime::build::download(url, &mut out).await?;
    let changed = changed.and_then(|text| jiff::fmt::rfc2822::parse(&text).ok());
    if let Some(changed) = changed.filter(|changed| changed.timestamp().as_second() >= 0) {
        out.set_modified(changed.timestamp().into())?;
    }
    // As upstream: nobody but its owner is to read it unless the step says so.
    out.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    let digest = minke_runtime::build::hex_digest_of(std::fs::File::open(&file)?)?;
    if let Some(wanted) = checksum.filter(|wanted| *wanted != format!("sha256:{digest}")) {
        bail!("digest mismatch sha256:{digest}: {wanted}");
    }
    Ok(Fetched { dir, name: name.to_owned(), digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_told_from_files() {
        for (source, want) in [
            ("git@example.com:a/b.git", true),
            ("https://example.com/a/b.git#main:sub", true),
            ("ssh://example.com/a", true),
            ("https://example.com/a.tar.gz", false),
            ("a.git", false),
        ] {
            assert_eq!(is_repository(source), want, "{source}");
        }
    }

    #[test]
    fn parents_are_kept_from_the_dot_on() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(tmp.path().join("a/b/c")).unwrap();
        std::fs::write(tmp.path().join("a/b/c/f"), "").unwrap();
        let tree = Tree::open(tmp.path(), Ignore::default()).unwrap();
        for (source, want) in [
            ("a/b/c/f", "a/b/c/f"),
            ("./a/b/c", "a/b/c"),
            ("a/./b/c/f", "b/c/f"),
            ("./a/b/./c/*", "c/f"),
            ("/a/**/f", "a/b/c/f"),
            (".", ""),
        ] {
            let found = sources_of(&tree, source, true).unwrap();
            assert_eq!(found[0].kept.as_deref(), Some(Path::new(want)), "{source}");
        }
    }
}
