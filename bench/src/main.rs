//! Measures the budgets of the design, on clusters of its own in temporary directories.
//!
//! Every figure is a median of several rounds; rates are per second of CPU that the server spent, which a
//! busy machine changes less than rates per second of time. Nothing here passes or fails.
#![forbid(unsafe_code)]

mod alone;
mod cluster;
mod etcd;
mod load;
mod node;
mod pods;
mod scale;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Measures Minke against its budgets; needs root, as clusters do.
#[derive(Debug, Parser)]
struct Args {
    /// The binary to measure
    #[arg(long, default_value = "./target/release/minke")]
    minke: PathBuf,
    /// Rounds of what is repeated whole (up, pods, replicas)
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds that each load and each idle window lasts
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Write the table to this file as well, between the lines `<!-- measured -->`
    #[arg(long)]
    into: Option<PathBuf>,
    /// Only the figures whose name has this in it
    #[arg(long, default_value = "")]
    only: String,
    /// Hollow nodes of the large cluster
    #[arg(long, default_value_t = 5000)]
    scale_nodes: usize,
    /// Plain pods of the large cluster
    #[arg(long, default_value_t = 50_000)]
    scale_pods: usize,
}

/// One line of the table.
struct Figure {
    what: &'static str,
    measured: String,
    budget: &'static str,
}

/// What has been measured so far; printed as it comes.
struct Table {
    only: String,
    figures: Vec<Figure>,
}

impl Table {
    fn wants(&self, what: &str) -> bool {
        what.to_lowercase().contains(&self.only.to_lowercase())
    }

    fn add(&mut self, what: &'static str, measured: String, budget: &'static str) {
        println!("{what:<44} {measured:<44} {budget}");
        self.figures.push(Figure { what, measured, budget });
    }

    fn markdown(&self) -> String {
        let mut text = "| what | measured | budget |\n|---|---|---|\n".to_owned();
        for figure in &self.figures {
            text.push_str(&format!("| {} | {} | {} |\n", figure.what, figure.measured, figure.budget));
        }
        text
    }
}

/// The middle one; of an even number the lower.
fn median(values: Vec<f64>) -> f64 {
    percentile(values, 50)
}

/// The least value that `share` of a hundred do not exceed.
fn percentile(mut values: Vec<f64>, share: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * share).div_ceil(100).saturating_sub(1);
    values.get(rank).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    // Containers that are measured without a cluster have this program as their shim.
    minke_runtime::shim::entry();
    let args = Args::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    let mut table = Table { only: args.only.clone(), figures: Vec::new() };
    runtime.block_on(async {
        if table.wants("release binary") {
            let size = std::fs::metadata(&args.minke)?.len();
            table.add("release binary", format!("{:.1} MB", size as f64 / 1e6), "40 MB");
        }
        cluster::cold_start(&args, &mut table)?;
        cluster::idle(&args, &mut table).await?;
        pods::all(&args, &mut table).await?;
        node::all(&args, &mut table).await?;
        load::all(&args, &mut table).await?;
        etcd::all(&args, &mut table).await?;
        scale::all(&args, &mut table).await?;
        anyhow::Ok(())
    })?;
    if let Some(file) = &args.into {
        let text = std::fs::read_to_string(file)?;
        let mark = "<!-- measured -->\n";
        let mut parts = text.split(mark);
        let (head, tail) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
        std::fs::write(file, format!("{head}{mark}{}{mark}{tail}", table.markdown()))?;
    }
    Ok(())
}
