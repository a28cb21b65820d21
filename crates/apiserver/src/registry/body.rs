//! Request bodies as trees: are they of the kind they are sent for, and what do they hold that the kind
//! does not have?

use minke_api::{Kind, Status, schema};
use serde_json::Value;

/// What to do about fields that a kind does not have, and about keys that are given twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Validation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

/// A decoded request body.
#[derive(Debug, Clone)]
pub struct Body {
    pub value: Value,
    /// Paths of keys that were given twice.
    pub duplicates: Vec<String>,
}

impl From<Value> for Body {
    fn from(value: Value) -> Body {
        Body { value, duplicates: Vec::new() }
    }
}

/// The type that a body is decoded into.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
}

impl<'a> Expected<'a> {
    pub fn object(kind: &'a Kind) -> Expected<'a> {
        Expected { group: kind.group, version: kind.version, kind: kind.kind }
    }

    fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `Pod in version "v1" cannot be handled as a Pod: why`.
    pub fn refuse(&self, sent: &str, why: impl std::fmt::Display) -> Status {
        Status::bad_request(format!(
            "{sent} in version {:?} cannot be handled as a {}: {why}",
            self.version, self.kind
        ))
    }
}

/// Brings `body` into the form of its type, and says what it had too much by the rules of `validation`.
/// Missing `kind` and `apiVersion` are filled in; other ones than `expected` are refused.
pub fn check(
    expected: Expected<'_>,
    body: Body,
    validation: Validation,
    warnings: &mut Vec<String>,
) -> Result<Value, Status> {
    let Body { mut value, duplicates } = body;
    check_type(expected, &mut value)?;
    let problems = conform(expected, &mut value, &duplicates)?;
    match validation {
        _ if problems.is_empty() => {}
        Validation::Ignore => {}
        Validation::Warn => warnings.extend(problems),
        Validation::Strict => {
            return Err(
                expected.refuse(expected.kind, format!("strict decoding error: {}", problems.join(", ")))
            );
        }
    }
    Ok(value)
}

fn check_type(expected: Expected<'_>, value: &mut Value) -> Result<(), Status> {
    let Value::Object(map) = value else {
        return Err(expected.refuse(expected.kind, "the body is not a JSON object"));
    };
    let text = |name: &str| map.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let want = expected.api_version();
    if !kind.is_empty() && kind != expected.kind {
        let of = if api_version.is_empty() { expected.version } else { &api_version };
        return Err(expected.refuse(
            &kind,
            format_args!("converting ({of}.{kind}) to ({want}.{}): unknown conversion", expected.kind),
        ));
    }
    if !api_version.is_empty() && api_version != want {
        return Err(Status::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({want})"
        )));
    }
    map.insert("apiVersion".to_owned(), want.into());
    map.insert("kind".to_owned(), expected.kind.into());
    Ok(())
}

/// Shapes `value` by its type; returns what it had that the type does not, as messages.
pub fn conform(
    expected: Expected<'_>,
    value: &mut Value,
    duplicates: &[String],
) -> Result<Vec<String>, Status> {
    let mut problems = Vec::new();
    if let Some(ty) = schema::of(expected.group, expected.version, expected.kind) {
        let unknown = schema::conform(ty, value).map_err(|error| expected.refuse(expected.kind, error))?;
        problems.extend(unknown.iter().map(|path| format!("unknown field {path:?}")));
    }
    problems.extend(duplicates.iter().map(|path| format!("duplicate field {path:?}")));
    Ok(problems)
}
