//! `--output`: what is made of a build instead of an image of the node.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use minke_runtime::ImageStore;
use minke_runtime::build::{Draft, unpack_files};

use super::mounts::fields;
use super::sandbox::Sandbox;
use super::tree::{Item, Tree};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// The files, in a directory.
    Local(PathBuf),
    /// An archive of the files; `-` is standard output.
    Tar(PathBuf),
    /// The image, in an archive that docker and OCI tools load.
    Image(PathBuf),
}

impl Output {
    /// `DIR`, `-` or `type=local|tar|docker|oci,dest=PATH`.
    pub fn parse(text: &str) -> Result<Output> {
        if text == "-" {
            return Ok(Output::Tar(text.into()));
        }
        if !text.contains('=') {
            return Ok(Output::Local(text.into()));
        }
        let (mut kind, mut dest) = (None, None);
        for field in fields(text).map_err(anyhow::Error::msg)? {
            match field.split_once('=') {
                Some(("type", value)) => kind = Some(value.to_owned()),
                Some(("dest", value)) => dest = Some(PathBuf::from(value)),
                Some((key, _)) => bail!("invalid output {text:?}: unexpected key '{key}'"),
                None => bail!("invalid output {text:?}: invalid field '{field}' must be a key=value pair"),
            }
        }
        let dest = |usual: Option<&str>| {
            let dest = dest.or(usual.map(PathBuf::from));
            dest.ok_or_else(|| anyhow!("invalid output {text:?}: dest is required"))
        };
        match kind.as_deref() {
            Some("local") => dest(None).map(Output::Local),
            Some("tar") => dest(Some("-")).map(Output::Tar),
            Some("docker" | "oci") => dest(Some("-")).map(Output::Image),
            Some(kind) => bail!("invalid output {text:?}: unsupported type {kind:?}"),
            None => bail!("invalid output {text:?}: type is required"),
        }
    }

    /// Whether it would be written to a terminal, for which it is nothing.
    pub fn is_for_a_terminal(&self) -> bool {
        match self {
            Output::Local(_) => false,
            Output::Tar(path) | Output::Image(path) => path.as_os_str() == "-" && io::stdout().is_terminal(),
        }
    }

    /// Whether the build is to become an image of the node as well.
    pub fn wants_image(&self) -> bool {
        matches!(self, Output::Image(_))
    }

    /// Writes what was built; `names` are those of the image, or its id.
    pub async fn write(
        &self,
        images: &ImageStore,
        draft: &Draft,
        names: &[String],
        sandbox: &Sandbox,
    ) -> Result<()> {
        match self {
            Output::Image(path) if path.as_os_str() == "-" => Ok(images.save(names, io::stdout()).await?),
            Output::Image(path) => {
                let file = File::create(path).with_context(|| format!("write {}", path.display()))?;
                images.save(names, file).await.with_context(|| format!("write {}", path.display()))
            }
            Output::Tar(path) if path.as_os_str() == "-" => {
                archive(images, draft, sandbox, io::stdout()).await
            }
            Output::Tar(path) => {
                let file = File::create(path).with_context(|| format!("write {}", path.display()))?;
                archive(images, draft, sandbox, file).await
            }
            Output::Local(dir) => {
                // By way of an archive: what unpacks it follows no link out of the directory.
                let path = sandbox.scratch()?.join("files.tar");
                archive(images, draft, sandbox, File::create(&path)?).await?;
                let (file, dir) = (File::open(&path)?, dir.clone());
                let unpacked = tokio::task::spawn_blocking(move || unpack_into(file, &dir)).await?;
                std::fs::remove_file(&path)?;
                unpacked
            }
        }
    }
}

fn unpack_into(archive: File, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    unpack_files(archive, dir).with_context(|| format!("write {}", dir.display()))
}

async fn archive(
    images: &ImageStore,
    draft: &Draft,
    sandbox: &Sandbox,
    out: impl Write + Send + 'static,
) -> Result<()> {
    let (images, draft, scratch) = (images.clone(), draft.clone(), sandbox.scratch()?);
    tokio::task::spawn_blocking(move || {
        let tree = Tree::of(images.view(&draft, &scratch)?);
        let mut tar = tar::Builder::new(io::BufWriter::new(out));
        tree.walk(Path::new(""), Path::new(""), true, &mut |path, item| {
            match item {
                Item::Directory(meta) => {
                    let mut header = meta.header(tar::EntryType::Directory, 0);
                    tar.append_data(&mut header, path.join(""), io::empty())?;
                }
                Item::Link(meta, to) => {
                    tar.append_link(&mut meta.header(tar::EntryType::Symlink, 0), path, &to)?;
                }
                Item::File(meta, size, file, _) => {
                    let mut header = meta.header(tar::EntryType::Regular, size);
                    tar.append_data(&mut header, path, io::Read::take(file, size))?;
                }
            }
            Ok(())
        })?;
        Ok(tar.into_inner()?.flush()?)
    })
    .await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<Output, &str>) {
        assert_eq!(Output::parse(text).map_err(|why| why.to_string()), want.map_err(str::to_owned), "{text}");
    }

    #[test]
    fn outputs_are_dockers() {
        check("out", Ok(Output::Local("out".into())));
        check("-", Ok(Output::Tar("-".into())));
        check("type=local,dest=a/b", Ok(Output::Local("a/b".into())));
        check("type=tar", Ok(Output::Tar("-".into())));
        check("type=tar,dest=x.tar", Ok(Output::Tar("x.tar".into())));
        check("type=docker,dest=x.tar", Ok(Output::Image("x.tar".into())));
        check("type=local", Err("invalid output \"type=local\": dest is required"));
        check("dest=x", Err("invalid output \"dest=x\": type is required"));
        check("type=registry", Err("invalid output \"type=registry\": unsupported type \"registry\""));
        check(
            "type=tar,compression=x",
            Err("invalid output \"type=tar,compression=x\": unexpected key 'compression'"),
        );
    }
}
