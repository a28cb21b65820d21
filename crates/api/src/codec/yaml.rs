//! YAML bodies, read as the reference implementation reads them: YAML 1.1 scalars (`yes` is true, `0777`
//! is octal), merge keys, keys of any scalar made into text, and only the first document of a stream.

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Tag};
use serde_json::{Map, Number, Value};

use super::{DecodeError, Decoded, MAX_DEPTH, TOO_DEEP, depth};
use crate::schema::MAX_PROBLEMS;

/// How many values anchors and aliases may copy, all in all: what a small text can swell to.
const MAX_COPIED: usize = 100_000;

/// Decodes the first document.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let text = std::str::from_utf8(bytes).map_err(|_| failed("yaml: invalid leading UTF-8 octet"))?;
    let mut build = Build { stack: Vec::new(), anchors: Vec::new(), copied: 0, duplicates: Vec::new() };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| failed(&syntax_error(&e)))?;
        let line = span.start.line();
        let done = build.event(event).map_err(|text| failed(&format!("yaml: line {line}: {text}")))?;
        if let Some(value) = done {
            return Ok(Decoded { value, duplicates: build.duplicates });
        }
    }
    Ok(Decoded { value: Value::Null, duplicates: Vec::new() })
}

fn failed(text: &str) -> DecodeError {
    DecodeError(format!("error converting YAML to JSON: {text}"))
}

fn syntax_error(error: &ScanError) -> String {
    // The scanner has a limit of its own for nested brackets.
    let text = if error.info().contains("recursion limit") { TOO_DEEP } else { error.info() };
    format!("yaml: line {}: {text}", error.marker().line())
}

/// A collection that has been opened.
struct Open {
    anchor: usize,
    place: Place,
}

enum Place {
    List(Vec<Value>),
    Map { map: Map<String, Value>, key: Option<Key>, merged: Vec<Value>, duplicates: Vec<String> },
}

enum Key {
    Name(String),
    /// `<<`
    Merge,
}

struct Build {
    stack: Vec<Open>,
    /// Values by anchor number, with how many values each holds.
    anchors: Vec<Option<(Value, usize)>>,
    copied: usize,
    duplicates: Vec<String>,
}

impl Build {
    /// Takes in one event; the value once the document is whole.
    fn event(&mut self, event: Event) -> Result<Option<Value>, String> {
        match event {
            Event::Alias(id) => {
                let value = self.copy(id)?;
                self.value(value, 0, true)
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain;
                let merge = plain && text == "<<" && tag.is_none();
                if merge && self.expect_merge() {
                    return Ok(None);
                }
                let value = resolve(&text, plain, tag.as_deref())?;
                self.value(value, anchor, plain)
            }
            Event::SequenceStart(anchor, _) => self.open(anchor, Place::List(Vec::new())),
            Event::MappingStart(anchor, _) => {
                let place =
                    Place::Map { map: Map::new(), key: None, merged: Vec::new(), duplicates: Vec::new() };
                self.open(anchor, place)
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            _ => Ok(None),
        }
    }

    fn open(&mut self, anchor: usize, place: Place) -> Result<Option<Value>, String> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(TOO_DEEP.into());
        }
        self.stack.push(Open { anchor, place });
        Ok(None)
    }

    fn close(&mut self) -> Result<Option<Value>, String> {
        let Some(open) = self.stack.pop() else { return Err("unexpected end of a collection".into()) };
        let value = match open.place {
            Place::List(list) => Value::Array(list),
            Place::Map { mut map, merged, duplicates, .. } => {
                for from in merged {
                    merge_into(&mut map, from)?;
                }
                self.report(duplicates);
                Value::Object(map)
            }
        };
        self.value(value, open.anchor, false)
    }

    fn report(&mut self, keys: Vec<String>) {
        let mut prefix = String::new();
        for open in &self.stack {
            match &open.place {
                Place::List(list) => prefix += &format!("[{}].", list.len()),
                Place::Map { key: Some(Key::Name(name)), .. } => prefix += &format!("{name}."),
                Place::Map { .. } => {}
            }
        }
        let prefix = prefix.replace(".[", "[");
        let room = MAX_PROBLEMS.saturating_sub(self.duplicates.len());
        self.duplicates.extend(keys.into_iter().take(room).map(|key| format!("{prefix}{key}")));
    }

    /// Whether `<<` stands where a key is due; then the next value is merged.
    fn expect_merge(&mut self) -> bool {
        match self.stack.last_mut().map(|o| &mut o.place) {
            Some(Place::Map { key: key @ None, .. }) => {
                *key = Some(Key::Merge);
                true
            }
            _ => false,
        }
    }

    fn value(&mut self, value: Value, anchor: usize, plain: bool) -> Result<Option<Value>, String> {
        if anchor > 0 {
            if self.anchors.len() <= anchor {
                self.anchors.resize(anchor + 1, None);
            }
            let size = self.spend(count(&value))?;
            self.anchors[anchor] = Some((value.clone(), size));
        }
        let Some(open) = self.stack.last_mut() else { return Ok(Some(value)) };
        match &mut open.place {
            Place::List(list) => list.push(value),
            Place::Map { key: key @ None, .. } => *key = Some(Key::Name(key_text(value, plain)?)),
            Place::Map { map, key, merged, duplicates } => match key.take() {
                Some(Key::Merge) => merged.push(value),
                Some(Key::Name(name)) => {
                    if duplicates.len() < MAX_PROBLEMS && map.contains_key(&name) {
                        duplicates.push(name.clone());
                    }
                    map.insert(name, value);
                }
                None => {}
            },
        }
        Ok(None)
    }

    fn copy(&mut self, id: usize) -> Result<Value, String> {
        // The anchor of a collection that is still open has no value yet: it would hold itself.
        let Some(&Some((_, size))) = self.anchors.get(id) else {
            return Err("anchor value contains itself".into());
        };
        self.spend(size)?;
        let value = self.anchors[id].as_ref().map(|(value, _)| value.clone()).unwrap_or_default();
        if self.stack.len() + depth(&value) > MAX_DEPTH {
            return Err(TOO_DEEP.into());
        }
        Ok(value)
    }

    fn spend(&mut self, size: usize) -> Result<usize, String> {
        self.copied += size;
        if self.copied > MAX_COPIED {
            return Err("document contains excessive aliasing".into());
        }
        Ok(size)
    }
}

