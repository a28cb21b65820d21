//! `minke image build`: an image from a Dockerfile.
//!
//! A stage is a draft to which steps add layers. Each step has a key made of the one before it and all that it depends on, and
//! what a step came to is remembered by it, so a build that has nothing new to do does nothing. `RUN` steps run in a
//! sandbox of the build's own: see [`sandbox`].

mod chmod;
mod copy;
mod dockerfile;
mod ignore;
mod mounts;
mod output;
mod run;
mod sandbox;
mod sources;
mod stage;
mod tree;
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use minke_runtime::build::{Draft, Outcome};
use minke_runtime::{Auth, ImageService, ImageStore, Reference};

use self::dockerfile::{Arguments, Dockerfile, Instruction};
use self::ignore::Ignore;
use self::mounts::Found;
use self::output::Output;
pub use self::sandbox::clear_leftovers;
use self::sandbox::{Network, Sandbox};
use self::sources::Sources;
use self::stage::Stage;
use self::tree::Tree;
use self::words::Variables;
use crate::data_dir::DataDir;
use crate::io::Io;

/// Bytes of caches (`RUN --mount=type=cache`) that are kept after a build.
const CACHES_MAX: u64 = 10 << 30;

/// Build an image from a Dockerfile.
///
/// All instructions of the Dockerfile reference are known, with heredocs, several stages, ONBUILD, and the mounts of RUN
/// (bind, cache, tmpfs, secret and ssh). Images for other platforms than this machine's are not built, and repositories of git
/// are not fetched.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The directory whose files can be copied into the image; `-` reads an archive of it, or only a Dockerfile, from
    /// standard input
    #[arg(value_name = "DIR")]
    context: PathBuf,
    /// A name for the image; may be given more than once
    #[arg(short, long = "tag", value_name = "REFERENCE")]
    tags: Vec<String>,
    /// The Dockerfile, when it is not DIR/Dockerfile; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The value of an ARG; without one, that of the environment
    #[arg(long = "build-arg", value_name = "NAME[=VALUE]")]
    build_args: Vec<String>,
    /// A label of the image; may be given more than once
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// What `RUN --mount=type=secret` shows: a file or a variable of the environment
    #[arg(long = "secret", value_name = "id=ID[,src=FILE|,env=NAME]")]
    secrets: Vec<String>,
    /// The agent of `RUN --mount=type=ssh`; without a socket, that of SSH_AUTH_SOCK
    #[arg(long = "ssh", value_name = "default|ID[=SOCKET]")]
    agents: Vec<String>,
    /// Another directory or image that FROM and --from can name
    #[arg(long = "build-context", value_name = "NAME=DIR|NAME=docker-image://REFERENCE")]
    contexts: Vec<String>,
    /// The stage to build, when it is not the last one
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// The platform of the image: this machine's is the only one
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Take nothing from earlier builds
    #[arg(long)]
    no_cache: bool,
    /// Ask the registries for newer images to build upon
    #[arg(long)]
    pull: bool,
    /// The network of RUN steps
    #[arg(long, value_enum, default_value_t, value_name = "NETWORK")]
    network: Network,
    /// Write the files to a directory or an archive, or the image to an archive, instead of keeping an image
    #[arg(short, long, value_name = "DIR|-|type=local|tar|docker|oci[,dest=PATH]")]
    output: Option<String>,
    /// A file for the image's id
    #[arg(long, value_name = "FILE")]
    iidfile: Option<PathBuf>,
    /// Print nothing but the image's id
    #[arg(short, long)]
    quiet: bool,
}

/// Arguments that are always there to be declared.
fn predefined() -> Variables {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let mut all = Variables::new();
    for side in ["TARGET", "BUILD"] {
        all.insert(format!("{side}PLATFORM"), format!("linux/{arch}"));
        all.insert(format!("{side}OS"), "linux".to_owned());
        all.insert(format!("{side}ARCH"), arch.to_owned());
        // Images for all machines of the architecture.
        all.insert(format!("{side}VARIANT"), String::new());
    }
    all
}

