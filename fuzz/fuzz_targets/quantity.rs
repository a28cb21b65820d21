//! Quantities and times: the canonical form says the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minke_api::{Quantity, time};

fuzz_target!(|text: &str| {
    if let Ok(quantity) = Quantity::parse(text) {
        let canonical = quantity.to_string();
        let again = Quantity::parse(&canonical).expect("the canonical form is one");
        assert_eq!(again, quantity);
        assert_eq!(again.to_string(), canonical);
    }
    if let Ok(at) = time::parse(text) {
        assert_eq!(time::parse(&time::format_micros(at)).map(time::format_seconds), Ok(time::format_seconds(at)));
    }
});
