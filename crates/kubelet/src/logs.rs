//! Container logs on disk, in the CRI format: `TIME stdout F text`, one line each; `P` marks a line that
//! the next one goes on with. Files that grow too long are set aside, and some are kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use minke_runtime::Runtime;

use crate::settings::Settings;

/// One line of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// RFC 3339 with nanoseconds, as written.
    pub time: &'a str,
    pub stdout: bool,
    /// The text ends with a newline that the file does not show.
    pub full: bool,
    pub text: &'a [u8],
}

impl<'a> Entry<'a> {
    /// Reads a line with or without its newline; `None` when it is none of ours, or cut off.
    pub fn parse(line: &'a [u8]) -> Option<Entry<'a>> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let time = std::str::from_utf8(parts.next()?).ok()?;
        let stdout = match parts.next()? {
            b"stdout" => true,
            b"stderr" => false,
            _ => return None,
        };
        // More tags may follow, divided by colons.
        let full = match parts.next()?.split(|byte| *byte == b':').next()? {
            b"F" => true,
            b"P" => false,
            _ => return None,
        };
        Some(Entry { time, stdout, full, text: parts.next().unwrap_or_default() })
    }
}

/// The older parts of a log, newest first.
pub fn rotated(log: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name()) else { return Ok(vec![]) };
    let prefix = format!("{}.", name.to_string_lossy());
    let mut old: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect();
    // The time in the name sorts.
    old.sort_by(|a, b| b.cmp(a));
    Ok(old)
}

/// Removes a container's log with its older parts.
pub fn remove(log: &Path) {
    for old in rotated(log).unwrap_or_default() {
        let _ = fs::remove_file(old);
    }
    let _ = fs::remove_file(log);
}

/// Sets the log of a running container aside when it has become too long.
pub async fn rotate(
    runtime: &dyn Runtime,
    settings: &Settings,
    container_id: &str,
    log: &Path,
) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(data) if data.len() > settings.log_size_max => {}
        _ => return Ok(()),
    }
    let old = rotated(log)?;
    for surplus in old.iter().skip(settings.log_files_max.saturating_sub(2)) {
        fs::remove_file(surplus)?;
    }
    // To the millisecond, so that no two parts of one log ever have the same name.
    let now = jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S.%3f").to_string();
    let aside = PathBuf::from(format!("{}.{now}", log.display()));
    fs::rename(log, &aside)?;
    if let Err(error) = runtime.reopen_log(container_id).await {
        // Nothing is lost: the container goes on writing where it was.
        fs::rename(&aside, log)?;
        return Err(io::Error::other(error.to_string()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, want: Option<(bool, bool, &str)>) {
        let got = Entry::parse(line.as_bytes());
        assert_eq!(
            got.map(|e| (e.stdout, e.full, std::str::from_utf8(e.text).expect("text"))),
            want,
            "{line}"
        );
    }

    #[test]
    fn lines_are_read() {
        check("2026-01-01T00:00:00.1Z stdout F hi there\n", Some((true, true, "hi there")));
        check("2026-01-01T00:00:00.1Z stderr P half", Some((false, false, "half")));
        check("2026-01-01T00:00:00.1Z stdout F:x tagged", Some((true, true, "tagged")));
        check("2026-01-01T00:00:00.1Z stdout F ", Some((true, true, "")));
        check("2026-01-01T00:00:00.1Z stdout F", Some((true, true, "")));
        check("2026-01-01T00:00:00.1Z other F x", None);
        check("garbage", None);
        check("", None);
    }
}
