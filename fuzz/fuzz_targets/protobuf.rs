//! Protobuf bodies: what is read comes back the same when written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{codec::protobuf, schema};

fuzz_target!(|data: &[u8]| {
    let Ok(value) = protobuf::decode(data, None) else { return };
    let envelope = protobuf::envelope(data).expect("it was just read");
    let ty = schema::of_api_version(envelope.api_version, envelope.kind).expect("the kind was known");
    assert_eq!(protobuf::decode(&protobuf::encode(ty, &value), None), Ok(value));
});
