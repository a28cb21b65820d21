//! Reads Dockerfiles: lines, instructions, their flags, and files that stand in them.
//!
//! Upstream: the Dockerfile reference; BuildKit's frontend/dockerfile for the words of errors.

use super::words::{self, Variables};

/// Most bytes of a Dockerfile, and most instructions.
pub const FILE_MAX: usize = 1 << 20;
const INSTRUCTIONS_MAX: usize = 10_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instruction {
    /// From 1.
    pub line: usize,
    /// In upper case: `RUN`.
    pub name: String,
    /// `--from=x` is `("from", "x")`.
    pub flags: Vec<(String, String)>,
    pub arguments: Arguments,
    /// Files that stand in the Dockerfile itself, for COPY and ADD; for RUN only a script that names its interpreter,
    /// others are part of its text.
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
        let flag = |(name, value): &(String, String)| match flag_kind(&self.name, name) {
            Some(FlagKind::Switch) if value == "true" => format!(" --{name}"),
            _ => format!(" --{name}={value}"),
        };
        let flags: String = self.flags.iter().map(flag).collect();
        match &self.arguments {
            Arguments::Text(text) => match text.trim_end().split_once('\n') {
                Some((first, _)) => format!("{}{flags} {first} ...", self.name),
                None => format!("{}{flags} {}", self.name, text.trim_end()),
            },
            Arguments::List(list) => {
                format!("{}{flags} {}", self.name, serde_json::Value::from(list.clone()))
            }
        }
    }

    /// Puts the heredocs of a RUN, which have been read, where its shell finds them: one that stands alone is the
    /// script itself. For ONBUILD they are part of what is done later.
    fn settle(&mut self) -> Result<(), String> {
        let Arguments::Text(text) = &mut self.arguments else { return Ok(()) };
        if !matches!(self.name.as_str(), "RUN" | "ONBUILD") || self.heredocs.is_empty() {
            return Ok(());
        }
        if self.name == "RUN" && text.split_whitespace().count() == 1 {
            match &self.heredocs[0].text {
                script if script.starts_with("#!") => return Ok(()),
                script if script.trim().is_empty() => return Err(AT_LEAST_ONE.replace("%", "RUN")),
                _ => {}
            }
            *text = std::mem::take(&mut self.heredocs).remove(0).text;
            return Ok(());
        }
        for Heredoc { name, text: lines, .. } in std::mem::take(&mut self.heredocs) {
            *text = format!("{text}\n{lines}{name}");
        }
        Ok(())
    }

    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags(name).last()
    }

    /// All values of a flag that may be given more than once.
    pub fn flags(&self, name: &str) -> impl Iterator<Item = &str> {
        self.flags.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A flag that is either there or not.
    pub fn has(&self, name: &str) -> bool {
        self.flag(name) == Some("true")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct SyntaxError {
    pub line: usize,
    pub why: String,
}

/// The instructions, and what the comments at the very beginning say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    pub instructions: Vec<Instruction>,
    /// The character that escapes.
    pub escape: char,
    /// `# syntax=`: an image that knows how to read the file. It is read here all the same.
    pub syntax: Option<String>,
}

pub fn parse(text: &str) -> Result<Dockerfile, SyntaxError> {
    let fail = |line: usize, why: String| Err(SyntaxError { line, why });
    if text.len() > FILE_MAX {
        return fail(1, format!("the file is longer than {FILE_MAX} bytes"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (escape, syntax) = directives(text)?;
    let instructions = instructions(text, escape)?;
    match instructions.iter().find(|i| i.name != "ARG") {
        Some(first) if first.name == "FROM" => Ok(Dockerfile { instructions, escape, syntax }),
        Some(first) => fail(first.line, "no build stage in current context: FROM must come first".to_owned()),
        None => fail(1, "file with no instructions".to_owned()),
    }
}

/// What an image asks for by ONBUILD.
pub fn trigger(text: &str) -> Result<Instruction, String> {
    let mut found = instructions(text, '\\').map_err(|error| error.why)?;
    match (found.len(), text.len() <= FILE_MAX) {
        (1, true) => {
            check_trigger(&found[0].name)?;
            Ok(found.remove(0))
        }
        _ => Err("it is not one instruction".to_owned()),
    }
}

fn check_trigger(name: &str) -> Result<(), String> {
    match name {
        "ONBUILD" => Err("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed".to_owned()),
        "FROM" | "MAINTAINER" => Err(format!("{name} isn't allowed as an ONBUILD trigger")),
        _ => Ok(()),
    }
}

fn instructions(text: &str, escape: char) -> Result<Vec<Instruction>, SyntaxError> {
    let fail = |line: usize, why: String| Err(SyntaxError { line, why });
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
            let more = line.trim_end().strip_suffix(escape);
            // One that is escaped itself is a plain character.
            if let Some(more) = more.filter(|more| !more.ends_with(escape)) {
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
            let mut instruction = instruction(begun, whole.trim(), escape)?;
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
        instructions.push(instruction(begun, joined.trim(), escape)?);
    }
    Ok(instructions)
}

/// The comments at the very beginning: `# escape=` and `# syntax=`.
fn directives(text: &str) -> Result<(char, Option<String>), SyntaxError> {
    let (mut escape, mut syntax) = (None, None);
    for (number, line) in text.lines().enumerate() {
        let directive = line.trim().strip_prefix('#').and_then(|comment| comment.split_once('='));
        let Some((name, value)) = directive else { break };
        let name = name.trim().to_ascii_lowercase();
        let wrong = |why: String| Err(SyntaxError { line: number + 1, why });
        match (name.as_str(), value.trim()) {
            ("escape", _) if escape.is_some() => {
                return wrong("only one escape parser directive can be used".to_owned());
            }
            ("escape", "\\") => escape = Some('\\'),
            ("escape", "`") => escape = Some('`'),
            ("escape", other) => {
                return wrong(format!("invalid escape token {other:?} does not match ` or \\"));
            }
            ("syntax", image) => syntax = Some(image.to_owned()),
            ("check", _) => {}
            // The first other comment ends them.
            _ => break,
        }
    }
    Ok((escape.unwrap_or('\\'), syntax))
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
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

const AT_LEAST_ONE: &str = "% requires at least one argument";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FlagKind {
    Text,
    /// May be given more than once.
    Texts,
    Switch,
}

/// The flags that an instruction takes.
fn flags_of(name: &str) -> &'static [(&'static str, FlagKind)] {
    use FlagKind::{Switch, Text, Texts};
    match name {
        "FROM" => &[("platform", Text)],
        "COPY" => &[
            ("from", Text),
            ("chown", Text),
            ("chmod", Text),
            ("link", Switch),
            ("parents", Switch),
            ("exclude", Texts),
        ],
        "ADD" => &[
            ("chown", Text),
            ("chmod", Text),
            ("link", Switch),
            ("keep-git-dir", Switch),
            ("checksum", Text),
            ("unpack", Switch),
            ("exclude", Texts),
        ],
        "RUN" => &[("mount", Texts), ("network", Text), ("security", Text)],
        "HEALTHCHECK" => &[
            ("interval", Text),
            ("timeout", Text),
            ("start-period", Text),
            ("start-interval", Text),
            ("retries", Text),
        ],
        _ => &[],
    }
}

fn flag_kind(instruction: &str, flag: &str) -> Option<FlagKind> {
    flags_of(instruction).iter().find(|(name, _)| *name == flag).map(|(_, kind)| *kind)
}

/// `--name` or `--name=value`, without the dashes; `before` are those that the instruction has already.
fn flag(instruction: &str, text: &str, before: &[(String, String)]) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
    let Some(kind) = flag_kind(instruction, name) else {
        let known = flags_of(instruction).iter().map(|(name, _)| *name);
        return Err(format!("unknown flag: --{name}{}", meant(name, known)));
    };
    if kind != FlagKind::Texts && before.iter().any(|(known, _)| known == name) {
        return Err(format!("duplicate flag specified: --{name}"));
    }
    let value = match (kind, value) {
        (FlagKind::Switch, None) => "true".to_owned(),
        (_, None) | (FlagKind::Switch, Some("")) => return Err(format!("missing a value on flag: --{name}")),
        (FlagKind::Switch, Some(value)) => match value.to_ascii_lowercase().as_str() {
            value @ ("true" | "false") => value.to_owned(),
            _ => return Err(format!("expecting boolean value for flag --{name}, not: {value}")),
        },
        (_, Some(value)) => value.to_owned(),
    };
    Ok((name.to_owned(), value))
}

/// ` (did you mean x?)`, for something that is nearly written like one of the known.
pub fn meant<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let distance = |known: &'a str| {
        let (given, known): (Vec<char>, Vec<char>) =
            (given.to_lowercase().chars().take(40).collect(), known.to_lowercase().chars().collect());
        let mut row: Vec<usize> = (0..=known.len()).collect();
        for (i, a) in given.iter().enumerate() {
            let mut corner = std::mem::replace(&mut row[0], i + 1);
            for (j, b) in known.iter().enumerate() {
                let cost = (corner + usize::from(a != b)).min(row[j] + 1).min(row[j + 1] + 1);
                corner = std::mem::replace(&mut row[j + 1], cost);
            }
        }
        row[known.len()]
    };
    let nearest = known.map(|known| (distance(known), known)).min();
    match nearest {
        Some((1..=2, known)) => format!(" (did you mean {known}?)"),
        _ => String::new(),
    }
}

