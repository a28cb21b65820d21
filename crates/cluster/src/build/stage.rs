//! One stage of a build: what its steps do to a draft.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use minke_api::time::parse_go_duration;
use minke_runtime::build::{
    Draft, EntryMeta, LayerWriter, Outcome, hex_digest, is_archive, owner_of, unpack_files,
};
use serde_json::{Map, Value, json};

use super::dockerfile::{self, Arguments, Instruction, Variables};
use super::ignore::Ignore;
use super::sandbox::Command;
use super::tree::{Item, Tree};
use super::{Build, Plan, find, is_proxy, predefined};
use crate::io::Io;

/// Bytes of a file that tell what it is.
const HEAD: u64 = 16 << 10;

/// A stage under way, or finished.
#[derive(Debug, Clone)]
pub struct Stage {
    draft: Draft,
    /// Names all that the draft depends on.
    key: String,
    /// Declared by ARG, with the values that they have.
    args: Variables,
    /// This stage has a CMD of its own, which an ENTRYPOINT leaves as it is.
    has_cmd: bool,
    /// Unix seconds: when the youngest of its layers was made.
    made: Option<i64>,
}

impl Stage {
    pub fn scratch() -> Stage {
        Stage::new(Draft::scratch(), "scratch".to_owned())
    }

    pub fn upon(image: Draft) -> Stage {
        let key = hex_digest(&[image.config.to_string().as_bytes(), image.chain().as_bytes()]);
        Stage::new(image, key)
    }

    /// Another stage that begins where this one has ended.
    pub fn again(&self) -> Stage {
        Stage { args: Variables::new(), has_cmd: false, ..self.clone() }
    }

    fn new(draft: Draft, key: String) -> Stage {
        let mut stage = Stage { draft, key, args: Variables::new(), has_cmd: false, made: None };
        let config = &mut stage.draft.config;
        for (field, empty) in [("config", json!({})), ("history", json!([]))] {
            if config[field].is_null() {
                config[field] = empty;
            }
        }
        stage
    }

    /// The draft, with the time of its youngest layer as its own: a build of nothing new is the same image.
    pub fn finish(mut self) -> Draft {
        if let Some(made) = self.made.and_then(|made| jiff::Timestamp::from_second(made).ok()) {
            self.draft.config["created"] = made.to_string().into();
        }
        self.draft
    }

    fn config(&mut self) -> &mut Map<String, Value> {
        if !self.draft.config["config"].is_object() {
            self.draft.config["config"] = json!({});
        }
        self.draft.config["config"].as_object_mut().expect("it was made one")
    }

    fn text(&self, field: &str) -> String {
        self.draft.config["config"][field].as_str().unwrap_or_default().to_owned()
    }

