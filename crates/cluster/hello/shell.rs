//! A small shell: lists, pipes, redirections, variables, `if`, `while`, `for`; what fits on one line of a tutorial.
//!
//! Each part of a pipe, each `( ... )` and each `$( ... )` is a shell of its own, given the source text and the
//! variables. There is no job control, no globbing and no function.

mod parse;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

use self::parse::{Node, Part, Redirect, Word};
use crate::tools::{echo_text, hostname, say};
use crate::{names, sys};

/// `sh`, `sh -c TEXT [NAME ARG...]`, `sh FILE [ARG...]`.
pub fn main(args: &[String]) -> i32 {
    let mut shell = Shell::new();
    // Grouped flags such as -ec are common; only c and e mean anything here.
    let flags = args.iter().take_while(|a| a.starts_with('-') && a.len() > 1).count();
    let has = |c: char| args[..flags].iter().any(|a| a.contains(c));
    shell.stop_on_error = has('e');
    let rest = &args[flags..];
    if has('c') {
        let Some((text, arguments)) = rest.split_first() else { return 2 };
        shell.arguments = arguments.iter().skip(1).cloned().collect();
        return shell.run_text(text);
    }
    if let Some((path, arguments)) = rest.split_first() {
        shell.arguments = arguments.to_vec();
        return match std::fs::read_to_string(path) {
            Ok(text) => shell.run_text(&text),
            Err(error) => {
                say(2, &format!("sh: {path}: {error}\n"));
                127
            }
        };
    }
    if io::stdin().is_terminal() {
        return shell.converse();
    }
    let mut text = String::new();
    let _ = io::stdin().read_to_string(&mut text);
    shell.run_text(&text)
}

/// Why commands are not run one after the other just now.
#[derive(Clone, Copy, PartialEq)]
enum Flow {
    On,
    Break,
    Continue,
    Exit,
}

struct Shell {
    variables: BTreeMap<String, String>,
    arguments: Vec<String>,
    status: i32,
    flow: Flow,
    stop_on_error: bool,
    /// Depth of conditions, in which a failure is an answer.
    conditions: usize,
    background: Vec<Child>,
}

impl Shell {
    fn new() -> Shell {
        let variables = std::env::vars_os()
            .map(|(k, v)| (k.to_string_lossy().into(), v.to_string_lossy().into()))
            .collect();
        Shell {
            variables,
            arguments: Vec::new(),
            status: 0,
            flow: Flow::On,
            stop_on_error: false,
            conditions: 0,
            background: Vec::new(),
        }
    }

    /// Reads commands from a terminal until `exit` or the end of input.
    fn converse(&mut self) -> i32 {
        sys::outlive_interrupts();
        let mut text = String::new();
        loop {
            let place = std::env::current_dir().unwrap_or_default();
            let prompt = if text.is_empty() {
                format!("{}:{} # ", hostname(), place.display())
            } else {
                "> ".to_owned()
            };
            say(1, &prompt);
            match io::stdin().lock().read_line(&mut text) {
                Ok(0) | Err(_) => {
                    say(1, "\n");
                    return self.status;
                }
                Ok(_) => {}
            }
            match parse::parse(&text) {
                Err(parse::Error::Unfinished) => continue,
                Err(parse::Error::Wrong(why)) => {
                    say(2, &format!("sh: {why}\n"));
                    self.status = 2;
                }
                Ok(program) => {
                    self.run(&program);
                }
            }
            text.clear();
            if self.flow == Flow::Exit {
                return self.status;
            }
            self.flow = Flow::On;
        }
    }

    fn run_text(&mut self, text: &str) -> i32 {
        match parse::parse(text) {
            Ok(program) => self.run(&program),
            Err(error) => {
                say(2, &format!("sh: {error}\n"));
                2
            }
        }
    }

    fn run(&mut self, nodes: &[Node]) -> i32 {
        for node in nodes {
            if self.flow != Flow::On {
                break;
            }
            self.status = self.run_node(node);
            if self.stop_on_error && self.status != 0 && self.conditions == 0 && self.flow == Flow::On {
                self.flow = Flow::Exit;
            }
        }
        self.status
    }

    fn condition(&mut self, nodes: &[Node]) -> bool {
        self.conditions += 1;
        let code = self.run(nodes);
        self.conditions -= 1;
        code == 0
    }

