//! `minke logs`: the log of the server that runs in the background.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::fs::inotify;

use crate::data_dir::DataDir;
use crate::io::Io;

/// Show the log of the server.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written from now on
    #[arg(short, long)]
    follow: bool,
    /// Only this many lines from the end
    #[arg(long, value_name = "LINES")]
    tail: Option<usize>,
}

impl LogsArgs {
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<()> {
        let path = data.join("minke.log");
        // Watched before it is read, so that nothing falls between the two.
        let watch = if self.follow { Some(watch(data.path())?) } else { None };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("there is no log in {}", data.path().display())
            }
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        if let Some(lines) = self.tail {
            let skip = BufReader::new(&file).split(b'\n').count().saturating_sub(lines);
            file.rewind()?;
            let mut reader = BufReader::new(&file);
            let mut at = 0;
            for _ in 0..skip {
                let mut line = Vec::new();
                at += reader.read_until(b'\n', &mut line)?;
            }
            file.seek(SeekFrom::Start(at as u64))?;
        }
        copy(&mut file, io)?;
        let Some(watch) = watch else { return Ok(()) };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        loop {
            events.next().context("watch the log")?;
            copy(&mut file, io)?;
            // A log that has become too large goes on in a new file.
            if let Ok(new) = File::open(&path)
                && new.metadata()?.ino() != file.metadata()?.ino()
            {
                file = new;
                copy(&mut file, io)?;
            }
        }
    }
}

fn watch(dir: &Path) -> Result<std::os::fd::OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, dir, flags).with_context(|| format!("watch {}", dir.display()))?;
    Ok(watch)
}

fn copy(file: &mut File, io: &mut Io) -> Result<()> {
    std::io::copy(file, &mut io.out)?;
    Ok(io.out.flush()?)
}
