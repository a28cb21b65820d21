//! Reads Dockerfiles: lines, instructions, their flags and words, and `$VARIABLES` in them.
//!
//! Upstream: the Dockerfile reference. What only BuildKit has (`RUN --mount`) and `ONBUILD` are refused
//! with their line, rather than taken for something else.

use std::collections::BTreeMap;

/// Most bytes of a Dockerfile, and most instructions.
pub const FILE_MAX: usize = 1 << 20;
const INSTRUCTIONS_MAX: usize = 10_000;
/// Most bytes that variables may make of a word.
const WORD_MAX: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// From 1.
    pub line: usize,
    /// In upper case: `RUN`.
    pub name: String,
    /// `--from=x` is `("from", "x")`.
    pub flags: Vec<(String, String)>,
    pub arguments: Arguments,
    /// Files that stand in the Dockerfile itself, for COPY and ADD; those of RUN are part of its text.
    pub heredocs: Vec<Heredoc>,
}

/// The lines after `<<NAME`, up to one that is `NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    pub name: String,
    /// Variables are undone, because the name was not quoted.
    pub expand: bool,
    /// `<<-NAME`: tabs at the beginnings of lines are not part of it.
    strip: bool,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arguments {
    /// `["a", "b"]`
    List(Vec<String>),
    /// Everything else, with the lines joined.
    Text(String),
}

impl Instruction {
    /// As it stands, in one line, for messages and keys.
    pub fn shown(&self) -> String {
        let flags: String = self.flags.iter().map(|(name, value)| format!(" --{name}={value}")).collect();
        match &self.arguments {
            Arguments::Text(text) => match text.trim_end().split_once('\n') {
                Some((first, _)) => format!("{}{flags} {first} ...", self.name),
                None => format!("{}{flags} {text}", self.name),
            },
            Arguments::List(list) => {
                format!("{}{flags} {}", self.name, serde_json::Value::from(list.clone()))
            }
        }
    }

    /// Puts the heredocs of a RUN, which have been read, where its shell finds them: one that stands alone is the
    /// script itself.
    fn settle(&mut self) -> Result<(), String> {
        let Arguments::Text(text) = &mut self.arguments else { return Ok(()) };
        if self.name != "RUN" || self.heredocs.is_empty() {
            return Ok(());
        }
        let heredocs = std::mem::take(&mut self.heredocs);
        if text.split_whitespace().count() == 1 {
            *text = heredocs.into_iter().map(|heredoc| heredoc.text).collect();
            return match text.starts_with("#!") {
                true => Err("RUN <<: a script with an interpreter of its own is not supported".to_owned()),
                false if text.trim().is_empty() => Err("RUN requires at least one argument".to_owned()),
                false => Ok(()),
            };
        }
        for Heredoc { name, text: lines, .. } in heredocs {
            *text = format!("{text}\n{lines}{name}");
        }
        Ok(())
    }

    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct SyntaxError {
    pub line: usize,
    pub why: String,
}

/// The instructions, and the character that escapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    pub instructions: Vec<Instruction>,
    pub escape: char,
}

