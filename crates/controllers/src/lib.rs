//! The controllers: one file each, a pure plan and a dull executor.
#![forbid(unsafe_code)]
