//! JSON bodies, and making them conform to a type: doing it twice changes nothing more.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{codec::json, schema};

fuzz_target!(|data: &[u8]| {
    let Ok(decoded) = json::decode(data) else { return };
    let again = json::decode(decoded.value.to_string().as_bytes()).expect("what was read can be read again");
    assert_eq!(again.value, decoded.value);
    assert!(again.duplicates.is_empty());
    for (group, kind) in [("", "Pod"), ("apps", "Deployment"), ("", "Service"), ("networking.k8s.io", "Ingress")] {
        let ty = schema::of(group, "v1", kind).expect("the kind is built in");
        let mut value = decoded.value.clone();
        if schema::conform(ty, &mut value).is_err() {
            continue;
        }
        let once = value.clone();
        assert_eq!(schema::conform(ty, &mut value), Ok(Vec::new()));
        assert_eq!(value, once);
        schema::complete(ty, &mut value);
        assert_eq!(schema::conform(ty, &mut value), Ok(Vec::new()));
    }
});
