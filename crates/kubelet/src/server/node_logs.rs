//! `/logs/`: the files below the machine's `/var/log`, and pages that list its directories.
//!
//! Upstream: a plain file server (`enableSystemLogHandler`). Asking the journal (`enableSystemLogQuery`) is off, as
//! it is by default: then a `query` is ignored.

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use futures_util::TryStreamExt;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::routes::{Body, answer_with, text};

pub const ROOT: &str = "/var/log";
/// Entries of a directory that are listed.
const ENTRIES_MAX: usize = 10_000;
const CHUNK: usize = 32 << 10;

enum Found {
    File(File, Metadata),
    Page(String),
}

/// What lies at `path` below `root`. Links that lead out of it lead nowhere.
pub async fn answer(root: &'static str, path: String) -> Response<Body> {
    let found = tokio::task::spawn_blocking(move || find(Path::new(root), &path)).await;
    match found {
        Ok(Ok(Found::Page(page))) => answer_with(StatusCode::OK, "text/html; charset=utf-8", page),
        Ok(Ok(Found::File(file, metadata))) => {
            // What is written meanwhile is for the next one who asks.
            let file = tokio::fs::File::from_std(file).take(metadata.len());
            let frames = ReaderStream::with_capacity(file, CHUNK).map_ok(Frame::data);
            let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
            let kind = HeaderValue::from_static("text/plain; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            text(StatusCode::FORBIDDEN, "403 Forbidden\n".to_owned())
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n".to_owned()),
    }
}

fn find(root: &Path, path: &str) -> io::Result<Found> {
    let dir = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // A pipe must not hold anybody up.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let path = if path.is_empty() { "." } else { path };
    let file = File::from(rustix::fs::openat2(&dir, path, flags, Mode::empty(), stay)?);
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(Found::File(file, metadata));
    }
    if !metadata.is_dir() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut names = vec![];
    for entry in rustix::fs::Dir::read_from(&file)?.take(ENTRIES_MAX) {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        let slash = if entry.file_type() == rustix::fs::FileType::Directory { "/" } else { "" };
        if name != "." && name != ".." {
            names.push(format!("{name}{slash}"));
        }
    }
    names.sort_unstable();
    let links = names.iter().map(|name| format!("<a href=\"{}\">{}</a>\n", in_link(name), in_page(name)));
    let links: String = links.collect();
    let head = "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n";
    Ok(Found::Page(format!("{head}<pre>\n{links}</pre>\n")))
}

fn in_page(name: &str) -> String {
    let escaped = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    escaped.replace('"', "&#34;").replace('\'', "&#39;")
}

fn in_link(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/$&+,=@".contains(&byte);
    let parts = name.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(root: &Path, path: &str, want: &str) {
        let got = match find(root, path) {
            Ok(Found::Page(page)) => page.lines().skip(3).map(|line| format!("{line}\n")).collect(),
            Ok(Found::File(file, _)) => io::read_to_string(file).expect("text"),
            Err(_) => "none".to_owned(),
        };
        assert_eq!(got, want, "{path}");
    }

    #[test]
    fn files_are_found_and_nothing_outside_of_them() {
        let tmp = crate::testing::temp_dir("node-logs");
        let root = tmp.join("log");
        std::fs::create_dir_all(root.join("pods/a b")).expect("directories");
        std::fs::write(tmp.join("secret"), "secret").expect("a file");
        std::fs::write(root.join("sys<log"), "line\n").expect("a file");
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, root.join(name)).expect("a link");
        link("sys<log", "newest");
        link("../secret", "out");
        link("/etc/hostname", "away");
        rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .expect("a pipe");
        let page = "<a href=\"away\">away</a>\n<a href=\"newest\">newest</a>\n<a href=\"out\">out</a>\n\
                    <a href=\"pipe\">pipe</a>\n<a href=\"pods/\">pods/</a>\n<a href=\"sys%3Clog\">sys&lt;log</a>\n</pre>\n";
        check(&root, "", page);
        check(&root, "pods", "<a href=\"a%20b/\">a b/</a>\n</pre>\n");
        check(&root, "newest", "line\n");
        for path in ["out", "away", "../secret", "/etc/hostname", "pipe", "nosuch", "newest/x"] {
            check(&root, path, "none");
        }
        std::fs::remove_dir_all(tmp).expect("it is there");
    }
}
