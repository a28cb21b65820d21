//! Compiles the program of the built-in images: static, for size, without cargo's workspace settings, so that it
//! is the same whatever profile Minke is built with.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=hello");
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let out = Path::new(&var("OUT_DIR")).join("hello");
    let status = Command::new(var("RUSTC"))
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "hello",
            "--crate-type",
            "bin",
            "--target",
            &var("TARGET"),
        ])
        .args(["-C", "target-feature=+crt-static", "-C", "opt-level=z", "-C", "panic=abort", "-C", "lto=fat"])
        .args(["-C", "codegen-units=1", "-C", "strip=symbols", "--remap-path-prefix"])
        .arg(format!("{}=/minke", var("CARGO_MANIFEST_DIR")))
        .arg("-o")
        .arg(&out)
        .arg("hello/main.rs")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("compiling the program of the built-in images: {status}"),
        Err(error) => panic!("start rustc: {error}"),
    }
}
