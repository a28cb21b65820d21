//! One stage of a build: what its steps do to a draft.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use minke_api::time::parse_go_duration;
use minke_runtime::build::{Draft, EntryMeta, LayerWriter, Outcome, hex_digest, owner_of};
use serde_json::{Map, Value, json};

use super::dockerfile::{self, Arguments, Instruction};
use super::tree::{Item, Tree};
use super::words::{self, Variables};
use super::{Build, Place, predefined};

/// A stage under way, or finished.
#[derive(Debug, Clone)]
pub struct Stage {
    pub(super) draft: Draft,
    /// Names all that the draft depends on.
    pub(super) key: String,
    /// Declared by ARG, with the values that they have.
    pub(super) args: Variables,
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

    pub(super) fn text(&self, field: &str) -> String {
        self.draft.config["config"][field].as_str().unwrap_or_default().to_owned()
    }

    pub(super) fn env(&self) -> Vec<(String, String)> {
        let env = self.draft.config["config"]["Env"].as_array().map_or(&[][..], Vec::as_slice);
        let pairs = env.iter().filter_map(|v| v.as_str()?.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// What `$NAME` means here: an ENV wins over an ARG.
    pub(super) fn variables(&self) -> Variables {
        let mut all = self.args.clone();
        all.extend(self.env());
        all
    }

    /// What the image below has asked for by ONBUILD; it is asked for once.
    pub fn triggers(&mut self) -> Result<Vec<Instruction>> {
        let triggers = self.config().remove("OnBuild").unwrap_or_default();
        let texts = triggers.as_array().into_iter().flatten().filter_map(Value::as_str);
        let triggers = texts.map(|text| {
            dockerfile::trigger(text).map_err(|why| anyhow!("ONBUILD {text:?} of the image below: {why}"))
        });
        triggers.collect()
    }

    /// Adds labels that the command line has.
    pub fn label(&mut self, labels: &[(String, String)]) {
        for (name, value) in labels {
            self.map("Labels").insert(name.clone(), value.clone().into());
        }
    }

    /// Does one step.
    pub async fn step(&mut self, at: &mut Place<'_, '_>, step: &Instruction) -> Result<()> {
        let escape = at.build.file.escape;
        let said = step.shown();
        let layered = matches!(step.name.as_str(), "COPY" | "ADD" | "RUN" | "WORKDIR");
        if !layered {
            at.say(step, false);
        }
        let outcome = match step.name.as_str() {
            "RUN" => Some(self.run(at, step).await?),
            "COPY" | "ADD" => Some(self.copy(at, step).await?),
            "WORKDIR" => Some(self.workdir(at, step).await?),
            "ARG" => {
                let (known, given) = (predefined(), &at.build.build_args);
                let value = |name: &str, default: Option<String>| {
                    let value = given.get(name).cloned().or(default);
                    value.or_else(|| at.global.get(name).or_else(|| known.get(name)).cloned())
                };
                let declared = declared(step, escape, self.variables(), value).map_err(anyhow::Error::msg)?;
                self.args.extend(declared.into_iter().filter_map(|(name, value)| Some((name, value?))));
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
    pub(super) fn settings(&self) -> String {
        format!("{}\n{:?}", self.draft.config["config"], self.args)
    }

    /// A step's outcome from an earlier build, when everything it depends on is as it was then.
    pub(super) fn recall(&mut self, build: &Build<'_>, key: &str) -> Result<Option<Outcome>> {
        match build.use_cache {
            true => Ok(build.images.recall(&mut self.draft, key)?),
            false => Ok(None),
        }
    }

    pub(super) fn done(&mut self, build: &mut Build<'_>, key: String, outcome: Outcome) -> Outcome {
        build.outcomes.push((key.clone(), outcome.clone()));
        self.key = key;
        outcome
    }

    /// The shell, with a text as its command; or a list as it is.
    pub(super) fn command(&self, arguments: &Arguments) -> Vec<String> {
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

    async fn workdir(&mut self, at: &mut Place<'_, '_>, step: &Instruction) -> Result<Outcome> {
        let given = self.one(step, at.build.file.escape)?;
        let path = self.absolute(&given);
        self.config().insert("WorkingDir".to_owned(), path.display().to_string().into());
        let key = hex_digest(&[self.key.as_bytes(), b"WORKDIR", self.settings().as_bytes()]);
        if let Some(outcome) = self.recall(at.build, &key)? {
            at.say(step, true);
            return Ok(self.done(at.build, key, outcome));
        }
        at.say(step, false);
        let view = self.view(at.build).await?;
        let inside = relative(&path);
        let mut missing: Vec<PathBuf> = inside.ancestors().map(Path::to_owned).collect();
        missing.retain(|path| !path.as_os_str().is_empty() && !view.is_dir(path));
        // They are the user's.
        let user = self.text("User");
        let (uid, gid) = match user.is_empty() || missing.is_empty() {
            true => (0, 0),
            false => {
                let (passwd, group) = (view.text(Path::new("etc/passwd")), view.text(Path::new("etc/group")));
                owner_of(&user, &passwd, &group).map_err(anyhow::Error::msg)?
            }
        };
        let outcome = self
            .add(at.build, move |writer| {
                let meta = EntryMeta { mode: 0o755, uid, gid, ..now() };
                missing.iter().rev().try_for_each(|path| Ok(writer.directory(path, &meta)?))
            })
            .await?;
        Ok(self.done(at.build, key, outcome))
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
    pub(super) async fn view(&self, build: &Build<'_>) -> Result<Tree> {
        let (images, draft, scratch) = (build.images.clone(), self.draft.clone(), build.sandbox.scratch()?);
        let view = tokio::task::spawn_blocking(move || images.view(&draft, &scratch)).await??;
        Ok(Tree::of(view))
    }

    /// The one word of a step.
    fn one(&self, step: &Instruction, escape: char) -> Result<String> {
        let Arguments::Text(text) = &step.arguments else { bail!("{} takes no list", step.name) };
        let words = words::words(text, escape, &self.variables()).map_err(anyhow::Error::msg)?;
        match &words[..] {
            [word] if !word.is_empty() => Ok(word.clone()),
            _ => bail!("{} requires exactly one argument", step.name),
        }
    }

    /// A path of the image, from where the stage works.
    pub(super) fn absolute(&self, path: &str) -> PathBuf {
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
            Arguments::Text(text) => words::words(text, escape, &variables),
        };
        let one = || match &words()?[..] {
            [word] if !word.is_empty() => Ok(word.clone()),
            _ => Err(format!("{} requires exactly one argument", step.name)),
        };
        match step.name.as_str() {
            "ENV" => {
                let mut env = self.env();
                for (name, value) in words::pairs(text, escape, &variables)? {
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
                for (name, value) in words::pairs(text, escape, &variables)? {
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
                if !minke_runtime::build::is_signal(&signal) {
                    return Err(format!("invalid signal: {signal}"));
                }
                self.config().insert("StopSignal".to_owned(), signal.into());
            }
            "HEALTHCHECK" => {
                let check = self.healthcheck(step)?;
                self.config().insert("Healthcheck".to_owned(), check);
            }
            "ONBUILD" => {
                let triggers = self.config().entry("OnBuild").or_insert_with(|| json!([]));
                match triggers.as_array_mut() {
                    Some(triggers) => triggers.push(text.into()),
                    None => *triggers = json!([text]),
                }
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
            ("NONE", _) => return Err("HEALTHCHECK NONE takes no arguments".to_owned()),
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
                if (1..1_000_000).contains(&nanoseconds) {
                    return Err(format!("Interval {flag:?} cannot be less than 1ms"));
                }
                check[field] = nanoseconds.into();
            }
        }
        if let Some(text) = step.flag("retries") {
            check["Retries"] = text.parse::<u32>().map_err(|e| format!("retries {text:?}: {e}"))?.into();
        }
        Ok(check)
    }
}

pub(super) fn now() -> EntryMeta {
    let mtime = jiff::Timestamp::now().as_second().max(0) as u64;
    EntryMeta { mtime, ..EntryMeta::default() }
}

pub(super) fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// All that a copy of these files depends on; when a file was written is no part of it.
pub(super) fn digest(tree: &Tree, found: &[PathBuf], except: &dyn Fn(&Path) -> bool) -> Result<String> {
    let mut all = String::new();
    for source in found {
        all = hex_digest(&[all.as_bytes(), source.as_os_str().as_encoded_bytes()]);
        tree.walk(source, Path::new(""), false, &mut |path, item| {
            if except(path) || except(&source.join(path)) {
                return Ok(());
            }
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

/// The names that an ARG declares, with what `value` says of each and its default. Each can be made of those before it.
pub fn declared(
    step: &Instruction,
    escape: char,
    mut variables: Variables,
    value: impl Fn(&str, Option<String>) -> Option<String>,
) -> Result<Vec<(String, Option<String>)>, String> {
    let Arguments::Text(text) = &step.arguments else { return Err("ARG takes no list".to_owned()) };
    let mut declared = Vec::new();
    for word in words::raw(text, escape) {
        let word = words::words(word, escape, &variables)?.concat();
        let (name, default) = match word.split_once('=') {
            Some(("", _)) => return Err("ARG names can not be blank".to_owned()),
            Some((name, default)) => (name.to_owned(), Some(default.to_owned())),
            None => (word, None),
        };
        let value = value(&name, default);
        variables.extend(value.clone().map(|value| (name.clone(), value)));
        declared.push((name, value));
    }
    Ok(declared)
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