/// What a whole build shares.
struct Build<'a> {
    images: &'a ImageStore,
    file: Dockerfile,
    context: Tree,
    /// Others, by their names.
    contexts: BTreeMap<String, Named>,
    build_args: Variables,
    labels: Vec<(String, String)>,
    secrets: BTreeMap<String, Found>,
    /// Sockets of agents for ssh, by their names.
    agents: BTreeMap<String, PathBuf>,
    use_cache: bool,
    pull: bool,
    quiet: bool,
    sandbox: &'a mut Sandbox,
    credentials: fn(&str) -> Result<Auth>,
    /// What steps came to, to be remembered at the end.
    outcomes: &'a mut Vec<(String, Outcome)>,
    used_caches: bool,
    /// Every ARG that images below have asked for.
    inherited: Vec<Instruction>,
}

/// A stage as the file has it.
struct Plan {
    from: Instruction,
    base: String,
    name: Option<String>,
    steps: Vec<Instruction>,
}

/// Where in a build a step stands: all that it may look at.
struct Place<'a, 'b> {
    build: &'a mut Build<'b>,
    plans: &'a [Plan],
    /// Those before it that are built.
    stages: &'a BTreeMap<usize, Stage>,
    /// The variables before the first stage.
    global: &'a Variables,
    io: &'a mut Io,
    done: usize,
    total: usize,
}

impl Place<'_, '_> {
    fn say(&mut self, step: &Instruction, cached: bool) {
        self.build.say(self.io, self.done, self.total, &step.shown(), cached);
    }

    /// What `--from` names.
    async fn files_of(&mut self, from: &str) -> Result<Files> {
        match find(self.plans, from).map(|n| self.stages.get(&n)) {
            Some(Some(stage)) => Ok(Files::Draft(stage.draft.clone(), stage.key.clone())),
            // Only ONBUILD can ask for one that was not seen to be needed.
            Some(None) => bail!("the stage {from:?} is not built before this one"),
            None => {
                if let Some(Named::Dir(dir)) = self.build.contexts.get(&from.to_ascii_lowercase()) {
                    return Ok(Files::Dir(Tree::open(dir, Ignore::parse(&sources::ignore(dir, None)))?));
                }
                let draft = self.build.image(from, self.io).await?;
                let chain = draft.chain().to_owned();
                Ok(Files::Draft(draft, chain))
            }
        }
    }
}

/// Files that are not those of the context.
enum Files {
    /// Of a stage or an image, with a name for all that they depend on.
    Draft(Draft, String),
    Dir(Tree),
}

/// What a name stands for that the command line gives.
#[derive(Debug, Clone)]
enum Named {
    Dir(PathBuf),
    Image(String),
}

impl Named {
    fn parse(text: &str) -> Result<(String, Named)> {
        let Some((name, what)) = text.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            bail!("invalid build context {text:?}, expected name=value");
        };
        let named = match what.strip_prefix("docker-image://") {
            Some(image) => Named::Image(image.to_owned()),
            None if Path::new(what).is_dir() => Named::Dir(what.into()),
            None if what.contains("://") => bail!("build context {name}: {what} is not fetched"),
            None => bail!("build context {name}: path {what:?} not found"),
        };
        Ok((name.to_ascii_lowercase(), named))
    }
}

