//! Minke: Kubernetes, written again in Rust, as one program.
//!
//! Arguments here, the wiring of the components in [`server`] and [`node`]; everything else is in the crates.
#![forbid(unsafe_code)]

mod addons;
mod controllers;
mod logging;
mod node;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use minke_cluster::{DataDir, Io, data_dir, image, logs, look, status, stop, up};

/// The version of Kubernetes that the API server answers as.
const KUBERNETES: &str = "v1.37.0";

/// Kubernetes as one program: a cluster on this machine in a second.
#[derive(Debug, Parser)]
#[command(name = "minke", version, disable_help_subcommand = true, max_term_width = 100)]
struct Cli {
    /// The directory of the cluster; clusters in different directories have nothing to do with each other
    #[arg(long, global = true, env = "MINKE_DATA_DIR", default_value = data_dir::DEFAULT, value_name = "DIR")]
    data_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::UpArgs),
    Down(stop::DownArgs),
    Stop(stop::StopArgs),
    Start(up::StartArgs),
    Status(status::StatusArgs),
    Logs(logs::LogsArgs),
    Ip(look::IpArgs),
    Kubeconfig(look::KubeconfigArgs),
    Image(image::ImageArgs),
    Service(look::ServiceArgs),
    Server(server::ServerArgs),
    Agent(node::AgentArgs),
    Version(status::VersionArgs),
}

fn main() -> ExitCode {
    // Before anything else: the shim of a pod is this program too, and must stay as small as it starts.
    minke_runtime::shim::entry();
    let cli = Cli::parse();
    match run(cli, &mut Io::std()) {
        Ok(code) => ExitCode::from(code),
        // A reader that has seen enough, such as `head`, is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minke: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, io: &mut Io) -> Result<u8> {
    let data = DataDir::new(&cli.data_dir)?;
    match cli.command {
        Command::Up(args) => args.run(&data, io)?,
        Command::Down(args) => args.run(&data, io)?,
        Command::Stop(args) => args.run(&data, io)?,
        Command::Start(args) => args.run(&data, io)?,
        Command::Status(args) => return args.run(&data, io),
        Command::Logs(args) => args.run(&data, io)?,
        Command::Ip(args) => args.run(&data, io)?,
        Command::Kubeconfig(args) => args.run(&data, io)?,
        Command::Image(args) => args.run(&data, io)?,
        Command::Service(args) => args.run(&data, io)?,
        Command::Server(args) => args.run(&data)?,
        Command::Agent(args) => args.run(&data)?,
        Command::Version(args) => args.run(KUBERNETES, io)?,
    }
    Ok(0)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
