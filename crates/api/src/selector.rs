//! Label and field selectors: parsed once, matched against object headers.
//!
//! Grammar and messages: upstream apimachinery, pkg/labels and pkg/fields.

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;

use crate::{Kind, Labels, Object};

/// Longest selector text that is looked at, in bytes; a URL is shorter.
const MAX_TEXT: usize = 64 * 1024;

/// Why a selector was refused; the text is upstream's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);

/// All requirements must hold. The empty selector matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
    /// A selector that matches nothing, as the absent selector of some kinds does.
    nothing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    // Equality is kept apart from sets of one value: each is printed as it was written.
    Equals(String),
    NotEquals(String),
    In(Vec<String>),
    NotIn(Vec<String>),
    GreaterThan(i64),
    LessThan(i64),
}

impl LabelSelector {
    pub fn nothing() -> LabelSelector {
        LabelSelector { requirements: Vec::new(), nothing: true }
    }

    /// Equality on every pair, as ReplicationControllers and Services select.
    pub fn from_pairs<K: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        let requirements = pairs
            .into_iter()
            .map(|(key, value)| Requirement { key: key.into(), test: Test::Equals(value.into()) })
            .collect();
        LabelSelector { requirements, nothing: false }
    }

    /// The selector of workloads: `matchLabels` and `matchExpressions`.
    pub fn from_spec(spec: &meta::LabelSelector) -> Result<LabelSelector, SelectorError> {
        let mut selector = LabelSelector::from_pairs(spec.match_labels.clone().unwrap_or_default());
        for expression in spec.match_expressions.iter().flatten() {
            let values = expression.values.clone().unwrap_or_default();
            let test = match expression.operator.as_str() {
                "In" => Test::In(values),
                "NotIn" => Test::NotIn(values),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::Absent,
                other => {
                    return Err(SelectorError(format!("{other:?} is not a valid label selector operator")));
                }
            };
            selector.requirements.push(Requirement { key: expression.key.clone(), test });
        }
        Ok(selector)
    }

    /// The text form: `a=b,c in (d, e),!f,g`.
    pub fn parse(text: &str) -> Result<LabelSelector, SelectorError> {
        if text.len() > MAX_TEXT {
            return Err(SelectorError("unable to parse requirement: selector is too long".to_owned()));
        }
        let mut parser = Parser { tokens: tokenize(text), at: 0 };
        let mut requirements = Vec::new();
        if parser.peek() == &Token::End {
            return Ok(LabelSelector::default());
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.next() {
                Token::Comma => {}
                Token::End => return Ok(LabelSelector { requirements, nothing: false }),
                other => {
                    return Err(SelectorError(format!(
                        "found '{}', expected: ',' or 'end of string'",
                        other.text()
                    )));
                }
            }
        }
    }

    pub fn is_everything(&self) -> bool {
        self.requirements.is_empty() && !self.nothing
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        !self.nothing && self.requirements.iter().all(|r| r.holds(labels.get(&r.key)))
    }

    /// Matches the labels of a typed object.
    pub fn matches_map(&self, labels: Option<&std::collections::BTreeMap<String, String>>) -> bool {
        let get = |key: &str| labels.and_then(|labels| labels.get(key)).map(String::as_str);
        !self.nothing && self.requirements.iter().all(|r| r.holds(get(&r.key)))
    }
}

impl std::fmt::Display for LabelSelector {
    /// The text form, as scale subresources and `kubectl` show it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut sorted: Vec<&Requirement> = self.requirements.iter().collect();
        sorted.sort_by(|a, b| a.key.cmp(&b.key));
        for (n, requirement) in sorted.into_iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            let key = &requirement.key;
            match &requirement.test {
                Test::Exists => write!(f, "{key}")?,
                Test::Absent => write!(f, "!{key}")?,
                Test::Equals(value) => write!(f, "{key}={value}")?,
                Test::In(values) => write!(f, "{key} in ({})", sorted_list(values))?,
                Test::NotEquals(value) => write!(f, "{key}!={value}")?,
                Test::NotIn(values) => write!(f, "{key} notin ({})", sorted_list(values))?,
                Test::GreaterThan(n) => write!(f, "{key}>{n}")?,
                Test::LessThan(n) => write!(f, "{key}<{n}")?,
            }
        }
        Ok(())
    }
}

