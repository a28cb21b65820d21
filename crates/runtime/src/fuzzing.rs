//! What of this crate reads the agent's own files and the shim's socket, as `crates/fuzzing` feeds it: each
//! panics when something is wrong.

use std::io::Write;
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::User;
use crate::image::reference::Reference;
use crate::shim::proto::{ContainerRecord, Exit, Message, Request, SandboxRecord, Started};
use crate::shim::wire::{Inbox, frame};

/// Bytes on the socket between agent and shim, as both ends read them.
pub fn shim_socket(data: &[u8]) {
    let (mut theirs, ours) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("it is a socket");
    let mut inbox = Inbox::default();
    for piece in data.chunks(4096) {
        theirs.write_all(piece).expect("as much fits");
        inbox.fill(&ours).expect("it was just written");
        loop {
            match inbox.next() {
                Ok(Some(bytes)) => {
                    read_again::<Request>(&bytes);
                    read_again::<Message>(&bytes);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// What is read is the same when it is written, framed and read again.
fn read_again<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let framed = frame(&value);
    let again: T = serde_json::from_slice(&framed[4..]).expect("what was written can be read");
    assert_eq!(frame(&again), framed);
}

/// The files of sandboxes, containers and images, which a crash or a person may have damaged.
pub fn state_file(data: &[u8]) {
    read_again::<SandboxRecord>(data);
    read_again::<ContainerRecord>(data);
    read_again::<Started>(data);
    read_again::<Exit>(data);
    crate::image::fuzz_index(data);
}

/// An image's passwd and group files, divided by a zero byte, after the user that is looked for.
pub fn passwd(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.splitn(3, '\0');
    let (user, passwd) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let group = parts.next().unwrap_or_default();
    if let Ok(resolved) = crate::users::resolve_with(passwd, group, &User::default(), user) {
        assert_eq!(resolved.groups.first(), Some(&resolved.gid));
        assert!(user.is_empty() || !resolved.home.is_empty());
    }
}

/// A reference: its full form means the same.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(parsed) = Reference::parse(text) else { return };
    let full = parsed.to_string();
    let again = Reference::parse(&full).expect("the full form is one");
    assert_eq!(again.to_string(), full);
    assert!(again.path.split('/').all(|part| !part.is_empty() && !part.contains("..")), "{full}");
    assert_eq!((again.domain, again.path, again.digest), (parsed.domain, parsed.path, parsed.digest));
}

/// A `hosts.toml`, a challenge, and the error of a registry.
pub fn registry_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    crate::image::hosts::fuzz(text);
    crate::image::remote::fuzz(text);
}
