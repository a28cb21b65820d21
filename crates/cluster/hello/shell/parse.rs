//! Shell text to commands.

use std::fmt;

/// What a word is made of, each part with whether it stood in quotes.
pub type Word = Vec<(Part, bool)>;

#[derive(Debug, Clone)]
pub enum Part {
    Text(String),
    /// A variable's name, and what to take when it is empty.
    Variable(String, String),
    Math(String),
    /// Source text whose output is taken.
    Command(String),
}

#[derive(Debug)]
pub struct Redirect {
    pub fd: i32,
    pub op: &'static str,
    pub to: Word,
    /// The target is another descriptor: `2>&1`.
    pub same: bool,
}

#[derive(Debug)]
pub enum Node {
    Simple {
        assignments: Vec<(String, Word)>,
        words: Vec<Word>,
        redirects: Vec<Redirect>,
    },
    /// Source texts, each run by a shell of its own.
    Pipe(Vec<String>),
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Background(String),
    Subshell(String, Vec<Redirect>),
    If(Vec<(Vec<Node>, Vec<Node>)>, Vec<Node>),
    While {
        until: bool,
        condition: Vec<Node>,
        body: Vec<Node>,
    },
    For(String, Vec<Word>, Vec<Node>),
}

pub enum Error {
    /// More input could complete it.
    Unfinished,
    Wrong(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unfinished => f.write_str("unexpected end of input"),
            Error::Wrong(why) => f.write_str(why),
        }
    }
}

/// Commands may stand in commands this deep.
const DEPTH_MAX: usize = 64;

pub fn parse(text: &str) -> Result<Vec<Node>, Error> {
    let mut parser = Parser { chars: text.chars().collect(), at: 0, depth: 0 };
    let nodes = parser.list(&[])?;
    parser.blanks(true);
    match parser.peek() {
        None => Ok(nodes),
        Some(c) => Err(Error::Wrong(format!("unexpected {c}"))),
    }
}

struct Parser {
    chars: Vec<char>,
    at: usize,
    depth: usize,
}

const KEYWORDS_THAT_END: &[&str] = &["then", "else", "elif", "fi", "do", "done", "}"];

impl Parser {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn looking_at(&self, text: &str) -> bool {
        text.chars().enumerate().all(|(i, c)| self.chars.get(self.at + i) == Some(&c))
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.looking_at(text);
        if found {
            self.at += text.chars().count();
        }
        found
    }