fn sorted_list(values: &[String]) -> String {
    let mut values: Vec<&str> = values.iter().map(String::as_str).collect();
    values.sort_unstable();
    values.join(",")
}

impl Requirement {
    fn holds(&self, value: Option<&str>) -> bool {
        match &self.test {
            Test::Exists => value.is_some(),
            Test::Absent => value.is_none(),
            Test::Equals(wanted) => value == Some(wanted),
            Test::NotEquals(other) => value != Some(other),
            Test::In(values) => value.is_some_and(|value| values.iter().any(|v| v == value)),
            Test::NotIn(values) => value.is_none_or(|value| values.iter().all(|v| v != value)),
            Test::GreaterThan(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
            Test::LessThan(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(String),
    Comma,
    Open,
    Close,
    Not,
    Equals(&'static str),
    NotEquals,
    Greater,
    Less,
    End,
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Token::Word(word) => word,
            Token::Comma => ",",
            Token::Open => "(",
            Token::Close => ")",
            Token::Not => "!",
            Token::Equals(text) => text,
            Token::NotEquals => "!=",
            Token::Greater => ">",
            Token::Less => "<",
            Token::End => "",
        }
    }
}

fn tokenize(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let (token, len) = match c {
            ' ' | '\t' | '\r' | '\n' => {
                rest = &rest[1..];
                continue;
            }
            ',' => (Token::Comma, 1),
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            '>' => (Token::Greater, 1),
            '<' => (Token::Less, 1),
            '!' if rest.starts_with("!=") => (Token::NotEquals, 2),
            '!' => (Token::Not, 1),
            '=' if rest.starts_with("==") => (Token::Equals("=="), 2),
            '=' => (Token::Equals("="), 1),
            _ => {
                let end = rest
                    .find([' ', '\t', '\r', '\n', ',', '(', ')', '>', '<', '!', '='])
                    .unwrap_or(rest.len());
                (Token::Word(rest[..end].to_owned()), end)
            }
        };
        tokens.push(token);
        rest = &rest[len..];
    }
    tokens.push(Token::End);
    tokens
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at]
    }

    fn next(&mut self) -> Token {
        let token = self.tokens[self.at].clone();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        if self.peek() == &Token::Not {
            self.next();
            let key = self.key()?;
            return Ok(Requirement { key, test: Test::Absent });
        }
        let key = self.key()?;
        let test = match self.peek().clone() {
            Token::Comma | Token::End => Test::Exists,
            Token::Equals(_) => Test::Equals(self.value_after()?),
            Token::NotEquals => Test::NotEquals(self.value_after()?),
            Token::Greater => Test::GreaterThan(self.number_after(&key)?),
            Token::Less => Test::LessThan(self.number_after(&key)?),
            Token::Word(word) if word == "in" => Test::In(self.values_after()?),
            Token::Word(word) if word == "notin" => Test::NotIn(self.values_after()?),
            other => {
                return Err(SelectorError(format!(
                    "unable to parse requirement: found '{}', expected: in, notin, =, ==, !=, gt, lt",
                    other.text()
                )));
            }
        };
        Ok(Requirement { key, test })
    }

    fn key(&mut self) -> Result<String, SelectorError> {
        match self.next() {
            Token::Word(word) => {
                crate::names::qualified_name(&word).map_err(|detail| {
                    SelectorError(format!(
                        "unable to parse requirement: <nil>: Invalid value: {word:?}: {detail}"
                    ))
                })?;
                Ok(word)
            }
            other => Err(SelectorError(format!(
                "unable to parse requirement: found '{}', expected: identifier",
                other.text()
            ))),
        }
    }

