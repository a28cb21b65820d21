//! `minke status` and `minke version`.

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::control::{self, Request};
use crate::data_dir::DataDir;
use crate::io::Io;
use crate::yaml;

/// What runs: the server, its node, its pods.
///
/// The exit code is 0 when the cluster is ready, 3 when it is stopped, 4 when it is starting or in trouble.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How to print it
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Format>,
}

/// The versions of this program and of the Kubernetes it is.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// How to print it
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    output: Option<Format>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Json,
    Yaml,
}

impl Format {
    pub fn print(self, value: &Value) -> Result<String> {
        Ok(match self {
            Format::Json => serde_json::to_string_pretty(value)?,
            Format::Yaml => yaml::print(value).trim_end().to_owned(),
        })
    }
}

/// What the running server says of itself; `None` when none is running.
pub fn query(data: &DataDir) -> Result<Option<Value>> {
    match control::call(data, &Request::Status)? {
        None => Ok(None),
        Some(call) => call.answer(|_| {}).map(Some),
    }
}

impl StatusArgs {
    /// The exit code.
    pub fn run(self, data: &DataDir, io: &mut Io) -> Result<u8> {
        let mut status = if data.exists() {
            query(data)?.unwrap_or_else(|| json!({"state": "Stopped"}))
        } else {
            json!({"state": "None"})
        };
        status["dataDir"] = data.path().display().to_string().into();
        let code = match status["state"].as_str() {
            Some("Ready") => 0,
            Some("Stopped" | "None") => 3,
            _ => 4,
        };
        if let Some(format) = self.output {
            io.say(format.print(&status)?)?;
            return Ok(code);
        }
        let text = |path: &str| match status.pointer(path) {
            Some(Value::String(text)) => text.clone(),
            Some(Value::Null) | None => "-".to_owned(),
            Some(other) => other.to_string(),
        };
        match status["state"].as_str() {
            Some("None") => {
                io.say(format!(
                    "There is no cluster in {}: `minke{} up` makes one",
                    text("/dataDir"),
                    data.option()
                ))?;
            }
            Some("Stopped") => {
                io.say(format!(
                    "The cluster in {} is stopped: `minke{} start` resumes it",
                    text("/dataDir"),
                    data.option()
                ))?;
            }
            _ => {
                let step = status["step"].as_str().map(|step| format!(" ({step})")).unwrap_or_default();
                io.say(format!("Cluster:     {}{step}", text("/state")))?;
                io.say(format!("API server:  {}", text("/server")))?;
                io.say(format!("Kubernetes:  {}", text("/kubernetesVersion")))?;
                let ready = if status["node"]["ready"] == true { "Ready" } else { "NotReady" };
                io.say(format!("Node:        {} {} {ready}", text("/node/name"), text("/node/address")))?;
                io.say(format!("Pods:        {} running of {}", text("/pods/running"), text("/pods/total")))?;
                io.say(format!(
                    "Process:     {}, since {}, {} MiB",
                    text("/pid"),
                    text("/startedAt"),
                    text("/memoryMiB")
                ))?;
                io.say(format!("Data:        {}", text("/dataDir")))?;
            }
        }
        Ok(code)
    }
}

impl VersionArgs {
    /// `kubernetes` is the version the API server answers with.
    pub fn run(self, kubernetes: &str, io: &mut Io) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        match self.output {
            None => io.say(format!("minke v{version} (Kubernetes {kubernetes})")),
            Some(format) => {
                let value = json!({"minke": format!("v{version}"), "kubernetes": kubernetes});
                io.say(format.print(&value)?)
            }
        }
    }
}