impl BuildArgs {
    pub async fn run(
        self,
        data: &DataDir,
        images: &ImageStore,
        credentials: fn(&str) -> Result<Auth>,
        io: &mut Io,
    ) -> Result<()> {
        let tags: Vec<String> =
            self.tags.iter().map(|tag| Ok(Reference::parse(tag)?.to_string())).collect::<Result<_>>()?;
        if let Some(tag) = tags.iter().find(|tag| tag.contains('@')) {
            bail!("{tag}: an image is tagged by a name, not by a digest");
        }
        if let Some(platform) = self.platform.as_deref().filter(|platform| !is_own_platform(platform)) {
            bail!("--platform {platform}: {}", other_platform());
        }
        let output = self.output.as_deref().map(Output::parse).transpose()?;
        if output.as_ref().is_some_and(Output::is_for_a_terminal) {
            bail!("an archive is nothing for a terminal: use --output with dest=FILE, or a pipe");
        }
        clear_leftovers(data, images).await.context("clear what an earlier build left")?;
        let _hold = images.hold()?;
        let mut sandbox = Sandbox::new(data, images, self.network)?;
        let mut outcomes = Vec::new();
        let work = async {
            let draft = self.build(images, &mut sandbox, &mut outcomes, credentials, io).await?;
            let keeps = output.as_ref().is_none_or(Output::wants_image);
            let id = keeps.then(|| images.finish(&draft, &tags)).transpose()?;
            if let Some(output) = &output {
                let names = if tags.is_empty() { id.iter().cloned().collect() } else { tags.clone() };
                output.write(images, &draft, &names, &sandbox).await?;
            }
            Ok(id)
        };
        let built = tokio::select! {
            built = work => built,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        // Remembered together with the image: both keep the layers.
        let remembered = images.remember(outcomes);
        let closed = sandbox.close().await.context("clean up after the build");
        let id = built?;
        remembered?;
        closed?;
        // What is written elsewhere may be on its way through standard output.
        let Some(id) = id.filter(|_| output.is_none()) else { return Ok(()) };
        if let Some(path) = &self.iidfile {
            std::fs::write(path, &id).with_context(|| format!("write {}", path.display()))?;
        }
        if self.quiet {
            return io.say(id);
        }
        io.say(format!("Built {id}"))?;
        tags.iter().try_for_each(|tag| io.say(format!("Tagged {tag}")))
    }

    async fn build(
        &self,
        images: &ImageStore,
        sandbox: &mut Sandbox,
        outcomes: &mut Vec<(String, Outcome)>,
        credentials: fn(&str) -> Result<Auth>,
        io: &mut Io,
    ) -> Result<Draft> {
        let Sources { context, ignore, shown, text } =
            Sources::find(&self.context, self.file.as_deref(), sandbox).await?;
        let file = dockerfile::parse(&text).with_context(|| shown.clone())?;
        if let Some(image) = file.syntax.as_deref().filter(|image| !image.contains("docker/dockerfile")) {
            io.note(format!("# syntax={image} is not heeded: the file is read as Docker's own are"));
        }
        let mut build_args = Variables::new();
        for arg in &self.build_args {
            match arg.split_once('=') {
                Some((name, value)) => drop(build_args.insert(name.to_owned(), value.to_owned())),
                None => build_args.extend(std::env::var(arg).ok().map(|value| (arg.clone(), value))),
            }
        }
        let pair = |label: &String| match label.split_once('=') {
            Some(("", _)) => bail!("--label {label}: names can not be blank"),
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Ok((label.clone(), String::new())),
        };
        let collect = |list: &[String], read: fn(&str) -> Result<(String, Found), String>| {
            list.iter().map(|text| read(text).map_err(anyhow::Error::msg)).collect::<Result<_>>()
        };
        let agents = self.agents.iter().map(|text| mounts::ssh(text).map_err(anyhow::Error::msg));
        let mut build = Build {
            images,
            file,
            context: Tree::open(&context, Ignore::parse(&ignore))?,
            contexts: self.contexts.iter().map(|text| Named::parse(text)).collect::<Result<_>>()?,
            build_args,
            labels: self.labels.iter().map(pair).collect::<Result<_>>()?,
            secrets: collect(&self.secrets, mounts::secret)?,
            agents: agents.collect::<Result<_>>()?,
            use_cache: !self.no_cache,
            pull: self.pull,
            quiet: self.quiet,
            sandbox,
            credentials,
            outcomes,
            used_caches: false,
            inherited: Vec::new(),
        };
        let draft = build.build(self.target.as_deref(), io).await;
        for name in build.unused() {
            io.note(format!("The build argument {name} is declared by no ARG"));
        }
        if build.used_caches {
            images.prune_caches(CACHES_MAX)?;
        }
        draft.with_context(|| shown)
    }
}

impl Build<'_> {
    async fn build(&mut self, target: Option<&str>, io: &mut Io) -> Result<Draft> {
        let (global, plans) = self.plan()?;
        let wanted = match target {
            None => plans.len() - 1,
            Some(name) => find(&plans, name).with_context(|| format!("there is no stage {name:?}"))?,
        };
        let needed = needed(&plans, wanted, &global, self.file.escape)?;
        let mut total: usize = needed.iter().map(|n| plans[*n].steps.len() + 1).sum();
        let (mut done, mut stages) = (0, BTreeMap::new());
        for n in needed {
            let plan = &plans[n];
            done += 1;
            self.say(io, done, total, &plan.from.shown(), false);
            let at = |i: &Instruction| format!("line {}: {}", i.line, i.shown());
            let mut stage = self.begin(plan, n, &plans, &stages, io).await.with_context(|| at(&plan.from))?;
            let triggers = stage.triggers().with_context(|| at(&plan.from))?;
            total += triggers.len();
            self.inherited.extend(triggers.iter().filter(|step| step.name == "ARG").cloned());
            // They are done as if they stood below FROM.
            let triggers = triggers.into_iter().map(|step| Instruction { line: plan.from.line, ..step });
            for step in triggers.chain(plan.steps.iter().cloned()) {
                done += 1;
                let (plans, stages, global) = (&plans, &stages, &global);
                let mut place = Place { build: self, plans, stages, global, io, done, total };
                stage.step(&mut place, &step).await.with_context(|| at(&step))?;
            }
            stages.insert(n, stage);
        }
        let mut stage = stages.remove(&wanted).context("the stage was not built")?;
        stage.label(&self.labels);
        Ok(stage.finish())
    }