    fn checked_value(&self, value: String) -> Result<String, SelectorError> {
        crate::names::label_value(&value).map_err(|detail| {
            SelectorError(format!(
                "unable to parse requirement: values[0][]: Invalid value: {value:?}: {detail}"
            ))
        })?;
        Ok(value)
    }

    fn value_after(&mut self) -> Result<String, SelectorError> {
        self.next();
        match self.peek().clone() {
            // `a=` selects the empty value.
            Token::Comma | Token::End => Ok(String::new()),
            Token::Word(word) => {
                self.next();
                self.checked_value(word)
            }
            other => Err(SelectorError(format!(
                "unable to parse requirement: found '{}', expected: identifier",
                other.text()
            ))),
        }
    }

    fn number_after(&mut self, _key: &str) -> Result<i64, SelectorError> {
        let value = self.value_after()?;
        value.parse().map_err(|_| {
            SelectorError(format!(
                "unable to parse requirement: values[0]: Invalid value: {value:?}: for 'Gt', 'Lt' operators, the value must be an integer"
            ))
        })
    }

    fn values_after(&mut self) -> Result<Vec<String>, SelectorError> {
        self.next();
        let expected = |found: &Token, what: &str| {
            SelectorError(format!("unable to parse requirement: found '{}' expected: {what}", found.text()))
        };
        match self.next() {
            Token::Open => {}
            other => return Err(expected(&other, "'('")),
        }
        let mut values = Vec::new();
        loop {
            match self.next() {
                Token::Word(word) => {
                    let word = self.checked_value(word)?;
                    values.push(word);
                    match self.next() {
                        Token::Comma => {}
                        Token::Close => break,
                        other => return Err(expected(&other, "',' or ')'")),
                    }
                }
                // An empty item is the empty value: `a in (,b)`.
                Token::Comma => values.push(String::new()),
                Token::Close => {
                    values.push(String::new());
                    break;
                }
                other => return Err(expected(&other, "',', ')' or identifier")),
            }
        }
        Ok(values)
    }
}

/// Terms on selectable fields; all must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldTerm {
    path: String,
    value: String,
    equal: bool,
}

impl FieldSelector {
    /// Selects the one object of that name.
    pub fn name(name: &str) -> FieldSelector {
        FieldSelector::equal("metadata.name", name)
    }

    pub fn equal(path: &str, value: &str) -> FieldSelector {
        FieldSelector {
            terms: vec![FieldTerm { path: path.to_owned(), value: value.to_owned(), equal: true }],
        }
    }

    /// The text form: `a=b,c!=d`, with `\\`, `\,` and `\=` escaped in values.
    /// Fields that `kind` cannot select by are refused, in upstream's words.
    pub fn parse(kind: &Kind, text: &str) -> Result<FieldSelector, SelectorError> {
        if text.len() > MAX_TEXT {
            return Err(SelectorError("invalid field selector: too long".to_owned()));
        }
        let mut terms = Vec::new();
        for term in split_terms(text) {
            if term.is_empty() {
                continue;
            }
            let (path, value, equal) = split_term(term).ok_or_else(|| {
                SelectorError(format!("invalid selector: '{text}'; can't understand '{term}'"))
            })?;
            let known = matches!(path, "metadata.name" | "metadata.namespace") || kind.fields.contains(&path);
            if !known {
                return Err(SelectorError(format!("field label not supported: {path}")));
            }
            terms.push(FieldTerm { path: path.to_owned(), value: unescape(value)?, equal });
        }
        Ok(FieldSelector { terms })
    }

    pub fn is_everything(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value that `path` must equal, if the selector says so; lets a list become a get.
    pub fn requires(&self, path: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.equal && t.path == path).map(|t| t.value.as_str())
    }

    pub fn matches(&self, object: &Object) -> bool {
        self.terms.iter().all(|t| (object.field(&t.path).unwrap_or_default() == t.value) == t.equal)
    }
}