fn merge_into(map: &mut Map<String, Value>, from: Value) -> Result<(), String> {
    match from {
        Value::Object(from) => {
            for (key, value) in from {
                map.entry(key).or_insert(value);
            }
            Ok(())
        }
        Value::Array(list) => list.into_iter().try_for_each(|from| match from {
            Value::Object(_) => merge_into(map, from),
            _ => Err("map merge requires map or sequence of maps as the value".into()),
        }),
        _ => Err("map merge requires map or sequence of maps as the value".into()),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

fn key_text(key: Value, plain: bool) -> Result<String, String> {
    match key {
        Value::String(text) => Ok(text),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Null if plain => Err("unsupported map key of type: %!s(<nil>), key: <nil>".into()),
        Value::Null => Ok(String::new()),
        Value::Array(_) | Value::Object(_) => Err("invalid map key".into()),
    }
}

fn resolve(text: &str, plain: bool, tag: Option<&Tag>) -> Result<Value, String> {
    let core = tag.filter(|t| t.is_yaml_core_schema()).map(|t| t.suffix.as_str());
    match core {
        Some("str") => Ok(text.into()),
        Some("binary") => {
            use base64::Engine;
            let bytes = base64::engine::general_purpose::STANDARD.decode(text.replace(['\n', ' '], ""));
            let bytes = bytes.map_err(|_| "!!binary value contains invalid base64 data".to_owned())?;
            Ok(String::from_utf8_lossy(&bytes).into_owned().into())
        }
        Some(kind @ ("int" | "float" | "bool" | "null")) => {
            let value = plain_scalar(text);
            let fits = match kind {
                "int" => value.is_i64() || value.is_u64(),
                "float" => value.is_number(),
                "bool" => value.is_boolean(),
                _ => value.is_null(),
            };
            if fits { Ok(value) } else { Err(format!("cannot decode !!str `{text}` as a !!{kind}")) }
        }
        _ if plain => match plain_scalar(text) {
            // JSON has no number for these.
            Value::Null if is_not_finite(text) => Err(format!("json: unsupported value: {text}")),
            value => Ok(value),
        },
        _ => Ok(text.into()),
    }
}

fn is_not_finite(text: &str) -> bool {
    matches!(text.trim_start_matches(['+', '-']), ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN")
}

/// YAML 1.1's reading of a plain scalar.
fn plain_scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return true.into();
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return false.into();
        }
        _ if is_not_finite(text) => return Value::Null,
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return text.into();
    }
    let digits = text.replace('_', "");
    if let Some(number) = integer(&digits) {
        return number.into();
    }
    if is_float(&digits)
        && let Ok(float) = digits.parse::<f64>()
        && let Some(number) = Number::from_f64(float)
    {
        // A whole number is written as one, as the reference implementation's JSON has it.
        return if float.fract() == 0.0 && float.abs() < 1e15 {
            (float as i64).into()
        } else {
            number.into()
        };
    }
    text.into()
}

