//! `minke image build`: an image from a Dockerfile.
//!
//! A stage is a draft to which steps add layers. Each step has a key made of the one before it and all that it depends on, and
//! what a step came to is remembered by it, so a build that has nothing new to do does nothing. `RUN` steps run in a
//! sandbox of the build's own: see [`sandbox`].

mod dockerfile;
mod ignore;
mod sandbox;
mod stage;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use minke_runtime::{Auth, ImageService, ImageStore, Reference};

use self::dockerfile::{Arguments, Dockerfile, Instruction, Variables};
use self::ignore::Ignore;
pub use self::sandbox::clear_leftovers;
use self::sandbox::{Network, Sandbox};
use self::stage::Stage;
use self::tree::Tree;
use crate::data_dir::DataDir;
use crate::io::Io;

/// Build an image from a Dockerfile.
///
/// Known are FROM (an image, scratch or a stage), COPY, ADD (files, local archives and URLs), RUN, ENV, ARG, WORKDIR, USER,
/// CMD, ENTRYPOINT, EXPOSE, LABEL, VOLUME, SHELL, STOPSIGNAL, HEALTHCHECK and MAINTAINER.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The directory whose files can be copied into the image
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
    /// The stage to build, when it is not the last one
    #[arg(long, value_name = "STAGE")]
    target: Option<String>,
    /// Take nothing from earlier builds
    #[arg(long)]
    no_cache: bool,
    /// The network of RUN steps
    #[arg(long, value_enum, default_value_t, value_name = "NETWORK")]
    network: Network,
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
    }
    all
}

