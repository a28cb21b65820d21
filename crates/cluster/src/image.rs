//! `minke image`: the images of the node. They work on the store itself, which takes several processes at once, so
//! they do whether the cluster is up or not.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use minke_runtime::{Auth, Image, ImageService, ImageStore, Progress, ProgressEvent, RegistryConfig};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::data_dir::DataDir;
use crate::io::Io;

/// The images of the node.
#[derive(Debug, Args)]
pub struct ImageArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Build(Box<crate::build::BuildArgs>),
    /// Load images from archives of `docker save` or OCI tools
    Load {
        /// The archives; `-` is standard input
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// The name of an image that has none in its archive
        #[arg(long, value_name = "REFERENCE")]
        name: Option<String>,
    },
    /// Fetch images from their registries
    Pull {
        #[arg(required = true, value_name = "REFERENCE")]
        references: Vec<String>,
        #[command(flatten)]
        login: LoginArgs,
    },
    /// Show all that is known of images
    Inspect {
        #[arg(required = true, value_name = "REFERENCE")]
        references: Vec<String>,
    },
    /// List the images
    #[command(visible_alias = "list")]
    Ls {
        /// How to print them
        #[arg(short, long, value_enum, value_name = "FORMAT")]
        output: Option<crate::status::Format>,
        /// Only their ids
        #[arg(short, long)]
        quiet: bool,
    },
    /// Remove images without a name that no container uses, and what is kept for later builds
    Prune {
        /// Images with a name as well, when no container uses them
        #[arg(short, long)]
        all: bool,
    },
    /// Remove names of images, and images by their id or last name
    Rm {
        #[arg(required = true, value_name = "REFERENCE")]
        references: Vec<String>,
    },
    /// Write images to an archive that docker and OCI tools can load
    Save {
        #[arg(required = true, value_name = "REFERENCE")]
        references: Vec<String>,
        /// The archive; standard output when not given
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Give an image another name
    Tag {
        source: String,
        target: String,
    },
    /// Send an image to the registry in its name
    Push {
        #[arg(value_name = "REFERENCE")]
        reference: String,
        #[command(flatten)]
        login: LoginArgs,
    },
}

/// Who we are to a registry.
#[derive(Debug, Args)]
struct LoginArgs {
    /// User and password for the registry; else what `docker login` has kept in ~/.docker/config.json
    #[arg(long, value_name = "USER:PASSWORD", env = "MINKE_REGISTRY_CREDS", hide_env_values = true)]
    creds: Option<String>,
}

impl LoginArgs {
    fn auth(&self, reference: &str) -> Result<Auth> {
        let Some(creds) = &self.creds else { return credentials(reference) };
        let (username, password) = creds.split_once(':').context("--creds takes USER:PASSWORD")?;
        Ok(Auth::Basic { username: username.to_owned(), password: password.to_owned() })
    }
}

impl ImageArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        crate::up::require_root(data)?;
        // Only what brings images makes a place for them.
        if !data.join("images").is_dir() {
            match &self.command {
                Command::Build(_) | Command::Load { .. } | Command::Pull { .. } => data.create()?,
                Command::Ls { output, quiet } => return list(vec![], *output, *quiet, io),
                Command::Prune { .. } => return io.say("Freed 0 B"),
                Command::Rm { references: of }
                | Command::Save { references: of, .. }
                | Command::Inspect { references: of } => return Err(missing(&of[0])),
                Command::Tag { source: of, .. } | Command::Push { reference: of, .. } => {
                    return Err(missing(of));
                }
            }
        }
        let store = ImageStore::open(data.path(), RegistryConfig::in_dir(&data.join("registries")))?;
        // Transfers are spread over a few threads by the store; this one only waits for them.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let builds = matches!(self.command, Command::Build(_));
        let outcome = runtime.block_on(async {
            tokio::select! {
                outcome = self.command.run(data, &store, io) => outcome,
                // A build has more to clean up.
                _ = tokio::signal::ctrl_c(), if !builds => Err(anyhow!("interrupted")),
            }
        });
        // What was interrupted may be in the midst of a file, which nobody waits for.
        runtime.shutdown_background();
        outcome
    }
}

