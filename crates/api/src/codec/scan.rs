//! Finds what is wrong with a text that is not JSON, and says it as the reference implementation does.
//!
//! Runs only when decoding has failed, without recursion and without keeping anything but the open brackets.

use super::{MAX_DEPTH, TOO_DEEP};

/// The first mistake in `text`, or `None` if there is none of grammar.
pub fn explain(text: &[u8]) -> Option<String> {
    let mut scan = Scan { text, at: 0, open: Vec::new() };
    scan.document().err()
}

struct Scan<'a> {
    text: &'a [u8],
    at: usize,
    open: Vec<u8>,
}

impl Scan<'_> {
    fn document(&mut self) -> Result<(), String> {
        loop {
            self.value()?;
            // A value has ended: close what ends here, until another value is due.
            loop {
                match (self.open.last().copied(), self.token()) {
                    (None, None) => return Ok(()),
                    (None, Some(_)) => return Err(self.invalid("after top-level value")),
                    (Some(b'['), Some(b',')) => {
                        self.at += 1;
                        break;
                    }
                    (Some(b'['), Some(b']')) | (Some(b'{'), Some(b'}')) => {
                        self.at += 1;
                        self.open.pop();
                    }
                    (Some(b'{'), Some(b',')) => {
                        self.at += 1;
                        self.key()?;
                        break;
                    }
                    (Some(b'['), _) => return Err(self.invalid("after array element")),
                    (Some(_), _) => return Err(self.invalid("after object key:value pair")),
                }
            }
        }
    }

    /// Consumes a scalar, an empty collection, or the opening of a collection up to its first scalar.
    fn value(&mut self) -> Result<(), String> {
        loop {
            match self.token() {
                Some(open @ (b'[' | b'{')) => {
                    if self.open.len() >= MAX_DEPTH {
                        return Err(TOO_DEEP.into());
                    }
                    self.at += 1;
                    let close = if open == b'[' { b']' } else { b'}' };
                    if self.token() == Some(close) {
                        self.at += 1;
                        return Ok(());
                    }
                    self.open.push(open);
                    if open == b'{' {
                        self.key()?;
                    }
                }
                Some(b'"') => return self.string(),
                Some(b't') => return self.literal("true"),
                Some(b'f') => return self.literal("false"),
                Some(b'n') => return self.literal("null"),
                Some(b'-' | b'0'..=b'9') => return self.number(),
                _ => return Err(self.invalid("looking for beginning of value")),
            }
        }
    }

    fn key(&mut self) -> Result<(), String> {
        if self.token() != Some(b'"') {
            return Err(self.invalid("looking for beginning of object key string"));
        }
        self.string()?;
        if self.token() != Some(b':') {
            return Err(self.invalid("after object key"));
        }
        self.at += 1;
        Ok(())
    }

    fn string(&mut self) -> Result<(), String> {
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(0x20..) => self.at += 1,
                _ => return Err(self.invalid("in string literal")),
            }
        }
    }

    fn escape(&mut self) -> Result<(), String> {
        self.at += 1;
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') => {
                self.at += 1;
                for _ in 0..4 {
                    if !self.peek().is_some_and(|b| b.is_ascii_hexdigit()) {
                        return Err(self.invalid("in \\u hexadecimal character escape"));
                    }
                    self.at += 1;
                }
            }
            _ => return Err(self.invalid("in string escape code")),
        }
        Ok(())
    }

    fn literal(&mut self, word: &str) -> Result<(), String> {
        for want in word.bytes() {
            if self.peek() != Some(want) {
                return Err(self.invalid(&format!("in literal {word} (expecting {})", quoted(want as char))));
            }
            self.at += 1;
        }
        Ok(())
    }

    fn number(&mut self) -> Result<(), String> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits("in numeric literal")?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits("after decimal point in numeric literal")?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits("in exponent of numeric literal")?;
        }
        Ok(())
    }

    fn digits(&mut self, place: &str) -> Result<(), String> {
        if !self.peek().is_some_and(|b| b.is_ascii_digit()) {
            return Err(self.invalid(place));
        }
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        Ok(())
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    /// The next byte that is not blank.
    fn token(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.peek() {
            self.at += 1;
        }
        self.peek()
    }

    fn invalid(&self, place: &str) -> String {
        match self.peek() {
            // Upstream reads byte by byte, so this is the byte and not the character.
            Some(byte) => format!("invalid character {} {place}", quoted(byte as char)),
            None => "unexpected end of JSON input".into(),
        }
    }
}

fn quoted(c: char) -> String {
    match c {
        '\'' => r"'\''".into(),
        '"' => r#"'"'"#.into(),
        '\n' => r"'\n'".into(),
        '\r' => r"'\r'".into(),
        '\t' => r"'\t'".into(),
        '\\' => r"'\\'".into(),
        c if (c as u32) < 0x20 || c as u32 == 0x7f => format!("'\\x{:02x}'", c as u32),
        c if (0x80..0xa0).contains(&(c as u32)) => format!("'\\u{:04x}'", c as u32),
        c => format!("'{c}'"),
    }
}