    fn env(&self) -> Vec<(String, String)> {
        let env = self.draft.config["config"]["Env"].as_array().map_or(&[][..], Vec::as_slice);
        let pairs = env.iter().filter_map(|v| v.as_str()?.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// What `$NAME` means here: an ENV wins over an ARG.
    fn variables(&self) -> Variables {
        let mut all = self.args.clone();
        all.extend(self.env());
        all
    }

    /// Does one step.
    #[expect(clippy::too_many_arguments, reason = "all of the build's state, and where in it this is")]
    pub async fn step(
        &mut self,
        build: &mut Build<'_>,
        step: &Instruction,
        global: &Variables,
        plans: &[Plan],
        stages: &BTreeMap<usize, Stage>,
        io: &mut Io,
        (done, total): (usize, usize),
    ) -> Result<()> {
        let escape = build.file.escape;
        let said = step.shown();
        let layered = matches!(step.name.as_str(), "COPY" | "ADD" | "RUN" | "WORKDIR");
        if !layered {
            build.say(io, done, total, &said, false);
        }
        let outcome = match step.name.as_str() {
            "RUN" => Some(self.run(build, step, io, (done, total)).await?),
            "COPY" | "ADD" => Some(self.copy(build, step, plans, stages, io, (done, total)).await?),
            "WORKDIR" => Some(self.workdir(build, step, io, (done, total)).await?),
            "ARG" => {
                for (name, value) in declared(step, escape, &self.variables()).map_err(anyhow::Error::msg)? {
                    let given = build.build_args.get(&name).cloned().or(value);
                    let given = given.or_else(|| global.get(&name).cloned());
                    if let Some(value) = given.or_else(|| predefined().remove(&name)) {
                        self.args.insert(name, value);
                    }
                }
                None
            }
            _ => {
                self.describe(step, escape).map_err(|why| anyhow!(why))?;
                None
            }
        };
        if !layered {
            self.key = hex_digest(&[self.key.as_bytes(), said.as_bytes(), self.settings().as_bytes()]);
        }
        let history = &mut self.draft.config["history"];
        let mut entry = json!({ "created_by": said });
        match outcome.filter(Outcome::changes) {
            Some(outcome) => {
                self.made = self.made.max(Some(outcome.made()));
                if let Ok(made) = jiff::Timestamp::from_second(outcome.made()) {
                    entry["created"] = made.to_string().into();
                }
            }
            None => entry["empty_layer"] = true.into(),
        }
        if let Some(list) = history.as_array_mut() {
            list.push(entry);
        }
        Ok(())
    }

    /// All that later steps may depend on and that is no file.
    fn settings(&self) -> String {
        format!("{}\n{:?}", self.draft.config["config"], self.args)
    }

    /// A step's outcome from an earlier build, when everything it depends on is as it was then.
    fn recall(&mut self, build: &Build<'_>, key: &str) -> Result<Option<Outcome>> {
        match build.use_cache {
            true => Ok(build.images.recall(&mut self.draft, key)?),
            false => Ok(None),
        }
    }

    fn done(&mut self, build: &mut Build<'_>, key: String, outcome: Outcome) -> Outcome {
        build.outcomes.push((key.clone(), outcome.clone()));
        self.key = key;
        outcome
    }

    /// The shell, with a text as its command; or a list as it is.
    fn command(&self, arguments: &Arguments) -> Vec<String> {
        match arguments {
            Arguments::List(list) => list.clone(),
            Arguments::Text(text) => {
                let shell = self.draft.config["config"]["Shell"].as_array();
                let shell: Option<Vec<String>> =
                    shell.map(|s| s.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect());
                let mut argv = shell.unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()]);
                argv.push(text.clone());
                argv
            }
        }
    }

    async fn run(
        &mut self,
        build: &mut Build<'_>,
        step: &Instruction,
        io: &mut Io,
        (done, total): (usize, usize),
    ) -> Result<Outcome> {
        let argv = self.command(&step.arguments);
        let key = hex_digest(&[
            self.key.as_bytes(),
            b"RUN",
            format!("{argv:?}").as_bytes(),
            self.settings().as_bytes(),
        ]);
        if let Some(outcome) = self.recall(build, &key)? {
            build.say(io, done, total, &step.shown(), true);
            return Ok(self.done(build, key, outcome));
        }
        build.say(io, done, total, &step.shown(), false);
        if argv.is_empty() {
            bail!("there is nothing to run");
        }
        // What the image has comes with it; arguments are for the step alone.
        let has: Vec<String> = self.env().into_iter().map(|(name, _)| name).collect();
        let args = self.args.iter().filter(|(name, _)| !has.contains(name));
        let proxies = build.build_args.iter();
        let proxies = proxies
            .filter(|(name, _)| is_proxy(name) && !has.contains(name) && !self.args.contains_key(*name));
        let env = args.chain(proxies).map(|(name, value)| (name.clone(), value.clone())).collect();
        let outcome = build.sandbox.run(&mut self.draft, Command { argv, env }, io).await?;
        Ok(self.done(build, key, outcome))
    }

    async fn workdir(
        &mut self,
        build: &mut Build<'_>,
        step: &Instruction,
        io: &mut Io,
        (done, total): (usize, usize),
    ) -> Result<Outcome> {
        let said = step.shown();
        let given = self.one(step, build.file.escape)?;
        let path = self.absolute(&given);
        self.config().insert("WorkingDir".to_owned(), path.display().to_string().into());
        let key = hex_digest(&[self.key.as_bytes(), b"WORKDIR", self.settings().as_bytes()]);
        if let Some(outcome) = self.recall(build, &key)? {
            build.say(io, done, total, &said, true);
            return Ok(self.done(build, key, outcome));
        }
        build.say(io, done, total, &said, false);
        let view = self.view(build).await?;
        let inside = relative(&path);
        let missing = !inside.as_os_str().is_empty() && !view.is_dir(&inside);
        let outcome = self
            .add(build, move |writer| match missing {
                true => Ok(writer.directory(&inside, &EntryMeta { mode: 0o755, ..now() })?),
                false => Ok(()),
            })
            .await?;
        Ok(self.done(build, key, outcome))
    }

