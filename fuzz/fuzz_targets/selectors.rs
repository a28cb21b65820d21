//! Label and field selectors: what is read comes back the same when written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{FieldSelector, Kind, LabelSelector};

fuzz_target!(|text: &str| {
    if let Ok(selector) = LabelSelector::parse(text) {
        // The text form puts the requirements in order.
        let text = selector.to_string();
        assert_eq!(LabelSelector::parse(&text).map(|s| s.to_string()), Ok(text));
    }
    let pod = Kind::by_kind("", "v1", "Pod").expect("the kind is built in");
    if let Ok(selector) = FieldSelector::parse(pod, text) {
        assert_eq!(FieldSelector::parse(pod, &selector.to_string()).as_ref(), Ok(&selector), "{selector}");
    }
});
