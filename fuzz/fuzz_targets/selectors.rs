//! Label and field selectors: what is read comes back the same when written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{FieldSelector, Kind, LabelSelector};

fuzz_target!(|text: &str| {
    if let Ok(selector) = LabelSelector::parse(text) {
        assert_eq!(LabelSelector::parse(&selector.to_string()).as_ref(), Ok(&selector), "{selector}");
    }
    let pod = Kind::by_kind("", "v1", "Pod").expect("the kind is built in");
    if let Ok(selector) = FieldSelector::parse(pod, text) {
        assert_eq!(FieldSelector::parse(pod, &selector.to_string()).as_ref(), Ok(&selector), "{selector}");
    }
});
