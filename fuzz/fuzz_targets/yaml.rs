//! YAML bodies: what is read is JSON, and JSON is YAML.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::codec::{json, yaml};

fuzz_target!(|data: &[u8]| {
    let Ok(decoded) = yaml::decode(data) else { return };
    let text = decoded.value.to_string();
    assert_eq!(json::decode(text.as_bytes()).expect("the value is JSON").value, decoded.value);
});
