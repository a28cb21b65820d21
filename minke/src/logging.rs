//! The log: one line per event on standard error, kept from growing without end when it is a file of ours.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use minke_cluster::DataDir;
use minke_cluster::up::LOG_MAX;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Starts logging. `MINKE_LOG` chooses what, as `info` or `warn,minke_kubelet=debug`; `file` is where standard
/// error goes, if it is a file that may be replaced when it has become too large.
pub fn start(file: Option<&DataDir>) {
    let filter = EnvFilter::try_from_env("MINKE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let writer = LogWriter {
        file: file.map(|data| {
            Arc::new(Rotation {
                path: data.join("minke.log"),
                written: AtomicU64::new(0),
                turn: Mutex::new(()),
            })
        }),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(writer)
        // What cannot be written, on a full disk say, is lost. To complain of it would panic there.
        .log_internal_errors(false)
        .init();
}

#[derive(Clone)]
struct LogWriter {
    file: Option<Arc<Rotation>>,
}

struct Rotation {
    path: PathBuf,
    /// Bytes since this process last looked at the file.
    written: AtomicU64,
    turn: Mutex<()>,
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LogWriter;

    fn make_writer(&'a self) -> LogWriter {
        self.clone()
    }
}

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stderr().write(bytes)?;
        if let Some(file) = &self.file {
            file.note(written as u64);
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Rotation {
    fn note(&self, bytes: u64) {
        if self.written.fetch_add(bytes, Ordering::Relaxed) + bytes < LOG_MAX {
            return;
        }
        let Ok(_turn) = self.turn.try_lock() else { return };
        self.written.store(0, Ordering::Relaxed);
        // Failing here only means that the log goes on in the file it is in.
        let _ = self.replace();
    }

    /// Goes on in a new file. Everything that is written to standard error follows, panics too.
    fn replace(&self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
        let file: File = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
        Ok(rustix::stdio::dup2_stderr(&file)?)
    }
}