/// One byte more than a Dockerfile may have is read, for the parser to see that it is too long.
fn read(file: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    file.take(dockerfile::FILE_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// What a whole build shares.
struct Build<'a> {
    images: &'a ImageStore,
    file: Dockerfile,
    context: Tree,
    build_args: Variables,
    use_cache: bool,
    quiet: bool,
    sandbox: Sandbox,
    credentials: fn(&str) -> Result<Auth>,
    /// What steps came to, to be remembered at the end.
    outcomes: Vec<(String, minke_runtime::build::Outcome)>,
}

/// A stage as the file has it.
struct Plan {
    from: Instruction,
    base: String,
    name: Option<String>,
    steps: Vec<Instruction>,
}

impl BuildArgs {
    pub async fn run(
        self,
        data: &DataDir,
        images: &ImageStore,
        credentials: fn(&str) -> Result<Auth>,
        io: &mut Io,
    ) -> Result<()> {
        let path = self.file.clone().unwrap_or_else(|| self.context.join("Dockerfile"));
        let piped = path.as_os_str() == "-";
        let shown = if piped { "Dockerfile".to_owned() } else { path.display().to_string() };
        let text = if piped { read(std::io::stdin()) } else { fs::File::open(&path).and_then(read) };
        let text = text.with_context(|| format!("read {shown}"))?;
        let file = dockerfile::parse(&text).with_context(|| shown.clone())?;
        let tags: Vec<String> =
            self.tags.iter().map(|tag| Ok(Reference::parse(tag)?.to_string())).collect::<Result<_>>()?;
        if let Some(tag) = tags.iter().find(|tag| tag.contains('@')) {
            bail!("{tag}: an image is tagged by a name, not by a digest");
        }
        // Docker looks for one beside the Dockerfile first.
        let mut beside = path.clone().into_os_string();
        beside.push(".dockerignore");
        let ignore =
            fs::read_to_string(&beside).or_else(|_| fs::read_to_string(self.context.join(".dockerignore")));
        let context = Tree::open(&self.context, Ignore::parse(&ignore.unwrap_or_default()))?;
        let mut build_args = Variables::new();
        for arg in &self.build_args {
            match arg.split_once('=') {
                Some((name, value)) => drop(build_args.insert(name.to_owned(), value.to_owned())),
                None => build_args.extend(std::env::var(arg).ok().map(|value| (arg.clone(), value))),
            }
        }
        clear_leftovers(data, images).await.context("clear what an earlier build left")?;
        let _hold = images.hold()?;
        let sandbox = Sandbox::new(data, images, self.network)?;
        let mut build = Build {
            images,
            file,
            context,
            build_args,
            use_cache: !self.no_cache,
            quiet: self.quiet,
            sandbox,
            credentials,
            outcomes: Vec::new(),
        };
        let built = tokio::select! {
            built = build.build(self.target.as_deref(), io) => built,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        let finished = built.with_context(|| shown).and_then(|draft| {
            // Remembered together with the image: both keep the layers.
            Ok(images.finish(&draft, &tags)?)
        });
        let remembered = images.remember(std::mem::take(&mut build.outcomes));
        let closed = build.sandbox.close().await.context("clean up after the build");
        let id = finished?;
        remembered?;
        closed?;
        if self.quiet {
            return io.say(id);
        }
        io.say(format!("Built {id}"))?;
        tags.iter().try_for_each(|tag| io.say(format!("Tagged {tag}")))
    }
}

impl Build<'_> {
    async fn build(&mut self, target: Option<&str>, io: &mut Io) -> Result<minke_runtime::build::Draft> {
        let (global, plans) = self.plan()?;
        for name in self.unused() {
            io.note(format!("The build argument {name} is declared by no ARG"));
        }
        let wanted = match target {
            None => plans.len() - 1,
            Some(name) => find(&plans, name).with_context(|| format!("there is no stage {name:?}"))?,
        };
        let needed = needed(&plans, wanted, &global, self.file.escape)?;
        let total: usize = needed.iter().map(|n| plans[*n].steps.len() + 1).sum();
        let (mut done, mut stages) = (0, BTreeMap::new());
        for n in needed {
            let plan = &plans[n];
            done += 1;
            self.say(io, done, total, &plan.from.shown(), false);
            let at = |i: &Instruction| format!("line {}: {}", i.line, i.shown());
            let mut stage = self.begin(plan, n, &plans, &stages, io).await.with_context(|| at(&plan.from))?;
            for step in &plan.steps {
                done += 1;
                let outcome = stage.step(self, step, &global, &plans, &stages, io, (done, total)).await;
                outcome.with_context(|| at(step))?;
            }
            stages.insert(n, stage);
        }
        let stage = stages.remove(&wanted).context("the stage was not built")?;
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
        let args = self.file.instructions.iter().filter(|step| step.name == "ARG");
        // Values do not matter here, only names; what cannot be read is told when its turn comes.
        let declared: Vec<String> = args
            .filter_map(|step| stage::declared(step, escape, &Variables::new()).ok())
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
                    let words = dockerfile::words(text, escape, &variables).map_err(wrong)?;
                    let (base, name) = match &words[..] {
                        [base] => (base.clone(), None),
                        [base, r#as, name] if r#as.eq_ignore_ascii_case("as") => {
                            (base.clone(), Some(name.to_ascii_lowercase()))
                        }
                        _ => return Err(wrong("FROM requires either one or three arguments".into())),
                    };
                    if base.is_empty() {
                        return Err(wrong("base name should not be blank".into()));
                    }
                    if let Some(platform) = instruction.flag("platform") {
                        let platform = dockerfile::expand_all(platform, escape, &variables).map_err(wrong)?;
                        if platform != variables["TARGETPLATFORM"] {
                            return Err(wrong(format!("images for {platform} cannot be built here")));
                        }
                    }
                    plans.push(Plan { from: instruction.clone(), base, name, steps: Vec::new() });
                }
                (_, Some(plan)) => plan.steps.push(instruction.clone()),
                (_, None) => {
                    for (name, value) in stage::declared(instruction, escape, &global).map_err(wrong)? {
                        let value = self.build_args.get(&name).cloned().or(value);
                        global.extend(value.map(|value| (name, value)));
                    }
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
        if plan.base == "scratch" {
            return Ok(Stage::scratch());
        }
        if let Some(stage) = find(&plans[..number], &plan.base).and_then(|n| stages.get(&n)) {
            return Ok(stage.again());
        }
        self.image(&plan.base, io).await.map(Stage::upon)
    }

    /// An image, fetched when it is not here.
    async fn image(&mut self, reference: &str, io: &mut Io) -> Result<minke_runtime::build::Draft> {
        if self.images.resolve(reference).await?.is_none() {
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
                let from = dockerfile::expand_all(from, escape, global).map_err(anyhow::Error::msg)?;
                needed.extend(find(before, &from));
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
            if let Arguments::Text(text) = &instruction.arguments {
                let _ = dockerfile::words(text, file.escape, &variables);
                let _ = dockerfile::expand_all(text, file.escape, &variables);
                let _ = dockerfile::pairs(text, file.escape, &variables);
            }
        }
        assert!(file.instructions.iter().all(|i| !i.shown().contains('\n')), "one line each");
    }
    let ignore = Ignore::parse(text);
    let _ = ignore.ignores(&["a", "b", "c.log"]);
}