fn instruction(line: usize, text: &str, escape: char) -> Result<Instruction, SyntaxError> {
    let fail = |why: String| Err(SyntaxError { line, why });
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = word.to_ascii_uppercase();
    if !KNOWN.contains(&name.as_str()) {
        return fail(format!("unknown instruction: {word}{}", meant(&name, KNOWN.iter().copied())));
    }
    let (mut flags, mut rest) = (Vec::new(), rest.trim());
    while let Some(after) = rest.strip_prefix("--") {
        let (word, after) = after.split_once(char::is_whitespace).unwrap_or((after, ""));
        rest = after.trim_start();
        if word.is_empty() {
            break;
        }
        let found = flag(&name, word, &flags).map_err(|why| SyntaxError { line, why })?;
        flags.push(found);
    }
    if rest.is_empty() {
        return fail(AT_LEAST_ONE.replace('%', &name));
    }
    if name == "ONBUILD" {
        let inner = rest.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
        check_trigger(&inner).map_err(|why| SyntaxError { line, why })?;
        let Instruction { heredocs, .. } = instruction(line, rest, escape)?;
        return Ok(Instruction { line, name, flags, arguments: Arguments::Text(rest.to_owned()), heredocs });
    }
    let has_heredocs = matches!(name.as_str(), "RUN" | "COPY" | "ADD") && !rest.starts_with('[');
    let heredocs = match has_heredocs {
        true => words::raw(rest, escape).into_iter().filter_map(Heredoc::begun_by).collect(),
        false => Vec::new(),
    };
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
            Ok(words::expand_all(plain, escape, variables)? + quote)
        });
        pieces.collect()
    }
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
        check("FROM a\nFRUM b", Err("line 2: unknown instruction: FRUM (did you mean FROM?)"));
        check("FROM a\nRUN echo \\\\\nRUN y", Ok(&["FROM a", "RUN echo \\\\", "RUN y"]));
        check("FROM a\nCOPY", Err("line 2: COPY requires at least one argument"));
        check(
            "FROM a\nRUN --mount=type=cache,target=/c --mount=target=. --network=none x",
            Ok(&["FROM a", "RUN --mount=type=cache,target=/c --mount=target=. --network=none x"]),
        );
        check("FROM a\nCOPY --link --parents=true a b", Ok(&["FROM a", "COPY --link --parents a b"]));
        check("FROM a\nRUN --mout=x y", Err("line 2: unknown flag: --mout (did you mean mount?)"));
        check("FROM a\nRUN --quick y", Err("line 2: unknown flag: --quick"));
        check("FROM a\nCOPY --from=a --from=b c d", Err("line 2: duplicate flag specified: --from"));
        check("FROM a\nCOPY --from c d", Err("line 2: missing a value on flag: --from"));
        check("FROM a\nCOPY --link=x c d", Err("line 2: expecting boolean value for flag --link, not: x"));
        check("FROM a\nRUN <<EOF\nx\n\n# y\nEOF\nCMD z", Ok(&["FROM a", "RUN x ...", "CMD z"]));
        check(
            "FROM a\nCOPY <<A <<-\"B\" /\nx\nA\n\ty\n\tB\nCMD z",
            Ok(&["FROM a", "COPY <<A <<-\"B\" /", "CMD z"]),
        );
        check("FROM a\nRUN <<EOF\nx\n", Err("line 2: unterminated heredoc EOF"));
        check("FROM a\nRUN <<EOF\nEOF\n", Err("line 2: RUN requires at least one argument"));
        check("FROM a\nRUN <<EOF\n#!/bin/python\nEOF\n", Ok(&["FROM a", "RUN <<EOF"]));
        check("FROM a\nRUN echo \"a <<EOF b\" '<<X'", Ok(&["FROM a", "RUN echo \"a <<EOF b\" '<<X'"]));
        check("FROM a\nONBUILD RUN x \\\n y", Ok(&["FROM a", "ONBUILD RUN x  y"]));
        check("FROM a\nONBUILD RUN <<E\nx\nE\nCMD y", Ok(&["FROM a", "ONBUILD RUN <<E ...", "CMD y"]));
        check(
            "FROM a\nONBUILD ONBUILD RUN x",
            Err("line 2: Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
        );
        check("FROM a\nONBUILD FROM x", Err("line 2: FROM isn't allowed as an ONBUILD trigger"));
        check("FROM a\nONBUILD FLY x", Err("line 2: unknown instruction: FLY"));
        check("FROM a\nONBUILD", Err("line 2: ONBUILD requires at least one argument"));
        check("# syntax=x\n# escape=`\nFROM a\nRUN x `\n y", Ok(&["FROM a", "RUN x  y"]));
        check("# just = this\n# escape=`\nFROM a\nRUN x `", Ok(&["FROM a", "RUN x `"]));
        check("#escape=`\n#escape=`\nFROM a", Err("line 2: only one escape parser directive can be used"));
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
}
