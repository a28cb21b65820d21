//! The program in the two images that ship inside Minke: a small web server, and a handful of everyday tools
//! under their usual names so that `kubectl exec` has something to run. It is compiled alone, statically and
//! for size by the build script of `minke-cluster`; it uses the standard library and nothing else.
//!
//! The name it is called by chooses the tool, as `hello TOOL` does; any other call serves HTTP.

mod names;
mod shell;
mod sys;
mod tools;
mod web;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    if args.is_empty() {
        args.push("hello".to_owned());
    }
    let name = args[0].rsplit('/').next().unwrap_or_default().trim_start_matches('-').to_owned();
    let (name, args) = match args.get(1) {
        Some(tool) if name == "hello" && tools::find(tool).is_some() => (tool.clone(), &args[2..]),
        _ => (name, &args[1..]),
    };
    let code = match tools::find(&name) {
        Some(tool) => tool(args),
        None => web::serve(args),
    };
    ExitCode::from(code as u8)
}
