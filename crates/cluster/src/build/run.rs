//! `RUN`: a command on the runtime, and what is mounted for it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use minke_runtime::build::{EntryMeta, Outcome, hex_digest};
use minke_runtime::{ImageAccess, Mount, caches};

use super::dockerfile::Instruction;
use super::mounts::{self, Found, Kind, Owner, SECRET_MAX};
use super::sandbox::{Command, Network};
use super::stage::{Stage, digest, relative};
use super::tree::{Item, Tree};
use super::{Files, Place, is_proxy, words};

/// Where a script lies that stands in the Dockerfile and names its interpreter.
const SCRIPTS: &str = "/dev/pipes";
/// How often a cache is asked for that another build has to itself.
const CACHE_PAUSE: Duration = Duration::from_millis(200);

/// A mount with what it shows.
struct Wanted {
    mount: mounts::Mount,
    target: PathBuf,
    /// Whose files, when they are not those of the context.
    files: Option<Files>,
    source: PathBuf,
}

impl Stage {
    pub(super) async fn run(&mut self, at: &mut Place<'_, '_>, step: &Instruction) -> Result<Outcome> {
        let escape = at.build.file.escape;
        let variables = self.variables();
        let expand = |text: &str| words::words(text, escape, &variables).map(|words| words.join(" "));
        let network = network(step, at.build.sandbox.network(), &expand)?;
        if let Some(security) = step.flag("security").filter(|security| *security != "sandbox") {
            bail!("security {security:?} is not allowed: steps run without privileges");
        }
        let mut wanted = Vec::new();
        let mut shown = String::new();
        for text in step.flags("mount") {
            let mount = mounts::parse(text, expand).map_err(anyhow::Error::msg)?;
            let (found, key) = self.wanted(at, mount).await?;
            shown += &format!("{:?} {key}\n", found.mount);
            wanted.push(found);
        }
        let script = step.heredocs.first();
        let argv = match script {
            Some(script) => vec![format!("{SCRIPTS}/{}", script.name)],
            None => self.command(&step.arguments),
        };
        let key = hex_digest(&[
            self.key.as_bytes(),
            b"RUN",
            format!("{argv:?} {:?} {network:?}", script.map(|script| &script.text)).as_bytes(),
            shown.as_bytes(),
            self.settings().as_bytes(),
        ]);
        if let Some(outcome) = self.recall(at.build, &key)? {
            at.say(step, true);
            return Ok(self.done(at.build, key, outcome));
        }
        at.say(step, false);
        if argv.is_empty() {
            bail!("there is nothing to run");
        }
        // What the image has comes with it; arguments are for the step alone.
        let has: Vec<String> = self.env().into_iter().map(|(name, _)| name).collect();
        let args = self.args.iter().filter(|(name, _)| !has.contains(name));
        let proxies = at.build.build_args.iter();
        let proxies = proxies
            .filter(|(name, _)| is_proxy(name) && !has.contains(name) && !self.args.contains_key(*name));
        let env = args.chain(proxies).map(|(name, value)| (name.clone(), value.clone())).collect();
        let stubs = if wanted.is_empty() { Vec::new() } else { stubs(&self.view(at.build).await?, &wanted) };
        let mut command = Command { argv, env, mounts: Vec::new(), network, stubs };
        // Held until the step is over.
        let mut caches = Vec::new();
        for wanted in wanted {
            mount(at, wanted, &mut command, &mut caches).await?;
        }
        if let Some(script) = script {
            let file = at.build.sandbox.scratch()?.join("script");
            fs::write(&file, &script.text)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
            let container_path = PathBuf::from(&command.argv[0]);
            command.mounts.push(Mount {
                host_path: file,
                container_path,
                readonly: true,
                ..Mount::default()
            });
        }
        let outcome = at.build.sandbox.run(&mut self.draft, command, at.io).await?;
        at.build.used_caches |= !caches.is_empty();
        Ok(self.done(at.build, key, outcome))
    }

