//! What time it is, handed to whoever writes times into objects.

use jiff::Timestamp;
use tokio::time::Instant;

/// The wall clock, or one that follows tokio's (pausable) time from a fixed start.
#[derive(Debug, Clone, Copy, Default)]
pub enum Clock {
    #[default]
    System,
    /// For simulations: `at` was the time at the instant `start`.
    Virtual { at: Timestamp, start: Instant },
}

impl Clock {
    pub fn now(&self) -> Timestamp {
        match self {
            Clock::System => Timestamp::now(),
            Clock::Virtual { at, start } => *at + start.elapsed(),
        }
    }
}
