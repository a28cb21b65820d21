//! `.dockerignore`: which files of the context are left out.
//!
//! Upstream: moby's patternmatcher. A pattern names a path from the context's root, with Go's `*`, `?` and `[...]` in
//! parts and `**` for any number of them; what lies below what it names is named as well; a later pattern that
//! begins with `!` takes back.

/// The patterns of a file, in order.
#[derive(Debug, Default)]
pub struct Ignore(Vec<Pattern>);

#[derive(Debug)]
struct Pattern {
    parts: Vec<String>,
    takes_back: bool,
}

/// Most patterns that are heeded.
const PATTERNS_MAX: usize = 10_000;

impl Ignore {
    pub fn parse(text: &str) -> Ignore {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().filter(|line| !line.starts_with('#')).map(str::trim);
        let patterns = lines.filter(|line| !line.is_empty() && *line != "!").map(|line| {
            let (takes_back, line) = match line.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, line),
            };
            let mut parts: Vec<String> = Vec::new();
            for part in line.split('/') {
                match part {
                    "" | "." => {}
                    ".." => drop(parts.pop()),
                    part => parts.push(part.to_owned()),
                }
            }
            Pattern { parts, takes_back }
        });
        Ignore(patterns.filter(|p| !p.parts.is_empty()).take(PATTERNS_MAX).collect())
    }

    /// Whether a path, in its parts, is left out.
    pub fn ignores(&self, path: &[&str]) -> bool {
        let mut ignored = false;
        for pattern in &self.0 {
            // One that would change nothing need not be looked at.
            if pattern.takes_back == ignored && (1..=path.len()).any(|n| matches(&pattern.parts, &path[..n]))
            {
                ignored = !pattern.takes_back;
            }
        }
        ignored
    }

    /// Whether something below a directory that is left out may be taken back.
    pub fn takes_back(&self) -> bool {
        self.0.iter().any(|pattern| pattern.takes_back)
    }
}

/// Whether a pattern names exactly this path. By a table, so that many `**` cost no more than few.
fn matches(pattern: &[String], path: &[&str]) -> bool {
    // reached[n]: the pattern so far names the first n parts.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    for part in pattern {
        let mut next = vec![false; path.len() + 1];
        if part == "**" {
            let mut any = false;
            for (n, before) in reached.iter().enumerate() {
                any |= before;
                next[n] = any;
            }
        } else {
            for n in 0..path.len() {
                next[n + 1] = reached[n] && glob(part, path[n]);
            }
        }
        reached = next;
    }
    reached[path.len()]
}

/// Go's filepath.Match for one part of a path. A pattern that is malformed matches nothing.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where to go on when what follows the last `*` does not fit: it takes one more.
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            None if t == text.len() => return true,
            None => None,
            Some('*') => {
                retry = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some('?') if t < text.len() => Some(p + 1),
            Some('[') => match text.get(t) {
                Some(c) => class(&pattern, p, *c),
                None => None,
            },
            Some('\\') if p + 1 < pattern.len() => (text.get(t) == Some(&pattern[p + 1])).then_some(p + 2),
            Some(c) => (text.get(t) == Some(c)).then_some(p + 1),
        };
        match (step, retry) {
            (Some(next), _) => (p, t) = (next, t + 1),
            (None, Some((after, from))) if from < text.len() => {
                retry = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
            _ => return false,
        }
    }
}

/// Where the class that begins at `at` ends, if `c` is in it.
fn class(pattern: &[char], at: usize, c: char) -> Option<usize> {
    let mut p = at + 1;
    let negated = pattern.get(p) == Some(&'^');
    p += usize::from(negated);
    let (mut found, mut first) = (false, true);
    loop {
        let one = |p: &mut usize| -> Option<char> {
            if pattern.get(*p) == Some(&'\\') {
                *p += 1;
            }
            let c = pattern.get(*p).copied();
            *p += 1;
            c
        };
        match pattern.get(p)? {
            ']' if !first => return (found != negated).then_some(p + 1),
            _ => {
                let low = one(&mut p)?;
                let mut high = low;
                if pattern.get(p) == Some(&'-') {
                    p += 1;
                    high = one(&mut p)?;
                }
                found |= low <= c && c <= high;
                first = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(patterns: &str, path: &str, want: bool) {
        let parts: Vec<&str> = path.split('/').collect();
        assert_eq!(Ignore::parse(patterns).ignores(&parts), want, "{patterns:?} {path}");
    }

    #[test]
    fn patterns_name_paths_and_what_is_below() {
        check("a", "a", true);
        check("a", "b/a", false);
        check("/a/", "a/b/c", true);
        check("*.log", "x.log", true);
        check("*.log", "d/x.log", false);
        check("**/*.log", "d/e/x.log", true);
        check("**/*.log", "x.log", true);
        check("a/**/z", "a/z", true);
        check("a/**", "a/b", true);
        check("# a\n\n./b", "b", true);
        check("# a", "# a", false);
        check("*\n!keep", "keep", false);
        check("*\n!keep", "other", true);
        check("d\n!d/keep", "d/keep", false);
        check("!a\na", "a", true);
        check("a/../b", "b", true);
        check("[", "[", false);
        let many = "**/".repeat(500) + "x";
        check(&many, &"y/".repeat(500), false);
    }

    #[test]
    fn globs_are_gos() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abcd", false),
            ("*a*b", "xaxb", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("[\\]]", "]", true),
            ("[]a]", "]", true),
            ("a[", "a", false),
        ] {
            assert_eq!(glob(pattern, text), want, "{pattern} {text}");
        }
    }
}
