#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| minke_fuzzing::run("dockerfile", data));
