//! Whole decisions on random clusters.

mod events;
mod preemption;
mod random;
mod reference;
