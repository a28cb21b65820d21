//! The kinds that behave: which file holds the strategy of which kind.

pub mod tree;

use minke_api::Kind;

use crate::strategy::Strategy;

static PLAIN: Strategy = Strategy::PLAIN;

/// The strategy of `kind`; most kinds are plain.
pub fn strategy(_kind: &'static Kind) -> &'static Strategy {
    &PLAIN
}
