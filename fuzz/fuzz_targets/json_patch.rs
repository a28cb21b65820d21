//! JSON patches: two JSON texts divided by a zero byte, the object and the patch.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{codec::json, patch};

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |b| *b == 0);
    let (Some(original), Some(change)) = (parts.next(), parts.next()) else { return };
    let (Ok(original), Ok(change)) = (json::decode(original), json::decode(change)) else { return };
    if let Ok(patched) = patch::json::apply(original.value, &change.value) {
        json::decode(patched.to_string().as_bytes()).expect("no deeper than may be read");
    }
});