impl Command {
    async fn run(self, data: &DataDir, store: &ImageStore, io: &mut Io) -> Result<()> {
        match self {
            Command::Build(build) => build.run(data, store, credentials, io).await?,
            Command::Load { files, name } => {
                for file in files {
                    let what = file.display().to_string();
                    let archive: Box<dyn Read + Send> = match what.as_str() {
                        "-" => Box::new(std::io::stdin()),
                        _ => Box::new(File::open(&file).with_context(|| format!("read {what}"))?),
                    };
                    let meter = Meter::new(io, &format!("Loading {what}"));
                    let loaded = store.load(archive, name.as_deref(), Some(meter.progress())).await;
                    meter.clear(io);
                    for name in loaded.with_context(|| format!("load {what}"))? {
                        io.say(format!("Loaded {name}"))?;
                    }
                }
            }
            Command::Pull { references, login } => {
                for reference in references {
                    let auth = login.auth(&reference)?;
                    let meter = Meter::new(io, &format!("Pulling {reference}"));
                    let image = store.pull(&reference, auth, Some(meter.progress())).await;
                    meter.clear(io);
                    let image = image.with_context(|| format!("pull {reference}"))?;
                    store.keep(&reference).await?;
                    io.say(format!("Pulled {reference}: {}", image.id))?;
                }
            }
            Command::Inspect { references } => {
                let mut all = Vec::new();
                for reference in references {
                    let image = store.resolve(&reference).await?.ok_or_else(|| missing(&reference))?;
                    all.push(inspect(&image, &store.draft_of(&image.id)?.config));
                }
                io.say(serde_json::to_string_pretty(&all)?)?;
            }
            Command::Prune { all } => {
                let before = store.disk_usage().await?;
                for id in store.prune(all).await? {
                    io.say(format!("Removed {id}"))?;
                }
                let freed = before.saturating_sub(store.disk_usage().await?);
                io.say(format!("Freed {}", size(freed)))?;
            }
            Command::Ls { output, quiet } => list(store.list().await?, output, quiet, io)?,
            Command::Rm { references } => {
                let mut failed = vec![];
                for reference in references {
                    match remove(store, &reference).await {
                        Ok(()) => io.say(format!("Removed {reference}"))?,
                        Err(error) => failed.push(format!("{error:#}")),
                    }
                }
                if !failed.is_empty() {
                    bail!("{}", failed.join("; "));
                }
            }
            Command::Save { references, output } => {
                for reference in &references {
                    known(store, reference).await?;
                }
                match output {
                    Some(path) => save(store, &references, &path).await?,
                    None if std::io::stdout().is_terminal() => {
                        bail!("an archive is nothing for a terminal: use --output FILE or a pipe");
                    }
                    None => store.save(&references, std::io::stdout()).await?,
                }
            }
            Command::Tag { source, target } => {
                known(store, &source).await?;
                store.tag(&source, &target).await?;
            }
            Command::Push { reference, login } => {
                known(store, &reference).await?;
                let auth = login.auth(&reference)?;
                let meter = Meter::new(io, &format!("Pushing {reference}"));
                let pushed = store.push(&reference, auth, Some(meter.progress())).await;
                meter.clear(io);
                pushed.with_context(|| format!("push {reference}"))?;
                io.say(format!("Pushed {reference}"))?;
            }
        }
        Ok(())
    }
}

fn missing(reference: &str) -> anyhow::Error {
    anyhow!("there is no image {reference}")
}

async fn known(store: &ImageStore, reference: &str) -> Result<()> {
    store.resolve(reference).await?.map(drop).ok_or_else(|| missing(reference))
}

async fn remove(store: &ImageStore, reference: &str) -> Result<()> {
    known(store, reference).await?;
    store.remove(reference).await.with_context(|| format!("remove {reference}"))
}