pub fn parse(text: &str) -> Result<Dockerfile, SyntaxError> {
    let fail = |line: usize, why: String| Err(SyntaxError { line, why });
    if text.len() > FILE_MAX {
        return fail(1, format!("the file is longer than {FILE_MAX} bytes"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let escape = escape_directive(text)?;
    let mut instructions = Vec::new();
    let (mut joined, mut begun) = (String::new(), 0);
    let mut lines = text.lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        let number = number + 1;
        let bare = line.trim();
        // Comments may stand between the lines of an instruction as well, and so may empty lines.
        let skip = bare.is_empty() || bare.starts_with('#');
        if !skip {
            if joined.is_empty() {
                begun = number;
            }
            let line = if joined.is_empty() { line.trim_start() } else { line };
            if let Some(more) = line.trim_end().strip_suffix(escape) {
                joined.push_str(more);
                if lines.peek().is_some() {
                    continue;
                }
            } else {
                joined.push_str(line);
            }
        } else if joined.is_empty() || lines.peek().is_some() {
            continue;
        }
        let whole = std::mem::take(&mut joined);
        if !whole.trim().is_empty() {
            let mut instruction = instruction(begun, whole.trim())?;
            for heredoc in &mut instruction.heredocs {
                heredoc.read(&mut lines).map_err(|why| SyntaxError { line: begun, why })?;
            }
            instruction.settle().map_err(|why| SyntaxError { line: begun, why })?;
            instructions.push(instruction);
        }
        if instructions.len() > INSTRUCTIONS_MAX {
            return fail(number, format!("more than {INSTRUCTIONS_MAX} instructions"));
        }
    }
    if !joined.trim().is_empty() {
        instructions.push(instruction(begun, joined.trim())?);
    }
    match instructions.iter().find(|i| i.name != "ARG") {
        Some(first) if first.name == "FROM" => Ok(Dockerfile { instructions, escape }),
        Some(first) => fail(first.line, "no build stage in current context: FROM must come first".to_owned()),
        None => fail(1, "file with no instructions".to_owned()),
    }
}

/// `# escape=` in the comments at the very beginning.
fn escape_directive(text: &str) -> Result<char, SyntaxError> {
    for (number, line) in text.lines().enumerate() {
        let Some(comment) = line.trim().strip_prefix('#') else { break };
        let Some((name, value)) = comment.split_once('=') else { break };
        match (name.trim().to_ascii_lowercase().as_str(), value.trim()) {
            ("escape", "\\") => return Ok('\\'),
            ("escape", "`") => return Ok('`'),
            ("escape", other) => {
                let why = format!("invalid escape token {other:?} does not match ` or \\");
                return Err(SyntaxError { line: number + 1, why });
            }
            _ => {}
        }
    }
    Ok('\\')
}

const KNOWN: &[&str] = &[
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// The flags that an instruction takes.
fn flags_of(name: &str) -> &'static [&'static str] {
    match name {
        "FROM" => &["platform"],
        "COPY" => &["from", "chown", "chmod", "link"],
        "ADD" => &["chown", "chmod", "link", "checksum"],
        "HEALTHCHECK" => &["interval", "timeout", "start-period", "start-interval", "retries"],
        _ => &[],
    }
}

fn instruction(line: usize, text: &str) -> Result<Instruction, SyntaxError> {
    let fail = |why: String| Err(SyntaxError { line, why });
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = word.to_ascii_uppercase();
    if name == "ONBUILD" {
        return fail("ONBUILD is not supported".to_owned());
    }
    if !KNOWN.contains(&name.as_str()) {
        return fail(format!("unknown instruction: {word}"));
    }
    let (mut flags, mut rest) = (Vec::new(), rest.trim());
    while let Some(flag) = rest.strip_prefix("--") {
        let (word, after) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        if word.is_empty() {
            break;
        }
        let (key, value) = word.split_once('=').unwrap_or((word, "true"));
        if !flags_of(&name).contains(&key) {
            return fail(format!("{name} --{key} is not supported"));
        }
        flags.push((key.to_owned(), value.to_owned()));
        rest = after.trim_start();
    }
    if rest.is_empty() {
        return fail(format!("{name} requires at least one argument"));
    }
    let has_heredocs = matches!(name.as_str(), "RUN" | "COPY" | "ADD") && !rest.starts_with('[');
    let heredocs = rest.split_whitespace().filter(|_| has_heredocs).filter_map(Heredoc::begun_by).collect();
    let takes_list = matches!(
        name.as_str(),
        "ADD" | "CMD" | "COPY" | "ENTRYPOINT" | "HEALTHCHECK" | "RUN" | "SHELL" | "VOLUME"
    );
    let list = match takes_list && rest.starts_with('[') {
        true => serde_json::from_str::<Vec<String>>(rest).ok(),
        false => None,
    };
    let arguments = list.map_or_else(|| Arguments::Text(rest.to_owned()), Arguments::List);
    Ok(Instruction { line, name, flags, arguments, heredocs })
}

impl Heredoc {
    /// `<<EOF`, `<<-"EOF"`; in a shell's `1<<2` or `$((1 << 2))` there is none.
    fn begun_by(word: &str) -> Option<Heredoc> {
        let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
        let (strip, rest) = rest.strip_prefix('-').map_or((false, rest), |rest| (true, rest));
        let quoted = ['"', '\''].iter().find_map(|q| rest.strip_prefix(*q)?.strip_suffix(*q));
        let name = quoted.unwrap_or(rest);
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
        is_name.then(|| Heredoc {
            name: name.to_owned(),
            expand: quoted.is_none(),
            strip,
            text: String::new(),
        })
    }

    fn read<'a>(&mut self, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Result<(), String> {
        for (_, line) in lines {
            let line = if self.strip { line.trim_start_matches('\t') } else { line };
            if line == self.name {
                return Ok(());
            }
            self.text.push_str(line);
            self.text.push('\n');
        }
        Err(format!("unterminated heredoc {}", self.name))
    }

    /// What the file holds. Quotes mean nothing in it.
    pub fn content(&self, escape: char, variables: &Variables) -> Result<String, String> {
        if !self.expand {
            return Ok(self.text.clone());
        }
        let pieces = self.text.split_inclusive(['\'', '"']).map(|piece| {
            let (plain, quote) = match piece.strip_suffix(['\'', '"']) {
                Some(plain) => (plain, &piece[plain.len()..]),
                None => (piece, ""),
            };
            Ok(expand_all(plain, escape, variables)? + quote)
        });
        pieces.collect()
    }
}

/// Variables as instructions see them.
pub type Variables = BTreeMap<String, String>;

/// Splits a text into words as a shell would, with quotes, escapes and variables undone.
pub fn words(text: &str, escape: char, variables: &Variables) -> Result<Vec<String>, String> {
    expand(text, escape, variables, true)
}

/// One word of the whole text: variables are undone, and quotes and spaces stay.
pub fn expand_all(text: &str, escape: char, variables: &Variables) -> Result<String, String> {
    Ok(expand(text, escape, variables, false)?.concat())
}

fn expand(text: &str, escape: char, variables: &Variables, split: bool) -> Result<Vec<String>, String> {
    let chars: Vec<char> = text.chars().collect();
    let (mut words, mut word, mut any) = (Vec::new(), String::new(), false);
    let (mut at, mut quote) = (0, None);
    while at < chars.len() {
        let c = chars[at];
        at += 1;
        match c {
            c if split && quote.is_none() && c.is_whitespace() => {
                if std::mem::take(&mut any) {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            '\'' | '"' if quote.is_none() => {
                quote = Some(c);
                if !split {
                    word.push(c);
                }
            }
            c if Some(c) == quote => {
                quote = None;
                if !split {
                    word.push(c);
                }
            }
            c if c == escape && quote != Some('\'') && at < chars.len() => {
                let next = chars[at];
                at += 1;
                // Within quotes only what would else mean something.
                if (quote.is_some() && !matches!(next, '"' | '$') && next != escape) || !split && next != '$'
                {
                    word.push(c);
                }
                word.push(next);
            }
            '$' if quote != Some('\'') => word.push_str(&variable(&chars, &mut at, variables, 0)?),
            c => word.push(c),
        }
        any = true;
        if word.len() > WORD_MAX {
            return Err("variables make a word too long".to_owned());
        }
    }
    if quote.is_some() && split {
        return Err("unexpected end of statement while looking for matching quote".to_owned());
    }
    if any {
        words.push(word);
    }
    Ok(words)
}

/// What stands after a `$`: `NAME`, `{NAME}`, `{NAME:-word}`, `{NAME:+word}`, `{NAME:?word}`.
fn variable(chars: &[char], at: &mut usize, variables: &Variables, depth: usize) -> Result<String, String> {
    let name_from = |from: usize| {
        let is_name = |c: &&char| c.is_ascii_alphanumeric() || **c == '_';
        chars[from..].iter().take_while(is_name).collect::<String>()
    };
    if chars.get(*at) != Some(&'{') {
        let name = name_from(*at);
        if name.is_empty() {
            return Ok("$".to_owned());
        }
        *at += name.len();
        return Ok(variables.get(&name).cloned().unwrap_or_default());
    }
    let name = name_from(*at + 1);
    let bad = || "bad substitution".to_owned();
    if name.is_empty() || depth > 10 {
        return Err(bad());
    }
    *at += 1 + name.len();
    let (mut colon, mut operator) = (false, None);
    if chars.get(*at) == Some(&':') {
        colon = true;
        *at += 1;
    }
    if let Some(c @ ('-' | '+' | '?')) = chars.get(*at) {
        operator = Some(*c);
        *at += 1;
    }
    if colon && operator.is_none() {
        return Err(format!("unsupported modifier in substitution of {name}"));
    }
    let mut word = String::new();
    loop {
        match chars.get(*at) {
            None => return Err("syntax error: missing '}'".to_owned()),
            Some('}') => break,
            Some(_) if operator.is_none() => return Err(bad()),
            Some('$') => {
                *at += 1;
                word.push_str(&variable(chars, at, variables, depth + 1)?);
            }
            Some(c) => {
                *at += 1;
                word.push(*c);
            }
        }
        if word.len() > WORD_MAX {
            return Err("variables make a word too long".to_owned());
        }
    }
    *at += 1;
    let value = variables.get(&name).filter(|value| !colon || !value.is_empty());
    match (operator, value) {
        (Some('+'), Some(_)) => Ok(word),
        (Some('+'), None) => Ok(String::new()),
        (Some('-'), None) => Ok(word),
        (Some('?'), None) if word.is_empty() => Err(format!("{name}: is not allowed to be unset")),
        (Some('?'), None) => Err(format!("{name}: {word}")),
        (_, value) => Ok(value.cloned().unwrap_or_default()),
    }
}

/// `KEY=value KEY2="a b"`, or of old `KEY the rest`.
pub fn pairs(text: &str, escape: char, variables: &Variables) -> Result<Vec<(String, String)>, String> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (key, value) = text.split_once(char::is_whitespace).ok_or("must have two arguments")?;
        let value = words(value.trim(), escape, variables)?.join(" ");
        return Ok(vec![(key.to_owned(), value)]);
    }
    let split = words(text, escape, variables)?.into_iter().map(|word| match word.split_once('=') {
        Some(("", _)) => Err("names can not be blank".to_owned()),
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err(format!("Syntax error - can't find = in {word:?}. Must be of the form: name=value")),
    });
    split.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: Result<&[&str], &str>) {
        let got = parse(text).map(|f| f.instructions.iter().map(Instruction::shown).collect::<Vec<_>>());
        match want {
            Ok(want) => assert_eq!(got.expect("it is good"), want),
            Err(want) => assert_eq!(got.expect_err("it is wrong").to_string(), want),
        }
    }

    #[test]
    fn lines_become_instructions() {
        check("from scratch\n# a comment\ncopy a b\n", Ok(&["FROM scratch", "COPY a b"]));
        check("FROM a\nRUN x \\\n  # in between\n\n  y\nCMD z", Ok(&["FROM a", "RUN x   y", "CMD z"]));
        check("# escape=`\nFROM a\nRUN x `\n y\\", Ok(&["FROM a", "RUN x  y\\"]));
        check("FROM a\nCMD [\"a\", \"b c\"]", Ok(&["FROM a", "CMD [\"a\",\"b c\"]"]));
        check("FROM a\nCMD [a, b]", Ok(&["FROM a", "CMD [a, b]"]));
        check("FROM a\nCOPY --from=x --chown=1:2 a b", Ok(&["FROM a", "COPY --from=x --chown=1:2 a b"]));
        check("ARG V=1\nFROM a:$V AS b", Ok(&["ARG V=1", "FROM a:$V AS b"]));
        check("FROM a\nRUN x \\", Ok(&["FROM a", "RUN x"]));
        check("FROM a\nRUN echo $((1<<2)) 1<<2", Ok(&["FROM a", "RUN echo $((1<<2)) 1<<2"]));
        check("", Err("line 1: file with no instructions"));
        check("\nRUN x", Err("line 2: no build stage in current context: FROM must come first"));
        check("FROM a\nFLY b", Err("line 2: unknown instruction: FLY"));
        check("FROM a\nCOPY", Err("line 2: COPY requires at least one argument"));
        check("FROM a\nRUN --mount=type=cache x", Err("line 2: RUN --mount is not supported"));
        check("FROM a\nRUN <<EOF\nx\n\n# y\nEOF\nCMD z", Ok(&["FROM a", "RUN x ...", "CMD z"]));
        check(
            "FROM a\nCOPY <<A <<-\"B\" /\nx\nA\n\ty\n\tB\nCMD z",
            Ok(&["FROM a", "COPY <<A <<-\"B\" /", "CMD z"]),
        );
        check("FROM a\nRUN <<EOF\nx\n", Err("line 2: unterminated heredoc EOF"));
        check("FROM a\nRUN <<EOF\nEOF\n", Err("line 2: RUN requires at least one argument"));
        check(
            "FROM a\nRUN <<EOF\n#!/bin/python\nEOF\n",
            Err("line 2: RUN <<: a script with an interpreter of its own is not supported"),
        );
        check("FROM a\nONBUILD RUN x", Err("line 2: ONBUILD is not supported"));
        check("# escape=x\nFROM a", Err("line 1: invalid escape token \"x\" does not match ` or \\"));
    }

    #[test]
    fn heredocs_are_files_and_scripts() {
        let parsed = |text: &str| parse(text).expect("it is good").instructions.remove(1);
        let arguments = |text: &str| match parsed(text).arguments {
            Arguments::Text(text) => text,
            Arguments::List(list) => list.join("|"),
        };
        assert_eq!(arguments("FROM a\nRUN <<EOF\na $B\n  c\nEOF"), "a $B\n  c\n");
        assert_eq!(
            arguments("FROM a\nRUN cat <<-E 3<<'F' > x\n\t1\nE\n2\nF"),
            "cat <<-E 3<<'F' > x\n1\nE\n2\nF"
        );
        let heredocs = parsed("FROM a\nCOPY <<A <<'B' /\nit's \"$V\" \\$V\nA\n$V\nB").heredocs;
        let variables = Variables::from([("V".to_owned(), "1".to_owned())]);
        let contents: Vec<_> =
            heredocs.iter().map(|h| h.content('\\', &variables).expect("it is good")).collect();
        assert_eq!(contents, ["it's \"1\" $V\n", "$V\n"]);
    }

    #[track_caller]
    fn check_words(text: &str, want: Result<&[&str], &str>) {
        let variables = [("A", "1"), ("B", "x y"), ("E", "")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let got = words(text, '\\', &variables.into());
        match want {
            Ok(want) => assert_eq!(got.expect("it is good"), want, "{text}"),
            Err(want) => assert_eq!(got.expect_err("it is wrong"), want, "{text}"),
        }
    }

    #[test]
    fn words_are_what_a_shell_makes_of_them() {
        check_words("a  b", Ok(&["a", "b"]));
        check_words("\"a b\" 'c d' e\\ f", Ok(&["a b", "c d", "e f"]));
        check_words("$A ${A}b \"$B\" $B '$A' \\$A", Ok(&["1", "1b", "x y", "x y", "$A", "$A"]));
        check_words(
            "${N:-d$A} ${A:-d} ${E:-d} ${E-d}x ${A:+set}${N:+set}",
            Ok(&["d1", "1", "d", "x", "set"]),
        );
        check_words("a$ $- ''", Ok(&["a$", "$-", ""]));
        check_words("${N:?gone}", Err("N: gone"));
        check_words("${A", Err("syntax error: missing '}'"));
        check_words("${A!}", Err("bad substitution"));
        check_words("${}", Err("bad substitution"));
        check_words("\"a", Err("unexpected end of statement while looking for matching quote"));
        let none = Variables::new();
        assert_eq!(
            pairs("A=1 B=\"x y\"", '\\', &none).unwrap(),
            [("A".into(), "1".into()), ("B".into(), "x y".into())]
        );
        assert_eq!(pairs("A x y", '\\', &none).unwrap(), [("A".to_owned(), "x y".to_owned())]);
        assert!(pairs("A", '\\', &none).is_err() && pairs("A=1 B", '\\', &none).is_err());
    }
}