    /// What a mount shows, and what the step's outcome depends on of that.
    async fn wanted(&self, at: &mut Place<'_, '_>, mount: mounts::Mount) -> Result<(Wanted, String)> {
        let target = match (&mount.kind, mount.target.as_str()) {
            (Kind::Secret { id, .. }, "") => PathBuf::from(format!("/run/secrets/{id}")),
            (Kind::Ssh { id, .. }, "") => PathBuf::from(format!("/run/buildkit/ssh_agent.{id}")),
            (_, given) => self.absolute(given),
        };
        if target == Path::new("/") {
            bail!("invalid mount target {:?}", mount.target);
        }
        let Kind::Bind { from, source } = &mount.kind else {
            return Ok((Wanted { mount, target, files: None, source: PathBuf::new() }, String::new()));
        };
        let files = match from {
            Some(from) => Some(at.files_of(from).await?),
            None => None,
        };
        let (path, key) = match &files {
            Some(Files::Draft(draft, key)) => {
                let (images, scratch) = (at.build.images.clone(), at.build.sandbox.scratch()?);
                let draft = draft.clone();
                let view = tokio::task::spawn_blocking(move || images.view(&draft, &scratch)).await??;
                (Tree::of(view).one(source)?, key.clone())
            }
            Some(Files::Dir(tree)) => found_in(tree, source)?,
            None => found_in(&at.build.context, source)?,
        };
        Ok((Wanted { mount, target, files, source: path }, key))
    }
}

/// A path of a directory, and the digest of what is there.
fn found_in(tree: &Tree, source: &str) -> Result<(PathBuf, String)> {
    let path = tree.one(source)?;
    let key = digest(tree, std::slice::from_ref(&path), &|_| false)?;
    Ok((path, key))
}

/// The network that a step asks for, when it is another than the build's.
fn network(
    step: &Instruction,
    of_build: Network,
    expand: &impl Fn(&str) -> Result<String, String>,
) -> Result<Option<Network>> {
    let Some(text) = step.flag("network") else { return Ok(None) };
    let text = expand(text).map_err(anyhow::Error::msg)?;
    match text.as_str() {
        "default" => Ok(None),
        "none" => Ok(Some(Network::None)),
        "host" if of_build == Network::Host => Ok(None),
        "host" => bail!("network.host is not allowed: the build has --network=none"),
        other => bail!("unsupported network mode {other:?}"),
    }
}

/// Targets that the image does not have, and the directories on the way to them: the innermost first.
fn stubs(view: &Tree, wanted: &[Wanted]) -> Vec<PathBuf> {
    let targets = wanted.iter().map(|wanted| relative(&wanted.target));
    let mut stubs: Vec<PathBuf> = targets
        .flat_map(|target| target.ancestors().map(Path::to_owned).collect::<Vec<_>>())
        .filter(|path| !path.as_os_str().is_empty() && !view.exists(path))
        .collect();
    stubs.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    stubs.dedup();
    stubs
}

