//! What a Kubernetes object is: the table of kinds, immutable encoded objects, schemas, codecs,
//! selectors, patches and the `Status` error. No I/O, no clock, no randomness.
#![forbid(unsafe_code)]

mod field_errors;
mod kind;
pub mod names;
mod object;
mod selector;
mod status;

pub use field_errors::FieldErrors;
pub use kind::{KINDS, Kind, Subresource};
pub use object::{Draft, EncodeError, Key, Labels, Object, OwnerReference, Revision};
pub use selector::{FieldSelector, LabelSelector, SelectorError};
pub use status::{Cause, Details, ListMeta, Status};
