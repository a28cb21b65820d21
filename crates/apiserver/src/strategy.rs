//! What is special to a kind when it is written: a few plain functions per kind, none of which does I/O.
//!
//! The order of a write is fixed and the same for all kinds (see the registry): decode, default, admit
//! (mutate), prepare, validate, admit (validate), store. Kinds without behaviour use [`Strategy::PLAIN`].

use minke_api::{FieldErrors, Kind};
use serde_json::Value;

/// Functions over the object as a JSON tree. `status` and `metadata` rules that hold for every kind are
/// the registry's; only what is particular to a kind stands here.
pub struct Strategy {
    /// Fills every default that upstream fills, nested ones included. Idempotent.
    pub set_defaults: fn(&mut Value),
    /// Sets what the server decides at creation (initial status, generated labels). The status that the
    /// client sent is gone by then where the kind has a status subresource.
    pub prepare_create: fn(&mut Value),
    /// Carries over what an update may not change silently. Old status and generation are handled before.
    pub prepare_update: fn(new: &mut Value, old: &Value),
    /// Checks an object that is to be created or replaced.
    pub validate: fn(&Value, &mut FieldErrors),
    /// Checks what may not change between `old` and `new` (immutable fields), beyond [`Strategy::validate`].
    pub validate_update: fn(new: &Value, old: &Value, &mut FieldErrors),
    /// Rule for metadata.name.
    pub name: fn(&str) -> Result<(), String>,
    /// Warnings for the user (deprecated fields and the like).
    pub warnings: fn(&Value) -> Vec<String>,
    /// Whether a PUT of a missing object creates it.
    pub create_on_update: bool,
    /// Whether an update without a resourceVersion is taken.
    pub unconditional_update: bool,
    /// Whether metadata.generation counts changes of anything but metadata and status.
    pub generation: bool,
    /// Whether a completed deletion answers with the object rather than with a Status.
    pub returns_deleted: bool,
}

fn nothing(_: &mut Value) {}

impl Strategy {
    pub const PLAIN: Strategy = Strategy {
        set_defaults: nothing,
        prepare_create: nothing,
        prepare_update: |_, _| {},
        validate: |_, _| {},
        validate_update: |_, _, _| {},
        name: minke_api::names::dns_subdomain,
        warnings: |_| Vec::new(),
        create_on_update: false,
        unconditional_update: true,
        generation: false,
        returns_deleted: false,
    };
}

/// The behaviour of a kind.
pub fn strategy(kind: &'static Kind) -> &'static Strategy {
    crate::kinds::strategy(kind)
}