/// Adds a mount to a command.
async fn mount(
    at: &mut Place<'_, '_>,
    wanted: Wanted,
    command: &mut Command,
    held: &mut Vec<caches::Cache>,
) -> Result<()> {
    let Wanted { mount, target, files, source } = wanted;
    let readonly = mount.readonly;
    let mut made = Mount { container_path: target, readonly, ..Mount::default() };
    match mount.kind {
        Kind::Bind { .. } => {
            let tree = match &files {
                Some(Files::Draft(draft, _)) => {
                    made.image = Some(at.build.images.lend(draft)?);
                    made.image_sub_path = source.display().to_string();
                    made.image_access = if readonly { ImageAccess::Programs } else { ImageAccess::Scratch };
                    command.mounts.push(made);
                    return Ok(());
                }
                Some(Files::Dir(tree)) => tree,
                None => &at.build.context,
            };
            made.host_path = at.build.sandbox.scratch()?.join("files");
            write_files(tree, &source, &made.host_path)?;
        }
        Kind::Cache { id, sharing, owner } => {
            let cache = cache(at, &id, sharing, owner).await?;
            made.host_path = cache.path.clone();
            held.push(cache);
        }
        Kind::Tmpfs { size } => made.tmpfs_size = Some(size),
        Kind::Secret { id, required, variable, owner } => {
            let Some(found) = at.build.secrets.get(&id) else {
                if required {
                    bail!("secret {id}: not found");
                }
                return Ok(());
            };
            let content = secret(&id, found)?;
            let in_file = !mount.target.is_empty() || variable.is_none();
            if let Some(name) = variable {
                let text =
                    String::from_utf8(content.clone()).map_err(|_| anyhow!("secret {id}: it is no text"))?;
                command.env.push((name, text));
            }
            if !in_file {
                return Ok(());
            }
            let mode = owner.mode.unwrap_or(0o400);
            made.host_path = at.build.sandbox.secret(&content, mode, owner.uid, owner.gid)?;
            made.readonly = true;
        }
        Kind::Ssh { id, required } => match at.build.agents.get(&id) {
            Some(socket) => {
                command.env.push(("SSH_AUTH_SOCK".to_owned(), made.container_path.display().to_string()));
                made.host_path.clone_from(socket);
            }
            None if required => bail!("unset ssh forward key {id}: use --ssh"),
            None => return Ok(()),
        },
    }
    command.mounts.push(made);
    Ok(())
}

async fn cache(
    at: &mut Place<'_, '_>,
    id: &str,
    sharing: caches::Sharing,
    owner: Owner,
) -> Result<caches::Cache> {
    let meta = EntryMeta { mode: owner.mode.unwrap_or(0o755), uid: owner.uid, gid: owner.gid, mtime: 0 };
    let mut said = false;
    loop {
        if let Some(cache) = at.build.images.cache(id, sharing, meta)? {
            return Ok(cache);
        }
        if !std::mem::replace(&mut said, true) {
            at.io.note(format!("Waiting for another build to be done with the cache {id}"));
        }
        // The lock is a file's, which nothing tells of.
        tokio::time::sleep(CACHE_PAUSE).await;
    }
}

fn secret(id: &str, found: &Found) -> Result<Vec<u8>> {
    let content = match found {
        Found::Variable(name) => {
            let value = std::env::var_os(name).with_context(|| format!("secret {id}: {name} is not set"))?;
            value.into_encoded_bytes()
        }
        Found::File(path) => {
            let mut content = Vec::new();
            let file =
                fs::File::open(path).and_then(|file| file.take(SECRET_MAX + 1).read_to_end(&mut content));
            file.with_context(|| format!("secret {id}: {}", path.display()))?;
            content
        }
    };
    if content.len() as u64 > SECRET_MAX {
        bail!("secret {id}: invalid secret size: more than {SECRET_MAX} bytes");
    }
    Ok(content)
}

/// Writes files of a tree to `to`, which is not there yet, as root's.
fn write_files(tree: &Tree, source: &Path, to: &Path) -> Result<()> {
    if tree.is_dir(source) {
        fs::create_dir(to)?;
    }
    let parent = |path: &Path| path.parent().map_or(Ok(()), fs::create_dir_all);
    tree.walk(source, to, false, &mut |path, item| {
        match item {
            Item::Directory(meta) => {
                fs::create_dir_all(path)?;
                fs::set_permissions(path, fs::Permissions::from_mode(meta.mode))?;
                chown(path, Some(meta.uid), Some(meta.gid))?;
            }
            Item::Link(meta, target) => {
                parent(path)?;
                symlink(target, path)?;
                lchown(path, Some(meta.uid), Some(meta.gid))?;
            }
            Item::File(meta, size, content, _) => {
                parent(path)?;
                let mut file = fs::File::create_new(path)?;
                std::io::copy(&mut content.take(size), &mut file)?;
                chown(path, Some(meta.uid), Some(meta.gid))?;
                file.set_permissions(fs::Permissions::from_mode(meta.mode))?;
                file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(meta.mtime))?;
            }
        }
        Ok(())
    })
}
