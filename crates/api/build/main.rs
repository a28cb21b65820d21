//! Turns the schemas of the `k8s_openapi` crate and the tables in `data/` into what the library embeds:
//! flat tables of types and fields (`schema.rs`), and the texts of the OpenAPI definitions.

mod definitions;
mod facts;
mod metrics;
mod openapi;
mod roots;
mod structure;

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=data");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut collector = definitions::Collector::new();
    roots::collect(&mut collector);
    metrics::collect(&mut collector);
    let (definitions, roots) = collector.finish();
    let facts = facts::Facts::load(&PathBuf::from("data"));
    structure::write(&out, &definitions, &roots, &facts);
    openapi::write(&out, &definitions, &roots, &facts);
}