    fn run_node(&mut self, node: &Node) -> i32 {
        match node {
            Node::Simple { assignments, words, redirects } => self.simple(assignments, words, redirects),
            Node::Pipe(stages) => self.pipe(stages),
            Node::Not(inner) => {
                self.conditions += 1;
                let code = self.run_node(inner);
                self.conditions -= 1;
                i32::from(code == 0)
            }
            Node::And(left, right) => match self.condition(std::slice::from_ref(&**left)) {
                true if self.flow == Flow::On => self.run_node(right),
                _ => self.status,
            },
            Node::Or(left, right) => match self.condition(std::slice::from_ref(&**left)) {
                false if self.flow == Flow::On => self.run_node(right),
                _ => self.status,
            },
            Node::Background(source) => match self.child(source).stdin(Stdio::null()).spawn() {
                Ok(child) => {
                    self.variables.insert("!".to_owned(), child.id().to_string());
                    self.background.push(child);
                    0
                }
                Err(error) => self.fail(source, &error),
            },
            Node::Subshell(source, redirects) => {
                let mut command = self.child(source);
                match self.redirect(redirects, &mut command) {
                    Ok(()) => self.wait_for(source, command.spawn()),
                    Err(code) => code,
                }
            }
            Node::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.condition(condition) {
                        return self.run_body(body);
                    }
                }
                self.status = 0;
                self.run_body(otherwise)
            }
            Node::While { until, condition, body } => {
                let mut code = 0;
                while self.condition(condition) != *until && self.flow == Flow::On {
                    code = self.run_body(body);
                    if self.leaves_loop() {
                        break;
                    }
                }
                code
            }
            Node::For(name, words, body) => {
                let mut code = 0;
                for value in self.expand(words) {
                    self.variables.insert(name.clone(), value);
                    code = self.run_body(body);
                    if self.leaves_loop() {
                        break;
                    }
                }
                code
            }
        }
    }

    fn run_body(&mut self, body: &[Node]) -> i32 {
        if body.is_empty() { 0 } else { self.run(body) }
    }

    fn leaves_loop(&mut self) -> bool {
        match self.flow {
            Flow::On => false,
            Flow::Continue => {
                self.flow = Flow::On;
                false
            }
            Flow::Break => {
                self.flow = Flow::On;
                true
            }
            Flow::Exit => true,
        }
    }

    /// A shell of its own for `source`, with this one's variables.
    fn child(&self, source: &str) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("sh");
        if self.stop_on_error {
            command.arg("-e");
        }
        command.arg("-c").arg(source).arg("sh").args(&self.arguments);
        command.env_clear().envs(self.variables.iter().filter(|(name, _)| *name != "!"));
        command
    }

    fn pipe(&mut self, stages: &[String]) -> i32 {
        let mut children = Vec::new();
        let mut input = Stdio::inherit();
        for (i, source) in stages.iter().enumerate() {
            let mut command = self.child(source);
            command.stdin(std::mem::replace(&mut input, Stdio::null()));
            if i + 1 < stages.len() {
                command.stdout(Stdio::piped());
            }
            match command.spawn() {
                Ok(mut child) => {
                    if let Some(out) = child.stdout.take() {
                        input = out.into();
                    }
                    children.push(child);
                }
                Err(error) => return self.fail(source, &error),
            }
        }
        children.into_iter().map(|mut child| exit_code(child.wait())).last().unwrap_or(0)
    }

    fn fail(&self, what: &str, error: &io::Error) -> i32 {
        let (code, text) = match error.kind() {
            io::ErrorKind::NotFound => (127, "not found".to_owned()),
            io::ErrorKind::PermissionDenied => (126, "Permission denied".to_owned()),
            _ => (126, error.to_string()),
        };
        say(2, &format!("sh: {what}: {text}\n"));
        code
    }

    fn wait_for(&self, what: &str, spawned: io::Result<Child>) -> i32 {
        match spawned {
            Ok(mut child) => exit_code(child.wait()),
            Err(error) => self.fail(what, &error),
        }
    }

    fn simple(&mut self, assignments: &[(String, Word)], words: &[Word], redirects: &[Redirect]) -> i32 {
        let words = self.expand(words);
        let assigned: Vec<(String, String)> =
            assignments.iter().map(|(name, word)| (name.clone(), self.expand_one(word))).collect();
        let Some((name, args)) = words.split_first() else {
            self.variables.extend(assigned);
            return match self.open_all(redirects) {
                Ok(_) if assignments.is_empty() => 0,
                Ok(_) => 0,
                Err(code) => code,
            };
        };
        if let Some(code) = self.builtin(name, args, redirects) {
            return code;
        }
        let mut command = Command::new(name);
        let replace = name == "exec" && !args.is_empty();
        if replace {
            command = Command::new(&args[0]);
            command.args(&args[1..]);
        } else {
            command.args(args);
        }
        command.env_clear().envs(self.variables.iter().filter(|(name, _)| *name != "!")).envs(assigned);
        if let Err(code) = self.redirect(redirects, &mut command) {
            return code;
        }
        if replace {
            let error = command.exec();
            self.flow = Flow::Exit;
            return self.fail(&args[0], &error);
        }
        self.wait_for(name, command.spawn())
    }

    /// The result of a command the shell itself runs; `None` when it is none.
    fn builtin(&mut self, name: &str, args: &[String], redirects: &[Redirect]) -> Option<i32> {
        let first = args.first().map(String::as_str);
        let text = match name {
            ":" | "true" => String::new(),
            "false" => return Some(1),
            "echo" => echo_text(args),
            "test" => return Some(i32::from(!self.test(args))),
            "[" => return Some(i32::from(!self.test(&args[..args.len().saturating_sub(1)]))),
            "cd" => {
                let to = first.map(str::to_owned).or_else(|| self.variables.get("HOME").cloned());
                return Some(match std::env::set_current_dir(to.as_deref().unwrap_or("/")) {
                    Ok(()) => 0,
                    Err(error) => self.fail(to.as_deref().unwrap_or("/"), &error).min(1),
                });
            }
            "exit" => {
                self.flow = Flow::Exit;
                return Some(first.and_then(|code| code.parse().ok()).unwrap_or(self.status) & 255);
            }
            "break" => {
                self.flow = Flow::Break;
                return Some(0);
            }
            "continue" => {
                self.flow = Flow::Continue;
                return Some(0);
            }
            "export" => {
                for (name, value) in args.iter().filter_map(|arg| arg.split_once('=')) {
                    self.variables.insert(name.to_owned(), value.to_owned());
                }
                return Some(0);
            }
            "unset" => {
                for name in args {
                    self.variables.remove(name);
                }
                return Some(0);
            }
            "set" => {
                self.stop_on_error |= args.iter().any(|arg| arg.starts_with('-') && arg.contains('e'));
                self.stop_on_error &= !args.iter().any(|arg| arg.starts_with('+') && arg.contains('e'));
                return Some(0);
            }
            "shift" => {
                if !self.arguments.is_empty() {
                    self.arguments.remove(0);
                }
                return Some(0);
            }
            "read" => {
                let mut line = String::new();
                let n = io::stdin().lock().read_line(&mut line).unwrap_or(0);
                let variable = args.iter().find(|a| !a.starts_with('-')).map_or("REPLY", String::as_str);
                self.variables.insert(variable.to_owned(), line.trim_end_matches('\n').to_owned());
                return Some(i32::from(n == 0));
            }
            "wait" => {
                self.background.drain(..).for_each(|mut child| drop(child.wait()));
                return Some(0);
            }
            "resolve" => names::resolve(first.unwrap_or_default()).iter().map(|a| format!("{a}\n")).collect(),
            "trap" | "exec" if args.is_empty() || name == "trap" => return Some(0),
            _ => return None,
        };
        Some(match self.open_all(redirects) {
            Err(code) => code,
            Ok(opened) => {
                // The last redirection of a descriptor is the one that counts.
                let to = opened.into_iter().rev().find(|(fd, _)| *fd == 1);
                match to {
                    Some((_, Target::File(mut file))) => i32::from(file.write_all(text.as_bytes()).is_err()),
                    Some((_, Target::Same(fd))) => say(fd, &text),
                    None => say(1, &text),
                }
            }
        })
    }

    fn test(&self, args: &[String]) -> bool {
        let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        match words[..] {
            ["!", ref rest @ ..] if !rest.is_empty() => !self.test(&args[1..]),
            [one] => !one.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-z", text] => text.is_empty(),
            ["-e", path] => std::fs::metadata(path).is_ok(),
            ["-f", path] => std::fs::metadata(path).is_ok_and(|meta| meta.is_file()),
            ["-d", path] => std::fs::metadata(path).is_ok_and(|meta| meta.is_dir()),
            ["-s", path] => std::fs::metadata(path).is_ok_and(|meta| meta.len() > 0),
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [a, "-eq", b] => number(a) == number(b),
            [a, "-ne", b] => number(a) != number(b),
            [a, "-lt", b] => number(a) < number(b),
            [a, "-le", b] => number(a) <= number(b),
            [a, "-gt", b] => number(a) > number(b),
            [a, "-ge", b] => number(a) >= number(b),
            _ => false,
        }
    }

    fn open_all(&mut self, redirects: &[Redirect]) -> Result<Vec<(i32, Target)>, i32> {
        let mut opened = Vec::new();
        for redirect in redirects {
            let target = self.expand_one(&redirect.to);
            if let Some(fd) = redirect.same.then(|| target.parse().unwrap_or(1)) {
                opened.push((redirect.fd, Target::Same(fd)));
                continue;
            }
            let file = match redirect.op {
                "<" => File::open(&target),
                ">>" => File::options().create(true).append(true).open(&target),
                _ => File::create(&target),
            };
            match file {
                Ok(file) => opened.push((redirect.fd, Target::File(file))),
                Err(error) => {
                    say(2, &format!("sh: {target}: {error}\n"));
                    return Err(1);
                }
            }
        }
        Ok(opened)
    }

    fn redirect(&mut self, redirects: &[Redirect], command: &mut Command) -> Result<(), i32> {
        // What a descriptor is so far, for `2>&1` after `>file`.
        let mut files: BTreeMap<i32, File> = BTreeMap::new();
        for (fd, target) in self.open_all(redirects)? {
            let (stdio, kept) = match target {
                Target::File(file) => (file.try_clone().map(Stdio::from), Some(file)),
                Target::Same(other) => match files.get(&other).map(File::try_clone) {
                    Some(Ok(file)) => (file.try_clone().map(Stdio::from), Some(file)),
                    _ if other == 2 => (Ok(io::stderr().into()), None),
                    _ => (Ok(io::stdout().into()), None),
                },
            };
            let Ok(stdio) = stdio else { return Err(1) };
            match fd {
                0 => command.stdin(stdio),
                1 => command.stdout(stdio),
                _ => command.stderr(stdio),
            };
            if let Some(file) = kept {
                files.insert(fd, file);
            }
        }
        Ok(())
    }

    fn value(&self, name: &str) -> String {
        match name {
            "?" => self.status.to_string(),
            "$" => std::process::id().to_string(),
            "#" => self.arguments.len().to_string(),
            "@" | "*" => self.arguments.join(" "),
            "0" => "sh".to_owned(),
            "HOSTNAME" if !self.variables.contains_key(name) => hostname(),
            _ => match name.parse::<usize>() {
                Ok(n) => self.arguments.get(n.wrapping_sub(1)).cloned().unwrap_or_default(),
                Err(_) => self.variables.get(name).cloned().unwrap_or_default(),
            },
        }
    }

    fn part(&mut self, part: &Part) -> String {
        match part {
            Part::Text(text) => text.clone(),
            Part::Variable(name, default) => {
                let value = self.value(name);
                if value.is_empty() { default.clone() } else { value }
            }
            Part::Math(text) => self.arithmetic(text),
            Part::Command(source) => {
                let output = self.child(source).stdin(Stdio::inherit()).stderr(Stdio::inherit()).output();
                match output {
                    Ok(output) => {
                        self.status = exit_code(Ok(output.status));
                        String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned()
                    }
                    Err(error) => {
                        self.status = self.fail(source, &error);
                        String::new()
                    }
                }
            }
        }
    }

    fn expand_one(&mut self, word: &Word) -> String {
        word.iter().map(|(part, _)| self.part(part)).collect()
    }

    /// Words after expansion; what came unquoted from a variable or command is split at white space.
    fn expand(&mut self, words: &[Word]) -> Vec<String> {
        let mut out = Vec::new();
        for word in words {
            let mut current: Option<String> = None;
            for (part, quoted) in word {
                let text = self.part(part);
                if *quoted || matches!(part, Part::Text(_)) {
                    current.get_or_insert_default().push_str(&text);
                    continue;
                }
                if text.starts_with(char::is_whitespace) {
                    out.extend(current.take());
                }
                for piece in text.split_inclusive(char::is_whitespace) {
                    let bare = piece.trim_end();
                    if !bare.is_empty() {
                        current.get_or_insert_default().push_str(bare);
                    }
                    if bare.len() < piece.len() {
                        out.extend(current.take());
                    }
                }
            }
            out.extend(current);
        }
        out
    }

    /// Whole numbers, variables, `+ - * / %`, left to right with the usual precedence.
    fn arithmetic(&self, text: &str) -> String {
        let mut sum = 0i64;
        let mut product = 0i64;
        let mut op = '+';
        let spaced: String = text
            .chars()
            .flat_map(|c| if "+-*/%".contains(c) { vec![' ', c, ' '] } else { vec![c] })
            .collect();
        for token in spaced.split_whitespace() {
            if let Some(c) = token.chars().next().filter(|c| token.len() == 1 && "+-*/%".contains(*c)) {
                op = c;
                continue;
            }
            let name = token.trim_start_matches('$').trim_matches(['{', '}']);
            let number = token.parse().or_else(|_| self.value(name).parse()).unwrap_or(0i64);
            match op {
                '*' => product = product.wrapping_mul(number),
                '/' => product = product.checked_div(number).unwrap_or(0),
                '%' => product = product.checked_rem(number).unwrap_or(0),
                sign => {
                    sum = sum.wrapping_add(product);
                    product = if sign == '-' { -number } else { number };
                }
            }
        }
        sum.wrapping_add(product).to_string()
    }
}

enum Target {
    File(File),
    Same(i32),
}

fn exit_code(status: io::Result<std::process::ExitStatus>) -> i32 {
    match status {
        Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(_) => 126,
    }
}
