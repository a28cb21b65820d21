//! Checks that many kinds share, in upstream's words. Paths are those of the field that is checked.

use minke_api::{FieldErrors, LabelSelector, Quantity, names};
use serde_json::Value;

use super::tree::Tree;

pub const IMMUTABLE: &str = "field is immutable";
const NOT_NEGATIVE: &str = "must be greater than or equal to 0";

/// `path.field`.
pub fn at(path: &str, field: &str) -> String {
    format!("{path}.{field}")
}

pub fn name(value: &str, path: &str, rule: fn(&str) -> Result<(), String>, errors: &mut FieldErrors) {
    if let Err(why) = rule(value) {
        errors.invalid(path, value, &why);
    }
}

/// Each of `fields`, where it stands, is not negative.
pub fn not_negative(holder: &Value, path: &str, fields: &[&str], errors: &mut FieldErrors) {
    for field in fields {
        if let Some(number) = holder.int(field).filter(|n| *n < 0) {
            errors.invalid(&at(path, field), number, NOT_NEGATIVE);
        }
    }
}

/// `field` is there and one of `allowed`.
pub fn one_of(holder: &Value, path: &str, field: &str, allowed: &[&str], errors: &mut FieldErrors) {
    match holder.text(field) {
        "" => errors.required(&at(path, field), ""),
        value if !allowed.contains(&value) => errors.not_supported(&at(path, field), value, allowed),
        _ => {}
    }
}

/// `field` is absent or one of `allowed`.
pub fn one_of_if_set(holder: &Value, path: &str, field: &str, allowed: &[&str], errors: &mut FieldErrors) {
    if !holder.text(field).is_empty() {
        one_of(holder, path, field, allowed, errors);
    }
}

pub fn required(holder: &Value, path: &str, field: &str, errors: &mut FieldErrors) {
    if !holder.has(field) {
        errors.required(&at(path, field), "");
    }
}

/// `field` is what it was.
pub fn immutable(new: &Value, old: &Value, path: &str, field: &str, errors: &mut FieldErrors) {
    if !super::pod::same(new.at(field), old.at(field)) {
        errors.invalid(&at(path, field), new.at(field), IMMUTABLE);
    }
}

pub fn port_number(port: i64, path: &str, errors: &mut FieldErrors) {
    if !(1..=65535).contains(&port) {
        errors.invalid(path, port, "must be between 1 and 65535, inclusive");
    }
}

/// An IANA service name: what ports are called.
pub fn port_name(port: &str, path: &str, errors: &mut FieldErrors) {
    for why in port_name_problems(port) {
        errors.invalid(path, port, why);
    }
}

fn port_name_problems(port: &str) -> Vec<&'static str> {
    let mut problems = Vec::new();
    if port.len() > 15 {
        problems.push("must be no more than 15 bytes");
    }
    if port.is_empty() || !port.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-') {
        problems.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)");
    }
    if !port.bytes().any(|c| c.is_ascii_lowercase()) {
        problems.push("must contain at least one letter (a-z)");
    }
    if port.contains("--") {
        problems.push("must not contain consecutive hyphens");
    }
    if port.starts_with('-') || port.ends_with('-') {
        problems.push("must not begin or end with a hyphen");
    }
    problems
}

/// A number that is not negative, or a percentage.
pub fn int_or_percent(value: &Value, path: &str, errors: &mut FieldErrors) {
    match value {
        Value::Null => {}
        Value::String(text) if percent(text).is_none() => errors.invalid(
            path,
            text,
            "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex \
             used for validation is '[0-9]+%')",
        ),
        Value::String(_) => {}
        _ => {
            if let Some(number) = value.as_i64().filter(|n| *n < 0) {
                errors.invalid(path, number, NOT_NEGATIVE);
            }
        }
    }
}

/// The number in `25%`.
pub fn percent(text: &str) -> Option<i64> {
    let digits = text.strip_suffix('%')?;
    (!digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

/// The number, whether it is a percentage or not.
pub fn number_or_percent(value: &Value) -> i64 {
    value.as_str().and_then(percent).or(value.as_i64()).unwrap_or_default()
}

/// A LabelSelector object; returns it parsed where it can be.
pub fn selector(selector: &Value, path: &str, errors: &mut FieldErrors) -> Option<LabelSelector> {
    crate::validation::label_map(selector.at("matchLabels"), &at(path, "matchLabels"), errors);
    for (n, expression) in selector.items("matchExpressions").iter().enumerate() {
        let path = format!("{path}.matchExpressions[{n}]");
        let values = expression.items("values");
        match expression.text("operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(&at(&path, "values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(
                    &at(&path, "values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(&at(&path, "operator"), other, "not a valid selector operator"),
        }
        name(expression.text("key"), &at(&path, "key"), names::qualified_name, errors);
        for (m, value) in values.iter().filter_map(Value::as_str).enumerate() {
            name(value, &format!("{path}.values[{m}]"), names::label_value, errors);
        }
    }
    let spec = serde_json::from_value(selector.clone()).ok()?;
    LabelSelector::from_spec(&spec).ok()
}

pub fn is_empty_selector(selector: &Value) -> bool {
    !selector.has("matchLabels") && !selector.has("matchExpressions")
}

/// A quantity that is not negative.
pub fn quantity(value: &Value, path: &str, errors: &mut FieldErrors) -> Option<Quantity> {
    let text = value.as_str().map(str::to_owned).unwrap_or_else(|| value.to_string());
    match Quantity::parse(&text) {
        Err(error) => {
            errors.invalid(path, &text, &error.to_string());
            None
        }
        Ok(quantity) if quantity.is_negative() => {
            errors.invalid(path, &text, NOT_NEGATIVE);
            None
        }
        Ok(quantity) => Some(quantity),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ports_have_short_names() {
        for (name, good) in [
            ("http", true),
            ("a-1", true),
            ("80", false),
            ("a--b", false),
            ("-a", false),
            ("Http", false),
            ("a-name-too-long-x", false),
        ] {
            assert_eq!(port_name_problems(name).is_empty(), good, "{name}");
        }
    }

    #[test]
    fn percentages_are_numbers() {
        assert_eq!(percent("25%"), Some(25));
        assert_eq!(percent("25"), None);
        assert_eq!(percent("%"), None);
        assert_eq!(number_or_percent(&json!("0%")), 0);
        assert_eq!(number_or_percent(&json!(3)), 3);
    }
}