impl std::fmt::Display for FieldSelector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (n, term) in self.terms.iter().enumerate() {
            let value = term.value.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
            let comma = if n > 0 { "," } else { "" };
            write!(f, "{comma}{}{}{value}", term.path, if term.equal { "=" } else { "!=" })?;
        }
        Ok(())
    }
}

fn split_terms(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn split_term(term: &str) -> Option<(&str, &str, bool)> {
    for (at, _) in term.char_indices() {
        let rest = &term[at..];
        for (operator, equal) in [("!=", false), ("==", true), ("=", true)] {
            if let Some(value) = rest.strip_prefix(operator) {
                return Some((&term[..at], value, equal));
            }
        }
    }
    None
}

fn unescape(value: &str) -> Result<String, SelectorError> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                Some(c) => {
                    return Err(SelectorError(format!(
                        "invalid field selector: invalid escape sequence: \\{c}"
                    )));
                }
                None => {
                    return Err(SelectorError(
                        "invalid field selector: invalid escape sequence: \\".to_owned(),
                    ));
                }
            },
            ',' | '=' => {
                return Err(SelectorError(format!(
                    "invalid field selector: unescaped character in value: {value}: '{c}'"
                )));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(selector: &str, labels: &[(&str, &str)], want: bool) {
        let selector = LabelSelector::parse(selector).unwrap();
        assert_eq!(selector.matches(&labels.iter().copied().collect()), want);
    }

    #[test]
    fn label_selectors_match() {
        let web = [("app", "web"), ("tier", "front")];
        check("", &web, true);
        check("app=web", &web, true);
        check("app==web,tier!=back", &web, true);
        check("app = api", &web, false);
        check("app in (api, web)", &web, true);
        check("app notin (api,web)", &web, false);
        check("missing notin (a)", &web, true);
        check("app,!missing", &web, true);
        check("!app", &web, false);
        check("example.com/n>4", &[("example.com/n", "5")], true);
        check("n<4", &[("n", "x")], false);
        check("app=", &[("app", "")], true);
    }

    #[test]
    fn bad_label_selectors_are_refused() {
        for bad in ["a b", "a in b", "a in (b", "=b", "a=b c", "a>x", "-a=b", "a=b!", ",,"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(
            LabelSelector::parse("a,=").unwrap_err().0,
            "unable to parse requirement: found '=', expected: identifier"
        );
    }

    #[test]
    fn selectors_print_what_they_parse() {
        for text in ["a=b", "a=b,c in (d,e)", "!a,b", "a!=b", "a in (b)", "a notin (b)", "a notin (b,c)"] {
            assert_eq!(LabelSelector::parse(text).unwrap().to_string(), text);
        }
        let spec = serde_json::json!({ "matchLabels": { "c": "d" }, "matchExpressions": [
            { "key": "a", "operator": "NotIn", "values": ["b"] }, { "key": "d", "operator": "In", "values": ["e"] },
        ] });
        // Clients read the scale's selector, and refuse `a!=b`.
        let selector = LabelSelector::from_spec(&serde_json::from_value(spec).unwrap()).unwrap();
        assert_eq!(selector.to_string(), "a notin (b),c=d,d in (e)");
    }

    #[test]
    fn field_selectors_know_what_a_kind_can_select_by() {
        let pods = Kind::by_plural("", "v1", "pods").unwrap();
        let selector = FieldSelector::parse(pods, r"spec.nodeName=a\,b,metadata.name!=x").unwrap();
        assert_eq!(selector.requires("spec.nodeName"), Some("a,b"));
        assert_eq!(selector.to_string(), r"spec.nodeName=a\,b,metadata.name!=x");
        assert_eq!(
            FieldSelector::parse(pods, "spec.x=1").unwrap_err().0,
            "field label not supported: spec.x"
        );
        assert!(FieldSelector::parse(pods, "nonsense").is_err());
    }
}