    /// Skips blanks and comments; newlines too when `lines`.
    fn blanks(&mut self, lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\r' => self.at += 1,
                '\n' if lines => self.at += 1,
                '\\' if self.chars.get(self.at + 1) == Some(&'\n') => self.at += 2,
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    /// The bare word that begins here, if it is one of the letters of keywords only.
    fn keyword(&self) -> String {
        let rest = &self.chars[self.at..];
        let word: String = rest.iter().take_while(|c| !" \t\r\n;&|()<>".contains(**c)).collect();
        word
    }

    fn expect_keyword(&mut self, word: &str) -> Result<(), Error> {
        self.blanks(true);
        if self.keyword() == word {
            self.at += word.len();
            return Ok(());
        }
        if self.peek().is_none() {
            Err(Error::Unfinished)
        } else {
            Err(Error::Wrong(format!("{word} expected")))
        }
    }

    fn source(&self, from: usize) -> String {
        self.chars[from..self.at].iter().collect()
    }

    /// Commands up to one of `ends`, which is left unread, or the end of the text.
    fn list(&mut self, ends: &[&str]) -> Result<Vec<Node>, Error> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(Error::Wrong("too deeply nested".to_owned()));
        }
        let mut nodes = Vec::new();
        loop {
            self.blanks(true);
            while self.looking_at(";") && !self.looking_at(";;") {
                self.at += 1;
                self.blanks(true);
            }
            let word = self.keyword();
            match self.peek() {
                None if ends.is_empty() => break,
                None => return Err(Error::Unfinished),
                Some(')') => break,
                Some(_) if ends.contains(&word.as_str()) => break,
                Some(_) if KEYWORDS_THAT_END.contains(&word.as_str()) => {
                    return Err(Error::Wrong(format!("unexpected {word}")));
                }
                Some(_) => {}
            }
            let from = self.at;
            let node = self.and_or()?;
            self.blanks(false);
            let source = self.source(from);
            if self.looking_at("&") && !self.looking_at("&&") {
                self.at += 1;
                nodes.push(Node::Background(source));
            } else {
                nodes.push(node);
                match self.peek() {
                    None | Some(')' | '\n' | ';') => {}
                    Some(c) => return Err(Error::Wrong(format!("unexpected {c}"))),
                }
            }
        }
        self.depth -= 1;
        Ok(nodes)
    }

    fn and_or(&mut self) -> Result<Node, Error> {
        let mut left = self.pipeline()?;
        loop {
            self.blanks(false);
            let and = self.looking_at("&&");
            if !and && !self.looking_at("||") {
                return Ok(left);
            }
            self.at += 2;
            self.blanks(true);
            if self.peek().is_none() {
                return Err(Error::Unfinished);
            }
            let right = Box::new(self.pipeline()?);
            left = if and { Node::And(Box::new(left), right) } else { Node::Or(Box::new(left), right) };
        }
    }

    fn pipeline(&mut self) -> Result<Node, Error> {
        self.blanks(false);
        if self.keyword() == "!" {
            self.at += 1;
            return Ok(Node::Not(Box::new(self.pipeline()?)));
        }
        let mut from = self.at;
        let mut last = self.command()?;
        let mut stages = Vec::new();
        loop {
            self.blanks(false);
            if !self.looking_at("|") || self.looking_at("||") {
                break;
            }
            stages.push(self.source(from));
            self.at += 1;
            self.blanks(true);
            if self.peek().is_none() {
                return Err(Error::Unfinished);
            }
            from = self.at;
            last = self.command()?;
        }
        if stages.is_empty() {
            return Ok(last);
        }
        stages.push(self.source(from));
        Ok(Node::Pipe(stages))
    }

    fn command(&mut self) -> Result<Node, Error> {
        self.blanks(false);
        let from = self.at;
        let node = match self.keyword().as_str() {
            "if" => self.if_node()?,
            word @ ("while" | "until") => {
                self.at += 5;
                let condition = self.list(&["do"])?;
                self.expect_keyword("do")?;
                let body = self.list(&["done"])?;
                self.expect_keyword("done")?;
                Node::While { until: word == "until", condition, body }
            }
            "for" => self.for_node()?,
            "{" => {
                self.at += 1;
                let from = self.at;
                self.list(&["}"])?;
                let source = self.source(from);
                self.expect_keyword("}")?;
                // A group runs in this shell unless it is redirected; parsing it again is cheap.
                let redirects = self.redirects()?;
                if redirects.is_empty() {
                    let always = vec![(Vec::new(), parse(&source)?)];
                    return Ok(Node::If(always, Vec::new()));
                }
                return Ok(Node::Subshell(source, redirects));
            }
            _ if self.peek() == Some('(') => {
                self.at += 1;
                let from = self.at;
                self.list(&[])?;
                let source = self.source(from);
                if !self.take(")") {
                    return Err(Error::Unfinished);
                }
                let redirects = self.redirects()?;
                return Ok(Node::Subshell(source, redirects));
            }
            _ => return self.simple(),
        };
        let source = self.source(from);
        let redirects = self.redirects()?;
        Ok(if redirects.is_empty() { node } else { Node::Subshell(source, redirects) })
    }

    fn if_node(&mut self) -> Result<Node, Error> {
        self.at += 2;
        let mut branches = Vec::new();
        loop {
            let condition = self.list(&["then"])?;
            self.expect_keyword("then")?;
            branches.push((condition, self.list(&["elif", "else", "fi"])?));
            match self.keyword().as_str() {
                "elif" => self.at += 4,
                "else" => {
                    self.at += 4;
                    let otherwise = self.list(&["fi"])?;
                    self.expect_keyword("fi")?;
                    return Ok(Node::If(branches, otherwise));
                }
                _ => {
                    self.expect_keyword("fi")?;
                    return Ok(Node::If(branches, Vec::new()));
                }
            }
        }
    }

    fn for_node(&mut self) -> Result<Node, Error> {
        self.at += 3;
        self.blanks(false);
        let name = self.keyword();
        self.at += name.chars().count();
        self.expect_keyword("in")?;
        let mut words = Vec::new();
        loop {
            self.blanks(false);
            match self.peek() {
                None => return Err(Error::Unfinished),
                Some('\n' | ';') => break,
                Some(_) => words.push(self.word()?),
            }
        }
        self.take(";");
        self.expect_keyword("do")?;
        let body = self.list(&["done"])?;
        self.expect_keyword("done")?;
        Ok(Node::For(name, words, body))
    }

    fn redirects(&mut self) -> Result<Vec<Redirect>, Error> {
        let mut found = Vec::new();
        loop {
            self.blanks(false);
            match self.redirect()? {
                Some(redirect) => found.push(redirect),
                None => return Ok(found),
            }
        }
    }

    fn redirect(&mut self) -> Result<Option<Redirect>, Error> {
        let digit = self.peek().filter(char::is_ascii_digit).and_then(|c| c.to_digit(10));
        let after = self.at + usize::from(digit.is_some());
        if !matches!(self.chars.get(after), Some('<' | '>')) {
            return Ok(None);
        }
        self.at = after;
        let op = if self.take(">>") {
            ">>"
        } else if self.take(">") {
            ">"
        } else {
            self.at += 1;
            "<"
        };
        let same = self.take("&");
        self.blanks(false);
        let to = self.word()?;
        Ok(Some(Redirect { fd: digit.map_or(i32::from(op != "<"), |d| d as i32), op, to, same }))
    }

    fn simple(&mut self) -> Result<Node, Error> {
        let (mut assignments, mut words, mut redirects) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            self.blanks(false);
            if let Some(redirect) = self.redirect()? {
                redirects.push(redirect);
                continue;
            }
            match self.peek() {
                None | Some('\n' | ';' | '&' | '|' | '(' | ')') => break,
                Some(_) => {}
            }
            let mut word = self.word()?;
            let name = match word.first() {
                Some((Part::Text(text), false)) if words.is_empty() => text.split_once('='),
                _ => None,
            };
            match name.filter(|(name, _)| is_name(name)).map(|(n, rest)| (n.to_owned(), rest.to_owned())) {
                Some((name, rest)) => {
                    word[0] = (Part::Text(rest), true);
                    assignments.push((name, word));
                }
                None => words.push(word),
            }
        }
        if assignments.is_empty() && words.is_empty() && redirects.is_empty() {
            return match self.peek() {
                None => Err(Error::Unfinished),
                Some(c) => Err(Error::Wrong(format!("unexpected {c}"))),
            };
        }
        Ok(Node::Simple { assignments, words, redirects })
    }

    fn word(&mut self) -> Result<Word, Error> {
        let mut word: Word = Vec::new();
        let from = self.at;
        let mut text = String::new();
        let flush = |text: &mut String, word: &mut Word, quoted: bool| {
            if !text.is_empty() || quoted {
                word.push((Part::Text(std::mem::take(text)), quoted));
            }
        };
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\r' | '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>' => break,
                '\'' => {
                    flush(&mut text, &mut word, false);
                    self.at += 1;
                    let quoted = self.until('\'')?;
                    word.push((Part::Text(quoted), true));
                }
                '"' => {
                    flush(&mut text, &mut word, false);
                    self.at += 1;
                    self.quoted(&mut word)?;
                }
                '\\' => {
                    self.at += 1;
                    text.extend(self.peek());
                    self.at += 1;
                }
                '$' | '`' => match self.dollar()? {
                    Some(part) => {
                        flush(&mut text, &mut word, false);
                        word.push((part, false));
                    }
                    None => text.push('$'),
                },
                c => {
                    text.push(c);
                    self.at += 1;
                }
            }
        }
        flush(&mut text, &mut word, false);
        if self.at == from {
            return match self.peek() {
                None => Err(Error::Unfinished),
                Some(c) => Err(Error::Wrong(format!("unexpected {c}"))),
            };
        }
        Ok(word)
    }

    fn until(&mut self, end: char) -> Result<String, Error> {
        let from = self.at;
        while self.peek().ok_or(Error::Unfinished)? != end {
            self.at += 1;
        }
        self.at += 1;
        Ok(self.chars[from..self.at - 1].iter().collect())
    }

    /// The rest of a double-quoted string.
    fn quoted(&mut self, word: &mut Word) -> Result<(), Error> {
        let mut text = String::new();
        loop {
            match self.peek().ok_or(Error::Unfinished)? {
                '"' => break,
                '\\' => {
                    self.at += 1;
                    let c = self.peek().ok_or(Error::Unfinished)?;
                    if !"\"\\$`\n".contains(c) {
                        text.push('\\');
                    }
                    if c != '\n' {
                        text.push(c);
                    }
                    self.at += 1;
                }
                '$' | '`' => match self.dollar()? {
                    Some(part) => {
                        word.push((Part::Text(std::mem::take(&mut text)), true));
                        word.push((part, true));
                    }
                    None => text.push('$'),
                },
                c => {
                    text.push(c);
                    self.at += 1;
                }
            }
        }
        self.at += 1;
        word.push((Part::Text(text), true));
        Ok(())
    }

    /// What begins with `$` or a backquote; `None` for a `$` that means itself.
    fn dollar(&mut self) -> Result<Option<Part>, Error> {
        if self.take("`") {
            return Ok(Some(Part::Command(self.until('`')?)));
        }
        if self.take("$((") {
            let from = self.at;
            while !self.looking_at("))") {
                self.peek().ok_or(Error::Unfinished)?;
                self.at += 1;
            }
            let text = self.source(from);
            self.at += 2;
            return Ok(Some(Part::Math(text)));
        }
        if self.take("$(") {
            let from = self.at;
            self.list(&[])?;
            let source = self.source(from);
            if !self.take(")") {
                return Err(Error::Unfinished);
            }
            return Ok(Some(Part::Command(source)));
        }
        if self.take("${") {
            let inside = self.until('}')?;
            let (name, default) =
                inside.split_once(":-").or_else(|| inside.split_once('-')).unwrap_or((&inside, ""));
            return Ok(Some(Part::Variable(name.to_owned(), default.to_owned())));
        }
        self.at += 1;
        match self.peek() {
            Some(c) if "?$#@*!0123456789".contains(c) => {
                self.at += 1;
                Ok(Some(Part::Variable(c.to_string(), String::new())))
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                let from = self.at;
                while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_') {
                    self.at += 1;
                }
                Ok(Some(Part::Variable(self.source(from), String::new())))
            }
            _ => Ok(None),
        }
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