    fn say(&self, io: &mut Io, done: usize, total: usize, what: &str, cached: bool) {
        if !self.quiet {
            io.note(format!("[{done}/{total}] {what}{}", if cached { "  (cached)" } else { "" }));
        }
    }

    /// Arguments that were given and that nothing asks for: most often misspelt.
    fn unused(&self) -> Vec<String> {
        let escape = self.file.escape;
        let args = self.file.instructions.iter().filter(|step| step.name == "ARG").chain(&self.inherited);
        // Values do not matter here, only names; what cannot be read is told when its turn comes.
        let declared: Vec<String> = args
            .filter_map(|step| stage::declared(step, escape, Variables::new(), |_, default| default).ok())
            .flatten()
            .map(|(name, _)| name)
            .collect();
        let given = self.build_args.keys();
        given.filter(|name| !declared.contains(name) && !is_proxy(name)).cloned().collect()
    }

    /// The variables before the first stage, and the stages.
    fn plan(&self) -> Result<(Variables, Vec<Plan>)> {
        let escape = self.file.escape;
        let mut global = Variables::new();
        let mut plans: Vec<Plan> = Vec::new();
        for instruction in &self.file.instructions {
            let wrong = |why: String| anyhow::anyhow!("line {}: {why}", instruction.line);
            match (instruction.name.as_str(), plans.last_mut()) {
                ("FROM", _) => {
                    let variables = with_predefined(&global);
                    let Arguments::Text(text) = &instruction.arguments else {
                        return Err(wrong("FROM takes no list".into()));
                    };
                    let words = words::words(text, escape, &variables).map_err(wrong)?;
                    let (base, name) = match &words[..] {
                        [base] => (base.clone(), None),
                        [base, r#as, name] if r#as.eq_ignore_ascii_case("as") => {
                            (base.clone(), Some(stage_name(name).map_err(wrong)?))
                        }
                        _ => return Err(wrong("FROM requires either one or three arguments".into())),
                    };
                    if base.is_empty() {
                        return Err(wrong("base name should not be blank".into()));
                    }
                    if let Some(platform) = instruction.flag("platform") {
                        let platform = words::expand_all(platform, escape, &variables).map_err(wrong)?;
                        if !is_own_platform(&platform) {
                            return Err(wrong(format!("--platform={platform}: {}", other_platform())));
                        }
                    }
                    plans.push(Plan { from: instruction.clone(), base, name, steps: Vec::new() });
                }
                (_, Some(plan)) => plan.steps.push(instruction.clone()),
                (_, None) => {
                    let given = |name: &str, default| self.build_args.get(name).cloned().or(default);
                    let declared = stage::declared(instruction, escape, with_predefined(&global), given);
                    let declared = declared.map_err(wrong)?.into_iter();
                    global.extend(declared.filter_map(|(name, value)| Some((name, value?))));
                }
            }
        }
        Ok((global, plans))
    }

    /// The first step of a stage: what it is built upon.
    async fn begin(
        &mut self,
        plan: &Plan,
        number: usize,
        plans: &[Plan],
        stages: &BTreeMap<usize, Stage>,
        io: &mut Io,
    ) -> Result<Stage> {
        // A name of the command line stands before all others.
        let base = match self.contexts.get(&plan.base.to_ascii_lowercase()) {
            Some(Named::Image(image)) => image.clone(),
            Some(Named::Dir(dir)) => {
                bail!("{} is a directory, on which no image can be built", dir.display())
            }
            None => plan.base.clone(),
        };
        if base == "scratch" {
            return Ok(Stage::scratch());
        }
        if let Some(stage) = find(&plans[..number], &base).and_then(|n| stages.get(&n)) {
            return Ok(stage.again());
        }
        self.image(&base, io).await.map(Stage::upon)
    }