fn integer(text: &str) -> Option<Number> {
    let (negative, magnitude) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = magnitude.to_ascii_lowercase();
    let (radix, digits) = match lower.get(..2) {
        Some("0x") => (16, &lower[2..]),
        Some("0o") => (8, &lower[2..]),
        Some("0b") => (2, &lower[2..]),
        _ if lower.len() > 1 && lower.starts_with('0') => (8, &lower[1..]),
        _ => (10, &lower[..]),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let value = u64::from_str_radix(digits, radix).ok()?;
    if negative { 0i64.checked_sub_unsigned(value).map(Number::from) } else { Some(value.into()) }
}

/// `[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = text.split_once(['e', 'E']).map_or((text, None), |(m, e)| (m, Some(e)));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent_fits = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['+', '-']).unwrap_or(e);
        !e.is_empty() && digits(e)
    });
    (!whole.is_empty() || !fraction.is_empty()) && digits(whole) && digits(fraction) && exponent_fits
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(text: &str, want: Value) {
        assert_eq!(decode(text.as_bytes()).map(|d| d.value), Ok(want), "{text}");
    }

    #[track_caller]
    fn check_error(text: &str, want: &str) {
        let error = decode(text.as_bytes()).expect_err("it is refused").to_string();
        assert!(error.contains(want), "{error}");
    }

    #[test]
    fn scalars_are_those_of_yaml_1_1() {
        check(
            "a: yes\nb: off\nc: 0777\nd: 1_000\ne: 0x1F\nf: 1e3\ng: .5\nh: ~\ni: 'no'\nj: 1.2.3\nk: -0b11\nl: 2026-01-02\nm: +7\nn2: 08\no: 0o17",
            json!({"a": true, "b": false, "c": 511, "d": 1000, "e": 31, "f": 1000, "g": 0.5, "h": null, "i": "no", "j": "1.2.3",
                   "k": -3, "l": "2026-01-02", "m": 7, "n2": 8, "o": 15}),
        );
        check("a: !!str 1\nb: !!int 2\nc: !!binary aGk=", json!({"a": "1", "b": 2, "c": "hi"}));
    }

    #[test]
    fn keys_become_text() {
        check("1: a\ny: b\n1.5: c\n'2': d", json!({"1": "a", "true": "b", "1.5": "c", "2": "d"}));
        check_error("~: a", "unsupported map key");
        check_error("[1]: a", "invalid map key");
    }

    #[test]
    fn merge_keys_give_way_to_explicit_ones() {
        check(
            "base: &b {v: 1, w: 2}\nother: &o {z: 3, v: 9}\none:\n  <<: *b\n  w: 5\nboth:\n  <<: [*b, *o]",
            json!({"base": {"v": 1, "w": 2}, "other": {"z": 3, "v": 9}, "one": {"v": 1, "w": 5}, "both": {"v": 1, "w": 2, "z": 3}}),
        );
        check_error("a:\n  <<: 1", "map merge requires");
    }

    #[test]
    fn duplicates_are_named_by_path() {
        let got = decode(b"a: 1\na: 2\nspec:\n  list:\n  - {}\n  - x: 1\n    x: 2\n").expect("YAML");
        assert_eq!(got.duplicates, ["spec.list[1].x", "a"]);
        assert_eq!(got.value["a"], 2);
    }

    #[test]
    fn only_the_first_document_is_read_and_json_is_yaml() {
        check("---\na: 1\n---\nb: 2\n", json!({"a": 1}));
        check("{\"a\": [1, \"x\"]}", json!({"a": [1, "x"]}));
        check("", Value::Null);
    }

    #[test]
    fn hostile_documents_are_refused() {
        let mut laughs = "a: &a [1,1,1,1,1,1,1,1,1,1]\n".to_owned();
        for (before, name) in ('a'..='h').zip('b'..='i') {
            laughs += &format!("{name}: &{name} [{}]\n", vec![format!("*{before}"); 10].join(", "));
        }
        check_error(&laughs, "excessive aliasing");
        // Anchors that are never used cost as much: their values are kept.
        let anchors = "[&a ".repeat(100) + "[" + &"1,".repeat(10_000) + "]" + &"]".repeat(100);
        check_error(&anchors, "excessive aliasing");
        check_error(&"[".repeat(100_000), TOO_DEEP);
        check_error(&"- ".repeat(100_000), TOO_DEEP);
        check_error("a: &a [*a]", "contains itself");
        check_error("a: .inf", "unsupported value");
        check_error("a: b: c", "yaml: line 1");
    }
}
