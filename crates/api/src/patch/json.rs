//! JSON patch, RFC 6902.

use json_patch::{Patch, PatchOperation, jsonptr::PointerBuf};
use serde_json::Value;

use super::PatchError;
use crate::codec::{MAX_DEPTH, depth};

/// The most operations in one patch.
pub const MAX_OPERATIONS: usize = 10_000;
/// How many bytes `copy` operations may add, all in all.
pub const MAX_COPIED_BYTES: usize = 3 << 20;

/// What clients are told whenever an operation or test fails.
const GENERIC: &str = "the server rejected our request due to an error in our request";

/// The value that the operations of `patch` make of `original`, or an error and no change.
pub fn apply(mut original: Value, patch: &Value) -> Result<Value, PatchError> {
    let operations = patch.as_array().ok_or_else(|| {
        let got = crate::schema::describe(patch);
        PatchError::Malformed(format!("json: cannot unmarshal {got} into Go value of type jsonpatch.Patch"))
    })?;
    if operations.len() > MAX_OPERATIONS {
        let text = format!(
            "The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}",
            operations.len()
        );
        return Err(PatchError::TooLarge(text));
    }
    let Patch(operations) =
        serde_json::from_value(patch.clone()).map_err(|_| PatchError::Unprocessable(GENERIC.into()))?;
    let mut growth = Growth { depth: depth(&original), copied: 0 };
    for operation in &operations {
        growth.check(operation, &original)?;
        json_patch::patch(&mut original, std::slice::from_ref(operation))
            .map_err(|_| PatchError::Unprocessable(GENERIC.into()))?;
    }
    Ok(original)
}

/// Keeps what a small patch can make of a small object small.
struct Growth {
    /// No smaller than the depth of the object.
    depth: usize,
    copied: usize,
}

impl Growth {
    fn check(&mut self, operation: &PatchOperation, target: &Value) -> Result<(), PatchError> {
        let added = match operation {
            PatchOperation::Add(op) => levels(&op.path) + depth(&op.value),
            PatchOperation::Replace(op) => levels(&op.path) + depth(&op.value),
            PatchOperation::Copy(op) => {
                let Ok(from) = op.from.resolve(target) else { return Ok(()) };
                self.copied += from.to_string().len();
                if self.copied > MAX_COPIED_BYTES {
                    return Err(PatchError::TooLarge(format!(
                        "Unable to complete the copy, the accumulated size increase of copy is {}, exceeding the limit {MAX_COPIED_BYTES}",
                        self.copied
                    )));
                }
                levels(&op.path) + depth(from)
            }
            PatchOperation::Move(op) => levels(&op.path) + self.depth.saturating_sub(levels(&op.from)),
            PatchOperation::Remove(_) | PatchOperation::Test(_) => 0,
        };
        self.depth = self.depth.max(added);
        if self.depth > MAX_DEPTH {
            return Err(PatchError::TooLarge(crate::codec::TOO_DEEP.into()));
        }
        Ok(())
    }
}

fn levels(path: &PointerBuf) -> usize {
    path.count()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(original: Value, patch: Value, want: Result<Value, PatchError>) {
        assert_eq!(apply(original, &patch), want);
    }

    fn generic() -> PatchError {
        PatchError::Unprocessable(GENERIC.into())
    }

    #[test]
    fn operations_apply_in_order_or_not_at_all() {
        check(
            json!({"a": [1, 2], "b": {"c": 1}}),
            json!([{"op": "test", "path": "/b/c", "value": 1}, {"op": "add", "path": "/a/-", "value": 3},
                   {"op": "move", "from": "/b/c", "path": "/d"}, {"op": "copy", "from": "/d", "path": "/e~1f"},
                   {"op": "replace", "path": "/a/0", "value": 0}, {"op": "remove", "path": "/b"}]),
            Ok(json!({"a": [0, 2, 3], "d": 1, "e/f": 1})),
        );
        check(json!({"a": 1}), json!([{"op": "test", "path": "/a", "value": 2}]), Err(generic()));
        check(json!({"a": 1}), json!([{"op": "remove", "path": "/b"}]), Err(generic()));
        check(json!({"a": 1}), json!([{"op": "replace", "path": "/b", "value": 1}]), Err(generic()));
        check(json!({"a": 1}), json!([{"op": "add", "path": "/b/c", "value": 1}]), Err(generic()));
        check(json!({"a": 1}), json!([{"op": "spin", "path": "/a"}]), Err(generic()));
    }

    #[test]
    fn patches_are_bounded() {
        assert!(matches!(apply(json!({}), &json!({})), Err(PatchError::Malformed(_))));
        let many = vec![json!({"op": "test", "path": "", "value": {}}); MAX_OPERATIONS + 1];
        assert!(matches!(apply(json!({}), &Value::Array(many)), Err(PatchError::TooLarge(_))));
        let double =
            json!([{"op": "add", "path": "/b", "value": {}}, {"op": "copy", "from": "/a", "path": "/b/a"}]);
        let Value::Array(double) = double else { unreachable!() };
        let mut swell = Vec::new();
        for i in 0..40 {
            swell.push(json!({"op": "copy", "from": "", "path": format!("/k{i}")}));
        }
        assert!(matches!(
            apply(json!({"a": "x".repeat(1000)}), &Value::Array(swell)),
            Err(PatchError::TooLarge(_))
        ));
        assert!(apply(json!({"a": 1}), &Value::Array(double)).is_ok());
        let deep = (0..200).map(|_| json!({"op": "move", "from": "/a", "path": "/b/a"}));
        let deep: Vec<Value> = deep
            .flat_map(|m| {
                [
                    json!({"op": "add", "path": "/b", "value": {}}),
                    m,
                    json!({"op": "move", "from": "/b", "path": "/a"}),
                ]
            })
            .collect();
        assert!(matches!(apply(json!({"a": {}}), &Value::Array(deep)), Err(PatchError::TooLarge(_))));
    }
}