    /// An image, fetched when it is not here.
    async fn image(&mut self, reference: &str, io: &mut Io) -> Result<Draft> {
        let named = self.contexts.get(&reference.to_ascii_lowercase()).cloned();
        let reference = match &named {
            Some(Named::Image(image)) => image.as_str(),
            _ => reference,
        };
        let known = self.images.resolve(reference).await?.is_some();
        if !known || self.pull {
            if !self.quiet {
                io.note(format!("Pulling {reference}"));
            }
            self.images.pull(reference, (self.credentials)(reference)?, None).await?;
            self.images.keep(reference).await?;
        }
        Ok(self.images.draft_of(reference)?)
    }
}

fn with_predefined(variables: &Variables) -> Variables {
    let mut all = predefined();
    all.extend(variables.clone());
    all
}

/// Arguments that RUN steps get without an ARG, and that make no difference to what is cached.
fn is_proxy(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy"].contains(&name.as_str())
}

/// Whether images for a platform run here: `linux/amd64`, with a variant or without, or only the architecture.
fn is_own_platform(platform: &str) -> bool {
    let own = predefined();
    let platform = platform.to_ascii_lowercase();
    let mut parts = platform.split('/');
    match (parts.next(), parts.next()) {
        (Some("local"), None) => true,
        (Some(one), None) => one == "linux" || one == own["TARGETARCH"],
        (Some(os), Some(arch)) => os == "linux" && arch == own["TARGETARCH"],
        _ => false,
    }
}

fn other_platform() -> String {
    format!("only images for {} can be built here", predefined()["TARGETPLATFORM"])
}

fn stage_name(name: &str) -> Result<String, String> {
    let lower = name.to_ascii_lowercase();
    let good = lower.starts_with(|c: char| c.is_ascii_lowercase())
        && lower.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    match good {
        true => Ok(lower),
        false => Err(format!(
            "invalid name for build stage: {name:?}, name can't start with a number or contain symbols"
        )),
    }
}

/// A stage by its name or number.
fn find(plans: &[Plan], name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    let by_name = plans.iter().rposition(|plan| plan.name.as_deref() == Some(&name));
    by_name.or_else(|| name.parse().ok().filter(|n| *n < plans.len()))
}

/// The stages that `wanted` needs, in the file's order, with itself the last.
fn needed(plans: &[Plan], wanted: usize, global: &Variables, escape: char) -> Result<Vec<usize>> {
    let mut needed = std::collections::BTreeSet::from([wanted]);
    for n in (0..=wanted).rev() {
        if !needed.contains(&n) {
            continue;
        }
        let before = &plans[..n];
        // A name that is a stage's own number would be itself; only those before count.
        needed
            .extend(plans[n].base.parse::<usize>().is_err().then(|| find(before, &plans[n].base)).flatten());
        for step in &plans[n].steps {
            if let Some(from) = step.flag("from") {
                let from = words::expand_all(from, escape, global).map_err(anyhow::Error::msg)?;
                needed.extend(find(before, &from));
            }
            for mount in step.flags("mount") {
                // What is wrong with it is told when its turn comes.
                if let Ok(from) = mounts::from(mount) {
                    needed.extend(from.and_then(|from| find(before, &from)));
                }
            }
        }
    }
    Ok(needed.into_iter().collect())
}

/// A Dockerfile and a `.dockerignore` as somebody has written them; for fuzzing.
pub fn fuzz(text: &str) {
    if let Ok(file) = dockerfile::parse(text) {
        let variables = with_predefined(&Variables::from([("A".to_owned(), "1 2".to_owned())]));
        for instruction in &file.instructions {
            for heredoc in &instruction.heredocs {
                let _ = heredoc.content(file.escape, &variables);
            }
            for mount in instruction.flags("mount") {
                let _ = mounts::parse(mount, |text| words::expand_all(text, file.escape, &variables));
            }
            for mode in instruction.flags("chmod") {
                let _ = chmod::Chmod::parse(mode).map(|mode| mode.apply(0o644, false));
            }
            if let Arguments::Text(text) = &instruction.arguments {
                let _ = words::words(text, file.escape, &variables);
                let _ = words::expand_all(text, file.escape, &variables);
                let _ = words::pairs(text, file.escape, &variables);
                if instruction.name == "ONBUILD" {
                    let _ = dockerfile::trigger(text);
                }
            }
        }
        assert!(file.instructions.iter().all(|i| !i.shown().contains('\n')), "one line each");
    }
    let ignore = Ignore::parse(text);
    let _ = ignore.ignores(&["a", "b", "c.log"]);
}
