//! Where the files of a build and its Dockerfile come from: a directory, or standard input.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use minke_runtime::build::{is_archive, unpack_files};

use super::dockerfile::FILE_MAX;
use super::sandbox::Sandbox;

/// Bytes of standard input that tell an archive from a Dockerfile.
const HEAD: u64 = 16 << 10;

pub struct Sources {
    pub context: PathBuf,
    /// The text of the `.dockerignore`.
    pub ignore: String,
    /// The Dockerfile as messages call it, and its text.
    pub shown: String,
    pub text: String,
}

impl Sources {
    /// `file` is a path of its own beside a directory, and one in the archive when `context` is `-`.
    pub async fn find(context: &Path, file: Option<&Path>, sandbox: &Sandbox) -> Result<Sources> {
        let given = context.to_string_lossy();
        let piped_file = file.is_some_and(|file| file.as_os_str() == "-");
        if context.as_os_str() == "-" {
            if piped_file {
                bail!("invalid argument: can't use stdin for both build context and dockerfile");
            }
            return Sources::piped(file, sandbox).await;
        }
        if ["http://", "https://", "git@", "git://", "ssh://", "github.com/"]
            .iter()
            .any(|p| given.starts_with(p))
        {
            bail!(
                "unable to prepare context: {given} is not fetched: give a directory, or pipe an archive to `-`"
            );
        }
        if !context.is_dir() {
            bail!("unable to prepare context: path {given:?} not found");
        }
        if piped_file {
            let text = read(io::stdin()).context("failed to read dockerfile")?;
            return Ok(Sources {
                ignore: ignore(context, None),
                context: context.to_owned(),
                shown: usual(),
                text,
            });
        }
        let path = file.map_or_else(|| context.join(usual()), Path::to_owned);
        Sources::of(context, &path, path.display().to_string())
    }

    async fn piped(file: Option<&Path>, sandbox: &Sandbox) -> Result<Sources> {
        let context = sandbox.scratch()?;
        let mut head = Vec::new();
        io::stdin().take(HEAD).read_to_end(&mut head)?;
        if head.is_empty() {
            bail!("failed to read dockerfile: standard input is empty");
        }
        let archive = is_archive(&head).map_err(|kind| {
            anyhow::anyhow!("unable to prepare context: archives in {kind} are not unpacked; gzip, zstd and plain ones are")
        })?;
        let input = io::Cursor::new(head).chain(io::stdin());
        if !archive {
            if file.is_some() {
                bail!("unable to prepare context: standard input is no archive that --file could be in");
            }
            let text = read(input).context("failed to read dockerfile")?;
            return Ok(Sources { context, ignore: String::new(), shown: usual(), text });
        }
        let to = context.clone();
        let unpacked = tokio::task::spawn_blocking(move || unpack_files(input, &to)).await?;
        unpacked.context("unable to prepare context: unpack standard input")?;
        let name = file.map_or_else(usual, |file| file.display().to_string());
        // What is in it is its maker's: no link leads out.
        let tree = super::Tree::open(&context, super::Ignore::default())?;
        let text = tree.file(Path::new(&name)).and_then(|file| Ok(read(file)?));
        let text = text.with_context(|| format!("failed to read dockerfile: open {name}"))?;
        let beside = tree.text(Path::new(&format!("{name}.dockerignore")));
        let ignore = if beside.is_empty() { tree.text(Path::new(".dockerignore")) } else { beside };
        Ok(Sources { context, ignore, shown: name, text })
    }

    fn of(context: &Path, path: &Path, shown: String) -> Result<Sources> {
        let text = fs::File::open(path).and_then(read);
        let text = text.with_context(|| format!("failed to read dockerfile: open {shown}"))?;
        Ok(Sources { ignore: ignore(context, Some(path)), context: context.to_owned(), shown, text })
    }
}

fn usual() -> String {
    "Dockerfile".to_owned()
}

/// Docker looks for one beside the Dockerfile first.
pub fn ignore(context: &Path, file: Option<&Path>) -> String {
    let beside = file.map(|file| {
        let mut name = file.as_os_str().to_owned();
        name.push(".dockerignore");
        name
    });
    let beside = beside.and_then(|path| fs::read_to_string(path).ok());
    beside.or_else(|| fs::read_to_string(context.join(".dockerignore")).ok()).unwrap_or_default()
}

/// One byte more than a Dockerfile may have is read, for the parser to see that it is too long.
fn read(file: impl Read) -> io::Result<String> {
    let mut text = String::new();
    file.take(FILE_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_may_stand_beside_the_dockerfile() {
        let tmp = tempfile::tempdir().unwrap();
        let at = |name: &str| tmp.path().join(name);
        fs::write(at("Dockerfile"), "FROM scratch\n").unwrap();
        fs::write(at("Other"), "FROM scratch\n").unwrap();
        let found = |file: Option<&str>| {
            let file = file.map_or(at("Dockerfile"), at);
            Sources::of(tmp.path(), &file, "x".to_owned()).map(|sources| sources.ignore)
        };
        assert_eq!(found(None).unwrap(), "");
        fs::write(at(".dockerignore"), "all").unwrap();
        fs::write(at("Other.dockerignore"), "other").unwrap();
        assert_eq!(found(None).unwrap(), "all");
        assert_eq!(found(Some("Other")).unwrap(), "other");
        let error = format!("{:#}", found(Some("nosuch")).unwrap_err());
        assert_eq!(error, "failed to read dockerfile: open x: No such file or directory (os error 2)");
    }
}