fn list(
    mut images: Vec<Image>,
    output: Option<crate::status::Format>,
    quiet: bool,
    io: &mut Io,
) -> Result<()> {
    images.sort_by(|a, b| (&a.tags, &a.digests).cmp(&(&b.tags, &b.digests)));
    match output {
        _ if quiet => images.iter().try_for_each(|image| io.say(&image.id)),
        Some(format) => {
            let images: Vec<Value> = images.iter().map(describe).collect();
            io.say(format.print(&Value::from(images))?)
        }
        None => io.say(table(&images, Timestamp::now())),
    }
}

/// A file appears only when it is whole.
async fn save(store: &ImageStore, references: &[String], path: &Path) -> Result<()> {
    let mut name = path.file_name().context("the archive needs a name")?.to_owned();
    name.push(".partial");
    let temporary = path.with_file_name(name);
    let file = File::create(&temporary).with_context(|| format!("write {}", temporary.display()))?;
    let partial = Partial(temporary);
    store.save(references, file).await.with_context(|| format!("write {}", path.display()))?;
    std::fs::rename(&partial.0, path).with_context(|| format!("write {}", path.display()))
}

/// A file that goes, however its writing ends, unless it has got another name.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// As `docker image inspect` has it; `config` is the image's own document.
fn inspect(image: &Image, config: &Value) -> Value {
    json!({
        "Id": image.id,
        "RepoTags": image.tags,
        "RepoDigests": image.digests,
        "Created": config["created"],
        "Author": config["author"],
        "Architecture": config["architecture"],
        "Os": config["os"],
        "Size": image.size,
        "Pinned": image.pinned,
        "Config": config["config"],
        "RootFS": { "Type": "layers", "Layers": config["rootfs"]["diff_ids"] },
        "History": config["history"],
    })
}

fn describe(image: &Image) -> Value {
    json!({
        "id": image.id, "tags": image.tags, "digests": image.digests, "size": image.size,
        "created": image.created.map(|time| time.to_string()),
    })
}

fn table(images: &[Image], now: Timestamp) -> String {
    let mut rows = vec![["IMAGE".to_owned(), "ID".to_owned(), "CREATED".to_owned(), "SIZE".to_owned()]];
    for image in images {
        let names = if image.tags.is_empty() {
            &image.digests[..image.digests.len().min(1)]
        } else {
            &image.tags[..]
        };
        let names = if names.is_empty() { &["<none>".to_owned()][..] } else { names };
        for name in names {
            let id = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
            rows.push([
                name.clone(),
                id[..id.len().min(12)].to_owned(),
                image.created.map_or_else(|| "-".to_owned(), |time| age(now, time)),
                size(image.size),
            ]);
        }
    }
    let widths: Vec<usize> =
        (0..4).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("   ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn age(now: Timestamp, then: Timestamp) -> String {
    // Images that are built to be the same every time carry the beginning of time.
    if then.as_second() <= 0 {
        return "-".to_owned();
    }
    let seconds = now.as_second().saturating_sub(then.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1000)];
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// Shows how far a transfer is: on a terminal in one line, elsewhere a line when it takes long.
struct Meter {
    state: Arc<Mutex<MeterState>>,
}

struct MeterState {
    what: String,
    terminal: bool,
    done: u64,
    total: u64,
    shown: Instant,
    said: bool,
}

impl Meter {
    fn new(io: &Io, what: &str) -> Meter {
        let state = MeterState {
            what: what.to_owned(),
            terminal: io.err_is_terminal,
            done: 0,
            total: 0,
            shown: Instant::now(),
            said: false,
        };
        Meter { state: Arc::new(Mutex::new(state)) }
    }

    fn progress(&self) -> Progress {
        let state = self.state.clone();
        Arc::new(move |event| state.lock().expect("showing progress does not panic").note(&event))
    }

    fn clear(&self, io: &mut Io) {
        if self.state.lock().expect("showing progress does not panic").said {
            io.flash("");
        }
    }
}

impl MeterState {
    fn note(&mut self, event: &ProgressEvent) {
        let text = match event {
            ProgressEvent::Total { bytes } => {
                self.total = *bytes;
                return;
            }
            ProgressEvent::Transferred { bytes } => {
                self.done += bytes;
                match self.total {
                    0 => format!("{}: {}", self.what, size(self.done)),
                    total => format!("{}: {} of {}", self.what, size(self.done), size(total)),
                }
            }
            ProgressEvent::Unpacking { layer, layers } => {
                format!("{}: unpacking layer {layer} of {layers}", self.what)
            }
        };
        let pause =
            if self.said && self.terminal { Duration::from_millis(100) } else { Duration::from_secs(1) };
        if self.shown.elapsed() < pause || (self.said && !self.terminal) {
            return;
        }
        (self.shown, self.said) = (Instant::now(), true);
        // The transfer does not depend on anyone looking at it.
        let _ = match self.terminal {
            true => write!(std::io::stderr(), "\r\x1b[K{text}"),
            false => writeln!(std::io::stderr(), "{} ...", self.what),
        };
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
}

/// What `docker login` kept for the registry of `reference`; helpers of other programs are not asked.
fn credentials(reference: &str) -> Result<Auth> {
    let dir = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let dir = dir.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".docker")));
    let Some(text) = dir.and_then(|dir| std::fs::read(dir.join("config.json")).ok()) else {
        return Ok(Auth::Anonymous);
    };
    let config: DockerConfig = serde_json::from_slice(&text).context("read docker's config.json")?;
    find_credentials(&config, reference)
}

