//! Strategic merge patches: two JSON texts divided by a zero byte, the object and the patch.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{codec::json, patch, schema};

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |b| *b == 0);
    let (Some(original), Some(change)) = (parts.next(), parts.next()) else { return };
    let (Ok(original), Ok(change)) = (json::decode(original), json::decode(change)) else { return };
    let ty = schema::of("", "v1", "Pod").expect("the kind is built in");
    let patched = patch::strategic::apply(ty, original.value.clone(), &change.value);
    if let Ok(patched) = patched {
        json::decode(patched.to_string().as_bytes()).expect("no deeper than what was read");
    }
    let merged = patch::merge::apply(original.value, &change.value);
    assert_eq!(patch::merge::apply(merged.clone(), &change.value), merged);
});
