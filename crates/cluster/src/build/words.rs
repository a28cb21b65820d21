//! Words of instructions: quotes, escapes, and `$VARIABLES` in them.

use std::collections::BTreeMap;

use super::ignore::glob;

/// Most bytes that variables may make of a word.
const WORD_MAX: usize = 1 << 20;
/// Most characters of a value that `${NAME%pattern}` and its like work on.
const EDITED_MAX: usize = 1000;

/// Variables as instructions see them.
pub type Variables = BTreeMap<String, String>;

/// Splits a text into words as a shell would, with quotes, escapes and variables undone.
pub fn words(text: &str, escape: char, variables: &Variables) -> Result<Vec<String>, String> {
    expand(text, escape, variables, true)
}

/// The words of a text as they stand, with their quotes.
pub fn raw(text: &str, escape: char) -> Vec<&str> {
    let (mut words, mut begun, mut quote, mut escaped) = (Vec::new(), None, None, false);
    for (at, c) in text.char_indices() {
        if quote.is_none() && !escaped && c.is_whitespace() {
            words.extend(begun.take().map(|from: usize| &text[from..at]));
            continue;
        }
        begun.get_or_insert(at);
        match c {
            _ if std::mem::take(&mut escaped) => {}
            c if c == escape && quote != Some('\'') => escaped = true,
            '\'' | '"' if quote.is_none() => quote = Some(c),
            c if Some(c) == quote => quote = None,
            _ => {}
        }
    }
    words.extend(begun.map(|from| &text[from..]));
    words
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

/// What stands after a `$`: `NAME`, `{NAME}`, `{NAME:-word}`, `{NAME:+word}`, `{NAME:?word}`, `{NAME#pattern}`,
/// `{NAME%pattern}` and `{NAME/pattern/text}`, the last three doubled as well.
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
    if let Some(c @ ('-' | '+' | '?' | '#' | '%' | '/')) =
        chars.get(*at).filter(|c| !colon || "-+?".contains(**c))
    {
        operator = Some(*c);
        *at += 1;
    }
    let doubled = matches!(operator, Some('#' | '%' | '/')) && chars.get(*at).copied() == operator;
    *at += usize::from(doubled);
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
        (Some(edit @ ('#' | '%' | '/')), Some(value)) => edited(value, edit, doubled, &word),
        (_, value) => Ok(value.cloned().unwrap_or_default()),
    }
}

/// A value without the beginning (`#`) or end (`%`) that a pattern names, the shortest or, `doubled`, the longest; or (`/`)
/// with what it names replaced, the first time or every time.
fn edited(value: &str, edit: char, doubled: bool, word: &str) -> Result<String, String> {
    let chars: Vec<char> = value.chars().collect();
    if chars.len() > EDITED_MAX {
        return Err(format!("a value of more than {EDITED_MAX} characters cannot be edited"));
    }
    let text = |range: std::ops::Range<usize>| chars[range].iter().collect::<String>();
    let all = chars.len();
    if edit == '/' {
        let (pattern, with) = word.split_once('/').unwrap_or((word, ""));
        let (mut out, mut at, mut done) = (String::new(), 0, pattern.is_empty());
        while at < all {
            let end = (at + 1..=all).rev().filter(|_| !done).find(|end| glob(pattern, &text(at..*end)));
            match end {
                Some(end) => {
                    out += with;
                    (at, done) = (end, !doubled);
                }
                None => {
                    out.push(chars[at]);
                    at += 1;
                }
            }
        }
        return Ok(out);
    }
    let mut lengths = (0..=all).map(|n| if doubled { all - n } else { n });
    Ok(match edit {
        '#' => lengths.find(|n| glob(word, &text(0..*n))).map_or(value.to_owned(), |n| text(n..all)),
        _ => lengths.find(|n| glob(word, &text(all - n..all))).map_or(value.to_owned(), |n| text(0..all - n)),
    })
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
    fn check_words(text: &str, want: Result<&[&str], &str>) {
        let variables = [("A", "1"), ("B", "x y"), ("E", ""), ("P", "a/b/c.tar.gz")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
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
        check_words(
            "${P%.*} ${P%%.*} ${P#*/} ${P##*/} ${P%nothing}",
            Ok(&["a/b/c.tar", "a/b/c", "b/c.tar.gz", "c.tar.gz", "a/b/c.tar.gz"]),
        );
        check_words(
            "${P/a/x} ${P//[abc]/-} ${P/.*} ${N#x} ${P//}",
            Ok(&["x/b/c.tar.gz", "-/-/-.t-r.gz", "a/b/c", "", "a/b/c.tar.gz"]),
        );
        check_words("${A:#x}", Err("unsupported modifier in substitution of A"));
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
