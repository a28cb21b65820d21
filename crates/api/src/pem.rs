//! PEM (RFC 7468) as Go's `encoding/pem` takes it: text around the blocks is not looked at, and what is no whole
//! block is passed over.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";
const LINE: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block<'a> {
    /// `CERTIFICATE`, say.
    pub label: &'a str,
    /// Whether it has headers (`Proc-Type: …`), which nothing here reads.
    pub has_headers: bool,
    pub bytes: Vec<u8>,
}

/// The blocks of `text` in their order.
pub fn blocks(text: &str) -> impl Iterator<Item = Block<'_>> {
    let mut lines = text.lines();
    std::iter::from_fn(move || {
        loop {
            let label = lines.find_map(|line| label(line, BEGIN))?;
            // What has no end, or another's, is none; the next may begin within it.
            let body = lines.clone();
            let end = body.clone().position(|line| line.starts_with(DASHES))?;
            if self::label(body.clone().nth(end)?, END) != Some(label) {
                continue;
            }
            lines.nth(end);
            if let Some(block) = block(label, body.take(end)) {
                return Some(block);
            }
        }
    })
}

fn label<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.trim_end().strip_prefix(start)?.strip_suffix(DASHES)
}

fn block<'a>(label: &'a str, body: impl Iterator<Item = &'a str>) -> Option<Block<'a>> {
    let mut encoded = String::new();
    let mut has_headers = false;
    for line in body {
        if encoded.is_empty() && line.contains(':') {
            has_headers = true;
        } else {
            encoded.extend(line.chars().filter(|c| !c.is_ascii_whitespace()));
        }
    }
    Some(Block { label, has_headers, bytes: STANDARD.decode(encoded).ok()? })
}

/// One block, with its last newline.
pub fn encode(label: &str, bytes: &[u8]) -> String {
    let encoded = STANDARD.encode(bytes);
    let mut out = format!("{BEGIN}{label}{DASHES}\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(LINE.min(rest.len()));
        out.push_str(line);
        out.push('\n');
        rest = more;
    }
    out.push_str(&format!("{END}{label}{DASHES}\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &[(&str, &[u8])]) {
        let got: Vec<_> = blocks(text).collect();
        let got: Vec<_> = got.iter().map(|block| (block.label, block.bytes.as_slice())).collect();
        assert_eq!(got, want, "{text}");
    }

    #[test]
    fn blocks_are_found_between_whatever_stands_there() {
        check("", &[]);
        let (one, two) = (encode("A", b"first"), encode("B C", &[7; 100]));
        check(&format!("x\n{one}\ny: z\n{two}"), &[("A", b"first"), ("B C", &[7; 100])]);
        check(&one.replace('\n', "\r\n"), &[("A", b"first")]);
        // Without an end, with another's, and with what is no base64.
        check(&one.replace("-----END A-----\n", ""), &[]);
        check(&format!("{}{two}", one.replace("END A", "END B")), &[("B C", &[7; 100])]);
        check(&format!("-----BEGIN A-----\n{one}"), &[("A", b"first")]);
        check(&format!("{}{two}", one.replace("Zmly", "Z?ly")), &[("B C", &[7; 100])]);
        let headed = one.replace("A-----\nZ", "A-----\nProc-Type: 4\n\nZ");
        let first = blocks(&headed).next().expect("a block");
        assert!(first.has_headers && first.bytes == b"first");
    }

    #[test]
    fn lines_are_short() {
        assert_eq!(encode("A", b"x"), "-----BEGIN A-----\neA==\n-----END A-----\n");
        assert!(encode("A", &[1; 200]).lines().all(|line| line.len() <= LINE));
    }
}
