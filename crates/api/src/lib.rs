//! What a Kubernetes object is: the table of kinds, immutable encoded objects, schemas, codecs,
//! selectors, patches and the `Status` error. No I/O, no clock, no randomness.
#![forbid(unsafe_code)]

pub mod codec;
pub mod cron;
mod field_errors;
pub mod intstr;
mod kind;
pub mod names;
mod object;
pub mod openapi;
pub mod patch;
pub mod pem;
pub mod placement;
pub mod quantity;
pub mod schema;
mod selector;
mod status;
pub mod storage;
pub mod table;
pub mod time;
mod typed;

pub use field_errors::FieldErrors;
pub use kind::{KINDS, Kind, Subresource};
pub use object::{Draft, EncodeError, Key, Labels, Object, OwnerReference, Revision};
pub use quantity::Quantity;
pub use selector::{FieldSelector, LabelSelector, SelectorError};
pub use status::{Cause, Details, ListMeta, Status};
pub use typed::ApiType;
