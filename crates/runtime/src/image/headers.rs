//! Extended headers of tar archives: long names, sizes and attributes of the entry that follows.
//!
//! The archive is read raw, for these to come as entries: their size can then be bounded before they are read.

use std::io::{self, Read};

use super::unpack::invalid;

/// What extended headers say about the entry that follows them.
#[derive(Default)]
pub struct Extended {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<(i64, i64)>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Collects them.
pub struct Headers {
    next: Extended,
    /// Most bytes that one may have.
    max: u64,
}

impl Headers {
    pub fn new(max: u64) -> Headers {
        Headers { next: Extended::default(), max }
    }

    /// What was said about this entry; `None` when it is itself one that says something of the next.
    pub fn take(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Option<Extended>> {
        match entry.header().entry_type().as_byte() {
            b'L' => self.next.path = Some(without_nul(self.content(entry)?)),
            b'K' => self.next.link = Some(without_nul(self.content(entry)?)),
            b'x' => {
                let text = self.content(entry)?;
                parse_pax(&text, &mut self.next)?;
            }
            // Global headers hold comments (`git archive`) and nothing about one file.
            b'g' => drop(self.content(entry)?),
            _ => return Ok(Some(std::mem::take(&mut self.next))),
        }
        Ok(None)
    }

    fn content(&self, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
        let size = entry.header().entry_size()?;
        if size > self.max {
            return Err(invalid(format!("an extended header of {size} bytes")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        entry.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

/// `length key=value\n` records.
fn parse_pax(text: &[u8], out: &mut Extended) -> io::Result<()> {
    let bad = || invalid("a broken extended header".to_owned());
    let mut rest = text;
    while !rest.is_empty() && rest[0] != 0 {
        let space = rest.iter().position(|b| *b == b' ').ok_or_else(bad)?;
        let length: usize =
            std::str::from_utf8(&rest[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(bad)?;
        if length <= space + 1 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &rest[space + 1..length - 1];
        rest = &rest[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let number = || std::str::from_utf8(value).ok().and_then(|v| v.parse::<u64>().ok()).ok_or_else(bad);
        match key {
            b"path" => out.path = Some(value.to_vec()),
            b"linkpath" => out.link = Some(value.to_vec()),
            b"size" => out.size = Some(number()?),
            b"uid" => out.uid = Some(number()?),
            b"gid" => out.gid = Some(number()?),
            b"mtime" => out.mtime = Some(parse_time(value).ok_or_else(bad)?),
            key if key.starts_with(b"SCHILY.xattr.") => {
                out.xattrs.push((key[b"SCHILY.xattr.".len()..].to_vec(), value.to_vec()));
            }
            // Sparse files are not written by builders of images.
            key if key.starts_with(b"GNU.sparse.") => return Err(invalid("a sparse file".to_owned())),
            _ => {}
        }
    }
    Ok(())
}

/// Seconds with any number of decimals.
fn parse_time(value: &[u8]) -> Option<(i64, i64)> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let (whole, nanos) = (seconds.parse::<i64>().ok()?, digits.parse::<i64>().ok()?);
    match (seconds.starts_with('-'), nanos) {
        (true, n) if n > 0 => Some((whole.checked_sub(1)?, 1_000_000_000 - n)),
        _ => Some((whole, nanos)),
    }
}
