//! Scenarios: a script of commands and the output they should have.
//!
//! ```text
//! #! kubectl oldest newest                        once with each; `#! kubectl all` takes every one at hand
//! #! cluster none                                 the script brings up what it wants
//! # A comment.
//! $ kubectl get deploy web -o jsonpath='{.status.readyReplicas}'      # within 30s
//! 3
//! $ kubectl get pods                              every line must match; `...` stands for any text,
//! NAME ... AGE                                    and alone on a line for any number of lines
//! ...
//! $ kubectl get pod nosuch
//! Error from server (NotFound): pods "nosuch" not found
//! [exit 1]
//! ```
//! Output is standard output and error together. A command with `# within` is tried until it matches or the time is up;
//! others have one try. What is quoted by a heredoc in a command goes on over lines that begin with `> `.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How long a command may run when it does not say.
const TIME: Duration = Duration::from_secs(90);

#[derive(Debug, Default, PartialEq)]
pub struct Scenario {
    pub kubectls: Vec<String>,
    /// No cluster is up at the start: `#! cluster none`.
    pub bare: bool,
    pub steps: Vec<Step>,
}

#[derive(Debug, PartialEq)]
pub struct Step {
    /// Line of the file, from 1.
    pub line: usize,
    pub command: String,
    pub expected: Vec<String>,
    pub exit: i32,
    /// Tried again for so long.
    pub within: Option<Duration>,
}

impl Step {
    pub fn time(&self) -> Duration {
        self.within.unwrap_or(TIME)
    }
}

pub fn parse(text: &str) -> Result<Scenario> {
    let mut scenario = Scenario::default();
    let mut in_command = false;
    for (number, line) in text.lines().enumerate() {
        let number = number + 1;
        if let Some(directive) = line.strip_prefix("#! ") {
            let mut words = directive.split_whitespace();
            match words.next() {
                Some("cluster") if words.next() == Some("none") => scenario.bare = true,
                Some("kubectl") => scenario.kubectls = words.map(str::to_owned).collect(),
                _ => bail!("line {number}: unknown directive {directive}"),
            }
        } else if let Some(command) = line.strip_prefix("$ ") {
            let (command, within) = match command.rsplit_once("# within ") {
                Some((command, time)) => {
                    (command.trim_end(), Some(duration(time).with_context(|| format!("line {number}"))?))
                }
                None => (command, None),
            };
            let command = command.to_owned();
            scenario.steps.push(Step { line: number, command, expected: Vec::new(), exit: 0, within });
            in_command = true;
            continue;
        } else if line.starts_with("# ") || line == "#" || line.is_empty() {
            // Comments and empty lines separate; output that has them is matched by `...`.
        } else {
            let step = scenario
                .steps
                .last_mut()
                .with_context(|| format!("line {number}: output before any command"))?;
            if let Some(more) =
                line.strip_prefix("> ").or_else(|| (line == ">").then_some("")).filter(|_| in_command)
            {
                step.command.push('\n');
                step.command.push_str(more);
                continue;
            }
            match line.strip_prefix("[exit ").and_then(|rest| rest.strip_suffix(']')) {
                Some(code) => {
                    step.exit = code.parse().with_context(|| format!("line {number}: exit code"))?
                }
                None => step.expected.push(line.to_owned()),
            }
        }
        in_command = false;
    }
    Ok(scenario)
}

fn duration(text: &str) -> Result<Duration> {
    let seconds = text.trim().strip_suffix('s').context("a time is written like 30s")?;
    Ok(Duration::from_secs(seconds.parse()?))
}

/// Why `output` is not what was expected, or nothing. Lines that are empty do not count.
pub fn mismatch(expected: &[String], output: &str) -> Option<String> {
    let lines: Vec<&str> = output.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let expected: Vec<&str> = expected.iter().map(|line| line.trim_end()).collect();
    if lines_match(&expected, &lines) {
        return None;
    }
    let mut text = String::new();
    for line in &expected {
        let _ = writeln!(text, "    expected | {line}");
    }
    for line in &lines {
        let _ = writeln!(text, "    got      | {line}");
    }
    if lines.is_empty() {
        text.push_str("    got nothing\n");
    }
    Some(text)
}

fn lines_match(expected: &[&str], lines: &[&str]) -> bool {
    match expected.split_first() {
        None => lines.is_empty(),
        Some((&"...", rest)) => (0..=lines.len()).any(|skip| lines_match(rest, &lines[skip..])),
        Some((first, rest)) => match lines.split_first() {
            Some((line, more)) => matches(first, line) && lines_match(rest, more),
            None => false,
        },
    }
}

/// Whether `line` is `pattern`, in which `...` stands for any text, and blanks for one blank or more.
fn matches(pattern: &str, line: &str) -> bool {
    let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (pattern, line) = (squeeze(pattern), squeeze(line));
    let mut pieces = pattern.split("...");
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty() };
    for piece in middle {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_read() {
        let text = "#! kubectl oldest newest\n# First.\n$ a b   # within 30s\nx ...\n\n$ cat <<E\n> one\n> two\n> E\none\ntwo\n[exit 3]\n";
        let scenario = parse(text).unwrap();
        assert_eq!(scenario.kubectls, ["oldest", "newest"]);
        let [first, second] = &scenario.steps[..] else { panic!("{scenario:?}") };
        assert_eq!((first.command.as_str(), first.within), ("a b", Some(Duration::from_secs(30))));
        assert_eq!(first.expected, ["x ..."]);
        assert_eq!((second.command.as_str(), second.exit), ("cat <<E\none\ntwo\nE", 3));
        assert_eq!(second.expected, ["one", "two"]);
        assert!(parse("output\n").is_err());
        assert!(parse("$ a # within soon\n").is_err());
    }

    #[track_caller]
    fn check(expected: &str, output: &str, want: bool) {
        let expected: Vec<String> = expected.lines().map(str::to_owned).collect();
        assert_eq!(mismatch(&expected, output).is_none(), want, "{expected:?} against {output:?}");
    }

    #[test]
    fn output_is_compared_line_by_line() {
        check("", "", true);
        check("", "x", false);
        check("a\nb", "a\nb\n", true);
        check("a\nb", "b\na\n", false);
        check("a", "a\nb\n", false);
        check("pod/... created", "pod/web-1 created", true);
        check("pod/... created", "pod/web-1 deleted", false);
        check("NAME ... AGE\n...", "NAME   READY   AGE\nx\ny\n", true);
        check("...\nlast", "a\nb\nlast", true);
        check("...\nlast", "a\nlast\nb", false);
        check("a...a", "a", false);
        check("a   b", "a b", true);
        check("...", "", true);
    }
}
