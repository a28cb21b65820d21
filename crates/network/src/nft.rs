//! Running an nftables script.

use std::io::{ErrorKind, Write};
use std::process::{Command, Stdio};

use crate::Error;

/// Debian and others keep it where a daemon's PATH may not look.
const PLACES: [&str; 4] = ["nft", "/usr/sbin/nft", "/sbin/nft", "/usr/local/sbin/nft"];

/// Applies `script` as one transaction: all of it or, on an error, nothing. Blocks until the kernel has
/// switched over, so packets that arrive after the return meet the new rules.
pub fn apply(script: &str) -> Result<(), Error> {
    run(&["-f", "-"], script).map(drop)
}

/// The names of the IPv4 tables that begin with `prefix`.
pub(crate) fn tables(prefix: &str) -> Result<Vec<String>, Error> {
    let list = run(&["list", "tables", "ip"], "")?;
    let names = list.lines().filter_map(|line| line.strip_prefix("table ip "));
    Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
}

fn run(arguments: &[&str], input: &str) -> Result<String, Error> {
    let mut missing = None;
    for place in PLACES {
        let spawned = Command::new(place)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                missing = Some(error);
                continue;
            }
            spawned => spawned.map_err(Error::NftMissing)?,
        };
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // nft reads its whole input before it writes anything, so this can't block on a full pipe. An
        // error here means that it has ended; its exit status says why.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().map_err(Error::NftMissing)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        return Err(Error::Nft(first_complaint(&String::from_utf8_lossy(&output.stderr))));
    }
    Err(Error::NftMissing(missing.expect("there is at least one place to look")))
}

/// nft repeats the offending line below its message, which for a full load would be megabytes.
fn first_complaint(stderr: &str) -> String {
    const BYTES: usize = 300;
    let line = stderr.lines().find(|line| line.contains("Error")).unwrap_or(stderr).trim();
    let mut end = line.len().min(BYTES);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].to_owned()
}
