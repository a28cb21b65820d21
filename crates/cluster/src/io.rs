//! Where commands write, and how they say what is going on when it takes long.

use std::io::{IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Result;

/// A step that takes longer than this is worth a line.
const LONG: Duration = Duration::from_secs(1);

/// Output of a command: results to `out`, what is going on to `err`.
pub struct Io {
    pub out: Box<dyn Write + Send>,
    pub err: Box<dyn Write + Send>,
    /// Whether `err` is a terminal, where a line can be written over.
    pub err_is_terminal: bool,
}

impl Io {
    pub fn std() -> Io {
        Io {
            out: Box::new(std::io::stdout()),
            err: Box::new(std::io::stderr()),
            err_is_terminal: std::io::stderr().is_terminal(),
        }
    }

    /// One line of the result.
    pub fn say(&mut self, line: impl AsRef<str>) -> Result<()> {
        Ok(writeln!(self.out, "{}", line.as_ref())?)
    }

    /// One line about what is going on. Nobody reading it stops nothing.
    pub fn note(&mut self, line: impl AsRef<str>) {
        let _ = writeln!(self.err, "{}", line.as_ref());
    }

    /// Writes over the current line of a terminal; nothing elsewhere.
    pub fn flash(&mut self, line: &str) {
        if self.err_is_terminal {
            let _ = write!(self.err, "\r\x1b[K{line}");
            let _ = self.err.flush();
        }
    }

    /// Follows `steps` until `take` returns something, showing each step that lasts. `None` when the sender is
    /// gone or the time is up first.
    pub fn follow<S, T>(
        &mut self,
        steps: &Receiver<S>,
        end: Instant,
        mut take: impl FnMut(S) -> Followed<T>,
    ) -> Option<T> {
        let mut current: Option<(String, Instant)> = None;
        loop {
            let now = Instant::now();
            let next = current.as_ref().map_or(end, |(_, since)| (*since + LONG).min(end));
            match steps.recv_timeout(next.saturating_duration_since(now)) {
                Ok(step) => match take(step) {
                    Followed::Step(text) => current = Some((text, Instant::now())),
                    Followed::End(result) => return Some(result),
                },
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    if Instant::now() >= end {
                        return None;
                    }
                    if let Some((text, _)) = current.take() {
                        self.note(format!("{text} ..."));
                    }
                }
            }
        }
    }
}

/// What came of one message in [`Io::follow`].
pub enum Followed<T> {
    /// Something has begun.
    Step(String),
    /// It is over.
    End(T),
}
