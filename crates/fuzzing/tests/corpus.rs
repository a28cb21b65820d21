//! Every input that is kept, and what becomes of it by small damage, through its target.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use minke_fuzzing::TARGETS;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn corpus(name: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.expect("the directory can be read").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} has no seeds", dir.display());
    files
}

#[test]
fn every_kept_input_is_read_well() {
    for (name, target) in TARGETS {
        for file in corpus(name) {
            // Shown when it fails.
            println!("{}", file.display());
            target(&fs::read(&file).expect("a file"));
        }
    }
}

#[test]
fn every_target_is_given_to_the_fuzzer() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let manifest = fs::read_to_string(dir.join("Cargo.toml")).expect("the fuzz crate");
    for (name, _) in TARGETS {
        assert!(dir.join(format!("fuzz_targets/{name}.rs")).exists(), "{name} has no fuzz target");
        assert!(manifest.contains(&format!("name = \"{name}\"\n")), "{name} is not in fuzz/Cargo.toml");
    }
}

/// Some of what a fuzzer does, without looking where it leads.
fn damage(rng: &mut StdRng, data: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=data.len());
        match rng.random_range(0..6) {
            0 if at < data.len() => data[at] ^= 1 << rng.random_range(0..8),
            1 if at < data.len() => {
                data[at] = *[0, 0x7f, 0xff, b'"', b'.', b'/'][..].get(rng.random_range(0..6)).unwrap_or(&0)
            }
            2 => data.truncate(at),
            3 => data.insert(at, rng.random()),
            4 if !other.is_empty() => {
                let from = rng.random_range(0..other.len());
                let to = rng.random_range(from..=other.len().min(from + 64));
                data.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let to = rng.random_range(at..=data.len().min(at + 16));
                data.drain(at..to);
            }
        }
    }
}

/// `FUZZ_SECONDS` is for how long each target is tried; `FUZZ_TARGET` names a single one.
#[test]
#[expect(clippy::disallowed_methods, reason = "the time of the machine is what it tries them for")]
fn damaged_inputs_are_survived() {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0.25);
    let only = std::env::var("FUZZ_TARGET").ok();
    let seed = if seconds > 1.0 { rand::random() } else { 1 };
    for (name, target) in TARGETS.iter().filter(|(name, _)| only.as_deref().is_none_or(|o| o == *name)) {
        let seeds: Vec<Vec<u8>> = corpus(name).iter().map(|file| fs::read(file).expect("a file")).collect();
        let mut rng = StdRng::seed_from_u64(seed);
        let (until, mut rounds) = (Instant::now() + Duration::from_secs_f64(seconds), 0);
        while Instant::now() < until {
            let mut data = seeds[rng.random_range(0..seeds.len())].clone();
            let other = rng.random_range(0..seeds.len());
            damage(&mut rng, &mut data, &seeds[other]);
            let input = data.clone();
            let outcome = std::panic::catch_unwind(|| target(&input));
            if outcome.is_err() {
                let path = std::env::temp_dir().join(format!("minke-fuzz-{name}"));
                fs::write(&path, &data).expect("written");
                panic!("{name} fails with {} (kept there; add it to fuzz/corpus/{name})", path.display());
            }
            rounds += 1;
        }
        println!("{name}: {rounds} inputs");
    }
}