    /// Adds a layer on a thread where that may take its time.
    async fn add(
        &mut self,
        build: &Build<'_>,
        write: impl FnOnce(&mut LayerWriter) -> Result<()> + Send + 'static,
    ) -> Result<Outcome> {
        let (images, mut draft) = (build.images.clone(), self.draft.clone());
        let (outcome, draft) = tokio::task::spawn_blocking(move || {
            let outcome = images.add_layer(&mut draft, |writer| {
                write(writer).map_err(|e| std::io::Error::other(format!("{e:#}")))
            });
            outcome.map(|outcome| (outcome, draft))
        })
        .await??;
        self.draft = draft;
        Ok(outcome)
    }

    /// The files of the image as it is now.
    async fn view(&self, build: &Build<'_>) -> Result<Tree> {
        let (images, draft, scratch) = (build.images.clone(), self.draft.clone(), build.sandbox.scratch()?);
        let view = tokio::task::spawn_blocking(move || images.view(&draft, &scratch)).await??;
        Ok(Tree::of(view))
    }

    async fn copy(
        &mut self,
        build: &mut Build<'_>,
        step: &Instruction,
        plans: &[Plan],
        stages: &BTreeMap<usize, Stage>,
        io: &mut Io,
        (done, total): (usize, usize),
    ) -> Result<Outcome> {
        let (escape, variables) = (build.file.escape, self.variables());
        let expand = |text: &str| dockerfile::words(text, escape, &variables).map_err(anyhow::Error::msg);
        let words = match &step.arguments {
            Arguments::Text(text) => expand(text)?,
            Arguments::List(list) => {
                let expanded = list.iter().map(|word| dockerfile::expand_all(word, escape, &variables));
                expanded.collect::<Result<_, _>>().map_err(anyhow::Error::msg)?
            }
        };
        let Some((target, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            bail!("{} requires at least two arguments", step.name);
        };
        let is_add = step.name == "ADD";
        let git = |s: &&String| ["git@", "git://", "ssh://"].iter().any(|p| s.starts_with(p));
        if let Some(url) = sources.iter().find(git).filter(|_| is_add) {
            bail!("{url}: repositories are not fetched; use a RUN step");
        }
        let flag =
            |name: &str| step.flag(name).map(|text| expand(text).map(|words| words.concat())).transpose();
        let mode = match flag("chmod")? {
            None => None,
            Some(text) => {
                Some(u32::from_str_radix(&text, 8).ok().filter(|m| *m <= 0o7777).with_context(|| {
                    format!(
                        "invalid chmod parameter: {text:?}. it should be octal string and between 0 and 07777"
                    )
                })?)
            }
        };
        let owner = flag("chown")?;

        // From where: another stage, another image, or the context.
        let mut from_key = String::new();
        let other = match flag("from")? {
            None => None,
            Some(name) => {
                let known = find(plans, &name).and_then(|n| stages.get(&n));
                let draft = match known {
                    Some(stage) => {
                        from_key = stage.key.clone();
                        stage.draft.clone()
                    }
                    None => {
                        let draft = build.image(&name, io).await?;
                        from_key = draft.chain().to_owned();
                        draft
                    }
                };
                let (images, scratch) = (build.images.clone(), build.sandbox.scratch()?);
                let view = tokio::task::spawn_blocking(move || images.view(&draft, &scratch)).await??;
                Some(Tree::of(view))
            }
        };
        let tree = other.as_ref().unwrap_or(&build.context);
        let (mut found, mut written) = (Vec::new(), step.heredocs.iter());
        let (mut documents, mut fetched) = (Vec::new(), Vec::new());
        let checksum = flag("checksum")?;
        for source in sources {
            if is_add && (source.starts_with("http://") || source.starts_with("https://")) {
                fetched.push(fetch(source, target, checksum.as_deref(), build.sandbox.scratch()?).await?);
                continue;
            }
            match written.as_slice().first().filter(|_| source.starts_with("<<")) {
                Some(heredoc) => {
                    let content = heredoc.content(escape, &variables).map_err(anyhow::Error::msg)?;
                    documents.push((&heredoc.name, content));
                    written.next();
                }
                None => found.extend(tree.find(source)?),
            }
        }
        let content = match &other {
            // What the other image is made of is known.
            Some(_) => from_key,
            None => digest(tree, &found)?,
        };
        if checksum.is_some() && fetched.is_empty() {
            bail!("checksum can't be specified for local files");
        }
        let content = match documents.is_empty() && fetched.is_empty() {
            true => content,
            false => hex_digest(&[content.as_bytes(), format!("{documents:?} {fetched:?}").as_bytes()]),
        };
        let words = format!("{words:?} {mode:?} {owner:?}");
        let dir = self.text("WorkingDir");
        let parts = [&self.key, &step.name, &words, &content, &dir];
        let key = hex_digest(&parts.map(String::as_bytes));
        if let Some(outcome) = self.recall(build, &key)? {
            build.say(io, done, total, &step.shown(), true);
            return Ok(self.done(build, key, outcome));
        }
        build.say(io, done, total, &step.shown(), false);
        let view = self.view(build).await?;
        let owner = match owner {
            None => (0, 0),
            Some(owner) => {
                let (passwd, group) = (view.text(Path::new("etc/passwd")), view.text(Path::new("etc/group")));
                owner_of(&owner, &passwd, &group).map_err(anyhow::Error::msg)?
            }
        };
        let path = relative(&self.absolute(target));
        let into_dir = target.ends_with('/') || target == "." || target.ends_with("/.") || view.is_dir(&path);
        if found.len() + documents.len() + fetched.len() > 1 && !into_dir {
            bail!(
                "When using {} with more than one source file, the destination must be a directory and end with a /",
                step.name
            );
        }
        // Archives are unpacked first, so that they are copied like anything else.
        let mut copies = Vec::new();
        for (name, content) in &documents {
            let scratch = build.sandbox.scratch()?;
            std::fs::write(scratch.join(name), content)?;
            std::fs::set_permissions(scratch.join(name), std::fs::Permissions::from_mode(0o644))?;
            let tree = Some(Tree::open(&scratch, Ignore::default())?);
            let target = if into_dir { path.join(name) } else { path.clone() };
            copies.push(Copy { tree, source: PathBuf::from(name), target, whole_dir: false });
        }
        for file in &fetched {
            let tree = Some(Tree::open(&file.dir, Ignore::default())?);
            let target = if into_dir { path.join(&file.name) } else { path.clone() };
            copies.push(Copy { tree, source: PathBuf::from(&file.name), target, whole_dir: false });
        }
        for source in found {
            if tree.is_dir(&source) {
                copies.push(Copy { tree: None, source, target: path.clone(), whole_dir: true });
                continue;
            }
            let mut head = Vec::new();
            if is_add {
                tree.file(&source)?.take(HEAD).read_to_end(&mut head)?;
            }
            let archive = is_archive(&head);
            let archive = archive.map_err(|kind| {
                anyhow!(
                    "{}: archives in {kind} are not unpacked; gzip, zstd and plain ones are",
                    source.display()
                )
            })?;
            if archive {
                let (file, scratch) = (tree.file(&source)?, build.sandbox.scratch()?);
                let to = scratch.clone();
                let unpacked = tokio::task::spawn_blocking(move || unpack_files(file, &to)).await?;
                unpacked.with_context(|| format!("unpack {}", source.display()))?;
                let tree = Tree::open(&scratch, Ignore::default())?;
                copies.push(Copy {
                    tree: Some(tree),
                    source: PathBuf::new(),
                    target: path.clone(),
                    whole_dir: true,
                });
            } else {
                let name = source.file_name().unwrap_or_default();
                let target = if into_dir { path.join(name) } else { path.clone() };
                copies.push(Copy { tree: None, source, target, whole_dir: false });
            }
        }
        let make_dir =
            copies.iter().any(|c| c.whole_dir) && !path.as_os_str().is_empty() && !view.is_dir(&path);
        let meta_of = move |meta: EntryMeta, keeps: bool| EntryMeta {
            mode: mode.unwrap_or(meta.mode),
            uid: if keeps { meta.uid } else { owner.0 },
            gid: if keeps { meta.gid } else { owner.1 },
            ..meta
        };
        let (images, mut draft) = (build.images.clone(), self.draft.clone());
        let write = |writer: &mut LayerWriter| -> Result<()> {
            if make_dir {
                writer.directory(&path, &meta_of(EntryMeta { mode: 0o755, ..now() }, false))?;
            }
            for copy in &copies {
                // An archive says whose its files are.
                let keeps = copy.tree.is_some() && copy.whole_dir;
                let from = copy.tree.as_ref().unwrap_or(tree);
                from.walk(&copy.source, &copy.target, keeps, &mut |path, item| {
                    match item {
                        Item::Directory(meta) => writer.directory(path, &meta_of(meta, keeps))?,
                        Item::Link(meta, to) => writer.symlink(path, &meta_of(meta, keeps), &to)?,
                        Item::File(meta, size, file, capability) => {
                            writer.file(path, &meta_of(meta, keeps), size, file, capability.as_deref())?;
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
        Ok(self.done(build, key, outcome))
    }

    /// The one word of a step.
    fn one(&self, step: &Instruction, escape: char) -> Result<String> {
        let Arguments::Text(text) = &step.arguments else { bail!("{} takes no list", step.name) };
        let words = dockerfile::words(text, escape, &self.variables()).map_err(anyhow::Error::msg)?;
        match &words[..] {
            [word] if !word.is_empty() => Ok(word.clone()),
            _ => bail!("{} requires exactly one argument", step.name),
        }
    }

    /// A path of the image, from where the stage works.
    fn absolute(&self, path: &str) -> PathBuf {
        let dir = self.text("WorkingDir");
        let mut all = PathBuf::from("/");
        for component in Path::new(&dir).join(path).components() {
            match component {
                Component::Normal(name) => all.push(name),
                Component::ParentDir => drop(all.pop()),
                _ => {}
            }
        }
        all
    }

    /// The steps that only say something of the image.
    fn describe(&mut self, step: &Instruction, escape: char) -> Result<(), String> {
        let variables = self.variables();
        let text = match &step.arguments {
            Arguments::Text(text) => text.as_str(),
            Arguments::List(_) => "",
        };
        let words = || match &step.arguments {
            Arguments::List(list) => Ok(list.clone()),
            Arguments::Text(text) => dockerfile::words(text, escape, &variables),
        };
        let one = || match &words()?[..] {
            [word] if !word.is_empty() => Ok(word.clone()),
            _ => Err(format!("{} requires exactly one argument", step.name)),
        };
        match step.name.as_str() {
            "ENV" => {
                let mut env = self.env();
                for (name, value) in dockerfile::pairs(text, escape, &variables)? {
                    match env.iter_mut().find(|(known, _)| *known == name) {
                        Some(known) => known.1 = value,
                        None => env.push((name, value)),
                    }
                }
                let env: Vec<String> =
                    env.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
                self.config().insert("Env".to_owned(), env.into());
            }
            "LABEL" => {
                for (name, value) in dockerfile::pairs(text, escape, &variables)? {
                    self.map("Labels").insert(name, value.into());
                }
            }
            "EXPOSE" => {
                for port in words()? {
                    self.map("ExposedPorts").extend(ports(&port)?.map(|port| (port, json!({}))));
                }
            }
            "VOLUME" => {
                for path in words()? {
                    if path.trim().is_empty() {
                        return Err("VOLUME specified can not be an empty string".to_owned());
                    }
                    self.map("Volumes").insert(path, json!({}));
                }
            }
            "CMD" => {
                let command = self.command(&step.arguments);
                self.has_cmd = true;
                self.config().insert("Cmd".to_owned(), command.into());
            }
            "ENTRYPOINT" => {
                let command = self.command(&step.arguments);
                // The command of the image below was for its own entrypoint.
                if !self.has_cmd {
                    self.config().remove("Cmd");
                }
                self.config().insert("Entrypoint".to_owned(), command.into());
            }
            "SHELL" => {
                let Arguments::List(shell) = &step.arguments else {
                    return Err("SHELL requires the arguments to be in JSON form".to_owned());
                };
                self.config().insert("Shell".to_owned(), shell.clone().into());
            }
            "USER" => {
                let user = one()?;
                self.config().insert("User".to_owned(), user.into());
            }
            "STOPSIGNAL" => {
                let signal = one()?;
                self.config().insert("StopSignal".to_owned(), signal.into());
            }
            "HEALTHCHECK" => {
                let check = self.healthcheck(step)?;
                self.config().insert("Healthcheck".to_owned(), check);
            }
            "MAINTAINER" => self.draft.config["author"] = text.into(),
            other => return Err(format!("unknown instruction: {other}")),
        }
        Ok(())
    }

    fn map(&mut self, field: &str) -> &mut Map<String, Value> {
        let value = self.config().entry(field).or_insert_with(|| json!({}));
        if !value.is_object() {
            *value = json!({});
        }
        value.as_object_mut().expect("it was made one")
    }

    fn healthcheck(&self, step: &Instruction) -> Result<Value, String> {
        let Arguments::Text(text) = &step.arguments else {
            return Err("HEALTHCHECK requires CMD or NONE".to_owned());
        };
        let (kind, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let test = match (kind.to_ascii_uppercase().as_str(), rest.trim()) {
            ("NONE", "") => return Ok(json!({ "Test": ["NONE"] })),
            ("CMD", "") => return Err("Missing command after HEALTHCHECK CMD".to_owned()),
            ("CMD", rest) => match serde_json::from_str::<Vec<String>>(rest) {
                Ok(list) => [vec!["CMD".to_owned()], list].concat(),
                Err(_) => vec!["CMD-SHELL".to_owned(), rest.to_owned()],
            },
            _ => return Err(format!("Unknown type {kind:?} in HEALTHCHECK (try CMD)")),
        };
        let mut check = json!({ "Test": test });
        for (flag, field) in [
            ("interval", "Interval"),
            ("timeout", "Timeout"),
            ("start-period", "StartPeriod"),
            ("start-interval", "StartInterval"),
        ] {
            if let Some(text) = step.flag(flag) {
                let nanoseconds = parse_go_duration(text)?.as_nanos() as u64;
                check[field] = nanoseconds.into();
            }
        }
        if let Some(text) = step.flag("retries") {
            check["Retries"] = text.parse::<u32>().map_err(|e| format!("retries {text:?}: {e}"))?.into();
        }
        Ok(check)
    }
}

/// Something to be copied.
struct Copy {
    /// Where from, when it is neither the context nor the image that the step names.
    tree: Option<Tree>,
    source: PathBuf,
    target: PathBuf,
    whole_dir: bool,
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

fn now() -> EntryMeta {
    let mtime = jiff::Timestamp::now().as_second().max(0) as u64;
    EntryMeta { mtime, ..EntryMeta::default() }
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// All that a copy of these files depends on; when a file was written is no part of it.
fn digest(tree: &Tree, found: &[PathBuf]) -> Result<String> {
    let mut all = String::new();
    for source in found {
        all = hex_digest(&[all.as_bytes(), source.as_os_str().as_encoded_bytes()]);
        tree.walk(source, Path::new(""), false, &mut |path, item| {
            let (kind, meta, content) = match item {
                Item::Directory(meta) => ("d", meta, String::new()),
                Item::Link(meta, to) => ("l", meta, to.display().to_string()),
                Item::File(meta, _, file, capability) => {
                    let hash = minke_runtime::build::hex_digest_of(file)?;
                    ("f", meta, format!("{hash} {capability:?}"))
                }
            };
            let mode = meta.mode.to_le_bytes();
            let path = path.as_os_str().as_encoded_bytes();
            all = hex_digest(&[all.as_bytes(), kind.as_bytes(), path, &mode, content.as_bytes()]);
            Ok(())
        })?;
    }
    Ok(all)
}

/// The names that an ARG declares, with their defaults.
pub fn declared(
    step: &Instruction,
    escape: char,
    variables: &Variables,
) -> Result<Vec<(String, Option<String>)>, String> {
    let Arguments::Text(text) = &step.arguments else { return Err("ARG takes no list".to_owned()) };
    let words = dockerfile::words(text, escape, variables)?;
    let pairs = words.into_iter().map(|word| match word.split_once('=') {
        Some(("", _)) => Err("ARG names can not be blank".to_owned()),
        Some((name, value)) => Ok((name.to_owned(), Some(value.to_owned()))),
        None => Ok((word, None)),
    });
    pairs.collect()
}

/// `80`, `53/udp`, `8000-8010`, as the configuration names them.
fn ports(text: &str) -> Result<impl Iterator<Item = String>, String> {
    let invalid = || format!("invalid containerPort: {text}");
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let port = |text: &str| text.parse::<u16>().map_err(|_| invalid());
    let (first, last) = (port(first)?, port(last)?);
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") || first > last {
        return Err(invalid());
    }
    Ok((first..=last).map(move |port| format!("{port}/{protocol}")))
}