fn find_credentials(config: &DockerConfig, reference: &str) -> Result<Auth> {
    let first = reference.split('/').next().unwrap_or_default();
    let is_registry = reference.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let registry = if is_registry { first } else { "docker.io" };
    let names = match registry {
        "docker.io" => vec!["https://index.docker.io/v1/".to_owned(), "docker.io".to_owned()],
        other => vec![other.to_owned(), format!("https://{other}"), format!("http://{other}")],
    };
    let Some(auth) = names.iter().find_map(|name| config.auths.get(name)?.auth.as_deref()) else {
        return Ok(Auth::Anonymous);
    };
    let plain = BASE64_STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let plain = plain.with_context(|| format!("docker's credentials for {registry} cannot be read"))?;
    let (username, password) = plain.split_once(':').context("credentials without a password")?;
    Ok(Auth::Basic { username: username.to_owned(), password: password.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_listed_by_every_name() {
        let image = |tags: &[&str], created: i64| Image {
            id: format!("sha256:{}", "ab".repeat(32)),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            size: 1_600_000,
            created: Timestamp::from_second(created).ok(),
            ..Image::default()
        };
        let now = Timestamp::from_second(1_000_000).unwrap();
        let text = table(&[image(&["a:1", "b:2"], 1_000_000 - 7200), image(&[], 0)], now);
        assert_eq!(
            text,
            "IMAGE    ID             CREATED   SIZE\n\
             a:1      abababababab   2h        1.6 MB\n\
             b:2      abababababab   2h        1.6 MB\n\
             <none>   abababababab   -         1.6 MB"
        );
    }

    #[test]
    fn credentials_belong_to_a_registry() {
        let config = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": BASE64_STANDARD.encode("hub:secret")},
            "localhost:5000": {"auth": BASE64_STANDARD.encode("me:a:b")},
            "broken.example": {"auth": "%%"},
        }});
        let config: DockerConfig = serde_json::from_value(config).unwrap();
        let basic = |username: &str, password: &str| Auth::Basic {
            username: username.into(),
            password: password.into(),
        };
        for (reference, want) in [
            ("nginx", basic("hub", "secret")),
            ("library/nginx:1", basic("hub", "secret")),
            ("localhost:5000/a/b:1", basic("me", "a:b")),
            ("quay.io/a/b", Auth::Anonymous),
        ] {
            assert_eq!(find_credentials(&config, reference).unwrap(), want, "{reference}");
        }
        assert!(find_credentials(&config, "broken.example/a").is_err());
    }
}
